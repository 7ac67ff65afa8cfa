"""PPO over rollouts on disk (SPEC 6): plan of updates, losses over whole optimizer steps, state, metrics.

Knows nothing of sampling or of the Teacher: it is given scored rollouts and a policy, and leaves a trained one.

What makes an update the same on 1 process x 4 accumulation steps as on 2 x 2: every process knows every rollout (the
numbers are small, images and prompts are fetched by question id), so the samples of an optimizer step, their
whitening and the number of positions that every loss is divided by are fixed before they are dealt out. A process
without a minibatch in the last, short group runs one that weighs nothing.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ares import cli, ppo
from ares.cli import UserError
from metrics import Metrics
from rollouts import Prompts, Rollouts, seed_for

# -- the data of one round -------------------------------------------------------------------------------


@dataclass
class Experience:
    """Scored rollouts with everything PPO needs that does not change while it trains.

    advantages, returns: float32, flat like the fields of `rollouts`; the rest: (N,), one number per rationale.
    """

    rollouts: Rollouts
    advantages: Tensor
    returns: Tensor
    sentence_reward: Tensor
    kl: Tensor
    score_sum: Tensor
    ended: Tensor

    def __len__(self) -> int:
        return len(self.rollouts)

    def row_stats(self, rows: Sequence[int], neutral: float, coef: float) -> dict[str, float]:
        """Means over rationales (and over their sentences, for the score)."""
        index = torch.as_tensor(rows)
        sentences = int(self.rollouts.sentence_counts[index].sum())
        return {
            "mean_sentence_score": float(self.score_sum[index].sum()) / sentences if sentences else math.nan,
            "sentences": sentences,
            "reward": float((self.sentence_reward[index] - coef * self.kl[index]).mean()),
            "sentence_reward": float(self.sentence_reward[index].mean()),
            "length": float(self.rollouts.lengths[index].float().mean()),
            "share_ended": float(self.ended[index].float().mean()),
        }


def experience(
    rollouts: Rollouts, scores: Sequence[Sequence[float]], args: Any, chunk: int = 1024, eos: int = 1
) -> Experience:
    """Rewards, advantages and returns of every row (SPEC 6), from the scores of its sentences.

    The reward of position t is `-init_kl_coef (logp - logp_ref)`, plus `score - neutral_score` where a sentence
    ends at column t + 1; the value after the last position is 0.
    """
    advantages, returns = torch.empty_like(rollouts.values), torch.empty_like(rollouts.values)
    sentence_reward, kl = torch.zeros(len(rollouts)), torch.zeros(len(rollouts))
    for begin in range(0, len(rollouts), chunk):
        rows = list(range(begin, min(begin + chunk, len(rollouts))))
        logprobs, mask = rollouts.pad(rollouts.logprobs, rows)  # (B, T)
        ref_logprobs, values = rollouts.pad(rollouts.ref_logprobs, rows)[0], rollouts.pad(rollouts.values, rows)[0]
        by_sentence = ppo.sentence_rewards(
            [rollouts.row_columns(row) for row in rows],
            [list(scores[row]) for row in rows],
            length=mask.shape[1],
            neutral=args.neutral_score,
        )
        kl_reward = ppo.kl_rewards(logprobs, ref_logprobs, mask, args.init_kl_coef)
        adv, ret = ppo.gae(by_sentence + kl_reward, values, mask, args.gamma, args.gae_lambda)
        first = int(rollouts.offsets[begin])
        last = int(rollouts.offsets[rows[-1]] + rollouts.lengths[rows[-1]])
        advantages[first:last], returns[first:last] = adv[mask], ret[mask]
        sentence_reward[rows] = by_sentence.sum(1)
        kl[rows] = ((logprobs - ref_logprobs) * mask).sum(1)
    final = rollouts.tokens[(rollouts.offsets + rollouts.lengths - 1).clamp(min=0)] if len(rollouts.tokens) else None
    return Experience(
        rollouts,
        advantages,
        returns,
        sentence_reward,
        kl,
        score_sum=torch.tensor([float(sum(row)) for row in scores]),
        ended=final == eos,
    )


def plan_epoch(lengths: Sequence[int], per_process: int, processes: int, accumulation: int, seed: int) -> list:
    """Which rows each update of one PPO epoch trains on: `plan[update][i][process]` is the i-th minibatch there.

    Rows are shuffled from the seed and cut into optimizer steps of `per_process * processes * accumulation` rows, the
    last one short; inside a step they are sorted by length (less padding, the same gradient) and dealt out in
    minibatches of `per_process`. In the short step a minibatch may be empty, but every process has equally many.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    size = per_process * processes * accumulation
    plan = []
    for begin in range(0, len(order), size):
        rows = sorted(order[begin : begin + size], key=lambda row: -lengths[row])  # stable: the shuffle breaks ties
        minibatches = [rows[i : i + per_process] for i in range(0, len(rows), per_process)]
        minibatches += [[] for _ in range(-len(minibatches) % processes)]
        plan.append([minibatches[i : i + processes] for i in range(0, len(minibatches), processes)])
    return plan


