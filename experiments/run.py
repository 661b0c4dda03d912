"""
Run a named experiment: every setting with every seed, each as one `python train.py ...` on one rank, several at a time.

    python experiments/run.py losses --seeds 0 1 2 --processes 2

A run that has ended is not run again; one that was killed resumes from its last checkpoint. What report.py needs of
each run is kept in experiments/logs/EXPERIMENT/SETTING_SEED.json: the flags, the exact metrics before and after, and
every fifth row of the log.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parent.parent
PREPARING = Lock()                                 # one job makes what several need
KEPT = ("step", "loss", "loss_dpo", "margin", "accuracy", "win_gap", "lose_gap", "dgr", "c_win", "c_lose",
        "err_win", "ref_err_win", "kept", "grad_norm", "saturated",
        "score", "score_end", "gap", "pairs", "policy_forwards", "score_forwards")


# ----------------------------------------------------------------------------------------------------------------------
# the experiments: {setting: flags of train.py, or a script and its flags}

def at(beta, learning_rate, flags):
    """The flags with this beta (which sft and ipo do not have) and this learning rate."""
    beta_flags = [] if {"sft", "ipo"} & set(flags) else ["--beta", str(beta)]
    return [*flags, *beta_flags, "--learning_rate", str(learning_rate)]


def mild(*flags):
    return at(30, 1e-4, flags)                     # the defaults of train.py


def strong(*flags):
    return at(1000, 5e-4, flags)                   # the paper's beta, and steps that are too large for it


SFT = ["--loss", "sft"]
DPO = ["--loss", "dpo", "--ref", "cached"]
REGDPO = ["--loss", "regdpo", "--ref", "cached"]
OBJECTIVES = {"sft": SFT, "dpo": DPO, "regdpo": REGDPO, "regdpo_r_scale_0.2": [*REGDPO, "--r_scale", "0.2"]}
for loss in ("dpo_cm", "sdpo", "ipo", "dpop", "diffusion_sdpo"):
    OBJECTIVES[loss] = ["--loss", loss, "--ref", "cached"]

# What each objective does with the same 512 GT-Pairs, the same steps and the same flags; and where beta and steps are
# too large for the sigmoid.
LOSSES = {name: mild(*flags) for name, flags in OBJECTIVES.items()}
BETA_300 = {name: at(300, 1e-4, OBJECTIVES[name]) for name in ("dpo", "regdpo", "regdpo_r_scale_0.2")}
BETA_1000 = {name: strong(*flags) for name, flags in OBJECTIVES.items()}
BETA_1000["regdpo_r500"] = strong(*REGDPO, "--r", "500")

# The weight of Reg-DPO's SFT term: fixed, at the paper's shares of the gradient ratio at the start (beta / 2), and in
# multiples of the ratio.
R = {f"r{r:g}": mild(*REGDPO, "--r", str(r)) for r in (0.75, 1.5, 3.75, 9, 15)}
R |= {f"r_scale_{scale:g}": mild(*REGDPO, "--r_scale", str(scale)) for scale in (0.5, 2, 5)}
R_1000 = {f"r{r}": strong(*REGDPO, "--r", str(r)) for r in (25, 50, 125, 300)}
R_1000 |= {f"r_scale_{scale:g}": strong(*REGDPO, "--r_scale", str(scale)) for scale in (0.5, 2, 5)}

# Where DPO and Reg-DPO work at all: a third of the steps.
BETA = {}
for loss in ("dpo", "regdpo"):
    for beta in (3, 30, 300, 3000, 30000):
        for rate in (1e-4, 5e-4, 2e-3):
            flags = [*OBJECTIVES[loss], "--steps", "100", "--eval_clips", "128"]
            BETA[f"{loss}_beta{beta}_lr{rate:g}"] = at(beta, rate, flags)

# r = dgr is DPO with the loser's gradient halved; the loss scale makes up for the factor of 2.
LOSE_HALF = ["experiments/variants.py", "lose_half", *DPO]
HUNDRED_STEPS = ["--steps", "100", "--eval_clips", "0"]
IDENTITY = {"regdpo": strong(*REGDPO, *HUNDRED_STEPS),
            "lose_half": strong(*LOSE_HALF, "--loss_scale", "2e-3", *HUNDRED_STEPS),
            "lose_half_unscaled": strong(*LOSE_HALF, *HUNDRED_STEPS)}

# How the pairs are made: flags of sample.py --pairs. second_round trains Reg-DPO's seed 0 further with negatives of its
# own, more_of_the_same with the old ones.
ROUND_TWO = ["--init", "out/experiments/losses/regdpo_0/export"]
PAIR_FLAGS = {"two": ["--per_sample", "2"], "four": ["--per_sample", "4"], "guidance2": ["--guidance", "2"],
              "steps10": ["--steps", "10"], "steps50": ["--steps", "50"],
              "renoise0.9": ["--renoise", "0.9"], "renoise0.7": ["--renoise", "0.7"], "round2": ROUND_TWO}
PAIRS = {name: mild(*REGDPO, "--data", f"data/pairs_{name}") for name in PAIR_FLAGS if name != "round2"}
PAIRS["separate_noise"] = mild("experiments/variants.py", "separate_noise", "--loss", "regdpo")
PAIRS["second_round"] = mild("--loss", "regdpo", *ROUND_TWO, "--data", "data/pairs_round2")
PAIRS["more_of_the_same"] = mild("--loss", "regdpo", *ROUND_TWO, "--data", "data/pairs_base")

# The same on a base that is less trained (0.37 broken clips at guidance 2 instead of 0.08), and on one trained further.
FORMER_BASE_COMMIT = "270b339"
BETTER_BASE_FLAGS = ["--loss", "sft", "--toy_clips", "20000", "--steps", "1200", "--batch_size", "32",
                     "--learning_rate", "1e-3", "--decay_steps", "1200", "--ema_decay", "0.999",
                     "--caption_dropout", "0.1", "--flow_shift", "5", "--min_timestep", "0", "--eval_clips", "0"]
FORMER_BASE = {name: mild(*OBJECTIVES[name], "--init", "data/former_base") for name in ("sft", "dpo", "regdpo")}
BETTER_BASE = {name: mild(*OBJECTIVES[name], "--init", "data/better_base") for name in ("sft", "dpo", "regdpo")}

# SPO judged by the exact metric, and by a preference model, which comes first: --settings judge --seeds 0. Then pairs
# with as many policy forwards: 128 negatives of 20 steps and 150 steps of 32 videos are 7,360; SPO's exact has 7,362.
# compare.py samples the exports.
SPO_FLAGS = ["train_spo.py", "--sample_steps", "10", "--unbranched", "0", "--step_weight", "inverse", "--beta", "2000",
             "--eval_clips", "0"]
JUDGE = ["--loss", "preference", "--toy_clips", "4096", "--min_timestep", "0", "--batch_size", "32", "--steps", "600",
         "--decay_steps", "300", "--learning_rate", "2e-3"]
EQUAL = ["--toy_clips", "128", "--steps", "150"]
SPO = {"judge": JUDGE,
       "exact": [*SPO_FLAGS, "--steps", "30"],
       "judged": [*SPO_FLAGS, "--steps", "20", "--score", "out/experiments/spo/judge_0/export"],
       "regdpo_equal": mild("--loss", "regdpo", *EQUAL),
       "dpo_equal": mild("--loss", "dpo", *EQUAL)}

EXPERIMENTS = {"losses": LOSSES, "beta300": BETA_300, "beta1000": BETA_1000, "r": R, "r1000": R_1000, "beta": BETA,
               "identity": IDENTITY, "pairs": PAIRS, "former_base": FORMER_BASE, "better_base": BETTER_BASE, "spo": SPO}


# ----------------------------------------------------------------------------------------------------------------------
# what a setting needs

def make_former_base(folder):
    """The toy_base of an earlier commit."""
    archive = ["git", "archive", FORMER_BASE_COMMIT, "toy_base"]
    archive = subprocess.run(archive, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    former = folder.parent / "former"
    former.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-x", "-C", former], input=archive, check=True)
    (former / "toy_base").rename(folder)


def make_better_base(folder):
    """Today's toy_base, trained further."""
    out = ROOT / "out" / "better_base"
    resume = ["--resume", "latest"] if (out / "latest").exists() else []
    subprocess.run([sys.executable, "train.py", *BETTER_BASE_FLAGS, "--out", out, *resume], cwd=ROOT, check=True)
    shutil.copytree(out / "export", folder)


