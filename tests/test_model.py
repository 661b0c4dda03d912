"""Small models of every variant against diffusers, presets against the public lists of names and shapes, and files on disk, good and bad."""
import dataclasses
import hashlib
import json
import math
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import model as model_file
import weights
from make_golden import CASES, GOLDEN, diffusers_twin, make_case, velocity_and_gradients
from model import CONFIGS, WanConfig, WanModel, rope_table, rotate, timestep_embedding
from weights import DIFFUSERS_NAMES, expected_shapes, load_wan, open_wan, rename, save_wan

PUBLIC = json.loads((Path(__file__).parent / "wan_keys.json").read_text())    # from the lists of the released files


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def same_weights(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed (requirements-video.txt); the golden file stands in")


@pytest.fixture
def tiny():
    return make_case("tiny")[0]


# ---------------------------------------------------------------------------------------------------------------------------------
# the function

@pytest.mark.parametrize("name", CASES)
def test_velocity_and_input_gradients_equal_those_of_diffusers(name, diffusers):
    model, inputs, grad = make_case(name)
    found, expected = [velocity_and_gradients(forward, inputs, grad) for forward in (model, diffusers_twin(model))]
    assert found.keys() == expected.keys() and len(found) == len(inputs)
    for key in found:
        assert relative_error(found[key], expected[key]) <= 2e-5, key


@pytest.mark.parametrize("name", CASES)
def test_velocity_and_input_gradients_equal_those_of_the_golden_file(name):
    model, inputs, grad = make_case(name)
    found, golden = velocity_and_gradients(model, inputs, grad), load_file(GOLDEN)
    for key in ("velocity", "d_x"):
        assert found[key].dtype == torch.float32
        assert relative_error(found[key], golden[f"{name}.{key}"]) <= 2e-5, key


def test_every_epsilon_shows_in_the_case_of_tiny_activations():
    model, inputs, _ = make_case("tiny-activations")
    norms = {name: module for name, module in model.named_modules() if hasattr(module, "eps")}
    assert {name.removeprefix("blocks.0.") for name in norms if "blocks.1" not in name} == {
        "img_emb.proj.0", "img_emb.proj.4", "norm1", "norm2", "norm3", "self_attn.norm_q", "self_attn.norm_k",
        "cross_attn.norm_q", "cross_attn.norm_k", "cross_attn.norm_k_img", "head.norm"}
    with torch.no_grad():
        velocity = model(**inputs)
        for name, norm in norms.items():
            right, norm.eps = norm.eps, norm.eps * 10                    # 1e-5 where Wan has 1e-6
            assert relative_error(model(**inputs), velocity) > 2e-4, f"2e-5 to diffusers would not show a wrong eps in {name}"
            norm.eps = right


def test_parameter_gradients_equal_finite_differences_in_float64():
    model, inputs, grad = make_case("i2v-clip")
    model, inputs, grad = model.double(), {name: value.double() for name, value in inputs.items()}, grad.double()
    (model(**inputs) * grad).sum().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.1."):
            continue
        direction, step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64), 1e-5
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * step * direction
                values.append((model(**inputs) * grad).sum().item())
                parameter -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-4), name   # slopes are about 1 to 1000


def test_gradients_do_not_depend_on_what_else_is_frozen():
    model, inputs, grad = make_case("i2v-clip")
    expected = velocity_and_gradients(model, inputs, grad)
    (model(**inputs) * grad).sum().backward()
    model.requires_grad_(False)
    assert same_weights(velocity_and_gradients(model, inputs, grad), expected)
    for name in ("blocks.0.modulation", "blocks.0.self_attn.norm_q.weight", "blocks.0.norm3.weight", "blocks.1.ffn.0.bias", "blocks.0.cross_attn.norm_k_img.weight", "head.modulation"):
        parameter = model.get_parameter(name).requires_grad_(True)
        (alone,) = torch.autograd.grad((model(**inputs) * grad).sum(), [parameter])
        assert relative_error(alone, parameter.grad) < 1e-6, name
        parameter.requires_grad_(False)


def test_timestep_embedding_is_cosines_first_and_exact_near_1000():
    row = timestep_embedding(torch.tensor([999.0]), 256)[0]
    assert row[0].item() == math.cos(999) and row[128].item() == math.sin(999)
    assert row[128 + 64].item() == pytest.approx(math.sin(999 / 100), abs=1e-12)      # i = 64 of 128: 10000^(-1/2)


