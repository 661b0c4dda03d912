"""
Wan's encoders, on tiny random networks, against the pipelines of diffusers on the same weights.

The command, encode.py, is tested at the end.
"""

import gzip
import json
import math
import os
import shutil
import socket
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import wan_encoders
from samples import fingerprint, read_empty_caption, read_sample, write_sample
from wan_encoders import LATENTS, decode_in_tiles, open_encoders
from conftest import write_video
from make_videos import read_all
from encode import main, parse_args
from model import CONFIGS, WanConfig
from video import look_at

pytest.importorskip("av", reason="real video needs PyAV: pip install -r requirements-video.txt")
diffusers = pytest.importorskip("diffusers", reason="pip install -r requirements-video.txt")
transformers = pytest.importorskip("transformers", reason="pip install -r requirements-video.txt")
# comes with transformers
from tokenizers import (
    Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers)

with gzip.open(Path(__file__).parent / "encoder_keys.json.gz") as file:
    # name: shape of every tensor of the released files, in the original's and in the library's words
    PUBLIC = json.load(
        file
    )
FROM_ORIGINAL = {
    "umt5-xxl": wan_encoders.text_from_original, "wan2.1-vae": wan_encoders.vae_from_original,
    "wan2.2-vae": wan_encoders.vae_from_original, "clip-vit-h": wan_encoders.clip_from_original}
T5, CLIP = "models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TEXT, TOKENS, SIDE = 32, 17, 56  # width of text and image features; tokens and side of an image, 4 x 4 patches of 14
SMALL = dict(dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_dim=TEXT)
PRESETS = {
    "t2v": WanConfig(**SMALL, in_dim=16, out_dim=16), "i2v": WanConfig(**SMALL, in_dim=36, out_dim=16, image_dim=TEXT),
    "flf2v": WanConfig(**SMALL, in_dim=36, out_dim=16, image_dim=TEXT, image_pos_len=2 * TOKENS),
    "a14b": WanConfig(**SMALL, in_dim=36, out_dim=16), "ti2v": WanConfig(**SMALL, in_dim=48, out_dim=48)}
SENTENCES = (
    "a red ball rolls to the left", "the blue square moves up & down", "cats and dogs in the rain",
    "a café, if it is < or > open", "final cuts; 1 2 3")
CLEAN, MESSY = "a café, if it is < open & red", "  a cafÃ©,\n if it\t is &amp;lt;   open &amp; red "


# ------------------------------------------------------------------------------------------------------------------
# tiny encoders, as files


def random_weights(network):
    """Numbers of a size at which every part of a network shows in its output."""
    for name, weight in network.named_parameters():
        norm = weight.ndim == 1 and "bias" not in name or "gamma" in name
        torch.nn.init.normal_(
            weight, 1.0 if norm else 0.0, 0.2 if norm or weight.ndim == 1 else weight[0].numel() ** -0.5
        )
    return network.eval()


def tiny_vae(channels, **settings):
    if channels == 48:
        settings = (
            dict(
                base_dim=8, decoder_base_dim=12, z_dim=48, is_residual=True, in_channels=12, out_channels=12,
                patch_size=2, scale_factor_spatial=16, latents_mean=LATENTS["wan2.2"][0],
                latents_std=LATENTS["wan2.2"][1])
            | settings
        )
    return diffusers.AutoencoderKLWan(**dict(base_dim=8) | settings)


def tiny_tokenizer(path, **extra):
    """A unigram tokenizer, trained here: 0 pads, 1 ends, 2 is unknown, as in UMT5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        SENTENCES * 3,
        trainers.UnigramTrainer(vocab_size=90, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    for name, value in extra.items():
        setattr(tokenizer, name, value)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>", "eos_token": "</s>",
                "unk_token": "<unk>"}
        )
    )


def write_original(path, state, table, kind):
    """The original file of the library's tensors: renamed back by the public list, for CLIP reshaped and joined."""
    state, original = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}, {}
    for name in PUBLIC[kind]["original"]:
        found = wan_encoders.rename(name, table)
        parts = [found.replace("qkv_proj", f"{part}_proj") for part in "qkv"] if "qkv_proj" in found else [found]
        if parts[0] in state:  # tiny networks have fewer blocks
            original[name] = torch.cat([state[part] for part in parts])
    if kind == "clip-vit-h":
        original["visual.cls_embedding"] = original["visual.cls_embedding"][None, None]
        original["visual.pos_embedding"] = original["visual.pos_embedding"][None]
        # the file has more than is used
        original |= {
            name: torch.zeros(2, 2) for name in ("visual.head", "textual.head.0.weight", "log_scale")
        }
    torch.save(original, path)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """
    {"diffusers" or "original": {16 or 48: folder}}: the same weights in both formats; 48: with Wan2.2's VAE.

    Tests write to copies only.
    """
    root, found = tmp_path_factory.mktemp("encoders"), {"diffusers": {}, "original": {}}
    torch.manual_seed(0)
    text = transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=100, d_model=TEXT, d_kv=6, d_ff=48, num_layers=2, num_heads=4)
    )
    clip = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=TEXT, intermediate_size=48, num_hidden_layers=3, num_attention_heads=16, image_size=SIDE,
            patch_size=14, hidden_act="gelu")
    )
    vaes = {16: tiny_vae(16), 48: tiny_vae(48)}
    for network in (text, clip, *vaes.values()):
        random_weights(network)
    for channels, vae in vaes.items():
        folder = found["diffusers"][channels] = root / f"diffusers{channels}"
        for part, network in (("text_encoder", text), ("image_encoder", clip), ("vae", vae)):
            network.save_pretrained(folder / part)
        tiny_tokenizer(folder / "tokenizer")
        folder = found["original"][channels] = root / f"original{channels}"
        # no two trainings give the same
        shutil.copytree(
            root / f"diffusers{channels}" / "tokenizer", folder / "google" / "umt5-xxl"
        )
        write_original(folder / T5, text.state_dict(), wan_encoders.TEXT_NAMES, "umt5-xxl")
        write_original(folder / CLIP, clip.state_dict(), wan_encoders.CLIP_NAMES, "clip-vit-h")
        version = "2.2" if channels == 48 else "2.1"
        write_original(folder / f"Wan{version}_VAE.pth", vae.state_dict(), wan_encoders.VAE_NAMES, f"wan{version}-vae")
    return found


