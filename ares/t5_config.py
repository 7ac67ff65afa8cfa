"""T5's configuration with what the image layers were made for.

    config = MultimodalT5Config(patch_size=(145, 1024), ...)     # or as_multimodal(a T5Config)
    config = read_config(folder, "--model")

Leaves out the model (model.py) and the weights (checkpoints.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import T5Config

from ares import files
from ares.cli import UserError, in_one_line

# sizes beyond which a number is damage: building such a model would not end
LARGEST = {"num_layers": 1000, "num_decoder_layers": 1000, "num_heads": 10_000, "d_model": 10**6, "d_ff": 10**7,
           "d_kv": 10**6, "vocab_size": 10**8}  # fmt: skip

PatchSize = tuple[int | None, int]  # patches per image (None: not recorded; nothing depends on it), features per patch


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
        self.patch_size = recorded if self.patch_size is None else self.patch_size
        self.patch_size = None if self.patch_size is None else tuple(self.patch_size)

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
    if patch_size is not None:
        config.patch_size = tuple(patch_size)
    return config


def read_config(folder: Path, flag: str) -> MultimodalT5Config:
    """The configuration of a model folder. Raises UserError naming `flag` where it has none, or is no T5."""
    path = folder / "config.json"
    if not path.exists():
        if (folder / "adapter_config.json").exists():
            raise UserError(f"{flag}: {folder} holds a LoRA adapter, not a model; name the model it was trained on")
        raise UserError(f"{flag}: {folder} has no config.json; name the folder that save_pretrained wrote")
    fields = files.read_json(path, flag, dict)
    model_type = fields.get("model_type")
    if model_type != "t5":
        kind = repr(model_type)[:60]
        raise UserError(f"{flag}: {path} describes a {kind} model; only T5 (model_type 't5') can be used")
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
        why = in_one_line(error, 160)
        raise UserError(f"{flag}: {path} is no valid T5 configuration ({why})") from error
