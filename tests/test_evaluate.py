"""
The probe: fixed pairs, noise and sigmas, whatever the run; what is held back for it. The audit: it finds what was
planted and nothing else.
"""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import run

import train
from data import open_data, write_sample
from fsdp_utils import start_ranks
from evaluate import Probe, audit, audit_report, auc, best_threshold, hold_back, sigma_steps, statistics

SHAPE = (2, 3, 8, 8)


@pytest.fixture
def ranks():
    yield start_ranks()
    torch.distributed.destroy_process_group()


def make_pairs(folder, count, change=lambda win: win, names=("negatives",)):
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        write_sample(
            folder / "real" / f"{i:03d}.safetensors",
            torch.randn(SHAPE, generator=g),
            torch.zeros(1, 4),
            {"prompt": "a"},
        )
        for name in names:
            write_sample(
                folder / name / f"{i:03d}.safetensors",
                change(torch.randn(SHAPE, generator=g)),
                torch.zeros(1, 4),
                {"prompt": "a"},
            )
    return open_data(folder, pairs=True)


# ------------------------------------------------------------------------------------------------------------------
# pairs that are never trained on

def test_what_is_held_back_shares_no_file_with_what_is_left_and_takes_all_losers_of_a_win(tmp_path):
    dataset = make_pairs(tmp_path, 12, names=("negatives", "negatives_2"))
    left, held = hold_back(dataset, 3)
    files = [{path for pair in part.pairs for path in pair} for part in (left, held)]
    assert len(held) == 6 and len(left) == 18 and not files[0] & files[1] and len(held.wins) == 3
    again = open_data(tmp_path, pairs=True)
    assert hold_back(again, 3)[1].pairs == held.pairs and set(hold_back(again, 4)[1].pairs) > set(held.pairs)
    with pytest.raises(ValueError, match="--hold_back 12.*12 different wins in 24 pairs"):
        hold_back(dataset, 12)
    held.pairs[0][1].write_bytes(b"cut off")
    # what is known to be bad is not looked at
    left, held = hold_back(open_data(tmp_path, pairs=True, skip=True), 3)
    assert len(held) == 5 and len(left) == 18 and left.skip and not held.skip


def test_a_loser_that_wins_another_pair_is_held_back_with_it(tmp_path):
    make_pairs(tmp_path, 4)
    rows = [("real/000", "real/001"), ("real/001", "real/002"), ("real/003", "negatives/003")]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(
            json.dumps({"win": f"{a}.safetensors", "lose": f"{b}.safetensors", "prompt": "a"}) + "\n" for a, b in rows
        )
    )
    dataset = open_data(tmp_path / "pairs.jsonl", pairs=True)
    for count in (1, 2):
        left, held = hold_back(dataset, count)
        assert not {path for pair in left.pairs for path in pair} & {path for pair in held.pairs for path in pair}


def test_sigmas_are_the_middles_of_equal_parts_of_the_range_trained_on():
    assert sigma_steps(600, 1000) == pytest.approx([0.65, 0.75, 0.85, 0.95])
    assert sigma_steps(0, 1000, 2) == pytest.approx([0.25, 0.75])


def test_the_probe_by_hand(tmp_path, ranks):
    # errors: of the base, the mean of the latents' squares times sigma; of the other model, wins 0.1 better and losers
    # 0.1 worse, but in the last pair the other way round
    dataset = make_pairs(tmp_path, 3)
    turned = [1.0, 1.0, -1.0]
    base, other = (SimpleNamespace(config=SimpleNamespace(scores=False), off=off) for off in (0.0, 0.1))

    def errors(model, batch):
        assert batch["noise"].shape == batch["win"].shape and batch["sigma"].shape == batch["win"].shape[:1]
        turns = torch.tensor(
            [turned[next(i for i in range(3) if torch.equal(dataset[i]["win"], win))] for win in batch["win"]]
        )
        return torch.stack(
            [
                batch[name].square().mean(dim=(1, 2, 3, 4)) * batch["sigma"] + sign * model.off * turns
                for name, sign in (("win", -1), ("lose", 1))
            ]
        )

    probe = Probe(dataset, errors, base, [0.2, 0.8], ranks, batch_size=2)
    ref = [sum(dataset[i]["win"].square().mean().item() for i in range(3)) / 3 * sigma for sigma in (0.2, 0.8)]
    found = probe(base, beta=10)
    assert (
        found["ref_err_win"] == pytest.approx(ref)
        and found["accuracy"] == [0.5, 0.5]
        and found["margin"] == pytest.approx([0, 0])
    )
    found = probe(other, beta=10)
    assert found["pairs"] == 3 and found["sigma"] == [0.2, 0.8] and found["ref_err_win"] == pytest.approx(ref)
    assert found["accuracy"] == pytest.approx([2 / 3] * 2)
    assert found["win_gap"] == pytest.approx([-0.1 / 3] * 2) and found["lose_gap"] == pytest.approx([0.1 / 3] * 2)
    assert found["margin"] == pytest.approx([10 * 0.2 / 3] * 2) and found["err_win"] == pytest.approx(
        [value - 0.1 / 3 for value in ref]
    )