@pytest.fixture(scope="session")
def pipelines(folders):
    """{channels: diffusers' own image-to-video pipeline, every part loaded by its library}"""
    return {
        channels: diffusers.WanImageToVideoPipeline(
            tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder=transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
            image_encoder=transformers.CLIPVisionModel.from_pretrained(folder / "image_encoder"),
            vae=diffusers.AutoencoderKLWan.from_pretrained(folder / "vae"),
            image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE),
            scheduler=diffusers.UniPCMultistepScheduler(), expand_timesteps=channels == 48)
        for channels, folder in folders["diffusers"].items()
    }


@pytest.fixture(params=["diffusers", "original"])
def format(request):
    return request.param


@pytest.fixture
def copy(folders, tmp_path):
    """A folder of the 16-channel encoders to break."""
    return lambda format: Path(shutil.copytree(folders[format][16], tmp_path / format))


def picture(seed, height=32, width=48):
    """A picture (3, H, W) in [-1, 1] of smooth random colours, at the 256 levels of a file."""
    noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, (height, width), mode="bilinear")[0] * 255).round() / 127.5 - 1


def clip_of(frames, height=32, width=48):
    return torch.stack([picture(k, height, width) for k in range(frames)], dim=1)


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape and found.dtype == torch.float32
    return ((found - expected).norm() / expected.norm()).item() < tolerance


def refusal(call, *args):
    with pytest.raises(ValueError) as caught:
        call(*args)
    return str(caught.value)


def run(*args):
    main(parse_args([str(arg) for arg in args]))


# ------------------------------------------------------------------------------------------------------------------
# names and numbers of the public files


