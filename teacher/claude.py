"""Claude as a Teacher: the official SDK, asked asynchronously, with images.

The key comes from ANTHROPIC_API_KEY alone and is never written or shown. Pace, retries and budget are in
teacher/api_teacher.py, Message Batches in teacher/batches.py. Used through `python haiku.py --teacher claude`.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import inspect
import json
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from ares import images
from ares.cli import UserError
from teacher.api_responses import (
    ApiError,
    NoAnswer,
    NotAReply,
    Received,
    error_body,
    is_account_refusal,
    read_body,
    read_message,
    redact,
    said,
)
from teacher.api_teacher import SCHEMAS, ApiTeacher
from teacher.interface import Failed, Reply, Request

if TYPE_CHECKING:
    import anthropic

KEY = "ANTHROPIC_API_KEY"
DEFAULT_MODEL = "claude-haiku-5-5"
# model ids that users still have in their scripts
RETIRED = {"claude-3-haiku-20240307": "April 2026", "claude-3-5-haiku-20241022": "February 2026"}
MAX_REQUEST_BYTES = 32_000_000
TEMPORARY = ("api_error", "overloaded_error", "rate_limit_error", "timeout_error", "unknown")  # of requests in a batch


@dataclass(frozen=True)
class Family:
    """How a family of models wants to be asked: fields of the request's body."""

    prefixes: tuple[str, ...]  # of model ids
    body: Mapping[str, Any] = field(default_factory=dict)
    structured: bool = False  # takes output_config.format; counts and ranges are not enforced by it
    may_think: bool = False  # thinking cannot be turned off: its tokens count towards max_tokens


# Grading needs neither thinking (paid as output) nor chance. The 5 series thinks unless told not to and answers a
# non-default temperature with 400; the 4.5 series thinks only when asked and takes a temperature.
FAMILIES = (
    Family(("claude-haiku-5", "claude-sonnet-5", "claude-opus-5"), {"thinking": {"type": "disabled"}}, True),
    Family(("claude-haiku-4-5", "claude-sonnet-4-5", "claude-opus-4-5"), {"temperature": 0.0}, True),
    Family(("",), may_think=True),  # any other: no field that it might refuse
)


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
        raise UserError(f"{flag}: the address holds a user name or a password; remove them; the key is {KEY}")
    if not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
        shown = redact(url, os.environ.get(KEY, "").strip())
        raise UserError(f"{flag}: {shown} is no address; it begins with http:// or https://")
    path = r"/+v1(/+(messages(/(batches|count_tokens))?|complete|chat/completions|models))?/*(\?.*)?$"
    return re.sub(path, "", url).rstrip("/")


def check_network() -> None:
    """Raise UserError where the proxy or the certificates that the environment names cannot be used."""
    import anthropic

    certificates = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
    try:
        for name in certificates:
            os.stat(os.environ[name])
        anthropic.DefaultAsyncHttpxClient()  # reads both, as each client of the SDK does
    except OSError as error:
        where = " or ".join(certificates) or "the system"
        raise UserError(
            f"--teacher claude: the certificates that {where} names cannot be read ({error}); unset it or name others"
        ) from error
    except Exception as error:  # ValueError, ImportError or the HTTP library's own, of the version that is installed
        upper = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
        proxies = [name for name in (*upper, *map(str.lower, upper)) if os.environ.get(name)]
        # not the address itself: it may hold a password
        kinds = sorted({os.environ[name].partition("://")[0] for name in proxies if "://" in os.environ[name]})
        raise UserError(
            f"--teacher claude: the proxy in {' or '.join(proxies) or 'the environment'} ({', '.join(kinds)}://...) "
            "cannot be used; name an http:// proxy, or socks5:// after pip install socksio, or unset it"
        ) from error


