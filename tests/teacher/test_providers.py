"""Teachers of several providers: OpenAI's chat completions through the real SDK, gateways, presets.

The real third-party litellm proxy is in test_litellm.py, rate limits are in test_pace.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import time

import pytest

import haiku
from teacher import api_teacher, claude, handoff
from teacher.api_responses import ApiError, failure_of
from teacher.api_teacher import merge_patch
from teacher.interface import SCORE, Request
from teacher.openai_compatible import OpenAITeacher, is_local
from teacher.parsing import parse_scores
from teacher.prompts import WORDING
from tests import api_server
from tests.api_server import KEY, Fault, fill_form
from tests.teacher.teacher_tools import (
    CREDIT,
    HAIKU_45,
    MODEL,
    PICTURE,
    World,
    correct_one,
    judge,
    lay_out,
    many_items,
    sidecar,
    stops,
)  # fmt: skip

TENTHS = [step / 10 for step in range(11)]


# -- the requests ------------------------------------------------------------------------------------------------


def test_a_local_server_scores_without_a_key_or_a_price(server, local, sample, problems, capsys):
    folder = lay_out(local.root, 0, PICTURE, ["Look at it.", "It is so."], problems, sample)
    local.ask("--max_usd", "0.001")
    assert local.answered == 13 and "replies by openai qwen2.5-vl 13" in capsys.readouterr().out
    about = sidecar(folder)
    assert (about["teacher"], about["model"], about["cost_usd"]) == ("openai", MODEL, 0.0)
    assert about["usage"]["input_tokens"] > 0 and about["request_id"]
    asked = next(asked for asked in server.asked if asked.images)
    assert asked.images[0][0] == "image/png" and asked.content_types == ["image_url", "text", "text"]
    assert asked.notes == [WORDING.exact["score"]] and asked.body["temperature"] == 0.0
    assert asked.schema["properties"] == {f"sentence_{n}": {"type": "number", "enum": TENTHS} for n in (1, 2)}
    assert asked.schema["required"] == ["sentence_1", "sentence_2"] and not asked.schema["additionalProperties"]
    # again: nothing is asked; another folder with the same questions: from the cache
    before = len(server.log)
    local.ask()
    (folder / handoff.REPLY).unlink()
    (folder / handoff.SCORES).unlink()
    local.ask()
    assert len(server.log) == before and "from_cache" in sidecar(folder)


@pytest.mark.parametrize("count", [1, 2, 11, 40])
def test_exact_replies_are_read(count):
    sentences = tuple(f"Sentence {number} of it." for number in range(count))
    schema = api_teacher.exact_schema(Request("id", SCORE, "1", "text", sentences))
    scores = [TENTHS[number % 11] for number in range(count)]
    reply = dict(zip(schema["required"], scores, strict=True))
    for text in (json.dumps(reply), json.dumps(reply, separators=(",", ":")), json.dumps(reply, indent=4)):
        assert parse_scores(text, sentences) == scores


def test_another_teacher_is_another_writer(server, local):
    local.ask()
    claude_world = World(server, local.root)
    server.models = {"claude-haiku-5-5": {}}
    line = claude_world.stops("holds replies by openai qwen2.5-vl .12 of 12., not by claude")
    assert "--keep_replies" in line
    local.stops("holds replies by openai qwen2.5-vl", "--teacher_model", "other:7b")


def test_corrections_and_judgements(server, local, sample, tmp_path, problems):
    flags = ["--teacher", "openai", "--teacher_model", MODEL, "--base_url", server.url]
    folder, _ = correct_one(flags, tmp_path, sample, problems)
    assert "Final rationale" in server.asked[0].schema["properties"] and sidecar(folder)["teacher"] == "openai"
    server.respond = lambda asked: ('{"reason": "It is so.", "verdict": "1"}', "end_turn")
    server.asked.clear()
    found = judge(flags, tmp_path, sample, 30)
    assert any(asked.images for asked in server.asked) and len(server.asked) == 60
    assert server.asked[0].schema["properties"]["verdict"]["enum"] == ["1", "2", "tie"]
    assert found["judge"]["teacher"] == "openai" and found["summary"]["position"]["first"] == 100


def test_show_estimate_and_check(server, local, sample, capsys):
    local.ask("--estimate")
    out = capsys.readouterr().out
    assert "$0.0000 live;" in out and "--batch" not in out
    local.ask("--show", local.items[0].qid)
    shown = capsys.readouterr().out
    assert '"sentence_1": {"type": "number"' in shown and '"max_tokens"' in shown and not server.log
    data = ("--data_root", sample / "ScienceQA/data", "--check", "3")
    local.ask(*data, "--against", "other:7b")
    assert "openai qwen2.5-vl against openai other:7b" in capsys.readouterr().out and len(server.log) == 6
    local.stops("is the Teacher itself", *data, "--against", f"openai:{MODEL}")


def test_two_providers_are_compared(server, local, sample, capsys, monkeypatch):
    """--against claude:MODEL goes to Anthropic's address, not to --base_url."""
    server.models["claude-haiku-5-5"] = {}
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
    data = ("--data_root", sample / "ScienceQA/data", "--check", "3")
    local.ask(*data, "--against", "claude:claude-haiku-5-5")
    assert "openai qwen2.5-vl against claude claude-haiku-5-5" in capsys.readouterr().out
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    local.stops("ANTHROPIC_API_KEY is not set", *data, "--against", "claude:claude-haiku-5-5")


