"""The questions folder, through which RL and the Teacher exchange files: names, order of writing, signals.

    {questions}/{k}/p{rank}/{qid}/       sample k of question `qid`, made by RL process `rank`; written in this order:
        rationale_from_mm_cot.txt        RL: the sentences, as the form that the Teacher fills in
        image.png, choice_0.png, ...     preprocessing: the question's images
        input_for_llm.txt                preprocessing: the request; written last, it says that the folder is ready
        reply.json                       Teacher: who replied, tokens, dollars
        output_from_llm.txt              Teacher: the raw reply; once it has content, the sample counts as answered
        score.txt | refused.txt          the scores read from the reply, one a line, or why it cannot be used
        older_*, unusable_*              a reply to an earlier rationale; a reply that was cut off, or that is about
                                         several rationales and has no certain part for this one
    {questions}/exported_questions.json      RL: digests of the questions (teacher/data_check.py)
    {questions}/mmcot_finished_signal.txt    RL: all rationales are exported
    {questions}/{k}/llm_done.txt             the Teacher's client or the user: sample k of every question is answered

A correction folder has the same files under `{correction}/0/p0/{qid}/`, without signals. Reading and writing replies
is in teacher/reply_files.py, the text of a request in teacher/prompts.py. Needs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ares import cli, files
from ares.data_folder import find_images, question_images
from ares.predictions import read_predictions
from teacher.parsing import Refused

RATIONALE = "rationale_from_mm_cot.txt"
IMAGE = "image.png"
REQUEST = "input_for_llm.txt"
SIDECAR = "reply.json"
REPLY = "output_from_llm.txt"
SCORES = "score.txt"
REASON = "refused.txt"
REFUSED_REPLY = f"unusable_{REPLY}"  # can be read, but was cut off, or is not about this rationale alone
EXPORTED = "mmcot_finished_signal.txt"
DONE = "llm_done.txt"
NUMBER = "0|[1-9][0-9]*"  # as folders are named

# Some file systems keep whole seconds (FAT two): a signal that looks this much older may be the newer one.
CLOCK_GRAIN_NS = 2_000_000_000

# -- folders ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One exported rationale: sample `action` of question `qid`, written by process `rank`."""

    questions: Path
    action: int
    rank: int
    qid: str

    @property
    def folder(self) -> Path:
        """Made on demand: 50,000 stored paths would take 40 MB."""
        return Path(self.questions, self.name)

    @property
    def name(self) -> str:
        """As records and copies name it."""
        return f"{self.action}/p{self.rank}/{self.qid}"


def question_dir(questions: str | os.PathLike, action: int, rank: int, qid: str) -> Path:
    """`{questions}/{action}/p{rank}/{qid}`. Raises UserError for an id that cannot be the name of a folder."""
    if not qid or qid in (".", "..") or "/" in qid or "\\" in qid or "\0" in qid:
        raise cli.UserError(f"question id {qid!r} cannot name a folder; rename it in problems.json and its splits")
    return Item(Path(questions), int(action), int(rank), qid).folder


def iter_items(questions: str | os.PathLike, action: int | None = None) -> list[Item]:
    """Every folder with a rationale, of one action or of all, sorted by action, rank and question id as numbers.

    Ignores everything else: `preprocessing_after_RL/` also holds scripts and `correction/`, and RL may still be
    exporting. Raises UserError for a folder that is a link out of `questions`.
    """
    root, items = Path(questions), []
    for number in sorted(map(int, _names(root, root, NUMBER))):
        if action not in (None, number):
            continue
        for rank in sorted(int(name[1:]) for name in _names(root / str(number), root, f"p({NUMBER})")):
            parent = root / str(number) / f"p{rank}"
            names = _names(parent, root, ".*")
            qids = [qid for qid in names if os.path.lexists(os.path.join(parent, qid, RATIONALE))]
            qids.sort(key=lambda qid: (0, int(qid), qid) if qid.isascii() and qid.isdigit() else (1, 0, qid))
            items += [Item(root, number, rank, qid) for qid in qids]
    return items


def exported_items(questions: str | os.PathLike) -> list[Item]:
    """All exported rationales. Raises UserError if there are none."""
    items = iter_items(questions)
    if not items:
        inner = Path(questions, "questions")
        fix = f"did you mean {inner}?" if inner.is_dir() else "copy {run}/questions/* there, or name {run}/questions"
        form = f"{{k}}/p{{rank}}/{{qid}}/{RATIONALE}"
        raise cli.UserError(f"--questions_dir: {Path(questions).absolute()} holds no {form}; {fix}")
    return items


