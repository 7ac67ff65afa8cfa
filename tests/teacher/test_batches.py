"""haiku.py --batch with the real anthropic client against a local Batches API; killed at the worst moments."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import haiku
from ares import cli
from teacher import batches, budget, handoff
from teacher.budget import read_log
from tests.api_server import KEY, Fault, _Handler, fill_form
from tests.teacher.teacher_tools import (
    OVERLOADED,
    ask_in_batches,
    batch_records,
    lay_out,
    paid_usd,
    scores,
)

QUICK = "from teacher import batches, session; batches.SETTLE_SECONDS = 0.3; batches.BACKOFF = 0.05\n"


def test_a_batch_answers_everything_at_half_the_price(server, questions, capsys):
    server.batch_seconds = 0.3
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and not server.asked, "nothing was asked live"
    assert all(handoff.is_done(questions, action) for action in range(4))
    sidecar = json.loads((handoff.iter_items(questions)[0].folder / handoff.SIDECAR).read_text())
    usage = sidecar["usage"]
    live = (usage["input_tokens"] * 0.10 + usage["output_tokens"] * 0.50) / 1e6
    assert sidecar["batch"] == server.batches[0].id and sidecar["cost_usd"] == pytest.approx(live / 2)
    totals = read_log(questions / "teacher/spend.jsonl")
    paid = paid_usd(server, batch=True)
    assert totals.usd == pytest.approx(paid) and totals.unknown == 0
    assert [record["state"] for record in batch_records(questions)] == ["collected"]
    ask_in_batches(server, questions)
    assert len(server.batches) == 1


def test_scores_are_those_of_live_asking(server, questions, tmp_path):
    other = tmp_path / "live"
    shutil.copytree(questions, other)
    ask_in_batches(server, questions)
    haiku.main(["--questions_dir", str(other), "--base_url", server.url, "--data_root", "none", "--no-cache"])
    assert scores(questions) == scores(other) and len(server.asked) == 12


def test_shards_by_count_and_by_bytes(server, questions, problems, sample, monkeypatch):
    for qid in ("952", "363"):
        lay_out(questions, 0, qid, ["Look at it."], problems, sample)
    monkeypatch.setattr(batches, "MAX_COUNT", 5)
    ask_in_batches(server, questions)
    assert sorted(len(batch.requests) for batch in server.batches) == [4, 5, 5]
    assert sum(len(batch.requests) for batch in server.batches) == 14
    for item in handoff.iter_items(questions):
        (item.folder / handoff.REPLY).unlink()
    before = len(server.batches)
    monkeypatch.setattr(batches, "MAX_COUNT", 100)
    monkeypatch.setattr(batches, "MAX_BYTES", 20_000)
    ask_in_batches(server, questions, "--no-cache")
    sizes = [len(json.dumps(batch.requests)) for batch in server.batches[before:]]
    assert len(sizes) > 2 and all(size <= 20_000 or len(batch.requests) == 1
                                  for size, batch in zip(sizes, server.batches[before:], strict=True))  # fmt: skip


def test_expired_and_errored_are_asked_again(server, questions):
    seen = set()

    def outcome(custom_id, asked):
        first = asked.text not in seen
        seen.add(asked.text)
        number = int(custom_id.rsplit("-", 1)[1])
        return ("succeeded", "expired", "errored", OVERLOADED)[number % 4] if first else "succeeded"

    server.outcome = outcome
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12
    assert [len(batch.requests) for batch in server.batches] == [12, 9]


def test_what_keeps_failing_is_reported_by_reason(server, questions):
    poor = handoff.iter_items(questions)[0]
    text = (poor.folder / handoff.REQUEST).read_text()
    server.outcome = lambda custom_id, asked: "expired" if asked.text == text else "succeeded"
    with pytest.raises(cli.UserError, match="1 of 12 replies are unusable .expired 1.*larger --attempts"):
        ask_in_batches(server, questions)
    assert [len(batch.requests) for batch in server.batches] == [12, 1, 1] and len(scores(questions)) == 11
    with pytest.raises(cli.UserError, match="1 of 12 replies are unusable .expired 1."):
        ask_in_batches(server, questions)
    assert len(server.batches) == 3, "--attempts counts over runs"
    server.outcome = lambda custom_id, asked: "succeeded"
    ask_in_batches(server, questions, "--attempts", "4")
    assert len(server.batches) == 4 and len(scores(questions)) == 12


def test_unusable_replies_are_asked_again_with_the_reason(server, questions):
    notes_seen = []

    def respond(asked):
        notes_seen.append(asked.notes)
        return fill_form(asked) if len(asked.notes) > 1 else ("I like it.", "end_turn")

    server.respond = respond
    ask_in_batches(server, questions)
    assert [len(batch.requests) for batch in server.batches] == [12, 12]
    assert all("no_json" in notes[1] for notes in notes_seen[12:])


def test_submit_now_collect_later(server, questions, capsys):
    server.batch_seconds = 1000
    ask_in_batches(server, questions, "--submit-only")
    assert "1 batches with 12 requests are pending" in capsys.readouterr().out and not scores(questions)
    with pytest.raises(cli.UserError, match="1 batches with 12 requests are pending.*--batch"):
        haiku.main(["--questions_dir", str(questions), "--base_url", server.url, "--data_root", "none"])
    with pytest.raises(cli.UserError, match="--teacher_model.*claude-haiku-5-5"):
        ask_in_batches(server, questions, "--teacher_model", "claude-haiku-4-5-20251001")
    ask_in_batches(server, questions, "--submit-only")
    assert len(server.batches) == 1 and not server.asked
    server.batch_seconds = 0  # it ends while no client runs
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1


def test_a_batch_recorded_by_an_earlier_version_is_collected(server, questions):
    """Its entries have no "key" but "failures" (commit 12494b9)."""
    ask_in_batches(server, questions, "--submit-only")
    (path,) = (questions / "teacher/batches").glob("*.json")
    record = json.loads(path.read_text())
    record["asked"] = {
        name: {"item": asked["item"], "text": asked["text"], "attempt": 1, "failures": 0}
        for name, asked in record["asked"].items()
    }
    path.write_text(json.dumps({**record, "hash": "0" * 64}))
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1


def test_collecting_some_actions_does_not_throw_away_the_others(server, questions):
    ask_in_batches(server, questions, "--submit-only")
    with pytest.raises(cli.UserError, match="--actions: the pending batches hold action 1"):
        ask_in_batches(server, questions, "--actions", "0")
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1
    ask_in_batches(server, questions, "--actions", "0")  # nothing is out


def test_a_changed_rationale_does_not_get_an_old_reply(server, questions, problems):
    ask_in_batches(server, questions, "--submit-only")
    item = handoff.iter_items(questions)[0]
    lay_out(questions, item.action, item.qid, ["Quite another thought."], problems)
    ask_in_batches(server, questions)
    assert [len(batch.requests) for batch in server.batches] == [12, 1]
    assert len((item.folder / handoff.SCORES).read_text().split()) == 1


def test_results_that_break_off_and_errors_that_pass(server, questions):
    server.batch_faults.extend([Fault(529), Fault(429, headers={"retry-after": "0.1"})])
    server.result_faults.extend([Fault(0, kind="reset"), Fault(529)])
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1


def test_results_that_end_early_are_fetched_again_and_not_paid_again(server, questions, monkeypatch):
    """A stream may end between two lines without an error; what it lacks has not expired."""
    ask_in_batches(server, questions, "--submit-only")
    whole = server.results_of
    cuts = [whole(server.batches[0])[:5], whole(server.batches[0])[:7]]

    def short(handler, batch):
        lines = cuts.pop() if cuts else whole(batch)
        handler.send_bytes(200, "".join(f"{line}\n" for line in lines).encode(), {}, "application/x-jsonl")

    monkeypatch.setattr(_Handler, "batch_results", short)
    ask_in_batches(server, questions)
    assert not cuts and len(scores(questions)) == 12 and len(server.batches) == 1


@pytest.mark.parametrize(
    "fault, words",
    [
        (Fault(400, "too odd"), "too odd"),
        (Fault(403, "not yours"), "not yours"),
        (Fault(429, "limit", error_code="enforced_spend_limit_reached"), "spend limit"),
    ],
)
def test_errors_that_last_stop_in_one_line(server, questions, fault, words):
    server.batch_faults.append(fault)
    with pytest.raises(cli.UserError, match=words) as error:
        ask_in_batches(server, questions)
    assert "\n" not in str(error.value) and not batch_records(questions)
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12


# -- what the API does not give back is not bought again ---------------------------------------------------


LOST = {
    "retrieval 404": (Fault(404, "batch not found"), None, "404: batch not found"),
    "results 404": (None, Fault(404, "results expired"), "404: results expired"),
    "foreign ids": (None, Fault(0, kind="foreign"), "12 results of other requests"),
    "no results at all": (None, Fault(0, kind="empty"), "gives back no result"),
    "broken stream": (None, Fault(0, kind="reset"), "do not arrive whole|gives back no result"),
    "results cut in a line": (None, Fault(0, kind="bad_line"), "do not arrive whole"),
}


@pytest.mark.parametrize("submitted_before", [True, False], ids=["of an earlier run", "of this run"])
@pytest.mark.parametrize("name", LOST)
def test_a_lost_batch_ends_the_run_and_is_not_bought_again(server, questions, name, submitted_before):
    retrieval, results, words = LOST[name]
    if submitted_before:
        ask_in_batches(server, questions, "--submit-only")
    server.retrieve_plan, server.results_plan = lambda batch: retrieval, lambda batch: results
    for _ in range(2):
        with pytest.raises(cli.UserError, match=words) as error:
            ask_in_batches(server, questions)
        [record] = batch_records(questions)
        assert "\n" not in str(error.value) and server.batches[0].id in str(error.value)
        assert f"{record['nonce']}.json" in str(error.value), "how to give the batch up"
        assert len(server.batches) == 1 and record["batch"] == server.batches[0].id and record["state"] == "submitted"
    server.retrieve_plan = server.results_plan = lambda batch: None
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1 and set(server.paid.values()) == {1}
    assert read_log(questions / "teacher/spend.jsonl").unknown == 0


def test_a_lost_batch_that_is_given_up_is_asked_again(server, questions):
    ask_in_batches(server, questions, "--submit-only")
    lost = server.batches[0]
    server.retrieve_plan = lambda batch: Fault(404) if batch is lost else None
    with pytest.raises(cli.UserError, match="or delete (.*json) to give it up") as error:
        ask_in_batches(server, questions)
    Path(re.search(r"delete (\S+)", str(error.value))[1]).unlink()
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 2
    assert read_log(questions / "teacher/spend.jsonl").unknown == 1


def test_one_lost_batch_does_not_keep_the_others_from_being_collected(server, questions, monkeypatch):
    monkeypatch.setattr(batches, "MAX_COUNT", 4)
    ask_in_batches(server, questions, "--submit-only")
    lost = server.batches[0]
    server.retrieve_plan = lambda batch: Fault(404) if batch is lost else None
    with pytest.raises(cli.UserError, match=lost.id):
        ask_in_batches(server, questions)
    assert len(scores(questions)) == 8 and len(server.batches) == 3


@pytest.mark.parametrize("kind", ["no_url", "relative_url", "foreign_url"])
def test_results_come_from_the_documented_path(server, questions, kind):
    """`results_url` may be missing, or lead with the key to another host."""
    server.retrieve_plan = lambda batch: Fault(0, kind=kind)
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1


@pytest.mark.parametrize("kind", ["html", "no_status"])
def test_an_answer_that_is_no_batch_ends_in_one_line(server, questions, kind):
    ask_in_batches(server, questions, "--submit-only")
    server.retrieve_plan = lambda batch: Fault(0, kind=kind)
    with pytest.raises(cli.UserError, match="sends no usable reply") as error:
        ask_in_batches(server, questions)
    assert "\n" not in str(error.value) and len(batch_records(questions)) == len(server.batches) == 1


@pytest.mark.parametrize("kind", ["one_missing", "partly_foreign", "odd_line"])
def test_missing_results_count_as_failures(server, questions, kind):
    server.results_plan = lambda batch: Fault(0, kind=kind) if len(batch.requests) > 2 else None
    with pytest.raises(cli.UserError, match="no_result 1"):
        ask_in_batches(server, questions, "--attempts", "1")
    assert len(scores(questions)) == 11 and len(server.batches) == 1
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and [len(batch.requests) for batch in server.batches] == [12, 1]
    totals = read_log(questions / "teacher/spend.jsonl")
    paid = paid_usd(server, batch=True)
    assert totals.unknown == 1 and totals.usd < paid < totals.usd + totals.unknown_usd


def test_results_that_come_twice_count_once(server, questions):
    server.results_plan = lambda batch: Fault(0, kind="twice")
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1
    paid = paid_usd(server, batch=True)
    assert read_log(questions / "teacher/spend.jsonl").usd == pytest.approx(paid)


def test_a_cancelled_batch_stops_the_run(server, questions):
    """Cancelled in the Console: the replies that are there are saved, and nothing is bought again in this run."""
    server.outcome = lambda custom_id, asked: "canceled" if int(custom_id.rsplit("-", 1)[1]) > 4 else "succeeded"
    for _ in range(4):  # free, and the user's own act: no attempt
        with pytest.raises(cli.UserError, match="was cancelled before .* of its .* requests") as error:
            ask_in_batches(server, questions, "--attempts", "2")
        assert server.batches[-1].id in str(error.value) and "\n" not in str(error.value)
        if len(server.batches) == 1:
            assert len(scores(questions)) == 5
            server.outcome = lambda custom_id, asked: "canceled"
    assert [len(batch.requests) for batch in server.batches] == [12, 7, 7, 7]
    server.outcome = lambda custom_id, asked: "succeeded"
    ask_in_batches(server, questions)
    assert len(scores(questions)) == 12 and set(server.paid.values()) == {1}


# -- the client dies ---------------------------------------------------------------------------------------


def test_budget_cuts_batches_and_the_next_run_goes_on(server, questions, monkeypatch):
    with pytest.raises(cli.Stop, match="--max_usd 1e-06") as stop:
        ask_in_batches(server, questions, "--max_usd", "0.000001")
    assert stop.value.status == 3 and not server.batches
    ask_in_batches(
        server, questions, "--max_usd", "0.001"
    )  # a worst case of about $0.0001 each: two batches, one after the other
    assert len(scores(questions)) == 12 and len(server.batches) > 1


def test_flags(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    for wrong, words in (
        (["--submit-only"], "--submit-only needs --batch"),
        (["--batch", "--estimate"], "--batch and --estimate do not go together"),
        (["--batch", "--teacher", "reference"], "--batch has no effect"),
        (["--max_usd", "1", "--teacher_model", "mine"], "--price IN OUT"),
    ):
        with pytest.raises(cli.UserError, match=words):
            haiku.parse_args(wrong)
    assert budget.price_of("claude-haiku-5-5").usd(1e6, 1e6, batch=True) == pytest.approx(0.3)
