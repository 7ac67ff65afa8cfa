"""What servers and gateways answer besides the API's documented replies: account refusals, permanent errors, replies
of other forms, wrong addresses, echoes of the key. The real client against the local server."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import urllib.parse
from collections import Counter

import pytest

import haiku
from ares import cli
from teacher import api_teacher, claude, handoff, reply_files
from teacher.api_responses import is_account_refusal, said
from teacher.api_teacher import START
from teacher.redact import redact
from tests.api_server import KEY, Fault, fill_form
from tests.conftest import one_line_error, run_script
from tests.teacher.teacher_tools import CREDIT, World, lay_out, many_items, messages, stops


@pytest.fixture
def pictures(server, tmp_path, sample, problems):
    """8 items with an image and 8 without."""
    root = tmp_path / "pictures"
    with_image = [qid for qid in problems if (sample / "images" / qid / "image.png").exists()][:8]
    without = [qid for qid, problem in problems.items() if not problem.get("image")][:8]
    for qid in with_image + without:
        lay_out(root, 0, qid, [f"This is about {qid}."], problems, sample)
    handoff.mark_exported(root)
    return World(server, root)


def body_of(value):
    return json.dumps(value).encode()


# -- the whole account is refused --------------------------------------------------------------------------------

LIMITS = "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC."
REFUSALS = [  # words of its sentence that the line shows, fault
    (CREDIT[:25], Fault(400, CREDIT)),
    (LIMITS[:25], Fault(400, LIMITS)),
    ("You have reached your spe", Fault(400, "You have reached your specified workspace API usage limits.")),
    ("This organization has been", Fault(400, "This organization has been disabled.")),
    ("no credit", Fault(402, "no credit")),
    (
        "Your organization acme",
        Fault(403, "Your organization acme has been suspended for unpaid invoices"),
    ),
    ("You exceeded your current", Fault(429, "You exceeded your current quota, please check your plan and billing.")),
    ("Budget", Fault(400, body=body_of({"error": {"message": "Budget has been exceeded! Max: 10", "code": 400}}))),
    (CREDIT[:25], Fault(500, body=body_of({"error": f"AnthropicException - {CREDIT}"}))),
    ("no", Fault(200, body=body_of({"type": "error", "error": {"type": "billing_error", "message": "no"}}))),
    ("Insufficient", Fault(403, body=b"Insufficient credits. Add more.", content_type="text/plain")),
]


@pytest.mark.parametrize("words, fault, answered", [(*REFUSALS[0], 0), *((*each, 2) for each in REFUSALS)])
def test_a_refusal_of_the_account_ends_the_run_at_once(server, world, words, fault, answered):
    server.plan = lambda asked: fault if len(server.log) >= answered else None
    line = world.stops(words, "--concurrency", "1", "--accept-missing", status=3)
    assert "--teacher_model" not in line and "ANTHROPIC_API_KEY" in line
    assert len(server.log) == answered + 1 and world.answered == answered
    assert not world.done and not list(world.root.rglob(handoff.REASON))
    server.plan = lambda asked: None
    world.ask()
    assert world.answered == 12 and world.done == [0, 1, 2, 3]


def test_only_the_first_few_requests_meet_a_refusal_and_its_exit_status(server, world):
    server.latency, server.plan = 0.1, lambda asked: Fault(400, CREDIT)
    ended = run_script("haiku.py", *world.flags(), check=False, env={"ANTHROPIC_API_KEY": KEY})
    assert ended.returncode == 3 and len(server.log) <= START
    ended.returncode = 2
    one_line_error(ended, "ANTHROPIC_API_KEY", CREDIT[:40])


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
def test_no_refusal_of_the_account(body):
    assert not is_account_refusal(body)


# -- errors ----------------------------------------------------------------------------------------------------


def test_the_sentence_and_the_question_are_kept(server, world, capsys):
    bad, text = world.items[5], world.request(5)
    server.plan = lambda asked: Fault(400, "messages: this one is too odd") if asked.text == text else None
    line = world.stops("1 of 12 replies are unusable .api_400 1.")
    for shown in (line, capsys.readouterr().out):
        assert "api_400 1" in shown or "1 unusable" in shown
        assert "messages: this one is too odd" in shown and f"question {bad.qid}" in shown
    assert (bad.folder / handoff.REASON).read_text() == "api_400: messages: this one is too odd\n"
    assert world.answered == 11
    server.plan = lambda asked: None
    (world.root / "teacher/refused.jsonl").unlink()
    world.ask()
    assert not (bad.folder / handoff.REASON).exists()
    (bad.folder / handoff.REPLY).unlink()
    (bad.folder / handoff.REASON).write_text("api_400: messages: this one is too odd\n")
    with pytest.raises(handoff.Refused, match="no_reply"):
        reply_files.read_scores(bad.folder)
    assert "too odd" in (bad.folder / handoff.REASON).read_text(), "RL does not write over it"


BLOCKED = "Output blocked by content filtering policy"


@pytest.mark.parametrize(
    "status, flags", [(400, ()), (413, ()), (422, ()), (400, ("--no-cache",)), (400, ("--together",))]
)
def test_what_the_api_refuses_is_not_asked_again_until_its_request_changes(server, world, problems, status, flags):
    bad = world.items[5:7]
    texts = [handoff.form(handoff.read_rationale(item.folder)) for item in bad]
    server.plan = lambda asked: Fault(status, BLOCKED) if any(text[2:-2] in asked.text for text in texts) else None
    line = world.stops(f"2 of 12 replies are unusable .api_{status} 2.", *flags)
    assert "2 that the API calls invalid are not asked again" in line and world.answered == 10
    before = len(server.log)
    world.stops("2 of 12 replies are unusable", *flags)
    assert world.done == [0, 3] and len(server.log) == before
    world.ask("--accept-missing", *flags)
    assert world.done == [0, 1, 2, 3] and len(server.log) == before, "RL goes on without them"
    assert {(item.folder / handoff.REASON).read_text() for item in bad} == {f"api_{status}: {BLOCKED}\n"}
    lay_out(world.root, bad[0].action, bad[0].qid, ["Another thought."], problems)
    world.stops("1 of 12 replies are unusable", *flags)
    assert len(server.log) == before + 1 and world.answered == 11
    world.stops(BLOCKED if status != 413 else "too large", *flags, "--body", '{"metadata": {"user_id": "1"}}')
    assert len(server.log) == before + 1 + 1, "another body is another request"


@pytest.mark.parametrize(
    "words, one",
    [("Your chosen model requires moderation and your input was flagged for violence", True), ("Prompt blocked by the "
      "content filter", True), ("The request violates our content policy", True), ("not your workspace", False),
     ("Country, region, or territory not supported", False), ("Your account was suspended for content", False)],
)  # fmt: skip
def test_a_403_about_one_prompt_is_of_that_prompt(server, world, words, one):
    text = world.request(5)
    server.plan = lambda asked: Fault(403, words) if asked.text == text else None
    if one:
        world.stops("1 of 12 replies are unusable .api_403 1", "--concurrency", "1")
        world.ask("--accept-missing")
        assert world.answered == 11 and len(server.log) == 12 and world.done == [0, 1, 2, 3]
    else:
        world.stops("ANTHROPIC_API_KEY: ", "--concurrency", "1", status=3 if "suspended" in words else 2)
        assert len(server.log) == 6


@pytest.mark.parametrize("old", [False, True], ids=["", "of an earlier version"])
def test_many_that_the_api_refuses_end_no_later_run(server, tmp_path, problems, old):
    found = many_items(tmp_path / "q", 120, problems)
    bad = set(sorted(found)[:30])
    server.plan = lambda asked: Fault(400, BLOCKED) if asked.digest in bad else None
    world = World(server, tmp_path / "q", "--no-cache", "--accept-missing")
    for _ in range(2):
        try:
            world.ask()
        except cli.UserError as error:
            assert BLOCKED in str(error)
            if old:  # which kept neither the refused requests nor the keys of answered ones
                (world.root / "teacher/refused.jsonl").unlink(missing_ok=True)
                for path in world.root.rglob(handoff.SIDECAR):
                    about = json.loads(path.read_text())
                    path.write_text(json.dumps({name: value for name, value in about.items() if name != "key"}))
    for _ in range(2 if old else 1):
        with contextlib.suppress(cli.UserError):
            world.ask()
    asked = Counter(digest for digest, _ in server.log)
    assert world.answered == 90 and world.done == sorted({item.action for item in world.items})
    assert max(asked.values()) <= (4 if old else 2), "a few were in flight when the run stopped"


@pytest.mark.parametrize("answered", [0, 6])
def test_a_wrong_parameter_ends_the_run_at_its_first_requests(server, world, answered):
    """Replies of an earlier run with another body do not say that this one is right."""
    server.plan = lambda asked: Fault(400, BLOCKED) if len(server.log) >= answered else None
    world.stops(BLOCKED if not answered else "api_400 6", "--concurrency", "1")
    server.plan = lambda asked: Fault(422, "metadata: no") if "metadata" in asked.body else None
    before = len(server.log)
    line = world.stops("--teacher_model: .*metadata: no", "--body", '{"metadata": {}}', "--concurrency", "1")
    assert len(server.log) == before + 1 and "leaves metadata out" in line


def test_a_joint_request_is_not_counted_as_refused(server, tmp_path, problems):
    """12 of 24 questions have one rationale that is refused: 24 refusals, 12 of single requests."""
    world = World(server, tmp_path / "q", "--together", "--concurrency", "2")
    many_items(world.root, 96, problems)
    bad = ["\n".join(handoff.form(handoff.read_rationale(item.folder)).split("\n")[1:-1]) for item in world.items
           if item.action == 0][::2]  # fmt: skip
    server.plan = lambda asked: Fault(400, BLOCKED) if any(text in asked.text for text in bad) else None
    world.ask("--accept-missing")
    assert world.answered == 84 and world.done == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "words, fault",
    [
        ("no multimodal support", lambda n: Fault(500, "no multimodal support")),
        ("image input is not", lambda n: Fault(500, f"request req_{n:05} failed: image input is not supported")),
        ("Internal server error", lambda n: Fault(500, "Internal server error")),
        ("images", lambda n: Fault(501, "images")),
        ("This model does not", lambda n: Fault(400, "This model does not support image input")),
        ("vision is not", lambda n: Fault(200, body=b'{"error": "vision is not supported"}')),
        ("<html>no images here", lambda n: Fault(200, body=b"<html>no images here</html>", content_type="text/html")),
    ],
)
def test_an_error_at_every_request_with_images_ends_the_run(server, pictures, words, fault):
    server.plan = lambda asked: fault(len(server.log)) if asked.images else None
    line = pictures.stops(words, "--accept-missing")
    assert "images" in line and sum(bool(asked.images) for asked in server.asked) <= 30
    assert not pictures.done and pictures.answered == 8, "those without images are answered"


@pytest.mark.parametrize("text", ["no multimodal support", "cannot do that"])
def test_an_error_at_every_request_ends_the_run_with_its_text(server, world, text):
    server.plan = lambda asked: Fault(500, text)
    world.stops(text)
    assert len(server.log) <= 4 * START


def test_errors_that_pass_do_not_end_the_run(server, pictures):
    """A server that fails twice at every image, then not, and one question that it never answers."""
    seen, never, text = {}, pictures.items[0], pictures.request(0)

    def plan(asked):
        seen[asked.text] = seen.get(asked.text, 0) + 1
        if asked.text == text:
            return Fault(500, "boom")
        return Fault(500, "internal") if asked.images and seen[asked.text] <= 2 else None

    server.plan = plan
    pictures.stops(f"api_500 1.*question {never.qid}: boom")
    assert pictures.answered == 15 and seen[text] <= api_teacher.MAX_RETRIES + 1


@pytest.mark.parametrize("kind", ["reset", "truncated_json"])
def test_a_request_that_always_breaks_off_is_paid_a_few_times_only(server, world, kind, monkeypatch):
    """Each may be charged; others are answered meanwhile."""
    monkeypatch.setattr(api_teacher, "MAX_BACKOFF", 0.05)
    text = world.request(3)
    server.plan = lambda asked: Fault(0, kind=kind) if asked.text == text else None
    world.stops("1 of 12 replies are unusable")
    sent = sum(asked.text == text for asked in server.asked)
    assert world.answered == 11 and sent == world.totals.unknown == api_teacher.MAX_SAME


# -- replies of other forms ---------------------------------------------------------------------------------------


def events(*objects):
    return "".join(f"data: {json.dumps(each)}\n\n" for each in objects)


COUNTED = {  # their usage is read
    "content a string": messages(content=lambda text: text),
    "blocks without a type": messages(content=lambda text: [{"text": text}]),
    "thinking first": messages(content=lambda text: [{"type": "thinking"}, {"type": "text", "text": text}]),
    "openai": lambda text: json.dumps(
        {"model": "gpt", "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
         "usage": {"prompt_tokens": 9, "completion_tokens": 9}}),
    "events": lambda text: "event: message_start\n" + events(
        {"type": "message_start", "message": {"model": "claude-haiku-5-5", "usage": {"input_tokens": 9}}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text[:4]}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text[4:]}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}},
        {"type": "message_stop"}),
    "byte order mark": lambda text: "\ufeff" + messages()(text),
}  # fmt: skip
READABLE = COUNTED | {
    "no usage": messages(usage="absent"),
    "null usage": messages(usage=None),
    "usage of other words": messages(usage={"tokens": 4}),
    "usage of nulls": messages(usage={"input_tokens": None, "output_tokens": None}),
    "bare": lambda text: json.dumps({"content": text}),
    "openai parts": lambda text: json.dumps({"choices": [{"message": {"content": [{"type": "text", "text": text}]}}]}),
    "completion": lambda text: json.dumps({"choices": [{"text": text}]}),
    "ollama": lambda text: json.dumps({"message": {"role": "assistant", "content": text}, "done": True}),
    "openai events": lambda text: events(
        {"choices": [{"delta": {"content": text}}]}, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
        + "data: [DONE]\n",
}  # fmt: skip


@pytest.mark.parametrize("name", READABLE)
def test_the_text_of_a_reply_is_taken_whatever_its_form(server, world, name, capsys):
    make, counted = READABLE[name], name in COUNTED
    content_type = "text/event-stream" if name in ("events", "bare", "thinking first") else "application/json"
    server.plan = lambda asked: Fault(200, body=make(fill_form(asked)[0]).encode(), content_type=content_type)
    world.ask("--max_usd", "1")
    assert world.answered == 12 == len(server.log)
    assert (world.totals.unknown, world.totals.unknown_usd > 0) == ((0, False) if counted else (12, True))
    assert ("unknown" in capsys.readouterr().out) != counted


def test_the_budget_counts_replies_without_usage_at_their_most(server, world):
    server.plan = lambda asked: Fault(200, body=READABLE["no usage"](fill_form(asked)[0]).encode())
    world.stops("--max_usd", "--max_usd", "0.002", status=3)
    assert 0 < world.answered < 12


def test_an_overload_in_a_200_is_retried(server, world):
    body = body_of({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
    server.faults.extend([Fault(200, body=body)] * 5)
    world.ask()
    assert world.answered == 12 and len(server.log) == 17


UNREADABLE = {  # body -> what of it is shown, if not its beginning
    b"<!DOCTYPE html><html><body>Please sign in to the hotel network</body></html>": None,
    b"hello, this is a web server": None,
    b"": "an empty body",
    b'["a", "b"]': None,
    b'{"status": "ok"}': None,
    messages(content=None)("x").encode(): None,
    b'{"choices": []}': None,
    b'{"type": "error", "error": {"type": "permission_error", "message": "not for you"}}': "not for you",
    b"[" * 100_000: None,
    f"who is {KEY}?".encode(): "who is ***",
}


@pytest.mark.parametrize("body", UNREADABLE, ids=lambda body: body.decode()[:12])
def test_an_unreadable_reply_is_shown_after_a_few_requests(server, world, body):
    server.plan = lambda asked: Fault(200, body=body, content_type="text/html")
    line = world.stops(re.escape(UNREADABLE[body] or body.decode()[:60]))
    assert len(server.log) <= 2 * START and "cannot reach" not in line and len(line) < 500
    assert KEY not in line and not world.answered


# -- addresses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_the_api_path_is_stripped_from_the_address(server, world, by, monkeypatch):
    for path in ("/", "/v1", "/v1/", "/v1/messages", "/v1/messages/batches/", "//v1//", "/v1/messages?beta=true"):
        assert claude.ClaudeTeacher.address_of(server.url + path, "--base_url") == server.url
    if by == "flag":
        world.ask("--base_url", server.url + path)
    else:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url + path)
        haiku.main(["--questions_dir", str(world.root), "--data_root", "none"])
    assert world.answered == 12


@pytest.mark.parametrize("path", ["/nothing/here", "/v1/account/gateway/anthropic", "/api/v1/x"])
def test_a_404_of_the_address_blames_the_address(server, world, path):
    assert claude.ClaudeTeacher.address_of(server.url + path, "--base_url") == server.url + path
    line = world.stops("--base_url: .*has no Messages API.*404", "--base_url", server.url + path)
    assert "--teacher_model" not in line


def test_other_servers_404(server, world):
    for body in (b"<html>Not Found</html>", b'{"detail": "Not Found"}', b"", b'{"error": {"message": "Not found"}}'):
        for status in (404, 405):
            server.plan = lambda asked, status=status, body=body: Fault(status, body=body)
            world.stops("--base_url")


def test_an_address_with_a_password_is_refused_unseen():
    for url in ("http://me:pass#word@host", "https://me@host/v1", "me:pass@host", "http://a:pa/ss@host"):
        line = stops(lambda url=url: haiku.main(["--base_url", url]), "--base_url: the address holds a user name")
        assert "pass" not in line.replace("password", "") and "me:" not in line


MALFORMED = ["http://[::1:8000", "http://[bad]", "http://localhost:abc", "http://localhost:99999", "http://localhost:-1",
             "http://local host:8000", "http://exa\tmple.com", "http://\x7fa", "http://a\u2003b", "http://a/v 1",
             "http://[::1]8000", "http://", "http://:80", "https://fe80::1:8000"]  # fmt: skip


@pytest.mark.parametrize("teacher, name", [("claude", "ANTHROPIC_BASE_URL"), ("openai", "OPENAI_BASE_URL")])
def test_a_malformed_address_is_refused_before_anything_is_asked(world, teacher, name, monkeypatch):
    argv = ["--questions_dir", str(world.root), "--data_root", "none", "--teacher", teacher, "--teacher_model", "m"]
    for url in MALFORMED:
        monkeypatch.delenv(name, raising=False)
        by_flag = stops(lambda url=url: haiku.main([*argv, "--base_url", url]), "--base_url: .*is no address")
        monkeypatch.setenv(name, url)
        by_environment = stops(lambda: haiku.main(argv), f"{name}: .*is no address")
        assert by_flag.isprintable() and by_environment.isprintable()


# -- the key ------------------------------------------------------------------------------------------------------

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


def test_a_message_cut_within_the_key_and_a_dummy_key():
    echo = {"error": {"message": "x" * 290 + KEY}}
    assert KEY[:6] not in said(type("Error", (Exception,), {"body": echo})(), KEY)
    for key in ("x", "test", "dummy", "ollama", "not-needed", "lm-studio", "12345678"):
        text = f"this is a test of {key}: not-needed in lm-studio, 12345678 x"
        assert redact(text, key) == text, "a dummy key does not mangle messages"


@pytest.mark.parametrize("name", ["whole", "a part", "base64", "quoted"])
def test_no_output_shows_the_key(server, world, name, capsys):
    written, echo = WRITINGS[name](KEY), world.request(0)
    server.respond = lambda asked: (f"You sent {written}.\n{fill_form(asked)[0]}", "end_turn")
    server.plan = lambda asked: Fault(400, f"what is {written}?") if asked.text == echo else None
    line = world.stops("api_400 1")
    assert world.answered == 11
    roots = (world.root, world.root.parent / "user-cache")
    kept = [path.read_bytes().decode(errors="replace") for root in roots for path in root.rglob("*") if path.is_file()]
    shown = [line, *capsys.readouterr(), *kept]
    assert not any(written in text or KEY[-12:] in text for text in shown)
    assert sum("***" in text for text in shown) > 12
