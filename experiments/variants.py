"""
train.py with one thing changed that nobody should want as a flag; for the experiments alone. Other flags go to train.py.

    python experiments/variants.py lose_half --loss dpo          # the loser's gradient halved, whatever the objective
    python experiments/variants.py separate_noise --loss regdpo  # win and lose are noised with noises of their own
    python experiments/variants.py branch_norms --loss regdpo    # the gradient norms of the two branches, in branch_norms.jsonl in the run's folder
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.distributed as dist

import fsdp_utils
import train

plain_coefficients, plain_branch, plain_backward, plain_clip = train.coefficients, train.branch, train.backward_batch, train.clip_gradients


def lose_half(*errors):
    c_win, c_lose, metrics = plain_coefficients(*errors)
    return c_win, c_lose / 2, metrics | {"c_lose": c_lose / 2}


def separate_noise(batch, *names):
    inputs = plain_branch(batch, *names)
    turned = batch["noise"].flip(-3, -2, -1)                                  # independent of the win's, element by element, and as much a function of the position
    return inputs | {"noise": inputs["noise"] if names == ("win",) else turned if names == ("lose",) else train.torch.cat([batch["noise"], turned])}


# ---------------------------------------------------------------------------------------------------------------------------------
# the gradients of the two branches

def swap_gradients(params, aside):
    """Exchange the gradients of params with those in the list aside (None where there is none), so that a backward adds to one set or to the other."""
    for i, param in enumerate(params):
        param.grad, aside[i] = aside[i], param.grad


@torch.no_grad()
def add_branches(params, aside, scale):
    """
    Add the gradients in the list aside, those of the lose branch, to the gradients of params, those of the win branch, and empty the list. Returns
    the norms of both, times scale, and their cosine; -1 where they cancel. grad_norm^2 = win^2 + lose^2 + 2 * cosine * win * lose.
    """
    win_squared = lose_squared = product = 0.0
    for param, lose_grad in zip(params, aside):
        if lose_grad is not None:
            win, lose = param.grad.to_local(), lose_grad.to_local()
            win_squared += torch.sum(win * win, dtype=torch.float64).item()
            lose_squared += torch.sum(lose * lose, dtype=torch.float64).item()
            product += torch.sum(win * lose, dtype=torch.float64).item()
            win += lose
    aside[:] = [None] * len(aside)
    copies = dist.get_world_size() // params[0].device_mesh.shape[-1]         # --replicate holds every shard more than once
    sums = fsdp_utils.total([win_squared / copies, lose_squared / copies, product / copies], params[0].device_mesh.device_type)
    win_norm, lose_norm = sums[0] ** 0.5, sums[1] ** 0.5
    return {"grad_norm_win": scale * win_norm, "grad_norm_lose": scale * lose_norm, "grad_cosine": sums[2] / max(win_norm * lose_norm, 1e-300)}


def backward_by_branch(args, policy, ref, batch, scale, ranks, aside):
    """train.backward_batch twice, each time with the coefficient of one branch: gradients of the win stay with the parameters, those of the loser go aside."""
    params = list(policy.parameters())

    def win_only(*errors):
        c_win, c_lose, metrics = plain_coefficients(*errors)
        return c_win, torch.zeros_like(c_lose), metrics

    def lose_only(*errors):
        c_win, c_lose, metrics = plain_coefficients(*errors)
        return torch.zeros_like(c_win), c_lose, metrics
    try:
        train.coefficients = win_only
        metrics = plain_backward(args, policy, ref, batch, scale, ranks)
        swap_gradients(params, aside)
        train.coefficients = lose_only
        plain_backward(args, policy, ref, batch, scale, ranks)
        swap_gradients(params, aside)
    finally:
        train.coefficients = plain_coefficients
    return metrics


def branch_norms(args):
    """Make train.py write the norms and the cosine of the branches' gradients of each step. Takes the policy's forwards and backwards twice."""
    aside = []

    def backward_batch(args, policy, *rest):
        aside.extend([None] * (len(list(policy.parameters())) - len(aside)))
        return backward_by_branch(args, policy, *rest, aside)

    def clip_gradients(params, max_norm, scale=1.0):
        norms = add_branches(params, aside, scale)
        if dist.get_rank() == 0:
            with open(Path(str(args.out).replace("{loss}", args.loss)) / "branch_norms.jsonl", "a") as file:
                file.write(json.dumps(norms) + "\n")
        return plain_clip(params, max_norm, scale)
    train.backward_batch, train.clip_gradients = backward_batch, clip_gradients


if __name__ == "__main__":
    variants = {"lose_half": ("coefficients", lose_half), "separate_noise": ("branch", separate_noise)}
    if len(sys.argv) < 2 or sys.argv[1] not in (*variants, "branch_norms"):
        sys.exit(f"usage: python experiments/variants.py {'|'.join(variants)}|branch_norms [flags of train.py]")
    args = train.parse_args(sys.argv[2:])
    if sys.argv[1] == "branch_norms":
        branch_norms(args)
    else:
        setattr(train, *variants[sys.argv[1]])
    train.main(args)
