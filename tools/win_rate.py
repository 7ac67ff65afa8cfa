"""Whose rationales are better? A judge compares those of two systems, question by question, in both orders.

    python tools/win_rate.py ARES=experiments/<run> MM-CoT=models/mm-cot-base-rationale   # Claude judges
    python tools/win_rate.py A=a.json B=b.json --batch                      # half the price, within a day
    python tools/win_rate.py A=a.json B=b.json --protocol paper  # one order a pair, at random, as in the paper
    python tools/win_rate.py A=a.json B=b.json --teacher reference          # offline, from the gold solutions

Reads two stage folders or prediction files, writes a request for each question and order into `{output}/{k}/p0/{qid}/`
(k = 0: the first system's rationale is shown first), the judge's replies beside them, and `{output}/win_rate.json`.
Killed or stopped, the same command goes on; a second run asks nothing. What is in win_rate.json and how the figures
are made: docs/results.md.
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
from ares.data_folder import find_dataset, find_images, load_problems, load_splits, question_images, split_qids
from ares.intervals import ratio_interval, shares_interval
from ares.predictions import predictions_file, split_label, texts_by_qid
from teacher import client, estimate, handoff
from teacher.claude import DEFAULT_MODEL
from teacher.handoff import place_images, request_text, set_reply_aside, write_request
from teacher.interface import JUDGE
from teacher.parsing import parse_verdict
from teacher.prompts import JUDGE_WORDING, judge_request
from utils_evaluate import CATEGORIES
from utils_prompt import normalize

ORDERS = ("ab", "ba")  # by action: whose rationale is shown first
OUTPUT = "win_rate.json"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument(
        "systems", nargs=2, metavar="LABEL=PATH", help="a stage's folder or its predictions file; label it as you like"
    )
    data = cli.add_data_flags(parser)
    data.add_argument(
        "--split", choices=("test", "val", "train"), default="test", help="which predictions (default: %(default)s)"
    )
    data.add_argument("--questions", type=int, metavar="N", help="only N of them, drawn by --seed (default: all)")
    data.add_argument("--with_image", action="store_true", help="send each question's images to the judge")
    how = parser.add_argument_group("comparison")
    how.add_argument(
        "--protocol",
        choices=("both", "paper"),
        default="both",
        help="both: each pair in both orders, a verdict that turns with the order is a tie; paper: one random order",
    )
    how.add_argument("--seed", type=int, default=0, help="of random orders, of --questions, of intervals")
    how.add_argument("--output", metavar="DIR", help="requests, replies, win_rate.json (default: win_rate/{A}_vs_{B})")
    client.add_teacher_flags(parser)
    how.add_argument("--judge_model", dest="teacher_model", default=DEFAULT_MODEL, help="the same as --teacher_model")
    args = parser.parse_args(argv)
    given = cli.given_flags(parser, argv)
    wrong = ["--questions must be at least 1"] if args.questions is not None and args.questions < 1 else []
    if args.images and not args.with_image:
        wrong.append("--images has no effect without --with_image; add that, or leave it out")
    args.systems = [split_label(named) for named in args.systems]
    (label_a, _), (label_b, _) = args.systems
    if label_a == label_b:
        wrong.append(f"both systems are called {label_a}; label them, as in A={args.systems[0][1]}")
    cli.refuse(wrong)
    client.check_teacher_flags(args, given)
    plain = "_vs_".join("".join(c if c.isalnum() or c in "-.+" else "-" for c in label) for label, _ in args.systems)
    args.output = args.output or str(Path("win_rate") / files.short_name(plain))
    return args


# -- requests ------------------------------------------------------------------------------------------------


def read_systems(args: argparse.Namespace, qids: Sequence[str]) -> list[dict[str, str]]:
    """Both systems' rationales of the questions that both have, as one line each, without the `Solution:` prefix."""
    found = []
    for label, place in args.systems:
        path = predictions_file(place, label, args.split)
        texts = texts_by_qid(files.read_json(path, label), path, label, qids)
        found.append({qid: normalize(text).removeprefix("Solution:").strip() for qid, text in texts.items()})
    a, b = found
    wanted = [qid for qid in qids if qid in a and qid in b]
    outside = next(iter((a.keys() | b.keys()) - set(qids)), None)
    if outside is not None:
        raise cli.UserError(f"question {outside} is not in the split {args.split}; name the predictions' own --split")
    if not wanted:
        raise cli.UserError("the two systems have no question in common; name predictions of one split")
    if len(wanted) < max(len(a), len(b)):
        cli.warn0(
            f"{len(wanted)} questions have both rationales ({len(a)} and {len(b)} have one); the others are left out"
        )
    if args.questions and args.questions < len(wanted):
        chosen = set(random.Random(args.seed).sample(wanted, args.questions))
        wanted = [qid for qid in wanted if qid in chosen]
    return [{qid: texts[qid] for qid in wanted} for texts in found]


