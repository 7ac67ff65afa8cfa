"""A Teacher behind an HTTP API: how its requests are paced, retried and booked. Each provider is a subclass.

A provider (teacher/claude.py, teacher/openai_compatible.py) says which official SDK it uses, and what differs in a
request's body. Everything else is here, so that every HTTP request counts towards the pace (teacher/pace.py), the
retries and the budget (teacher/budget.py):

    answer   one request until it has a reply: retries, pauses, errors that retrying does not mend
    _send    one HTTP request: waits for its turn and for the budget, books what it cost
    send     the call of the SDK (teacher/sdk_client.py)
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ares import images
from ares.cli import UserError
from teacher.api_responses import (
    LENGTH_FIELDS,
    ApiError,
    Failure,
    NoAnswer,
    Received,
    as_user_error,
    failure_of,
    is_about_request,
    is_unknown_model,
    read_body,
    said,
)
from teacher.budget import LOST, NOT_SENT, Ledger, Price, cost_usd, price_of
from teacher.interface import CORRECT, JUDGE, Reply, Request, Stopped, Unanswered, exact_schema, general_schema
from teacher.pace import Pace
from teacher.redact import redact
from teacher.sdk_client import TIMEOUT, SdkClient

START = 4  # requests in flight before the first reply
MAX_RETRIES = 8  # pauses of 0.5, 1, 2, 4, 8, 8 ... s: about 40 s without any reply, then the run stops
MAX_TRIES = 30  # of one request while others are answered
MAX_SAME = 6  # of one request that meets the same error, with the same text, each time
BACKOFF, MAX_BACKOFF = 0.5, 8.0  # seconds
LONGEST_PAUSE = 3600.0  # seconds: a longer `retry-after` ends the run
MAX_REQUEST_BYTES = 32_000_000  # of Anthropic's API
THINKING = 4096  # tokens by which the limit of a reply is longer where the model may think
# requests that the API calls invalid while it answers others: so many of a run, or this share of those answered
MAX_REJECTED, REJECTED_SHARE = 20, 0.1
MAX_REJECTED_ALIKE = 5  # of one sort (with images, say), in the same words, before any request of the sort has a reply


class TooLarge(UserError):
    """A request above the API's limit of bytes."""


@dataclass(frozen=True)
class Preset:
    """How a family of models wants to be asked."""

    body: Mapping[str, Any] = field(default_factory=dict)  # fields of the request's body
    structured: bool = False  # takes a JSON schema
    exact: bool = False  # what the schema says is enforced: `exact_schema`
    may_think: bool = False  # thinking cannot be turned off: its tokens count towards the reply's


