"""
Decides what a block keeps for backward, from outside the model and with torch's own tools: checkpointing, saved-tensor
hooks and compilation. save_memory is the one call that applies them; its docstring has the bytes, the FLOPs and the
time of each mode.
"""
import resource
import sys
import weakref
from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES_WITH_CHUNKS = ("chunked", "full")
CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class MemoryFlags:
    """The trainers' flags of the same names; see save_memory."""
    checkpointing: str = "off"
    chunk_tokens: int = -1
    offload_activations: bool = False
    compile: bool = False

    @property
    def chunk_size(self):
        """Return the number of tokens of a chunk; 0: blocks run on all tokens at once."""
        if self.checkpointing not in MODES_WITH_CHUNKS:
            return 0
        return CHUNK_TOKENS if self.chunk_tokens == -1 else self.chunk_tokens


def add_memory_flags(parser):
    """Add the flags of MemoryFlags to a trainer's parser, and --offload_params."""
    add = parser.add_argument
    add("--checkpointing", default="off", choices=["off", "selective", "chunked", "full"],
        help="what blocks keep for backward, from most to least memory; the rest is recomputed")
    add("--chunk_tokens", type=int, default=-1,
        help="tokens that the token-wise parts of a block run on at a time, in the modes chunked and full; 0: all of "
             "them; -1: 8192")
    add("--compile", action="store_true", help="compile the blocks with torch.compile")
    add("--offload_activations", action="store_true", help="what blocks keep for backward waits in CPU memory")
    add("--offload_params", action="store_true",
        help="weights, gradients, AdamW's state and the average stay in CPU memory, and AdamW runs there")


def check_memory_flags(args):
    """Return the MemoryFlags in a trainer's arguments. Raises ValueError for flags that would do nothing together."""
    mode, size = args.checkpointing, args.chunk_tokens
    if size < -1:
        raise ValueError(f"--chunk_tokens {size}: expected a number of tokens, 0 (no chunks) or -1 ({CHUNK_TOKENS} in "
                         "the modes with chunks)")
    if size != -1 and mode not in MODES_WITH_CHUNKS:
        raise ValueError(f"--chunk_tokens {size} does nothing with --checkpointing {mode}, which has no chunks; leave "
                         f"it out, or take --checkpointing {' or '.join(MODES_WITH_CHUNKS)}")
    if size == 0 and mode == "chunked":
        raise ValueError("--chunk_tokens 0 leaves nothing of --checkpointing chunked; give a number of tokens, or "
                         "take --checkpointing off")
    if args.offload_activations and mode == "selective":
        raise ValueError("--offload_activations does nothing with --checkpointing selective, which keeps its tensors "
                         "where saved-tensor hooks cannot move them; take --checkpointing chunked or full")
    return MemoryFlags(mode, size, args.offload_activations, args.compile)


def save_memory(model, flags, trained):
    """
    Apply MemoryFlags to a model in place, before shard_model. The names of parameters stay.

    What a trained model's blocks keep for backward, in bytes per token, layer and channel, and the FLOPs of forward and
    backward over those of off (Wan2.1 1.3B / 14B, bf16, 32,760 tokens); process time over that of off:

        off        82 / 69                  everything that autograd asks for
        selective  22 / 22    1.03 / 1.03   attention and all matrix products but the first of the FFN
        chunked     6 / 6     1.10 / 1.18   the residual stream and attention; what treats token by token runs on
                                            --chunk_tokens tokens at a time, in forward and again in backward, so that
                                            the temporaries of one block do not grow with the video
        full        2 / 2     1.30 / 1.31   the stream before every second block; two blocks are recomputed at a time
                    2 / 2     1.35 / 1.40   the same with chunks, for videos that are longer than one chunk

    With adapters in all layers, off keeps 66 / 53 bytes, since frozen norms and modulation need less; the other modes
    keep the same, and selective keeps 0.3 / 0.1 more for the products of rank 32.
    offload_activations: what is kept waits in CPU memory. chunked then keeps q, k and v too (12 bytes); full keeps the
    stream before every block (4 bytes) and recomputes one block at a time (1.31 / 1.34 with chunks).
    compile: torch.compile of the blocks or, with chunks, of their token-wise halves.
    Chunks and compilation apply to every model alike, so that policy and reference take the same numerical path (but
    for compiled blocks with an image branch in bf16: inductor rounds differently without a gradient, by 8e-5); the
    rest only to a trained one. Under context parallelism, recomputation repeats the exchanges around attention.
    """
    chunk_size = flags.chunk_size
    mode = flags.checkpointing if trained else "off"
    offload = Offload() if trained and flags.offload_activations else None
    if flags.compile:                                      # policy, reference, sampler and probe come in several shapes
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in model.blocks:
        if chunk_size or not flags.compile:                # else it is in a compiled graph
            block.self_attn.attend = attend_alike(block.self_attn.attend)
        if not flags.compile:
            block.cross_attn.attend = attend_alike(block.cross_attn.attend)
        if chunk_size:
            whole_up_to = chunk_size if flags.checkpointing == "full" else 0
            run_in_chunks(block, chunk_size, whole_up_to, flags.compile)
        if mode == "selective":
            rank = getattr(model, "lora_rank", 0)
            block.forward = recomputed(block.forward, keep_products(model.config.ffn_dim, rank))
        if mode == "chunked" and not offload:
            keep_attention_only(block)
        if flags.compile and not chunk_size:
            block.forward = compile_static(block.forward)
        if mode == "full" and offload:
            block.forward = recomputed(block.forward)
        if offload:                                        # outermost, so that it sees what a checkpoint keeps
            block.forward = offload.around(block, block.forward)
    if mode == "full" and not offload:
        model.run_blocks = two_by_two(model.run_blocks)


