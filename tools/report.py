"""Write one HTML file with scores, curves and the rationales of every question, stage by stage.

    python tools/report.py --stage "MM-CoT=models/mm-cot-base-rationale" --stage "RL=$RUN/0" --stage "SFT=$SFT" \\
        --stage "LoRA=$LORA" --run $RUN --data_root data --output report.html
    python tools/report.py --stage "mine=predictions_ans_test.json"        # prediction files are enough

Reads the stages' predictions (`--splits`) and, if given, the run folder of RL (metrics.jsonl, samples, the Teacher's
replies), the correction folder and the results of tools/win_rate.py. Writes `--output`, which needs no server and no
network, and with `--png DIR` the curves as files for papers. Sentences of RL's samples have the scores of their
Teacher, those of the stages the scores of the offline reference Teacher. Input folders are only read. See
docs/report.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares import cli, files
from ares.cli import UserError, print0
from ares.data_folder import find_captions, find_dataset, find_images, load_captions, read_data_folder
from ares.predictions import unread_note
from rl.metrics import read_metrics
from tools.report_page import collect, plots, stages, teacher
from tools.report_page.page import build_page
from tools.report_page.pictures import MODES, collect_images


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument_group("what to show").add_argument
    add("--stage", action="append", metavar='"NAME=FOLDER"', help="a stage's folder or predictions file; repeat it")
    add("--splits", nargs="+", default=["test"], choices=("test", "val", "train"), help="splits (default: test)")
    add("--run", metavar="DIR", help="run folder of RL: curves, samples, the Teacher's replies")
    add("--questions_dir", metavar="DIR", help="a questions folder outside a run folder")
    add("--correction_dir", metavar="DIR", help="folder of the corrections, 0/p0/{qid}/")
    add("--win_rate", action="append", default=[], metavar="FILE", help="result of tools/win_rate.py; repeat it")
    add("--times", metavar="FILE", help="wall times, {title: seconds}, or the demo's stages.json")
    add("--train_questions", type=int, default=2000, help="at most so many train questions with samples")
    data = cli.add_data_flags(parser)
    data.add_argument("--caption_file", default=cli.CAPTION_DEFAULT, help="captions, {qid: text}")
    add = parser.add_argument_group("output").add_argument
    add("--output", default="report.html", metavar="FILE", help="the page (default: %(default)s)")
    add("--title", default="ARES report", help="heading of the page")
    add("--image_mode", default="copy", choices=MODES, help="copy: images go to {output}_images/ beside the page; "
        "embed: thumbnails inside it (default: %(default)s)")  # fmt: skip
    add("--png", metavar="DIR", help="also write the figures as PNG files")
    args = parser.parse_args(argv)
    args.given = cli.given_flags(parser, argv)
    check_flags(args)
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Refuse all flags that cannot work, in one message."""
    given, replies = args.given, args.run or args.questions_dir
    names = [stages.stage_name(text)[0] for text in args.stage or []]
    twice = next((name for name in names if names.count(name) > 1), None)
    folders = {flag: getattr(args, flag) for flag in ("run", "questions_dir", "correction_dir")}
    faults = [
        (not (args.stage or replies), 'nothing to show: give --stage "NAME=FOLDER", --run or --questions_dir'),
        (args.run and args.questions_dir,
         "--run has a questions folder of its own; give one of --run and --questions_dir"),
        *((folder and not Path(folder).is_dir(), f"--{flag}: {folder} is not a folder")
          for flag, folder in folders.items()),
        ("image_mode" in given and args.image_mode == "none" and args.images,
         "--images has no effect with --image_mode none"),
        (args.train_questions < 0, "--train_questions must be 0 or more"),
        ("train_questions" in given and not (replies or args.correction_dir),
         "--train_questions has no effect without --run, --questions_dir or --correction_dir"),
        (twice, f"--stage: {twice!r} is named twice; give each stage its own name"),
    ]  # fmt: skip
    cli.refuse([message for fault, message in faults if fault])


# -- reading -------------------------------------------------------------------------------------------------


