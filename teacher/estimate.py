"""Before a paid run: what it would cost, how a request would look, and how far two Teachers agree on a sample.

Tokens are estimated by rule: text 3.5 characters each; an image width x height / 750 after scaling to 1568 pixels; a
structured scoring reply 10 and 4 per sentence, any other reply its text again. With a key, the API's free counting
endpoint corrects the input rule on a sample. Only `scores_of`, for the comparison of two Teachers, asks them and pays.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ares import cli, images
from teacher.api_responses import said
from teacher.api_teacher import ApiTeacher
from teacher.budget import BATCH_FACTOR, PRICES_DATE
from teacher.handoff import Item, Refused
from teacher.interface import CORRECT, JUDGE, SCORE, Request, Stopped, Unanswered
from teacher.parsing import parse_scores
from teacher.session import Session

CHARACTERS_PER_TOKEN = 3.5
FRAME_TOKENS = 20  # of a message's own frame
SCHEMA_TOKENS = 150  # of the schema in a structured request
SAMPLE = 20  # requests counted by the API
LAST_POSITION = 6  # later sentences share a line of the comparison
CLOSE = 0.1
REPLY_CONTENT = {SCORE: "scores only", CORRECT: "the text again", JUDGE: "a sentence and a verdict"}


@dataclass
class Estimate:
    """Sums over the distinct open requests. Tokens by rule, before any correction."""

    requests: int = 0
    with_image: int = 0
    images: int = 0
    text_tokens: float = 0.0
    image_tokens: int = 0
    output_tokens: float = 0.0


def input_tokens(request: Request, structured: bool) -> tuple[float, int]:
    """(text tokens, image tokens) of one request, by rule."""
    text = len(request.text) + (len(request.form_note) if structured else 0)
    around = FRAME_TOKENS + (SCHEMA_TOKENS if structured else 0)
    return text / CHARACTERS_PER_TOKEN + around, sum(map(images.estimated_tokens, request.images))


def output_tokens(request: Request, structured: bool) -> float:
    """Tokens of the reply, by rule."""
    if request.kind == JUDGE:
        return 60
    characters = sum(map(len, request.sentences))
    if request.kind == SCORE:
        per_sentence = 4 if structured else 8
        return 10 + per_sentence * len(request.sentences) + (0 if structured else characters / CHARACTERS_PER_TOKEN)
    return 30 + 2 * characters / CHARACTERS_PER_TOKEN


def estimate(session: Session) -> None:
    """Print what answering the session's open requests would cost."""
    teacher: ApiTeacher = session.teacher
    report, sums = session.report, Estimate()
    items = sum(map(len, session.open.values()))
    asked = [key for key in session.open if not session.known(key)]
    cached = len(session.open) - len(asked)
    for key in cli.progress(asked, desc="estimating", unit="request"):
        request, _ = session.prepare(key)
        text, image = input_tokens(request, teacher.structured)
        sums.requests += 1
        sums.images += len(request.images)
        sums.with_image += bool(request.images)
        sums.text_tokens += text
        sums.image_tokens += image
        sums.output_tokens += output_tokens(request, teacher.structured)
    ratio, how = _counted(session, asked)
    tokens_in, tokens_out = (sums.text_tokens + sums.image_tokens) * ratio, sums.output_tokens
    cli.print0(
        f"{report.total} rationales: {report.kept} have a reply, {len(report.unusable)} hold nothing to ask about, "
        f"{items} are open: {len(session.open)} distinct requests ({items - len(session.open)} duplicates, asked "
        f"once), {cached} of them known already, {sums.requests} to ask"
    )
    cli.print0(f"images: {sums.images}, in {sums.with_image} of these requests")
    if report.text_only:
        cli.print0(f"{report.text_only} rationales would go without the image that their question names")
    cli.print0(
        f"tokens: {tokens_in:,.0f} in ({sums.image_tokens:,} of them images), {tokens_out:,.0f} out; input {how}; "
        f"output by rule ({REPLY_CONTENT[session.kind if teacher.structured or session.kind == JUDGE else CORRECT]})"
    )
    if teacher.price is None:
        cli.print0(f"dollars: the price of {teacher.model} is not known; name it with --price IN OUT")
        return
    live = teacher.price.usd(tokens_in, tokens_out)
    cli.print0(
        f"{teacher.model}, ${teacher.price.input:g} in / ${teacher.price.output:g} out per million tokens "
        f"({PRICES_DATE}): ${live:.4f} live, ${live * BATCH_FACTOR:.4f} with --batch; replies that must be asked "
        "again come on top"
    )


