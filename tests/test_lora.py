"""Adapters: their gradients, the reference inside the trained model, training with them, files of other trainers."""
import copy
import dataclasses
import json
import math
import re
import shutil
import struct
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import experts
import fsdp_utils
import memory
import train
from conftest import main_fails, on_ranks, pair_loss, run, spo_fails, spo_main, textbook_error, train_main
from data import open_data
from export import export_weights
from fsdp_utils import build_model, start_ranks
from lora import TARGETS, Average, LoraPlan, Reference, add_adapters, find_layers, initial_adapters, lora_layers
from lora_files import DIALECTS, Adapter, attach, check_adapters, merge_into, open_lora, open_lora_files, save_lora
from make_golden import diffusers_twin, make_case
from memory import MemoryFlags, check_memory_flags, save_memory
from model import CONFIGS, WanModel
from samples import read_sample
from weights import LORA_FORMATS, load_wan, main, parse_args, save_wan

CONFIG = dataclasses.replace(CONFIGS["tiny"], dim=32, ffn_dim=64, num_layers=2)
TARGETS_WITH_IMAGE = TARGETS + ",k_img,v_img"
MODES = ["off", "selective", "chunked", "full"]


def random_adapters(config, targets=TARGETS, rank=4, alpha=8.0, seed=0):
    """{layer: Adapter} with random matrices, neither of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = WanModel(config)
    adapters = {}
    for name in find_layers(model, targets):
        layer = model.get_submodule(name)
        A = torch.randn(rank, layer.in_features, generator=generator) / math.sqrt(layer.in_features)
        B = 0.2 * torch.randn(layer.out_features, rank, generator=generator)
        adapters[name] = Adapter(A, B, alpha)
    return adapters


def merged(model, adapters, strength=1.0):
    """A copy of a model with the adapters merged into its weights."""
    model = copy.deepcopy(model)
    state = model.state_dict()
    read = merge_into(state.get, [(adapters, strength)])
    model.load_state_dict({name: read(name) for name in state})
    return model


def equal_adapters(one, other):
    """Whether they are equal in every bit, names and scales included."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[layer].A[:], other[layer].A[:]) and torch.equal(one[layer].B[:], other[layer].B[:])
               and one[layer].alpha == other[layer].alpha for layer in one)


# ----------------------------------------------------------------------------------------------------------------------
# layers

@pytest.mark.parametrize("case", ["tiny", "ti2v", "i2v-clip"])
def test_a_model_with_fresh_adapters_is_its_base_in_every_bit(case):
    model, inputs, _ = make_case(case)
    before = model(**inputs)
    add_adapters(model, find_layers(model, TARGETS), rank=4)
    assert torch.equal(model(**inputs), before)
    assert all(layer.lora_A.weight.std() > 0 for layer in lora_layers(model).values())


def test_a_layer_adds_what_a_hand_computes():
    # y = x W^T + b + alpha / rank * (x A^T) B^T = (1 + 2) + 3 + 4 / 1 * (1 * 1 + 1 * 2) * 5 = 66
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(2, 1)})
    add_adapters(model, ["q"], rank=1, alpha=4.0)
    layer = model["q"]
    for weight, value in ((layer.weight, [[1.0, 2.0]]), (layer.bias, [3.0]), (layer.lora_A.weight, [[1.0, 2.0]]),
                          (layer.lora_B.weight, [[5.0]])):
        weight.data.copy_(torch.tensor(value))
    assert layer(torch.tensor([1.0, 1.0])).tolist() == [66.0]


def test_targets_name_layers_by_their_ends():
    with torch.device("meta"):
        model = WanModel(dataclasses.replace(CONFIG, in_dim=15, image_dim=8))
    assert find_layers(model, "self_attn.q,ffn.2") == [
        "blocks.0.self_attn.q", "blocks.0.ffn.2", "blocks.1.self_attn.q", "blocks.1.ffn.2"]
    assert len(find_layers(model, "q")) == 4 and len(find_layers(model, TARGETS)) == 2 * 10
    assert len(find_layers(model, TARGETS_WITH_IMAGE)) == 2 * 12
    for targets, bad in (("q,to_v", "to_v"), ("", ""), ("q,,k", ""), ("norm_q", "norm_q"), ("text_embedding.0", "te")):
        with pytest.raises(ValueError, match=f"--lora_targets {targets}: no layer of this model is called '{bad}"):
            find_layers(model, targets)


