"""Whether a questions folder was made from the data that it is read with: question ids are often 1, 2, 3 ...

Two things say so: `exported_questions.json`, which RL's export writes since this check exists, and the requests
(`input_for_llm.txt`), which hold the question. A question is the same with the same text, choices and gold answer;
hint, lecture, solution and image may have changed. Needs no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ares import cli, files
from ares.data_folder import find_dataset
from teacher.handoff import REQUEST, Item, Refused, read_rationale, request_text
from teacher.prompts import asks_other

RECORD = "exported_questions.json"  # qid -> `_digest` of its question


def write_record(questions: str | os.PathLike, problems: Mapping[str, Any], qids: Sequence[str]) -> None:
    """Record in a questions folder which questions its rationales are about."""
    record = {qid: _digest(problems[qid]) for qid in qids}
    files.write_json(Path(questions) / RECORD, record, indent=None)


def refuse_other_data(items: Sequence[Item], problems: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Raise UserError if an item's question is not among the problems, or is another one there.

    `args`: `data_root` and `dataset`, of which the problems are. A request that does not fit the item's rationale says
    nothing: preprocessing will replace it.
    """
    fix = "name the data of this run with --data_root and --dataset"
    records: dict[Path, dict] = {}
    for item in items:
        if item.qid not in problems:
            raise cli.UserError(f"--data_root: question {item.qid} ({item.folder}) is not in problems.json; {fix}")
        if item.questions not in records:
            records[item.questions] = _read_record(item.questions)
        problem, recorded = problems[item.qid], records[item.questions].get(item.qid)
        if recorded is None:
            witness, other = item.folder / REQUEST, _asked_other(item, problem)
        else:  # spares 50,000 requests from being read
            witness, other = item.questions / RECORD, recorded != _digest(problem)
        if not other:
            continue
        where = Path(args.data_root, find_dataset(args.data_root, args.dataset))
        raise cli.UserError(
            f"--data_root: {item.questions} was not made from {where}: question {item.qid} is another one there; "
            f"{fix}, or, if you have changed the question since, delete {witness}"
        )


def _asked_other(item: Item, problem: Mapping[str, Any]) -> bool:
    text = request_text(item.folder)
    if text is None or not asks_other(text, problem):
        return False
    try:
        return all(sentence in text for sentence in read_rationale(item.folder))
    except Refused:
        return False


def _digest(problem: Mapping[str, Any]) -> str:
    question = [problem["question"], problem["choices"], problem["answer"]]
    return hashlib.sha256(json.dumps(question).encode()).hexdigest()[:12]


def _read_record(questions: Path) -> dict[str, Any]:
    path = questions / RECORD
    try:
        record = files.parse_json(files.read_shared(path).decode())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise cli.UserError(f"{path} cannot be read ({cli.in_one_line(error, 100)}); restore or delete it") from None
    if not isinstance(record, dict):
        raise cli.UserError(f"{path} is damaged; restore or delete it")
    return record
