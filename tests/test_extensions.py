"""
Extensions in the documented places alone: an objective (a row of train.OBJECTIVES), a dataset without files (an
argument of train.main). A solver is a row of sample.SOLVERS: test_sample.py.
"""
import json
import math

import pytest
import torch

import train
from conftest import SHAPE, four_steps, main_fails
from train import BETA, Flag, Objective


def rows_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------------
# an objective

def hinge_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta, width):
    """max(0, width - margin): pulls until the margin is `width`."""
    margin = -beta * ((err_win - ref_err_win) - (err_lose - ref_err_lose))
    losses = torch.relu(width - margin)
    metrics = {"margin": margin, "accuracy": (1 + margin.sign()) / 2, "win_gap": err_win - ref_err_win,
               "lose_gap": err_lose - ref_err_lose, "is_inside": (margin < width).float()}
    return losses, {name: value.detach() for name, value in metrics.items()}


@pytest.fixture
def hinge(monkeypatch):
    monkeypatch.setitem(train.OBJECTIVES, "hinge", Objective(
        lambda args, pair: hinge_loss(*pair[:4], args.beta, args.width),
        (BETA, Flag("width", 2.0, "margin from which a pair no longer pulls"))))


@pytest.mark.parametrize("backward", ["joint", "sequential"])
def test_a_row_of_objectives_is_all_that_a_new_objective_needs(world, base, tmp_path, hinge, backward):
    out = tmp_path / "out"
    flags = f"--loss hinge --beta 25 --width 1.5 --steps 2 --backward {backward}"
    train.main(train.parse_args(four_steps(world, base, out, flags)))
    first, second = rows_of(out)
    # at margin 0 every pair is inside: c_win = c_lose = beta, brought to 1 by the scale 1 / beta
    assert first["loss"] == 1.5 and first["is_inside"] == 1
    assert first["c_win"] == pytest.approx(25) and first["c_lose"] == pytest.approx(25)
    assert second["margin_abs"] > 0 and second["loss"] != 1.5
    assert second["loss"] == pytest.approx(1.5 - second["margin"], rel=1e-4) or second["is_inside"] < 1
    config = json.loads((out / "config.json").read_text())
    assert config["width"] == 1.5 and config["loss_scale"] == 1 / 25
    assert (out / "export" / "diffusion_pytorch_model.safetensors").exists()


def test_the_flag_of_a_new_objective_is_its_own_and_decides_a_run(world, base, tmp_path, hinge, capsys):
    assert "--width 3.0 does nothing in --loss dpo; it belongs to --loss hinge" in main_fails(
        world, tmp_path, "--loss", "dpo", "--width", "3")
    assert "--tau 9.0 does nothing in --loss hinge; it belongs to --loss ipo" in main_fails(
        world, tmp_path, "--loss", "hinge", "--tau", "9")
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    assert "margin from which a pair no longer pulls (--loss hinge)" in " ".join(capsys.readouterr().out.split())
    out = tmp_path / "out"
    train.main(train.parse_args(four_steps(world, base, out, "--loss hinge --steps 2")))
    with pytest.raises(ValueError, match="trained with width = 2.0, this run has width = 1.0"):
        train.main(train.parse_args(four_steps(world, base, out, "--loss hinge --width 1 --resume latest")))
    torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------------
# a dataset

class Drawn:
    """Ten pairs, drawn on request, with two kinds of losers."""
    sources = ("blurred", "shaken")

    def __init__(self, version):
        self.version, self.asked = version, []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.asked.append(index)
        generator = torch.Generator().manual_seed(index)
        win, lose = torch.randn(2, *SHAPE, generator=generator)
        context, source = torch.randn(3, 32, generator=generator), self.sources[index % 2]
        return {"win": win, "lose": lose, "context": context, "name": f"pair {index}", "source": source}

    def fingerprint(self):
        return f"version {self.version}"


def test_an_object_with_items_sources_and_a_fingerprint_is_a_dataset(world, base, tmp_path):
    out, dataset = tmp_path / "out", Drawn(1)
    flags = ["--init", str(base), "--out", str(out), "--batch_size", "5", "--steps", "2", "--loss", "dpo"]
    train.main(train.parse_args(flags), dataset=dataset)
    rows = rows_of(out)
    assert rows[0]["loss"] == pytest.approx(math.log(2)) and rows[1]["margin_abs"] > 0
    total = {name: sum(row["sources"].get(name, 0) for row in rows) for name in Drawn.sources}
    assert total == {"blurred": 5, "shaken": 5} and set(dataset.asked) == set(range(10))     # one epoch
    train.main(train.parse_args([*flags, "--steps", "3", "--resume", "latest"]), dataset=Drawn(1))
    assert len(rows_of(out)) == 3
    with pytest.raises(ValueError, match="trained with data = 10 items, version 1, this run has .* version 2"):
        train.main(train.parse_args([*flags, "--steps", "4", "--resume", "latest"]), dataset=Drawn(2))
    torch.distributed.destroy_process_group()
