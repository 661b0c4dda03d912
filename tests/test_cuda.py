"""
What only a GPU can show. This file runs by a command of its own, since conftest.py hides GPUs from the other tests:

    python -m pytest --noconftest tests/test_cuda.py
"""
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from memory import MemoryFlags, Offload, save_memory
from model import CONFIGS, WanConfig, WanModel
from samples import write_sample
from streaming import stream_blocks
from weights import save_wan

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU in sight (conftest.py hides them): run python -m pytest --noconftest tests/test_cuda.py")
MODES = [MemoryFlags("selective"), MemoryFlags("chunked", 100), MemoryFlags("full", 0), MemoryFlags("full", 100),
         MemoryFlags("full", 0, True), MemoryFlags("chunked", 100, True), MemoryFlags("off", -1, True)]
SMALL = WanConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=4, in_dim=16, out_dim=16, text_dim=64, text_len=32)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a random tiny model, base/, and 8 pairs, data/."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    model = WanModel(CONFIGS["tiny"])
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    save_wan(model, folder / "base")
    for kind in ("real", "negatives"):
        for i in range(8):
            path, latents = folder / "data" / kind / f"{i}.safetensors", torch.randn(12, 4, 8, 8)
            write_sample(path, latents, torch.randn(5, 32), {"prompt": f"caption {i}"})
    return folder


def train_rows(inputs, out, *flags, script=("train.py",)):
    """The rows of log.jsonl of a run of train.py in a process of its own. script: the command that starts it."""
    command = [sys.executable, *script, "--init", str(inputs / "base"), "--data", str(inputs / "data"),
               "--out", str(out), "--batch_size", "2", "--probe_every", "0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# train.py, where the tiny model is one of A14B's experts by its shape
TINY_A14B = ("-c", "import sys, model, train\n"
                   "model.CONFIGS['wan2.2-t2v-a14b'] = model.CONFIGS['tiny']\n"
                   "train.main(train.parse_args(sys.argv[1:]))")


@pytest.mark.parametrize("flags", [("--lora_rank", "4"), ("--ref", "cached")])
def test_experts_that_move_between_gpu_and_cpu_train_as_those_that_stay(inputs, tmp_path, flags):
    both = tmp_path / "both"
    for side in ("high_noise_model", "low_noise_model"):
        shutil.copytree(inputs / "base", both / "base" / side)
    shutil.copytree(inputs / "data", both / "data")
    flags = (*flags, "--flow_shift", "5", "--switch_every", "1", "--learning_rate", "1e-3", "--warmup_steps", "1")
    moved = train_rows(both, tmp_path / "moved", *flags, "--steps", "6", script=TINY_A14B)
    stayed = train_rows(both, tmp_path / "stayed", *flags, "--steps", "6", "--offload_params", script=TINY_A14B)
    train_rows(both, tmp_path / "cut", *flags, "--steps", "3", script=TINY_A14B)
    resumed = train_rows(both, tmp_path / "cut", *flags, "--steps", "6", "--resume", "latest", script=TINY_A14B)
    assert {row["expert"] for row in moved} == {"high_noise", "low_noise"}
    for other in (stayed, resumed):
        assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in moved], rel=1e-2)


def test_a_run_that_was_stopped_and_resumed_is_the_curve_of_one_that_was_not(inputs, tmp_path):
    whole = train_rows(inputs, tmp_path / "whole", "--steps", "6")
    train_rows(inputs, tmp_path / "parts", "--steps", "3")
    parts = train_rows(inputs, tmp_path / "parts", "--steps", "6", "--resume", "auto")
    assert [row["step"] for row in parts] == [row["step"] for row in whole]
    for one, other in zip(parts, whole):
        for name in ("err_win", "err_lose", "ref_err_win", "ref_err_lose"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)
        assert one["margin"] == pytest.approx(other["margin"], abs=0.02)


@pytest.mark.parametrize("flags", [(), ("--backward", "sequential"), ("--checkpointing", "selective"),
                                   ("--checkpointing", "chunked", "--chunk_tokens", "24"), ("--compile",)])
def test_the_margin_of_step_0_is_next_to_nothing(inputs, tmp_path, flags):
    rows = train_rows(inputs, tmp_path / "out", "--steps", "1", "--beta", "1000", *flags)
    assert abs(rows[0]["margin"]) < 0.02


