"""main.py and what it shares with the LoRA script: names, flags, data order, resume, predictions, two processes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import main as script
import run_mm_cot_lora
from ares.cli import UserError
from model import T5ForMultimodalGeneration
from sft import run as sft_run
from sft import trainer
from sft.batching import LengthGroupedBatches, TokenBudgetBatches, lengths, prediction_batches
from sft.predict import Predictor, _made_with, _open_store
from tests.conftest import ROOT, run_script
from tests.tiny import make_data, make_model, predictions, write
from utils_data import Collator, RationaleDataset, batches_pin_themselves, load_data
from utils_evaluate import resolve_answer

# -- names and flags -------------------------------------------------------------------------------------


def test_run_name_is_the_released_one(monkeypatch):
    def name(*argv):
        return script.run_name(script.parse_args([*argv]))

    argv = "--model declare-lab/flan-alpaca-base --img_type vit --prompt_format QCM-E --bs 8 --epoch 20 --lr 8e-5"
    argv = f"{argv} --output_len 512 --correction True --correction_file scienceqa/correction.json".split()
    base = "baseline_declare-lab-flan-alpaca-base_vit_QCM-E_lr8e-05_bs{}_op512_ep20_seed42_scienceqa-correction"
    assert name(*argv) == base.format(8)
    assert name("--model", "a/b/") == "baseline_a-b_None_QCM-A_lr5e-05_bs16_op64_ep20_seed42"
    long = [name("--model", "m/" + "ü" * 200 + end) for end in "xy"]
    assert all(len(each.encode()) <= 255 for each in long) and long[0] != long[1]
    assert long[0].startswith("baseline_m-üü")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert name(*argv) == base.format(32)
    named = base.format(32).replace("baseline", "mine").replace("_seed42", "_r1_seed42_gold")
    assert name(*argv, "--sep", "r1", "--w_train_le", "gold", "--user_msg", "mine") == named


def test_flags_that_do_not_fit(tmp_path, capsys):
    """Contradictions come together; limits are named; --evaluate_dir names the flags that do nothing."""
    argv = f"--correction True --name_map x.json --bs 0 --lr 0 --evaluate_dir {tmp_path}/no --run_dir r"
    with pytest.raises(UserError) as error:
        script.parse_args(argv.split())
    for word in ("--correction_file", "--img_type", "--bs", "--lr", "--run_dir", "--evaluate_dir"):
        assert word in str(error.value)
    tokens = "--input_len 30 --output_len 10 --max_tokens"
    for extra, words in (
        ("--correction_file x.json", "--correction True only"),
        ("--seed -1", "--seed must be in 0"),
        ("--seed 4294967296", "--seed must be in 0"),
        ("--workers -1", "--workers must not be negative"),
        ("--save_minutes -0.1", "--save_minutes"),
        ("--lr inf", "--lr must be a number"),
        ("--save_minutes nan", "--save_minutes"),
        ("--options A B A", "--options: A B A names a letter twice"),
        (f"{tokens} 39", "--max_tokens 39 is less than one sample may have .*, 40"),
        (f"{tokens} 40 --bs 8", "--bs and --max_tokens"),
    ):
        with pytest.raises(UserError, match=words):
            script.parse_args(extra.split())
    assert script.parse_args(f"{tokens} 40".split()).max_tokens == 40
    capsys.readouterr()
    script.parse_args(f"--evaluate_dir {tmp_path} --epoch 20 --lr 8e-5 --bs 8 --use_generate --final_eval".split())
    assert capsys.readouterr().out == "note: no effect under --evaluate_dir: --bs --epoch --final_eval --lr\n"


EVAL = {"use_generate": True, "eval_data": "1", "eval_le": "a"}


NEW_EVAL = {"use_generate": False, "eval_data": "2", "eval_le": "b"}


SPLIT = {"bs": 4, "processes": 2}


@pytest.mark.parametrize(
    ("begun", "change", "said"),
    [
        ({}, {"epoch": 3}, ["--epoch 3 (was 2)"]),
        ({}, {"bs": 8}, ["--bs x processes 8 (was 4)"]),
        ({}, {"bs": 2, "processes": 2}, []),
        (SPLIT, {"bs": 8, "processes": 1}, []),
        (SPLIT, {"processes": 1}, ["--bs x processes 4 (was 8)"]),
        ({}, {"data_root": "/moved", "eval_bs": 1, "test_le": "x"}, []),
        ({}, {"data_root": "/other", "train_data": "2"}, ["--data_root /other (was d)"]),
        ({}, {"train_data": "2"}, ["files under --data_root"]),
        ({}, {"train_features": "g"}, ["--vision_features or --name_map"]),
        ({}, {"tokenizer_pieces": "u"}, ["--tokenizer"]),
        ({}, {"eval_features": "new"}, []),  # earlier versions recorded none
        ({}, {"use_generate": True}, ["--use_generate True (was False)"]),
        ({}, {"final_eval": True} | EVAL, ["--final_eval True (was False)", "--use_generate True (was False)"]),
        ({"final_eval": True, **EVAL}, NEW_EVAL, []),  # no epoch is evaluated
        (EVAL, NEW_EVAL, ["--eval_le b (was a)", "--use_generate False (was True)"]),
    ],
)
def test_changed_settings(begun, change, said):
    old = {"epoch": 2, "bs": 4, "processes": 1, "data_root": "d", "train_data": "1", "eval_data": "1", "eval_bs": 2}
    old |= {"final_eval": False, "use_generate": False, "test_le": None, "eval_le": None, "train_features": "f"}
    old |= {"tokenizer_pieces": "t"} | begun
    changed = sft_run.changed_settings(old, {**old, **change})
    assert [any(word in one for one in changed) for word in said] == [True] * len(said), changed
    assert bool(changed) == bool(said)


def test_a_run_folder_is_resumed_or_cleared(tmp_path, capsys):
    """Incomplete checkpoints are removed, damaged ones skipped; --overwrite removes what a run writes, only that."""
    settings = {"bs": 4, "processes": 1, "final_eval": True, "lr": 0.1}
    assert sft_run.open_run(tmp_path, settings, overwrite=False) is None
    for step in (2, 4, 10, 12):
        write(tmp_path / f"checkpoint-{step}/trainer_state.json", {"global_step": step})
        (tmp_path / f"checkpoint-{step}/complete").touch()
    (tmp_path / "checkpoint-12/complete").unlink()
    assert sft_run.open_run(tmp_path, settings, False) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-12").exists()
    (tmp_path / "checkpoint-10/optimizer.pt").write_bytes(b"cut short")
    assert sft_run.open_run(tmp_path, settings, False) == str(tmp_path / "checkpoint-4")
    assert "looking for an older checkpoint" in capsys.readouterr().err
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}/trainer_state.json").unlink()
    with pytest.raises(UserError, match="checkpoint-2.*remove them to train from the beginning"):
        sft_run.open_run(tmp_path, settings, False)
    for name in ("metrics", "config", "predictions_ans_test", ".predicting_test/settings", "mine"):
        write(tmp_path / f"{name}.json", {})
    assert sft_run.open_run(tmp_path, settings, False) == "done"
    with pytest.raises(UserError, match=r"--lr 0.2 \(was 0.1\)"):
        sft_run.open_run(tmp_path, {**settings, "lr": 0.2}, False)
    assert sft_run.open_run(tmp_path, {**settings, "lr": 0.2}, overwrite=True) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["args.yaml", "mine.json"]
    write(tmp_path / "other/config.json", {})
    with pytest.raises(UserError, match="did not write"):
        sft_run.open_run(tmp_path / "other", settings, True)


# -- the order of the data -------------------------------------------------------------------------------


def batches_of(kind, *args, epoch=0, **kwargs):
    batches = kind(*args, **kwargs)
    batches.epoch = epoch
    made = list(batches)
    assert len(made) == len(batches) == batches.steps
    return made


def sets(batches):
    return {frozenset(batch) for batch in batches}


def test_batches_are_a_seeded_permutation_in_steps_of_similar_length():
    sizes = torch.randint(20, 400, (1003, 2), generator=torch.Generator().manual_seed(1)).tolist()
    first = batches_of(LengthGroupedBatches, sizes, 8, 42)
    assert sorted(i for batch in first for i in batch) == list(range(1003))
    assert [len(batch) for batch in first] == [8] * 125 + [3]
    assert first == batches_of(LengthGroupedBatches, sizes, 8, 42) != batches_of(LengthGroupedBatches, sizes, 8, 43)
    assert sets(first) != sets(batches_of(LengthGroupedBatches, sizes, 8, 42, epoch=1))  # not the order alone

    def spread(steps, part):
        return sum(max(sizes[i][part] for i in step) - min(sizes[i][part] for i in step) for step in steps) / 125

    unsorted = [range(i, i + 8) for i in range(0, 1000, 8)]
    assert spread(first[:125], 0) < 0.3 * spread(unsorted, 0)  # prompts
    assert spread(first[:125], 1) < 0.15 * spread(unsorted, 1)  # targets
    # still shuffled: the steps do not come by length
    heads = [sizes[batch[0]] for batch in first[:50]]
    assert heads != sorted(heads) and heads != sorted(heads, reverse=True)


def test_ranks_share_every_step():
    sizes = [(5 + i, 3) for i in range(19)]
    ranks = [batches_of(LengthGroupedBatches, sizes, 4, 1, rank, 2) for rank in (0, 1)]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[4, 4, 1], [4, 4, 2]]
    alone = batches_of(LengthGroupedBatches, sizes, 8, 1)
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone  # 2 x 4 and 1 x 8 take the same steps
    few = [batches_of(LengthGroupedBatches, sizes[:9], 2, 1, rank, 4) for rank in range(4)]
    assert [len(batches) for batches in few] == [2] * 4
    assert len({batches[1][0] for batches in few}) == 1  # one sample is left: every rank has it


def test_token_budget_batches_are_complete_small_and_shared():
    draw = torch.Generator().manual_seed(1)
    sizes = [torch.randint(5, 200, (2,), generator=draw).tolist() for _ in range(301)]
    first = batches_of(TokenBudgetBatches, sizes, 1000, 42)
    assert sorted(i for batch in first for i in batch) == list(range(301))
    for batch in first:
        assert len(batch) * sum(max(sizes[i][part] for i in batch) for part in (0, 1)) <= 1000
    assert len(first) < 120  # 301 samples in batches of five or so, not one by one
    assert {len(batch) for batch in batches_of(TokenBudgetBatches, [(8, 8)] * 40, 160, 42)} == {10}  # just the budget
    other = batches_of(TokenBudgetBatches, sizes, 1000, 42, epoch=1)
    assert len(other) == len(first) and sets(other) != sets(first)  # not the order alone
    assert first != batches_of(TokenBudgetBatches, sizes, 1000, 43)
    ranks = [batches_of(TokenBudgetBatches, sizes, 1000, 42, rank, world=2) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(301))
    with pytest.raises(UserError, match="too few"):
        TokenBudgetBatches(sizes[:1], 1000, 42, 0, world=2)


@pytest.fixture(scope="module")
def train_data(root, t5_tokenizer):
    args = script.parse_args(["--data_root", str(root), "--img_type", "vit", "--prompt_format", "QCM-E"])
    data = load_data(args, {"train": "train"})
    return RationaleDataset(data.problems, data.qids["train"], t5_tokenizer, args), data.features


def test_batches_of_stored_runs_stay():
    """A checkpoint continues in the middle of an epoch: these are the batches of commit 12494b9."""
    sizes = [(5 + 7 * i % 23, 3 + 5 * i % 11) for i in range(21)]
    grouped = [LengthGroupedBatches(sizes, 3, 42, rank, world=2) for rank in (0, 1)]
    tokens = TokenBudgetBatches(sizes, 130, 42)
    ranks = [TokenBudgetBatches(sizes, 130, 42, rank, world=4) for rank in range(4)]
    for batches in (*grouped, tokens, *ranks):
        batches.epoch = 2
    assert [list(batches) for batches in grouped] == [
        [[0, 10, 20], [14, 1, 11], [15, 2, 12], [16]],
        [[7, 17, 4], [8, 18, 5], [9, 19, 6], [3, 13]],
    ]
    assert list(tokens) == [[7, 20, 0, 1, 18], [15, 13], [14, 11, 9, 12], [10, 4, 8, 17], [6, 19, 2], [5, 3, 16]]
    assert [list(batches) for batches in ranks] == [
        [[7, 20], [5, 3, 16]],
        [[0, 1, 18], [10, 4, 8, 17]],
        [[14, 11], [6, 19, 2]],
        [[9, 12], [15, 13]],
    ]
    assert prediction_batches(sizes[:7], 3, done={1}) == [[3, 6, 2], [5, 4, 0]]


def test_batches_are_the_same_with_any_workers(train_data):
    """What a worker makes of the seeded order is what the process itself makes of it."""
    dataset, features = train_data
    order, collate = LengthGroupedBatches(lengths(dataset), 4, seed=3), Collator(0, features, with_qids=True)

    def loaded(workers):
        return list(torch.utils.data.DataLoader(dataset, batch_sampler=order, collate_fn=collate, num_workers=workers))

    alone = loaded(0)
    assert len({qid for batch in alone for qid in batch["qids"]}) == 24
    for batch, other in zip(alone, loaded(2), strict=True):
        assert batch["qids"] == other["qids"]
        assert all(torch.equal(batch[name], other[name]) for name in ("input_ids", "labels", "image_ids"))


@pytest.mark.parametrize("kind", ["vit", "absent", "resnet"])
def test_a_batch_is_pinned_as_far_as_torch_can(kind, monkeypatch):
    """An expanded view ends the run when it is pinned - on a GPU only; here torch's refusal without one."""
    from torch.utils.data._utils.pin_memory import pin_memory

    if not batches_pin_themselves():
        pytest.skip("this torch does not ask a batch; SFT's loader does not pin then")

    def pinned(tensor, *device):
        done.append(tensor.shape)
        return torch.empty_strided(tensor.shape, tensor.stride()).copy_(tensor)  # as torch does it

    done, image = [], torch.randn(3, 5, 8)
    views = {"vit": image, "absent": torch.zeros(1, 1, 1).expand(3, 5, 8), "resnet": image[:, :1].expand(3, 5, 8)}
    features = SimpleNamespace(gather=lambda qids: views[kind])
    items = [{"qid": str(i), "input_ids": [5] * (i + 1), "labels": [6]} for i in range(3)]
    batch = Collator(0, features, with_qids=True)(items)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    if kind != "vit":
        with pytest.raises(RuntimeError, match="single memory location"):
            pin_memory(dict(batch))
        done.clear()
    there = pin_memory(batch)
    assert len(done) == 3 + (kind == "vit") and list(there) == list(batch) and there["qids"] == ["0", "1", "2"]
    assert all(torch.equal(there[name], batch[name]) for name in there if name != "qids")


