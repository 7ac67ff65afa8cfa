"""The offline reference Teacher: scores and corrects a rationale from the question's own gold texts.

It replaces Claude where there is no key (demo, tests, a first try). It knows nothing of the world and sees no
image: it compares words with the gold solution, the lecture, the hint, the question and the choices. Deterministic;
scores are steps of 0.1. A paraphrase, a right sentence in other words than gold's, gets less than it deserves.
It is called by teacher/client.py: `python haiku.py --teacher reference`.

How two sentences are compared (`similarity`, 0-1) is in teacher/text_similarity.py. A similarity of 0.9 or more scores
1.0, and the score falls linearly to 0 at 0.25.

A sentence is judged in this order, and the first rule that applies decides:
 1. repeat: says word for word what an earlier sentence said: 0.0.
 2. gold: says word for word what an unused gold sentence says: 1.0 (0.5 if it is only an opening, rule 5, or has no
    content word, as "Yes.").
 3. contradiction: asserts another choice as the answer, denies the gold choice, names several choices as the answer,
    puts another choice where a gold sentence has the gold one, or calls something the answer that shares no word with
    the gold choice, the solution or the question ("So, the answer is Augusta.", where that is no choice): 0.0.
 4. unfinished or garbled (breaks off, stutters, bare name of a choice): at most 0.3, whichever rule follows.
 5. opening ("Let's look at ...", "To find out which ..., we need to ..."): 0.5, if most of its words are from the
    question's material.
 6. the best of:
    - like a gold sentence: the score of the similarity; at most 0.5 if an earlier sentence already said that
      gold sentence;
    - conclusion: asserts the gold choice as the answer and says no more than that: 0.7 (1.0 without a gold solution);
    - elimination: denies a wrong choice, in words of the material: 0.5;
    - neutral: restates question, hint or lecture: 0.5, in part less. Without a gold solution the lecture is gold.
Last, a conclusion in gold's own words gets at most 0.7 too, unless an earlier sentence said one of gold's reasons (if
gold gives any). A true remark that gold does not make never earns more than 0.5, which is no reward in RL.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from ares.cli import progress
from ares.sentences import is_finished, split_text
from teacher.parsing import Verdict
from teacher.text_similarity import (
    ANSWER_WORDS,
    Sentence,
    containment,
    f1,
    lcs,
    option_patterns,
    score_of,
    share,
    similarity,
)

VERSION = "reference-2"  # raise it with every change that can change a score
COVERED = 0.7  # a gold sentence is said by a sentence of at least this score
NO_REASON = 0.7  # a right answer without a reason

_OPENING = re.compile(
    r"^(?:first,? )?(?:let's|let us|let me|to (?:solve|determine|find|answer|identify|decide|figure|see|know|check|"
    r"compare|understand)\b|look (?:at|carefully|again)|read the|think (?:about|of)|examine|"
    r"consider (?:the|each|how|what)|"
    r"(?:we|i|you) (?:need|have|must|should|will|can|want|am going) ?(?:to )?(?:first )?"
    r"(?:look|read|find|determine|identify|examine|compare|check|analy[sz]e|think|consider|use)|"
    r"the (?:question|problem|task) (?:asks|is about)|here is (?:how|what))",
    re.I,
)

_IS_ANSWER = re.compile(r"\banswer (?:is|must be|would be)\b|\bis the (?:correct |right |best )?answer\b", re.I)
_OPENING_WORDS = Counter(
    dict.fromkeys("think look see start begin go work find solv step first about care".split(), 9)
)


def score_sentences(problem: Mapping[str, Any], sentences: Sequence[str]) -> list[float]:
    """One score per sentence, in order, 0.0-1.0 in steps of 0.1."""
    return [judgement.score for judgement in judge(problem, sentences)]


@dataclass(frozen=True)
class Judgement:
    """What was found about one sentence: the score, the rule that gave it, and the gold sentence that it says."""

    score: float
    kind: str  # repeat, contradiction, gold, opening, conclusion, elimination, neutral
    gold: int | None = None  # index among the gold sentences, where the sentence says one


def judge(problem: Mapping[str, Any], sentences: Sequence[str]) -> list[Judgement]:
    """Score the sentences of one rationale in order and say why (the rules: module docstring)."""
    material = _Material(problem)
    seen: set[tuple[str, ...]] = set()
    used: set[int] = set()
    judgements = []
    for text in sentences:
        sentence = Sentence(text, material.options)
        judgement = Judgement(0.0, "repeat") if sentence.tokens in seen else _judge_one(sentence, material, used)
        if judgement.gold in material.conclusions and used.isdisjoint(material.reasons) and material.reasons:
            judgement = replace(judgement, score=min(judgement.score, NO_REASON))
        if judgement.gold is not None and judgement.score >= COVERED:
            used.add(judgement.gold)
        seen.add(sentence.tokens)
        judgements.append(judgement)
    return judgements


def gold_coverage(problem: Mapping[str, Any], rationale: str) -> float:
    """Share of the gold sentences that some sentence of the rationale says (a similarity that scores 0.7 or more)."""
    material = _Material(problem)
    said = [Sentence(text, material.options) for text in split_text(rationale)]
    covered = [
        any(sentence.tokens == gold.tokens or score_of(similarity(sentence, gold)) >= COVERED for sentence in said)
        for gold in material.gold
    ]
    return sum(covered) / len(covered)


def compare(problem: Mapping[str, Any], first: str, second: str) -> Verdict:
    """Which rationale is worth more: half its mean sentence score plus half its gold coverage.

    A difference below 0.05, less than one sentence of a usual rationale, is a tie.
    """
    worths = []
    for text in (first, second):
        scores = score_sentences(problem, split_text(text))
        worths.append((sum(scores) / len(scores) if scores else 0.0, gold_coverage(problem, text)))
    ours, theirs = (sum(worth) / 2 for worth in worths)
    better = "tie" if abs(ours - theirs) < 0.05 else "1" if ours > theirs else "2"
    (score_1, covered_1), (score_2, covered_2) = worths
    return Verdict(
        better,
        f"mean sentence score {score_1:.2f} and {score_2:.2f}, "
        f"gold sentences covered {covered_1:.0%} and {covered_2:.0%}",
    )


def names_only_gold_option(problem: Mapping[str, Any], rationale: str) -> bool:
    """Whether the rationale names the gold choice and nothing else but words of the question.

    A sentence that is one of gold's reasons is something else, even if it consists of the question's words ("The
    capital of Texas is Austin.").
    """
    material = _Material(problem)
    texts = split_text(rationale)
    said = [Sentence(text, material.options) for text in texts]
    words = {word for sentence in said for word in sentence.content}
    named = set().union(*(sentence.options for sentence in said))
    if named != {material.answer} or not words <= material.frame | {f"<{material.answer}>"}:
        return False
    return not any(each.gold in material.reasons and each.score >= COVERED for each in judge(problem, texts))


# -- one sentence ----------------------------------------------------------------------------------------


def _judge_one(sentence: Sentence, material: _Material, used: set[int]) -> Judgement:
    opening = _OPENING.match(sentence.text) if not sentence.options else None
    for index, gold in enumerate(material.gold):
        if sentence.tokens == gold.tokens and index not in used:
            if sentence.content and not opening:
                return Judgement(1.0, "gold", index)
            return Judgement(0.5, "opening" if opening else "neutral", index)
    if not sentence.content:
        return Judgement(0.2 if sentence.tokens else 0.0, "neutral")
    if _contradicts(sentence, material):
        return Judgement(0.0, "contradiction")

    limit = 0.3 if _is_broken(sentence, material) else 1.0
    known = share(sentence.content, material.words)
    if opening:
        rest = Sentence(sentence.text[opening.end() :], material.options).content - _OPENING_WORDS
        on_topic = not rest or share(rest, material.words) >= 0.6
        return Judgement(min(limit, 0.5 if on_topic else 0.3), "opening")

    candidates = [Judgement(0.0, "neutral")]
    for index, gold in enumerate(material.gold):
        score = score_of(similarity(sentence, gold))
        candidates.append(Judgement(min(score, 0.5) if index in used else score, "gold", index))
    if material.only_concludes(sentence):
        candidates.append(Judgement(NO_REASON if material.has_solution else 1.0, "conclusion"))
    if sentence.negated and sentence.options and material.answer not in sentence.options and known >= 0.6:
        candidates.append(Judgement(0.5, "elimination"))
    if len(sentence.content) > 1:
        restated = max((containment(sentence, other) for other in material.neutral), default=0.0)
        candidates.append(Judgement(min(0.5, score_of(restated)), "neutral"))
    best = max(candidates, key=lambda judgement: judgement.score)
    return Judgement(min(limit, best.score), best.kind, best.gold)


def _contradicts(sentence: Sentence, material: _Material) -> bool:
    """Whether the sentence asserts something about the choices that the gold answer rules out."""
    wrong = sentence.options - {material.answer}
    if wrong and any(wrong <= gold.options and similarity(sentence, gold) >= 0.8 for gold in material.gold):
        return False  # gold itself says so
    moved = wrong and material.answer not in sentence.options  # stands where a gold sentence names the gold choice
    if moved and any(
        material.answer in gold.options
        and gold.negated == sentence.negated
        and f1(lcs(sentence.frame, gold.frame), len(sentence.frame), len(gold.frame)) >= 0.6
        for gold in material.gold
    ):
        return True
    if sentence.negated:
        denied = sentence.options == {material.answer} and sentence.concludes
        return denied and not any(gold.negated and similarity(sentence, gold) >= 0.6 for gold in material.gold)
    if not wrong:
        return not sentence.options and _names_no_choice(sentence, material)
    return sentence.concludes or not sentence.content.keys() - {f"<{option}>" for option in sentence.options}


def _names_no_choice(sentence: Sentence, material: _Material) -> bool:
    """Whether something is called the answer that has no word of the gold choice, the solution or the question."""
    if not _IS_ANSWER.search(sentence.text):
        return False
    named = sentence.content.keys() - ANSWER_WORDS
    return bool(named) and named.isdisjoint(material.answer_words | material.frame)


def _is_broken(sentence: Sentence, material: _Material) -> bool:
    """Breaks off, stutters (more often the same word than any gold sentence), or is the bare name of a choice."""
    if not sentence.finished:
        return True
    if any(a == b for a, b in zip(sentence.tokens, sentence.tokens[1:], strict=False)):
        return True
    word, count = sentence.content.most_common(1)[0]
    if count > max(2, *(gold.content[word] for gold in material.gold)):
        return True
    return sentence.tokens == (f"<{material.answer}>",)


# -- reading texts ---------------------------------------------------------------------------------------


class _Material:
    """A question's gold texts, read once: gold and neutral sentences and every word they use."""

    def __init__(self, problem: Mapping[str, Any]):
        self.answer: int = problem["answer"]
        self.options = option_patterns(problem["choices"])
        solution, lecture = self._read(problem["solution"]), self._read(problem["lecture"])
        texts = (problem["choices"][self.answer], problem["solution"] or problem["lecture"])
        self.answer_words = {word for text in texts for word in Sentence(text, ()).content}  # choices as words
        self.question = self._read(problem["question"])
        self.frame = {word for sentence in self.question for word in sentence.content} | ANSWER_WORDS
        hint = self._read(problem["hint"])
        self.has_solution = bool(solution)
        self.gold_texts = [sentence.text for sentence in solution or lecture] or [conclusion(problem)]
        self.gold = [Sentence(text, self.options) for text in self.gold_texts]
        self.conclusions = {index for index, gold in enumerate(self.gold) if self.only_concludes(gold)}
        self.reasons = set(range(len(self.gold))) - self.conclusions
        self.neutral = self.question + hint + (lecture if solution else [])
        everything = self.gold + self.neutral
        self.words = Counter({word: 99 for sentence in everything for word in sentence.content})
        self.words.update({f"<{option}>": 99 for option in range(len(problem["choices"]))})
        self.words.update(dict.fromkeys(ANSWER_WORDS, 99))

    def only_concludes(self, sentence: Sentence) -> bool:
        """Whether a sentence asserts the gold choice as the answer, in words of the question, and no more."""
        words = sentence.content.keys() - {f"<{self.answer}>"}
        return (
            sentence.concludes and sentence.options == {self.answer} and not sentence.negated and words <= self.frame
        )

    def concluding(self) -> list[int]:
        """Gold sentences that give the answer: those that name the gold choice, else the solution's last one."""
        naming = [index for index, gold in enumerate(self.gold) if gold.says(self.answer)]
        return naming or ([len(self.gold) - 1] if self.has_solution else [])

    def _read(self, text: str) -> list[Sentence]:
        sentences = (Sentence(part, self.options) for part in split_text(text.replace("\n", "\\n")))
        return [sentence for sentence in sentences if sentence.tokens]


# -- correction ------------------------------------------------------------------------------------------


def conclusion(problem: Mapping[str, Any]) -> str:
    """The gold answer as a sentence of its own."""
    return f"The answer is ({chr(ord('A') + problem['answer'])})."


def correct_rationale(problem: Mapping[str, Any], rationale: str) -> str:
    """The corrected rationale, one line.

    Keeps right, neutral and opening sentences; removes exact repeats; replaces an unfinished or wrong sentence by the
    unused gold sentence nearest to it (removes it if all are said already); if nothing says the gold answer, adds the
    gold sentence that does, or `The answer is (X).`.
    """
    material = _Material(problem)
    sentences = split_text(rationale)
    judgements = judge(problem, sentences)
    used = {judgement.gold for judgement in judgements if judgement.score >= 0.5}
    final = []
    for text, judgement in zip(sentences, judgements, strict=True):
        if judgement.score >= 0.5:
            final.append(text)
        elif judgement.kind != "repeat":
            unused = [index for index in range(len(material.gold)) if index not in used]
            if unused:
                sentence = Sentence(text, material.options)
                nearest = max(unused, key=lambda index: similarity(sentence, material.gold[index]))
                used.add(nearest)
                final.append(material.gold_texts[nearest])
    concluding = material.concluding()
    read = [Sentence(text, material.options) for text in final]
    if used.isdisjoint(concluding) and not any(sentence.says(material.answer) for sentence in read):
        final.append(material.gold_texts[concluding[-1]] if concluding else conclusion(problem))
    return " ".join(final)


# -- figures over many rationales


def rationale_stats(rationales: Iterable[str]) -> dict[str, float]:
    """Shape of generated rationales.

    `repeated`: share of sentences that occurred before in their rationale; `unfinished`: share of rationales that
    break off; `sentences`, `words`: mean per rationale.
    """
    rationales = list(rationales)
    split = [[sentence.strip() for sentence in split_text(text)] for text in rationales]
    total = sum(map(len, split))
    count = max(len(rationales), 1)
    return {
        "repeated": sum(len(sentences) - len(set(sentences)) for sentences in split) / max(total, 1),
        "unfinished": sum(not is_finished(text) for text in rationales) / count,
        "sentences": total / count,
        "words": sum(len(sentence.split()) for sentences in split for sentence in sentences) / count,
    }


def reference_scores(
    problems: Mapping[str, Mapping[str, Any]], qids: Sequence[str], preds: Sequence[str]
) -> list[list[float]]:
    """The offline reference Teacher's score of each sentence of each rationale (`teacher/reference.py`), 0-1."""
    rows = zip(qids, preds, strict=True)
    if len(preds) > 1000:  # some 5 ms each
        rows = progress(rows, total=len(preds), desc="sentence scores", unit="rationale")
    return [score_sentences(problems[qid], split_text(pred)) for qid, pred in rows]


def rationale_figures(
    problems: Mapping[str, Mapping[str, Any]],
    qids: Sequence[str],
    preds: Sequence[str],
    scores: Sequence[Sequence[float]] | None = None,
) -> dict[str, float]:
    """Means over the rationales `preds` of questions `qids`; shares in percent.

    `score`: mean over all sentences of all rationales, 0-1 (`scores`, per rationale; None: the reference Teacher's);
    `repeated`: share of sentences that appeared before in their rationale; `unfinished`: share of rationales whose
    last sentence does not end; `words`: per rationale; `covered`: mean share of gold sentences that a rationale says;
    `only_option`: share of rationales that name the gold option and say nothing else.
    """
    stats = rationale_stats(preds)
    scores = reference_scores(problems, qids, preds) if scores is None else scores
    every = [score for row in scores for score in row]
    pairs = [(problems[qid], pred) for qid, pred in zip(qids, preds, strict=True)]
    return {
        "score": mean(every) if every else 0.0,
        "repeated": 100 * stats["repeated"],
        "unfinished": 100 * stats["unfinished"],
        "words": mean(len(pred.split()) for pred in preds),
        "covered": 100 * mean(gold_coverage(problem, pred) for problem, pred in pairs),
        "only_option": 100 * mean(names_only_gold_option(problem, pred) for problem, pred in pairs),
    }
