"""The Teacher scores every sentence of the rationales that RL exported.

    python haiku.py --questions_dir RL_models/<run>/questions                      # Claude, ANTHROPIC_API_KEY
    python haiku.py --questions_dir RL_models/<run>/questions --batch              # half the price, within a day
    python haiku.py --questions_dir RL_models/<run>/questions --together           # a request for each question
    python haiku.py --questions_dir RL_models/<run>/questions --estimate           # what it would cost
    python haiku.py --questions_dir RL_models/<run>/questions --teacher openai \\
        --base_url http://localhost:8000 --teacher_model MODEL                     # your own server (docs/teacher.md)
    python haiku.py --questions_dir RL_models/<run>/questions --teacher reference  # offline, from the gold solutions
    python haiku.py --questions_dir RL_models/<run>/questions --teacher model --reward_model DIR \\
        --ask_share 0.2 --ask uncertain                            # your own reward model, a fifth by Claude

Reads `{questions_dir}/{k}/p{rank}/{qid}/input_for_llm.txt` and the images beside it (made by
preprocessing_after_RL/processing_sentence_level_feedback.sh), writes `output_from_llm.txt`, `reply.json` and
`score.txt`, and `{k}/llm_done.txt` once an action is answered, which lets RL go on. Run it again to go on after a
kill, a spend limit or unusable replies: only what has no usable reply is asked. `--watch` works beside RL, round after
round of its `--epochs`, and writes the requests itself; it may be started before RL.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ares import cli, files
from ares.data_folder import find_images, question_images, read_data_folder
from teacher import agreement, client, estimate, handoff
from teacher.batch_store import digest
from teacher.budget import Ledger
from teacher.data_check import refuse_other_data
from teacher.interface import FREE, MODEL, REFERENCE, SCORE, Teacher
from teacher.live import ask_live
from teacher.prompts import WORDING, scoring_request
from teacher.reply_files import is_answered, read_sidecar
from teacher.report import Report, in_words
from teacher.session import OURS, Session

HEARTBEAT = 60.0  # seconds between lines while --watch waits
ASKED = "asked.json"  # in {questions_dir}/teacher/: which rationales --ask_share sends to the other Teacher


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
    add_model_flags(parser)
    args = parser.parse_args(argv)
    given = cli.given_flags(parser, argv)
    of_model, of_share = given & {*MODEL_FLAGS}, given & {"ask", "ask_teacher", "ask_seed"}
    apart = args.against == "apart"
    faults = {
        "--teacher model needs --reward_model DIR": args.teacher == MODEL and not args.reward_model,
        f"{_flags(of_model)}: no effect without --teacher model": of_model and args.teacher != MODEL,
        f"{_flags(of_share)}: no effect without --ask_share": of_share and args.ask_share is None,
        "--ask_share must be above 0 and below 1": args.ask_share is not None and not 0 < args.ask_share < 1,
        "--ask_share goes with neither --watch nor --check": args.ask_share is not None and (args.watch or args.check),
        "--against needs --check": args.against and args.check is None,
        "--check must be at least 1": args.check is not None and args.check < 1,
        "--watch must be a number of hours above 0": args.watch is not None and not 0 < args.watch < math.inf,
        "--watch waits for all actions; leave out --actions": args.watch and args.actions,
        f"--against apart: --teacher {args.teacher} has no --together": apart and args.teacher in FREE,
        "--together is compared by --check N --against apart; add that, or leave it out": args.check is not None
        and args.together
        and not apart,
    }
    cli.refuse([fault for fault, found in faults.items() if found])
    args.against = args.against or REFERENCE
    args.model_teacher = args.asked = None  # the reward model; the flags of the Teacher that --ask_share asks
    if args.teacher == MODEL and "data_root" not in given:
        args.data_root = None  # as recorded
    if args.ask_share is not None:
        args.asked = argparse.Namespace(**{**vars(args), "teacher": args.ask_teacher})
    client.check_teacher_flags(args.asked or args, given)
    if apart:  # each has to be asked: neither may get the other's replies from the cache
        args.together = args.no_cache = True
    return args


MODEL_FLAGS = "reward_model caption_file vision_features name_map ask_share".split()


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of --teacher model, and of the share that another Teacher scores beside it."""
    add = parser.add_argument_group("reward model").add_argument
    add("--reward_model", metavar="DIR", help="with --teacher model: what tools/train_reward_model.py wrote")
    recorded = "of the reward model's prompts (default: as it was trained)"
    add("--caption_file", metavar="FILE", help=f"captions {recorded}")
    add("--vision_features", metavar="DIR", help=f"folder of the features {recorded}")
    add("--name_map", metavar="FILE", help=f"feature rows {recorded}")
    add("--ask_share", type=float, metavar="SHARE", help="send this share of the rationales to --ask_teacher instead")
    which = "which: at random, or those of whose scores the model is least certain (largest mean p(1-p))"
    add("--ask", choices=("random", "uncertain"), default="random", help=which)
    asked = "who scores them, with all flags of that Teacher (--teacher_model, --max_usd, --batch ...)"
    add("--ask_teacher", choices=(*client.PROVIDERS, REFERENCE), default="claude", help=asked)
    add("--ask_seed", type=int, default=0, help="seed of --ask random")


