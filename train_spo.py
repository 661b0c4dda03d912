"""
SPO, step-aware preference optimisation (arXiv 2406.04314), on rectified flow: every denoising step is judged by itself, on the policy's own samples.

    python train_spo.py                                          # in the embedded world, judged by its exact metric
    python train.py --loss preference --min_timestep 0           # a model that judges noisy latents, ...
    torchrun --nproc_per_node=8 train_spo.py --score out/preference/export          # ... and SPO judged by it

A step of training is one roll-out of batch_size captions. From --unbranched on, each sampler step draws a pool of next states from one parent; the best and
the worst of it are a pair if they differ enough, and the roll-out goes on from a random member, so that its states stay the sampler's own. Then the pairs
of the roll-out are learnt from, in --updates optimizer steps, each on its share of the sampler steps.
"""
import argparse
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

import toy
from data import check_samples, collate, fingerprint, open_data, order, randomness, weights_digest
from evaluate import SHAPE, HeldOut, sampler_of
from fsdp_utils import (
    build_model,
    clip_gradients,
    ema_update,
    spread,
    start_ranks,
    total,
)
from losses import add_noise, spo_loss
from memory import check_memory_flags, memory_gib
from run_folder import Signals, append_row, begin_log, check_folder, load_checkpoint, report_skipped
from sample import KERNELS, log_density, step_coefficients, step_distribution, uniform_grid
from weights import export_weights, locate_weights, open_wan

LARGEST_WEIGHT = 10.0                                                         # of --step_weight inverse; the first of 20 steps would have 30


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # what
    p.add_argument("--init", default="toy_base", help="weights to start from, which are also the reference")
    p.add_argument("--score", default="toy", help="what judges: a preference model (export of train.py --loss preference), or 'toy', the drift of the embedded world")
    p.add_argument("--data", default="toy", help="'toy' (captions of the embedded world), or a folder of samples, whose captions, conditions and size are used")
    p.add_argument("--out", default="out/spo", help="the run's folder")
    p.add_argument("--seed", type=int, default=0, help="of captions, roll-outs and pools")
    # the roll-out
    p.add_argument("--kernel", default="ddim", choices=KERNELS, help="the stochastic step; ddim keeps the variance at any step size")
    p.add_argument("--eta", type=float, default=-1.0, help=f"its noise; -1: what it was published with ({', '.join(f'{k} {v}' for k, v in KERNELS.items())})")
    p.add_argument("--sample_steps", type=int, default=20)
    p.add_argument("--flow_shift", type=float, default=3.0)
    p.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance of the roll-out and, the same, of what is trained; 1 is none")
    p.add_argument("--unbranched", type=float, default=0.2, help="share of the steps, the noisiest, that have no pool")
    p.add_argument("--pool", type=int, default=4, help="candidates drawn from one parent")
    p.add_argument("--threshold", type=float, nargs="+", default=[0.1], metavar="X",
                   help="pairs have tanh((best score - worst score) / 2) above it (0.3 and 0.4 in SPO); two numbers: at sigma 0 and 1, linear between")
    # the objective
    p.add_argument("--beta", type=float, default=500.0, help="multiplies a mean log-ratio (10 in SPO, 500 in LPO)")
    p.add_argument("--clip", type=float, default=0.1, help="density ratios to the reference are clamped to [1 - clip, 1 + clip]")
    p.add_argument("--step_weight", default="none", choices=["none", "inverse"], help="inverse: undo the kernel's own weight, some 40 times more for late steps")
    # the optimizer
    p.add_argument("--steps", type=int, default=30, help="roll-outs")
    p.add_argument("--batch_size", type=int, default=16, help="captions a roll-out, over all ranks and accumulation steps together")
    p.add_argument("--updates", type=int, default=4, help="optimizer steps a roll-out")
    p.add_argument("--grad_accum", type=int, default=1, help="parts a rank's captions are rolled out and back-propagated in")
    p.add_argument("--learning_rate", type=float, default=3e-4, help="for the tiny model; Wan is trained at 1e-6 to 1e-5")
    p.add_argument("--weight_decay", type=float, default=1e-3)
    p.add_argument("--warmup_steps", type=int, default=10, help="in optimizer steps")
    p.add_argument("--max_grad_norm", type=float, default=1.0, help="of the gradient of loss / beta")
    p.add_argument("--ema_decay", type=float, default=0.95, help="0: no average is kept; otherwise it is what is evaluated and exported. The policy itself is rolled out")
    # memory and ranks
    p.add_argument("--cp_size", type=int, default=1, help="ranks that share the tokens of each video; must divide the heads")
    p.add_argument("--ref", default="live", choices=["live", "offload"], help="where the frozen reference and preference model live: sharded beside the policy, or on the CPU")
    p.add_argument("--checkpointing", default="off", choices=["off", "selective", "chunked", "full"],
                   help="how little blocks keep for backward, from most to least memory; memory.save_memory has the bytes and the time of each")
    p.add_argument("--chunk_tokens", type=int, default=-1, help="tokens of a chunk in the modes chunked and full; -1: 8192; 0: no chunks")
    p.add_argument("--compile", action="store_true", help="compile the blocks with torch.compile")
    p.add_argument("--offload_activations", action="store_true", help="keep what blocks save for backward in CPU memory")
    # the run's folder
    p.add_argument("--save_every", type=int, default=10)
    p.add_argument("--keep", type=int, default=2, help="checkpoints that stay")
    p.add_argument("--save_minutes", type=float, default=30.0, help="save also when the last checkpoint is so old; 0: never. SIGTERM and SIGINT save too, and stop")
    p.add_argument("--resume", default="", help="a step folder, 'latest', or 'auto': latest where there is one. What torchrun --max-restarts restarts resumes by itself")
    # the embedded world
    p.add_argument("--eval_clips", type=int, default=256, help="held-out captions sampled before and after, 64 or more; 0: no evaluations")
    return p.parse_args(argv)


