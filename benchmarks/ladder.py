"""
The longest video whose Reg-DPO step fits, with one technique after the other: 14B on 8 GPUs of 80 GB, 1.3B on one.
Needs no GPU; diffusers for the first row.

    python benchmarks/ladder.py > benchmarks/ladder.md

dry_run.py counts every figure on the real step: full fine-tuning, float32 weights and AdamW, matrices in bf16, one pair
at a time, no EMA.
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
import fsdp_utils
from dry_run import token_count
from weights import public_config

FLOPS, HOST = f"{bench.FLOPS / 1e12:g} TFLOP/s", f"{bench.HOST / 1e9:g} GB/s"
LINKS, CPU = f"{bench.LINKS / 1e9:g} GB/s", f"{bench.CPU_MEMORY / 1e9:g} GB/s"
ABOUT = f"""# The longest video that fits, with one technique after the other

`python benchmarks/ladder.py > benchmarks/ladder.md`, torch {torch.__version__}, no GPU: the figures of
`dry_run.py` on the real step. A GPU keeps 6 of its 80 GB for what is not counted there, and has 200
GB of CPU memory (8 share 2 TB, of which some is left). Full fine-tuning with Reg-DPO, float32
weights and AdamW, matrices in bf16, one pair at a time, no EMA. The first row is diffusers' model
as its users run it: FSDP2, every block checkpointed, both branches in one batch, a bf16 reference
sharded like the policy.

Bytes are those of a rank and a step. FLOPs: those run, over those needed (forward, backward and
reference once each; what flash attention does twice in its backward is in the first figure only).
Time: an estimate, over that of the needed FLOPs alone, at {FLOPS}, {HOST} between a GPU
and its host, {LINKS} between GPUs, {CPU} of CPU memory for AdamW of a rank there.
Transfers to the host and FSDP's gathers hide behind the FLOPs while they are shorter; context
parallelism's exchanges and AdamW on the CPU do not."""
NOTES = """
`full` takes blocks whole up to one chunk (8,192 tokens) and in chunks beyond; with
`--chunk_tokens 0` always whole. Where CPU memory is the limit (200), moving weights and AdamW there
too gains nothing; FSDP pins its shards and gradients there, and torch rounds each up to a power of
two, which is counted. The rows are found from 4 and 6 blocks, and from 16,384 and 32,768 tokens a
rank where there are more chunks."""
COLUMNS = ("with", "tokens", "times", "frames at 480 x 832", "CPU GB", "PCIe GB", "GPU-GPU GB", "FLOPs", "time",
           "time at the first row's tokens", "flags")
PEER = "diffusers' blocks"


def build_peer(path, config, ranks, memory=None, trained=False, offload=False, lora=None):
    """
    Return, in place of fsdp_utils.build_model, diffusers' model as its users shard it, gathered in bf16: the policy
    checkpointed block by block, the reference in bf16.
    """
    from diffusers import WanTransformer3DModel

    class Peer(WanTransformer3DModel):
        def forward(self, x, timestep, context):
            inputs = {"hidden_states": x, "timestep": timestep, "encoder_hidden_states": context}
            return super().forward(**inputs, return_dict=False)[0]
    settings = public_config(config, "diffusers")
    torch.set_default_dtype(torch.float32 if trained else torch.bfloat16)
    model = Peer(**{name: value for name, value in settings.items() if name not in ("_class_name", "text_len")})
    torch.set_default_dtype(torch.float32)
    model.register_to_config(scores=False)                           # train.py asks for model.config.scores
    if trained:
        model.enable_gradient_checkpointing()
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=ranks.mesh, mp_policy=half)
    return fully_shard(model, mesh=ranks.mesh, mp_policy=half)


