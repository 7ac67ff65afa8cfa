"""What every kind of Teacher shares: a request, a reply, and how a Teacher is asked (teacher/client.py asks them).

Standard library only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

SCORE, CORRECT, JUDGE = "score", "correct", "judge"
REFERENCE, MODEL = "reference", "model"  # the Teachers that cost nothing: teacher/reference.py, rl/reward_model.py
TOGETHER = "together"  # notes and schema of a scoring request about several rationales
FREE = (REFERENCE, MODEL)


@dataclass(frozen=True)
class Wording:
    """The words around a request's text, which the caller owns (utils_prompt.py). `again` has a `{reason}`."""

    version: str
    again: str
    structured: Mapping[str, str] = field(default_factory=dict)  # kind -> note on the form, where output is structured
    exact: Mapping[str, str] = field(default_factory=dict)  # the same where the server enforces a schema to the letter
    together: str = ""  # between the rules and the rationales of a request about several


@dataclass(frozen=True)
class Request:
    """One question to a Teacher about one rationale, or about several of one question (teacher/together.py).

    `sentences` is the rationale as exported; for a correction its one entry is the whole text; for a judgement the two
    rationales, in the order in which they are shown. `rationales` has the sentences of each where there are several;
    `sentences` are then all of them. `problem` is None without problems.json, which only the reference Teacher needs.
    `form_note` is sent where output is structured, `exact_note` where its schema is enforced exactly, `again` after a
    reply that could not be used; `length_factor` multiplies the length allowed.
    """

    custom_id: str
    kind: str  # SCORE, CORRECT or JUDGE
    qid: str
    text: str
    sentences: tuple[str, ...]
    images: tuple[Path, ...] = ()
    problem: Mapping[str, Any] | None = None
    form_note: str = ""
    exact_note: str = ""
    again: str = ""
    length_factor: int = 1
    rationales: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Reply:
    """A Teacher's raw reply and what is known about it. `cost_usd` is None where the model's price or the number
    of tokens is not known."""

    text: str
    teacher: str
    model: str
    stop_reason: str | None = None
    request_id: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    cost_usd: float | None = 0.0
    seconds: float = 0.0
    batch: str | None = None


@dataclass(frozen=True)
class Failed:
    """What a batch has instead of a reply to a request. `said`: the API's sentence."""

    reason: str
    said: str = ""
    permanent: bool = False  # the same request would fail again
    account: bool = False  # every request would fail until the user acts
    charged: bool = False  # perhaps


class Unanswered(Exception):
    """A request that got no reply though others do; `reason`: one word for counting, `message`: the API's sentence,
    `permanent`: the same request would be refused again."""

    def __init__(self, reason: str, message: str = "", permanent: bool = False):
        super().__init__(f"{reason}: {message}" if message else reason)
        self.reason, self.message, self.permanent = reason, message, permanent


class Stopped(Exception):
    """The run is ending: a request that was still waiting for its turn is given up."""


# -- the form of a reply ------------------------------------------------------------------------------------


def _schema(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


# one schema per kind, whatever the sentences: a new schema costs Anthropic's API a compilation
_TEXT = {"type": "string"}
_SCHEMAS = {
    SCORE: _schema({"scores": {"type": "array", "items": {"type": "number"}}}),
    TOGETHER: _schema({"scores": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}}),
    CORRECT: _schema({"Final rationale": _TEXT}),
    # the reason first: a verdict that is written before its reason has none
    JUDGE: _schema({"reason": _TEXT, "verdict": {"type": "string", "enum": ["1", "2", "tie"]}}),
}
_SCORE = {"type": "number", "enum": [step / 10 for step in range(11)]}


def general_schema(request: Request) -> dict[str, Any]:
    """The JSON schema of a reply, which neither counts nor names sentences."""
    return _SCHEMAS[TOGETHER if request.rationales else request.kind]


def exact_schema(request: Request) -> dict[str, Any]:
    """For servers that enforce what a schema says: a scoring reply has one key per sentence, `sentence_1` on, and the
    values 0.0, 0.1 ... 1.0; about several rationales it has such an object for each, `rationale_1` on."""
    if request.kind != SCORE:
        return general_schema(request)
    objects = [
        _schema({f"sentence_{number}": _SCORE for number in range(1, len(sentences) + 1)})
        for sentences in request.rationales or [request.sentences]
    ]
    if not request.rationales:
        return objects[0]
    return _schema({f"rationale_{number}": each for number, each in enumerate(objects, start=1)})


# -- who answers -----------------------------------------------------------------------------------------


class Teacher(Protocol):
    """Answers requests, `concurrency` of them at a time, between entering and leaving its context."""

    name: str
    model: str
    concurrency: int

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...

    def key(self, request: Request) -> str:
        """What the reply depends on, as a hex digest: equal keys may share a reply."""
        ...

    async def answer(self, request: Request) -> Reply:
        """The reply, whatever it says. Raises UserError where asking on makes no sense (bad key, unknown model, spend
        limit, no network), Unanswered where only this request fails, Stopped after `stop`."""
        ...

    def stop(self) -> None:
        """Let requests that wait for their turn raise Stopped; those in flight get their replies."""
        ...


def same_model(one: str, other: str) -> bool:
    """Whether two model ids may name one model: an alias and a dated id (`claude-haiku-4-5-20251001`), or the same id
    as other providers write it (`anthropic/claude-haiku-4-5`, `us.anthropic.claude-haiku-4-5-20251001-v1:0`)."""

    def parts(model: str) -> tuple[str, str]:
        """(name, date or "")."""
        name = re.sub(r"^(.*/)?((\w+\.)?anthropic\.)?", "", model.strip().lower())
        match = re.fullmatch(r"(.+?)(?:[-@](\d{8}|\d{4}-\d\d-\d\d|latest|default))?(-v\d+(:\d+)?)?", name)
        date = (match[2] or "").replace("-", "") if match else ""
        return (match[1] if match else name), date if date.isdigit() else ""

    (name, date), (other_name, other_date) = parts(one), parts(other)
    return name == other_name and (date == other_date or not date or not other_date)


def custom_id(kind: str, action: int, rank: int, qid: str) -> str:
    """A name of the request that is unique in a questions folder and fits the API: 1-64 of [A-Za-z0-9_-]."""
    name = f"{kind}-{action}-{rank}-"
    fits = re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name + qid)
    return name + (qid if fits else hashlib.sha256(qid.encode()).hexdigest()[:32])
