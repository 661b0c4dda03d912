"""
Every table of docs/RESULTS.md and every figure it shows, and the first table of README.md, from experiments/logs.

    python experiments/report.py          # rewrites the tables, and docs/results_*.png   (needs matplotlib)

A number is the mean over seeds, ± the farthest seed; without ± there was one seed.
"""
import json
import re
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from run import EXPERIMENTS

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("direction", "shape", "drift", "background", "broken", "frechet")
COLUMNS = "| | seeds | direction | shape | drift | background | broken | Fréchet | win_gap | lose_gap |\n" + "| --- " * 10 + "|\n"


def read(experiment):
    """-> {setting: [run, run, ...]}, a run as experiments/run.py keeps it, in run.py's order of settings."""
    runs = {}
    for file in sorted((ROOT / "experiments" / "logs" / experiment).glob("*.json")):
        runs.setdefault(file.stem.rsplit("_", 1)[0], []).append(json.loads(file.read_text()))
    return {setting: runs[setting] for setting in EXPERIMENTS[experiment] if setting in runs}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def spread(values, digits=3):
    middle = mean(values)
    return f"{middle:.{digits}f}" + (f" ± {max(abs(value - middle) for value in values):.{digits}f}" if len(values) > 1 else "")


def mark(runs, name):
    return [run["marks"]["after"][name] for run in runs]


def gap(runs, name):
    """Mean of the last 50 steps (ten rows) of each run, [] where the loss has none."""
    return [mean(row[name] for row in run["log"][-10:]) for run in runs if name in run["log"][0]]


def line(title, runs):
    gaps = [spread(gap(runs, name)) if gap(runs, name) else "" for name in ("win_gap", "lose_gap")]
    return f"| {title} | {len(runs)} | " + " | ".join([spread(mark(runs, name)) for name in MARKS] + gaps) + " |\n"


def table(runs):
    if not runs:
        return ""
    before = next(iter(runs.values()))[0]["marks"]["before"]
    base = "| base | | " + " | ".join(f"{before[name]:.3f}" for name in MARKS) + " | 0 | 0 |\n"
    return COLUMNS + base + "".join(line(name, of_setting) for name, of_setting in runs.items())


def grid(runs, loss):
    """drift and background after 100 steps for each beta (rows) and learning rate (columns)."""
    found = {tuple(map(float, re.fullmatch(rf"{loss}_beta(.+)_lr(.+)", name).groups())): of for name, of in runs.items() if name.startswith(f"{loss}_beta")}
    betas, rates = sorted({beta for beta, _ in found}), sorted({rate for _, rate in found})
    text = f"| beta, {loss} | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |\n" + "| --- " * (len(rates) + 1) + "|\n"
    for beta in betas:
        cells = [f"{spread(mark(found[beta, rate], 'drift'), 2)} / {spread(mark(found[beta, rate], 'background'), 2)}" if (beta, rate) in found else "" for rate in rates]
        text += f"| {beta:g} | " + " | ".join(cells) + " |\n"
    return text


def identity(runs):
    """Largest relative difference, of any seed, from Reg-DPO (r = dgr) of what the policy's errors are, up to a step."""
    steps = (1, 10, 30, 100)
    text = "| | seeds | " + " | ".join(f"to step {step}" for step in steps) + " |\n" + "| --- " * (len(steps) + 2) + "|\n"
    for name in ("lose_half", "lose_half_unscaled"):
        away = [[abs(a["err_win"] - b["err_win"]) / b["err_win"] for a, b in zip(mine["log"], other["log"])] for mine, other in zip(runs[name], runs["regdpo"])]
        text += f"| {name} | {len(away)} | " + " | ".join(f"{max(max(seed[:step]) for seed in away):.1e}" for step in steps) + " |\n"
    return text


# ------------------------------------------------------------------------------------------------------------------
# figures

def smooth(rows, width=5):
    return [mean(rows[max(0, i - width + 1):i + 1]) for i in range(len(rows))]


def curves(runs, names, shown, path):
    figure, axes = plt.subplots(1, len(shown), figsize=(4.4 * len(shown), 3.6))
    for setting in (name for name in names if name in runs):
        for axis, name in zip(axes, shown):
            if name in runs[setting][0]["log"][0]:
                values = [mean(row) for row in zip(*([row[name] for row in run["log"]] for run in runs[setting]))]
                axis.plot([row["step"] for row in runs[setting][0]["log"]][:len(values)], smooth(values), label=setting, linewidth=1.4)
                axis.set(title=name, xlabel="step")
                if name.endswith("gap"):
                    axis.set_yscale("symlog", linthresh=0.01)
                    axis.axhline(0, color="grey", linewidth=0.6)
    axes[-1].legend(*axes[0].get_legend_handles_labels(), fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    save(figure, path)


def save(figure, path):
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / path, dpi=100)
    plt.close(figure)


