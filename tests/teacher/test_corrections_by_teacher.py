"""haiku_for_correction_feedback.py with the real client against a local server: correction.json and its fallbacks."""

from __future__ import annotations

import json

import pytest

import haiku_for_correction_feedback
import preprocessing_for_correction_feedback
from ares import cli, files
from haiku_for_correction_feedback import edit_distance
from teacher import handoff
from teacher.handoff import REFUSED_REPLY, set_reply_aside
from tests.api_server import fill_form
from tests.teacher.teacher_tools import TEXT
from tools import win_rate


@pytest.fixture
def correction(tmp_path, sample, problems):
    """A data root of four train questions, three with a rationale, and the prepared requests."""
    train = [qid for qid, problem in problems.items() if problem["split"] == "train" and problem["solution"]][:4]
    chosen = {qid: problems[qid] for qid in [*train, TEXT]}
    data = tmp_path / "data"
    files.write_json(data / "scienceqa/problems.json", chosen)
    files.write_json(data / "scienceqa/pid_splits.json", {"train": train, "test": [TEXT]})
    rationales = tmp_path / "remove_repetitive_sentences.json"
    files.write_json(rationales, {"preds": [f"Let's see. {qid} is {{it}}" for qid in train[:3]], "qids": train[:3]})
    flags = ["--data_root", str(data), "--correction_dir", str(tmp_path / "correction")]
    preprocessing_for_correction_feedback.main([*flags, "--rationales", str(rationales)])
    return flags, train, data / "scienceqa/correction.json", chosen


def test_correction_file(server, correction, capsys):
    flags, train, output, chosen = correction

    def respond(asked):
        if f" {train[0]} is" in asked.text:
            return '{\nOriginal rationale: x.\nFinal rationale: Let\'s see. "It" is {right}.\n}', "end_turn"
        return fill_form(asked) if f" {train[1]} is" in asked.text else ("I cannot do that.", "end_turn")

    server.respond = respond
    haiku_for_correction_feedback.main([*flags, "--base_url", server.url])
    found = json.loads(output.read_text())
    assert found.keys() == chosen.keys()
    assert found[train[0]]["solution"] == 'Let\'s see. "It" is {right}.'
    assert found[train[1]]["solution"] == f"Let's see. {train[1]} is {{it}}"
    assert found[train[2]]["solution"] == f"Let's see. {train[2]} is {{it}}"
    assert found[train[3]] == chosen[train[3]] and found[TEXT] == chosen[TEXT]  # no rationale; not train
    assert {**found[train[0]], "solution": ""} == {**chosen[train[0]], "solution": ""}
    out = capsys.readouterr()
    for words in ("replaced 1", "unchanged 1", "fell back: no_final 1", "of 3 rationales"):
        assert words in out.out
    assert "1 of 4 train questions have no rationale" in out.err
    assert len(server.asked) == 2 + 3  # the unusable one three times
    assert "no_final" in server.asked[-1].notes[-1] and not server.asked[0].notes
    assert "mean edit distance of the replaced ones 2.0 words of 5.0" in out.out
    assert "Correct answer: (" in server.asked[0].text


def test_correction_refuses_to_write_with_missing_replies(server, correction, capsys):
    flags, train, output, chosen = correction
    more = output.parent / "more.json"
    files.write_json(more, {"preds": [f"Let's see.  {train[0]} is {{it}}", "Two."], "qids": [train[0], train[3]]})
    argv = [*flags, "--base_url", server.url, "--rationales", str(more)]
    with pytest.raises(cli.UserError, match=f"1 of 4 questions have no reply.*{train[3]}"):
        haiku_for_correction_feedback.main(argv)
    assert not output.exists()
    haiku_for_correction_feedback.main([*argv, "--accept-missing"])
    assert json.loads(output.read_text())[train[3]]["solution"] == "Two."
    assert "fell back: no reply 1" in capsys.readouterr().out


def test_correction_of_last_rounds_requests_is_refused(server, correction):
    flags, train, output, chosen = correction
    new = output.parent / "new.json"
    files.write_json(new, {"preds": ["Quite another.", f"Let's see. {train[1]} is {{it}}"], "qids": train[:2]})
    with pytest.raises(
        cli.UserError, match=f"--rationales: 1 requests .*question {train[0]}.*preprocessing_for_correction"
    ):
        haiku_for_correction_feedback.main([*flags, "--base_url", server.url, "--rationales", str(new)])
    assert not server.log and not output.exists()


