"""PPO updates against the released way, on real prompts and the real solutions as rationales.

    python benchmarks/bench_ppo.py --size tiny --device cpu --json ppo.json

One process, the same weights and rows. Checked first: both give the same losses and gradients. Sampling and
the saving of states are not part of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ares import cli
from ares.decoding import action_mask
from benchmarks import common, limits, released_recipe, released_rl, rl_common
from rl import flags, memory, minibatches, ppo, sampling
from rl import trainer as ppo_trainer
from rl.metrics import Metrics
from rl.rollouts import Rollouts

K = 4


class Bench:
    def __init__(self, args: argparse.Namespace):
        from accelerate import Accelerator

        self.args, world = args, rl_common.World(args, args.questions)
        parser = argparse.ArgumentParser()
        flags.add_flags(parser)
        run = parser.parse_args(["--base_model_dir", "."])
        # a rate at which weights stay what they are: every call is then the same work
        run.lr, run.rl_batch_size, run.ga_step, run.log_term = 1e-12, args.rl_batch_size, args.ga_step, 10**9
        run.pass_tokens = memory.PASS_TOKENS if args.device == "cuda" else None  # the default on a GPU of 40 GB
        precision = "bf16" if args.device == "cuda" else "no"
        data = make_rollouts(world, args)
        self.trainer = ppo_trainer.PpoTrainer(
            world.models.policy, world.models.value_function, data, world.prompts, run,
            Accelerator(cpu=args.device == "cpu", mixed_precision=precision), Path(tempfile.gettempdir()),
            Metrics(Path(tempfile.mkdtemp(prefix="bench-ppo-")), "none", {}), 0,
        )  # fmt: skip
        plan = minibatches.plan_epoch(self.trainer.lengths, args.rl_batch_size, 1, args.ga_step, args.seed)
        self.step = plan[0]  # the last update may be short
        self.optimizer = released_recipe.optimizer_of(self.trainer.raw, 1e-12)

    def ours(self, updates: int = 1) -> None:
        for _ in range(updates):
            self.trainer._update(self.step, 10**6)

    def released(self, entropy: bool = False) -> dict[str, float]:
        raw = self.trainer.raw
        with released_recipe.plainly(raw.policy, raw.value_function):
            return released_rl.update(self.trainer, self.optimizer, self.step, self.args.output_len, entropy)

    def check(self) -> list[str]:
        """Losses, entropy and gradients of one update, fp32."""
        logged, grads = [], []
        trainer, log = self.trainer, self.trainer.metrics.log

        def keep():
            grads.append({n: p.grad.clone() for n, p in trainer.raw.named_parameters() if p.grad is not None})

        steps = (trainer.optimizer.step, self.optimizer.step)
        trainer.optimizer.step = self.optimizer.step = keep
        trainer.metrics.log = lambda kind, number, update, values, **place: logged.append(values)
        self.ours(), logged.append(self.released(entropy=True))
        trainer.optimizer.step, self.optimizer.step = steps
        trainer.metrics.log = log
        ours, released = logged
        tolerance = 1e-4 if self.args.device == "cpu" else 0.05  # bf16 on a GPU
        equal = [
            common.check(name, float(ours[name]), float(released[name]), tolerance * max(1, abs(released[name])))
            for name in ("policy_loss", "value_loss", "entropy")
        ]
        far = max(float((grads[0][n] - g).norm() / g.norm().clamp(min=1e-12)) for n, g in grads[1].items())
        return [*equal, common.check("gradients, distance over norm, worst parameter", far, 0.0, 10 * tolerance)]


def make_rollouts(world: rl_common.World, args: argparse.Namespace) -> ppo.ScoredRollouts:
    """K real solutions as rationales of each question, with the policy's own log-probabilities and random returns."""
    qids, count = world.dataset.qids, K * len(world.dataset)
    g = torch.Generator().manual_seed(args.seed)
    texts = [labels[: args.output_len - 1] for labels in world.dataset.labels]
    rows = [texts[i] for i in torch.randint(len(texts), (count,), generator=g).tolist()]
    lengths = torch.tensor([len(row) for row in rows])
    actions = torch.nn.utils.rnn.pad_sequence([torch.tensor([0, *row]) for row in rows], batch_first=True)
    parts = []
    with torch.no_grad():
        for begin in range(0, len(qids), 32):
            some = qids[begin : begin + 32]
            chunk = actions[begin * K : (begin + len(some)) * K]
            scores = sampling.evaluate_actions(world.models.policy, world.prompts.batch(some), chunk, K)
            parts.append(scores[action_mask(chunk)])
    logprobs = torch.cat(parts)
    noise = torch.randn(4, len(logprobs), generator=g)
    rolls = Rollouts(
        qids=[qid for qid in qids for _ in range(K)], action=list(range(K)) * len(qids), rank=[0] * count,
        lengths=lengths, sentence_counts=torch.ones_like(lengths), columns=lengths.int(),
        tokens=torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        logprobs=logprobs + 0.1 * noise[0], ref_logprobs=logprobs + 0.1 * noise[1], values=torch.zeros_like(logprobs),
    )  # fmt: skip
    one = torch.ones(count)
    return ppo.ScoredRollouts(rolls, noise[2], noise[3], noise[3], one, one, [[1.0]] * count, one.bool(), 0.0)


def peak(function: Callable) -> int:
    """Peak GPU memory of a call in bytes, besides the weights and optimizers of both sides."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(
        __doc__, argv, rl_batch_size=(8, "rows per minibatch"), ga_step=(4, "minibatches per update"),
        output_len=(128, "longest rationale"), questions=(64, "questions to draw from"),
    )  # fmt: skip
    bench = Bench(args)
    equal = bench.check()
    result = common.compare(bench.released, bench.ours, args)
    common.profile(bench.ours, args)
    per_update, rows = result["ours"]["median"], args.rl_batch_size * args.ga_step
    tokens = float(bench.trainer.data.rollouts.lengths.float().mean())
    more = {}
    if args.device == "cuda":
        prompt = statistics.fmean(bench.trainer.prompts.lengths.values())
        flops = rows * 2 * 3 * limits.row_flops(bench.trainer.raw.policy.config, int(prompt), int(tokens))
        more["mfu"] = limits.utilisation(flops, per_update, args.device, torch.bfloat16)
        ours, released = peak(bench.ours), peak(bench.released)
        sizes = f"{ours / 2**30:.1f} GiB of {released / 2**30:.1f} GiB"
        more["peak_memory"] = f"{ours / released:.0%} ({sizes}, weights and optimizer not counted)"
    common.report(
        args, "ppo", result, equal=equal,
        slice=f"updates of {args.ga_step} minibatches of {args.rl_batch_size}, output_len {args.output_len}, "
        f"{tokens:.0f} real tokens in the mean",
        limit=limits.share_of_products(bench.ours, args.device, 1, per_update),
        scaling=common.linear(bench.ours, args.device), projection={"seconds_per_row": per_update / rows},
        updates_per_second=1 / per_update, **more,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
