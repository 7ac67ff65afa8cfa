"""Damaged files of a killed run: the other saved state is tried, and a line names the damaged file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from ares import files
from ares.cli import UserError
from rl.metrics import Metrics
from sft import run as sft_run
from tests.rl.rl_tools import make_trainer
from tests.tools.report_tools import parts_of
from tools import report


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "a bit flipped":
        at = len(data) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    elif how == "FIFO":
        path.unlink()
        os.mkfifo(path)
    elif how == "another state":
        torch.save({"name": {"round": 0}}, path)
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "zeros": bytes(len(data))}[how])


WAYS = ("empty", "cut", "zeros", "a bit flipped", "FIFO")


@pytest.mark.parametrize("how", [*WAYS, "another state"])
def test_ppo_continues_from_the_other_slot(how, tmp_path, capsys):
    trainer = make_trainer(tmp_path)
    for done in (1, 2):  # a state after one update in slot 0, after two in slot 1
        trainer.position.update = trainer.position.done = done
        trainer.save_state()
    damage(tmp_path / "slot_1.pth", how)
    again = make_trainer(tmp_path)
    assert again.restore() and again.position.done == 1
    said = capsys.readouterr().err
    assert "slot_1.pth" in said and "going on from the other saved state" in said
    assert again.saves == 1, "the damaged slot is written next"
    damage(tmp_path / "slot_0.pth", how if how != "another state" else "empty")
    with pytest.raises(UserError, match="--run_dir: .*slot_0.pth .*; delete .* to begin this round's PPO anew"):
        make_trainer(tmp_path).restore()


def checkpoints(tmp_path) -> list[Path]:
    from safetensors.torch import save_file

    found = []
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.ones(1000)}, folder / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"a": torch.ones(1000)}, folder / name)
        files.write_json(folder / "trainer_state.json", {"global_step": step, "log_history": [{"loss": 0.5}]})
        found.append(folder)
    return found


@pytest.mark.parametrize("name, how", [
    *((name, how) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth") for how in WAYS),
    *((name, how) for name in ("trainer_state.json", "model.safetensors") for how in WAYS if "bit" not in how),
])  # fmt: skip
def test_sft_continues_from_the_older_checkpoint(name, how, tmp_path, capsys):
    older, newer = checkpoints(tmp_path)
    assert sft_run.newest_undamaged([older, newer]) == str(newer)
    damage(newer / name, how)
    assert sft_run.newest_undamaged([older, newer]) == str(older)
    assert f"{newer / name}" in capsys.readouterr().err
    damage(older / name, how)
    with pytest.raises(UserError, match=f"--run_dir: {older / name} .*; all checkpoints are damaged"):
        sft_run.newest_undamaged([older, newer])


def test_a_checkpoint_whose_loss_is_nan_is_undamaged(tmp_path):
    (folder, _) = checkpoints(tmp_path)
    (folder / "trainer_state.json").write_text('{"global_step": 2, "log_history": [{"loss": NaN}]}')
    assert sft_run.newest_undamaged([folder]) == str(folder)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_nan_and_infinity_do_not_blank_the_report(number, tmp_path, monkeypatch):
    """Every JSON block of the page is JSON to a browser, and the curves of the other numbers are there."""
    monkeypatch.chdir(tmp_path)
    lines = [{"kind": "rollout", "round": 0, "update": 0, "reward": "NUMBER", "mean_sentence_score": 0.5}]
    for update in range(1, 6):
        loss = "NUMBER" if update == 3 else 0.5
        lines.append({"kind": "update", "round": 0, "update": update, "value_loss": loss, "entropy": 1.5})
    write("run/metrics.jsonl", lines, number)
    scores = {"rationale": {"rouge": "NUMBER", "bleu1": 3.0}}
    write("predictions_ans_test.json", [{"preds": ["So."], "labels": ["So."], "scores": scores}], number)
    report.main(["--run", "run", "--stage", "a=predictions_ans_test.json", "--output", "report.html"])
    found = parts_of((tmp_path / "report.html").read_text())
    text = json.dumps(found)
    assert "NaN" not in text and "Infinity" not in text
    assert found["main"]["overview"]["curves"]


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_metrics_with_nan_or_infinity_are_continued(number, tmp_path):
    log = Metrics(tmp_path, "none", {})
    log.log("update", 0, 1, {"loss": float(number), "reward": 0.5})
    path = tmp_path / "metrics.jsonl"
    first = json.loads(path.read_text())
    write(path, [first, {"kind": "update", "round": 0, "update": 2, "loss": "NUMBER"}], number)
    path.write_text(path.read_text() + '{"ki')  # a kill
    log.rewind(0, 2)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["update"] for line in kept] == [1, 2] and kept[1]["loss"] is None


def write(path, lines: list[dict], number: str) -> None:
    """JSON lines in which "NUMBER" is `number`, as no JSON writer of ours would let it pass."""
    files.write_text(path, "".join(json.dumps(line).replace('"NUMBER"', number) + "\n" for line in lines))
