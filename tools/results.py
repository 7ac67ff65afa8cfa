"""Tables for the paper: stages, runs and seeds side by side, with intervals, tests and the published figures.

    python tools/results.py --system MM-CoT=models/mm-cot-base-rationale --system ARES=experiments/<run>
    python tools/results.py --system ARES=lora/seed1 --system ARES=lora/seed2 --system ARES=lora/seed3   # averaged
    python tools/results.py --system demo=demo/results/seed0.json --published none
    python tools/results.py --win_rate win_rate/A_vs_B/win_rate.json --format latex --output table.tex

A system is a stage's folder, its predictions file, or the table.json of a run (demo/results/seed*.json), which gives a
row for each of its stages. With the questions (--data_root) figures of one run get a 95 % bootstrap
interval, and `--compare A B` tests whether two systems differ. Writes to the terminal or to --output. The columns are
described in docs/results.md; curves and single questions are shown by tools/report.py.
"""

from __future__ import annotations

import argparse
import operator
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares import cli, files
from ares.data_folder import Problems, find_dataset, read_data_folder
from ares.intervals import mcnemar, mean_interval, paired_difference, ratio_interval, shares_interval
from ares.predictions import Predictions, find_predictions, labelled, read_predictions, scores_of, unread_note
from ares.published import ANSWER_COLUMNS, NOTE, PUBLISHED
from ares.tables import FORMATS, Cell, Table
from teacher.figures import rationale_stats, reference_scores
from utils_evaluate import CATEGORIES, accuracy_table, question_rouge, resolve_answer

ANSWERS = dict(zip(ANSWER_COLUMNS, "NAT SOC LAN TXT IMG NO G1-6 G7-12 AVG".split(), strict=True))
ANSWERS["num_fail"] = "unread"
RATIONALES = {"bleu1": "BLEU-1", "bleu4": "BLEU-4", "rouge": "ROUGE-L", "similarity": "similarity",
              "score": "sentence score", "covered": "gold covered %", "repeated": "repeated %",
              "unfinished": "unfinished %", "only_option": "only option %", "words": "words",
              "concludes": "right conclusion %", "no_conclusion": "no conclusion %"}  # fmt: skip
WINS = {"win_rate": "win rate %", "win": "win %", "tie": "tie %", "loss": "loss %", "first": "first shown wins %",
        "judge": "judge"}  # fmt: skip
DIGITS = {"score": 3, "num_fail": 0}


@dataclass
class Run:
    """Figures of one file; with the problems also the values of each question.

    values: "answers" (1.0 right, 0.0 wrong), "rouge" and "score" -> qid -> value; texts: its rationales to be scored.
    """

    label: str
    path: str
    rows: int = 0
    answers: dict[str, float] = field(default_factory=dict)
    rationales: dict[str, float] = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    sentences: list[tuple[float, int]] = field(default_factory=list)  # per question: sum of its scores, their number


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("--system", action="append", default=[], metavar="LABEL=PATH", help="repeat it; one label for several seeds")
    add("--win_rate", action="append", default=[], metavar="FILE", help="what tools/win_rate.py wrote; repeat it")
    add("--compare", nargs=2, metavar="LABEL", help="test whether these two differ, seed by seed")
    add("--each", action="store_true", help="a row for every file besides the means over seeds")
    add("--format", choices=sorted(FORMATS), default="markdown", help="(default: %(default)s)")
    add("--published", choices=("scienceqa", "aokvqa", "none"), default="scienceqa", help="whose figures stand beside")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--output", metavar="FILE", help="write there instead of to the terminal")
    data = cli.add_data_flags(parser)
    data.add_argument("--split", choices=("test", "val", "train"), default="test", help="predictions of a folder")
    args = parser.parse_args(argv)
    wrong = [] if args.system or args.win_rate else ["give at least one --system or --win_rate"]
    if args.images:
        wrong.append("--images: the tables hold no images; drop it")
    args.needs_data = bool(args.compare or cli.given_flags(parser, argv) & {"data_root", "dataset"})
    args.system = [labelled(text) for text in args.system]
    wrong += [f"--compare: no --system is called {label}" for label in args.compare or []
              if label not in {name for name, _ in args.system}]  # fmt: skip
    cli.refuse(wrong)
    return args


# -- reading -------------------------------------------------------------------------------------------------


