"""Replies that were paid for, by what was asked (model, request, images), shared by actions, rounds and runs.

    {cache}/replies.jsonl   {"key": ..., "text": the raw reply, ...what reply.json holds}, one reply a line

Only usable replies are kept. A damaged line counts as none. One file, appended to in single writes: a file per reply
would cost more time than all the rest of the client.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ares import files
from ares.cli import UserError
from teacher.groups import Numbers

FILE = "replies.jsonl"
_START = '{"key": "'
_KEY = slice(len(_START), len(_START) + 64)


def default_folder() -> Path:
    """`~/.cache/ares/teacher`, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ares" / "teacher"


class ReplyCache:
    """`folder` None keeps nothing. Keys are 64 hex digits. Sees what other clients added before it was made."""

    def __init__(self, folder: str | os.PathLike | None):
        self.path = Path(folder, FILE) if folder is not None else None
        self._lock = threading.Lock()
        self._file: files.Lines | None = None
        self._entries = Numbers()  # digest -> number of its last line
        self._offsets = array("Q")
        if self.path is not None:
            self._index()

    def has(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> dict[str, Any] | None:
        """{"text": ..., ...} or None."""
        number = self._entries.get(key)
        if number is None:
            return None
        try:
            with open(files.open_regular(self.path), "rb") as file:
                file.seek(self._offsets[number])
                entry = files.parse_json(file.readline().decode("utf-8"), nan=True)
        except (OSError, ValueError, UserError):
            return None
        good = isinstance(entry, dict) and entry.get("key") == key and isinstance(entry.get("text"), str)
        return entry if good else None

    def put(self, key: str, text: str, about: Mapping[str, Any]) -> None:
        """Keep a reply; a full disk or a folder that is not ours costs only the cache."""
        if self.path is None:
            return
        line = json.dumps({"key": key, "text": text, **about})
        with self._lock:
            try:
                if self._file is None:
                    self._file = files.Lines(self.path, mode=0o600)
                end = self._file.add(line)
            except UserError:
                self.path, self._entries = None, Numbers()
                return
            self._note(key, end - len(line) - 1)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _index(self) -> None:
        try:
            with open(files.open_regular(self.path), "rb") as file:
                offset = 0
                for line in file:
                    if line.startswith(_START.encode()) and line.endswith(b"\n"):
                        with contextlib.suppress(ValueError):  # damaged
                            self._note(line[_KEY].decode(), offset)
                    offset += len(line)
        except (OSError, UserError):
            pass

    def _note(self, key: str, offset: int) -> None:
        self._entries.put(key, len(self._offsets))
        self._offsets.append(offset)
