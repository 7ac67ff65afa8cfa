"""Model folders: T5's configuration, tensors read by their headers, files that older libraries read, too.

    config = read_config(folder, "--model")          # MultimodalT5Config
    shapes = read_shapes(folder, "--model")          # {"shared.weight": (32128, 768), ...} without reading weights
    portable_tokenizer(folder)                       # after save_pretrained

Every fault is a UserError that names `flag`, the file and the tensor. A pickle is only ever read with
`weights_only=True`, so nothing it holds is executed. The model itself is in model.py.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config

from ares import files
from ares.cli import UserError, in_one_line

PatchSize = tuple[int | None, int]  # patches per image (None: not recorded; nothing depends on it), features per patch

# sizes beyond which a number is damage: building such a model would not end
LARGEST = {"num_layers": 1000, "num_decoder_layers": 1000, "num_heads": 10_000, "d_model": 10**6, "d_ff": 10**7,
           "d_kv": 10**6, "vocab_size": 10**8}  # fmt: skip

# in the order in which transformers looks for them
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class MultimodalT5Config(T5Config):
    """T5Config with `patch_size`, and with `tie_word_embeddings` kept as the checkpoint says.

    In config.json the field is called `image_patch_size`: `patch_size` is an argument of the released model's
    `from_pretrained`, which a field of that name would swallow. Earlier versions wrote `patch_size`; it is read, too.

    transformers 5 sets `tie_word_embeddings` to True whatever it was given and remembers a False only as
    `scale_decoder_outputs = False`. Here False stays False, also in the saved file, where transformers 4 and the
    released code look for it.
    """

    patch_size: tuple | list | None = None

    def __post_init__(self, **kwargs):
        untied = kwargs.get("tie_word_embeddings") is False or kwargs.get("scale_decoder_outputs") is False
        recorded = kwargs.pop("image_patch_size", None)
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = not untied
        self.patch_size = tuple(self.patch_size or recorded or ()) or None

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        if (shape := fields.pop("patch_size", None)) is not None:
            fields["image_patch_size"] = shape
        return fields

    @property
    def head_scale(self) -> float:
        """What decoder states are multiplied with before the head: d ** -0.5 where that is the embedding (T5 v1.0)."""
        # transformers 5 keeps that in a field of its own
        scaled = getattr(self, "scale_decoder_outputs", self.tie_word_embeddings)
        return self.d_model**-0.5 if scaled else 1.0


def as_multimodal(config: T5Config, patch_size: PatchSize | None = None) -> MultimodalT5Config:
    """`config` with the field `patch_size`, set to what is given."""
    if not isinstance(config, MultimodalT5Config):
        attention = config._attn_implementation
        config = MultimodalT5Config.from_dict(config.to_dict())
        config._attn_implementation = attention
    config.patch_size = config.patch_size if patch_size is None else tuple(patch_size)
    return config


def read_config(folder: Path, flag: str) -> MultimodalT5Config:
    """The configuration of a model folder. Raises UserError naming `flag` where it has none, or is no T5."""
    path = folder / "config.json"
    if not path.exists():
        if (folder / "adapter_config.json").exists():
            raise UserError(f"{flag}: {folder} holds a LoRA adapter, not a model; name the model it was trained on")
        raise UserError(f"{flag}: {folder} has no config.json; name the folder that save_pretrained wrote")
    fields = files.read_json(path, flag, dict)
    if (found := fields.get("model_type")) != "t5":
        raise UserError(f"{flag}: {path} describes a {repr(found)[:60]} model; only T5 (model_type 't5') can be used")
    for name, most in LARGEST.items():
        value = fields.get(name, 1)
        if value is not None and (type(value) is not int or not 0 < value <= most):
            raise UserError(f"{flag}: {path} is no valid T5 configuration ({name} is {repr(value)[:60]})")
    for other in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        if os.path.lexists(folder / other):  # libraries read them later, each with its own errors
            files.read_json(folder / other, flag, dict)
    try:
        return MultimodalT5Config.from_dict(fields)
    except Exception as error:  # the library checks types and values, each field in its own way
        raise UserError(f"{flag}: {path} is no valid T5 configuration ({in_one_line(error, 160)})") from error


def read_shapes(folder: Path, flag: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a model folder, sharded or not; of several forms the one transformers takes."""
    name = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if name is None:
        raise UserError(f"{flag}: {folder} holds no weights (looked for {', '.join(WEIGHTS)})")
    if not name.endswith(".index.json"):
        return shapes_of(load_state_dict(folder / name, flag, "meta"))
    index = files.read_json(folder / name, flag, dict).get("weight_map")
    shards = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
    if not shards or any("/" in shard or len(shard) > 255 for shard in shards):
        raise UserError(f"{flag}: {folder / name} names no shards beside it in weight_map; copy the whole folder")
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        if not (folder / shard).exists():
            raise UserError(f"{flag}: {folder / shard} is named in {name} but absent; copy the whole folder")
        shapes |= shapes_of(load_state_dict(folder / shard, flag, "meta"))
    return shapes


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def load_state_dict(path: Path, flag: str, device: str = "cpu", inner: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """A state dict from a .safetensors or PyTorch file, never executing what it pickles. `device` "meta" reads no
    weights; `inner`: keys of a training checkpoint, of which the first that is there holds the state dict."""
    state = load_torch(path, flag, device)
    if isinstance(state, dict):
        state = next((state[name] for name in inner if isinstance(state.get(name), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{flag}: {path} is not a state dict (name -> tensor)")
    return state


def load_torch(path: Path, flag: str, device: str = "cpu") -> Any:
    """What a .safetensors or PyTorch file holds, mapped, never executing what it pickles. Raises UserError naming a
    damaged file."""
    from safetensors import safe_open

    files.refuse_unfit(path, flag)
    form = "safetensors file"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:  # also refuses a file shorter than its header says
                if device == "meta":
                    return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}
                return {name: file.get_tensor(name) for name in file.keys()}
        form = "plain PyTorch state dict; pickled objects are never executed"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols that torch does not write
            # files from before torch 1.6 are no zip files and cannot be mapped
            return torch.load(path, map_location=device, mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # the unpickler raises whatever a damaged pickle makes it do
        why = in_one_line(str(error).strip().partition("\n")[0] or error, 160)
        raise UserError(f"{flag}: {path} is damaged or no {form} ({why})") from error


def refuse_damaged(place: Path, flag: str) -> None:
    """Raise UserError naming the first file of a checkpoint folder, or the file, that is not as it was written. JSON
    is parsed, headers of safetensors are read, the check sums of PyTorch's archives are compared."""
    for path in sorted(place.iterdir()) if place.is_dir() else [place]:
        if path.suffix == ".json":
            files.read_json(path, flag, nan=True)
        elif path.suffix == ".safetensors":
            load_torch(path, flag, "meta")
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
            lacks = f"{name} {list(shape)}; it is incomplete, or of another architecture"
            raise UserError(f"{flag}: {where} lacks {lacks}")
        if shapes.get(name, shape) != shape:
            raise UserError(f"{flag}: {where} holds {name} as {list(shapes[name])}, but {list(shape)} is needed")


# -- files for older libraries ---------------------------------------------------------------------------
# The released code runs with transformers 4.30, tokenizers 0.13 and peft 0.6. What is rewritten here means the same
# to the present versions; benchmarks/old_libraries.py loads a folder with the old ones.

# Keys of adapter_config.json that peft 0.6 knows. It refuses any other.
ADAPTER_KEYS = set(
    "alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights "
    "layers_pattern layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r rank_pattern revision "
    "target_modules task_type".split()
)


def portable_tokenizer(folder: Path) -> None:
    """Rewrite `folder`/tokenizer.json, if it is there, without the fields that tokenizers 0.13 cannot read."""
    path = folder / "tokenizer.json"
    if path.is_file():
        data = files.read_json(path, "tokenizer", dict)
        data["truncation"] = data["padding"] = None  # settings of the last call, not of the tokenizer
        files.write_json(path, _old_metaspace(data), indent=2)


def _old_metaspace(part: Any) -> Any:
    if not isinstance(part, dict):
        return [_old_metaspace(each) for each in part] if isinstance(part, list) else part
    part = {key: value if key == "model" else _old_metaspace(value) for key, value in part.items()}
    if part.get("type") == "Metaspace" and part.get("prepend_scheme") in ("always", "never") and part.get("split"):
        part["add_prefix_space"] = part.pop("prepend_scheme") == "always"
        del part["split"]
    return part


def portable_adapter(folder: Path, defaults: dict[str, Any]) -> None:
    """Rewrite `folder`/adapter_config.json: keys that peft 0.6 does not know only where they differ from `defaults`
    (of the installed peft), lists of modules sorted (peft writes a set, in an order that changes from run to run)."""
    path = folder / "adapter_config.json"
    fields = files.read_json(path, "adapter", dict)
    fields.pop("peft_version", None)
    kept = {key: value for key, value in fields.items() if key in ADAPTER_KEYS or value != defaults.get(key)}
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(kept.get(key), list):
            kept[key] = sorted(kept[key])
    files.write_json(path, kept, indent=2)
