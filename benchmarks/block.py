"""
The memory and time of one forward and backward of the policy, compared with diffusers' and DiffSynth's Wan models with
the same weights in the same process.

    OMP_NUM_THREADS=1 python benchmarks/block.py > benchmarks/block_cpu.md

Needs diffusers 0.42 and diffsynth 2.1.12 (pip install --no-deps). Bytes and FLOPs are counted at the real sizes, on
fake tensors; process time, which other jobs on the machine hardly change, is measured at small ones. gpu.py measures
the same models on a GPU.
"""
import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from dry_run import Live, kept_for_backward
from memory import MemoryFlags, save_memory
from model import CONFIGS, WanConfig, WanModel
from weights import ORIGINAL_NAMES, public_config, rename

T2V = dict(in_dim=16, out_dim=16)
CLIP = (21, 60, 104)                  # latents of 81 frames at 480 x 832: 32,760 tokens
SIZES = {                             # config, latents (frames, height, width)
    "1.3b": (CONFIGS["wan2.1-t2v-1.3b"], CLIP),
    "1.3b short": (CONFIGS["wan2.1-t2v-1.3b"], (5, 60, 104)),                  # 7,800 tokens
    "14b": (CONFIGS["wan2.1-t2v-14b"], CLIP),
    "mini": (WanConfig(dim=512, ffn_dim=2048, num_heads=4, num_layers=4, **T2V), (5, 32, 32)),             # 1,280
    # FFN and attention in proportion as in 1.3b: 5,460 tokens
    "like 1.3b": (WanConfig(dim=256, ffn_dim=1493, num_heads=2, num_layers=1, **T2V), (7, 60, 52)),
}
MODES = {
    "off": MemoryFlags(),
    "selective": MemoryFlags("selective"),
    "chunked": MemoryFlags("chunked"),
    "full": MemoryFlags("full", 0),
    "full in chunks": MemoryFlags("full"),
}


# ----------------------------------------------------------------------------------------------------------------------
# the three models: build(config, mode) -> module, forward(x, timestep, context)

def ours(config, mode, compiled=False):
    model = WanModel(config)
    torch.nn.init.normal_(model.head.head.weight, std=0.02)          # a new model's is zero, and zeros are faster
    save_memory(model, replace(MODES[mode], compile=compiled), trained=True)
    return model, model


def ours_compiled(config, mode):
    return ours(config, mode, compiled=True)


def diffusers(config, mode):
    from diffusers import WanTransformer3DModel
    settings = public_config(config, "diffusers")
    settings = {name: value for name, value in settings.items() if name not in ("_class_name", "text_len")}
    model = WanTransformer3DModel(**settings)
    if mode == "full":
        model.enable_gradient_checkpointing()

    def forward(x, timestep, context):
        return model(x, timestep, context, return_dict=False)[0]
    return model, forward


def diffsynth(config, mode):
    """Only the file of the DiT is imported: the package itself needs more packages."""
    if "diffsynth" not in sys.modules:
        root = Path(importlib.util.find_spec("diffsynth").origin).parent
        for name, folder in (("diffsynth", ""), ("diffsynth.core", "core"), ("diffsynth.models", "models")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(root / folder)]
    dit = importlib.import_module("diffsynth.models.wan_video_dit")
    gradient = importlib.import_module("diffsynth.core.gradient")
    names = ("dim", "in_dim", "ffn_dim", "out_dim", "text_dim", "freq_dim", "eps", "patch_size", "num_heads",
             "num_layers")
    model = dit.WanModel(**{name: getattr(config, name) for name in names}, has_image_input=False)

    def forward(x, timestep, context):                     # as its pipeline does for text-to-video; WanModel's raises
        time_emb = model.time_embedding(dit.sinusoidal_embedding_1d(model.freq_dim, timestep).to(x.dtype))
        time_mod = model.time_projection(time_emb).unflatten(1, (6, model.dim))
        context, x = model.text_embedding(context), model.patchify(x)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2).contiguous()
        tables = []
        for axis, (table, size) in enumerate(zip(model.freqs, grid)):
            shape = [1, 1, 1, -1]
            shape[axis] = size
            tables.append(table[:size].view(shape).expand(*grid, -1))
        table = torch.cat(tables, dim=-1).flatten(0, 2)[:, None].to(x.device)
        for block in model.blocks:
            x = gradient.gradient_checkpoint_forward(block, mode == "full", False, x, context, time_mod, table)
        return model.unpatchify(model.head(x, time_emb), grid)
    return model, forward


PEERS = {name: build for name, build in (("diffusers", diffusers), ("DiffSynth", diffsynth))
         if importlib.util.find_spec(name.lower())}
ALL = {"ours": ours} | PEERS


def installed():
    """Return {package: version} of what is compared and installed."""
    names = [name for name in ("torch", "diffusers", "diffsynth") if importlib.util.find_spec(name)]
    return {name: importlib.metadata.version(name) for name in names}


def inputs(latents, device="cpu", dtype=torch.float32, config=SIZES["1.3b"][0]):
    """Return (x, timestep, context) of one video, and a target; latents (F, H, W)."""
    def randn(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)
    x, target = randn(1, config.in_dim, *latents), randn(1, config.out_dim, *latents)
    timestep = torch.full((1,), 500.0, device=device, dtype=torch.float32)           # whatever the default is
    return (x, timestep, randn(1, config.text_len, config.text_dim)), target


