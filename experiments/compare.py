"""
SPO, Reg-DPO and the base in the embedded world, by exact marks: two samplers, one set of held-out captions and noise.

    python experiments/run.py losses --settings dpo regdpo                 # exports in out/experiments
    python experiments/run.py spo --settings judge --seeds 0
    python experiments/run.py spo --settings exact judged regdpo_equal dpo_equal
    python experiments/compare.py            # marks.json, the table of all marks in docs/SPO.md, docs/spo.png
    python experiments/run.py main --settings dpo regdpo --seeds 0
    python experiments/compare.py picture    # docs/real_base_dpo_regdpo.png
    python experiments/run.py i2v --settings dpo regdpo --seeds 0
    python experiments/compare.py i2v        # docs/i2v.png

Models that experiments/logs/spo/marks.json already holds are not sampled again. ddim, 10 steps with eta 1, is the
sampler whose steps SPO trained here; euler, 20 steps, is the one that train.py shows.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import i2v
import judge
import toy
from evaluate import SHAPE, Captions
from pictures import to_rgb
from report import plt, spread, table_row, write
from run import value_of
from sample import Sampler, generate
from samples import seed_of
from train_spo import make_batch, parse_args, preference_score, roll_out
from weights import load_wan

LOGS, OUT, DOCS = ROOT / "experiments" / "logs" / "spo", ROOT / "out" / "experiments", ROOT / "docs"
# Setting: its experiment, in the order of the table.
SETTINGS = {"regdpo": "losses", "regdpo_equal": "spo", "dpo_equal": "spo", "exact": "spo", "judged": "spo"}
MARKS = ("direction", "shape", "drift", "size", "background", "broken", "frechet")
SAMPLERS = ("ddim", "euler")
CLIPS = 256
DDIM = parse_args(["--eta", "1", "--sample_steps", "10"])


def roll(model, captions, indices, score=None, pools=0):
    """Roll out the captions with these indices by DDIM, the last steps with pools. Returns latents and transitions."""
    batch = make_batch([Captions(captions)[i] for i in indices], indices, "cpu")
    latents, transitions, _ = roll_out(DDIM, model, score, batch, "held out", DDIM.sample_steps - 1 - pools)
    return latents, transitions


@torch.no_grad()
def make_clips(model, captions, indices, sampler):
    """Videos (n, 3, F, H, W) of the captions with these indices: shift 3, no guidance."""
    if sampler == "euler":
        texts = [toy.encode_text(captions[i]) for i in indices]
        latents = generate(model, texts, [seed_of("held out", i) for i in indices], SHAPE, Sampler())
    else:
        latents, _ = roll(model, captions, indices)
    return toy.decode_pixels(latents).clamp(-1, 1)


def mark(model, captions, yardstick):
    """The mean marks of a model's clips: {sampler: {mark: mean}}."""
    marks = {}
    for sampler in SAMPLERS:
        batches = [range(start, start + 64) for start in range(0, len(captions), 64)]
        clips = torch.cat([make_clips(model, captions, indices, sampler) for indices in batches])
        marks[sampler] = toy.score(clips, captions, yardstick)
    return marks


@torch.no_grad()
def judged(model, judge, base, captions):
    """What a preference model says of a policy, as in training: its mean score of the last pools, at sigma 0.25."""
    score = preference_score(judge, base, 1.0, "held out")
    _, transitions = roll(model, captions, range(len(captions)), score, pools=1)
    return transitions[-1].scores.mean().item()


def cost(setting, seed):
    """Videos through the policy in a run, sampled and trained on, and videos through a judge."""
    run = json.loads((LOGS.parent / SETTINGS[setting] / f"{setting}_{seed}.json").read_text())
    if "dpo" in setting:                                                       # negatives of 20 steps; 16 pairs a step
        negatives = int(value_of(run["flags"], "--toy_clips", 512))
        steps = int(value_of(run["flags"], "--steps", 300))
        return 20 * negatives, 32 * steps, 0
    rows = {row["step"]: row for row in run["log"]}.values()                   # the last row is there twice
    trained = sum(row["pairs"] for row in rows)
    return sum(row["policy_forwards"] for row in rows) - trained, trained, sum(row["score_forwards"] for row in rows)


