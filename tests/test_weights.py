"""Public weight files: presets against the lists of the released files, three formats in and out, and files that are refused."""
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

import weights
from make_golden import CASES, make_case
from model import CONFIGS, WanConfig, WanModel
from weights import (
    DIFFUSERS_NAMES,
    check_timesteps,
    expected_shapes,
    find_experts,
    find_model,
    load_wan,
    locate_weights,
    open_wan,
    rename,
    save_wan,
)

PUBLIC = json.loads((Path(__file__).parent / "wan_keys.json").read_text())    # from the lists of the released files


def same_weights(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def tiny():
    return make_case("tiny")[0]


@pytest.mark.parametrize("preset", PUBLIC)
def test_a_preset_has_the_names_shapes_and_parameters_of_the_public_checkpoint(preset):
    shapes = expected_shapes(CONFIGS[preset])
    for format, names in (("original", shapes), ("diffusers", [rename(name, DIFFUSERS_NAMES) for name in shapes])):
        lines = sorted(f"{name}:{','.join(map(str, shape))}" for name, shape in zip(names, shapes.values()))
        assert len(lines) == PUBLIC[preset][format]["tensors"]
        assert sum(math.prod(shape) for shape in shapes.values()) == PUBLIC[preset][format]["parameters"]
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PUBLIC[preset][format]["sha256"]


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
def test_diffusers_reads_our_folder_and_we_read_its(name, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (requirements-video.txt)")
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


# ---------------------------------------------------------------------------------------------------------------------------------
# which model, and which expert

def find_and_check(path, model="auto", min_timestep=600.0, max_timestep=1000.0):
    """As train.py does it, at its default timesteps."""
    config, preset, expert = find_model(path, model)
    check_timesteps(preset, expert, min_timestep, max_timestep, path)
    return config, preset, expert


def test_the_model_is_found_from_its_checkpoint(tmp_path):
    assert find_model(weights.HERE / "toy_base") == (CONFIGS["tiny"], "tiny", "")
    assert find_model("scratch") == (CONFIGS["tiny"], "tiny", "")
    assert find_model("scratch", "wan2.1-t2v-1.3b") == (CONFIGS["wan2.1-t2v-1.3b"], "wan2.1-t2v-1.3b", "")
    for name in ("t2v", "i2v-clip", "flf2v"):
        config = CASES[name]
        save_wan(WanModel(config), tmp_path / name)
        assert find_model(tmp_path / name) == (config, f"{config.model_type} of width {config.dim}, 2 blocks", "")
    with pytest.raises(ValueError, match="--model tiny --init .*t2v: .*config.json: dim is 72, expected 128"):
        find_model(tmp_path / "t2v", "tiny")


def test_weights_of_this_repository_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(locate_weights("toy_base")) == weights.HERE / "toy_base"
    (tmp_path / "toy_base").mkdir()
    assert locate_weights("toy_base") == "toy_base"                           # the user's own comes first
    with pytest.raises(ValueError, match="--score nowhere: no such file or folder; give a Wan checkpoint"):
        locate_weights("nowhere", "--score")


@pytest.fixture
def experts(tmp_path, monkeypatch):
    """Small twins: T2V-A14B's experts look like Wan2.1-T2V-14B, I2V-A14B's like no other model."""
    for preset, name in (("wan2.1-t2v-14b", "t2v"), ("wan2.2-t2v-a14b", "t2v"), ("wan2.2-i2v-a14b", "i2v-a14b")):
        monkeypatch.setitem(CONFIGS, preset, CASES[name])
    t2v, i2v = (WanModel(CASES[name]) for name in ("t2v", "i2v-a14b"))
    for folder in ("T2V/high_noise_model", "T2V/low_noise_model", "Wan2.1-T2V-14B", "Wan2.1-Diffusers/transformer", "lone/high_noise_model"):
        save_wan(t2v, tmp_path / folder)
    save_wan(t2v, tmp_path / "wan2.2_t2v_low_noise_14B_fp16.safetensors", "comfyui")
    for folder in ("transformer", "transformer_2"):
        save_wan(i2v, tmp_path / "I2V" / folder, "diffusers")
    save_wan(i2v, tmp_path / "mine")
    return tmp_path


@pytest.mark.parametrize("init, model, side, lowest, highest", [
    ("T2V/high_noise_model", "wan2.2-t2v-a14b", "high", 875, 1000), ("T2V/low_noise_model", "wan2.2-t2v-a14b", "low", 0, 875),
    ("wan2.2_t2v_low_noise_14B_fp16.safetensors", "wan2.2-t2v-a14b", "low", 0, 875),
    ("I2V/transformer", "wan2.2-i2v-a14b", "high", 900, 1000), ("I2V/transformer_2", "wan2.2-i2v-a14b", "low", 0, 900)])
def test_an_expert_is_known_by_its_name_and_trained_on_its_side_of_the_boundary_only(experts, init, model, side, lowest, highest):
    for name in ("auto", model):
        for timesteps in ((lowest, highest), (max(lowest, 1), min(highest, 999))):
            assert find_and_check(experts / init, name, *timesteps)[1:] == (model, side)
    for timesteps in ((0, 1000), (600, 1000), (lowest - 1 if lowest else 0, highest if lowest else highest + 1), (0, lowest) if lowest else (highest, 1000)):
        with pytest.raises(ValueError, match=f"one of the two experts of {model} and samples only at timesteps {lowest} to {highest}, after the shift"):
            find_and_check(experts / init, "auto", *timesteps)


def test_a_model_of_two_experts_whose_name_says_nothing_may_not_straddle_the_boundary(experts):
    for init, model, preset in (("mine", "auto", "wan2.2-i2v-a14b"), ("Wan2.1-T2V-14B", "wan2.2-t2v-a14b", "wan2.2-t2v-a14b")):
        for timesteps in ((900, 1000), (0, 875)):
            assert find_and_check(experts / init, model, *timesteps)[1:] == (preset, "")
        with pytest.raises(ValueError, match=r"--min_timestep 600 --max_timestep 1000: .* samples only at timesteps (875|900) to 1000 or 0 to (875|900)"):
            find_and_check(experts / init, model)


def test_wan_2_1_is_not_taken_for_an_expert_nor_an_expert_for_it(experts):
    for init in ("Wan2.1-T2V-14B", "Wan2.1-Diffusers", "Wan2.1-Diffusers/transformer"):
        assert find_and_check(experts / init)[1:] == ("wan2.1-t2v-14b", "")
    with pytest.raises(ValueError, match="--model wan2.1-t2v-14b --init .*high_noise_model: by its name this is an expert of wan2.2-t2v-a14b"):
        find_model(experts / "T2V" / "high_noise_model", "wan2.1-t2v-14b")
    with pytest.raises(ValueError, match="--init .*T2V holds two experts: give .*high_noise_model"):
        find_model(experts / "T2V")


def test_what_samples_gets_both_experts_or_a_model_that_has_none(experts, monkeypatch):
    assert find_experts(experts / "T2V") == (experts / "T2V/high_noise_model", experts / "T2V/low_noise_model")
    assert find_experts(experts / "I2V") == (experts / "I2V/transformer", experts / "I2V/transformer_2")
    assert find_experts(experts / "Wan2.1-T2V-14B") == (experts / "Wan2.1-T2V-14B", None)
    for init in ("T2V/high_noise_model", "T2V/low_noise_model", "I2V/transformer", "I2V/transformer_2"):
        with pytest.raises(ValueError, match=f"{init}: one of two experts, which sample together; give {(experts / init).parent}"):
            find_experts(experts / init)
    monkeypatch.chdir(experts / "T2V" / "low_noise_model")
    with pytest.raises(ValueError, match="one of two experts, which sample together; give .*T2V"):
        find_experts(".")


@pytest.mark.parametrize("init, preset", [
    ("wan2.2_t2v_low_noise_14B_fp16.safetensors", "wan2.2-t2v-a14b"), ("lone/high_noise_model", "wan2.2-t2v-a14b"), ("mine", "wan2.2-i2v-a14b")])
def test_one_expert_whose_twin_is_not_there_does_not_sample(experts, init, preset):
    with pytest.raises(ValueError, match=f"--init: one expert of {preset} cannot sample alone, and .*{init} is one; run sample.py on a folder that holds both"):
        find_experts(experts / init)
