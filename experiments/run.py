"""
Run a named experiment: every setting with every seed, each as one `python train.py ...` on one rank, several at a time.

    python experiments/run.py losses --seeds 0 1 2 --processes 2

A run that has ended is not run again; one that was killed resumes from its last checkpoint. What report.py needs of
each run is kept in experiments/logs/EXPERIMENT/SETTING_SEED.json: the flags, the exact metrics before and after, and
every fifth row of the log.
"""
import argparse
import ast
import hashlib
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
LOGS, OUT = ROOT / "experiments" / "logs", ROOT / "out" / "experiments"
# the files that decide the numbers of a run
DECIDE = ("data.py", "evaluate.py", "experts.py", "fsdp_utils.py", "lora.py", "losses.py", "memory.py", "model.py",
          "run_folder.py", "run_log.py", "sample.py", "samples.py", "toy.py", "train.py", "train_spo.py",
          "experiments/judge.py", "experiments/variants.py")
DECIDE_OF = {"i2v": ("experiments/i2v.py",)}       # and these, of runs of an experiment with files of its own
KEPT = ("step", "loss", "loss_dpo", "margin", "accuracy", "win_gap", "lose_gap", "dgr", "c_win", "c_lose",
        "err_win", "ref_err_win", "kept", "grad_norm", "saturated",
        "score", "score_end", "gap", "pairs", "policy_forwards", "score_forwards")


# ----------------------------------------------------------------------------------------------------------------------
# the experiments: {setting: flags of train.py, or a script and its flags}

def at(beta, learning_rate, flags, lowest=600):
    """The flags with this beta (which sft and ipo do not have), learning rate and lowest timestep."""
    beta_flags = [] if {"sft", "ipo"} & set(flags) else ["--beta", str(beta)]
    return [*flags, *beta_flags, "--learning_rate", str(learning_rate), "--min_timestep", str(lowest)]


def over_all(*flags):
    """All noise levels, marked by judge.py, not by the run itself."""
    return at(30, 1e-4, [*flags, *JUDGED], lowest=0)


def mild(*flags):
    return at(30, 1e-4, flags)                     # the first round: above sigma 0.6


def strong(*flags):
    return at(1000, 5e-4, flags)                   # the paper's beta, and steps that are too large for it


JUDGED = ["--eval_clips", "0", "--save_every", "300", "--keep", "9"]
SFT = ["--loss", "sft"]
DPO = ["--loss", "dpo", "--ref", "cached"]
REGDPO = ["--loss", "regdpo", "--ref", "cached"]
OBJECTIVES = {"sft": SFT, "dpo": DPO, "regdpo": REGDPO, "regdpo_r_scale_0.2": [*REGDPO, "--r_scale", "0.2"]}
for loss in ("dpo_cm", "sdpo", "ipo", "dpop", "diffusion_sdpo"):
    OBJECTIVES[loss] = ["--loss", loss, "--ref", "cached"]

# What each objective does with the same 512 GT-Pairs, the same steps and the same flags, over all noise levels;
# and five times as long, where a run continues one of the main table.
VARIATIONS = {"regdpo_r15": [*REGDPO, "--r", "15"],                                # dgr at the start is beta / 2
              "dpo_cm_0.97_clip1": [*OBJECTIVES["dpo_cm"], "--threshold", "0.97", "--clip", "1"],
              "sdpo_clip1": [*OBJECTIVES["sdpo"], "--clip", "1"]}
MAIN = {name: over_all(*flags) for name, flags in (OBJECTIVES | VARIATIONS).items()}
LORA = ["--loss", "regdpo", "--lora_rank"]
MAIN["lora8"] = at(30, 1e-3, [*LORA, "8", *JUDGED], lowest=0)
MAIN["lora8_lr3e-4"] = at(30, 3e-4, [*LORA, "8", *JUDGED], lowest=0)
MAIN["lora8_lr3e-3"] = at(30, 3e-3, [*LORA, "8", *JUDGED], lowest=0)
for rank in (4, 16, 64):
    MAIN[f"lora{rank}_lr3e-3"] = at(30, 3e-3, [*LORA, str(rank), *JUDGED], lowest=0)
MAIN["regdpo_guided_losers"] = over_all(*REGDPO, "--guidance", "2")
LONG = {name: [*MAIN[name], "--steps", "1500"]
        for name in ("dpo", "regdpo", "regdpo_r15", "sft", "dpo_cm_0.97_clip1", "sdpo_clip1")}

# The first round, above sigma 0.6; and where beta and steps are too large for the sigmoid.
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
              "renoise0.9": ["--renoise", "0.9"], "renoise0.7": ["--renoise", "0.7"]}
PAIRS = {name: mild(*REGDPO, "--data", f"data/pairs_{name}") for name in PAIR_FLAGS}
PAIR_FLAGS["round2"] = ROUND_TWO
PAIRS["separate_noise"] = mild("experiments/variants.py", "separate_noise", "--loss", "regdpo")
PAIRS["second_round"] = mild("--loss", "regdpo", *ROUND_TWO, "--data", "data/pairs_round2")
PAIRS["more_of_the_same"] = mild("--loss", "regdpo", *ROUND_TWO, "--data", "data/pairs_base")

