"""
The cost of a step of SPO's roll-out next to a step of a plain sampler, in the embedded world: process time on one core,
in one process, the variants in turn.

    python benchmarks/spo_steps.py --captions 4 > benchmarks/spo_steps.md
"""
import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import toy
from evaluate import SHAPE, Captions
from model import WanModel
from sample import Sampler, generate
from train_spo import make_batch, parse_args, preference_score, roll_out, toy_score
from weights import load_wan

STEPS = 20                                                                     # the default of both samplers
PLAIN = "plain sampler (Euler)"


class Counting(torch.nn.Module):
    """A model that counts its forwards."""
    def __init__(self, model):
        super().__init__()
        self.model, self.forwards = model, 0

    def forward(self, *args, **kwargs):
        self.forwards += 1
        return self.model(*args, **kwargs)


def measure(variants, counted, repeats):
    """The fastest of `repeats` calls in seconds, and the forwards of each counted model, by variant."""
    fastest, forwards = {}, {}
    for _ in range(repeats):
        for name, (_, make_clips) in variants.items():
            for model in counted:
                model.forwards = 0
            start = time.process_time()
            make_clips()
            seconds = time.process_time() - start
            fastest[name] = min(seconds, fastest.get(name, seconds))
            forwards[name] = [model.forwards for model in counted]
    return fastest, forwards


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--captions", type=int, default=8, help="number of clips sampled together")
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds, of which the fastest counts")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    base = load_wan(ROOT / "toy_base").eval()
    policy, ref = Counting(base), Counting(base)
    judge = Counting(WanModel(dataclasses.replace(base.config, scores=True))).eval()
    captions = toy.TRAINED[:flags.captions]
    texts = [toy.encode_text(caption) for caption in captions]
    positions = list(range(flags.captions))
    batch = make_batch(list(Captions(captions)), positions, "cpu")
    args = parse_args(["--eta", "1"])                                          # 20 steps, pools of 4

    def roll(score, branch_from):
        return roll_out(args, policy, score, batch, 0, branch_from)

    def no_judgement(x, sigma, batch):
        return x.flatten(1).sum(1)

    variants = {                                                               # steps with a pool, and what makes clips
        PLAIN: (0, lambda: generate(policy, texts, positions, SHAPE, Sampler(steps=STEPS))),
        "stochastic step, no pool": (0, lambda: roll(None, STEPS)),
        "pool of 4, scores for nothing": (STEPS - 1, lambda: roll(no_judgement, 0)),
        "pool of 4, preference model": (STEPS - 1, lambda: roll(preference_score(judge, ref, 1.0, 0), 0)),
        "pool of 4, exact metric": (STEPS - 1, lambda: roll(toy_score(ref, 1.0), 0)),
    }
    fastest, forwards = measure(variants, (policy, ref, judge), flags.repeats)

    print(f"`python {' '.join(sys.argv)}`: {flags.captions} captions of the embedded world, {STEPS} steps, fastest of "
          f"{flags.repeats}, torch {torch.__version__}, one core\n")
    print("| | ms a step and clip | times the plain step | policy forwards of a roll-out | reference forwards "
          "| preference forwards |\n| --- | --- | --- | --- | --- | --- |")
    plain = fastest[PLAIN] / STEPS
    for name, (pools, _) in variants.items():
        step = fastest[name] / STEPS
        if pools:                                                              # the last step has none: a plain step
            step = (fastest[name] - (STEPS - pools) * plain) / pools
        counts = " | ".join(str(count) for count in forwards[name])
        print(f"| {name} | {1000 * step / flags.captions:.1f} | {step / plain:.2f} | {counts} |")


if __name__ == "__main__":
    main()
