"""
What a step of SPO's roll-out costs beside a step of a plain sampler, in the embedded world: process time on one core, in one process, the variants in turn.

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
from data import collate
from model import WanModel
from weights import load_wan
from sample import Sampler, generate
from train_spo import parse_args
from train_spo import preference_score, roll_out, toy_score
from evaluate import SHAPE


class Counting(torch.nn.Module):
    """A model that counts its forwards."""
    def __init__(self, model):
        super().__init__()
        self.model, self.forwards = model, 0

    def forward(self, *args, **kwargs):
        self.forwards += 1
        return self.model(*args, **kwargs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    base = load_wan(ROOT / "toy_base").eval()
    policy, ref = Counting(base), Counting(base)
    judge = Counting(WanModel(dataclasses.replace(base.config, scores=True))).eval()
    captions = toy.TRAINED[:flags.captions]
    texts = [toy.encode_text(caption) for caption in captions]
    batch = collate([{"context": text, "name": caption} for text, caption in zip(texts, captions)]) | {"positions": list(range(flags.captions))}
    args = parse_args(["--eta", "1"])                                         # 20 steps, pools of 4
    roll = lambda score, first: roll_out(args, policy, score, batch, range(flags.captions), 0, SHAPE, first)
    variants = {                                                              # steps with a pool, and what makes the clips
        "plain sampler (Euler)": (0, lambda: generate(policy, texts, range(flags.captions), SHAPE, Sampler())),
        "stochastic step, no pool": (0, lambda: roll(None, 20)),
        "pool of 4, scores for nothing": (19, lambda: roll(lambda x, sigma, batch: x.flatten(1).sum(1), 0)),
        "pool of 4, preference model": (19, lambda: roll(preference_score(judge, ref, 1.0, 0), 0)),
        "pool of 4, exact metric": (19, lambda: roll(toy_score(ref, 1.0), 0))}
    seconds, forwards = {name: [] for name in variants}, {}
    for _ in range(flags.repeats):
        for name, (_, make) in variants.items():
            policy.forwards = ref.forwards = judge.forwards = 0
            began = time.process_time()
            make()
            seconds[name].append(time.process_time() - began)
            forwards[name] = policy.forwards, ref.forwards, judge.forwards
    fastest = {name: min(values) / flags.captions for name, values in seconds.items()}
    plain = fastest["plain sampler (Euler)"] / 20
    print(f"`python {' '.join(sys.argv)}`: {flags.captions} captions of the embedded world, 20 steps, fastest of {flags.repeats}, torch {torch.__version__}, one core\n")
    print("| | ms a step and clip | beside the plain step | policy forwards of a roll-out | reference forwards | preference forwards |\n| --- | --- | --- | --- | --- | --- |")
    for name, (pools, _) in variants.items():
        # the last step never has a pool: its cost is a plain step's
        each = (fastest[name] - (20 - pools) * plain) / pools if pools else fastest[name] / 20
        print(f"| {name} | {1000 * each:.1f} | {each / plain:.2f} | {' | '.join(map(str, forwards[name]))} |")


if __name__ == "__main__":
    main()
