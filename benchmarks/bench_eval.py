"""Generating and scoring a test split: questions per second of sft/predict.py against the released recipe.

    python benchmarks/bench_eval.py --size tiny --device cpu

Both sides generate the same rationales of `--rows` test questions, ended at their gold lengths (endings.py), and score
them. The released recipe generates the split twice; the second pass equals the first, so its time is doubled instead
of run. Checked first: the same ids and the same scores. `--no_similarity` skips the embeddings.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, the project is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ares import cli
from benchmarks import common, limits, released_recipe
from benchmarks.endings import EndingPolicy
from model import choose_attention
from sft.predict import Predictor
from utils_evaluate import get_scores, similarity_model

EVAL_BS, OUTPUT_LEN = 16, 512


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=16, help="test questions, a multiple of 16 (default: %(default)s)")
    parser.add_argument("--no_similarity", action="store_true", help="skip the embedding model")
    return parser.parse_args(argv)


class Sides:
    """Both ways from questions to scores."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.data = data = common.load(args, output_len=OUTPUT_LEN)
        folder = common.model_folder(args, data)
        self.dataset = data.dataset("test", args.rows)
        self.plain, self.fast = (EndingPolicy.from_pretrained(folder).to(device).eval() for _ in range(2))
        released_recipe.plain_model(self.plain)
        choose_attention(self.fast, device)
        for model in (self.plain, self.fast):
            model.know(self.dataset, data.dataset("test"))
        self.features = released_recipe.LoadedFeatures(data.features.path, data.features.name_map)
        self.encoder = None if args.no_similarity else similarity_model()
        flags = common.sft_flags("--use_generate", "--eval_bs", str(EVAL_BS), "--prompt_format", "QCM-E",
                                 "--output_len", str(OUTPUT_LEN))  # fmt: skip
        bf16 = cli.mixed_precision(flags.precision) == "bf16"
        self.predictor = Predictor(flags, data.problems, data.tokenizer, data.collator(), device, bf16=bf16)

    def texts(self, dataset, rows: list[list[int]]) -> dict[str, str]:
        """qid -> decoded row."""
        return dict(zip(dataset.qids, self.predictor.decode(rows), strict=True))

    def released(self) -> dict[str, float]:
        """One pass of generation, then scores, with its seconds apart: `report` counts the pass twice."""
        began = time.perf_counter()
        self.released_ids = released_recipe.generate_split(
            self.plain, self.dataset, self.features, self.device, EVAL_BS, OUTPUT_LEN
        )
        self.pass_seconds = time.perf_counter() - began
        predictions, references = (self.texts(self.dataset, ids) for ids in (self.released_ids, self.dataset.labels))
        return released_recipe.rationale_scores(predictions, references, self.encoder)

    def ours(self, dataset=None) -> dict[str, float]:
        dataset = dataset or self.dataset
        with self.fast.ending_greedy():
            self.our_ids = self.predictor.predict(self.fast, dataset, "generate")
        predictions, references = (self.texts(dataset, ids) for ids in (self.our_ids, dataset.labels))
        found = get_scores({}, predictions, references, self.data.problems, self.encoder is not None)
        return found["rationale"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = common.set_up(args)
    sides = Sides(args, device)
    ours, released = sides.ours(), sides.released()
    equal = [
        common.check("greedy ids of every question", sides.released_ids, sides.our_ids),
        common.check("scores", torch.tensor([released[n] for n in ours]), torch.tensor(list(ours.values())), 1e-4),
    ]

    def seconds(function, device) -> float:
        took = common.seconds(function, device)
        return took + sides.pass_seconds if function == sides.released else took  # the split is generated twice

    result = common.compare(sides.released, sides.ours, args, (args.rows, args.rows), warm_up=False, time_of=seconds)
    scaling = growth(sides, 8 * args.rows)
    common.profile(sides.ours, args)
    common.report(
        args, "generate + score", result, target=">= 10x" if args.device == "cpu" else ">= 20x", equal=equal,
        limit=how_close(sides, device, result["ours"]["median"]), scaling=scaling,
        slice=f"{args.rows} test questions; seconds per question",
        projection={"generate_seconds_per_question": result["ours"]["median"]},
    )  # fmt: skip


def growth(sides: Sides, questions: int) -> dict[str, float]:
    """Time of the same questions in one part (4x) and in two (2x) over that in four: 1.0 is linear."""
    whole = sides.data.dataset("test", questions)

    def seconds(parts: int) -> float:
        some = [sides.data.of(whole.qids[i::parts]) for i in range(parts)]
        return sum(common.seconds(lambda one=one: sides.ours(one), sides.device) for one in some)

    quarters = seconds(4)
    return {"2x": seconds(2) / quarters, "4x": seconds(1) / quarters}


def how_close(sides: Sides, device: torch.device, per_row: float) -> str:
    """On a GPU the FLOPs of real tokens over the peak; on a CPU the share of the bare matrix products."""
    rows = common.lengths(sides.dataset)  # texts end at the lengths of their targets
    if device.type == "cuda":
        flops = sum(limits.row_flops(sides.fast.config, *row) for row in rows)
        dtype = torch.bfloat16 if sides.predictor.bf16 else torch.float32
        return f"model FLOP utilisation {flops / len(rows) / per_row / limits.peak_flops(device, dtype):.1%}"
    with sides.fast.ending_greedy():
        work = limits.products(lambda: sides.predictor.predict(sides.fast, sides.dataset, "products"))
    return f"bare matrix products of the model take {work.seconds(device) / len(rows) / per_row:.0%} of our time"


if __name__ == "__main__":
    cli.run(main)
