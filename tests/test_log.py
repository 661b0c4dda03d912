"""The output of a run: beforehand, in each row of its log, and where a number cannot be right."""
import fcntl
import io
import json
import os
import re
import select
import struct
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import run_folder
import run_log
from fsdp_utils import start_ranks
from run_folder import check_first_margin, describe_run, read_items, report_skipped
from run_log import Log, add_up, diagnostics, summarise


@pytest.fixture
def ranks():
    yield start_ranks()
    torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------------
# beforehand

def described(items=24, start=0, unpaired=(), rank_counts=(1, 1), frozen_bias=False, **flags):
    """The lines of describe_run; rank_counts: the number of ranks, and of ranks with data of their own."""
    args = SimpleNamespace(**{"data": "toy", "batch_size": 8, "grad_accum": 2, "cp_size": 1, "steps": 12,
                              "out": Path("out/x")} | flags)
    item = {"win": torch.zeros(12, 3, 4, 6), "lose": 0, "context": torch.zeros(5, 32)}

    class Data(list):
        pass

    dataset = Data([item] * items)
    if unpaired:
        dataset.unpaired = unpaired
    ranks = SimpleNamespace(world=rank_counts[0], data_ranks=rank_counts[1], device=torch.device("cpu"))
    model = torch.nn.Linear(50, 50)
    model.bias.requires_grad_(not frozen_bias)
    return describe_run(args, dataset, 18, start, ranks, "a model", model, "a plan")


def test_a_run_says_beforehand_what_it_will_do():
    model, plan, data, step = described()
    assert model.startswith("a model: 2,550 parameters; 1 ranks on cpu, torch ") and plan == "a plan"
    assert data == "24 pairs in the embedded world, latents (12, 3, 4, 6) = 18 tokens, context (5, 32)"
    assert step == ("a step: 8 pairs = 1 data ranks x 2 accumulation x 4; steps 0 to 12 = 4.0 epochs; log in "
                    "out/x/log.jsonl")
    _, _, data, step = described(data="data/wan", start=9, unpaired=["a", "b"], rank_counts=(4, 2))
    assert data.startswith("24 pairs in data/wan, ")
    assert data.endswith("; 2 real samples have no negative and are left out")
    assert "2 data ranks x 2 accumulation x 2 (one data rank: 2 ranks, one branch each, tokens over 1)" in step
    assert "steps 9 to 12 = 1.0 epochs" in step
    model, _, _, _ = described(frozen_bias=True)
    assert model.startswith("a model: 2,550 parameters, 2,500 of them trained; ")
    _, _, _, step = described(rank_counts=(4, 2), cp_size=2)
    assert "(one data rank: 2 ranks, both branches, tokens over 2)" in step
    _, _, _, step = described(rank_counts=(8, 2), cp_size=2)
    assert "(one data rank: 4 ranks, one branch each, tokens over 2)" in step


# ------------------------------------------------------------------------------------------------------------------
# a row

def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_diagnostics_by_hand():
    metrics = {"margin": column(6.0, -5.0, 2.0, 0.0), "dgr": column(0, 0, 0, 0), "err_win": column(3.0, 2.0, 1.2, 1.0),
               "ref_err_win": column(2.0, 4.0, 1.0, 1.0), "err_lose": column(9.0, 1.0, 1.3, 1.0),
               "ref_err_lose": column(3.0, 4.0, 1.0, 1.0), "win_gap": column(1.0, -2.0, 0.2, 0.0),
               "lose_gap": column(6.0, -3.0, 0.3, 0.0)}
    extra = diagnostics(metrics)
    assert {name: values.tolist() for name, values in extra.items()} == {
        "accuracy_strict": [1, 0, 1, 0], "margin_abs": [6, 5, 2, 0], "saturated": [1, 0, 0, 0],
        "win_ratio": [1.5, 0.5, 1.2, 1], "lose_ratio": [3, 0.25, 1.3, 1], "gap_mean": [3.5, -2.5, 0.25, 0],
        "win_gap_positive": [1, 0, 1, 0], "win_worse_though_right": [1, 0, 1, 0], "loser_driven": [1, 0, 1, 0]}
    # right because the win gained: the loser did not do it
    [driven] = diagnostics(metrics | {name: column(value) for name, value in (
        ("margin", 1.0), ("win_gap", -0.5), ("lose_gap", 0.5))})["loser_driven"].tolist()
    assert driven == 0
    # scores have no gaps, and a margin without beta has no saturation
    assert diagnostics({"margin": column(7.0)}).keys() == {"accuracy_strict", "margin_abs"}