def check_args(args, ranks):
    """What can be known to be wrong before anything is loaded or written. Raises ValueError. Fills in what follows from other flags."""
    for flag in ("steps", "batch_size", "updates", "grad_accum", "keep", "save_every"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected at least 1")
    args.eta = KERNELS[args.kernel] if args.eta == -1 else args.eta
    args.branch_from = math.ceil(args.unbranched * args.sample_steps) if args.unbranched >= 0 else -1
    for flag, fine, expected in (
            ("pool", args.pool >= 2, "at least 2 candidates; one has no other to be better than"),
            ("threshold", len(args.threshold) in (1, 2) and all(0 <= x < 1 for x in args.threshold), "one or two numbers in [0, 1); tanh never reaches 1"),
            ("eta", args.eta > 0, "above 0: a deterministic step has no density, which the loss compares"),
            ("unbranched", 0 <= args.branch_from < args.sample_steps - 1, f"0 or more, and so low that of --sample_steps {args.sample_steps} one is left to branch before "
             "the last, which has no noise"),
            ("max_grad_norm", args.max_grad_norm > 0, "above 0 ('inf' switches clipping off)"), ("learning_rate", args.learning_rate > 0, "above 0"),
            ("ema_decay", 0 <= args.ema_decay < 1, "0 or more, below 1"),
            ("updates", args.updates < args.sample_steps - args.branch_from, f"at most the {args.sample_steps - 1 - args.branch_from} steps with a pool"),
            ("guidance", args.guidance == 1 or args.data == "toy", "1 with --data: other models than the embedded world's need an encoded negative prompt for it"),
            ("score", args.score != "toy" or args.data == "toy", "a preference model with --data: the exact metric is the embedded world's"),
            ("eval_clips", args.eval_clips == 0 or args.eval_clips >= 64, "0, or at least 64 (a Frechet distance of fewer says nothing)")):
        if not fine:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected {expected}")
    step_coefficients(0.75, 0.5, args.kernel, args.eta)                       # the functions themselves check what they are given
    uniform_grid(args.sample_steps, args.flow_shift)
    one = torch.ones(1)
    spo_loss(one, one, one, one, args.beta, args.clip)
    if args.batch_size % (ranks.data_ranks * args.grad_accum):
        raise ValueError(f"--batch_size {args.batch_size} captions do not divide over {ranks.data_ranks} data ranks x --grad_accum {args.grad_accum}; "
                         f"take a multiple of {ranks.data_ranks * args.grad_accum}")
    args.out = Path(args.out)
    args.resume = check_folder(args.out, args.resume)
    args.init = locate_weights(args.init)
    if args.score != "toy":
        args.score = locate_weights(args.score, "--score")


def check_score(path, found, config):
    """found: the WanConfig of the preference model at path. ValueError unless it scores the latents and captions of a policy with config."""
    if not found.scores:
        raise ValueError(f"--score {path}: a model of velocities, expected a preference model; make one with train.py --loss preference")
    for field in ("out_dim", "in_dim", "text_dim", "image_dim", "image_pos_len"):
        if getattr(found, field) != getattr(config, field):
            raise ValueError(f"--score {path}: {field} is {getattr(found, field)}, expected {getattr(config, field)} as in --init, whose latents and conditions it is to "
                             "score; train it from a model of the same latents")


# ------------------------------------------------------------------------------------------------------------------
# one roll-out

def read_prompts(args, prompts, positions, device):
    """The captions at these positions of the run, with their conditions, as a batch without latents; and the shape (C, F, H, W) to sample."""
    items = [prompts[order(args.seed, position, len(prompts))] for position in positions]
    shape = items[0]["win"].shape if "win" in items[0] else SHAPE         # alike in a batch, as check_samples made sure
    batch = collate([{name: value for name, value in item.items() if name != "win"} for item in items]) | {"positions": list(positions)}
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}, shape


