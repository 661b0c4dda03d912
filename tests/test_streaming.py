"""Blocks that stay in CPU memory while a model is sampled."""
import copy
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import streaming
from lora_files import Adapter, save_lora
from make_golden import make_case
from model import CONFIGS, WanModel
from samples import read_sample
from streaming import Stream, stream_blocks
from weights import save_wan

CPU = torch.device("cpu")


def frozen(case):
    """A small model without gradients, and its inputs."""
    model, inputs, _ = make_case(case)
    return model.eval().requires_grad_(False), inputs


@pytest.mark.parametrize("case", ["tiny", "ti2v", "i2v-clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_model_is_the_model_in_every_bit(case, dtype):
    model, inputs = frozen(case)
    model.to(dtype)
    expected = model(**inputs)
    stream_blocks(model, "blocks", CPU)
    for _ in range(2):
        assert torch.equal(model(**inputs), expected)


class Devices(TorchDispatchMode):
    """Records where the second factor of matrix products is, and what moves from the meta device to the CPU."""
    def __init__(self):
        super().__init__()
        self.products, self.returned = set(), []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.products.add(args[-1].device.type)
        if torch.is_tensor(result) and result.device.type == "cpu":
            self.returned += [op for arg in args if torch.is_tensor(arg) and arg.device.type == "meta"]
        return result


def test_blocks_compute_on_the_device_and_stay_in_cpu_memory():
    model, inputs = frozen("tiny")                         # "meta" stands for a GPU: it has shapes and no numbers
    blocks, before = list(model.blocks), copy.deepcopy(model.blocks.state_dict())
    stream_blocks(model, "blocks", "meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}             # all but the blocks
    places = [p.data_ptr() for block in blocks for p in block.parameters()]
    with Devices() as devices:
        velocity = model(**{name: value.to("meta") for name, value in inputs.items()})
    assert velocity.device.type == "meta" and devices.products == {"meta"} and devices.returned == []
    model.to("meta")                                       # as one expert moves away when the other comes
    assert places == [p.data_ptr() for block in blocks for p in block.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in torch.nn.ModuleList(blocks).state_dict().items())


def test_the_next_block_is_fetched_before_a_block_runs_and_two_are_on_the_device_at_most(monkeypatch):
    model, inputs = frozen("tiny")
    order, on_device = [], []
    fetch = Stream.fetch

    def record(self, number):
        weights = fetch(self, number)
        order.append(f"fetch {number}")
        on_device.append(weakref.ref(weights["ffn.0.weight"].untyped_storage()))
        assert sum(storage() is not None for storage in on_device) <= 2
        return weights
    monkeypatch.setattr(Stream, "fetch", record)
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda block, inputs, number=number: order.append(f"run {number}"))
    stream_blocks(model, "blocks", CPU)
    model(**inputs)
    last = len(model.blocks) - 1
    expected = ["fetch 0"]
    for number in range(last):
        expected += [f"fetch {number + 1}", f"run {number}"]
    assert order == [*expected, f"run {last}"]
    assert all(storage() is None for storage in on_device)


def test_after_a_block_that_failed_a_model_computes_as_before():
    model, inputs = frozen("tiny")
    expected, block = model(**inputs), model.blocks[1]
    stream_blocks(model, "blocks", CPU)
    attend = block.self_attn.attend
    block.self_attn.attend = lambda *inputs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    block.self_attn.attend = attend
    assert torch.equal(model(**inputs), expected)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two experts and a LoRA file for them."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("high_noise_model", "low_noise_model")):
        torch.manual_seed(seed)
        model = WanModel(CONFIGS["tiny"])
        torch.nn.init.normal_(model.head.head.weight, std=0.05)
        save_wan(model, folder / name)
    adapters = {f"blocks.{i}.self_attn.q": Adapter(torch.randn(2, 128), torch.randn(128, 2), 1.0) for i in (0, 2)}
    save_lora(folder / "lora.safetensors", adapters)
    return folder


@pytest.mark.parametrize("init, flags", [
    ("high_noise_model/diffusion_pytorch_model.safetensors", ()),
    ("high_noise_model/diffusion_pytorch_model.safetensors", ("--lora", "lora.safetensors:0.5")),
    ("", ("--boundary", "0.9", "--low_lora", "lora.safetensors"))])
def test_samples_with_offloaded_params_are_those_without_in_every_bit(models, tmp_path, monkeypatch, init, flags):
    pytest.importorskip("av", reason="mp4 files need PyAV (requirements-video.txt)")
    monkeypatch.chdir(models)
    streamed = []
    monkeypatch.setattr(streaming, "stream_blocks", lambda *args: streamed.append(args) or stream_blocks(*args))
    made = []
    for offload in ((), ("--offload_params",)):
        out = tmp_path / f"out{len(offload)}"
        sample.main(sample.parse_args(["--prompts", "small red circle moving fast left", "large blue square", "--init",
                                       str(models / init), "--steps", "3", "--guidance", "2", "--batch_size", "1",
                                       "--out", str(out), *flags, *offload]))
        made.append([read_sample(out / f"0000{i}.safetensors")["latents"] for i in range(2)])
    assert len(streamed) == (2 if init == "" else 1)
    assert all(torch.equal(one, other) for one, other in zip(*made))
