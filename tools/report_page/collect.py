"""Everything the page shows as one JSON-able structure: columns of questions, each distinct text once, figures.

    {"overview": {...}, "stages": [...], "questions": {column: [...]}, "preds": [...], "verdicts": [...]}
    {"texts": [...]}                                         distinct texts; other parts hold indices into this list
    {"samples": {row: [...]}, "corrections": {row: {...}}}   parsed when a question that has some is opened

A row is a question's index in the columns. Scores are integers in hundredths, rewards and advantages in thousandths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from tools.report_page.stages import LETTERS, NO_ANSWER, SplitPredictions, Stage
from tools.report_page.teacher import Correction, Round, Sample

POSITIONS = 6  # sentence positions of the histogram; the last one counts all later sentences

Problems = Mapping[str, Mapping[str, Any]]


class Texts:
    """Distinct texts by index; -1 stands for no text."""

    def __init__(self) -> None:
        self.list: list[str] = []
        self.index: dict[str, int] = {}

    def add(self, text: str | None) -> int:
        if not text:
            return -1
        if text not in self.index:
            self.index[text] = len(self.list)
            # half a surrogate pair, which damaged JSON can hold, cannot be encoded as UTF-8
            self.list.append(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return self.index[text]


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
    """(question ids to show, number of questions that are not shown).

    All questions that a stage predicts, and at most `most_train` of the others that have samples or corrections:
    first those with a dropped reply, then evenly spaced ones.
    """
    predicted = dict.fromkeys(
        qid
        for split in inputs.splits
        for stage in inputs.stages
        if split in stage.splits
        for qid in stage.splits[split].file.qids
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
    """The three parts of the page's data (module docstring), without the overview."""
    texts, pieces = Texts(), Texts()
    row_of = {qid: row for row, qid in enumerate(qids)}
    main = {
        "letters": LETTERS,
        "stages": [
            {
                "name": stage.name,
                "folder": stage.folder,
                "answers": any(split.has_answers for split in stage.splits.values()),
                "rationales": any(split.has_rationales for split in stage.splits.values()),
            }
            for stage in inputs.stages
        ],
        "questions": _questions(inputs, qids, texts),
        "preds": [_preds(stage, row_of, texts) for stage in inputs.stages],
        "rounds": [each.number for each in inputs.rounds],
        "verdicts": [_verdicts(result, row_of) for result in inputs.verdicts],
    }
    samples: dict[int, list] = {}
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
    main["corrected"] = {row: data.get("reason", "") for row, data in corrections.items()}
    details = {"samples": samples, "corrections": corrections, "pieces": pieces.list}
    return {"main": main, "texts": {"texts": texts.list}, "details": details}


def _questions(inputs: Inputs, qids: Sequence[str], texts: Texts) -> dict[str, list]:
    columns: dict[str, list] = {
        name: []
        for name in "qid split question hint caption choices answer lecture solution subject topic grade image".split()
    }
    known = _known_by_files(inputs)
    for qid in qids:
        problem = inputs.problems[qid] if inputs.problems else known.get(qid, {})
        columns["qid"].append(qid)
        columns["split"].append(inputs.split_of.get(qid) or known.get(qid, {}).get("split", "train"))
        for name in ("question", "hint", "lecture", "solution", "subject", "topic", "grade"):
            value = problem.get(name)
            columns[name].append(texts.add(value if isinstance(value, str) else None))
        columns["caption"].append(texts.add(inputs.captions.get(qid)))
        columns["choices"].append([texts.add(choice) for choice in problem.get("choices", [])])
        columns["answer"].append(problem.get("answer", -1))
        columns["image"].append(int(problem.get("image") is not None))
    return columns


