"""
Nothing lost: exact resume, kills at any moment, full disks, signals, NaN, checkpoints from strangers.
"""
import contextlib
import errno
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.fsdp import fully_shard

import samples
import run_folder
import train
import step_folder
import train_spo
from data import open_data, order
from samples import read_sample
from fsdp_utils import start_ranks
from run_folder import check_folder, find_checkpoint, load_checkpoint, save_checkpoint
from run_log import append_row
from step_folder import stored_weights
from conftest import FORKS, ROOT, die_at, finish, four_steps, in_rank, on_ranks, start, train_main

# and seconds*: what may differ between two runs of the same steps
TIMES = ("memory_gib", "tokens_per_second")


def rows(out):
    strip = lambda row: {
        name: value for name, value in row.items() if name not in TIMES and not name.startswith("seconds")
    }
    return [strip(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()]


def everything(folder):
    """All that a checkpoint holds: {name: tensor or number}."""
    reader = step_folder.Reader(folder)
    state = {
        name: None if isinstance(entry, BytesStorageMetadata) else torch.empty(entry.size)
        for name, entry in reader.index.state_dict_metadata.items()
    }
    dcp.load(state, storage_reader=reader, planner=step_folder.Planner(flatten_state_dict=False), no_dist=True)
    return state


def go_back(out, to, step):
    """A copy of a run's folder as it was just after it saved this step."""
    shutil.copytree(out, to)
    for folder in to.glob("step_*"):
        if folder.name > f"step_{step:06d}":
            shutil.rmtree(folder)
    (to / "latest").write_text(f"step_{step:06d}\n")
    return to


def same_end(one, other):
    """The same log, and the same weights, average and optimizer, to the last bit."""
    assert rows(one) == rows(other)
    last = (one / "latest").read_text().strip()
    assert last == (other / "latest").read_text().strip()
    a, b = everything(one / last), everything(other / last)
    assert a.keys() == b.keys() and {name.split(".")[0] for name in a} == {"model", "optimizer", "ema"}
    for name in a:
        assert torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name], name


# ------------------------------------------------------------------------------------------------------------------
# going on

# objectives keep nothing between steps: of those that do, dpo_cm skips an update and a preference model has a new head
SLOW = [
    (1, "--loss dpo_cm"),
    (1, "--loss preference"),
    (1, "--backward sequential"),
    (2, "--grad_accum 2"),
    (2, "--backward pair --ref cached"),
    (4, "--cp_size 2 --backward pair --checkpointing full"),
]


@pytest.mark.parametrize(
    "ranks, flags",
    [
        (1, "--grad_accum 2 --ref cached"),
        (2, "--loss sdpo --backward pair"),
        (2, "--loss sft --cp_size 2 --caption_dropout 0.3 --decay_steps 3"),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
    ],
)
def test_a_run_that_is_cut_and_goes_on_is_the_uncut_run_in_every_bit_of_log_weights_average_and_optimizer(
    world, base, tmp_path, ranks, flags
):
    on_ranks(ranks, train_main, four_steps(world, base, tmp_path / "out", flags))
    go_back(tmp_path / "out", tmp_path / "cut", 2)
    on_ranks(ranks, train_main, four_steps(world, base, tmp_path / "cut", f"{flags} --resume latest"))
    same_end(tmp_path / "out", tmp_path / "cut")
    assert len(rows(tmp_path / "cut")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), (2, 4)])
def test_on_another_number_of_ranks_a_run_goes_on_to_the_same_numbers_within_1e_5(world, base, tmp_path, before, after):
    # beta multiplies float32's rounding: at 1000 AdamW's moments part by 5e-5
    slower = "--learning_rate 3e-5 --beta 50"
    on_ranks(before, train_main, four_steps(world, base, tmp_path / "out", slower))
    go_back(tmp_path / "out", tmp_path / "cut", 2)
    on_ranks(after, train_main, four_steps(world, base, tmp_path / "cut", f"{slower} --resume latest"))
    a, b = (everything(tmp_path / name / "step_000004") for name in ("out", "cut"))
    for part in ("model.", "ema.", "optimizer."):
        flat = [
            torch.cat(
                [
                    x[name].flatten().double()
                    for name in sorted(x)
                    if name.startswith(part) and torch.is_tensor(x[name]) and x[name].ndim
                ]
            )
            for x in (a, b)
        ]
        assert (flat[0] - flat[1]).norm() <= 1e-5 * flat[0].norm(), part
    for mine, theirs in zip(rows(tmp_path / "out"), rows(tmp_path / "cut"), strict=True):
        for name in ("loss", "err_win", "err_lose", "ref_err_win", "ref_err_lose", "lr"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), (mine["step"], name)


# ------------------------------------------------------------------------------------------------------------------
# what a resumed run may differ in

