"""Before a paid run: what it would cost, how a request would look, and how far two Teachers agree on a sample.

Tokens are estimated by rule: text as `family_of` says; an image width x height / 750 after scaling to 1568 pixels; a
structured scoring reply as 35 characters and 14 for each sentence, any other reply as its text. With a key, the API's
free counting endpoint corrects the input rule on a sample. Only `scores_of`, for the comparison of two Teachers, asks
them and pays.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ares import cli, images
from ares.data_folder import question_images as images_of
from ares.sentences import split_text
from teacher import together
from teacher.api_responses import said
from teacher.api_teacher import ApiTeacher
from teacher.budget import BATCH_FACTOR, PRICES, PRICES_DATE, Price, price_of
from teacher.claude import DEFAULT_MODEL
from teacher.handoff import Item
from teacher.interface import CORRECT, FREE, JUDGE, SCORE, Request, same_model
from teacher.openai_compatible import OpenAITeacher
from teacher.prompts import WORDING, correction_request, judge_request, scoring_request
from teacher.session import Session

FRAME = 70  # characters that a message's own frame counts as
SCHEMA = 525  # that the schema of a structured request counts as
SAMPLE = 20  # requests counted by the API
PLANNED = 200  # questions whose requests are written to say what a run will cost
OTHER_MODELS = 3  # of the price table, beside the one that is asked
REPLY_CONTENT = {SCORE: "scores only", CORRECT: "the text again", JUDGE: "a sentence and a verdict"}


@dataclass(frozen=True)
class Family:
    """How a family of models counts text. `error`: of the rule, as a share."""

    characters_per_token: float
    error: float


CLAUDE_4 = Family(3.5, 0.15)
CLAUDE_5 = Family(3.5 / 1.3, 0.15)  # about 30 % more tokens for the same text
OTHER = Family(3.5, 0.30)  # open models and other providers: 3 to 4.5 of English text


def family_of(model: str) -> Family:
    """By the model's name, also within an id of a gateway."""
    name = re.search(r"claude-(?:[a-z]+-)?(\d+)", model.lower())
    if name is None:
        return OTHER
    return CLAUDE_5 if int(name[1]) >= 5 else CLAUDE_4


@dataclass
class Size:
    """What requests and their replies hold: text in characters, images in tokens."""

    requests: int = 0
    text: float = 0.0
    images: float = 0.0
    replies: float = 0.0
    image_files: int = 0
    with_images: int = 0  # requests

    def add(self, request: Request, structured: bool, exact: bool) -> None:
        self.requests += 1
        self.text += input_characters(request, structured, exact)
        self.images += sum(map(images.estimated_tokens, request.images))
        self.replies += output_characters(request, structured, exact)
        self.image_files += len(request.images)
        self.with_images += bool(request.images)

    def tokens(self, model: str, ratio: float = 1.0) -> tuple[float, float]:
        """(input, output) tokens of a model; `ratio` corrects the rule of the input."""
        characters = family_of(model).characters_per_token
        return (self.text / characters + self.images) * ratio, self.replies / characters

    def usd(self, model: str, price: Price, ratio: float = 1.0) -> float:
        return price.usd(*self.tokens(model, ratio))


def input_characters(request: Request, structured: bool, exact: bool = False) -> float:
    """Characters of a request without its images, by rule; its frame and its schema as what they count as."""
    note = request.exact_note if exact else request.form_note
    return len(request.text) + FRAME + (len(note) + SCHEMA if structured else 0)


def output_characters(request: Request, structured: bool, exact: bool = False) -> float:
    """Characters that the reply counts as, by rule: a number in a list is 4 tokens of Claude 4, with its key 8."""
    if request.kind == JUDGE:
        return 210
    text = sum(map(len, request.sentences))
    if request.kind == CORRECT:
        return 105 + text
    parts = len(request.rationales) * (7 if structured and not exact else 28)
    if structured:
        return 35 + parts + (28 if exact else 14) * len(request.sentences)
    return 35 + parts + 28 * len(request.sentences) + text