def test_rope_turns_interleaved_pairs_by_frame_row_and_column():
    # K = 24: 8 channels per axis, 4 angles each. Token (frame 1, row 2, column 3) of a 2 x 3 x 5 grid is number 1 * 15 + 2 * 5 + 3 = 28.
    cos, sin = rope_table((2, 3, 5), 24, "cpu")
    assert cos.shape == sin.shape == (30, 1, 24) and cos.dtype == sin.dtype == torch.float32
    frequency = [1, 0.1, 0.01, 0.001]
    angles = torch.tensor([position * f for position in (1, 2, 3) for f in frequency], dtype=torch.float64)
    for table, expected in ((cos[:, :, ::2], angles.cos()), (cos[:, :, 1::2], angles.cos()), (sin[:, :, ::2], -angles.sin()), (sin[:, :, 1::2], angles.sin())):
        torch.testing.assert_close(table[28, 0].double(), expected, atol=1e-7, rtol=0)
    pair = torch.zeros(1, 30, 1, 24)
    pair[..., 8] = 1.0                                                   # first pair of the row axis: (1, 0) -> (cos 2, sin 2)
    turned = rotate(pair, cos, sin)[0, 28, 0]
    assert turned[8].item() == pytest.approx(math.cos(2)) and turned[9].item() == pytest.approx(math.sin(2))
    turned = rotate(pair.roll(1, -1), cos, sin)[0, 28, 0]                # (0, 1) -> (-sin 2, cos 2)
    assert turned[8].item() == pytest.approx(-math.sin(2)) and turned[9].item() == pytest.approx(math.cos(2))
    assert [size for size in (rope_table((1, 1, 2), 64, "cpu")[1][1, 0] != 0).long().tolist()] == [0] * 44 + [1] * 20   # 64 = 24 + 20 + 20


def test_videos_of_a_batch_do_not_mix_and_one_timestep_per_token_says_the_same_as_one_per_video():
    model, inputs, _ = make_case("tiny")
    with torch.no_grad():
        velocity = model(**inputs)
        alone = [model(**{name: value[i:i + 1] for name, value in inputs.items()}) for i in (0, 1)]
        per_token = model(**inputs | {"timestep": inputs["timestep"][:, None].repeat(1, 45)})
    assert relative_error(torch.cat(alone), velocity) < 1e-6
    assert relative_error(per_token, velocity) < 1e-6


def test_context_is_filled_with_zeros_and_these_are_attended():
    model, inputs, _ = make_case("tiny")
    context = inputs["context"]
    with torch.no_grad():
        velocity = model(**inputs)
        assert torch.equal(model(**inputs | {"context": torch.cat([context, torch.zeros(2, 7, 32)], dim=1)}), velocity)
        assert torch.equal(model(**inputs | {"context": context[:, :0]}), model(**inputs | {"context": torch.zeros(2, 16, 32)}))
        model.text_embedding[0].bias += 1.0                              # what a padding row becomes
        assert relative_error(model(**inputs | {"context": context[:, :0]}), velocity) > 0.01


def test_a_block_takes_tensors_only_and_checkpointing_by_patching_its_forward_changes_nothing():
    model, inputs, grad = make_case("ti2v")
    assert isinstance(model.blocks, torch.nn.ModuleList)
    expected = velocity_and_gradients(model, inputs, grad)

    def checkpointed(forward):
        def call(*args):
            assert all(isinstance(arg, torch.Tensor) for arg in args)
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
        return call
    for block in model.blocks:
        block.forward = checkpointed(block.forward)
    assert same_weights(velocity_and_gradients(model, inputs, grad), expected)


# ---------------------------------------------------------------------------------------------------------------------------------
# numbers

@pytest.mark.parametrize("name", CASES)
def test_bf16_weights_cost_less_than_4e3_and_an_odd_timestep_is_not_rounded(name):
    model, inputs, _ = make_case(name)
    half, rounded = WanModel(model.config).bfloat16(), WanModel(model.config)
    half.load_state_dict(model.state_dict())
    rounded.load_state_dict(half.state_dict())                           # the same weights in float32: only the arithmetic differs
    with torch.no_grad():
        velocity = half(**inputs)
        assert velocity.dtype == torch.float32
        assert relative_error(velocity, rounded(**inputs)) <= 4e-3
        assert not torch.equal(half(**inputs | {"timestep": inputs["timestep"] * 1.001}), velocity)