def test_a_correction_cut_by_its_stop_reason_falls_back(server, correction, capsys):
    """It reads well and is set aside: a reply that cannot be used, not a missing one."""
    flags, train, output, chosen = correction
    server.respond = lambda asked: (fill_form(asked)[0].replace("see.", "think."), "max_tokens")
    haiku_for_correction_feedback.main([*flags, "--base_url", server.url, "--attempts", "1"])
    found = json.loads(output.read_text())
    assert [found[qid]["solution"] for qid in train[:3]] == [f"Let's see. {qid} is {{it}}" for qid in train[:3]]
    assert "fell back: max_tokens 3" in capsys.readouterr().out
    folder = handoff.question_dir(flags[-1], 0, 0, train[0])
    assert (folder / REFUSED_REPLY).exists()
    set_reply_aside(folder)  # another rationale is to be asked about
    assert not (folder / REFUSED_REPLY).exists()


def test_correction_by_the_reference_teacher(correction, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    flags, train, output, chosen = correction
    haiku_for_correction_feedback.main([*flags, "--teacher", "reference"])
    found = json.loads(output.read_text())
    for qid in train[:3]:
        assert found[qid]["solution"].startswith("Let's see.") and "{it}" not in found[qid]["solution"]


def test_correction_of_other_data_is_refused(server, correction, sample):
    flags, train, output, chosen = correction
    splits = output.parent / "pid_splits.json"
    files.write_json(splits, {"train": train[1:], "test": [TEXT]})
    with pytest.raises(cli.UserError, match=f"question {train[0]}.*--train_split"):
        haiku_for_correction_feedback.main([*flags, "--base_url", server.url])
    with pytest.raises(cli.UserError, match="preprocessing_for_correction_feedback.py"):
        haiku_for_correction_feedback.main(
            [*flags[:2], "--correction_dir", str(output.parent), "--base_url", "http://x"]
        )


def test_corrections_and_judgements_of_another_teacher_are_refused(server, tmp_path, sample, problems, capsys):
    data = ["--data_root", str(sample / "ScienceQA/data")]
    train = [qid for qid, problem in problems.items() if problem["split"] == "train" and problem["solution"]][:3]
    files.write_json(tmp_path / "r.json", {"preds": ["Look. It is so."] * 3, "qids": train})
    folder = ["--correction_dir", str(tmp_path / "correction")]
    preprocessing_for_correction_feedback.main([*data, *folder, "--rationales", str(tmp_path / "r.json")])
    output = ["--output", str(tmp_path / "correction.json")]
    argv = [*data, *folder, *output]
    haiku_for_correction_feedback.main([*argv, "--teacher", "reference"])
    before = (tmp_path / "correction.json").read_bytes()
    with pytest.raises(cli.UserError, match="not by claude claude-haiku-5-5.*--keep_replies"):
        haiku_for_correction_feedback.main([*argv, "--base_url", server.url])
    assert (tmp_path / "correction.json").read_bytes() == before and not server.log
    haiku_for_correction_feedback.main([*argv, "--base_url", server.url, "--keep_replies"])
    assert "replies by reference" in capsys.readouterr().out

    test = [qid for qid in problems if problems[qid]["split"] == "test"][:3]
    for name in "ab":
        files.write_json(tmp_path / f"{name}.json", {"preds": [f"{name} says so."] * 3, "qids": test})
    argv = [f"A={tmp_path}/a.json", f"B={tmp_path}/b.json", *data, "--output", str(tmp_path / "judged")]
    win_rate.main([*argv, "--teacher", "reference"])
    with pytest.raises(cli.UserError, match=r"\(6 of 6\), not by claude"):
        win_rate.main([*argv, "--base_url", server.url])
    win_rate.main([*argv, "--base_url", server.url, "--keep_replies"])
    found = json.loads((tmp_path / "judged/win_rate.json").read_text())
    assert list(found["judge"]["replies_by"].values()) == [6] and not server.log


@pytest.mark.parametrize(
    "a, b, distance",
    [
        ("", "x y", 2),
        ("x", "", 1),
        ("a b c", "a c", 1),
        ("a b", "b a", 2),
        ("the cat sat", "the dog sat down", 2),
        ("k i t t e n", "s i t t i n g", 3),
    ],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a.split(), b.split()) == distance == edit_distance(b.split(), a.split())


def test_edit_distance_is_the_textbook_one():
    import random

    dice = random.Random(0)
    for _ in range(200):
        a, b = (dice.choices("abcd", k=dice.randrange(70)) for _ in range(2))
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            before, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
        assert edit_distance(a, b) == row[-1]
