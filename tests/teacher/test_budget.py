"""Money, pace, lock, cache, images: the parts of the Teacher client one by one, and what a user sees of them."""

from __future__ import annotations

import asyncio
import json
import signal
import time

import pytest

from ares import cli
from teacher import api_responses, api_teacher, budget, claude, handoff
from teacher.budget import Ledger, read_log
from teacher.handoff import REFUSED_REPLY
from teacher.interface import SCORE, Reply, Request, Stopped
from tests.api_server import KEY, Fault, fill_form
from tests.teacher.teacher_tools import ask, client, flags, lay_out, lines_of, many_items, paid_usd, scores


@pytest.fixture
def questions(tmp_path, problems):
    root = tmp_path / "questions"
    many_items(root, 24, problems)
    return root


# -- acceptance: one clear line, exit 2 or 3, nothing lost ---------------------------------------------------


@pytest.mark.parametrize(
    "more, key, status, words",
    [
        ((), "", 2, ("ANTHROPIC_API_KEY is not set", "--teacher reference")),
        (("--teacher_model", "claude-3-haiku-20240307"), KEY, 2, ("retired in April 2026", "claude-haiku-5-5")),
        (("--teacher_model", "claude-nope"), KEY, 2, ("not known", "claude-haiku-5-5")),
        (("--max_usd", "0.001"), KEY, 3, ("--max_usd 0.001", "run this again")),
        ((), "sk-ant-wrong", 2, ("does not accept this key",)),
    ],
    ids=["no key", "retired model", "unknown model", "budget", "bad key"],
)
def test_runs_that_stop_say_why_and_lose_nothing(server, questions, monkeypatch, more, key, status, words):
    monkeypatch.setenv("ANTHROPIC_API_KEY", key)
    with pytest.raises(cli.UserError) as error:
        ask(server, questions, *more)
    assert getattr(error.value, "status", 2) == status and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)
    kept = scores(questions)
    assert bool(kept) == (status == 3) and len(kept) < 24 and paid_usd(server) <= 0.001
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    before = len(server.asked)
    ask(server, questions)
    assert len(scores(questions)) == 24 and kept.items() <= scores(questions).items()
    assert len(server.asked) == before + 24 - len(kept), "what was paid for is not asked again"


def test_a_budget_is_never_passed_and_nearly_used(server, questions):
    usd = 0.0008
    with pytest.raises(cli.Stop):
        ask(server, questions, "--max_usd", str(usd), "--concurrency", "16")
    paid = paid_usd(server)
    assert usd / 2 < paid <= usd
    assert read_log(questions / "teacher/spend.jsonl").usd == pytest.approx(paid)


def test_lost_replies_count_against_the_budget(server, questions):
    server.plan = lambda asked: Fault(0, kind="reset")
    with pytest.raises(cli.UserError):
        ask(server, questions, "--max_usd", "0.0008", "--concurrency", "4")
    paid = paid_usd(server)
    assert 0 < paid <= 0.0008, "the server has done the work, and the client has counted it"


def test_ledger_waits_for_what_is_on_its_way(tmp_path):
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
        with pytest.raises(Stopped):
            await waiting
        with pytest.raises(Stopped):
            await pace.enter()

    asyncio.run(scenario())


def test_concurrency_follows_the_api(server, questions):
    """An API that takes 3 at a time: the client ends near that and gets everything."""
    server.latency = 0.02
    server.plan = lambda asked: Fault(529) if server.in_flight >= 3 else None
    ask(server, questions, "--concurrency", "12")
    assert len(scores(questions)) == 24
    refused = [name for _, name in server.log if name == "529"]
    assert len(refused) < 60 and server.most_in_flight <= 12


def test_what_fits_goes_before_the_budget_stops_the_run():
    """A dear request waits for money and a cheap one behind it: the dear one must not end the run before that."""

    async def scene():
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

    asyncio.run(scene())


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


