"""The intervals of docs/RESULTS.md: they hold what they say, and rows that do not belong together are refused."""
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import paired


def test_an_interval_covers_the_true_difference_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(paired, "DRAWS", 300)
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        captions = generator.normal(1.5, 1.0, size=(1, 256))                   # what a caption costs any model
        first = captions + 0.1 + generator.normal(0, 0.4, size=(1, 256))
        second = captions + generator.normal(0, 0.4, size=(1, 256))
        mean, low, high = paired.paired_difference(first, second, seed=trial)
        assert low < mean < high and high - low < 0.2                          # unpaired it would be 0.37
        covered += low < 0.1 < high
    assert 180 < covered < 199


def test_seeds_that_differ_widen_an_interval_and_a_base_meets_every_seed():
    base = np.full((1, 256), 2.0)
    alike = paired.paired_difference(np.array([[1.5] * 256] * 3), base)
    apart = paired.paired_difference(np.array([[1.4] * 256, [1.5] * 256, [1.6] * 256]), base)
    assert alike == pytest.approx((-0.5, -0.5, -0.5))
    assert apart[0] == pytest.approx(-0.5) and apart[2] - apart[1] > 0.1


def test_the_frechet_interval_is_around_the_plain_difference():
    def run(distance, shift):
        noise = np.random.default_rng(1).normal(0, 0.05, 200)                  # the same draws of captions
        return {"frechet": distance, "frechet_resampled": (distance + shift + noise).tolist()}

    mean, low, high = paired.paired_frechet([run(0.3, 0.1)], [run(0.2, 0.1)])
    assert mean == pytest.approx(0.1) and low == pytest.approx(0.1) and high == pytest.approx(0.1)


def test_an_interval_without_0_is_bold():
    assert paired.in_words(-0.2, -0.3, -0.1) == "**-0.200 [-0.300, -0.100]**"
    assert paired.in_words(-0.2, -0.5, 0.1) == "-0.200 [-0.500, +0.100]"


def test_a_table_of_two_codes_or_two_bases_is_refused():
    report = pytest.importorskip("report", reason="needs matplotlib")
    same = {"dpo": [{"code": "a", "init": "x"}], "sft": [{"code": "a", "init": "x"}]}
    report.check_one_code("main", same)
    for change in ({"code": "b", "init": "x"}, {"code": "a", "init": "y"}):
        with pytest.raises(SystemExit, match="table 'main': expected runs of one (code|init), found 2"):
            report.check_one_code("main", same | {"ipo": [change]})
