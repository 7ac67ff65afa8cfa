"""Where replies are kept: a reply's files in a questions folder, and the cache that all runs share.

Written in this order, each in one step: `reply.json` (who replied, tokens, dollars), `output_from_llm.txt` (flushed to
disk if it was paid for: from here on the item counts as answered), `score.txt` or `refused.txt`. Folders and names:
teacher/handoff.py.

    {cache}/replies.sqlite3   table replies(key, entry); entry is JSON: "text", the raw reply, and reply.json

The cache holds paid, usable replies by what was asked (model, request, images). Several processes may share the file.
It survives a kill; a power cut may damage it, which costs the cache only.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ares import files
from ares.cli import UserError, warn0
from teacher.corrections import parse_correction
from teacher.handoff import REASON, REFUSED_REPLY, REPLY, SCORES, SIDECAR, has_reply, read_rationale, write_if_changed
from teacher.interface import JUDGE, SCORE
from teacher.parsing import Refused, parse_scores, parse_verdict

CACHE_FILE = "replies.sqlite3"
OLD_CACHE_FILE = "replies.jsonl"  # one {"key", "text", ...} a line; imported when CACHE_FILE is made
PUT = "INSERT OR REPLACE INTO replies VALUES (?, ?)"
LOCK_SECONDS = 60.0  # for another process's write


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
    try:
        sentences = () if kind == JUDGE else read_rationale(folder)
        try:
            reply = files.read_shared(f"{folder}/{REPLY}")
        except OSError as error:
            raise Refused("no_reply", f"no {REPLY} ({error.strerror})") from None
        result = parse(kind, reply, sentences)
    except Refused as refused:
        if not has_reply(folder) and os.path.lexists(f"{folder}/{REASON}"):
            Path(folder, SCORES).unlink(missing_ok=True)  # the Teacher's client has written why no reply came
        elif os.path.isdir(folder):
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


def write_reply(
    folder: Path, text: str, about: Mapping[str, Any], result: list[float] | Refused | None, *, paid: bool = True
) -> None:
    """Write a new reply. `about`: the sidecar's content; `result`: what `reading` found in the text; `paid`: False for
    one that can be made again, by the reference Teacher or as a copy."""
    # one field a line; `indent` would be slow Python
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in about.items())
    # counts only with its reply, so at most the reply is flushed
    files.write_text(f"{folder}/{SIDECAR}", "{\n" + ",\n".join(lines) + "\n}\n", flush=False)
    files.write_text(f"{folder}/{REPLY}", text, flush=paid)
    _write_result(folder, result)


def _write_result(folder: str | os.PathLike, result: list[float] | str | Refused | None) -> None:
    """Write scores or a refusal, and remove the file of the other."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/{SCORES if isinstance(result, Refused) else REASON}")
    if isinstance(result, Refused):
        write_if_changed(f"{folder}/{REASON}", f"{result}\n")
    elif isinstance(result, list):
        write_if_changed(f"{folder}/{SCORES}", "".join(f"{score}\n" for score in result))


def set_cut_reply_aside(folder: Path, text: str, reason: str) -> None:
    """Keep a reply under a name by which nothing reads it: one that was cut off though it can be read, or one about
    several rationales without a certain part for this one."""
    files.write_text(folder / REFUSED_REPLY, text)
    (folder / REPLY).unlink(missing_ok=True)
    (folder / SCORES).unlink(missing_ok=True)
    files.write_text(folder / REASON, f"{reason}\n", flush=False)


def reason_of(folder: Path) -> str:
    """`refused.txt`: why the reply cannot be used; "" if there is none. Raises UserError for a link or a FIFO."""
    try:
        return files.read_shared(folder / REASON).decode("utf-8", errors="replace").strip()
    except OSError:
        return ""


_SIDECAR_KINDS = {"teacher": str, "model": str, "key": str, "time": str, "copied_from": str, "usage": dict,
                  "cost_usd": (int, float, type(None))}  # fmt: skip


def read_sidecar(folder: Path) -> dict[str, Any]:
    """`reply.json`: who wrote the reply; {} where it is absent or damaged. Raises UserError for a link or a FIFO."""
    try:
        about = files.parse_json(files.read_shared(folder / SIDECAR).decode("utf-8"), nan=True)
    except (OSError, ValueError):
        return {}
    fits = about.items() if isinstance(about, dict) else ()
    return {name: value for name, value in fits if isinstance(value, _SIDECAR_KINDS.get(name, object))}


# -- the cache ---------------------------------------------------------------------------------------------


class ReplyCache:
    """A map from keys to replies on disk. `folder` None keeps nothing. Safe in threads.

    A folder that cannot be written, a full disk or a damaged file turn it off, with a warning.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._path = Path(folder or "", CACHE_FILE)
        if folder is not None:
            with self._off_on_error():
                self._open()

    def get(self, key: str) -> dict[str, Any] | None:
        """{"text": ..., ...} or None."""
        with self._lock, self._off_on_error():
            if self._database is not None:
                row = self._database.execute("SELECT entry FROM replies WHERE key = ?", (key,)).fetchone()
                entry = json.loads(row[0]) if row else None
                return entry if isinstance(entry, dict) and isinstance(entry.get("text"), str) else None
        return None

    def put(self, key: str, text: str, about: Mapping[str, Any]) -> None:
        """Keep a reply; it replaces an earlier one."""
        with self._lock, self._off_on_error():
            if self._database is not None:
                self._database.execute(PUT, (key, json.dumps({**about, "text": text})))

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # only the user may read it; no link is followed, and a FIFO is refused
        file = files.open_regular(self._path, follow_links=False, flags=os.O_RDWR | os.O_CREAT)
        try:
            if not os.fstat(file).st_size:
                os.fchmod(file, 0o600)
        finally:
            os.close(file)
        self._database = sqlite3.connect(
            self._path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False
        )
        # no flush to disk per reply: it would cost more time than the rest of the client
        self._database.execute("PRAGMA synchronous = OFF")
        if self._database.execute("PRAGMA user_version").fetchone()[0]:
            return
        self._database.execute("BEGIN IMMEDIATE")  # one process imports, others wait here
        if not self._database.execute("PRAGMA user_version").fetchone()[0]:
            self._database.execute("CREATE TABLE replies (key TEXT PRIMARY KEY, entry TEXT NOT NULL)")
            self._database.executemany(PUT, _old_replies(self._path.with_name(OLD_CACHE_FILE)))
            self._database.execute("PRAGMA user_version = 1")
        self._database.execute("COMMIT")

    @contextlib.contextmanager
    def _off_on_error(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError, RecursionError, UserError) as error:
            self.close()
            warn0(f"--cache: {self._path} cannot be used ({error}); this run goes on without it")


def _old_replies(path: Path) -> Iterator[tuple[str, str]]:
    """(key, entry) of each sound line of the file that earlier versions wrote, none if there is no file."""
    if not path.exists():
        return
    for _, entry in files.read_jsonl(path, "--cache", damaged=lambda number: None):
        if isinstance(entry, dict) and isinstance(entry.get("key"), str) and isinstance(entry.get("text"), str):
            yield entry.pop("key"), json.dumps(entry)
