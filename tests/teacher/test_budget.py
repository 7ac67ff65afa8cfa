"""Money and pace: the budget holds, its ledger, the spend log, and how many requests run at a time."""

from __future__ import annotations

import asyncio
import json
import signal
import time

import pytest

import haiku
from ares import cli
from teacher import api_teacher, budget, claude, openai_compatible, pace
from teacher.budget import Ledger, Price, read_log
from teacher.interface import SCORE, Reply, Request, Stopped
from tests.api_server import KEY, Fault
from tests.teacher.teacher_tools import World, lay_out, lines_of, many_items, paid_usd, stops, wait_until


@pytest.fixture
def questions(tmp_path, problems):
    many_items(tmp_path / "questions", 24, problems)
    return tmp_path / "questions"


@pytest.mark.parametrize(
    "more, key, status, words",
    [
        ((), "", 2, "ANTHROPIC_API_KEY is not set.*--teacher reference"),
        (("--teacher_model", "claude-3-haiku-20240307"), KEY, 2,
         "--teacher_model.*claude-3-haiku-20240307.*retired in April 2026.*claude-haiku-5-5"),
        (("--teacher_model", "claude-nope"), KEY, 2, "--teacher_model.*claude-nope.*not known.*claude-haiku-5-5"),
        (("--max_usd", "0.001"), KEY, 3, "--max_usd 0.001.*run this again"),
        ((), "sk-ant-wrong", 2, "does not accept this key"),
    ],
    ids=["no key", "retired model", "unknown model", "budget", "bad key"],
)  # fmt: skip
def test_runs_that_stop_say_why_and_lose_nothing(server, world, monkeypatch, more, key, status, words):
    monkeypatch.setenv("ANTHROPIC_API_KEY", key)
    world.stops(words, *more, status=status)
    kept = world.scores
    assert bool(kept) == (status == 3) and len(kept) < 24 and paid_usd(server) <= 0.001
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    before = len(server.asked)
    world.ask()
    assert world.answered == 24 and kept.items() <= world.scores.items()
    assert len(server.asked) == before + 24 - len(kept), "what was paid for is not asked again"


@pytest.mark.parametrize("lost", [False, True])
def test_a_budget_is_never_passed_and_nearly_used(server, world, lost):
    """The server has done the work of lost replies, and the client has counted it."""
    server.plan = lambda asked: Fault(0, kind="reset") if lost else None
    with pytest.raises(cli.UserError):
        world.ask("--max_usd", "0.0008", "--concurrency", "4" if lost else "16")
    paid, totals = paid_usd(server), world.totals
    assert (0 if lost else 0.0004) < paid <= 0.0008
    assert totals.usd + totals.unknown_usd >= paid * 0.999 and (lost or totals.usd == pytest.approx(paid))


# -- the ledger ----------------------------------------------------------------------------------------------


def test_the_ledger_waits_for_requests_in_flight_and_logs_what_a_kill_left_open(tmp_path):
    async def scenario():
        ledger = Ledger(tmp_path, max_usd=1.0)
        first = await ledger.reserve("a", 0.7)
        second = asyncio.ensure_future(ledger.reserve("b", 0.7))
        await asyncio.sleep(0.01)
        assert not second.done()
        ledger.settle(first, 0.1, "reply")
        ledger.settle(await second, 0.5, "reply")
        with pytest.raises(cli.Stop) as stop:
            await ledger.reserve("c", 0.7)
        assert stop.value.status == 3
        await ledger.reserve("d", 0.3)  # and then the process dies
        ledger.close()

    asyncio.run(scenario())
    with open(tmp_path / budget.LOG, "a") as file:
        file.write('{"id": "cut')
    Ledger(tmp_path).close()
    totals = read_log(tmp_path / budget.LOG)
    assert (totals.requests, totals.replies, totals.unknown) == (3, 2, 1)
    assert totals.usd == pytest.approx(0.6) and totals.unknown_usd == pytest.approx(0.3)
    assert (tmp_path / budget.LOG).read_bytes().endswith(b'{"id": "cut\n')


def test_requests_that_fit_go_before_the_budget_stops_the_run():
    """A dear request waits for money and a cheap one behind it: the dear one must not end the run before that."""

    async def scenario():
        ledger = Ledger(None, max_usd=1.0)
        first = await ledger.reserve("first", 0.9)
        dear = asyncio.ensure_future(ledger.reserve("dear", 0.8))
        cheap = asyncio.ensure_future(ledger.reserve("cheap", 0.3))
        await asyncio.sleep(0)
        ledger.settle(first, 0.5, "reply")
        entry = await asyncio.wait_for(cheap, 5)
        assert not dear.done()
        ledger.settle(entry, 0.1, "reply")
        with pytest.raises(cli.Stop):
            await asyncio.wait_for(dear, 5)

    asyncio.run(scenario())


