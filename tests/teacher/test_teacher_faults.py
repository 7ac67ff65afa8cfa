"""What servers and gateways answer besides the API's documented replies: account refusals, permanent errors, replies
of other forms, wrong addresses, echoes of the key. The real client against the local server."""

from __future__ import annotations

import json
import re

import pytest

from ares import cli
from teacher import api_teacher, handoff, reply_files
from teacher.api_responses import is_account_refusal
from teacher.api_teacher import START
from tests.api_server import KEY, Fault
from tests.conftest import one_line_error, run_script
from tests.teacher.teacher_tools import (
    CREDIT,
    ask,
    lay_out,
    scores,
)


@pytest.fixture
def pictures(tmp_path, sample, problems):
    """8 items with an image and 8 without."""
    root = tmp_path / "pictures"
    with_image = [qid for qid in problems if (sample / "images" / qid / "image.png").exists()][:8]
    without = [qid for qid, problem in problems.items() if not problem.get("image")][:8]
    for qid in with_image + without:
        lay_out(root, 0, qid, [f"This is about {qid}."], problems, sample)
    handoff.mark_exported(root)
    return root


def done(questions):
    return [path for path in questions.glob(f"*/{handoff.DONE}")]


# -- the whole account is refused --------------------------------------------------------------------------------


REFUSALS = [
    Fault(400, CREDIT),
    Fault(400, "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC."),
    Fault(400, "You have reached your specified workspace API usage limits."),
    Fault(400, "This organization has been disabled."),
    Fault(402, "no credit"),
    Fault(403, "Your organization acme has been temporarily suspended for unpaid invoices"),
    Fault(429, "You exceeded your current quota, please check your plan and billing details."),
    Fault(
        400, body=json.dumps({"error": {"message": "Budget has been exceeded! Max budget: 10", "code": 400}}).encode()
    ),
    Fault(500, body=json.dumps({"error": f"AnthropicException - {CREDIT}"}).encode()),
    Fault(200, body=json.dumps({"type": "error", "error": {"type": "billing_error", "message": "no"}}).encode()),
    Fault(403, body=b"Insufficient credits. Add more.", content_type="text/plain"),
]


@pytest.mark.parametrize("answered", [0, 2])
@pytest.mark.parametrize("fault", REFUSALS, ids=lambda fault: str(fault.message or fault.body)[:30])
def test_a_refusal_of_the_account_ends_the_run_at_once(server, questions, fault, answered):
    server.plan = lambda asked: fault if len(server.log) >= answered else None
    with pytest.raises(cli.Stop) as error:
        ask(server, questions, "--concurrency", "1", "--accept-missing")
    sentence = (
        fault.message if fault.body is None else re.search("Budget|Your credit|no|Insuff", fault.body.decode())[0]
    )
    assert error.value.status == 3 and sentence[:25] in str(error.value) and "\n" not in str(error.value)
    assert "--teacher_model" not in str(error.value) and "ANTHROPIC_API_KEY" in str(error.value)
    assert len(server.log) == answered + 1 and len(scores(questions)) == answered
    assert not done(questions) and not list(questions.rglob(handoff.REASON))
    server.plan = lambda asked: None
    ask(server, questions)
    assert len(scores(questions)) == 12 and len(done(questions)) == 4


def test_only_the_first_few_requests_meet_a_refusal(server, questions):
    server.latency, server.plan = 0.1, lambda asked: REFUSALS[0]
    with pytest.raises(cli.Stop):
        ask(server, questions)
    assert len(server.log) <= START


@pytest.mark.parametrize(
    "body",
    [
        "messages.0.content: 'the credit balance is too low' is not an image",
        "Number of request tokens has exceeded your per-minute rate limit; see the response headers for current usage",
        "This request would exceed your organization's rate limit of 50,000 input tokens per minute",
        "Output blocked by content filtering policy",
        "prompt is too long: 250000 tokens > 120000 maximum",
        "Internal server error",
        {"error": {"type": "overloaded_error", "message": "Overloaded"}},
        {"detail": "Not Found"}, [], {}, None, 7, {"error": {"message": None}},
    ],
)  # fmt: skip
def test_what_is_no_refusal_of_the_account(body):
    assert not is_account_refusal(body)


