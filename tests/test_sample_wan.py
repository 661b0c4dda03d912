"""sample.py's command line for Wan's variants: small random models, encoders that record what they are asked."""
import functools

import numpy as np
import pytest
import torch

import wan_encoders
import sample
import streaming
from conftest import write_png
from data import open_data
from samples import check_samples, read_sample, read_summaries, write_sample
from model import WanConfig, WanModel
from weights import load_wan, open_wan, save_wan

WAN = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=1, text_dim=20, freq_dim=32)
VARIANTS = {
    "t2v": WanConfig(**WAN, in_dim=16, out_dim=16),
    "i2v": WanConfig(**WAN, in_dim=36, out_dim=16, image_dim=8),
    "flf2v": WanConfig(**WAN, in_dim=36, out_dim=16, image_dim=8, image_pos_len=514),
    "i2v a14b": WanConfig(**WAN, in_dim=36, out_dim=16),
    "ti2v": WanConfig(**WAN, in_dim=48, out_dim=48),
}
VARIANTS["t2v a14b"] = VARIANTS["t2v"]


class Encoders:
    def __init__(self, config, log):
        self.config, self.log = config, log
        self.name, self.frame_step, self.multiple = "wan", 4, 32 if config.vae == "wan2.2" else 16

    def part(self, name):
        self.log.append(f"load {name}")

    def free(self, name):
        self.log.append(f"free {name}")

    def encode_text(self, text):
        self.log.append(f"text {text}")
        return torch.randn(1 + len(text.split()), 20, generator=torch.Generator().manual_seed(len(text)))

    def conditions(self, first, last, frames):
        self.log.append(f"conditions {tuple(first.shape)} {last is not None} {frames}")
        rows, columns = (side // (self.multiple // 2) for side in first.shape[1:])
        shape = (self.config.out_dim, (frames - 1) // 4 + 1, rows, columns)
        return conditions_of(self.config, shape)

    def decode_video(self, latents):
        self.log.append(f"decode {tuple(latents.shape)}")
        return latents.new_zeros(3, 4 * latents.shape[1] - 3, 16, 16)


def conditions_of(config, latents, seed=0):
    """Random conditions of a model for latents of this shape."""
    conditions, g = {}, torch.Generator().manual_seed(seed)
    if config.in_dim > config.out_dim:
        conditions["y"] = torch.randn(config.in_dim - config.out_dim, *latents[1:], generator=g)
    if config.image_dim:
        conditions["clip_features"] = torch.randn(config.image_pos_len or 257, config.image_dim, generator=g)
    if config.vae == "wan2.2":
        conditions["first_latent"] = torch.randn(latents[0], 1, *latents[2:], generator=g)
    return conditions


def run(*flags):
    """What the command line does."""
    sample.main(sample.parse_args([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    @functools.cache
    def folder(variant):
        root = tmp_path_factory.mktemp(variant.replace(" ", "_"))
        for i, name in enumerate(("high_noise_model", "low_noise_model") if "a14b" in variant else (".",)):
            torch.manual_seed(i)
            model = WanModel(VARIANTS[variant])
            torch.nn.init.normal_(model.head.head.weight, std=0.1)
            save_wan(model, root / name)
        return root
    return folder


@pytest.fixture
def log(monkeypatch):
    log = []
    monkeypatch.setattr(wan_encoders, "open_encoders", lambda path, config, *options: Encoders(config, log))
    monkeypatch.setattr(wan_encoders, "NEGATIVE_PROMPT", "the official one")

    def load(*args, **options):
        log.append("load model")
        return load_wan(*args, **options)
    monkeypatch.setattr(streaming, "load_wan", load)
    return log


@pytest.fixture
def picture(tmp_path):
    write_png(tmp_path / "picture.png", np.zeros((20, 30, 3), dtype=np.uint8))
    return str(tmp_path / "picture.png")


def test_one_large_thing_at_a_time_is_in_memory(wan_folder, log, picture, tmp_path):
    pytest.importorskip("av", reason="mp4 files need PyAV (requirements-video.txt)")
    pytest.importorskip("PIL", reason="pictures need Pillow, which diffusers brings")
    run("--init", wan_folder("i2v"), "--prompts", "a cat", "a dog", "--image", picture, "--steps", 1, "--frames", 5,
        "--size", 16, 32, "--out", tmp_path / "out")
    assert log == ["load vae", "conditions (3, 16, 32) False 5", "free clip", "free vae",
                   "text a cat", "text a dog", "text 镜头晃动，the official one", "free text", "load model",
                   "decode (16, 2, 2, 4)", "decode (16, 2, 2, 4)"]
    made = read_sample(tmp_path / "out" / "00001.safetensors")
    assert made["metadata"]["encoder"] == "wan" and made["metadata"]["fps"] == "16" and len(made["context"]) == 3
    assert {"00000.mp4", "00001.mp4", "contact_sheet.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("variant, size", [("i2v", (16, 32)), ("ti2v", (32, 64))])
def test_samples_from_a_picture_hold_the_conditions_to_train_on(wan_folder, log, picture, tmp_path, variant, size):
    pytest.importorskip("av", reason="mp4 files need PyAV (requirements-video.txt)")
    pytest.importorskip("PIL", reason="pictures need Pillow, which diffusers brings")
    run("--init", wan_folder(variant), "--prompts", "a cat", "--per_prompt", 2, "--image", picture, "--steps", 1,
        "--frames", 5, "--size", *size, "--out", tmp_path / "out")
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    check_samples(read_summaries(paths), VARIANTS[variant])
    for path in paths:
        made = read_sample(path)
        for name, tensor in conditions_of(VARIANTS[variant], made["latents"].shape).items():
            assert torch.equal(made[name], tensor)


SAMPLER_FLAGS = ("solver", "steps", "flow_shift", "guidance", "low_guidance", "boundary", "fps", "frames", "size")


@pytest.mark.parametrize("variant, flags, expected", [
    ("t2v", [], ["unipc", 50, 5, 5, 0, 0, 16, 81, [480, 832]]),
    ("i2v", [], ["unipc", 40, 3, 5, 0, 0, 16, 81, [480, 832]]),
    ("i2v", ["--size", "720", "1280"], ["unipc", 40, 5, 5, 0, 0, 16, 81, [720, 1280]]),
    ("flf2v", [], ["unipc", 50, 16, 5, 0, 0, 16, 81, [480, 832]]),
    ("ti2v", [], ["unipc", 50, 5, 5, 0, 0, 24, 121, [704, 1280]]),
    ("t2v a14b", [], ["unipc", 40, 12, 4, 3, 0.875, 16, 81, [480, 832]]),
    ("i2v a14b", [], ["unipc", 40, 5, 3.5, 3.5, 0.9, 16, 81, [480, 832]]),
    ("t2v a14b", ["--guidance", "6", "--solver", "euler", "--boundary", "0.5"],
     ["euler", 40, 12, 6, 6, 0.5, 16, 81, [480, 832]]),
    ("t2v a14b", ["--low_guidance", "2"], ["unipc", 40, 12, 4, 2, 0.875, 16, 81, [480, 832]]),
    ("t2v a14b", ["--pairs", "x"], ["unipc", 40, 12, 1, 1, 0.875, 16, 81, [480, 832]]),
])
def test_what_is_not_given_is_as_the_authors_do_it(log, variant, flags, expected):
    args = sample.parse_args(flags)
    sample.fill_defaults(args, VARIANTS[variant], "a14b" in variant)
    assert [getattr(args, name) for name in SAMPLER_FLAGS] == expected


@pytest.mark.parametrize("side, flow_shift", [(60, 3.0), (90, 5.0)])           # 480p and 720p of Wan2.1's i2v
def test_the_flow_shift_of_negatives_is_that_of_their_size(wan_folder, log, tmp_path, monkeypatch, side, flow_shift):
    shape = (16, 1, side, 104)
    conditions = conditions_of(VARIANTS["i2v"], shape)
    write_sample(tmp_path / "real" / "0.safetensors", torch.zeros(shape), torch.zeros(3, 20), {}, **conditions)
    calls = []
    monkeypatch.setattr(sample, "make_negatives", lambda *args: calls.append(args))
    run("--init", wan_folder("i2v"), "--pairs", tmp_path)
    (_, _, _, sampler, _, negative, _, _), = calls
    assert sampler == sample.Sampler("unipc", steps=40, flow_shift=flow_shift, guidance=1.0)
    assert negative is None


@pytest.mark.parametrize("variant, given, expected", [
    ("t2v", "official", "the official one"), ("t2v", "", ""), ("t2v", "blurred", "blurred"),
    ("i2v a14b", "official", "the official one"), ("i2v", "official", "镜头晃动，the official one"),
    ("flf2v", "official", "镜头切换，镜头晃动，the official one"),
])
def test_the_negative_prompt_is_the_official_one_or_what_is_given(log, variant, given, expected):
    args = sample.parse_args(["--negative_prompt", given])
    sample.fill_defaults(args, VARIANTS[variant], "a14b" in variant)
    assert args.negative_prompt == expected


def test_an_empty_negative_prompt_is_what_the_text_encoder_makes_of_it(wan_folder, log, tmp_path, monkeypatch):
    write_sample(tmp_path / "real" / "0.safetensors", torch.zeros(16, 1, 4, 2), torch.zeros(3, 20), {})
    calls = []
    monkeypatch.setattr(sample, "make_negatives", lambda *args: calls.append(args))
    run("--init", wan_folder("t2v"), "--pairs", tmp_path, "--guidance", 2, "--negative_prompt", "")
    (_, _, _, _, _, negative, _, _), = calls
    assert torch.equal(negative, Encoders(VARIANTS["t2v"], []).encode_text("")) and len(negative) == 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("guidance", ["1", "2"])
def test_negatives_of_every_variant_take_their_real_samples_conditions(wan_folder, log, tmp_path, variant, guidance):
    config, root, shape = VARIANTS[variant], wan_folder(variant), (VARIANTS[variant].out_dim, 2, 4, 2)
    reals = [(torch.randn(shape), torch.randn(3, 20), conditions_of(config, shape, seed=i)) for i in range(2)]
    metadata = {"prompt": "a cat", "encoder": "wan", "fps": "16"}
    for i, (latents, context, conditions) in enumerate(reals):
        write_sample(tmp_path / "real" / f"{i}.safetensors", latents, context, metadata, **conditions)
    flags = ["--init", root, "--pairs", tmp_path, "--steps", 3, "--guidance", guidance, "--batch_size", 2]
    run(*flags)
    two_experts = "a14b" in variant
    prefix = {"i2v": "镜头晃动，", "flf2v": "镜头切换，镜头晃动，"}.get(variant, "")
    texts = [f"text {prefix}the official one", "free text"] if guidance == "2" else []
    assert log == texts + ["load model"] * (1 + two_experts)

    model = load_wan(root / "high_noise_model" if two_experts else root)
    low = (lambda: load_wan(root / "low_noise_model")) if two_experts else None
    defaults = sample.DEFAULTS[variant]
    sampler = sample.Sampler("unipc", 3, defaults["flow_shift"], float(guidance), 0.0, defaults["boundary"])
    negative = Encoders(config, []).encode_text(f"{prefix}the official one")
    for i, (_, context, conditions) in enumerate(reals):
        made = read_sample(tmp_path / "negatives" / f"{i}.safetensors")
        seed = int(made["metadata"]["noise_seed"])
        alone = sample.generate(model, [context], [seed], shape, sampler, negative, low,
                                **{name: value[None] for name, value in conditions.items()})
        assert torch.allclose(made["latents"], alone[0], atol=1e-4)
        assert made.keys() == {"latents", "context", "metadata"} and made["metadata"]["solver"] == "unipc"
        if variant == "ti2v":
            assert torch.equal(made["latents"][:, :1], conditions["first_latent"])
    assert len(open_data(tmp_path, pairs=True)) == 2
    run(*flags)                                                                # nothing left to do, the same settings
    with pytest.raises(ValueError, match="was made with .*another --name"):
        run(*flags, "--solver", "euler")


def test_the_second_expert_is_read_when_its_turn_comes_straight_to_the_device(wan_folder, tmp_path, monkeypatch):
    order = []

    class Recorded(torch.nn.Module):
        def __init__(self, model, name):
            super().__init__()
            self.model, self.name = model, name

        def forward(self, *args, **named):
            order.append(f"{self.name} answers")
            return self.model(*args, **named)

    def load(path, dtype, device):
        order.append(f"read {path.name} as {dtype} to {device}")
        return Recorded(load_wan(path, dtype=dtype, device=device), path.name)

    monkeypatch.setattr(streaming, "load_wan", load)
    for i in range(2):
        write_sample(tmp_path / "real" / f"{i}.safetensors", torch.zeros(16, 1, 4, 2), torch.zeros(3, 20), {})
    run("--init", wan_folder("t2v a14b"), "--pairs", tmp_path, "--steps", 2, "--boundary", 0.95)
    # shift 12, u = 0.999 and 0.4995: sigma 0.9999 and 0.923
    assert order == ["read high_noise_model as torch.float32 to cpu", "high_noise_model answers",
                     "read low_noise_model as torch.float32 to cpu", "low_noise_model answers",
                     "high_noise_model answers", "low_noise_model answers"]


def test_a_rank_of_torchrun_takes_its_gpu_before_anything_allocates(wan_folder, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: order.append(f"set {device}"))
    monkeypatch.setattr(sample, "open_wan", lambda *args: order.append("open") or open_wan(*args))
    monkeypatch.setattr(sample, "make_videos", lambda args, *others: order.append(f"sample on {args.device}"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    run("--init", wan_folder("t2v"), "--prompts", "a cat")
    assert order == ["set cuda:3", "open", "sample on cuda:3"]


@pytest.mark.parametrize("variant, flags, words", [
    ("i2v", [], "--image is missing.*i2v"),
    ("flf2v", ["--image", "PICTURE"], "--last_image is missing"),
    ("t2v", ["--image", "PICTURE"], "--image: .*takes no picture; only i2v, flf2v, ti2v do"),
    ("i2v", ["--image", "PICTURE", "--last_image", "PICTURE"], "--last_image: .*only flf2v"),
    ("t2v", ["--last_image", "PICTURE"], "--last_image: .*only flf2v"),
    ("i2v", ["--image", "nowhere.png"], "--image nowhere.png: no such file"),
    ("i2v", ["--image", "PICTURE", "PICTURE", "PICTURE"], "--image: 3 pictures for 2 prompts"),
    ("t2v", ["--frames", "80"], "--frames 80: .*use 77 or 81"),
    ("t2v", ["--size", "480", "840"], "--size 480 840.*multiples of 16"),
    ("ti2v", ["--size", "720", "1280"], "--size 720 1280.*multiples of 32"),
    ("t2v", ["--solver", "dpm"], "--solver dpm: expected euler or unipc"),
    ("t2v", ["--steps", "-1"], "--steps -1: expected a number above 0"),
    ("t2v a14b", ["--boundary", "875"], "--boundary 875.0: expected a sigma between 0 and 1"),
    ("t2v", ["--boundary", "0.9"], "--boundary, --low_guidance and --low_lora are for two experts"),
])
def test_what_a_variant_cannot_do_is_refused_before_loading(wan_folder, log, picture, tmp_path, variant, flags, words):
    flags = [picture if flag == "PICTURE" else flag for flag in flags]
    with pytest.raises(ValueError, match=words):
        run("--init", wan_folder(variant), "--prompts", "a cat", "a dog", "--out", tmp_path / "out", *flags)
    assert log == [] and not (tmp_path / "out").exists()


def test_a_file_that_is_not_a_picture_is_named(wan_folder, log, tmp_path):
    pytest.importorskip("PIL", reason="pictures need Pillow, which diffusers brings")
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match="a.png: not a picture"):
        run("--init", wan_folder("i2v"), "--prompts", "a cat", "--image", tmp_path / "a.png", "--out", tmp_path / "out")
    assert "load model" not in log


def test_one_expert_alone_is_refused(wan_folder):
    root = wan_folder("t2v a14b")
    with pytest.raises(ValueError, match=f"one of two experts, which sample together; give {root}"):
        run("--init", root / "low_noise_model", "--prompts", "a cat")


@pytest.mark.parametrize("variant, made_for, change, words", [
    ("i2v", "t2v", {}, "the condition clip_features is missing; this i2v model .* takes .257, 8."),
    ("t2v", "i2v", {}, "the condition clip_features is .257, 8.; this t2v model .* takes no such condition"),
    ("flf2v", "i2v", {}, "the condition clip_features is .257, 8.; .* takes .514, 8."),
    ("i2v a14b", "i2v", {}, "the condition clip_features is .257, 8.; .* takes no such condition"),
    ("i2v a14b", "t2v", {}, "the condition y is missing; this i2v model .* takes .20, 2, 4, 2."),
    ("t2v", "ti2v", {}, "latents are .48, 2, 4, 2., of 48 channels; this t2v model has 16"),
    ("ti2v", "ti2v", {"first_latent": torch.zeros(48, 2, 4, 2)},
     "the condition first_latent is .48, 2, 4, 2.;.* takes .48, 1, 4, 2."),
    ("t2v", "t2v", {"latents": torch.zeros(16, 2, 4, 3)},
     "latents are .16, 2, 4, 3.; the model cuts F, H, W into patches of .1, 2, 2."),
    ("t2v", "t2v", {"context": torch.zeros(3, 24)},
     "context is .3, 24.; this t2v model takes at most 512 rows of width 20"),
])
def test_samples_of_another_variant_are_refused_before_loading(wan_folder, log, tmp_path, variant, made_for, change,
                                                               words):
    config = VARIANTS[made_for]
    shape = (config.out_dim, 2, 4, 2)
    tensors = {"latents": torch.zeros(shape), "context": torch.zeros(3, 20), **conditions_of(config, shape)} | change
    write_sample(tmp_path / "real" / "0.safetensors", metadata={}, **tensors)
    with pytest.raises(ValueError, match="0.safetensors: .*" + words):
        run("--init", wan_folder(variant), "--pairs", tmp_path)
    assert log == []


def test_ti2v_samples_with_and_without_a_first_frame_do_not_share_a_batch(wan_folder, tmp_path):
    shape = (48, 2, 4, 2)
    for i, conditions in enumerate(({}, conditions_of(VARIANTS["ti2v"], shape))):
        write_sample(tmp_path / "real" / f"{i}.safetensors", torch.zeros(shape), torch.zeros(3, 20), {}, **conditions)
    flags = ["--init", wan_folder("ti2v"), "--pairs", tmp_path, "--steps", 1]
    with pytest.raises(ValueError, match="1.safetensors has .*first_latent.*use --batch_size 1"):
        run(*flags, "--batch_size", 2)
    run(*flags)                                                                # one at a time, Wan's default
    assert len(open_data(tmp_path, pairs=True)) == 2
