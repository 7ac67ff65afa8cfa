"""The training loop of main.py and run_mm_cot_lora.py: transformers' Seq2SeqTrainer with what a long run needs.

The recipe is the released one, the library's defaults: AdamW, weight decay 0.01 except biases and norms, linear decay
to 0, no warm-up, gradient clip 1.0, dropout on. Added here: batches of similar length in a seeded order that does not
depend on the number of processes (sft/batching.py), bf16 autocast on a GPU that has it, checkpoints that count only
once complete, a checkpoint every few minutes, evaluation by the loop that writes the prediction files, logs that can
be read when piped. The loss is divided by the real targets of the step (all processes), so 2 x 8 and 1 x 16
train alike. Called by sft/run.py, which decides what to train and where.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from ares import cli, files, launch
from ares.checkpoints import portable_tokenizer
from ares.cli import UserError, print0, warn0
from ares.devices import enough_memory, flat_index, on_gpu, to_device
from model import choose_attention
from sft.batching import DistributedBatches, LengthGroupedBatches, TokenBudgetBatches, lengths
from sft.predict import Predictor
from utils_data import IGNORE, batches_pin_themselves
from vision.extraction import default_workers

COMPLETE = "complete"  # written last into a checkpoint's folder: without it the folder does not count
METRICS = "metrics.json"  # written last into a trained model's folder
KEPT = 2  # checkpoints
LOG_STEPS = 50
SYNC_STEPS = 8  # with several processes: how often they agree on a save or a stop, which costs a synchronisation


def set_up(args: argparse.Namespace, folder: Path, examples: int) -> Seq2SeqTrainingArguments:
    """The library's arguments for these flags. Starts the process group; `.device` is this process's device."""
    steps = math.ceil(examples / (args.bs * cli.world_size()))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    workers = args.workers if args.workers is not None else min(2, default_workers(kind))
    bf16 = cli.mixed_precision(args.precision) == "bf16"
    args.precision = "bf16" if bf16 else "fp32"  # args.yaml records what ran
    if not bf16:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # the Trainer would take what accelerate is configured for
    metric = "accuracy" if args.prompt_format.endswith("-A") else "rougeL"
    training_args = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=args.epoch,
        per_device_train_batch_size=args.bs,
        per_device_eval_batch_size=args.eval_bs,
        learning_rate=args.lr,
        weight_decay=0.01,
        seed=args.seed,
        eval_strategy="no" if args.final_eval else "epoch",
        save_strategy="epoch",
        metric_for_best_model=None if args.final_eval else metric,
        greater_is_better=None if args.final_eval else True,
        logging_steps=max(1, min(LOG_STEPS, steps // 2)),
        logging_nan_inf_filter=False,  # a loss that is no number ends the run (Log), it is not averaged away
        disable_tqdm=True,  # replaced by Log
        report_to="none",
        remove_unused_columns=False,  # items hold the question id, which the collator needs
        bf16=bf16,
        use_cpu=bf16 and not torch.cuda.is_available(),  # else the library refuses bf16 without a GPU
        optim="adamw_torch_fused",  # one kernel for all weights, on CPU too
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=torch.cuda.is_available() and batches_pin_themselves(),
        ddp_find_unused_parameters=False,
        ddp_timeout=6 * 3600,  # ranks wait for each other's share of a split, and for rank 0's scores
    )
    # Without a launcher the Trainer would spread over all GPUs by DataParallel: slower, and --bs would change meaning.
    launch.note_unused_gpus(training_args.n_gpu, Path(sys.argv[0]).name)
    training_args._n_gpu = min(training_args.n_gpu, 1)
    return training_args


def train(
    args: argparse.Namespace, training_args: Seq2SeqTrainingArguments, build: Callable[[], Any],
    datasets: Mapping[str, Any], predictor: Predictor, checkpoint: str | None,
) -> torch.nn.Module:  # fmt: skip
    """Train, save into the run folder, return the trained model (the best epoch's, unless --final_eval).

    `checkpoint`: resume from it, with optimizer, schedule, data order and random states restored. Raises
    KeyboardInterrupt after Ctrl-C, once the state is saved; UserError when the loss is no number.
    """
    folder = Path(training_args.output_dir)
    set_seed(args.seed)  # a fresh LoRA adapter draws from the global state
    model = build().float()
    choose_attention(model, training_args.device)
    use_cache = model.config.use_cache
    warn_about_device(training_args.device, sum(p.numel() for p in model.parameters()))
    ctrl_c = launch.CtrlC()
    trainer = SFTTrainer(
        model, training_args, predictor.collator, datasets["train"], None if args.final_eval else datasets["val"],
        processing_class=predictor.tokenizer, evaluate_with=predictor.evaluate, save_minutes=args.save_minutes,
        ctrl_c=ctrl_c, max_tokens=args.max_tokens,
    )  # fmt: skip
    if checkpoint:
        print0(f"{folder}: resuming from {Path(checkpoint).name}")
    if dry_run_wanted(trainer):
        dry_run(trainer)
    with ctrl_c:
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.run_control.stopped:
        step = f"{trainer.state.global_step} of {trainer.state.max_steps}"
        raise KeyboardInterrupt(f"training is saved at step {step}; run the same command again to go on")
    trainer.load_best()
    model.config.use_cache = use_cache  # the Trainer turned it off; saved so, generation would be slow ever after
    trainer.save_trained()
    return model.eval()


class SFTTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer with batches of similar length, evaluation by a `Predictor`, checkpoints that are complete."""

    def __init__(
        self, *args: Any, evaluate_with: Callable, save_minutes: float, ctrl_c: launch.CtrlC,
        max_tokens: int | None = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.evaluate_with = evaluate_with
        kind = LengthGroupedBatches if max_tokens is None else TokenBudgetBatches
        size = self.args.per_device_train_batch_size if max_tokens is None else max_tokens
        ranks = self.args.process_index, self.args.world_size
        self.batches = kind(lengths(self.train_dataset), size, self.args.seed, *ranks)
        self.remove_callback(PrinterCallback)
        self.add_callback(Log())
        self.run_control = RunControl(self.batches, save_minutes, ctrl_c)
        self.add_callback(self.run_control)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        # not prepared by accelerate, which would distribute the batches once more and fill a short last step up with
        # samples of the first one; the Trainer moves them to the device
        names = ("num_workers", "persistent_workers", "pin_memory")
        options = {name: getattr(self.args, f"dataloader_{name}") for name in names}
        options |= {"batch_sampler": self.batches, "collate_fn": self.data_collator}
        return torch.utils.data.DataLoader(self.train_dataset, **options)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, torch.Tensor]:
        """The library's, without waiting for a GPU: real labels are found and counted before the copies begin."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        places = [flat_index(batch["labels"] != IGNORE) for batch in batches]
        real = to_device(torch.tensor(sum(map(len, places))), device)
        if self.args.world_size > 1:
            real = self.accelerator.gather(real).sum()
        made = zip(batches, places, strict=True)
        return [to_device({**batch, "label_index": index}, device) for batch, index in made], real

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs):
        """Metrics of the evaluation split, by the loop that also writes the prediction files."""
        found = self.evaluate_with(self.model, self.eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            (folder / COMPLETE).unlink(missing_ok=True)
        with files.writing(folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each rank writes its own random state
        if self.is_world_process_zero():
            files.write_text(folder / COMPLETE, "")
            # only now: until the new one is complete, the old ones are all there is
            found = checkpoint_folders(folder.parent)
            for path in set(found) - kept_checkpoints(found, folder, self.state.best_global_step):
                shutil.rmtree(path)

    def load_best(self) -> None:
        """Load the weights of the epoch with the best metric, where epochs were evaluated."""
        best = self.state.best_global_step
        if self.args.eval_strategy == "no" or not best:
            return
        print0(f"best {self.args.metric_for_best_model}: {self.state.best_metric:.2f} at step {best}")
        if best != self.state.global_step:
            # the state records where the folder was then; it may have been moved between two launches
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / f"checkpoint-{best}")
            self._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # a checkpoint holds a shared tensor under one of its names: it is missing only if none of them was loaded
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(tensor) for name, tensor in weights.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(weights.get(name)) not in loaded]
        if odd := missing or load_result.unexpected_keys:
            fault = f"its checkpoint does not fit the model ({odd[0]})"
            raise UserError(f"{self.args.output_dir}: {fault}; use --overwrite")

    def save_trained(self) -> None:
        """Move the trained model, its tokenizer and the training log into the run folder; metrics.json comes last."""
        folder, staging = Path(self.args.output_dir), Path(self.args.output_dir) / ".saving"
        if self.is_world_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with files.writing(folder):
            self.save_model(str(staging))  # the library writes on rank 0 only
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            with files.writing(folder):
                self.state.save_to_json(str(staging / "trainer_state.json"))
                portable_tokenizer(staging)
                (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle; args.yaml says more
                for file in staging.iterdir():
                    file.chmod(0o644)  # safetensors writes 0600, which hides a model from the rest of a group
                    os.replace(file, folder / file.name)
                staging.rmdir()
            files.write_json(folder / METRICS, summary(self.state))
            print0(f"trained model: {folder}")
        self.accelerator.wait_for_everyone()


def dry_run_wanted(trainer: SFTTrainer) -> bool:
    return on_gpu(trainer.args.device)


def dry_run(trainer: SFTTrainer) -> None:
    """Run the largest batch of all epochs forward and backward, with memory taken as AdamW and DDP will take it.

    No weight and no random state changes. Raises UserError if the GPU's memory does not suffice.
    """
    args, batches, sizes = trainer.args, trainer.batches, lengths(trainer.train_dataset)
    epoch, largest = batches.epoch, []
    for batches.epoch in range(math.ceil(args.num_train_epochs)):
        largest = max([largest, *batches], key=lambda batch: padded_tokens(batch, sizes))
    batches.epoch = epoch
    longest = " and ".join(f"{max(sizes[i][part] for i in largest)}" for part in (0, 1))
    fault = (
        f"--bs: a batch of {len(largest)} samples (prompts and targets of up to {longest} tokens) does not fit into "
        "this GPU's memory; use a smaller --bs on more processes, or --max_tokens"
    )
    with enough_memory(fault):
        _forward_and_backward(trainer, trainer.data_collator([trainer.train_dataset[i] for i in largest]))


def padded_tokens(batch: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
    """Tokens of a batch with its padding; `sizes` (prompt, target) of every sample."""
    return len(batch) * sum(max((sizes[i][part] for i in batch), default=0) for part in (0, 1))


def _forward_and_backward(trainer: SFTTrainer, batch: Any) -> None:
    args, model = trainer.args, trainer.model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = 2 + (args.world_size > 1)  # AdamW's moments; DDP's buckets
    with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
        held = [torch.empty_like(p) for p in trained for _ in range(copies)]
        (inputs,), real = trainer.get_batch_samples(iter([batch]), 1, args.device)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=real)
        loss.backward()
    model.zero_grad(set_to_none=True)
    del held


def summary(state: Any) -> dict[str, Any]:
    """metrics.json from a `TrainerState`: steps, epochs, first and last logged loss, evaluations and the best one."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry] or [None]
    return {
        "steps": state.global_step, "epochs": state.epoch, "first_loss": losses[0], "last_loss": losses[-1],
        "best_metric": state.best_metric, "best_step": state.best_global_step,
        "evaluations": [entry for entry in state.log_history if any(key.startswith("eval_") for key in entry)],
    }  # fmt: skip


def checkpoint_folders(folder: Path) -> list[Path]:
    """`checkpoint-*` in `folder`, by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def kept_checkpoints(found: Sequence[Path], newest: Path, best_step: int | None) -> set[Path]:
    """KEPT of the checkpoints `found`, by step: the one just written, the best epoch's, then the latest."""
    best = [newest.with_name(f"checkpoint-{best_step}")] if best_step else []
    return set(list(dict.fromkeys([newest, *best, *reversed(found)]))[:KEPT])


def warn_about_device(device: torch.device, parameters: int) -> None:
    """Say plainly when a model of real size is about to be trained on the CPU."""
    if device.type != "cpu":
        return
    if torch.cuda.is_available():
        warn0("training on the CPU although a GPU is there (is ACCELERATE_USE_CPU set?)")
    elif shutil.which("nvidia-smi"):
        warn0("training on the CPU: this torch cannot use the GPU of this machine (a CPU build, or an old driver)")
    elif parameters > 100e6:
        warn0(f"no GPU found: training {parameters / 1e6:.0f} million parameters on the CPU takes days, not hours")


class RunControl(TrainerCallback):
    """The sampler's epoch; a checkpoint every `minutes` within an epoch, by rank 0's clock; after Ctrl-C on any
    process a checkpoint, then the end of training, on all processes (`stopped`)."""

    def __init__(self, batches: DistributedBatches, minutes: float, ctrl_c: launch.CtrlC):
        self.batches, self.seconds, self.ctrl_c, self.stopped = batches, minutes * 60, ctrl_c, False

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate's set_epoch does not reach the sampler after a resume on several processes
        self.batches.epoch = state.global_step // self.batches.steps

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()

    on_train_begin = on_save

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps or (args.world_size > 1 and state.global_step % SYNC_STEPS):
            return
        late = self.seconds > 0 and time.monotonic() - self.saved >= self.seconds
        save, stop = late and cli.rank() == 0, self.ctrl_c.pressed
        if args.world_size > 1:
            flags = to_device(torch.tensor([float(save), float(stop)]), args.device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            save, stop = flags.bool().tolist()
        if stop:
            self.stopped = control.should_save = control.should_training_stop = True
        elif save and state.global_step % self.batches.steps:  # the last step of an epoch is saved anyway
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # the library takes the end of training for the end of an epoch
            control.should_save = control.should_evaluate = False


class Log(TrainerCallback):
    """A progress bar with ETA, and a line of text per log entry. Raises UserError when the loss is no number."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = cli.progress(desc="train", total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise UserError(f"--lr: the loss is {loss} at step {state.global_step}; start anew with a smaller one")
        shown = {name: value for name, value in logs.items() if name not in ("epoch", "total_flos")}
        # a terminal's bar has to be cleared first; in a log file it is text already written
        with self.bar.external_write_mode() if sys.stderr.isatty() else contextlib.nullcontext():
            words = " ".join(f"{name} {value:.4g}" for name, value in shown.items() if isinstance(value, (int, float)))
            print0(f"epoch {state.epoch or 0:.2f} step {state.global_step}/{state.max_steps} {words}")
