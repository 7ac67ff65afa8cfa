"""Replies that were paid for, by what was asked (model, request, images), shared by actions, rounds and runs.

    {cache}/{first two of the key}/{key}.json   {"text": the raw reply, ...what reply.json holds}

Only usable replies are kept. A damaged entry counts as none.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def default_folder() -> Path:
    """`~/.cache/ares/teacher`, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ares" / "teacher"


class ReplyCache:
    """`folder` None keeps nothing."""

    def __init__(self, folder: str | os.PathLike | None):
        self.folder = Path(folder) if folder is not None else None

    def has(self, key: str) -> bool:
        return self.folder is not None and os.path.exists(self._path(key))

    def get(self, key: str) -> dict[str, Any] | None:
        """{"text": ..., ...} or None."""
        if self.folder is None:
            return None
        try:
            entry = json.loads(Path(self._path(key)).read_bytes())
        except (OSError, ValueError):
            return None
        good = isinstance(entry, dict) and entry.get("key") == key and isinstance(entry.get("text"), str)
        return entry if good else None

    def put(self, key: str, text: str, about: Mapping[str, Any]) -> None:
        """Keep a reply; a full disk or a folder that is not ours costs only the cache."""
        if self.folder is None:
            return
        path = self._path(key)
        temporary = f"{path}.{os.getpid()}-{time.monotonic_ns()}"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"key": key, "text": text, **about}, file, ensure_ascii=False)
            os.replace(temporary, path)
        except OSError:
            self.folder = None

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, key[:2], key + ".json")
