"""Is everything there that a run needs? One line per check, before hours or money are spent.

    python tools/doctor.py --data_root data  # questions, splits, images, machine
    python tools/doctor.py --data_root data --img_type vit --model models/mm-cot-base-rationale --use_caption
    python tools/doctor.py --data_root aokvqa_data --correction_file aokvqa/correction.json

`ok`: fine. `info`: for your information. `warn`: runs, but perhaps not as you think. `FAIL`: a stage would
stop there, or train on rubbish; the line names the file, the question and the fix. Exit status 0 when nothing fails,
1 when something would, 2 for wrong flags.

The checks are the functions that the stage scripts call themselves, on the flags that they take; only here is every
image decoded and every feature row read. Changes nothing. Leaves out: what a run folder holds (the stages check it).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares import cli, data_folder, images
from ares.cli import IMG_TYPES, Stop, UserError, print0, run, warn0
from teacher import claude
from teacher.claude import KEY
from teacher.handoff import images_of_questions

PUBLIC = {
    "scienceqa": "12,726 train (6,218 with an image), 4,241 val (2,097), 4,241 test (2,017); 11,208 feature rows",
    "aokvqa": "17,056 train, 1,145 val (which serves as test), each with an image",
}
TESTS_ONLY = "# tests and lint"  # what follows this line of requirements.txt is not needed to run anything
# bytes per parameter, all in fp32: weights, gradients and AdamW's two moments; RL trains policy and value function
SFT_MEMORY, RL_MEMORY = 16, 32
RL_DISK = 72  # two save slots and the round's folder, each with two models, their weights and moments
GB = 1e9
Splits = Mapping[str, Sequence[str]]  # name -> qids
SHOWN = 5  # faults of one check that its line names


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    data = cli.add_data_flags(parser)
    data.add_argument("--caption_file", default=data_folder.CAPTION_DEFAULT, help="captions, {qid: text}")
    data.add_argument("--use_caption", action="store_true", help="captions are needed (default: told if there)")
    data.add_argument("--img_type", choices=IMG_TYPES, help="vision features to check (none: text only)")
    data.add_argument("--vision_features", help="folder of feature files (default: {data_root}/vision_features)")
    data.add_argument("--name_map", help="qid -> feature row (default: beside the features, then in --data_root)")
    data.add_argument("--train_split", default="train", help="split to train on")
    data.add_argument("--val_split", default="val", help="split to evaluate on")
    data.add_argument("--test_split", default="test", help="split to test on")
    data.add_argument("--correction_file", metavar="FILE", help="corrected rationales, in --data_root or a path")
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="DIR", help="checkpoint to check, against --img_type and its tokenizer")
    model.add_argument("--tokenizer", metavar="DIR", help="tokenizer (default: the checkpoint's own)")
    parser.add_argument("--strict", action="store_true", help="a named image that is absent counts as a fault")
    args = parser.parse_args(argv)
    from utils_data import data_flag_faults  # imports torch: after argparse has had its say

    idle = ["--tokenizer: no effect without --model"] if args.tokenizer and not args.model else []
    cli.refuse(data_flag_faults(args) + idle)
    return args


# -- the report ------------------------------------------------------------------------------------------


class _Warnings(io.TextIOBase):
    """Standard error during a check: keeps what `warn0` says, lets progress bars through."""

    def __init__(self, real: Any):
        self.real, self.lines, self.taken = real, [], False

    def write(self, text: str) -> int:
        if text.startswith("warning: "):
            self.lines.append(text.removeprefix("warning: "))
            self.taken = True
        elif not (self.taken and text == "\n"):
            self.taken = False
            self.real.write(text)
        return len(text)

    def isatty(self) -> bool:
        return self.real.isatty()


class Report:
    """Runs checks and prints a line for each."""

    def __init__(self) -> None:
        self.counts = {"ok": 0, "info": 0, "warn": 0, "FAIL": 0}

    def line(self, status: str, name: str, text: str) -> None:
        self.counts[status] += 1
        print0(f"{status:4}  {name:10}  {text}")

    def check(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """The first of what `function` returns, (value, text for the line); None where it raised UserError."""
        notes, warnings = io.StringIO(), _Warnings(sys.stderr)
        try:
            with contextlib.redirect_stdout(notes), contextlib.redirect_stderr(warnings):
                value, text = function(*args)
        except UserError as error:
            self.line("FAIL", name, str(error))
            return None
        told = [line.removeprefix("note: ") for line in notes.getvalue().splitlines() if line.startswith("note: ")]
        self.line("warn" if warnings.lines else "ok", name, "; ".join([text, *told, *warnings.lines]))
        return value


class Faults(contextlib.AbstractContextManager):
    """UserErrors of one check, raised as one at its end: nobody shall mend faults one run at a time.

    >>> with Faults() as faults:
    ...     for part in parts:
    ...         with faults.kept():
    ...             check(part)
    """

    def __init__(self) -> None:
        self.texts: list[str] = []

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.texts.append(str(error))

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None and self.texts:
            more = f" (and {len(self.texts) - SHOWN} more)" if len(self.texts) > SHOWN else ""
            raise UserError("; ".join(self.texts[:SHOWN]) + more)


# -- the machine -----------------------------------------------------------------------------------------


def packages(requirements: str) -> tuple[None, str]:
    """Every requirement installed, in its range. Raises UserError naming those that are not."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    wanted = [line.strip() for line in requirements.partition(TESTS_ONLY)[0].splitlines()]
    faults, found = [], []
    for requirement in [Requirement(line) for line in wanted if line and not line.startswith("#")]:
        try:
            have = version(requirement.name)
        except PackageNotFoundError:
            faults.append(f"{requirement} is not installed")
            continue
        found.append(f"{requirement.name} {have}")
        if not requirement.specifier.contains(have, prereleases=True):
            faults.append(f"{requirement} is needed, {have} is installed")
    if faults:
        raise UserError(f"{'; '.join(faults)}: pip install -r requirements.txt")
    shown = [text for text in found if text.split()[0] in ("torch", "transformers", "accelerate", "peft", "timm")]
    return None, f"Python {sys.version.split()[0]}, {', '.join(shown)}, {len(found) - len(shown)} more"


