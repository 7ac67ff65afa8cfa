"""Vision features: one file for all images, mapped from disk, gathered batch by batch.

The published ViT features are 6.6 GB; no process ever holds a copy of them. Leaves out making them
(extract_features.py) and finding them (ares/data_folder.py).

    features = VisionFeatures("vision_features/vit.pth", name_map, "vit")
    features.gather(["1", "2"]).shape  # (2, 145, 1024)
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ares.checkpoints import img_shape
from ares.cli import DiskError, UserError, warn0
from ares.files import atomic_path, read_json
from ares.launch import only_one

WHOLE = 2**28  # bytes: features up to this size are hashed whole


class VisionFeatures:
    """Vision features of all images, mapped from disk: nothing is read but the rows that a batch gathers.

    Takes `.npy`, `.pth`/`.pt` (one tensor; never executed: weights_only) and `.safetensors` (one tensor), of fp16,
    bf16, fp32 or fp64, (rows, patches, dim), or (rows, dim) for one vector repeated over all patches. A `.pth` of a
    torch before 1.6, which cannot be mapped, is converted once, to `{name}.npy` beside it. Pickles and forks as a
    path: each process maps the file itself, and the system keeps one copy of its pages for all.

    Args:
        path: the feature file. A sidecar `{img_type}.json` beside it, {"shape": [patches, dim], ...} as written by
            extract_features.py, tells the shape to expect; without one it is `img_shape[img_type]`.
        name_map: qid -> row.

    Raises UserError if the file cannot be mapped or has another shape.
    """

    def __init__(self, path: str | Path, name_map: Mapping[str, int], img_type: str):
        self.path, self.img_type = Path(path), img_type
        self.name_map = dict(name_map)
        self.shape, self._recorded_rows = self._expected_shape()
        try:
            found, floating = self._open_shape()
        except UserError:
            raise
        except Exception as error:  # three libraries, each with its own errors for a broken file
            raise UserError(f"--vision_features: cannot map {self.path} ({_reason(error)})") from error
        if not floating:
            raise UserError(f"--vision_features: {self.path} holds no floating point numbers")
        if found[1:] not in (self.shape, self.shape[1:]) or (len(found) == 2 and img_type != "resnet"):
            wanted = f"(N, {self.shape[1]})" if img_type == "resnet" else f"(N, {self.shape[0]}, {self.shape[1]})"
            raise UserError(
                f"--vision_features: {self.path} has shape {found}, but --img_type {img_type} needs {wanted}; "
                "name the right file or --img_type"
            )
        if self._recorded_rows not in (None, found[0]):
            raise UserError(
                f"--vision_features: {self.path} has {found[0]} rows, but {img_type}.json beside it says "
                f"{self._recorded_rows}; the file was cut or replaced: make it again with extract_features.py"
            )
        self.rows = found[0]
        self._repeat = len(found) == 2

    def __len__(self) -> int:
        return self.rows

    def check_finite(self, rows: Sequence[int]) -> None:
        """Raise UserError naming the first of `rows` that holds a NaN or an infinity: it would spoil every weight."""
        for start in range(0, len(rows), 32):
            part = list(rows[start : start + 32])
            sums = self._read(part).flatten(1).sum(1, dtype=torch.float64)
            spoilt = [row for row, total in zip(part, sums.tolist(), strict=True) if not math.isfinite(total)]
            if spoilt:
                qid = next((qid for qid, row in self.name_map.items() if row == spoilt[0]), None)
                whose = f"question {qid}" if qid else "of no question"
                raise UserError(
                    f"--vision_features: row {spoilt[0]} of {self.path} ({whose}) holds NaN or infinity; make the "
                    "file again with extract_features.py"
                )

    def __getitem__(self, row: int) -> torch.Tensor:
        """One row, float32 (patches, dim)."""
        return self._spread(self._read([int(row)]))[0]

    def gather(self, qids: Sequence[str]) -> torch.Tensor:
        """Features of a batch of questions, float32 (B, patches, dim); zeros for one without a row.

        A repeated vector comes as an expanded view: same values, a 512th of the memory; so do the zeros of a batch
        without any image. Do not write into them.
        """
        places = [i for i, qid in enumerate(qids) if qid in self.name_map]
        P, D = self.shape
        if not places:
            return torch.zeros(1, 1, 1).expand(len(qids), P, D)
        batch = torch.zeros((len(qids), D) if self._repeat else (len(qids), P, D))
        batch[places] = self._read([self.name_map[qids[i]] for i in places])
        return self._spread(batch)

    def digest(self, qids: Sequence[str]) -> str:
        """A hash of what the model sees of `qids`, whichever file and row it lies in: tells whether features or name
        map changed since. Of more than WHOLE bytes one patch of every question is read, a different one each time."""
        sha, (P, D) = hashlib.sha256(), self.shape
        whole = self._repeat or len(qids) * P * D * 4 <= WHOLE
        for i, qid in enumerate(qids):
            row = self.name_map.get(qid)
            sha.update(f"{qid}\0{row is not None}\0".encode())
            if row is not None:
                values = self._read([row]) if whole else self._patch(row, i % P)
                sha.update(values.contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    def _patch(self, row: int, patch: int) -> torch.Tensor:
        part = self._mapped[row : row + 1, patch : patch + 1]
        return (torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else part).float()

    def _spread(self, batch: torch.Tensor) -> torch.Tensor:
        return batch[:, None, :].expand(-1, self.shape[0], -1) if self._repeat else batch  # (B, P, D)

    def _read(self, rows: list[int]) -> torch.Tensor:
        """The rows as stored, copied from the mapped file and made float32."""
        array = self._mapped
        if isinstance(array, np.ndarray):
            return torch.from_numpy(array[rows].astype(np.float32, copy=False))
        if isinstance(array, torch.Tensor):
            return array[rows].float()
        return torch.stack([array[row] for row in rows]).float()  # a safetensors slice reads row by row

    @cached_property
    def _mapped(self) -> Any:
        """The open file: a memory-mapped array, a mapped tensor, or a slice of a safetensors file."""
        if self.path.suffix == ".npy":
            return np.load(self.path, mmap_mode="r", allow_pickle=False)
        if self.path.suffix == ".safetensors":
            from safetensors import safe_open

            file = safe_open(self.path, framework="pt")
            names = list(file.keys())
            if len(names) != 1:
                raise UserError(f"--vision_features: {self.path} holds {len(names)} tensors instead of one")
            return file.get_slice(names[0])
        if _is_old_format(self.path):
            return np.load(_mappable_copy(self.path), mmap_mode="r", allow_pickle=False)
        tensor = torch.load(self.path, mmap=True, weights_only=True, map_location="cpu")
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"--vision_features: {self.path} holds a {type(tensor).__name__} instead of one tensor")
        return tensor

    def _open_shape(self) -> tuple[tuple[int, ...], bool]:
        """Shape of the stored array, and whether it is floating point."""
        array = self._mapped
        if isinstance(array, np.ndarray):
            return tuple(array.shape), np.issubdtype(array.dtype, np.floating)
        if isinstance(array, torch.Tensor):
            return tuple(array.shape), array.dtype.is_floating_point
        return tuple(array.get_shape()), array.get_dtype() in ("F16", "BF16", "F32", "F64")

    def _expected_shape(self) -> tuple[tuple[int, int], int | None]:
        """(patches, dim), and the number of rows where the sidecar tells it."""
        sidecar = self.path.with_name(f"{self.img_type}.json")
        if not sidecar.is_file():
            return img_shape[self.img_type], None
        told = read_json(sidecar, "--vision_features")
        shape = told.get("shape") if isinstance(told, dict) else None
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise UserError(f'--vision_features: {sidecar} must hold {{"shape": [patches, dim]}}')
        if told.get("weights") == "random" or str(told.get("weights_file")).startswith("seed "):
            warn0(f"{self.path} was made by a network with random weights: for trials only")
        return (shape[0], shape[1]), told.get("rows")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_mapped"}


def _is_old_format(path: Path) -> bool:
    """Whether a `.pth` is no zip archive: how torch saved before 1.6. Such a file cannot be mapped."""
    with open(path, "rb") as file:
        return file.read(2) not in (b"PK", b"")


def _mappable_copy(path: Path) -> Path:
    """`{path}.npy` with the tensor of an old-format file, made by whichever process comes first, kept for the next.

    It bears the original's time stamp: another original is converted anew. Raises UserError if it cannot be written.
    """
    copy = path.with_name(path.name + ".npy")

    def is_made() -> bool:
        return copy.is_file() and copy.stat().st_mtime_ns == path.stat().st_mtime_ns

    if is_made():
        return copy
    try:
        with only_one(path.with_name(f".{path.name}.lock"), f"{path}", required=False, wait=True):
            if not is_made():
                stamp = path.stat().st_mtime_ns
                tensor = torch.load(path, weights_only=True, map_location="cpu")
                if not isinstance(tensor, torch.Tensor):
                    raise UserError(f"--vision_features: {path} holds a {type(tensor).__name__} instead of one tensor")
                print(f"{path}: saved by a torch before 1.6; a copy that can be mapped goes to {copy}", flush=True)
                tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
                with atomic_path(copy) as temporary:
                    with open(temporary, "wb") as file:
                        np.save(file, tensor.numpy())
                    os.utime(temporary, ns=(stamp, stamp))
    except (DiskError, OSError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise UserError(
            f"--vision_features: {path} was saved by a torch before 1.6, cannot be mapped, and no copy can be written "
            f"beside it ({reason}); make its folder writable, or load it once and save it again"
        ) from error
    return copy


def _reason(error: Exception) -> str:
    """One line on why a feature file cannot be mapped, with the fix where there is one."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        return "it holds pickled objects, which are never executed; save one plain tensor"
    return " ".join(text.split())[:200] or type(error).__name__
