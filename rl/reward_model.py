"""A reward model: the value architecture of model.py, trained to predict the Teacher's score of every sentence.

    data = read_questions(args, qids)
    model = load(folder, data.patch_size, device)
    scorer = Scorer(model, make_prompts(data, qids, tokenizer, args, device), device, bf16)
    scorer.predict(rationales)                            # [[0.9, 0.25], ...]
    RewardTeacher(folder, args)                           # haiku.py --teacher model

The prediction for a sentence is the value of the state after its last token, where RL rewards the sentence
(`ares.sentences.sentence_columns`), plus the mean state of its tokens: from the last state alone a small model learns
what a rationale is worth, but hardly which of its sentences. A questions folder holds texts, not the sampled ids, so a
rationale is tokenised again, sentence by sentence. Training: rl/reward_training.py.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import utils_data
from ares import cli, data_folder, files
from ares.checkpoints import read_shapes
from ares.cli import PROMPT_FORMATS, UserError
from ares.devices import enough_memory, on_gpu, padded_length, to_device
from ares.sentences import sentence_columns
from model import VALUE_FUNCTION, T5ForMultimodalGenerationValueFunction, check_checkpoint, choose_attention
from rl import actor_critic
from rl.minibatches import micro_batches
from rl.rollouts import Prompts
from teacher.interface import MODEL, Reply, Request, Stopped
from utils_prompt import option_letters

HEAD = "v_head.0.weight"  # in the weights of a reward model's folder, not in those of a rationale model
METRICS = "metrics.json"  # written last
PASS_TOKENS = {"cpu": 4096, "gpu": 8192}  # of prompts and rationales in one forward and backward pass, with padding
ROWS = 1024  # rationales tokenised per call
ASKED = 1024  # requests that the Teacher takes at a time, to form batches of similar length
PROMPT_FLAGS = {  # what a prompt depends on, recorded in args.yaml -> whether a value can be one
    "prompt_format": lambda value: value in PROMPT_FORMATS,
    "img_type": lambda value: value is None or value in cli.IMG_TYPES,
    "use_caption": lambda value: isinstance(value, bool),
    "options": lambda value: isinstance(value, list) and all(isinstance(one, str) and one for one in value),
    "input_len": lambda value: type(value) is int and value > 0,
    "read_twice": lambda value: isinstance(value, bool),
}
DATA_FLAGS = ("data_root", "dataset", "caption_file", "vision_features", "name_map")


# -- rationales --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rationale:
    """One rationale, and the Teacher's scores of its sentences where they are known.

    ids: decoder ids from the start token to `</s>`; columns: where each sentence ends in them; begin: column of the
    first sentence's first token.
    """

    qid: str
    sentences: tuple[str, ...]
    ids: tuple[int, ...]
    columns: tuple[int, ...]
    scores: tuple[float, ...] = ()
    begin: int = 1

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and last column of every sentence; one of no tokens has a column all the same."""
        firsts = (self.begin, *(last + 1 for last in self.columns))
        return [(min(first, last), last) for first, last in zip(firsts, self.columns, strict=False)]


def tokenised(
    asked: Iterable[tuple[str, Sequence[str]]],
    tokenizer: Any,
    twice: bool = False,
    scores: Iterable[Sequence[float]] | None = None,
) -> list[Rationale]:
    """A Rationale for each (question, its sentences), with its scores where they are given; with `twice` its ids hold
    the text two times, and the columns are those of the second one, before which the decoder has seen the whole text.

    Sentences are tokenised one by one, which gives the ids of the joined text: T5's pieces do not cross blanks. The
    columns are those that RL finds in the same ids; where the rule finds another number of sentences in them (RL may
    have split at what the text no longer shows), the columns of the sentences' own last tokens.
    """
    asked, found = list(asked), []
    given = iter(scores if scores is not None else [()] * len(asked))
    for start in range(0, len(asked), ROWS):
        rows = asked[start : start + ROWS]
        texts = [sentence for _, sentences in rows for sentence in sentences]
        parts = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        for qid, sentences in rows:
            # a pad would end the rationale: every mask takes it for "no token"
            mine = [[token for token in next(parts) if token != tokenizer.pad_token_id] for _ in sentences]
            ids = (tokenizer.pad_token_id, *chain.from_iterable(mine), tokenizer.eos_token_id)
            columns = sentence_columns(ids, tokenizer)
            if len(columns) != len(mine):
                columns = accumulate(map(len, mine))  # the start token is column 0
            shift = len(ids) - 1 if twice else 0
            columns = tuple(column + shift for column in columns)
            ids = (*ids, *ids[1:]) if twice else ids
            found.append(Rationale(qid, tuple(sentences), ids, columns, tuple(next(given)), 1 + shift))
    return found