# -- flags ---------------------------------------------------------------------------------------------------------


def test_a_model_must_be_named_and_the_servers_are_listed(server, local, monkeypatch):
    flags = ["--teacher", "openai", "--questions_dir", str(local.root), "--base_url", server.url]
    stops(
        lambda: haiku.main(flags), "--teacher_model: name a model for --teacher openai; the server has qwen2.5-vl, oth"
    )
    line = stops(lambda: haiku.main([*flags[:-1], "http://127.0.0.1:9"]), "--teacher_model: name a model")
    assert "the server has" not in line
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/v1/")
    stops(lambda: haiku.main(flags[:-2]), "the server has qwen2.5-vl, other:7b")


WRONG = [
    (("--batch",), "--batch: --teacher openai has no batches"),
    (("--base_url", "https://api.example.com/v1"), "OPENAI_API_KEY is not set.*--base_url"),
    (("--base_url", "localhost:8000"), "--base_url: localhost:8000 is no address"),
    (("--base_url", "http://me:word@host"), "--base_url: the address holds a user name"),
    (("--base_url", "https://api.example.com", "--max_usd", "1"), "--max_usd: the price of qwen2.5-vl is not known"),
    (("--max_usd", "1", "--body", '{"max_tokens": null}'), "--max_usd: --body removes max_tokens"),
    (("--body", "{temperature: 0}"), "--body: '{temperature: 0}' is no JSON"),
    (("--body", "[1]"), "--body: '.1.' is no JSON object"),
    (("--body", "7"), "--body: '7' is no JSON object"),
    (("--body", '{"model": "x"}'), "--body: model cannot be set here, --teacher_model"),
    (("--body", "[" * 100_000), "--body: .*is no JSON"),
    (("--body", '{"extra_body": {"top_k": 1}}'), "--body: extra_body is no field.*its fields directly into --body"),
    (("--body", '{"extra_headers": {"x": "y"}}'), "--body: extra_headers is no field"),
    (("--body", '{"extra_query": {}}'), "--body: extra_query is no field"),
    (("--body", '{"timeout": 5}'), "--body: timeout is no field.*--timeout"),
    (("--body", '{"n": 4}'), "--body: n is not read: a reply would be paid"),
    (("--body", '{"best_of": 2}'), "--body: best_of is not read"),
    (("--body", '{"extra_body": null}'), "--body: extra_body is no field"),
]


