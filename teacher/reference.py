"""The offline reference Teacher: scores and corrects a rationale from the question's own gold texts.

It replaces Claude where there is no key (demo, tests, a first try). It knows nothing of the world and sees no
image: it compares words with the gold solution, the lecture, the hint, the question and the choices. Deterministic;
scores are steps of 0.1. A paraphrase, a right sentence in other words than gold's, gets less than it deserves.
It is called by teacher/client.py: `python haiku.py --teacher reference`.

How two sentences are compared (`Match`, 0-1) is in teacher/text_similarity.py, what is known of gold in
teacher/gold_texts.py, means over many rationales in teacher/figures.py. Its score (`score_of`)
falls linearly from 1.0 at 0.9 to 0 at 0.25; 0.9 at most where the words are not the same.

First each sentence is judged by itself, in reading order; the first rule that applies decides (`_judge_one`):
 1. loop, 0.0: says the same words again and again, or is far longer than every sentence of the question's texts.
 2. repeat, 0.0: says word for word what an earlier sentence said.
 3. gold, 1.0: says word for word what an unused gold sentence says (0.5 if it is an opening or has no content word).
 4. wrong answer, 0.1: asserts another choice as the answer, denies the gold choice, names several choices, calls
    something the answer that shares no word with gold choice, solution and question, or is a wrong fact (5) in the
    place of gold's conclusion.
 5. wrong fact, 0.1: like a gold sentence but with another number, name, colour, choice or word of the question's
    texts in place of gold's own.
 6. broken, 0.1: breaks off, or has a word twice in a row. The bare name of a choice gets at most 0.3.
 7. opening, 0.5: an instruction without a claim ("Look at the ...", "To find out which ..., we need to ..."), mostly
    in words of the question's texts, or like such a gold sentence.
 8. repeat, 0.0: says in other words what an earlier sentence said of gold, or the conclusion again.
 9. the best of: gold, the score of the similarity to an unused gold sentence; conclusion, 1.0 for asserting the gold
    choice as the answer and no more (0.5 if gold's solution does not assert one); elimination, 0.5 for denying a
    wrong choice; neutral, up to 0.5 for restating question, hint or lecture.

Then the rationale as a whole lowers scores (`_weigh`), never raises them:
 a. A conclusion is worth 0.4 plus 0.6 times the share of gold's reasons that were given (a wrong or half right one
    counts two thirds; a reason given both right and wrong is wrong, and its right form gets 0.5).
 b. Without the right conclusion nothing earns credit: with a wrong answer anywhere, or with no conclusion where gold
    has one, no score is above 0.5; with none, the last sentence gets at most 0.3, or 0.0 if no reason is given.
 c. With a loop anywhere no score is above 0.3.
 d. For each opening fewer than gold's, one sentence from the beginning gets 0.5 at most, as the opening would.
 e. Of sentences that say a gold one only partly (0.5 or less), each after the first gets at most 0.1.
 f. Openings, eliminations and neutral sentences beyond the number of gold's openings are padding: at most 0.4, and
    at most the mean of the other sentences.

So neither the sum of (score - 0.5), RL's reward, nor the mean rises by copies, rephrasing, padding or omission, and
gold > a wrong fact > no conclusion > a wrong conclusion > a loop (table: docs/teacher.md).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from ares.sentences import split_text
from teacher.gold_texts import Material, read_gold, texts_of
from teacher.parsing import Verdict
from teacher.text_similarity import (
    ANSWER_WORDS,
    Match,
    Sentence,
    containment,
    f1,
    lcs,
    score_of,
    share,
    similarity,
    swaps_a_word,
)

VERSION = "reference-3"  # raise it with every change that can change a score
COVERED = 0.7  # a gold sentence is said by a sentence of at least this score
REWORDED = 0.9  # at most, for what is not gold's own words: an exchanged word may be a synonym or a mistake
NEUTRAL = 0.5  # no reward in RL
WRONG = 0.1
PADDING = 0.4
NO_REASON = 0.4  # a right answer without a reason
ATTEMPT = 2 / 3  # what a wrong or half right reason counts of a right one
NO_CONCLUSION = 0.3
LOOP = 0.3
# similarities before penalties, from which on a sentence is a try at a gold sentence, replaces a fact of its kind in
# it, has its form with a word or two exchanged
TRY, ALIKE, SAME_FORM = 0.25, 0.4, 0.5

_OPENING_WORDS = Counter(
    dict.fromkeys("think look see start begin go work find solv step first about care".split(), 9)
)


def score_sentences(problem: Mapping[str, Any], sentences: Sequence[str]) -> list[float]:
    """One score per sentence, in order, 0.0-1.0 in steps of 0.1."""
    return [judgement.score for judgement in judge(problem, sentences)]


@dataclass(frozen=True)
class Judgement:
    """What was found about one sentence: the score, the rule that gave it, and the gold sentence that it is about."""

    score: float
    kind: str  # repeat, gold, loop, wrong answer, wrong fact, broken, opening, conclusion, elimination, neutral
    gold: int | None = None  # index among the gold sentences, where the sentence says one or gets it wrong


def judge(problem: Mapping[str, Any], sentences: Sequence[str]) -> list[Judgement]:
    """Score the sentences of one rationale in order and say why (the rules: module docstring)."""
    material = read_gold(texts_of(problem))
    return _weigh(_judge_each([material.sentence(text) for text in sentences], material), material)


@dataclass(frozen=True)
class Figures:
    """What was found about one rationale.

    scores: of its sentences; covered: share of the gold sentences that some sentence says (with a similarity that
    scores 0.7 or more); concluded: see `concluded_choice`; only_option: whether it names the gold choice and nothing
    else but words of the question. A sentence that is one of gold's reasons is something else, even if it consists of
    the question's words ("The capital of Texas is Austin.").
    """

    scores: tuple[float, ...]
    covered: float
    concluded: int | None
    only_option: bool


def figures_of(problem: Mapping[str, Any], rationale: str) -> Figures:
    """The figures of one rationale; kept, as tables and reports ask for the same ones again."""
    return _read_figures(texts_of(problem), rationale)


@functools.lru_cache(maxsize=1 << 16)
def _read_figures(texts: tuple[Any, ...], rationale: str) -> Figures:
    material = read_gold(texts)
    said = material.read(rationale)
    judged = _judge_each(said, material)
    return Figures(
        scores=tuple(each.score for each in _weigh(judged, material)),
        covered=_covered(said, material),
        concluded=_concluded(said, material),
        only_option=_names_only_gold(said, judged, material),
    )


def concluded_choice(problem: Mapping[str, Any], rationale: str) -> int | None:
    """The choice that the last concluding sentence asserts as the answer; None without one.

    A sentence concludes if it says so ("So, ...", "the answer is ...") and names one choice, or, where no sentence of
    the gold solution does, if it puts a choice where a gold sentence names the gold one.
    """
    material = read_gold(texts_of(problem))
    return _concluded(material.read(rationale), material)


def _concluded(said: Sequence[Sentence], material: Material) -> int | None:
    for sentence in reversed(said):
        named = material.concluded(sentence)
        if len(named) == 1:
            return next(iter(named))
    return None


def _covered(said: Sequence[Sentence], material: Material) -> float:
    word_for_word = {sentence.tokens for sentence in said}
    covered = [
        gold.tokens in word_for_word
        or any(score_of(material.matches(sentence)[index].similarity) >= COVERED for sentence in said)
        for index, gold in enumerate(material.gold)
    ]
    return sum(covered) / len(covered)


def compare(problem: Mapping[str, Any], first: str, second: str) -> Verdict:
    """Which rationale is worth more: half its mean sentence score plus half its gold coverage.

    A difference below 0.05, less than one sentence of a usual rationale, is a tie.
    """
    worths = []
    for text in (first, second):
        found = figures_of(problem, text)
        worths.append((sum(found.scores) / len(found.scores) if found.scores else 0.0, found.covered))
    ours, theirs = (sum(worth) / 2 for worth in worths)
    better = "tie" if abs(ours - theirs) < 0.05 else "1" if ours > theirs else "2"
    (score_1, covered_1), (score_2, covered_2) = worths
    return Verdict(
        better,
        f"mean sentence score {score_1:.2f} and {score_2:.2f}, "
        f"gold sentences covered {covered_1:.0%} and {covered_2:.0%}",
    )


def _names_only_gold(said: Sequence[Sentence], judged: Sequence[Judgement], material: Material) -> bool:
    words = {word for sentence in said for word in sentence.content}
    named = set().union(*(sentence.options for sentence in said))
    if named != {material.answer} or not words <= material.frame | {f"<{material.answer}>"}:
        return False
    return not any(each.gold in material.reasons and each.score >= COVERED for each in judged)


# -- one sentence ----------------------------------------------------------------------------------------


def _judge_each(sentences: Sequence[Sentence], material: Material) -> list[Judgement]:
    """The sentences in reading order, before the rationale as a whole counts."""
    seen: set[tuple[str, ...]] = set()
    used: set[int] = set()
    judgements = []
    for sentence in sentences:
        if _loops(sentence, material):
            judgement = Judgement(0.0, "loop")
        elif sentence.tokens in seen:
            judgement = Judgement(0.0, "repeat")
        else:
            judgement = _judge_one(sentence, material, used)
        if judgement.kind in ("gold", "conclusion", "opening") and judgement.gold is not None:
            if judgement.score > NEUTRAL or judgement.kind == "opening":
                used.add(judgement.gold)
        seen.add(sentence.tokens)
        judgements.append(judgement)
    return judgements


def _judge_one(sentence: Sentence, material: Material, used: set[int]) -> Judgement:
    for index, gold in enumerate(material.gold):
        if sentence.tokens == gold.tokens and index not in used and sentence.stutters == gold.stutters:
            if index in material.openings or not sentence.content:
                return Judgement(NEUTRAL, "opening", index)
            return Judgement(1.0, "gold", index)
    if not sentence.content:
        return Judgement(0.2 if sentence.tokens else 0.0, "neutral")
    matches = material.matches(sentence)
    wrong = _wrong(sentence, material, matches, used)
    if wrong is not None:
        return wrong
    if not sentence.finished or sentence.stutters or sentence.repeats()[0] > material.same_word:
        return Judgement(WRONG, "broken")
    limit = 0.3 if sentence.tokens == (f"<{material.answer}>",) else 1.0

    scores = [min(REWORDED, score_of(match.similarity)) for match in matches]
    best = max(range(len(scores)), key=lambda index: (scores[index], index not in used))
    begins = sentence.opening()
    if begins or (best in material.openings and scores[best] >= NEUTRAL):
        rest = Sentence(sentence.text[begins:], material.choices).content - _OPENING_WORDS
        on_topic = not rest or share(rest, material.words) >= 0.6
        return Judgement(NEUTRAL if on_topic else 0.3, "opening")
    concludes = material.only_concludes(sentence)
    if scores[best] >= COVERED and best in used or concludes and material.conclusions and material.conclusions <= used:
        return Judgement(0.0, "repeat")

    scores = [max(score, WRONG) if match.raw > TRY else score for score, match in zip(scores, matches, strict=True)]
    candidates = [Judgement(0.0, "neutral")]
    candidates += [Judgement(score, "gold", index) for index, score in enumerate(scores) if index not in used]
    if concludes:
        unused = max(material.conclusions - used, default=None)
        candidates.append(Judgement(NEUTRAL if unused is None else 1.0, "conclusion", unused))
    known = share(sentence.content, material.words)
    if sentence.negated and sentence.options and material.answer not in sentence.options and known >= 0.6:
        candidates.append(Judgement(NEUTRAL, "elimination"))
    if len(sentence.content) > 1:
        candidates.append(Judgement(min(NEUTRAL, _restated(sentence, material)), "neutral"))
    found = max(candidates, key=lambda judgement: judgement.score)
    return replace(found, score=min(limit, found.score))


def _restated(sentence: Sentence, material: Material) -> float:
    """How far the sentence is a part of question, hint or lecture, as a score."""
    return score_of(max((containment(sentence, other) for other in material.neutral), default=0.0))


def _wrong(sentence: Sentence, material: Material, matches: Sequence[Match], used: set[int]) -> Judgement | None:
    """The judgement of a sentence that gold rules out: a wrong answer or a wrong fact."""
    nearest = max(range(len(matches)), key=lambda index: matches[index].raw)
    if _contradicts(sentence, material, matches):
        answers = sentence.concludes or sentence.says_no_more or material.concluded(sentence)
        return Judgement(WRONG, "wrong answer" if answers else "wrong fact", nearest)
    if any(sentence.tokens == gold.tokens for gold in material.gold):
        return None
    known = material.words.keys()
    about = [
        index
        for index, (gold, match) in enumerate(zip(material.gold, matches, strict=True))
        if index not in material.openings
        and gold.negated == sentence.negated
        and (match.replaced and match.raw >= ALIKE or match.raw >= SAME_FORM and swaps_a_word(sentence, gold, known))
    ]
    if not about or _restated(sentence, material) >= 0.9:
        return None
    others = set(range(len(matches))) - material.openings - set(about)
    if any(score_of(matches[index].similarity) >= COVERED for index in others):
        return None  # it says another gold sentence
    nearest = max(about, key=lambda index: (index not in used, matches[index].raw))
    return Judgement(WRONG, "wrong answer" if nearest in material.conclusions else "wrong fact", nearest)


def _contradicts(sentence: Sentence, material: Material, matches: Sequence[Match]) -> bool:
    """Whether the sentence asserts something about the choices that the gold answer rules out."""
    named = sentence.options or sentence.asserted(material.choices)
    wrong = named - {material.answer}
    pairs = list(zip(material.gold, matches, strict=True))
    if wrong and any(wrong <= gold.options and match.similarity >= 0.8 for gold, match in pairs):
        return False  # gold itself says so
    moved = wrong and material.answer not in named  # stands where a gold sentence names the gold choice
    if moved and any(
        material.answer in gold.options
        and gold.negated == sentence.negated
        and f1(lcs(sentence.frame, gold.frame), len(sentence.frame), len(gold.frame)) >= 0.6
        for gold in material.gold
    ):
        return True
    if sentence.negated:
        denied = named == {material.answer} and sentence.concludes
        return denied and not any(gold.negated and match.similarity >= 0.6 for gold, match in pairs)
    if not wrong:
        return not named and _names_no_choice(sentence, material)
    return sentence.concludes or not sentence.content.keys() - {f"<{option}>" for option in named}


def _names_no_choice(sentence: Sentence, material: Material) -> bool:
    """Whether something is called the answer that has no word of the gold choice, the solution or the question."""
    if not sentence.calls_answer:
        return False
    named = sentence.content.keys() - ANSWER_WORDS
    return bool(named) and named.isdisjoint(material.answer_words | material.frame)


def _loops(sentence: Sentence, material: Material) -> bool:
    """Goes round in circles, compared with the question's texts, or is far longer than each of their sentences."""
    word, pairs = sentence.repeats()
    many = word > material.same_word + 1 or pairs > material.same_pairs + 2
    return many or len(sentence.words) > material.longest


