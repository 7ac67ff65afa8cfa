"""haiku_for_correction_feedback.py with the real client against a local server: correction.json and its fallbacks."""

from __future__ import annotations

import itertools
import json
import random

import pytest

import haiku_for_correction_feedback
import preprocessing_for_correction_feedback
from ares import files
from haiku_for_correction_feedback import edit_distance
from teacher import estimate, handoff
from teacher.prompts import CORRECTION_WORDING, PROMPT_VERSION
from tests.api_server import Fault, fill_form
from tests.teacher.teacher_tools import TEXT, sidecar, stops
from tools import win_rate


class Corrections:
    """A data root of four train questions, three with a rationale, and the prepared requests."""

    def __init__(self, server, folder, problems):
        self.server = server
        solved = (qid for qid, problem in problems.items() if problem["split"] == "train" and problem["solution"])
        self.train = list(itertools.islice(solved, 4))
        self.chosen = {qid: problems[qid] for qid in [*self.train, TEXT]}
        self.data, self.requests = folder / "data/scienceqa", folder / "correction"
        self.output = self.data / "correction.json"
        files.write_json(self.data / "problems.json", self.chosen)
        files.write_json(self.data / "pid_splits.json", {"train": self.train, "test": [TEXT]})
        self.flags = ["--data_root", str(folder / "data"), "--correction_dir", str(self.requests)]
        self.preds = [f"Let's see. {qid} is {{it}}" for qid in self.train[:3]]
        rationales = self.rationales("remove_repetitive_sentences", self.preds, self.train[:3])
        preprocessing_for_correction_feedback.main([*self.flags, *rationales])

    def rationales(self, name, preds, qids):
        files.write_json(self.requests.parent / f"{name}.json", {"preds": preds, "qids": qids})
        return ["--rationales", str(self.requests.parent / f"{name}.json")]

    def run(self, *more):
        haiku_for_correction_feedback.main([*self.flags, "--base_url", self.server.url, *more])

    def stops(self, words, *more):
        return stops(lambda: self.run(*more), words)

    @property
    def solutions(self):
        found = json.loads(self.output.read_text())
        assert found.keys() == self.chosen.keys()
        for qid, problem in found.items():
            assert problem | {"solution": ""} == self.chosen[qid] | {"solution": ""}
        return [found[qid]["solution"] for qid in self.train]


@pytest.fixture
def correction(server, tmp_path, problems):
    return Corrections(server, tmp_path, problems)


def test_a_question_that_the_api_refuses_keeps_its_rationale(server, correction, capsys):
    said = "prompt is too long: 250000 tokens > 120000 maximum"
    server.plan = lambda asked: Fault(400, said) if f" {correction.train[0]} is" in asked.text else None
    correction.stops("1 of 3 questions have no reply")
    for _ in range(2):
        correction.run("--accept-missing")
        assert correction.solutions[:3] == correction.preds and len(server.log) == 3
    assert "fell back: no reply 1" in capsys.readouterr().out


def test_correction_file(server, correction, capsys):
    train = correction.train

    def respond(asked):
        if f" {train[0]} is" in asked.text:
            return '{\nOriginal rationale: x.\nFinal rationale: Let\'s see. "It" is {right}.\n}', "end_turn"
        return fill_form(asked) if f" {train[1]} is" in asked.text else ("I cannot do that.", "end_turn")

    server.respond = respond
    correction.run()
    no_rationale = correction.chosen[train[3]]["solution"]
    assert correction.solutions == ['Let\'s see. "It" is {right}.', *correction.preds[1:], no_rationale]
    assert json.loads(correction.output.read_text())[TEXT] == correction.chosen[TEXT]  # not train
    out = capsys.readouterr()
    for words in ("replaced 1", "unchanged 1", "fell back: no_final 1", "of 3 rationales",
                  "mean edit distance of the replaced ones 2.0 words of 5.0"):  # fmt: skip
        assert words in out.out
    assert "1 of 4 train questions have no rationale" in out.err
    assert len(server.asked) == 2 + 3  # the unusable one three times
    assert "no_final" in server.asked[-1].notes[-1] and not server.asked[0].notes
    assert "Correct answer: (" in server.asked[0].text
    # only the corrected text is asked for, in words and by the schema
    for asked in server.asked:
        assert asked.text.count('"Final rationale"') == 1 and "Original" not in asked.text
        assert list(asked.schema["properties"]) == ["Final rationale"] == asked.schema["required"]
    folder = handoff.question_dir(correction.requests, 0, 0, train[1])
    assert json.loads((folder / handoff.REPLY).read_text()).keys() == {"Final rationale"}
    assert sidecar(folder)["prompt_version"] == CORRECTION_WORDING.version != PROMPT_VERSION


