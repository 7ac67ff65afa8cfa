"""One client for every kind of Teacher: what haiku.py, haiku_for_correction_feedback.py and tools/win_rate.py share.

Three Teachers: Claude (teacher/claude.py), a server of chat completions (teacher/openai_compatible.py) and the offline
reference (teacher/reference.py). A request is sent for every item (`handoff.Item`) without a usable reply,
identical requests only once (teacher/session.py), live or, with --batch, through teacher/batches.py. This module holds
the flags and puts the parts together. Needs no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ares import cli, files, launch
from teacher import batches, reference
from teacher.api_responses import LENGTH_FIELDS, in_line
from teacher.api_teacher import ApiTeacher
from teacher.batch_store import BatchStore, digest
from teacher.budget import LOG, Ledger, Price, read_log
from teacher.claude import DEFAULT_MODEL, ClaudeTeacher
from teacher.handoff import RATIONALE, Item
from teacher.interface import FREE, JUDGE, MODEL, REFERENCE, SCORE, Reply, Request, Teacher
from teacher.live import ask_live
from teacher.openai_compatible import OpenAITeacher
from teacher.reply_files import ReplyCache, is_answered
from teacher.report import Report, in_words
from teacher.sdk_client import TIMEOUT
from teacher.session import OURS, REFUSED, Session


class ReferenceTeacher:
    """Scores and corrects from the question's own gold texts: free, offline, deterministic (teacher/reference.py)."""

    name = REFERENCE
    model = reference.VERSION
    concurrency = 1

    async def __aenter__(self) -> ReferenceTeacher:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    def stop(self) -> None:
        pass

    def key(self, request: Request) -> str:
        images = list(map(str, request.images))
        asked = [self.model, request.kind, request.qid, request.text, request.sentences, images]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    async def answer(self, request: Request) -> Reply:
        """The reply in the form that Claude is asked for."""
        began = time.monotonic()
        if request.kind == SCORE:
            scores = reference.score_sentences(request.problem, request.sentences)
            lines = (f'"{text}": {score}' for text, score in zip(request.sentences, scores, strict=True))
            text = "{\n" + ",\n".join(lines) + "\n}"
        elif request.kind == JUDGE:
            verdict = reference.compare(request.problem, *request.sentences)
            text = json.dumps({"reason": verdict.reason, "verdict": verdict.better})
        else:
            rationale = " ".join(request.sentences)
            final = reference.correct_rationale(request.problem, rationale)
            text = json.dumps({"Final rationale": final}, indent=0, ensure_ascii=False)
        return Reply(text, self.name, self.model, "end_turn", seconds=round(time.monotonic() - began, 3))


PROVIDERS: dict[str, type[ApiTeacher]] = {each.name: each for each in (ClaudeTeacher, OpenAITeacher)}

