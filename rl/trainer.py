"""PPO over rollouts on disk: the update, the epochs, and the saved state that a killed run resumes from.

The losses are in rl/ppo.py, the models' forward pass in rl/actor_critic.py. Without a value function (`--algo rloo`)
the policy trains alone. With `--value_warmup` the value function trains alone first, on Monte-Carlo returns; then its
values replace those of sampling in advantages and returns.

An update is the same on 1 process x 4 accumulation steps as on 2 x 2: every process knows every rollout (the numbers
are small; images and prompts are fetched by question id), so the samples of an optimizer step, their whitening and
the number of positions that every loss is divided by are the same everywhere. A process without a minibatch in the
last, short group runs a dummy row with zero weight.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ares import cli, files, launch
from ares.cli import UserError
from ares.devices import ahead, flat_index, padded_length, pinned, to_device
from rl import actor_critic, ppo, sharding
from rl.actor_critic import ActorCritic
from rl.metrics import Metrics, epoch_warnings, summary
from rl.minibatches import micro_batches, plan_epoch
from rl.optimizer import load_moments, make_optimizer, optimizer_state, scheduled_lr
from rl.rollouts import Prompts, load_values, save_values, seed_for
from rl.saved_state import Position, newest_state

SAVE, STOP = 1.0, 1000.0  # what an update adds up over processes: saving is due; Ctrl-C was pressed


@dataclass
class PassInputs:
    """What one forward and backward pass of this process needs, on the CPU until `to_device`.

    `actions` (B, T + 1), `mask` (B, T), `index` (N,) of its real positions; `question` (B,) if rows share a prompt,
    and `numbers` (5, B, T) for a `ppo.MiniBatch` or `to_go` (B, T) for the warm-up.
    """

    prompt: dict[str, Tensor]
    tensors: dict[str, Tensor]
    total: int  # real positions of the whole optimizer step
    last: bool  # pass of its step


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
        fitted: Path | None = None,
        share_dropped: float = 0.0,
        sharded: sharding.Sharding | None = None,
    ):
        self.data, self.prompts, self.args, self.number, self.fitted = data, prompts, args, number, fitted
        self.accelerator, self.metrics, self.share_dropped = accelerator, metrics, share_dropped
        self.slots = [Path(state) / f"slot_{i}.pth" for i in range(2)]
        self.raw = ActorCritic(policy, value_function)
        self.sharded = sharded
        if sharded is not None:
            self.model = sharding.shard(self.raw, sharded)
            self.optimizer, self.names = make_optimizer(self.raw, args)
        else:
            optimizer, self.names = make_optimizer(self.raw, args)
            self.model, self.optimizer = accelerator.prepare(self.raw, optimizer)
        self.model.eval()  # no dropout: the ratio to the sampling policy would be noise
        if args.gradient_checkpointing:
            actor_critic.checkpoint_gradients(self.raw)
        roll = data.rollouts
        self.lengths = list(zip(roll.lengths.tolist(), (prompts.lengths[qid] for qid in roll.qids), strict=True))
        self.stop_epoch, self.ctrl_c = False, launch.CtrlC()
        self.groups = roll.qids if args.group_by_question else None
        self.position, self.saved_at, self.saves = Position(epoch=-args.value_warmup), time.monotonic(), 0
        self.gradient: list[Tensor] | None = None  # the policy's, of an even update

    @property
    def _identity(self) -> dict[str, Any]:
        """A saved state is used only if it has the same values."""
        return {"round": self.number, "processes": self.accelerator.num_processes, "rows": len(self.data)}

    def warm_up(self) -> None:
        """Run the remaining epochs of the value warm-up, then take its values into the advantages.

        The values go to the file `fitted`, from which a resumed run takes them. Ctrl-C as in `train`.
        """
        if self.position.epoch < 0:
            with self.ctrl_c:
                self._epochs(0)
            self._refit_values()
            self.save_state()
        elif self.args.value_warmup:
            self.data = self.data.with_values(load_values(self.fitted, len(self.data.advantages)), self.args)

    def train(self) -> None:
        """Run the remaining PPO epochs. Every process takes part in every update.

        Ctrl-C saves after the current update and ends with KeyboardInterrupt, on every process.
        """
        with self.ctrl_c:
            self._epochs(self.args.rl_epochs)

    def _epochs(self, end: int) -> None:
        args = self.args
        for epoch in range(self.position.epoch, end):
            name, number, of = ("PPO", epoch + 1, args.rl_epochs)
            if epoch < 0:
                name, number, of = ("value warm-up", epoch + args.value_warmup + 1, args.value_warmup)
            plan = plan_epoch(
                self.lengths,
                args.rl_batch_size,
                self.accelerator.num_processes,
                args.ga_step,
                seed_for(args.seed, "ppo", self.number, epoch),
                self.groups,
            )
            bar = cli.progress(
                desc=f"{name} epoch {number}/{of}",
                total=len(plan),
                unit="update",
                initial=self.position.update,
            )
            steps = plan[self.position.update :]
            feed = ahead(chain.from_iterable(map(self._passes, steps)), self.accelerator.device)
            with bar, contextlib.closing(feed):
                for step in steps:
                    due = self._update(step, args.rl_epochs * len(plan), feed)
                    bar.update()
                    if due == STOP:
                        self.save_state()
                        done = f"update {self.position.done or self.position.update} of round {self.number}"
                        raise KeyboardInterrupt(f"{name} is saved after {done}; run the same command again to go on")
                    if self.stop_epoch:
                        cli.print0(f"approx_kl is above --early_stop_kl {args.early_stop_kl}: next epoch")
                        break
                    # after an even update: gradients are compared in pairs, and a saved state holds none
                    if due and self.position.update % 2 == 0 and self.position.update < len(plan):
                        self.save_state()
            self._end_epoch()

    def _update(
        self, step: list[list[list[int]]], total_updates: int, feed: Iterator[PassInputs] | None = None
    ) -> float:
        """One optimizer step over all its passes and processes, the next ones in `feed`. Returns the same on every
        process: above 0 if saving is due, STOP if Ctrl-C was pressed."""
        args = self.args
        sums, norm = self._gradients(self._passes(step) if feed is None else feed)
        if self.accelerator.is_main_process and time.monotonic() - self.saved_at > 60 * args.save_minutes:
            sums[-1] = SAVE  # rank 0's clock decides for all
        if self.ctrl_c.pressed:
            sums[-1] = STOP  # on any process: all of them stop after this update
        gathered = self.accelerator.reduce(sums, "sum")
        # the one wait for a GPU in an update
        *sums, grad_dot, grad_square, due, grad_norm = torch.cat([gathered, norm.to(gathered.dtype)[None]]).tolist()
        if not math.isfinite(grad_norm):
            raise UserError(
                f"round {self.number}: the gradient of update {self.position.done + 1} is not finite; the same "
                "command resumes from the last saved state; lower --lr, or try --max_grad_norm 1 or --precision fp32"
            )
        factor = scheduled_lr(args.lr_scheduler, 1.0, self.position.done, total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position.grad_dot += grad_dot
        self.position.grad_square += grad_square
        self._record(sums, grad_norm, args.lr * factor, [row for rows in chain(*step) for row in rows])
        return STOP if due >= STOP else due

    def _gradients(self, feed: Iterable[PassInputs]) -> tuple[Tensor, Tensor]:
        """The gradient of one optimizer step, clipped, from its passes in `feed`: its sums (len(ppo.SUMS) + 3,), of
        this process alone, and its norm before clipping."""
        sums = torch.zeros(len(ppo.SUMS) + 3, dtype=torch.float64, device=self.accelerator.device)
        warmup = self.position.epoch < 0
        for inputs in feed:
            wait = sharding.no_sync(self.model, self.accelerator, self.sharded)
            with contextlib.nullcontext() if inputs.last else wait:
                loss, found = self._loss(inputs)
                # the wrapper averages gradients over processes, but the loss is already a share of the whole step; not
                # accelerator.backward, which divides by ACCELERATE_GRADIENT_ACCUMULATION_STEPS where that is set
                (loss * self.accelerator.num_processes).backward()
            sums[:-3] += found
            if inputs.last:
                break
        if warmup:
            self._average_gradients()
        else:
            sums[-3:-1] = self._compare_gradients()
        return sums, self._clip()

    def _passes(self, step: list[list[list[int]]]) -> Iterator[PassInputs]:
        """The inputs of each pass of this process over one optimizer step."""
        args, data, rank = self.args, self.data, self.accelerator.process_index
        rows = [row for minibatches in step for minibatch in minibatches for row in minibatch]
        total = int(data.rollouts.lengths[torch.as_tensor(rows)].sum())
        warmup = self.position.epoch < 0
        if not warmup:
            advantages, mask = data.rollouts.pad(data.advantages, rows)
            if args.adv_normalization:
                advantages = ppo.masked_whiten(advantages, mask)
        index = {row: i for i, row in enumerate(rows)}
        passes = micro_batches(step, self.lengths, args.pass_tokens or 0)
        for i, by_process in enumerate(passes):
            idle = not by_process[rank]  # a dummy row with zero weight: gradients are reduced in its backward pass
            mine = rows[:1] if idle else by_process[rank]
            weights = None if warmup else advantages[[index[row] for row in mine]]
            yield self._inputs(mine, weights, total, idle, i == len(passes) - 1)

    def _inputs(
        self, rows: list[int], advantages: Tensor | None, total: int, idle: bool = False, last: bool = True
    ) -> PassInputs:
        """The inputs of one pass over `rows`, with the step's advantages (len(rows), width); of the value function
        alone without."""
        device, roll = self.accelerator.device, self.data.rollouts
        width = padded_length(int(roll.lengths[torch.as_tensor(rows)].max()), device)
        actions, mask = roll.actions(rows, width)  # (B, T + 1), (B, T)
        tensors = {"actions": actions, "mask": mask & (not idle), "index": flat_index(mask)}
        qids = [roll.qids[row] for row in rows]
        questions = {qid: i for i, qid in enumerate(dict.fromkeys(qids))}  # rows of one question share its encoding
        if len(questions) < len(rows):
            tensors["question"] = torch.tensor([questions[qid] for qid in qids])
        if advantages is None:
            tensors["to_go"] = roll.pad(self.data.to_go, rows, width)[0]
        else:
            flat = (roll.logprobs, roll.ref_logprobs, roll.values, self.data.returns)
            advantages = nn.functional.pad(advantages, (0, width - advantages.size(1)))  # cuts where that is less
            tensors["numbers"] = torch.stack([*(roll.pad(one, rows, width)[0] for one in flat), advantages])
        prompt = self.prompts.collate(list(questions))
        return PassInputs(pinned(prompt, device), pinned(tensors, device), total, last)

    def _loss(self, inputs: PassInputs) -> tuple[Tensor, Tensor]:
        """The loss of one pass, and its sums: `ppo.ppo_loss`, or `ppo.warmup_loss` of the value function alone."""
        there = to_device(inputs.tensors, self.accelerator.device)
        if "to_go" in there:
            values = self._forward(inputs.prompt, there, with_policy=False)[2]
            return ppo.warmup_loss(values, there["to_go"], there["mask"], inputs.total)
        outputs = self._forward(inputs.prompt, there)
        return ppo.ppo_loss(*outputs, ppo.MiniBatch(*there["numbers"]), there["mask"], self.args, inputs.total)

    def _forward(self, prompt: dict[str, Tensor], there: dict[str, Tensor], with_policy: bool = True) -> tuple:
        """The models on a pass's prompt, on the CPU, and tensors, on the device.

        Without the policy not through DDP, which waits for the gradient of every parameter.
        """
        model = self.model if with_policy or self.sharded is not None else self.raw
        prompt = to_device(prompt, self.accelerator.device)
        with self.accelerator.autocast():
            return model(prompt, there.get("question"), there["actions"], there["index"], with_policy)

    def _average_gradients(self) -> None:
        """Average the gradients of a pass that did not go through DDP over the processes."""
        if self.sharded is None and self.accelerator.num_processes > 1:
            for parameter in self.raw.value_function.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(self.accelerator.reduce(parameter.grad, "mean"))

    def _compare_gradients(self) -> Tensor:
        """(2,): dot product and mean squared norm of the policy's gradients of this update and the one before, in
        every second update (0 otherwise); this process's share, so that the sum over processes is the whole.

        Their rows are different, so the dot product estimates the squared norm of the mean gradient.
        """
        grads = [sharding.local_part(p.grad) for p in self.raw.policy.parameters() if p.grad is not None]
        pair = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        if self.position.update % 2 == 0:
            half = torch.bfloat16 if pair.device.type == "cuda" else None  # half the memory; noise without bias
            self.gradient = [g.detach().to(half or g.dtype, copy=True) for g in grads]
        elif self.gradient is not None:
            for now, before in zip(grads, self.gradient, strict=True):
                before = before.to(now.dtype).flatten()
                now = now.flatten()
                pair[0] += now @ before
                pair[1] += (now @ now + before @ before) / 2
            self.gradient = None
        return pair if self.sharded is not None else pair / self.accelerator.num_processes

    @torch.no_grad()
    def _refit_values(self) -> None:
        """Evaluate the value function on every rollout, on all processes together; write `fitted` (rank 0)."""
        args, roll, rank = self.args, self.data.rollouts, self.accelerator.process_index
        device = self.accelerator.device
        values = torch.zeros(len(roll.values), device=device)
        plan = plan_epoch(self.lengths, args.rl_batch_size, self.accelerator.num_processes, args.ga_step, 0)
        shares = [group[rank] for step in plan for group in micro_batches(step, self.lengths, args.pass_tokens or 0)]
        # a sharded model needs every process in every pass
        inputs = ahead((self._inputs(rows or [0], None, 0) for rows in shares), device)
        for rows, one in zip(shares, inputs, strict=True):
            there = to_device(one.tensors, device)
            found = self._forward(one.prompt, there, with_policy=False)[2].float()
            if rows:
                values[to_device(roll.positions(rows), device)] = found.flatten().index_select(0, there["index"])
        values = self.accelerator.reduce(values, "sum").cpu()
        if self.accelerator.is_main_process:
            save_values(self.fitted, values)
        self.data = self.data.with_values(values, args)
        explained = self.data.explained_variance()
        cli.print0(f"round {self.number}: values after the warm-up explain {explained:.2f} of the returns' variance")

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
        here.update += 1
        here.sums = [a + b for a, b in zip(here.sums, sums, strict=True)]
        here.grad_norm += grad_norm
        if here.epoch < 0:
            return
        here.done += 1
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
        self.gradient = None
        if here.epoch < 0:
            values = {name: values[name] for name in ("value_loss", "explained_variance", "positions")}
            self.metrics.log("value_warmup", self.number, 0, values, epoch=here.epoch)
            cli.print0(f"round {self.number} value warm-up: {summary(values)}")
            self.position = Position(epoch=here.epoch + 1)
            if self.position.epoch < 0:
                self.save_state()
            return
        if here.grad_square:
            values["signal_share"] = here.grad_dot / here.grad_square
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
        newest = newest_state(self.slots, self.number)
        if newest is None:
            return False
        slot, state = newest
        if state["name"] != self._identity:
            changed = [f"{key} {state['name'][key]} -> {value}" for key, value in self._identity.items()]
            raise UserError(
                f"{self.slots[slot]}: PPO of this round was begun with other processes or samples "
                f"({', '.join(changed)}); go on with the same number of processes, or delete "
                f"{self.slots[slot].parent} to begin this round's PPO anew"
            )
        sharding.load_full_state(self.raw, state["model"])
        load_moments(self.optimizer, state["optimizer"]["state"])
        self.position, self.saves = state["position"], slot + 1
        here, name, epoch = self.position, "PPO", self.position.epoch
        if epoch < 0:
            name, epoch = "the value warm-up", epoch + self.args.value_warmup
        cli.print0(f"going on with {name} at epoch {epoch + 1}, update {here.update + 1}")
        return True
