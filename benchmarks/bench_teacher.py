"""How fast the Teacher client asks, what it costs in CPU beside the bare SDK, and how its memory grows with the items.

    python benchmarks/bench_teacher.py                      # about 5 minutes; writes benchmarks/results/teacher.json
    python benchmarks/bench_teacher.py --items 200 1000 --single_items 5 25

Against a small local server in a process of its own, 200 ms per reply. Every measured run is a fresh process: `python
haiku.py`, or the bare `AsyncAnthropic.messages.create` at the same concurrency. Each is run with few and with many
items; the differences are free of start-up time and of the memory of imports:

1. items per second of haiku.py at 64 requests in flight against one at a time;
2. CPU time per item of haiku.py, less that of the bare SDK;
3. resident memory per item of haiku.py. A megabyte is within the noise of two runs.

Images (decoding them is not the client's cost) and batches are not measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ares import cli, files
from teacher import handoff
from teacher.prompts import scoring_request

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-ant-benchmark-0123456789"
SENTENCES = [
    "Figure out which of the given places is farthest north on the map.",
    "To do so, look at the compass rose, which points to the north at the top of the map.",
    "The first place lies farther north than the other three.",
    "So the answer is the first one.",
]
PROBLEM = {
    "question": "Which of these places is farthest north?",
    "choices": ["the harbour", "the mill", "the church", "the bridge"],
    "answer": 0,
    "hint": "A map of a town on a river, with its harbour in the north and its bridge in the south.",
    "image": None,
}
WANTED = {
    "speed-up": (">=", 30),
    # 5 ms an item are 4 minutes of CPU for a round of 50,904 items, which takes at least 50 minutes at 1,000 requests
    # a minute; simple code is worth that
    "cpu_ms_over_the_bare_sdk": ("<=", 5.0),
    # an item is a path, a key and its place in a dict and a list: 100 MB for a round
    "memory_bytes_per_item": ("<=", 2000),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    counts = {"type": int, "nargs": 2, "metavar": ("FEW", "MANY")}
    parser.add_argument("--items", default=[1000, 10000], help="items at full concurrency", **counts)
    parser.add_argument("--single_items", default=[10, 60], help="items one at a time", **counts)
    parser.add_argument("--concurrency", type=int, default=64, help="requests in flight")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds per reply")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/teacher.json"), help="where it goes")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # the server's process
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)  # a measured process: folder, url, concurrency
    return parser.parse_args(argv)


# -- the server ------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    """Answers POST /v1/messages after `latency` seconds: a score for each sentence of the form in the request."""

    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body are sent together
    latency = 0.0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        count = len(re.findall(r'": xxx,?$', body["messages"][0]["content"][0]["text"], re.MULTILINE))
        text = json.dumps({"scores": [0.8] * count})
        message = {
            "id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "stop_reason": "end_turn",
            "stop_sequence": None, "content": [{"type": "text", "text": text}],
            "usage": {"input_tokens": 500, "output_tokens": 20},
        }  # fmt: skip
        data = json.dumps(message).encode()
        time.sleep(self.latency)
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def serve(latency: float) -> None:
    """Print the address, then serve until standard input is closed."""
    _Handler.latency = latency
    server_type = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 256, "daemon_threads": True})
    server = server_type(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    sys.stdin.read()


# -- measured processes ----------------------------------------------------------------------------------------


def write_items(root: Path, count: int) -> None:
    """`count` different text-only items in a questions folder."""
    for number in range(count):
        folder = handoff.question_dir(root, number % 4, 0, str(number // 4))
        folder.mkdir(parents=True)
        sentences = [f"Attempt {number}.", *SENTENCES]
        (folder / handoff.RATIONALE).write_text(handoff.form(sentences) + "\n")
        (folder / handoff.REQUEST).write_text(scoring_request(PROBLEM, sentences))
    handoff.mark_exported(root)


async def bare_sdk(folder: str, url: str, concurrency: int) -> None:
    import anthropic

    texts = iter([(item.folder / handoff.REQUEST).read_text() for item in handoff.iter_items(folder)])
    async with anthropic.AsyncAnthropic(api_key=KEY, base_url=url, max_retries=0) as sdk:

        async def one_after_the_other() -> None:
            how = {"model": "claude-haiku-5-5", "max_tokens": 500, "thinking": {"type": "disabled"}}
            for text in texts:
                message = {"role": "user", "content": [{"type": "text", "text": text}]}
                await sdk.messages.create(messages=[message], **how)

        await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))


def measured(name: str, command: Sequence[Any], **environment: str) -> tuple[dict[str, float], str]:
    """Seconds, CPU seconds and largest resident memory (MiB) of one fresh process, on one thread, and what it printed.
    Raises UserError if it fails."""
    began, command = time.perf_counter(), [sys.executable, *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        _, process.returncode, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise cli.UserError(f"{name} failed: {text[-1500:]}")
    return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "mb": used.ru_maxrss / 1024}, text


def measure(kind: str, count: int, url: str, concurrency: int) -> dict[str, float]:
    """`measured` of one process over `count` items."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "questions"
        write_items(root, count)
        if kind == "haiku.py":
            command = ["haiku.py", "--questions_dir", root, "--base_url", url, "--data_root", "none",
                       "--concurrency", concurrency, "--cache", Path(scratch) / "cache"]  # fmt: skip
        else:
            command = [__file__, "--bare", root, url, concurrency]
        found, _ = measured(kind, command, ANTHROPIC_API_KEY=KEY)
        answered = sum(handoff.has_reply(item.folder) for item in handoff.iter_items(root))
        if kind == "haiku.py" and answered != count:
            raise cli.UserError(f"bench_teacher.py: {answered} of {count} items were answered")
    return {"items": count, **found}


