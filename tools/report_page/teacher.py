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
from teacher.session import OURS


@dataclass
class Replied:
    """A reply as it is on disk; of a dropped one also the reason as one word, and `why` as a sentence."""

    reply: str | None = None
    reason: str | None = None
    why: str | None = None
    about: dict[str, Any] = field(default_factory=dict)  # reply.json

    def read(self, folder: Path, parse: Callable[[], None]) -> None:
        """Read reply.json and the reply, then `parse()`; a Refused that it raises becomes the reason."""
        self.about = read_sidecar(folder)
        with contextlib.suppress(OSError):
            self.reply = files.read_shared(folder / handoff.REPLY).decode("utf-8", errors="replace")
        try:
            parse()
        except Refused as refused:
            # the page is shared: no folder names of this machine
            self.reason, self.why = refused.reason, str(refused).replace(f"{folder}/", "")


@dataclass(kw_only=True)
class Sample(Replied):
    """One sampled rationale, its scores, and its reward and advantages in RL."""

    qid: str
    action: int
    sentences: list[str] = field(default_factory=list)
    scores: list[float] | None = None
    reward: float | None = None
    advantages: list[float] | None = None  # at each sentence's last token, before whitening
    tokens: dict[str, list] | None = None  # pieces, rewards, advantages


@dataclass(kw_only=True)
class Correction(Replied):
    """One rationale as it was sent and as the Teacher returned it."""

    qid: str
    original: str = ""
    final: str | None = None


@dataclass
class Round:
    """One round's samples and their questions folder."""

    number: int
    samples: list[Sample]
    folder: Path


def read_rounds(run: Path | None, questions: Path | None) -> list[Round]:
    """The rounds of a run folder, or the one of a questions folder. Raises UserError if there is nothing to read."""
    if questions is not None:
        if not handoff.iter_items(questions):
            raise UserError(f"--questions_dir: {questions} holds no {{k}}/p{{rank}}/{{qid}} with a rationale")
        return [Round(_number(questions), read_samples(questions), questions)]
    folders = sorted(run.glob("questions_round[0-9]*"), key=_number)
    if (run / "questions").is_dir():
        folders.append(run / "questions")
    rounds = [Round(_number(folder, len(folders) - 1), read_samples(folder), folder) for folder in folders]
    for each in rounds:
        add_training_view(each, run / f"samples_round_{each.number}.jsonl")
    return rounds


def _number(folder: Path, otherwise: int = 0) -> int:
    match = re.search(r"questions_round(\d+)$", folder.name)
    return int(match[1]) if match else otherwise


def read_samples(questions: Path) -> list[Sample]:
    """Every exported rationale of a questions folder with its parsed scores or the reason why there are none."""
    samples = []
    items = handoff.iter_items(questions)
    for item in cli.progress(items, desc=f"replies of {questions.name}", unit="reply"):
        sample = Sample(qid=item.qid, action=item.action)

        def parse(sample: Sample = sample, folder: Path = item.folder) -> None:
            sample.sentences = handoff.read_rationale(folder)
            sample.scores = parse_scores(sample.reply, sample.sentences)

        sample.read(item.folder, parse)
        samples.append(sample)
    return samples


def read_corrections(folder: Path) -> list[Correction]:
    """Every request of a correction folder with its parsed answer. Raises UserError if there is none."""
    items = handoff.iter_items(folder, 0)
    if not items:
        raise UserError(f"--correction_dir: {folder} holds no 0/p0/{{qid}} with a rationale")
    corrections = []
    for item in cli.progress(items, desc="corrections", unit="reply"):
        correction = Correction(qid=item.qid)

        def parse(correction: Correction = correction, folder: Path = item.folder) -> None:
            correction.original = " ".join(handoff.read_rationale(folder))
            correction.final = parse_correction(correction.reply, correction.original)

        correction.read(item.folder, parse)
        corrections.append(correction)
    return corrections


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
            sample = by_key[key] = Sample(qid=key[1], action=key[0], sentences=texts)
            each.samples.append(sample)
        sample.reward, sample.advantages, sample.scores = reward, advantages, scores
        sample.reason = sample.why = None
    for sample in each.samples:
        if sample.advantages is None and sample.reason is None:
            sample.reason, sample.why = "late", "late: the reply arrived after RL had begun to train without it"


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
    times = sorted(about["time"] for about in known if about.get("time"))
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
        "began": times[0] if times else None,
        "ended": times[-1] if times else None,
    }
