"""The intervals and marks of docs/RESULTS.md hold what they say; rows that do not belong together are refused."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import i2v
import own_pairs
import paired
import toy
from data import pairs_from_scores, read_scores
from model import WanModel
from samples import write_sample
from weights import load_wan


def test_an_interval_covers_the_true_difference_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(paired, "DRAWS", 300)
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        captions = generator.normal(1.5, 1.0, size=(1, 256))                   # what a caption costs any model
        first = captions + 0.1 + generator.normal(0, 0.4, size=(1, 256))
        second = captions + generator.normal(0, 0.4, size=(1, 256))
        mean, low, high = paired.paired_difference(first, second, seed=trial)
        assert low < mean < high and high - low < 0.2                          # unpaired it would be 0.37
        covered += low < 0.1 < high
    assert 180 < covered < 199


def test_seeds_that_differ_widen_an_interval_and_a_base_meets_every_seed():
    base = np.full((1, 256), 2.0)
    alike = paired.paired_difference(np.array([[1.5] * 256] * 3), base)
    apart = paired.paired_difference(np.array([[1.4] * 256, [1.5] * 256, [1.6] * 256]), base)
    assert alike == pytest.approx((-0.5, -0.5, -0.5))
    assert apart[0] == pytest.approx(-0.5) and apart[2] - apart[1] > 0.1


def test_the_frechet_interval_is_around_the_plain_difference():
    def run(distance, shift):
        noise = np.random.default_rng(1).normal(0, 0.05, 200)                  # the same draws of captions
        return {"frechet": distance, "frechet_resampled": (distance + shift + noise).tolist()}

    mean, low, high = paired.paired_frechet([run(0.3, 0.1)], [run(0.2, 0.1)])
    assert mean == pytest.approx(0.1) and low == pytest.approx(0.1) and high == pytest.approx(0.1)


def test_an_interval_without_0_is_bold():
    assert paired.in_words(-0.2, -0.3, -0.1) == "**-0.200 [-0.300, -0.100]**"
    assert paired.in_words(-0.2, -0.5, 0.1) == "-0.200 [-0.500, +0.100]"


def test_a_table_of_two_codes_or_two_bases_is_refused():
    report = pytest.importorskip("report", reason="needs matplotlib")
    same = {"dpo": [{"code": "a", "init": "x"}], "sft": [{"code": "a", "init": "x"}]}
    report.check_one_code("main", same)
    for change in ({"code": "b", "init": "x"}, {"code": "a", "init": "y"}):
        with pytest.raises(SystemExit, match="table 'main': expected runs of one (code|init), found 2"):
            report.check_one_code("main", same | {"ipo": [change]})


# ----------------------------------------------------------------------------------------------------------------------
# image-to-video

def real_clips(count):
    captions, videos = toy.make_clips(count, seed=5)
    return captions, toy.decode_pixels(toy.encode_pixels(videos))


def test_marks_of_image_to_video_are_perfect_on_the_real_clips():
    captions, real = real_clips(12)
    marks = i2v.marks_of(real, real, captions)
    for name in ("drift", "first_frame", "broken"):
        assert marks[name].tolist() == [0.0] * 12, name
    for name in ("direction", "colour", "shape"):
        assert marks[name].tolist() == [1.0] * 12, name
    assert marks["background"].max() < 3 and marks["size"].max() < 0.1


def test_a_clip_that_flies_well_from_another_place_than_the_given_frame_is_marked_down():
    captions, real = real_clips(12)
    other = torch.stack([toy.make_clip(caption, seed=77 + i) for i, caption in enumerate(captions)])
    other = toy.decode_pixels(toy.encode_pixels(other))
    marks = i2v.marks_of(other, real, captions)
    of_start = (toy._moments(other)[2][:, 0] - toy._moments(real)[2][:, 0]).norm(dim=1)
    far = of_start > 4
    assert far.sum() > 3
    assert (marks["drift"][far] > 2).all() and (marks["broken"][far] == 1).all()
    assert (marks["first_frame"][far] > 10).all()
    assert toy.metrics(other, captions)["drift"].max() < 0.3                  # text-to-video's mark sees nothing wrong


def test_a_clip_that_keeps_the_given_frame_and_flies_the_wrong_way_is_marked_down():
    captions, real = real_clips(12)
    marks = i2v.marks_of(real[:, :, :1].expand_as(real), real, captions)      # a still: it never moves
    assert marks["first_frame"].max() == 0 and marks["drift"].min() > 1

    caption = "large red circle moving fast right"
    true_path = toy.trajectory(torch.tensor([10.0, 16.0]), caption)
    wrong_path = toy.trajectory(torch.tensor([10.0, 16.0]), "large red circle moving fast down")
    right, wrong = (toy.decode_pixels(toy.encode_pixels(toy.render(caption, path)))[None]
                    for path in (true_path, wrong_path))
    marks = i2v.marks_of(wrong, right, [caption])
    distance = (wrong_path - true_path).norm(dim=1).clamp(max=8).mean().item()
    assert marks["drift"].item() == pytest.approx(distance, abs=0.1)
    assert marks["direction"].item() == 0 and marks["broken"].item() == 1 and marks["first_frame"].item() == 0


def test_the_condition_is_wans_a_mask_of_the_given_frame_and_its_latents_before_grey():
    _, videos = toy.make_clips(2, seed=5)
    y = i2v.condition(videos)
    assert y.shape == (2, 13, 8, 8, 8)
    assert (y[:, 0, 0] == 1).all() and (y[:, 0, 1:] == 0).all()
    assert torch.equal(y[:, 1:, :1], toy.encode_pixels(videos[:, :, :1]))
    assert torch.equal(y[:, 1:, 1:], toy.encode_pixels(torch.zeros(2, 3, 7, 32, 32)))


def test_a_widened_model_does_not_see_the_condition_yet():
    text_to_video = load_wan(ROOT / "toy_base").eval()
    config, state = i2v.widen(text_to_video)
    image_to_video = WanModel(config).eval()
    image_to_video.load_state_dict(state)
    assert config.model_type == "i2v"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 8, 8, 8, generator=generator)
    y = torch.randn(2, 13, 8, 8, 8, generator=generator)
    inputs = (x, torch.tensor([300.0, 900.0]), torch.randn(2, 6, 32, generator=generator))
    with torch.no_grad():
        torch.testing.assert_close(image_to_video(*inputs, y=y), text_to_video(*inputs))


# ----------------------------------------------------------------------------------------------------------------------
# own clips that win

def test_of_clips_of_one_caption_the_one_that_flies_best_wins_over_the_one_that_flies_worst(tmp_path):
    caption = "small green square moving slowly left"
    real = toy.render(caption, toy.trajectory(torch.tensor([24.0, 16.0]), caption))    # no bounce
    still = real[:, :1].expand_as(real)
    half = torch.cat([real[:, :4], real[:, 3:4].expand(-1, 4, -1, -1)], dim=1)         # stops half way
    files = []
    for name, video in (("negatives", still), ("negatives_1", real), ("negatives_2", half)):
        files.append(tmp_path / name / "00000.safetensors")
        write_sample(files[-1], toy.encode_pixels(video), toy.encode_text(caption), {"prompt": caption})
    own_pairs.score_by_drift(files, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["score"] <= 0 for row in rows)
    pairs, _, _ = pairs_from_scores(read_scores(tmp_path / "scores.jsonl"), 0.0)
    assert [(win.path, lose.path) for win, lose in pairs] == [(files[1], files[0])]
