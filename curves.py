"""
Verdicts on the log of a run, in words, and its picture. docs/CURVES.md shows real curves of each kind.

    python curves.py out/regdpo/log.jsonl                      # verdicts, and out/regdpo/log.png (needs matplotlib)
    python curves.py out/dpo/log.jsonl out/regdpo/log.jsonl    # two runs in one picture, out/dpo/log.png

train.py applies the same rules at every step, prints each verdict once and writes it into the row.
"""
import argparse
import json
import sys
from collections import deque
from pathlib import Path
from statistics import median

WINDOW = 50    # steps that a rule looks back on: a step of 16 pairs says little


# ----------------------------------------------------------------------------------------------------------------------
# rules. Each takes rows of a log, the first one and at least those of the last WINDOW steps, and returns what is wrong
# and what to do, or "".

def last_rows(rows):
    """The rows of the last WINDOW steps."""
    return [row for row in rows if row["step"] > rows[-1]["step"] - WINDOW]


def mean(rows, name):
    """The mean of one key over the rows that have it; 0 where none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else 0.0


def has_lasted(rows, steps=WINDOW):
    """True if the run compares pairs and has taken this many steps."""
    return "win_gap" in rows[-1] and rows[-1]["step"] - rows[0]["step"] >= steps


def same_pairs(rows):
    row = rows[-1]
    if "err_lose" not in row or not row["err_win"] > 0:
        return ""
    same_for_policy = abs(row["err_win"] - row["err_lose"]) <= 1e-6 * abs(row["err_lose"])
    same_for_reference = abs(row["ref_err_win"] - row["ref_err_lose"]) <= 1e-6 * abs(row["ref_err_lose"])
    if same_for_policy and same_for_reference:
        return ("win and lose have the same errors, so they are the same clips: "
                "look at the pairs, and at what made the negatives")
    return ""


def not_finite(rows):
    if rows[-1].get("skipped"):
        return ("the gradient was not finite, and the step changed nothing: lower the learning rate, "
                "or look for damaged samples in this step's batch")
    return ""


def runs_from_both(rows):
    recent = last_rows(rows)
    win_gap = mean(recent, "win_gap")
    lose_gap = mean(recent, "lose_gap")
    ref_err_win = mean(recent, "ref_err_win")
    accuracy = mean(recent, "accuracy")
    if has_lasted(rows) and win_gap > 0.2 * ref_err_win and lose_gap > win_gap and accuracy > 0.55:
        return (f"the winner is denoised {win_gap / ref_err_win:.0%} worse than by the reference while accuracy is "
                f"{accuracy:.2f}: the margin is won by making the loser still worse (win_gap {win_gap:.2g}, lose_gap "
                f"{lose_gap:.2g}), and samples lose quality. Take --loss regdpo or a larger --r_scale, or stop earlier")
    return ""


def collapsed(rows):
    recent = last_rows(rows)
    win_ratio = mean(recent, "win_ratio")
    win_gap = mean(recent, "win_gap")
    if has_lasted(rows, 10) and (win_ratio > 5 or win_gap > 0.5):
        return (f"errors of wins are {win_ratio:.1f} times the reference's (win_gap {win_gap:.2g}): the model has lost "
                "what it could do. Go back to an earlier checkpoint with a lower --learning_rate")
    return ""


def too_fast(rows):
    recent = last_rows(rows)
    ref_err_win = mean(recent, "ref_err_win")
    accuracy = mean(recent, "accuracy")
    if has_lasted(rows, 25) and mean(recent, "win_gap") > 0.5 * ref_err_win and accuracy < 0.6:
        return (f"both errors rise (wins' to {mean(recent, 'err_win') / ref_err_win:.1f} times the reference's) and "
                f"accuracy does not ({accuracy:.2f}): steps are too large. Take a tenth of the --learning_rate")
    return ""


def overshoots(rows):
    recent = last_rows(rows)
    loss_dpo = mean(recent, "loss_dpo")
    if has_lasted(rows) and loss_dpo > 2:
        return (f"the preference loss is {loss_dpo:.1f}, above the 0.69 of a model that has learnt nothing: margins "
                f"are large with either sign ({mean(recent, 'saturated'):.0%} beyond 5, accuracy "
                f"{mean(recent, 'accuracy'):.2f}), so each step pulls as hard as it can at the pairs that are wrong. "
                "A lower --beta weighs pairs more evenly, a lower --learning_rate makes margins smaller")
    return ""


def saturated(rows):
    recent = last_rows(rows)
    share = mean(recent, "saturated")
    accuracy = mean(recent, "accuracy")
    if has_lasted(rows) and share > 0.9 and accuracy > 0.95:
        return (f"{share:.0%} of the margins are beyond 5 and accuracy is {accuracy:.2f}: these pairs are learnt. "
                "More or harder pairs, a lower --beta, or stop")
    return ""


def dead(rows):
    beta = 2 * rows[0].get("dgr", 0.0)                     # at step 0 policy and reference are equal: dgr is beta / 2
    if not (has_lasted(rows) and rows[0]["step"] == 0 and beta):
        return ""
    recent = last_rows(rows)
    dgr = median(row["dgr"] for row in recent)             # one wrong pair would spoil a mean
    if dgr >= 1e-3 * beta:
        return ""
    text = (f"the gradient ratio is {dgr:.2g} in the typical step, of {beta / 2:.3g} at the start: "
            "the preference no longer moves the model")
    if "loss_sft" in recent[-1]:
        return text + ", and with r = dgr neither does the SFT term. A fixed --r, a lower --beta, or stop"
    return text + ". A lower --beta, harder pairs, or stop"


def separable(rows):
    if rows[-1]["step"] > 2 * WINDOW or by_heart(rows):
        return ""
    recent = rows[-15:]                                    # few: later a good model is right too
    places = {"": [row for row in recent if "win_gap" in row]}
    bins = len(rows[-1].get("by_sigma", {}).get("lose_gap", ()))
    if "loss_sft" in rows[-1] or "safeguard" in rows[-1]:  # the winner is held: grain at low noise does no harm
        bins = 0
    for i in range(bins):                                  # grain shows at low noise only, where a step has few pairs
        rows_of_bin = [{name: values[i] for name, values in row["by_sigma"].items()} for row in recent]
        where = f" at sigma {i / bins:g} to {(i + 1) / bins:g}"
        places[where] = [row for row in rows_of_bin if row["accuracy"] is not None]
    for where, rows_there in places.items():
        accuracy = mean(rows_there, "accuracy")
        win_gap = mean(rows_there, "win_gap")
        ref_err_win = max(1e-12, mean(rows_there, "err_win") - win_gap)
        moved = max(abs(win_gap), abs(mean(rows_there, "lose_gap"))) / ref_err_win
        if len(rows_there) > 9 and accuracy > 0.93 and moved < 0.2:
            return (f"accuracy{where} is {accuracy:.2f} although errors have hardly moved there ({moved:.0%}): "
                    "something trivial, such as grain, tells wins from losers. See python evaluate.py DATA; "
                    "make negatives without guidance and with the same encoder, and hold the picture with --loss "
                    "regdpo, or with --loss dpo raise --min_timestep")
    return ""


def nothing_moves(rows):
    recent = last_rows(rows)
    ref_err_win = mean(recent, "ref_err_win")
    moved = max(abs(mean(recent, "win_gap")), abs(mean(recent, "lose_gap")))
    margin = mean(recent, "margin_abs")
    # Accuracy is not asked: it counts signs, and may be high all the same.
    if has_lasted(rows, 2 * WINDOW) and moved < 2e-3 * ref_err_win and margin < 0.3:
        return (f"after {rows[-1]['step']} steps errors differ from the reference's by {moved / ref_err_win:.2%} and "
                f"margins are {margin:.2g}: the model hardly moves, whatever accuracy ({mean(recent, 'accuracy'):.2f}) "
                "says. Raise the --learning_rate (beta does not: --loss_scale takes it out of the gradient)")
    return ""


def reference_moved(rows):
    probes = [row["probe"]["ref_err_win"] for row in rows if "ref_err_win" in row.get("probe", {})]
    if probes and any(abs(now - first) > 0.01 * first for now, first in zip(probes[-1], probes[0])):
        return ("the reference's errors on the probe have changed since the first probe of this log: "
                "other weights, another data folder or another machine than it began with")
    before = last_rows(rows)[:-1]
    if len(before) > 9 and rows[-1].get("margin_abs", 1.0) < 1e-3 * mean(before, "margin_abs"):
        return (f"margins were {mean(before, 'margin_abs'):.2g} and are 0 at once: the reference has become the "
                "policy, and what was learnt until now no longer counts")
    first_rows = [row for row in rows if row["step"] < rows[0]["step"] + WINDOW]
    if not has_lasted(rows, 2 * WINDOW) or len(first_rows) <= 4:
        return ""
    at_start = mean(first_rows, "ref_err_win")
    now = mean(last_rows(rows), "ref_err_win")
    if not 0.6 < now / at_start < 1.7:
        return (f"the reference's error of wins was {at_start:.3g} on average at the start and is {now:.3g}: "
                "the reference moved, or the data did. Gaps and margins are no longer against the base")
    return ""


def by_heart(rows):
    probes = [row["probe"] for row in rows if "accuracy" in row.get("probe", {})]
    if not probes or not has_lasted(rows):
        return ""
    held_out = sum(probes[-1]["accuracy"]) / len(probes[-1]["accuracy"])
    trained = mean(last_rows(rows), "accuracy")
    if trained > 0.8 and held_out < trained - 0.25:
        return (f"accuracy is {trained:.2f} on the pairs trained on and {held_out:.2f} on the probe's: "
                "pairs are learnt by heart. More pairs, fewer steps, or a lower --learning_rate")
    return ""


RULES = (same_pairs, not_finite, separable, runs_from_both, collapsed, too_fast, overshoots, saturated, dead,
         nothing_moves, reference_moved, by_heart)


class Watch:
    """
    The rules, applied row by row while a run is under way; watch(row) returns the verdicts that are new.

    rows: those already in the log after a resume; their verdicts are not given again.
    Each of two experts is judged by its own rows.
    """

    def __init__(self, rows=()):
        self.first = []          # rows of the first WINDOW steps (of each expert), and the one with the first probe
        self.recent = deque()    # rows of the last 2 * WINDOW steps
        self.given = set()       # (expert, name of a rule) whose verdict has been given
        for row in rows:
            self.add(row)
            self.given |= {(row.get("expert"), name) for name in row.get("verdicts", ())}

    def add(self, row):
        first = [earlier for earlier in self.first if earlier.get("expert") == row.get("expert")]
        has_first_probe = "probe" in row and not any("probe" in earlier for earlier in first)
        if not first or row["step"] < first[0]["step"] + WINDOW or has_first_probe:
            self.first.append(row)
        else:
            self.recent.append(row)
        while self.recent and self.recent[0]["step"] <= row["step"] - 2 * WINDOW:
            self.recent.popleft()

    def __call__(self, row):
        """One more row. Writes new verdicts into it, {rule: text}, and returns them as lines to print."""
        self.add(row)
        expert = row.get("expert")                         # of a run with two; else None
        rows = [earlier for earlier in [*self.first, *self.recent] if earlier.get("expert") == expert]
        verdicts = {}
        for rule in RULES:
            text = "" if (expert, rule.__name__) in self.given else rule(rows)
            if text:
                verdicts[rule.__name__] = text
        self.given |= {(expert, name) for name in verdicts}
        if verdicts:
            row["verdicts"] = verdicts
        where = f"step {row['step']:>5}  {title(expert) + ': ' if expert else ''}"
        return [f"{where}{title(name).upper()}: {text}" for name, text in verdicts.items()]


def title(rule):
    """The name of a rule in words: "runs_from_both" -> "runs from both"."""
    return rule.replace("_", " ")


# ----------------------------------------------------------------------------------------------------------------------
# picture

CURVES = (("loss_dpo", "accuracy", "margin", "dgr"), ("win_gap", "lose_gap", "win_ratio", "saturated"))
BANDS = ("margin", "win_gap", "lose_gap", "win_ratio")      # drawn grey: what is within is harmless
EQUAL = {"loss_dpo": 0.693, "accuracy": 0.5}                # where policy and reference are equal: a grey line


def smooth(values, over):
    """The running mean: at each place the mean of the last `over` values, or of all values so far."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - over):end]
        means.append(sum(window) / len(window))
    return means


