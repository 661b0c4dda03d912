"""
What the log of a run says, in words and as a picture. docs/CURVES.md shows real curves of each kind.

    python curves.py out/regdpo/log.jsonl                      # verdicts, and out/regdpo/log.png (needs matplotlib)
    python curves.py out/dpo/log.jsonl out/regdpo/log.jsonl    # two runs in one picture, dpo/log.png beside the first

train.py asks the same rules at every step, prints each verdict once and writes it into the row.
"""
import argparse
import json
import sys
from collections import deque
from pathlib import Path
from statistics import median

WINDOW = 50    # steps that a rule looks back on: a step of 16 pairs says little


# ------------------------------------------------------------------------------------------------------------------
# rules: rows of a log, the first one and those of the last WINDOW steps at least -> what is wrong and what to do, or ""

def late(rows):
    """The rows of the last WINDOW steps."""
    return [row for row in rows if row["step"] > rows[-1]["step"] - WINDOW]


def mean(rows, name):
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else 0.0


def is_long(rows, steps=WINDOW):
    return "win_gap" in rows[-1] and rows[-1]["step"] - rows[0]["step"] >= steps


def same_pairs(rows):
    now = rows[-1]
    same = lambda a, b: abs(now[a] - now[b]) <= 1e-6 * abs(now[b])
    if "err_lose" in now and now["err_win"] > 0 and same("err_win", "err_lose") and same("ref_err_win", "ref_err_lose"):
        return "win and lose have the same errors, so they are the same clips: look at the pairs, such as what made the negatives"
    return ""


def not_finite(rows):
    if rows[-1].get("skipped"):
        return "the gradient was not finite, and the step changed nothing: lower the learning rate, or look for damaged samples in this step's batch"
    return ""


def runs_from_both(rows):
    recent = late(rows)
    win, lose, ref, right = (mean(recent, name) for name in ("win_gap", "lose_gap", "ref_err_win", "accuracy"))
    if is_long(rows) and win > 0.2 * ref and lose > win and right > 0.55:
        return (f"the winner is denoised {win / ref:.0%} worse than by the reference while accuracy is {right:.2f}: the margin is won by making the loser still worse "
                f"(win_gap {win:.2g}, lose_gap {lose:.2g}), and samples lose quality. Take --loss regdpo or a larger --r_scale, or stop earlier")
    return ""


def collapsed(rows):
    recent = late(rows)
    if is_long(rows, 10) and (mean(recent, "win_ratio") > 5 or mean(recent, "win_gap") > 0.5):
        return (f"errors of wins are {mean(recent, 'win_ratio'):.1f} times the reference's (win_gap {mean(recent, 'win_gap'):.2g}): the model has left what it could do. Go back to an earlier checkpoint "
                "with a lower --learning_rate")
    return ""


def too_fast(rows):
    recent = late(rows)
    ref, right = mean(recent, "ref_err_win"), mean(recent, "accuracy")
    if is_long(rows, 25) and mean(recent, "win_gap") > 0.5 * ref and right < 0.6:
        return (f"both errors rise (wins' to {mean(recent, 'err_win') / ref:.1f} times the reference's) and accuracy does not ({right:.2f}): steps are too large. "
                "Take a tenth of the --learning_rate")
    return ""


def overshoots(rows):
    recent = late(rows)
    loss = mean(recent, "loss_dpo")
    if is_long(rows) and loss > 2:
        return (f"the preference loss is {loss:.1f}, above the 0.69 of a model that has learnt nothing: margins are large with either sign "
                f"({mean(recent, 'saturated'):.0%} beyond 5, accuracy {mean(recent, 'accuracy'):.2f}), so each step pulls as hard as it can at the pairs that are wrong. "
                "A lower --beta weighs pairs more evenly, a lower --learning_rate makes margins smaller")
    return ""


def saturated(rows):
    recent = late(rows)
    if is_long(rows) and mean(recent, "saturated") > 0.9 and mean(recent, "accuracy") > 0.95:
        return (f"{mean(recent, 'saturated'):.0%} of the margins are beyond 5 and accuracy is {mean(recent, 'accuracy'):.2f}: these pairs are learnt. More or harder pairs, "
                "a lower --beta, or stop")
    return ""


def dead(rows):
    recent = late(rows)
    beta = 2 * rows[0].get("dgr", 0.0)                     # policy and reference are equal at step 0, where dgr is beta / 2
    if is_long(rows) and rows[0]["step"] == 0 and beta and median(row["dgr"] for row in recent) < 1e-3 * beta:    # one wrong pair would spoil a mean
        return (f"the gradient ratio is {median(row['dgr'] for row in recent):.2g} in the typical step, of {beta / 2:.3g} at the start: the preference no longer moves the model"
                + (", and with r = dgr neither does the SFT term. A fixed --r, a lower --beta, or stop" if "loss_sft" in recent[-1] else ". A lower --beta, harder pairs, or stop"))
    return ""