@pytest.mark.parametrize("case", ["tiny", "ti2v", "i2v-clip"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_weights_equal_the_adapters_forward_to_rounding(case, dtype, tolerance):
    model, inputs, _ = make_case(case)
    model, inputs = model.to(dtype), {name: value.to(dtype) for name, value in inputs.items()}
    targets = TARGETS_WITH_IMAGE if model.config.image_dim else TARGETS
    two = [(random_adapters(model.config, targets, rank=3, alpha=2.0), 0.7),
           (random_adapters(model.config, "q,ffn.0", seed=1), -0.4)]
    before = model(**inputs)
    expected = merged(merged(model, *two[0]), *two[1])(**inputs)
    attach(model, two)                                     # several on one layer
    result = model(**inputs)
    assert (expected - before).norm() > 0.05 * before.norm()
    assert (result - expected).norm() < tolerance * expected.norm()


def test_in_bf16_adapters_next_to_the_weights_keep_what_merging_loses():
    model, inputs, _ = make_case("tiny")
    adapters = random_adapters(model.config)
    small = {layer: dataclasses.replace(adapter, alpha=2e-3) for layer, adapter in adapters.items()}
    model = model.bfloat16()
    lost = merged(model, small).bfloat16().state_dict()
    unchanged = [torch.equal(lost[f"{layer}.weight"], model.state_dict()[f"{layer}.weight"]) for layer in small]
    assert sum(unchanged) < len(unchanged)                 # most numbers of a layer stay, few layers do as a whole
    attach(model, [(small, 1.0)])
    layer = lora_layers(model)["blocks.0.self_attn.q"]
    product = layer.lora_B.weight.float() @ layer.lora_A.weight.float()
    adapter = small["blocks.0.self_attn.q"]
    expected = adapter.scale * adapter.B @ adapter.A
    assert layer.lora_A.weight.dtype == torch.bfloat16 and (product - expected).norm() < 0.01 * expected.norm()


def test_an_adapter_of_a_layer_in_float32_is_refused_for_sampling_and_merged(tmp_path):
    model, inputs, _ = make_case("tiny")
    adapters = {"time_projection.1": Adapter(torch.randn(2, 128), torch.randn(768, 2), 2.0)}
    save_lora(tmp_path / "file", adapters)
    with pytest.raises(ValueError, match="time_projection.1 is for a layer that computes in float32; merge the file"):
        open_lora_files("--lora", [str(tmp_path / "file")], model.config)
    assert not torch.equal(merged(model, adapters)(**inputs), model(**inputs))


# ----------------------------------------------------------------------------------------------------------------------
# one model, which is policy and reference

def policy_with_initial(case, mode="off", chunk=-1, offload=False):
    """A model whose trained adapters differ from its initial ones, in float64; its inputs; gradient of the velocity."""
    model, inputs, grad = make_case(case)
    add_adapters(model, find_layers(model, TARGETS), rank=4, keep_initial=True)
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        for weight in (layer.lora_A.weight, layer.lora_B.weight, layer.initial_A.weight, layer.initial_B.weight):
            torch.nn.init.normal_(weight, std=0.1)
    model = model.double()
    save_memory(model, MemoryFlags(mode, chunk, offload), trained=True)
    return model, {name: value.double() for name, value in inputs.items()}, grad.double()


def gradients(model, loss):
    """{name: gradient} of the adapters."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@lru_cache
def undisturbed(case):
    """Velocity, gradients and reference's velocity without checkpointing, with nothing between forward and backward."""
    model, inputs, grad = policy_with_initial(case)
    velocity = model(**inputs)
    return velocity.detach(), gradients(model, (velocity * grad).sum()), Reference(model)(**inputs)


@pytest.mark.parametrize("case", ["tiny", "ti2v"])
@pytest.mark.parametrize("mode, chunk, offload", [
    ("off", -1, False), ("selective", -1, False), ("chunked", 20, False), ("chunked", 20, True), ("full", 0, False),
    ("full", 20, False), ("full", 20, True), ("off", -1, True)])
def test_neither_a_reference_in_between_nor_one_around_backward_confuses_what_is_recomputed(case, mode, chunk, offload):
    expected_velocity, expected, expected_ref = undisturbed(case)
    model, inputs, grad = policy_with_initial(case, mode, chunk, offload)
    reference = Reference(model)

    velocity = model(**inputs)
    ref_velocity = reference(**inputs)                     # between forward and backward
    in_between = gradients(model, (velocity * grad).sum())
    loss = (model(**inputs) * grad).sum()
    with initial_adapters(model):                          # around it
        around = gradients(model, loss)
        again = model(**inputs)
    assert not ref_velocity.requires_grad and not again.requires_grad
    assert torch.equal(ref_velocity, again) and not torch.equal(ref_velocity, velocity)
    assert (velocity - expected_velocity).norm() < 1e-12 * velocity.norm()
    assert (ref_velocity - expected_ref).norm() < 1e-12 * velocity.norm()
    for result in (in_between, around):
        assert result.keys() == expected.keys()
        for name in expected:
            assert (result[name] - expected[name]).norm() < 1e-12 * expected[name].norm(), name


def test_the_switch_nests_and_survives_an_error():
    model, inputs, _ = policy_with_initial("tiny")
    policy, ref = model(**inputs), Reference(model)(**inputs)
    with initial_adapters(model):
        assert torch.equal(Reference(model)(**inputs), ref)
        assert torch.equal(model(**inputs), ref)           # the inner one left the outer one on
    with pytest.raises(KeyError), initial_adapters(model):
        raise KeyError
    assert torch.equal(model(**inputs), policy)


def test_the_reference_of_fresh_adapters_is_the_base_wherever_training_went():
    model, inputs, _ = make_case("i2v-clip")
    before = model(**inputs)
    add_adapters(model, find_layers(model, TARGETS_WITH_IMAGE), rank=2)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight)
    assert not torch.equal(model(**inputs), before)
    assert torch.equal(Reference(model)(**inputs), before)


def test_an_average_is_called_like_the_model_and_leaves_the_trained_adapters_as_they_were():
    model, inputs, _ = policy_with_initial("tiny")
    velocity, average = model(**inputs), Average(model)
    assert torch.equal(average(**inputs), velocity)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    for copy_of_one in average.parameters():
        copy_of_one.mul_(0.5)                              # both factors: a quarter of the adapters' product
    state = model.state_dict() | {name: 0.5 * p for name, p in trained.items() if ".lora_" in name}
    averaged = average(**inputs)
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    with pytest.raises(TypeError):
        average(no_such_input=1)
    assert torch.equal(model(**inputs), velocity)
    model.load_state_dict(state)
    assert torch.equal(model(**inputs), averaged) and not torch.equal(averaged, velocity)


# ----------------------------------------------------------------------------------------------------------------------
# gradients

def arguments(flags=""):
    args = train.parse_args(["--loss", "regdpo", "--min_timestep", "300", "--batch_size", "4", *flags.split()])
    args.beta = 20.0
    return args


def double(batch):
    return {name: value.double() if torch.is_tensor(value) else value for name, value in batch.items()}


@pytest.fixture(scope="module")
def worked_out(world, tmp_path_factory):
    """
    A folder with a base, initial and trained adapters, and expected.pt: the gradients {parameter name: gradient} of
    Reg-DPO's mean over four pairs, worked out from the full gradients G of the merged weights W + scale * B A:

        dA = scale * B^T G        dB = scale * G A^T
    """
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(3)
    base = WanModel(CONFIG).double()
    torch.nn.init.normal_(base.head.head.weight, std=0.2)
    save_wan(base, folder / "base")
    initial, trained = random_adapters(CONFIG), random_adapters(CONFIG, seed=1)
    save_lora(folder / "initial.safetensors", initial)
    save_lora(folder / "trained.safetensors", trained)
    policy, ref = merged(base, trained), merged(base, initial)
    batch = double(train.read_batch(arguments(), open_data(world / "data", pairs=True), range(4), "cpu"))
    with torch.no_grad():
        ref_errors = [textbook_error(ref, batch, side)[0] for side in ("win", "lose")]
    errors = [textbook_error(policy, batch, side)[0] for side in ("win", "lose")]
    pair_loss(arguments(), *errors, *ref_errors, batch["sigma"])[0].mean().backward()
    expected = {}
    for layer, adapter in trained.items():
        G = policy.get_submodule(layer).weight.grad
        expected[f"{layer}.lora_A.weight"] = adapter.scale * adapter.B.double().T @ G
        expected[f"{layer}.lora_B.weight"] = adapter.scale * G @ adapter.A.double().T
    torch.save(expected, folder / "expected.pt")
    return folder


def worst_gradients(world, folder, many_flags):
    """For each of many_flags: the worst relative difference of an adapter's gradient on this rank, and other facts."""
    expected, results = torch.load(folder / "expected.pt"), []
    trained = open_lora(folder / "trained.safetensors")
    for flags in many_flags:
        args = arguments(flags)
        ranks = start_ranks(args.backward == "pair", args.cp_size, args.replicate)
        initial = open_lora(folder / "initial.safetensors")
        plan = LoraPlan(list(initial), 4, 8.0, initial)
        torch.set_default_dtype(torch.float64)
        try:
            policy = build_model(folder / "base", CONFIG, ranks, check_memory_flags(args), trained=True,
                                 offload=args.offload_params, lora=plan)
        finally:
            torch.set_default_dtype(torch.float32)
        parameters = dict(policy.named_parameters())
        for name in expected:
            layer, _, factor = name.removesuffix(".weight").rpartition(".")
            weight = {"lora_A": trained[layer].A, "lora_B": trained[layer].B}[factor]
            first, end = fsdp_utils.my_rows(parameters[name])
            with torch.no_grad():
                parameters[name].to_local().copy_(weight[first:end])
        per_rank = 4 // ranks.data_ranks
        positions = range(ranks.data_rank * per_rank, (ranks.data_rank + 1) * per_rank)
        batch = double(train.read_batch(args, open_data(world / "data", pairs=True), positions, "cpu"))
        train.backward_batch(args, policy, Reference(policy), batch, ranks.world / 4, ranks)
        differences = []
        for name, param in parameters.items():
            assert (param.grad is not None) == param.requires_grad == (name in expected), name
            if name in expected:
                rows = expected[name][slice(*fsdp_utils.my_rows(param))]
                differences.append(((param.grad.to_local() - rows).norm() / expected[name].norm()).item())
        results.append(max(differences))
    return results


@pytest.mark.parametrize("ranks, many_flags", [
    (1, ["", "--checkpointing selective", "--checkpointing chunked --chunk_tokens 5 --backward sequential",
         "--checkpointing full", "--checkpointing full --chunk_tokens 7 --offload_activations --offload_params",
         "--checkpointing chunked --chunk_tokens 5 --offload_activations"]),
    (2, ["--offload_params", "--backward pair --checkpointing selective",
         "--cp_size 2 --checkpointing chunked --chunk_tokens 4 --backward sequential",
         "--cp_size 2 --checkpointing full --offload_activations"]),
    pytest.param(4, ["--backward pair --cp_size 2 --checkpointing selective",
                     "--replicate 2 --backward sequential --offload_params --checkpointing chunked --chunk_tokens 5",
                     "--cp_size 4 --checkpointing full --chunk_tokens 3 --offload_activations"],
                 marks=pytest.mark.slow)])
def test_gradients_of_adapters_are_those_worked_out_from_the_full_gradient(world, worked_out, ranks, many_flags):
    for results in on_ranks(ranks, worst_gradients, world, worked_out, many_flags):
        assert max(results) < 1e-12, dict(zip(many_flags, results))


class Products(TorchDispatchMode):
    """Records the shapes of matrix products, and adds up their FLOPs."""
    def __init__(self):
        super().__init__()
        self.shapes, self.flops = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in memory.PRODUCT_OPS:
            self.shapes.add(tuple(out.shape[-2:]))
            self.flops += 2 * out.numel() * args[-1].shape[-2]
        return out


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_of_a_frozen_matrix_is_computed(mode):
    config = dataclasses.replace(CONFIG, dim=48, ffn_dim=80, text_len=20)      # sizes that tell products by their shape
    inputs = (torch.randn(1, 12, 3, 6, 12), torch.tensor([500.0]), torch.randn(1, 20, 32))     # 54 tokens
    torch.manual_seed(0)
    model = WanModel(config)
    frozen = {shape for name, p in model.named_parameters() if p.ndim == 2 for shape in (p.shape, p.shape[::-1])}
    flops = {}
    for rank in (0, 1):
        if rank:
            add_adapters(model, find_layers(model, TARGETS), rank)
        policy = copy.deepcopy(model)
        save_memory(policy, MemoryFlags(mode, 20 if mode in ("chunked", "full") else -1), trained=True)
        forward, backward = Products(), Products()
        with forward:
            loss = policy(*inputs).square().mean()
        with backward:
            loss.backward()
        assert bool(backward.shapes & frozen) == (rank == 0)
        flops[rank] = backward.flops / forward.flops
    # of each product 2 in backward, and 1 without the weight's gradient; recomputation adds the same to both
    assert flops[0] - flops[1] > 1, flops


# ----------------------------------------------------------------------------------------------------------------------
# training

LORA = ("--lora_rank", "4", "--ema_decay", "0.9", "--learning_rate", "1e-2", "--checkpointing", "selective")


def train_lora(world, out, *flags, ranks=1):
    """Train adapters on `world` for six steps. Returns the rows of the log, and the exported tensors."""
    argv = ["--init", str(world / "base"), "--data", str(world / "data"), "--out", str(out), "--batch_size", "8",
            "--steps", "6", "--warmup_steps", "2", "--save_every", "3", "--min_timestep", "0", "--probe_every", "3",
            "--hold_back", "4", *LORA, *flags]
    on_ranks(ranks, train_main, argv)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return rows, load_file(out / "export" / "lora.safetensors")


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "memory_gib", "tokens_per_second")}
            for row in rows]


