"""Everything the page shows as one JSON-able structure: a table of questions, texts stored once, figures beside them.

    {"overview": {...}, "stages": [...], "questions": {column: [...]}, "preds": [...], "verdicts": [...]}   always read
    {"texts": [...]}                                every distinct text once; elsewhere a text is its index
    {"samples": {row: [...]}, "corrections": {row: {...}}}   read when a question is opened that has some

A row is a question's place in the columns. Scores are whole hundredths, rewards and advantages thousandths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from tools.report_page.stages import LETTERS, NO_ANSWER, Predictions, Stage
from tools.report_page.teacher import Correction, Round, Sample

POSITIONS = 6  # sentence positions of the histogram; the last one holds the rest

Problems = Mapping[str, Mapping[str, Any]]


class Texts:
    """Distinct texts by index. -1 is no text."""

    def __init__(self) -> None:
        self.list: list[str] = []
        self.index: dict[str, int] = {}

    def add(self, text: str | None) -> int:
        if not text:
            return -1
        if text not in self.index:
            self.index[text] = len(self.list)
            # half of a surrogate pair, as broken JSON can hold, has no UTF-8
            self.list.append(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return self.index[text]

    def all(self, texts: Sequence[str]) -> list[int]:
        return [self.add(text) for text in texts]


@dataclass
class Inputs:
    """What was read; any part may be empty."""

    stages: list[Stage]
    splits: list[str]
    problems: Problems | None = None
    captions: Mapping[str, str] = field(default_factory=dict)
    split_of: Mapping[str, str] = field(default_factory=dict)  # qid -> split
    rounds: list[Round] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)


def choose_questions(inputs: Inputs, most_train: int) -> tuple[list[str], int]:
    """(question ids to show, number of questions left out).

    All questions that a stage predicts; and of those that have samples or corrections besides, at most `most_train`:
    first those with a dropped reply, then evenly spaced ones.
    """
    predicted = dict.fromkeys(
        qid
        for split in inputs.splits
        for stage in inputs.stages
        if split in stage.splits
        for qid in stage.splits[split].qids
    )
    dropped = {sample.qid for each in inputs.rounds for sample in each.samples if sample.reason}
    dropped |= {correction.qid for correction in inputs.corrections if correction.reason}
    asked = dict.fromkeys(sample.qid for each in inputs.rounds for sample in each.samples)
    asked |= dict.fromkeys(correction.qid for correction in inputs.corrections)
    candidates = others = [qid for qid in asked if qid not in predicted]
    if len(others) > most_train:
        first = [qid for qid in others if qid in dropped][:most_train]
        rest = [qid for qid in others if qid not in dropped]
        left = most_train - len(first)
        spaced = [rest[i * len(rest) // left] for i in range(left)] if left else []
        chosen = set(first) | set(spaced)
        others = [qid for qid in others if qid in chosen]
    return [*predicted, *others], len(candidates) - len(others)


def page_data(inputs: Inputs, qids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The three parts of the page's data (module docstring), but for the overview."""
    texts = Texts()
    row_of = {qid: row for row, qid in enumerate(qids)}
    main = {
        "letters": LETTERS,
        "stages": [_stage(stage) for stage in inputs.stages],
        "questions": _questions(inputs, qids, texts),
        "preds": [_preds(stage, row_of, texts) for stage in inputs.stages],
        "rounds": [each.number for each in inputs.rounds],
        "verdicts": [_verdicts(told, row_of) for told in inputs.verdicts],
    }
    samples: dict[int, list] = {}
    pieces = Texts()
    for each in inputs.rounds:
        for sample in sorted(each.samples, key=lambda sample: sample.action):
            if sample.qid in row_of:
                samples.setdefault(row_of[sample.qid], []).append(_sample(sample, each.number, texts, pieces))
    corrections = {row_of[each.qid]: _correction(each, texts) for each in inputs.corrections if each.qid in row_of}
    main["sampled"] = {
        row: {
            "low": min((score for one in many for score in one.get("p", ())), default=-1),
            "dropped": sorted({one["reason"] for one in many if "reason" in one}),
        }
        for row, many in samples.items()
    }
    main["corrected"] = {row: told.get("reason", "") for row, told in corrections.items()}
    details = {"samples": samples, "corrections": corrections, "pieces": pieces.list}
    return {"main": main, "texts": {"texts": texts.list}, "details": details}


