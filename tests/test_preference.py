"""The preference model: what it scores, how train.py trains it, and that it is found again."""
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from data import write_sample
from model import CONFIGS, ScoreHead
from weights import load_wan, open_wan, save_wan
from conftest import SHAPE, run, spo_fails


def test_the_score_head_reads_the_end_of_every_quarter_of_the_blocks():
    for layers, taps in ((4, [0, 1, 2, 3]), (30, [7, 14, 22, 29]), (40, [9, 19, 29, 39]), (1, [0]), (3, [0, 1, 2])):
        assert ScoreHead(SimpleNamespace(num_layers=layers, dim=8)).taps == taps


def test_a_preference_model_scores_each_video_by_itself_at_its_sigma_under_its_caption(spo_world):  # noqa: F811
    model = load_wan(spo_world / "scorer")
    g = torch.Generator().manual_seed(0)
    x, context, timestep = torch.randn(3, *SHAPE, generator=g), torch.randn(3, 4, 32, generator=g), torch.tensor([100.0, 500.0, 900.0])
    scores = model(x, timestep, context)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    for i in range(3):
        assert torch.allclose(model(x[i:i + 1], timestep[i:i + 1], context[i:i + 1]), scores[i:i + 1], atol=1e-5)
    for other in ((x.flip(0), timestep, context), (x, timestep.flip(0), context), (x, timestep, context.flip(0))):
        assert (model(*other)[0] - scores[0]).abs() > 1e-3                     # all three matter


def test_a_preference_model_is_found_again_by_load_and_never_taken_for_a_policy(spo_world, tmp_path):  # noqa: F811
    scorer = spo_world / "scorer"
    model = load_wan(scorer)
    assert model.config.scores and isinstance(model.head, ScoreHead)
    save_wan(model, tmp_path / "one.safetensors", format="comfyui")
    for path in (scorer, tmp_path / "one.safetensors"):
        again = load_wan(path)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert json.loads((scorer / "config.json").read_text())["scores"] is True
    assert "scores" not in json.loads((spo_world / "base" / "config.json").read_text())                           # a file of velocities is as it always was
    with pytest.raises(ValueError, match="scores is True, expected False"):
        open_wan(scorer, load_wan(spo_world / "base").config)
    with pytest.raises(ValueError, match="diffusers has no preference model"):
        save_wan(model, tmp_path / "d", format="diffusers")
    assert not (tmp_path / "d").exists()


PREFERENCE = ("--loss", "preference", "--learning_rate", "1e-3", "--max_grad_norm", "1e9", "--ema_decay", "0.5")


@pytest.fixture(scope="session")
def preference(world, tmp_path_factory):              # noqa: F811
    return run(world, tmp_path_factory.mktemp("preference") / "out", *PREFERENCE)


def test_preference_training_starts_at_log_2_and_leaves_the_blocks_of_the_base_alone(world, preference):      # noqa: F811
    rows, weights, base = preference
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6) and rows[0]["accuracy"] == 0.5 and rows[0]["margin_abs"] == 0
    assert rows[-1]["margin_abs"] > 0 and set(rows[0]["by_sigma"]) == {"margin", "accuracy"} and all(len(v) == 4 for v in rows[0]["by_sigma"].values())
    assert "err_win" not in rows[0] and "win_gap" not in rows[0]               # there are no errors, and no reference
    base = load_file(base)
    trunk = {name for name in base if not name.startswith("head.")}
    assert trunk == {name for name in weights if not name.startswith("head.")} and all(torch.equal(weights[name], base[name]) for name in trunk)
    assert {name for name in weights if name.startswith("head.")} == {"head.head", *(f"head.hidden.{i}.{p}" for i in range(4) for p in ("weight", "bias")), "head.mix.weight", "head.mix.bias"}
    assert weights["head.head"].abs().max() > 0


@pytest.mark.parametrize("ranks, flags", [(2, ("--grad_accum", "2")), (1, ("--backward", "sequential")), pytest.param(4, ("--backward", "pair", "--cp_size", "2"), marks=pytest.mark.slow), ("resume", ())])
def test_preference_training_is_one_curve_however_it_is_cut(world, preference, tmp_path, ranks, flags):       # noqa: F811
    if ranks == "resume":
        run(world, tmp_path / "out", *PREFERENCE, "--steps", "3", ranks=2)
        got = run(world, tmp_path / "out", *PREFERENCE, "--resume", "latest")
    else:
        got = run(world, tmp_path / "out", *PREFERENCE, *flags, ranks=ranks)
    for a, b in zip(got[0], preference[0], strict=True):
        for name in ("loss", "margin", "margin_abs", "score_win", "score_lose", "grad_norm", "c_win", "c_lose"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-6), (a["step"], name)
    for name, value in preference[1].items():
        assert torch.allclose(got[1][name], value, rtol=1e-3, atol=2e-5), name


def test_a_preference_model_learns_to_tell_clips_at_low_noise_and_not_at_pure_noise(world, tmp_path):         # noqa: F811
    """Winners are twice as loud. At sigma 0 to 0.25 that is plain to see; near 1 nothing is left of it."""
    for i in range(40):
        g = torch.Generator().manual_seed(i)
        for kind, scale in (("real", 1.0), ("negatives", 0.5)):
            write_sample(tmp_path / "data" / kind / f"{i:03d}.safetensors", scale * torch.randn(SHAPE, generator=g), torch.zeros(2, 32), {})
    rows, _, _ = run(world, tmp_path / "out", *PREFERENCE, "--learning_rate", "1e-2", "--data", str(tmp_path / "data"), "--steps", "25", "--save_every", "100")
    low = [row["by_sigma"]["accuracy"][0] for row in rows[-8:] if row["by_sigma"]["accuracy"][0] is not None]
    assert sum(low) / len(low) > 0.95
    model, right = load_wan(tmp_path / "out" / "export"), []
    for sigma in (0.1, 0.999):
        g = torch.Generator().manual_seed(1000)                                # clips that it never saw
        clips, noise = torch.randn(64, *SHAPE, generator=g), torch.randn(32, *SHAPE, generator=g)
        clips[32:] *= 0.5
        with torch.no_grad():
            win, lose = model((1 - sigma) * clips + sigma * noise.repeat(2, 1, 1, 1, 1), torch.full((64,), 1000 * sigma), torch.zeros(64, 2, 32)).chunk(2)
        right.append((win > lose).float().mean().item())
    assert right[0] > 0.95 and 0.2 < right[1] < 0.8


def test_a_preference_model_as_the_base_of_a_run_is_refused(preference, world, tmp_path):                     # noqa: F811
    save_wan(preference[1], tmp_path / "scorer", config=dataclasses.replace(CONFIGS["tiny"], scores=True))
    for loss in ("preference", "dpo"):
        with pytest.raises(ValueError, match="scores is True, expected False"):
            train.main(train.parse_args(["--loss", loss, "--init", str(tmp_path / "scorer"), "--data", str(world / "data"), "--out", str(tmp_path / "out"), "--batch_size", "4"]))
        torch.distributed.destroy_process_group()
    message = spo_fails(world, tmp_path, "--init", str(tmp_path / "scorer"), "--score", str(tmp_path / "scorer"))
    assert "--init" in message and "preference model" in message
