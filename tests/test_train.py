"""One curve, however it is cut; the objective of train.py against plain autograd; bad input."""
import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import experts
import samples
import train
from conftest import SHAPE, main_fails, one_step, pair_loss, run, same_run, textbook_error, train_main
from data import draw, open_data, order
from samples import read_sample, write_sample
from memory import memory_plan
from model import CONFIGS, WanModel
from weights import load_wan, save_wan

PAIR_LOSSES = [loss for loss in train.OBJECTIVES if loss != "sft"]


@pytest.fixture(scope="session")
def one_rank(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("one") / "out")


def test_the_curve_moves_and_starts_at_log_2(one_rank):
    rows = one_rank[0]
    assert rows[0]["loss_dpo"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows[0]["margin_abs"] == 0 and rows[0]["accuracy"] == 0.5 and rows[0]["accuracy_strict"] == 0
    assert rows[0]["dgr"] == 15 and rows[0]["c_win"] == 30 and rows[0]["c_lose"] == 15             # r = dgr, beta 30
    assert rows[-1]["margin_abs"] > 0.1


@pytest.mark.parametrize("ranks, flags", [
    (2, ()), (1, ("--grad_accum", "2")), (1, ("--backward", "sequential")), (2, ("--backward", "pair")),
    pytest.param(4, ("--backward", "pair", "--grad_accum", "2"), marks=pytest.mark.slow),
    (1, ("--checkpointing", "full", "--chunk_tokens", "7")), (2, ("--checkpointing", "selective")),
    pytest.param(2, ("--ref", "offload"), marks=pytest.mark.slow)])
def test_one_curve_however_it_is_cut(world, one_rank, tmp_path, ranks, flags):
    same_run(run(world, tmp_path / "out", *flags, ranks=ranks), one_rank)


@pytest.mark.parametrize("before, after", [(1, 1), (1, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_a_run_resumed_on_another_number_of_ranks_is_the_same_run(world, one_rank, tmp_path, before, after):
    run(world, tmp_path / "out", "--steps", "3", ranks=before)
    resumed = run(world, tmp_path / "out", "--resume", "latest", ranks=after)
    same_run(resumed, one_rank)
    if before == after == 1:   # and to the last bit on the same number
        strip = lambda row: {k: v for k, v in row.items() if k not in ("seconds", "memory_gib", "tokens_per_second")}
        assert [strip(row) for row in resumed[0]] == [strip(row) for row in one_rank[0]]
        assert all(torch.equal(resumed[1][name], one_rank[1][name]) for name in one_rank[1])


@pytest.mark.slow
def test_resuming_from_an_older_step_rewrites_the_log_from_there(world, one_rank, tmp_path):
    run(world, tmp_path / "out", "--keep", "1", "--steps", "3")
    run(world, tmp_path / "out", "--keep", "3", "--resume", "latest")
    with open(tmp_path / "out" / "log.jsonl", "a") as log:
        log.write('{"step": 6, "by_sigma": {"err_win": [1]}')   # a kill in the middle of a row, after a bracket
    run(world, tmp_path / "out", "--resume", str(tmp_path / "out" / "step_000003"), "--steps", "4", "--keep", "1")
    # the new one is not pruned for being lower than step_000006
    assert (tmp_path / "out" / "latest").read_text() == "step_000004\n"
    assert sorted(p.name for p in (tmp_path / "out").glob("step_*")) == ["step_000004", "step_000006"]
    same_run(run(world, tmp_path / "out", "--resume", "latest"), one_rank)


@pytest.mark.slow
def test_sft_with_ema_and_dropped_captions_is_one_curve_too(world, tmp_path):
    flags = ("--loss", "sft", "--ema_decay", "0.9", "--caption_dropout", "0.3", "--decay_steps", "3")
    alone = run(world, tmp_path / "a", *flags)
    same_run(run(world, tmp_path / "b", *flags, "--grad_accum", "2", ranks=2), alone)
    plain = run(world, tmp_path / "c", "--loss", "sft", "--decay_steps", "3")
    assert alone[0][0]["loss"] != plain[0][0]["loss"]   # dropped captions are seen
    assert any(not torch.equal(alone[1][name], plain[1][name]) for name in plain[1])


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_branch_by_branch_gradients_equal_those_of_the_loss_written_down_plainly(world, loss):
    """backward_batch against the textbook: four errors, the loss of the batch, one backward; no coefficients."""
    args = train.parse_args(["--loss", loss, "--min_timestep", "300"])
    dataset = open_data(world / "data", pairs=True)
    torch.manual_seed(1)
    policy, ref = (WanModel(CONFIGS["tiny"]).double() for _ in range(2))
    for model in (policy, ref):
        torch.nn.init.normal_(model.head.head.weight, std=0.05)
    ref.requires_grad_(False)
    batch = {name: value.double() if torch.is_tensor(value) else value
             for name, value in train.read_batch(args, dataset, range(4), "cpu").items()}
    args.beta = 20.0   # two random models are far apart; 1000 would saturate

    win, v_win, t_win = textbook_error(policy, batch, "win")
    lose, v_lose, t_lose = textbook_error(policy, batch, "lose")
    ref_win, ref_lose = (textbook_error(ref, batch, side)[0] for side in ("win", "lose"))
    plain, _ = pair_loss(args, win, lose, ref_win, ref_lose, batch["sigma"], (v_win, t_win, v_lose, t_lose))
    expected = torch.autograd.grad(plain.sum(), list(policy.parameters()))
    assert max(g.abs().max() for g in expected) > 1e-3
    for how in ("joint", "sequential"):
        args.backward = how
        policy.zero_grad()
        metrics = train.backward_batch(args, policy, ref, batch, 1.0, None)
        assert torch.allclose(metrics["loss"], plain, rtol=1e-10)
        for got, want in zip((p.grad for p in policy.parameters()), expected):
            assert (got - want).norm() <= 1e-9 * want.norm() + 1e-13, how


@pytest.mark.slow
def test_dpo_cm_divides_by_the_pairs_it_keeps_over_all_ranks(world, tmp_path):
    flags = ("--loss", "dpo_cm", "--threshold", "0.93", "--max_grad_norm", "1e9")
    alone = run(world, tmp_path / "a", *flags)
    assert 0 < alone[0][0]["kept"] < 1
    # a mean over kept pairs, whose weights are 0.93 to 1
    assert alone[0][0]["loss"] == pytest.approx(math.log(2) * 1.0, rel=0.08)
    same_run(run(world, tmp_path / "b", *flags, "--grad_accum", "2", ranks=2), alone)


def test_the_log_has_every_key_that_others_read(one_rank):
    rows = one_rank[0]
    keys = ("step loss loss_dpo loss_sft margin accuracy win_gap lose_gap err_win err_lose ref_err_win ref_err_lose "
            "dgr c_win c_lose reward_win reward_lose grad_norm lr seconds memory_gib tokens_per_second r").split()
    assert not [key for key in keys if key not in rows[0]]
    assert rows[0]["margin_min"] == rows[0]["margin_max"] == 0
    assert rows[-1]["margin_min"] < rows[-1]["margin"] < rows[-1]["margin_max"]
    by_sigma = rows[1]["by_sigma"]
    assert set(by_sigma) == {"err_win", "win_gap", "lose_gap", "margin", "accuracy"}
    assert all(len(v) == 4 for v in by_sigma.values())


def test_the_log_says_which_folder_of_negatives_the_pairs_came_from(world, one_rank, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    (tmp_path / "data" / "negatives_b").mkdir()
    for path in sorted((tmp_path / "data" / "negatives").iterdir())[:12]:
        shutil.copy(path, tmp_path / "data" / "negatives_b")
    rows = run(world, tmp_path / "out", "--data", str(tmp_path / "data"), "--steps", "3", ranks=2)[0]
    sources = [row["sources"] for row in rows]
    assert all(sum(of_step.values()) == 8 for of_step in sources)   # 24 + 12 pairs, of which three steps see 24
    assert 4 < sum(of_step.get("negatives_b", 0) for of_step in sources) <= 12
    assert "sources" not in one_rank[0][0]   # one folder: nothing to say


def test_the_logged_errors_are_those_of_the_pairs_of_that_step(world, one_rank):
    """Worked out from the data alone, without the trainer: which pairs, which sigma, which noise, what error."""
    dataset = open_data(world / "data", pairs=True)
    model, errors, bins = load_wan(world / "base"), [], [[] for _ in range(4)]
    for position in range(8):
        item = dataset[order(0, position, 24)]
        sigma, noise = draw(0, position, SHAPE, 3.0, 0, 1000)
        batch = {"win": item["win"][None], "noise": noise[None], "sigma": torch.tensor([sigma]),
                 "context": item["context"][None]}
        with torch.no_grad():
            errors.append(textbook_error(model, batch, "win")[0].item())
        bins[min(3, int(sigma * 4))].append(errors[-1])
    row = one_rank[0][0]
    assert row["err_win"] == pytest.approx(sum(errors) / 8, rel=1e-5)
    for got, want in zip(row["by_sigma"]["err_win"], bins):
        assert got is None if not want else got == pytest.approx(sum(want) / len(want), rel=1e-5)


def test_an_r_that_is_not_a_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--r", "much"])
    assert "--r: 'much': expected 'dgr' or a number" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (("--loss", "dpo", "--r", "50"), ["--r 50", "--loss dpo", "regdpo"]),
    (("--loss", "regdpo", "--clip", "0.2"), ["--clip", "dpo_cm or sdpo"]),
    (("--batch_size", "5", "--grad_accum", "2"), ["--batch_size 5", "1 data ranks x --grad_accum 2"]),
    (("--data", "nowhere"), ["nowhere", "no such folder"]),
    (("--init", "nowhere"), ["--init nowhere"]),
    (("--init", "scratch"), ["--init scratch", "--loss sft"]),
    (("--resume", "latest"), ["--resume latest", "no checkpoint"]),
    (("--resume", "step_000007"), ["step_000007", "no whole checkpoint"]),
    (("--model", "wan2.1-t2v-1.3b"), ["--model wan2.1-t2v-1.3b --init", "dim is 128", "1536"]),
    (("--backward", "pair"), ["--backward pair", "even number"]),
    (("--beta", "-1"), ["beta is -1"]),
    (("--min_timestep", "900", "--max_timestep", "100"), ["--min_timestep 900"]),
    (("--steps", "0"), ["--steps 0"]),
    (("--beta", "0"), ["beta is 0"]),
    (("--r", "50", "--r_scale", "2"), ["r=50.0 is fixed", "r_scale=2.0"]),
    (("--loss", "dpo_cm", "--threshold", "3"), ["threshold is 3"]),
    (("--loss", "diffusion_sdpo", "--mu", "2"), ["mu is 2"]),
    (("--max_grad_norm", "0"), ["--max_grad_norm 0"]),
    (("--ema_decay", "1.5"), ["--ema_decay 1.5"]),
    (("--eval_clips", "5"), ["--eval_clips 5", "at least 64"]),
    (("--loss", "sft", "--backward", "sequential"), ["--backward sequential"]),
    (("--caption_dropout", "0.1"), ["--caption_dropout", "--loss sft"]),
])
def test_bad_flags_are_refused_with_the_flag_and_what_to_do(world, tmp_path, flags, words):
    message = main_fails(world, tmp_path, *flags)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()   # nothing was written that a corrected command would trip over


def test_a_checkpoint_of_another_size_is_refused_before_anything_is_loaded(world, tmp_path):
    save_wan(WanModel(dataclasses.replace(CONFIGS["tiny"], num_layers=2)), tmp_path / "small")
    message = main_fails(world, tmp_path, "--model", "tiny", "--init", str(tmp_path / "small"))
    assert "num_layers" in message and "2" in message and "4" in message and not (tmp_path / "out").exists()


def test_bad_data_is_named_before_training_and_nothing_is_written(world, tmp_path):
    def copy():
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(world / "data", tmp_path / "data")
        return tmp_path / "data"
    data = copy()
    sample = read_sample(data / "real" / "003.safetensors")
    write_sample(data / "real" / "003.safetensors", sample["latents"][:, :2], sample["context"], sample["metadata"])
    message = main_fails(world, tmp_path, "--data", str(data))
    assert "003.safetensors: win is (12, 2, 4, 6) but lose is (12, 3, 4, 6)" in message
    data = copy()
    (data / "negatives" / "004.safetensors").write_bytes((data / "negatives" / "004.safetensors").read_bytes()[:-100])
    assert "negatives/004.safetensors: not a whole safetensors file" in main_fails(world, tmp_path, "--data", str(data))
    data = copy()
    shutil.rmtree(data / "negatives")
    assert "make negatives with: python sample.py --pairs" in main_fails(world, tmp_path, "--data", str(data))
    assert not (tmp_path / "out").exists()


def test_a_nan_in_a_sample_names_its_file_and_keeps_the_checkpoint(world, tmp_path, monkeypatch):
    position, read_sample = order(0, 8, 24), samples.read_sample                   # read in step 1, not in step 0
    path = open_data(world / "data", pairs=True).pairs[position][0]

    def damaged(file):
        if Path(file) == path and (tmp_path / "out" / "latest").exists():       # it goes bad in the course of the run
            bad = load_file(path)
            bad["latents"][0, 0, 0, 0] = float("nan")
            samples.check_tensors(file, bad)
        return read_sample(file)

    monkeypatch.setattr(samples, "read_sample", damaged)
    flags = ("--batch_size", "8", "--steps", "2", "--save_every", "1", "--probe_every", "0")
    with pytest.raises(ValueError, match=path.name + ".*latents has 1 of .* NaN"):
        train_main(one_step(world, tmp_path / "out", *flags))
    torch.distributed.destroy_process_group()
    assert (tmp_path / "out" / "latest").read_text() == "step_000001\n"


def test_a_run_is_not_overwritten_without_being_asked(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 0}\n')
    message = main_fails(world, tmp_path)
    assert "already holds a run" in message and "delete it" in message
    assert (tmp_path / "out" / "log.jsonl").read_text() == '{"step": 0}\n'


def test_resuming_with_other_numbers_is_refused_and_leaves_the_run_alone(world, tmp_path):
    run(world, tmp_path / "out", "--steps", "3")
    before = (tmp_path / "out" / "log.jsonl").read_text()
    message = main_fails(world, tmp_path, "--batch_size", "8", "--steps", "6", "--warmup_steps", "2",
                         "--max_grad_norm", "0.3", "--min_timestep", "0", "--ema_decay", "0", "--learning_rate", "5e-4",
                         "--resume", "latest")
    assert "learning_rate = 0.0002" in message and "learning_rate = 0.0005" in message
    assert (tmp_path / "out" / "log.jsonl").read_text() == before


def test_an_unknown_preset_or_flag_names_the_choices(capsys):
    for argv, word in ((["--model", "wan9"], "wan2.1-t2v-14b"), (["--loss", "regpdo"], "regdpo"),
                       (["--betta", "3"], "--betta"), (["--batch", "3"], "--batch")):
        with pytest.raises(SystemExit):
            train.parse_args(argv)
        assert word in capsys.readouterr().err


def test_rounding_of_the_errors_does_not_stop_a_run_whatever_beta_makes_of_it(world, tmp_path, monkeypatch):
    backward = train.backward_batch

    def rounded(args, policy, ref, *rest):
        # of errors about 1: some of float32's last bits
        return backward(args, policy, ref + 4e-7 * torch.tensor([[1.0], [-1.0]]), *rest)

    monkeypatch.setattr(train, "backward_batch", rounded)
    train_main(one_step(world, tmp_path / "out", "--ref", "cached", "--beta", "30000"))
    row = json.loads((tmp_path / "out" / "log.jsonl").read_text())
    assert row["margin_abs"] == pytest.approx(0.024, rel=0.2)


def test_a_reference_that_is_not_the_policy_stops_the_run_at_step_0(world, tmp_path, monkeypatch):
    build = experts.build_model

    def spoiled(path, config, ranks, memory, trained, *rest):
        model = build(path, config, ranks, memory, trained, *rest)
        if trained:                                        # the policy
            with torch.no_grad():
                model.head.head.bias.to_local().add_(0.05)
        return model

    monkeypatch.setattr(experts, "build_model", spoiled)
    with pytest.raises(RuntimeError, match="same numerical path"):
        train_main(one_step(world, tmp_path / "out", "--checkpointing", "selective"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("flags, at_once, needs_ref", [
    ("--loss dpo", 4, True), ("--loss dpo --grad_accum 2", 2, True), ("--loss sft", 2, False),
    ("--loss dpo --backward sequential --ref cached", 2, True), ("--loss preference", 0, False)])
def test_a_run_says_what_it_will_hold_and_leaves_signals_as_they_were(
        world, base, tmp_path, capsys, flags, at_once, needs_ref):
    """at_once: videos whose graph is alive at once."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    argv = one_step(world, tmp_path / "out", "--init", str(base), "--batch_size", "2", *flags.split())
    train_main(argv)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    said = capsys.readouterr().out
    args, model = train.parse_args(argv), load_wan(tmp_path / "out" / "export")
    if args.loss == "preference":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    ranks = SimpleNamespace(mesh=SimpleNamespace(shape=(1,)), device=torch.device("cpu"), cp_size=1)
    assert memory_plan(args, model, 18, at_once, needs_ref, ranks) in said
    assert ("audit: how often" in said) == (args.loss != "sft")
    [row] = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    videos = 2 if args.loss == "sft" else 4
    assert row["tokens_per_second"] * row["seconds"] == pytest.approx(videos * 18, rel=1e-4)


def margin_apart(monkeypatch, offset):
    """From now on the reference's errors are wrong by this much, with opposite signs for winner and loser."""
    errors = train.reference_errors
    apart = offset * torch.tensor([[1.0], [-1.0]])
    monkeypatch.setattr(train, "reference_errors", lambda *arguments: errors(*arguments) + apart)


@pytest.mark.parametrize("flags, margin, in_bf16, is_refused", [
    ("--loss dpo --beta 500", 4e-4, False, False), ("--loss dpo --beta 500", 7e-4, False, True),
    ("--loss ipo", 8e-6, False, True), ("--loss dpo --beta 500", 0.05, True, False),
    ("--loss dpo --beta 500", 0.15, True, True), ("--loss ipo", 0.05, True, False)])
def test_the_first_margin_that_stops_a_run_is_beta_times_rounding_and_in_bf16_a_tenth(
        world, base, tmp_path, monkeypatch, flags, margin, in_bf16, is_refused):
    if in_bf16:
        monkeypatch.setattr(train, "matrix_dtype", lambda device_type: torch.bfloat16)
    margin_apart(monkeypatch, margin / 2 / (500 if "dpo" in flags else 1))
    argv = one_step(world, tmp_path / "out", "--init", str(base), *flags.split())
    if is_refused:
        with pytest.raises(RuntimeError, match="do not take the same numerical path"):
            train_main(argv)
        torch.distributed.destroy_process_group()
    else:
        train_main(argv)
        row = json.loads((tmp_path / "out" / "log.jsonl").read_text())
        assert row["margin_abs"] == pytest.approx(margin, rel=0.3)
