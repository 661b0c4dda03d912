"""What blocks keep for backward; and that keeping less, chunks of tokens and compilation change no number."""
import dataclasses
import os
import shutil
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memory
from conftest import POOLS, free_port
from memory import Chunks, checkpoint_blocks, chunk_blocks, compile_blocks
from fsdp_utils import shard_model, start_ranks
from make_golden import make_case
from model import CONFIGS, Block, WanModel, recompute, rope_table
from dry_run import kept_for_backward


def velocity_and_all_gradients(name, change, dtype=torch.float64):
    """Of a case of make_golden, after change(model): {name: velocity or gradient}, of inputs and parameters."""
    model, inputs, grad = make_case(name)
    model, inputs = model.to(dtype), {name: value.to(dtype).requires_grad_(name != "timestep") for name, value in inputs.items()}
    change(model)
    velocity = model(**inputs)
    (velocity * grad).sum().backward()
    return {"velocity": velocity.detach()} | {name: x.grad for name, x in [*inputs.items(), *model.named_parameters()] if name != "timestep"}


def worst(found, expected):
    assert found.keys() == expected.keys() and all(found[name].dtype == expected[name].dtype for name in expected)
    return max((((found[name] - expected[name]).norm() / expected[name].norm()).item(), name) for name in expected)


# ---------------------------------------------------------------------------------------------------------------------------------
# bytes

def kept_bytes(config, change):
    """Bytes that autograd keeps of one video of 81 frames at 832 x 480 in bf16, per token and channel; fake tensors, no arithmetic."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        model = WanModel(config)
        torch.set_default_dtype(torch.float32)
        change(model)
        shapes = []
        nbytes = kept_for_backward(model, lambda: shapes.append(model(torch.randn(1, 16, 21, 60, 104), torch.tensor([500.0]), torch.randn(1, 512, 4096)).shape))
    assert shapes == [(1, 16, 21, 60, 104)]
    return nbytes / (32760 * config.dim)


@pytest.mark.parametrize("preset, mode, size, expected", [
    ("wan2.1-t2v-1.3b", "off", 0, 42.0),                                 # diffusers keeps 92, DiffSynth 74
    ("wan2.1-t2v-1.3b", "selective", 0, 30.3), ("wan2.1-t2v-1.3b", "full", 0, 2.2), ("wan2.1-t2v-1.3b", "off", 8192, 12.3),
    ("wan2.1-t2v-14b", "off", 0, 35.7),                                  # diffusers keeps 79, DiffSynth 61
    ("wan2.1-t2v-14b", "full", 0, 2.1)])
def test_backward_keeps_so_many_bytes_per_token_layer_and_channel(preset, mode, size, expected):
    config = CONFIGS[preset]
    two, four = (kept_bytes(dataclasses.replace(config, num_layers=layers), lambda model: (checkpoint_blocks(model, mode), chunk_blocks(model, size))) for layers in (2, 4))
    layer = (four - two) / 2
    assert layer + (two - 2 * layer) / config.num_layers == pytest.approx(expected, abs=0.06)
    assert memory.kept_bytes(config, "chunked" if size else mode, False, 2) == pytest.approx(expected, abs=0.4)      # what the plan says; text, patches and head are not in it


def test_a_timestep_per_token_keeps_no_more_than_one_per_video():
    config, kept = dataclasses.replace(CONFIGS["wan2.2-ti2v-5b"], num_layers=1), []
    for timestep in (torch.tensor([500.0]), torch.full((1, 880), 500.0)):
        saved = {}
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = WanModel(config)
            rows = torch.zeros(timestep.numel(), dtype=torch.long).view(timestep.shape)
            block = lambda x: model.blocks[0](x, torch.randn(1, 512, 3072), torch.randn(2, 6, 3072), rows, *rope_table((5, 11, 16), 128, "cpu"))
            own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
            with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.untyped_storage()._cdata, x), lambda x: x):
                block(torch.randn(1, 880, 3072))
        kept.append(sum(x.untyped_storage().nbytes() for key, x in saved.items() if key not in own) / (880 * 3072))
    assert kept[1] == pytest.approx(kept[0], abs=0.1)


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were."""
    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def free(self, key, nbytes):
        self.alive.remove(key)
        self.now -= nbytes

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out