@pytest.fixture(scope="module")
def fresh_run(world, tmp_path_factory):
    """The folder, the log and the export of a run from fresh adapters."""
    out = tmp_path_factory.mktemp("fresh") / "out"
    return out, *train_lora(world, out)


def test_training_starts_at_a_margin_of_exactly_zero_and_moves(fresh_run):
    _, rows, exported = fresh_run
    assert rows[0]["margin_abs"] == 0 and rows[0]["margin_min"] == rows[0]["margin_max"] == 0
    assert rows[0]["loss_dpo"] == pytest.approx(math.log(2), rel=1e-6) and rows[-1]["margin_abs"] > 0.05
    assert rows[2]["probe"]["win_gap"] != rows[5]["probe"]["win_gap"] != 0     # of the average, against the reference
    assert len(exported) == 3 * 10 * 4
    for name, tensor in exported.items():
        assert tensor.dtype == torch.float32 and tensor.abs().sum() > 0, name
        if name.endswith("alpha"):
            assert tensor.item() == 4


def test_every_adapter_has_a_gradient_after_two_steps(world, tmp_path):
    argv = ["--init", str(world / "base"), "--data", str(world / "data"), "--out", str(tmp_path / "out"),
            "--steps", "2", "--batch_size", "4", "--min_timestep", "0", "--warmup_steps", "0", "--lora_rank", "2",
            "--loss", "dpo",
            "--lora_targets", TARGETS, "--ema_decay", "0", "--hold_back", "4", "--probe_every", "0"]
    on_ranks(1, train_main, argv)
    reader = train_state(tmp_path / "out" / "step_000002")
    moments = {name: tensor for name, tensor in reader.items() if name.endswith("exp_avg")}
    assert len(moments) == 2 * 10 * 4
    for name, tensor in moments.items():
        assert tensor.abs().min(dim=0 if "lora_B" in name else 1).values.max() > 0, name


def train_state(folder):
    """{name: tensor} of everything in a step folder."""
    import torch.distributed.checkpoint as dcp

    from step_folder import Planner, Reader
    reader = Reader(folder)
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
             for name, entry in reader.index.state_dict_metadata.items() if hasattr(entry, "size")}
    dcp.load(state, storage_reader=reader, planner=Planner(), no_dist=True)
    return state


def test_checkpoints_and_the_average_hold_adapters_only(fresh_run):
    out, _, exported = fresh_run
    state = train_state(out / "step_000006")
    weights = [name for name in state if name.startswith(("model.", "ema."))]
    assert len(weights) == 2 * 2 * 10 * 4 and all(re.search(r"lora_[AB].weight$", name) for name in weights)
    layer = "blocks.1.ffn.2"
    for factor in ("lora_A", "lora_B"):
        average = state[f"ema.{layer}.{factor}.weight"]
        assert torch.equal(exported[f"diffusion_model.{layer}.{factor}.weight"], average)
        assert not torch.equal(average, state[f"model.{layer}.{factor}.weight"])


