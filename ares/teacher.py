"""Answering a questions folder with a Teacher: what haiku.py and haiku_for_correction_feedback.py have in common.

Every item (`ares.feedback.Item`) without a usable reply is asked, identical rationales of a question once. A reply is
on disk before the next thing happens: `reply.json` (who wrote it, tokens, dollars), then `output_from_llm.txt`, then
the scores read from it. So a killed run loses the requests in flight, and the same command goes on with the rest.
Two Teachers: Claude (ares/claude.py) and the offline reference (ares/reference.py). Leaves out batches, budgets and a
cache across runs. Needs no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ares import cli, feedback, reference
from ares.asking import CORRECT, SCORE, Reply, Request, Teacher, custom_id
from ares.claude import DEFAULT_MODEL, PRICES_DATE, ClaudeTeacher, api_key
from ares.feedback import Item, Refused
from ares.problems import Problems, find_dataset, load_problems, question_images

__all__ = [
    "CORRECT", "SCORE", "ClaudeTeacher", "ReferenceTeacher", "Reply", "Report", "Request", "Teacher",
    "add_teacher_flags", "answer_items", "check_teacher_flags", "in_words", "load_for", "make_teacher", "read_reply",
    "refuse_unusable",
]  # fmt: skip

PREPARE = {
    SCORE: "bash preprocessing_after_RL/processing_sentence_level_feedback.sh --questions_dir",
    CORRECT: "python preprocessing_for_correction_feedback.py --correction_dir",
}
NOTHING_TO_ASK = frozenset(("no_rationale", "no_sentences"))  # no Teacher can answer: RL drops them in any case


class ReferenceTeacher:
    """Scores and corrects from the question's own gold texts: free, offline, deterministic (ares/reference.py)."""

    name = "reference"
    model = reference.VERSION
    concurrency = 8  # answers come one after the other; their writes to disk overlap

    async def __aenter__(self) -> ReferenceTeacher:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def answer(self, request: Request) -> Reply:
        """The reply in the form that Claude is asked for."""
        began = time.monotonic()
        if request.kind == SCORE:
            scores = reference.score_sentences(request.problem, request.sentences)
            lines = (f'"{text}": {score}' for text, score in zip(request.sentences, scores, strict=True))
            text = "{\n" + ",\n".join(lines) + "\n}"
        else:
            rationale = " ".join(request.sentences)
            final = reference.correct_rationale(request.problem, rationale)
            both = {"Original rationale": rationale, "Final rationale": final}
            text = json.dumps(both, indent=0, ensure_ascii=False)
        return Reply(text, self.name, self.model, "end_turn", seconds=round(time.monotonic() - began, 3))


# -- flags -----------------------------------------------------------------------------------------------


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """Who is asked, and how often."""
    group = parser.add_argument_group("teacher")
    group.add_argument(
        "--teacher",
        choices=("claude", "reference"),
        default="claude",
        help="claude: the API, key from ANTHROPIC_API_KEY; reference: offline, from the gold solution (no key)",
    )
    group.add_argument("--teacher_model", default=DEFAULT_MODEL, help="any model id (default: %(default)s)")
    group.add_argument("--base_url", metavar="URL", help="another address of the API, such as a gateway")
    group.add_argument("--concurrency", type=int, default=8, help="requests in flight (default: %(default)s)")
    group.add_argument(
        "--attempts", type=int, default=2, help="requests per item until its reply is usable (default: %(default)s)"
    )
    group.add_argument(
        "--accept-missing", action="store_true", help="go on although some replies are missing or unusable"
    )


def check_teacher_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse flags that would be ignored, and a missing key. `given`: `cli.given_flags` of the script's parser."""
    wrong = []
    if args.teacher == "reference":
        ignored = sorted(given & {"teacher_model", "base_url", "concurrency", "attempts"})
        wrong = [f"--{name} has no effect with --teacher reference; leave it out" for name in ignored]
    wrong += [f"--{name} must be at least 1" for name in ("concurrency", "attempts") if getattr(args, name) < 1]
    cli.refuse(wrong)
    if args.teacher == "claude":
        api_key()


