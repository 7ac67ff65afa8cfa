"""Collecting a round: sample what is not on disk, export it for the Teacher, wait for the other processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ares import cli, files
from ares.sentences import sentences_from_ids
from rl.rollouts import Rollouts, RolloutStore, question_folder, rows_with_sentences
from teacher import handoff


def collect(
    store: RolloutStore,
    batches: Sequence[Sequence[str]],
    sample: Callable[[int, Sequence[str]], Rollouts],
    tokenizer,
    poll_seconds: float = 2.0,
) -> None:
    """Sample and export this process's share of `batches`, then wait for the files of the other processes.

    `sample(number, qids)` makes one batch. Batches on disk are not sampled again; their rationales are exported if a
    kill came in between. Rank 0 signals the end of the export and writes `collected.json`.
    """
    mine = range(cli.rank(), len(batches), cli.world_size())
    samples = sentences = 0
    for number in cli.progress(mine, desc="sampling", total=len(mine), unit="batch"):
        if not store.shard(number).exists():
            sample(number, batches[number]).save(store.shard(number))
        rows = Rollouts.load(store.shard(number))
        export(rows, store.questions, tokenizer)
        samples, sentences = samples + len(rows), sentences + int(rows.sentence_counts.sum())
    if cli.rank() != 0:
        files.flush_all()  # perhaps of another machine than rank 0's
        files.touch(store.exported_file(cli.rank()))
        store.wait_for(store.collected_file, poll_seconds)
        return
    # files instead of a collective: processes may end hours apart, and a process group would time out
    for number in sorted(set(range(len(batches))).difference(mine)):
        store.wait_for(store.shard(number), poll_seconds)
        rows = Rollouts.load(store.shard(number))
        for row in rows_with_sentences(rows):
            store.wait_for(question_folder(rows, row, store.questions) / handoff.RATIONALE, poll_seconds)
        samples, sentences = samples + len(rows), sentences + int(rows.sentence_counts.sum())
    for rank in range(1, cli.world_size()):
        store.wait_for(store.exported_file(rank), poll_seconds)
    if not handoff.exported(store.questions):  # a re-run must not make answers older than the export
        handoff.mark_exported(store.questions)
    files.write_json(store.collected_file, {"batches": len(batches), "samples": samples, "sentences": sentences})


def export(rollouts: Rollouts, questions: Path, tokenizer) -> None:
    """Write the missing rationales, one folder per sample, for the Teacher to score. A warning names what a power cut
    damaged, which is written again."""
    damaged = []
    for row in rows_with_sentences(rollouts):
        folder = question_folder(rollouts, row, questions)
        try:
            handoff.read_rationale(folder)
        except handoff.Refused as refused:
            if os.path.lexists(folder / handoff.RATIONALE):
                damaged.append(refused)
            handoff.write_rationale(folder, [s.text for s in sentences_from_ids(rollouts.ids(row), tokenizer)])
    if damaged:
        cli.warn0(f"{len(damaged)} rationales of an earlier launch are damaged and written again, first: {damaged[0]}")
