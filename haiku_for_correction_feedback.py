"""The Teacher corrects the RL model's rationales, and they become the solutions that SFT trains on.

    python haiku_for_correction_feedback.py --data_root data                      # Claude, ANTHROPIC_API_KEY
    python haiku_for_correction_feedback.py --data_root data --teacher reference  # offline, from the gold solutions

Reads `{correction_dir}/0/p0/{qid}/` (made by preprocessing_for_correction_feedback.py), writes the replies beside the
requests, and then `{data_root}/{dataset}/correction.json`: all problems, the solutions of the train questions replaced
by the corrected rationales. A reply that is empty, unusable or only says "unchanged" falls back to the rationale
itself. Run it again to go on: only what has no usable reply is asked. Leaves out sentence scores: haiku.py.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ares import cli, feedback, teacher
from ares.problems import find_dataset, find_images, load_problems, load_splits, split_qids
from ares.requests import read_rationales
from utils_prompt import PROMPT_VERSION


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_flags(parser)
    parser.add_argument("--train_split", default="train", help="split the rationales belong to (default: %(default)s)")
    parser.add_argument(
        "--correction_dir",
        default="preprocessing_after_RL/correction",
        help="folder of 0/p0/{qid}/ (default: %(default)s)",
    )
    parser.add_argument(
        "--rationales", metavar="FILE", help="the output of remove_sentence.py: says which questions must have a reply"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="what to write (default: {data_root}/{dataset}/correction.json)"
    )
    teacher.add_teacher_flags(parser)
    args = parser.parse_args(argv)
    teacher.check_teacher_flags(args, cli.given_flags(parser, argv))
    return args


def final_rationales(
    items: Sequence[feedback.Item], rationales: Mapping[str, str]
) -> tuple[dict[str, str], Counter[str], list[str]]:
    """(qid -> final rationale, counts of what became of them, qids without any reply).

    `rationales`: qid -> what was sent, also for questions without a folder.
    """
    folders = {item.qid: item.folder for item in items}
    final: dict[str, str] = {}
    counts: Counter[str] = Counter()
    missing = []
    for qid, rationale in rationales.items():
        if qid not in folders or not (folders[qid] / feedback.REPLY).exists():
            missing.append(qid)
            final[qid] = rationale
            continue
        try:
            final[qid] = teacher.read_reply(teacher.CORRECT, folders[qid])
            counts["unchanged" if final[qid] == rationale else "replaced"] += 1
        except feedback.Refused as refused:
            final[qid] = rationale
            counts["unchanged" if refused.reason == "unchanged" else f"fell back: {refused.reason}"] += 1
    return final, counts, missing


def corrected(problems: Mapping[str, Any], final: Mapping[str, str]) -> dict[str, Any]:
    """All problems, with the final rationales as solutions. An empty one teaches nothing: gold stays."""
    return {
        qid: {**problem, "solution": final[qid]} if final.get(qid, "").strip() else problem
        for qid, problem in problems.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    dataset = find_dataset(args.data_root, args.dataset)
    problems = load_problems(args.data_root, dataset)
    train_qids = split_qids(load_splits(args.data_root, dataset, problems), args.train_split, "--train_split")
    items = feedback.iter_items(args.correction_dir, 0)
    if not items:
        raise cli.UserError(
            f"--correction_dir: {args.correction_dir} holds no requests; run preprocessing_for_correction_feedback.py "
            "first, or name its --correction_dir"
        )
    outside = sorted({item.qid for item in items} - set(train_qids))
    if outside:
        raise cli.UserError(
            f"--correction_dir: {args.correction_dir} holds question {outside[0]}, which is not in --train_split "
            f"{args.train_split}; name the data and the split of this run"
        )
    try:
        rationales = {item.qid: " ".join(feedback.read_rationale(item.folder)) for item in items}
    except feedback.Refused as refused:
        raise cli.UserError(
            f"--correction_dir: {refused}; run preprocessing_for_correction_feedback.py again"
        ) from None
    if args.rationales:
        rationales = {**read_rationales(args.rationales, train_qids), **rationales}
    output = Path(args.output or Path(args.data_root) / dataset / "correction.json")
    cli.writable_dir(output.parent, "--output")

    report = teacher.answer_items(
        items,
        teacher.make_teacher(args),
        teacher.CORRECT,
        prompt_version=PROMPT_VERSION,
        problems=problems,
        images_dir=find_images(args),
        attempts=args.attempts,
    )
    cli.print0(f"{args.teacher}: {report.summary()}")

    final, counts, missing = final_rationales(items, rationales)
    if missing and not args.accept_missing:
        raise cli.UserError(
            f"{len(missing)} of {len(rationales)} questions have no reply (first: {missing[0]}), {output} is not "
            "written; prepare and ask for them, or add --accept-missing to keep their rationales as they are"
        )
    counts["fell back: no reply"] += len(missing)
    cli.write_json(output, corrected(problems, final))
    cli.print0(f"{output}: {teacher.in_words(+counts)} of {len(rationales)} rationales")
    left = len(train_qids) - len(rationales)
    if left:
        cli.warn0(f"{left} of {len(train_qids)} train questions have no rationale and keep their gold solution")


if __name__ == "__main__":
    cli.run(main)
