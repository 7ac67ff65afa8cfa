"""Rewards and advantages of single tokens, computed anew from a round's rollouts (needs torch and the tokenizer).

The same functions as in training (rl/ppo.py) on the same files give the same numbers; nothing is whitened here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Collection
from pathlib import Path

from ares import files
from ares.cli import UserError, in_one_line
from tools.report_page.teacher import Round

TOGETHER = 256  # rows whose rewards are computed at a time


def add_tokens(run: Path, each: Round, shown: Collection[str]) -> str | None:
    """Give the samples of the questions in `shown` their `tokens`; returns why that cannot be, or None."""
    folder = run / str(each.number)
    settings = next((file for file in (folder / "args.yaml", run / "args.yaml") if file.is_file()), None)
    if settings is None or not (run / f"rollouts/round_{each.number}/scores.json").is_file():
        return "rollouts of the run folder are needed"
    if not (folder / "tokenizer.json").is_file():
        return "the finished round's folder, with its tokenizer, is needed"
    try:
        from transformers import AutoTokenizer

        from rl.ppo import compute_advantages, token_rewards
        from rl.rollouts import RolloutStore, load_values, read_decision, scored
    except ImportError as error:
        return f"{error.name} is not installed"
    args = argparse.Namespace(**{"rloo_baseline": "token"} | files.read_yaml(settings, "--run"))
    store = RolloutStore(run, each.number)
    rows, scores = scored(store.load(), read_decision(store.scores_file))
    if store.fitted_file.exists():
        rows = dataclasses.replace(rows, values=load_values(store.fitted_file, len(rows.values)))
    wanted = [row for row, qid in enumerate(rows.qids) if qid in shown]
    if not wanted:
        return None
    rows, scores = rows.select(wanted), [scores[row] for row in wanted]
    try:
        kl_coef = getattr(args, "kl_coef", args.init_kl_coef)  # --target_kl may have moved it
        data = compute_advantages(rows, scores, args, kl_coef)
        if not math.isfinite(float(data.advantages.sum()) + float(args.neutral_score)):
            raise TypeError("a flag is no usual number")
    except (AttributeError, TypeError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"--run: {settings} does not hold the flags of RL ({in_one_line(error, 80)})") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        return f"no tokenizer can be loaded from {folder} ({in_one_line(error, 120)})"
    samples = {(sample.action, sample.qid): sample for sample in each.samples}
    pieces = tokenizer.convert_ids_to_tokens(range(int(rows.tokens.max()) + 1))
    for first in range(0, len(rows), TOGETHER):
        some = range(first, min(first + TOGETHER, len(rows)))
        rewards = token_rewards(rows, scores, some, args.neutral_score, data.kl_coef)[1].tolist()
        for row in some:
            sample = samples.get((rows.action[row], rows.qids[row]))
            if sample is not None:
                begin, length = int(rows.offsets[row]), int(rows.lengths[row])
                sample.tokens = {
                    "pieces": [pieces[token] for token in rows.tokens[begin : begin + length].tolist()],
                    "rewards": rewards[row - first][:length],
                    "advantages": data.advantages[begin : begin + length].tolist(),
                }
    return None
