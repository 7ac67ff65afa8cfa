"""From a data folder to batches: problems with captions and corrections, vision features, dataset, collator.

Everything is read and checked before a model is loaded (UserError names the file or question). Text is tokenised
once, whole splits at a time; vision features stay on disk and are gathered batch by batch. The prompts are in
utils_prompt.py, the readers of problems, splits and captions in ares/data_folder.py.

    data = load_data(args, {"train": args.train_split, "val": args.val_split})
    dataset = RationaleDataset(data.problems, data.qids["train"], load_tokenizer(args, args.model), args)
    loader = DataLoader(dataset, args.bs, collate_fn=Collator(tokenizer.pad_token_id, data.features))
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ares import data_folder as files
from ares.cli import CAPTION_DEFAULT, UserError, img_shape, in_one_line, print0, refuse, warn0
from ares.devices import padded_length
from ares.predictions import read_predictions
from utils_prompt import build_train_pair, normalize, option_letters
from vision.features import VisionFeatures

IGNORE = -100  # label of a pad, which torch's cross entropy ignores
SAMPLE_ROWS = 32  # feature rows checked when a run begins: 19 MB of ViT's


@dataclass
class Data:
    """Everything a run reads. `qids` has one entry per role ("train", "val", "test"), in split order."""

    dataset: str
    problems: files.Problems
    qids: dict[str, list[str]]
    features: VisionFeatures | None
    patch_size: tuple[int, int] | None  # (patches, dim) for the model; None: text only


def load_data(args: argparse.Namespace, splits: Mapping[str, str]) -> Data:
    """Read and check a run's data: `splits` maps a role to a split's name, {"train": "minitrain", ...}.

    Every problem gets its `caption` ("" without --use_caption); under --correction the questions of the role "train"
    get the corrected solutions. Raises UserError for whatever is absent, malformed or does not fit together.
    """
    # MM-CoT's users, who import load_data_std and load_data_img, do not have these flags
    args = argparse.Namespace(**{"dataset": None, "vision_features": None, "name_map": None, **vars(args)})
    refuse(data_flag_faults(args))
    data = files.read_data_folder(args.data_root, args.dataset)
    problems = data.problems
    evaluated = [splits[role] for role in ("val", "test") if role in splits]
    files.check_overlap(data.splits, splits.get("train", ""), evaluated)
    qids = {role: data.split(name, f"--{role}_split") for role, name in splits.items()}
    used = list(dict.fromkeys(qid for role in qids.values() for qid in role))
    for qid in used:
        option_letters(problems[qid], args.options, qid)
    by_split, captions = {name: qids[role] for role, name in splits.items()}, {}
    if args.use_caption:
        path = files.find_captions(args)
        captions = files.load_captions(path)
        files.check_captions(path, captions, problems, by_split)
    elif args.caption_file != CAPTION_DEFAULT:
        print0("note: --caption_file has no effect without --use_caption")
    for qid, problem in problems.items():
        problem["caption"] = captions.get(qid, "")
    if getattr(args, "correction", False):
        corrected = files.read_correction(files.find_correction(args), problems, qids.get("train", []))
        for qid, solution in corrected.items():
            problems[qid]["solution"] = solution
    if args.img_type is None:
        return Data(data.dataset, problems, qids, None, None)
    features = open_features(args)
    check_coverage(features, problems, by_split)
    return Data(data.dataset, problems, qids, features, features.shape)


def load_data_std(args: argparse.Namespace) -> tuple[files.Problems, dict[str, list[str]]]:
    """`(problems, qids)` of the train, val and test splits, text only. The name MM-CoT's users import."""
    text_only = {"img_type": None, "vision_features": None, "name_map": None}
    splits = {"train": args.train_split, "val": args.val_split, "test": args.test_split}
    data = load_data(argparse.Namespace(**{**vars(args), **text_only}), splits)
    return data.problems, data.qids


def load_data_img(
    args: argparse.Namespace,
) -> tuple[files.Problems, dict[str, list[str]], dict[str, int], VisionFeatures]:
    """`(problems, qids, name_maps, image_features)`; `image_features[row]` is (patches, dim). MM-CoT's name. The
    features stay on disk: index them by row, or gather a batch by question ids."""
    if args.img_type is None:
        raise UserError(f"--img_type: load_data_img needs one of {', '.join(img_shape)}; load_data_std is text only")
    data = load_data(args, {"train": args.train_split, "val": args.val_split, "test": args.test_split})
    return data.problems, data.qids, data.features.name_map, data.features


def data_flag_faults(args: argparse.Namespace) -> list[str]:
    """Messages on data flags that contradict each other or would be ignored, for a script's one `cli.refuse`."""
    faults = []
    if args.img_type is None:
        if idle := [f"--{name}" for name in ("vision_features", "name_map") if getattr(args, name) is not None]:
            faults.append(f"{' and '.join(idle)}: no effect without --img_type; add it or drop them")
    if getattr(args, "correction", False) and not args.correction_file:
        faults.append("--correction True needs --correction_file")
    letters = "".join(getattr(args, "options", ""))  # tools/doctor.py has none
    if len(set(letters)) < len(letters):
        faults.append(f"--options: {' '.join(args.options)} names a letter twice; answers could not be told apart")
    return faults


