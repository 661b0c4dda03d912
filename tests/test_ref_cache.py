"""
Cached errors of the reference: which run they belong to, which files are refused, when they are scored and written.
"""
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import ref_cache
from fsdp_utils import start_ranks
from memory import MemoryFlags
from ref_cache import RefErrors, open_errors, score_reference


@pytest.fixture
def ranks():
    yield start_ranks()
    torch.distributed.destroy_process_group()


ARGS = {"out": "out", "backward": "joint", "batch_size": 8, "grad_accum": 2, "cp_size": 1, "compile": False, "steps": 3,
        "learning_rate": 1e-4, "switch_every": 0}
FIXED = {"init": "abc", "init_lora": "", "data": "24 items", "seed": 0, "timestep_sampling": "uniform",
         "flow_shift": 3.0, "min_timestep": 600.0, "max_timestep": 1000.0, "beta": 30.0}


def cached(tmp_path, ranks, memory=MemoryFlags(), **changes):
    args = SimpleNamespace(**ARGS | {name: value for name, value in changes.items() if name in ARGS})
    args.out = tmp_path
    return RefErrors(args, FIXED | {name: value for name, value in changes.items() if name in FIXED}, memory, ranks)


def test_errors_belong_to_weights_data_positions_and_the_numerical_path_and_to_nothing_else(
        tmp_path, ranks, monkeypatch):
    names = {cached(tmp_path, ranks).path.name}
    changes = [
        {"init": "abd"}, {"init_lora": "def"}, {"data": "25 items"}, {"seed": 1}, {"flow_shift": 5.0},
        {"timestep_sampling": "logit_normal"}, {"min_timestep": 500.0}, {"max_timestep": 900.0},
        {"backward": "sequential"}, {"batch_size": 16}, {"grad_accum": 4}, {"cp_size": 2}, {"compile": True},
        {"memory": MemoryFlags("chunked")}]
    for change in changes:
        names.add(cached(tmp_path, ranks, **change).path.name)
    two_data_ranks = SimpleNamespace(data_ranks=2, device=ranks.device)
    names.add(cached(tmp_path, two_data_ranks).path.name)
    for file, name, value in ((ref_cache, "matrix_dtype", lambda device_type: torch.bfloat16),
                              (torch, "__version__", "3.0")):
        with monkeypatch.context() as patch:
            patch.setattr(file, name, value)
            names.add(cached(tmp_path, ranks).path.name)
    assert len(names) == len(changes) + 4 - 1              # on two ranks a forward has two pairs, as in four parts
    assert cached(tmp_path, two_data_ranks, batch_size=16).path.name == cached(tmp_path, ranks).path.name
    turns = {cached(tmp_path, ranks, **change).path.name for change in (
        {"switch_every": 2}, {"switch_every": 4}, {"switch_every": 2, "batch_size": 16, "grad_accum": 4})}
    assert len(turns) == 2 and not turns & names           # the second and the third turn after as many positions
    for same in ({"steps": 9}, {"learning_rate": 1.0}, {"beta": 1.0}, {"batch_size": 16, "grad_accum": 4}):
        assert cached(tmp_path, ranks, **same).path.name == cached(tmp_path, ranks).path.name
    assert all(name.startswith("ref_errors_") and name.endswith(".safetensors") for name in names)


def test_what_is_no_file_of_errors_is_named_with_what_to_do(tmp_path):
    path, key, errors = tmp_path / "errors.safetensors", {"seed": 0}, torch.ones(4, 2)
    metadata = {"key": json.dumps(key)}
    save_file({"errors": errors}, path, metadata=metadata)
    assert torch.equal(open_errors(path, key, 3), errors)                      # what is scored beyond stays
    more = open_errors(path, key, 6)
    assert torch.equal(more[:4], errors) and more.shape == (6, 2) and more[4:].isnan().all()
    assert open_errors(tmp_path / "none", key, 2).isnan().all()
    for tensors, stored in (
            ({"errors": torch.ones(4, 3)}, metadata), ({"errors": errors.double()}, metadata),
            ({"other": errors}, metadata), ({"errors": errors}, {"key": "[1]"}), ({"errors": errors}, {"key": "{"}),
            ({"errors": errors}, {})):
        save_file(tensors, path, metadata=stored)
        with pytest.raises(ValueError, match="errors.safetensors: not the errors of a reference.*delete it"):
            open_errors(path, key, 4)
    path.write_bytes(b"cut off")
    with pytest.raises(ValueError, match="not the errors of a reference"):
        open_errors(path, key, 4)


def test_errors_are_complete_when_none_is_missing_and_come_by_position(tmp_path, ranks, capsys):
    errors = cached(tmp_path, ranks)
    assert not errors.is_complete
    asked = []

    def score(part):
        asked.append(part)
        return torch.tensor([[float(p) for p in part], [p + 0.5 for p in part]])

    errors.fill(score, range(1, 3))
    assert asked == [range(8, 12), range(12, 16), range(16, 20), range(20, 24)]            # steps 1 and 2, in two parts
    assert errors.at(range(9, 11)).tolist() == [[9, 10], [9.5, 10.5]]
    assert "0 of 24 positions are in" in capsys.readouterr().out
    resumed = cached(tmp_path, ranks)
    assert not resumed.is_complete and resumed.errors.isnan().sum() == 16
    resumed.fill(score, range(3))
    said = capsys.readouterr().out
    assert "16 of 24 positions are in" in said and "; 8 are scored now" in said
    assert len(asked) == 6 and cached(tmp_path, ranks).is_complete
    assert load_file(errors.path)["errors"].tolist() == [[p, p + 0.5] for p in range(24)]


def test_errors_are_written_every_so_many_seconds_and_at_the_end(tmp_path, ranks, monkeypatch):
    clock, written = [0.0], []

    def score(part):
        clock[0] += 10
        return torch.zeros(2, len(part))

    monkeypatch.setattr(ref_cache.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ref_cache, "write_whole", lambda path, content: written.append(clock[0]))
    errors = torch.full((8, 2), float("nan"))
    score_reference(tmp_path / "e", {}, errors, range(8), 1, score, lambda step: [range(step, step + 1)], ranks)
    assert written == [40, 80, 80]                         # more than 30 seconds later, and once more at the end
    score_reference(tmp_path / "e", {}, errors, range(8), 1, score, lambda step: [range(step, step + 1)], ranks)
    assert written == [40, 80, 80]                         # nothing is missing
