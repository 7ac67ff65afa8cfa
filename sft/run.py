"""Supervised fine-tuning as main.py and run_mm_cot_lora.py share it: flags, run folder, resume, train, predict.

A run folder holds `args.yaml` (written first; a second launch is compared with it), `checkpoint-*/` (each with the
marker `complete`, written last), then the trained model with its tokenizer, `trainer_state.json` and `metrics.json`
(written last: its presence says that training is done), then `predictions_ans_*.json`. The same command run again
continues from whichever of these is there. The training loop is in sft/trainer.py, the prediction loop in
sft/predict.py. Weights and optimizer are float32 always; --precision sets the type of the matrix products.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ares import cli, files, launch
from ares.cli import UserError, print0, warn0

# What a change of a setting means when a run folder is used again. A setting that is not listed must stay.
#   free        may change: it names a folder, or does not affect the weights
#   path        names a file or folder, which may move: its content is compared (train_data, eval_data)
#   evaluation  may change under --final_eval
#   training    must stay, but has no effect under --evaluate_dir
#   features, tokenizer   a digest of content, in CONTENTS; not compared with runs that recorded none
MEANINGS = {
    "training": "epoch lr max_tokens final_eval lora_r lora_alpha lora_dropout lora_bias",
    "training free": "bs workers save_minutes user_msg output_dir sep w_train_le rlh",
    "free": "processes run_dir evaluate_dir overwrite eval_bs eval_acc images test_split test_le img_shape precision "
    "decode_graph",
    "path": "data_root dataset caption_file vision_features name_map correction_file tokenizer train_le",
    "path evaluation": "eval_le",
    "evaluation": "val_split use_generate eval_data",
    "features": "train_features eval_features",
    "tokenizer": "tokenizer_pieces",
}
SETTINGS = {name: meaning.split() for meaning, names in MEANINGS.items() for name in names.split()}
CONTENTS = {
    "features": "--vision_features or --name_map (the features are not those of the earlier launch)",
    "tokenizer": "--tokenizer (its pieces are not those of the earlier launch)",
}


# -- flags -----------------------------------------------------------------------------------------------


def add_sft_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Flags of both scripts, besides `cli.add_common_flags`. Returns the group, for the script's own."""
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--epoch", type=int, default=20, help="passes over the training split")
    group.add_argument("--evaluate_dir", metavar="DIR", help="load this model, generate and score; train nothing")
    text = "train on corrected rationales"
    group.add_argument("--correction", type=cli.str2bool, default=False, metavar="BOOL", help=text)
    group.add_argument("--correction_file", metavar="FILE", help="in --data_root or a path; with --correction True")
    group.add_argument("--run_dir", metavar="DIR", help="output folder (default: a name built from the flags)")
    group.add_argument("--save_minutes", type=float, default=10.0, help="also save this often in an epoch (0: never)")
    group.add_argument("--overwrite", action="store_true", help="start anew: drop what an earlier run left")
    speed = parser.add_argument_group("speed")
    text = "autocast; auto: bf16 on a GPU that has it (weights and optimizer stay fp32)"
    speed.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help=text)
    text = "per batch and process, pads included: as many samples as fit (instead of --bs)"
    speed.add_argument("--max_tokens", type=int, help=text)
    speed.add_argument("--workers", type=int, help="processes that make batches (default: 2 with a GPU, else 0)")
    return group


