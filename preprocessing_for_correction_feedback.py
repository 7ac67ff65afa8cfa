"""Requests for the Teacher: one per training question, to correct the RL model's rationale before SFT.

    python preprocessing_for_correction_feedback.py --data_root data \\
        --rationales RL_models/<run>/0/remove_repetitive_sentences.json

Writes `{correction_dir}/0/p0/{qid}/` with the rationale, `input_for_llm.txt` and the question's images. It may run
again at any time: files that are there stay untouched; a reply to another rationale (of the last round) is renamed to
`older_...`. haiku_for_correction_feedback.py then asks the Teacher. Needs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

from ares import cli, files
from ares.data_folder import read_data_folder
from teacher import handoff
from teacher.prompts import asks_other, correction_request


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    cli.add_data_flags(parser)
    parser.add_argument("--train_split", default="train", help="split the rationales belong to (default: %(default)s)")
    parser.add_argument("--rationales", metavar="FILE", required=True, help="the output of remove_sentence.py")
    folder = "where the requests go (default: %(default)s)"
    parser.add_argument("--correction_dir", default="preprocessing_after_RL/correction", help=folder)
    parser.add_argument("--strict", action="store_true", help="stop when an image that a question names is absent")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    data = read_data_folder(args.data_root, args.dataset)
    train_qids = data.split(args.train_split, "--train_split")
    rationales = handoff.read_rationales(args.rationales, train_qids)
    # one line per rationale file entry: the collator collapses white space anyway
    rationales = {qid: " ".join(text.split()) for qid, text in rationales.items()}
    files.writable_dir(args.correction_dir, "--correction_dir")
    if len(rationales) < len(train_qids):
        cli.print0(f"note: {args.rationales} covers {len(rationales)} of {len(train_qids)} train questions")
    images = handoff.images_of_questions(args, data.problems, list(rationales))
    set_aside = 0
    for qid, rationale in cli.progress(rationales.items(), desc="requests", unit="question"):
        folder = handoff.question_dir(args.correction_dir, 0, 0, qid)
        handoff.refuse_links(folder)
        known = None
        with contextlib.suppress(handoff.Refused):
            known = handoff.read_rationale(folder)
        other = asks_other(handoff.request_text(folder) or "", data.problems[qid])  # of other data with this id
        if known != [rationale] or other:  # the whole text as one entry: no part of it can be lost in splitting
            set_aside += handoff.set_reply_aside(folder)
            handoff.write_rationale(folder, [rationale])
        handoff.write_request(folder, correction_request(data.problems[qid], rationale), images[qid])
    if set_aside:
        cli.print0(f"{set_aside} replies to older rationales set aside (older_{handoff.REPLY})")
    cli.print0(
        f"{len(rationales)} requests in {args.correction_dir}, {sum(map(bool, images.values()))} with images; "
        f"next: python haiku_for_correction_feedback.py --correction_dir {args.correction_dir} "
        f"--rationales {args.rationales}"
    )


if __name__ == "__main__":
    cli.run(main)