@pytest.mark.parametrize("ranks, flags", [
    (1, ("--ref", "cached")), (1, ("--grad_accum", "2", "--backward", "sequential", "--checkpointing", "full")),
    (2, ("--backward", "pair", "--offload_params")),
    pytest.param(4, ("--cp_size", "2", "--checkpointing", "chunked", "--chunk_tokens", "7"), marks=pytest.mark.slow)])
def test_one_curve_of_adapters_however_it_is_cut(world, fresh_run, tmp_path, ranks, flags):
    _, rows, exported = fresh_run
    other_rows, other = train_lora(world, tmp_path / "out", *flags, ranks=ranks)
    for row, expected in zip(other_rows, rows, strict=True):
        for name in ("loss", "err_win", "ref_err_win", "ref_err_lose", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-3), (row["step"], name)
        assert row["margin_abs"] == pytest.approx(expected["margin_abs"], rel=1e-2, abs=1e-4)
    if flags == ("--ref", "cached"):
        assert without_times(other_rows) == without_times(rows)
    for name in exported:
        assert (other[name] - exported[name]).norm() <= 1e-2 * exported[name].norm(), name


def test_a_run_of_adapters_resumes_bit_for_bit(world, fresh_run, tmp_path):
    _, rows, exported = fresh_run
    train_lora(world, tmp_path / "out", "--steps", "3")
    resumed_rows, resumed = train_lora(world, tmp_path / "out", "--resume", "latest")
    assert without_times(resumed_rows) == without_times(rows)
    assert all(torch.equal(resumed[name], exported[name]) for name in exported)


def test_training_goes_on_from_a_file_which_is_also_its_reference(world, fresh_run, tmp_path):
    out, _, exported = fresh_run
    file = tmp_path / "copied.safetensors"
    shutil.copy(out / "export" / "lora.safetensors", file)
    rows, second = train_lora(world, tmp_path / "second", "--init_lora", str(file), "--steps", "3")
    assert rows[0]["margin_abs"] == 0
    assert any(not torch.equal(second[name], exported[name]) for name in exported)
    merged_base = tmp_path / "merged"
    export_weights(file, merged_base, base=world / "base")
    plain, _, _ = run(world, tmp_path / "plain", "--init", str(merged_base), "--hold_back", "4", "--steps", "1")
    for name in ("err_win", "err_lose", "ref_err_win"):    # the reference is the merged model
        assert rows[0][name] == pytest.approx(plain[0][name], rel=1e-5)

    train_lora(world, tmp_path / "cut", "--init_lora", str(file), "--steps", "2")
    moved = tmp_path / "moved.safetensors"
    file.rename(moved)                                     # the same contents elsewhere
    again_rows, again = train_lora(world, tmp_path / "cut", "--init_lora", str(moved), "--steps", "3", "--resume",
                                   "latest")
    assert [row["loss"] for row in again_rows] == [row["loss"] for row in rows]
    assert all(torch.equal(again[name], second[name]) for name in second)
    save_lora(file, random_adapters(CONFIGS["tiny"], alpha=4.0))
    with pytest.raises(ValueError, match="init_lora"):
        train_lora(world, tmp_path / "cut", "--init_lora", str(file), "--steps", "4", "--resume", "latest")


def test_an_initial_file_of_another_scale_starts_at_the_same_model(world, tmp_path):
    # alpha 8 at rank 4, half of them 2: --lora_alpha 4 doubles or halves B; without the flag it is the rank's
    adapters = random_adapters(CONFIGS["tiny"])
    mixed = {layer: dataclasses.replace(a, alpha=2.0) if ".ffn." in layer else a for layer, a in adapters.items()}
    errors = {}
    for name, file, flags in (("same", adapters, ()), ("scaled", adapters, ("--lora_alpha", "4")),
                              ("mixed", mixed, ()), ("mixed scaled", mixed, ("--lora_alpha", "16"))):
        save_lora(tmp_path / "lora.safetensors", file)
        rows, _ = train_lora(world, tmp_path / name, "--steps", "1", "--init_lora", str(tmp_path / "lora.safetensors"),
                             *flags)
        assert rows[0]["margin_abs"] == 0
        errors[name] = rows[0]["err_win"]
        alpha = json.loads((tmp_path / name / "config.json").read_text())["lora_alpha"]
        assert alpha == {"same": 8, "scaled": 4, "mixed": 4, "mixed scaled": 16}[name]
    assert errors["scaled"] == pytest.approx(errors["same"], rel=1e-5)
    assert errors["mixed scaled"] == pytest.approx(errors["mixed"], rel=1e-5)
    assert errors["mixed"] != pytest.approx(errors["same"], rel=1e-3)


def half_precision(world, file):
    """Dtypes of a policy's shards, and its first errors and the reference's, with matrices in bf16 as on GPUs."""
    fsdp_utils.matrix_dtype = lambda device: torch.bfloat16
    try:
        ranks = start_ranks()
        initial = open_lora(file)
        plan = LoraPlan(list(initial), 4, 8.0, initial)
        config = CONFIGS["tiny"]
        flags = MemoryFlags("selective")
        policy = build_model(world / "base", config, ranks, flags, trained=True, lora=plan)
        full = build_model(world / "base", config, ranks, flags, trained=True)
    finally:
        fsdp_utils.matrix_dtype = lambda device: None
    dtypes = {name: p.dtype for name, p in policy.named_parameters()}
    batch = train.read_batch(arguments(), open_data(world / "data", pairs=True), range(4), "cpu")
    inputs = train.branch(batch, "win")
    err, ref_err = train.flow_errors(policy, inputs)[0], train.flow_errors(Reference(policy), inputs)[0]
    err.sum().backward()
    gradients = {name: p.grad.dtype for name, p in policy.named_parameters() if p.grad is not None}
    for layer in lora_layers(policy).values():
        layer.initial_A = None                             # off: the base, whose numbers bf16 storage must not change
    base_err = train.flow_errors(Reference(policy), inputs)[0]
    full_err = train.flow_errors(full, inputs)[0].detach()
    change = (err.detach() - full_err).abs().min().item()
    return dtypes, gradients, torch.equal(err, ref_err), torch.equal(base_err, full_err), change


def test_on_gpus_the_frozen_base_is_bf16_where_matrices_are_and_adapters_are_float32(world, tmp_path):
    save_lora(tmp_path / "lora.safetensors", random_adapters(CONFIGS["tiny"]))
    results = on_ranks(2, half_precision, world, tmp_path / "lora.safetensors")
    for dtypes, gradients, starts_equal, base_is_unchanged, change in results:
        assert starts_equal and base_is_unchanged and change > 1e-4
        for name, dtype in dtypes.items():
            is_full = ".lora_" in name or name.startswith(("time_embedding", "time_projection", "head."))
            assert dtype == (torch.float32 if is_full else torch.bfloat16), name
        assert len(gradients) == 2 * 10 * 4 and set(gradients.values()) == {torch.float32}