# Of these each decides the numbers of a run.
DECIDE = """loss model seed beta r r_scale r_min caption_dropout clip weight_steps threshold tau penalty mu
    timestep_sampling flow_shift min_timestep max_timestep batch_size learning_rate weight_decay warmup_steps
    decay_steps max_grad_norm loss_scale ema_decay hold_back toy_clips sample_steps guidance lora_rank
    lora_alpha lora_targets init_lora switch_every""".split()


def another(value):
    """A value that a flag does not have."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"not {value}"


def test_what_may_change_on_resume_is_the_list_and_every_other_flag_is_refused_by_name(tmp_path):
    args = train.parse_args([])
    flags = vars(args).keys() - {"defaults"}
    assert train.MAY_CHANGE <= flags
    assert flags - train.MAY_CHANGE == {*DECIDE, "steps"}
    fixed = run_folder.run_settings(args, train.MAY_CHANGE, init="abc", data="24 items, def")
    assert fixed.keys() == {*DECIDE, "steps", "init", "data"}
    (tmp_path / "meta.json").write_text(json.dumps(fixed))
    for name in fixed:
        run_folder.check_same_run(tmp_path, fixed)
        words = f"trained with {name} = .*, this run has {name} = .*; resume with the same flags"
        with pytest.raises(ValueError, match=words):
            run_folder.check_same_run(tmp_path, fixed | {name: another(fixed[name])})
    with pytest.raises(ValueError, match="did not record new_flag"):           # new flags are safe by default
        run_folder.check_same_run(tmp_path, fixed | {"new_flag": 1})
    for name in train.MAY_CHANGE:
        setattr(args, name, another(getattr(args, name)))
    assert run_folder.run_settings(args, train.MAY_CHANGE, init="abc", data="24 items, def") == fixed


def resume_fails(flags):
    with pytest.raises(ValueError) as error:
        train_main(flags)
    if dist.is_initialized():
        dist.destroy_process_group()
    return str(error.value)


def test_a_resume_takes_the_same_weights_and_data_elsewhere_and_no_others_and_more_steps_unless_they_decide(
        world, base, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(base, tmp_path / "base")
    train_main(four_steps(world, tmp_path / "base", out, "--steps 2"))
    train_main(four_steps(world, base, out, "--steps 3 --resume latest"))            # the same weights elsewhere
    with torch.no_grad():
        weights = load_file(base / "diffusion_pytorch_model.safetensors")
        weights["head.head.bias"] += 1e-3
        save_file(weights, tmp_path / "base" / "diffusion_pytorch_model.safetensors")
    message = resume_fails(four_steps(world, tmp_path / "base", out, "--resume latest"))
    assert "trained with init = " in message and "resume with the same flags" in message
    assert (out / "latest").read_text() == "step_000003\n" and len(rows(out)) == 3

    train_main(four_steps(world, base, tmp_path / "decays", "--steps 2 --decay_steps 1"))
    message = resume_fails(four_steps(world, base, tmp_path / "decays", "--decay_steps 1 --resume latest"))
    assert "trained with steps = 2, this run has steps = 4" in message


def test_a_save_before_the_first_optimizer_step_holds_the_counts_0_and_a_step_without_a_kept_pair_changes_nothing(
        world, base, tmp_path):
    # weights are below 1, so no pair is kept at threshold 1
    train_main(four_steps(world, base, tmp_path / "out", "--loss dpo_cm --threshold 1 --steps 2 --save_every 1"))
    weights = load_file(base / "diffusion_pytorch_model.safetensors")
    for step in (1, 2):
        state = everything(tmp_path / "out" / f"step_{step:06d}")
        counts = [value for name, value in state.items() if name.endswith(".step")]
        assert len(counts) == len(weights) and not any(counts)
        moments = [value for name, value in state.items() if ".exp_avg" in name]
        assert len(moments) == 2 * len(weights) and not any(moment.any() for moment in moments)
        for part in ("model", "ema"):
            assert all(torch.equal(state[f"{part}.{name}"], weight) for name, weight in weights.items())
    assert [(row["kept"], row["skipped"], row["loss"]) for row in rows(tmp_path / "out")] == [(0, 0, 0)] * 2


def test_a_run_whose_first_step_was_skipped_resumes_from_there_to_the_same_end(world, base, tmp_path):
    flags = "--loss dpo --steps 3 --save_every 1"
    on_ranks(1, poisoned_main, four_steps(world, base, tmp_path / "out", flags), 0, [0], "gradient")
    go_back(tmp_path / "out", tmp_path / "cut", 1)
    on_ranks(1, train_main, four_steps(world, base, tmp_path / "cut", f"{flags} --resume latest"))
    same_end(tmp_path / "out", tmp_path / "cut")
    state = everything(tmp_path / "cut" / "step_000003")
    assert {value.item() for name, value in state.items() if name.endswith(".step")} == {2}


# ------------------------------------------------------------------------------------------------------------------
# two runs in one folder

def lock_and_wait(out):
    run_folder.lock_folder(out, start_ranks())
    (out / "locked").touch()
    time.sleep(100)


def lock_fails(out):
    """The answer that each rank gets when it asks for the lock, and whether a main that raises releases its lock."""
    ranks = start_ranks()

    @run_folder.closes_at_end
    def main():
        run_folder.lock_folder(out, ranks)
        raise RuntimeError("a fault of main's own")

    try:
        main()
    except (ValueError, RuntimeError) as error:
        return str(error)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_second_run_in_a_folder_is_refused_while_the_first_lives_and_a_kill_releases_it(tmp_path, ranks):
    out = tmp_path / "out"
    first = start(1, lock_and_wait, out)
    until = time.monotonic() + 60
    while not (out / "locked").exists() and time.monotonic() < until:
        time.sleep(0.01)
    for said in on_ranks(ranks, lock_fails, out):
        assert f"--out {out}: another run is writing to this folder" in said and "another --out" in said
    assert set(on_ranks(ranks, lock_fails, tmp_path / "other")) == {"a fault of main's own"}
    first[0].kill()
    first[0].join()
    for _ in range(2):                                     # an error of main releases it too
        assert set(on_ranks(ranks, lock_fails, out)) == {"a fault of main's own"}


def lock_without_locks(out):
    """Lock a folder of a file system that has no locks, as some network file systems."""
    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.fcntl, "flock", no_locks)
        return lock_fails(out)


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path):
    assert on_ranks(1, lock_without_locks, tmp_path / "out") == ["a fault of main's own"]


# ------------------------------------------------------------------------------------------------------------------
# kills

def tiny_state(ranks):
    torch.manual_seed(1)
    model = fully_shard(torch.nn.Linear(32, 32), mesh=ranks.mesh)
    return model, torch.optim.AdamW(model.parameters())


def save_steps(out, first, last, change=0):
    """
    Checkpoints of these steps, each with its number in all weights, two of them kept; killed before a change of the
    folder. Returns the number of changes.
    """
    model, optimizer = tiny_state(start_ranks())
    die_at(out, change)
    for step in range(first, last + 1):
        with torch.no_grad():
            for param in model.parameters():
                param.to_local().fill_(step)
        save_checkpoint(out, step, {"": (model, optimizer, None)}, {}, keep=2)


def whole(out):
    """
    The step that `latest` names, or 0. Every folder with a checkpoint's name must be a whole checkpoint.
    """
    for folder in out.glob("step_*"):
        weights, read = stored_weights(folder, "policy")
        assert {value for name in weights for value in (read(name).min().item(), read(name).max().item())} == {
            float(folder.name[5:])
        }
    return int(Path(find_checkpoint(out, "latest")).name[5:]) if (out / "latest").exists() else 0


def kill_everywhere(folder, changes):
    for change in changes:
        out = folder / f"killed_{change}"
        [code] = finish(start(1, save_steps, out, 1, 4, change))
        if code == 0:                                                          # four saves have fewer changes than that
            return change
        assert code == -signal.SIGKILL
        step = whole(out)
        # the older one went after the newer was whole
        assert len(list(out.glob("step_*"))) >= min(2, step)
        assert finish(start(1, save_steps, out, step + 1, step + 2)) == [0]
        assert whole(out) == step + 2 and sorted(path.name for path in out.iterdir()) == [
            "latest",
            f"step_{step + 1:06d}",
            f"step_{step + 2:06d}",
        ]


@pytest.mark.slow
def test_a_kill_before_any_change_of_the_folder_leaves_a_whole_checkpoint_and_later_saves_clear_what_it_left(tmp_path):
    assert kill_everywhere(tmp_path, range(1, 200)) > 40


def test_a_kill_in_a_save_leaves_a_whole_checkpoint(tmp_path):
    kill_everywhere(tmp_path, [31, 38])


def slow_saves_main(flags):
    """Run train.main on a slow disk: most of its time goes into the saves."""
    for name, seconds in (("fsync", 0.04), ("rename", 0.003), ("unlink", 0.003)):
        function = getattr(os, name)
        setattr(
            os,
            name,
            lambda *args, function=function, seconds=seconds, **options: (
                time.sleep(seconds),
                function(*args, **options),
            )[1],
        )
    train_main(flags)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, kills, steps", [(1, 14, 60), (2, 6, 30)])
def test_a_run_killed_at_random_moments_ends_where_the_run_ends_that_nobody_killed(
    world, base, tmp_path, ranks, kills, steps
):
    flags = f"--steps {steps} --loss dpo --keep 2"
    on_ranks(ranks, train_main, four_steps(world, base, tmp_path / "out", f"{flags} --save_every {steps}"))
    flags += " --resume auto --save_every"
    numbers, found, out = torch.Generator().manual_seed(ranks), [], tmp_path / "cut"
    stamp = lambda name: (out / name).stat().st_mtime_ns if (out / name).exists() else 0
    for kill in range(kills):
        processes = start(ranks, slow_saves_main, four_steps(world, base, out, f"{flags} 1"))
        # when it has begun, or some rows later
        for name in ["config.json"] + ["log.jsonl"] * int(torch.randint(4, (), generator=numbers)):
            before, until = stamp(name), time.monotonic() + 30
            while stamp(name) == before and time.monotonic() < until:
                time.sleep(0.002)
        time.sleep(0.25 * torch.rand((), generator=numbers).item())
        os.kill(processes[int(torch.randint(ranks, (), generator=numbers))].pid, signal.SIGKILL)
        codes = finish(processes)
        assert -signal.SIGKILL in codes and None not in codes, codes           # the others do not hang
        found += [path.name for path in out.iterdir()]
        if (out / "latest").exists():
            everything(find_checkpoint(out, "latest"))                         # whole
    # some of them were in the middle of a save
    assert any(name.startswith(".step_") for name in found), found
    assert finish(start(ranks, train_main, four_steps(world, base, out, f"{flags} {steps}"))) == [0] * ranks
    same_end(tmp_path / "out", out)
    names = {path.name for path in out.iterdir()}
    # and the one checkpoint before it
    assert names >= {"config.json", "export", "latest", "log.jsonl", f"step_{steps:06d}"} and len(names) == 6


def test_step_folders_are_kept_and_deleted_in_the_order_of_their_numbers(tmp_path):
    out = tmp_path / "out"
    on_ranks(1, save_steps, out, 999_998, 1_000_001)       # two are kept; as text step_1000000 is before step_999999
    assert sorted(path.name for path in out.iterdir()) == ["latest", "step_1000000", "step_1000001"]
    assert whole(out) == 1_000_001
    for name in ("step_9", "step_10", "step_notes"):
        (out / name).mkdir()
    names = [folder.name for folder in run_folder.step_folders(out)]
    assert names == ["step_9", "step_10", "step_1000000", "step_1000001"]


# ------------------------------------------------------------------------------------------------------------------
# a full disk

def save_on_a_full_disk(out, full_from):
    """
    Four saves; from the step full_from on the disk is full for files of more than 2,000 bytes. Returns what was said.
    """
    model, optimizer = tiny_state(start_ranks())
    for step in range(1, 5):
        if step == full_from:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        try:
            save_checkpoint(out, step, {"": (model, optimizer, None)}, {}, keep=1)
        except ValueError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return str(error)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_is_named_and_the_last_whole_checkpoint_stays_alone(tmp_path, ranks):
    for message in on_ranks(ranks, save_on_a_full_disk, tmp_path / "out", 3):
        assert (
            "step_000003 could not be written" in message
            and "Make room" in message
            and "latest names, is whole" in message
        )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["latest", "step_000002"]
    assert stored_weights(find_checkpoint(tmp_path / "out", "latest"))


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ValueError, match="log.jsonl could not be written.*make room"):
        append_row(tmp_path / "nowhere" / "log.jsonl", {"step": 0})


# ------------------------------------------------------------------------------------------------------------------
# signals, the clock, restarts

def stopped_main(flags, victim, number, at):
    """Run train.main; the rank `victim` gets a signal in the middle of step `at`, the others do not."""
    backward, seen, handlers = (
        train.backward_batch,
        [],
        [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)],
    )

    def interrupted(*arguments):
        seen.append(0)
        if len(seen) == at + 1 and int(os.environ["RANK"]) == victim:
            os.kill(os.getpid(), number)
        return backward(*arguments)
    train.backward_batch = interrupted
    try:
        train_main(flags)
    finally:
        train.backward_batch = backward
    # as they were; in a background job of a shell SIGINT is ignored
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == handlers


def stopped_spo(flags, victim, number):
    update = train_spo.step_backward

    def interrupted(*arguments):
        if int(os.environ["RANK"]) == victim:
            os.kill(os.getpid(), number)
        return update(*arguments)
    train_spo.step_backward = interrupted
    try:
        train_spo.main(train_spo.parse_args(flags))
    finally:
        train_spo.step_backward = update


@pytest.mark.parametrize("ranks, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_one_rank_saves_and_stops_all_of_them_after_that_step_and_the_run_goes_on_from_there(
    world, base, tmp_path, ranks, number
):
    flags = "--save_every 100 --loss dpo"
    on_ranks(ranks, stopped_main, four_steps(world, base, tmp_path / "out", flags), ranks - 1, number, 1)
    assert (
        (tmp_path / "out" / "latest").read_text() == "step_000002\n"
        and len(rows(tmp_path / "out")) == 2
        and not (tmp_path / "out" / "export").exists()
    )
    on_ranks(ranks, train_main, four_steps(world, base, tmp_path / "out", f"{flags} --resume latest"))
    on_ranks(ranks, train_main, four_steps(world, base, tmp_path / "whole", flags))
    same_end(tmp_path / "whole", tmp_path / "out")


def spo_argv(world, base, out, flags):
    return [
        "--init",
        str(base),
        "--data",
        str(world / "data" / "real"),
        "--score",
        str(base.parent / "judge"),
        "--out",
        str(out),
        "--batch_size",
        "4",
        "--steps",
        "2",
        "--sample_steps",
        "5",
        "--pool",
        "3",
        "--threshold",
        "0.0",
        "--updates",
        "2",
        "--save_every",
        "9",
        *flags.split(),
    ]


@pytest.mark.slow
def test_spo_saves_and_stops_on_a_signal_and_goes_on_bit_for_bit(world, base, tmp_path):
    on_ranks(2, stopped_spo, spo_argv(world, base, tmp_path / "out", ""), 1, signal.SIGTERM)
    assert (tmp_path / "out" / "latest").read_text() == "step_000001\n"
    for out in ("out", "whole"):
        on_ranks(2, stopped_spo, spo_argv(world, base, tmp_path / out, "--resume auto"), -1, signal.SIGTERM)
    same_end(tmp_path / "whole", tmp_path / "out")


def test_only_a_second_signal_some_seconds_later_is_obeyed_at_once(monkeypatch):
    signals, clock = run_folder.Signals(0), [100.0]
    try:
        monkeypatch.setattr(run_folder.time, "monotonic", lambda: clock[0])
        # torchrun passes on what the terminal sent already
        for clock[0] in (100.0, 100.1, 104.9):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert signals.asks() == {"asks/stop": 1.0, "asks/save": 0.0}
        clock[0] = 106.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    finally:
        signals.close()


def test_a_checkpoint_is_written_when_the_last_one_is_so_many_minutes_old(world, base, tmp_path, monkeypatch):
    flags = "--steps 3 --loss sft --save_every 100 --save_minutes 1e-9"
    on_ranks(1, train_main, four_steps(world, base, tmp_path / "out", flags))
    assert sorted(path.name for path in (tmp_path / "out").glob("step_*")) == [
        "step_000001",
        "step_000002",
        "step_000003",
    ]
    saved, clock = [], [1000.0]
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run_folder, "save_checkpoint", lambda *state: saved.append(state))
    signals = run_folder.Signals(2.0)
    for clock[0], due in ((1119.0, 0.0), (1121.0, 1.0)):
        assert signals.asks()["asks/save"] == due
    signals.save(7)
    assert saved == [(7,)] and signals.asks()["asks/save"] == 0.0
    signals.close()


def test_what_resume_comes_to(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert check_folder(out, "") == check_folder(out, "auto") == ""            # nothing there yet
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 0}\n')
    # killed before its first checkpoint: from the start
    assert check_folder(out, "auto") == ""
    for refused, words in (
        ("", "stopped before its first checkpoint"),
        ("latest", "has no checkpoint"),
        (str(tmp_path / "other" / "step_000001"), "another run"),
    ):
        with pytest.raises(ValueError, match=words):
            check_folder(out, refused)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")                      # torchrun's first start is none
    with pytest.raises(ValueError, match="already holds a run"):
        check_folder(out, "")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert check_folder(out, "") == check_folder(out, "latest") == ""
    other = tmp_path / "other" / "step_000003"
    for folder in (other, out / "step_000004", out / "step_000008"):
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text("{}")
    # from another run's, until there is one of its own
    assert check_folder(out, str(other)) == str(other)
    (out / "latest").write_text("step_000008\n")
    for asked in ("", "auto", "latest", str(other), str(out / "step_000004")):
        assert check_folder(out, asked) == str(out / "step_000008")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert check_folder(out, str(out / "step_000004")) == str(out / "step_000004")
    (out / "step_000008" / "meta.json").unlink()
    with pytest.raises(ValueError, match="step_000008 holds no whole checkpoint"):
        check_folder(out, "latest")


def test_going_on_from_an_older_step_makes_it_the_latest_so_that_a_kill_does_not_leave_a_gap_in_the_log(tmp_path):
    out = tmp_path / "out"
    for step in (2, 4):
        (out / f"step_00000{step}").mkdir(parents=True)
    (out / "latest").write_text("step_000004\n")
    (out / "log.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(4)) + '{"step": 4, "lo')
    run_folder.begin_log(SimpleNamespace(out=out, resume=str(out / "step_000002"), defaults={}), 2, ranks=3)
    assert (out / "latest").read_text() == "step_000002\n"
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [0, 1]
    config = json.loads((out / "config.json").read_text())
    assert config == {"out": str(out), "resume": str(out / "step_000002"), "ranks": 3, "torch": torch.__version__}


DAMAGES = {
    "zeros": b"\0" * 40 + b"\n", "zeros without an end": b"\0" * 40, "half": b'{"step": 2, "loss": 0.6',
    "two in one": b'{"step": 2, "loss": 0.6931}{"step": 3}\n', "no row": b"[2, 3]\n", "no step": b'{"loss": 0.6931}\n',
    "no text": b"\xff\xfe\n"}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("place", [1, 2])
def test_a_damaged_row_of_the_log_is_named_with_file_and_line_and_does_not_stop_a_resume(
        tmp_path, capsys, damage, place):
    lines = [b'{"step": 0, "loss": 0.6931}\n', b'{"step": 1, "loss": 0.6}\n']
    if place == 1 and not damage.endswith(b"\n"):
        damage += b"\n"                                    # in the middle; at the end the rest of the row is missing
    lines.insert(place, damage)
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join(lines))
    rows = run_folder.begin_log(SimpleNamespace(out=tmp_path, resume="", defaults={}), 2)
    assert [row["step"] for row in rows] == [0, 1]
    assert log.read_bytes() == b'{"step": 0, "loss": 0.6931}\n{"step": 1, "loss": 0.6}\n'
    assert f"{log}:{place + 1}: not a row of a log" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------------
# numbers that are none

def poisoned_main(flags, rank, steps, what):
    """
    Run train.main; on one rank the loss (or only the gradient) of the first pair of these steps is NaN. Returns
    what was printed, or raised.
    """
    backward, seen, said = train.backward_batch, [], io.StringIO()

    def poisoned(args, policy, ref, batch, *rest):
        seen.append(0)
        bad = len(seen) - 1 in steps and int(os.environ["RANK"]) == rank
        if bad and what == "loss":
            batch["win"][0] = float("inf")
        metrics = backward(args, policy, ref, batch, *rest)
        if bad and what == "gradient":
            next(
                p for p in policy.parameters() if p.grad is not None and p.grad.to_local().numel()
            ).grad.to_local().view(-1)[0] = float("nan")
        return metrics
    train.backward_batch = poisoned
    try:
        with contextlib.redirect_stdout(said):
            train_main(flags)
        return said.getvalue()
    except RuntimeError as error:
        return str(error)
    finally:
        train.backward_batch = backward


@pytest.mark.parametrize("what", [pytest.param("loss", marks=pytest.mark.slow), "gradient"])
def test_a_number_that_is_none_on_one_rank_skips_the_step_on_all_and_is_counted_also_over_a_resume(
    world, base, tmp_path, what
):
    out = tmp_path / "out"
    said, silent = on_ranks(2, poisoned_main, four_steps(world, base, out, "--loss dpo --steps 5"), 1, [1, 2], what)
    assert [row["skipped"] for row in rows(out)] == [0, 1, 2, 0, 0]
    assert [math.isfinite(row["grad_norm"]) for row in rows(out)] == [True, False, False, True, True]
    assert all(math.isfinite(row["loss"]) == (what == "gradient" or row["step"] not in (1, 2)) for row in rows(out))
    # position 6 is the first of rank 1 in step 1
    first = open_data(world / "data", pairs=True)[order(0, 4 + 2, 24)]["name"]
    [line] = [line for line in said.splitlines() if line.startswith("step     1  skipped: the loss or its gradient "
                                                                    "was not finite")]
    # whose loss it was is known to the pair
    assert first in line and line.count(", lose ") == (1 if what == "loss" else 4) and not silent
    end = everything(out / "step_000005")
    assert all(torch.isfinite(value).all() for value in end.values() if torch.is_tensor(value))
    flags = four_steps(world, base, go_back(out, tmp_path / "cut", 2), "--loss dpo --steps 5 --resume latest")
    on_ranks(2, poisoned_main, flags, 1, [0], what)
    # the second in a row, though the first of this process
    assert [row["skipped"] for row in rows(tmp_path / "cut")] == [0, 1, 2, 0, 0]


@pytest.mark.slow
def test_ten_skipped_steps_in_a_row_stop_every_rank_and_name_the_pairs(world, base, tmp_path):
    flags = four_steps(world, base, tmp_path / "out", "--loss regdpo --steps 20 --save_every 4")
    messages = on_ranks(2, poisoned_main, flags, 1, range(3, 99), "loss")
    name = open_data(world / "data", pairs=True)[order(0, 4 * 12 + 2, 24)]["name"]
    assert (
        messages[0] == messages[1]
        and "10 steps in a row up to step 12" in messages[0]
        and name in messages[0]
        and "--learning_rate" in messages[0]
    )
    assert (tmp_path / "out" / "latest").read_text() == "step_000012\n"
    before, after = (everything(tmp_path / "out" / f"step_0000{step}") for step in ("04", "12"))
    # nothing was updated since
    assert all(torch.equal(before[name], after[name]) for name in before if torch.is_tensor(before[name]))


def blind_main(flags, rank, path):
    """Run train.main; this rank alone cannot read the file at path."""
    read = samples.read_sample
    if int(os.environ["RANK"]) == rank:
        samples.read_sample = lambda file: read(file if file != path else file.with_name("gone"))
    try:
        train_main(flags)
    finally:
        samples.read_sample = read


@pytest.mark.slow
def test_bad_samples_are_skipped_and_counted_alike_on_ranks_that_share_a_pair_and_over_a_resume(
    world, base, tmp_path
):
    flags = f"--data {tmp_path}/data --loss dpo --backward pair --bad_samples skip"
    shutil.copytree(world / "data", tmp_path / "data")
    at_start, running = (open_data(tmp_path / "data", pairs=True).pairs[order(0, position, 24)] for position in (2, 5))
    at_start[0].write_bytes(at_start[0].read_bytes()[:-9])
    on_ranks(2, blind_main, four_steps(world, base, tmp_path / "out", flags), 1, running[1])
    assert [row["bad_samples"] for row in rows(tmp_path / "out")] == [1, 1, 0, 0]
    cut = go_back(tmp_path / "out", tmp_path / "cut", 2)
    on_ranks(2, blind_main, four_steps(world, base, cut, f"{flags} --resume latest"), 1, running[1])
    same_end(tmp_path / "out", tmp_path / "cut")
    bad = read_sample(running[1])
    metadata = bad.pop("metadata")
    # now no rank can, and only its numbers tell
    save_file(bad | {"latents": torch.full_like(bad["latents"], math.nan)}, running[1], metadata=metadata)
    on_ranks(2, train_main, four_steps(world, base, tmp_path / "both", flags))
    same_end(tmp_path / "out", tmp_path / "both")
    cut = go_back(tmp_path / "out", tmp_path / "changed", 2)
    with pytest.raises(ValueError, match="trained with data = "):            # its contents are not the run's any more
        on_ranks(2, train_main, four_steps(world, base, cut, f"{flags} --resume latest"))
    with pytest.raises(ValueError, match="--bad_samples skip: expected stop with --ref cached"):
        on_ranks(2, train_main, four_steps(world, base, tmp_path / "no", f"{flags} --ref cached"))


def spo_poisoned(flags, what):
    clip, seen = train_spo.clip_gradients, []

    def poisoned(params, *rest):
        params = list(params)
        seen.append(0)
        if len(seen) in what:
            next(p for p in params if p.grad.to_local().numel()).grad.to_local().view(-1)[0] = float("inf")
        return clip(params, *rest)
    train_spo.clip_gradients = poisoned
    try:
        train_spo.main(train_spo.parse_args(flags))
    except RuntimeError as error:
        return str(error)
    finally:
        train_spo.clip_gradients = clip


@pytest.mark.slow
def test_spo_skips_and_counts_updates_without_a_finite_gradient(world, base, tmp_path):
    assert on_ranks(2, spo_poisoned, spo_argv(world, base, tmp_path / "out", ""), [2]) == [None, None]
    assert [row["skipped"] for row in rows(tmp_path / "out")] == [1, 0]
    [message] = on_ranks(1, spo_poisoned, spo_argv(world, base, tmp_path / "stopped", "--steps 9"), range(99))
    assert "10 steps in a row up to step 4" in message and "real/" in message


# ------------------------------------------------------------------------------------------------------------------
# checkpoints from strangers

class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def stranger(tmp_path):
    """A folder with a checkpoint, and a path that must not be created."""
    on_ranks(1, save_steps, tmp_path / "out", 1, 1)
    return tmp_path / "out" / "step_000001", tmp_path / "owned"


def resume_from(folder):
    model, optimizer = tiny_state(start_ranks())
    with pytest.raises(ValueError) as error:
        load_checkpoint(str(folder), {"": (model, optimizer, None)})
    return str(error.value)


def test_an_index_that_calls_anything_is_refused_before_it_is_called(stranger):
    folder, owned = stranger
    for content, words in (
        (pickle.dumps(Evil(owned)), "posix.mkdir"),
        (pickle.dumps({"a": eval}), "builtins.eval"),
        (b"", "Ran out of input"),
        (b"\x80\x04K\x01.", "not the index"),
        (b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93.", "Metadata.__init__"),
    ):
        (folder / ".metadata").write_bytes(content)
        for use in (resume_from, lambda folder: refusal(stored_weights, folder)):
            message = use(folder) if use is not resume_from else on_ranks(1, resume_from, folder)[0]
            assert words in message and str(folder) in message, message
    assert not owned.exists()


def refusal(call, *arguments):
    with pytest.raises(ValueError) as error:
        call(*arguments)
    return str(error.value)


def test_an_index_that_names_files_elsewhere_is_refused(stranger):
    index = step_folder.Reader(stranger[0]).index
    for info in index.storage_data.values():
        info.relative_path = "../../secret"
    (stranger[0] / ".metadata").write_bytes(pickle.dumps(index))
    assert "'../../secret'" in refusal(stored_weights, stranger[0])


def test_a_pickle_among_the_numbers_of_a_checkpoint_is_not_called(stranger, tmp_path):
    folder, owned = stranger
    dcp.save({"optimizer": {"betas": Evil(owned)}}, checkpoint_id=tmp_path / "evil", no_dist=True)
    with pytest.raises(BaseException, match="mkdir"):
        dcp.load(
            {"optimizer": {"betas": None}},
            storage_reader=step_folder.Reader(tmp_path / "evil"),
            planner=step_folder.Planner(),
            no_dist=True,
        )
    assert not owned.exists()


def test_a_damaged_checkpoint_is_named(stranger):
    [file] = stranger[0].glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-3000])
    assert re.search(
        f"--resume {stranger[0]}: it is damaged .*resume from another step folder",
        on_ranks(1, resume_from, stranger[0])[0],
        re.S,
    )


# ------------------------------------------------------------------------------------------------------------------
# torchrun

DRIVER = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
import run_folder
asks, calls = run_folder.Signals.asks, []

def at_the_third_step(self):
    calls.append(0)
    if len(calls) == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        {action}
    return asks(self)
run_folder.Signals.asks = at_the_third_step
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def torchrun(tmp_path, action, flags, restarts=0):
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT), action=action))
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            f"--max-restarts={restarts}",
            str(tmp_path / "driver.py"),
            *flags,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_ranks_that_torchrun_restarts_go_on_by_themselves_to_the_same_end(world, base, tmp_path):
    done = torchrun(
        tmp_path,
        "os.kill(os.getpid(), signal.SIGKILL)",
        four_steps(world, base, tmp_path / "out", "--save_every 1 --steps 6"),
        restarts=1,
    )
    said = done.communicate(timeout=100)[0]
    assert done.returncode == 0 and "steps 2 to 6" in said, said
    on_ranks(2, train_main, four_steps(world, base, tmp_path / "whole", "--steps 6"))
    same_end(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
def test_one_rank_that_raises_ends_the_job_in_bounded_time_with_its_cause_shown(world, base, tmp_path):
    began = time.monotonic()
    action = 'raise ValueError("negatives/017.safetensors: no such file")'
    done = torchrun(tmp_path, action, four_steps(world, base, tmp_path / "out", ""))
    said = done.communicate(timeout=100)[0]
    assert done.returncode == 1 and time.monotonic() - began < 60
    root_cause = said.split("Root Cause")[1]
    assert "rank      : 1" in root_cause and "ValueError: negatives/017.safetensors: no such file" in root_cause, said


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_stops_all_ranks(world, base, tmp_path):
    job = torchrun(tmp_path, "pass", four_steps(world, base, tmp_path / "out", "--save_every 10000 --steps 10000"))
    until = time.monotonic() + 60
    while not ((tmp_path / "out" / "log.jsonl").exists() and rows(tmp_path / "out")) and time.monotonic() < until:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=29)[0]                                      # at 30 seconds torchrun kills
    steps = len(rows(tmp_path / "out"))
    assert (tmp_path / "out" / "latest").read_text() == f"step_{steps:06d}\n" and "stopped by a signal" in said, said
    everything(tmp_path / "out" / f"step_{steps:06d}")


def meet(delay, again):
    os.environ |= {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(again),
        "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"],
    }
    time.sleep(delay * int(os.environ["RANK"]))
    ranks = start_ranks()
    dist.barrier()
    os._exit(0 if ranks.world == 2 else 1)


def test_restarted_ranks_do_not_wait_for_the_dead_ones_whose_addresses_are_in_the_store():
    # torchrun's, which outlives a start
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for again in (0, 1):
        processes = [
            FORKS.Process(target=in_rank, args=(rank, 2, store.port, meet, (0.5 * again, again))) for rank in range(2)
        ]
        for process in processes:
            process.start()
        assert finish(processes, 20) == [0, 0]