def test_wrong_flags_end_in_one_line_before_anything_is_asked(server, local):
    for flags, words in WRONG:
        local.stops(words, *flags)
    with pytest.raises(SystemExit):
        local.ask("--structured", "maybe")
    assert not server.log


@pytest.mark.parametrize("name", ["extra_body", "extra_headers", "extra_query", "timeout", "self"])
def test_a_field_of_the_name_of_an_argument_of_the_sdk_is_sent(server, local, name, monkeypatch):
    """--body refuses them; the SDK must not take them for its own either."""
    monkeypatch.setattr(api_server, "CHAT_FIELDS", api_server.CHAT_FIELDS | {name})

    async def ask():
        async with OpenAITeacher(MODEL, server.url, extra={name: {"a": 1}}) as teacher:
            return await teacher.answer(Request("id-1", SCORE, "1", 'Score:\n{\n"It is so.": xxx\n}', ("It is so.",)))

    assert asyncio.run(ask()).text and server.asked[0].body[name] == {"a": 1}


@pytest.mark.parametrize(
    "url, local",
    [("http://localhost:8000", 1), ("http://127.0.0.1/v1", 1), ("http://127.9.9.9", 1), ("http://[::1]:8000/v1", 1),
     ("http://10.1.2.3", 1), ("http://192.168.0.5:80", 1), ("http://172.20.0.1", 1), ("http://[fd00::1]", 1),
     ("http://100.64.1.1", 1), ("http://169.254.1.1", 1), ("http://gpu-box:8000", 1), ("http://vllm.local", 1),
     ("http://host.docker.internal:11434", 1), ("http://0.0.0.0:8000", 1), (None, 0), ("https://api.openai.com/v1", 0),
     ("http://8.8.8.8", 0), ("http://172.15.0.1", 0), ("http://localhost.example.com", 0), ("http://10.com", 0),
     ("http://[2606:4700::1]", 0), ("https://generativelanguage.googleapis.com/v1beta/openai/", 0)],
)  # fmt: skip
def test_what_is_local(url, local):
    assert is_local(url) == bool(local)


@pytest.mark.parametrize(
    "url, address",
    [("http://h:1", "http://h:1/v1"), ("http://h:1/", "http://h:1/v1"), ("http://h/v1", "http://h/v1"),
     ("http://h/v1/", "http://h/v1"), ("http://h/v1/chat/completions", "http://h/v1"), ("http://h/models", "http://h/v1"),
     ("https://g.com/v1beta/openai/", "https://g.com/v1beta/openai"), ("https://o.ai/api/v1?x=1", "https://o.ai/api/v1"),
     ("http://h//v1//chat/completions/", "http://h//v1"), (" http://h:1 ", "http://h:1/v1")],
)  # fmt: skip
def test_addresses(url, address):
    assert OpenAITeacher.address_of(url, "--base_url") == address


OPENAIS = "max_completion_tokens"


@pytest.mark.parametrize(
    "address, field",
    [(None, OPENAIS), ("https://api.openai.com", OPENAIS), ("https://eu.api.openai.com/v1", OPENAIS),
     ("https://us.api.OpenAI.com/", OPENAIS), ("https://me.openai.azure.com/openai/v1", OPENAIS),
     ("https://openrouter.ai/api/v1", "max_tokens"), ("https://api.openai.com.example.com", "max_tokens"),
     ("https://notopenai.com", "max_tokens"), ("http://localhost:8000", "max_tokens")],
)  # fmt: skip
def test_the_length_field_of_an_address(address, field):
    teacher = OpenAITeacher("gpt-5", address)
    sent = teacher.parameters(Request("id", SCORE, "1", "text", ("One.",)))
    assert [name for name in api_teacher.LENGTH_FIELDS if name in sent] == [field]