# -- predictions -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predictor_parts(root, t5_tokenizer, tmp_path_factory):
    argv = ["--data_root", str(root), "--img_type", "vit", "--output_len", "12", "--eval_bs", "3", "--use_generate"]
    args = script.parse_args([*argv, "--prompt_format", "QCM-LEA", "--input_len", "80"])
    data = load_data(args, {"train": "train", "val": "val", "test": "test"})
    folder = make_model(tmp_path_factory.mktemp("m"), patch_size=data.patch_size)
    model = T5ForMultimodalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():  # so that outputs depend on the prompt, not on the start token alone
        model.lm_head.weight.mul_(40)
    collator = Collator(t5_tokenizer.pad_token_id, data.features)
    datasets = {name: RationaleDataset(data.problems, data.qids[name], t5_tokenizer, args) for name in data.qids}
    return SimpleNamespace(
        args=args, data=data, model=model, collator=collator, datasets=datasets, tokenizer=t5_tokenizer
    )


def make_predictor(parts, **changes):
    args = SimpleNamespace(**{**vars(parts.args), **changes})
    return Predictor(args, parts.data.problems, parts.tokenizer, parts.collator, torch.device("cpu"))


def test_batches_give_what_one_row_at_a_time_gives(predictor_parts):
    """Generated texts, and the argmax of teacher-forced logits."""
    parts, dataset = predictor_parts, predictor_parts.datasets["test"]
    rows = make_predictor(parts, eval_acc=2).predict(parts.model, dataset, "test")
    assert len({tuple(row) for row in rows}) > len(rows) // 2  # the outputs differ, so their order is tested
    for i, row in enumerate(rows):
        inputs = parts.collator([dataset[i]])
        inputs.pop("labels")
        ids = parts.model.generate(**inputs, max_length=12, do_sample=False)[0, 1:].tolist()
        while ids and ids[-1] == 0:
            ids.pop()
        assert row == ids and len(row) <= 11
    args = SimpleNamespace(**{**vars(parts.args), "output_len": 300})
    dataset = RationaleDataset(parts.data.problems, parts.data.qids["test"], parts.tokenizer, args)
    assert len({len(ids) for ids in dataset.labels}) > 5  # batches have pads, which are no predictions
    rows = make_predictor(parts, use_generate=False).predict(parts.model, dataset, "test")
    for i, row in enumerate(rows):
        with torch.no_grad():
            wanted = parts.model(**parts.collator([dataset[i]])).logits[0].argmax(-1).tolist()
        assert len(wanted) == len(dataset[i]["labels"]) and row == wanted