def test_with_bf16_weights_matrices_are_bf16_and_time_residual_and_head_are_float32():
    model, inputs, _ = make_case("i2v-clip")
    model, dtypes, linears, attended = model.bfloat16(), {}, [], []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: dtypes.update({name: (args[0].dtype, out.dtype)}) if args and torch.is_tensor(out) else None)
    originals = {name: getattr(torch.nn.functional, name) for name in ("linear", "scaled_dot_product_attention")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file, "ONEDNN", False)
        patch.setattr(torch.nn.functional, "linear", lambda x, *args: linears.append((x.dtype, x.shape[-1], len(args[0]))) or originals["linear"](x, *args))
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                      lambda *args: attended.append({arg.dtype for arg in args}) or originals["scaled_dot_product_attention"](*args))
        model(**inputs)
    full, half = torch.float32, torch.bfloat16
    for name in ("time_embedding", "time_embedding.0", "time_embedding.2", "time_projection.1", "blocks.0", "blocks.1", "head"):
        assert dtypes[name] == (full, full), name
    for name in ("text_embedding", "img_emb", "blocks.0.self_attn.o", "blocks.0.self_attn.norm_q", "blocks.0.cross_attn.norm_q", "blocks.0.cross_attn.o",
                 "blocks.0.cross_attn.k_img"):
        assert dtypes[name] == (half, half), name
    assert dtypes["blocks.0.norm1"] == dtypes["blocks.0.norm2"] == (full, half) and dtypes["head.norm"] == (full, full)
    wide = [shape for dtype, *shape in linears if dtype == full]         # in, out: two of the time embedding, its projection, the head
    assert wide == [[256, 128], [128, 128], [128, 6 * 128], [128, 4 * 4]]
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules()) + 1        # and the patch embedding
    assert len(linears) == layers
    assert attended == [{half}] * 6                                      # self, text and image in two blocks


def test_rms_norm_computes_in_float32_on_bf16():
    x = 1 + 2 ** -7 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    norm = model_file.RMSNorm(512, eps=1e-6).bfloat16()
    exact = (x.bfloat16().double() / (x.bfloat16().double() ** 2).mean(-1, keepdim=True).add(1e-6).sqrt()).to(torch.bfloat16)
    assert relative_error(norm(x.bfloat16(), norm.weight, 4).flatten(1), exact) < 1e-4       # one rounding; statistics in bf16 would be off by 1e-3


def test_a_float64_model_stays_in_float64():
    model, inputs, grad = make_case("flf2v")
    single = velocity_and_gradients(model, inputs, grad)
    double = velocity_and_gradients(model.double(), {name: value.double() for name, value in inputs.items()}, grad.double())
    for key in double:
        assert double[key].dtype == torch.float64 and relative_error(single[key], double[key]) < 3e-6, key


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_products_by_onednn_and_by_the_default_are_the_same_matrices(monkeypatch, onednn, bias):
    monkeypatch.setattr(model_file, "ONEDNN", onednn)
    x, weight, bias, add_to = torch.randn(2, 6, 48), torch.randn(40, 48), torch.randn(40) if bias else None, torch.randn(12, 40)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert relative_error(model_file.product(x, weight, bias), exact) < 1e-6
    for a, b in ((x.flatten(0, 1), weight), (x.flatten(0, 1).t().contiguous().t(), weight.t().contiguous().t())):       # as they lie, and transposed, as in backward
        assert relative_error(model_file.product(a, b, add_to=add_to.clone()), add_to.double() + a.double() @ b.double().t()) < 1e-6


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
def test_a_model_by_onednn_is_the_same_model(monkeypatch):
    model, inputs, grad = make_case("i2v-clip")
    found = []
    for onednn in (False, True):
        monkeypatch.setattr(model_file, "ONEDNN", onednn)
        found.append(velocity_and_gradients(model, inputs, grad))
    for key in found[0]:
        assert relative_error(found[1][key], found[0][key]) < 3e-6, key


# ---------------------------------------------------------------------------------------------------------------------------------
# presets and initialisation

@pytest.mark.parametrize("preset", PUBLIC)
def test_a_preset_has_the_names_shapes_and_parameters_of_the_public_checkpoint(preset):
    shapes = expected_shapes(CONFIGS[preset])
    for format, names in (("original", shapes), ("diffusers", [rename(name, DIFFUSERS_NAMES) for name in shapes])):
        lines = sorted(f"{name}:{','.join(map(str, shape))}" for name, shape in zip(names, shapes.values()))
        assert len(lines) == PUBLIC[preset][format]["tensors"]
        assert sum(math.prod(shape) for shape in shapes.values()) == PUBLIC[preset][format]["parameters"]
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PUBLIC[preset][format]["sha256"]


