"""The question folders through which the model and its Teacher hand each other files (SPEC 7).

    {questions}/{k}/p{rank}/{qid}/rationale_from_mm_cot.txt   written by RL
                                  input_for_llm.txt, image.png, choice_0.png ...   by preprocessing
                                  output_from_llm.txt          the Teacher's raw reply
                                  score.txt | refused.txt      what was read from it, or why nothing was
    {questions}/mmcot_finished_signal.txt   all rationales are out
    {questions}/{k}/llm_done.txt            action k is answered

Knows folders, signals and waiting; what is asked is laid out by teacher/requests.py, how a reply is read is in
teacher/parsing.py and teacher/corrections.py. Corrections use the same files under `{correction}/0/p0/{qid}/`, without
signals.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ares import cli, files
from teacher.corrections import parse_correction
from teacher.parsing import Refused, parse_scores, parse_verdict

__all__ = [
    "DONE", "EXPORTED", "IMAGE", "RATIONALE", "REASON", "REPLY", "REQUEST", "SCORES", "SIDECAR",
    "Item", "Items", "Refused", "exported", "form", "has_reply", "is_done", "iter_items", "mark_done", "mark_exported",
    "parse_correction", "parse_scores", "parse_verdict", "progress_counts", "question_dir", "read_rationale",
    "read_scores", "wait_for_feedback", "write_rationale",
]  # fmt: skip

RATIONALE = "rationale_from_mm_cot.txt"
REQUEST = "input_for_llm.txt"
IMAGE = "image.png"
REPLY = "output_from_llm.txt"
SIDECAR = "reply.json"  # who wrote the reply, and what it cost
SCORES = "score.txt"
REASON = "refused.txt"
EXPORTED = "mmcot_finished_signal.txt"
DONE = "llm_done.txt"

# Some file systems keep whole seconds (FAT two): a signal that looks this much older may be the newer one.
CLOCK_GRAIN_NS = 2_000_000_000


@dataclass(frozen=True)
class Item:
    """One exported rationale: sample `action` of question `qid`, written by process `rank`."""

    folder: Path
    action: int
    rank: int
    qid: str


class Items(Sequence[Item]):
    """Items in a row, about 20 bytes each; an Item is made when it is looked at (50,000 paths take 40 MB)."""

    def __init__(self, items: Iterable[Item] = ()):
        self._homes: list[tuple[Path, int, int]] = []  # folder above, action, rank
        self._number: dict[tuple[int, int, Path], int] = {}
        self._home = array("I")
        self._qids: list[str] = []
        for item in items:
            self.append(item)

    def append(self, item: Item) -> None:
        self.extend(item.folder.parent, item.action, item.rank, [item.qid])

    def extend(self, parent: Path, action: int, rank: int, qids: Sequence[str]) -> None:
        """Questions of one action and process."""
        number = self._number.setdefault((action, rank, parent), len(self._homes))
        if number == len(self._homes):
            self._homes.append((parent, action, rank))
        self._home.extend([number] * len(qids))
        self._qids.extend(map(sys.intern, qids))  # one text for all actions

    def __len__(self) -> int:
        return len(self._qids)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Items(self[number] for number in range(*index.indices(len(self))))
        parent, action, rank = self._homes[self._home[index]]
        return Item(parent / self._qids[index], action, rank, self._qids[index])


# -- folders ---------------------------------------------------------------------------------------------


def question_dir(questions: str | os.PathLike, action: int, rank: int, qid: str) -> Path:
    """`{questions}/{action}/p{rank}/{qid}`. Raises UserError for an id that is no plain folder name."""
    if not qid or qid in (".", "..") or "/" in qid or "\\" in qid or "\0" in qid:
        raise cli.UserError(f"question id {qid!r} cannot name a folder; rename it in problems.json and its splits")
    return Path(questions) / str(int(action)) / f"p{int(rank)}" / qid


def iter_items(questions: str | os.PathLike, action: int | None = None) -> Items:
    """Every folder with a rationale, by action, rank and question (numbers as numbers).

    Anything else beside them - scripts, `correction/`, a folder whose rationale is not there yet - is passed over:
    `preprocessing_after_RL/` holds its own scripts, and RL may still be exporting. Raises UserError for a folder that
    is a link out of `questions`.
    """
    items = Items()
    actions = _actions(questions)
    for number in sorted(actions) if action is None else [action] * (action in actions):
        folder = Path(questions, str(number))
        # exact: p1 is not p10
        ranks = _names(folder, questions, lambda name: name[:1] == "p" and _is_number(name[1:]))
        for rank in sorted(int(name[1:]) for name in ranks):
            parent = folder / f"p{rank}"
            names = _names(parent, questions, lambda name: True)
            qids = [qid for qid in names if os.path.lexists(os.path.join(parent, qid, RATIONALE))]
            items.extend(parent, number, rank, sorted(qids, key=_natural))
    return items


def _actions(questions: str | os.PathLike) -> list[int]:
    return [int(name) for name in _names(questions, questions, _is_number)]


def _names(folder: str | os.PathLike, root: str | os.PathLike, wanted: Callable[[str], bool]) -> list[str]:
    """The wanted names in a folder. Raises UserError if one of them is a link that leads out of `root`."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if wanted(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    for entry in found:
        if entry.is_symlink():
            files.refuse_links(entry.path, root)
    return [entry.name for entry in found]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name


