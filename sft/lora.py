"""The LoRA adapter of step 3: create, load and check one. Used by run_mm_cot_lora.py and tools/predict.py.

    adapted = load_adapter(T5ForMultimodalGeneration.from_pretrained(folder), adapter_folder, "--lora")

run_mm_cot_lora.py says which modules are adapted, and why.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

from ares import files
from ares.cli import UserError, in_one_line, print0

TARGETS = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo", "image_dense", "gate_dense", "lm_head")
NO_EFFECT = "out_proj"
PEFT = ">=0.21.2,<0.22"  # as in requirements.txt; tried with transformers 5.17.0 and 5.24.0


def add_adapter(model, args: argparse.Namespace):
    """A fresh adapter on every Linear of TARGETS that `model` has; the rest is frozen."""
    import peft
    from torch import nn

    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tied = model.lm_head.weight is model.shared.weight
    targets = sorted(names.intersection(TARGETS) - ({"lm_head"} if tied else set()))
    print0(f"adapter on {' '.join(targets)}{' (not on lm_head, which is the tied embedding)' if tied else ''}")
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", target_modules=targets, r=args.lora_r, lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout, bias=args.lora_bias,
    )  # fmt: skip
    return _adapted(model, config)


def _adapted(model, config):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses names of transformers that are deprecated
        adapted = peft.get_peft_model(model, config)
    save_pretrained = adapted.save_pretrained

    def save(folder: str | Path, **kwargs) -> None:
        from ares.checkpoints import portable_adapter

        # peft would save all of lm_head beside an adapter on it: 100 MB of frozen weights
        save_pretrained(folder, **{"save_embedding_layers": False, **kwargs})
        if kwargs.get("is_main_process", True):
            portable_adapter(Path(folder), peft.LoraConfig().to_dict())

    adapted.save_pretrained = save
    return adapted


def peft_fault() -> str | None:
    """A message that the installed peft is outside the range that was tried with transformers, where it calls methods
    of transformers' models that have other names; None if it is inside."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.specifiers import SpecifierSet

    try:
        have = version("peft")
    except PackageNotFoundError:
        return f"peft is not installed, which the LoRA step needs; pip install 'peft{PEFT}'"
    fault = f"peft {have} does not work with transformers {version('transformers')} in the LoRA step"
    return None if SpecifierSet(PEFT).contains(have, prereleases=True) else f"{fault}; pip install 'peft{PEFT}'"


def load_adapter(model, folder: Path, flag: str = "--evaluate_dir"):
    """`model` with the adapter in `folder`, ours or a released one (declared CAUSAL_LM, with out_proj). Raises
    UserError, naming `flag`, if the adapter belongs to another model."""
    import peft

    from ares.checkpoints import load_state_dict

    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # peft's own for a damaged file
        raise UserError(f"{flag}: cannot read the adapter in {folder} ({in_one_line(error, 160)})") from error
    config.task_type, config.inference_mode = "SEQ_2_SEQ_LM", True
    config.base_model_name_or_path = model.name_or_path  # not where it was trained
    if isinstance(config.target_modules, str):
        config.exclude_modules = [NO_EFFECT]
    else:
        config.target_modules = set(config.target_modules) - {NO_EFFECT}
    config.megatron_config = None  # with it peft imports whatever module the file names
    path = folder / "adapter_model.safetensors"
    weights = load_state_dict(path if path.is_file() else path.with_suffix(".bin"), flag)
    kept = {name: tensor for name, tensor in weights.items() if f".{NO_EFFECT}.lora_" not in name}
    if len(kept) < len(weights):
        print0(f"{folder}: {len(weights) - len(kept)} tensors on {NO_EFFECT} dropped (they had no effect)")
    try:
        adapted = _adapted(model, config)
        loaded = peft.set_peft_model_state_dict(adapted, kept)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        why = in_one_line(error, 200)  # no such module, a tensor of another shape
        raise UserError(f"{flag}: the adapter in {folder} does not fit this --model ({why})") from error
    if odd := [name for name in loaded.missing_keys if "lora_" in name] or loaded.unexpected_keys:
        raise UserError(f"{flag}: the adapter in {folder} does not fit this --model ({odd[0]})")
    return adapted


def check_adapter(folder: Path, flag: str = "--evaluate_dir") -> None:
    """Raise UserError, naming `flag`, unless `folder` holds an adapter."""
    from ares.checkpoints import refuse_damaged

    if fault := peft_fault():
        raise UserError(f"{flag}: {fault}")
    if not os.path.lexists(folder / "adapter_config.json"):
        raise UserError(f"{flag}: {folder} holds no adapter_config.json; name the adapter's folder")
    held = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    if not (held := [path for path in held if os.path.lexists(path)]):
        raise UserError(f"{flag}: {folder} holds no adapter_model.safetensors (or .bin); copy the whole folder")
    config = files.read_json(folder / "adapter_config.json", flag, dict)
    rank = config.get("r", 8)
    if type(rank) is not int or not 0 < rank <= 10_000:  # weights of that size would be made
        raise UserError(f"{flag}: {folder / 'adapter_config.json'}: r is {repr(rank)[:60]}")
    if held[0].suffix == ".safetensors":
        refuse_damaged(held[0], flag)