def test_nothing_leaves_after_the_end_though_it_waited_for_money(server, monkeypatch):
    """Ctrl-C while requests wait for the budget: replies in flight are saved, those that waited are not sent."""
    server.latency = 0.3

    async def scene():
        teacher = claude.ClaudeTeacher(base_url=server.url, concurrency=4)
        asked = Request("id-1", SCORE, "1", 'Score:\n{\n"It is so.": xxx\n}', ("It is so.",))
        teacher.ledger = Ledger(None, max_usd=1.5 * teacher.most_usd(asked))
        async with teacher:
            all_of_them = [asyncio.ensure_future(teacher.answer(asked)) for _ in range(4)]
            while not server.in_flight:
                await asyncio.sleep(0.01)
            teacher.stop()
            return await asyncio.wait_for(asyncio.gather(*all_of_them, return_exceptions=True), 10)

    ends = asyncio.run(scene())
    assert isinstance(ends[0], Reply) and all(isinstance(end, Stopped) for end in ends[1:])
    assert len(server.log) == 1


def test_retry_after_holds_everybody_back(server, questions):
    times = []

    def plan(asked):
        times.append(time.monotonic())
        return Fault(429, headers={"retry-after": "1"}) if len(times) == 1 else None

    server.plan = plan
    ask(server, questions, "--concurrency", "1")
    assert times[1] - times[0] >= 1.0
    assert api_responses.retry_after({"retry-after-ms": "1500"}) == 1.5
    assert api_responses.retry_after({"retry-after": "7"}) == 7.0 and api_responses.retry_after({}) is None
    assert api_responses.retry_after({"retry-after": "Wed, 21 Oct 2065 07:28:00 GMT"}) > 1e9
    assert api_responses.retry_after({"retry-after": "nan"}) is None


def test_retry_after_nothing_still_pauses(server, questions, monkeypatch):
    """Else the tries are used up within milliseconds, and the run ends."""
    pauses, sleep = [], api_teacher.Pace.sleep

    async def counted(self, seconds):
        pauses.append(seconds)
        await sleep(self, 0)

    monkeypatch.setattr(api_teacher.Pace, "sleep", counted)
    server.faults.extend([Fault(429, headers={"retry-after": "0"})] * 3)
    ask(server, questions, "--concurrency", "1")
    assert len(pauses) == 3 and pauses == sorted(pauses) and pauses[0] > 0


def test_one_bad_request_does_not_stop_the_others(server, questions):
    poor = (handoff.iter_items(questions)[7].folder / handoff.REQUEST).read_text()
    server.plan = lambda asked: Fault(400, "this one is odd") if asked.text == poor else None
    with pytest.raises(cli.UserError, match="1 of 24 replies are unusable .api_400 1."):
        ask(server, questions)
    assert len(scores(questions)) == 23


def test_ctrl_c_waits_for_replies_in_flight(server, questions):
    server.latency = 0.4
    running = client(
        *flags(server, questions, "--concurrency", "6"), patch="from teacher import api_teacher; api_teacher.START = 6"
    )
    deadline = time.monotonic() + 60
    while not server.in_flight and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in err, (out, err)
    assert len(scores(questions)) == len(server.log) == 6
    assert read_log(questions / "teacher/spend.jsonl").unknown == 0


# -- small parts ---------------------------------------------------------------------------------------------


def test_a_refusal_that_reads_well_is_no_reply(server, questions):
    """A correction or a score that was cut off may parse; its stop reason says that it is not to be used."""
    server.respond = lambda asked: (fill_form(asked)[0], "refusal")
    with pytest.raises(cli.UserError, match="refusal 24"):
        ask(server, questions, "--attempts", "1")
    folder = handoff.iter_items(questions)[0].folder
    assert (folder / REFUSED_REPLY).exists() and not handoff.has_reply(folder) and not scores(questions)


def test_plain_requests_for_gateways(server, questions):
    ask(server, questions, "--no-structured", "--price", "1", "2")
    assert all(not asked.structured and not asked.notes for asked in server.asked) and len(scores(questions)) == 24
    paid = (server.billed["input_tokens"] * 1 + server.billed["output_tokens"] * 2) / 1e6
    assert read_log(questions / "teacher/spend.jsonl").usd == pytest.approx(paid)


