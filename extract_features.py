"""Vision features of all images, one row each: {output_dir}/{vit.pth,detr.npy,clip.npy,resnet.npy}.

    python extract_features.py --data_root images --output_dir vision_features --img_type vit
    python extract_features.py --data_root images --output_dir vision_features --img_type vit \\
        --model_name test_vit --random_weights                            # a trial where no weights can be had

Rows are the folders {data_root}/{qid} sorted by number, the image image.png or else choice_0.png. Written beside the
features: name_map.json (qid -> row) and {img_type}.json (shape, network, weights, rows, broken images). Killed and run
again it continues, and gives the same bytes. Left out: several GPUs - one does ScienceQA's 11,208 images in minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ares import files
from ares.cli import IMG_TYPES, HelpFormatter, UserError, print0, progress, refuse, run, warn0
from ares.files import atomic_path, read_json, writable_dir, write_json
from vision.memory import keep_freed_memory
from vision.networks import (
    MODEL_NAMES,
    Encoder,
    by_size,
    list_images,
    load_encoder,
    pick_device,
    read_image,
    weights_identity,
)

if TYPE_CHECKING:
    import torch

MOST_WORKERS = 16  # by default: a GPU takes no more images than they decode
FILES = {"vit": "vit.pth", "detr": "detr.npy", "clip": "clip.npy", "resnet": "resnet.npy"}  # the released names


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--data_root", default="images", metavar="DIR", help="folder of {qid}/image.png")
    files.add_argument(
        "--splits", nargs="+", metavar="NAME", help="subfolders of it (default: train val test if there)"
    )
    files.add_argument("--output_dir", default="vision_features", metavar="DIR", help="where the features go")
    files.add_argument("--overwrite", action="store_true", help="replace features that were made otherwise")
    files.add_argument(
        "--strict", action="store_true", help="stop at a broken image (default: listed, a row of zeros)"
    )
    network = parser.add_argument_group("network")
    network.add_argument("--img_type", choices=IMG_TYPES, default="vit", help="kind of features")
    network.add_argument("--model_name", help="another timm model (detr: transformers); its shape is recorded")
    network.add_argument("--weights", metavar="PATH", help="weights on disk (default: from the hub)")
    network.add_argument("--random_weights", action="store_true", help="no weights at all: for trials only")
    network.add_argument("--seed", type=int, default=0, help="seed of --random_weights")
    running = parser.add_argument_group("running")
    running.add_argument("--batch_size", type=int, default=16, help="images at a time (default: %(default)s)")
    running.add_argument(
        "--workers",
        type=int,
        help="processes that decode images, 0: this one (default: with a GPU one per core; else 0)",
    )
    running.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    running.add_argument("--dtype", default="float32", choices=("float32", "float16"), help="type of stored numbers")
    args = parser.parse_args(argv)
    refuse(
        ["--batch_size: at least 1 image at a time"] * (args.batch_size < 1)
        + ["--workers: a number of processes cannot be negative"] * (args.workers is not None and args.workers < 0)
        + ["--weights and --random_weights contradict each other: drop one"]
        * bool(args.weights and args.random_weights)
    )
    return args


def describe(args: argparse.Namespace, images: dict[str, Path]) -> dict[str, Any]:
    """What the bytes of the features depend on, but for the images' contents; recorded beside them."""
    listing = "".join(f"{qid} {path.name} {os.path.getsize(path)}\n" for qid, path in images.items())
    weights = "random" if args.random_weights else args.weights or "pretrained"
    return {
        "img_type": args.img_type,
        "model_name": args.model_name or MODEL_NAMES[args.img_type],
        "weights": "local" if args.weights else weights,
        "weights_file": f"seed {args.seed}" if args.random_weights else weights_identity(weights),
        "dtype": args.dtype,
        "rows": len(images),
        "images": hashlib.sha256(listing.encode()).hexdigest(),
    }


def changed(settings: dict[str, Any], record: Any) -> list[str]:
    """Names of the settings that differ from a record of an earlier run."""
    record = record if isinstance(record, dict) else {}
    return [name for name in settings if settings[name] != record.get(name)]


