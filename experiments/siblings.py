"""
A judge that was taught on siblings: pairs of the base's own clips of one caption, labelled by the exact metric, as
SPO's authors train theirs on labelled pairs of generated images.

    python experiments/siblings.py make data/siblings 2048          #  pairs.jsonl, its samples, and held-out pairs
    python experiments/siblings.py accuracy out/JUDGE/export        # by noise level, on 256 held-out pairs

experiments/run.py trains the judge and SPO with it: settings sibling_judge and sibling_judged of `spo`.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import toy
from data import randomness
from evaluate import SHAPE
from losses import add_noise
from sample import Sampler, generate
from samples import read_sample, seed_of, write_sample
from train_spo import run_model
from weights import load_wan

CLOSE = 0.1                                          # pixels of drift: pairs that differ by less have no label
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@torch.no_grad()
def make_siblings(model, captions, seed, folder):
    """
    Two clips of each caption, better and worse by drift, written as samples. Returns the rows of a .jsonl of pairs; a
    pair that is closer than CLOSE is left out.
    """
    rows = []
    for start in tqdm(range(0, len(captions), 64), desc=f"siblings in {folder}", unit="batch"):
        indices = range(start, min(start + 64, len(captions)))
        texts = [toy.encode_text(captions[i]) for i in indices]
        takes = []
        for take in range(2):
            seeds = [seed_of("sibling", seed, i, take) for i in indices]
            takes.append(generate(model, texts, seeds, SHAPE, Sampler("euler", 20, 3.0, 1.0)))
        drifts = [toy.metrics(toy.decode_pixels(latents), [captions[i] for i in indices])["drift"] for latents in takes]
        for row, i in enumerate(indices):
            first, second = drifts[0][row].item(), drifts[1][row].item()
            if abs(first - second) < CLOSE:
                continue
            better = int(second < first)
            names = {"win": f"better/{i:05d}.safetensors", "lose": f"worse/{i:05d}.safetensors"}
            for name, take in zip(names.values(), (better, 1 - better)):
                metadata = {"prompt": captions[i], "source": "the base's own clip"}
                write_sample(folder / name, takes[take][row], texts[row], metadata)
            rows.append({**names, "prompt": captions[i]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def make(folder, count):
    model = load_wan(ROOT / "toy_base").eval()
    if not (folder / "pairs.jsonl").exists():
        captions = [toy.TRAINED[i % len(toy.TRAINED)] for i in range(count)]
        print(f"{len(make_siblings(model, captions, 0, folder))} pairs of {count} in {folder}")
    held_out = folder.parent / "siblings_held_out"
    if not (held_out / "pairs.jsonl").exists():
        captions, _ = toy.make_clips(256, seed=1, held_out=True)
        print(f"{len(make_siblings(model, captions, 1, held_out))} pairs of 256 in {held_out}")


@torch.no_grad()
def accuracy(judge, folder):
    """How often the better clip of a held-out pair has the higher score, both under one noise: {sigma: share}."""
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    win, lose = ([read_sample(folder / row[side]) for row in rows] for side in ("win", "lose"))
    batch = {"context": torch.nn.utils.rnn.pad_sequence([item["context"] for item in win], batch_first=True)}
    noise = torch.stack([torch.randn(SHAPE, generator=randomness(0, i, "probe")) for i in range(len(rows))])
    shares = {}
    for sigma in SIGMAS:
        sigmas = torch.full((len(rows),), sigma)
        better, worse = (run_model(judge, add_noise(torch.stack([item["latents"] for item in items]), noise, sigmas),
                                   sigma, batch) for items in (win, lose))
        shares[f"{sigma:g}"] = round((better > worse).float().mean().item(), 4)
    return shares


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write pairs")
    making.add_argument("folder", type=Path)
    making.add_argument("pairs", type=int)
    marking = commands.add_parser("accuracy", help="mark a preference model")
    marking.add_argument("judge", type=Path)
    marking.add_argument("--folder", type=Path, default=ROOT / "data" / "siblings_held_out")
    marking.add_argument("--out", type=Path, help="write the shares into this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.command == "make":
        make(args.folder, args.pairs)
        return
    shares = accuracy(load_wan(args.judge).eval(), args.folder)
    print(", ".join(f"sigma {sigma} {share:.3f}" for sigma, share in shares.items()))
    if args.out:
        args.out.write_text(json.dumps(shares))


if __name__ == "__main__":
    main(sys.argv[1:])
