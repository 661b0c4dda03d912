"""
Low-rank adapters (LoRA, Hu et al. 2021): layers, the switch to the initial adapters, flags and plans of a trainer.
Their files are lora_files.py's.

    y = x W^T + b + scale * (x A^T) B^T         W (out, in) and b frozen, A (rank, in) and B (out, rank) trained

    add_adapters(model, find_layers(model, "q,k,v,o,ffn.0,ffn.2"), rank=8)
    reference = Reference(model)                # the same model with its initial adapters

Fresh adapters have a random A and B = 0: the model starts as its base. scale = alpha / rank.
"""
import math
import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model import WanModel

TARGETS = "q,k,v,o,ffn.0,ffn.2"       # what diffusers, DiffSynth, FastVideo and musubi train

# ----------------------------------------------------------------------------------------------------------------------
# layers

def in_backward():
    """Return whether this forward is part of a backward: a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class LoraLinear(nn.Linear):
    """
    A frozen linear layer, under its old names, and a trained adapter. The result has the dtype of x. keep_initial: it
    also holds a frozen copy of initial adapters, to be filled in.
    """
    def __init__(self, base, rank, scale, keep_initial=False):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        self.requires_grad_(False)
        self.scale = scale
        self.use_initial = False
        options = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, **options)             # torch draws what PEFT draws
        self.lora_B = nn.Linear(rank, base.out_features, **options)
        nn.init.zeros_(self.lora_B.weight)
        self.initial_A = self.initial_B = None
        if keep_initial:
            self.initial_A = nn.Linear(base.in_features, rank, **options).requires_grad_(False)
            self.initial_B = nn.Linear(rank, base.out_features, **options).requires_grad_(False)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        y = F.linear(x, self.weight, self.bias)
        A, B = self.lora_A, self.lora_B
        if self.use_initial and not in_backward():
            A, B = self.initial_A, self.initial_B
            if A is None:
                return y
        reduced = F.linear(x, A.weight.to(x.dtype))                            # (..., rank)
        return y + F.linear(self.scale * reduced, B.weight.to(x.dtype))


def lora_layers(model):
    """Return {name: LoraLinear} of a model's layers with adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def find_layers(model, targets):
    """
    Return the names of the layers in blocks that targets selects, text like "q,k,v,o,ffn.0,ffn.2": "q" means
    self_attn.q and cross_attn.q, "self_attn.q" the former. ValueError for a target without a layer.
    """
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    names = [name for name in names if name.startswith("blocks.")]
    layers = set()
    for target in targets.split(","):
        meant = [name for name in names if name.endswith("." + target.strip())]
        if not meant:
            known = ", ".join(name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0."))
            raise ValueError(f"--lora_targets {targets}: no layer of this model is called {target!r}; expected the "
                             f"last parts of {known}")
        layers.update(meant)
    return [name for name in names if name in layers]


def add_adapters(model, layers, rank, alpha=0.0, keep_initial=False):
    """
    Give the layers of these names adapters of this rank and alpha (0: the rank), in place, and freeze everything else.
    """
    model.requires_grad_(False)
    model.lora_rank = rank                                 # selective checkpointing knows the products by it
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        layer = LoraLinear(model.get_submodule(name), rank, (alpha or rank) / rank, keep_initial)
        setattr(model.get_submodule(parent), leaf, layer)


# ----------------------------------------------------------------------------------------------------------------------
# one model for three: trained, initial and averaged adapters

@contextmanager
def initial_adapters(model):
    """
    Run the model with its initial adapters (without any, if these were fresh), and without gradients. What backward
    recomputes meanwhile or later uses the trained adapters, as its forward did.
    """
    layers = list(lora_layers(model).values())
    before = [layer.use_initial for layer in layers]
    try:
        for layer in layers:
            layer.use_initial = True
        with torch.no_grad():
            yield
    finally:
        for layer, use_initial in zip(layers, before):
            layer.use_initial = use_initial


class Reference:
    """A model with its initial adapters, called like the model."""
    def __init__(self, model):
        self.model = model
        self.config = model.config

    def __call__(self, *inputs, **conditions):
        with initial_adapters(self.model):
            return self.model(*inputs, **conditions)


class Average:
    """
    A copy of a model's adapters, such as their average, called like the model: each call exchanges them for the trained
    ones, and back. parameters() and named_parameters() are those of the copy.
    """
    def __init__(self, model):
        self.model = model
        self.config = model.config
        self.copies = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def named_parameters(self):
        return self.copies.items()

    def parameters(self):
        return self.copies.values()

    def to(self, device):
        """Move the copies to another device; the model is moved separately."""
        self.copies = {name: copy.to(device) for name, copy in self.copies.items()}

    @torch.no_grad()
    def exchange(self):
        trained = dict(self.model.named_parameters())
        for name, copy in self.copies.items():
            kept = copy.clone()
            copy.copy_(trained[name])
            trained[name].copy_(kept)

    @torch.no_grad()
    def __call__(self, *inputs, **conditions):
        self.exchange()
        try:
            return self.model(*inputs, **conditions)
        finally:
            self.exchange()


# ----------------------------------------------------------------------------------------------------------------------
# training

@dataclass(frozen=True)
class LoraPlan:
    """The adapters that a trainer gives to a model."""
    layers: list                      # names of layers
    rank: int
    alpha: float
    initial: dict                     # {layer: lora_files.Adapter} to start from; {}: fresh ones


def add_lora_flags(parser):
    """Add a trainer's flags of adapters."""
    add = parser.add_argument
    add("--lora_rank", type=int, default=0, help="rank of the adapters that are trained; 0: train all weights")
    add("--lora_alpha", type=float, default=0.0, help="adapters are scaled by alpha / rank; 0: the rank, or the alpha "
                                                      "of --init_lora")
    add("--lora_targets", default=TARGETS, help="layers of blocks with adapters; the image branch has k_img and v_img")
    add("--init_lora", default="", help="LoRA file to start from, which is then also the reference")


def check_lora_flags(args):
    """
    Refuse flags of adapters that cannot work together, before anything is opened. --ref auto becomes "adapter" with
    adapters, else "live".
    """
    if args.lora_rank < 0 or args.lora_alpha < 0:
        raise ValueError(f"--lora_rank {args.lora_rank} --lora_alpha {args.lora_alpha}: expected 0 or more")
    if not args.lora_rank:
        for flag, value, default in (("init_lora", args.init_lora, ""), ("lora_alpha", args.lora_alpha, 0.0),
                                     ("lora_targets", args.lora_targets, TARGETS)):
            if value != default:
                raise ValueError(f"--{flag} {value} does nothing without adapters; give --lora_rank, or leave it out")
    elif args.ref in ("live", "offload"):
        raise ValueError(f"--ref {args.ref} is a second model; with --lora_rank the reference is the same model with "
                         "its initial adapters: take --ref auto, or cached")
    elif args.init == "scratch":
        raise ValueError("--init scratch with --lora_rank: adapters need trained weights; name a checkpoint")
    elif getattr(args, "loss", "") == "preference":
        raise ValueError(f"--lora_rank {args.lora_rank}: --loss preference trains a head on frozen blocks, without "
                         "adapters; leave it out")
    if args.ref == "auto":
        args.ref = "adapter" if args.lora_rank else "live"


def plan_lora(args, config):
    """
    Return the LoraPlan of the flags for a model of config, or None where all weights are trained.
    args.lora_alpha becomes the alpha. ValueError for --init_lora with other layers or ranks, or for another model.
    """
    if not args.lora_rank:
        return None
    with torch.device("meta"):
        layers = find_layers(WanModel(config), args.lora_targets)
    if not args.init_lora:
        args.lora_alpha = args.lora_alpha or float(args.lora_rank)
        return LoraPlan(layers, args.lora_rank, args.lora_alpha, {})
    from lora_files import check_adapters, open_lora
    initial = open_lora(args.init_lora)
    check_adapters(initial, config, f"--init_lora {args.init_lora}")
    if set(initial) != set(layers):
        name = min(set(initial) ^ set(layers))
        verb = "has" if name in initial else "lacks"
        targets = sorted({re.sub(r"^blocks\.\d+\.", "", layer) for layer in initial})
        raise ValueError(f"--init_lora {args.init_lora} {verb} an adapter of {name}, unlike --lora_targets "
                         f"{args.lora_targets}; its layers are --lora_targets {','.join(targets)}")
    ranks = sorted({adapter.rank for adapter in initial.values()})
    if ranks != [args.lora_rank]:
        raise ValueError(f"--init_lora {args.init_lora} has adapters of rank {', '.join(map(str, ranks))}, expected "
                         f"--lora_rank {args.lora_rank}")
    alphas = {adapter.alpha for adapter in initial.values()}
    args.lora_alpha = args.lora_alpha or (alphas.pop() if len(alphas) == 1 else float(args.lora_rank))
    return LoraPlan(layers, args.lora_rank, args.lora_alpha, initial)


def adapter_weights(model, plan, seed):
    """
    Return {parameter name: tensor} of the adapters of a plan that a model has: those to start from, or fresh ones, a
    function of (seed, name) so that they are the same on every rank.
    """
    tensors = {}
    for name, layer in lora_layers(model).items():
        if plan.initial:
            adapter = plan.initial[name]
            A = adapter.A[:].float()
            B = adapter.B[:].float() * (adapter.scale / layer.scale)
            tensors |= {f"{name}.initial_A.weight": A, f"{name}.initial_B.weight": B}
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            A = (2 * torch.rand(plan.rank, layer.in_features, generator=generator) - 1) / math.sqrt(layer.in_features)
            B = torch.zeros(layer.out_features, plan.rank)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    return tensors
