"""What servers and gateways answer besides the API's documented replies: account refusals, permanent errors, replies
of other forms, wrong addresses, echoes of the key. The real client against the local server."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
import urllib.parse

import pytest

import haiku
import haiku_for_correction_feedback
import preprocessing_for_correction_feedback
from ares import cli, files
from teacher import api_teacher, claude, handoff
from teacher.api_responses import is_account_refusal, redact
from teacher.api_teacher import START
from teacher.budget import read_log
from teacher.interface import same_model
from tests.api_server import KEY, ApiServer, Fault, fill_form
from tests.conftest import one_line_error, run_script
from tests.teacher.teacher_tools import lay_out, many_items, scores
from tests.teacher.test_teacher import CHOICES, PICTURE, TEXT
from tools import win_rate


@pytest.fixture
def server(monkeypatch, api_environment):
    monkeypatch.setattr(api_teacher, "BACKOFF", 0.02)
    with ApiServer() as server:
        yield server


@pytest.fixture
def questions(tmp_path, problems):
    many_items(tmp_path / "questions", 12, problems)
    return tmp_path / "questions"


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


def ask(server, questions, *flags):
    url = flags[flags.index("--base_url") + 1] if "--base_url" in flags else server.url
    haiku.main(["--questions_dir", str(questions), "--data_root", "none", *flags, "--base_url", url])


def done(questions):
    return [path for path in questions.glob(f"*/{handoff.DONE}")]


# -- the whole account is refused --------------------------------------------------------------------------------

CREDIT = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to upgrade."
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
    for told in (str(error.value), capsys.readouterr().out):
        assert "api_400 1" in told or "1 unusable" in told
        assert "messages: this one is too odd" in told and f"question {bad.qid}" in told
    assert (bad.folder / handoff.REASON).read_text() == "api_400: messages: this one is too odd\n"
    assert len(scores(questions)) == 11
    server.plan = lambda asked: None
    ask(server, questions)
    assert not (bad.folder / handoff.REASON).exists()
    (bad.folder / handoff.REPLY).unlink()
    (bad.folder / handoff.REASON).write_text("api_400: messages: this one is too odd\n")
    with pytest.raises(handoff.Refused, match="no_reply"):
        handoff.read_scores(bad.folder)
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


# -- replies of other forms ------------------------------------------------------------------------------------------


def messages(**changes):
    def made(text):
        message = {"type": "message", "role": "assistant", "model": "claude-haiku-5-5", "stop_reason": "end_turn"}
        message |= {"content": [{"type": "text", "text": text}], "usage": {"input_tokens": 9, "output_tokens": 9}}
        message |= {name: value(text) if callable(value) else value for name, value in changes.items()}
        return json.dumps({name: value for name, value in message.items() if value != "absent"})

    return made


def events(*objects):
    return "".join(f"data: {json.dumps(each)}\n\n" for each in objects)


READABLE = {
    "no usage": messages(usage="absent"),
    "null usage": messages(usage=None),
    "usage of other words": messages(usage={"tokens": 4}),
    "usage of nulls": messages(usage={"input_tokens": None, "output_tokens": None}),
    "content a string": messages(content=lambda text: text),
    "blocks without a type": messages(content=lambda text: [{"text": text}]),
    "bare": lambda text: json.dumps({"content": text}),
    "thinking first": messages(content=lambda text: [{"type": "thinking"}, {"type": "text", "text": text}]),
    "openai": lambda text: json.dumps(
        {"model": "gpt", "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
         "usage": {"prompt_tokens": 9, "completion_tokens": 9}}),
    "openai parts": lambda text: json.dumps({"choices": [{"message": {"content": [{"type": "text", "text": text}]}}]}),
    "completion": lambda text: json.dumps({"choices": [{"text": text}]}),
    "ollama": lambda text: json.dumps({"message": {"role": "assistant", "content": text}, "done": True}),
    "events": lambda text: "event: message_start\n" + events(
        {"type": "message_start", "message": {"model": "claude-haiku-5-5", "usage": {"input_tokens": 9}}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text[:4]}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text[4:]}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}},
        {"type": "message_stop"}),
    "openai events": lambda text: events(
        {"choices": [{"delta": {"content": text}}]}, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
        + "data: [DONE]\n",
    "byte order mark": lambda text: "\ufeff" + messages()(text),
}  # fmt: skip
COUNTED = ("content a string", "blocks without a type", "thinking first", "openai", "events", "byte order mark")


@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream"])
@pytest.mark.parametrize("name", READABLE)
def test_the_text_of_a_reply_is_taken_whatever_its_form(server, questions, name, content_type, capsys):
    server.plan = lambda asked: Fault(
        200, body=READABLE[name](fill_form(asked)[0]).encode(), content_type=content_type
    )
    ask(server, questions, "--max_usd", "1")
    assert len(scores(questions)) == 12 == len(server.log)
    totals, out = read_log(questions / "teacher/spend.jsonl"), capsys.readouterr().out
    known = name in COUNTED
    assert (totals.unknown, totals.unknown_usd > 0) == ((0, False) if known else (12, True))
    assert ("unknown" in out) != known


def test_the_budget_counts_replies_without_usage_at_their_most(server, questions):
    server.plan = lambda asked: Fault(200, body=READABLE["no usage"](fill_form(asked)[0]).encode())
    with pytest.raises(cli.Stop, match="--max_usd") as error:
        ask(server, questions, "--max_usd", "0.002")
    assert error.value.status == 3 and 0 < len(scores(questions)) < 12


UNREADABLE = {
    "html": b"<!DOCTYPE html><html><body>Please sign in to the hotel network</body></html>",
    "text": b"hello, this is a web server",
    "empty": b"",
    "list": b'["a", "b"]',
    "other object": b'{"status": "ok"}',
    "null content": messages(content=None)("x").encode(),
    "no choices": b'{"choices": []}',
    "error": b'{"type": "error", "error": {"type": "permission_error", "message": "not for you"}}',
    "deep": b"[" * 100_000,
    "key": f"who is {KEY}?".encode(),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_reply_is_shown_after_a_few_requests(server, questions, name):
    server.plan = lambda asked: Fault(200, body=UNREADABLE[name], content_type="text/html")
    with pytest.raises(cli.UserError) as error:
        ask(server, questions)
    told = str(error.value)
    assert len(server.log) <= 2 * START and "cannot reach" not in told and "\n" not in told and len(told) < 500
    assert KEY not in told
    shown = {"empty": "an empty body", "error": "not for you", "key": "who is ***"}
    assert shown.get(name, UNREADABLE[name].decode()[:60]) in told
    assert not scores(questions)


def test_an_overload_in_a_200_is_retried(server, questions):
    body = json.dumps({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}).encode()
    server.faults.extend([Fault(200, body=body)] * 5)
    ask(server, questions)
    assert len(scores(questions)) == 12 and len(server.log) == 17


# -- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/", "/v1/messages", "/v1/messages/batches/", "//v1//", "/v1/messages?beta=true"]
)
@pytest.mark.parametrize("by", ["flag", "environment"])
def test_the_api_path_is_stripped_from_the_address(server, questions, path, by, monkeypatch):
    if by == "flag":
        ask(server, questions, "--base_url", server.url + path)
    else:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url + path)
        haiku.main(["--questions_dir", str(questions), "--data_root", "none"])
    assert len(scores(questions)) == 12


@pytest.mark.parametrize("path", ["/nothing/here", "/v1/account/gateway/anthropic", "/api/v1/x"])
def test_a_404_of_the_address_blames_the_address(server, questions, path):
    assert claude.server_address(server.url + path) == server.url + path
    with pytest.raises(cli.UserError, match="--base_url: .*has no Messages API.*404") as error:
        ask(server, questions, "--base_url", server.url + path)
    assert "--teacher_model" not in str(error.value)


@pytest.mark.parametrize("status", [404, 405])
@pytest.mark.parametrize(
    "body", [b"<html>Not Found</html>", b'{"detail": "Not Found"}', b"", b'{"error": {"message": "Not found"}}']
)
def test_other_servers_404(server, questions, status, body):
    server.plan = lambda asked: Fault(status, body=body)
    with pytest.raises(cli.UserError, match="--base_url"):
        ask(server, questions)


@pytest.mark.parametrize(
    "url", ["http://me:pass#word@host", "https://me@host/v1", "me:pass@host", "http://a:pa/ss@host"]
)
def test_an_address_with_a_password_is_refused_unseen(server, questions, url):
    with pytest.raises(cli.UserError, match="--base_url: the address holds a user name") as error:
        ask(server, questions, "--base_url", url)
    assert "pass" not in str(error.value).replace("password", "") and "me:" not in str(error.value)


# -- the key ---------------------------------------------------------------------------------------------------------

LONG = "sk-ant-api03-" + "Ab3_xY-9" * 10 + "QAA"
WRITINGS = {
    "whole": lambda key: key,
    "a part": lambda key: key[7:20],
    "the end": lambda key: key[-12:],
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 of a header": lambda key: base64.b64encode(f"x-api-key: {key}\r\n".encode()).decode(),
    "base64 of a pair": lambda key: base64.urlsafe_b64encode(f"me:{key}".encode()).decode().rstrip("="),
    "hex": lambda key: key.encode().hex(),
    "quoted": lambda key: urllib.parse.quote(key).replace("-", "%2D"),
    "quoted twice": lambda key: key.replace("-", "%252d"),
    "every character quoted": lambda key: "".join(f"%{ord(c):02x}" for c in key),
    "json": lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
    "html": lambda key: key.replace("-", "&#45;"),
    "markdown": lambda key: key.replace("-", "\\-"),
}


@pytest.mark.parametrize("key", [KEY, LONG, "gateway+key/with=signs&more"])
@pytest.mark.parametrize("name", WRITINGS)
def test_the_key_is_redacted_in_every_writing(key, name):
    written = WRITINGS[name](key)
    shown = redact(f"before {written} after", key)
    assert shown.startswith("before ") and shown.endswith(" after") and "***" in shown
    pieces = [written[i : i + 9] for i in range(20 if name.startswith("base64 of") else 4, len(written) - 14)]
    assert not any(piece in shown for piece in pieces)


@pytest.mark.parametrize("key", ["x", "test", "dummy", "ollama", "not-needed", "lm-studio", "12345678"])
def test_a_dummy_key_does_not_mangle_messages(key):
    text = f"this is a test of {key}: not-needed in lm-studio, 12345678 x"
    assert redact(text, key) == text


@pytest.mark.parametrize("name", ["whole", "a part", "base64", "quoted"])
def test_no_way_out_shows_the_key(server, questions, name, capsys):
    written = WRITINGS[name](KEY)
    echo = handoff.iter_items(questions)[0]
    text = (echo.folder / handoff.REQUEST).read_text()

    def respond(asked):
        return f"You sent {written}.\n{fill_form(asked)[0]}", "end_turn"

    server.respond = respond
    server.plan = lambda asked: Fault(400, f"what is {written}?") if asked.text == text else None
    with pytest.raises(cli.UserError) as error:
        ask(server, questions)
    assert len(scores(questions)) == 11
    out = capsys.readouterr()
    shown = [str(error.value), out.out, out.err]
    shown += [
        path.read_text()
        for root in (questions, questions.parent / "user-cache")
        for path in root.rglob("*")
        if path.is_file()
    ]
    assert (
        not any(written in text or KEY[-12:] in text for text in shown) and sum("***" in text for text in shown) > 12
    )


# -- whose replies ---------------------------------------------------------------------------------------------------


def by_reference(root, sample):
    haiku.main(["--questions_dir", str(root), "--teacher", "reference", "--data_root", str(sample / "ScienceQA/data")])


def test_replies_of_another_teacher_are_refused(server, questions, sample, capsys):
    by_reference(questions, sample)
    with pytest.raises(cli.UserError) as error:
        ask(server, questions)
    for words in ("reference", "(12 of 12)", "not by claude claude-haiku-5-5", "--keep_replies", "another folder"):
        assert words in str(error.value)
    assert not server.log
    gone = handoff.iter_items(questions)[0].folder
    (gone / handoff.REPLY).unlink()
    (handoff.iter_items(questions)[1].folder / handoff.SIDECAR).unlink()  # as the released code leaves it
    capsys.readouterr()
    ask(server, questions, "--keep_replies")
    out = capsys.readouterr().out
    assert len(server.log) == 1 and "11 had a reply, 1 answered now" in out
    assert "reference-" in out.partition("replies by")[2] and "unknown origin 1" in out
    assert "claude claude-haiku-5-5 1" in out


def test_the_order_does_not_matter_and_unknown_origin_is_accepted(server, questions, sample, capsys):
    ask(server, questions)
    with pytest.raises(cli.UserError, match=r"claude claude-haiku-5-5 \(12 of 12\), not by reference"):
        by_reference(questions, sample)
    for item in handoff.iter_items(questions):
        (item.folder / handoff.SIDECAR).write_text("{") if item.action else (item.folder / handoff.SIDECAR).unlink()
    capsys.readouterr()
    by_reference(questions, sample)
    assert "replies by unknown origin 12" in capsys.readouterr().out


def test_an_alias_and_its_dated_id_are_one_teacher(server, questions, monkeypatch):
    ask(server, questions, "--teacher_model", "claude-haiku-4-5-20251001")
    from tests import api_server

    monkeypatch.setattr(api_server, "MODELS", ("claude-haiku-4-5",))
    ask(server, questions, "--teacher_model", "claude-haiku-4-5")
    assert len(server.log) == 12


def test_a_gateway_that_answers_under_another_name_is_one_teacher(server, questions):
    server.plan = lambda asked: Fault(200, body=messages(model="served-by-us")(fill_form(asked)[0]).encode())
    ask(server, questions)
    ask(server, questions)
    assert len(server.log) == 12


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("claude-haiku-4-5", "claude-haiku-4-5-20251001", True),
        ("claude-haiku-4-5@20251001", "claude-haiku-4-5-20251001", True),
        ("anthropic/claude-haiku-4-5", "us.anthropic.claude-haiku-4-5-20251001-v1:0", True),
        ("claude-haiku-4-5-latest", "claude-haiku-4-5-20251001", True),
        ("claude-haiku-4-5-20250101", "claude-haiku-4-5-20251001", False),
        ("claude-haiku-4-5", "claude-haiku-5-5", False),
        ("claude-haiku-5", "claude-haiku-5-5", False),
        ("claude-haiku-4-5", "claude-sonnet-4-5", False),
    ],
)
def test_same_models(one, other, same):
    assert same_model(one, other) == same_model(other, one) == same


def test_corrections_and_judgements_of_another_teacher_are_refused(server, tmp_path, sample, problems, capsys):
    data = ["--data_root", str(sample / "ScienceQA/data")]
    train = [qid for qid, problem in problems.items() if problem["split"] == "train" and problem["solution"]][:3]
    files.write_json(tmp_path / "r.json", {"preds": ["Look. It is so."] * 3, "qids": train})
    folder = ["--correction_dir", str(tmp_path / "correction")]
    preprocessing_for_correction_feedback.main([*data, *folder, "--rationales", str(tmp_path / "r.json")])
    output = ["--output", str(tmp_path / "correction.json")]
    argv = [*data, *folder, *output]
    haiku_for_correction_feedback.main([*argv, "--teacher", "reference"])
    before = (tmp_path / "correction.json").read_bytes()
    with pytest.raises(cli.UserError, match="not by claude claude-haiku-5-5.*--keep_replies"):
        haiku_for_correction_feedback.main([*argv, "--base_url", server.url])
    assert (tmp_path / "correction.json").read_bytes() == before and not server.log
    haiku_for_correction_feedback.main([*argv, "--base_url", server.url, "--keep_replies"])
    assert "replies by reference" in capsys.readouterr().out

    test = [qid for qid in problems if problems[qid]["split"] == "test"][:3]
    for name in "ab":
        files.write_json(tmp_path / f"{name}.json", {"preds": [f"{name} says so."] * 3, "qids": test})
    argv = [f"A={tmp_path}/a.json", f"B={tmp_path}/b.json", *data, "--output", str(tmp_path / "judged")]
    win_rate.main([*argv, "--teacher", "reference"])
    with pytest.raises(cli.UserError, match=r"\(6 of 6\), not by claude"):
        win_rate.main([*argv, "--base_url", server.url])
    win_rate.main([*argv, "--base_url", server.url, "--keep_replies"])
    found = json.loads((tmp_path / "judged/win_rate.json").read_text())
    assert list(found["judge"]["replies_by"].values()) == [6] and not server.log


# -- watching --------------------------------------------------------------------------------------------------------


def test_watch_is_started_first_and_goes_on_through_all_rounds(
    server, tmp_path, sample, problems, monkeypatch, capsys
):
    """RL as its files show it: it refuses a questions folder that it did not make, and renames each round's."""
    run = tmp_path / "run"
    monkeypatch.setattr(haiku, "HEARTBEAT", 0.2)
    rounds, faults = 3, []

    def rl():
        try:
            for number in range(rounds):
                time.sleep(0.5)
                assert not (run / "questions").exists(), "the watcher made it"
                files.write_json(run / "rollouts" / f"round_{number}/plan.json", {})
                files.write_text(
                    run / "args.yaml", f"epochs: {rounds}\nbase_model_dir: some/model\ncontinue_train: false\n"
                )
                for action in range(2):
                    for qid in (PICTURE, CHOICES, TEXT):
                        sentences = [f"Round {number}, rationale {action}."]
                        handoff.write_rationale(handoff.question_dir(run / "questions", action, 0, qid), sentences)
                    time.sleep(0.3)
                handoff.mark_exported(run / "questions")
                deadline = time.monotonic() + 20
                while not all(handoff.is_done(run / "questions", action) for action in range(2)):
                    assert time.monotonic() < deadline, f"round {number} is not answered"
                    time.sleep(0.02)
                time.sleep(0.3)  # it trains
                (run / "questions").rename(run / f"questions_round{number}")
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=rl)
    thread.start()
    haiku.main(["--questions_dir", str(run / "questions"), "--base_url", server.url, "--watch", "0.02",
                "--poll_seconds", "0.1", "--data_root", str(sample / "ScienceQA/data"),
                "--images", str(sample / "images")])  # fmt: skip
    thread.join()
    assert not faults and len(server.log) == 6 * rounds
    for number in range(rounds):
        assert len(scores(run / f"questions_round{number}")) == 6
        assert (run / f"questions_round{number}/teacher/spend.jsonl").exists()
    out = capsys.readouterr().out
    assert "waiting for RL to make it" in out and "waiting for RL to export more" in out
    assert "waiting for RL's next round" in out and out.count("6 answered now") == rounds