# -- the rationale as a whole ------------------------------------------------------------------------------


def _reasons_given(judgements: Sequence[Judgement], material: Material) -> tuple[float, set[int]]:
    """The share of gold's reasons that are given (a try counts ATTEMPT), and those given both right and wrong."""
    tries = [each for each in judgements if each.kind in ("gold", "wrong fact") and each.gold in material.reasons]
    given = {each.gold for each in tries if each.score >= COVERED}
    tried = {each.gold for each in tries} - given
    hedged = set()
    for each in tries:
        if each.kind == "wrong fact" and each.gold in given:
            left = material.reasons - given - tried
            if left:  # where one reason is left, the sentence stands in its place
                tried.add(min(left))
            else:
                hedged.add(each.gold)
    right = len(given - hedged) + ATTEMPT * len(tried | hedged)
    return (right / len(material.reasons) if material.reasons else 1.0), hedged


def _weigh(judgements: Sequence[Judgement], material: Material) -> list[Judgement]:
    """Lower the scores of sentences by what the whole rationale does (rules a-f of the module docstring)."""
    scores = [judgement.score for judgement in judgements]
    kinds = [judgement.kind for judgement in judgements]
    part, hedged = _reasons_given(judgements, material)

    concludes = False
    partly: set[int | None] = set()  # gold sentences that are said only partly
    for index, each in enumerate(judgements):
        if each.kind == "conclusion" or (each.kind == "gold" and each.gold in material.conclusions):
            concludes = concludes or each.score >= NEUTRAL
            scores[index] = min(each.score, NO_REASON + (1 - NO_REASON) * part)
        elif each.kind == "gold" and each.gold in hedged:
            scores[index] = min(each.score, NEUTRAL)
        if each.kind == "gold" and each.score <= NEUTRAL:
            scores[index] = min(scores[index], WRONG if each.gold in partly else 1.0)
            partly.add(each.gold)
    unanswered = bool(material.conclusions) and not concludes
    if "loop" in kinds:
        scores = [min(score, LOOP) for score in scores]
    if "wrong answer" in kinds or unanswered:
        scores = [min(score, NEUTRAL) for score in scores]

    neutral = [index for index, kind in enumerate(kinds) if kind in ("opening", "elimination", "neutral")]
    allowed = [index for index in neutral if judgements[index].score >= NEUTRAL][: len(material.openings)]
    credited = [index for index, score in enumerate(scores) if score > NEUTRAL]
    for index in credited[: max(0, len(material.openings) - kinds.count("opening"))]:
        scores[index] = NEUTRAL
    padding = set(neutral).difference(allowed)
    rest = [index for index in range(len(scores)) if index not in padding]
    if unanswered and rest and "wrong answer" not in kinds:
        scores[rest[-1]] = min(scores[rest[-1]], NO_CONCLUSION if part else 0.0)
    average = mean(scores[index] for index in rest) if rest else 0.0
    for index in padding:
        scores[index] = min(scores[index], PADDING, math.floor(10 * average + 1e-9) / 10)
    return [replace(each, score=round(score, 1)) for each, score in zip(judgements, scores, strict=True)]


