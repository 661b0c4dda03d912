"""
What a training step takes, counted without a GPU: train.py's own step (with fsdp_utils.py and model.py) runs on fake tensors, as one rank of a fake process
group, while a TorchDispatchMode keeps the books of every live storage. bench.py and benchmarks/ladder.py ask; nothing in training needs this file.

    simulate(flags, config, shape, ranks)       all blocks: 20 to 40 s for 14B
    extrapolate(flags, config, shape, ranks)    the same figures from 4 and 6 blocks: 4 to 12 s
"""
import contextlib
import functools
import gc
import math
import os
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fsdp_utils
import memory
import train
from model import WanModel

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default                 # saves q, k, v, out and lse, as flash attention does on GPUs
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
FLOPS_OF = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
COPIES = {torch.ops.aten.copy_.default: 1, torch.ops.aten._to_copy.default: 0}                 # op: which of its arguments is read


def kept_for_backward(model, forward):
    """Bytes that are kept for backward of forward(), the parameters of the model left out. On real or on fake tensors."""
    live = Live()
    for parameter in model.parameters():
        live.track(parameter, "weights")
    weights = live.now
    with live:
        output = forward()
        kept = live.now - weights
    del output
    return kept


class Live(TorchDispatchMode):
    """
    Counts the bytes of all live storages, real or fake, by tag, and the FLOPs of all that runs. A storage gets the tag that is set when it is first seen;
    "host" ones are where offloading puts them: they do not count towards the peak, and bytes copied to or from them are counted as moved. What was alive
    at the peak is kept for each segment of the step (self.segment is set from outside).
    """
    def __init__(self):
        super().__init__()
        self.tag, self.storages, self.bytes = "working", {}, Counter()                         # {key: [tag, bytes, weak reference]}, {tag: bytes}
        self.segment, self.peaks, self.now = "step", {}, 0                                     # {segment: (bytes, {tag: bytes})}
        self.counts = Counter()                                                                # see found()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.prim.device.default:
            return torch.device("cpu")                                                         # a third of all calls
        if any(t is DTensor for t in types):
            return NotImplemented                                                              # it comes back as an op on local tensors
        if op is torch.ops.aten._local_scalar_dense.default and type(args[0]) is not torch.Tensor:
            return 1.0 if args[0].is_floating_point() else 0                                   # .item() of a fake number
        scratch = args[1].new_empty(args[1].shape, dtype=torch.float32) if op is ATTENTION_BACKWARD else None                # flash adds up dq in float32
        out = op(*args, **(kwargs or {}))
        for tensor in (scratch, *out) if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.track(tensor, self.tag)
        if op in (ATTENTION, ATTENTION_BACKWARD):
            shapes = [x.shape for x in args[:3 + (op is ATTENTION_BACKWARD)]]                  # q, k, v (B, N, L, K), after the gradient in backward
            kind = "square" if shapes[-3][2] == shapes[-2][2] else "flops"                     # of self-attention
            self.counts[kind] += (sdpa_flop_count if op is ATTENTION else sdpa_backward_flop_count)(*shapes)
        elif op._overloadpacket in FLOPS_OF:
            self.counts["flops"] += FLOPS_OF[op._overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif op.namespace == "c10d":                                                           # the whole side: what all ranks gave, or what each one gets
            self.counts["exchanged" if "alltoall" in op.name() else "gathered"] += max([x.nbytes for x in args if isinstance(x, torch.Tensor)], default=0)
        elif op in COPIES and (self.tag_of(out) == "host") != (self.tag_of(args[COPIES[op]]) == "host"):
            self.counts["moved"] += args[COPIES[op]].nbytes
        return out

    def __enter__(self):
        resize, live = torch.UntypedStorage.resize_, self

        def resize_(storage, size):                                                            # how FSDP frees and refills gathered weights
            resize(storage, size)
            if storage._cdata in live.storages:
                live.change(storage._cdata, "gathered", size)
            return storage
        self.patched = patch.object(torch.UntypedStorage, "resize_", resize_)
        self.patched.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patched.stop()
        return super().__exit__(*error)

    def track(self, tensor, tag):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = [tag, 0, weakref.ref(storage, lambda _: self.change(key, self.storages[key][0], 0) or self.storages.pop(key))]
            self.change(key, tag, storage.nbytes())

    def change(self, key, tag, size):
        entry = self.storages[key]
        size = -(-size // 512) * 512                                                           # CUDA's allocator rounds up
        for name, growth in ((entry[0], -entry[1]), (tag, size)):
            self.bytes[name] += growth
            self.now += growth * (name != "host")
        entry[:2] = tag, size
        self.counts["host"] = max(self.counts["host"], self.bytes["host"])
        if self.now > self.peaks.get(self.segment, (-1,))[0]:
            self.peaks[self.segment] = self.now, self.bytes.copy()

    def tag_of(self, tensor):
        return self.storages.get(tensor.untyped_storage()._cdata, ["working"])[0]

    def retag(self, tensor, tag):
        key = tensor.untyped_storage()._cdata
        self.counts["moved"] += self.storages[key][1] * (tag == "host" != self.storages[key][0])
        self.change(key, tag, self.storages[key][1])


# ------------------------------------------------------------------------------------------------------------------
# the step

def token_count(config, shape):
    return math.prod(n // p for n, p in zip(shape[1:], config.patch_size))


def step_args(flags, ranks):
    """train.py's arguments; without --batch_size, one pair (or video) at a time."""
    args = train.parse_args(list(flags))
    if not any(word.split("=")[0] == "--batch_size" for word in flags):
        args.batch_size = max(1, ranks // (args.cp_size * (2 if args.backward == "pair" else 1))) * args.grad_accum
    return args


@functools.cache
def simulate(flags, config, shape, world, fake=True):
    """
    One step of train.py with these flags (a tuple of words) on rank 0 of so many GPUs, on latents (C, F, H, W) of this shape. Returns what found() makes of it.

    The tensors lie on the CPU, where nothing has to be copied to be offloaded: what would be on the host carries the tag "host". fake=False runs on real ones.
    """
    args, live, pack = step_args(flags, world), Live(), memory.Offload.pack
    args.out = os.devnull                                                                      # which holds no earlier run

    def pack_on_host(offload, x):                                                              # it makes nothing but the buffer
        live.tag = "host"
        kept, live.tag = pack(offload, x), "working"
        return kept

    with contextlib.ExitStack() as stack:
        for change in (patch.dict(os.environ, WORLD_SIZE=str(world), LOCAL_RANK="0"), patch("torch.cuda.is_available", lambda: False),
                       patch.object(nn.Module, "to", lambda self, *_: self),                   # fake parameters cannot be swapped, and are where they belong
                       patch.object(WanModel, "init_weights", lambda self: None), patch.object(nn.Linear, "reset_parameters", lambda self: None),
                       patch.object(fsdp_utils, "matrix_dtype", lambda _: torch.bfloat16), patch.object(memory.Offload, "pack", pack_on_host)):
            stack.enter_context(change)
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        ranks = train.start_ranks(args.backward == "pair", args.cp_size, args.replicate)
        train.check_args(args, ranks)
        if config.num_heads % args.cp_size:
            raise ValueError(f"--cp_size {args.cp_size} does not divide the {config.num_heads} heads of --model {args.model}")
        args.init = "scratch"                                                                  # no file is read
        stack.callback(gc.collect)                                                             # a sharded model refers to itself
        stack.callback(gc.enable)
        gc.disable()                                                                           # or what it counts would hang on when cycles are looked for
        stack.enter_context(FakeTensorMode() if fake else contextlib.nullcontext())
        one_step(args, config, shape, ranks, live)
    return found(live.peaks, live.counts)


def one_step(args, config, shape, ranks, live):
    """train.main without its files: everything is built in the same order, then comes the one step that is counted."""
    pairs = args.batch_size // (ranks.data_ranks * args.grad_accum)
    needs_ref = args.loss not in ("sft", "preference") and args.ref != "cached"
    trained = replace(config, scores=args.loss == "preference")
    flags = memory.check_memory_flags(args)
    policy = train.build_model(args.init, trained, ranks, flags, trained=True, offload=args.offload_params)
    ref = train.build_model(args.init, config, ranks, flags, offload=args.ref == "offload").eval().requires_grad_(False) if needs_ref else torch.ones(2, pairs)
    ema = train.build_model(args.init, trained, ranks, flags, offload=args.offload_params).eval().requires_grad_(False) if args.ema_decay else None
    # AdamW sees the local shards as plain tensors: the same memory, and DTensor would think about each list of 1,000 for seconds
    params = list(policy.parameters())
    learning = [param for param in params if param.requires_grad]
    shards = [param.to_local().detach().requires_grad_() for param in learning]
    optimizer = torch.optim.AdamW(shards, lr=args.learning_rate, fused=True)
    for shard in shards:
        shard.grad = torch.zeros_like(shard)
    optimizer.step()                                                                           # makes its state
    optimizer.zero_grad()

    place = lambda tag: "host" if args.offload_params else tag
    state = [tensor for moments in optimizer.state.values() for tensor in moments.values()]
    for tag, tensors in ((place("weights"), params), (place("optimizer"), state), (place("ema"), ema.parameters() if ema else []),
                         ("host" if args.ref == "offload" else "reference", ref.parameters() if needs_ref else [])):
        for tensor in tensors:
            live.track(tensor.to_local() if isinstance(tensor, DTensor) else tensor, tag)

    # the step in segments, in each of which the peak moves with the number of blocks: forward, and backward of the last two blocks | of the others
    two_done = set(policy.blocks[-2:-1].parameters())

    def gradient(param):
        live.retag(param.grad.to_local(), place("gradients"))
        if param in two_done:
            live.segment = live.segment[0], "end"

    def end_of_forward(*_):                                                                    # what is still alive is kept for backward
        for key, (tag, size, _) in list(live.storages.items()):
            if tag == "working" and torch.is_grad_enabled():
                live.change(key, "activations", size)
        live.segment = live.segment[0] + 1, "begin"
    for param in learning:
        param.register_post_accumulate_grad_hook(gradient)
    policy.register_forward_hook(end_of_forward)
    live.segment, live.counts["learning"] = (0, "begin"), sum(shard.numel() for shard in shards)

    sizes = {"win": shape, "lose": shape, "noise": shape, "context": (config.text_len, config.text_dim)} | conditions(config, shape)
    batch = {name: torch.randn(pairs, *size) for name, size in sizes.items()} | {"sigma": torch.rand(pairs)}
    for tensor in batch.values():
        live.track(tensor, "inputs")
    with live:
        for _ in range(args.grad_accum):
            train.backward_batch(args, policy, ref, batch, 1.0, ranks)
        for shard, param in zip(shards, learning):
            shard.grad, param.grad = param.grad.to_local(), None
        fsdp_utils.clip_gradients(shards, args.max_grad_norm)
        optimizer.step()
        if ema is not None:
            fsdp_utils.ema_update(ema, policy, args.ema_decay)
        optimizer.zero_grad()


def conditions(config, shape):
    """{name: shape} of what a sample holds beside latents and text. TI2V is run as text-to-video, its other half, which is as large."""
    return {name: size for name, size in config.condition_shapes(shape).items() if name != "first_latent"}


# ------------------------------------------------------------------------------------------------------------------
# what it took

def found(peaks, counts):
    """
    Namespace of what a step takes per rank: peak, parts {name: bytes at the peak}, host (bytes, its own peak), flops, learning (parameters), bytes moved
    (between host and GPU), gathered (from and for all ranks, by FSDP), exchanged (by context parallelism); peaks and counts as they came.
    """
    peak, parts = max(peaks.values(), key=lambda top: top[0])
    numbers = {name: counts[name] for name in ("host", "learning", "moved", "gathered", "exchanged")}
    return SimpleNamespace(peak=peak, parts={name: size for name, size in parts.items() if size and name != "host"}, flops=counts["flops"] + counts["square"],
                           peaks=peaks, counts=counts, **numbers)


def line(x, low, found_low, high, found_high):
    """What a step takes at x, from what it takes at low and at high: everything grows on straight lines, the peak does within each segment of the step."""
    between = lambda a, b: round(a + (b - a) * (x - low) / (high - low))
    lines = lambda a, b: Counter({name: between(a[name], b[name]) for name in {**a, **b}})
    peaks = {name: (between(peak, found_high.peaks[name][0]), lines(parts, found_high.peaks[name][1])) for name, (peak, parts) in found_low.peaks.items()}
    return found(peaks, lines(found_low.counts, found_high.counts))


@functools.cache
def extrapolate(flags, config, shape, world):
    """
    What simulate finds, in a fraction of its time: from models of 4 and of 6 such blocks and, where there would be many chunks of tokens, from two numbers
    of them. No constant is fitted beforehand, so none is out of date when the model or the step changes.
    """
    args, tokens = step_args(flags, world), token_count(config, shape)

    def all_blocks(shape):
        return line(config.num_layers, 4, simulate(flags, replace(config, num_layers=4), shape, world), 6, simulate(flags, replace(config, num_layers=6), shape, world))
    chunk_size = memory.check_memory_flags(args).chunk_size
    few, many = 2 * chunk_size * args.cp_size, 4 * chunk_size * args.cp_size
    if not few < many < tokens:
        return all_blocks(shape)
    found_few, found_many = (all_blocks((shape[0], tokens, *config.patch_size[1:])) for tokens in (few, many))
    plan = line(tokens, few, found_few, many, found_many)
    plan.flops += round(found_many.counts["square"] * (tokens / many) ** 2) - plan.counts["square"]
    return plan