def check_output(out: Path, settings: dict[str, Any], name_map: dict[str, int], overwrite: bool) -> bool:
    """Whether the features are there already. Raises UserError rather than replace what was made otherwise."""
    file, sidecar = out / FILES[settings["img_type"]], out / f"{settings['img_type']}.json"
    if file.exists() and not overwrite:
        other = changed(settings, read_json(sidecar, "--output_dir", dict)) if sidecar.exists() else ["origin"]
        if other:
            raise UserError(
                f"--output_dir: {file} is there, made with another {', '.join(other)}; add --overwrite to replace it, "
                "or name another folder"
            )
    map_file = out / "name_map.json"
    if map_file.exists() and not overwrite and read_json(map_file, "--output_dir") != name_map:
        raise UserError(
            f"--output_dir: {map_file} numbers other images, so other features in {out} would no longer fit; "
            "add --overwrite to replace it, or name another folder"
        )
    return file.exists() and not overwrite


class Rows:
    """The features while they are made: a mapped file on disk, and beside it how many rows of it are done."""

    def __init__(self, out: Path, settings: dict[str, Any], stored: tuple[int, ...]):
        self.array_file = out / f".{settings['img_type']}.part.npy"
        self.record_file = out / f".{settings['img_type']}.part.json"
        self.record = {**settings, "stored": list(stored), "done": 0, "broken": []}
        if self.record_file.exists() and self.array_file.exists():
            earlier = read_json(self.record_file, "--output_dir", dict)
            if type(earlier.get("done")) is not int or not isinstance(earlier.get("broken"), list):
                raise UserError(f"--output_dir: {self.record_file} is damaged; remove it to begin anew")
            if not changed({**settings, "stored": list(stored)}, earlier):
                self.record = earlier
                print0(f"continuing after {self.record['done']} of {settings['rows']} images")
        if self.record["done"]:
            self.array = _load_rows(self.array_file, settings, stored)
        else:
            self.record_file.unlink(missing_ok=True)
            with files.writing(self.array_file):
                self.array = np.lib.format.open_memmap(
                    self.array_file, mode="w+", dtype=settings["dtype"], shape=(settings["rows"], *stored)
                )
                with open(self.array_file, "rb+") as file:  # a full disk would end a process that writes to the map
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)

    def append(self, features: np.ndarray, broken: Sequence[str]) -> None:
        """Add a batch; it counts once it is on disk."""
        done = self.record["done"]
        self.array[done : done + len(features)] = features
        with files.writing(self.array_file):
            self.array.flush()
        self.record["done"] = done + len(features)
        self.record["broken"] += broken
        write_json(self.record_file, self.record)

    def finish(self, path: Path) -> None:
        """Move the rows to `path`: a .npy as it is, a .pth as one tensor."""
        if path.suffix == ".npy":
            os.replace(self.array_file, path)  # each batch of it was flushed
        else:
            import torch

            # into an open file: given a path, torch would write the temporary name into the archive
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                torch.save(torch.from_numpy(self.array), file)
        self.array_file.unlink(missing_ok=True)
        self.record_file.unlink(missing_ok=True)


def _load_rows(path: Path, settings: dict[str, Any], stored: tuple[int, ...]) -> np.ndarray:
    """The half-made array, mapped for writing. Raises UserError if it is not what its record says."""
    fits = False
    with contextlib.suppress(OSError, ValueError, EOFError):
        array = np.load(path, mmap_mode="r+", allow_pickle=False)
        fits = array.shape == (settings["rows"], *stored) and array.dtype == settings["dtype"]
    if not fits:
        raise UserError(f"--output_dir: {path} is damaged; remove it, then run the same command again")
    return array


@dataclass
class Batch:
    """Consecutive rows: the images of each size stacked, with their places among the rows; why others are broken."""

    qids: list[str]
    stacks: list[tuple[list[int], torch.Tensor]]
    broken: dict[str, str] = field(default_factory=dict)


def decoders(asked: int | None, device: str) -> int:
    """Processes that decode images: as asked; else one per core beside a GPU, and none on a CPU, where they and the
    network would hold each other up."""
    if asked is not None:
        return asked
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS) if device == "cuda" else 0


