"""
What a block keeps for backward.
"""
import resource
import sys
import weakref
from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


CHUNK_TOKENS = 8192                                        # the size of chunks that --chunk_tokens -1 means, in the modes that have chunks


@dataclass(frozen=True)
class MemoryFlags:
    """What train.py's flags of the same names say; see save_memory."""
    checkpointing: str = "off"
    chunk_tokens: int = 0
    offload_activations: bool = False
    compile: bool = False

    @property
    def chunk_size(self):
        """Tokens of a chunk; 0: blocks run on all tokens at once."""
        if self.checkpointing not in ("chunked", "full"):
            return 0
        return CHUNK_TOKENS if self.chunk_tokens < 0 else self.chunk_tokens


def check_memory_flags(args):
    """Return the MemoryFlags of a trainer's arguments. Raise ValueError for a flag that would do nothing in the given --checkpointing mode."""
    flags = MemoryFlags(args.checkpointing, args.chunk_tokens, args.offload_activations, args.compile)
    if flags.chunk_tokens < -1:
        raise ValueError(f"--chunk_tokens {flags.chunk_tokens}: expected a number of tokens, 0 (no chunks) or -1 (the default size of the mode)")
    if flags.chunk_tokens > 0 and flags.checkpointing not in ("chunked", "full"):
        raise ValueError(f"--chunk_tokens {flags.chunk_tokens} does nothing with --checkpointing {flags.checkpointing}, which has no chunks; "
                         f"add --checkpointing chunked or full")
    if flags.checkpointing == "chunked" and flags.chunk_tokens == 0:
        raise ValueError("--checkpointing chunked --chunk_tokens 0: chunks of no size; give a number of tokens, or --checkpointing off")
    return flags


def save_memory(model, flags, trained):
    """
    Apply MemoryFlags to a model, before shard_model. Names of parameters stay. Chunks and compilation apply to every model alike, so that policy and
    reference take the same numerical path; checkpointing and offload only to a trained one.
    """
    mode = flags.checkpointing if trained and flags.checkpointing != "chunked" else "off"
    checkpoint_blocks(model, mode, flags.offload_activations and trained)
    chunk_blocks(model, flags.chunk_size)
    if flags.compile:
        compile_blocks(model)


