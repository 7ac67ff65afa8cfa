"""Supervised fine-tuning: samples per second of main.py's training loop against the released recipe.

    python benchmarks/bench_sft.py --size tiny --device cpu

Ours is the SFTTrainer that main.py runs: an epoch over `--samples` questions with its start (about half a second). The
released recipe takes two steps of eight, as its cost does not depend on the lengths. Checked first: the same loss
and the same gradients, without dropout.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import Seq2SeqTrainer
from transformers.trainer_callback import PrinterCallback

from ares import cli, launch
from benchmarks import common, limits, released_recipe
from model import T5ForMultimodalGeneration, choose_attention

BS, LR = 8, 8e-5


def check_equal(data: common.BenchData, features: released_recipe.LoadedFeatures, device: str) -> list[str]:
    """Loss and gradients of eight questions, padded to 512 + 512 against padded to their longest."""
    dataset = data.dataset("train", BS)
    items = [dataset[i] for i in range(BS)]
    batches = {"released": released_recipe.padded_batch(items, features), "ours": data.collator(items)}
    losses, gradients = [], []
    for side, batch in batches.items():
        model = T5ForMultimodalGeneration.from_pretrained(data.model).to(device).eval()
        released_recipe.plain_model(model) if side == "released" else choose_attention(model, torch.device(device))
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        losses.append(loss.detach().cpu())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    size = float(gradients[0].abs().max())
    return [
        common.check("loss of a batch", *losses, 1e-4),
        common.check("its gradients, in units of the largest", gradients[0] / size, gradients[1] / size, 1e-4),
    ]


def our_trainers(data: common.BenchData, out: Path, samples: int) -> dict:
    """n -> what main.py trains with, an epoch of n x `samples`, without checkpoints; they share one model."""
    from sft.trainer import SFTTrainer, set_up

    flags = common.sft_flags("--bs", str(BS), "--epoch", "1", "--lr", str(LR), "--final_eval", "--img_type", "vit")
    model, trainers = T5ForMultimodalGeneration.from_pretrained(data.model), {}
    for n in (1, 2, 4):
        training_args = set_up(flags, out, n * samples)
        training_args.save_strategy = "no"
        choose_attention(model, training_args.device)
        trainers[n] = SFTTrainer(
            model, training_args, data.collator, data.dataset("train", n * samples), None,
            processing_class=data.tokenizer, evaluate_with=None, save_minutes=0, ctrl_c=launch.CtrlC(),
        )  # fmt: skip
    return trainers


class LibraryPolicy(T5ForMultimodalGeneration):
    """The policy with the loss of transformers' T5: all logits, the mean over a batch."""

    def forward(self, *args, num_items_in_batch=None, **kwargs):
        return super().forward(*args, **kwargs)


def library_trainer(data: common.BenchData, out: Path, ours: Any, samples: int) -> Seq2SeqTrainer:
    """transformers' own trainer with our arguments, batches of like length and dynamic padding."""
    model = released_recipe.plain_model(LibraryPolicy.from_pretrained(data.model), "sdpa")
    arguments = copy.copy(ours)
    arguments.output_dir, arguments.train_sampling_strategy = str(out / "library"), "group_by_length"
    dataset = data.dataset("train", samples)
    trainer = Seq2SeqTrainer(model, arguments, data.collator, dataset, processing_class=data.tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, argv, samples=(96, "questions of our epoch"))
    device, samples, data = args.device, args.samples, common.load(args)
    features = released_recipe.LoadedFeatures(data.features.path, data.features.name_map)
    equal = check_equal(data, features, device)

    plain = released_recipe.plain_model(T5ForMultimodalGeneration.from_pretrained(data.model).to(device))
    optimizer = released_recipe.optimizer_of(plain, LR)
    two_steps = data.dataset("train", 2 * BS)

    def released() -> None:
        released_recipe.train_steps(plain, two_steps, features, optimizer, device, BS)

    with tempfile.TemporaryDirectory() as out:
        trainers = our_trainers(data, Path(out), samples)
        trainer = trainers[1]
        trainer.train()
        result = common.compare(released, trainer.train, args, work=(2 * BS, samples))
        library = library_trainer(data, Path(out), trainer.args, samples // 2)
        peer = common.against_library(library.train, trainer.train, args, work=(samples // 2, samples))
        scaling = common.linear(lambda n: trainers[n].train(), device)
        common.profile(trainer.train, args)
        limit = how_close(trainer, data, device, result["ours"]["median"])
    common.report(
        args, "sft", result, equal=equal, limit=limit, peer=peer, scaling=scaling,
        slice=f"{samples} questions, released {2 * BS}; seconds per sample",
        projection={"sft_seconds_per_sample": result["ours"]["median"]},
    )  # fmt: skip


def how_close(trainer, data: common.BenchData, device: str, per_sample: float) -> str:
    """On a GPU the FLOPs of real tokens over the peak; on a CPU the share of the bare matrix products."""
    dataset, model = trainer.train_dataset, trainer.model.train()
    if device == "cuda":
        flops = 3 * limits.mean_flops(model.config, dataset)
        return limits.utilisation(flops, per_sample, device, torch.bfloat16 if trainer.args.bf16 else torch.float32)
    order = [i for batch in trainer.batches for i in batch]

    def epoch():
        for start in range(0, len(order), BS):
            model(**data.collator([dataset[i] for i in order[start : start + BS]])).loss.backward()
        model.zero_grad()

    return limits.share_of_products(epoch, device, len(dataset), per_sample)


if __name__ == "__main__":
    cli.run(main)