def table(marks):
    """The page: marks, judgement and cost of every model, means over seeds."""
    text = table_row("", "sampler", "seeds", *MARKS, "judge", "policy forwards, sampling + training", "scores")
    text = text.replace("|  |", "| |", 1) + "| --- " * (len(MARKS) + 6) + "|\n"
    for setting in ("base", *SETTINGS):
        runs = [name for name in marks if name.rsplit("_", 1)[0] == setting]
        if not runs:
            continue
        seeds = forwards = scores = ""
        if setting != "base":
            costs = [cost(*name.rsplit("_", 1)) for name in runs]
            sampling, training, scores = (f"{sum(column) / len(column):,.0f}" for column in zip(*costs))
            seeds, forwards = len(runs), f"{sampling} + {training}"
        for sampler in SAMPLERS:
            cells = [spread([marks[name][sampler][key] for name in runs]) for key in MARKS]
            judgement = spread([marks[name]["ddim"]["judge"] for name in runs], 1) if sampler == "ddim" else ""
            text += table_row(setting, sampler, seeds, *cells, judgement, forwards, scores)
    return text + "| real clips | | | " + " | ".join(f"{marks['real clips'][key]:.3f}" for key in MARKS) + " | | | |\n"


def draw_sheet(path, rows, captions):
    """
    Write a picture of rows {title: clips (n, 3, F, H, W)}: for each caption all frames of its clip in every row, a
    title next to each.
    """
    figure, axes = plt.subplots(-(-len(captions) // 2), 2, figsize=(11, 8.6))
    for i, (axis, caption) in enumerate(zip(axes.flat, captions)):
        strips = []
        for clips in rows.values():
            frames = np.pad(to_rgb(clips[i]), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
            strips.append(np.concatenate(list(frames), axis=1))                # (H, F * W, 3)
        height = len(strips[0])
        axis.imshow(np.concatenate(strips), interpolation="nearest")
        axis.set_yticks([height * (row + 0.5) for row in range(len(rows))], list(rows), fontsize=9)
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.set_title(caption, fontsize=9)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def shown_clips(models, captions, real, sampler):
    """{title: clips of the first six captions}: the real ones, then each model's with the same noise."""
    rows = {"real": real[:6]}
    for title, model in models.items():
        if model.exists():                                                     # a model that is missing is left out
            rows[title] = make_clips(load_wan(model).eval(), captions, range(6), sampler)
    return rows


def main():
    torch.set_num_threads(1)                                                   # tiny tensors are slower with more
    captions, real = toy.make_clips(CLIPS, seed=1, held_out=True)
    real = toy.decode_pixels(toy.encode_pixels(real))
    yardstick = toy.decode_pixels(toy.encode_pixels(toy.make_clips(512, seed=2)[1]))
    models = {"base": ROOT / "toy_base"}
    for setting, experiment in SETTINGS.items():
        for path in sorted((OUT / experiment).glob(f"{setting}_[0-9]/export")):
            models[path.parent.name] = path

    file = LOGS / "marks.json"
    marks = json.loads(file.read_text()) if file.exists() else {"real clips": toy.score(real, captions, yardstick)}
    judge = load_wan(OUT / "spo" / "judge_0" / "export").eval()
    base = load_wan(ROOT / "toy_base").eval()
    for name, path in models.items():
        if name not in marks:
            model = load_wan(path).eval()
            marks[name] = mark(model, captions, yardstick)
            marks[name]["ddim"]["judge"] = judged(model, judge, base, captions[:64])
            file.write_text(json.dumps(marks, indent=1))
            print(name, marks[name], flush=True)
    write(DOCS / "SPO.md", {"marks": table(marks)})

    exports = {"base": "base", "Reg-DPO": "regdpo_0", "SPO, exact": "exact_0", "SPO, judged": "judged_0"}
    exports = {title: models[name] for title, name in exports.items() if name in models}
    draw_sheet(DOCS / "spo.png", shown_clips(exports, captions, real, "ddim"), captions[:6])
    print(table(marks) + "written to docs/SPO.md and docs/spo.png")


def draw_main_picture():
    """README's picture: what the base, DPO and Reg-DPO make of six captions, next to real clips."""
    captions, real = toy.make_clips(6, seed=1, held_out=True)
    real = toy.decode_pixels(toy.encode_pixels(real))
    exports = {"base": ROOT / "toy_base", "DPO": OUT / "main" / "dpo_0" / "export",
               "Reg-DPO": OUT / "main" / "regdpo_0" / "export"}
    draw_sheet(DOCS / "real_base_dpo_regdpo.png", shown_clips(exports, captions, real, "euler"), captions)


def draw_image_picture():
    """What the base, DPO and Reg-DPO make of six captions and the first frames of the real clips, which are given."""
    captions, videos, real, _ = i2v.held_out(6)
    rows = {"real": real}
    exports = {"base": i2v.BASE, "DPO": OUT / "i2v" / "dpo_0" / "export",
               "Reg-DPO": OUT / "i2v" / "regdpo_0" / "export"}
    for title, model in exports.items():
        rows[title] = judge.make_clips(load_wan(model).eval(), captions, 1.0, y=i2v.condition(videos))
    draw_sheet(DOCS / "i2v.png", rows, captions)


if __name__ == "__main__":
    pictures = {"picture": draw_main_picture, "i2v": draw_image_picture}
    pictures.get("".join(sys.argv[1:]), main)()
