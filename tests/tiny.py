"""A few real questions and a T5 of the real kind, both small: what the tests of training run on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

PATCHES = (5, 8)  # recorded in the features' sidecar, as extract_features.py does for any model but the named four


def make_data(root: Path, sample: Path, train: int = 24, val: int = 6, test: int = 8, shape=PATCHES, prefix="mini"):
    """A data root with `train` + `val` + `test` real questions and random features for those that have an image."""
    source = sample / "ScienceQA/data/scienceqa"
    problems = json.loads((source / "problems.json").read_text())
    splits = json.loads((source / "pid_splits.json").read_text())
    cut = {"train": splits["train"][:train], "val": splits["val"][:val], "test": splits["test"][:test]}
    qids = [qid for part in cut.values() for qid in part]
    cut |= {f"{prefix}{name}": part[: max(2, len(part) // 2)] for name, part in list(cut.items())}
    write(root / "scienceqa/problems.json", {qid: problems[qid] for qid in qids})
    write(root / "scienceqa/pid_splits.json", cut)
    rows = [qid for qid in qids if problems[qid]["image"]]
    write(root / "vision_features/name_map.json", {qid: row for row, qid in enumerate(rows)})
    if tuple(shape) == PATCHES:
        write(root / "vision_features/vit.json", {"shape": list(shape)})
    with open(root / "vision_features/vit.npy", "wb") as file:
        np.save(file, np.random.default_rng(0).standard_normal((len(rows), *shape)).astype("float32"))
    return root


def make_model(folder: Path, *, tied: bool = False, dropout: float = 0.1, patch_size=None) -> Path:
    """A 2 + 2 layer T5 with T5's vocabulary; its loss starts near ln(32128), not at the library's 70."""
    from model import MultimodalT5Config, T5ForMultimodalGeneration

    torch.manual_seed(0)
    config = MultimodalT5Config(
        **dict(vocab_size=32128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4),
        feed_forward_proj="relu" if tied else "gated-gelu",
        tie_word_embeddings=tied,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        patch_size=patch_size,
    )
    model = T5ForMultimodalGeneration(config)
    with torch.no_grad():
        (model.shared if tied else model.lm_head).weight.mul_(0.05)
    model.save_pretrained(folder)
    return folder


def predictions(folder: Path, split: str = "test") -> dict:
    return json.loads((folder / f"predictions_ans_{split}.json").read_text())


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
