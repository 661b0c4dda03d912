"""
Preference post-training of Wan video models, offline objectives: one file, one loop.

    python train.py                                              # Reg-DPO on GT-Pairs in the embedded world, on a laptop
    torchrun --nproc_per_node=8 train.py --loss regdpo           # the same on 8 ranks, the same curve
    torchrun --nproc_per_node=8 train.py --loss regdpo --init Wan2.1-T2V-1.3B --data DIR --beta 1000 --learning_rate 1e-6 --warmup_steps 50
    python train.py --export out/regdpo/step_000300 --export_format comfyui --export_dtype bfloat16 --out wan.safetensors
"""
import argparse
import gc
import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

import losses
import toy
from curves import Watch
from data import (
    check_samples,
    collate,
    draw,
    fingerprint,
    open_data,
    order,
    randomness,
    seed_of,
    weights_digest,
    write_whole,
)
from evaluate import (
    HeldOut,
    Preview,
    Probe,
    audit_report,
    held_out_pairs,
    hold_back,
    make_world,
    of_the_world,
    sigma_steps,
)
from fsdp_utils import (
    build_model,
    clip_gradients,
    ema_update,
    exchange_branches,
    start_ranks,
)
from losses import add_noise, flow_error, importance_weight, next_sigma, safeguard_coefficient, velocity_target
from memory import check_memory_flags, memory_gib, memory_plan
from model import CONFIGS, hold_first_frame
from run_folder import (
    Signals,
    add_up,
    append_row,
    begin_log,
    check_folder,
    diagnostics,
    load_checkpoint,
    open_errors,
    read_items,
    report_skipped,
    score_reference,
    summarise,
)
from weights import check_timesteps, export_weights, find_checkpoint, find_model, locate_weights, refuse_lone_expert

