"""
The runs of docs/CURVES.md, one of each kind that a log can show, and their figures.

    python experiments/reading.py run             # all, one after the other, one to five minutes of a core each
    python experiments/reading.py run dpo slow    # these only
    python experiments/reading.py                 # from the logs kept: verdicts, docs/curves/*.png (needs matplotlib)

A run that has ended is not run again. Its rows are kept in experiments/logs/curves/NAME.jsonl, with what the pictures
and the rules read.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LOGS = ROOT / "experiments" / "logs" / "curves"
DOCS = ROOT / "docs" / "curves"
KEPT = ("step", "loss", "loss_dpo", "loss_sft", "accuracy", "margin", "margin_abs", "saturated", "dgr",
        "win_gap", "lose_gap", "win_ratio", "lose_ratio", "err_win", "err_lose", "ref_err_win", "ref_err_lose",
        "grad_norm", "lr", "skipped", "by_sigma", "probe", "verdicts")
COMMON = ["--steps", "80", "--beta", "1000", "--learning_rate", "5e-4", "--batch_size", "8", "--eval_clips", "0",
          "--save_every", "1000", "--min_timestep", "600"]
LONG = ["--ref", "cached", "--steps", "300", "--batch_size", "16"]
RUNS = {
    "healthy": ["--loss", "regdpo", *LONG, "--beta", "30", "--learning_rate", "1e-4", "--min_timestep", "0"],
    "regdpo": ["--loss", "regdpo", *LONG],
    "dpo": ["--loss", "dpo", *LONG],
    # losers made with guidance, all sigmas
    "separable": ["--loss", "dpo", "--guidance", "2", "--min_timestep", "0", "--steps", "60", "--batch_size", "16"],
    "by_heart": ["--loss", "dpo", "--toy_clips", "16", "--steps", "150"],
    "high_beta": ["--loss", "dpo", "--beta", "30000"],
    "low_beta": ["--loss", "dpo", "--beta", "3"],
    "fast": ["--loss", "regdpo", "--learning_rate", "1e-2"],
    "slow": ["--loss", "regdpo", "--learning_rate", "1e-6", "--steps", "110"],
    "not_finite": ["--loss", "regdpo", "--learning_rate", "100"],              # ends by itself after ten such steps
    "identical": ["--loss", "regdpo", "--data", "data/identical", "--steps", "30"],
    "reference_moved": ["--loss", "dpo"],
}


def make_identical_pairs():
    """Make data/identical: 64 real clips, and the same files as their negatives."""
    from evaluate import make_real
    folder = ROOT / "data" / "identical"
    make_real(folder, 64)
    if not (folder / "negatives").exists():
        shutil.copytree(folder / "real", folder / "negatives")


def train_with_moving_reference(argv):
    """Run train.py with a reference that becomes the policy at step 50, as if loaded again from the wrong place."""
    import torch
    import train
    backward_batch = train.backward_batch
    step = 0

    @torch.no_grad()
    def copy_policy(policy, ref):
        for ref_parameter, parameter in zip(ref.parameters(), policy.parameters()):
            ref_parameter.copy_(parameter)

    def spoilt_batch(args, policy, ref, *rest):
        nonlocal step
        if step == 50:
            copy_policy(policy, ref)
        step += 1
        return backward_batch(args, policy, ref, *rest)

    train.backward_batch = spoilt_batch
    train.main(train.parse_args(argv))


def run(name):
    out, target = ROOT / "out" / "curves" / name, LOGS / f"{name}.jsonl"
    if target.exists():
        return
    if name == "identical":
        make_identical_pairs()
    shutil.rmtree(out, ignore_errors=True)                                     # of a run that was stopped
    script = [str(Path(__file__)), "moving"] if name == "reference_moved" else ["train.py"]
    command = [sys.executable, *script, *COMMON, *RUNS[name], "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=name != "not_finite", env=os.environ | {"OMP_NUM_THREADS": "1"})
    keep(out, target)


def shorten(row):
    """The row with every number at four digits."""
    return json.loads(json.dumps(row), parse_float=lambda digits: float(f"{float(digits):.4g}"))


def keep(out, target):
    """Write what is committed of a run's log into target."""
    LOGS.mkdir(parents=True, exist_ok=True)
    lines = []
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        row["by_sigma"].pop("margin", None)                                    # what no rule and no picture reads
        row = {key: row[key] for key in KEPT if key in row}
        lines.append(json.dumps(shorten(row)) + "\n")
    target.write_text("".join(lines))


def draw_figures():
    import curves
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in RUNS:
        if (LOGS / f"{name}.jsonl").exists():
            curves.main([str(LOGS / f"{name}.jsonl"), "--out", str(DOCS / f"{name}.png")])


def main(argv):
    if not argv:
        draw_figures()
    elif argv[0] == "moving":
        train_with_moving_reference(argv[1:])
    elif argv[0] == "run" and set(argv[1:]) <= RUNS.keys():
        for name in argv[1:] or RUNS:
            run(name)
    else:
        sys.exit(f"usage: python experiments/reading.py [run [{' | '.join(RUNS)}]]")


if __name__ == "__main__":
    main(sys.argv[1:])
