"""Generating and scoring a test split: questions per second of sft/predict.py against the released recipe.

    python benchmarks/bench_eval.py --size tiny --device cpu

Both sides generate the same rationales of `--rows` test questions, ended at their gold lengths (endings.py), and score
them. The released recipe generates the split twice; the second pass equals the first, so its time is doubled instead
of run. Checked first, in fp32: the same ids and the same scores. The scores are timed alone as well, of gold
rationales cut to two thirds. `--no_similarity` skips the embeddings, `--no_scores` all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ares import cli
from benchmarks import common, limits, released_recipe
from benchmarks.endings import EndingPolicy
from model import choose_attention
from sft import predict as prediction
from sft.predict import Predictor
from utils_evaluate import get_scores, similarity_model

EVAL_BS, OUTPUT_LEN = 16, 512
NEAR_TIES = 0.125  # share of texts that may differ on a GPU


class Sides:
    """Both ways from questions to scores."""

    def __init__(self, args: argparse.Namespace):
        self.device = torch.device(args.device)
        self.data = data = common.load(args)
        self.dataset = data.dataset("test", args.rows)
        self.plain, self.fast, self.library = (
            EndingPolicy.from_pretrained(data.model).to(self.device).eval() for _ in range(3)
        )
        released_recipe.plain_model(self.plain)
        released_recipe.plain_model(self.library, "sdpa")
        choose_attention(self.fast, self.device)
        for model in (self.plain, self.fast, self.library):
            model.know(self.dataset, data.dataset("test"))
        self.features = released_recipe.LoadedFeatures(data.features.path, data.features.name_map)
        self.only_ids = args.no_scores
        self.encoder = None if args.no_similarity or args.no_scores else similarity_model()
        form = ("--prompt_format", "QCM-E", "--output_len", OUTPUT_LEN)
        flags = common.sft_flags("--use_generate", "--eval_bs", EVAL_BS, *form)
        bf16 = cli.mixed_precision(flags.precision) == "bf16"
        self.predictor = Predictor(flags, data.problems, data.tokenizer, data.collator, self.device, bf16=bf16)

    def texts(self, dataset, rows: list[list[int]]) -> list[dict[str, str]]:
        """qid -> decoded row: the predictions, and the references."""
        return [dict(zip(dataset.qids, self.predictor.decode(ids), strict=True)) for ids in (rows, dataset.labels)]

    def released(self) -> dict[str, float]:
        """One pass of generation, then scores, with its seconds apart: `report` counts the pass twice."""
        began = time.perf_counter()
        self.released_ids = released_recipe.generate_split(
            self.plain, self.dataset, self.features, self.device, EVAL_BS, OUTPUT_LEN
        )
        self.pass_seconds = time.perf_counter() - began
        if self.only_ids:
            return {}
        return released_recipe.rationale_scores(*self.texts(self.dataset, self.released_ids), self.encoder)

    def library_ids(self) -> list[list[int]]:
        """Greedy ids of every question by transformers' `generate`, in the batches of our side."""
        with mock.patch.object(prediction, "greedy", _generate):
            return self.predictor.predict(self.library, self.dataset, "library")

    def our_greedy_ids(self, dataset=None) -> list[list[int]]:
        with self.fast.ending_greedy():
            return self.predictor.predict(self.fast, dataset or self.dataset, "generate")

    def ours(self, dataset=None) -> dict[str, float]:
        self.our_ids = self.our_greedy_ids(dataset)
        return {} if self.only_ids else self.our_scores(dataset or self.dataset, self.our_ids)

    def our_scores(self, dataset, ids: list[list[int]]) -> dict[str, float]:
        return get_scores({}, *self.texts(dataset, ids), self.data.problems, self.encoder is not None)["rationale"]