def test_an_interrupted_split_is_continued_with_the_rows_it_has(predictor_parts, tmp_path):
    parts, dataset = predictor_parts, predictor_parts.datasets["train"]
    predictor, model = make_predictor(parts), parts.model
    whole = predictor.predict(model, dataset, "whole")
    encoded = []

    def stop_after(calls):
        def hook(module, args, kwargs):
            encoded.append(len(kwargs["input_ids"]))
            if len(encoded) > calls:
                raise KeyboardInterrupt

        return model.encoder.register_forward_pre_hook(hook, with_kwargs=True)

    (tmp_path / "rows_7_1.jsonl").write_text("[0, [5, 6]]\n[1, [7")  # of another process; the kill cut a line
    with stop_after(3), pytest.raises(KeyboardInterrupt):
        predictor.predict(model, dataset, "killed", tmp_path)
    kept = sum(len(file.read_text().splitlines()) for file in tmp_path.glob("rows_0_*.jsonl"))
    assert kept == 9
    encoded.clear()
    with stop_after(99):
        rows = predictor.predict(model, dataset, "again", tmp_path)
    assert sum(encoded) == len(dataset) - kept - 1  # nothing twice
    assert rows == [[5, 6], *whole[1:]]


def test_rows_are_kept_for_the_same_settings_only(tmp_path):
    rows = tmp_path / "store/rows_0_1.jsonl"
    for settings, overwrite, kept in (
        ({"seed": 1}, False, False),
        ({"seed": 1}, False, True),
        ({"seed": 1}, True, False),
        ({"seed": 2}, False, False),
    ):
        _open_store(rows.parent, settings, overwrite)
        assert rows.exists() == kept
        rows.write_text("[0, [5, 6]]\n")


