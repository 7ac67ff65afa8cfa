"""The files of one reply: sidecar, reply, what was read from it; and whether an item needs no asking again.

In this order, each in one step: `reply.json` (who wrote it, tokens, dollars), `output_from_llm.txt` (flushed to disk:
from here on the item counts as answered), `score.txt` or `refused.txt`.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ares import files
from teacher import handoff
from teacher.handoff import Refused
from teacher.interface import JUDGE, SCORE

REFUSED_REPLY = f"unusable_{handoff.REPLY}"  # reads well, but its stop reason says that it is not the whole reply


_SIDECAR_KINDS = {"teacher": str, "model": str, "time": str, "copied_from": str, "usage": dict,
                  "cost_usd": (int, float, type(None))}  # fmt: skip


def read_reply(kind: str, folder: Path) -> list[float] | str:
    """What an item's reply says: scores (`score.txt` is written), the corrected rationale, or a verdict.

    Raises Refused; the reason then stands in `refused.txt`.
    """
    if kind == SCORE:
        return handoff.read_scores(folder)
    try:
        reply = files.read_shared(folder / handoff.REPLY) if handoff.has_reply(folder) else None
        if kind == JUDGE:
            final = handoff.parse_verdict(reply)[0]
        else:
            final = handoff.parse_correction(reply, " ".join(handoff.read_rationale(folder)))
    except Refused as refused:
        files.write_text(folder / handoff.REASON, f"{refused}\n", flush=False)
        raise
    (folder / handoff.REASON).unlink(missing_ok=True)
    return final


def reason_of(folder: Path) -> str:
    """`refused.txt`: why the reply cannot be used; "" where nothing says so. Raises UserError for a link or a FIFO."""
    try:
        return files.read_shared(folder / handoff.REASON).decode("utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_sidecar(folder: Path) -> dict[str, Any]:
    """`reply.json`: who wrote the reply; {} where it is absent or damaged. Raises UserError for a link or a FIFO."""
    try:
        about = files.parse_json(files.read_shared(folder / handoff.SIDECAR).decode("utf-8"), nan=True)
    except (OSError, ValueError):
        return {}
    fits = about.items() if isinstance(about, dict) else ()
    return {name: value for name, value in fits if isinstance(value, _SIDECAR_KINDS.get(name, object))}


def is_answered(kind: str, folder: Path) -> bool:
    """Whether the folder's reply needs no asking again."""
    if not handoff.has_reply(folder):
        return False
    if kind == SCORE:
        with contextlib.suppress(FileNotFoundError):
            scores, reply = (os.lstat(folder / name) for name in (handoff.SCORES, handoff.REPLY))
            if stat.S_ISREG(scores.st_mode) and scores.st_size and scores.st_mtime_ns >= reply.st_mtime_ns:
                return True  # read before, with success
    try:
        read_reply(kind, folder)
    except Refused as refused:
        return refused.reason == "unchanged"  # clear enough: the rationale stays as it is
    return True


def reading(kind: str, text: str, sentences: Sequence[str]) -> list[float] | Refused | None:
    """The scores in a reply, None for a correction or a verdict that can be used, or why it cannot."""
    try:
        if kind == SCORE:
            return handoff.parse_scores(text, list(sentences))
        if kind == JUDGE:
            handoff.parse_verdict(text)
        else:
            handoff.parse_correction(text, " ".join(sentences))
    except Refused as refused:
        return None if refused.reason == "unchanged" else refused
    return None


def write_reply(folder: Path, text: str, about: Mapping[str, Any], read: list[float] | Refused | None) -> None:
    """`about`: the sidecar's content; `read`: what `reading` says of the text."""
    # one field a line; `indent` would be slow Python
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in about.items())
    # counts only with its reply, so only the reply is flushed
    files.write_text(f"{folder}/{handoff.SIDECAR}", "{\n" + ",\n".join(lines) + "\n}\n", flush=False)
    files.write_text(f"{folder}/{handoff.REPLY}", text)
    if isinstance(read, Refused):
        (folder / handoff.SCORES).unlink(missing_ok=True)
        files.write_text(folder / handoff.REASON, f"{read}\n", flush=False)
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/{handoff.REASON}")
    if read is not None:
        files.write_text(f"{folder}/{handoff.SCORES}", "".join(f"{score}\n" for score in read), flush=False)


def set_cut_reply_aside(folder: Path, text: str, stop_reason: str) -> None:
    """Keep a reply that reads well but is not whole where nobody takes it for one."""
    files.write_text(folder / REFUSED_REPLY, text)
    (folder / handoff.REPLY).unlink(missing_ok=True)
    (folder / handoff.SCORES).unlink(missing_ok=True)
    files.write_text(folder / handoff.REASON, f"{stop_reason}\n", flush=False)
