"""Compare recipes of RL on the demo's data; every run is kept, so that a comparison can be made in pieces.

    python demo/experiments.py --output experiments --seeds 0              # all recipes, about an hour on 2 cores
    python demo/experiments.py --output experiments --seeds 0 1 2 --rl_seeds 0 1 --arms released-5e-5-1e-4
    python run_ares.py --config configs/demo.yaml --output rounds --rounds 2 --seeds 0 1 2 \\
        --set lora=null rl.epochs=2 launch.rl=python

Each recipe runs as many rounds as take about the same processor time of sampling and updates; a round of PPO with a
value warm-up takes 2.4 times that of RLOO. Writes {output}/recipes.md: figures of the 200 held-out questions,
differences to the starting model paired by question, of one run each and, for recipes with more, of all runs, where a
question counts once for each data seed. The last command follows RL -> SFT -> RL -> SFT.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ares import files  # noqa: E402
from ares.cli import HelpFormatter, UserError, refuse, run  # noqa: E402
from ares.intervals import difference_text  # noqa: E402
from pipeline.stages import ROOT  # noqa: E402

WARM_UP = "value_warmup=2 value_init=zero"
METHODS = {
    "released": "algo=ppo rl_batch_size=16 epochs=3 value_warmup=0 value_init=random vf_lr=null",
    "warm": f"algo=ppo rl_batch_size=64 epochs=2 {WARM_UP} vf_lr=null",
    "warm_vf": f"algo=ppo rl_batch_size=64 epochs=2 {WARM_UP} vf_lr=0.001",
    "rloo": "algo=rloo rl_batch_size=64 epochs=5 value_warmup=null value_init=null vf_lr=null group_by_question=false",
    "rloo_grouped": "algo=rloo rl_batch_size=64 epochs=5 value_warmup=null value_init=null vf_lr=null",
}
RECIPES = {
    f"{method}-{lr}-{kl}": f"{flags} lr={lr} init_kl_coef={kl}"
    for kl in ("1e-4", "1e-2")
    for lr in ("5e-5", "2e-4")
    for method, flags in METHODS.items()
}
HEADS = {"score": "score", "concludes": "right conclusions, points", "covered": "gold covered, points"}
COSTS = ("unfinished", "repeated", "no_conclusion", "words")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output", default="experiments", help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of data and starting model")
    parser.add_argument("--rl_seeds", type=int, nargs="+", default=[0], help="seeds of RL")
    parser.add_argument("--arms", nargs="+", choices=RECIPES, metavar="RECIPE", help="recipes (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="recipes that run at a time")
    parser.add_argument("--config", default="configs/demo.yaml", help="configs/smoke.yaml: for tests")
    args = parser.parse_args(argv)
    refuse([f"--jobs must be at least 1, not {args.jobs}"] * (args.jobs < 1))
    return args


def ares(folder: Path, *words: object) -> None:
    """Run a part of the chain in `folder`; its output goes to {folder}/run.log."""
    command = ["run_ares.py", "--output", folder, *words]
    print("python", shlex.join(map(str, command)), flush=True)
    with open(folder / "run.log", "a", encoding="utf-8") as log:
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise UserError(f"{folder}: the run failed; see {folder / 'run.log'}, then run the same command again")


def run_recipe(args: argparse.Namespace, world: Path, rl_seed: int, arm: str) -> None:
    """RL by one recipe on the data and starting model of `world`, and the rationales after it."""
    folder = files.writable_dir(world / f"{arm}-{rl_seed}", "--output")
    changes = [f"rl.{word}" for word in RECIPES[arm].split()]
    run_in_world(world, folder, "--config", args.config, "--seed", rl_seed, changes=changes)


def run_in_world(world: Path, folder: Path, *words: object, changes: Sequence[str]) -> None:
    """RL in `folder` from the data and starting model of `world`, the rationales after it, and the figures of both,
    {folder}/table.json. A finished run is left as it is. Raises UserError for one with other flags."""
    start = world / "models/start"
    wiring = ["prepare=null", "features=null", "start.model=null", f"start.folder={start}", "launch.rl=python"]
    wiring += [f"data.data_root={world}/data", f"data.images={world}/images"]
    wiring += [f"prompt.vision_features={world}/vision_features", f"prompt.caption_file={world}/data/captions.json"]
    ares(folder, *words, "--until", "generate", "--set", *wiring, *changes)
    if (folder / "table.json").exists():
        return
    rounds = max((path.parent for path in folder.glob("rl/[0-9]*/args.yaml")), key=lambda path: int(path.name))
    compare = ["tools/compare.py", "--system", f"start={start}", "--system", f"RL={rounds}", "--output", folder]
    command = [sys.executable, *map(str, compare), "--data_root", f"{world}/data"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


Runs = dict[str, list[dict[str, Any]]]  # world -> table.json of every RL seed, with the processor seconds of RL


def read_runs(output: Path) -> dict[str, Runs]:
    """Recipe -> its runs that have results, in the order of RECIPES."""
    found: dict[str, Runs] = {arm: defaultdict(list) for arm in RECIPES}
    for path in sorted(output.glob("seed*/*/table.json")):
        arm = path.parent.name.rpartition("-")[0]
        if arm in found:
            result = files.read_json(path, "--output", dict, nan=True)
            stages = files.read_json(path.with_name("stages.json"), "--output", dict)["stages"]
            found[arm][path.parent.parent.name].append({**result, "cpu": stages["rl"]["cpu_seconds"]})
    return {arm: runs for arm, runs in found.items() if runs}


def values(runs: Runs, label: str, key: str) -> list[float]:
    """A figure of every question of every world: the mean over RL seeds, since they share the questions."""
    worlds = ([run["by_question"][label][key] for run in each] for each in runs.values())
    return [mean(of_one) for world in worlds for of_one in zip(*world, strict=True)]


def table(recipes: dict[str, Runs], several: bool) -> str:
    """A row for each recipe; with `several` runs, also the least and largest gain of a run and the difference to the
    first recipe, where both have the same worlds."""
    first = next(iter(recipes.values()))
    heads = ["recipe", "runs", *HEADS.values(), *COSTS, "CPU s", *["score by run", "score over the first"] * several]
    rows = [heads, ["---"] * len(heads)]
    for arm, worlds in recipes.items():
        runs = [run for each in worlds.values() for run in each]
        cells = [
            difference_text(values(worlds, "RL", key), values(worlds, "start", key), 3 if key == "score" else 1)
            for key in HEADS
        ]
        cells += [f"{mean(run['rationales']['RL'][key] for run in runs):.1f}" for key in COSTS]
        cells += [f"{mean(run['cpu'] for run in runs):.0f}"]
        if several:
            gains = [mean(run["by_question"]["RL"]["score"]) - mean(run["by_question"]["start"]["score"])
                     for run in runs]  # fmt: skip
            both = (values(each, "RL", "score") for each in (worlds, first))
            alike = worlds is not first and worlds.keys() == first.keys()
            cells += [f"{min(gains):+.3f} to {max(gains):+.3f}", difference_text(*both, 3) if alike else ""]
        rows.append([f"{arm}: `{RECIPES[arm]}`", str(len(runs)), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write_table(output: Path) -> None:
    """recipes.md: one run of every recipe, on the first world; then all runs of the recipes that have several."""
    recipes = read_runs(output)
    world = min(world for runs in recipes.values() for world in runs)
    text = table({arm: {world: runs[world][:1]} for arm, runs in recipes.items() if world in runs}, False)
    if many := {arm: runs for arm, runs in recipes.items() if sum(map(len, runs.values())) > 1}:
        text += "\n" + table(many, True)
    files.write_text(output / "recipes.md", text)
    print(text, end="", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    output = files.writable_dir(args.output, "--output").resolve()
    worlds = {seed: files.writable_dir(output / f"seed{seed}", "--output") for seed in args.seeds}
    for seed, world in worlds.items():
        ares(world, "--config", args.config, "--seed", seed, "--until", "start")
    calls = [
        (args, world, rl_seed, arm)
        for arm in args.arms or RECIPES
        for world in worlds.values()
        for rl_seed in args.rl_seeds
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        for call in [pool.submit(run_recipe, *values) for values in calls]:
            call.result()
    write_table(output)


if __name__ == "__main__":
    run(main)
