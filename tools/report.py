"""What the model learned: one HTML file with scores, curves and every question's rationales, stage by stage.

    python tools/report.py --stage "MM-CoT=models/mm-cot-base-rationale" --stage "RL=$RUN/0" --stage "SFT=$SFT" \\
        --stage "LoRA=$LORA" --run $RUN --data_root data --output report.html
    python tools/report.py --stage "mine=predictions_ans_test.json"        # less in it, but it works

Reads the stages' predictions (`--splits`), the run folder of RL (metrics.jsonl, samples, the Teacher's replies), the
correction folder and `win_rate.json`, whatever of it there is. Writes `--output`, which needs no server and no
network, and with `--png DIR` the curves as files for papers. Stages' sentences are scored by the offline reference
Teacher, RL's samples by the Teacher that scored them. Writes nothing into the folders it reads. See docs/report.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares import cli, files
from ares.cli import UserError, print0
from ares.data_folder import (
    CAPTION_DEFAULT,
    find_captions,
    find_dataset,
    find_images,
    load_captions,
    read_data_folder,
)
from rl.metrics import read_metrics
from tools.report_page import collect, plots, stages, teacher
from tools.report_page.page import build_page
from tools.report_page.pictures import MODES, collect_images


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    group = parser.add_argument_group("what to show")
    group.add_argument(
        "--stage", action="append", metavar='"NAME=FOLDER"', help="a stage's folder or predictions file; repeat it"
    )
    group.add_argument(
        "--splits", nargs="+", default=["test"], choices=("test", "val", "train"), help="splits (default: test)"
    )
    group.add_argument("--run", metavar="DIR", help="run folder of RL: curves, samples, the Teacher's replies")
    group.add_argument("--questions_dir", metavar="DIR", help="a questions folder outside a run folder")
    group.add_argument("--correction_dir", metavar="DIR", help="folder of the corrections, 0/p0/{qid}/")
    group.add_argument("--win_rate", action="append", metavar="FILE", help="what tools/win_rate.py wrote; repeat it")
    group.add_argument("--times", metavar="FILE", help="{title: seconds}, or the demo's stages.json")
    group.add_argument(
        "--train_questions", type=int, default=2000, help="most train questions to show with samples (default: 2000)"
    )
    data = cli.add_data_flags(parser)
    data.add_argument("--caption_file", default=CAPTION_DEFAULT, help="captions, {qid: text}")
    group = parser.add_argument_group("output")
    group.add_argument("--output", default="report.html", metavar="FILE", help="the page (default: %(default)s)")
    group.add_argument("--title", default="ARES report", help="heading of the page")
    group.add_argument(
        "--image_mode", default="copy", choices=MODES,
        help="copy: images go to {output}_images/ beside the page; embed: thumbnails inside it (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--png", metavar="DIR", help="also write the drawings as PNG files")
    args = parser.parse_args(argv)
    args.given = cli.given_flags(parser, argv)
    check_flags(args)
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what cannot work, in one message."""
    problems = []
    if not (args.stage or args.run or args.questions_dir):
        problems.append('nothing to show: give --stage "NAME=FOLDER", --run or --questions_dir')
    if args.run and args.questions_dir:
        problems.append("--questions_dir is not needed with --run, which holds its own; give one of the two")
    for flag in ("run", "questions_dir", "correction_dir"):
        folder = getattr(args, flag)
        if folder and not Path(folder).is_dir():
            problems.append(f"--{flag}: {folder} is no folder")
    if "image_mode" in args.given and args.image_mode == "none" and args.images:
        problems.append("--images has no use with --image_mode none")
    if args.train_questions < 0:
        problems.append("--train_questions must be 0 or more")
    if "train_questions" in args.given and not (args.run or args.questions_dir or args.correction_dir):
        problems.append("--train_questions has no use without --run, --questions_dir or --correction_dir")
    names = [stages.name_and_place(text)[0] for text in args.stage or []]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        problems.append(f"--stage: {twice[0]!r} is named twice; a stage needs a name of its own")
    cli.refuse(problems)


