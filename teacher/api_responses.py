"""What an API answered: a reply in one of several forms, or an error and what it means.

Errors are sorted (`failure_of`): retryable or not, perhaps charged or not, of one request or of the whole account.
Replies are read (`read_body`) in the form of Anthropic's Messages API, of OpenAI's, or as server-sent events, as
gateways and local servers send them. Knows no SDK: teacher/sdk_client.py turns the SDKs' exceptions into ApiError and
NoAnswer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ares.cli import Stop, UserError
from teacher.pace import delay
from teacher.redact import redact

LENGTH_FIELDS = ("max_tokens", "max_completion_tokens")  # of a request's body, by API: the most tokens of the reply
STOP_STATUS = 3  # exit status where money or the account ends the run
# exceptions of httpx that say that the request was not sent
NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError")
ACCOUNT = re.compile(
    r"credit balance|(insufficient|not enough|out of|no|purchase|buy|add( more)?) (credits?|funds?|balance|quota)\b|"
    r"(usage|spend(ing)?|billing|budget|monthly|hard) (limit|cap|quota)s?\b|regain access|out of (extra )?usage|"
    r"budget (has been |is |was )?exceeded|exceeded (your |the )?(current |monthly )?(quota|budget)|budgetexceeded|"
    r"exceededbudget|payment (is )?required|billing error|plans & billing|billing details|unpaid|overdue|past due|"
    r"(organi[sz]ation|account|workspace|subscription|project)( \S{1,60})? "
    r"(has been|is|was) (\w+ )?(disabled|suspended|deactivated|blocked|banned|terminated|closed|restricted)",
    re.IGNORECASE,
)
ABOUT_REQUEST = re.compile(r"\W*(messages|system|tools|output_config|max_tokens)\b")  # may quote the question
UNKNOWN_MODEL = re.compile(
    r"\bmodels?\b.{0,200}?\b(not exist|not found|does ?n.t exist|not available|not a valid)|model_not_found|"
    r"(invalid|unknown|unrecogni[sz]ed|no such|no) model\b|\bmodel\b.{0,80}\bis (unknown|invalid)", re.I | re.S
)  # fmt: skip
FLAGGED = re.compile(  # by a content filter
    r"\b(input|prompt|content|message|output|request)s?\b.{0,40}\b(flagged|blocked|violat)|requires moderation|"
    r"content (management )?(policy|filter)", re.I | re.S
)  # fmt: skip
PER_MINUTE = re.compile(r"quotaId\W{1,19}\w*PerMinute")
LASTING = re.compile(r"quotaId\W{1,19}\w*PerDay|insufficient_quota")  # whatever delay is named
ABOUT_KEY = re.compile(r"\bapi.?key\b|no connected db", re.I)  # the second: litellm without a database, to any other
THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.S)  # of local models, where the server does not take them out
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}  # OpenAI's -> Anthropic's
NO_TEXT = frozenset(("refusal", "max_tokens", "model_context_window_exceeded"))  # with these a reply may be empty
# rate limits, overload, and what a proxy answers while its server restarts
TEMPORARY = frozenset((408, 409, 429, 502, 503, 504, 520, 521, 522, 523, 524, 529))
# the status that belongs to each type of error
STATUS = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402, "permission_error": 403,
    "not_found_error": 404, "request_too_large": 413, "rate_limit_error": 429, "overloaded_error": 529,
}  # fmt: skip


class ApiError(Exception):
    """The server answered with an error. `charged`: it came as HTTP 200, so that the work may have been done."""

    def __init__(self, status: int, body: object, headers: Mapping[str, str] | None = None, charged: bool = False):
        super().__init__(f"HTTP {status}")
        self.status, self.body, self.headers, self.charged = status, body, headers or {}, charged


class NoAnswer(Exception):
    """No answer came. `kind`: the name of the exception of the HTTP library."""

    def __init__(self, kind: str, timeout: bool = False):
        super().__init__(kind)
        self.kind, self.timeout = kind, timeout


class NotAReply(ValueError):
    """HTTP 200 whose body (`body`, as text) holds no reply."""

    def __init__(self, body: str):
        super().__init__("no reply")
        self.text = body


@dataclass(frozen=True)
class Failure:
    """`reason`: one word for counting. `charged`: the API may have done the work."""

    reason: str
    retryable: bool
    charged: bool = False
    status: int | None = None
    retry_after: float | None = None  # seconds

    @property
    def overloaded(self) -> bool:
        """A rate limit or an overload: nothing was done, and fewer requests at a time may help."""
        return self.status in (429, 529)

    @property
    def temporary(self) -> bool:
        """Whether its status passes, whatever its text: however often it comes, the request may be sound."""
        return self.status in TEMPORARY


@dataclass(frozen=True)
class Received:
    """A reply's parts. `usage` is empty where the server did not say how many tokens were used."""

    text: str
    usage: dict[str, int]
    model: str | None = None
    stop_reason: str | None = None


