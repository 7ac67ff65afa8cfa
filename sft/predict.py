"""One prediction loop for evaluation during training, for the prediction files and for --evaluate_dir.

Rows are sorted by length and distributed over the processes; each batch is either generated greedily (--use_generate:
ares/decoding.py) or read off as the arg-max of teacher-forced logits. `predictions_ans_{test,eval,train}.json` are
written one by one as each split is done; an interrupted split continues with the rows that it has
(`.predicting_{split}/`). A file that was made with the same weights, prompts and settings is kept. The scores'
formulas are in utils_evaluate.py. Used by sft/run.py and tools/predict.py:

    predictor = Predictor(args, problems, tokenizer, collator, device)
    predictor.evaluate(model, dataset)     # {"rougeL": 61.2}
    predictor.write(folder, {"test": dataset}, load_model, weights=[folder])
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from ares import cli, decoding, files
from ares.cli import UserError, print0
from ares.decoding import greedy
from ares.devices import to_device
from ares.predictions import FILE_NAMES, prediction_file, unread_note
from model import choose_attention
from sft.batching import lengths, prediction_batches
from utils_data import IGNORE
from utils_evaluate import extract_answer, get_scores, resolve_answer, training_rouge
from utils_prompt import answer_letter

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "adapter_config.json")

FINGERPRINTS = ("tokenizer", "features")  # of a prediction file's settings: contents, not flags

Rows = dict[int, list[int]]  # row of the split -> predicted ids


def from_rank0(function: Callable, *args: Any) -> Any:
    """`function(*args)` of rank 0, returned on every rank; a UserError is raised on every rank. Must be picklable."""
    box: list[Any] = [None]
    if cli.rank() == 0:
        try:
            box[0] = function(*args)
        except UserError as error:
            box[0] = UserError(str(error))  # one that can be pickled
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def digest(dataset: Any) -> str:
    """A hash of the ids that the model sees: two launches with the same one work on the same data."""
    sha = hashlib.sha256()
    for item in map(dataset.__getitem__, range(len(dataset))):
        for ids in (item["input_ids"], item["labels"]):
            sha.update(np.asarray(ids, np.int32).tobytes() + b"|")
        sha.update(item["qid"].encode() + b"\n")
    return sha.hexdigest()[:16]


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of a tokenizer's pieces and their ids, the same whatever library version saved it."""
    identity = [sorted(tokenizer.get_vocab().items()), tokenizer.pad_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


@contextlib.contextmanager
def casts_kept(model: torch.nn.Module) -> Iterator[None]:
    """In the block, which computes no gradients, autocast casts a frozen weight once and not at every use: it keeps
    the casts of weights that require a gradient only. With an adapter nearly all are frozen."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


class Predictor:
    """Predicts splits and scores what it predicted. One per launch; the same on every rank."""

    def __init__(
        self, args: argparse.Namespace, problems: Mapping[str, Mapping[str, Any]], tokenizer: Any,
        collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]], device: torch.device,
        bf16: bool = False,
    ):  # fmt: skip
        self.args, self.problems, self.tokenizer = args, problems, tokenizer
        decoding.use_graphs(args.decode_graph)
        self.asked = args.prompt_format.split("-")[1]  # of the target: A (the bare answer), E, LE, LEA or ALE
        self.collator, self.device, self.bf16 = collator, device, bf16
        if not args.use_generate:
            forced = "the arg-max of logits that see the gold text (teacher forcing), as released"
            print0(f"note: predictions are {forced}; --use_generate generates them instead")

    def predict(self, model: torch.nn.Module, dataset: Any, desc: str, store: Path | None = None) -> list[list[int]]:
        """Predicted ids per row (no start token, no pads), in split order, on every rank. `store`: folder to which
        finished rows are appended; rows that it holds are not predicted again."""
        # a slow rank must not find rows that a fast one has added by now: their batches would differ
        done = _gather(_read_rows(store)) if store else {}
        mine = prediction_batches(lengths(dataset), self.args.eval_bs, done)[cli.rank() :: cli.world_size()]
        model.eval()
        rows: Rows = {}
        held: list[tuple[list[int], torch.Tensor]] = []  # on the device, for --eval_acc batches
        lines = files.Lines(store / f"rows_{cli.rank()}_{os.getpid()}.jsonl") if store else None
        with contextlib.closing(lines) if lines else contextlib.nullcontext():
            for number, batch in enumerate(cli.progress(mine, desc=desc, unit="batch"), 1):
                held.append((batch, self._predict_batch(model, [dataset[i] for i in batch])))
                if len(held) == (self.args.eval_acc or 1) or number == len(mine):
                    new = {i: ids for batch, ids in held for i, ids in zip(batch, self._trim(ids), strict=True)}
                    if lines:
                        lines.add("\n".join(json.dumps([index, ids]) for index, ids in new.items()))
                    rows.update(new)
                    held.clear()
        everything = {**done, **_gather(rows)}
        return [everything[i] for i in range(len(dataset))]

    @torch.no_grad()
    def _predict_batch(self, model: torch.nn.Module, items: list[dict]) -> torch.Tensor:
        """Predicted ids (B, L), padded, without the start token."""
        inputs = to_device(self.collator(items), self.device)
        kept = casts_kept(model) if self.bf16 else contextlib.nullcontext()
        with kept, torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if not self.args.use_generate:
                logits = model(**inputs, use_cache=False).logits  # (B, L, V)
                return logits.argmax(-1).masked_fill(inputs["labels"] == IGNORE, self.tokenizer.pad_token_id)
            inputs.pop("labels")
            # --output_len counts the start token, as released
            return greedy(model, inputs, self.args.output_len)[:, 1:]

    def _trim(self, ids: torch.Tensor) -> list[list[int]]:
        """Rows of ids without the pads at their ends."""
        pad, rows = self.tokenizer.pad_token_id, ids.tolist()
        ends = [max((t + 1 for t, token in enumerate(row) if token != pad), default=0) for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """Ids -> texts, blanks before punctuation removed as in transformers 4 (the released files' convention)."""
        return self.tokenizer.batch_decode(list(rows), skip_special_tokens=True, clean_up_tokenization_spaces=True)

    def evaluate(self, model: torch.nn.Module, dataset: Any) -> dict[str, float]:
        """The metric of one epoch, in percent: accuracy for the A formats (failed = wrong), else ROUGE-L."""
        texts = self.decode(self.predict(model, dataset, "evaluate"))
        if self.asked == "A":
            letters = self.letters(dataset.qids, texts)
            gold = [answer_letter(self.problems[qid], self.args.options, qid) for qid in dataset.qids]
            right = sum(letter == wanted for letter, wanted in zip(letters, gold, strict=True))
            return {"accuracy": 100 * right / len(gold)}
        return {"rougeL": training_rouge(texts, self.decode(dataset.labels))}

    def letters(self, qids: Sequence[str], texts: Sequence[str]) -> list[str | None]:
        """The parsed answer of each row: a letter, or None where there is none among the question's options."""
        rows = zip(qids, texts, strict=True)
        return [extract_answer(text, len(self.problems[qid]["choices"]), self.args.options) for qid, text in rows]

    def scores(self, qids: Sequence[str], preds: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
        """`num_fail` and `scores` of a split, of the parts that the format asks for: answer, rationale or both. For E
        and LE there is no answer to fail at: `num_fail` is None, no table of random choices is made."""
        answers, failed = {}, 0
        if "A" in self.asked:
            for qid, text in zip(qids, preds, strict=True):
                n_choices = len(self.problems[qid]["choices"])
                answers[qid], read = resolve_answer(text, n_choices, qid, self.args.seed, self.args.options)
                failed += not read
        rationales = dict(zip(qids, preds, strict=True)) if "E" in self.asked else {}
        references = dict(zip(qids, labels, strict=True))
        scores = get_scores(answers, rationales, references, self.problems)
        return {"num_fail": failed if answers else None, "scores": scores}

    def write(
        self, folder: Path, datasets: Mapping[str, Any], load: Callable[[], torch.nn.Module],
        weights: Sequence[str | os.PathLike],
    ) -> None:  # fmt: skip
        """Write `folder`/predictions_ans_{test,eval,train}.json for the splits of `datasets`, each as it is done.

        `load` is called at most once, and not at all if every file is already there. `weights`: folders whose weight
        files the predictions depend on.
        """
        model, made = None, {}  # made: digest of the data -> predicted ids
        identity = from_rank0(weights_digest, weights)
        for split, dataset in datasets.items():
            path, store = prediction_file(folder, split), folder / f".predicting_{FILE_NAMES[split]}"
            settings = self.settings(dataset, identity)
            if not self.args.overwrite and from_rank0(_made_with, path, settings):
                print0(f"{path}: already there, made with these settings (--overwrite predicts again)")
                continue
            if model is None:
                model = load().to(self.device)
                choose_attention(model, self.device)
            from_rank0(_open_store, store, settings, self.args.overwrite)
            rows = made.get(settings["data"])  # A-OKVQA: test = val
            if rows is None:
                rows = made[settings["data"]] = self.predict(model, dataset, f"predict {FILE_NAMES[split]}", store)
            from_rank0(self._write_file, path, split, dataset, rows, settings)
            from_rank0(shutil.rmtree, store)

    def settings(self, dataset: Any, identity: str) -> dict[str, Any]:
        """What the predictions of a split depend on; kept in its file under "settings"."""
        sha = hashlib.sha256(digest(dataset).encode())
        if self.collator.features is not None:
            pictured = [qid for qid in dataset.qids if qid in self.collator.features.name_map]
            sha.update(self.collator.features.gather(pictured[:8]).contiguous().numpy().tobytes())
        names = ("img_type", "prompt_format", "use_generate", "output_len", "seed")
        return {
            "weights": identity, "data": sha.hexdigest()[:16], **{name: getattr(self.args, name) for name in names},
            **({"precision": "bf16"} if self.bf16 else {}),
            "tokenizer": tokenizer_digest(self.tokenizer), "features": self.features_digest(dataset.qids),
        }  # fmt: skip

    def features_digest(self, qids: Sequence[str]) -> str | None:
        """`VisionFeatures.digest`, read on rank 0 alone; None without features."""
        features = self.collator.features
        return None if features is None else from_rank0(features.digest, qids)

    def _write_file(self, path: Path, split: str, dataset: Any, rows: list[list[int]], settings: dict) -> None:
        preds, labels = self.decode(rows), self.decode(dataset.labels)
        content = self.scores(dataset.qids, preds, labels) if split == "test" else {}
        content |= {"preds": preds, "labels": labels, "qids": dataset.qids, "prompts": dataset.prompts}
        content |= {"answers": self.letters(dataset.qids, preds), "settings": settings}
        files.write_json(path, content)
        print0(f"predictions: {path} ({len(preds)} rows)")
        if "A" in self.asked and (note := unread_note(content["answers"].count(None), len(preds), path)):
            cli.warn0(f"{note}. Train longer, raise --output_len, or predict with --use_generate")
        if split == "test":
            failed = "" if content["num_fail"] is None else f"num_fail {content['num_fail']}, "
            print0(f"{failed}scores {json.dumps(content['scores'])}")


def weights_digest(folders: Sequence[str | os.PathLike]) -> str:
    """A hash over the weight files of some folders; a hub id counts by its name."""
    sha = hashlib.sha256()
    for folder in folders:
        found = sorted({file for pattern in WEIGHT_FILES for file in Path(folder).glob(pattern)})
        if not found:
            sha.update(str(folder).encode())
        for file in found:
            with open(file, "rb") as opened:
                sha.update(hashlib.file_digest(opened, "sha256").digest())
    return sha.hexdigest()[:16]


def _made_with(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `path` was made with these settings. Files are written in one step: one that is there is complete."""
    try:
        found = files.read_json(path, "predictions", dict).get("settings")
    except UserError:  # absent, or damaged: it is made again
        return False
    if not isinstance(found, dict):
        return False
    # earlier versions recorded no FINGERPRINTS
    return found == {key: value for key, value in settings.items() if key in found or key not in FINGERPRINTS}


def _open_store(store: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Make `store` hold rows of these settings only."""
    if overwrite or not _made_with(store / "settings.json", settings):
        shutil.rmtree(store, ignore_errors=True)
        files.write_json(store / "settings.json", {"settings": settings})


def _read_rows(store: Path) -> Rows:
    """Rows that an earlier launch finished, on however many processes."""
    rows: Rows = {}
    for file in sorted(store.glob("rows_*.jsonl")):
        for _, entry in files.read_jsonl(file, "rows", lambda number: None):  # a kill cuts a line short
            complete = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)
            if complete and all(type(each) is int for each in (entry[0], *entry[1])):
                rows[entry[0]] = entry[1]
    return rows


def _gather(rows: Rows) -> Rows:
    """The rows of all processes, on each of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    shares: list[Rows] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, rows)
    return {index: ids for share in shares for index, ids in share.items()}
