"""The items of one questions folder: which are answered, which requests are open, and how a reply is laid down.

A reply is on disk before the next thing happens: `reply.json` (who wrote it, tokens, dollars), then
`output_from_llm.txt`, then the scores read from it, then the cache. So a killed run loses the requests in flight, and
the same command goes on with the rest. Asks nobody: ares/teacher.py does, live or in batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ares import cli, feedback, images
from ares.asking import CORRECT, SCORE, Reply, Request, Teacher, Wording, custom_id
from ares.feedback import Item, Refused
from ares.prices import PRICES_DATE
from ares.problems import question_images
from ares.reply_cache import ReplyCache

PREPARE = {
    SCORE: "bash preprocessing_after_RL/processing_sentence_level_feedback.sh --questions_dir",
    CORRECT: "python preprocessing_for_correction_feedback.py --correction_dir",
}
NOTHING_TO_ASK = frozenset(("no_rationale", "no_sentences"))  # no Teacher can answer: RL drops them in any case
CUT_SHORT = ("max_tokens", "refusal", "model_context_window_exceeded")
REFUSED_REPLY = f"unusable_{feedback.REPLY}"  # reads well, but its stop reason says that it is not the whole reply
OURS = "teacher"  # {questions_dir}/teacher/: lock, spend log, batch records


@dataclass
class Report:
    """What became of the items. `unusable`: item -> reason, after all attempts."""

    total: int = 0
    kept: int = 0  # had a usable reply before
    answered: int = 0  # got one now
    copied: int = 0  # of these, from an identical rationale
    cached: int = 0  # of these, from the cache of earlier runs
    asked: int = 0  # replies received
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
        cached = f", {self.cached} from the cache" if self.cached else ""
        line = (
            f"{self.total} rationales: {self.kept} had a reply, {self.answered} answered now "
            f"({self.asked} requests, {self.copied} copies{cached}), {len(self.unusable)} unusable"
        )
        if self.usage:
            dollars = "price unknown" if self.cost_usd is None else f"${self.cost_usd:.4f} at {PRICES_DATE} prices"
            tokens_in, tokens_out = self.usage["input_tokens"], self.usage["output_tokens"]
            line += f"; {tokens_in:,} tokens in, {tokens_out:,} out, {dollars}"
        if self.text_only:
            line += f"; {self.text_only} asked without the image that the question names"
        return line


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


def is_answered(kind: str, folder: Path) -> bool:
    """Whether the folder's reply needs no asking again."""
    if not feedback.has_reply(folder):
        return False
    if kind == SCORE:
        with contextlib.suppress(FileNotFoundError):
            scores = os.stat(folder / feedback.SCORES)
            if scores.st_size and scores.st_mtime_ns >= os.stat(folder / feedback.REPLY).st_mtime_ns:
                return True  # read before, with success
    try:
        read_reply(kind, folder)
    except Refused as refused:
        return refused.reason == "unchanged"  # clear enough: the rationale stays as it is
    return True


def _reading(kind: str, text: str, sentences: Sequence[str]) -> list[float] | Refused | None:
    """The scores in a reply, None for a correction that can be used, or why it cannot."""
    try:
        if kind == SCORE:
            return feedback.parse_scores(text, list(sentences))
        feedback.parse_correction(text, " ".join(sentences))
    except Refused as refused:
        return None if refused.reason == "unchanged" else refused  # clear enough: the rationale stays as it is
    return None