def block_peak(size, grid):
    """The most bytes alive in forward and backward of one block of 1.3B, its input and weights apart, in chunks of `size` tokens; per token and channel."""
    config, tokens = CONFIGS["wan2.1-t2v-1.3b"], grid[0] * grid[1] * grid[2]
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        block = Block(config)
        torch.set_default_dtype(torch.float32)
        chunk_blocks(SimpleNamespace(blocks=[block]), size)
        x = torch.randn(1, tokens, config.dim, requires_grad=True)
        context, time_mod, tables = torch.randn(1, 512, config.dim, dtype=torch.bfloat16), torch.randn(1, 6, config.dim), rope_table(grid, 128, "cpu")
        with Live() as live:
            block(x, context, time_mod, torch.zeros(1, 1, dtype=torch.long), *tables).backward(torch.ones_like(x))
    return live.peak / (tokens * config.dim)


def test_the_tracker_sees_what_is_alive_and_no_more():
    with Live() as live:
        x = torch.zeros(1000)                                            # 4000 bytes
        x = torch.cat([x, x]).view(2, 1000)                              # 8000; both for a moment
        x = x[0] + 1                                                     # 4000, and 8000 until x is another
    assert (live.now, live.peak) == (4000, 12000)


def test_chunks_bound_what_backward_of_one_block_needs():
    clip, larger = (21, 30, 52), (21, 45, 80)                            # 81 frames at 480 x 832 and at 720 x 1280
    assert block_peak(0, clip) < 77 and block_peak(8192, clip) < 49
    assert block_peak(16384, larger) < 43                                # what one chunk makes counts ever less


# ---------------------------------------------------------------------------------------------------------------------------------
# the same numbers

def test_recompute_has_the_gradient_of_what_it_computes():
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    layers = [SimpleNamespace(weight=randn(out, 4), bias=randn(out)) for out in (3, 2)]
    f = lambda x, scale: (x.sin(), (x * scale).cos())
    plain = lambda x, scale, *tensors: (x.sin(), *(F.linear((x * scale).cos(), w, b) for w, b in zip(tensors[::2], tensors[1::2])))
    inputs = (randn(2, 3, 4), randn(4))
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    assert all(torch.equal(a, b) for a, b in zip(recompute(f, inputs, *layers), plain(*inputs, *tensors)))
    layer = lambda weight, bias: SimpleNamespace(weight=weight, bias=bias)
    assert torch.autograd.gradcheck(lambda x, scale, w1, b1, w2, b2: recompute(f, (x, scale), layer(w1, b1), layer(w2, b2)), (*inputs, *tensors))
    assert torch.autograd.gradcheck(lambda x, scale: recompute(f, (x, scale)), inputs)                # no layers
    assert torch.autograd.gradcheck(lambda x: recompute(lambda x: x.sin(), (x,), *layers), inputs[:1])                # frozen layers, one output


@pytest.mark.parametrize("name", ["tiny", "ti2v", "i2v-clip"])          # per video, per token, with an image branch
def test_no_way_of_keeping_less_changes_velocity_or_gradients(name):
    plain = velocity_and_all_gradients(name, lambda model: None)
    for mode in ("selective", "full"):
        found = velocity_and_all_gradients(name, lambda model: checkpoint_blocks(model, mode))
        assert all(torch.equal(found[key], plain[key]) for key in plain), mode
    for size, mode in ((7, "off"), (45, "selective"), (16, "full")):     # of 45 tokens
        error, key = worst(velocity_and_all_gradients(name, lambda model: (chunk_blocks(model, size), checkpoint_blocks(model, mode))), plain)
        assert error <= 1e-12, (size, mode, key)


@pytest.mark.parametrize("name", ["tiny", "ti2v", "i2v-clip"])
def test_policy_and_reference_start_equal_bit_for_bit_in_bf16_however_little_is_kept(name):
    for mode, size, offload in (("off", 0, False), ("selective", 0, True), ("full", 0, False), ("off", 16, True), ("full", 7, True)):
        (policy, inputs, _), (ref, _, _) = make_case(name), make_case(name)
        checkpoint_blocks(policy, mode, offload)
        for model in (policy.bfloat16(), ref.bfloat16().requires_grad_(False)):
            chunk_blocks(model, size)                                    # as train.py builds them: chunks in both, checkpoints in the policy
        velocity = policy(**inputs)
        assert velocity.requires_grad and torch.equal(velocity, ref(**inputs)), (mode, size)


