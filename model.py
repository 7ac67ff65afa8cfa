"""The multimodal T5 of MM-CoT and ARES, and its value function, as short subclasses of transformers' T5.

    policy = T5ForMultimodalGeneration.from_pretrained(folder)                          # what the folder holds
    policy = T5ForMultimodalGeneration.from_pretrained("flan-alpaca", patch_size=(145, 1024))   # fresh image layers
    value = T5ForMultimodalGenerationValueFunction.from_pretrained(folder)              # (B, L) values

Text states attend once to the image's patches after the encoder's last norm (Zhang et al., arXiv 2302.00923, eq. 4-7):

    attended = MHA(query = text, key = value = image_dense(patches))      one head, no mask: every patch is real
    g        = sigmoid(gate_dense([text; attended]))
    states   = (1 - g) * text + g * attended

Text positions do not see each other here, so padding, on the right and as short as the batch allows, changes nothing.
Released checkpoints (`pytorch_model.bin`, a config.json without image fields, `value_function.pth`) and our own
safetensors folders load alike; pickles are only ever read with `weights_only=True`. A model without `patch_size` is a
plain T5: text only.
"""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.utils import logging as transformers_logging

from ares import checkpoints
from ares.checkpoints import MultimodalT5Config, PatchSize, as_multimodal, load_state_dict, local_folder
from ares.cli import UserError, img_shape, in_one_line
from ares.devices import expanded_mask, flat_index
from ares.files import atomic_path
from ares.head import label_loss
from ares.layers import CACHE, fuse

VALUE_FUNCTION = "value_function.pth"
FUSION = ("encoder.image_dense.", "encoder.mha_layer.", "encoder.gate_dense.")
EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # one tensor with shared.weight, always

transformers_logging.disable_progress_bar()  # else every rank logs "Loading weights" and the like


# -- policy ----------------------------------------------------------------------------------------------


class _LibraryInit:
    """Fresh weights: T5's own for T5's layers, PyTorch's own for the layers that T5 does not know."""

    @classmethod
    def is_custom_code(cls) -> bool:
        # For "custom code" transformers 5 skips the initialisation of T5Attention and its like (modules without
        # parameters of their own) and leaves their projections at N(0, 1), which ruins a start from scratch.
        return False

    def _init_weights(self, module: nn.Module) -> None:
        # transformers guards torch.nn.init while it calls this: weights that were loaded stay as they are
        if isinstance(module, nn.Linear):
            module.reset_parameters()  # T5's own Linear layers are set once more by the T5 module that holds them
        elif isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        else:
            super()._init_weights(module)


class MultimodalEncoder(_LibraryInit, T5Stack):
    """T5's encoder, and after its last norm the gated attention to the image's patches."""

    def __init__(self, config: MultimodalT5Config):
        super().__init__(config)
        if config.patch_size is not None:
            self.image_dense = nn.Linear(config.patch_size[1], config.d_model)
            self.mha_layer = nn.MultiheadAttention(config.d_model, num_heads=1, batch_first=True)
            self.gate_dense = nn.Linear(2 * config.d_model, config.d_model)

    def forward(self, input_ids=None, attention_mask=None, image_ids=None, **kwargs) -> BaseModelOutput:
        """`image_ids` (B, P, D): vision features, zeros for a question without an image."""
        kwargs.pop("return_dict", None)
        mask = expanded_mask(attention_mask, self)
        outputs = super().forward(input_ids=input_ids, attention_mask=mask, **kwargs)
        if self.config.patch_size is None:
            if image_ids is not None:
                raise ValueError("this model has no image layers: load it with patch_size, or pass no image_ids")
            return outputs
        if image_ids is None:
            raise ValueError("this model has image layers: pass image_ids (zeros where a question has no image)")
        text = outputs.last_hidden_state  # (B, S, d)
        patches = self.image_dense(image_ids.to(text.dtype))  # (B, P, d)
        attended, _ = self.mha_layer(text, patches, patches, need_weights=False)  # (B, S, d)
        gate = torch.sigmoid(self.gate_dense(torch.cat([text, attended], dim=-1)))  # (B, S, d)
        outputs.last_hidden_state = (1 - gate) * text + gate * attended
        return outputs


