"""Whose rationales are better? A judge compares those of two systems, question by question, in both orders.

    python tools/win_rate.py ARES=experiments/<run> MM-CoT=models/mm-cot-base-rationale   # Claude judges
    python tools/win_rate.py A=a.json B=b.json --batch                      # half the price, within a day
    python tools/win_rate.py A=a.json B=b.json --protocol paper  # one order a pair, at random, as in the paper
    python tools/win_rate.py A=a.json B=b.json --teacher reference          # offline, from the gold solutions

Reads two stage folders or prediction files, writes a request for each question and order into `{output}/{k}/p0/{qid}/`
(k = 0: the first system's rationale is shown first), the judge's replies beside them, and the result:
`{output}/win_rate.json`, or `win_rate_paper.json` with --protocol paper (`..._val.json`, `..._train.json` for other
splits). The same command continues a stopped run; answered requests are not sent again. The format of the result and
its figures are described in docs/results.md.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares import cli, files
from ares.data_folder import find_images, question_images, read_data_folder
from ares.intervals import ratio_interval, shares_interval
from ares.predictions import FILE_NAMES, find_predictions, labelled, read_predictions
from teacher import client, estimate, handoff
from teacher.claude import DEFAULT_MODEL
from teacher.interface import JUDGE
from teacher.parsing import parse_verdict
from teacher.prompts import JUDGE_WORDING, judge_request
from utils_evaluate import CATEGORIES
from utils_prompt import normalize

ORDERS = ("ab", "ba")  # by action: whose rationale is shown first
PROTOCOLS = ("both", "paper")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument(
        "systems", nargs=2, metavar="LABEL=PATH", help="any label; a stage's folder or predictions file"
    )
    data = cli.add_data_flags(parser)
    data.add_argument("--split", choices=FILE_NAMES, default="test", help="which predictions")
    data.add_argument("--questions", type=int, metavar="N", help="judge only N, drawn by --seed (default: all)")
    data.add_argument("--with_image", action="store_true", help="send each question's images to the judge")
    how = parser.add_argument_group("comparison")
    how.add_argument("--protocol", choices=PROTOCOLS, default="both", help="both: each pair in both orders, a verdict "
                     "that changes with the order is a tie; paper: one random order")  # fmt: skip
    how.add_argument("--seed", type=int, default=0, help="seed of random orders, of --questions and of the intervals")
    how.add_argument("--output", metavar="DIR", help="requests, replies and results (default: win_rate/{A}_vs_{B})")
    client.add_teacher_flags(parser)
    how.add_argument("--judge_model", dest="teacher_model", default=DEFAULT_MODEL, help="same as --teacher_model")
    args = parser.parse_args(argv)
    given = cli.given_flags(parser, argv)
    wrong = ["--questions must be at least 1"] if args.questions is not None and args.questions < 1 else []
    if args.images and not args.with_image:
        wrong.append("--images has no effect without --with_image; add that or drop --images")
    args.systems = [labelled(text) for text in args.systems]
    (label_a, _), (label_b, _) = args.systems
    if label_a == label_b:
        wrong.append(f"both systems are called {label_a}; give them labels, as in A={args.systems[0][1]}")
    cli.refuse(wrong)
    client.check_teacher_flags(args, given)
    plain = "_vs_".join("".join(c if c.isalnum() or c in "-.+" else "-" for c in label) for label, _ in args.systems)
    args.output = args.output or str(Path("win_rate") / files.short_name(plain))
    return args


# -- requests ------------------------------------------------------------------------------------------------


def read_systems(args: argparse.Namespace, qids: Sequence[str]) -> list[dict[str, str]]:
    """Both systems' rationales of the questions that both have, as one line each, without the `Solution:` prefix."""
    systems = []
    for label, place in args.systems:
        file = read_predictions(find_predictions(place, label, args.split), label, qids)
        file.refuse_unknown(set(qids), label, f"in the split {args.split}; name the predictions' own --split")
        if file.parts_asked() == (True, False):
            raise cli.UserError(f"{label}: {file.path} holds answers without rationales; name a rationale stage")
        systems.append({qid: normalize(text).removeprefix("Solution:").strip() for qid, text in file.by_qid().items()})
    a, b = systems
    chosen = [qid for qid in qids if qid in a and qid in b]
    if not chosen:
        raise cli.UserError("the two systems have no question in common; name predictions of one split")
    if len(chosen) < max(len(a), len(b)):
        cli.warn0(f"only the {len(chosen)} questions in both files are compared (they hold {len(a)} and {len(b)})")
    if args.questions and args.questions < len(chosen):
        drawn = set(random.Random(args.seed).sample(chosen, args.questions))
        chosen = [qid for qid in chosen if qid in drawn]
    return [{qid: texts[qid] for qid in chosen} for texts in systems]


