"""
Every table of docs/RESULTS.md and every figure it shows, and README.md's table of results, from experiments/logs.

    python experiments/report.py          # rewrites the tables, and docs/results_*.png   (needs matplotlib)

A number is the mean over seeds, ± the distance of the farthest seed; without ± there was one seed. A difference has
its 95 % interval (paired.py). Rows of one table come from the same code and the same base; other rows are refused.
"""
import json
import re
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from paired import in_words, mark_table, paired_difference, paired_frechet
from run import EXPERIMENTS

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("direction", "shape", "drift", "background", "broken", "frechet")


# ----------------------------------------------------------------------------------------------------------------------
# logs

def read(experiment):
    """{setting: [run, run, ...]}, runs as experiments/run.py keeps them, in its order of settings."""
    runs = {}
    for file in sorted((ROOT / "experiments" / "logs" / experiment).glob("*.json")):
        if file.stem.rsplit("_", 1)[-1].isdecimal():                           # others are not runs
            setting, seed = file.stem.rsplit("_", 1)
            runs.setdefault(setting, []).append(json.loads(file.read_text()) | {"seed": int(seed)})
    return {setting: runs[setting] for setting in EXPERIMENTS[experiment] if setting in runs}


def check_one_code(title, runs, names=("code", "init")):
    """Refuse a table whose runs come from different code or, unless names leaves out "init", different bases."""
    for name in names:
        found = {}
        for setting, runs_of_setting in runs.items():
            for run in runs_of_setting:
                found.setdefault(run.get(name), setting)
        if len(found) > 1:
            examples = ", ".join(f"{setting} has {value}" for value, setting in found.items())
            sys.exit(f"table '{title}': expected runs of one {name}, found {len(found)} ({examples}); run the older "
                     "ones again")


def read_base(experiment=""):
    """The base's marks, as a run that has one seed. experiment: where it has a base of its own."""
    file = ROOT / "experiments" / "logs" / experiment / "base.json"
    return {"judged": {"base": json.loads(file.read_text())}}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def spread(values, digits=3):
    """The mean in text, ± the distance of the farthest value where there are several."""
    middle = mean(values)
    text = f"{middle:.{digits}f}"
    if len(values) > 1:
        farthest = max(abs(value - middle) for value in values)
        text += f" ± {farthest:.{digits}f}"
    return text


def mark(runs, name):
    """One mark after training, of each run."""
    return [run["marks"]["after"][name] for run in runs]


def gap(runs, name):
    """Mean of the last 50 steps (ten rows) of each run, [] where the loss has none."""
    return [mean(row[name] for row in run["log"][-10:]) for run in runs if name in run["log"][0]]


# ----------------------------------------------------------------------------------------------------------------------
# tables

