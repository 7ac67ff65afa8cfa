"""How far two Teachers agree on the same sentences: mean absolute difference, correlation, share within 0.1.

Both are asked for a sample of the exported rationales; nothing is written into the questions folder, replies that were
paid for go to the cache. Scoring only: two corrections have no distance that says which is better.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence

from ares import cli
from teacher.handoff import Item, Refused
from teacher.interface import Request, Stopped, Unanswered
from teacher.parsing import parse_scores
from teacher.session import Session

LAST_POSITION = 6  # later sentences share a line
CLOSE = 0.1


def sample_items(items: Sequence[Item], count: int, seed: int = 0) -> list[Item]:
    """`count` items drawn at random, the same ones for the same folder."""
    return random.Random(seed).sample(list(items), min(count, len(items)))


def scores_of(session: Session, items: Sequence[Item]) -> list[list[float] | None]:
    """The session's Teacher's scores of each item; None where its reply cannot be used. Raises UserError."""
    return asyncio.run(_ask_all(session, items))


async def _ask_all(session: Session, items: Sequence[Item]) -> list[list[float] | None]:
    turn = asyncio.Semaphore(session.teacher.concurrency)
    found: list[list[float] | None] = [None] * len(items)
    failures: list[cli.UserError] = []
    with cli.progress(desc=f"{session.teacher.name} {session.teacher.model}", total=len(items), unit="item") as bar:
        async with session.teacher:

            async def one(index: int, item: Item) -> None:
                async with turn:
                    if failures:
                        return
                    try:
                        found[index] = await _scores(session, item)
                    except cli.UserError as error:
                        failures.append(error)
                        session.teacher.stop()
                    except (Unanswered, Stopped, Refused):
                        pass
                    bar.update()

            await asyncio.gather(*(one(index, item) for index, item in enumerate(items)))
    if failures:
        raise failures[0]
    return found


async def _scores(session: Session, item: Item) -> list[float]:
    """Raises Refused after all attempts, Unanswered, Stopped, UserError."""
    request: Request | None = session.request(item)
    if request is None:
        raise cli.UserError(f"--check: {item.folder} has no request that fits its rationale; run the preprocessing")
    key = session.teacher.key(request)
    known = session.cache.get(key)
    if known is not None:
        return parse_scores(known["text"], list(request.sentences))
    for attempt in range(session.attempts):
        reply = await session.teacher.answer(request)
        session.report.add(reply)
        try:
            scores = parse_scores(reply.text, list(request.sentences))
        except Refused as refused:
            if attempt + 1 == session.attempts:
                raise
            request = session.ask_again(request, refused)
            continue
        session.cache.put(
            key, reply.text, {"teacher": reply.teacher, "model": reply.model, "usage": dict(reply.usage)}
        )
        return scores
    raise Unanswered("no_attempts")


def report(first: Sequence[list[float] | None], second: Sequence[list[float] | None]) -> list[str]:
    """The lines of the comparison, all sentences and by position in the rationale. Pure."""
    pairs = [
        (min(position, LAST_POSITION), a, b)
        for left, right in zip(first, second, strict=True)
        if left is not None and right is not None
        for position, (a, b) in enumerate(zip(left, right, strict=True), start=1)
    ]
    both = sum(left is not None and right is not None for left, right in zip(first, second, strict=True))
    lines = [f"{both} of {len(first)} rationales scored by both, {len(pairs)} sentences"]
    if not pairs:
        return lines
    lines.append("position   sentences   mean |difference|   correlation   within 0.1")
    lines.append(_line("all", [(a, b) for _, a, b in pairs]))
    for position in sorted({position for position, _, _ in pairs}):
        name = f"{position}+" if position == LAST_POSITION else str(position)
        lines.append(_line(name, [(a, b) for at, a, b in pairs if at == position]))
    return lines


def _line(name: str, pairs: Sequence[tuple[float, float]]) -> str:
    differences = [abs(a - b) for a, b in pairs]
    close = sum(difference <= CLOSE + 1e-9 for difference in differences) / len(pairs)
    try:
        correlation = f"{statistics.correlation(*zip(*pairs, strict=True)):.3f}"
    except statistics.StatisticsError:  # one sentence, or a Teacher that gives them all the same
        correlation = "-"
    return f"{name:>8}   {len(pairs):>9}   {statistics.fmean(differences):>17.3f}   {correlation:>11}   {close:>10.1%}"
