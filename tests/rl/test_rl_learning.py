"""RL on a problem whose answer is known: the start writes one of five colours at random, the Teacher loves red.

Every run goes through run_mm_cot_rl.main, files and Teacher included: some rounds of fresh samples, in one process.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import run_mm_cot_rl
from ares import files
from teacher import handoff
from tests.rl import rl_tools

COLOURS = ("red", "blue", "green", "black", "white")
QUESTIONS, K, ROUNDS = 12, 8, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`data`, `base` (a text-only model that ends `The {colour} one is right.` with each colour alike), `tmp`."""
    from transformers import AutoTokenizer

    from demo.make_model import make_tokenizer

    tmp = tmp_path_factory.mktemp("learning")
    problems = {
        str(i): {
            "question": f"Which box is number {i}?", "choices": ["this", "that"], "answer": 0, "hint": "",
            "image": None, "task": "closed choice", "grade": "grade2", "subject": "natural science",
            "topic": "t", "category": "c", "skill": "s", "lecture": "",
            "solution": f"The {COLOURS[i % 5]} one is right.", "split": "train",
        }
        for i in range(QUESTIONS + 2)
    }  # fmt: skip
    qids = list(problems)
    splits = {"train": qids[:QUESTIONS], "val": qids[QUESTIONS:], "test": qids[QUESTIONS:]}
    data = tmp / "data"
    files.write_json(data / "scienceqa/problems.json", problems)
    files.write_json(data / "scienceqa/pid_splits.json", splits)
    texts = [f"The {colour} one is right." for colour in COLOURS] * 20
    texts += [problem["question"] for problem in problems.values()]
    texts.append("Question: Context: N/A Options: (A) this (B) that Solution:")
    size = make_tokenizer(texts, tmp / "tokenizer", vocab_size=340)
    tokenizer = AutoTokenizer.from_pretrained(tmp / "tokenizer")
    base = _pretrain(tmp / "base", tokenizer, size)
    return SimpleNamespace(tmp=tmp, data=data, base=base)


def _pretrain(folder: Path, tokenizer, size: int) -> Path:
    from model import MultimodalT5Config, T5ForMultimodalGeneration

    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, initializer_factor=0.05,
    )  # fmt: skip
    model = T5ForMultimodalGeneration(config)
    labels = tokenizer([f"Solution: The {c} one is right." for c in COLOURS], return_tensors="pt", padding=True)
    labels = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    prompts = tokenizer([f"Question: Which box is number {i}?" for i in range(5)], return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        turned = labels.roll(step, 0)  # every prompt sees every colour
        loss = model(**prompts, labels=turned).loss
        loss.backward(), optimizer.step(), optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(world, name: str, scorer, kind: str = "rollout", **changes) -> list[dict]:
    """RL over ROUNDS rounds; returns the lines of a kind of metrics.jsonl: `rollout` is one per round, before its
    training."""
    run = world.tmp / name
    flags = {
        "data_root": world.data, "prompt_format": "QCM-E", "base_model_dir": world.base, "k_actions": K, "bs": 12,
        "output_len": 16, "do_sample": True, "top_k": 0, "rl_batch_size": 24, "ga_step": 1, "rl_epochs": 3,
        "epochs": ROUNDS, "lr": 3e-3, "init_kl_coef": 0, "gamma": 1.0, "run_dir": run, "poll_seconds": 0.05,
        "settle_seconds": 0.1, "report_to": "none", "seed": 1,
    } | changes  # fmt: skip
    stop = threading.Event()

    def teach():
        for number in range(flags["epochs"]):
            while not handoff.exported(run / "questions"):
                if stop.wait(0.05):
                    return
            rl_tools.answer(run / "questions", scorer=scorer)
            while not (run / f"questions_round{number}").exists():
                if stop.wait(0.05):
                    return

    teacher = threading.Thread(target=teach, daemon=True)
    teacher.start()
    try:
        begin = time.monotonic()
        run_mm_cot_rl.main([str(word) for pair in flags.items() for word in (f"--{pair[0]}", pair[1])])
        print(f"{name}: {time.monotonic() - begin:.0f} s")
    finally:
        stop.set()
        teacher.join()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def loves_red(sentence: str) -> float:
    return 1.0 if " red " in f" {sentence} " else 0.0


@pytest.fixture(scope="module")
def learnt(world):
    return train(world, "ppo", loves_red)


def test_ppo_learns_what_the_teacher_rewards(world, learnt):
    score = [line["mean_sentence_score"] for line in learnt]
    assert 0.05 < score[0] < 0.4, "the start writes red about one time in five"
    assert score[-1] > 0.85, score
    lines = (world.tmp / f"ppo/samples_round_{ROUNDS - 1}.jsonl").read_text().splitlines()
    table = [json.loads(line) for line in lines]
    assert sum("red" in row["rationale"] for row in table) > 0.8 * len(table) == 0.8 * QUESTIONS * K


def test_rloo_learns_it_without_a_value_function(world):
    lines = train(world, "rloo", loves_red, algo="rloo")
    score = [line["mean_sentence_score"] for line in lines]
    assert score[0] < 0.4 and score[-1] > 0.85, score
    assert not list((world.tmp / "rloo").rglob("value_function.pth"))
    text = (world.tmp / "rloo/metrics.jsonl").read_text()
    assert "value_loss" not in text and "explained_variance" not in text and '"approx_kl"' in text


def test_a_higher_kl_coefficient_keeps_it_closer_to_the_reference(world, learnt):
    """With reward 1 or 0 and KL coefficient b the best policy writes red with odds 1/4 exp(1/b): 0.4 for b = 1."""
    held = train(world, "kl", loves_red, init_kl_coef=1.0, top_k=0)
    assert held[0]["kl_per_rationale"] == pytest.approx(0, abs=1e-4)  # the start is the reference
    assert held[-1]["kl_per_rationale"] < 0.5 * learnt[-1]["kl_per_rationale"]
    assert held[-1]["mean_sentence_score"] < learnt[-1]["mean_sentence_score"] - 0.1


def test_without_reward_the_policy_stays_put(world):
    """All scores neutral: every advantage is 0, whitened or not. (With PPO a fresh value function adds noise to them;
    test_rl.py has that case with a value function that says 0.)"""
    lines = train(world, "neutral", lambda sentence: 0.5, algo="rloo", epochs=3)
    assert [line["kl_per_rationale"] for line in lines] == pytest.approx([0, 0, 0], abs=0.02)


def test_adaptive_kl_doubles_the_coefficient_of_a_policy_that_has_run_away(world):
    lines = train(world, "adaptive", loves_red, init_kl_coef=0.01, target_kl=0.05, epochs=3)
    assert lines[0]["kl_coef"] == 0.01  # the first round's rationales are the reference's own
    for before, after in zip(lines, lines[1:], strict=False):
        far = after["kl_per_rationale"]
        factor = 2 if far > 0.075 else 0.5 if far < 0.05 / 1.5 else 1
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * factor)
    assert lines[-1]["kl_coef"] > 0.01


def test_warm_up_explains_returns_of_samples_that_it_has_not_seen(world):
    """The policy hardly moves, so the second round's samples are fresh ones of the same policy."""
    how = {"lr": 1e-9, "vf_lr": 1e-2, "epochs": 2, "rl_epochs": 1, "value_init": "zero"}
    first, second = train(world, "warm", loves_red, value_warmup=15, **how)
    assert first["explained_variance"] == pytest.approx(0, abs=1e-6), "the head begins with V = 0"
    assert second["explained_variance"] > 0.3, second
