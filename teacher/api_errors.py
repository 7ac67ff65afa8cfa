"""What an error of the API means: retryable or not, perhaps charged or not, of one request or of the whole account.

Also `redact`, which every text from a server passes before it is shown or saved. Works on the SDK's typed errors and
on error bodies in the forms of other servers; imports the SDK only when an error is at hand.
"""

from __future__ import annotations

import base64
import email.utils
import functools
import html
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ares.cli import Stop, UserError

KEY = "ANTHROPIC_API_KEY"
DEFAULT_MODEL = "claude-haiku-5-5"
# model ids that users still have in their scripts
RETIRED = {"claude-3-haiku-20240307": "April 2026", "claude-3-5-haiku-20241022": "February 2026"}
STOP_STATUS = 3  # exit status where money or the account ends the run
# the request had not left when one of these came up (httpx)
_NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError")
_ACCOUNT = re.compile(
    r"credit balance|(insufficient|not enough|out of|no|purchase|buy|add( more)?) (credits?|funds?|balance|quota)\b|"
    r"(usage|spend(ing)?|billing|budget|monthly|hard) (limit|cap|quota)s?\b|regain access|out of (extra )?usage|"
    r"budget (has been |is |was )?exceeded|exceeded (your |the )?(current |monthly )?(quota|budget)|budgetexceeded|"
    r"exceededbudget|payment (is )?required|billing error|plans & billing|billing details|unpaid|overdue|past due|"
    r"(organi[sz]ation|account|workspace|subscription|project)( \S{1,60})? "
    r"(has been|is|was) (\w+ )?(disabled|suspended|deactivated|blocked|banned|terminated|closed|restricted)",
    re.IGNORECASE,
)
_ABOUT_REQUEST = re.compile(r"\W*(messages|system|tools|output_config|max_tokens)\b")  # may quote the question


@dataclass(frozen=True)
class Failure:
    """`reason`: one word for counting. `charged`: the API may have done the work."""

    reason: str
    passing: bool
    charged: bool = False
    status: int | None = None
    retry_after: float | None = None  # seconds


class NotAReply(ValueError):
    """HTTP 200 whose body holds no reply, as text (`came`)."""

    def __init__(self, came: str):
        super().__init__("no reply")
        self.came = came


# -- error bodies --------------------------------------------------------------------------------------------


def error_body(body: object) -> dict[str, Any]:
    """{"type", "message", "code", "details"} of an error body: the API's, the SDK's object of a batch result, or the
    form of another server (`{"error": "..."}`, `{"detail": ...}`, a list, plain text). Missing ones are None."""
    if isinstance(body, (bytes, str)):
        text = body.decode(errors="replace") if isinstance(body, bytes) else body
        try:
            inner = json.loads(text) if text.lstrip()[:1] in ("{", "[") else None
        except (ValueError, RecursionError):
            inner = None
        return error_body(inner) if isinstance(inner, (dict, list)) else _error_fields({"message": text})
    if isinstance(body, Sequence):
        return error_body(body[0]) if body else _error_fields({})
    if not isinstance(body, Mapping):
        names = ("type", "message", "code", "details", "error")
        body = {name: getattr(body, name) for name in names if getattr(body, name, None) is not None}
    for name in ("error", "errors", "detail"):
        inner = body.get(name)
        if inner and not isinstance(inner, (str, bool, int, float)):
            return error_body(inner)
        if isinstance(inner, str) and not body.get("message"):
            return _error_fields({**body, "message": inner})
    return _error_fields(body)


def _error_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: body.get(name) for name in ("type", "message", "code", "details")}
    if found["message"] is not None and not isinstance(found["message"], str):
        found["message"] = json.dumps(found["message"], default=str)
    return found


