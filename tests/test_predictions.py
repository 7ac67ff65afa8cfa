"""ares/predictions.py: prediction files of ours and of the released code, and their faults."""

from __future__ import annotations

import json

import pytest

from ares import cli
from ares.predictions import find_predictions, labelled, read_predictions, split_label, unread_note


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_of_ours_and_a_released_one(tmp_path):
    ours = {"preds": ["So.", "Yes."], "qids": ["7", 3], "labels": ["a", "b"], "prompts": ["p", "q"],
            "answers": ["A", None], "num_fail": 1, "scores": {"answer": {"acc_average": "50.00"}},
            "settings": {"seed": 5}}  # fmt: skip
    read = read_predictions(write(tmp_path / "ours.json", ours), "--x", ["1", "2", "3"])
    assert read.by_qid() == {"7": "So.", "3": "Yes."} and (read.num_fail, read.seed) == (1, 5)
    assert (read.labels, read.prompts, read.letters) == (["a", "b"], ["p", "q"], ["A", None])
    assert read.scores == {"answer": {"acc_average": 50.0}}
    released = {"num_fail": None, "preds": ["So.", "Yes."], "labels": [],
                "scores": {"rationale": {"rouge": 1, "similariry": 2.5}}}  # fmt: skip
    write(tmp_path / "old.json", "\ufeff" + json.dumps(released))
    read = read_predictions(tmp_path / "old.json", "--x", ["1", "2"])
    assert read.by_qid() == {"1": "So.", "2": "Yes."} and (read.labels, read.letters) == (["", ""], None)
    assert read.scores == {"rationale": {"rouge": 1.0, "similarity": 2.5}} and (read.num_fail, read.seed) == (None, 42)
    assert read_predictions(tmp_path / "old.json", "--x").qids is None


def test_faults_name_the_flag_and_the_file(tmp_path):
    two = {"preds": ["x", "y"]}
    for content, words in (
        (["x"], 'no list "preds"'),
        ({"preds": "x"}, 'no list "preds"'),
        ({"preds": ["x", 3]}, "preds[1] is no text"),
        ({"preds": ["x"]}, "has 1 rationales but the split has 2 questions; without question ids in the file they"),
        ({"preds": ["x"], "qids": []}, "qids do not match"),
        ({"preds": ["x"], "qids": {"1": 1}}, "qids do not match"),
        (two | {"qids": ["1"]}, "qids do not match"),
        (two | {"qids": ["1", 1]}, "names a question twice"),
        (two | {"labels": ["x"]}, "labels is no list of one text for each of its 2 rows"),
        (two | {"prompts": [None, "y"]}, "prompts is no list"),
        (two | {"answers": ["A", 2]}, "answers is no list"),
        (two | {"scores": [1]}, "scores are not"),
        (two | {"scores": {"answer": {"acc_average": "n/a"}}}, "scores are not"),
        ("[1", "is not JSON"),
    ):
        path = write(tmp_path / "p.json", content)
        with pytest.raises(cli.UserError) as error:
            read_predictions(path, "--x", ["1", "2"], "; do this")
        said = str(error.value)
        assert said.startswith(f"--x: {path}") and words in said and "\n" not in said
        assert ("do this" in said) == ("has 1 rationales" in words)
    read = read_predictions(write(tmp_path / "p.json", two | {"qids": ["1", "9"]}), "--x")
    read.refuse_unknown({"1", "9"}, "--x", "here")
    with pytest.raises(cli.UserError, match="--x: .*p.json holds question 9, which is not in split test"):
        read.refuse_unknown({"1"}, "--x", "in split test")


def test_what_was_asked_for(tmp_path):
    """By the targets, where there are any: texts that cannot be read do not make an answer stage a rationale stage."""
    for texts, parts in (
        (["The answer is (B)."], (True, False)),
        (["Answer: The answer is (B). BECAUSE: It is so."], (True, True)),
        (["Solution: It is so. The answer is (B)."], (True, True)),
        (["Solution: It is so."], (False, True)),
        ([" ", "."], (False, False)),
        (["The answer is (B).", "It is so."], (False, False)),  # no majority for either
        (["The answer is (B).", "The answer is (A).", "It is so."], (True, False)),
    ):
        assert read_predictions(write(tmp_path / "p.json", {"preds": texts}), "--x").parts_asked() == parts
        garbled = {"preds": ["It may be."] * len(texts), "labels": texts}
        if any(parts):
            assert read_predictions(write(tmp_path / "p.json", garbled), "--x").parts_asked() == parts


def test_labels_and_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/k=4", "b"):
        (tmp_path / name).mkdir(parents=True)
    assert split_label("k=4=b") == ("k=4", "b") and split_label(" MM-CoT = b ") == ("MM-CoT", "b")
    assert split_label("runs/k=4") == (None, "runs/k=4") and labelled("runs/k=4") == ("runs/k=4", "runs/k=4")
    assert split_label("A=nowhere=x") == ("A", "nowhere=x") and split_label("a/b=nowhere") == (None, "a/b=nowhere")
    assert split_label("=b") == (None, "=b") and split_label("A=") == (None, "A=")
    assert labelled("runs/one/two.json") == ("one/two.json", "runs/one/two.json")
    for split, word in (("test", "test"), ("val", "eval"), ("train", "train")):
        with pytest.raises(cli.UserError, match=f"--x: b/predictions_ans_{word}.json does not exist"):
            find_predictions("b", "--x", split)
        write(tmp_path / f"b/predictions_ans_{word}.json", {})
        assert find_predictions("b", "--x", split).name == f"predictions_ans_{word}.json"
    assert find_predictions("b/predictions_ans_eval.json", "--x", "test").name == "predictions_ans_eval.json"


def test_unread_answers_are_noted_above_5_percent():
    assert unread_note(5, 100, "x") is None and unread_note(0, 0, "x") is None
    assert unread_note(6.0, 100, "x") == "x: 6 of 100 answers could not be read; each counts as a random choice"
