"""What a run will cost, before anything of it runs: state, hours and dollars of every stage (run_ares.py --plan).

Hours are the measured seconds per unit of work of benchmarks/RESULTS.md times the work of the data at hand; dollars
are those of haiku.py --estimate. `run` is a `Run` of run_ares.py.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import Any

from ares import files
from ares.cli import UserError, print0
from pipeline.config import SHAPES, fill
from pipeline.stages import ROOT, Chain, Stage

SPEED = ROOT / "benchmarks/results/speed.json"  # measured seconds per unit of work at size tiny
UNITS = {"sft": "sft_seconds_per_sample", "eval": "generate_seconds_per_question", "rollout": "seconds_per_rollout",
         "ppo": "seconds_per_row", "features": "seconds_per_image"}  # fmt: skip
VOCABULARY = 32128


def products(size: str) -> int:
    """Multiplications per token of a T5: the weights of its linear layers, decoder head included."""
    d, d_ff, layers, inner = SHAPES[size]
    return layers * (12 * d * inner + 6 * d * d_ff) + d * VOCABULARY


def seconds_per_unit(size: str) -> tuple[dict[str, float], str]:
    """(seconds of each kind of work at `size` on this machine's device, where they come from)."""
    device = "cuda" if shutil.which("nvidia-smi") else "cpu"
    measured = files.read_json(SPEED, "benchmarks", dict).get(device)
    if measured is None:
        return {}, f"hours: benchmarks/RESULTS.md has none for {device} yet (bash benchmarks/gpu.sh measures them)"
    factor = products(size) / products(measured["size"])
    found = {}
    for kind, name in UNITS.items():
        value = (measured["stages"].get(kind, {}).get("projection") or {}).get(name)
        if value:
            found[kind] = value * (factor if kind != "features" else 1)
    machine = measured["machine"]
    note = f"hours: from benchmarks/RESULTS.md ({machine.get('gpu') or machine['cpu']}, size {measured['size']})"
    return found, note + f", times {factor:.1f} for size {size}" * (factor != 1)


def amounts(run: Any) -> dict[str, dict[str, float]]:
    """Stage -> kind of work -> how much: questions, rollouts, rows of PPO; `ask_*`: requests to the Teacher."""
    config, data = run.config, read_problems(run)
    train, every = len(data.splits["train"]), sum(len(data.splits[split]) for split in ("train", "val", "test"))
    rollouts = train * config.value("rl", "k_actions") * config.value("rl", "epochs")
    judged = min(len(data.splits["test"]), config.value("judge", "questions") or 10**9)
    one = {
        "features": {"features": sum(bool(problem.get("image")) for problem in data.problems.values())},
        "start": {"sft": train * config.value("start", "epoch"), "eval": every},
        "baseline": {"eval": every},
        "rl": {"rollout": rollouts, "ppo": rollouts * config.value("rl", "rl_epochs"), "ask_score": rollouts},
        "generate": {"eval": every},
        "correct": {"ask_correct": train},
        "sft": {"sft": train * config.value("sft", "epoch"), "eval": every},
        "lora": {"sft": train * config.value("lora", "epoch")
                 * len(run.named_models()) * len(config["forms"])},
        "judge": {"ask_judge": 2 * judged * (len(run.named_models()) - 1)},
    }  # fmt: skip
    return {stage.name: one.get(re.sub(r"_\d+$", "", stage.name), {}) for stage in run.stages()}


def read_problems(run: Any) -> Any:
    """The data folder of the configuration. Raises UserError if it is not there yet."""
    from ares.data_folder import read_data_folder

    root = fill(run.config.value("data", "data_root"), run.filled)
    return read_data_folder(root, run.config.value("data", "dataset"))


def dollars_per_request(run: Any) -> dict[str, float | None]:
    """Kind of request -> dollars of one, as `--estimate` reckons them; None where the price is not known."""
    from teacher.estimate import expected_usd

    data, found = read_problems(run), {}
    images = run.config["data"].get("images") or data.root / "images"
    for kind, block in (("score", "scores"), ("correct", "corrections"), ("judge", "judge")):
        flags = {**run.config["teacher"], **(run.config[block] or {})}
        shown = None if kind == "judge" and not flags.get("with_image") else fill(str(images), run.filled)
        k = run.config.value("rl", "k_actions")
        found[f"ask_{kind}"] = expected_usd(kind, data.problems, data.splits["train"], shown, flags, k)
    return found


def processes(command: str) -> int:
    """How many processes a launcher's words start."""
    found = re.search(r"--(?:num_processes|nproc[_-]per[_-]node)[ =](\d+)", command)
    return int(found[1]) if found else 1


def show_plan(run: Any, chain: Chain, chosen: Sequence[Stage]) -> None:
    """Print the table of --plan: what exists, what will run, hours and dollars. Spends nothing, loads no model."""
    rate, note = seconds_per_unit(run.config["size"])
    try:
        work, dollars = amounts(run), dollars_per_request(run)
    except UserError as error:
        work, dollars, note = {}, {}, f"hours and dollars: known once the data are there ({error})"
    print0(f"{run.output} (seed {run.seed})\n{'stage':<12}{'state':<12}{'hours':>8}{'dollars':>10}   what")
    hours = spent = 0.0
    for stage in run.stages():
        state = "done" if stage.name in chain.done else "to run" if stage in chosen else "not chosen"
        if state == "to run" and any(path.exists() for path in stage.makes):
            state = "goes on"
        mine, cells = work.get(stage.name, {}), ["", ""]
        timed = [kind for kind in mine if not kind.startswith("ask_") and mine[kind]]
        if timed and all(kind in rate for kind in timed):
            each = sum(rate[kind] * mine[kind] for kind in timed) / 3600 / processes(stage.commands[0])
            cells[0] = f"{each:.2f}"
            hours += each if state in ("to run", "goes on") else 0
        for kind in mine:
            if kind.startswith("ask_"):
                each = dollars.get(kind)
                cells[1] = "unknown" if each is None else f"{each * mine[kind]:.2f}"
                spent += (each or 0) * mine[kind] if state in ("to run", "goes on") else 0
        print0(f"{stage.name:<12}{state:<12}{cells[0]:>8}{cells[1]:>10}   {stage.title}")
    print0(f"{'in all':<24}{hours:>8.2f}{spent:>10.2f}   of what is to run, the Teacher's answering time aside")
    print0(f"{note}\ndollars: by rule from gold rationales, live or batch as configured; nothing is asked or spent")
