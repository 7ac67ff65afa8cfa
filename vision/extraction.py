"""Features of many images: the images of a folder, their decoding in batches, and rows on disk that survive a kill.

    images = list_images("images")
    store = FeatureStore(Path("vision_features"), settings, encoder.stored)
    extract(encoder, images, store)
    store.finish(Path("vision_features/vit.pth"))

The script is extract_features.py; torch is imported by the functions that need it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ares import files
from ares.cli import UserError, print0, progress, warn0
from ares.data_folder import question_images
from vision.networks import Encoder, by_size, read_image

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "val", "test")
MAX_WORKERS = 16  # of the default: a GPU needs no more
SHM, SHARED_MEMORY = "/dev/shm", 2e9  # bytes: MAX_WORKERS hold two batches each, 28 MB of the default size
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def list_images(folder: str | Path, splits: Sequence[str] | None = None) -> dict[str, Path]:
    """Question id -> image file, sorted by number: `{qid}/image.png`, else the first choice image.

    `splits` names subfolders that hold the questions' folders; the default is those of train, val and test that exist.
    Raises UserError if a folder is absent or holds no image, or if a question has two folders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--data_root: {folder} is no folder; name the folder that holds {{qid}}/image.png")
    found = [name for name in splits or SPLITS if (folder / name).is_dir()]
    if splits and len(found) < len(splits):
        raise UserError(f"--splits: no folder {', '.join(sorted(set(splits) - set(found)))} in {folder}")
    images: dict[str, Path] = {}
    for root in [folder / name for name in found] or [folder]:
        for place in root.iterdir():
            paths = question_images(root, place.name) if place.is_dir() else []
            if paths and (other := images.setdefault(place.name, paths[0])) != paths[0]:
                raise UserError(f"--data_root: question {place.name} has two folders, {other.parent} and {place}")
    if not images:
        raise UserError(f"--data_root: no {{qid}}/image.png or {{qid}}/choice_0.png in {folder}")
    # numbers by value, then other ids by name
    order = sorted(images, key=lambda qid: (0, int(qid), qid) if qid.isdecimal() else (1, 0, qid))
    return {qid: images[qid] for qid in order}


class FeatureStore:
    """Features under construction: a mapped array on disk, and beside it a record of how many rows are finished.

    Both are in `folder`: `.{img_type}.part.npy` and `.{img_type}.part.json`. `settings` are at least img_type, dtype
    and rows; the record of an earlier run is continued if it has the same ones. `stored`: shape of one image's
    features. Raises UserError if the files of an earlier run are damaged, DiskError.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], stored: tuple[int, ...]):
        self.array_file = folder / f".{settings['img_type']}.part.npy"
        self.record_file = folder / f".{settings['img_type']}.part.json"
        settings = {**settings, "stored": list(stored)}
        if not self.array_file.exists():
            self.record_file.unlink(missing_ok=True)
        self.record = read_record(self.record_file, "--output_dir", settings, {"done": 0, "broken": []})
        shape = (settings["rows"], *stored)
        if self.record["done"]:
            print0(f"continuing after {self.record['done']} of {settings['rows']} images")
            self.array = None
            with contextlib.suppress(OSError, ValueError, EOFError):
                self.array = np.load(self.array_file, mmap_mode="r+", allow_pickle=False)
            if self.array is None or (self.array.shape, self.array.dtype) != (shape, np.dtype(settings["dtype"])):
                fault = "is damaged; remove it, then run the same command again"
                raise UserError(f"--output_dir: {self.array_file} {fault}")
            return
        self.record_file.unlink(missing_ok=True)
        with files.writing(self.array_file):
            self.array = np.lib.format.open_memmap(self.array_file, mode="w+", dtype=settings["dtype"], shape=shape)
            with open(self.array_file, "rb+") as file:  # a full disk would kill the process that writes to the map
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)

    def append(self, features: np.ndarray, broken: Sequence[str]) -> None:
        """Add the rows of a batch, and record them once they are on disk."""
        done = self.record["done"]
        self.array[done : done + len(features)] = features
        with files.writing(self.array_file):
            self.array.flush()
        self.record["done"] = done + len(features)
        self.record["broken"] += broken
        files.write_json(self.record_file, self.record)

    def finish(self, path: Path) -> None:
        """Move the rows to `path`: a .npy as it is, a .pth as one tensor."""
        if path.suffix == ".npy":
            os.replace(self.array_file, path)  # every batch was flushed
        else:
            import torch

            # into an open file: given a path, torch would write the temporary name into the archive
            with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
                torch.save(torch.from_numpy(self.array), file)
        self.array_file.unlink(missing_ok=True)
        self.record_file.unlink(missing_ok=True)


def read_record(path: Path, flag: str, settings: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run with the same settings recorded in `path`, or a new record: `settings` and `fresh`. Raises
    UserError, naming `flag`, if a field of `fresh` is of another type there."""
    if path.exists():
        earlier = files.read_json(path, flag, dict)
        if any(type(earlier.get(name)) is not type(value) for name, value in fresh.items()):
            raise UserError(f"{flag}: {path} is damaged; remove it to begin anew")
        if not changed(settings, earlier):
            return earlier
    return {**settings, **fresh}


