"""
SPO, step-aware preference optimisation (arXiv 2406.04314), on rectified flow: every denoising step is judged by itself,
on the policy's own samples.

    python train_spo.py                                   # in the embedded world, judged by its exact metric
    python train.py --loss preference                     # a preference model, which judges noisy latents, ...
    torchrun --nproc_per_node=8 train_spo.py --score out/preference/export    # ... and SPO judged by it

A step of training is one roll-out of batch_size captions. From --unbranched on, each sampler step draws a pool of next
states from one parent. The best and the worst of a pool are a pair if they differ enough, and the roll-out continues
from a random member, so that its states stay the sampler's own. The pairs of the roll-out are then trained on, in
--updates optimizer steps, each on its share of the sampler steps.
"""
import argparse
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

import toy
from data import collate, order, randomness
from samples import weights_digest
from evaluate import Captions, HeldOut, open_captions, sampler_of
from export import export_run
from fsdp_utils import build_model, clip_gradients, ema_update, make_optimizer, matrix_dtype, positions_of
from fsdp_utils import spread, start_ranks, total
from lora import Average, Reference, add_lora_flags, check_lora_flags, plan_lora
from losses import add_noise, spo_loss
from memory import add_memory_flags, check_memory_flags, memory_gib, memory_plan, reset_memory_gib
from run_folder import Signals, add_folder_flags, check_common_flags, check_first_margin, check_folder
from run_folder import check_same_run, closes_at_end, describe_run, load_checkpoint, lock_folder, report_skipped
from run_folder import run_settings
from run_log import Log
from sample import KERNELS, call_model, log_density, step_coefficients, step_distribution, uniform_grid
from weights import find_experts, locate_weights, open_wan

LARGEST_WEIGHT = 10.0   # of --step_weight inverse; the first of 20 steps would have 30
# What may differ from the run that is resumed; all else must not, and --init, --score and --data must hold the same.
MAY_CHANGE = {
    "out", "resume", "init", "score", "data", "steps", "grad_accum", "cp_size", "ref", "checkpointing", "chunk_tokens",
    "compile", "offload_activations", "offload_params", "save_every", "keep", "save_minutes", "eval_clips", "tracker"}
SHOWN = ("score", "score_end", "gap", "kept", "loss", "accuracy", "margin", "clipped", "grad_norm", "seconds")


# ------------------------------------------------------------------------------------------------------------------
# flags

