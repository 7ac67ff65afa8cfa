"""Training of a reward model (rl/reward_model.py) on scored rationales, with early stop on held-out questions.

    train, held_out = hold_out(rationales, share=0.1, seed=42)
    Fit(scorer, train, held_out, args, state_file).run()      # tools/train_reward_model.py

No dropout, as in RL: only the shuffle is random, which seed and epoch determine, so a resumed run gives the same bits
on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ares import cli, files
from ares.checkpoints import load_torch, refuse_damaged
from ares.cli import UserError
from ares.devices import enough_memory
from rl.minibatches import plan_epoch
from rl.optimizer import load_moments, make_optimizer, optimizer_state, scheduled_lr
from rl.reward_model import Rationale, Scorer
from rl.rollouts import seed_for

MAX_GRAD_NORM = 1.0


class Fit:
    """Training with early stop, restartable after every epoch from the file `state`, which is written in one step.

    args: lr, lr_scheduler, bs (rationales per optimizer step; those of a question share one), epochs, patience, seed.
    """

    def __init__(
        self, scorer: Scorer, train: Sequence[Rationale], held_out: Sequence[Rationale], args: Any, state: Path
    ):
        self.scorer, self.train, self.held_out, self.args, self.state = scorer, train, held_out, args, state
        how = argparse.Namespace(lr=args.lr, vf_lr=None, adam_eps=1e-8)
        self.optimizer, self.names = make_optimizer(scorer.model, how)
        self.history: list[dict[str, float]] = []  # one entry an epoch
        self.best: dict[str, Tensor] = {}  # weights of the epoch with the least held-out loss

    @property
    def best_epoch(self) -> int:
        """Its number, from 1."""
        losses = [entry["held_out_loss"] for entry in self.history]
        return losses.index(min(losses)) + 1

    def run(self) -> None:
        """Train to the last epoch, or until `patience` epochs were no improvement; then take the best weights.

        Raises UserError for a loss that is no number, for a GPU without enough memory, and for a damaged state.
        """
        self.restore()
        lack = f"--bs: the GPU's memory does not suffice for {self.scorer.tokens} tokens in a pass of this model"
        while len(self.history) < self.args.epochs and not self.is_over():
            epoch, began = len(self.history), time.monotonic()
            with enough_memory(lack):
                loss = self.epoch(epoch)
                held_out = self.scorer.loss(self.held_out)
            self.history.append({"epoch": epoch + 1, "train_loss": loss, "held_out_loss": held_out})
            if self.best_epoch == epoch + 1:
                weights = self.scorer.model.state_dict()
                self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
            self.save()
            cli.print0(
                f"epoch {epoch + 1}/{self.args.epochs}: loss {loss:.4f}, held-out {held_out:.4f} "
                f"(best: epoch {self.best_epoch}), {time.monotonic() - began:.0f} s"
            )
        self.scorer.model.load_state_dict(self.best)

    def is_over(self) -> bool:
        return bool(self.history) and len(self.history) - self.best_epoch >= self.args.patience

    def epoch(self, number: int) -> float:
        """One pass over the training rationales; returns the mean squared error on the way."""
        lengths = [(len(row.ids), self.scorer.prompts.lengths[row.qid]) for row in self.train]
        seed = seed_for(self.args.seed, "reward model", number)
        plan = plan_epoch(lengths, self.args.bs, 1, 1, seed, groups=[row.qid for row in self.train])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        squares = torch.zeros((), dtype=torch.float64, device=self.scorer.device)
        desc = f"epoch {number + 1}/{self.args.epochs}"
        for update, [[rows]] in enumerate(cli.progress(plan, desc=desc, unit="update"), number * len(plan)):
            sentences = sum(len(self.train[row].scores) for row in rows)
            for part in self.scorer.passes(self.train, rows):
                error = self.scorer.squares(self.train, part)
                (error / sentences).backward()
                squares += error.detach()
            nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            lr = scheduled_lr(self.args.lr_scheduler, self.args.lr, update, self.args.epochs * len(plan))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        loss = float(squares) / sum(len(row.scores) for row in self.train)
        if not math.isfinite(loss):
            raise UserError(
                f"--lr: the loss of epoch {number + 1} is {loss}; start anew (--overwrite) with a smaller one"
            )
        return loss

    def save(self) -> None:
        state = {
            "history": self.history,
            "model": self.scorer.model.state_dict(),
            "best": None if self.best_epoch == len(self.history) else self.best,
            "optimizer": optimizer_state(self.optimizer, self.names),
        }
        with files.atomic_path(self.state) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)

    def restore(self) -> None:
        """Go on from the saved state, if there is one."""
        if not self.state.exists():
            return
        refuse_damaged(self.state, "--run_dir")
        state = load_torch(self.state, "--run_dir")
        try:
            self.history = state["history"]
            self.best = copy.deepcopy(state["best"] or state["model"])  # the file is only mapped
            self.scorer.model.load_state_dict(state["model"])
            load_moments(self.optimizer, state["optimizer"]["state"])
        except (KeyError, TypeError, RuntimeError) as error:
            why = cli.in_one_line(error, 100)
            raise UserError(f"--run_dir: {self.state} is no saved state ({why}); delete it to begin anew") from error
        cli.print0(f"going on after epoch {len(self.history)}")


def hold_out(rationales: Sequence[Rationale], share: float, seed: int) -> tuple[list[Rationale], list[Rationale]]:
    """(to train on, held out): `share` of the questions are held out with all their rationales.

    Whether one is depends on the seed and its id alone, so that it stays so when folders are added.
    Raises UserError where one of the parts would be empty.
    """
    draws = {row.qid: seed_for(seed, "held out", row.qid) for row in rationales}
    qids = sorted(draws, key=draws.get)
    chosen = {qid for qid in qids if draws[qid] < share * 2**63} or {*qids[:1]}
    if len(chosen) == len(qids):
        raise UserError(f"--held_out: {len(qids)} question(s) with scores are too few to hold out some; add folders")
    return [row for row in rationales if row.qid not in chosen], [row for row in rationales if row.qid in chosen]
