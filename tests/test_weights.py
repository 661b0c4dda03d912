"""
Weight files: presets against the lists of the released files, three public formats in and out, the command line, step
folders, files that are refused, and which model and expert a path holds.
"""
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
import weights
from conftest import four_steps, on_ranks, train_main
from export import export_weights
from make_golden import CASES, make_case
from model import CONFIGS, WanConfig, WanModel
from weights import (
    DIFFUSERS_NAMES,
    FORMATS,
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
WHOLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-00002-of-00006.safetensors"


def same_weights(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def path_for(folder, format):
    """The target for weights of this format: a folder, or a single file."""
    return folder / ("comfyui.safetensors" if format == "comfyui" else format)


def convert(source, out, *flags):
    """The output of `python weights.py SOURCE --out OUT`, as a state dict in float32."""
    weights.main(weights.parse_args([str(source), "--out", str(out), *flags]))
    return load_wan(out).state_dict()


@pytest.fixture
def tiny():
    return make_case("tiny")[0]


@pytest.mark.parametrize("preset", PUBLIC)
def test_a_preset_has_the_names_shapes_and_parameters_of_the_public_checkpoint(preset):
    shapes = expected_shapes(CONFIGS[preset])
    for format in ("original", "diffusers"):
        public = PUBLIC[preset][format]
        names = [weights.public_name(name, format) for name in shapes]
        lines = sorted(f"{name}:{','.join(map(str, shape))}" for name, shape in zip(names, shapes.values()))
        assert len(lines) == public["tensors"]
        assert sum(math.prod(shape) for shape in shapes.values()) == public["parameters"]
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == public["sha256"]


# ----------------------------------------------------------------------------------------------------------------------
# formats in and out

@pytest.mark.parametrize("name", CASES)
def test_weights_come_back_bit_for_bit_through_every_format(name, tmp_path):
    model = make_case(name)[0]
    state = model.state_dict()
    for format in FORMATS:
        path = path_for(tmp_path, format)
        save_wan(model, path, format)
        model = load_wan(path, model.config)                             # the next format is written from this one
        assert model.config == CASES[name] and same_weights(model.state_dict(), state)
        assert all(parameter.requires_grad for parameter in model.parameters())
    names = set(load_file(tmp_path / "comfyui.safetensors"))
    assert names == {"model.diffusion_model." + name for name in state}


def test_settings_that_differ_from_the_public_ones_come_back_through_every_format(tmp_path):
    config = WanConfig(dim=36, ffn_dim=20, num_heads=3, num_layers=1, in_dim=7, out_dim=3, text_dim=10, text_len=9,
                       freq_dim=8, patch_size=(2, 1, 2), eps=1e-5, image_dim=12, image_pos_len=6)
    for format in FORMATS:
        save_wan(WanModel(config), path_for(tmp_path, format), format)
        assert open_wan(path_for(tmp_path, format))[0] == config


@pytest.mark.parametrize("name", ["t2v", "flf2v", "i2v-a14b"])
def test_diffusers_reads_our_folder_and_we_read_its(name, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (requirements-video.txt)")
    model = make_case(name)[0]
    save_wan(model, tmp_path / "ours", "diffusers")
    twin = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours")
    expected = {rename(name, DIFFUSERS_NAMES): tensor for name, tensor in model.state_dict().items()}
    assert twin.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in twin.state_dict().items())
    twin.save_pretrained(tmp_path / "theirs" / "transformer")
    config_file = tmp_path / "theirs" / "transformer" / "config.json"
    settings = json.loads(config_file.read_text())
    settings["text_len"] = model.config.text_len                         # always 512 in diffusers
    config_file.write_text(json.dumps(settings))
    for path in (tmp_path / "theirs", tmp_path / "theirs" / "transformer"):
        again = load_wan(path)
        assert again.config == model.config and same_weights(again.state_dict(), model.state_dict())


def test_large_weights_are_written_in_shards_with_an_index_and_a_smaller_number_replaces_them(tiny, tmp_path):
    nbytes = 4 * sum(parameter.numel() for parameter in tiny.parameters())
    save_wan(tiny, tmp_path, max_shard_bytes=nbytes // 3)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) >= 4
    ends = [f"{i}-of-0000{len(shards)}.safetensors" for i in range(1, len(shards) + 1)]
    assert [shard.name[-22:] for shard in shards] == ends
    assert all(shard.stat().st_size < nbytes // 3 + 20_000 for shard in shards)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == nbytes and set(index["weight_map"]) == set(tiny.state_dict())
    assert same_weights(load_wan(tmp_path).state_dict(), tiny.state_dict())
    (tmp_path / "prompts.txt").write_text("mine")
    (tmp_path / "diffusion_pytorch_model.safetensors.tmp").write_text("of a run that was killed")
    with torch.no_grad():
        tiny.head.head.weight += 1
    save_wan(tiny, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", WHOLE, "prompts.txt"]
    assert same_weights(load_wan(tmp_path).state_dict(), tiny.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_can_be_written_and_read_as_another_dtype(tiny, tmp_path, dtype):
    file = tmp_path / "model.safetensors"
    save_wan(tiny.state_dict(), file, "comfyui", config=tiny.config, dtype=dtype)
    expected = {name: tensor.to(dtype) for name, tensor in tiny.state_dict().items()}
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
    assert same_weights(load_wan(file, dtype=dtype).state_dict(), expected)
    assert {parameter.dtype for parameter in load_wan(file).parameters()} == {torch.float32}


def watch_reads(slices):
    """
    Wrap lazy slices {name: slice}, so that a read fails while the tensor of an earlier read is still in memory.
    Returns the wrapped slices and the list of what was read.
    """
    held = []

    class Watched:
        def __init__(self, tensor):
            self.tensor, self.get_shape, self.get_dtype = tensor, tensor.get_shape, tensor.get_dtype

        def __getitem__(self, rows):
            assert not held or held[-1]() is None, "the tensor before this one is still in memory"
            value = self.tensor[rows].clone()
            held.append(weakref.ref(value))
            return value
    return {name: Watched(tensor) for name, tensor in slices.items()}, held


def test_weights_are_converted_one_tensor_at_a_time(tmp_path, monkeypatch):
    model = make_case("flf2v")[0]
    save_wan(model, tmp_path / "diffusers", "diffusers", max_shard_bytes=10**5)
    config, slices = open_wan(tmp_path / "diffusers")
    watched, held = watch_reads(slices)
    with monkeypatch.context() as patch:
        patch.setattr(export, "open_wan", lambda path: (config, watched))
        export_weights(tmp_path / "diffusers", tmp_path / "comfyui.safetensors", "comfyui")
    assert len(held) == len(model.state_dict())
    assert same_weights(load_wan(tmp_path / "comfyui.safetensors").state_dict(), model.state_dict())


def test_weights_go_to_their_device_one_tensor_at_a_time_and_shard_by_shard(tiny, tmp_path, monkeypatch):
    save_wan(tiny, tmp_path, "diffusers", max_shard_bytes=10**6)
    files = list(weights.find_weights(tmp_path).values())
    assert len(set(files)) == 6 and files == sorted(files)
    config, slices = open_wan(tmp_path)
    watched, held = watch_reads(slices)
    monkeypatch.setattr(weights, "open_wan", lambda path, config: (CONFIGS["tiny"], watched))
    model = load_wan(tmp_path, dtype=torch.bfloat16, device="meta")      # a device that is not the CPU
    assert len(held) == len(slices)
    assert {(tensor.device.type, tensor.dtype) for tensor in model.parameters()} == {("meta", torch.bfloat16)}


def test_tensors_of_two_types_are_written_with_each_aligned_to_its_own(tiny, tmp_path):
    state = {name: tensor.bfloat16() if i % 2 else tensor for i, (name, tensor) in enumerate(tiny.state_dict().items())}
    state["head.head.bias"] = state["head.head.bias"].double()
    save_wan(state, tmp_path, config=tiny.config)
    written = {name: tensor.dtype for name, tensor in load_file(tmp_path / WHOLE).items()}
    assert written == {name: tensor.dtype for name, tensor in state.items()}
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
    assert (tmp_path / "diffusion_pytorch_model-00001-of-00006.safetensors.tmp").exists()
    assert same_weights(load_wan(tmp_path).state_dict(), old)
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
    file = tmp_path / "model.safetensors"
    save_file(tiny.state_dict(), file)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "num_layers": 3}')    # another model's
    assert load_wan(file).config == CONFIGS["tiny"]
    other = make_case("t2v")[0]
    save_file(other.state_dict(), file)
    says = r"model.safetensors: no config.json of a Wan model, and the 69 tensors .* not those of tiny, wan2.1"
    with pytest.raises(ValueError, match=says):
        load_wan(file)
    assert load_wan(file, CASES["t2v"]).config == CASES["t2v"]


def test_an_unused_norm_of_old_diffusers_files_is_ignored(tmp_path):
    model = make_case("i2v-clip")[0]
    save_wan(model, tmp_path, "diffusers")
    file = tmp_path / WHOLE
    save_file(load_file(file) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(128)}, file)
    assert same_weights(load_wan(tmp_path).state_dict(), model.state_dict())


def test_a_byte_order_mark_before_config_json_is_not_part_of_it(tiny, tmp_path):
    save_wan(tiny, tmp_path)
    file = tmp_path / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert open_wan(tmp_path)[0] == CONFIGS["tiny"]


# ----------------------------------------------------------------------------------------------------------------------
# the command line

# every format from every other, in one round
ROUND = ("original", "diffusers", "comfyui", "original", "comfyui", "diffusers", "original")


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_converts_between_all_formats_bit_for_bit_both_ways(name, tmp_path):
    model = make_case(name)[0]
    state = model.state_dict()
    sources = [path_for(tmp_path / str(i), format) for i, format in enumerate(ROUND)]
    save_wan(model, sources[0])
    for source, out, format in zip(sources, sources[1:], ROUND[1:]):
        assert same_weights(convert(source, out, "--format", format), state)
        assert load_wan(out).config == CASES[name]
    contents = []
    for path in sources:
        files = [path] if path.is_file() else path.iterdir()
        contents.append({file.name: file.read_bytes() for file in files})
    assert contents[0] == contents[3] == contents[6]                          # config.json and all
    assert contents[1] == contents[5] and contents[2] == contents[4]


@pytest.mark.parametrize("format", FORMATS)
def test_the_command_line_writes_the_number_type_that_is_asked_for(format, tmp_path):
    model = make_case("flf2v")[0]
    rounded = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    save_wan(model, tmp_path / "source")
    half, wide = path_for(tmp_path / "half", format), path_for(tmp_path / "wide", format)
    assert same_weights(convert(tmp_path / "source", half, "--format", format, "--dtype", "bfloat16"), rounded)
    assert same_weights(convert(half, wide, "--format", format), rounded)     # float32 where no flag is given
    for path, dtype in ((half, torch.bfloat16), (wide, torch.float32)):
        file = path if format == "comfyui" else path / WHOLE
        assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}


def test_the_command_line_finds_the_base_model_of_this_repository_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = load_wan(weights.HERE / "toy_base").state_dict()
    assert same_weights(convert("toy_base", "copy"), base)
    with pytest.raises(ValueError, match="SOURCE nowhere: no such file or folder"):
        convert("nowhere", "other")


def test_a_preference_model_is_converted_but_not_to_diffusers(tiny, tmp_path):
    model = WanModel(dataclasses.replace(CONFIGS["tiny"], scores=True))
    torch.nn.init.normal_(model.head.head)
    save_wan(model, tmp_path / "judge")
    file = tmp_path / "judge.safetensors"
    assert same_weights(convert(tmp_path / "judge", file, "--format", "comfyui"), model.state_dict())
    with pytest.raises(ValueError, match="diffusers has no preference model"):
        convert(file, tmp_path / "diffusers", "--format", "diffusers")
    assert not (tmp_path / "diffusers").exists()


@pytest.fixture(scope="session")
def trained(world, base, tmp_path_factory):
    """A run of two steps on two ranks, whose average differs from its policy: the run's folder."""
    out = tmp_path_factory.mktemp("trained") / "out"
    on_ranks(2, train_main, four_steps(world, base, out, "--steps 2"))
    return out


def test_a_step_folder_of_two_ranks_is_exported_alone_in_every_format_and_type(trained, tmp_path):
    end = load_wan(trained / "export").state_dict()                           # what the run itself wrote when it ended
    for format in FORMATS:
        state = convert(trained / "step_000002", path_for(tmp_path, format), "--format", format)
        assert same_weights(state, end), format
    file = tmp_path / "half.safetensors"
    state = convert(trained / "step_000002", file, "--format", "comfyui", "--dtype", "bfloat16")
    assert same_weights(state, {name: tensor.bfloat16().float() for name, tensor in end.items()})
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_a_step_folder_gives_its_average_or_its_policy(trained, world, base, tmp_path):
    end = load_wan(trained / "export").state_dict()
    average = convert(trained / "step_000002", tmp_path / "ema", "--weights", "ema")
    policy = convert(trained / "step_000002", tmp_path / "policy", "--weights", "policy")
    assert same_weights(average, end) and not same_weights(policy, end)
    on_ranks(2, train_main, four_steps(world, base, tmp_path / "out", "--steps 2 --ema_decay 0"))
    assert same_weights(load_wan(tmp_path / "out" / "export").state_dict(), policy)       # no average: the policy
    step = tmp_path / "out" / "step_000002"
    assert same_weights(convert(step, tmp_path / "auto"), policy)
    with pytest.raises(ValueError, match="step_000002: the run kept no average .--ema_decay 0.; take its policy"):
        convert(step, tmp_path / "none", "--weights", "ema")


def test_diffusers_runs_an_export_of_a_trained_model(trained, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (requirements-video.txt)")
    convert(trained / "step_000002", tmp_path / "transformer", "--format", "diffusers")
    twin = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    model = load_wan(trained / "export")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, 3, 4, 6, generator=generator)
    context = torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad():
        expected = twin(x, torch.tensor([700.0]), context, return_dict=False)[0]
        velocity = model(x, torch.tensor([700.0]), context)
    assert (velocity - expected).norm() <= 2e-5 * expected.norm()


CONVERSIONS_REFUSED = {                                                       # SOURCE, --out, other flags, the message
    "the step folder itself": ("out/step_000002", "out/step_000002", (), "exists, and nothing is overwritten"),
    "the run's folder": ("out/step_000002", "out", (), "exists, and nothing is overwritten"),
    "the run's export": ("out/step_000002", "out/export", (), "exists, and nothing is overwritten"),
    "inside the run's folder": ("out/step_000002", "out/mine", (), "out/mine is inside .*out, a run's own folder"),
    "inside the source": ("export", "export/bf16", (), "export/bf16 is inside the source, .*export; name a file"),
    "a file inside the source": ("export", "export/bf16.safetensors", ("--format", "comfyui"), "is inside the source"),
    "a file that exists": ("export", "wan.safetensors", ("--format", "comfyui"), "wan.safetensors exists, and nothing"),
    "the source file itself": ("wan.safetensors", "wan.safetensors", ("--format", "comfyui"), "exists, and nothing"),
    "a run's folder as the source": ("out", "x", (), "out is a run's folder; name one of its step folders, or"),
    "a step folder that is not whole": ("cut", "x", (), r"cut holds no whole checkpoint \(meta.json is missing\)"),
    "a step folder of another version": ("other", "x", (), "meta.json: its config is not that of a model here .*depth"),
    "a step folder without its config": ("bare", "x", (), "meta.json: its config is not that of a model here .*config"),
    "a step folder with tensors too few": ("few", "x", (), "nothing was written.: tensor blocks.2.modulation is"),
    "the average of an export": ("export", "x", ("--weights", "ema"), "--weights ema: .*export is not a step folder"),
    "a folder for a file": ("export", "x", ("--format", "comfyui"), "a single file; give it a name that ends in .safe"),
    "a file for a folder": ("export", "x.safetensors", (), "x.safetensors: original weights are a folder"),
    "a folder with no weights": ("nothing", "x", (), "nothing: expected one .safetensors file"),
}


@pytest.mark.parametrize("case", CONVERSIONS_REFUSED)
def test_a_conversion_that_cannot_be_is_refused_and_changes_nothing(case, trained, tmp_path):
    source, out, flags, says = CONVERSIONS_REFUSED[case]
    shutil.copytree(trained, tmp_path / "out")
    shutil.copytree(trained / "export", tmp_path / "export")
    save_wan(load_wan(trained / "export"), tmp_path / "wan.safetensors", "comfyui")
    for name in ("cut", "other", "bare", "few"):
        shutil.copytree(trained / "step_000002", tmp_path / name)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "cut" / "meta.json").unlink()
    meta = json.loads((tmp_path / "other" / "meta.json").read_text())
    (tmp_path / "other" / "meta.json").write_text(json.dumps(meta | {"config": meta["config"] | {"depth": 2}}))
    (tmp_path / "bare" / "meta.json").write_text(json.dumps({name: meta[name] for name in meta if name != "config"}))
    longer = meta | {"config": meta["config"] | {"num_layers": 3}}
    (tmp_path / "few" / "meta.json").write_text(json.dumps(longer))
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=says):
        convert(tmp_path / source, tmp_path / out, *flags)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


# ----------------------------------------------------------------------------------------------------------------------
# what bfloat16 keeps of the training

NARROW = dataclasses.replace(CONFIGS["tiny"], dim=32, ffn_dim=64, num_layers=2, num_heads=2)


def shift_weights(state, update):
    """{name: weight + update(weight)}."""
    return {name: tensor + update(tensor) for name, tensor in state.items()}


def rounded_share(base, trained):
    """The share of the update that survives bfloat16, from its definition: whole models as one vector, in float64."""
    start, end = (torch.cat([tensor.flatten().double() for tensor in state.values()]) for state in (base, trained))
    rounded = torch.cat([tensor.bfloat16().flatten().double() for tensor in trained.values()])
    update = end - start
    return (torch.dot(rounded - start, update) / torch.dot(update, update)).item()


def printed_share(text):
    return float(re.search(r"bfloat16 keeps (-?[\d.]+)% of what training changed in", text).group(1)) / 100


@pytest.fixture
def half_base(tmp_path):
    """A small model in bf16, its weights with a standard deviation of 0.065: its state dict and its folder."""
    generator = torch.Generator().manual_seed(0)
    base = {name: (0.065 * torch.randn(shape, generator=generator)).bfloat16().float()
            for name, shape in expected_shapes(NARROW).items()}
    save_wan(base, tmp_path / "base", config=NARROW, dtype=torch.bfloat16)
    return base, tmp_path / "base"


def test_bfloat16_keeps_a_sixth_of_300_steps_at_1e_6_from_a_bfloat16_base_and_says_so(half_base, tmp_path, capsys):
    # AdamW moves a weight by about 1e-6 a step, with random gradients by 1.7e-5 in 300 steps. The neighbours in bf16 of
    # a weight of 0.065 are 2^-11 = 4.9e-4 away, so it stays; only weights below about 0.01 move.
    base, folder = half_base
    weights_now = [tensor.clone().requires_grad_() for tensor in base.values()]
    optimizer = torch.optim.AdamW(weights_now, lr=1e-6, betas=(0.9, 0.95), weight_decay=1e-3, foreach=True)
    generator = torch.Generator().manual_seed(1)
    gradients = torch.empty(sum(tensor.numel() for tensor in weights_now))
    for _ in range(300):
        gradients.normal_(generator=generator)
        for tensor, part in zip(weights_now, gradients.split([tensor.numel() for tensor in weights_now])):
            tensor.grad = part.view_as(tensor)
        optimizer.step()
    trained = {name: tensor.detach() for name, tensor in zip(base, weights_now)}
    share = rounded_share(base, trained)
    assert 0.12 < share < 0.20
    save_wan(trained, tmp_path / "trained", config=NARROW)
    convert(tmp_path / "trained", tmp_path / "half", "--dtype", "bfloat16", "--base", str(folder))
    said = capsys.readouterr().out
    assert printed_share(said) == pytest.approx(share, abs=1e-3)
    assert f"in {folder}\n" in said and "warning: the rest is too small for bfloat16 and is lost" in said
    assert "--dtype float32" in said and "adapters" in said


def test_updates_that_bfloat16_can_show_survive_and_nothing_is_warned_of(half_base, tmp_path, capsys):
    base, folder = half_base
    trained = shift_weights(base, lambda tensor: 0.1 * tensor.flip(0))
    save_wan(trained, tmp_path / "trained", config=NARROW)
    convert(tmp_path / "trained", tmp_path / "half", "--dtype", "bfloat16", "--base", str(folder))
    said = capsys.readouterr().out
    assert printed_share(said) == pytest.approx(rounded_share(base, trained), abs=1e-3)
    assert printed_share(said) == pytest.approx(1, abs=5e-3) and "warning" not in said


def test_the_share_by_hand(tmp_path, tiny, capsys):
    # The base is 1 everywhere, above which bf16 steps are 2^-7. Half of the weights move by 2^-7 and arrive; the others
    # move by 2^-9 and fall back: share = 2^-14 / (2^-14 + 2^-18) = 16 / 17. With 2^-8.5: 8 / 9, below 0.9.
    base = {name: torch.ones_like(tensor) for name, tensor in tiny.state_dict().items()}
    even = {name: tensor for name, tensor in base.items() if tensor.numel() % 2 == 0}
    assert even.keys() == base.keys()
    save_wan(base, tmp_path / "base", config=tiny.config)
    for small, share in ((2 ** -9, 16 / 17), (2 ** -8.5, 8 / 9)):
        steps = torch.tensor([2 ** -7, small])
        trained = shift_weights(base, lambda tensor: steps.repeat(tensor.numel() // 2).view_as(tensor))
        source, out = tmp_path / f"trained_{share:.2f}", tmp_path / f"half_{share:.2f}"
        save_wan(trained, source, config=tiny.config)
        convert(source, out, "--dtype", "bfloat16", "--base", str(tmp_path / "base"))
        said = capsys.readouterr().out
        assert printed_share(said) == pytest.approx(share, abs=1e-3)
        assert ("warning" in said) == (share < 0.9)


def test_the_base_of_a_step_folder_is_what_its_run_started_from(trained, base, tmp_path, capsys):
    convert(trained / "step_000002", tmp_path / "half.safetensors", "--format", "comfyui", "--dtype", "bfloat16")
    said = capsys.readouterr().out
    expected = rounded_share(load_wan(base).state_dict(), load_wan(trained / "export").state_dict())
    assert f"what training changed in {base}\n" in said and printed_share(said) == pytest.approx(expected, abs=1e-3)
    convert(trained / "step_000002", tmp_path / "wide")
    assert capsys.readouterr().out == f"weights in {tmp_path / 'wide'}\n"     # float32 loses nothing


UNKNOWN = "how much of the training bfloat16 keeps is not known; name the weights it started from with --base"


def test_the_share_is_said_to_be_unknown_where_the_base_is(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "out")
    step = tmp_path / "out" / "step_000002"
    cases = {
        "a foreign source": (trained / "export", lambda: None),
        "a base that has gone": (step, lambda: edit_json(tmp_path / "out" / "config.json", init="gone")),
        "a base that has changed": (step, lambda: edit_json(step / "meta.json", init="0123456789ab")),
        "no base": (step, lambda: edit_json(step / "meta.json", init="scratch")),
        "no settings": (step, lambda: (tmp_path / "out" / "config.json").unlink()),
    }
    for i, (source, change) in enumerate(cases.values()):
        change()
        convert(source, tmp_path / str(i), "--dtype", "bfloat16")
        assert UNKNOWN in capsys.readouterr().out
    convert(tmp_path / "0", tmp_path / "again", "--dtype", "bfloat16")        # bf16 to bf16: nothing is rounded
    assert capsys.readouterr().out == f"weights in {tmp_path / 'again'}\n"


def test_the_share_of_a_preference_model_counts_its_blocks_and_leaves_its_new_head_out(half_base, tmp_path, capsys):
    base, folder = half_base
    judge = WanModel(dataclasses.replace(NARROW, scores=True))
    judge.load_state_dict({name: tensor for name, tensor in base.items() if not name.startswith("head.")}, strict=False)
    save_wan(judge, tmp_path / "judge")
    convert(tmp_path / "judge", tmp_path / "half", "--dtype", "bfloat16", "--base", str(folder))
    assert printed_share(capsys.readouterr().out) == 1                        # blocks are frozen: nothing changed


def test_a_base_that_does_nothing_or_does_not_fit_is_refused(half_base, tiny, tmp_path):
    _, folder = half_base
    save_wan(make_case("t2v")[0], tmp_path / "other")
    save_wan(tiny, tmp_path / "trained")
    for base, dtype, says in ((folder, "float32", "--base .*base is for what --dtype bfloat16 loses; float32"),
                              ("nowhere", "bfloat16", "--base nowhere: no such file or folder"),
                              (tmp_path / "other", "bfloat16", "--base .*other is another model than .*trained")):
        with pytest.raises(ValueError, match=says):
            convert(tmp_path / "trained", tmp_path / "x", "--base", str(base), "--dtype", dtype)
        assert not (tmp_path / "x").exists()


# ----------------------------------------------------------------------------------------------------------------------
# what a user can get wrong

def edit_weights(folder, edit):
    tensors = load_file(folder / WHOLE)
    edit(tensors)
    save_file(tensors, folder / WHOLE)


def add_tensors(folder, **tensors):
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    edit_weights(folder, lambda state: state.update(named))


def edit_json(file, **changes):
    """Change entries of a JSON file; None removes one."""
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def cut(file, nbytes):
    file.write_bytes(file.read_bytes()[:nbytes])


def drop_first_tensor(file):
    save_file(dict(list(load_file(file).items())[1:]), file)


FP8 = torch.zeros(48).to(torch.float8_e4m3fn)
BAD_FOLDERS = {
    "a tensor of another shape": (
        lambda folder: add_tensors(folder, blocks__2__ffn__0__bias=torch.zeros(511)),
        rf"{WHOLE}: tensor blocks.2.ffn.0.bias is \(511,\), expected \(512,\) in tiny; 1 tensors of 123 differ"),
    "a missing tensor": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.pop("blocks.1.norm3.bias")),
        r"folder: tensor blocks.1.norm3.bias is missing, expected \(128,\)"),
    "a left-over tensor": (
        lambda folder: add_tensors(folder, vace_blocks__0__modulation=torch.zeros(1, 6, 128)),
        rf"{WHOLE}: tensor vace_blocks.0.modulation is \(1, 6, 128\), expected no such tensor"),
    "fp8 weights": (
        lambda folder: add_tensors(folder, head__head__bias=FP8),
        rf"{WHOLE}: head.head.bias is F8_E4M3: 8-bit and scaled files are for inference.*use the bf16"),
    "scales next to the weights": (
        lambda folder: add_tensors(folder, head__head__scale_weight=torch.ones(1)),
        rf"{WHOLE}: head.head.scale_weight is F32: 8-bit and scaled"),
    "no tensors of Wan at all": (
        lambda folder: save_file({"conv_in.weight": torch.zeros(3, 3)}, folder / WHOLE),
        r"folder: tensor patch_embedding.weight is missing"),
    "a truncated file": (
        lambda folder: cut(folder / WHOLE, 100_000),
        rf"{WHOLE}: not a whole safetensors file \(.*\); copy or download it again"),
    "an empty file": (lambda folder: cut(folder / WHOLE, 0), rf"{WHOLE}: not a whole safetensors file"),
    "config.json of another size": (
        lambda folder: edit_json(folder / "config.json", ffn_dim=1024),
        rf"{WHOLE}: tensor blocks.0.ffn.0.weight is \(512, 128\), expected \(1024, 128\) in WanConfig\(.*ffn_dim=1024"),
    "config.json of another type": (
        lambda folder: edit_json(folder / "config.json", model_type="i2v"),
        r"config.json: model_type is i2v, but the tensors next to it are those of t2v"),
    "config.json without a size": (
        lambda folder: edit_json(folder / "config.json", num_heads=None),
        r"config.json: no num_heads; not the config.json of a Wan"),
    "config.json that is not JSON": (lambda folder: cut(folder / "config.json", 40), r"config.json: not JSON"),
    "no weights": (
        lambda folder: (folder / WHOLE).unlink(),
        r"folder: expected one .safetensors file.*; found 0 and 0 \(pickled weights"),
    "two weights and no index": (
        lambda folder: shutil.copy(folder / WHOLE, folder / "other.safetensors"),
        r"folder: expected one .safetensors file.*; found 2 and 0"),
    "no folder": (lambda folder: shutil.rmtree(folder), r"folder: no such file or folder"),
    "two experts": (
        lambda folder: (folder / "low_noise_model").mkdir(),
        r"folder holds two experts: give .*high_noise_model \(high noise\) or .*low_noise_model"),
    "two experts of diffusers": (
        lambda folder: (folder / "transformer_2").mkdir(),
        r"holds two experts: give .*transformer \(high noise\)"),
}
TWICE = {                                                                 # format, another name for blocks.1.ffn.0.bias
    "with and without the prefix": ("original", "model.diffusion_model.blocks.1.ffn.0.bias"),
    "without and with the prefix": ("comfyui", "blocks.1.ffn.0.bias"),
    "diffusers' and the original name": ("diffusers", "blocks.1.ffn.0.bias"),
}
BAD_SHARDS = {
    "a shard that is not there": (
        lambda folder: (folder / SHARD).unlink(), rf"index.json names {SHARD}, which is not there"),
    "a truncated shard": (lambda folder: cut(folder / SHARD, 5000), rf"{SHARD}: not a whole safetensors file"),
    "a shard without one of its tensors": (
        lambda folder: drop_first_tensor(folder / SHARD),
        rf"{SHARD}: no tensor blocks\.\S+, though .*index.json says so"),
    "no index": (lambda folder: (folder / INDEX).unlink(), r"folder: expected one .safetensors file.*; found 6 and 0"),
    "an empty index": (lambda folder: (folder / INDEX).write_text("{}"), r"index.json: no weight_map"),
    "a broken index": (lambda folder: cut(folder / INDEX, 300), r"index.json: not JSON"),
}


@pytest.mark.parametrize("name", [*BAD_FOLDERS, *BAD_SHARDS])
def test_a_bad_checkpoint_is_refused_with_the_reason(name, tiny, tmp_path):
    damage, message = (BAD_FOLDERS | BAD_SHARDS)[name]
    save_wan(tiny, tmp_path / "folder", max_shard_bytes=10**6 if name in BAD_SHARDS else 10**9)
    load_wan(tmp_path / "folder")
    damage(tmp_path / "folder")
    with pytest.raises(ValueError, match=message):
        load_wan(tmp_path / "folder")


@pytest.mark.parametrize("same_value", [False, True])
@pytest.mark.parametrize("case", TWICE)
def test_a_tensor_under_two_names_is_refused(case, same_value, tiny, tmp_path):
    format, name = TWICE[case]
    path = path_for(tmp_path, format)
    save_wan(tiny, path, format)
    file = path if format == "comfyui" else path / WHOLE
    tensors = load_file(file)
    first = weights.public_name("blocks.1.ffn.0.bias", format)
    tensors[name] = tensors[first] + (0 if same_value else 1)
    save_file(tensors, file)
    names = "|".join(f"{re.escape(a)} and {re.escape(b)} " for a, b in ((first, name), (name, first)))
    with pytest.raises(ValueError, match=rf"{file.name}: ({names}).*are two tensors for one parameter"):
        load_wan(path, CONFIGS["tiny"])


@pytest.mark.parametrize("name", ["blocks.1.ffn.0.bias", "model.diffusion_model.blocks.1.ffn.0.bias", "left.over"])
def test_a_tensor_in_a_shard_that_the_index_gives_to_another_or_to_none_is_refused(name, tiny, tmp_path):
    save_wan(tiny, tmp_path, max_shard_bytes=10**6)
    shard = SHARD.replace("00002", "00005")
    assert "blocks.1.ffn.0.bias" not in load_file(tmp_path / shard)
    save_file(load_file(tmp_path / shard) | {name: torch.zeros(512)}, tmp_path / shard)
    with pytest.raises(ValueError, match=f"{shard}: tensor {name} is in this shard, though .*index.json does not say"):
        load_wan(tmp_path)


@pytest.mark.parametrize("extra", [{}, {"scaled_fp8": FP8[:2], "blocks.0.ffn.0.scale_weight": torch.ones(1)}])
def test_an_8_bit_file_of_comfyui_is_refused_with_the_reason(tiny, extra, tmp_path):
    state = dict(extra)
    for name, tensor in tiny.state_dict().items():
        is_matrix = name.endswith("weight") and tensor.ndim == 2
        state[name] = tensor.to(torch.float8_e4m3fn if is_matrix else torch.float16)
    file = tmp_path / "wan_fp8.safetensors"
    save_file({"model.diffusion_model." + name: tensor for name, tensor in state.items()}, file)
    says = (r"wan_fp8.safetensors: model.diffusion_model.\S+ is F\S+: 8-bit and scaled files are for inference"
            ".*use the bf16, fp16 or fp32 file")
    with pytest.raises(ValueError, match=says):
        open_wan(file)


@pytest.mark.parametrize("name, changes, says", [
    ("i2v-clip", {"image_dim": None}, "image_dim is None, but the tensors next to it have an image branch of 40"),
    ("i2v-a14b", {"image_dim": 1280}, "image_dim is 1280, but the tensors next to it have an image branch of 0"),
    ("flf2v", {"pos_embed_seq_len": None},
     "image_pos_len is None, but the tensors next to it have an image branch of 514")])
def test_an_image_branch_that_is_not_what_config_json_says_is_refused(name, changes, says, tmp_path):
    save_wan(make_case(name)[0], tmp_path, "diffusers")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(ValueError, match="config.json: " + says):
        open_wan(tmp_path)


def test_weights_of_another_variant_than_the_one_asked_for_are_refused(tiny, tmp_path):
    save_wan(tiny, tmp_path / "folder")
    with pytest.raises(ValueError, match=r"config.json: dim is 128, expected 1536 in the model asked for"):
        load_wan(tmp_path / "folder", CONFIGS["wan2.1-t2v-1.3b"])
    with pytest.raises(ValueError, match=r"config.json: num_heads is 4, expected 2"):     # not visible in any tensor
        load_wan(tmp_path / "folder", dataclasses.replace(CONFIGS["tiny"], num_heads=2))
    save_file(tiny.state_dict(), tmp_path / "single.safetensors")
    says = (r"single.safetensors: tensor patch_embedding.weight is \(128, 12, 1, 2, 2\), "
            r"expected \(1536, 16, 1, 2, 2\) in wan2.1-t2v-1.3b")
    with pytest.raises(ValueError, match=says):
        load_wan(tmp_path / "single.safetensors", CONFIGS["wan2.1-t2v-1.3b"])


def test_pickled_weights_are_not_read(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth: not a whole safetensors file"):
        load_wan(tmp_path / "model.pth")


def test_save_wan_refuses_an_unknown_format_and_weights_that_do_not_fit(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"format is 'gguf', expected one of original, diffusers, comfyui"):
        save_wan(tiny, tmp_path, "gguf")
    with pytest.raises(ValueError, match=r"comfyui weights are a single file, and this is a folder"):
        save_wan(tiny, tmp_path, "comfyui")
    with pytest.raises(ValueError, match=r"model.safetensors: diffusers weights are a folder, and this is a file"):
        save_wan(tiny, tmp_path / "model.safetensors", "diffusers")
    state = tiny.state_dict()
    del state["head.modulation"]
    says = r"nothing was written\): tensor head.modulation is missing, expected \(1, 2, 128\) in tiny"
    with pytest.raises(ValueError, match=says):
        save_wan(state, tmp_path, config=tiny.config)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# which model, and which expert

def find_and_check(path, model="auto", min_timestep=600.0, max_timestep=1000.0):
    """The check as train.py makes it, at its default timesteps."""
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
    for folder in ("T2V/high_noise_model", "T2V/low_noise_model", "lone/high_noise_model",
                   "Wan2.1-T2V-14B", "Wan2.1-Diffusers/transformer"):
        save_wan(t2v, tmp_path / folder)
    save_wan(t2v, tmp_path / "wan2.2_t2v_low_noise_14B_fp16.safetensors", "comfyui")
    for folder in ("transformer", "transformer_2"):
        save_wan(i2v, tmp_path / "I2V" / folder, "diffusers")
    save_wan(i2v, tmp_path / "mine")
    return tmp_path


@pytest.mark.parametrize("init, model, side, lowest, highest", [
    ("T2V/high_noise_model", "wan2.2-t2v-a14b", "high", 875, 1000),
    ("T2V/low_noise_model", "wan2.2-t2v-a14b", "low", 0, 875),
    ("wan2.2_t2v_low_noise_14B_fp16.safetensors", "wan2.2-t2v-a14b", "low", 0, 875),
    ("I2V/transformer", "wan2.2-i2v-a14b", "high", 900, 1000),
    ("I2V/transformer_2", "wan2.2-i2v-a14b", "low", 0, 900)])
def test_an_expert_is_known_by_its_name_and_trained_on_its_side_only(experts, init, model, side, lowest, highest):
    boundary = lowest or highest
    for name in ("auto", model):
        for timesteps in ((lowest, highest), (max(lowest, 1), min(highest, 999))):
            assert find_and_check(experts / init, name, *timesteps)[1:] == (model, side)
    says = f"one of the two experts of {model} and samples only at timesteps {lowest} to {highest}, after the shift"
    other_side = (0, boundary) if side == "high" else (boundary, 1000)
    for timesteps in ((0, 1000), (600, 1000), (boundary - 1, boundary + 1), other_side):
        with pytest.raises(ValueError, match=says):
            find_and_check(experts / init, "auto", *timesteps)


def test_a_model_of_two_experts_whose_name_says_nothing_may_not_straddle_the_boundary(experts):
    says = "--min_timestep 600 --max_timestep 1000: .* samples only at timesteps (875|900) to 1000 or 0 to (875|900)"
    for init, model, preset in (("mine", "auto", "wan2.2-i2v-a14b"),
                                ("Wan2.1-T2V-14B", "wan2.2-t2v-a14b", "wan2.2-t2v-a14b")):
        for timesteps in ((900, 1000), (0, 875)):
            assert find_and_check(experts / init, model, *timesteps)[1:] == (preset, "")
        with pytest.raises(ValueError, match=says):
            find_and_check(experts / init, model)


def test_wan_2_1_is_not_taken_for_an_expert_nor_an_expert_for_it(experts):
    for init in ("Wan2.1-T2V-14B", "Wan2.1-Diffusers", "Wan2.1-Diffusers/transformer"):
        assert find_and_check(experts / init)[1:] == ("wan2.1-t2v-14b", "")
    says = "--model wan2.1-t2v-14b --init .*high_noise_model: by its name this is an expert of wan2.2-t2v-a14b"
    with pytest.raises(ValueError, match=says):
        find_model(experts / "T2V" / "high_noise_model", "wan2.1-t2v-14b")
    with pytest.raises(ValueError, match="--init .*T2V holds two experts: give .*high_noise_model"):
        find_model(experts / "T2V")


def test_what_samples_gets_both_experts_or_a_model_that_has_none(experts, monkeypatch):
    assert find_experts(experts / "T2V") == (experts / "T2V/high_noise_model", experts / "T2V/low_noise_model")
    assert find_experts(experts / "I2V") == (experts / "I2V/transformer", experts / "I2V/transformer_2")
    assert find_experts(experts / "Wan2.1-T2V-14B") == (experts / "Wan2.1-T2V-14B", None)
    for init in ("T2V/high_noise_model", "T2V/low_noise_model", "I2V/transformer", "I2V/transformer_2"):
        whole = (experts / init).parent
        with pytest.raises(ValueError, match=f"{init}: one of two experts, which sample together; give {whole}"):
            find_experts(experts / init)
    monkeypatch.chdir(experts / "T2V" / "low_noise_model")
    with pytest.raises(ValueError, match="one of two experts, which sample together; give .*T2V"):
        find_experts(".")


@pytest.mark.parametrize("init, preset", [
    ("wan2.2_t2v_low_noise_14B_fp16.safetensors", "wan2.2-t2v-a14b"), ("lone/high_noise_model", "wan2.2-t2v-a14b"),
    ("mine", "wan2.2-i2v-a14b")])
def test_one_expert_whose_twin_is_not_there_does_not_sample(experts, init, preset):
    says = f"--init: one expert of {preset} cannot sample alone, and .*{init} is one; run sample.py on a folder"
    with pytest.raises(ValueError, match=says):
        find_experts(experts / init)
