"""How fast a Teacher's requests are sent: how many are in flight, and when the next one may go (`Pace`), by what the
server says (`delay`, `limits_left`).

The number in flight follows additive increase, multiplicative decrease (Chiu and Jain 1989), as TCP does. It starts
with a few, so that a fault of the whole run costs only a few requests, and each reply adds one. The first rate limit
or overload ends this start and halves the number, once for all requests in flight; from then on a reply adds 1/limit,
about one per round. `retry-after` delays all requests: the limit belongs to the key.

Servers that say what is left of a rate limit are followed before they refuse (`Pace.follow`). With r requests left and
t seconds until the limit is restored, the next request waits t / (r + 1): what is left of a fixed window is spread
evenly over it, and a bucket that is refilled all the time (Anthropic, OpenAI) settles half full at its own rate.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from teacher.interface import Stopped

# texts that servers also send when they fail for a while; a web page comes from a proxy
GENERAL = re.compile(
    r"<.*|(an? )?((internal|unexpected|unknown) ?)?(server ?)?error\b.{0,12}|overloaded.{0,12}|api_error|", re.I | re.S
)

# in the body of a 429: "Please retry in 31.7s", "try again in 1m2s", "retry after 20 seconds"; Gemini's RetryInfo
DELAY = re.compile(
    r"(?:\b(?:re)?try (?:again )?(?:in|after) |retryDelay\W{1,19})((?:\d+(?:\.\d+)? ?[hms][a-z]* ?)+)", re.I
)
# times as many requests as are in flight: while more are left of a rate limit, nothing is slowed down
MANY = 4
LONGEST_GAP = 10.0  # seconds between requests: a bucket that says when it is full has room long before
KINDS = ("requests", "tokens", "input-tokens", "output-tokens")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def limits_left(headers: Mapping[str, str]) -> Iterator[tuple[str, float, float]]:
    """(kind, how many are left, seconds until all are there again) of each rate limit in a reply's headers:
    `anthropic-ratelimit-{kind}-remaining` and `-reset`, `x-ratelimit-remaining-{kind}` and `x-ratelimit-reset-{kind}`,
    with `llm_provider-` before them as litellm passes them on.
    """
    for kind, prefix in itertools.product(KINDS, ("", "llm_provider-")):
        for name in (f"{prefix}anthropic-ratelimit-{kind}-{{}}", f"{prefix}x-ratelimit-{{}}-{kind}"):
            with contextlib.suppress(ValueError):
                left = float(headers.get(name.format("remaining"), ""))
                if not math.isnan(left):
                    yield kind, max(0.0, left), seconds_until(headers.get(name.format("reset"), ""))


def seconds_until(reset: str) -> float:
    """Seconds until the time in a header: "1m30.5s", "120ms", "30", a Unix time or one of RFC 3339; else 0."""
    parts = re.findall(r"([0-9.]+)(ms|[hms])", reset)
    try:
        if parts and "".join(map("".join, parts)) == reset:
            seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
        elif re.fullmatch(r"[0-9.]+", reset):
            seconds = float(reset)
        else:
            seconds = datetime.datetime.fromisoformat(reset).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, seconds - time.time() if seconds > 1e9 else seconds)


def delay(headers: Mapping[str, str], text: str = "") -> float | None:
    """Seconds to wait as the server asks: by its headers, else by what `text` says, the body of a 429."""
    after, found = retry_after(headers), DELAY.search(text)
    if after is not None or not found:
        return after
    words = found[1].lower().replace("milli", "ms")
    return seconds_until(re.sub(r"(ms|[hms])[a-z]*| ", r"\1", words))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait as the API asks: `retry-after-ms`, or `retry-after` as a number or a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        return seconds if 0 <= seconds < float("inf") else None
    try:
        when = email.utils.parsedate_tz(headers.get("retry-after", ""))
        return max(0.0, email.utils.mktime_tz(when) - time.time()) if when else None
    except (ValueError, OverflowError):  # a date that no calendar has
        return None


class Pace:
    """Admits at most `limit` HTTP requests; `limit` moves between 1 and `most`, from `start` on. For one event loop.

    Until a sort of requests (`sort_of`) has its first reply, only `start` of them are tried, retries included: a
    server that can answer none of a sort is found by a few requests.
    """

    def __init__(self, most: int, start: int | None = None):
        self.most = most
        self.limit = float(min(most, start or most))
        self.start = start or most
        self._starting = self.limit < most
        self.in_flight: Counter[int] = Counter()  # by sort
        self.replies: Counter[int] = Counter()  # by sort
        self.stopping = False
        self._stopped = asyncio.Event()
        self._changed = asyncio.Event()  # replaced at each change
        self._tried: Counter[int] = Counter()  # requests between `begin` and `end`, by sort
        self._last_cut = float("-inf")  # when `limit` was halved
        self._resume_at = 0.0
        self._tokens = 0  # of all replies
        self._gap, self._gap_ends = 0.0, 0.0  # seconds between requests, until this monotonic time
        self._sent_at = float("-inf")
        self._most_left = math.inf  # requests that the last reply's headers leave us
        # (reason, text, sort) of an error -> request -> times that it met the error; replies to all when it came first
        self._seen: dict[tuple[str, str, int], tuple[Counter[str], int]] = {}

    @property
    def successes(self) -> int:
        return self.replies.total()

    async def begin(self, sort: int) -> None:
        """Wait until a request of the sort may be tried. Raises Stopped after `stop`; else needs an `end`."""
        await self._until(lambda: self.replies[sort] or self._tried[sort] < self.start)
        self._tried[sort] += 1

    def end(self, sort: int) -> None:
        self._tried[sort] -= 1
        self._wake()

    async def enter(self, sort: int = 0) -> None:
        """Wait until an HTTP request may be sent. Raises Stopped after `stop`; else needs a `leave`."""
        while True:
            await self._until(lambda: self.in_flight.total() < max(1, int(min(self.limit, self._most_left))))
            now = time.monotonic()
            pause = max(self._resume_at, min(self._sent_at + self._gap, self._gap_ends)) - now
            if pause <= 0:
                break
            await self.sleep(pause)
        self._sent_at = now
        self.in_flight[sort] += 1

    def leave(self, sort: int = 0) -> None:
        self.in_flight[sort] -= 1
        self._wake()

    def succeeded(self, sort: int = 0, tokens: int = 0) -> None:
        """A reply of so many tokens, in and out, came: a little more may be in flight."""
        self.replies[sort] += 1
        self._tokens += tokens
        self.limit = min(self.most, self.limit + (1.0 if self._starting else 1 / self.limit))
        self._seen = {key: seen for key, seen in self._seen.items() if key[2] != sort}
        self._wake()

    def overloaded(self, began: float) -> None:
        """A request that began at `began` (monotonic) met a limit: halve, unless that was done since it began."""
        self._starting = False
        if began > self._last_cut:
            self.limit = max(1.0, self.limit / 2)
            self._last_cut = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Send no request before `seconds` have passed."""
        self._resume_at = max(self._resume_at, time.monotonic() + seconds)

    def follow(self, headers: Mapping[str, str]) -> None:
        """Slow down by what a reply's headers say is left of the server's rate limits."""
        limits = list(limits_left(headers))
        if not limits:
            return
        each = self._tokens / self.successes if self._tokens else 0.0  # tokens of a request
        self._gap, self._most_left = 0.0, math.inf
        for kind, left, reset in limits:
            requests = left if kind == "requests" else left / each if each else math.inf
            self._most_left = min(self._most_left, requests)
            gap = min(LONGEST_GAP, reset / (requests + 1))
            if requests < MANY * self.limit and gap > self._gap:
                self._gap, self._gap_ends = gap, time.monotonic() + reset
        self._wake()

    async def sleep(self, seconds: float) -> None:
        """Raises Stopped as soon as the run ends."""
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return
        raise Stopped

    def stop(self) -> None:
        self.stopping = True
        self._stopped.set()
        self._wake()

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not self.stopping and not ready():
            await self._changed.wait()
        if self.stopping:
            raise Stopped

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def is_permanent(self, error: tuple[str, str], sort: int, request: str, requests: int = 3, tries: int = 3) -> bool:
        """Note an error, (reason, text); whether retrying cannot mend it: `requests` requests of the sort have met it
        `tries` times each, and none has got a reply meanwhile.

        A text that servers also send when they fail for a while (`GENERAL`) must come two times more, and other sorts
        must have got replies: meanwhile, or at all if this sort never got one.
        """
        reason, text = error
        text = re.sub(r"\w*\d\w*", "#", text)  # ids of requests, times
        seen, replies = self._seen.setdefault((reason, text, sort), (Counter(), self.successes))
        seen[request] += 1
        if GENERAL.fullmatch(text.strip()):
            if self.successes == (replies if self.replies[sort] else 0):
                return False
            tries += 2
        return sum(count >= tries for count in seen.values()) >= requests