# Whose clips win, and whose lose, over all noise levels: three rounds of a hundred steps, each with fresh losers of the
# newest average, or each with the first losers again, next to 300 steps without a stop; and own clips that win
# (own_pairs.py). A round has a seed of its own, so that it draws other noise: --settings first --seeds 0, then
# --settings fresh_2 same_2 --seeds 1, then --settings fresh_3 same_3 --seeds 2.
EXPORTS = "out/experiments/data"
A_ROUND = [*REGDPO, "--steps", "100"]
PAIR_FLAGS["fresh_2"] = ["--init", f"{EXPORTS}/first_0/export"]
PAIR_FLAGS["fresh_3"] = ["--init", f"{EXPORTS}/fresh_2_1/export"]
AFTER_SAME_2 = ["--init", f"{EXPORTS}/same_2_1/export"]
DATA = {"first": over_all(*A_ROUND),
        "fresh_2": over_all(*A_ROUND, *PAIR_FLAGS["fresh_2"], "--data", "data/pairs_fresh_2"),
        "fresh_3": over_all(*A_ROUND, *PAIR_FLAGS["fresh_3"], "--data", "data/pairs_fresh_3"),
        "same_2": over_all(*A_ROUND, *PAIR_FLAGS["fresh_2"], "--data", "data/pairs_base"),
        "same_3": over_all(*A_ROUND, *AFTER_SAME_2, "--data", "data/pairs_base"),
        "gt_pairs": over_all(*REGDPO),
        "best_worst": over_all(*REGDPO, "--data", "data/best_worst/pairs.jsonl"),
        "better_model": over_all(*REGDPO, "--data", "data/better_model/pairs.jsonl")}

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
SIBLING_JUDGE = ["--loss", "preference", "--data", "data/siblings/pairs.jsonl", "--min_timestep", "0",
                 "--batch_size", "32", "--steps", "600", "--decay_steps", "300", "--learning_rate", "2e-3",
                 "--probe_every", "0", "--eval_clips", "0"]
DEFAULTS = ["train_spo.py", "--eval_clips", "0", "--save_every", "30", "--keep", "9"]
EQUAL = ["--toy_clips", "128", "--steps", "150"]
SPO = {"judge": JUDGE,
       "exact": [*SPO_FLAGS, "--steps", "30"],
       "judged": [*SPO_FLAGS, "--steps", "20", "--score", "out/experiments/spo/judge_0/export"],
       "sibling_judge": SIBLING_JUDGE,
       "exact_defaults": DEFAULTS,
       "sibling_defaults": [*DEFAULTS, "--score", "out/experiments/spo/sibling_judge_0/export"],
       "regdpo_equal": mild("--loss", "regdpo", *EQUAL),
       "dpo_equal": mild("--loss", "dpo", *EQUAL)}

# Image-to-video: the main table's flags, on a base that is given the first frame.
OF_IMAGES = ["--init", "experiments/i2v_base", "--data", "data/i2v", "--probe_every", "0"]
I2V = {name: [*over_all(*OBJECTIVES[name]), *OF_IMAGES]
       for name in ("sft", "dpo", "regdpo", "regdpo_r_scale_0.2", "diffusion_sdpo")}

EXPERIMENTS = {"main": MAIN, "long": LONG, "losses": LOSSES, "beta300": BETA_300, "beta1000": BETA_1000,
               "r": R, "r1000": R_1000, "beta": BETA, "identity": IDENTITY, "pairs": PAIRS, "former_base": FORMER_BASE,
               "better_base": BETTER_BASE, "spo": SPO, "i2v": I2V, "data": DATA}


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
    if "data/siblings/pairs.jsonl" in flags:
        making = [sys.executable, "experiments/siblings.py", "make", "data/siblings", "2048"]
        subprocess.run(making, cwd=ROOT, check=True)
    if "data/i2v" in flags:
        for what in (["base"], ["pairs", "data/i2v"]):
            subprocess.run([sys.executable, "experiments/i2v.py", *what], cwd=ROOT, check=True)
    for name in ("best_worst", "better_model"):
        if f"data/{name}/pairs.jsonl" in flags:
            making = [sys.executable, "experiments/own_pairs.py", name, f"data/{name}"]
            subprocess.run(making, cwd=ROOT, check=True)
    for flag in flags:
        if flag.startswith("data/pairs_"):
            make_pairs(flag)


# ----------------------------------------------------------------------------------------------------------------------
# one run

def value_of(flags, name, default):
    return flags[flags.index(name) + 1] if name in flags else default


