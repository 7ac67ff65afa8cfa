"""Folders that we write, in the form that the released code's libraries read: transformers 4.30, tokenizers 0.13,
peft 0.6. The files mean the same to the present ones. benchmarks/old_libraries.py loads a folder with the old ones.

config.json needs no change here: its image field is not called `patch_size` (t5_config.py), which is an argument of
the released model's `from_pretrained`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ares import files

# Keys of adapter_config.json that peft 0.6 knows. It refuses any other.
ADAPTER_KEYS = set(
    "alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights "
    "layers_pattern layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r rank_pattern revision "
    "target_modules task_type".split()
)


def portable_tokenizer(folder: Path) -> None:
    """Rewrite `folder`/tokenizer.json, if it is there, without the fields that tokenizers 0.13 cannot read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    told = files.read_json(path, "tokenizer", dict)
    told["truncation"] = told["padding"] = None  # of the last call, not of the tokenizer
    files.write_json(path, _old_metaspace(told), indent=2)


def _old_metaspace(part: Any) -> Any:
    if isinstance(part, list):
        return [_old_metaspace(one) for one in part]
    if not isinstance(part, dict):
        return part
    part = {key: value if key == "model" else _old_metaspace(value) for key, value in part.items()}
    if part.get("type") == "Metaspace" and part.get("prepend_scheme") in ("always", "never") and part.get("split"):
        part["add_prefix_space"] = part.pop("prepend_scheme") == "always"
        del part["split"]
    return part


def portable_adapter(folder: Path, defaults: dict[str, Any]) -> None:
    """Rewrite `folder`/adapter_config.json: keys that peft 0.6 does not know only where they differ from `defaults`
    (of the installed peft), lists of modules sorted (peft writes a set, in an order that changes from run to run)."""
    path = Path(folder) / "adapter_config.json"
    told = files.read_json(path, "adapter", dict)
    told.pop("peft_version", None)
    kept = {key: value for key, value in told.items() if key in ADAPTER_KEYS or value != defaults.get(key)}
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(kept.get(key), list):
            kept[key] = sorted(kept[key])
    files.write_json(path, kept, indent=2)
