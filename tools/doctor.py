"""Checks everything that a run needs, one line per check, before hours or money are spent.

    python tools/doctor.py --data_root data  # questions, splits, images, machine
    python tools/doctor.py --data_root data --img_type vit --model models/mm-cot-base-rationale --use_caption
    python tools/doctor.py --data_root aokvqa_data --correction_file aokvqa/correction.json

`ok`: fine. `info`: a figure to compare. `warn`: a stage runs, but perhaps not as you expect. `FAIL`: a stage would
stop, or train on wrong data; the line names the file, the question and the fix. Exit status 0 without any FAIL, 1
with one, 2 for wrong flags.

The checks are the functions that the stage scripts call, on the same flags; but here every image is decoded and every
feature row read. Nothing is changed, and no run folder is read: the stages check theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares import cli, data_folder
from ares.cli import Stop, UserError, print0, run, warn0
from ares.data_folder import DataFolder
from ares.images import broken_images
from teacher.claude import ClaudeTeacher
from teacher.handoff import images_of_questions

PUBLIC = {
    "scienceqa": "12,726 train (6,218 with an image), 4,241 val (2,097), 4,241 test (2,017); 11,208 feature rows",
    "aokvqa": "17,056 train, 1,145 val (which serves as test), each with an image",
}
TESTS_ONLY = "# tests and lint"  # what follows this line of requirements.txt is not needed for a run
# bytes per parameter, all in fp32: weights, gradients and AdamW's two moments; RL trains policy and value function
SFT_MEMORY, RL_MEMORY = 16, 32
RL_DISK = 72  # two save slots and the round's folder, each with two models, their weights and moments
GB = 1e9
ROLES = ("train", "val", "test")
FEATURE_ROWS = 64  # rows that are read at a time
MOST_FAULTS = 5  # that the line of one check names
Splits = Mapping[str, Sequence[str]]  # name -> question ids


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    data = cli.add_prompt_data_flags(parser)
    for role, use in (("train", "train"), ("val", "evaluate"), ("test", "test")):
        data.add_argument(f"--{role}_split", default=role, help=f"split to {use} on")
    data.add_argument("--correction_file", metavar="FILE", help="corrected rationales, in --data_root or a path")
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="DIR", help="checkpoint to check, against --img_type and its tokenizer")
    model.add_argument("--tokenizer", metavar="DIR", help="tokenizer (default: the checkpoint's own)")
    parser.add_argument("--strict", action="store_true", help="a named image that is absent counts as a fault")
    args = parser.parse_args(argv)
    from utils_data import data_flag_faults  # imports torch: only once the flags are parsed

    idle = ["--tokenizer: no effect without --model"] if args.tokenizer and not args.model else []
    cli.refuse(data_flag_faults(args) + idle)
    return args


# -- the report ------------------------------------------------------------------------------------------


class WarningFilter(io.TextIOBase):
    """Stands in for standard error: keeps the lines of `warn0` in `lines`, passes progress bars on."""

    def __init__(self, stream: Any):
        self.stream, self.lines, self.in_warning = stream, [], False

    def write(self, text: str) -> int:
        if text.startswith("warning: "):
            self.lines.append(text.removeprefix("warning: "))
            self.in_warning = True
        elif not (self.in_warning and text == "\n"):  # print writes a line's end by itself
            self.in_warning = False
            self.stream.write(text)
        return len(text)

    def isatty(self) -> bool:
        return self.stream.isatty()


class Report:
    """Runs checks, prints a line for each, and counts the results."""

    def __init__(self) -> None:
        self.counts = {"ok": 0, "info": 0, "warn": 0, "FAIL": 0}

    def line(self, status: str, name: str, text: str) -> None:
        self.counts[status] += 1
        print0(f"{status:4}  {name:10}  {text}")

    def check(self, name: str, function: Callable[..., tuple[Any, str]], *args: Any) -> Any:
        """Call `function`, which returns (value, text of the line), and return the value; None after a UserError."""
        output, warnings = io.StringIO(), WarningFilter(sys.stderr)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(warnings):
                value, text = function(*args)
        except UserError as error:
            self.line("FAIL", name, str(error))
            return None
        notes = [line.removeprefix("note: ") for line in output.getvalue().splitlines() if line.startswith("note: ")]
        self.line("warn" if warnings.lines else "ok", name, "; ".join([text, *notes, *warnings.lines]))
        return value


def results_of(calls: Iterable[Callable[[], Any]]) -> list[Any]:
    """Make all calls and return what they return. Raises one UserError for all that failed, once all were made."""
    results, faults = [], []
    for call in calls:
        try:
            results.append(call())
        except UserError as error:
            faults.append(str(error))
    refuse(faults)
    return results


def refuse(faults: Sequence[str]) -> None:
    """Raise a UserError that names the first of `faults` and counts the rest."""
    named = list(faults[:MOST_FAULTS])
    if len(faults) > MOST_FAULTS:
        named[-1] += f" (and {len(faults) - MOST_FAULTS} more)"
    cli.refuse(named)


# -- the machine -----------------------------------------------------------------------------------------


def packages(requirements: str) -> tuple[None, str]:
    """Checks that every requirement is installed in its range. Raises UserError naming those that are not."""
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
    """GPUs and their free memory, compared with what training a model of `parameters` needs at least."""
    import torch

    if not torch.cuda.is_available():
        warn0("no GPU that torch can use: training and extraction run on the CPU")
        return None, f"{os.cpu_count()} CPU cores"
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found.append(f"GPU {number} {torch.cuda.get_device_name(number)}: {free / GB:.1f} of {total / GB:.1f} GB free")
        check_memory(number, free, parameters or 0)
    return None, "; ".join(found)


def check_memory(number: int, free: int, parameters: int) -> None:
    """Warn if a GPU's free memory (bytes) is too little for RL. Raises UserError if it is too little for SFT."""
    sft, rl = SFT_MEMORY * parameters, RL_MEMORY * parameters
    text = (f"GPU {number} has {free / GB:.1f} GB free; weights, gradients and AdamW alone take {sft / GB:.1f} GB in "
            f"SFT and {rl / GB:.1f} GB in RL (docs/rl.md)")  # fmt: skip
    if free < sft:
        raise UserError(f"{text}: end what else runs on it, or take a smaller model")
    if free < rl:
        warn0(text)