def _stage(stage: Stage) -> dict[str, Any]:
    every = stage.splits.values()
    return {
        "name": stage.name,
        "folder": stage.folder,
        "answers": any(predictions.has_answers for predictions in every),
        "rationales": any(predictions.has_rationales for predictions in every),
    }


def _questions(inputs: Inputs, qids: Sequence[str], texts: Texts) -> dict[str, list]:
    columns: dict[str, list] = {
        name: []
        for name in "qid split question hint caption choices answer lecture solution subject topic grade image".split()
    }
    told = _told_by_files(inputs)
    for qid in qids:
        problem = inputs.problems[qid] if inputs.problems else told.get(qid, {})
        columns["qid"].append(qid)
        columns["split"].append(inputs.split_of.get(qid) or told.get(qid, {}).get("split", "train"))
        for name in ("question", "hint", "lecture", "solution", "subject", "topic", "grade"):
            value = problem.get(name)
            columns[name].append(texts.add(value if isinstance(value, str) else None))
        columns["caption"].append(texts.add(inputs.captions.get(qid)))
        columns["choices"].append(texts.all(problem.get("choices", [])))
        columns["answer"].append(problem.get("answer", -1))
        columns["image"].append(int(problem.get("image") is not None))
    return columns


def _told_by_files(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """What prediction files alone tell of a question: its split, the prompt, the target."""
    told: dict[str, dict[str, Any]] = {}
    for stage in reversed(inputs.stages):  # the first stage's word counts
        for split, predictions in stage.splits.items():
            prompts = predictions.prompts or [""] * len(predictions.qids)
            for qid, prompt, label in zip(predictions.qids, prompts, predictions.labels, strict=True):
                told[qid] = {"split": split, "question": prompt, "solution": label}
    return told


def _preds(stage: Stage, row_of: Mapping[str, int], texts: Texts) -> dict[str, list]:
    """Columns over all rows: `s` sentences, `p` their scores, `a` the answer, `w` the text as written.

    `s` is None where the stage has no prediction; `w` is -1 where the sentences already say it all.
    """
    count = len(row_of)
    columns: dict[str, list] = {"s": [None] * count, "p": [None] * count, "a": [NO_ANSWER] * count, "w": [-1] * count}
    for predictions in reversed(stage.splits.values()):
        for i, qid in enumerate(predictions.qids):
            if qid in row_of:
                _put(columns, row_of[qid], predictions, i, texts)
    return columns


def _put(columns: dict[str, list], row: int, predictions: Predictions, i: int, texts: Texts) -> None:
    sentences, scores = predictions.sentences[i], predictions.scores[i]
    columns["s"][row] = texts.all(sentences)
    columns["p"][row] = None if scores is None else hundredths(scores)
    columns["a"][row] = predictions.answers[i]
    shown = " ".join(sentences)
    written = predictions.preds[i].strip()
    columns["w"][row] = -1 if written.removeprefix("Solution:").strip() == shown else texts.add(written)


def hundredths(values: Sequence[float]) -> list[int]:
    return [round(100 * value) for value in values]


def thousandths(values: Sequence[float]) -> list[int]:
    return [round(1000 * value) for value in values]


def _about(about: Mapping[str, Any]) -> str:
    """Who wrote a reply, in one line."""
    usage = about.get("usage") or {}
    words = [str(about[key]) for key in ("model", "prompt_version", "time") if about.get(key)]
    if usage.get("input_tokens"):
        words.append(f"{usage['input_tokens']} + {usage.get('output_tokens', 0)} tokens")
    if about.get("cost_usd"):
        words.append(f"${about['cost_usd']:.6f}")
    if about.get("copied_from"):
        words.append(f"copied from {about['copied_from']}")
    if about.get("text_only"):
        words.append(str(about["text_only"]))
    return " · ".join(words)


def _sample(sample: Sample, number: int, texts: Texts, pieces: Texts) -> dict[str, Any]:
    told: dict[str, Any] = {"k": sample.action, "round": number, "s": texts.all(sample.sentences)}
    if sample.scores is not None:
        told["p"] = hundredths(sample.scores)
    if sample.advantages is not None:
        told["adv"] = thousandths(sample.advantages)
    if sample.reward is not None:
        told["reward"] = round(1000 * sample.reward)
    told |= _reply(sample, texts)
    if sample.tokens:
        told["tokens"] = [pieces.add(piece) for piece in sample.tokens["pieces"]]
        told["rewards"] = thousandths(sample.tokens["rewards"])
        told["advantages"] = thousandths(sample.tokens["advantages"])
    return told


def _correction(each: Correction, texts: Texts) -> dict[str, Any]:
    told: dict[str, Any] = {"original": texts.add(each.original)}
    if each.final is not None:
        told["final"] = texts.add(each.final)
    return told | _reply(each, texts)


def _reply(each: Sample | Correction, texts: Texts) -> dict[str, Any]:
    """The raw reply, who wrote it, and why it was dropped."""
    told: dict[str, Any] = {}
    if each.reply:
        told["reply"] = texts.add(each.reply)
    if each.reason:
        told |= {"reason": each.reason, "why": texts.add(each.why)}
    if about := _about(each.about):
        told["about"] = texts.add(about)
    return told


def _verdicts(told: Mapping[str, Any], row_of: Mapping[str, int]) -> dict[str, Any]:
    rows: dict[int, list] = {}
    for verdict in told["verdicts"]:
        row = row_of.get(str(verdict["qid"]))
        if row is not None:
            rows.setdefault(row, []).append([verdict["order"], verdict["winner"]])
    judge = told.get("judge") or {}
    name = judge.get("model") if isinstance(judge, dict) else str(judge)
    return {"systems": told["systems"], "judge": name, "rows": rows}


# -- overview --------------------------------------------------------------------------------------------


def score_series(inputs: Inputs, split: str) -> list[dict[str, Any]]:
    """Sentence scores by position, per stage and per round: `counts[position][tenths]`, `means`, by whom.

    Positions 1 .. POSITIONS, the last one holding all later sentences.
    """
    series = [
        ("RL samples" + (f", round {each.number}" if len(inputs.rounds) > 1 else ""), sorted(_models(each)),
         [sample.scores for sample in each.samples if sample.scores and not sample.reason])
        for each in inputs.rounds
    ]  # fmt: skip
    for stage in inputs.stages:
        if split in stage.splits and stage.splits[split].has_rationales:
            told = stage.splits[split]
            judges = ["reference"] + ([f"{told.by_teacher} by RL's Teacher"] if told.by_teacher else [])
            series.append((stage.name, judges, [row for row in told.scores if row]))
    return [_by_position(name, judges, rows) for name, judges, rows in series if rows]


def _models(each: Round) -> set[str]:
    return {str(sample.about["model"]) for sample in each.samples if sample.about.get("model")}


def _by_position(name: str, judges: list[str], rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    at: list[list[float]] = [[] for _ in range(POSITIONS)]
    for row in rows:
        for position, score in enumerate(row):
            at[min(position, POSITIONS - 1)].append(score)
    counts = []
    for scores in at:
        tenths = Counter(min(10, int(10 * score + 0.5)) for score in scores)
        counts.append([tenths[step] for step in range(11)])
    means = [mean(scores) if scores else None for scores in at]
    return {"name": name, "judges": judges, "rationales": len(rows), "counts": counts, "means": means}


def dropped_counts(rounds: Sequence[Round], corrections: Sequence[Correction]) -> list[dict[str, Any]]:
    """Replies that could not be used, by reason, per round and for the corrections."""
    told = []
    for name, many in [*((f"RL round {each.number}", each.samples) for each in rounds), ("corrections", corrections)]:
        if many:
            reasons = Counter(one.reason for one in many if one.reason)
            told.append({"name": name, "total": len(many), "reasons": dict(reasons.most_common())})
    return told
