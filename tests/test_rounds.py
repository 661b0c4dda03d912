"""Rounds of fresh losers, as docs/WAN.md runs them: its own commands, on a tiny model and few steps."""
import json
import os
import re
import shutil
import subprocess

import pytest

from conftest import ROOT
from samples import read_header, sample_files, weights_digest

# What the page's torchrun does here: one process, few steps.
TORCHRUN = """
torchrun() {
    script=$2; shift 2
    case $script in
        sample.py) set -- "$@" --steps 2 ;;
        train.py) set -- "$@" --steps 2 --batch_size 2 --learning_rate 1e-3 --warmup_steps 1 --ema_decay 0 ;;
    esac
    "$PYTHON" "$ROOT/$script" "$@"
}
set -e
"""


@pytest.mark.slow
def test_two_rounds_make_losers_with_the_newest_weights_and_train_from_them(base, world, tmp_path):
    (tmp_path / "data" / "wan" / "real").mkdir(parents=True)
    for path in sample_files(world / "data" / "real")[:4]:
        shutil.copy(path, tmp_path / "data" / "wan" / "real")
    page = (ROOT / "docs" / "WAN.md").read_text()
    [block] = re.findall(r"^## Rounds.*?^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    environment = os.environ | {"PYTHON": shutil.which("python3"), "ROOT": str(ROOT), "W": str(base)}
    result = subprocess.run(["bash", "-c", TORCHRUN + block], cwd=tmp_path, env=environment, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr[-3000:]

    weights = [base]
    for number in (1, 2):
        run = tmp_path / "out" / f"round_{number}"
        losers = sample_files(tmp_path / "data" / "wan" / f"old_{number}")
        assert len(losers) == 4
        assert {read_header(loser)["metadata"]["model"] for loser in losers} == {weights_digest(weights[-1])}
        config = json.loads((run / "config.json").read_text())
        assert (tmp_path / config["init"]).resolve() == weights[-1].resolve()
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert len(rows) == 2 and rows[0]["margin_abs"] < 1e-3 < rows[1]["margin_abs"]     # the reference is its start
        weights.append(run / "export")
    assert len({weights_digest(path) for path in weights}) == 3
    assert not (tmp_path / "data" / "wan" / "negatives").exists()
