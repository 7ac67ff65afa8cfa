"""Kill RL with SIGKILL at seeded points of every stage, run the same command again, and compare what it ends with.

    python tests/rl/rl_faults.py --kills 25 --seed 0 --output tests/rl/rl_faults.json     # the committed result
    python tests/rl/rl_faults.py --kills 5                                                  # what the tests run

A run of two rounds (real questions, a tiny model with image layers) goes through once while every file operation of
it under its folder is counted (`sys.addaudithook`). Between two of them the disk does not change, so "before the n-th
operation", or some milliseconds into what follows it, is every place where a kill can matter. The kills are spread
over sampling, export, waiting (half of the replies there), PPO and saving, and drawn inside each stage from the seed.
After each kill, every file under its final name must be complete; the command is run again, and model, value function,
optimizer, rollouts, scores, the sample table and metrics.jsonl must be those of the undisturbed run, bit by bit.

Each run is a fork of one process that has loaded the libraries and runs the script there, so a kill takes seconds.
Power cuts are not tested.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.utils._pytree import tree_flatten_with_path  # noqa: E402

from ares import cli, files  # noqa: E402
from ares.cli import UserError, print0  # noqa: E402
from benchmarks import rl_common  # noqa: E402
from benchmarks.common import ROOT, SAMPLE  # noqa: E402
from teacher import handoff  # noqa: E402

STAGES = ("sampling", "export", "waiting", "PPO", "saving")
ROUNDS = 2
LIMIT = 300.0  # seconds that one run may take


# -- one run, in a process of its own --------------------------------------------------------------------


def command(world: Path, run: Path) -> list[str]:
    """RL's flags: 7 questions x 2 rationales in batches of 3; 4 updates per epoch, the last one short; all saved."""
    flags = {
        "data_root": world / "data", "caption_file": world / "data/captions.json", "img_type": "vit",
        "prompt_format": "QCM-E", "base_model_dir": world / "base", "ref_model": world / "base", "run_dir": run,
        "k_actions": 2, "bs": 3, "output_len": 16, "do_sample": True, "rl_batch_size": 2, "ga_step": 2,
        "rl_epochs": 2, "epochs": ROUNDS, "lr": 1e-3, "init_kl_coef": 0.1, "save_minutes": 0, "poll_seconds": 0.05,
        "settle_seconds": 0.2, "report_to": "none",
    }  # fmt: skip
    return [str(word) for pair in flags.items() for word in (f"--{pair[0]}", pair[1])]


def forked(log: Path, work: Callable[..., None], *args: Any) -> multiprocessing.Process:
    """Start `work(*args)` in a fork whose output goes to `log`."""

    def logged() -> None:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        work(*args)

    process = multiprocessing.get_context("fork").Process(target=logged)
    process.start()
    return process


def watched(world: Path, run: Path, record: Path | None, kill_at: int | None = None, delay: float = 0.0) -> None:
    """RL's main with every operation on `run` counted; recorded at its end, or killed before operation `kill_at`."""
    operations: list[tuple[str, str]] = []

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            path = args[0] if writes else None
        elif event in ("os.rename", "os.mkdir", "os.remove", "shutil.rmtree"):
            path = args[1] if event == "os.rename" else args[0]
        else:
            return
        if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(f"{run}{os.sep}"):
            return
        if len(operations) == kill_at:
            kill_self(delay)
        operations.append((event, os.path.relpath(path, run)))

    sys.addaudithook(hook)
    run_script("run_mm_cot_rl.py", *command(world, run))
    if record is not None:
        files.write_json(record, operations)


def run_script(name: str, *argv: object) -> None:
    """Run a script of the project in this process, as `python name ...` does."""
    sys.argv = [name, *map(str, argv)]
    sys.path.insert(0, str((ROOT / name).parent))
    runpy.run_path(str(ROOT / name), run_name="__main__")


def kill_self(delay: float) -> None:
    """SIGKILL to this process, now or by another one in `delay` seconds."""
    me = os.getpid()
    if not delay:
        os.kill(me, signal.SIGKILL)
    elif os.fork() == 0:
        time.sleep(delay)
        os.kill(me, signal.SIGKILL)
        os._exit(0)