def devices(parameters: int | None) -> tuple[None, str]:
    """GPUs and their free memory, against what training `parameters` takes at the least."""
    import torch

    if not torch.cuda.is_available():
        warn0("no GPU that torch can use: training and extraction run on the CPU")
        return None, f"{os.cpu_count()} CPU cores"
    told = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        told.append(f"GPU {number} {torch.cuda.get_device_name(number)}: {free / GB:.1f} of {total / GB:.1f} GB free")
        if parameters and free < RL_MEMORY * parameters:
            warn0(memory_told(number, free, parameters))
    return None, "; ".join(told)


def memory_told(number: int, free: int, parameters: int) -> str:
    """Why a GPU's free memory is too little for training. Raises UserError where even SFT's weights do not fit."""
    sft, rl = SFT_MEMORY * parameters / GB, RL_MEMORY * parameters / GB
    text = (
        f"GPU {number} has {free / GB:.1f} GB free; weights, gradients and AdamW alone take {sft:.1f} GB in SFT and "
        f"{rl:.1f} GB in RL (docs/rl.md)"
    )
    if free < SFT_MEMORY * parameters:
        raise UserError(f"{text}: end what else runs on it, or take a smaller model")
    return text


def disk(parameters: int | None) -> tuple[None, str]:
    """Free space here, where runs are written by default, against what RL keeps."""
    free = shutil.disk_usage(".").free
    need = RL_DISK * parameters if parameters else GB
    if free < need:
        raise UserError(
            f"{Path.cwd()}: {free / GB:.1f} GB free, a run may take {need / GB:.1f} GB (saved states, rounds); make "
            "room, or put the run elsewhere (--run_dir)"
        )
    return None, f"{free / GB:.1f} GB free in {Path.cwd()}, a run takes up to {need / GB:.1f} GB"


