"""Shared by the tests of tools/: one finished tiny run with its report, and a few real questions."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from ares import files
from tests.tools.report_tools import make_report


@pytest.fixture(scope="session")
def world(tmp_path_factory, t5_tokenizer):
    return make_report(tmp_path_factory, t5_tokenizer)


@pytest.fixture(scope="session")
def few(tmp_path_factory, sample):
    """A data root of 60 real questions with a solution, all of them the test split: `root`, `problems`, `qids`."""
    source = sample / "ScienceQA/data/scienceqa"
    problems, splits = (json.loads((source / f"{name}.json").read_text()) for name in ("problems", "pid_splits"))
    qids = [qid for qid in splits["test"] if problems[qid]["solution"].strip()][:60]
    root = tmp_path_factory.mktemp("few")
    problems = {qid: problems[qid] for qid in qids}
    files.write_json(root / "scienceqa/problems.json", problems)
    files.write_json(root / "scienceqa/pid_splits.json", {"train": qids[:1], "val": qids[:1], "test": qids})
    return SimpleNamespace(root=root, problems=problems, qids=qids)