# Which flags belong to which loss; setting one that the loss does not read is an error, not a silent wish.
LOSS_FLAGS = {"sft": [], "dpo": ["beta"], "regdpo": ["beta", "r", "r_scale", "r_min"],
              "dpo_cm": ["beta", "threshold", "clip", "weight_steps"], "sdpo": ["beta", "clip", "weight_steps"],
              "ipo": ["tau"], "dpop": ["beta", "penalty"], "diffusion_sdpo": ["beta", "mu"],
              "preference": []}


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # what
    p.add_argument("--loss", default="regdpo", choices=LOSS_FLAGS,
                   help="sdpo is arXiv 2505.21893 (importance weights), diffusion_sdpo 2511.03317 (safeguard); preference trains no policy, but what scores "
                        "noisy videos for train_spo.py: take --min_timestep 0")
    p.add_argument("--model", default="auto", choices=["auto", *CONFIGS], help="auto: what --init holds (tiny for 'scratch'); a name: --init must hold that")
    p.add_argument("--init", default="toy_base", help="weights to start from, which are also the reference; 'scratch' for random ones")
    p.add_argument("--data", default="toy", help="'toy' (made on first use), a folder with real/ and negatives*/, or a .jsonl of pairs")
    p.add_argument("--bad_samples", default="stop", choices=["stop", "skip"], help="a file that is no whole sample, at the start or later: an error | the next good one stands in, and is counted")
    p.add_argument("--out", default="out/{loss}", help="the run's folder")
    p.add_argument("--seed", type=int, default=0, help="of order, sigma and noise")
    # the objective
    p.add_argument("--beta", type=float, default=30.0, help="multiplies a mean squared error; no extra 1/2 (Salesforce's 5000 is 2500 here). For the embedded world; the Reg-DPO paper has 1000")
    p.add_argument("--r", default="dgr", help="weight of Reg-DPO's SFT term: 'dgr', or a fixed number")
    p.add_argument("--r_scale", type=float, default=1.0, help="r = max(r_scale * dgr, r_min)")
    p.add_argument("--r_min", type=float, default=0.0)
    p.add_argument("--threshold", type=float, default=0.9, help="dpo_cm drops pairs whose importance weight is lower")
    p.add_argument("--clip", type=float, default=0.1, help="importance weights are clipped to [1 - clip, 1 + clip]")
    p.add_argument("--weight_steps", type=int, default=50, help="steps of the sampler whose stride the importance weight is for")
    p.add_argument("--tau", type=float, default=50.0, help="ipo aims at a margin of 1 / (2 tau)")
    p.add_argument("--penalty", type=float, default=5.0, help="dpop: of a win that got worse")
    p.add_argument("--mu", type=float, default=0.9, help="diffusion_sdpo: how much of the win's descent is guaranteed")
    p.add_argument("--timestep_sampling", default="uniform", choices=["uniform", "logit_normal"], help="before the shift; logit_normal: sigmoid(N(0, 1))")
    p.add_argument("--flow_shift", type=float, default=3.0, help="of the sigmas trained on (preference: 1), and of the sampler here")
    p.add_argument("--min_timestep", type=float, default=600.0, help="0..1000, after the shift; real and generated clips differ below it in grain, above it in motion")
    p.add_argument("--max_timestep", type=float, default=1000.0)
    p.add_argument("--caption_dropout", type=float, default=0.0, help="sft: share of empty captions, which classifier-free guidance needs")
    # the optimizer
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--batch_size", type=int, default=16, help="pairs a step, over all ranks and accumulation steps together")
    p.add_argument("--grad_accum", type=int, default=1)
    p.add_argument("--learning_rate", type=float, default=1e-4, help="for the tiny model; Wan is trained at 1e-6 to 1e-5")
    p.add_argument("--weight_decay", type=float, default=1e-3)
    p.add_argument("--warmup_steps", type=int, default=20)
    p.add_argument("--decay_steps", type=int, default=0, help="the last steps, over which the learning rate falls to 0")
    p.add_argument("--max_grad_norm", type=float, default=1.0)
    p.add_argument("--loss_scale", type=float, default=0.0, help="multiplies the loss for backward only; 0: what brings c_win to about 1 at the start")
    p.add_argument("--ema_decay", type=float, default=0.98, help="0: no average is kept; otherwise it is what is sampled and exported")
    # memory and ranks
    p.add_argument("--backward", default="joint", choices=["joint", "sequential", "pair"], help="one graph | one branch at a time | one branch a rank")
    p.add_argument("--cp_size", type=int, default=1, help="ranks that share the tokens of each video; must divide the heads")
    p.add_argument("--replicate", type=int, default=1, help="groups of ranks that each hold all weights, such as nodes; 1: shard over all ranks")
    p.add_argument("--ref", default="live", choices=["live", "offload", "cached"],
                   help="the frozen reference: sharded beside the policy | on the CPU | scored once before training, then gone")
    p.add_argument("--checkpointing", default="off", choices=["off", "selective", "chunked", "full"],
                   help="how little blocks keep for backward, from most to least memory; memory.save_memory has the bytes and the time of each")
    p.add_argument("--chunk_tokens", type=int, default=-1, help="tokens of a chunk in the modes chunked and full; -1: 8192; 0: no chunks")
    p.add_argument("--compile", action="store_true", help="torch.compile of the cheap parts of the blocks")
    p.add_argument("--offload_activations", action="store_true", help="what blocks keep for backward waits on the CPU")
    p.add_argument("--offload_params", action="store_true", help="weights, gradients, AdamW and EMA live on the CPU, and AdamW runs there")
    # the run's folder
    p.add_argument("--save_every", type=int, default=100)
    p.add_argument("--keep", type=int, default=2, help="checkpoints that stay")
    p.add_argument("--save_minutes", type=float, default=30.0, help="save also when the last checkpoint is so old; 0: never. SIGTERM and SIGINT save too, and stop")
    p.add_argument("--resume", default="", help="a step folder, 'latest', or 'auto': latest where there is one. What torchrun --max-restarts restarts resumes by itself")
    p.add_argument("--probe_every", type=int, default=50, help="steps between looks at pairs that are never trained on (the same for all runs); 0: never")
    p.add_argument("--hold_back", type=int, default=0, help="wins of --data kept from training, with all their losers, for that; the embedded world has held-out captions")
    p.add_argument("--log_every", type=int, default=10, help="steps between printed lines; log.jsonl has every step")
    # weights for others
    p.add_argument("--export", default="", help="do not train: write the weights in this step folder to --out, the average if it has one and --ema_decay is not 0")
    p.add_argument("--export_format", default="original", choices=["original", "diffusers", "comfyui"], help="folder, folder, single file; also of the end of training")
    p.add_argument("--export_dtype", default="float32", choices=["float32", "bfloat16"])
    # the embedded world
    p.add_argument("--toy_clips", type=int, default=512, help="real clips made for --data toy")
    p.add_argument("--sample_every", type=int, default=0, help="steps between evaluations in the loop, or of other data previews; 0: only before and after, or none")
    p.add_argument("--eval_clips", type=int, default=256, help="held-out captions sampled in an evaluation, 64 or more; 0: no evaluations")
    p.add_argument("--sample_steps", type=int, default=20)
    p.add_argument("--guidance", type=float, default=1.0, help="of the negatives and of evaluations; 1: the model's own distribution, which a loser should be from")
    args = p.parse_args(argv)
    args.defaults = {name: p.get_default(name) for name in vars(args)}
    return args