def test_prediction_files(predictor_parts, tmp_path, capsys, monkeypatch):
    parts, loads, predicted = predictor_parts, [], []
    predictor = make_predictor(parts)
    write(tmp_path / "adapter_config.json", {"any": "weights"})

    def load():
        loads.append(1)
        return parts.model

    splits = {"test": parts.datasets["test"], "val": parts.datasets["test"], "train": parts.datasets["train"]}
    real = predictor.predict
    monkeypatch.setattr(predictor, "predict", lambda *args: predicted.append(args[2]) or real(*args))
    predictor.write(tmp_path, splits, load, [tmp_path])
    assert predicted == ["predict test", "predict train"]  # val is the same rows here: not generated twice
    test = predictions(tmp_path)
    wanted = {"num_fail", "scores", "preds", "labels", "qids", "prompts", "answers", "settings"}
    assert set(test) == wanted and set(predictions(tmp_path, "eval")) == wanted - {"num_fail", "scores"}
    assert test["qids"] == parts.data.qids["test"] and len(test["preds"]) == len(test["qids"]) == len(test["answers"])
    assert test["num_fail"] == test["answers"].count(None) == 8
    assert "8 of 8 answers could not be read" in capsys.readouterr().err
    flags = {name: getattr(parts.args, name) for name in ("img_type", "prompt_format", "output_len", "seed")}
    assert flags.items() <= test["settings"].items() and test["settings"]["use_generate"] is True
    assert {"acc_average"} <= set(test["scores"]["answer"]) and {"bleu1", "rouge"} <= set(test["scores"]["rationale"])
    assert predictions(tmp_path, "eval")["preds"] == test["preds"]
    assert not list(tmp_path.glob(".predicting*"))

    capsys.readouterr()
    for name in ("test", "eval"):  # earlier versions recorded no digests of tokenizer and features
        old = predictions(tmp_path, name)
        del old["settings"]["tokenizer"], old["settings"]["features"]
        write(tmp_path / f"predictions_ans_{name}.json", old)
    predictor.write(tmp_path, splits, load, [tmp_path])
    assert len(loads) == 1 and capsys.readouterr().out.count("already there") == 3
    made = predictions(tmp_path, "train")
    for key, value in {"tokenizer": "t", "features": "f", "seed": 7, "data": "d"}.items():
        write(tmp_path / "predictions_ans_train.json", {**made, "settings": {**made["settings"], key: value}})
        assert not _made_with(tmp_path / "predictions_ans_train.json", made["settings"]), key
    make_predictor(parts, output_len=9).write(tmp_path, {"val": splits["val"]}, load, [tmp_path])
    write(tmp_path / "adapter_config.json", {"other": "weights"})
    predictor.write(tmp_path, {"val": splits["val"]}, load, [tmp_path])
    assert len(loads) == 3


