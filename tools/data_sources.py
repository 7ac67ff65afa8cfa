"""Public data sets as their makers publish them -> questions in ScienceQA's schema.

    source = open_source("aokvqa", "aokvqa_v1p0", "coco")
    source.problems["22MexNkBPpdZGX6sxbxVBH"]["solution"], source.splits["val"][:3], source.pictures("22MexNk...")

Sources: ScienceQA's own folder; A-OKVQA's own JSON with COCO's images; either as a `datasets` data set (a hub id, a
folder of parquet files, a folder of `save_to_disk`). Everything is read and checked before the first file is
written (by tools/prepare_data.py).
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ares.cli import UserError, progress
from ares.data_folder import Problems, problem_fault, question_images, read_data_folder
from ares.files import read_json
from ares.sentences import is_finished

# our name of a split -> names that sources give it; in this order ids are given out where a source has none
SPLITS = {"train": ("train",), "val": ("val", "validation", "dev"), "test": ("test",)}
COCO_PARTS = ("train2017", "val2017", "test2017", "train2014", "val2014", "test2014", "test2015")
ID_COLUMNS = ("question_id", "pid", "qid", "id")
TEXTS = ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")

Pictures = dict[str, "Path | bytes"]  # file name in the question's folder -> a file, or the bytes of one


@dataclass
class Source:
    """A data set that was read: its questions and splits, and where each question's pictures come from."""

    where: str
    problems: Problems
    splits: dict[str, list[str]]
    pictures: Callable[[str], Pictures] | None = None  # None: it comes without any
    ids: dict[str, dict[str, Any]] = field(default_factory=dict)  # qid -> the source's own ids
    notes: list[str] = field(default_factory=list)


def open_source(dataset: str, where: str, images: str | None) -> Source:
    """Read and check the source `where` of "scienceqa" or "aokvqa". Raises UserError."""
    folder = Path(where)
    if dataset == "scienceqa" and folder.is_dir():
        for place in (folder, folder / "scienceqa", folder / "data" / "scienceqa"):
            if (place / "problems.json").is_file():
                return _scienceqa_folder(place, images)
    if dataset == "aokvqa" and folder.is_dir():
        files = {split: _annotations(folder, split) for split in SPLITS}
        if files["train"] or files["val"]:
            return _aokvqa_folder(folder, files, images)
    if images is not None:
        raise UserError(f"--images: the images of {where} come with it; drop the flag, or name the official folder")
    convert = {"scienceqa": _scienceqa_problem, "aokvqa": _aokvqa_problem}[dataset]
    return _from_datasets(where, convert, test_is_val=dataset == "aokvqa")


# -- the official folders --------------------------------------------------------------------------------


def _scienceqa_folder(folder: Path, images: str | None) -> Source:
    data = read_data_folder(folder.parent, folder.name)
    problems, splits = data.problems, data.splits
    absent = [name for name in SPLITS if name not in splits]
    if absent:
        raise UserError(f"--source: {folder}/pid_splits.json has no split {absent[0]}; copy the whole folder")
    places = (
        [Path(images)] if images else [folder / "images", folder.parent / "images", folder.parent.parent / "images"]
    )
    if images and not places[0].is_dir():
        raise UserError(
            f"--images: {images} is no folder; name the one of {{qid}}/image.png (or of train/, val/, test/)"
        )
    root = next((place for place in places if place.is_dir()), None)

    def pictures(qid: str) -> Pictures:
        return {path.name: path for path in question_images(root, qid)} if root else {}

    notes = (
        [f"images: {root}"] if root else [f"no images (looked in {', '.join(map(str, places))}); --images names them"]
    )
    return Source(str(folder), problems, splits, pictures, notes=notes)


def _annotations(folder: Path, split: str) -> Path | None:
    names = [f"aokvqa_v1p0_{split}.json", f"{split}.json"]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _aokvqa_folder(folder: Path, files: Mapping[str, Path | None], images: str | None) -> Source:
    if images is not None and not Path(images).is_dir():
        raise UserError(f"--images: {images} is no folder; name the one that holds COCO's train2017/ and val2017/")
    rows: list[tuple[str, str, Mapping]] = []
    for split in ("train", "val"):
        if files[split] is None:
            raise UserError(f"--source: {folder} has no aokvqa_v1p0_{split}.json; unpack the whole archive")
        entries = read_json(files[split], "--source")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"--source: {files[split]} must hold a list of questions")
        rows += [(split, f"{files[split].name}, entry {number}", entry) for number, entry in enumerate(entries)]
    source = _build(str(folder), rows, _aokvqa_problem, test_is_val=True)

    def pictures(qid: str) -> Pictures:
        found = _coco_image(Path(images), source.ids[qid]["image_id"])
        return {"image.png": found} if found else {}

    if images is None:
        source.notes.append("no images; --images names COCO's folder")
    else:
        source.pictures = pictures
    if files["test"]:
        source.notes.append(f"{files['test'].name} left out: its answers are hidden")
    return source


