"""Claude as a Teacher: the official SDK, asked asynchronously, with images; typed errors become one line each.

The key comes from ANTHROPIC_API_KEY alone and is never written or shown. Retryable errors (429, 529, 5xx, lost
connections) are retried here and not in the SDK, so that every request is paced (teacher/pacing.py) and booked
(teacher/budget.py). Used through `python haiku.py --teacher claude`; teacher/batches.py asks in Message Batches.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib
import inspect
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ares import images
from ares.cli import UserError
from teacher.api_errors import DEFAULT_MODEL, KEY, Failure, as_user_error, failure_of, is_account_refusal, redact, said
from teacher.budget import LOST, NOT_SENT, Ledger
from teacher.interface import CORRECT, JUDGE, SCORE, Reply, Request, Stopped, Unanswered
from teacher.pacing import START, Pace, Trials
from teacher.prices import CACHE_WRITE_1_HOUR, Price, cost_usd, price_of
from teacher.reply_bodies import ErrorAsReply, read_body, read_message

if TYPE_CHECKING:
    import anthropic

MAX_REQUEST_BYTES = 32_000_000
MAX_RETRIES = 8  # pauses of 0.5, 1, 2, 4, 8, 8 ... s: about 40 s without any reply, then the run stops
MAX_TRIES = 30  # of one request while others are answered
MAX_SAME = 6  # of one request that meets the same error, with the same text, each time
BACKOFF, MAX_BACKOFF = 0.5, 8.0  # seconds
LONGEST_PAUSE = 3600.0  # seconds: a `retry-after` beyond it ends the run
MAX_REJECTED = 20  # requests that the API calls invalid while it answers others
MAX_REJECTED_ALIKE = 5  # of one sort (with images, say), in the same words, before any request of the sort has a reply
# rate limits, overload, and what a proxy answers while its server restarts
PASSING = frozenset((408, 409, 429, 502, 503, 504, 520, 521, 522, 523, 524, 529))
TIMEOUT = 180.0  # seconds for one request; an answer takes a few

_SCORES_SCHEMA = {
    "type": "object",
    "properties": {"scores": {"type": "array", "items": {"type": "number"}}},
    "required": ["scores"],
    "additionalProperties": False,
}
_CORRECTION_SCHEMA = {
    "type": "object",
    "properties": {"Original rationale": {"type": "string"}, "Final rationale": {"type": "string"}},
    "required": ["Original rationale", "Final rationale"],
    "additionalProperties": False,
}
_VERDICT_SCHEMA = {  # the reason first: a verdict that is written before its reason has none
    "type": "object",
    "properties": {"reason": {"type": "string"}, "verdict": {"type": "string", "enum": ["1", "2", "tie"]}},
    "required": ["reason", "verdict"],
    "additionalProperties": False,
}
# one schema per kind, whatever the sentences: a new schema costs the API a compilation
SCHEMAS = {SCORE: _SCORES_SCHEMA, CORRECT: _CORRECTION_SCHEMA, JUDGE: _VERDICT_SCHEMA}


@dataclass(frozen=True)
class Family:
    """How a family of models wants to be asked: fields of the request's body."""

    beginnings: tuple[str, ...]
    body: Mapping[str, Any] = field(default_factory=dict)
    structured: bool = False  # takes output_config.format; counts and ranges are not enforced by it
    may_think: bool = False  # thinking cannot be ruled out: its tokens count towards max_tokens


# Grading needs neither thinking (paid as output) nor chance. The 5 series thinks unless told not to and answers a
# non-default temperature with 400; the 4.5 series thinks only when asked and takes a temperature.
FAMILIES = (
    Family(("claude-haiku-5", "claude-sonnet-5", "claude-opus-5"), {"thinking": {"type": "disabled"}}, True),
    Family(("claude-haiku-4-5", "claude-sonnet-4-5", "claude-opus-4-5"), {"temperature": 0.0}, True),
    Family(("",), may_think=True),  # any other: nothing that it might refuse
)