# -- flags -----------------------------------------------------------------------------------------------


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which Teacher is asked, how, and at what cost."""
    add = parser.add_argument_group("teacher").add_argument
    teachers = (
        "claude: the API, key from ANTHROPIC_API_KEY; openai: any server of OpenAI's chat completions (vLLM ...), "
        "key from OPENAI_API_KEY, none for a local one; reference: offline, from the gold solution, no key; model "
        "(haiku.py): a reward model of your own, no key"
    )
    add("--teacher", choices=(*PROVIDERS, *FREE), default="claude", help=teachers)
    model = "any model id (default: %(default)s; --teacher openai has no default)"
    add("--teacher_model", default=DEFAULT_MODEL, help=model)
    add("--base_url", metavar="URL", help="another address of the API: a gateway, or your own server")
    in_flight = "most requests in flight, fewer when the API says so (default: %(default)s, about 1,000 a minute)"
    add("--concurrency", type=int, default=32, help=in_flight)
    add("--attempts", type=int, default=3, help="requests per item until its reply is usable (default: %(default)s)")
    add("--timeout", type=float, default=TIMEOUT, metavar="S", help="seconds per request (default: %(default)g)")
    structured = "send a JSON schema for the reply; auto: if the model is known to take one (default: %(default)s)"
    add("--structured", choices=("auto", "on", "off"), default="auto", help=structured)
    body = 'merged into the body of every request, over the model\'s preset; {"temperature": null} removes a field'
    add("--body", metavar="JSON", help=body)
    add("--keep_replies", action="store_true", help="use replies that another Teacher or model wrote before")
    add("--accept-missing", action="store_true", help="go on although some replies are missing or unusable")
    add = parser.add_argument_group("batches, money, looking before asking").add_argument
    add("--batch", action="store_true", help="Message Batches (Claude): half the price, most end within an hour")
    add("--submit-only", action="store_true", help="with --batch: submit and leave; collect by --batch")
    looks = "between looks at batches (default: %(default)g)"
    add("--poll_seconds", type=float, default=30.0, metavar="S", help=looks)
    add("--max_usd", type=float, metavar="USD", help="stop before this run's spend exceeds it (exit 3)")
    prices = "dollars per million tokens, if not in the table; a local server of --teacher openai costs nothing"
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help=prices)
    add("--estimate", action="store_true", help="print counts, tokens and dollars; ask nothing paid")
    add("--show", metavar="QID", help="print a question's request as it would be sent; ask nothing")
    add("--cache", metavar="DIR", help="replies of earlier runs (default: ~/.cache/ares/teacher)")
    add("--no-cache", action="store_true", help="neither read nor keep replies there")


# bytes of disk that are reserved, in all and per reply in flight: a reply has four files of some blocks each
RESERVED, RESERVED_PER_REPLY = 1 << 20, 1 << 16
MOST_TOGETHER = 8  # replies to one request for which disk is reserved

FOR_APIS = frozenset(
    "teacher_model base_url concurrency attempts timeout structured body batch submit_only poll_seconds max_usd price "
    "estimate cache no_cache together".split()
)

FOR_SECOND = frozenset("concurrency attempts timeout structured max_usd cache no_cache".split())  # of --check's second


def check_teacher_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse flags that would be ignored, and a missing key or model.

    `given`: `cli.given_flags` of the script's parser. `args.body` becomes a dict, `args.base_url` the address as the
    SDK wants it.
    """
    wrong = []
    provider = PROVIDERS.get(args.teacher)
    if provider is None:
        paid = getattr(args, "check", None) and second_teacher(args).teacher in PROVIDERS
        used = FOR_SECOND if paid else {"poll_seconds"} if getattr(args, "watch", None) else set()
        ignored = sorted(given & FOR_APIS - used)
        wrong = [f"{_flag(name)} has no effect with --teacher {args.teacher}; leave it out" for name in ignored]
    if args.teacher == MODEL and not hasattr(args, "model_teacher"):
        wrong.append("--teacher model only scores sentences, by haiku.py; name another Teacher")
    wrong += [f"--{name} must be at least 1" for name in ("concurrency", "attempts") if getattr(args, name) < 1]
    wrong += [
        f"--{name} must be a number above 0"
        for name in ("timeout", "poll_seconds", "max_usd")
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf  # nan neither
    ]
    modes = [name for name in ("batch", "estimate", "show", "watch", "check") if getattr(args, name, None)]
    if len(modes) > 1:
        wrong.append(f"{' and '.join(map(_flag, modes))} do not go together; give one")
    if args.submit_only and not args.batch:
        wrong.append("--submit-only needs --batch")
    if provider and args.batch and not provider.has_batches:
        wrong.append(f"--batch: --teacher {args.teacher} has no batches; leave it out")
    try:
        args.base_url = provider.address_of(args.base_url, "--base_url") if provider and args.base_url else None
    except cli.UserError as error:
        wrong.append(str(error))
    try:
        args.body = parse_body(args.body)
    except cli.UserError as error:
        wrong.append(str(error))
    if args.cache and args.no_cache:
        wrong.append("--cache and --no-cache contradict each other; give one")
    if args.price and not all(0 <= price < math.inf for price in args.price):
        wrong.append("--price: two numbers of 0 or more")
    cli.refuse(wrong)
    if provider and "teacher_model" not in given and provider.default_model is None:
        raise cli.UserError(f"--teacher_model: name a model for --teacher {args.teacher}{_offered(args)}")
    teachers = [make_teacher(args) if args.teacher != MODEL else None]
    if getattr(args, "check", None):
        teachers.append(make_teacher(second_teacher(args)))
    if args.max_usd is not None:
        _refuse_unknown_cost(teachers)
    for teacher in teachers:
        if isinstance(teacher, ApiTeacher) and not args.estimate and not args.show:
            teacher.find_key(teacher.base_url)


