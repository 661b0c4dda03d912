"""
Plans and measures a training step: memory, FLOPs and seconds of train.py's own step.

    python benchmarks/bench.py --plan --ranks 8                # 14B: the first flags with which 81 frames fit
    python benchmarks/bench.py --plan --ranks 8 --size 720 1280 --backward pair --checkpointing full       # these flags
    python benchmarks/bench.py --plan --lora_rank 32 --gpu_memory 24     # adapters of 14B: the fastest flags that fit
    python benchmarks/bench.py --model tiny --checkpointing off + --checkpointing full      # measured, run by run
    python benchmarks/ladder.py                                # the longest video that fits, technique by technique
    python benchmarks/cards.py                                 # adapters on one card of 12 to 80 GB

A plan needs no GPU: the real step (train.py, fsdp_utils.py, memory.py, model.py) runs on fake tensors in a fake process
group, while every live storage is counted. Measuring starts train.py once for each "+"-separated set of flags, on
random weights, latents and text, never on zeros. GB are 1e9 bytes.
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
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from dry_run import conditions, extrapolate, step_args, token_count
from lora import find_layers
from memory import check_memory_flags, kept_bytes
from model import CONFIGS, WanModel
from samples import write_sample
from weights import save_wan

# by config.vae: pixels a latent along frames, height and width; and what a model is sampled at, frames, height, width
STRIDES = {"embedded": (1, 4, 4), "wan2.1": (4, 8, 8), "wan2.2": (4, 16, 16)}
CLIPS = {"embedded": (8, 32, 32), "wan2.1": (81, 480, 832), "wan2.2": (121, 704, 1280)}


# ----------------------------------------------------------------------------------------------------------------------
# clips and FLOPs

def latent_shape(config, frames, size):
    """Return the shape (C, F, H, W) of the latents of a clip of `frames` frames and of size (height, width) pixels."""
    stride = STRIDES[config.vae]
    multiples = [pixels * patch for pixels, patch in zip(stride[1:], config.patch_size[1:])]
    divides = (frames - 1) % stride[0] == 0 and all(n % multiple == 0 for n, multiple in zip(size, multiples))
    if min(frames, *size) < 1 or not divides:
        raise ValueError(f"--frames {frames} --size {size[0]} {size[1]}: expected 1 more than a multiple of "
                         f"{stride[0]} frames, and height and width multiples of {multiples[0]}")
    return config.out_dim, (frames - 1) // stride[0] + 1, size[0] // stride[1], size[1] // stride[2]


def forward_flops(config, tokens):
    """Return the FLOPs of matrix products and attention of one forward of one video; a multiply-add is 2."""
    dim, text = config.dim, config.text_len
    image = (config.image_pos_len or 257) if config.image_dim else 0
    block = 2 * tokens * (6 * dim * dim + 2 * dim * config.ffn_dim)            # q k v o, q o of cross-attention, ffn
    block += 4 * (text + image) * dim * dim                                    # k v of the context
    block += 4 * tokens * (tokens + text + image) * dim                        # scores, and their weighted sums
    patch = math.prod(config.patch_size)
    ends = 2 * tokens * dim * patch * (config.in_dim + config.out_dim) + 2 * text * dim * (config.text_dim + dim)
    time_path = 2 * dim * (config.freq_dim + dim + 6 * dim)
    return config.num_layers * block + ends + time_path + 2 * image * config.image_dim * (config.image_dim + dim)


def adapter_flops(args, config, tokens):
    """Return the FLOPs of the products of all adapters in one forward of one video."""
    with torch.device("meta"):
        model = WanModel(replace(config, num_layers=1))
    rows = {"k": config.text_len, "v": config.text_len}
    rows |= {"k_img": config.image_pos_len or 257, "v_img": config.image_pos_len or 257}
    flops = 0
    for name in find_layers(model, args.lora_targets):
        layer, attention = model.get_submodule(name), name.split(".")[-2]
        of_context = attention == "cross_attn" and name.split(".")[-1] in rows
        count = rows[name.split(".")[-1]] if of_context else tokens
        flops += 2 * count * args.lora_rank * (layer.in_features + layer.out_features)
    return config.num_layers * flops


def backward_flops(args, config, tokens):
    """
    Return the FLOPs of backward of one video without any recomputation. Each product has two gradients. With adapters
    the FLOPs of frozen weights are left out, and those of everything before the blocks: context, patches, time.
    """
    if not args.lora_rank:
        return 2 * forward_flops(config, tokens)
    dim, text = config.dim, config.text_len
    image = (config.image_pos_len or 257) if config.image_dim else 0
    block = 2 * tokens * (6 * dim * dim + 2 * dim * config.ffn_dim)            # of the inputs of frozen layers
    block += 2 * 4 * tokens * (tokens + text + image) * dim
    head = 2 * tokens * dim * math.prod(config.patch_size) * config.out_dim
    return config.num_layers * block + head + 2 * adapter_flops(args, config, tokens)


def step_flops(args, config, tokens, with_scoring=False):
    """
    Return the FLOPs of the gradient of one pair (sft: one video) without any recomputation: forward, backward, and
    another forward for a reference that is run. with_scoring: also if it was run before training.
    """
    runs_reference = args.loss not in ("sft", "preference") and (with_scoring or args.ref != "cached")
    adapters = adapter_flops(args, config, tokens) if args.lora_rank else 0
    flops = forward_flops(config, tokens) + adapters + backward_flops(args, config, tokens)
    if runs_reference:
        flops += forward_flops(config, tokens) + (adapters if args.init_lora else 0)
    return (1 if args.loss == "sft" else 2) * flops


# ----------------------------------------------------------------------------------------------------------------------
# plans

# What a second is taken to be good for, to compare techniques with: bf16 FLOPs in a long run of an H100, bytes over its
# PCIe link (half of what 16 lanes of generation 5 can) and over its NVLinks, and bytes of CPU memory of one of 8 ranks.
FLOPS, HOST, LINKS, CPU_MEMORY = 400e12, 25e9, 200e9, 25e9
MEMORY_FLAGS = ("--backward", "--checkpointing", "--chunk_tokens", "--cp_size", "--offload_activations",
                "--offload_params", "--ref", "--replicate")


def estimate(plan, flags, config, tokens, world):
    """
    Return (seconds of a step, seconds of its FLOPs without recomputation) under the assumptions above, including a
    reference that is scored before training. FSDP's gathers and all traffic with the CPU run in parallel with the
    arithmetic and cost nothing while they are shorter; the exchanges of context parallelism and AdamW on the CPU (28
    bytes a parameter) do not.
    """
    args = step_args(flags, world)
    share = args.batch_size / world                                            # of a pair, for each rank
    needed = share * step_flops(args, config, tokens, with_scoring=True)
    flops = plan.flops + needed - share * step_flops(args, config, tokens)
    in_parallel = max(flops / FLOPS, plan.moved / HOST, plan.gathered / LINKS)
    adamw = 28 * plan.learning / CPU_MEMORY if args.offload_params else 0
    return in_parallel + plan.exchanged / LINKS + adamw, needed / FLOPS


def rungs(ranks, config):
    """
    Return [(what is new, train.py's flags)], cheapest in time first. Each has what those before it have, except that
    there is one mode of checkpointing at a time.
    """
    ladder = [("FSDP", ())]
    for mode in ("selective", "chunked", "full"):
        ladder.append((f"{mode} checkpointing", ("--checkpointing", mode)))
    if ranks % 2 == 0:
        split = ("one branch a rank", "--backward pair")
    else:
        split = ("one branch at a time", "--backward sequential")
    cached = ("reference scored beforehand", "--ref cached")
    offloaded = ("kept activations on the CPU", "--offload_activations")
    for new, flags in (split, cached, offloaded):
        ladder.append((new, (*ladder[-1][1], *flags.split())))
    without_cp = ladder[-1][1]
    ranks_per_video = 2 if ranks % 2 == 0 else 1
    for cp_size in (2, 4, 8, 16):
        if config.num_heads % cp_size == 0 and ranks % (cp_size * ranks_per_video) == 0:
            ladder.append((f"each video over {cp_size} ranks", (*without_cp, "--cp_size", str(cp_size))))
    return [*ladder, ("weights and AdamW on the CPU", (*ladder[-1][1], "--offload_params"))]


# What a mode of checkpointing recomputes of each video, in forwards; memory.save_memory has the figures. Full
# checkpointing is there three times: with blocks whole, in chunks, and in small ones, which run a little slower.
RECOMPUTED = {("off",): 0, ("selective",): 0.1, ("chunked",): 0.4, ("full", "--chunk_tokens", "0"): 0.9, ("full",): 1.1,
              ("full", "--chunk_tokens", "2048"): 1.15}


def lora_choices(ranks):
    """
    Return the flags to try for adapters, as tuples of words, fastest first, assuming that transfers hide behind the
    arithmetic. Scoring the reference beforehand is not among them: the reference is the same model, and its forward
    takes less memory than the policy's backward.
    """
    splits = {"joint": 0, "pair": 0} if ranks % 2 == 0 else {"joint": 0, "sequential": 0.5}      # forwards of a video
    offloads = [(), ("--offload_params",), ("--offload_activations",), ("--offload_params", "--offload_activations")]
    choices = []
    for mode, recomputed in RECOMPUTED.items():
        for split, again in splits.items():
            for number, offload in enumerate(offloads):
                if "--offload_activations" in offload and mode[0] in ("off", "selective"):
                    continue                               # off would move hundreds of GB, selective cannot
                flags = ("--checkpointing", *mode, "--backward", split, *offload)
                choices.append((recomputed + again, number, len(choices), flags))
    return [choice[-1] for choice in sorted(choices)]


def least_bytes(flags, config, tokens, world):
    """
    Return (bytes of a card, bytes of CPU memory) that no step with adapters and these flags can do without, from
    formulas alone: the frozen matrices and what blocks keep for backward.
    """
    args = step_args(flags, world)
    with torch.device("meta"):
        model = WanModel(config)
    weights = 2 * sum(p.numel() for p in model.blocks.parameters()) / world
    adapted = [name.removeprefix("blocks.0.") for name in find_layers(model, args.lora_targets)]
    memory_flags = check_memory_flags(args)
    kept = kept_bytes(config, memory_flags, 2, set(adapted), args.lora_rank) * config.dim * config.num_layers
    kept *= tokens / args.cp_size * (2 if args.backward == "joint" and args.loss != "sft" else 1)
    kept *= 0.9                                            # the formula is an estimate
    card = (0 if args.offload_params else weights) + (0 if args.offload_activations else kept)
    return card, weights + kept - card


def first_that_fits(choices, config, shape, world, budget, host_budget):
    """
    Return the first flags of choices whose step fits into `budget` bytes of a card and host_budget of CPU memory; if
    none does, those that come closest.
    """
    closest, least_load = choices[-1], math.inf
    for flags in choices:
        card, host = least_bytes(flags, config, token_count(config, shape), world)
        if max(card / budget, host / host_budget) > 1:
            continue                                       # and no need to simulate it
        plan = extrapolate(flags, config, shape, world)
        load = max(plan.peak / budget, plan.host / host_budget)
        if load <= 1:
            return flags
        if load < least_load:
            closest, least_load = flags, load
    return closest


def longest(load, guess):
    """
    Return the largest n >= 1 with load(n) <= 1, up to a hundredth of it; 0 if there is none. load grows with n, nearly
    on a straight line. A guess that is right costs one call.
    """
    guess = max(2, guess)
    loads = {guess: load(guess)}
    if 0.99 < loads[guess] <= 1:
        return guess
    loads[guess // 2] = load(guess // 2)
    while True:
        fitting = sorted(n for n in loads if loads[n] <= 1)
        too_long = sorted(n for n in loads if loads[n] > 1)
        if fitting and too_long:
            low, high = fitting[-1], too_long[0]
        elif fitting:
            low, high = fitting[-2:]
        else:
            low, high = too_long[:2]
        n = int(low + (1 - loads[low]) * (high - low) / (loads[high] - loads[low]))
        if not fitting:
            n = max(1, min(n, low - 1))
        if n in loads:
            return n if fitting else 0
        loads[n] = load(n)
        if 0.99 < loads[n] <= 1:
            return n


def cell(value):
    """Return a value as a table shows it."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows, columns):
    """Return Markdown of rows [{column: value}]."""
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        lines.append([cell(row.get(name, "")) for name in columns])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_line(row, columns):
    """Return one line of table(), for rows that are printed one by one."""
    return table([row], columns).rsplit("\n", 1)[-1]


def make_plan(args, flags):
    """
    Print what a step with these flags takes; if none of them is about memory, with the first rung that fits. Then print
    the longest video that fits with them.
    """
    began = time.process_time()

    def plan_of(flags, shape=args.shape):
        return extrapolate(flags, args.config, shape, args.ranks)

    def load(plan):
        return max(plan.peak / args.budget, plan.host / args.host_budget)
    print(f"{args.model}, {args.describe(args.shape)}; {args.ranks} x {args.gpu_memory:g} GB, {args.margin:g} of it "
          f"left free; {args.host_memory:g} GB of CPU memory for each")
    is_open = not {word.split("=")[0] for word in flags} & set(MEMORY_FLAGS)
    if is_open and step_args(flags, args.ranks).lora_rank:
        choices = [(*flags, *more) for more in lora_choices(args.ranks)]
        flags = first_that_fits(choices, args.config, args.shape, args.ranks, args.budget, args.host_budget)
    elif is_open:
        choices = [(*flags, *more) for _, more in rungs(args.ranks, args.config)]

        def fits(i):
            return load(plan_of(choices[i])) <= 1
        first = bisect.bisect_left(range(len(choices) - 1), True, key=fits)    # the last one if no other fits
        flags = choices[first]
        if first:
            before = " ".join(choices[first - 1]) or "no flag"
            print(f"the rung before, {before}, takes {plan_of(choices[first - 1]).peak / 1e9:.1f} GB")
    step, plan = step_args(flags, args.ranks), plan_of(flags)
    seconds, needed_seconds = estimate(plan, flags, args.config, args.tokens, args.ranks)
    unit = "video" if step.loss == "sft" else "pair"
    launch = "python" if args.ranks == 1 else f"torchrun --nproc_per_node={args.ranks}"
    verdict = "fits" if load(plan) <= 1 else "does not fit"
    print(f"{launch} train.py --model {args.model} {' '.join(flags)}: {verdict}")
    parts = sorted(plan.parts.items(), key=lambda part: -part[1])
    print(f"    {plan.peak / 1e9:.2f} GB a rank at the peak: "
          + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts))
    print(f"    {plan.host / 1e9:.2f} GB of CPU memory for each rank; to and from it {plan.moved / 1e9:.3g} GB a step")
    needed = step_flops(step, args.config, args.tokens)
    with_recomputation = plan.flops * args.ranks / step.batch_size
    print(f"    a step of {step.batch_size} {unit}s: {needed / 1e15:.3g} PFLOP a {unit}, "
          f"{with_recomputation / 1e15:.3g} with what is recomputed; about {seconds:.3g} s at {FLOPS / 1e12:g} "
          f"TFLOP/s, {seconds / needed_seconds:.2f} times the time of the needed FLOPs alone")
    most = longest(lambda n: load(plan_of(flags, args.at(n))), args.shape[1])
    longest_video = args.describe(args.at(most)) if most else "none"
    print(f"    the longest video of this size that fits so: {longest_video}")
    print(f"({time.process_time() - began:.0f} s of one core)")


# ----------------------------------------------------------------------------------------------------------------------
# measuring

def ceiling(warm_up=2, timed=5):
    """
    Return the name of the device and the FLOP/s of one large matrix product in the dtype that train.py would use: bf16
    on a GPU, float32 on a CPU.
    """
    cuda = torch.cuda.is_available()
    size, dtype, device = (8192, torch.bfloat16, "cuda") if cuda else (2048, torch.float32, "cpu")
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(warm_up + timed):
        began = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return name, 2 * size ** 3 / statistics.median(seconds[warm_up:])


def write_weights(folder, config):
    """
    Write a model with random weights, drawn on the GPU where there is one. The head of a new model is zero, and a model
    whose output is zero would be faster than others.
    """
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = WanModel(config)
    nn.init.normal_(model.head.head.weight, std=0.02)
    save_wan(model.to(torch.bfloat16).cpu(), folder, dtype=torch.bfloat16)


def write_pairs(folder, config, shape, pairs):
    """Write random pairs in the folders that train.py reads."""
    torch.manual_seed(0)
    for kind in ("real", "negatives"):
        for i in range(pairs):
            inputs = {name: torch.randn(size) for name, size in conditions(config, shape).items()}
            path, text = folder / kind / f"{i:04d}.safetensors", torch.randn(config.text_len, config.text_dim)
            write_sample(path, torch.randn(shape), text, {}, **inputs)


def read_rows(path):
    """Return the complete rows of a log.jsonl that is being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def measure(args, folder, flags, batch_size):
    """
    Run train.py with these flags. Returns the rows of log.jsonl of the timed steps or, if it ended before them, the
    last line that it printed.
    """
    out = Path(tempfile.mkdtemp(dir=folder))
    launch = []
    if args.ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    script = [str(HERE.parent / "train.py")]
    if args.within:
        script = [str(HERE / "gpu.py"), "within", str(args.within), *script]
    last_step = args.warm_up + args.timed
    weights = args.weights or str(folder / "weights")
    command = [sys.executable, *launch, *script, "--model", args.model, "--init", weights,
               "--data", str(folder / "data"), "--out", str(out / "run"), "--steps", str(last_step + 1),
               "--batch_size", str(batch_size), "--ema_decay", "0", *flags]
    with open(out / "printed", "w") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
    rows = []
    try:                                                   # stopped before its last step, after which it would save
        while len(rows) < last_step and process.poll() is None:
            time.sleep(0.2)
            rows = read_rows(out / "run" / "log.jsonl")
    finally:
        process.kill() if args.ranks == 1 else process.terminate()             # torchrun passes a SIGTERM on
        process.wait()
    return rows[args.warm_up:] or (out / "printed").read_text().strip().rsplit("\n", 1)[-1]


def planned_gib(flags, config, shape, ranks):
    return extrapolate(("--ema_decay", "0", *flags), config, shape, ranks).peak / 2 ** 30


def time_runs(args, runs):
    """Run train.py with one set of flags after the other and print a row for each: time, memory and planned memory."""
    steps = [(flags, step_args(("--ema_decay", "0", *flags), args.ranks)) for flags in runs]     # refuses bad flags
    with multiprocessing.get_context("spawn").Pool(1) as pool:                 # a process that used a GPU keeps memory
        device, peak = pool.apply(ceiling)
    print(f"\n{device}: a matrix product reaches {peak / 1e12:.3g} TFLOP/s. {args.model}, {args.describe(args.shape)}; "
          f"{args.ranks} ranks\n")
    print(table([], TIMES), flush=True)
    spawn, has_plan = multiprocessing.get_context("spawn"), torch.cuda.device_count() or args.with_plan
    planners = max(1, (os.cpu_count() or 1) // 4)          # plans are made while the GPU measures
    with tempfile.TemporaryDirectory() as folder, spawn.Pool(planners) as pool:
        folder = Path(folder)
        plans = []
        for flags in runs if has_plan else ():             # a CPU's GiB are of the whole process
            plans.append(pool.apply_async(planned_gib, (flags, args.config, args.shape, args.ranks)))
        if not args.weights:
            with spawn.Pool(1) as writer:
                writer.apply(write_weights, (folder / "weights", args.config))
        write_pairs(folder / "data", args.config, args.shape, args.ranks)
        for number, (flags, step) in enumerate(steps):
            log = measure(args, folder, flags, step.batch_size)
            row = {"flags": " ".join(flags)}
            if isinstance(log, str):
                row["seconds"] = log
            else:
                seconds = statistics.median(line["seconds"] for line in log)
                speed = step.batch_size * step_flops(step, args.config, args.tokens) / args.ranks / seconds
                row |= {"seconds": seconds, "TFLOP/s": speed / 1e12, "MFU": speed / peak}
                row["GiB"] = max(line["memory_gib"] for line in log)
            if has_plan:
                row["planned GiB"] = plans[number].get()
                if "GiB" in row:
                    row["plan off by"] = f"{100 * (row['planned GiB'] / row['GiB'] - 1):+.1f} %"
            print(table_line(row, TIMES), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# command line

TIMES = ("flags", "seconds", "TFLOP/s", "MFU", "GiB", "planned GiB", "plan off by")
MEASURED = ("--checkpointing off", "--checkpointing selective", "--checkpointing chunked", "--checkpointing full",
            "--checkpointing full --backward sequential", "--checkpointing full --backward sequential --ref cached",
            "--checkpointing full --backward sequential --ref offload --offload_activations")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints the description as it stands, and the default of each flag."""


def parse_args(argv):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=Help, allow_abbrev=False,
        epilog="All other flags are train.py's; to measure several runs, put '+' between the flags of two runs.")
    add = p.add_argument
    add("--plan", action="store_true",
        help="print what one step needs and whether it fits; without flags about memory, the first ones that fit; "
             "of one model or, with --switch_every, of two experts, whose switch is not in the time")
    add("--model", default="auto", choices=["auto", *CONFIGS],
        help="auto: 14b to plan; to measure, 1.3b on a GPU and tiny on a CPU")
    add("--frames", type=int, default=0, help="frames of a clip; 0: the model's usual number")
    add("--size", type=int, nargs=2, default=(0, 0), metavar=("HEIGHT", "WIDTH"),
        help="height and width of a clip in pixels; 0 0: the model's usual size")
    add("--tokens", type=int, default=0,
        help="tokens of a video, instead of --frames and --size; of a clip, memory and FLOPs depend on its tokens only")
    add("--ranks", type=int, default=1, help="number of GPUs or, to measure without GPUs, of CPU processes")
    # of plans
    add("--gpu_memory", type=float, default=80.0, help="memory of a GPU in GB of 1e9 bytes (80 as sold: up to 85)")
    add("--margin", type=float, default=6.0,
        help="GB of it left free for what a plan does not see: CUDA, NCCL, cuBLAS and gaps between tensors")
    add("--host_memory", type=float, default=200.0, help="GB of CPU memory for each GPU (8 share 2 TB, less some)")
    # of measurements
    add("--warm_up", type=int, default=2, help="number of steps before the timed ones")
    add("--timed", type=int, default=5, help="number of timed steps, whose median is shown")
    add("--weights", default="", help="folder with weights to measure on; if empty, random ones")
    add("--within", type=float, default=0.0, help="GB of GPU memory that a run may take; 0: all")
    add("--with_plan", action="store_true", help="show the planned memory on a CPU too; a plan assumes bf16")
    args, flags = p.parse_known_args(argv)
    for flag in ("ranks", "gpu_memory", "margin", "host_memory", "frames", "tokens", "timed", "warm_up", "within"):
        least = 1 if flag in ("ranks", "timed") else 0
        if getattr(args, flag) < least:
            expected = "at least 1" if least else "0 or more"
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected {expected}")
    if args.margin >= args.gpu_memory:
        raise ValueError(f"--margin {args.margin:g} of --gpu_memory {args.gpu_memory:g} GB leaves nothing to plan with")
    if args.tokens and (args.frames or any(args.size)):
        raise ValueError(f"--tokens {args.tokens} replaces --frames and --size; give one of the two")
    if args.model == "auto":
        to_measure = "wan2.1-t2v-1.3b" if torch.cuda.device_count() else "tiny"
        args.model = "wan2.1-t2v-14b" if args.plan else to_measure
    args.config = CONFIGS[args.model]
    return with_clip(args), flags