def attend(process: multiprocessing.Process, run: Path, kill_waiting: int | None = None) -> int:
    """Answer what the run exports until it ends; returns its exit status, negative for a signal.

    With `kill_waiting` n the run is killed while it waits in round n, when half of the replies are there.
    """
    questions, end = run / "questions", time.monotonic() + LIMIT
    while process.is_alive():
        if time.monotonic() > end:
            process.kill()
            raise UserError(f"{run}: the run hangs; see the log beside it")
        if handoff.exported(questions):
            # rounds finish in order: as many folders as rounds before it
            if kill_waiting is not None and sum((run / str(n)).exists() for n in range(ROUNDS)) == kill_waiting:
                rl_common.answer(questions, skip=lambda item: item.action == 1, done=False)
                time.sleep(0.1)
                process.kill()
                process.join()
            elif not all(handoff.is_done(questions, item.action) for item in handoff.iter_items(questions)):
                rl_common.answer(questions)
        process.join(0.02)
    return process.exitcode


# -- what a run leaves -----------------------------------------------------------------------------------


def stage_of(path: str) -> str:
    """The stage that an operation on `path` belongs to."""
    if path.startswith("rollouts/"):
        if path.endswith(("scores.json", "flags_ppo.json")):
            return "waiting" if path.endswith("scores.json") else "PPO"
        return "export" if path.endswith("collected.json") else "sampling"
    if path.startswith("questions/"):
        return "waiting" if path.endswith((handoff.SCORES, handoff.REASON)) else "export"
    if path.startswith(("state/", "metrics.jsonl", "samples_round_")):
        return "PPO"
    return "saving"


def torn_files(run: Path) -> list[str]:
    """Files under their final names that are not whole. metrics.jsonl grows by lines: its last may be torn."""
    readers = {
        ".safetensors": load_file,
        ".pth": lambda path: torch.load(path, map_location="cpu", weights_only=True),
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()[: -1 or None]],
    }
    torn = []
    for path in run.rglob("*"):
        name = path.relative_to(run)
        hidden = any(part.startswith((".tmp-", ".old-")) for part in name.parts)
        if path.is_dir() or hidden or path.suffix not in readers:
            continue
        try:
            readers[path.suffix](path)
        except Exception as error:
            torn.append(f"{name}: {error}")
    return torn


def digest(run: Path) -> dict[str, str]:
    """A hash of every file that counts, by name: tensors bit by bit, the rest byte by byte."""
    paths = [run / "metrics.jsonl", *run.glob("samples_round_*.jsonl"), *run.glob("rollouts/*/*")]
    for number in range(ROUNDS):
        paths += (run / str(number)).iterdir()
        paths += (run / f"questions_round{number}").rglob(handoff.SCORES)
    # args.yaml and flags_*.json hold the run folder's path
    paths = [path for path in paths if path.name != "args.yaml" and not path.name.startswith("flags_")]
    return {str(path.relative_to(run)): hash_of(path) for path in paths}


def hash_of(path: Path) -> str:
    """Of a file's bytes; of the values in a .pth (whose bytes depend on its temporary name) and a .safetensors (whose
    metadata are in any order)."""
    if path.suffix not in (".pth", ".safetensors"):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    content = torch.load(path, weights_only=True) if path.suffix == ".pth" else load_file(path)
    parts = hashlib.sha256()
    for place, value in sorted(tree_flatten_with_path(content)[0], key=lambda leaf: str(leaf[0])):
        tensor = isinstance(value, torch.Tensor)
        parts.update(repr((place, value.dtype, value.shape) if tensor else (place, value)).encode())
        parts.update(value.contiguous().numpy().tobytes() if tensor else b"")
    return parts.hexdigest()


# -- the test --------------------------------------------------------------------------------------------


def choose(operations: list[list[str]], kills: int, seed: int) -> list[dict]:
    """Where to kill: the stages in turn, inside each a place drawn at random, none twice. Half of the kills come some
    milliseconds later, in the middle of what follows: a forward pass, a file that is being written."""
    rng = random.Random(seed)
    places = {stage: [] for stage in STAGES}
    for number, (event, path) in enumerate(operations):
        places[stage_of(path)].append({"operation": number, "event": event, "path": path})
    places["waiting"] += [{"waiting": number} for number in range(ROUNDS)]
    for stage in STAGES:
        rng.shuffle(places[stage])
    chosen = []
    while len(chosen) < kills and any(places.values()):
        for stage in STAGES:
            if places[stage] and len(chosen) < kills:
                delay = rng.choice((0.0, round(rng.uniform(0.0005, 0.05), 4)))
                chosen.append({"stage": stage, "delay_s": delay, **places[stage].pop()})
    return chosen


