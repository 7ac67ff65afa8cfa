"""Write the demo data set: a few hundred questions in ScienceQA's layout, with drawn images, from one seed.

    python demo/make_data.py --output demo_run --seed 0
    python demo/make_data.py --output demo_run --train 64 --val 16 --test 16 --kinds speed magnets

Writes {output}/data/scienceqa/{problems,pid_splits}.json, {output}/data/{captions,name_map}.json and
{output}/images/{qid}/. The same seed and sizes give the same bytes; the splits share no question.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

if __name__ == "__main__":  # run as a file, the project is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ares.cli import HelpFormatter, UserError, print0, refuse, run
from ares.files import atomic_dir, writable_dir, write_json
from ares.sentences import split_text
from demo.pictures import PICTURE_KINDS
from demo.questions import TEXT_KINDS, Question

KINDS = {kind.__name__: kind for kind in (*TEXT_KINDS, *PICTURE_KINDS)}
# a T5 of 2 + 2 layers learns the other kinds to some degree from about 35 examples each
HARDER = ("speed", "trade", "magnets")
DEFAULT_KINDS = [name for name in KINDS if name not in HARDER]
MINIS = {"minitrain": ("train", 64), "miniminitrain": ("train", 16), "minival": ("val", 16)}
MINIS |= {"miniminival": ("val", 4), "minitest": ("test", 32)}
MARKER = "demo.json"  # in data/: its seed and sizes; a folder that has it may be replaced
UNCONCLUDED = 0.6  # share of drafts without a conclusion: above a half, so that greedy rationales lack it too
TRIES = 500  # draws of a kind without a new question before it counts as exhausted


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder that will hold data/ and images/")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    parser.add_argument("--train", type=int, default=400, help="number of training questions")
    parser.add_argument("--val", type=int, default=60, help="number of validation questions")
    parser.add_argument("--test", type=int, default=120, help="number of test questions")
    kinds = "kinds of question (default: all but the hardest)"
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), help=kinds)
    args = parser.parse_args(argv)
    counts = {split: getattr(args, split) for split in ("train", "val", "test")}
    refuse([f"--{split}: {count} questions; give a number above 0" for split, count in counts.items() if count < 1])
    return args


def identity(question: Question) -> tuple:
    """Equal for two equal questions: their texts, the set of choices and the pictures."""
    images = tuple((name, image.tobytes()) for name, image in question.images.items())
    return question.about[-1], question.question + question.hint, frozenset(question.choices), images


def draw_questions(names: Sequence[str], count: int, seed: int) -> list[tuple[str, Question]]:
    """`count` different questions, the kinds in turn. Raises UserError when a kind has no more questions."""
    rngs = {name: Random(f"{seed} {name}") for name in names}
    seen: set[tuple] = set()
    questions = []
    for index in range(count):
        name = names[index % len(names)]
        for _ in range(TRIES):
            question = KINDS[name](rngs[name])
            if identity(question) not in seen:
                break
        else:
            raise UserError(f"--kinds: {name} has no {count // len(names)} different questions; ask for fewer")
        seen.add(identity(question))
        questions.append((name, question))
    return questions


def place_answers(questions: Sequence[tuple[str, Question]], rng: Random) -> None:
    """Shuffle the choices in place so that the gold one is at each position equally often."""
    used: Counter[tuple[int, int]] = Counter()
    for _, question in questions:
        count = len(question.choices)
        if question.ordered:
            used[count, question.answer] += 1
            continue
        gold, *others = question.choices
        rng.shuffle(others)
        least = min(used[count, position] for position in range(count))
        question.answer = rng.choice([position for position in range(count) if used[count, position] == least])
        used[count, question.answer] += 1
        others.insert(question.answer, gold)
        question.choices = others


def problem(question: Question, split: str, rng: Random) -> dict:
    """One entry of problems.json. As in ScienceQA, `image` is null where there are choice images only."""
    return {
        "question": question.question,
        "choices": question.choices,
        "answer": question.answer,
        "hint": question.hint,
        "image": "image.png" if "image.png" in question.images else None,
        "task": "closed choice",
        "grade": f"grade{rng.randint(*question.grades)}",
        **dict(zip(("subject", "topic", "category", "skill"), question.about, strict=True)),
        "lecture": question.lecture,
        "solution": question.solution,
        "split": split,
    }


def split_names(sizes: dict[str, int], names: Sequence[str], rng: Random) -> list[str]:
    """The split of each drawn question: each kind is spread over the splits in proportion, otherwise at random."""
    count = sum(sizes.values())
    order = sorted(range(count), key=lambda index: (index % len(names), rng.random()))
    splits = [""] * count
    quota = Counter(sizes)
    for place, index in enumerate(order):
        # the split that lags furthest behind its share of the questions placed so far
        split = max(sizes, key=lambda name: sizes[name] * (place + 1) / count - (sizes[name] - quota[name]))
        quota[split] -= 1
        splits[index] = split
    return splits


def draft(solution: str, rng: Random) -> str:
    """A hasty version of a rationale: most lack the conclusion, half of the others a sentence before it."""
    sentences = split_text(solution)
    if rng.random() < UNCONCLUDED:
        sentences.pop()
    elif rng.random() < 0.5 and len(sentences) > 2:
        sentences.pop(rng.randrange(1, len(sentences) - 1))
    return " ".join(sentence.strip() for sentence in sentences)


def pid_splits(problems: dict[str, dict]) -> dict[str, list[str]]:
    """pid_splits.json, with ScienceQA's smaller splits."""
    splits = {name: [qid for qid in problems if problems[qid]["split"] == name] for name in ("train", "val", "test")}
    splits["trainval"] = [*splits["train"], *splits["val"]]
    for name, (source, size) in MINIS.items():
        splits[name] = splits[source][:size]
    return splits


