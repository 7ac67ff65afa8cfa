"""Figures over many rationales, for tables and reports, by the offline reference Teacher (teacher/reference.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from ares.cli import progress
from ares.sentences import is_finished, split_text
from teacher.reference import figures_of


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
    """The offline reference Teacher's score of each sentence of each rationale, 0-1.

    Reads a question's texts once, wherever its rationales are: give those of several stages in one call.
    """
    order = sorted(range(len(preds)), key=qids.__getitem__)
    if len(preds) > 1000:  # some 2 ms each
        order = progress(order, desc="sentence scores", unit="rationale")
    scores: list[list[float]] = [[] for _ in preds]
    for row in order:
        scores[row] = list(figures_of(problems[qids[row]], preds[row]).scores)
    return scores


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
    `only_option`: share of rationales that name the gold option and say nothing else; `concludes`: whose conclusion
    names the gold choice; `no_conclusion`: without a concluding sentence (`concluded_choice`).
    """
    stats = rationale_stats(preds)
    scores = reference_scores(problems, qids, preds) if scores is None else scores
    every = [score for row in scores for score in row]
    each = figures_by_question(problems, qids, preds, scores)
    found = [figures_of(problems[qid], pred) for qid, pred in zip(qids, preds, strict=True)]
    return {
        "score": mean(every) if every else 0.0,
        "repeated": 100 * stats["repeated"],
        "unfinished": 100 * stats["unfinished"],
        "words": mean(len(pred.split()) for pred in preds),
        "covered": mean(each["covered"]),
        "only_option": 100 * mean(one.only_option for one in found),
        "concludes": mean(each["concludes"]),
        "no_conclusion": 100 * mean(one.concluded is None for one in found),
    }


def figures_by_question(
    problems: Mapping[str, Mapping[str, Any]],
    qids: Sequence[str],
    preds: Sequence[str],
    scores: Sequence[Sequence[float]] | None = None,
) -> dict[str, list[float]]:
    """Figures of each rationale, for paired comparisons (arguments as of `rationale_figures`).

    `score`: the mean of its sentences' scores, 0-1; in per cent `covered`, gold sentences that it says, and
    `concludes`, 100 where its conclusion names the gold choice, else 0.
    """
    scores = reference_scores(problems, qids, preds) if scores is None else scores
    found = [figures_of(problems[qid], pred) for qid, pred in zip(qids, preds, strict=True)]
    golds = [problems[qid]["answer"] for qid in qids]
    return {
        "score": [mean(row) if row else 0.0 for row in scores],
        "concludes": [100.0 * (one.concluded == gold) for one, gold in zip(found, golds, strict=True)],
        "covered": [100 * one.covered for one in found],
    }
