"""The Teacher scores every sentence of the rationales that RL exported.

    python haiku.py --questions_dir RL_models/<run>/questions                      # Claude, ANTHROPIC_API_KEY
    python haiku.py --questions_dir RL_models/<run>/questions --teacher reference  # offline, from the gold solutions

Reads `{questions_dir}/{k}/p{rank}/{qid}/input_for_llm.txt` and the images beside it (made by
preprocessing_after_RL/processing_sentence_level_feedback.sh), writes `output_from_llm.txt`, `reply.json` and
`score.txt`, and `{k}/llm_done.txt` once an action is answered, which lets RL go on. Run it again to go on after a
kill, a spend limit or unusable replies: only what has no usable reply is asked. Leaves out the corrections before SFT:
haiku_for_correction_feedback.py.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ares import cli, feedback, teacher
from ares.problems import find_images
from utils_prompt import PROMPT_VERSION


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_flags(parser)
    parser.add_argument(
        "--questions_dir", default="preprocessing_after_RL", help="folder of {k}/p{rank}/{qid}/ (default: %(default)s)"
    )
    parser.add_argument("--actions", type=int, nargs="+", metavar="K", help="only these actions (default: all found)")
    parser.add_argument("--no-done", action="store_true", help=f"write no {feedback.DONE}: RL is told by hand")
    teacher.add_teacher_flags(parser)
    args = parser.parse_args(argv)
    teacher.check_teacher_flags(args, cli.given_flags(parser, argv))
    return args


def find_items(args: argparse.Namespace) -> list[feedback.Item]:
    """The exported rationales of the wanted actions. Raises UserError if there are none."""
    items = feedback.iter_items(args.questions_dir)
    found = sorted({item.action for item in items})
    if not found:
        inner = Path(args.questions_dir) / "questions"
        fix = f"did you mean {inner}?" if inner.is_dir() else "copy {run}/questions/* there, or name {run}/questions"
        raise cli.UserError(f"--questions_dir: {args.questions_dir} holds no exported rationales; {fix}")
    absent = [action for action in args.actions or [] if action not in found]
    if absent:
        raise cli.UserError(f"--actions: {args.questions_dir} has no action {absent[0]}; it has {found}")
    return [item for item in items if not args.actions or item.action in args.actions]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    exported = feedback.exported(args.questions_dir)  # before the listing: what is listed is then complete
    items = find_items(args)
    problems = teacher.load_for(args, items)

    def settled(action: int, report: teacher.Report) -> None:
        lost = Counter(reason for item, reason in report.blocking().items() if item.action == action)
        if args.no_done or (lost and not args.accept_missing):
            return
        if exported:
            feedback.mark_done(args.questions_dir, action)
            dropped = f"; RL will drop {lost.total()} ({teacher.in_words(lost)})" if lost else ""
            cli.print0(f"action {action}: done, {feedback.DONE} written{dropped}")

    report = teacher.answer_items(
        items,
        teacher.make_teacher(args),
        teacher.SCORE,
        prompt_version=PROMPT_VERSION,
        problems=problems,
        images_dir=find_images(args),
        attempts=args.attempts,
        action_settled=settled,
    )
    cli.print0(f"{args.teacher}: {report.summary()}")
    if not exported and not args.no_done:
        cli.print0(
            f"no {feedback.EXPORTED} in {args.questions_dir}: the export may go on, so no {feedback.DONE} is written; "
            f"run this again after it, or touch {{run}}/questions/{{k}}/{feedback.DONE} when all is copied back"
        )
    teacher.refuse_unusable(report, args.accept_missing)


if __name__ == "__main__":
    cli.run(main)
