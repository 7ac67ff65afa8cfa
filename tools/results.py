"""Tables for the paper: stages, runs and seeds side by side, how sure the figures are, and the published ones.

    python tools/results.py --system MM-CoT=models/mm-cot-base-rationale --system ARES=experiments/<run>
    python tools/results.py --system ARES=lora/seed1 --system ARES=lora/seed2 --system ARES=lora/seed3   # averaged
    python tools/results.py --system demo=demo/results/seed0.json --published none
    python tools/results.py --win_rate win_rate/A_vs_B/win_rate.json --format latex --output table.tex

A system is a stage's folder, its predictions file, or a result file of the demo (table.json, demo/results/seed*.json),
which brings a row for each of its stages. With the questions at hand (--data_root) figures of one run carry a 95 %
bootstrap interval, and `--compare A B` tests whether two systems differ. Writes to the terminal or to --output. What
the columns mean: docs/results.md. Leaves out training curves and single questions (tools/report.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares import cli, files
from ares.data_folder import Problems, find_dataset, load_problems, load_splits, split_qids
from ares.intervals import mcnemar, mean_interval, paired_difference, ratio_interval, shares_interval
from ares.predictions import parts_asked, predictions_file, scores_of, split_label, texts_by_qid
from ares.published import ANSWER_COLUMNS, NOTE, PUBLISHED
from ares.sentences import split_text
from ares.tables import FORMATS, Cell, Table
from teacher import reference
from teacher.reference import rationale_stats
from utils_evaluate import CATEGORIES, accuracy_table, question_rouge, resolve_answer

ANSWERS = dict(zip(ANSWER_COLUMNS, "NAT SOC LAN TXT IMG NO G1-6 G7-12 AVG".split(), strict=True)) | {
    "num_fail": "unread"
}
RATIONALES = {"bleu1": "BLEU-1", "bleu4": "BLEU-4", "rouge": "ROUGE-L", "similarity": "similarity",
              "score": "sentence score", "covered": "gold covered %", "repeated": "repeated %",
              "unfinished": "unfinished %", "only_option": "only option %", "words": "words"}  # fmt: skip
WINS = {"win_rate": "win rate %", "win": "win %", "tie": "tie %", "loss": "loss %", "first": "first shown wins %",
        "judge": "judge"}  # fmt: skip
DEMO_NAMES = {"rouge_l": "rouge"}
DIGITS = {"score": 3, "num_fail": 0}


@dataclass
class Run:
    """One file's figures; with `texts` and problems also what is known per question."""

    label: str
    path: str
    answers: dict[str, float] = field(default_factory=dict)
    rationales: dict[str, float] = field(default_factory=dict)
    right: dict[str, bool] = field(default_factory=dict)  # qid -> whether its answer is right
    values: dict[str, dict[str, float]] = field(default_factory=dict)  # rouge, score -> qid -> value
    sentences: list[tuple[float, int]] = field(default_factory=list)  # of each question: sum of the scores, how many


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument(
        "--system", action="append", default=[], metavar="LABEL=PATH", help="repeat it; one label for several seeds"
    )
    parser.add_argument(
        "--win_rate", action="append", default=[], metavar="FILE", help="what tools/win_rate.py wrote; repeat"
    )
    parser.add_argument("--compare", nargs=2, metavar="LABEL", help="test whether these two differ, seed by seed")
    parser.add_argument("--each", action="store_true", help="a row for every file besides the means over seeds")
    parser.add_argument("--format", choices=sorted(FORMATS), default="markdown", help="(default: %(default)s)")
    parser.add_argument(
        "--published", choices=("scienceqa", "aokvqa", "none"), default="scienceqa", help="whose figures stand beside"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--output", metavar="FILE", help="write there instead of to the terminal")
    data = cli.add_data_flags(parser)
    data.add_argument(
        "--split", choices=("test", "val", "train"), default="test", help="which predictions of a folder"
    )
    args = parser.parse_args(argv)
    wrong = [] if args.system or args.win_rate else ["give at least one --system or --win_rate"]
    if args.images:
        wrong.append("--images: the tables hold no images; leave it out")
    args.needs_data = bool(args.compare or cli.given_flags(parser, argv) & {"data_root", "dataset"})
    args.system = [split_label(named) for named in args.system]
    wrong += [f"--compare: no --system is called {label}" for label in args.compare or []
              if label not in {name for name, _ in args.system}]  # fmt: skip
    cli.refuse(wrong)
    return args


# -- reading -------------------------------------------------------------------------------------------------


def find_problems(args: argparse.Namespace, needed: bool) -> tuple[Problems | None, list[str]]:
    """(problems, questions of the split); (None, []) without data, unless --compare, --data_root or --dataset asks."""
    if not Path(args.data_root).is_dir() and not needed:
        return None, []
    try:
        dataset = find_dataset(args.data_root, args.dataset)
    except cli.UserError as error:
        if needed:
            raise
        cli.warn0(f"{error}; without it there are no intervals")  # nobody asked for ./data
        return None, []
    problems = load_problems(args.data_root, dataset)
    return problems, split_qids(load_splits(args.data_root, dataset, problems), args.split, "--split")


def read_system(
    label: str, place: str, args: argparse.Namespace, problems: Problems | None, qids: Sequence[str]
) -> list[Run]:
    """The rows of one --system. Raises UserError if the file is none of the known forms."""
    path = predictions_file(place, f"--system {label}", args.split)
    told = files.read_json(path, f"--system {label}", nan=True)
    if isinstance(told, dict) and isinstance(told.get("rationales"), dict):
        return demo_runs(label, str(path), told)
    if not isinstance(told, dict) or "preds" not in told:
        raise cli.UserError(f"--system {label}: {path} holds neither preds nor a demo's table; name a stage's folder")
    run = Run(label, str(path))
    preds, labels = (told.get(name) or [] for name in ("preds", "labels"))
    for name, column in (("preds", preds), ("labels", labels)):
        if not isinstance(column, list) or not all(isinstance(text, str) for text in column):
            raise cli.UserError(f"--system {label}: {path}: {name} is no list of texts; make the file again")
    has_answers, has_rationales = parts_asked(preds, labels)
    scores = scores_of(told, path, f"--system {label}")
    figures = scores.get("answer", {}) if has_answers else {}
    run.answers = {name.removeprefix("acc_"): value for name, value in figures.items()}
    if run.answers and isinstance(told.get("num_fail"), int):
        run.answers["num_fail"] = float(told["num_fail"])
    run.rationales = scores.get("rationale", {}) if has_rationales else {}
    if problems is not None:
        per_question(run, told, path, problems, qids, has_answers, has_rationales)
    elif run.rationales:
        run.rationales |= shape_of(told["preds"])
    if run.answers.get("num_fail", 0) > 0.05 * len(preds):
        unread = int(run.answers["num_fail"])
        cli.warn0(f"--system {label}: {unread} of {len(preds)} answers of {path} are unread: random choices")
    if not run.answers and not run.rationales:
        raise cli.UserError(f"--system {label}: {path} holds no scores; give its --data_root, by which some are made")
    return [run]


def demo_runs(label: str, path: str, told: Mapping[str, Any]) -> list[Run]:
    """The demo's table: a row for each rationale model, and one for the answers."""
    runs = []
    found = scores_of({"scores": {**told["rationales"], "": told.get("answers", {})}}, path, f"--system {label}")
    answers = {name.removeprefix("acc_"): value for name, value in found.pop("").items()}
    for stage, figures in found.items():
        named = {DEMO_NAMES.get(name, name): value for name, value in figures.items()}
        runs.append(Run(f"{label}: {stage}", path, rationales=named))
    return [*runs, Run(f"{label}: LoRA", path, answers=answers)] if answers else runs


def shape_of(texts: Sequence[str]) -> dict[str, float]:
    stats = rationale_stats(texts)
    words = statistics.fmean(len(text.split()) for text in texts) if texts else 0.0  # as in the report and the demo
    return {"repeated": 100 * stats["repeated"], "unfinished": 100 * stats["unfinished"], "words": words}


def per_question(
    run: Run,
    told: Mapping[str, Any],
    path: Path,
    problems: Problems,
    qids: Sequence[str],
    answers: bool,
    rationales: bool,
) -> None:
    """Fill in what intervals and tests need: right answers, ROUGE-L and the reference Teacher's score by question."""
    texts = texts_by_qid(told, path, f"--system {run.label}", qids)
    unknown = next((qid for qid in texts if qid not in problems), None)
    if unknown is not None:
        raise cli.UserError(f"--system {run.label}: {path} holds question {unknown}, which --data_root does not know")
    seed = (told.get("settings") or {}).get("seed", 42)
    if answers:
        chosen = {qid: resolve_answer(text, len(problems[qid]["choices"]), qid, seed) for qid, text in texts.items()}
        run.right = {qid: choice == problems[qid]["answer"] for qid, (choice, _) in chosen.items()}
        table = accuracy_table({qid: choice for qid, (choice, _) in chosen.items()}, problems)
        run.answers = {name.removeprefix("acc_"): float(value) for name, value in table.items()} | run.answers
        run.answers.setdefault("num_fail", float(sum(not read for _, read in chosen.values())))
    if rationales:
        labels = told.get("labels")
        golds = dict(zip(texts, labels, strict=True)) if _are_texts(labels) and len(labels) == len(texts) else {}
        rouges = {qid: question_rouge(golds[qid], text) for qid, text in texts.items() if qid in golds}
        run.values["rouge"] = {qid: 100 * value for qid, value in rouges.items() if value is not None}
        scores = {qid: reference.score_sentences(problems[qid], split_text(text)) for qid, text in texts.items()}
        run.values["score"] = {qid: statistics.fmean(each) for qid, each in scores.items() if each}
        run.sentences = [(sum(each), len(each)) for each in scores.values()]
        run.rationales |= shape_of(list(texts.values()))
        if run.values["rouge"]:
            run.rationales.setdefault("rouge", statistics.fmean(run.values["rouge"].values()))
        every = [score for each in scores.values() for score in each]
        run.rationales.setdefault("score", statistics.fmean(every) if every else 0.0)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


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
    if name in CATEGORIES and run.right and problems is not None:
        right = [value for qid, value in run.right.items() if CATEGORIES[name](problems[qid])]
        # the file's own share: the released code's guesses at unread answers are not those made here
        count = round(run.answers[name] / 100 * len(right))
        return around(run.answers[name], shares_interval([count, len(right) - count], (100, 0), seed))
    if name == "score" and run.sentences:  # a mean over sentences, as the table's
        return around(run.rationales[name], ratio_interval(run.sentences, seed))
    if name in run.values and run.values[name]:
        return around(run.rationales[name], mean_interval(list(run.values[name].values()), seed))
    return ()


def around(point: float, interval: tuple[float, float]) -> tuple[float, float] | tuple[()]:
    """`interval`, or () where it is not that of `point` (a figure of a file whose texts were changed since).

    Figures of files are rounded to two decimals.
    """
    low, high = interval
    return (min(low, point), max(high, point)) if low - 0.006 <= point <= high + 0.006 else ()


def system_tables(args: argparse.Namespace, runs: Sequence[Run], problems: Problems | None) -> list[Table]:
    tables = [Table("Answers, accuracy %", ANSWERS | {"source": "source"}, digits=DIGITS),
              Table("Rationales", RATIONALES | {"source": "source"}, digits=DIGITS)]  # fmt: skip
    for table, kind in zip(tables, ("answers", "rationales"), strict=True):
        for label in dict.fromkeys(run.label for run in runs):
            mine = [run for run in runs if run.label == label and getattr(run, kind)]
            if mine:
                many = f" ({len(mine)} seeds)" if len(mine) > 1 else ""
                table.rows.append((label + many, cells_of(mine, kind, problems, args.seed)))
            if args.each and len(mine) > 1:
                rows = [
                    (f"{label} ({Path(run.path).stem})", cells_of([run], kind, problems, args.seed)) for run in mine
                ]
                table.rows.extend(rows)
    return tables


def win_table(paths: Sequence[str]) -> Table:
    table = Table("Win rates of the first system's rationales", WINS | {"source": "source"})
    for path in paths:
        told = files.read_json(path, "--win_rate")
        try:
            row, judge = told["summary"]["rows"]["average"], told["judge"]
            cells: dict[str, Cell | str] = {name: Cell(float(row[name])) for name in ("win", "tie", "loss")}
            low, high = map(float, row["win_rate_interval"])
            cells["win_rate"] = Cell(float(row["win_rate"]), low, high)
            if told["summary"]["position"]["first"] is not None:
                cells["first"] = Cell(float(told["summary"]["position"]["first"]))
            orders = {"both": "both orders", "paper": "one random order a pair"}[told["protocol"]]
            cells["judge"] = f"{judge['model']}, {orders}, {row['questions']} questions"
            table.rows.append((" against ".join(told["systems"]), cells))
        except (KeyError, TypeError, ValueError):
            raise cli.UserError(
                f"--win_rate: {path} is not what tools/win_rate.py writes; name its win_rate.json"
            ) from None
    return table


def add_published(args: argparse.Namespace, tables: Mapping[str, Table]) -> None:
    for entry in PUBLISHED:
        if entry.dataset == args.published and tables[entry.kind].rows:
            cells: dict[str, Cell | str] = {name: Cell(value) for name, value in entry.figures.items()}
            tables[entry.kind].rows.append((entry.label, cells | {"source": f"{entry.source}; {entry.differs}"}))


def significance(args: argparse.Namespace, runs: Sequence[Run]) -> Table:
    """Pairs of files of the two labels, in the order given: McNemar for answers, paired bootstrap for the rest."""
    first, second = ([run for run in runs if run.label == label] for label in args.compare)
    if len(first) != len(second):
        cli.warn0(
            f"--compare: {len(first)} and {len(second)} files; compared are the first {min(len(first), len(second))}"
        )
    columns = {"difference": "difference", "p": "p", "test": "test", "questions": "questions"}
    digits = {"difference": 3, "p": 4, "questions": 0}  # a sentence score lies between 0 and 1
    table = Table(f"{args.compare[0]} minus {args.compare[1]}", columns, digits=digits)
    for number, (a, b) in enumerate(zip(first, second, strict=False), start=1):
        pair = f" (pair {number})" if min(len(first), len(second)) > 1 else ""
        both = [qid for qid in a.right if qid in b.right]
        if both:
            ours = sum(a.right[qid] and not b.right[qid] for qid in both)
            theirs = sum(b.right[qid] and not a.right[qid] for qid in both)
            table.rows.append((f"answers{pair}", {
                "difference": Cell(100 * (ours - theirs) / len(both)), "p": Cell(mcnemar(ours, theirs)),
                "test": f"McNemar, exact: {ours} and {theirs} answered by one alone", "questions": Cell(len(both)),
            }))  # fmt: skip
        for name in sorted(a.values.keys() & b.values.keys()):
            both = [qid for qid in a.values[name] if qid in b.values[name]]
            if both:
                found = paired_difference(
                    [a.values[name][q] for q in both], [b.values[name][q] for q in both], args.seed
                )
                table.rows.append((f"{RATIONALES[name]}{pair}", {
                    "difference": Cell(found["difference"], found["low"], found["high"]), "p": Cell(found["p"]),
                    "test": "paired bootstrap", "questions": Cell(len(both)),
                }))  # fmt: skip
    if not table.rows:
        raise cli.UserError(f"--compare: {' and '.join(args.compare)} have no question in common, or are tables only")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    problems, qids = find_problems(args, needed=args.needs_data)
    runs = [run for label, place in args.system for run in read_system(label, place, args, problems, qids)]
    answers, rationales = system_tables(args, runs, problems)
    wins = win_table(args.win_rate)
    if args.published != "none":
        add_published(args, {"answers": answers, "rationales": rationales, "win rates": wins})
    tables = [table for table in (answers, rationales, wins) if table.rows]
    if args.compare:
        tables.append(significance(args, runs))
    notes = ["± is the deviation over seeds (n - 1); [low, high] a 95 % bootstrap interval over questions."]
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
