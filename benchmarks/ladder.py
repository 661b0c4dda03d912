"""
The longest video whose Reg-DPO step fits, with one technique after the other: 14B on 8 GPUs of 80 GB, 1.3B on one. Needs no GPU; diffusers for the first row.

    python benchmarks/ladder.py > benchmarks/ladder.md

Every figure is bench.py's tracker on the real step: full fine-tuning, float32 weights and AdamW, matrices in bf16, one pair at a time, no EMA.
"""
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import bench
import dry_run
import train
from weights import public_config
from dry_run import token_count


ABOUT = f"""# The longest video that fits, with one technique after the other

`python benchmarks/ladder.py > benchmarks/ladder.md`, torch {torch.__version__}, no GPU: the figures of `dry_run.py` on the real step. A GPU keeps 6 of its 80 GB for what
is not counted there, and has 200 GB of CPU memory (8 share 2 TB, of which some is left). Full fine-tuning with Reg-DPO, float32 weights and AdamW, matrices in bf16, one pair at a time, no EMA.
The first row is diffusers' model as its users run it: FSDP2, every block checkpointed, both branches in one batch, a bf16 reference sharded beside the policy.

Bytes are those of a rank and a step. FLOPs: those run, over those needed (forward, backward and reference once each; what flash attention does twice in its backward is
in the first figure only). Time: an estimate, over that of the needed FLOPs alone, at {bench.FLOPS / 1e12:g} TFLOP/s, {bench.HOST / 1e9:g} GB/s between a GPU and its host, {bench.LINKS / 1e9:g} GB/s between GPUs,
{bench.CPU_MEMORY / 1e9:g} GB/s of CPU memory for AdamW of a rank there. Transfers to the host and FSDP's gathers hide behind the FLOPs while they are shorter; context parallelism's
exchanges and AdamW on the CPU do not."""


def build_peer(path, config, ranks, memory=None, trained=False, offload=False):
    """In train.build_model's place: diffusers' model as its users shard it, gathered in bf16; the policy checkpointed block by block, the reference in bf16."""
    from diffusers import WanTransformer3DModel

    class Peer(WanTransformer3DModel):
        def forward(self, x, timestep, context):
            return super().forward(hidden_states=x, timestep=timestep, encoder_hidden_states=context, return_dict=False)[0]
    torch.set_default_dtype(torch.float32 if trained else torch.bfloat16)
    model = Peer(**{name: value for name, value in public_config(config, "diffusers").items() if name not in ("_class_name", "text_len")})
    torch.set_default_dtype(torch.float32)
    model.register_to_config(scores=False)                                # what train.py asks of a model
    if trained:
        model.enable_gradient_checkpointing()
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=ranks.mesh, mp_policy=half)
    return fully_shard(model, mesh=ranks.mesh, mp_policy=half)


COLUMNS = ("with", "tokens", "times", "frames at 480 x 832", "CPU GB", "PCIe GB", "GPU-GPU GB", "FLOPs", "time", "time at the first row's tokens", "flags")


def climb(name, ranks):
    """Print the table of one model, each row as it is found."""
    args, _ = bench.parse_args(["--plan", "--model", name, "--ranks", str(ranks), "--size", "256", "512"])     # 512 tokens a latent frame
    config, per_frame, full = args.config, token_count(args.config, args.at(1)), ("--checkpointing", "full")
    rungs = [("diffusers' blocks", full), ("our blocks", full)] + [(f"+ {new}" if new[0] != "e" else new, flags) for new, flags in bench.rungs(ranks, config) if "full" in flags and flags != full]
    if ranks == 8:
        wide = " ".join(rungs[-2][1]).replace("--backward pair", "--backward sequential").replace("--cp_size 4", "--cp_size 8")
        rungs.insert(-1, ("each video over 8 ranks, one branch at a time", tuple(wide.split())))
    print(f"\n## {name}, {ranks} GPU{'s' * (ranks > 1)} of {args.gpu_memory:g} GB\n\n{bench.table([], COLUMNS)}", flush=True)
    first, frames = 0, 32
    for new, flags in rungs:
        words = ("--ema_decay", "0", *flags)
        with nullcontext() if first else patch.object(train, "build_model", build_peer):
            plan = lambda n: dry_run.extrapolate(words, config, args.at(n), ranks)
            frames = bench.longest(lambda n: max(plan(n).peak / args.budget, plan(n).host / args.host_budget), frames)
            first, found = first or frames, plan(frames)
            there, here = (seconds / needed for seconds, needed in (bench.estimate(plan(n), words, config, n * per_frame, ranks) for n in (first, frames)))
        dry_run.simulate.cache_clear()                                    # diffusers' and ours go by the same flags
        dry_run.extrapolate.cache_clear()
        step, tokens = dry_run.step_args(words, ranks), frames * per_frame
        needed = step.batch_size * bench.step_flops(step, config, tokens, beforehand=True)
        extra = found.flops * ranks - step.batch_size * bench.step_flops(step, config, tokens)
        row = (new, tokens, f"{frames / first:.2f}", max(0, (tokens // 1560 - 1) * 4 + 1), f"{found.host / 1e9:.0f}", f"{found.moved / 1e9:.0f}",
               f"{(found.gathered + found.exchanged) / 1e9:.0f}", f"{1 + extra / needed:.2f}", f"{here:.2f}", f"{there:.2f}", "" if new == "diffusers' blocks" else " ".join(flags))
        print(bench.table([dict(zip(COLUMNS, row))], COLUMNS).rsplit("\n", 1)[-1], flush=True)


if __name__ == "__main__":
    print(ABOUT)
    climb("wan2.1-t2v-14b", 8)
    climb("wan2.1-t2v-1.3b", 1)
    print("""
Where CPU memory is the limit (200), moving weights and AdamW there too gains nothing. The rows are found from 4 and 6 blocks, and from 16,384 and 32,768 tokens a rank where there are
more chunks; checked on all 40 blocks and all chunks of one row (14B, "+ tokens in chunks"): 74.7 GB instead of 73.7, the same FLOPs and traffic.""")