def memory_gib(device):
    """The most that this rank has held: of the GPU's memory since the last reset, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2 ** 30


def memory_plan(args, config, parameters, tokens, videos, needs_ref, ranks, learning=1.0):
    """What each rank will hold, as a line of text. videos: how many have their graph alive at once, 0 where blocks are frozen; learning: the share of parameters that are not frozen."""
    shard = 4 * parameters / ranks.mesh.shape[-1] / 2 ** 30                    # float32
    cpu = " (CPU)" if args.offload_params else ""
    where = {"live": "", "offload": " (CPU)", "cached": " while it is scored, then 0"}[args.ref]
    parts = [f"weights {shard:.3f}{cpu}", f"gradients {learning * shard:.3f}{cpu}", f"AdamW {2 * learning * shard:.3f}{cpu}"]
    parts += [f"reference {shard:.3f}{where}"] if needs_ref else []
    parts += [f"ema {shard:.3f}{cpu}"] if args.ema_decay else []
    size = 2 if ranks.device.type == "cuda" else 4                             # bytes of a number in the matrices
    kept = kept_bytes(config, args.checkpointing, args.offload_activations, size)
    kept *= videos * config.num_layers * -(-tokens // ranks.cp_size) * config.dim / 2 ** 30
    parts += [f"kept activations {kept:.3f}{' (CPU)' * args.offload_activations}"]
    return f"memory per rank in GiB: {', '.join(parts)}; on top what backward makes of one block at a time"


class Kept:
    """A storage that waits for its backward in a buffer on the CPU, and until the copy is done on the device too."""
    def __init__(self, flat, buffer, free, before):
        self.source, self.uses = weakref.ref(flat.untyped_storage()), 0
        self.buffer, self.free, self.before = buffer, free, before
        self.host, self.device = buffer[:flat.nbytes].view(flat.dtype), flat.device
        self.x, self.copied = flat, None                   # copied: a CUDA event; None on the CPU

    def __del__(self):
        self.free.append(self.buffer)                      # the next copy into it runs on the same stream, after those that still read it


class Offload:
    """
    Moves what blocks keep to CPU memory in forward and back in backward. On GPUs copies run on a stream of their own, beside the computation, from and to
    pinned buffers that are used again. A tensor leaves the device when the second one after it has been kept: by then its copy is done, and waiting for
    it costs nothing. When the backward of a block asks for its own, what the block before it kept is fetched.
    """
    def __init__(self):
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.free = []                                     # buffers
        self.leaving = deque()                             # kept storages that are still on the device
        self.block, self.before = [], []                   # what this block and the one before it kept; weak, or each would hold all before it

    def around(self, block, function):
        """The function of a block, x first, with what it saves moved, but for its weights and for what is small (modulation, tables and text, which blocks share)."""
        def forward(x, *rest):
            self.block, self.before = [], self.block
            weights = {p.untyped_storage()._cdata for p in block.parameters()}         # as FSDP has gathered them
            small = x.numel()                              # the hooks live as long as the graph: x itself in one of them would stay on the device
            stays = lambda storage: storage.nbytes() < small or storage._cdata in weights
            with saved_tensors_hooks(lambda t: t if stays(t.untyped_storage()) else self.pack(t), lambda t: t if torch.is_tensor(t) else self.unpack(*t)):
                return function(x, *rest)
        return forward

    def copy(self, target, source):
        """target <- source beside the computation, after what has been asked of the device so far. Returns the event of its end."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event):
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def keep(self, flat):
        fits = [i for i, buffer in enumerate(self.free) if len(buffer) >= flat.nbytes]
        buffer = (self.free.pop(min(fits, key=lambda i: len(self.free[i]))) if fits
                  else torch.empty(flat.nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.stream is not None))
        kept = Kept(flat, buffer, self.free, self.before)
        kept.copied = self.copy(kept.host, flat)
        self.block.append(weakref.ref(kept))
        self.leaving.append(weakref.ref(kept))
        if len(self.leaving) > 2 and (left := self.leaving.popleft()()) is not None:
            self.wait(left.copied)                         # what the device is asked from here on may use the memory again
            left.x = None
        return kept

    def pack(self, t):
        """-> what unpack takes. Several views of one storage, and several users of a view, make one copy."""
        storage = t.untyped_storage()
        mine = [kept for ref in self.block if (kept := ref()) is not None and kept.source() is storage]
        kept = mine[0] if mine else self.keep(t.detach().as_strided((storage.nbytes() // t.itemsize,), (1,), 0))
        kept.uses += 1
        return kept, t.dtype, t.shape, t.stride(), t.storage_offset()

    def fetch(self, kept):
        if kept.x is None:
            kept.x = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=kept.device)
            kept.copied = self.copy(kept.x, kept.host)

    def unpack(self, kept, dtype, *layout):
        self.fetch(kept)
        self.wait(kept.copied)
        x, kept.uses = kept.x, kept.uses - 1
        if kept.uses == 0:
            kept.x = None
        for earlier in kept.before:
            if (earlier := earlier()) is not None:
                self.fetch(earlier)
        return x.view(dtype).as_strided(*layout)


def checkpoint_blocks(model, mode, offload=False):
    """
    What the blocks keep for backward. Bytes per token, layer and channel of Wan2.1 1.3B / 14B in bf16, and what is recomputed for it:

        off         42 / 36    norms, modulation, rotation and GELU, which cost next to nothing
        selective   30 / 30    and the first layer of the FFN: 3 % of the FLOPs of forward and backward at 32,760 tokens, 7 % at 7,800 (1.3B)
        full       2.2 / 2.1   everything: the residual stream is kept in float32 before every second block

    offload: all of that waits in CPU memory; full keeps the stream before every block then (4 bytes), so that one block at a time is recomputed.
    For attention that is kept, and all else recomputed (12 bytes), see chunk_blocks.
    Names of parameters stay; to be called before shard_model.
    """
    store = Offload() if offload else None
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)             # no dropout in Wan, hence no random state
    for block in model.blocks:
        block.keep_hidden = mode != "selective"
        if offload:                                        # around the checkpoint, so that it is the checkpoint's inputs which move
            block.forward = store.around(block, partial(again, block.forward) if mode == "full" else block.forward)
    if mode == "full" and not offload:
        run_blocks = model.run_blocks

        def in_twos(begin, end, x, *rest):
            for first in range(begin, end, 2):
                x = again(partial(run_blocks, first, min(first + 2, end)), x, *rest)
            return x
        model.run_blocks = in_twos


def kept_bytes(config, mode, offload, size):
    """Bytes that the blocks keep for backward per token, layer and channel; size: bytes of a number in the matrices."""
    if mode == "full":
        return 4 if offload else 2                         # the stream, float32
    if mode == "chunked":
        return 4 + 4 * size                                # q, k, v and the output of attention
    hidden = config.ffn_dim / config.dim if mode == "off" else 0
    return 8 + (11 + 2 * (config.image_dim > 0) + hidden) * size                           # the stream twice


class Chunks(torch.autograd.Function):
    """f on `size` tokens at a time, see chunk_blocks. Only its inputs are kept; backward does each chunk again, so that what f makes lives as long as its chunk."""
    @staticmethod
    def forward(ctx, f, size, cut, count, *tensors):                       # `count` inputs of f, of which the first `cut` have tokens (or a 1) in dim 1; its parameters
        tokens = tensors[0].shape[1]
        ctx.f, ctx.count, ctx.size, ctx.starts = f, count, size, range(0, tokens, size)
        ctx.part = lambda i, x, start: x[:, start:start + size] if i < cut and x.shape[1] == tokens else x
        ctx.parameters = tensors[count:]                                   # the leaves themselves, as f uses them
        ctx.save_for_backward(*tensors[:count])
        outs = [f(*(ctx.part(i, x, start) for i, x in enumerate(tensors[:count]))) for start in ctx.starts]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*outs)) if isinstance(outs[0], tuple) else torch.cat(outs, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        tensors, needed, totals = (*ctx.saved_tensors, *ctx.parameters), ctx.needs_input_grad[4:], {}
        for start in ctx.starts:
            inputs = [ctx.part(i, x, start).detach().requires_grad_(needed[i]) for i, x in enumerate(tensors[:ctx.count])]
            with torch.enable_grad():
                outs = ctx.f(*inputs)
            outs = [(out, grad[:, start:start + ctx.size]) for out, grad in zip(outs if isinstance(outs, tuple) else (outs,), grads) if out.requires_grad]
            leaves = {i: x for i, x in enumerate((*inputs, *ctx.parameters)) if needed[i]}
            found = torch.autograd.grad([out for out, _ in outs], list(leaves.values()), [grad for _, grad in outs], allow_unused=True)
            for i, grad in zip(leaves, found):
                if grad is not None:                                       # it is, of parameters that f does not use
                    whole = tensors[i]
                    if i not in totals:                                    # what all chunks add to is float32: in bf16 the sum would be too coarse for the last ones
                        shared = ctx.part(i, whole, start) is whole
                        totals[i] = torch.zeros_like(whole, dtype=torch.promote_types(whole.dtype, torch.float32) if shared else whole.dtype)
                    ctx.part(i, totals[i], start).add_(grad)
        return None, None, None, None, *(totals.get(i) for i in range(len(tensors)))


def chunk_blocks(model, size):
    """
    Run what is token by token in a block, all but self-attention, on `size` tokens at a time, in forward and again in backward. Kept are 12 bytes per token,
    layer and channel (in bf16: the residual stream, q, k, v and the output of attention), and what backward makes of one block no longer grows with the
    video. It costs a second forward of the matrices: 9 % of the FLOPs of forward and backward at 32,760 tokens (1.3B). 0: not at all.
    """
    def in_chunks(block, f, cut):
        def chunked(*inputs):
            parameters = [p for p in block.parameters() if p.requires_grad]              # in each forward: FSDP swaps them
            return Chunks.apply(f, size, cut, len(inputs), *inputs, *parameters)
        return chunked
    for block in model.blocks if size else ():
        block.before_attention = in_chunks(block, block.before_attention, 4)
        block.after_attention = in_chunks(block, block.after_attention, 3)


def compile_blocks(model):
    """
    torch.compile of what is cheap in each block (norms, modulation, rotation, GELU, gates), one kernel each; matrices and attention are kernels already.
    These functions never see that a gradient is wanted (model.Recompute), so policy and reference run the same ones and stay equal bit for bit.
    """
    for module in model.blocks.modules():
        if not list(module.children()) and not isinstance(module, torch.nn.Linear):
            module.forward = torch.compile(module.forward)