def test_watch_counts_all_rounds_towards_the_budget(server, tmp_path, sample, problems):
    run = tmp_path / "run"
    files.write_text(run / "args.yaml", "epochs: 2\nbase_model_dir: m\n")

    def rl():
        for number in range(2):
            files.write_json(run / "rollouts" / f"round_{number}/plan.json", {})
            for qid in (CHOICES, TEXT):
                handoff.write_rationale(handoff.question_dir(run / "questions", 0, 0, qid), [f"Round {number}."])
            handoff.mark_exported(run / "questions")
            while number == 0 and not handoff.is_done(run / "questions", 0):
                time.sleep(0.02)
            if number == 0:
                time.sleep(0.5)
                (run / "questions").rename(run / "questions_round0")

    thread = threading.Thread(target=rl)
    thread.start()
    server.respond = lambda asked: (fill_form(asked)[0] + " " * 4000, "end_turn")  # $0.0005 each
    with pytest.raises(cli.Stop, match="--max_usd 0.0015"):
        haiku.main(["--questions_dir", str(run / "questions"), "--base_url", server.url, "--watch", "0.02",
                    "--poll_seconds", "0.1", "--data_root", str(sample / "ScienceQA/data"), "--max_usd", "0.0015",
                    "--concurrency", "1"])  # fmt: skip
    thread.join()
    assert 2 <= len(server.log) < 4


def test_the_exit_status_and_the_line_of_a_refused_account(server, questions):
    server.plan = lambda asked: REFUSALS[0]
    argv = ["--questions_dir", questions, "--base_url", server.url, "--data_root", "none"]
    ended = run_script("haiku.py", *argv, check=False, env={"ANTHROPIC_API_KEY": KEY})
    assert ended.returncode == 3 and ended.stderr.count("error:") == 1 and CREDIT[:40] in ended.stderr
    ended.returncode = 2
    one_line_error(ended, "ANTHROPIC_API_KEY")
