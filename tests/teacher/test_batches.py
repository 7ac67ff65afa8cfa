"""haiku.py --batch with the real anthropic client against a local Batches API: faults of every call, the account
refused, batches lost, and the client killed at the worst moments."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
from pathlib import Path

import pytest

import haiku
from ares import cli
from teacher import batches, budget, handoff
from tests import api_server
from tests.api_server import KEY, Batch, Fault, fill_form
from tests.teacher.teacher_tools import (
    CREDIT,
    HAIKU_45,
    World,
    forked,
    lay_out,
    lines_of,
    paid_usd,
    sidecar,
    stops,
)  # fmt: skip

OVERLOADED = {"type": "overloaded_error", "message": "Overloaded"}
DISABLED = "This organization has been disabled."


def number_of(custom_id):
    """The place of a request in its batch."""
    return int(custom_id.rsplit("-", 1)[1])


@pytest.fixture
def world(batch_world):
    return batch_world


def all_bought_once(world, unknown=0):
    assert world.answered == 12 and len(world.server.batches) == 1 and set(world.server.paid.values()) == {1}
    assert world.totals.usd == pytest.approx(paid_usd(world.server, batch=True)) and world.totals.unknown == unknown


def test_a_batch_answers_everything_at_half_the_price(server, world, tmp_path):
    live = World(server, tmp_path / "live")
    shutil.copytree(world.root, live.root)
    server.batch_seconds = 0.3
    world.ask()
    assert not server.asked, "nothing was asked live"
    all_bought_once(world)
    assert world.done == [0, 1, 2, 3] and [record["state"] for record in world.records] == ["collected"]
    about = sidecar(world.folder())
    usd = (about["usage"]["input_tokens"] * 0.10 + about["usage"]["output_tokens"] * 0.50) / 1e6
    assert about["batch"] == server.batches[0].id and about["cost_usd"] == pytest.approx(usd / 2)
    world.ask()
    assert len(server.batches) == 1
    live.ask("--no-cache")
    assert live.scores == world.scores and len(server.asked) == 12


def test_shards_by_count_and_by_bytes(server, world, problems, sample, monkeypatch):
    for qid in ("952", "363"):
        lay_out(world.root, 0, qid, ["Look at it."], problems, sample)
    monkeypatch.setattr(batches, "MAX_COUNT", 5)
    world.ask()
    assert sorted(world.submitted) == [4, 5, 5]
    for item in world.items:
        (item.folder / handoff.REPLY).unlink()
    monkeypatch.setattr(batches, "MAX_COUNT", 100)
    monkeypatch.setattr(batches, "MAX_BYTES", 20_000)
    world.ask("--no-cache")
    later = server.batches[3:]
    assert len(later) > 2 and sum(world.submitted[3:]) == 14
    assert all(len(json.dumps(batch.requests)) <= 20_000 or len(batch.requests) == 1 for batch in later)


def test_expired_and_errored_are_asked_again(server, world):
    seen = set()

    def outcome(custom_id, asked):
        first = asked.text not in seen
        seen.add(asked.text)
        return ("succeeded", "expired", "errored", OVERLOADED)[number_of(custom_id) % 4] if first else "succeeded"

    server.outcome = outcome
    world.ask()
    assert world.answered == 12 and world.submitted == [12, 9]


def test_what_keeps_failing_is_reported_by_reason(server, world):
    text = world.request(0)
    server.outcome = lambda custom_id, asked: "expired" if asked.text == text else "succeeded"
    for _ in range(2):  # --attempts counts over runs
        world.stops("1 of 12 replies are unusable .expired 1.*larger --attempts")
        assert world.submitted == [12, 1, 1] and world.answered == 11
    server.outcome, notes = lambda custom_id, asked: "succeeded", []

    def respond(asked):
        notes.append(asked.notes)
        return fill_form(asked) if len(asked.notes) > 1 else ("I like it.", "end_turn")

    server.respond = respond
    world.ask("--attempts", "5")  # unusable replies are asked again with the reason
    assert world.submitted == [12, 1, 1, 1, 1] and world.answered == 12 and "no_json" in notes[1][1]


def test_each_reply_that_is_cut_off_doubles_the_length_of_the_next(server, world):
    """Over restarts, too, and where another fault comes between."""
    seen = {}

    def respond(asked):
        lengths = seen.setdefault(asked.digest, [])
        lengths.append(asked.body["max_tokens"])
        if len(lengths) == 3:
            return "I have read it.", "end_turn"
        return fill_form(asked) if lengths[-1] > 7 * lengths[0] else ("", "max_tokens")

    server.respond = respond
    for attempts in (2, 3, 4, 5):
        assert not world.answered
        with contextlib.suppress(cli.UserError):
            world.ask("--attempts", str(attempts), "--no-cache")
    assert world.answered == 12
    assert {tuple(n / lengths[0] for n in lengths) for lengths in seen.values()} == {(1, 2, 4, 4, 8)}


@pytest.mark.parametrize("kind", ["invalid_request_error", "request_too_large", "not_found_error"])
def test_a_request_that_the_api_calls_invalid_is_not_submitted_again(server, world, problems, kind):
    said, poor, text = "messages.0.content.0: Could not process image", world.items[5], world.request(5)
    server.outcome = lambda custom_id, asked: {"type": kind, "message": said} if asked.text == text else "succeeded"
    for _ in range(2):
        world.stops(f"1 of 12 replies are unusable .errored_{kind} 1.")
        assert world.submitted == [12] and (poor.folder / handoff.REASON).read_text() == f"errored_{kind}: {said}\n"
    lay_out(world.root, poor.action, poor.qid, ["Another thought."], problems)
    world.ask()  # another request
    assert world.submitted == [12, 1] and world.answered == 12


def test_a_cancelled_batch_stops_the_run(server, world):
    """Cancelled in the Console: the replies that are there are saved, and nothing is bought again in this run."""
    server.outcome = lambda custom_id, asked: "canceled" if number_of(custom_id) > 4 else "succeeded"
    for _ in range(4):  # free, and the user's own act: no attempt
        line = world.stops("was cancelled before .* of its .* requests", "--attempts", "2")
        assert server.batches[-1].id in line and world.answered == 5
        server.outcome = lambda custom_id, asked: "canceled"
    assert world.submitted == [12, 7, 7, 7]
    server.outcome = lambda custom_id, asked: "succeeded"
    world.ask()
    assert world.answered == 12 and set(server.paid.values()) == {1}


def test_submit_now_collect_later_with_the_same_teacher(server, world, sample, capsys):
    live = World(server, world.root)
    server.batch_seconds = 1000
    world.ask("--submit-only")
    assert "1 batches with 12 requests are pending" in capsys.readouterr().out and not world.answered
    live.stops("1 batches with 12 requests are pending.*--batch")
    world.stops("--teacher_model.*claude-haiku-5-5", "--teacher_model", HAIKU_45)
    argv = ["--questions_dir", str(world.root), "--teacher", "reference", "--data_root", f"{sample}/ScienceQA/data"]
    stops(lambda: haiku.main(argv), "12 requests are pending .*asked of claude-haiku-5-5.*--batch")
    world.ask("--submit-only")
    assert len(server.batches) == 1 and not server.asked and not world.answered
    server.batch_seconds = 0  # it ends while no client runs
    world.stops("--actions: the pending batches hold action 1", "--actions", "0")
    world.ask()
    all_bought_once(world)
    world.ask("--actions", "0")  # nothing is pending


def test_a_damaged_record_is_named_and_one_of_an_earlier_version_is_collected(server, world):
    world.ask("--submit-only")
    [path] = (world.root / "teacher/batches").glob("*.json")
    sound = json.loads(path.read_text())
    changed = ({"asked": None}, {"asked": {"x": 1}}, {"count": "12"}, {"batch": None}, {"nonce": "../x"}, {"more": 1})
    for damaged in ("null", "[]", "{", '{"nonce": 1}', "[" * 100_000, *(json.dumps(sound | each) for each in changed)):
        path.write_text(damaged)
        for each in (world, World(server, world.root)):
            each.stops(f"{path.name} is damaged")
    # commit 12494b9: no "key" but "failures"
    asked = {
        name: {"item": each["item"], "text": each["text"], "attempt": 1, "failures": 0}
        for name, each in sound["asked"].items()
    }
    path.write_text(json.dumps({**sound, "asked": asked, "hash": "0" * 64}))
    world.ask()
    all_bought_once(world)


def test_a_changed_rationale_does_not_get_an_old_reply(world, problems):
    world.ask("--submit-only")
    item = world.items[0]
    lay_out(world.root, item.action, item.qid, ["Quite another thought."], problems)
    world.ask()
    assert world.submitted == [12, 1] and len((item.folder / handoff.SCORES).read_text().split()) == 1


# -- faults that cost nothing --------------------------------------------------------------------------------

HARMLESS = {  # of the creation, of each retrieval, of the results
    "errors that pass": ([Fault(529), Fault(429, headers={"retry-after": "0.1"})], None,
                         [Fault(0, kind="reset"), Fault(529)]),
    # a stream may end between two lines without an error; what it lacks has not expired
    "results that end early": ([], None, [Fault(0, kind="first 7"), Fault(0, kind="first 5")]),
    "results that come twice": ([], None, [Fault(0, kind="twice")]),
    # a batch that may exist is looked up
    "created, then 504": ([Fault(504, kind="created")], None, []),
    "created, then 500": ([Fault(500, kind="created")], None, []),
    "created, the answer lost": ([Fault(0, kind="lost")], None, []),
    # `results_url` may be missing, or lead with the key to another host: the documented path is used
    "no_url": ([], Fault(0, kind="no_url"), []),
    "relative_url": ([], Fault(0, kind="relative_url"), []),
    "foreign_url": ([], Fault(0, kind="foreign_url"), []),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_faults_after_which_one_batch_answers_everything(server, world, name, monkeypatch):
    for count in (5, 7):
        monkeypatch.setitem(api_server.RESULTS, f"first {count}", lambda lines, count=count: lines[:count])
    creation, retrieval, results = HARMLESS[name]
    server.batch_faults.extend(creation)
    server.retrieve_plan = lambda batch: retrieval
    server.result_faults.extend(results)
    world.ask()
    all_bought_once(world)
    assert not server.batch_faults and not server.result_faults


ACCOUNT = [Fault(400, CREDIT), Fault(402, "Payment required"), Fault(403, DISABLED)]
NOT_CREATED = [  # fault, words, exit status
    *((fault, fault.message, 3) for fault in ACCOUNT), (Fault(400, "too odd"), "too odd", 2),
    (Fault(403, "not yours"), "not yours", 2),
    (Fault(429, "limit", error_code="enforced_spend_limit_reached"), "spend limit", 3),
    *((Fault(status), str(status), 2) for status in (404, 408, 413, 429, 500, 503, 529)),
    (Fault(0, kind="dropped"), "127.0.0.1", 2), (Fault(0, kind="html"), "sends no usable reply", 2),
]  # fmt: skip


@pytest.mark.parametrize("fault, words, status", NOT_CREATED, ids=lambda value: getattr(value, "name", None))
def test_a_batch_that_is_not_created_leaves_no_intent(server, world, fault, words, status):
    server.create_plan = lambda: fault
    world.stops(words, "--accept-missing", status=status)
    assert not world.records and not server.batches and not world.done
    if fault in ACCOUNT:
        server.create_plan = lambda: None
        world.ask()
        return all_bought_once(world)
    World(server, world.root).ask()
    assert world.answered == 12 and world.totals.unknown == 0


# -- the account is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["retrieve_plan", "results_plan"])
@pytest.mark.parametrize("fault", ACCOUNT, ids=lambda fault: fault.name)
def test_an_account_refusal_of_a_call_stops_the_run(server, world, when, fault):
    setattr(server, when, lambda batch: fault)
    world.stops(re.escape(fault.message), "--accept-missing", status=3)
    assert len(world.records) == len(server.batches) == 1
    setattr(server, when, lambda batch: None)
    world.ask()
    all_bought_once(world)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("invalid_request_error", CREDIT),
        ("invalid_request_error", "You have reached your specified API usage limits."),
        ("billing_error", "There is an issue with your billing."),
        ("invalid_request_error", DISABLED),
        ("authentication_error", "invalid x-api-key"),
    ],
    ids=["credit", "usage limit", "billing", "disabled", "key"],
)  # fmt: skip
def test_an_account_refusal_in_results_stops_the_run(server, world, kind, message):
    error = {"type": kind, "message": message}
    server.outcome = lambda custom_id, asked: error if number_of(custom_id) > 3 else "succeeded"
    world.stops(re.escape(message), "--accept-missing", status=3)
    assert world.answered == 4 and len(server.batches) == 1 and world.done == [0], "its 3 are in"
    server.outcome = lambda custom_id, asked: "succeeded"
    world.ask("--attempts", "1")
    assert world.answered == 12 and set(server.paid.values()) == {1}


# -- what the API does not give back is not bought again ---------------------------------------------------

LOST = {  # of each retrieval, of the results, words
    "retrieval 404": (Fault(404, "batch not found"), None, "404: batch not found"),
    "results 404": (None, Fault(404, "results expired"), "404: results expired"),
    "foreign ids": (None, Fault(0, kind="foreign"), "12 results of other requests"),
    "no results at all": (None, Fault(0, kind="empty"), "gives back no result"),
    "broken stream": (None, Fault(0, kind="reset"), "do not arrive whole|gives back no result"),
    "results cut in a line": (None, Fault(0, kind="bad_line"), "do not arrive whole"),
    "html": (Fault(0, kind="html"), None, "sends no usable reply"),
    "no_status": (Fault(0, kind="no_status"), None, "sends no usable reply"),
}


@pytest.mark.parametrize(
    "name, submitted_before", [*((name, True) for name in LOST), ("results 404", False), ("foreign ids", False)]
)
def test_a_lost_batch_ends_the_run_and_is_not_bought_again(server, world, name, submitted_before):
    retrieval, results, words = LOST[name]
    if submitted_before:
        world.ask("--submit-only")
    server.retrieve_plan, server.results_plan = lambda batch: retrieval, lambda batch: results
    for _ in range(2):
        line = world.stops(words)
        [record] = world.records
        if "usable" not in words:
            assert server.batches[0].id in line and f"{record['nonce']}.json" in line, "how to give the batch up"
        assert len(server.batches) == 1 and record["batch"] == server.batches[0].id and record["state"] == "submitted"
    server.retrieve_plan = server.results_plan = lambda batch: None
    world.ask()
    all_bought_once(world)


def test_one_lost_batch_is_given_up_and_the_others_are_collected(server, world, monkeypatch):
    monkeypatch.setattr(batches, "MAX_COUNT", 4)
    world.ask("--submit-only")
    lost = server.batches[0]
    server.retrieve_plan = lambda batch: Fault(404) if batch is lost else None
    line = world.stops(f"{lost.id}.*or delete (.*json) to give it up")
    assert world.answered == 8 and len(server.batches) == 3
    Path(re.search(r"delete (\S+)", line)[1]).unlink()
    world.ask()
    assert world.answered == 12 and len(server.batches) == 4 and world.totals.unknown == 1


@pytest.mark.parametrize("kind", ["one_missing", "partly_foreign", "odd_line"])
def test_missing_results_count_as_failures(server, world, kind):
    server.results_plan = lambda batch: Fault(0, kind=kind) if len(batch.requests) > 2 else None
    world.stops("no_result 1", "--attempts", "1")
    assert world.answered == 11 and len(server.batches) == 1
    world.ask()
    assert world.answered == 12 and world.submitted == [12, 1]
    totals, paid = world.totals, paid_usd(server, batch=True)
    assert totals.unknown == 1 and totals.usd < paid < totals.usd + totals.unknown_usd


# -- the client dies ---------------------------------------------------------------------------------------

QUICK = "from teacher import batches, session; batches.SETTLE_SECONDS = 0.3; batches.BACKOFF = 0.05\n"
DIE = "os.kill(os.getpid(), signal.SIGKILL)"
DIE_BEFORE_CREATION = f"""
save = batches.BatchStore.save
def dying(self, record):
    save(self, record)
    if record.batch is None: {DIE}
