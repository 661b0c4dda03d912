"""
The GPU's precision on CPUs: matrices in bf16 under sharding, on gloo ranks. Time, modulation, norms, residual stream,
head and errors stay float32, and policy and reference start equal in every mode and for every loss.
"""
import contextlib
import copy
import dataclasses
import json
import math

import pytest
import torch

import fsdp_utils
import ref_cache
import train
import train_spo
from conftest import four_steps, on_ranks, spo_main, train_main
from data import open_data
from fsdp_utils import shard_model, start_ranks
from memory import check_memory_flags
from model import CONFIGS, WanModel, timestep_embedding


@contextlib.contextmanager
def bf16_matrices():
    """Matrices in bf16 on CPUs, as on GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (fsdp_utils, ref_cache, train, train_spo):
            patch.setattr(module, "matrix_dtype", lambda device_type: torch.bfloat16)
        yield


def in_bf16(main, flags):
    with bf16_matrices():
        main(flags)


# ------------------------------------------------------------------------------------------------------------------
# what is float32

def test_the_embedding_of_a_timestep_is_computed_in_float64():
    # 999.3 in float32 is off by 2e-5, and so is its cosine; float64 keeps it to the last digit
    timestep = torch.tensor([999.3, 0.7], dtype=torch.float64)
    rows = timestep_embedding(timestep, 64)
    assert rows.dtype == torch.float64
    for row, value in zip(rows, timestep.tolist()):
        for i in range(32):
            angle = value * 10000 ** (-i / 32)
            assert row[i].item() == pytest.approx(math.cos(angle), abs=1e-12)
            assert row[32 + i].item() == pytest.approx(math.sin(angle), abs=1e-12)


def test_the_model_is_shown_that_embedding_rounded_once():
    model = WanModel(dataclasses.replace(CONFIGS["tiny"], num_layers=1))
    seen = []
    model.time_embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    timestep = torch.tensor([987.654, 998.7])
    model(torch.zeros(2, 12, 1, 2, 2), timestep, torch.zeros(2, 1, 32))
    [embedding] = seen
    assert embedding.dtype == torch.float32
    for row, value in zip(embedding, timestep.tolist()):
        angles = [value * 10000 ** (-i / 128) for i in range(128)]
        exact = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        assert (row - torch.tensor(exact)).abs().max() <= 6e-8                 # half a unit in the last place


def sharded_and_plain():
    """
    Velocities and gradients of a model sharded with bf16 matrices, and of the same model written down without sharding:
    all in bf16 but the timestep's path and the head, whose inputs are float32. Returns the relative differences.
    """
    config = dataclasses.replace(CONFIGS["tiny"], dim=64, ffn_dim=128, num_layers=2, in_dim=15, image_dim=8)
    torch.manual_seed(0)
    exact = WanModel(config)
    torch.nn.init.normal_(exact.head.head.weight, std=0.2)
    plain = copy.deepcopy(exact).bfloat16()
    for name in ("time_embedding", "time_projection", "head"):
        setattr(plain, name, copy.deepcopy(getattr(exact, name)))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 12, 2, 4, 4, generator=generator), torch.randn(2, 3, 2, 4, 4, generator=generator)
    context, features = torch.randn(2, 5, 32, generator=generator), torch.randn(2, 257, 8, generator=generator)
    inputs = (x, torch.tensor([987.654, 301.7]), context, y, features)
    with bf16_matrices():
        sharded = shard_model(copy.deepcopy(exact), start_ranks().mesh)
    v_exact, v_plain, v_sharded = (model(*inputs).detach() for model in (exact, plain, sharded))
    differences = [((v - v_exact).norm() / v_exact.norm()).item() for v in (v_plain, v_sharded)]
    sharded(*inputs).square().mean().backward()
    dtypes = {param.grad.dtype for param in sharded.parameters() if param.grad is not None}
    return torch.equal(v_plain, v_sharded), differences, dtypes


def test_sharding_rounds_matrices_to_bf16_and_no_inputs():
    for is_equal, (of_plain, of_sharded), dtypes in on_ranks(2, sharded_and_plain):
        assert is_equal and 1e-4 < of_sharded == of_plain < 1e-2
        assert dtypes == {torch.float32}


# ------------------------------------------------------------------------------------------------------------------
# the first margin

MODES = [
    (1, "--loss dpo"),
    (1, "--loss regdpo --checkpointing full"),
    (2, "--loss dpo_cm --backward sequential --checkpointing selective --threshold 0.5"),
    (2, "--loss sdpo --backward pair --ref cached"),
    (1, "--loss ipo --checkpointing chunked --chunk_tokens 5 --grad_accum 2"),
    (2, "--loss dpop --cp_size 2 --ref offload"),
    (1, "--loss diffusion_sdpo --backward sequential --offload_params"),
    (1, "--loss preference --checkpointing selective"),
]
@pytest.mark.parametrize("ranks, flags", MODES)
def test_policy_and_reference_start_equal_bit_for_bit_with_bf16_matrices(world, base, tmp_path, ranks, flags):
    on_ranks(ranks, in_bf16, train_main, four_steps(world, base, tmp_path / "out", f"{flags} --steps 2"))
    first, second = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert first["margin_abs"] == 0 and first["accuracy"] == 0.5
    assert second["margin_abs"] > 0 and math.isfinite(second["grad_norm"])


# A preference model's head starts at zero and so does its margin, whatever the path: it is not among these.
ERROR_LOSSES = [loss for loss in train.OBJECTIVES if loss not in ("sft", "preference")]


def margins_of_all_losses(argv):
    """{loss: margins (B,)} of one policy, where it is its reference, and after an update; the norm of its gradient."""
    with bf16_matrices():
        ranks, before, after = start_ranks(), {}, {}
        args = train.parse_args([*argv, "--loss", "dpo"])
        memory, config = check_memory_flags(args), train.open_model(args, needs_ref=True)
        policy = fsdp_utils.build_model(args.init, config, ranks, memory, trained=True)
        ref = fsdp_utils.build_model(args.init, config, ranks, memory).eval().requires_grad_(False)
        batch = train.read_batch(args, open_data(args.data, pairs=True), range(4), ranks.device)
        ref_or_errors = train.reference_errors(args, ref, batch, ranks) if args.ref == "cached" else ref
        for margins in (before, after):
            for loss in ERROR_LOSSES:
                args = train.parse_args([*argv, "--loss", loss])
                margins[loss] = train.backward_batch(args, policy, ref_or_errors, batch, 1.0, ranks)["margin"]
            norm = fsdp_utils.clip_gradients(policy.parameters(), 1.0)
            torch.optim.SGD(policy.parameters(), lr=0.1).step()
        return before, after, norm


@pytest.mark.slow
@pytest.mark.parametrize("mode", [
    "", "--backward sequential --ref cached", "--checkpointing full --offload_activations",
    "--checkpointing chunked --chunk_tokens 5 --ref cached", "--checkpointing selective"])
def test_every_loss_starts_at_margins_of_exactly_0_in_every_mode_with_bf16_matrices(world, base, tmp_path, mode):
    argv = four_steps(world, base, tmp_path / "out", mode)
    [(before, after, norm)] = on_ranks(1, margins_of_all_losses, argv)
    for loss in ERROR_LOSSES:
        assert not before[loss].any() and after[loss].all(), loss
    assert math.isfinite(norm)


def test_spo_starts_at_a_margin_of_exactly_0_with_bf16_matrices(world, base, tmp_path):
    flags = f"""--init {base} --score {base.parent / "judge"} --data {world / "data" / "real"} --out {tmp_path / "out"}
        --batch_size 2 --steps 1 --sample_steps 5 --pool 2 --threshold 0 --updates 2 --checkpointing full"""
    on_ranks(2, in_bf16, spo_main, flags.split())
    row = json.loads((tmp_path / "out" / "log.jsonl").read_text())
    assert row["first_margin"] == 0 and row["pairs"] == 6 and row["margin_abs"] > 0
