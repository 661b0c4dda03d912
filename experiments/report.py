"""
Tables and figures of an experiment, from experiments/logs/EXPERIMENT.

    python experiments/report.py losses          # -> docs/losses.md, docs/losses.png   (needs matplotlib)

Every number is the mean over seeds, +- the largest distance of a seed from it.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARKS = ("direction", "shape", "drift", "size", "background", "broken", "frechet")
CURVES = ("win_gap", "lose_gap", "accuracy", "dgr")


def read(experiment):
    """-> {setting: [run, run, ...]}, a run as experiments/run.py keeps it."""
    runs = {}
    for file in sorted((HERE / "logs" / experiment).glob("*.json")):
        runs.setdefault(file.stem.rsplit("_", 1)[0], []).append(json.loads(file.read_text()))
    if not runs:
        sys.exit(f"no logs in {HERE / 'logs' / experiment}; make them with: python experiments/run.py {experiment}")
    return runs


def spread(values):
    mean = sum(values) / len(values)
    return f"{mean:.3f}" + (f" ± {max(abs(value - mean) for value in values):.3f}" if len(values) > 1 else "")


def table(runs):
    lines = ["| | seeds | " + " | ".join(MARKS) + " | win_gap | lose_gap |", "| --- " * (len(MARKS) + 4) + "|"]
    before = next(iter(runs.values()))[0]["marks"]["before"]
    lines.append("| base | | " + " | ".join(f"{before[name]:.3f}" for name in MARKS) + " | 0 | 0 |")
    for setting, of_setting in runs.items():
        gaps = [spread([sum(row[gap] for row in run["log"][-10:]) / 10 for run in of_setting]) if gap in of_setting[0]["log"][0] else ""
                for gap in ("win_gap", "lose_gap")]
        lines.append(f"| {setting} | {len(of_setting)} | " + " | ".join(spread([run["marks"]["after"][name] for run in of_setting]) for name in MARKS)
                     + " | " + " | ".join(gaps) + " |")
    return "\n".join(lines) + "\n"


def figure(runs, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4.5 * len(CURVES), 3.6))
    for setting, of_setting in runs.items():
        for axis, name in zip(axes, CURVES):
            if name not in of_setting[0]["log"][0]:
                continue
            rows = zip(*([row[name] for row in run["log"]] for run in of_setting))
            mean = [sum(row) / len(row) for row in rows]
            smooth = [sum(mean[max(0, i - 4):i + 1]) / len(mean[max(0, i - 4):i + 1]) for i in range(len(mean))]
            axis.plot([row["step"] for row in of_setting[0]["log"]], smooth, label=setting, linewidth=1.4)
            axis.set_title(name)
            axis.set_xlabel("step")
    for axis, name in zip(axes, CURVES):
        if name.endswith("gap"):
            axis.set_yscale("symlog", linthresh=0.01)
            axis.axhline(0, color="grey", linewidth=0.6)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) == 2 else sys.exit("usage: python experiments/report.py EXPERIMENT")
    runs = read(name)
    docs = HERE.parent / "docs"
    (docs / f"{name}.md").write_text(table(runs))
    figure(runs, docs / f"{name}.png")
    print(table(runs) + f"written to docs/{name}.md and docs/{name}.png")
