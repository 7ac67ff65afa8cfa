"""haiku.py --watch beside RL: it scores while RL exports, through all rounds, within one budget."""

from __future__ import annotations

import threading
import time

import pytest

import haiku
from ares import cli, files
from teacher import handoff
from tests.api_server import KEY, fill_form
from tests.conftest import one_line_error, run_script
from tests.teacher.teacher_tools import CHOICES, PICTURE, TEXT, scores


def test_watch_scores_while_rl_exports(server, tmp_path, sample, problems, capsys):
    root = tmp_path / "questions"
    qids = ["952", "155", "363", "1"]

    def export():
        for action in range(2):
            for qid in qids:
                folder = handoff.question_dir(root, action, 0, qid)
                handoff.write_rationale(folder, [f"Attempt {action}.", "Look closely."])
                time.sleep(0.1)
        handoff.mark_exported(root)

    exporting = threading.Thread(target=export)
    exporting.start()
    haiku.main(["--questions_dir", str(root), "--base_url", server.url, "--watch", "0.02", "--poll_seconds", "0.2",
                "--data_root", str(sample / "ScienceQA/data"), "--images", str(sample / "images")])  # fmt: skip
    exporting.join()
    assert len(scores(root)) == 8 and len(server.log) == 8
    assert all(handoff.is_done(root, action) for action in range(2))
    assert sum(bool(asked.images) for asked in server.asked) == 4, "images travel with every action"
    assert "action 1: done" in capsys.readouterr().out


def test_watch_ends(server, tmp_path, sample):
    with pytest.raises(cli.UserError, match="--watch: no mmcot_finished_signal.txt within"):
        haiku.main(["--questions_dir", str(tmp_path), "--base_url", server.url, "--watch", "0.00001",
                    "--poll_seconds", "0.05", "--data_root", str(sample / "ScienceQA/data")])  # fmt: skip
    done = run_script("haiku.py", "--watch", "--batch", check=False, env={"ANTHROPIC_API_KEY": KEY})
    one_line_error(done, "--batch and --watch do not go together")


def test_watch_is_started_first_and_goes_on_through_all_rounds(
    server, tmp_path, sample, problems, monkeypatch, capsys
):
    """RL as its files show it: it refuses a questions folder that it did not make, and renames each round's."""
    run = tmp_path / "run"
    monkeypatch.setattr(haiku, "HEARTBEAT", 0.2)
    rounds, faults = 3, []

    def rl():
        try:
            for number in range(rounds):
                time.sleep(0.5)
                assert not (run / "questions").exists(), "the watcher made it"
                files.write_json(run / "rollouts" / f"round_{number}/plan.json", {})
                files.write_text(
                    run / "args.yaml", f"epochs: {rounds}\nbase_model_dir: some/model\ncontinue_train: false\n"
                )
                for action in range(2):
                    for qid in (PICTURE, CHOICES, TEXT):
                        sentences = [f"Round {number}, rationale {action}."]
                        handoff.write_rationale(handoff.question_dir(run / "questions", action, 0, qid), sentences)
                    time.sleep(0.3)
                handoff.mark_exported(run / "questions")
                deadline = time.monotonic() + 20
                while not all(handoff.is_done(run / "questions", action) for action in range(2)):
                    assert time.monotonic() < deadline, f"round {number} is not answered"
                    time.sleep(0.02)
                time.sleep(0.3)  # it trains
                (run / "questions").rename(run / f"questions_round{number}")
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=rl)
    thread.start()
    haiku.main(["--questions_dir", str(run / "questions"), "--base_url", server.url, "--watch", "0.02",
                "--poll_seconds", "0.1", "--data_root", str(sample / "ScienceQA/data"),
                "--images", str(sample / "images")])  # fmt: skip
    thread.join()
    assert not faults and len(server.log) == 6 * rounds
    for number in range(rounds):
        assert len(scores(run / f"questions_round{number}")) == 6
        assert (run / f"questions_round{number}/teacher/spend.jsonl").exists()
    out = capsys.readouterr().out
    assert "waiting for RL to make it" in out and "waiting for RL to export more" in out
    assert "waiting for RL's next round" in out and out.count("6 answered now") == rounds


def test_watch_counts_all_rounds_towards_the_budget(server, tmp_path, sample, problems):
    run = tmp_path / "run"
    files.write_text(run / "args.yaml", "epochs: 2\nbase_model_dir: m\n")

    def rl():
        for number in range(2):
            files.write_json(run / "rollouts" / f"round_{number}/plan.json", {})
            for qid in (CHOICES, TEXT):
                handoff.write_rationale(handoff.question_dir(run / "questions", 0, 0, qid), [f"Round {number}."])
            handoff.mark_exported(run / "questions")
            deadline = time.monotonic() + 60
            while number == 0 and not handoff.is_done(run / "questions", 0) and time.monotonic() < deadline:
                time.sleep(0.02)
            if number == 0:
                time.sleep(0.5)
                (run / "questions").rename(run / "questions_round0")

    thread = threading.Thread(target=rl)
    thread.start()
    server.respond = lambda asked: (fill_form(asked)[0] + " " * 4000, "end_turn")  # $0.0005 each
    with pytest.raises(cli.Stop, match="--max_usd 0.0015"):
        haiku.main(["--questions_dir", str(run / "questions"), "--base_url", server.url, "--watch", "0.02",
                    "--poll_seconds", "0.1", "--data_root", str(sample / "ScienceQA/data"), "--max_usd", "0.0015",
                    "--images", str(tmp_path),
                    "--concurrency", "1"])  # fmt: skip
    thread.join()
    assert 2 <= len(server.log) < 4