def _natural(qid: str) -> tuple:
    return (0, int(qid), qid) if qid.isascii() and qid.isdigit() else (1, 0, qid)


def refuse_links(folder: str | os.PathLike) -> None:
    """Raise UserError if a question's folder, or its p{rank} or {k}, is a link out of the questions folder."""
    files.refuse_links(folder, Path(folder).parents[2])


# -- rationale files -------------------------------------------------------------------------------------


def form(sentences: Sequence[str]) -> str:
    """The sentences as the form that the Teacher fills: `{`, `"sentence": xxx,` one per line, `}`.

    Nothing is escaped, as released. A line break inside a sentence becomes a blank: the form is read by lines.
    """
    lines = [f'"{_one_line(sentence)}": xxx' for sentence in sentences]
    body = ",\n".join(lines) + "\n" if lines else ""
    return "{\n" + body + "}"


def write_rationale(folder: str | os.PathLike, sentences: Sequence[str]) -> None:
    """Write the sentences as `form` shows them. Raises UserError for a `folder` behind a link."""
    refuse_links(folder)
    files.write_text(Path(folder) / RATIONALE, form(sentences) + "\n")


def _one_line(sentence: str) -> str:
    return re.sub(r"\r?\n", " ", sentence)


def read_rationale(folder: str | os.PathLike) -> list[str]:
    """The sentences of a folder's rationale file, the inverse of `write_rationale`.

    Raises Refused("no_rationale") when the file is missing, unreadable or not in that form.
    """
    path = Path(folder) / RATIONALE
    try:
        # bytes, split at \n only: a sentence may hold \r or U+2028, which str.splitlines would break at
        text = files.read_shared(path).decode("utf-8").removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused("no_rationale", f"cannot read {path} ({error})") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) < 2 or lines[0].strip() != "{" or lines[-1].strip() != "}":
        raise Refused("no_rationale", f"{path} is not a list of sentences in braces")
    sentences = []
    for line in lines[1:-1]:
        match = re.fullmatch(r'\s*"(.*)": xxx,?\s*', line, re.DOTALL)
        if match is None:
            raise Refused("no_rationale", f'{path}: a line is not of the form "sentence": xxx - {line[:60]!r}')
        sentences.append(match[1])
    return sentences


# -- signals ---------------------------------------------------------------------------------------------


def mark_exported(questions: str | os.PathLike) -> None:
    """Say that all rationales are out. Call it once per export: answers of an earlier export are void from here on.

    The file holds its own time, taken from the file system: a folder copied away and back (`cp -r` gives every copy
    a new mtime, in the order of copying) keeps the true time of the export. `llm_done.txt` files that lie there
    already belong to something older and are removed.
    """
    for action in _actions(questions):
        Path(questions, str(action), DONE).unlink(missing_ok=True)
    with files.atomic_path(Path(questions) / EXPORTED) as temporary:
        temporary.touch()
        temporary.write_text(json.dumps({"exported_ns": temporary.stat().st_mtime_ns}) + "\n")


def exported(questions: str | os.PathLike) -> bool:
    """Whether all rationales are out."""
    return Path(questions, EXPORTED).exists()


def mark_done(questions: str | os.PathLike, action: int) -> None:
    """Say that an action is answered, as the user does with `touch`."""
    path = Path(questions, str(action), DONE)
    files.refuse_links(path.parent, questions)
    files.touch(path)


def is_done(questions: str | os.PathLike, action: int) -> bool:
    """Whether an action's signal is there and not older than the export (`stale_signal` tells the two apart)."""
    return Path(questions, str(action), DONE).exists() and not stale_signal(questions, action)


def stale_signal(questions: str | os.PathLike, action: int) -> bool:
    """Whether `llm_done.txt` is there but older than the export: left over, and ignored."""
    try:
        done_ns = os.stat(Path(questions, str(action), DONE)).st_mtime_ns
    except OSError:
        return False
    return done_ns + CLOCK_GRAIN_NS < export_time_ns(questions)


