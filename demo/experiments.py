"""Compare recipes of RL on the demo's data; every run is kept, so that a comparison can be made in pieces.

    python demo/experiments.py --output experiments --seeds 0              # all recipes, about an hour on 2 cores
    python demo/experiments.py --output experiments --seeds 0 1 2 --rl_seeds 0 1 --arms released-5e-5-1e-4
    python run_ares.py --config configs/demo.yaml --output rounds --rounds 2 --seeds 0 1 2 --set lora=null rl.epochs=2

Each recipe runs as many rounds as take about the same processor time of sampling and updates; a round of PPO with a
value warm-up takes 2.4 times that of RLOO. Writes {output}/recipes.md: figures of the 200 held-out questions,
differences to the starting model paired by question and pooled over seeds. The last command follows RL -> SFT -> RL ->
SFT.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ares import files  # noqa: E402
from ares.cli import HelpFormatter, UserError, run  # noqa: E402
from ares.intervals import difference_text  # noqa: E402
from ares.stages import ROOT  # noqa: E402

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
    return parser.parse_args(argv)


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
    {folder}/table.json; nothing if that is there."""
    if (folder / "table.json").exists():
        return
    start = world / "models/start"
    wiring = ["prepare=null", "features=null", "start.model=null", f"start.folder={start}", "launch.rl=python"]
    wiring += [f"data.data_root={world}/data", f"data.images={world}/images"]
    wiring += [f"prompt.vision_features={world}/vision_features", f"prompt.caption_file={world}/data/captions.json"]
    ares(folder, *words, "--until", "generate", "--set", *wiring, *changes)
    rounds = max((path.parent for path in folder.glob("rl/[0-9]*/args.yaml")), key=lambda path: int(path.name))
    compare = ["tools/compare.py", "--system", f"start={start}", "--system", f"RL={rounds}", "--output", folder]
    command = [sys.executable, *map(str, compare), "--data_root", f"{world}/data"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def write_table(output: Path) -> None:
    """recipes.md, a row for each recipe that has results."""
    rows = [["recipe", "runs", *HEADS.values(), *COSTS]]
    rows.append(["---"] * len(rows[0]))
    for arm, flags in RECIPES.items():
        found = [path for path in sorted(output.glob(f"seed*/{arm}-*/table.json")) if path.parent.name[:-2] == arm]
        results = [files.read_json(path, "--output", dict, nan=True) for path in found]
        if results:
            values = {label: {key: [x for one in results for x in one["by_question"][label][key]] for key in HEADS}
                      for label in ("start", "RL")}  # fmt: skip
            pairs = [(values["RL"][key], values["start"][key], 3 if key == "score" else 1) for key in HEADS]
            cells = [difference_text(*pair) for pair in pairs]
            cells += [f"{mean(one['rationales']['RL'][key] for one in results):.1f}" for key in COSTS]
            rows.append([f"{arm}: `{flags}`", str(len(results)), *cells])
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    files.write_text(output / "recipes.md", text + "\n")
    print(text, flush=True)


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