class ClaudeTeacher(ApiTeacher):
    """Asks one model through the Messages API. Needs ANTHROPIC_API_KEY once it is entered.

    `structured`: False asks for JSON in words only, for gateways that do not know `output_config`; `more`: price,
    timeout and ledger, see ApiTeacher.
    """

    name = "claude"
    api = "Messages API"
    key_name, default_model, retired = KEY, DEFAULT_MODEL, RETIRED

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        base_url: str | None = None,
        concurrency: int = 8,
        *,
        structured: bool = True,
        **more: Any,
    ):
        self.base_url = server_address(base_url)
        self.family = next(family for family in FAMILIES if model.startswith(family.prefixes))
        structured = structured and self.family.structured
        super().__init__(model, concurrency, structured=structured, may_think=self.family.may_think, **more)
        self.client: anthropic.AsyncAnthropic | None = None

    async def __aenter__(self) -> ClaudeTeacher:
        import anthropic  # a second to import: not for --help, nor for the reference Teacher

        self.secret = api_key()
        check_network()
        self.start()
        address = self.base_url or server_address(os.environ.get("ANTHROPIC_BASE_URL") or None, "ANTHROPIC_BASE_URL")
        # httpx under the name by which this version of the SDK knows it
        base = next(each for each in anthropic.DefaultAsyncHttpxClient.__mro__ if each.__name__ == "AsyncClient")
        httpx = importlib.import_module(base.__module__.partition(".")[0])
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        # an explicit api_key keeps the SDK from looking for other credentials in the environment and on disk
        self.client = anthropic.AsyncAnthropic(
            api_key=self.secret,
            base_url=address,
            max_retries=0,  # retried in ApiTeacher, so that every request is paced and booked
            timeout=self.timeout,
            http_client=anthropic.DefaultAsyncHttpxClient(limits=limits),
        )
        self._patient = self.client.with_options(max_retries=6)  # for free calls
        self.address = str(self.client.base_url)
        self._arguments = frozenset(inspect.signature(self.client.messages.create).parameters)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.client.close()

    def body(self, request: Request) -> dict[str, Any]:
        """What the model's family adds to a request's body."""
        if not self.structured:
            return dict(self.family.body)
        form = {"type": "json_schema", "schema": SCHEMAS[request.kind]}
        return {**self.family.body, "output_config": {"format": form}}

    def content(self, request: Request) -> list[dict[str, Any]]:
        """Images first, then the text, then the notes. Raises UserError for an unusable image."""
        blocks = [_image_block(path, request.qid) for path in request.images]
        texts = self.texts(request)
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
            "max_tokens": self.max_tokens(request),
            "messages": [{"role": "user", "content": self.content(request)}],
            **self.body(request),
        }

    async def send(self, parameters: dict[str, Any]) -> tuple[Received, str | None]:
        # as extra_body what this SDK has no argument for: `temperature` in new ones, `output_config` in old ones
        extra = {name: value for name, value in parameters.items() if name not in self._arguments}
        known = {name: value for name, value in parameters.items() if name in self._arguments}
        with translated_errors():
            # raw: the SDK accepts only its own form of a reply, and a body without `usage` was paid for all the same
            raw = await self.client.messages.with_raw_response.create(**known, extra_body=extra or None)
            response = raw.http_response
            data = await response.aread()
        try:
            return read_body(data), response.headers.get("request-id")
        except ApiError as error:
            error.headers = {name: response.headers[name] for name in ("retry-after",) if name in response.headers}
            raise

    async def count_tokens(self, request: Request) -> int:
        """Input tokens of a request, by the API's free counting endpoint. Raises ApiError or NoAnswer."""
        body = {name: value for name, value in self.body(request).items() if name != "temperature"}
        messages = [{"role": "user", "content": self.content(request)}]
        with translated_errors():
            count = self.client.with_options(max_retries=2).messages.count_tokens
            return (await count(model=self.model, messages=messages, extra_body=body or None)).input_tokens

    # -- Message Batches (teacher/batches.py) ----------------------------------------------------------------

    async def create_batch(self, requests: list[dict[str, Any]]) -> str:
        """Create a batch of {"custom_id", "params"}; returns its id. Raises ApiError, NoAnswer, NotAReply."""
        with translated_errors():
            # not retried by the SDK: a batch of a lost answer may exist
            batch = await self.client.with_options(timeout=600.0).messages.batches.create(requests=requests)
        if not isinstance(getattr(batch, "id", None), str) or not batch.id:
            raise NotAReply(str(batch))
        return batch.id

    async def list_batches(self) -> AsyncIterator[tuple[str, float, int]]:
        """(id, time of creation in Unix seconds, number of requests) of the account's batches, newest first."""
        with translated_errors():
            async for batch in self._patient.messages.batches.list(limit=100):
                counts = batch.request_counts
                total = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
                yield batch.id, batch.created_at.timestamp(), total

    async def batch_ended(self, batch_id: str) -> bool:
        """Whether all requests of a batch are processed. Raises ApiError, NoAnswer, NotAReply."""
        with translated_errors():
            batch = await self._patient.messages.batches.retrieve(batch_id)
        status = getattr(batch, "processing_status", None)
        if status not in ("in_progress", "canceling", "ended"):
            raise NotAReply(str(batch))
        return status == "ended"

    async def batch_results(self, batch_id: str) -> AsyncIterator[tuple[str | None, Reply | Failed]]:
        """(custom_id, outcome) of each line of a batch's results.

        Raises ApiError, what a broken stream raises, and at the end ValueError if a line was no JSON. From the
        documented path below our own address: the SDK's `results` follows `results_url`, which may be missing, or
        send the key to another host.
        """
        from anthropic.resources.messages import batches as sdk

        rest, damage = b"", None
        with translated_errors():
            response = await self._patient.get(
                f"/v1/messages/batches/{quote(batch_id, safe='')}/results",
                cast_to=sdk.AsyncJSONLDecoder[sdk.MessageBatchIndividualResponse],
                options={"headers": {"Accept": "application/binary"}},
                stream=True,
            )
            # read to its end whatever a line holds: a stream that is dropped midway prints tracebacks at exit
            async for chunk in response.http_response.aiter_bytes():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    try:
                        yield self._outcome(json.loads(line), batch_id)
                    except ValueError as error:
                        damage = error
            if rest.strip():
                yield self._outcome(json.loads(rest), batch_id)
        if damage is not None:
            raise damage

    def _outcome(self, line: Any, batch_id: str) -> tuple[str | None, Reply | Failed]:
        """(custom_id, outcome) of one line of a batch's results."""
        line = line if isinstance(line, dict) else {}
        result = line.get("result") if isinstance(line.get("result"), dict) else {}
        kind, custom_id = result.get("type"), line.get("custom_id")
        if kind == "errored":
            error = error_body(result.get("error"))
            why = redact(" ".join(str(error["message"] or "")[:4000].split()), self.secret)[:300]
            name = str(error["type"] or "unknown")
            account = is_account_refusal(result.get("error")) or name in ("authentication_error", "permission_error")
            return custom_id, Failed(f"errored_{name}", why, not account and name not in TEMPORARY, account)
        if kind in ("expired", "canceled"):
            return custom_id, Failed(kind, "the batch ended before this request was processed")
        try:
            return custom_id, self.reply(read_message(result.get("message")), batch=batch_id)
        except (ApiError, AttributeError, TypeError, ValueError) as error:
            why = said(error, self.secret)
            return custom_id, Failed("broken_reply", why, account=is_account_refusal(error), charged=True)


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Raise exceptions of the SDK as ApiError, NoAnswer or ValueError."""
    import anthropic

    try:
        yield
    except anthropic.APIStatusError as error:
        raise ApiError(error.status_code, error.body, error.response.headers) from None
    except anthropic.APIConnectionError as error:
        kind = type(error.__cause__ or error).__name__
        raise NoAnswer(kind, timeout=isinstance(error, anthropic.APITimeoutError)) from None
    except anthropic.AnthropicError as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _image_block(path: os.PathLike, qid: str) -> dict[str, Any]:
    kind, data = images.load_image(path, qid)
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": kind, "data": base64.standard_b64encode(data).decode()},
    }
