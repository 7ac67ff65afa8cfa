"""Scores: equal to the released figures on real predictions, and sound on any subset and data set."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

import utils_evaluate
from ares.cli import UserError
from teacher.figures import rationale_stats
from tests.conftest import ROOT
from utils_evaluate import (
    accuracy_table,
    bleu,
    extract_answer,
    get_scores,
    rationale_scores,
    resolve_answer,
    rouge_l,
    sentence_similarity,
    training_rouge,
)


@pytest.fixture(scope="module")
def released(fixtures):
    return json.loads((fixtures / "scores.json").read_text())


def test_extracted_answers_are_the_released_ones(fixtures):
    cases = json.loads((fixtures / "extract_ans.json").read_text())["cases"]
    assert len(cases) == 45
    for case in cases:
        assert (extract_answer(case["text"]) or "FAILED") == case["extracted"], case
        letter = extract_answer(case["text"], 5)
        assert ("ABCDE".index(letter) if letter else None) == case["index"], case


def test_answer_beyond_the_options_fails():
    assert extract_answer("The answer is (C).", 3) == "C"
    assert extract_answer("The answer is (C).", 2) is None
    assert extract_answer("The answer is (b).", 2, options=["a", "b"]) == "b"
    assert resolve_answer("The answer is (b).", 2, "7", 42, options=["a", "b"]) == (1, True)


def test_random_fallback_is_seeded_and_within_the_options():
    drawn = [resolve_answer("no idea", 3, str(qid), 42) for qid in range(300)]
    assert all(not parsed for _, parsed in drawn)
    counts = [sum(index == choice for index, _ in drawn) for choice in range(3)]
    assert sum(counts) == 300 and min(counts) > 70  # the released code could draw E for a question of two options
    assert drawn == [resolve_answer("another text", 3, str(qid), 42) for qid in range(300)]
    assert drawn != [resolve_answer("no idea", 3, str(qid), 43) for qid in range(300)]
    assert resolve_answer("The answer is (B).", 3, "1", 42) == (1, True)
    # the same draw in another process, whatever its hash seed; scores need no torch there
    code = (
        "import json, sys; from utils_evaluate import get_scores, resolve_answer as r\n"
        "print([r('', 3, str(q), 42)[0] for q in range(300)])\n"
        "get_scores({'a': 0}, {'a': 'One.'}, {'a': 'One.'}, {'a': {'answer': 0}}, similarity=False)\n"
        "sys.exit('torch' if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [index for index, _ in drawn]


def test_scores_of_real_predictions(released):
    system, problems = released["systems"]["gpt3"], released["problems_meta"]
    references = {qid: problems[qid]["solution"] for qid in system["outputs"]}
    scores = get_scores(system["results"], system["outputs"], references, problems, similarity=False)
    assert scores["answer"] == system["answer"]
    assert list(scores["answer"]) == list(system["answer"])
    assert scores["rationale"] == pytest.approx(system["rationale"], abs=1e-6)
    assert sum(not text.strip() for text in references.values()) == system["n_empty_reference"]
    compared = 0
    for qid, expected in system["per_question_bleu1_bleu4_rougeL"].items():
        if expected is None:
            assert not references[qid].strip()
            continue
        target, prediction = references[qid].strip(), system["outputs"][qid].strip()
        assert bleu(target, prediction) == pytest.approx(expected[:2], abs=1e-6)
        rouge = rouge_l(target, prediction)
        assert rouge == (None if expected[2] is None else pytest.approx(expected[2], abs=1e-6))
        compared += 1
    assert compared == 361 - 37


def test_accuracy_by_topic_is_the_same_rule(released):
    """ScienceQA's own table has the topics too: the average of a topic's questions, as a subset."""
    system, problems = released["systems"]["gpt3"], released["problems_meta"]
    for topic in ("biology", "geography", "punctuation"):
        subset = {qid: answer for qid, answer in system["results"].items() if problems[qid]["topic"] == topic}
        assert (
            accuracy_table(subset, problems)["acc_average"] == (system["scienceqa_evaluate_acc_table"][f"acc_{topic}"])
        )


def test_pairs(released):
    for pair in released["pairs"]:
        target, prediction = pair["target"], pair["prediction"]
        expected = [pair[f"bleu{n}"] for n in (1, 2, 3, 4)]
        assert bleu(target, prediction, (1, 2, 3, 4)) == pytest.approx(expected, abs=1e-9)
        if isinstance(pair["rougeL"], str):  # the package raises on a text without a sentence: skipped
            assert rouge_l(target, prediction) is None
        else:
            assert rouge_l(target, prediction) == pytest.approx(pair["rougeL"], abs=1e-12)
    for case in released["aggregate_cases"]:
        scores = rationale_scores(case["results"], case["data"])
        for ours, theirs in (("bleu1", "bleu1"), ("bleu4", "bleu4"), ("rouge", "rougeL")):
            assert scores[ours] == pytest.approx(100 * case[theirs], abs=1e-9)


WORDS = st.lists(st.sampled_from(["a", "b", "c", "The", "the", ".", ". ", "\n", "  ", "é"]), max_size=25)


@settings(max_examples=300, deadline=None)
@given(WORDS, WORDS)
def test_rouge_is_the_packages(ours, theirs):
    target, prediction = " ".join(ours), " ".join(theirs)
    try:
        expected = Rouge(metrics=["rouge-l"]).get_scores(target, prediction)[0]["rouge-l"]["f"]
    except ValueError:
        expected = None
    assert rouge_l(target, prediction) == expected
    target, prediction = (text.replace("c", "running") for text in (target, prediction))
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(target, prediction)["rougeL"].fmeasure
    assert training_rouge([prediction], [target]) == 100 * expected


def test_rouge_of_a_very_long_sentence_and_of_training():
    """The package recurses once per word; a rationale without a full stop would end the evaluation."""
    words = [str(i) for i in range(1500)]
    assert rouge_l(" ".join(words), " ".join(["x", *words])) == pytest.approx(2 * 1500 / 3001, abs=1e-6)
    assert training_rouge(["The cats sat."], ["the cat sat"]) == pytest.approx(100)  # stemmed, case folded
    assert training_rouge(["a b", "x"], ["a b", "y"]) == pytest.approx(50)
    assert training_rouge([], []) == 0


def test_aokvqa_has_only_the_rows_that_apply(tmp_path):
    problems = {str(i): {"answer": i % 4, "choices": list("abcd"), "hint": "", "image": "image.png"} for i in range(8)}
    path = tmp_path / "problems.json"
    path.write_text(json.dumps(problems))
    answers = {str(i): (i % 4 if i < 6 else 9) for i in range(8)}
    scores = get_scores(answers, None, None, path)
    assert scores == {"answer": {"acc_has_image": "75.00", "acc_average": "75.00"}}
    assert get_scores({"0": 0}, {}, {}, str(path)) == {"answer": {"acc_has_image": "100.00", "acc_average": "100.00"}}
    assert get_scores({}, {"0": " "}, {"0": ""}, problems) == {"rationale": {}}
    for about, words in (
        (({"99": 0}, None, None, path), "question 99 is not in"),
        ((None, {"1": "A."}, {"0": "A."}, path), "question 1 has a rationale but no reference"),
        (({"0": 0}, None, None, tmp_path / "absent.json"), "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            get_scores(*about)


def test_similarity_with_the_real_model():
    predictions = {"a": "Ice melts into water.", "b": "Ice melts into water.", "c": "", "d": "no reference"}
    references = {"a": "Ice turns into water.", "b": "Paris is in France.", "c": "Text.", "d": " "}
    one, other = (sentence_similarity({qid: predictions[qid]}, references) for qid in "ab")
    assert one > 80 and other < 20
    assert sentence_similarity(predictions, references) == pytest.approx((one + other + 0) / 3, abs=1e-3)
    assert sentence_similarity({"a": "Same."}, {"a": "Same."}) == pytest.approx(100, abs=1e-3)
    found = get_scores(None, predictions, references, {})["rationale"]
    assert found.keys() == {"bleu1", "bleu4", "rouge", "similarity"}


def test_similarity_without_its_model_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(utils_evaluate, "SIMILARITY_MODEL", "sentence-transformers/absent-model")
    monkeypatch.setattr(utils_evaluate.importlib.util, "find_spec", lambda name: None)
    utils_evaluate.similarity_model.cache_clear()
    try:
        scores = get_scores(None, {"a": "One. Two."}, {"a": "One."}, {})
    finally:
        utils_evaluate.similarity_model.cache_clear()
    assert scores["rationale"].keys() == {"bleu1", "bleu4", "rouge"}
    assert "sentence similarity skipped" in capsys.readouterr().err


def test_rationale_stats():
    stats = rationale_stats(["Solution: It is ice. It is ice. It melts", "Ice melts at 0.5 degrees."])
    assert stats == {"repeated": 1 / 4, "unfinished": 1 / 2, "sentences": 2.0, "words": pytest.approx(13 / 2)}
    assert rationale_stats([]) == {"repeated": 0, "unfinished": 0, "sentences": 0, "words": 0}


def test_a_prediction_of_blanks_alone_counts_0_in_rouge():
    """As in the released scores, which skip only the empty text."""
    references = {"a": "The cat sat.", "b": "x y", "c": "z"}
    whole = rationale_scores({"a": "The cat sat."}, references)
    for blank in (" ", "   ", "\n", "\t \n", "\u00a0"):
        scores = rationale_scores({"a": "The cat sat.", "b": blank}, references)
        assert scores["rouge"] == pytest.approx(whole["rouge"] / 2)
        more = rationale_scores({"a": "The cat sat.", "b": blank, "c": ""}, references)
        assert scores == more | {name: scores[name] for name in ("bleu1", "bleu4")}
        assert rationale_scores({"b": blank}, references) == {"bleu1": 0.0, "bleu4": 0.0, "rouge": 0.0}
        assert rationale_scores({"a": "The cat sat.", "b": blank}, {**references, "b": " "}) == whole
