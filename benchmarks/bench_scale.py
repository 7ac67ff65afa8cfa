"""How long the stages around the models take at ScienceQA's full size, and how that grows with the questions.

    python benchmarks/bench_scale.py                        # 1/8 and full size; writes benchmarks/results/scale.json
    python benchmarks/bench_scale.py --shares 0.125 --work /tmp/scale      # keeps the data for a profiler

Full size is 12,726 training questions with 4 rationales each and 4,241 test questions. Questions are those of the real
sample (else the demo's), repeated under new ids with a number in the hint, so that no two are equal; rationales are
gold solutions with sentences dropped, repeated, taken from other questions or cut. Every stage runs in a process of
its own: a script as users start it, imports included, or a function (start of RL's launch, export, reading feedback).
Printed are seconds, CPU seconds and peak memory, and the exponent log(t2 / t1) / log(size 2 / size 1) of the CPU time:
1 is linear. On a machine with other work the CPU seconds say more than the wall time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ares import cli, files
from ares.sentences import split_text
from benchmarks.bench_teacher import measured

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {"train": 12_726, "val": 4_241, "test": 4_241}
K, ROWS = 4, 64  # rationales per question; questions per sampling batch
KEEP, REPEAT, OTHER = 0.7, 0.08, 0.12  # of a rationale's sentences: gold's own, said twice, of another question
TIMED = "timed: "  # before the seconds that a child measured itself
WANTED = {"start": 12, "export": 25, "reference scores": 100, "feedback": 6, "report": 40, "results": 35}  # seconds


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    shares = {"type": float, "nargs": "+", "default": [0.125, 1.0], "metavar": "SHARE"}
    parser.add_argument("--shares", help="parts of the full size", **shares)
    parser.add_argument("--work", metavar="DIR", help="keep each size's files, in DIR/{share}")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/scale.json"), help="where it goes")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # a measured process: function, folder
    return parser.parse_args(argv)


# -- the data --------------------------------------------------------------------------------------------


def make_data(root: Path) -> None:
    """Not measured: questions, captions, images (links), rationales of three stages, answers of one."""
    from benchmarks.common import find_source

    source, share = find_source(), float((root / "share").read_text())
    known = json.loads((source.data_root / "scienceqa/problems.json").read_text())
    captions = json.loads(source.captions.read_text())
    captions = captions.get("captions", captions)
    known = {qid: problem for qid, problem in known.items() if split_text(problem["solution"])}
    problems, texts, splits, old = {}, {}, {}, list(known)
    (root / "images").mkdir(parents=True)
    for split, count in SPLITS.items():
        splits[split] = [str(len(problems) + i + 1) for i in range(round(share * count))]
        for qid in splits[split]:
            like = old[len(problems) % len(old)]
            hint = f"{known[like]['hint']}\nThis is card {qid}.".strip()
            problems[qid] = known[like] | {"hint": hint, "split": split}
            texts[qid] = captions.get(like, "")
            if known[like]["image"] and (source.images / like).is_dir():
                (root / "images" / qid).symlink_to(source.images / like)
    data = root / "data"
    files.write_json(data / "scienceqa/problems.json", problems, indent=None)
    files.write_json(data / "scienceqa/pid_splits.json", splits, indent=None)
    files.write_json(data / "captions.json", {"captions": texts}, indent=None)
    (root / "tokenizer").symlink_to(source.tokenizer)
    for name in ("mm-cot", "rl", "sft"):
        preds = [f"Solution: {text}" for text in rationales(problems, splits["test"], f"{name} test")]
        labels = [f"Solution: {problems[qid]['solution']}" for qid in splits["test"]]
        scores = {"rationale": {"bleu1": 40.0, "bleu4": 30.0, "rouge": 55.5, "similarity": 88.25}}
        content = {"num_fail": None, "scores": scores, "preds": preds, "labels": labels, "qids": splits["test"]}
        files.write_json(root / name / "predictions_ans_test.json", content)
    letters = ["ABCDE"[problems[qid]["answer"] if int(qid) % 4 else 0] for qid in splits["test"]]
    labels = [f"The answer is ({'ABCDE'[problems[qid]['answer']]})." for qid in splits["test"]]
    preds = [f"The answer is ({letter})." for letter in letters]
    content = {"num_fail": 0, "preds": preds, "labels": labels, "qids": splits["test"], "answers": letters}
    files.write_json(root / "lora/predictions_ans_test.json", content)
    preds = list(rationales(problems, splits["train"], "rl train"))
    files.write_json(root / "rl/predictions_ans_train.json", {"preds": preds, "qids": splits["train"]})


def rationales(problems: dict[str, Any], qids: Sequence[str], seed: str) -> Iterator[str]:
    """A rationale of each question, some of its sentences not gold's own."""
    draw = random.Random(seed)
    gold = [split_text(problems[qid]["solution"]) for qid in qids]
    for sentences in gold:
        said = []
        for sentence in sentences:
            at = draw.random()
            if at < KEEP + REPEAT:
                said += [sentence] * (1 if at < KEEP else 2)
            elif at < KEEP + REPEAT + OTHER:
                said.append(draw.choice(draw.choice(gold)))
        text = " ".join(said or sentences)
        yield text if draw.random() < 0.9 else text[: int(len(text) * draw.uniform(0.5, 0.9))]


