"""A local HTTP server that speaks Anthropic's and OpenAI's APIs as documented, for tests with the real SDKs.

Messages, count_tokens, Message Batches, models; chat completions. It checks what the real ones check - key, version,
model, thinking, temperature and output_config per model, schemas, image data against media type, custom ids - records
every request, and injects faults (status, headers, error body as documented, broken connections, spoilt replies).
Replies fill the form they are sent; `server.respond` changes that.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KEY = "sk-ant-test-0123456789abcdef"
MODELS = ("claude-haiku-5-5", "claude-haiku-4-5-20251001")
ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
    500: "api_error", 529: "overloaded_error",
}  # fmt: skip
MESSAGE_FIELDS = set("model max_tokens messages stream thinking temperature system metadata output_config".split())
CHAT_FIELDS = set("model max_tokens max_completion_tokens messages temperature response_format seed top_p".split())
FINISH = {"end_turn": "stop", "max_tokens": "length", "refusal": "content_filter", "declined": "stop"}
COUNT_FIELDS = set("model messages thinking system output_config tools tool_choice".split())

# The kinds of faults. A connection that breaks off after half of the answer, or never answers:
BROKEN = ("reset", "lost", "dropped")
LOST = ("reset", "truncated_json", "hang")  # of the Messages API: paid for, and nothing usable arrives
# whole replies of the Messages API that are not what was asked for: text -> (reply, stop reason)
SPOIL: dict[str, Callable[[str], tuple[str, str]]] = {
    "wrong_count": lambda text: ('{"scores": [0.5]}' if "," in text else '{"scores": [0.5, 0.5]}', "end_turn"),
    "chatter": lambda text: ("I have read it and it is mostly fine.", "end_turn"),
    "refusal": lambda text: ("", "refusal"),
    "declined": lambda text: ("I cannot help with that.", "declined"),  # OpenAI's: a field beside an empty content
    "max_tokens": lambda text: (text[: len(text) // 2], "max_tokens"),
    "prose": lambda text: (f"Here are the scores:\n```json\n{text}\n```\nI hope this helps.", "end_turn"),  # usable
}
SPOILT = tuple(kind for kind in SPOIL if kind not in ("prose", "declined"))
RETRIEVALS = {  # what a batch's description says instead
    "no_url": {"results_url": None},
    "relative_url": {"results_url": "results.jsonl"},
    "foreign_url": {"results_url": "http://127.0.0.1:9/results"},
    "no_status": {"processing_status": None},
}
RESULTS: dict[str, Callable[[list[str]], list[str]]] = {  # what a batch's results hold instead: lines -> lines
    "foreign": lambda lines: [line.replace('"custom_id": "', '"custom_id": "other-', 1) for line in lines],
    "partly_foreign": lambda lines: [*RESULTS["foreign"](lines[:1]), *lines[1:]],
    "twice": lambda lines: [*lines, *lines],
    "one_missing": lambda lines: lines[1:],
    "empty": lambda lines: [],
    "bad_line": lambda lines: [*lines[:-1], lines[-1][:20]],
    "odd_line": lambda lines: [*lines[:-1], '{"custom_id": null, "result": null}', "17"],
}


@dataclass
class Fault:
    """What to answer instead: an error of `status`, `body` as it is, or `kind`: "html", "slow", or one of the above.

    At the creation of a batch "lost" and "created" create it; the answer then breaks off or is an error.
    """

    status: int
    message: str = "injected"
    headers: dict[str, str] = field(default_factory=dict)
    error_code: str | None = None
    kind: str = ""
    body: bytes | None = None
    content_type: str = "application/json"

    @property
    def name(self) -> str:
        bare = self.status == 429 and "retry-after" not in self.headers
        return self.kind or ("429_bare" if bare else str(self.status))


@dataclass
class Asked:
    """One request as it arrived."""

    body: dict[str, Any]
    headers: dict[str, str]
    images: list[tuple[str, int, int]]  # (true media type, width, height), in order
    text: str  # the request file's text: the first text block
    notes: list[str]  # further text blocks
    content_types: list[str]  # of the blocks, in order

    @classmethod
    def read(cls, body: dict, headers: dict | None = None) -> Asked:
        blocks = body["messages"][0]["content"]
        blocks = [{"type": "text", "text": blocks}] if isinstance(blocks, str) else blocks
        images = [_image(_source(block)) for block in blocks if block["type"] in ("image", "image_url")]
        texts = [block["text"] for block in blocks if block["type"] == "text"]
        return cls(body, headers or {}, images, texts[0], texts[1:], [block["type"] for block in blocks])

    @property
    def structured(self) -> bool:
        return self.schema is not None

    @property
    def schema(self) -> dict[str, Any] | None:
        form = self.body.get("output_config", {}).get("format") or {}
        return form.get("schema") or self.body.get("response_format", {}).get("json_schema", {}).get("schema")

    @property
    def rationales(self) -> list[list[str]]:
        """The sentences of each rationale that is to be scored: one, or several under names of their own."""
        form = self.text[self.text.rindex("\n{\n") + 1 :]
        parts = re.split(r'^"rationale_\d+": \{$', form, flags=re.MULTILINE)
        return [re.findall(r'^"(.*)": xxx,?$', part, re.MULTILINE) for part in parts[1:] or parts]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def fill_form(asked: Asked, score: Callable[[str], float] = lambda sentence: 0.8) -> tuple[str, str]:
    """(reply, stop reason): scores for a scoring request, an unchanged rationale for a correction."""
    if "Final rationale" in asked.text:
        rationale = asked.text.rsplit("explanation:\n", 1)[1].strip()
        return json.dumps({"Final rationale": rationale}, indent=0), "end_turn"
    filled = [_filled(asked, sentences, score) for sentences in asked.rationales]
    if len(filled) == 1:
        return filled[0], "end_turn"
    if asked.schema and "scores" in asked.schema["properties"]:
        return json.dumps({"scores": [json.loads(each)["scores"] for each in filled]}), "end_turn"
    named = ",\n".join(f'"rationale_{number}": {each}' for number, each in enumerate(filled, start=1))
    return f"{{\n{named}\n}}", "end_turn"


def _filled(asked: Asked, sentences: list[str], score: Callable[[str], float]) -> str:
    """The reply about one rationale."""
    if asked.schema and "scores" not in asked.schema["properties"]:
        return json.dumps({f"sentence_{number}": score(each) for number, each in enumerate(sentences, start=1)})
    if asked.structured:
        return json.dumps({"scores": [score(sentence) for sentence in sentences]})
    return "{\n" + ",\n".join(f'"{sentence}": {score(sentence)}' for sentence in sentences) + "\n}"


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

    A plan returns the Fault of one call, or None; the queues `faults`, `batch_faults` and `result_faults` go first.
    `log` has (digest of the text, what became of it) for every Messages request; `billed` adds up the tokens of whole
    replies, those that were lost included.
    """

    def __init__(self, respond: Callable[[Asked], tuple[str, str]] = fill_form, latency: float = 0.0):
        self.respond, self.latency = respond, latency
        self.slow_seconds, self.hang_seconds = 0.3, 30.0
        self.asked: list[Asked] = []  # requests that passed the checks, faults included
        self.keep = True
        self.log: list[tuple[str, str]] = []
        self.billed: Counter[str] = Counter()
        self.usage_extra: dict[str, Any] = {}  # further fields of `usage`
        self.faults: deque[Fault] = deque()
        self.plan: Callable[[Asked], Fault | None] = lambda asked: None
        self.in_flight = self.most_in_flight = self.counted = 0
        self.needs_key = True
        self.models: dict[str, dict] = {name: {} for name in MODELS}  # id -> more fields of its description
        self.headers: Callable[[], dict[str, str]] = dict  # of whole replies, such as rate limits
        # batches
        self.batches: list[Batch] = []
        self.batch_seconds = 0.0  # until a batch ends
        self.most_batches = 1000  # a client that buys without bound fails its test instead of running for ever
        self.paid: Counter[str] = Counter()  # digest of the text -> replies made in batches
        self.batch_faults: deque[Fault] = deque()
        self.create_plan: Callable[[], Fault | None] = lambda: None
        self.retrieve_plan: Callable[[Batch], Fault | None] = lambda batch: None
        self.result_faults: deque[Fault] = deque()
        self.results_plan: Callable[[Batch], Fault | None] = lambda batch: None
        # kind of result, or the error (type and message) of an errored one
        self.outcome: Callable[[str, Asked], str | dict[str, str]] = lambda custom_id, asked: "succeeded"
        self.lock = threading.Lock()
        self.ids = itertools.count(1)
        self.http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": self}))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> ApiServer:
        threading.Thread(target=self.http.serve_forever, args=(0.005,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def message(self, asked: Asked, text: str, stop_reason: str) -> dict:
        usage = {"input_tokens": len(asked.text) // 4 + 100 * len(asked.images), "output_tokens": len(text) // 4}
        return {
            "id": f"msg_{next(self.ids):06}", "type": "message", "role": "assistant", "model": asked.body["model"],
            "content": [{"type": "text", "text": text}] if text else [],
            "stop_reason": stop_reason, "stop_sequence": None,
            "usage": {**usage, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, **self.usage_extra},
        }  # fmt: skip

    def completion(self, asked: Asked, text: str, stop_reason: str) -> dict:
        """The reply as a chat completion."""
        made = self.message(asked, text, stop_reason)["usage"]
        usage = {"prompt_tokens": made["input_tokens"], "completion_tokens": made["output_tokens"]}
        declined = stop_reason == "declined"
        message = {"role": "assistant", "content": None if declined else text, "refusal": text if declined else None}
        return {
            "id": f"chatcmpl-{next(self.ids):06}", "object": "chat.completion", "created": int(time.time()),
            "model": asked.body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": FINISH[stop_reason], "logprobs": None}],
            "usage": {**usage, "total_tokens": sum(usage.values()), **self.usage_extra},
        }  # fmt: skip

    def results_of(self, batch: Batch) -> list[str]:
        """JSONL lines out of order, made once."""
        if batch.results is None:
            lines = []
            for request in batch.requests:
                asked, refusal = Asked.read(request["params"]), _refusal(request["params"])
                kind = self.outcome(request["custom_id"], asked)
                result: dict[str, Any] = {"type": kind}
                if isinstance(kind, dict) or kind == "errored" or refusal:
                    inner = {"type": "invalid_request_error" if refusal else "api_error", "message": str(refusal)}
                    inner = kind if isinstance(kind, dict) else inner
                    result = {"type": "errored", "error": {"type": "error", "error": inner, "request_id": None}}
                elif kind == "succeeded":
                    result["message"] = message = self.message(asked, *self.respond(asked))
                    self.bill(message, "batch_")
                    self.paid[asked.digest] += 1
                lines.append(json.dumps({"custom_id": request["custom_id"], "result": result}))
            random.Random(0).shuffle(lines)
            batch.results = lines
        return batch.results

    def bill(self, message: dict, prefix: str = "") -> None:
        with self.lock:
            for name, chat in (("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens")):
                self.billed[prefix + name] += message["usage"].get(name, message["usage"].get(chat))

    def described(self, batch: Batch) -> dict:
        ended = time.time() >= batch.created + self.batch_seconds
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        for line in self.results_of(batch) if ended else ():
            counts[json.loads(line)["result"]["type"]] += 1
        counts["processing"] = 0 if ended else len(batch.requests)
        return {
            "id": batch.id, "type": "message_batch", "processing_status": "ended" if ended else "in_progress",
            "request_counts": counts, "created_at": _rfc3339(batch.created),
            "expires_at": _rfc3339(batch.created + 86400),
            "ended_at": _rfc3339(batch.created + self.batch_seconds) if ended else None,
            "archived_at": None, "cancel_initiated_at": None,
            "results_url": f"{self.url}/v1/messages/batches/{batch.id}/results" if ended else None,
        }  # fmt: skip


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address) -> None:
        pass  # a client that was killed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as with the real one
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave together
    api: ApiServer

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = self.path.split("?")[0].removeprefix("/v1/messages")
        answers = {"": self.messages, "/count_tokens": self.count_tokens, "/batches": self.create_batch}
        if self.allowed():
            if self.path.startswith("/v1/messages") and path in answers:
                answers[path](json.loads(raw))
            elif self.path == "/v1/chat/completions":
                self.messages(json.loads(raw))
            else:
                self.error(404, f"no such path: {self.path}")

    def do_GET(self) -> None:
        if not self.allowed():
            return None
        url = urlsplit(self.path)
        if url.path.startswith("/v1/models"):
            return self.describe(unquote(url.path.removeprefix("/v1/models").strip("/")))
        parts = url.path.removeprefix("/v1/messages/batches").strip("/").split("/")
        if not url.path.startswith("/v1/messages/batches"):
            return self.error(404, f"no such path: {self.path}")
        if parts == [""]:
            return self.list_batches(parse_qs(url.query))
        batch = next((batch for batch in self.api.batches if batch.id == parts[0]), None)
        if batch is None:
            return self.error(404, f"batch {parts[0]} not found")
        return self.batch_results(batch) if parts[1:] == ["results"] else self.retrieve(batch)

    def allowed(self) -> bool:
        # the SDK sends a key as x-api-key, from version 2 on as a bearer token
        bearer = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if self.api.needs_key and KEY not in (self.headers.get("x-api-key"), bearer):
            self.error(401, "invalid x-api-key")
        elif not self.headers.get("anthropic-version") and self.path.startswith("/v1/messages"):
            self.error(400, "anthropic-version: header is required")
        else:
            return True
        return False

    @property
    def chat(self) -> bool:
        """Whether OpenAI's API is asked."""
        return not self.headers.get("anthropic-version")

    def describe(self, model: str) -> None:
        """One model, or all of them."""
        of = {"object": "model", "owned_by": "test"} if self.chat else {"type": "model", "display_name": "A model"}
        listed = [{"id": name, "created_at": "2026-01-01T00:00:00Z", **of, **more}
                  for name, more in self.api.models.items()]  # fmt: skip
        if not model:
            return self.send(200, {"data": listed, "has_more": False, "object": "list"})
        found = next((each for each in listed if each["id"] == model), None)
        return self.send(200, found) if found else self.error(404, f"model: {model}")

    # -- Messages and chat completions -----------------------------------------------------------------------

    def messages(self, body: dict) -> None:
        api = self.api
        problem = _chat_refusal(body, api.models) if self.chat else _refusal(body, api.models)
        if problem:
            return self.error(*problem)
        asked = Asked.read(body, dict(self.headers))
        with api.lock:
            if api.keep:
                api.asked.append(asked)
            fault = api.faults.popleft() if api.faults else api.plan(asked)
            api.log.append((asked.digest, fault.name if fault else "ok"))
            api.in_flight += 1
            api.most_in_flight = max(api.most_in_flight, api.in_flight)
        try:
            time.sleep(api.latency)
            if fault is None or fault.kind:
                self.reply(asked, fault)
            else:
                self.inject(fault)
        finally:
            with api.lock:
                api.in_flight -= 1

    def reply(self, asked: Asked, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        text, stop_reason = self.api.respond(asked)
        if kind in SPOIL:
            text, stop_reason = SPOIL[kind](text)
        whole = (self.api.completion if self.chat else self.api.message)(asked, text, stop_reason)
        self.api.bill(whole)
        time.sleep({"slow": self.api.slow_seconds, "hang": self.api.hang_seconds}.get(kind, 0))
        data = json.dumps(whole).encode()
        if kind == "hang":
            self.close_connection = True
        elif not self.inject(fault, data):
            self.send_bytes(200, data[:-40] if kind == "truncated_json" else data, self.api.headers())

    def count_tokens(self, body: dict) -> None:
        unknown = body.keys() - COUNT_FIELDS
        if unknown:
            return self.error(400, f"{sorted(unknown)[0]}: Extra inputs are not permitted")
        self.api.counted += 1
        asked = Asked.read(body)
        return self.send(200, {"input_tokens": len(asked.text) // 3 + 100 * len(asked.images)})

    # -- Batches ---------------------------------------------------------------------------------------------

    def create_batch(self, body: dict) -> None:
        api, requests = self.api, body.get("requests")
        ids = [request.get("custom_id") for request in requests]
        if not requests or len(requests) > 100_000:
            self.error(400, "requests: between 1 and 100000 are required")
            return
        if len(set(ids)) != len(ids) or not all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name or "") for name in ids):
            self.error(400, "requests: custom_id must be unique and match ^[a-zA-Z0-9_-]{1,64}$")
            return
        if len(api.batches) >= api.most_batches:
            self.error(403, "more batches than the test allows")
            return
        fault = api.batch_faults.popleft() if api.batch_faults else api.create_plan()
        batch = Batch(f"msgbatch_{next(api.ids):06}", time.time(), requests)
        whole = b"not created"
        if fault is None or fault.kind in ("lost", "created"):
            with api.lock:
                api.batches.append(batch)
            whole = json.dumps(api.described(batch)).encode()
        if not self.inject(fault, whole):
            self.send_bytes(200, whole)

    def retrieve(self, batch: Batch) -> None:
        fault = self.api.retrieve_plan(batch)
        changed = RETRIEVALS.get(fault.kind, {}) if fault else {}
        if not self.inject(fault):
            self.send(200, self.api.described(batch) | changed)

    def list_batches(self, query: dict) -> None:
        limit = int(query.get("limit", ["20"])[0])
        batches = sorted(self.api.batches, key=lambda batch: -batch.created)
        after = query.get("after_id", [None])[0]
        if after:
            batches = batches[[batch.id for batch in batches].index(after) + 1 :]
        page = [self.api.described(batch) for batch in batches[:limit]]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        self.send(200, {"data": page, "has_more": len(batches) > limit, "first_id": first, "last_id": last})

    def batch_results(self, batch: Batch) -> None:
        fault = self.api.result_faults.popleft() if self.api.result_faults else self.api.results_plan(batch)
        changed = RESULTS.get(fault.kind, list) if fault else list
        data = "".join(f"{line}\n" for line in changed(self.api.results_of(batch))).encode()
        if not self.inject(fault, data):
            self.send_bytes(200, data, kind="application/x-jsonl")

    # -- answers ---------------------------------------------------------------------------------------------

    def inject(self, fault: Fault | None, whole: bytes = b"") -> bool:
        """Send what `fault` says instead of the answer `whole`; False if its kind leaves that to the caller."""
        if fault is None:
            return False
        if fault.body is not None:
            self.send_bytes(fault.status, fault.body, fault.headers, fault.content_type)
        elif fault.kind == "html":
            self.send_bytes(200, b"<html>Sign in</html>", kind="text/html")
        elif fault.kind in BROKEN:
            self.break_off(whole)
        elif fault.kind in ("", "created"):
            self.error(fault.status, fault.message, fault.headers, fault.error_code)
        else:
            return False
        return True

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

    def error(self, status: int, message: str, headers: dict | None = None, error_code: str | None = None) -> None:
        inner: dict[str, Any] = {"type": ERROR_TYPES.get(status, "api_error"), "message": message}
        if self.chat:
            unknown = status == 404 and "model" in message
            code = error_code or ("model_not_found" if unknown else None)
            inner = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
            return self.send(status, {"error": inner}, headers)
        inner |= {"details": {"error_code": error_code}} if error_code else {}
        whole = {"type": "error", "error": inner, "request_id": f"req_{next(self.api.ids):06}"}
        return self.send(status, whole, headers)

    def send(self, status: int, body: dict, headers: dict | None = None) -> None:
        self.send_bytes(status, json.dumps(body).encode(), headers)

    def send_bytes(
        self, status: int, data: bytes, headers: dict | None = None, kind: str = "application/json"
    ) -> None:
        self.send_response(status)
        about = {"content-type": kind, "content-length": str(len(data)), "request-id": f"req_{next(self.api.ids):06}"}
        for name, value in (about | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        pass


def _rfc3339(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e6):06}Z"


def _source(block: dict) -> dict:
    """An image block's source; of a data URL, too."""
    if block["type"] == "image":
        return block["source"]
    kind, data = re.fullmatch(r"data:([a-z/]+);base64,(.+)", block["image_url"]["url"]).groups()
    return {"type": "base64", "media_type": kind, "data": data}


def _image(source: dict) -> tuple[str, int, int]:
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(source["data"], validate=True))) as image:
        image.load()
        return Image.MIME[image.format], *image.size


def _chat_refusal(body: dict, models: Iterable[str]) -> tuple[int, str] | None:
    """`_refusal` of OpenAI's API."""
    if body.get("model") not in models:
        return 404, f"The model `{body.get('model')}` does not exist or you do not have access to it."
    if unknown := body.keys() - CHAT_FIELDS:
        return 400, f"Unrecognized request argument supplied: {sorted(unknown)[0]}"
    lengths = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
    if len(lengths) != 1 or not isinstance(lengths[0], int) or lengths[0] < 1:
        return 400, "max_tokens: one of the two, at least 1"
    form = body.get("response_format", {}).get("json_schema")
    if form and not (form["strict"] and re.fullmatch(r"[\w-]{1,64}", form["name"]) and _strict(form["schema"])):
        return 400, f"Invalid schema for response_format '{form['name']}'"
    images = [block for block in body["messages"][0]["content"] if block["type"] == "image_url"]
    return next(((400, problem) for block in images if (problem := _image_refusal(_source(block)))), None)


def _strict(schema: dict) -> bool:
    """Whether strict mode takes a schema."""
    inner = [each for each in schema["properties"].values() if each["type"] == "object"]
    own = schema["additionalProperties"] is False and schema["required"] == list(schema["properties"])
    return own and all(map(_strict, inner))


def _refusal(body: dict, models: Iterable[str] = MODELS) -> tuple[int, str] | None:
    """Status and message of what the API would not accept; None for a good request."""
    model = body.get("model", "")
    if model not in models:
        return 404, f"model: {model}"
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
        return 400, "max_tokens: must be at least 1"
    if not body.get("messages") or body["messages"][-1]["role"] != "user":
        return 400, "messages: the conversation must end with a user message"
    unknown = body.keys() - MESSAGE_FIELDS
    if unknown:
        return 400, f"{sorted(unknown)[0]}: Extra inputs are not permitted"
    if re.search(r"claude-[a-z]+-(5|4-[78])", model) and body.get("temperature", 1) != 1:
        return 400, "temperature: only the default is supported by this model"
    thinking = body.get("thinking", {}).get("type", "adaptive")
    off = "between_tools" if "sonnet-5-5" in model else "disabled"
    if thinking not in ("adaptive", off) or thinking == off and re.search("opus-5-5|fable|mythos", model):
        return 400, f'"thinking.type.{thinking}" is not supported for this model'
    form = body.get("output_config", {}).get("format")
    if form and (form.get("type") != "json_schema" or form["schema"].get("additionalProperties") is not False):
        return 400, "output_config.format.schema: additionalProperties must be explicitly set to false"
    for block in body["messages"][0]["content"]:
        kind = block["type"] if isinstance(block, dict) else ""
        if kind == "text" and not block["text"].strip():
            return 400, "messages: text content blocks must contain non-whitespace text"
        if kind == "image" and (problem := _image_refusal(block["source"])):
            return 400, f"messages.0.content: {problem}"
    return None


def _image_refusal(source: dict) -> str | None:
    try:
        true_type, width, height = _image(source)
    except Exception:
        return "Could not process image"
    if true_type != source["media_type"]:
        return f"the image appears to be a {true_type} image"
    if max(width, height) > 8000:
        return "image dimensions exceed 8000 pixels"
    return "image exceeds 5 MB maximum" if len(source["data"]) > 5 * 1024 * 1024 else None
