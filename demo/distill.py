"""RL on the demo with a reward model in place of the Teacher: three arms from the same first round.

    python demo/distill.py --output distilled --seeds 0 1 2

Arms of a seed: `reference`, all rounds scored by the reference Teacher; `model`, the first round by the reference
Teacher, a reward model trained on it, the later rounds scored by that; `first`, the first round alone. The first round
is run once and copied. Killed, the same command goes on. Writes {output}/distill.md and distill.json: scores of the
held-out questions by the reference Teacher, with differences paired by question and pooled over seeds, and by round
the mean score that the rationales in training got from the reward model beside the reference Teacher's of the same
rationales: where the first rises and the second does not, RL exploits errors of the reward model.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ares import files  # noqa: E402
from ares.cli import HelpFormatter, UserError, refuse, run  # noqa: E402
from ares.data_folder import read_data_folder  # noqa: E402
from ares.intervals import difference_text, paired_difference  # noqa: E402
from ares.tables import Cell, Table, markdown  # noqa: E402
from demo.experiments import ares, run_in_world  # noqa: E402
from pipeline.stages import ROOT  # noqa: E402
from teacher import handoff, reference  # noqa: E402
from teacher.agreement import FIGURES  # noqa: E402
from teacher.reply_files import read_scores  # noqa: E402

FIRST, REFERENCE, MODEL = ARMS = ("first", "reference", "model")
PAIRS = ((REFERENCE, FIRST), (MODEL, FIRST), (MODEL, REFERENCE))
TRAIN = "--prompt_format QCMG-E --read_twice --lr 1e-3 --bs 32 --epochs 25 --patience 8"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output", default="distilled", help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of data, models and RL")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of RL, the shared first one included")
    parser.add_argument("--train", default=TRAIN, help="further flags of tools/train_reward_model.py")
    parser.add_argument("--jobs", type=int, default=2, help="arms that run at a time")
    parser.add_argument("--config", default="configs/demo.yaml", help="configs/smoke.yaml: for tests")
    args = parser.parse_args(argv)
    least = {"rounds": 2, "jobs": 1}
    refuse([f"--{name} must be at least {n}, not {getattr(args, name)}" for name, n in least.items()
            if getattr(args, name) < n])  # fmt: skip
    return args


# -- running -----------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, world: Path, seed: int) -> Path:
    """The reward model of a seed, trained on the shared first round."""
    folder = world / "reward_model"
    words: list[Any] = ["tools/train_reward_model.py", "--questions_dirs", world / FIRST / "rl/questions_round0"]
    words += ["--model", world / "models/start", "--run_dir", folder, "--seed", seed]
    words += ["--data_root", world / "data", "--caption_file", world / "data/captions.json", "--use_caption"]
    words += ["--img_type", "vit", "--vision_features", world / "vision_features", *shlex.split(args.train)]
    print("python", shlex.join(map(str, words)), flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with open(world / "reward_model.log", "a", encoding="utf-8") as log:
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, stdout=log, stderr=log)
    if done.returncode:
        raise UserError(
            f"{folder}: training failed; see {world / 'reward_model.log'}, then run the same command again"
        )
    return folder


def run_arm(args: argparse.Namespace, world: Path, seed: int, arm: str) -> None:
    """One arm of a seed: its RL, and the rationales and figures after it."""
    folder = files.writable_dir(world / arm, "--output")
    if arm != FIRST and not (folder / "rl").exists():
        copy = folder / "copy_of_rl"
        shutil.rmtree(copy, ignore_errors=True)  # of a killed run
        shutil.copytree(world / FIRST / "rl", copy)
        os.replace(copy, folder / "rl")
    changes = [f"rl.epochs={1 if arm == FIRST else args.rounds}"]
    if arm == MODEL:
        changes += ["scores.teacher=model", f"scores.reward_model={train(args, world, seed)}"]
    run_in_world(world, folder, "--config", args.config, "--seed", seed, changes=changes)


# -- results -----------------------------------------------------------------------------------------------


def training_scores(world: Path, arm: str, rounds: int) -> list[dict[str, float]]:
    """For every round of an arm: the mean score of its sentences in training, and by the reference Teacher."""
    problems, found = read_data_folder(world / "data").problems, []
    for number in range(rounds):
        given, by_reference = [], []
        for item in handoff.iter_items(world / arm / f"rl/questions_round{number}"):
            try:
                given += read_scores(item.folder)
            except handoff.Refused:
                continue
            sentences = handoff.read_rationale(item.folder)
            by_reference += reference.score_sentences(problems[item.qid], sentences)
        found.append({"given": fmean(given), "reference": fmean(by_reference)})
    return found


def figures(args: argparse.Namespace, worlds: dict[int, Path]) -> dict[str, Any]:
    """What distill.json holds."""
    values: dict[str, list[list[float]]] = {}  # arm -> the held-out scores of every seed
    for arm in ARMS:
        tables = [files.read_json(world / arm / "table.json", "--output", dict, nan=True) for world in worlds.values()]
        values[arm] = [table["by_question"]["RL"]["score"] for table in tables]
        values.setdefault("start", [table["by_question"]["start"]["score"] for table in tables])
    pooled = {arm: [value for one in seeds for value in one] for arm, seeds in values.items()}
    models = {seed: files.read_json(world / "reward_model/metrics.json", "--output", dict, nan=True)
              for seed, world in worlds.items()}  # fmt: skip
    return {
        "seeds": list(worlds), "questions": [len(one) for one in values[FIRST]],
        "score": {arm: [fmean(one) for one in seeds] for arm, seeds in values.items()},
        "differences": {
            f"{ours} - {theirs}": {
                **paired_difference(pooled[ours], pooled[theirs]),
                "text": difference_text(pooled[ours], pooled[theirs], 3),
            }
            for ours, theirs in PAIRS
        },
        "rounds": {arm: {seed: training_scores(world, arm, args.rounds) for seed, world in worlds.items()}
                   for arm in (REFERENCE, MODEL)},
        "reward_models": {seed: {"way": one["way"], **one["agreement"]["all"]} for seed, one in models.items()},
    }  # fmt: skip


def cell(values: Sequence[float]) -> Cell:
    return Cell(fmean(values), deviation=stdev(values) if len(values) > 1 else None)


def tables_of(found: dict[str, Any]) -> list[Table]:
    many = f", mean ± deviation over {len(found['seeds'])} seeds" * (len(found["seeds"]) > 1)
    digits = {name: 3 for name in ("score", "given", "teacher", "reference", "way", *FIGURES)}
    scores = Table(
        f"Held-out questions, sentence score by the reference Teacher{many}", {"score": "score"}, digits=digits
    )
    scores.rows = [(arm, {"score": cell(found["score"][arm])}) for arm in ("start", *ARMS)]
    changes = Table("Paired differences, 95 % intervals, all seeds together", {"text": "score"})
    changes.rows = [(name, {"text": row["text"]}) for name, row in found["differences"].items()]
    heads = {"teacher": "arm reference: by the reference Teacher", "given": "arm model: in training",
             "reference": "arm model: by the reference Teacher"}  # fmt: skip
    rounds = Table(f"Mean score of the sentences in training, by round{many}", heads, digits=digits)
    for number in range(len(next(iter(found["rounds"][MODEL].values())))):
        by_arm = {arm: [seed[number] for seed in seeds.values()] for arm, seeds in found["rounds"].items()}
        cells = {name: cell([one[name] for one in by_arm[MODEL]]) for name in ("given", "reference")}
        cells["teacher"] = cell([one["reference"] for one in by_arm[REFERENCE]])
        rounds.rows.append((f"round {number + 1}", cells))
    columns = {"way": "of the way", **FIGURES}
    models = Table("Reward models on the questions held out of their training", columns, digits=digits)
    for seed, one in found["reward_models"].items():
        row = {"way": one["way"], **one["reward model"]}
        models.rows.append((f"seed {seed}", {key: Cell(row[key]) for key in columns if row[key] is not None}))
    return [scores, changes, rounds, models]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    output = files.writable_dir(args.output, "--output").resolve()
    worlds = {seed: files.writable_dir(output / f"seed{seed}", "--output") for seed in args.seeds}
    with ThreadPoolExecutor(args.jobs) as pool:

        def begin(seed: int) -> None:
            ares(worlds[seed], "--config", args.config, "--seed", seed, "--until", "start")
            run_arm(args, worlds[seed], seed, FIRST)

        list(pool.map(begin, worlds))
        rest = [(seed, arm) for seed in worlds for arm in (REFERENCE, MODEL)]
        list(pool.map(lambda one: run_arm(args, worlds[one[0]], *one), rest))
    found = figures(args, worlds)
    files.write_json(output / "distill.json", found, indent=1)
    notes = ["[low, high]: 95 % bootstrap interval over questions."]
    notes += ["In round 1 all arms have the reference Teacher's scores; the reward model scores from round 2 on."]
    text = markdown(tables_of(found), notes)
    files.write_text(output / "distill.md", text)
    print(text, end="", flush=True)


if __name__ == "__main__":
    run(main)