def test_a_row_is_the_means_over_the_pairs_of_the_step_by_hand(ranks):
    sums = {"asks/stop": 0.0}
    first = {"err_win": column(1.0, 3.0), "margin": column(2.0, -1.0), "accuracy_strict": column(1.0, 0.0),
             "loser_driven": column(1.0, 0.0), "win_worse_though_right": column(0.0, 0.0)}
    second = {"err_win": column(8.0), "margin": column(5.0), "accuracy_strict": column(1.0),
              "loser_driven": column(0.0), "win_worse_though_right": column(1.0)}
    add_up(sums, first, column(0.2, 0.9), {"bad_samples": 1, "sources/a": 2, "sources/b": 0})
    add_up(sums, second, column(1.0), {"bad_samples": 1, "sources/a": 0, "sources/b": 1})
    row, totals = summarise(sums, [2.0, -1.0, 5.0], ranks)
    assert row["err_win"] == 4 and row["margin"] == 2
    assert row["margin_min"] == -1 and row["margin_max"] == 5
    # 0.2 is in the first quarter of sigma; 0.9 and 1.0 are in the last
    assert row["by_sigma"] == {"err_win": [1, None, None, 5.5], "margin": [2, None, None, 2]}
    assert row["accuracy_strict"] == pytest.approx(2 / 3)
    assert row["loser_driven"] == 0.5 and row["win_worse_though_right"] == 0.5       # of the two that are right
    assert row["bad_samples"] == 2 and row["sources"] == {"a": 2, "b": 1}
    assert totals["pairs"] == 3 and not {"pairs", "asks/stop", "pairs/0"} & row.keys()


def test_where_no_pair_is_right_or_kept_shares_are_0_and_one_source_is_not_named(ranks):
    sums = {}
    metrics = {"loss": column(0.0), "kept": column(0.0), "loser_driven": column(0.0), "accuracy_strict": column(0.0)}
    add_up(sums, metrics, column(0.5), {"bad_samples": 0, "sources/a": 1})
    row, _ = summarise(sums, [], ranks)
    assert row["loser_driven"] == 0 and row["loss"] == 0 and row["kept"] == 0
    assert "sources" not in row and "margin_min" not in row


def test_the_mean_loss_is_over_the_pairs_kept(ranks):
    sums = {}
    add_up(sums, {"loss": column(0.0, 0.6, 0.0, 0.8), "kept": column(0, 1, 0, 1)}, column(0.1, 0.2, 0.3, 0.4),
           {"bad_samples": 0})
    row, _ = summarise(sums, [], ranks)
    assert row["loss"] == pytest.approx(0.7) and row["kept"] == 0.5


def test_pairs_that_ranks_share_are_counted_once(ranks):
    # two ranks for each pair, so all counts come in twice
    ranks = SimpleNamespace(world=4, data_ranks=2, device=ranks.device)
    sums = {}
    add_up(sums, {"err_win": column(1.0)}, column(0.5), {"bad_samples": 2, "sources/a": 4, "sources/b": 2})
    row, _ = summarise(sums, [], ranks)
    assert row["bad_samples"] == 1 and row["sources"] == {"a": 2, "b": 1}


# ------------------------------------------------------------------------------------------------------------------
# where a row goes

def open_log(out, start=0, steps=20, rank=0, **options):
    """The Log of a run with a line every five steps."""
    out.mkdir(exist_ok=True)
    args = SimpleNamespace(out=out, steps=steps, log_every=5, tracker="none", resume="", defaults={})
    return Log(args, start, SimpleNamespace(rank=rank, world=2), **options)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: clock.now, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(run_log.time, "monotonic", lambda: clock.now)
    yield clock
    run_folder.AT_END.pop_all()