def _coco_image(root: Path, image_id: Any) -> Path | None:
    """COCO's file of an image id, in one of COCO's folders, in `images/` above these, or right in `root`.

    The same images have two names: `train2017/000000123456.jpg` and `train2014/COCO_train2014_000000123456.jpg`.
    """
    if image_id is None:
        return None
    plain = [f"{number}{suffix}" for number in (f"{image_id:0>12}", image_id) for suffix in (".jpg", ".png")]
    for folder in (root, root / "images"):
        for name in plain:
            for part in (*COCO_PARTS, ""):
                if (path := folder / part / name).is_file():
                    return path
        for part in COCO_PARTS:
            name = f"COCO_{part}_{image_id:0>12}.jpg"
            if (path := folder / part / name).is_file() or (path := folder / name).is_file():
                return path
    return None


# -- data sets of the `datasets` library -----------------------------------------------------------------


def _from_datasets(where: str, convert: Callable, test_is_val: bool) -> Source:
    tables = {}
    for name, table in _load_datasets(where).items():
        split = next((ours for ours, names in SPLITS.items() if name in names), None)
        if split is not None:
            tables[split] = _undecoded(table)
    tables = {split: tables[split] for split in SPLITS if split in tables}
    wanted = [split for split in SPLITS if split not in tables and not (test_is_val and split == "test")]
    if wanted:
        raise UserError(f"--source: {where} has no split {wanted[0]}; it has {', '.join(tables) or 'none'}")
    if test_is_val:
        tables.pop("test", None)
    rows, places = [], []
    for split, table in tables.items():
        for number, row in enumerate(progress(table, desc=f"read {split}", unit="question")):
            row["image"] = _picture(row.get("image")) is not None
            rows.append((split, f"split {split}, row {number}", row))
            places.append((table, number))
    source = _build(where, rows, convert, test_is_val)
    place_of = dict(zip(source.problems, places, strict=True))

    def pictures(qid: str) -> Pictures:
        table, number = place_of[qid]
        picture = _picture(table[number].get("image"))
        return {"image.png": picture} if picture is not None else {}

    source.pictures = pictures
    return source