def find_problems(args: argparse.Namespace) -> tuple[Problems | None, list[str]]:
    """(problems, questions of the split); (None, []) without data, unless --compare, --data_root or --dataset asks."""
    try:
        dataset = find_dataset(args.data_root, args.dataset)
    except cli.UserError as error:
        if args.needs_data:
            raise
        if Path(args.data_root).is_dir():
            cli.warn0(f"{error}; without it there are no intervals")  # nobody asked for ./data
        return None, []
    data = read_data_folder(args.data_root, dataset)
    return data.problems, data.split(args.split, "--split")


def read_system(
    label: str, place: str, args: argparse.Namespace, problems: Problems | None, qids: Sequence[str]
) -> list[Run]:
    """The rows of one --system. Raises UserError if the file has none of the known forms."""
    flag = f"--system {label}"
    path = find_predictions(place, flag, args.split)
    data = files.read_json(path, flag, nan=True)
    if isinstance(data, dict) and isinstance(data.get("rationales"), dict):
        return table_runs(label, str(path), data)
    if not isinstance(data, dict) or "preds" not in data:
        raise cli.UserError(f"{flag}: {path} holds neither preds nor a run's table; name a stage's folder")
    file = read_predictions(path, flag, None if problems is None else qids, data=data)
    has_answers, has_rationales = file.parts_asked()
    run = Run(label, str(path), len(file.preds))
    if has_answers:
        run.answers = {name.removeprefix("acc_"): value for name, value in file.scores.get("answer", {}).items()}
        if run.answers and file.num_fail is not None:
            run.answers["num_fail"] = float(file.num_fail)
    run.rationales = file.scores.get("rationale", {}) if has_rationales else {}
    if problems is not None:
        file.refuse_unknown(problems, flag, "in problems.json; name the --data_root of these predictions")
        if has_answers:
            add_answers(run, file, problems)
        if has_rationales:
            add_rationales(run, file)
    elif run.rationales:
        run.rationales |= shape_of(file.preds)
    if not run.answers and not run.rationales:
        raise cli.UserError(f"{flag}: {path} holds no scores; give its --data_root, by which some are made")
    return [run]


def table_runs(label: str, path: str, data: Mapping[str, Any]) -> list[Run]:
    """The rows of a run's closing table: one for each rationale model, one for each adapter."""
    runs = []
    for kind, part in (("rationales", "rationales"), ("answers", "adapters")):
        for stage, figures in scores_of(data.get(part, {}), path, f"--system {label}").items():
            named = {name.removeprefix("acc_"): value for name, value in figures.items() if name != "accuracy"}
            rows = len((data.get("by_question") or {}).get(stage, {}).get("qids", ()))
            runs.append(Run(f"{label}: {stage}", path, rows, **{kind: named}))
    return runs


def shape_of(texts: Sequence[str]) -> dict[str, float]:
    """Shares of repeated sentences and unfinished rationales in per cent, and words per rationale."""
    stats = rationale_stats(texts)
    words = statistics.fmean(len(text.split()) for text in texts) if texts else 0.0  # as in the report and the demo
    return {"repeated": 100 * stats["repeated"], "unfinished": 100 * stats["unfinished"], "words": words}


def add_answers(run: Run, file: Predictions, problems: Problems) -> None:
    """Which questions are answered correctly, and the accuracies that the file does not have."""
    chosen = {qid: resolve_answer(text, len(problems[qid]["choices"]), qid, file.seed)
              for qid, text in file.by_qid().items()}  # fmt: skip
    run.values["answers"] = {qid: float(choice == problems[qid]["answer"]) for qid, (choice, _) in chosen.items()}
    table = accuracy_table({qid: choice for qid, (choice, _) in chosen.items()}, problems)
    run.answers = {name.removeprefix("acc_"): float(value) for name, value in table.items()} | run.answers
    run.answers.setdefault("num_fail", float(sum(not read for _, read in chosen.values())))


def add_rationales(run: Run, file: Predictions) -> None:
    """ROUGE-L of each question, and the means that the file does not have."""
    run.texts = texts = file.by_qid()
    golds = dict(zip(texts, file.labels, strict=True)) if any(file.labels) else {}
    rouges = {qid: question_rouge(gold, texts[qid]) for qid, gold in golds.items()}
    run.values["rouge"] = {qid: 100 * value for qid, value in rouges.items() if value is not None}
    run.rationales |= shape_of(file.preds)
    if run.values["rouge"]:
        run.rationales.setdefault("rouge", statistics.fmean(run.values["rouge"].values()))