def parse_body(text: str | None) -> dict[str, Any]:
    """The fields of --body. Raises UserError for what is no JSON object, and for fields that are not the user's."""
    if text is None:
        return {}
    try:
        body = files.parse_json(text)
    except (ValueError, RecursionError) as error:
        raise cli.UserError(f"--body: {text[:60]!r} is no JSON ({error}); write it as '{{\"top_k\": 1}}'") from None
    if not isinstance(body, dict):
        raise cli.UserError(f"--body: {text[:60]!r} is no JSON object; write it as {{...}}")
    for name in sorted(body.keys() & NOT_FOR_BODY.keys()):
        raise cli.UserError(f"--body: {name} {NOT_FOR_BODY[name]}")
    return body


NOT_FOR_BODY = {  # field -> why it is refused
    "model": "cannot be set here, --teacher_model says it; remove it",
    "messages": "cannot be set here, the questions folder says it; remove it",
    "stream": "cannot be set here, nothing says it; remove it",
    "timeout": "is no field of a request; use --timeout",
    "extra_body": "is no field of a request; put its fields directly into --body",
    **dict.fromkeys(("extra_headers", "extra_query"), "is no field of a request; remove it"),
    **dict.fromkeys(("n", "best_of"), "is not read: a reply would be paid several times, and one is used; remove it"),
}


def _offered(args: argparse.Namespace) -> str:
    """`; the server has a, b`, if it lists its models."""

    async def listed() -> list[str]:
        async with make_teacher(args) as teacher:
            return await teacher.listed_models()

    models = asyncio.run(listed())
    return f"; the server has {in_line(models)}" if models else ""


def _refuse_unknown_cost(teachers: Sequence[Teacher | None]) -> None:
    """Raise UserError where --max_usd cannot be kept."""
    fixes = ("name it with --price IN OUT", "make it --teacher_model, with --price IN OUT")
    wrong = [
        f"--max_usd: the price of {teacher.model} is not known; {fix}"
        for teacher, fix in zip(teachers, fixes, strict=False)
        if isinstance(teacher, ApiTeacher) and teacher.price is None
    ]
    for teacher in [teacher for teacher in teachers[:1] if isinstance(teacher, ApiTeacher)]:  # --body is the first's
        lengths = {name: teacher.extra[name] for name in LENGTH_FIELDS if name in teacher.extra}
        odd = [name for name, length in lengths.items() if length is not None and type(length) is not int]
        wrong += [f"--max_usd: --body: {name} must be a whole number: the most tokens of a reply" for name in odd]
        if (own := teacher.length_field) in lengths and not any(lengths.values()):
            wrong.append(f"--max_usd: --body removes {own}: a reply then costs anything; leave it there")
    cli.refuse(wrong)


def second_teacher(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of the second Teacher of --check: `reference`, a model of the first one's provider, or `claude:MODEL`
    or `openai:MODEL` at the provider's own address (--price and --body are the first one's); `apart`: itself."""
    name, colon, model = args.against.partition(":")
    other = argparse.Namespace(**{**vars(args), "price": None, "body": {}})
    if args.against == "apart":
        return argparse.Namespace(**{**vars(args), "together": False})
    if args.against == REFERENCE:
        other.teacher = other.teacher_model = REFERENCE
    elif colon and name in PROVIDERS:
        other.teacher, other.teacher_model = name, model
        other.base_url = args.base_url if name == args.teacher else None
    else:
        other.teacher = "claude" if args.teacher in FREE else args.teacher
        other.teacher_model = args.against
    return other


def _flag(name: str) -> str:
    return "--" + (name.replace("_", "-") if name in ("submit_only", "no_cache") else name)


def make_teacher(args: argparse.Namespace, ledger: Ledger | None = None) -> Teacher:
    """The Teacher that the flags name."""
    if args.teacher == REFERENCE:
        return ReferenceTeacher()
    if args.teacher == MODEL:
        return args.model_teacher  # made by the script: it needs torch, which this package does without
    return PROVIDERS[args.teacher](
        args.teacher_model,
        args.base_url,
        args.concurrency,
        price=Price(*args.price) if args.price else None,
        structured=args.structured,
        extra=args.body,
        timeout=args.timeout,
        ledger=ledger,
    )


# -- putting the parts together ----------------------------------------------------------------------------


@contextlib.contextmanager
def work_in(root: str | Path, flag: str, args: argparse.Namespace, before: Ledger | None = None) -> Iterator[Teacher]:
    """The Teacher, with the folder's lock held and its spend log open. Raises UserError if another client holds it.

    At the end it prints retried errors, and what the folder has cost if requests were lost. `before`: the ledger of a
    folder that this run worked in before, whose spend counts towards --max_usd.
    """
    ours = Path(root) / OURS
    for place in (ours, ours / "batches"):
        files.refuse_links(place, root)
    files.writable_dir(ours, flag)
    with contextlib.ExitStack() as held:
        held.enter_context(launch.only_one(ours / "lock", f"{flag} {root}"))
        paid = args.teacher in PROVIDERS
        if paid:  # on a full disk, replies to requests in flight must still be saved
            replies = args.concurrency * (MOST_TOGETHER if getattr(args, "together", False) else 1)
            held.enter_context(files.reserve(ours / "reserve", RESERVED + replies * RESERVED_PER_REPLY))
        ledger = Ledger(ours if paid else None, args.max_usd)
        if before is not None:
            ledger.spent_usd, ledger.lost, ledger.lost_usd = before.spent_usd, before.lost, before.lost_usd
        teacher = make_teacher(args, ledger)
        try:
            yield teacher
        finally:
            ledger.close()
            if retried := getattr(teacher, "retried", None):
                cli.print0(f"retried errors: {in_words(retried)}")
            totals = read_log(ours / LOG)
            if totals.unknown:
                cli.print0(
                    f"{ours / LOG}: ${totals.usd:.4f} for {totals.replies} replies so far, and at most "
                    f"${totals.unknown_usd:.4f} for {totals.unknown} requests of unknown cost (killed, lost, or "
                    "answered without their usage)"
                )


def make_session(root: str | Path, teacher: Teacher, kind: str, args: argparse.Namespace, **more: Any) -> Session:
    """A Session with the settings of the flags; `more`: arguments of its class."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ares" / "teacher"
    if args.no_cache or args.teacher in FREE:  # nothing is paid twice
        cache = None
    elif args.cache:
        cache = files.writable_dir(args.cache, "--cache")
    more |= {"attempts": args.attempts, "cache": ReplyCache(cache), "keep_replies": args.keep_replies}
    return Session(root, teacher, kind, **more)


