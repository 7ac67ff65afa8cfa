"""haiku.py --batch where calls fail, the account is refused, or the client is killed at the worst moments."""

from __future__ import annotations

import json
import signal

import pytest

import haiku
from ares import cli
from teacher import handoff
from teacher.budget import read_log
from tests.api_server import Batch, Fault
from tests.teacher.teacher_tools import (
    CREDIT,
    ask_in_batches,
    batch_flags,
    batch_records,
    client,
    lay_out,
    lines_of,
    scores,
)

QUICK = "from teacher import batches, session; batches.SETTLE_SECONDS = 0.3; batches.BACKOFF = 0.05\n"


ACCOUNT = {
    "credit": {"type": "invalid_request_error", "message": CREDIT},
    "usage limit": {
        "type": "invalid_request_error",
        "message": "You have reached your specified API usage limits. You will regain access on 2026-12-01.",
    },
    "billing": {"type": "billing_error", "message": "There is an issue with your billing."},
    "disabled": {"type": "invalid_request_error", "message": "This organization has been disabled."},
    "key": {"type": "authentication_error", "message": "invalid x-api-key"},
}


@pytest.mark.parametrize("name", ACCOUNT)
def test_an_account_refusal_in_results_stops_the_run(server, questions, name):
    server.outcome = lambda custom_id, asked: ACCOUNT[name] if int(custom_id.rsplit("-", 1)[1]) > 3 else "succeeded"
    with pytest.raises(cli.Stop) as stop:
        ask_in_batches(server, questions, "--accept-missing")
    assert stop.value.status == 3 and ACCOUNT[name]["message"] in str(stop.value)
    assert len(scores(questions)) == 4 and len(server.batches) == 1
    assert [handoff.is_done(questions, action) for action in range(4)] == [True, False, False, False], "3 are in"
    server.outcome = lambda custom_id, asked: "succeeded"
    ask_in_batches(server, questions, "--attempts", "1")
    assert len(scores(questions)) == 12 and set(server.paid.values()) == {1}


@pytest.mark.parametrize("when", ["creation", "retrieval", "results"])
@pytest.mark.parametrize(
    "status, message", [(400, CREDIT), (402, "Payment required"), (403, ACCOUNT["disabled"]["message"])]
)
def test_an_account_refusal_of_a_call_stops_the_run(server, questions, when, status, message):
    fault = Fault(status, message)
    if when == "creation":
        server.batch_faults.append(fault)
    else:
        setattr(server, {"retrieval": "retrieve_plan", "results": "results_plan"}[when], lambda batch: fault)
    with pytest.raises(cli.Stop) as stop:
        ask_in_batches(server, questions, "--accept-missing")
    assert stop.value.status == 3 and message in str(stop.value) and "\n" not in str(stop.value)
    assert len(batch_records(questions)) == len(server.batches) == (when != "creation")
    server.retrieve_plan = server.results_plan = lambda batch: None
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1


@pytest.mark.parametrize("kind", ["invalid_request_error", "request_too_large", "not_found_error"])
def test_a_request_that_the_api_calls_invalid_is_not_submitted_again(server, questions, problems, kind):
    said = "messages.0.content.0: Could not process image"
    poor = handoff.iter_items(questions)[5]
    text = (poor.folder / handoff.REQUEST).read_text()
    server.outcome = lambda custom_id, asked: {"type": kind, "message": said} if asked.text == text else "succeeded"
    for _ in range(2):
        with pytest.raises(cli.UserError, match=f"1 of 12 replies are unusable .errored_{kind} 1."):
            ask_in_batches(server, questions)
        assert [len(batch.requests) for batch in server.batches] == [12]
        assert (poor.folder / handoff.REASON).read_text() == f"errored_{kind}: {said}\n"
    lay_out(questions, poor.action, poor.qid, ["Another thought."], problems)
    ask_in_batches(server, questions)  # another request
    assert [len(batch.requests) for batch in server.batches] == [12, 1] and len(scores(questions)) == 12


def test_pending_batches_are_of_one_model_and_one_teacher(server, questions, sample):
    data = sample / "ScienceQA/data"
    ask_in_batches(server, questions, "--submit-only")
    with pytest.raises(cli.UserError, match="--teacher_model.*claude-haiku-5-5"):
        ask_in_batches(server, questions, "--teacher_model", "claude-haiku-4-5-20251001")
    with pytest.raises(cli.UserError, match="12 requests are pending .*asked of claude-haiku-5-5.*--batch"):
        haiku.main(["--questions_dir", str(questions), "--teacher", "reference", "--data_root", str(data)])
    assert not scores(questions)


NOT_CREATED = [*map(Fault, (404, 408, 413, 429, 500, 503, 529)), Fault(0, kind="dropped"), Fault(0, kind="html")]


