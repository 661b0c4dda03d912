"""Image-to-video on GT-Pairs from a video file to an export, on tiny random components in a diffusers folder."""

import json
import math

from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers and transformers (requirements-video.txt)")
pytest.importorskip("av", reason="real video needs PyAV (requirements-video.txt)")

import encode
from conftest import write_video
from export import export_weights
import sample
import train
from samples import read_sample
from model import CONFIGS
from weights import load_wan, open_wan
from make_pipelines import PROMPTS, make_pipeline


@pytest.mark.parametrize(
    "case, size, conditions",
    [("i2v", (32, 32), {"y", "clip_features"}), ("ti2v with an image", (64, 32), {"first_latent"})],
)
def test_gt_pairs_from_an_mp4_to_a_trained_image_to_video_model(tmp_path, monkeypatch, case, size, conditions):
    model, data, out = (str(tmp_path / name) for name in ("model", "data", "out"))
    make_pipeline(case).save_pretrained(model)
    config, tensors = open_wan(model)
    monkeypatch.setitem(CONFIGS, "tiny-image", config)  # encode.py is told by name which model the samples are for
    (tmp_path / "videos").mkdir()
    for i, prompt in enumerate(PROMPTS):
        t = torch.linspace(0, 6, 10).view(1, 10, 1, 1) + torch.arange(size[1]) / 5 + i
        # a wave that moves sideways
        write_video(
            tmp_path / "videos" / f"{i}.mp4", torch.sin(t).expand(3, -1, size[0], -1), 16
        )
    (tmp_path / "videos" / "metadata.jsonl").write_text(
        "".join(json.dumps({"video": f"{i}.mp4", "prompt": p}) + "\n" for i, p in enumerate(PROMPTS))
    )

    encode.main(
        encode.parse_args(
            [
                "--videos", str(tmp_path / "videos"), "--out", data + "/real", "--encoder", "wan", "--weights", model,
                "--model", "tiny-image", "--size", *map(str, size), "--frames", "5", "--fps", "16"]
        )
    )
    sample.main(sample.parse_args(["--pairs", data, "--init", model, "--steps", "2"]))
    flags = f"--loss regdpo --init {model} --data {data} --out {out} --steps 3 --batch_size 4 --min_timestep 0"
    flags += " --flow_shift 5 --learning_rate 1e-3 --warmup_steps 1 --backward sequential"
    train.main(train.parse_args(flags.split()))
    export_weights(Path(out) / "step_000003", Path(out) / "diffusers", "diffusers")

    real, negative = (read_sample(next((tmp_path / "data" / kind).glob("0_000000*"))) for kind in ("real", "negatives"))
    assert (
        real.keys() - {"latents", "context", "metadata"} == conditions
        and real["latents"].shape == negative["latents"].shape
    )
    rows = [json.loads(line) for line in open(out + "/log.jsonl")]
    assert rows[0]["loss_dpo"] == pytest.approx(math.log(2), rel=1e-6) and rows[-1]["margin_abs"] > 1e-3
    trained = load_wan(out + "/export")
    assert trained.config == config and any(
        not torch.equal(value, tensors[name][:]) for name, value in trained.state_dict().items()
    )
    theirs = diffusers.WanTransformer3DModel.from_pretrained(out + "/diffusers")
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in trained.parameters())