def steps_of(config, ranks):
    """Return [(what is new, flags)] of a table: bench.py's rungs, and those in between that only this table shows."""
    full = ("--checkpointing", "full")
    whole = (*full, "--chunk_tokens", "0")
    rows = [(PEER, whole)]                                           # its blocks know no chunks
    for new, flags in bench.rungs(ranks, config):
        if new == "FSDP":
            rows.append(("our blocks, off", flags))
        elif new == "full checkpointing":
            rows += [("full, blocks whole", whole), ("full", flags)]
        elif new.endswith("checkpointing"):
            rows.append((new.split()[0], flags))
        elif new.startswith("reference"):
            in_whole = (*whole, *flags[len(full):])
            rows += [(f"+ {new}, blocks whole", in_whole), (f"+ {new}", flags)]
        elif new.startswith("each"):
            rows.append((new, flags))
        else:
            rows.append((f"+ {new}", flags))
    if ranks == 8:
        wide = " ".join(rows[-2][1]).replace("--backward pair", "--backward sequential")
        wide = wide.replace("--cp_size 4", "--cp_size 8")
        rows.insert(-1, ("each video over 8 ranks, one branch at a time", tuple(wide.split())))
    return rows


def climb(name, ranks, guesses):
    """Print the table of one model, each row as it is found. guesses: {row: latent frames to begin the search at}."""
    words = ["--plan", "--model", name, "--ranks", str(ranks), "--size", "256", "512"]           # 512 tokens a frame
    args, _ = bench.parse_args(words)
    config, tokens_per_frame = args.config, token_count(args.config, args.at(1))
    print(f"\n## {name}, {ranks} GPU{'s' if ranks > 1 else ''} of {args.gpu_memory:g} GB\n")
    print(bench.table([], COLUMNS), flush=True)
    first = 0
    for row, (new, flags) in enumerate(steps_of(config, ranks)):
        all_flags = ("--ema_decay", "0", *flags)

        def plan(frames):
            return dry_run.extrapolate(all_flags, config, args.at(frames), ranks)

        def load(frames):
            return max(plan(frames).peak / args.budget, plan(frames).host / args.host_budget)

        def relative_time(frames):
            tokens = frames * tokens_per_frame
            seconds, needed_seconds = bench.estimate(plan(frames), all_flags, config, tokens, ranks)
            return seconds / needed_seconds
        with patch.object(fsdp_utils, "build_model", build_peer) if new == PEER else nullcontext():
            frames = bench.longest(load, guesses[row])
            first, longest_plan = first or frames, plan(frames)
            time_here, time_at_first = relative_time(frames), relative_time(first)
        dry_run.simulate.cache_clear()                               # diffusers' and ours have the same flags
        dry_run.extrapolate.cache_clear()
        step, tokens = dry_run.step_args(all_flags, ranks), frames * tokens_per_frame
        needed = step.batch_size * bench.step_flops(step, config, tokens, with_scoring=True)
        recomputed = longest_plan.flops * ranks - step.batch_size * bench.step_flops(step, config, tokens)
        traffic = longest_plan.gathered + longest_plan.exchanged
        clip = max(0, (tokens // 1560 - 1) * 4 + 1)
        cells = (new, tokens, f"{frames / first:.2f}", clip, f"{longest_plan.host / 1e9:.0f}",
                 f"{longest_plan.moved / 1e9:.0f}", f"{traffic / 1e9:.0f}", f"{1 + recomputed / needed:.2f}",
                 f"{time_here:.2f}", f"{time_at_first:.2f}", "" if new == PEER else " ".join(flags))
        print(bench.table_line(dict(zip(COLUMNS, cells)), COLUMNS), flush=True)


# what an earlier run found, in latent frames of 512 tokens: a search that begins near its end is short
GUESSES_14B = (50, 2, 8, 22, 33, 63, 133, 84, 166, 476, 953, 1907, 3633, 1560)
GUESSES_1_3B = (205, 11, 40, 130, 145, 350, 600, 320, 687, 2119, 1800)

if __name__ == "__main__":
    print(ABOUT)
    climb("wan2.1-t2v-14b", 8, GUESSES_14B)
    climb("wan2.1-t2v-1.3b", 1, GUESSES_1_3B)
    print(NOTES)