def table_row(*cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def table_head(*names):
    return table_row(*names).replace("|  |", "| |") + "| --- " * len(names) + "|\n"


def table(runs):
    """Marks and gaps of each setting, below the base's."""
    if not runs:
        return ""
    before = next(iter(runs.values()))[0]["marks"]["before"]
    titles = ["Fréchet" if name == "frechet" else name for name in MARKS]
    text = table_head("", "seeds", *titles, "win_gap", "lose_gap")
    text += "| base | | " + " | ".join(f"{before[name]:.3f}" for name in MARKS) + " | 0 | 0 |\n"
    for title, runs_of_setting in runs.items():
        cells = [spread(mark(runs_of_setting, name)) for name in MARKS]
        for name in ("win_gap", "lose_gap"):
            gaps = gap(runs_of_setting, name)
            cells.append(spread(gaps) if gaps else "")
        text += table_row(title, len(runs_of_setting), *cells)
    return text


SHOWN = ("drift", "background", "broken", "frechet")               # of judged runs, at each guidance
SHOWN_OF_IMAGES = ("drift", "first_frame", "background", "broken", "frechet")
TITLES = {"frechet": "Fréchet", "first_frame": "first frame"}


def judged_mark(run, mark, guidance, when):
    """The mean over captions of a run's mark after some steps, such as "300 ema"; the base has the one key "base"."""
    value = run["judged"].get("base", run["judged"].get(when))[guidance][mark]
    return mean(value) if isinstance(value, list) else value


def judged_table(runs, when="300 ema", base=None, shown=SHOWN):
    """Marks of each setting without guidance and at guidance 2, and the gaps at the end of training."""
    titles = [f"{TITLES.get(name, name)}{note}" for note in ("", ", g2") for name in shown]
    text = table_head("", "seeds", *titles, "win_gap", "lose_gap")
    for title, runs_of_setting in ({"base": [base or read_base()]} | runs).items():
        is_base = title == "base"
        cells = ["" if is_base else len(runs_of_setting)]
        for guidance in ("1", "2"):
            cells += [spread([judged_mark(run, name, guidance, when) for run in runs_of_setting]) for name in shown]
        for name in ("win_gap", "lose_gap"):
            gaps = [0] if is_base else gap(runs_of_setting, name)
            cells.append(spread(gaps, 0 if is_base else 3) if gaps else "")
        text += table_row(title, *cells)
    return text


def difference(first, second, mark, guidance, when):
    """
    first minus second with its interval, in text: lists of runs; each seed of first meets the same seed of second.
    """
    of_second = "base" if "base" in second[0]["judged"] else when
    if of_second != "base":
        seeds = {run["seed"] for run in first} & {run["seed"] for run in second}
        first, second = ([run for run in runs if run["seed"] in seeds] for runs in (first, second))
    if mark == "frechet":
        marks = [[run["judged"][key][guidance] for run in runs] for runs, key in ((first, when), (second, of_second))]
        return in_words(*paired_frechet(*marks))
    return in_words(*paired_difference(mark_table(first, mark, guidance, when),
                                       mark_table(second, mark, guidance, of_second)))


def difference_table(runs, pairs, guidance, when="300 ema", base=None, shown=SHOWN):
    """A row for each (first, second) of pairs: first minus second, with intervals; lower is better in every column."""
    runs = {"base": [base or read_base()]} | runs
    text = table_head("", "seeds", *(TITLES.get(name, name) for name in shown))
    for first, second in pairs:
        if first in runs and second in runs:
            cells = [difference(runs[first], runs[second], name, guidance, when) for name in shown]
            seeds = min(len(runs[name]) for name in (first, second) if name != "base")
            text += table_row(f"{first} − {second}", seeds, *cells)
    return text


def sigma_table(runs):
    """The gaps of the last 50 steps by quarter of sigma."""
    ranges = ("0 to 0.25", "to 0.5", "to 0.75", "to 1")
    text = table_head("", *(f"{name}, {where}" for name in ("win_gap", "lose_gap") for where in ranges))
    for title, runs_of_setting in runs.items():
        if "win_gap" not in runs_of_setting[0]["by_sigma"]:
            continue
        cells = []
        for name in ("win_gap", "lose_gap"):
            columns = zip(*(run["by_sigma"][name] for run in runs_of_setting))
            cells += [f"{mean(column):.4f}" for column in columns]
        text += table_row(title, *cells)
    return text


def long_table(runs):
    """Marks after every 300 steps, of the average and of the raw weights, without guidance."""
    titles = [f"{TITLES.get(name, name)}{note}" for note in ("", ", raw") for name in SHOWN]
    text = table_head("", "step", *titles)
    for title, runs_of_setting in runs.items():
        for step in sorted({int(key.split()[0]) for key in runs_of_setting[0]["judged"]}):
            cells = [spread([judged_mark(run, name, "1", f"{step} {which}") for run in runs_of_setting])
                     for which in ("ema", "policy") for name in SHOWN]
            text += table_row(title, step, *cells)
    return text


def grid(runs, loss):
    """Drift and background after 100 steps of one loss, for each beta (rows) and learning rate (columns)."""
    cells = {}
    for name, runs_of_setting in runs.items():
        if name.startswith(f"{loss}_beta"):
            beta, rate = re.fullmatch(rf"{loss}_beta(.+)_lr(.+)", name).groups()
            drift, background = (spread(mark(runs_of_setting, each), 2) for each in ("drift", "background"))
            cells[float(beta), float(rate)] = f"{drift} / {background}"
    rates = sorted({rate for _, rate in cells})
    text = table_head(f"beta, {loss}", *(f"lr {rate:g}" for rate in rates))
    for beta in sorted({beta for beta, _ in cells}):
        text += table_row(f"{beta:g}", *(cells.get((beta, rate), "") for rate in rates))
    return text


def identity(runs):
    """Largest relative difference of the policy's errors from those of Reg-DPO (r = dgr), of any seed, up to a step."""
    steps = (1, 10, 30, 100)
    text = table_head("", "seeds", *(f"to step {step}" for step in steps))
    for name in ("lose_half", "lose_half_unscaled"):
        differences = []                                                       # of each seed, of each step
        for run, regdpo in zip(runs[name], runs["regdpo"]):
            errors = [(row["err_win"], other["err_win"]) for row, other in zip(run["log"], regdpo["log"])]
            differences.append([abs(a - b) / b for a, b in errors])
        largest = [max(max(seed[:step]) for seed in differences) for step in steps]
        text += table_row(name, len(differences), *(f"{value:.1e}" for value in largest))
    return text


def write(page, tables):
    """Put each table between its <!-- table: NAME --> and the <!-- end --> that follows."""
    text = page.read_text()
    for name, content in tables.items():
        begin = f"<!-- table: {name} -->\n"
        if begin not in text:
            sys.exit(f"{page} has no place for the table '{name}': <!-- table: {name} --> ... <!-- end -->")
        before, after = text.split(begin, 1)
        text = before + begin + content + after[after.index("<!-- end -->"):]
    page.write_text(text)


# ----------------------------------------------------------------------------------------------------------------------
# figures

def save(figure, path):
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / path, dpi=100)
    plt.close(figure)


