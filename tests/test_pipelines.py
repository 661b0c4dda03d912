"""
Whole samples against diffusers' pipelines, on tiny random components that are built here: a diffusers folder, prompts and pictures in, pixels out.

Both sides start from the same noise and walk the same sigmas. Our grid is the official one and diffusers' is another, so its scheduler is handed
ours, through its own argument `sigmas`; one case does it the other way round and leaves the pipeline as it is. All the rest is each side's own code:
text cleaning and tokens, text encoder, image condition and CLIP, timesteps, guidance, experts, UniPC, decoding. Measured: 4e-6 of [-1, 1].
"""
import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers and transformers (requirements-video.txt)")
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import encode
import sample
from conftest import write_png
from data import read_sample

PROMPTS = ["A red ball rolls over the grass.", "two   dogs &amp; a cat"]
NEGATIVE = "blurred, grey"
STEPS, FRAMES = 4, 5
I2V = dict(channels=16, y_channels=20)
# transformer, what WAN.md has for it: flow_shift, guidance (high-noise expert first), boundary; pictures; height and width
CASES = {
    "t2v": (dict(), 5.0, [5.0], None, 0, (32, 64)),
    "i2v": (I2V | dict(image=True), 3.0, [5.0], None, 1, (32, 32)),            # square: diffusers crops what CLIP sees, Wan squashes it
    "flf2v": (I2V | dict(image=True, flf2v=True), 16.0, [5.0], None, 2, (32, 32)),
    "t2v a14b": (dict(), 12.0, [4.0, 3.0], 0.875, 0, (32, 64)),
    "i2v a14b": (I2V, 5.0, [3.5, 3.5], 0.9, 1, (32, 64)),
    "ti2v": (dict(channels=48), 5.0, [5.0], None, 0, (64, 32)),
    "ti2v with an image": (dict(channels=48), 5.0, [5.0], None, 1, (64, 32)),
}


def make_tokenizer():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(PROMPTS + [NEGATIVE], trainers.UnigramTrainer(vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_vae(large):
    """The VAE of Wan2.1, or of 2.2 if `large`, narrow."""
    torch.manual_seed(5)
    if not large:
        return AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    return AutoencoderKLWan(base_dim=8, decoder_base_dim=8, z_dim=48, num_res_blocks=1, in_channels=12, out_channels=12, patch_size=2, is_residual=True,
                            scale_factor_spatial=16, latents_mean=torch.linspace(-0.5, 0.5, 48).tolist(), latents_std=torch.linspace(0.4, 1.2, 48).tolist())


def make_transformer(seed, channels=16, y_channels=0, image=False, flf2v=False):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=24, in_channels=channels + y_channels, out_channels=channels, text_dim=20, freq_dim=32,
                                  ffn_dim=64, num_layers=2, image_dim=32 if image else None, added_kv_proj_dim=48 if image else None,
                                  pos_embed_seq_len=514 if flf2v else None).eval()
    if flf2v:
        torch.nn.init.normal_(model.condition_embedder.image_embedder.pos_embed)                   # zero at first: the order of the images would not show
    return model


def make_text_encoder():
    torch.manual_seed(6)
    return UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=20, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")).eval()


def make_clip():
    torch.manual_seed(7)
    return CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=2,
                                            hidden_act="gelu")).eval()


def make_pipeline(case):
    build, flow_shift, _, boundary, pictures, _ = CASES[case]
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    parts = dict(tokenizer=make_tokenizer(), text_encoder=make_text_encoder(), vae=make_vae("ti2v" in case), scheduler=scheduler,
                 transformer=make_transformer(1, **build), transformer_2=make_transformer(2, **build) if boundary else None, boundary_ratio=boundary,
                 expand_timesteps="ti2v" in case)
    if not pictures:
        return WanPipeline(**parts)
    if build.get("image"):
        parts |= dict(image_encoder=make_clip(), image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32))
    return WanImageToVideoPipeline(**parts)


@pytest.mark.parametrize("case, grid", [(case, "official") for case in CASES] + [("t2v", "diffusers")])
def test_a_video_is_that_of_diffusers(tmp_path, monkeypatch, case, grid):
    _, flow_shift, guidance, boundary, pictures, (height, width) = CASES[case]
    pipe = make_pipeline(case)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    scheduler = pipe.scheduler
    if grid == "official":
        monkeypatch.setattr(scheduler, "set_timesteps", lambda steps, device: UniPCMultistepScheduler.set_timesteps(
            scheduler, sigmas=0.999 * (1 - np.arange(steps) / steps), device=device))
    else:
        scheduler.set_timesteps(STEPS)
        sigmas = scheduler.sigmas.tolist()
        monkeypatch.setitem(sample.SOLVERS, "unipc", sample.SOLVERS["unipc"]._replace(grid=lambda steps, flow_shift: sigmas))

    rgb = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    files = [str(tmp_path / f"{i}.png") for i in range(pictures)]
    for file, image in zip(files, rgb):
        write_png(file, image)
    seen = []                                                                  # as they would be written; an mp4 is not exact
    monkeypatch.setattr(sample, "mp4", lambda video, fps, upscale: seen.append(video) or b"")
    sample.main(sample.parse_args(["--init", str(tmp_path / "model"), "--prompts", *PROMPTS, "--negative_prompt", NEGATIVE, "--out", str(tmp_path / "out"),
                                   "--steps", str(STEPS), "--frames", str(FRAMES), "--size", str(height), str(width),
                                   *(["--image", files[0]] if pictures else []), *(["--last_image", files[1]] if pictures == 2 else [])]))

    images = dict(zip(("image", "last_image"), map(Image.fromarray, rgb[:pictures])))
    for i, prompt in enumerate(PROMPTS):
        made = read_sample(tmp_path / "out" / f"{i:05d}.safetensors")
        noise = torch.randn(made["latents"].shape, generator=torch.Generator().manual_seed(int(made["metadata"]["noise_seed"])))
        video = pipe(prompt=prompt, negative_prompt=NEGATIVE, height=height, width=width, num_frames=FRAMES, num_inference_steps=STEPS, latents=noise[None],
                     guidance_scale=guidance[0], guidance_scale_2=guidance[1] if boundary else None, output_type="pt", **images).frames[0]
        assert (seen[i] - (2 * video.transpose(0, 1) - 1)).abs().max() <= 1e-3      # (3, F, H, W)
    assert (seen[0] - seen[1]).abs().max() > 0.02 and seen[0].std() > 0.02     # there is something to see, and it depends on the input