def trade(runs, path):
    """What each objective pays in the picture for what it gains in motion: a dot a seed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    before = next(iter(runs.values()))[0]["marks"]["before"]
    for axis, (x, y) in zip(axes, (("background", "drift"), ("frechet", "broken"))):
        axis.plot(before[x], before[y], "k*", markersize=13, label="base")
        for number, (name, of_setting) in enumerate(runs.items()):
            axis.plot(mark(of_setting, x), mark(of_setting, y), "osD^v"[number // 10 % 5] if number > 9 else "o", color=f"C{number % 10}", label=name, markersize=6, alpha=0.85)
        axis.set(xlabel=f"{x} (lower is better)", ylabel=f"{y} (lower is better)")
    axes[1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    save(figure, path)


def weights(losses, sweep, path):
    """Marks against the weight of the SFT term: fixed, and in multiples of the gradient ratio, which is 15 at the start."""
    runs = sweep | {"r_scale_0.2": losses["regdpo_r_scale_0.2"], "r_scale_1": losses["regdpo"]}
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.4))
    for axis, name in zip(axes, ("drift", "background", "broken", "frechet")):
        for label, begins, factor in (("r = k dgr, at 15 k", "r_scale_", 15), ("fixed r", "r", 1)):
            points = sorted((float(setting.removeprefix(begins)) * factor, setting) for setting in runs if re.fullmatch(begins + r"[\d.]+", setting))
            axis.plot([x for x, _ in points], [mean(mark(runs[setting], name)) for _, setting in points], "o-", label=label)
        for label, y in (("base", losses["dpo"][0]["marks"]["before"][name]), ("SFT", mean(mark(losses["sft"], name))), ("DPO", mean(mark(losses["dpo"], name)))):
            axis.axhline(y, linestyle="--", linewidth=0.8, color={"base": "k", "SFT": "C2", "DPO": "C3"}[label], label=label)
        axis.set(title=f"{name} (lower is better)", xscale="log", xlabel="r")
    axes[0].legend(fontsize=7)
    save(figure, path)


def write(page, tables):
    """Puts each table between its <!-- table: NAME --> and the <!-- end --> that follows."""
    text = page.read_text()
    for name, content in tables.items():
        text, places = re.subn(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", lambda match: match[1] + content + match[2], text, flags=re.S)
        if not places:
            sys.exit(f"{page} has no place for the table '{name}': <!-- table: {name} --> ... <!-- end -->")
    page.write_text(text)


def main():
    found = {name: read(name) for name in EXPERIMENTS}
    losses, strong, beta = found["losses"], found["beta1000"], found["beta"]
    sweep = found["r"] | {"r = dgr / 5": losses["regdpo_r_scale_0.2"], "r = dgr": losses["regdpo"]}
    strong_sweep = found["r1000"] | {f"r = {title}": strong[name] for title, name in (("500", "regdpo_r500"), ("dgr / 5", "regdpo_r_scale_0.2"), ("dgr", "regdpo"))}
    pairs = {"as in the main table": losses["regdpo"]} | found["pairs"]
    first = {title: losses[name] for title, name in (("SFT", "sft"), ("DPO", "dpo"), ("Reg-DPO, r = dgr (the default)", "regdpo"), ("Reg-DPO, r = dgr / 5", "regdpo_r_scale_0.2"))}
    first |= {"Reg-DPO, r = 3.75": found["r"]["r3.75"]} | {title: losses[name] for title, name in (
        ("Diffusion-SDPO", "diffusion_sdpo"), ("DPO-C&M", "dpo_cm"), ("SDPO", "sdpo"), ("DPOP", "dpop"), ("IPO", "ipo"))}
    first |= {"DPO, beta 1000, learning rate 5e-4": strong["dpo"], "Reg-DPO, beta 1000, learning rate 5e-4": strong["regdpo"]}
    write(ROOT / "README.md", {"objectives": table(first)})
    write(ROOT / "docs" / "RESULTS.md", {
        "losses": table(losses), "beta300": table(found["beta300"]), "beta1000": table(strong), "r": table(sweep), "r1000": table(strong_sweep), "beta dpo": grid(beta, "dpo"),
        "beta regdpo": grid(beta, "regdpo"), "identity": identity(found["identity"]), "pairs": table(pairs), "former base": table(found["former_base"]),
        "better base": table(found["better_base"])})
    shown = ("win_gap", "lose_gap", "accuracy", "dgr")
    curves(losses, ("sft", "dpo", "regdpo", "regdpo_r_scale_0.2", "dpo_cm", "sdpo", "ipo", "dpop"), shown, "results_losses.png")
    curves(strong, ("sft", "dpo", "regdpo", "dpo_cm", "sdpo", "ipo"), shown, "results_beta1000.png")
    for name, runs in beta.items():                                           # on one axis for all betas
        for row in (row for run in runs for row in run["log"]):
            row["dgr / beta"] = row["dgr"] / float(re.search("_beta(.+)_lr", name)[1])
    curves(beta, [name for name in beta if name.endswith("_lr0.0001")], (*shown[:3], "dgr / beta"), "results_beta.png")
    trade(losses, "results_trade.png")
    weights(losses, found["r"], "results_r.png")
    print("tables in README.md and docs/RESULTS.md, docs/results_*.png")


if __name__ == "__main__":
    main()
