"""
Runs a named experiment: every setting with every seed, each as one `python train.py ...` on one rank, resumably, several at a time.

    python experiments/run.py losses --seeds 0 1 2 --processes 2

A run that has ended is not run again, one that was killed goes on from its last checkpoint. What report.py needs of each run is kept in
experiments/logs/EXPERIMENT/SETTING_SEED.json: the flags, the exact metrics before and after, and every fifth row of the log.
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
PREPARING = Lock()                                                            # one job makes what several need
KEPT = ("step", "loss", "loss_dpo", "margin", "accuracy", "win_gap", "lose_gap", "dgr", "c_win", "c_lose", "err_win", "ref_err_win", "kept", "grad_norm", "saturated",
        "score", "score_end", "gap", "pairs", "policy_forwards", "score_forwards")
SFT, DPO, REGDPO = ["--loss", "sft"], ["--loss", "dpo", "--ref", "cached"], ["--loss", "regdpo", "--ref", "cached"]
OBJECTIVES = {"sft": SFT, "dpo": DPO, "regdpo": REGDPO, "regdpo_r_scale_0.2": [*REGDPO, "--r_scale", "0.2"]} | {
    loss: ["--loss", loss, "--ref", "cached"] for loss in ("dpo_cm", "sdpo", "ipo", "dpop", "diffusion_sdpo")}
EQUAL = ["--toy_clips", "128", "--steps", "150"]                              # 128 negatives of 20 steps + 150 steps of 32 videos = 7,360 policy forwards; SPO's exact: 7,362
SPO = ["train_spo.py", "--sample_steps", "10", "--unbranched", "0", "--step_weight", "inverse", "--beta", "2000", "--eval_clips", "0"]

FORMER_BASE = "270b339"                                                       # commit of the base before this one: less trained, 0.37 broken clips at guidance 2 instead of 0.08
BETTER_BASE = ["--loss", "sft", "--toy_clips", "20000", "--steps", "1200", "--batch_size", "32", "--learning_rate", "1e-3", "--decay_steps", "1200", "--ema_decay", "0.999",
               "--caption_dropout", "0.1", "--flow_shift", "5", "--min_timestep", "0", "--eval_clips", "0"]     # goes on from today's
ROUND_TWO = ["--init", "out/experiments/losses/regdpo_0/export"]
PAIRS = {                                                                     # sets of GT-Pairs: flags of sample.py --pairs
    "two": ["--per_sample", "2"], "four": ["--per_sample", "4"], "guidance2": ["--guidance", "2"], "steps10": ["--steps", "10"], "steps50": ["--steps", "50"],
    "renoise0.9": ["--renoise", "0.9"], "renoise0.7": ["--renoise", "0.7"], "round2": ROUND_TWO}


def at(beta, learning_rate, flags):
    return [*flags, *([] if {"sft", "ipo"} & set(flags) else ["--beta", str(beta)]), "--learning_rate", str(learning_rate)]       # these two have no beta


def mild(*flags):
    return at(30, 1e-4, flags)                                                # the defaults of train.py


def strong(*flags):
    return at(1000, 5e-4, flags)                                              # the paper's beta, and steps that are too large for it


EXPERIMENTS = {
    # what each objective does with the same 512 GT-Pairs, the same steps and the same flags; and where beta and steps are too large for the sigmoid
    "losses": {name: mild(*flags) for name, flags in OBJECTIVES.items()},
    "beta300": {name: at(300, 1e-4, OBJECTIVES[name]) for name in ("dpo", "regdpo", "regdpo_r_scale_0.2")},
    "beta1000": {name: strong(*flags) for name, flags in (OBJECTIVES | {"regdpo_r500": [*REGDPO, "--r", "500"]}).items()},
    # the weight of Reg-DPO's SFT term: fixed, in the paper's shares of the gradient ratio at the start (beta / 2), and in multiples of the ratio
    "r": {f"r{r:g}": mild(*REGDPO, "--r", str(r)) for r in (0.75, 1.5, 3.75, 9, 15)} | {f"r_scale_{k:g}": mild(*REGDPO, "--r_scale", str(k)) for k in (0.5, 2, 5)},
    "r1000": {f"r{r}": strong(*REGDPO, "--r", str(r)) for r in (25, 50, 125, 300)} | {f"r_scale_{k:g}": strong(*REGDPO, "--r_scale", str(k)) for k in (0.5, 2, 5)},
    # where DPO and Reg-DPO work at all: a third of the steps
    "beta": {f"{loss}_beta{beta}_lr{rate:g}": at(beta, rate, [*OBJECTIVES[loss], "--steps", "100", "--eval_clips", "128"])
             for loss in ("dpo", "regdpo") for beta in (3, 30, 300, 3000, 30000) for rate in (1e-4, 5e-4, 2e-3)},
    # r = dgr is DPO with the loser's gradient halved; the loss scale makes up for the factor of 2
    "identity": {name: strong(*flags, "--steps", "100", "--eval_clips", "0") for name, flags in {
        "regdpo": REGDPO, "lose_half": ["experiments/variants.py", "lose_half", *DPO, "--loss_scale", "2e-3"], "lose_half_unscaled": ["experiments/variants.py", "lose_half", *DPO]}.items()},
    # how the pairs are made; second_round goes on from Reg-DPO's seed 0 with negatives of its own, more_of_the_same with the old ones
    "pairs": {name: mild(*REGDPO, "--data", f"data/pairs_{name}") for name in PAIRS if name != "round2"}
             | {"separate_noise": mild("experiments/variants.py", "separate_noise", "--loss", "regdpo"),
                "second_round": mild("--loss", "regdpo", *ROUND_TWO, "--data", "data/pairs_round2"), "more_of_the_same": mild("--loss", "regdpo", *ROUND_TWO, "--data", "data/pairs_base")},
    # the same on a base that is less trained, and on one that is trained further
    "former_base": {name: mild(*OBJECTIVES[name], "--init", "data/former_base") for name in ("sft", "dpo", "regdpo")},
    "better_base": {name: mild(*OBJECTIVES[name], "--init", "data/better_base") for name in ("sft", "dpo", "regdpo")},
    # SPO judged by the exact metric, and by a preference model, which comes first: --settings judge --seeds 0; pairs with as many policy forwards. compare.py samples the exports
    "spo": {
        "judge": ["--loss", "preference", "--toy_clips", "4096", "--min_timestep", "0", "--batch_size", "32", "--steps", "600", "--decay_steps", "300", "--learning_rate", "2e-3"],
        "exact": [*SPO, "--steps", "30"], "judged": [*SPO, "--steps", "20", "--score", "out/experiments/spo/judge_0/export"],
        "regdpo_equal": mild("--loss", "regdpo", *EQUAL), "dpo_equal": mild("--loss", "dpo", *EQUAL)},
}


def prepare(flags):
    """Makes the pairs and the base that a setting names, once."""
    if "data/former_base" in flags and not (ROOT / "data" / "former_base").exists():
        archive = subprocess.run(["git", "archive", FORMER_BASE, "toy_base"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        (ROOT / "data" / "former").mkdir(parents=True, exist_ok=True)
        subprocess.run(["tar", "-x", "-C", ROOT / "data" / "former"], input=archive, check=True)
        (ROOT / "data" / "former" / "toy_base").rename(ROOT / "data" / "former_base")
    if "data/better_base" in flags and not (ROOT / "data" / "better_base").exists():
        subprocess.run([sys.executable, "train.py", *BETTER_BASE, "--out", "out/better_base", *(["--resume", "latest"] if (ROOT / "out" / "better_base" / "latest").exists() else [])],
                       cwd=ROOT, check=True)
        shutil.copytree(ROOT / "out" / "better_base" / "export", ROOT / "data" / "better_base")
    for flag in flags:
        if flag.startswith("data/pairs_"):
            sys.path.insert(0, str(ROOT))
            from world import make_real
            make_real(ROOT / flag, 512)
            subprocess.run([sys.executable, "sample.py", "--pairs", flag, *PAIRS.get(flag.removeprefix("data/pairs_"), [])], cwd=ROOT, check=True)


def value_of(flags, name, default):
    return flags[flags.index(name) + 1] if name in flags else default


def keep(out, target, flags):
    """The run's folder -> the one small file of it that is committed. Returns its marks."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    every, digits = (1, 9) if target.parent.name == "identity" else (1, 4) if "score" in rows[0] else (5, 4)       # roll-outs are few
    rows = [{name: float(f"{row[name]:.{digits}g}") for name in KEPT if name in row} for row in rows[::every] + rows[-1:]]
    target.parent.mkdir(parents=True, exist_ok=True)
    config = json.loads((out / "config.json").read_text())
    lines = ",\n".join(json.dumps(row) for row in rows)
    marks = out / "samples" / "marks.json"
    marks = json.loads(marks.read_text()) if marks.exists() else {}
    head = {"flags": flags, "torch": config["torch"], "marks": marks}
    target.write_text(json.dumps(head)[:-1] + f', "log": [\n{lines}]}}\n')
    return marks


