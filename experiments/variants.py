"""
train.py with one thing changed that nobody should want as a flag; for the experiments alone. Other flags go to train.py.

    python experiments/variants.py lose_half --loss dpo          # the loser's gradient halved, whatever the objective
    python experiments/variants.py separate_noise --loss regdpo  # win and lose are noised with noises of their own
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train

plain_coefficients, plain_branch = train.coefficients, train.branch


def lose_half(*errors):
    c_win, c_lose, metrics = plain_coefficients(*errors)
    return c_win, c_lose / 2, metrics | {"c_lose": c_lose / 2}


def separate_noise(batch, *names):
    inputs = plain_branch(batch, *names)
    turned = batch["noise"].flip(-3, -2, -1)                                  # independent of the win's, element by element, and as much a function of the position
    return inputs | {"noise": inputs["noise"] if names == ("win",) else turned if names == ("lose",) else train.torch.cat([batch["noise"], turned])}


if __name__ == "__main__":
    variants = {"lose_half": ("coefficients", lose_half), "separate_noise": ("branch", separate_noise)}
    if len(sys.argv) < 2 or sys.argv[1] not in variants:
        sys.exit(f"usage: python experiments/variants.py {'|'.join(variants)} [flags of train.py]")
    setattr(train, *variants[sys.argv[1]])
    train.main(train.parse_args(sys.argv[2:]))