# -- reading -------------------------------------------------------------------------------------------------


def read_inputs(args: argparse.Namespace, notes: list[str]) -> collect.Inputs:
    """Everything the flags name. What is not there is put into `notes`. Raises UserError for what is wrong."""
    problems, splits, captions = read_data(args, notes)
    split_of = {qid: split for split in ("train", "val", "test") for qid in splits.get(split, ())}
    inputs = collect.Inputs([], args.splits, problems, captions, split_of)
    inputs.stages = [stages.read_stage(text, args.splits, splits, problems) for text in args.stage or []]
    if args.run or args.questions_dir:
        run = Path(args.run) if args.run else None
        inputs.rounds = teacher.read_rounds(run, Path(args.questions_dir) if args.questions_dir else None)
        if run is not None and not inputs.rounds and not (run / "metrics.jsonl").is_file():
            raise UserError(f"--run: {run} holds neither metrics.jsonl nor questions; name a run of run_mm_cot_rl.py")
    if args.correction_dir:
        inputs.corrections = teacher.read_corrections(Path(args.correction_dir))
    for path in args.win_rate or []:
        inputs.verdicts.append(read_verdicts(Path(path)))
    if problems is not None:
        asked = {sample.qid for each in inputs.rounds for sample in each.samples}
        unknown = next((qid for qid in asked if qid not in problems), None)
        if unknown is not None:
            raise UserError(f"--run: question {unknown} is not in problems.json; name its --data_root")
        known = teacher.scores_by_text(inputs.rounds)
        for stage in inputs.stages:
            stages.score_stage(stage, problems, known)
    return inputs


def read_data(args: argparse.Namespace, notes: list[str]) -> tuple[Any, Mapping[str, list[str]], Mapping[str, str]]:
    """(problems, splits, captions); None and empty ones where no --data_root was given and none is found."""
    try:
        dataset = find_dataset(args.data_root, args.dataset)
    except UserError:
        if args.given & {"data_root", "dataset", "caption_file"}:
            raise
        notes.append("no data folder (--data_root): questions as the prediction files have them, no sentence scores")
        return None, {}, {}
    data = read_data_folder(args.data_root, dataset)
    try:
        captions = load_captions(find_captions(args))
    except UserError:
        if "caption_file" in args.given:
            raise
        captions = {}
    return data.problems, data.splits, captions


def read_verdicts(path: Path) -> dict[str, Any]:
    """A file of tools/win_rate.py. Raises UserError if it holds no verdicts."""
    told = files.read_json(path, "--win_rate", nan=True)
    told = told if isinstance(told, dict) else {}
    verdicts, systems = told.get("verdicts"), told.get("systems")
    fits = isinstance(verdicts, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(name), str) for name in ("qid", "order", "winner"))
        for one in verdicts
    )
    named = isinstance(systems, list) and len(systems) == 2 and all(isinstance(name, str) for name in systems)
    parts = all(isinstance(told.get(name, {}), dict) for name in ("judge", "summary"))
    if not fits or not named or not parts:
        raise UserError(f'--win_rate: {path} must hold {{"systems": [A, B], "verdicts": [{{qid, order, winner}}]}}')
    return told


# -- the overview --------------------------------------------------------------------------------------------


def overview(args: argparse.Namespace, inputs: collect.Inputs, metrics: list) -> dict[str, Any]:
    """Figures per stage, rounds, dropped replies, cost and time: what the first tab shows."""
    split = args.splits[0]
    return {
        "title": args.title,
        "made": time.strftime("%Y-%m-%d"),
        "split": split,
        "figures": [
            stages.stage_figures(stage.splits[split], inputs.problems) if split in stage.splits else None
            for stage in inputs.stages
        ],
        "rounds": [line for line in metrics if line["kind"] == "rollout"],
        "curves": [],
        "series": collect.score_series(inputs, split),
        "dropped": collect.dropped_counts(inputs.rounds, inputs.corrections),
        "costs": costs(args, inputs),
        "times": times(args, inputs),
        "judged": [
            {key: told.get(key) for key in ("systems", "judge", "protocol", "summary")} for told in inputs.verdicts
        ],
    }


