"""
Whole samples against diffusers' pipelines, on tiny random components that are built here: a diffusers folder, prompts
and pictures in, pixels out.

Both sides start from the same noise and visit the same sigmas. Our grid is the official one and diffusers' is another,
so its scheduler is given ours, through its own argument `sigmas`; one case does it the other way round and leaves the
pipeline alone. All the rest is each side's own code: text cleaning and tokens, text encoder, image condition and CLIP,
timesteps, guidance, experts, UniPC, decoding. Measured: 4e-6 of [-1, 1].
"""
import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers and transformers (requirements-video.txt)")
from diffusers import UniPCMultistepScheduler
from PIL import Image

import encode
import sample
from conftest import write_png
from samples import read_sample
from make_pipelines import CASES, NEGATIVE, PROMPTS, make_pipeline

STEPS, FRAMES = 4, 5


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
        monkeypatch.setitem(sample.SOLVERS, "unipc", (sample.unipc, lambda steps, flow_shift: sigmas, int))

    rgb = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    files = [str(tmp_path / f"{i}.png") for i in range(pictures)]
    for file, image in zip(files, rgb):
        write_png(file, image)
    videos = []                                                                # as they would be written to mp4
    monkeypatch.setattr(encode, "mp4", lambda video, fps, upscale: videos.append(video) or b"")
    flags = ["--init", tmp_path / "model", "--prompts", *PROMPTS, "--negative_prompt", NEGATIVE, "--steps", STEPS,
             "--out", tmp_path / "out", "--frames", FRAMES, "--size", height, width]
    for flag, file in zip(("--image", "--last_image"), files):
        flags += [flag, file]
    sample.main(sample.parse_args([str(flag) for flag in flags]))

    images = dict(zip(("image", "last_image"), map(Image.fromarray, rgb[:pictures])))
    for i, prompt in enumerate(PROMPTS):
        made = read_sample(tmp_path / "out" / f"{i:05d}.safetensors")
        generator = torch.Generator().manual_seed(int(made["metadata"]["noise_seed"]))
        noise = torch.randn(made["latents"].shape, generator=generator)
        expected = pipe(prompt=prompt, negative_prompt=NEGATIVE, height=height, width=width, num_frames=FRAMES,
                        num_inference_steps=STEPS, latents=noise[None], guidance_scale=guidance[0],
                        guidance_scale_2=guidance[1] if boundary else None, output_type="pt", **images).frames[0]
        assert (videos[i] - (2 * expected.transpose(0, 1) - 1)).abs().max() <= 1e-3     # (3, F, H, W)
    assert (videos[0] - videos[1]).abs().max() > 0.02                          # it depends on the prompt
    assert videos[0].std() > 0.02                                              # and there is something to see
