"""Verdicts on made-up curves: each rule fires on its own kind of trouble and on no healthy run; the command line."""
import json

import pytest

import curves
from curves import Watch

HEALTHY = {"loss": 57.0, "loss_dpo": 0.6, "accuracy": 0.7, "margin": 1.0, "saturated": 0.1,
           "win_gap": -0.002, "lose_gap": 0.006, "err_win": 0.198, "err_lose": 0.216,
           "ref_err_win": 0.2, "ref_err_lose": 0.21, "win_ratio": 0.99, "lose_ratio": 1.03, "dgr": 420.0,
           "grad_norm": 0.3, "skipped": 0}
START = HEALTHY | {"loss_dpo": 0.693, "accuracy": 0.5, "margin": 0.0, "saturated": 0.0, "win_gap": 0.0, "lose_gap": 0.0,
                   "err_win": 0.2, "err_lose": 0.21, "win_ratio": 1.0, "lose_ratio": 1.0, "dgr": 500.0}


def told(change, steps=200, every=1, start=START):
    """
    Verdicts, {rule: (step, text)}, on a run that goes from the start to HEALTHY | change in 60 steps and stays there.

    change: a dict, or a function of the step that returns one.
    """
    watch, verdicts = Watch(), {}
    for step in range(0, steps, every):
        end = HEALTHY | (change(step) if callable(change) else change)
        share = min(1.0, step / 60)
        row = {"step": step}
        for name, value in end.items():
            row[name] = start[name] + share * (value - start[name]) if name in start else value
        row["skipped"] = end["skipped"]
        watch(row)
        verdicts |= {name: (step, text) for name, text in row.get("verdicts", {}).items()}
    return verdicts


@pytest.mark.parametrize("every", [1, 5])   # every step, or what experiments/logs keeps
def test_no_rule_fires_on_a_healthy_run(every):
    assert told({}, every=every) == {}


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("rule, change", [
    ("runs_from_both", {"win_gap": 0.1, "lose_gap": 0.13, "win_ratio": 1.6, "err_win": 0.3}),
    ("collapsed", {"win_ratio": 8.0}),
    ("too_fast", {"win_gap": 0.4, "lose_gap": 0.4, "accuracy": 0.5, "win_ratio": 3.0}),
    ("overshoots", {"loss_dpo": 5.0, "saturated": 0.8}),
    ("saturated", {"accuracy": 1.0, "saturated": 1.0, "loss_dpo": 0.0, "margin": 30.0, "lose_gap": 0.06}),
    ("dead", {"dgr": 0.4}),
    ("reference_moved", lambda step: {"ref_err_win": 0.4 if step > 80 else 0.2}),
])
def test_each_rule_fires_on_its_kind_of_trouble_and_no_other_does(rule, change, every):
    assert list(told(change, every=every)) == [rule]


def test_the_winner_may_get_a_little_worse_and_a_gap_alone_is_no_verdict():
    assert told({"win_gap": 0.02, "lose_gap": 0.03}) == {}   # a tenth of the error: Reg-DPO on the embedded world
    assert told({"win_gap": -0.05, "lose_gap": 0.13}) == {}                    # the loser alone got worse
    assert told({"win_gap": 0.06, "lose_gap": 0.065, "accuracy": 0.5}) == {}   # accuracy does not rise


def test_pairs_of_equal_clips_are_told_at_once():
    equal = {"err_lose": 0.2, "ref_err_lose": 0.2}
    row = START | equal | {"step": 0}
    assert "same clips" in Watch()(row)[0] and list(row["verdicts"]) == ["same_pairs"]
    # equal errors of the policy by chance, not of the reference
    assert Watch()(START | {"err_lose": 0.2, "step": 0}) == []


def test_a_step_without_a_finite_gradient_is_told():
    assert list(told(lambda step: {"skipped": int(step == 70)})) == ["not_finite"]


def test_accuracy_that_is_perfect_before_errors_have_moved_means_separable_pairs():
    verdicts = told({"accuracy": 0.99, "saturated": 0.5}, start=START | {"accuracy": 0.99})
    assert list(verdicts) == ["separable"] and verdicts["separable"][0] < 20
    # learnt, with errors to show for it
    assert told({"accuracy": 0.99, "saturated": 0.5, "win_gap": -0.02, "lose_gap": 0.1},
                start=START | {"lose_gap": 0.1, "accuracy": 0.99}) == {}
    assert told(lambda step: {"accuracy": 0.99 if step > 120 else 0.6, "saturated": 0.5}) == {}   # learnt in time


def test_pairs_may_be_separable_at_low_noise_only():
    def bins(low):
        return {"by_sigma": {"accuracy": [low, None, 0.6, 0.6], "win_gap": [0.001] * 4, "lose_gap": [0.002] * 4,
                             "err_win": [0.05, None, 0.1, 0.3]}}

    assert "at sigma 0 to 0.25" in told(lambda step: bins(0.95))["separable"][1]
    assert told(lambda step: bins(0.8)) == {}
    assert told(lambda step: bins(0.95 if step % 2 else None)) == {}           # too few pairs there to say
    for holds_the_winner in ("loss_sft", "safeguard"):
        assert told(lambda step: bins(0.95) | {holds_the_winner: 0.5}) == {}


