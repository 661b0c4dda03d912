"""
What one policy forward and backward keeps and takes, beside diffusers' and DiffSynth's Wan models with the same weights in the same process.

    OMP_NUM_THREADS=1 python benchmarks/block.py > benchmarks/block_cpu.md       # needs diffusers 0.42, diffsynth 2.1.12 (pip install --no-deps)
    python benchmarks/block.py > benchmarks/block_cuda.md                        # on a GPU: what of them is installed

Without a GPU: bytes kept for backward at the real sizes (fake tensors, no arithmetic), and process time, which other jobs on the machine hardly change, at
small ones. With one: milliseconds, memory, TFLOP/s and MFU of 1.3B in bf16; each configuration in a process of its own.
"""
import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import types
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from memory import MemoryFlags, save_memory
from model import CONFIGS, WanConfig, WanModel
from weights import ORIGINAL_NAMES, public_config, rename
from dry_run import kept_for_backward

T2V = dict(in_dim=16, out_dim=16)
SIZES = {                             # config, latents (frames, height, width)
    "1.3b": (CONFIGS["wan2.1-t2v-1.3b"], (21, 60, 104)),                 # 81 frames at 480 x 832: 32,760 tokens
    "14b": (CONFIGS["wan2.1-t2v-14b"], (21, 60, 104)),
    "mini": (WanConfig(dim=512, ffn_dim=2048, num_heads=4, num_layers=4, **T2V), (5, 32, 32)),               # 1,280 tokens
    "like 1.3b": (WanConfig(dim=256, ffn_dim=1493, num_heads=2, num_layers=1, **T2V), (7, 60, 52)),           # 5,460 tokens: FFN and attention in proportion as above
}
MODES = {"off": MemoryFlags(), "selective": MemoryFlags("selective"), "chunked": MemoryFlags("chunked"), "full": MemoryFlags("full", 0)}


# ---------------------------------------------------------------------------------------------------------------------------------
# the three models: build(config, mode) -> module, forward(x, timestep, context)

def ours(config, mode, compiled=False):
    model = WanModel(config)
    torch.nn.init.normal_(model.head.head.weight, std=0.02)              # not zero, as at the start of training from scratch: zeros are computed faster
    save_memory(model, replace(MODES[mode], compile=compiled), trained=True)
    return model, model


def compiled(config, mode):
    return ours(config, mode, compiled=True)


def diffusers(config, mode):
    from diffusers import WanTransformer3DModel
    settings = {name: value for name, value in public_config(config, "diffusers").items() if name not in ("_class_name", "text_len")}
    model = WanTransformer3DModel(**settings)
    if mode == "full":
        model.enable_gradient_checkpointing()
    return model, lambda x, timestep, context: model(x, timestep, context, return_dict=False)[0]


def diffsynth(config, mode):
    """Only the file of the DiT is imported: the package itself asks for more than it."""
    if "diffsynth" not in sys.modules:
        root = Path(importlib.util.find_spec("diffsynth").origin).parent
        for name, folder in (("diffsynth", ""), ("diffsynth.core", "core"), ("diffsynth.models", "models")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(root / folder)]
    dit, gradient = importlib.import_module("diffsynth.models.wan_video_dit"), importlib.import_module("diffsynth.core.gradient")
    model = dit.WanModel(dim=config.dim, in_dim=config.in_dim, ffn_dim=config.ffn_dim, out_dim=config.out_dim, text_dim=config.text_dim, freq_dim=config.freq_dim,
                         eps=config.eps, patch_size=config.patch_size, num_heads=config.num_heads, num_layers=config.num_layers, has_image_input=False)

    def forward(x, timestep, context):                                   # as its pipeline does for text-to-video; WanModel.forward raises
        time_emb = model.time_embedding(dit.sinusoidal_embedding_1d(model.freq_dim, timestep).to(x.dtype))
        time_mod, context, x = model.time_projection(time_emb).unflatten(1, (6, model.dim)), model.text_embedding(context), model.patchify(x)
        f, h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2).contiguous()
        tables = [table[:size].view([size if i == axis else 1 for i in range(3)] + [-1]).expand(f, h, w, -1)
                  for axis, (table, size) in enumerate(zip(model.freqs, (f, h, w)))]
        table = torch.cat(tables, dim=-1).reshape(f * h * w, 1, -1).to(x.device)
        for block in model.blocks:
            x = gradient.gradient_checkpoint_forward(block, mode == "full", False, x, context, time_mod, table)
        return model.unpatchify(model.head(x, time_emb), (f, h, w))
    return model, forward