def plot_curve(axis, name, rows, colour, label, over):
    """One key of one log on one axis: running mean (line), probe (dots), verdicts (vertical lines)."""
    logged = [row for row in rows if row.get(name) is not None]
    means = smooth([row[name] for row in logged], over)
    axis.plot([row["step"] for row in logged], means, color=colour, linewidth=1.3, label=label)
    probed = [row for row in rows if name in row.get("probe", {})]
    probes = [sum(row["probe"][name]) / len(row["probe"][name]) for row in probed]
    axis.plot([row["step"] for row in probed], probes, "o", color=colour, markersize=4)
    for row in rows:
        if "verdicts" in row:
            axis.axvline(row["step"], color=colour, linewidth=0.5, linestyle=":")


def plot(logs, path, over=10):
    """
    Draw logs {title: rows} into a PNG at path: running means over `over` rows.

    Lines are the pairs trained on, dots the probe's mean over its sigmas; a vertical line is the step at which a
    verdict of the title was given. Grey bands: gaps within a tenth of the first log's `ref_err_win`, margins that are
    not saturated.
    Raises ValueError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install matplotlib (verdicts do not: --no_plot)") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = len(CURVES[0])
    figure, axes = plt.subplots(len(CURVES), columns, figsize=(3.6 * columns, 2.7 * len(CURVES)), squeeze=False)
    tenth = mean(next(iter(logs.values())), "ref_err_win") / 10
    # Each axis shows at least this range, so that the eye sees what is small.
    ranges = {"loss_dpo": (0, 1), "accuracy": (0, 1), "margin": (-5, 5), "dgr": (0, 0),
              "win_gap": (-tenth, tenth), "lose_gap": (-tenth, tenth), "win_ratio": (0.9, 1.1), "saturated": (0, 1)}
    names = [name for line in CURVES for name in line]
    for name, axis in zip(names, axes.flat):
        for number, (label, rows) in enumerate(logs.items()):
            plot_curve(axis, name, rows, f"C{number}", label, over)
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.update_datalim([(0, level) for level in ranges[name]])
        axis.autoscale_view()
        if name in BANDS:
            axis.axhspan(*ranges[name], color="0.92", zorder=0)
        if name in EQUAL:
            axis.axhline(EQUAL[name], color="grey", linewidth=0.6)
    if len(logs) > 1:
        axes[0][1].legend(fontsize=7)
    captions = []
    for label, rows in logs.items():
        verdicts = [f"{title(name)} {row['step']}" for row in rows for name in row.get("verdicts", ())]
        captions.append(f"{label}: {', '.join(verdicts)}" if verdicts else label)
    figure.suptitle("\n".join(captions), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=64, pil_kwargs={"compress_level": 9})
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# command line

def read_log(path):
    """Rows of a log.jsonl. A line that a kill cut short ends it. Raises ValueError for a file that is not a log."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; a run's log.jsonl was expected")
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            print(f"{path}: line {number} is not a whole row; it and the lines after it are left out", file=sys.stderr)
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}:{number}: no `step` in this row; a run's log.jsonl was expected")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows; a run's log.jsonl was expected")
    return rows