def add_scores(runs: Sequence[Run], problems: Problems) -> None:
    """The reference Teacher's score of each question of all runs."""
    rows = [(qid, text) for run in runs for qid, text in run.texts.items()]
    found = iter(reference_scores(problems, [qid for qid, _ in rows], [text for _, text in rows]))
    for run in (run for run in runs if run.texts):
        scores = dict(zip(run.texts, islice(found, len(run.texts)), strict=True))
        run.values["score"] = {qid: statistics.fmean(each) for qid, each in scores.items() if each}
        run.sentences = [(sum(each), len(each)) for each in scores.values()]
        every = [score for each in scores.values() for score in each]
        run.rationales.setdefault("score", statistics.fmean(every) if every else 0.0)


# -- tables --------------------------------------------------------------------------------------------------


def cells_of(runs: Sequence[Run], kind: str, problems: Problems | None, seed: int) -> dict[str, Cell]:
    """Column -> figure: of several runs mean and deviation, of one its interval where it can be had."""
    figures = [getattr(run, kind) for run in runs]
    cells = {}
    for name in {name: None for figure in figures for name in figure}:
        found = [figure[name] for figure in figures if name in figure]
        if len(found) > 1:
            cells[name] = Cell(statistics.fmean(found), deviation=statistics.stdev(found), seeds=len(found))
        else:
            (run,) = (run for run in runs if name in getattr(run, kind))
            cells[name] = Cell(found[0], *interval_of(run, name, problems, seed))
    return cells


def interval_of(run: Run, name: str, problems: Problems | None, seed: int) -> tuple[float, float] | tuple[()]:
    """The 95 % interval of one figure, () where the values of its questions are not known."""
    if name in CATEGORIES and run.values.get("answers") and problems is not None:
        rows = sum(CATEGORIES[name](problems[qid]) for qid in run.values["answers"])
        # the file's own share: the released code draws other choices for unread answers than this project
        point = run.answers[name]
        count = round(point / 100 * rows)
        interval = shares_interval([count, rows - count], (100, 0), seed)
    elif name == "score" and run.sentences:  # a mean over sentences, as the table's
        point, interval = run.rationales[name], ratio_interval(run.sentences, seed)
    elif run.values.get(name):
        point, interval = run.rationales[name], mean_interval(list(run.values[name].values()), seed)
    else:
        return ()
    # figures of files are rounded to two decimals; one further off is not that of these texts
    low, high = interval
    return (min(low, point), max(high, point)) if low - 0.006 <= point <= high + 0.006 else ()


def system_tables(args: argparse.Namespace, runs: Sequence[Run], problems: Problems | None) -> list[Table]:
    tables = [Table("Answers, accuracy %", ANSWERS | {"source": "source"}, digits=DIGITS),
              Table("Rationales", RATIONALES | {"source": "source"}, digits=DIGITS)]  # fmt: skip
    for table, kind in zip(tables, ("answers", "rationales"), strict=True):
        for label in dict.fromkeys(run.label for run in runs):
            mine = [run for run in runs if run.label == label and getattr(run, kind)]
            if mine:
                named = [(label + f" ({len(mine)} seeds)" * (len(mine) > 1), mine)]
                if args.each and len(mine) > 1:
                    named += [(f"{label} ({Path(run.path).stem})", [run]) for run in mine]
                table.rows += [(name, cells_of(some, kind, problems, args.seed)) for name, some in named]
    return tables


def win_table(paths: Sequence[str]) -> Table:
    table = Table("Win rates of the first system's rationales", WINS | {"source": "source"})
    for path in paths:
        result = files.read_json(path, "--win_rate", nan=True)
        try:
            summary, judge = result["summary"], result["judge"]
            row, first = summary["rows"]["average"], summary["position"]["first"]
            cells: dict[str, Cell | str] = {name: Cell(float(row[name])) for name in ("win", "tie", "loss")}
            low, high = map(float, row["win_rate_interval"])
            cells["win_rate"] = Cell(float(row["win_rate"]), low, high)
            if first is not None:
                cells["first"] = Cell(float(first))
            orders = {"both": "both orders", "paper": "one random order a pair"}[result["protocol"]]
            cells["judge"] = f"{judge['model']}, {orders}, {row['questions']} questions"
            table.rows.append((" against ".join(result["systems"]), cells))
        except (KeyError, TypeError, ValueError):
            fault = f"--win_rate: {path} is not what tools/win_rate.py writes; name its win_rate.json"
            raise cli.UserError(fault) from None
    return table