def separable(rows):
    recent = rows[-15:]                                    # soon: later a good model is right too
    places = {"": [row for row in recent if "win_gap" in row]}
    bins = len(rows[-1].get("by_sigma", {}).get("lose_gap", ()))
    for i in range(bins):                                  # grain is seen at low noise only, where a step has few pairs
        of_bin = [{name: values[i] for name, values in row["by_sigma"].items()} for row in recent]
        places[f" at sigma {i / bins:g} to {(i + 1) / bins:g}"] = [row for row in of_bin if row["accuracy"] is not None]
    for where, seen in places.items():
        moved = max(abs(mean(seen, "win_gap")), abs(mean(seen, "lose_gap"))) / max(1e-12, mean(seen, "err_win") - mean(seen, "win_gap"))
        if len(seen) > 9 and rows[-1]["step"] <= 2 * WINDOW and mean(seen, "accuracy") > 0.93 and moved < 0.2 and not by_heart(rows):
            return (f"accuracy{where} is {mean(seen, 'accuracy'):.2f} although errors have hardly moved there ({moved:.0%}): something trivial, such as grain, tells wins from losers. "
                    "See python evaluate.py DATA; raise --min_timestep, or make negatives without guidance and with the same encoder")
    return ""


def nothing_moves(rows):
    recent = late(rows)
    ref = mean(recent, "ref_err_win")
    moved = max(abs(mean(recent, name)) for name in ("win_gap", "lose_gap"))
    if is_long(rows, 2 * WINDOW) and moved < 2e-3 * ref and mean(recent, "margin_abs") < 0.3:    # accuracy counts signs, and may be high all the same
        return (f"after {rows[-1]['step']} steps errors differ from the reference's by {moved / ref:.2%} and margins are {mean(recent, 'margin_abs'):.2g}: the model hardly moves, "
                f"whatever accuracy ({mean(recent, 'accuracy'):.2f}) says. Raise the --learning_rate (beta does not: --loss_scale takes it out of the gradient)")
    return ""


def reference_moved(rows):
    probes = [row["probe"]["ref_err_win"] for row in rows if "ref_err_win" in row.get("probe", {})]
    if probes and any(abs(now - first) > 0.01 * first for now, first in zip(probes[-1], probes[0])):
        return "the reference's errors on the probe have changed since the first probe of this log: other weights, another data folder or another machine than it began with"
    recent = late(rows)[:-1]
    if len(recent) > 9 and rows[-1].get("margin_abs", 1.0) < 1e-3 * mean(recent, "margin_abs"):
        return "margins were " + f"{mean(recent, 'margin_abs'):.2g} and are 0 at once: the reference has become the policy, and what was learnt until now no longer counts"
    begun = [row for row in rows if row["step"] < rows[0]["step"] + WINDOW]
    if is_long(rows, 2 * WINDOW) and len(begun) > 4 and not 0.6 < mean(late(rows), "ref_err_win") / mean(begun, "ref_err_win") < 1.7:
        return (f"the reference's error of wins was {mean(begun, 'ref_err_win'):.3g} on average at the start and is {mean(late(rows), 'ref_err_win'):.3g}: the reference moved, "
                "or the data did. Gaps and margins are no longer against the base")
    return ""


def by_heart(rows):
    probes = [row["probe"] for row in rows if "accuracy" in row.get("probe", {})]
    if not probes or not is_long(rows):
        return ""
    held_out, trained = sum(probes[-1]["accuracy"]) / len(probes[-1]["accuracy"]), mean(late(rows), "accuracy")
    if trained > 0.8 and held_out < trained - 0.25:
        return f"accuracy is {trained:.2f} on the pairs trained on and {held_out:.2f} on the probe's: pairs are learnt by heart. More pairs, fewer steps, or a lower --learning_rate"
    return ""


RULES = (same_pairs, not_finite, separable, runs_from_both, collapsed, too_fast, overshoots, saturated, dead, nothing_moves, reference_moved, by_heart)


class Watch:
    """The rules in the course of a run. rows: those that the log holds already, verdicts in them."""

    def __init__(self, rows=()):
        self.begun, self.recent, self.told = [], deque(), set()
        for row in rows:
            self.see(row)
            self.told |= row.get("verdicts", {}).keys()

    def see(self, row):
        first_probe = "probe" in row and not any("probe" in seen for seen in self.begun)
        if not self.begun or row["step"] < self.begun[0]["step"] + WINDOW or first_probe:
            self.begun.append(row)
        else:
            self.recent.append(row)
        while self.recent and self.recent[0]["step"] <= row["step"] - 2 * WINDOW:
            self.recent.popleft()

    def __call__(self, row):
        """One more row. Writes verdicts that are new into it, {rule: text}, and returns them in lines to print."""
        self.see(row)
        rows = [*self.begun, *self.recent]
        found = {rule.__name__: rule(rows) for rule in RULES if rule.__name__ not in self.told}
        found = {name: text for name, text in found.items() if text}
        self.told |= found.keys()
        if found:
            row["verdicts"] = found
        return [f"step {row['step']:>5}  {name.replace('_', ' ').upper()}: {text}" for name, text in found.items()]


