"""Rollouts - sampling and three scoring passes - against the released way, on real prompts.

    python benchmarks/bench_rollout.py --size tiny --device cpu --json rollout.json

One process, the same weights, texts of the same lengths on both sides. Checked first: both give the same
numbers for the same ids, and both generate the wanted lengths. The Teacher and the rollout files are not part of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from ares import cli
from ares.decoding import action_mask
from benchmarks import common, limits, released_recipe, released_rl, rl_common
from benchmarks.endings import end_at
from rl import actor_critic, sampling


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args, self.scale = args, 4 * max(args.questions, args.bs)
        self.world = rl_common.World(args, self.scale)
        self.models = self.world.sampling_models()
        self.how = sampling.Sampling(args.k_actions, True, args.top_k, 1.0, args.output_len)
        # the same lengths of texts again and again, so that both sides write alike per question
        count, longest = args.questions * args.k_actions, args.output_len - 1
        lengths = rl_common.solution_lengths(self.world.dataset, count, longest, args.seed)
        self.lengths = lengths.repeat(self.scale)
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

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU, as --precision auto."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.args.device == "cuda")

    def sample(self, prompt: dict, lengths: torch.Tensor) -> dict:
        with rl_common.ending(lengths), self.autocast():
            return sampling.sample_batch(self.models, prompt, self.how, seed=self.args.seed)

    @torch.no_grad()
    def generate(self, prompt: dict, lengths: torch.Tensor) -> torch.Tensor:
        """Sampling alone, no scoring."""
        with rl_common.ending(lengths), self.autocast():
            states = actor_critic.encode(self.models.policy, prompt)
            return sampling.generate(self.models.policy, states, prompt["attention_mask"], self.how, self.args.seed)

    def library_generate(self, prompt: dict, lengths: torch.Tensor) -> torch.Tensor:
        """The same by transformers' `generate`."""
        policy, how = self.world.models.policy, self.how
        ends = partial(end_at, lengths.to(self.world.device))
        with released_recipe.plainly(policy, attention="sdpa"), self.autocast():
            return policy.generate(
                **prompt, do_sample=True, top_k=how.top_k, max_length=how.output_len, suppress_tokens=[0],
                num_return_sequences=how.k, logits_processor=[ends],
            )  # fmt: skip

    def each(self, function: Callable, questions: int) -> list:
        """What `function` returns for every batch of `questions` questions."""
        return [function(prompt, lengths) for prompt, lengths in self.batches(questions)]

    def ours(self, questions: int) -> list[dict]:
        return self.each(self.sample, questions)

    def released(self, questions: int) -> list[dict]:
        return self.each(self.released_batch, questions)

    def released_batch(self, prompt: dict, lengths: torch.Tensor) -> dict:
        how, models = self.how, self.world.models
        lengths = lengths.view(-1, how.k).to(self.world.device)
        with released_recipe.plainly(models.policy, models.reference, models.value_function):
            return released_rl.rollouts(models, prompt, how.k, how.top_k, how.output_len, lengths)

    def check(self) -> list[str]:
        """Both sides on the same ids (fp32), and the lengths that both write."""
        (prompt, lengths), *_ = self.batches(min(4, self.args.questions))
        (ours,), k = self.ours(min(4, self.args.questions)), self.args.k_actions
        actions = ours["actions"]
        repeated = {name: tensor.repeat_interleave(k, 0) for name, tensor in prompt.items()}
        wide = F.pad(actions, (0, self.args.output_len - actions.size(1))).to(self.world.device)
        models, equal = self.world.models, []
        for name, model in (("logprobs", models.policy), ("values", models.value_function)):
            got = sampling.evaluate_actions(model, prompt, actions, k, value=name == "values")
            want = released_rl.score(model, repeated, wide).cpu()[:, : got.size(1)]
            equal.append(common.check(f"{name} of the same ids", got.detach(), want.detach(), 5e-4))
        theirs = self.released_batch(prompt, lengths)
        for side, found in (("ours", ours), ("released", theirs)):
            written = action_mask(found["actions"]).sum(1)
            equal.append(common.check(f"lengths written, {side}", written.tolist(), lengths.tolist()))
        return equal


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(
        __doc__, argv, questions=(4, "the released way's"), bs=(16, "ours, one batch of them"),
        k_actions=(4, "rationales per question"), output_len=(128, "longest rationale"),
        top_k=(50, "most likely tokens to draw from"),
    )  # fmt: skip
    bench, n, rollouts = Bench(args), args.questions, args.bs * args.k_actions
    half = max(1, args.bs // 2)

    def ours() -> None:
        bench.ours(args.bs)

    equal = bench.check()
    ours()
    result = common.compare(lambda: bench.released(n), ours, args, work=(n * args.k_actions, rollouts))
    peer = common.against_library(
        lambda: bench.each(bench.library_generate, half), lambda: bench.each(bench.generate, args.bs), args,
        work=(half, args.bs),
    )  # fmt: skip
    common.profile(ours, args)
    per_rollout, tokens = result["ours"]["median"], float(bench.lengths.float().mean())
    common.report(
        args, "rollout", result, equal=equal, peer=peer,
        slice=f"k = {args.k_actions}, {tokens:.0f} tokens in the mean, output_len {args.output_len}; per rollout, "
        f"of {n} questions the released way, of {args.bs} ours",
        limit=limits.share_of_products(ours, args.device, rollouts, per_rollout),
        scaling=common.linear(bench.ours, args.device, unit=args.bs),
        projection={"seconds_per_rollout": per_rollout}, rollouts_per_second=1 / per_rollout,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
