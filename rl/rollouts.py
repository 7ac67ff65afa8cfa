"""Rollouts: k sampled rationales per question (rl/sampling.py), on disk, and the Teacher's scores for them.

rl/collection.py fills a round's folder.

Files under `{run}/rollouts/round_{n}/`:

    plan.json                    the sampling batches (question ids) and a fingerprint of their prompts
    batch_000000.safetensors     one file per sampling batch, written in one step
    collected.json               written last: every batch exists and its sentences are exported
    scores.json                  written once: which replies count, which were dropped and why
    values.safetensors           values of the counted rows after --value_warmup, which replace those of the batches

A batch depends on the seed, the round and its number only, never on the process that samples it: a killed collection
resumes with the missing batches, on any number of processes, and ends with the same samples. Prompts and images are
not stored; they are looked up by question id. Position t of a row is the choice of `actions[t + 1]`; column 0 of
`actions` is the decoder's start token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ares import cli, files
from ares.cli import UserError
from ares.decoding import action_mask
from ares.devices import to_device
from ares.sentences import sentences_from_ids
from rl.run_folder import EXPORTED, FAILED, collected_batches
from teacher import handoff, reply_files

FIELDS = ("tokens", "logprobs", "ref_logprobs", "values")  # one number per position


# -- storage ---------------------------------------------------------------------------------------------


@dataclass
class Rollouts:
    """N sampled rationales, ragged: row i owns positions `offsets[i] .. offsets[i] + lengths[i]` of each field.

    qids, action, rank: (N,) the question, which of its k samples, and the process that sampled it
    lengths, sentence_counts: (N,) int64; columns: int32, the sentences' last columns, row after row
    tokens: int32; logprobs, ref_logprobs, values: float32 - one per position
    """

    qids: list[str]
    action: list[int]
    rank: list[int]
    lengths: Tensor
    sentence_counts: Tensor
    columns: Tensor
    tokens: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor

    def __post_init__(self):
        self.offsets = self.lengths.cumsum(0) - self.lengths
        self.sentence_offsets = self.sentence_counts.cumsum(0) - self.sentence_counts

    def __len__(self) -> int:
        return len(self.qids)

    def keys(self) -> list[str]:
        """One name per row, `{action}/{qid}`: its folder in the questions folder, without the rank."""
        return [f"{action}/{qid}" for action, qid in zip(self.action, self.qids, strict=True)]

    def ids(self, row: int) -> list[int]:
        """Decoder ids of one row, from the start token to its last token, without pads."""
        begin = int(self.offsets[row])
        return [0, *self.tokens[begin : begin + int(self.lengths[row])].tolist()]

    def row_columns(self, row: int) -> list[int]:
        """The columns of `ids(row)` at which its sentences end."""
        begin = int(self.sentence_offsets[row])
        return self.columns[begin : begin + int(self.sentence_counts[row])].tolist()

    def positions(self, rows: Sequence[int]) -> Tensor:
        """The places of `rows`' positions, row after row, in the flat fields."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return _ranges(self.offsets[index], self.lengths[index])

    def pad(self, flat: Tensor, rows: Sequence[int], width: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows of a per-position field as (B, T) with zeros on the right, and their (B, T) boolean mask; T is `width`,
        by default the longest row's length."""
        rows = torch.as_tensor(rows)
        lengths = self.lengths[rows]
        t = torch.arange(int(lengths.max()) if width is None else width)
        mask = t < lengths[:, None]  # (B, T)
        index = (self.offsets[rows][:, None] + t).clamp(max=len(flat) - 1)
        return flat[index].masked_fill(~mask, 0), mask

    def actions(self, rows: Sequence[int], width: int | None = None) -> tuple[Tensor, Tensor]:
        """Decoder ids (B, T + 1) with the start token in column 0, and the (B, T) mask of real positions; T as for
        `pad`."""
        tokens, mask = self.pad(self.tokens, rows, width)
        return torch.nn.functional.pad(tokens.long(), (1, 0)), mask

    def select(self, rows: Sequence[int]) -> Rollouts:
        """The given rows alone, in the given order."""
        index, at = torch.as_tensor(rows, dtype=torch.long), self.positions(rows)
        return Rollouts(
            qids=[self.qids[row] for row in rows],
            action=[self.action[row] for row in rows],
            rank=[self.rank[row] for row in rows],
            lengths=self.lengths[index],
            sentence_counts=self.sentence_counts[index],
            columns=self.columns[_ranges(self.sentence_offsets[index], self.sentence_counts[index])],
            **{name: getattr(self, name)[at] for name in FIELDS},
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file atomically; question, action and rank of each row go into its metadata."""
        tensors = {"lengths": self.lengths, "sentence_counts": self.sentence_counts, "columns": self.columns}
        tensors |= {name: getattr(self, name).contiguous() for name in FIELDS}
        rows = {"qids": self.qids, "action": self.action, "rank": self.rank}
        with files.atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={key: json.dumps(value) for key, value in rows.items()})

    @classmethod
    def load(cls, path: Path) -> Rollouts:
        """Read one file that `save` wrote. Raises UserError naming a file that cannot be read."""
        files.refuse_unfit(path, "--run_dir")
        try:
            with safe_open(path, "pt") as file:
                rows = {key: json.loads(value) for key, value in file.metadata().items()}
                return cls(**rows, **{name: file.get_tensor(name) for name in file.keys()})
        except Exception as error:
            raise UserError(
                f"{path}: not a rollout file ({cli.in_one_line(error, 160)}); delete it and run again"
            ) from error

    @classmethod
    def concatenate(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """All rows of `parts`, in order."""
        rows = {key: [item for part in parts for item in getattr(part, key)] for key in ("qids", "action", "rank")}
        names = ("lengths", "sentence_counts", "columns", *FIELDS)
        return cls(**rows, **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _ranges(begins: Tensor, counts: Tensor) -> Tensor:
    """begin, begin + 1, ..., begin + count - 1 of each pair, one range after the other."""
    return torch.arange(int(counts.sum())) + (begins + counts - counts.cumsum(0)).repeat_interleave(counts)


# -- prompts ---------------------------------------------------------------------------------------------


class Prompts:
    """The prompts of the train questions by id: a model's inputs, padded per batch, with image features."""

    def __init__(self, dataset, collator, device: torch.device):
        self.items = {item["qid"]: item for item in (dataset[i] for i in range(len(dataset)))}
        self.collator, self.device = collator, device
        self.lengths = {qid: len(item["input_ids"]) for qid, item in self.items.items()}
        self.texts = dict(zip(dataset.qids, dataset.prompts, strict=True))

    def collate(self, qids: Sequence[str]) -> dict[str, Tensor]:
        """On the CPU: `input_ids`, `attention_mask` (B, S), with vision features `image_ids` (B, patches, dim)."""
        batch = self.collator([self.items[qid] for qid in qids])
        names = ("input_ids", "attention_mask", "image_ids")
        return {name: batch[name] for name in names if name in batch}

    def batch(self, qids: Sequence[str]) -> dict[str, Tensor]:
        """`collate` on the models' device."""
        return to_device(self.collate(qids), self.device)

    def fingerprint(self) -> str:
        """A hash of every prompt's ids, to detect changed questions, captions or prompt flags."""
        digest = hashlib.sha256()
        for qid, item in self.items.items():
            digest.update(json.dumps([qid, list(item["input_ids"])]).encode())
        return digest.hexdigest()


def plan_batches(lengths: dict[str, int], batch_size: int) -> list[list[str]]:
    """Question ids in batches of similar prompt length, longest first, so that a lack of memory shows at once."""
    order = sorted(lengths, key=lambda qid: -lengths[qid])  # a stable sort: equal lengths keep the split's order
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def seed_for(*parts: object) -> int:
    """A 63-bit seed that depends on every part (`seed_for(42, "sampling", round, batch)`)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# -- one batch -------------------------------------------------------------------------------------------


def to_rollouts(sampled: dict[str, Tensor], qids: Sequence[str], k: int, rank: int, tokenizer) -> Rollouts:
    """One sampled batch without its padding, with the columns at which its sentences end."""
    actions = sampled["actions"]
    mask = action_mask(actions)  # (B*k, L-1), a prefix of each row: pad is never sampled
    lengths = mask.sum(1)
    columns = [
        [sentence.column for sentence in sentences_from_ids(row[: n + 1], tokenizer)]
        for row, n in zip(actions.tolist(), lengths.tolist(), strict=True)
    ]
    fields = {name: sampled[name][mask] for name in FIELDS[1:]}
    return Rollouts(
        qids=[qid for qid in qids for _ in range(k)],
        action=list(range(k)) * len(qids),
        rank=[rank] * len(actions),
        lengths=lengths,
        sentence_counts=torch.tensor([len(row) for row in columns]),
        columns=torch.tensor([column for row in columns for column in row], dtype=torch.int32),
        tokens=actions[:, 1:][mask].int(),
        **fields,
    )


# -- a round's folder ------------------------------------------------------------------------------------


class RolloutStore:
    """The files of one round: `{run}/rollouts/round_{n}` and the questions folder they are exported to."""

    def __init__(self, run: Path, number: int):
        self.folder = Path(run) / "rollouts" / f"round_{number}"
        self.questions = Path(run) / "questions"
        self.plan_file = self.folder / "plan.json"
        self.collected_file = self.folder / "collected.json"
        self.scores_file = self.folder / "scores.json"
        self.fitted_file = self.folder / "values.safetensors"
        self.failed_file = self.folder / FAILED

    def exported_file(self, rank: int) -> Path:
        """Says that a process of this launch has exported its rationales and flushed them to disk."""
        return self.folder / f"{EXPORTED}{rank}"

    def wait_for(self, path: Path, poll_seconds: float) -> None:
        """Sleep until another process has written `path`; raise its UserError if it ended with one instead."""
        while not path.exists():
            if self.failed_file.exists():
                raise UserError(self.failed_file.read_text(encoding="utf-8"))
            time.sleep(poll_seconds)

    @contextlib.contextmanager
    def failure_shared(self) -> Iterator[None]:
        """Write a UserError of the block to `failed_file`, so that processes that wait for files end as well."""
        try:
            yield
        except UserError as error:
            if cli.world_size() > 1 and not self.failed_file.exists():
                files.write_text(self.failed_file, str(error))
            raise

    def shard(self, number: int) -> Path:
        return self.folder / f"batch_{number:06d}.safetensors"

    def plan(self, prompts: Prompts, batch_size: int, k: int) -> list[list[str]]:
        """The sampling batches; rank 0 writes them once, later launches read them, on any number of processes.

        Raises UserError if `k` or the prompts are not those that the batches on disk were sampled from.
        """
        known = {"k": k, "prompts": prompts.fingerprint()}
        if self.plan_file.exists():
            plan = files.read_json(self.plan_file, "--run_dir", dict)
            if any(plan.get(key) != value for key, value in known.items()):
                raise UserError(
                    f"{self.plan_file}: questions, captions or prompts are not those of the rollouts beside it; "
                    "restore the data, or start anew with --overwrite"
                )
            batches = plan.get("batches")
            fits = isinstance(batches, list) and all(isinstance(batch, list) for batch in batches)
            qids = [qid for batch in batches for qid in batch] if fits else []
            if not all(isinstance(qid, str) for qid in qids) or sorted(qids) != sorted(prompts.lengths):
                raise UserError(f"{self.plan_file} is damaged; restore it, or start anew with --overwrite")
            return batches
        share = math.ceil(len(prompts.lengths) / cli.world_size())  # a small split keeps every process busy, too
        plan = {**known, "batches": plan_batches(prompts.lengths, min(batch_size, share))}
        if cli.rank() == 0:
            files.write_json(self.plan_file, plan, indent=None)
        return plan["batches"]

    def load(self) -> Rollouts:
        """Every row of the round, in sampling order (needs no models and no data set)."""
        shards = sorted(self.folder.glob("batch_*.safetensors"))
        expected = collected_batches(self.collected_file)
        if len(shards) != expected:
            raise UserError(f"{self.folder} holds {len(shards)} of {expected} batches; run the same command again")
        return Rollouts.concatenate([Rollouts.load(shard) for shard in shards])


def rows_with_sentences(rollouts: Rollouts) -> list[int]:
    """The rows that are exported: an empty rationale is not scored."""
    return rollouts.sentence_counts.nonzero()[:, 0].tolist()


def question_folder(rollouts: Rollouts, row: int, questions: Path) -> Path:
    return handoff.question_dir(questions, rollouts.action[row], rollouts.rank[row], rollouts.qids[row])


def save_values(path: Path, values: Tensor) -> None:
    """Write the values (positions,) that the warm-up fitted, atomically."""
    with files.atomic_path(path) as temporary:
        save_file({"values": values}, temporary)


def load_values(path: Path, positions: int) -> Tensor:
    """What `save_values` wrote. Raises UserError naming a file that cannot be read or holds another number."""
    try:
        values = load_file(path)["values"]
    except Exception as error:
        raise UserError(
            f"{path}: the values of the warm-up cannot be read ({cli.in_one_line(error, 80)}); delete the run's state "
            "folder to begin this round's PPO anew"
        ) from error
    if values.shape != (positions,) or not values.isfinite().all():
        raise UserError(f"{path}: not the values of these rollouts; delete the run's state folder to begin PPO anew")
    return values


# -- feedback --------------------------------------------------------------------------------------------


def read_feedback(store: RolloutStore, rollouts: Rollouts, max_dropped: float) -> dict:
    """Read every reply, decide which samples count, and write that decision to `scores.json` (rank 0).

    Returns {"scores": {key: [score per sentence]}, "dropped": {reason: [key]}}. A row without a sentence has an empty
    list: the KL penalty is its only reward. Raises UserError if more than `max_dropped` of the replies, or all of
    them, are lost; then nothing is written, and the replies can be repaired.
    """
    scores, dropped = {}, {}
    keys, sentence_counts = rollouts.keys(), rollouts.sentence_counts.tolist()
    for row, expected in enumerate(cli.progress(sentence_counts, desc="reading scores", unit="reply")):
        try:
            got = reply_files.read_scores(question_folder(rollouts, row, store.questions)) if expected else []
            if len(got) != expected:
                raise handoff.Refused("wrong_count")
            scores[keys[row]] = got
        except handoff.Refused as refusal:
            dropped.setdefault(refusal.reason, []).append(keys[row])
    asked, lost = len(rows_with_sentences(rollouts)), sum(map(len, dropped.values()))
    counts = ", ".join(f"{reason} {len(rows)}" for reason, rows in sorted(dropped.items()))
    if lost == asked:
        raise UserError(
            f"{store.questions}: not one of {asked} replies can be used ({counts or 'no sentences'}); "
            f"the reason is beside each reply in {handoff.REASON}"
        )
    if lost > max_dropped * asked:
        raise UserError(
            f"{store.questions}: {lost} of {asked} replies are lost ({counts}), above --max_dropped {max_dropped}; "
            f"score those questions again (the reason is beside each in {handoff.REASON}) or raise --max_dropped"
        )
    if lost:
        cli.warn0(f"{lost} of {asked} samples dropped ({counts})")
    decision = {"scores": scores, "dropped": dropped}
    files.write_json(store.scores_file, decision, indent=None)
    return decision


def read_decision(path: Path) -> dict:
    """What `read_feedback` wrote. Raises UserError naming a damaged file."""
    decision = files.read_json(path, "--run_dir", dict)
    scores, dropped = decision.get("scores"), decision.get("dropped")
    fits = isinstance(scores, dict) and isinstance(dropped, dict)
    fits = fits and all(isinstance(row, list) for row in (*scores.values(), *dropped.values()))
    numbers = [score for row in scores.values() for score in row] if fits else []
    if not fits or not all(isinstance(score, (int, float)) and abs(score) < 1e6 for score in numbers):
        raise UserError(f"{path} is damaged; delete it: the scores are then read from the replies again")
    return decision


def scored(rollouts: Rollouts, decision: dict) -> tuple[Rollouts, list[list[float]]]:
    """The rows that count and their scores, one list per row."""
    keys = rollouts.keys()
    rows = [row for row, key in enumerate(keys) if key in decision["scores"]]
    odd = next((row for row in rows if len(decision["scores"][keys[row]]) != rollouts.sentence_counts[row]), None)
    if odd is not None:
        raise UserError(
            f"scores.json gives {len(decision['scores'][keys[odd]])} scores to {keys[odd]}, which has "
            f"{int(rollouts.sentence_counts[odd])} sentences; delete it: they are then read from the replies again"
        )
    kept = rollouts if len(rows) == len(rollouts) else rollouts.select(rows)  # one copy of them in memory
    return kept, [decision["scores"][keys[row]] for row in rows]
