"""Before a paid run: what it would cost, how a request would look, and how far two Teachers agree on a sample.

Tokens are estimated by rule: text 3.5 characters each; an image width x height / 750 after scaling to 1568 pixels; a
structured scoring reply 10 and 4 per sentence, any other reply its text again. With a key, the API's free counting
endpoint corrects the input rule on a sample. Only `scores_of`, for the comparison of two Teachers, asks them and pays.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ares import cli, images
from ares.data_folder import question_images as images_of
from ares.sentences import split_text
from teacher import handoff
from teacher.api_responses import said
from teacher.api_teacher import ApiTeacher
from teacher.budget import BATCH_FACTOR, PRICES_DATE, Price, price_of
from teacher.claude import DEFAULT_MODEL
from teacher.handoff import Item, Refused
from teacher.interface import CORRECT, FREE, JUDGE, SCORE, Request
from teacher.openai_compatible import OpenAITeacher
from teacher.prompts import correction_request, judge_request, scoring_request
from teacher.reply_files import read_scores
from teacher.session import Session, ask_live

CHARACTERS_PER_TOKEN = 3.5
FRAME_TOKENS = 20  # of a message's own frame
SCHEMA_TOKENS = 150  # of the schema in a structured request
SAMPLE = 20  # requests counted by the API
PLANNED = 200  # questions whose requests are written to say what a run will cost
LAST_POSITION = 6  # later sentences share a line of the comparison
CLOSE = 0.1
REPLY_CONTENT = {SCORE: "scores only", CORRECT: "the text again", JUDGE: "a sentence and a verdict"}


def input_tokens(request: Request, structured: bool) -> tuple[float, int]:
    """(text tokens, image tokens) of one request, by rule."""
    text = len(request.text) + (len(request.form_note) if structured else 0)
    around = FRAME_TOKENS + (SCHEMA_TOKENS if structured else 0)
    return text / CHARACTERS_PER_TOKEN + around, sum(map(images.estimated_tokens, request.images))


def output_tokens(request: Request, structured: bool, exact: bool = False) -> float:
    """Tokens of the reply, by rule."""
    if request.kind == JUDGE:
        return 60
    characters = sum(map(len, request.sentences))
    if request.kind == SCORE:
        per_sentence = 4 if structured and not exact else 8
        return 10 + per_sentence * len(request.sentences) + (0 if structured else characters / CHARACTERS_PER_TOKEN)
    return 30 + 2 * characters / CHARACTERS_PER_TOKEN


def preview(session: Session, items: list[Item], args: argparse.Namespace) -> None:
    """Do what --show or --estimate asks for. Raises UserError."""
    if args.show:
        return show(session, items, args.show)
    session.add(items, serve=False)
    return estimate(session)


def estimate(session: Session) -> None:
    """Print what answering the session's open requests would cost."""
    teacher: ApiTeacher = session.teacher
    report = session.report
    items = sum(map(len, session.open.values()))
    asked = [key for key in session.open if not session.known(key)]
    text_tokens = image_tokens = tokens_out = 0.0
    image_counts = []
    for key in cli.progress(asked, desc="estimating", unit="request"):
        request, _ = session.prepare(key)
        text, image = input_tokens(request, teacher.structured)
        text_tokens += text
        image_tokens += image
        tokens_out += output_tokens(request, teacher.structured, teacher.preset.exact)
        image_counts.append(len(request.images))
    ratio, how = _counted(session, asked)
    tokens_in = (text_tokens + image_tokens) * ratio
    cli.print0(
        f"{report.total} rationales: {report.kept} have a reply, {len(report.unusable)} hold nothing to ask about, "
        f"{items} are open: {len(session.open)} distinct requests ({items - len(session.open)} duplicates, asked "
        f"once), {len(session.open) - len(asked)} of them known already, {len(asked)} to ask"
    )
    cli.print0(f"images: {sum(image_counts)}, in {sum(map(bool, image_counts))} of these requests")
    if report.text_only:
        cli.print0(f"{report.text_only} rationales would go without the image that their question names")
    cli.print0(
        f"tokens: {tokens_in:,.0f} in ({image_tokens:,.0f} of them images), {tokens_out:,.0f} out; input {how}; "
        f"output by rule ({REPLY_CONTENT[session.kind if teacher.structured or session.kind == JUDGE else CORRECT]})"
    )
    if teacher.price is None:
        cli.print0(f"dollars: the price of {teacher.model} is not known; name it with --price IN OUT")
        return
    live = teacher.price.usd(tokens_in, tokens_out)
    batch = f", ${live * BATCH_FACTOR:.4f} with --batch" if teacher.has_batches else ""
    cli.print0(
        f"{teacher.model}, ${teacher.price.input:g} in / ${teacher.price.output:g} out per million tokens "
        f"({PRICES_DATE}): ${live:.4f} live{batch}; replies that must be asked again come on top"
    )


