"""A small finished ARES run for the report's tests: questions, three stages, RL's files, corrections, verdicts.

RL's files are written by RL's own functions (rollouts, experience), the scores by the reference Teacher's; only the
training in between is left out. Texts try to break out of the page.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

from ares import files
from teacher import handoff
from teacher.session import CHECKS, OURS
from tests.rl import rl_tools

EVIL = '<script>window.pwned=1</script><img src=x onerror="window.pwned=2"></script><!-- <b id=evil>bold</b> {{data}}'
NAME = "base <b id=evil>{{data}}</b><script>window.pwned</script>"  # of a stage
RUN_FLAGS = dict(neutral_score=0.5, init_kl_coef=0.1, gamma=1.0, gae_lambda=0.95, algo="ppo", kl_coef=0.1)


def problem(number: int, **changes) -> dict:
    """Question `number` of a schoolbook of capitals; the gold choice is B."""
    town = f"Town{number}"
    return {
        "question": f"What is the capital of Land{number}?", "choices": ["Nowhere", town, "Elsewhere"], "answer": 1,
        "hint": "", "image": None, "task": "closed choice", "grade": f"grade{2 + number % 9}",
        "subject": ("natural science", "social science")[number % 2], "topic": "geography", "category": "capitals",
        "skill": "naming", "lecture": "Each land has one capital.",
        "solution": f"Look at the map of Land{number}. The capital of Land{number} is {town}.", "split": "test",
    } | changes  # fmt: skip


def make_problems(test: int = 8, train: int = 4) -> tuple[dict, dict]:
    problems = {str(number): problem(number) for number in range(1, test + train + 1)}
    problems["1"] |= {"question": f"Which? {EVIL}", "choices": [EVIL, "Town1"], "hint": EVIL, "image": "image.png"}
    qids = list(problems)
    return problems, {"train": qids[test:], "val": qids[:1], "test": qids[:test]}


def write_predictions(folder: Path, split: str, problems: dict, qids: list[str], texts: list[str], **more) -> None:
    labels = [f"Solution: {problems[qid]['solution']}" for qid in qids]
    data = {"preds": texts, "labels": labels, "qids": qids, **more}
    files.write_json(folder / f"predictions_ans_{split}.json", data)


def released_file(path, problems, qids, asked: str, garbled: int = 0) -> None:
    """As the released code writes it: no ids, both parts' scores whatever was asked, `similariry`."""
    letters = ["ABCDE"[problems[qid]["answer"]] for qid in qids]
    solutions = [f"Solution: {problems[qid]['solution']}".replace("\n", " ") for qid in qids]
    answers = [f"The answer is ({letter})." for letter in letters]
    both = {"A": answers, "E": solutions, "LEA": [f"{s} {a}" for s, a in zip(solutions, answers, strict=True)],
            "ALE": [f"{a} BECAUSE: {s}" for s, a in zip(solutions, answers, strict=True)]}  # fmt: skip
    labels = both[asked]
    preds = ["Nothing to read." if i < garbled else text for i, text in enumerate(labels)]
    guessed = f"{100 * (len(qids) - garbled) / len(qids) - 1.3:.2f}" if "A" in asked else "21.00"
    scores = {"answer": {"acc_average": guessed, "acc_has_image": guessed},
              "rationale": {"bleu1": 40.0, "bleu4": 30.0, "rouge": 55.5, "similariry": 88.25}}  # fmt: skip
    fails = garbled if "A" in asked else len(qids)
    path.write_text(json.dumps({"num_fail": fails, "scores": scores, "preds": preds, "labels": labels}))