# -- prompts -----------------------------------------------------------------------------------------------


def read_questions(args: argparse.Namespace, qids: Sequence[str]) -> utils_data.Data:
    """Problems with captions, and features, checked for the questions `qids`. `args`: PROMPT_FLAGS and DATA_FLAGS.
    Raises UserError for whatever is absent, malformed or does not fit together."""
    data = utils_data.load_data(args, {})
    unknown = next((qid for qid in qids if qid not in data.problems), None)
    if unknown is not None:
        raise UserError(
            f"--data_root: question {unknown} of the questions folders is not in problems.json; name their data"
        )
    for qid in qids:
        option_letters(data.problems[qid], args.options, qid)
    splits = {"of the questions folders": qids}
    if args.use_caption:
        captioned = {qid for qid in qids if data.problems[qid]["caption"]}
        few = "--caption_file: there are captions"
        data_folder.check_pictured(captioned, data.problems, splits, few, "have no caption")
    if data.features is not None:
        utils_data.check_coverage(data.features, data.problems, splits)
    return data


def make_prompts(
    data: utils_data.Data, qids: Sequence[str], tokenizer: Any, args: Any, device: torch.device
) -> Prompts:
    """The prompts of these questions, as RL makes them."""
    how = argparse.Namespace(**{**vars(args), "output_len": 2})  # of the gold rationales, which are not used
    dataset = utils_data.RationaleDataset(data.problems, qids, tokenizer, how)
    collator = utils_data.Collator(tokenizer.pad_token_id, data.features, device=device)
    return Prompts(dataset, collator, device)


# -- the model ---------------------------------------------------------------------------------------------


def load(
    folder: str | os.PathLike, patch_size: Any, device: torch.device, seed: int = 0, mean: float | None = None
) -> T5ForMultimodalGenerationValueFunction:
    """The model of a folder in eval mode. `mean`: begin to train with this prediction for every sentence, by a last
    layer of zeros, unless the folder holds a reward model."""
    model = T5ForMultimodalGenerationValueFunction.from_pretrained(folder, patch_size=patch_size, seed=seed)
    if mean is not None and not is_reward_model(folder):
        nn.init.zeros_(model.v_head[-1].weight)
        nn.init.constant_(model.v_head[-1].bias, mean)
    choose_attention(model, device)
    return model.to(device).eval()


def is_reward_model(folder: str | os.PathLike) -> bool:
    """Whether the weights of a folder hold the head of a reward model. Raises UserError where there are none."""
    return HEAD in read_shapes(Path(folder), "--model")