PEERS = {"diffusers": diffusers, "DiffSynth": diffsynth}
ALL = {"ours": ours} | PEERS


def installed():
    found = [name for name in ("torch", "diffusers", "diffsynth") if importlib.util.find_spec(name)]
    return {name: importlib.metadata.version(name) for name in found}


def inputs(latents, device="cpu", dtype=torch.float32):
    randn = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
    return (randn(1, 16, *latents), torch.full((1,), 500.0, device=device, dtype=torch.float32), randn(1, 512, 4096)), randn(1, 16, *latents)


def step(forward, args, target):
    loss = F.mse_loss(forward(*args).float(), target.float())
    loss.backward()
    return loss.item()


# ---------------------------------------------------------------------------------------------------------------------------------
# without a GPU

def kept_bytes(build, size, mode):
    """Bytes kept for backward in bf16 per token, layer and channel."""
    config, latents = SIZES[size]
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        model, forward = build(config, mode)
        args, _ = inputs(latents, dtype=torch.bfloat16)
        nbytes = kept_for_backward(model, lambda: forward(*args))
        torch.set_default_dtype(torch.float32)
    tokens = latents[0] * latents[1] * latents[2] // 4
    return nbytes / (tokens * config.num_layers * config.dim)


def process_times(size, variants, rounds):
    """variants {name: (build, mode)}, same weights. One forward and backward of each in turn, so many rounds -> {name: [seconds of process time]}, {name: loss}."""
    config, latents = SIZES[size]
    torch.manual_seed(0)
    state, (args, target) = ours(config, "off")[0].state_dict(), inputs(latents)
    models, seconds, losses = {}, {name: [] for name in variants}, {}
    for name, (build, mode) in variants.items():
        model, forward = build(config, mode)
        names = {key: rename(key, ORIGINAL_NAMES) if build is diffusers else key for key in model.state_dict()}
        model.load_state_dict({key: state[original] for key, original in names.items()}, strict=True)
        models[name] = model, forward
    for turn in range(rounds + 1):
        for name, (model, forward) in models.items():
            model.zero_grad(set_to_none=True)
            began = time.process_time()
            losses[name] = step(forward, args, target)
            if turn:                                                     # the first warms up
                seconds[name].append(time.process_time() - began)
    return seconds, losses


