"""
The runs behind docs/CURVES.md, one of each kind that a log can show, and their figures.

    python experiments/reading.py run             # all, one after the other, one to five minutes of a core each; or: run dpo slow
    python experiments/reading.py                 # docs/curves/*.png from experiments/logs/curves (needs matplotlib), and every verdict

A run that has ended is not run again. Its rows are kept in experiments/logs/curves/NAME.jsonl with what the pictures and the rules read.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LOGS, DOCS = ROOT / "experiments" / "logs" / "curves", ROOT / "docs" / "curves"
KEPT = ("step", "loss", "loss_dpo", "loss_sft", "accuracy", "margin", "margin_abs", "saturated", "dgr", "win_gap", "lose_gap", "win_ratio", "lose_ratio", "err_win", "err_lose",
        "ref_err_win", "ref_err_lose", "grad_norm", "lr", "skipped", "by_sigma", "probe", "verdicts")
RUNS = {
    "healthy": ["--loss", "regdpo", "--ref", "cached", "--beta", "30", "--learning_rate", "1e-4", "--steps", "300", "--batch_size", "16"],      # train.py's defaults
    "regdpo": ["--loss", "regdpo", "--ref", "cached", "--steps", "300", "--batch_size", "16"],
    "dpo": ["--loss", "dpo", "--ref", "cached", "--steps", "300", "--batch_size", "16"],
    "separable": ["--loss", "dpo", "--guidance", "2", "--min_timestep", "0", "--steps", "60", "--batch_size", "16"],      # losers with guidance, all sigmas
    "by_heart": ["--loss", "dpo", "--toy_clips", "16", "--steps", "150"],
    "high_beta": ["--loss", "dpo", "--beta", "30000"],
    "low_beta": ["--loss", "dpo", "--beta", "3"],
    "fast": ["--loss", "regdpo", "--learning_rate", "1e-2"],
    "slow": ["--loss", "regdpo", "--learning_rate", "1e-6", "--steps", "110"],
    "not_finite": ["--loss", "regdpo", "--learning_rate", "100"],             # ends by itself after ten such steps
    "identical": ["--loss", "regdpo", "--data", "data/identical", "--steps", "30"],
    "reference_moved": ["--loss", "dpo"],
}


def identical_pairs():
    """data/identical: 64 real clips, and the same files as their negatives."""
    from world import make_real
    make_real(ROOT / "data" / "identical", 64)
    if not (ROOT / "data" / "identical" / "negatives").exists():
        shutil.copytree(ROOT / "data" / "identical" / "real", ROOT / "data" / "identical" / "negatives")


def train_with_moving_reference(argv):
    """train.py whose reference becomes the policy at step 50, as a trainer does that loads it from the wrong place, or refreshes it."""
    import torch
    import train
    backward, steps = train.backward_batch, iter(range(10 ** 6))

    def spoilt(args, policy, ref, *rest):
        if next(steps) == 50:
            with torch.no_grad():
                for mine, theirs in zip(ref.parameters(), policy.parameters()):
                    mine.copy_(theirs)
        return backward(args, policy, ref, *rest)

    train.backward_batch = spoilt
    train.main(train.parse_args(argv))


def run(name):
    out, target = ROOT / "out" / "curves" / name, LOGS / f"{name}.jsonl"
    if target.exists():
        return
    if name == "identical":
        identical_pairs()
    shutil.rmtree(out, ignore_errors=True)                                    # of a run that was stopped
    flags = ["--steps", "80", "--beta", "1000", "--learning_rate", "5e-4", "--batch_size", "8", "--eval_clips", "0", "--save_every", "1000", *RUNS[name], "--out", str(out)]
    program = [str(Path(__file__)), "moving"] if name == "reference_moved" else ["train.py"]
    subprocess.run([sys.executable, *program, *flags], cwd=ROOT, check=name != "not_finite", env=os.environ | {"OMP_NUM_THREADS": "1"})
    keep(out, target)


def keep(out, target):
    """The run's folder -> the small log that is committed."""
    LOGS.mkdir(parents=True, exist_ok=True)
    short = lambda value: json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for row in rows:
        row["by_sigma"].pop("margin", None)                                   # what no rule and no picture reads
    target.write_text("".join(json.dumps(short({key: row[key] for key in KEPT if key in row})) + "\n" for row in rows))


def figures():
    import curves
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in RUNS:
        if (LOGS / f"{name}.jsonl").exists():
            curves.main([str(LOGS / f"{name}.jsonl"), "--out", str(DOCS / f"{name}.png")])


if __name__ == "__main__":
    what, names = (sys.argv[1:2] or ["figures"])[0], sys.argv[2:]
    if what == "moving":
        train_with_moving_reference(names)
    elif what == "figures":
        figures()
    elif what != "run" or set(names) - RUNS.keys():
        sys.exit(f"usage: python experiments/reading.py [run [{' | '.join(RUNS)}]]")
    else:
        for name in names or RUNS:
            run(name)
