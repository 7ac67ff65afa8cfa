"""Model folders read by their headers: names and shapes of tensors, without their weights and without trust.

Knows nothing of any architecture. Every fault is a UserError that names `flag`, the file and the tensor. A pickle is
only ever read with `weights_only=True`, so nothing it holds is executed.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

from ares import files
from ares.cli import UserError, in_one_line

# what the model sees of one image: (patches, dim). resnet's one pooled vector is repeated 512 times
img_shape = {"resnet": (512, 2048), "clip": (49, 2048), "detr": (100, 256), "vit": (145, 1024)}

# in the order in which transformers looks for them
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_shapes(folder: Path, flag: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a model folder, sharded or not; of several forms the one transformers takes."""
    name = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if name is None:
        raise UserError(f"{flag}: {folder} holds no weights (looked for {', '.join(WEIGHTS)})")
    if not name.endswith(".index.json"):
        return _read_header(folder / name, flag)
    index = files.read_json(folder / name, flag, dict).get("weight_map")
    shards = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
    if not shards or any("/" in shard or len(shard) > 255 for shard in shards):
        raise UserError(f"{flag}: {folder / name} names no shards beside it in weight_map; copy the whole folder")
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        if not (folder / shard).exists():
            raise UserError(f"{flag}: {folder / shard} is named in {name} but absent; copy the whole folder")
        shapes.update(_read_header(folder / shard, flag))
    return shapes


def _read_header(path: Path, flag: str) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        files.refuse_unfit(path, flag)
        try:
            with safe_open(path, "pt") as file:  # also refuses a file shorter than its header says
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except Exception as error:
            why = in_one_line(error, 160)
            raise UserError(f"{flag}: {path} is damaged or no safetensors file ({why})") from error
    return {name: tuple(tensor.shape) for name, tensor in load_state_dict(path, flag, "meta").items()}


def load_state_dict(path: Path, flag: str, device: str) -> dict[str, torch.Tensor]:
    """A state dict from a PyTorch file, never executing what it pickles. `device` "meta" reads no weights."""
    state = load_torch(path, flag, device)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{flag}: {path} is not a state dict (name -> tensor)")
    return state


def load_torch(path: Path, flag: str, device: str = "cpu") -> Any:
    """What a PyTorch file holds, mapped, never executing what it pickles. Raises UserError naming a damaged file."""
    files.refuse_unfit(path, flag)
    try:
        # files from before torch 1.6 are no zip files and cannot be mapped
        return torch.load(path, map_location=device, mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # the unpickler raises whatever a damaged pickle makes it do
        why = in_one_line(str(error).strip().splitlines()[0] if str(error).strip() else error, 160)
        raise UserError(f"{flag}: {path} is damaged or no plain PyTorch state dict ({why})") from error


def refuse_damaged(place: Path, flag: str) -> None:
    """Raise UserError naming the first file of a checkpoint folder, or the file, that is not as it was written.

    JSON is parsed, headers of safetensors are read, the check sums of PyTorch's archives are compared.
    """
    for path in sorted(place.iterdir()) if place.is_dir() else [place]:
        if path.suffix == ".json":
            files.read_json(path, flag, nan=True)
        elif path.suffix == ".safetensors":
            _read_header(path, flag)
        elif path.suffix in (".pt", ".pth", ".bin"):
            files.refuse_unfit(path, flag)
            try:
                with zipfile.ZipFile(path) as archive:
                    bad = archive.testzip()
            except Exception as error:
                bad = in_one_line(error, 100)
            if bad:
                raise UserError(f"{flag}: {path} is damaged ({bad})")


def local_folder(name: str | os.PathLike, kwargs: dict) -> Path:
    """`name` itself where it is a folder; else the Hub's snapshot of that id, downloaded or from the cache."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()  # a gigabyte to come

    options = {key: kwargs.pop(key) for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
    try:
        for weights in ("*.safetensors", "*.bin"):
            found = Path(snapshot_download(str(name), allow_patterns=["*.json", weights], **options))
            if any((found / file).exists() for file in WEIGHTS):
                break
        return found
    except (OSError, ValueError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name} is neither a folder here nor a model the Hub gives ({reason[:160]})") from error


def check_shapes(shapes: dict, expected: dict, where: Path, flag: str, optional: Set[str] = frozenset()) -> None:
    """Raise UserError naming the first tensor of `expected` that is absent or of another shape."""
    for name, shape in expected.items():
        if name not in shapes and name not in optional:
            raise UserError(f"{flag}: {where} lacks {name} {list(shape)}; it is not whole, or of another architecture")
        if shapes.get(name, shape) != shape:
            raise UserError(f"{flag}: {where} holds {name} as {list(shapes[name])}, but {list(shape)} is needed")
