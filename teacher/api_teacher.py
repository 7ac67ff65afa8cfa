"""A Teacher behind an HTTP API: how its requests are paced, retried and booked. Each provider is a subclass.

A provider (teacher/claude.py) says how to connect, what a request looks like and how it is sent once. Everything else
is here, so that every HTTP request counts towards the pace, the retries and the budget (teacher/budget.py):

    answer   one request until it has a reply: retries, pauses, errors that retrying does not mend
    _send    one HTTP request: waits for its turn and for the budget, books what it cost
    Pace     how many requests are in flight

The number in flight follows additive increase, multiplicative decrease (Chiu and Jain 1989), as TCP does. It starts
with a few, so that a fault of the whole run costs only a few requests, and each reply adds one. The first rate limit
or overload ends this start and halves the number, once for all requests in flight; from then on a reply adds 1/limit,
about one per round. `retry-after` delays all requests: the limit belongs to the key.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ares import images
from ares.cli import UserError
from teacher.api_responses import (
    ApiError,
    Failure,
    NoAnswer,
    Received,
    as_user_error,
    failure_of,
    is_account_refusal,
    redact,
    said,
)
from teacher.budget import CACHE_WRITE_1_HOUR, LOST, NOT_SENT, Ledger, Price, cost_usd, price_of
from teacher.interface import CORRECT, JUDGE, SCORE, Reply, Request, Stopped, Unanswered

START = 4  # requests in flight before the first reply
MAX_RETRIES = 8  # pauses of 0.5, 1, 2, 4, 8, 8 ... s: about 40 s without any reply, then the run stops
MAX_TRIES = 30  # of one request while others are answered
MAX_SAME = 6  # of one request that meets the same error, with the same text, each time
BACKOFF, MAX_BACKOFF = 0.5, 8.0  # seconds
LONGEST_PAUSE = 3600.0  # seconds: a longer `retry-after` ends the run
MAX_REJECTED = 20  # requests that the API calls invalid while it answers others
MAX_REJECTED_ALIKE = 5  # of one sort (with images, say), in the same words, before any request of the sort has a reply
# rate limits, overload, and what a proxy answers while its server restarts: these pass, whatever their text
TEMPORARY = frozenset((408, 409, 429, 502, 503, 504, 520, 521, 522, 523, 524, 529))
TIMEOUT = 180.0  # seconds for one request; an answer takes a few
# texts that servers also send when they fail for a while; a web page comes from a proxy
GENERAL = re.compile(
    r"<.*|(an? )?((internal|unexpected|unknown) ?)?(server ?)?error\b.{0,12}|overloaded.{0,12}|api_error|", re.I | re.S
)


def _schema(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


# one schema per kind, whatever the sentences: a new schema costs the API a compilation
_TEXT = {"type": "string"}
SCHEMAS = {
    SCORE: _schema({"scores": {"type": "array", "items": {"type": "number"}}}),
    CORRECT: _schema({"Original rationale": _TEXT, "Final rationale": _TEXT}),
    # the reason first: a verdict that is written before its reason has none
    JUDGE: _schema({"reason": _TEXT, "verdict": {"type": "string", "enum": ["1", "2", "tie"]}}),
}


class ApiTeacher:
    """Asks one model through an HTTP API.

    A subclass sets the five fields below, and defines `__aenter__` (which sets `secret` and `address` and
    calls `start`), `__aexit__`, and

        body(request)       fields of the request's body besides model, length and messages
        parameters(request) the request's body; raises UserError for an image that cannot be used
        send(parameters)    sends a request once and returns the reply's parts (Received) and the request's id; raises
                            ApiError, NoAnswer and what `api_responses.read_body` raises

    Args:
        price: overrides the table's.
        structured: whether requests carry a JSON schema.
        may_think: thinking cannot be turned off: its tokens count towards the reply's.
        timeout: seconds from sending a request to its whole reply.
    """

    name: str
    api: str  # for messages
    key_name: str  # environment variable of the key
    default_model: str
    retired: Mapping[str, str] = {}  # model id -> when it was retired

    def __init__(
        self,
        model: str,
        concurrency: int,
        *,
        price: Price | None = None,
        structured: bool = True,
        may_think: bool = False,
        timeout: float = TIMEOUT,
        ledger: Ledger | None = None,
    ):
        self.model, self.concurrency = model, concurrency
        self.price = price or price_of(model)
        self.structured, self.may_think = structured, may_think
        self.timeout = timeout
        self.ledger = ledger or Ledger()
        self.retried: Counter[str] = Counter()  # retried errors, by reason
        self.secret = ""
        self.address = ""
        self._rejected = 0
        self._image_digests: dict[tuple, str] = {}  # identity of a file -> digest

    def start(self) -> None:
        """Begin to send requests. Call it within the event loop that sends them."""
        self.pace = Pace(self.concurrency, START)

    def stop(self) -> None:
        """Send no new request; those that wait for their turn raise Stopped."""
        self.pace.stop()

    # -- what a request depends on and costs -----------------------------------------------------------------

    def key(self, request: Request) -> str:
        """Digest of everything the reply depends on; images by content."""
        digests = []
        for path in request.images:
            identity = images.file_identity(os.stat(path))
            if identity not in self._image_digests:
                with open(path, "rb") as file:
                    self._image_digests[identity] = hashlib.file_digest(file, "sha256").hexdigest()
            digests.append(self._image_digests[identity])
        asked = [self.model, request.kind, self.body(request), request.text, self.note(request), request.sentences]
        asked.append(digests)
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def note(self, request: Request) -> str:
        return request.form_note if self.structured else ""

    def texts(self, request: Request) -> list[str]:
        """The text and the notes behind it."""
        return [text for text in (request.text, self.note(request), request.again) if text]

    def max_tokens(self, request: Request) -> int:
        """Room for the reply: it repeats the sentences (a correction twice), at two characters a token or more."""
        characters = sum(map(len, request.sentences))
        tokens = 256 + 16 * len(request.sentences) + characters // 2
        if request.kind == CORRECT:
            tokens = 512 + characters
        if request.kind == JUDGE:
            tokens = 400  # a sentence and a word, whatever is judged
        return tokens * request.length_factor + (4096 if self.may_think else 0)

    def most_usd(self, request: Request, batch: bool = False) -> float | None:
        """The most that a request can cost: a token is at least a byte, and the reply ends at max_tokens.

        Where a gateway writes the request to a prompt cache, a token costs up to twice as much: so an image counts
        twice, while text, of more than two bytes a token, is covered by its bytes.
        """
        if self.price is None:
            return None
        text = len("".join(self.texts(request)).encode())
        form = 600 if self.structured else 100  # the API's own words around a request and its schema
        tokens = text + form + int(CACHE_WRITE_1_HOUR * images.MAX_TOKENS) * len(request.images)
        return self.price.usd(tokens, self.max_tokens(request), batch)

    def reply(
        self, received: Received, seconds: float = 0.0, batch: str | None = None, request_id: str | None = None
    ) -> Reply:
        """A reply's parts as a Reply, without the key."""

        def clean(text: str | None) -> str | None:
            # half of a surrogate pair: JSON can hold it, no file can
            return text and redact(text, self.secret).encode(errors="replace").decode()

        cost = cost_usd(self.price, received.usage, batch is not None) if received.usage else None
        return Reply(
            clean(received.text), self.name, clean(received.model) or self.model, clean(received.stop_reason),
            clean(request_id), received.usage, cost, seconds, batch,
        )  # fmt: skip

    # -- asking ----------------------------------------------------------------------------------------------

    async def answer(self, request: Request) -> Reply:
        """Send the request until it has a reply (class Teacher says what is raised)."""
        sort = sort_of(request)
        await self.pace.begin(sort)
        try:
            return await self._answer(request)
        finally:
            self.pace.end(sort)

    async def _answer(self, request: Request) -> Reply:
        parameters = await asyncio.to_thread(self.parameters, request) if request.images else self.parameters(request)
        most_usd = self.most_usd(request)
        successes = self.pace.successes
        errors: list[tuple[str, str]] = []
        for attempt in range(MAX_TRIES):
            began, outcome = await self._send(request, parameters, most_usd)
            if isinstance(outcome, Reply):
                return outcome
            error, failure = outcome, failure_of(outcome)
            if not failure.retryable:
                await self._refused(failure, error, request)
            self.retried[failure.reason] += 1
            errors.append((failure.reason, said(error, self.secret)))
            if self._is_permanent(failure, errors[-1], request):
                raise self._no_images(error, request) or as_user_error(error, self, request, attempt)
            if failure.status in (429, 529):
                self.pace.overloaded(began)
            if failure.retry_after:
                self.pace.pause(failure.retry_after)
            gone = attempt >= MAX_RETRIES and self.pace.successes == successes
            if gone or (failure.retry_after or 0.0) > LONGEST_PAUSE:
                raise as_user_error(error, self, request, attempt)
            if len(errors) >= MAX_SAME and len(set(errors)) == 1 and failure.status not in TEMPORARY:
                if self.pace.successes > successes:  # else it may be the server
                    break
            if not failure.retry_after:  # 0 is no pause: the tries would be used up at once
                await self.pace.sleep(min(MAX_BACKOFF, BACKOFF * 2 ** min(attempt, 10)) * random.uniform(0.75, 1.0))
        raise Unanswered(failure.reason, errors[-1][1])

    async def _send(
        self, request: Request, parameters: dict[str, Any], most_usd: float | None
    ) -> tuple[float, Reply | Exception]:
        """One HTTP request, booked: (when it began, by the monotonic clock; the Reply or the error)."""
        sort = sort_of(request)
        await self.pace.enter(sort)
        try:
            entry = await self.ledger.reserve(request.custom_id, most_usd)
            if self.pace.stopping:  # since it began to wait for the budget
                self.ledger.settle(entry, 0.0, NOT_SENT)
                raise Stopped
            began = time.monotonic()
            try:
                async with asyncio.timeout(self.timeout):  # of the whole reply; SDKs limit each piece of it
                    received, request_id = await self.send(parameters)
                reply = self.reply(received, round(time.monotonic() - began, 3), request_id=request_id)
            except (ApiError, NoAnswer, ValueError, TypeError, AttributeError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    error = NoAnswer("TimeoutError", timeout=True)
                failure = failure_of(error)
                self.ledger.settle(entry, None, LOST if failure.charged else failure.reason)
                return began, error
            except BaseException:  # cancelled, or a bug: others must not wait for this one's budget
                self.ledger.settle(entry, None, LOST)
                raise
            unknown = reply.cost_usd is None and self.price is not None  # no `usage`: at most `most_usd`
            self.ledger.settle(entry, reply.cost_usd, LOST if unknown else "reply")
            self.pace.succeeded(sort)
            return began, reply
        finally:
            self.pace.leave(sort)

    # -- errors that retrying does not mend ------------------------------------------------------------------

    def _is_permanent(self, failure: Failure, error: tuple[str, str], request: Request) -> bool:
        """Whether requests of this sort meet the same error again and again."""
        if failure.status in TEMPORARY or failure.reason in ("timeout", "connection"):
            return False
        if failure.reason == "not_a_reply" and not self.pace.successes:  # not the API at all
            return self.pace.is_permanent(error, sort_of(request), "any", requests=1)
        return self.pace.is_permanent(error, sort_of(request), request.custom_id)

    def _no_images(self, error: Exception, request: Request) -> UserError | None:
        """What to raise where requests without images are answered and those with images are not."""
        if not request.images or not self.pace.successes or self.pace.replies[sort_of(request)]:
            return None
        return UserError(
            f"--teacher_model: {self.model} answers every request with images by {said(error, self.secret)!r} "
            f"({failure_of(error).reason}; question {request.qid}); name a model or server that takes images"
        )

    async def _refused(self, failure: Failure, error: Exception, request: Request) -> None:
        """Raise for a permanent error: Unanswered if others are answered, else UserError for the run."""
        sort, why = sort_of(request), said(error, self.secret)
        if failure.status in (400, 413, 422) and not is_account_refusal(error):
            deadline = time.monotonic() + self.timeout
            while not self.pace.replies[sort] and self.pace.in_flight[sort] and time.monotonic() < deadline:
                await self.pace.sleep(0.05)  # those in flight show whether it is this request or all
            self._rejected += 1
            if self.pace.successes and self._rejected <= MAX_REJECTED:
                alike = self.pace.is_permanent(
                    (failure.reason, why), sort, request.custom_id, MAX_REJECTED_ALIKE, tries=1
                )
                if self.pace.replies[sort] or not alike:
                    raise Unanswered(failure.reason, why)
                raise self._no_images(error, request) or as_user_error(error, self, request, 0)
        raise as_user_error(error, self, request, 0)


def sort_of(request: Request) -> int:
    """Requests without an image (0), with one (1), with several (2): a server may accept one sort and not another."""
    return min(2, len(request.images))


class Pace:
    """Admits at most `limit` HTTP requests; `limit` moves between 1 and `most`, from `start` on. For one event loop.

    Until a sort of requests (`sort_of`) has its first reply, only `start` of them are tried, retries included: a
    server that can answer none of a sort is found by a few requests.
    """

    def __init__(self, most: int, start: int | None = None):
        self.most = most
        self.limit = float(min(most, start or most))
        self.start = start or most
        self._starting = self.limit < most
        self.in_flight: Counter[int] = Counter()  # by sort
        self.replies: Counter[int] = Counter()  # by sort
        self.stopping = False
        self._stopped = asyncio.Event()
        self._changed = asyncio.Event()  # replaced at each change
        self._tried: Counter[int] = Counter()  # requests between `begin` and `end`, by sort
        self._last_cut = float("-inf")  # when `limit` was halved
        self._resume_at = 0.0
        # (reason, text, sort) of an error -> request -> times that it met the error; replies to all when it came first
        self._seen: dict[tuple[str, str, int], tuple[Counter[str], int]] = {}

    @property
    def successes(self) -> int:
        return self.replies.total()

    async def begin(self, sort: int) -> None:
        """Wait until a request of the sort may be tried. Raises Stopped after `stop`; else needs an `end`."""
        await self._until(lambda: self.replies[sort] or self._tried[sort] < self.start)
        self._tried[sort] += 1

    def end(self, sort: int) -> None:
        self._tried[sort] -= 1
        self._wake()

    async def enter(self, sort: int = 0) -> None:
        """Wait until an HTTP request may be sent. Raises Stopped after `stop`; else needs a `leave`."""
        while True:
            await self._until(lambda: self.in_flight.total() < max(1, int(self.limit)))
            pause = self._resume_at - time.monotonic()
            if pause <= 0:
                break
            await self.sleep(pause)
        self.in_flight[sort] += 1

    def leave(self, sort: int = 0) -> None:
        self.in_flight[sort] -= 1
        self._wake()

    def succeeded(self, sort: int = 0) -> None:
        """A reply came: a little more may be in flight."""
        self.replies[sort] += 1
        self.limit = min(self.most, self.limit + (1.0 if self._starting else 1 / self.limit))
        self._seen = {key: seen for key, seen in self._seen.items() if key[2] != sort}
        self._wake()

    def overloaded(self, began: float) -> None:
        """A request that began at `began` (monotonic) met a limit: halve, unless that was done since it began."""
        self._starting = False
        if began > self._last_cut:
            self.limit = max(1.0, self.limit / 2)
            self._last_cut = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Send no request before `seconds` have passed."""
        self._resume_at = max(self._resume_at, time.monotonic() + seconds)

    async def sleep(self, seconds: float) -> None:
        """Raises Stopped as soon as the run ends."""
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return
        raise Stopped

    def stop(self) -> None:
        self.stopping = True
        self._stopped.set()
        self._wake()

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not self.stopping and not ready():
            await self._changed.wait()
        if self.stopping:
            raise Stopped

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def is_permanent(self, error: tuple[str, str], sort: int, request: str, requests: int = 3, tries: int = 3) -> bool:
        """Note an error, (reason, text); whether retrying cannot mend it: `requests` requests of the sort have met it
        `tries` times each, and none has got a reply meanwhile.

        A text that servers also send when they fail for a while (`GENERAL`) must come two times more, and other sorts
        must have got replies: meanwhile, or at all if this sort never got one.
        """
        reason, text = error
        text = re.sub(r"\w*\d\w*", "#", text)  # ids of requests, times
        seen, replies = self._seen.setdefault((reason, text, sort), (Counter(), self.successes))
        seen[request] += 1
        if GENERAL.fullmatch(text.strip()):
            if self.successes == (replies if self.replies[sort] else 0):
                return False
            tries += 2
        return sum(count >= tries for count in seen.values()) >= requests
