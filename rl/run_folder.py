"""The run folder of RL: its name, which experiment it belongs to, and what a killed or finished round leaves in it.

    {run}/args.yaml, metrics.jsonl, tensorboard/
    {run}/{n}/                  a finished round: policy, tokenizer, value function, optimizer (written in one step)
    {run}/rollouts/round_{n}/   its samples and scores (rl/rollouts.py)
    {run}/samples_round_{n}.jsonl   the same to read: prompt, rationale, sentences with score and advantage
    {run}/questions/            the round the Teacher works on;  questions_round{n}/ once it is finished
    {run}/state/                PPO's saved state in two alternating slots (rl/trainer.py)

Needs no torch. Takes run_mm_cot_rl.py's flags as a namespace.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ares import cli, files
from ares.cli import UserError, print0
from rl.flags import invalidating
from teacher import handoff

SAMPLING_FILE, PPO_FILE = "flags_sampling.json", "flags_ppo.json"  # what made a round, beside its rollouts
FAILED = "failed.txt"  # also there: why a process ended while others wait for its files
EXPORTED = "exported_p"  # and, with the process's rank, that what it exported is flushed to disk

# Contents of files that the rollouts depend on, recorded with the flags, and the text of a refusal.
CONTENTS = {
    "features": "--vision_features or --name_map: the features are not those it was begun with",
    "tokenizer_pieces": "--tokenizer: its pieces are not those it was begun with",
}


def run_name(args: argparse.Namespace) -> str:
    """The run folder's name, as the released code builds it; shortened with a hash if it is too long."""
    reference = ("ref" if args.ref_model else "no_ref") + ("" if args.algo == "ppo" else f"_{args.algo}")
    return files.short_name(
        f"{args.model_type}_neutral{args.neutral_score}_k{args.k_actions}_rlb{args.rl_batch_size}"
        f"_cl{args.clip_range}_rle{args.rl_epochs}_lr{args.lr}_vlr{args.vf_coef}_g{args.gamma}_l{args.gae_lambda}"
        f"_f{args.feedback}_seed{args.seed}_kl{args.init_kl_coef}_ga{args.ga_step}_dosample{args.do_sample}"
        f"_adv{args.adv_normalization}_tk{args.top_k}_{reference}"
    )


def run_folder(args: argparse.Namespace) -> Path:
    """`--run_dir`, else the run that is continued, else RL_models/{run_name}."""
    if args.run_dir:
        return Path(args.run_dir)
    if args.continue_train:
        return Path(args.base_model_dir).resolve().parent
    return Path("RL_models") / run_name(args).replace("/", "-")


def first_round(args: argparse.Namespace) -> int:
    """0, or the one after the round folder that is continued."""
    return int(Path(args.base_model_dir).resolve().name) + 1 if args.continue_train else 0


def reference_folder(args: argparse.Namespace) -> str:
    """`--ref_model`, else the reference of the run that is continued, else the starting model."""
    if args.ref_model:
        return args.ref_model
    recorded = Path(args.base_model_dir) / "args.yaml"
    if not (args.continue_train and recorded.exists()):
        return args.base_model_dir
    folder = str(files.read_yaml(recorded, "--base_model_dir").get("reference", args.base_model_dir))
    if not Path(folder).is_dir():
        raise UserError(
            f"--ref_model: {recorded} names the reference {folder}, which is gone; name it with --ref_model"
        )
    return folder


