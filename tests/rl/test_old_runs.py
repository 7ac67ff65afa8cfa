"""Run folders that an older commit began are finished by the present code, with the same numbers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import haiku
from rl import rollouts
from tests.api_server import ApiServer
from tests.rl import rl_tools
from tests.rl.rl_tools import flags, launch, metrics_of, weights
from tests.teacher.teacher_tools import many_items, scores

TRAIN = {"phase": "train", "rl_epochs": 2, "save_minutes": 0, "log_term": 1}


@pytest.fixture(scope="module")
def run_old(old_code):
    """`run(*argv, script=...)` runs a script of the old commit; with `kill_at` until it prints that."""

    def run(*argv, script: str = "run_mm_cot_rl.py", kill_at: str | None = None) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        env.pop("PYTHONPATH", None)
        how = {"cwd": old_code, "env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process, said = subprocess.Popen([sys.executable, script, *map(str, argv)], **how), []
        for line in process.stdout:
            said.append(line)
            if kill_at is not None and kill_at in line:
                process.send_signal(signal.SIGKILL)
        assert process.wait() == (0 if kill_at is None else -signal.SIGKILL), "".join(said[-30:])

    return run


@pytest.fixture(scope="module")
def old(run_old, rl_world):
    """`run_old` as `run`, and a small world."""
    return SimpleNamespace(run=run_old, **vars(rl_world))


@pytest.fixture(scope="module")
def collected(old):
    """A run folder that the old code collected, with replies."""
    run = old.tmp / "collected"
    old.run(*flags(old, run, phase="collect"))
    rl_tools.answer(run / "questions")
    return run


def same_weights(one, two, base) -> None:
    """The distance is at most 1% of what 8 updates moved, per tensor: the head's gradient is summed in another order.

    The bias of the image attention's keys is not compared: the soft-max does not depend on it, so its gradient is
    rounding noise, which AdamW scales up.
    """
    a, b, start = weights(one / "0"), weights(two / "0"), rl_tools.weights_of_base(base)
    assert a.keys() == b.keys()
    for name in start:
        x, y, z = (each[name].double() for each in (a, b, start))
        if name.endswith("in_proj_bias"):
            x, y, z = (torch.cat([each.chunk(3)[0], each.chunk(3)[2]]) for each in (x, y, z))
        assert 1e-3 < (y - z).norm() and (x - y).norm() <= 0.01 * (y - z).norm(), name
    for name in a.keys() - start.keys():
        torch.testing.assert_close(a[name], b[name], atol=2e-3 if "in_proj_bias" in name else 1e-4, rtol=0, msg=name)


@pytest.fixture(scope="module")
def finished(old, collected):
    """The old collection, trained by the present code; flags are compared with the recorded ones on the way."""
    run = old.tmp / "finished"
    shutil.copytree(collected, run)
    launch(old, run, **TRAIN)
    return run


def test_the_same_seed_gives_the_samples_of_the_old_code(old, collected, tmp_path):
    launch(old, tmp_path / "run", phase="collect")
    before, after = (rollouts.RolloutStore(run, 0).load() for run in (collected, tmp_path / "run"))
    assert before.keys() == after.keys() and torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.columns, after.columns)
    for name in rollouts.FIELDS[1:]:
        torch.testing.assert_close(getattr(before, name), getattr(after, name), atol=2e-6, rtol=1e-5)


def test_a_run_that_the_old_code_killed_in_ppo_is_finished(old, collected, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(collected, run)
    old.run(*flags(old, run, **TRAIN), kill_at="update 5:")  # of 8: in the second epoch
    assert list((run / "state").glob("slot_*.pth")) and not (run / "0").exists()
    launch(old, run, **TRAIN)
    assert "going on with PPO at epoch 2, update" in capsys.readouterr().out
    same_weights(run, finished, old.base)
    for line, other in zip(metrics_of(run, "update"), metrics_of(finished, "update"), strict=True):
        assert line.pop("kind") == other.pop("kind") and line == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_a_round_that_the_old_code_trained_has_the_present_weights_and_is_continued(
    old, collected, finished, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(collected, run)
    old.run(*flags(old, run, **TRAIN))
    same_weights(run, finished, old.base)
    launch(old, run, phase="collect", base_model_dir=run / "0", continue_train=True, run_dir=None, ref_model=None)
    rl_tools.answer(run / "questions")
    launch(old, run, phase="train", rl_epochs=1, base_model_dir=run / "0", continue_train=True, run_dir=None,
           ref_model=None)  # fmt: skip
    steps = {int(state["step"]) for state in rl_tools.optimizer_of(run / "1")["state"].values()}
    assert steps == {8 + 4}, "the optimizer continues from the old code's state"


# -- the Teacher's half ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["live", "batch"])
def test_what_the_old_client_asked_is_not_asked_again(run_old, problems, sample, tmp_path, api_environment, how):
    """Half of a folder answered, or a batch submitted, by the old client; the present one does the rest."""
    questions = tmp_path / "questions"
    many_items(questions, 8, problems)  # 4 actions
    with ApiServer() as server:
        argv = ["--questions_dir", questions, "--base_url", server.url, "--data_root", sample / "ScienceQA/data"]
        argv = [*map(str, argv), "--cache", str(tmp_path / "cache")]
        if how == "live":
            run_old(*argv, "--actions", 0, 1, script="haiku.py")
            assert len(scores(questions)) == 4 == len(server.log)
            haiku.main(argv)
            asked = Counter(text for text, _ in server.log)
        else:
            run_old(*argv, "--batch", "--submit-only", script="haiku.py")
            assert len(server.batches) == 1 and not scores(questions)
            haiku.main([*argv, "--batch", "--poll_seconds", "0.1"])
            asked = server.paid
            assert len(server.batches) == 1
        assert set(asked.values()) == {1} and len(asked) == len(scores(questions)) == 8
