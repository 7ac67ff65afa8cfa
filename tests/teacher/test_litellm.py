"""The real litellm proxy, a third party's gateway, between the real SDKs and the local server as its upstream.

    python -m venv .venv_litellm && .venv_litellm/bin/pip install 'litellm[proxy]==1.108.7'

$ARES_LITELLM names another executable. Skips without one, fails under ARES_REQUIRE_LITELLM=1 (CI).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest

from teacher import api_teacher
from tests.api_server import KEY, ApiServer, Fault, fill_form
from tests.conftest import ROOT
from tests.teacher.teacher_tools import PICTURE, World, correct_one, judge, lay_out, sidecar, wait_until

PROXY_KEY = "sk-litellm-0123456789"
CONFIG = """
model_list:
  - model_name: vision
    litellm_params: {{model: openai/qwen2.5-vl, api_base: "{url}/v1", api_key: {key}}}
  - model_name: dead
    litellm_params: {{model: openai/qwen2.5-vl, api_base: "http://127.0.0.1:9/v1", api_key: {key}}}
  - model_name: stranger
    litellm_params: {{model: openai/not-there, api_base: "{url}/v1", api_key: {key}}}
  - model_name: locked
    litellm_params: {{model: openai/qwen2.5-vl, api_base: "{url}/v1", api_key: sk-no}}
  - model_name: anthropic/claude-haiku-5.5
    litellm_params: {{model: anthropic/claude-haiku-5-5, api_base: "{url}", api_key: {key}}}
