"""
What a training step needs before it is run, and what it took: memory, FLOPs and seconds of train.py's own step.

    python benchmarks/bench.py --plan --ranks 8                                                        # 14B: the first flags with which 81 frames at 480 x 832 fit
    python benchmarks/bench.py --plan --ranks 8 --frames 81 --size 720 1280 --backward pair --checkpointing full          # these flags of train.py
    python benchmarks/bench.py --model tiny --checkpointing off + --checkpointing full                 # measured: starts train.py, once for each "+"-separated set of flags
    python benchmarks/ladder.py                                                             # the longest video that fits, with one technique after the other

A plan needs no GPU: the real step (train.py, fsdp_utils.py, model.py) runs on fake tensors in a fake process group, while every live storage is counted.
What is measured runs on random weights, latents and text, never on zeros. GB are 1e9 bytes.
"""
import argparse
import bisect
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from samples import write_sample
from model import CONFIGS, WanModel
from weights import save_wan
from dry_run import conditions, extrapolate, step_args, token_count

STRIDES = {12: (1, 4, 4), 16: (4, 8, 8), 48: (4, 16, 16)}     # channels of the latents: pixels a latent along frames, height and width (12: the embedded world)
CLIPS = {12: (8, 32, 32), 16: (81, 480, 832), 48: (121, 704, 1280)}                            # what a model is sampled at: frames, height, width


# ------------------------------------------------------------------------------------------------------------------
# clips and FLOPs