def check_flags(args: argparse.Namespace, given: set[str], faults: Sequence[str] = ()) -> None:
    """Refuse every contradiction in one message, then note the flags that have no effect. `given`: cli.given_flags;
    `faults`: the script's own."""
    from utils_data import data_flag_faults  # imports torch, which --help does without

    longest, tokens = args.input_len + args.output_len, args.max_tokens
    few = f"is less than one sample may have (--input_len + --output_len, {longest})"
    own_folder = "--run_dir names a training run; --evaluate_dir writes its predictions into its own folder"
    problems = [*faults, *data_flag_faults(args), *cli.precision_faults(), *launcher_faults()]
    problems += [
        f"--{name} must be at least 1, not {value}"
        for name in ("epoch", "bs", "eval_bs", "eval_acc", "input_len", "output_len")
        if (value := getattr(args, name)) is not None and value < 1
    ]
    checks = {
        f"--workers must not be negative, not {args.workers}": args.workers is not None and args.workers < 0,
        f"--max_tokens {tokens} {few}": tokens is not None and tokens < longest,
        "--bs and --max_tokens both set the batch: drop one": tokens and "bs" in given and not args.evaluate_dir,
        f"--lr must be a number above 0, not {args.lr}": not 0 < args.lr < math.inf,
        f"--seed must be in 0 to 2**32 - 1, not {args.seed}": not 0 <= args.seed < 2**32,
        f"--save_minutes must not be negative, not {args.save_minutes}": not args.save_minutes >= 0,
        "--correction_file is used with --correction True only; add it or drop the file":
            args.correction_file and not args.correction,
        own_folder: args.evaluate_dir and args.run_dir,
        f"--evaluate_dir: {args.evaluate_dir} is not a folder":
            args.evaluate_dir and not Path(args.evaluate_dir).is_dir(),
    }  # fmt: skip
    cli.refuse([*problems, *(text for text, wrong in checks.items() if wrong)])
    useless = sorted(name for name in given if "training" in SETTINGS.get(name, ())) if args.evaluate_dir else []
    if useless:
        print0(f"note: no effect under --evaluate_dir: {' '.join('--' + name for name in useless)}")
    if "images" in given:
        print0("note: --images has no effect here (pictures enter as the features of --vision_features)")


def launcher_faults() -> list[str]:
    """What accelerate's configuration asks for and SFT cannot do; `accelerate launch` sets the environment."""
    asked = [
        name for name in ("FSDP", "DeepSpeed", "Megatron_LM")
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("1", "true", "t", "yes", "y", "on")
    ]  # fmt: skip
    why = "which splits the model, but generation needs a whole one; SFT runs under DDP: use configs/ddp.yaml"
    return [f"the accelerate configuration asks for {name}, {why}" for name in asked]


def check_run_dir(folder: Path, model: str) -> None:
    """Raise UserError if training would overwrite its own starting model."""
    if Path(model).exists() and folder.exists() and folder.samefile(model):
        raise UserError(f"--run_dir: {folder} is the starting model's own folder (--model); name another")


def refuse_fresh_layers(info: Any, patch_size: Sequence[int] | None, flag: str) -> None:
    """Raise UserError if --img_type would give a model image layers that nothing is going to train."""
    if info is not None and patch_size is not None and info.patch_size is None:
        raise UserError(f"{flag}: {info.folder} has no image layers; drop --img_type, or train some with main.py")


# -- train, then predict ---------------------------------------------------------------------------------