@pytest.mark.parametrize("fault", NOT_CREATED, ids=lambda fault: fault.name)
def test_a_batch_that_is_not_created_leaves_no_intent(server, questions, fault):
    server.create_plan = lambda: fault
    with pytest.raises(cli.UserError) as error:
        ask_in_batches(server, questions)
    assert "\n" not in str(error.value) and not batch_records(questions) and not server.batches
    haiku.main(["--questions_dir", str(questions), "--base_url", server.url, "--data_root", "none"])
    assert len(scores(questions)) == 12 and read_log(questions / "teacher/spend.jsonl").unknown == 0


@pytest.mark.parametrize("fault", [Fault(504, kind="created"), Fault(500, kind="created"), Fault(0, kind="lost")],
                         ids=["504", "500", "lost"])  # fmt: skip
def test_a_batch_that_may_exist_is_looked_up(server, questions, fault):
    server.batch_faults.append(fault)
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1


def test_a_damaged_record_is_named(server, questions):
    ask_in_batches(server, questions, "--submit-only")
    [path] = (questions / "teacher/batches").glob("*.json")
    sound = json.loads(path.read_text())
    changed = ({"asked": None}, {"asked": {"x": 1}}, {"count": "12"}, {"batch": None}, {"nonce": "../x"}, {"more": 1})
    for damaged in ("null", "[]", "{", '{"nonce": 1}', "[" * 100_000, *(json.dumps(sound | each) for each in changed)):
        path.write_text(damaged)
        for way in (["--batch"], []):
            with pytest.raises(cli.UserError, match=f"{path.name} is damaged"):
                haiku.main(["--questions_dir", str(questions), "--base_url", server.url, "--data_root", "none", *way])
    path.write_text(json.dumps(sound))
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1


DIE_BEFORE_CREATION = QUICK + (
    "save = batches.BatchStore.save\n"
    "def dying(self, record):\n"
    "    save(self, record)\n"
    "    if record.batch is None: os.kill(os.getpid(), signal.SIGKILL)\n"
    "batches.BatchStore.save = dying\n"
)


DIE_BEFORE_THE_ID = QUICK + (
    "from anthropic.resources.messages.batches import AsyncBatches\n"
    "create = AsyncBatches.create\n"
    "async def dying(self, **about):\n"
    "    await create(self, **about)\n"
    "    os.kill(os.getpid(), signal.SIGKILL)\n"
    "AsyncBatches.create = dying\n"
)


DIE_WHILE_POLLING = QUICK + (
    "async def dying(self, record):\n    os.kill(os.getpid(), signal.SIGKILL)\nbatches._Batches.ended = dying\n"
)


DIE_WHILE_COLLECTING = QUICK + (
    "save_reply, count = session.Session.save_reply, []\n"
    "def dying(self, *about):\n"
    "    count.append(1)\n"
    "    if len(count) > 5: os.kill(os.getpid(), signal.SIGKILL)\n"
    "    return save_reply(self, *about)\n"
    "session.Session.save_reply = dying\n"
)


@pytest.mark.parametrize(
    "patch, created, state",
    [
        (DIE_BEFORE_CREATION, 0, "intent"),
        (DIE_BEFORE_THE_ID, 1, "intent"),
        (DIE_WHILE_POLLING, 1, "submitted"),
        (DIE_WHILE_COLLECTING, 1, "submitted"),
    ],
    ids=["between intent and creation", "between creation and id on disk", "polling", "collecting"],
)
def test_a_killed_client_attaches_instead_of_paying_again(server, questions, patch, created, state):
    killed = client(*batch_flags(server, questions), patch=patch)
    out, err = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, (out, err)
    assert len(server.batches) == created
    assert [record["state"] for record in batch_records(questions)] == [state]
    ask_in_batches(server, questions, "--no-cache")
    assert len(scores(questions)) == 12 and len(server.batches) == 1, "exactly one batch was ever paid for"
    assert all(handoff.is_done(questions, action) for action in range(4))
    opened = [line for line in lines_of(questions / "teacher/spend.jsonl") if "most_usd" in line]
    assert len(opened) == 1
    totals = read_log(questions / "teacher/spend.jsonl")
    assert totals.unknown == 0 and totals.replies == 1


def test_someone_elses_batch_of_the_same_size_is_not_ours(server, questions):
    killed = client(*batch_flags(server, questions), patch=DIE_BEFORE_CREATION)
    killed.communicate(timeout=60)
    content = [{"type": "text", "text": '\n{\n"A.": xxx\n}'}]
    params = {"model": "claude-haiku-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": content}]}
    theirs = [{"custom_id": f"other-{number}", "params": params} for number in range(12)]
    server.batches.append(Batch("msgbatch_theirs", batch_records(questions)[0]["time"] + 1, theirs))
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 2


def test_a_creation_whose_answer_was_lost_is_found(server, questions):
    server.batch_faults.append(Fault(0, kind="lost"))
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1