def make_data(
    output: str | Path, seed: int = 0, train: int = 400, val: int = 60, test: int = 120,
    kinds: Sequence[str] | None = None,
) -> Path:  # fmt: skip
    """Write {output}/data and {output}/images, replacing those of an earlier demo, and return {output}/data.

    Each of the two is written as a whole. Raises UserError for folders that are not a demo's.
    """
    data, images = Path(output) / "data", Path(output) / "images"
    if (data.exists() or images.exists()) and not (data / MARKER).exists():
        raise UserError(f"--output: {output} holds a data or images folder that is not a demo's; name another folder")
    names = list(kinds or DEFAULT_KINDS)
    sizes = {"train": train, "val": val, "test": test}
    drawn = draw_questions(names, sum(sizes.values()), seed)
    rng = Random(f"{seed} placing")
    place_answers(drawn, rng)
    splits = split_names(sizes, names, rng)
    order = [(question, split) for (_, question), split in zip(drawn, splits, strict=True)]
    rng.shuffle(order)  # so that ids reveal neither kind nor split
    numbered = {str(number): pair for number, pair in enumerate(order, start=1)}
    problems = {qid: problem(*pair, rng) for qid, pair in numbered.items()}
    shown = {qid: question for qid, (question, _) in numbered.items() if question.images}

    with atomic_dir(data) as folder:
        write_json(folder / MARKER, {"seed": seed, **sizes, "kinds": names})
        write_json(folder / "scienceqa" / "problems.json", problems, indent=1)
        hasty = Random(f"{seed} drafts")
        drafts = {qid: {**one, "solution": draft(one["solution"], hasty)} for qid, one in problems.items()}
        write_json(folder / "scienceqa" / "drafts.json", drafts, indent=1)
        write_json(folder / "scienceqa" / "pid_splits.json", pid_splits(problems), indent=None)
        write_json(folder / "captions.json", {"captions": {qid: shown[qid].caption for qid in shown}}, indent=1)
        write_json(folder / "name_map.json", {qid: row for row, qid in enumerate(shown)}, indent=None)
    with atomic_dir(images) as folder:
        for qid, question in shown.items():
            (folder / qid).mkdir()
            for name, image in question.images.items():
                image.save(folder / qid / name)
    return data


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    writable_dir(args.output, "--output")
    data = make_data(args.output, args.seed, args.train, args.val, args.test, args.kinds)
    images = len(list((data.parent / "images").iterdir()))
    print0(f"{data}: {args.train} train, {args.val} val, {args.test} test questions, {images} with images")


if __name__ == "__main__":
    run(main)
