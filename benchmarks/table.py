"""Print the results of one run of run_all.sh as a table and keep them in benchmarks/RESULTS.md, a column per device.

    python benchmarks/table.py FOLDER_OF_JSON_FILES --seconds 600
    python benchmarks/table.py gpu_out --seconds 500          # of gpu.sh: first its steps and what bench_gpu.py found

RESULTS.md has the last measurement of each device; stages without a file are "not measured". A CPU's results on the
demo's questions (no real sample) are only printed; a GPU's are kept, since a lent machine may have no sample.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ares import cli, files
from ares.cli import UserError

FOLDER = Path(__file__).resolve().parent
RESULTS, KEPT = FOLDER / "RESULTS.md", FOLDER / "results/speed.json"  # KEPT: device -> stage -> result
STAGES = {  # file -> name, wanted ratio on a CPU (tiny) and on a GPU (base)
    "sft": ("SFT", 7, 12), "rollout": ("rollouts", 8, 20), "ppo": ("PPO updates", 3, 10),
    "eval": ("generate + score", 10, 20), "features": ("feature extraction", 1.3, 30),
    "memory": ("memory of features", 20, 20),
}  # fmt: skip
PEERS = {  # file -> today's transformers on the same work, wanted ratio
    "sft": ("Seq2SeqTrainer, group_by_length", 1.5), "rollout": ("generate, k = 4 samples", 3.5),
    "eval": ("greedy generate", 1.3),
}  # fmt: skip
SCORES = 2  # wanted ratio of the scores alone, which bench_eval.py times besides
# one ScienceQA base round, in units of the stages' measured slices
QUESTIONS, ROLLOUTS, PPO_EPOCHS, SFT_EPOCHS = {"train": 12_726, "val": 4_241, "test": 4_241}, 50_904, 10, 20


def projection(stages: dict[str, Any]) -> list[str]:
    """Hours of the parts of a ScienceQA round and of all, from each stage's seconds per unit of work."""
    questions = sum(QUESTIONS.values())
    parts = {
        f"RL: {ROLLOUTS:,} rollouts": ("rollout", ROLLOUTS),
        f"RL: {PPO_EPOCHS} PPO epochs": ("ppo", ROLLOUTS * PPO_EPOCHS),
        f"generation of {questions:,} rationales, scores of the test split": ("eval", questions),
        f"SFT: {SFT_EPOCHS} epochs": ("sft", QUESTIONS["train"] * SFT_EPOCHS),
    }
    hours = {}
    for part, (stage, units) in parts.items():
        (seconds,) = stages.get(stage, {}).get("projection", {"": float("nan")}).values()
        hours[part] = seconds * units / 3600
    return [f"- {part}: {each:.2f} h" for part, each in {**hours, "together": sum(hours.values())}.items()]


def ratio_of(result: dict[str, Any] | None, target: float, name: str = "ratio") -> str:
    """A ratio of the result with its range and whether it meets the target."""
    if result is None or name not in result:
        return "not measured"
    ratio = result[name]
    met = "" if ratio["median"] >= target else ", below target"
    return f"**{ratio['median']:.3g}x** ({ratio['min']:.3g}-{ratio['max']:.3g}{met})"


def rows(*lines: Iterable[str]) -> list[str]:
    """Lines of a Markdown table, its headings first."""
    heads, *others = [f"| {' | '.join(cells)} |" for cells in lines]
    return [heads, "|" + "---|" * (heads.count(" | ") + 1), *others]


def gpu_lines(folder: Path) -> list[str]:
    """Steps of gpu.sh and the results of bench_gpu.py in its folder, as a Markdown table; [] for another folder."""
    lines = []
    if (steps := folder / "steps.tsv").exists():
        words = {"0": "ok", "124": "OUT OF TIME", "137": "OUT OF TIME", "skip": "skipped: no time left"}
        for line in steps.read_text().splitlines():
            name, status, seconds, note = line.split("\t")
            lines.append(["step", name, words.get(status, f"FAILED ({status})"), f"{seconds} s {note}"])
    if (results := folder / "results.jsonl").exists():
        found = map(json.loads, results.read_text().splitlines())
        lines += [[one["section"], one["name"], str(one["value"]), one["note"]] for one in found]
    clean = [[cell.replace("|", "/") for cell in line] for line in lines]
    return rows(["section", "what", "result", "note"], *clean) if lines else []