def code_digest(experiment):
    """Names the code that decides the numbers of an experiment's runs: docstrings and comments do not count."""
    texts = []
    for name in (*DECIDE, *DECIDE_OF.get(experiment, ())):
        tree = ast.parse((ROOT / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                node.body = node.body[1:]
        texts.append(ast.dump(tree))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def judge_command(experiment):
    """The command that marks a model as the runs of an experiment are marked."""
    script = ["experiments/i2v.py", "judge"] if experiment == "i2v" else ["experiments/judge.py"]
    return [sys.executable, *script]


def judge(experiment, out):
    """What the judge says of the average after every 300 steps of a run, and of its raw weights where it is long."""
    judged = {}
    folders = sorted(out.glob("step_*"))
    for folder in folders:
        step = int(folder.name.removeprefix("step_"))
        is_last = folder == folders[-1]
        for which in ("ema", "policy") if len(folders) > 1 else ("ema",):
            file = out / f"judged_{step}_{which}.json"
            guidances = ("1", "2") if is_last and which == "ema" else ("1",)
            if not file.exists():
                command = [*judge_command(experiment), folder, "--which", which, "--out", file]
                subprocess.run([*command, "--guidances", *guidances], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            judged[f"{step} {which}"] = json.loads(file.read_text())
    return judged


def by_sigma(rows):
    """Means of the curves by noise level over these rows: {name: one number for each quarter of sigma}."""
    means = {}
    for name in rows[-1].get("by_sigma", {}):
        columns = zip(*(row["by_sigma"][name] for row in rows))
        seen = [[value for value in column if value is not None] for column in columns]
        means[name] = [float(f"{sum(values) / len(values):.4g}") if values else None for values in seen]
    return means


def init_digest(out):
    """Names the weights that a run began with."""
    step = (out / "latest").read_text().strip()
    return json.loads((out / step / "meta.json").read_text())["init"]


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
    head = {"flags": flags, "torch": config["torch"], "code": (out / "code").read_text(), "init": init_digest(out),
            "marks": marks, "by_sigma": by_sigma(rows[-50:]), "probe": rows[-1].get("probe")}
    if "--keep" in flags:
        head["judged"] = judge(target.parent.name, out)
        at_the_end = head["judged"][f"{rows[-1]['step'] + 1} ema"]["1"]       # of the average, without guidance
        marks["after"] = {"frechet": at_the_end["frechet"]}
        for name in ("drift", "background", "broken"):
            marks["after"][name] = sum(at_the_end[name]) / len(at_the_end[name])
    lines = ",\n".join(json.dumps(row) for row in kept)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(head)[:-1] + f', "log": [\n{lines}]}}\n')
    return marks


def share_errors(source, target):
    """Copy the reference's errors between folders where that has more: they are the same for all losses."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("ref_errors_*.safetensors"):
        copy = target / file.name
        if not copy.exists() or copy.stat().st_size < file.stat().st_size:
            shutil.copy(file, copy.with_suffix(f".{os.getpid()}"))
            copy.with_suffix(f".{os.getpid()}").rename(copy)


def train(out, flags, seed):
    """Train into the folder out, or resume there. Returns the exit code."""
    if not (out / "latest").exists():
        start = out.parents[1] / "main" / out.name
        if out.parent.name == "long" and (start / "done").exists():            # the same run, up to its step 300
            shutil.copytree(start, out, ignore=shutil.ignore_patterns("done", "samples"), symlinks=True)
        else:
            out.mkdir(parents=True, exist_ok=True)
            (out / "log.jsonl").unlink(missing_ok=True)                        # killed before its first checkpoint
            (out / "code").write_text(code_digest(out.parent.name))
    resume = ["--resume", "latest"] if (out / "latest").exists() else []
    if "cached" in flags:
        share_errors(OUT / "ref_errors", out)                                  # train.py refuses what does not fit
    script = [] if flags[0].endswith(".py") else ["train.py"]
    command = [sys.executable, *script, *flags, "--seed", str(seed), "--out", str(out), *resume]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(out / "printed.txt", "a") as printed:
        ended = subprocess.run(command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT, env=environment)
    share_errors(out, OUT / "ref_errors")
    return ended.returncode


def run(experiment, setting, seed, more_flags):
    """Run one setting with one seed, unless it has ended before, and keep its log. Returns a line to print."""
    out = OUT / experiment / f"{setting}_{seed}"
    flags = [*EXPERIMENTS[experiment][setting], *more_flags]
    if not (out / "done").exists():
        with PREPARING:
            prepare(flags)
        if train(out, flags, seed):
            return f"{setting} seed {seed}: FAILED, see {out / 'printed.txt'}"
        (out / "done").touch()
    marks = keep(out, LOGS / experiment / f"{setting}_{seed}.json", flags)
    after = [f"{name} {value:.3f}" for name, value in marks.get("after", {}).items()]
    return f"{experiment} {setting} seed {seed}: " + ", ".join(after)


def judge_base(experiment):
    """Mark the base once, as every run is marked."""
    file, base = LOGS / "base.json", ["toy_base"]
    if experiment == "i2v":
        file, base = LOGS / "i2v" / "base.json", ["experiments/i2v_base", "--real"]
        prepare(OF_IMAGES)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*judge_command(experiment), *base, "--out", file], cwd=ROOT, check=True)


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
    judge_base(args.experiment)
    with ThreadPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(run, args.experiment, setting, seed, args.flags.split())
                for seed in args.seeds for setting in settings]
        for job in jobs:
            print(job.result(), flush=True)


if __name__ == "__main__":
    main()
