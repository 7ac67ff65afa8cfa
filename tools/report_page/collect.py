"""Everything the page shows as one JSON-able structure.

    {"overview": {...}, "stages": [...], "questions": [{...}], "preds": [{row: {...}}], "verdicts": [...]}
    {"samples": {row: [...]}, "corrections": {row: {...}}}   parsed when a question that has some is opened

A row is a question's index. Scores are integers in hundredths, rewards and advantages in thousandths.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from teacher import reference
from teacher.interface import MODEL
from tools.report_page.stages import LETTERS, Problems, SplitPredictions, Stage
from tools.report_page.teacher import Round, Sample

POSITIONS = 6  # sentence positions of the histogram; the last one counts all later sentences
TEXTS = ("question", "hint", "lecture", "solution", "subject", "topic", "grade")


@dataclass
class Inputs:
    """What was read; any part may be empty."""

    stages: list[Stage]
    splits: list[str]
    problems: Problems | None = None
    captions: Mapping[str, str] = field(default_factory=dict)
    split_of: Mapping[str, str] = field(default_factory=dict)  # qid -> split
    rounds: list[Round] = field(default_factory=list)
    corrections: list[Sample] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)


def choose_questions(inputs: Inputs, most_train: int) -> tuple[list[str], int]:
    """(question ids to show, number of questions that are not shown).

    All questions that a stage predicts, and at most `most_train` of the others that have samples or corrections:
    first those with a dropped reply, then evenly spaced ones.
    """
    splits = [stage.splits[name] for name in inputs.splits for stage in inputs.stages if name in stage.splits]
    predicted = dict.fromkeys(qid for split in splits for qid in split.file.qids)
    replies = [*(sample for each in inputs.rounds for sample in each.samples), *inputs.corrections]
    dropped = {each.qid for each in replies if each.reason}
    asked = dict.fromkeys(each.qid for each in replies)
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
    """The two parts of the page's data (module docstring), without the overview."""
    row_of = {qid: row for row, qid in enumerate(qids)}
    samples: dict[int, list] = {}
    for each in inputs.rounds:
        for sample in sorted(each.samples, key=lambda sample: sample.action):
            if sample.qid in row_of:
                samples.setdefault(row_of[sample.qid], []).append(_sample(sample, each.number))
    corrections = {row_of[each.qid]: _correction(each) for each in inputs.corrections if each.qid in row_of}
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
        "questions": _questions(inputs, qids),
        "preds": [
            {
                row_of[qid]: _pred(split, i)
                for split in reversed(stage.splits.values())
                for i, qid in enumerate(split.file.qids)
                if qid in row_of
            }
            for stage in inputs.stages
        ],
        "rounds": [each.number for each in inputs.rounds],
        "verdicts": [_verdicts(result, row_of) for result in inputs.verdicts],
        "sampled": {
            row: {
                "low": min((score for one in many for score in one.get("p", ())), default=-1),
                "dropped": sorted({one["reason"] for one in many if "reason" in one}),
                "by": sorted({one["by"] for one in many if "by" in one}),
                "apart": max(map(_apart, many)),
            }
            for row, many in samples.items()
        },
        "corrected": {row: data.get("reason", "") for row, data in corrections.items()},
    }
    return {"main": main, "details": {"samples": samples, "corrections": corrections}}


def _questions(inputs: Inputs, qids: Sequence[str]) -> list[dict[str, Any]]:
    """A question's fields; empty texts are absent. Without problems: what prediction files alone know of it."""
    known: dict[str, dict[str, Any]] = {}
    for stage in inputs.stages:
        for name, split in stage.splits.items():
            for qid, prompt, label in zip(split.file.qids, split.file.prompts, split.file.labels, strict=True):
                known.setdefault(qid, {"split": name, "question": prompt, "solution": label})
    questions = []
    for qid in qids:
        problem = inputs.problems[qid] if inputs.problems else known.get(qid, {})
        texts = {name: problem.get(name) for name in TEXTS} | {"caption": inputs.captions.get(qid)}
        questions.append(
            {
                "qid": qid,
                "split": inputs.split_of.get(qid) or known.get(qid, {}).get("split", "train"),
                "choices": problem.get("choices", []),
                "answer": problem.get("answer", -1),
                "image": problem.get("image") is not None,
            }
            | {name: text for name, text in texts.items() if text and isinstance(text, str)}
        )
    return questions


def _pred(split: SplitPredictions, i: int) -> dict[str, Any]:
    """`s` sentences, `p` their scores, `a` the answer, `w` the text as written, if it is not the joined sentences."""
    data: dict[str, Any] = {"s": split.sentences[i], "a": split.answers[i]}
    if split.scores[i] is not None:
        data["p"] = scaled(split.scores[i], 100)
    written = split.file.preds[i].strip()
    if written.removeprefix("Solution:").strip() != " ".join(data["s"]):
        data["w"] = written
    return data


def scaled(values: Sequence[float], factor: int) -> list[int]:
    return [round(factor * value) for value in values]