def answer_items(session: Session, items: Sequence[Item], args: argparse.Namespace) -> Report:
    """Ask the Teacher for every item that has no usable reply, live or in batches as the flags say.

    Raises UserError if items have no request, and for what stops the Teacher; replies so far are kept.
    """
    store = check_pending(session.root, session.kind, items, args)
    session.add(items)
    if args.batch:
        batches.ask_in_batches(session, store, args.submit_only, args.poll_seconds)
    else:
        ask_live(session)
    return session.report


def check_pending(
    root: str | Path, kind: str, items: Sequence[Item], args: argparse.Namespace, texts: Mapping[str, str] = {}
) -> BatchStore:
    """The folder's records of batches. Raises UserError if a run on `items` would pay again for what is pending, live,
    or would throw the replies to other items away, or to other requests than `texts` (name of an item -> its text)."""
    store = BatchStore(Path(root) / OURS / "batches")
    if not args.batch:
        store.refuse_pending()
    ours, lost = {item.name for item in items}, []
    for asked in [asked for record in store.pending() for asked in record.all_asked()]:
        folder = Path(root, asked["item"])
        if asked["item"] in texts:
            useless = digest(texts[asked["item"]]) != asked["text"]
        else:
            useless = asked["item"] not in ours and (folder / RATIONALE).exists()
        if useless and not is_answered(kind, folder):
            lost.append(asked["item"])
    if lost:
        flag, what = "--batch", f"{len(lost)} other items (first: {lost[0]})"
        fix = "collect them with the flags they were submitted with"
        if getattr(args, "actions", None) and int(action := lost[0].partition("/")[0]) not in args.actions:
            flag, what, fix = "--actions", f"action {action}, too", "leave --actions out to collect them"
        raise cli.UserError(f"{flag}: the pending batches hold {what}, whose replies would be lost; {fix}")
    return store


def refuse_unusable(report: Report, accept_missing: bool) -> None:
    """Raise UserError with the reasons if replies are unusable, unless the user has said to go on without them."""
    lost = Counter(report.blocking().values())
    refused = f"; {report.refused} that the API calls invalid are not asked again before their requests change, or "
    refused = f"{refused}teacher/{REFUSED} there is deleted" if report.refused else ""
    if lost and not accept_missing:
        raise cli.UserError(
            f"{lost.total()} of {report.total} replies are unusable ({in_words(lost)}){report.examples()}; run the "
            "same command again to ask for them anew (with --batch: and a larger --attempts), or add --accept-missing "
            f"to go on without them{refused}"
        )
