"""From a public data set to a data folder that every stage reads: problems.json, pid_splits.json, images/{qid}/.

    python tools/prepare_data.py scienceqa --download data
    python tools/prepare_data.py aokvqa --download aokvqa_data
    python tools/prepare_data.py scienceqa --source ScienceQA/data/scienceqa --images ScienceQA/images --output data
    python tools/prepare_data.py aokvqa --source HuggingFaceM4/A-OKVQA --output aokvqa_data

--download DIR fetches what docs/data.md lists - for ScienceQA also captions, ViT features and MM-CoT's rationale
model - into DIR and --models_dir, makes DIR a data folder, and runs tools/doctor.py on it, whose exit status is this
script's. Killed or broken off, the same command goes on; a file put in place by hand is not fetched. --mirror URL
takes every file from URL/{host}/{path}; $HF_ENDPOINT stands in for huggingface.co.

--source is the official folder, or a data set of the `datasets` library: a hub id, a folder of parquet files
(train-*.parquet, ...), or a folder of save_to_disk. Ids are those of the source; where it has none
(derek-thomas/ScienceQA), questions are numbered in the order of the splits. The rationales of an A-OKVQA question,
joined, become its solution; val serves as test (the answers of the real one are hidden); {output}/aokvqa/id_map.json
keeps question and image ids.

The splits of the source are kept; absent ones are made (trainval, mini splits for quick trials). Pictures are never
encoded again: image.png is a hard link to the file (a copy on another disk), or the bytes in the data set.

problems.json is written last; after a kill the same command finishes.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares.cli import HelpFormatter, UserError, in_one_line, print0, progress, refuse, run, warn0
from ares.data_folder import FEATURE_SUFFIXES, Problems, problem_fault, question_images, read_data_folder
from ares.downloads import ROWS, address, fetch
from ares.files import place_file, read_json, remove_leftovers, writable_dir, write_bytes, write_json
from ares.images import as_rgb, media_type, open_image, upright
from ares.launch import next_step
from ares.sentences import is_finished

# our name of a split -> its names in sources; questions without ids are numbered in this order
SPLITS = {"train": ("train",), "val": ("val", "validation", "dev"), "test": ("test",)}
COCO_PARTS = ("train2017", "val2017", "test2017", "train2014", "val2014", "test2014", "test2015")
ID_COLUMNS = ("question_id", "pid", "qid", "id")
TEXTS = ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")

Pictures = dict[str, "Path | bytes"]  # file name in the question's folder -> a file, or its bytes
MINIS = {"minitrain": ("train", 64), "miniminitrain": ("train", 256), "minival": ("val", 64)}
MINIS |= {"miniminival": ("val", 4), "minitest": ("test", 64)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("dataset", choices=("scienceqa", "aokvqa"), help="which data set to prepare")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--source", metavar="PLACE", help="official folder, datasets folder or hub id")
    start.add_argument("--download", metavar="DIR", help="fetch the published files; DIR is the --data_root to be")
    parser.add_argument("--images", metavar="DIR", help="images of an official folder: ScienceQA's, or COCO's")
    parser.add_argument("--output", metavar="DIR", help="the --data_root to be (default: data, aokvqa_data)")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set that is there")
    parser.add_argument("--strict", action="store_true", help="stop when a picture is absent or unreadable")
    fetch = parser.add_argument_group("with --download")
    sizes = ("base", "large", "none")
    fetch.add_argument("--model", choices=sizes, help="MM-CoT's rationale model (default: base; A-OKVQA has none)")
    fetch.add_argument("--models_dir", metavar="DIR", help="folder of models (default: models)")
    fetch.add_argument("--mirror", metavar="URL", help="take every file from URL/{host}/{path}")
    args = parser.parse_args(argv)
    if args.download is not None:
        refuse([f"--{name}: no effect with --download" for name in ("images", "output") if getattr(args, name)])
        if args.dataset == "aokvqa" and args.model not in (None, "none"):
            raise UserError(
                "--model: no rationale model is published for A-OKVQA; docs/data.md has the training command"
            )
        address("https://huggingface.co/", args.mirror)  # refuses a --mirror or $HF_ENDPOINT that is no URL
        args.output, args.model, args.models_dir = args.download, args.model or "base", args.models_dir or "models"
    else:
        idle = [name for name in ("model", "models_dir", "mirror") if getattr(args, name)]
        refuse([f"--{name}: no effect without --download" for name in idle])
    args.output = args.output or {"scienceqa": "data", "aokvqa": "aokvqa_data"}[args.dataset]
    return args


# -- reading a source ------------------------------------------------------------------------------------


@dataclass
class Source:
    """A data set that was read and checked: nothing has been written yet."""

    problems: Problems
    splits: dict[str, list[str]]
    pictures: Callable[[str], Pictures] | None = None  # of a question id; None: the source has no pictures
    ids: dict[str, dict[str, Any]] = field(default_factory=dict)  # qid -> the source's own ids
    notes: list[str] = field(default_factory=list)


def open_source(dataset: str, where: str, images: str | None) -> Source:
    """Read and check the source `where` of "scienceqa" or "aokvqa". Raises UserError."""
    folder = Path(where)
    if dataset == "scienceqa":
        for place in (folder, folder / "scienceqa", folder / "data" / "scienceqa"):
            if (place / "problems.json").is_file():
                return _scienceqa_folder(place, images)
    else:
        places = {split: (folder / f"aokvqa_v1p0_{split}.json", folder / f"{split}.json") for split in SPLITS}
        files = {split: next((path for path in both if path.is_file()), None) for split, both in places.items()}
        if files["train"] or files["val"]:
            return _aokvqa_folder(folder, files, images)
    if images is not None:
        raise UserError(f"--images: the images of {where} come with it; drop the flag, or name the official folder")
    convert = _scienceqa_problem if dataset == "scienceqa" else _aokvqa_problem
    return _from_datasets(where, convert, test_is_val=dataset == "aokvqa")


# -- the official folders --------------------------------------------------------------------------------


def _scienceqa_folder(folder: Path, images: str | None) -> Source:
    data = read_data_folder(folder.parent, folder.name)
    splits = data.splits
    absent = [name for name in SPLITS if name not in splits]
    if absent:
        raise UserError(f"--source: {folder}/pid_splits.json has no split {absent[0]}; copy the whole folder")
    places = [place / "images" for place in (folder, folder.parent, folder.parent.parent)]
    places = [Path(images)] if images else places
    if images and not places[0].is_dir():
        fix = "name the one of {qid}/image.png (or of train/, val/, test/)"
        raise UserError(f"--images: {images} is no folder; {fix}")
    root = next((place for place in places if place.is_dir()), None)

    def pictures(qid: str) -> Pictures:
        return {path.name: path for path in question_images(root, qid)} if root else {}

    note = f"images: {root}" if root else f"no images (tried {', '.join(map(str, places))}); --images names them"
    return Source(data.problems, splits, pictures, notes=[note])


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
        source.notes.append(f"{files['test'].name} is not used: its answers are hidden")
    return source


def _coco_image(root: Path, image_id: Any) -> Path | None:
    """COCO's file of an image id: in one of COCO's folders in `root` or `root`/images, or in these two themselves.

    An image has two names: `train2017/000000123456.jpg` and `train2014/COCO_train2014_000000123456.jpg`.
    """
    if image_id is None:
        return None
    plain = [f"{number}{suffix}" for number in (f"{image_id:0>12}", image_id) for suffix in (".jpg", ".png")]
    names = [f"{part}/{name}" for name in plain for part in (*COCO_PARTS, ".")]
    for part in COCO_PARTS:
        names += [f"{part}/COCO_{part}_{image_id:0>12}.jpg", f"COCO_{part}_{image_id:0>12}.jpg"]
    places = (folder / name for folder in (root, root / "images") for name in names)
    return next((path for path in places if path.is_file()), None)


# -- data sets of the `datasets` library -----------------------------------------------------------------


def _from_datasets(where: str, convert: Callable, test_is_val: bool) -> Source:
    import datasets

    found = _load_datasets(where)
    tables = {split: found[name] for split, names in SPLITS.items() for name in names if name in found}
    for split, table in tables.items():
        if "image" in table.column_names:  # as the bytes of files: not decoded, so not encoded again
            tables[split] = table.cast_column("image", datasets.Image(decode=False))
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
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # else versions below 4 run a data set's own script
    folder = Path(where)
    try:
        if folder.is_dir() and (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(where)
        if folder.is_dir():
            return datasets.load_dataset("parquet", data_files=_parquet_files(folder))
    except UserError:
        raise
    except Exception as error:  # of pyarrow and datasets, for damaged files
        raise UserError(f"--source: cannot read {where} ({in_one_line(error, 160)})") from error
    if folder.exists() or where.startswith((".", "/", "~")):
        raise UserError(f"--source: {where} is no folder")
    from huggingface_hub import constants

    from vision.networks import hub_failure, offline_unless_reachable

    offline_unless_reachable()
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
    try:
        return datasets.load_dataset(where)
    except Exception as error:  # of the hub, HTTP and parsing libraries
        if "Config name is missing" in str(error):
            names = str(error).partition("available configs: ")[2].partition("\n")[0]
            fault = f"has several configurations, {names}; download the files of one and name their folder"
        else:
            fault = f"is no folder here, and cannot be downloaded from the hub ({hub_failure(error)})"
        raise UserError(f"--source: {where} {fault}") from error


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
        if saved:
            raise UserError(f"--source: {folder} holds {len(saved)} data sets ({', '.join(saved)}); "
                            "name the folder of one")  # fmt: skip
        raise UserError(f"--source: {folder} holds neither the official files, nor a DatasetDict of save_to_disk, nor "
                        "*.parquet (train-..., validation-..., test-...)")  # fmt: skip
    if any(len(split) > 1 for split in places.values()):
        found = sorted({os.path.relpath(place, folder) for split in places.values() for place in split})
        raise UserError(f"--source: {folder} holds {len(found)} configurations of a data set ({', '.join(found)}), "
                        "the same questions more than once; name the folder of one")  # fmt: skip
    return {split: files for split, each in places.items() for files in each.values()}


def _picture(image: Mapping[str, Any] | None) -> Path | bytes | None:
    if image and image.get("bytes"):
        return image["bytes"]
    return Path(image["path"]) if image and image.get("path") else None


# -- questions ------------------------------------------------------------------------------------


def _build(where: str, rows: Iterable[tuple[str, str, Mapping]], convert: Callable, test_is_val: bool) -> Source:
    """Problems and splits of `rows`, (split, place in the source, fields). Ids are the source's, or numbers."""
    rows = list(rows)
    if not rows:
        raise UserError(f"--source: {where} holds no question")
    column = next((name for name in ID_COLUMNS if all(row.get(name) is not None for _, _, row in rows)), None)
    source = Source({}, {split: [] for split in SPLITS})
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
    """A row of derek-thomas/ScienceQA as an entry of problems.json, with its fields in the released order."""
    problem = {name: row[name] for name in ("question", "choices", "answer")}
    problem["choices"] = list(problem["choices"])
    problem |= {"hint": row["hint"] or "", "image": "image.png" if row["image"] else None}
    return problem | {name: row[name] or "" for name in TEXTS} | {"split": split}