def _sample(sample: Sample, number: int) -> dict[str, Any]:
    data: dict[str, Any] = {"k": sample.action, "round": number, "s": sample.sentences}
    if sample.scores is not None:
        data["p"] = scaled(sample.scores, 100)
    if sample.about.get("model"):
        data["by"] = str(sample.about["model"])
    if sample.second is not None:
        data |= {"p2": scaled(sample.second, 100), "by2": sample.second_by}
    if sample.advantages is not None:
        data["adv"] = scaled(sample.advantages, 1000)
    if sample.reward is not None:
        data["reward"] = round(1000 * sample.reward)
    if sample.tokens:
        data["tokens"] = sample.tokens["pieces"]
        data |= {name: scaled(sample.tokens[name], 1000) for name in ("rewards", "advantages")}
    return data | _reply(sample)


def _apart(data: Mapping[str, Any]) -> int:
    """The largest difference of two Teachers' scores of a sentence; -1: no two scored the sample."""
    pairs = zip(data["p"], data["p2"], strict=True) if {"p", "p2"} <= data.keys() else ()
    return max((abs(a - b) for a, b in pairs), default=-1)


def _correction(each: Sample) -> dict[str, Any]:
    """The rationale as it was sent, and its difference to the corrected one: [["same" | "del" | "ins", words]]."""
    data: dict[str, Any] = {"original": " ".join(each.sentences)}
    if each.final is not None:
        before, after = data["original"].split(), each.final.split()
        pieces = []
        for kind, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
            parts = [["same", before[a:b]]] if kind == "equal" else [["del", before[a:b]], ["ins", after[c:d]]]
            pieces += [[name, " ".join(words)] for name, words in parts if words]
        data["diff"] = pieces
    return data | _reply(each)


def _reply(each: Sample) -> dict[str, str]:
    """The raw reply, who wrote it, and why it was dropped."""
    about, usage = each.about, each.about.get("usage") or {}
    words = [str(about[key]) for key in ("model", "prompt_version", "time") if about.get(key)]
    if usage.get("input_tokens"):
        words.append(f"{usage['input_tokens']} + {usage.get('output_tokens', 0)} tokens")
    if about.get("cost_usd"):
        words.append(f"${about['cost_usd']:.6f}")
    if about.get("copied_from"):
        words.append(f"copied from {about['copied_from']}")
    if about.get("text_only"):
        words.append(str(about["text_only"]))
    data = {"reply": each.reply, "reason": each.reason, "why": each.why, "about": " · ".join(words)}
    return {name: text for name, text in data.items() if text}


def _verdicts(result: Mapping[str, Any], row_of: Mapping[str, int]) -> dict[str, Any]:
    rows: dict[int, list] = {}
    for verdict in result["verdicts"]:
        if verdict["qid"] in row_of:
            rows.setdefault(row_of[verdict["qid"]], []).append([verdict["order"], verdict["winner"]])
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
    tenths = [Counter(min(10, int(10 * score + 0.5)) for score in scores) for scores in at]
    counts = [[counter[step] for step in range(11)] for counter in tenths]
    means = [mean(scores) if scores else None for scores in at]
    return {"name": name, "judges": judges, "rationales": len(rows), "counts": counts, "means": means}


def reward_model_curve(inputs: Inputs) -> list[dict[str, Any]]:
    """A curve for `plots.draw_curve` by round, if a reward model has scored some: the mean score of the sentences in
    training, and the reference Teacher's of the same ones. [] for fewer than two rounds, or without problems."""
    given, by_reference = {}, {}
    used = [(each.number, [one for one in each.samples if one.scores and not one.reason]) for each in inputs.rounds]
    by_model = any(one.about.get("teacher") == MODEL for _, samples in used for one in samples)
    for number, samples in used if by_model and inputs.problems else ():
        if samples:
            given[number + 1] = mean(score for one in samples for score in one.scores)
            judged = (reference.score_sentences(inputs.problems[one.qid], one.sentences) for one in samples)
            by_reference[number + 1] = mean(score for scores in judged for score in scores)
    if len(given) < 2:
        return []
    lines = [
        {"label": label, "x": [], "y": [], "epoch_x": list(found), "epoch_y": list(found.values())}
        for label, found in (("in training", given), ("reference Teacher", by_reference))
    ]
    title = "Sentence score, by a reward model in training"
    return [{"name": "reward_model", "title": title, "xlabel": "round", "rounds": [], "lines": lines}]


def dropped_counts(rounds: Sequence[Round], corrections: Sequence[Sample]) -> list[dict[str, Any]]:
    """Replies that could not be used, by reason, per round and for the corrections."""
    counts = []
    for name, many in [*((f"RL round {each.number}", each.samples) for each in rounds), ("corrections", corrections)]:
        if many:
            reasons = Counter(one.reason for one in many if one.reason)
            counts.append({"name": name, "total": len(many), "reasons": dict(reasons.most_common())})
    return counts