def _counted(session: Session, keys: list[str]) -> tuple[float, str]:
    """(correction of the input rule, in words how it was found)."""
    rule = f"by rule ({CHARACTERS_PER_TOKEN} characters a token)"
    key = os.environ.get(session.teacher.key_name, "").strip()
    if not keys or not key:
        return 1.0, rule
    sample = keys[:: max(1, len(keys) // SAMPLE)][:SAMPLE]
    try:
        ratio = asyncio.run(_count(session, sample))
    except Exception as error:  # the rule needs no network
        why = said(error, key)
        return 1.0, f"{rule}; counting failed: {why}"
    return ratio, f"by the API's count of {len(sample)} requests, {ratio:.2f} times the rule"


async def _count(session: Session, sample: list[str]) -> float:
    counted = by_rule = 0.0
    async with session.teacher as teacher:
        for key in sample:
            request, _ = session.prepare(key)
            counted += await teacher.count_tokens(request)
            by_rule += sum(input_tokens(request, teacher.structured))
    return counted / by_rule


def show(session: Session, items: list[Item], qid: str) -> None:
    """Print the request of a question's first rationale as it would be sent, images by name. Raises UserError."""
    item = next((item for item in items if item.qid == qid), None)
    if item is None:
        raise cli.UserError(f"--show: no rationale of question {qid} in {session.root}; it has e.g. {items[0].qid}")
    request = session.request(item)
    if request is None:
        raise cli.UserError(f"--show: {item.folder} has no request that fits its rationale; run the preprocessing")
    cli.print0(f"{item.folder}  (prompt version {session.wording.version})")
    for path in request.images:
        kind, data = images.load_image(path, qid)
        width, height = images.pixels(path) or ("?", "?")
        cli.print0(f"[image: {path.name}, {kind}, {width} x {height}, {len(data):,} bytes]")
    cli.print0(request.text)
    teacher = session.teacher
    if isinstance(teacher, ApiTeacher):
        if teacher.note(request):
            cli.print0(teacher.note(request))
        about = {"model": teacher.model, "max_tokens": teacher.max_tokens(request), **teacher.body(request)}
        cli.print0(json.dumps(about))
        if teacher.price:
            cli.print0(f"custom_id {request.custom_id}; costs at most ${teacher.most_usd(request):.6f}")


# -- comparing two Teachers --------------------------------------------------------------------------------


def sample_items(items: Sequence[Item], count: int, seed: int = 0) -> list[Item]:
    """`count` items drawn at random, the same ones for the same folder."""
    return random.Random(seed).sample(list(items), min(count, len(items)))


def scores_of(session: Session, items: Sequence[Item]) -> list[list[float] | None]:
    """The scores of each item by the session's Teacher; None where its reply cannot be used. Raises UserError.

    Writes nothing into the questions folder; paid replies go to the cache.
    """
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


def agreement_lines(first: Sequence[list[float] | None], second: Sequence[list[float] | None]) -> list[str]:
    """The lines of the comparison: mean absolute difference, correlation and share within 0.1 of the scores, over all
    sentences and by position in the rationale."""
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
    lines.append(_agreement_line("all", [(a, b) for _, a, b in pairs]))
    for position in sorted({position for position, _, _ in pairs}):
        name = f"{position}+" if position == LAST_POSITION else str(position)
        lines.append(_agreement_line(name, [(a, b) for at, a, b in pairs if at == position]))
    return lines


def _agreement_line(name: str, pairs: Sequence[tuple[float, float]]) -> str:
    differences = [abs(a - b) for a, b in pairs]
    close = sum(difference <= CLOSE + 1e-9 for difference in differences) / len(pairs)
    try:
        correlation = f"{statistics.correlation(*zip(*pairs, strict=True)):.3f}"
    except statistics.StatisticsError:  # one sentence, or equal scores
        correlation = "-"
    return f"{name:>8}   {len(pairs):>9}   {statistics.fmean(differences):>17.3f}   {correlation:>11}   {close:>10.1%}"
