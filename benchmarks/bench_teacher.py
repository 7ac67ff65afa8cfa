"""How fast the Teacher client asks, what it costs in CPU beside the bare SDK, and whether its memory grows.

    python benchmarks/bench_teacher.py                      # about 3 minutes; writes benchmarks/results/teacher.json
    python benchmarks/bench_teacher.py --items 640 --memory_items 500 2000

Against a local server (tests/api_server.py) in a process of its own, 200 ms per reply, in one run:
1. haiku.py's client at 64 requests in flight against one at a time: items per second;
2. CPU time per item of the client, less that of the bare `AsyncAnthropic.messages.create` at the same concurrency;
3. the largest resident memory of a client with 10 times the items: growth per item, which a list of their names
   alone would exceed (200 bytes). A megabyte is within the noise of two runs.
Every measured client is a fresh process. Leaves out images (decoding them is not the client's cost) and batches.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ares import cli, files  # noqa: E402
from teacher import handoff  # noqa: E402
from teacher.prompts import scoring_request  # noqa: E402
from tests.api_server import KEY  # noqa: E402

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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--items", type=int, default=2048, help="items at full concurrency (default: %(default)s)")
    parser.add_argument("--single_items", type=int, default=60, help="items one at a time (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=64, help="requests in flight (default: %(default)s)")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds per reply (default: %(default)s)")
    parser.add_argument("--memory_items", type=int, nargs=2, default=[1000, 10000], help="(default: %(default)s)")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/teacher.json"), help="where it goes")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)  # a measured process: kind, folder, url ...
    return parser.parse_args(argv)


def lay_out(root: Path, count: int) -> None:
    """`count` different text-only items in a questions folder."""
    for number in range(count):
        folder = handoff.question_dir(root, number % 4, 0, str(number // 4))
        folder.mkdir(parents=True)
        sentences = [f"Attempt {number}.", *SENTENCES]
        lines = ",\n".join(f'"{sentence}": xxx' for sentence in sentences)
        (folder / handoff.RATIONALE).write_text(f"{{\n{lines}\n}}\n")
        (folder / handoff.REQUEST).write_text(scoring_request(PROBLEM, sentences))
    handoff.mark_exported(root)


# -- measured processes ----------------------------------------------------------------------------------------


def work(kind: str, folder: str, url: str, concurrency: str) -> None:
    """Run in a fresh process; prints what it measured as JSON."""
    import anthropic  # its import is nobody's cost per item

    if kind == "client":
        import haiku

        def run() -> None:
            haiku.main(["--questions_dir", folder, "--base_url", url, "--data_root", "none", "--concurrency",
                        concurrency, "--cache", str(Path(folder).parent / "cache")])  # fmt: skip

    else:
        import asyncio

        items = handoff.iter_items(folder)
        texts = iter([(item.folder / handoff.REQUEST).read_text() for item in items])

        async def bare() -> None:
            async with anthropic.AsyncAnthropic(api_key=KEY, base_url=url, max_retries=0) as sdk:

                async def one_after_the_other() -> None:
                    for text in texts:
                        content = [{"type": "text", "text": text}]
                        await sdk.messages.create(
                            model="claude-haiku-5-5",
                            max_tokens=500,
                            messages=[{"role": "user", "content": content}],
                            thinking={"type": "disabled"},
                        )

                await asyncio.gather(*(one_after_the_other() for _ in range(int(concurrency))))

        def run() -> None:
            asyncio.run(bare())

    cpu, wall = time.process_time(), time.perf_counter()
    run()
    measured = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print("measured " + json.dumps(measured), flush=True)


def measure(kind: str, count: int, url: str, concurrency: int) -> dict[str, float]:
    """Items per second, CPU ms per item and memory of one fresh process over `count` items."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "questions"
        lay_out(root, count)
        command = [sys.executable, __file__, "--worker", kind, str(root), url, str(concurrency)]
        environment = {**os.environ, "ANTHROPIC_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise cli.UserError(f"bench_teacher.py: the {kind} process failed: {done.stderr[-1500:]}")
        answered = sum(handoff.has_reply(item.folder) for item in handoff.iter_items(root))
        if kind == "client" and answered != count:
            raise cli.UserError(f"bench_teacher.py: {answered} of {count} items were answered")
    line = next(line for line in done.stdout.splitlines() if line.startswith("measured "))
    found = json.loads(line.removeprefix("measured "))
    return {
        "items": count,
        "concurrency": concurrency,
        "items_per_second": round(count / found["seconds"], 2),
        "cpu_ms_per_item": round(1000 * found["cpu_seconds"] / count, 3),
        "memory_mb": round(found["memory_mb"], 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.worker:
        return work(*args.worker)
    results: dict = {"latency_seconds": args.latency, "cores": os.cpu_count()}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.api_server", "--latency", str(args.latency)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = server.stdout.readline().strip()
        for name, kind, count, concurrency in (
            ("one at a time", "client", args.single_items, 1),
            ("concurrent", "client", args.items, args.concurrency),
            ("bare SDK", "bare", args.items, args.concurrency),
            ("memory, few items", "client", args.memory_items[0], args.concurrency),
            ("memory, many items", "client", args.memory_items[1], args.concurrency),
        ):
            results[name] = measure(kind, count, url, concurrency)
            cli.print0(f"{name:>20}: {results[name]}")
    finally:
        server.stdin.close()
        server.wait(30)
    results["speed-up"] = round(
        results["concurrent"]["items_per_second"] / results["one at a time"]["items_per_second"], 1
    )
    results["cpu_ms_over_the_bare_sdk"] = round(
        results["concurrent"]["cpu_ms_per_item"] - results["bare SDK"]["cpu_ms_per_item"], 3
    )
    few, many = results["memory, few items"], results["memory, many items"]
    growth = many["memory_mb"] - few["memory_mb"]
    results["memory_growth_mb"] = round(growth, 1)
    results["memory_growth_bytes_per_item"] = round(growth * 2**20 / (many["items"] - few["items"]))
    wanted = {
        "speed-up": (">=", 30),
        "cpu_ms_over_the_bare_sdk": ("<=", 2.0),
        "memory_growth_bytes_per_item": ("<", 200),
    }
    for name, (sign, bound) in wanted.items():
        holds = results[name] >= bound if sign == ">=" else results[name] <= bound
        cli.print0(f"{name}: {results[name]}, wanted {sign} {bound}: {'yes' if holds else 'NO'}")
    files.write_json(args.output, results, indent=1)
    return None


if __name__ == "__main__":
    cli.run(main)
