"""
The parts of gpu.sh that are more than a command line. Every line is printed as soon as it is known; on a CPU all of it
runs at tiny sizes, to try it.

    python benchmarks/gpu.py ceilings                            versions, card, matrix product, copy, attention kernels
    python benchmarks/gpu.py rows CPU_LOG GPU_LOG                the first rows of two runs of train.py, compared
    python benchmarks/gpu.py margins MODEL                       margin of step 0 by attention kernel
    python benchmarks/gpu.py blocks SECONDS                      forward and backward by mode, next to diffusers
    python benchmarks/gpu.py inputs FOLDER MODEL FRAMES H W      random weights and pairs for the stages after this one
    python benchmarks/gpu.py clips FOLDER                        clips a minute, by the times of the files in it
    python benchmarks/gpu.py within GB SCRIPT ARGUMENTS          run a script that may take this much GPU memory
"""
import importlib.util
import json
import os
import platform
import runpy
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MATRICES = torch.bfloat16 if CUDA else torch.float32


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(function, warm_up=2, rounds=5):
    """Return the median of the seconds of `rounds` calls."""
    seconds = []
    for turn in range(warm_up + rounds):
        synchronize()
        began = time.perf_counter()
        function()
        synchronize()
        if turn >= warm_up:
            seconds.append(time.perf_counter() - began)
    return median(seconds)


def matrix_peak():
    """Return the FLOP/s of a matrix product in the dtype of the matrices, 8192^3 on a GPU."""
    size = 8192 if CUDA else 512
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=MATRICES)
    return 2 * size ** 3 / seconds_of(lambda: a @ b)


# ----------------------------------------------------------------------------------------------------------------------
# ceilings

def ceilings():
    card = torch.cuda.get_device_name() if CUDA else f"no GPU, {platform.processor() or platform.machine()}"
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    print(f"{card}; torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
          f"Python {platform.python_version()}, commit {commit.stdout.strip() or 'unknown'}, {os.cpu_count()} cores\n")
    print("| what | measured |\n| --- | --- |", flush=True)
    peak = matrix_peak()
    print(f"| matrix product, {MATRICES} | {peak / 1e12:.4g} TFLOP/s |", flush=True)
    source = torch.randn(2 ** 30 if CUDA else 2 ** 22, device=DEVICE)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_of(lambda: target.copy_(source))
    print(f"| copy on the device, read and written | {copied / 1e12:.3g} TB/s |", flush=True)
    if CUDA:
        host = torch.empty(2 ** 28, pin_memory=True)
        to_host = host.nbytes / seconds_of(lambda: host.copy_(source[:2 ** 28], non_blocking=True))
        print(f"| copy to pinned CPU memory | {to_host / 1e9:.3g} GB/s |", flush=True)
    del source, target
    attention_kernels(peak)


def attention_kernels(peak):
    """Self-attention of 1.3B, forward and backward, by each of SDPA's kernels."""
    for tokens in (7800, 32760) if CUDA else (64,):
        leaves = [torch.randn(1, 12, tokens, 128, device=DEVICE, dtype=MATRICES).requires_grad_() for _ in range(3)]
        flops = 3.5 * 4 * tokens ** 2 * 12 * 128
        for name, kernel in kernels():
            with kernel:
                try:
                    seconds = seconds_of(lambda: F.scaled_dot_product_attention(*leaves).sum().backward())
                except RuntimeError as error:
                    print(f"| attention, {tokens:,} tokens, {name} | {first_line(error)} |", flush=True)
                    continue
            print(f"| attention, {tokens:,} tokens, {name} | {1000 * seconds:.2f} ms, {flops / seconds / 1e12:.3g} "
                  f"TFLOP/s, {100 * flops / seconds / peak:.0f} % |", flush=True)


def kernels():
    """Return [(name, context in which SDPA uses it)]."""
    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION") if CUDA else ("FLASH_ATTENTION",)
    return [("SDPA's choice", nullcontext()), *((name, sdpa_kernel(getattr(SDPBackend, name))) for name in names)]


def first_line(text):
    lines = str(text).strip().splitlines() or ["no message"]
    return lines[0][:100].replace("|", "/")


# ----------------------------------------------------------------------------------------------------------------------
# does it run

