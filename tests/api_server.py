"""A local HTTP server that speaks Anthropic's API as documented, for tests with the real `anthropic` client.

Messages, count_tokens and Message Batches. It checks what the real one checks - key, version, model, thinking,
temperature and output_config per model, image data against media type, custom ids - records every request, and injects
faults (status, headers, error body as documented, broken connections, spoilt replies). Replies fill the form they are
sent; `server.respond` changes that. Alone, for benchmarks:

    python -m tests.api_server --latency 0.2        # prints its address, serves until standard input is closed
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "sk-ant-test-0123456789abcdef"
MODELS = ("claude-haiku-5-5", "claude-haiku-4-5-20251001")
ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
    500: "api_error", 529: "overloaded_error",
}  # fmt: skip
MESSAGE_FIELDS = frozenset(
    "model max_tokens messages thinking temperature system metadata output_config stop_sequences".split()
)


@dataclass
class Fault:
    """What to answer instead of a reply: a status with an error body, or `kind`, one of SPOILERS."""

    status: int
    message: str = "injected"
    headers: dict[str, str] = field(default_factory=dict)
    error_code: str | None = None
    kind: str = ""
    body: bytes | None = None  # instead of the API's error body
    content_type: str = "application/json"

    @property
    def name(self) -> str:
        bare = self.status == 429 and "retry-after" not in self.headers
        return self.kind or ("429_bare" if bare else str(self.status))


# kinds of faults with status 0 (nothing usable arrives) and 200 (a whole reply that cannot be used)
LOST = ("reset", "truncated_json", "hang")
SPOILT = ("wrong_count", "chatter", "refusal", "max_tokens")
HARMLESS = ("slow", "prose")
SPOILERS = LOST + SPOILT + HARMLESS


@dataclass
class Asked:
    """One request as it arrived."""

    body: dict[str, Any]
    headers: dict[str, str]
    images: list[tuple[str, int, int]]  # (true media type, width, height), in order
    text: str  # the request file's text: the first text block
    notes: list[str]  # further text blocks
    content_types: list[str]  # of the blocks, in order

    @property
    def structured(self) -> bool:
        return "output_config" in self.body

    @property
    def correction(self) -> bool:
        return "Final rationale" in self.text


def fill_form(asked: Asked, score: Callable[[str], float] = lambda sentence: 0.8) -> tuple[str, str]:
    """(reply, stop reason): scores for a scoring request, an unchanged rationale for a correction."""
    if asked.correction:
        rationale = asked.text.rsplit("explanation:\n", 1)[1].strip()
        return json.dumps({"Original rationale": rationale, "Final rationale": rationale}, indent=0), "end_turn"
    form = asked.text[asked.text.rindex("\n{\n") + 1 :]
    sentences = re.findall(r'^"(.*)": xxx,?$', form, re.MULTILINE)
    if asked.structured:
        return json.dumps({"scores": [score(sentence) for sentence in sentences]}), "end_turn"
    return "{\n" + ",\n".join(f'"{sentence}": {score(sentence)}' for sentence in sentences) + "\n}", "end_turn"


def score_by_text(asked: Asked) -> tuple[str, str]:
    """Scores that depend on the sentence alone, so that two runs can be compared."""
    return fill_form(asked, lambda sentence: hashlib.sha256(sentence.encode()).digest()[0] % 11 / 10)


@dataclass
class Batch:
    id: str
    created: float
    requests: list[dict]
    results: list[str] | None = None  # JSONL lines, in the order of the results


class ApiServer:
    """`with ApiServer() as server:` - `server.url`, `server.asked`, `server.faults.append(Fault(529))`.

    `plan(asked) -> Fault | None` is consulted when `faults` is empty. `log` has (digest of the text, what became of
    it) for every Messages request; `billed` adds up the tokens of whole replies, those that were lost included.
    """

    def __init__(self, respond: Callable[[Asked], tuple[str, str]] = fill_form, latency: float = 0.0):
        self.respond = respond
        self.latency = latency
        self.slow_seconds, self.hang_seconds = 0.3, 30.0
        self.asked: list[Asked] = []  # requests that passed the checks, faults included
        self.keep = True
        self.log: list[tuple[str, str]] = []
        self.billed: Counter[str] = Counter()
        self.statuses: list[int] = []
        self.faults: deque[Fault] = deque()
        self.plan: Callable[[Asked], Fault | None] = lambda asked: None
        self.in_flight = self.most_in_flight = 0
        self.counted = 0
        # batches
        self.batches: list[Batch] = []
        self.batch_seconds = 0.0  # until a batch ends
        # for creation; kind "lost": created, but the answer breaks off; "created": created, but the answer is an
        # error; "dropped", "html": not created
        self.batch_faults: deque[Fault] = deque()
        self.create_plan: Callable[[], Fault | None] = lambda: None
        self.result_faults: deque[Fault] = deque()
        # kind of result, or the error (type and message) of an errored one
        self.outcome: Callable[[str, Asked], str | dict[str, str]] = lambda custom_id, asked: "succeeded"
        # for retrieval: a status, or kind in RETRIEVALS; for results: a status, or kind in RESULTS, or a broken stream
        self.retrieve_plan: Callable[[Batch], Fault | None] = lambda batch: None
        self.results_plan: Callable[[Batch], Fault | None] = lambda batch: None
        self.paid: Counter[str] = Counter()  # digest of the text -> replies made in batches
        self.most_batches = 1000  # a client that buys without bound fails its test instead of running for ever
        self.usage_extra: dict[str, Any] = {}  # further fields of `usage`
        self.retrieved = 0
        self.lock = threading.Lock()
        self.ids = itertools.count(1)
        handler = type("Handler", (_Handler,), {"api": self})
        self.http = _Http(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> ApiServer:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def message(self, asked: Asked, text: str, stop_reason: str) -> dict:
        usage = {"input_tokens": len(asked.text) // 4 + 100 * len(asked.images), "output_tokens": len(text) // 4}
        return {
            "id": f"msg_{next(self.ids):06}",
            "type": "message",
            "role": "assistant",
            "model": asked.body["model"],
            "content": [{"type": "text", "text": text}] if text else [],
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": {**usage, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, **self.usage_extra},
        }

    def results_of(self, batch: Batch) -> list[str]:
        """JSONL lines out of order, made once."""
        if batch.results is None:
            lines = []
            for request in batch.requests:
                asked = _read(request["params"], {})
                kind = self.outcome(request["custom_id"], asked)
                result: dict[str, Any] = {"type": kind}
                refusal = _refusal(request["params"])
                if isinstance(kind, dict) or kind == "errored" or refusal:
                    inner = {"type": "invalid_request_error" if refusal else "api_error", "message": str(refusal)}
                    inner = kind if isinstance(kind, dict) else inner
                    result = {"type": "errored", "error": {"type": "error", "error": inner, "request_id": None}}
                elif kind == "succeeded":
                    message = self.message(asked, *self.respond(asked))
                    self.billed["batch_input_tokens"] += message["usage"]["input_tokens"]
                    self.billed["batch_output_tokens"] += message["usage"]["output_tokens"]
                    self.paid[hashlib.sha256(asked.text.encode()).hexdigest()] += 1
                    result["message"] = message
                lines.append(json.dumps({"custom_id": request["custom_id"], "result": result}))
            random.Random(0).shuffle(lines)
            batch.results = lines
        return batch.results


# what a batch's description says instead
RETRIEVALS = {
    "no_url": {"results_url": None},
    "relative_url": {"results_url": "results.jsonl"},
    "foreign_url": {"results_url": "http://127.0.0.1:9/results"},
    "no_status": {"processing_status": None},
}
# what a batch's results hold instead: lines -> lines
RESULTS: dict[str, Callable[[list[str]], list[str]]] = {
    "foreign": lambda lines: [line.replace('"custom_id": "', '"custom_id": "other-', 1) for line in lines],
    "partly_foreign": lambda lines: [*RESULTS["foreign"](lines[:1]), *lines[1:]],
    "twice": lambda lines: [*lines, *lines],
    "one_missing": lambda lines: lines[1:],
    "empty": lambda lines: [],
    "bad_line": lambda lines: [*lines[:-1], lines[-1][:20]],
    "odd_line": lambda lines: [*lines[:-1], '{"custom_id": null, "result": null}', "17"],
}


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address) -> None:
        pass  # a client that was killed


def spoil(kind: str, asked: Asked, text: str) -> tuple[str, str]:
    """(reply, stop reason) of a whole reply that is not what was asked for."""
    if kind == "wrong_count":
        return '{"scores": [0.5]}' if text.count(",") else '{"scores": [0.5, 0.5]}', "end_turn"
    if kind == "chatter":
        return "I have read it and it is mostly fine.", "end_turn"
    if kind == "refusal":
        return "", "refusal"
    if kind == "max_tokens":
        return text[: len(text) // 2], "max_tokens"
    if kind == "prose":
        return f"Here are the scores:\n```json\n{text}\n```\nI hope this helps.", "end_turn"
    return text, "end_turn"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as with the real one
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave together
    api: ApiServer

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = self.path.split("?")[0]
        if not self.allowed():
            return None
        body = json.loads(raw)
        if path == "/v1/messages":
            return self.messages(body)
        if path == "/v1/messages/count_tokens":
            return self.count_tokens(body)
        if path == "/v1/messages/batches":
            return self.create_batch(body)
        return self.error(404, f"no such path: {self.path}")

    def do_GET(self) -> None:
        if not self.allowed():
            return None
        url = urlsplit(self.path)
        parts = url.path.removeprefix("/v1/messages/batches").strip("/").split("/")
        if not url.path.startswith("/v1/messages/batches"):
            return self.error(404, f"no such path: {self.path}")
        if parts == [""]:
            return self.list_batches(parse_qs(url.query))
        batch = next((batch for batch in self.api.batches if batch.id == parts[0]), None)
        if batch is None:
            return self.error(404, f"batch {parts[0]} not found")
        if parts[1:] == ["results"]:
            return self.batch_results(batch)
        self.api.retrieved += 1
        return self.retrieve(batch)

    def allowed(self) -> bool:
        # the SDK sends a key as x-api-key, from version 2 on as a bearer token
        bearer = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if KEY not in (self.headers.get("x-api-key"), bearer):
            self.error(401, "invalid x-api-key")
            return False
        if not self.headers.get("anthropic-version"):
            self.error(400, "anthropic-version: header is required")
            return False
        return True

    # -- Messages --------------------------------------------------------------------------------------------

    def messages(self, body: dict) -> None:
        api = self.api
        problem = _refusal(body)
        if problem:
            return self.error(*problem)
        asked = _read(body, dict(self.headers))
        with api.lock:
            if api.keep:
                api.asked.append(asked)
            fault = api.faults.popleft() if api.faults else api.plan(asked)
            name = fault.name if fault else "ok"
            api.log.append((hashlib.sha256(asked.text.encode()).hexdigest(), name))
            api.in_flight += 1
            api.most_in_flight = max(api.most_in_flight, api.in_flight)
        try:
            if api.latency:
                time.sleep(api.latency)
            if fault is not None and fault.body is not None:
                return self.send_bytes(fault.status, fault.body, fault.headers, fault.content_type)
            if fault is not None and not fault.kind:
                return self.error(fault.status, fault.message, fault.headers, fault.error_code)
            return self.reply(asked, fault.kind if fault else "")
        finally:
            with api.lock:
                api.in_flight -= 1

    def reply(self, asked: Asked, kind: str) -> None:
        text, stop_reason = self.api.respond(asked)
        if kind in SPOILT or kind == "prose":
            text, stop_reason = spoil(kind, asked, text)
        message = self.api.message(asked, text, stop_reason)
        with self.api.lock:
            for name in ("input_tokens", "output_tokens"):
                self.api.billed[name] += message["usage"][name]
        if kind == "slow":
            time.sleep(self.api.slow_seconds)
        if kind == "hang":
            time.sleep(self.api.hang_seconds)
            self.close_connection = True
        elif kind == "reset":
            self.break_off(json.dumps(message).encode())
        elif kind == "truncated_json":
            self.send_bytes(200, json.dumps(message).encode()[:-40], {})
        else:
            self.send(200, message)

    def break_off(self, data: bytes) -> None:
        """Half of a reply, then a reset."""
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def count_tokens(self, body: dict) -> None:
        unknown = body.keys() - {"model", "messages", "thinking", "system", "output_config", "tools", "tool_choice"}
        if unknown:
            return self.error(400, f"{sorted(unknown)[0]}: Extra inputs are not permitted")
        self.api.counted += 1
        asked = _read(body, {})
        return self.send(200, {"input_tokens": len(asked.text) // 3 + 100 * len(asked.images)})

    # -- Batches ---------------------------------------------------------------------------------------------

    def create_batch(self, body: dict) -> None:
        requests = body.get("requests")
        ids = [request.get("custom_id") for request in requests]
        if not requests or len(requests) > 100_000:
            return self.error(400, "requests: between 1 and 100000 are required")
        if len(set(ids)) != len(ids) or not all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name or "") for name in ids):
            return self.error(400, "requests: custom_id must be unique and match ^[a-zA-Z0-9_-]{1,64}$")
        if len(self.api.batches) >= self.api.most_batches:
            return self.error(403, "more batches than the test allows")
        fault = self.api.batch_faults.popleft() if self.api.batch_faults else self.api.create_plan()
        if fault is not None and not fault.kind:
            return self.error(fault.status, fault.message, fault.headers, fault.error_code)
        if fault is not None and fault.kind == "dropped":
            return self.break_off(b"not created")
        if fault is not None and fault.kind == "html":
            return self.send_bytes(200, b"<html>Sign in</html>", {}, "text/html")
        batch = Batch(f"msgbatch_{next(self.api.ids):06}", time.time(), requests)
        with self.api.lock:
            self.api.batches.append(batch)
        if fault is not None and fault.kind == "lost":
            return self.break_off(json.dumps(self.described(batch)).encode())
        if fault is not None and fault.kind == "created":  # a gateway gave up waiting
            return self.error(fault.status, fault.message)
        return self.send(200, self.described(batch))

    def retrieve(self, batch: Batch) -> None:
        fault = self.api.retrieve_plan(batch)
        if fault is not None and not fault.kind:
            return self.error(fault.status, fault.message, fault.headers, fault.error_code)
        kind = fault.kind if fault is not None else ""
        if kind == "html":
            return self.send_bytes(200, b"<html>Sign in</html>", {}, "text/html")
        return self.send(200, self.described(batch) | RETRIEVALS.get(kind, {}))

    def described(self, batch: Batch) -> dict:
        ended = time.time() >= batch.created + self.api.batch_seconds
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        if ended:
            for line in self.api.results_of(batch):
                counts[json.loads(line)["result"]["type"]] += 1
        else:
            counts["processing"] = len(batch.requests)
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": "ended" if ended else "in_progress",
            "request_counts": counts,
            "created_at": _rfc3339(batch.created),
            "expires_at": _rfc3339(batch.created + 86400),
            "ended_at": _rfc3339(batch.created + self.api.batch_seconds) if ended else None,
            "archived_at": None,
            "cancel_initiated_at": None,
            "results_url": f"{self.api.url}/v1/messages/batches/{batch.id}/results" if ended else None,
        }

    def list_batches(self, query: dict) -> None:
        limit = int(query.get("limit", ["20"])[0])
        batches = sorted(self.api.batches, key=lambda batch: -batch.created)
        after = query.get("after_id", [None])[0]
        if after:
            batches = batches[[batch.id for batch in batches].index(after) + 1 :]
        page = [self.described(batch) for batch in batches[:limit]]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        more = len(batches) > limit
        return self.send(200, {"data": page, "has_more": more, "first_id": first, "last_id": last})

    def batch_results(self, batch: Batch) -> None:
        fault = self.api.result_faults.popleft() if self.api.result_faults else self.api.results_plan(batch)
        if fault is not None and not fault.kind:
            return self.error(fault.status, fault.message, fault.headers, fault.error_code)
        lines = self.api.results_of(batch)
        if fault is not None and fault.kind in RESULTS:
            lines = RESULTS[fault.kind](lines)
        data = "".join(line + "\n" for line in lines).encode()
        if fault is not None and fault.kind not in RESULTS:
            return self.break_off(data)
        return self.send_bytes(200, data, {}, "application/x-jsonl")

    # -- answers ---------------------------------------------------------------------------------------------

    def error(self, status: int, message: str, headers: dict | None = None, error_code: str | None = None) -> None:
        inner: dict[str, Any] = {"type": ERROR_TYPES.get(status, "api_error"), "message": message}
        if error_code:
            inner["details"] = {"error_code": error_code}
        self.send(status, {"type": "error", "error": inner, "request_id": f"req_{next(self.api.ids):06}"}, headers)

    def send(self, status: int, body: dict, headers: dict | None = None) -> None:
        self.send_bytes(status, json.dumps(body).encode(), headers or {})

    def send_bytes(self, status: int, data: bytes, headers: dict, kind: str = "application/json") -> None:
        with self.api.lock:
            self.api.statuses.append(status)
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.send_header("request-id", f"req_{next(self.api.ids):06}")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        pass


def _rfc3339(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e6):06}Z"


def _read(body: dict, headers: dict) -> Asked:
    blocks = body["messages"][0]["content"]
    blocks = [{"type": "text", "text": blocks}] if isinstance(blocks, str) else blocks
    images = [_image(block["source"])[:3] for block in blocks if block["type"] == "image"]
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    return Asked(body, headers, images, texts[0], texts[1:], [block["type"] for block in blocks])


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
    unknown = body.keys() - MESSAGE_FIELDS
    if unknown:
        return 400, f"{sorted(unknown)[0]}: Extra inputs are not permitted"
    if model.startswith("claude-haiku-5") and body.get("temperature", 1) != 1:
        return 400, "temperature: only the default is supported by this model"
    if body.get("thinking", {"type": "disabled"})["type"] not in ("disabled", "adaptive"):
        return 400, "thinking: not supported by this model"
    form = body.get("output_config", {}).get("format")
    if form is not None and (
        form.get("type") != "json_schema" or form["schema"].get("additionalProperties") is not False
    ):
        return 400, "output_config.format.schema: additionalProperties must be explicitly set to false"
    for block in body["messages"][0]["content"]:
        if isinstance(block, dict) and block["type"] == "text" and not block["text"].strip():
            return 400, "messages: text content blocks must contain non-whitespace text"
        if isinstance(block, dict) and block["type"] == "image":
            try:
                true_type, width, height = _image(block["source"])
            except Exception:
                return 400, "messages.0.content: Could not process image"
            if true_type != block["source"]["media_type"]:
                return 400, f"messages.0.content: the image appears to be a {true_type} image"
            if max(width, height) > 8000:
                return 400, "messages.0.content: image dimensions exceed 8000 pixels"
            if len(block["source"]["data"]) > 5 * 1024 * 1024:
                return 400, "messages.0.content: image exceeds 5 MB maximum"
    return None


def main() -> None:
    import argparse
    import sys

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each reply")
    args = parser.parse_args()
    with ApiServer(latency=args.latency) as server:
        server.keep = False
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