def smooth(values, width=5):
    """The running mean over `width` values."""
    return [mean(values[max(0, i - width + 1):i + 1]) for i in range(len(values))]


def plot_curves(runs, settings, keys, path):
    """One panel per key of the log: its mean over seeds, a line per setting, of one colour in all panels."""
    figure, axes = plt.subplots(1, len(keys), figsize=(4.4 * len(keys), 3.6))
    for number, setting in enumerate(settings):
        logs = [run["log"] for run in runs.get(setting, [])]
        for axis, key in zip(axes, keys):
            if not logs or key not in logs[0][0]:
                continue
            length = min(len(log) for log in logs)
            values = [mean(log[i][key] for log in logs) for i in range(length)]
            steps = [row["step"] for row in logs[0][:length]]
            axis.plot(steps, smooth(values), color=f"C{number}", label=setting, linewidth=1.4)
            axis.set(title=key, xlabel="step")
            if key.endswith("gap"):
                axis.set_yscale("symlog", linthresh=0.01)
                axis.axhline(0, color="grey", linewidth=0.6)
    axes[-1].legend(*axes[0].get_legend_handles_labels(), fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    save(figure, path)


def plot_trade(runs, path):
    """What each objective pays in the picture for what it gains in motion: a dot per seed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    before = next(iter(runs.values()))[0]["marks"]["before"]
    for axis, (x, y) in zip(axes, (("background", "drift"), ("frechet", "broken"))):
        axis.plot(before[x], before[y], "k*", markersize=13, label="base")
        for number, (name, runs_of_setting) in enumerate(runs.items()):
            shape = "osD^v"[number // 10 % 5]                                  # matplotlib has ten colours
            axis.plot(mark(runs_of_setting, x), mark(runs_of_setting, y), shape, color=f"C{number % 10}", label=name,
                      markersize=6, alpha=0.85)
        axis.set(xlabel=f"{x} (lower is better)", ylabel=f"{y} (lower is better)")
    axes[1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    save(figure, path)


def plot_judged(runs, path, when="300 ema", base=None):
    """Drift against background without guidance and at guidance 2: a small dot a seed, a large one their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6))
    for axis, guidance in zip(axes, ("1", "2")):
        of_base = [judged_mark(base or read_base(), name, guidance, when) for name in ("background", "drift")]
        axis.plot(*of_base, "k*", markersize=14, label="base")
        for number, (title, runs_of_setting) in enumerate(runs.items()):
            style = {"color": f"C{number % 10}", "marker": "osD"[number // 10], "linestyle": ""}
            x, y = ([judged_mark(run, name, guidance, when) for run in runs_of_setting]
                    for name in ("background", "drift"))
            axis.plot(x, y, markersize=4, alpha=0.5, **style)
            axis.plot(mean(x), mean(y), markersize=9, label=title, **style)
        axis.set(xlabel="background, in 1/255 (lower is better)", ylabel="drift, in pixels (lower is better)",
                 title="without guidance" if guidance == "1" else "guidance 2")
    axes[1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    save(figure, path)


def plot_long(runs, path):
    """Marks after every 300 steps, without guidance: solid the average, dotted the raw weights."""
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(4.2 * len(SHOWN), 3.6))
    for number, (title, runs_of_setting) in enumerate(runs.items()):
        steps = sorted({int(key.split()[0]) for key in runs_of_setting[0]["judged"]})
        for axis, name in zip(axes, SHOWN):
            start = judged_mark(read_base(), name, "1", "")
            for which, line in (("ema", "o-"), ("policy", "o:")):
                values = [mean(judged_mark(run, name, "1", f"{step} {which}") for run in runs_of_setting)
                          for step in steps]
                axis.plot([0, *steps], [start, *values], line, color=f"C{number}", markersize=3,
                          label=title if which == "ema" else None)
            axis.set(title=f"{TITLES.get(name, name)} (lower is better)", xlabel="step")
    axes[-1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    save(figure, path)


def plot_weights(losses, sweep, path):
    """Marks by the weight of the SFT term: fixed, and in multiples of the gradient ratio, which is 15 at the start."""
    runs = sweep | {"r_scale_0.2": losses["regdpo_r_scale_0.2"], "r_scale_1": losses["regdpo"]}
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.4))
    for axis, name in zip(axes, ("drift", "background", "broken", "frechet")):
        for label, prefix, factor in (("r = k dgr, at 15 k", "r_scale_", 15), ("fixed r", "r", 1)):
            settings = [setting for setting in runs if re.fullmatch(prefix + r"[\d.]+", setting)]
            points = sorted((float(setting.removeprefix(prefix)) * factor, mean(mark(runs[setting], name)))
                            for setting in settings)
            axis.plot([x for x, _ in points], [y for _, y in points], "o-", label=label)
        base = losses["dpo"][0]["marks"]["before"][name]
        sft, dpo = mean(mark(losses["sft"], name)), mean(mark(losses["dpo"], name))
        for label, y, colour in (("base", base, "k"), ("SFT", sft, "C2"), ("DPO", dpo, "C3")):
            axis.axhline(y, linestyle="--", linewidth=0.8, color=colour, label=label)
        axis.set(title=f"{name} (lower is better)", xscale="log", xlabel="r")
    axes[0].legend(fontsize=7)
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# pages

OF_MAIN = ("sft", "dpo", "regdpo", "regdpo_r_scale_0.2", "regdpo_r15", "diffusion_sdpo", "dpo_cm", "dpo_cm_0.97_clip1",
           "sdpo", "sdpo_clip1", "dpop", "ipo")            # the other rows of main have tables of their own
DIFFERENCES = (("sft", "base"), ("dpo", "base"), ("regdpo", "base"), ("regdpo", "sft"), ("regdpo", "dpo"),
               ("regdpo_r_scale_0.2", "regdpo"), ("regdpo_r15", "regdpo"), ("diffusion_sdpo", "regdpo"),
               ("diffusion_sdpo", "base"), ("dpo_cm", "dpo"), ("dpo_cm_0.97_clip1", "dpo"), ("sdpo", "dpo"),
               ("sdpo_clip1", "dpo"), ("dpop", "sft"), ("dpop", "regdpo"), ("ipo", "dpo"))
LAST = "1500 ema"
LONG_DIFFERENCES = (("regdpo", "base"), ("dpo", "base"), ("regdpo", "dpo"))


def importance_table():
    """Importance weights of the first steps by noise level (importance.py)."""
    rows = json.loads((ROOT / "experiments" / "logs" / "importance.json").read_text())
    text = table_head("sigma", "pairs of 4,800", "mean weight", "below 0.9", "below 0.97")
    for row in rows:
        low, high = row["sigma"]
        text += table_row(f"{low:g} to {high:g}", row["pairs"], f"{row['mean']:.4f}", f"{row['below 0.9']:.0%}",
                          f"{row['below 0.97']:.0%}")
    return text


def new_tables(runs):
    """{name: table} of the runs over all noise levels, and of what is compared with them."""
    main_runs, long = runs["main"], runs["long"]
    for title, group in (("main", main_runs), ("long", long)):
        check_one_code(title, group)
    of_main = {name: main_runs[name] for name in OF_MAIN if name in main_runs}
    losers = {"losers without guidance": main_runs["regdpo"]}
    if "regdpo_guided_losers" in main_runs:
        losers["losers at guidance 2"] = main_runs["regdpo_guided_losers"]
    adapters = {"all weights": main_runs["regdpo"]}
    adapters |= {name: main_runs[name] for name in main_runs if name.startswith("lora")}
    tables = {"main": judged_table(of_main), "sigma": sigma_table(of_main), "importance": importance_table(),
              "differences": difference_table(of_main, DIFFERENCES, "1"),
              "differences, guidance 2": difference_table(of_main, DIFFERENCES, "2"),
              "long": long_table(long), "long, end": judged_table(long, LAST),
              "long, differences": difference_table(long, LONG_DIFFERENCES, "1", LAST),
              "long, differences, guidance 2": difference_table(long, LONG_DIFFERENCES, "2", LAST),
              "losers": judged_table(losers), "adapters": judged_table(adapters)}
    of_adapters = [(name, "all weights") for name in adapters if name != "all weights"]
    for name, rows, pairs in (("losers", losers, [tuple(losers)[::-1]]), ("adapters", adapters, of_adapters)):
        tables[f"{name}, differences"] = difference_table(rows, pairs, "1")
        tables[f"{name}, differences, guidance 2"] = difference_table(rows, pairs, "2")
    return tables


OF_IMAGES = (("sft", "base"), ("dpo", "base"), ("regdpo", "base"), ("regdpo", "sft"), ("regdpo", "dpo"),
             ("regdpo_r_scale_0.2", "regdpo"), ("diffusion_sdpo", "regdpo"))


def image_tables(runs):
    """{name: table} of image-to-video, whose base and marks are its own (i2v.py)."""
    check_one_code("i2v", runs)
    own = {"base": read_base("i2v"), "shown": SHOWN_OF_IMAGES}
    return {"i2v": judged_table(runs, **own),
            "i2v, differences": difference_table(runs, OF_IMAGES, "1", **own),
            "i2v, differences, guidance 2": difference_table(runs, OF_IMAGES, "2", **own)}


OF_DATA = (("three rounds, fresh losers", "three rounds, first losers"), ("three rounds, fresh losers", "GT-Pairs"),
           ("three rounds, first losers", "GT-Pairs"), ("best against worst of four", "GT-Pairs"),
           ("guided clips win", "GT-Pairs"), ("best against worst of four", "base"), ("guided clips win", "base"))
ROWS_OF_DATA = {"gt_pairs": "GT-Pairs", "first": "one round", "fresh_2": "two rounds, fresh losers",
                "fresh_3": "three rounds, fresh losers", "same_2": "two rounds, first losers",
                "same_3": "three rounds, first losers", "best_worst": "best against worst of four",
                "better_model": "guided clips win"}


def data_tables(runs):
    """{name: table} of rounds, which begin with different weights, and of own clips that win."""
    check_one_code("data", runs, names=("code",))
    rows = {}
    for name, title in ROWS_OF_DATA.items():
        if name in runs:
            # a round has a seed of its own and ends at step 100; here all rows are runs of one seed at their end
            rows[title] = [run | {"seed": 0, "judged": {"end": list(run["judged"].values())[-1]}} for run in runs[name]]
    return {"data": judged_table(rows, "end"), "data, differences": difference_table(rows, OF_DATA, "1", "end"),
            "data, differences, guidance 2": difference_table(rows, OF_DATA, "2", "end")}


def main():
    runs = {name: read(name) for name in EXPERIMENTS}
    losses, strong, beta = runs["losses"], runs["beta1000"], runs["beta"]
    r = runs["r"] | {"r = dgr / 5": losses["regdpo_r_scale_0.2"], "r = dgr": losses["regdpo"]}
    r_1000 = runs["r1000"] | {"r = 500": strong["regdpo_r500"], "r = dgr / 5": strong["regdpo_r_scale_0.2"],
                              "r = dgr": strong["regdpo"]}
    pairs = {"as in the main table": losses["regdpo"]} | runs["pairs"]
    in_short = {title: runs["main"][name] for title, name in (("SFT", "sft"), ("DPO", "dpo"), ("Reg-DPO", "regdpo"))}
    write(ROOT / "README.md", {"objectives": judged_table(in_short)})
    of_data = data_tables(runs["data"]) if runs["data"] else {}
    write(ROOT / "docs" / "RESULTS.md", new_tables(runs) | image_tables(runs["i2v"]) | of_data | {
        "losses": table(losses), "beta300": table(runs["beta300"]), "beta1000": table(strong),
        "r": table(r), "r1000": table(r_1000), "beta dpo": grid(beta, "dpo"), "beta regdpo": grid(beta, "regdpo"),
        "identity": identity(runs["identity"]), "pairs": table(pairs),
        "former base": table(runs["former_base"]), "better base": table(runs["better_base"])})

    keys = ("win_gap", "lose_gap", "accuracy", "dgr")
    names = ("sft", "dpo", "regdpo", "regdpo_r_scale_0.2", "dpo_cm", "sdpo", "ipo", "dpop")
    plot_curves(losses, names, keys, "results_losses.png")
    of_main = {name: runs["main"][name] for name in OF_MAIN if name in runs["main"]}
    plot_judged(of_main, "results_main.png")
    plot_judged(runs["i2v"], "results_i2v.png", base=read_base("i2v"))
    if runs["long"]:
        plot_long(runs["long"], "results_long.png")
    plot_curves(strong, ("sft", "dpo", "regdpo", "dpo_cm", "sdpo", "ipo"), keys, "results_beta1000.png")
    for name, runs_of_setting in beta.items():                                 # dgr on one axis for all betas
        for run in runs_of_setting:
            for row in run["log"]:
                row["dgr / beta"] = row["dgr"] / float(re.search("_beta(.+)_lr", name)[1])
    names = [name for name in beta if name.endswith("_lr0.0001")]
    plot_curves(beta, names, (*keys[:3], "dgr / beta"), "results_beta.png")
    plot_trade(losses, "results_trade.png")
    plot_weights(losses, runs["r"], "results_r.png")
    print("tables in README.md and docs/RESULTS.md, docs/results_*.png")


if __name__ == "__main__":
    main()
