"""
Helpers that several test files share: folders of tiny models and pairs, runs on many ranks, the flow error as papers
write it.

Tests ask for fixtures by name; everything else is imported: `from conftest import run`. The trainers are imported
inside functions, so that a test of one file needs that file only.
"""
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# CPUs only: four ranks cannot share one GPU, and "bit for bit" is a promise of float32 on CPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from samples import write_sample, write_whole
from model import CONFIGS, WanModel
from weights import save_wan

torch.set_num_threads(1)                  # tiny tensors are far slower with more threads
SHAPE = (12, 3, 4, 6)                     # latents of `world`: 18 tokens


# ----------------------------------------------------------------------------------------------------------------------
# the flow error, plainly

def textbook_error(model, batch, side):
    """
    The flow error of a batch, written down without this project's code: err (B,), v_pred and v_target (B, C, F, H, W).

    side: "win" or "lose". Where the batch has a first_latent, as for Wan2.2 TI2V, the first frame is given clean:
    its tokens have timestep 0, and err, v_pred and v_target are those of the other frames.
    """
    sigma = batch["sigma"].view(-1, 1, 1, 1, 1)
    x_sigma = (1 - sigma) * batch[side] + sigma * batch["noise"]
    v_target = batch["noise"] - batch[side]
    timestep = 1000 * batch["sigma"]                                           # (B,)
    conditions = {name: batch[name] for name in ("y", "clip_features") if name in batch}
    if "first_latent" in batch:
        x_sigma[:, :, 0] = batch["first_latent"][:, :, 0]
        frames, height, width = x_sigma.shape[2:]
        frame_of_token = torch.arange(frames).repeat_interleave((height // 2) * (width // 2))
        timestep = timestep[:, None] * (frame_of_token > 0)                    # (B, L)
    v_pred = model(x_sigma, timestep, batch["context"], **conditions)
    if "first_latent" in batch:
        v_pred, v_target = v_pred[:, :, 1:], v_target[:, :, 1:]
    err = ((v_pred - v_target) ** 2).mean(dim=(1, 2, 3, 4))
    return err, v_pred, v_target


def pair_loss(args, err_win, err_lose, ref_err_win, ref_err_lose, sigma, outputs=()):
    """The objective that --loss names, by train.py's table: errors (B,) -> losses (B,), metrics {name: (B,)}."""
    import train
    pair = train.Pair(err_win, err_lose, ref_err_win, ref_err_lose, sigma, outputs)
    return train.OBJECTIVES[args.loss].loss(args, pair)


# ----------------------------------------------------------------------------------------------------------------------
# files

def write_video(path, video, fps, upscale=1):
    """Write video (3, F, H, W) in [-1, 1] to an mp4 file."""
    from pictures import mp4
    write_whole(path, mp4(video, fps, upscale))


def write_png(path, image):
    """Write image (H, W, 3) uint8 to a PNG file."""
    from pictures import png
    write_whole(path, png(image))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a small random model, base/, whose velocity is not zero, and 24 GT-Pairs, data/."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = WanModel(CONFIGS["tiny"])
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    save_wan(model, folder / "base")
    for i in range(24):
        generator = torch.Generator().manual_seed(i)
        context = torch.randn(3 + i % 4, 32, generator=generator)
        for kind in ("real", "negatives"):
            latents = torch.randn(SHAPE, generator=generator)
            write_sample(folder / "data" / kind / f"{i:03d}.safetensors", latents, context, {"prompt": f"caption {i}"})
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a model whose steps take milliseconds; judge/ next to it is a preference model of that size."""
    torch.manual_seed(5)
    config = dataclasses.replace(CONFIGS["tiny"], dim=32, ffn_dim=64, num_layers=2, num_heads=2)
    model, judge = WanModel(config), WanModel(dataclasses.replace(config, scores=True))
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    torch.nn.init.normal_(judge.head.head, std=0.15)
    folder = tmp_path_factory.mktemp("base")
    save_wan(model, folder / "base")
    save_wan(judge, folder / "judge")
    return folder / "base"


@pytest.fixture(scope="session")
def spo_world(world, tmp_path_factory):
    """A smaller random base/, a preference model scorer/ of its blocks, and data/, the samples of `world`."""
    folder = tmp_path_factory.mktemp("spo")
    torch.manual_seed(3)
    config = dataclasses.replace(CONFIGS["tiny"], num_layers=2, dim=64, ffn_dim=128, num_heads=2)
    base, scorer = WanModel(config), WanModel(dataclasses.replace(config, scores=True))
    torch.nn.init.normal_(base.head.head.weight, std=0.05)
    blocks = {name: value for name, value in base.state_dict().items() if not name.startswith("head.")}
    scorer.load_state_dict(blocks, strict=False)                               # the two heads differ
    torch.nn.init.normal_(scorer.head.head, std=0.15)
    save_wan(base, folder / "base")
    save_wan(scorer, folder / "scorer")
    shutil.copytree(world / "data" / "real", folder / "data")
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# ranks: one process each, started when first used. Forked from a server that has imported torch but never run autograd:
# ranks forked after autograd has run would hang.

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo",
                              "einops", "safetensors.torch", "pytest"])
POOLS = [ProcessPoolExecutor(1, mp_context=FORKS) for _ in range(8)]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_rank(rank, world_size, port, function, arguments):
    """Run function(*arguments) in this process as one rank of a group. Returns what it returns."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        return function(*arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def on_ranks(ranks, function, *arguments):
    """Run function(*arguments), a module-level function, on this many ranks. Returns a list: what each rank returns."""
    port = free_port()
    jobs = [POOLS[rank].submit(in_rank, rank, ranks, port, function, arguments) for rank in range(ranks)]
    return [job.result(timeout=120) for job in jobs]


def start(ranks, function, *arguments):
    """Start function(*arguments) on this many ranks, in new processes that may be killed. Returns the processes."""
    port = free_port()
    processes = [FORKS.Process(target=in_rank, args=(rank, ranks, port, function, arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def finish(processes, seconds=60):
    """Exit codes of processes, which are killed if they have not ended after this many seconds."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def die_at(folder, change):
    """
    Kill -9 this process just before the `change`-th change of anything in folder:
    a file opened for writing, a rename, a removal, a new folder.
    """
    changes = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event not in changes or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        if seen == change:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


# ----------------------------------------------------------------------------------------------------------------------
# runs

def train_main(argv):
    import train
    train.main(train.parse_args(argv))


def spo_main(argv):
    import train_spo
    train_spo.main(train_spo.parse_args(argv))


def four_steps(world, base, out, flags):
    """
    Arguments of train.py: four steps of `base` on the pairs of `world`, two checkpoints. flags: further flags, in one
    string.
    """
    return ["--init", str(base), "--data", str(world / "data"), "--out", str(out), "--batch_size", "4", "--steps", "4",
            "--learning_rate", "1e-3", "--warmup_steps", "2", "--save_every", "2", "--keep", "9", "--min_timestep", "0",
            "--ema_decay", "0.9", *flags.split()]


def run(world, out, *flags, ranks=1):
    """Train on this many ranks. Returns the log rows, the exported weights, and the file of the weights before."""
    argv = ["--init", str(world / "base"), "--data", str(world / "data"), "--out", str(out), "--batch_size", "8",
            "--steps", "6", "--learning_rate", "2e-4", "--warmup_steps", "2", "--save_every", "3",
            "--max_grad_norm", "0.3", "--min_timestep", "0", "--ema_decay", "0", *flags]
    on_ranks(ranks, train_main, argv)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    exported = load_file(out / "export" / "diffusion_pytorch_model.safetensors")
    return rows, exported, world / "base" / "diffusion_pytorch_model.safetensors"


def flatten(tensors):
    """{name: tensor} as one vector in float64, in the order of the names."""
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def same_run(one, other, numbers=1e-3, weights=1e-4):
    """
    Assert that two results of run() have the same losses and final weights, within these relative tolerances.

    The change by training is compared as well: equal starts must not hide unequal steps.
    """
    assert [row["step"] for row in one[0]] == [row["step"] for row in other[0]]
    for a, b in zip(one[0], other[0]):
        has_pairs = "c_win" in a
        names = ["loss", "err_win", "grad_norm", "lr"]
        names += ["err_lose", "ref_err_win", "ref_err_lose", "c_win", "c_lose"] if has_pairs else []
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=numbers), (a["step"], name)
        for name in ("margin_min", "margin_max") if has_pairs else ():
            # Of one pair, and near 0 by chance: compared to the size of the margins; 30 * 1e-6 is beta times rounding.
            tolerance = numbers * b["margin_abs"] + 30 * 1e-6
            assert a[name] == pytest.approx(b[name], rel=0, abs=tolerance), (a["step"], name)
    a, b, base = flatten(one[1]), flatten(other[1]), flatten(load_file(other[2]))
    assert (a - b).norm() <= weights * b.norm()
    assert 1e-4 * base.norm() < (b - base).norm() and (a - b).norm() <= 1e-2 * (b - base).norm()


def one_step(world, out, *flags):
    """Arguments of train.py: one step of four pairs of `world`. flags: further flags, which take precedence."""
    return ["--init", str(world / "base"), "--data", str(world / "data"), "--out", str(out),
            "--steps", "1", "--batch_size", "4", *flags]


def main_fails(world, tmp_path, *flags):
    """The message of the ValueError that train.py raises with these flags, in this process."""
    with pytest.raises(ValueError) as error:
        train_main(one_step(world, tmp_path / "out", *flags))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return str(error.value)


def spo_fails(spo_world, tmp_path, *flags):
    """The message of the ValueError that train_spo.py raises with these flags in this process, before it writes."""
    argv = ["--init", str(spo_world / "base"), "--data", str(spo_world / "data"),
            "--score", str(spo_world / "scorer"), "--out", str(tmp_path / "out"),
            "--steps", "1", "--batch_size", "4", *flags]
    with pytest.raises(ValueError) as error:
        spo_main(argv)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert not (tmp_path / "out").exists()
    return str(error.value)
