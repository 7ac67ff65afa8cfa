"""The client in a storm: a third of the requests go wrong and the client is killed again and again; nothing is lost.

By default a small storm, for CI. The whole one of 5,000 items, 10 kills and 30 % faults:

    ARES_STORM=full python -m pytest tests/test_storm.py -k storm -s     # writes benchmarks/results/storm.json
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

import haiku
from ares import claude, feedback
from ares.budget import read_log
from tests.api_server import LOST, SPOILT, ApiServer, Fault, score_by_text
from tests.conftest import ROOT
from tests.teacher_tools import KEY, client, lines_of, many_items, scores

FULL = os.environ.get("ARES_STORM") == "full"
ITEMS, KILLS, CONCURRENCY = (5000, 10, 32) if FULL else (360, 4, 16)
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
QUICK = "from ares import claude; claude.BACKOFF, claude.MAX_BACKOFF = 0.05, 0.4"


def flags(server, questions, *more):
    return ["--questions_dir", str(questions), "--base_url", server.url, "--data_root", "no-data-here", "--no-cache",
            "--concurrency", str(CONCURRENCY), *more]  # fmt: skip


class Storm:
    """Draws a fault for a share of the requests, each kind as often as the others."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def __call__(self, asked):
        return FAULTS[self.random.choice(sorted(FAULTS))] if self.random.random() < FAULT_SHARE else None


def replies_on_disk(folders):
    return {digest for digest, folder in folders.items() if (folder / feedback.SCORES).exists()}


def test_storm(tmp_path, problems):
    """Every item ends answered; what is on disk is never asked again; each repeat has its reason and is in the log."""
    questions, calm = tmp_path / "questions", tmp_path / "calm"
    folders = many_items(questions, ITEMS, problems)
    shutil.copytree(questions, calm)
    began = time.monotonic()
    kills = []  # (requests that had arrived, items whose reply was on disk)
    with ApiServer(score_by_text) as server:
        server.keep, server.plan, server.hang_seconds = False, Storm(seed=1), 4.0
        argv = flags(server, questions, "--timeout", "2", "--attempts", "12")
        dice = random.Random(2)
        for _ in range(KILLS):
            running = client(*argv, patch=QUICK)
            goal = len(replies_on_disk(folders)) + ITEMS // (KILLS + 1) * dice.uniform(0.4, 1.0)
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and running.poll() is None:
                time.sleep(0.1 + 0.2 * dice.random())
                if len(replies_on_disk(folders)) >= goal:
                    break
            assert running.poll() is None, running.communicate()
            running.kill()
            running.communicate()
            time.sleep(0.5)  # what had reached the socket reaches the server's log
            kills.append((len(server.log), replies_on_disk(folders)))
        running = client(*argv, patch=QUICK)
        out, err = running.communicate(timeout=600)
        assert running.returncode == 0, (out[-3000:], err[-3000:])
        log, billed = list(server.log), Counter(server.billed)
    seconds = time.monotonic() - began

    # 1. every item ends answered
    assert replies_on_disk(folders) == set(folders)
    assert all(feedback.is_done(questions, item.action) for item in feedback.iter_items(questions))
    # 2. no item whose reply reached the disk is ever asked again
    paid_twice = sum(len(on_disk & {digest for digest, _ in log[arrived:]}) for arrived, on_disk in kills)
    assert paid_twice == 0
    # 3. a repeat is a reply that a fault destroyed, or one that was in flight at a kill
    classes = Counter(name for _, name in log)
    good = Counter(digest for digest, name in log if name in ("ok", "slow", "prose"))
    in_flight_at_kills = sum(count - 1 for count in good.values())
    assert set(good) == set(folders) and in_flight_at_kills <= CONCURRENCY * KILLS
    # 4. the spend log holds every request, with what it came to
    lines = lines_of(questions / "teacher/spend.jsonl")
    opened = {line["id"] for line in lines if "most_usd" in line}
    closed = Counter(line["outcome"] for line in lines if "outcome" in line)
    totals = read_log(questions / "teacher/spend.jsonl")
    paid = (billed["input_tokens"] * 0.10 + billed["output_tokens"] * 0.50) / 1e6
    assert len(log) <= len(opened) <= len(log) + CONCURRENCY * KILLS
    assert len(opened) - sum(closed.values()) <= CONCURRENCY * KILLS, "open entries are those of the kills"
    assert totals.usd - 1e-9 <= paid <= totals.usd + totals.unknown_usd + 1e-9, (totals, paid)
    for status in ("429", "529", "500", "408"):
        sent = classes[status] + classes[f"{status}_bare"]
        assert sent - CONCURRENCY * KILLS <= closed[f"api_{status}"] <= sent
    assert closed["lost"] <= sum(classes[name] for name in LOST) + CONCURRENCY * (KILLS + 1)
    # 5. the scores are those of a run without faults
    with ApiServer(score_by_text) as server:
        server.keep = False
        running = client(*flags(server, calm))
        out, err = running.communicate(timeout=600)
        assert running.returncode == 0, (out[-3000:], err[-3000:])
        assert len(server.log) == ITEMS
    equal = scores(questions) == scores(calm)
    assert equal and len(scores(calm)) == ITEMS

    told = {
        "items": ITEMS, "kills": KILLS, "concurrency": CONCURRENCY, "fault_share": FAULT_SHARE,
        "seconds": round(seconds, 1), "requests": len(log), "requests_by_class": dict(sorted(classes.items())),
        "answered": len(replies_on_disk(folders)), "asked_again_after_their_reply_was_on_disk": paid_twice,
        "repeats_of_requests_in_flight_at_a_kill": in_flight_at_kills,
        "allowed_repeats": CONCURRENCY * KILLS,
        "spend_log": {"requests": len(opened), "outcomes": dict(sorted(closed.items())),
                      "usd": round(totals.usd, 6), "unknown": totals.unknown,
                      "unknown_usd_at_most": round(totals.unknown_usd, 6)},
        "billed_by_the_server_usd": round(paid, 6), "scores_equal_those_of_a_run_without_faults": equal,
    }  # fmt: skip
    print(json.dumps(told, indent=1))
    if FULL:
        Path(ROOT / "benchmarks/results").mkdir(parents=True, exist_ok=True)
        (ROOT / "benchmarks/results/storm.json").write_text(json.dumps(told, indent=1) + "\n")


