"""
Ranks: process groups and collectives, context parallelism, sharding (FSDP2), clipping and averages.

One code path serves 1 to N ranks, on CPUs (gloo) and GPUs (nccl): a model is sharded on one rank too. Parameters,
gradients, optimizer state and EMA are float32 shards. On GPUs the matrices compute in bf16, gathered block by block,
and gradients are reduced in float32. Nothing assumes one node, except that all nodes see --out, --data and --init.
"""
import os
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lora import adapter_weights, add_adapters, lora_layers
from memory import MemoryFlags, save_memory
from model import ScoreHead, WanModel
from weights import find_weights, open_wan

# the head's output is a view of its Linear's; nothing here changes an output in place
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


# ----------------------------------------------------------------------------------------------------------------------
# ranks

@dataclass(frozen=True)
class Ranks:
    """
    This rank's place among all. The ranks form a grid data x pair x cp: the ranks of one data row get the same
    pairs, sigma and noise; with pair parallelism one half of them runs the winners and the other the losers; cp_size
    ranks share the tokens of each video. Who holds which weights is FSDP's mesh.
    """
    rank: int
    world: int                        # the number of ranks
    device: torch.device
    mesh: DeviceMesh                  # all ranks, or (replicate, shard): groups that each hold one whole model
    data_rank: int
    data_ranks: int
    pair_group: dist.ProcessGroup
    branch: int                       # 0: the winners (or both branches), 1: the losers
    cp_group: dist.ProcessGroup
    cp_size: int


def start_ranks(pair=False, cp_size=1, replicate=1):
    """
    Join the other ranks, which torchrun's environment names (without it this rank is alone), and return its Ranks.
    Raises ValueError for ranks that do not divide, and for more ranks than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    check_layout(world, pair, cp_size, replicate)
    device = take_device()
    if not dist.is_initialized():
        start_process_group(device, world)
    branches = 2 if pair else 1
    shape = (world // (branches * cp_size), branches, cp_size)       # cp innermost: neighbours are joined fastest
    grid = init_device_mesh(device.type, shape, mesh_dim_names=("data", "pair", "cp"))
    if replicate == 1:
        mesh = init_device_mesh(device.type, (world,))
    else:
        mesh = init_device_mesh(device.type, (replicate, world // replicate), mesh_dim_names=("replicate", "shard"))
    return Ranks(rank=dist.get_rank(), world=world, device=device, mesh=mesh,
                 data_rank=grid.get_local_rank("data"), data_ranks=grid.size(0),
                 pair_group=grid["pair"].get_group(), branch=grid.get_local_rank("pair"),
                 cp_group=grid["cp"].get_group(), cp_size=cp_size)


def check_layout(world, pair, cp_size, replicate):
    """Raise ValueError where `world` ranks do not divide into the groups that the flags ask for."""
    if cp_size < 1 or replicate < 1:
        raise ValueError(f"--cp_size {cp_size} --replicate {replicate}: expected at least 1")
    if pair and world % 2:
        raise ValueError(f"--backward pair puts the two branches of a pair on two ranks and needs an even number of "
                         f"them; torchrun started {world}")
    ranks_per_pair = (2 if pair else 1) * cp_size
    if world % ranks_per_pair:
        flags = f"--cp_size {cp_size} with --backward pair" if pair else f"--cp_size {cp_size}"
        raise ValueError(f"{flags} puts each pair on {ranks_per_pair} ranks, and torchrun's {world} do not divide by "
                         f"that; start a multiple of {ranks_per_pair}, or use another --cp_size")
    if world % replicate:
        raise ValueError(f"--replicate {replicate}: torchrun's {world} ranks do not divide into {replicate} groups of "
                         f"equal size")


def take_device():
    """Return this rank's GPU, made the current one, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(f"torchrun started more ranks on this machine than its {gpus} GPUs; use "
                         f"--nproc_per_node={gpus}, or CUDA_VISIBLE_DEVICES= to run on CPUs")
    torch.cuda.set_device(local_rank)
    # math attention holds heads * tokens^2 numbers, 86 GB at 32,760 tokens of 14B: an error of attention's is better
    torch.backends.cuda.enable_math_sdp(False)
    return torch.device("cuda", local_rank)


