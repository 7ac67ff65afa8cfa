"""Questions, models and one finished training run that all tests of sft/ share."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace

import pytest

import main
from tests.tiny import make_data, make_model


@pytest.fixture(scope="session")
def root(tmp_path_factory, sample):
    """A data root of 24 + 6 + 8 real questions, with features."""
    return make_data(tmp_path_factory.mktemp("data"), sample)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A T5 without image layers, as flan-alpaca is."""
    return make_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="session")
def flags(root, plain, t5_tokenizer_dir):
    """Flags of a small run; later ones win."""
    return [
        *("--data_root", str(root), "--img_type", "vit", "--model", str(plain), "--tokenizer", str(t5_tokenizer_dir)),
        *("--bs", "4", "--eval_bs", "3", "--lr", "0.003", "--input_len", "64", "--output_len", "16", "--epoch", "2"),
    ]


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory):
    """Three epochs of main.py with evaluation, and its predictions: `folder`, `argv` without --run_dir, `out`."""
    argv = [*flags, "--prompt_format", "QCM-E", "--use_generate", "--epoch", "3"]
    folder, out = tmp_path_factory.mktemp("trained") / "run", io.StringIO()
    with contextlib.redirect_stdout(out):
        main.main([*argv, "--run_dir", str(folder)])
    return SimpleNamespace(folder=folder, argv=argv, out=out.getvalue())