class T5ForMultimodalGeneration(_LibraryInit, T5ForConditionalGeneration):
    """The rationale model (and, with an adapter, the answer model)."""

    config_class = MultimodalT5Config
    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch, and forward divides by it

    def __init__(self, config: T5Config, patch_size: PatchSize | None = None):
        super().__init__(as_multimodal(config, patch_size))
        self.encoder = MultimodalEncoder(self.encoder.config)
        fuse(self)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, patch_size=None, seed: int = 0, **kwargs):
        """Load a folder or a hub id. `patch_size` (P, D): None takes what the checkpoint was made for.

        Layers that the checkpoint lacks (image layers, `v_head`) are drawn from `seed`, without touching the global
        random state. Weights are float32 unless `dtype` says otherwise. Raises UserError when the folder holds no
        complete T5 or was made for other features.
        """
        folder = local_folder(pretrained_model_name_or_path, kwargs)
        info = read_checkpoint(folder, "from_pretrained")
        if patch_size is not None:
            _check_features(info, tuple(patch_size), None, "from_pretrained")
        fields = {"patch_size": tuple(patch_size or info.patch_size or ()) or None, "tie_word_embeddings": info.tied}
        if (config := kwargs.pop("config", None)) is not None:
            kwargs["config"] = as_multimodal(config)
            for name, value in fields.items():
                setattr(kwargs["config"], name, value)
        else:
            kwargs.update(fields)
        # fork_rng and default_generator, not manual_seed: the CUDA generators keep their state
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            kwargs = {"dtype": torch.float32, **kwargs, "output_loading_info": True}
            model, loading = super().from_pretrained(folder, *args, **kwargs)
        fresh = FUSION + ("v_head.",)
        if lost := sorted(key for key in loading["missing_keys"] if not key.startswith(fresh)):
            raise UserError(f"{folder}: {lost[0]} and {len(lost) - 1} more tensors are missing from the checkpoint")
        weights = dict(model.named_parameters(remove_duplicate=False))
        tied = [weights[name] is weights["shared.weight"] for name in (*EMBEDDINGS, "lm_head.weight")]
        if tied != [True, True, model.config.tie_word_embeddings]:
            raise RuntimeError("embeddings are not tied as the checkpoint says; is this transformers known?")
        return model

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # transformers ties all or nothing; in an untied T5 only lm_head is separate
        tied = EMBEDDINGS + (("lm_head.weight",) if self.config.tie_word_embeddings else ())
        return dict.fromkeys(tied, "shared.weight")

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As the library's, for encoder and decoder, too, which transformers before about 5.24 skips."""
        for part in (super(), self.encoder, self.decoder):
            part.set_attn_implementation(attn_implementation, *args, **kwargs)

    def encode(self, input_ids, attention_mask=None, image_ids=None, **kwargs) -> BaseModelOutput:
        """Encoder states after fusion, (B, S, d), for `forward(encoder_outputs=...)` of the same model."""
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, image_ids=image_ids, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # (B, S)
        attention_mask: torch.Tensor | None = None,  # (B, S), also needed with encoder_outputs
        image_ids: torch.Tensor | None = None,  # (B, P, D)
        decoder_input_ids: torch.Tensor | None = None,  # (B, L), start token first
        decoder_attention_mask: torch.Tensor | None = None,  # (B, L)
        labels: torch.Tensor | None = None,  # (B, L), -100 where no loss is wanted
        encoder_outputs: BaseModelOutput | tuple | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        label_index: torch.Tensor | None = None,  # (N,)
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """As T5's forward, with `image_ids`; returns loss (if `labels`) and logits (B, L, V).

        `num_items_in_batch` (set by the Trainer): real targets of the optimizer step, on all processes. The loss
        is then the sum over this batch's real labels divided by it, so accumulation steps may differ in length, and
        comes without logits, which never exist all at once (ares/head.py). `label_index`: where the real labels are in
        the flattened (B, L), made on the CPU before the labels went to a GPU, which would have to be waited for.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_ids, attention_mask, image_ids, inputs_embeds=inputs_embeds)
        if labels is None or num_items_in_batch is None:
            return super().forward(
                attention_mask=expanded_mask(attention_mask, self), encoder_outputs=encoder_outputs, labels=labels,
                decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask, **kwargs,
            )  # fmt: skip
        states = self._decode(encoder_outputs, attention_mask, decoder_input_ids, decoder_attention_mask, labels)
        index = flat_index(labels != -100, labels.device) if label_index is None else label_index
        states, labels = states * self.config.head_scale, labels.flatten().index_select(0, index)
        if type(self.lm_head) is nn.Linear:
            loss = label_loss(states.flatten(0, 1).index_select(0, index), self.lm_head.weight, labels)
        else:  # a head with a LoRA adapter is more than its weight
            logits = self.lm_head(states).flatten(0, 1).index_select(0, index)
            loss = F.cross_entropy(logits, labels, reduction="sum")
        return Seq2SeqLMOutput(loss=loss / num_items_in_batch)

    def _decode(self, encoder_outputs, attention_mask, decoder_input_ids, decoder_attention_mask, labels):
        """Decoder states (B, L, d) of `decoder_input_ids`, or, if None, of `labels` shifted right."""
        return self.decoder(
            input_ids=self._shift_right(labels) if decoder_input_ids is None else decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=expanded_mask(attention_mask, self),
            use_cache=False,
        ).last_hidden_state

    @torch.no_grad()
    def generate(self, inputs=None, *, input_ids=None, attention_mask=None, image_ids=None, **kwargs):
        """As T5's generate, with `image_ids`; each prompt is encoded once, also for `num_return_sequences` > 1."""
        input_ids = inputs if input_ids is None else input_ids
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        if kwargs.get("encoder_outputs") is None:
            # encoded here, so that the library does not carry (and copy k times) the image features through decoding
            kwargs["encoder_outputs"] = self.encode(input_ids, attention_mask, image_ids)
        if kwargs.get("use_cache") is not False and not {"cache_implementation", CACHE} & kwargs.keys():
            # the library makes one with as many layers as the encoder has, which a deeper decoder overruns
            kwargs[CACHE] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return super().generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def choose_attention(model: Any, device: torch.device) -> None:
    """SDPA on a GPU, where this transformers has it for T5 (5.0 has not); plain attention on a CPU: SDPA has no fused
    kernel there for T5's learnt position bias, and an update takes 8% less without it.

    On a GPU without cuDNN's kernel, for the whole process: on Hopper SDPA takes it first, and it builds a plan for
    each new shape, which batches of similar length have at every step."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    model.set_attn_implementation("sdpa" if device.type != "cpu" and model._supports_sdpa else "eager")


# -- value function --------------------------------------------------------------------------------------


class T5ForMultimodalGenerationValueFunction(T5ForMultimodalGeneration):
    """A full copy of the policy whose decoder states go to `v_head`: one value per decoder position. `lm_head` is
    never used. It is frozen where it is a tensor of its own; in a tied checkpoint it is `shared`, which trains."""

    _keys_to_ignore_on_load_missing = [r"^v_head\."]  # a policy's folder has none: not worth a report

    def __init__(self, config: T5Config, patch_size: PatchSize | None = None):
        super().__init__(config, patch_size)
        d = self.config.d_model
        self.v_head = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, 1))
        self.post_init()
        self.lm_head.weight.requires_grad_(self.config.tie_word_embeddings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As the policy's; takes `value_function.pth` where the folder has one, else the policy's weights and a fresh
        `v_head` drawn from `seed`."""
        folder = local_folder(pretrained_model_name_or_path, kwargs)
        model = super().from_pretrained(folder, *args, **kwargs)
        if (path := folder / VALUE_FUNCTION).exists():
            state = load_state_dict(path, "from_pretrained", "cpu")
            expected = checkpoints.shapes_of(model.state_dict())
            checkpoints.check_shapes(checkpoints.shapes_of(state), expected, path, "value model")
            model.load_state_dict(state)
        model.lm_head.weight.requires_grad_(model.config.tie_word_embeddings)
        return model

    def forward(
        self, input_ids=None, attention_mask=None, image_ids=None, decoder_input_ids=None, decoder_attention_mask=None,
        labels=None, encoder_outputs=None,
    ) -> torch.Tensor:  # fmt: skip
        """Values (B, L): column t is the value of the state after `decoder_input_ids[:, :t + 1]`.

        Arguments are the policy's; `encoder_outputs` come from this model's `encode`, not from the policy's. `labels`,
        shifted right, replace missing `decoder_input_ids`; there is no loss.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_ids, attention_mask, image_ids)
        states = self._decode(encoder_outputs, attention_mask, decoder_input_ids, decoder_attention_mask, labels)
        return self.values(states)

    def values(self, states: torch.Tensor) -> torch.Tensor:
        """Values (B, L) of decoder states (B, L, d), in the precision of `v_head`'s weights under autocast, too:
        advantages are differences of neighbouring values, for which bf16 is too coarse (steps of 0.008 near 1)."""
        device = states.device.type
        full = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with full:
            return self.v_head(states.to(self.v_head[0].weight.dtype)).squeeze(-1)


def save_value_function(
    value_model: T5ForMultimodalGenerationValueFunction, folder: str | os.PathLike, state: dict | None = None
) -> Path:
    """Write `folder`/value_function.pth (atomically): the full state dict, under the released names.

    `state`: the state dict where the model holds only a part of it (FSDP)."""
    path = Path(folder) / VALUE_FUNCTION
    with atomic_path(path) as temporary, open(temporary, "wb") as file:  # torch.save refuses names like .tmp-1
        torch.save(value_model.state_dict() if state is None else state, file)
    return path


# -- checkpoints, read by their headers ------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint folder holds, read without its weights."""

    folder: Path
    config: MultimodalT5Config
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    tied: bool  # lm_head is shared
    patch_size: PatchSize | None  # None: no image layers yet

    @property
    def has_value_function(self) -> bool:
        return (self.folder / VALUE_FUNCTION).exists()


