"""Rationales made from gold ones, which the reference Teacher must put in order, and the table of their scores.

    python tests/teacher/reference_probes.py                                               # the demo's questions
    python tests/teacher/reference_probes.py --problems data/scienceqa/problems.json       # real ones, by subject

`ORDER` lists the probes from the best to the worst; `CHEATS` are changes of gold that must not pay.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ares.sentences import split_text
from demo.make_data import KINDS, draw_questions, place_answers
from demo.make_data import problem as as_problem
from teacher.reference import score_sentences

Problem = dict[str, Any]
SUBJECTS = ("natural science", "social science", "language science")
EACH = 40  # questions of a kind in the table
GROUPS = (
    "red blue green yellow orange purple black white brown gray / north south east west / left right / top bottom / "
    "more less / higher lower / larger smaller / farther shorter / hot cold cool warm / one two / first second / "
    "circle square triangle / mammal bird fish reptile insect / past present future / period question exclamation / "
    "same different / like unlike / dominant recessive / always never"
)
CUE = re.compile(r"\b(?:so|therefore|thus|hence|then|answer|option|choice|conclusion)\b", re.I)
SWAPS = {word: group.split() for group in GROUPS.split(" / ") for word in group.split()}


def gold(problem: Problem) -> list[str]:
    return split_text(problem["solution"].replace("\n", "\\n"))


def demo_problems(each: int, seed: int, kinds: Sequence[str] = tuple(KINDS)) -> dict[str, list[Problem]]:
    """`each` different questions of every kind of the demo; all six of the capitals."""
    found = {}
    for name in kinds:
        few = {"capitals": 6}.get(name, each)
        drawn = draw_questions([name], few, seed)
        place_answers(drawn, Random(seed))
        found[name] = [as_problem(question, "train", Random(seed)) for _, question in drawn]
    return found


def concludes(problem: Problem) -> bool:
    """Whether the last gold sentence names the gold choice and there is a sentence before it."""
    sentences = gold(problem)
    return len(sentences) > 1 and names(sentences[-1], problem["choices"][problem["answer"]])


def names(sentence: str, choice: str) -> bool:
    words = [re.findall(r"\w+", text.lower()) for text in (sentence, choice)]
    text, wanted = (" ".join(part) for part in words)
    return f" {wanted} " in f" {text} " or (choice.startswith("a ") and " ".join(words[1][1:5]) in text)


def wrong_choice(problem: Problem, rng: Random) -> str:
    return rng.choice([text for index, text in enumerate(problem["choices"]) if index != problem["answer"]])


def falsify(sentence: str, problem: Problem, rng: Random) -> str | None:
    """The sentence with one fact replaced: a choice, a number, or a word of the lists above; None without any."""
    answer, other = problem["choices"][problem["answer"]], wrong_choice(problem, rng)
    spots = []
    for match in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", sentence, re.I):
        spots.append((match.span(), other))
    for match in re.finditer(r"\d+(?:\.\d+)?", sentence):
        spots.append((match.span(), str(int(float(match[0])) + rng.choice((2, 3, 7)))))
    for match in re.finditer(r"\w+", sentence):
        others = [word for word in SWAPS.get(match[0], ()) if word != match[0]]
        if others:
            spots.append((match.span(), rng.choice(others)))
    names = [name for name in re.findall(r"(?<=\w )[A-Z][a-z]+", problem["hint"])]
    for match in re.finditer(r"(?<=, and )[A-Z][a-z]+|(?<=the )\w+(?=[,.])", sentence):
        pool = names if match[0][0].isupper() else re.findall(r"\ban? (\w+)", problem["hint"])
        others = sorted(set(pool) - {match[0]})
        if others:
            spots.append((match.span(), rng.choice(others)))
    if not spots:
        return None
    (start, end), new = rng.choice(spots)
    return sentence[:start] + new + sentence[end:]


def is_opening(sentence: str) -> bool:
    return re.match(r"(?:Look|Think|Find|Count|Use|Read|To) ", sentence) is not None


def wrong_fact(problem: Problem, others: Sequence[Problem], rng: Random) -> list[str] | None:
    """Gold with one reason falsified, or with another question's in its place."""
    sentences = gold(problem)
    places = [index for index in range(len(sentences) - 1) if not is_opening(sentences[index])]
    rng.shuffle(places)
    for index in places:
        if rng.random() < 0.7:
            new = falsify(sentences[index], problem, rng)
        else:
            new = _of_another(index, sentences, others, rng)
        new = new or _of_another(index, sentences, others, rng)
        if new:
            return [*sentences[:index], new, *sentences[index + 1 :]]
    return None