def merge_patch(target: Any, patch: Any) -> Any:
    """JSON Merge Patch (RFC 7396): objects are merged, null removes a key, anything else replaces what is there."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


class ApiTeacher(SdkClient):
    """Asks one model through an HTTP API. Its key must be in the environment once it is entered.

    A subclass sets the fields below and those of SdkClient, and defines its methods, `image_block` and `form`.

    Args:
        base_url: the server's address; None: the one in the environment, else the SDK's.
        preset: how the model wants to be asked.
        price: overrides the table's.
        structured: "on" or "off": whether requests carry a JSON schema; "auto": as the preset says.
        extra: merged into the body of every request (`merge_patch`).
        timeout: seconds from sending a request to its whole reply.
    """

    default_model: str | None = None
    retired: Mapping[str, str] = {}  # model id -> when it was retired
    length_field = "max_tokens"  # of the body: the most tokens of a reply
    most_image_tokens: int  # no image costs more
    has_batches = False

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        concurrency: int = 8,
        *,
        preset: Preset = Preset(),
        price: Price | None = None,
        structured: str = "auto",
        extra: Mapping[str, Any] | None = None,
        timeout: float = TIMEOUT,
        ledger: Ledger | None = None,
    ):
        super().__init__(base_url, concurrency, timeout)
        self.model = model
        self.table = self.preset = preset  # `preset` may change once the server is asked
        self.price = price or price_of(model)
        self.mode, self.extra = structured, extra or {}
        self.ledger = ledger or Ledger()
        self.retried: Counter[str] = Counter()  # retried errors, by reason
        self.offered: list[str] = []  # models that the server lists, once ours is not known there
        self.pace: Pace | None = None  # made when the Teacher is entered
        self._earlier: Counter[int] = Counter()  # by sort: replies of earlier runs, and from before it was entered
        self._rejected = 0
        self._image_digests: dict[tuple, str] = {}  # identity of a file -> digest

    async def __aenter__(self) -> Self:
        self.connect()
        if self.pace:  # --watch enters again and again
            self._earlier += self.pace.replies
        self.pace = Pace(self.concurrency, START)  # within the event loop that sends the requests
        return self

    def image_block(self, kind: str, data: str) -> dict[str, Any]:
        """An image of a media type, in base64, as a part of a message."""
        raise NotImplementedError

    def form(self, schema: dict[str, Any], kind: str) -> dict[str, Any]:
        """The field of the body that asks for JSON of a schema."""
        raise NotImplementedError

    def stop(self) -> None:
        """Send no new request; those that wait for their turn raise Stopped."""
        self.pace.stop()

    def accepted(self, request: Request) -> None:
        """A request like this has had a reply in an earlier run."""
        self._earlier[sort_of(request)] += 1

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
        # by the table's preset: a reply keeps its key whether the server lists the model or not
        asked = [self.model, request.kind, self.body(request, self.table), request.text]
        asked += [self.note(request, self.table), request.sentences, digests]
        if self.name != "claude":  # whose replies in caches of earlier versions have keys without it
            asked.append(self.name)
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @property
    def structured(self) -> bool:
        """Whether requests carry a JSON schema."""
        return self._is_structured(self.preset)

    def _is_structured(self, preset: Preset) -> bool:
        return preset.structured if self.mode == "auto" else self.mode == "on"

    def body(self, request: Request, preset: Preset | None = None) -> dict[str, Any]:
        """Fields of the request's body besides model, length and messages."""
        preset = preset or self.preset
        body = preset.body
        if self._is_structured(preset):
            schema = exact_schema(request) if preset.exact else general_schema(request)
            body = merge_patch(body, self.form(schema, request.kind))
        return merge_patch(body, self.extra)

    def note(self, request: Request, preset: Preset | None = None) -> str:
        preset = preset or self.preset
        if not self._is_structured(preset):
            return ""
        return request.exact_note if preset.exact else request.form_note

    def texts(self, request: Request) -> list[str]:
        """The text and the notes behind it."""
        return [text for text in (request.text, self.note(request), request.again) if text]

    def content(self, request: Request) -> list[dict[str, Any]]:
        """Images first, then the text, then the notes. Raises UserError for an unusable image, TooLarge for too many
        bytes."""
        loaded = [images.load_image(path, request.qid) for path in request.images]
        encoded = [(kind, base64.standard_b64encode(data).decode()) for kind, data in loaded]
        texts = self.texts(request)
        size = sum(len(data) for _, data in encoded) + sum(map(len, texts))
        if size > MAX_REQUEST_BYTES:
            where = f" with its images ({request.images[0].parent})" if request.images else ""
            raise TooLarge(
                f"--images: question {request.qid}: {size / 1e6:.0f} MB{where}; "
                f"the API takes {MAX_REQUEST_BYTES / 1e6:.0f} MB; shrink them"
            )
        blocks = [self.image_block(kind, data) for kind, data in encoded]
        return [*blocks, *({"type": "text", "text": text} for text in texts)]

    def parameters(self, request: Request) -> dict[str, Any]:
        """The body of a request, as it also stands in a batch."""
        parameters = {
            "model": self.model,
            self.length_field: self.max_tokens(request),
            "messages": [{"role": "user", "content": self.content(request)}],
            **self.body(request),
        }
        return {name: value for name, value in parameters.items() if self.extra.get(name, 0) is not None}

    def max_tokens(self, request: Request) -> int:
        """The most tokens of the reply: it repeats the sentences (a correction may be twice as long), at two
        characters a token or more."""
        if lengths := [self.extra[name] for name in LENGTH_FIELDS if type(self.extra.get(name)) is int]:
            return max(lengths)  # a server may go by either
        characters = sum(map(len, request.sentences))
        tokens = 256 + 16 * (len(request.sentences) + len(request.rationales)) + characters // 2
        if request.kind == CORRECT:
            tokens = 512 + characters
        if request.kind == JUDGE:
            tokens = 400  # a sentence and a word, whatever is judged
        return (tokens + (THINKING if self.preset.may_think else 0)) * request.length_factor

    def most_usd(self, request: Request, batch: bool = False) -> float | None:
        """The most that a request can cost: a token is at least a byte, and the reply ends at max_tokens.

        Where a gateway writes the request to a prompt cache, a token costs up to twice as much: text, of more than
        two bytes a token, is covered by its bytes.
        """
        if self.price is None:
            return None
        text = len("".join(self.texts(request)).encode())
        # the API's own words around a request and its schema; --body may hold text, too
        form = 100 + max(500 if self.structured else 0, len(json.dumps(self.body(request))))
        tokens = text + form + self.most_image_tokens * len(request.images)
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
            if failure.overloaded:
                self.pace.overloaded(began)
            if failure.retry_after:
                self.pace.pause(failure.retry_after)
            gone = attempt >= MAX_RETRIES and self.pace.successes == successes
            if gone or (failure.retry_after or 0.0) > LONGEST_PAUSE:
                raise as_user_error(error, self, request, attempt)
            if len(errors) >= MAX_SAME and len(set(errors)) == 1 and not failure.temporary:
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
                    received, headers = await self._received(parameters)
                self.pace.follow(headers)
                request_id = headers.get("request-id") or headers.get("x-request-id")
                reply = self.reply(received, round(time.monotonic() - began, 3), request_id=request_id)
            except (ApiError, NoAnswer, ValueError, TypeError, AttributeError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    error = NoAnswer("TimeoutError", timeout=True)
                failure = failure_of(error)
                self.pace.follow(getattr(error, "headers", {}))
                self.ledger.settle(entry, None, LOST if failure.charged else failure.reason)
                return began, error
            except BaseException:  # cancelled, or a bug: others must not wait for this one's budget
                self.ledger.settle(entry, None, LOST)
                raise
            unknown = reply.cost_usd is None and self.price is not None  # no `usage`: at most `most_usd`
            self.ledger.settle(entry, reply.cost_usd, LOST if unknown else "reply")
            self.pace.succeeded(sort, sum(reply.usage.values()))
            return began, reply
        finally:
            self.pace.leave(sort)

    async def _received(self, parameters: dict[str, Any]) -> tuple[Received, Mapping[str, str]]:
        """Send a request once: (the reply's parts, the HTTP headers). Raises what `send` and `read_body` raise."""
        try:
            data, headers = await self.send(parameters)
            try:
                return read_body(data), headers
            except ApiError as error:
                error.headers = headers
                raise
        except ApiError as error:
            if is_unknown_model(error, self.model) and not self.offered:
                self.offered = await self.listed_models()
            raise

    # -- errors that retrying does not mend ------------------------------------------------------------------

    @property
    def _replies(self) -> Counter[int]:
        """Replies to requests of each sort, those of earlier runs included."""
        return self._earlier + self.pace.replies

    def _is_permanent(self, failure: Failure, error: tuple[str, str], request: Request) -> bool:
        """Whether requests of this sort meet the same error again and again."""
        if failure.temporary or failure.reason in ("timeout", "connection"):
            return False
        if failure.reason == "not_a_reply" and not self.pace.successes:  # not the API at all
            return self.pace.is_permanent(error, sort_of(request), "any", requests=1)
        return self.pace.is_permanent(error, sort_of(request), request.custom_id)

    def _no_images(self, error: Exception, request: Request) -> UserError | None:
        """What to raise where requests without images are answered and those with images are not."""
        if not request.images or not self._replies or self._replies[sort_of(request)]:
            return None
        return UserError(
            f"--teacher_model: {self.model} answers every request with images by {said(error, self.secret)!r} "
            f"({failure_of(error).reason}; question {request.qid}); name a model or server that takes images"
        )

    async def _refused(self, failure: Failure, error: Exception, request: Request) -> None:
        """Raise for a permanent error: Unanswered if others are answered, else UserError for the run."""
        sort, why = sort_of(request), said(error, self.secret)
        if is_about_request(error):
            deadline = time.monotonic() + self.timeout
            while not self._replies[sort] and self.pace.in_flight[sort] and time.monotonic() < deadline:
                await self.pace.sleep(0.05)  # those in flight show whether it is this request or all
            successes = self._replies.total()
            if successes and request.rationales:  # each is asked alone: only those count
                raise Unanswered(failure.reason, why)
            self._rejected += 1
            if successes and self._rejected <= max(MAX_REJECTED, REJECTED_SHARE * successes):
                alike = self.pace.is_permanent(
                    (failure.reason, why), sort, request.custom_id, MAX_REJECTED_ALIKE, tries=1
                )
                if self._replies[sort] or not alike:
                    raise Unanswered(failure.reason, why, permanent=True)
                raise self._no_images(error, request) or as_user_error(error, self, request, 0)
        raise as_user_error(error, self, request, 0)


def sort_of(request: Request) -> int:
    """Requests without an image (0), with one (1), with several (2): a server may accept one sort and not another."""
    return min(2, len(request.images))