def make_world(root: Path, tokenizer) -> SimpleNamespace:
    """Write everything under `root`; the result names the places and what was planted."""
    problems, splits = make_problems()
    files.write_json(root / "data/scienceqa/problems.json", problems)
    files.write_json(root / "data/scienceqa/pid_splits.json", splits)
    files.write_json(root / "data/captions.json", {"captions": {"1": f"A map. {EVIL}"}})
    picture(root / "images/1/image.png")
    test = splits["test"]
    good = [f"Solution: {problems[qid]['solution']}" for qid in test]
    poor = [text.replace("Town", "Hut") + " The capital is" for text in good]
    poor[0] = f"Solution: First this. {EVIL} Then that."
    scores = {"rationale": {"bleu1": 31.25, "bleu4": 20.5, "rouge": 55.125, "similarity": 70.0}}
    write_predictions(root / "base", "test", problems, test, poor, num_fail=None, scores=scores)
    write_predictions(root / "sft", "test", problems, test, [*good[:-1], poor[-1]], num_fail=None)
    letters = ["B", "A", None, *"BBBBB"]
    accuracy = {"answer": {"acc_average": "75.00", "acc_natural": "50.00"}}
    files.write_json(
        root / "lora/predictions_ans_test.json",
        {
            "num_fail": 1, "scores": accuracy, "qids": test, "answers": letters,
            "preds": [f"The answer is ({letter})." if letter else "I do not know." for letter in letters],
            "labels": ["The answer is (B)."] * len(test),
        },
    )  # fmt: skip
    make_rl(root / "rl", problems, splits["train"], tokenizer)
    make_corrections(root / "correction", problems, splits["train"])
    verdicts = [
        {"qid": "1", "order": "ab", "winner": "b"}, {"qid": "1", "order": "ba", "winner": "b"},
        {"qid": "2", "order": "ab", "winner": "a"}, {"qid": "2", "order": "ba", "winner": "b"},
        {"qid": "3", "order": "ab", "winner": "tie"},
        {"qid": "4", "order": "ab", "winner": "tie"}, {"qid": "4", "order": "ba", "winner": "b"},
    ]  # fmt: skip
    judge = {"teacher": "api", "model": "judge-1", "prompt_version": "judge-3", "with_image": False}
    data = {"systems": ["base", "sft"], "judge": judge, "protocol": "both", "summary": {"identical": 17}}
    data["verdicts"] = verdicts
    files.write_json(root / "win_rate.json", data)
    files.write_json(root / "stages.json", {"stages": {"rl": {"title": "RL itself", "seconds": 12.5}}})
    return SimpleNamespace(root=root, problems=problems, splits=splits)


SECOND = ([0.9, 0.1], [0.2, 0.3, 0.9])  # scores of a second Teacher for the two samples of a question