def test_presets_have_the_public_number_of_parameters_heads_and_type():
    counts = {"wan2.1-t2v-1.3b": 1_418_996_800, "wan2.1-t2v-14b": 14_288_491_584, "wan2.1-i2v-14b": 16_394_878_784,
              "wan2.1-flf2v-14b": 16_395_536_704, "wan2.2-ti2v-5b": 4_999_787_712, "wan2.2-t2v-a14b": 14_288_491_584,
              "wan2.2-i2v-a14b": 14_288_901_184, "tiny": 1_243_312}
    types = dict(zip(counts, ("t2v", "t2v", "i2v", "flf2v", "ti2v", "t2v", "i2v", "t2v")))
    assert CONFIGS.keys() == counts.keys()
    for preset, config in CONFIGS.items():
        assert sum(math.prod(shape) for shape in expected_shapes(config).values()) == counts[preset], preset
        assert config.dim // config.num_heads == (32 if preset == "tiny" else 128) and config.eps == 1e-6
        assert config.model_type == types[preset]


def test_initial_weights_have_the_official_statistics_and_the_first_velocity_is_zero():
    torch.manual_seed(0)
    model = WanModel(dataclasses.replace(CONFIGS["tiny"], in_dim=16, image_dim=64, image_pos_len=514))
    xavier = lambda rows, columns: math.sqrt(2 / (rows + columns))       # standard deviation
    for name, parameter in model.named_parameters():
        bound = None
        if name in ("head.head.weight", "img_emb.emb_pos") or name.endswith("bias") and name != "patch_embedding.bias":
            assert (parameter == 0).all(), name
        elif name == "patch_embedding.bias":
            assert 0 < parameter.abs().max() <= 1 / math.sqrt(16 * 4)    # PyTorch's default
        elif "norm" in name or name in ("img_emb.proj.0.weight", "img_emb.proj.4.weight"):
            assert (parameter == 1).all(), name
        else:
            std = 1 / math.sqrt(128) if "modulation" in name else 128 ** -0.5 if name.startswith(("text_", "time_embedding")) else None   # 0.02 from width 1024 on
            if std is None:
                std = xavier(*parameter.flatten(1).shape)
                bound = math.sqrt(3) * std                               # uniform
            assert parameter.std().item() == pytest.approx(std, rel=4 / math.sqrt(parameter.numel())), name
            assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name
            assert (parameter.abs().max() <= bound) if bound else (parameter.abs().max() > 2 * std), name
    velocity = model(torch.randn(1, 12, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 32), torch.randn(1, 4, 1, 4, 4), torch.randn(1, 514, 64))
    assert (velocity == 0).all()
    wide = WanModel(WanConfig(dim=1024, ffn_dim=8, num_heads=8, num_layers=0, in_dim=4, out_dim=4, text_dim=64))
    for layer in (wide.text_embedding[0], wide.text_embedding[2], wide.time_embedding[0], wide.time_embedding[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------------------
# files

@pytest.mark.parametrize("name", CASES)
def test_weights_come_back_bit_for_bit_through_every_format(name, tmp_path):
    model = make_case(name)[0]
    state = model.state_dict()
    for format in ("original", "diffusers", "comfyui"):
        path = tmp_path / (format + ".safetensors" * (format == "comfyui"))
        save_wan(model, path, format)
        model = load_wan(path, model.config)                             # the next format is written from what this one gave
        assert model.config == CASES[name] and same_weights(model.state_dict(), state)
        assert all(parameter.requires_grad for parameter in model.parameters())
    names = set(load_file(tmp_path / "comfyui.safetensors"))
    assert names == {"model.diffusion_model." + name for name in state}


def test_settings_that_differ_from_the_public_ones_come_back_through_every_format(tmp_path):
    config = WanConfig(dim=36, ffn_dim=20, num_heads=3, num_layers=1, in_dim=7, out_dim=3, text_dim=10, text_len=9, freq_dim=8,
                       patch_size=(2, 1, 2), eps=1e-5, image_dim=12, image_pos_len=6)
    for format in ("original", "diffusers", "comfyui"):
        save_wan(WanModel(config), tmp_path / format, format)
        assert open_wan(tmp_path / format)[0] == config


@pytest.mark.parametrize("name", ["t2v", "flf2v", "i2v-a14b"])
def test_diffusers_reads_our_folder_and_we_read_its(name, diffusers, tmp_path):
    model, inputs, _ = make_case(name)
    save_wan(model, tmp_path / "ours", "diffusers")
    twin = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours")
    expected = {rename(name, DIFFUSERS_NAMES): tensor for name, tensor in model.state_dict().items()}
    assert twin.state_dict().keys() == expected.keys() and all(torch.equal(tensor, expected[name]) for name, tensor in twin.state_dict().items())
    twin.save_pretrained(tmp_path / "theirs" / "transformer")
    settings = json.loads((tmp_path / "theirs" / "transformer" / "config.json").read_text())
    settings["text_len"] = model.config.text_len                         # always 512 in diffusers
    (tmp_path / "theirs" / "transformer" / "config.json").write_text(json.dumps(settings))
    for path in (tmp_path / "theirs", tmp_path / "theirs" / "transformer"):
        again = load_wan(path)
        assert again.config == model.config and same_weights(again.state_dict(), model.state_dict())


def test_large_weights_are_written_in_shards_with_an_index_and_a_smaller_number_replaces_them(tiny, tmp_path):
    nbytes = 4 * sum(parameter.numel() for parameter in tiny.parameters())
    save_wan(tiny, tmp_path, max_shard_bytes=nbytes // 3)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [shard.name[-22:] for shard in shards] == [f"{i}-of-0000{len(shards)}.safetensors" for i in range(1, len(shards) + 1)] and len(shards) >= 4
    assert all(shard.stat().st_size < nbytes // 3 + 20_000 for shard in shards)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == nbytes and set(index["weight_map"]) == set(tiny.state_dict())
    assert same_weights(load_wan(tmp_path).state_dict(), tiny.state_dict())
    (tmp_path / "prompts.txt").write_text("mine")
    (tmp_path / "diffusion_pytorch_model.safetensors.tmp").write_text("of a run that was killed")
    with torch.no_grad():
        tiny.head.head.weight += 1
    save_wan(tiny, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors", "prompts.txt"]
    assert same_weights(load_wan(tmp_path).state_dict(), tiny.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_can_be_written_and_read_as_another_dtype(tiny, tmp_path, dtype):
    save_wan(tiny.state_dict(), tmp_path / "model.safetensors", "comfyui", config=tiny.config, dtype=dtype)
    expected = {name: tensor.to(dtype) for name, tensor in tiny.state_dict().items()}
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert same_weights(load_wan(tmp_path / "model.safetensors", dtype=dtype).state_dict(), expected)
    assert {parameter.dtype for parameter in load_wan(tmp_path / "model.safetensors").parameters()} == {torch.float32}


def test_weights_go_from_one_format_to_another_one_tensor_at_a_time(tmp_path):
    model, held = make_case("flf2v")[0], []
    save_wan(model, tmp_path / "diffusers", "diffusers", max_shard_bytes=10**5)
    config, tensors = open_wan(tmp_path / "diffusers")
    with torch.device("meta"):
        empty = WanModel(config)

    def read(name):
        assert not held or held[-1]() is None, "the tensor before this one is still in memory"
        tensor = tensors[name][:]
        held.append(weakref.ref(tensor))
        return tensor
    save_wan(empty, tmp_path / "comfyui.safetensors", "comfyui", read=read)
    assert len(held) == len(model.state_dict()) and same_weights(load_wan(tmp_path / "comfyui.safetensors").state_dict(), model.state_dict())


def test_tensors_of_two_types_are_written_with_each_aligned_to_its_own(tiny, tmp_path):
    state = {name: tensor.bfloat16() if i % 2 else tensor for i, (name, tensor) in enumerate(tiny.state_dict().items())}
    state["head.head.bias"] = state["head.head.bias"].double()
    save_wan(state, tmp_path, config=tiny.config)
    assert {name: tensor.dtype for name, tensor in load_file(tmp_path / WHOLE).items()} == {name: tensor.dtype for name, tensor in state.items()}
    with open(tmp_path / WHOLE, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
    for name, tensor in state.items():
        assert (start + header[name]["data_offsets"][0]) % tensor.itemsize == 0, name


def test_slices_read_rows_only_under_the_original_names(tiny, tmp_path):
    save_wan(tiny, tmp_path, "diffusers", max_shard_bytes=10**6)
    config, tensors = open_wan(tmp_path)
    assert config == CONFIGS["tiny"] and tensors.keys() == tiny.state_dict().keys()
    assert not any(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    rows = tensors["blocks.3.ffn.0.weight"]
    assert rows.get_shape() == [512, 128] and torch.equal(rows[100:164], tiny.blocks[3].ffn[0].weight[100:164])


def test_a_failed_write_leaves_the_old_weights(tiny, tmp_path, monkeypatch):
    save_wan(tiny, tmp_path, max_shard_bytes=10**6)
    old = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    written, write = [], weights.write_tensors

    def full_disk(file, *args):
        if written:
            raise OSError("No space left on device")
        written.append(write(file, *args))
    monkeypatch.setattr(weights, "write_tensors", full_disk)
    with torch.no_grad():
        tiny.patch_embedding.weight += 1
    with pytest.raises(OSError):
        save_wan(tiny, tmp_path, max_shard_bytes=10**6)
    assert written and (tmp_path / "diffusion_pytorch_model-00001-of-00006.safetensors.tmp").exists() and same_weights(load_wan(tmp_path).state_dict(), old)
    monkeypatch.undo()
    save_wan(tiny, tmp_path, max_shard_bytes=10**6)
    assert same_weights(load_wan(tmp_path).state_dict(), tiny.state_dict()) and not list(tmp_path.glob("*.tmp"))


def test_written_files_can_be_read_by_whom_the_umask_allows(tiny, tmp_path):
    old = os.umask(0o022)
    try:
        save_wan(tiny, tmp_path)
    finally:
        os.umask(old)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o644}


def test_a_single_file_without_prefix_or_config_is_the_preset_with_its_tensors(tiny, tmp_path):
    save_file(tiny.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "num_layers": 3}')      # of another model in the same folder
    assert load_wan(tmp_path / "model.safetensors").config == CONFIGS["tiny"]
    other = make_case("t2v")[0]
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: no config.json of a Wan model, and the 69 tensors .* not those of tiny, wan2.1"):
        load_wan(tmp_path / "model.safetensors")
    assert load_wan(tmp_path / "model.safetensors", CASES["t2v"]).config == CASES["t2v"]


def test_an_unused_norm_of_old_diffusers_files_is_ignored(tmp_path):
    model = make_case("i2v-clip")[0]
    save_wan(model, tmp_path, "diffusers")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(128)}, file)
    assert same_weights(load_wan(tmp_path).state_dict(), model.state_dict())


# ---------------------------------------------------------------------------------------------------------------------------------
# what a user can get wrong

def edit_weights(folder, edit):
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({name: value for name, value in (json.loads(file.read_text()) | changes).items() if value is not None}))


def cut(file, nbytes):
    file.write_bytes(file.read_bytes()[:nbytes])


WHOLE, SHARD = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00002-of-00006.safetensors"
BAD_FOLDERS = {
    "a tensor of another shape": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update({"blocks.2.ffn.0.bias": torch.zeros(511)})),
        rf"{WHOLE}: tensor blocks.2.ffn.0.bias is \(511,\), expected \(512,\) in tiny; 1 tensors of 123 differ"),
    "a missing tensor": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.pop("blocks.1.norm3.bias")),
        r"folder: tensor blocks.1.norm3.bias is missing, expected \(128,\)"),
    "a left-over tensor": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update({"vace_blocks.0.modulation": torch.zeros(1, 6, 128)})),
        rf"{WHOLE}: tensor vace_blocks.0.modulation is \(1, 6, 128\), expected no such tensor"),
    "fp8 weights": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update({"head.head.bias": torch.zeros(48).to(torch.float8_e4m3fn)})),
        rf"{WHOLE}: head.head.bias is F8_E4M3: 8-bit and scaled files are for inference.*use the bf16"),
    "scales beside the weights": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update({"head.head.scale_weight": torch.ones(1)})),
        rf"{WHOLE}: head.head.scale_weight is F32: 8-bit and scaled"),
    "no tensors of Wan at all": (
        lambda folder: save_file({"conv_in.weight": torch.zeros(3, 3)}, folder / WHOLE), r"folder: tensor patch_embedding.weight is missing"),
    "a truncated file": (lambda folder: cut(folder / WHOLE, 100_000), rf"{WHOLE}: not a whole safetensors file \(.*\); copy or download it again"),
    "an empty file": (lambda folder: cut(folder / WHOLE, 0), rf"{WHOLE}: not a whole safetensors file"),
    "config.json of another size": (
        lambda folder: edit_config(folder, ffn_dim=1024), rf"{WHOLE}: tensor blocks.0.ffn.0.weight is \(512, 128\), expected \(1024, 128\) in WanConfig\(.*ffn_dim=1024"),
    "config.json of another type": (
        lambda folder: edit_config(folder, model_type="i2v"), r"config.json: model_type is i2v, but the tensors beside it are those of t2v"),
    "config.json without a size": (
        lambda folder: edit_config(folder, num_heads=None), r"config.json: no num_heads; not the config.json of a Wan"),
    "config.json that is not JSON": (lambda folder: cut(folder / "config.json", 40), r"config.json: not JSON"),
    "no weights": (lambda folder: (folder / WHOLE).unlink(), r"folder: expected one .safetensors file.*; found 0 and 0 \(pickled weights"),
    "two weights and no index": (
        lambda folder: shutil.copy(folder / WHOLE, folder / "other.safetensors"), r"folder: expected one .safetensors file.*; found 2 and 0"),
    "no folder": (lambda folder: shutil.rmtree(folder), r"folder: no such file or folder"),
    "two experts": (
        lambda folder: (folder / "low_noise_model").mkdir(), r"folder holds two experts: give .*high_noise_model \(high noise\) or .*low_noise_model"),
    "two experts of diffusers": (lambda folder: (folder / "transformer_2").mkdir(), r"holds two experts: give .*transformer \(high noise\)"),
}
BAD_SHARDS = {
    "a shard that is not there": (lambda folder: (folder / SHARD).unlink(), rf"index.json names {SHARD}, which is not there"),
    "a truncated shard": (lambda folder: cut(folder / SHARD, 5000), rf"{SHARD}: not a whole safetensors file"),
    "a shard without one of its tensors": (
        lambda folder: save_file(dict(list(load_file(folder / SHARD).items())[1:]), folder / SHARD), rf"{SHARD}: no tensor blocks\.\S+, though .*index.json says so"),
    "no index": (lambda folder: next(folder.glob("*.index.json")).unlink(), r"folder: expected one .safetensors file.*; found 6 and 0"),
    "an empty index": (lambda folder: next(folder.glob("*.index.json")).write_text("{}"), r"index.json: no weight_map"),
    "a broken index": (lambda folder: cut(next(folder.glob("*.index.json")), 300), r"index.json: not JSON"),
}


