"""Vision features: one file for all images, mapped from disk; batches are gathered from it.

The published ViT features are 6.6 GB; no process holds a copy of them. ares/data_folder.py finds such a file,
extract_features.py makes one.

    features = VisionFeatures("vision_features/vit.pth", name_map, "vit")
    features.gather(["1", "2"]).shape  # (2, 145, 1024)
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ares.cli import DiskError, UserError, img_shape, in_one_line, warn0
from ares.files import atomic_path, read_json
from ares.launch import only_one

WHOLE = 2**28  # bytes; smaller features are hashed completely


class VisionFeatures:
    """Vision features of all images, mapped from disk: only the rows of a batch are read.

    The file is `.npy`, or one tensor in `.pth`/`.pt` (loaded with weights_only) or `.safetensors`, of fp16, bf16, fp32
    or fp64: (rows, patches, dim), or (rows, dim) for one vector that is repeated over all patches. A `.pth` of a torch
    before 1.6 cannot be mapped; it is converted once, to `{name}.npy` beside it. A pickle or fork holds the path: each
    process maps the file itself, and the system keeps one copy of its pages.

    `{img_type}.json` beside it, as extract_features.py writes it, gives the expected "shape": [patches, dim]; without
    it that is `img_shape[img_type]`. `name_map`: question id -> row. Raises UserError if the file cannot be mapped or
    has another shape.
    """

    def __init__(self, path: str | Path, name_map: Mapping[str, int], img_type: str):
        self.path, self.img_type = Path(path), img_type
        self.name_map = dict(name_map)
        self.shape, recorded_rows = self._expected_shape()
        try:
            found, floating = tuple(self._mapped.shape), self._mapped.is_floating_point()
        except UserError:
            raise
        except Exception as error:  # three libraries, each with its own errors for a broken file
            why = in_one_line(error, 200)
            if isinstance(error, pickle.UnpicklingError):
                why = "it holds pickled objects, which are never executed; save one plain tensor"
            raise UserError(f"--vision_features: cannot map {self.path} ({why})") from error
        self.rows, self._repeat = found[0] if found else 0, len(found) == 2
        fault = None
        if not floating:
            fault = "holds no floating point numbers"
        elif found[1:] not in (self.shape, self.shape[1:]) or (self._repeat and img_type != "resnet"):
            wanted = f"(N, {self.shape[1]})" if img_type == "resnet" else f"(N, {self.shape[0]}, {self.shape[1]})"
            needs = f"--img_type {img_type} needs {wanted}; name the right file or --img_type"
            fault = f"has shape {found}, but {needs}"
        elif recorded_rows not in (None, self.rows):
            says = f"{img_type}.json beside it says {recorded_rows}; the file was cut or replaced"
            fault = f"has {self.rows} rows, but {says}: make it again with extract_features.py"
        if fault:
            raise UserError(f"--vision_features: {self.path} {fault}")

    def __len__(self) -> int:
        return self.rows

    def check_finite(self, rows: Sequence[int]) -> None:
        """Raise UserError naming the first of `rows` with a NaN or an infinity, which would spoil every weight."""
        for start in range(0, len(rows), 32):
            part = list(rows[start : start + 32])
            sums = self._read(part).flatten(1).sum(1, dtype=torch.float64)
            if bad := [row for row, total in zip(part, sums.tolist(), strict=True) if not math.isfinite(total)]:
                owners = [f"question {qid}" for qid, row in self.name_map.items() if row == bad[0]]
                whose = owners[0] if owners else "of no question"
                fault = f"row {bad[0]} of {self.path} ({whose}) holds NaN or infinity"
                raise UserError(f"--vision_features: {fault}; make the file again with extract_features.py")

    def __getitem__(self, row: int) -> torch.Tensor:
        """One row, float32 (patches, dim)."""
        return self._spread(self._read([int(row)]))[0]

    def gather(self, qids: Sequence[str]) -> torch.Tensor:
        """Features of a batch of questions, float32 (B, patches, dim); zeros for those without a row.

        A repeated vector is an expanded view, with a 512th of the memory, as are the zeros of a batch without any
        image: do not write into them.
        """
        found, (P, D) = [i for i, qid in enumerate(qids) if qid in self.name_map], self.shape
        if not found:
            return torch.zeros(1, 1, 1).expand(len(qids), P, D)
        batch = torch.zeros((len(qids), D) if self._repeat else (len(qids), P, D))
        batch[found] = self._read([self.name_map[qids[i]] for i in found])
        return self._spread(batch)

    def digest(self, qids: Sequence[str]) -> str:
        """A hash of the features of `qids`, which changes with the features or the name map, but not with the file's
        form or order. Of more than WHOLE bytes only one patch of each question is read, the i-th patch of the i-th."""
        sha, (P, D) = hashlib.sha256(), self.shape
        whole = self._repeat or len(qids) * P * D * 4 <= WHOLE
        for i, qid in enumerate(qids):
            row = self.name_map.get(qid)
            sha.update(f"{qid}\0{row is not None}\0".encode())
            if row is not None and whole:
                sha.update(self._read([row]).contiguous().numpy().tobytes())
            elif row is not None:
                sha.update(self._mapped[row, i % P].float().numpy().tobytes())
        return sha.hexdigest()[:16]

    def _spread(self, batch: torch.Tensor) -> torch.Tensor:
        return batch[:, None, :].expand(-1, self.shape[0], -1) if self._repeat else batch  # (B, P, D)

    def _read(self, rows: list[int]) -> torch.Tensor:
        """The rows as stored, copied from the mapped file as float32."""
        return self._mapped[rows].float()

    @cached_property
    def _mapped(self) -> torch.Tensor:
        """The stored tensor, mapped: only rows that are used are read."""
        if self.path.suffix == ".npy":
            return _map_array(self.path)
        if self.path.suffix == ".safetensors":
            from safetensors import safe_open

            file = safe_open(self.path, framework="pt")
            names = list(file.keys())
            if len(names) != 1:
                raise UserError(f"--vision_features: {self.path} holds {len(names)} tensors instead of one")
            return file.get_tensor(names[0])  # mapped, too
        with open(self.path, "rb") as file:
            old_format = file.read(2) not in (b"PK", b"")  # torch before 1.6 wrote no zip archives
        if old_format:
            return _map_array(_mappable_copy(self.path))
        return _load_tensor(self.path, mmap=True)

    def _expected_shape(self) -> tuple[tuple[int, int], int | None]:
        """(patches, dim), and the number of rows if the JSON beside the file has it."""
        sidecar = self.path.with_name(f"{self.img_type}.json")
        if not sidecar.is_file():
            return img_shape[self.img_type], None
        record = read_json(sidecar, "--vision_features")
        shape = record.get("shape") if isinstance(record, dict) else None
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise UserError(f'--vision_features: {sidecar} must hold {{"shape": [patches, dim]}}')
        if record.get("weights") == "random" or str(record.get("weights_file")).startswith("seed "):
            warn0(f"{self.path} was made by a network with random weights: for trials only")
        return (shape[0], shape[1]), record.get("rows")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_mapped"}


def _map_array(path: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the array cannot be written to
        return torch.from_numpy(np.load(path, mmap_mode="r", allow_pickle=False))


def _load_tensor(path: Path, mmap: bool = False) -> torch.Tensor:
    tensor = torch.load(path, mmap=mmap, weights_only=True, map_location="cpu")
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"--vision_features: {path} holds a {type(tensor).__name__} instead of one tensor")
    return tensor


def _mappable_copy(path: Path) -> Path:
    """`{path}.npy` with the tensor of an old-format file. The first process makes it; the others wait for it. It has
    the original's time stamp: a changed original is converted again. Raises UserError if it cannot be written."""
    copy = path.with_name(path.name + ".npy")

    def is_made() -> bool:
        return copy.is_file() and copy.stat().st_mtime_ns == path.stat().st_mtime_ns

    if is_made():
        return copy
    try:
        with only_one(path.with_name(f".{path.name}.lock"), f"{path}", required=False, wait=True):
            if not is_made():
                stamp = path.stat().st_mtime_ns
                tensor = _load_tensor(path)
                print(f"{path}: saved by a torch before 1.6; a copy that can be mapped goes to {copy}", flush=True)
                tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
                with atomic_path(copy) as temporary:
                    with open(temporary, "wb") as file:
                        np.save(file, tensor.numpy())
                    os.utime(temporary, ns=(stamp, stamp))
    except (DiskError, OSError) as error:
        why = getattr(error.__cause__ or error, "strerror", None) or error
        fault = f"was saved by a torch before 1.6, cannot be mapped, and no copy can be written beside it ({why})"
        fix = "make its folder writable, or load it once and save it again"
        raise UserError(f"--vision_features: {path} {fault}; {fix}") from error
    return copy