def data_flags(root: Path) -> argparse.Namespace:
    """Data flags of run_mm_cot_rl.py, text only."""
    return argparse.Namespace(
        data_root=str(root / "data"), dataset=None, images=None, img_type=None, vision_features=None, name_map=None,
        caption_file=str(root / "data/captions.json"), use_caption=True, options=["A", "B", "C", "D", "E"],
        prompt_format="QCM-E", input_len=512, output_len=512, model="none", tokenizer=str(root / "tokenizer"),
    )  # fmt: skip


# -- measured functions ----------------------------------------------------------------------------------


def start(root: Path) -> None:
    """What run_mm_cot_rl.py does before it loads a model."""
    import torch

    from rl.rollouts import Prompts, RolloutStore
    from utils_data import Collator, RationaleDataset, load_data, load_tokenizer

    flags = data_flags(root)
    data, tokenizer = load_data(flags, {"train": "train"}), load_tokenizer(flags)
    dataset = RationaleDataset(data.problems, data.qids["train"], tokenizer, flags)
    prompts = Prompts(dataset, Collator(tokenizer.pad_token_id), torch.device("cpu"))
    RolloutStore(root / "run", 0).plan(prompts, ROWS, K)


def sample(root: Path) -> None:
    """Not measured: the rollouts of every batch, as sampling leaves them, and the round's folder for the report."""
    import torch

    from rl.rollouts import FIELDS, RolloutStore, to_rollouts
    from utils_data import load_tokenizer

    store, tokenizer = RolloutStore(root / "run", 0), load_tokenizer(data_flags(root))
    problems = files.read_json(root / "data/scienceqa/problems.json", "--work", dict)
    tokenizer.save_pretrained(root / "run/0")
    flags = dict(neutral_score=0.5, init_kl_coef=1e-4, kl_coef=1e-4, gamma=1.0, gae_lambda=0.95, algo="ppo")
    files.write_args(root / "run/0", argparse.Namespace(**flags))
    for number, qids in enumerate(json.loads(store.plan_file.read_text())["batches"]):
        each = [list(rationales(problems, qids, f"{number} {k}")) for k in range(K)]
        rows = [tokenizer(text)["input_ids"] for texts in zip(*each, strict=True) for text in texts]
        width = max(map(len, rows))
        actions = torch.tensor([[0, *row] + [0] * (width - len(row)) for row in rows])
        fields = {name: torch.randn(len(rows), width) for name in FIELDS[1:]}
        to_rollouts({"actions": actions, **fields}, qids, K, 0, tokenizer).save(store.shard(number))


def export(root: Path) -> dict[str, float]:
    """Export the rollouts and signal."""
    from rl.collection import collect
    from rl.rollouts import RolloutStore
    from utils_data import load_tokenizer

    store, tokenizer = RolloutStore(root / "run", 0), load_tokenizer(data_flags(root))
    batches = json.loads(store.plan_file.read_text())["batches"]
    return timed(lambda: collect(store, batches, lambda number, qids: cli.refuse(["no batch is absent"]), tokenizer))


def feedback(root: Path) -> dict[str, float]:
    """Read every reply and decide which count."""
    from rl.rollouts import RolloutStore, read_feedback

    store = RolloutStore(root / "run", 0)
    rows = store.load()
    return timed(lambda: read_feedback(store, rows, 0.5))


