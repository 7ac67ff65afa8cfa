"""The offline reference Teacher on real questions: gold high, other questions low, wrong answers 0; no cheap gains."""

from __future__ import annotations

import json
import random
import re
from statistics import mean

import pytest

from ares.sentences import split_text
from teacher.parsing import Verdict
from teacher.reference import compare, correct_rationale, gold_coverage, judge, names_only_gold_option, score_sentences


@pytest.fixture(scope="module")
def problems(sample):
    """60 real questions that have a solution, of all splits."""
    found = json.loads((sample / "ScienceQA/data/scienceqa/problems.json").read_text())
    solved = [problem for problem in found.values() if problem["solution"].strip()]
    return random.Random(0).sample(solved, 60)


@pytest.fixture
def speed():
    return {
        "question": "Compare the motion of two boats. Which boat was moving at a higher speed?",
        "choices": ["a boat that moved 135miles in 10hours", "a boat that moved 240miles in 10hours"],
        "answer": 1,
        "hint": "",
        "image": None,
        "lecture": "An object's speed tells you how fast the object is moving. Speed depends on distance and time.",
        "solution": "Look at the distance each boat moved.\nOne boat moved 240 miles in 10 hours.\nThe other boat "
        "moved 135 miles in 10 hours.\nThe boat that moved 240 miles in 10 hours had the higher speed.",
    }


def gold(problem):
    return split_text(problem["solution"].replace("\n", "\\n"))


def average(problems, rationale):
    """Mean over questions of the mean sentence score of `rationale(problem)`, where it has sentences."""
    scored = [score_sentences(problem, sentences) for problem in problems if (sentences := rationale(problem))]
    assert len(scored) >= 15
    assert all(0 <= score <= 1 and round(score, 1) == score for scores in scored for score in scores)
    return mean(mean(scores) for scores in scored)


def letter(problem, shift=0):
    return "ABCDE"[(problem["answer"] + shift) % len(problem["choices"])]


def choice(problem, shift=0):
    return problem["choices"][(problem["answer"] + shift) % len(problem["choices"])]


def swapped(problem):
    """Gold sentences that name the gold choice, with another choice in its place."""
    pattern = re.compile(re.escape(choice(problem)), re.IGNORECASE)
    return [pattern.sub(lambda _: choice(problem, 1), text) for text in gold(problem) if pattern.search(text)]


def test_gold_is_high_and_other_texts_are_low(problems):
    rng = random.Random(1)
    others = problems[1:] + problems[:1]
    other_of = {id(problem): other for problem, other in zip(problems, others, strict=True)}
    means = {
        "gold": average(problems, gold),
        "gold, sentences shuffled": average(problems, lambda p: rng.sample(gold(p), len(gold(p)))),
        "gold, words shuffled": average(problems, lambda p: [_shuffle(text, rng) for text in gold(p)]),
        "gold, cut in half": average(problems, lambda p: [_half(text) for text in gold(p) if len(text.split()) > 3]),
        "gold, numbers changed": average(problems, _other_numbers),
        "another question's gold": average(problems, lambda p: gold(other_of[id(p)])),
        "gold with the wrong answer": average(problems, swapped),
        "wrong conclusion": average(problems, lambda p: [f"So, the answer is {choice(p, 1)}."]),
        "wrong letter": average(problems, lambda p: [f"The answer is ({letter(p, 1)})."]),
        "right conclusion alone": average(problems, lambda p: [f"The answer is ({letter(p)})."]),
        "name of the gold choice": average(problems, lambda p: [f"{choice(p)}."]),
        "all choices": average(problems, lambda p: ["The answer is " + " or ".join(p["choices"]) + "."]),
        "gold choice denied": average(problems, lambda p: [f"The answer is not {choice(p)}."]),
        "wrong choice denied": average(problems, lambda p: [f"The answer is not ({letter(p, 1)})."]),
        "gold twice": average(problems, lambda p: gold(p) * 2),
    }
    print(*(f"{name:28s} {value:.3f}" for name, value in means.items()), sep="\n")
    assert means["gold"] > 0.93 and means["gold, sentences shuffled"] > 0.9
    assert means["gold, words shuffled"] < 0.45 and means["gold, cut in half"] < 0.35
    assert means["gold, numbers changed"] < 0.5
    assert means["another question's gold"] < 0.1
    assert means["gold with the wrong answer"] < 0.15
    assert means["wrong conclusion"] < 0.02 and means["wrong letter"] == 0
    assert 0.6 < means["right conclusion alone"] < 0.75
    assert means["name of the gold choice"] < 0.2 and means["all choices"] < 0.05
    assert means["gold choice denied"] < 0.02 and means["wrong choice denied"] == pytest.approx(0.5, abs=0.03)
    assert means["gold twice"] == pytest.approx(means["gold"] / 2, abs=0.02)