def make_teacher(args: argparse.Namespace) -> Teacher:
    """The Teacher that the flags name. Raises UserError if the key is missing."""
    if args.teacher == "reference":
        return ReferenceTeacher()
    return ClaudeTeacher(args.teacher_model, args.base_url, args.concurrency)


def load_for(args: argparse.Namespace, items: Sequence[Item]) -> Problems | None:
    """The problems behind the items. Claude can do without problems.json (its requests are written): then None.

    Raises UserError if an item's question is not among them.
    """
    if args.teacher == "claude" and not Path(args.data_root).is_dir():
        return None
    problems = load_problems(args.data_root, find_dataset(args.data_root, args.dataset))
    unknown = next((item for item in items if item.qid not in problems), None)
    if unknown:
        raise cli.UserError(
            f"--data_root: question {unknown.qid} ({unknown.folder}) is not in its problems.json; name the data of "
            "this run with --data_root and --dataset"
        )
    return problems


# -- answering -------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of the items. `unusable`: item -> reason, after all attempts."""

    total: int = 0
    kept: int = 0  # had a usable reply before
    answered: int = 0  # got one now
    copied: int = 0  # of these, from an identical rationale
    asked: int = 0  # requests sent
    text_only: int = 0  # items whose question names an image that is not there
    unusable: dict[Item, str] = field(default_factory=dict)
    usage: Counter[str] = field(default_factory=Counter)
    cost_usd: float | None = 0.0

    def blocking(self) -> dict[Item, str]:
        """The unusable ones that asking again might mend."""
        return {item: reason for item, reason in self.unusable.items() if reason not in NOTHING_TO_ASK}

    def add(self, reply: Reply) -> None:
        self.asked += 1
        self.usage.update(reply.usage)
        known = self.cost_usd is not None and reply.cost_usd is not None
        self.cost_usd = self.cost_usd + reply.cost_usd if known else None

    def summary(self) -> str:
        """One line: counts, tokens, dollars."""
        line = (
            f"{self.total} rationales: {self.kept} had a reply, {self.answered} answered now "
            f"({self.asked} requests, {self.copied} copies), {len(self.unusable)} unusable"
        )
        if self.usage:
            dollars = "price unknown" if self.cost_usd is None else f"${self.cost_usd:.4f} at {PRICES_DATE} prices"
            tokens_in, tokens_out = self.usage["input_tokens"], self.usage["output_tokens"]
            line += f"; {tokens_in:,} tokens in, {tokens_out:,} out, {dollars}"
        if self.text_only:
            line += f"; {self.text_only} asked without the image that the question names"
        return line


def answer_items(
    items: Sequence[Item],
    teacher: Teacher,
    kind: str,
    *,
    prompt_version: str,
    problems: Mapping[str, Mapping[str, Any]] | None = None,
    images_dir: Path | None = None,
    attempts: int = 2,
    action_settled: Callable[[int, Report], None] | None = None,
) -> Report:
    """Ask the Teacher for every item that has no usable reply.

    Args:
        kind: SCORE or CORRECT.
        problems: qid -> problem; the reference Teacher needs it.
        images_dir: where to look for images when the item's own folder holds none.
        attempts: requests per distinct rationale until a reply can be read; the last one stays beside the reason.
        action_settled: called as soon as no item of an action is waiting any more.

    Raises UserError if items have no request, and for what stops the Teacher; what is answered by then is kept.
    """
    run = _Run(teacher, kind, prompt_version, problems or {}, images_dir, attempts, action_settled)
    run.sort(items)
    asyncio.run(run.ask_all())
    return run.report


def in_words(reasons: Counter[str]) -> str:
    """`wrong_count 3, max_tokens 1`"""
    return ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())


def refuse_unusable(report: Report, accept_missing: bool) -> None:
    """Raise UserError, by reason, if asking again might mend replies and the user has not said to go on."""
    lost = Counter(report.blocking().values())
    if lost and not accept_missing:
        raise cli.UserError(
            f"{lost.total()} of {report.total} replies are unusable ({in_words(lost)}); run the same command again to "
            "ask for them anew, or add --accept-missing to go on without them"
        )


