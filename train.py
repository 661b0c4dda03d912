"""
Preference post-training of Wan video models, offline objectives: one file, one loop. By default on GT-Pairs (a real
clip wins over the model's own clip of its caption) in the embedded world of toy.py.

    python train.py                                           # Reg-DPO on GT-Pairs in the embedded world, on a laptop
    torchrun --nproc_per_node=8 train.py --loss regdpo        # the same on 8 ranks, the same curve
    torchrun --nproc_per_node=8 train.py --init Wan2.1-T2V-1.3B --data DIR --beta 1000 --learning_rate 1e-6
"""
import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

import evaluate
import lora
import losses
import run_folder
import run_log
from curves import Watch
from data import branch, collate, draw, empty_caption, order, randomness
from experts import Experts, open_model, own_step_of, plan_adapters, side_of, timesteps_of
from export import export_run
from fsdp_utils import clip_gradients, ema_update, exchange_branches, matrix_dtype, positions_of, start_ranks
from losses import add_noise, flow_error, importance_weight, next_sigma, safeguard_coefficient, velocity_target
from memory import add_memory_flags, check_memory_flags, memory_gib, memory_plan, reset_memory_gib
from model import CONFIGS, hold_first_frame
from ref_cache import RefErrors
from samples import weights_digest
from weights import locate_weights

# ------------------------------------------------------------------------------------------------------------------
# objectives: to add one, write its function in losses.py and its row in OBJECTIVES


class Flag(NamedTuple):
    """A flag of train.py that belongs to objectives."""
    name: str
    default: object
    help: str
    type: Callable = float


class Pair(NamedTuple):
    """What an objective may read, (B,) each. A loss on pairs uses err_win and err_lose; they alone have a gradient.
    A preference model has scores in their place: higher is better, so c_win and c_lose are negative."""
    err_win: torch.Tensor
    err_lose: torch.Tensor
    ref_err_win: torch.Tensor
    ref_err_lose: torch.Tensor
    sigma: torch.Tensor
    outputs: tuple = ()       # v_pred and v_target of the win, then of the lose, (B, C, F, H, W) each, detached


@dataclass(frozen=True)
class Objective:
    """A row of OBJECTIVES. Metrics of pairs hold margin, accuracy, win_gap, lose_gap; `kept`: average over these."""
    loss: Callable                                         # (args, pair) -> losses (B,), metrics {name: (B,)}
    flags: tuple = ()                                      # given with another objective they are refused
    scale: Callable = lambda args: 1 / args.beta           # brings |c_win| to about 1 at the start (--loss_scale 0)
    reads_pairs: bool = True                               # False: wins only, and no reference
    needs_ref: bool = True                                 # False: none is built, and ref_err_* are zeros
    needs_outputs: bool = False                            # reads pair.outputs, which --backward pair does not have
    trains_scores: bool = False                            # the model is a preference model: scores, not velocities


def number_or_dgr(text):
    try:
        return None if text == "dgr" else float(text)      # None: as losses.regdpo_loss has it
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 'dgr' or a number") from None


def importance_weights(args, pair):
    """(weight_win, weight_lose), (B,) each, for a sampler of --weight_steps steps."""
    sigma_next = next_sigma(pair.sigma, args.weight_steps, args.flow_shift)
    weight_win = importance_weight(pair.err_win, pair.sigma, sigma_next)
    return weight_win, importance_weight(pair.err_lose, pair.sigma, sigma_next)


# Flags that several objectives share. A name is one Flag: use these, do not define them again.
BETA = Flag("beta", 30.0, "multiplies a mean squared error, with no extra 1/2; the Reg-DPO paper has 1000")
CLIP = Flag("clip", 0.1, "clip importance weights to [1 - clip, 1 + clip]")
WEIGHT_STEPS = Flag("weight_steps", 50, "importance weights are for the stride of a sampler with this many steps", int)