def test_spo_trains_adapters_against_itself_without_them(spo_world, tmp_path):
    out = tmp_path / "out"
    argv = ["--init", str(spo_world / "base"), "--data", str(spo_world / "data"), "--score", str(spo_world / "scorer"),
            "--out", str(out), "--steps", "2", "--batch_size", "2", "--sample_steps", "4", "--updates", "1",
            "--threshold", "0", "--lora_rank", "2", "--learning_rate", "1e-2", "--warmup_steps", "0",
            "--eval_clips", "0"]
    on_ranks(1, spo_main, argv)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows[0]["first_margin"] == 0 and rows[1]["margin_abs"] > 0
    adapters = open_lora(out / "export" / "lora.safetensors")
    assert len(adapters) == 2 * 10 and any(a.B[:].abs().sum() > 0 for a in adapters.values())


# ----------------------------------------------------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize("flags, words", [
    ("--init_lora FILE", "--init_lora .*FILE.* does nothing without adapters; give --lora_rank"),
    ("--lora_alpha 4", "--lora_alpha 4.0 does nothing without adapters"),
    ("--lora_targets q", "--lora_targets q does nothing without adapters"),
    ("--lora_rank -1", "--lora_rank -1 --lora_alpha 0.0: expected 0 or more"),
    ("--lora_rank 4 --ref live", "--ref live is a second model; .* take --ref auto, or cached"),
    ("--lora_rank 4 --ref offload", "--ref offload is a second model"),
    ("--lora_rank 4 --loss sft --init scratch", "--init scratch with --lora_rank: adapters need trained weights"),
    ("--lora_rank 4 --loss preference --min_timestep 0", "--loss preference trains a head on frozen blocks"),
    ("--lora_rank 4 --lora_targets q,to_k", "no layer of this model is called 'to_k'; expected .*self_attn.q"),
    ("--lora_rank 4 --lora_targets q,k_img", "no layer of this model is called 'k_img'"),
    ("--lora_rank 8 --init_lora FILE", "has adapters of rank 4, expected --lora_rank 8"),
    ("--lora_rank 4 --init_lora FILE --lora_targets q,k", "FILE has an adapter of blocks.0.cross_attn.o, unlike "
     "--lora_targets q,k; its layers are --lora_targets cross_attn.k,cross_attn.o"),
    ("--lora_rank 4 --init_lora WIDE", "WIDE is for another model: its adapter of blocks.0.cross_attn.k is for a "
     r"matrix \(64, 64\), and this t2v model of width 128 and 4 blocks has \(128, 128\)"),
    ("--lora_rank 4 --init_lora nowhere", "nowhere.*not a whole .safetensors file")])
def test_flags_of_adapters_that_cannot_work_are_refused_before_anything_is_loaded(world, tmp_path, monkeypatch, flags,
                                                                                 words):
    monkeypatch.setattr(experts, "build_model", lambda *args: pytest.fail("a model was built"))
    save_lora(tmp_path / "FILE", random_adapters(CONFIGS["tiny"]))
    save_lora(tmp_path / "WIDE", random_adapters(dataclasses.replace(CONFIGS["tiny"], dim=64)))
    argv = [str(tmp_path / word) if word in ("FILE", "WIDE") else word for word in flags.split()]
    assert re.search(words, main_fails(world, tmp_path, *argv))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, words", [
    ("--init_lora x", "--init_lora x does nothing without adapters"), ("--lora_rank 4 --ref live", "a second model"),
    ("--lora_rank 4 --lora_targets to_q", "no layer of this model is called 'to_q'")])
def test_train_spo_refuses_the_same(spo_world, tmp_path, flags, words):
    assert re.search(words, spo_fails(spo_world, tmp_path, *flags.split()))


def test_resuming_with_other_adapters_is_refused(world, fresh_run, tmp_path):
    shutil.copytree(fresh_run[0], tmp_path / "out")
    same = ["--out", str(tmp_path / "out"), "--resume", "latest", "--min_timestep", "0", "--batch_size", "8"]
    for flags in (("--lora_rank", "8"), ("--lora_rank", "4", "--lora_alpha", "8"),
                  ("--lora_rank", "4", "--lora_targets", "q,k"), ("--lora_rank", "0")):
        message = main_fails(world, tmp_path, *same, *flags)
        assert re.search(r"it was trained with \w+ = ", message), message


# ----------------------------------------------------------------------------------------------------------------------
# files

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_over_the_dialects_keeps_every_bit(tmp_path, dtype):
    config = dataclasses.replace(CONFIG, in_dim=15, image_dim=8)
    adapters = random_adapters(config, TARGETS_WITH_IMAGE, alpha=3.7)
    adapters = {layer: Adapter(a.A.to(dtype), a.B.to(dtype), float(torch.tensor(a.alpha)))
                for layer, a in adapters.items()}
    ffn = {layer: Adapter(a.A[:2], a.B[:, :2], 0.5) for layer, a in adapters.items() if ".ffn." in layer}
    adapters |= ffn                                        # of another rank and alpha
    assert tuple(DIALECTS) == LORA_FORMATS
    previous = adapters
    for i, dialect in enumerate([*DIALECTS, *reversed(DIALECTS)]):
        save_lora(tmp_path / f"{i}.safetensors", previous, dialect, dtype)
        previous = open_lora(tmp_path / f"{i}.safetensors")
        check_adapters(previous, config, "it")
        assert equal_adapters(previous, adapters), dialect
    keys = {dialect: set(load_file(tmp_path / f"{i}.safetensors")) for i, dialect in enumerate(DIALECTS)}
    assert {"diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.lora_B.weight",
            "diffusion_model.blocks.0.self_attn.q.alpha"} <= keys["lora"]
    stem = "lora_unet_blocks_1_cross_attn_k_img"
    assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= keys["lora_kohya"]
    assert {"transformer.blocks.0.attn2.to_out.0.lora_A.weight", "transformer.blocks.0.ffn.net.0.proj.lora_B.weight",
            "transformer.blocks.0.attn2.add_v_proj.lora_A.weight"} <= keys["lora_diffusers"]


# Facts about public files: "printed" holds keys as the source prints them, and the layer and matrix that each is for;
# "filled_in" says which keys, sizes and scales no source prints. "*" is the number of a block.
PUBLIC = json.loads((Path(__file__).parent / "lora_keys.json").read_text())
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


