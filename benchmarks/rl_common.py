"""Shared by the RL benchmarks, and by the RL tests: models, real prompts, texts that end at real lengths, a Teacher.

Untrained weights generate no `</s>`. To make both sides of a benchmark generate equally much, each text's length is
drawn from those of the real solutions, and both sides end it there (`ending`). `make_data`, `make_model` and `answer`
make a small run folder's data, model and replies.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ares import files
from benchmarks import common
from rl import actor_critic, sampling
from rl.rollouts import Prompts
from teacher import handoff

EOS = 1
PAST_END = 2.0  # instead of a number in [0, 1): the text ends here
PATCHES = (4, 16)  # shape of the small vision features, recorded in the sidecar beside them


class World:
    """Real questions in the split's order, their prompts, and models on the device."""

    def __init__(self, args: argparse.Namespace, questions: int):
        from model import T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction, choose_attention

        data, self.device = common.load(args), torch.device(args.device)
        kinds = (T5ForMultimodalGeneration, T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction)
        self.models = sampling.Models(*(cls.from_pretrained(data.model).to(self.device).eval() for cls in kinds))
        for model in (self.models.policy, self.models.reference, self.models.value_function):
            choose_attention(model, self.device)
        self.dataset = data.dataset("train", questions)
        self.prompts = Prompts(self.dataset, data.collator, self.device)

    def sampling_models(self) -> sampling.Models:
        """The models as run_mm_cot_rl.py samples with them: on a GPU copies with bf16 weights in linear layers."""
        models = [self.models.policy, self.models.reference, self.models.value_function]
        if self.device.type == "cuda":
            models = [actor_critic.cast_linears_bf16(copy.deepcopy(one).requires_grad_(False)) for one in models]
        return sampling.Models(*models)


def solution_lengths(dataset: Any, rows: int, longest: int, seed: int) -> Tensor:
    """(rows,) lengths of texts, `</s>` counted, drawn from those of the real solutions, cut at `longest`."""
    real = torch.tensor([min(len(labels), longest) for labels in dataset.labels])
    return real[torch.randint(len(real), (rows,), generator=torch.Generator().manual_seed(seed))]


@contextlib.contextmanager
def ending(lengths: Tensor) -> Iterator[None]:
    """In the block, text i of our sampling ends after exactly lengths[i] tokens."""
    noise, draw = sampling.uniform_noise, sampling.draw

    def noise_until(rows: int, length: int, seed: int) -> Tensor:
        return noise(rows, length, seed).masked_fill(torch.arange(length) >= lengths[:, None], PAST_END)

    def draw_until(logits: Tensor, how: sampling.Sampling, u: Tensor) -> Tensor:
        logits[:, EOS] = -torch.inf
        return draw(logits, how, u.clamp(max=0.5)).masked_fill(u == PAST_END, EOS)

    sampling.uniform_noise, sampling.draw = noise_until, draw_until
    try:
        yield
    finally:
        sampling.uniform_noise, sampling.draw = noise, draw


# -- a small run -----------------------------------------------------------------------------------------


def make_data(root: Path, sample: Path, questions: int) -> Path:
    """A data root with the first real train questions (and a few others), captions and tiny vision features."""
    source, data = sample / "ScienceQA/data/scienceqa", root / "data"
    problems = json.loads((source / "problems.json").read_text())
    splits = json.loads((source / "pid_splits.json").read_text())
    captions = json.loads((sample / "instruct_captions.json").read_text())["captions"]
    pictured = [qid for qid in splits["train"] if problems[qid]["image"]][: questions // 2]
    plain = [qid for qid in splits["train"] if not problems[qid]["image"]][: questions - len(pictured)]
    chosen = {"train": pictured + plain, "val": splits["val"][:2], "test": splits["test"][:2]}
    used = [qid for qids in chosen.values() for qid in qids]
    with_image = [qid for qid in used if problems[qid]["image"]]
    files.write_json(data / "scienceqa/problems.json", {qid: problems[qid] for qid in used})
    files.write_json(data / "scienceqa/pid_splits.json", chosen)
    files.write_json(data / "captions.json", {"captions": {q: text for q, text in captions.items() if q in used}})
    folder = data / "vision_features"
    folder.mkdir()
    features = np.random.default_rng(0).standard_normal((len(with_image), *PATCHES))
    np.save(folder / "vit.npy", features.astype(np.float32))
    files.write_json(folder / "vit.json", {"shape": list(PATCHES), "model_name": "test", "weights": "local"})
    files.write_json(folder / "name_map.json", {qid: row for row, qid in enumerate(with_image)})
    return data


def make_model(folder: Path, data: Path, tokenizer, patch_size=PATCHES, steps: int = 25, vocab_size=32128) -> Path:
    """A 2-layer T5 (of the real vocabulary), trained just enough that it writes words, full stops and `</s>`."""
    from model import MultimodalT5Config, T5ForMultimodalGeneration

    torch.set_num_threads(1)  # two threads of several processes on two cores wait for each other most of the time
    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=vocab_size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu", initializer_factor=0.05,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForMultimodalGeneration(config, patch_size)
    problems = json.loads((data / "scienceqa/problems.json").read_text())
    texts = [f"Solution: {problem['solution']}" for problem in problems.values() if problem["solution"]]
    rows = tokenizer(texts, truncation=True, max_length=48)["input_ids"]
    end = [tokenizer.convert_tokens_to_ids("."), 1]
    # short and ragged: it learns to stop
    rows = [torch.tensor(row[:-1][: 8 + 3 * (i % 5)] + end) for i, row in enumerate(rows)]
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    inputs = tokenizer(["Question:"] * len(rows), return_tensors="pt")
    images = {} if patch_size is None else {"image_ids": torch.zeros(len(rows), *patch_size)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for _ in range(steps):
        loss = model(**inputs, **images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 1.0 < loss.item() < 8.0, loss.item()  # neither untrained (ln 32128 = 10.4) nor memorised
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def score(sentence: str) -> float:
    """The stand-in Teacher's score: sentences with an `e` are good, the others bad."""
    return 0.9 if "e" in sentence else 0.2


def reply(sentences: list[str], scorer=score) -> str:
    """A reply as the Teacher writes it: an object, one sentence per line, duplicates kept."""
    return "{\n" + ",\n".join(f"{json.dumps(s, ensure_ascii=False)}: {scorer(s)}" for s in sentences) + "\n}"


def answer(questions: Path, skip=lambda item: False, spoil=lambda item: False, scorer=score, done=True) -> int:
    """Write a reply to every exported rationale as the Teacher's tools do; with `done` signal every action.

    `skip(item)`: no reply; `spoil(item)`: an unusable one. Returns the number of sentences scored."""
    count, items = 0, handoff.iter_items(questions)
    for item in items:
        if skip(item):
            continue
        if spoil(item):
            text = (item.folder / handoff.RATIONALE).read_text()
        else:
            sentences = handoff.read_rationale(item.folder)
            text, count = reply(sentences, scorer), count + len(sentences)
        files.write_text(item.folder / handoff.REPLY, text)
    for action in sorted({item.action for item in items}) if done else ():
        handoff.mark_done(questions, action)
    return count
