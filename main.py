"""Supervised fine-tuning of a rationale (or answer) model: train, generate, score. Step 2 of ARES, and MM-CoT itself.

    accelerate launch main.py --data_root data --caption_file data/instruct_captions.json --use_caption \\
        --img_type vit --prompt_format QCM-E --model RL_models/RUN/0 \\
        --correction True --correction_file scienceqa/correction.json \\
        --bs 8 --epoch 20 --lr 8e-5 --output_len 512 --use_generate --final_eval
    accelerate launch main.py ... --evaluate_dir RL_models/RUN/0      # rationales of a model; trains nothing

`--model` may be a plain T5 (image layers are initialised from --seed), a released MM-CoT/ARES checkpoint, or a folder
that this project wrote. The trained model and `predictions_ans_{test,eval,train}.json` go to one folder under
--output_dir, named after the flags; with --evaluate_dir the files go to that folder. The same command after a kill
continues. Several processes on CPU: `ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 main.py ...`.
The steps of a run are in sft/run.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ares import cli, files, launch
from sft import run as sft_run
from sft.lora import peft_fault


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The released code's flags and ours. Raises UserError for contradictions, before anything is loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    cli.add_common_flags(parser, output_len=64, lr=5e-5)
    group = sft_run.add_sft_flags(parser)
    group.add_argument("--output_dir", default="experiments", help="folder of all runs' folders")
    group.add_argument("--sep", nargs="?", const="sep", help="only names the output folder")
    group.add_argument("--w_train_le", nargs="?", const="w_train_le", help="only names the output folder")
    args = parser.parse_args(argv)
    sft_run.check_flags(args, cli.given_flags(parser, argv))
    return args


def run_name(args: argparse.Namespace) -> str:
    """The released name of a run's folder; beyond 255 bytes its end becomes a hash."""
    model, correction = (str(path).rstrip("/").replace("/", "-") for path in (args.model, args.correction_file))
    name = (
        f"{args.user_msg}_{model}_{args.img_type}_{args.prompt_format}_lr{args.lr}"
        f"_bs{args.bs * cli.world_size()}_op{args.output_len}_ep{args.epoch}"
    )
    name += f"_{args.sep}" if args.sep else ""
    name += f"_seed{args.seed}"
    name += f"_{args.w_train_le}" if args.w_train_le else ""
    name += f"_{correction.removesuffix('.json')}" if args.correction_file else ""
    return files.short_name(name)


def main(argv: Sequence[str] | None = None) -> None:
    launch.use_expandable_segments()
    args = parse_args(argv)
    launch.check_processes("main.py")
    if fault := peft_fault():
        cli.warn0(fault)  # before it is needed: the stages before it take hours
    source = args.evaluate_dir or args.model
    folder = Path(args.evaluate_dir or args.run_dir or Path(args.output_dir) / run_name(args))
    if not args.evaluate_dir:
        sft_run.check_run_dir(folder, args.model)

    from model import T5ForMultimodalGeneration, check_checkpoint

    def check(patch_size):
        flag = "--evaluate_dir" if args.evaluate_dir else "--model"
        info = check_checkpoint(source, patch_size, args.img_type, flag)
        if args.evaluate_dir:
            sft_run.refuse_fresh_layers(info, patch_size, flag)
        return info

    def build(patch_size, trained):
        return T5ForMultimodalGeneration.from_pretrained(trained or source, patch_size=patch_size, seed=args.seed)

    sft_run.run(args, folder, check, build)


if __name__ == "__main__":
    cli.run(main)