def test_scores_of_a_preference_model_have_an_accuracy_and_no_reference(tmp_path, ranks):
    dataset = make_pairs(tmp_path, 3)
    model = SimpleNamespace(config=SimpleNamespace(scores=True))
    score = lambda model, batch: torch.stack([batch[name].mean(dim=(1, 2, 3, 4)) for name in ("win", "lose")])
    found = Probe(dataset, score, model, [0.5], ranks, 8)(model, beta=1.0)
    assert found["accuracy"] == [
        pytest.approx(sum(dataset[i]["win"].mean() > dataset[i]["lose"].mean() for i in range(3)).item() / 3)
    ]
    assert found.keys() == {"pairs", "sigma", "margin", "accuracy"}
    assert Probe(dataset, lambda model, batch: torch.zeros(2, len(batch["win"])), model, [0.5], ranks, 8)(model, 1.0)[
        "accuracy"
    ] == [0.5]  # ties count half


PROBED = ("--hold_back", "5", "--probe_every", "3", "--min_timestep", "200")


@pytest.fixture(scope="module")
def probed(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("probed") / "out", *PROBED)[0]


def same_probe(rows, theirs):
    for row, other in zip(rows, theirs):
        assert ("probe" in row) == ("probe" in other) == (row["step"] in (2, 5))
        for name, values in other.get("probe", {}).items():
            assert row["probe"][name] == pytest.approx(values, rel=1e-3, abs=1e-5), (row["step"], name)


@pytest.mark.slow
def test_the_probe_is_the_same_on_two_ranks_and_after_a_resume_and_its_pairs_cannot_change(world, probed, tmp_path):
    run(world, tmp_path / "out", *PROBED, "--steps", "3", "--backward", "pair", "--ref", "cached", ranks=2)
    # against the base, not against where it resumed
    same_probe(run(world, tmp_path / "out", *PROBED, "--resume", "latest")[0], probed)
    with pytest.raises(ValueError, match="data"):
        run(world, tmp_path / "out", *PROBED, "--steps", "9", "--resume", "latest", "--hold_back", "6")


@pytest.mark.slow
def test_the_probe_is_the_same_where_ranks_share_tokens_and_weights_wait_on_the_cpu(world, probed, tmp_path):
    same_probe(run(world, tmp_path / "out", *PROBED, "--cp_size", "2", "--offload_params", ranks=2)[0], probed)


def test_runs_of_another_loss_and_seed_are_probed_with_the_same_pairs_noise_and_sigmas(world, probed, tmp_path):
    # a step of nearly no size: what the probe says is the reference's, to the last digit the log has
    rows = run(
        world, tmp_path / "out", *PROBED, "--loss", "dpo", "--seed", "7", "--steps", "3", "--learning_rate", "1e-12"
    )[0]
    for name in ("ref_err_win", "ref_err_lose", "sigma", "pairs"):
        assert rows[2]["probe"][name] == probed[2]["probe"][name] == probed[5]["probe"][name]
    assert rows[2]["probe"]["err_win"] == pytest.approx(probed[2]["probe"]["ref_err_win"], rel=1e-5)
    # and it sees the model move
    assert probed[5]["probe"]["err_win"] != pytest.approx(probed[2]["probe"]["err_win"], rel=1e-5)


