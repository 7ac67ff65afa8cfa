"""Requests for the Teacher: beside every rationale that RL exported, the text to ask with and the question's images.

    bash preprocessing_after_RL/processing_sentence_level_feedback.sh --problems scienceqa --data_root data
    bash preprocessing_after_RL/processing_sentence_level_feedback.sh --questions_dir RL_models/<run>/questions

Reads `{questions_dir}/{k}/p{rank}/{qid}/rationale_from_mm_cot.txt`, writes `input_for_llm.txt`, `image.png` and choice
images beside it. It may run again at any time, also while RL exports: files that are there stay untouched. A reply
to an older rationale (of the last round, in this folder) is renamed to `older_...`. haiku.py then asks the Teacher.
Needs no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares import cli  # noqa: E402
from ares.data_folder import read_data_folder  # noqa: E402
from teacher import handoff  # noqa: E402
from teacher.data_check import refuse_other_data  # noqa: E402
from teacher.prompts import scoring_request  # noqa: E402


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    cli.add_data_flags(parser)
    parser.add_argument("--problems", metavar="{scienceqa,aokvqa}", help="the released name of --dataset")
    folder = "folder of {k}/p{rank}/{qid}/ (default: %(default)s)"
    parser.add_argument("--questions_dir", default="preprocessing_after_RL", help=folder)
    parser.add_argument("--strict", action="store_true", help="stop when a named image or a rationale is unusable")
    args = parser.parse_args(argv)
    if args.problems and args.dataset and args.problems != args.dataset:
        cli.refuse([f"--problems {args.problems} and --dataset {args.dataset} mean the same flag; give one"])
    args.dataset = args.dataset or args.problems
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    items = handoff.exported_items(args.questions_dir)
    problems = read_data_folder(args.data_root, args.dataset).problems
    refuse_other_data(items, problems, args)
    images = handoff.images_of_questions(args, problems, list(dict.fromkeys(item.qid for item in items)))
    unusable, outdated = [], set()
    set_aside = 0
    for item in cli.progress(items, desc="requests", unit="rationale"):
        try:
            sentences = handoff.read_rationale(item.folder)
            if not sentences:
                raise handoff.Refused("no_sentences", f"{item.folder / handoff.RATIONALE} holds none")
        except handoff.Refused as refused:
            if args.strict:
                raise cli.UserError(f"--strict: {refused}; export it again") from None
            unusable.append(refused)
            continue
        text = scoring_request(problems[item.qid], sentences)
        if handoff.prepare_request(item.folder, text, sentences, images[item.qid]):
            set_aside += 1
            outdated.add(item.action)
    for action in outdated:
        (Path(args.questions_dir) / str(action) / handoff.DONE).unlink(missing_ok=True)  # last round's signal
    if unusable:
        cli.warn0(f"{len(unusable)} rationales get no request, first: {unusable[0]}")
    if set_aside:
        cli.print0(f"{set_aside} replies to older rationales set aside (older_{handoff.REPLY})")
    pictured = sum(bool(images[item.qid]) for item in items)
    cli.print0(
        f"{len(items) - len(unusable)} requests in {args.questions_dir}, {pictured} with images; "
        f"next: python haiku.py --questions_dir {args.questions_dir}"
    )


if __name__ == "__main__":
    cli.run(main)