def run(experiment, setting, seed, common):
    out = ROOT / "out" / "experiments" / experiment / f"{setting}_{seed}"
    flags = [*EXPERIMENTS[experiment][setting], *common]
    if not (out / "done").exists():
        with PREPARING:
            prepare(flags)
        resume = ["--resume", "latest"] if (out / "latest").exists() else []
        out.mkdir(parents=True, exist_ok=True)
        shared = [value_of(flags, name, default).replace("/", "-") for name, default in (("--init", "toy_base"), ("--data", "toy"))]
        scored = out.parents[1] / f"ref_errors_{'_'.join(shared)}_{seed}.safetensors"     # the same for all losses; train.py refuses it where it does not belong
        if not resume:
            (out / "log.jsonl").unlink(missing_ok=True)                       # killed before its first checkpoint
            if scored.exists() and "cached" in flags:
                shutil.copy(scored, out / "ref_errors.safetensors")
        with open(out / "printed.txt", "a") as printed:
            script = [] if flags[0].endswith(".py") else ["train.py"]
            code = subprocess.run([sys.executable, *script, *flags, "--seed", str(seed), "--out", str(out), *resume], cwd=ROOT, stdout=printed,
                                  stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        if (out / "ref_errors.safetensors").exists() and not scored.exists():
            shutil.copy(out / "ref_errors.safetensors", scored)
        if code:
            return f"{setting} seed {seed}: FAILED, see {out / 'printed.txt'}"
        (out / "done").touch()
    marks = keep(out, ROOT / "experiments" / "logs" / experiment / f"{setting}_{seed}.json", flags)
    return f"{setting} seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in marks.get("after", {}).items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--settings", nargs="+", default=[], help="only these; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--flags", default="", help="added to every run, such as '--steps 20'")
    args = parser.parse_args()
    settings = args.settings or list(EXPERIMENTS[args.experiment])
    unknown = set(settings) - EXPERIMENTS[args.experiment].keys()
    if unknown:
        sys.exit(f"--settings {' '.join(sorted(unknown))}: {args.experiment} has {', '.join(EXPERIMENTS[args.experiment])}")
    jobs = [(args.experiment, setting, seed, args.flags.split()) for seed in args.seeds for setting in settings]
    with ThreadPoolExecutor(args.processes) as pool:
        for done in pool.map(lambda job: run(*job), jobs):
            print(done, flush=True)


if __name__ == "__main__":
    main()