def export_time_ns(questions: str | os.PathLike) -> int:
    """When the export ended, in ns of the file system's clock: what the signal holds, or, made by `touch`, its mtime.

    0 before the export. Never later than the signal's own mtime: a copy is younger than what it copies.
    """
    path = Path(questions, EXPORTED)
    try:
        modified_ns = path.stat().st_mtime_ns
    except OSError:
        return 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, cli.UserError):
        return min(int(files.parse_json(files.read_shared(path).decode())["exported_ns"]), modified_ns)
    return modified_ns


# -- replies ---------------------------------------------------------------------------------------------


def read_scores(folder: str | os.PathLike) -> list[float]:
    """Scores of a folder's reply; written to `score.txt`, one per line.

    Raises Refused (see `teacher.parsing`) after writing the reason to `refused.txt` beside the reply.
    """
    folder = Path(folder)
    try:
        sentences = read_rationale(folder)
        try:
            reply = files.read_shared(folder / REPLY)
        except OSError as error:
            raise Refused("no_reply", f"no {REPLY} ({error.strerror})") from None
        scores = parse_scores(reply, sentences)
    except Refused as refused:
        if folder.is_dir():
            (folder / SCORES).unlink(missing_ok=True)
            if not has_reply(folder) and os.path.lexists(folder / REASON):
                raise  # the Teacher's client says there why no reply came
            files.write_text(folder / REASON, f"{refused}\n", flush=False)
        raise
    (folder / REASON).unlink(missing_ok=True)
    files.write_text(folder / SCORES, "".join(f"{score}\n" for score in scores), flush=False)
    return scores


def has_reply(folder: str | os.PathLike) -> bool:
    """Whether a reply lies there. An empty file is none: `cp` makes one before it fills it."""
    try:
        return os.stat(os.path.join(folder, REPLY)).st_size > 0
    except OSError:
        return False


def progress_counts(questions: str | os.PathLike, action: int) -> tuple[int, int]:
    """(answered, total) of one action."""
    items = iter_items(questions, action)
    return sum(has_reply(item.folder) for item in items), len(items)


# -- waiting ---------------------------------------------------------------------------------------------


def wait_for_feedback(
    questions: str | os.PathLike,
    actions: Sequence[int],
    poll_seconds: float = 10.0,
    settle_seconds: float = 60.0,
) -> list[Item]:
    """Block until every action is signalled as done; return the items that have no reply (to be dropped).

    Sleeps between looks at the disk, and looks again only at what was missing. With all signals there but replies
    missing (a hand copy may bring `llm_done.txt` first) it waits until the number of replies has not grown for
    `settle_seconds`. Several processes that wait on one folder may end seconds apart and see different replies: let
    one wait and tell the others.
    """
    actions = list(actions)
    waiting = [item for action in actions for item in iter_items(questions, action)]
    total, said = len(waiting), set()
    last_growth = time.monotonic()  # of the replies, or of the signals: both start the settling anew
    settling = False
    with cli.progress(desc="Waiting for the feedback", total=total, unit="reply") as bar:
        while True:
            missing = [item for item in waiting if not has_reply(item.folder)]
            done = [action for action in actions if is_done(questions, action)]
            if len(missing) < len(waiting) or settling != (len(done) == len(actions)):
                last_growth = time.monotonic()
            bar.update(len(waiting) - len(missing))
            bar.set_postfix_str(f"{len(done)} of {len(actions)} {DONE}", refresh=False)
            waiting, settling = missing, len(done) == len(actions)
            remaining = last_growth + settle_seconds - time.monotonic()
            if settling and (not waiting or remaining <= 0):
                break
            for hint in _hints(questions, actions, {item.action for item in waiting}):
                if hint not in said:
                    said.add(hint)
                    bar.clear()
                    cli.print0(hint)
            time.sleep(max(0.01, min(poll_seconds, remaining) if settling else poll_seconds))
    cli.print0(f"feedback: {total - len(waiting)} of {total} rationales answered")
    if waiting:
        cli.warn0(
            f"{len(waiting)} rationales without a reply are dropped (no new reply for {settle_seconds:g} s after "
            f"{DONE}); the first is {waiting[0].folder}"
        )
    return waiting


def _hints(questions: str | os.PathLike, actions: Sequence[int], unanswered: set[int]) -> Iterator[str]:
    """What a person at the terminal may have overlooked."""
    for action in actions:
        path = Path(questions, str(action), DONE)
        if stale_signal(questions, action):
            yield f"{path} is older than the export and ignored; touch it again once the replies are in"
        elif action not in unanswered and not path.exists():
            yield f"action {action} has all its replies; `touch {path}` to go on"
