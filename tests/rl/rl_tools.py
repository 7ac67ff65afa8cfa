"""Helpers of the RL tests; data, model and replies of a small run are made by benchmarks/rl_common.py."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import run_mm_cot_rl
from benchmarks.rl_common import PATCHES, answer, make_data, make_model, reply, score
from rl import metrics, ppo, rollouts, trainer
from teacher import handoff

__all__ = ["PATCHES", "answer", "make_data", "make_model", "reply", "score"]


class Teacher(threading.Thread):
    """Waits beside a running RL for the end of its export, then answers; `sentences` is what it scored."""

    def __init__(self, questions: Path, **how):
        super().__init__(daemon=True)
        self.questions, self.how, self.sentences = questions, how, 0
        self.start()

    def run(self) -> None:
        while not handoff.exported(self.questions):
            time.sleep(0.1)
        self.sentences = answer(self.questions, **self.how)


# -- a small run -----------------------------------------------------------------------------------------

ROUND_FILES = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "value_function.pth", "optimizer_state.pth", "args.yaml",
}  # fmt: skip
DIAGNOSTICS = (
    "policy_loss value_loss loss approx_kl kl_ref entropy clipfrac explained_variance grad_norm lr "
    "mean_sentence_score sentences reward length share_ended share_dropped"
).split()


def flags(world, run: Path, **changes) -> list[str]:
    """The command line of a small run; `None` drops a flag."""
    chosen = {
        "data_root": world.data, "caption_file": world.data / "captions.json", "use_caption": "", "img_type": "vit",
        "prompt_format": "QCM-E", "base_model_dir": world.base, "ref_model": world.base, "k_actions": 2, "bs": 3,
        "output_len": 24, "do_sample": True, "top_k": 50, "rl_batch_size": 2, "ga_step": 2, "rl_epochs": 2,
        "epochs": 1, "lr": 1e-3, "init_kl_coef": 0.01, "gamma": 1.0, "run_dir": run, "poll_seconds": 0.2,
        "settle_seconds": 0.2, "report_to": "none",
    } | changes  # fmt: skip
    words = [(f"--{key}", str(value)) for key, value in chosen.items() if value is not None]
    return [word for pair in words for word in pair if word]


def launch(world, run: Path, **changes) -> None:
    """Run in this process."""
    run_mm_cot_rl.main(flags(world, run, **changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Policy and value function of a round folder."""
    from safetensors.torch import load_file

    value = torch.load(folder / "value_function.pth", weights_only=True)
    return load_file(folder / "model.safetensors") | {f"value.{name}": tensor for name, tensor in value.items()}


def metrics_of(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights_of_base(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def optimizer_of(folder: Path) -> dict:
    return torch.load(folder / "optimizer_state.pth", weights_only=True)


# -- a trainer without files -----------------------------------------------------------------------------


def random_rollouts(rows: int, seed: int = 0) -> rollouts.Rollouts:
    """Ragged rollouts with made-up numbers; ids of row i are i + 10, i + 11, ..."""
    rng = random.Random(seed)
    lengths = torch.tensor([rng.randint(1, 9) for _ in range(rows)])
    counts = torch.tensor([rng.randint(0, int(n)) for n in lengths])
    total = int(lengths.sum())
    return rollouts.Rollouts(
        qids=[f"q{i // 2}" for i in range(rows)],
        action=[i % 2 for i in range(rows)],
        rank=[i % 3 for i in range(rows)],
        lengths=lengths,
        sentence_counts=counts,
        columns=torch.cat([torch.arange(1, int(c) + 1) for c in counts]).int(),
        tokens=torch.cat([torch.arange(i + 10, i + 10 + int(n)) for i, n in enumerate(lengths)]).int(),
        **{
            name: torch.randn(total, generator=torch.Generator().manual_seed(seed + j))
            for j, name in enumerate(rollouts.FIELDS[1:])
        },
    )


SMALL_VOCABULARY, SMALL_PATCHES = 60, (3, 5)  # of `make_trainer`


class SmallPrompts:
    """In place of rollouts.Prompts: ragged prompts and image features by question id."""

    def __init__(self, qids, dtype):
        g = torch.Generator().manual_seed(5)
        self.ids = {
            q: torch.randint(2, SMALL_VOCABULARY, (3 + i % 4,), generator=g) for i, q in enumerate(sorted(set(qids)))
        }
        self.images = {q: torch.randn(*SMALL_PATCHES, generator=g, dtype=dtype) for q in self.ids}
        self.lengths = {q: len(ids) for q, ids in self.ids.items()}

    def collate(self, qids):
        ids = torch.nn.utils.rnn.pad_sequence([self.ids[q] for q in qids], batch_first=True)
        images = torch.stack([self.images[q] for q in qids])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "image_ids": images}

    batch = collate


def arguments(**changes) -> SimpleNamespace:
    """The flags that the trainer reads, as parsed from no flags but these."""
    args = run_mm_cot_rl.parse_args(["--base_model_dir", "."])
    chosen = {"rl_batch_size": 2, "ga_step": 2, "rl_epochs": 2, "lr": 1e-2, "log_term": 10**6, "save_minutes": 1e6}
    return SimpleNamespace(**(vars(args) | chosen | changes))


def small_models(dtype, seed=0):
    from model import MultimodalT5Config, T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction

    torch.manual_seed(seed)
    made = []
    for cls in (T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction):
        config = MultimodalT5Config(
            vocab_size=SMALL_VOCABULARY, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.1,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, initializer_factor=0.1,
        )  # fmt: skip
        made.append(cls(config, SMALL_PATCHES).to(dtype).eval())
    return made


def make_trainer(tmp_path, rows=9, seed=0, dtype=torch.float64, sharded=None, **changes):
    """A trainer on random ragged rollouts whose stored numbers are near what the policy says, as after sampling."""
    from accelerate import Accelerator

    args = arguments(**changes)
    policy, value_function = small_models(dtype, seed)
    rolls = random_rollouts(rows, seed)
    prompts = SmallPrompts(rolls.qids, dtype)
    g = torch.Generator().manual_seed(seed)
    for name in rollouts.FIELDS[1:]:
        setattr(rolls, name, getattr(rolls, name).to(dtype))
    with torch.no_grad():
        for row in range(rows):  # some ratios beyond the clip range, some within
            begin, n = int(rolls.offsets[row]), int(rolls.lengths[row])
            actions = torch.tensor([rolls.ids(row)])
            logits = policy(**prompts.batch([rolls.qids[row]]), decoder_input_ids=actions[:, :-1]).logits
            logprobs = logits[0].log_softmax(-1)[torch.arange(n), actions[0, 1:]]
            rolls.logprobs[begin : begin + n] = logprobs + 0.3 * torch.randn(n, generator=g, dtype=dtype)
            rolls.ref_logprobs[begin : begin + n] = logprobs + 0.3 * torch.randn(n, generator=g, dtype=dtype)
    scores = [[((7 * i + 3 * j) % 11) / 10 for j in range(int(n))] for i, n in enumerate(rolls.sentence_counts)]
    data = ppo.compute_advantages(rolls, scores, args, args.init_kl_coef)
    log = metrics.Metrics(tmp_path, "none", {})
    return trainer.PpoTrainer(
        policy, None if args.algo == "rloo" else value_function, data, prompts, args, Accelerator(cpu=True),
        tmp_path, log, 0, fitted=tmp_path / "values.safetensors", sharded=sharded,
    )  # fmt: skip
