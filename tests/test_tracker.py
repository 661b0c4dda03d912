"""A run in TensorBoard and in Weights & Biases, read back from their own files; no error of theirs stops a run."""
import json
import os
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tracker
from conftest import four_steps, main_fails, on_ranks, spo_fails, spo_main, train_main
from tracker import Tracker, numbers_of

WATCHED = "--sample_every 2 --sample_steps 2 --probe_every 2 --hold_back 4 --tracker "


def rows_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_every_number_of_a_row_has_a_name():
    row = {"step": 3, "loss": 0.5, "by_sigma": {"margin": [1.0, None, -2]}, "verdicts": {"dead": "nothing moves"},
           "probe": {"pairs": 2, "sigma": [0.6, 0.9]}, "by_step": [None, [4]]}
    assert numbers_of(row) == {
        "step": 3, "loss": 0.5, "by_sigma/margin/0": 1.0, "by_sigma/margin/2": -2, "probe/pairs": 2,
        "probe/sigma/0": 0.6, "probe/sigma/1": 0.9, "by_step/1/0": 4}


# ------------------------------------------------------------------------------------------------------------------
# TensorBoard

def read_events(out):
    """The content of a run in TensorBoard: {name: {step: number}}, {step: picture (H, W, 3)}, the text of the flags."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                      reason="read by tensorboard itself (requirements-video.txt)")
    from PIL import Image
    from io import BytesIO
    events = accumulator.EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    scalars = {}
    for name in events.Tags()["scalars"]:
        points = [(point.step, point.value) for point in events.Scalars(name)]
        assert len(dict(points)) == len(points), f"{name} has two values of one step"
        scalars[name] = dict(points)
    pictures = {image.step: np.asarray(Image.open(BytesIO(image.encoded_image_string)))
                for image in events.Images("samples")}
    [text] = [value.tensor_proto.string_val[0].decode() for value in events.Tensors("config/text_summary")][-1:]
    return scalars, pictures, text


def same_numbers(scalars, rows):
    """Every number of the rows is there, and no other; event files are float32, logs have seven digits."""
    expected = {}
    for row in rows:
        for name, value in numbers_of(row).items():
            expected.setdefault(name, {})[row["step"]] = value
    assert scalars.keys() == expected.keys() and len(scalars) > 40
    for name, values in expected.items():
        assert scalars[name] == pytest.approx(values, rel=2e-6), name


def picture(path):
    from PIL import Image
    return np.asarray(Image.open(path).convert("RGB"))


def test_an_event_file_has_every_number_of_the_log_the_previews_and_the_flags(world, base, tmp_path):
    out = tmp_path / "out"
    on_ranks(1, train_main, four_steps(world, base, out, WATCHED + "tensorboard"))
    scalars, pictures, flags = read_events(out)
    rows = rows_of(out)
    same_numbers(scalars, rows)
    assert scalars["probe/margin/0"].keys() == {1, 3} and [row["step"] for row in rows] == [0, 1, 2, 3]
    assert pictures.keys() == {1, 3}                       # after two steps and after all four
    assert np.array_equal(pictures[1], picture(out / "samples" / "step_000002.png"))
    assert np.array_equal(pictures[3], picture(out / "samples" / "after.png"))
    for line in ("| loss | regdpo |", "| batch_size | 4 |", f"| init | {base} |", "| ranks | 1 |"):
        assert line in flags.splitlines()


def test_a_resumed_run_goes_on_in_the_same_curves_and_replaces_the_steps_that_it_repeats(world, base, tmp_path):
    out = tmp_path / "out"
    flags = four_steps(world, base, out, WATCHED + "tensorboard")
    on_ranks(1, train_main, flags)
    rows = rows_of(out)
    on_ranks(1, train_main, [*flags, "--resume", str(out / "step_000002"), "--log_every", "3"])
    assert len(list((out / "tensorboard").iterdir())) == 2
    scalars, pictures, text = read_events(out)
    same_numbers(scalars, rows_of(out))                    # each step once
    assert scalars["loss"] == pytest.approx({row["step"]: row["loss"] for row in rows}, rel=2e-6)
    assert scalars["seconds"][3] == pytest.approx(rows_of(out)[3]["seconds"], rel=2e-6) != rows[3]["seconds"]
    assert pictures.keys() == {1, 3} and "| log_every | 3 |" in text


def test_spo_sends_its_rows_as_well(spo_world, tmp_path):
    out = tmp_path / "out"
    on_ranks(1, spo_main, [
        "--init", str(spo_world / "base"), "--data", str(spo_world / "data"), "--score", str(spo_world / "scorer"),
        "--out", str(out), "--steps", "2", "--batch_size", "2", "--sample_steps", "4", "--pool", "2", "--updates", "1",
        "--threshold", "0", "--tracker", "tensorboard"])
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    last = numbers_of(rows_of(out)[-1])
    assert last.keys() <= set(events.Tags()["scalars"]) and "by_step/score/0" in last
    for name in ("score_end", "loss", "by_step/score/0"):
        assert [point.step for point in events.Scalars(name)] == [0, 1]
        assert events.Scalars(name)[-1].value == pytest.approx(last[name], rel=2e-6)


# ------------------------------------------------------------------------------------------------------------------
# Weights & Biases

def wandb_main(argv):
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    train_main(argv)


def wandb_records(path):
    """The records of a .wandb file: 7 bytes, then blocks of 32 KiB, as of a LevelDB log, of parts of records."""
    from wandb.proto.wandb_internal_pb2 import Record
    content, place, parts = path.read_bytes(), 7, []
    while place + 7 <= len(content):
        if place % 2 ** 15 > 2 ** 15 - 7:                  # a block's last bytes, too few for a part
            place += 2 ** 15 - place % 2 ** 15
        _, size, kind = struct.unpack("<IHB", content[place:place + 7])       # checksum, size, whole 1 .. last 4
        if place + 7 + size > len(content):                # the rest is not written yet
            return
        parts.append(content[place + 7:place + 7 + size])
        place += 7 + size
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


def finished_records(path, seconds=60):
    """The records of a .wandb file, which a process of wandb's own may still be writing when the run has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        records = list(wandb_records(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.2)
    raise AssertionError(f"{path} has no end after {seconds} s")