def test_what_paid_servers_get():
    """OpenAI's own address: its newer models refuse `max_tokens` and a temperature; they think within the limit."""
    request = Request("id", SCORE, "1", "text", ("One.",))
    at_openai, elsewhere = OpenAITeacher("gpt-5"), OpenAITeacher(MODEL, "http://10.0.0.1")
    sent = at_openai.parameters(request)
    assert sent["max_completion_tokens"] > 4096 and not {"max_tokens", "temperature"} & sent.keys()
    assert elsewhere.parameters(request)["max_tokens"] < 1000 and elsewhere.price.input == 0
    assert at_openai.price is None and OpenAITeacher("claude-haiku-5-5").price is not None
    capped = OpenAITeacher("gpt-5", extra={"max_completion_tokens": 100}, price=api_teacher.Price(1.0, 1.0))
    assert capped.parameters(request)["max_completion_tokens"] == 100 < at_openai.max_tokens(request)
    assert capped.most_usd(request) < 0.001


THINKS = ["claude-opus-5-5", "claude-fable-5-2", "claude-unheard-of", "mine", "gpt-5"]


@pytest.mark.parametrize("model", [*THINKS, "claude-haiku-5-5", MODEL])
@pytest.mark.parametrize("kind", ["score", "correct", "judge"])
def test_a_longer_limit_is_longer_by_its_factor(model, kind):
    """Also of a model that thinks within the limit: else it would be cut off again and again, and paid."""
    address = "http://localhost" if model == MODEL else None
    teacher = (OpenAITeacher if model in ("gpt-5", MODEL) else claude.ClaudeTeacher)(model, address)
    request = Request("id", kind, "1", "text", ("One.", "Two."))
    first = teacher.max_tokens(request)
    assert (first > 4096) == (model in THINKS)
    for factor in (2, 4, 8):
        assert teacher.max_tokens(dataclasses.replace(request, length_factor=factor)) == factor * first


def test_a_model_that_thinks_long_gets_its_reply_in_the_end(server, world, capsys):
    server.models["mine"] = {}
    server.respond = lambda asked: fill_form(asked) if asked.body["max_tokens"] > 14_000 else ("", "max_tokens")
    world.ask("--estimate", "--teacher_model", "mine")
    assert "thinking tokens, if any, come on top" in capsys.readouterr().out
    world.ask("--teacher_model", "mine")
    assert world.answered == 12 and len(server.log) == 36
    world.ask("--estimate", "--keep_replies")
    assert "thinking" not in capsys.readouterr().out.partition("tokens: ")[2]


# -- faults --------------------------------------------------------------------------------------------------------


def body_of(value):
    return json.dumps(value).encode()


def failed(message, **more):
    return body_of({"error": {"message": message, **more}})


INVALID = "litellm.BadRequestError: Invalid model name passed in model=qwen2.5-vl. Call `/v1/models` to view available"
QUOTA = "You exceeded your current quota, please check your plan and billing details."