def start_process_group(device, world):
    """Start torch's default process group: torchrun's ranks, or this one alone."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"        # gloo for gradients that live on the CPU
    timeout = timedelta(minutes=30)                        # one rank may write a data set while others wait
    store, rank = dist.HashStore(), 0
    if "RANK" in os.environ:
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # ranks that torchrun restarts find the dead ones' addresses in its store, and would wait for them
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def positions_of(args, ranks, step):
    """Return this rank's positions of a step: a range for each accumulation step."""
    size = args.batch_size // (ranks.data_ranks * args.grad_accum)
    first = step * args.batch_size + ranks.data_rank * size
    begins = [first + micro * ranks.data_ranks * size for micro in range(args.grad_accum)]
    return [range(begin, begin + size) for begin in begins]


# ----------------------------------------------------------------------------------------------------------------------
# collectives

def total(numbers, device):
    """Return the sums of a list of floats over all ranks, added in float64."""
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def extremes(numbers, device):
    """Return the smallest and the largest of all ranks' lists of floats."""
    tensor = torch.tensor([-min(numbers), max(numbers)], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return -tensor[0].item(), tensor[1].item()


def spread(make, count, ranks, chunk=64):
    """
    Split `count` independent jobs over the ranks and return all their results, (count, ...), on the CPU of every rank.
    make(indices) returns one row per index, for at most `chunk` indices.

    Each rank calls it equally often, as a sharded model needs; where the jobs do not divide, the first ones are done
    twice. Ranks that share a video's tokens do the same jobs.
    """
    workers = ranks.world // ranks.cp_size
    jobs_each = -(-count // workers)
    indices = [(ranks.rank // ranks.cp_size + i * workers) % count for i in range(jobs_each)]
    rows = torch.cat([make(indices[start:start + chunk]) for start in range(0, jobs_each, chunk)])
    rows_of_ranks = [torch.empty_like(rows) for _ in range(ranks.world)]
    dist.all_gather(rows_of_ranks, rows)
    rows_of_workers = torch.stack(rows_of_ranks[::ranks.cp_size], dim=1)       # (jobs_each, workers, ...)
    return rows_of_workers.flatten(0, 1)[:count].cpu()


def exchange_branches(err, group):
    """err (B,) of this rank's branch -> (2, B), the winner's first, on both ranks of a pair. No gradient flows."""
    both = [torch.empty_like(err), torch.empty_like(err)]
    dist.all_gather(both, err.detach(), group=group)
    return torch.stack(both)


# ----------------------------------------------------------------------------------------------------------------------
# context parallelism

class Exchange(torch.autograd.Function):
    """x (n, ...): part i goes to rank i of the group, and is replaced by what rank i sends. It is its own inverse."""
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad, ctx.group), None


class Join(torch.autograd.Function):
    """
    A share of the tokens x (B, l, K) -> those of all ranks (B, n * l, K). Each rank computes the same error from them,
    so backward takes this rank's part of the gradient and sums nothing: FSDP sums over all ranks.
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
    Ulysses, put into a model's seams. Each rank of a group has a share of a video's tokens everywhere except inside
    self-attention, where the ranks exchange, so that each has all tokens of its share of the heads.

    Tokens that do not divide are padded with zeros. The padding is dropped after the exchange, so that attention needs
    no mask, and from the output. The head runs on the share; its output, 256 bytes a token in float32 next to 20,480 of
    a hidden state of 14B, is joined on every rank, so that errors, masks and samplers need not know.
    """
    def __init__(self, model, group):
        assert model.config.num_heads % group.size() == 0, "the heads do not divide over the group"
        self.group, self.size, self.tokens = group, group.size(), 0
        model.split, model.join = self.split, self.join
        for block in model.blocks:
            block.self_attn.attend = partial(self.attend, block.self_attn.attend)

    def split(self, patches, cos, sin, time_index):
        """patches (B,L,..), tables (1,L,1,K), time_index (B, 1 or L) -> those of this rank's tokens."""
        self.tokens = patches.shape[1]
        return tuple(self.share_of(x) if x.shape[1] == self.tokens else x for x in (patches, cos, sin, time_index))

    def share_of(self, x):
        """x (B, L, ...) -> (B, l, ...), a copy, not a view that would keep the whole."""
        share = -(-self.tokens // self.size)
        filling = share * self.size - self.tokens
        filled = F.pad(x, (0, 0) * (x.ndim - 2) + (0, filling))
        return filled.narrow(1, self.group.rank() * share, share).clone()

    def attend(self, attention, q, k, v):
        """q, k, v (B, l, N, K) -> (B, l, N * K): attention over all tokens, for this rank's heads."""
        out = attention(self.to_heads(q), self.to_heads(k), self.to_heads(v))  # (B, L, N/n * K)
        return self.to_tokens(out, q.shape[1])

    def to_heads(self, x):
        """All heads of a share of the tokens (B, l, N, K) -> a share of the heads of all tokens (B, L, N/n, K)."""
        assert x.shape[1] == -(-self.tokens // self.size), "the last forward was longer or shorter than this backward's"
        by_heads = x.unflatten(2, (self.size, -1)).movedim(2, 0)               # (n, B, l, N/n, K)
        by_tokens = Exchange.apply(by_heads, self.group)
        return by_tokens.transpose(0, 1).flatten(1, 2)[:, :self.tokens]

    def to_tokens(self, x, share):
        """A share of the heads of all tokens (B, L, N/n * K) -> all heads of a share of the tokens (B, l, N * K)."""
        filled = F.pad(x, (0, 0, 0, self.size * share - self.tokens))
        by_tokens = filled.unflatten(1, (self.size, share)).transpose(0, 1)    # (n, B, l, N/n * K)
        by_heads = Exchange.apply(by_tokens, self.group)
        return by_heads.movedim(0, 2).flatten(2)

    def join(self, tokens):
        """tokens (B, l, K) -> (B, L, K) on every rank of the group."""
        return Join.apply(tokens, self.group)[:, :self.tokens]


# ----------------------------------------------------------------------------------------------------------------------
# sharding

def matrix_dtype(device_type):
    """Return the dtype that matrices are gathered and multiplied in: bf16 on GPUs; None, as stored, on CPUs."""
    return torch.bfloat16 if device_type == "cuda" else None


def shard_model(model, mesh, offload=False):
    """
    Shard a model with .blocks over the ranks of a mesh, in place, and return it. A mesh (replicate, shard) shards along
    its second axis. offload: shards, their gradients and AdamW's state live in CPU memory, and weights are fetched
    block by block.

    On GPUs weights are gathered in bf16, those of the timestep path and the head in float32; gradients are reduced in
    float32. cast_forward_inputs=False: by default FSDP would cast the residual stream, the modulation and the rotary
    tables to bf16, and the error, of which DPO takes small differences, would be off by 1e-3 instead of 2e-5. A group
    has one dtype, so modulation and norm weights of blocks arrive rounded to bf16; the arithmetic on them is float32.
    """
    full = MixedPrecisionPolicy(cast_forward_inputs=False)
    dtype = matrix_dtype(mesh.device_type)
    half = replace(full, param_dtype=dtype, reduce_dtype=torch.float32) if dtype else full
    place = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    for part in (model.time_embedding, model.time_projection, model.head):
        fully_shard(part, mesh=mesh, mp_policy=full, offload_policy=place)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=half, offload_policy=place)
    # by default the root stays gathered after a forward, where EMA, clipping and zero_grad expect shards
    fully_shard(model, mesh=mesh, mp_policy=half, offload_policy=place, reshard_after_forward=True)
    assert all(isinstance(p, DTensor) for p in model.parameters()), "a parameter escaped sharding"
    return model


def store_frozen(model, dtype):
    """
    Keep the frozen weights that shard_model gathers in dtype (None: as they are stored) in that dtype, before it shards
    them: the same numbers in half the memory.
    """
    full = [p for part in (model.time_embedding, model.time_projection, model.head) for p in part.parameters()]
    kept = {id(p) for p in full}
    for param in model.parameters():
        if dtype and not param.requires_grad and id(param) not in kept:
            param.data = param.data.to(dtype)


def my_rows(param):
    """Return the first row of a sharded parameter on this rank, and the row after the last."""
    rows, ranks, rank = param.shape[0], param.device_mesh.shape[-1], param.device_mesh.get_coordinate()[-1]
    rows_each = -(-rows // ranks)                          # as torch.chunk cuts
    return min(rank * rows_each, rows), min((rank + 1) * rows_each, rows)


@torch.no_grad()
def load_weights(model, tensors):
    """
    Fill a sharded model; each rank reads only its own rows. tensors: {parameter name: lazy slice or tensor}, whose
    names and shapes open_wan has checked. Raises ValueError for a weight that is not finite.
    """
    for name, param in model.named_parameters():
        local = param.to_local()
        first, end = my_rows(param)
        if end > first:
            local.copy_(tensors[name][first:end])
        if not torch.isfinite(local).all():
            raise ValueError(f"weight {name} has values that are not finite; the checkpoint is damaged, load another "
                             f"one")


def open_weights(path, config, seed):
    """
    Return {parameter name: lazy slice or tensor} for a model of config from the files at path, and whether the head is
    new: a preference model's where the files hold a velocity model. seed: of the new head's random weights.
    """
    holds_scores = any(name.endswith("head.mix.weight") for name in find_weights(path))
    if not config.scores or holds_scores:
        return open_wan(path, config)[1], False            # strict: names, shapes and sizes are compared there
    _, tensors = open_wan(path, replace(config, scores=False))
    torch.manual_seed(seed)                                # the same head on every rank
    head = ScoreHead(config).state_dict()
    return tensors | {f"head.{name}": tensor for name, tensor in head.items()}, True


def build_model(path, config, ranks, memory=MemoryFlags(), trained=False, offload=False, seed=0, lora=None):
    """
    Build the model of config with the weights at path, sharded over the ranks; each rank reads only its own rows. The
    path "scratch" draws them from seed.

    A preference model (config.scores) is loaded where path holds one. From a velocity model it takes the blocks,
    frozen, and gets a new head: with the blocks trained too, 150 steps on 320 pairs learnt those by heart (held-out
    accuracy 0.5 at any sigma; 0.86 at sigma 0.1 with the head alone), and frozen blocks keep no activations.
    lora: a lora.LoraPlan, whose adapters are all that is trained then.
    memory, trained: see memory.save_memory. offload: see shard_model.
    """
    if config.num_heads % ranks.cp_size:
        raise ValueError(f"--cp_size {ranks.cp_size} does not divide the {config.num_heads} heads of the model at "
                         f"{path}")
    tensors = None
    if str(path) == "scratch":
        torch.manual_seed(seed)                            # every rank draws the same whole model, then keeps its shard
        model = WanModel(config).to(ranks.device)
    else:
        tensors, head_is_new = open_weights(path, config, seed)
        with torch.device("meta"):
            model = WanModel(config)
        if head_is_new:
            model.requires_grad_(False)
            model.head.requires_grad_(True)
    if lora:
        add_adapters(model, lora.layers, lora.rank, lora.alpha, keep_initial=bool(lora.initial))
        if tensors is not None:
            tensors = tensors | adapter_weights(model, lora, seed)
        store_frozen(model, matrix_dtype(ranks.device.type))
    if ranks.cp_size > 1:
        ContextParallel(model, ranks.cp_group)
    save_memory(model, memory, trained)
    shard_model(model, ranks.mesh, offload)
    if tensors is not None:
        model.to_empty(device="cpu" if offload else ranks.device)
        load_weights(model, tensors)
    return model


def state_options(model):
    """
    Return the options with which checkpoints read and set a model's state: all of it or, where it has adapters, these
    alone, since --init has the rest.
    """
    has_adapters = bool(lora_layers(model))
    return StateDictOptions(ignore_frozen_params=has_adapters, strict=not has_adapters)


# ----------------------------------------------------------------------------------------------------------------------
# gradients and averages

def make_optimizer(model, weight_decay, loss_scale):
    """
    Return AdamW for the trainable parameters of a model. Matrices decay; norms, biases and modulation do not.

    The loss is multiplied by loss_scale before backward, so eps, 1e-8 for a plain loss, is scaled with it: gradients
    divided by beta would otherwise be as small as eps (at 14B and a gradient norm of 1e-3, the mean step would be 0.35
    of the learning rate). The state exists from the start, so that a checkpoint before the first step has its count.
    """
    decayed, plain = [], []
    for name, param in model.named_parameters():
        is_matrix = param.ndim > 1 and not name.endswith(("modulation", "emb_pos"))
        if param.requires_grad and is_matrix:
            decayed.append(param)
        elif param.requires_grad:
            plain.append(param)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8 * loss_scale, fused=True)
    for param in decayed + plain:
        step = torch.zeros((), dtype=torch.float32, device=param.device)
        moments = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        optimizer.state[param] = {"step": step, **moments}
    return optimizer


def clip_gradients(params, max_norm, scale=1.0):
    """
    Multiply all gradients by scale, clip them to max_norm over all ranks, and return the norm before clipping (float).
    Where one rank's gradient is not finite, the norm is not finite on any rank, so a decision on it needs no
    communication.
    """
    params = [p for p in params if p.grad is not None]
    if scale != 1.0:
        torch._foreach_mul_([p.grad.to_local() for p in params], scale)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.item()


@torch.no_grad()
def ema_update(ema, policy, decay):
    """
    ema <- decay * ema + (1 - decay) * policy, on the local shards, without communication. ema: a model like policy, or
    a lora.Average of its adapters.
    """
    weights = dict(policy.named_parameters())
    averages = [average.to_local() for _, average in ema.named_parameters()]
    torch._foreach_lerp_(averages, [weights[name].to_local() for name, _ in ema.named_parameters()], 1 - decay)