def compare_rows(cpu_log, gpu_log):
    """The CPU computes in float32, the GPU in bf16: errors within 1e-3 relative, margins within 0.02."""
    rows = []
    for log in (cpu_log, gpu_log):
        lines = Path(log).read_text().splitlines() if Path(log).exists() else []
        rows.append({row["step"]: row for row in map(json.loads, lines)})
    steps = sorted(rows[0].keys() & rows[1].keys())
    if not steps:
        sys.exit(f"no common rows: {cpu_log} has {len(rows[0])}, {gpu_log} has {len(rows[1])}")
    print("| step | worst error, relative | margin, CPU | margin, GPU | difference | seconds, GPU |")
    print("| --- | --- | --- | --- | --- | --- |")
    worst_error = worst_margin = 0.0
    for number in steps:
        cpu, gpu = rows[0][number], rows[1][number]
        errors = [abs(gpu[name] / cpu[name] - 1) for name in ("err_win", "err_lose", "ref_err_win", "ref_err_lose")]
        difference = abs(gpu["margin"] - cpu["margin"])
        worst_error, worst_margin = max(worst_error, *errors), max(worst_margin, difference)
        print(f"| {number} | {max(errors):.1e} | {cpu['margin']:.4f} | {gpu['margin']:.4f} | {difference:.1e} | "
              f"{gpu['seconds']:.3f} |")
    verdict = "as expected" if worst_error < 1e-3 and worst_margin < 0.02 else "NOT as expected"
    print(f"\n{len(steps)} rows: errors within {worst_error:.1e} (expected 1e-3), margins within {worst_margin:.1e} "
          f"(expected 0.02): {verdict}")


def margins(model_name):
    """
    |margin| of step 0 at beta 1000, random weights, one pair, by attention kernel: policy with a graph against the
    reference as trained with, and against one that takes SDPA's path without a graph.
    """
    import train
    from fsdp_utils import shard_model, start_ranks
    from memory import MemoryFlags, save_memory
    from model import CONFIGS, WanModel, attention
    config, ranks = CONFIGS[model_name], start_ranks()
    latents = (config.out_dim, 8, 8, 8) if model_name == "tiny" else (config.out_dim, 5, 60, 104)
    models = []
    for trained in (True, False):
        torch.manual_seed(0)
        with ranks.device:
            model = WanModel(config)
            torch.nn.init.normal_(model.head.head.weight, std=0.02)
        save_memory(model, MemoryFlags(), trained)
        models.append(shard_model(model, ranks.mesh).requires_grad_(trained))
    policy, ref = models
    with torch.no_grad():
        for copied, original in zip(ref.parameters(), policy.parameters()):
            copied.to_local().copy_(original.to_local())
    batch = {name: torch.randn(1, *latents, device=ranks.device) for name in ("win", "lose", "noise")}
    batch["context"] = torch.randn(1, config.text_len, config.text_dim, device=ranks.device)
    batch["sigma"] = torch.full((1,), 0.9, device=ranks.device)
    print(f"\n{model_name}, {config.count_tokens(latents):,} tokens, matrices in {MATRICES}: |margin| of step 0 at "
          f"beta 1000\n\n| attention | as train.py computes it | the reference without a graph |\n| --- | --- | --- |")
    for name, kernel in kernels():
        cells = []
        with kernel:
            try:
                err_win, err_lose = [train.flow_errors(policy, train.branch(batch, side))[0].detach()
                                     for side in ("win", "lose")]
                for attend in (None, attention):
                    for block in ref.blocks if attend else ():
                        block.self_attn.attend = block.cross_attn.attend = attend
                    ref_win, ref_lose = train.both_errors(ref, batch)
                    cells.append(f"{1000 * ((err_win - ref_win) - (err_lose - ref_lose)).abs().item():.2e}")
            except RuntimeError as error:
                cells.append(first_line(error))
            for block, trained_block in zip(ref.blocks, policy.blocks):        # both have the seam of save_memory
                block.self_attn.attend = trained_block.self_attn.attend
                block.cross_attn.attend = trained_block.cross_attn.attend
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# forward and backward

# (tokens, model, mode, compiled), what is worth most first
LONG, SHORT = "1.3b", "1.3b short"
BLOCKS = [(LONG, "ours", "selective", False), (LONG, "diffusers", "full", False), (SHORT, "ours", "off", False),
          (SHORT, "diffusers", "off", False), (SHORT, "ours", "off", True), (LONG, "ours", "off", False),
          (LONG, "ours", "full", False), (LONG, "ours", "selective", True), (LONG, "ours", "chunked", False),
          (SHORT, "ours", "selective", False), (SHORT, "ours", "chunked", False), (SHORT, "ours", "full", False),
          (SHORT, "diffusers", "full", False), (LONG, "ours", "off", True), (LONG, "diffusers", "off", False),
          (SHORT, "ours", "selective", True), (SHORT, "ours", "chunked", True), (SHORT, "ours", "full", True)]
