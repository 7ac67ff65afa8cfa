"""PPO updates against the released way, on real prompts and the real solutions as rationales.

    python benchmarks/bench_ppo.py --size tiny --device cpu --json ppo.json

One process, the same weights and rows. Checked first: both give the same losses and gradients. Sampling and
the saving of states are not part of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, the project is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ares import cli
from ares.decoding import action_mask
from benchmarks import common, limits, released_recipe, released_rl, rl_common
from rl import flags, minibatches, ppo, sampling
from rl import trainer as ppo_trainer
from rl.metrics import Metrics
from rl.rollouts import Rollouts

K = 4


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--rl_batch_size", type=int, default=8, help="rows per minibatch (default: %(default)s)")
    parser.add_argument("--ga_step", type=int, default=4, help="minibatches per update (default: %(default)s)")
    parser.add_argument("--output_len", type=int, default=128, help="longest rationale (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=64, help="questions to draw from (default: %(default)s)")
    return parser.parse_args(argv)


class Bench:
    def __init__(self, args: argparse.Namespace):
        from accelerate import Accelerator

        self.args, world = args, rl_common.make_world(args, args.questions)
        parser = argparse.ArgumentParser()
        flags.add_flags(parser)
        run = parser.parse_args(["--base_model_dir", "."])
        # a rate at which weights stay what they are: every call is then the same work
        changes = {"lr": 1e-12, "rl_batch_size": args.rl_batch_size, "ga_step": args.ga_step, "log_term": 10**9}
        for name, value in changes.items():
            setattr(run, name, value)
        precision = "bf16" if args.device == "cuda" else "no"
        data = make_rollouts(world, args)
        self.trainer = ppo_trainer.PpoTrainer(
            world.models.policy, world.models.value_function, data, world.prompts, run,
            Accelerator(cpu=args.device == "cpu", mixed_precision=precision), Path(tempfile.gettempdir()),
            Metrics(Path(tempfile.mkdtemp(prefix="bench-ppo-")), "none", {}), 0,
        )  # fmt: skip
        lengths = [
            (int(n), world.prompts.lengths[qid])
            for n, qid in zip(data.rollouts.lengths, data.rollouts.qids, strict=True)
        ]
        plan = minibatches.plan_epoch(lengths, args.rl_batch_size, 1, args.ga_step, args.seed)
        self.plan = plan[:-1]  # the last update may be short
        self.optimizer = released_recipe.optimizer_of(self.trainer.raw, 1e-12)

    def ours(self, updates: int = 1) -> None:
        for _ in range(updates):
            self.trainer._update(self.plan[0], 10**6)

    def released(self) -> dict[str, float]:
        raw = self.trainer.raw
        with released_recipe.plainly(raw.policy), released_recipe.plainly(raw.value_function):
            return released_rl.update(self.trainer, self.optimizer, self.plan[0], self.args.output_len)

    def check(self) -> list[str]:
        """Losses, entropy and gradients of one update, fp32."""
        logged, grads = [], []
        trainer, log = self.trainer, self.trainer.metrics.log

        def keep():
            grads.append({n: p.grad.clone() for n, p in trainer.raw.named_parameters() if p.grad is not None})

        steps = (trainer.optimizer.step, self.optimizer.step)
        trainer.optimizer.step = self.optimizer.step = keep
        trainer.metrics.log = lambda kind, number, update, values, **place: logged.append(values)
        self.ours(), logged.append(self.released())
        trainer.optimizer.step, self.optimizer.step = steps
        trainer.metrics.log = log
        ours, released = logged
        tolerance = 1e-4 if self.args.device == "cpu" else 0.05  # bf16 on a GPU
        said = [
            common.check(name, float(ours[name]), float(released[name]), tolerance * max(1, abs(released[name])))
            for name in ("policy_loss", "value_loss", "entropy")
        ]
        far = max(float((grads[0][n] - g).norm() / g.norm().clamp(min=1e-12)) for n, g in grads[1].items())
        return [*said, common.check("gradients, distance over norm, worst parameter", far, 0.0, 10 * tolerance)]


def make_rollouts(world: rl_common.World, args: argparse.Namespace) -> ppo.ScoredRollouts:
    """K real solutions as rationales of each question, with the policy's own log-probabilities and random returns."""
    items = [world.dataset[i] for i in range(len(world.dataset))]
    g = torch.Generator().manual_seed(args.seed)
    texts = [list(item["labels"])[: args.output_len - 1] for item in items]
    pick = torch.randint(len(texts), (len(items) * K,), generator=g).tolist()
    rows = [texts[i] for i in pick]
    lengths = torch.tensor([len(row) for row in rows])
    actions = torch.nn.utils.rnn.pad_sequence([torch.tensor([0, *row]) for row in rows], batch_first=True)
    parts = []
    with torch.no_grad():
        for begin in range(0, len(items), 32):
            qids = [item["qid"] for item in items[begin : begin + 32]]
            chunk = actions[begin * K : (begin + len(qids)) * K]
            scores = sampling.evaluate_actions(world.models.policy, world.prompts.batch(qids), chunk, K)
            parts.append(scores[action_mask(chunk)])
    logprobs = torch.cat(parts)

    def near(x):
        return x + 0.1 * torch.randn(len(x), generator=g)

    rolls = Rollouts(
        qids=[item["qid"] for item in items for _ in range(K)],
        action=list(range(K)) * len(items),
        rank=[0] * len(rows),
        lengths=lengths,
        sentence_counts=torch.ones_like(lengths),
        columns=lengths.int(),
        tokens=torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        logprobs=near(logprobs),
        ref_logprobs=near(logprobs),
        values=torch.zeros_like(logprobs),
    )
    noise = torch.randn(2, len(logprobs), generator=g)
    one = torch.ones(len(rows))
    return ppo.ScoredRollouts(rolls, noise[0], noise[1], noise[1], one, one, [[1.0]] * len(rows), one.bool(), 0.0)


