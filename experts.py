"""
What a run trains: policy, reference, average and optimizer of one model, or of each of the two experts of an A14B.

A turn is --switch_every steps with one expert. The expert of a turn is a function of (seed, turn); an expert's share of
the turns is the share of the sigmas on its side of the boundary. All positions of a step draw their sigma on that side.
The other expert, with its average and its optimizer's state, waits in CPU memory.
"""
import argparse
import gc
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from data import bell_share, randomness
from fsdp_utils import build_model, make_optimizer
from lora import Average, Reference, plan_lora
from losses import unshift_sigma
from weights import BOUNDARIES, EXPERT_LORAS, check_timesteps, find_model, refuse_lone_expert, two_experts

SIDES = ("high_noise", "low_noise")   # in the log, and in names of folders and files; one model has ""

# ----------------------------------------------------------------------------------------------------------------------
# which model, or models

def open_model(args, needs_ref):
    """
    Return the WanConfig of the model, or of both experts, that --init holds, checked against the flags. args.model
    becomes its name, and args.switch_every the steps of a turn, 0 for one model. needs_ref: does the loss compare with
    a reference? ValueError for files and flags that do not fit.
    """
    is_two = args.init != "scratch" and bool(two_experts(args.init))
    if args.switch_every < 0 or (args.switch_every and not is_two):
        raise ValueError(f"--switch_every {args.switch_every}: --init {args.init} is one model; leave it out, or give "
                         "a folder with both experts of an A14B model")
    if is_two:
        config = open_two(args, needs_ref)
    else:
        config, args.model, expert = find_model(args.init, args.model)
        check_timesteps(args.model, expert, args.min_timestep, args.max_timestep, args.init)
        if args.sample_every:
            refuse_lone_expert(args.model, args.init, "--sample_every")
    if config.num_heads % args.cp_size:
        heads = f"the {config.num_heads} heads of --model {args.model}"
        raise ValueError(f"--cp_size {args.cp_size} does not divide {heads}")
    if config.scores:
        raise ValueError(f"--init {args.init}: a preference model (scores is True, expected False), not one to sample")
    return config


