"""The closing table of a run: rationales, win rates and answers of the starting model, after RL and after SFT.

    python tools/compare.py --system start=models/start --system RL=rl/0 --system SFT=sft \\
        --system "start, QCMG-A=lora/start" --system "SFT, QCMG-A=lora/sft" --data_root data --output runs/base
    python tools/compare.py --runs runs/base/seed0 runs/base/seed1 --output runs/base       # pooled over seeds

A system is a rationale model's folder, or, called "LABEL, FORM", that of the adapter that answers on LABEL's model;
the first one is the baseline of all differences. Writes table.json (with the values of every question, for pooling),
table.md and table.tex. Differences are paired by question, with 95 % bootstrap intervals; with several seeds the
questions of all seeds are resampled together, a question that several seeds share as one, with its mean. Sentence
scores are those of the offline reference Teacher.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares import cli, files
from ares.data_folder import read_data_folder
from ares.intervals import difference_text, paired_difference
from ares.predictions import find_predictions, labelled, read_predictions, unread_note
from ares.published import NOTE, PUBLISHED
from ares.tables import FORMATS, Cell, Table
from teacher.figures import figures_by_question, rationale_figures, reference_scores
from utils_evaluate import resolve_answer

COLUMNS = {"score": "sentence score", "concludes": "right conclusion %", "covered": "gold covered %",
           "no_conclusion": "no conclusion %", "unfinished": "unfinished %", "repeated": "repeated %",
           "words": "words", "rouge": "ROUGE-L", "similarity": "similarity"}  # fmt: skip
PAIRED = ("score", "concludes", "covered")  # figures of single questions
DIGITS = {"score": 3, "concludes": 1, "covered": 1, "no_conclusion": 1, "unfinished": 1, "repeated": 1, "words": 1,
          "accuracy": 1, "p": 4}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("--system", action="append", default=[], metavar="LABEL=PATH", help="repeat it; the first is the baseline")
    add("--win_rate", action="append", default=[], metavar="FILE", help="what tools/win_rate.py wrote; repeat it")
    add("--runs", nargs="+", metavar="DIR", help="folders with a table.json each, to be pooled")
    add("--published", choices=("scienceqa", "aokvqa", "none"), default="none", help="whose figures stand below")
    add("--output", required=True, metavar="DIR", help="where table.json, table.md and table.tex go")
    cli.add_data_flags(parser)
    args = parser.parse_args(argv)
    args.system = [labelled(text) for text in args.system]
    labels = [label for label, _ in args.system]
    cli.refuse([
        *["give --system (one run) or --runs (several)"] * (bool(args.system) == bool(args.runs)),
        *(f"--system {label}: given twice" for label in sorted({one for one in labels if labels.count(one) > 1})),
        *(f"--system {label}: one comma and a blank stand before an adapter's form (RL, QCMG-A), else no comma"
          for label in labels if label.count(",") not in (0, label.count(", ")) or label.count(",") > 1),
    ])  # fmt: skip
    return args


# -- one run ---------------------------------------------------------------------------------------------


def read_run(args: argparse.Namespace) -> dict[str, Any]:
    """Figures and values by question of every system, as table.json holds them. Raises UserError."""
    data = read_data_folder(args.data_root, args.dataset)
    problems, rationales, answers, each = data.problems, {}, {}, {}
    for label, place in args.system:
        flag = f"--system {label}"
        found = read_predictions(find_predictions(place, flag, "test"), flag)
        found.refuse_unknown(problems, flag, "in problems.json; name the --data_root of these predictions")
        if "," not in label:
            scores = reference_scores(problems, found.qids, found.preds)
            made = found.scores.get("rationale", {})
            rationales[label] = {**rationale_figures(problems, found.qids, found.preds, scores), **made}
            each[label] = {"qids": found.qids, **figures_by_question(problems, found.qids, found.preds, scores)}
            continue
        rows = [(problems[qid], qid, text) for qid, text in zip(found.qids, found.preds, strict=True)]
        right = [100.0 * (resolve_answer(text, len(problem["choices"]), qid, found.seed)[0] == problem["answer"])
                 for problem, qid, text in rows]  # fmt: skip
        each[label] = {"qids": found.qids, "right": right}
        answers[label] = {"num_fail": found.num_fail, **found.scores["answer"], "accuracy": mean(right)}
        if note := unread_note(found.num_fail or 0, len(found.preds), label):
            cli.warn0(note)
    wins = {}
    for path in args.win_rate:
        result = files.read_json(path, "--win_rate", dict, nan=True)
        try:
            summary, judge = result["summary"], {"judge": result["judge"]["model"]}
            wins[" against ".join(result["systems"])] = {**summary["rows"]["average"], **summary["position"], **judge}
        except (KeyError, TypeError):
            fault = f"--win_rate: {path} is not what tools/win_rate.py writes; name its win_rate.json"
            raise cli.UserError(fault) from None
    qids = sorted({qid for one in each.values() for qid in one["qids"]})
    texts = json.dumps([[qid, problems[qid]["question"], problems[qid]["choices"]] for qid in qids])
    found = {"rationales": rationales, "adapters": answers, "win_rates": wins, "by_question": each}
    return {"dataset": data.dataset, "questions": hashlib.sha256(texts.encode()).hexdigest()[:16], **found}


def read_runs(folders: Sequence[str]) -> list[dict[str, Any]]:
    """table.json of every run. Raises UserError for one that is absent, pooled or of other systems."""
    runs = []
    for folder in folders:
        path = Path(folder) / "table.json"
        runs.append(files.read_json(path, "--runs", dict, nan=True))
        if not {"rationales", "adapters", "win_rates", "by_question"} <= runs[-1].keys():
            raise cli.UserError(f"--runs: {path} is no table of one run; name the folder of every seed")
    if len({(tuple(run["rationales"]), tuple(run["adapters"])) for run in runs}) > 1:
        raise cli.UserError("--runs: these runs have other systems; pool runs of one configuration")
    return runs


# -- tables of one run or several ------------------------------------------------------------------------


def cell(values: Sequence[float]) -> Cell:
    """The mean over runs, with its deviation where there are several."""
    return Cell(mean(values), deviation=stdev(values) if len(values) > 1 else None, seeds=len(values))


def paired(runs: Sequence[Mapping], ours: tuple[str, str], theirs: tuple[str, str]) -> tuple[list[float], list[float]]:
    """Values of two (label, figure) on their common questions, of all runs one after the other. Runs on the same
    questions count once, with their mean: what is hard about a question is so for each of them. Raises UserError."""
    found: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for number, run in enumerate(runs):
        first, second = (dict(zip(run["by_question"][label]["qids"], run["by_question"][label][figure], strict=True))
                         for label, figure in (ours, theirs))  # fmt: skip
        for qid in (qid for qid in first if qid in second):
            found[run.get("questions", number), qid].append((first[qid], second[qid]))
    if not found:
        raise cli.UserError(f"--system: {ours[0]} and {theirs[0]} have no question in common; name the same split")
    pairs = [[mean(side) for side in zip(*each, strict=True)] for each in found.values()]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def differences(runs: Sequence[Mapping]) -> dict[str, dict[str, dict[str, Any]]]:
    """ "RL - start" -> figure -> paired difference, interval, p, and the same as text."""
    names = list(runs[0]["rationales"])
    changes: dict[str, dict[str, dict[str, Any]]] = {}
    pairs = [*zip(names[1:], names, strict=False), *((name, names[0]) for name in names[2:])]
    for ours, theirs in pairs:
        row = changes[f"{ours} - {theirs}"] = {}
        for figure in PAIRED:
            row[figure] = compared(*paired(runs, (ours, figure), (theirs, figure)), DIGITS[figure])
    return changes


def compared(ours: Sequence[float], theirs: Sequence[float], digits: int = 1) -> dict[str, Any]:
    return {**paired_difference(ours, theirs), "text": difference_text(ours, theirs, digits)}


def answer_differences(runs: Sequence[Mapping]) -> dict[str, dict[str, dict[str, Any]]]:
    """Adapter -> "start": against the baseline's adapter of the same form; "rationale": against the conclusions of
    the rationales of its own model."""
    first, found = next(iter(runs[0]["rationales"]), None), {}
    for label in runs[0]["adapters"]:
        model, form = label.split(", ")
        found[label] = {}
        if model != first and f"{first}, {form}" in runs[0]["adapters"]:
            found[label]["start"] = compared(*paired(runs, (label, "right"), (f"{first}, {form}", "right")))
        if model in runs[0]["rationales"]:
            found[label]["rationale"] = compared(*paired(runs, (label, "right"), (model, "concludes")))
    return found


def tables_of(runs: Sequence[Mapping], published: str) -> list[Table]:
    many = f", mean ± deviation over {len(runs)} seeds" * (len(runs) > 1)
    rationales = Table(f"Rationales of the test questions{many}", COLUMNS, digits=DIGITS)
    for label in runs[0]["rationales"]:
        rows = [run["rationales"][label] for run in runs]
        known = [key for key in COLUMNS if all(row.get(key) is not None for row in rows)]
        rationales.rows.append((label, {key: cell([row[key] for row in rows]) for key in known}))
    changes = Table("Paired differences, 95 % intervals", {key: COLUMNS[key] for key in PAIRED})
    for name, row in differences(runs).items():
        changes.rows.append((name, {figure: found["text"] for figure, found in row.items()}))
    columns = {"accuracy": "accuracy %", "start": "against the baseline's adapter", "p": "p",
               "rationale": "against the conclusions of its rationales"}  # fmt: skip
    answers = Table(f"Answers of the adapters{many}", columns, digits=DIGITS)
    for label, found in answer_differences(runs).items():
        cells: dict[str, Any] = {"accuracy": cell([run["adapters"][label]["accuracy"] for run in runs])}
        cells |= {name: found[name]["text"] for name in found}
        cells |= {"p": Cell(found["start"]["p"])} if "start" in found else {}
        answers.rows.append((label, cells))
    heads = {"win_rate": "win rate %", "tie": "tie %", "first": "first shown wins %", "judge": "judge"}
    wins = Table(f"Win rates{many}", heads, digits={"win_rate": 1, "tie": 1, "first": 1})
    for label in runs[0]["win_rates"]:
        rows = [run["win_rates"][label] for run in runs if label in run["win_rates"]]
        cells = {key: cell([row[key] for row in rows]) for key in ("win_rate", "tie", "first")
                 if all(row.get(key) is not None for row in rows)}  # fmt: skip
        if len(rows) == 1:
            cells["win_rate"] = Cell(rows[0]["win_rate"], *rows[0]["win_rate_interval"])
        wins.rows.append((label, {**cells, "judge": rows[0]["judge"]}))
    known = Table("Published", {"figure": "figure", "source": "source"})
    for entry in PUBLISHED:
        if entry.dataset == published:
            value = entry.figures.get("average", next(iter(entry.figures.values())))
            known.rows.append((f"{entry.label}, {entry.kind}", {"figure": Cell(value), "source": entry.source}))
    return [table for table in (rationales, changes, answers, wins, known) if table.rows]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    output = files.writable_dir(args.output, "--output")
    if args.runs:
        runs = read_runs(args.runs)
        files.write_json(output / "table.json", {"runs": args.runs, **_summary(runs)}, indent=1)
    else:
        runs = [read_run(args)]
        files.write_json(output / "table.json", {**runs[0], **_summary(runs)}, indent=None)
    tables = tables_of(runs, args.published)
    notes = ['[low, high]: 95 % bootstrap interval over questions; "not distinguishable": it holds 0.']
    notes += [NOTE] * (args.published != "none")
    for form, name in (("markdown", "table.md"), ("latex", "table.tex")):
        files.write_text(output / name, FORMATS[form](tables, notes))
    cli.print0(files.read_text(output / "table.md", "--output"), end="")


def _summary(runs: Sequence[Mapping]) -> dict[str, Any]:
    return {"changes": differences(runs), "answer_changes": answer_differences(runs)}


if __name__ == "__main__":
    cli.run(main)
