"""What every kind of Teacher shares: a request, a reply, and how one is asked. Asks nobody itself (ares/teacher.py).

Standard library only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

SCORE, CORRECT = "score", "correct"

# what the API takes, by the first bytes: a JPEG is often called .png
_SIGNATURES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"GIF8[79]a"), "image/gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "image/webp"),
)


@dataclass(frozen=True)
class Request:
    """One question to a Teacher about one rationale.

    `sentences` is the rationale as exported; for a correction it holds the whole text as its one entry. `problem` is
    None where no problems.json was at hand, which only the reference Teacher minds.
    """

    custom_id: str
    kind: str  # SCORE or CORRECT
    qid: str
    text: str
    sentences: tuple[str, ...]
    images: tuple[Path, ...] = ()
    problem: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Reply:
    """A Teacher's raw reply and what is known about it. `cost_usd` is None where the model's price is not known."""

    text: str
    teacher: str
    model: str
    stop_reason: str | None = None
    request_id: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    cost_usd: float | None = 0.0
    seconds: float = 0.0


class Teacher(Protocol):
    """Answers requests, `concurrency` of them at a time, between entering and leaving its context."""

    name: str
    model: str
    concurrency: int

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def answer(self, request: Request) -> Reply:
        """Raises UserError where asking on makes no sense: bad key, unknown model, spend limit, no network."""
        ...


def custom_id(kind: str, action: int, rank: int, qid: str) -> str:
    """A name of the request that is unique in a questions folder and fits the API: 1-64 of [A-Za-z0-9_-]."""
    name = f"{kind}-{action}-{rank}-{qid}"
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        return name
    return f"{kind}-{action}-{rank}-{hashlib.sha256(qid.encode()).hexdigest()[:32]}"


def media_type(head: bytes) -> str | None:
    """The true media type from a file's first bytes (12 suffice); None if the API takes no such image."""
    return next((name for signature, name in _SIGNATURES if signature.match(head)), None)
