"""The items of one questions folder: which have a reply, which requests are open, how a reply is saved.

A reply is written to disk first (teacher/reply_files.py), then to the cache. A killed run loses only the requests in
flight; the same command continues with the rest. Requests are sent by teacher/live.py or teacher/batches.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ares import cli, files
from ares.data_folder import question_images
from teacher import handoff, together
from teacher.budget import PRICES_DATE
from teacher.handoff import Item, Refused, request_text
from teacher.interface import (
    CORRECT,
    FREE,
    JUDGE,
    SCORE,
    Reply,
    Request,
    Teacher,
    Wording,
    custom_id,
    same_model,
)
from teacher.reply_files import ReplyCache, is_answered, read_sidecar, reading, set_cut_reply_aside, write_reply
from teacher.report import Report

PREPARE = {
    SCORE: "bash preprocessing_after_RL/processing_sentence_level_feedback.sh --questions_dir",
    CORRECT: "python preprocessing_for_correction_feedback.py --correction_dir",
    JUDGE: "python tools/win_rate.py ... --output",
}
CUT_SHORT = ("max_tokens", "refusal", "model_context_window_exceeded")
UNKNOWN = "unknown origin"  # a reply without reply.json: of the released code, or copied in by hand
OURS = "teacher"  # {questions_dir}/teacher/: lock, spend log, batch records
REFUSED = "refused.jsonl"  # there: requests that the API calls invalid, {"key", "reason", "said"} each
CHECKS = "check.json"  # there: what `haiku.py --check` has found
IMAGE_NAME = re.compile(r"image\.png|choice_\d+\.png")


class Session:
    """Groups items by identical request (`Teacher.key`): a request is sent once, its reply is copied to all its items.

    `open`: key -> items that have no reply yet; the reply is written beside the first one. `answered`: key -> an item
    that has the reply. `refused`: key -> (reason, the API's sentence) of a request that it called invalid, in an
    earlier run, too; such a request is given up without being sent. Items that are added later join an open request,
    get a copy of an answered one's reply, or open a request anew that was given up. With `together` the open requests
    about one question are sent as one (`units`), and each rationale's part of the reply is saved as the reply to its
    own request.

    Args:
        kind: SCORE, CORRECT or JUDGE.
        problems: qid -> problem; the reference Teacher needs it.
        images_dir: where to look for images when the item's own folder holds none.
        attempts: requests per distinct rationale until a reply can be read; the last one stays beside the reason.
        keep_replies: accept usable replies that another Teacher or model wrote (else `add` refuses them).
        together: send all open requests about a question, of one process of RL, as one.
        action_settled: called when no item of an action is waiting any more.
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
        keep_replies: bool = False,
        together: bool = False,
        action_settled: Callable[[int, Report], None] | None = None,
    ):
        self.root = Path(root)
        self.teacher, self.kind, self.wording = teacher, kind, wording
        self.problems, self.images_dir = problems or {}, images_dir
        self.free = teacher.name in FREE
        self.attempts = 1 if self.free else attempts  # it would say the same again
        self.cache = cache or ReplyCache(None)
        self.keep_replies, self.together = keep_replies, together
        self.action_settled = action_settled or (lambda action, report: None)
        self.report = Report()
        self.open: dict[str, list[Item]] = {}
        self.question: dict[str, str] = {}  # key -> what its request shares with others; only with `together`
        self.answered: dict[str, Item] = {}
        self.refused: dict[str, tuple[str, str]] = {}
        self.waiting: Counter[int] = Counter()  # action -> items without a reply

    # -- which requests are open -----------------------------------------------------------------------------

    def add(self, items: Sequence[Item], serve: bool = True) -> None:
        """Sort items into answered and open ones.

        With `serve`, what is known already (`known`) is saved at once. Raises UserError if an item has no request, or
        if another Teacher wrote usable replies, unless `keep_replies`.
        """
        report = self.report
        self.refused |= handoff.read_refused(self.root / OURS / REFUSED)
        report.total += len(items)
        settled: list[int] = []  # actions of items that need no request
        unprepared: list[Item] = []
        others: Counter[str] = Counter()  # who wrote replies that are not this Teacher's
        foreign = None
        for item in cli.progress(items, desc="reading", unit="rationale"):
            self.waiting[item.action] += 1
            try:
                request = self.request(item)
            except Refused as refused:
                report.unusable[item] = refused.reason
                settled.append(item.action)
                continue
            if request is None:
                unprepared.append(item)
            elif is_answered(self.kind, item.folder):
                report.kept += 1
                settled.append(item.action)
                author, ours, asked = self._written_by(item.folder)
                report.written_by[author] += 1
                if ours:
                    key = self.teacher.key(request)
                    self.answered.setdefault(key, item)
                    if not self.free and asked in (key, None):
                        self.teacher.accepted(request)
                else:
                    others[author] += 1
                    foreign = foreign or item
            else:
                report.text_only += _lacks_image(request)
                key = self.teacher.key(request)
                self.open.setdefault(key, []).append(item)
                if self.together and (shared := together.shared_text(request)) is not None:
                    question = dataclasses.replace(request, text=shared, sentences=())
                    self.question.setdefault(key, f"{item.rank} {item.qid} {self.teacher.key(question)}")
        if unprepared:
            raise cli.UserError(
                f"{len(unprepared)} of {len(items)} rationales have no {handoff.REQUEST} that fits them (first: "
                f"{unprepared[0].folder}); run `{PREPARE[self.kind]} {self.root}` first"
            )
        if others and not self.keep_replies:
            who = ", ".join(f"{name} ({count} of {len(items)})" for name, count in others.most_common())
            raise cli.UserError(
                f"{self.root} holds replies by {who}, not by {self.teacher.name} {self.teacher.model}; name another "
                f"folder, add --keep_replies to use them, or delete their {handoff.REPLY} (first: {foreign.folder})"
            )
        if serve:
            self._serve_known()
            for key in [key for key in self.open if key in self.refused]:
                self.give_up(key, *self.refused[key], permanent=True)
        for action in settled:
            self._settle(action)

    def request(self, item: Item) -> Request | None:
        """The request for an item; None if preprocessing has not written the one that fits its rationale.

        Raises Refused if the rationale holds nothing to ask about, UserError if a link leads out of the folder.
        """
        folder = item.folder
        files.refuse_links(folder, self.root)
        sentences = handoff.read_rationale(folder)
        if not sentences:
            raise Refused("no_sentences")
        text = request_text(folder)
        shown = [handoff.form(sentences)] if self.kind == SCORE else sentences
        if text is None or not all(part in text for part in shown):
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
            exact_note=self.wording.exact.get(self.kind, ""),
        )

    def images(self, item: Item) -> list[Path]:
        """Image files beside the request, else those of --images. Raises UserError for a link that leads out."""
        folder = item.folder
        names = [name for name in os.listdir(folder) if IMAGE_NAME.fullmatch(name)]
        names.sort(key=lambda name: (name != handoff.IMAGE, len(name), name))  # image.png, choice_0.png, choice_1.png
        paths = [folder / name for name in names]
        for path in paths:
            files.refuse_links(path, self.root)
            if not path.is_file():
                raise cli.UserError(f"{path} is no regular file; put the image there")
        return paths or (question_images(self.images_dir, item.qid) if self.images_dir else [])

    def _written_by(self, folder: Path) -> tuple[str, bool, str | None]:
        """(Teacher and model that wrote a folder's reply, whether that is this Teacher or unknown, the key of its
        request: None in replies of earlier versions, "" where the Teacher is unknown)."""
        about = read_sidecar(folder)
        name, model = about.get("teacher"), about.get("model")
        if not isinstance(name, str) or not isinstance(model, str):
            return UNKNOWN, True, ""
        asked = about.get("asked_model") == self.teacher.model  # a gateway may answer under another name
        ours = name == self.teacher.name and (asked or same_model(model, self.teacher.model))
        return f"{name} {model}", ours, about.get("key")

    def known(self, key: str) -> bool:
        """Whether the reply to an open request is in the folder or in the cache, or the API refuses it."""
        return key in self.refused or self._has_reply(key)

    def _has_reply(self, key: str) -> bool:
        return key in self.answered or self.cache.get(key) is not None

    def _serve_known(self) -> None:
        """Answer open requests by replies from the folder and from the cache."""
        known = [key for key in self.open if self._has_reply(key)]
        with ThreadPoolExecutor(8) as pool:  # the flushes to disk overlap
            for key, author in zip(known, pool.map(self._serve, known), strict=True):
                if author is not None:
                    self.report.copied += key in self.answered
                    self.report.cached += key not in self.answered
                    self.finish(key, author)

    def _serve(self, key: str) -> str | None:
        """Write a known reply to a request's items. Returns who wrote it, None if it can no longer be used."""
        first, *copies = self.open[key]
        if key in self.answered:
            source = self.answered[key]
            self._copy(source, [first, *copies])
            return self._written_by(source.folder)[0]
        entry = self.cache.get(key)
        text = entry.pop("text") if entry else ""
        read = reading(self.kind, text, handoff.read_rationale(first.folder))
        if isinstance(read, Refused):  # the rules of reading have changed since
            return None
        write_reply(first.folder, text, entry | {"from_cache": key[:16], "cost_usd": 0.0}, read)
        self._copy(first, copies)
        return f"{entry['teacher']} {entry.get('model')}" if "teacher" in entry else UNKNOWN

    def units(self, keys: Iterable[str] | None = None, alone: Collection[str] = ()) -> list[list[str]]:
        """The open requests, or those of `keys`, as they are sent: one by one, or with `together` those about a
        question as one, but for those in `alone`."""
        if keys is None:  # a free Teacher reads the texts of each question once
            keys = sorted(self.open, key=lambda key: self.open[key][0].qid) if self.free else list(self.open)
        if not self.together:
            return [[key] for key in keys]
        units: dict[str, list[str]] = {}
        for key in keys:
            units.setdefault(key if key in alone else self.question.get(key, key), []).append(key)
        return list(units.values())

    # -- replies ---------------------------------------------------------------------------------------------

    def join(self, requests: Sequence[Request], length_factor: int = 1, refused: Sequence[Refused] = ()) -> Request:
        """One request for those of a unit. `refused`: why the replies to it before could not be used; the reasons are
        added for the model, and the limit of the reply is doubled if one was cut off."""
        request = requests[0] if len(requests) == 1 else together.join(requests, self.wording)
        cut = any(each.reason == "max_tokens" for each in refused)
        reasons = "; ".join(dict.fromkeys(map(str, refused)))
        return dataclasses.replace(
            request,
            again=self.wording.again.format(reason=reasons) if refused else "",
            length_factor=min(8, length_factor * (2 if cut else 1)),
        )

    def prepare(self, key: str) -> tuple[Request, dict[str, Any]]:
        """An open request by itself, and what reply.json says besides the reply to it."""
        request = self.request(self.open[key][0])
        sidecar = {"prompt_version": self.wording.version, "images": [path.name for path in request.images]}
        if _lacks_image(request):
            sidecar["text_only"] = "the question names an image that was not found"
        return request, sidecar

    def save_replies(
        self, keys: Sequence[str | None], request: Request, reply: Reply, sidecars: Sequence[Mapping[str, Any]]
    ) -> dict[str, Refused]:
        """Save a reply to the request of a unit; returns why it cannot be used, for each rationale where it cannot.

        `keys`, `sidecars`: of each rationale of the request, in its order; None: its part is not wanted. A rationale
        without a part of its own gets the whole reply, under a name by which nothing reads it.
        """
        if len(keys) == 1:
            found = {keys[0]: self.save_reply(keys[0], request, reply, sidecars[0])}
            return {key: refused for key, refused in found.items() if refused}
        found = {}
        parts, shares = together.split(reply.text, len(keys)), together.shares(reply, len(keys))
        number = {"together": len(keys)}
        for key, sentences, part, share, sidecar in zip(
            keys, request.rationales, parts, shares, sidecars, strict=True
        ):
            if key is None:
                continue
            if isinstance(part, Refused):
                cut = reply.stop_reason in CUT_SHORT
                refused = Refused(reply.stop_reason, str(part)) if cut else part
                set_cut_reply_aside(self.open[key][0].folder, reply.text, str(refused))
            else:
                one = dataclasses.replace(request, sentences=sentences, rationales=())
                refused = self.save_reply(key, one, dataclasses.replace(share, text=part), sidecar | number)
            if refused:
                found[key] = refused
        return found

    def save_reply(self, key: str, request: Request, reply: Reply, sidecar: Mapping[str, Any]) -> Refused | None:
        """Write the reply beside the request's first item, copies beside the others. Returns why it cannot be used.

        Runs in a thread where the reply is flushed to disk, so that several flushes overlap.
        """
        first, *copies = self.open[key]
        about = {name: value for name, value in vars(reply).items() if name != "text"}
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        about |= {"asked_model": self.teacher.model, "key": key, "prices": PRICES_DATE, "time": now} | sidecar
        read = reading(self.kind, reply.text, request.sentences)
        incomplete = reply.stop_reason == "refusal" or (reply.stop_reason in CUT_SHORT and self.kind == CORRECT)
        if not isinstance(read, Refused) and incomplete:
            set_cut_reply_aside(first.folder, reply.text, reply.stop_reason)
            return Refused(reply.stop_reason)
        write_reply(first.folder, reply.text, about, read, paid=not self.free)
        if isinstance(read, Refused):
            return Refused(reply.stop_reason, str(read)) if reply.stop_reason in CUT_SHORT else read
        self.cache.put(key, reply.text, about)
        self._copy(first, copies)
        return None

    def finish(self, key: str, author: str) -> None:
        """All items of a request have their reply, by `author`: Teacher and model."""
        items = self.open.pop(key)
        self.answered.setdefault(key, items[0])
        self.report.answered += len(items)
        self.report.copied += len(items) - 1
        self.report.written_by[author] += len(items)
        for item in items:
            self._settle(item.action)

    def give_up(self, key: str, reason: str, said: str = "", permanent: bool = False) -> None:
        """No usable reply came to a request.

        `said`: the API's sentence, or what is wrong with the reply, without the API key; saved to `refused.txt`.
        `permanent`: the API called the request invalid; it is not sent again in later runs either.
        """
        if permanent and key not in self.refused:
            line = json.dumps({"key": key, "reason": reason, "said": said})
            files.append_line(self.root / OURS / REFUSED, line)
            self.refused[key] = reason, said
        items = self.open.pop(key)
        self.report.refused += len(items) * permanent
        self.report.unusable |= dict.fromkeys(items, reason)
        self.report.first.setdefault(reason, (items[0], said))
        text = f"{reason}: {said}\n" if said else f"{reason}\n"
        for item in items:
            files.write_text(item.folder / handoff.REASON, text, flush=False)
            self._settle(item.action)

    def fault(self, error: cli.UserError | OSError) -> cli.UserError:
        """An error of saving a reply, as one line."""
        if isinstance(error, cli.UserError):
            return error
        what = f"cannot write a reply below {self.root} ({error.strerror or error})"
        return cli.UserError(f"{what}; free some space, then run the same command again to go on")

    def _copy(self, source: Item, targets: Sequence[Item]) -> None:
        """Give the items the reply of an identical request."""
        if not targets:
            return
        reply = files.read_shared(source.folder / handoff.REPLY).decode("utf-8", errors="replace")
        sidecar = read_sidecar(source.folder)
        sidecar |= {"copied_from": source.name, "cost_usd": 0.0}
        for item in targets:
            read = reading(self.kind, reply, handoff.read_rationale(item.folder))
            write_reply(item.folder, reply, sidecar, read, paid=False)

    def _settle(self, action: int) -> None:
        self.waiting[action] -= 1
        if not self.waiting[action]:
            self.action_settled(action, self.report)


def _lacks_image(request: Request) -> bool:
    return not request.images and bool((request.problem or {}).get("image"))