@pytest.mark.parametrize("name", [*BAD_FOLDERS, *BAD_SHARDS])
def test_a_bad_checkpoint_is_refused_with_the_reason(name, tiny, tmp_path):
    damage, message = (BAD_FOLDERS | BAD_SHARDS)[name]
    save_wan(tiny, tmp_path / "folder", max_shard_bytes=10**6 if name in BAD_SHARDS else 10**9)
    load_wan(tmp_path / "folder")
    damage(tmp_path / "folder")
    with pytest.raises(ValueError, match=message):
        load_wan(tmp_path / "folder")


@pytest.mark.parametrize("extra", [{}, {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), "blocks.0.ffn.0.scale_weight": torch.ones(1)}])
def test_an_8_bit_file_of_comfyui_is_refused_with_the_reason(tiny, extra, tmp_path):
    state = {name: tensor.to(torch.float8_e4m3fn) if name.endswith("weight") and tensor.ndim == 2 else tensor.half() for name, tensor in tiny.state_dict().items()}
    save_file({"model.diffusion_model." + name: tensor for name, tensor in (state | extra).items()}, tmp_path / "wan_fp8.safetensors")
    with pytest.raises(ValueError, match=r"wan_fp8.safetensors: model.diffusion_model.\S+ is F\S+: 8-bit and scaled files are for inference.*use the bf16, fp16 or fp32 file"):
        open_wan(tmp_path / "wan_fp8.safetensors")


