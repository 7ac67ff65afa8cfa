"""A LoRA adapter that learns to answer, on top of a fine-tuned rationale model. Step 3 of ARES.

    accelerate launch run_mm_cot_lora.py --data_root data --caption_file data/instruct_captions.json --use_caption \\
        --img_type vit --model experiments/RUN --correction False --prompt_format QCM-A --bs 16 --epoch 20 --lr 8e-5 \\
        --output_len 64 --lora_r 64 --lora_alpha 128 --lora_dropout 0.05 --use_generate --final_eval \\
        --eval_le experiments/RUN/predictions_ans_eval.json --test_le experiments/RUN/predictions_ans_test.json

QCM-A is the paper's format; its prompt does not contain the rationale. QCMG-A (with --train_le, --eval_le and
--test_le) puts it there. The adapter (peft's format) and its predictions go to a folder inside --model, named after
the flags; `--evaluate_dir DIR` scores an adapter, ours or a released one, and trains nothing. The same command after
a kill continues.

Every Linear is adapted: q, k, v, o, wi (wi_0, wi_1), wo, image_dense, gate_dense, and lm_head where it has weights of
its own. Not adapted are lm_head of a tied model (it is the embedding: merging the adapter would change the input, too)
and `mha_layer.out_proj`, whose weights PyTorch's attention uses without calling the module: an adapter there has no
effect and no gradient. Released adapters have one; it is dropped on loading, with no change to any output. The steps
of a run are in sft/run.py, the adapter is in sft/lora.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ares import cli, files, launch
from sft import run as sft_run
from sft.lora import add_adapter, check_adapter, load_adapter, peft_fault


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The released code's flags and ours. Raises UserError for contradictions, before anything is loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    cli.add_common_flags(parser, output_len=64, lr=5e-5)
    sft_run.add_sft_flags(parser)
    group = parser.add_argument_group("adapter")
    group.add_argument("--lora_r", type=int, default=32, help="rank")
    group.add_argument("--lora_alpha", type=int, default=64, help="the update is scaled by alpha / r")
    group.add_argument("--lora_dropout", type=float, default=0.05, help="dropout before the adapter's first matrix")
    group.add_argument("--lora_bias", default="none", choices=("none", "all", "lora_only"), help="biases that train")
    group.add_argument("--rlh", nargs="?", const="True", help="a label, kept in args.yaml; nothing else reads it")
    args = parser.parse_args(argv)
    problems = [fault] if (fault := peft_fault()) else []
    if args.lora_r < 1 or args.lora_alpha < 1:
        problems.append(f"--lora_r and --lora_alpha must be at least 1, not {args.lora_r} and {args.lora_alpha}")
    if not 0 <= args.lora_dropout < 1:
        problems.append(f"--lora_dropout must be in [0, 1), not {args.lora_dropout}")
    if not args.run_dir and not args.evaluate_dir and not Path(args.model).is_dir():
        problems.append(f"--model: {args.model} is no folder to put the adapter into; for a hub id name a --run_dir")
    sft_run.check_flags(args, cli.given_flags(parser, argv), problems)
    return args


def run_name(args: argparse.Namespace) -> str:
    """The released name of an adapter's folder; with the prompt format added unless it is QCM-A, the paper's."""
    name = files.short_name(
        f"mm_cot_lora_r{args.lora_r}_a{args.lora_alpha}_d{args.lora_dropout}_s{args.seed}_lr{args.lr}"
        f"_bs{args.bs * cli.world_size()}_e{args.epoch}_len{args.output_len}"
    )
    begun = Path(args.model) / name / "args.yaml"  # earlier versions gave every format the released name
    if args.prompt_format == "QCM-A" or (
        begun.is_file() and f"prompt_format: {args.prompt_format}\n" in begun.read_text()
    ):
        return name
    return files.short_name(f"{name}_{args.prompt_format}")


def main(argv: Sequence[str] | None = None) -> None:
    launch.use_expandable_segments()
    args = parse_args(argv)
    launch.check_processes("run_mm_cot_lora.py")
    folder = Path(args.evaluate_dir or args.run_dir or Path(args.model) / run_name(args))
    if args.evaluate_dir:
        check_adapter(folder)
    else:
        sft_run.check_run_dir(folder, args.model)

    from model import T5ForMultimodalGeneration, check_checkpoint

    def check(patch_size):
        info = check_checkpoint(args.model, patch_size, args.img_type)
        sft_run.refuse_fresh_layers(info, patch_size, "--model")
        return info

    def build(patch_size, trained):
        model = T5ForMultimodalGeneration.from_pretrained(args.model, patch_size=patch_size, seed=args.seed)
        return load_adapter(model, trained) if trained else add_adapter(model, args)

    sft_run.run(args, folder, check, build, weights=[args.model])


if __name__ == "__main__":
    cli.run(main)
