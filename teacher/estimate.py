"""Looking before asking: what a questions folder would cost, and how a request would look. Spends nothing.

Tokens by rule: text 3.5 characters each; an image width x height / 750 after scaling to 1568 pixels; a structured
scoring reply 10 and 4 per sentence, any other reply its text again. With a key, the API's free counting endpoint
corrects the input rule on a sample.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass

from ares import cli, images
from teacher.api_errors import KEY, said
from teacher.claude import ClaudeTeacher, max_tokens
from teacher.handoff import Item
from teacher.interface import CORRECT, JUDGE, SCORE, Request
from teacher.prices import BATCH_FACTOR, PRICES_DATE
from teacher.session import Session

CHARACTERS_PER_TOKEN = 3.5
AROUND = 20  # tokens of the message's own frame
SCHEMA_TOKENS = 150  # what a structured request carries besides
SAMPLE = 20  # requests counted by the API
_WHAT_RETURNS = {SCORE: "scores only", CORRECT: "the text again", JUDGE: "a sentence and a verdict"}


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
    around = AROUND + (SCHEMA_TOKENS if structured else 0)
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
    """Print what answering the session's open groups would cost."""
    teacher: ClaudeTeacher = session.teacher
    report, sums = session.report, Estimate()
    items = sum(len(session.groups.waiting(group)) for group in session.groups)
    asked = [group for group in session.groups if not session.known(group)]
    cached = len(session.groups) - len(asked)
    for group in cli.progress(asked, desc="estimating", unit="request"):
        request, _ = session.start(group)
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
        f"{items} are open: {len(session.groups)} distinct requests ({items - len(session.groups)} duplicates, asked "
        f"once), {cached} of them known already, {sums.requests} to ask"
    )
    cli.print0(f"images: {sums.images}, in {sums.with_image} of these requests")
    if report.text_only:
        cli.print0(f"{report.text_only} rationales would go without the image that their question names")
    cli.print0(
        f"tokens: {tokens_in:,.0f} in ({sums.image_tokens:,} of them images), {tokens_out:,.0f} out; input {how}; "
        f"output by rule ({_WHAT_RETURNS[session.kind if teacher.structured or session.kind == JUDGE else CORRECT]})"
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


def _counted(session: Session, groups: list[int]) -> tuple[float, str]:
    """(correction of the input rule, in words how it was found)."""
    rule = f"by rule ({CHARACTERS_PER_TOKEN} characters a token)"
    if not groups or not os.environ.get(KEY, "").strip():
        return 1.0, rule
    sample = groups[:: max(1, len(groups) // SAMPLE)][:SAMPLE]
    try:
        ratio = asyncio.run(_count(session, sample))
    except Exception as error:  # an estimate needs no network: the rule stands, and the reason is said
        why = said(error, os.environ[KEY].strip())
        return 1.0, f"{rule}; counting failed: {why}"
    return ratio, f"by the API's count of {len(sample)} requests, {ratio:.2f} times the rule"


async def _count(session: Session, sample: list[int]) -> float:
    counted = by_rule = 0.0
    async with session.teacher as teacher:
        for group in sample:
            request, _ = session.start(group)
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
    if isinstance(teacher, ClaudeTeacher):
        if teacher.note(request):
            cli.print0(teacher.note(request))
        about = {"model": teacher.model, "max_tokens": max_tokens(request, teacher.family), **teacher.body(request)}
        cli.print0(json.dumps(about))
        if teacher.price:
            cli.print0(f"custom_id {request.custom_id}; costs at most ${teacher.most_usd(request):.6f}")