# -- correction ------------------------------------------------------------------------------------------


def correct_rationale(problem: Mapping[str, Any], rationale: str) -> str:
    """The corrected rationale, one line.

    Keeps right, neutral and opening sentences; removes exact repeats; replaces an unfinished or wrong sentence by the
    unused gold sentence nearest to it (removes it if all are said already); if nothing says the gold answer, adds the
    gold sentence that does, or gold's last one.
    """
    material = read_gold(texts_of(problem))
    sentences = split_text(rationale)
    judgements = _judge_each([material.sentence(text) for text in sentences], material)
    used = {judgement.gold for judgement in judgements if judgement.score >= 0.5}
    final = []
    for text, judgement in zip(sentences, judgements, strict=True):
        if judgement.score >= 0.5:
            final.append(text)
        elif judgement.kind != "repeat":
            unused = [index for index in range(len(material.gold)) if index not in used]
            if unused:
                sentence = material.sentence(text)
                nearest = max(unused, key=lambda index: similarity(sentence, material.gold[index]))
                used.add(nearest)
                final.append(material.gold_texts[nearest])
    read = [material.sentence(text) for text in final]
    if material.conclusions:
        answered = not used.isdisjoint(material.conclusions) or {material.answer} in map(material.concluded, read)
    else:
        answered = len(material.gold) - 1 in used or any(sentence.says(material.answer) for sentence in read)
    if not answered:
        final.append(material.gold_texts[max(material.conclusions, default=-1)])
    return " ".join(final)
