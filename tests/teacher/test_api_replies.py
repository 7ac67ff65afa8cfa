"""Replies of other forms, wrong addresses, and the key in what a server sends back."""

from __future__ import annotations

import base64
import json
import urllib.parse

import pytest

import haiku
from ares import cli
from teacher import claude, handoff
from teacher.api_responses import redact
from teacher.api_teacher import START
from teacher.budget import read_log
from tests.api_server import KEY, Fault, fill_form
from tests.teacher.teacher_tools import ask, messages, scores


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
    line = str(error.value)
    assert len(server.log) <= 2 * START and "cannot reach" not in line and "\n" not in line and len(line) < 500
    assert KEY not in line
    shown = {"empty": "an empty body", "error": "not for you", "key": "who is ***"}
    assert shown.get(name, UNREADABLE[name].decode()[:60]) in line
    assert not scores(questions)


def test_an_overload_in_a_200_is_retried(server, questions):
    body = json.dumps({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}).encode()
    server.faults.extend([Fault(200, body=body)] * 5)
    ask(server, questions)
    assert len(scores(questions)) == 12 and len(server.log) == 17


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
        path.read_bytes().decode(errors="replace")
        for root in (questions, questions.parent / "user-cache")
        for path in root.rglob("*")
        if path.is_file()
    ]
    assert (
        not any(written in text or KEY[-12:] in text for text in shown) and sum("***" in text for text in shown) > 12
    )
