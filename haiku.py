"""The Teacher scores every sentence of the rationales that RL exported.

    python haiku.py --questions_dir RL_models/<run>/questions                      # Claude, ANTHROPIC_API_KEY
    python haiku.py --questions_dir RL_models/<run>/questions --batch              # half the price, within a day
    python haiku.py --questions_dir RL_models/<run>/questions --together           # a request for each question
    python haiku.py --questions_dir RL_models/<run>/questions --estimate           # what it would cost
    python haiku.py --questions_dir RL_models/<run>/questions --teacher openai \\
        --base_url http://localhost:8000 --teacher_model MODEL                     # your own server (docs/teacher.md)
    python haiku.py --questions_dir RL_models/<run>/questions --teacher reference  # offline, from the gold solutions

Reads `{questions_dir}/{k}/p{rank}/{qid}/input_for_llm.txt` and the images beside it (made by
preprocessing_after_RL/processing_sentence_level_feedback.sh), writes `output_from_llm.txt`, `reply.json` and
`score.txt`, and `{k}/llm_done.txt` once an action is answered, which lets RL go on. Run it again to go on after a
kill, a spend limit or unusable replies: only what has no usable reply is asked. `--watch` works beside RL, round after
round of its `--epochs`, and writes the requests itself; it may be started before RL.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ares import cli, files
from ares.data_folder import find_images, question_images, read_data_folder
from teacher import client, estimate, handoff
from teacher.budget import Ledger
from teacher.interface import SCORE, Teacher
from teacher.prompts import WORDING, scoring_request
from teacher.session import OURS, Report, Session

HEARTBEAT = 60.0  # seconds between lines while --watch waits


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    cli.add_data_flags(parser)
    folder = "folder of {k}/p{rank}/{qid}/ (default: %(default)s)"
    parser.add_argument("--questions_dir", default="preprocessing_after_RL", help=folder)
    parser.add_argument("--actions", type=int, nargs="+", metavar="K", help="only these actions (default: all found)")
    parser.add_argument("--no-done", action="store_true", help=f"write no {handoff.DONE}; write it by hand")
    together = "ask about all open rationales of a question in one request: about half the price (docs/teacher.md)"
    parser.add_argument("--together", action="store_true", help=together)
    watch = "score while RL exports, in all rounds of its --epochs (at most this long; default: 72 hours)"
    parser.add_argument("--watch", type=float, nargs="?", const=72.0, metavar="HOURS", help=watch)
    parser.add_argument("--check", type=int, metavar="N", help="print how far two Teachers agree on N rationales")
    against = (
        "the second Teacher of --check: reference, a model of the same --teacher, claude:MODEL or openai:MODEL; "
        "apart: --together is compared with asking one by one, on N questions (default: reference)"
    )
    parser.add_argument("--against", metavar="MODEL", help=against)
    client.add_teacher_flags(parser)
    args = parser.parse_args(argv)
    given = cli.given_flags(parser, argv)
    apart = args.against == "apart"
    faults = {
        "--against needs --check": args.against and args.check is None,
        "--check must be at least 1": args.check is not None and args.check < 1,
        "--watch must be a number of hours above 0": args.watch is not None and not 0 < args.watch < math.inf,
        "--watch waits for all actions; leave out --actions": args.watch and args.actions,
        "--against apart: --teacher reference has no --together": apart and args.teacher == "reference",
        "--together is compared by --check N --against apart; add that, or leave it out": args.check is not None
        and args.together
        and not apart,
    }
    cli.refuse([fault for fault, found in faults.items() if found])
    args.against = args.against or "reference"
    client.check_teacher_flags(args, given)
    if apart:  # each has to be asked: neither may get the other's replies from the cache
        args.together = args.no_cache = True
    return args


def find_items(args: argparse.Namespace) -> list[handoff.Item]:
    """The exported rationales of the wanted actions. Raises UserError if there are none."""
    items = handoff.exported_items(args.questions_dir)
    found = sorted({item.action for item in items})
    absent = [action for action in args.actions or [] if action not in found]
    if absent:
        raise cli.UserError(f"--actions: {args.questions_dir} has no action {absent[0]}; it has {found}")
    return [item for item in items if item.action in (args.actions or found)]


def mark_done(args: argparse.Namespace, action: int, report: Report) -> None:
    """Write `llm_done.txt` for an action that waits for no reply, unless replies that RL needs are unusable."""
    lost = Counter(reason for item, reason in report.blocking().items() if item.action == action)
    if args.no_done or (lost and not args.accept_missing):
        return
    handoff.mark_done(args.questions_dir, action)
    dropped = f"; RL will drop {lost.total()} ({client.in_words(lost)})" if lost else ""
    cli.print0(f"action {action}: done, {handoff.DONE} written{dropped}")


class Watch:
    """Answers what RL exports, round after round, until the last one of its `--epochs` is answered.

    RL renames `questions/` once a round is trained and makes a new one, and refuses to start a run where it finds one:
    nothing is created there before RL has. `start(teacher)` makes the Session of a round.
    """

    def __init__(self, args: argparse.Namespace, start: Callable[[Teacher], Session]):
        self.args, self.start = args, start
        self.folder = Path(args.questions_dir)
        self.deadline = time.monotonic() + 3600 * args.watch
        self.next_line = 0.0

    def run(self) -> None:
        """Raises UserError for what stops the Teacher, for unusable replies at a round's end, and after the hours."""
        answered, ledger = None, None
        while True:
            while (folder := _identity(self.folder)) in (None, answered):
                self.wait("waiting for RL to make it" if folder is None else "answered; waiting for RL's next round")
            with client.work_in(self.folder, "--questions_dir", self.args, ledger) as each:
                session = self.start(each)
                whole = self.round(session, folder)
                ledger = getattr(each, "ledger", None)
            cli.print0(f"{self.args.teacher}: {session.report.summary()}")
            if not whole:
                continue
            client.refuse_unusable(session.report, self.args.accept_missing)
            answered = folder
            if not rounds_to_come(self.folder):
                return

    def round(self, session: Session, folder: Any) -> bool:
        """Answer one round's rationales as they come; False if RL has moved the folder away before its end."""
        known: dict[Path, set[str]] = {}  # {k}/p{rank} -> its questions
        report = session.report
        while True:
            exported = handoff.exported(self.folder)  # before the listing: what is listed is then complete
            exports = handoff.iter_items(self.folder)
            if _identity(self.folder) != folder:
                return False
            items = [item for item in exports if item.qid not in known.get(item.folder.parent, ())]
            handoff.refuse_unknown(items, session.problems)
            for item in items:
                known.setdefault(item.folder.parent, set()).add(item.qid)
                if sentences := _sentences(item):
                    images = question_images(session.images_dir, item.qid) if session.images_dir else []
                    request = scoring_request(session.problems[item.qid], sentences)
                    handoff.prepare_request(item.folder, request, sentences, images)
            if items:
                client.answer_items(session, items, self.args)
            if exported:
                for action in sorted(session.waiting):
                    mark_done(self.args, action, report)
                return True
            have = report.kept + report.answered
            self.wait(f"{have} of {report.total} rationales so far are answered; waiting for RL to export more")

    def wait(self, state: str) -> None:
        """Sleep for --poll_seconds, with a line now and then. Raises UserError when the hours are over."""
        now = time.monotonic()
        if now > self.deadline:
            raise cli.UserError(
                f"--watch: no {handoff.EXPORTED} within {self.args.watch:g} hours ({self.folder}: {state}); "
                "run this again to go on"
            )
        if now >= self.next_line:
            self.next_line = now + HEARTBEAT
            cli.print0(f"{time.strftime('%H:%M:%S')} watching {self.folder}: {state}")
        time.sleep(self.args.poll_seconds)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Tells a folder from a later one of its name; None if it is not there."""
    try:
        about = folder.stat()
    except OSError:
        return None
    return about.st_dev, about.st_ino


def rounds_to_come(questions: Path) -> bool:
    """Whether the RL run that `questions` belongs to has another round after the one it is at.

    By the run's args.yaml and its rollouts; False where there are none, as in a folder that was copied.
    """
    run = questions.absolute().parent
    try:
        flags = files.read_yaml(run / "args.yaml", "--questions_dir")
        first = int(Path(flags["base_model_dir"]).resolve().name) + 1 if flags.get("continue_train") else 0
        at = max(int(place.name.removeprefix("round_")) for place in (run / "rollouts").glob("round_*"))
        return at + 1 < first + int(flags["epochs"])
    except (OSError, ValueError, KeyError, TypeError, cli.UserError):
        return False


def check(args: argparse.Namespace, items: Sequence[handoff.Item], first: Session) -> None:
    """Print how far the Teacher of the flags and `--against` agree on `--check` rationales, and save it."""
    estimate.read_checks(Path(args.questions_dir) / OURS)  # before anything is paid for
    second_args, apart = client.second_teacher(args), args.against == "apart"
    itself = second_args.teacher == args.teacher and second_args.teacher_model in ("reference", args.teacher_model)
    if itself and not apart:
        raise cli.UserError(f"--against: {args.against} is the Teacher itself; name another")
    ledger = getattr(first.teacher, "ledger", None) or Ledger(Path(args.questions_dir) / OURS, args.max_usd)
    second = make_session(second_args, first.problems, client.make_teacher(second_args, ledger))
    if apart:
        chosen, places = whole_questions(items, args.check)
    else:
        askable = [item for item in items if _sentences(item)]
        chosen, places = random.Random(0).sample(askable, min(args.check, len(askable))), None
    scores = [estimate.scores_of(session, chosen) for session in (first, second)]
    names = [f"{each.teacher.name} {each.teacher.model}" for each in (first, second)]
    who = [f"{names[0]} together", f"{names[1]} apart"] if apart else names
    cli.print0(" against ".join(who))
    for line in estimate.agreement_lines(*scores, places):
        cli.print0(line)
    pairs = {item.name: pair for item, pair in zip(chosen, zip(*scores, strict=True), strict=True)}
    estimate.save_check(Path(args.questions_dir) / OURS, *who, estimate.agreement(*scores, places), pairs)


def whole_questions(items: Sequence[handoff.Item], count: int) -> tuple[list[handoff.Item], list[int]]:
    """(the distinct rationales of `count` questions that have several, the place of each among its question's, from
    1). Raises UserError if no question has."""
    questions: dict[tuple[int, str], dict[tuple[str, ...], handoff.Item]] = {}
    for item in items:
        if sentences := tuple(_sentences(item)):
            questions.setdefault((item.rank, item.qid), {}).setdefault(sentences, item)
    several = [list(each.values()) for each in questions.values() if len(each) > 1]
    if not several:
        raise cli.UserError("--against apart: no question has two different rationales; --together changes nothing")
    chosen = random.Random(0).sample(several, min(count, len(several)))
    return [item for each in chosen for item in each], [place for each in chosen for place in range(1, len(each) + 1)]


def _sentences(item: handoff.Item) -> list[str]:
    try:
        return handoff.read_rationale(item.folder)
    except handoff.Refused:
        return []


def make_session(args: argparse.Namespace, problems: Any, teacher: Teacher, exported: bool = False) -> Session:
    """The session of the questions folder; with `exported` it signals each action as soon as it is answered."""
    return client.make_session(
        args.questions_dir,
        teacher,
        SCORE,
        args,
        wording=WORDING,
        problems=problems,
        images_dir=find_images(args),
        together=args.together,
        action_settled=partial(mark_done, args) if exported else None,
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    exported = handoff.exported(args.questions_dir)  # before the listing: what is listed is then complete
    items = [] if args.watch else find_items(args)
    problems = None  # Claude can do without: its requests are written
    if args.teacher == "reference" or Path(args.data_root).is_dir():
        problems = read_data_folder(args.data_root, args.dataset).problems
        handoff.refuse_unknown(items, problems)
    elif args.watch or args.check:
        what = "--watch writes the requests itself and" if args.watch else "--check"
        raise cli.UserError(f"{what} needs problems.json; name its folder with --data_root")
    if args.estimate or args.show:
        return estimate.preview(make_session(args, problems, client.make_teacher(args)), items, args)
    if args.watch:
        return Watch(args, partial(make_session, args, problems)).run()
    with client.work_in(args.questions_dir, "--questions_dir", args) as each:
        session = make_session(args, problems, each, exported)
        if args.check:
            return check(args, items, session)
        client.answer_items(session, items, args)
    cli.print0(f"{args.teacher}: {session.report.summary()}")
    if args.submit_only:
        return None
    if not exported and not args.no_done:
        cli.print0(
            f"no {handoff.EXPORTED} in {args.questions_dir}: the export may go on, so no {handoff.DONE} is written; "
            f"run this again after it, or touch {{run}}/questions/{{k}}/{handoff.DONE} when all is copied back"
        )
    return client.refuse_unusable(session.report, args.accept_missing)


if __name__ == "__main__":
    cli.run(main)