batches.BatchStore.save = dying
"""
DIE_BEFORE_THE_ID = f"""
from anthropic.resources.messages.batches import AsyncBatches
create = AsyncBatches.create
async def dying(self, **about):
    await create(self, **about)
    {DIE}
AsyncBatches.create = dying
"""
DIE_WHILE_POLLING = f"""
async def dying(self, record): {DIE}
batches._Batches.ended = dying
"""
DIE_WHILE_COLLECTING = f"""
save_reply, count = session.Session.save_reply, []
def dying(self, *about):
    count.append(1)
    if len(count) > 5: {DIE}
    return save_reply(self, *about)
session.Session.save_reply = dying
"""
DEATHS = {  # batches that the API then has, the record's state
    "between intent and creation": (DIE_BEFORE_CREATION, 0, "intent"),
    "between creation and id on disk": (DIE_BEFORE_THE_ID, 1, "intent"),
    "polling": (DIE_WHILE_POLLING, 1, "submitted"),
    "collecting": (DIE_WHILE_COLLECTING, 1, "submitted"),
}


def killed_client(world, patch, tmp_path):
    process = forked(world.flags(), tmp_path / "log.txt", patch=QUICK + patch)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("name", DEATHS)
def test_a_killed_client_attaches_instead_of_paying_again(server, world, name, tmp_path):
    patch, created, state = DEATHS[name]
    killed_client(world, patch, tmp_path)
    assert len(server.batches) == created and [record["state"] for record in world.records] == [state]
    world.ask("--no-cache")
    all_bought_once(world)
    assert world.done == [0, 1, 2, 3] and world.totals.replies == 1
    assert len([line for line in lines_of(world.root / "teacher/spend.jsonl") if "most_usd" in line]) == 1


def test_someone_elses_batch_of_the_same_size_is_not_ours(server, world, tmp_path):
    killed_client(world, DIE_BEFORE_CREATION, tmp_path)
    content = [{"type": "text", "text": '\n{\n"A.": xxx\n}'}]
    params = {"model": "claude-haiku-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": content}]}
    theirs = [{"custom_id": f"other-{number}", "params": params} for number in range(12)]
    server.batches.append(Batch("msgbatch_theirs", world.records[0]["time"] + 1, theirs))
    world.ask()
    assert world.answered == 12 and len(server.batches) == 2


def test_budget_cuts_batches_and_the_next_run_goes_on(server, world):
    world.stops("--max_usd 1e-06", "--max_usd", "0.000001", status=3)
    assert not server.batches
    world.ask("--max_usd", "0.001")  # a worst case of about $0.0001 each: two batches, one after the other
    assert world.answered == 12 and len(server.batches) > 1


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--submit-only"], "--submit-only needs --batch"),
        (["--batch", "--estimate"], "--batch and --estimate do not go together"),
        (["--batch", "--watch"], "--batch and --watch do not go together"),
        (["--batch", "--teacher", "reference"], "--batch has no effect"),
        (["--max_usd", "1", "--teacher_model", "mine"], "--price IN OUT"),
    ],
)
def test_flags_that_do_not_go_together(monkeypatch, wrong, words):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    with pytest.raises(cli.UserError, match=words):
        haiku.parse_args(wrong)
    assert budget.price_of("claude-haiku-5-5").usd(1e6, 1e6, batch=True) == pytest.approx(0.3)
