"""The reward model: where it predicts, what it learns, resuming, and haiku.py --teacher model on questions folders."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import haiku
import haiku_for_correction_feedback
from ares import files
from ares.cli import UserError
from ares.sentences import sentence_columns, sentences_from_ids, split_text
from model import T5ForMultimodalGenerationValueFunction
from rl import ppo, reward_model, reward_training, rollouts
from teacher import agreement, handoff
from teacher.prompts import scoring_request
from teacher.reply_files import reading, write_reply
from tests.api_server import ApiServer, score_by_text
from tests.conftest import ROOT
from tests.pretended_gpu import PretendedGPU
from tests.rl import rl_tools
from tools import train_reward_model, win_rate

CLAUDE = {"teacher": "claude", "model": "claude-haiku-5-5"}
SUBJECTS = ("The answer", "That fact", "This animal", "The second word", "A magnet", "The map", "Your reason", "Heat")
QUESTIONS, RATIONALES = 24, 4


def said(right: bool, rng: random.Random) -> str:
    return f"{rng.choice(SUBJECTS)} is {'right' if right else 'wrong'}."


def score(sentence: str) -> float:
    return 0.9 if "right" in sentence else 0.1


def lay_out(root: Path, problems: dict, qids: list[str], seed: int = 0, k: int = RATIONALES) -> list[Path]:
    """Exported rationales of 1 to 4 right and wrong sentences with their requests; returns their folders."""
    rng, folders = random.Random(seed), []
    for action in range(k):
        for qid in qids:
            sentences = [said(rng.random() < 0.5, rng) for _ in range(rng.randint(1, 4))]
            folder = handoff.question_dir(root, action, 0, qid)
            handoff.write_rationale(folder, sentences)
            handoff.write_request(folder, scoring_request(problems[qid], sentences))
            folders.append(folder)
    handoff.mark_exported(root)
    return folders


def answer(folder: Path, about: dict | None = None, scorer=score) -> None:
    """The reply that a Teacher would write."""
    sentences = handoff.read_rationale(folder)
    text = json.dumps({"scores": [scorer(sentence) for sentence in sentences]})
    write_reply(folder, text, CLAUDE if about is None else about, reading("score", text, sentences))


@pytest.fixture(scope="module")
def world(tmp_path_factory, sample, t5_tokenizer):
    """`data`, `problems`, `qids` (of train), `base` (a tiny rationale model), `scored` (a questions folder with
    Claude's scores), `trained` (the reward model of it)."""
    tmp = tmp_path_factory.mktemp("reward")
    data = rl_tools.make_data(tmp, sample, QUESTIONS)
    problems = json.loads((data / "scienceqa/problems.json").read_text())
    qids = json.loads((data / "scienceqa/pid_splits.json").read_text())["train"]
    base = rl_tools.make_model(tmp / "base", data, t5_tokenizer)
    for folder in lay_out(tmp / "scored", problems, qids):
        answer(folder)
    made = SimpleNamespace(tmp=tmp, data=data, problems=problems, qids=qids, base=base, scored=tmp / "scored")
    made.trained = tmp / "trained"
    train(made, run_dir=made.trained, epochs=16, patience=16)
    return made


def train_flags(world, **changes) -> list[str]:
    chosen = {
        "questions_dirs": world.scored, "model": world.base, "run_dir": world.tmp / "other", "data_root": world.data,
        "caption_file": world.data / "captions.json", "use_caption": "", "img_type": "vit", "lr": 5e-3, "bs": 8,
        "epochs": 8, "held_out": 0.4,
    } | changes  # fmt: skip
    words = [(f"--{key}", *(value if isinstance(value, list) else [value])) for key, value in chosen.items()]
    return [str(word) for pair in words for word in pair if word != ""]


def train(world, **changes) -> dict:
    """tools/train_reward_model.py in this process; returns its metrics.json."""
    argv = train_flags(world, **changes)
    train_reward_model.main(argv)
    return files.read_json(Path(argv[argv.index("--run_dir") + 1]) / "metrics.json", "test", dict)


def ask(world, root: Path, *more: object) -> None:
    argv = ["--questions_dir", root, "--teacher", "model", "--reward_model", world.trained, *more]
    haiku.main([str(word) for word in argv])


def scores(root: Path) -> dict[str, list[float]]:
    """Item -> its scores, of the items that have some."""
    found = {item.name: item.folder / handoff.SCORES for item in handoff.iter_items(root)}
    return {name: [float(line) for line in path.read_text().split()] for name, path in found.items() if path.exists()}


def authors(root: Path) -> dict[str, str]:
    found = {item.name: item.folder / handoff.SIDECAR for item in handoff.iter_items(root)}
    return {name: json.loads(path.read_text())["teacher"] for name, path in found.items() if path.exists()}


def refused(call, *words: str) -> None:
    with pytest.raises(UserError) as refusal:
        call()
    line = str(refusal.value)
    assert "\n" not in line and all(word in line for word in words), (words, line)


# -- where it predicts -----------------------------------------------------------------------------------


def test_columns_are_those_of_rls_rewards(problems, t5_tokenizer):
    same = 0
    for qid, problem in list(problems.items())[:800]:
        if not split_text(problem["solution"]):
            continue
        ids = [0, *t5_tokenizer(" ".join(problem["solution"].split()))["input_ids"]]  # as the policy would write it
        sampled = sentences_from_ids(ids, t5_tokenizer)
        [made] = reward_model.tokenised([(qid, [sentence.text for sentence in sampled])], t5_tokenizer)
        assert len(made.columns) == len(sampled) and list(made.columns) == sorted({*made.columns})
        starts = [0, *made.columns[:-1]]
        for sentence, start, column in zip(sampled, starts, made.columns, strict=True):
            text = t5_tokenizer.decode(made.ids[start + 1 : column + 1], skip_special_tokens=True)
            assert text.replace(" ", "") == t5_tokenizer.decode(
                t5_tokenizer(sentence.text)["input_ids"], skip_special_tokens=True
            ).replace(" ", "")  # fmt: skip
        if list(made.ids) == ids:
            same += 1
            columns = [sentence.column for sentence in sampled]
            assert list(made.columns) == columns == sentence_columns(made.ids, t5_tokenizer)
            rewards = ppo.sentence_rewards([made.columns], [[1.0] * len(columns)], len(ids) - 1, neutral=0.0)
            assert (rewards[0].nonzero()[:, 0] + 1).tolist() == columns
    assert same > 300  # texts without line breaks: the very ids


def test_columns_where_the_rule_sees_other_sentences(t5_tokenizer):
    cases = (
        ["One of them. Two of them.", "Three"],  # one entry that reads as two
        ["The city is in the U.S.", "a river"],  # two that read as one
        ["Look <pad> here.", "Then </s> there."],
        ["", "A word."],
    )
    for sentences in cases:
        [made] = reward_model.tokenised([("1", sentences)], t5_tokenizer)
        assert len(made.columns) == len(sentences) and 0 not in made.ids[1:]
        assert list(made.columns) == sorted(made.columns) and made.columns[-1] < len(made.ids)


@pytest.mark.parametrize("twice", [False, True])
def test_a_prediction_is_the_value_of_the_last_state_and_the_mean_of_the_sentence(twice, world, t5_tokenizer):
    args = reward_model.read_folder(world.trained, SimpleNamespace())
    data = reward_model.read_questions(args, world.qids)
    model = T5ForMultimodalGenerationValueFunction.from_pretrained(world.trained).eval()
    prompts = reward_model.make_prompts(data, world.qids, t5_tokenizer, args, torch.device("cpu"))
    rng = random.Random(5)
    asked = [(rng.choice(world.qids[:9]), [said(True, rng) for _ in range(rng.randint(1, 5))]) for _ in range(30)]
    rows = reward_model.tokenised(asked, t5_tokenizer, twice)
    alone, states = [], []
    hook = model.v_head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    with torch.no_grad():
        for row, (_, sentences) in zip(rows, asked, strict=True):  # one at a time: no padding, no shared prompt
            model(**prompts.collate([row.qid]), decoder_input_ids=torch.tensor([row.ids]))
            column = len(row.ids) // 2 if twice else 0  # of the token before the text that is read
            for sentence in sentences:
                words = t5_tokenizer(sentence, add_special_tokens=False)["input_ids"]
                assert list(row.ids[column + 1 : column + 1 + len(words)]) == words
                own = states[-1][0, column + 1 : column + 1 + len(words)]
                alone.append(float(model.v_head[0:](own[-1] + own.mean(0))))
                column += len(words)
        hook.remove()
        scorer = reward_model.Scorer(model, prompts, torch.device("cpu"), bf16=False)
        assert scorer.values(rows).tolist() == pytest.approx(alone, abs=1e-5)
    flat = [score for scores in scorer.predict(rows) for score in scores]
    assert flat == pytest.approx([min(max(value, 0), 1) for value in alone], abs=0.0051)
    assert all(round(value, 2) == value for value in flat)


def test_on_a_gpu_the_host_waits_once_an_epoch(world, t5_tokenizer, monkeypatch, tmp_path):
    args = reward_model.read_folder(world.trained, SimpleNamespace())
    data = reward_model.read_questions(args, world.qids)
    rng, cpu = random.Random(2), torch.device("cpu")
    asked = [(qid, [said(True, rng), said(False, rng)]) for qid in world.qids[:6] for _ in range(2)]
    rows = reward_model.tokenised(asked, t5_tokenizer, True, [[1.0, 0.0]] * 12)
    flags = SimpleNamespace(lr=1e-3, lr_scheduler="linear", bs=4, epochs=1, patience=1, seed=0)

    def trained(begin=lambda model: None):
        model = reward_model.load(world.base, data.patch_size, cpu, mean=0.5)
        model.set_attn_implementation("sdpa")
        begin(model)
        prompts = reward_model.make_prompts(data, world.qids, t5_tokenizer, args, cpu)
        scorer = reward_model.Scorer(model, prompts, cpu, bf16=False)
        fit = reward_training.Fit(scorer, rows, rows[:4], flags, tmp_path / "state.pth")
        return fit.epoch(0), fit

    plain, _ = trained()
    with PretendedGPU(monkeypatch) as gpu:
        loss, fit = trained(lambda model: (gpu.take(model), gpu.waits.clear()))
        assert [wait for wait in gpu.waits if "float(squares)" not in wait] == []
        fit.scorer.predict(rows)
    assert loss == pytest.approx(plain, rel=1e-5)


# -- what it learns --------------------------------------------------------------------------------------


def test_it_learns_and_beats_the_baseline_on_held_out_questions(world):
    metrics = files.read_json(world.trained / "metrics.json", "test", dict)
    losses = [entry["train_loss"] for entry in metrics["history"]]
    assert losses[-1] < 0.3 * losses[0]
    everything = metrics["agreement"]["all"]
    ours, baseline = everything["reward model"], everything["mean by position"]
    assert metrics["way"] > 0.5 and metrics["way"] == pytest.approx(
        1 - ours["mean_difference"] / baseline["mean_difference"]
    )
    assert ours["rank_correlation"] > 0.7 and ours["within_0.1"] > baseline["within_0.1"] + 0.3
    assert "reference Teacher" in everything and metrics["questions"] == 6
    distinct = {(item.qid, *handoff.read_rationale(item.folder)) for item in handoff.iter_items(world.scored)}
    assert metrics["teachers"] == {"claude claude-haiku-5-5": len(distinct)}
    rows = metrics["agreement"]
    for kind in ("sentence ", "subject "):
        parts = [row["reward model"]["sentences"] for name, row in rows.items() if name.startswith(kind)]
        assert sum(parts) == ours["sentences"] and len(parts) > 1
    assert not (world.trained / "state.pth").exists()


def test_what_check_has_found_is_shown(tmp_path):
    row = {"sentences": 30, "mean_difference": 0.05, "rank_correlation": 0.91, "within_0.1": 0.9}
    files.write_json(tmp_path / "a/teacher/check.json", {"claude x against claude y": {"rows": {"all": row}}})
    for name, content in (("b", {"who": "x"}), ("c", {"x against y": {"rows": []}}), ("d", [])):
        files.write_json(tmp_path / name / "teacher/check.json", content)
    [line] = train_reward_model.teacher_checks([tmp_path / name for name in "abcde"])
    assert line.startswith("claude x against claude y: sentences 30, mean_difference 0.05, rank_correlation 0.91")


def test_agreement_and_rank_correlation():
    a, b = [0.1, 0.5, 0.5, 0.9], [0.2, 0.4, 0.8, 0.8]
    found = agreement.agreement_figures(list(zip(a, b, strict=True)))
    # ranks by hand, equal values sharing theirs
    expected = statistics.correlation([1, 2.5, 2.5, 4], [1, 2, 3.5, 3.5])
    assert found == {"sentences": 4, "mean_difference": pytest.approx(0.15), "within_0.1": 0.75,
                     "rank_correlation": pytest.approx(expected)}  # fmt: skip
    assert agreement.agreement_figures([(0.5, 0.1), (0.5, 0.9)])["rank_correlation"] is None
    rows = [reward_model.Rationale("1", (), (), (), tuple(scores)) for scores in ([1.0] * 7, [0.0, 0.5])]
    means = train_reward_model.means_by_position(rows)
    assert means == {"1": 0.5, "2": 0.75, "3": 1.0, "4": 1.0, "5": 1.0, "6+": 1.0}


def test_questions_are_held_out_whole_and_stay_so():
    rows = [reward_model.Rationale(str(i % 400), (str(i),), (), ()) for i in range(1200)]

    def held_out(rows, seed=1):
        train, held = reward_training.hold_out(rows, 0.1, seed)
        assert not {row.qid for row in held} & {row.qid for row in train} and len(train) + len(held) == len(rows)
        return {row.qid for row in held}

    qids = held_out(rows)
    assert 20 < len(qids) < 60 and held_out(rows[::-1]) == qids != held_out(rows, 2)
    few = {str(i) for i in range(100)}
    assert held_out([row for row in rows if row.qid in few]) == qids & few, "more questions change nothing for these"
    assert len(held_out([row for row in rows if row.qid in {"1", "2"}])) == 1, "one at least"
    refused(lambda: reward_training.hold_out(rows[:1], 0.1, 1), "--held_out")


def test_scores_of_identical_rationales_are_their_mean_in_any_order(world, tmp_path):
    """Two Teachers, or one that scored a text twice: the order of the folders changes nothing."""
    [item, *_] = handoff.iter_items(world.scored)
    sentences = handoff.read_rationale(item.folder)
    folders = []
    for name, score in (("a", 0.2), ("b", 0.6), ("c", 0.7)):
        place = handoff.question_dir(tmp_path / name, 0, 0, item.qid)
        shutil.copytree(item.folder, place)
        text = json.dumps({"scores": [score] * len(sentences)})
        write_reply(place, text, {"teacher": "claude", "model": "m"}, reading("score", text, sentences))
        folders.append(str(tmp_path / name))
    found, authors = train_reward_model.read_scored(folders, False)
    assert list(found.values()) == [[pytest.approx(0.5)] * len(sentences)] and authors == {"claude m": 1}
    assert train_reward_model.read_scored(folders[::-1], False)[0] == found


@pytest.mark.parametrize("at", ["identity.json", "args.yaml"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_while_the_folder_is_claimed_locks_nobody_out(at, overwrite, tmp_path, monkeypatch):
    args = SimpleNamespace(overwrite=overwrite, lr=1e-3)
    if overwrite:
        assert not train_reward_model.claim(tmp_path, {"lr": 1e-4}, args)

    def killed(path, *rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files, {"identity.json": "write_json", "args.yaml": "write_args"}[at], killed)
        with pytest.raises(KeyboardInterrupt):
            train_reward_model.claim(tmp_path, {"lr": 1e-3}, args)
    for _ in range(2):
        assert not train_reward_model.claim(tmp_path, {"lr": 1e-3}, args)
        assert (tmp_path / "args.yaml").exists() and files.read_json(tmp_path / "identity.json", "t") == {"lr": 1e-3}
    other = SimpleNamespace(overwrite=False)
    refused(lambda: train_reward_model.claim(tmp_path, {"lr": 1.0}, other), "--lr was 0.001, is 1.0")


# -- resuming --------------------------------------------------------------------------------------------

KILLS = {
    "within an epoch": """
passes, seen = reward_model.Scorer.passes, []
def killed(self, *args):
    seen.append(1)
    if len(seen) == 15: die()
    return passes(self, *args)
reward_model.Scorer.passes = killed
""",
    "while the state is written": """
save = torch.save
def killed(state, file):
    save(state["history"], file)
    file.flush()
    if len(state["history"]) == 3: die()
    file.seek(0)
    save(state, file)
reward_model.torch.save = killed
""",
    "before metrics.json": """
write = train_reward_model.files.write_json
train_reward_model.files.write_json = lambda path, *more, **how: (
    die() if path.name == "metrics.json" else write(path, *more, **how)
)
""",
}


def killed(argv: list[str], patch: str) -> None:
    code = f"""
import os, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from rl import reward_model
from tools import train_reward_model
def die(): os.kill(os.getpid(), signal.SIGKILL)
{patch}
train_reward_model.main({argv!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def test_killed_anywhere_the_same_command_gives_the_same_bits(world, capsys):
    small = {"epochs": 4, "patience": 2}
    whole, again = world.tmp / "whole", world.tmp / "again"
    train(world, run_dir=whole, **small)
    for patch in KILLS.values():
        killed(train_flags(world, run_dir=again, **small), patch)
        assert not (again / "metrics.json").exists()
    capsys.readouterr()
    train(world, run_dir=again, **small)
    assert "going on after epoch" in capsys.readouterr().out
    for name in ("model.safetensors", "metrics.json", "config.json"):
        assert (whole / name).read_bytes() == (again / name).read_bytes(), name
    assert {path.name for path in again.iterdir()} == {path.name for path in whole.iterdir()}
    before = (again / "model.safetensors").stat().st_mtime_ns
    train(world, run_dir=again, **small)
    assert "training is finished" in capsys.readouterr().out
    assert (again / "model.safetensors").stat().st_mtime_ns == before


def test_early_stop_keeps_the_best_epoch(world):
    metrics = train(world, run_dir=world.tmp / "stopped", lr=0.03, epochs=9, patience=1)
    held_out = [entry["held_out_loss"] for entry in metrics["history"]]
    assert len(held_out) < 9 and metrics["best_epoch"] == len(held_out) - 1
    assert held_out[-1] >= min(held_out) == held_out[metrics["best_epoch"] - 1]


# -- what is refused -------------------------------------------------------------------------------------


def test_scores_that_it_learns_from(world, tmp_path, capsys):
    root = shutil.copytree(world.scored, tmp_path / "mixed")
    items = handoff.iter_items(root)
    own, dated, other, unusable, copied = items[:5]
    answer(own.folder, {"teacher": "model", "model": "reward_model-1"})
    answer(dated.folder, {**CLAUDE, "model": "claude-haiku-5-5-20261101"})
    answer(other.folder, {"teacher": "openai", "model": "qwen"})
    files.write_text(unusable.folder / handoff.REPLY, "I would rather not.")
    handoff.write_rationale(handoff.question_dir(root, 9, 0, copied.qid), handoff.read_rationale(copied.folder))
    answer(handoff.question_dir(root, 9, 0, copied.qid))
    refused(
        lambda: train_reward_model.read_scored([str(root)], False), "--questions_dirs", "qwen 1", "--mixed_teachers"
    )
    found, counts = train_reward_model.read_scored([str(root), str(world.scored)], True)
    out = capsys.readouterr().out
    assert "scored by a reward model 1" in out and "identical" in out
    distinct = {(item.qid, *handoff.read_rationale(item.folder)) for item in items}
    again, _ = train_reward_model.read_scored([str(world.scored), str(root)], True)
    assert list(again) == list(found), "in whatever order the folders are named"
    assert len(found) == len(distinct) == counts.total() and len(counts) == 2 and counts["openai qwen"] == 1
    for item in items:
        answer(item.folder, {"teacher": "model", "model": "reward_model-1"})
    for path in root.glob("9/*/*"):
        shutil.rmtree(path)
    refused(lambda: train_reward_model.read_scored([str(root)], True), "no usable score by a Teacher", "reward model")


@pytest.fixture
def no_model(monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(T5ForMultimodalGenerationValueFunction, "from_pretrained", loaded)


def test_wrong_flags_and_folders_end_in_one_line(world, tmp_path, no_model):
    def trained(*words, **changes):
        refused(lambda: train(world, run_dir=changes.pop("run_dir", tmp_path / "run"), **changes), *words)

    trained("--lr", "above 0", lr=0)
    trained("--held_out", "--epochs", held_out=1, epochs=0)
    trained("--questions_dirs: no folder", questions_dirs=tmp_path / "gone")
    trained("holds no", questions_dirs=tmp_path)
    trained("--model: no folder", model=tmp_path / "gone")
    trained("--model", "config.json", model=world.scored)
    trained("--img_type", img_type="clip")
    trained("--caption_file", caption_file=tmp_path / "gone.json")
    trained("starting model's own folder", run_dir=world.base)
    trained("--lr was 0.005, is 0.01", run_dir=world.trained, epochs=16, patience=16, lr=0.01)
    more = {"epochs": 16, "patience": 16, "questions_dirs": _more(world, tmp_path)}
    trained("--questions_dirs was", run_dir=world.trained, **more)
    trained("did not write", run_dir=_foreign(world, tmp_path))
    changed = shutil.copytree(world.data, tmp_path / "data")
    files.write_json(changed / "scienceqa/problems.json", dict(list(world.problems.items())[9:]))
    trained("problems.json", data_root=changed)


def _more(world, tmp_path: Path) -> list[Path]:
    for folder in lay_out(tmp_path / "more", world.problems, world.qids[:3], seed=9):
        answer(folder)
    return [world.scored, tmp_path / "more"]


def _foreign(world, tmp_path: Path) -> Path:
    return shutil.copytree(world.base, tmp_path / "foreign")


def test_haiku_refuses_what_is_no_reward_model(world, tmp_path, no_model, monkeypatch):
    root = tmp_path / "questions"
    lay_out(root, world.problems, world.qids[:3], k=1)

    def asked(words, *more):
        refused(lambda: ask(world, root, *more), words)

    asked("no finished reward model (it has no args.yaml)", "--reward_model", world.base)
    asked("--reward_model: no folder", "--reward_model", tmp_path / "gone")
    sft = shutil.copytree(world.base, tmp_path / "sft")
    for name in ("args.yaml", "metrics.json"):
        shutil.copy(world.trained / name, sft / name)
    asked("no head for scores", "--reward_model", sft)
    asked("--max_usd has no effect with --teacher model", "--max_usd", "1")
    asked("--ask: no effect without --ask_share", "--ask", "uncertain")
    asked("--ask_share must be above 0", "--ask_share", "1.5")
    asked("--watch nor --check", "--ask_share", "0.5", "--watch", "1")
    asked("--data_root", "--data_root", tmp_path)
    other = tmp_path / "other data"  # the same question ids
    shutil.copytree(world.data, other)
    [qid, *_] = world.qids
    changed = world.problems | {qid: world.problems[qid] | {"question": "What is that?"}}
    files.write_json(other / "scienceqa/problems.json", changed)
    before = sorted(root.rglob("*"))
    asked(f"{root} was not made from {other / 'scienceqa'}: question {qid} is another", "--data_root", other)
    assert sorted(root.rglob("*")) == before
    trained = train_flags(world, data_root=other, run_dir=tmp_path / "never")
    refused(lambda: train_reward_model.main(trained), f"{world.scored} was not made from {other / 'scienceqa'}")
    assert not (tmp_path / "never").exists()
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    asked("ANTHROPIC_API_KEY", "--ask_share", "0.5")
    refused(lambda: haiku.main(["--questions_dir", str(root), "--teacher", "model"]), "needs --reward_model")
    words = ["--questions_dir", str(root), "--teacher", "reference", "--reward_model", str(world.trained)]
    refused(lambda: haiku.main(words), "--reward_model: no effect without --teacher model")
    only = "--teacher model only scores sentences"
    refused(lambda: haiku_for_correction_feedback.parse_args(["--teacher", "model"]), only)
    pair = [f"{name}={world.base}/config.json" for name in "ab"]
    refused(lambda: win_rate.parse_args([*pair, "--teacher", "model", "--output", str(tmp_path)]), only)
    assert not scores(root)


# -- haiku.py --------------------------------------------------------------------------------------------


def test_a_folder_is_scored_by_its_predictions_and_resumed(world, tmp_path, capsys):
    root = tmp_path / "questions"
    lay_out(root, world.problems, world.qids, seed=3)
    items = handoff.iter_items(root)
    asked = [(item.qid, handoff.read_rationale(item.folder)) for item in items]
    teacher = reward_model.RewardTeacher(world.trained, SimpleNamespace())
    direct = dict(zip((item.name for item in items), teacher.predict(asked), strict=True))
    ask(world, root)
    assert scores(root) == direct
    assert all(handoff.is_done(root, action) for action in range(RATIONALES))
    about = json.loads((items[0].folder / handoff.SIDECAR).read_text())
    assert about["teacher"] == "model" and about["model"] == teacher.model and about["cost_usd"] == 0
    assert teacher.model.startswith("trained-") and not (root / "teacher/spend.jsonl").exists()
    right = [value for (_, texts), found in zip(asked, direct.values(), strict=True)
             for text, value in zip(texts, found, strict=True) if "right" in text]  # fmt: skip
    assert statistics.fmean(right) > 0.7
    capsys.readouterr()
    for item in items[::5]:
        (item.folder / handoff.REPLY).unlink()
    kept = len(items) - len(items[::5])
    ask(world, root)
    assert f"{kept} had a reply" in capsys.readouterr().out and scores(root) == direct
    other = shutil.copytree(world.trained, tmp_path / "other_model")
    refused(lambda: ask(world, root, "--reward_model", other), "holds replies by model trained-", "--keep_replies")


def test_ctrl_c_keeps_what_is_scored(world, tmp_path, monkeypatch):
    root, predict, calls = tmp_path / "questions", reward_model.RewardTeacher._predict, []
    lay_out(root, world.problems, world.qids, seed=3)

    def interrupted(self, rationales):
        calls.append(len(rationales))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return predict(self, rationales)

    with monkeypatch.context() as patch:
        patch.setitem(reward_model.PASS_TOKENS, "cpu", 500)
        patch.setattr(reward_model.RewardTeacher, "_predict", interrupted)
        with pytest.raises(UserError, match="ended by SIGINT") as stopped:
            ask(world, root)
    assert stopped.value.status == 130 and len(calls) < 5
    kept = scores(root)
    assert sum(calls) >= len(kept) >= calls[0] and len(kept) < QUESTIONS * RATIONALES
    ask(world, root)
    assert len(scores(root)) == QUESTIONS * RATIONALES and kept.items() <= scores(root).items()


def test_data_may_be_elsewhere_than_in_training(world, tmp_path, monkeypatch):
    root, moved = tmp_path / "questions", shutil.copytree(world.data, tmp_path / "moved")
    lay_out(root, world.problems, world.qids[:4], seed=3)
    monkeypatch.chdir(tmp_path)
    ask(world, root)  # as recorded, from another working folder
    first = scores(root)
    second = shutil.copytree(root, tmp_path / "second")
    for item in handoff.iter_items(second):
        (item.folder / handoff.REPLY).unlink()
    captions = files.read_json(moved / "captions.json", "test")["captions"]
    files.write_json(moved / "captions.json", dict.fromkeys(captions, "A purple elephant."))
    ask(world, second, "--data_root", moved, "--caption_file", moved / "captions.json")
    assert len(first) == len(scores(second)) == 4 * RATIONALES


def test_watch_scores_while_rl_exports(world, tmp_path):
    root = tmp_path / "run/questions"
    lay_out(root, world.problems, world.qids[:5], seed=4)
    for item in handoff.iter_items(root):
        (item.folder / handoff.REQUEST).unlink()  # --watch writes the requests itself
    ask(world, root, "--watch", "1", "--poll_seconds", "0.1")
    assert len(scores(root)) == 5 * RATIONALES and set(authors(root).values()) == {"model"}
    assert all(handoff.is_done(root, action) for action in range(RATIONALES))


def test_check_compares_it_with_another_teacher(world, tmp_path, capsys):
    root = tmp_path / "questions"
    lay_out(root, world.problems, world.qids[:5], seed=4)
    ask(world, root, "--check", "6")
    out = capsys.readouterr().out
    assert "model trained-" in out and "against reference" in out and "6 of 6 rationales scored by both" in out
    assert not scores(root)


# -- a share by a paid Teacher ---------------------------------------------------------------------------


@pytest.fixture
def server(api_environment):
    with ApiServer(score_by_text) as server:
        yield server


def sides(root: Path) -> dict[str, str]:
    """Item -> who scores it, by asked.json."""
    return {name: side for name, (side, _) in
            files.read_json(root / "teacher/asked.json", "test", dict)["rationales"].items()}  # fmt: skip


@pytest.mark.parametrize("how", ["random", "uncertain"])
def test_a_share_is_asked_and_stays_the_same(world, tmp_path, server, how):
    root = tmp_path / "questions"
    folders = lay_out(root, world.problems, world.qids, seed=6)
    twin = handoff.question_dir(root, 7, 0, folders[0].name)  # an identical rationale goes to the same Teacher
    shutil.copytree(folders[0], twin)
    share = ("--base_url", server.url, "--ask_share", "0.25", "--ask", how, "--max_usd", "1")
    ask(world, root, *share)
    decided = sides(root)
    assert decided == authors(root) and len(decided) == len(folders) + 1
    paid = {name for name, side in decided.items() if side == "claude"}
    assert decided[f"7/p0/{twin.name}"] == decided[f"0/p0/{twin.name}"]
    texts = {
        (item.qid, *handoff.read_rationale(item.folder)) for item in handoff.iter_items(root) if item.name in paid
    }
    assert len(server.log) == len(texts) and 0.1 < len(texts) / len(folders) < 0.4
    assert all(handoff.is_done(root, action) for action in (*range(RATIONALES), 7))
    before = scores(root)
    if how == "uncertain":
        assert len(texts) == round(0.25 * len({(p.name, *handoff.read_rationale(p)) for p in folders}))
        teacher = reward_model.RewardTeacher(world.trained, SimpleNamespace())
        doubt = {item.name: teacher.expected_errors([(item.qid, handoff.read_rationale(item.folder))])[0]
                 for item in handoff.iter_items(root)}  # fmt: skip
        assert len(set(doubt.values())) > 5
        assert min(doubt[name] for name in paid) >= max(doubt[name] for name in decided.keys() - paid) - 1e-9
    # a restart asks only what is open, of the same Teacher as before; new items do not change what was decided
    for item in handoff.iter_items(root)[::3]:
        (item.folder / handoff.REPLY).unlink()
    lay_out(tmp_path / "more", world.problems, world.qids[:6], seed=7, k=1)
    shutil.copytree(tmp_path / "more/0", root / "8")
    ask(world, root, *share)
    later = sides(root)
    assert {name: later[name] for name in decided} == decided and len(later) == len(decided) + 6
    assert authors(root) == later and {name: scores(root)[name] for name in before} == before
    assert len(server.log) <= len(texts) + 6, "replies were in the cache"
    refused(lambda: ask(world, root, *share, "--ask_share", "0.5"), "--ask_share", "asked.json was made with", "0.25")
    # what was paid for is what the next reward model learns from
    found, counts = train_reward_model.read_scored([str(root)], False)
    assert set(counts) == {"claude claude-haiku-5-5"} and len(found) < len(texts) + 7


def test_a_decision_is_about_a_rationale_not_about_a_folder(world, tmp_path, server):
    """The next round's rationales lie in the same folders; the Teacher's own replies are not asked about again."""
    root = tmp_path / "questions"
    share = ("--base_url", server.url, "--ask_share", "0.3", "--max_usd", "1")
    asked = []
    for seed in (11, 12):
        lay_out(root, world.problems, world.qids, seed=seed)
        for item in handoff.iter_items(root):
            for name in (handoff.REPLY, handoff.SCORES, handoff.SIDECAR):
                (item.folder / name).unlink(missing_ok=True)
        ask(world, root, *share)
        asked.append({item.name for item in handoff.iter_items(root) if sides(root)[item.name] == "claude"})
        texts = {
            item.name: (item.qid, tuple(handoff.read_rationale(item.folder))) for item in handoff.iter_items(root)
        }
        assert asked[-1] == {name for name, text in texts.items() if haiku._draw(0, text) < 0.3}
    assert asked[0] != asked[1]
    # all are Claude's before a share is asked for: none goes to the model, none is paid for again
    paid, count = tmp_path / "paid", len(server.log)
    for folder in lay_out(paid, world.problems, world.qids, seed=13):
        answer(folder)
    ask(world, paid, *share)
    assert set(sides(paid).values()) == {"claude"} == set(authors(paid).values()) and len(server.log) == count


def test_expected_errors_are_those_of_held_out_predictions_of_that_size(world):
    rows = [reward_model.Rationale("1", (), (), (), (0.0, 1.0)), reward_model.Rationale("1", (), (), (), (0.4,))]
    found = train_reward_model.errors_by_score([[0.3, 0.96], [0.3]], rows)
    overall = statistics.fmean([0.3, 0.04, 0.1])
    assert found[3] == pytest.approx((0.3 + 0.1 + 5 * overall) / 7) and found[10] == pytest.approx(
        (0.04 + 5 * overall) / 6
    )
    assert found[:3] + found[4:10] == [pytest.approx(overall)] * 9
    teacher = reward_model.RewardTeacher(world.trained, SimpleNamespace())
    asked = [(world.qids[0], [said(True, random.Random(1)), said(False, random.Random(2))]), (world.qids[1], [])]
    [scores, none] = teacher.predict(asked)
    assert teacher.predict([(world.qids[2], [])]) == [[]], "a pass without a sentence"
    errors = files.read_json(world.trained / "metrics.json", "test", dict)["error_by_score"]
    assert none == [] and teacher.expected_errors(asked) == [
        pytest.approx(statistics.fmean(errors[round(10 * p)] for p in scores)), 0.0
    ]  # fmt: skip


def test_a_share_is_random_by_rationale_not_by_order():
    texts = [(str(number), ("A sentence.",)) for number in range(4000)]
    chosen = [haiku._draw(0, text) < 0.2 for text in texts]
    assert 0.17 < statistics.fmean(chosen) < 0.23
    assert chosen != [haiku._draw(1, text) < 0.2 for text in texts]


def test_a_budget_stop_keeps_what_the_model_scored(world, tmp_path, server, capsys):
    root = tmp_path / "questions"
    lay_out(root, world.problems, world.qids, seed=8)
    share = ("--base_url", server.url, "--ask_share", "0.5", "--concurrency", "1")
    with pytest.raises(UserError) as stopped:
        ask(world, root, *share, "--max_usd", "0.0005")
    assert stopped.value.status == 3
    decided, found = sides(root), authors(root)
    assert {name for name, side in decided.items() if side == "model"} <= found.keys() < decided.keys()
    assert not any(handoff.is_done(root, action) for action in range(RATIONALES))
    ask(world, root, *share)
    assert authors(root) == decided and all(handoff.is_done(root, action) for action in range(RATIONALES))
    capsys.readouterr()
    ask(world, root, *share, "--estimate")
    assert f"{list(decided.values()).count('claude')} rationales" in capsys.readouterr().out


def test_batches_for_the_share(world, tmp_path, server, monkeypatch):
    from teacher import batches

    monkeypatch.setattr(batches, "SETTLE_SECONDS", 0.05)
    root = tmp_path / "questions"
    lay_out(root, world.problems, world.qids[:8], seed=8)
    share = ("--base_url", server.url, "--ask_share", "0.5", "--batch", "--poll_seconds", "0.1")
    ask(world, root, *share, "--submit-only")
    assert set(authors(root).values()) == {"model"} and len(server.batches) == 1
    assert not any(handoff.is_done(root, action) for action in range(RATIONALES))
    ask(world, root, *share)
    assert authors(root) == sides(root) and len(server.batches) == 1
    assert all(handoff.is_done(root, action) for action in range(RATIONALES))


@pytest.mark.parametrize("ways", [("--batch", "--poll_seconds", "0.1"), ()], ids=["batches", "live"])
def test_no_share_is_scored_while_a_whole_batch_is_pending(world, tmp_path, server, monkeypatch, ways):
    from teacher import batches

    monkeypatch.setattr(batches, "SETTLE_SECONDS", 0.05)
    root = tmp_path / "questions"
    lay_out(root, world.problems, world.qids[:4], seed=8)
    whole = ["--questions_dir", str(root), "--base_url", server.url, "--batch", "--poll_seconds", "0.1"]
    haiku.main([*whole, "--submit-only"])
    with pytest.raises(UserError, match="pending"):
        ask(world, root, "--base_url", server.url, "--ask_share", "0.3", *ways)
    assert not authors(root) and not (root / "teacher/asked.json").exists()
    haiku.main(whole)
    assert set(authors(root).values()) == {"claude"} and len(server.batches) == 1 and not server.log


def test_the_share_may_be_asked_together(world, tmp_path, server):
    root = tmp_path / "questions"
    lay_out(root, world.problems, world.qids[:8], seed=8)
    ask(world, root, "--base_url", server.url, "--ask_share", "0.7", "--together")
    decided = sides(root)
    paid = [name for name, side in decided.items() if side == "claude"]
    assert authors(root) == decided and len(server.log) == len({name.split("/")[-1] for name in paid}) < len(paid)
    refused(lambda: ask(world, root, "--check", "3", "--against", "apart"), "--teacher model has no --together")


def test_the_plan_of_a_run_counts_the_share(world):
    from teacher.estimate import expected_usd

    how = ("score", world.problems, world.qids, None)
    whole = expected_usd(*how, {"teacher": "claude"})
    assert whole > 0 and expected_usd(*how, {"teacher": "model"}) == 0
    flags = {"teacher": "model", "ask_share": 0.2, "ask_teacher": "claude"}
    assert expected_usd(*how, flags) == pytest.approx(0.2 * whole)
    assert rollouts.seed_for(1) != rollouts.seed_for(2)
