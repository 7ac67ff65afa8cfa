"""Memory of ScienceQA's vision features: private bytes per process, mapped against loaded.

    python benchmarks/bench_memory.py                     # needs no disk space: the files are sparse

1. Private memory of a process that gathers batches from a file of 11,208 ViT rows (6.6 GB), against loading such a
   file (measured on `--load_rows` rows and scaled up).
2. Two processes that read batches of a file of 2,000 rows: the resident memory that both add, less the rows touched.
3. The same reader over 1x, 2x and 4x the batches: its private memory stays flat.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ares import cli
from ares.cli import print0
from benchmarks import common

ROWS, SMALL_ROWS = 11_208, 2_000
ROW_BYTES = 145 * 1024 * 4
BATCH = 8


def sparse_file(path: Path, rows: int) -> Path:
    """A new .npy of `rows` ViT features that takes no disk: zeros that were never written."""
    path.unlink(missing_ok=True)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, *common.VIT)).flush()
    return path


# -- in a fresh process ----------------------------------------------------------------------------------


def memory() -> dict[str, int]:
    """Bytes of this process: private (RssAnon) and resident (with mapped pages)."""
    status = Path("/proc/self/status").read_text()
    names = {"private": "RssAnon", "resident": "VmRSS"}
    return {ours: int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 for ours, name in names.items()}


def mapped(path: Path, rows: int, batches: int, seed: int, queue: Any, barrier: Any) -> None:
    """Gather `batches` random batches and report the memory that they added, while the other readers still run."""
    from vision.features import VisionFeatures

    draw = np.random.default_rng(seed)
    features = VisionFeatures(path, {str(n): n for n in range(rows)}, "vit")
    features.gather([str(n) for n in range(BATCH)])  # the first batch also touches pages of torch itself
    before = memory()
    touched: set[int] = set()
    for _ in range(batches):
        chosen = draw.integers(0, rows, BATCH).tolist()
        touched |= set(chosen)
        features.gather([str(n) for n in chosen])
    barrier.wait()
    added = {name: bytes_now - before[name] for name, bytes_now in memory().items()}
    queue.put(added | {"touched": len(touched) * ROW_BYTES})
    barrier.wait()


def loaded(path: Path, rows: int, batches: int, seed: int, queue: Any, barrier: Any) -> None:
    """As the released code: the whole file in this process's memory."""
    before = memory()
    values = np.load(path) + 0  # write to it: unwritten zeros of a sparse file take no memory
    queue.put({name: bytes_now - before[name] for name, bytes_now in memory().items()} | {"rows": len(values)})


def in_processes(count: int, target: Any, *args: Any) -> list[dict[str, int]]:
    """What `count` fresh processes report."""
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(count)
    children = [context.Process(target=target, args=(*args, seed, queue, barrier)) for seed in range(count)]
    for child in children:
        child.start()
    found = [queue.get(timeout=600) for _ in children]
    for child in children:
        child.join()
    return found


# -- the three figures -----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(
        __doc__, argv, load_rows=(1400, "rows that the released side loads"),
        batches=(50, "batches of 8 that our side gathers"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        full = sparse_file(Path(scratch) / "vit.npy", ROWS)
        ours, *growth = (in_processes(1, mapped, full, ROWS, n * args.batches)[0]["private"] for n in (1, 1, 2, 4))
        part = sparse_file(full, args.load_rows)
        theirs = in_processes(1, loaded, part, args.load_rows, 0)[0]["private"] * ROWS / args.load_rows
        small = sparse_file(full, SMALL_ROWS)
        both = in_processes(2, mapped, small, SMALL_ROWS, args.batches // 2)
    beyond = sum(one["resident"] - one["touched"] for one in both) / (SMALL_ROWS * ROW_BYTES)
    share = ours / theirs
    cli.refuse(
        [f"private memory of a reader is {share:.1%} of loading, above 5%"] * (share > 0.05)
        + [f"two readers add {beyond:.1%} of the file beyond the rows touched, above 10%"] * (beyond > 0.1)
    )
    print0(f"private: {ours / 2**20:.0f} MiB mapped, {theirs / 2**20:.0f} MiB loaded: {share:.2%}")
    common.report(
        args, "memory", {"ratio": common.spread([theirs / max(ours, 2**20)])}, private_share=f"{share:.2%}",
        two_readers=f"{beyond:+.2%} of a file of 2,000 rows beyond the rows touched (at most 10%)",
        growth=f"private MiB over {args.batches}, {2 * args.batches}, {4 * args.batches} batches: "
        + ", ".join(f"{private / 2**20:.0f}" for private in growth),
        slice=f"{ROWS} rows of 145 x 1024 floats; loading measured on {args.load_rows}",
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