def peak(function: Callable) -> int:
    """Peak GPU memory of a call in bytes, besides the weights and optimizers of both sides."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    bench = Bench(args)
    equal = bench.check()
    result = common.compare(bench.released, bench.ours, args)
    common.profile(bench.ours, args)
    per_update = result["ours"]["median"]
    bare = limits.products(bench.ours).seconds(torch.device(args.device))
    rows = args.rl_batch_size * args.ga_step
    real = [bench.trainer.data.rollouts.lengths, torch.tensor(list(bench.trainer.prompts.lengths.values()))]
    config = bench.trainer.raw.policy.config
    flops = rows * 2 * 3 * limits.row_flops(config, int(real[1].float().mean()), int(real[0].float().mean()))
    more = {}
    if args.device == "cuda":
        share = flops / per_update / limits.peak_flops(torch.device("cuda"), torch.bfloat16)
        more["mfu"] = f"{share:.0%} of the bf16 peak, FLOPs of real tokens"
        peaks = [peak(side) for side in (bench.ours, bench.released)]
        gib = [f"{one / 2**30:.1f} GiB" for one in peaks]
        more["peak_memory"] = f"{peaks[0] / peaks[1]:.0%} ({gib[0]} of {gib[1]}, weights and optimizer left out)"
    common.report(
        args, "PPO updates", result, target=">= 3x" if args.device == "cpu" else ">= 10x", equal=equal,
        slice=f"updates of {args.ga_step} minibatches of {args.rl_batch_size}, output_len {args.output_len}, "
        f"{real[0].float().mean():.0f} real tokens in the mean",
        limit=f"{bare / per_update:.0%} of the time is the bare matrix products",
        scaling=common.linear(bench.ours, argparse.Namespace(**vars(args) | {"repeats": 1})),
        projection={"seconds_per_row": per_update / rows},
        updates_per_second=1 / per_update, **more,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