def _shuffle(text, rng):
    words = text.rstrip(".!?").split()
    return " ".join(rng.sample(words, len(words))) + "."


def _half(text):
    words = text.split()
    return " ".join(words[: len(words) // 2])


def _other_numbers(problem):
    return [
        re.sub(r"\d+", lambda match: str(int(match[0]) + 3), text) for text in gold(problem) if re.search(r"\d", text)
    ]


def test_lecture_hint_and_openings_are_neutral(problems):
    restated = average(problems, lambda p: split_text(p["hint"])) if any(p["hint"] for p in problems) else 0.5
    assert 0.4 < restated < 0.6
    for problem in problems[:20]:
        assert score_sentences(problem, ["Let's think about it step by step."]) == [0.5]
        assert score_sentences(problem, ["Let's eat bananas in a spaceship."]) == [0.3]


@pytest.mark.parametrize(
    "sentence, score",
    [
        ("One boat moved 240 miles in 10 hours.", 1.0),
        ("One boat moved 240 miles in ten hours.", 1.0),
        ("One boat moved 235 miles in 10 hours.", (0.2, 0.45)),  # a wrong number
        ("A boat moved 240 miles in just 10 hours.", (0.6, 1.0)),  # other words
        ("One boat moved 240", (0.0, 0.3)),  # breaks off
        ("Let's look at which boat was moving at a higher", (0.1, 0.3)),  # an opening that breaks off
        ("To find the higher speed, we need to compare the distance that", (0.1, 0.3)),
        ("One boat boat moved 240 miles in 10 hours.", (0.1, 0.3)),  # stutters
        ("The boat that moved 240 miles in 10 hours.", (0.1, 0.3)),  # the bare name of the gold choice
        ("Look at the distance each boat moved.", 0.5),  # an opening, though gold has it
        ("Speed depends on distance and time.", 0.5),  # true, but only the lecture says it
        ("An object's speed tells you how slow the object is moving.", (0.0, 0.45)),
        ("The boat that moved 135 miles in 10 hours had the higher speed.", 0.0),
        ("The boat that moved 240 miles in 10 hours had the lower speed.", (0.2, 0.45)),
        ("The boat that moved 240 miles in 10 hours did not have the higher speed.", (0.0, 0.2)),
        ("So, the answer is (A).", 0.0),
        ("So, the answer is (B).", 0.7),
        ("The answer is not (A).", 0.5),
        ("The answer is not (B).", 0.0),
        ("The answer is (A) or (B).", 0.0),
        ("Boats boats boats boats move boats.", (0.0, 0.3)),
        ("Hours moved 240 miles in 10 hours, boat hours.", (0.1, 0.3)),  # a word more often than in gold
        ("One red boat moved 240 miles in 10 hours.", 0.7),  # says more than gold
        (
            "Purple dragons never eat (A) at midnight.",
            0.0,
        ),  # denies a wrong choice, in other words than the question's
        ("Speed.", 0.0),
        ("Plants make food from sunlight.", 0.0),
        ("...", 0.0),
    ],
)
def test_one_sentence(speed, sentence, score):
    found = score_sentences(speed, [sentence])[0]
    low, high = score if isinstance(score, tuple) else (score, score)
    assert low <= found <= high


def test_rules_that_need_another_question():
    problem = {
        "question": "What is the capital of Texas?", "choices": ["Austin", "Topeka"], "answer": 0, "hint": "",
        "lecture": "", "solution": "It is Austin. The capital of Texas is Austin. A whale is not a fish.",
    }  # fmt: skip
    problem["hint"] = "On Monday the fox ran over the hill near the old mill and slept under a tall tree until dawn."
    assert score_sentences(problem, ["The old fox slept near the mill."]) == [0.5]  # a part of a long hint
    sentences = [
        "Austin.",
        "The capital of Texas is not Topeka.",
        "A whale is not a fish at all.",
        "A whale is a fish.",
    ]
    assert [score_sentences(problem, [sentence])[0] for sentence in sentences] == [0.3, 0.5, 0.9, 0.0]


def test_a_comparison_is_a_tie_within_a_twentieth(speed):
    whole = speed["solution"].replace("\n", " ")
    longer = f"{whole} Speed depends on distance and time."  # mean score 0.80 instead of 0.88
    assert compare(speed, whole, longer).better == compare(speed, longer, whole).better == "tie"
    part = "One boat moved 240 miles in 10 hours. Plants make food."
    assert compare(speed, whole, part) == Verdict(
        "1", "mean sentence score 0.88 and 0.50, gold sentences covered 100% and 25%"
    )
    assert compare(speed, "", whole).better == "2"


def test_a_gold_sentence_is_said_by_a_sentence_that_scores_well(speed):
    scores = score_sentences(speed, ["One boat moved 140 miles in 10 hours.", "One boat moved 240 miles in 10 hours."])
    assert scores[0] < 0.5 and scores[1] == 1.0


def test_saying_it_again_earns_nothing(speed):
    scores = score_sentences(speed, ["One boat moved 240 miles in 10 hours.", "One boat moved 240 miles in 10 hours."])
    assert scores == [1.0, 0.0]
    paraphrase = score_sentences(
        speed, ["One boat moved 240 miles in 10 hours.", "One boat, it moved 240 miles in 10 hours."]
    )
    assert paraphrase[1] <= 0.5


def test_a_conclusion_needs_a_reason(speed):
    speed = {**speed, "solution": "One boat moved 240 miles in 10 hours. So, the answer is (B)."}
    assert score_sentences(speed, ["So, the answer is (B)."]) == [0.7]
    assert score_sentences(speed, gold(speed)) == [1.0, 1.0]


def test_question_without_solution_or_lecture(speed):
    bare = {**speed, "solution": "", "lecture": ""}
    assert score_sentences(bare, ["The answer is (B)."]) == [1.0]
    assert score_sentences(bare, ["The answer is (A)."]) == [0.0]
    assert correct_rationale(bare, "").endswith("The answer is (B).")
    lectured = {**speed, "solution": ""}
    assert score_sentences(lectured, ["Speed depends on distance and time."]) == [1.0]


def test_choices_that_differ_only_in_capitals():
    problem = {
        "question": "How should you write the closing?", "choices": ["Best Wishes,\nHelen", "Best wishes,\nHelen"],
        "answer": 1, "hint": "", "image": None, "lecture": "", "solution": "The second closing is correct.",
    }  # fmt: skip
    assert judge(problem, ["So, the answer is Best Wishes,\nHelen."])[0].score == 0.0
    assert judge(problem, ["So, the answer is Best wishes,\nHelen."])[0].score > 0.5


def test_measures_beside_the_reward(problems, speed):
    assert mean(gold_coverage(problem, " ".join(gold(problem))) for problem in problems) > 0.98
    assert mean(gold_coverage(problem, " ".join(gold(problems[0]))) for problem in problems[1:]) < 0.05
    assert gold_coverage(speed, "One boat moved 240 miles in 10 hours.") == 0.25
    assert names_only_gold_option(speed, "The answer is (B).")
    assert names_only_gold_option(speed, "So, the boat that moved 240 miles in 10 hours was moving at a higher speed.")
    assert not names_only_gold_option(speed, " ".join(gold(speed)))
    assert not names_only_gold_option(speed, "The answer is (A).")
    assert not names_only_gold_option(speed, "")
    capital = {
        "question": "What is the capital of Texas?",
        "choices": ["Austin", "Topeka"],
        "answer": 0,
        "hint": "",
        "lecture": "",
        "solution": "The capital of Texas is Austin. So, the answer is Austin.",
    }
    assert names_only_gold_option(capital, "The answer is Austin.")
    assert not names_only_gold_option(capital, "The capital of Texas is Austin. The answer is Austin.")  # a reason


def test_gold_is_not_corrected(problems):
    def once(problem):
        return " ".join(dict.fromkeys(gold(problem)))

    unchanged = [correct_rationale(problem, " ".join(gold(problem))) == once(problem) for problem in problems]
    assert mean(unchanged) > 0.95


def test_correction_raises_scores_and_mends(problems, speed):
    others = problems[1:] + problems[:1]
    before, after = [], []
    for problem, other in zip(problems, others, strict=True):
        rationale = gold(other)[:3] + [_half(gold(problem)[-1])]
        final = split_text(correct_rationale(problem, " ".join(rationale)))
        before.append(mean(score_sentences(problem, rationale)))
        after.append(mean(score_sentences(problem, final)))
    assert mean(before) < 0.3 and mean(after) > 0.85

    rationale = (
        "Look at the distance each boat moved. One boat moved 240 miles in 10 hours. "
        "One boat moved 240 miles in 10 hours. The other boat moved 100 miles in 10 hours. "
        "So, the boat that moved 135 miles in 10 hours had the higher"
    )
    assert correct_rationale(speed, rationale) == " ".join(gold(speed))
    twice = "One boat moved 240 miles in 10 hours. One boat moved 240 miles in 10 hours. So, the answer is (B)."
    assert correct_rationale(speed, twice) == twice[38:]  # a repeat goes, and nothing comes in its place


def test_any_text_has_scores_and_a_correction(problems):
    rng = random.Random(2)
    for problem in problems[:30]:
        text = "".join(rng.choice("ab<1>(B) .!?\n\"{}0\\n'é") for _ in range(80))
        assert all(0 <= score <= 1 for score in score_sentences(problem, [text, ""]))
        assert score_sentences(problem, split_text(correct_rationale(problem, text)))[-1] >= 0.5


def test_an_answer_that_is_no_choice_is_wrong_and_corrected():
    """Seen in the demo: it scored 0.5 and stayed in the corrected rationale beside the right capital."""
    problem = {
        "question": "What is the capital of Minnesota?", "choices": ["St. Paul", "Austin", "Columbus"], "answer": 0,
        "hint": "", "lecture": "", "solution": "The capital of Minnesota is St. Paul. So, the answer is St. Paul.",
    }  # fmt: skip
    wrote = ["The capital of Minnesota is St. Paul.", "So, the answer is Augusta."]
    assert score_sentences(problem, wrote) == [1.0, 0.0]
    assert correct_rationale(problem, " ".join(wrote)) == problem["solution"]
    assert score_sentences(problem, [wrote[0], "So, the answer is St. Paul."]) == [1.0, 1.0]
    thermometer = problem | {
        "choices": ["5.5°C", "15.5°C"],
        "solution": "The column ends at 5.5°C. The answer is 5.5°C.",
    }
    assert score_sentences(thermometer, ["The column ends at 5.5°C.", "The answer is 5."]) == [1.0, 0.0]
