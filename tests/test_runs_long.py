"""Nothing lost, the long way: negatives and the reference cache under kills and two processes at once, thousands of steps, millions of entries."""
import json
import signal

import pytest
import torch

from data import read_sample, sample_files
from fsdp_utils import start_ranks
from model import load_wan
from runs import open_errors, score_reference
from sample import make_negatives
from test_runs import base, die_at, finish, start                             # noqa: F401  (base is a fixture)
from test_train import FORKS, world                                           # noqa: F401  (likewise)

pytestmark = pytest.mark.slow


# ------------------------------------------------------------------------------------------------------------------
# what is made once: killed, and by two processes at the same time

def negatives(base, data, change=0):                                          # noqa: F811
    """What sample.py --pairs does, one sample at a time; killed before a change of the folder."""
    torch.set_num_threads(1)
    model = load_wan(base).eval()
    die_at(data / "negatives", change)
    make_negatives(model, "m", data, steps=2, batch_size=1)


def cache(path, change=0):
    """The errors of a reference that is the position itself, 4 a step for 10 steps, written after each; killed before a change of the folder."""
    ranks, key = start_ranks(), {"seed": 0}
    errors = open_errors(path, key, 40)
    die_at(path.parent, change)
    score = lambda mine: torch.tensor(list(mine)) + torch.tensor([[0.0], [0.5]])
    score_reference(path, key, errors, range(10), 4, score, lambda step: [range(4 * step, 4 * step + 4)], ranks, every=0.0)


def kill_until_done(numbers, most, function, *arguments):
    """The same job again and again, each time killed before a random change of its folder, until it comes through. Yields after every kill."""
    while True:
        [code] = finish(start(1, function, *arguments, int(torch.randint(1, most, (), generator=numbers))))
        if code == 0:
            return
        assert code == -signal.SIGKILL
        yield


def contents(folder):
    """All samples that have a name, which must be whole."""
    found = {path.name: read_sample(path) for path in sample_files(folder)} if list(folder.glob("[!.]*")) else {}
    return {name: {key: value.tolist() if torch.is_tensor(value) else value for key, value in sample.items()} for name, sample in found.items()}


def test_negatives_killed_at_random_moments_or_made_by_two_at_once_are_those_of_an_undisturbed_run(world, base, tmp_path):  # noqa: F811
    data = {}
    for name in ("whole", "killed", "two"):
        data[name] = tmp_path / name
        (data[name] / "real").mkdir(parents=True)
        for path in sample_files(world / "data" / "real")[:12]:
            (data[name] / "real" / path.name).hardlink_to(path)
    assert finish(start(1, negatives, base, data["whole"])) == [0]
    expected, seen = contents(data["whole"] / "negatives"), []
    assert len(expected) == 12
    for _ in kill_until_done(torch.Generator().manual_seed(0), 24, negatives, base, data["killed"]):
        now = contents(data["killed"] / "negatives")
        assert now.items() <= expected.items()
        seen.append(len(now))
    assert len(seen) >= 3 and max(seen) > 1 and contents(data["killed"] / "negatives") == expected, seen
    both = [start(1, negatives, base, data["two"], change)[0] for change in (0, 20)]                   # one of them is killed on the way
    assert finish(both) == [0, -signal.SIGKILL] and contents(data["two"] / "negatives") == expected


def test_a_reference_cache_killed_at_random_moments_or_written_by_two_at_once_is_that_of_an_undisturbed_run(tmp_path):
    expected = torch.arange(40.0)[:, None] + torch.tensor([0.0, 0.5])
    for name in ("killed", "two"):
        (tmp_path / name).mkdir()
    path, known = tmp_path / "killed" / "ref_errors.safetensors", [0]
    for _ in kill_until_done(torch.Generator().manual_seed(0), 14, cache, path):
        errors = open_errors(path, {"seed": 0}, 40)                            # whole, or not there
        there = ~errors.isnan().any(1)
        assert torch.equal(errors[there], expected[there])
        known.append(int(there.sum()))
    assert known == sorted(known) and len(set(known)) > 3 and torch.equal(open_errors(path, {"seed": 0}, 40), expected), known
    path = tmp_path / "two" / "ref_errors.safetensors"
    both = [start(1, cache, path, change)[0] for change in (0, 15)]
    assert finish(both) == [0, -signal.SIGKILL] and torch.equal(open_errors(path, {"seed": 0}, 40), expected)
    with pytest.raises(ValueError, match="were scored with seed = 0, this run has seed = 1"):
        open_errors(path, {"seed": 1}, 40)
