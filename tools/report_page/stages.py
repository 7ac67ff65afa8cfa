"""The stages to compare: their prediction files, answers, sentences with scores, and figures. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ares.cli import UserError
from ares.intervals import difference_text
from ares.predictions import FILE_NAMES, Predictions, prediction_file, read_predictions, split_label
from ares.sentences import split_text
from teacher.figures import figures_by_question, rationale_figures, reference_scores
from utils_evaluate import extract_answer, get_scores, resolve_answer

LETTERS = "ABCDE"
UNPARSED, NO_ANSWER = -1, -2  # in the page's data: no letter could be read; the stage was not asked for an answer

Problems = Mapping[str, Mapping[str, Any]]


@dataclass
class SplitPredictions:
    """One stage's predictions of one split, a row per question.

    answers: index of the chosen option, UNPARSED or NO_ANSWER; sentences: of the rationale, empty for a bare answer;
    scores: per sentence, None where there are none; by_teacher: number of rationales that RL's own Teacher scored.
    """

    file: Predictions
    has_answers: bool
    has_rationales: bool
    answers: list[int]
    sentences: list[list[str]]
    scores: list[list[float] | None]
    by_teacher: int = 0


@dataclass
class Stage:
    """A name, the folder (or file) as the user typed it, and split -> predictions."""

    name: str
    folder: str
    splits: dict[str, SplitPredictions]


def read_stage(text: str, wanted: Sequence[str], orders: Mapping[str, list[str]], problems: Problems | None) -> Stage:
    """The stage of one `--stage "NAME=FOLDER"`; FOLDER may be a single prediction file.

    `wanted`: splits to show; `orders`: split -> question ids, for files without ids. Raises UserError.
    """
    name, place = stage_name(text)
    path = Path(place)
    if path.is_file():
        split = next((split for split, word in FILE_NAMES.items() if f"_{word}" in path.stem), wanted[0])
        paths = {split: path}
    elif path.is_dir():
        paths = {split: file for split in FILE_NAMES if (file := prediction_file(path, split)).is_file()}
    else:
        raise UserError(f"--stage: {path} does not exist")
    splits = {split: read_split(file, orders.get(split), problems) for split, file in paths.items() if split in wanted}
    if not splits:
        found = ", ".join(file.name for file in paths.values()) or "no predictions_ans_*.json"
        fix = "write predictions with main.py --evaluate_dir, or name --splits"
        raise UserError(f"--stage: {path} holds {found}; {fix}")
    return Stage(name, place, splits)


def stage_name(text: str) -> tuple[str, str]:
    """Both sides of `NAME=FOLDER`. Raises UserError where there is no name."""
    name, place = split_label(text)
    if name is None:
        raise UserError(f'--stage: {text!r} is not "NAME=FOLDER"')
    return name, place


def read_split(path: Path, order: list[str] | None, problems: Problems | None) -> SplitPredictions:
    """Read one `predictions_ans_*.json`. Raises UserError naming the file and what is wrong in it."""
    file = read_predictions(path, "--stage", order, "; name the --data_root that it was made from")
    if file.qids is None:
        file.qids = [f"row-{row}" for row in range(len(file.preds))]
    if problems is not None:
        file.refuse_unknown(problems, "--stage", "in problems.json; name the --data_root of these predictions")
    has_answers, has_rationales = file.parts_asked()
    answers = [NO_ANSWER] * len(file.preds)
    if has_answers:
        counts = [len(problems[qid]["choices"]) if problems else None for qid in file.qids]
        letters = file.letters or [extract_answer(text, n) for text, n in zip(file.preds, counts, strict=True)]
        answers = [UNPARSED if letter is None else LETTERS.find(letter) for letter in letters]
    sentences = [split_text(text) if has_rationales else [] for text in file.preds]
    return SplitPredictions(file, has_answers, has_rationales, answers, sentences, [None] * len(file.preds))


# -- scores and figures ----------------------------------------------------------------------------------


def score_stages(
    stages: Sequence[Stage], problems: Problems, known: Mapping[tuple[str, tuple[str, ...]], list[float]]
) -> None:
    """Give every sentence a score: the Teacher's where it scored this very rationale (`known`), else the reference's.

    `known`: (question id, sentences) -> scores.
    """
    splits = [split for stage in stages for split in stage.splits.values() if split.has_rationales]
    qids = [qid for split in splits for qid in split.file.qids]
    scores = iter(reference_scores(problems, qids, [pred for split in splits for pred in split.file.preds]))
    for split in splits:
        keys = [(qid, tuple(sentences)) for qid, sentences in zip(split.file.qids, split.sentences, strict=True)]
        split.scores = [known.get(key, own) for key, own in zip(keys, islice(scores, len(keys)), strict=True)]
        split.by_teacher = sum(key in known for key in keys)


def stage_figures(split: SplitPredictions, problems: Problems | None) -> dict[str, Any]:
    """What the overview's table shows: `rows`, `num_fail`, `scores` (per cent) and `rationale` figures.

    `scores` are the file's own; a file without any gets them computed, without the similarity, which needs a model.
    """
    file = split.file
    figures: dict[str, Any] = {"rows": len(file.preds)}
    if split.has_answers:
        figures["num_fail"] = split.answers.count(UNPARSED)
    scores = file.scores or (_computed(split, problems) if problems else {})
    parts = ("answer",) * split.has_answers + ("rationale",) * split.has_rationales
    figures["scores"] = {key: float(value) for part in parts for key, value in scores.get(part, {}).items()}
    if problems and split.has_rationales:
        scored = [row or [] for row in split.scores]
        figures["rationale"] = rationale_figures(problems, file.qids, file.preds, scored)
    return figures


def changes(found: Sequence[tuple[str, SplitPredictions]], problems: Problems) -> list[list[str]]:
    """Rows of words: what each stage changed against the one before it that answers the same questions.

    Paired by question: score, right conclusions and gold sentences covered of rationales, accuracy of answers.
    """
    rows = []
    for part, has in (("rationale", "has_rationales"), ("answer", "has_answers")):
        stages = [
            (name, set(split.file.qids), _by_question(split, part, problems))
            for name, split in found
            if getattr(split, has)
        ]
        for (before, their_qids, theirs), (after, qids, ours) in zip(stages, stages[1:], strict=False):
            if qids == their_qids:
                cells = [difference_text(ours[key], theirs[key], 3 if key == "score" else 1) for key in ours]
                rows.append([f"{after} - {before}", *([""] * 3 if part == "answer" else []), *cells])
    return rows


def _by_question(split: SplitPredictions, part: str, problems: Problems) -> dict[str, list[float]]:
    """The figures of each question, sorted by question id."""
    order = sorted(range(len(split.file.qids)), key=lambda row: split.file.qids[row])
    qids = [split.file.qids[row] for row in order]
    if part == "answer":
        answers = {
            qid: resolve_answer(text, len(problems[qid]["choices"]), qid, split.file.seed)[0]
            for qid, text in split.file.by_qid().items()
        }
        return {"accuracy": [100.0 * (answers[qid] == problems[qid]["answer"]) for qid in qids]}
    scores = [split.scores[row] or [] for row in order]
    return figures_by_question(problems, qids, [split.file.preds[row] for row in order], scores)


def _computed(split: SplitPredictions, problems: Problems) -> dict[str, Any]:
    file, answers = split.file, {}
    if split.has_answers:
        for qid, text in file.by_qid().items():
            answers[qid], _ = resolve_answer(text, len(problems[qid]["choices"]), qid, file.seed)
    rationales = file.by_qid() if split.has_rationales and any(file.labels) else {}
    references = dict(zip(file.qids, file.labels, strict=True))
    return get_scores(answers, rationales, references, problems, similarity=False)