general_settings: {{master_key: {proxy_key}}}
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """(address of the proxy, its upstream)."""
    program = Path(os.environ.get("ARES_LITELLM", ROOT / ".venv_litellm/bin/litellm"))
    if not program.exists():
        message = f"no litellm proxy at {program} (set ARES_LITELLM)"
        if os.environ.get("ARES_REQUIRE_LITELLM") == "1":
            pytest.fail(message)
        pytest.skip(message)
    folder = tmp_path_factory.mktemp("litellm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ApiServer() as upstream, open(folder / "log", "w") as log:
        upstream.models |= {"qwen2.5-vl": {}}
        config = CONFIG.format(url=upstream.url, key=KEY, proxy_key=PROXY_KEY)
        (folder / "config.yaml").write_text(config)
        command = [str(program), "--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
        # it would fetch its table of prices
        environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*", "HOME": str(folder)}
        proxy = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        url = f"http://127.0.0.1:{port}"

        def is_up() -> bool:
            assert proxy.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                return urllib.request.urlopen(f"{url}/health/liveliness", timeout=5).status == 200
            except OSError:
                return False

        try:
            wait_until(is_up, 180)
            yield url, upstream
        finally:
            proxy.terminate()
            proxy.wait(30)


@pytest.fixture
def upstream(gateway, monkeypatch, api_environment):
    monkeypatch.setattr(api_teacher, "BACKOFF", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", PROXY_KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", PROXY_KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    server = gateway[1]
    server.asked.clear()
    server.log.clear()
    server.faults.clear()
    server.plan, server.respond, server.headers = lambda asked: None, fill_form, dict
    return server


FLAGS = {
    "openai": ["--teacher", "openai", "--teacher_model", "vision"],
    "claude": ["--teacher_model", "anthropic/claude-haiku-5.5", "--price", "0.1", "0.5"],
}


@pytest.fixture(params=FLAGS)
def flags(request, gateway):
    return ["--base_url", gateway[0], *FLAGS[request.param]]


@pytest.fixture
def world(upstream, questions, flags):
    return World(upstream, questions, *flags)


@pytest.fixture
def chat(upstream, questions, gateway):
    """Through chat completions only."""
    return World(upstream, questions, "--base_url", gateway[0], *FLAGS["openai"])


def test_scoring_with_images_and_again(world, upstream, sample, problems):
    folder = lay_out(world.root, 0, PICTURE, ["Look at it.", "It is so."], problems, sample)
    world.ask()
    assert world.answered == 13 == len(upstream.log) and world.done == [0, 1, 2, 3]
    (asked,) = (asked for asked in upstream.asked if asked.images)
    assert asked.images[0][0] == "image/png" and asked.structured
    about = sidecar(folder)
    assert about["usage"]["input_tokens"] > 0 and about["stop_reason"] == "end_turn"
    world.ask()
    assert len(upstream.log) == 13


def test_correction(upstream, flags, sample, problems, tmp_path):
    _, corrected = correct_one(flags, tmp_path, sample, problems)
    assert corrected["solution"].strip() and len(upstream.log) == 1


def test_judging_with_images(upstream, flags, sample, tmp_path):
    upstream.respond = lambda asked: ('{"reason": "It is so.", "verdict": "1"}', "end_turn")
    found = judge(flags, tmp_path, sample, 12)
    assert len(upstream.log) == 24 and any(asked.images for asked in upstream.asked)
    assert found["summary"]["position"]["first"] == 100


def test_rate_limits_and_failures_that_pass(world, upstream):
    faults = [Fault(429), Fault(429, headers={"retry-after": "0.1"}), Fault(500, "boom"), Fault(0, kind="reset")]
    upstream.faults.extend(faults)
    world.ask()
    assert world.answered == 12 and len(upstream.log) >= 16


def test_upstreams_rate_limit_headers_come_through(chat, upstream, monkeypatch):
    from teacher import pace

    left, follow = [], pace.Pace.follow

    def noted(self, headers):
        left.extend(pace.limits_left(headers))
        follow(self, headers)

    monkeypatch.setattr(pace.Pace, "follow", noted)
    told = {"x-ratelimit-remaining-requests": "500", "x-ratelimit-reset-requests": "120ms"}
    upstream.headers = lambda: told
    chat.ask()
    assert chat.answered == 12 and ("requests", 500.0, 0.12) in left


@pytest.mark.parametrize(
    "kind, reason", [("max_tokens", "max_tokens"), ("refusal", "refusal"), ("chatter", "no_json")]
)
def test_unusable_replies_are_reported(world, upstream, kind, reason):
    text = world.request(3)
    upstream.plan = lambda asked: Fault(0, kind=kind) if asked.text == text else None
    world.stops(f"1 of 12 replies are unusable .{reason} 1.", "--attempts", "2")
    assert world.answered == 11


def test_a_200_with_an_error_in_it(chat, upstream):
    body = json.dumps({"error": {"message": "out of memory", "type": "server_error", "code": 500}}).encode()
    upstream.plan = lambda asked: Fault(200, body=body)
    line = chat.stops("--", "--concurrency", "1")
    assert len(line) < 700 and not chat.answered
    upstream.plan = lambda asked: None
    chat.ask()
    assert chat.answered == 12


@pytest.mark.parametrize(
    "model, words",
    [
        ("nobody", "--teacher_model: nobody is not known.*Invalid model name.*the server has .*vision"),
        ("dead", "Connection error"),
        ("stranger", "--teacher_model: stranger .*not-there"),
        ("locked", "OPENAI_API_KEY: the API does not accept this key"),
    ],
)
def test_each_failure_is_one_line(chat, upstream, model, words):
    line = chat.stops(words, "--teacher_model", model)
    assert len(line) < 700 and not chat.answered


def test_unknown_model_and_wrong_key_at_messages(upstream, questions, gateway, monkeypatch):
    world = World(upstream, questions, "--base_url", gateway[0])
    world.stops("--teacher_model: nobody is not known.*the server has .*claude-haiku-5.5", "--teacher_model", "nobody")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-wrong-0123456789")
    line = world.stops("ANTHROPIC_API_KEY", "--teacher_model", "anthropic/claude-haiku-5.5")
    assert "sk-wrong" not in line


def test_a_wrong_key_and_a_gateway_that_is_gone(chat, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-0123456789")
    assert "sk-wrong" not in chat.stops("OPENAI_API_KEY")
    monkeypatch.setattr(api_teacher, "MAX_RETRIES", 1)
    chat.stops("--base_url: cannot reach http://127.0.0.1:9/v1/", "--base_url", "http://127.0.0.1:9")