def _flags(names: set[str]) -> str:
    return " and ".join(f"--{name}" for name in sorted(names))


def use_reward_model(args: argparse.Namespace, items: Sequence[handoff.Item]) -> None:
    """Check the reward model's folder and data for the questions of `items`, and make it the client's Teacher.
    Raises UserError; the weights are loaded when they are first needed."""
    from rl.reward_model import RewardTeacher  # it needs torch, which nothing else here does

    teacher = RewardTeacher(args.reward_model, args, list(dict.fromkeys(item.qid for item in items)))
    for flags in filter(None, (args, args.asked)):
        flags.model_teacher, flags.data_root, flags.dataset = teacher, teacher.args.data_root, teacher.args.dataset
    refuse_other_data(items, teacher.data.problems, args)


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
    dropped = f"; RL will drop {lost.total()} ({in_words(lost)})" if lost else ""
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
            refuse_other_data(items, session.problems, self.args)
            for item in items:
                known.setdefault(item.folder.parent, set()).add(item.qid)
                if sentences := handoff.sentences_of(item):
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
    folder, apart = Path(args.questions_dir) / OURS, args.against == "apart"
    agreement.read_checks(folder)  # before anything is paid for
    second_args = client.second_teacher(args)
    itself = second_args.teacher == args.teacher and second_args.teacher_model in (REFERENCE, args.teacher_model)
    if itself and not apart:
        raise cli.UserError(f"--against: {args.against} is the Teacher itself; name another")
    ledger = getattr(first.teacher, "ledger", None) or Ledger(folder, args.max_usd)
    second = make_session(second_args, first.problems, client.make_teacher(second_args, ledger))
    agreement.compare(first, second, items, args.check, apart)


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
        together=args.together and args.teacher not in FREE,
        action_settled=partial(mark_done, args) if exported else None,
    )


# -- a share by another Teacher ----------------------------------------------------------------------------


def answer_shared(args: argparse.Namespace, items: Sequence[handoff.Item], problems: Any, exported: bool) -> None:
    """Have the reward model score its part of the items, then the Teacher of --ask_share the others."""
    if args.estimate or args.show:
        theirs = divided(args, items, save=False)[0]
        session = make_session(args.asked, problems, client.make_teacher(args.asked))
        return estimate.preview(session, items if args.show else theirs, args.asked)
    both = Report()
    for flags in (args, args.asked):
        with client.work_in(args.questions_dir, "--questions_dir", flags) as each:
            session = make_session(flags, problems, each)
            if flags is args:  # live, also beside batches of the other one
                theirs, ours = divided(args, items)
                session.add(ours)
                ask_live(session)
            else:
                client.answer_items(session, theirs, flags)
        cli.print0(f"{flags.teacher}: {session.report.summary()}")
        both.total += session.report.total
        both.unusable |= session.report.unusable
        both.first |= session.report.first
    if args.submit_only:
        return None
    for action in sorted({item.action for item in items}) if exported else ():
        mark_done(args, action, both)  # only now: both have answered its items
    return end(args, both, exported)


