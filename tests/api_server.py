"""A local HTTP server that speaks the Messages API as documented, for tests with the real `anthropic` client.

It checks what the real one checks - key, version, model, thinking and temperature per model, image data against media
type - records every request, and injects faults (status, headers, error body as documented, broken connections).
Replies fill the form they are sent; `server.respond` changes that.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-ant-test-0123456789abcdef"
MODELS = ("claude-haiku-5-5", "claude-haiku-4-5-20251001")
ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
    500: "api_error", 529: "overloaded_error",
}  # fmt: skip


@dataclass
class Fault:
    """What to answer instead of a reply: a status with an error body, or a connection that breaks (status 0)."""

    status: int
    message: str = "injected"
    headers: dict[str, str] = field(default_factory=dict)
    error_code: str | None = None


@dataclass
class Asked:
    """One request as it arrived."""

    body: dict[str, Any]
    headers: dict[str, str]
    images: list[tuple[str, int, int]]  # (true media type, width, height), in order
    text: str
    content_types: list[str]  # of the blocks, in order


def fill_form(asked: Asked) -> tuple[str, str]:
    """(reply, stop reason): scores of 0.8 for a scoring request, an unchanged rationale for a correction."""
    if "Final rationale" in asked.text:
        rationale = asked.text.rsplit("explanation:\n", 1)[1].strip()
        return json.dumps({"Original rationale": rationale, "Final rationale": rationale}, indent=0), "end_turn"
    form = asked.text[asked.text.rindex("\n{\n") + 1 :]
    return re.sub(r'": xxx(?=,?\n)', '": 0.8', form), "end_turn"


class ApiServer:
    """`with ApiServer() as server:` - `server.url`, `server.asked`, `server.faults.append(Fault(529))`."""

    def __init__(self, respond: Callable[[Asked], tuple[str, str]] = fill_form):
        self.respond = respond
        self.asked: list[Asked] = []  # requests that passed the checks, faults included
        self.statuses: list[int] = []
        self.faults: deque[Fault] = deque()
        self.lock = threading.Lock()
        self.ids = itertools.count(1)
        handler = type("Handler", (_Handler,), {"api": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> ApiServer:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.http.shutdown()
        self.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as with the real one
    api: ApiServer

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.split("?")[0] != "/v1/messages":
            return self.error(404, f"no such path: {self.path}")
        # the SDK sends a key as x-api-key, from version 2 on as a bearer token
        if KEY not in (
            self.headers.get("x-api-key"),
            (self.headers.get("authorization") or "").removeprefix("Bearer "),
        ):
            return self.error(401, "invalid x-api-key")
        if not self.headers.get("anthropic-version"):
            return self.error(400, "anthropic-version: header is required")
        body = json.loads(raw)
        problem = _refusal(body)
        if problem:
            return self.error(*problem)
        asked = _read(body, dict(self.headers))
        with self.api.lock:
            self.api.asked.append(asked)
            fault = self.api.faults.popleft() if self.api.faults else None
        if fault is None:
            self.reply(asked)
        elif fault.status:
            self.error(fault.status, fault.message, fault.headers, fault.error_code)
        else:  # a length is promised and not kept
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"id": "msg_')
            self.close_connection = True

    def reply(self, asked: Asked) -> None:
        text, stop_reason = self.api.respond(asked)
        usage = {"input_tokens": len(asked.text) // 4 + 100 * len(asked.images), "output_tokens": len(text) // 4}
        message = {
            "id": f"msg_{next(self.api.ids):06}",
            "type": "message",
            "role": "assistant",
            "model": asked.body["model"],
            "content": [{"type": "text", "text": text}] if text else [],
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": {**usage, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0},
        }
        self.send(200, message)

    def error(self, status: int, message: str, headers: dict | None = None, error_code: str | None = None) -> None:
        inner: dict[str, Any] = {"type": ERROR_TYPES.get(status, "api_error"), "message": message}
        if error_code:
            inner["details"] = {"error_code": error_code}
        self.send(status, {"type": "error", "error": inner, "request_id": f"req_{next(self.api.ids):06}"}, headers)

    def send(self, status: int, body: dict, headers: dict | None = None) -> None:
        data = json.dumps(body).encode()
        with self.api.lock:
            self.api.statuses.append(status)
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("request-id", f"req_{next(self.api.ids):06}")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def _read(body: dict, headers: dict) -> Asked:
    blocks = body["messages"][0]["content"]
    blocks = [{"type": "text", "text": blocks}] if isinstance(blocks, str) else blocks
    images = [_image(block["source"])[:3] for block in blocks if block["type"] == "image"]
    text = "\n".join(block["text"] for block in blocks if block["type"] == "text")
    return Asked(body, headers, images, text, [block["type"] for block in blocks])


def _image(source: dict) -> tuple[str, int, int]:
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(source["data"], validate=True))) as image:
        image.load()
        return Image.MIME[image.format], *image.size


def _refusal(body: dict) -> tuple[int, str] | None:
    """Status and message of what the API would not accept; None for a good request."""
    model = body.get("model", "")
    if model not in MODELS:
        return 404, f"model: {model}"
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
        return 400, "max_tokens: must be at least 1"
    if not body.get("messages") or body["messages"][-1]["role"] != "user":
        return 400, "messages: the conversation must end with a user message"
    unknown = body.keys() - {"model", "max_tokens", "messages", "thinking", "temperature", "system", "metadata",
                             "output_config"}  # fmt: skip
    if unknown:
        return 400, f"{sorted(unknown)[0]}: Extra inputs are not permitted"
    if model.startswith("claude-haiku-5") and body.get("temperature", 1) != 1:
        return 400, "temperature: only the default is supported by this model"
    if body.get("thinking", {"type": "disabled"})["type"] not in ("disabled", "adaptive"):
        return 400, "thinking: not supported by this model"
    for block in body["messages"][0]["content"]:
        if isinstance(block, dict) and block["type"] == "image":
            try:
                true_type, width, height = _image(block["source"])
            except Exception:
                return 400, "messages.0.content: Could not process image"
            if true_type != block["source"]["media_type"]:
                return 400, f"messages.0.content: the image appears to be a {true_type} image"
            if max(width, height) > 8000:
                return 400, "messages.0.content: image dimensions exceed 8000 pixels"
    return None
