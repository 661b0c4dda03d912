"""The preference model: what it scores, how train.py trains it, and how its files differ from a policy's."""
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conftest import SHAPE, main_fails, run, spo_fails
from samples import write_sample
from model import CONFIGS, ScoreHead
from weights import load_wan, open_wan, save_wan


def test_the_score_head_reads_the_end_of_every_quarter_of_the_blocks():
    for layers, taps in ((4, [0, 1, 2, 3]), (30, [7, 14, 22, 29]), (40, [9, 19, 29, 39]), (1, [0]), (3, [0, 1, 2])):
        assert ScoreHead(SimpleNamespace(num_layers=layers, dim=8)).taps == taps


def test_a_preference_model_scores_each_video_by_itself_at_its_sigma_under_its_caption(spo_world):
    model = load_wan(spo_world / "scorer")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *SHAPE, generator=generator)
    context = torch.randn(3, 4, 32, generator=generator)
    timestep = torch.tensor([100.0, 500.0, 900.0])
    scores = model(x, timestep, context)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    for i in range(3):
        alone = model(x[i:i + 1], timestep[i:i + 1], context[i:i + 1])
        assert torch.allclose(alone, scores[i:i + 1], atol=1e-5)
    for others in ((x.flip(0), timestep, context), (x, timestep.flip(0), context), (x, timestep, context.flip(0))):
        assert (model(*others)[0] - scores[0]).abs() > 1e-3                   # all three matter


def test_a_preference_model_is_found_again_by_load_and_never_taken_for_a_policy(spo_world, tmp_path):
    scorer = spo_world / "scorer"
    model = load_wan(scorer)
    assert model.config.scores and isinstance(model.head, ScoreHead)
    save_wan(model, tmp_path / "one.safetensors", format="comfyui")
    for path in (scorer, tmp_path / "one.safetensors"):
        loaded = load_wan(path).state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert json.loads((scorer / "config.json").read_text())["scores"] is True
    # public code reads files of velocities, and knows no such field
    assert "scores" not in json.loads((spo_world / "base" / "config.json").read_text())
    with pytest.raises(ValueError, match="scores is True, expected False"):
        open_wan(scorer, load_wan(spo_world / "base").config)
    with pytest.raises(ValueError, match="diffusers has no preference model"):
        save_wan(model, tmp_path / "diffusers", format="diffusers")
    assert not (tmp_path / "diffusers").exists()


PREFERENCE = "--loss preference --learning_rate 1e-3 --max_grad_norm 1e9 --ema_decay 0.5".split()


@pytest.fixture(scope="session")
def preference(world, tmp_path_factory):
    """Log rows, exported weights and the base's weight file of a run of six steps."""
    return run(world, tmp_path_factory.mktemp("preference") / "out", *PREFERENCE)


def test_preference_training_starts_at_log_2_and_leaves_the_blocks_of_the_base_alone(preference):
    rows, weights, base_file = preference
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows[0]["accuracy"] == 0.5 and rows[0]["margin_abs"] == 0
    assert rows[-1]["margin_abs"] > 0
    assert set(rows[0]["by_sigma"]) == {"margin", "accuracy"}
    assert all(len(bins) == 4 for bins in rows[0]["by_sigma"].values())
    assert "err_win" not in rows[0] and "win_gap" not in rows[0]              # there are no errors, and no reference
    base = load_file(base_file)
    blocks = {name for name in base if not name.startswith("head.")}
    head = {"head.head", "head.mix.weight", "head.mix.bias"}
    head |= {f"head.hidden.{i}.{parameter}" for i in range(4) for parameter in ("weight", "bias")}
    assert weights.keys() == blocks | head
    assert all(torch.equal(weights[name], base[name]) for name in blocks)
    assert weights["head.head"].abs().max() > 0


CUTS = [
    (2, "--grad_accum 2"),
    (1, "--backward sequential"),
    pytest.param(4, "--backward pair --cp_size 2", marks=pytest.mark.slow),
    (1, "--resume latest"),
]


@pytest.mark.parametrize("ranks, flags", CUTS)
def test_preference_training_is_one_curve_however_it_is_cut(world, preference, tmp_path, ranks, flags):
    if "--resume" in flags:
        run(world, tmp_path / "out", *PREFERENCE, "--steps", "3", ranks=2)
    rows, weights, _ = run(world, tmp_path / "out", *PREFERENCE, *flags.split(), ranks=ranks)
    for a, b in zip(rows, preference[0], strict=True):
        for name in ("loss", "margin", "margin_abs", "score_win", "score_lose", "grad_norm", "c_win", "c_lose"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-6), (a["step"], name)
    for name, value in preference[1].items():
        assert torch.allclose(weights[name], value, rtol=1e-3, atol=2e-5), name


def test_a_preference_model_learns_to_tell_clips_at_low_noise_and_not_at_pure_noise(world, tmp_path):
    """Winners are twice as loud. At sigma 0 to 0.25 the difference is plain; near 1 nothing is left of it."""
    for i in range(40):
        generator = torch.Generator().manual_seed(i)
        for kind, loudness in (("real", 1.0), ("negatives", 0.5)):
            latents = loudness * torch.randn(SHAPE, generator=generator)
            write_sample(tmp_path / "data" / kind / f"{i:03d}.safetensors", latents, torch.zeros(2, 32), {})
    flags = f"--learning_rate 1e-2 --data {tmp_path / 'data'} --steps 25 --save_every 100"
    rows, _, _ = run(world, tmp_path / "out", *PREFERENCE, *flags.split())
    accuracies = [row["by_sigma"]["accuracy"][0] for row in rows[-8:]]        # at the lowest quarter of sigma
    accuracies = [accuracy for accuracy in accuracies if accuracy is not None]
    assert sum(accuracies) / len(accuracies) > 0.95

    model = load_wan(tmp_path / "out" / "export")
    generator = torch.Generator().manual_seed(1000)                           # clips that it never saw
    clips, noise = torch.randn(64, *SHAPE, generator=generator), torch.randn(32, *SHAPE, generator=generator)
    clips[32:] *= 0.5
    right = {}
    for sigma in (0.1, 0.999):
        x_sigma = (1 - sigma) * clips + sigma * noise.repeat(2, 1, 1, 1, 1)
        with torch.no_grad():
            win, lose = model(x_sigma, torch.full((64,), 1000 * sigma), torch.zeros(64, 2, 32)).chunk(2)
        right[sigma] = (win > lose).float().mean().item()
    assert right[0.1] > 0.95
    assert 0.2 < right[0.999] < 0.8


def test_a_preference_model_as_the_base_of_a_run_is_refused(preference, world, tmp_path):
    scorer = tmp_path / "scorer"
    save_wan(preference[1], scorer, config=dataclasses.replace(CONFIGS["tiny"], scores=True))
    for loss in ("preference", "dpo"):
        message = main_fails(world, tmp_path, "--loss", loss, "--init", str(scorer))
        assert "scores is True, expected False" in message
    message = spo_fails(world, tmp_path, "--init", str(scorer), "--score", str(scorer))
    assert "--init" in message and "preference model" in message