class Scorer:
    """A reward model with the prompts of its questions."""

    def __init__(self, model: nn.Module, prompts: Prompts, device: torch.device, bf16: bool):
        self.model, self.prompts, self.device, self.bf16 = model, prompts, device, bf16
        self.tokens = PASS_TOKENS["gpu" if on_gpu(device) else "cpu"]

    def values(self, rows: Sequence[Rationale]) -> Tensor:
        """Predictions (N,) float32 for the sentences of `rows`, row after row, on the device; each prompt is encoded
        once, whatever the number of its rationales."""
        qids = {qid: i for i, qid in enumerate(dict.fromkeys(row.qid for row in rows))}
        T = padded_length(max(len(row.ids) for row in rows), self.device)
        # actions[:, :-1] is what a decoder reads: the last token gets a successor, which nothing reads
        actions = torch.zeros(len(rows), T + 1, dtype=torch.long)
        for i, row in enumerate(rows):
            actions[i, : len(row.ids) + 1] = torch.tensor([*row.ids, row.ids[-1]])
        S = max(len(row.columns) for row in rows)
        read_out = torch.zeros(len(rows), S, T)  # (B, S, T): the last state plus the mean
        for i, row in enumerate(rows):
            for s, (first, last) in enumerate(row.spans):
                read_out[i, s, first : last + 1] = 1 / (last + 1 - first)
                read_out[i, s, last] += 1
        places = torch.tensor([i * S + s for i, row in enumerate(rows) for s in range(len(row.columns))]).long()
        question = torch.tensor([qids[row.qid] for row in rows])
        prompt = self.prompts.batch(list(qids))
        how = (to_device(question, self.device), to_device(actions, self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            states = actor_critic.encode(self.model, prompt)
            decoded = actor_critic.decode(self.model, states, prompt["attention_mask"], *how)  # (B, T, d)
        read = torch.bmm(to_device(read_out, self.device), decoded.float()).flatten(0, 1)  # (B * S, d)
        return self.model.values(read.index_select(0, to_device(places, self.device))).float()

    def passes(self, rationales: Sequence[Rationale], rows: Sequence[int]) -> list[list[int]]:
        """`rows` in their order, cut into forward passes; neighbouring rationales of a question share one."""
        lengths = {row: (len(rationales[row].ids), self.prompts.lengths[rationales[row].qid]) for row in rows}
        groups = [[list(group)] for _, group in groupby(rows, key=lambda row: rationales[row].qid)]
        return [part for (part,) in micro_batches(groups, lengths, self.tokens)]

    def by_length(self, rationales: Sequence[Rationale]) -> list[list[int]]:
        """All rows in passes of prompts of similar length, the longest first."""
        order = sorted(range(len(rationales)), key=lambda row: self._place(rationales[row]))
        return self.passes(rationales, order)

    def _place(self, rationale: Rationale) -> tuple[int, str, int]:
        return -self.prompts.lengths[rationale.qid], rationale.qid, -len(rationale.ids)

    @torch.no_grad()
    def predict(self, rationales: Sequence[Rationale]) -> list[list[float]]:
        """The scores of each rationale's sentences: within [0, 1], two decimals."""
        found: list[list[float]] = [[] for _ in rationales]
        for rows in self.by_length(rationales):
            values = iter(self.values([rationales[row] for row in rows]).clamp(0, 1).tolist())
            for row in rows:
                found[row] = [round(next(values), 2) for _ in rationales[row].columns]
        return found

    @torch.no_grad()
    def loss(self, rationales: Sequence[Rationale]) -> float:
        """Mean squared error over all sentences."""
        total = sum(self.squares(rationales, rows).double() for rows in self.by_length(rationales))
        return float(total) / sum(len(row.scores) for row in rationales)

    def squares(self, rationales: Sequence[Rationale], rows: Sequence[int]) -> Tensor:
        """Sum of the squared errors over the sentences of `rows`, in one pass."""
        wanted = torch.tensor([score for row in rows for score in rationales[row].scores])
        return (self.values([rationales[row] for row in rows]) - to_device(wanted, self.device)).square().sum()


# -- the Teacher -------------------------------------------------------------------------------------------


def read_folder(folder: str | os.PathLike, args: Any) -> argparse.Namespace:
    """The prompt and data flags of a reward model's folder; data flags of `args` that are not None replace those
    recorded. Raises UserError unless tools/train_reward_model.py has finished the folder."""
    folder = Path(folder)
    made = "name the folder that tools/train_reward_model.py wrote"
    if not folder.is_dir():
        raise UserError(f"--reward_model: no folder {folder}; {made}")
    absent = next((name for name in ("args.yaml", METRICS) if not (folder / name).is_file()), None)
    if absent or (folder / VALUE_FUNCTION).exists() or HEAD not in read_shapes(folder, "--reward_model"):
        lacks = f"it has no {absent}" if absent else "its weights have no head for scores"
        raise UserError(f"--reward_model: {folder} holds no finished reward model ({lacks}); {made}")
    recorded = files.read_yaml(folder / "args.yaml", "--reward_model")
    for name, fits in PROMPT_FLAGS.items():
        if name not in recorded or not fits(recorded[name]):
            value = repr(recorded.get(name))[:60]
            raise UserError(f"--reward_model: {folder / 'args.yaml'}: {name} is {value}; {made}")
    flags = {name: recorded[name] for name in PROMPT_FLAGS}
    elsewhere = getattr(args, "data_root", None) is not None  # where the data set may have another name
    for name in DATA_FLAGS:
        given = getattr(args, name, None)
        flags[name] = recorded.get(name) if given is None and not (elsewhere and name == "dataset") else given
    return argparse.Namespace(**flags, model=str(folder), tokenizer=None)


def read_errors(path: Path) -> list[float]:
    """`error_by_score` of metrics.json. Raises UserError."""
    errors = files.read_json(path, "--reward_model", dict, nan=True).get("error_by_score")
    if not isinstance(errors, list) or len(errors) != 11 or not all(isinstance(one, (int, float)) for one in errors):
        raise UserError(f"--reward_model: {path} has no error_by_score, 11 numbers; train the model again")
    return errors


class RewardTeacher:
    """A Teacher (teacher/interface.py) that answers with a reward model's predictions: free, offline, deterministic on
    a CPU. `args`: data flags, of which those that are not None replace the recorded ones.

    Requests that wait at the same time are answered in batches of similar length. Raises UserError, before the model
    is loaded, for a folder that holds no reward model, and for data that do not fit it.
    """

    name = MODEL
    concurrency = ASKED

    def __init__(self, folder: str | os.PathLike, args: Any, qids: Sequence[str] = ()):
        self.folder = Path(folder)
        self.args = read_folder(folder, args)
        self.data = read_questions(self.args, qids)
        check_checkpoint(folder, self.data.patch_size, self.args.img_type, flag="--reward_model")
        captions = [self.data.problems[qid]["caption"] for qid in self.data.problems] if self.args.use_caption else []
        flags = [getattr(self.args, name) for name in PROMPT_FLAGS]
        digest = hashlib.sha256(json.dumps([flags, captions]).encode())
        for path in sorted(self.folder.glob("*.safetensors")):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        self.errors = read_errors(self.folder / METRICS)
        self.model = f"{self.folder.resolve().name}-{digest.hexdigest()[:12]}"
        self.scorer: Scorer | None = None
        self.known: dict[str, list[float]] = {}  # key -> scores
        self.waiting: list[tuple[Request, asyncio.Future]] = []
        self.working: asyncio.Task | None = None
        self.stopped = False

    async def __aenter__(self) -> RewardTeacher:
        self.waiting, self.working, self.stopped = [], None, False
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self.working is not None:
            await self.working

    def stop(self) -> None:
        self.stopped = True

    def key(self, request: Request) -> str:
        return self._key(request.qid, request.sentences)

    def _key(self, qid: str, sentences: Sequence[str]) -> str:
        return hashlib.sha256(json.dumps([self.model, qid, list(sentences)]).encode()).hexdigest()

    async def answer(self, request: Request) -> Reply:
        """The scores in the form in which Claude gives them."""
        if self.stopped:
            raise Stopped
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((request, future))
        if self.working is None or self.working.done():
            self.working = asyncio.create_task(self._work())
        return Reply(json.dumps({"scores": await future}), self.name, self.model, "end_turn")

    async def _work(self) -> None:
        """Answer the waiting requests, and those that come meanwhile."""
        while self.waiting:
            asked, self.waiting = self.waiting, []
            try:
                # in a thread: replies are saved while the next ones are computed
                rationales = await asyncio.to_thread(self._read, [(one.qid, one.sentences) for one, _ in asked])
                for rows in self.scorer.by_length(rationales):
                    if self.stopped:
                        raise Stopped
                    found = await asyncio.to_thread(self._predict, [rationales[row] for row in rows])
                    for row, scores in zip(rows, found, strict=True):
                        asked[row][1].set_result(scores)
            except Exception as error:
                for _, future in asked:
                    if not future.done():
                        future.set_exception(error)

    def predict(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """The scores of each (question, its sentences)."""
        return self._predict(self._read(asked))

    def expected_errors(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
        """The mean error to be expected of the predictions for each rationale, from those of held-out questions; 0
        without a sentence. The predictions are kept for `answer`."""
        found: list[list[float]] = []
        starts = range(0, len(asked), ASKED)
        for start in cli.progress(starts, desc="predicting", unit=f"{ASKED} rationales"):
            found += self.predict(asked[start : start + ASKED])
        return [sum(self.errors[round(10 * p)] for p in scores) / max(1, len(scores)) for scores in found]

    def _predict(self, rationales: Sequence[Rationale]) -> list[list[float]]:
        keys = [self._key(row.qid, row.sentences) for row in rationales]
        new = [row for row, key in zip(rationales, keys, strict=True) if key not in self.known]
        with enough_memory("--reward_model: the GPU's memory does not suffice; use one with more, or the CPU"):
            found = self.scorer.predict(new)
        self.known |= {self._key(row.qid, row.sentences): scores for row, scores in zip(new, found, strict=True)}
        return [self.known[key] for key in keys]

    def _read(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[Rationale]:
        """Rationales whose prompts are known to the scorer, which is made when it is first needed."""
        if self.scorer is None:
            self._load()
        prompts = self.scorer.prompts
        new = list(dict.fromkeys(qid for qid, _ in asked if qid not in prompts.lengths))
        if new:
            more = make_prompts(self.data, new, self.tokenizer, self.args, self.scorer.device)
            prompts.items |= more.items
            prompts.lengths |= more.lengths
        return tokenised(asked, self.tokenizer, self.args.read_twice)

    def _load(self) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bf16 = cli.mixed_precision("auto") == "bf16"
        with enough_memory("--reward_model: the model does not fit into this GPU's memory"):
            model = load(self.folder, self.data.patch_size, device).requires_grad_(False)
            model = actor_critic.cast_linears_bf16(model) if bf16 else model
        self.tokenizer = utils_data.load_tokenizer(self.args, self.folder)
        prompts = make_prompts(self.data, [], self.tokenizer, self.args, device)
        self.scorer = Scorer(model, prompts, device, bf16)