# -- errors ----------------------------------------------------------------------------------------------


def error_body(body: object) -> dict[str, Any]:
    """{"type", "message", "code", "details"} of an error body: the API's, the SDK's object of a batch result, or the
    form of another server (`{"error": "..."}`, `{"detail": ...}`, a list, plain text). Missing ones are None."""
    if isinstance(body, (bytes, str)):
        text = body.decode(errors="replace") if isinstance(body, bytes) else body
        try:
            inner = json.loads(text) if text.lstrip()[:1] in ("{", "[") else None
        except (ValueError, RecursionError):
            inner = None
        return error_body(inner if isinstance(inner, (dict, list)) else {"message": text})
    if isinstance(body, Sequence):
        return error_body(body[0] if body else {})
    fields = ("type", "message", "code", "details")
    if not isinstance(body, Mapping):
        body = {name: getattr(body, name) for name in (*fields, "error") if getattr(body, name, None) is not None}
    found = {name: body.get(name) for name in fields}
    for name in ("error", "errors", "detail"):
        inner = body.get(name)
        if inner and not isinstance(inner, (str, bool, int, float)):
            return error_body(inner)
        if isinstance(inner, str) and not found["message"]:
            found["message"] = inner
            break
    if found["message"] is not None and not isinstance(found["message"], str):
        found["message"] = json.dumps(found["message"], default=str)
    return found


def is_account_refusal(error: object) -> bool:
    """Whether an error is about the whole account: credit, spend or usage limits, billing, a disabled organisation.

    `error`: an exception, or an error body (mapping, text, or the SDK's object in a batch result). The API sends most
    of these as HTTP 400 `invalid_request_error`, so the message decides. No request can succeed until the user acts:
    stop at the first one (`as_user_error`).
    """
    status = error.status if isinstance(error, ApiError) else None
    body = error_body(getattr(error, "body", error) if isinstance(error, Exception) else error)
    if is_spend_limit({"error": body}):
        return True
    codes = {status, body["code"], str(body["code"]), body["type"]}
    if codes & {402, "402", "billing_error", "insufficient_quota"}:
        return True
    if status == 429 and not LASTING.search(_as_text(error.body)):
        if _delay(error) is not None or PER_MINUTE.search(_as_text(error.body)):
            return False  # a rate limit, whatever its words: it passes
    words = " ".join(str(body[name]).replace("_", " ") for name in ("type", "code") if body[name])
    message = body["message"] or ""
    return bool(ACCOUNT.search(words) or not ABOUT_REQUEST.match(message) and ACCOUNT.search(message))


def is_about_request(error: Exception) -> bool:
    """Whether an error may be about one request: others may be answered. A 403 is by its words."""
    if not isinstance(error, ApiError) or is_account_refusal(error):
        return False
    flagged = error.status == 403 and FLAGGED.search(error_body(error.body)["message"] or "")
    return error.status in (400, 413, 422) or bool(flagged)


def is_unknown_model(error: Exception, model: str) -> bool:
    """Whether the server says that it has no such model."""
    if not isinstance(error, ApiError) or error.status not in (400, 404):
        return False
    body = error_body(error.body)
    message = body["message"] or ""
    if body["type"] == "not_found_error" and re.match(r"\W*model\b", message):
        return True
    known_words = UNKNOWN_MODEL.search(f"{body['code']} {message}")
    return bool(known_words) and (error.status == 404 or model in message or body["code"] == "model_not_found")


def is_spend_limit(body: object) -> bool:
    """Whether an error body is one of the `..._spend_limit_reached` kinds, which do not pass."""
    details = error_body(body)["details"]
    code = details.get("error_code") if isinstance(details, Mapping) else None
    return isinstance(code, str) and code.endswith("spend_limit_reached")