OBJECTIVES = {
    "sft": Objective(
        lambda args, pair: losses.sft_loss(pair.err_win),
        (Flag("caption_dropout", 0.0, "share of captions replaced by the empty one; guidance needs 0.1"),),
        scale=lambda args: 1.0, reads_pairs=False, needs_ref=False),
    "dpo": Objective(lambda args, pair: losses.dpo_loss(*pair[:4], args.beta), (BETA,)),
    "regdpo": Objective(
        lambda args, pair: losses.regdpo_loss(*pair[:4], args.beta, args.r, args.r_scale, args.r_min), (
        BETA,
        Flag("r", "dgr", "weight of Reg-DPO's SFT term: 'dgr', or a fixed number", number_or_dgr),
        Flag("r_scale", 1.0, "r = max(r_scale * dgr, r_min)"),
        Flag("r_min", 0.0, "lower bound of r; 0: none"))),
    "dpo_cm": Objective(
        lambda args, pair: losses.dpo_cm_loss(
            *pair[:4], args.beta, *importance_weights(args, pair), args.threshold, args.clip),
        (BETA, CLIP, WEIGHT_STEPS, Flag("threshold", 0.9, "drop pairs whose importance weight is lower"))),
    "sdpo": Objective(
        lambda args, pair: losses.sdpo_loss(*pair[:4], args.beta, *importance_weights(args, pair), args.clip),
        (BETA, CLIP, WEIGHT_STEPS)),
    "ipo": Objective(
        lambda args, pair: losses.ipo_loss(*pair[:4], args.tau),
        (Flag("tau", 50.0, "aim at a margin of 1 / (2 tau)"),), scale=lambda args: args.tau),
    "dpop": Objective(
        lambda args, pair: losses.dpop_loss(*pair[:4], args.beta, args.penalty),
        (BETA, Flag("penalty", 5.0, "weight of the penalty for a win denoised worse than by the reference"))),
    "diffusion_sdpo": Objective(
        lambda args, pair: losses.diffusion_sdpo_loss(
            *pair[:4], args.beta, safeguard_coefficient(*pair.outputs, args.mu)),
        (BETA, Flag("mu", 0.9, "share of the win's descent that is guaranteed, 0 to 1")), needs_outputs=True),
    "preference": Objective(
        lambda args, pair: losses.preference_loss(pair.err_win, pair.err_lose),
        scale=lambda args: 1.0, needs_ref=False, trains_scores=True),
}

# What a resumed run may change; also --steps without --decay_steps. --init and --data may be renamed, not altered.
MAY_CHANGE = {
    "out", "resume", "init", "data", "grad_accum", "bad_samples", "backward", "cp_size", "replicate", "ref",
    "checkpointing", "chunk_tokens", "compile", "offload_activations", "offload_params", "save_every", "keep",
    "save_minutes", "log_every", "probe_every", "sample_every", "eval_clips", "tracker"}


# ------------------------------------------------------------------------------------------------------------------
# flags