def _load_datasets(where: str) -> Mapping[str, Any]:
    """Split -> table, of a `save_to_disk` folder, a folder of parquet files, or a hub id. Raises UserError."""
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # versions below 4 run a data set's own script otherwise
    folder = Path(where)
    try:
        if folder.is_dir() and (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(where)
        if folder.is_dir():
            return datasets.load_dataset("parquet", data_files=_parquet_files(folder))
        if folder.exists() or where.startswith((".", "/", "~")):
            raise UserError(f"--source: {where} is no folder")
        from huggingface_hub import constants

        from vision.networks import hub_failure, offline_unless_reachable

        offline_unless_reachable()
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
        try:
            return datasets.load_dataset(where)
        except Exception as error:  # hub, HTTP, parsing: each its own
            if "Config name is missing" in str(error):
                names = str(error).partition("available configs: ")[2].partition("\n")[0]
                raise UserError(
                    f"--source: {where} has several configurations, {names}; download the files of one and name their "
                    "folder"
                ) from error
            raise UserError(
                f"--source: {where} is no folder here, and cannot be had from the hub ({hub_failure(error)})"
            ) from error
    except UserError:
        raise
    except Exception as error:  # pyarrow's and datasets' own for damaged files
        raise UserError(f"--source: cannot read {where} ({' '.join(str(error).split())[:160]})") from error


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    """Split -> its parquet files. Raises UserError where there are none, or several configurations of a data set."""
    places: dict[str, dict[Path, list[str]]] = {}  # split -> folder of the configuration -> files
    for file in sorted(folder.rglob("*.parquet")):
        name = file.stem.partition("-")[0]  # train-00000-of-00002.parquet, or train/0000.parquet
        split, of_split = (file.parent.name, True) if name.isdigit() else (name, file.parent.name == name)
        split = next((ours for ours, names in SPLITS.items() if split in names), split)
        place = file.parent.parent if of_split else file.parent
        places.setdefault(split, {}).setdefault(place, []).append(str(file))
    if not places:
        saved = sorted(path.parent.name for path in folder.glob("*/dataset_dict.json"))
        raise UserError(
            f"--source: {folder} holds {len(saved)} data sets ({', '.join(saved)}); name the folder of one"
            if saved
            else f"--source: {folder} holds neither the official files, nor a DatasetDict of save_to_disk, nor "
            "*.parquet (train-..., validation-..., test-...)"
        )
    found = sorted({place for split in places.values() for place in split})
    if any(len(split) > 1 for split in places.values()):
        names = ", ".join(os.path.relpath(place, folder) for place in found)
        raise UserError(
            f"--source: {folder} holds {len(found)} configurations of a data set ({names}), the same questions more "
            "than once; name the folder of one"
        )
    return {split: files for split, each in places.items() for files in each.values()}


def _undecoded(table: Any) -> Any:
    """The table with its pictures as files' bytes: nothing is decoded, so nothing is encoded again."""
    import datasets

    if "image" in table.column_names:
        table = table.cast_column("image", datasets.Image(decode=False))
    return table


def _picture(image: Mapping[str, Any] | None) -> Path | bytes | None:
    if not image:
        return None
    if image.get("bytes"):
        return image["bytes"]
    return Path(image["path"]) if image.get("path") else None


# -- rows -> problems ------------------------------------------------------------------------------------


def _build(where: str, rows: Iterable[tuple[str, str, Mapping]], convert: Callable, test_is_val: bool) -> Source:
    """Problems and splits of rows (split, where it stands, fields). Ids are the source's, else numbers in order."""
    rows = list(rows)
    if not rows:
        raise UserError(f"--source: {where} holds no question")
    column = next((name for name in ID_COLUMNS if all(row.get(name) is not None for _, _, row in rows)), None)
    source = Source(where, {}, {split: [] for split in SPLITS})
    if column is None:
        source.notes.append(f"{where} has no ids: questions are numbered 1 to {len(rows)} in the order of its splits")
    for number, (split, place, row) in enumerate(rows, start=1):
        qid = str(row[column]) if column else str(number)
        try:
            problem = convert(row, split)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"--source: {where}, {place}: {reason}") from error
        fault = "its id comes twice" if qid in source.problems else problem_fault(qid, problem)
        if fault:
            raise UserError(f"--source: {where}, {place} (question {qid}): {fault}")
        source.problems[qid] = problem
        source.splits[split].append(qid)
        source.ids[qid] = {name: row.get(name) for name in ("question_id", "image_id")}
    if test_is_val:
        source.splits["test"] = list(source.splits["val"])
    return source


def _scienceqa_problem(row: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A row of derek-thomas/ScienceQA as an entry of problems.json, its fields in the released order."""
    problem = {name: row[name] for name in ("question", "choices", "answer")}
    problem["choices"] = list(problem["choices"])
    problem |= {"hint": row["hint"] or "", "image": "image.png" if row["image"] else None}
    return problem | {name: row[name] or "" for name in TEXTS} | {"split": split}


def _aokvqa_problem(row: Mapping[str, Any], split: str) -> dict[str, Any]:
    """An A-OKVQA question in the same schema. Its rationales, one after the other, are the solution."""
    direct = row.get("direct_answers") or []
    rationales = row["rationales"]
    if not isinstance(rationales, list) or not all(isinstance(text, str) for text in rationales):
        raise ValueError("rationales is not a list of texts")
    problem = {"question": row["question"], "choices": row["choices"], "answer": row["correct_choice_idx"]}
    problem |= {"hint": "", "image": "image.png"} | dict.fromkeys(TEXTS, "")
    problem["solution"] = " ".join(_sentence(text) for text in rationales if text.strip())
    problem |= {"split": split, "difficult_direct_answer": row.get("difficult_direct_answer")}
    try:  # the hub's copy holds this list as text
        problem["direct_answers"] = ast.literal_eval(direct) if isinstance(direct, str) else list(direct)
    except SyntaxError as error:
        raise ValueError(f"direct_answers is not a list: {error.msg}") from error
    return problem


def _sentence(text: str) -> str:
    """A rationale that ends: sentences are scored one by one, and two must not run into each other."""
    text = " ".join(text.split())
    return text if is_finished(text) else text + "."
