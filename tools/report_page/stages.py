"""Prediction files of the stages to compare, read into one form, and the figures of each stage.

Takes our files and those of the released code (no `qids`: rows follow the split). Torch is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ares import files
from ares.cli import UserError
from ares.predictions import parts_asked, scores_of
from ares.sentences import split_text
from teacher.reference import rationale_figures, reference_scores
from utils_evaluate import FILE_NAMES, extract_answer, get_scores, prediction_file, resolve_answer

LETTERS = "ABCDE"
UNPARSED, NO_ANSWER = -1, -2  # in the page's data: no letter could be read; the stage was not asked for one

Problems = Mapping[str, Mapping[str, Any]]


@dataclass
class Predictions:
    """One stage's predictions of one split, a row per question.

    answers: index of the chosen option, UNPARSED or NO_ANSWER; sentences: of the rationale, empty for a bare answer;
    scores: per sentence, None where nobody scored them.
    """

    path: Path
    qids: list[str]
    preds: list[str]
    labels: list[str]
    prompts: list[str] | None
    answers: list[int]
    sentences: list[list[str]]
    told: dict[str, Any]  # scores and settings of the file, {} where it has none
    has_answers: bool
    has_rationales: bool
    scores: list[list[float] | None] = field(default_factory=list)
    by_teacher: int = 0  # rationales whose scores are the Teacher's own


@dataclass
class Stage:
    """A name, the folder (or file) as the user typed it, and split -> predictions."""

    name: str
    folder: str
    splits: dict[str, Predictions]
    figures: dict[str, Any] = field(default_factory=dict)


def read_stage(text: str, wanted: Sequence[str], orders: Mapping[str, list[str]], problems: Problems | None) -> Stage:
    """The stage of one `--stage "NAME=FOLDER"`; FOLDER may be a single prediction file.

    `wanted`: splits to show; `orders`: split -> question ids, for files without ids. Raises UserError.
    """
    name, place = name_and_place(text)
    path = Path(place)
    if path.is_file():
        split = next((split for split, word in FILE_NAMES.items() if f"_{word}" in path.stem), wanted[0])
        paths = {split: path}
    elif path.is_dir():
        paths = {split: file for split in FILE_NAMES if (file := prediction_file(path, split)).is_file()}
    else:
        raise UserError(f"--stage: {path} does not exist")
    splits = {}
    for split, file in paths.items():
        if split in wanted:
            splits[split] = read_predictions(file, orders.get(split), problems)
    if not splits:
        found = ", ".join(file.name for file in paths.values()) or "no predictions_ans_*.json"
        raise UserError(
            f"--stage: {path} holds {found}; write predictions with main.py --evaluate_dir, or name --splits"
        )
    return Stage(name, place, splits)


def name_and_place(text: str) -> tuple[str, str]:
    """Both sides of `NAME=FOLDER`. A name may hold `=` as well ("k=4"): it ends where a path that exists begins."""
    parts = text.split("=")
    cuts = [("=".join(parts[:i]).strip(), "=".join(parts[i:]).strip()) for i in range(1, len(parts))]
    cuts = [(name, place) for name, place in cuts if name and place]
    if not cuts:
        raise UserError(f'--stage: {text!r} is not "NAME=FOLDER"')
    return next((cut for cut in cuts if Path(cut[1]).exists()), cuts[0])


def read_predictions(path: Path, order: list[str] | None, problems: Problems | None) -> Predictions:
    """Read and check one `predictions_ans_*.json`. Raises UserError naming the file and what is wrong in it."""
    told = files.read_json(path, "--stage", nan=True)
    preds = told.get("preds") if isinstance(told, dict) else None
    if not isinstance(preds, list) or not all(isinstance(text, str) for text in preds):
        raise UserError(f'--stage: {path} must hold {{"preds": [texts]}}')
    qids = told.get("qids")
    if qids is None:
        qids = order if order is not None else [f"row-{row}" for row in range(len(preds))]
        if len(qids) != len(preds):
            raise UserError(
                f"--stage: {path} has {len(preds)} rows without question ids but its split has {len(qids)}; "
                "name the --data_root that it was made from"
            )
    qids = [str(qid) for qid in qids] if isinstance(qids, list) else []
    if len(qids) != len(preds) or len(set(qids)) != len(qids):
        raise UserError(f"--stage: {path} must have one question id for each of its {len(preds)} rows, none twice")
    unknown = [qid for qid in qids if problems is not None and qid not in problems]
    if unknown:
        raise UserError(
            f"--stage: {path} holds question {unknown[0]}, which problems.json does not; name the --data_root that "
            "the predictions were made from"
        )
    for name, kinds in (("labels", str), ("prompts", str), ("answers", (str, type(None)))):
        column = told.get(name) or []
        if (
            not isinstance(column, list)
            or len(column) not in (0, len(preds))
            or not all(isinstance(one, kinds) for one in column)
        ):
            raise UserError(f"--stage: {path}: {name} is no list of one text for each of its {len(preds)} rows")
    labels = told.get("labels") or [""] * len(preds)
    has_answers, has_rationales = parts_asked(preds, labels)
    letters = told.get("answers") or None
    return Predictions(
        path=path,
        qids=qids,
        preds=preds,
        labels=labels,
        prompts=told.get("prompts"),
        answers=_answers(qids, preds, letters, problems) if has_answers else [NO_ANSWER] * len(preds),
        sentences=[split_text(text) if has_rationales else [] for text in preds],
        told={"scores": scores_of(told, path, "--stage"), "settings": told.get("settings") or {}},
        has_answers=has_answers,
        has_rationales=has_rationales,
        scores=[None] * len(preds),
    )


def _answers(
    qids: Sequence[str], preds: Sequence[str], letters: list[str | None] | None, problems: Problems | None
) -> list[int]:
    if letters is None:
        counts = [len(problems[qid]["choices"]) if problems else None for qid in qids]
        letters = [extract_answer(text, count) for text, count in zip(preds, counts, strict=True)]
    return [UNPARSED if letter is None else LETTERS.find(letter) for letter in letters]


# -- scores and figures ----------------------------------------------------------------------------------


def score_stage(stage: Stage, problems: Problems, known: Mapping[tuple[str, tuple[str, ...]], list[float]]) -> None:
    """Give every sentence a score: the Teacher's where it scored this very rationale (`known`), else the reference's.

    `known`: (question id, sentences) -> scores.
    """
    for predictions in stage.splits.values():
        if not predictions.has_rationales:
            continue
        keys = [(qid, tuple(s)) for qid, s in zip(predictions.qids, predictions.sentences, strict=True)]
        open_rows = [row for row, key in enumerate(keys) if key not in known]
        fresh = reference_scores(
            problems, [predictions.qids[row] for row in open_rows], [predictions.preds[row] for row in open_rows]
        )
        predictions.scores = [known.get(key) for key in keys]
        predictions.by_teacher = len(keys) - len(open_rows)
        for row, scores in zip(open_rows, fresh, strict=True):
            predictions.scores[row] = scores


def stage_figures(predictions: Predictions, problems: Problems | None) -> dict[str, Any]:
    """What the overview's table shows: `rows`, `num_fail`, `scores` (per cent) and `rationale` figures.

    The file's own scores where it has them; else they are computed, but for the similarity, which needs a model.
    """
    figures: dict[str, Any] = {"rows": len(predictions.preds)}
    if predictions.has_answers:
        figures["num_fail"] = predictions.answers.count(UNPARSED)
    told = predictions.told["scores"] or (_computed(predictions, problems) if problems else {})
    parts = ("answer",) * predictions.has_answers + ("rationale",) * predictions.has_rationales
    figures["scores"] = {key: float(value) for part in parts for key, value in told.get(part, {}).items()}
    if problems and predictions.has_rationales:
        scores = [row or [] for row in predictions.scores]
        figures["rationale"] = rationale_figures(problems, predictions.qids, predictions.preds, scores)
    return figures


def _computed(predictions: Predictions, problems: Problems) -> dict[str, Any]:
    seed = predictions.told["settings"].get("seed", 42)
    answers, rationales = {}, {}
    if predictions.has_answers:
        for qid, text in zip(predictions.qids, predictions.preds, strict=True):
            answers[qid], _ = resolve_answer(text, len(problems[qid]["choices"]), qid, seed)
    if predictions.has_rationales and any(predictions.labels):
        rationales = dict(zip(predictions.qids, predictions.preds, strict=True))
    references = dict(zip(predictions.qids, predictions.labels, strict=True))
    return get_scores(answers, rationales, references, problems, similarity=False)
