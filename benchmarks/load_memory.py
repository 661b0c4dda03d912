"""
How much memory a rank takes while a large checkpoint is loaded (policy, reference and average, each read from the same files), and one process while
it exports what the ranks have saved.

    python benchmarks/load_memory.py --gib 1 --ranks 8 > benchmarks/load_memory.md

Writes a random float32 checkpoint in shards, starts the ranks on this machine (gloo) and lets each call train.build_model three times, as train.py does.
Two figures, because the files are mapped into memory: pages of a mapped file count as resident until the kernel wants them back, so VmHWM is an
upper bound; RssAnon, which is read every millisecond, is what the process has allocated itself and cannot be taken from it.
"""
import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import re
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
import weights
from fsdp_utils import start_ranks
from model import WanConfig, WanModel
from weights import save_wan

MIB = 2 ** 20


def status(field):
    """A field of this process's /proc status, in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


class Peak:
    """Growth while it is open: `anonymous` (peak RssAnon), `resident` (peak VmHWM), `held` (RssAnon at the end), in bytes."""
    def __enter__(self):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)                               # freed memory goes back, or its use again would not show as growth
        Path("/proc/self/clear_refs").write_text("5")                         # VmHWM starts anew
        self.before, self.open = (status("RssAnon"), status("VmRSS")), True
        self.anonymous, self.thread = 0, threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.open:
            self.anonymous = max(self.anonymous, status("RssAnon") - self.before[0])
            time.sleep(0.001)

    def __exit__(self, *error):
        self.open = False
        self.thread.join()
        self.held, self.resident = status("RssAnon") - self.before[0], status("VmHWM") - self.before[1]
        self.anonymous = max(self.anonymous, self.held)


def config_of(gib):
    """A model of about this size in float32: blocks of 64 MiB behind 50 MiB of everything else."""
    return WanConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=max(1, round((gib * 1024 - 50) / 64)), in_dim=16, out_dim=16)


def write_checkpoint(config, folder, shard_bytes):
    """Random weights, one tensor in memory at a time. Returns the bytes."""
    with torch.device("meta"):
        model = WanModel(config)
    save_wan(model, folder, max_shard_bytes=shard_bytes, read=lambda name: 0.02 * torch.randn(model.state_dict()[name].shape))
    return sum(4 * p.numel() for p in model.parameters())


def load(rank, world, port, init, saved=""):
    """On one rank: the three models that training holds. Returns {part: (anonymous, resident, held)} in bytes. saved: folder for a checkpoint of them."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks, args = start_ranks(), train.parse_args(["--init", init, "--loss", "sft"])
    config = weights.find_model(init)[0] if init != "scratch" else config_of(1)
    found, models = {}, []
    for part, options in (("policy", {}), ("reference, offloaded", {"offload": True}), ("average", {})):
        with Peak() as peak:
            models.append(train.build_model(args.init, config, ranks, **options))
        found[part] = (peak.anonymous, peak.resident, peak.held)
        if init == "scratch":
            break
    if saved:
        dcp.save({"model": get_model_state_dict(models[0]), "ema": get_model_state_dict(models[2])}, checkpoint_id=saved)
    dist.barrier()
    dist.destroy_process_group()
    return found


def export(folder):
    """Peak RssAnon, in bytes, of writing the average in folder/step as one ComfyUI file."""
    with Peak() as peak, contextlib.redirect_stdout(None):
        weights.export_weights(Path(folder, "step"), Path(folder, "export.safetensors"), "comfyui")
    return peak.anonymous


def on_ranks(pools, init, saved=""):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [job.result(timeout=300) for job in [pool.submit(load, rank, len(pools), port, init, saved) for rank, pool in enumerate(pools)]]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint")
    p.add_argument("--ranks", type=int, default=8)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        nbytes = write_checkpoint(config_of(args.gib), folder, 200 * MIB)
        pools = [ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) for _ in range(args.ranks)]
        found, files = on_ranks(pools, folder, f"{folder}/step"), len(list(Path(folder).glob("*.safetensors")))
        Path(folder, "step", "meta.json").write_text(json.dumps({"config": asdict(config_of(args.gib))}))
        exported = pools[0].submit(export, folder).result()
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    print(f"# Memory of a rank while a checkpoint is loaded\n\n`python benchmarks/load_memory.py --gib {args.gib:g} --ranks {args.ranks}`, torch {torch.__version__}, "
          f"Python {platform.python_version()}, {cpu}, {os.cpu_count()} cores\n")
    print(f"The checkpoint: {nbytes / MIB:.0f} MiB of float32 in {files} shards; one rank's share is {nbytes / MIB / args.ranks:.0f} MiB. Figures in MiB, growth over what the "
          "rank had before: the peak of what it allocated itself (RssAnon), the peak with mapped pages of the files (VmHWM; one copy serves all ranks, the kernel maps neighbours of what is read, and can take them back), and what stays.\n")
    print("| rank | " + " | ".join(f"{part}: RssAnon, VmHWM, stays" for part in found[0]) + " |\n| --- |" + " --- |" * len(found[0]))
    for rank, row in enumerate(found):
        print(f"| {rank} | " + " | ".join(", ".join(f"{value / MIB:.0f}" for value in figures) for figures in row.values()) + " |")
    worst = max(value[0] for row in found for value in row.values())
    print(f"\nLargest RssAnon peak of one load: {worst / MIB:.0f} MiB, {100 * worst / nbytes:.0f} % of the checkpoint.\n\nExport of the average from the step folder "
          f"of these {args.ranks} ranks to one ComfyUI file, float32, by one process: RssAnon peak {exported / MIB:.0f} MiB.")
    scratch = on_ranks(pools[:1], "scratch")[0]["policy"]
    print(f"\n`--init scratch` is another matter: every rank draws the whole model and then keeps its share. Peak for 1 GiB: {scratch[0] / MIB:.0f} MiB.")
    for pool in pools:
        pool.shutdown()


if __name__ == "__main__":
    main()