def _counted(session: Session, keys: list[str]) -> tuple[float, str]:
    """(correction of the input rule, in words how it was found)."""
    rule = f"by rule ({CHARACTERS_PER_TOKEN} characters a token)"
    key = os.environ.get(session.teacher.key_name, "").strip()
    if not keys or not key or not hasattr(session.teacher, "count_tokens"):
        return 1.0, rule
    sample = keys[:: max(1, len(keys) // SAMPLE)][:SAMPLE]

    async def count() -> float:
        counted = by_rule = 0.0
        async with session.teacher as teacher:
            for key in sample:
                request, _ = session.prepare(key)
                counted += await teacher.count_tokens(request)
                by_rule += sum(input_tokens(request, teacher.structured))
        return counted / by_rule

    try:
        ratio = asyncio.run(count())
    except Exception as error:  # the rule needs no network
        why = said(error, key)
        return 1.0, f"{rule}; counting failed: {why}"
    return ratio, f"by the API's count of {len(sample)} requests, {ratio:.2f} times the rule"


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
        about = {name: value for name, value in teacher.parameters(request).items() if name != "messages"}
        cli.print0(json.dumps(about))
        if teacher.price:
            cli.print0(f"custom_id {request.custom_id}; costs at most ${teacher.most_usd(request):.6f}")


def expected_usd(
    kind: str, problems: Mapping[str, Mapping], qids: Sequence[str], images: str | None, flags: Mapping
) -> float | None:
    """Mean dollars of one request of `kind`, by rule, before there is a rationale to ask about: gold rationales of a
    sample of `qids` stand for generated ones. `flags` are those of the Teacher's script; None: price not known."""
    if flags.get("teacher") in FREE:
        if not flags.get("ask_share"):
            return 0.0
        asked = {**flags, "teacher": flags.get("ask_teacher"), "ask_share": None}
        each = expected_usd(kind, problems, qids, images, asked)
        return None if each is None else each * float(flags["ask_share"])
    model = (kind == JUDGE and flags.get("judge_model")) or flags.get("teacher_model") or DEFAULT_MODEL
    price = Price(*flags["price"]) if flags.get("price") else None
    if flags.get("teacher") == "openai":
        price = OpenAITeacher.price_at(model, flags.get("base_url"), price)
    price = price or price_of(model)
    if price is None:
        return None
    total, qids = 0.0, qids[:: max(1, len(qids) // PLANNED)]
    for qid in qids:
        problem, text = problems[qid], problems[qid]["solution"]
        shown = tuple(images_of(images, qid)) if images else ()
        sentences = tuple(split_text(text)) if kind == SCORE else (text,) if kind == CORRECT else (text, text)
        written = (
            scoring_request(problem, sentences) if kind == SCORE
            else correction_request(problem, text) if kind == CORRECT
            else judge_request(problem, text, text, bool(shown))
        )  # fmt: skip
        request = Request(qid, kind, qid, written, sentences, shown)
        total += price.usd(sum(input_tokens(request, True)), output_tokens(request, True), bool(flags.get("batch")))
    return total / max(len(qids), 1)


# -- comparing two Teachers --------------------------------------------------------------------------------


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


def agreement_lines(first: Sequence[list[float] | None], second: Sequence[list[float] | None]) -> list[str]:
    """The lines of the comparison: mean absolute difference, correlation and share within 0.1 of the scores, over all
    sentences and by position in the rationale."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    rows: dict[str, list[tuple[float, float]]] = {"all": []}  # name of the row -> pairs of scores
    for scores in both:
        for position, pair in enumerate(zip(*scores, strict=True), start=1):
            rows["all"].append(pair)
            rows.setdefault(f"{position}" if position < LAST_POSITION else f"{LAST_POSITION}+", []).append(pair)
    lines = [f"{len(both)} of {len(first)} rationales scored by both, {len(rows['all'])} sentences"]
    if not rows["all"]:
        return lines
    lines.append("position   sentences   mean |difference|   correlation   within 0.1")
    for name, pairs in rows.items():
        differences = [abs(a - b) for a, b in pairs]
        close = sum(difference <= CLOSE + 1e-9 for difference in differences) / len(pairs)
        try:
            correlation = f"{statistics.correlation(*zip(*pairs, strict=True)):.3f}"
        except statistics.StatisticsError:  # one sentence, or equal scores
            correlation = "-"
        mean = statistics.fmean(differences)
        lines.append(f"{name:>8}   {len(pairs):>9}   {mean:>17.3f}   {correlation:>11}   {close:>10.1%}")
    return lines