def write_whole(path: str | os.PathLike, text: str, flush: bool = False) -> None:
    """Write a file in one step, in as few system calls as that takes: 50,000 items have four files each."""
    path = os.fspath(path)
    temporary = f"{os.path.dirname(path)}/.tmp-{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
    data = memoryview(text.encode("utf-8", errors="surrogateescape"))
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            while data:
                data = data[os.write(file, data) :]
            if flush:
                os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class Session:
    """Items grouped by identical request. `groups`: key -> the items that wait for one reply.

    Args:
        kind: SCORE or CORRECT.
        problems: qid -> problem; the reference Teacher needs it.
        images_dir: where to look for images when the item's own folder holds none.
        attempts: requests per distinct rationale until a reply can be read; the last one stays beside the reason.
        action_settled: called as soon as no item of an action is waiting any more.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        teacher: Teacher,
        kind: str,
        wording: Wording,
        *,
        problems: Mapping[str, Mapping[str, Any]] | None = None,
        images_dir: Path | None = None,
        attempts: int = 3,
        cache: ReplyCache | None = None,
        action_settled: Callable[[int, Report], None] | None = None,
    ):
        self.root, self.real_root = Path(root), os.path.join(os.path.realpath(root), "")
        self.teacher, self.kind, self.wording = teacher, kind, wording
        self.problems, self.images_dir = problems or {}, images_dir
        self.attempts = attempts if teacher.name == "claude" else 1  # the reference would say the same again
        self.cache = cache or ReplyCache(None)
        self.action_settled = action_settled or (lambda action, report: None)
        self.report = Report()
        self.groups: dict[str, list[Item]] = {}
        self.waiting: Counter[int] = Counter()
        self._answered: dict[str, Item] = {}
        self._text_only: set[Path] = set()
        self._inside: dict[Path, bool] = {}

    # -- what is open ----------------------------------------------------------------------------------------

    def add(self, items: Sequence[Item], serve: bool = True) -> None:
        """Tell answered from open items, and group the open ones. Raises UserError if one has no request.

        With `serve`, replies that are known already (`known`) are laid down at once.
        """
        self.report.total += len(items)
        self.waiting.update(item.action for item in items)
        unprepared: list[Item] = []
        settled: list[Item] = []
        for item in cli.progress(items, desc="reading", unit="rationale"):
            try:
                request = self.request(item)
            except Refused as refused:
                self.report.unusable[item] = refused.reason
                settled.append(item)
                continue
            if request is None:
                unprepared.append(item)
                continue
            key = self.teacher.key(request)
            if is_answered(self.kind, item.folder):
                self.report.kept += 1
                self._answered.setdefault(key, item)
                settled.append(item)
            else:
                self.groups.setdefault(key, []).append(item)
        if unprepared:
            raise cli.UserError(
                f"{len(unprepared)} of {len(items)} rationales have no {feedback.REQUEST} that fits them (first: "
                f"{unprepared[0].folder}); run `{PREPARE[self.kind]} {self.root}` first"
            )
        if serve:
            self._serve_known()
        for item in settled:
            self._settle(item)

    def request(self, item: Item) -> Request | None:
        """The request for an item; None if preprocessing has not written the one that fits its rationale.

        Raises Refused if the rationale holds nothing to ask about, UserError if a link leads out of the folder.
        """
        self._contained(item.folder)
        sentences = feedback.read_rationale(item.folder)
        if not sentences:
            raise Refused("no_sentences")
        text = self._text(item)
        if text is None or not all(sentence in text for sentence in sentences):
            return None  # not there, or of an earlier export
        return Request(
            custom_id=custom_id(self.kind, item.action, item.rank, item.qid),
            kind=self.kind,
            qid=item.qid,
            text=text,
            sentences=tuple(sentences),
            images=tuple(self.images(item)),
            problem=self.problems.get(item.qid),
            form_note=self.wording.structured.get(self.kind, ""),
        )

    def images(self, item: Item) -> list[Path]:
        """Image files beside the request, else those of --images. Raises UserError for a link that leads out."""
        names = [name for name in os.listdir(item.folder) if _IMAGE_NAME.fullmatch(name)]
        if not names:
            return question_images(self.images_dir, item.qid) if self.images_dir else []
        names.sort(key=lambda name: (name != feedback.IMAGE, len(name), name))  # image.png, choice_0.png, choice_1.png
        for name in names:
            if os.path.islink(item.folder / name) and not images.inside(item.folder / name, self.real_root):
                raise cli.UserError(
                    f"{item.folder / name} is a link that leads out of {self.root}; put the image there"
                )
        return [item.folder / name for name in names]

    def _contained(self, folder: Path) -> None:
        """Raises UserError if a link on the way to an item's folder leads out of the questions folder."""
        parent = folder.parent
        if parent not in self._inside:
            self._inside[parent] = os.path.realpath(parent).startswith(self.real_root)
        if not self._inside[parent] or os.path.islink(folder) and not images.inside(folder, self.real_root):
            raise cli.UserError(f"{folder} is a link that leads out of {self.root}; put the folder itself there")

    def _text(self, item: Item) -> str | None:
        path = os.path.join(item.folder, feedback.REQUEST)
        try:  # no link is followed: it could send any file of this machine
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise cli.UserError(f"cannot read {path} ({error.strerror})") from None
        try:
            data = b"".join(iter(lambda: os.read(file, 1 << 20), b""))
        finally:
            os.close(file)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return None

    def known(self, key: str) -> bool:
        """Whether a reply lies in the folder or in the cache: nothing to pay."""
        return key in self._answered or self.cache.has(key)

    def _serve_known(self) -> None:
        """Groups whose reply is in the folder or in the cache already."""
        for key in [key for key in self.groups if key in self._answered]:
            group = self.groups.pop(key)
            self._copy(self._answered[key], group)
            self.report.answered += len(group)
            self.report.copied += len(group)
            for item in group:
                self._settle(item)
        known = [key for key in self.groups if self.cache.has(key)]
        with ThreadPoolExecutor(8) as pool:  # the flushes to disk overlap
            for key, served in zip(known, pool.map(self._from_cache, known), strict=True):
                if served:
                    group = self.groups[key]
                    self.report.cached += 1
                    self.report.copied += len(group) - 1
                    self.finish(key, None)

    def _from_cache(self, key: str) -> bool:
        entry = self.cache.get(key)
        if entry is None:
            return False
        group = self.groups[key]
        text = entry.pop("text")
        reading = _reading(self.kind, text, feedback.read_rationale(group[0].folder))
        if isinstance(reading, Refused):  # the rules of reading have changed since
            return False
        entry.pop("key")
        self._write(group[0].folder, text, entry | {"from_cache": key[:16], "cost_usd": 0.0}, reading)
        self._copy(group[0], group[1:])
        return True

    # -- replies ---------------------------------------------------------------------------------------------

    def start(self, key: str) -> tuple[Request, dict[str, Any]]:
        """The request of a group, and what its sidecar says besides the reply."""
        group = self.groups[key]
        request = self.request(group[0])
        sidecar = {"prompt_version": self.wording.version, "images": [path.name for path in request.images]}
        if not request.images and (request.problem or {}).get("image"):
            sidecar["text_only"] = "the question names an image that was not found"
            self._text_only.update(item.folder for item in group)
            self.report.text_only = len(self._text_only)
        return request, sidecar

    def ask_again(self, request: Request, refused: Refused) -> Request:
        """The request with the reason told to the model, and more room if it ran out."""
        more = 2 if refused.reason == "max_tokens" else 1
        return dataclasses.replace(
            request, again=self.wording.again.format(reason=refused), room=min(8, request.room * more)
        )

    def lay_down(self, key: str, request: Request, reply: Reply, sidecar: Mapping[str, Any]) -> Refused | None:
        """Write the reply beside the group's first item and read it; the others get copies. Returns why it is useless.

        Safe in a thread, so that the flushes to disk of several replies overlap.
        """
        group = self.groups[key]
        about = {name: getattr(reply, name) for name in _SIDECAR_FIELDS}
        about |= {"prices": PRICES_DATE, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | sidecar
        folder = group[0].folder
        refused = _reading(self.kind, reply.text, request.sentences)
        incomplete = reply.stop_reason == "refusal" or (reply.stop_reason in CUT_SHORT and self.kind == CORRECT)
        if not isinstance(refused, Refused) and incomplete:
            cli.write_text(folder / REFUSED_REPLY, reply.text)
            (folder / feedback.REPLY).unlink(missing_ok=True)
            (folder / feedback.SCORES).unlink(missing_ok=True)
            write_whole(folder / feedback.REASON, f"{reply.stop_reason}\n")
            return Refused(reply.stop_reason)
        self._write(folder, reply.text, about, refused)
        if isinstance(refused, Refused):
            return Refused(reply.stop_reason, str(refused)) if reply.stop_reason in CUT_SHORT else refused
        self.cache.put(key, reply.text, about)
        self._copy(group[0], group[1:])
        return None

    def finish(self, key: str, reason: str | None) -> None:
        """A group is answered (reason None) or given up."""
        group = self.groups.pop(key)
        if reason is None:
            self.report.answered += len(group)
            self._answered[key] = group[0]
        else:
            self.report.unusable |= dict.fromkeys(group, reason)
        for item in group:
            self._settle(item)

    def _write(self, folder: Path, text: str, about: Mapping[str, Any], reading: list[float] | Refused | None) -> None:
        """Sidecar, reply (flushed to disk: from here on it counts as answered), what was read from it."""
        lines = (
            f"{json.dumps(name)}: {json.dumps(value)}" for name, value in about.items()
        )  # `indent` is slow Python
        with open(f"{folder}/{feedback.SIDECAR}", "wb", buffering=0) as file:  # counts only with the reply after it
            file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())
        write_whole(f"{folder}/{feedback.REPLY}", text, flush=True)
        if isinstance(reading, Refused):
            (folder / feedback.SCORES).unlink(missing_ok=True)
            write_whole(folder / feedback.REASON, f"{reading}\n")
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{folder}/{feedback.REASON}")
        if reading is not None:
            with open(
                f"{folder}/{feedback.SCORES}", "wb", buffering=0
            ) as file:  # read again if a kill leaves it empty
                file.write("".join(f"{score}\n" for score in reading).encode())

    def _copy(self, source: Item, targets: Sequence[Item]) -> None:
        """Give identical rationales the reply that is there."""
        if not targets:
            return
        reply = (source.folder / feedback.REPLY).read_bytes().decode("utf-8", errors="replace")
        try:
            sidecar = json.loads((source.folder / feedback.SIDECAR).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            sidecar = {}
        sidecar |= {"copied_from": f"{source.action}/p{source.rank}/{source.qid}", "cost_usd": 0.0}
        for item in targets:
            reading = _reading(self.kind, reply, feedback.read_rationale(item.folder))
            self._write(item.folder, reply, sidecar, reading)

    def _settle(self, item: Item) -> None:
        self.waiting[item.action] -= 1
        if not self.waiting[item.action]:
            self.action_settled(item.action, self.report)


_IMAGE_NAME = re.compile(r"image\.png|choice_\d+\.png")
_SIDECAR_FIELDS = tuple(each.name for each in dataclasses.fields(Reply) if each.name != "text")
