"""Supervised fine-tuning: samples per second of main.py's training loop against the released recipe.

    python benchmarks/bench_sft.py --size tiny --device cpu

Ours is the SFTTrainer that main.py runs: an epoch over `--samples` questions with its start (about half a second). The
released recipe takes two steps of eight, as its cost does not depend on the lengths. Checked first: the same loss
and the same gradients, without dropout.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, the project is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ares import cli, launch
from benchmarks import common, limits, released_recipe
from model import T5ForMultimodalGeneration, choose_attention

BS, LR = 8, 8e-5


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--samples", type=int, default=96, help="questions of our epoch (default: %(default)s)")
    return parser.parse_args(argv)


def check_equal(folder: Path, data: common.BenchData, features, device: torch.device) -> list[str]:
    """Loss and gradients of eight questions, padded to 512 + 512 against padded to their longest."""
    dataset = data.dataset("train", BS)
    items = [dataset[i] for i in range(BS)]
    losses, gradients = [], []
    for side in ("released", "ours"):
        model = T5ForMultimodalGeneration.from_pretrained(folder).to(device).eval()
        if side == "released":
            batch = released_recipe.padded_batch(items, features)
            released_recipe.plain_model(model)
        else:
            batch = data.collator()(items)
            choose_attention(model, device)
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        losses.append(loss.detach().cpu())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    size = float(gradients[0].abs().max())
    return [
        common.check("loss of a batch", *losses, 1e-4),
        common.check("its gradients, in units of the largest", gradients[0] / size, gradients[1] / size, 1e-4),
    ]


def our_trainer(args: argparse.Namespace, folder: Path, data: common.BenchData, out: str):
    """samples -> what main.py trains with, an epoch of them, without checkpoints."""
    from sft.trainer import SFTTrainer, set_up

    flags = common.sft_flags("--bs", str(BS), "--epoch", "1", "--lr", str(LR), "--final_eval", "--img_type", "vit")
    model = T5ForMultimodalGeneration.from_pretrained(folder)

    def build(samples: int):
        dataset = data.dataset("train", samples)
        training_args = set_up(flags, Path(out), samples)
        training_args.save_strategy = "no"
        choose_attention(model, training_args.device)
        collator = data.collator()
        return SFTTrainer(
            model, training_args, collator, dataset, None, processing_class=data.tokenizer, evaluate_with=None,
            save_minutes=0, ctrl_c=launch.CtrlC(),
        )  # fmt: skip

    return build


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = common.set_up(args)
    data = common.load(args)
    folder = common.model_folder(args, data)
    features = released_recipe.LoadedFeatures(data.features.path, data.features.name_map)
    equal = check_equal(folder, data, features, device)

    plain = released_recipe.plain_model(T5ForMultimodalGeneration.from_pretrained(folder).to(device))
    optimizer = released_recipe.optimizer_of(plain, LR)
    two_steps = data.dataset("train", 2 * BS)
    with tempfile.TemporaryDirectory() as out:
        build = our_trainer(args, folder, data, out)
        trainer = build(args.samples)
        result = common.compare(
            lambda: released_recipe.train_steps(plain, two_steps, features, optimizer, device, BS),
            trainer.train,
            args,
            work=(2 * BS, args.samples),
        )
        trainers = {n * args.samples: build(n * args.samples) for n in (1, 2, 4)}
        once = argparse.Namespace(**vars(args) | {"repeats": 1})
        scaling = common.linear(lambda n: trainers[n].train(), once, args.samples)
        common.profile(trainer.train, args)
        limit = how_close(trainer, data, args, device, result["ours"]["median"])
    per_sample = result["ours"]["median"]
    common.report(
        args, "SFT", result, target=">= 7x" if args.device == "cpu" else ">= 12x", equal=equal, limit=limit,
        scaling=scaling, slice=f"{args.samples} questions, released {2 * BS}; seconds per sample",
        projection={"sft_seconds_per_sample": per_sample},
    )  # fmt: skip


def how_close(trainer, data, args, device, per_sample: float) -> str:
    """On a GPU the FLOPs of real tokens over the peak; on a CPU the share of the bare matrix products."""
    dataset = trainer.train_dataset
    if device.type == "cuda":
        flops = 3 * sum(limits.row_flops(trainer.model.config, *row) for row in common.lengths(dataset))
        dtype = torch.bfloat16 if trainer.args.bf16 else torch.float32
        share = flops / len(dataset) / per_sample / limits.peak_flops(device, dtype)
        return f"model FLOP utilisation {share:.0%} of real tokens"
    order = [i for batch in trainer.batches for i in batch]
    model = trainer.model.train()

    def epoch():
        for start in range(0, len(order), BS):
            model(**data.collator()([dataset[i] for i in order[start : start + BS]])).loss.backward()
        model.zero_grad()

    share = limits.products(epoch).seconds(device) / len(dataset) / per_sample
    return f"bare matrix products take {share:.0%} of our time"


if __name__ == "__main__":
    cli.run(main)