def check_checkpoint(
    folder: str | os.PathLike, patch_size: PatchSize | None = None, img_type: str | None = None, flag: str = "--model"
) -> CheckpointInfo | None:
    """Check, before any model is loaded, that `folder` holds a complete T5 that fits the vision features.

    Reads config.json and the weights' headers only. `patch_size` None means text only. `flag` is named in the
    messages. Returns None for what can only be a hub id. Raises UserError.
    """
    if not Path(folder).expanduser().is_dir() and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(folder)):
        return None
    info = read_checkpoint(Path(folder).expanduser(), flag)
    _check_features(info, None if patch_size is None else tuple(patch_size), img_type, flag)
    return info


def read_checkpoint(folder: Path, flag: str) -> CheckpointInfo:
    """What `folder` holds, checked to be a complete T5 of whatever features. Raises UserError naming `flag`."""
    if not folder.is_dir():
        raise UserError(f"{flag}: {folder} does not exist; name a model folder or a hub id")
    config, shapes = checkpoints.read_config(folder, flag), checkpoints.read_shapes(folder, flag)
    tied = config.tie_word_embeddings or "lm_head.weight" not in shapes  # transformers 5 saves any T5 as tied
    image_dense = shapes.get("encoder.image_dense.weight")
    if image_dense is None:
        config.patch_size = None
    elif config.patch_size is None or config.patch_size[1] != image_dense[1]:
        config.patch_size = (None, image_dense[1])
    try:
        with torch.device("meta"):
            model = T5ForMultimodalGeneration(config)
    except Exception as error:
        why = in_one_line(error, 160)
        raise UserError(f"{flag}: no model can be built from {folder / 'config.json'} ({why})") from error
    optional = set(EMBEDDINGS) | ({"lm_head.weight"} if tied else set())
    if any(name in shapes for name in EMBEDDINGS):
        optional.add("shared.weight")  # any one of the three will do
    checkpoints.check_shapes(shapes, checkpoints.shapes_of(model.state_dict()), folder, flag, optional)
    return CheckpointInfo(folder, config, shapes, tied, config.patch_size)


