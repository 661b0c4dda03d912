"""
SPO beside Reg-DPO and the base in the embedded world: exact marks by two samplers, the same held-out captions and noise for all, a table and two pictures.

    python experiments/run.py losses --settings dpo regdpo                 # exports in out/experiments
    python experiments/run.py spo --settings judge --seeds 0
    python experiments/run.py spo --settings exact judged regdpo_equal dpo_equal
    python experiments/compare.py                                          # -> experiments/logs/spo/marks.json, docs/spo.md, docs/spo.png, docs/real_base_dpo_regdpo.png

Models that marks.json already holds are not sampled again. ddim, 10 steps with eta 1, is the sampler whose steps SPO trained here; euler, 20 steps, the one that train.py shows.
"""
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import toy
from data import collate, write_whole
from pictures import contact_sheet
from weights import load_wan
from report import spread
from run import value_of
from sample import Sampler, generate
from data import seed_of
from train_spo import parse_args
from train_spo import preference_score, roll_out
from evaluate import SHAPE

LOGS, OUT = ROOT / "experiments" / "logs" / "spo", ROOT / "out" / "experiments"
SETTINGS = {"regdpo": OUT / "losses"} | dict.fromkeys(("regdpo_equal", "dpo_equal", "exact", "judged"), OUT / "spo")   # in the order of the table; a run is FOLDER/SETTING_SEED
MARKS = ("direction", "shape", "drift", "size", "background", "broken", "frechet")
CLIPS = 256
DDIM = parse_args(["--eta", "1", "--sample_steps", "10"])


@torch.no_grad()
def make_clips(model, captions, part, sampler):
    """Videos (n, 3, F, H, W) of the captions numbered `part`: shift 3, no guidance."""
    texts = [toy.encode_text(captions[i]) for i in part]
    if sampler == "euler":
        latents = generate(model, texts, [seed_of("held out", i) for i in part], SHAPE, Sampler())
    else:
        latents, _, _ = roll_out(DDIM, model, None, collate([{"context": text, "name": ""} for text in texts]), part, "held out", SHAPE, DDIM.sample_steps)
    return toy.decode_pixels(latents).clamp(-1, 1)


def mark(model, captions, yardstick):
    """-> {sampler: {mark: mean}}"""
    parts = [range(start, start + 64) for start in range(0, len(captions), 64)]
    return {sampler: toy.score(torch.cat([make_clips(model, captions, part, sampler) for part in parts]), captions, yardstick) for sampler in ("ddim", "euler")}


@torch.no_grad()
def judged(model, judge, base, captions):
    """What a preference model says of a policy, as in training: its mean score of the last pools, at sigma 0.25, of roll-outs of these captions."""
    batch = collate([{"context": toy.encode_text(caption), "name": caption} for caption in captions]) | {"positions": list(range(len(captions)))}
    _, transitions, _ = roll_out(DDIM, model, preference_score(judge, base, 1.0, "held out"), batch, batch["positions"], "held out", SHAPE, DDIM.sample_steps - 2)
    return transitions[-1]["scores"].mean().item()


def cost(setting, seed):
    """What a run took, in videos through the policy: (roll-outs or negatives, trained on), and through a judge."""
    kept = json.loads((ROOT / "experiments" / "logs" / SETTINGS[setting].name / f"{setting}_{seed}.json").read_text())
    if "dpo" in setting:                                                      # negatives of 20 steps; each step 16 winners and 16 losers
        return int(value_of(kept["flags"], "--toy_clips", 512)) * 20, int(value_of(kept["flags"], "--steps", 300)) * 32, 0
    rows = {row["step"]: row for row in kept["log"]}.values()
    trained = sum(row["pairs"] for row in rows)
    return sum(row["policy_forwards"] for row in rows) - trained, trained, sum(row["score_forwards"] for row in rows)


def table(marks):
    lines = ["| | sampler | seeds | " + " | ".join(MARKS) + " | judge | policy forwards, sampling + training | scores |", "| --- " * (len(MARKS) + 6) + "|"]
    for setting in ("base", *SETTINGS):
        runs = [name for name in marks if name.rsplit("_", 1)[0] == setting]
        if not runs:
            continue
        costs = [cost(*name.rsplit("_", 1)) for name in runs if setting != "base"]
        sampling, training, scores = ([f"{sum(column) / len(column):,.0f}" for column in zip(*costs)] if costs else ["", "", ""])
        for sampler in ("ddim", "euler"):
            lines.append(f"| {setting} | {sampler} | {len(runs) if costs else ''} | " + " | ".join(spread([marks[name][sampler][key] for name in runs]) for key in MARKS)
                         + f" | {spread([marks[name]['ddim']['judge'] for name in runs], 1) if sampler == 'ddim' else ''} | {sampling}{' + ' * bool(costs)}{training} | {scores} |")
    lines.append("| real clips | | | " + " | ".join(f"{marks['real clips'][key]:.3f}" for key in MARKS) + " | | | |")
    return "\n".join(lines) + "\n"


def sheet(path, models, captions, real, sampler):
    """Six captions: the real clip, then each model's, with the same noise. Models that are not there are left out."""
    shown = range(6)
    rows = [real, *(make_clips(load_wan(model).eval(), captions, shown, sampler) for model in models if model and model.exists())]
    write_whole(path, contact_sheet([clips[i] for i in shown for clips in rows], upscale=3, group=len(rows)))


def main():
    torch.set_num_threads(1)                                                  # tiny tensors are slower with more
    captions, real = toy.make_clips(CLIPS, seed=1, held_out=True)
    real = toy.decode_pixels(toy.encode_pixels(real))
    yardstick = toy.decode_pixels(toy.encode_pixels(toy.make_clips(512, seed=2)[1]))
    file = LOGS / "marks.json"
    marks = json.loads(file.read_text()) if file.exists() else {"real clips": toy.score(real, captions, yardstick)}
    models = {"base": ROOT / "toy_base"}
    models |= {path.parent.name: path for setting, folder in SETTINGS.items() for path in sorted(folder.glob(f"{setting}_[0-9]/export"))}
    judge = load_wan(OUT / "spo" / "judge_0" / "export").eval()
    base = load_wan(ROOT / "toy_base").eval()
    for name, path in models.items():
        if name not in marks:
            model = load_wan(path).eval()
            marks[name] = mark(model, captions, yardstick)
            marks[name]["ddim"]["judge"] = judged(model, judge, base, captions[:64])
            file.write_text(json.dumps(marks, indent=1))
            print(name, marks[name], flush=True)
    (ROOT / "docs" / "spo.md").write_text(table(marks))

    sheet(ROOT / "docs" / "spo.png", [models.get(name) for name in ("base", "regdpo_0", "exact_0", "judged_0")], captions, real, "ddim")
    sheet(ROOT / "docs" / "real_base_dpo_regdpo.png", [ROOT / "toy_base", *(OUT / "losses" / name / "export" for name in ("dpo_0", "regdpo_0"))], captions, real, "euler")
    print(table(marks) + "written to docs/spo.md, docs/spo.png and docs/real_base_dpo_regdpo.png")


if __name__ == "__main__":
    main()
