"""
Counts the memory and FLOPs of a training step without a GPU. train.py's own step (with fsdp_utils.py, memory.py and
model.py) runs on fake tensors, as one rank of a fake process group, while a TorchDispatchMode counts every live
storage. bench.py and ladder.py ask for it; training does not need this file.

    simulate(flags, config, shape, ranks)       all blocks: 20 to 40 s for 14B
    extrapolate(flags, config, shape, ranks)    the same figures from 4 and 6 blocks: 4 to 13 s
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

# attention on CPUs saves q, k, v, its output and the log-sum-exp, as flash attention does on GPUs
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
FLOPS_OF = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
READ_ARGUMENT = {torch.ops.aten.copy_.default: 1, torch.ops.aten._to_copy.default: 0}  # of each op that copies

# Tags of what lies in CPU memory. What torch pins itself (FSDP's offloaded shards and gradients) takes the next power
# of two; kept activations lie in buffers of their exact size, see memory.pinned_buffer.
HOST, PINNED = "host", "pinned"
ON_HOST = (HOST, PINNED)


def kept_for_backward(model, forward):
    """Return the bytes that forward() keeps for backward, without the model's parameters, on real or fake tensors."""
    live = Live()
    for parameter in model.parameters():
        live.track(parameter, "weights")
    weights = live.now
    with live:
        output = forward()
        kept = live.now - weights
    del output
    return kept


