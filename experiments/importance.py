"""
Where importance weights fall below 1: the weights of the first steps, where the policy is still the reference, by noise
level. Writes experiments/logs/importance.json, which report.py shows.

    python experiments/run.py main --settings dpo --seeds 0     # scores the reference
    python experiments/importance.py
"""
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import draw
from losses import importance_weight, next_sigma
from safetensors.torch import load_file

BINS = 10


def main():
    file = next((ROOT / "out" / "experiments" / "main" / "dpo_0").glob("ref_errors_*.safetensors"))
    errors = load_file(file)["errors"]                                         # (positions, 2): win and lose
    sigma = torch.tensor([draw(0, position, (1,), 3.0, 0.0, 1000.0)[0] for position in range(len(errors))])
    weight = importance_weight(errors[:, 0], sigma, next_sigma(sigma, 50, 3.0))
    rows = []
    for i in range(BINS):
        here = weight[(sigma * BINS).long().clamp(max=BINS - 1) == i]
        below = {f"below {limit}": round((here < limit).float().mean().item(), 4) for limit in (0.9, 0.97)}
        mean = round(here.mean().item(), 4)
        rows.append({"sigma": [i / BINS, (i + 1) / BINS], "pairs": len(here), "mean": mean} | below)
    (ROOT / "experiments" / "logs" / "importance.json").write_text("[" + ",\n".join(map(json.dumps, rows)) + "]\n")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