def check_args(args, ranks):
    """What can be known to be wrong before anything is loaded or written. Raises ValueError. Fills in what follows from other flags."""
    every = {flag for flags in LOSS_FLAGS.values() for flag in flags}
    for flag in sorted(every - set(LOSS_FLAGS[args.loss])):
        if getattr(args, flag) != args.defaults[flag]:
            users = " or ".join(loss for loss, flags in LOSS_FLAGS.items() if flag in flags)
            raise ValueError(f"--{flag} {getattr(args, flag)} does nothing in --loss {args.loss}; it belongs to --loss {users}")
    if args.r != "dgr":
        try:
            args.r = float(args.r)
        except ValueError:
            raise ValueError(f"--r {args.r}: expected 'dgr' or a number") from None
    for flag in ("steps", "batch_size", "grad_accum", "keep", "save_every", "log_every", "sample_steps", "toy_clips", "weight_steps"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected at least 1")
    for flag, fine, expected in (("max_grad_norm", args.max_grad_norm > 0, "above 0 ('inf' switches clipping off)"),
                                 ("learning_rate", args.learning_rate > 0, "above 0"), ("ema_decay", 0 <= args.ema_decay < 1, "0 or more, below 1"),
                                 ("eval_clips", args.eval_clips == 0 or args.eval_clips >= 64, "0, or at least 64 (a Frechet distance of fewer says nothing)"),
                                 ("bad_samples", args.bad_samples == "stop" or args.ref != "cached", "stop with --ref cached, whose errors belong to the pairs that were scored")):
        if not fine:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected {expected}")
    draw(0, 0, (1,), args.flow_shift, args.min_timestep, args.max_timestep)   # the functions themselves check what they are given
    if args.loss != "sft":
        one = torch.ones(1)
        row = one[:, None]
        pair_loss(args, one, one, one, one, one / 2, safeguard_coefficient(row, 0 * row, row, 0 * row, args.mu))
    if args.batch_size % (ranks.data_ranks * args.grad_accum):
        raise ValueError(f"--batch_size {args.batch_size} pairs do not divide over {ranks.data_ranks} data ranks x --grad_accum {args.grad_accum}; "
                         f"take a multiple of {ranks.data_ranks * args.grad_accum}")
    if args.loss == "sft" and args.backward != "joint":
        raise ValueError(f"--backward {args.backward} is about the two branches of a pair; --loss sft has one")
    if args.loss in ("sft", "preference") and args.ref != "live":
        raise ValueError(f"--ref {args.ref} is about the reference of a loss like dpo; --loss {args.loss} has none")
    if args.loss == "diffusion_sdpo" and args.backward == "pair":
        raise ValueError("--loss diffusion_sdpo needs both outputs on one rank; use --backward joint or sequential")
    if args.hold_back and args.loss == "sft":
        raise ValueError(f"--hold_back {args.hold_back} keeps pairs for a probe; --loss sft reads none")
    if args.caption_dropout and args.loss != "sft":
        raise ValueError("--caption_dropout is for --loss sft; a preference loss would compare captions that the clip was not made for")
    if args.sample_every and args.loss == "preference":
        raise ValueError("--sample_every samples a policy, and --loss preference trains none")
    if args.loss == "preference" and args.export_format == "diffusers":
        raise ValueError("--export_format diffusers: diffusers has no preference model; use original or comfyui")
    args.out = Path(str(args.out).replace("{loss}", args.loss))
    args.resume = check_folder(args.out, args.resume)
    if args.init != "scratch":
        args.init = locate_weights(args.init)
    if args.init == "scratch" and args.loss != "sft":
        raise ValueError(f"--init scratch with --loss {args.loss}: a preference needs a model that already generates; train one with --loss sft first")
    args.loss_scale = args.loss_scale or {"sft": 1.0, "preference": 1.0, "ipo": args.tau}.get(args.loss, 1 / args.beta)


# ------------------------------------------------------------------------------------------------------------------
# one micro-batch

def read_batch(args, dataset, positions, device):
    """The pairs at these positions of the run, with the sigma and the noise of each: functions of (seed, position), nothing else."""
    items = read_items(dataset, [order(args.seed, position, len(dataset)) for position in positions])
    shift = 1.0 if args.loss == "preference" else args.flow_shift             # judged is every sigma, and where a sampler has few steps most is to be seen
    draws = [draw(args.seed, p, item["win"].shape, shift, args.min_timestep, args.max_timestep, args.timestep_sampling) for p, item in zip(positions, items)]
    for position, item in zip(positions, items):
        if torch.rand((), generator=randomness(args.seed, position, "dropout")) < args.caption_dropout:
            item["context"] = item["context"][:0]
    batch = collate(items)
    batch["sigma"] = torch.tensor([sigma for sigma, _ in draws])              # (B,)
    batch["noise"] = torch.stack([noise for _, noise in draws])               # (B, C, F, H, W)
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def branch(batch, *names):
    """The inputs of one branch ("win" or "lose"), or of several behind each other in one batch, with the same sigma, noise and context for each."""
    shared = {name: torch.cat([value] * len(names)) for name, value in batch.items() if torch.is_tensor(value) and name not in ("win", "lose")}
    return shared | {"latents": torch.cat([batch[name] for name in names])}


def flow_errors(model, inputs):
    """
    Run the model on noised latents. Returns errors (B,) float32, v_pred and v_target (B, C, F, H, W). Where frame 0 is given clean (TI2V's first_latent)
    it is no part of them: F is one less, and the error is the mean over what is left. A preference model's scores (B,) stand in the errors' place: they
    too are two numbers a pair, with a gradient c_win * d score_win - c_lose * d score_lose.
    """
    conditions = {name: value for name, value in inputs.items() if name not in ("latents", "sigma", "noise", "context", "first_latent")}
    x_sigma, timestep = add_noise(inputs["latents"], inputs["noise"], inputs["sigma"]), 1000 * inputs["sigma"]
    v_target = velocity_target(inputs["latents"], inputs["noise"])
    given = "first_latent" in inputs
    if given:
        x_sigma, timestep = hold_first_frame(x_sigma, timestep, inputs["first_latent"], model.config.patch_size)
    v_pred = model(x_sigma, timestep, inputs["context"], **conditions)
    if model.config.scores:
        return v_pred, v_pred, v_target
    v_pred, v_target = v_pred[:, :, given:], v_target[:, :, given:]
    return flow_error(v_pred, v_target), v_pred, v_target


def pair_loss(args, err_win, err_lose, ref_err_win, ref_err_lose, sigma, safeguard):
    """The objective that --loss names: errors (B,) -> losses (B,), metrics {name: (B,)}."""
    errors = (err_win, err_lose, ref_err_win, ref_err_lose)
    if args.loss == "dpo":
        return losses.dpo_loss(*errors, args.beta)
    if args.loss == "regdpo":
        return losses.regdpo_loss(*errors, args.beta, None if args.r == "dgr" else args.r, args.r_scale, args.r_min)
    if args.loss == "ipo":
        return losses.ipo_loss(*errors, args.tau)
    if args.loss == "dpop":
        return losses.dpop_loss(*errors, args.beta, args.penalty)
    if args.loss == "diffusion_sdpo":
        return losses.diffusion_sdpo_loss(*errors, args.beta, safeguard)
    if args.loss == "preference":
        return losses.preference_loss(err_win, err_lose)                      # which are scores
    sigma_next = next_sigma(sigma, args.weight_steps, args.flow_shift)
    weight_win, weight_lose = importance_weight(err_win, sigma, sigma_next), importance_weight(err_lose, sigma, sigma_next)
    if args.loss == "dpo_cm":
        return losses.dpo_cm_loss(*errors, args.beta, weight_win, weight_lose, args.threshold, args.clip)
    assert args.loss == "sdpo", args.loss
    return losses.sdpo_loss(*errors, args.beta, weight_win, weight_lose, args.clip)


def coefficients(args, err_win, err_lose, ref_err_win, ref_err_lose, sigma, safeguard=None):
    """
    Every offline objective has the gradient c_win * d err_win - c_lose * d err_lose, and autograd gives the two numbers from the four errors alone.

    So the branches can be back-propagated together, one after the other, or on two ranks, with one and the same gradient.
    Returns c_win, c_lose (B,), metrics {name: (B,)}.
    """
    err_win, err_lose = err_win.detach().requires_grad_(), err_lose.detach().requires_grad_()
    with torch.enable_grad():
        loss, metrics = pair_loss(args, err_win, err_lose, ref_err_win, ref_err_lose, sigma, safeguard)
        c_win, c_lose = torch.autograd.grad(loss.sum(), (err_win, err_lose))
    metrics |= {"loss": loss.detach(), "c_win": c_win, "c_lose": -c_lose}
    if args.loss != "preference":
        metrics |= {"err_win": err_win.detach(), "err_lose": err_lose.detach(), "ref_err_win": ref_err_win, "ref_err_lose": ref_err_lose}
    return c_win, -c_lose, metrics | diagnostics(metrics)


@torch.no_grad()
def reference_errors(args, ref, batch, ranks):
    """Errors of the frozen reference, (2, B), in the forwards that backward_batch takes the policy through, so that where the two are equal the errors are."""
    if args.backward == "joint":
        return flow_errors(ref, branch(batch, "win", "lose"))[0].view(2, -1)
    if args.backward == "sequential":
        return torch.stack([flow_errors(ref, branch(batch, name))[0] for name in ("win", "lose")])
    return exchange_branches(flow_errors(ref, branch(batch, ("win", "lose")[ranks.branch]))[0], ranks.pair_group)


def backward_batch(args, policy, ref, batch, scale, ranks):
    """
    Errors, loss and gradient of one micro-batch of pairs. ref: the frozen reference, or its errors (2, B). scale multiplies the sum over its pairs.
    Returns metrics {name: (B,)}.

    joint       both branches in one forward and one graph
    sequential  one branch's activations at a time, for one more forward of the loser: 11 forwards instead of 10
    pair        this rank has one branch, its partner the other; they exchange two numbers a pair
    """
    if args.loss == "sft":
        err, _, _ = flow_errors(policy, branch(batch, "win"))
        loss, metrics = losses.sft_loss(err)
        (scale * loss.sum()).backward()
        return metrics | {"loss": loss.detach(), "err_win": err.detach()}

    ref_errors = ref if torch.is_tensor(ref) else reference_errors(args, ref, batch, ranks)
    if args.backward == "joint":
        err, v_pred, v_target = flow_errors(policy, branch(batch, "win", "lose"))
        err_win, err_lose = err.chunk(2)
        (v_win, v_lose), (target_win, target_lose) = v_pred.detach().chunk(2), v_target.chunk(2)
        safeguard = safeguard_coefficient(v_win, target_win, v_lose, target_lose, args.mu) if args.loss == "diffusion_sdpo" else None
        c_win, c_lose, metrics = coefficients(args, err_win, err_lose, *ref_errors, batch["sigma"], safeguard)
        (scale * (c_win * err_win - c_lose * err_lose).sum()).backward()

    elif args.backward == "sequential":
        win, lose = branch(batch, "win"), branch(batch, "lose")
        with torch.no_grad():
            err_lose, v_lose, target_lose = flow_errors(policy, lose)
        err_win, v_win, target_win = flow_errors(policy, win)
        safeguard = safeguard_coefficient(v_win, target_win, v_lose, target_lose, args.mu) if args.loss == "diffusion_sdpo" else None
        c_win, c_lose, metrics = coefficients(args, err_win, err_lose, *ref_errors, batch["sigma"], safeguard)
        (scale * (c_win * err_win).sum()).backward()
        del err_win, v_win                                                    # the winner's graph goes before the loser's comes
        err_lose, _, _ = flow_errors(policy, lose)
        (-scale * (c_lose * err_lose).sum()).backward()

    else:
        err, _, _ = flow_errors(policy, branch(batch, ("win", "lose")[ranks.branch]))
        err_win, err_lose = exchange_branches(err.detach(), ranks.pair_group)
        c_win, c_lose, metrics = coefficients(args, err_win, err_lose, *ref_errors, batch["sigma"])
        (scale * ((c_win, -c_lose)[ranks.branch] * err).sum()).backward()
    return metrics


# ------------------------------------------------------------------------------------------------------------------

def main(args):
    # ---------------- ranks
    ranks = start_ranks(args.backward == "pair", args.cp_size, args.replicate)
    if args.export:
        if args.out == args.defaults["out"] or (Path(args.out) / "log.jsonl").exists():
            raise ValueError(f"--export {args.export} --out {args.out}: name a new file or folder with --out, which is not a run's own")
        if ranks.rank == 0:
            checkpoint = find_checkpoint(Path(args.export).parent, args.export, "--export")
            export_weights(checkpoint, args.out, args.export_format, getattr(torch, args.export_dtype), "auto" if args.ema_decay else "policy")
        return dist.destroy_process_group()
    check_args(args, ranks)
    memory = check_memory_flags(args)
    talk = print if ranks.rank == 0 else lambda *a, **k: None
    config, args.model, expert = find_model(args.init, args.model)            # another size or a damaged file: it says so before anything is made
    check_timesteps(args.model, expert, args.min_timestep, args.max_timestep, args.init)
    if args.sample_every:
        refuse_lone_expert(args.model, args.init, "--sample_every")
    if config.scores:
        raise ValueError(f"--init {args.init}: a preference model, expected a model that generates (scores is True, expected False)")
    needs_pairs = args.loss != "sft"
    per_rank = args.batch_size // (ranks.data_ranks * args.grad_accum)
    if config.num_heads % args.cp_size:
        raise ValueError(f"--cp_size {args.cp_size} does not divide the {config.num_heads} heads of --model {args.model}")

    # ---------------- data
    toy_world = args.data == "toy"
    if toy_world and (config.text_dim, config.in_dim) != (toy.TEXT_DIM, toy.CHANNELS):
        raise ValueError(f"--model {args.model} with --data toy: the embedded world is for the tiny model; name a folder of encoded samples with --data")
    dataset = open_data(make_world(args, config, ranks) if toy_world else args.data, needs_pairs, args.bad_samples == "skip")
    dataset, held_back = hold_back(dataset, args.hold_back) if args.hold_back else (dataset, None)
    check_samples(dataset.wins | (held_back.wins if held_back else {}), config, per_rank)
    of_world = of_the_world(dataset)
    first = dataset[0]

    # ---------------- what decides the run
    # this must not change on resume; ranks, accumulation, memory flags and steps may
    drawn = ("seed", "timestep_sampling", "flow_shift", "min_timestep", "max_timestep")            # what a position is: which pair, sigma and noise
    fixed = {name: getattr(args, name) for name in (*drawn, "loss", "model", "batch_size", "learning_rate", "weight_decay", "warmup_steps", "decay_steps",
             "max_grad_norm", "loss_scale", "ema_decay", "caption_dropout", *LOSS_FLAGS[args.loss])}
    files = [path for pair in dataset.pairs for path in pair] if needs_pairs else dataset.files
    fixed |= {"init": "scratch" if args.init == "scratch" else weights_digest(args.init),
              "data": f"{len(dataset)} {'pairs' if needs_pairs else 'samples'}, {seed_of([path.name for path in files]):x}"}
    if toy_world and needs_pairs:
        fixed |= {"guidance": args.guidance, "sample_steps": args.sample_steps}                  # of the negatives
    if args.decay_steps:
        fixed["steps"] = args.steps
    if args.ref == "cached":                                                  # what decides the reference's error at a position
        scored_with = {name: fixed[name] for name in ("init", *drawn)} | {"data": fingerprint(files), "device": ranks.device.type}
        errors = open_errors(args.out / "ref_errors.safetensors", scored_with, args.steps * args.batch_size)

    # ---------------- models
    trained = replace(config, scores=args.loss == "preference")
    policy = build_model(args.init, trained, ranks, memory, trained=True, offload=args.offload_params, seed=args.seed)
    needs_ref = args.loss not in ("sft", "preference") and (args.ref != "cached" or errors.isnan().any())
    ref = build_model(args.init, config, ranks, memory, offload=args.ref == "offload").eval().requires_grad_(False) if needs_ref else None
    ema = build_model(args.init, trained, ranks, memory, offload=args.offload_params, seed=args.seed).eval().requires_grad_(False) if args.ema_decay else None

    # ---------------- optimizer
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)

    def learning_rate(step):
        warm = min(1.0, (step + 1) / max(1, args.warmup_steps))
        return args.learning_rate * min(warm, (args.steps - step) / args.decay_steps if args.decay_steps else 1.0)

    # ---------------- the probe, while the policy is the reference still
    both = lambda model, batch: torch.stack([flow_errors(model, branch(batch, name))[0] for name in ("win", "lose")])    # one at a time: the probe's pairs may be large
    if args.probe_every and not held_back and of_world and args.init != "scratch":
        held_back = held_out_pairs(args, config, ranks)
    probe = Probe(held_back, both, policy, sigma_steps(args.min_timestep, args.max_timestep), ranks, per_rank) if args.probe_every and held_back else None

    # ---------------- resume
    checkpoint = Path(args.resume)
    start, skipped = load_checkpoint(args.resume, policy, optimizer, ema, fixed)
    log_path = args.out / "log.jsonl"
    rows = begin_log(args, start, ranks=ranks.world) if ranks.rank == 0 else []
    dist.barrier()

    # ---------------- what will happen
    parameters, learning = (sum(p.numel() for p in policy.parameters() if p.requires_grad or frozen) for frozen in (True, False))
    tokens = math.prod(n // p for n, p in zip(first["win"].shape[1:], config.patch_size))
    talk(f"{args.model}: {parameters:,} parameters, {ranks.world} rank{'s' * (ranks.world > 1)} on {ranks.device.type}, torch {torch.__version__}")
    talk(memory_plan(args, config, parameters, tokens, per_rank * (2 if needs_pairs and args.backward == "joint" else 1),
                     args.loss not in ("sft", "preference"), ranks, learning / parameters))
    talk(f"{len(dataset):,} {'pairs' if needs_pairs else 'samples'} in {'the embedded world' if toy_world else args.data}, latents {tuple(first['win'].shape)} = {tokens:,} tokens, context {tuple(first['context'].shape)}"
         + (f"; {len(dataset.unpaired)} real samples have no negative and are left out" if needs_pairs and dataset.unpaired else ""))
    talk(f"a step: {args.batch_size} pairs = {ranks.data_ranks} data ranks x {args.grad_accum} accumulation x {per_rank}"
         + f" (one data rank: {ranks.world // ranks.data_ranks} ranks, {'one branch each' if args.backward == 'pair' else 'both branches'}, tokens over {args.cp_size})" * (ranks.world > ranks.data_ranks) + "; "
         f"steps {start} to {args.steps} = {(args.steps - start) * args.batch_size / len(dataset):.1f} epochs; log in {log_path}")

    if needs_pairs and ranks.rank == 0 and not args.resume:
        print(audit_report(dataset, args.min_timestep / 1000))
    evaluated = args.eval_clips and of_world
    held_out = None                                                           # a preference model samples nothing
    if not trained.scores and (evaluated or args.sample_every):
        held_out = HeldOut(args.eval_clips) if evaluated else Preview(held_back or dataset)
    if held_out and args.init != "scratch":
        before = ref if ref is not None else build_model(args.init, config, ranks, memory)
        held_out.judge("before", held_out.sample(args, before, ranks), shown=True)
        del before

    def positions(step):                                                      # of this rank, a range for each accumulation step
        begins = [step * args.batch_size + (micro * ranks.data_ranks + ranks.data_rank) * per_rank for micro in range(args.grad_accum)]
        return [range(begin, begin + per_rank) for begin in begins]

    if args.ref == "cached":
        score_reference(args.out / "ref_errors.safetensors", scored_with, errors, range(start, args.steps), args.batch_size,
                        lambda mine: reference_errors(args, ref, read_batch(args, dataset, mine, ranks.device), ranks), positions, ranks)
        ref = None
        gc.collect()                                                          # a sharded model refers to itself; without this it would stay for a while

    # ---------------- the loop
    watch = Watch(rows)
    scale = args.loss_scale * ranks.world / args.batch_size                   # FSDP averages over all ranks; a step is the mean over its pairs
    signals = Signals(args.save_minutes)
    for step in range(start, args.steps):
        began = time.perf_counter()
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()                              # of this step, not of sampling before it
        sums, margins, samples = {}, [], []
        for mine in positions(step):
            batch = read_batch(args, dataset, mine, ranks.device)
            known = errors[mine.start:mine.stop].T.to(ranks.device) if args.ref == "cached" else ref
            if trained.scores:
                known = torch.zeros(2, per_rank, device=ranks.device)         # preferences have no reference
            metrics = backward_batch(args, policy, known, batch, scale, ranks)
            add_up(sums, metrics, batch["sigma"])
            margins += metrics["margin"].tolist() if needs_pairs else []
            samples += zip(batch["names"], metrics["loss"].tolist())
        row, counts = summarise(sums | signals.asks(), margins, ranks.device)
        indices = [order(args.seed, p, len(dataset)) for p in range(step * args.batch_size, (step + 1) * args.batch_size)]    # of all ranks
        row |= {"sources": Counter(map(dataset.source, indices))} if needs_pairs and len(dataset.sources) > 1 else {}     # which folders of losers the pairs came from

        if needs_pairs and step == 0 and row["margin_abs"] > 1e-6 * (1 if args.loss == "ipo" else args.beta):      # rounding of the errors; IPO's margin has no beta
            raise RuntimeError(f"policy and reference are the same weights at step 0, but their margins differ by {row['margin_abs']:.2g} on average: they do "
                               f"not take the same numerical path, so every later margin would be wrong by as much (and the DPO part of the loss is not log 2)")

        kept = counts["pairs"] / max(1, counts["kept"]) if "kept" in counts else 1.0
        row["grad_norm"] = clip_gradients(list(policy.parameters()), args.max_grad_norm, kept)
        row["lr"] = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        skipped = 0 if math.isfinite(row["grad_norm"]) and math.isfinite(row["loss"]) else skipped + 1
        if skipped:
            report_skipped(step, skipped, samples)
        else:
            optimizer.step()
            if ema is not None:
                ema_update(ema, policy, min(args.ema_decay, (step + 1) / (step + 10)))
        optimizer.zero_grad()

        row = {"step": step, **row, "skipped": skipped, "bad_samples": sum(i in dataset.bad for i in indices), "seconds": time.perf_counter() - began}
        row["memory_gib"] = memory_gib(ranks.device)
        row["tokens_per_second"] = args.batch_size * tokens * (2 if needs_pairs else 1) / row["seconds"]
        if probe and ((step + 1) % args.probe_every == 0 or step + 1 == args.steps):
            row["probe"] = probe(policy if ema is None else ema, args.beta)    # after this step's update, of what will be exported
        if ranks.rank == 0:
            verdicts = watch(row)
            append_row(log_path, {name: value for name, value in row.items() if name != "pairs"})
            if step % args.log_every == 0 or step == args.steps - 1:
                shown = [name for name in ("loss", "accuracy", "margin", "win_gap", "lose_gap", "dgr", "err_win", "kept", "grad_norm", "seconds") if name in row]
                print(f"step {step:>5}  " + "  ".join(f"{name} {row[name]:.4g}" for name in shown), flush=True)
            for verdict in verdicts:
                print(verdict, flush=True)

        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or counts["asks/save"] or counts["asks/stop"]:
            checkpoint = signals.save(args.out, step + 1, policy, optimizer, ema, fixed | {"config": asdict(trained), "skipped": skipped}, args.keep)
        if counts["asks/stop"]:
            return signals.leave(checkpoint)
        if args.sample_every and (step + 1) % args.sample_every == 0 and step + 1 < args.steps and held_out:
            videos = held_out.judge(f"step {step + 1}", held_out.sample(args, policy if ema is None else ema, ranks))
            if ranks.rank == 0:
                held_out.picture(args.out / "samples" / f"step_{step + 1:06d}", now=videos)

    # ---------------- what came out
    signals.close()
    if ranks.rank == 0:
        export_weights(checkpoint, args.out / ("export.safetensors" if args.export_format == "comfyui" else "export"), args.export_format, getattr(torch, args.export_dtype))
    if evaluated and trained.scores:
        pairs, sigmas = held_out_pairs(args, config, ranks, args.eval_clips), (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
        right = Probe(pairs, both, policy, sigmas, ranks, 64)(policy if ema is None else ema, 1.0)["accuracy"]
        right = {f"sigma {sigma:g}": value for sigma, value in zip(sigmas, right)}
        talk("held-out accuracy: " + ", ".join(f"{name} {value:.3f}" for name, value in right.items()))
        if ranks.rank == 0:
            write_whole(args.out / "samples" / "marks.json", json.dumps(right, indent=1).encode())
    if held_out:
        videos = held_out.judge("after", held_out.sample(args, policy if ema is None else ema, ranks))
        if ranks.rank == 0:
            held_out.close(args.out / "samples", after=videos)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        record(main)(parse_args(sys.argv[1:]))                                # torchrun then shows the error of the rank that failed first
    except ValueError as error:
        sys.exit(f"train.py: {error}")