def test_predictions_depend_on_the_features_wherever_the_first_image_stands(predictor_parts):
    """Half of ScienceQA has no image: features made by another network must not pass for the same."""
    parts, features = predictor_parts, predictor_parts.data.features
    pictured = [qid for qid in parts.data.qids["train"] if qid in features.name_map]
    bare = [qid for role in parts.data.qids.values() for qid in role if qid not in features.name_map][:9]
    assert len(bare) == 9
    dataset = RationaleDataset(parts.data.problems, [*bare, pictured[0]], parts.tokenizer, parts.args)
    other = copy.copy(features)
    other.name_map = {qid: (row + 1) % features.rows for qid, row in features.name_map.items()}
    changed = SimpleNamespace(**{**vars(parts), "collator": Collator(0, other)})
    one, two = (make_predictor(each).settings(dataset, "") for each in (parts, changed))
    assert one["data"] != two["data"]


def test_metric_of_an_epoch(predictor_parts, monkeypatch):
    """Accuracy of the letters that were read for A (none read is wrong), ROUGE-L against the targets otherwise."""
    parts, dataset = predictor_parts, predictor_parts.datasets["test"]
    gold = ["ABCDE"[parts.data.problems[qid]["answer"]] for qid in dataset.qids]
    texts = [f"The answer is ({letter})." for letter in gold[:6]] + ["no idea", "The answer is (E)."]
    assert len(texts) == len(gold) == 8 and gold[7] != "E"
    for prompt_format, rows, expected in (
        ("QCM-A", parts.tokenizer(texts)["input_ids"], {"accuracy": 75.0}),
        ("QCM-LEA", dataset.labels, {"rougeL": pytest.approx(100)}),
        ("QCM-LEA", dataset.labels[:4] + [[1]] * 4, {"rougeL": pytest.approx(50)}),
    ):
        predictor = make_predictor(parts, prompt_format=prompt_format)
        monkeypatch.setattr(predictor, "predict", lambda model, dataset, desc, rows=rows: rows)
        assert predictor.evaluate(parts.model, dataset) == expected


def test_digests_see_every_part(tmp_path):
    from sft.predict import digest, tokenizer_digest, weights_digest

    item = {"qid": "1", "input_ids": [5, 6, 1], "labels": [7, 1]}
    changes = [{}, {"qid": "2"}, {"input_ids": [5, 1]}, {"labels": [8, 1]}, {"input_ids": [5, 6], "labels": [1, 7, 1]}]
    made = [digest([{**item, **change}]) for change in changes]
    assert len(set(made)) == len(made) and digest([item, item]) != digest([item]) == made[0]

    pieces = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1}, pad_token_id=0, eos_token_id=1)
    others = ({"pad_token_id": 1}, {"eos_token_id": 0}, {"get_vocab": lambda: {"a": 1, "b": 0}})
    made = [tokenizer_digest(SimpleNamespace(**{**vars(pieces), **change})) for change in ({}, *others)]
    assert len(set(made)) == 4

    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = weights_digest([tmp_path])
    (tmp_path / "adapter_config.json").write_text("{}")
    second = weights_digest([tmp_path])
    (tmp_path / "notes.txt").write_text("not a weight")
    assert first != second == weights_digest([tmp_path])
    assert weights_digest(["hub/a"]) != weights_digest(["hub/b"])


