"""The one reader of prediction files: `predictions_ans_{test,eval,train}.json`, ours and the released code's.

A file is {"preds": [texts], "qids", "labels", "prompts", "answers": [one per row], "scores", "num_fail", "settings"};
all but `preds` may be absent. Files of the released code have no `qids` (rows follow the split) and spell the
similarity `similariry`. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ares import cli, files

FILE_NAMES = {"test": "test", "val": "eval", "train": "train"}  # split -> predictions_ans_{...}.json
ANSWER = re.compile(r"(?:Answer:\s*)?The answer is \([A-Z]\)\.?(?:\s*BECAUSE:)?")
RELEASED_NAMES = {"similariry": "similarity"}
MOST_UNREAD = 0.05  # share of answers that could not be read, above which a score says little


@dataclass
class Predictions:
    """One file, a row per question.

    qids: None where neither the file nor the split names them; labels: target texts, "" where the file has none;
    letters: the answers as the stage read them (None: unread), None as a whole in released files; scores: {"answer":
    {"acc_average": 75.0}, "rationale": {...}} in per cent; seed: of the choices that stand for unread answers.
    """

    path: Path
    preds: list[str]
    qids: list[str] | None = None
    labels: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    letters: list[str | None] | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    num_fail: int | None = None
    seed: int = 42

    def by_qid(self) -> dict[str, str]:
        """qid -> predicted text."""
        return dict(zip(self.qids or (), self.preds, strict=True))

    def refuse_unknown(self, known: Collection[str], flag: str, words: str) -> None:
        """Raise UserError, ending in `words`, if the file holds a question that is not in `known`."""
        unknown = next((qid for qid in self.qids or () if qid not in known), None)
        if unknown is not None:
            raise cli.UserError(f"{flag}: {self.path} holds question {unknown}, which is not {words}")

    def parts_asked(self) -> tuple[bool, bool]:
        """(whether an answer was asked for, whether a rationale was): the majority of the targets decides, or of the
        predicted texts in a file without targets.

        The released code gives every file the scores of both, whatever the model was asked for.
        """
        asked = self.labels if any(self.labels) else self.preds
        answers = sum(bool(ANSWER.search(text)) for text in asked)
        rationales = sum(bool(re.search(r"\w", ANSWER.sub("", text))) for text in asked)
        return answers > len(asked) / 2, rationales > len(asked) / 2


def read_predictions(
    path: str | Path, flag: str, split_qids: Sequence[str] | None = None, fix: str = "", data: Any = None
) -> Predictions:
    """Read one file, `data` being its content where it has been read.

    `split_qids`: the questions of the split, in order, for a file without `qids`; the two must be equal in number
    (`fix` says what to do if not). Raises UserError naming `flag`, the file and what is wrong in it.
    """
    data = files.read_json(path, flag, nan=True) if data is None else data
    preds = data.get("preds") if isinstance(data, dict) else None
    where, must = f"{flag}: {path}", 'must hold {"preds": [texts]}'
    if not isinstance(preds, list):
        raise cli.UserError(f'{where} {must}; it has no list "preds"')
    if odd := [row for row, text in enumerate(preds) if not isinstance(text, str)]:
        raise cli.UserError(f"{where} {must}; preds[{odd[0]}] is no text")
    rows, qids = len(preds), data.get("qids")
    if qids is None and split_qids is not None:
        if rows != len(split_qids):
            fault = f"has {rows} rationales but the split has {len(split_qids)} questions"
            raise cli.UserError(f"{where} {fault}; without question ids in the file they must be equal in number{fix}")
        qids = list(split_qids)
    if qids is not None:
        if not isinstance(qids, list) or len(qids) != rows:
            raise cli.UserError(f"{where} has {rows} preds but its qids do not match them in number")
        qids = [str(qid) for qid in qids]
        if len(set(qids)) != rows:
            raise cli.UserError(f"{where} names a question twice in its qids")
    names = ("labels", "prompts", "answers")
    labels, prompts, letters = columns = [data.get(name) or [] for name in names]
    for name, column in zip(names, columns, strict=True):
        kinds = (str, type(None)) if name == "answers" else str
        sound = isinstance(column, list) and len(column) in (0, rows)
        if not sound or not all(isinstance(one, kinds) for one in column):
            raise cli.UserError(f"{where}: {name} is no list of one text for each of its {rows} rows")
    num_fail, settings = data.get("num_fail"), data.get("settings")
    seed = settings.get("seed") if isinstance(settings, dict) else None
    none = [""] * rows
    return Predictions(
        Path(path), preds, qids, labels or none, prompts or none, letters or None,
        scores_of(data.get("scores"), path, flag), num_fail if isinstance(num_fail, int) else None,
        seed if isinstance(seed, int) else 42,
    )  # fmt: skip


def scores_of(scores: Any, path: str | Path, flag: str) -> dict[str, dict[str, float]]:
    """The `scores` of a file as numbers, {} where it has none. Raises UserError naming `flag` for another form."""
    try:
        return {part: {RELEASED_NAMES.get(name, name): float(figure) for name, figure in figures.items()
                       if figure is not None}
                for part, figures in (scores or {}).items()}  # fmt: skip
    except (AttributeError, TypeError, ValueError) as error:
        form = f'{{"answer": {{name: number}}, "rationale": {{...}}}} ({error})'
        raise cli.UserError(f"{flag}: {path}: scores are not {form}; make the file again with its stage") from None


def prediction_file(folder: str | Path, split: str) -> Path:
    """Where a stage's predictions of a split are: `predictions_ans_{test,eval,train}.json`."""
    return Path(folder) / f"predictions_ans_{FILE_NAMES[split]}.json"


def find_predictions(place: str | Path, flag: str, split: str) -> Path:
    """A predictions file itself, or that of a stage's folder. Raises UserError naming `flag`."""
    path = Path(place)
    path = prediction_file(path, split) if path.is_dir() else path
    if not path.is_file():
        raise cli.UserError(f"{flag}: {path} does not exist; name a stage's folder or its predictions_ans_*.json")
    return path


def split_label(text: str) -> tuple[str | None, str]:
    """`LABEL=PATH` as (label, path); a bare path has no label. A label may hold `=` as well ("k=4"): it ends where a
    path that exists begins."""
    parts = text.split("=")
    cuts = [("=".join(parts[:i]).strip(), "=".join(parts[i:]).strip()) for i in range(1, len(parts))]
    cuts = [(label, path) for label, path in cuts if label and path]
    existing = [cut for cut in cuts if Path(cut[1]).exists()]
    if not existing and not Path(text).exists():
        existing = [cut for cut in cuts if "/" not in cut[0]]
    return existing[0] if existing else (None, text)


def labelled(text: str) -> tuple[str, str]:
    """`split_label`, a bare path being labelled by its last two parts."""
    label, path = split_label(text)
    return label or "/".join(Path(path).parts[-2:]), path


def unread_note(unread: float, rows: int, where: str | Path) -> str | None:
    """A warning if more than MOST_UNREAD of the answers could not be read, else None."""
    note = f"{where}: {unread:g} of {rows} answers could not be read; each counts as a random choice"
    return note if unread > MOST_UNREAD * rows else None
