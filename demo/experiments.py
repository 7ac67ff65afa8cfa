"""Experiments with RL on the demo's data; every run is a stage that a later call does not repeat.

    python demo/experiments.py recipes --output experiments --seeds 0           # all recipes, equal processor time
    python demo/experiments.py recipes --output experiments --seeds 0 1 2 --rl_seeds 0 1 --arms warm_vf-2e-4-1e-2
    python demo/experiments.py rounds --output experiments --seeds 0 1 2        # RL -> SFT -> RL -> SFT
    python demo/experiments.py table --output experiments --save demo/results   # recipes.md, rounds.md

A recipe may use --cpu_seconds of processor time in RL (sampling and updates, not the Teacher); it ends with the round
in which it exceeds them. Figures are those of the 200 held-out questions, differences to the starting model are paired
by question and pooled over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ares import files  # noqa: E402
from ares.cli import HelpFormatter, UserError, run  # noqa: E402
from ares.intervals import difference_text  # noqa: E402
from ares.predictions import prediction_file, read_predictions  # noqa: E402
from demo.run import (  # noqa: E402
    BASE,
    SIZES,
    Demo,
    fine_tune,
    generate_and_correct,
    last_round,
    prepare,
    rl_commands,
    rl_with_teacher,
)
from teacher.reference import figures_by_question, rationale_figures, reference_scores  # noqa: E402

METHODS = {
    "released": "--algo ppo --rl_batch_size 16",
    "warm": "--algo ppo --rl_batch_size 64 --value_warmup 2 --value_init zero",
    "warm_vf": "--algo ppo --rl_batch_size 64 --value_warmup 2 --value_init zero --vf_lr 0.001",
    "rloo": "--algo rloo --rl_batch_size 64 --group_by_question False",
    "rloo_grouped": "--algo rloo --rl_batch_size 64",
}
RECIPES = {
    f"{method}-{lr}-{kl}": f"{flags} --lr {lr} --init_kl_coef {kl} --k_actions 4 --ga_step 1 --rl_epochs 2"
    for kl in ("1e-4", "1e-2")
    for lr in ("5e-5", "2e-4")
    for method, flags in METHODS.items()
}
FIGURES = ("score", "concludes", "covered")
COSTS = ("unfinished", "repeated", "no_conclusion", "words")
TEST_ONLY = "--use_generate --final_eval --eval_bs 64 --train_split miniminitrain --val_split miniminival"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("what", choices=("recipes", "rounds", "table"))
    parser.add_argument("--output", default="experiments", help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of data and starting model")
    parser.add_argument("--rl_seeds", type=int, nargs="+", default=[0], help="seeds of RL")
    parser.add_argument("--arms", nargs="+", choices=RECIPES, help="recipes (default: all)")
    parser.add_argument("--cpu_seconds", type=float, default=240, help="processor time of RL in each recipe")
    parser.add_argument("--jobs", type=int, default=2, help="recipes that run at a time")
    parser.add_argument("--size", default="demo", choices=SIZES, help="smoke: for tests")
    parser.add_argument("--save", metavar="DIR", help="where `table` writes (default: --output)")
    return parser.parse_args(argv)


def world(args: argparse.Namespace, seed: int, name: str) -> Demo:
    """The data and starting model of a seed, as stages of their own, for a run called `name`."""
    size = SIZES[args.size]
    root = files.writable_dir(Path(args.output) / f"seed{seed}", "--output").resolve()
    prepare(Demo(root, {"seed": seed, **size}), seed, size)
    demo = Demo(root, {})
    demo.logs, demo.record_file = root / name / "logs", root / name / "stages.json"
    demo.logs.mkdir(parents=True, exist_ok=True)
    demo.record = files.read_json(demo.record_file, "--output", dict) if demo.record_file.exists() else {"stages": {}}
    return demo


def run_recipe(args: argparse.Namespace, seed: int, rl_seed: int, arm: str) -> None:
    """RL by one recipe until it has used its processor time, then rationales of the test questions."""
    demo = world(args, seed, f"recipes/{arm}-{rl_seed}")
    folder = f"recipes/{arm}-{rl_seed}/rl"
    flags = f"{RECIPES[arm]} --epochs 99 --seed {rl_seed}"
    rl, teacher = rl_commands(demo, BASE, folder, flags)
    demo.stage("rl", arm, action=lambda: rl_with_teacher(demo, rl, teacher, folder, args.cpu_seconds))
    model = f"{folder}/{last_round(demo.output / folder)}"
    demo.stage("test", arm, f"python main.py {demo.rationale} {TEST_ONLY} --evaluate_dir {demo.words}/{model}")
    write_result(demo, f"recipes/{arm}-{rl_seed}", {"arm": arm, "rounds": int(Path(model).name) + 1}, [BASE, model])


def run_rounds(args: argparse.Namespace, seed: int) -> None:
    """Two rounds of RL and SFT, the second from the first one's end."""
    demo, size, model, models = world(args, seed, "rounds"), SIZES[args.size], BASE, [BASE]
    for number in (1, 2):
        folder, name = f"rounds/rl{number}", f"{number}_"
        rl, teacher = rl_commands(demo, model, folder, f"{size['rl']} --seed {seed}", size["rl_processes"])
        demo.stage(f"{name}rl", "RL", action=lambda r=rl, t=teacher, f=folder: rl_with_teacher(demo, r, t, f))
        after = f"{folder}/{last_round(demo.output / folder)}"
        generate_and_correct(demo, name, after, f"rounds/correction{number}")
        model = f"rounds/sft{number}"
        fine_tune(demo, name, after, f"rounds/correction{number}", model, size, seed)
        models += [after, model]
    write_result(demo, "rounds", {}, models)