def family_of(model: str) -> Family:
    """The preset for a model id; the last one fits any."""
    return next(family for family in FAMILIES if model.startswith(family.beginnings))


def max_tokens(request: Request, family: Family) -> int:
    """Room for the reply: it repeats the sentences (a correction twice), at no less than two characters a token."""
    characters = sum(map(len, request.sentences))
    room = 256 + 16 * len(request.sentences) + characters // 2
    if request.kind == CORRECT:
        room = 512 + characters
    if request.kind == JUDGE:
        room = 400  # a sentence and a word, whatever is judged
    return room * request.room + (4096 if family.may_think else 0)


def api_key() -> str:
    """The key from the environment. Raises UserError, which does not show it, if there is none that could be one."""
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise UserError(f"--teacher claude: {KEY} is not set; export it, or use --teacher reference (needs no key)")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"--teacher claude: {KEY} holds characters that no key has; export it again")
    return key


def server_address(url: str | None, flag: str = "--base_url") -> str | None:
    """The server's root, as the SDK wants it: without `/v1` or a path of the API, if one is appended.

    Raises UserError naming `flag` for what is no address or holds a user name or a password, without showing those.
    """
    if url is None:
        return None
    url = url.strip()
    if "@" in url:
        raise UserError(f"{flag}: the address holds a user name or a password; leave them out, the key is {KEY}")
    if not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
        shown = redact(url, os.environ.get(KEY, "").strip())
        raise UserError(f"{flag}: {shown} is no address; it begins with http:// or https://")
    path = r"/+v1(/+(messages(/(batches|count_tokens))?|complete|chat/completions|models))?/*(\?.*)?$"
    return re.sub(path, "", url).rstrip("/")


def check_network() -> None:
    """Raise UserError where the proxy or the certificates that the environment names cannot be used."""
    import anthropic

    variables = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
    proxies = [name for upper in variables for name in (upper, upper.lower()) if os.environ.get(name)]
    certificates = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
    for name in certificates:
        if not os.path.exists(os.environ[name]):
            raise UserError(f"--teacher claude: {name}: {os.environ[name]} does not exist; unset it or name another")
    try:
        anthropic.DefaultAsyncHttpxClient()  # reads both, as each client of the SDK does
    except OSError as error:
        where = " or ".join(certificates) or "the system"
        raise UserError(
            f"--teacher claude: the certificates that {where} names cannot be read ({error}); unset it or name others"
        ) from error
    except Exception as error:  # ValueError, ImportError or the HTTP library's own, of the version that is installed
        # not the address itself: it may hold a password
        kinds = sorted({os.environ[name].partition("://")[0] for name in proxies if "://" in os.environ[name]})
        raise UserError(
            f"--teacher claude: the proxy in {' or '.join(proxies) or 'the environment'} ({', '.join(kinds)}://...) "
            "cannot be used; name an http:// proxy, or socks5:// after pip install socksio, or unset it"
        ) from error


