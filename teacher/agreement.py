"""How far two Teachers agree on a sample of rationales (`haiku.py --check`). Asks them, and pays."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ares import cli, files
from teacher import handoff
from teacher.handoff import Item, Refused
from teacher.live import ask_live
from teacher.reply_files import read_scores
from teacher.session import CHECKS, OURS, Session

LAST_POSITION = 6  # later sentences share a line of the comparison
CLOSE = 0.1
# of `agreement_figures`, as they are shown
FIGURES = {"mean_difference": "mean difference", "rank_correlation": "rank correlation", "within_0.1": "within 0.1"}


def compare(first: Session, second: Session, items: Sequence[Item], count: int, apart: bool) -> None:
    """Print how far the Teachers of two sessions agree on `count` rationales, and save it. With `apart` they are one
    Teacher that is asked together and apart, and `count` is one of questions. Raises UserError."""
    folder = first.root / OURS  # `scores_of` works in another one
    if apart:
        chosen, places = whole_questions(items, count)
    else:
        askable = [item for item in items if handoff.sentences_of(item)]
        chosen, places = random.Random(0).sample(askable, min(count, len(askable))), None
    scores = [scores_of(session, chosen) for session in (first, second)]
    who = [f"{each.teacher.name} {each.teacher.model}" for each in (first, second)]
    if apart:
        who = [f"{who[0]} together", f"{who[1]} apart"]
    cli.print0(" against ".join(who))
    found = agreement(*scores, places)
    for line in agreement_lines(found):
        cli.print0(line)
    pairs = {item.name: pair for item, pair in zip(chosen, zip(*scores, strict=True), strict=True)}
    save_check(folder, *who, found, pairs)


def whole_questions(items: Sequence[Item], count: int) -> tuple[list[Item], list[int]]:
    """(the distinct rationales of `count` questions that have several, the place of each among its question's, from
    1). Raises UserError if no question has."""
    questions: dict[tuple[int, str], dict[tuple[str, ...], Item]] = {}
    for item in items:
        if sentences := tuple(handoff.sentences_of(item)):
            questions.setdefault((item.rank, item.qid), {}).setdefault(sentences, item)
    several = [list(each.values()) for each in questions.values() if len(each) > 1]
    if not several:
        raise cli.UserError("--against apart: no question has two different rationales; --together changes nothing")
    chosen = random.Random(0).sample(several, min(count, len(several)))
    return [item for each in chosen for item in each], [place for each in chosen for place in range(1, len(each) + 1)]


def scores_of(session: Session, items: Sequence[Item]) -> list[list[float] | None]:
    """The scores of each item by the session's Teacher; None where its reply cannot be used. Raises UserError.

    Works in a temporary copy of the items, so that the questions folder stays as it is; paid replies go to the cache.
    """
    with tempfile.TemporaryDirectory() as root:
        copies = [Item(Path(root), item.action, item.rank, item.qid) for item in items]
        for item, copied in zip(items, copies, strict=True):
            request = session.request(item)
            if request is None:
                fault = f"--check: {item.folder} has no request that fits its rationale; run the preprocessing"
                raise cli.UserError(fault)
            handoff.write_rationale(copied.folder, request.sentences)
            handoff.write_request(copied.folder, request.text, request.images)
        session.root = Path(root)
        session.add(copies)
        ask_live(session)
        return [_scores(copied) for copied in copies]


def _scores(item: Item) -> list[float] | None:
    try:
        return read_scores(item.folder)
    except Refused:
        return None


def agreement(
    first: Sequence[list[float] | None], second: Sequence[list[float] | None], places: Sequence[int] | None = None
) -> dict[str, Any]:
    """How far two Teachers agree: {"rationales", "scored_by_both", "sentences", "rows": {name: {"sentences",
    "mean_difference", "rank_correlation", "within_0.1"}}}.

    The rows are "all", one for each position in a rationale ("1" ... "6+"), and with `places`, of the rationales in
    their requests, "rationale 1" and so on; their figures are those of `agreement_figures`.
    """
    both = [number for number, pair in enumerate(zip(first, second, strict=True)) if None not in pair]
    pairs: dict[str, list[tuple[float, float]]] = {"all": []}  # name of the row -> pairs of scores
    for number in both:
        for position, pair in enumerate(zip(first[number], second[number], strict=True), start=1):
            pairs["all"].append(pair)
            pairs.setdefault(position_name(position), []).append(pair)
    for number in sorted(both, key=lambda number: places[number]) if places else ():
        row = pairs.setdefault(f"rationale {places[number]}", [])
        row += zip(first[number], second[number], strict=True)
    rows = {name: agreement_figures(each) for name, each in pairs.items() if each}
    return {"rationales": len(first), "scored_by_both": len(both), "sentences": len(pairs["all"]), "rows": rows}


def position_name(position: int) -> str:
    """The row of a sentence's position in its rationale, from 1; late ones share a row."""
    return f"{position}" if position < LAST_POSITION else f"{LAST_POSITION}+"


def agreement_figures(pairs: Sequence[tuple[float, float]]) -> dict[str, float | int | None]:
    """Of pairs of scores: their number, mean absolute difference, Spearman's rank correlation (None for one sentence,
    or where a side does not vary), share that differs by at most 0.1."""
    import pandas as pd

    differences = [abs(a - b) for a, b in pairs]
    ranks = [pd.Series(scores, dtype=float).rank().tolist() for scores in zip(*pairs, strict=True)]
    try:
        correlation = statistics.correlation(*ranks)
    except statistics.StatisticsError:
        correlation = None
    close = sum(difference <= CLOSE + 1e-9 for difference in differences) / len(pairs)
    return {
        "sentences": len(pairs),
        "mean_difference": statistics.fmean(differences),
        "rank_correlation": correlation,
        "within_0.1": close,
    }


def agreement_lines(found: Mapping[str, Any]) -> list[str]:
    """The lines that show what `agreement` has found."""
    counts = (
        f"{found['scored_by_both']} of {found['rationales']} rationales scored by both, {found['sentences']} sentences"
    )
    if not found["rows"]:
        return [counts]
    lines = [counts, "   position   sentences   mean |difference|   rank correlation   within 0.1"]
    for name, row in found["rows"].items():
        correlation = "-" if row["rank_correlation"] is None else f"{row['rank_correlation']:.3f}"
        lines.append(
            f"{name:>11}   {row['sentences']:>9}   {row['mean_difference']:>17.3f}   {correlation:>16}   "
            f"{row['within_0.1']:>10.1%}"
        )
    return lines


def read_checks(folder: Path) -> dict[str, Any]:
    """What earlier runs of --check have found: {"{who} against {against}": {"who", "against", ... of `agreement`,
    "scores": {item: [scores, scores]}}}. Raises UserError for a damaged file."""
    return files.read_json(folder / CHECKS, "--check", dict) if (folder / CHECKS).exists() else {}


def save_check(
    folder: Path, who: str, against: str, found: Mapping[str, Any], scores: Mapping[str, Sequence[Any]]
) -> None:
    """Add what `agreement` has found to `folder`/check.json. `scores`: an item's name -> its scores by both."""
    added = {f"{who} against {against}": {"who": who, "against": against, **found, "scores": scores}}
    files.write_json(folder / CHECKS, read_checks(folder) | added)