@pytest.mark.parametrize(
    "words, status, fault",
    [
        ("OPENAI_API_KEY: the API does not accept this key", 2, Fault(401, "Incorrect API key provided")),
        ("OPENAI_API_KEY: the API does not accept", 2, Fault(400, body=body_of([{"error": {"code": 400, "message":
            "API key not valid. Please pass a valid API key.", "status": "INVALID_ARGUMENT"}}]))),
        ("OPENAI_API_KEY: the API refuses the whole account.*exceeded", 3,
         Fault(429, body=failed(QUOTA, code="insufficient_quota"), headers={"retry-after": "1"})),
        ("OPENAI_API_KEY: the API refuses the whole account", 3, Fault(400, CREDIT)),
        ("--base_url: http.*/v1/ has no chat completions .404: Not Found.*with its /v1", 2,
         Fault(404, body=body_of({"detail": "Not Found"}))),
        ("does not accept the request.*context length", 2, Fault(400, "maximum context length is 4096 tokens")),
        ("--body '{\"temperature\": null}' leaves temperature out", 2,
         Fault(400, "Unsupported value: 'temperature' does not support 0 with this model.")),
        ("--body '{\"response_format\": null}' leaves", 2, Fault(400, "unknown field: response_format")),
        ('--body \'{"max_tokens": null, "max_completion_tokens": [0-9]+}\' sends', 2, Fault(400,
            "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")),
        ("--body '{\"max_tokens\": null}' leaves max_tokens out", 2, Fault(400, "max_tokens is not known here")),
        ("--teacher_model: .*does not accept .*flagged", 2, Fault(403, "your input was flagged")),
        *(("--teacher_model: qwen2.5-vl is not known.*the server has qwen2.5-vl, other:7b", 2, fault) for fault in (
            Fault(404, "The model `qwen2.5-vl` does not exist."),
            Fault(404, 'model "qwen2.5-vl" not found, try pulling it first'),
            Fault(404, body=body_of([{"error": {"code": 404, "message":
                "models/qwen2.5-vl is not found for API version v1main, or is not supported for generateContent"}}])),
            Fault(404, body=body_of({"object": "error", "message": "The model `qwen2.5-vl` does not exist.",
                                     "type": "NotFoundError", "param": None, "code": 404})),
            Fault(400, body=failed(INVALID, type="None", code="400")),
            Fault(404, body=failed("no", code="model_not_found")),
        )),
    ],
)  # fmt: skip
def test_what_retrying_does_not_mend_ends_the_run_in_one_line(server, local, words, status, fault):
    server.plan = lambda asked: fault
    line = local.stops(words, "--concurrency", "1", status=status)
    assert len(server.log) == 1 and len(line) < 600
    server.plan = lambda asked: None
    local.ask()
    assert local.answered == 12


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(429)] * 3, [Fault(429, headers={"retry-after": "0.1"})] * 3, [Fault(500, "boom")] * 2, [Fault(503)] * 3,
        [Fault(0, kind="reset")], [Fault(0, kind="lost")], [Fault(0, kind="truncated_json")],
        [Fault(200, body=failed("litellm.RateLimitError: slow down", type="throttling_error", code="429"))],
        [Fault(200, body=failed("upstream died", type=None, param=None, code=None))],
        [Fault(0, kind="wrong_count")], [Fault(0, kind="chatter")], [Fault(0, kind="refusal")],
        [Fault(0, kind="declined")], [Fault(0, kind="max_tokens")],
        [Fault(200, body=body_of({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}))],
        [Fault(200, body=body_of({"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}))],
    ],
    ids=lambda faults: f"{faults[0].name} {(faults[0].body or b'')[:50].decode()}",
)  # fmt: skip
def test_faults_that_pass_lose_nothing(server, local, faults):
    server.faults.extend(faults)
    local.ask()
    assert local.answered == 12 and len(server.log) == 12 + len(faults) and local.done == [0, 1, 2, 3]


def gemini(message=f"{QUOTA} Quota exceeded for metric: free_tier_requests, limit: 10", quota="PerMinute", delay=None):
    """A 429 of its compatible endpoint, which sends no retry-after."""
    details = [{"violations": [{"quotaId": f"GenerateRequests{quota}PerProjectPerModel-FreeTier"}]}] if quota else []
    details += [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}] if delay else []
    error = {"code": 429, "message": message, "status": "RESOURCE_EXHAUSTED", "details": details}
    return body_of([{"error": error}])


PASSING = {  # body of a 429 without a header -> seconds that it names
    gemini(f"{QUOTA} Please retry in 0.3s.", None): 0.3,
    gemini(quota=None, delay="0.25s"): 0.25,
    gemini(): None,
    failed(f"litellm.RateLimitError: GeminiException - {gemini(delay='0.2s').decode()}", code="429"): 0.2,
    failed(f"{QUOTA} Please try again in 120ms.", code="rate_limit_exceeded"): 0.12,
    failed(f"{QUOTA} Try again in 200 milliseconds"): 0.2,
}
LASTING = [
    failed(f"{QUOTA} Please retry in 0.2s.", code="insufficient_quota"),
    failed(
        f"litellm.RateLimitError: OpenAIException - insufficient_quota: {QUOTA} Please try again in 0.2s", code="429"
    ),
    gemini(f"{QUOTA} Please retry in 0.2s.", "PerDay", delay="0.2s"),
    gemini(quota="PerDay"),
    failed(QUOTA),
]


@pytest.mark.parametrize("body, seconds", PASSING.items(), ids=range(len(PASSING)))
def test_a_quota_of_a_minute_passes(server, local, body, seconds):
    server.faults.extend([Fault(429, body=body)] * 2)
    began = time.monotonic()
    local.ask("--concurrency", "1")
    assert local.answered == 12 and len(server.log) == 14 and time.monotonic() - began >= 2 * (seconds or 0)


@pytest.mark.parametrize("body", LASTING, ids=range(len(LASTING)))
def test_a_quota_of_the_account_or_the_day_does_not(server, local, body):
    server.plan = lambda asked: Fault(429, body=body)
    local.stops("OPENAI_API_KEY: the API refuses the whole account", "--concurrency", "1", status=3)
    assert len(server.log) == 1


@pytest.mark.parametrize(
    "words, seconds",
    [("Please retry in 31.7s. See", 31.7), ("try again in 6m0s", 360), ("Try again in 1h2m3s.", 3723),
     ("retry after 20 seconds or so", 20), ("retry in 1 minute 5 seconds", 65), ("try again in 7ms", 0.007),
     ("try again later", None), ("I retry in vain", None), ("retry in 1.2.3s", None),
     ('\\"retryDelay\\": \\"31s\\"', 31)],
)  # fmt: skip
def test_the_delay_in_words(words, seconds):
    for body in (words, {"error": {"message": words}}, [{"error": words}], {"detail": {"message": f"A.\n{words}"}}):
        found = failure_of(ApiError(429, body))
        assert found.retryable and found.retry_after == (seconds and pytest.approx(seconds))
        assert failure_of(ApiError(429, body, {"retry-after": "2"})).retry_after == 2
        assert failure_of(ApiError(500, body)).retry_after is None


@pytest.mark.parametrize(
    "kind, reason", [("refusal", "refusal"), ("declined", "refusal"), ("max_tokens", "max_tokens")]
)
def test_refused_and_cut_replies_are_reported(server, local, kind, reason):
    text = local.request(3)
    server.plan = lambda asked: Fault(0, kind=kind) if asked.text == text else None
    local.stops(f"1 of 12 replies are unusable .{reason} 1.")
    assert len(server.log) == 11 + 3 and local.answered == 11
    lengths = [asked.body["max_tokens"] for asked in server.asked if asked.text == text]
    assert (lengths[1] == 2 * lengths[0]) == (kind == "max_tokens")


def test_a_dead_server_is_one_line(local, monkeypatch):
    monkeypatch.setattr(api_teacher, "MAX_RETRIES", 1)
    words = "--base_url: cannot reach http://127.0.0.1:9/v1/ after 1 retries"
    local.stops(words, "--base_url", "http://127.0.0.1:9")


def test_thoughts_and_tokens_that_only_the_total_counts(server, local):
    def plan(asked):
        text = f'<think>{{"sentence_1": 0.1}} or 0.2?</think>\n{fill_form(asked)[0]}'
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 150}
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return Fault(200, body=body_of({"model": MODEL, "choices": [choice], "usage": usage}))

    server.plan = plan
    local.ask("--price", "1", "2")
    assert local.answered == 12 and set(local.scores.values()) and "0.1" not in "".join(local.scores.values())
    assert local.totals.usd == pytest.approx(12 * (100 + 2 * 50) / 1e6)