def open_two(args, needs_ref):
    """open_model for a folder with two experts."""
    high, low = two_experts(args.init)
    config, args.model, _ = find_model(high, args.model)
    if args.model not in BOUNDARIES:
        raise ValueError(f"--init {args.init}: {high.name} is {args.model}; expected the two experts of "
                         f"{' or '.join(BOUNDARIES)}")
    find_model(low, args.model)                            # the same, or refused
    if args.loss == "preference":
        raise ValueError(f"--init {args.init} holds two experts: --loss preference trains one model; give {high} or "
                         f"{low}")
    if needs_ref and args.ref in ("live", "offload"):
        raise ValueError(f"--init {args.init} holds two experts: with --ref {args.ref} there would be four models; "
                         "give --lora_rank, or --ref cached")
    boundary = BOUNDARIES[args.model]
    if not args.min_timestep < boundary < args.max_timestep:
        one = high if boundary <= args.min_timestep else low
        raise ValueError(f"--min_timestep {args.min_timestep:g} --max_timestep {args.max_timestep:g}: all on one side "
                         f"of the boundary of {args.model}, {boundary:g}, and --init {args.init} holds both experts; "
                         f"give {one}, or a range on both sides")
    args.switch_every = args.switch_every or 10
    turns = -(-args.steps // args.switch_every)
    if not 0 < turns_of_high(args, turns) < turns:
        raise ValueError(f"--steps {args.steps} --switch_every {args.switch_every}: one expert has no step, since "
                         f"{share_of_high(args):.1%} of the sigmas are the high-noise expert's; take more steps, or "
                         "shorter turns")
    return config


def plan_adapters(args, config):
    """
    Return {side: LoraPlan, or None where all weights are trained}. For two experts --init_lora is a folder with a file
    for each, as a run exports it.
    """
    if not args.switch_every:
        return {"": plan_lora(args, config)}
    if args.init_lora and not Path(args.init_lora).is_dir():
        raise ValueError(f"--init_lora {args.init_lora}: expected a folder with {' and '.join(EXPERT_LORAS)}, "
                         f"as --init {args.init} holds two experts")
    plans = {}
    for side, name in zip(SIDES, EXPERT_LORAS):
        file = str(Path(args.init_lora) / name) if args.init_lora else ""
        flags = argparse.Namespace(**vars(args) | {"init_lora": file})
        plans[side] = plan_lora(flags, config)
        args.lora_alpha = flags.lora_alpha                 # of the first file, unless it is given: both have it
    return plans


# ----------------------------------------------------------------------------------------------------------------------
# whose turn it is

def share_of_high(args):
    """Return the probability that a sigma, as data.draw draws it with these flags, is the high-noise expert's."""
    def share_below(timestep):                             # of the draws without limits
        u = unshift_sigma(timestep / 1000, args.flow_shift)
        return bell_share(u) if args.timestep_sampling == "logit_normal" else u
    lowest, boundary, highest = map(share_below, (args.min_timestep, BOUNDARIES[args.model], args.max_timestep))
    return (highest - boundary) / (highest - lowest)


def turns_of_high(args, turns):
    """
    Return how many of the first `turns` turns are the high-noise expert's: their share, rounded. An offset drawn from
    the seed decides where it rounds up. Turns drawn one by one would miss this share by several turns in a run of 30.
    """
    offset = torch.rand((), generator=randomness(args.seed, 0, "experts"), dtype=torch.float64).item()
    return math.floor(turns * share_of_high(args) + offset)


def side_of(args, step):
    """Return the expert that is trained in a step, one of SIDES; "" for a single model."""
    if not args.switch_every:
        return ""
    turn = step // args.switch_every
    return SIDES[0] if turns_of_high(args, turn + 1) > turns_of_high(args, turn) else SIDES[1]


def own_step_of(args, step):
    """Return how many steps before this one trained the same expert; for a single model, all of them."""
    if not args.switch_every:
        return step
    turn, step_of_turn = divmod(step, args.switch_every)
    high = turns_of_high(args, turn)
    own_turns = high if side_of(args, step) == SIDES[0] else turn - high
    return own_turns * args.switch_every + step_of_turn


def timesteps_of(args, step):
    """Return the lowest and the highest timestep of a step's positions: with two experts, those of one's side."""
    side = side_of(args, step)
    lowest = BOUNDARIES[args.model] if side == SIDES[0] else args.min_timestep
    highest = BOUNDARIES[args.model] if side == SIDES[1] else args.max_timestep
    return lowest, highest


# ----------------------------------------------------------------------------------------------------------------------
# the models of a run

class Expert(NamedTuple):
    """The state of one model in a run. ref and ema are called like the policy."""
    policy: torch.nn.Module
    ref: object               # None: the loss has none, or its errors are cached
    ema: object               # None: --ema_decay 0
    optimizer: torch.optim.Optimizer

    @property
    def averaged(self):
        """What is sampled, probed and exported."""
        return self.policy if self.ema is None else self.ema


class Experts:
    """
    The models of a run: one Expert under the name "", or two, of which one at a time is on the device. With
    --offload_params both stay in CPU memory, and nothing moves.

    config, trained_config: of the reference and of the policy; they differ for a preference model. plans: of
    plan_adapters. with_ref: is a reference needed, now or later?
    """

    def __init__(self, args, config, trained_config, plans, with_ref, ranks, memory):
        self.args, self.config, self.device = args, trained_config, ranks.device
        self.experts, self.on_device = {}, ""

        def build(path, config, trained, offload, plan):
            return build_model(path, config, ranks, memory, trained, offload, args.seed, plan)

        def build_frozen(path, config, offload):
            return build(path, config, False, offload, None).eval().requires_grad_(False)

        paths = dict(zip(SIDES, two_experts(args.init))) if args.switch_every else {"": args.init}
        for side, path in paths.items():
            if self.experts:
                self.move(self.on_device, "cpu")           # before the next one is there
            plan = plans[side]
            policy = build(path, trained_config, True, args.offload_params, plan)
            ref = Reference(policy) if plan else None
            if with_ref and not plan:
                ref = build_frozen(path, config, args.ref == "offload")
            ema = None
            if args.ema_decay:
                ema = Average(policy) if plan else build_frozen(path, trained_config, args.offload_params)
            optimizer = make_optimizer(policy, args.weight_decay, args.loss_scale)
            self.experts[side] = Expert(policy, ref, ema, optimizer)
            self.on_device = side

    def move(self, side, device):
        """Move all of an expert to a device."""
        if self.args.offload_params:
            return
        expert = self.experts[side]
        for model in (expert.policy, expert.ref, expert.ema):
            if isinstance(model, (torch.nn.Module, Average)):
                model.to(device)
        for state in expert.optimizer.state.values():
            for name, tensor in state.items():
                state[name] = tensor.to(device)

    def bring(self, side):
        """Return the Expert of this name, on the device; the other is moved away first."""
        if side != self.on_device:
            self.move(self.on_device, "cpu")
            self.move(side, self.device)
            self.on_device = side
        return self.experts[side]

    def at(self, step):
        """Return the Expert of a step."""
        return self.bring(side_of(self.args, step))

    def as_model(self, part):
        """Return the "policy", "ref" or "averaged" model, or both experts' called like one model."""
        return OneModel(self, part) if self.args.switch_every else getattr(self.experts[""], part)

    def states(self):
        """Return what checkpoints hold: {folder inside a step folder, "" for itself: (policy, optimizer, ema)}."""
        return {f"{side}_model" if side else "": (expert.policy, expert.optimizer, expert.ema)
                for side, expert in self.experts.items()}

    def score_references(self, cached, errors_at, start):
        """
        Fill a ref_cache.RefErrors from step `start` on, one expert after the other. errors_at(ref, positions) returns
        (2, B).
        """
        for side in self.experts:
            steps = [step for step in range(start, self.args.steps) if side_of(self.args, step) == side]
            cached.fill(partial(errors_at, self.bring(side).ref), steps)

    def drop_references(self):
        """Free the references."""
        self.experts = {side: expert._replace(ref=None) for side, expert in self.experts.items()}
        gc.collect()                                       # a sharded model refers to itself and would stay for a while

    def describe(self):
        """Return a list with one line about the two experts; [] for a single model."""
        if not self.args.switch_every:
            return []
        share = f"high_noise has {share_of_high(self.args):.1%} of the steps, {self.args.switch_every} in a row"
        gib = max(nbytes(expert) for expert in self.experts.values()) / 2 ** 30
        place = "both in CPU memory" if self.args.offload_params else f"{gib:.3f} GiB a rank wait in CPU memory"
        return [f"two experts, boundary {BOUNDARIES[self.args.model]:g}: {share} (--switch_every); {place}"]


def nbytes(expert):
    """Return the bytes that a rank holds of an expert: its shares of weights, reference, average and AdamW's state."""
    tensors = [tensor for state in expert.optimizer.state.values() for tensor in state.values()]
    for model in (expert.policy, expert.ref, expert.ema):
        if isinstance(model, (torch.nn.Module, Average)):
            tensors += model.parameters()
    return sum(tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes for tensor in tensors)


class OneModel:
    """Two experts called like one model: each answers on its side of the boundary. part: see Experts.as_model."""

    def __init__(self, experts, part):
        self.experts, self.part, self.config = experts, part, experts.config
        self.boundary = BOUNDARIES[experts.args.model]

    def __call__(self, x, timestep, context, **conditions):
        is_high = timestep >= self.boundary                # (B,)
        assert is_high.all() == is_high.any(), "timesteps on both sides of the boundary in one batch"
        expert = self.experts.bring(SIDES[0] if is_high.all() else SIDES[1])
        return getattr(expert, self.part)(x, timestep, context, **conditions)