def disk(parameters: int | None) -> tuple[None, str]:
    """Free space in the working folder, where runs are written by default, compared with what RL keeps."""
    free = shutil.disk_usage(".").free
    need = RL_DISK * parameters if parameters else GB
    if free < need:
        raise UserError(f"{Path.cwd()}: {free / GB:.1f} GB free, a run may take {need / GB:.1f} GB (saved states, "
                        "rounds); free some space, or put the run elsewhere (--run_dir)")  # fmt: skip
    return None, f"{free / GB:.1f} GB free in {Path.cwd()}, a run takes up to {need / GB:.1f} GB"


def api_key() -> tuple[None, str]:
    """Warns if there is no key for the Teacher. Raises UserError for one that cannot be a key (which is never shown),
    and for proxy and certificate settings that the Teacher's client cannot use."""
    try:
        ClaudeTeacher.find_key()
    except UserError as error:
        if os.environ.get(ClaudeTeacher.key_name, "").strip():
            raise
        warn0(str(error))
        return None, "no key"
    ClaudeTeacher.check_network()
    return None, f"{ClaudeTeacher.key_name} is set"


# -- the data --------------------------------------------------------------------------------------------


def questions(args: argparse.Namespace) -> tuple[DataFolder, str]:
    data = data_folder.read_data_folder(args.data_root, args.dataset)
    return data, f"{data.root / data.dataset / 'problems.json'}: {len(data.problems)} questions"


def splits(args: argparse.Namespace, data: DataFolder) -> tuple[dict[str, list[str]], str]:
    """Role -> question ids of the split that the flag of that role names."""
    names = {role: getattr(args, f"{role}_split") for role in ROLES}
    found = results_of(partial(data.split, name, f"--{role}_split") for role, name in names.items())
    data_folder.check_overlap(data.splits, names["train"], [names["val"], names["test"]])
    text = ", ".join(f"{len(qids)} {name}" for qids, name in zip(found, names.values(), strict=True))
    unused = len(data.problems.keys() - {qid for qids in data.splits.values() for qid in qids})
    return dict(zip(names, found, strict=True)), text + f"; {unused} questions are in no split" * bool(unused)


def pictures(args: argparse.Namespace, problems: data_folder.Problems, qids: Sequence[str]) -> tuple[None, str]:
    """Checks that every image that the Teacher would get exists and decodes."""
    files = images_of_questions(args, problems, qids)
    refuse(broken_images(files))
    with_images = [paths for paths in files.values() if paths]
    return None, f"{sum(map(len, with_images))} images of {len(with_images)} questions decode"


def captions(args: argparse.Namespace, problems: data_folder.Problems, splits: Splits) -> tuple[None, str]:
    try:
        path = data_folder.find_captions(args)
    except UserError:
        if args.use_caption or args.caption_file != cli.CAPTION_DEFAULT:
            raise
        return None, "none (needed with --use_caption only)"
    found = data_folder.load_captions(path)
    data_folder.check_captions(path, found, problems, splits)
    return None, f"{path}: {len(found)} captions"