def _aokvqa_problem(row: Mapping[str, Any], split: str) -> dict[str, Any]:
    """An A-OKVQA question as an entry of problems.json. Its rationales, joined, are the solution."""
    direct = row.get("direct_answers") or []
    rationales = row["rationales"]
    if not isinstance(rationales, list) or not all(isinstance(text, str) for text in rationales):
        raise ValueError("rationales is not a list of texts")
    problem = {"question": row["question"], "choices": row["choices"], "answer": row["correct_choice_idx"]}
    problem |= {"hint": "", "image": "image.png"} | dict.fromkeys(TEXTS, "")
    texts = [" ".join(text.split()) for text in rationales if text.strip()]
    # sentences are scored one by one: two rationales must not become one sentence
    problem["solution"] = " ".join(text if is_finished(text) else text + "." for text in texts)
    problem |= {"split": split, "difficult_direct_answer": row.get("difficult_direct_answer")}
    try:  # the hub's copy holds this list as text
        problem["direct_answers"] = ast.literal_eval(direct) if isinstance(direct, str) else list(direct)
    except SyntaxError as error:
        raise ValueError(f"direct_answers is not a list: {error.msg}") from error
    return problem


# -- writing the data folder -----------------------------------------------------------------------------


def with_minis(splits: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The splits, with trainval and the mini splits added where they are absent."""
    made = {name: list(qids) for name, qids in splits.items()}
    made.setdefault("trainval", list(dict.fromkeys([*made["train"], *made["val"]])))
    for name, (source, size) in MINIS.items():
        made.setdefault(name, made[source][:size])
    return made


def check_output(folder: Path, source: Source, splits: Mapping[str, Sequence[str]], overwrite: bool) -> None:
    """Raise UserError if another data set, or its pictures, are there already."""
    images = folder.parent / "images"
    bare = [qid for qid, problem in source.problems.items() if not problem["image"] and (images / qid).exists()]
    stale = [qid for qid in bare if source.pictures and not source.pictures(qid)]
    if stale:
        raise UserError(f"--output: {images} holds pictures for {len(stale)} questions that have none here (the first "
                        f"is {stale[0]}): they are another data set's; move them away, or name another folder",
                        )  # fmt: skip
    if overwrite:
        return
    for name, value in (("problems.json", source.problems), ("pid_splits.json", splits)):
        path = folder / name
        if path.exists() and (there := read_json(path, "--output")) != value:
            if name == "pid_splits.json" and isinstance(there, dict) and there.items() <= dict(splits).items():
                continue  # the source's own file, to which mini splits are added
            raise UserError(f"--output: {path} is there and differs; add --overwrite to replace it, or name another")


def write_pictures(folder: Path, pictures: Pictures) -> str | None:
    """Put a question's pictures into its folder, unless they are there. Returns what is wrong with one of them.

    Raises UserError if the disk refuses one.
    """
    for name, picture in pictures.items():
        target = folder / name
        try:
            data = picture if isinstance(picture, Path) or media_type(picture[:12]) else _as_png(picture)
        except (OSError, ValueError) as error:
            return f"{name}: {error}"
        if isinstance(data, Path) and not data.is_file():
            return f"{name}: {data} does not exist"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            if isinstance(data, Path):
                place_file(data, target)
            elif not (target.is_file() and target.read_bytes() == data):
                write_bytes(target, data)
        except OSError as error:
            raise UserError(f"--output: cannot write {target} ({error.strerror or error})") from error
    return None


def _as_png(picture: bytes) -> bytes:
    """Another format (BMP, TIFF) as an upright PNG. Raises OSError or ValueError if it is no image."""
    out = io.BytesIO()
    with open_image(picture) as image:
        image = upright(image)
        kept = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        (image if kept else as_rgb(image)).save(out, format="PNG")  # PNG has no CMYK
    return out.getvalue()


def write_images(folder: Path, source: Source, strict: bool) -> int:
    """Write the pictures of all questions; returns how many have some. Warns of absent and unreadable ones."""
    shown, absent, faults = 0, [], {}
    for qid, problem in progress(source.problems.items(), desc="images", unit="question"):
        pictures = source.pictures(qid)
        fault = write_pictures(folder / qid, pictures)
        if fault:
            faults[qid] = fault
        elif problem["image"] and not pictures and not (folder / qid / "image.png").is_file():
            absent.append(qid)
        shown += bool(pictures) and not fault
        if strict and (fault or absent):
            raise UserError(f"--strict: question {qid}: {fault or 'names an image that is not there'}")
    if absent:
        warn0(f"{len(absent)} questions name an image that is not there (the first is {absent[0]}); --images names it")
    for qid, fault in list(faults.items())[:10]:
        warn0(f"question {qid}: cannot read {fault}")
    if len(faults) > 10:
        warn0(f"{len(faults)} pictures cannot be read")
    return shown


def download(args: argparse.Namespace) -> list[str]:
    """Fetch the published files and name the official folder in `args`; returns the flags of tools/doctor.py."""
    folder, rows = Path(args.download), [row for row in ROWS[args.dataset] if row.model in ("", args.model)]
    fetch(rows, folder, Path(args.models_dir), args.mirror)
    flags = ["--data_root", str(folder), "--dataset", args.dataset]
    fetched = folder / "downloads"
    if args.dataset == "aokvqa":
        args.source, args.images = str(fetched / "aokvqa_v1p0"), str(fetched / "coco")
        return flags
    args.source, args.images = str(fetched / "scienceqa"), str(fetched / "images")
    flags += ["--img_type", "vit", "--use_caption"]
    models = [str(Path(args.models_dir) / row.target) for row in rows if row.model]
    return flags + [word for model in models for word in ("--model", model)]


def prepare(args: argparse.Namespace) -> None:
    """Write the data folder --output from --source and --images."""
    source = open_source(args.dataset, args.source, args.images)
    splits = with_minis(source.splits)
    out = Path(args.output)
    folder = out / args.dataset
    check_output(folder, source, splits, args.overwrite)
    writable_dir(folder, "--output")
    for note in source.notes:
        print0(f"note: {note}")
    shown = write_images(out / "images", source, args.strict) if source.pictures else 0
    if args.dataset == "aokvqa":
        write_json(folder / "id_map.json", source.ids, indent=None)
    write_json(folder / "pid_splits.json", splits, indent=None)
    write_json(folder / "problems.json", source.problems)
    sizes = ", ".join(f"{len(splits[name])} {name}" for name in ("train", "val", "test"))
    print0(f"{folder}: {len(source.problems)} questions ({sizes}), {shown} with pictures in {out / 'images'}")
    if not any((out / f"vision_features/vit{suffix}").exists() for suffix in FEATURE_SUFFIXES):
        images = ["--data_root", f"{out}/images"]
        next_step(
            ["python", "extract_features.py", *images, "--output_dir", f"{out}/vision_features", "--img_type", "vit"],
            ["python", "extract_caption.py", *images, "--output", f"{out}/captions.json"],
        )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    flags = download(args) if args.download is not None else None
    prepare(args)
    if flags is not None:
        doctor = Path(__file__).resolve().with_name("doctor.py")
        print0(shlex.join(["python", "tools/doctor.py", *flags]))
        sys.exit(subprocess.run([sys.executable, str(doctor), *flags]).returncode)


if __name__ == "__main__":
    run(main)
