"""
Everything about ranks: process groups, context parallelism, sharding (FSDP2), activation checkpointing and offload, EMA. Nothing assumes one node, but that --out, --data and --init are on a file system that all nodes see.

One code path serves 1 to N ranks, CPU (gloo) and GPU (nccl): the model is sharded on one rank too. Parameters, gradients, optimizer state and EMA are
float32 shards; on GPUs the matrices compute in bf16, gathered block by block, and gradients are reduced in float32.
"""
import os
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from memory import MemoryFlags, save_memory
from model import ScoreHead, WanModel
from weights import find_weights, open_wan

# the head's output is a view of its Linear's; nothing here changes an output in place
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

# ------------------------------------------------------------------------------------------------------------------
# ranks

def start_ranks(pair=False, cp_size=1, replicate=1):
    """
    Join the other ranks (torchrun's environment, on one node or many; alone without it) and lay them out twice.

    Who works on what: a grid data x pair x cp. The ranks of one data row get the same pairs, sigma and noise; with pair its first half runs the winners
    and its second the losers; cp_size ranks share the tokens of each video, innermost, as neighbours are joined fastest.
    Who holds which weights: FSDP's mesh, over all ranks, or (replicate, shard): `replicate` groups of neighbours that each hold one whole model.
    Returns a namespace: rank, world, device, mesh, data_rank, data_ranks, pair_group, branch (0 win, 1 lose), cp_group, cp_size.
    Raises ValueError for ranks that do not divide, and for more ranks than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    branches = 2 if pair else 1
    if cp_size < 1 or replicate < 1:
        raise ValueError(f"--cp_size {cp_size} --replicate {replicate}: expected at least 1")
    if pair and world % 2:
        raise ValueError(f"--backward pair puts the two branches of a pair on two ranks and needs an even number of them; torchrun started {world}")
    if world % (branches * cp_size):
        raise ValueError(f"--cp_size {cp_size}{' with --backward pair' * pair} puts each pair on {branches * cp_size} ranks, and torchrun's {world} do not divide by that; "
                         f"start a multiple of {branches * cp_size}, or use another --cp_size")
    if world % replicate:
        raise ValueError(f"--replicate {replicate}: torchrun's {world} ranks do not divide into {replicate} groups of equal size")
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f"torchrun started more ranks on this machine than its {torch.cuda.device_count()} GPUs; "
                         f"use --nproc_per_node={torch.cuda.device_count()}, or CUDA_VISIBLE_DEVICES= to run on CPUs")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_math_sdp(False)         # heads * tokens^2 numbers, 86 GB at 32,760 tokens of 14B: an error of attention's is better
    if not dist.is_initialized():
        # on GPUs gloo too, for gradients that live on the CPU; 30 minutes, as one rank may write a data set while others wait
        backend, timeout = ("cpu:gloo,cuda:nccl" if cuda else "gloo"), timedelta(minutes=30)
        store, rank = dist.HashStore(), 0
        if "RANK" in os.environ:
            store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:     # ranks restarted by torchrun find the dead ones' addresses in its store, and would wait for them
                store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    grid = init_device_mesh(device.type, (world // (branches * cp_size), branches, cp_size), mesh_dim_names=("data", "pair", "cp"))
    mesh = (init_device_mesh(device.type, (world,)) if replicate == 1
            else init_device_mesh(device.type, (replicate, world // replicate), mesh_dim_names=("replicate", "shard")))
    return SimpleNamespace(rank=dist.get_rank(), world=world, device=device, mesh=mesh, data_rank=grid.get_local_rank("data"), data_ranks=grid.size(0),
                           pair_group=grid["pair"].get_group(), branch=grid.get_local_rank("pair"), cp_group=grid["cp"].get_group(), cp_size=cp_size)


def positions_of(args, ranks, step):
    """This rank's positions of a step: a range for each accumulation step."""
    size = args.batch_size // (ranks.data_ranks * args.grad_accum)
    first = step * args.batch_size + ranks.data_rank * size
    begins = [first + micro * ranks.data_ranks * size for micro in range(args.grad_accum)]
    return [range(begin, begin + size) for begin in begins]


