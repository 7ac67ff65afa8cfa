"""Print the results of one run of run_all.sh as a table and keep them in benchmarks/RESULTS.md, a column per device.

    python benchmarks/table.py FOLDER_OF_JSON_FILES --seconds 600

RESULTS.md has the last measurement of each device. Results on the demo's questions (no real sample) are only printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # run as a file, the project is not on the path
    sys.path.insert(0, str(ROOT))

from ares import cli, files  # noqa: E402

RESULTS = ROOT / "benchmarks/RESULTS.md"
KEPT = ROOT / "benchmarks/results/speed.json"  # device -> stage -> result
STAGES = ("sft", "rollout", "ppo", "eval", "features", "memory")
TARGETS = {  # CPU (tiny), GPU (base)
    "sft": (7, 12), "rollout": (8, 20), "ppo": (3, 10), "eval": (10, 20), "features": (1.3, 30), "memory": (20, 20),
}  # fmt: skip
# one ScienceQA base round, in units of the stages' measured slices
QUESTIONS, ROLLOUTS, PPO_EPOCHS, SFT_EPOCHS = {"train": 12_726, "val": 4_241, "test": 4_241}, 50_904, 10, 20


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("folder", help="{stage}.json of every stage")
    parser.add_argument("--seconds", type=int, required=True, help="duration of the whole run")
    return parser.parse_args(argv)


def projection(stages: dict[str, Any]) -> list[tuple[str, float]]:
    """(part of a ScienceQA round, hours) from the seconds per unit of each stage, at this size and on this device."""

    def rate(stage: str) -> float:
        return next(iter(stages[stage].get("projection", {"": float("nan")}).values()))

    questions = sum(QUESTIONS.values())
    return [
        (f"RL: {ROLLOUTS:,} rollouts", rate("rollout") * ROLLOUTS / 3600),
        (f"RL: {PPO_EPOCHS} PPO epochs", rate("ppo") * ROLLOUTS * PPO_EPOCHS / 3600),
        (f"generation of {questions:,} rationales, scores of the test split", rate("eval") * questions / 3600),
        (f"SFT: {SFT_EPOCHS} epochs", rate("sft") * QUESTIONS["train"] * SFT_EPOCHS / 3600),
    ]


def shown(result: dict[str, Any] | None, target: float) -> tuple[str, str]:
    """The ratio with its range and whether it meets the target; the closeness to the limit."""
    if result is None:
        return "not measured", ""
    ratio = result["ratio"]
    met = "" if ratio["median"] >= target else ", below target"
    near = result.get("limit") or result.get("private_share", "")
    return f"**{ratio['median']:.3g}x** ({ratio['min']:.3g}-{ratio['max']:.3g}{met})", near


def table(kept: dict[str, Any]) -> str:
    """RESULTS.md: ratios, limits, growth, projection, machine."""
    lines = [
        "# Measured speed",
        "",
        "Written by `bash benchmarks/run_all.sh`; what is measured and how: docs/speed.md. Ours against the released "
        "recipe, both in one process, interleaved: median of the ratios (range). Both sides are first checked to "
        "compute the same.",
        "",
        "| stage | CPU | target | GPU | target |",
        "|---|---|---|---|---|",
    ]
    for name in STAGES:
        cells = [(kept.get(device) or {}).get("stages", {}).get(name) for device in ("cpu", "cuda")]
        label = next((cell["stage"] for cell in cells if cell), name)
        row = [label]
        for cell, target in zip(cells, TARGETS[name], strict=True):
            row += [shown(cell, target)[0], f">= {target}x"]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "Peak GPU memory of a PPO step, target 35% of the released recipe's: "]
    gpu = (kept.get("cuda") or {}).get("stages", {}).get("ppo", {})
    lines[-1] += str(gpu.get("peak_memory", "not measured")) + "."
    for device, run in kept.items():
        lines += ["", f"## {device}, {run['size']}", ""]
        machine = ", ".join(f"{key} {value}" for key, value in run["machine"].items() if value is not None)
        lines += [f"Machine: {machine}. All six stages took {run['seconds'] / 60:.1f} minutes.", ""]
        lines += [
            "| stage | released | ours | slice | how close to the limit | 2x, 4x the work |",
            "|---|---|---|---|---|---|",
        ]
        for name in STAGES:
            result = run["stages"][name]
            times = [
                f"{1000 * result[side]['median']:.3g} ms" if side in result else "" for side in ("released", "ours")
            ]
            growth = result.get("scaling", {})
            grown = ", ".join(f"{value:.2f}" for value in growth.values()) or result.get("growth", "")
            slice_ = result.get("slice", "")
            lines.append("| " + " | ".join([result["stage"], *times, slice_, shown(result, 0)[1], grown]) + " |")
        lines += [
            "",
            'Under "2x, 4x": time per unit of work against that of 1x; 1.00 is linear, less is '
            "what batches of more alike lengths save.",
            "",
        ]
        lines += [f"Projection of one full ScienceQA round at size {run['size']} on this device, Teacher aside:", ""]
        parts = projection(run["stages"])
        lines += [f"- {what}: {hours:.2f} h" for what, hours in parts]
        lines += [f"- together: {sum(hours for _, hours in parts):.2f} h"]
        lines += ["", "Both sides compute the same, checked before they were timed:", ""]
        for name in STAGES:
            equal = run["stages"][name].get("equal")
            lines += [f"- {run['stages'][name]['stage']}: {'; '.join(equal)}"] if equal else []
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    stages = {name: files.read_json(Path(args.folder) / f"{name}.json", "folder") for name in STAGES}
    first = stages["sft"]
    demo = any(stage.get("questions") == "demo" for stage in stages.values())
    kept = files.read_json(KEPT, "results", dict) if KEPT.exists() and not demo else {}
    kept[first["device"]] = {
        "size": first["size"], "machine": first["machine"], "seconds": args.seconds, "stages": stages,
    }  # fmt: skip
    text = table(kept)
    cli.print0(text)
    if demo:
        cli.print0(f"measured on the demo's questions: {RESULTS} is unchanged")
    else:
        files.write_json(KEPT, kept, indent=1)
        files.write_text(RESULTS, text)


if __name__ == "__main__":
    cli.run(main)
