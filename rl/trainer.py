"""PPO over rollouts on disk (SPEC 6): losses over whole optimizer steps, state, metrics.

Knows nothing of sampling or of the Teacher: it takes experience (rl/experience.py) and a policy, and trains it.
 Without a value function (`--algo rloo`) the policy trains alone.

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

from ares import cli, files, launch
from ares.checkpoints import load_torch, refuse_damaged
from ares.cli import UserError, in_one_line
from rl import actor_critic, ppo, sharding
from rl.experience import Experience, passes, plan_epoch
from rl.metrics import Metrics, epoch_warnings
from rl.rollouts import Prompts, seed_for

# -- model and optimizer ---------------------------------------------------------------------------------


STOP = 1000.0  # more than saving is due (1): Ctrl-C


class ActorCritic(nn.Module):
    """Policy and value function as one module, so that a wrapper (DDP) sees one forward per pass."""

    def __init__(self, policy: nn.Module, value_function: nn.Module | None):
        super().__init__()
        self.policy, self.value_function = policy, value_function

    def forward(
        self, prompt: dict[str, Tensor], question: Tensor | None, actions: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities of the actions and entropies, (B, T) each and 0 where not asked for, and values (B, T).

        prompt (U, S) holds each question once, question (B,) says whose it is (None: row i's is i); actions
        (B, T + 1); places (N,) are the positions asked for, counted through the flattened (B, T).
        """
        mask = prompt["attention_mask"]
        states = actor_critic.encode(self.policy, prompt)
        logprobs, entropy = actor_critic.policy_logprobs(self.policy, states, mask, question, actions, places)
        if self.value_function is None:
            return logprobs, entropy, None
        states = actor_critic.encode(self.value_function, prompt)
        values = actor_critic.values(self.value_function, states, mask, question, actions)
        return logprobs, entropy, values.to(logprobs.dtype)  # autocast gives bf16


def checkpoint_gradients(model: nn.Module) -> None:
    """Recompute each T5 block in the backward pass, with the numbers of eval mode.

    transformers checkpoints in training mode only, so that is what the model is put into, without its dropout.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # T5Attention
            module.dropout = 0.0
    for one in model.children():
        enable = getattr(one, "activation_checkpointing_enable", None) or one.gradient_checkpointing_enable  # old name
        enable({"use_reentrant": False})
    model.train()


def scheduled_lr(schedule: str, lr: float, done: int, total: int) -> float:
    """Learning rate of the update after `done` of a round's `total` updates: constant, or down to 0 at the end."""
    left = max(0.0, 1 - done / total)
    return lr * {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]


def parameter_groups(model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """The trained parameters by name: those that decay, then biases and norms, which do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = {name for name, p in named if p.ndim < 2 or "bias" in name}  # norms of T5 are vectors
    return [[(n, p) for n, p in named if n not in plain], [(n, p) for n, p in named if n in plain]]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.01) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW with weight decay on everything but biases and norms, and the parameters' names in its order."""
    groups = parameter_groups(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in groups[0]], "weight_decay": weight_decay},
            {"params": [p for _, p in groups[1]], "weight_decay": 0.0},
        ],
        lr=lr,
        fused=True,  # one pass over each tensor, on CPU too: a tiny model's step takes 2.6 ms instead of 9.6
    )
    return optimizer, [name for group in groups for name, _ in group]


def optimizer_state(optimizer, names: list[str], keep: bool = True) -> dict[str, Any]:
    """What `optimizer_state.pth` holds: the moments by place, and the parameters' names to check the places by.

    Collective where the model is sharded; only a process that is to write asks to `keep`.
    """
    return {"state": sharding.whole(optimizer.state_dict()["state"], keep), "names": names}