def write_public_file(folder, public):
    """
    Write a file with a public one's names, shapes and alphas; its matrices are a hole in the file. Returns its path.
    """
    dtype = getattr(torch, public["dtype"])
    header, data, end = {}, b"", 0
    for template, shape in public["keys"].items():
        for number in range(public["blocks"]):
            is_alpha = template.endswith(".alpha")
            of_one = getattr(torch, public["alpha_dtype"]) if is_alpha else dtype
            nbytes = math.prod(shape) * of_one.itemsize
            header[template.replace("*", str(number))] = [NAMES[of_one], shape, nbytes, is_alpha]
    entries = {}
    for name, (word, shape, nbytes, is_alpha) in sorted(header.items(), key=lambda item: not item[1][3]):
        entries[name] = {"dtype": word, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
        if is_alpha:
            of_one = getattr(torch, public["alpha_dtype"])
            data += torch.tensor(public["alpha"], dtype=of_one).view(1).view(torch.uint8).numpy().tobytes()
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "adapter_model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
        file.truncate(8 + len(text) + end)
    if "adapter_config" in public:
        (folder / "adapter_config.json").write_text(json.dumps(public["adapter_config"]))
    return path


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public["trainer"])
def test_public_files_of_many_trainers_are_read_rightly(tmp_path, public):
    path = write_public_file(tmp_path, public)
    if "refused" in public:
        with pytest.raises(ValueError, match=f"{path}: .* belongs to {public['refused']}"):
            open_lora(path)
        return
    adapters, config = open_lora(path), CONFIGS[public["model"]]
    check_adapters(adapters, config, path)
    matrices = [key for key in public["keys"] if not key.endswith(".alpha")]
    assert len(adapters) == public["blocks"] * len(matrices) / 2 and public["blocks"] == config.num_layers
    scales = {adapter.scale for adapter in adapters.values()}
    assert len(scales) == 1 and scales.pop() == pytest.approx(public["scale"], rel=1e-12)
    for layer, adapter in adapters.items():
        if "_attn." in layer:
            assert adapter.shapes == [(adapter.rank, config.dim), (config.dim, adapter.rank)]
    others = ["wan2.1-t2v-1.3b" if config.dim != 1536 else "wan2.2-ti2v-5b", public.get("not_for")]
    for other in filter(None, others):
        with pytest.raises(ValueError, match="is for another model: its adapter of blocks"):
            check_adapters(adapters, CONFIGS[other], path)


@pytest.mark.parametrize("public", [public for public in PUBLIC if public["printed"]],
                         ids=lambda public: public["trainer"])
def test_keys_of_public_files_as_others_print_them_land_on_their_layers(tmp_path, public):
    path = tmp_path / "lora.safetensors"
    keys = {template.replace("*", str(number)) for template in public["keys"] for number in range(public["blocks"])}
    assert keys >= set(public["printed"])
    if "refused" in public:
        save_file({key: torch.ones(1, 1) for key in public["printed"]}, path)
        with pytest.raises(ValueError, match=f"belongs to {public['refused']}") as caught:
            open_lora(path)
        assert any(f"{path}: {key} belongs" in str(caught.value) for key in public["printed"])
        return
    values = {key: float(number) for number, key in enumerate(sorted(keys), start=1)}  # each tensor has its own number
    save_file({key: torch.tensor(value) if key.endswith(".alpha") else torch.full((1, 1), value)
               for key, value in values.items()}, path)
    adapters = open_lora(path)
    for key, place in public["printed"].items():
        layer, part = place.split()
        value = adapters[layer].alpha if part == "alpha" else getattr(adapters[layer], part)[:].item()
        assert value == values[key], key


def small_file(path, changes=(), header=None, drop=()):
    """A file of adapters for CONFIG's first block, in ComfyUI's keys without alpha, with changes {key: tensor}."""
    layers = {"self_attn.q": (32, 32), "ffn.0": (32, 64)}
    tensors = {}
    for layer, (width_in, width_out) in layers.items():
        tensors[f"diffusion_model.blocks.0.{layer}.lora_A.weight"] = torch.ones(4, width_in)
        tensors[f"diffusion_model.blocks.0.{layer}.lora_B.weight"] = torch.ones(width_out, 4)
    tensors |= dict(changes)
    save_file({name: tensor for name, tensor in tensors.items() if name not in drop}, path, header)
    return path


STEM = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize("changes, drop, words", [
    ({f"{STEM}.dora_scale": torch.ones(32, 1)}, (), "dora_scale belongs to DoRA; only plain LoRA is read"),
    ({f"{STEM}.lora_magnitude_vector.weight": torch.ones(32)}, (), "lora_magnitude_vector.weight belongs to DoRA"),
    ({"lycoris_blocks_0_ffn_0.lokr_w1": torch.ones(4, 4)}, (), "lokr_w1 belongs to LoKr"),
    ({f"{STEM}.hada_w1_a": torch.ones(4, 4)}, (), "hada_w1_a belongs to LoHa"),
    ({f"{STEM}.oft_blocks": torch.ones(4, 4)}, (), "oft_blocks belongs to OFT"),
    ({f"{STEM}.diff_b": torch.ones(32)}, (), "diff_b belongs to differences of whole weights"),
    ({"diffusion_model.blocks.0.norm3.diff": torch.ones(32)}, (), "diff belongs to differences of whole weights"),
    ({f"{STEM}.lora_B.bias": torch.ones(32)}, (), "lora_B.bias belongs to biases of adapters"),
    ({"transformer_2.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 32)}, (), "transformer_2 is one of two experts"),
    ({"diffusion_model.transformer_1.blocks.0.cross_attn.k.lora_A.weight": torch.ones(4, 32)}, (),
     "transformer_1 is one of two experts"),
    ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(4, 32)}, (), "fits no layer of a Wan"),
    ({"lora_te_text_model_encoder_layers_0_q.lora_down.weight": torch.ones(4, 32)}, (), "fits no layer of a Wan"),
    ({"diffusion_model.blocks.0.vace.q.lora_A.weight": torch.ones(4, 32)}, (), "fits no layer of a Wan model"),
    ({f"{STEM}.weight": torch.ones(32, 32)}, (), "self_attn.q.weight fits no layer"),
    ({}, (f"{STEM}.lora_B.weight",), "self_attn.q lacks its lora_B"),
    ({f"{STEM}.lora_A.default.weight": torch.ones(4, 32)}, (), "is the second A of layer blocks.0.self_attn.q"),
    ({"lora_unet_blocks_0_ffn_2.lora_down.weight": torch.ones(4, 64),
      "lora_unet_blocks_0_ffn_2.lora_up.weight": torch.ones(32, 4)}, (), "blocks_0_ffn_2 has no .alpha"),
    ({f"{STEM}.lora_B.weight": torch.ones(32, 3)}, (), r"has matrices \(4, 32\) and \(32, 3\); expected \(rank, in\)"),
    ({f"{STEM}.lora_A.weight": torch.ones(4, 32).to(torch.float8_e4m3fn)}, (), "is F8_E4M3 and F32; expected 16 bits")])
def test_files_of_another_kind_or_with_a_key_that_fits_nothing_are_refused_by_name(tmp_path, changes, drop, words):
    path = small_file(tmp_path / "lora.safetensors", changes, drop=drop)
    with pytest.raises(ValueError, match=words):
        open_lora(path)


def test_a_damaged_file_is_named(tmp_path):
    path = small_file(tmp_path / "lora.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="lora.safetensors: not a whole .safetensors file"):
        open_lora(path)


def packed(settings):
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in settings.items()})}