def name_logs(paths):
    """
    The name of each log in the picture: its folder for a log.jsonl, else its stem; full paths where two are equal.
    """
    names = []
    for path in map(Path, paths):
        names.append(path.absolute().parent.name if path.stem == "log" else path.stem)
    return names if len(set(names)) == len(names) else list(paths)


def split_experts(logs):
    """Logs {title: rows}; a run of two experts becomes two logs, since their errors differ in size."""
    split = {}
    for label, rows in logs.items():
        for row in rows:
            name = f"{label}, {title(row['expert'])}" if "expert" in row else label
            split.setdefault(name, []).append(row)
    return split


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("logs", nargs="+", help="log.jsonl of one run, or of several")
    parser.add_argument("--out", default="", help="file of the picture (default: the first log's name, with .png)")
    parser.add_argument("--no_plot", action="store_true", help="print verdicts only")
    args = parser.parse_args(argv)
    logs = {path: read_log(path) for path in args.logs}
    for path, rows in logs.items():
        watch = Watch()
        lines = []
        for row in rows:
            row.pop("verdicts", None)                      # today's rules decide
            lines += watch(row)
        print(f"{path}: {len(rows)} rows, to step {rows[-1]['step']}")
        print("\n".join(lines or ["no rule fired"]))
    if not args.no_plot:
        out = args.out or Path(args.logs[0]).with_suffix(".png")
        plot(split_experts(dict(zip(name_logs(logs), logs.values()))), out)
        print(f"picture in {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"curves.py: {error}")