def stage_row(result: dict[str, Any]) -> list[str]:
    times = [f"{1000 * result[side]['median']:.3g} ms" if side in result else "" for side in ("released", "ours")]
    grown = ", ".join(f"{value:.2f}" for value in result.get("scaling", {}).values()) or result.get("growth", "")
    near = result.get("limit") or result.get("private_share", "")
    return [result["stage"], *times, result.get("slice", ""), near, grown]


def table(kept: dict[str, Any]) -> str:
    """RESULTS.md: ratios, limits, growth, projection, machine."""
    cpu, gpu = (kept[device]["stages"] if device in kept else {} for device in ("cpu", "cuda"))

    def both(name: str, stage: str, on_cpu: float, on_gpu: float, key: str = "ratio") -> list[str]:
        return [name, ratio_of(cpu.get(stage), on_cpu, key), f">= {on_cpu}x",
                ratio_of(gpu.get(stage), on_gpu, key), f">= {on_gpu}x"]  # fmt: skip

    ratios = [both(name, stage, *targets) for stage, (name, *targets) in STAGES.items()]
    ratios.append(both("scores alone", "eval", SCORES, SCORES, "scores"))
    peers = []
    for stage, (what, target) in PEERS.items():
        cells = [ratio_of(one.get(stage), target, "peer") for one in (cpu, gpu)]
        peers.append([f"{STAGES[stage][0]}: {what}", *cells, f">= {target}x"])
    peak = gpu.get("ppo", {}).get("peak_memory", "not measured")
    lines = [
        "# Measured speed",
        "",
        "Written by `bash benchmarks/run_all.sh`; what is measured and how: docs/speed.md. Ours against the released "
        "recipe, both in one process, interleaved: median of the ratios (range). Both sides are first checked to "
        "compute the same.",
        "",
        *rows(["stage", "CPU", "target", "GPU", "target"], *ratios),
        "",
        "Against today's transformers on the same work, with key-value cache and dynamic padding:",
        "",
        *rows(["stage", "CPU", "GPU", "target"], *peers),
        "",
        f"Peak GPU memory of a PPO step, target 35% of the released recipe's: {peak}.",
    ]
    for device, run in kept.items():
        machine = ", ".join(f"{key} {value}" for key, value in run["machine"].items() if value is not None)
        results = [run["stages"][stage] for stage in STAGES if stage in run["stages"]]
        questions = "the demo's" if results[0].get("questions") == "demo" else "real"
        heads = ["stage", "released", "ours", "slice", "how close to the limit", "2x, 4x the work"]
        lines += [
            *("", f"## {device}, {run['size']}", ""),
            f"Machine: {machine}; {questions} questions. The run took {run['seconds'] / 60:.1f} minutes.",
            "",
            *rows(heads, *map(stage_row, results)),
            "",
            'Under "2x, 4x": time per unit of work against that of 1x; 1.00 is linear, less is '
            "what batches of more alike lengths save.",
            "",
            f"Projection of one full ScienceQA round at size {run['size']} on this device, Teacher aside:",
            "",
            *projection(run["stages"]),
            *("", "Both sides compute the same, checked before they were timed:", ""),
            *(f"- {result['stage']}: {'; '.join(result['equal'])}" for result in results if "equal" in result),
        ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("folder", help="{stage}.json of every stage")
    parser.add_argument("--seconds", type=int, required=True, help="duration of the whole run")
    parser.add_argument("--only_print", action="store_true", help="leave RESULTS.md as it is")
    args = parser.parse_args(argv)
    paths = {stage: Path(args.folder) / f"{stage}.json" for stage in STAGES}
    stages = {stage: files.read_json(path, "folder") for stage, path in paths.items() if path.exists()}
    lines = gpu_lines(Path(args.folder))
    if lines:
        cli.print0("\n".join(lines))
    if lines and not stages:
        return
    if not stages:
        raise UserError(f"folder: {args.folder} has none of {', '.join(path.name for path in paths.values())}")
    first, *_ = stages.values()
    demo = first["device"] == "cpu" and any(result.get("questions") == "demo" for result in stages.values())
    kept = files.read_json(KEPT, "results", dict) if KEPT.exists() and not demo else {}
    run = {"size": first["size"], "machine": first["machine"], "seconds": args.seconds, "stages": stages}
    text = table(kept | {first["device"]: run})
    cli.print0(text)
    if demo:
        cli.print0(f"measured on the demo's questions: {RESULTS} is unchanged")
    elif not args.only_print:
        files.write_json(KEPT, kept | {first["device"]: run}, indent=1)
        files.write_text(RESULTS, text)


if __name__ == "__main__":
    cli.run(main)
