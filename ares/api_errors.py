"""What the API's errors mean: whether they pass, whether the request may have been charged, and one line for the user.

Works on the SDK's typed errors; imports the SDK only when an error is at hand.
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEY = "ANTHROPIC_API_KEY"
DEFAULT_MODEL = "claude-haiku-5-5"
# model ids that users still have in their scripts
RETIRED = {"claude-3-haiku-20240307": "April 2026", "claude-3-5-haiku-20241022": "February 2026"}
# the request had not left when one of these came up (httpx)
_NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError")


@dataclass(frozen=True)
class Failure:
    """`reason`: one word for counting. `charged`: the API may have done the work."""

    reason: str
    passing: bool
    charged: bool = False
    status: int | None = None
    retry_after: float | None = None  # seconds


def failure_of(error: Exception) -> Failure:
    """Sort an error of one request. Connection errors and replies that break off may have been charged."""
    import anthropic

    if isinstance(error, anthropic.APIStatusError):
        status = error.status_code
        headers = error.response.headers
        passing = status in (408, 409, 429) or status >= 500
        if is_spend_limit(error.body) or headers.get("x-should-retry") == "false":
            passing = False
        broken = status < 400  # an answer, but not the API's
        return Failure(f"api_{status}", passing or broken, broken, status, retry_after(headers))
    if isinstance(error, (anthropic.APITimeoutError, TimeoutError)):
        return Failure("timeout", True, charged=type(error.__cause__).__name__ not in _NOT_SENT)
    if isinstance(error, anthropic.APIConnectionError):
        return Failure("connection", True, charged=type(error.__cause__).__name__ not in _NOT_SENT)
    return Failure("broken_reply", True, charged=True)  # JSON that is cut or is not a message


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


def is_spend_limit(body: object) -> bool:
    """Whether an error body is one of the `..._spend_limit_reached` kinds, which no waiting mends."""
    error = body.get("error") if isinstance(body, Mapping) else None
    details = error.get("details") if isinstance(error, Mapping) else None
    code = details.get("error_code") if isinstance(details, Mapping) else None
    return isinstance(code, str) and code.endswith("spend_limit_reached")


def explain(error: Exception, teacher: Any, request: Any, key: str, retries: int) -> str:
    """One line for an error that ends the run: what, where, the fix. Never the key.

    `request`: the one it met, or None for a call about a batch.
    """
    import anthropic

    address = teacher.client.base_url
    again = "run the same command again to go on: what is answered is kept"
    what = f"the request for question {request.qid}" if request is not None else "the batch"
    if not isinstance(error, anthropic.APIStatusError):
        kind = type(error.__cause__ or error).__name__
        return f"--base_url: cannot reach {address} after {retries} retries ({kind}); {again}"
    status, why = error.status_code, said(error, key)
    if is_spend_limit(error.body):
        return f"{KEY}: the spend limit is reached ({why}); raise it in the Console, then run this again to go on"
    if status == 401:
        return f"{KEY}: the API does not accept this key ({why}); export a valid one"
    if status in (402, 403):
        return f"{KEY}: the key may not do this ({status}: {why}); see its workspace and billing in the Console"
    if status == 404:
        retired = RETIRED.get(teacher.model)
        unknown = f"was retired in {retired}" if retired else f"is not known at {address} ({why})"
        return f"--teacher_model: {teacher.model} {unknown}; use --teacher_model {DEFAULT_MODEL}"
    if status == 413:
        return f"--images: {what} is too large for the API (413); shrink its images"
    if failure_of(error).passing:
        return f"--teacher claude: the API still answers {status} ({why}) after {retries} retries; wait, then {again}"
    return f"--teacher_model: {teacher.model} does not accept {what} ({status}: {why})"


def said(error: Exception, key: str) -> str:
    """The API's own words, shortened, on one line, without the key."""
    body = getattr(error, "body", None)
    inner = body.get("error") if isinstance(body, Mapping) else None
    message = inner.get("message") if isinstance(inner, Mapping) else None
    text = " ".join(str(message or body or type(error).__name__).split())
    return (text.replace(key, "***") if key else text)[:300]  # whatever a gateway may echo; before the cut