def test_a_budget_serves_one_run_after_another():
    """--watch and --check ask in several event loops with one budget: each may have to wait for money."""
    ledger = Ledger(None, max_usd=1.0)

    async def two():
        first = await ledger.reserve("first", 0.8)
        waiting = asyncio.ensure_future(ledger.reserve("second", 0.8))
        await asyncio.sleep(0)
        assert not waiting.done()
        ledger.settle(first, 0.0, "reply")
        ledger.settle(await asyncio.wait_for(waiting, 5), 0.0, "reply")

    asyncio.run(two())
    asyncio.run(two())


def test_after_the_end_nothing_is_sent_that_waited_for_money(server):
    """Ctrl-C while requests wait for the budget: replies in flight are saved, those that waited are not sent."""
    server.latency = 0.3

    async def scenario():
        teacher = claude.ClaudeTeacher(base_url=server.url, concurrency=4)
        request = Request("id-1", SCORE, "1", 'Score:\n{\n"It is so.": xxx\n}', ("It is so.",))
        teacher.ledger = Ledger(None, max_usd=1.5 * teacher.most_usd(request))
        async with teacher:
            all_of_them = [asyncio.ensure_future(teacher.answer(request)) for _ in range(4)]
            while not server.in_flight:
                await asyncio.sleep(0.01)
            teacher.stop()
            return await asyncio.wait_for(asyncio.gather(*all_of_them, return_exceptions=True), 10)

    ends = asyncio.run(scenario())
    assert isinstance(ends[0], Reply) and all(isinstance(end, Stopped) for end in ends[1:])
    assert len(server.log) == 1


def test_a_spend_log_with_odd_lines_is_added_up(tmp_path):
    good = [{"id": "a", "item": "x", "most_usd": 1.0}, {"id": "a", "usd": 0.5, "outcome": "reply"}]
    odd = ["null", "[]", "7", "\x00", "[" * 100_000, '{"most_usd": 1}', '{"id": [], "most_usd": 1}',
           '{"id": "b", "most_usd": NaN}', '{"id": "b", "most_usd": "dear"}', '{"id": "a", "outcome": "reply"}',
           '{"id": "a", "usd": -Infinity, "outcome": "x"}', '{"id": "c", "usd": [], "outcome": "reply"}']  # fmt: skip
    (tmp_path / budget.LOG).write_text("\n".join([json.dumps(good[0]), *odd, json.dumps(good[1]), *odd]))
    totals = read_log(tmp_path / budget.LOG)
    assert (totals.requests, totals.replies, totals.usd, totals.unknown) == (1, 1, 0.5, 0)


# -- prices --------------------------------------------------------------------------------------------------


def test_prices(server, world):
    haiku_45 = budget.price_of("claude-haiku-4-5-20251001")
    assert budget.price_of("claude-haiku-5-5") == Price(0.10, 0.50)
    assert budget.cost_usd(haiku_45, {"input_tokens": 10**6, "output_tokens": 10**6}) == 6.0
    assert budget.cost_usd(budget.price_of("claude-haiku-4-5"), {"input_tokens": 10**6}, batch=True) == 0.5
    assert budget.cost_usd(budget.price_of("my-gateway-model"), {"input_tokens": 5}) is None
    world.ask("--structured", "off", "--price", "1", "2")  # a gateway
    assert all(not asked.structured and not asked.notes for asked in server.asked) and world.answered == 24
    paid = (server.billed["input_tokens"] * 1 + server.billed["output_tokens"] * 2) / 1e6
    assert world.totals.usd == pytest.approx(paid)


