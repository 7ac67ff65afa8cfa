"""What one GPU says: same numbers, speed of sampling and PPO, peak memory against the computed table, top kernels.

    python benchmarks/bench_gpu.py --size base --device cuda --out gpu_out      # the second part of gpu.sh
    python benchmarks/bench_gpu.py --size base --device cuda --out gpu_out --memory             # and its last one

Results go to OUT/results.jsonl, one line each, which benchmarks/table.py prints, profiles to OUT/logs.txt. A section
that fails is reported, and the next one runs; none begins after `--seconds`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ares import cli, decoding
from ares.decoding import action_mask
from benchmarks import bench_ppo, bench_rollout, common, limits, rl_memory
from rl import sampling
from rl.minibatches import micro_batches

K = 4
# questions per sampling batch, longest text, rows per minibatch, minibatches per update, --pass_tokens
REAL = {"questions": 64, "length": 128, "rows": 8, "steps": 8, "passes": (1, 2048, 4096, 8192, 16384)}
SMALL = {"questions": 2, "length": 8, "rows": 2, "steps": 2, "passes": (8192,)}


class Report:
    """Writes results as they come, and says which section failed."""

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.began, self.seconds, self.section = folder, time.monotonic(), seconds, ""
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, value: Any, note: str = "") -> None:
        line = {"section": self.section, "name": name, "value": value, "note": note}
        with open(self.folder / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        cli.print0(f"[{time.monotonic() - self.began:5.1f} s] {self.section}: {name}: {value} {note}")

    def run(self, section: str, function: Callable, *args: Any) -> None:
        """`function(self, *args)`; whatever it raises becomes a result."""
        self.section = section
        if time.monotonic() - self.began > self.seconds:
            return self.add("skipped", "no time left")
        try:
            function(self, *args)
        except Exception as error:
            traceback.print_exc()
            self.add("FAILED", type(error).__name__, " ".join(str(error).split())[:150])
        gc.collect()
        torch.cuda.empty_cache() if torch.cuda.is_available() else None


def milliseconds(function: Callable[[], Any], device: str) -> float:
    """The least of three calls, after one that is not timed; in a dry run one call."""
    if device == "cuda":
        function()
    return 1000 * min(limits.seconds(function, device) for _ in range(3 if device == "cuda" else 1))


# -- sections --------------------------------------------------------------------------------------------


def machine(report: Report, args: argparse.Namespace) -> None:
    report.add("machine", ", ".join(f"{name} {value}" for name, value in common.machine(args).items() if value))
    n = 8192 if args.device == "cuda" else 256
    a, x = torch.randn(n, n, device=args.device).bfloat16(), torch.zeros(1, device=args.device)
    report.add(f"bf16 product of {n}^3", f"{2 * n**3 / milliseconds(lambda: a @ a, args.device) / 1e9:.1f} TFLOP/s")
    launches = milliseconds(lambda: [x.add_(1) for _ in range(1000)], args.device)
    report.add("one small operation from Python", f"{launches:.2f} us")


class Sampling:
    """A batch of real prompts, whose texts end at the lengths of real solutions."""

    def __init__(self, args: argparse.Namespace, sizes: dict[str, Any]):
        count = sizes["questions"]
        own = {"questions": count, "bs": count, "k_actions": K, "top_k": 50, "output_len": sizes["length"]}
        self.bench = bench_rollout.Bench(argparse.Namespace(**vars(args), **own))
        self.prompt, self.lengths = next(self.bench.batches(count))

    def sample(self) -> dict[str, torch.Tensor]:
        return self.bench.sample(self.prompt, self.lengths)

    def generate(self) -> Any:
        return self.bench.generate(self.prompt, self.lengths)


@torch.no_grad()
def agreement(report: Report, args: argparse.Namespace, bench: Sampling) -> None:
    """Log-probabilities and values of the same texts: fp32 and bf16 here, fp32 on the CPU."""
    found: list[dict[str, torch.Tensor]] = []
    first = limits.seconds(lambda: found.append(bench.sample()), args.device)
    report.add("first batch", f"{first:.2f} s", "kernels are loaded and tuned")
    actions, few = found[0]["actions"], min(4, len(bench.prompt["input_ids"]))
    plain, cast = bench.bench.world.models, bench.bench.models
    prompt = {name: tensor[:few] for name, tensor in bench.prompt.items()}
    actions = actions[: few * K]
    real = action_mask(actions)
    there = {name: tensor.cpu() for name, tensor in prompt.items()}
    for name, of in (("log-probabilities", "policy"), ("values", "value_function")):
        model, value = getattr(plain, of), of != "policy"
        fp32 = sampling.evaluate_actions(model, prompt, actions, K, value=value)[real]
        cpu = sampling.evaluate_actions(copy.deepcopy(model).cpu(), there, actions, K, value=value)[real]
        with bench.bench.autocast():
            bf16 = sampling.evaluate_actions(getattr(cast, of), prompt, actions, K, value=value)[real]
        for pair, one, limit in (("fp32 here and on the CPU", cpu, 1e-3), ("bf16 and fp32", bf16, 0.3)):
            apart = (one - fp32).abs()
            word = "ok" if float(apart.max()) < limit else "TOO FAR APART"
            report.add(f"{name}, {pair}", word, f"largest {apart.max():.2g}, mean {apart.mean():.2g}")


def sample_speed(report: Report, args: argparse.Namespace, bench: Sampling) -> None:
    rows, steps = len(bench.lengths), int(bench.lengths.max())
    for mode in ("off", "on"):
        decoding.use_graphs(mode)
        step, name = milliseconds(bench.generate, args.device) / steps, f"generation, --decode_graph {mode}"
        report.add(name, f"{step:.2f} ms a step", f"of {steps}, {rows} rows at first")
        if decoding.graph_mode != mode:
            report.add(name, "FAILED", "no graph could be captured; logs.txt says why")
    decoding.use_graphs("auto")
    whole, generation = (milliseconds(one, args.device) for one in (bench.sample, bench.generate))
    report.add(f"batch of {rows}", f"{whole / 1000:.3f} s", f"{rows / whole * 1000:.0f} rationales a second")
    report.add("generation of it", f"{generation / 1000:.3f} s", f"{generation / steps:.2f} ms a step of {steps}")
    top_operations(report, "generation", bench.generate, args)


def ppo_speed(report: Report, args: argparse.Namespace, sizes: dict[str, Any]) -> None:
    """Updates with several --pass_tokens: time, share of the peak, memory."""
    rows, steps = sizes["rows"], sizes["steps"]
    own = {"rl_batch_size": rows, "ga_step": steps, "output_len": sizes["length"], "questions": rows * steps // K}
    args = argparse.Namespace(**vars(args), **own)
    bench = bench_ppo.Bench(args)
    trainer, lengths = bench.trainer, bench.trainer.lengths
    rows = [row for minibatches in bench.step for one in minibatches for row in one]
    config = trainer.raw.policy.config
    flops = sum(2 * 3 * limits.row_flops(config, lengths[row][1], lengths[row][0]) for row in rows)
    for tokens in sizes["passes"]:
        trainer.args.pass_tokens = tokens
        if args.device == "cuda":
            bench.ours()
            torch.cuda.reset_peak_memory_stats()
        taken = milliseconds(bench.ours, args.device)
        memory = f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if args.device == "cuda" else ""
        passes = len(micro_batches(bench.step, lengths, tokens))
        share = limits.utilisation(flops, taken / 1000, args.device, torch.bfloat16)
        report.add(f"update of {len(rows)} rows, --pass_tokens {tokens}", f"{taken:.1f} ms",
                   f"{passes} passes; {share}; {memory}")  # fmt: skip
    top_operations(report, "a PPO update", bench.ours, args)


def top_operations(report: Report, what: str, function: Callable, args: argparse.Namespace) -> None:
    """Launches, waits and the longest kernels of one call (on a CPU the longest operations)."""
    with torch.profiler.profile() as found:
        limits.seconds(function, args.device)
    averages, gpu = found.key_averages(), args.device == "cuda"
    if gpu:
        launches = sum(e.count for e in averages if "LaunchKernel" in e.key or e.key == "cudaGraphLaunch")
        waits = sum(e.count for e in averages if "Synchronize" in e.key)
        report.add(f"{what}: launches", launches, f"{waits} waits for the GPU")
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    on_device = [e for e in averages if not gpu or str(e.device_type).endswith("CUDA")]
    for e in sorted(on_device, key=lambda e: -getattr(e, order))[:6]:
        report.add(f"{what}: longest", f"{getattr(e, order) / 1000:.2f} ms", f"{e.count} times {e.key[:80]}")
    with open(report.folder / "logs.txt", "a", encoding="utf-8") as file:
        operations = averages.table(sort_by=order, row_limit=50, max_name_column_width=90)
        file.write(f"\n== profile of {what}\n{operations}\n")


def memory(report: Report, args: argparse.Namespace, size: str) -> None:
    """Peak at full length against the computed one (rl_memory.py)."""
    for name, stage in rl_memory.STAGES.items():
        computed = stage(size)[1]
        if args.device != "cuda":
            report.add(f"{size}: {name.strip()}", f"{computed / 1e9:.2f} GB computed")
            continue
        if computed + 1e9 * rl_memory.RESERVE > torch.cuda.get_device_properties(0).total_memory:
            report.add(f"{size}: {name.strip()}", "too large for this GPU", f"{computed / 1e9:.1f} GB computed")
            continue
        with rl_memory.on("cuda"):
            measured = stage(size)[1]
        apart = f"{measured / computed - 1:+.0%} of {computed / 1e9:.1f} GB computed"
        report.add(f"{size}: {name.strip()}", f"{measured / 1e9:.1f} GB", apart)
        gc.collect(), torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(
        __doc__, argv, out=("gpu_out", "folder of the results"), seconds=(180, "no section begins after this time"),
        memory=(False, "the memory section alone, else all others"),
    )  # fmt: skip
    sizes = REAL if args.device == "cuda" else SMALL
    report = Report(Path(args.out), args.seconds)
    if args.memory:
        for size in (args.size, *(["large"] if args.device == "cuda" else [])):
            report.run("memory", memory, args, size)
        return
    report.run("machine", machine, args)
    made: list[Sampling] = []
    report.run("models and prompts", lambda report: made.append(Sampling(args, sizes)))
    for bench in made:
        report.run("agreement", agreement, args, bench)
        report.run("sampling", sample_speed, args, bench)
    made.clear()
    report.run("PPO", ppo_speed, args, sizes)


if __name__ == "__main__":
    cli.run(main)
