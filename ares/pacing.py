"""How many requests are on their way: additive increase, multiplicative decrease (Chiu and Jain 1989), as TCP does.

A rate limit or an overload halves the number, once for all requests that were under way when it came; every reply
adds 1/limit, so about one more per round. `retry-after` holds back everybody: the limit belongs to the key.
"""

from __future__ import annotations

import asyncio
import time

from ares.asking import Stopped


class Pace:
    """Admits at most `limit` requests; `limit` moves between 1 and `most`. For one event loop."""

    def __init__(self, most: int):
        self.most = most
        self.limit = float(most)
        self.in_flight = 0
        self.successes = 0
        self._last_cut = float("-inf")
        self._resume_at = 0.0
        self._stopping = asyncio.Event()
        self._waiting: list[asyncio.Future] = []

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    async def enter(self) -> None:
        """Wait for a turn. Raises Stopped after `stop`; every other return needs a `leave`."""
        while True:
            if self.stopping:
                raise Stopped
            pause = self._resume_at - time.monotonic()
            if pause > 0:
                await self.sleep(pause)
            elif self.in_flight < max(1, int(self.limit)):
                self.in_flight += 1
                return
            else:
                turn = asyncio.get_running_loop().create_future()
                self._waiting.append(turn)
                await turn

    def leave(self) -> None:
        self.in_flight -= 1
        self._wake(max(1, int(self.limit) - self.in_flight))

    def succeeded(self) -> None:
        """A reply came: a little more may be under way."""
        self.successes += 1
        self.limit = min(self.most, self.limit + 1 / self.limit)

    def overloaded(self, began: float) -> None:
        """A request that began at `began` (monotonic) met a limit: halve, unless that was done since it began."""
        if began > self._last_cut:
            self.limit = max(1.0, self.limit / 2)
            self._last_cut = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Nobody goes before `seconds` have passed."""
        self._resume_at = max(self._resume_at, time.monotonic() + seconds)

    async def sleep(self, seconds: float) -> None:
        """Raises Stopped as soon as the run ends."""
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return
        raise Stopped

    def stop(self) -> None:
        self._stopping.set()
        self._wake(len(self._waiting))

    def _wake(self, count: int) -> None:
        while count > 0 and self._waiting:
            turn = self._waiting.pop(0)
            if not turn.done():
                turn.set_result(None)
                count -= 1
