"""How many requests are in flight: additive increase, multiplicative decrease (Chiu and Jain 1989), as TCP does.

It starts with a few, so that a fault of the whole run costs only a few requests, and each reply adds one more. The
first rate limit or overload ends this start and halves the number, once for all requests in flight; from then on a
reply adds 1/limit, about one more per round. `retry-after` holds back all requests: the limit belongs to the key.

`Trials` finds errors that retrying does not mend.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from dataclasses import dataclass, field

from teacher.interface import Stopped

START = 4  # requests in flight before the first reply


class Pace:
    """Admits at most `limit` requests; `limit` moves between 1 and `most`, from `start` on. For one event loop."""

    def __init__(self, most: int, start: int | None = None):
        self.most = most
        self.limit = float(min(most, start or most))
        self._starting = self.limit < most
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
        """A reply came: a little more may be in flight."""
        self.successes += 1
        self.limit = min(self.most, self.limit + (1.0 if self._starting else 1 / self.limit))
        if self._starting:
            self._wake(1)

    def overloaded(self, began: float) -> None:
        """A request that began at `began` (monotonic) met a limit: halve, unless that was done since it began."""
        self._starting = False
        if began > self._last_cut:
            self.limit = max(1.0, self.limit / 2)
            self._last_cut = time.monotonic()

    def pause(self, seconds: float) -> None:
        """No request is sent before `seconds` have passed."""
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


# what servers also say when they fail for a while; a web page comes from a proxy
_GENERAL = re.compile(
    r"<.*|(an? )?((internal|unexpected|unknown) ?)?(server ?)?error\b.{0,12}|overloaded.{0,12}|api_error|", re.I | re.S
)


@dataclass
class _Seen:
    tries: Counter[str] = field(default_factory=Counter)  # request -> times that it met the error
    replies: int = 0  # to all requests, when the error came first


class Trials:
    """What is known of each sort of request (with images, without): whether any got a reply, which errors they meet.

    Until a sort has its first reply, only `start` of its requests are tried, retries included. So a server that can
    answer none of a sort, one without image support for example, is found by a few requests.
    """

    REQUESTS, TRIES = 3, 3

    def __init__(self, start: int) -> None:
        self.start = start
        self.replies: Counter[int] = Counter()  # by sort
        self._begun: Counter[int] = Counter()
        self._waiting: list[tuple[int, asyncio.Future]] = []
        self._stopping = False
        self._seen: dict[tuple, _Seen] = {}

    async def begin(self, sort: int) -> None:
        """Wait until a request of the sort may be tried. Raises Stopped after `stop`; else needs an `end`."""
        while not self._stopping and not self.replies[sort] and self._begun[sort] >= self.start:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((sort, turn))
            await turn
        if self._stopping:
            raise Stopped
        self._begun[sort] += 1

    def end(self, sort: int) -> None:
        self._begun[sort] -= 1
        self._wake(sort, 1)

    def replied(self, sort: int) -> None:
        """A request of the sort got a reply."""
        self.replies[sort] += 1
        if self._seen:
            self._seen = {key: seen for key, seen in self._seen.items() if key[2] != sort}
        self._wake(sort, len(self._waiting))

    def stop(self) -> None:
        self._stopping = True
        for sort in {sort for sort, _ in self._waiting}:
            self._wake(sort, len(self._waiting))

    def _wake(self, sort: int, count: int) -> None:
        for each in [each for each in self._waiting if each[0] == sort][:count]:
            self._waiting.remove(each)
            if not each[1].done():
                each[1].set_result(None)

    def lasts(
        self, error: tuple[str, str], sort: int, request: str, requests: int = REQUESTS, tries: int = TRIES
    ) -> bool:
        """Note an error, (reason, text); whether retrying cannot mend it: `requests` requests of the sort have met it
        `tries` times each, and none has got a reply meanwhile.

        A text that servers also send when they fail for a while (`_GENERAL`) must come two times more, and other sorts
        must have got replies: meanwhile, or at all if this sort never got one.
        """
        reason, text = error
        text = re.sub(r"\w*\d\w*", "#", text)  # ids of requests, times
        replies = self.replies.total()
        seen = self._seen.setdefault((reason, text, sort), _Seen(replies=replies))
        seen.tries[request] += 1
        if _GENERAL.fullmatch(text.strip()):
            if replies == (seen.replies if self.replies[sort] else 0):
                return False
            tries += 2
        return sum(count >= tries for count in seen.tries.values()) >= requests