def test_a_key_is_sent_where_there_is_one_and_never_shown(server, local, monkeypatch):
    server.needs_key = True
    local.stops("OPENAI_API_KEY: the API does not accept this key")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    local.ask()
    server.plan = lambda asked: Fault(400, f"who is {KEY}?")
    (local.folder() / handoff.REPLY).unlink()
    assert KEY not in local.stops("who is ", "--no-cache")
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    local.stops("OPENAI_API_KEY holds characters that no key has")


# -- Claude behind gateways ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, like",
    [("anthropic/claude-haiku-5.5", "claude-haiku-5-5"), ("openrouter/anthropic/claude-haiku-5.5", "claude-haiku-5-5"),
     ("eu.anthropic.claude-haiku-4-5-20251001-v1:0", "claude-haiku-4-5"), ("claude-haiku-4-5@20251001", HAIKU_45),
     ("arn:aws:bedrock:eu-west-1:1:inference-profile/eu.anthropic.claude-sonnet-5-5", "claude-sonnet-5-5"),
     ("claude-sonnet-5-5-20260928", "claude-sonnet-5-5"), ("Claude-Opus-5.5", "claude-opus-5-5"),
     ("vertex_ai/claude-opus-5@20260501", "claude-opus-5")],
)  # fmt: skip
def test_the_family_is_found_within_prefixes(model, like):
    assert claude.preset_of(model) == claude.preset_of(like) != claude.ANY_CLAUDE