# ------------------------------------------------------------------------------------------------------------------
# picture

CURVES = (("loss_dpo", "accuracy", "margin", "dgr"), ("win_gap", "lose_gap", "win_ratio", "saturated"))


def smooth(values, over):
    """Mean of the last `over` values at each place."""
    return [sum(values[max(0, i + 1 - over):i + 1]) / len(values[max(0, i + 1 - over):i + 1]) for i in range(len(values))]


def plot(logs, path, over=10):
    """
    PNG of logs {title: rows}: running means over `over` rows. Lines are the pairs trained on, dots the probe's mean over its sigmas; a vertical line is the
    step at which a verdict of the title was given. Grey bands: gaps within a tenth of the first log's `ref_err_win`, margins not saturated. Raises
    ValueError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install matplotlib (verdicts do not: --no_plot)") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(len(CURVES), len(CURVES[0]), figsize=(3.6 * len(CURVES[0]), 2.7 * len(CURVES)), squeeze=False)
    for number, (title, rows) in enumerate(logs.items()):
        colour = f"C{number}"
        for names, line in zip(CURVES, axes):
            for name, axis in zip(names, line):
                there = [row for row in rows if row.get(name) is not None]
                axis.plot([row["step"] for row in there], smooth([row[name] for row in there], over), color=colour, linewidth=1.3, label=title)
                probes = [row for row in rows if name in row.get("probe", {})]
                axis.plot([row["step"] for row in probes], [sum(row["probe"][name]) / len(row["probe"][name]) for row in probes], "o", color=colour, markersize=4)
                for row in rows:
                    if "verdicts" in row:
                        axis.axvline(row["step"], color=colour, linewidth=0.5, linestyle=":")
                axis.set_title(name, fontsize=10)
                axis.tick_params(labelsize=8)
    tenth = mean(next(iter(logs.values())), "ref_err_win") / 10
    usual = {"loss_dpo": (0, 1), "accuracy": (0, 1), "margin": (-5, 5), "dgr": (0, 0), "win_gap": (-tenth, tenth), "lose_gap": (-tenth, tenth), "win_ratio": (0.9, 1.1), "saturated": (0, 1)}
    for axis in axes.flat:                                                    # at least these ranges, so that the eye sees what is small
        name = axis.get_title()
        axis.update_datalim([(0, level) for level in usual[name]])
        axis.autoscale_view()
        if name in ("margin", "win_gap", "lose_gap", "win_ratio"):
            axis.axhspan(*usual[name], color="0.92", zorder=0)
        elif name in ("loss_dpo", "accuracy"):
            axis.axhline({"loss_dpo": 0.693, "accuracy": 0.5}[name], color="grey", linewidth=0.6)    # where policy and reference are equal
    if len(logs) > 1:
        axes[0][1].legend(fontsize=7)
    verdicts = {title: ", ".join(f"{name.replace('_', ' ')} {row['step']}" for row in rows for name in row.get("verdicts", ())) for title, rows in logs.items()}
    figure.suptitle("\n".join(f"{title}: {found}" if found else title for title, found in verdicts.items()), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=64, pil_kwargs={"compress_level": 9})
    plt.close(figure)


def read_log(path):
    """Rows of a log.jsonl. A line that a kill cut short ends it."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; a run's log.jsonl was expected")
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            print(f"{path}: line {number} is no whole row; it and what follows are left out", file=sys.stderr)
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}:{number}: no `step` in this row; a run's log.jsonl was expected")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("logs", nargs="+", help="log.jsonl of a run, or of several")
    parser.add_argument("--out", default="", help="the picture; by default beside the first log")
    parser.add_argument("--no_plot", action="store_true", help="verdicts only")
    args = parser.parse_args(argv)
    logs = {path: read_log(path) for path in args.logs}
    titles = [Path(path).absolute().parent.name if Path(path).stem == "log" else Path(path).stem for path in logs]
    for path, rows in logs.items():
        watch, lines = Watch(), []
        for row in rows:
            row.pop("verdicts", None)                                         # as the rules are today
            lines += watch(row)
        print("\n".join([f"{path}: {len(rows)} rows, to step {rows[-1]['step']}", *lines] + ["no rule fired"] * (not lines)))
    if not args.no_plot:
        out = args.out or Path(args.logs[0]).with_suffix(".png")
        plot(dict(zip(titles if len(set(titles)) == len(logs) else logs, logs.values())), out)
        print(f"picture in {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"curves.py: {error}")
