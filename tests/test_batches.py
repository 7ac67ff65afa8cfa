"""haiku.py --batch with the real anthropic client against a local Batches API; killed at the worst moments."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

import haiku
from ares import batches, claude, cli, feedback
from ares.budget import read_log
from tests.api_server import KEY, ApiServer, Batch, Fault, _Handler, fill_form, score_by_text
from tests.teacher_tools import client, lay_out, lines_of, many_items, scores

QUICK = "from ares import batches; batches.SETTLE_SECONDS = 0.3; batches._BACKOFF = 0.05\n"


@pytest.fixture
def server(monkeypatch, api_environment):
    monkeypatch.setattr(batches, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(batches, "_BACKOFF", 0.05)
    with ApiServer(score_by_text) as server:
        yield server


@pytest.fixture
def questions(tmp_path, problems):
    root = tmp_path / "questions"
    many_items(root, 12, problems)
    return root


def flags(server, questions, *more):
    return ["--questions_dir", str(questions), "--base_url", server.url, "--data_root", "no-data-here", "--batch",
            "--poll_seconds", "0.1", *more]  # fmt: skip


def ask(server, questions, *more):
    haiku.main(flags(server, questions, *more))


def records(questions):
    return [json.loads(path.read_text()) for path in sorted((questions / "teacher/batches").glob("*.json"))]


def test_a_batch_answers_everything_at_half_the_price(server, questions, capsys):
    server.batch_seconds = 0.3
    ask(server, questions)
    assert len(scores(questions)) == 12 and not server.asked, "nothing was asked live"
    assert all(feedback.is_done(questions, action) for action in range(4))
    sidecar = json.loads((feedback.iter_items(questions)[0].folder / feedback.SIDECAR).read_text())
    usage = sidecar["usage"]
    live = (usage["input_tokens"] * 0.10 + usage["output_tokens"] * 0.50) / 1e6
    assert sidecar["batch"] == server.batches[0].id and sidecar["cost_usd"] == pytest.approx(live / 2)
    totals = read_log(questions / "teacher/spend.jsonl")
    paid = (server.billed["batch_input_tokens"] * 0.10 + server.billed["batch_output_tokens"] * 0.50) / 2e6
    assert totals.usd == pytest.approx(paid) and totals.unknown == 0
    assert [record["state"] for record in records(questions)] == ["collected"]
    ask(server, questions)
    assert len(server.batches) == 1


def test_scores_are_those_of_live_asking(server, questions, tmp_path):
    other = tmp_path / "live"
    shutil.copytree(questions, other)
    ask(server, questions)
    haiku.main(["--questions_dir", str(other), "--base_url", server.url, "--data_root", "none", "--no-cache"])
    assert scores(questions) == scores(other) and len(server.asked) == 12


def test_shards_by_count_and_by_bytes(server, questions, problems, sample, monkeypatch):
    for qid in ("952", "363"):
        lay_out(questions, 0, qid, ["Look at it."], problems, sample)
    monkeypatch.setattr(batches, "MAX_COUNT", 5)
    ask(server, questions)
    assert sorted(len(batch.requests) for batch in server.batches) == [4, 5, 5]
    assert sum(len(batch.requests) for batch in server.batches) == 14
    for item in feedback.iter_items(questions):
        (item.folder / feedback.REPLY).unlink()
    before = len(server.batches)
    monkeypatch.setattr(batches, "MAX_COUNT", 100)
    monkeypatch.setattr(batches, "MAX_BYTES", 20_000)
    ask(server, questions, "--no-cache")
    sizes = [len(json.dumps(batch.requests)) for batch in server.batches[before:]]
    assert len(sizes) > 2 and all(size <= 20_000 or len(batch.requests) == 1
                                  for size, batch in zip(sizes, server.batches[before:], strict=True))  # fmt: skip


def test_expired_and_errored_are_asked_again(server, questions):
    seen = set()

    def outcome(custom_id, asked):
        first = asked.text not in seen
        seen.add(asked.text)
        number = int(custom_id.rsplit("-", 1)[1])
        return ("succeeded", "expired", "errored", "canceled")[number % 4] if first else "succeeded"

    server.outcome = outcome
    ask(server, questions)
    assert len(scores(questions)) == 12
    assert [len(batch.requests) for batch in server.batches] == [12, 9]


def test_what_keeps_failing_is_reported_by_reason(server, questions):
    poor = feedback.iter_items(questions)[0]
    text = (poor.folder / feedback.REQUEST).read_text()
    server.outcome = lambda custom_id, asked: "expired" if asked.text == text else "succeeded"
    with pytest.raises(cli.UserError, match="1 of 12 replies are unusable .expired 1."):
        ask(server, questions)
    assert len(server.batches) == batches.MAX_FAILURES and len(scores(questions)) == 11


def test_unusable_replies_are_asked_again_with_the_reason(server, questions):
    told = []

    def respond(asked):
        told.append(asked.notes)
        return fill_form(asked) if len(asked.notes) > 1 else ("I like it.", "end_turn")

    server.respond = respond
    ask(server, questions)
    assert [len(batch.requests) for batch in server.batches] == [12, 12]
    assert all("no_json" in notes[1] for notes in told[12:])


def test_submit_now_collect_later(server, questions, capsys):
    server.batch_seconds = 1000
    ask(server, questions, "--submit-only")
    assert "1 batches with 12 requests are out" in capsys.readouterr().out and not scores(questions)
    with pytest.raises(cli.UserError, match="1 batches with 12 requests are out.*--batch"):
        haiku.main(["--questions_dir", str(questions), "--base_url", server.url, "--data_root", "none"])
    with pytest.raises(cli.UserError, match="--teacher_model.*claude-haiku-5-5"):
        ask(server, questions, "--teacher_model", "claude-haiku-4-5-20251001")
    ask(server, questions, "--submit-only")
    assert len(server.batches) == 1 and not server.asked
    server.batch_seconds = 0  # it ends while no client runs
    ask(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1


def test_collecting_some_actions_does_not_throw_away_the_others(server, questions):
    ask(server, questions, "--submit-only")
    with pytest.raises(cli.UserError, match="--actions: the batches that are out hold action 1"):
        ask(server, questions, "--actions", "0")
    ask(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1
    ask(server, questions, "--actions", "0")  # nothing is out


def test_a_changed_rationale_does_not_get_an_old_reply(server, questions, problems):
    ask(server, questions, "--submit-only")
    item = feedback.iter_items(questions)[0]
    lay_out(questions, item.action, item.qid, ["Quite another thought."], problems)
    ask(server, questions)
    assert [len(batch.requests) for batch in server.batches] == [12, 1]
    assert len((item.folder / feedback.SCORES).read_text().split()) == 1


def test_results_that_break_off_and_errors_that_pass(server, questions):
    server.batch_faults.extend([Fault(529), Fault(429, headers={"retry-after": "0.1"})])
    server.result_faults.extend([Fault(0, kind="reset"), Fault(529)])
    ask(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1


def test_results_that_end_early_are_fetched_again_and_not_paid_again(server, questions, monkeypatch):
    """A stream may end between two lines without an error; what it lacks has not expired."""
    ask(server, questions, "--submit-only")
    whole = server.results_of
    cuts = [whole(server.batches[0])[:5], whole(server.batches[0])[:7]]

    def short(handler, batch):
        lines = cuts.pop() if cuts else whole(batch)
        handler.send_bytes(200, "".join(f"{line}\n" for line in lines).encode(), {}, "application/x-jsonl")

    monkeypatch.setattr(_Handler, "batch_results", short)
    ask(server, questions)
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
        ask(server, questions)
    assert "\n" not in str(error.value) and not records(questions)
    ask(server, questions)
    assert len(scores(questions)) == 12


def test_results_that_are_gone_are_asked_for_again(server, questions, capsys):
    ask(server, questions, "--submit-only")
    server.batches.clear()
    ask(server, questions)
    assert "are gone; its 12 requests are asked again" in capsys.readouterr().err
    assert len(scores(questions)) == 12 and read_log(questions / "teacher/spend.jsonl").unknown == 1


# -- the client dies ---------------------------------------------------------------------------------------

DIE_BEFORE_CREATION = QUICK + (
    "save = batches.Store.save\n"
    "def dying(self, record):\n"
    "    save(self, record)\n"
    "    if record.batch is None: os.kill(os.getpid(), signal.SIGKILL)\n"
    "batches.Store.save = dying\n"
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
    "from ares.answering import Session\n"
    "lay_down, count = Session.lay_down, []\n"
    "def dying(self, *about):\n"
    "    count.append(1)\n"
    "    if len(count) > 5: os.kill(os.getpid(), signal.SIGKILL)\n"
    "    return lay_down(self, *about)\n"
    "Session.lay_down = dying\n"
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
    killed = client(*flags(server, questions), patch=patch)
    out, err = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, (out, err)
    assert len(server.batches) == created
    assert [record["state"] for record in records(questions)] == [state]
    ask(server, questions, "--no-cache")
    assert len(scores(questions)) == 12 and len(server.batches) == 1, "exactly one batch was ever paid for"
    assert all(feedback.is_done(questions, action) for action in range(4))
    opened = [line for line in lines_of(questions / "teacher/spend.jsonl") if "most_usd" in line]
    assert len(opened) == 1
    totals = read_log(questions / "teacher/spend.jsonl")
    assert totals.unknown == 0 and totals.replies == 1


def test_someone_elses_batch_of_the_same_size_is_not_ours(server, questions):
    killed = client(*flags(server, questions), patch=DIE_BEFORE_CREATION)
    killed.communicate(timeout=60)
    content = [{"type": "text", "text": '\n{\n"A.": xxx\n}'}]
    params = {"model": "claude-haiku-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": content}]}
    theirs = [{"custom_id": f"other-{number}", "params": params} for number in range(12)]
    server.batches.append(Batch("msgbatch_theirs", records(questions)[0]["time"] + 1, theirs))
    ask(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 2


def test_a_creation_whose_answer_was_lost_is_found(server, questions):
    server.batch_faults.append(Fault(0, kind="lost"))
    ask(server, questions)
    assert len(scores(questions)) == 12 and len(server.batches) == 1


def test_budget_cuts_batches_and_the_next_run_goes_on(server, questions, monkeypatch):
    with pytest.raises(cli.Stop, match="--max_usd 1e-06") as stop:
        ask(server, questions, "--max_usd", "0.000001")
    assert stop.value.status == 3 and not server.batches
    ask(
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
    assert claude.price_of("claude-haiku-5-5").usd(1e6, 1e6, batch=True) == pytest.approx(0.3)