def read_reply(kind: str, folder: Path) -> list[float] | str:
    """What an item's reply says: scores (`score.txt` is written) or the corrected rationale.

    Raises Refused; the reason then stands in `refused.txt`.
    """
    if kind == SCORE:
        return feedback.read_scores(folder)
    try:
        reply = (folder / feedback.REPLY).read_bytes() if (folder / feedback.REPLY).exists() else None
        final = feedback.parse_correction(reply, " ".join(feedback.read_rationale(folder)))
    except Refused as refused:
        cli.write_text(folder / feedback.REASON, f"{refused}\n")
        raise
    (folder / feedback.REASON).unlink(missing_ok=True)
    return final


def _is_answered(kind: str, folder: Path) -> bool:
    if not feedback.has_reply(folder):
        return False
    reply, scores = folder / feedback.REPLY, folder / feedback.SCORES
    if kind == SCORE and scores.exists() and scores.stat().st_mtime_ns >= reply.stat().st_mtime_ns:
        return True  # read before, with success
    try:
        read_reply(kind, folder)
    except Refused as refused:
        return refused.reason == "unchanged"  # clear enough: the rationale stays as it is
    return True


class _Run:
    """One call of `answer_items`: items grouped by identical request, the groups asked, the replies laid down."""

    def __init__(self, teacher, kind, prompt_version, problems, images_dir, attempts, action_settled):
        self.teacher, self.kind, self.prompt_version = teacher, kind, prompt_version
        self.problems, self.images_dir = problems, images_dir
        self.attempts = attempts if teacher.name == "claude" else 1  # the reference would say the same again
        self.action_settled = action_settled or (lambda action, report: None)
        self.report = Report()
        self.groups: list[list[Item]] = []
        self.waiting: Counter[int] = Counter()
        self.failure: cli.UserError | None = None

    def sort(self, items: Sequence[Item]) -> None:
        """Tell answered from open items, and group the open ones. Raises UserError if one has no request."""
        self.report.total = len(items)
        answered: dict[bytes, Item] = {}
        groups: dict[bytes, list[Item]] = {}
        unprepared: list[Item] = []
        for item in cli.progress(items, desc="reading", unit="rationale"):
            self.waiting[item.action] += 1
            try:
                request = self.request(item)
            except Refused as refused:
                self.report.unusable[item] = refused.reason
                continue
            if request is None:
                unprepared.append(item)
                continue
            key = hashlib.sha256(f"{item.qid}\0{[path.name for path in request.images]}\0{request.text}".encode())
            if _is_answered(self.kind, item.folder):
                self.report.kept += 1
                answered.setdefault(key.digest(), item)
            else:
                groups.setdefault(key.digest(), []).append(item)
        if unprepared:
            raise cli.UserError(
                f"{len(unprepared)} of {len(items)} rationales have no {feedback.REQUEST} that fits them (first: "
                f"{unprepared[0].folder}); run `{PREPARE[self.kind]} {_root(unprepared[0])}` first"
            )
        for key, group in groups.items():
            if key in answered:
                self.copy(answered[key], group)
                self.report.answered += len(group)
                self.report.copied += len(group)
            else:
                self.groups.append(group)
        open_items = {item for group in self.groups for item in group}
        for item in items:
            if item not in open_items:
                self.settle(item)

    def request(self, item: Item) -> Request | None:
        """The request for an item; None if preprocessing has not written the one that fits its rationale.

        Raises Refused if the rationale holds nothing to ask about.
        """
        sentences = feedback.read_rationale(item.folder)
        if not sentences:
            raise Refused("no_sentences")
        try:
            text = (item.folder / feedback.REQUEST).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        if not all(sentence in text for sentence in sentences):
            return None  # of an earlier export
        return Request(
            custom_id=custom_id(self.kind, item.action, item.rank, item.qid),
            kind=self.kind,
            qid=item.qid,
            text=text,
            sentences=tuple(sentences),
            images=tuple(self.images(item)),
            problem=self.problems.get(item.qid),
        )

    def images(self, item: Item) -> list[Path]:
        own = question_images(item.folder.parent, item.qid)
        return own or (question_images(self.images_dir, item.qid) if self.images_dir else [])

    async def ask_all(self) -> None:
        """Work through the groups, `teacher.concurrency` at a time; at a failure, what is in flight comes home."""
        if not self.groups:
            return
        # no open list of requests: texts and images are read when their turn comes
        todo = iter(self.groups)
        with cli.progress(desc=self.teacher.name, total=len(self.groups), unit="request") as bar:
            async with self.teacher:
                workers = min(self.teacher.concurrency, len(self.groups))
                await asyncio.gather(*(self.work(todo, bar) for _ in range(workers)))
        if self.failure:
            cli.print0(f"stopped; {self.report.summary()}")
            raise self.failure

    async def work(self, todo: Iterator[list[Item]], bar: Any) -> None:
        for group in todo:
            if self.failure:
                return
            try:
                await self.ask(group)
            except cli.UserError as error:
                self.failure = self.failure or error
                return
            bar.update()
            dollars = "" if self.report.cost_usd is None else f"${self.report.cost_usd:.3f}"
            bar.set_postfix_str(f"{len(self.report.unusable)} unusable {dollars}".strip(), refresh=False)

    async def ask(self, group: list[Item]) -> None:
        """Ask about one rationale, at most `attempts` times, and give every item of the group the reply."""
        request = self.request(group[0])
        sidecar = {"prompt_version": self.prompt_version, "images": [path.name for path in request.images]}
        if not request.images and (request.problem or {}).get("image"):
            sidecar["text_only"] = "the question names an image that was not found"
            self.report.text_only += len(group)
        for attempt in range(1, self.attempts + 1):
            reply = await self.teacher.answer(request)
            self.report.add(reply)
            reason = await asyncio.to_thread(self.lay_down, group, reply, sidecar | {"attempt": attempt})
            if reason in (None, "unchanged"):
                self.report.answered += len(group)
                self.report.copied += len(group) - 1
                break
        else:
            self.report.unusable |= dict.fromkeys(group, reason)
        for item in group:
            self.settle(item)

    def lay_down(self, group: list[Item], reply: Reply, sidecar: dict[str, Any]) -> str | None:
        """Write the reply beside the first item and read it; the others get copies. Returns why it is unusable.

        Runs in a thread, so that the flushes to disk of several replies overlap.
        """
        folder = group[0].folder
        about = {key: value for key, value in asdict(reply).items() if key != "text"}
        about |= {"prices": PRICES_DATE, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | sidecar
        cli.write_json(folder / feedback.SIDECAR, about)
        cli.write_text(folder / feedback.REPLY, reply.text)  # last: it is what counts as answered
        reason = None
        try:
            read_reply(self.kind, folder)
        except Refused as refused:
            stopped = reply.stop_reason in ("max_tokens", "refusal")
            reason = reply.stop_reason if stopped else refused.reason
        if reason in (None, "unchanged"):
            self.copy(group[0], group[1:])
        return reason

    def copy(self, source: Item, targets: Sequence[Item]) -> None:
        """Give identical rationales the reply that is there."""
        if not targets:
            return
        reply = (source.folder / feedback.REPLY).read_bytes().decode("utf-8", errors="replace")
        sidecar_path = source.folder / feedback.SIDECAR
        sidecar = json.loads(sidecar_path.read_text(encoding="utf-8")) if sidecar_path.exists() else {}
        sidecar |= {"copied_from": f"{source.action}/p{source.rank}/{source.qid}", "cost_usd": 0.0}
        for item in targets:
            cli.write_json(item.folder / feedback.SIDECAR, sidecar)
            cli.write_text(item.folder / feedback.REPLY, reply)
            if self.kind == SCORE:
                feedback.read_scores(item.folder)

    def settle(self, item: Item) -> None:
        self.waiting[item.action] -= 1
        if not self.waiting[item.action]:
            self.action_settled(item.action, self.report)


def _root(item: Item) -> Path:
    return item.folder.parents[2]