def read_inputs(args: argparse.Namespace, notes: list[str]) -> collect.Inputs:
    """Read everything that the flags name; what is missing goes into `notes`. Raises UserError for what is wrong."""
    problems, splits, captions = read_data(args, notes)
    split_of = {qid: split for split in ("train", "val", "test") for qid in splits.get(split, ())}
    inputs = collect.Inputs([], args.splits, problems, captions, split_of)
    inputs.stages = [stages.read_stage(text, args.splits, splits, problems) for text in args.stage or []]
    run, questions = (Path(folder) if folder else None for folder in (args.run, args.questions_dir))
    if run or questions:
        inputs.rounds = teacher.read_rounds(run, questions)
    if run and not inputs.rounds and not (run / "metrics.jsonl").is_file():
        raise UserError(f"--run: {run} holds neither metrics.jsonl nor questions; name a run of run_mm_cot_rl.py")
    if args.correction_dir:
        inputs.corrections = teacher.read_corrections(Path(args.correction_dir))
    inputs.verdicts = [read_verdicts(Path(path)) for path in args.win_rate]
    if problems is not None:
        asked = {sample.qid for each in inputs.rounds for sample in each.samples}
        unknown = next((qid for qid in asked if qid not in problems), None)
        if unknown is not None:
            raise UserError(f"--run: question {unknown} is not in problems.json; name its --data_root")
        known = teacher.scores_by_text(inputs.rounds)
        stages.score_stages(inputs.stages, problems, known)
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
    result = files.read_json(path, "--win_rate", nan=True)
    result = result if isinstance(result, dict) else {}
    verdicts, systems = result.get("verdicts"), result.get("systems")
    valid = isinstance(verdicts, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(name), str) for name in ("qid", "order", "winner"))
        for one in verdicts
    )
    valid = valid and isinstance(systems, list) and [type(name) for name in systems] == [str, str]
    if not valid or not all(isinstance(result.get(name, {}), dict) for name in ("judge", "summary")):
        raise UserError(f'--win_rate: {path} must hold {{"systems": [A, B], "verdicts": [{{qid, order, winner}}]}}')
    return result


# -- the overview --------------------------------------------------------------------------------------------


def overview(args: argparse.Namespace, inputs: collect.Inputs, metrics: list) -> dict[str, Any]:
    """Figures per stage, rounds, dropped replies, cost and time: what the first tab shows."""
    split = args.splits[0]
    named = [(stage.name, stage.splits.get(split)) for stage in inputs.stages]
    costs = [
        teacher.cost(f"sentence scores, round {each.number}", [sample.about for sample in each.samples], each.folder)
        for each in inputs.rounds
    ]
    if inputs.corrections:
        abouts = [each.about for each in inputs.corrections]
        costs.append(teacher.cost("corrections", abouts, Path(args.correction_dir)))
    return {
        "split": split,
        "figures": [stages.stage_figures(found, inputs.problems) if found else None for _, found in named],
        "changes": stages.changes([one for one in named if one[1]], inputs.problems) if inputs.problems else [],
        "rounds": [line for line in metrics if line["kind"] == "rollout"],
        "curves": [],
        "series": collect.score_series(inputs, split),
        "dropped": collect.dropped_counts(inputs.rounds, inputs.corrections),
        "costs": costs,
        "times": times(args, inputs),
        "judged": [{key: result.get(key) for key in ("protocol", "summary")} for result in inputs.verdicts],
    }


def times(args: argparse.Namespace, inputs: collect.Inputs) -> list[dict[str, Any]]:
    """Wall time: from `--times` if given, else as the trainers recorded it in the stages' folders."""
    if args.times:
        data = files.read_json(args.times, "--times", nan=True)
        data = data.get("stages", data) if isinstance(data, dict) else None
        pairs = data.items() if isinstance(data, dict) else [(None, None)]
        pairs = [(each["title"], each["seconds"]) if isinstance(each, dict) and {"title", "seconds"} <= each.keys()
                 else (name, each) for name, each in pairs]  # fmt: skip
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


def draw(shown: dict[str, Any], curves: Sequence[dict[str, Any]], png: Path | None) -> dict[str, str]:
    """The figures as SVG by name, with `png` also as files there. Adds the names of the curves to the overview."""
    drawings = {}
    figures = [(curve["name"], plots.curve_label(curve), plots.draw_curve(curve)) for curve in curves]
    shown["curves"] = [name for name, _, _ in figures]
    if shown["series"]:
        label = "Sentence scores by position; the table below has the same numbers"
        figures.append(("scores", label, plots.draw_scores(shown["series"])))
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
    qids, hidden = collect.choose_questions(inputs, args.train_questions)
    if hidden:
        notes.append(f"{hidden} training questions with samples or corrections are not shown (--train_questions)")
    for stage in inputs.stages:
        for split in stage.splits.values():
            unread = split.answers.count(stages.UNPARSED)
            notes += filter(None, [unread_note(unread, len(split.answers), f"{stage.name} ({split.file.path.name})")])
    metrics = []
    if args.run:
        file = Path(args.run) / "metrics.jsonl"
        metrics = read_metrics(file, "--run") if file.is_file() else []
        from tools.report_page.tokens import add_tokens

        for each in inputs.rounds:
            reason = add_tokens(Path(args.run), each, set(qids))
            if reason:
                notes.append(f"token rewards of round {each.number} are not available: {reason}")
    shown = overview(args, inputs, metrics)
    drawings = draw(shown, [*plots.curves(metrics), *collect.reward_model_curve(inputs)], png)
    parts = collect.page_data(inputs, qids)
    parts["main"]["overview"] = shown
    parts["main"]["notes"] = notes
    parts["images"] = collect_images(images, qids, args.image_mode, output) if images else {"list": [], "of": {}}
    page = build_page(args.title, parts, drawings)
    files.write_text(output, page)
    for note in notes:
        print0(f"note: {note}")
    print0(f"{output}: {len(qids)} questions, {len(inputs.stages)} stages, {len(page.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