def changed(settings: dict[str, Any], record: Any) -> list[str]:
    """Names of the settings that differ from an earlier run's record."""
    return [name for name in settings if not isinstance(record, dict) or settings[name] != record.get(name)]


@dataclass
class Batch:
    """Consecutive images: those of each size stacked (B, 3, H, W), with their positions in the batch."""

    qids: Sequence[str]
    stacks: list[tuple[list[int], torch.Tensor]]
    broken: dict[str, str] = field(default_factory=dict)  # question id -> why its image cannot be read


def default_workers(device: str) -> int:
    """Decoding processes beside a GPU: one per core. None on a CPU, where they would slow the network down, nor where
    their batches do not fit into the shared memory: a process that fills it is killed by a bus error."""
    if device != "cuda":
        return 0
    free = shutil.disk_usage(SHM).free if os.path.isdir(SHM) else 0
    if free < SHARED_MEMORY:
        print0(
            f"note: no data loading workers: {SHM} has {free / 1e6:.0f} MB free, they need "
            f"{SHARED_MEMORY / 1e9:.0f} GB; use docker run --shm-size=4g, or --workers N"
        )
        return 0
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


def batches(encoder: Encoder, images: dict[str, Path], done: int, batch_size: int, workers: int) -> Iterator[Batch]:
    """The images from number `done` on, in order, decoded by `workers` processes, or by threads of this one."""
    from torch.utils.data import DataLoader

    def load(path):
        try:
            return encoder.transform(read_image(path))
        except (OSError, ValueError) as error:
            return f"{path}: {error}"

    def collate(rows):
        qids, paths = zip(*rows, strict=True)
        loaded = list(map(load, paths) if workers else threads.map(load, paths))
        sound = [position for position, pixels in enumerate(loaded) if not isinstance(pixels, str)]
        groups = by_size([loaded[position] for position in sound])
        stacks = [([sound[i] for i in positions], pixels) for positions, pixels in groups]
        return Batch(qids, stacks, {qid: why for qid, why in zip(qids, loaded, strict=True) if isinstance(why, str)})

    context = "fork" if workers else None  # the default of Python 3.14 would have to pickle the functions above
    # the threads end with the loop: OpenMP waits less eagerly in a process with more of them than cores, which slows
    # every other matrix product
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        rows = list(images.items())[done:]
        yield from DataLoader(
            rows, batch_size, num_workers=workers, collate_fn=collate, multiprocessing_context=context
        )


def extract(
    encoder: Encoder, images: dict[str, Path], store: FeatureStore, batch_size: int = 16, workers: int | None = None,
    strict: bool = False,
) -> None:  # fmt: skip
    """Fill the rows of `store` that are not done; broken images get zeros, or, with `strict`, raise UserError.
    `workers`: processes that decode images, 0: threads of this process; None: `default_workers`."""
    if workers is None:
        workers = default_workers(next(encoder.network.parameters()).device.type)
    done = store.record["done"]
    with (
        progress(desc=encoder.img_type, total=len(images), initial=done, unit="img") as bar,
        ThreadPoolExecutor(1) as writer,  # writes a batch to disk while the next one is computed
    ):
        written = None
        for batch in batches(encoder, images, done, batch_size, workers):
            for qid, reason in batch.broken.items():
                if strict:
                    raise UserError(f"--strict: question {qid}: cannot read {reason}")
                warn0(f"question {qid}: cannot read {reason}; its row is zeros")
            features = np.zeros((len(batch.qids), *encoder.stored), dtype=store.array.dtype)
            for positions, pixels in batch.stacks:
                features[positions] = encoder.features(pixels).numpy()
            if written:
                written.result()
            written = writer.submit(store.append, features, list(batch.broken))
            bar.update(len(batch.qids))
        if written:
            written.result()


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of up to 1 GB instead of returning those over 32 MB to the system: getting the next
    one page by page took 11% of a ViT-L's time on a CPU. Does nothing with another C library."""
    with contextlib.suppress(AttributeError, OSError):
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, 2**30)