@pytest.mark.parametrize("header, scales", [
    (None, (1.0, 1.0)),                                    # alpha is the rank, 4
    (packed({"r": 4, "lora_alpha": 2}), (0.5, 0.5)),       # diffusers
    (packed({"r": 4, "lora_alpha": 4, "use_rslora": True}), (2.0, 2.0)),                   # 4 / sqrt(4)
    (packed({"r": 4, "lora_alpha": 4, "alpha_pattern": {"ffn.0": 1}}), (1.0, 0.25)),
    ({"lora_alpha": "8", "transformer.use_rslora": "True"}, (4.0, 4.0)),
    ({"transformer.lora_alpha": "16.0"}, (4.0, 4.0)), ({"network_alpha": "1"}, (0.25, 0.25))])
def test_scales_in_headers_are_read_and_those_in_tensors_count_first(tmp_path, header, scales):
    layers = ("blocks.0.self_attn.q", "blocks.0.ffn.0")
    adapters = open_lora(small_file(tmp_path / "1.safetensors", header=header))
    assert tuple(adapters[layer].scale for layer in layers) == scales
    for dtype in (torch.int64, torch.float16, torch.float64):
        alpha = {f"{STEM}.alpha": torch.tensor(12, dtype=dtype)}
        adapters = open_lora(small_file(tmp_path / "2.safetensors", alpha, header))
        assert tuple(adapters[layer].scale for layer in layers) == (3.0, scales[1])


def test_dora_in_a_header_or_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="DoRA"):
        open_lora(small_file(tmp_path / "1.safetensors", header=packed({"use_dora": True})))
    (tmp_path / "adapter_config.json").write_text('{"use_dora": true}')
    with pytest.raises(ValueError, match="DoRA"):
        open_lora(small_file(tmp_path / "2.safetensors"))


# ----------------------------------------------------------------------------------------------------------------------
# conversion and merging by the command line

def convert(*argv):
    main(parse_args([str(word) for word in argv]))


def test_step_folders_and_exports_are_converted_and_merged_into_the_weights_of_the_run(world, fresh_run, tmp_path,
                                                                                      capsys):
    out, _, _ = fresh_run
    file = out / "export" / "lora.safetensors"
    adapters = open_lora(file)
    for source in (out / "step_000006", file):
        folder = tmp_path / source.name
        for dialect in DIALECTS:
            convert(source, "--format", dialect, "--out", folder / f"{dialect}.safetensors")
            assert equal_adapters(open_lora(folder / f"{dialect}.safetensors"), adapters)
        convert(source, "--out", folder / "original")
        convert(source, "--format", "comfyui", "--out", folder / "comfyui.safetensors", "--base", world / "base")
        convert(folder / "lora_kohya.safetensors", "--format", "diffusers", "--out", folder / "again", "--base",
                world / "base")
        expected = merged(load_wan(world / "base"), adapters).state_dict()
        for merged_file in ("original", "comfyui.safetensors", "again"):
            state = load_wan(folder / merged_file).state_dict()
            assert all(torch.equal(state[name], expected[name]) for name in expected), merged_file
    convert(out / "step_000006", "--format", "lora", "--weights", "policy", "--out", tmp_path / "policy.safetensors")
    assert not equal_adapters(open_lora(tmp_path / "policy.safetensors"), adapters)
    capsys.readouterr()
    convert(file, "--out", tmp_path / "half", "--dtype", "bfloat16")
    share = re.search(r"bfloat16 keeps ([\d.]+)% of what training changed", capsys.readouterr().out)
    assert 50 < float(share[1]) < 105


def test_adapters_without_a_known_base_and_weights_without_adapters_are_refused(world, fresh_run, tmp_path):
    copied = tmp_path / "copied.safetensors"
    shutil.copy(fresh_run[0] / "export" / "lora.safetensors", copied)
    with pytest.raises(ValueError, match="copied.safetensors holds adapters, and .* name them with --base"):
        convert(copied, "--out", tmp_path / "x")
    save_wan(WanModel(CONFIG), tmp_path / "narrow")
    with pytest.raises(ValueError, match="copied.safetensors is for another model"):
        convert(copied, "--base", tmp_path / "narrow", "--out", tmp_path / "x")
    with pytest.raises(ValueError, match="--format lora_kohya: .*base has no adapters; expected one of original"):
        convert(world / "base", "--format", "lora_kohya", "--out", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="lora is a single file; give it a name that ends in .safetensors"):
        convert(copied, "--format", "lora", "--out", tmp_path / "x")
    with pytest.raises(ValueError, match="copied.* holds adapters, not a model.*sample.py --lora.*weights.py"):
        load_wan(copied)
    assert not list(tmp_path.glob("x*"))


# ----------------------------------------------------------------------------------------------------------------------
# sampling with adapters

def sample_main(*argv):
    import sample
    sample.main(sample.parse_args([str(word) for word in argv]))


def random_model(seed):
    torch.manual_seed(seed)
    model = WanModel(CONFIGS["tiny"])
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    return model


@pytest.fixture(scope="module")
def tiny_with_adapters(tmp_path_factory):
    """
    A folder with base/, two LoRA files, and merged/: base/ with the first and -0.5 times the second. experts/ has base/
    for high noise and another model for low noise; experts_merged/ both, each with the first file merged.
    """
    folder = tmp_path_factory.mktemp("sampling")
    base, low = random_model(0), random_model(1)
    first, second = random_adapters(base.config), random_adapters(base.config, "q,ffn.2", rank=2, seed=1)
    save_lora(folder / "first.safetensors", first)
    save_lora(folder / "second: it.safetensors", second, "lora_kohya")
    save_wan(base, folder / "base")
    save_wan(merged(merged(base, first), second, -0.5), folder / "merged")
    for name, models in (("experts", (base, low)), ("experts_merged", (merged(base, first), merged(low, first, 0.7)))):
        for model, expert in zip(models, ("high_noise_model", "low_noise_model")):
            save_wan(model, folder / name / expert)
    return folder


def sampled(out, init, *flags):
    """The sample that the command line makes of one caption."""
    sample_main("--prompts", "small red circle moving fast left", "--init", init, "--steps", 3, "--out", out, *flags)
    return read_sample(out / "00000.safetensors")


def check_merged(base, with_files, with_merged):
    """Samples of a model, of the model with LoRA files, and of the merged weights; the last two must be alike."""
    base, with_files, with_merged = (sample["latents"] for sample in (base, with_files, with_merged))
    assert (with_files - with_merged).norm() < 1e-4 * with_merged.norm()
    assert (base - with_merged).norm() > 0.01 * with_merged.norm()


def test_samples_with_lora_files_are_those_of_the_merged_model(tiny_with_adapters, tmp_path, capsys):
    folder = tiny_with_adapters
    files = (folder / "first.safetensors", f"{folder / 'second: it.safetensors'}:-0.5")
    with_files = sampled(tmp_path / "files", folder / "base", "--lora", *files)
    words = "--lora .*first.safetensors:1: 40 layers, rank 4\n--lora .*it.safetensors:-0.5: 12 layers, rank 2"
    assert re.search(words, capsys.readouterr().out)
    assert re.search(r"base \+ .*first.safetensors:1 \+ .*it.safetensors:-0.5$", with_files["metadata"]["source"])
    check_merged(sampled(tmp_path / "base", folder / "base"), with_files,
                 sampled(tmp_path / "merged", folder / "merged"))


