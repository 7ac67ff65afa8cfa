"""Claude as a Teacher: the official SDK, asked asynchronously, with images; typed errors become one line each.

The key comes from ANTHROPIC_API_KEY alone and is never written or shown. The SDK itself waits and repeats after
408/409/429/5xx/529 and lost connections, as `retry-after` says. Leaves out batches, budgets and a cache of replies.
Used through ares/teacher.py: `python haiku.py --teacher claude`.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ares.asking import CORRECT, Reply, Request, media_type
from ares.cli import UserError

if TYPE_CHECKING:
    import anthropic

DEFAULT_MODEL = "claude-haiku-5-5"
KEY = "ANTHROPIC_API_KEY"
MAX_REQUEST_BYTES = 32_000_000
MAX_RETRIES = 8  # with the SDK's pauses of 0.5, 1, 2, 4, 8, 8 ... seconds: about 40 s of overload are sat out
TIMEOUT = 180.0  # seconds; an answer takes a few

# US dollars per million tokens (input, output), live; by the model id's beginning. The one table of prices.
PRICES_DATE = "2026-11"
PRICES = {"claude-haiku-5-5": (0.10, 0.50), "claude-haiku-4-5": (1.00, 5.00)}

# model ids that users still have in their scripts
RETIRED = {"claude-3-haiku-20240307": "April 2026", "claude-3-5-haiku-20241022": "February 2026"}


@dataclass(frozen=True)
class Family:
    """How a family of models wants to be asked."""

    beginnings: tuple[str, ...]
    parameters: Mapping[str, Any]
    may_think: bool = False  # thinking cannot be ruled out: its tokens count towards max_tokens


# Grading needs neither thinking (paid as output) nor chance. The 5 series thinks unless told not to and answers a
# non-default temperature with 400; the 4.5 series thinks only when asked and takes a temperature (for which the SDK
# has no argument any more).
FAMILIES = (
    Family(("claude-haiku-5", "claude-sonnet-5", "claude-opus-5"), {"thinking": {"type": "disabled"}}),
    Family(("claude-haiku-4-5", "claude-sonnet-4-5", "claude-opus-4-5"), {"extra_body": {"temperature": 0.0}}),
    Family(("",), {}, may_think=True),  # any other: nothing that it might refuse
)


def family_of(model: str) -> Family:
    """The preset for a model id; the last one fits any."""
    return next(family for family in FAMILIES if model.startswith(family.beginnings))


def cost_usd(model: str, usage: Mapping[str, int]) -> float | None:
    """Dollars for one live reply from the price table; None if the model is not in it."""
    price = next((price for beginning, price in PRICES.items() if model.startswith(beginning)), None)
    if price is None:
        return None
    return (usage.get("input_tokens", 0) * price[0] + usage.get("output_tokens", 0) * price[1]) / 1e6


def max_tokens(request: Request, family: Family) -> int:
    """Room for the reply: it repeats the sentences (a correction twice), at no less than two characters a token."""
    characters = sum(map(len, request.sentences))
    room = 256 + 16 * len(request.sentences) + characters // 2
    if request.kind == CORRECT:
        room = 512 + characters
    return room + (4096 if family.may_think else 0)


def api_key() -> str:
    """The key from the environment. Raises UserError, which does not show it, if there is none that could be one."""
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise UserError(f"--teacher claude: {KEY} is not set; export it, or use --teacher reference (needs no key)")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"--teacher claude: {KEY} holds characters that no key has; export it again")
    return key


class ClaudeTeacher:
    """Asks one model through the Messages API. Needs ANTHROPIC_API_KEY when made."""

    name = "claude"

    def __init__(self, model: str = DEFAULT_MODEL, base_url: str | None = None, concurrency: int = 8):
        self.model = model
        self.base_url = base_url
        self.concurrency = concurrency
        self._key = api_key()
        self._client: anthropic.AsyncAnthropic | None = None

    async def __aenter__(self) -> ClaudeTeacher:
        import anthropic  # a second to import: not for --help, nor for the reference Teacher

        # an explicit api_key keeps the SDK from looking for other credentials in the environment and on disk
        self._client = anthropic.AsyncAnthropic(
            api_key=self._key,
            base_url=self.base_url,
            max_retries=MAX_RETRIES,
            timeout=TIMEOUT,
            http_client=anthropic.DefaultAsyncHttpxClient(event_hooks={"response": [_stop_at_spend_limit]}),
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.close()

    async def answer(self, request: Request) -> Reply:
        """Ask the model. Raises UserError as one line for what no repetition mends."""
        import anthropic

        began = time.monotonic()
        try:
            message = await self._client.messages.create(**self.parameters(request))
        except anthropic.APIStatusError as error:
            raise UserError(self._explain(error, request)) from None
        except anthropic.APIConnectionError as error:
            raise UserError(
                f"--base_url: cannot reach {self._client.base_url} after {MAX_RETRIES} retries "
                f"({type(error.__cause__ or error).__name__}); run the same command again to go on"
            ) from None
        usage = {name: count for name, count in message.usage.model_dump().items() if isinstance(count, int)}
        return Reply(
            text="".join(block.text for block in message.content if block.type == "text"),
            teacher=self.name,
            model=message.model,
            stop_reason=message.stop_reason,
            request_id=message._request_id,
            usage=usage,
            cost_usd=cost_usd(self.model, usage),
            seconds=round(time.monotonic() - began, 3),
        )

    def parameters(self, request: Request) -> dict[str, Any]:
        """The arguments of `messages.create`: images first, then the text. Raises UserError for an unusable image."""
        family = family_of(self.model)
        blocks = [_image_block(path, request.qid) for path in request.images]
        size = sum(len(block["source"]["data"]) for block in blocks) + len(request.text)
        if size > MAX_REQUEST_BYTES:
            raise UserError(
                f"--images: question {request.qid}: {size / 1e6:.0f} MB with its images ({request.images[0].parent}); "
                f"the API takes {MAX_REQUEST_BYTES / 1e6:.0f} MB; shrink them"
            )
        return {
            "model": self.model,
            "max_tokens": max_tokens(request, family),
            "messages": [{"role": "user", "content": [*blocks, {"type": "text", "text": request.text}]}],
            **family.parameters,
        }

    def _explain(self, error: anthropic.APIStatusError, request: Request) -> str:
        """One line for an error that ends the run: what, where, the fix. Never the key."""
        status, said = error.status_code, self._said(error)
        if _is_spend_limit(error.body):
            return f"{KEY}: the spend limit is reached ({said}); raise it in the Console, then run this again to go on"
        if status == 401:
            return f"{KEY}: the API does not accept this key ({said}); export a valid one"
        if status in (402, 403):
            return f"{KEY}: the key may not do this ({status}: {said}); see its workspace and billing in the Console"
        if status == 404:
            retired = RETIRED.get(self.model)
            what = f"was retired in {retired}" if retired else f"is not known at {self._client.base_url} ({said})"
            return f"--teacher_model: {self.model} {what}; use --teacher_model {DEFAULT_MODEL}"
        if status == 413:
            return (
                f"--images: the request for question {request.qid} is too large for the API (413); shrink its images"
            )
        if status in (408, 409, 429) or status >= 500:
            return (
                f"--teacher claude: the API still answers {status} ({said}) after {MAX_RETRIES} retries; "
                "wait, then run the same command again: what is answered is kept"
            )
        return (
            f"--teacher_model: {self.model} does not accept the request for question {request.qid} ({status}: {said})"
        )

    def _said(self, error: anthropic.APIStatusError) -> str:
        body = error.body if isinstance(error.body, Mapping) else {}
        inner = body.get("error")
        message = inner.get("message") if isinstance(inner, Mapping) else None
        text = " ".join(str(message or error.body or "no reason given").split())[:300]
        return text.replace(self._key, "***")  # whatever a gateway may echo


def _is_spend_limit(body: object) -> bool:
    """Whether an error body is one of the `..._spend_limit_reached` kinds, which no waiting mends."""
    error = body.get("error") if isinstance(body, Mapping) else None
    details = error.get("details") if isinstance(error, Mapping) else None
    code = details.get("error_code") if isinstance(details, Mapping) else None
    return isinstance(code, str) and code.endswith("spend_limit_reached")


async def _stop_at_spend_limit(response: Any) -> None:
    """Tell the SDK, in its own header, not to repeat a 429 that has no `retry-after` because money has run out."""
    if response.status_code == 429:
        try:
            body = json.loads(await response.aread())
        except ValueError:
            return
        if _is_spend_limit(body):
            response.headers["x-should-retry"] = "false"


def _image_block(path: os.PathLike, qid: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"--images: cannot read {path} of question {qid} ({error.strerror})") from None
    kind = media_type(data[:12])
    if kind is None:
        raise UserError(f"--images: {path} of question {qid} is no PNG, JPEG, GIF or WebP; convert or remove it")
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": kind, "data": base64.standard_b64encode(data).decode()},
    }