def with_clip(args):
    """
    Fill in what follows from the clip: shape, tokens, at(n) -> the shape of n latent frames (or n tokens),
    describe(shape) -> text; and the budgets in bytes.
    """
    config = args.config
    frames, *size = CLIPS[config.vae]
    if all(args.size):
        size = args.size
    if args.tokens:
        args.shape = (config.out_dim, args.tokens, *config.patch_size[1:])
    else:
        args.shape = latent_shape(config, args.frames or frames, size)
    has_frames, stride = not args.tokens, STRIDES[config.vae][0]

    def at(n):
        return args.shape[0], n, *args.shape[2:]

    def describe(shape):
        tokens = f"{token_count(config, shape):,} tokens a video"
        if has_frames:
            return f"{(shape[1] - 1) * stride + 1:,} frames of {size[0]} x {size[1]} = {tokens}"
        return tokens
    args.at, args.describe = at, describe
    args.tokens = token_count(config, args.shape)
    args.budget = 1e9 * (args.gpu_memory - args.margin)
    args.host_budget = max(1.0, 1e9 * args.host_memory)    # one byte where there is none: loads are divided by it
    return args


def main(argv):
    args, flags = parse_args(argv)
    if args.plan:
        make_plan(args, tuple(flags))
        return
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    print(f"`python benchmarks/bench.py {' '.join(argv)}`: commit {commit or 'unknown'}, torch {torch.__version__}, "
          f"Python {platform.python_version()}")
    runs = " ".join(flags).split("+") if flags else MEASURED
    time_runs(args, [tuple(run.split()) for run in runs])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"bench.py: {error}")