def make_pairs(data):
    """512 real clips in data, a folder name like data/pairs_two, and negatives made as its name says."""
    sys.path.insert(0, str(ROOT))
    from evaluate import make_real
    make_real(ROOT / data, 512)
    flags = PAIR_FLAGS.get(data.removeprefix("data/pairs_"), [])
    subprocess.run([sys.executable, "sample.py", "--pairs", data, *flags], cwd=ROOT, check=True)


def prepare(flags):
    """Make the base and the pairs that a setting names, once."""
    for name, make in (("former_base", make_former_base), ("better_base", make_better_base)):
        if f"data/{name}" in flags and not (ROOT / "data" / name).exists():
            make(ROOT / "data" / name)
    for flag in flags:
        if flag.startswith("data/pairs_"):
            make_pairs(flag)


# ----------------------------------------------------------------------------------------------------------------------
# one run

def value_of(flags, name, default):
    return flags[flags.index(name) + 1] if name in flags else default


def keep(out, target, flags):
    """Write what is committed of a run's folder into target, one small file. Returns the run's marks."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    is_identity = target.parent.name == "identity"
    every = 1 if is_identity or "score" in rows[0] else 5                      # roll-outs are few
    digits = 9 if is_identity else 4
    kept = []
    for row in rows[::every] + rows[-1:]:
        kept.append({name: float(f"{row[name]:.{digits}g}") for name in KEPT if name in row})
    marks = out / "samples" / "marks.json"
    marks = json.loads(marks.read_text()) if marks.exists() else {}
    config = json.loads((out / "config.json").read_text())
    head = {"flags": flags, "torch": config["torch"], "marks": marks}
    lines = ",\n".join(json.dumps(row) for row in kept)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(head)[:-1] + f', "log": [\n{lines}]}}\n')
    return marks


def train(out, flags, seed):
    """Train into the folder out, or resume there. Returns the exit code."""
    resume = ["--resume", "latest"] if (out / "latest").exists() else []
    out.mkdir(parents=True, exist_ok=True)
    # The reference's errors are the same for all losses; train.py refuses them where they do not belong.
    shared = [value_of(flags, "--init", "toy_base"), value_of(flags, "--data", "toy")]
    shared = "_".join(name.replace("/", "-") for name in shared)
    cache = out / "ref_errors.safetensors"
    shared_cache = out.parents[1] / f"ref_errors_{shared}_{seed}.safetensors"
    if not resume:
        (out / "log.jsonl").unlink(missing_ok=True)                            # killed before its first checkpoint
        if shared_cache.exists() and "cached" in flags:
            shutil.copy(shared_cache, cache)
    script = [] if flags[0].endswith(".py") else ["train.py"]
    command = [sys.executable, *script, *flags, "--seed", str(seed), "--out", str(out), *resume]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(out / "printed.txt", "a") as printed:
        ended = subprocess.run(command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT, env=environment)
    if cache.exists() and not shared_cache.exists():
        shutil.copy(cache, shared_cache)
    return ended.returncode


def run(experiment, setting, seed, more_flags):
    """Run one setting with one seed, unless it has ended before, and keep its log. Returns a line to print."""
    out = ROOT / "out" / "experiments" / experiment / f"{setting}_{seed}"
    flags = [*EXPERIMENTS[experiment][setting], *more_flags]
    if not (out / "done").exists():
        with PREPARING:
            prepare(flags)
        if train(out, flags, seed):
            return f"{setting} seed {seed}: FAILED, see {out / 'printed.txt'}"
        (out / "done").touch()
    marks = keep(out, ROOT / "experiments" / "logs" / experiment / f"{setting}_{seed}.json", flags)
    after = [f"{name} {value:.3f}" for name, value in marks.get("after", {}).items()]
    return f"{setting} seed {seed}: " + ", ".join(after)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--settings", nargs="+", default=[], help="run these settings only (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run each setting with")
    parser.add_argument("--processes", type=int, default=2, help="number of runs at a time, one core each")
    parser.add_argument("--flags", default="", help="flags to add to every run, such as '--steps 20'")
    args = parser.parse_args()
    settings = args.settings or list(EXPERIMENTS[args.experiment])
    unknown = sorted(set(settings) - EXPERIMENTS[args.experiment].keys())
    if unknown:
        names = ", ".join(EXPERIMENTS[args.experiment])
        sys.exit(f"--settings {' '.join(unknown)}: {args.experiment} has {names}")
    with ThreadPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(run, args.experiment, setting, seed, args.flags.split())
                for seed in args.seeds for setting in settings]
        for job in jobs:
            print(job.result(), flush=True)


if __name__ == "__main__":
    main()