# -- model and optimizer ---------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """Policy and value function as one module, so that a wrapper (DDP) sees one forward per minibatch."""

    def __init__(self, policy: nn.Module, value_function: nn.Module):
        super().__init__()
        self.policy, self.value_function = policy, value_function

    def forward(self, prompt: dict[str, Tensor], actions: Tensor) -> tuple[Tensor, Tensor]:
        """prompt (B, S), actions (B, T + 1) -> logits (B, T, V) and values (B, T) of positions 0 .. T-1."""
        # no decoder mask: pads are on the right, and a causal decoder never looks there from a real position
        logits = self.policy(**prompt, decoder_input_ids=actions[:, :-1], use_cache=False).logits
        return logits, self.value_function(**prompt, decoder_input_ids=actions[:, :-1])


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.01) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW with weight decay on everything but biases and norms, and the parameters' names in its order."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = {name for name, p in named if p.ndim < 2 or "bias" in name}  # norms of T5 are vectors
    groups = [[(n, p) for n, p in named if n not in plain], [(n, p) for n, p in named if n in plain]]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in groups[0]], "weight_decay": weight_decay},
            {"params": [p for _, p in groups[1]], "weight_decay": 0.0},
        ],
        lr=lr,
        fused=True,  # one pass over each tensor, on CPU too: a tiny model's step takes 2.6 ms instead of 9.6
    )
    return optimizer, [name for group in groups for name, _ in group]


def optimizer_state(optimizer, names: list[str]) -> dict[str, Any]:
    """What `optimizer_state.pth` holds: the moments by place, and the parameters' names to check the places by."""
    return {"state": optimizer.state_dict()["state"], "names": names}