def per_item(kind: str, counts: Sequence[int], url: str, concurrency: int) -> dict[str, float]:
    """Rates and costs of an item more: the differences between a run with few and one with many items."""
    few, many = (measure(kind, count, url, concurrency) for count in counts)
    more = many["items"] - few["items"]
    return {
        "items": list(counts), "concurrency": concurrency,
        "items_per_second": round(more / (many["seconds"] - few["seconds"]), 2),
        "cpu_ms_per_item": round(1000 * (many["cpu"] - few["cpu"]) / more, 3),
        "memory_mb": [round(few["mb"], 1), round(many["mb"], 1)],
        "memory_bytes_per_item": round((many["mb"] - few["mb"]) * 2**20 / more),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.serve:
        serve(args.latency)
    elif args.bare:
        folder, url, concurrency = args.bare
        asyncio.run(bare_sdk(folder, url, int(concurrency)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Run the measured processes against a server, print the figures, and write them to --output."""
    results: dict = {"latency_seconds": args.latency, "cores": os.cpu_count()}
    server = [sys.executable, __file__, "--serve", "--latency", str(args.latency)]
    with subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as serving:
        url = serving.stdout.readline().strip()  # leaving the block closes its input, which ends it
        for name, kind, counts, concurrency in (
            ("one at a time", "haiku.py", args.single_items, 1),
            ("concurrent", "haiku.py", args.items, args.concurrency),
            ("bare SDK", "bare SDK", args.items, args.concurrency),
        ):
            results[name] = per_item(kind, counts, url, concurrency)
            cli.print0(f"{name:>20}: {results[name]}")
    one, concurrent, bare = (results[name] for name in ("one at a time", "concurrent", "bare SDK"))
    results["speed-up"] = round(concurrent["items_per_second"] / one["items_per_second"], 1)
    results["cpu_ms_over_the_bare_sdk"] = round(concurrent["cpu_ms_per_item"] - bare["cpu_ms_per_item"], 3)
    results["memory_bytes_per_item"] = concurrent["memory_bytes_per_item"]
    for name, (sign, bound) in WANTED.items():
        holds = results[name] >= bound if sign == ">=" else results[name] <= bound
        cli.print0(f"{name}: {results[name]}, wanted {sign} {bound}: {'yes' if holds else 'NO'}")
    files.write_json(args.output, results, indent=1)


if __name__ == "__main__":
    cli.run(main)