def run(
    args: argparse.Namespace,
    folder: Path,  # the run folder, or --evaluate_dir itself
    check: Callable[[Sequence[int] | None], Any],
    build: Callable[[Sequence[int] | None, Path | None], Any],
    weights: Sequence[str] = (),  # folders or hub ids, besides `folder`, whose weights the predictions depend on
) -> None:
    """Train into `folder` (unless --evaluate_dir) and write the prediction files there.

    `check`, given the patch size of --img_type, raises UserError if the checkpoints do not fit, without loading
    weights; it returns the model's `CheckpointInfo` (None for a hub id). `build`, given the patch size and a folder,
    returns the model saved there, or for None the one to train.
    """
    from utils_data import Collator, check_prompt_flags, check_vocabulary, load_data, load_tokenizer

    # 1. everything that can be wrong with flags and files, before a model is loaded
    check_prompt_flags(args)
    data = load_data(args, {"train": args.train_split, "val": args.val_split, "test": args.test_split})
    info = check(data.patch_size)
    tokenizer = load_tokenizer(args, args.evaluate_dir, args.model)
    check_vocabulary(tokenizer, info)
    datasets = tokenized_splits(args, data, tokenizer)
    place = "--output_dir" if hasattr(args, "output_dir") else "--model"
    files.writable_dir(folder, "--evaluate_dir" if args.evaluate_dir else "--run_dir" if args.run_dir else place)

    import torch

    from sft.predict import Predictor, from_rank0
    from sft.trainer import set_up, train

    # 2. devices and processes
    training_args = set_up(args, folder, len(datasets.get("train", ())))
    collator = Collator(tokenizer.pad_token_id, data.features, device=training_args.device)
    predictor = Predictor(args, data.problems, tokenizer, collator, training_args.device, bf16=training_args.bf16)
    with launch.only_launch(folder, from_rank0):
        # 3. train, or continue
        model = None
        if not args.evaluate_dir:
            settings = run_settings(args, data, datasets, predictor)
            checkpoint = from_rank0(lambda: open_run(folder, settings, args.overwrite))
            if checkpoint == "done":
                print0(f"{folder}: training is complete; continuing with the predictions")
            else:
                start = functools.partial(build, data.patch_size, None)
                model = train(args, training_args, start, datasets, predictor, checkpoint)
        # 4. predict
        splits = ["test"] if args.prompt_format.endswith("-A") else ["test", "val", "train"]
        predictor.write(
            folder, {split: datasets[split] for split in splits},
            lambda: model if model is not None else build(data.patch_size, folder), [folder, *weights],
        )  # fmt: skip
        print_next_step(args, folder)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()  # so that a launcher sees a clean end


def tokenized_splits(args: argparse.Namespace, data: Any, tokenizer: Any) -> dict[str, Any]:
    """`RationaleDataset` of every split that this launch reads; rationale files are checked for all of them."""
    from utils_data import RationaleDataset, read_le

    wanted = {"test"} if args.evaluate_dir else {"test", "train"} if args.final_eval else {"test", "train", "val"}
    if not args.prompt_format.endswith("-A"):  # predictions of all three are written
        wanted = {"test", "train", "val"}
    datasets = {}
    for split, flag in (("train", "train_le"), ("val", "eval_le"), ("test", "test_le")):
        path = getattr(args, flag)
        rationales = read_le(path, data.qids[split], f"--{flag}") if path else None
        if split in wanted:
            datasets[split] = RationaleDataset(data.problems, data.qids[split], tokenizer, args, rationales)
    return datasets


def print_next_step(args: argparse.Namespace, folder: Path) -> None:
    """The command of the stage that follows this one."""
    if args.prompt_format.endswith("-A"):
        command = ["python", "tools/results.py", "--system", f"answers={folder}", "--data_root", args.data_root]
        command += ["--dataset", args.dataset] if args.dataset else []
    elif args.evaluate_dir:
        command = ["python", "preprocessing_after_RL/remove_sentence.py", "--file_path",
                   folder / "predictions_ans_train.json", "--tokenizer", args.tokenizer or folder]  # fmt: skip
    else:
        command = [
            "accelerate", "launch", "run_mm_cot_lora.py", *launch.data_words(args), "--model", folder,
            "--correction", "False", "--prompt_format", "QCM-A", "--bs", "16", "--epoch", "20", "--lr", "8e-5",
            "--output_len", "64", "--lora_r", "64", "--lora_alpha", "128", "--lora_dropout", "0.05", "--use_generate",
            "--final_eval", "--eval_le", folder / "predictions_ans_eval.json",
            "--test_le", folder / "predictions_ans_test.json",
        ]  # fmt: skip
    launch.next_step(command)


# -- the run folder --------------------------------------------------------------------------------------


def run_settings(args: argparse.Namespace, data: Any, datasets: dict[str, Any], predictor: Any) -> dict[str, Any]:
    """The content of args.yaml: every flag as resolved, the number of processes, digests of what is read."""
    from sft.predict import digest, tokenizer_digest

    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {"processes": cli.world_size(), "img_shape": list(data.patch_size) if data.patch_size else None}
    for name, split in (("train", "train"), ("eval", "val")):
        there = split in datasets
        settings[f"{name}_data"] = digest(datasets[split]) if there else None
        settings[f"{name}_features"] = predictor.features_digest(data.qids[split]) if there else None
    return {**settings, "tokenizer_pieces": tokenizer_digest(predictor.tokenizer)}