def check_prompt_flags(args: argparse.Namespace) -> None:
    """Print a note where --prompt_format uses the given rationales in another way than a user may expect."""
    flag = f"--prompt_format {args.prompt_format}"
    context, _, asked = args.prompt_format.partition("-")
    given = {name: getattr(args, f"{name}_le", None) for name in ("train", "eval", "test")}
    named = " and ".join(f"--{name}_le" for name, path in given.items() if path)
    if context == "QCM" and named:
        print0(f"note: {flag} does not contain the rationale, so {named} changes nothing in the prompts; QCMG-{asked} "
               "puts it there")  # fmt: skip
    absent = [name for name in ("eval", "test") if not given[name]]
    if context == "QCMG" and absent:
        without, splits = " and ".join(f"--{name}_le" for name in absent), " and ".join(absent)
        warn0(f"{flag} without {without} puts the gold solution into the prompts of the {splits} split")


def open_features(args: argparse.Namespace) -> VisionFeatures:
    """Find, map and check the features of --img_type and their name map. Raises UserError. SAMPLE_ROWS rows are
    checked for NaN and infinity; tools/doctor.py checks all."""
    path = files.find_feature_file(args)
    name_map = files.find_name_map(args, path.parent)
    features = VisionFeatures(path, files.load_name_map(name_map), args.img_type)
    qid, row = max(features.name_map.items(), key=lambda item: item[1], default=("", -1))
    if row >= features.rows:
        fault = f"asks for row {row} (question {qid}) but {path} has only {features.rows} rows"
        raise UserError(f"--name_map: {name_map} {fault}; the two must come from one run of extract_features.py")
    named = len(set(features.name_map.values()))
    if named < len(features.name_map):
        warn0(f"{name_map} gives {len(features.name_map)} questions only {named} different rows")
    if named < features.rows:
        print0(f"note: {name_map} names {named} of the {features.rows} rows of {path}")
    spread = np.linspace(0, features.rows - 1, min(features.rows, SAMPLE_ROWS), dtype=int)
    features.check_finite(spread.tolist())
    return features


def check_coverage(features: VisionFeatures, problems: Mapping[str, Any], splits: Mapping[str, Sequence[str]]) -> None:
    """Warn of questions that name an image but have no feature row (they get zeros); UserError if these are more
    than half of a split (name -> qids)."""
    few, some = f"--name_map: the map used with {features.path} has rows", "have no feature row and get zeros"
    files.check_pictured(features.name_map, problems, splits, few, some)


def read_le(path: str | Path, qids: Sequence[str], flag: str) -> dict[str, str]:
    """qid -> rationale from a predictions file: by its `qids` where it has them, else in the order of `qids`. Raises
    UserError naming `flag` if one is missing, or if a file without ids has another length than the split."""
    by_qid = read_predictions(path, flag, qids).by_qid()
    if absent := [qid for qid in qids if qid not in by_qid]:
        lacks = f"{len(absent)} of the split's {len(qids)} questions, the first being {absent[0]}"
        raise UserError(f"{flag}: {path} lacks {lacks}")
    return {qid: by_qid[qid] for qid in qids}


def load_tokenizer(args: argparse.Namespace, *folders: str | Path | None) -> Any:
    """The tokenizer: --tokenizer, else the first of `folders` (the checkpoint's own) that holds one, else --model's.

    A folder is used only if it holds a vocabulary: from config.json alone transformers would create an empty one.
    Raises UserError if no tokenizer is found or it is not of T5's kind.
    """
    if args.tokenizer:
        return _read_tokenizer(args.tokenizer, "--tokenizer")
    for folder in (*folders, args.model):
        if folder and _holds_tokenizer(folder):
            return _read_tokenizer(folder, "tokenizer")
    if not Path(args.model).exists() and args.model[0] not in "./~":  # a hub id
        return _read_tokenizer(args.model, "--model")
    places = ", ".join(dict.fromkeys(str(folder) for folder in (*folders, args.model) if folder))
    raise UserError(f"--tokenizer: none found in {places}; name the folder of the model's tokenizer")


def _holds_tokenizer(folder: str | Path) -> bool:
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "spiece.model"))


def _read_tokenizer(name: str | Path, flag: str) -> Any:
    from transformers import AutoTokenizer, T5Tokenizer

    folder = Path(name)
    if folder.is_dir() and not _holds_tokenizer(folder):
        raise UserError(f"{flag}: {folder} holds neither tokenizer.json nor spiece.model")
    bare = folder.is_dir() and not any((folder / n).is_file() for n in ("tokenizer_config.json", "config.json"))
    try:
        # trust_remote_code=False: else the library asks on the terminal whether to run code beside the vocabulary
        kind, options = (T5Tokenizer, {}) if bare else (AutoTokenizer, {"trust_remote_code": False})
        tokenizer = kind.from_pretrained(str(name), **options)
    except Exception as error:  # the hub, the file system and the parsers each raise their own
        fault = f"no tokenizer can be loaded from {name} ({in_one_line(error, 160)})"
        raise UserError(f"{flag}: {fault}; name the folder of one with --tokenizer") from error
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise UserError(f"{flag}: {name} is no tokenizer of T5's kind (pad, </s> and a fast form are needed)")
    return tokenizer


