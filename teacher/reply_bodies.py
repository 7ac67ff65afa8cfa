"""The reply in the body of an HTTP 200: in the form of the Messages API, of OpenAI's, or as server-sent events.

Gateways and local servers often send one of these, or a reply without `usage`. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teacher.api_errors import NotAReply

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}
_NO_TEXT = frozenset(("refusal", "max_tokens", "model_context_window_exceeded"))  # with these a reply may be empty
# the status that the API sends with each type of error
_STATUS = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402, "permission_error": 403,
    "not_found_error": 404, "request_too_large": 413, "rate_limit_error": 429, "overloaded_error": 529,
}  # fmt: skip


class ErrorAsReply(ValueError):
    """HTTP 200 whose body is an error; `status` is what it should have been."""

    def __init__(self, body: Mapping[str, Any]):
        super().__init__("an error in an HTTP 200")
        self.body = body
        error = body.get("error")
        error = error if isinstance(error, Mapping) else body
        codes = [error.get(name) for name in ("code", "status", "status_code")]
        codes = [int(code) for code in codes if str(code).isdigit() and 400 <= int(code) <= 599]
        self.status = _STATUS.get(str(error.get("type"))) or next(iter(codes), 500)


@dataclass(frozen=True)
class Received:
    """A reply's parts. `usage` is empty where the server did not say how many tokens were used."""

    text: str
    usage: dict[str, int]
    model: str | None = None
    stop_reason: str | None = None


def read_body(data: bytes) -> Received:
    """The reply in the body of an HTTP 200.

    Raises ErrorAsReply, NotAReply (a web page, say), or ValueError for JSON or events that break off.
    """
    text = data.decode("utf-8-sig", errors="replace")
    start = text.lstrip()[:1]
    if start in ("{", "["):
        try:
            body = json.loads(text)
        except RecursionError:
            raise NotAReply(text) from None
        return read_message(body)
    if text.lstrip().startswith(("data:", "event:", ":")):
        return read_message(_joined_events(text))
    raise NotAReply(text)


def read_message(body: Any) -> Received:
    """The reply in a decoded body, of a batch's result too. Raises ErrorAsReply or NotAReply."""
    came = json.dumps(body, default=str) if not isinstance(body, str) else body
    if not isinstance(body, Mapping):
        raise NotAReply(came)
    if body.get("type") == "error" or body.get("error") and not body.get("content"):
        raise ErrorAsReply(body)
    choice = body["choices"][0] if isinstance(body.get("choices"), list) and body["choices"] else {}
    choice = choice if isinstance(choice, Mapping) else {}
    outer = next((each for each in (choice, body) if isinstance(each.get("message"), Mapping)), None)
    message = outer["message"] if outer else choice or body
    found = [message.get(name) for name in ("content", "text", "completion", "response", "output_text")]
    text = next((text for text in map(_text, found) if text is not None), None)
    stop = message.get("stop_reason") or choice.get("finish_reason") or body.get("stop_reason")
    stop = _STOP_REASONS.get(str(stop), str(stop)) if stop is not None else None
    if text is None and stop not in _NO_TEXT:
        raise NotAReply(came)
    model = body.get("model")
    return Received(text or "", _usage(body.get("usage")), model if isinstance(model, str) and model else None, stop)


def _text(content: Any) -> str | None:
    """Of a string or of content blocks; None where there is neither."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    blocks = [{"text": block} if isinstance(block, str) else block for block in content]
    blocks = [block for block in blocks if isinstance(block, Mapping)]
    blocks = [block for block in blocks if block.get("type") in (None, "text", "output_text")]
    return "".join(block["text"] for block in blocks if isinstance(block.get("text"), str))


def _usage(usage: Any) -> dict[str, int]:
    if not isinstance(usage, Mapping):
        return {}
    found = {
        "input_tokens": usage.get("input_tokens", usage.get("prompt_tokens")),
        "output_tokens": usage.get("output_tokens", usage.get("completion_tokens")),
    }
    if not all(_is_count(number) for number in found.values()):
        return {}
    lifetimes = usage.get("cache_creation")
    cached = {**usage, **lifetimes} if isinstance(lifetimes, Mapping) else usage
    for name in ("cache_creation_input_tokens", "cache_read_input_tokens", "ephemeral_1h_input_tokens"):
        if _is_count(cached.get(name)) and cached[name]:
            found[name] = cached[name]
    return found


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _joined_events(text: str) -> dict[str, Any]:
    """The message that server-sent events (`data: {...}` lines) add up to. Raises ValueError if they break off."""
    body: dict[str, Any] = {}
    parts, usage, stop, ended, seen = [], {}, None, False, False
    for line in text.splitlines():
        if not line.startswith("data:") or not (data := line[5:].strip()):
            continue
        if data == "[DONE]":
            ended = True
            continue
        event = json.loads(data)
        if not isinstance(event, Mapping):
            raise NotAReply(text)
        if event.get("error"):
            raise ErrorAsReply(event)
        seen = True
        choice = (event.get("choices") or [{}])[0]
        message, delta = event.get("message") or {}, event.get("delta") or choice.get("delta") or {}
        parts += [piece for piece in (delta.get("text"), delta.get("content")) if isinstance(piece, str)]
        body["model"] = message.get("model") or event.get("model") or body.get("model")
        usage |= {**(message.get("usage") or {}), **(event.get("usage") or {})}
        stop = delta.get("stop_reason") or choice.get("finish_reason") or stop
        ended = ended or event.get("type") == "message_stop" or bool(choice.get("finish_reason"))
    if not seen:
        raise NotAReply(text)
    if not ended:
        raise ValueError("the events break off")
    stop = _STOP_REASONS.get(str(stop), stop)
    return {**body, "content": "".join(parts), "usage": usage, "stop_reason": stop}