def test_presets_of_other_models_hold_nothing_that_could_be_refused():
    for model in ("claude-sonnet-4-20250514", "claude-3-5-haiku-20241022", "claude-haiku-9", "bedrock/claude-x"):
        assert claude.preset_of(model) == claude.ANY_CLAUDE and not claude.ANY_CLAUDE.body
    assert claude.preset_of("qwen2.5-vl") == claude.ANY_MODEL and not claude.ANY_MODEL.body


@pytest.mark.parametrize("model", sorted({
    "claude-haiku-5-5", "claude-sonnet-5", "claude-sonnet-5-5", "claude-opus-5", "claude-opus-5-5", "claude-fable-5-1",
    "claude-mythos-5-2", "claude-haiku-4-5", "claude-sonnet-4-6", "claude-opus-4-7", "claude-opus-4-8",
    "claude-future-7",
}))  # fmt: skip
@pytest.mark.parametrize("listed", [False, True])
def test_no_preset_sends_what_a_model_refuses(server, world, model, listed):
    """The server refuses as documented; with `listed` its description of the model is followed."""
    off = "between_tools" if "sonnet-5-5" in model else "disabled"
    always = any(name in model for name in ("opus-5-5", "fable", "mythos"))
    types = {kind: {"supported": kind == off and not always or kind == "adaptive"}
             for kind in ("disabled", "between_tools", "adaptive", "enabled")}  # fmt: skip
    able = {"thinking": {"supported": True, "types": types}, "structured_outputs": {"supported": True},
            "effort": {"supported": True, "low": {"supported": True}}}  # fmt: skip
    server.models = {model: {"capabilities": able} if listed else {}}
    world.ask("--teacher_model", model, "--price", "1", "1")
    assert world.answered == 12 == len(server.log)
    body = server.asked[0].body
    if always:
        assert body["output_config"]["effort"] == "low" and body["max_tokens"] > 4096
    if re.search("claude-[a-z]+-5", model) and not always:
        assert body["thinking"] == {"type": off} and body["max_tokens"] < 4096
    if "future" in model:
        assert server.asked[0].structured == listed and ("thinking" in body) == listed
    before = len(server.log)
    server.models[model] = {} if listed else {"capabilities": able}
    (world.folder() / handoff.REPLY).unlink()
    (world.folder() / handoff.SCORES).unlink()
    world.ask("--teacher_model", model, "--price", "1", "1")
    assert len(server.log) == before, "the cached reply is found whether the model is listed or not"