def _check_features(info: CheckpointInfo, patch_size: PatchSize | None, img_type: str | None, flag: str) -> None:
    if info.patch_size is None:
        return  # a plain T5: text only, or image layers that start fresh
    recorded, dim = info.patch_size
    held = f"encoder.image_dense.weight of {info.folder} takes features of size {dim}"
    fits = types_that_fit(info.patch_size)
    use = f"use --img_type {' or '.join(fits)}" if fits else "use the features that it was trained with"
    if patch_size is None:
        raise UserError(f"{flag}: {held}, but no --img_type is given; {use}")
    patches, given = patch_size[0], f"--img_type {img_type}" if img_type else "patch_size"
    if patch_size[1] != dim:
        raise UserError(f"{flag}: {held}, but {given} gives {patch_size[1]}; {use}")
    if None not in (recorded, patches) and patches != recorded:
        held = f"{info.folder} was trained on {recorded} patches per image (image_patch_size in config.json)"
        raise UserError(f"{flag}: {held}, but {given} gives {patches}; {use}")


def types_that_fit(patch_size: PatchSize) -> list[str]:
    """The kinds of features (--img_type) that image layers made for `patch_size` can read."""
    P, D = patch_size
    return [name for name, (patches, dim) in img_shape.items() if dim == D and P in (None, patches)]