def is_account_refusal(error: object) -> bool:
    """Whether an error is about the whole account: credit, spend or usage limits, billing, a disabled organisation.

    `error`: an exception of the SDK, or an error body (mapping, text, or the SDK's object in a batch result). The API
    sends most of these as HTTP 400 `invalid_request_error`, so that the sentence decides. No request can succeed
    until the user acts: stop at the first one (`as_user_error`).
    """
    status = getattr(error, "status_code", None)
    body = error_body(error.body if isinstance(error, Exception) and hasattr(error, "body") else error)
    if is_spend_limit({"error": body}):
        return True
    codes = {status, body["code"], str(body["code"]), body["type"]}
    if codes & {402, "402", "billing_error"}:
        return True
    if status == 429 and retry_after(error.response.headers) is not None:
        return False  # a rate limit, whatever its words: waiting mends it
    words = " ".join(str(body[name]).replace("_", " ") for name in ("type", "code") if body[name])
    message = body["message"] or ""
    return bool(_ACCOUNT.search(words) or not _ABOUT_REQUEST.match(message) and _ACCOUNT.search(message))


def is_spend_limit(body: object) -> bool:
    """Whether an error body is one of the `..._spend_limit_reached` kinds, which no waiting mends."""
    details = error_body(body)["details"]
    code = details.get("error_code") if isinstance(details, Mapping) else None
    return isinstance(code, str) and code.endswith("spend_limit_reached")


def failure_of(error: Exception) -> Failure:
    """Sort an error of one request. Connection errors and replies that break off may have been charged."""
    import anthropic

    if isinstance(error, anthropic.APIStatusError):
        status = error.status_code
        headers = error.response.headers
        passing = status in (408, 409, 429) or status >= 500
        if is_account_refusal(error) or headers.get("x-should-retry") == "false":
            passing = False
        broken = status < 400  # an answer, but not the API's
        charged = broken or bool(getattr(error, "came_as_reply", False))
        return Failure(f"api_{status}", passing or broken, charged, status, retry_after(headers))
    if isinstance(error, (anthropic.APITimeoutError, TimeoutError)):
        return Failure("timeout", True, charged=type(error.__cause__).__name__ not in _NOT_SENT)
    if isinstance(error, anthropic.APIConnectionError):
        return Failure("connection", True, charged=type(error.__cause__).__name__ not in _NOT_SENT)
    return Failure("not_a_reply" if isinstance(error, NotAReply) else "broken_reply", True, charged=True)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait as the API asks: `retry-after-ms`, or `retry-after` as a number or a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        return seconds if 0 <= seconds < float("inf") else None
    when = email.utils.parsedate_tz(headers.get("retry-after", ""))
    return max(0.0, email.utils.mktime_tz(when) - time.time()) if when else None


# -- one line for the user -----------------------------------------------------------------------------------


def as_user_error(error: Exception, teacher: Any, request: Any, key: str, retries: int) -> UserError:
    """What to raise for an error that ends the run; exit status 3 where the account is refused."""
    line = explain(error, teacher, request, key, retries)
    return Stop(line, STOP_STATUS) if is_account_refusal(error) else UserError(line)


def explain(error: Exception, teacher: Any, request: Any, key: str, retries: int) -> str:
    """One line for an error that ends the run: what, where, the fix. Never the key.

    `request`: the one it met, or None for a call about a batch.
    """
    return redact(_explain(error, teacher, request, key, retries), key)


def _explain(error: Exception, teacher: Any, request: Any, key: str, retries: int) -> str:
    import anthropic

    address = teacher.client.base_url
    again = "run the same command again to go on: what is answered is kept"
    what = f"the request for question {request.qid}" if request is not None else "the batch"
    why = said(error, key)
    if not isinstance(error, anthropic.APIStatusError):
        if isinstance(error, (ValueError, TypeError, AttributeError)):
            return f"--base_url: {address} sends no usable reply to {what}, but: {why}; name a server of this API"
        kind = type(error.__cause__ or error).__name__
        return f"--base_url: cannot reach {address} after {retries} retries ({kind}); {again}"
    status = error.status_code
    if is_account_refusal(error):
        kind = "the spend limit is reached" if is_spend_limit(error.body) else "the API refuses the whole account"
        return f"{KEY}: {kind} ({status}: {why}); see billing and limits in the Console, then run this again to go on"
    if status == 401:
        return f"{KEY}: the API does not accept this key ({why}); export a valid one"
    if status == 403:
        return f"{KEY}: the key may not do this ({status}: {why}); see its workspace in the Console"
    if status in (404, 405) and not _is_unknown_model(error):
        if request is None:
            return f"--batch: the server {address} has no Message Batches ({status}: {why}); leave --batch out"
        return f"--base_url: {address} has no Messages API ({status}: {why}); name the server's address without /v1"
    if status == 404:
        retired = RETIRED.get(teacher.model)
        unknown = f"was retired in {retired}" if retired else f"is not known at {address} ({why})"
        return f"--teacher_model: {teacher.model} {unknown}; use --teacher_model {DEFAULT_MODEL}"
    if status == 413:
        return f"--images: {what} is too large for the API (413: {why}); shrink its images"
    if failure_of(error).passing:
        return f"--teacher claude: the API still answers {status} ({why}) after {retries} retries; wait, then {again}"
    return f"--teacher_model: {teacher.model} does not accept {what} ({status}: {why})"