def claim(args: argparse.Namespace, folder: Path, start: int) -> None:
    """Prepare the run folder (rank 0): clean up after a kill, compare the flags with the recorded ones, record them.

    Raises UserError naming each flag that would mix two experiments in one folder.
    """
    for place in (folder, folder / "state", *folder.glob("rollouts/round_*")):
        sweep(place)
    if not handoff.exported(folder / "questions"):  # after that the Teacher's tools may be writing there
        for place in actions_in(folder / "questions"):
            sweep(place, "**/")
        sweep(folder / "questions")
    if args.overwrite:
        move_aside(args, folder, start)
    begun = any((folder / "state").glob("slot_*"))
    for number in range(start, start + args.epochs):
        place = folder / "rollouts" / f"round_{number}"
        for left in (place / FAILED, *place.glob(f"{EXPORTED}*")):  # by an earlier launch
            left.unlink(missing_ok=True)
        if not finished(folder, number):
            if (folder / str(number)).exists():
                raise UserError(
                    f"--run_dir: {folder / str(number)} was not written by this version (it has no args.yaml) and "
                    "would be replaced; name another --run_dir, or have it moved aside with --overwrite"
                )
            reopen(place)
        refuse_changes(place / SAMPLING_FILE, sampling_identity(args, folder, number))
        if begun or finished(folder, number):
            refuse_changes(place / PPO_FILE, ppo_identity(args))
    tidy(folder, start + args.epochs)
    files.write_args(folder, args)


def actions_in(questions: Path) -> list[Path]:
    """The folders of sampled rationales. A Teacher client that started before RL has others there (`teacher/`)."""
    return [path for path in questions.glob("[0-9]*") if path.name.isdigit()]


def holds_export(questions: Path) -> bool:
    """Whether RL has exported rationales there, or begun to."""
    return handoff.exported(questions) or bool(actions_in(questions))


def sweep(place: Path, below: str = "") -> None:
    """Delete temporary files of a killed launch in a folder (`below` "**/": at any depth)."""
    for leftover in (*place.glob(f"{below}.tmp-*"), *place.glob(f"{below}.old-*")):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def sampling_identity(args: argparse.Namespace, folder: Path, number: int) -> dict[str, Any]:
    """The settings that a round's rollouts depend on."""
    start = args.base_model_dir if number == first_round(args) else folder / str(number - 1)
    models = {"base_model_dir": str(Path(start).resolve()), "ref_model": str(Path(args.reference).resolve())}
    flags = {key: getattr(args, key) for key in invalidating("rollouts")}
    return flags | models | {key: vars(args).get(key) for key in CONTENTS}