TRIED = [("mini", "ours", "off", False), ("mini", "ours", "selective", False)]           # on a CPU


def blocks(limit):
    """
    Run each configuration in a process of its own, so that each has its own memory peak, until `limit` seconds are
    over.
    """
    began, peak = time.monotonic(), None
    print("MFU: FLOPs of forward and backward, nothing recomputed, over the measured matrix product.\n")
    print("| tokens | | checkpointing | ms | GiB | TFLOP/s | MFU |\n| --- | --- | --- | --- | --- | --- | --- |")
    for size, name, mode, compiled in BLOCKS if CUDA else TRIED:
        left = limit - (time.monotonic() - began)
        if name != "ours" and not importlib.util.find_spec(name.lower()):
            print(f"| {size} | {name} | {mode} | not installed | | | |", flush=True)
            continue
        command = [sys.executable, __file__, "block", size, name, mode, "compiled" if compiled else "eager"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, left))
        except subprocess.TimeoutExpired:
            print(f"| {size} | {name} | {mode} | no time left for this and what comes after it | | | |", flush=True)
            return
        label = f"{name}, compiled" if compiled else name
        if done.returncode:
            errors = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            reason = "out of memory" if "OutOfMemoryError" in done.stderr else first_line(errors[-1])
            print(f"| {size} | {label} | {mode} | {reason} | | | |", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        peak = peak or row["peak"]
        print(f"| {row['tokens']:,} | {label} | {mode} | {1000 * row['seconds']:.0f} | {row['gib']:.1f} | "
              f"{row['flops'] / row['seconds'] / 1e12:.4g} | {100 * row['flops'] / row['seconds'] / peak:.0f} % |",
              flush=True)


def one_block(size, name, mode, compiled):
    """One configuration -> a line of JSON."""
    import bench
    import block
    config, latents = block.SIZES[size]
    build = block.ours_compiled if compiled == "compiled" else block.ALL[name]
    peak = matrix_peak()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    torch.set_default_dtype(MATRICES)
    with DEVICE:
        model, forward = build(config, mode)
    torch.set_default_dtype(torch.float32)
    args, target = block.inputs(latents, DEVICE, MATRICES)

    def forward_and_backward():
        model.zero_grad(set_to_none=True)
        block.step(forward, args, target)
    rounds = (1, 3) if size == LONG else (2, 5)            # a long one takes two seconds
    seconds = seconds_of(forward_and_backward, *(rounds if CUDA else (0, 1)))
    tokens = config.count_tokens((config.out_dim, *latents))
    gib = torch.cuda.max_memory_allocated() / 2 ** 30 if CUDA else 0.0
    print(json.dumps({"tokens": tokens, "seconds": seconds, "gib": gib, "peak": peak,
                      "flops": 3 * bench.forward_flops(config, tokens)}))


# ----------------------------------------------------------------------------------------------------------------------
# inputs, clips, limits

def write_inputs(folder, model_name, frames, height, width):
    import bench
    from model import CONFIGS
    config, folder = CONFIGS[model_name], Path(folder)
    bench.write_weights(folder / "weights", config)
    bench.write_pairs(folder / "data", config, bench.latent_shape(config, int(frames), (int(height), int(width))), 3)
    print(f"random weights of {model_name} and three pairs of {frames} frames at {height} x {width} in {folder}")


def clips_a_minute(folder):
    times = sorted(path.stat().st_mtime for path in Path(folder).glob("*.safetensors"))
    if len(times) < 2 or times[-1] == times[0]:
        print(f"{len(times)} clips in {folder}, in one moment: no rate")
        return
    print(f"{len(times)} clips, {60 * (len(times) - 1) / (times[-1] - times[0]):.3g} a minute after the first")


def within(gigabytes, script, *arguments):
    """GB of 1e9 bytes: torch raises OutOfMemoryError beyond, as on a card of that size."""
    if CUDA:
        share = float(gigabytes) * 1e9 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    parts = {"ceilings": ceilings, "rows": compare_rows, "margins": margins, "block": one_block, "inputs": write_inputs,
             "blocks": lambda limit: blocks(float(limit)), "clips": clips_a_minute, "within": within}
    if len(sys.argv) < 2 or sys.argv[1] not in parts:
        sys.exit(f"{__doc__}\ngot {sys.argv[1:]}, expected one of {', '.join(parts)}")
    parts[sys.argv[1]](*sys.argv[2:])