def latent_shape(config, frames, size):
    """Shape (C, F, H, W) of the latents of a clip of so many frames and of size (height, width) in pixels."""
    stride = STRIDES[config.out_dim]
    shape = ((frames - 1) // stride[0] + 1, size[0] // stride[1], size[1] // stride[2])
    if min(frames, *size) < 1 or (frames - 1) % stride[0] or any(pixels % (s * p) for pixels, s, p in zip(size, stride[1:], config.patch_size[1:])):
        raise ValueError(f"--frames {frames} --size {size[0]} {size[1]}: expected 1 more than a multiple of {stride[0]} frames, and height and width "
                         f"multiples of {stride[1] * config.patch_size[1]}")
    return config.out_dim, *shape


def forward_flops(config, tokens):
    """Matrix products and attention of one forward of one video, 2 for a multiplication with its addition."""
    d, text = config.dim, config.text_len
    image = (config.image_pos_len or 257) if config.image_dim else 0
    block = 2 * tokens * (6 * d * d + 2 * d * config.ffn_dim)                                   # q k v o, q o of cross-attention, ffn
    block += 4 * (text + image) * d * d + 4 * tokens * (tokens + text + image) * d              # k v of the context; scores and their sums
    ends = 2 * tokens * d * math.prod(config.patch_size) * (config.in_dim + config.out_dim) + 2 * text * d * (config.text_dim + d)
    time_path = 2 * d * (config.freq_dim + d + 6 * d)
    return config.num_layers * block + ends + time_path + 2 * image * config.image_dim * (config.image_dim + d)


def step_flops(args, config, tokens, beforehand=False):
    """
    What the gradient of one pair (sft: one video) costs without any recomputation: forward 1, backward 2, and 1 for a reference that is run; beforehand:
    also if it was run before training.
    """
    per_video = 3 + (args.loss not in ("sft", "preference") and (beforehand or args.ref != "cached"))
    return per_video * (1 if args.loss == "sft" else 2) * forward_flops(config, tokens)


# ------------------------------------------------------------------------------------------------------------------
# plans

# what a second is taken to be good for, to compare techniques with: bf16 FLOPs in a long run of an H100, bytes over its PCIe link (half of what 16 lanes of
# generation 5 can) and over its NVLinks, and bytes of CPU memory for each of 8 ranks
FLOPS, HOST, LINKS, CPU_MEMORY = 400e12, 25e9, 200e9, 25e9
MEMORY_FLAGS = ("--backward", "--checkpointing", "--chunk_tokens", "--cp_size", "--offload_activations", "--offload_params", "--ref", "--replicate")


def estimate(plan, flags, config, tokens, world):
    """
    (seconds of a step, seconds of its FLOPs without recomputation) under the assumptions above, a reference that is scored before training included.
    FSDP's gathers and all traffic with the host run beside the arithmetic and cost nothing while they are shorter; context parallelism's exchanges and
    AdamW on the CPU (28 bytes a parameter) run alone.
    """
    args = step_args(flags, world)
    share = args.batch_size / world                                                            # of a pair, for each rank
    needed = share * step_flops(args, config, tokens, beforehand=True)
    flops = plan.flops + needed - share * step_flops(args, config, tokens)
    beside = max(flops / FLOPS, plan.moved / HOST, plan.gathered / LINKS)
    return beside + plan.exchanged / LINKS + args.offload_params * 28 * plan.learning / CPU_MEMORY, needed / FLOPS


def rungs(ranks, config):
    """[(what is new, train.py's flags)], cheapest in time first. Each has what those before it have, but for checkpointing, of which there is one kind."""
    split = ("one branch a rank", "--backward pair") if ranks % 2 == 0 else ("one branch at a time", "--backward sequential")
    ladder = [("FSDP", ()), ("selective checkpointing", ("--checkpointing", "selective")), ("full checkpointing", ("--checkpointing", "full"))]
    for new, flags in (split, ("reference scored beforehand", "--ref cached"), ("tokens in chunks", "--chunk_tokens 8192"), ("kept activations on the CPU", "--offload_activations")):
        ladder.append((new, (*ladder[-1][1], *flags.split())))
    sizes = [n for n in (2, 4, 8, 16) if config.num_heads % n == 0 and ranks % (n * (2 - ranks % 2)) == 0]
    ladder += [(f"each video over {n} ranks", (*ladder[-1][1], "--cp_size", str(n))) for n in sizes]
    return [*ladder, ("weights and AdamW on the CPU", (*ladder[-1][1], "--offload_params"))]


def longest(load, guess):
    """The largest n >= 1 with load(n) <= 1, up to a hundredth of it; 0 if there is none. load grows with n, nearly on a straight line."""
    guess = max(2, guess)
    known = {n: load(n) for n in (guess // 2, guess)}
    while True:
        fit, beyond = sorted(n for n in known if known[n] <= 1), sorted(n for n in known if known[n] > 1)
        low, high = (fit[-1], beyond[0]) if fit and beyond else fit[-2:] if fit else beyond[:2]
        n = int(low + (1 - known[low]) * (high - low) / (known[high] - known[low]))
        n = n if fit else max(1, min(n, low - 1))
        if n in known:
            return n if fit else 0
        known[n] = load(n)
        if 0.99 < known[n] <= 1:
            return n


def table(rows, columns):
    """Markdown of rows [{column: value}]."""
    shown = lambda value: f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)
    lines = [list(columns), ["---"] * len(columns)] + [[shown(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def make_plan(args, flags):
    """Print what the step of these flags takes; if none of them is about memory, of the first rung that fits. Then the longest video that fits with them."""
    began = time.process_time()
    load = lambda plan: max(plan.peak / args.budget, plan.host / args.host_budget)
    print(f"{args.model}, {args.describe(args.shape)}; {args.ranks} x {args.gpu_memory:g} GB, {args.margin:g} of it left free; {args.host_memory:g} GB of CPU memory for each")
    if not {word.split("=")[0] for word in flags} & set(MEMORY_FLAGS):
        choices = [(*flags, *more) for _, more in rungs(args.ranks, args.config)]
        fits = lambda i: load(extrapolate(choices[i], args.config, args.shape, args.ranks)) <= 1
        first = bisect.bisect_left(range(len(choices) - 1), True, key=fits)                    # the last one is left if none of the others fits
        flags = choices[first]
        if first:
            print(f"the rung before, {' '.join(choices[first - 1]) or 'no flag'}, takes {extrapolate(choices[first - 1], args.config, args.shape, args.ranks).peak / 1e9:.1f} GB")
    step, plan = step_args(flags, args.ranks), extrapolate(flags, args.config, args.shape, args.ranks)
    seconds, needed = estimate(plan, flags, args.config, args.tokens, args.ranks)
    pair = "video" if step.loss == "sft" else "pair"
    launch = "python" if args.ranks == 1 else f"torchrun --nproc_per_node={args.ranks}"
    print(f"{launch} train.py --model {args.model} {' '.join(flags)}: " + ("fits" if load(plan) <= 1 else "does not fit"))
    print(f"    {plan.peak / 1e9:.2f} GB a rank at the peak: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sorted(plan.parts.items(), key=lambda part: -part[1])))
    print(f"    {plan.host / 1e9:.2f} GB on the host for each rank; to and from it {plan.moved / 1e9:.3g} GB a step")
    print(f"    a step of {step.batch_size} {pair}s: {step_flops(step, args.config, args.tokens) / 1e15:.3g} PFLOP a {pair}, {plan.flops * args.ranks / step.batch_size / 1e15:.3g} with what is "
          f"computed again; about {seconds:.3g} s at {FLOPS / 1e12:g} TFLOP/s, {seconds / needed:.2f} times what nothing but the needed FLOPs would take")
    most = longest(lambda n: load(extrapolate(flags, args.config, args.at(n), args.ranks)), args.shape[1])
    print("    the longest video of this size that fits so: " + (args.describe(args.at(most)) if most else "none"))
    print(f"({time.process_time() - began:.0f} s of one core)")


# ------------------------------------------------------------------------------------------------------------------
# measuring

WARM, TIMED = 2, 5                                                                             # steps


def ceiling():
    """(what runs here, the FLOP/s of one large matrix product in the dtype that train.py would use): bf16 on a GPU, float32 on a CPU."""
    cuda = torch.cuda.is_available()
    size, dtype, device = (8192, torch.bfloat16, "cuda") if cuda else (2048, torch.float32, "cpu")
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(WARM + TIMED):
        began = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return name, 2 * size ** 3 / statistics.median(seconds[WARM:])


def write_inputs(folder, config, shape, pairs):
    """Random weights and random pairs, as train.py reads them. The head starts at zero in a new model, and a model that says zero would be another one."""
    torch.manual_seed(0)
    model = WanModel(config)
    nn.init.normal_(model.head.head.weight, std=0.02)
    save_wan(model, folder / "weights", dtype=torch.bfloat16)
    for kind in ("real", "negatives"):
        for i in range(pairs):
            given = {name: torch.randn(size) for name, size in conditions(config, shape).items()}
            write_sample(folder / "data" / kind / f"{i:04d}.safetensors", torch.randn(shape), torch.randn(config.text_len, config.text_dim), {}, **given)


def measure(folder, model, flags, ranks, batch_size):
    """The rows of log.jsonl of the timed steps of a run of train.py with these flags, or the last line that it printed if it ended before them."""
    out = Path(tempfile.mkdtemp(dir=folder))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, str(HERE.parent / "train.py"), "--model", model, "--init", str(folder / "weights"), "--data", str(folder / "data"),
               "--out", str(out / "run"), "--steps", str(WARM + TIMED + 1), "--batch_size", str(batch_size), "--ema_decay", "0", *flags]
    rows, path = [], out / "run" / "log.jsonl"
    with open(out / "printed", "w") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
    try:
        while len(rows) < WARM + TIMED and process.poll() is None:                             # it is stopped before its last step, after which it would save
            time.sleep(0.2)
            rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    finally:
        process.terminate()                                                                    # torchrun passes it on
        process.wait()
    return rows[WARM:] or (out / "printed").read_text().strip().rsplit("\n", 1)[-1]


def time_runs(args, runs):
    """One run of train.py after the other, a row each: what a step took, what it held, and, on GPUs, what the plan says that it holds."""
    steps = [(flags, step_args(("--ema_decay", "0", *flags), args.ranks)) for flags in runs]   # a flag that train.py does not know is said here
    with multiprocessing.get_context("spawn").Pool(1) as pool:                                 # not here: a process that has used a GPU keeps memory of it
        device, peak = pool.apply(ceiling)
    print(f"{device}: a matrix product reaches {peak / 1e12:.3g} TFLOP/s. {args.model}, {args.describe(args.shape)}; {args.ranks} ranks")
    print(table([], TIMES), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), args.config, args.shape, args.ranks)
        for flags, step in steps:
            log = measure(Path(folder), args.model, flags, args.ranks, step.batch_size)
            row = {"flags": " ".join(flags)}
            if isinstance(log, str):
                row["seconds"] = log
            else:
                seconds = statistics.median(line["seconds"] for line in log)
                speed = step.batch_size * step_flops(step, args.config, args.tokens) / args.ranks / seconds
                row |= {"seconds": seconds, "TFLOP/s": speed / 1e12, "MFU": speed / peak, "GiB": max(line["memory_gib"] for line in log)}
            if torch.cuda.device_count():                                                      # on a CPU train.py computes in float32 and knows its whole size only
                row["planned GiB"] = extrapolate(("--ema_decay", "0", *flags), args.config, args.shape, args.ranks).peak / 2 ** 30
            print(table([row], TIMES).rsplit("\n", 1)[-1], flush=True)


# ------------------------------------------------------------------------------------------------------------------
# command line

TIMES = ("flags", "seconds", "TFLOP/s", "MFU", "GiB", "planned GiB")
MEASURED = ("--checkpointing off", "--checkpointing selective", "--checkpointing full", "--checkpointing full --backward sequential",
            "--checkpointing full --backward sequential --ref cached", "--checkpointing full --backward sequential --ref offload --offload_activations")


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                epilog="All other flags are train.py's; where runs are measured, '+' stands between the flags of one run and of the next.")
    p.add_argument("--plan", action="store_true", help="what one step needs, and whether it fits; without flags about memory, the first ones that do")
    p.add_argument("--model", default="auto", choices=["auto", *CONFIGS], help="auto: 14b to plan; to measure, 1.3b on a GPU and tiny on a CPU")
    p.add_argument("--frames", type=int, default=0, help="of a clip; 0: what the model is sampled at")
    p.add_argument("--size", type=int, nargs=2, default=(0, 0), metavar=("HEIGHT", "WIDTH"), help="in pixels; 0 0: what the model is sampled at")
    p.add_argument("--tokens", type=int, default=0, help="of a video, in the place of --frames and --size, which are all that memory and FLOPs hang on")
    p.add_argument("--ranks", type=int, default=1, help="GPUs (CPU processes, where something is measured without GPUs)")
    p.add_argument("--gpu_memory", type=float, default=80.0, help="GB of one GPU, of 1e9 bytes (what is sold as 80 has up to 85)")
    p.add_argument("--margin", type=float, default=6.0, help="GB of it for what a plan does not see: CUDA, NCCL and cuBLAS, and gaps between tensors")
    p.add_argument("--host_memory", type=float, default=200.0, help="GB of CPU memory for each GPU (8 share 2 TB, of which some is left)")
    args, flags = p.parse_known_args(argv)
    for flag in ("ranks", "gpu_memory", "margin", "host_memory", "frames", "tokens"):
        if getattr(args, flag) < (flag == "ranks"):
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected {'at least 1' if flag == 'ranks' else '0 or more'}")
    if args.margin >= args.gpu_memory:
        raise ValueError(f"--margin {args.margin:g} of --gpu_memory {args.gpu_memory:g} GB leaves nothing to plan with")
    if args.tokens and (args.frames or any(args.size)):
        raise ValueError(f"--tokens {args.tokens} stands in the place of --frames and --size; give one of the two")
    if args.model == "auto":
        args.model = "wan2.1-t2v-14b" if args.plan else "wan2.1-t2v-1.3b" if torch.cuda.device_count() else "tiny"
    args.config = CONFIGS[args.model]
    return with_clip(args), flags


def with_clip(args):
    """Fills in what follows from the clip: shape, tokens, at(n) -> the shape of n latent frames (or n tokens), describe(shape) -> text; and the budgets in bytes."""
    frames, *size = CLIPS[args.config.out_dim]
    size = args.size if all(args.size) else size
    args.shape = (args.config.out_dim, args.tokens, *args.config.patch_size[1:]) if args.tokens else latent_shape(args.config, args.frames or frames, size)
    in_frames, stride = not args.tokens, STRIDES[args.config.out_dim][0]
    args.at = lambda n: (args.shape[0], n, *args.shape[2:])
    args.describe = lambda shape: (f"{(shape[1] - 1) * stride + 1:,} frames of {size[0]} x {size[1]} = " if in_frames else "") + f"{token_count(args.config, shape):,} tokens a video"
    args.tokens = token_count(args.config, args.shape)
    args.budget, args.host_budget = 1e9 * (args.gpu_memory - args.margin), 1e9 * args.host_memory
    return args


def main(argv):
    args, flags = parse_args(argv)
    if args.plan:
        make_plan(args, tuple(flags))
    else:
        commit = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
        print(f"python benchmarks/bench.py {' '.join(argv)}: commit {commit}, torch {torch.__version__}, Python {platform.python_version()}")
        time_runs(args, [run.split() for run in " ".join(flags).split("+")] if flags else [run.split() for run in MEASURED])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"bench.py: {error}")
