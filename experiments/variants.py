"""
train.py with one thing changed that nobody should want as a flag, for experiments alone. Other flags go to train.py.

    python experiments/variants.py lose_half --loss dpo          # the loser's gradient halved, whatever the objective
    python experiments/variants.py separate_noise --loss regdpo  # win and lose are noised with noises of their own
    python experiments/variants.py branch_norms --loss regdpo    # gradient norms by branch: OUT/branch_norms.jsonl
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.distributed as dist

import fsdp_utils
import train

plain_coefficients = train.coefficients
plain_branch = train.branch
plain_backward = train.backward_batch
plain_clip = train.clip_gradients


def lose_half(*arguments):
    """train.coefficients with half of c_lose."""
    c_win, c_lose, metrics = plain_coefficients(*arguments)
    return c_win, c_lose / 2, metrics | {"c_lose": c_lose / 2}


def separate_noise(batch, *names):
    """
    train.branch with another noise for the loser: the win's, turned round, which is independent element by element.
    """
    inputs = plain_branch(batch, *names)
    turned = batch["noise"].flip(-3, -2, -1)               # like the win's a function of the position alone
    noise = {("win",): inputs["noise"], ("lose",): turned}.get(names)
    if noise is None:
        noise = torch.cat([batch["noise"], turned])
    return inputs | {"noise": noise}


# ----------------------------------------------------------------------------------------------------------------------
# the gradients of the two branches

def swap_gradients(params, aside):
    """
    Exchange the gradients of params with those in the list aside (None where there is none), so that a backward adds to
    one set or to the other.
    """
    for i, param in enumerate(params):
        param.grad, aside[i] = aside[i], param.grad


@torch.no_grad()
def add_branches(params, aside, scale):
    """
    Add the gradients in the list aside, those of the lose branch, to the gradients of params, those of the win branch,
    and empty the list. Returns the norms of both, times scale, and their cosine; -1 where they cancel.

        grad_norm^2 = win^2 + lose^2 + 2 * cosine * win * lose
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
    copies = dist.get_world_size() // params[0].device_mesh.shape[-1]   # --replicate holds every shard more than once
    sums = [win_squared / copies, lose_squared / copies, product / copies]
    win_squared, lose_squared, product = fsdp_utils.total(sums, params[0].device_mesh.device_type)
    win_norm, lose_norm = win_squared ** 0.5, lose_squared ** 0.5
    return {"grad_norm_win": scale * win_norm, "grad_norm_lose": scale * lose_norm,
            "grad_cosine": product / max(win_norm * lose_norm, 1e-300)}


def win_only(*arguments):
    c_win, c_lose, metrics = plain_coefficients(*arguments)
    return c_win, torch.zeros_like(c_lose), metrics


def lose_only(*arguments):
    c_win, c_lose, metrics = plain_coefficients(*arguments)
    return torch.zeros_like(c_win), c_lose, metrics


def backward_by_branch(args, policy, ref, batch, scale, ranks, aside):
    """
    train.backward_batch twice, each time with the coefficient of one branch: gradients of the win stay with the
    parameters, those of the loser go into the list aside.
    """
    params = list(policy.parameters())
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


def log_branch_norms(args):
    """
    Make train.py write the norms and the cosine of the branches' gradients of each step. It takes the policy's forwards
    and backwards twice.
    """
    path = Path(str(args.out).replace("{loss}", args.loss)) / "branch_norms.jsonl"
    aside = []

    def backward_batch(args, policy, *rest):
        aside.extend([None] * (len(list(policy.parameters())) - len(aside)))
        return backward_by_branch(args, policy, *rest, aside)

    def clip_gradients(params, max_norm, scale=1.0):
        norms = add_branches(params, aside, scale)
        if dist.get_rank() == 0:
            with open(path, "a") as file:
                file.write(json.dumps(norms) + "\n")
        return plain_clip(params, max_norm, scale)

    train.backward_batch = backward_batch
    train.clip_gradients = clip_gradients


def main(argv):
    variants = ("lose_half", "separate_noise", "branch_norms")
    if not argv or argv[0] not in variants:
        sys.exit(f"usage: python experiments/variants.py {'|'.join(variants)} [flags of train.py]")
    args = train.parse_args(argv[1:])
    if argv[0] == "lose_half":
        train.coefficients = lose_half
    elif argv[0] == "separate_noise":
        train.branch = separate_noise
    else:
        log_branch_norms(args)
    train.main(args)


if __name__ == "__main__":
    main(sys.argv[1:])
