"""Model folders read by their headers: names and shapes of tensors, without their weights and without trust.

Knows nothing of any architecture. Every fault is a UserError that names `flag`, the file and the tensor. A pickle is
only ever read with `weights_only=True`, so nothing it holds is executed.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Set
from pathlib import Path

import torch

from ares.cli import UserError

# in the order in which transformers looks for them
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_shapes(folder: Path, flag: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a model folder, sharded or not; of several forms the one transformers takes."""
    name = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if name is None:
        raise UserError(f"{flag}: {folder} holds no weights (looked for {', '.join(WEIGHTS)})")
    if not name.endswith(".index.json"):
        return _read_header(folder / name, flag)
    try:
        shards = sorted(set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{flag}: cannot read {folder / name} ({error!r})") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        if not (folder / shard).exists():
            raise UserError(f"{flag}: {folder / shard} is named in {name} but absent; copy the whole folder")
        shapes.update(_read_header(folder / shard, flag))
    return shapes


def _read_header(path: Path, flag: str) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:  # also refuses a file shorter than its header says
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{flag}: {path} is damaged or no safetensors file ({error})") from error
    return {name: tuple(tensor.shape) for name, tensor in load_state_dict(path, flag, "meta").items()}


def load_state_dict(path: Path, flag: str, device: str) -> dict[str, torch.Tensor]:
    """A state dict from a PyTorch file, never executing what it pickles. `device` "meta" reads no weights."""
    try:
        # files from before torch 1.6 are no zip files and cannot be mapped
        state = torch.load(path, map_location=device, mmap=zipfile.is_zipfile(path), weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{flag}: {path} is damaged or no plain PyTorch state dict ({reason[:160]})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{flag}: {path} is not a state dict (name -> tensor)")
    return state


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
