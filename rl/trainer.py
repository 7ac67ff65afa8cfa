"""PPO over rollouts on disk: the update, the epochs, and the saved state that a killed run resumes from.

The losses are in rl/ppo.py, the models' forward pass in rl/actor_critic.py. Without a value function (`--algo rloo`)
the policy trains alone.

An update is the same on 1 process x 4 accumulation steps as on 2 x 2: every process knows every rollout (the numbers
are small; images and prompts are fetched by question id), so the samples of an optimizer step, their whitening and
the number of positions that every loss is divided by are the same everywhere. A process without a minibatch in the
last, short group runs a dummy row with zero weight.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ares import cli, files, launch
from ares.checkpoints import load_torch, refuse_damaged
from ares.cli import UserError, in_one_line
from rl import actor_critic, ppo, sharding
from rl.actor_critic import ActorCritic, to_device
from rl.metrics import Metrics, epoch_warnings, summary
from rl.minibatches import micro_batches, plan_epoch
from rl.optimizer import load_moments, make_optimizer, optimizer_state, scheduled_lr
from rl.rollouts import Prompts, seed_for

SAVE, STOP = 1.0, 1000.0  # what an update adds up over processes: saving is due; Ctrl-C was pressed


@dataclass
class Position:
    """Progress within a round: `update` updates of `epoch` are done, whose diagnostics add up to `sums`."""

    epoch: int = 0
    update: int = 0
    done: int = 0  # updates since the round began
    sums: list[float] = field(default_factory=lambda: [0.0] * len(ppo.SUMS))
    grad_norm: float = 0.0  # summed over the epoch's updates
    entropy: float | None = None  # of the round's first update, to detect a collapse


class PpoTrainer:
    """Trains policy and value function on one round's rollouts, restartable at every saved state.

    `accelerator` wraps the model; `state` is the folder of the two alternating state files.
    """

    def __init__(
        self,
        policy: nn.Module,
        value_function: nn.Module | None,
        data: ppo.ScoredRollouts,
        prompts: Prompts,
        args: Any,
        accelerator: Any,
        state: Path,
        metrics: Metrics,
        number: int,
        share_dropped: float = 0.0,
        sharded: sharding.Sharding | None = None,
    ):
        self.data, self.prompts, self.args, self.number = data, prompts, args, number
        self.accelerator, self.metrics, self.share_dropped = accelerator, metrics, share_dropped
        self.slots = [Path(state) / f"slot_{i}.pth" for i in range(2)]
        self.raw = ActorCritic(policy, value_function)
        self.sharded = sharded
        if sharded is not None:
            self.model = sharding.shard(self.raw, sharded)
            self.optimizer, self.names = make_optimizer(self.raw, args.lr)
        else:
            optimizer, self.names = make_optimizer(self.raw, args.lr)
            self.model, self.optimizer = accelerator.prepare(self.raw, optimizer)
        self.model.eval()  # no dropout: the ratio to the sampling policy would be noise
        if args.gradient_checkpointing:
            actor_critic.checkpoint_gradients(self.raw)
        roll = data.rollouts
        self.lengths = list(zip(roll.lengths.tolist(), (prompts.lengths[qid] for qid in roll.qids), strict=True))
        self.stop_epoch, self.ctrl_c = False, launch.CtrlC()
        self.position, self.saved_at, self.saves = Position(), time.monotonic(), 0

    @property
    def _identity(self) -> dict[str, Any]:
        """A saved state is used only if it has the same values."""
        return {"round": self.number, "processes": self.accelerator.num_processes, "rows": len(self.data)}

    def train(self) -> None:
        """Run the remaining PPO epochs. Every process takes part in every update.

        Ctrl-C saves after the current update and ends with KeyboardInterrupt, on every process.
        """
        with self.ctrl_c:
            self._epochs()

    def _epochs(self) -> None:
        for epoch in range(self.position.epoch, self.args.rl_epochs):
            plan = plan_epoch(
                self.lengths,
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
                    due = self._update(step, self.args.rl_epochs * len(plan))
                    bar.update()
                    if due == STOP:
                        self.save_state()
                        raise KeyboardInterrupt(
                            f"PPO is saved after update {self.position.done} of round {self.number}; run the same "
                            "command again to go on"
                        )
                    if self.stop_epoch:
                        cli.print0(f"approx_kl is above --early_stop_kl {self.args.early_stop_kl}: next epoch")
                        break
                    if due and self.position.update < len(plan):
                        self.save_state()
            self._end_epoch()

    def _update(self, step: list[list[list[int]]], total_updates: int) -> float:
        """One optimizer step over all its passes and processes. Returns the same on every process: above 0 if saving
        is due, STOP if Ctrl-C was pressed."""
        args, data, rank = self.args, self.data, self.accelerator.process_index
        rows = [row for minibatches in step for minibatch in minibatches for row in minibatch]
        total = int(data.rollouts.lengths[torch.as_tensor(rows)].sum())  # real positions of the whole step
        advantages, mask = data.rollouts.pad(data.advantages, rows)
        if args.adv_normalization:
            advantages = ppo.masked_whiten(advantages, mask)
        index = {row: i for i, row in enumerate(rows)}
        sums = torch.zeros(len(ppo.SUMS) + 1, dtype=torch.float64, device=self.accelerator.device)
        passes = micro_batches(step, self.lengths, args.pass_tokens or 0)
        for i, by_process in enumerate(passes):
            idle = not by_process[rank]  # a dummy row with zero weight: gradients are reduced in its backward pass
            mine = rows[:1] if idle else by_process[rank]
            last = i == len(passes) - 1
            with contextlib.nullcontext() if last else sharding.no_sync(self.model, self.accelerator, self.sharded):
                loss, found = self._loss(mine, advantages[[index[row] for row in mine]], total, idle)
                # the wrapper averages gradients over processes, but the loss is already a share of the whole step; not
                # accelerator.backward, which divides by ACCELERATE_GRADIENT_ACCUMULATION_STEPS where that is set
                (loss * self.accelerator.num_processes).backward()
            sums[:-1] += found
        if rank == 0 and time.monotonic() - self.saved_at > 60 * args.save_minutes:
            sums[-1] = SAVE  # rank 0's clock decides for all
        if self.ctrl_c.pressed:
            sums[-1] = STOP  # on any process: all of them stop after this update
        norm = self._clip()
        gathered = self.accelerator.reduce(sums, "sum")
        *sums, due, grad_norm = [*gathered.tolist(), float(norm)]  # the one wait for a GPU in an update
        if not math.isfinite(grad_norm):
            raise UserError(
                f"round {self.number}: the gradient of update {self.position.done + 1} is not finite; the same "
                "command resumes from the last saved state; lower --lr, or try --max_grad_norm 1 or --precision fp32"
            )
        lr = scheduled_lr(args.lr_scheduler, args.lr, self.position.done, total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._record(sums, grad_norm, lr, rows)
        return STOP if due >= STOP else due

    def _loss(self, rows: list[int], advantages: Tensor, total: int, idle: bool) -> tuple[Tensor, Tensor]:
        """`ppo.ppo_loss` of one pass over `rows`; its advantages are those of the step, (len(rows), width)."""
        device, roll = self.accelerator.device, self.data.rollouts
        actions, mask = roll.actions(rows)  # (B, T + 1), (B, T)
        flat = (roll.logprobs, roll.ref_logprobs, roll.values, self.data.returns)
        packed = [*(roll.pad(one, rows)[0] for one in flat), advantages[:, : mask.shape[1]]]
        mb = ppo.MiniBatch(*to_device(torch.stack(packed), device))  # one transfer
        flat_index = actor_critic.flat_index(mask, device)
        actions, mask = to_device(actions, device), to_device(mask & (not idle), device)
        qids = [roll.qids[row] for row in rows]
        questions = {qid: i for i, qid in enumerate(dict.fromkeys(qids))}  # rows of one question share its encoding
        question = None
        if len(questions) < len(rows):
            question = to_device(torch.tensor([questions[qid] for qid in qids]), device)
        with self.accelerator.autocast():
            outputs = self.model(self.prompts.batch(list(questions)), question, actions, flat_index)
        return ppo.ppo_loss(*outputs, mb, mask, self.args, total)

    def _clip(self) -> Tensor:
        """Clip the gradient to --max_grad_norm; returns its norm over all parameters before that."""
        parameters = [p for p in self.raw.parameters() if p.grad is not None]
        norm = sharding.full_tensors(nn.utils.get_total_norm([p.grad for p in parameters]), on_cpu=False)
        if self.args.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _record(self, sums: list[float], grad_norm: float, lr: float, rows: list[int]) -> None:
        """Advance the position by one update and log it."""
        here = self.position
        here.update, here.done = here.update + 1, here.done + 1
        here.sums = [a + b for a, b in zip(here.sums, sums, strict=True)]
        here.grad_norm += grad_norm
        values = ppo.diagnostics(sums, self.args)
        values |= {"grad_norm": grad_norm, "lr": lr, "kl_coef": self.data.kl_coef, "share_dropped": self.share_dropped}
        values |= self.data.row_stats(rows)
        here.entropy = values["entropy"] if here.entropy is None else here.entropy
        self.stop_epoch = self.args.early_stop_kl is not None and values["approx_kl"] > self.args.early_stop_kl
        self.metrics.log("update", self.number, here.done, values, epoch=here.epoch)
        if here.done % self.args.log_term == 0:
            cli.print0(f"round {self.number} update {here.done}: {summary(values)}")

    def _end_epoch(self) -> None:
        """Log the epoch's means, move to the next epoch and save (not after the last epoch: the round is saved)."""
        here = self.position
        values = ppo.diagnostics(here.sums, self.args)
        values |= {"grad_norm": here.grad_norm / here.update, "lr": self.optimizer.param_groups[0]["lr"]}
        values |= {"kl_coef": self.data.kl_coef, "share_dropped": self.share_dropped}
        values |= self.data.row_stats(range(len(self.data)))
        self.metrics.log("epoch", self.number, here.done, values, epoch=here.epoch)
        cli.print0(f"round {self.number} epoch {here.epoch + 1}/{self.args.rl_epochs}: {summary(values)}")
        for warning in epoch_warnings(values, here.entropy):
            cli.warn0(f"round {self.number} epoch {here.epoch + 1}: {warning}")
        self.position = Position(epoch=here.epoch + 1, done=here.done, entropy=here.entropy)
        if self.position.epoch < self.args.rl_epochs:
            self.save_state()

    # -- state -------------------------------------------------------------------------------------------

    def save_state(self) -> None:
        """Write model, value function, optimizer and position to the older of the two slots, atomically (rank 0).

        No random state is saved: only the shuffle is random, and seed, round and epoch determine it.
        """
        self.saved_at = time.monotonic()
        keep = self.accelerator.is_main_process
        state = {
            "name": self._identity,
            "position": vars(self.position),
            "model": sharding.full_state(self.raw, keep),
            "optimizer": optimizer_state(self.optimizer, self.names, keep),
        }
        if keep:
            with files.atomic_path(self.slots[self.saves % 2]) as temporary, open(temporary, "wb") as file:
                torch.save(state, file)  # a file: torch cannot name an archive after `.tmp-1`
        self.saves += 1

    def restore(self) -> bool:
        """Resume from the newest undamaged saved state of this round; returns whether there is one.

        Raises UserError if it does not fit, or if every saved state is damaged.
        """
        found, damaged = [], []
        for i, slot in enumerate(self.slots):
            if slot.exists():
                try:
                    refuse_damaged(slot, "--run_dir")
                    state = load_torch(slot, "--run_dir")
                    name, position = state["name"], Position(**state["position"])
                    if name["round"] == self.number:
                        found.append((position.done, position.epoch, i, state))
                except UserError as error:
                    damaged.append(str(error))
                except (KeyError, TypeError) as error:
                    damaged.append(f"--run_dir: {slot} is no saved state ({in_one_line(error, 80)})")
        if damaged and not found:
            raise UserError(f"{damaged[0]}; delete {self.slots[0].parent} to begin this round's PPO anew")
        for fault in damaged:
            cli.warn0(f"{fault}; going on from the other saved state")
        if not found:
            return False
        _, _, newest, state = max(found, key=lambda entry: entry[:3])
        if state["name"] != self._identity:
            changed = [f"{key} {state['name'][key]} -> {value}" for key, value in self._identity.items()]
            raise UserError(
                f"{self.slots[newest]}: PPO of this round was begun with other processes or samples "
                f"({', '.join(changed)}); go on with the same number of processes, or delete "
                f"{self.slots[0].parent} to begin this round's PPO anew"
            )
        sharding.load_full_state(self.raw, state["model"])
        load_moments(self.optimizer, state["optimizer"]["state"])
        self.position, self.saves = Position(**state["position"]), newest + 1
        cli.print0(f"going on with PPO at epoch {self.position.epoch + 1}, update {self.position.update + 1}")
        return True