def api_key() -> tuple[None, str]:
    """Whether a key for the Teacher is there; it is never shown. One that cannot be a key fails, as do proxy and
    certificate settings that its client cannot use."""
    try:
        claude.api_key()
    except UserError as error:
        if os.environ.get(KEY, "").strip():
            raise
        warn0(str(error))
        return None, "no key"
    claude.check_network()
    return None, f"{KEY} is set"


# -- the data --------------------------------------------------------------------------------------------


def questions(args: argparse.Namespace) -> tuple[tuple[str, data_folder.Problems], str]:
    dataset = data_folder.find_dataset(args.data_root, args.dataset)
    found = data_folder.load_problems(args.data_root, dataset)
    return (dataset, found), f"{Path(args.data_root) / dataset / 'problems.json'}: {len(found)} questions"


def splits(args: argparse.Namespace, dataset: str, found: data_folder.Problems) -> tuple[dict[str, list[str]], str]:
    everything = data_folder.load_splits(args.data_root, dataset, found)
    names = {role: getattr(args, f"{role}_split") for role in ("train", "val", "test")}
    with Faults() as faults:
        for role, name in names.items():
            with faults.kept():
                data_folder.split_qids(everything, name, f"--{role}_split")
    qids = {role: data_folder.split_qids(everything, name, f"--{role}_split") for role, name in names.items()}
    data_folder.check_overlap(everything, names["train"], [names["val"], names["test"]])
    left = len(found.keys() - {qid for part in everything.values() for qid in part})
    rest = f"; {left} questions are in no split" if left else ""
    return qids, ", ".join(f"{len(qids[role])} {names[role]}" for role in qids) + rest


def pictures(args: argparse.Namespace, found: data_folder.Problems, qids: Sequence[str]) -> tuple[None, str]:
    """Every image that the Teacher would be sent is there and decodes."""
    named = images_of_questions(args, found, qids)
    with Faults() as faults:
        faults.texts += images.broken_images(named)
    shown = [paths for paths in named.values() if paths]
    return None, f"{sum(map(len, shown))} images of {len(shown)} questions decode"


def captions(args: argparse.Namespace, found: data_folder.Problems, splits: Splits) -> tuple[None, str]:
    try:
        path = data_folder.find_captions(args)
    except UserError:
        if args.use_caption or args.caption_file != data_folder.CAPTION_DEFAULT:
            raise
        return None, "none (needed with --use_caption only)"
    data = data_folder.load_captions(path)
    data_folder.check_captions(path, data, found, splits)
    return None, f"{path}: {len(data)} captions"


def features(args: argparse.Namespace, found: data_folder.Problems, splits: Splits) -> tuple[Any, str]:
    """The feature file fits its name map and every split that a stage reads, and every number in it is finite."""
    import utils_data

    opened = utils_data.open_features(args)
    with Faults() as faults:
        with faults.kept():
            utils_data.check_coverage(opened, found, splits)
        with cli.progress(desc="read features", total=opened.rows, unit="row") as bar:
            for start in range(0, opened.rows, 64):
                part = range(start, min(start + 64, opened.rows))
                with faults.kept():
                    opened.check_finite(part)
                bar.update(len(part))
    return opened, f"{opened.path}: {opened.rows} rows of {opened.shape}, all finite"


def correction(args: argparse.Namespace, found: data_folder.Problems, train: Sequence[str]) -> tuple[None, str]:
    path = data_folder.find_correction(args)
    corrected = data_folder.read_correction(path, found, train)
    same = sum(corrected[qid] == found[qid]["solution"] for qid in train)
    return None, f"{path}: {len(corrected)} train solutions, {len(corrected) - same} of them other than the gold ones"


# -- the model -------------------------------------------------------------------------------------------