def run_model(model, x, sigma, batch):
    """model on x (B, C, F, H, W) at sigma (a float), with the captions and conditions of the batch: velocities, or the scores of a preference model."""
    conditions = {name: value for name, value in batch.items() if name not in ("names", "positions")}
    return model(x, torch.full((len(x),), 1000 * sigma, device=x.device), **conditions)


def velocity(model, x, sigma, batch, guidance):
    """(B, C, F, H, W), with classifier-free guidance where it is not 1. The same function rolls out and trains, or the ratios would not start at 1."""
    v = run_model(model, x, sigma, batch)
    if guidance == 1:
        return v
    empty = run_model(model, x, sigma, batch | {"context": torch.zeros_like(batch["context"])})
    return empty + guidance * (v - empty)


def toy_score(ref, guidance):
    """A score from the embedded world's exact metric: minus the drift in pixels (0 to 8) of the clip that ref, in one step, expects behind the noise."""
    def score(x, sigma, batch):
        latents = x - sigma * velocity(ref, x, sigma, batch, guidance)
        return -toy.metrics(toy.decode_pixels(latents).cpu(), batch["names"])["drift"].to(x.device)
    return score


def preference_score(scorer, ref, guidance, seed):
    """
    A score from a preference model. It learnt from pairs under one noise, whose own effect on a score cancels in the margin, so it was never asked to ignore
    noise: of one clip under several noises its scores differ more than those of a real and a generated clip under one. Candidates differ in nothing but noise.
    So they are shown as pairs were: the latents that ref, in one step, expects behind each, all of a pool under one fresh noise, at the candidates' sigma.
    """
    def score(x, sigma, batch):
        latents = x - sigma * velocity(ref, x, sigma, batch, guidance)
        noise = torch.stack([torch.randn(x.shape[1:], generator=randomness(seed, p, f"judged at {sigma}")) for p in batch["positions"]]).to(x.device)
        return run_model(scorer, add_noise(latents, noise, torch.full((len(x),), sigma, device=x.device)), sigma, batch)
    return score


def threshold_at(threshold, sigma):
    """threshold: one number, or two, at sigma 0 and at sigma 1."""
    return threshold[0] + (threshold[-1] - threshold[0]) * sigma