def test_prices():
    assert budget.price_of("claude-haiku-5-5") == budget.Price(0.10, 0.50)
    assert budget.cost_usd(budget.price_of("claude-haiku-4-5"), {"input_tokens": 10**6}, batch=True) == 0.5


MILLION = 10**6


CACHED = [  # usage as the API sends it, multiple of the price of a million input tokens
    ({"cache_read_input_tokens": MILLION}, 0.1),
    ({"cache_creation_input_tokens": MILLION}, 1.25),
    ({"cache_creation_input_tokens": MILLION, "cache_creation": {"ephemeral_5m_input_tokens": MILLION}}, 1.25),
    ({"cache_creation_input_tokens": MILLION, "cache_creation": {"ephemeral_1h_input_tokens": MILLION}}, 2.0),
    ({"cache_creation_input_tokens": MILLION, "cache_creation": {"ephemeral_1h_input_tokens": MILLION // 2}}, 1.625),
    ({"cache_creation_input_tokens": None, "cache_creation": None, "cache_read_input_tokens": None}, 0.0),
    ({"cache_read_input_tokens": MILLION, "cache_creation_input_tokens": MILLION}, 1.35),
]


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("usage, factor", CACHED)
def test_cached_tokens_are_priced(server, tmp_path, problems, usage, factor, batch):
    many_items(tmp_path / "questions", 1, problems)
    server.usage_extra = usage
    ask(server, tmp_path / "questions", "--no-cache", *(["--batch", "--poll_seconds", "0.05"] if batch else []))
    kind = "batch_" if batch else ""
    tokens, out = server.billed[f"{kind}input_tokens"], server.billed[f"{kind}output_tokens"]
    usd = (tokens * 0.10 + out * 0.50) / 1e6 + factor * 0.10
    assert read_log(tmp_path / "questions/teacher/spend.jsonl").usd == pytest.approx(usd / 2 if batch else usd)


def test_the_bound_holds_where_a_gateway_writes_to_a_cache(server, questions, problems, sample, monkeypatch):
    """Each input token written for an hour, at twice the price; the budget holds, and `most_usd` is never passed."""
    lay_out(questions, 0, "952", ["Look at it."], problems, sample)
    message = server.message

    def written(asked, text, stop_reason):
        made = message(asked, text, stop_reason)
        tokens = made["usage"]["input_tokens"] + 4600 * len(asked.images)
        lifetimes = {"ephemeral_1h_input_tokens": tokens, "ephemeral_5m_input_tokens": 0}
        made["usage"] |= {"input_tokens": 0, "cache_creation_input_tokens": tokens, "cache_creation": lifetimes}
        return made

    monkeypatch.setattr(server, "message", written)
    ask(server, questions)
    entries = {}
    for line in lines_of(questions / "teacher/spend.jsonl"):
        entries.setdefault(line["id"], {}).update(line)
    assert len(entries) == 25 and all(0 < entry["usd"] <= entry["most_usd"] for entry in entries.values())


def test_a_spend_log_with_odd_lines_is_added_up(tmp_path):
    good = [{"id": "a", "item": "x", "most_usd": 1.0}, {"id": "a", "usd": 0.5, "outcome": "reply"}]
    odd = ["null", "[]", "7", "\x00", "[" * 100_000, '{"most_usd": 1}', '{"id": [], "most_usd": 1}',
           '{"id": "b", "most_usd": NaN}', '{"id": "b", "most_usd": "dear"}', '{"id": "a", "outcome": "reply"}',
           '{"id": "a", "usd": -Infinity, "outcome": "x"}', '{"id": "c", "usd": [], "outcome": "reply"}']  # fmt: skip
    (tmp_path / budget.LOG).write_text("\n".join([json.dumps(good[0]), *odd, json.dumps(good[1]), *odd]))
    totals = read_log(tmp_path / budget.LOG)
    assert (totals.requests, totals.replies, totals.usd, totals.unknown) == (1, 1, 0.5, 0)