def ppo_identity(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that a round's updates depend on."""
    return {key: getattr(args, key) for key in invalidating("updates")}


def refuse_changes(known: Path, now: dict[str, Any]) -> None:
    """Raise UserError naming the flags that differ from those in the file `known`, if it is there."""
    if not known.exists():
        return
    before = files.read_json(known, "--run_dir", dict)
    if before.get("precision") == "auto":  # earlier versions recorded the flag, not the resolved precision
        del before["precision"]
    # only recorded keys are compared: earlier versions recorded fewer
    differs = [key for key in now if key in before and before[key] != now[key]]
    changed = [CONTENTS.get(key) or f"--{key} was {str(before[key])[:200]}, is {now[key]}" for key in differs]
    if changed:
        raise UserError(
            f"{known.parent} belongs to another experiment ({'; '.join(changed)}); give the old values back, "
            "name another --run_dir, or start anew with --overwrite"
        )


def reopen(place: Path) -> None:
    """If batches of a collected round are gone, mark it as not collected, so that they are sampled again."""
    collected = place / "collected.json"
    if collected.exists():
        missing = collected_batches(collected) - len(list(place.glob("batch_*.safetensors")))
        if missing > 0:
            cli.warn0(f"{place}: {missing} of its batches are gone and sampled again")
            (place / "scores.json").unlink(missing_ok=True)  # read again: tokens may differ on a GPU
            collected.unlink()


def collected_batches(path: Path) -> int:
    """The number of batches that a round's `collected.json` says. Raises UserError naming a damaged one."""
    count = files.read_json(path, "--run_dir", dict).get("batches")
    if type(count) is not int or count < 0:
        raise UserError(f"--run_dir: {path} says no number of batches; delete it, then run the same command again")
    return count


def move_aside(args: argparse.Namespace, folder: Path, start: int) -> None:
    """--overwrite: move the files of rounds `start` and later to a subfolder. Nothing is deleted: replies cost money.

    Raises UserError if they include a model that the new run needs.
    """
    patterns = ("[0-9]*", "questions_round[0-9]*", "rollouts/round_[0-9]*", "samples_round_[0-9]*.jsonl")
    of_rounds = [path for pattern in patterns for path in folder.glob(pattern)]
    found = [path for path in of_rounds if int(re.sub(r"\D", "", path.name)) >= start]
    names = ("questions", "state") if start else ("questions", "state", "tensorboard", "wandb", "metrics.jsonl")
    found += [folder / name for name in names if (folder / name).exists()]
    for flag, model in (("base_model_dir", args.base_model_dir), ("ref_model", args.reference)):
        if any(Path(model).resolve().is_relative_to(path.resolve()) for path in found):
            raise UserError(f"--overwrite would move --{flag} {model} aside; name another --run_dir for the new run")
    if found:
        aside = folder / time.strftime("overwritten_%Y%m%d_%H%M%S")
        for path in found:
            target = aside / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        print0(f"--overwrite: the earlier run was moved to {aside}")


def tidy(folder: Path, end: int) -> None:
    """Complete the end of finished rounds below `end`: rename their questions folder, delete the PPO state."""
    for number in range(end):
        kept, following = folder / f"questions_round{number}", folder / "rollouts" / f"round_{number + 1}"
        if finished(folder, number) and not following.exists() and not kept.exists():
            shutil.rmtree(folder / "state", ignore_errors=True)  # first: a kill in between is seen by `kept`
            if (folder / "questions").exists():
                for place in actions_in(folder / "questions"):
                    sweep(place, "**/")
                os.replace(folder / "questions", kept)


def kl_coefficient(args: argparse.Namespace, start: Path, first: bool, kl: float) -> float:
    """The KL coefficient of a round whose rationales are on average `kl` nats from the reference.

    `--init_kl_coef`, unless `--target_kl` is given: then, from the second round on, the coefficient of the round
    before (recorded in `start`/args.yaml), doubled or halved where `kl` is 1.5 times above or below the target
    (Schulman et al., arXiv 1707.06347, sec. 4). The first round's rationales come from a model that RL has not moved.
    """
    if args.target_kl is None or first:
        return args.init_kl_coef
    recorded = files.read_yaml(start / "args.yaml", "--run_dir").get("kl_coef", args.init_kl_coef)
    if not isinstance(recorded, (int, float)) or not math.isfinite(recorded):
        raise UserError(f"--run_dir: {start / 'args.yaml'}: kl_coef is {repr(recorded)[:60]}, no number")
    factor = 2.0 if kl > 1.5 * args.target_kl else 0.5 if kl < args.target_kl / 1.5 else 1.0
    return recorded * factor


def finished(folder: Path, number: int) -> bool:
    """Whether a round's checkpoint exists (it is written in one step)."""
    return (folder / str(number) / "args.yaml").exists()


def next_commands(args: argparse.Namespace, folder: Path, argv: Sequence[str]) -> list[list[Any]]:
    """The commands to run after --phase collect."""
    questions = folder / "questions"
    names = [name for name in ("data_root", "dataset", "images") if getattr(args, name)]
    data = [word for name in names for word in (f"--{name}", getattr(args, name))]
    again = [word for i, word in enumerate(argv) if word != "--phase" and (i == 0 or argv[i - 1] != "--phase")]
    again = [word for word in again if not word.startswith("--phase=") and word != "--overwrite"]
    return [
        ["bash", "preprocessing_after_RL/processing_sentence_level_feedback.sh", "--questions_dir", questions, *data],
        ["python", "haiku.py", "--questions_dir", questions, *data],
        ["accelerate", "launch", "run_mm_cot_rl.py", *again, "--phase", "train"],
    ]
