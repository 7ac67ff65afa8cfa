"""The client in a storm: a third of the requests go wrong and the client is killed again and again; nothing is lost.

By default a small storm, for CI. The whole one of 5,000 items, 10 kills and 30 % faults:

    ARES_STORM=full python -m pytest tests/teacher/test_storm.py -k storm -s     # writes benchmarks/results/storm.json
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from teacher import handoff
from tests import api_server
from tests.api_server import LOST, SPOILT, ApiServer, Asked, Fault, score_by_text
from tests.conftest import ROOT
from tests.teacher.teacher_tools import (
    CREDIT,
    World,
    forked,
    item_digests,
    lines_of,
    many_items,
    paid_usd,
    server_is_idle,
    wait_until,
)

FULL = os.environ.get("ARES_STORM") == "full"
ITEMS, KILLS, CONCURRENCY = (5000, 10, 32) if FULL else (200, 3, 16)
FAULT_SHARE = 0.30
FAULTS = {
    "429": Fault(429, headers={"retry-after": "0.2"}),
    "429_bare": Fault(429),
    "529": Fault(529),
    "500": Fault(500),
    "408": Fault(408),
    **{kind: Fault(0, kind=kind) for kind in ("reset", "truncated_json", "hang", "slow", "prose", *SPOILT)},
}
# short times, so that a storm of hours takes seconds; what is done is the same
QUICK = "from teacher import api_teacher; api_teacher.BACKOFF, api_teacher.MAX_BACKOFF = 0.05, 0.4"


def storm_world(server, questions, *ways, concurrency=CONCURRENCY):
    return World(server, questions, "--no-cache", "--concurrency", concurrency, *ways)


def fault_drawer(seed: int):
    """A plan that draws a fault for a share of the requests, each kind as often as the others."""
    dice = random.Random(seed)
    return lambda asked: FAULTS[dice.choice(sorted(FAULTS))] if dice.random() < FAULT_SHARE else None


def replies_on_disk(folders):
    return {digest for digest, folder in folders.items() if (folder / handoff.SCORES).exists()}


@pytest.mark.parametrize("ways", [(), ("--together",)], ids=["apart", "together"])
def test_storm(api_environment, tmp_path, problems, ways):
    """Every item ends answered; what is on disk is never asked again; each repeat has its reason and is in the log."""
    most = 4 if ways else 1  # items of a request
    concurrency = CONCURRENCY // most
    questions, calm, output = tmp_path / "questions", tmp_path / "calm", tmp_path / "log.txt"
    folders = many_items(questions, ITEMS, problems)
    shutil.copytree(questions, calm)
    began = time.monotonic()
    kills = []  # (requests that had arrived, items whose reply was on disk)
    with ApiServer(score_by_text) as server:
        server.keep, server.hang_seconds, draw = False, 4.0, fault_drawer(seed=1)
        log = []  # (digests of the items that are asked about, what became of it) for every request

        def plan(asked):
            fault = draw(asked)
            log.append((item_digests(asked), fault.name if fault else "ok"))
            if len(log) == kill_at:
                running.kill()
            return fault

        server.plan = plan
        world = storm_world(server, questions, *ways, concurrency=concurrency)
        argv = ("--timeout", "2", "--attempts", "12")
        dice = random.Random(2)
        for _ in range(KILLS):
            # Too few requests for all items, so a fast client cannot end before it is killed.
            kill_at = len(log) + round(ITEMS / most / (KILLS + 1) * dice.uniform(0.4, 1.0))
            running = forked(world.flags(*argv), output, patch=QUICK)
            running.join(120)
            assert running.exitcode == -signal.SIGKILL
            time.sleep(0.5)  # what had reached the socket reaches the server's log
            kills.append((len(log), replies_on_disk(folders)))
        kill_at = None
        running = forked(world.flags(*argv), output, patch=QUICK)
        running.join(600)
        assert running.exitcode == 0, output.read_text()[-3000:]
        paid = paid_usd(server)
    seconds = time.monotonic() - began

    # 1. every item ends answered
    assert replies_on_disk(folders) == set(folders)
    assert world.done == sorted({item.action for item in world.items})
    # 2. no item whose reply reached the disk is ever asked again
    paid_twice = sum(
        len(on_disk & {each for digests, _ in log[arrived:] for each in digests}) for arrived, on_disk in kills
    )
    assert paid_twice == 0
    # 3. a repeat is a reply that a fault destroyed, or one that was in flight at a kill
    classes = Counter(name for _, name in log)
    good = Counter(digest for digests, name in log if name in ("ok", "slow", "prose") for digest in digests)
    in_flight_at_kills = sum(count - 1 for count in good.values())
    assert set(good) == set(folders) and in_flight_at_kills <= concurrency * KILLS * most
    # 4. the spend log holds every request, with what it came to
    lines = lines_of(questions / "teacher/spend.jsonl")
    opened = {line["id"] for line in lines if "most_usd" in line}
    closed = Counter(line["outcome"] for line in lines if "outcome" in line)
    totals = world.totals
    assert len(log) <= len(opened) <= len(log) + concurrency * KILLS
    assert len(opened) - sum(closed.values()) <= concurrency * KILLS, "open entries are those of the kills"
    assert totals.usd - 1e-9 <= paid <= totals.usd + totals.unknown_usd + 1e-9, (totals, paid)
    for status in ("429", "529", "500", "408"):
        sent = classes[status] + classes[f"{status}_bare"]
        assert sent - concurrency * KILLS <= closed[f"api_{status}"] <= sent
    assert closed["lost"] <= sum(classes[name] for name in LOST) + concurrency * (KILLS + 1)
    # 5. the scores are those of a run without faults
    with ApiServer(score_by_text) as server:
        server.keep = False
        calm = storm_world(server, calm)
        calm.ask()
        assert len(server.log) == ITEMS == calm.answered
    joined = sum(len(digests) > 1 for digests, _ in log)
    assert joined > len(log) / 2 if ways else joined == 0
    equal = world.scores == calm.scores
    assert equal

    found = {
        "items": ITEMS, "together": bool(ways), "kills": KILLS, "concurrency": concurrency, "fault_share": FAULT_SHARE,
        "seconds": round(seconds, 1), "requests": len(log), "requests_by_class": dict(sorted(classes.items())),
        "answered": len(replies_on_disk(folders)), "asked_again_after_their_reply_was_on_disk": paid_twice,
        "repeats_of_requests_in_flight_at_a_kill": in_flight_at_kills,
        "allowed_repeats": concurrency * KILLS * most,
        "spend_log": {"requests": len(opened), "outcomes": dict(sorted(closed.items())),
                      "usd": round(totals.usd, 6), "unknown": totals.unknown,
                      "unknown_usd_at_most": round(totals.unknown_usd, 6)},
        "billed_by_the_server_usd": round(paid, 6), "scores_equal_those_of_a_run_without_faults": equal,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if FULL:
        Path(ROOT / "benchmarks/results").mkdir(parents=True, exist_ok=True)
        name = "storm_together.json" if ways else "storm.json"
        (ROOT / "benchmarks/results" / name).write_text(json.dumps(found, indent=1) + "\n")


# -- batches ---------------------------------------------------------------------------------------------------

ATTEMPTS, BATCH_ITEMS, BATCH_RUNS = 3, 40, 40
STORMY, MOST_RUNS = 10, 200  # on a slow machine a run may be killed before it has made a batch: more runs then
NO_CREDIT = {"type": "invalid_request_error", "message": CREDIT}
INVALID = {"type": "invalid_request_error", "message": "messages.0.content: Could not process image"}
TEMPORARY = [{"type": kind, "message": "injected"} for kind in ("api_error", "overloaded_error")]
SHORT = "from teacher import batches; batches.SETTLE_SECONDS, batches.BACKOFF, batches.MAX_COUNT = 0.05, 0.001, 4"
AT_ONCE = {"retry-after-ms": "5"}  # else the SDK pauses
CREATIONS = [Fault(429, headers=AT_ONCE), Fault(529), Fault(500), Fault(0, kind="dropped"), Fault(0, kind="lost"),
             Fault(504, kind="created"), Fault(400, "injected"), Fault(400, CREDIT)]  # fmt: skip
RETRIEVALS = [Fault(404), Fault(529, headers=AT_ONCE), *(Fault(0, kind=kind) for kind in api_server.RETRIEVALS)]
RESULTS = [Fault(404), Fault(503, headers=AT_ONCE), Fault(0, kind="reset"),
           *(Fault(0, kind=kind) for kind in api_server.RESULTS)]  # fmt: skip


class BatchStorm:
    """Faults of every call about a batch and of every result. Those of a batch pass after some calls: the longest last
    for several runs of the client, but not for the whole storm, which would then make no more batches."""

    def __init__(self, server: ApiServer, seed: int, invalid: str):
        self.random, self.invalid = random.Random(seed), invalid
        self.paid: Counter[str] = Counter()  # digest of an item -> replies about it
        self.over = False
        self.lasting: dict[tuple[str, str], tuple[Fault | None, int]] = {}  # (batch, call) -> fault and calls it lasts
        self.free: Counter[str] = Counter()  # digest -> results that were cancelled, or refused with the account
        server.create_plan = lambda: self.random.choice(CREATIONS) if self.random.random() < 0.4 else None
        server.retrieve_plan = lambda batch: self.of_batch(batch, "retrieval", RETRIEVALS)
        server.results_plan = lambda batch: self.of_batch(batch, "results", RESULTS)
        server.outcome, server.respond = self.outcome, self.respond

    def of_batch(self, batch, call, faults):
        if (batch.id, call) not in self.lasting:
            fault = self.random.choice(faults) if self.random.random() < 0.4 else None
            self.lasting[batch.id, call] = fault, self.random.choice((1, 1, 2, 2, 20))
        fault, calls = self.lasting[batch.id, call]
        self.lasting[batch.id, call] = fault, calls - 1
        return fault if calls > 0 else None

    def outcome(self, custom_id, asked):
        digests = item_digests(asked)
        if self.invalid in digests:
            return INVALID
        nonce = random.Random(custom_id.partition("-")[0]).random()  # one draw for each batch
        if nonce < 0.3 and self.random.random() < 0.5:
            self.free.update(digests)
            return NO_CREDIT if nonce < 0.15 else "canceled"
        return self.random.choice(("expired", *TEMPORARY)) if self.random.random() < 0.2 else "succeeded"

    def respond(self, asked):
        self.paid.update(item_digests(asked))
        if self.over:
            return score_by_text(asked)
        if self.random.random() < 0.2:
            return "I like it.", "end_turn"
        text, stop = score_by_text(asked)
        if len(asked.rationales) > 1 and self.random.random() < 0.4:  # one of them cannot be used
            lists = json.loads(text)["scores"]
            self.random.choice(lists).pop()
            text = json.dumps({"scores": lists})
        return text, stop


@pytest.mark.parametrize("seed, ways", [(2, ()), (3, ()), (6, ("--together",))])
def test_batch_storm(api_environment, tmp_path, problems, seed, ways):
    """Batches of a client that is killed again and again, with faults in all of the API's answers.

    The bound, for each item: at most --attempts paid replies, and one more for each record of a batch that the user
    deletes (as the client's line says) to give it up. Requests, paid or not: the same, and one more for each result
    that was cancelled or refused with the account.
    """
    questions, log = tmp_path / "questions", tmp_path / "log.txt"
    items = 2 * BATCH_ITEMS if ways else BATCH_ITEMS
    patch = SHORT + ("; batches.MAX_COUNT = 2" if ways else "")  # as many batches of fewer requests
    folders = many_items(questions, items, problems)
    dice = random.Random(seed)
    given_up: Counter[str] = Counter()  # digest -> deleted records that name it
    deleted: list[str] = []  # ids of their batches
    ended: Counter[str] = Counter()

    def run(attempts, kill_after=None):
        client = forked(world.flags("--attempts", attempts), log, patch=patch)
        client.join(kill_after or 60)
        if client.is_alive():
            assert kill_after, f"the client hangs: {log.read_text()[-2000:]}"
            client.kill()
            client.join()
            wait_until(server_is_idle)
            ended["killed"] += 1
            return ""
        assert client.exitcode in (0, 2, 3), log.read_text()[-3000:]
        ended[f"exit {client.exitcode}"] += 1
        [line] = [line for line in log.read_text().splitlines() if " error: " in line] or [""]
        assert bool(line) == (client.exitcode != 0) and "Traceback" not in log.read_text()
        return line

    def digests(batch):
        return [digest for request in batch.requests for digest in item_digests(Asked.read(request["params"]))]

    def delete(path):
        record = json.loads(path.read_text())
        path.unlink()
        deleted.append(record["batch"])
        entries = (each if isinstance(each, list) else [each] for each in record["asked"].values())
        for asked in itertools.chain.from_iterable(entries):
            [digest] = [digest for digest, folder in folders.items() if folder == questions / asked["item"]]
            given_up[digest] += 1

    with ApiServer(score_by_text) as server:
        server.keep, server.most_batches = False, 300
        world = World(server, questions, "--no-cache", "--batch", "--poll_seconds", "0.05", *ways)
        invalid = sorted(folders)[0]
        storm = BatchStorm(server, seed, invalid)
        snapshots = []
        for number in range(MOST_RUNS):
            if number >= BATCH_RUNS and len(server.batches) > STORMY:
                break
            line = run(ATTEMPTS, dice.uniform(0.05, 0.6) if number % 3 else None)
            named = re.search(r"delete (\S+\.json)", line)
            if named and dice.random() < 0.8:
                delete(Path(named[1]))
            snapshots.append((len(server.batches), replies_on_disk(folders)))
            if "are unusable" in line:
                break
        stormy = len(server.batches)

        def bounds_hold(attempts):
            requested = Counter(digest for batch in server.batches for digest in digests(batch))
            for batch in server.batches:
                server.results_of(batch)  # also of those that nobody has looked at
            for digest in folders:
                assert storm.paid[digest] <= attempts + given_up[digest], "paid too often"
                assert requested[digest] <= attempts + given_up[digest] + storm.free[digest], "asked too often"
            for count, on_disk in snapshots:
                again = {digest for batch in server.batches[count:] for digest in digests(batch)}
                assert not again & on_disk, "asked again though its reply was on disk"

        bounds_hold(ATTEMPTS)
        server.create_plan = lambda: None
        server.retrieve_plan = server.results_plan = lambda batch: None
        for _ in range(10):  # results go on being cancelled or refused
            if "are unusable" not in line:
                line = run(ATTEMPTS)
        bounds_hold(ATTEMPTS)
        server.outcome, storm.over = lambda custom_id, asked: "succeeded", True
        line = run(ATTEMPTS + 8)
        if "are unusable" not in line:  # a batch was still out that was cancelled
            line = run(ATTEMPTS + 8)
        assert f"1 of {items} replies are unusable (errored_invalid_request_error 1)" in line, line
        assert replies_on_disk(folders) == set(folders) - {invalid}
        bounds_hold(ATTEMPTS + 8)
        kept = {id for record in world.records for id in (record["batch"], *record["not_ours"])}
        assert {batch.id for batch in server.batches} <= kept | set(deleted), "no record of a paid batch is lost"
        paid = paid_usd(server, batch=True)
    assert world.totals.usd - 1e-9 <= paid <= world.totals.usd + world.totals.unknown_usd + 1e-9
    print(f"{stormy} batches in the storm, {len(server.batches)} in all, {len(deleted)} given up; {dict(ended)}")
    assert stormy > STORMY and ended["killed"] and ended["exit 2"], ended


# -- each fault alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_each_fault_alone(server, tmp_path, problems, name):
    """Three items, every first request goes wrong in one way: all are answered, and each is booked as what it was."""
    world = storm_world(server, tmp_path / "questions")
    many_items(world.root, 3, problems)
    firsts = {}

    def once(asked):
        return FAULTS[name] if firsts.setdefault(asked.digest, asked) is asked else None

    server.plan, server.hang_seconds = once, 1.5
    world.ask("--timeout", "1")
    assert Counter(kind for _, kind in server.log)[name] == 3 == world.answered
    assert len(server.log) == (3 if name in ("slow", "prose") else 6)
    seconds = [asked for asked in server.asked if asked is not firsts[asked.digest]]
    assert all(len(asked.notes) == 1 + (name in SPOILT) for asked in seconds)
    totals, paid = world.totals, paid_usd(server)
    assert totals.requests == len(server.log) and totals.outcomes.get("lost", 0) == (3 if name in LOST else 0)
    assert totals.usd - 1e-9 <= paid <= totals.usd + totals.unknown_usd + 1e-9
    if name not in LOST:
        assert totals.usd == pytest.approx(paid) and totals.unknown == 0
    if name == "max_tokens":
        assert all(asked.body["max_tokens"] == 2 * firsts[asked.digest].body["max_tokens"] for asked in seconds)
