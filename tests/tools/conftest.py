"""Fixtures of the report's tests: one finished tiny run and its report for the whole session."""

from __future__ import annotations

import pytest

from tests.tools.report_tools import make_report


@pytest.fixture(scope="session")
def world(tmp_path_factory, t5_tokenizer):
    return make_report(tmp_path_factory, t5_tokenizer)