@pytest.mark.parametrize("kind", PUBLIC)
def test_original_names_become_those_of_the_library_and_no_others(kind):
    state, settings = FROM_ORIGINAL[kind](
        {name: torch.empty(shape, device="meta") for name, shape in PUBLIC[kind]["original"].items()}
    )
    library = {name.removeprefix("vision_model."): shape for name, shape in PUBLIC[kind]["library"].items()}
    assert {name: list(tensor.shape) for name, tensor in state.items()} == library
    with torch.device("meta"):  # and the sizes read off the tensors make a network of these names
        network = {
            "umt5-xxl": lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**settings)),
            "clip-vit-h": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**settings)),
        }.get(kind, lambda: diffusers.AutoencoderKLWan(**settings))()
    shapes = {name.removeprefix("vision_model."): list(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)  # tied to shared.weight, not stored
    assert shapes == library
    expected = {
        "umt5-xxl": {"num_heads": 64, "d_kv": 64, "num_layers": 24, "relative_attention_num_buckets": 32},
        "clip-vit-h": {"num_attention_heads": 16, "num_hidden_layers": 32, "image_size": 224, "patch_size": 14},
        "wan2.1-vae": {"base_dim": 96, "decoder_base_dim": 96, "z_dim": 16},
        "wan2.2-vae": {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48}}
    assert settings.items() >= expected[kind].items()


def test_q_k_and_v_of_clip_are_the_three_thirds_in_order():
    state = {name: torch.zeros(shape, device="meta") for name, shape in PUBLIC["clip-vit-h"]["original"].items()}
    state["visual.transformer.3.attn.to_qkv.bias"] = torch.arange(3).repeat_interleave(1280)
    vision, _ = wan_encoders.clip_from_original(state)
    for number, part in enumerate("qkv"):
        assert vision[f"encoder.layers.3.self_attn.{part}_proj.bias"].eq(number).all()


def test_latents_are_normalised_with_the_published_numbers():
    defaults = diffusers.AutoencoderKLWan(base_dim=4).config  # diffusers' own, for Wan2.1
    assert LATENTS["wan2.1"] == (defaults.latents_mean, defaults.latents_std)
    # sums, also weighted by place, of Wan2.2's published config
    for values, total, weighted in zip(
        LATENTS["wan2.2"], (-0.5589, 32.536), (-7.0659, 758.3531)
    ):
        assert (
            len(values) == 48
            and sum(values) == pytest.approx(total)
            and sum(k * x for k, x in enumerate(values)) == pytest.approx(weighted)
        )


# ------------------------------------------------------------------------------------------------------------------
# text


@pytest.mark.parametrize("prompt", [CLEAN, MESSY, "", "cats and dogs in the rain " * 60])
def test_prompts_become_what_diffusers_makes_of_them(folders, pipelines, format, prompt):
    context = open_encoders(folders[format][16], PRESETS["t2v"]).encode_text(prompt)
    padded = pipelines[16]._get_t5_prompt_embeds(prompt, max_sequence_length=512, device="cpu")[0]
    assert close(context, padded[: len(context)]) and not padded[len(context) :].any()
    assert (
        len(context) == (512 if len(prompt) > 1000 else 1 if not prompt else len(context))
        and padded[len(context) - 1].any()
    )


def test_what_a_prompt_loses_that_is_longer_than_the_encoder_reads_is_said_once(folders, capsys):
    encoders = open_encoders(folders["diffusers"][16], PRESETS["t2v"])
    encoders.encode_text(CLEAN)
    assert "WARNING" not in capsys.readouterr().out
    for _ in range(2):
        encoders.encode_text("cats and dogs in the rain " * 60)
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "reads 512 tokens" in said and "'cats and dogs" in said


def test_a_text_encoder_with_offloaded_blocks_gives_the_same_in_every_bit(folders, format):
    whole = open_encoders(folders[format][16], PRESETS["t2v"])
    offloaded = open_encoders(folders[format][16], PRESETS["t2v"], offload=True)
    assert torch.equal(offloaded.encode_text(CLEAN), whole.encode_text(CLEAN))
    _, encoder = offloaded.part("text")
    assert not [name for name, _ in encoder.named_parameters() if ".block." in name]
    assert len(encoder.encoder.block) == 2


def test_prompts_are_cleaned_as_wan_does(folders):
    encoders = open_encoders(folders["diffusers"][16], PRESETS["t2v"])
    assert torch.equal(encoders.encode_text(MESSY), encoders.encode_text(CLEAN))
    tokenizer, _ = encoders.part("text")
    # the cleaning is what makes them equal
    assert (
        tokenizer(CLEAN).input_ids != tokenizer(MESSY).input_ids and 2 not in tokenizer(CLEAN).input_ids[:-1]
    )


def test_padding_that_is_attended_or_kept_would_show(folders):
    encoders = open_encoders(folders["diffusers"][16], PRESETS["t2v"])
    tokenizer, encoder = encoders.part("text")
    tokens = tokenizer("a red ball").input_ids
    padded = encoder(
        torch.tensor([tokens + [0] * 20]), attention_mask=torch.ones(1, len(tokens) + 20)
    ).last_hidden_state[0]
    assert not close(encoders.encode_text("a red ball"), padded[: len(tokens)], 0.01)


def test_the_tokenizer_is_all_of_its_file(folders, copy):
    folder = copy("diffusers")
    tiny_tokenizer(folder / "tokenizer", normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
    expected = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).encode("ﬁnal CUTS").ids
    tokenizer, _ = open_encoders(folder, PRESETS["t2v"]).part("text")
    assert tokenizer("ﬁnal CUTS").input_ids == expected and 2 not in expected and expected[-1] == 1


def test_the_embedding_of_the_text_encoder_is_tied_and_must_be_in_the_file(folders, format, copy):
    _, encoder = open_encoders(folders[format][16], PRESETS["t2v"]).part("text")
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight and encoder.shared.weight.std() > 0.1
    if format == "original":
        folder = copy("original")
        state = torch.load(folder / T5)
        state["encoder.embed_tokens.weight"] = torch.zeros_like(state["token_embedding.weight"])
        torch.save(state, folder / T5)
        assert f"{folder / T5}: encoder.embed_tokens.weight is not shared.weight" in refusal(
            open_encoders(folder, PRESETS["t2v"]).encode_text, "x"
        )


def test_a_text_encoder_stored_in_bf16_stays_so_and_gives_float32(folders, copy):
    folder = copy("original")
    torch.save({name: tensor.bfloat16() for name, tensor in torch.load(folder / T5).items()}, folder / T5)
    encoders = open_encoders(folder, PRESETS["t2v"])
    exact = open_encoders(folders["original"][16], PRESETS["t2v"]).encode_text(CLEAN)
    assert close(encoders.encode_text(CLEAN), exact, 0.1) and not close(encoders.encode_text(CLEAN), exact, 1e-4)
    assert {weight.dtype for weight in encoders.part("text")[1].parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------------
# video


@pytest.mark.parametrize("channels, height, width", [(16, 32, 48), (48, 32, 64)])
def test_videos_go_through_the_vae_as_in_diffusers(folders, pipelines, format, channels, height, width):
    encoders = open_encoders(folders[format][channels], PRESETS["ti2v" if channels == 48 else "t2v"])
    vae, video, stride = pipelines[channels].vae, clip_of(9, height, width), 16 if channels == 48 else 8
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in LATENTS["wan2.2" if channels == 48 else "wan2.1"])
    latents = encoders.encode_video(video)
    assert latents.shape == (channels, 3, height // stride, width // stride)
    with torch.no_grad():
        assert close(latents, (vae.encode(video[None]).latent_dist.mode()[0] - mean) / std)
        assert close(encoders.decode_video(latents), vae.decode((latents * std + mean)[None]).sample[0])
        loud = encoders.decode_video(100 * latents)
        assert loud.shape == video.shape and loud.abs().max() == 1


def test_a_diffusers_vae_brings_its_own_mean_and_deviation(folders, copy):
    folder = copy("diffusers")
    settings = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(
        json.dumps(settings | {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16})
    )
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in LATENTS["wan2.1"])
    public, own = (
        open_encoders(path, PRESETS["t2v"]).encode_video(clip_of(5)) for path in (folders["diffusers"][16], folder)
    )
    assert close(own, (public * std + mean - 0.5) / 2)


@pytest.fixture
def with_tf32():
    """A user who has allowed TF32 everywhere."""
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "tf32"
    yield convolutions, products
    convolutions.fp32_precision, products.fp32_precision = before


def test_vae_and_clip_run_without_tf32_whatever_the_user_has_set(folders, with_tf32):
    encoders = open_encoders(folders["diffusers"][16], PRESETS["i2v"])
    convolutions, products = with_tf32
    seen = []

    def look(*args):
        seen.append((convolutions.fp32_precision, products.fp32_precision))
    for network in (encoders.part("vae")[0].encoder, encoders.part("vae")[0].decoder, encoders.part("clip")):
        network.register_forward_hook(look)
    latents = encoders.encode_video(clip_of(1))
    encoders.decode_video(latents)
    encoders.encode_image(picture(1))
    refusal(encoders.encode_video, clip_of(8))
    assert len(seen) == 3 and set(seen) == {("ieee", "ieee")}
    assert (convolutions.fp32_precision, products.fp32_precision) == ("tf32", "tf32")  # as it was, after errors too


def near_sighted(latents):
    """A decoder of 2 x 2 pixels a latent that sees 3 latents around each, and zeros outside, as a VAE pads."""
    kernel = torch.randn(3, latents.shape[0], 7, 7, generator=torch.Generator().manual_seed(0))
    frames = F.conv2d(latents.transpose(0, 1), kernel, padding=3)              # (f, 3, h, w)
    return frames.repeat_interleave(2, 2).repeat_interleave(2, 3).transpose(0, 1)


@pytest.mark.parametrize("height, width, tile, tiles", [(40, 70, 32, 8), (20, 33, 32, 2), (65, 90, 48, 6),
                                                        (17, 17, 32, 1), (64, 64, 64, 1)])
def test_tiles_give_what_a_decoder_makes_of_the_whole_that_sees_no_further_than_is_cut_off(height, width, tile, tiles):
    latents, shapes = torch.randn(4, 2, height, width), []

    def decode(part):
        shapes.append(part.shape)
        return near_sighted(part)
    video, whole = decode_in_tiles(decode, latents, tile, 2), near_sighted(latents)
    assert len(shapes) == tiles and all(max(shape[2:]) <= tile for shape in shapes)
    assert torch.equal(video, whole) if tiles == 1 else close(video, whole, 1e-6)


@pytest.mark.parametrize("channels, pixels", [(16, 8), (48, 16)])
def test_the_seams_of_tiles_are_not_to_be_seen(folders, channels, pixels):
    vae, _, _ = open_encoders(folders["diffusers"][channels], PRESETS["ti2v" if channels == 48 else "t2v"]).part("vae")
    latents = torch.randn(channels, 1, 6, 40, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def decode(part):
        return vae.decode(part[None]).sample[0]
    whole = decode(latents)
    video = decode_in_tiles(decode, latents, 28, pixels)   # latents 0 to 27 and 12 to 39: they share 12 to 27
    side_by_side = torch.cat([decode(latents[..., :20]), decode(latents[..., 20:])], dim=3)
    assert 0 < (video - whole).norm() < 0.08 * whole.norm()                    # attention sees all of a tile
    steps, steps_side_by_side = ((result - whole).diff(dim=3).abs().mean((0, 1, 2)) for result in (video, side_by_side))
    assert steps.max() < 0.15 * steps_side_by_side.max()   # of the error from column to column


def test_a_video_too_large_for_the_gpu_is_decoded_in_tiles_and_a_small_one_as_before(folders, monkeypatch, capsys):
    encoders = open_encoders(folders["diffusers"][16], PRESETS["t2v"])
    vae, _, _ = encoders.part("vae")
    large, small = torch.randn(16, 1, 4, 80), torch.randn(16, 1, 4, 30)
    expected = [encoders.decode_video(latents) for latents in (large, small)]
    decode, sizes = vae.decode, []

    def decode_little(latents):
        sizes.append(latents.shape[-1])
        if latents.shape[-1] > limit:
            raise torch.OutOfMemoryError("of a GPU that is small")
        return decode(latents)
    monkeypatch.setattr(vae, "decode", decode_little)
    limit = 50
    assert close(encoders.decode_video(large), expected[0], 0.1)
    assert sizes == [80, 64, 48, 48]                       # the whole, the first of 64, two of 48
    said = capsys.readouterr().out
    assert said.count("decoded in tiles of") == 2 and "tiles of 48 x 48 latents" in said
    assert torch.equal(encoders.decode_video(small), expected[1])
    assert close(encoders.decode_video(large), expected[0], 0.1) and sizes[4:] == [30, 48, 48]
    limit = 20
    with pytest.raises(torch.OutOfMemoryError):
        encoders.decode_video(large)


def test_a_video_of_other_size_or_range_is_refused(folders):
    encoders, big = (
        open_encoders(folders["diffusers"][16], PRESETS["t2v"]),
        open_encoders(folders["diffusers"][48], PRESETS["ti2v"]),
    )
    for video in (
        clip_of(8), clip_of(5, 32, 40), clip_of(5)[:2], clip_of(5)[:, 0], clip_of(5) * 127.5, clip_of(5) * math.nan):
        assert f"a video of {tuple(video.shape)}" in refusal(encoders.encode_video, video)
    assert "multiples of 16, values in [-1, 1]" in refusal(encoders.encode_video, clip_of(8))
    assert "width multiples of 32" in refusal(big.encode_video, clip_of(5, 48, 48))


# ------------------------------------------------------------------------------------------------------------------
# image conditions


@pytest.mark.parametrize("kind", ["i2v", "a14b", "flf2v"])
def test_the_image_condition_is_that_of_diffusers(folders, pipelines, format, kind):
    first, last = picture(1), picture(2) if kind == "flf2v" else None
    found = open_encoders(folders[format][16], PRESETS[kind]).conditions(first, last, 13)
    _, expected = pipelines[16].prepare_latents(
        first[None], 1, 16, 32, 48, 13, torch.float32, "cpu", last_image=None if last is None else last[None]
    )
    assert close(found["y"], expected[0]) and torch.equal(found["y"][:4], expected[0, :4])
    assert found.keys() == ({"y"} if kind == "a14b" else {"y", "clip_features"})
    short = open_encoders(folders[format][16], PRESETS["t2v"]).encode_video(first[:, None])
    # frames not given are grey, not zero latents
    assert (
        close(found["y"][4:, :1], short) and found["y"][4:, 1:].norm() > 0.1 * short.norm()
    )


def test_the_mask_says_which_frames_are_given(folders):
    # 9 frames: latent frame 0 is frame 0 (in all four channels), 1 is frames 1-4, 2 is frames 5-8;
    # frame 8 is channel 3 of latent frame 2
    i2v = open_encoders(folders["diffusers"][16], PRESETS["a14b"]).conditions(picture(1), None, 9)["y"]
    flf2v = open_encoders(folders["diffusers"][16], PRESETS["flf2v"]).conditions(picture(1), picture(2), 9)["y"]
    for y, rows in ((i2v, [[1, 0, 0]] * 4), (flf2v, [[1, 0, 0]] * 3 + [[1, 0, 1]])):
        assert torch.equal(y[:4], torch.tensor(rows).float()[:, :, None, None].expand(4, 3, 4, 6))


def test_clip_sees_the_square_image_of_diffusers(folders, pipelines, format):
    from PIL import Image

    image = picture(3, SIDE, SIDE)
    found = open_encoders(folders[format][16], PRESETS["i2v"]).encode_image(image)
    levels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert found.shape == (TOKENS, TEXT) and close(
        found, pipelines[16].encode_image(Image.fromarray(levels), "cpu")[0].detach()
    )


def test_clip_sees_the_whole_of_a_wide_image_first_before_last(folders, pipelines):
    first, last, network = picture(1), picture(2), pipelines[16].image_encoder
    found = open_encoders(folders["diffusers"][16], PRESETS["flf2v"]).conditions(first, last, 5)["clip_features"]
    # as Wan's own code: squashed by torch's bicubic, no antialiasing, [-1, 1] to [0, 1], CLIP's mean and deviation
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1),
    )
    squashed = F.interpolate(torch.stack([first, last]), size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    with torch.no_grad():
        states = network(((squashed + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
    assert found.shape == (2 * TOKENS, TEXT) and close(found, states[-2].flatten(0, 1))
    assert not close(found, states[-1].flatten(0, 1), 0.1) and not close(found, states[-2].flip(0).flatten(0, 1), 0.01)


def test_a_first_latent_is_that_of_diffusers_and_of_the_clip_itself(folders, pipelines, format):
    encoders = open_encoders(folders[format][48], PRESETS["ti2v"])
    video = clip_of(9, 32, 64)
    found = encoders.conditions(video[:, 0], None, 9)
    _, expected, _ = pipelines[48].prepare_latents(video[None, :, 0], 1, 48, 32, 64, 9, torch.float32, "cpu")
    assert (
        found.keys() == {"first_latent"}
        and found["first_latent"].shape == (48, 1, 2, 4)
        and close(found["first_latent"], expected[0])
    )
    assert close(found["first_latent"], encoders.encode_video(video)[:, :1])  # the VAE is causal
    assert encoders.conditions(None, None, 9) == {}  # text-to-video


def test_images_that_do_not_fit_the_model_are_refused(folders):
    first, last = picture(1), picture(2)
    for kind, images in (
        ("t2v", (first, None)), ("i2v", (None, None)), ("i2v", (first, last)), ("a14b", (None, last)),
        ("flf2v", (first, None)), ("flf2v", (None, last)), ("ti2v", (first, last)), ("ti2v", (None, last))):
        encoders = open_encoders(folders["diffusers"][48 if kind == "ti2v" else 16], PRESETS[kind])
        assert (
            f"images for a {PRESETS[kind].model_type} model: [" in refusal(encoders.conditions, *images, 9)
            and not encoders.loaded
        )
    flf2v = open_encoders(folders["diffusers"][16], PRESETS["flf2v"])
    assert "expected one size, 5 frames or more" in refusal(flf2v.conditions, first, picture(2, 32, 32), 9)
    assert "expected one size, 5 frames or more" in refusal(flf2v.conditions, first, last, 1)
    assert "a video of (3, 8, 32, 48)" in refusal(flf2v.conditions, first, last, 8)


# ------------------------------------------------------------------------------------------------------------------
# folders


def test_parts_are_loaded_when_needed_let_go_when_told_and_never_from_the_network(
    folders, format, monkeypatch, tmp_path
):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a connection"))
    encoders = open_encoders(folders[format][16], PRESETS["i2v"])
    assert not encoders.loaded
    before = encoders.encode_text(CLEAN)
    assert [*encoders.loaded] == ["text"]
    encoders.conditions(picture(1), None, 5)
    assert {*encoders.loaded} == {"text", "vae", "clip"} == {*encoders.parts}
    encoders.free("text")
    encoders.free("clip")
    encoders.free("clip")
    assert [*encoders.loaded] == ["vae"] and torch.equal(encoders.encode_text(CLEAN), before)
    alone = tmp_path / "alone"  # a folder with the VAE only is enough to decode
    alone.mkdir()
    name = {"diffusers": "vae", "original": "Wan2.1_VAE.pth"}[format]
    (alone / name).symlink_to(folders[format][16] / name)
    assert open_encoders(alone, PRESETS["i2v"]).decode_video(torch.zeros(16, 2, 4, 4)).shape == (3, 5, 32, 32)


@pytest.mark.parametrize(
    "format, missing, part, says",
    [
        ("original", T5, "text", f"neither {T5} (original Wan folder) nor text_encoder/config.json (diffusers folder)"),
        ("original", "google/umt5-xxl/tokenizer.json", "text", "neither google/umt5-xxl/tokenizer.json (original"),
        ("original", "Wan2.1_VAE.pth", "vae", "neither Wan2.1_VAE.pth (original"),
        ("original", CLIP, "clip", f"neither {CLIP} (original"),
        (
            "diffusers", "text_encoder/config.json", "text",
            "nor text_encoder/config.json (diffusers folder) in it; give the folder of the whole model"),
        ("diffusers", "tokenizer/tokenizer.json", "text", "nor tokenizer/tokenizer.json (diffusers"),
        ("diffusers", "vae/diffusion_pytorch_model.safetensors", "vae", "vae: expected one .safetensors file"),
        ("diffusers", "image_encoder/config.json", "clip", "nor image_encoder/config.json (diffusers"),
    ],
)
def test_a_part_that_is_missing_is_named(copy, format, missing, part, says):
    folder = copy(format)
    (folder / missing).unlink()
    message = refusal(open_encoders(folder, PRESETS["i2v"]).part, part)
    assert message.startswith(str(folder)) and says in message


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "program", "list", "other", "extra", "missing", "shape"])
@pytest.mark.parametrize("part, name", [("text", T5), ("vae", "Wan2.1_VAE.pth"), ("clip", CLIP)])
def test_a_damaged_file_is_named_and_nothing_in_it_runs(copy, monkeypatch, tmp_path, part, name, damage):
    monkeypatch.chdir(tmp_path)
    path = copy("original") / name
    content, state = path.read_bytes(), torch.load(path)
    first = next(name for name, tensor in state.items() if tensor.ndim > 1)
    if damage in ("cut", "text", "empty"):
        path.write_bytes({"cut": content[: len(content) // 2], "text": b"not a checkpoint " * 99, "empty": b""}[damage])
    elif damage == "program":
        torch.save(state | {"more": Bomb()}, path)
    else:
        torch.save(
            {
                "list": [1, 2], "other": {"model": state}, "extra": state | {f"{first}.more": torch.zeros(1)},
                "missing": {key: tensor for key, tensor in state.items() if key != first},
                "shape": state | {first: torch.cat([state[first], state[first]])}}[damage],
            path,
        )
    assert refusal(open_encoders(path.parent, PRESETS["i2v"]).part, part).startswith(f"{path}: ")
    assert not Path("exploded").exists()


def test_a_diffusers_folder_is_read_strictly_and_whole(copy):
    folder = copy("diffusers")
    vae = tiny_vae(16)
    # shards and their index next to the earlier whole file
    vae.save_pretrained(
        folder / "vae", max_shard_size="200KB"
    )
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    encoders = open_encoders(folder, PRESETS["t2v"])
    assert len(list((folder / "vae").glob("*.safetensors"))) > 2
    with torch.no_grad():
        mean, std = (torch.tensor(values).view(16, 1, 1, 1) for values in LATENTS["wan2.1"])
        expected = vae.eval().decode(torch.ones(1, 16, 1, 4, 4) * std + mean)
    assert close(encoders.decode_video(torch.ones(16, 1, 4, 4)), expected.sample[0])
    encoders.free("vae")
    next((folder / "vae").glob("*.safetensors")).unlink()
    assert "which is not there: the copy or download is not complete" in refusal(encoders.part, "vae")
    (folder / "image_encoder" / "config.json").write_text("{")
    assert f"{folder}/image_encoder/config.json: not JSON" in refusal(
        open_encoders(folder, PRESETS["i2v"]).part, "clip"
    )


def test_encoders_of_another_model_are_refused(folders, copy, tmp_path):
    both = folders["original"][16]
    assert f"{both}: neither Wan2.2_VAE.pth" in refusal(open_encoders(both, PRESETS["ti2v"]).part, "vae")
    folder = copy("original")
    shutil.copy(folder / "Wan2.1_VAE.pth", folder / "Wan2.2_VAE.pth")
    for path, found in (
        (folder, folder / "Wan2.2_VAE.pth"),
        (folders["diffusers"][16], folders["diffusers"][16] / "vae" / "config.json"),
    ):
        says = refusal(open_encoders(path, PRESETS["ti2v"]).part, "vae")
        assert says.startswith(
            f"{found}: a VAE with 16 latent channels, 16 means and 16 deviations of them; expected 48"
        )
    folder = copy("diffusers")
    # as a careless conversion leaves it
    tiny_vae(48, latents_mean=LATENTS["wan2.1"][0], latents_std=LATENTS["wan2.1"][1]).save_pretrained(
        folder / "vae"
    )
    assert "a VAE with 48 latent channels, 16 means and 16 deviations of them; expected 48" in refusal(
        open_encoders(folder, PRESETS["ti2v"]).part, "vae"
    )
    wide = WanConfig(**SMALL | {"text_dim": 4096}, in_dim=36, out_dim=16, image_dim=1280)
    assert "100 tokens of width 32, expected width 4096 for this model" in refusal(
        open_encoders(folder, wide).part, "text"
    )
    assert "features of width 32, expected 1280" in refusal(open_encoders(folder, wide).part, "clip")
    tiny_tokenizer(folder / "tokenizer", post_processor=processors.TemplateProcessing(single="$A"))
    assert "expected the end mark, 1, in the last place; not the tokenizer of UMT5" in refusal(
        open_encoders(folder, PRESETS["t2v"]).part, "text"
    )
    assert "a model with 12 latent channels has no Wan encoders" in refusal(open_encoders, folder, CONFIGS["tiny"])
    assert f"{tmp_path}/gone: no such folder" in refusal(open_encoders, tmp_path / "gone", PRESETS["t2v"])
    for preset in ("wan2.1-i2v-14b", "wan2.2-ti2v-5b"):  # the public presets themselves are welcome
        assert open_encoders(folder, CONFIGS[preset]).multiple == (32 if "ti2v" in preset else 16)


# ------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """videos/ with an mp4 of 9 frames at 16 fps; the tiny presets have names."""
    for kind, config in PRESETS.items():
        monkeypatch.setitem(CONFIGS, kind, config)
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", clip_of(9, 64, 64), 16)
    (tmp_path / "videos" / "metadata.jsonl").write_text(json.dumps({"video": "a.mp4", "prompt": MESSY}))
    return tmp_path / "videos"


@pytest.mark.parametrize(
    "kind, flags, conditions",
    [
        ("t2v", [], []), ("i2v", [], ["clip_features", "y"]), ("flf2v", [], ["clip_features", "y"]),
        ("a14b", [], ["y"]), ("ti2v", [], ["first_latent"]), ("ti2v", ["--text_only"], [])],
)
def test_samples_of_an_mp4_hold_what_their_model_needs_and_decode_to_an_mp4(
    folders, videos, tmp_path, kind, flags, conditions
):
    folder = folders["original" if kind == "i2v" else "diffusers"][PRESETS[kind].out_dim]
    run(
        "--videos", videos, "--out", tmp_path / "real", "--encoder", "wan", "--weights", folder, "--model", kind,
        *flags, "--size", 32, 64, "--frames", 9, "--fps", 16)
    sample = read_sample(tmp_path / "real" / "a_000000.safetensors")
    assert sorted(sample.keys() - {"latents", "context", "metadata"}) == conditions
    assert (
        sample["metadata"].items()
        >= {"encoder": "wan", "fps": "16", "model": kind, "prompt": MESSY, "text_only": str(bool(flags))}.items()
    )
    video = read_all(videos / "a.mp4", 16, (32, 64))
    encoders = open_encoders(folder, PRESETS[kind])
    assert sample["metadata"]["weights_fingerprint"] == fingerprint(encoders.files())
    context, _ = read_empty_caption(tmp_path / "real")
    assert context.shape == (1, TEXT) and torch.equal(context, encoders.encode_text(""))
    expected = encoders.conditions(video[:, 0], video[:, -1] if kind == "flf2v" else None, 9) if conditions else {}
    expected |= {"latents": encoders.encode_video(video), "context": encoders.encode_text(MESSY)}
    assert (
        all(torch.equal(sample[name], value) for name, value in expected.items()) and len(sample) == len(expected) + 1
    )
    if kind in ("t2v", "ti2v"):
        run("--decode", tmp_path / "real", "--out", tmp_path / "look", "--weights", folder)
        film = look_at(tmp_path / "look" / "a_000000.mp4")
        assert len(film.stamps) == 9 and film.stamps[1] * film.tick == Fraction(1, 16)
        assert (tmp_path / "look" / "sheet.png").exists()


def test_what_is_wrong_is_said_before_anything_is_encoded(folders, copy, videos, tmp_path, monkeypatch):
    out, good = tmp_path / "real", folders["original"][16]
    monkeypatch.setattr(wan_encoders.Encoders, "encode_text", lambda *args: pytest.fail("encoded"))
    flags = lambda weights=good, model="i2v", size=(32, 48), frames=9: (
        "--videos", videos, "--out", out, "--encoder", "wan", "--weights", weights, "--model", model, "--size", *size,
        "--frames", frames, "--fps", 16)
    broken = copy("original")
    (broken / CLIP).write_bytes(b"")
    assert f"{broken / CLIP}: not a whole file" in refusal(run, *flags(weights=broken))
    assert "--frames 8: encoder wan takes 4n+1 frames; use 5 or 9" in refusal(run, *flags(frames=8))
    assert "--size 32 40: encoder wan takes heights and widths that are multiples of 16" in refusal(
        run, *flags(size=(32, 40))
    )
    assert "--size 32 48: encoder wan takes heights and widths that are multiples of 32" in refusal(
        run, *flags(model="ti2v")
    )
    assert "--model 'wan': encoder wan needs" in refusal(run, *flags(model="wan"))
    assert "--weights '' --model 'i2v': encoder wan needs" in refusal(run, *flags(weights=""))
    assert f"{tmp_path}/gone: no such folder" in refusal(run, *flags(weights=tmp_path / "gone"))
    assert "neither Wan2.2_VAE.pth" in refusal(run, *flags(model="ti2v", size=(32, 64)))
    assert "--text_only: i2v is a i2v model" in refusal(run, *flags(), "--text_only")
    assert not out.exists()


def test_samples_made_for_another_model_are_not_taken_for_done(folders, videos, tmp_path):
    flags = (
        "--videos", videos, "--out", tmp_path / "real", "--encoder", "wan", "--size", 32, 64, "--frames", 5, "--fps",
        16, "--clips_per_video", 1)
    run(*flags, "--weights", folders["diffusers"][48], "--model", "ti2v", "--text_only")
    assert "was made with text_only True, but this run has False" in refusal(
        run, *flags, "--weights", folders["diffusers"][48], "--model", "ti2v"
    )
    assert "was made with model ti2v, but this run has t2v" in refusal(
        run, *flags, "--weights", folders["diffusers"][16], "--model", "t2v"
    )


def test_samples_of_other_encoder_weights_are_refused_by_name(folders, copy, videos, tmp_path):
    folder = copy("diffusers")
    flags = ("--videos", videos, "--out", tmp_path / "real", "--encoder", "wan", "--weights", folder, "--model", "t2v",
             "--size", 32, 64, "--frames", 5, "--fps", 16)
    run(*flags)
    run(*flags)
    random_weights(tiny_vae(16)).save_pretrained(folder / "vae")
    assert "a_000000.safetensors: exists and was made with weights_fingerprint " in refusal(run, *flags)
    for path in (tmp_path / "real").glob("*.safetensors"):
        path.unlink()
    assert "empty_caption.context: exists and is that of another encoder" in refusal(run, *flags)
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["empty_caption.context"]


@pytest.mark.parametrize("kind, count", [("t2v", 5), ("i2v", 7)])
def test_the_fingerprint_of_the_encoders_is_of_all_their_files(folders, kind, count):
    files = open_encoders(folders["diffusers"][16], PRESETS[kind]).files()
    assert len(files) == len(set(files)) == count  # the tokenizer; settings and tensors of each part
    assert len(open_encoders(folders["original"][16], PRESETS[kind]).files()) == (3 if kind == "t2v" else 4)


def test_wan_latents_need_weights_to_be_decoded(folders, tmp_path):
    write_sample(tmp_path / "in" / "a.safetensors", torch.zeros(16, 1, 4, 4), torch.zeros(1, 5), {"encoder": "wan"})
    says = refusal(run, "--decode", tmp_path / "in", "--out", tmp_path / "look")
    assert (
        "a.safetensors: latents of 16 channels; 12 (pixel) can be decoded, "
        "and with --weights DIR 16 and 48 (Wan's VAEs)"
        in says
    )