def add_published(args: argparse.Namespace, tables: Mapping[str, Table]) -> None:
    for entry in PUBLISHED:
        if entry.dataset == args.published and tables[entry.kind].rows:
            cells: dict[str, Cell | str] = {name: Cell(value) for name, value in entry.figures.items()}
            tables[entry.kind].rows.append((entry.label, cells | {"source": f"{entry.source}; {entry.differs}"}))


def significance(args: argparse.Namespace, runs: Sequence[Run]) -> Table:
    """Files of the two labels in pairs, in the order given: McNemar for answers, paired bootstrap for the rest."""
    systems = [[run for run in runs if run.label == label] for label in args.compare]
    columns = {"difference": "difference", "p": "p", "test": "test", "questions": "questions"}
    digits = {"difference": 3, "p": 4, "questions": 0}  # a sentence score is between 0 and 1
    table = Table(f"{args.compare[0]} minus {args.compare[1]}", columns, digits=digits)
    for name in ("answers", "rouge", "score"):
        first, second = ([run for run in system if run.values.get(name)] for system in systems)
        pairs = list(zip(first, second, strict=False))
        if pairs and len(first) != len(second):
            cli.warn0(f"--compare: {len(first)} and {len(second)} files; only the first {len(pairs)} are compared")
        for number, (a, b) in enumerate(pairs, start=1):
            both = [qid for qid in a.values[name] if qid in b.values[name]]
            if not both:
                fault = f"{a.path} and {b.path} have no question in common; name predictions of one split"
                raise cli.UserError(f"--compare: {fault}")
            ours, theirs = ([run.values[name][qid] for qid in both] for run in (a, b))
            if name == "answers":
                only = [sum(map(operator.gt, *pair)) for pair in ((ours, theirs), (theirs, ours))]
                difference, p = Cell(100 * (only[0] - only[1]) / len(both)), mcnemar(*only)
                test = f"McNemar, exact: {only[0]} and {only[1]} answered by one alone"
            else:
                found = paired_difference(ours, theirs, args.seed)
                difference, p = Cell(found["difference"], found["low"], found["high"]), found["p"]
                test = "paired bootstrap"
            cells = {"difference": difference, "p": Cell(p), "test": test, "questions": Cell(len(both))}
            table.rows.append((RATIONALES.get(name, name) + f" (pair {number})" * (len(pairs) > 1), cells))
    if not table.rows:
        held = " and ".join(f"{label} {what_it_holds(system)}"
                            for label, system in zip(args.compare, systems, strict=True))  # fmt: skip
        raise cli.UserError(f"--compare: {held}; name predictions of the same kind (two stages' folders or files)")
    return table


def what_it_holds(system: Sequence[Run]) -> str:
    """What there is to compare in the files of one label."""
    kinds = [kind for kind, names in {"answers": ["answers"], "rationales": ["rouge", "score"]}.items()
             if any(run.values.get(name) for run in system for name in names)]  # fmt: skip
    return f"holds {' and '.join(kinds)}" if kinds else "holds no texts of single questions"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    problems, qids = find_problems(args)
    runs = [run for label, place in args.system for run in read_system(label, place, args, problems, qids)]
    if problems is not None:
        add_scores(runs, problems)
    answers, rationales = system_tables(args, runs, problems)
    wins = win_table(args.win_rate)
    if args.published != "none":
        add_published(args, {"answers": answers, "rationales": rationales, "win rates": wins})
    tables = [table for table in (answers, rationales, wins) if table.rows]
    if args.compare:
        tables.append(significance(args, runs))
    notes = ["± is the deviation over seeds (n - 1); [low, high] a 95 % bootstrap interval over questions."]
    for run in runs:
        note = run.rows and unread_note(run.answers.get("num_fail", 0), run.rows, f"{run.label} ({run.path})")
        if note:
            cli.warn0(note)
            notes.append(f"Warning: {note}.")
    if args.published != "none":
        notes.append(NOTE)
    text = FORMATS[args.format](tables, notes)
    if args.output:
        files.write_text(args.output, text)
        cli.print0(args.output)
    else:
        cli.print0(text, end="")


if __name__ == "__main__":
    cli.run(main)