def failure_of(error: Exception) -> Failure:
    """Sort an error of one request. Connection errors and replies that break off may have been charged."""
    if isinstance(error, ApiError):
        status = error.status
        not_the_api = status < 400  # a redirect, say
        retryable = status in (408, 409, 429) or status >= 500
        if is_account_refusal(error) or error.headers.get("x-should-retry") == "false":
            retryable = False
        return Failure(f"api_{status}", retryable or not_the_api, error.charged or not_the_api, status, _delay(error))
    if isinstance(error, NoAnswer):
        return Failure("timeout" if error.timeout else "connection", True, charged=error.kind not in NOT_SENT)
    return Failure("not_a_reply" if isinstance(error, NotAReply) else "broken_reply", True, charged=True)


def _delay(error: ApiError) -> float | None:
    return delay(error.headers, _as_text(error.body) if error.status == 429 else "")


def _as_text(body: object) -> str:
    if isinstance(body, (bytes, str)):
        return body.decode(errors="replace") if isinstance(body, bytes) else body
    return json.dumps(body, default=str).replace("\\n", " ")


def as_user_error(error: Exception, teacher: Any, request: Any, retries: int) -> UserError:
    """What to raise for an error that ends the run: one line that says what, where and the fix, never the key.

    `teacher`: an ApiTeacher. `request`: the one that failed, or None for a call about a batch. Exit status 3 where
    the account is refused.
    """
    line = redact(_explain(error, teacher, request, retries), teacher.secret)
    return Stop(line, STOP_STATUS) if is_account_refusal(error) else UserError(line)


def _explain(error: Exception, teacher: Any, request: Any, retries: int) -> str:
    address, key, why = teacher.address, teacher.key_name, said(error, teacher.secret)
    again = "run the same command again to go on: replies so far are kept"
    what = f"the request for question {request.qid}" if request is not None else "the batch"
    if isinstance(error, NoAnswer):
        return f"--base_url: cannot reach {address} after {retries} retries ({error.kind}); {again}"
    if not isinstance(error, ApiError):
        return f"--base_url: {address} sends no usable reply to {what}, but: {why}; name a server of this API"
    status = error.status
    if is_account_refusal(error):
        kind = "the spend limit is reached" if is_spend_limit(error.body) else "the API refuses the whole account"
        return f"{key}: {kind} ({status}: {why}); see billing and limits in the Console, then run this again to go on"
    if status == 401 or status == 400 and ABOUT_KEY.search(why):
        return f"{key}: the API does not accept this key ({why}); export a valid one"
    if status == 403 and not is_about_request(error):
        return f"{key}: the key may not do this ({status}: {why}); see its workspace in the Console"
    if is_unknown_model(error, teacher.model):
        retired = teacher.retired.get(teacher.model)
        unknown = f"was retired in {retired}" if retired else f"is not known at {address} ({why})"
        offered = f"the server has {in_line(teacher.offered)}" if teacher.offered and not retired else ""
        advice = f"use --teacher_model {teacher.default_model}" if teacher.default_model else "name one that it has"
        return f"--teacher_model: {teacher.model} {unknown}; {offered or advice}"
    if status in (404, 405):
        if request is None:
            return f"--batch: the server {address} has no Message Batches ({status}: {why}); leave --batch out"
        fix = f"name the server's address {teacher.address_hint}"
        return f"--base_url: {address} has no {teacher.api} ({status}: {why}); {fix}"
    if status == 413:
        return f"--images: {what} is too large for the API (413: {why}); shrink its images"
    if failure_of(error).retryable:
        still = f"the API still answers {status} ({why}) after {retries} retries"
        return f"--teacher {teacher.name}: {still}; wait, then {again}"
    fields = [*teacher.body(request), teacher.length_field] if request is not None else []
    field = next((name for name in fields if re.search(rf"\b{name}\b", why)), None)
    fix = f"; --body '{json.dumps({field: None})}' leaves {field} out" if field else ""
    other = next((name for name in LENGTH_FIELDS if name != field and re.search(rf"\b{name}\b", why)), None)
    if field == teacher.length_field and other:
        fix = f"; --body '{json.dumps({field: None, other: teacher.max_tokens(request)})}' sends {other} instead"
    return f"--teacher_model: {teacher.model} does not accept {what} ({status}: {why}){fix}"