def read_optimizer(path: Path, names: list[str]) -> dict[str, Any]:
    """What `optimizer_state` gave, mapped: nothing but its names is read yet.

    Raises UserError if the file is absent, unreadable or belongs to another model.
    """
    if not path.exists():
        raise UserError(f"--continue_train: {path} does not exist; name a round folder that RL wrote")
    saved = load_torch(path, "--continue_train")
    if not isinstance(saved, dict) or saved.get("names") != names:
        raise UserError(
            f"--continue_train: {path} was not written by this version for this model and --algo (its parameters "
            "differ); start from the same weights with --continue_train False"
        )
    return saved


def check_optimizer(path: Path, policy: nn.Module, value_function: nn.Module | None) -> None:
    """`read_optimizer` before there are models: these may be on the meta device."""
    groups = parameter_groups(ActorCritic(policy, value_function))
    read_optimizer(path, [name for group in groups for name, _ in group])


def restore_optimizer(optimizer, names: list[str], path: Path) -> None:
    """Load moments that `optimizer_state` gave; learning rate and decay stay those of the flags.

    Raises UserError as `read_optimizer`.
    """
    _load_moments(optimizer, read_optimizer(path, names)["state"])


def _load_moments(optimizer, state: dict) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        place: {key: sharding.like(one, parameters[place]) for key, one in moments.items()}
        for place, moments in state.items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# -- the loop --------------------------------------------------------------------------------------------

# sums over real positions that one update gathers over its minibatches and processes, in this order
SUMS = ("policy_loss", "value_loss", "approx_kl", "kl_ref", "entropy", "clipfrac", "ret", "ret2", "err", "err2", "n")


def means(sums: Sequence[float], args: Any) -> dict[str, float]:
    """Diagnostics from sums over positions, in the order of SUMS; a value function's only where there is one."""
    total = dict(zip(SUMS, sums, strict=True))
    n = total["n"]
    out = {key: total[key] / n for key in SUMS[:6]}
    out["positions"] = n
    out["loss"] = out["policy_loss"] - args.entropy_coef * out["entropy"]
    if args.algo == "rloo":
        del out["value_loss"]
        return out
    out["loss"] += args.vf_coef * out["value_loss"]
    variance = total["ret2"] / n - (total["ret"] / n) ** 2
    unexplained = total["err2"] / n - (total["err"] / n) ** 2
    out["explained_variance"] = 1 - unexplained / variance if variance > 1e-12 else math.nan
    return out


@dataclass
class Position:
    """Where PPO stands in a round: `update` updates of `epoch` are done, whose sums so far are `sums`."""

    epoch: int = 0
    update: int = 0
    done: int = 0  # updates since the round began
    sums: list[float] = field(default_factory=lambda: [0.0] * len(SUMS))
    grad_norm: float = 0.0  # summed over the epoch's updates
    entropy: float | None = None  # of the round's first update, to tell a collapse by