def features(args: argparse.Namespace, problems: data_folder.Problems, splits: Splits) -> tuple[Any, str]:
    """Checks that the feature file fits its name map and every split, and that every number in it is finite."""
    import utils_data

    opened = utils_data.open_features(args)
    starts = range(0, opened.rows, FEATURE_ROWS)
    rows = [range(start, min(start + FEATURE_ROWS, opened.rows)) for start in starts]
    bar = cli.progress(rows, desc="read features", unit=f"{FEATURE_ROWS} rows")
    coverage = partial(utils_data.check_coverage, opened, problems, splits)
    results_of(itertools.chain([coverage], (partial(opened.check_finite, each) for each in bar)))
    return opened, f"{opened.path}: {opened.rows} rows of {opened.shape}, all finite"


def correction(args: argparse.Namespace, problems: data_folder.Problems, train: Sequence[str]) -> tuple[None, str]:
    path = data_folder.find_correction(args)
    corrected = data_folder.read_correction(path, problems, train)
    changed = sum(corrected[qid] != problems[qid]["solution"] for qid in train)
    return None, f"{path}: {len(corrected)} train solutions, {changed} of them other than the gold ones"


# -- the model -------------------------------------------------------------------------------------------


def checkpoint(args: argparse.Namespace, patch_size: tuple[int, int] | None) -> tuple[Any, str]:
    """(CheckpointInfo with the shapes of all weights; None for a model of the hub)."""
    from model import check_checkpoint, read_checkpoint

    if args.img_type and patch_size is None and Path(args.model).is_dir():  # the features failed: their own line
        info = read_checkpoint(Path(args.model), "--model")
    else:
        info = check_checkpoint(args.model, patch_size, args.img_type)
    if info is None:  # no folder, and it may be a hub id
        return None, hub_model(args.model)
    if patch_size is not None and info.patch_size is None:
        warn0(f"{args.model} has no image layers: main.py trains fresh ones, RL and LoRA need a trained model")
    value = ", with a value function" if info.has_value_function else ""
    return info, f"{args.model}: {parameters_of(info) / 1e6:.1f} M parameters, features {info.patch_size}{value}"


def parameters_of(info: Any) -> int | None:
    """Number of parameters by the headers of the weights; None without a local checkpoint."""
    return sum(map(math.prod, info.shapes.values())) if info is not None else None


def hub_model(name: str) -> str:
    """Says where a stage would get this model: the hub's local cache, or the hub. Raises UserError if from neither."""
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
        raise UserError(f"--model: {name} is no folder here, and no such model can be had from the hub "
                        f"({hub_failure(error)}); name the folder of a model") from error  # fmt: skip
    return f"{name} is a model of the hub: its weights are checked when they are loaded"


def tokenizer(args: argparse.Namespace, info: Any) -> tuple[None, str]:
    import utils_data

    loaded = utils_data.load_tokenizer(args, args.model)
    utils_data.check_vocabulary(loaded, info)
    return None, f"{loaded.name_or_path}: {len(loaded)} pieces"


# -- all together ----------------------------------------------------------------------------------------


def check_data(report: Report, args: argparse.Namespace) -> tuple[int, int] | None:
    """The checks of the data folder; returns the features' (patches, dim), None without features."""
    data = report.check("questions", questions, args)
    if data is None and not Path(args.data_root).is_dir():
        return None
    # if the questions are damaged, the other files are still read, and checked against no question
    problems = data.problems if data else {}
    roles = (data and report.check("splits", splits, args, data)) or {}
    used = list(dict.fromkeys(qid for qids in roles.values() for qid in qids)) or list(problems)
    by_split = {getattr(args, f"{role}_split"): qids for role, qids in roles.items()} or {"(all questions)": used}
    if data:
        here = [f"{len(qids)} {role} ({sum(bool(problems[qid]['image']) for qid in qids)} with an image)"
                for role, qids in roles.items()]  # fmt: skip
        published = PUBLIC.get(data.dataset, "unknown")
        report.line("info", "counts", f"here {', '.join(here)}; {data.dataset} as published: {published}")
        report.check("images", pictures, args, problems, used)
    report.check("captions", captions, args, problems, by_split)
    if args.correction_file:
        report.check("correction", correction, args, problems, roles.get("train", used))
    opened = report.check("features", features, args, problems, by_split) if args.img_type else None
    return opened.shape if opened is not None else None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    report, info = Report(), None
    requirements = Path(__file__).resolve().parents[1] / "requirements.txt"
    report.check("packages", packages, requirements.read_text(encoding="utf-8"))
    patch_size = check_data(report, args)
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
