"""The training loop of main.py and run_mm_cot_lora.py: transformers' Seq2SeqTrainer with what a long run needs.

The recipe is the released one, the library's defaults: AdamW, weight decay 0.01 except biases and norms, linear decay
to 0, no warm-up, gradient clip 1.0, dropout on. Ours besides: batches of similar length in a seeded order that does
not depend on the number of processes, bf16 autocast on a GPU that has it, checkpoints that count only once whole,
saves every few minutes, evaluation by the same loop that writes the prediction files, logs that can be read when
piped. The library divides the loss by the real targets of the whole step (all processes), so 2 x 8 and 1 x 16 train
alike.

Called by sft.run; leaves out when and where (sft/run.py).
"""

from __future__ import annotations

import argparse
import contextlib
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
from ares.cli import UserError, print0, warn0
from ares.portable import portable_tokenizer
from model import choose_attention
from sft.predict import Predictor, asked_for, from_rank0
from utils_data import batches_pin_themselves

COMPLETE = "complete"  # written last into a checkpoint's folder: without it the folder does not count
METRICS = "metrics.json"  # written last into a trained model's folder
KEPT = 2  # checkpoints
MEGABATCH = 50  # steps whose samples are sorted by length together
ALIKE = 5  # steps whose targets are of like length, and which sort their samples by prompt
ROUND = 8  # tokens: what --max_tokens rounds lengths up to
LOG_STEPS = 50