def check_vocabulary(tokenizer: Any, info: Any) -> None:
    """Raise UserError if the tokenizer has more pieces than the checkpoint (`CheckpointInfo`, or None) embeddings."""
    if info is not None and len(tokenizer) > info.config.vocab_size:
        fault = f"{len(tokenizer)} pieces but {info.folder} only {info.config.vocab_size} embeddings"
        raise UserError(f"--tokenizer: {tokenizer.name_or_path} has {fault}; name the model's own tokenizer")


class RationaleDataset(Dataset):
    """Prompts and targets of some questions, tokenised once when built.

    Items are {"qid", "input_ids": list[int], "labels": list[int]}, truncated to `args.input_len` and
    `args.output_len` tokens with the closing `</s>` kept, without padding. `le`: qid -> rationale for the QCMG
    formats; None puts the gold one there.

    Attributes: `qids`, `prompts` and `targets` (the strings, white space collapsed, as tokenised).
    """

    def __init__(
        self, problems: Mapping[str, Mapping[str, Any]], qids: Sequence[str], tokenizer: Any, args: argparse.Namespace,
        le: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self.qids = list(qids)
        pairs = [build_train_pair(problems, qid, args, None if le is None else le[qid]) for qid in self.qids]
        self.prompts = [normalize(prompt) for prompt, _ in pairs]
        self.targets = [normalize(target) for _, target in pairs]
        self.input_ids = tokenise(self.prompts, args.input_len, tokenizer)
        self.labels = tokenise(self.targets, args.output_len, tokenizer)

    def __len__(self) -> int:
        return len(self.qids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"qid": self.qids[i], "input_ids": self.input_ids[i], "labels": self.labels[i]}


def tokenise(texts: Sequence[str], longest: int, tokenizer: Any, rows: int = 1024) -> list[list[int]]:
    """Ids of each text, cut at `longest`. `rows` texts a call: the tokenizer's own results are large, and the memory
    of a whole split's (190 MB) stays with the process."""
    how = {"truncation": True, "max_length": longest, "return_attention_mask": False}
    parts = (tokenizer(texts[i : i + rows], **how)["input_ids"] for i in range(0, len(texts), rows))
    return [ids for part in parts for ids in part]


class Batch(dict):
    """Tensors by name. A DataLoader that pins memory calls `pin_memory`, which skips expanded views: torch cannot pin
    these, and absent images and ResNet's repeated vector are some (`VisionFeatures.gather`)."""

    def pin_memory(self) -> Batch:
        can_be_pinned = {name for name, t in self.items() if isinstance(t, torch.Tensor) and 0 not in t.stride()}
        return Batch({name: t.pin_memory() if name in can_be_pinned else t for name, t in self.items()})


def batches_pin_themselves() -> bool:
    """Whether this torch's DataLoader calls `Batch.pin_memory`; older ones (2.6) pin every tensor of a dict."""
    from torch.utils.data._utils.pin_memory import pin_memory

    class Probe(dict):
        def pin_memory(self) -> str:
            return "asked"

    return pin_memory(Probe()) == "asked"


class Collator:
    """Items -> one batch of tensors, padded on the right to its longest row (T5's positions break with left pads).

    `input_ids`, `attention_mask` (B, L_in), `labels` (B, L_out) with -100 on pads - where the released code counted
    the pads as targets - and, given `features`, `image_ids` float32 (B, patches, dim). `with_qids` adds the ids.
    `device`: where the batches will go; for a GPU lengths are multiples of 8.
    """

    def __init__(
        self, pad_token_id: int, features: VisionFeatures | None = None, with_qids: bool = False, device: Any = None
    ):
        self.pad_token_id, self.features, self.with_qids, self.device = pad_token_id, features, with_qids, device

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        input_ids, attention_mask = self._pad([item["input_ids"] for item in items], self.pad_token_id)
        batch = Batch(input_ids=input_ids, attention_mask=attention_mask)
        if "labels" in items[0]:
            batch["labels"], _ = self._pad([item["labels"] for item in items], IGNORE)
        if self.features is not None:
            batch["image_ids"] = self.features.gather([item["qid"] for item in items])
        if self.with_qids:
            batch["qids"] = [item["qid"] for item in items]
        return batch

    def _pad(self, rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of ids -> (B, longest) padded on the right, and the mask of real ids."""
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(padded_length(int(lengths.max()), self.device))[None, :] < lengths[:, None]
        padded = np.full(mask.shape, pad, dtype=np.int64)
        padded[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
        return torch.from_numpy(padded), torch.from_numpy(mask.astype(np.int64))
