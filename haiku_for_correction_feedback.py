"""The Teacher corrects the RL model's rationales, and they become the solutions that SFT trains on.

    python haiku_for_correction_feedback.py --data_root data                      # Claude, ANTHROPIC_API_KEY
    python haiku_for_correction_feedback.py --data_root data --batch              # half the price, within a day
    python haiku_for_correction_feedback.py --data_root data --estimate           # what it would cost
    python haiku_for_correction_feedback.py --data_root data --teacher reference  # offline, from the gold solutions

Reads `{correction_dir}/0/p0/{qid}/` (made by preprocessing_for_correction_feedback.py), writes the replies beside the
requests, and then `{data_root}/{dataset}/correction.json`: all problems, the solutions of the train questions replaced
by the corrected rationales. Where a reply is empty, unusable or only says "unchanged", the rationale itself is used.
Run it again to continue: it asks only for what has no usable reply.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from ares import cli, files
from ares.data_folder import find_images, read_data_folder
from teacher import client, estimate, handoff, reply_files
from teacher.data_check import refuse_other_data
from teacher.interface import CORRECT
from teacher.prompts import CORRECTION_WORDING


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    cli.add_data_flags(parser)
    parser.add_argument("--train_split", default="train", help="split the rationales belong to (default: %(default)s)")
    folder = "folder of 0/p0/{qid}/ (default: %(default)s)"
    parser.add_argument("--correction_dir", default="preprocessing_after_RL/correction", help=folder)
    rationales = "the output of remove_sentence.py: says which questions must have a reply"
    parser.add_argument("--rationales", metavar="FILE", help=rationales)
    output = "what to write (default: {data_root}/{dataset}/correction.json)"
    parser.add_argument("--output", metavar="FILE", help=output)
    client.add_teacher_flags(parser)
    args = parser.parse_args(argv)
    client.check_teacher_flags(args, cli.given_flags(parser, argv))
    return args


def read_corrections(
    items: Sequence[handoff.Item], rationales: Mapping[str, str]
) -> tuple[dict[str, str], Counter[str], list[str]]:
    """Read every reply: qid -> the corrected rationale, or the original one; how often each was "replaced",
    "unchanged" or "fell back: {reason}"; the questions without a reply.

    `rationales`: qid -> what was sent, also for questions without a folder.
    """
    folders = {item.qid: item.folder for item in items}
    final, counts, missing = dict(rationales), Counter(), []
    for qid, rationale in rationales.items():
        folder = folders.get(qid)
        if folder is None or not os.path.lexists(folder / handoff.REPLY):
            if folder and (folder / handoff.REFUSED_REPLY).exists():  # cut off, though it can be read
                word = reply_files.reason_of(folder).partition(":")[0].strip() or "cut off"
                counts[f"fell back: {word}"] += 1
            else:
                missing.append(qid)
            continue
        try:
            final[qid] = reply_files.read_reply(CORRECT, folder)
            counts["unchanged" if final[qid] == rationale else "replaced"] += 1
        except handoff.Refused as refused:
            counts["unchanged" if refused.reason == "unchanged" else f"fell back: {refused.reason}"] += 1
    return final, counts, missing


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance of two word sequences; bit-parallel (Myers 1999, in Hyyro's form of 2003)."""
    if not a:
        return len(b)
    where: dict[str, int] = {}
    for index, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << index
    full, top = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = full, 0, len(a)  # vertical differences of +1 and -1 in the current column
    for word in b:
        match = where.get(word, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        right, left = down | ~(diagonal | up) & full, up & diagonal
        distance += bool(right & top) - bool(left & top)
        right = (right << 1 | 1) & full
        left = (left << 1) & full
        up, down = (left | ~(diagonal | right)) & full, right & diagonal
    return distance


def read_requests(args: argparse.Namespace, train_qids: Sequence[str]) -> tuple[list[handoff.Item], dict[str, str]]:
    """The prepared items, and qid -> rationale of all questions that must have a reply. Raises UserError."""
    again = "run preprocessing_for_correction_feedback.py"
    where = f"--correction_dir: {args.correction_dir} holds"
    items = handoff.iter_items(args.correction_dir, 0)
    if not items:
        raise cli.UserError(f"{where} no requests; {again} first, or name its --correction_dir")
    if outside := sorted({item.qid for item in items} - set(train_qids)):
        split = f"--train_split {args.train_split}; name the data and the split of this run"
        raise cli.UserError(f"{where} question {outside[0]}, which is not in {split}")
    try:
        rationales = {item.qid: " ".join(handoff.read_rationale(item.folder)) for item in items}
    except handoff.Refused as refused:
        raise cli.UserError(f"--correction_dir: {refused}; {again} again") from None
    wanted = handoff.read_rationales(args.rationales, train_qids) if args.rationales else {}
    other = [qid for qid in rationales if qid in wanted and wanted[qid].split() != rationales[qid].split()]
    if other:
        raise cli.UserError(
            f"--rationales: {len(other)} requests in {args.correction_dir} are about other rationales than "
            f"{args.rationales} holds (first: question {other[0]}); {again} --rationales {args.rationales} "
            f"--correction_dir {args.correction_dir} first"
        )
    return items, {**wanted, **rationales}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    data = read_data_folder(args.data_root, args.dataset)
    problems, train_qids = data.problems, data.split(args.train_split, "--train_split")
    items, rationales = read_requests(args, train_qids)
    refuse_other_data(items, problems, args)
    output = Path(args.output or data.root / data.dataset / "correction.json")

    more = {"wording": CORRECTION_WORDING, "problems": problems, "images_dir": find_images(args)}
    if args.estimate or args.show:
        session = client.make_session(args.correction_dir, client.make_teacher(args), CORRECT, args, **more)
        return estimate.preview(session, items, args)
    files.writable_dir(output.parent, "--output")
    with client.work_in(args.correction_dir, "--correction_dir", args) as each:
        session = client.make_session(args.correction_dir, each, CORRECT, args, **more)
        report = client.answer_items(session, items, args)
    cli.print0(f"{args.teacher}: {report.summary()}")
    if args.submit_only:
        return
    final, counts, missing = read_corrections(items, rationales)
    if missing and not args.accept_missing:
        raise cli.UserError(
            f"{len(missing)} of {len(rationales)} questions have no reply (first: {missing[0]}), {output} is not "
            "written; prepare and ask for them, or add --accept-missing to keep their rationales as they are"
        )
    counts["fell back: no reply"] += len(missing)
    # the gold solution stays where the rationale is empty
    corrected = {qid: {**problems[qid], "solution": text} for qid, text in final.items() if text.strip()}
    files.write_json(output, {qid: corrected.get(qid, problem) for qid, problem in problems.items()})
    line = f"{output}: {client.in_words(+counts)} of {len(rationales)} rationales"
    pairs = [(rationales[qid].split(), text.split()) for qid, text in final.items() if text != rationales[qid]]
    if pairs:
        edits, words = mean(edit_distance(*pair) for pair in pairs), mean(len(before) for before, _ in pairs)
        line += f"; mean edit distance of the replaced ones {edits:.1f} words of {words:.1f}"
    cli.print0(line)
    if left := len(train_qids) - len(rationales):
        cli.warn0(f"{left} of {len(train_qids)} train questions have no rationale and keep their gold solution")


if __name__ == "__main__":
    cli.run(main)
