"""Which rows share a forward and backward pass: groups and minibatches of similar length, for little padding.

No model and no process group: lists of lengths in, lists of row numbers out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

GROUP_COST = 64  # tokens: cost of one more pass besides its tokens, on a CPU
GPU_GROUP_COST = 2048  # the same on a GPU, where a pass of fewer tokens leaves it idle


def length_groups(lengths: Sequence[int], tokens: float = float("inf"), group_cost: int | None = None) -> list:
    """Rows sorted by decreasing length, cut into the groups with the least total cost: rows times the longest length,
    plus `group_cost` (default GROUP_COST) per group. A group has at most `tokens` tokens with its padding, or one row.
    """
    group_cost = GROUP_COST if group_cost is None else group_cost
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    longest = np.array([lengths[row] for row in order], dtype=np.int64)
    cost = np.zeros(len(order) + 1)  # least cost of the first i rows
    begin = np.zeros(len(order) + 1, dtype=np.int64)  # where their last group begins
    starts = np.arange(len(order))
    for i in range(1, len(order) + 1):
        size = (i - starts[:i]) * longest[:i]  # padded tokens of a last group that begins at each earlier row
        found = np.where((size <= tokens) | (starts[:i] == i - 1), cost[:i] + size + group_cost, np.inf)
        begin[i] = found.argmin()
        cost[i] = found[begin[i]]
    groups, end = [], len(order)
    while end:
        groups.append(order[begin[end] : end])
        end = int(begin[end])
    return groups[::-1]


def plan_epoch(
    lengths: Sequence[tuple[int, int]],
    per_process: int,
    processes: int,
    accumulation: int,
    seed: int,
    groups: Sequence[object] | None = None,
) -> list:
    """Which rows each update of one PPO epoch trains on: `plan[update][i][process]` is the i-th minibatch there.

    Rows are shuffled by the seed and cut into optimizer steps of `per_process * processes * accumulation` rows (the
    last one may be shorter). Within a step, rows of similar `lengths` (of rationale and prompt) share a minibatch of
    `per_process` rows: less padding, the same gradient. In the last step a minibatch may be empty, but every process
    has equally many. With `groups`, one value per row (its question), groups are shuffled instead of rows, so that
    the rows of a group share a step, and minibatches are cut from the order of groups: its prompt is encoded once.
    """
    generator = torch.Generator().manual_seed(seed)
    if groups is None:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    else:
        members: dict[object, list[int]] = {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        blocks = list(members.values())
        order = [row for i in torch.randperm(len(blocks), generator=generator).tolist() for row in blocks[i]]
    size = per_process * processes * accumulation
    plan = []
    for begin in range(0, len(order), size):
        rows = order[begin : begin + size]
        if groups is None:
            minibatches = _bucket(rows, lengths, per_process)
        else:
            minibatches = [rows[i : i + per_process] for i in range(0, len(rows), per_process)]
        minibatches += [[] for _ in range(-len(minibatches) % processes)]
        plan.append([minibatches[i : i + processes] for i in range(0, len(minibatches), processes)])
    return plan


def _bucket(rows: Sequence[int], lengths: Sequence[tuple[int, int]], size: int) -> list[list[int]]:
    """Minibatches of `size` rows with little padding: rows sorted by rationale length, then optionally by prompt
    length within strips of that order; the strip width with the least cost is used. Ties keep the order of `rows`."""
    rows = sorted(rows, key=lambda row: -lengths[row][0])
    found = []
    width = size  # of a strip
    while True:
        strips = [rows[i : i + width] for i in range(0, len(rows), width)]
        if width > size:
            strips = [sorted(strip, key=lambda row: -lengths[row][1]) for strip in strips]
        flat = [row for strip in strips for row in strip]
        minibatches = [flat[i : i + size] for i in range(0, len(flat), size)]
        # a rationale token (decoder and head) costs about 1.5 times as much as a prompt token (encoder)
        cost = sum(
            len(one) * (3 * max(lengths[row][0] for row in one) + 2 * max(lengths[row][1] for row in one))
            for one in minibatches
        )
        found.append((cost, width, minibatches))
        if width >= len(rows):
            return min(found)[2]
        width *= 2


def micro_batches(step: list, lengths: Sequence[tuple[int, int]], tokens: int) -> list:
    """One update of `plan_epoch` with neighbouring minibatches joined where they are small: `result[i][process]` are
    the rows of the i-th forward and backward pass, at most `tokens` tokens of prompts and rationales with padding.

    A single minibatch may exceed that. The gradient is the same sum; fewer passes mean fewer kernel launches and
    fewer gradient additions. Every process has equally many passes, which sharding requires.
    """

    def padded(rows: Sequence[int]) -> int:
        return len(rows) * sum(max(lengths[row][i] for row in rows) for i in (0, 1)) if rows else 0

    joined: list = []
    for group in step:
        both = [[*before, *rows] for before, rows in zip(joined[-1], group, strict=True)] if joined else []
        if both and max(map(padded, both)) <= tokens:
            joined[-1] = both
        else:
            joined.append(group)
    return joined