def preview(session: Session, items: list[Item], args: argparse.Namespace) -> None:
    """Do what --show or --estimate asks for. Raises UserError."""
    if args.show:
        return show(session, items, args.show)
    chosen, session.together = session.together, session.kind == SCORE  # to see what either way costs
    session.add(items, serve=False)
    ways = {"apart": [[key] for key in session.open], "together": session.units() if session.together else []}
    session.together = chosen
    return estimate(session, ways)


def estimate(session: Session, ways: Mapping[str, list[list[str]]] | None = None) -> None:
    """Print what answering the session's open requests would cost. `ways`: "apart" and "together" -> the units of
    each, if any; the session's own way is what the lines above the table are about."""
    teacher: ApiTeacher = session.teacher
    report = session.report
    items = sum(map(len, session.open.values()))
    asked = [key for key in session.open if not session.known(key)]
    unknown = set(asked)
    sizes, units = {}, {}
    for way, all_units in (ways or {"apart": [[key] for key in session.open]}).items():
        units[way] = [left for unit in all_units if (left := [key for key in unit if key in unknown])]
        sizes[way] = size = Size()
        for unit in cli.progress(units[way], desc=f"estimating {way}", unit="request"):
            size.add(joined(session, unit), teacher.structured, teacher.preset.exact)
    own = "together" if session.together else "apart"
    ratio, how = _counted(session, units[own])
    tokens_in, tokens_out = sizes[own].tokens(teacher.model, ratio)
    requests = f"{len(asked)} to ask"
    if session.together:
        requests += f", in {len(units[own])} requests"
    cli.print0(
        f"{report.total} rationales: {report.kept} have a reply, {len(report.unusable)} hold nothing to ask about, "
        f"{items} are open: {len(session.open)} distinct requests ({items - len(session.open)} duplicates, asked "
        f"once), {len(session.open) - len(asked)} of them known already, {requests}"
    )
    cli.print0(f"images: {sizes[own].image_files}, in {sizes[own].with_images} of these requests")
    if report.text_only:
        cli.print0(f"{report.text_only} rationales would go without the image that their question names")
    content = REPLY_CONTENT[session.kind if teacher.structured or session.kind == JUDGE else CORRECT]
    thinking = "; thinking tokens, if any, come on top" if teacher.preset.may_think else ""
    cli.print0(
        f"tokens: {tokens_in:,.0f} in ({sizes[own].images * ratio:,.0f} of them images), {tokens_out:,.0f} out; input "
        f"{how}; output {_rule(teacher.model)} ({content}{thinking})"
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
    for line in table(session, {way: size for way, size in sizes.items() if size.requests}, ratio):
        cli.print0(line)


def joined(session: Session, unit: Sequence[str]) -> Request:
    """The request that is sent for the open ones of a unit."""
    return session.join([session.prepare(key)[0] for key in unit])


def table(session: Session, sizes: Mapping[str, Size], ratio: float) -> list[str]:
    """Lines that compare ways of asking, live and in batches, for the session's model and others of the price table.

    `ratio`: of the counted input tokens to the rule, for the session's model.
    """
    teacher = session.teacher
    models = {teacher.model: (teacher.price, ratio)}
    if teacher.has_batches:  # the price table's models are of this provider
        others = [model for model in PRICES if not same_model(model, teacher.model)]
        models |= {model: (price_of(model), 1.0) for model in others[:OTHER_MODELS]}
    width = max(map(len, models))
    ends = f"{'live':>10}" + (f"{'--batch':>10}" if teacher.has_batches else "")
    lines = [f"{'':{width}}  {'':8}{'requests':>10}{'tokens in':>14}{'tokens out':>13}{ends}   error"]
    for model, (price, counted) in models.items():
        for way, size in sizes.items():
            tokens, usd = size.tokens(model, counted), size.usd(model, price, counted)
            cells = f"{size.requests:>10,}{tokens[0]:>14,.0f}{tokens[1]:>13,.0f}{_dollars(usd)}"
            cells += _dollars(usd * BATCH_FACTOR) if teacher.has_batches else ""
            rule = _rule(model) if counted == 1.0 else "input counted"
            lines.append(f"{model:{width}}  {way:8}{cells}   {rule}")
    return lines


def _dollars(usd: float) -> str:
    return f"{f'${usd:.2f}' if usd >= 1 else f'${usd:.4f}':>10}"


def _rule(model: str) -> str:
    """`by rule, +-15 %`"""
    return f"by rule, +-{family_of(model).error:.0%}".replace("%", " %")


def _counted(session: Session, units: list[list[str]]) -> tuple[float, str]:
    """(correction of the input rule, in words how it was found)."""
    model = session.teacher.model
    rule = f"{_rule(model)} ({family_of(model).characters_per_token:.1f} characters a token)"
    key = os.environ.get(session.teacher.key_name, "").strip()
    if not units or not key or not hasattr(session.teacher, "count_tokens"):
        return 1.0, rule
    sample = units[:: max(1, len(units) // SAMPLE)][:SAMPLE]

    async def count() -> float:
        counted, size = 0.0, Size()
        async with session.teacher as teacher:
            for unit in sample:
                request = joined(session, unit)
                counted += await teacher.count_tokens(request)
                size.add(request, teacher.structured, teacher.preset.exact)
        return counted / size.tokens(model)[0]

    try:
        ratio = asyncio.run(count())
    except Exception as error:  # the rule needs no network
        why = said(error, key)
        return 1.0, f"{rule}; counting failed: {why}"
    return ratio, f"by the API's count of {len(sample)} requests, {ratio:.2f} times the rule"


def show(session: Session, items: list[Item], qid: str) -> None:
    """Print a request about a question as it would be sent, images by name: that of its first rationale, or with
    `session.together` the first one about several. Raises UserError."""
    chosen = [item for item in items if item.qid == qid]
    if not chosen:
        raise cli.UserError(f"--show: no rationale of question {qid} in {session.root}; it has e.g. {items[0].qid}")
    item = chosen[0]
    request = session.request(item)
    if request is None:
        raise cli.UserError(f"--show: {item.folder} has no request that fits its rationale; run the preprocessing")
    if session.together:
        shared, alike = together.shared_text(request), {}
        for each in filter(None, map(session.request, chosen)):
            if shared is not None and together.shared_text(each) == shared:
                alike.setdefault(each.sentences, each)
        if len(alike) > 1:
            request = together.join(list(alike.values()), session.wording)
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
    kind: str,
    problems: Mapping[str, Mapping],
    qids: Sequence[str],
    images: str | None,
    flags: Mapping,
    rationales: int = 1,
) -> float | None:
    """Mean dollars for one rationale, or judgement, of `kind`, by rule, before there is one: gold rationales of a
    sample of `qids` stand for generated ones. `flags` are those of the Teacher's script; `rationales` of a question
    share a request with --together. None: price not known."""
    if flags.get("teacher") in FREE:
        if not flags.get("ask_share"):
            return 0.0
        asked = {**flags, "teacher": flags.get("ask_teacher"), "ask_share": None}
        each = expected_usd(kind, problems, qids, images, asked, rationales)
        return None if each is None else each * float(flags["ask_share"])
    model = (kind == JUDGE and flags.get("judge_model")) or flags.get("teacher_model") or DEFAULT_MODEL
    price = Price(*flags["price"]) if flags.get("price") else None
    if flags.get("teacher") == "openai":
        price = OpenAITeacher.price_at(model, flags.get("base_url"), price)
    price = price or price_of(model)
    if price is None:
        return None
    joined = rationales if kind == SCORE and flags.get("together") else 1
    size, qids = Size(), qids[:: max(1, len(qids) // PLANNED)]
    for qid in qids:
        problem, text = problems[qid], problems[qid]["solution"]
        shown = tuple(images_of(images, qid)) if images else ()
        sentences = tuple(split_text(text)) if kind == SCORE else (text,) if kind == CORRECT else (text, text)
        written = (
            scoring_request(problem, sentences) if kind == SCORE
            else correction_request(problem, text) if kind == CORRECT
            else judge_request(problem, text, text, bool(shown))
        )  # fmt: skip
        request = Request(qid, kind, qid, written, sentences, shown, form_note=WORDING.structured.get(kind, ""))
        size.add(together.join([request] * joined, WORDING) if joined > 1 else request, True, False)
    return size.usd(model, price) * (BATCH_FACTOR if flags.get("batch") else 1) / max(len(qids) * joined, 1)