def test_failed_answers_and_formats_without_one(predictor_parts):
    parts = predictor_parts
    qids = parts.data.qids["test"]
    gold = ["ABCDE"[parts.data.problems[qid]["answer"]] for qid in qids]
    preds = [f"Because. The answer is ({letter})." for letter in gold]
    predictor = make_predictor(parts)
    made = predictor.scores(qids, preds, preds)
    assert made["num_fail"] == 0 and made["scores"]["answer"]["acc_average"] == "100.00"
    broken = ["The answer is (E).", "no idea", *preds[2:]]
    assert len(parts.data.problems[qids[0]]["choices"]) < 5
    assert predictor.letters(qids, broken) == [None, None, *gold[2:]]
    first, second = predictor.scores(qids, broken, preds), predictor.scores(qids, broken, preds)
    assert first == second and first["num_fail"] == 2
    for seed in range(4):  # the choices at random are those of --seed
        drawn = [resolve_answer("", len(parts.data.problems[qid]["choices"]), qid, seed)[0] for qid in qids]
        right = sum("ABCDE"[index] == letter for index, letter in zip(drawn, gold, strict=True))
        made = make_predictor(parts, seed=seed).scores(qids, ["no idea"] * len(qids), preds)
        assert made["scores"]["answer"]["acc_average"] == f"{100 * right / len(qids):.2f}"
    for prompt_format, kind in (("QCM-E", "rationale"), ("QCM-A", "answer")):
        made = make_predictor(parts, prompt_format=prompt_format).scores(qids, preds, preds)
        assert set(made["scores"]) == {kind} and (made["num_fail"] is None) == (kind == "rationale")
    # decoding drops blanks before punctuation, as transformers 4 did for the released files, and special tokens
    ids = parts.tokenizer("Ice , at 0 . It melts .")["input_ids"]
    assert predictor.decode([[0, *ids, 0]]) == ["Ice, at 0. It melts."]


# -- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["FSDP true", "FSDP True", "FSDP 1", "DEEPSPEED true", "MEGATRON_LM true"])
@pytest.mark.parametrize("what", [[], ["--evaluate_dir", "DIR"]], ids=["train", "evaluate"])
def test_a_launcher_that_splits_the_model_is_refused(asked, what, tmp_path, monkeypatch):
    """Before data is read: training would run for hours, and then crash where it generates."""
    name, value = asked.split()
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", value)
    argv = ["--data_root", f"{tmp_path}/nowhere", "--model", str(tmp_path)]
    argv += [str(tmp_path) if word == "DIR" else word for word in what]
    for module in (script, run_mm_cot_lora):
        with pytest.raises(UserError, match=f"(?i)asks for {name}.*configs/ddp.yaml"):
            module.main(argv)
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "false")
        with pytest.raises(UserError, match="nowhere|adapter_config"):
            module.main(argv)
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", value)


@pytest.mark.parametrize(("free", "flags", "workers"), [(4e9, "", 2), (64e6, "", 0), (64e6, "--workers 3", 3)])
def test_worker_processes_need_shared_memory(free, flags, workers, tmp_path, monkeypatch):
    """Beside a GPU two, but none in a container with Docker's 64 MB, unless they are asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(trainer, "Seq2SeqTrainingArguments", lambda **how: SimpleNamespace(n_gpu=1, **how))
    args = script.parse_args(f"--precision fp32 {flags}".split())
    assert trainer.set_up(args, tmp_path, examples=24).dataloader_num_workers == workers


def test_the_recipe_is_the_released_one(tmp_path):
    """The defaults of transformers' Trainer: AdamW with weight decay, linear decay from the first step, clip 1."""
    args = script.parse_args("--bs 4 --lr 8e-5 --epoch 3 --seed 7 --precision fp32".split())
    made = trainer.set_up(args, tmp_path, examples=1000)
    assert (made.learning_rate, made.num_train_epochs, made.seed, made.per_device_train_batch_size) == (8e-5, 3, 7, 4)
    assert (made.weight_decay, made.max_grad_norm, made.warmup_steps) == (0.01, 1.0, 0)
    assert (made.adam_beta1, made.adam_beta2, made.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert made.lr_scheduler_type == "linear" and made.logging_steps == 50 and not made.logging_nan_inf_filter
    assert (made.metric_for_best_model, made.greater_is_better, made.eval_strategy) == ("accuracy", True, "epoch")
    args = script.parse_args("--bs 4 --prompt_format QCM-LE --final_eval --precision fp32".split())
    assert trainer.set_up(args, tmp_path, examples=24).logging_steps == 3
    assert trainer.set_up(args, tmp_path, examples=1).eval_strategy == "no"
    args.final_eval = False
    assert trainer.set_up(args, tmp_path, examples=24).metric_for_best_model == "rougeL"

    def build():
        raise UserError(f"seed {torch.initial_seed()}")

    torch.manual_seed(1)  # a fresh adapter draws from the global random state
    with pytest.raises(UserError, match="seed 7"):
        trainer.train(SimpleNamespace(seed=7), SimpleNamespace(output_dir=tmp_path), build, {}, None, None)
    two, four, six = found = [Path(f"run/checkpoint-{step}") for step in (2, 4, 6)]
    assert trainer.kept_checkpoints(found, six, None) == {four, six}
    assert trainer.kept_checkpoints(found, six, best_step=2) == {two, six}
    assert trainer.kept_checkpoints(found, six, best_step=6) == {four, six}


def test_saves_within_an_epoch_follow_the_clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: clock.now)
    batches, ctrl_c = SimpleNamespace(steps=4), SimpleNamespace(pressed=False)

    def saves(minutes):
        clock.now, args, saved = 100.0, SimpleNamespace(world_size=1), []
        run = trainer.RunControl(batches, minutes, ctrl_c)
        run.on_train_begin(args, None, None)
        for step, now in ((1, 129), (2, 131), (3, 140), (4, 200), (5, 201), (6, 260), (7, 270), (8, 400)):
            clock.now, control = now, SimpleNamespace(should_save=False, should_training_stop=False)
            run.on_step_end(args, SimpleNamespace(global_step=step, max_steps=8), control)
            if control.should_save:
                saved.append((step, control.should_training_stop))
                run.on_save(args, None, control)
        run.on_epoch_begin(args, SimpleNamespace(global_step=5), None)
        assert batches.epoch == 1
        return saved

    assert saves(0.5) == [(2, False), (5, False), (6, False)]  # the ends of epochs, 4 and 8, are saved anyway
    assert saves(0) == []
    ctrl_c.pressed = True
    assert saves(0) == [(step, True) for step in range(1, 8)]


