"""The Teacher's replies: scored samples of RL's rounds, corrections, dropped replies, tokens and cost.

Reads question folders (README "File formats") and only reads them: replies are parsed again. Needs no torch; token
rewards are computed in tokens.py.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ares import cli, files
from ares.cli import UserError
from teacher import budget, handoff
from teacher.corrections import parse_correction
from teacher.parsing import Refused, parse_scores
from teacher.reply_files import read_sidecar
from teacher.session import CHECKS, OURS


@dataclass
class Sample:
    """A rationale that the Teacher got, a sample of RL or one to correct, and its reply as it is on disk."""

    qid: str
    action: int
    sentences: list[str] = field(default_factory=list)
    reply: str | None = None
    about: dict[str, Any] = field(default_factory=dict)  # reply.json
    reason: str | None = None  # of a dropped reply, as one word
    why: str | None = None  # as a sentence
    final: str | None = None  # the corrected rationale
    scores: list[float] | None = None
    reward: float | None = None
    advantages: list[float] | None = None  # at each sentence's last token, before whitening
    tokens: dict[str, list] | None = None  # pieces, rewards, advantages
    second: list[float] | None = None  # scores by the other Teacher of `haiku.py --check`
    second_by: str = ""  # that Teacher
    name: str = ""  # its folder in the questions folder


@dataclass
class Round:
    """One round's samples and their questions folder."""

    number: int
    samples: list[Sample]
    folder: Path


def read_rounds(run: Path | None, questions: Path | None) -> list[Round]:
    """The rounds of a run folder, or the one of a questions folder. Raises UserError if there is nothing to read."""
    if questions is not None:
        folders = [questions]
        if not handoff.iter_items(questions):
            raise UserError(f"--questions_dir: {questions} holds no {{k}}/p{{rank}}/{{qid}} with a rationale")
    else:
        folders = sorted(run.glob("questions_round[0-9]*"), key=_number)
        folders += [run / "questions"] * (run / "questions").is_dir()
    rounds = [Round(_number(folder, len(folders) - 1), read_samples(folder), folder) for folder in folders]
    for each in rounds:
        add_second_teacher(each)
    for each in rounds if run is not None else ():
        add_training_view(each, run / f"samples_round_{each.number}.jsonl")
    return rounds


def _number(folder: Path, otherwise: int = 0) -> int:
    match = re.search(r"questions_round(\d+)$", folder.name)
    return int(match[1]) if match else otherwise


def read_samples(questions: Path) -> list[Sample]:
    """Every exported rationale of a questions folder with its parsed scores or the reason why there are none."""

    def parse(sample: Sample) -> None:
        sample.scores = parse_scores(sample.reply, sample.sentences)

    return _read(handoff.iter_items(questions), f"replies of {questions.name}", parse)


def read_corrections(folder: Path) -> list[Sample]:
    """Every request of a correction folder with its parsed answer. Raises UserError if there is none."""
    items = handoff.iter_items(folder, 0)
    if not items:
        raise UserError(f"--correction_dir: {folder} holds no 0/p0/{{qid}} with a rationale")

    def parse(sample: Sample) -> None:
        sample.final = parse_correction(sample.reply, " ".join(sample.sentences))

    return _read(items, "corrections", parse)


def _read(items: Sequence[handoff.Item], desc: str, parse: Callable[[Sample], None]) -> list[Sample]:
    """The items with their replies; a Refused that `parse` raises becomes the reason for which one was dropped."""
    samples = []
    for item in cli.progress(items, desc=desc, unit="reply"):
        sample = Sample(item.qid, item.action, about=read_sidecar(item.folder), name=item.name)
        with contextlib.suppress(OSError):
            sample.reply = files.read_shared(item.folder / handoff.REPLY).decode("utf-8", errors="replace")
        try:
            sample.sentences = handoff.read_rationale(item.folder)
            parse(sample)
        except Refused as refused:
            # the page is shared: no folder names of this machine
            sample.reason, sample.why = refused.reason, str(refused).replace(f"{item.folder}/", "")
        samples.append(sample)
    return samples


def add_training_view(each: Round, table: Path) -> None:
    """Add rewards and advantages of `samples_round_{n}.jsonl` to the samples, and samples without any sentence."""
    if not table.is_file():
        return
    by_key = {(sample.action, sample.qid): sample for sample in each.samples}
    for number, line in files.read_jsonl(table, "--run"):
        try:
            key = (int(line["action"]), str(line["qid"]))
            reward = float(line["reward"])
            texts = [str(one["text"]) for one in line["sentences"]]
            advantages = [float(one["advantage"]) for one in line["sentences"]]
            scores = [float(one["score"]) for one in line["sentences"]]  # as RL used them
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--run: {table}: line {number} is no sample of RL; move the file away") from None
        sample = by_key.get(key)
        if sample is None:
            sample = by_key[key] = Sample(key[1], key[0], texts)
            each.samples.append(sample)
        sample.reward, sample.advantages, sample.scores = reward, advantages, scores
        sample.reason = sample.why = None
    for sample in each.samples:
        if sample.advantages is None and sample.reason is None:
            sample.reason, sample.why = "late", "late: the reply arrived after RL had begun to train without it"


def add_second_teacher(each: Round) -> None:
    """Add the scores of the other Teacher, where `haiku.py --check` compared two on this questions folder."""
    path = each.folder / OURS / CHECKS
    if not path.is_file():
        return
    try:
        for check in files.read_json(path, "--run", dict, nan=True).values():
            for sample in each.samples:
                _, second = check["scores"].get(sample.name) or (None, None)
                if second and len(second) == len(sample.sentences):
                    sample.second, sample.second_by = list(map(float, second)), str(check["against"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"--run: {path} is damaged; delete it, or run `python haiku.py --check` again") from None


def scores_by_text(rounds: Sequence[Round]) -> dict[tuple[str, tuple[str, ...]], list[float]]:
    """(question id, sentences) -> the Teacher's scores, for stages that wrote a rationale that was scored."""
    return {
        (sample.qid, tuple(sample.sentences)): sample.scores
        for each in rounds
        for sample in each.samples
        if sample.scores and sample.sentences
    }


# -- cost ------------------------------------------------------------------------------------------------


def cost(name: str, abouts: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """Replies, models, tokens, dollars and time of one folder, from the sidecars and, for dollars, the spend log.

    The log also has the cost of unusable replies; `unknown_usd` is the most that requests without a known outcome
    cost. `began`, `ended`: time stamps of the first and last reply.
    """
    known = [about for about in abouts if about]
    usage: Counter[str] = Counter()
    for about in known:
        if "copied_from" not in about:
            usage.update({key: value for key, value in (about.get("usage") or {}).items() if isinstance(value, int)})
    dollars = [about.get("cost_usd") for about in known]
    log = budget.read_log(folder / OURS / budget.LOG)
    times = sorted(about["time"] for about in known if about.get("time")) or [None]
    usd = log.usd if log.requests else None if None in dollars else sum(dollars)
    return {
        "name": name,
        "replies": len(known),
        "asked": sum("copied_from" not in about for about in known),
        "models": sorted({str(about.get("model")) for about in known}),
        "tokens_in": usage["input_tokens"],
        "tokens_out": usage["output_tokens"],
        "usd": usd if known else None,
        "unknown_usd": log.unknown_usd,
        "began": times[0],
        "ended": times[-1],
    }