def test_chunks_in_float32_are_within_1e6_of_the_whole():
    plain, found = (velocity_and_all_gradients("i2v-clip", lambda model: chunk_blocks(model, size), torch.float32) for size in (0, 7))
    flat = lambda gradients: torch.cat([value.flatten() for name, value in gradients.items() if name != "velocity"])
    assert ((flat(found) - flat(plain)).norm() / flat(plain).norm()).item() <= 1e-6
    assert 0 < worst(found, plain)[0]                                    # another order of sums: it did run in chunks


def test_gradients_of_weights_are_summed_over_chunks_in_float32():
    # 512 chunks give 1 each: in bf16 the sum would stay at 256, where the next number is 258
    x, weight = torch.ones(1, 512, 1, dtype=torch.bfloat16, requires_grad=True), torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    Chunks.apply(lambda x: x * weight, 1, 1, 1, x, weight).sum().backward()
    assert weight.grad.item() == 512 and weight.grad.dtype == torch.bfloat16 and (x.grad == 1).all()


def test_chunks_ask_for_no_gradient_of_what_is_frozen_and_work_without_any():
    model, inputs, grad = make_case("tiny")
    chunk_blocks(model, 16)
    whole = model.requires_grad_(False)(**inputs)
    assert not whole.requires_grad and (model(**inputs) - make_case("tiny")[0](**inputs)).abs().max() < 1e-5
    weight = model.blocks[1].ffn[0].weight.requires_grad_(True)
    (model(**inputs) * grad).sum().backward()
    expected = velocity_and_all_gradients("tiny", lambda model: None)["blocks.1.ffn.0.weight"]
    assert ((weight.grad - expected).norm() / expected.norm()).item() < 1e-5
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1


def compiled_and_eager(backend):
    """The velocity of a small model under gradients, compiled; of a frozen copy, compiled; and the largest relative difference of gradients from eager."""
    compiler = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f: compiler(f, backend=backend))
        torch.compiler.reset()
        policy = velocity_and_all_gradients("t2v", compile_blocks, torch.float32)
        model, inputs, _ = make_case("t2v")
        compile_blocks(model)
        with torch.no_grad():
            ref = model.requires_grad_(False)(**inputs)
    torch.compiler.reset()
    eager = velocity_and_all_gradients("t2v", lambda model: None, torch.float32)
    flat = lambda found: torch.cat([value.flatten() for name, value in found.items() if name != "velocity"])
    return policy["velocity"], ref, ((flat(policy) - flat(eager)).norm() / flat(eager).norm()).item(), eager["velocity"]


def test_compiled_blocks_run_the_same_code_with_and_without_gradients():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    policy, ref, error, eager = compiled_and_eager(backend)
    assert torch.equal(policy, ref) and torch.equal(policy, eager) and error <= 1e-6
    assert 10 <= len(graphs) <= 20                                       # six functions, forward and backward, once for all blocks; the reference adds none


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs g++")
def test_blocks_compiled_by_inductor_start_as_equal_policy_and_reference():
    policy, ref, error, eager = compiled_and_eager("inductor")
    assert torch.equal(policy, ref) and error <= 1e-5
    assert ((policy - eager).norm() / eager.norm()).item() <= 1e-5


class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count.update([op.name()] if op.namespace == "c10d" else [])
        return op(*args, **(kwargs or {}))


def gathers_and_error(rank, world_size, port):
    """{way of keeping less: (collectives of one forward and backward, worst relative difference of a gradient from the unsharded model)}, on one of the ranks."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks, found = start_ranks(), {}
    expected = velocity_and_all_gradients("tiny", lambda model: None)
    for way, change in dict(off=lambda model: None, selective=lambda model: checkpoint_blocks(model, "selective"),
                            full=lambda model: checkpoint_blocks(model, "full"), chunks=lambda model: chunk_blocks(model, 16)).items():
        model, inputs, grad = make_case("tiny")
        model, inputs = model.double(), {name: value.double() for name, value in inputs.items()}
        change(model)
        shard_model(model, ranks.mesh)
        with Collectives() as collectives:
            (model(**inputs) * grad).sum().backward()
        error = max(((p.grad.full_tensor() - expected[name]).norm() / expected[name].norm()).item() for name, p in model.named_parameters())
        found[way] = dict(collectives.count), error
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_keeping_less_asks_sharding_for_no_more_gathers():
    port = free_port()
    for rank in [POOLS[rank].submit(gathers_and_error, rank, 2, port) for rank in range(2)]:
        found = rank.result(timeout=120)
        print(found)
        assert found["off"][0] and all(collectives == found["off"][0] and error < 1e-12 for collectives, error in found.values())
