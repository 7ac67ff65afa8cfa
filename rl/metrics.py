"""Output of RL for people: `metrics.jsonl` (also to TensorBoard or W&B), `samples_round_{n}.jsonl`, warnings."""

from __future__ import annotations

import json
import math
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ares import cli, files
from ares.sentences import sentences_from_ids
from teacher.reference import concluded_choice


class Metrics:
    """Writes `metrics.jsonl`, and TensorBoard or W&B besides. A line has its kind (rollout,
    value_warmup, update, epoch).

    Lines after the update that a killed run resumes from are dropped, so none is there twice.
    """

    def __init__(self, run: Path, report_to: str, config: dict[str, Any]):
        self.path = Path(run) / "metrics.jsonl"
        self.active = cli.rank() == 0
        self.writer = self.wandb = None
        if self.active and report_to == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                cli.print0("note: tensorboard is not installed; metrics.jsonl holds the same numbers")
            else:
                self.board = Path(run) / "tensorboard"
                threading.excepthook = _ignore_disk_errors
                with files.writing(self.board):
                    self.writer = SummaryWriter(str(self.board))
        elif self.active and report_to == "wandb":
            self.wandb = _wandb_run(Path(run), config)

    def rewind(self, number: int, updates_done: int | None, epoch: int = 0) -> None:
        """Drop lines of round `number` beyond `updates_done` updates (None: all of them), and a cut last line; of the
        value warm-up those of `epoch` and later ones."""
        if not self.active or not self.path.exists():
            return

        def keep(entry: dict[str, Any]) -> bool:
            if entry["round"] != number:
                return entry["round"] < number
            if entry["kind"] == "value_warmup" and entry.get("epoch", epoch) >= epoch:
                return False
            return updates_done is not None and entry["update"] <= updates_done

        kept = [json.dumps(entry) + "\n" for entry in read_metrics(self.path, "--run_dir") if keep(entry)]
        files.write_text(self.path, "".join(kept))

    def log(self, kind: str, number: int, update: int, values: dict[str, float], **more: int) -> None:
        """Append one line; `update` counts a round's finished updates."""
        if not self.active:
            return
        # NaN is not JSON: a mean over nothing is null
        finite = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        line = json.dumps({"kind": kind, "round": number, "update": update, **more, **finite})
        files.append_line(self.path, line)
        scalars = {f"{kind}/{key}": value for key, value in finite.items() if value is not None}
        if self.writer is not None:
            with files.writing(self.board):
                for key, value in scalars.items():
                    self.writer.add_scalar(f"round_{number}/{key}", value, update)
                self.writer.flush()
        if self.wandb is not None:
            self.wandb.log({**scalars, "round": number, "update": update})

    def close(self) -> None:
        if self.writer is not None:
            with files.writing(self.board):
                self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()


def _ignore_disk_errors(args: Any) -> None:
    """A hook for TensorBoard's writer thread, whose disk errors are raised again in ours."""
    if args.exc_value is None or cli.disk_error(args.exc_value) is None:
        threading.__excepthook__(args)