def _names(folder: str | os.PathLike, root: str | os.PathLike, pattern: str) -> list[str]:
    """The names in a folder that match. Raises UserError if one of them is a link that leads out of `root`."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if re.fullmatch(pattern, entry.name, re.DOTALL)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    for entry in found:
        if entry.is_symlink():
            files.refuse_links(entry.path, root)
    return [entry.name for entry in found]


def refuse_links(folder: str | os.PathLike) -> None:
    """Raise UserError if a question's folder, or its p{rank} or {k}, is a link out of the questions folder."""
    files.refuse_links(folder, Path(folder).parents[2])


def write_if_changed(path: str | os.PathLike, text: str) -> None:
    """Write a file that can be made again, unless it holds `text` already: a round has 50,000 of each kind."""
    with contextlib.suppress(OSError, cli.UserError):
        if files.read_shared(path) == text.encode("utf-8", errors="replace"):
            return
    files.write_text(path, text, flush=False)


# -- the rationale ---------------------------------------------------------------------------------------


def form(sentences: Sequence[str]) -> str:
    """The sentences as the form that the Teacher fills in: `{`, `"sentence": xxx,` one a line, `}`.

    Nothing is escaped, as released. A line break inside a sentence becomes a blank: the form is read by lines.
    """
    lines = ['"' + re.sub(r"\r?\n", " ", sentence) + '": xxx' for sentence in sentences]
    return "\n".join(["{", *([",\n".join(lines)] if lines else []), "}"])


def write_rationale(folder: str | os.PathLike, sentences: Sequence[str]) -> None:
    """Write the sentences as `form` shows them, not flushed. Raises UserError for a `folder` behind a link."""
    refuse_links(folder)
    files.write_text(f"{folder}/{RATIONALE}", form(sentences) + "\n", flush=False)


def read_rationale(folder: str | os.PathLike) -> list[str]:
    """The sentences of a folder's rationale file, the inverse of `write_rationale`.

    Raises Refused("no_rationale") when the file is missing, unreadable or not in that form.
    """
    path = f"{folder}/{RATIONALE}"
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


def sentences_of(item: Item) -> list[str]:
    """The sentences of an item; [] where its rationale cannot be read."""
    try:
        return read_rationale(item.folder)
    except Refused:
        return []


# -- the request -----------------------------------------------------------------------------------------


def read_rationales(path: str | os.PathLike, train_qids: Sequence[str], flag: str = "--rationales") -> dict[str, str]:
    """The rationales of train questions in a predictions file, `{"preds": [...], "qids": [...]}`: qid -> text.

    By its `qids` where it has them (they may be a part of the split), else in split order and of equal length. Raises
    UserError naming `flag` for another form, another length, or a question outside the split.
    """
    found = read_predictions(path, flag, train_qids, "; name its own split with --train_split")
    fix = "in the train split; name what remove_sentence.py made of predictions_ans_train.json, and its --train_split"
    found.refuse_unknown(set(train_qids), flag, fix)
    return found.by_qid()


def images_of_questions(
    args: argparse.Namespace, problems: Mapping[str, Mapping[str, Any]], qids: Sequence[str]
) -> dict[str, list[Path]]:
    """qid -> its image files. Warns of images that are named but absent; with `args.strict` raises UserError."""
    images_dir = find_images(args)
    images = {qid: question_images(images_dir, qid) if images_dir else [] for qid in qids}
    absent = [qid for qid in qids if problems[qid]["image"] is not None and not images[qid]]
    if absent:
        where = images_dir or f"{args.data_root}/images or ./images"
        message = f"{len(absent)} of {len(qids)} questions name an image that is not under {where}, first {absent[0]}"
        if args.strict:
            raise cli.UserError(f"--strict: {message}; name the folder with --images")
        cli.warn0(f"{message}; they are asked as text only")
    return images


def prepare_request(folder: str | os.PathLike, text: str, sentences: Sequence[str], images: Sequence[Path]) -> bool:
    """Write one rationale's request; True if the reply to an older rationale had to be set aside."""
    refuse_links(folder)
    before = (request_text(folder) or "") if os.path.lexists(Path(folder, REQUEST)) else None
    outdated = before is not None and form(sentences) not in before  # the words around the form may be others
    aside = outdated and set_reply_aside(folder)
    write_request(folder, text, images)
    return aside


def write_request(folder: str | os.PathLike, text: str, images: Sequence[Path] = ()) -> None:
    """Write the images, then the text, which says that the folder is ready; what is there already stays untouched.

    Raises UserError for a link, a FIFO or the like in the place of the text, or for an image that is no regular file.
    """
    place_images(folder, images)
    if request_text(folder) != text:
        files.write_text(Path(folder) / REQUEST, text, flush=False)


