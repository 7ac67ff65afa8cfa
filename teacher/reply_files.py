"""A reply's files in a questions folder: writing them, reading scores, whether an item must be asked again.

Written in this order, each in one step: `reply.json` (who replied, tokens, dollars), `output_from_llm.txt` (flushed to
disk: from here on the item counts as answered), `score.txt` or `refused.txt`. Folders and names: teacher/handoff.py.
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
from teacher.corrections import parse_correction
from teacher.handoff import REASON, REFUSED_REPLY, REPLY, SCORES, SIDECAR, has_reply, read_rationale, write_if_changed
from teacher.interface import JUDGE, SCORE
from teacher.parsing import Refused, parse_scores, parse_verdict


def parse(kind: str, reply: str | bytes | None, sentences: Sequence[str]) -> list[float] | str:
    """What a reply says: scores of the sentences, the corrected rationale, or which text is better. Raises Refused."""
    if kind == SCORE:
        return parse_scores(reply, sentences)
    return parse_verdict(reply).better if kind == JUDGE else parse_correction(reply, " ".join(sentences))


def reading(kind: str, text: str, sentences: Sequence[str]) -> list[float] | Refused | None:
    """The scores in a reply, None for a correction or a verdict that can be used, or why it cannot."""
    try:
        result = parse(kind, text, sentences)
    except Refused as refused:
        return None if refused.reason == "unchanged" else refused
    return result if kind == SCORE else None


def read_reply(kind: str, folder: str | os.PathLike) -> list[float] | str:
    """`parse` a folder's reply; scores are written to `score.txt`. Files that hold the result already stay untouched.

    Raises Refused; the reason is then in `refused.txt`.
    """
    folder = Path(folder)
    try:
        sentences = () if kind == JUDGE else read_rationale(folder)
        try:
            reply = files.read_shared(folder / REPLY)
        except OSError as error:
            raise Refused("no_reply", f"no {REPLY} ({error.strerror})") from None
        result = parse(kind, reply, sentences)
    except Refused as refused:
        if not has_reply(folder) and os.path.lexists(folder / REASON):
            (folder / SCORES).unlink(missing_ok=True)  # the Teacher's client has written why no reply came
        elif folder.is_dir():
            _write_result(folder, refused)
        raise
    _write_result(folder, result)
    return result


def read_scores(folder: str | os.PathLike) -> list[float]:
    """The scores of a folder's sentences (see `read_reply`)."""
    return read_reply(SCORE, folder)


def is_answered(kind: str, folder: Path) -> bool:
    """Whether the folder's reply can be used, so that the item need not be asked again."""
    if not has_reply(folder):
        return False
    if kind == SCORE:
        with contextlib.suppress(FileNotFoundError):
            scores, reply = (os.lstat(folder / name) for name in (SCORES, REPLY))
            if stat.S_ISREG(scores.st_mode) and scores.st_size and scores.st_mtime_ns >= reply.st_mtime_ns:
                return True  # read before, with success
    try:
        read_reply(kind, folder)
    except Refused as refused:
        return refused.reason == "unchanged"  # clear enough: the rationale stays as it is
    return True


def write_reply(folder: Path, text: str, about: Mapping[str, Any], result: list[float] | Refused | None) -> None:
    """Write a new reply. `about`: the sidecar's content; `result`: what `reading` found in the text."""
    # one field a line; `indent` would be slow Python
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in about.items())
    # counts only with its reply, so only the reply is flushed
    files.write_text(f"{folder}/{SIDECAR}", "{\n" + ",\n".join(lines) + "\n}\n", flush=False)
    files.write_text(f"{folder}/{REPLY}", text)
    _write_result(folder, result)


def _write_result(folder: Path, result: list[float] | str | Refused | None) -> None:
    """Write scores or a refusal, and remove the file of the other."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/{SCORES if isinstance(result, Refused) else REASON}")
    if isinstance(result, Refused):
        write_if_changed(f"{folder}/{REASON}", f"{result}\n")
    elif isinstance(result, list):
        write_if_changed(f"{folder}/{SCORES}", "".join(f"{score}\n" for score in result))


def set_cut_reply_aside(folder: Path, text: str, stop_reason: str) -> None:
    """Keep a reply that can be read but was cut off under another name, so that it is not read as one."""
    files.write_text(folder / REFUSED_REPLY, text)
    (folder / REPLY).unlink(missing_ok=True)
    (folder / SCORES).unlink(missing_ok=True)
    files.write_text(folder / REASON, f"{stop_reason}\n", flush=False)


def reason_of(folder: Path) -> str:
    """`refused.txt`: why the reply cannot be used; "" if there is none. Raises UserError for a link or a FIFO."""
    try:
        return files.read_shared(folder / REASON).decode("utf-8", errors="replace").strip()
    except OSError:
        return ""


_SIDECAR_KINDS = {"teacher": str, "model": str, "time": str, "copied_from": str, "usage": dict,
                  "cost_usd": (int, float, type(None))}  # fmt: skip


def read_sidecar(folder: Path) -> dict[str, Any]:
    """`reply.json`: who wrote the reply; {} where it is absent or damaged. Raises UserError for a link or a FIFO."""
    try:
        about = files.parse_json(files.read_shared(folder / SIDECAR).decode("utf-8"), nan=True)
    except (OSError, ValueError):
        return {}
    fits = about.items() if isinstance(about, dict) else ()
    return {name: value for name, value in fits if isinstance(value, _SIDECAR_KINDS.get(name, object))}