# ----------------------------------------------------------------------------------------------------------------------
# how much it is

def reset_memory_gib(device):
    """Restart the measurement of memory_gib, which only a GPU can do."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def memory_gib(device):
    """
    Return the most that this rank has held: the peak of GPU memory since the last reset or, on a CPU, the memory of
    this process, in GiB.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024         # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def kept_bytes(config, flags, size, adapted=(), rank=0):
    """
    Return the bytes that the blocks keep for backward per token, layer and channel. size: bytes of a number in the
    matrices; the residual stream is float32. adapted: the layers of a block that have adapters of this rank, by their
    names in it, and are frozen like all else; (): everything is trained. The constants are counted, see
    tests/test_memory.py.
    """
    image = 2 if config.image_dim else 0                   # a second attention: its output, and the sum
    if flags.checkpointing == "full":
        return 4 if flags.offload_activations else 2
    if flags.checkpointing == "chunked":
        return 4 + size * (4 if flags.offload_activations else 1)
    of_text = ("cross_attn.k", "cross_attn.v", "cross_attn.k_img", "cross_attn.v_img")     # not of each token
    reduced = size * rank / config.dim * len(set(adapted) - set(of_text))
    if flags.checkpointing == "selective":
        return 4 + size * (9 + image // 2) + reduced
    hidden = config.ffn_dim / config.dim
    if not adapted:
        return 36 + size * (11 + image + 2 * hidden)
    numbers = 6 + image + hidden
    numbers += any(name in adapted for name in ("self_attn.q", "self_attn.k", "self_attn.v"))    # one input for three
    numbers += "cross_attn.q" in adapted                   # the inputs of both layers named o are attention's outputs
    numbers += "ffn.0" in adapted
    numbers += hidden if "ffn.2" in adapted else 0
    return 24 + size * numbers + reduced


def memory_plan(args, model, tokens, videos, needs_ref, ranks):
    """
    Return the memory that each rank will hold, part by part, as a line of text. tokens: of a video; videos: how many
    have their graph alive at once, 0 where blocks are frozen.
    """
    unit = ranks.mesh.shape[-1] * 2 ** 30                  # GiB of a rank's shard
    weights = sum(p.numel() * p.dtype.itemsize for p in model.parameters()) / unit
    trained = sum(p.numel() * p.dtype.itemsize for p in model.parameters() if p.requires_grad) / unit
    params_place = " (CPU)" if args.offload_params else ""
    ref_place = {"offload": " (CPU)", "cached": " while it is scored, then 0"}.get(args.ref, "")
    parts = [f"weights {weights:.3f}{params_place}", f"gradients {trained:.3f}{params_place}",
             f"AdamW {2 * trained:.3f}{params_place}"]
    if needs_ref and not args.lora_rank:                   # whose reference is the policy's own weights
        parts.append(f"reference {weights:.3f}{ref_place}")
    if args.ema_decay:
        averaged = trained if args.lora_rank else weights
        parts.append(f"ema {averaged:.3f}{params_place}")
    config = model.config
    matrix_size = 2 if ranks.device.type == "cuda" else 4
    share = -(-tokens // ranks.cp_size)
    adapted = []
    if args.lora_rank:
        adapted = [name for name, layer in model.blocks[0].named_modules() if hasattr(layer, "lora_A")]
    kept = kept_bytes(config, check_memory_flags(args), matrix_size, adapted, args.lora_rank)
    kept *= videos * config.num_layers * share * config.dim / 2 ** 30
    activations_place = " (CPU)" if args.offload_activations else ""
    parts.append(f"kept activations {kept:.3f}{activations_place}")
    return f"memory per rank in GiB: {', '.join(parts)}; plus the temporaries of one block in backward"


# ----------------------------------------------------------------------------------------------------------------------
# attention

def attend_alike(attend):
    """
    Return attend (q, k, v -> (B,L,D)) by the same kernel with and without a graph, so that a reference, or a policy
    under no_grad, computes what a policy in training does. On Hopper, cuDNN uses another plan where no gradient is
    needed. So a gradient is always asked for here, and the graph is dropped at once. (detach: otherwise a saved output
    would keep itself alive.)
    """
    def as_in_training(q, k, v):
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return attend(q, k, v)
        with torch.enable_grad(), saved_tensors_hooks(torch.Tensor.detach, torch.Tensor.detach):   # not an offload's
            return attend(q.detach().requires_grad_(), k, v).detach()
    return as_in_training


# ----------------------------------------------------------------------------------------------------------------------
# checkpointing

ATTENTION_OPS = [getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default for kernel in
                 ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")]
PRODUCT_OPS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]


def recomputed(f, policy=None):
    """
    Return f under a checkpoint: backward recomputes what the policy does not keep or, without a policy, everything.
    """
    options = {} if policy is None else {"context_fn": partial(create_selective_checkpoint_contexts, policy)}
    return partial(checkpoint, f, use_reentrant=False, preserve_rng_state=False, **options)        # Wan has no dropout


def keep_products(ffn_dim, rank):
    """
    Return a policy that keeps attention and most matrix products. It drops those that are ffn_dim wide, which take the
    most memory (12 of 34 bytes in 1.3B) and little time to recompute, and those of adapters, whose inner dimension is
    rank (0: none), which are as large as the layer's own product and take next to no time.
    """
    def policy(context, op, *args, **kwargs):
        is_kept = op in ATTENTION_OPS
        if op in PRODUCT_OPS:
            inner, outer = args[-1].shape[-2:]
            is_kept = outer != ffn_dim and inner != rank
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
    return policy


def keep_attention(context, op, *args, **kwargs):
    """A policy that keeps the output of attention and nothing else."""
    return CheckpointPolicy.MUST_SAVE if op in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def keep_attention_only(block):
    """Recompute q, k and v of self-attention from the stream; its output and its other saved tensors are kept."""
    def attend(*inputs):
        return block.self_attn.attend(*block.before_attention(*inputs))
    attend_recomputed = recomputed(attend, keep_attention)

    def forward(x, context, time_mod, time_index, cos, sin):                   # Block.forward with that checkpoint
        modulation = block.modulation + time_mod
        attended = attend_recomputed(x, time_index, cos, sin, modulation)
        return block.after_attention(x, attended, time_index, modulation, *block.cross_attn.keys_values(context))
    block.forward = forward


def two_by_two(run_blocks):
    """Return a run_blocks that keeps the stream before every second block only."""
    def run(begin, end, x, *inputs):
        for first in range(begin, end, 2):
            last = min(first + 2, end)
            x = recomputed(partial(run_blocks, first, last))(x, *inputs)
        return x
    return run


# ----------------------------------------------------------------------------------------------------------------------
# chunks

class SaveInputs(torch.autograd.Function):
    """
    Save the inputs of Chunks before the chunks run, and return them and a tensor whose grad_fn holds them. A checkpoint
    stops recomputing when it has all that was saved: if the inputs were saved after the chunks, it would run these for
    nothing.
    """
    @staticmethod
    def forward(ctx, count, *tensors):                     # `count` inputs, then parameters: any of them makes a node
        inputs = tensors[:count]
        constants = [x for x, needs_grad in zip(inputs, ctx.needs_input_grad[1:]) if not needs_grad]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.num_parameters = len(tensors) - count
        return *inputs, inputs[0].new_zeros(())

    @staticmethod
    def backward(ctx, *grads):
        return None, *grads[:-1], *[None] * ctx.num_parameters


class Chunks(torch.autograd.Function):
    """
    f on `size` tokens at a time. Backward runs f again and takes its gradients chunk by chunk, so that the results of f
    live only as long as their chunk. See in_chunks for the arguments.
    """
    @staticmethod
    def forward(ctx, f, size, token_inputs, saved, count, *tensors):
        inputs, ctx.parameters = tensors[:count], tensors[count:]              # the leaves themselves, as f uses them
        ctx.f, ctx.size, ctx.saved, ctx.tokens = f, size, saved, inputs[0].shape[1]
        ctx.is_cut = [i < token_inputs and x.shape[1] == ctx.tokens for i, x in enumerate(inputs)]
        chunks = []
        for start in range(0, ctx.tokens, size):
            chunks.append(f(*cut(inputs, ctx.is_cut, start, size)))
        if isinstance(chunks[0], tuple):
            return tuple(torch.cat(parts, dim=1) for parts in zip(*chunks))
        return torch.cat(chunks, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        inputs = ctx.saved.saved_tensors                                       # read once only, or a checkpoint raises
        wholes, needs_grad = [*inputs, *ctx.parameters], ctx.needs_input_grad[5:]
        wanted = [i for i, needed in enumerate(needs_grad) if needed]
        totals = [None] * len(wholes)
        for start in range(0, ctx.tokens, ctx.size):
            chunk = cut(inputs, ctx.is_cut, start, ctx.size)
            chunk = [x.detach().requires_grad_(needed) for x, needed in zip(chunk, needs_grad)]
            with torch.enable_grad():
                outs = ctx.f(*chunk)
            outs = outs if isinstance(outs, tuple) else (outs,)
            learning = [i for i, out in enumerate(outs) if out.requires_grad]  # not all, where layers are frozen
            leaves = [*chunk, *ctx.parameters]
            leaf_grads = torch.autograd.grad(
                [outs[i] for i in learning], [leaves[i] for i in wanted],
                [grads[i][:, start:start + ctx.size] for i in learning], allow_unused=True)
            for i, grad in zip(wanted, leaf_grads):
                if grad is not None:                                           # as for parameters that f does not use
                    totals[i] = add_chunk(totals[i], grad, wholes[i], i < len(inputs) and ctx.is_cut[i], start)
            del outs, chunk, leaves, leaf_grads, grad                          # before the next chunk makes its own
        return None, None, None, None, None, *totals


def cut(inputs, is_cut, start, size):
    """
    Return the inputs of the chunk that begins at token `start`, contiguous: for others, torch takes another kernel
    where the weights are frozen, and a reference would differ from its policy in the last bit.
    """
    return [x[:, start:start + size].contiguous() if cuts else x for x, cuts in zip(inputs, is_cut)]


def add_chunk(total, grad, whole, is_cut, start):
    """Add the gradient of a chunk to that of the whole tensor (None at first). Returns the total."""
    if is_cut:
        total = torch.empty_like(whole) if total is None else total
        total[:, start:start + grad.shape[1]] = grad
        return total
    if total is None:                                      # float32: a sum in bf16 would lose the last chunks
        total = torch.zeros_like(whole, dtype=torch.promote_types(whole.dtype, torch.float32))
    return total.add_(grad)


def in_chunks(f, block, size, token_inputs, whole_up_to):
    """
    Return a function that runs f, a token-wise half of a block, on `size` tokens at a time, or on all of them at once
    where there are at most `whole_up_to`. The first `token_inputs` arguments of f are (B, L or 1, ...), the others are
    the same for all tokens.
    """
    def chunked(*inputs):
        if inputs[0].shape[1] <= whole_up_to:
            return f(*inputs)
        parameters = [p for p in block.parameters() if p.requires_grad]        # in each forward: FSDP exchanges them
        *inputs, saved = SaveInputs.apply(len(inputs), *inputs, *parameters)
        return Chunks.apply(f, size, token_inputs, saved.grad_fn, len(inputs), *inputs, *parameters)
    return chunked


def run_in_chunks(block, size, whole_up_to, compiled):
    """Replace the token-wise halves of a block by the same in chunks."""
    before, after = block.before_attention, block.after_attention
    if compiled:
        before, after = compile_static(before), compile_static(after)
    block.before_attention = in_chunks(before, block, size, 4, whole_up_to)    # x, time_index, cos, sin
    block.after_attention = in_chunks(after, block, size, 3, whole_up_to)      # x, attended, time_index


# ----------------------------------------------------------------------------------------------------------------------
# compilation

def compile_static(f):
    """Return torch.compile(f) with a graph for each shape, so that policy and reference run the same one of several."""
    return torch.compile(f, dynamic=False)


# ----------------------------------------------------------------------------------------------------------------------
# offload

def pin(buffer):
    """
    Page-lock a CPU tensor in place until it is freed, for copies that run in parallel with computation. pin_memory=True
    would take the next power of two, 1.33 to 1.83 times what Wan's activations are.
    """
    address = buffer.data_ptr()
    error = int(torch.cuda.cudart().cudaHostRegister(address, buffer.nbytes, 1))         # 1: for all CUDA contexts
    if error:
        raise RuntimeError(f"cudaHostRegister of {buffer.nbytes:,} bytes failed with CUDA error {error}: is this much "
                           "CPU memory free for what is offloaded, and does ulimit -l allow it?")
    unpin = weakref.finalize(buffer.untyped_storage(), torch.cuda.cudart().cudaHostUnregister, address)
    unpin.atexit = False                                   # CUDA may be gone by then


class Kept:
    """A storage that waits for its backward in a buffer on the CPU, and on the device too until the copy is done."""
    def __init__(self, flat, buffer, free, before):
        self.source, self.uses = weakref.ref(flat.untyped_storage()), 0
        self.buffer, self.free, self.before = buffer, free, before
        self.host, self.device = buffer[:flat.nbytes].view(flat.dtype), flat.device
        self.x, self.copied = flat, None                   # copied: a CUDA event; None on the CPU

    def __del__(self):
        self.free.append(self.buffer)                      # the next copy into it is later on the same stream


class Offload:
    """
    Moves what blocks keep to CPU memory in forward, and back in backward. On GPUs the copies run on a stream of their
    own, in parallel with the computation, from and to pinned buffers that are reused. A tensor leaves the device when
    the second one after it has been kept: by then its copy is done, and waiting for it costs nothing. When the backward
    of a block asks for its tensors, those of the block before it are fetched.
    """
    def __init__(self):
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.free = []                                     # buffers
        self.leaving = deque()                             # weak references to storages that are still on the device
        self.block, self.before = [], []                   # weak references to what this block and the one before kept;
                                                           # strong ones would make a chain through all blocks

    def around(self, block, function):
        """
        Return the function of a block, stream first, with what it saves moved. Weights stay, and so does what is small:
        modulation, tables and text, which the blocks share.
        """
        def forward(x, *inputs):
            self.block, self.before = [], self.block
            weights = {p.untyped_storage()._cdata for p in block.parameters()}         # as FSDP has gathered them
            small = x.numel()                              # a number: the graph holds the hooks, and would hold x

            def pack(t):
                storage = t.untyped_storage()
                return t if storage.nbytes() < small or storage._cdata in weights else self.pack(t)

            def unpack(packed):
                return packed if torch.is_tensor(packed) else self.unpack(*packed)
            with saved_tensors_hooks(pack, unpack):
                return function(x, *inputs)
        return forward

    def copy(self, target, source):
        """Copy source to target after all work queued on the device so far. Returns the event of its end."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event):
        """Make all later work on the device wait for the event of a copy."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def take_buffer(self, nbytes):
        """Return the smallest free buffer of at least this many bytes, or a new one."""
        large_enough = [i for i, buffer in enumerate(self.free) if len(buffer) >= nbytes]
        if large_enough:
            return self.free.pop(min(large_enough, key=lambda i: len(self.free[i])))
        buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        if self.stream is not None:
            pin(buffer)
        return buffer

    def keep(self, flat):
        """Begin to move a storage, given as a flat tensor. Returns its Kept."""
        kept = Kept(flat, self.take_buffer(flat.nbytes), self.free, self.before)
        kept.copied = self.copy(kept.host, flat)
        self.block.append(weakref.ref(kept))
        self.leaving.append(weakref.ref(kept))
        if len(self.leaving) > 2:
            left = self.leaving.popleft()()
            if left is not None:
                self.wait(left.copied)                     # its memory may be used again by what comes after this
                left.x = None
        return kept

    def pack(self, t):
        """Return the arguments of unpack. Several views of one storage, and several users of a view, make one copy."""
        storage = t.untyped_storage()
        kept = None
        for reference in self.block:
            earlier = reference()
            if earlier is not None and earlier.source() is storage:
                kept = earlier
        if kept is None:
            kept = self.keep(t.detach().as_strided((storage.nbytes() // t.itemsize,), (1,), 0))
        kept.uses += 1
        return kept, t.dtype, t.shape, t.stride(), t.storage_offset()

    def fetch(self, kept):
        """Begin to move a Kept back, unless it is on the device."""
        if kept.x is None:
            kept.x = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=kept.device)
            kept.copied = self.copy(kept.x, kept.host)

    def unpack(self, kept, dtype, *layout):
        """Return the tensor that pack was given, and begin to fetch the tensors that the block before this one kept."""
        self.fetch(kept)
        self.wait(kept.copied)
        x, kept.uses = kept.x, kept.uses - 1
        if kept.uses == 0:
            kept.x = None
        for reference in kept.before:
            earlier = reference()
            if earlier is not None:
                self.fetch(earlier)
        return x.view(dtype).as_strided(*layout)
