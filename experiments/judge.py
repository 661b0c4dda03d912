"""
Exact marks of a model in the embedded world, caption by caption, so that two models can be compared in pairs.

    python experiments/judge.py out/regdpo/export                        # prints the means, at guidance 1 and 2
    python experiments/judge.py out/regdpo/step_000300 --which policy    # a checkpoint's raw weights, not the average

Every model gets the same held-out captions and the same noise: Euler, 20 steps, shift 3, as in train.py's evaluation.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy
from evaluate import SHAPE
from export import export_weights, is_step_folder
from sample import Sampler, generate
from samples import seed_of
from weights import load_wan

MARKS = ("direction", "shape", "drift", "background", "broken")    # kept for every caption
RESAMPLES = 200                                                    # of the captions, for the Fréchet distance


def load_model(path, which):
    """The WanModel at `path`; of a step folder the average ("ema") or the raw weights ("policy"), adapters merged."""
    if not is_step_folder(path):
        return load_wan(path).eval()
    with tempfile.TemporaryDirectory() as folder:
        export_weights(path, Path(folder) / "model", which=which)
        return load_wan(Path(folder) / "model").eval()


@torch.no_grad()
def make_clips(model, captions, guidance, **conditions):
    """Videos (N, 3, F, H, W) of the captions, from the noise of each. conditions: the model's, (N, ...)."""
    sampler = Sampler("euler", 20, 3.0, guidance)
    clips = []
    for start in range(0, len(captions), 64):
        indices = range(start, min(start + 64, len(captions)))
        texts = [toy.encode_text(captions[i]) for i in indices]
        seeds = [seed_of("held out", i) for i in indices]
        of_batch = {name: tensor[start:start + 64] for name, tensor in conditions.items()}
        latents = generate(model, texts, seeds, SHAPE, sampler, toy.encode_text(""), **of_batch)
        clips.append(toy.decode_pixels(latents).clamp(-1, 1))
    return torch.cat(clips)


def frechet_resampled(clips, yardstick):
    """
    The Fréchet distance of RESAMPLES draws of the clips with replacement, the same draws for every model, so that
    differences between two models are paired.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(clips), (RESAMPLES, len(clips)), generator=generator)
    features, real = toy.features(clips), toy.features(yardstick)
    return [toy.frechet_of_features(features[draw], real) for draw in draws]


def make_row(marks, names, clips, yardstick):
    """{mark: [a number for each caption], "frechet": a number, "frechet_resampled": [numbers]} of marks."""
    row = {name: [float(f"{value:.3g}") for value in marks[name].tolist()] for name in names}
    row["frechet"] = toy.frechet(clips, yardstick)
    row["frechet_resampled"] = [float(f"{value:.3g}") for value in frechet_resampled(clips, yardstick)]
    return row


def judge(model, captions, yardstick, guidances=(1.0, 2.0)):
    """{guidance in text: a row of make_row}"""
    judged = {}
    for guidance in guidances:
        clips = make_clips(model, captions, guidance)
        judged[f"{guidance:g}"] = make_row(toy.metrics(clips, captions), MARKS, clips, yardstick)
    return judged


def held_out(count):
    """Captions that nothing trains on, and the real clips that the Fréchet distance compares with."""
    captions, _ = toy.make_clips(count, seed=1, held_out=True)
    yardstick = toy.decode_pixels(toy.encode_pixels(toy.make_clips(512, seed=2)[1]))
    return captions, yardstick


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="an export, a base, or a step folder")
    parser.add_argument("--which", choices=["ema", "policy"], default="ema", help="which weights of a step folder")
    parser.add_argument("--guidances", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--clips", type=int, default=256, help="held-out captions")
    parser.add_argument("--out", type=Path, help="write all marks into this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)                                       # tiny tensors are slower with more
    model = load_model(args.model, args.which)
    judged = judge(model, *held_out(args.clips), args.guidances)
    for guidance, marks in judged.items():
        means = [f"{name} {sum(marks[name]) / args.clips:.3f}" for name in MARKS]
        print(f"guidance {guidance}: {', '.join(means)}, frechet {marks['frechet']:.3f}")
    if args.out:
        args.out.write_text(json.dumps(judged))


if __name__ == "__main__":
    main(sys.argv[1:])
