"""Rate limits that servers tell in their headers: the client slows down before it is refused."""

from __future__ import annotations

import asyncio
import datetime
import time

import pytest

from teacher import pace
from tests.api_server import Fault
from tests.teacher.teacher_tools import World


class Window:
    """A fixed window of `count` requests in `seconds`, which the server's headers tell; 429 beyond."""

    def __init__(self, server, count, seconds, style):
        self.count, self.seconds, self.style, self.ends, self.left = count, seconds, style, 0.0, count
        self.lock = server.lock
        server.plan, server.headers = self.plan, self.headers

    def plan(self, asked):  # called with the server's lock held
        if time.monotonic() > self.ends:
            self.ends, self.left = time.monotonic() + self.seconds, self.count
        self.left -= 1
        return Fault(429, headers=self.headers()) if self.left < 0 else None

    def headers(self):
        reset = max(0.0, self.ends - time.monotonic())
        if self.style == "openai":
            return {"x-ratelimit-remaining-requests": str(max(0, self.left)),
                    "x-ratelimit-reset-requests": f"{reset * 1000:.0f}ms"}  # fmt: skip
        at = datetime.datetime.fromtimestamp(time.time() + reset, datetime.UTC).isoformat()
        return {"anthropic-ratelimit-requests-remaining": str(max(0, self.left)),
                "anthropic-ratelimit-requests-reset": at}  # fmt: skip


@pytest.mark.parametrize("style", ["openai", "anthropic"])
def test_the_client_slows_down_before_it_is_refused(server, local, style):
    world = local if style == "openai" else World(server, local.root)
    server.models["claude-haiku-5-5"] = {}
    server.latency = 0.01
    window = Window(server, 10, 2.0, style)
    world.ask("--concurrency", "12")
    names = [name for _, name in server.log]
    assert world.answered == 12 and len(names) <= 13, f"{names}, {window.left} left"


def test_an_api_far_from_its_limit_is_not_slowed_down(server, local):
    told = {"remaining-requests": "50", "reset-requests": "90s", "remaining-tokens": "99999", "reset-tokens": "90s"}
    server.headers = lambda: {f"x-ratelimit-{name}": value for name, value in told.items()}
    began = time.monotonic()
    local.ask("--concurrency", "12")
    assert local.answered == 12 and time.monotonic() - began < 12, "50 are left for 12 at a time; else 20 s"


def test_gaps_and_what_is_left():
    def gap(headers, tokens=0, limit=16):
        each = pace.Pace(limit)
        each.succeeded(0, tokens)
        each.follow(headers)
        return round(each._gap, 2), each._most_left

    requests = "anthropic-ratelimit-requests-"
    assert gap({f"{requests}remaining": "9", f"{requests}reset": "5s"}) == (0.5, 9)
    assert gap({f"{requests}remaining": "900", f"{requests}reset": "5s"}) == (0.0, 900)
    assert gap({f"{requests}remaining": "0", f"{requests}reset": "6h"}) == (pace.LONGEST_GAP, 0)
    assert gap({f"{requests}remaining": "3"}) == (0.0, 3), "without a time only the number in flight follows"
    tokens = {"x-ratelimit-remaining-tokens": "9000", "x-ratelimit-reset-tokens": "5s"}
    assert gap(tokens, 1000) == (0.5, 9) and gap(tokens) == (0.0, pace.math.inf)
    for odd in ({}, {f"{requests}remaining": "many"}, {f"{requests}remaining": "nan", f"{requests}reset": "1s"}):
        assert gap(odd) == (0.0, pace.math.inf)


@pytest.mark.parametrize(
    "text, seconds", [("120ms", 0.12), ("6m0s", 360), ("1h2m3.5s", 3723.5), ("30", 30), ("0", 0), ("", 0), ("soon", 0),
                      ("1.2.3s", 0), ("-5", 0), ("2020-01-01T00:00:00Z", 0), ("nan", 0), ("inf", 0), ("1e99", 0)],
)  # fmt: skip
def test_times_of_resets(text, seconds):
    assert pace.seconds_until(text) == pytest.approx(seconds)
    later = time.time() + 60
    assert 55 < pace.seconds_until(f"{later:.0f}") < 61
    assert 55 < pace.seconds_until(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(later))) < 61


def test_requests_are_spread_and_the_end_of_the_window_ends_it():
    async def scenario():
        each = pace.Pace(8)
        each.succeeded()
        each.follow({"x-ratelimit-remaining-requests": "4", "x-ratelimit-reset-requests": "0.5s"})
        began, times = time.monotonic(), []
        for _ in range(100):
            await each.enter()
            times.append(time.monotonic() - began)
            each.leave()
        return times

    times = asyncio.run(scenario())
    assert times[3] > 0.25 and times[-1] < 8, f"{times}: 0.1 s between requests until the window ends"
