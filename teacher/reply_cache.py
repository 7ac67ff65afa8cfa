"""Paid replies of earlier runs, by what was asked (model, request, images); shared by actions, rounds and runs.

    {cache}/replies.sqlite3   table replies(key, entry); entry is JSON: "text", the raw reply, and reply.json

Only usable replies are kept. Several processes may share the file. It survives a kill; a power cut may damage it,
which costs the cache only: every reply is also in its questions folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ares import files
from ares.cli import UserError, warn0

FILE = "replies.sqlite3"
OLD_FILE = "replies.jsonl"  # one {"key", "text", ...} a line; imported when FILE is made
LOCK_SECONDS = 60.0  # for another process's write


def default_folder() -> Path:
    """`~/.cache/ares/teacher`, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ares" / "teacher"


class ReplyCache:
    """A map from keys to replies on disk. `folder` None keeps nothing. Safe in threads.

    A folder that cannot be written, a full disk or a damaged file turn it off, with a warning.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._path = Path(folder or "", FILE)
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
                self._insert([(key, json.dumps({**about, "text": text}))])

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
            self._insert(_old_replies(self._path.with_name(OLD_FILE)))
            self._database.execute("PRAGMA user_version = 1")
        self._database.execute("COMMIT")

    def _insert(self, rows: Any) -> None:
        self._database.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?)", rows)

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