class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints the description as it stands, and the default of each flag."""


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    # what to train
    p.add_argument("--init", default="toy_base", help="weights of policy and reference")
    p.add_argument("--score", default="toy",
                   help="a preference model (train.py --loss preference), or 'toy': the drift")
    p.add_argument("--data", default="toy", help="folder of samples, whose captions and conditions are used, or 'toy'")
    p.add_argument("--out", default="out/spo", help="the run's folder")
    p.add_argument("--seed", type=int, default=0, help="seed of captions, roll-outs and pools")
    # the roll-out
    published = ", ".join(f"{kernel} {eta}" for kernel, eta in KERNELS.items())
    p.add_argument("--kernel", default="ddim", choices=KERNELS, help="the stochastic step (sample.step_coefficients)")
    p.add_argument("--eta", type=float, default=-1.0, help=f"noise of the kernel; -1: as published ({published})")
    p.add_argument("--sample_steps", type=int, default=20, help="sampler steps of a roll-out")
    p.add_argument("--flow_shift", type=float, default=3.0, help="shift of the sampler's sigmas")
    p.add_argument("--guidance", type=float, default=1.0, help="guidance of roll-outs and of training; 1: none")
    p.add_argument("--unbranched", type=float, default=0.2, help="share of the steps, the noisiest, without a pool")
    p.add_argument("--pool", type=int, default=4, help="candidates drawn from one parent")
    p.add_argument("--threshold", type=float, nargs="+", default=[0.1], metavar="X", help="a pair needs tanh((best "
                   "- worst score) / 2) above this (SPO: 0.3 and 0.4); two numbers: at sigma 0 and 1, linear between")
    # the objective
    p.add_argument("--beta", type=float, default=500.0, help="multiplies a mean log-ratio (SPO 10, LPO 500)")
    p.add_argument("--clip", type=float, default=0.1, help="clamp density ratios to [1 - clip, 1 + clip]")
    p.add_argument("--step_weight", default="none", choices=["none", "inverse"],
                   help="inverse: weigh log-densities so that each sampler step pulls alike")
    # the optimizer
    p.add_argument("--steps", type=int, default=30, help="roll-outs")
    p.add_argument("--batch_size", type=int, default=16, help="captions a step, over all ranks and accumulation steps")
    p.add_argument("--updates", type=int, default=4, help="optimizer steps a roll-out")
    p.add_argument("--grad_accum", type=int, default=1, help="parts that a rank splits its captions into")
    p.add_argument("--learning_rate", type=float, default=3e-4, help="peak learning rate; Wan: 1e-6 to 1e-5")
    p.add_argument("--weight_decay", type=float, default=1e-3, help="weight decay of AdamW")
    p.add_argument("--warmup_steps", type=int, default=10, help="first updates, over which the learning rate rises")
    p.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient of loss / beta to this norm")
    p.add_argument("--ema_decay", type=float, default=0.95, help="decay of the exported average of weights; 0: none")
    add_lora_flags(p)       # --lora_rank --lora_alpha --lora_targets --init_lora
    # memory and ranks
    p.add_argument("--cp_size", type=int, default=1, help="number of ranks that share the tokens of each video")
    p.add_argument("--ref", default="auto", choices=["auto", "live", "offload"], help="offload: reference and --score "
                   "in CPU memory; auto: live, or for adapters the policy with its initial ones")
    add_memory_flags(p)     # --checkpointing --chunk_tokens --compile --offload_activations --offload_params
    # the run's folder
    add_folder_flags(p, save_every=10)      # --save_every --keep --save_minutes --resume
    # the embedded world
    p.add_argument("--eval_clips", type=int, default=256, help="held-out captions evaluated, 64 or more; 0: none")
    return p.parse_args(argv)


def check_args(args, ranks):
    """Refuse flags that cannot work, before anything is loaded or written, and fill in what follows from others."""
    check_common_flags(args, ranks)
    check_memory_flags(args)
    check_lora_flags(args)
    args.eta = KERNELS[args.kernel] if args.eta == -1 else args.eta
    args.branch_from = math.ceil(args.unbranched * args.sample_steps)         # the first step with a pool
    pools = args.sample_steps - 1 - args.branch_from       # the last step never has one
    thresholds_fit = len(args.threshold) in (1, 2) and all(0 <= x < 1 for x in args.threshold)
    expectations = [   # flag, is it fine, what is expected
        ("pool", args.pool >= 2, "at least 2 candidates; one has no other to be better than"),
        ("threshold", thresholds_fit, "one or two numbers in [0, 1); tanh never reaches 1"),
        ("eta", args.eta > 0, "above 0: a deterministic step has no density, which the loss compares"),
        ("unbranched", args.unbranched >= 0 and pools > 0, f"0 or more, and low enough that of --sample_steps "
         f"{args.sample_steps} one is left for a pool, before the last, which has no noise"),
        ("updates", args.updates <= pools, f"at most the {pools} steps with a pool"),
        ("guidance", args.guidance == 1 or args.data == "toy", "1 with --data, which has no encoded negative prompt"),
        ("score", args.score != "toy" or args.data == "toy", "a preference model with --data; 'toy' knows toy clips"),
    ]
    for flag, is_fine, expected in expectations:
        if not is_fine:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected {expected}")
    # the functions themselves check what they are given
    step_coefficients(0.75, 0.5, args.kernel, args.eta)
    uniform_grid(args.sample_steps, args.flow_shift)
    one = torch.ones(1)
    spo_loss(one, one, one, one, args.beta, args.clip)
    args.out = Path(args.out)
    args.resume = check_folder(args.out, args.resume)
    args.init = locate_weights(args.init)
    if args.score != "toy":
        args.score = locate_weights(args.score, "--score")


# ------------------------------------------------------------------------------------------------------------------
# models and captions

def open_policy(path):
    """The WanConfig of the model at --init. ValueError unless it generates, from noise to clip."""
    model, second_expert = find_experts(path)              # refuses one expert alone
    if second_expert:
        raise ValueError(f"--init {path}: two experts, and SPO trains one model that samples alone; train both "
                         "with train.py")
    config, _ = open_wan(model)
    if config.scores:
        raise ValueError(f"--init {path}: a preference model, expected a model that generates; give it to --score")
    return config


def open_judge(path, config):
    """The WanConfig of the preference model at --score. ValueError unless it scores samples of a policy of config."""
    judge_config, _ = open_wan(path)
    if not judge_config.scores:
        raise ValueError(f"--score {path}: a model of velocities, expected a preference model; make one with train.py "
                         "--loss preference")
    for field in ("out_dim", "in_dim", "text_dim", "image_dim", "image_pos_len"):
        got, expected = getattr(judge_config, field), getattr(config, field)
        if got != expected:
            raise ValueError(f"--score {path}: {field} is {got}, expected {expected} as in --init, whose latents and "
                             "conditions it is to score; train it from a model of the same latents")
    return judge_config


def make_batch(items, positions, device):
    """
    The inputs of one roll-out: {"context" (B, T, D), conditions (B, ...), "names" and "positions", lists of B,
    "shape" (C, F, H, W) of each video's latents}. The latents of the items are left out.
    """
    shape = tuple(items[0]["win"].shape)                   # of all: check_samples
    batch = collate([{name: value for name, value in item.items() if name != "win"} for item in items])
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    return batch | {"positions": list(positions), "shape": shape}


# ------------------------------------------------------------------------------------------------------------------
# scores

def run_model(model, x, sigma, batch):
    """Velocities of x (B, C, F, H, W) at sigma, a float, or a preference model's scores (B,); see sample.call_model."""
    inputs = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    timestep = torch.full((len(x),), 1000 * sigma, device=x.device)
    return call_model(model, x, timestep, **inputs)


def velocity(model, x, sigma, batch, guidance):
    """The velocity (B, C, F, H, W) with guidance, for roll-outs and training alike, so that ratios start at 1."""
    v = run_model(model, x, sigma, batch)
    if guidance == 1:
        return v
    v_negative = run_model(model, x, sigma, batch | {"context": torch.zeros_like(batch["context"])})
    return v_negative + guidance * (v - v_negative)


def clean_latents(model, x, sigma, batch, guidance):
    """The clean latents (B, C, F, H, W) that the model expects from x in one step: x - sigma * v."""
    latents = x - sigma * velocity(model, x, sigma, batch, guidance)
    if "first_latent" in batch:
        latents[:, :, :1] = batch["first_latent"]
    return latents


def toy_score(ref, guidance):
    """A score from the exact metric: minus the drift, 0 to 8 pixels, of the clean clip that ref expects."""
    def score(x, sigma, batch):
        clips = toy.decode_pixels(clean_latents(ref, x, sigma, batch, guidance)).cpu()
        return -toy.metrics(clips, batch["names"])["drift"].to(x.device)
    return score


def preference_score(judge, ref, guidance, seed):
    """
    A score from a preference model, which learnt from pairs under one noise. It was never asked to ignore noise, whose
    effect on a score cancels in a pair's margin: scores of one clip under several noises differ more than those of a
    real and a generated clip under one. Candidates differ in nothing but noise. So candidates are shown as pairs were:
    the clean latents that ref expects from each, all of a pool under one fresh noise, at the candidates' sigma.
    """
    def score(x, sigma, batch):
        latents = clean_latents(ref, x, sigma, batch, guidance)
        noise = draw_noise(seed, f"judged at {sigma}", batch["positions"], x.shape[1:], x.device)
        sigmas = torch.full((len(x),), sigma, device=x.device)
        return run_model(judge, add_noise(latents, noise, sigmas), sigma, batch)
    return score


# ------------------------------------------------------------------------------------------------------------------
# one roll-out

@dataclass(frozen=True)
class Transition:
    """A sampler step with a pool, from sigma to sigma_next."""
    sigma: float
    sigma_next: float
    x: torch.Tensor          # (B, C, F, H, W)   the parent
    win: torch.Tensor        # (B, C, F, H, W)   the next state with the best score
    lose: torch.Tensor       # (B, C, F, H, W)   and the one with the worst
    scores: torch.Tensor     # (B, pool)
    kept: torch.Tensor       # (B,)              bool: do they differ enough to be a pair?


def draw_noise(seed, stream, positions, shape, device):
    """(B, *shape), a function of (seed, stream, position) only."""
    return torch.stack([torch.randn(shape, generator=randomness(seed, p, stream)) for p in positions]).to(device)


def threshold_at(threshold, sigma):
    """threshold: one number, or two, at sigma 0 and at sigma 1."""
    return threshold[0] + (threshold[-1] - threshold[0]) * sigma


def next_member(seed, position, step, pool):
    """
    The member of a pool that the roll-out continues from: each is equally likely, whatever its score. Taking the best
    instead would leave the sampler's distribution, and the policy would be trained on states that it never meets.
    """
    return int(torch.randint(pool, (), generator=randomness(seed, position, f"step {step} next")))


def score_pool(args, score, members, sigma, batch):
    """Scores (B, pool), float32, of members (pool, B, C, F, H, W) at sigma. ValueError where one is not finite."""
    scores = torch.stack([score(member, sigma, batch) for member in members], dim=1).float()
    bad = [name for name, of_pool in zip(batch["names"], scores) if not of_pool.isfinite().all()]
    if bad:
        raise ValueError(f"the score gave values that are not finite at sigma {sigma:.3f} for {'; '.join(bad)}; look "
                         f"at --score {args.score}")
    return scores


@torch.no_grad()
def roll_out(args, model, score, batch, seed, branch_from):
    """
    Sample the captions of a batch (make_batch) with stochastic steps; from the step branch_from on, out of pools.
    score: (x (B, ...), sigma, batch) -> (B,), on a logit scale. Noise is a function of (seed, position, step,
    candidate), so pools depend neither on the rank nor on the batch.

    Returns the latents (B, C, F, H, W), a Transition for every step with a pool, and the seconds spent on scores. The
    last step is deterministic with every kernel and has no pool: noise added there would stay in the clip, and it has
    no density to compare.
    """
    positions, shape, device = batch["positions"], batch["shape"], batch["context"].device
    sigmas = uniform_grid(args.sample_steps, args.flow_shift)
    last = args.sample_steps - 1
    rows = torch.arange(len(positions), device=device)
    transitions, seconds = [], 0.0
    x = draw_noise(seed, "start", positions, shape, device)
    for step in range(last):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        v = velocity(model, x, sigma, batch, args.guidance)
        mean, std = step_distribution(x, v, sigma, sigma_next, args.kernel, args.eta)
        has_pool = step >= branch_from
        size = args.pool if has_pool else 1
        streams = [f"step {step} candidate {k}" for k in range(size)]
        members = torch.stack([mean + std * draw_noise(seed, stream, positions, shape, device) for stream in streams])
        if has_pool:
            began = time.perf_counter()
            scores = score_pool(args, score, members, sigma_next, batch)      # (B, pool)
            seconds += time.perf_counter() - began
            best, worst = scores.max(dim=1), scores.min(dim=1)
            kept = torch.tanh((best.values - worst.values) / 2) > threshold_at(args.threshold, sigma_next)
            win, lose = members[best.indices, rows], members[worst.indices, rows]
            transitions.append(Transition(sigma, sigma_next, x, win, lose, scores, kept))
        following = [next_member(seed, position, step, size) for position in positions]
        x = members[torch.tensor(following, device=device), rows]
    return clean_latents(model, x, sigmas[last], batch, args.guidance), transitions, seconds


def roll_out_step(args, policy, score, captions, step, ranks):
    """
    Roll out this rank's captions of a training step. Returns a list of (batch, transitions), one for each accumulation
    step, sums over the captions {name: float}, and the seconds spent on scores.
    """
    rolled, sums, seconds = [], Counter(), 0.0
    for positions in positions_of(args, ranks, step):
        items = [captions[order(args.seed, position, len(captions))] for position in positions]
        batch = make_batch(items, positions, ranks.device)
        _, transitions, seconds_score = roll_out(args, policy, score, batch, args.seed, args.branch_from)
        rolled.append((batch, transitions))
        sums.update(pool_sums(transitions))                # adds
        seconds += seconds_score
    return rolled, sums, seconds


# ------------------------------------------------------------------------------------------------------------------
# the pairs of one sampler step

def transition_loss(args, policy, ref, transition, batch, rows):
    """
    SPO's loss of these rows (n,) of a transition: losses (n,), metrics {name: (n,)}. Win and lose have one parent, so
    policy and reference run once. A given first frame (first_latent) is not drawn and does not count.

    --step_weight inverse multiplies log-densities by std / |b|, b the coefficient of v in the mean. The log-ratios of
    a pair then differ by mean((z_win - z_lose) * (v - v_ref)) at any step, up to the sign of b, instead of |b| / std
    times that.
    """
    x, win, lose = transition.x[rows], transition.win[rows], transition.lose[rows]
    inputs = {name: value[rows] for name, value in batch.items() if torch.is_tensor(value)}
    step = (transition.sigma, transition.sigma_next, args.kernel, args.eta)
    given = 1 if "first_latent" in inputs else 0           # frames
    with torch.no_grad():
        ref_mean, std = step_distribution(x, velocity(ref, x, transition.sigma, inputs, args.guidance), *step)
    mean, _ = step_distribution(x, velocity(policy, x, transition.sigma, inputs, args.guidance), *step)
    weight = 1.0
    if args.step_weight == "inverse":
        _, b, _ = step_coefficients(*step)
        weight = min(std / abs(b), LARGEST_WEIGHT)

    def log_p(state, mean):
        return weight * log_density(state[:, :, given:], mean[:, :, given:], std)

    log_ps = log_p(win, mean), log_p(lose, mean), log_p(win, ref_mean), log_p(lose, ref_mean)
    return spo_loss(*log_ps, args.beta, args.clip)


def step_backward(args, policy, ref, rolled, index, scale, sums):
    """
    Back-propagate the pairs that this rank's captions have at the index-th sampler step with a pool. scale multiplies
    the sum over pairs; metrics are added to sums, a Counter. Returns [(name, loss)] of the pairs. Where no caption has
    a pair, one row runs with weight 0, because other ranks wait in the collectives of this forward and backward.
    """
    samples = []
    for batch, transitions in rolled:
        transition = transitions[index]
        rows = transition.kept.nonzero().flatten()
        weight = 1.0
        if len(rows) == 0:
            rows, weight = rows.new_zeros(1), 0.0
        loss, metrics = transition_loss(args, policy, ref, transition, batch, rows)
        (scale * weight * loss.sum()).backward()
        metrics |= {"loss": loss.detach(), "margin_abs": metrics["margin"].abs(), "pairs": torch.ones_like(loss)}
        metrics |= {f"{name}/{index}": metrics[name] for name in ("margin", "accuracy")}
        sums.update({name: weight * values.sum().item() for name, values in metrics.items()})
        if weight:
            samples += [(batch["names"][row], value) for row, value in zip(rows.tolist(), loss.tolist())]
    return samples


# ------------------------------------------------------------------------------------------------------------------
# the parts of main

def pool_sums(transitions):
    """Statistics of a batch's pools, as sums over its captions: {"name/index": float}."""
    sums = {}
    for index, transition in enumerate(transitions):
        scores = transition.scores
        sums[f"score/{index}"] = scores.mean(1).sum().item()
        sums[f"gap/{index}"] = (scores.amax(1) - scores.amin(1)).sum().item()
        sums[f"kept/{index}"] = transition.kept.float().sum().item()
    return sums


def total_of_videos(sums, ranks):
    """Sum {name: float} over the videos of all ranks; ranks that share a video count once."""
    names = sorted(sums)
    totals = total([sums[name] for name in names], ranks.device)
    return {name: value / ranks.cp_size for name, value in zip(names, totals)}


def summarise(sums, pairs_at, captions):
    """
    Sums over all ranks -> a row of the log. pairs_at: pairs at each step with a pool; captions: how many were rolled
    out. Means over pairs are left out where there was no pair.
    """
    row = {name: value / sums["pairs"] for name, value in sums.items() if "/" not in name and name != "pairs"}
    by_step = {}
    for name in ("score", "gap", "kept"):                  # means over the captions
        by_step[name] = [sums[f"{name}/{index}"] / captions for index in range(len(pairs_at))]
    for name in ("margin", "accuracy"):                    # means over the pairs
        by_step[name] = [sums[f"{name}/{index}"] / count if count else None for index, count in enumerate(pairs_at)]
    means = {name: sum(by_step[name]) / len(pairs_at) for name in ("score", "gap", "kept")}
    return {"score_end": by_step["score"][-1], **means, "pairs": sum(pairs_at), **row, "by_step": by_step}


def evaluate(args, held_out, title, model, ranks):
    """Mark a model's clips of held-out captions, made with the roll-outs' sampler and, as in train.py, with Euler."""
    captions = Captions(held_out.captions)

    def make(indices):
        batch = make_batch([captions[i] for i in indices], indices, ranks.device)
        latents, _, _ = roll_out(args, model, None, batch, "held out", branch_from=args.sample_steps)
        return latents

    held_out.mark(f"{title}, {args.kernel} {args.eta:g}", spread(make, len(captions), ranks))
    held_out.judge(title, model, ranks, keep=True)


# ------------------------------------------------------------------------------------------------------------------

@closes_at_end
def main(args):
    # ---------------- ranks
    ranks = start_ranks(cp_size=args.cp_size)
    check_args(args, ranks)
    config = open_policy(args.init)                             # damaged files are reported before anything is made
    lora = plan_lora(args, config)                         # None: all weights are trained
    judge_config = None if args.score == "toy" else open_judge(args.score, config)
    pools = args.sample_steps - 1 - args.branch_from       # sampler steps with a pool; the last step has none

    # ---------------- captions
    captions = open_captions(args, config, ranks)
    share = args.batch_size // (ranks.data_ranks * args.grad_accum)           # captions rolled out together
    contents = {"init": weights_digest(args.init), "data": f"{len(captions)} captions, {captions.fingerprint()}"}
    contents["score"] = weights_digest(args.score) if judge_config else "toy"
    fixed = run_settings(args, MAY_CHANGE, **contents)
    check_same_run(args.resume, fixed)

    # ---------------- models and optimizer
    memory = check_memory_flags(args)
    policy = build_model(args.init, config, ranks, memory, trained=True, offload=args.offload_params, seed=args.seed,
                         lora=lora)

    def build_frozen(path, config, offload):
        return build_model(path, config, ranks, memory, offload=offload).eval().requires_grad_(False)

    ref = Reference(policy) if lora else build_frozen(args.init, config, offload=args.ref == "offload")
    ema = None
    if args.ema_decay:
        ema = Average(policy) if lora else build_frozen(args.init, config, offload=args.offload_params)
    averaged = policy if ema is None else ema              # what is evaluated and exported
    score = toy_score(ref, args.guidance)
    if judge_config:
        judge = build_frozen(args.score, judge_config, offload=args.ref == "offload" or args.offload_params)
        score = preference_score(judge, ref, args.guidance, args.seed)
    optimizer = make_optimizer(policy, args.weight_decay, loss_scale=1 / args.beta)

    # ---------------- resume
    lock_folder(args.out, ranks)
    checkpoint = Path(args.resume)
    start, skipped = load_checkpoint(args.resume, {"": (policy, optimizer, ema)})
    log = Log(args, start, ranks, SHOWN)
    dist.barrier()

    # ---------------- what will happen
    latents = captions[0]["win"]
    tokens = config.count_tokens(latents.shape)
    if ranks.rank == 0:
        plan = memory_plan(args, policy, tokens, share, True, ranks)
        gib = 3 * pools * share * args.grad_accum * latents.numel() * 4 / 2 ** 30
        plan += f", the preference model, and the states of {pools} pools, {gib:.3f}"
        print("\n".join(describe_run(args, captions, tokens, start, ranks, args.init, policy, plan)))
        print(f"a roll-out: {args.sample_steps} sampler steps ({args.kernel}, eta {args.eta:g}), all after the first "
              f"{args.branch_from} but the last with pools of {args.pool}; {args.updates} updates")
    held_out = HeldOut(args.eval_clips, sampler_of(args)) if args.data == "toy" and args.eval_clips else None
    if held_out:
        evaluate(args, held_out, "before", ref, ranks)

    # ---------------- the loop
    signals = Signals(args.save_minutes)
    for step in range(start, args.steps):
        began = time.perf_counter()
        reset_memory_gib(ranks.device)                     # of this step, without the sampling before it
        rolled, sums, seconds_score = roll_out_step(args, policy, score, captions, step, ranks)
        row = {"step": step, "seconds_rollout": time.perf_counter() - began, "seconds_score": seconds_score}
        kept = total_of_videos({index: sums[f"kept/{index}"] for index in range(pools)}, ranks)
        pairs_at = [round(kept[index]) for index in range(pools)]             # over all ranks
        turns = torch.randperm(pools, generator=randomness(args.seed, step, "updates")).tolist()
        norms = []
        for update in range(args.updates):
            indices = [index for index in turns[update::args.updates] if pairs_at[index]]      # the same on every rank
            pairs = sum(pairs_at[index] for index in indices)
            if not pairs:
                continue
            scale = ranks.world / (args.beta * pairs)      # FSDP averages over ranks; the mean is over the pairs
            samples = []
            for index in indices:
                samples += step_backward(args, policy, ref, rolled, index, scale, sums)
            if step == 0 and not norms:
                row["first_margin"] = total_of_videos(sums, ranks)["margin_abs"] / pairs
                check_first_margin(row["first_margin"], args.beta, half=matrix_dtype(ranks.device.type) is not None)
            norms.append(clip_gradients(policy.parameters(), args.max_grad_norm))
            done = step * args.updates + update            # optimizer steps so far
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * min(1.0, (done + 1) / max(1, args.warmup_steps))
            if math.isfinite(norms[-1]):                   # enough: the loss is bounded
                skipped = 0
                optimizer.step()
                if ema is not None:
                    ema_update(ema, policy, min(args.ema_decay, (done + 1) / (done + 10)))
            else:
                skipped += 1
                report_skipped(step, skipped, samples)
            optimizer.zero_grad()

        sums.update(signals.asks())
        sums = total_of_videos(sums, ranks)
        row |= summarise(sums, pairs_at, args.batch_size)
        branches = 1 if args.guidance == 1 else 2
        row |= {"policy_forwards": branches * (args.batch_size * args.sample_steps + row["pairs"]),
                "policy_backwards": branches * row["pairs"], "score_forwards": args.batch_size * args.pool * pools,
                "grad_norm": sum(norms) / max(1, len(norms)), "updates": len(norms), "skipped": skipped,
                "lr": optimizer.param_groups[0]["lr"], "seconds": time.perf_counter() - began,
                "memory_gib": memory_gib(ranks.device)}
        log.add(row)
        is_last = step + 1 == args.steps
        if (step + 1) % args.save_every == 0 or is_last or sums["asks/save"] or sums["asks/stop"]:
            meta = fixed | {"config": asdict(config), "skipped": skipped}
            checkpoint = signals.save(args.out, step + 1, {"": (policy, optimizer, ema)}, meta, args.keep)
        if sums["asks/stop"]:
            return signals.leave(checkpoint)

    # ---------------- results
    signals.close()
    if ranks.rank == 0:
        export_run(checkpoint, args.out / "export")
    if held_out:
        evaluate(args, held_out, "after", averaged, ranks)
        log.picture(held_out.close(args.out / "samples", {}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        record(main)(parse_args(sys.argv[1:]))             # torchrun then shows the error of the rank that failed first
    except ValueError as error:
        sys.exit(f"train_spo.py: {error}")