def checkpoint(args: argparse.Namespace, patch_size: tuple[int, int] | None) -> tuple[Any, str]:
    from model import check_checkpoint, read_checkpoint

    if args.img_type and patch_size is None and Path(args.model).is_dir():  # its features failed: that is told above
        info = read_checkpoint(Path(args.model), "--model")
    else:
        info = check_checkpoint(args.model, patch_size, args.img_type)
    if info is None:  # no folder, and it may be a hub id
        return None, hub_model(args.model)
    if patch_size is not None and info.patch_size is None:
        warn0(f"{args.model} has no image layers: main.py trains fresh ones, RL and LoRA need a trained model")
    value = ", with a value function" if info.has_value_function else ""
    return info, f"{args.model}: {parameters_of(info) / 1e6:.1f} M parameters, features {info.patch_size}{value}"


def hub_model(name: str) -> str:
    """Where a stage would get this model from: the local cache, or the hub. Raises UserError if from neither."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    from vision.networks import hub_failure, offline_unless_reachable

    try:
        hf_hub_download(name, "config.json", local_files_only=True)
        return f"{name} is in the cache of the hub: its weights are checked when they are loaded"
    except (OSError, ValueError):  # not cached, or no name that the hub could have
        pass
    try:
        offline_unless_reachable()
        if constants.HF_HUB_OFFLINE:
            raise OSError("offline")
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except Exception as error:  # the hub's, the HTTP library's and the system's own
        raise UserError(
            f"--model: {name} is no folder here, and no such model can be had from the hub ({hub_failure(error)}); "
            "name the folder of a model"
        ) from error
    return f"{name} is a model of the hub: its weights are checked when they are loaded"


def parameters_of(info: Any) -> int | None:
    """Number of parameters, from the headers of the weights."""
    import math

    return sum(math.prod(shape) for shape in info.shapes.values()) if info is not None else None


def tokenizer(args: argparse.Namespace, info: Any) -> tuple[None, str]:
    import utils_data

    loaded = utils_data.load_tokenizer(args, args.model)
    utils_data.check_vocabulary(loaded, info)
    return None, f"{loaded.name_or_path}: {len(loaded)} pieces"


# -- all together ----------------------------------------------------------------------------------------


def check_data(report: Report, args: argparse.Namespace) -> tuple[int, int] | None:
    """The data folder's checks; returns the features' patch size, None without any."""
    read = report.check("questions", questions, args)
    if read is None and not Path(args.data_root).is_dir():
        return None
    dataset, found = read or (None, {})
    # without questions the other files are still read, against none
    qids = (report.check("splits", splits, args, dataset, found) if read else None) or {}
    used = list(dict.fromkeys(qid for part in qids.values() for qid in part)) or list(found)
    by_split = {getattr(args, f"{role}_split"): part for role, part in qids.items()} or {"(all questions)": used}
    if read:
        count_told(report, dataset, found, qids)
        report.check("images", pictures, args, found, used)
    report.check("captions", captions, args, found, by_split)
    if args.correction_file:
        report.check("correction", correction, args, found, qids.get("train", used))
    if args.img_type is None:
        return None
    opened = report.check("features", features, args, found, by_split)
    return opened.shape if opened is not None else None


def count_told(report: Report, dataset: str, found: Mapping[str, Any], qids: Mapping[str, Sequence[str]]) -> None:
    """How many questions and images there are, beside the published data set's."""
    here = [f"{len(part)} {role} ({sum(bool(found[qid]['image']) for qid in part)} with an image)"
            for role, part in qids.items()]  # fmt: skip
    report.line("info", "counts", f"here {', '.join(here)}; {dataset} as published: {PUBLIC.get(dataset, 'unknown')}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    report = Report()
    report.check(
        "packages", packages, (Path(__file__).resolve().parents[1] / "requirements.txt").read_text(encoding="utf-8")
    )
    patch_size = check_data(report, args)
    info = None
    if args.model:
        info = report.check("model", checkpoint, args, patch_size)
        report.check("tokenizer", tokenizer, args, info)
    report.check("devices", devices, parameters_of(info))
    report.check("disk", disk, parameters_of(info))
    report.check("api key", api_key)
    if report.counts["FAIL"]:
        raise Stop(f"{report.counts['FAIL']} checks failed; each FAIL line above names the fix", 1)
    print0(f"sound: {report.counts['ok']} checks passed, {report.counts['warn']} with a warning")


if __name__ == "__main__":
    run(main)