def restore_optimizer(optimizer, names: list[str], path: Path) -> None:
    """Load moments that `optimizer_state` gave; learning rate and decay stay those of the flags.

    Raises UserError if the file is absent, unreadable or belongs to another model.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--continue_train: {path} does not exist; name a round folder that RL wrote") from None
    except Exception as error:
        raise UserError(f"--continue_train: cannot read {path} ({' '.join(str(error).split())[:160]})") from error
    if not isinstance(saved, dict) or saved.get("names") != names:
        raise UserError(
            f"--continue_train: {path} was not written by this version for this model (its parameters differ); "
            "start from the same weights with --continue_train False"
        )
    _load_moments(optimizer, saved["state"])


def _load_moments(optimizer, state: dict) -> None:
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# -- the loop --------------------------------------------------------------------------------------------

# sums over real positions that one update gathers over its minibatches and processes, in this order
SUMS = ("policy_loss", "value_loss", "approx_kl", "kl_ref", "entropy", "clipfrac", "ret", "ret2", "err", "err2", "n")


def means(sums: Sequence[float], vf_coef: float) -> dict[str, float]:
    """Diagnostics from sums over positions, in the order of SUMS."""
    total = dict(zip(SUMS, sums, strict=True))
    n = total["n"]
    out = {key: total[key] / n for key in SUMS[:6]}
    out["loss"] = out["policy_loss"] + vf_coef * out["value_loss"]
    variance = total["ret2"] / n - (total["ret"] / n) ** 2
    unexplained = total["err2"] / n - (total["err"] / n) ** 2
    out["explained_variance"] = 1 - unexplained / variance if variance > 1e-12 else math.nan
    out["positions"] = n
    return out


@dataclass
class Position:
    """Where PPO stands in a round: `update` updates of `epoch` are done, whose sums so far are `sums`."""

    epoch: int = 0
    update: int = 0
    done: int = 0  # updates since the round began
    sums: list[float] = field(default_factory=lambda: [0.0] * len(SUMS))
    grad_norm: float = 0.0  # summed over the epoch's updates


class PpoTrainer:
    """Trains policy and value function on one round's experience, restartable at every saved state.

    `accelerator` wraps the model; `state` is the folder of the two alternating state files.
    """

    def __init__(
        self,
        policy: nn.Module,
        value_function: nn.Module,
        data: Experience,
        prompts: Prompts,
        args: Any,
        accelerator: Any,
        state: Path,
        metrics: Metrics,
        number: int,
        share_dropped: float = 0.0,
    ):
        self.data, self.prompts, self.args, self.number = data, prompts, args, number
        self.accelerator, self.metrics, self.share_dropped = accelerator, metrics, share_dropped
        self.slots = [Path(state) / f"slot_{i}.pth" for i in range(2)]
        self.raw = ActorCritic(policy, value_function)
        optimizer, self.names = make_optimizer(self.raw, args.lr)
        self.model, self.optimizer = accelerator.prepare(self.raw, optimizer)
        self.model.eval()  # no dropout: the ratio to the sampling policy would be noise
        self.position, self.saved_at, self.saves = Position(), time.monotonic(), 0

    @property
    def _name(self) -> dict[str, Any]:
        """What a saved state must agree with to be used."""
        return {"round": self.number, "processes": self.accelerator.num_processes, "rows": len(self.data)}

    def train(self) -> None:
        """Run the PPO epochs that are left. Every process takes part in every update."""
        lengths = self.data.rollouts.lengths.tolist()
        for epoch in range(self.position.epoch, self.args.rl_epochs):
            plan = plan_epoch(
                lengths,
                self.args.rl_batch_size,
                self.accelerator.num_processes,
                self.args.ga_step,
                seed_for(self.args.seed, "ppo", self.number, epoch),
            )
            bar = cli.progress(
                desc=f"PPO epoch {epoch + 1}/{self.args.rl_epochs}",
                total=len(plan),
                unit="update",
                initial=self.position.update,
            )
            with bar:
                for step in plan[self.position.update :]:
                    due = self._update(step)
                    bar.update()
                    if due and self.position.update < len(plan):
                        self.save_state()
            self._end_epoch(len(plan))

    def _update(self, step: list[list[list[int]]]) -> bool:
        """One optimizer step over all its minibatches and processes. Returns, alike everywhere, if saving is due."""
        args, data, rank = self.args, self.data, self.accelerator.process_index
        rows = [row for minibatches in step for minibatch in minibatches for row in minibatch]
        total = int(data.rollouts.lengths[torch.as_tensor(rows)].sum())  # real positions of the whole step
        advantages, mask = data.rollouts.pad(data.advantages, rows)
        if args.adv_normalization:
            advantages = ppo.masked_whiten(advantages, mask)
        place = {row: i for i, row in enumerate(rows)}
        sums = torch.zeros(len(SUMS) + 1, dtype=torch.float64, device=self.accelerator.device)
        for i, minibatches in enumerate(step):
            mine = minibatches[rank]
            idle = not mine  # a process without work runs one row that weighs nothing: gradients meet at its backward
            mine = rows[:1] if idle else mine
            last = i == len(step) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(mine, advantages[[place[row] for row in mine]], total, idle, sums)
                # the wrapper averages gradients over processes, but the loss is already a share of the whole step
                self.accelerator.backward(loss * self.accelerator.num_processes)
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.raw.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        if rank == 0 and time.monotonic() - self.saved_at > 60 * args.save_minutes:
            sums[-1] = 1.0  # rank 0's clock decides for all
        gathered = self.accelerator.reduce(sums, "sum").tolist()
        self._record(gathered[:-1], float(grad_norm), rows)
        return gathered[-1] > 0

    def _loss(self, rows: list[int], advantages: Tensor, total: int, idle: bool, sums: Tensor) -> Tensor:
        """This minibatch's share of the step's loss, a sum over its positions divided by `total`; adds to `sums`."""
        device, roll, args = self.accelerator.device, self.data.rollouts, self.args
        actions, mask = roll.actions(rows)  # (B, T + 1), (B, T)
        T = mask.shape[1]
        flat = (roll.logprobs, roll.ref_logprobs, self.data.returns)
        packed = torch.stack([*(roll.pad(one, rows)[0] for one in flat), advantages[:, :T]])  # one transfer
        old, ref, returns, advantages = packed.to(device)  # (B, T) each
        actions, mask = actions.to(device), (mask & (not idle)).to(device)

        logits, values = self.model(self.prompts.batch([roll.qids[row] for row in rows]), actions)
        logprobs = ppo.logprobs_from_logits(logits, actions[:, 1:])
        policy_loss = ppo.policy_loss(logprobs, old, advantages, mask, args.clip_range, denominator=total)
        value_loss = ppo.value_loss(values, returns, mask, denominator=total)
        with torch.no_grad():
            n, spread, error = mask.sum(), ppo.moments(returns, mask), ppo.moments(returns - values, mask)
            # KL(policy || reference) by the k3 estimator, which is never negative; the ratio corrects for samples
            # that come from the older policy
            to_ref = ref - logprobs
            kl_ref = (logprobs - old).exp() * (to_ref.expm1() - to_ref)
            sums[: len(SUMS)] += torch.stack(
                [
                    policy_loss * total,
                    value_loss * total,
                    ppo.approx_kl(logprobs, old, mask, denominator=1),
                    ppo.masked_mean(kl_ref, mask, denominator=1),
                    ppo.entropy(logits, mask, denominator=1),
                    ppo.clipfrac(logprobs, old, advantages, mask, args.clip_range, denominator=1),
                    *spread[:2],
                    *error[:2],
                    n,
                ]
            )
        return policy_loss + args.vf_coef * value_loss

    def _record(self, sums: list[float], grad_norm: float, rows: list[int]) -> None:
        """Advance the position by one update and log it."""
        here = self.position
        here.update, here.done = here.update + 1, here.done + 1
        here.sums = [a + b for a, b in zip(here.sums, sums, strict=True)]
        here.grad_norm += grad_norm
        values = means(sums, self.args.vf_coef)
        values |= {"grad_norm": grad_norm, "lr": self.args.lr, "share_dropped": self.share_dropped}
        values |= self.data.row_stats(rows, self.args.neutral_score, self.args.init_kl_coef)
        self.metrics.log("update", self.number, here.done, values, epoch=here.epoch)
        if here.done % self.args.log_term == 0:
            cli.print0(f"round {self.number} update {here.done}: {summary(values)}")

    def _end_epoch(self, updates: int) -> None:
        """Log the epoch's means, move to the next epoch and save, unless the round's own folder comes next."""
        here = self.position
        values = means(here.sums, self.args.vf_coef)
        values |= {"grad_norm": here.grad_norm / updates, "lr": self.args.lr, "share_dropped": self.share_dropped}
        values |= self.data.row_stats(range(len(self.data)), self.args.neutral_score, self.args.init_kl_coef)
        self.metrics.log("epoch", self.number, here.done, values, epoch=here.epoch)
        cli.print0(f"round {self.number} epoch {here.epoch + 1}/{self.args.rl_epochs}: {summary(values)}")
        self.position = Position(epoch=here.epoch + 1, done=here.done)
        if self.position.epoch < self.args.rl_epochs:
            self.save_state()

    # -- state -------------------------------------------------------------------------------------------

    def save_state(self) -> None:
        """Write model, value function, optimizer and position to the older of the two slots, atomically (rank 0).

        No random state is kept: nothing random happens in training but the shuffle, which the seed, the round and
        the epoch fix.
        """
        self.saved_at = time.monotonic()
        if self.accelerator.is_main_process:
            state = {
                "name": self._name,
                "position": vars(self.position),
                "model": self.raw.state_dict(),
                "optimizer": optimizer_state(self.optimizer, self.names),
            }
            with cli.atomic_path(self.slots[self.saves % 2]) as temporary, open(temporary, "wb") as file:
                torch.save(state, file)  # a file: torch cannot name an archive after `.tmp-1`
        self.saves += 1

    def restore(self) -> bool:
        """Go on from the newest saved state of this round, if there is one. Raises UserError if it does not fit."""
        found = []
        for i, slot in enumerate(self.slots):
            if slot.exists():
                # mapped: only the slot that is used is read
                state = torch.load(slot, map_location="cpu", weights_only=True, mmap=True)
                if state["name"]["round"] == self.number:
                    found.append((state["position"]["done"], state["position"]["epoch"], i, state))
        if not found:
            return False
        _, _, newest, state = max(found, key=lambda entry: entry[:3])
        if state["name"] != self._name:
            changed = [f"{key} {state['name'][key]} -> {value}" for key, value in self._name.items()]
            raise UserError(
                f"{self.slots[newest]}: PPO of this round was begun with other processes or samples "
                f"({', '.join(changed)}); go on with the same number of processes, or delete "
                f"{self.slots[0].parent} to begin this round's PPO anew"
            )
        self.raw.load_state_dict(state["model"])
        _load_moments(self.optimizer, state["optimizer"]["state"])
        self.position, self.saves = Position(**state["position"]), newest + 1
        cli.print0(f"going on with PPO at epoch {self.position.epoch + 1}, update {self.position.update + 1}")
        return True


def summary(values: dict[str, float]) -> str:
    """The few numbers of a log line."""
    names = ("mean_sentence_score", "reward", "policy_loss", "value_loss", "approx_kl", "kl_ref", "clipfrac", "length")
    return "  ".join(f"{name} {values[name]:.4g}" for name in names)