def _of_another(index: int, sentences: list[str], others: Sequence[Problem], rng: Random) -> str | None:
    """The sentence at this place of a question of the same kind, where gold of both begins alike."""
    pool = [gold(other) for other in others[:40]]
    same = [each[index] for each in pool if len(each) == len(sentences) and each[index] not in sentences]
    return rng.choice(same) if same else None


def wrong_conclusion(problem: Problem, rng: Random) -> list[str]:
    """Gold whose last sentence names another choice, in gold's words where they name the gold choice."""
    sentences, choice = gold(problem), problem["choices"][problem["answer"]]
    other = wrong_choice(problem, rng)
    swapped = re.sub(re.escape(choice), lambda _: other, sentences[-1], flags=re.I)
    if swapped == sentences[-1] or rng.random() < 0.5:
        swapped = f"So, the answer is {other.rstrip('.')}."
    return [*sentences[:-1], swapped]


def without_conclusion(problem: Problem) -> list[str]:
    """Gold without its last sentence and all others that conclude in its way: with "so", or by naming the choice."""
    *sentences, last = gold(problem)
    cue = CUE if CUE.search(last) else re.compile("")
    choice = problem["choices"][problem["answer"]]
    return [text for text in sentences if not (cue.search(text) and names(text, choice))] or sentences


def rephrased(problem: Problem) -> list[str]:
    choice, letter = problem["choices"][problem["answer"]].rstrip("."), "ABCDE"[problem["answer"]]
    return [
        f"The answer is ({letter}).",
        f"Therefore, the correct answer is {choice}.",
        f"The right choice is {choice}.",
        f"So, option {letter} is correct.",
        f"Thus, the best answer must be {choice}.",
    ]


def stutter(problem: Problem, rng: Random) -> list[str]:
    """One sentence of 122 words: the beginning of a gold one, then a word or a phrase of it again and again."""
    words = rng.choice(gold(problem)[-2:]).rstrip(".").split()
    loop = words[-rng.choice((1, 2, 3)) :]
    return [" ".join((words + loop * 122)[:122]) + rng.choice(("", "."))]


def stutter_at_the_end(problem: Problem, rng: Random) -> list[str]:
    return gold(problem)[:-1] + stutter(problem, rng)


Probe = Callable[[Problem, Random], list[str]]
ORDER: dict[str, Probe] = {
    "gold": lambda p, rng: gold(p),
    "one fact wrong": lambda p, rng: p["wrong fact"],
    "no conclusion": lambda p, rng: without_conclusion(p),
    "wrong conclusion": wrong_conclusion,
    "stutter at the end": stutter_at_the_end,
}
BOTTOM: dict[str, Probe] = {"stutter alone": stutter}
CHEATS: dict[str, Probe] = {
    "gold twice": lambda p, rng: gold(p) * 2,
    'gold + "Also," copies': lambda p, rng: gold(p) + [f"Also, {s[0].lower()}{s[1:]}" for s in gold(p)],
    "gold + 5 conclusions": lambda p, rng: gold(p) + rephrased(p),
    "gold + lecture": lambda p, rng: gold(p) + split_text(p["lecture"].replace("\n", "\\n")),
    "gold + hint": lambda p, rng: gold(p) + split_text(p["hint"].replace("\n", "\\n")),
    "gold + 3 openings": lambda p, rng: (
        [
            "Let's think step by step.",
            "Look at the question again.",
            "Find the answer.",
        ]
        + gold(p)
    ),
    "gold + stutter": lambda p, rng: gold(p) + stutter(p, rng),
    "gold without opening": lambda p, rng: [s for s in gold(p) if not is_opening(s)],
    "gold without a reason": lambda p, rng: _without_a_reason(p, rng),
    "conclusion alone": lambda p, rng: gold(p)[-1:],
    "opening alone": lambda p, rng: gold(p)[:1],
    "gold in one sentence": lambda p, rng: [", and ".join(s.rstrip(".") for s in gold(p)) + "."],
    "all conclusions": lambda p, rng: gold(p)[:-1] + [f"So, the answer is {c}." for c in p["choices"]],
}