def in_line(names: Sequence[str], most: int = 12) -> str:
    """`a, b, c ... (40)`"""
    return ", ".join(names[:most]) + (f" ... ({len(names)})" if len(names) > most else "")


def said(error: Exception, key: str) -> str:
    """The server's own words, shortened, on one line, without the key."""
    if isinstance(error, NotAReply):
        return repr(redact(error.text[:2000], key)[:200]) if error.text.strip() else "an empty body"
    if isinstance(error, NoAnswer):
        return error.kind
    body = getattr(error, "body", None)
    message = error_body(body)["message"] if body else None
    text = str(message or body or (str(error) if type(error) is ValueError else "") or type(error).__name__)
    return redact(" ".join(text[:4000].split()), key)[:300]  # before the cut


# -- replies ---------------------------------------------------------------------------------------------


def read_body(data: bytes) -> Received:
    """The reply in the body of an HTTP 200.

    Raises ApiError, NotAReply (a web page, say), or ValueError for JSON or events that break off.
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
    """The reply in a decoded body, of a batch's result too. Raises ApiError or NotAReply."""
    shown = json.dumps(body, default=str) if not isinstance(body, str) else body
    if not isinstance(body, Mapping):
        raise NotAReply(shown)
    if body.get("type") == "error" or body.get("error") and not body.get("content"):
        raise _error_as_reply(body)
    choice = body["choices"][0] if isinstance(body.get("choices"), list) and body["choices"] else {}
    choice = choice if isinstance(choice, Mapping) else {}
    outer = next((each for each in (choice, body) if isinstance(each.get("message"), Mapping)), None)
    message = outer["message"] if outer else choice or body
    found = [message.get(name) for name in ("content", "text", "completion", "response", "output_text")]
    text = next((text for text in map(_text, found) if text is not None), None)
    stop = message.get("stop_reason") or choice.get("finish_reason") or body.get("stop_reason")
    stop = STOP_REASONS.get(str(stop), str(stop)) if stop is not None else None
    if message.get("refusal") and not text:  # OpenAI's, with finish_reason "stop"
        stop = "refusal"
    if text is None and stop not in NO_TEXT and message is not choice.get("message"):
        raise NotAReply(shown)
    text = THOUGHTS.sub("", text or "")
    model = body.get("model")
    return Received(text, _usage(body.get("usage")), model if isinstance(model, str) and model else None, stop)


def _error_as_reply(body: Mapping[str, Any]) -> ApiError:
    """The error in the body of an HTTP 200, with the status that it should have had."""
    error = body.get("error")
    error = error if isinstance(error, Mapping) else body
    codes = [error.get(name) for name in ("code", "status", "status_code")]
    codes = [int(code) for code in codes if str(code).isdigit() and 400 <= int(code) <= 599]
    return ApiError(STATUS.get(str(error.get("type"))) or next(iter(codes), 500), body, charged=True)


def _text(content: Any) -> str | None:
    """Of a string or of content blocks; None where there is neither."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    blocks = [{"text": block} if isinstance(block, str) else block for block in content]
    blocks = [block for block in blocks if isinstance(block, Mapping)]
    texts = [block.get("text") for block in blocks if block.get("type") in (None, "text", "output_text")]
    return "".join(text for text in texts if isinstance(text, str))


def _usage(usage: Any) -> dict[str, int]:
    if not isinstance(usage, Mapping):
        return {}
    found = {
        "input_tokens": usage.get("input_tokens", usage.get("prompt_tokens")),
        "output_tokens": usage.get("output_tokens", usage.get("completion_tokens")),
    }
    if not all(type(number) is int and number >= 0 for number in found.values()):
        return {}
    if type(usage.get("total_tokens")) is int:  # some servers count thinking only here
        found["output_tokens"] = max(found["output_tokens"], usage["total_tokens"] - found["input_tokens"])
    lifetimes = usage.get("cache_creation")
    cached = {**usage, **lifetimes} if isinstance(lifetimes, Mapping) else usage
    for name in ("cache_creation_input_tokens", "cache_read_input_tokens", "ephemeral_1h_input_tokens"):
        if type(cached.get(name)) is int and cached[name] > 0:
            found[name] = cached[name]
    return found


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
            raise _error_as_reply(event)
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
    stop = STOP_REASONS.get(str(stop), stop)
    return {**body, "content": "".join(parts), "usage": usage, "stop_reason": stop}