def test_train_from_a_plain_t5_then_evaluate_and_resume(trained, plain, tmp_path, capsys):
    run = shutil.copytree(trained.folder, tmp_path / "run")
    argv = [*trained.argv, "--run_dir", str(run)]
    assert "eval_rougeL" in trained.out and "best rougeL" in trained.out
    files = {path.name for path in run.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "args.yaml"} <= files
    assert {"trainer_state.json", "metrics.json"} <= files
    assert {f"predictions_ans_{split}.json" for split in ("test", "eval", "train")} <= files
    assert not [name for name in files if name.startswith(".")] and "training_args.bin" not in files
    assert [path.stat().st_mode & 0o777 for path in trained.folder.glob("*.safetensors")] == [0o644]
    assert "prepend_scheme" not in (run / "tokenizer.json").read_text()  # in the form that tokenizers 0.13 reads
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 18 and metrics["last_loss"] < metrics["first_loss"] < 11
    assert [entry["step"] for entry in metrics["evaluations"]] == [6, 12, 18] and metrics["epochs"] == 3
    assert metrics["best_metric"] == max(entry["eval_rougeL"] for entry in metrics["evaluations"])
    kept = {metrics["best_step"], 18} if metrics["best_step"] < 18 else {12, 18}
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in kept}
    # the folder loads alone, with its image layers; what was best was saved; every parameter moved
    model = T5ForMultimodalGeneration.from_pretrained(run)
    assert tuple(model.config.patch_size) == (5, 8) and model.config.use_cache
    best = load_file(run / f"checkpoint-{metrics['best_step']}" / "model.safetensors")
    weights = load_file(run / "model.safetensors")
    assert all(torch.equal(best[name], weights[name]) for name in weights)
    start = T5ForMultimodalGeneration.from_pretrained(plain, patch_size=(5, 8), seed=42).state_dict()
    assert weights.keys() <= start.keys()
    assert [name for name in weights if torch.equal(start[name], weights[name])] == []

    # the same command: nothing is done again. A kill before metrics.json: training is closed from its checkpoint
    made = {path.name: path.stat().st_mtime_ns for path in run.glob("predictions*.json")}
    (run / "metrics.json").unlink()
    (run / "model.safetensors").unlink()
    script.main(argv)
    assert "resuming from checkpoint-18" in capsys.readouterr().out
    again = load_file(run / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert made == {path.name: path.stat().st_mtime_ns for path in run.glob("predictions*.json")}

    # --evaluate_dir on our own folder: its tokenizer, its image size; a changed flag of the run is refused
    first = predictions(run)
    (run / "predictions_ans_test.json").unlink()
    script.main([*trained.argv, "--evaluate_dir", str(run), "--tokenizer", str(run)])
    assert predictions(run)["preds"] == first["preds"] and predictions(run)["prompts"] == first["prompts"]
    with pytest.raises(UserError, match=r"--lr 0.1 \(was 0.003\)"):
        script.main([*argv, "--lr", "0.1"])
    with pytest.raises(UserError, match="--run_dir"):
        script.main([*trained.argv, "--run_dir", str(plain)])


def test_answer_format_final_eval_and_overwrite(flags, root, tmp_path, capsys):
    argv = [*flags, "--final_eval", "--use_generate", "--output_dir", str(tmp_path), "--user_msg", "m"]
    argv += ["--train_split", "minitrain", "--epoch", "1"]
    script.main(argv)
    name = script.run_name(script.parse_args(argv))
    run = tmp_path / name
    assert sorted(path.name for path in run.glob("predictions*")) == ["predictions_ans_test.json"]
    data = predictions(run)
    assert data["num_fail"] <= 8 and set(data["scores"]) == {"answer"}
    assert data["qids"] == json.loads((root / "scienceqa/pid_splits.json").read_text())["test"]
    assert "eval_accuracy" not in (run / "trainer_state.json").read_text()
    with pytest.raises(UserError, match="--train_split train"):
        script.main([*argv, "--train_split", "train"])
    script.main([*argv, "--train_split", "train", "--overwrite"])
    assert json.loads((run / "metrics.json").read_text())["steps"] == 6


@pytest.mark.parametrize("name", ["vit", "vit_tied"])
def test_released_checkpoint_is_evaluated(name, fixtures, sample, t5_tokenizer_dir, tmp_path):
    """A pytorch_model.bin with no image fields in its config and no tokenizer; features of the true shape."""
    root = make_data(tmp_path / "data", sample, train=4, val=2, test=4, shape=(145, 1024))
    model = tmp_path / "model"
    model.mkdir()
    for file in ("config.json", "pytorch_model.bin", "generation_config.json"):
        (model / file).symlink_to(fixtures / "model" / name / file)
    argv = ["--data_root", str(root), "--img_type", "vit", "--tokenizer", str(t5_tokenizer_dir), "--output_len", "12"]
    script.main([*argv, "--prompt_format", "QCM-LE", "--use_generate", "--evaluate_dir", str(model)])
    assert len(predictions(model, "train")["preds"]) == 4 and len(predictions(model)["preds"]) == 4


def test_two_processes_train_like_one(flags, root, tmp_path):
    """2 x 4 and 1 x 8, without dropout: the same batches, losses over all real targets, so the same weights. The last
    step of an epoch has 4 samples, none of them twice."""
    argv = [*flags, "--train_split", "minitrain", "--final_eval", "--use_generate"]
    argv += ["--model", str(make_model(tmp_path / "m", dropout=0.0))]
    done = run_script("main.py", *argv, "--bs", "4", "--run_dir", tmp_path / "two", nproc=2)
    assert "error" not in done.stderr
    script.main([*argv, "--bs", "8", "--run_dir", str(tmp_path / "one")])
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in one.items():
        # Adam divides by the gradient's size: rounding in the sum over ranks shows where the gradient is near 0
        assert torch.allclose(tensor, two[name], atol=2e-4, rtol=0), (name, (tensor - two[name]).abs().max())
    assert (one["shared.weight"] - start["shared.weight"]).abs().max() > 3e-3
    ours, theirs = predictions(tmp_path / "one"), predictions(tmp_path / "two")
    for key in ("qids", "prompts", "labels"):
        assert ours[key] == theirs[key]
    same = [a == b for a, b in zip(ours["preds"], theirs["preds"], strict=True)]
    assert sum(same) >= len(same) - 1
    assert "processes: 2" in (tmp_path / "two/args.yaml").read_text()


def test_two_processes_with_a_token_budget_bf16_and_workers(flags, tmp_path):
    """The flags of speed together: training still learns, in a few steps of many samples, and keeps fp32 weights."""
    at, run = flags.index("--bs"), tmp_path / "run"
    argv = [*flags[:at], *flags[at + 2 :], *"--max_tokens 400 --final_eval --epoch 1".split()]
    done = run_script("main.py", *argv, *"--precision bf16 --workers 1 --run_dir".split(), run, nproc=2)
    assert "error" not in done.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["last_loss"] < metrics["first_loss"] and 2 <= metrics["steps"] <= 6  # 24 samples, 5 or so a batch
    assert {tensor.dtype for tensor in load_file(run / "model.safetensors").values()} == {torch.float32}
    assert predictions(run)["settings"]["precision"] == "bf16"


def kill_after(command: list, folder: Path, checkpoint: int, timeout: float = 300) -> str:
    """Start `command`, SIGKILL it once a checkpoint of at least this step is whole; returns the newest one's name."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, **quiet)
    deadline = time.monotonic() + timeout
    whole: list[int] = []
    while process.poll() is None and time.monotonic() < deadline:
        whole = [int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/complete")]
        if whole and max(whole) >= checkpoint:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return f"checkpoint-{max(int(path.parent.name.split('-')[1]) for path in folder.glob('*/complete'))}"
        time.sleep(0.01)
    process.kill()
    pytest.fail(f"ended with {process.wait()} before it could be killed; checkpoints {whole}")


def test_killed_training_ends_with_the_same_weights(trained, tmp_path):
    """SIGKILL in the middle of the second of three epochs, dropout on: bit for bit the undisturbed run."""
    run = tmp_path / "killed"
    command = ["main.py", *trained.argv, "--run_dir", run, "--save_minutes", "0.00001"]
    last = kill_after(command, run, checkpoint=8)
    assert 8 <= int(last.split("-")[1]) < 18 and not (run / "metrics.json").exists()
    (run / "checkpoint-17").mkdir(exist_ok=True)  # a save that a kill cut short: no marker
    (run / "checkpoint-17" / "trainer_state.json").write_text("{")
    done = run_script(*command)
    assert f"resuming from {last}" in done.stdout, done.stdout[-2000:]
    killed, whole = (load_file(folder / "model.safetensors") for folder in (run, trained.folder))
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (run, trained.folder)]
    assert states[0]["best_metric"] == states[1]["best_metric"]
    assert states[0]["best_global_step"] == states[1]["best_global_step"]
    assert predictions(run)["preds"] == predictions(trained.folder)["preds"]


# -- bad input, before a model is loaded -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("--eval_le {short} --prompt_format QCMG-A", ["--eval_le", "2", "6"]),
        ("--evaluate_dir {plain}", ["--evaluate_dir", "image layers"]),
        ("--lr 1e30 --final_eval --run_dir r", ["--lr: the loss is"]),  # not a number: it stops the run
    ],
)
def test_bad_input(extra, words, flags, plain, tmp_path, monkeypatch):
    """Faults that every training script refuses: tests/test_bad_input.py."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "short.json", {"preds": ["a", "b"]})
    with pytest.raises(UserError) as error:
        script.main([*flags, *extra.format(short="short.json", plain=plain).split()])
    assert all(word in str(error.value) for word in words)