def test_a_row_is_written_with_seven_digits_and_every_fifth_and_the_last_shown_with_the_time_left(
        tmp_path, capsys, clock):
    log = open_log(tmp_path / "out", start=9)
    row = {"loss": 0.123456789, "nested": {"list": [1.23456789e-5, None]}, "unshown": 2, "seconds": 12.5}
    for step in range(9, 20):
        log.add({"step": step, **row}, ["the loss is fine"] if step == 11 else [])
        clock.now += 100
    written = {"loss": 0.1234568, "nested": {"list": [1.234568e-5, None]}, "unshown": 2, "seconds": 12.5}
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, **written} for step in range(9, 20)]
    # 100 seconds a step, whatever a row says that knows nothing of what is between steps
    assert capsys.readouterr().out == ("step    10  loss 0.1235  seconds 12.5  15:00 left\nthe loss is fine\n"
                                       "step    15  loss 0.1235  seconds 12.5  6:40 left\n"
                                       "step    19  loss 0.1235  seconds 12.5  0:00 left\n")
    log = open_log(tmp_path / "out", steps=1, shown=("unshown",))
    log.add({"step": 0, **row})
    assert capsys.readouterr().out == "step     0  unshown 2  0:00 left\n"


def test_other_ranks_write_and_show_nothing(tmp_path, capsys):
    log = open_log(tmp_path / "out", rank=1)
    log.add({"step": 0, "loss": 1.0, "seconds": 1.0}, ["a verdict"])
    log.picture(tmp_path / "no.png")
    assert log.rows == [] and not list((tmp_path / "out").iterdir()) and not capsys.readouterr().out


def test_a_resumed_log_knows_the_rows_before_it(tmp_path, clock):
    log = open_log(tmp_path / "out")
    for step in range(4):
        log.add({"step": step, "loss": 1.0, "seconds": 1.0})
    assert [row["step"] for row in open_log(tmp_path / "out", start=2).rows] == [0, 1]


def test_the_time_left_is_the_first_rows_pace_and_then_the_mean_pace_after_it(clock):
    left = run_log.Clock(steps=12)
    assert left.time_left({"step": 1, "seconds": 30.0}) == "5:00 left"         # ten steps of 30 seconds
    clock.now += 10
    assert left.time_left({"step": 2, "seconds": 3.0}) == "1:30 left"          # nine of 10: a checkpoint was written
    clock.now += 2
    assert left.time_left({"step": 3, "seconds": 2.0}) == "0:48 left"          # eight of (10 + 2) / 2
    assert left.time_left({"step": 11, "seconds": 2.0}) == "0:00 left"
    assert [run_log.duration(seconds) for seconds in (0, 59.6, 151, 7384, 360000)] == [
        "0:00", "1:00", "2:31", "2:03:04", "100:00:00"]


def test_on_a_terminal_there_is_a_bar_below_all_that_is_printed_and_it_leaves_the_terminal_as_it_was(
        tmp_path, monkeypatch, clock):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))            # rows, columns
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(run_log.sys, "stdout", terminal)
        log = open_log(tmp_path / "out", start=9, steps=12)
        row = {"loss": 0.5, "accuracy": 0.75, "margin": 0.25, "err_win": 7.0, "seconds": 12.5}
        for step in range(9, 12):
            clock.now += 100
            log.add({"step": step, **row}, [f"a verdict on step {step}"])
            print("from elsewhere")
        assert run_log.sys.stdout is terminal
        terminal.flush()
        shown = b""
        while shown.count(b"from elsewhere") < 3 and select.select([ours], [], [], 10)[0]:
            shown += os.read(ours, 2 ** 16)                # a terminal gives what it has so far
    shown = shown.decode()
    os.close(ours)
    # a bar is drawn anew, from the start of its line, after each row and below each line that is printed
    bars = [text for text in re.split(r"[\r\n]+", shown) if "/12" in text]
    assert "83%" in bars[1] and "10/12, loss 0.5  accuracy 0.75  margin 0.25  seconds 12.5  0:25 left" in bars[1]
    assert "100%" in bars[-1] and "12/12" in bars[-1] and "0:00 left" in bars[-1] and "err_win" not in shown
    lines = [text.strip() for text in re.split(r"[\r\n]+", shown) if "/12" not in text and text.strip()]
    assert lines == ["a verdict on step 9", "from elsewhere", "a verdict on step 10", "from elsewhere",
                     "a verdict on step 11", "from elsewhere"]
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 3