def timed(function: Callable[[], Any]) -> dict[str, float]:
    """Seconds and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


FUNCTIONS = {function.__name__: function for function in (make_data, start, sample, export, feedback)}
UNTIMED = ("make_data", "sample")


def stages(root: Path) -> dict[str, list[Any]]:
    """Stage -> its command, in the order of a run."""
    data = ["--data_root", root / "data", "--images", root / "images"]
    questions = ["--questions_dir", root / "run/questions", *data]
    correction = ["--correction_dir", root / "correction", *data]
    train = root / "rl/predictions_ans_train.json"
    cleaned = ["--rationales", root / "rl/remove_repetitive_sentences.json"]
    systems = {"MM-CoT": "mm-cot", "RL": "rl", "SFT": "sft", "LoRA": "lora"}
    named = {flag: [word for name, folder in systems.items() for word in (flag, f"{name}={root / folder}")]
             for flag in ("--stage", "--system")}  # fmt: skip
    child = {name: [__file__, "--child", name, root] for name in FUNCTIONS}
    return {
        "make_data": child["make_data"],
        "start": child["start"],
        "sample": child["sample"],
        "export": child["export"],
        "requests": ["preprocessing_after_RL/processing_sentence_level_feedback.py", *questions],
        "reference scores": ["haiku.py", "--teacher", "reference", *questions],
        "feedback": child["feedback"],
        "repeats": ["preprocessing_after_RL/remove_sentence.py", "--file_path", train],
        "correction requests": ["preprocessing_for_correction_feedback.py", *correction, *cleaned],
        "corrections": ["haiku_for_correction_feedback.py", "--teacher", "reference", *correction, *cleaned],
        "report": ["tools/report.py", *named["--stage"], "--run", root / "run", *correction,
                   "--caption_file", root / "data/captions.json", "--output", root / "report/report.html"],
        "results": ["tools/results.py", *named["--system"], *data[:2], "--output", root / "table.md"],
    }  # fmt: skip


# -- measuring -------------------------------------------------------------------------------------------


def measure_share(root: Path, share: float) -> dict[str, dict[str, float]]:
    """Seconds, CPU seconds and peak memory (MB) of every stage at one size."""
    files.write_text(root / "share", str(share))  # what imports torch is done by children: peak memory is inherited
    found = {}
    for name, command in stages(root).items():
        result, said = measured(name, command, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        for line in said.splitlines():
            result |= json.loads(line.removeprefix(TIMED)) if line.startswith(TIMED) else {}
        if name not in UNTIMED:
            found[name] = {key: round(value, None if key == "mb" else 2) for key, value in result.items()}
            cli.print0(f"{share:g} {name}: {found[name]}")
    return found


def table(found: dict[float, dict[str, dict[str, float]]]) -> list[str]:
    """Lines of a Markdown table: per size seconds (CPU seconds), the exponent, the memory at the largest size."""
    shares = sorted(found)
    lines = [f"| stage | {' | '.join(f'size {share:g}, s (CPU)' for share in shares)} | exponent | memory | wanted |",
             "|---" * (len(shares) + 4) + "|"]  # fmt: skip
    for name in found[shares[-1]]:
        each = [found[share][name] for share in shares]
        cpu = each[-1]["cpu"] / each[0]["cpu"]
        grown = math.log(cpu) / math.log(shares[-1] / shares[0]) if shares[1:] else math.nan
        wanted = f"<= {WANTED[name]} s" if name in WANTED else ""
        times = " | ".join(f"{one['seconds']:.1f} ({one['cpu']:.1f})" for one in each)
        lines.append(f"| {name} | {times} | {grown:.2f} | {each[-1]['mb']:.0f} MB | {wanted} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.child:
        function, folder = args.child
        if times := FUNCTIONS[function](Path(folder)):
            cli.print0(TIMED + json.dumps(times))
        return
    found = {}
    for share in args.shares:
        with tempfile.TemporaryDirectory(dir=args.work and files.writable_dir(args.work, "--work")) as scratch:
            root = Path(args.work, f"{share:g}") if args.work else Path(scratch)
            found[share] = measure_share(root, share)
    for line in table(found):
        cli.print0(line)
    files.write_json(args.output, {"cores": os.cpu_count(), "full size": SPLITS, "k": K, "shares": found}, indent=1)


if __name__ == "__main__":
    cli.run(main)
