"""Rollouts - sampling and three scoring passes - against the released way, on real prompts.

    python benchmarks/bench_rollout.py --size tiny --device cpu --json rollout.json

One process, the same weights, texts of the same lengths on both sides. Checked first: both give the same
numbers for the same ids, and both generate the wanted lengths. The Teacher and the rollout files are not part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, the project is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ares import cli
from ares.decoding import action_mask
from benchmarks import common, limits, released_recipe, released_rl, rl_common
from rl import sampling


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--questions", type=int, default=4, help="the released way's (default: %(default)s)")
    parser.add_argument("--bs", type=int, default=16, help="ours, one batch of them (default: %(default)s)")
    parser.add_argument("--k_actions", type=int, default=4, help="rationales per question (default: %(default)s)")
    parser.add_argument("--output_len", type=int, default=128, help="longest rationale (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=50, help="(default: %(default)s)")
    return parser.parse_args(argv)


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args, self.scale = args, 4 * max(args.questions, args.bs)
        self.world = rl_common.make_world(args, self.scale)
        self.how = sampling.Sampling(args.k_actions, True, args.top_k, 1.0, args.output_len)
        # the same lengths of texts again and again, so that both sides write alike per question
        self.lengths = self.world.lengths(args.questions * args.k_actions).repeat(self.scale)
        # by falling length of the prompt, as a plan of sampling batches
        self.order = sorted(self.world.dataset.qids, key=lambda qid: -self.world.prompts.lengths[qid])

    def batches(self, questions: int):
        """(prompts, lengths of their texts) of questions spread evenly over all of them, each batch a like mixture:
        batches of like prompts, as the product makes them, would be cheaper the more questions there are."""
        chosen = [self.order[i * self.scale // questions] for i in range(questions)]
        count = -(-questions // self.args.bs)
        for i in range(count):
            qids = chosen[i::count]
            yield self.world.prompts.batch(qids), self.lengths[: len(qids) * self.args.k_actions]

    def ours(self, questions: int) -> list[dict]:
        found = []
        for prompt, lengths in self.batches(questions):
            with rl_common.ending(lengths), self.autocast():
                found.append(sampling.sample_batch(self.world.models, prompt, self.how, seed=self.args.seed))
        return found

    def autocast(self):
        """bf16 on a GPU, as --precision auto."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.args.device == "cuda")

    def released(self, questions: int) -> list[dict]:
        return [self.released_batch(prompt, lengths) for prompt, lengths in self.batches(questions)]

    def released_batch(self, prompt: dict, lengths: torch.Tensor) -> dict:
        how, models = self.how, self.world.models
        lengths = lengths.view(-1, how.k).to(self.world.device)
        with contextlib.ExitStack() as stack:
            for model in (models.policy, models.reference, models.value_function):
                stack.enter_context(released_recipe.plainly(model))
            return released_rl.rollouts(models, prompt, how.k, how.top_k, how.output_len, lengths)

    def check(self) -> list[str]:
        """Both sides on the same ids (fp32), and the lengths that both write."""
        (prompt, lengths), *_ = self.batches(min(4, self.args.questions))
        (ours,), k = self.ours(min(4, self.args.questions)), self.args.k_actions
        actions = ours["actions"]
        repeated = {name: tensor.repeat_interleave(k, 0) for name, tensor in prompt.items()}
        wide = released_rl.padded_actions(actions, self.args.output_len).to(self.world.device)
        models, said = self.world.models, []
        for name, model in (("logprobs", models.policy), ("values", models.value_function)):
            got = sampling.evaluate_actions(model, prompt, actions, k, value=name == "values")
            want = released_rl.score(model, repeated, wide).cpu()[:, : got.size(1)]
            said.append(common.check(f"{name} of the same ids", got.detach(), want.detach(), 5e-4))
        theirs = self.released_batch(prompt, lengths)
        for side, found in (("ours", ours), ("released", theirs)):
            written = action_mask(found["actions"]).sum(1)
            said.append(common.check(f"lengths written, {side}", written.tolist(), lengths.tolist()))
        return said


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    bench = Bench(args)
    n = args.questions
    equal = bench.check()
    work = (n * args.k_actions, args.bs * args.k_actions)  # rollouts
    result = common.compare(lambda: bench.released(n), lambda: bench.ours(args.bs), args, work=work)
    common.profile(lambda: bench.ours(args.bs), args)
    per_rollout = result["ours"]["median"]
    bare = limits.products(lambda: bench.ours(args.bs)).seconds(torch.device(args.device)) / work[1]
    tokens = float(bench.lengths.float().mean())
    common.report(
        args, "rollouts", result, target=">= 8x" if args.device == "cpu" else ">= 20x", equal=equal,
        slice=f"k = {args.k_actions}, {tokens:.0f} tokens in the mean, output_len {args.output_len}; per rollout, "
        f"of {n} questions the released way, of {args.bs} ours",
        limit=f"{bare / per_rollout:.0%} of the time is the bare matrix products",
        scaling=common.linear(bench.ours, argparse.Namespace(**vars(args) | {"repeats": 1}), unit=args.bs),
        projection={"seconds_per_rollout": per_rollout},
        rollouts_per_second=1 / per_rollout,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