def test_a_run_that_fails_takes_its_bar_down_first(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(run_log.sys, "stdout", terminal)

    @run_folder.closes_at_end
    def main():
        log = open_log(tmp_path / "out")
        log.add({"step": 0, "loss": 0.5, "seconds": 1.0})
        assert run_log.sys.stdout is not terminal
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        main()
    assert run_log.sys.stdout is terminal and terminal.getvalue().endswith("\n")


# ------------------------------------------------------------------------------------------------------------------
# numbers that cannot be right

def test_the_first_margin_may_be_rounding_in_float32_and_noise_of_kernels_in_bf16(ranks, capsys):
    check_first_margin(2.9e-5, beta=30, half=False)
    with pytest.raises(RuntimeError, match="margins differ by 3.1e-05 on average"):
        check_first_margin(3.1e-5, beta=30, half=False)
    for beta in (30, 1000):
        check_first_margin(0.0199, beta, half=True)
        assert not capsys.readouterr().out
        check_first_margin(0.0201, beta, half=True)
        check_first_margin(0.0999, beta, half=True)
        assert capsys.readouterr().out.count("WARNING: policy and reference are the same weights at step 0") == 2
        with pytest.raises(RuntimeError, match="do not take the same numerical path"):
            check_first_margin(0.101, beta, half=True)


def test_a_skipped_step_names_the_samples_whose_loss_is_not_finite_or_all_of_them(ranks, capsys):
    report_skipped(3, 1, [("b", float("nan")), ("a", 1.0), ("c", float("inf"))])
    assert capsys.readouterr().out.endswith("it came from b; c\n")
    report_skipped(3, 9, [(f"sample {i}", 1.0) for i in range(10)])
    said = capsys.readouterr().out
    names = "; ".join(f"sample {i}" for i in range(8))
    assert said.startswith("step     3  skipped: ") and said.endswith(f"it came from {names} and 2 more\n")
    report_skipped(3, 1, [(f"sample {i}", 1.0) for i in range(8)])
    assert capsys.readouterr().out.endswith("; sample 7\n")
    with pytest.raises(RuntimeError, match="10 steps in a row up to step 3 were skipped: .* came from a. The last"):
        report_skipped(3, 10, [("a", 1.0)])


class Damaged:
    """Ten items, some unreadable and replaced by the next; it counts the reads."""
    def __init__(self, bad):
        self.unreadable, self.bad, self.reported, self.reads = bad, {}, set(), 0

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.reads += 1
        while index in self.unreadable:
            self.bad[index] = f"item {index} is cut off"
            index = (index + 1) % 10
        return index


def test_unreadable_items_are_reported_once_and_all_of_a_batch_is_read_again_when_another_rank_finds_one(
        ranks, capsys, monkeypatch):
    dataset = Damaged({2, 7})
    assert read_items(dataset, [1, 2, 3], skip=True) == [1, 3, 3] and dataset.reads == 3
    assert capsys.readouterr().out == ("1 of 10 samples or pairs are unreadable and replaced by the next good ones; "
                                       "new: item 2 is cut off\n")
    assert read_items(dataset, [2, 4], skip=True) == [3, 4] and not capsys.readouterr().out
    assert read_items(dataset, [6, 7], skip=True) == [6, 8]
    assert "2 of 10 samples" in capsys.readouterr().out
    assert dataset.bad.keys() == dataset.reported == {2, 7}

    # another rank finds item 5 bad
    gather = torch.distributed.all_gather_object

    def with_another_rank(bad_of_ranks, bad):
        bad_of_ranks[:] = [dict(bad), dict(bad) | {5: "item 5 is gone"}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", with_another_rank)
    reads = dataset.reads
    read_items(dataset, [4, 5], skip=True)
    assert dataset.reads == reads + 4 and dataset.bad.keys() == {2, 5, 7}
    assert "3 of 10 samples" in capsys.readouterr().out
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert read_items(Damaged({0}), [0, 1], skip=False) == [1, 1] and not capsys.readouterr().out