# -- the reason ----------------------------------------------------------------------------------------------------


def test_the_sentence_and_the_question_are_kept(server, questions, capsys):
    bad = handoff.iter_items(questions)[5]
    text = (bad.folder / handoff.REQUEST).read_text()
    server.plan = lambda asked: Fault(400, "messages: this one is too odd") if asked.text == text else None
    with pytest.raises(cli.UserError) as error:
        ask(server, questions)
    for text_shown in (str(error.value), capsys.readouterr().out):
        assert "api_400 1" in text_shown or "1 unusable" in text_shown
        assert "messages: this one is too odd" in text_shown and f"question {bad.qid}" in text_shown
    assert (bad.folder / handoff.REASON).read_text() == "api_400: messages: this one is too odd\n"
    assert len(scores(questions)) == 11
    server.plan = lambda asked: None
    ask(server, questions)
    assert not (bad.folder / handoff.REASON).exists()
    (bad.folder / handoff.REPLY).unlink()
    (bad.folder / handoff.REASON).write_text("api_400: messages: this one is too odd\n")
    with pytest.raises(handoff.Refused, match="no_reply"):
        reply_files.read_scores(bad.folder)
    assert "too odd" in (bad.folder / handoff.REASON).read_text(), "RL does not write over it"


@pytest.mark.parametrize(
    "fault",
    [
        lambda n: Fault(500, "no multimodal support"),
        lambda n: Fault(500, f"request req_{n:05} failed: image input is not supported"),
        lambda n: Fault(500, "Internal server error"),
        lambda n: Fault(501, "images"),
        lambda n: Fault(400, "This model does not support image input"),
        lambda n: Fault(200, body=b'{"error": "vision is not supported"}'),
        lambda n: Fault(200, body=b"<html>no images here</html>", content_type="text/html"),
    ],
)
def test_an_error_at_every_request_with_images_ends_the_run(server, pictures, fault):
    server.plan = lambda asked: fault(len(server.log)) if asked.images else None
    with pytest.raises(cli.UserError) as error:
        ask(server, pictures, "--accept-missing")
    first = fault(0)
    words = first.message if first.body is None else first.body.decode()
    assert words.rpartition(": ")[2].strip('"}')[:20] in str(error.value) and "images" in str(error.value)
    assert sum(bool(asked.images) for asked in server.asked) <= 30 and not done(pictures)
    assert len(scores(pictures)) == 8, "those without images are answered"


@pytest.mark.parametrize("text", ["no multimodal support", "cannot do that"])
def test_an_error_at_every_request_ends_the_run_with_its_text(server, questions, text):
    server.plan = lambda asked: Fault(500, text)
    with pytest.raises(cli.UserError, match=text):
        ask(server, questions)
    assert len(server.log) <= 4 * START


def test_errors_that_pass_do_not_end_the_run(server, pictures):
    """A server that fails twice at every image, then not, and one question that it never answers."""
    seen, never = {}, handoff.iter_items(pictures)[0]
    text = (never.folder / handoff.REQUEST).read_text()

    def plan(asked):
        seen[asked.text] = seen.get(asked.text, 0) + 1
        if asked.text == text:
            return Fault(500, "boom")
        return Fault(500, "internal") if asked.images and seen[asked.text] <= 2 else None

    server.plan = plan
    with pytest.raises(cli.UserError, match=f"api_500 1.*question {never.qid}: boom"):
        ask(server, pictures)
    assert len(scores(pictures)) == 15 and seen[text] <= api_teacher.MAX_RETRIES + 1


# -- watching --------------------------------------------------------------------------------------------------------


def test_the_exit_status_and_the_line_of_a_refused_account(server, questions):
    server.plan = lambda asked: REFUSALS[0]
    argv = ["--questions_dir", questions, "--base_url", server.url, "--data_root", "none"]
    ended = run_script("haiku.py", *argv, check=False, env={"ANTHROPIC_API_KEY": KEY})
    assert ended.returncode == 3 and ended.stderr.count("error:") == 1 and CREDIT[:40] in ended.stderr
    ended.returncode = 2
    one_line_error(ended, "ANTHROPIC_API_KEY")
