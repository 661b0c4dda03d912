"""
Measure the memory of a rank while it loads a large checkpoint (policy, reference and average, each from the same
files), and of one process while it exports what the ranks have saved.

    python benchmarks/load_memory.py --gib 1 --ranks 8 > benchmarks/load_memory.md

Writes a random float32 checkpoint in shards, starts the ranks on this machine (gloo), and lets each call
fsdp_utils.build_model three times, as train.py does. There are two figures, because the files are mapped into memory:
pages of a mapped file count as resident until the kernel wants them back, so VmHWM is an upper bound; RssAnon, read
every millisecond, is what the process has allocated itself and cannot be taken from it.
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
from fsdp_utils import build_model, start_ranks
from model import WanConfig, WanModel
from export import export_weights
from weights import open_wan, save_wan

MIB = 2 ** 20
OPTIONS = {"policy": {"trained": True}, "reference, offloaded": {"offload": True}, "average": {}}    # of build_model


def status(field):
    """A field of this process's /proc status, in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


class Peak:
    """Growth while it is open, in bytes: `anonymous` (peak RssAnon), `resident` (peak VmHWM), `held` (RssAnon, end)."""
    def __enter__(self):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)    # freed memory goes back, or using it again would not show as growth
        Path("/proc/self/clear_refs").write_text("5")                         # VmHWM starts from here
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
    """A model of about this size in float32: blocks of 64 MiB, and 50 MiB of everything else."""
    layers = max(1, round((gib * 1024 - 50) / 64))
    return WanConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=layers, in_dim=16, out_dim=16)


def write_checkpoint(config, folder, shard_bytes):
    """Write random weights, with one tensor in memory at a time. Returns the bytes."""
    with torch.device("meta"):
        model = WanModel(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    save_wan(model, folder, max_shard_bytes=shard_bytes, read=lambda name: 0.02 * torch.randn(shapes[name]))
    return sum(4 * p.numel() for p in model.parameters())


def load(rank, world_size, port, init, saved=""):
    """
    Load the three models that training holds, on one rank; with init "scratch", draw a model of 1 GiB.
    Returns {part: (anonymous, resident, held)} in bytes. saved: a folder to save a checkpoint of the models in.
    """
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = start_ranks()
    config = config_of(1) if init == "scratch" else open_wan(init)[0]
    figures, models = {}, {}
    for part in list(OPTIONS)[:1 if init == "scratch" else 3]:
        with Peak() as peak:
            models[part] = build_model(init, config, ranks, **OPTIONS[part])
        figures[part] = (peak.anonymous, peak.resident, peak.held)
    if saved:
        state = {"model": get_model_state_dict(models["policy"]), "ema": get_model_state_dict(models["average"])}
        dcp.save(state, checkpoint_id=saved)
    dist.barrier()
    dist.destroy_process_group()
    return figures


def export(folder):
    """Peak RssAnon, in bytes, of writing the average in folder/step as one ComfyUI file."""
    with Peak() as peak, contextlib.redirect_stdout(None):
        export_weights(Path(folder, "step"), Path(folder, "export.safetensors"), "comfyui")
    return peak.anonymous


def on_ranks(pools, init, saved=""):
    """The results of load() on the pools, one rank in each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    jobs = [pool.submit(load, rank, len(pools), port, init, saved) for rank, pool in enumerate(pools)]
    return [job.result(timeout=300) for job in jobs]


def mib(nbytes):
    return f"{nbytes / MIB:.0f}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint, in GiB")
    p.add_argument("--ranks", type=int, default=8, help="processes that load it")
    args = p.parse_args()
    spawn = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, mp_context=spawn) for _ in range(args.ranks)]
    with tempfile.TemporaryDirectory() as folder:
        nbytes = write_checkpoint(config_of(args.gib), folder, 200 * MIB)
        rows = on_ranks(pools, folder, f"{folder}/step")
        files = len(list(Path(folder).glob("*.safetensors")))
        Path(folder, "step", "meta.json").write_text(json.dumps({"config": asdict(config_of(args.gib))}))
        exported = pools[0].submit(export, folder).result()
    scratch = on_ranks(pools[:1], "scratch")[0]["policy"][0]
    for pool in pools:
        pool.shutdown()

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    worst = max(anonymous for row in rows for anonymous, _, _ in row.values())
    print(f"""# Memory of a rank while a checkpoint is loaded

`python benchmarks/load_memory.py --gib {args.gib:g} --ranks {args.ranks}`, torch {torch.__version__}, \
Python {platform.python_version()}, {cpu}, {os.cpu_count()} cores

The checkpoint: {mib(nbytes)} MiB of float32 in {files} shards; one rank's share is {mib(nbytes / args.ranks)} MiB. \
Figures in MiB, growth over what the rank had before: the peak of what it allocated itself (RssAnon), the peak with \
mapped pages of the files (VmHWM; one copy serves all ranks, the kernel maps neighbours of what is read, and can take \
them back), and what stays.

| rank | {" | ".join(f"{part}: RssAnon, VmHWM, stays" for part in rows[0])} |
| --- |{" --- |" * len(rows[0])}""")
    for rank, row in enumerate(rows):
        print(f"| {rank} | " + " | ".join(", ".join(map(mib, figures)) for figures in row.values()) + " |")
    print(f"""
Largest RssAnon peak of one load: {mib(worst)} MiB, {100 * worst / nbytes:.0f} % of the checkpoint.

Export of the average from the step folder of these {args.ranks} ranks to one ComfyUI file, float32, by one process: \
RssAnon peak {mib(exported)} MiB.

`--init scratch` is another matter: every rank draws the whole model and then keeps its share. \
Peak for 1 GiB: {mib(scratch)} MiB.""")


if __name__ == "__main__":
    main()