def costs(args: argparse.Namespace, inputs: collect.Inputs) -> list[dict[str, Any]]:
    told = [
        teacher.cost(f"sentence scores, round {each.number}", [sample.about for sample in each.samples], each.folder)
        for each in inputs.rounds
    ]
    if inputs.corrections:
        abouts = [each.about for each in inputs.corrections]
        told.append(teacher.cost("corrections", abouts, Path(args.correction_dir)))
    return told


def times(args: argparse.Namespace, inputs: collect.Inputs) -> list[dict[str, Any]]:
    """Wall time: what `--times` says, else what the trainers of the stages' folders recorded."""
    if args.times:
        told = files.read_json(args.times, "--times")
        told = told.get("stages", told) if isinstance(told, dict) else None
        if not isinstance(told, dict):
            raise UserError(f"--times: {args.times} must hold {{title: seconds}}")
        pairs = [
            (each["title"], each["seconds"]) if isinstance(each, dict) and {"title", "seconds"} <= each.keys()
            else (name, each) for name, each in told.items()
        ]  # fmt: skip
        if not all(isinstance(seconds, (int, float)) for _, seconds in pairs):
            raise UserError(f"--times: {args.times} must hold {{title: seconds}}")
        return [{"name": str(name), "seconds": seconds} for name, seconds in pairs]
    found = []
    for stage in inputs.stages:
        path = Path(stage.folder) / "trainer_state.json"
        if path.is_file():
            log = files.read_json(path, "--stage", dict, nan=True).get("log_history")
            lines = [line for line in reversed(log if isinstance(log, list) else []) if isinstance(line, dict)]
            seconds = next((line["train_runtime"] for line in lines if "train_runtime" in line), None)
            if isinstance(seconds, (int, float)):
                found.append({"name": f"training of {stage.name}", "seconds": seconds})
    return found


def draw(told: dict[str, Any], metrics: list, png: Path | None) -> dict[str, str]:
    """The drawings as SVG by name; `png`: also as files there. Notes the curves in `told`."""
    drawings = {}
    figures = [(curve["name"], plots.curve_label(curve), plots.draw_curve(curve)) for curve in plots.curves(metrics)]
    told["curves"] = [name for name, _, _ in figures]
    if told["series"]:
        label = "Sentence scores by position; the same numbers stand in the table below"
        figures.append(("scores", label, plots.draw_scores(told["series"])))
    for name, label, figure in figures:
        drawings[name] = plots.as_svg(figure, name, label)
        if png is not None:
            plots.write_png(figure, png / f"{name}.png")
    return drawings


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    output = Path(args.output)
    files.writable_dir(output.parent, "--output")
    png = files.writable_dir(args.png, "--png") if args.png else None
    images = find_images(args) if args.image_mode != "none" else None
    notes: list[str] = []
    inputs = read_inputs(args, notes)
    qids, left_out = collect.choose_questions(inputs, args.train_questions)
    if left_out:
        notes.append(f"{left_out} training questions with samples or corrections are left out (--train_questions)")
    metrics = []
    if args.run:
        file = Path(args.run) / "metrics.jsonl"
        metrics = read_metrics(file, "--run") if file.is_file() else []
        from tools.report_page.tokens import add_tokens

        for each in inputs.rounds:
            reason = add_tokens(Path(args.run), each, set(qids))
            if reason:
                notes.append(f"token rewards of round {each.number} are not available: {reason}")
    told = overview(args, inputs, metrics)
    drawings = draw(told, metrics, png)
    parts = collect.page_data(inputs, qids)
    parts["main"]["overview"] = told
    parts["main"]["notes"] = notes
    parts["images"] = collect_images(images, qids, args.image_mode, output) if images else {"list": [], "of": {}}
    page = build_page(args.title, parts, drawings)
    files.write_text(output, page)
    for note in notes:
        print0(f"note: {note}")
    print0(f"{output}: {len(qids)} questions, {len(inputs.stages)} stages, {len(page.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