def divided(
    args: argparse.Namespace, items: Sequence[handoff.Item], save: bool = True
) -> tuple[list[handoff.Item], list[handoff.Item]]:
    """(items for the other Teacher, items for the reward model), as asked.json says; with `save` new ones are added.

    What is decided of a rationale stays so in later runs; one that the other Teacher has scored is its own. Identical
    rationales of a question go to the same one. Raises UserError if the file was made with other flags, or if batches
    are pending that hold items of the reward model.
    """
    path = Path(args.questions_dir) / OURS / ASKED
    settings = {"ask": args.ask, "ask_share": args.ask_share, "ask_seed": args.ask_seed}
    before = read_asked(path, settings, args.questions_dir)
    texts = {item: (item.qid, tuple(handoff.sentences_of(item))) for item in items}
    sides: dict[tuple, str] = {}
    for item, text in texts.items():
        side, of_text = before.get(item.name, ("", ""))
        if of_text == digest(json.dumps(text)):  # else of another rationale: a folder is used for every round
            sides[text] = side
        elif read_sidecar(item.folder).get("teacher") == args.ask_teacher and is_answered(SCORE, item.folder):
            sides.setdefault(text, args.ask_teacher)  # paid for already
    new = list(dict.fromkeys(text for text in texts.values() if text not in sides))
    if args.ask == "random":
        asked = [text for text in new if _draw(args.ask_seed, text) < args.ask_share]
    else:
        wanted = round(args.ask_share * (len(sides) + len(new))) - sum(side != MODEL for side in sides.values())
        doubt = dict(zip(new, args.model_teacher.expected_errors(new), strict=True))
        asked = sorted(new, key=lambda text: (-doubt[text], _draw(args.ask_seed, text)))[: max(0, wanted)]
    sides |= dict.fromkeys(new, MODEL) | {text: args.ask_teacher for text in asked if text[1]}
    theirs = [item for item in items if sides[texts[item]] != MODEL]
    if save:
        client.check_pending(args.questions_dir, SCORE, theirs, args.asked)
        decided = {item.name: [sides[text], digest(json.dumps(text))] for item, text in texts.items()}
        files.write_json(path, {**settings, "rationales": before | decided}, indent=0)
    return theirs, [item for item in items if sides[texts[item]] == MODEL]


def _draw(seed: int, text: tuple[str, tuple[str, ...]]) -> float:
    """A number in [0, 1) that depends on the seed and the rationale alone, not on the order of items."""
    drawn = hashlib.sha256(json.dumps([seed, *text]).encode()).digest()
    return int.from_bytes(drawn[:8], "big") / 2**64


def read_asked(path: Path, settings: dict[str, Any], root: str) -> dict[str, list[str]]:
    """Name of an item -> (who scores it, digest of its rationale), from asked.json; {} if there is none. Raises
    UserError for a damaged file, and for one of other flags."""
    files.refuse_links(path, root)
    if not path.exists():
        return {}
    found = files.read_json(path, "--ask_share", dict)
    decided = found.get("rationales")
    if not isinstance(decided, dict) or not all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(word, str) for word in one)
        for one in decided.values()
    ):
        raise cli.UserError(f"--ask_share: {path} is damaged; delete it: the rationales are then divided anew")
    if changed := [name for name, value in settings.items() if found.get(name) != value]:
        was = ", ".join(f"--{name} {found.get(name)}" for name in changed)
        raise cli.UserError(f"--ask_share: {path} was made with {was}; go back to that, or delete the file")
    return decided


def end(args: argparse.Namespace, report: Report, exported: bool) -> None:
    """The closing lines. Raises UserError for unusable replies."""
    if not exported and not args.no_done:
        cli.print0(
            f"no {handoff.EXPORTED} in {args.questions_dir}: the export may go on, so no {handoff.DONE} is written; "
            f"run this again after it, or touch {{run}}/questions/{{k}}/{handoff.DONE} when all is copied back"
        )
    client.refuse_unusable(report, args.accept_missing)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    exported = handoff.exported(args.questions_dir)  # before the listing: what is listed is then complete
    items = handoff.iter_items(args.questions_dir) if args.watch else find_items(args)
    problems = None  # Claude can do without: its requests are written
    if args.teacher == MODEL:
        use_reward_model(args, items)
        problems = args.model_teacher.data.problems
        if args.asked:
            return answer_shared(args, items, problems, exported)
    elif args.teacher == REFERENCE or Path(args.data_root).is_dir():
        problems = read_data_folder(args.data_root, args.dataset).problems
        refuse_other_data(items, problems, args)
    elif args.watch or args.check:
        what = "--watch writes the requests itself and" if args.watch else "--check"
        raise cli.UserError(f"{what} needs problems.json; name its folder with --data_root")
    if args.estimate or args.show:
        return estimate.preview(make_session(args, problems, client.make_teacher(args)), items, args)
    if args.watch:
        return Watch(args, partial(make_session, args, problems)).run()
    with client.work_in(args.questions_dir, "--questions_dir", args) as each:
        session = make_session(args, problems, each, exported and not args.check)  # its replies go elsewhere
        if args.check:
            return check(args, items, session)
        client.answer_items(session, items, args)
    cli.print0(f"{args.teacher}: {session.report.summary()}")
    return None if args.submit_only else end(args, session.report, exported)


if __name__ == "__main__":
    cli.run(main)