@pytest.mark.parametrize("name, changes, says", [
    ("i2v-clip", dict(image_dim=None), "image_dim is None, but the tensors beside it have an image branch of 40"),
    ("i2v-a14b", dict(image_dim=1280), "image_dim is 1280, but the tensors beside it have an image branch of 0"),
    ("flf2v", dict(pos_embed_seq_len=None), "image_pos_len is None, but the tensors beside it have an image branch of 514")])
def test_an_image_branch_that_is_not_what_config_json_says_is_refused(name, changes, says, tmp_path):
    save_wan(make_case(name)[0], tmp_path, "diffusers")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tmp_path / "config.json").read_text()) | changes))
    with pytest.raises(ValueError, match="config.json: " + says):
        open_wan(tmp_path)


def test_weights_of_another_variant_than_the_one_asked_for_are_refused(tiny, tmp_path):
    save_wan(tiny, tmp_path / "folder")
    with pytest.raises(ValueError, match=r"config.json: dim is 128, expected 1536 in the model asked for"):
        load_wan(tmp_path / "folder", CONFIGS["wan2.1-t2v-1.3b"])
    with pytest.raises(ValueError, match=r"config.json: num_heads is 4, expected 2"):                # not visible in any tensor
        load_wan(tmp_path / "folder", dataclasses.replace(CONFIGS["tiny"], num_heads=2))
    save_file(tiny.state_dict(), tmp_path / "single.safetensors")
    with pytest.raises(ValueError, match=r"single.safetensors: tensor patch_embedding.weight is \(128, 12, 1, 2, 2\), expected \(1536, 16, 1, 2, 2\) in wan2.1-t2v-1.3b"):
        load_wan(tmp_path / "single.safetensors", CONFIGS["wan2.1-t2v-1.3b"])