def rounded(size, tag):
    """Return the bytes that an allocation of `size` bytes takes."""
    if tag == PINNED:
        return 2 ** math.ceil(math.log2(size)) if size else 0        # torch's allocator of pinned memory
    return -(-size // 512) * 512                                     # CUDA's


class Live(TorchDispatchMode):
    """
    Counts the bytes of all live storages, real or fake, by tag, and the FLOPs of all that runs.

    A storage gets the tag that is set when it is first seen. Those in CPU memory (ON_HOST) do not count towards the
    peak; bytes copied to or from them count as moved. The live bytes at the peak are recorded for each segment of the
    step; self.segment is set from outside.
    """
    def __init__(self):
        super().__init__()
        self.tag, self.segment = "working", "step"
        self.storages = {}                                           # {key: [tag, bytes, weak reference]}
        self.bytes = Counter()                                       # {tag: bytes}
        self.now, self.peaks = 0, {}                                 # peaks: {segment: (bytes, {tag: bytes})}
        self.counts = Counter()                                      # see step_plan()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.prim.device.default:
            return torch.device("cpu")                               # a third of all calls
        if any(t is DTensor for t in types):
            return NotImplemented                                    # it comes back as an op on local tensors
        if op is torch.ops.aten._local_scalar_dense.default and type(args[0]) is not torch.Tensor:
            return 1.0 if args[0].is_floating_point() else 0         # .item() of a fake number
        scratch = None
        if op is ATTENTION_BACKWARD:
            scratch = args[1].new_empty(args[1].shape, dtype=torch.float32)    # flash attention adds up dq in float32
        out = op(*args, **(kwargs or {}))
        made = (scratch, *out) if isinstance(out, (tuple, list)) else (out,)
        for tensor in made:
            if isinstance(tensor, torch.Tensor):
                self.track(tensor, self.tag)
        self.count(op, args, kwargs or {}, out)
        return out

    def count(self, op, args, kwargs, out):
        """Add what one op computes or transfers to self.counts."""
        if op in (ATTENTION, ATTENTION_BACKWARD):
            is_forward = op is ATTENTION
            shapes = [x.shape for x in (args[:3] if is_forward else args[:4])]           # grad in backward, q, k, v
            queries, keys = shapes[-3][2], shapes[-2][2]                                 # of (B, N, L, K)
            flops = sdpa_flop_count(*shapes) if is_forward else sdpa_backward_flop_count(*shapes)
            self.counts["square" if queries == keys else "flops"] += flops               # square: self-attention
        elif op._overloadpacket in FLOPS_OF:
            self.counts["flops"] += FLOPS_OF[op._overloadpacket](*args, **kwargs, out_val=out)
        elif op.namespace == "c10d":                       # the larger side: what all ranks gave, or what each one gets
            name = "exchanged" if "alltoall" in op.name() else "gathered"
            self.counts[name] += max([x.nbytes for x in args if isinstance(x, torch.Tensor)], default=0)
        elif op in READ_ARGUMENT:
            source = args[READ_ARGUMENT[op]]
            if (self.tag_of(out) in ON_HOST) != (self.tag_of(source) in ON_HOST):
                self.counts["moved"] += source.nbytes

    def __enter__(self):
        resize, live = torch.UntypedStorage.resize_, self

        def resize_(storage, size):                                  # how FSDP frees and refills gathered weights
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
        """Count the storage of a tensor under a tag until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            return

        def freed(_):
            self.change(key, self.storages[key][0], 0)
            del self.storages[key]
        self.storages[key] = [tag, 0, weakref.ref(storage, freed)]
        self.change(key, tag, storage.nbytes())

    def change(self, key, tag, size):
        """Give a storage another tag and size, and update the sums and peaks."""
        entry = self.storages[key]
        size = rounded(size, tag)
        for name, growth in ((entry[0], -entry[1]), (tag, size)):
            self.bytes[name] += growth
            if name not in ON_HOST:
                self.now += growth
        entry[:2] = tag, size
        self.counts["host"] = max(self.counts["host"], sum(self.bytes[name] for name in ON_HOST))
        if self.now > self.peaks.get(self.segment, (-1,))[0]:
            self.peaks[self.segment] = self.now, self.bytes.copy()

    def tag_of(self, tensor):
        return self.storages.get(tensor.untyped_storage()._cdata, ["working"])[0]

    def retag(self, tensor, tag):
        """Give the storage of a tensor another tag; going to the CPU counts as moved."""
        storage = tensor.untyped_storage()
        if tag in ON_HOST and self.tag_of(tensor) not in ON_HOST:
            self.counts["moved"] += storage.nbytes()
        self.change(storage._cdata, tag, storage.nbytes())


# ----------------------------------------------------------------------------------------------------------------------
# the step

def token_count(config, shape):
    return config.count_tokens(shape)


def step_args(flags, ranks):
    """Return train.py's arguments; without --batch_size, for one pair (or video) at a time."""
    args = train.parse_args(list(flags))
    if not any(word.split("=")[0] == "--batch_size" for word in flags):
        ranks_per_pair = args.cp_size * (2 if args.backward == "pair" else 1)
        args.batch_size = max(1, ranks // ranks_per_pair) * args.grad_accum
    return args


@functools.cache
def simulate(flags, config, shape, world, fake=True):
    """
    Run one step of train.py with these flags (a tuple of words) as rank 0 of `world` GPUs, on latents of this shape
    (C, F, H, W). Returns step_plan's namespace. fake=False runs on real tensors.

    The tensors lie on the CPU, where nothing has to be copied to be offloaded: what would be in CPU memory is tagged.
    """
    args, live, pack = step_args(flags, world), Live(), memory.Offload.pack
    args.out = os.devnull                                            # which holds no earlier run

    def pack_on_host(offload, x):                                    # it makes nothing but the buffer
        live.tag = HOST
        kept = pack(offload, x)
        live.tag = "working"
        return kept

    patches = [
        patch.dict(os.environ, WORLD_SIZE=str(world), LOCAL_RANK="0"),
        patch("torch.cuda.is_available", lambda: False),
        patch.object(nn.Module, "to", lambda self, *_: self),        # fake parameters cannot be swapped; they stay
        patch.object(WanModel, "init_weights", lambda self: None),
        patch.object(nn.Linear, "reset_parameters", lambda self: None),
        patch.object(fsdp_utils, "matrix_dtype", lambda _: torch.bfloat16),
        patch.object(memory.Offload, "pack", pack_on_host)]
    with contextlib.ExitStack() as stack:
        for change in patches:
            stack.enter_context(change)
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        ranks = train.start_ranks(args.backward == "pair", args.cp_size, args.replicate)
        train.check_args(args, ranks)
        if config.num_heads % args.cp_size:
            raise ValueError(f"--cp_size {args.cp_size} does not divide the {config.num_heads} heads of --model "
                             f"{args.model}")
        args.init = "scratch"                                        # no file is read
        stack.callback(gc.collect)                                   # a sharded model refers to itself
        stack.callback(gc.enable)
        gc.disable()                                                 # else the counts depend on when cycles are freed
        stack.enter_context(FakeTensorMode() if fake else contextlib.nullcontext())
        one_step(args, config, shape, ranks, live)
    return step_plan(live.peaks, live.counts)


def one_step(args, config, shape, ranks, live):
    """Repeat train.main without files: build everything in the same order, then run the step that is counted."""
    pairs = args.batch_size // (ranks.data_ranks * args.grad_accum)
    objective, flags = train.OBJECTIVES[args.loss], memory.check_memory_flags(args)
    trained_config = replace(config, scores=objective.trains_scores)
    on_host = args.offload_params

    adapters = train.lora.plan_lora(args, config)
    policy = fsdp_utils.build_model(args.init, trained_config, ranks, flags, True, on_host, lora=adapters)
    ref, ref_parameters = torch.ones(2, pairs), []
    if objective.needs_ref and args.ref == "adapter":
        ref = train.lora.Reference(policy)
    elif objective.needs_ref and args.ref != "cached":
        ref = fsdp_utils.build_model(args.init, config, ranks, flags, offload=args.ref == "offload")
        ref.eval().requires_grad_(False)
        ref_parameters = list(ref.parameters())
    ema, ema_parameters = None, []
    if args.ema_decay and adapters:
        ema = train.lora.Average(policy)
        ema_parameters = list(ema.parameters())
    elif args.ema_decay:
        ema = fsdp_utils.build_model(args.init, trained_config, ranks, flags, offload=on_host)
        ema.eval().requires_grad_(False)
        ema_parameters = list(ema.parameters())

    # AdamW sees the local shards as plain tensors: the same memory, and DTensor would take seconds for each list
    parameters = list(policy.parameters())
    trainable = [param for param in parameters if param.requires_grad]
    shards = [param.to_local().detach().requires_grad_() for param in trainable]
    optimizer = torch.optim.AdamW(shards, lr=args.learning_rate, fused=True)
    for shard in shards:
        shard.grad = torch.zeros_like(shard)
    optimizer.step()                                                 # makes its state
    optimizer.zero_grad()
    optimizer_state = [tensor for moments in optimizer.state.values() for tensor in moments.values()]

    resident = [(PINNED if on_host else "weights", parameters), (HOST if on_host else "optimizer", optimizer_state),
                ((HOST if adapters else PINNED) if on_host else "ema", ema_parameters),
                (PINNED if args.ref == "offload" else "reference", ref_parameters)]
    for tag, tensors in resident:
        for tensor in tensors:
            live.track(tensor.to_local() if isinstance(tensor, DTensor) else tensor, tag)
    if args.switch_every:                                            # the other expert takes as much, and waits
        live.bytes[HOST] += sum(live.bytes[tag] for tag in {tag for tag, _ in resident})

    # The step is cut into segments, in each of which the peak moves with the number of blocks: forward with backward
    # of the last two blocks, then backward of the others.
    two_done = set(policy.blocks[-2:-1].parameters())

    def gradient_is_there(param):
        live.retag(param.grad.to_local(), PINNED if on_host else "gradients")
        if param in two_done:
            live.segment = live.segment[0], "end"

    def end_of_forward(*_):                                          # what is still alive is kept for backward
        if torch.is_grad_enabled():
            for key, (tag, size, _) in list(live.storages.items()):
                if tag == "working":
                    live.change(key, "activations", size)
        live.segment = live.segment[0] + 1, "begin"
    for param in trainable:
        param.register_post_accumulate_grad_hook(gradient_is_there)
    policy.register_forward_hook(end_of_forward)
    live.segment, live.counts["learning"] = (0, "begin"), sum(shard.numel() for shard in shards)

    sizes = {"win": shape, "lose": shape, "noise": shape, "context": (config.text_len, config.text_dim)}
    sizes |= conditions(config, shape)
    batch = {name: torch.randn(pairs, *size) for name, size in sizes.items()}
    batch["sigma"] = torch.rand(pairs)
    for tensor in batch.values():
        live.track(tensor, "inputs")
    with live:
        for _ in range(args.grad_accum):
            train.backward_batch(args, policy, ref, batch, 1.0, ranks)
        for shard, param in zip(shards, trainable):
            shard.grad, param.grad = param.grad.to_local(), None
        fsdp_utils.clip_gradients(shards, args.max_grad_norm)
        optimizer.step()
        if ema is not None:
            fsdp_utils.ema_update(ema, policy, args.ema_decay)
        optimizer.zero_grad()


def conditions(config, shape):
    """
    Return {name: shape} of what a sample holds in addition to latents and text. TI2V is run as text-to-video, which
    takes as much as image-to-video.
    """
    return {name: size for name, size in config.condition_shapes(shape).items() if name != "first_latent"}


# ----------------------------------------------------------------------------------------------------------------------
# what it took

def step_plan(peaks, counts):
    """
    Return a namespace of what a step takes per rank: peak (bytes), parts {name: bytes at the peak}, host (bytes, its
    own peak), flops, learning (parameters), and the bytes moved (between CPU and GPU), gathered (from and for all
    ranks, by FSDP) and exchanged (by context parallelism). peaks, counts: those of Live.
    """
    peak, bytes_by_tag = max(peaks.values(), key=lambda top: top[0])
    parts = {name: size for name, size in bytes_by_tag.items() if size and name not in ON_HOST}
    numbers = {name: counts[name] for name in ("host", "learning", "moved", "gathered", "exchanged")}
    flops = counts["flops"] + counts["square"]
    return SimpleNamespace(peak=peak, parts=parts, flops=flops, peaks=peaks, counts=counts, **numbers)


def on_a_line(x, low, low_plan, high, high_plan):
    """
    Return the plan at x from those at low and at high: everything grows on straight lines, the peak does within each
    segment of the step.
    """
    def between(a, b):
        return round(a + (b - a) * (x - low) / (high - low))

    def all_between(a, b):
        return Counter({name: between(a[name], b[name]) for name in {**a, **b}})
    peaks = {}
    for segment, (low_peak, low_parts) in low_plan.peaks.items():
        high_peak, high_parts = high_plan.peaks[segment]
        peaks[segment] = between(low_peak, high_peak), all_between(low_parts, high_parts)
    return step_plan(peaks, all_between(low_plan.counts, high_plan.counts))


@functools.cache
def extrapolate(flags, config, shape, world):
    """
    Return what simulate returns, in a fraction of its time: from models of 4 and of 6 such blocks and, where there
    would be many chunks of tokens, from two numbers of them. No constant is fitted beforehand, so none goes out of date
    when the model or the step changes.
    """
    args, tokens = step_args(flags, world), token_count(config, shape)

    def all_blocks(shape):
        four = simulate(flags, replace(config, num_layers=4), shape, world)
        six = simulate(flags, replace(config, num_layers=6), shape, world)
        return on_a_line(config.num_layers, 4, four, 6, six)
    chunk_size = memory.check_memory_flags(args).chunk_size
    few, many = 2 * chunk_size * args.cp_size, 4 * chunk_size * args.cp_size
    if not few < many < tokens:
        return all_blocks(shape)
    few_plan = all_blocks((shape[0], few, *config.patch_size[1:]))
    many_plan = all_blocks((shape[0], many, *config.patch_size[1:]))
    plan = on_a_line(tokens, few, few_plan, many, many_plan)
    square = round(many_plan.counts["square"] * (tokens / many) ** 2)          # attention grows with its square
    plan.flops += square - plan.counts["square"]
    return plan