def test_holding_back_pairs_of_a_loss_without_pairs_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="--hold_back 2.*--loss sft reads none"):
        train.main(
            train.parse_args(
                ["--loss", "sft", "--hold_back", "2", "--data", str(world / "data"), "--out", str(tmp_path / "out")]
            )
        )
    torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------------
# the audit

def test_the_best_threshold_by_hand():
    # sorted 1l 2l 3w 4l 5w 6w: wins above 2 .. 3 or above 4 .. 5 is right in five of six; the first of them is taken
    assert best_threshold(torch.tensor([3.0, 5.0, 6.0]), torch.tensor([1.0, 2.0, 4.0])) == (
        pytest.approx(5 / 6),
        2.5,
        True,
    )
    # wins below it
    assert best_threshold(torch.tensor([1.0, 2.0]), torch.tensor([8.0, 9.0])) == (1.0, 5.0, False)
    # equal numbers are not told apart by their order
    assert best_threshold(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))[0] == 0.5


def test_auc_by_hand():
    # three of four pairs, and a tie
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == pytest.approx(3.5 / 4)


def test_statistics_by_hand():
    x = torch.zeros(1, 1, 2, 2, 2)
    # the second frame: grain 2 along W, and 1 or 3 away from the first
    x[0, 0, 1] = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    found = {name: value.item() for name, value in statistics(x).items() if name.endswith("channel 0")}
    assert (
        found["mean, channel 0"] == 1
        and found["grain, channel 0"] == pytest.approx(2)
        and found["flicker, channel 0"] == pytest.approx(5)
    )
    assert found["grain in flat parts, channel 0"] == 0 and found["flicker in flat parts, channel 0"] == 1
    assert "flicker, channel 0" not in statistics(torch.zeros(1, 1, 1, 2, 2))


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda x: x + 0.5, "mean"),
        (lambda x: torch.cat([x[:1], 1.3 * x[1:]]), "channel 1"),
        (lambda x: x[:, :1].expand_as(x), "flicker"),
        (lambda x: x + 0.02 * x.flip(-1), "grain in flat parts"),
    ],
)
def test_the_audit_names_a_difference_that_was_planted(change, name):
    g = torch.Generator().manual_seed(0)
    half = torch.tensor([1.0] * 4 + [0.0] * 4) if "flat" in name else 1.0  # a picture whose right half is flat
    pairs = [
        (half * torch.randn(2, 4, 8, 8, generator=g), change(half * torch.randn(2, 4, 8, 8, generator=g)))
        for _ in range(64)
    ]
    clean, noisy = audit(pairs, [0.0, 0.97])
    assert clean["accuracy"] > 0.9 and name in clean["statistic"] and abs(clean["auc"] - 0.5) > 0.45
    assert noisy["accuracy"] < 0.7                                             # noise hides it


def test_the_audit_finds_nothing_where_nothing_is_although_it_looks_at_many_numbers():
    g = torch.Generator().manual_seed(1)
    assert all(
        row["accuracy"] < 0.65
        for row in audit([torch.randn(2, 6, 3, 8, 8, generator=g).unbind() for _ in range(128)], [0.0, 0.5])
    )


def test_the_report_warns_at_the_noise_that_is_trained_on_only(tmp_path):
    dataset = make_pairs(tmp_path, 40, change=lambda x: 1.5 * x)
    assert "WARNING: at the lowest noise trained on (sigma 0)" in audit_report(
        dataset, 0.0
    ) and "--min_timestep" in audit_report(dataset, 0.0)
    assert "WARNING" not in audit_report(dataset, 0.9)


def test_the_report_counts_pairs_of_equal_clips_and_says_when_there_are_too_few(tmp_path):
    for i in range(3):
        for name in ("real", "negatives"):
            write_sample(
                tmp_path / name / f"{i}.safetensors",
                torch.full(SHAPE, float(i)) + (i == 2) * (name == "real"),
                torch.zeros(1, 4),
                {},
            )
    report = audit_report(open_data(tmp_path, pairs=True), 0.0)
    assert "WARNING: win and lose are the same in 2 of 3 pairs" in report and "no audit of 3 pairs" in report