def read_metrics(path: Path, flag: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; numbers that are not finite become null.

    Warns of lines that are not JSON (a kill may cut the last one). Raises UserError if it is another kind of file.
    """
    lines = []
    damaged: list[int] = []
    for number, entry in files.read_jsonl(path, flag, damaged.append):
        fits = isinstance(entry, dict) and isinstance(entry.get("kind"), str)
        if not fits or not all(type(entry.get(name)) is int for name in ("round", "update")):
            raise cli.UserError(
                f"{flag}: {path}: line {number} has no kind, round and update; name a run folder of RL"
            )
        odd = [name for name, value in entry.items() if not isinstance(value, (str, int, float, type(None)))]
        if odd:
            raise cli.UserError(f"{flag}: {path}: line {number}: {odd[0][:40]} is no number; move the file away")
        lines.append(entry)
    for number in damaged:
        cli.warn0(f"{path}: line {number} is not JSON and is ignored")
    return lines


def _wandb_run(run: Path, config: dict[str, Any]):
    """The W&B run of this folder, resumed by a later launch. Raises UserError if W&B refuses."""
    import wandb

    id_file = run / "wandb" / "id"
    if not id_file.exists():
        files.write_text(id_file, uuid.uuid4().hex)
    try:
        return wandb.init(
            project="ares",
            id=files.read_text(id_file, "--run_dir"),
            name=run.name,
            dir=str(run),
            config=config,
            resume="allow",
        )
    except wandb.errors.Error as error:
        raise cli.UserError(
            f"--report_to wandb: {' '.join(str(error).split())[:200]}; set WANDB_API_KEY, or WANDB_MODE=offline, or "
            "use --report_to none (metrics.jsonl holds the same numbers)"
        ) from error


# -- samples ---------------------------------------------------------------------------------------------


def write_samples(path: Path, data: Any, scores: Sequence[Sequence[float]], texts: dict[str, str], tokenizer) -> None:
    """Write the scored rollouts (`ppo.ScoredRollouts`) as one JSON line per rationale, atomically.

    A sentence's advantage is that of its last token, before whitening. `texts` are the prompts by question id.
    """
    rows = data.rollouts
    with files.atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, qid in enumerate(rows.qids):
            ids, begin = rows.ids(row), int(rows.offsets[row])
            sentences = [
                {"text": one.text, "score": score, "advantage": float(data.advantages[begin + one.column - 1])}
                for one, score in zip(sentences_from_ids(ids, tokenizer), scores[row], strict=True)
            ]
            line = {
                "qid": qid,
                "action": rows.action[row],
                "prompt": texts[qid],
                "rationale": tokenizer.decode(ids, skip_special_tokens=True),
                "reward": float(data.sentence_reward[row] - data.kl_coef * data.kl[row]),
                "sentences": sentences,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def text_figures(rollouts: Any, problems: dict[str, Any], tokenizer: Any, most: int = 2000) -> dict[str, float]:
    """Mean `words` and `share_without_conclusion` (no sentence asserts a choice as the answer) of the rationales; of
    `most` of them, evenly spaced, where there are more."""
    rows = range(0, len(rollouts), -(-len(rollouts) // most))
    texts = [tokenizer.decode(rollouts.ids(row), skip_special_tokens=True) for row in rows]
    without = [concluded_choice(problems[rollouts.qids[row]], text) is None
               for row, text in zip(rows, texts, strict=True)]  # fmt: skip
    return {"words": mean(len(text.split()) for text in texts), "share_without_conclusion": mean(without)}


# -- warnings --------------------------------------------------------------------------------------------


def summary(values: dict[str, float]) -> str:
    """The few numbers of a log line."""
    names = (
        "mean_sentence_score", "reward", "policy_loss", "value_loss", "explained_variance", "approx_kl", "kl_ref",
        "clipfrac", "signal_share", "length",
    )  # fmt: skip
    return "  ".join(f"{name} {values[name]:.4g}" for name in names if name in values)


def rollout_warnings(values: dict[str, float]) -> list[str]:
    """Warnings about a round's samples and replies, from their logged values."""
    found = []
    if values["share_dropped"] > 0.05:
        found.append(f"{values['share_dropped']:.0%} of the replies were dropped; the reason is beside each reply")
    if values["share_ended"] < 0.5:
        found.append(
            f"{1 - values['share_ended']:.0%} of the rationales were cut at --output_len before their end: raise "
            "it, or start from a model that ends what it writes"
        )
    return found


def epoch_warnings(values: dict[str, float], first_entropy: float) -> list[str]:
    """Warnings about an epoch, from its logged means; `first_entropy` is that of the round's first update."""
    found = []
    if values["approx_kl"] > 0.1:
        found.append(
            f"KL is blowing up: the policy is {values['approx_kl']:.2g} nats per token from the one that wrote the "
            "samples (0.01 is usual); lower --lr or --rl_epochs, or set --early_stop_kl 0.05"
        )
    if values["kl_ref"] > 1.0:
        found.append(
            f"KL is blowing up: the policy is {values['kl_ref']:.2g} nats per token from the reference; "
            "raise --init_kl_coef or set --target_kl"
        )
    if values["entropy"] < 0.2 * first_entropy:
        found.append(
            f"entropy collapse: {values['entropy']:.2g} nats per token, {first_entropy:.2g} when the round began; the "
            "policy hardly varies what it writes; lower --lr or set --entropy_coef 0.01"
        )
    if values.get("explained_variance", 0.0) < 0:
        found.append(
            f"explained variance {values['explained_variance']:.2f} over the whole epoch: the value function predicts "
            "returns worse than a constant would; more --rl_epochs or a higher --lr may help it"
        )
    return found