def open_run(folder: Path, settings: dict[str, Any], overwrite: bool) -> str | None:
    """Make `folder` this run's, or recognise it as such.

    Returns "done" for a finished training, the newest complete checkpoint's path, or None for a fresh start. Removes
    checkpoints that a kill left incomplete. Raises UserError if `folder` holds something else, or the same run with
    other flags. On rank 0 only.
    """
    from sft.trainer import COMPLETE, METRICS, checkpoint_folders

    recorded = folder / "args.yaml"
    if recorded.exists() and overwrite:
        _clear(folder)
    elif recorded.exists():
        if changed := changed_settings(files.read_yaml(recorded, "--run_dir"), settings):
            fix = "go back to these, name another --run_dir, or start anew with --overwrite"
            raise UserError(f"{folder} holds a run with other flags: {', '.join(changed)}; {fix}")
    elif any((folder / name).exists() for name in ("config.json", "adapter_config.json", METRICS)):
        raise UserError(f"--run_dir: {folder} holds a model that this command did not write; name another folder")
    if (folder / METRICS).exists():
        return "done"
    files.write_args(folder, argparse.Namespace(**settings))
    for path in checkpoint_folders(folder):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    return newest_undamaged(checkpoint_folders(folder))


def newest_undamaged(checkpoints: Sequence[Path]) -> str | None:
    """The last of `checkpoints` that is not damaged; None if there are none. Raises UserError if all are damaged."""
    from ares.checkpoints import refuse_damaged

    fault = None
    for path in reversed(checkpoints):
        try:
            files.refuse_unfit(path / "trainer_state.json", "--run_dir")
            refuse_damaged(path, "--run_dir")
            return str(path)
        except UserError as error:
            fault = error
            warn0(f"{error}; looking for an older checkpoint")
    if fault is not None:
        raise UserError(f"{fault}; all checkpoints are damaged: remove them to train from the beginning")
    return None


def _clear(folder: Path) -> None:
    """Remove what an earlier run left: only called on a folder with our args.yaml, and only on our own names."""
    from sft.trainer import METRICS, checkpoint_folders

    (folder / METRICS).unlink(missing_ok=True)  # first: a kill in here must not leave a run that looks finished
    for path in [*checkpoint_folders(folder), *folder.glob(".saving"), *folder.glob(".predicting_*")]:
        shutil.rmtree(path)
    written = ("predictions_ans_*.json", "*.safetensors", "config.json", "adapter_config.json", "trainer_state.json")
    for path in [path for pattern in written for path in folder.glob(pattern)]:
        path.unlink()


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences between two `run_settings` that would mix two experiments, as `--flag new (was old)`."""
    final = new["final_eval"] and old.get("final_eval")
    may_change = {"free", "evaluation"} if final else {"free"}
    differs = {name: SETTINGS.get(name, []) for name in new if old.get(name) != new[name]}
    differs = {name: meanings for name, meanings in differs.items() if not may_change & {*meanings}}
    data_changed = [differs.pop(name) for name in ("train_data", "eval_data") if name in differs]
    contents = [text for kind, text in CONTENTS.items() if any(kind in differs[name] for name in differs.keys() & old)]
    changed = [
        f"--{name} {new[name]} (was {old.get(name)})"
        for name, meanings in sorted(differs.items())
        if not CONTENTS.keys() & set(meanings) and (data_changed or "path" not in meanings)
    ]
    sizes = [old.get("bs", 0), old.get("processes", 1)]
    batch, old_batch = new["bs"] * new["processes"], sizes[0] * sizes[1] if {*map(type, sizes)} == {int} else sizes
    if batch != old_batch:
        changed.append(f"--bs x processes {batch} (was {old_batch})")
    if data_changed and not changed:
        what = "(prompts or targets are not those of the earlier launch)"
        changed.append(f"the files under --data_root, --caption_file or --correction_file {what}")
    return changed + contents