def batches(encoder: Encoder, images: dict[str, Path], done: int, batch_size: int, workers: int) -> Iterator[Batch]:
    """From row `done` on, in order, decoded and stacked by `workers` processes, or by threads of this one."""
    from torch.utils.data import DataLoader

    class Images:
        def __init__(self):
            self.rows = list(images.items())[done:]

        def __len__(self):
            return len(self.rows)

        def __getitems__(self, places):
            return list(map(self.load, places) if workers else threads.map(self.load, places))

        def load(self, place):
            qid, path = self.rows[place]
            try:
                return qid, encoder.transform(read_image(path)), ""
            except (OSError, ValueError) as error:
                return qid, None, f"{path}: {error}"

    def collate(rows):
        sound = [place for place, (_, pixels, _) in enumerate(rows) if pixels is not None]
        stacks = [
            ([sound[i] for i in places], pixels) for places, pixels in by_size([rows[place][1] for place in sound])
        ]
        return Batch([qid for qid, *_ in rows], stacks, {qid: why for qid, pixels, why in rows if pixels is None})

    context = "fork" if workers else None  # what is above cannot be pickled, as Python 3.14's own way would
    # threads that stay would slow every other product: OpenMP waits less eagerly where it has more of them than cores
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        yield from DataLoader(
            Images(), batch_size=batch_size, num_workers=workers, collate_fn=collate, multiprocessing_context=context
        )


def extract(encoder: Encoder, images: dict[str, Path], rows: Rows, args: argparse.Namespace) -> None:
    """Fill the rows that are not done. Raises UserError at a broken image with --strict."""
    done = rows.record["done"]
    workers = decoders(args.workers, next(encoder.network.parameters()).device.type)
    with (
        progress(desc=encoder.img_type, total=len(images), initial=done, unit="img") as bar,
        ThreadPoolExecutor(1) as writer,  # the disk is waited for while the next batch is computed
    ):
        written = None
        for batch in batches(encoder, images, done, args.batch_size, workers):
            for qid, reason in batch.broken.items():
                if args.strict:
                    raise UserError(f"--strict: question {qid}: cannot read {reason}")
                warn0(f"question {qid}: cannot read {reason}; its row is zeros")
            features = np.zeros((len(batch.qids), *encoder.stored), dtype=args.dtype)
            for places, pixels in batch.stacks:
                features[places] = encoder.features(pixels).numpy()
            if written:
                written.result()
            written = writer.submit(rows.append, features, list(batch.broken))
            bar.update(len(batch.qids))
        if written:
            written.result()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    images = list_images(args.data_root, args.splits)
    out = writable_dir(args.output_dir, "--output_dir")
    settings = describe(args, images)
    name_map = {qid: row for row, qid in enumerate(images)}
    file = out / FILES[args.img_type]
    if check_output(out, settings, name_map, args.overwrite):
        if not (out / "name_map.json").exists():
            write_json(out / "name_map.json", name_map)
        print0(f"{file}: {len(images)} rows, there already")
        return

    import torch

    torch.backends.cudnn.deterministic = True
    keep_freed_memory()
    device = pick_device(args.device)
    weights = "random" if args.random_weights else args.weights or "pretrained"
    encoder = load_encoder(args.img_type, args.model_name, weights, device, args.seed)
    print0(f"{settings['model_name']} ({encoder.weights} weights) on {device}: {encoder.shape} per image")
    rows = Rows(out, settings, encoder.stored)
    extract(encoder, images, rows, args)
    broken = rows.record["broken"]
    # the features come last: where they are, all of it is
    file.unlink(missing_ok=True)
    write_json(out / "name_map.json", name_map)
    write_json(out / f"{args.img_type}.json", {"shape": list(encoder.shape), **settings, "broken": broken})
    rows.finish(file)
    zeros = f", {len(broken)} broken images as zeros" if broken else ""
    print0(f"{file}: {len(images)} rows of {encoder.stored}{zeros}")


if __name__ == "__main__":
    run(main)
