"""
Everything about ranks: process groups, sharding (FSDP2), activation checkpointing, pair exchange, EMA, saving and loading.

One code path serves 1 to N ranks, CPU (gloo) and GPU (nccl): the model is sharded on one rank too. Parameters, gradients, optimizer state and EMA are
float32 shards; on GPUs the matrices compute in bf16, gathered block by block, and gradients are reduced in float32.
"""
import json
import os
import shutil
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# the head's output is a view of its Linear's; nothing here changes an output in place
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")    # stored_weights asks for just that

# ------------------------------------------------------------------------------------------------------------------
# ranks

def start_ranks(pair=False):
    """
    Join the other ranks (torchrun's environment; alone without it) and lay out the groups.

    pair: ranks 2k and 2k+1 share their pairs, the first runs the winners and the second the losers.
    Returns a namespace: rank, world, device, mesh (1-D over all ranks, for FSDP), data_rank, data_ranks (who sees which pairs), pair_group, branch (0 win, 1 lose).
    Raises ValueError for an odd number of ranks with pair, and for more ranks than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if pair and world % 2:
        raise ValueError(f"--backward pair puts the two branches of a pair on two ranks and needs an even number of them; torchrun started {world}")
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f"torchrun started more ranks on this machine than its {torch.cuda.device_count()} GPUs; "
                         f"use --nproc_per_node={torch.cuda.device_count()}, or CUDA_VISIBLE_DEVICES= to run on CPUs")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend, timeout = ("nccl" if cuda else "gloo"), timedelta(minutes=30)                     # one rank may write a data set while others wait
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    rank = dist.get_rank()
    ranks = SimpleNamespace(rank=rank, world=world, device=device, mesh=init_device_mesh(device.type, (world,)),
                            data_rank=rank, data_ranks=world, pair_group=None, branch=0)
    if pair:
        grid = init_device_mesh(device.type, (world // 2, 2), mesh_dim_names=("data", "pair"))
        ranks.data_rank, ranks.data_ranks, ranks.branch = rank // 2, world // 2, rank % 2
        ranks.pair_group = grid["pair"].get_group()
    return ranks


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


def exchange_branches(mine, group):
    """
    What pair parallelism sends: mine (n, B) on either rank of a pair -> (2, n, B), the winner's rows first. No gradient flows through it.
    """
    both = mine.new_empty(2 * mine.numel())
    dist.all_gather_into_tensor(both, mine.detach().flatten(), group=group)
    return both.view(2, *mine.shape)


# ------------------------------------------------------------------------------------------------------------------
# sharding

ATTENTION_OPS = [torch.ops.aten._scaled_dot_product_flash_attention.default, torch.ops.aten._scaled_dot_product_efficient_attention.default,
                 torch.ops.aten._scaled_dot_product_cudnn_attention.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default]


def keep_attention(context, op, *args, **kwargs):
    """Policy of selective checkpointing: attention is kept, since its recomputation grows with the square of the tokens; all else is recomputed."""
    return CheckpointPolicy.MUST_SAVE if op in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_blocks(model, mode):
    """
    Activation checkpointing of every block of model.blocks. mode: off | selective (keeps attention outputs) | full (keeps block inputs).

    Patches block.forward, so that parameter names stay those of the checkpoints; to be called before shard_model.
    """
    if mode == "off":
        return
    options = {"context_fn": lambda: create_selective_checkpoint_contexts(keep_attention)} if mode == "selective" else {}
    for block in model.blocks:
        # no dropout in Wan, hence no random state to keep
        block.forward = (lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False, preserve_rng_state=False, **options))(block.forward)


def shard_model(model, mesh, offload=False):
    """
    Shard a model with .blocks over all ranks of a 1-D mesh, in place, and return it.

    On GPUs weights are gathered in bf16, those of the timestep path and the head in float32; gradients are reduced in float32. cast_forward_inputs=False: by default FSDP would cast the residual
    stream, the modulation and the rotary tables to bf16, and the error, of which DPO takes small differences, would be off by 1e-3 instead of 2e-5.
    One group has one dtype, so the blocks' modulation and norm weights arrive rounded to bf16 too; the arithmetic on them is float32.
    offload: shards live in CPU memory and are fetched block by block (meant for the frozen reference).
    """
    full = MixedPrecisionPolicy(cast_forward_inputs=False)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False) if mesh.device_type == "cuda" else full
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
    """First and last row of dim 0 of a DTensor that is Shard(0) over a 1-D mesh which this rank holds (as torch.chunk cuts)."""
    rows, ranks, rank = param.shape[0], param.device_mesh.size(), param.device_mesh.get_local_rank()
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


# ------------------------------------------------------------------------------------------------------------------
# checkpoints

def save_checkpoint(out, step, policy, optimizer, ema, meta, keep):
    """
    Write out/step_000500 (every rank its shards) and then name it in out/latest. All ranks call it.

    A folder appears under its name only when it is whole, and `latest` changes by an atomic replace after that: a run killed at any moment leaves a
    checkpoint to resume from. meta: what must be equal on resume, as JSON. keep: how many checkpoints stay, this one included (older ones go, after it is
    whole; later ones, of a run that was resumed from before them, stay until they are passed). Returns the folder.
    """
    out = Path(out)
    name = f"step_{step:06d}"
    temporary, final = out / f".{name}.tmp", out / name
    if dist.get_rank() == 0 and temporary.exists():
        shutil.rmtree(temporary)                           # what a killed run left
    dist.barrier()
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state} | ({"ema": get_model_state_dict(ema)} if ema is not None else {})
    dcp.save(state, checkpoint_id=temporary)
    if dist.get_rank() == 0:
        (temporary / "meta.json").write_text(json.dumps(meta | {"step": step}, indent=1))
        passed = out / f".{name}.old"
        if final.exists():                                 # a resumed run that passes the same step again
            shutil.rmtree(passed, ignore_errors=True)
            os.rename(final, passed)
        os.rename(temporary, final)
        (out / ".latest.tmp").write_text(name + "\n")
        os.replace(out / ".latest.tmp", out / "latest")
        shutil.rmtree(passed, ignore_errors=True)
        older = sorted(folder for folder in out.glob("step_*") if folder.name < name)
        for folder in older[:max(0, len(older) - (keep - 1))]:
            shutil.rmtree(folder)
    dist.barrier()
    return final


def find_checkpoint(out, resume, flag="--resume"):
    """
    The folder that --resume (or another flag) names: `latest` (of the run's folder out) or a step folder. ValueError if there is none says where it looked.
    """
    if resume == "latest":
        pointer = Path(out) / "latest"
        if not pointer.exists():
            raise ValueError(f"--resume latest: {pointer} does not exist; {out} has no checkpoint. Leave out --resume to start anew, or name a step folder")
        folder = Path(out) / pointer.read_text().strip()
    else:
        folder = Path(resume)
    if not (folder / "meta.json").exists():
        raise ValueError(f"{flag} {resume}: {folder} holds no whole checkpoint (meta.json is missing); name a folder like {out}/step_000500")
    return folder


def load_checkpoint(folder, policy, optimizer, ema, meta):
    """
    Fill policy, optimizer and ema from a checkpoint, written on any number of ranks. Returns the step it was written after.

    Raises ValueError if an entry of meta (what decides the numbers of a run) is not what the checkpoint was written with.
    """
    saved = json.loads((Path(folder) / "meta.json").read_text())
    for key, value in meta.items():
        if saved.get(key) != value:
            raise ValueError(f"--resume {folder}: it was trained with {key} = {saved.get(key)}, this run has {key} = {value}; "
                             f"resume with the same flags, or give its weights to --init of a new run (train.py --export {folder} --out DIR)")
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state} | ({"ema": get_model_state_dict(ema)} if ema is not None else {})
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if ema is not None:
        set_model_state_dict(ema, state["ema"])
    return saved["step"]


def stored_weights(folder, ema):
    """
    The weights in a checkpoint (ema: the average, where the run kept one), written on any number of ranks, for one process without a process group.

    Returns {name: meta tensor}, read(name) -> the whole tensor, which is put together from the shards when it is asked for, one at a time. The index of
    a checkpoint is a pickle (as torch writes and resumes them), so open those of your own runs only; what is handed on is the export.
    """
    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata()
    reader.read_metadata = lambda *args, **kwargs: metadata            # which dcp.load would read again for every tensor
    part = "ema." if ema and any(name.startswith("ema.") for name in metadata.state_dict_metadata) else "model."
    stored = {name.removeprefix(part): tensor for name, tensor in metadata.state_dict_metadata.items() if name.startswith(part)}

    def read(name):
        state = {part + name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype)}
        dcp.load(state, storage_reader=reader, no_dist=True)
        return state[part + name]

    return {name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta") for name, tensor in stored.items()}, read