def _without_a_reason(problem: Problem, rng: Random) -> list[str]:
    sentences = gold(problem)
    places = [index for index in range(len(sentences) - 1) if not is_opening(sentences[index])]
    gone = rng.choice(places) if places else -1
    return [text for index, text in enumerate(sentences) if index != gone]


def value(scores: Sequence[float]) -> tuple[float, float]:
    """(mean score, sum of score - 0.5): the figure, and RL's reward."""
    return mean(scores), sum(scores) - 0.5 * len(scores)


Table = dict[str, list[tuple[float, float]]]


def measure(problems: Sequence[Problem], names: Sequence[str] = (*ORDER, *BOTTOM, *CHEATS)) -> Table:
    """The values of the probes of every question that has them all; the lists are aligned over the questions."""
    found = {**ORDER, **BOTTOM, **CHEATS}
    table: Table = {name: [] for name in names}
    for number, problem in enumerate(problems):
        rng = Random(number)
        wrong = wrong_fact(problem, problems, rng)
        if wrong is None or not concludes(problem):
            continue
        for name in names:
            table[name].append(value(score_sentences(problem, found[name]({**problem, "wrong fact": wrong}, rng))))
    return table


def in_order(table: Table, better: str, worse: str, what: int) -> list[bool]:
    """Per question: whether `better` has a higher mean (what = 0) or sum (1) than `worse`."""
    return [a[what] > b[what] + 1e-9 for a, b in zip(table[better], table[worse], strict=True)]


def pairs() -> list[tuple[str, str]]:
    """(better, worse) of all probes that must be in order."""
    names = list(ORDER)
    return [*zip(names, names[1:], strict=False), *((name, "stutter alone") for name in names[:-1])]


def share_in_order(table: Table, name: str, what: int) -> float:
    """The share of questions where a probe is above the next of ORDER and a lone stutter; a cheat not above gold."""
    if name in CHEATS:
        return 1 - mean(in_order(table, name, "gold", what))
    checks = [in_order(table, better, worse, what) for better, worse in pairs() if better == name]
    return mean(all(row) for row in zip(*checks, strict=True)) if checks else 1.0


def kind_row(kind: str, table: Table) -> str:
    """A kind's line: mean score and sum of each probe of ORDER, and the share of questions with all in order."""
    cells = []
    for name in (*ORDER, *BOTTOM):
        score, total = (mean(value[what] for value in table[name]) for what in (0, 1))
        cells.append(f"{score:.2f} {total:+.2f}")
    shares = []
    for what in (0, 1):
        checks = [in_order(table, better, worse, what) for better, worse in pairs()]
        shares.append(f"{100 * mean(all(row) for row in zip(*checks, strict=True)):.0f}")
    return f"| {kind} ({len(table['gold'])}) | {' | '.join(cells)} | {' / '.join(shares)} |"


def probe_row(name: str, tables: Sequence[Table]) -> str:
    """A probe's line over all questions: mean score, mean sum, share in order for the mean and for the sum."""
    values = [value for table in tables for value in table[name]]
    score, total = (mean(value[what] for value in values) for what in (0, 1))
    weights = [len(table["gold"]) for table in tables]
    shares = [
        sum(share_in_order(table, name, what) * weight for table, weight in zip(tables, weights, strict=True))
        for what in (0, 1)
    ]
    both = " / ".join(f"{100 * each / sum(weights):.0f}" for each in shares)
    return f"| {name} | {score:.3f} | {total:+.2f} | {both} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=Path, help="problems.json of real questions (default: the demo's)")
    args = parser.parse_args()
    if args.problems:
        solved = [each for each in json.loads(args.problems.read_text()).values() if each["solution"].strip()]
        groups = {name: [each for each in solved if each["subject"] == name] for name in SUBJECTS}
    else:
        groups = demo_problems(EACH, 0)
    tables = {name: measure(found) for name, found in groups.items()}
    columns = [*ORDER, *BOTTOM]
    print("| probe | mean score | sum | in order %, mean / sum |", "|---|---|---|---|", sep="\n")
    print(*(probe_row(name, list(tables.values())) for name in (*columns, *CHEATS)), sep="\n")
    print(
        f"\n| kind (questions) | {' | '.join(columns)} | all in order % |", "|---" * (len(columns) + 2) + "|", sep="\n"
    )
    print(*(kind_row(name, table) for name, table in tables.items()), sep="\n")


if __name__ == "__main__":
    main()