def _is_unknown_model(error: Any) -> bool:
    """The API's own 404 about a model; any other one is about the address."""
    body = error_body(error.body)
    return body["type"] == "not_found_error" and bool(re.match(r"\W*model\b", body["message"] or ""))


def said(error: Exception, key: str) -> str:
    """The server's own words, shortened, on one line, without the key."""
    if isinstance(error, NotAReply):
        return repr(redact(error.came[:2000], key)[:200]) if error.came.strip() else "an empty body"
    body = getattr(error, "body", None)
    message = error_body(body)["message"] if body else None
    text = str(message or body or (str(error) if type(error) is ValueError else "") or type(error).__name__)
    return redact(" ".join(text[:4000].split()), key)[:300]  # before the cut


# -- the key -------------------------------------------------------------------------------------------------

PART = 12  # characters; a shorter part of a key is not taken for one
_ESCAPE = re.compile(r"%[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\(?=[^\sa-zA-Z0-9])|&#?\w{1,8};")


def redact(text: str, key: str) -> str:
    """`text` with `***` for the API key and its parts of 12 characters and more.

    Also where it is written in base64 (standard or URL-safe, at any alignment), hex, or with characters escaped as in
    URLs, JSON, HTML or Python. Of a key below 12 characters only the whole is replaced, and not at all where it may
    be a word (local servers take any key).
    """
    parts = _parts(key)
    if not parts or not text:
        return text
    length = min(PART, len(key))
    marks = bytearray(len(text))
    view, places = text, list(range(len(text) + 1))  # place of each character of `view` in `text`
    for _ in range(4):  # escapes of escapes
        for i in range(len(view) - length + 1):
            if view[i : i + length] in parts:
                start, end = places[i], places[i + length]
                marks[start:end] = b"\1" * (end - start)
        if not _ESCAPE.search(view):
            break
        view, places = _unescape(view, places)
    if not any(marks):
        return text
    pieces, at = [], 0
    for run in re.finditer(b"\1+", bytes(marks)):
        pieces += [text[at : run.start()], "***"]
        at = run.end()
    return "".join([*pieces, text[at:]])


@functools.lru_cache(maxsize=4)
def _parts(key: str) -> frozenset[str]:
    """All pieces of PART characters of the key as it is and as encoded."""
    if len(key) < PART:
        secret = len(key) >= 8 and any(map(str.isdigit, key)) and not key.isdigit()
        return frozenset([key]) if secret else frozenset()
    raw = key.encode()
    forms = [key, raw.hex(), raw.hex().upper()]
    for shift in range(3):
        # the first and last characters also hold bits of the neighbours
        inner = base64.b64encode(bytes(shift) + raw).decode().rstrip("=")[4 if shift else 0 : -1]
        forms += [inner, inner.translate(str.maketrans("+/", "-_"))]
    return frozenset(form[i : i + PART] for form in forms for i in range(len(form) - PART + 1))


def _unescape(view: str, places: list[int]) -> tuple[str, list[int]]:
    """One level of escapes undone, and the place of each character in the text."""
    found, where, at = [], [], 0
    for escape in _ESCAPE.finditer(view):
        found.append(view[at : escape.start()])
        where += places[at : escape.start()]
        at = escape.end()
        word = escape[0]
        if word[0] == "&":
            plain = html.unescape(word)
        elif word == "\\":
            plain = ""
        else:
            plain = chr(int(word.lstrip("%\\ux"), 16))
        found.append(plain)
        where += [places[escape.start()]] * len(plain)
    found.append(view[at:])
    where += places[at:]
    return "".join(found), where
