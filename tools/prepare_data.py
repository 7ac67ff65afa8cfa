"""From a public data set to a data folder that every stage reads: problems.json, pid_splits.json, images/{qid}/.

    python tools/prepare_data.py scienceqa --source ScienceQA/data/scienceqa --images ScienceQA/images --output data
    python tools/prepare_data.py scienceqa --source derek-thomas/ScienceQA --output data
    python tools/prepare_data.py aokvqa --source aokvqa_v1p0 --images coco --output aokvqa_data
    python tools/prepare_data.py aokvqa --source HuggingFaceM4/A-OKVQA --output aokvqa_data

--source is the official folder, or a `datasets` data set: a hub id, a folder of parquet files (train-*.parquet, ...),
or a folder of save_to_disk. Ids are the source's; where it has none (derek-thomas/ScienceQA), questions are numbered
in the order of the splits. A-OKVQA: the rationales of a question, one after the other, become its solution; val
serves as test (the answers of the real one are hidden); {output}/aokvqa/id_map.json keeps question and image ids.

Splits that the source has are kept, ScienceQA's own mini splits among them (1,272, 424 and 424 questions, drawn at
random). Others are made: trainval (train, then val), and for quick trials the first questions of a split: minitrain
64, miniminitrain 256, minival 64, miniminival 4, minitest 64. Pictures are never encoded again:
hard links to files (copies across disks), or the bytes that the data set holds, PNG or JPEG, as image.png.

problems.json is written last. Killed and run again it finishes. Leaves out captions (extract_caption.py), features
(extract_features.py) and downloads from anywhere but the Hugging Face hub: docs/data.md has the addresses.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares.cli import HelpFormatter, UserError, print0, progress, run, warn0
from ares.files import atomic_path, place_file, read_json, writable_dir, write_json
from ares.images import as_rgb, media_type, open_image, upright
from tools.data_sources import Pictures, Source, open_source

MINIS = {"minitrain": ("train", 64), "miniminitrain": ("train", 256), "minival": ("val", 64)}
MINIS |= {"miniminival": ("val", 4), "minitest": ("test", 64)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("dataset", choices=("scienceqa", "aokvqa"), help="which data set --source is")
    parser.add_argument("--source", required=True, metavar="PLACE", help="official folder, datasets folder or hub id")
    parser.add_argument("--images", metavar="DIR", help="images of an official folder: ScienceQA's, or COCO's")
    parser.add_argument("--output", metavar="DIR", help="the --data_root to be (default: data, aokvqa_data)")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set that is there")
    parser.add_argument("--strict", action="store_true", help="stop when a picture is absent or unreadable")
    args = parser.parse_args(argv)
    args.output = args.output or {"scienceqa": "data", "aokvqa": "aokvqa_data"}[args.dataset]
    return args


def with_minis(splits: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The splits, and of the smaller ones that flags name those that are absent: the first questions of a split."""
    made = {name: list(qids) for name, qids in splits.items()}
    made.setdefault("trainval", list(dict.fromkeys([*made["train"], *made["val"]])))
    for name, (source, size) in MINIS.items():
        made.setdefault(name, made[source][:size])
    return made


def check_output(folder: Path, source: Source, splits: Mapping[str, Sequence[str]], overwrite: bool) -> None:
    """Raise UserError rather than replace another data set, or leave another one's pictures among this one's."""
    images = folder.parent / "images"
    bare = [qid for qid, problem in source.problems.items() if not problem["image"] and (images / qid).exists()]
    stale = [qid for qid in bare if source.pictures and not source.pictures(qid)]
    if stale:
        raise UserError(
            f"--output: {images} holds pictures for {len(stale)} questions that have none here (the first is "
            f"{stale[0]}): they are another data set's; move them away, or name another folder"
        )
    if overwrite:
        return
    for name, value in (("problems.json", source.problems), ("pid_splits.json", splits)):
        path = folder / name
        if path.exists() and (there := read_json(path, "--output")) != value:
            if name == "pid_splits.json" and isinstance(there, dict) and there.items() <= dict(splits).items():
                continue  # the source's own file: minis are added
            raise UserError(f"--output: {path} is there and differs; add --overwrite to replace it, or name another")


def write_pictures(folder: Path, pictures: Pictures) -> str | None:
    """Put a question's pictures into its folder; what is there already stays. Says what is wrong with one, if so.

    Raises UserError where the disk takes no more.
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
            if isinstance(data, Path):
                place_file(data, target)
            elif not (target.is_file() and target.read_bytes() == data):
                with atomic_path(target) as temporary:
                    temporary.write_bytes(data)
        except OSError as error:
            raise UserError(f"--output: cannot write {target} ({error.strerror or error})") from error
    return None


def _as_png(picture: bytes) -> bytes:
    """Other formats (BMP, TIFF) as upright PNG. Raises OSError or ValueError where it is no image."""
    out = io.BytesIO()
    with open_image(picture) as image:
        image = upright(image)
        kept = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        (image if kept else as_rgb(image)).save(out, format="PNG")  # PNG has no CMYK
    return out.getvalue()


def write_images(folder: Path, source: Source, strict: bool) -> int:
    """Write the pictures of all questions and return how many questions have some. Warns of those without theirs."""
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


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
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
    print0(
        f"next: python extract_features.py --data_root {out}/images --output_dir {out}/vision_features --img_type vit"
    )


if __name__ == "__main__":
    run(main)