def next_member(seed, position, step, pool):
    """Which member of a pool the roll-out goes on from: each as likely as the next, whatever its score, from a stream of its own. Taking the best
    instead would leave the sampler's distribution, and the policy would be trained on states that it never meets."""
    return int(torch.randint(pool, (), generator=randomness(seed, position, f"step {step} next")))


@torch.no_grad()
def roll_out(args, model, score, batch, positions, seed, shape, branch_from):
    """
    Sample the captions of the batch with stochastic steps; from the step branch_from on, out of pools. The noise of a candidate is a function of
    (seed, position, step, candidate), so pools do not depend on the rank nor on the batch. score: (x (B, ...), sigma, batch) -> (B,), on a logit scale.

    Returns the latents (B, C, F, H, W), one transition for every step with a pool, and the seconds spent on scores. A transition holds sigma, sigma_next,
    the parent x, the best and the worst next state, win and lose, (B, ...), scores (B, pool) and kept (B,): is it a pair? The last step is deterministic
    with every kernel and has no pool: noise added there would stay in the clip, and it has no density to compare.
    """
    device = batch["context"].device
    noise = lambda stream: torch.stack([torch.randn(shape, generator=randomness(seed, p, stream)) for p in positions]).to(device)
    sigmas = uniform_grid(args.sample_steps, args.flow_shift)
    x, transitions, seconds = noise("start"), [], 0.0
    rows = torch.arange(len(x), device=device)
    for step, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        v = velocity(model, x, sigma, batch, args.guidance)
        if step == args.sample_steps - 1:
            return x - sigma * v, transitions, seconds
        mean, std = step_distribution(x, v, sigma, sigma_next, args.kernel, args.eta)
        pool = args.pool if step >= branch_from else 1
        members = torch.stack([mean + std * noise(f"step {step} candidate {k}") for k in range(pool)])                 # (k, B, C, F, H, W)
        if step >= branch_from:
            began = time.perf_counter()
            scores = torch.stack([score(member, sigma_next, batch) for member in members], dim=1).float()              # (B, k)
            seconds += time.perf_counter() - began
            if not scores.isfinite().all():
                of = [name for name, fine in zip(batch["names"], scores.isfinite().all(1).tolist()) if not fine]
                raise ValueError(f"the score gave values that are not finite at sigma {sigma_next:.3f} for {'; '.join(of)}; look at --score {args.score}")
            best, worst = scores.max(dim=1), scores.min(dim=1)
            kept = torch.tanh((best.values - worst.values) / 2) > threshold_at(args.threshold, sigma_next)
            transitions.append({"sigma": sigma, "sigma_next": sigma_next, "x": x, "win": members[best.indices, rows], "lose": members[worst.indices, rows],
                                "scores": scores, "kept": kept})
        x = members[torch.tensor([next_member(seed, p, step, pool) for p in positions], device=device), rows]


# ------------------------------------------------------------------------------------------------------------------
# one micro-batch of pairs

def transition_loss(args, policy, ref, transition, batch, rows):
    """
    SPO's loss of these rows (n,) of a transition: losses (n,), metrics {name: (n,)}. Win and lose have one parent, so policy and reference run once.
    --step_weight inverse multiplies the log-densities by std / |b|, b the coefficient of v in the mean: the log-ratios of a pair then differ by
    mean((z_win - z_lose) * (v - v_ref)) at any step, up to the sign of b, instead of |b| / std times that.
    """
    x, win, lose = (transition[name][rows] for name in ("x", "win", "lose"))
    part = {name: value[rows] if torch.is_tensor(value) else [value[i] for i in rows.tolist()] for name, value in batch.items()}
    step = transition["sigma"], transition["sigma_next"], args.kernel, args.eta
    with torch.no_grad():
        ref_mean, std = step_distribution(x, velocity(ref, x, step[0], part, args.guidance), *step)
    mean, _ = step_distribution(x, velocity(policy, x, step[0], part, args.guidance), *step)
    weight = min(std / abs(step_coefficients(*step)[1]), LARGEST_WEIGHT) if args.step_weight == "inverse" else 1.0
    return spo_loss(*(weight * log_density(to, of, std) for of in (mean, ref_mean) for to in (win, lose)), args.beta, args.clip)


