"""What the Teacher costs: the price table, the spend log, and the stop before a budget is exceeded.

    {questions_dir}/teacher/spend.jsonl   {"id", "item", "most_usd"} before a request is sent,
                                          {"id", "usd", "outcome"} when its outcome is known

A request without a second line was in flight when the client was killed: it may have been charged, at most
`most_usd`. So the log holds every request that the API can have counted. Lines are not flushed one by one: they
survive a kill, not a power cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ares import files
from ares.cli import DiskError, Stop

LOG = "spend.jsonl"
LOST = "lost"  # sent, perhaps charged, cost not known
NOT_SENT = "not_sent"  # the run ended before it was sent

# -- prices ----------------------------------------------------------------------------------------------

# US dollars per million tokens (input, output), live; by the model id's beginning. The one table of prices.
PRICES_DATE = "2026-11"
PRICES = {"claude-haiku-5-5": (0.10, 0.50), "claude-haiku-4-5": (1.00, 5.00)}
BATCH_FACTOR = 0.5  # Message Batches
# input tokens that a prompt cache holds, as multiples of the input price; we ask for no cache, a gateway may
CACHE_READ, CACHE_WRITE_5_MINUTES, CACHE_WRITE_1_HOUR = 0.1, 1.25, 2.0


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens, live."""

    input: float
    output: float

    def usd(self, input_tokens: float, output_tokens: float, batch: bool = False) -> float:
        dollars = (input_tokens * self.input + output_tokens * self.output) / 1e6
        return dollars * BATCH_FACTOR if batch else dollars


def price_of(model: str) -> Price | None:
    """From the table; None if the model is not in it."""
    return next((Price(*price) for beginning, price in PRICES.items() if model.startswith(beginning)), None)


def cost_usd(price: Price | None, usage: Mapping[str, int | None], batch: bool = False) -> float | None:
    """Dollars for one reply; None if the price is not known.

    `usage` has the API's names. `input_tokens` does not include cached tokens; `ephemeral_1h_input_tokens` is the
    part of `cache_creation_input_tokens` that is kept for an hour.
    """
    if price is None:
        return None
    hour = usage.get("ephemeral_1h_input_tokens") or 0
    written = max(usage.get("cache_creation_input_tokens") or 0, hour)
    tokens = usage.get("input_tokens") or 0
    tokens += CACHE_READ * (usage.get("cache_read_input_tokens") or 0)
    tokens += CACHE_WRITE_5_MINUTES * (written - hour) + CACHE_WRITE_1_HOUR * hour
    return price.usd(tokens, usage.get("output_tokens") or 0, batch)


# -- the spend log ---------------------------------------------------------------------------------------


@dataclass
class Totals:
    """Sums over a spend log. `unknown_usd`: the most that requests of unknown cost can have cost."""

    requests: int = 0
    replies: int = 0
    usd: float = 0.0
    unknown: int = 0
    unknown_usd: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)


def read_log(path: str | os.PathLike) -> Totals:
    """Add up a spend log. Skips lines that a kill cut short and lines that are no entry."""
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
    """Reserves the worst-case cost before each request and books the real cost after it.

    With `max_usd`, this run's spend never exceeds it: the dollars spent, plus the worst case of requests in flight
    and of lost ones, stay below. Raises Stop (exit 3) when the next request does not fit and none is in flight.
    """

    def __init__(self, folder: str | os.PathLike | None = None, max_usd: float | None = None):
        self.max_usd = max_usd
        self.spent_usd = 0.0
        self.lost, self.lost_usd = 0, 0.0  # requests, the most that they can have cost
        self._reserved: dict[str, float] = {}
        self._run = secrets.token_hex(4)
        self._count = 0
        self._waiting: list[tuple[str, float | None, asyncio.Future]] = []
        self._unwritten: list[str] = []
        self._file = files.Lines(Path(folder, LOG)) if folder is not None else None

    async def reserve(self, item: str, most_usd: float | None) -> str:
        """Wait until the worst case of a request fits. Returns the id to `settle`."""
        if self.fits(most_usd):
            return self.open(item, most_usd)
        if self._reserved:
            turn = asyncio.get_running_loop().create_future()  # --watch and --check run several event loops
            self._waiting.append((item, most_usd, turn))
            if entry := await turn:
                return entry
        raise self.stop(most_usd)

    def fits(self, most_usd: float | None) -> bool:
        """Whether a request fits beside what is spent, and the worst case of requests that are lost or in flight."""
        committed = self.spent_usd + self.lost_usd + sum(self._reserved.values())
        return self.max_usd is None or committed + (most_usd or 0.0) <= self.max_usd

    def open(self, item: str, most_usd: float | None, entry: str | None = None) -> str:
        """Log a request that is sent now, whether it fits or not. `entry`: its id, if it must outlive this process."""
        self._count += 1
        entry = entry or f"{self._run}-{self._count}"
        most = most_usd and round(most_usd, 12)
        self._log({"id": entry, "item": item, "most_usd": most, "at": round(time.time(), 1)})
        self._reserved[entry] = most_usd or 0.0
        return entry

    def adopt(self, entry: str, most_usd: float) -> None:
        """Reserve for a request that an earlier process has logged."""
        self._reserved[entry] = most_usd

    def settle(self, entry: str, usd: float | None, outcome: str) -> None:
        """Book the cost of a request. `outcome`: `reply`, LOST, or the error it met (errors cost nothing)."""
        most = self._reserved.pop(entry, 0.0)
        if outcome == LOST:
            self.lost += 1
            self.lost_usd += most
        else:
            self.spent_usd += usd or 0.0
        # written with the next request's line: until then the log overstates unknown costs, never the spend
        self._unwritten.append(json.dumps({"id": entry, "usd": usd and round(usd, 12), "outcome": outcome}))
        if not self._reserved or len(self._unwritten) > 100:
            with contextlib.suppress(DiskError):  # saving the reply matters more; the next request raises it
                self._log()
        # reserve for each waiting request that fits now; if none does and nothing is in flight, the run ends
        waiting, self._waiting = self._waiting, []
        for item, most_usd, turn in waiting:
            if turn.done():  # cancelled
                continue
            if self.fits(most_usd):
                try:
                    turn.set_result(self.open(item, most_usd))
                except DiskError as error:  # of the waiting request, not of the one settled here
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
            f"${most_usd or 0.0:.4f}; replies so far are kept; run this again with a larger budget to go on",
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
            self._file.add("\n".join(lines), reserved=entry is None)  # no new request once the reserve is used
        self._unwritten.clear()
