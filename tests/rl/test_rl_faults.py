"""SIGKILL at seeded places of every stage: the same command again gives the same bits (tests/rl/rl_faults.py)."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import ROOT
from tests.rl import rl_faults


def test_a_kill_anywhere_loses_nothing(sample, tmp_path):
    """A subset of the full test, whose result is committed as tests/rl/rl_faults.json."""
    command = [sys.executable, "tests/rl/rl_faults.py", "--kills", "5", "--seed", "3", "--sample", str(sample)]
    output = tmp_path / "result.json"
    done = subprocess.run(
        [*command, "--output", str(output), "--work", str(tmp_path / "work")],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["by_stage"] == dict.fromkeys(rl_faults.STAGES, 1) and result["ok"] == 5
    assert result["files_compared"] > 40 and result["operations"] > 300
    assert all(kill["killed"] and kill["rerun_status"] == 0 for kill in result["results"])


def test_the_committed_result_is_of_twenty_kills_or_more():
    result = json.loads((ROOT / "tests/rl/rl_faults.json").read_text())
    assert result["ok"] == result["kills"] == len(result["results"]) >= 20
    assert min(result["by_stage"].values()) >= 4


def test_a_torn_file_would_be_seen(tmp_path):
    """The test's own eyes: a half-written file under its final name is found, one under a temporary name is not."""
    (tmp_path / "state").mkdir()
    for name in ("state/slot_0.pth", "scores.json", "batch_000000.safetensors", ".tmp-1-2"):
        (tmp_path / name).write_bytes(b'{"a": ')
    assert sorted(line.split(":")[0] for line in rl_faults.torn_files(tmp_path)) == [
        "batch_000000.safetensors", "scores.json", "state/slot_0.pth"
    ]  # fmt: skip
