"""The spend log, and the stop before a budget is passed.

    {questions_dir}/teacher/spend.jsonl   {"id", "item", "most_usd"} before a request leaves,
                                          {"id", "usd", "outcome"} when its outcome is known

A request without a second line was in flight when the client was killed: it may have been charged, `most_usd` at
worst. So the log holds every request that the API can have counted. Lines are not flushed one by one: they survive a
kill, not a power cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ares import files
from ares.cli import DiskError, Stop

LOG = "spend.jsonl"
LOST = "lost"  # sent, and perhaps charged, but the cost is not known
NOT_SENT = "not_sent"  # the run ended before it left


@dataclass
class Totals:
    """What a log says. `unknown_usd`: at most spent on requests of unknown cost."""

    requests: int = 0
    replies: int = 0
    usd: float = 0.0
    unknown: int = 0
    unknown_usd: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)


def read_log(path: str | os.PathLike) -> Totals:
    """Add up a spend log; a line that a kill cut short, or that is no entry, is passed over."""
    totals, sent = Totals(), {}
    try:
        file = open(files.open_regular(path, follow_links=False), "rb")
    except OSError:
        return totals
    with file:
        for line in file:
            try:
                entry = files.parse_json(line.decode("utf-8"))
                if "most_usd" in entry:
                    sent[entry["id"]] = _dollars(entry["most_usd"])
                    totals.requests += 1
                    continue
                usd = None if entry["usd"] is None else _dollars(entry["usd"])
                outcome, most = str(entry["outcome"]), sent.pop(entry["id"], 0.0)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            totals.outcomes[outcome] = totals.outcomes.get(outcome, 0) + 1
            if outcome == LOST:
                totals.unknown += 1
                totals.unknown_usd += most
            else:
                totals.replies += outcome == "reply"
                totals.usd += usd or 0.0
    totals.unknown += len(sent)
    totals.unknown_usd += sum(sent.values())
    return totals


def _dollars(value: Any) -> float:
    """0 for None (the price is not known). Raises ValueError or TypeError for what is no amount."""
    dollars = 0.0 if value is None else float(value)
    if not 0 <= dollars < math.inf:  # NaN neither: it would blank every sum
        raise ValueError
    return dollars


class Ledger:
    """Reserves the worst case before each request and books what it cost.

    With `max_usd`, this run's spend never passes it: what is spent, plus the worst case of requests in flight and of
    lost ones, stays below. Raises Stop (exit 3) when the next request does not fit and nothing is in flight.
    """

    def __init__(self, folder: str | os.PathLike | None = None, max_usd: float | None = None):
        self.max_usd = max_usd
        self.spent_usd = 0.0
        self.lost = 0
        self.lost_usd = 0.0
        self._reserved: dict[str, float] = {}
        self._run = secrets.token_hex(4)
        self._count = 0
        self._waiting: list[tuple[str, float | None, asyncio.Future]] = []
        self._file: files.Lines | None = None
        self._unwritten: list[str] = []
        if folder is not None:
            self._file = files.Lines(Path(folder, LOG))

    async def reserve(self, item: str, most_usd: float | None) -> str:
        """Wait until the worst case of a request fits. Returns the id to `settle`."""
        if self.fits(most_usd):
            return self.open(item, most_usd)
        entry = None
        if self._reserved:
            turn = asyncio.get_running_loop().create_future()  # of this loop: --watch and --check run several
            self._waiting.append((item, most_usd, turn))
            entry = await turn
        if entry is None:
            raise self.stop(most_usd)
        return entry

    def fits(self, most_usd: float | None) -> bool:
        return self.max_usd is None or self.committed() + (most_usd or 0.0) <= self.max_usd

    def committed(self) -> float:
        """Dollars spent, plus the worst case of lost requests and of those in flight."""
        return self.spent_usd + self.lost_usd + sum(self._reserved.values())

    def open(self, item: str, most_usd: float | None, entry: str | None = None) -> str:
        """Log a request that leaves now, whether it fits or not. `entry`: its id, if it must outlive this process."""
        self._count += 1
        entry = entry or f"{self._run}-{self._count}"
        self._log(
            {"id": entry, "item": item, "most_usd": most_usd and round(most_usd, 12), "at": round(time.time(), 1)}
        )
        self._reserved[entry] = most_usd or 0.0
        return entry

    def adopt(self, entry: str, most_usd: float) -> None:
        """Reserve for a request that an earlier process has logged."""
        self._reserved[entry] = most_usd

    def settle(self, entry: str, usd: float | None, outcome: str) -> None:
        """Book what a request cost: `reply`, LOST, or the error that it met (which costs nothing)."""
        most = self._reserved.pop(entry, 0.0)
        if outcome == LOST:
            self.lost += 1
            self.lost_usd += most
        else:
            self.spent_usd += usd or 0.0
        # goes out with the next request's line: until then the log overstates what is unknown, never what is spent
        self._unwritten.append(json.dumps({"id": entry, "usd": usd and round(usd, 12), "outcome": outcome}))
        if not self._reserved or len(self._unwritten) > 100:
            with contextlib.suppress(DiskError):  # the reply comes first; the next request meets the full disk
                self._log()
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        """Reserve for each waiting request that fits now; if none does and nothing is in flight, the run ends."""
        waiting, self._waiting = self._waiting, []
        for item, most_usd, turn in waiting:
            if turn.done():  # cancelled
                continue
            if self.fits(most_usd):
                try:
                    turn.set_result(self.open(item, most_usd))
                except DiskError as error:  # theirs, not of the request that is settled here
                    turn.set_exception(error)
            else:
                self._waiting.append((item, most_usd, turn))
        if not self._reserved:
            for _, _, turn in self._waiting:
                turn.set_result(None)
            self._waiting = []

    def stop(self, most_usd: float | None) -> Stop:
        lost = f" and at most ${self.lost_usd:.4f} for {self.lost} lost replies" if self.lost else ""
        return Stop(
            f"--max_usd {self.max_usd:g}: ${self.spent_usd:.4f} spent{lost}, and the next request may cost "
            f"${most_usd or 0.0:.4f}; what is answered is kept, run this again with a budget to go on",
            status=3,
        )

    def close(self) -> None:
        with contextlib.suppress(DiskError):
            self._log()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _log(self, entry: dict | None = None) -> None:
        lines = [*self._unwritten, *([json.dumps(entry)] if entry else [])]
        if self._file is not None and lines:
            self._file.add("\n".join(lines), reserved=entry is None)  # nothing new is sent with the last room
        self._unwritten.clear()