def velocity_and_gradient(flags):
    """Velocity and gradient of all weights of one forward and backward in bf16, and the peak of memory in bytes."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = WanModel(SMALL)
        torch.nn.init.normal_(model.head.head.weight, std=0.05)
        x, context = torch.randn(1, 16, 8, 16, 16), torch.randn(1, 32, 64)
    model = model.bfloat16()
    save_memory(model, flags, trained=True)
    torch.cuda.reset_peak_memory_stats()
    velocity = model(x, torch.full((1,), 700.0, device="cuda"), context)
    velocity.square().mean().backward()
    gradient = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    return velocity.detach(), gradient, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("flags", MODES, ids=str)
def test_every_mode_gives_the_velocity_and_the_gradient_of_off_within_bf16(flags):
    velocity, gradient, _ = velocity_and_gradient(MemoryFlags())
    with_flags, gradient_with_flags, _ = velocity_and_gradient(flags)
    assert (with_flags - velocity).norm() < 1e-2 * velocity.norm()
    assert (gradient_with_flags - gradient).norm() < 3e-2 * gradient.norm()


def test_a_graph_and_none_give_the_same_velocity():
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = WanModel(SMALL)
        torch.nn.init.normal_(model.head.head.weight, std=0.05)
        x, context, timestep = torch.randn(1, 16, 8, 16, 16), torch.randn(1, 32, 64), torch.full((1,), 700.0)
    model = model.bfloat16()
    save_memory(model, MemoryFlags(), trained=False)
    in_training = model(x, timestep, context).detach()
    with torch.no_grad():
        assert torch.equal(model(x, timestep, context), in_training)


def test_offloaded_activations_take_pinned_memory_of_their_exact_size():
    buffer = Offload().take_buffer(142 * 2 ** 20 + 7)
    assert buffer.is_pinned() and buffer.nbytes == 142 * 2 ** 20 + 7


def test_copies_of_offloaded_activations_run_in_parallel_with_the_computation():
    offload, weight = Offload(), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    kept = torch.randn(2 ** 28, device="cuda", dtype=torch.bfloat16)           # 512 MiB: 10 to 20 ms of PCIe

    def seconds(copy, products):
        torch.cuda.synchronize()
        began = time.perf_counter()
        packed = offload.pack(kept) if copy else None
        for _ in range(products):
            weight @ weight
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - began
        if copy:
            assert torch.equal(offload.unpack(*packed), kept)
        return elapsed
    seconds(True, 20)                                                          # takes its buffer
    copy_alone, products_alone, both = (min(seconds(*case) for _ in range(3))
                                        for case in ((True, 0), (False, 20), (True, 20)))
    assert both < max(copy_alone, products_alone) + 0.4 * min(copy_alone, products_alone)


def small_model(device):
    torch.manual_seed(0)
    model = WanModel(SMALL)
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    return model.bfloat16().eval().requires_grad_(False).to(device)


def test_blocks_that_are_streamed_from_cpu_memory_give_the_velocity_in_every_bit():
    torch.manual_seed(1)
    inputs = (torch.randn(1, 16, 8, 16, 16, device="cuda"), torch.full((1,), 700.0, device="cuda"),
              torch.randn(1, 32, 64, device="cuda"))
    expected = small_model("cuda")(*inputs)
    model = small_model("cpu")
    blocks = list(model.blocks)
    stream_blocks(model, "blocks", torch.device("cuda"))
    for _ in range(3):
        assert torch.equal(model(*inputs), expected)
    assert all(p.is_pinned() for block in blocks for p in block.parameters())


def test_of_streamed_blocks_two_are_on_the_gpu():
    model = small_model("cpu")
    block_bytes = sum(p.nbytes for p in model.blocks[0].parameters())
    stream_blocks(model, "blocks", torch.device("cuda"))
    inputs = (torch.randn(1, 16, 1, 2, 2, device="cuda"), torch.full((1,), 700.0, device="cuda"),
              torch.randn(1, 32, 64, device="cuda"))
    model(*inputs)                                         # what cuBLAS keeps for itself is allocated now
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(*inputs)
    assert 2 * block_bytes <= torch.cuda.max_memory_allocated() - before < 3 * block_bytes
    assert torch.cuda.memory_allocated() == before