def read_wandb(out):
    """For each process of the run: (id, rows with their numbers, {step: picture}, flags)."""
    for folder in sorted((out / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime):
        [file] = folder.glob("*.wandb")
        rows, pictures, flags, run_id = [], {}, {}, None
        for record in finished_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run_id = record.run.run_id
            elif kind == "config":
                flags |= {update.key: json.loads(update.value_json) for update in record.config.update}
            elif kind == "history":
                items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json)
                         for item in record.history.item}
                if "samples/path" in items:
                    pictures[items["step"]] = folder / "files" / items["samples/path"]
                else:
                    rows.append({name: value for name, value in items.items() if not name.startswith("_")})
        yield run_id, rows, pictures, flags


def test_wandb_has_every_number_the_previews_and_the_flags_and_a_resumed_run_is_the_same_run(world, base, tmp_path):
    pytest.importorskip("wandb", reason="tests of the tracker need wandb (requirements-video.txt)")
    out = tmp_path / "out"
    flags = four_steps(world, base, out, WATCHED + "wandb")
    on_ranks(1, wandb_main, flags)
    log = rows_of(out)
    on_ranks(1, wandb_main, [*flags, "--resume", str(out / "step_000002"), "--log_every", "3"])
    first, second = read_wandb(out)
    assert first[0] == second[0] == (out / "wandb_id").read_text()
    for sent, rows in ((first[1], log), (second[1], rows_of(out)[2:])):
        assert [row["step"] for row in sent] == [row["step"] for row in rows]
        for sent_row, row in zip(sent, rows):
            assert sent_row == pytest.approx(numbers_of(row), rel=2e-6)
    assert {step: path.read_bytes() for step, path in first[2].items()} == {
        1: (out / "samples" / "step_000002.png").read_bytes(), 3: (out / "samples" / "after.png").read_bytes()}
    assert first[3]["batch_size"] == 4 and first[3]["init"] == str(base)
    assert (first[3]["log_every"], second[3]["log_every"]) == (10, 3)


# ------------------------------------------------------------------------------------------------------------------
# faults

@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(
        name, world, spo_world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)           # importing it fails
    for message in (main_fails(world, tmp_path, "--tracker", name, "--init", "no such weights"),
                    spo_fails(spo_world, tmp_path, "--tracker", name, "--init", "no such weights")):
        assert f"--tracker {name}: the package {name} cannot be imported" in message
        assert f"pip install {name}" in message
    assert not (tmp_path / "out").exists()


class Broken:
    """A tracker whose every call fails, from the one on that is named."""
    def __init__(self, *arguments):
        self.calls = []
        if os.environ["BROKEN_FROM"] == "start":
            raise ConnectionError("no such server")

    def fail(self, *arguments):
        self.calls.append(arguments)
        raise OSError("no space left")

    numbers = picture = close = fail


@pytest.mark.parametrize("broken_from, said", [("start", "ConnectionError: no such server"), ("row", "no space left")])
def test_a_tracker_that_fails_is_named_once_and_the_run_is_the_run_without_it(
        broken_from, said, world, base, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("BROKEN_FROM", broken_from)
    monkeypatch.setitem(tracker.TRACKERS, "tensorboard", Broken)
    for name in ("tensorboard", "none"):
        train_main(four_steps(world, base, tmp_path / name, WATCHED + name))
    printed = capfd.readouterr().out
    assert printed.count("WARNING: --tracker tensorboard: ") == 1 and said in printed
    rows, plain = rows_of(tmp_path / "tensorboard"), rows_of(tmp_path / "none")
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
    assert (tmp_path / "tensorboard" / "export").is_dir()


def test_a_fault_that_passes_loses_only_what_was_to_be_sent_and_a_new_one_is_named_again(capsys, monkeypatch):
    class Flaky(Broken):
        def numbers(self, step, numbers):
            if step in (1, 2, 4):
                self.fail()
            self.calls.append(step)

    monkeypatch.setenv("BROKEN_FROM", "row")
    monkeypatch.setitem(tracker.TRACKERS, "tensorboard", Flaky)
    flaky = Tracker("tensorboard", Path("out"), 0, {})
    for step in range(6):
        flaky.row({"step": step})
    assert [call for call in flaky.backend.calls if call != ()] == [0, 3, 5]
    assert capsys.readouterr().out.count("WARNING") == 2