class PpoTrainer:
    """Trains policy and value function on one round's experience, restartable at every saved state.

    `accelerator` wraps the model; `state` is the folder of the two alternating state files.
    """

    def __init__(
        self,
        policy: nn.Module,
        value_function: nn.Module | None,
        data: Experience,
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
            checkpoint_gradients(self.raw)
        roll = data.rollouts
        self.lengths = list(zip(roll.lengths.tolist(), (prompts.lengths[qid] for qid in roll.qids), strict=True))
        self.stop_epoch, self.ctrl_c = False, launch.CtrlC()
        self.position, self.saved_at, self.saves = Position(), time.monotonic(), 0

    @property
    def _name(self) -> dict[str, Any]:
        """What a saved state must agree with to be used."""
        return {"round": self.number, "processes": self.accelerator.num_processes, "rows": len(self.data)}

    def train(self) -> None:
        """Run the PPO epochs that are left. Every process takes part in every update.

        Ctrl-C saves after the update at hand and ends with KeyboardInterrupt, on every process.
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
        """One optimizer step over all its passes and processes. Returns, alike everywhere, above 0 if saving is due
        and STOP if Ctrl-C was pressed."""
        args, data, rank = self.args, self.data, self.accelerator.process_index
        rows = [row for minibatches in step for minibatch in minibatches for row in minibatch]
        total = int(data.rollouts.lengths[torch.as_tensor(rows)].sum())  # real positions of the whole step
        advantages, mask = data.rollouts.pad(data.advantages, rows)
        if args.adv_normalization:
            advantages = ppo.masked_whiten(advantages, mask)
        place = {row: i for i, row in enumerate(rows)}
        sums = torch.zeros(len(SUMS) + 1, dtype=torch.float64, device=self.accelerator.device)
        work = passes(step, self.lengths, args.pass_tokens or 0)
        for i, shares in enumerate(work):
            mine = shares[rank]
            idle = not mine  # a process without work runs one row that weighs nothing: gradients meet at its backward
            mine = rows[:1] if idle else mine
            last = i == len(work) - 1
            with contextlib.nullcontext() if last else sharding.no_sync(self.model, self.accelerator, self.sharded):
                loss = self._loss(mine, advantages[[place[row] for row in mine]], total, idle, sums)
                # the wrapper averages gradients over processes, but the loss is already a share of the whole step; not
                # accelerator.backward, which divides by ACCELERATE_GRADIENT_ACCUMULATION_STEPS where that is set
                (loss * self.accelerator.num_processes).backward()
        if rank == 0 and time.monotonic() - self.saved_at > 60 * args.save_minutes:
            sums[-1] = 1.0  # rank 0's clock decides for all
        if self.ctrl_c.pressed:
            sums[-1] = STOP  # of any process: all of them stop after this update
        norm = self._clip()
        gathered = self.accelerator.reduce(sums, "sum")
        *sums, due, grad_norm = [*gathered.tolist(), float(norm)]  # the one wait for a GPU in an update
        if not math.isfinite(grad_norm):
            raise UserError(
                f"round {self.number}: the gradient of update {self.position.done + 1} is not finite; the same "
                "command goes on from the last saved state; lower --lr, or try --max_grad_norm 1 or --precision fp32"
            )
        lr = scheduled_lr(args.lr_scheduler, args.lr, self.position.done, total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._record(sums, grad_norm, lr, rows)
        return STOP if due >= STOP else due

    def _clip(self) -> Tensor:
        """Clip the gradient to --max_grad_norm; its norm over all parameters before that."""
        parameters = [p for p in self.raw.parameters() if p.grad is not None]
        norm = sharding.whole_norm(nn.utils.get_total_norm([p.grad for p in parameters]))
        if self.args.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _loss(self, rows: list[int], advantages: Tensor, total: int, idle: bool, sums: Tensor) -> Tensor:
        """This pass's share of the step's loss, a sum over its positions divided by `total`; adds to `sums`."""
        device, roll, args = self.accelerator.device, self.data.rollouts, self.args
        actions, mask = roll.actions(rows)  # (B, T + 1), (B, T)
        T = mask.shape[1]
        flat = (roll.logprobs, roll.ref_logprobs, roll.values, self.data.returns)
        packed = torch.stack([*(roll.pad(one, rows)[0] for one in flat), advantages[:, :T]])  # one transfer
        old, ref, old_values, returns, advantages = actor_critic.to_device(packed, device)  # (B, T) each
        places = actor_critic.places_of(mask, device)
        actions, mask = actor_critic.to_device(actions, device), actor_critic.to_device(mask & (not idle), device)

        qids = [roll.qids[row] for row in rows]
        questions = {qid: i for i, qid in enumerate(dict.fromkeys(qids))}  # rows of one question share its encoding
        question = None
        if len(questions) < len(rows):
            question = actor_critic.to_device(torch.tensor([questions[qid] for qid in qids]), device)
        with self.accelerator.autocast():
            logprobs, entropy, values = self.model(self.prompts.batch(list(questions)), question, actions, places)
        entropy = ppo.masked_mean(entropy if args.entropy_coef else entropy.detach(), mask, denominator=1)
        policy_loss = ppo.policy_loss(logprobs, old, advantages, mask, args.clip_range, denominator=total)
        loss = policy_loss - args.entropy_coef * entropy / total
        value_loss = torch.zeros_like(policy_loss)
        if values is not None:
            value_loss = ppo.value_loss(
                values, returns, mask, total, old_values=old_values, clip_range=args.vf_clip_range
            )
            loss = loss + args.vf_coef * value_loss
        with torch.no_grad():
            n, spread = mask.sum(), ppo.moments(returns, mask)
            error = ppo.moments(returns - values, mask) if values is not None else spread
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
                    entropy,
                    ppo.clipfrac(logprobs, old, advantages, mask, args.clip_range, denominator=1),
                    *spread[:2],
                    *error[:2],
                    n,
                ]
            )
        return loss

    def _record(self, sums: list[float], grad_norm: float, lr: float, rows: list[int]) -> None:
        """Advance the position by one update and log it."""
        here = self.position
        here.update, here.done = here.update + 1, here.done + 1
        here.sums = [a + b for a, b in zip(here.sums, sums, strict=True)]
        here.grad_norm += grad_norm
        values = means(sums, self.args)
        values |= {"grad_norm": grad_norm, "lr": lr, "kl_coef": self.data.kl_coef, "share_dropped": self.share_dropped}
        values |= self.data.row_stats(rows)
        here.entropy = values["entropy"] if here.entropy is None else here.entropy
        self.stop_epoch = self.args.early_stop_kl is not None and values["approx_kl"] > self.args.early_stop_kl
        self.metrics.log("update", self.number, here.done, values, epoch=here.epoch)
        if here.done % self.args.log_term == 0:
            cli.print0(f"round {self.number} update {here.done}: {summary(values)}")

    def _end_epoch(self) -> None:
        """Log the epoch's means, move to the next epoch and save, unless the round's own folder comes next."""
        here = self.position
        values = means(here.sums, self.args)
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

        No random state is kept: nothing random happens in training but the shuffle, which the seed, the round and
        the epoch fix.
        """
        self.saved_at = time.monotonic()
        keep = self.accelerator.is_main_process
        state = {
            "name": self._name,
            "position": vars(self.position),
            "model": sharding.whole_state(self.raw, keep),
            "optimizer": optimizer_state(self.optimizer, self.names, keep),
        }
        if keep:
            with files.atomic_path(self.slots[self.saves % 2]) as temporary, open(temporary, "wb") as file:
                torch.save(state, file)  # a file: torch cannot name an archive after `.tmp-1`
        self.saves += 1

    def restore(self) -> bool:
        """Go on from the newest saved state of this round that is whole, if there is one.

        Raises UserError if it does not fit, or if all that was saved is damaged.
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
        if state["name"] != self._name:
            changed = [f"{key} {state['name'][key]} -> {value}" for key, value in self._name.items()]
            raise UserError(
                f"{self.slots[newest]}: PPO of this round was begun with other processes or samples "
                f"({', '.join(changed)}); go on with the same number of processes, or delete "
                f"{self.slots[0].parent} to begin this round's PPO anew"
            )
        sharding.load_whole(self.raw, state["model"])
        _load_moments(self.optimizer, state["optimizer"]["state"])
        self.position, self.saves = Position(**state["position"]), newest + 1
        cli.print0(f"going on with PPO at epoch {self.position.epoch + 1}, update {self.position.update + 1}")
        return True


def summary(values: dict[str, float]) -> str:
    """The few numbers of a log line."""
    names = ("mean_sentence_score", "reward", "policy_loss", "value_loss", "approx_kl", "kl_ref", "clipfrac", "length")
    return "  ".join(f"{name} {values[name]:.4g}" for name in names if name in values)