def write_result(demo: Demo, place: str, more: dict[str, Any], models: Sequence[str]) -> None:
    """{place}/result.json: figures of each model on the test split, in all and by question."""
    problems = files.read_json(demo.output / "data/scienceqa/problems.json", "--output")
    found = []
    for model in models:
        test = read_predictions(prediction_file(demo.output / model, "test"), "--output")
        scores = reference_scores(problems, test.qids, test.preds)
        figures = rationale_figures(problems, test.qids, test.preds, scores)
        each = figures_by_question(problems, test.qids, test.preds, scores)
        found.append({"figures": figures, "by_question": each})
    files.write_json(demo.output / place / "result.json", {**more, "models": found}, indent=None)


def differences(results: Sequence[dict], ours: int, theirs: int) -> list[str]:
    """Cells of paired differences of two models, pooled over the results."""
    cells = []
    for key in FIGURES:
        one, other = ([x for result in results for x in result["models"][i]["by_question"][key]]
                      for i in (ours, theirs))  # fmt: skip
        cells.append(difference_text(one, other, 3 if key == "score" else 1))
    return cells


def costs(results: Sequence[dict], model: int) -> list[str]:
    return [f"{mean(result['models'][model]['figures'][key] for result in results):.1f}" for key in COSTS]


def write_tables(args: argparse.Namespace) -> None:
    """recipes.md and rounds.md from the results that are there."""
    output, save = Path(args.output), Path(args.save or args.output)
    heads = ["score", "right conclusions, points", "gold covered, points", *COSTS]
    rows = {"recipes": [], "rounds": []}
    for arm in RECIPES:
        paths = sorted(output.glob(f"seed*/recipes/{arm}-[0-9]*/result.json"))
        results = [files.read_json(path, "--output") for path in paths if path.parent.name.rpartition("-")[0] == arm]
        if results:
            rounds = mean(result["rounds"] for result in results)
            cells = [str(len(results)), f"{rounds:.1f}", *differences(results, 1, 0), *costs(results, 1)]
            rows["recipes"].append([f"{arm}: `{RECIPES[arm]}`", *cells])
    results = [files.read_json(path, "--output") for path in sorted(output.glob("seed*/rounds/result.json"))]
    steps = ("start", "RL 1", "SFT 1", "RL 2", "SFT 2")
    for i, step in enumerate(steps[1:], 1) if results else ():
        cells = [str(len(results)), steps[i - 1], *differences(results, i, i - 1), *costs(results, i)]
        rows["rounds"].append([step, *cells])
    if not any(rows.values()):
        raise UserError(f"--output: {output} holds no result; run recipes or rounds first")
    for name, lines in rows.items():
        if lines:
            first = ["recipe", "runs", "rounds"] if name == "recipes" else ["after", "runs", "difference to"]
            table = [[*first, *heads], ["---"] * (len(heads) + 3), *lines]
            text = "\n".join(f"| {' | '.join(line)} |" for line in table)
            files.write_text(save / f"{name}.md", text + "\n")
            print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.what == "table":
        return write_tables(args)
    for seed in args.seeds:
        world(args, seed, "rounds" if args.what == "rounds" else "recipes")
    if args.what == "rounds":
        calls = [(run_rounds, (args, seed)) for seed in args.seeds]
    else:
        calls = [(run_recipe, (args, seed, rl_seed, arm))
                 for arm in args.arms or RECIPES for seed in args.seeds for rl_seed in args.rl_seeds]  # fmt: skip
    with ThreadPoolExecutor(args.jobs) as pool:
        for call in [pool.submit(function, *values) for function, values in calls]:
            call.result()
    write_tables(args)


if __name__ == "__main__":
    run(main)