def on_cpu(rounds):
    print("Bytes kept for backward per token, layer and channel: bf16, one video of 81 frames at 480 x 832 (32,760 tokens).\n")
    print("| | " + " | ".join(MODES) + " |\n| --- |" + " --- |" * len(MODES))
    for size in ("1.3b", "14b"):
        for name, build in ALL.items():
            cells = [f"{kept_bytes(build, size, mode):.1f}" if name == "ours" or mode in ("off", "full") else "" for mode in MODES]
            print(f"| {size}, {name} | " + " | ".join(cells) + " |", flush=True)
    torch.set_num_threads(1)
    for size, variants in {
            "mini": {f"{name}, {mode}": (build, mode) for mode in ("off", "full") for name, build in ALL.items()},
            "like 1.3b": {f"{name}, off": (build, "off") for name, build in ALL.items()} | {"ours, selective": (ours, "selective")}}.items():
        variants |= {"ours, off, compiled": (compiled, "off")}
        config, (f, h, w) = SIZES[size]
        seconds, losses = process_times(size, variants, rounds)
        print(f"\nProcess time of forward and backward, float32, one thread, the same weights: {size} (width {config.dim}, FFN {config.ffn_dim}, {config.num_layers} layers, "
              f"{f * h * w // 4:,} tokens), {rounds} rounds in turn.\n")
        print("| | median ms | ratio to ours, off: median (quartiles) | loss |\n| --- | --- | --- | --- |")
        for name in variants:
            ratios = [mine / base for mine, base in zip(seconds[name], seconds["ours, off"])]
            low, _, high = quantiles(ratios, n=4)
            print(f"| {name} | {1000 * median(seconds[name]):.0f} | {median(ratios):.3f} ({low:.3f} to {high:.3f}) | {losses[name]:.6f} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------------------
# with one

def seconds_on_gpu(function, warm_up=2, rounds=5):
    times = []
    for turn in range(warm_up + rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times += [time.perf_counter() - began] if turn >= warm_up else []
    return median(times)


def matrix_peak():
    """FLOP/s of a bf16 matrix product of 8192^3, the most there is to reach."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192 ** 3 / seconds_on_gpu(lambda: a @ b)


def attention_backends(peak):
    """Forward and backward of self-attention of 1.3B through each of SDPA's kernels: attention() leaves the choice to SDPA."""
    print("| tokens | attention | ms | TFLOP/s | of the peak |\n| --- | --- | --- | --- | --- |")
    for tokens in (7800, 32760):
        q, k, v = (torch.randn(1, tokens, 12, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
        for name in ("SDPA's choice", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            with nullcontext() if name == "SDPA's choice" else sdpa_kernel(getattr(SDPBackend, name)):
                try:
                    seconds = seconds_on_gpu(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
                except RuntimeError as error:
                    print(f"| {tokens:,} | {name} | {str(error).splitlines()[0][:100]} | | |")
                    continue
            flops = 3.5 * 4 * tokens ** 2 * 1536
            print(f"| {tokens:,} | {name} | {1000 * seconds:.1f} | {flops / seconds / 1e12:.0f} | {100 * flops / seconds / peak:.0f} % |", flush=True)
    print()


def model_flops(config, tokens):
    """Of forward and backward, nothing recomputed."""
    d, text = config.dim, config.text_len
    layer = 2 * tokens * (6 * d * d + 2 * d * config.ffn_dim) + 4 * text * d * d + 4 * tokens ** 2 * d + 4 * tokens * text * d
    return 3 * config.num_layers * layer


def measure(name, mode, frames):
    """One configuration of 1.3B in bf16 -> JSON on stdout."""
    config, latents = CONFIGS["wan2.1-t2v-1.3b"], (frames, 60, 104)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model, forward = (compiled if name == "ours, compiled" else ALL[name])(config, mode)
    torch.set_default_dtype(torch.float32)
    args, target = inputs(latents, "cuda", torch.bfloat16)

    def once():
        model.zero_grad(set_to_none=True)
        step(forward, args, target)
    seconds, flops = seconds_on_gpu(once), model_flops(config, frames * 60 * 104 // 4)
    print(json.dumps({"ms": 1000 * seconds, "gib": torch.cuda.max_memory_allocated() / 2 ** 30, "tflops": flops / seconds / 1e12}))


def on_cuda():
    peak = matrix_peak()
    print(f"Peak of a bf16 matrix product (8192^3): {peak / 1e12:.0f} TFLOP/s. MFU: FLOPs of forward and backward, nothing recomputed, over that.\n")
    attention_backends(peak)
    torch.cuda.empty_cache()                                             # the processes below need the memory
    print("| tokens | | checkpointing | ms | GiB | TFLOP/s | MFU |\n| --- | --- | --- | --- | --- | --- | --- |")
    peers = [name for name in PEERS if name.lower() in installed()]
    for frames in (5, 21):
        for name, mode in [(name, mode) for name in ("ours", "ours, compiled") for mode in MODES] + [(name, mode) for name in peers for mode in ("off", "full")]:
            done = subprocess.run([sys.executable, __file__, "--one", json.dumps([name, mode, frames])], capture_output=True, text=True)
            line = f"| {frames * 1560:,} | {name} | {mode} | "
            if done.returncode:
                reason = "out of memory" if "OutOfMemoryError" in done.stderr else done.stderr.strip().splitlines()[-1][:100]
                print(line + f"{reason} | | | |", flush=True)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            print(line + f"{row['ms']:.0f} | {row['gib']:.1f} | {row['tflops']:.0f} | {100e12 * row['tflops'] / peak:.0f} % |", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--rounds", type=int, default=15, help="of the process times")
    p.add_argument("--one", default="", help="internal: one configuration on the GPU")
    args = p.parse_args()
    if args.one:
        measure(*json.loads(args.one))
    else:
        cuda = torch.cuda.is_available()
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
        hardware = torch.cuda.get_device_name() if cuda else f"{cpu}, {os.cpu_count()} cores"
        print(f"# Forward and backward of the Wan DiT\n\n`{'' if cuda else 'OMP_NUM_THREADS=1 '}python benchmarks/block.py --rounds {args.rounds}` at {commit} on {hardware}; "
              + ", ".join(f"{name} {version}" for name, version in installed().items()) + ".\n")
        on_cuda() if cuda else on_cpu(args.rounds)