def make_world(world: Path, sample: Path) -> None:
    """Seven real questions, a tokenizer trained on their texts (a saved state of 1 MB, not 50), a tiny model."""
    from transformers import AutoTokenizer

    data = rl_common.make_data(world, sample, 7)
    run_script("demo/make_model.py", "--data", world, "--tokenizer", world / "tokenizer", "--output", world / "unused",
               "--vocab_size", 900)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    rl_common.make_model(world / "base", data, tokenizer, steps=12, vocab_size=len(tokenizer))


def fault_test(work: Path, sample: Path, kills: int, seed: int) -> dict:
    """Run it all under `work`; returns the kills with what came of each. Raises UserError when a plain run fails."""
    log, world, whole, record = (work / name for name in ("log.txt", "world", "whole", "operations.json"))
    if attend(forked(log, make_world, world, sample), world) != 0:
        raise UserError(f"the world could not be made; see {log}")
    begin = time.monotonic()
    if attend(forked(log, watched, world, whole, record), whole) != 0:
        raise UserError(f"the undisturbed run failed; see {log}")
    seconds, expected, operations = time.monotonic() - begin, digest(whole), json.loads(record.read_text())
    print0(f"undisturbed: {seconds:.1f} s, {len(operations)} file operations, {len(expected)} files compared")

    results = []
    for number, kill in enumerate(choose(operations, kills, seed)):
        run = work / f"run_{number}"
        disturbed = forked(log, watched, world, run, None, kill.get("operation"), kill["delay_s"])
        killed = attend(disturbed, run, kill.get("waiting")) == -signal.SIGKILL
        torn = torn_files(run)
        again = attend(forked(log, watched, world, run, None), run)
        found = digest(run) if again == 0 else {}
        differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        left = [str(path.relative_to(run)) for path in run.rglob(".tmp-*")]
        ok = killed and again == 0 and not (torn or differ or left)
        results.append({**kill, "killed": killed, "rerun_status": again, "torn_files": torn,
                        "differing_files": differ, "left_over": left, "ok": ok})  # fmt: skip
        place = kill.get("path", f"round {kill.get('waiting')}, half of the replies there")
        print0(f"{number + 1:3} {kill['stage']:9} {kill['delay_s']:.4f} s after {place}: {'ok' if ok else 'FAILED'}")
        if ok:
            shutil.rmtree(run)
    by_stage = {stage: sum(result["stage"] == stage for result in results) for stage in STAGES}
    return {
        "seed": seed, "torch": torch.__version__, "operations": len(operations), "files_compared": len(expected),
        "kills": len(results), "ok": sum(result["ok"] for result in results), "by_stage": by_stage,
        "results": results,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of their places")
    parser.add_argument("--output", metavar="FILE", help="write the result there (JSON)")
    parser.add_argument("--sample", metavar="DIR", help="folder of real questions (default: ../shared's sample)")
    parser.add_argument("--work", metavar="DIR", help="folder to work in (default: a temporary one)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="rl-faults-") as temporary:
        work = Path(args.work or temporary).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for name in ("rl.trainer", "rl.sampling", "rl.metrics", "model", "utils_data", "sft.predict", "accelerate"):
            importlib.import_module(name)  # once, before the forks
        from transformers import AutoTokenizer, GenerationConfig  # noqa: F401  (loaded when first asked for)

        result = fault_test(work, Path(args.sample or SAMPLE), args.kills, args.seed)
    if args.output:
        kills = ",\n".join(map(json.dumps, result["results"]))  # a line for each
        head = json.dumps({**result, "results": []}).removesuffix("[]}")
        files.write_text(args.output, f"{head}[\n{kills}\n]}}\n")
    print0(f"{result['ok']} of {result['kills']} kills: the re-run ends as the undisturbed run does, bit by bit")
    if result["ok"] < result["kills"]:
        raise UserError(f"{result['kills'] - result['ok']} kills left another result; --work DIR keeps their folders")


if __name__ == "__main__":
    cli.run(main)