def test_replies_of_both_forms_are_read(server, correction):
    """Of a model that repeats the original, and of earlier versions, whose replies stay on disk and in the cache."""
    forms = itertools.cycle([{"Original rationale": "Let's see."}, {}])

    def respond(asked):
        final = json.loads(fill_form(asked)[0])["Final rationale"].replace("see", "think")
        return json.dumps({**next(forms), "Final rationale": final}), "end_turn"

    server.respond = respond
    correction.run()
    assert correction.solutions[:3] == [pred.replace("see", "think") for pred in correction.preds]
    assert len(server.asked) == 3


def test_the_reply_is_estimated_as_the_text_once(server, correction, problems, capsys):
    correction.run("--estimate")
    out = capsys.readouterr().out
    characters = sum(map(len, correction.preds)) + 3 * 105
    expected = characters / estimate.CLAUDE_5.characters_per_token
    assert f"{expected:,.0f} out" in out and "together" not in out and not server.log


def test_correction_refuses_to_write_with_missing_or_outdated_requests(server, correction, capsys):
    train = correction.train
    outdated = correction.rationales("new", ["Quite another.", correction.preds[1]], train[:2])
    words = f"--rationales: 1 requests .*question {train[0]}.*preprocessing_for_correction"
    correction.stops(words, *outdated)
    more = correction.rationales("more", [f"Let's see.  {train[0]} is {{it}}", "Two."], [train[0], train[3]])
    assert not server.log
    correction.stops(f"1 of 4 questions have no reply.*{train[3]}", *more)
    assert not correction.output.exists()
    correction.run(*more, "--accept-missing")
    assert correction.solutions[3] == "Two." and "fell back: no reply 1" in capsys.readouterr().out


def test_a_correction_cut_by_its_stop_reason_falls_back(server, correction, capsys):
    """It reads well and is set aside: a reply that cannot be used, not a missing one."""
    server.respond = lambda asked: (fill_form(asked)[0].replace("see.", "think."), "max_tokens")
    correction.run("--attempts", "1")
    assert correction.solutions[:3] == correction.preds
    assert "fell back: max_tokens 3" in capsys.readouterr().out
    folder = handoff.question_dir(correction.requests, 0, 0, correction.train[0])
    assert (folder / handoff.REFUSED_REPLY).exists()
    handoff.set_reply_aside(folder)  # another rationale is to be asked about
    assert not (folder / handoff.REFUSED_REPLY).exists()


def test_correction_of_other_data_is_refused(correction):
    correction.stops("preprocessing_for_correction_feedback.py", "--correction_dir", str(correction.data))
    files.write_json(correction.data / "pid_splits.json", {"train": correction.train[1:], "test": [TEXT]})
    correction.stops(f"question {correction.train[0]}.*--train_split")


def test_corrections_and_judgements_of_another_teacher_are_refused(
    server, correction, tmp_path, sample, problems, capsys, monkeypatch
):
    with monkeypatch.context() as without_key:
        without_key.delenv("ANTHROPIC_API_KEY")
        haiku_for_correction_feedback.main([*correction.flags, "--teacher", "reference"])
    assert all(text.startswith("Let's see.") and "{it}" not in text for text in correction.solutions[:3])
    before = correction.output.read_bytes()
    correction.stops("not by claude claude-haiku-5-5.*--keep_replies")
    assert correction.output.read_bytes() == before and not server.log
    correction.run("--keep_replies")
    assert "replies by reference" in capsys.readouterr().out

    test = [qid for qid in problems if problems[qid]["split"] == "test"][:3]
    for name in "ab":
        files.write_json(tmp_path / f"{name}.json", {"preds": [f"{name} says so."] * 3, "qids": test})
    argv = [f"A={tmp_path}/a.json", f"B={tmp_path}/b.json", "--data_root", f"{sample}/ScienceQA/data"]
    argv += ["--output", str(tmp_path / "judged")]
    win_rate.main([*argv, "--teacher", "reference"])
    stops(lambda: win_rate.main([*argv, "--base_url", server.url]), r"\(6 of 6\), not by claude")
    win_rate.main([*argv, "--base_url", server.url, "--keep_replies"])
    found = json.loads((tmp_path / "judged/win_rate.json").read_text())
    assert list(found["judge"]["replies_by"].values()) == [6] and not server.log


def test_edit_distance_is_the_textbook_one():
    for a, b, distance in (("", "x y", 2), ("x", "", 1), ("a b c", "a c", 1), ("a b", "b a", 2),
                           ("the cat sat", "the dog sat down", 2), ("k i t t e n", "s i t t i n g", 3)):  # fmt: skip
        assert edit_distance(a.split(), b.split()) == distance == edit_distance(b.split(), a.split())
    dice = random.Random(0)
    for _ in range(200):
        a, b = (dice.choices("abcd", k=dice.randrange(70)) for _ in range(2))
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            before, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
        assert edit_distance(a, b) == row[-1]