def orders_of(args: argparse.Namespace, qid: str) -> Sequence[str]:
    """Both, or the one that the seed draws for the question."""
    if args.protocol == "both":
        return ORDERS
    return [random.Random(f"{args.seed}-{qid}").choice(ORDERS)]


def lay_out(
    args: argparse.Namespace, problems: Mapping[str, Any], a: Mapping[str, str], b: Mapping[str, str]
) -> list[handoff.Item]:
    """Write the requests of every pair that differs. A reply to other texts, of an earlier run, is set aside."""
    images_dir = find_images(args, required=True) if args.with_image else None
    items = []
    asked = [(action, order, qid) for action, order in enumerate(ORDERS) for qid in a
             if a[qid] != b[qid] and order in orders_of(args, qid)]  # fmt: skip
    for action, order, qid in cli.progress(asked, desc="requests", unit="pair"):
        folder = handoff.question_dir(args.output, action, 0, qid)
        handoff.refuse_links(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shown = (a[qid], b[qid]) if order == "ab" else (b[qid], a[qid])
        images = question_images(images_dir, qid) if images_dir else []
        text = judge_request(problems[qid], *shown, image=bool(images))
        lines = ",\n".join(f'"{each}": xxx' for each in shown)
        if os.path.lexists(folder / handoff.REQUEST) and request_text(folder) != text:
            set_reply_aside(folder)
        write_request(folder, text)
        files.write_text(folder / handoff.RATIONALE, f"{{\n{lines}\n}}\n", flush=False)
        for stale in {path.name for path in question_images(folder.parent, qid)} - {path.name for path in images}:
            (folder / stale).unlink()  # of a run --with_image: what lies here is sent
        place_images(folder, images)
        items.append(handoff.Item(Path(args.output), action, 0, qid))
    return items


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
    found: dict[str, list[str]] = {}
    for verdict in verdicts:
        found.setdefault(verdict["qid"], []).append(verdict["winner"])
    result = {}
    for qid, winners in found.items():
        if len(winners) == per_question[qid]:
            lead = winners.count("a") - winners.count("b")
            result[qid] = "a" if lead > 0 else "b" if lead < 0 else "tie"
    return result


def row(outcomes: Sequence[str], seed: int) -> dict[str, Any]:
    """Of the first system: win, tie, loss in per cent; `win_rate` (a tie counts half) and `decided` (ties left out),
    each with a 95 % bootstrap interval."""
    count = Counter(outcomes)
    counts = [count["a"], count["tie"], count["b"]]
    names = ("win", "tie", "loss")
    found: dict[str, Any] = {"questions": len(outcomes)}
    found |= {name: 100 * each / len(outcomes) for name, each in zip(names, counts, strict=True)}
    found["win_rate"] = found["win"] + found["tie"] / 2
    found["win_rate_interval"] = _per_cent(shares_interval(counts, (1, 0.5, 0), seed))
    sides = counts[0] + counts[2]
    found["decided"] = 100 * counts[0] / sides if sides else None
    found["decided_interval"] = _per_cent(shares_interval([counts[0], counts[2]], (1, 0), seed))
    return found


def position_bias(verdicts: Sequence[Mapping[str, str]], seed: int) -> dict[str, Any]:
    """How often the rationale shown first wins where one wins (50 % without bias; over both orders of a pair, whoever
    is better), and how many pairs get the same verdict in both orders."""
    by_qid: dict[str, list[Mapping[str, str]]] = {}
    for verdict in verdicts:
        by_qid.setdefault(verdict["qid"], []).append(verdict)
    # of each question: verdicts for the one shown first, verdicts for either
    parts = [(sum(one["winner"] == one["order"][0] for one in each), sum(one["winner"] != "tie" for one in each))
             for each in by_qid.values()]  # fmt: skip
    first, either = sum(part[0] for part in parts), sum(part[1] for part in parts)
    twice = [[one["winner"] for one in each] for each in by_qid.values() if len(each) == 2]
    return {
        "first": 100 * first / either if either else None,
        "first_interval": _per_cent(ratio_interval(parts, seed)),
        "same_in_both_orders": 100 * sum(a == b for a, b in twice) / len(twice) if twice else None,
    }


def _per_cent(interval: tuple[float, float]) -> list[float] | None:
    return None if math.isnan(interval[0]) else [100 * end for end in interval]


def summarise(
    problems: Mapping[str, Any],
    qids: Sequence[str],
    asked: Mapping[str, int],
    verdicts: Sequence[Mapping[str, str]],
    seed: int,
) -> dict[str, Any]:
    """Overall and by category. `qids`: all questions; those that were not asked have identical rationales: a tie."""
    result = outcomes(verdicts, asked) | {qid: "tie" for qid in qids if qid not in asked}
    rows = {}
    for name, belongs in CATEGORIES.items():
        chosen = [result[qid] for qid in qids if qid in result and belongs(problems[qid])]
        if chosen:
            rows[name] = row(chosen, seed)
    return {
        "questions": len(result),
        "identical": sum(qid not in asked for qid in qids),
        "unanswered": len(qids) - len(result),
        "rows": rows,
        "position": position_bias(verdicts, seed),
    }


def tell(labels: Sequence[str], summary: Mapping[str, Any]) -> list[str]:
    """The lines of the result for a terminal."""
    lines = [f"{labels[0]} against {labels[1]}: {summary['questions']} questions, {summary['identical']} of them with "
             f"identical rationales (ties), {summary['unanswered']} without an answer"]  # fmt: skip
    lines.append(f"{'':<12}{'questions':>10}{'win %':>8}{'tie %':>8}{'loss %':>8}   win rate % (a tie is half), 95 %")
    for name, found in summary["rows"].items():
        low, high = found["win_rate_interval"]
        lines.append(f"{name:<12}{found['questions']:>10}{found['win']:>8.1f}{found['tie']:>8.1f}{found['loss']:>8.1f}"
                     f"   {found['win_rate']:.1f} [{low:.1f}, {high:.1f}]")  # fmt: skip
    bias = summary["position"]
    if bias["first"] is not None:
        low, high = bias["first_interval"]
        same = bias["same_in_both_orders"]
        told = "" if same is None else f"; {same:.1f} % of the pairs get the same verdict in both orders"
        lines.append(f"position: the one shown first wins {bias['first']:.1f} % [{low:.1f}, {high:.1f}]{told}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    dataset = find_dataset(args.data_root, args.dataset)
    problems = load_problems(args.data_root, dataset)
    qids = split_qids(load_splits(args.data_root, dataset, problems), args.split, "--split")
    a, b = read_systems(args, qids)
    files.writable_dir(args.output, "--output")

    with client.work_in(args.output, "--output", args) as each:
        items = lay_out(args, problems, a, b)
        # without --with_image no image is missed
        seen = problems if args.with_image else {qid: {**problems[qid], "image": None} for qid in a}
        session = client.make_session(args.output, each, JUDGE, args, wording=JUDGE_WORDING, problems=seen)
        if args.show:
            return estimate.show(session, items, args.show)
        if args.estimate:
            session.add(items, serve=False)
            return estimate.estimate(session)
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
        Path(args.output) / OUTPUT,
        {"systems": labels, "judge": judge, "protocol": args.protocol, "seed": args.seed, "split": args.split,
         "dataset": dataset, "summary": summary, "verdicts": verdicts},
        indent=1,
    )  # fmt: skip
    for line in tell(labels, summary):
        cli.print0(line)
    cli.print0(f"verdicts: {Path(args.output) / OUTPUT}")
    return None


if __name__ == "__main__":
    cli.run(main)