def test_pickled_weights_are_not_read(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth: not a whole safetensors file"):
        load_wan(tmp_path / "model.pth")


def test_save_wan_refuses_an_unknown_format_and_weights_that_do_not_fit(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"format is 'gguf', expected one of original, comfyui, diffusers"):
        save_wan(tiny, tmp_path, "gguf")
    with pytest.raises(ValueError, match=r"comfyui weights are a single file, and this is a folder"):
        save_wan(tiny, tmp_path, "comfyui")
    with pytest.raises(ValueError, match=r"model.safetensors: diffusers weights are a folder, and this is a file"):
        save_wan(tiny, tmp_path / "model.safetensors", "diffusers")
    state = tiny.state_dict()
    del state["head.modulation"]
    with pytest.raises(ValueError, match=r"nothing was written\): tensor head.modulation is missing, expected \(1, 2, 128\) in tiny"):
        save_wan(state, tmp_path, config=tiny.config)
    assert not list(tmp_path.iterdir())


BAD_INPUTS = {
    "x with other channels": ("t2v", dict(x=torch.zeros(2, 5, 3, 6, 10)), r"x is \(2, 5, 3, 6, 10\); expected \(B, 4, F, H, W\)"),
    "x that is not cut by the patches": ("t2v", dict(x=torch.zeros(2, 4, 3, 6, 9)), r"multiples of \(1, 2, 2\)"),
    "x without batch": ("t2v", dict(x=torch.zeros(4, 3, 6, 10)), r"x is \(4, 3, 6, 10\)"),
    "one timestep for two videos": ("t2v", dict(timestep=torch.zeros(1)), r"timestep is \(1,\) torch.float32; expected \(2,\) or one per token, \(2, 45\)"),
    "timestep per frame": ("ti2v", dict(timestep=torch.zeros(2, 3)), r"timestep is \(2, 3\)"),
    "timestep in bf16": ("t2v", dict(timestep=torch.zeros(2, dtype=torch.bfloat16)), r"timestep is \(2,\) torch.bfloat16; .* float32"),
    "too long a context": ("t2v", dict(context=torch.zeros(2, 13, 20)), r"context is \(2, 13, 20\); expected \(2, at most 12, 20\)"),
    "context of another encoder": ("t2v", dict(context=torch.zeros(2, 9, 21)), r"context is \(2, 9, 21\)"),
    "context without batch": ("t2v", dict(context=torch.zeros(9, 20)), r"context is \(9, 20\)"),
    "no condition": ("i2v-a14b", dict(y=None), r"condition y is None; this i2v model with x \(2, 4, 3, 6, 10\) takes \(2, 5, 3, 6, 10\)"),
    "condition of another size": ("i2v-a14b", dict(y=torch.zeros(2, 5, 1, 6, 10)), r"y is \(2, 5, 1, 6, 10\)"),
    "condition for a text model": ("t2v", dict(y=torch.zeros(2, 5, 3, 6, 10)), r"y is \(2, 5, 3, 6, 10\); this t2v .* takes None"),
    "no CLIP features": ("i2v-clip", dict(clip_features=None), r"condition clip_features is None; this i2v model with x .* takes \(2, 257, 40\)"),
    "CLIP features of one image for two": ("flf2v", dict(clip_features=torch.zeros(2, 257, 40)), r"this flf2v model with x .* takes \(2, 514, 40\)"),
    "CLIP features for Wan2.2": ("i2v-a14b", dict(clip_features=torch.zeros(2, 257, 40)), r"clip_features is \(2, 257, 40\); .* takes None"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused(name):
    case, changes, message = BAD_INPUTS[name]
    model, inputs, _ = make_case(case)
    with pytest.raises(ValueError, match=message):
        model(**inputs | changes)
