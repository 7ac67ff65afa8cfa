"""The data folder: finds, reads and checks questions, splits, captions, images, feature files and corrections.

A fault in one of them is one UserError that names the file, the question and the fix, raised before a model is loaded
or money is spent. Any data set in ScienceQA's schema will do. Imports no torch: the Teacher's machine may have none.

    data = read_data_folder("data")  # data/scienceqa/ or data/aokvqa/
    data.problems["1"]["question"], data.split("minitrain", "--train_split")[:3]
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ares.cli import CAPTION_DEFAULT, UserError, print0, warn0
from ares.files import NAME_MAX, read_json

KNOWN_DATASETS = ("scienceqa", "aokvqa")
CAPTION_NAMES = ("captions.json", "instruct_captions.json")
FEATURE_SUFFIXES = (".npy", ".safetensors", ".pth", ".pt")  # fastest to map first
TEXT_FIELDS = ("question", "hint", "lecture", "solution")
MIN_CHOICES, MAX_CHOICES = 2, 5
SPLITS_FORM = "{split: [question ids]}"

Problems = dict[str, dict[str, Any]]  # question id -> fields of ScienceQA's schema

# -- questions and splits --------------------------------------------------------------------------------


@dataclass
class DataFolder:
    """The questions of one data set, and its splits, which are read and checked when they are first needed."""

    root: Path  # --data_root
    dataset: str  # name of the subfolder
    problems: Problems

    @cached_property
    def splits(self) -> dict[str, list[str]]:
        """Split -> question ids. Raises UserError if a split names an unknown question or the same one twice."""
        path = self.root / self.dataset / "pid_splits.json"
        splits = read_json(path, "--data_root", dict, holds=SPLITS_FORM)
        if not all(isinstance(qids, list) for qids in splits.values()):
            raise UserError(f"--data_root: {path} must hold {SPLITS_FORM}")
        splits = {name: [str(qid) for qid in qids] for name, qids in splits.items()}
        faults = []
        for name, qids in splits.items():
            if unknown := [qid for qid in qids if qid not in self.problems]:
                fault = f"split {name} names question {unknown[0][:60]}, which problems.json does not hold"
                faults.append(fault + _more(len(unknown)))
            if twice := [qid for qid, count in Counter(qids).items() if count > 1]:
                faults.append(f"split {name} names question {twice[0]} twice{_more(len(twice))}")
        if faults:
            raise UserError(f"--data_root: {path}: {'; '.join(faults)}")
        return splits

    def split(self, name: str, flag: str) -> list[str]:
        """The questions of one split in its order; `trainval`, if absent, is train followed by val (with a note).
        Raises UserError naming `flag` and the existing splits."""
        splits = self.splits
        if name == "trainval" and name not in splits and {"train", "val"} <= set(splits):
            print0("note: pid_splits.json has no split trainval; using train, then val")
            return list(dict.fromkeys([*splits["train"], *splits["val"]]))
        if name not in splits:
            raise UserError(f"{flag}: pid_splits.json has no split {name}; it has {_listing(splits, 40) or 'none'}")
        if not splits[name]:
            raise UserError(f"{flag}: split {name} of pid_splits.json is empty")
        return list(splits[name])


def read_data_folder(data_root: str | Path, dataset: str | None = None) -> DataFolder:
    """Find the data set and read `{data_root}/{dataset}/problems.json`. Raises UserError naming the bad questions."""
    dataset = find_dataset(data_root, dataset)
    path = Path(data_root) / dataset / "problems.json"
    problems = read_json(path, "--data_root", dict, holds="{question id: problem}")
    if not problems:
        raise UserError(f"--data_root: {path} must hold {{question id: problem}}, and at least one")
    faults = [(qid, fault) for qid, problem in problems.items() if (fault := problem_fault(qid, problem))]
    if faults:
        # the first question of each kind of fault; faults that differ in numbers only are of one kind
        kinds = {re.sub(r"\d+", "", fault): f"question {qid[:60]}: {fault}" for qid, fault in reversed(faults)}
        raise UserError(f"--data_root: {path}: {'; '.join(reversed(list(kinds.values())[-4:]))}{_more(len(faults))}")
    return DataFolder(Path(data_root), dataset, problems)


def find_dataset(data_root: str | Path, dataset: str | None = None) -> str:
    """Name of the subfolder of `data_root` that holds problems.json: `dataset` if given, else the one found. Raises
    UserError if there is none, or more than one and `dataset` does not choose."""
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"--data_root: {root} is no folder; name the one that holds scienceqa/ or aokvqa/")
    found, candidates = _datasets(root)
    if dataset is not None:
        if not (root / dataset).is_dir():
            raise UserError(f"--dataset: {root} has no subfolder {dataset}; it holds {_listing(found, 40) or 'none'}")
        return dataset
    if len(candidates) == 1:
        return candidates[0]
    fault = "holds neither scienceqa/problems.json nor aokvqa/problems.json"
    if candidates:
        fault = f"holds {' and '.join(candidates)}; choose one with --dataset"
    elif (root / "problems.json").exists():
        fault = f"is itself a data set; name the folder above it ({root.resolve().parent})"
    raise UserError(f"--data_root: {root} {fault}")


def _datasets(root: Path) -> tuple[list[str], list[str]]:
    """All subfolders with problems.json, and those that --data_root may mean: the known ones, or all if none is."""
    found = sorted(path.parent.name for path in root.glob("*/problems.json"))
    return found, [name for name in found if name in KNOWN_DATASETS] or found


def problem_fault(qid: str, problem: Any) -> str | None:
    """What is wrong with one problem of ScienceQA's schema; None if nothing is."""
    if not qid or qid in (".", "..") or re.search(r"[/\\\0\s]", qid):
        return "an id names a folder: no blanks, no / or \\"
    if len(qid.encode("utf-8", errors="replace")) > NAME_MAX:
        return f"an id names a folder: at most {NAME_MAX} bytes"
    if not isinstance(problem, dict):
        return f"is not an object but {_kind(problem)}"
    absent = [name for name in ("question", "choices", "answer", "hint", "image", "lecture", "solution")
              if name not in problem]  # fmt: skip
    if absent:
        return f"lacks {', '.join(absent)}"
    for name in TEXT_FIELDS:
        if not isinstance(problem[name], str):
            return f'{name} is {_kind(problem[name])}, not text (write "" for none)'
    if problem["image"] is not None and not isinstance(problem["image"], str):
        return f"image is {_kind(problem['image'])}, not a file name or null"
    choices, answer = problem["choices"], problem["answer"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return "choices is not a list of texts"
    for text in (*(problem[name] for name in TEXT_FIELDS), *choices):
        if half := re.search("[\ud800-\udfff]", text):
            return f"holds half of a character ({ascii(half[0])}), which no file takes; write it whole or drop it"
    if not MIN_CHOICES <= len(choices) <= MAX_CHOICES:
        return f"has {len(choices)} choices; {MIN_CHOICES} to {MAX_CHOICES} are possible"
    if not isinstance(answer, int) or isinstance(answer, bool):
        return f"answer is {_kind(answer)}, not the index of a choice"
    if not 0 <= answer < len(choices):
        return f"answer {answer} is out of range; its {len(choices)} choices are 0 to {len(choices) - 1}"
    return None


def check_overlap(splits: Mapping[str, Sequence[str]], train: str = "train", others: Sequence[str] = ("val", "test")):
    """Warn of questions that are both trained on and evaluated on."""
    for name in others:
        if both := set(splits.get(train, ())) & set(splits.get(name, ())):
            warn0(f"splits {train} and {name} share {len(both)} questions (the first is {min(both)})")


# -- where the other files are ---------------------------------------------------------------------------


def data_folders(args: argparse.Namespace) -> list[Path]:
    """Where a run looks first for captions, images, features and name map: the data set's folder (two data sets can
    share a --data_root), then --data_root."""
    root = Path(args.data_root)
    candidates = [args.dataset] if args.dataset else _datasets(root)[1]
    return [root / candidates[0], root] if len(candidates) == 1 else [root]


def search_folders(args: argparse.Namespace) -> list[Path]:
    """`data_folders`, then the one or two folders above --data_root where the released trees keep these files.

    Such a tree is `scienceqa_data/ScienceQA/data/scienceqa/problems.json` with the other files in `scienceqa_data/`.
    Above any other --data_root there may be another data set's files.
    """
    folders, above = data_folders(args), Path(args.data_root) / ".."
    parent, last = ["", "", *Path(args.data_root).resolve().parts][-2:]
    parent = re.sub(r"[-_ ]", "", parent.lower())
    if last.lower() != "data" or parent not in [*KNOWN_DATASETS, *(f"{name}data" for name in KNOWN_DATASETS)]:
        return folders
    return [*folders, above] if parent.endswith("data") else [*folders, above, above / ".."]


def find_captions(args: argparse.Namespace) -> Path:
    """`--caption_file`, or, at its default, the first of CAPTION_NAMES in `search_folders`; prints which."""
    if args.caption_file != CAPTION_DEFAULT:
        return _named(args.caption_file, "--caption_file")
    named = Path(CAPTION_DEFAULT)
    # ./data/captions.json only if ./data is --data_root: else these are the captions of other questions
    folders = search_folders(args)
    here = f" (./{named}, if these captions are meant)" * named.is_file()
    absent = f"--caption_file: no {' or '.join(CAPTION_NAMES)} in {_listing(folders)}; name one{here}"
    path = _first([folder / name for folder in folders for name in CAPTION_NAMES], f"{absent}, or drop --use_caption")
    if path != named:
        print0(f"captions: {path}" + f" (no {named})" * (not named.exists()))
    return path


def load_captions(path: str | Path) -> dict[str, str]:
    """Read `{"captions": {qid: text}}` or a bare `{qid: text}`. Raises UserError naming a bad entry."""
    captions = read_json(path, "--caption_file", dict, holds='{"captions": {question id: text}}')
    if isinstance(captions.get("captions"), dict):
        captions = captions["captions"]
    for qid, text in captions.items():
        if not isinstance(text, str):
            raise UserError(f"--caption_file: {path}: the caption of question {qid[:60]} is {_kind(text)}, not text")
    return captions


def check_captions(
    path: str | Path, captions: Mapping[str, str], problems: Problems, splits: Mapping[str, Sequence[str]]
) -> None:
    """Warn of questions with an image but no caption; UserError if these are more than half of a split."""
    check_pictured(captions, problems, splits, f"--caption_file: {path} has captions", f"have no caption in {path}")


def check_pictured(
    known: Container[str], problems: Problems, splits: Mapping[str, Sequence[str]], few: str, some: str
) -> None:
    """Warn of questions with an image that are not in `known`; UserError if these are more than half of a split's.
    `splits`: name -> qids. `few` begins the error, which lists all counts; `some` is the verb of the warning."""
    faults, pictured, absent = [], {}, {}
    for name, qids in splits.items():
        here = [qid for qid in qids if problems[qid]["image"]]
        lost = [qid for qid in here if qid not in known]
        if 2 * len(lost) > len(here):
            faults.append(f"{len(here) - len(lost)} of {len(here)} in split {name} (none for {lost[0]})")
        pictured |= dict.fromkeys(here)
        absent |= dict.fromkeys(lost)
    if faults:
        few += f" for too few of the questions with an image, {', '.join(faults)}"
        raise UserError(f"{few}; it seems to belong to another data set or split")
    if absent:
        warn0(f"{len(absent)} of {len(pictured)} questions with an image {some} (the first is {next(iter(absent))})")


# -- images and features ---------------------------------------------------------------------------------


def find_images(args: argparse.Namespace, required: bool = False) -> Path | None:
    """Folder of `{qid}/image.png`: --images, else `images` in `search_folders`, else ./images; None if there is none.
    Raises UserError if --images is no folder, or if none is found although `required`."""
    if args.images is not None:
        return _named(args.images, "--images", folder=True)
    absent = "--images: none found (tried {places}); name the folder of {qid}/image.png" if required else None
    return _first([*(folder / "images" for folder in search_folders(args)), Path("images")], absent)


def question_images(images_dir: str | Path, qid: str) -> list[Path]:
    """A question's image files: image.png first, then choice_0.png, choice_1.png ... in the order of their numbers.
    They are in `{images_dir}/{qid}`, or, as ScienceQA's archives unpack, in its train/, val/ or test/."""
    for part in ("", "train", "val", "test"):
        if os.path.isdir(os.path.join(images_dir, part, qid)):  # asked for 50,000 rationales, half without an image
            folder = Path(images_dir, part, qid)
            numbered = [(int(match[1]), path) for path in folder.iterdir()
                        if (match := re.fullmatch(r"choice_(\d+)\.png", path.name)) and path.is_file()]  # fmt: skip
            image = folder / "image.png"
            return [image] * image.is_file() + [path for _, path in sorted(numbered)]
    return []


def find_feature_file(args: argparse.Namespace) -> Path:
    """The feature file of `--img_type`: in --vision_features, else in the first `vision_features` folder that has it,
    of `search_folders` and the working folder. Raises UserError naming the places tried.
    """
    folders = [*(folder / "vision_features" for folder in search_folders(args)), Path("vision_features")]
    if args.vision_features is not None:
        folders = [_named(args.vision_features, "--vision_features", folder=True)]
    for folder in folders:
        found = [path for suffix in FEATURE_SUFFIXES if (path := folder / f"{args.img_type}{suffix}").is_file()]
        if len(found) > 1:
            print0(f"vision features: using {found[0]}, not {', '.join(path.name for path in found[1:])} beside it")
        if found:
            return found[0]
    absent = f"no {args.img_type}{{{','.join(FEATURE_SUFFIXES)}}} in {_listing(folders)}"
    fix = "make it with extract_features.py, name its folder, or leave --img_type out for text only"
    raise UserError(f"--vision_features: {absent}; {fix}")


def find_name_map(args: argparse.Namespace, features_dir: str | Path) -> Path:
    """--name_map, else name_map.json beside the features, in `data_folders`, beside --caption_file, and in the two
    folders above --data_root."""
    if args.name_map is not None:
        return _named(args.name_map, "--name_map")
    captions = getattr(args, "caption_file", CAPTION_DEFAULT)
    beside = [] if captions in (None, CAPTION_DEFAULT) else [Path(captions).parent]
    above = Path(args.data_root) / ".."
    folders = dict.fromkeys([Path(features_dir), *data_folders(args), *beside, above, above / ".."])
    absent = "--name_map: none found (tried {places}); it gives each question's feature row"
    return _first([folder / "name_map.json" for folder in folders], absent)


def load_name_map(path: str | Path) -> dict[str, int]:
    """Read `{qid: row}`, rows as numbers or as text. Raises UserError naming a bad entry."""
    rows = read_json(path, "--name_map", dict, holds="{question id: row}")
    for qid, row in rows.items():
        if type(row) not in (int, str) or not re.fullmatch("[0-9]{1,18}", str(row)):
            wrong = f"the row of question {qid[:60]} is {repr(row)[:60]}"
            raise UserError(f"--name_map: {path}: {wrong}, not a whole number from 0 up")
    return {qid: int(row) for qid, row in rows.items()}


def find_correction(args: argparse.Namespace) -> Path:
    """`--correction_file`, relative to --data_root or a path. Raises UserError if it is absent."""
    if not args.correction_file:
        raise UserError("--correction True needs --correction_file")
    places = dict.fromkeys([Path(args.data_root) / args.correction_file, Path(args.correction_file)])
    return _first(places, f"--correction_file: {args.correction_file} does not exist (tried {{places}})")


def read_correction(path: str | Path, problems: Mapping[str, Any], train_qids: Iterable[str]) -> dict[str, str]:
    """The solutions of the train questions in a correction file, a problems.json with replaced solutions. Raises
    UserError if it lacks a train question (naming one, and how many), or holds another question under its id."""
    corrected = read_json(path, "--correction_file", dict, holds="{question id: problem}")
    train_qids = list(train_qids)
    if absent := [qid for qid in train_qids if qid not in corrected]:
        lacks = f"{len(absent)} of {len(train_qids)} train questions, the first being {absent[0]}"
        raise UserError(f"--correction_file: {path} lacks {lacks}")
    solutions = {}
    for qid in train_qids:
        problem = corrected[qid]
        if not isinstance(problem, dict) or not isinstance(problem.get("solution"), str):
            raise UserError(f"--correction_file: {path}: question {qid} has no solution text")
        if problem.get("question", problems[qid]["question"]) != problems[qid]["question"]:
            raise UserError(f"--correction_file: {path}: question {qid} is another question than in problems.json")
        solutions[qid] = problem["solution"]
    return solutions


def _named(path: str, flag: str, folder: bool = False) -> Path:
    """The file or folder that the user named with `flag`. Raises UserError if there is none."""
    if not (Path(path).is_dir() if folder else Path(path).is_file()):
        raise UserError(f"{flag}: {path} {'is no folder' if folder else 'does not exist'}")
    return Path(path)


def _first(places: Iterable[Path], absent: str | None = None) -> Path | None:
    """The first of `places` that exists. If none does, raises UserError with the text `absent`, if there is one."""
    found = next((path for path in places if path.exists()), None)
    if found is None and absent:
        raise UserError(absent.replace("{places}", _listing(places)))
    return found


def _listing(names: Iterable[object], most: int | None = None) -> str:
    return ", ".join(str(name)[:most] for name in names)


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