class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints the description as it stands, and the default of each flag."""


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = p.add_argument
    # what to train
    add("--loss", default="regdpo", choices=OBJECTIVES, help="objective (see losses.py); preference trains a scorer")
    add("--model", default="auto", choices=["auto", *CONFIGS], help="the model that --init must hold; auto: any")
    add("--init", default="toy_base", help="weights of policy and reference; 'scratch': random ones")
    add("--data", default="toy", help="folder with real/ and negatives*/, .jsonl of pairs, or 'toy'")
    add("--bad_samples", default="stop", choices=["stop", "skip"],
        help="unreadable samples: stop, or skip (use the next good one and count it in the log)")
    add("--out", default="out/{loss}", help="the run's folder")
    add("--seed", type=int, default=0, help="seed of order, sigma and noise")
    # the objective
    for flag in objective_flags().values():
        users = ", ".join(name for name, objective in OBJECTIVES.items() if flag in objective.flags)
        add(f"--{flag.name}", type=flag.type, default=flag.default, help=f"{flag.help} (--loss {users})")
    add("--timestep_sampling", default="uniform", choices=["uniform", "logit_normal"],
        help="distribution of sigma before the shift; logit_normal: sigmoid(N(0, 1))")
    add("--flow_shift", type=float, default=3.0, help="shift of the sigmas of training and sampling")
    add("--min_timestep", type=float, default=0.0, help="lowest timestep trained on, after the shift")
    add("--max_timestep", type=float, default=1000.0, help="highest timestep trained on")
    # the optimizer
    add("--steps", type=int, default=300, help="optimizer steps")
    add("--switch_every", type=int, default=0, help="steps in a row with one expert where --init holds two; 0: 10")
    add("--batch_size", type=int, default=16, help="pairs a step, over all ranks and accumulation steps")
    add("--grad_accum", type=int, default=1, help="parts that a rank splits its pairs of a step into")
    add("--learning_rate", type=float, default=1e-4, help="peak learning rate; Wan: 1e-6 to 1e-5")
    add("--weight_decay", type=float, default=1e-3, help="weight decay of AdamW")
    add("--warmup_steps", type=int, default=20, help="first steps (of each expert), over which the learning rate rises")
    add("--decay_steps", type=int, default=0, help="last steps, over which the learning rate falls to 0")
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm; inf: do not clip")
    add("--loss_scale", type=float, default=0.0, help="multiplies the loss; 0: so that c_win starts near 1")
    add("--ema_decay", type=float, default=0.98, help="decay of the exported average of weights; 0: no average")
    lora.add_lora_flags(p)       # --lora_rank --lora_alpha --lora_targets --init_lora
    # memory and ranks
    add("--backward", default="joint", choices=["joint", "sequential", "pair"],
        help="win and lose of a pair in one graph, one after the other (less memory), or on two ranks")
    add("--cp_size", type=int, default=1, help="number of ranks that share the tokens of each video")
    add("--replicate", type=int, default=1, help="number of groups of ranks (nodes) that each hold all weights")
    add("--ref", default="auto", choices=["auto", "live", "offload", "cached"],
        help="the frozen reference: live (sharded), offload (in CPU memory) or cached (scored once, before training); "
             "auto: live, or for adapters the policy with its initial ones")
    add_memory_flags(p)     # --checkpointing --chunk_tokens --compile --offload_activations --offload_params
    # the run's folder
    run_folder.add_folder_flags(p, save_every=100)     # --save_every --keep --save_minutes --resume
    add("--probe_every", type=int, default=50, help="steps between looks at held-out pairs; 0: never")
    add("--hold_back", type=int, default=0, help="wins held back for the probe, with their losers")
    add("--log_every", type=int, default=10, help="steps between printed lines; log.jsonl has every step")
    # the embedded world, and previews of other data
    add("--toy_clips", type=int, default=512, help="number of real clips made for --data toy")
    add("--sample_every", type=int, default=0, help="steps between evaluations or previews; 0: none")
    add("--eval_clips", type=int, default=256, help="held-out captions of an evaluation, 64 or more; 0: none")
    add("--sample_steps", type=int, default=20, help="sampler steps for negatives and evaluations")
    add("--guidance", type=float, default=1.0, help="guidance for negatives and evaluations; 1: none")
    args = p.parse_args(argv)
    args.defaults = {name: p.get_default(name) for name in vars(args)}
    return args


def objective_flags():
    """{name: Flag} of all rows of OBJECTIVES."""
    flags = {flag.name: flag for objective in OBJECTIVES.values() for flag in objective.flags}
    for objective in OBJECTIVES.values():
        assert all(flags[flag.name] == flag for flag in objective.flags), "one flag is defined in two ways"
    return flags


def check_args(args, ranks):
    """
    Refuse flags that cannot work, before anything is loaded, and fill in those that follow from others. ValueError.
    """
    run_folder.check_common_flags(args, ranks)
    lora.check_lora_flags(args)
    check_objective(args, OBJECTIVES[args.loss])
    draw(0, 0, (1,), args.flow_shift, args.min_timestep, args.max_timestep)    # checks the range of sigma
    if args.bad_samples == "skip" and args.ref == "cached":
        raise ValueError("--bad_samples skip: expected stop with --ref cached, whose errors belong to the scored pairs")
    if args.init != "scratch":
        args.init = locate_weights(args.init)
    args.out = Path(str(args.out).replace("{loss}", args.loss))
    args.resume = run_folder.check_folder(args.out, args.resume)
    args.loss_scale = args.loss_scale or OBJECTIVES[args.loss].scale(args)


def check_objective(args, objective):
    """Refuse flags that this objective does not read, or cannot work with."""
    for name, flag in objective_flags().items():
        if flag not in objective.flags and getattr(args, name) != flag.type(flag.default):
            users = " or ".join(user for user, other in OBJECTIVES.items() if flag in other.flags)
            value = getattr(args, name)
            raise ValueError(f"--{name} {value} does nothing in --loss {args.loss}; it belongs to --loss {users}")
    one, videos = torch.ones(1), torch.ones(4, 1, 1, 1, 1, 1).unbind()
    try:                                                   # the functions of losses.py check what they are given
        objective.loss(args, Pair(one, one, one, one, one / 2, videos))
    except ValueError as error:
        raise ValueError(f"--loss {args.loss}: {error}") from None
    if objective.reads_pairs and args.init == "scratch":
        raise ValueError(f"--init scratch with --loss {args.loss}: a preference needs a model that already generates; "
                         "train one with --loss sft first")
    if not objective.reads_pairs and args.backward != "joint":
        raise ValueError(f"--backward {args.backward} is about the two branches of a pair; --loss {args.loss} has one")
    if not objective.reads_pairs and args.hold_back:
        raise ValueError(f"--hold_back {args.hold_back} keeps pairs for a probe; --loss {args.loss} reads none")
    if not objective.needs_ref and args.ref in ("offload", "cached"):
        raise ValueError(f"--ref {args.ref} is about the reference of a loss like dpo; --loss {args.loss} has none")
    if objective.needs_outputs and args.backward == "pair":
        raise ValueError(f"--loss {args.loss} needs both outputs on one rank; use --backward joint or sequential")
    if objective.trains_scores and args.sample_every:
        raise ValueError(f"--sample_every samples a policy, and --loss {args.loss} trains none")


# ------------------------------------------------------------------------------------------------------------------
# one micro-batch

def read_batch(args, dataset, positions, device):
    """
    The pairs at these positions of the run, with sigma and noise, functions of (seed, position) alone. Returns a
    dictionary of tensors (B, ...) on `device`, the list "names", and counts {name: number} under "counts".
    """
    indices = [order(args.seed, position, len(dataset)) for position in positions]
    skip = args.bad_samples == "skip"
    items = run_folder.read_items(dataset, indices, skip)
    # no shift for a scorer: low sigmas, where a sampler takes few steps, are the easiest to judge
    flow_shift = 1.0 if OBJECTIVES[args.loss].trains_scores else args.flow_shift
    limits = (flow_shift, *timesteps_of(args, positions[0] // args.batch_size), args.timestep_sampling)
    draws = [draw(args.seed, position, item["win"].shape, *limits) for position, item in zip(positions, items)]
    for position, item in zip(positions, items):
        if torch.rand((), generator=randomness(args.seed, position, "dropout")) < args.caption_dropout:
            item["context"] = empty_caption(dataset, item["context"].shape[1])
    batch = collate(items)
    batch["sigma"] = torch.tensor([sigma for sigma, _ in draws])              # (B,)
    batch["noise"] = torch.stack([noise for _, noise in draws])               # (B, C, F, H, W)
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    batch["counts"] = {"bad_samples": sum(index in dataset.bad for index in indices) if skip else 0}
    for source in dataset.sources:
        batch["counts"][f"sources/{source}"] = sum(item.get("source") == source for item in items)
    return batch


def flow_errors(model, inputs):
    """
    Run the model on noised latents. Returns errors (B,) float32, v_pred and v_target (B, C, F, H, W).

    Where frame 0 is given clean (TI2V's first_latent) it does not count: F is one less, and the error is the mean over
    the rest. A preference model returns scores (B,) in place of errors: they too are two numbers a pair, with a
    gradient c_win * d score_win - c_lose * d score_lose.
    """
    latents, sigma, noise = inputs["latents"], inputs["sigma"], inputs["noise"]
    not_conditions = ("latents", "sigma", "noise", "context", "first_latent")
    conditions = {name: value for name, value in inputs.items() if name not in not_conditions}
    x_sigma, timestep = add_noise(latents, noise, sigma), 1000 * sigma
    v_target = velocity_target(latents, noise)
    if "first_latent" in inputs:
        x_sigma, timestep = hold_first_frame(x_sigma, timestep, inputs["first_latent"], model.config.patch_size)
    v_pred = model(x_sigma, timestep, inputs["context"], **conditions)
    if model.config.scores:
        return v_pred, v_pred, v_target
    if "first_latent" in inputs:
        v_pred, v_target = v_pred[:, :, 1:], v_target[:, :, 1:]
    return flow_error(v_pred, v_target), v_pred, v_target


def coefficients(args, pair):
    """
    c_win, c_lose (B,) and metrics {name: (B,)} of the objective.

    Every offline objective has the gradient c_win * d err_win - c_lose * d err_lose, and autograd gives the two numbers
    from the errors alone. So the branches can be back-propagated together, one by one, or on two ranks, with the same
    result.
    """
    objective = OBJECTIVES[args.loss]
    err_win, err_lose = pair.err_win.detach().requires_grad_(), pair.err_lose.detach().requires_grad_()
    with torch.enable_grad():
        loss, metrics = objective.loss(args, pair._replace(err_win=err_win, err_lose=err_lose))
        c_win, minus_c_lose = torch.autograd.grad(loss.sum(), (err_win, err_lose))
    c_lose = -minus_c_lose
    metrics |= {"loss": loss.detach(), "c_win": c_win, "c_lose": c_lose}
    if not objective.trains_scores:
        metrics |= {"err_win": err_win.detach(), "err_lose": err_lose.detach()}
        metrics |= {"ref_err_win": pair.ref_err_win, "ref_err_lose": pair.ref_err_lose}
    return c_win, c_lose, metrics | run_log.diagnostics(metrics)


@torch.no_grad()
def both_errors(model, batch):
    """Errors (2, B) of win and lose, one branch at a time."""
    return torch.stack([flow_errors(model, branch(batch, name))[0] for name in ("win", "lose")])


@torch.no_grad()
def reference_errors(args, ref, batch, ranks):
    """
    Errors (2, B) of the frozen reference, from the same forwards as the policy's in backward_batch, so that equal
    weights give equal errors. ref: the model, its errors, or None for losses without one (zeros).
    """
    if torch.is_tensor(ref):
        return ref
    if ref is None:
        return torch.zeros(2, len(batch["sigma"]), device=batch["sigma"].device)
    if args.backward == "joint":
        return flow_errors(ref, branch(batch, "win", "lose"))[0].view(2, -1)
    if args.backward == "sequential":
        return both_errors(ref, batch)
    err, _, _ = flow_errors(ref, branch(batch, ("win", "lose")[ranks.branch]))
    return exchange_branches(err, ranks.pair_group)


def backward_batch(args, policy, ref, batch, scale, ranks):
    """
    Errors, loss and gradient of one micro-batch. ref: the frozen reference, or its errors (2, B). scale multiplies the
    sum over its pairs. Returns metrics {name: (B,)}.

    joint       both branches in one forward and one graph
    sequential  one branch's activations at a time, for one more forward of the lose
    pair        this rank runs one branch, its partner the other; they exchange two numbers a pair
    """
    objective = OBJECTIVES[args.loss]
    if not objective.reads_pairs:
        err, _, _ = flow_errors(policy, branch(batch, "win"))
        loss, metrics = objective.loss(args, Pair(err, None, None, None, batch["sigma"]))
        (scale * loss.sum()).backward()
        return metrics | {"loss": loss.detach(), "err_win": err.detach()}
    ref_errors = reference_errors(args, ref, batch, ranks)
    if args.backward == "joint":
        return backward_joint(args, policy, ref_errors, batch, scale)
    if args.backward == "sequential":
        return backward_sequential(args, policy, ref_errors, batch, scale)
    return backward_pair(args, policy, ref_errors, batch, scale, ranks)


def backward_joint(args, policy, ref_errors, batch, scale):
    err, v_pred, v_target = flow_errors(policy, branch(batch, "win", "lose"))
    err_win, err_lose = err.chunk(2)
    v_win, v_lose = v_pred.detach().chunk(2)
    target_win, target_lose = v_target.chunk(2)
    pair = Pair(err_win, err_lose, *ref_errors, batch["sigma"], (v_win, target_win, v_lose, target_lose))
    c_win, c_lose, metrics = coefficients(args, pair)
    (scale * (c_win * err_win - c_lose * err_lose).sum()).backward()
    return metrics


def backward_sequential(args, policy, ref_errors, batch, scale):
    win, lose = branch(batch, "win"), branch(batch, "lose")
    with torch.no_grad():
        err_lose, v_lose, target_lose = flow_errors(policy, lose)
    err_win, v_win, target_win = flow_errors(policy, win)
    pair = Pair(err_win, err_lose, *ref_errors, batch["sigma"], (v_win.detach(), target_win, v_lose, target_lose))
    c_win, c_lose, metrics = coefficients(args, pair)
    (scale * (c_win * err_win).sum()).backward()
    del err_win, v_win, pair                               # the win's graph is freed before the lose's is built
    err_lose, _, _ = flow_errors(policy, lose)
    (-scale * (c_lose * err_lose).sum()).backward()
    return metrics


def backward_pair(args, policy, ref_errors, batch, scale, ranks):
    own = ("win", "lose")[ranks.branch]
    err, _, _ = flow_errors(policy, branch(batch, own))
    errors = exchange_branches(err.detach(), ranks.pair_group)                # (2, B)
    c_win, c_lose, metrics = coefficients(args, Pair(*errors, *ref_errors, batch["sigma"]))
    (scale * ((c_win if own == "win" else -c_lose) * err).sum()).backward()
    return metrics


# ------------------------------------------------------------------------------------------------------------------
# the run

def learning_rate(args, step, own_step):
    """
    The learning rate of a step: it rises over --warmup_steps and falls to 0 over the last --decay_steps. own_step: the
    number of the step among those of its expert, since each expert warms up by itself; for a single model, the step.
    """
    warm = min(1.0, (own_step + 1) / max(1, args.warmup_steps))
    decay = (args.steps - step) / args.decay_steps if args.decay_steps else 1.0
    return args.learning_rate * min(warm, decay)


@run_folder.closes_at_end
def main(args, dataset=None):
    """dataset: an object that data.py describes, used instead of --data."""
    # ---------------- ranks
    ranks = start_ranks(args.backward == "pair", args.cp_size, args.replicate)
    check_args(args, ranks)
    memory = check_memory_flags(args)
    objective = OBJECTIVES[args.loss]
    config = open_model(args, objective.needs_ref)         # a damaged file is reported before anything is made
    adapters = plan_adapters(args, config)
    per_rank = args.batch_size // (ranks.data_ranks * args.grad_accum)

    # ---------------- data
    if dataset is None:
        dataset = evaluate.open_dataset(args, config, ranks, objective.reads_pairs)
    evaluate.check_empty_caption(args, dataset, config)
    dataset, held_back = evaluate.hold_back(dataset, args.hold_back) if args.hold_back else (dataset, None)
    may_change = MAY_CHANGE if args.decay_steps else MAY_CHANGE | {"steps"}
    init = "scratch" if args.init == "scratch" else weights_digest(args.init)
    data = f"{len(dataset)} items, {dataset.fingerprint()}"
    fixed = run_folder.run_settings(args, may_change, init=init, data=data)
    run_folder.check_same_run(args.resume, fixed)
    cached = RefErrors(args, fixed, memory, ranks) if args.ref == "cached" else None

    # ---------------- models and optimizers: of one model, or of two experts, one of them at a time on the device
    trained_config = replace(config, scores=objective.trains_scores)
    held_out = None if objective.trains_scores else evaluate.open_held_out(args, dataset, held_back)
    shows_before = held_out is not None and args.init != "scratch"
    needs_ref = objective.needs_ref and not (cached and cached.is_complete)
    experts = Experts(args, config, trained_config, adapters, needs_ref or shows_before, ranks, memory)
    averaged = experts.as_model("averaged")                # what is sampled, probed and exported
    # while the policy is still the reference
    probe = evaluate.open_probe(args, config, dataset, held_back, both_errors, experts.as_model("policy"), ranks)

    # ---------------- resume
    run_folder.lock_folder(args.out, ranks)
    checkpoint = Path(args.resume)
    start, skipped = run_folder.load_checkpoint(args.resume, experts.states())
    log = run_log.Log(args, start, ranks)
    dist.barrier()

    # ---------------- what will happen
    tokens = config.count_tokens(dataset[0]["win"].shape)                     # of a video
    branches = 2 if objective.reads_pairs else 1           # videos of an item
    at_once = per_rank * (branches if args.backward == "joint" else 1)        # videos whose graph is alive
    at_once *= not objective.trains_scores                 # a preference model's blocks are frozen
    policy = experts.at(start).policy
    if ranks.rank == 0:
        plan = memory_plan(args, policy, tokens, at_once, objective.needs_ref, ranks)
        lines = run_folder.describe_run(args, dataset, tokens, start, ranks, args.model, policy, plan)
        print("\n".join(lines + experts.describe()))
        if objective.reads_pairs and not args.resume:
            print(evaluate.audit_report(dataset, args.min_timestep / 1000))
    if shows_before:
        held_out.judge("before", experts.as_model("ref"), ranks, keep=True)
    if cached:
        def errors_at(ref, positions):
            return reference_errors(args, ref, read_batch(args, dataset, positions, ranks.device), ranks)
        experts.score_references(cached, errors_at, start)
    if cached or not objective.needs_ref:
        experts.drop_references()

    # ---------------- the loop
    watch = Watch(log.rows)
    margin_beta = args.beta if BETA in objective.flags else 1.0
    in_bf16 = matrix_dtype(ranks.device.type) is not None
    scale = args.loss_scale * ranks.world / args.batch_size        # FSDP averages over ranks, a step over its pairs
    signals = run_folder.Signals(args.save_minutes)
    for step in range(start, args.steps):
        began = time.perf_counter()
        reset_memory_gib(ranks.device)                     # of this step, without the sampling before it
        policy, ref, ema, optimizer = experts.at(step)
        own_step = own_step_of(args, step)                 # the steps before it of the same expert, or of the one model
        sums, margins, samples = {}, [], []
        for positions in positions_of(args, ranks, step):
            batch = read_batch(args, dataset, positions, ranks.device)
            ref_or_errors = cached.at(positions) if cached else ref
            metrics = backward_batch(args, policy, ref_or_errors, batch, scale, ranks)
            run_log.add_up(sums, metrics, batch["sigma"], batch["counts"])
            margins += metrics["margin"].tolist() if objective.reads_pairs else []
            samples += zip(batch["names"], metrics["loss"].tolist())
        row, sums = run_log.summarise(sums | signals.asks(), margins, ranks)
        if objective.needs_ref and own_step == 0:
            run_folder.check_first_margin(row["margin_abs"], margin_beta, in_bf16)

        # dpo_cm takes the mean over the pairs that it kept; a step that keeps none changes nothing
        kept = sums["pairs"] / max(1, sums["kept"]) if "kept" in sums else 1.0
        row["grad_norm"] = clip_gradients(policy.parameters(), args.max_grad_norm, kept)
        row["lr"] = learning_rate(args, step, own_step)
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        if math.isfinite(row["grad_norm"]) and math.isfinite(row["loss"]):
            skipped = 0
            if sums.get("kept", 1):
                optimizer.step()
                if ema is not None:
                    ema_update(ema, policy, min(args.ema_decay, (own_step + 1) / (own_step + 10)))
        else:
            skipped += 1
            run_folder.report_skipped(step, skipped, samples)
        optimizer.zero_grad()

        seconds = time.perf_counter() - began
        row = {"step": step, **row, "skipped": skipped, "seconds": seconds, "memory_gib": memory_gib(ranks.device),
               "tokens_per_second": args.batch_size * branches * tokens / seconds}
        if args.switch_every:
            row["expert"] = side_of(args, step)
        is_last = step + 1 == args.steps
        if probe and ((step + 1) % args.probe_every == 0 or is_last):
            row["probe"] = probe(averaged, args.beta)      # after this step's update; beta times the gap for every loss
        log.add(row, watch(row))

        if (step + 1) % args.save_every == 0 or is_last or sums["asks/save"] or sums["asks/stop"]:
            meta = fixed | {"config": asdict(trained_config), "skipped": skipped}
            checkpoint = signals.save(args.out, step + 1, experts.states(), meta, args.keep)
        if sums["asks/stop"]:
            return signals.leave(checkpoint)
        if held_out and args.sample_every and (step + 1) % args.sample_every == 0 and not is_last:
            now = held_out.judge(f"step {step + 1}", averaged, ranks)
            log.picture(held_out.picture(args.out / "samples" / f"step_{step + 1:06d}", {"now": now}))

    # ---------------- results
    signals.close()
    if ranks.rank == 0:
        export_run(checkpoint, args.out / "export")
    if objective.trains_scores and args.eval_clips and evaluate.is_toy_data(dataset):
        evaluate.mark_scores(args, config, ranks, both_errors, averaged)
    if held_out:
        log.picture(held_out.close(args.out / "samples", {"after": held_out.judge("after", averaged, ranks)}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        record(main)(parse_args(sys.argv[1:]))             # torchrun then shows the error of the rank that failed first
    except ValueError as error:
        sys.exit(f"train.py: {error}")