def write_requests(
    args: argparse.Namespace, problems: Mapping[str, Any], a: Mapping[str, str], b: Mapping[str, str]
) -> list[handoff.Item]:
    """Write a request for every pair that differs. A reply to other texts, of an earlier run, is set aside. Raises
    UserError before that if it is the reply of a pending batch."""
    images_dir = find_images(args, required=True) if args.with_image else None
    requests: dict[handoff.Item, tuple[tuple[str, str], str, list[Path]]] = {}  # -> rationales, text, images
    orders = {qid: ORDERS if args.protocol == "both" else [random.Random(f"{args.seed}-{qid}").choice(ORDERS)]
              for qid in a if a[qid] != b[qid]}  # fmt: skip
    pairs = [(action, order, qid) for action, order in enumerate(ORDERS) for qid in orders if order in orders[qid]]
    for action, order, qid in pairs:
        handoff.question_dir(args.output, action, 0, qid)  # refuses an id that cannot name it
        shown = (a[qid], b[qid]) if order == "ab" else (b[qid], a[qid])
        images = question_images(images_dir, qid) if images_dir else []
        text = judge_request(problems[qid], *shown, image=bool(images))
        requests[handoff.Item(Path(args.output), action, 0, qid)] = shown, text, images
    if not args.show and not args.estimate:
        texts = {item.name: text for item, (_, text, _) in requests.items()}
        client.check_pending(args.output, JUDGE, list(requests), args, texts)
    for item, (shown, text, images) in cli.progress(requests.items(), desc="requests", unit="pair"):
        folder = item.folder
        handoff.refuse_links(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(folder / handoff.REQUEST) and handoff.request_text(folder) != text:
            handoff.set_reply_aside(folder)
        files.write_text(folder / handoff.RATIONALE, handoff.form(shown) + "\n", flush=False)
        for stale in {path.name for path in question_images(folder.parent, item.qid)} - {path.name for path in images}:
            (folder / stale).unlink()  # of a run --with_image: every image in the folder is sent
        handoff.write_request(folder, text, images)
    return list(requests)


# -- verdicts ------------------------------------------------------------------------------------------------


def read_verdicts(items: Sequence[handoff.Item]) -> list[dict[str, str]]:
    """One {"qid", "order", "winner", "reason"} for each usable reply, in the order of the items."""
    verdicts = []
    for item in items:
        try:
            reply = files.read_shared(item.folder / handoff.REPLY) if handoff.has_reply(item.folder) else None
            verdict = parse_verdict(reply)
        except handoff.Refused:
            continue
        order = ORDERS[item.action]
        winner = "tie" if verdict.better == "tie" else order[int(verdict.better) - 1]
        verdicts.append({"qid": item.qid, "order": order, "winner": winner, "reason": verdict.reason})
    return verdicts


def outcomes(verdicts: Sequence[Mapping[str, str]], per_question: Mapping[str, int]) -> dict[str, str]:
    """qid -> "a", "b" or "tie", for the questions with all their `per_question` verdicts.

    Of two orders: a win and a tie is a win, a win for each side a tie.
    """
    result = {}
    for qid, each in by_question(verdicts).items():
        winners = [verdict["winner"] for verdict in each]
        if len(winners) == per_question[qid]:
            lead = winners.count("a") - winners.count("b")
            result[qid] = "a" if lead > 0 else "b" if lead < 0 else "tie"
    return result


def by_question(verdicts: Sequence[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    found: dict[str, list[Mapping[str, str]]] = {}
    for verdict in verdicts:
        found.setdefault(verdict["qid"], []).append(verdict)
    return found


def rates(outcomes: Sequence[str], seed: int) -> dict[str, Any]:
    """Win, tie and loss of the first system in per cent; `win_rate` (a tie counts half) and `decided` (wins among the
    questions without a tie), each with a 95 % bootstrap interval."""
    count = Counter(outcomes)
    counts = [count["a"], count["tie"], count["b"]]
    win, tie, loss = (100 * each / len(outcomes) for each in counts)
    decided = counts[0] + counts[2]
    return {
        "questions": len(outcomes), "win": win, "tie": tie, "loss": loss, "win_rate": win + tie / 2,
        "win_rate_interval": _per_cent(shares_interval(counts, (1, 0.5, 0), seed)),
        "decided": 100 * counts[0] / decided if decided else None,
        "decided_interval": _per_cent(shares_interval([counts[0], counts[2]], (1, 0), seed)),
    }  # fmt: skip


def position_bias(verdicts: Sequence[Mapping[str, str]], seed: int) -> dict[str, Any]:
    """Per cent of the verdicts for one side that go to the rationale shown first (50 without bias, whoever is better),
    and per cent of the pairs that get the same verdict in both orders."""
    pairs = by_question(verdicts).values()
    # per question: number of verdicts for the rationale shown first, number of verdicts for either
    parts = [(sum(one["winner"] == one["order"][0] for one in each), sum(one["winner"] != "tie" for one in each))
             for each in pairs]  # fmt: skip
    first, either = sum(part[0] for part in parts), sum(part[1] for part in parts)
    twice = [each[0]["winner"] == each[1]["winner"] for each in pairs if len(each) == 2]
    return {
        "first": 100 * first / either if either else None,
        "first_interval": _per_cent(ratio_interval(parts, seed)),
        "same_in_both_orders": 100 * sum(twice) / len(twice) if twice else None,
    }


def _per_cent(interval: tuple[float, float]) -> list[float] | None:
    return None if math.isnan(interval[0]) else [100 * end for end in interval]


def summarise(
    problems: Mapping[str, Any], qids: Sequence[str], asked: Mapping[str, int], verdicts: Sequence[Mapping], seed: int
) -> dict[str, Any]:
    """Overall and by category.

    `qids`: all questions; `asked`: qid -> its number of requests. Questions that were not asked have identical
    rationales and count as a tie.
    """
    result = outcomes(verdicts, asked) | {qid: "tie" for qid in qids if qid not in asked}
    chosen = {name: [result[qid] for qid in qids if qid in result and belongs(problems[qid])]
              for name, belongs in CATEGORIES.items()}  # fmt: skip
    return {
        "questions": len(result),
        "identical": sum(qid not in asked for qid in qids),
        "unanswered": len(qids) - len(result),
        "rows": {name: rates(outcomes, seed) for name, outcomes in chosen.items() if outcomes},
        "position": position_bias(verdicts, seed),
    }


def result_lines(labels: Sequence[str], summary: Mapping[str, Any]) -> list[str]:
    """The result as lines for a terminal."""
    lines = [f"{labels[0]} against {labels[1]}: {summary['questions']} questions, {summary['identical']} of them with "
             f"identical rationales (ties), {summary['unanswered']} without an answer",
             f"{'':<12}{'questions':>10}{'win %':>8}{'tie %':>8}{'loss %':>8}   win rate % (a tie is half), 95 %",
             ]  # fmt: skip
    for name, found in summary["rows"].items():
        low, high = found["win_rate_interval"]
        lines.append(f"{name:<12}{found['questions']:>10}{found['win']:>8.1f}{found['tie']:>8.1f}{found['loss']:>8.1f}"
                     f"   {found['win_rate']:.1f} [{low:.1f}, {high:.1f}]")  # fmt: skip
    bias = summary["position"]
    if bias["first"] is not None:
        low, high = bias["first_interval"]
        lines.append(f"position: the one shown first wins {bias['first']:.1f} % [{low:.1f}, {high:.1f}]")
        if bias["same_in_both_orders"] is not None:
            lines[-1] += f"; {bias['same_in_both_orders']:.1f} % of the pairs get the same verdict in both orders"
    return lines


def result_file(args: argparse.Namespace) -> Path:
    """Where the result goes: a file for each protocol and split, so that none replaces another.

    A win_rate.json of an earlier version, in which every protocol and split wrote to that name, is renamed first.
    """

    def place(protocol: str, split: str) -> Path:
        parts = ["win_rate", *[protocol] * (protocol != "both"), *[split] * (split != "test")]
        return Path(args.output, f"{'_'.join(parts)}.json")

    plain = Path(args.output, "win_rate.json")
    if plain.is_file():
        old = files.read_json(plain, "--output", dict, nan=True)
        known = old.get("protocol") in PROTOCOLS and old.get("split") in [*FILE_NAMES]
        if known and not (own := place(old["protocol"], old["split"])).exists():
            os.replace(plain, own)
    return place(args.protocol, args.split)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    data = read_data_folder(args.data_root, args.dataset)
    problems, qids = data.problems, data.split(args.split, "--split")
    a, b = read_systems(args, qids)
    files.writable_dir(args.output, "--output")

    with client.work_in(args.output, "--output", args) as each:
        items = write_requests(args, problems, a, b)
        # without --with_image the session must not report missing images
        shown = problems if args.with_image else {qid: {**problems[qid], "image": None} for qid in a}
        session = client.make_session(args.output, each, JUDGE, args, wording=JUDGE_WORDING, problems=shown)
        if args.show:
            return estimate.show(session, items, args.show)
        if args.estimate:
            session.add(items, serve=False)
            return estimate.estimate(session)
        path = result_file(args)  # before anything is paid for
        report = client.answer_items(session, items, args)
    cli.print0(f"{args.teacher}: {report.summary()}")
    if args.submit_only:
        return None
    client.refuse_unusable(report, args.accept_missing)
    asked = Counter(item.qid for item in items)
    verdicts = read_verdicts(items)
    labels = [label for label, _ in args.systems]
    summary = summarise(problems, list(a), asked, verdicts, args.seed)
    judge = {"teacher": each.name, "model": each.model, "prompt_version": JUDGE_WORDING.version,
             "with_image": args.with_image, "replies_by": dict(report.written_by)}  # fmt: skip
    files.write_json(
        path,
        {"systems": labels, "judge": judge, "protocol": args.protocol, "seed": args.seed, "split": args.split,
         "dataset": data.dataset, "summary": summary, "verdicts": verdicts},
        indent=1,
    )  # fmt: skip
    for line in result_lines(labels, summary):
        cli.print0(line)
    cli.print0(f"verdicts: {path}")
    return None


if __name__ == "__main__":
    cli.run(main)