def _known_by_files(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """What prediction files alone know of a question: its split, the prompt, the target."""
    known: dict[str, dict[str, Any]] = {}
    for stage in inputs.stages:
        for name, split in stage.splits.items():
            for qid, prompt, label in zip(split.file.qids, split.file.prompts, split.file.labels, strict=True):
                known.setdefault(qid, {"split": name, "question": prompt, "solution": label})
    return known


def _preds(stage: Stage, row_of: Mapping[str, int], texts: Texts) -> dict[str, list]:
    """Columns over all rows: `s` sentences, `p` their scores, `a` the answer, `w` the text as written.

    `s` is None where the stage has no prediction; `w` is -1 where it equals the joined sentences.
    """
    count = len(row_of)
    columns: dict[str, list] = {"s": [None] * count, "p": [None] * count, "a": [NO_ANSWER] * count, "w": [-1] * count}
    for split in reversed(stage.splits.values()):
        for i, qid in enumerate(split.file.qids):
            if qid in row_of:
                _put(columns, row_of[qid], split, i, texts)
    return columns


def _put(columns: dict[str, list], row: int, split: SplitPredictions, i: int, texts: Texts) -> None:
    sentences, scores = split.sentences[i], split.scores[i]
    columns["s"][row] = [texts.add(sentence) for sentence in sentences]
    columns["p"][row] = None if scores is None else scaled(scores, 100)
    columns["a"][row] = split.answers[i]
    written = split.file.preds[i].strip()
    same = written.removeprefix("Solution:").strip() == " ".join(sentences)
    columns["w"][row] = -1 if same else texts.add(written)


def scaled(values: Sequence[float], factor: int) -> list[int]:
    return [round(factor * value) for value in values]


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
    data: dict[str, Any] = {"k": sample.action, "round": number, "s": [texts.add(text) for text in sample.sentences]}
    if sample.scores is not None:
        data["p"] = scaled(sample.scores, 100)
    if sample.advantages is not None:
        data["adv"] = scaled(sample.advantages, 1000)
    if sample.reward is not None:
        data["reward"] = round(1000 * sample.reward)
    data |= _reply(sample, texts)
    if sample.tokens:
        data["tokens"] = [pieces.add(piece) for piece in sample.tokens["pieces"]]
        data["rewards"] = scaled(sample.tokens["rewards"], 1000)
        data["advantages"] = scaled(sample.tokens["advantages"], 1000)
    return data


def _correction(each: Correction, texts: Texts) -> dict[str, Any]:
    data: dict[str, Any] = {"original": texts.add(each.original)}
    if each.final is not None:
        data["final"] = texts.add(each.final)
    return data | _reply(each, texts)


def _reply(each: Sample | Correction, texts: Texts) -> dict[str, Any]:
    """The raw reply, who wrote it, and why it was dropped."""
    data: dict[str, Any] = {}
    if each.reply:
        data["reply"] = texts.add(each.reply)
    if each.reason:
        data |= {"reason": each.reason, "why": texts.add(each.why)}
    if about := _about(each.about):
        data["about"] = texts.add(about)
    return data


def _verdicts(result: Mapping[str, Any], row_of: Mapping[str, int]) -> dict[str, Any]:
    rows: dict[int, list] = {}
    for verdict in result["verdicts"]:
        row = row_of.get(verdict["qid"])
        if row is not None:
            rows.setdefault(row, []).append([verdict["order"], verdict["winner"]])
    return {"systems": result["systems"], "judge": (result.get("judge") or {}).get("model"), "rows": rows}


# -- overview --------------------------------------------------------------------------------------------


def score_series(inputs: Inputs, split: str) -> list[dict[str, Any]]:
    """Sentence scores by position, per stage and per round: `counts[position][tenths]`, `means`, and the judges.

    Positions 1 .. POSITIONS; the last one counts all later sentences too.
    """
    series = [
        ("RL samples" + (f", round {each.number}" if len(inputs.rounds) > 1 else ""),
         sorted({str(sample.about["model"]) for sample in each.samples if sample.about.get("model")}),
         [sample.scores for sample in each.samples if sample.scores and not sample.reason])
        for each in inputs.rounds
    ]  # fmt: skip
    for stage in inputs.stages:
        if split in stage.splits and stage.splits[split].has_rationales:
            data = stage.splits[split]
            judges = ["reference"] + ([f"{data.by_teacher} by RL's Teacher"] if data.by_teacher else [])
            series.append((stage.name, judges, [row for row in data.scores if row]))
    return [_by_position(name, judges, rows) for name, judges, rows in series if rows]


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
    counts = []
    for name, many in [*((f"RL round {each.number}", each.samples) for each in rounds), ("corrections", corrections)]:
        if many:
            reasons = Counter(one.reason for one in many if one.reason)
            counts.append({"name": name, "total": len(many), "reasons": dict(reasons.most_common())})
    return counts