def set_up(args: argparse.Namespace, folder: Path, examples: int) -> Seq2SeqTrainingArguments:
    """The library's arguments for these flags. Starts the process group; `.device` is this process's device."""
    steps = math.ceil(examples / (args.bs * cli.world_size()))
    workers = args.workers if args.workers is not None else 2 if torch.cuda.is_available() else 0
    bf16 = cli.mixed_precision(args.precision) == "bf16"
    args.precision = "bf16" if bf16 else "fp32"  # args.yaml records what ran
    if not bf16:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # the Trainer would take what accelerate is configured for
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
        metric_for_best_model=None if args.final_eval else metric_name(args),
        greater_is_better=None if args.final_eval else True,
        logging_steps=max(1, min(LOG_STEPS, steps // 2)),
        logging_nan_inf_filter=False,  # a loss that is no number ends the run (Log), it is not averaged away
        disable_tqdm=True,  # replaced by Log
        report_to="none",
        remove_unused_columns=False,  # items hold the question id, which the collator needs
        bf16=bf16,
        use_cpu=bf16 and not torch.cuda.is_available(),  # the library wants to be told
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


def metric_name(args: argparse.Namespace) -> str:
    """What the best epoch is chosen by: accuracy for the A formats, ROUGE-L otherwise."""
    return "accuracy" if asked_for(args) == "A" else "rougeL"


def train(
    args: argparse.Namespace,
    training_args: Seq2SeqTrainingArguments,
    build: Callable[[], Any],
    datasets: Mapping[str, Any],
    predictor: Predictor,
    checkpoint: str | None,
) -> torch.nn.Module:
    """Train, save into the run folder, return the trained model (the best epoch's, unless --final_eval).

    `checkpoint`: go on from there, with optimizer, schedule, data order and random states restored.
    """
    folder = Path(training_args.output_dir)
    set_seed(args.seed)  # a fresh LoRA adapter draws from the global state
    model = build().float()
    choose_attention(model, training_args.device)
    use_cache = model.config.use_cache
    warn_about_device(training_args.device, sum(p.numel() for p in model.parameters()))
    trainer = SFTTrainer(
        model,
        training_args,
        predictor.collator,
        datasets["train"],
        None if args.final_eval else datasets["val"],
        processing_class=predictor.tokenizer,
        evaluate_with=predictor.evaluate,
        save_minutes=args.save_minutes,
        max_tokens=args.max_tokens,
    )
    if checkpoint:
        print0(f"{folder}: going on from {Path(checkpoint).name}")
    with launch.CtrlC() as ctrl_c:
        stopping = StopAndSave(ctrl_c)
        trainer.add_callback(stopping)
        trainer.train(resume_from_checkpoint=checkpoint)
    if stopping.stopped:
        raise KeyboardInterrupt(
            f"training is saved at step {trainer.state.global_step} of {trainer.state.max_steps}; run the same "
            "command again to go on"
        )
    trainer.load_best()
    model.config.use_cache = use_cache  # the Trainer turned it off; saved so, generation would be slow ever after
    trainer.save_trained()
    return model.eval()


class SFTTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer with our batches, our evaluation and checkpoints that a kill cannot halve."""

    def __init__(
        self, *args: Any, evaluate_with: Callable, save_minutes: float, max_tokens: int | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.evaluate_with = evaluate_with
        rank, world = self.args.process_index, self.args.world_size
        if max_tokens is None:
            step = self.args.per_device_train_batch_size * world
            self.sampler = LengthGroupedOrder(lengths(self.train_dataset), step, self.args.seed)
            self.batches = Shares(self.sampler, rank, world)
        else:
            self.sampler = TokenBudgetBatches(lengths(self.train_dataset), max_tokens, self.args.seed, rank, world)
            self.batches = self.sampler
        self.remove_callback(PrinterCallback)
        self.add_callback(Log())
        self.add_callback(EpochOrder(self.sampler))
        self.add_callback(SaveEvery(save_minutes, self.sampler.steps))

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        # not prepared by accelerate, which would deal the batches out once more and fill a short last step up with
        # samples of the first one; the Trainer moves them to the device
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

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
            # only now: until the new one is whole, the old ones are all there is
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
            # the path in the state is that of the folder's old place, if it was moved between two launches
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / f"checkpoint-{best}")
            self._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # a checkpoint holds a shared tensor under one of its names: only a tensor without any is worth a word
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(tensor) for name, tensor in weights.items() if name not in load_result.missing_keys}
        lost = [name for name in load_result.missing_keys if id(weights.get(name)) not in loaded]
        if lost or load_result.unexpected_keys:
            odd = (lost or load_result.unexpected_keys)[0]
            raise UserError(f"{self.args.output_dir}: its checkpoint does not fit the model ({odd}); use --overwrite")

    def save_trained(self) -> None:
        """Move the trained model, its tokenizer and the training log into the run folder; metrics.json comes last."""
        folder, staging = Path(self.args.output_dir), Path(self.args.output_dir) / ".saving"
        if self.is_world_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with files.writing(folder):
            self.save_model(str(staging))  # on every rank: FSDP and DeepSpeed gather here
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            with files.writing(folder):
                self.state.save_to_json(str(staging / "trainer_state.json"))
                portable_tokenizer(staging)
                (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle; args.yaml says more
                for file in staging.iterdir():
                    file.chmod(0o644)  # safetensors writes 0600, which hides a model from a group that shares the box
                    os.replace(file, folder / file.name)
                staging.rmdir()
            files.write_json(folder / METRICS, self._summary())
            print0(f"trained model: {folder}")
        self.accelerator.wait_for_everyone()

    def _summary(self) -> dict[str, Any]:
        state, log = self.state, self.state.log_history
        losses = [entry["loss"] for entry in log if "loss" in entry]
        evaluated = [entry for entry in log if any(key.startswith("eval_") for key in entry)]
        return {
            "steps": state.global_step,
            "epochs": state.epoch,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "best_metric": state.best_metric,
            "best_step": state.best_global_step,
            "evaluations": evaluated,
        }


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


# -- the order of the data -------------------------------------------------------------------------------


def lengths(dataset: Any) -> list[tuple[int, int]]:
    """(prompt, target) tokens of every sample: what it costs in the encoder and in the decoder."""
    return [(len(item["input_ids"]), len(item["labels"])) for item in (dataset[i] for i in range(len(dataset)))]


class LengthGroupedOrder(torch.utils.data.Sampler):
    """All samples once, shuffled, those of one optimizer step being of similar length.

    Samples are shuffled, ordered by length within stretches of MEGABATCH steps, cut into steps, and the steps
    shuffled; a short last step stays last. A stretch is ordered by target, and within every ALIKE steps by prompt:
    on ScienceQA 18% of the work is then padding, against 41% where the sum of both decides. The order is a function
    of (seed, epoch) alone. The library's own draws from the global random state, which dropout moves on by different
    amounts on different ranks: samples would be lost and doubled.

    Args:
        lengths: (prompt, target) of every sample.
        step: samples per optimizer step, all processes together.
    """

    def __init__(self, lengths: Sequence[tuple[int, int]], step: int, seed: int):
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0
        self.steps = math.ceil(len(lengths) / step)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.step * MEGABATCH
        order = [i for start in range(0, len(order), size) for i in self._alike(order[start : start + size])]
        batches = [order[start : start + self.step] for start in range(0, len(order), self.step)]
        whole = len(order) // self.step
        shuffled = torch.randperm(whole, generator=generator).tolist()
        return iter([i for k in [*shuffled, *range(whole, len(batches))] for i in batches[k]])

    def _alike(self, stretch: list[int]) -> list[int]:
        by_target = sorted(stretch, key=lambda i: self.lengths[i][1])
        size = self.step * ALIKE
        return [
            i
            for start in range(0, len(by_target), size)
            for i in sorted(by_target[start : start + size], key=lambda i: self.lengths[i][0])
        ]


class Shares(torch.utils.data.Sampler):
    """This process's share of every step of `order`: as many samples as the others have, or one more or less.

    A last step with fewer samples than processes gives the rest of them one that another has too: none may be idle.
    """

    def __init__(self, order: LengthGroupedOrder, rank: int, world: int):
        self.order, self.rank, self.world = order, rank, world

    def __len__(self) -> int:
        return self.order.steps

    def __iter__(self) -> Iterator[list[int]]:
        samples = list(self.order)
        for start in range(0, len(samples), self.order.step):
            step = samples[start : start + self.order.step]
            first, end = (len(step) * r // self.world for r in (self.rank, self.rank + 1))
            yield step[first:end] or [step[self.rank % len(step)]]


class TokenBudgetBatches(torch.utils.data.Sampler):
    """All samples once per epoch, in batches of like length whose padded tokens stay within a budget (--max_tokens).

    Lengths count as rounded up to ROUND tokens. Samples are shuffled, sorted by target and then prompt, which leaves
    those of equal rounded lengths in a random order, and cut into batches; the steps (one batch for each process) are
    shuffled. The cuts depend on the lengths alone, so every epoch has as many batches. This process gets every
    `world`-th batch.
    """

    def __init__(self, lengths: Sequence[tuple[int, int]], max_tokens: int, seed: int, rank: int = 0, world: int = 1):
        self.keys = [(_round_up(target), _round_up(prompt)) for prompt, target in lengths]
        self.seed, self.rank, self.world, self.epoch = seed, rank, world, 0
        self.cuts = [0]  # where batches begin, in the sorted order
        longest = (0, 0)
        for place, key in enumerate(sorted(self.keys)):
            longest = max(longest[0], key[0]), max(longest[1], key[1])
            if (place + 1 - self.cuts[-1]) * sum(longest) > max_tokens and place > self.cuts[-1]:
                self.cuts.append(place)
                longest = key
        self.cuts.append(len(self.keys))
        while (len(self.cuts) - 1) % world:  # as many batches for each process
            spans = list(zip(self.cuts, self.cuts[1:], strict=False))
            start, end = max(spans, key=lambda span: span[1] - span[0])
            if end - start < 2:
                raise UserError(f"--train_split: {len(self.keys)} samples are too few for {world} processes")
            self.cuts.insert(self.cuts.index(start) + 1, (start + end) // 2)
        self.steps = (len(self.cuts) - 1) // world

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 100003 + self.epoch)
        order = torch.randperm(len(self.keys), generator=generator).tolist()
        order.sort(key=self.keys.__getitem__)
        for step in torch.randperm(self.steps, generator=generator).tolist():
            k = step * self.world + self.rank
            yield order[self.cuts[k] : self.cuts[k + 1]]


def _round_up(length: int) -> int:
    return -(-length // ROUND) * ROUND


# -- callbacks -------------------------------------------------------------------------------------------


class EpochOrder(TrainerCallback):
    """Tells the sampler its epoch. (accelerate's set_epoch does not reach it after a resume on several processes.)"""

    def __init__(self, sampler: LengthGroupedOrder | TokenBudgetBatches):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = state.global_step // self.sampler.steps


class SaveEvery(TrainerCallback):
    """A checkpoint every `minutes` within an epoch, besides the one at its end."""

    CHECK_STEPS = 8  # with several processes: rank 0's clock decides, and asking it costs a synchronisation

    def __init__(self, minutes: float, steps_per_epoch: int):
        self.seconds, self.steps_per_epoch = minutes * 60, steps_per_epoch

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        last_of_epoch = state.global_step % self.steps_per_epoch == 0
        if self.seconds <= 0 or last_of_epoch or (args.world_size > 1 and state.global_step % self.CHECK_STEPS):
            return
        if from_rank0(lambda: time.monotonic() - self.saved >= self.seconds):
            control.should_save = True


class StopAndSave(TrainerCallback):
    """After Ctrl-C on any process: a checkpoint, then the end of training, on all processes."""

    def __init__(self, ctrl_c: launch.CtrlC):
        self.ctrl_c, self.stopped = ctrl_c, False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            return
        pressed = self.ctrl_c.pressed
        if args.world_size > 1:
            if state.global_step % SaveEvery.CHECK_STEPS:
                return
            flag = torch.tensor(float(pressed), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            pressed = bool(flag.item())
        if pressed:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # the library takes the end of training for the end of an epoch
            control.should_save = control.should_evaluate = False


class Log(TrainerCallback):
    """A progress bar with ETA, and a line of text per log entry. Stops a run whose loss is no number."""

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
        # a terminal's bar steps aside; in a log file the bar is text already written
        with self.bar.external_write_mode() if sys.stderr.isatty() else contextlib.nullcontext():
            words = " ".join(f"{name} {value:.4g}" for name, value in shown.items() if isinstance(value, (int, float)))
            print0(f"epoch {state.epoch or 0:.2f} step {state.global_step}/{state.max_steps} {words}")