def step_backward(args, policy, ref, parts, scale, sums, step):
    """
    Back-propagate the pairs of one sampler step, for every part of this rank's captions: parts [(batch, transition)]. scale multiplies the sum over pairs;
    metrics are added to sums. Returns [(name, loss)] of its pairs. A part without a pair runs one row for nothing: other ranks wait in the collectives of this forward and backward.
    """
    pairs = []
    for batch, transition in parts:
        rows = transition["kept"].nonzero().flatten()
        counts = float(len(rows) > 0)
        loss, metrics = transition_loss(args, policy, ref, transition, batch, rows if counts else torch.zeros(1, dtype=torch.long, device=rows.device))
        (scale * counts * loss.sum()).backward()
        for name, values in (metrics | {"loss": loss.detach(), "margin_abs": metrics["margin"].abs(), "pairs": torch.ones_like(loss)}).items():
            sums[name] = sums.get(name, 0.0) + counts * values.sum().item()
        for name in ("margin", "accuracy"):
            sums[f"{name}/{step}"] = sums.get(f"{name}/{step}", 0.0) + counts * metrics[name].sum().item()
        pairs += zip([batch["names"][i] for i in rows.tolist()], loss.tolist())
    return pairs


def pool_sums(transitions):
    """What the pools of one part say, as sums over its captions: {"name/step": float}."""
    sums = {}
    for step, transition in enumerate(transitions):
        scores, kept = transition["scores"], transition["kept"]
        for name, values in (("score", scores.mean(1)), ("gap", scores.amax(1) - scores.amin(1)), ("kept", kept.float())):
            sums[f"{name}/{step}"] = values.sum().item()
    return sums


def summarise(sums, counts, captions):
    """Sums over all ranks -> a row of the log. counts: pairs kept at each step with a pool; captions: how many were rolled out."""
    row = {name: value / sums["pairs"] for name, value in sums.items() if "/" not in name and name != "pairs"}    # none where no pair was kept
    over_steps = lambda name, per: [sums[f"{name}/{i}"] / n if n else None for i, n in enumerate(per)]
    by_step = {name: over_steps(name, [captions] * len(counts)) for name in ("score", "gap", "kept")}
    by_step |= {name: over_steps(name, counts) for name in ("margin", "accuracy")}
    means = {name: sum(by_step[name]) / len(counts) for name in ("score", "gap", "kept")}
    return {"score_end": by_step["score"][-1], **means, "pairs": sum(counts), **row, "by_step": by_step}


# ------------------------------------------------------------------------------------------------------------------

