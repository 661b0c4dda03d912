"""Nothing lost: exact resume, kills at any moment, full disks, signals, numbers that are none, checkpoints from strangers."""
import dataclasses
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import runs
import train
import train_spo
from data import open_data, order
from fsdp_utils import start_ranks
from model import CONFIGS, WanModel, save_wan
from runs import append_row, check_folder, find_checkpoint, load_checkpoint, report_skipped, save_checkpoint, stored_weights
from test_train import FORKS, in_rank, on_ranks, train_main, world  # noqa: F401  (world is a fixture)

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("memory_gib", "tokens_per_second")                                    # and seconds*: what may differ between two runs of the same steps


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A model so small that a step takes milliseconds, and one that judges."""
    torch.manual_seed(5)
    config = dataclasses.replace(CONFIGS["tiny"], dim=32, ffn_dim=64, num_layers=2, num_heads=2)
    model, judge = WanModel(config), WanModel(dataclasses.replace(config, scores=True))
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    torch.nn.init.normal_(judge.head.head, std=0.15)
    folder = tmp_path_factory.mktemp("base")
    save_wan(model, folder / "base")
    save_wan(judge, folder / "judge")
    return folder / "base"


def argv(world, base, out, flags):
    return ["--init", str(base), "--data", str(world / "data"), "--out", str(out), "--batch_size", "4", "--steps", "4", "--learning_rate", "1e-3", "--warmup_steps", "2",
            "--save_every", "2", "--keep", "9", "--min_timestep", "0", "--ema_decay", "0.9", *flags.split()]


def rows(out):
    strip = lambda row: {name: value for name, value in row.items() if name not in TIMES and not name.startswith("seconds")}
    return [strip(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()]


def everything(folder):
    """All that a checkpoint holds: {name: tensor or number}."""
    reader = runs.Reader(folder)
    state = {name: None if isinstance(entry, BytesStorageMetadata) else torch.empty(entry.size) for name, entry in reader.index.state_dict_metadata.items()}
    dcp.load(state, storage_reader=reader, planner=runs.Planner(flatten_state_dict=False), no_dist=True)
    return state


def go_back(out, to, step):
    """A copy of a run's folder as it was when it had just saved this step."""
    shutil.copytree(out, to)
    for folder in to.glob("step_*"):
        if folder.name > f"step_{step:06d}":
            shutil.rmtree(folder)
    (to / "latest").write_text(f"step_{step:06d}\n")
    return to


def same_end(one, other):
    """The same log, and the same weights, average and optimizer, to the last bit."""
    assert rows(one) == rows(other)
    last = (one / "latest").read_text().strip()
    assert last == (other / "latest").read_text().strip()
    a, b = everything(one / last), everything(other / last)
    assert a.keys() == b.keys() and {name.split(".")[0] for name in a} == {"model", "optimizer", "ema"}
    for name in a:
        assert torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name], name


# ------------------------------------------------------------------------------------------------------------------
# going on

SLOW = [(1, f"--loss {loss}") for loss in train.LOSS_FLAGS if loss not in ("sft", "sdpo")] + [
    (1, "--backward sequential --branch_norms"), (2, "--grad_accum 2"), (2, "--backward pair --ref cached"), (4, "--cp_size 2 --backward pair --checkpointing full")]


@pytest.mark.parametrize("ranks, flags", [(1, "--grad_accum 2 --ref cached"), (2, "--loss sdpo --backward pair"), (2, "--loss sft --cp_size 2 --caption_dropout 0.3 --decay_steps 3"),
                                          *[pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]])
def test_a_run_that_is_cut_and_goes_on_is_the_uncut_run_in_every_bit_of_log_weights_average_and_optimizer(world, base, tmp_path, ranks, flags):
    on_ranks(ranks, train_main, argv(world, base, tmp_path / "out", flags))
    go_back(tmp_path / "out", tmp_path / "cut", 2)
    on_ranks(ranks, train_main, argv(world, base, tmp_path / "cut", f"{flags} --resume latest"))
    same_end(tmp_path / "out", tmp_path / "cut")
    assert len(rows(tmp_path / "cut")) == 4
