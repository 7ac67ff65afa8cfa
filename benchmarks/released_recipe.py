"""The recipe of the released code (June 2024), the other side of every benchmark: the same maths, done slowly.

Written from a description of its habits (README "Differences"), not from the released source:
prompts and targets padded to 512 + 512; features loaded whole and turned into Python lists in the collator; fp32,
plain attention, the library's composite GELU, an optimizer that visits weights one by one; generation that decodes
the whole prefix for every token (its key-value cache was never used), in split order, of the test split twice; BLEU
and ROUGE-L by the packages and sentence embeddings one text at a time; images through the network one by one.

Habits that change the numbers are not copied: pads are masked in the loss here too, so that both sides can be checked
to compute the same. RL's part is in released_rl.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.activations import ACT2FN

from ares import layers

PAD_TO = 512


def plain_model(model: Any, attention: str = "eager") -> Any:
    """`model` with the library's own layers, activation and attention, in place; "sdpa" is what it takes today."""
    for module in fused_activations(model):
        module.act = ACT2FN["gelu_new"]
    layers.unfuse(model)
    model.set_attn_implementation(attention)
    return model


def fused_activations(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "act", None), torch.nn.GELU)]


@contextlib.contextmanager
def plainly(*models: Any, attention: str = "eager") -> Iterator[None]:
    """Within, `plain_model` of each; then as they were."""
    before = [
        (model, model.config._attn_implementation, {module: module.act for module in fused_activations(model)})
        for model in models
    ]
    for model in models:
        plain_model(model, attention)
    try:
        yield
    finally:
        for model, earlier, acts in before:
            model.set_attn_implementation(earlier)
            layers.fuse(model)
            for module, act in acts.items():
                module.act = act


# -- batches ---------------------------------------------------------------------------------------------


class LoadedFeatures:
    """All features in this process's memory, a zero row for questions without an image."""

    def __init__(self, path: Path, name_map: Mapping[str, int]):
        self.rows = torch.from_numpy(np.load(path))
        self.name_map = name_map
        self.nothing = np.zeros(tuple(self.rows.shape[1:]), dtype=np.float32)

    def of(self, qid: str) -> np.ndarray:
        row = self.name_map.get(qid)
        return self.nothing if row is None else self.rows[row].numpy()


def padded_batch(items: Sequence[Mapping[str, Any]], features: LoadedFeatures) -> dict:
    """A batch with every prompt and target padded to PAD_TO, features by way of Python lists."""
    batch: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": [], "image_ids": []}
    for item in items:
        ids, labels = item["input_ids"], item["labels"]
        batch["input_ids"].append(ids + [0] * (PAD_TO - len(ids)))
        batch["attention_mask"].append([1] * len(ids) + [0] * (PAD_TO - len(ids)))
        batch["labels"].append(labels + [-100] * (PAD_TO - len(labels)))
        batch["image_ids"].append(features.of(item["qid"]).tolist())
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def batches(dataset: Any, features: LoadedFeatures, device: Any, bs: int) -> Iterator[dict[str, torch.Tensor]]:
    """`padded_batch`es of `bs` rows on the device, in the order of `dataset`."""
    for start in range(0, len(dataset), bs):
        items = [dataset[i] for i in range(start, min(start + bs, len(dataset)))]
        yield {name: tensor.to(device) for name, tensor in padded_batch(items, features).items()}


# -- fine-tuning -----------------------------------------------------------------------------------------


def train_steps(
    model: Any, dataset: Any, features: LoadedFeatures, optimizer: torch.optim.Optimizer, device: Any, bs: int
) -> list[float]:
    """A step per `bs` rows, in the order of `dataset`: forward, backward, clip at 1.0, update. Returns the losses."""
    model.train()
    losses = []
    for batch in batches(dataset, features, device, bs):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(model: Any, lr: float) -> torch.optim.Optimizer:
    """AdamW that loops over the weights, as the library's of that time did."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, foreach=False, fused=False)


# -- generation and scores -------------------------------------------------------------------------------


@torch.no_grad()
def generate_split(
    model: Any, dataset: Any, features: LoadedFeatures, device: torch.device, bs: int, max_length: int
) -> list[list[int]]:
    """Greedy ids of every row, in split order: padded prompts, no key-value cache. Ends when a whole batch has."""
    model.eval()
    rows: list[list[int]] = []
    for batch in batches(dataset, features, device, bs):
        batch.pop("labels")
        ids = model.generate(**batch, max_length=max_length, do_sample=False, use_cache=False)[:, 1:].tolist()
        rows += [row[: max((t + 1 for t, token in enumerate(row) if token), default=0)] for row in ids]
    return rows


def rationale_scores(predictions: Mapping[str, str], references: Mapping[str, str], encoder: Any) -> dict[str, float]:
    """BLEU-1, BLEU-4 (nltk), ROUGE-L (rouge) and similarity, question by question, text by text."""
    import warnings

    from nltk.translate.bleu_score import sentence_bleu
    from rouge import Rouge

    from utils_evaluate import bleu_tokens

    bleu1, bleu4, rouge, cosines = [], [], [], []
    for qid, prediction in predictions.items():
        target, prediction = references[qid].strip(), prediction.strip()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for weights, scores in (((1.0,), bleu1), ((0.25,) * 4, bleu4)):
                scores.append(float(sentence_bleu([bleu_tokens(target)], bleu_tokens(prediction), weights)))
        rouge.append(Rouge().get_scores(target, prediction)[0]["rouge-l"]["f"])
        if encoder is not None:
            left, right = (encoder.encode([text], show_progress_bar=False)[0] for text in (prediction, target))
            cosines.append(float(left @ right) / float(np.linalg.norm(left) * np.linalg.norm(right)))
    named = {"bleu1": bleu1, "bleu4": bleu4, "rouge": rouge, "similarity": cosines}
    return {name: 100 * sum(values) / len(values) for name, values in named.items() if values}


# -- image features --------------------------------------------------------------------------------------


def read(path: Path) -> Any:
    """The picture as RGB."""
    from PIL import Image

    return Image.open(path).convert("RGB")


@torch.no_grad()
def image_features(encoder: Any, paths: Sequence[Path]) -> torch.Tensor:
    """Features of images, one at a time through decoding, transform and network; kept in memory to the end."""
    return torch.cat([encoder([encoder.transform(read(path))]) for path in paths])