class ClaudeTeacher:
    """Asks one model through the Messages API. Needs ANTHROPIC_API_KEY once it is entered.

    Args:
        price: overrides the table's.
        structured: False asks for JSON in words only, for gateways that do not know `output_config`.
        timeout: seconds from sending a request to its whole reply.
    """

    name = "claude"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        base_url: str | None = None,
        concurrency: int = 8,
        *,
        price: Price | None = None,
        structured: bool = True,
        timeout: float = TIMEOUT,
        ledger: Ledger | None = None,
    ):
        self.model = model
        self.base_url = server_address(base_url)
        self.concurrency = concurrency
        self.price = price or price_of(model)
        self.family = family_of(model)
        self.structured = structured and self.family.structured
        self.timeout = timeout
        self.ledger = ledger or Ledger()
        self.retried: dict[str, int] = {}  # retried errors, by reason
        self.client: anthropic.AsyncAnthropic | None = None
        self._key = ""
        self._rejected = 0
        self._in_flight: Counter[int] = Counter()  # by the sort of request
        self._image_digests: dict[tuple, str] = {}

    async def __aenter__(self) -> ClaudeTeacher:
        import anthropic  # a second to import: not for --help, nor for the reference Teacher

        self._key = api_key()
        check_network()
        self.pace, self.trials = Pace(self.concurrency, START), Trials(START)
        address = self.base_url or server_address(os.environ.get("ANTHROPIC_BASE_URL") or None, "ANTHROPIC_BASE_URL")
        # httpx under the name by which this version of the SDK knows it
        base = next(each for each in anthropic.DefaultAsyncHttpxClient.__mro__ if each.__name__ == "AsyncClient")
        httpx = importlib.import_module(base.__module__.partition(".")[0])
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        # an explicit api_key keeps the SDK from looking for other credentials in the environment and on disk
        self.client = anthropic.AsyncAnthropic(
            api_key=self._key,
            base_url=address,
            max_retries=0,
            timeout=self.timeout,
            http_client=anthropic.DefaultAsyncHttpxClient(limits=limits),
        )
        self._arguments = frozenset(inspect.signature(self.client.messages.create).parameters)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.client.close()

    def stop(self) -> None:
        """Send nothing new; requests that wait for their turn raise Stopped."""
        self.pace.stop()
        self.trials.stop()

    # -- one request -----------------------------------------------------------------------------------------

    def key(self, request: Request) -> str:
        """Digest of everything the reply depends on; images by content."""
        asked = [self.model, request.kind, self.body(request), request.text, self.note(request), request.sentences]
        asked.append([self._image_digest(path) for path in request.images])
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def body(self, request: Request) -> dict[str, Any]:
        """What the model's family adds to a request's body."""
        if not self.structured:
            return dict(self.family.body)
        form = {"type": "json_schema", "schema": SCHEMAS[request.kind]}
        return {**self.family.body, "output_config": {"format": form}}

    def note(self, request: Request) -> str:
        return request.form_note if self.structured else ""

    def content(self, request: Request) -> list[dict[str, Any]]:
        """Images first, then the text, then the notes. Raises UserError for an unusable image."""
        blocks = [_image_block(path, request.qid) for path in request.images]
        texts = [text for text in (request.text, self.note(request), request.again) if text]
        size = sum(len(block["source"]["data"]) for block in blocks) + sum(map(len, texts))
        if size > MAX_REQUEST_BYTES:
            where = f" with its images ({request.images[0].parent})" if request.images else ""
            raise UserError(
                f"--images: question {request.qid}: {size / 1e6:.0f} MB{where}; "
                f"the API takes {MAX_REQUEST_BYTES / 1e6:.0f} MB; shrink them"
            )
        return [*blocks, *({"type": "text", "text": text} for text in texts)]

    def parameters(self, request: Request) -> dict[str, Any]:
        """The body of `POST /v1/messages`, as it also stands in a batch."""
        return {
            "model": self.model,
            "max_tokens": max_tokens(request, self.family),
            "messages": [{"role": "user", "content": self.content(request)}],
            **self.body(request),
        }

    def most_usd(self, request: Request, batch: bool = False) -> float | None:
        """No request can cost more: a token is at least a byte, and the reply ends at max_tokens.

        Where a gateway writes the request to a prompt cache, a token costs up to twice as much: so an image counts
        twice, while text, of more than two bytes a token, is covered by its bytes.
        """
        if self.price is None:
            return None
        text = len(f"{request.text}{self.note(request)}{request.again}".encode())
        form = 600 if self.structured else 100  # the API's own words around a request and its schema
        tokens = text + form + int(CACHE_WRITE_1_HOUR * images.MAX_TOKENS) * len(request.images)
        return self.price.usd(tokens, max_tokens(request, self.family), batch)

    async def answer(self, request: Request) -> Reply:
        """Ask the model until it replies (class Teacher says what is raised)."""
        await self.trials.begin(_sort(request))
        try:
            return await self._answer(request)
        finally:
            self.trials.end(_sort(request))

    async def _answer(self, request: Request) -> Reply:
        parameters = await asyncio.to_thread(self.parameters, request) if request.images else self.parameters(request)
        most_usd = self.most_usd(request)
        successes = self.pace.successes
        errors: list[tuple] = []
        for attempt in range(MAX_TRIES):
            outcome = await self._try(request, parameters, most_usd)
            if isinstance(outcome, Reply):
                return outcome
            failure, error, began = outcome
            if not failure.passing:
                await self._refused(failure, error, request)
            self.retried[failure.reason] = self.retried.get(failure.reason, 0) + 1
            errors.append((failure.reason, said(error, self._key)))
            if self._lasts(failure, errors[-1], request):
                raise self._hopeless(error, request, attempt) from None
            if failure.status in (429, 529):
                self.pace.overloaded(began)
            if failure.retry_after is not None:
                if failure.retry_after > LONGEST_PAUSE:
                    raise as_user_error(error, self, request, self._key, attempt) from None
                self.pace.pause(failure.retry_after)
            if attempt >= MAX_RETRIES and self.pace.successes == successes:
                raise as_user_error(error, self, request, self._key, attempt) from None
            if len(errors) >= MAX_SAME and len(set(errors)) == 1 and failure.status not in PASSING:
                if self.pace.successes > successes:  # else it may be the server
                    break
            if not failure.retry_after:  # 0 is no pause: the tries would be used up at once
                await self.pace.sleep(min(MAX_BACKOFF, BACKOFF * 2 ** min(attempt, 10)) * random.uniform(0.75, 1.0))
        raise Unanswered(failure.reason, errors[-1][1])

    async def _try(self, request: Request, parameters: dict[str, Any], most_usd: float | None) -> Reply | tuple:
        """One HTTP request: the Reply, or (failure, error, when it began)."""
        import anthropic

        sort = _sort(request)
        await self.pace.enter()
        self._in_flight[sort] += 1
        try:
            entry = await self.ledger.reserve(request.custom_id, most_usd)
            if self.pace.stopping:  # while it waited for the budget
                self.ledger.settle(entry, 0.0, NOT_SENT)
                raise Stopped
            began = time.monotonic()
            try:
                async with asyncio.timeout(self.timeout):  # the SDK's own limit holds for each piece of a reply
                    received = await self._create(parameters)
                reply = self.reply(received[0], round(time.monotonic() - began, 3), request_id=received[1])
            except (anthropic.AnthropicError, ValueError, TypeError, AttributeError, TimeoutError) as error:
                failure = failure_of(error)
                self.ledger.settle(entry, None, LOST if failure.charged else failure.reason)
                return failure, error, began
            except BaseException:  # cancelled, or a defect: whoever waits for the budget must not wait for this one
                self.ledger.settle(entry, None, LOST)
                raise
            unknown = reply.cost_usd is None and self.price is not None  # no `usage`: at most `most_usd`
            self.ledger.settle(entry, reply.cost_usd, LOST if unknown else "reply")
            self.pace.succeeded()
            self.trials.replied(sort)
            return reply
        finally:
            self._in_flight[sort] -= 1
            self.pace.leave()

    async def _create(self, parameters: dict[str, Any]) -> tuple[Any, str | None]:
        """(the reply's parts, the request's id). Raises what the SDK raises, and what `read_body` does."""
        import anthropic

        # as extra_body what this SDK has no argument for: `temperature` in new ones, `output_config` in old ones
        extra = {name: value for name, value in parameters.items() if name not in self._arguments}
        known = {name: value for name, value in parameters.items() if name in self._arguments}
        # raw: the SDK takes only its own form of a reply, and a body without `usage` was paid for all the same
        raw = await self.client.messages.with_raw_response.create(**known, extra_body=extra or None)
        response = raw.http_response
        data = await response.aread()
        try:
            return read_body(data), response.headers.get("request-id")
        except ErrorAsReply as error:
            headers = {name: response.headers[name] for name in ("retry-after",) if name in response.headers}
            as_sent = type(response)(error.status, headers=headers, request=response.request)
            raised = anthropic.APIStatusError(str(error), response=as_sent, body=error.body)
            raised.came_as_reply = True
            raise raised from None

    def reply(
        self, message: Any, seconds: float = 0.0, batch: str | None = None, request_id: str | None = None
    ) -> Reply:
        """A reply's parts (`reply_bodies.Received`) or a batch result's Message as a Reply, without the key.

        Raises ValueError if there is no reply in it.
        """
        if hasattr(message, "to_dict"):
            message = read_message(message.to_dict(warnings=False))

        def clean(text: str | None) -> str | None:
            # half a surrogate pair: JSON can carry it, no file can
            return text and redact(text, self._key).encode(errors="replace").decode()

        return Reply(
            text=clean(message.text),
            teacher=self.name,
            model=clean(message.model) or self.model,
            stop_reason=clean(message.stop_reason),
            request_id=clean(request_id),
            usage=message.usage,
            cost_usd=cost_usd(self.price, message.usage, batch is not None) if message.usage else None,
            seconds=seconds,
            batch=batch,
        )

    # -- errors ----------------------------------------------------------------------------------------------

    def _lasts(self, failure: Failure, error: tuple[str, str], request: Request) -> bool:
        """Whether retrying is useless: requests of this sort meet the same error again and again."""
        if failure.status in PASSING or failure.reason in ("timeout", "connection"):
            return False
        if failure.reason == "not_a_reply" and not self.pace.successes:  # not the API at all
            return self.trials.lasts(error, _sort(request), "any", requests=1)
        return self.trials.lasts(error, _sort(request), request.custom_id)

    def _hopeless(self, error: Exception, request: Request, retries: int) -> UserError:
        """What to raise when every request of a sort fails in the same way."""
        if self.pace.successes and not self.trials.replies[_sort(request)] and request.images:
            return UserError(
                f"--teacher_model: {self.model} answers every request with images by {said(error, self._key)!r} "
                f"({failure_of(error).reason}; question {request.qid}); name a model or server that takes images"
            )
        return as_user_error(error, self, request, self._key, retries)

    async def _refused(self, failure: Failure, error: Exception, request: Request) -> None:
        """An error that no repetition mends: of this one request if others are answered, else of the run."""
        sort, why = _sort(request), said(error, self._key)
        if failure.status in (400, 413, 422) and not is_account_refusal(error):
            deadline = time.monotonic() + self.timeout
            while not self.trials.replies[sort] and self._in_flight[sort] and time.monotonic() < deadline:
                await self.pace.sleep(0.05)  # those in flight show whether it is this request or all
            self._rejected += 1
            if self.pace.successes and self._rejected <= MAX_REJECTED:
                alike = self.trials.lasts((failure.reason, why), sort, request.custom_id, MAX_REJECTED_ALIKE, tries=1)
                if self.trials.replies[sort] or not alike:
                    raise Unanswered(failure.reason, why) from None
                raise self._hopeless(error, request, 0) from None
        raise as_user_error(error, self, request, self._key, 0) from None

    async def count_tokens(self, request: Request) -> int:
        """Input tokens of a request, by the API's free counting endpoint. Raises what the SDK raises."""
        counted = await self.client.with_options(max_retries=2).messages.count_tokens(
            model=self.model,
            messages=[{"role": "user", "content": self.content(request)}],
            extra_body={name: value for name, value in self.body(request).items() if name != "temperature"} or None,
        )
        return counted.input_tokens

    def _image_digest(self, path: os.PathLike) -> str:
        identity = images.file_identity(path)
        if identity not in self._image_digests:
            with open(path, "rb") as file:
                self._image_digests[identity] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._image_digests[identity]


def _sort(request: Request) -> int:
    """Requests without an image, with one, with several: a server may be able to do one and not the other."""
    return min(2, len(request.images))


def _image_block(path: os.PathLike, qid: str) -> dict[str, Any]:
    kind, data = images.load_image(path, qid)
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": kind, "data": base64.standard_b64encode(data).decode()},
    }
