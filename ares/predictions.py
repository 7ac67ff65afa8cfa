"""Reading the predictions that stages write: `predictions_ans_{test,eval,train}.json`, ours and the released code's.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ares import cli

FILE_OF_SPLIT = {"test": "predictions_ans_test.json", "val": "predictions_ans_eval.json",
                 "train": "predictions_ans_train.json"}  # fmt: skip


ANSWER = re.compile(r"(?:Answer:\s*)?The answer is \([A-Z]\)\.?(?:\s*BECAUSE:)?")
RELEASED_NAMES = {"similariry": "similarity"}  # figures that the released code spells otherwise


def texts_by_qid(told: Any, path: str | Path, flag: str, split_qids: Sequence[str], fix: str = "") -> dict[str, str]:
    """qid -> text of a predictions file's content: by its `qids` where it has them, else in the order of the split.

    Raises UserError naming `flag` for another form, for a question named twice, and for a file without ids whose
    length is not the split's (`fix` says what to do).
    """
    preds = told.get("preds") if isinstance(told, dict) else None
    if not isinstance(preds, list) or not all(isinstance(text, str) for text in preds):
        raise cli.UserError(f'{flag}: {path} must hold {{"preds": [texts]}}')
    qids = told.get("qids")
    if qids is None:
        if len(preds) != len(split_qids):
            raise cli.UserError(
                f"{flag}: {path} has {len(preds)} rationales but the split has {len(split_qids)} questions; "
                f"without question ids in the file they must be equal in number{fix}"
            )
        qids = split_qids
    if not isinstance(qids, list) or len(qids) != len(preds):
        raise cli.UserError(f"{flag}: {path} has {len(preds)} preds but its qids do not match them in number")
    texts = {str(qid): text for qid, text in zip(qids, preds, strict=True)}
    if len(texts) != len(qids):
        raise cli.UserError(f"{flag}: {path} names a question twice in its qids")
    return texts


def parts_asked(preds: Sequence[str], labels: Sequence[str] | None) -> tuple[bool, bool]:
    """(whether an answer was asked for, whether a rationale was), by most of the targets, without them of the texts.

    The released code gives every file the scores of both, whatever the model was asked for.
    """
    asked = labels if labels and any(labels) else preds
    answers = sum(bool(ANSWER.search(text)) for text in asked)
    rationales = sum(bool(re.search(r"\w", ANSWER.sub("", text))) for text in asked)
    return answers > len(asked) / 2, rationales > len(asked) / 2


def scores_of(told: Mapping[str, Any], path: str | Path, flag: str) -> dict[str, dict[str, float]]:
    """The `scores` of a predictions file's content, {"answer": {name: figure}, "rationale": {...}}, as numbers.

    {} where it has none. Raises UserError naming `flag` for another form.
    """
    try:
        return {part: {RELEASED_NAMES.get(name, name): float(figure) for name, figure in figures.items()
                       if figure is not None}
                for part, figures in (told.get("scores") or {}).items()}  # fmt: skip
    except (AttributeError, TypeError, ValueError) as error:
        raise cli.UserError(
            f'{flag}: {path}: scores are not {{"answer": {{name: number}}, "rationale": {{...}}}} ({error}); make the '
            "file again with its stage"
        ) from None


def predictions_file(place: str | Path, flag: str, split: str = "test") -> Path:
    """A predictions file itself, or a stage's folder that holds one. Raises UserError naming `flag`."""
    path = Path(place)
    if path.is_dir():
        path = path / FILE_OF_SPLIT[split]
    if not path.is_file():
        raise cli.UserError(f"{flag}: {path} does not exist; name a stage's folder or its predictions_ans_*.json")
    return path


def split_label(named: str) -> tuple[str, str]:
    """`LABEL=PATH` as (label, path); a bare path is labelled by its last two parts."""
    label, sign, path = named.partition("=")
    if sign and label and path and "/" not in label:
        return label, path
    return "/".join(Path(named).parts[-2:]), named