def main(args):
    # ---------------- ranks
    ranks = start_ranks(cp_size=args.cp_size)
    check_args(args, ranks)
    memory = check_memory_flags(args)
    talk = print if ranks.rank == 0 else lambda *a, **k: None
    config, _ = open_wan(args.init)
    if config.scores:
        raise ValueError(f"--init {args.init}: a preference model, expected a model that generates; give it to --score")
    if args.score != "toy":
        score_config, _ = open_wan(args.score)
        check_score(args.score, score_config, config)
    share = args.batch_size // (ranks.data_ranks * args.grad_accum)
    over_ranks = lambda numbers: [number / ranks.cp_size for number in total(numbers, ranks.device)]    # ranks that share a video count it as often
    branched = args.sample_steps - 1 - args.branch_from                       # steps with a pool

    # ---------------- captions
    toy_world = args.data == "toy"
    if toy_world:
        prompts = [{"context": toy.encode_text(caption), "name": caption} for caption in toy.TRAINED]
        if (config.out_dim, config.in_dim, config.text_dim) != (toy.CHANNELS, toy.CHANNELS, toy.TEXT_DIM):
            raise ValueError(f"--init {args.init} with --data toy: the embedded world is for the tiny model; name a folder of encoded samples with --data")
    else:
        prompts = open_data(args.data, pairs=False)
        check_samples(prompts.wins, config, share)
        if "first_latent" in prompts[0]:
            raise ValueError(f"{prompts[0]['name']} holds a first_latent: roll-outs from a given first frame are not made here; take samples without one")

    # ---------------- models
    policy = build_model(args.init, config, ranks, memory, trained=True)
    offload = args.ref == "offload"
    ref = build_model(args.init, config, ranks, memory, offload=offload).eval().requires_grad_(False)
    ema = build_model(args.init, config, ranks, memory).eval().requires_grad_(False) if args.ema_decay else None
    if args.score == "toy":
        score = toy_score(ref, args.guidance)
    else:
        scorer = build_model(args.score, score_config, ranks, memory, offload=offload).eval().requires_grad_(False)
        score = preference_score(scorer, ref, args.guidance, args.seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)

    # ---------------- resume
    # what decides the numbers of a run, and so must not change on resume; ranks, accumulation, memory flags and steps may
    fixed = {name: getattr(args, name) for name in ("seed", "kernel", "eta", "sample_steps", "flow_shift", "guidance", "unbranched", "pool", "threshold", "beta",
             "clip", "step_weight", "batch_size", "updates", "learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "ema_decay")}
    fixed |= {"init": weights_digest(args.init), "score": "toy" if args.score == "toy" else weights_digest(args.score),
              "data": "toy" if toy_world else f"{len(prompts)} samples, {fingerprint(prompts.files)}"}
    checkpoint = Path(args.resume)
    start, skipped = load_checkpoint(args.resume, policy, optimizer, ema, fixed)
    log_path = args.out / "log.jsonl"
    if ranks.rank == 0:
        begin_log(args, start, ranks=ranks.world)
    dist.barrier()

    # ---------------- what will happen
    _, shape = read_prompts(args, prompts, [start * args.batch_size], "cpu")
    parameters = sum(p.numel() for p in policy.parameters())
    gib = parameters * 4 / ranks.world / 2 ** 30
    talk(f"{args.init}: {parameters:,} parameters, {ranks.world} rank{'s' * (ranks.world > 1)} on {ranks.device.type}, torch {torch.__version__}")
    talk(f"memory per rank: weights, gradients and AdamW {4 * gib:.3f} GiB, reference {gib:.3f}{' (CPU)' if offload else ''}, ema {gib if ema is not None else 0:.3f}, "
         f"transitions {3 * branched * share * args.grad_accum * math.prod(shape) * 4 / 2 ** 30:.3f}; the preference model and activations on top")
    talk(f"a step: {args.batch_size} of {len(prompts):,} captions = {ranks.data_ranks} data ranks x {args.grad_accum} accumulation x {share}, latents {shape}; {args.sample_steps} sampler "
         f"steps ({args.kernel}, eta {args.eta:g}), {args.branch_from + 1} to {args.sample_steps - 1} of them with pools of {args.pool}; {args.updates} updates; "
         f"steps {start} to {args.steps}; log in {log_path}")

    held_out = HeldOut(args.eval_clips, sampler_of(args)) if toy_world and args.eval_clips else None

    def evaluate(title, model):
        """Marks of what two samplers make of held-out captions: that of the roll-outs, and Euler, as in train.py. The same noise whatever the model."""
        def stochastic(part):
            batch = collate([{"context": toy.encode_text(held_out.captions[i]), "name": held_out.captions[i]} for i in part])
            batch["context"] = batch["context"].to(ranks.device)
            return roll_out(args, model, score, batch, part, "held out", SHAPE, branch_from=args.sample_steps)[0]
        held_out.mark(f"{title}, {args.kernel} {args.eta:g}", spread(stochastic, len(held_out.captions), ranks))
        held_out.judge(title, model, ranks, keep=True)

    if held_out:
        evaluate("before", ref)

    # ---------------- the loop
    signals = Signals(args.save_minutes)
    for step in range(start, args.steps):
        began = time.perf_counter()
        sums, parts, scoring = {}, [], 0.0
        for micro in range(args.grad_accum):
            begin = step * args.batch_size + (micro * ranks.data_ranks + ranks.data_rank) * share
            positions = range(begin, begin + share)
            batch, shape = read_prompts(args, prompts, positions, ranks.device)
            _, transitions, seconds = roll_out(args, policy, score, batch, positions, args.seed, shape, args.branch_from)
            parts.append((batch, transitions))
            scoring += seconds
            for name, value in pool_sums(transitions).items():
                sums[name] = sums.get(name, 0.0) + value
        rolling = time.perf_counter() - began
        counts = [round(n) for n in over_ranks([sums[f"kept/{i}"] for i in range(branched)])]        # pairs of each step, over all ranks

        norms, steps_in_order = [], torch.randperm(branched, generator=randomness(args.seed, step, "updates")).tolist()
        for update in range(args.updates):
            mine = [i for i in steps_in_order[update::args.updates] if counts[i]]
            pairs = sum(counts[i] for i in mine)
            if not pairs:                                                     # the same on every rank
                continue
            seen = []
            for i in mine:                                                    # FSDP averages over ranks; the mean is over the pairs of all ranks
                seen += step_backward(args, policy, ref, [(batch, transitions[i]) for batch, transitions in parts], ranks.world / (args.beta * pairs), sums, i)
            if step == 0 and not norms:
                away, = over_ranks([sums["margin_abs"]])
                if away / pairs > 1e-3:
                    raise RuntimeError(f"policy and reference are the same weights at the first update, but their margins differ by {away / pairs:.2g} on average: "
                                       "they do not take the same numerical path, so every later margin would be wrong by as much")
            norms.append(clip_gradients(list(policy.parameters()), args.max_grad_norm))
            done = step * args.updates + update                               # optimizer steps so far
            rate = args.learning_rate * min(1.0, (done + 1) / max(1, args.warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            skipped = 0 if math.isfinite(norms[-1]) else skipped + 1          # a bounded loss: what is not finite shows in the gradient
            if skipped:
                report_skipped(step, skipped, seen)
            else:
                optimizer.step()
                if ema is not None:
                    ema_update(ema, policy, min(args.ema_decay, (done + 1) / (done + 10)))
            optimizer.zero_grad()

        sums |= signals.asks()
        names = sorted(sums)
        sums = dict(zip(names, over_ranks([sums[name] for name in names])))
        row = summarise(sums, counts, args.batch_size)
        forwards = 1 if args.guidance == 1 else 2
        row = {"step": step, **row, "grad_norm": sum(norms) / max(1, len(norms)), "updates": len(norms), "skipped": skipped, "lr": optimizer.param_groups[0]["lr"],
               "policy_forwards": forwards * (args.batch_size * args.sample_steps + row["pairs"]), "policy_backwards": forwards * row["pairs"],
               "score_forwards": args.batch_size * args.pool * branched, "seconds": time.perf_counter() - began, "seconds_rollout": rolling, "seconds_score": scoring,
               "memory_gib": memory_gib(ranks.device)}
        if ranks.rank == 0:
            append_row(log_path, row)
            shown = ("score", "score_end", "gap", "kept", "loss", "accuracy", "margin", "clipped", "grad_norm", "seconds")
            print(f"step {step:>4}  " + "  ".join(f"{name} {row[name]:.4g}" for name in shown if name in row), flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or sums["asks/save"] or sums["asks/stop"]:
            checkpoint = signals.save(args.out, step + 1, policy, optimizer, ema, fixed | {"config": asdict(config), "skipped": skipped}, args.keep)
        if sums["asks/stop"]:
            return signals.leave(checkpoint)

    # ---------------- what came out
    signals.close()
    if ranks.rank == 0:
        export_weights(checkpoint, args.out / "export")
    if held_out:
        evaluate("after", policy if ema is None else ema)
        held_out.close(args.out / "samples", {})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        record(main)(parse_args(sys.argv[1:]))                                # torchrun then shows the error of the rank that failed first
    except ValueError as error:
        sys.exit(f"train_spo.py: {error}")