def test_each_of_two_experts_has_its_own_lora_files(tiny_with_adapters, tmp_path):
    folder, boundary = tiny_with_adapters, ("--boundary", 0.9)
    whole, part = folder / "first.safetensors", f"{folder / 'first.safetensors'}:0.7"
    files = ("--lora", whole, "--low_lora", part)
    with_files = sampled(tmp_path / "files", folder / "experts", *boundary, *files)
    with_merged = sampled(tmp_path / "merged", folder / "experts_merged", *boundary)
    check_merged(sampled(tmp_path / "base", folder / "experts", *boundary), with_files, with_merged)
    files = ("--lora", part, "--low_lora", whole)
    exchanged = sampled(tmp_path / "exchanged", folder / "experts", *boundary, *files)
    assert (exchanged["latents"] - with_merged["latents"]).norm() > 1e-3 * with_merged["latents"].norm()


def test_negatives_name_the_adapters_that_made_them(tiny_with_adapters, world, tmp_path):
    folder = tiny_with_adapters
    (tmp_path / "real").mkdir()
    for i in range(2):
        shutil.copy(world / "data" / "real" / f"{i:03d}.safetensors", tmp_path / "real")
    flags = ("--pairs", tmp_path, "--init", folder / "base", "--steps", 2)
    sample_main(*flags, "--lora", folder / "first.safetensors")
    made = read_sample(tmp_path / "negatives" / "000.safetensors")
    shutil.copy(folder / "first.safetensors", tmp_path / "renamed")
    sample_main(*flags, "--lora", f"{tmp_path / 'renamed'}:1.0")                       # the same: nothing to make
    for other in ((), ("--lora", f"{folder / 'first.safetensors'}:0.5"), ("--lora", folder / "second: it.safetensors")):
        with pytest.raises(ValueError, match="was made with .*'lora': .* is asked for"):
            sample_main(*flags, *other)
    sample_main(*flags, "--lora", f"{folder / 'first.safetensors'}:0.5", "--name", "negatives_half")
    half = read_sample(tmp_path / "negatives_half" / "000.safetensors")
    assert not torch.equal(half["latents"], made["latents"])
    assert half["metadata"]["model"] == made["metadata"]["model"]


@pytest.mark.parametrize("flags, words", [
    ("--lora nowhere", "--lora .*nowhere: not a file; expected FILE or FILE:SCALE"),
    ("--lora base", "--lora .*base: not a file"),
    ("--lora first.safetensors:x", "--lora .*first.safetensors:x: the scale is 'x'; expected a number"),
    ("--lora first.safetensors:", "--lora .*first.safetensors:: the scale is ''"),
    ("--lora first.safetensors:nan", "the scale is 'nan'"),
    ("--lora first.safetensors:0.0", "the scale is '0.0'; expected a number that is not 0"),
    ("--lora fresh", "--lora .*fresh changes nothing: its lora_B is 0 in every layer"),
    ("--lora wide", "--lora .*wide is for another model: its adapter of blocks"),
    ("--lora base/diffusion_pytorch_model.safetensors", "fits no layer of a Wan model"),
    ("--low_lora first.safetensors", "--low_lora are for two experts, and .* is one model"),
    ("--init experts --lora low_noise.safetensors:0.5", "--lora is for the high-noise expert, and by its name"),
    ("--init experts --low_lora high_noise.safetensors", "--low_lora is for the low-noise expert, and by its name"),
])
def test_adapters_that_cannot_be_sampled_with_are_refused_before_a_model_is_loaded(tiny_with_adapters, tmp_path,
                                                                                  monkeypatch, flags, words):
    import streaming
    monkeypatch.setattr(streaming, "load_wan", lambda *args, **options: pytest.fail("the model was loaded"))
    folder = tiny_with_adapters
    save_lora(folder / "wide", random_adapters(dataclasses.replace(CONFIGS["tiny"], dim=64)))
    fresh = random_adapters(CONFIGS["tiny"])
    save_lora(folder / "fresh", {layer: dataclasses.replace(fresh[layer], B=0 * fresh[layer].B) for layer in fresh})
    for expert in ("high", "low"):
        shutil.copy(folder / "first.safetensors", folder / f"{expert}_noise.safetensors")
    words_given = [word if word.startswith("--") else str(folder / word) for word in flags.split()]
    with pytest.raises(ValueError, match=words):
        sample_main("--prompts", "a circle", "--init", folder / "base", "--out", tmp_path / "out", *words_given)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# diffusers

@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", ["t2v", "i2v-clip", "ti2v"])
def test_diffusers_loads_our_files_to_our_outputs(tmp_path, case, dialect):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    model, inputs, _ = make_case(case)
    image = bool(model.config.image_dim)
    adapters = random_adapters(model.config, TARGETS_WITH_IMAGE if image else TARGETS, alpha=2.0)
    save_lora(tmp_path / "lora.safetensors", adapters, dialect)
    forward = diffusers_twin(model)
    transformer = forward.__closure__[[type(cell.cell_contents).__name__ for cell in forward.__closure__].index(
        "WanTransformer3DModel")].cell_contents
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer,
                           scheduler=FlowMatchEulerDiscreteScheduler())
    with torch.no_grad():
        before = forward(**inputs)
        pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
        theirs = forward(**inputs)
        attach(model, [(adapters, 1.0)])
        ours = model(**inputs)
    assert (theirs - before).norm() > 0.05 * before.norm()
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


# ----------------------------------------------------------------------------------------------------------------------
# copied

def test_lora_copied_with_the_model_works_in_an_empty_folder(tmp_path):
    import subprocess
    import sys
    for name in ("lora.py", "model.py"):
        shutil.copy(Path(__file__).parent.parent / name, tmp_path)
    script = """
import sys
sys.path.insert(0, ".")
for blocked in ("safetensors", "tqdm", "diffusers", "peft"):
    sys.modules[blocked] = None                            # importing one of these fails
import torch
from lora import Reference, add_adapters, find_layers, lora_layers
from model import CONFIGS, WanModel
model = WanModel(CONFIGS["tiny"])
torch.nn.init.normal_(model.head.head.weight)
inputs = torch.randn(2, 12, 3, 4, 6), torch.tensor([100.0, 900.0]), torch.randn(2, 5, 32)
base = model(*inputs).detach()
add_adapters(model, find_layers(model, "q,k,v,o,ffn.0,ffn.2"), rank=4)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(3):
    loss = (model(*inputs) - Reference(model)(*inputs) - 1).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert torch.equal(Reference(model)(*inputs), base) and not torch.equal(model(*inputs), base)
assert len(lora_layers(model)) == 40
"""
    command = [sys.executable, "-I", "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