def _generate(model, inputs, max_length: int) -> torch.Tensor:
    return model.generate(**inputs, max_length=max_length, do_sample=False)


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(
        __doc__, argv, rows=(16, "test questions, a multiple of 16"),
        no_similarity=(False, "skip the embedding model"),
        no_scores=(False, "generation alone, where nltk or rouge are absent"),
    )  # fmt: skip
    sides = Sides(args)
    equal = checks(sides)

    def seconds(function, device) -> float:
        took = limits.seconds(function, device)
        return took + sides.pass_seconds if function == sides.released else took  # the split is generated twice

    result = common.compare(sides.released, sides.ours, args, (args.rows, args.rows), time_of=seconds)
    peer = common.against_library(sides.library_ids, sides.our_greedy_ids, args)
    more = {} if args.no_scores else {"scores": scores_alone(sides, args, 8 * args.rows)}
    scaling = growth(sides, 8 * args.rows)
    common.profile(sides.ours, args)
    per_question = result["ours"]["median"]
    common.report(
        args, "eval", result, equal=equal, limit=how_close(sides, per_question), peer=peer, scaling=scaling,
        slice=f"{args.rows} test questions; seconds per question",
        projection={"generate_seconds_per_question": per_question}, **more,
    )  # fmt: skip


def checks(sides: Sides) -> list[str]:
    """Both sides write the same ids, in fp32, and give the same scores to the released side's. On a GPU, whose kernels
    round differently for other shapes, a few texts may go apart where two tokens are equally likely."""
    bf16, sides.predictor.bf16 = sides.predictor.bf16, False
    apart = NEAR_TIES if sides.device.type == "cuda" else 0.0
    sides.ours()
    released = sides.released()
    equal = [
        common.check("greedy ids of every question", sides.released_ids, sides.our_ids, apart),
        common.check("greedy ids of the library", sides.library_ids(), sides.our_greedy_ids(), apart),
    ]
    if released:
        ours = sides.our_scores(sides.dataset, sides.released_ids)
        pair = ([one[name] for name in ours] for one in (released, ours))
        equal.append(common.check("scores of the same ids", *map(torch.tensor, pair), 1e-4))
    if bf16:
        sides.predictor.bf16 = True
        sides.ours()  # its kernels are loaded before the timing
    return equal


def scores_alone(sides: Sides, args: argparse.Namespace, questions: int) -> dict[str, float]:
    """Ratio of the time of the scores: question by question, over ours."""
    dataset = sides.data.dataset("test", questions)
    texts = sides.texts(dataset, [row[: 2 * len(row) // 3] for row in dataset.labels])

    def ours() -> None:
        get_scores({}, *texts, sides.data.problems, sides.encoder is not None)

    ours()
    return common.compare(lambda: released_recipe.rationale_scores(*texts, sides.encoder), ours, args)["ratio"]


def growth(sides: Sides, questions: int) -> dict[str, float]:
    """Time of the same questions in one part (4x) and in two (2x) over that in four: 1.0 is linear."""
    whole = sides.data.dataset("test", questions)

    def seconds(parts: int) -> float:
        some = [sides.data.of(whole.qids[i::parts]) for i in range(parts)]
        return sum(limits.seconds(lambda one=one: sides.ours(one), sides.device) for one in some)

    quarters = seconds(4)
    return {"2x": seconds(2) / quarters, "4x": seconds(1) / quarters}


def how_close(sides: Sides, per_row: float) -> str:
    """On a GPU the FLOPs of real tokens over the peak; on a CPU the share of the bare matrix products."""
    model, rows = sides.fast, sides.dataset
    if sides.device.type == "cuda":
        flops = limits.mean_flops(model.config, rows)  # texts end at the lengths of their targets
        return limits.utilisation(flops, per_row, "cuda", torch.bfloat16 if sides.predictor.bf16 else torch.float32)
    with model.ending_greedy():
        predict = sides.predictor.predict
        return limits.share_of_products(lambda: predict(model, rows, "products"), "cpu", len(rows), per_row)


if __name__ == "__main__":
    cli.run(main)