@pytest.mark.parametrize(
    "listed", [{}, {"capabilities": None}, {"capabilities": 7}, {"capabilities": {"thinking": 1}}, {"object": "model"}]
)
def test_a_listing_that_says_nothing_leaves_the_table(listed, server):
    known = claude.preset_of("claude-haiku-5-5")
    told = claude.preset_of_listing(listed, known)
    assert told == known or (listed["capabilities"] == {"thinking": 1} and told == claude.Preset())


def test_a_listing_that_does_not_answer_costs_no_more_than_its_time(server, world, monkeypatch):
    monkeypatch.setattr(claude, "LISTING_SECONDS", 0.2)
    from tests import api_server

    asked = []
    monkeypatch.setattr(api_server._Handler, "describe", lambda self, model: asked.append(model) or time.sleep(60))
    began = time.monotonic()
    world.ask()
    assert world.answered == 12 and time.monotonic() - began < 30 and asked == ["claude-haiku-5-5"]


def test_structured_and_body_override_the_preset(server, world):
    server.models |= {MODEL: {}, "anthropic/claude-haiku-5.5": {}}
    gateway = ("--price", "0", "0", "--no-cache")
    world.ask("--teacher_model", "anthropic/claude-haiku-5.5", *gateway)
    assert (
        server.asked[-1].body["thinking"] == {"type": "disabled"} and "scores" in server.asked[-1].schema["properties"]
    )

    def again(*more):
        for item in world.items:
            (item.folder / handoff.REPLY).unlink()
        world.ask(*more, *gateway)
        return server.asked[-1]

    haiku_55 = ("--teacher_model", "anthropic/claude-haiku-5.5")
    asked = again(*haiku_55, "--structured", "off", "--body", '{"thinking": null, "max_tokens": 77, "top_k": null}')
    assert not asked.structured and not asked.notes and "thinking" not in asked.body and asked.body["max_tokens"] == 77
    asked = again(*haiku_55, "--body", '{"output_config": {"effort": "low"}}')
    assert asked.structured and asked.body["output_config"]["effort"] == "low"
    asked = again("--teacher_model", MODEL)
    assert not asked.structured and asked.body.keys() == {"model", "max_tokens", "messages"}
    asked = again("--teacher_model", MODEL, "--structured", "on", "--body", '{"temperature": 0}')
    assert "sentence_1" in asked.schema["properties"] and asked.notes == [WORDING.exact["score"]]
    assert asked.body["temperature"] == 0 and world.answered == 12


def test_merge_patch_is_rfc_7396():
    """The appendix of the RFC."""
    cases = [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ]
    for target, patch, result in cases:
        assert merge_patch(target, patch) == result


def test_replies_in_caches_are_found_by_teacher_model_and_question():
    """Of Claude also those that earlier versions kept: the digest is theirs."""
    request = Request("id", SCORE, "1", "text", ("One.",), form_note="note")
    before = "7d90c49b862d89c85ca3d0f3e84d6a6d8d105c7542cb6448d517383ce1b54879"
    assert claude.ClaudeTeacher("claude-haiku-5-5").key(request) == before
    same = [claude.ClaudeTeacher("m", structured="off"), OpenAITeacher("m", "https://a.com", structured="off"),
            OpenAITeacher("m", "http://localhost", structured="off"), OpenAITeacher("m", "https://a.com")]  # fmt: skip
    assert len({teacher.key(request) for teacher in same}) == 4


def test_another_body_is_another_question_to_the_cache(server, local, tmp_path, problems):
    local.ask()
    many_items(tmp_path / "other", 12, problems)
    other = World(server, tmp_path / "other", *local.always)
    other.ask("--body", '{"seed": 7}')
    assert len(server.log) == 24 and server.asked[-1].body["seed"] == 7