def request_text(folder: str | os.PathLike) -> str | None:
    """The request's text, None if there is none or it is not UTF-8.

    No link is followed: it could send any file of this machine. Raises UserError for a link, a FIFO or the like.
    """
    path = os.path.join(folder, REQUEST)
    try:
        return files.read_shared(path).decode("utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    except OSError as error:
        raise cli.UserError(f"cannot read {path} ({error.strerror})") from None


def place_images(folder: str | os.PathLike, images: Sequence[Path]) -> None:
    """Put the images into the folder under their own names: hard links where the disk allows, copies elsewhere."""
    for image in images:
        files.place_file(image, Path(folder, image.name))


# -- the reply -------------------------------------------------------------------------------------------


def has_reply(folder: str | os.PathLike) -> bool:
    """Whether there is a reply. An empty file is none: `cp` makes one before it fills it."""
    try:
        return os.stat(os.path.join(folder, REPLY)).st_size > 0
    except OSError:
        return False


def progress_counts(questions: str | os.PathLike, action: int) -> tuple[int, int]:
    """(answered, total) of one action."""
    items = iter_items(questions, action)
    return sum(has_reply(item.folder) for item in items), len(items)


def set_reply_aside(folder: str | os.PathLike) -> bool:
    """Rename a reply that belongs to another rationale (`older_...`: it was paid for); False if there was none."""
    folder = Path(folder)
    (folder / REFUSED_REPLY).unlink(missing_ok=True)
    if not (folder / REPLY).exists():
        return False
    for name in (SIDECAR, REPLY):  # the reply last: it is what counts as answered
        if os.path.lexists(folder / name):
            os.replace(folder / name, folder / f"older_{name}")
    for name in (SCORES, REASON):
        (folder / name).unlink(missing_ok=True)
    return True


def read_refused(path: Path) -> dict[str, tuple[str, str]]:
    """key -> (reason, the API's sentence) of each request that the API has called invalid in a questions folder; {} if
    there is no such file. Skips damaged lines."""
    lines = files.read_jsonl(path, str(path), damaged=lambda number: None) if path.exists() else ()
    entries = [entry for _, entry in lines if isinstance(entry, dict) and isinstance(entry.get("key"), str)]
    return {entry["key"]: (str(entry.get("reason")), str(entry.get("said"))) for entry in entries}


# -- signals ---------------------------------------------------------------------------------------------


def mark_exported(questions: str | os.PathLike) -> None:
    """Signal that all rationales are exported. Call it once per export: it voids the answers to an earlier one.

    The file holds its own time, taken from the file system: a folder copied away and back (`cp -r` gives every copy
    a new mtime, in the order of copying) keeps the true time of the export. `llm_done.txt` files that are there
    already belong to something older and are removed. What this machine has exported is flushed to disk before.
    """
    files.flush_all()
    for action in _names(questions, questions, NUMBER):
        Path(questions, action, DONE).unlink(missing_ok=True)
    with files.atomic_path(Path(questions) / EXPORTED) as temporary:
        temporary.touch()
        temporary.write_text(json.dumps({"exported_ns": temporary.stat().st_mtime_ns}) + "\n")


def exported(questions: str | os.PathLike) -> bool:
    """Whether all rationales are exported."""
    return Path(questions, EXPORTED).exists()


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


def mark_done(questions: str | os.PathLike, action: int) -> None:
    """Signal that an action is answered, as the user does with `touch`; what was written is flushed before."""
    path = Path(questions, str(action), DONE)
    files.refuse_links(path.parent, questions)
    files.flush_all()
    files.touch(path)


def is_done(questions: str | os.PathLike, action: int) -> bool:
    """Whether an action's signal is there and not older than the export (`stale_signal` says which)."""
    return Path(questions, str(action), DONE).exists() and not stale_signal(questions, action)


def stale_signal(questions: str | os.PathLike, action: int) -> bool:
    """Whether `llm_done.txt` is there but older than the export: left from an earlier round, and ignored."""
    try:
        done_ns = os.stat(Path(questions, str(action), DONE)).st_mtime_ns
    except OSError:
        return False
    return done_ns + CLOCK_GRAIN_NS < export_time_ns(questions)


# -- waiting ---------------------------------------------------------------------------------------------


def wait_for_feedback(
    questions: str | os.PathLike,
    actions: Sequence[int],
    poll_seconds: float = 10.0,
    settle_seconds: float = 60.0,
) -> list[Item]:
    """Block until every action is signalled as done; return the items that have no reply (to be dropped).

    Looks at the disk every `poll_seconds`, and only for replies that were missing. If all signals are there but
    replies are missing (a copy by hand may bring `llm_done.txt` first), it waits until no new reply has come for
    `settle_seconds`. Several processes that wait on one folder may end seconds apart and see different replies: let
    one wait and broadcast the result.
    """
    actions = list(actions)
    waiting = [item for action in actions for item in iter_items(questions, action)]
    total, shown, settling = len(waiting), set(), False
    last_growth = time.monotonic()  # of the replies, or of the signals: both restart the settle time
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
                if hint not in shown:
                    shown.add(hint)
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
