"""What preprocessing lays out for the Teacher: the request's text and the question's images, beside each rationale.

Shared by the two preprocessing scripts and by haiku_for_correction_feedback.py. Asks nobody anything; the words of a
request are in utils_prompt.py. Standard library only.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ares import cli, files
from ares.data_folder import find_images, question_images
from ares.predictions import read_predictions
from teacher import handoff
from teacher.handoff import REASON, REPLY, REQUEST, SCORES, SIDECAR, form
from teacher.reply_files import REFUSED_REPLY


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


def write_request(folder: str | os.PathLike, text: str) -> bool:
    """Write the request's text; False if it was there already."""
    path = Path(folder) / REQUEST
    if request_text(folder) == text:
        return False
    files.write_text(path, text, flush=False)
    return True


def request_text(folder: str | os.PathLike) -> str | None:
    """The request's text as it lies there, None if there is none or it is not UTF-8.

    No link is followed: it could send any file of this machine. Raises UserError for a link, a FIFO or the like.
    """
    path = os.path.join(folder, REQUEST)
    try:
        return files.read_shared(path).decode("utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    except OSError as error:
        raise cli.UserError(f"cannot read {path} ({error.strerror})") from None


def prepare_request(folder: str | os.PathLike, text: str, sentences: Sequence[str], images: Sequence[Path]) -> bool:
    """Lay out one rationale's request; True if the reply to an older rationale had to be set aside."""
    handoff.refuse_links(folder)
    before = (request_text(folder) or "") if os.path.lexists(Path(folder, REQUEST)) else None
    outdated = before is not None and form(sentences) not in before  # the words around the form may be others
    aside = outdated and set_reply_aside(folder)
    place_images(folder, images)
    write_request(folder, text)  # last: its presence says "ready"
    return aside


def place_images(folder: str | os.PathLike, images: Sequence[Path]) -> None:
    """Put the images into the folder under their own names: hard links where the disk allows, copies elsewhere."""
    for image in images:
        files.place_file(image, Path(folder, image.name))


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