READ, WRITTEN, LIFETIMES = "cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation"
MILLION, HOUR = 10**6, "ephemeral_1h_input_tokens"


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    "usage, factor",  # usage as the API sends it, multiple of the price of a million input tokens
    [
        ({READ: MILLION}, 0.1),
        ({WRITTEN: MILLION}, 1.25),
        ({WRITTEN: MILLION, LIFETIMES: {"ephemeral_5m_input_tokens": MILLION}}, 1.25),
        ({WRITTEN: MILLION, LIFETIMES: {HOUR: MILLION}}, 2.0),
        ({WRITTEN: MILLION, LIFETIMES: {HOUR: MILLION // 2}}, 1.625),
        ({WRITTEN: None, LIFETIMES: None, READ: None}, 0.0),
        ({READ: MILLION, WRITTEN: MILLION}, 1.35),
    ],
)
def test_cached_tokens_are_priced(server, tmp_path, problems, usage, factor, batch):
    many_items(tmp_path / "questions", 1, problems)
    server.usage_extra = usage
    world = World(server, tmp_path / "questions", *(["--batch", "--poll_seconds", "0.05"] if batch else []))
    world.ask("--no-cache")
    cached = factor * 0.10 / (2 if batch else 1)
    assert world.totals.usd == pytest.approx(paid_usd(server, batch) + cached)


def test_the_bound_holds_where_a_gateway_writes_to_a_cache(server, world, problems, sample, monkeypatch):
    """Each input token written for an hour, at twice the price; the budget holds, and `most_usd` is never passed."""
    lay_out(world.root, 0, "952", ["Look at it."], problems, sample)
    message = server.message

    def written(asked, text, stop_reason):
        made = message(asked, text, stop_reason)
        tokens = made["usage"]["input_tokens"] + 4600 * len(asked.images)
        lifetimes = {HOUR: tokens, "ephemeral_5m_input_tokens": 0}
        made["usage"] |= {"input_tokens": 0, WRITTEN: tokens, LIFETIMES: lifetimes}
        return made

    monkeypatch.setattr(server, "message", written)
    world.ask()
    entries = {}
    for line in lines_of(world.root / "teacher/spend.jsonl"):
        entries.setdefault(line["id"], {}).update(line)
    assert len(entries) == 25 and all(0 < entry["usd"] <= entry["most_usd"] for entry in entries.values())


SYSTEM = "Score every sentence of the rationale alone. " * 500
LONG = {"max_tokens": 10, "max_completion_tokens": 90_000}


@pytest.mark.parametrize("structured", ["on", "off"])
@pytest.mark.parametrize(
    "body, tokens_in, tokens_out",
    [({"system": SYSTEM}, len(SYSTEM), 0), ({"metadata": {"user_id": "\u00e9" * 9000}}, 18_000, 0), (LONG, 0, 90_000),
     (dict(reversed(LONG.items())), 0, 90_000), ({"max_tokens": 90_000, "max_completion_tokens": None}, 0, 90_000)],
)  # fmt: skip
def test_the_worst_case_holds_whatever_body_adds(body, tokens_in, tokens_out, structured):
    request = Request("id-1", SCORE, "1", "Score it.", ("It is so.",))
    price = Price(1.0, 1.0)
    for make in (claude.ClaudeTeacher, openai_compatible.OpenAITeacher):
        teacher = make("claude-haiku-4-5", extra=body, structured=structured, price=price)
        assert teacher.most_usd(request) * 1e6 >= tokens_in + tokens_out
        sent = teacher.parameters(request)
        lengths = [sent[name] for name in LONG if name in sent]
        assert teacher.max_tokens(request) >= max(lengths)


def test_a_long_system_text_stops_at_the_budget(server, world):
    """The server counts it, too."""
    message = server.message

    def counted(asked, text, stop_reason):
        made = message(asked, text, stop_reason)
        made["usage"]["input_tokens"] += len(asked.body["system"])
        return made

    server.message = counted
    body = ("--structured", "off", "--body", json.dumps({"system": SYSTEM}))
    world.stops("--max_usd", "--max_usd", "0.02", *body, status=3)
    assert 0 < world.answered < 24 and paid_usd(server) <= 0.02


ONE, OTHER = "max_tokens", "max_completion_tokens"


@pytest.mark.parametrize(
    "address, body, words",
    [
        (None, {ONE: None}, None),
        (None, {OTHER: None}, "--body removes max_completion_tokens"),
        (None, {OTHER: None, ONE: 500}, None),
        (None, {ONE: None, OTHER: None}, "--body removes max_completion_tokens"),
        (None, {OTHER: "90000"}, "max_completion_tokens must be a whole number"),
        (None, {ONE: 9e4}, "max_tokens must be a whole number"),
        (None, {ONE: 5, OTHER: True}, "max_completion_tokens must be a whole number"),
        ("https://example.com", {ONE: None}, "--body removes max_tokens"),
        ("https://example.com", {OTHER: None}, None),
        ("https://example.com", {OTHER: "90000"}, "max_completion_tokens must be a whole number"),
        ("https://example.com", {ONE: None, OTHER: 300}, None),
    ],
)
def test_a_budget_needs_the_length_of_replies(monkeypatch, address, body, words):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-1234567890abcdef")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    argv = ["--teacher", "openai", "--teacher_model", "m", "--price", "1", "1", "--max_usd", "1"]
    argv += ["--body", json.dumps(body), *(["--base_url", address] if address else [])]
    if words is None:
        haiku.parse_args(argv)
    else:
        stops(lambda: haiku.parse_args(argv), f"--max_usd: .*{words}")


# -- pace -----------------------------------------------------------------------------------------------------


def test_pace_halves_once_per_burst_and_recovers():
    async def scenario():
        pace = api_teacher.Pace(16)
        began = time.monotonic()
        await asyncio.gather(*(pace.enter() for _ in range(16)))
        for _ in range(16):
            pace.overloaded(began)
            pace.leave()
        assert pace.limit == 8
        await asyncio.gather(*(pace.enter() for _ in range(8)))
        late = asyncio.ensure_future(pace.enter())
        await asyncio.sleep(0.01)
        assert not late.done() and pace.in_flight.total() == 8
        pace.leave()
        await asyncio.wait_for(late, 1)
        for _ in range(400):
            pace.succeeded()
        assert pace.limit == 16
        waiting = asyncio.ensure_future(pace.sleep(60))
        await asyncio.sleep(0)
        pace.stop()
        for stopped in (waiting, pace.enter()):
            with pytest.raises(Stopped):
                await stopped

    asyncio.run(scenario())


def test_concurrency_follows_the_api(server, world):
    """An API that takes 3 at a time: the client ends near that and gets everything."""
    server.latency = 0.02
    server.plan = lambda asked: Fault(529) if server.in_flight >= 3 else None
    world.ask("--concurrency", "12")
    refused = [name for _, name in server.log if name == "529"]
    assert world.answered == 24 and len(refused) < 60 and server.most_in_flight <= 12


def test_retry_after_holds_everybody_back(server, world):
    times = []

    def plan(asked):
        times.append(time.monotonic())
        return Fault(429, headers={"retry-after": "1"}) if len(times) == 1 else None

    server.plan = plan
    world.ask("--concurrency", "1")
    assert times[1] - times[0] >= 1.0
    for headers, seconds in (({"retry-after-ms": "1500"}, 1.5), ({"retry-after": "7"}, 7.0), ({}, None),
                             ({"retry-after": "nan"}, None)):  # fmt: skip
        assert pace.retry_after(headers) == seconds
    assert pace.retry_after({"retry-after": "Wed, 21 Oct 2065 07:28:00 GMT"}) > 1e9


def test_a_retry_after_that_is_no_time_is_none(server, world):
    values = iter(["1 Jan 99999 00:00:00 GMT", "Mon, 1 Jan 0000 99:99:99 GMT", "1 Jan 999999999999 1:1:1", "1e400",
                   "1 Jan -1 00:00:00 +9999999999", "soon", "31s"])  # fmt: skip
    refused = (Fault(429, headers={"retry-after": value}) for value in values)
    server.plan = lambda asked: None if len(server.log) % 2 else next(refused, None)  # each of another request
    world.ask("--concurrency", "1")
    assert not list(values) and world.answered == 24 and world.totals.unknown == 0, "the request is booked"


def test_retry_after_nothing_still_pauses(server, world, monkeypatch):
    """Else the tries are used up within milliseconds, and the run ends."""
    pauses, sleep = [], api_teacher.Pace.sleep

    async def counted(self, seconds):
        pauses.append(seconds)
        await sleep(self, 0)

    monkeypatch.setattr(api_teacher.Pace, "sleep", counted)
    server.faults.extend([Fault(429, headers={"retry-after": "0"})] * 3)
    world.ask("--concurrency", "1")
    assert len(pauses) == 3 and pauses == sorted(pauses) and pauses[0] > 0


def test_ctrl_c_waits_for_replies_in_flight(server, world):
    server.latency = 0.4
    running = world.client("--concurrency", "6", patch="from teacher import api_teacher; api_teacher.START = 6")
    wait_until(lambda: server.in_flight)
    time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in err, (out, err)
    assert world.answered == len(server.log) == 6 and world.totals.unknown == 0


@pytest.mark.parametrize("flag", ["--max_usd", "--timeout", "--poll_seconds", "--watch", "--price"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_none(flag, value):
    numbers = ["1", value] if flag == "--price" else [value]
    stops(lambda: haiku.parse_args([flag, *numbers]), flag if flag == "--price" else f"{flag} must be")