def step(forward, args, target):
    """Run one forward and backward and return the loss."""
    loss = F.mse_loss(forward(*args).float(), target.float())
    loss.backward()
    return loss.item()


# ----------------------------------------------------------------------------------------------------------------------
# bytes and FLOPs

def counted(build, size, mode, layers, with_backward):
    """Return the bytes that `layers` layers keep for backward in bf16, and the FLOPs of forward and backward."""
    config, latents = SIZES[size]
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        model, forward = build(replace(config, num_layers=layers), mode)
        args, target = inputs(latents, dtype=torch.bfloat16)
        nbytes = kept_for_backward(model, lambda: forward(*args))
        with Live() as live:
            if with_backward:
                F.mse_loss(forward(*args).float(), target.float()).backward()
        torch.set_default_dtype(torch.float32)
    return nbytes, live.counts["flops"] + live.counts["square"]


def of_a_layer(build, size, mode, with_backward=False):
    """Return bytes kept per token, layer and channel, and the FLOPs of a layer."""
    config, latents = SIZES[size]
    two = counted(build, size, mode, 2, with_backward)
    four = counted(build, size, mode, 4, with_backward)
    nbytes, flops = ((more - fewer) / 2 for fewer, more in zip(two, four))
    tokens = config.count_tokens((config.out_dim, *latents))
    return nbytes / (tokens * config.dim), flops


def print_counts():
    print("Bytes that a layer keeps for backward per token and channel: bf16, one video of 81 frames at\n"
          "480 x 832 (32,760 tokens). The rows of FLOPs give a layer's forward and backward relative to off.\n")
    print("| | " + " | ".join(MODES) + " |\n| --- |" + " --- |" * len(MODES))
    for size in ("1.3b", "14b"):
        counts = {mode: of_a_layer(ours, size, mode, with_backward=True) for mode in MODES}
        print(f"| {size}, ours: bytes | " + " | ".join(f"{nbytes:.1f}" for nbytes, _ in counts.values()) + " |")
        off = counts["off"][1]
        print(f"| {size}, ours: FLOPs | " + " | ".join(f"{flops / off:.2f}" for _, flops in counts.values()) + " |")
        for name, build in PEERS.items():
            cells = [f"{of_a_layer(build, size, mode)[0]:.1f}" if mode in ("off", "full") else "" for mode in MODES]
            print(f"| {size}, {name}: bytes | " + " | ".join(cells) + " |", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# process time

def process_times(size, variants, rounds):
    """
    Run one forward and backward of each variant in turn, `rounds` times. variants: {name: (build, mode)}, all with the
    same weights. Returns {name: [seconds of process time]}, {name: loss}.
    """
    config, latents = SIZES[size]
    torch.manual_seed(0)
    state, (args, target) = ours(config, "off")[0].state_dict(), inputs(latents)
    models, seconds, losses = {}, {name: [] for name in variants}, {}
    for name, (build, mode) in variants.items():
        model, forward = build(config, mode)
        originals = {key: rename(key, ORIGINAL_NAMES) if build is diffusers else key for key in model.state_dict()}
        model.load_state_dict({key: state[original] for key, original in originals.items()}, strict=True)
        models[name] = model, forward
    for turn in range(rounds + 1):
        for name, (model, forward) in models.items():
            model.zero_grad(set_to_none=True)
            began = time.process_time()
            losses[name] = step(forward, args, target)
            if turn:                                       # the first warms up
                seconds[name].append(time.process_time() - began)
    return seconds, losses


def print_times(size, variants, rounds):
    config, latents = SIZES[size]
    tokens = config.count_tokens((config.out_dim, *latents))
    seconds, losses = process_times(size, variants, rounds)
    print(f"\nProcess time of forward and backward, float32, one thread, the same weights: {size} (width\n"
          f"{config.dim}, FFN {config.ffn_dim}, layers {config.num_layers}, {tokens:,} tokens), {rounds} rounds "
          "in turn.\n")
    print("| | median ms | ratio to ours, off: median (quartiles) | loss |\n| --- | --- | --- | --- |")
    for name in variants:
        ratios = [own / off for own, off in zip(seconds[name], seconds["ours, off"])]
        low, _, high = quantiles(ratios, n=4)
        print(f"| {name} | {1000 * median(seconds[name]):.0f} | {median(ratios):.3f} ({low:.3f} to {high:.3f}) | "
              f"{losses[name]:.6f} |", flush=True)


def main(rounds):
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    versions = ", ".join(f"{name} {version}" for name, version in installed().items())
    print("# Forward and backward of the Wan DiT\n")
    print(f"`OMP_NUM_THREADS=1 python benchmarks/block.py --rounds {rounds}` at {commit.stdout.strip()} on {cpu}, "
          f"{os.cpu_count()} cores; {versions}.\n")
    torch.set_num_threads(1)
    print_counts()
    modes = {f"ours, {mode}": (ours, mode) for mode in ("off", "selective", "chunked", "full")}
    peers_off = {f"{name}, off": (build, "off") for name, build in PEERS.items()}
    peers_full = {f"{name}, full": (build, "full") for name, build in PEERS.items()}
    compiled = {"ours, off, compiled": (ours_compiled, "off")}
    print_times("mini", modes | peers_off | peers_full | compiled, rounds)
    print_times("like 1.3b", modes | peers_off | compiled, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the process times")
    main(parser.parse_args().rounds)