def total(numbers, device):
    """Sum a list of floats over all ranks, in float64. Returns a list."""
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def extremes(numbers, device):
    """The smallest and the largest of a list of floats over all ranks."""
    tensor = torch.tensor([-min(numbers), max(numbers)], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return -tensor[0].item(), tensor[1].item()


def spread(make, count, ranks, chunk=64):
    """
    Work that hangs on its number only, in shares: make(list of numbers) -> (n, ...), called until every number 0 .. count - 1 was made. Each rank calls it
    equally often, as a sharded model needs (the first numbers are made twice where they do not divide); ranks that share a video's tokens make the same.
    Returns (count, ...) on the CPU of every rank.
    """
    makers = ranks.world // ranks.cp_size
    share = -(-count // makers)
    mine = [(ranks.rank // ranks.cp_size + i * makers) % count for i in range(share)]
    made = torch.cat([make(mine[start:start + chunk]) for start in range(0, share, chunk)])
    everyone = [torch.empty_like(made) for _ in range(ranks.world)]
    dist.all_gather(everyone, made)
    return torch.stack(everyone[::ranks.cp_size], dim=1).flatten(0, 1)[:count].cpu()               # rank by rank -> number by number


def exchange_branches(mine, group):
    """What pair parallelism sends: mine (B,) on either rank of a pair -> (2, B), the winner's first. No gradient flows through it."""
    both = [torch.empty_like(mine), torch.empty_like(mine)]
    dist.all_gather(both, mine.detach(), group=group)
    return torch.stack(both)


# ------------------------------------------------------------------------------------------------------------------
# context parallelism

class Exchange(torch.autograd.Function):
    """x (n, ...): part i goes to rank i of the group, and the part that rank i sent comes in its place. Its own inverse, hence its own backward."""
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad, ctx.group), None


class Join(torch.autograd.Function):
    """
    x (B, l, K), a share of the tokens -> (B, n * l, K), everyone's. Every rank of the group works out the same error from it, so backward takes this
    rank's part of the gradient and sums nothing: the sum over the shares is FSDP's, over all ranks.
    """
    @staticmethod
    def forward(ctx, x, group):
        ctx.share, ctx.rank = x.shape[1], group.rank()
        shares = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(shares, x.contiguous(), group=group)
        return torch.cat(shares, dim=1)

    @staticmethod
    def backward(ctx, grad):
        return grad.narrow(1, ctx.rank * ctx.share, ctx.share).contiguous(), None


class ContextParallel:
    """
    Ulysses: each rank of a group has its share of a video's tokens, in the whole model but inside self-attention. There the ranks exchange, so that each
    has all tokens of its share of the heads. All else in a block is token by token.

    Tokens that do not divide are filled up with zeros; the filling is dropped after the exchange, so that attention needs no mask, and from the output.
    The head runs on the share; its output, 256 bytes a token in float32 beside 20,480 of a hidden state of the 14B model, is put together on every rank, so
    that the model's output is what it always is: the error, masks and samplers know nothing of this.
    """
    def __init__(self, model, group):
        assert model.blocks[0].self_attn.num_heads % group.size() == 0, "the heads do not divide over the group"
        self.group, self.size, self.tokens = group, group.size(), 0
        model.context_parallel = self
        for block in model.blocks:
            block.self_attn.attend = partial(self.attend, block.self_attn.attend)

    def split(self, x, cos, sin, time_index):
        """x (B, L, ...), tables (L, ...), time_index (B, 1 or L) -> this rank's tokens of each."""
        self.tokens = x.shape[1]
        share = -(-self.tokens // self.size)

        def mine(whole, dim):
            filled = F.pad(whole, (0, 0) * (whole.ndim - 1 - dim) + (0, share * self.size - self.tokens))
            return filled.narrow(dim, self.group.rank() * share, share).clone()                # not a view that keeps the whole
        return mine(x, 1), mine(cos, 0), mine(sin, 0), mine(time_index, 1) if time_index.shape[1] == self.tokens else time_index

    def attend(self, attention, q, k, v):
        """attention (B, L, N, K) x 3 -> (B, L, N * K), run on all tokens of this rank's heads: q, k, v (B, l, N, K) -> (B, l, N * K)."""
        n, tokens, (_, share, heads, _) = self.size, self.tokens, q.shape
        assert share == -(-tokens // n), "the last forward was of another length than this one, whose backward is running"

        def all_tokens(x):                                 # (B, l, N, K) -> (B, L, N/n, K)
            x = Exchange.apply(x.unflatten(2, (n, heads // n)).movedim(2, 0), self.group)          # (n, B, l, N/n, K): by heads -> by tokens
            return x.transpose(0, 1).flatten(1, 2)[:, :tokens]
        out = attention(all_tokens(q), all_tokens(k), all_tokens(v))                               # (B, L, N/n * K)
        out = F.pad(out, (0, 0, 0, n * share - tokens)).unflatten(1, (n, share)).transpose(0, 1)   # (n, B, l, N/n * K): by tokens
        return Exchange.apply(out, self.group).movedim(0, 2).flatten(2)                            # -> by heads, in their order

    def join(self, x):
        """(B, l, K) -> (B, L, K) on every rank of the group."""
        return Join.apply(x, self.group)[:, :self.tokens]


# ------------------------------------------------------------------------------------------------------------------
# sharding

def matrix_dtype(device_type):
    """What matrices are gathered and multiplied in: bf16 on GPUs; None, as they are stored, on CPUs. (bench.py plans for GPUs on a CPU by replacing this.)"""
    return torch.bfloat16 if device_type == "cuda" else None


def shard_model(model, mesh, offload=False):
    """
    Shard a model with .blocks over the ranks of a mesh, in place, and return it. A mesh (replicate, shard) shards along its second axis.

    On GPUs weights are gathered in bf16, those of the timestep path and the head in float32; gradients are reduced in float32. cast_forward_inputs=False: by default FSDP would cast the residual
    stream, the modulation and the rotary tables to bf16, and the error, of which DPO takes small differences, would be off by 1e-3 instead of 2e-5.
    One group has one dtype, so the blocks' modulation and norm weights arrive rounded to bf16 too; the arithmetic on them is float32.
    offload: shards, their gradients and so AdamW's state live in CPU memory; weights are fetched block by block.
    """
    full = MixedPrecisionPolicy(cast_forward_inputs=False)
    dtype = matrix_dtype(mesh.device_type)
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False) if dtype else full
    where = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    for part in (model.time_embedding, model.time_projection, model.head):
        fully_shard(part, mesh=mesh, mp_policy=full, offload_policy=where)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=half, offload_policy=where)
    # By default the root stays gathered after a forward, and then shows whole parameters where EMA, clipping and zero_grad expect shards.
    fully_shard(model, mesh=mesh, mp_policy=half, offload_policy=where, reshard_after_forward=True)
    assert all(isinstance(p, DTensor) for p in model.parameters()), "a parameter escaped sharding"
    return model


def my_rows(param):
    """First and last row of dim 0 which this rank holds of a DTensor that is Shard(0) over the last axis of its mesh (as torch.chunk cuts)."""
    rows, ranks, rank = param.shape[0], param.device_mesh.shape[-1], param.device_mesh.get_coordinate()[-1]
    chunk = -(-rows // ranks)
    return min(rank * chunk, rows), min(rank * chunk + chunk, rows)


@torch.no_grad()
def load_weights(model, tensors):
    """
    Fill a sharded model, each rank reading only its own rows from the files. tensors: {parameter name: lazy slice}, as model.open_wan gives.

    The names and shapes were checked by open_wan; that every number was filled is checked here.
    """
    for name, param in model.named_parameters():
        local = param.to_local()
        local.fill_(float("nan"))                          # to_empty() leaves garbage that could pass for weights
        first, last = my_rows(param)
        if last > first:
            local.copy_(tensors[name][first:last])
        if not torch.isfinite(local).all():
            raise ValueError(f"weight {name} has values that are not finite; the checkpoint is damaged, load another one")


# ------------------------------------------------------------------------------------------------------------------
# gradients and averages

def make_optimizer(model, weight_decay, loss_scale):
    """
    AdamW for the trainable parameters of a model. Matrices decay; norms, biases and modulation do not.

    The loss is multiplied by loss_scale before backward, so eps, 1e-8 for a plain loss, is scaled with it: gradients divided
    by beta would otherwise be as small as eps (at 14B and a gradient norm of 1e-3 the mean step would be 0.35 of the
    learning rate). The state exists from the start, so that a checkpoint before the first step holds the count 0.
    """
    decayed, plain = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            is_matrix = param.ndim > 1 and not name.endswith(("modulation", "emb_pos"))
            (decayed if is_matrix else plain).append(param)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), eps=1e-8 * loss_scale,
                                  fused=True)
    for param in decayed + plain:
        step = torch.zeros((), dtype=torch.float32, device=param.device)
        optimizer.state[param] = {"step": step, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
    return optimizer


def clip_gradients(params, max_norm, scale=1.0):
    """
    Multiply all gradients by scale, clip them to max_norm over all ranks, and return the norm before clipping (float; not finite on every rank
    alike if any rank's gradient is not, so a decision on it needs no further communication).
    """
    params = [p for p in params if p.grad is not None]
    if scale != 1.0:
        torch._foreach_mul_([p.grad.to_local() for p in params], scale)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


@torch.no_grad()
def ema_update(ema, policy, decay):
    """ema <- decay * ema + (1 - decay) * policy, on the local shards: no communication."""
    torch._foreach_lerp_([p.to_local() for p in ema.parameters()], [p.to_local() for p in policy.parameters()], 1 - decay)


def build_model(path, config, ranks, memory=MemoryFlags(), trained=False, offload=False, seed=0):
    """
    Build the model of config with the weights at path, sharded over the ranks; each rank reads only its own rows. Path "scratch" draws them from seed.

    A preference model (config.scores) is loaded where path holds one. Where path holds a velocity model, it gets that model's blocks, frozen, and a new
    head: with the blocks trained too, 150 steps on 320 pairs learnt those by heart (held-out accuracy 0.5 at any sigma; 0.86 at sigma 0.1 with the head
    alone), and frozen blocks keep no activations.
    memory, trained: see memory.save_memory. offload: the shards, their gradients and AdamW's state live in CPU memory.
    """
    if config.num_heads % ranks.cp_size:
        raise ValueError(f"--cp_size {ranks.cp_size} does not divide the {config.num_heads} heads of the model at {path}")
    from_scratch = str(path) == "scratch"
    if from_scratch:
        torch.manual_seed(seed)                            # every rank draws the same whole model, then keeps its shard
        model = WanModel(config).to(ranks.device)
    else:
        new_head = config.scores and not any(name.endswith("head.mix.weight") for name in find_weights(path))
        _, tensors = open_wan(path, replace(config, scores=False) if new_head else config)         # strict: names, shapes and sizes are compared here
        with torch.device("meta"):
            model = WanModel(config)
        if new_head:
            torch.manual_seed(seed)                        # the same head on every rank
            head = ScoreHead(config).state_dict()
            tensors = tensors | {f"head.{name}": tensor for name, tensor in head.items()}
            model.requires_grad_(False)
            model.head.requires_grad_(True)
    if ranks.cp_size > 1:
        ContextParallel(model, ranks.cp_group)
    save_memory(model, memory, trained)
    shard_model(model, ranks.mesh, offload)
    if not from_scratch:
        model.to_empty(device="cpu" if offload else ranks.device)
        load_weights(model, tensors)
    return model