# -- each fault alone --------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.delenv("ANTHROPIC_BASE_URL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr(claude, "BACKOFF", 0.02)


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_each_fault_alone(quick, tmp_path, problems, name):
    """Three items, every first request goes wrong in one way: all are answered, and each is booked as what it was."""
    questions = tmp_path / "questions"
    folders = many_items(questions, 3, problems)
    seen = set()

    def once(asked):
        digest = hashlib.sha256(asked.text.encode()).hexdigest()
        first = digest not in seen
        seen.add(digest)
        return FAULTS[name] if first else None

    with ApiServer(score_by_text) as server:
        server.plan, server.hang_seconds = once, 1.5
        haiku.main(flags(server, questions, "--timeout", "1"))
        assert Counter(kind for _, kind in server.log)[name] == 3
        harmless = name in ("slow", "prose")
        assert len(server.log) == (3 if harmless else 6)
        firsts = {asked.text: asked for asked in reversed(server.asked)}
        seconds = [asked for asked in server.asked if asked is not firsts[asked.text]]  # in any order
        assert all(len(asked.notes) == 1 + (name in SPOILT) for asked in seconds)
        paid = (server.billed["input_tokens"] * 0.10 + server.billed["output_tokens"] * 0.50) / 1e6
    assert replies_on_disk(folders) == set(folders)
    totals = read_log(questions / "teacher/spend.jsonl")
    assert totals.requests == len(server.log) and totals.outcomes.get("lost", 0) == (3 if name in LOST else 0)
    assert totals.usd - 1e-9 <= paid <= totals.usd + totals.unknown_usd + 1e-9
    if name not in LOST:
        assert totals.usd == pytest.approx(paid) and totals.unknown == 0
    if name == "max_tokens":
        assert all(asked.body["max_tokens"] == 2 * firsts[asked.text].body["max_tokens"] for asked in seconds)