def make_rl(run: Path, problems: dict, qids: list[str], tokenizer) -> None:
    """One finished round with two samples a question; the reply to 0/{last question} is spoilt."""
    import torch

    from rl import collection, metrics, ppo, rollouts

    texts = []
    for qid in qids:
        town = problems[qid]["choices"][1]
        texts += [f"The capital is {town}. The answer is (B).", f"It is far away. The capital is not {town}. So"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows)) + 1
    actions = torch.tensor([[0, *row] + [0] * (width - 1 - len(row)) for row in rows])
    generator = torch.Generator().manual_seed(0)
    fields = {name: torch.randn(len(rows), width - 1, generator=generator) for name in rollouts.FIELDS[1:]}
    made = rollouts.to_rollouts({"actions": actions, **fields}, qids, 2, 0, tokenizer)
    store = rollouts.RolloutStore(run, 0)
    made.save(store.shard(0))
    collection.export(made, store.questions, tokenizer)
    files.write_json(store.collected_file, {"batches": 1, "samples": len(made)})
    rl_tools.answer(store.questions, spoil=lambda item: item.action == 0 and item.qid == qids[-1])
    for item in handoff.iter_items(store.questions):
        model = f"teacher-{1 + (item.qid == qids[0])}"
        sidecar = {"model": model, "usage": {"input_tokens": 100, "output_tokens": 20}, "cost_usd": 0.25}
        files.write_json(item.folder / handoff.SIDECAR, {**sidecar, "time": f"2026-11-25T10:00:0{item.action}Z"})
    compared = {f"{action}/p0/{qids[1]}": [None, SECOND[action]] for action in (0, 1)}
    check = {"who": "reference 3", "against": "claude m", "scores": compared}
    files.write_json(store.questions / OURS / CHECKS, {"reference 3 against claude m": check})
    decision = rollouts.read_feedback(store, made, max_dropped=0.5)
    kept, scores = rollouts.scored(made, decision)
    data = ppo.compute_advantages(kept, scores, SimpleNamespace(**RUN_FLAGS), RUN_FLAGS["kl_coef"])
    metrics.write_samples(run / "samples_round_0.jsonl", data, scores, dict.fromkeys(qids, "prompt"), tokenizer)
    store.questions.rename(run / "questions_round0")
    files.write_args(run / "0", SimpleNamespace(**RUN_FLAGS))
    tokenizer.save_pretrained(run / "0")
    lines = [{"kind": "rollout", "round": 0, "update": 0, "mean_sentence_score": 0.55, "reward": 0.25,
              "length": 12.0, "share_ended": 1.0, "rationales": len(kept), "share_dropped": 0.125,
              "kl_per_rationale": -0.0003}]  # fmt: skip
    for update in range(1, 7):
        values = {"approx_kl": 0.01 * update, "kl_ref": 0.02 * update, "entropy": 1.0 / update, "clipfrac": 0.1}
        values |= {"explained_variance": 0.1 * update, "value_loss": 1.0, "reward": 0.25, "sentence_reward": 0.3}
        lines.append({"kind": "update", "round": 0, "update": update, **values})
        if update % 3 == 0:
            lines.append({"kind": "epoch", "round": 0, "update": update, **values})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_corrections(folder: Path, problems: dict, qids: list[str]) -> None:
    """One with a repetition, one that breaks out of the page, one without a final text, and a changed one."""
    for number, qid in enumerate(qids):
        place = handoff.question_dir(folder, 0, 0, qid)
        original = f"The capital is Hut{qid}." if number else f"The capital is Town{qid}. It is. It is."
        final = f"The capital is Town{qid}." + ("" if number > 1 else f" {EVIL}" if number else " It is.")
        handoff.write_rationale(place, [original])
        text = json.dumps({"Original rationale": original, "Final rationale": final})
        files.write_text(place / handoff.REPLY, "I cannot help." if number == 2 else text)


def picture(path: Path, size: tuple[int, int] = (60, 40)) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (30, 90, 200)).save(path)


def flags(root: Path) -> list[str]:
    """The command line that shows all of it."""
    stages = [f"{name}={root / folder}" for name, folder in ((NAME, "base"), ("sft", "sft"), ("lora", "lora"))]
    words = [word for stage in stages for word in ("--stage", stage)]
    words += ["--run", root / "rl", "--correction_dir", root / "correction", "--win_rate", root / "win_rate.json"]
    words += ["--data_root", root / "data", "--images", root / "images", "--times", root / "stages.json"]
    return [str(word) for word in words]


def make_report(tmp_path_factory, tokenizer) -> SimpleNamespace:
    """A world, its report, and what the report holds; `untouched`: whether tools/report.py left its inputs alone."""
    from tools import report

    made = make_world(tmp_path_factory.mktemp("run"), tokenizer)
    before = stamps(made.root)
    made.output = tmp_path_factory.mktemp("out") / "report.html"
    made.png = made.output.parent / "png"
    report.main([*flags(made.root), "--output", str(made.output), "--image_mode", "embed", "--png", str(made.png)])
    made.untouched = stamps(made.root) == before
    made.page = made.output.read_text(encoding="utf-8")
    made.parts = parts_of(made.page)
    made.main = made.parts["main"]
    made.row = {each["qid"]: str(row) for row, each in enumerate(made.main["questions"])}
    return made


def stamps(root: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


def parts_of(page: str) -> dict:
    """The data blocks of a page by id, read as a browser would: up to the first `</script`, without NaN."""

    def refuse(name):
        raise AssertionError(f"{name} in the page: a browser would show nothing")

    blocks = re.findall(r'<script type="application/json" id="(\w+)">(.*?)</script', page, flags=re.DOTALL)
    return {name: json.loads(text, parse_constant=refuse) for name, text in blocks}