def test_a_model_that_hardly_moves_is_told_after_a_hundred_steps():
    still = {"win_gap": -1e-5, "lose_gap": 1e-5, "accuracy": 0.52, "err_win": 0.2, "dgr": 499.0, "win_ratio": 1.0,
             "lose_ratio": 1.0}
    assert told(still, steps=99) == {}
    assert list(told(still)) == ["nothing_moves"]
    # accuracy counts signs: a run with --learning_rate 1e-6
    assert list(told(still | {"accuracy": 0.66, "margin_abs": 0.12})) == ["nothing_moves"]
    assert told(still | {"margin_abs": 2.0}) == {}   # gaps of either sign that a large beta makes margins of


def probe(accuracy, ref=(0.1, 0.3)):
    return {"probe": {"sigma": [0.7, 0.9], "accuracy": [accuracy] * 2, "ref_err_win": list(ref)}}


def test_a_probe_that_stays_far_below_the_pairs_trained_on_means_learning_by_heart():
    trained = {"accuracy": 0.97, "lose_gap": 0.1}
    assert list(told(lambda step: trained | (probe(0.55) if step % 50 == 49 else {}))) == ["by_heart"]
    assert told(lambda step: trained | (probe(0.85) if step % 50 == 49 else {})) == {}


def test_a_reference_that_scores_the_probe_otherwise_than_at_first_has_moved():
    def moves_to(ref_err):
        return lambda step: probe(0.7, (0.1, 0.3 if step < 400 else ref_err)) if step % 100 == 99 else {}

    verdicts = told(moves_to(0.31), steps=700)
    assert list(verdicts) == ["reference_moved"] and verdicts["reference_moved"][0] == 499
    assert told(moves_to(0.3001), steps=700) == {}           # rounding of another number of ranks


def test_a_reference_that_is_replaced_by_the_policy_is_told_at_once():
    verdicts = told(lambda step: {"margin_abs": 0.0 if step == 90 else 2.0})
    assert list(verdicts) == ["reference_moved"] and verdicts["reference_moved"][0] == 90
    assert told(lambda step: {"margin_abs": 0.5 + step % 7}) == {}


def test_a_loss_without_pairs_has_no_verdicts():
    watch = Watch()
    assert not any(watch({"step": step, "loss": 0.2, "err_win": 0.2, "skipped": 0}) for step in range(200))


def test_a_verdict_is_given_once_also_across_a_resume():
    rows = [HEALTHY | {"step": step, "dgr": 500.0 if step == 0 else 0.1} for step in range(120)]
    watch = Watch()
    lines = [line for row in rows for line in watch(row)]
    assert len(lines) == 1 and "DEAD" in lines[0] and "step    50" in lines[0]
    again = Watch(rows[:70])
    assert [again(row) for row in rows[70:]] == [[]] * 50
    earlier = Watch(rows[:40])   # resumed from before it: told at the same step
    assert [line for row in rows[40:] for line in earlier(dict(row))] == lines


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_command_prints_verdicts_of_any_log_and_leaves_out_a_line_cut_short(tmp_path, capsys):
    write(tmp_path / "log.jsonl", [HEALTHY | {"step": step, "dgr": 500.0 if step == 0 else 0.1} for step in range(120)])
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 120, "lo')
    curves.main([str(tmp_path / "log.jsonl"), "--no_plot"])
    printed = capsys.readouterr()
    assert "120 rows, to step 119" in printed.out
    assert "DEAD: the gradient ratio is 0.1 in the typical step, of 500 at the start" in printed.out
    assert "line 121" in printed.err
    write(tmp_path / "log.jsonl", [HEALTHY | {"step": step} for step in range(120)])
    curves.main([str(tmp_path / "log.jsonl"), "--no_plot"])
    assert "no rule fired" in capsys.readouterr().out


def test_a_file_that_is_not_a_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        curves.main([str(tmp_path / "log.jsonl")])
    write(tmp_path / "log.jsonl", [{"win": "a", "lose": "b"}])
    with pytest.raises(ValueError, match="log.jsonl:1: no `step`"):
        curves.main([str(tmp_path / "log.jsonl")])


def test_the_picture_of_two_logs_one_without_pairs(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    write(tmp_path / "log.jsonl",
          [HEALTHY | {"step": step} | (probe(0.6) if step % 10 == 9 else {}) for step in range(30)])
    write(tmp_path / "sft.jsonl", [{"step": step, "loss": 0.2, "err_win": 0.2} for step in range(30)])
    curves.main([str(tmp_path / "log.jsonl"), str(tmp_path / "sft.jsonl")])
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    write(tmp_path / "log.jsonl", [HEALTHY | {"step": 0}])
    with pytest.raises(ValueError, match="pip install matplotlib .*--no_plot"):
        curves.main([str(tmp_path / "log.jsonl")])
