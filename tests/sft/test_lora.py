"""run_mm_cot_lora.py: targets, tied embeddings, resume, released adapters, refusals."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import main
import run_mm_cot_lora as script
from ares.checkpoints import ADAPTER_KEYS
from ares.cli import UserError
from model import T5ForMultimodalGeneration
from sft import lora
from sft.predict import weights_digest
from tests.conftest import ROOT
from tests.tiny import make_data, make_model, predictions, write


@pytest.fixture(scope="module")
def root(tmp_path_factory, sample):
    return make_data(tmp_path_factory.mktemp("data"), sample, train=16)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, root, t5_tokenizer):
    """A fine-tuned model's folder: image layers, tokenizer, predictions of every split."""
    folder = make_model(tmp_path_factory.mktemp("models") / "tuned", patch_size=(5, 8))
    t5_tokenizer.save_pretrained(folder)
    splits = json.loads((root / "scienceqa/pid_splits.json").read_text())
    for name, split in (("eval", "val"), ("test", "test"), ("train", "train")):
        preds = [f"Solution: rationale number {qid}." for qid in splits[split]]
        write(folder / f"predictions_ans_{name}.json", {"preds": preds, "labels": preds, "qids": splits[split]})
    return folder


@pytest.fixture
def flags(root, tuned):
    return [
        *("--data_root", str(root), "--img_type", "vit", "--model", str(tuned), "--use_generate", "--epoch", "2"),
        *("--bs", "8", "--eval_bs", "4", "--lr", "0.01", "--input_len", "64", "--output_len", "12", "--lora_r", "4"),
        *("--correction", "False"),
    ]


def base(folder: Path) -> T5ForMultimodalGeneration:
    return T5ForMultimodalGeneration.from_pretrained(folder).eval()


def adapted_modules(model) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}


def batch(text_length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 32000, (2, text_length), generator=generator)
    image_ids = torch.randn(2, 5, 8, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_ids": image_ids, "labels": ids}


def test_folder_name_is_the_released_one(tuned, monkeypatch):
    argv = f"--model {tuned} --bs 16 --epoch 20 --lr 8e-5 --output_len 64 --lora_r 64 --lora_alpha 128".split()
    assert script.run_name(script.parse_args(argv)) == "mm_cot_lora_r64_a128_d0.05_s42_lr8e-05_bs16_e20_len64"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "_bs64_" in script.run_name(script.parse_args(argv))


def test_targets_are_every_linear_but_the_one_without_effect(tuned, tmp_path, capsys):
    args = script.parse_args(
        ["--model", str(tuned), "--lora_alpha", "7", "--lora_dropout", "0.2", "--lora_bias", "all"]
    )
    model = base(tuned)
    linears = {n.rpartition(".")[2] for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    adapted = script.add_adapter(model, args)
    assert adapted_modules(adapted) == linears - {"out_proj"} >= {"image_dense", "gate_dense", "lm_head", "wi_1"}
    trains = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trains and all("lora_" in name or name.endswith("bias") for name in trains)
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (32, 7, 0.2, "all")
    adapted(**batch()).loss.backward()
    # B starts at 0, so at first only B has a gradient: each of them, which out_proj's would not
    assert all(p.grad.abs().max() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)

    tied = base(make_model(tmp_path / "tied", tied=True, patch_size=(5, 8)))
    adapted = script.add_adapter(tied, args)
    assert {"wi", "wo", "q"} <= adapted_modules(adapted) and "lm_head" not in adapted_modules(adapted)
    assert "tied" in capsys.readouterr().out
    merged = adapted.merge_and_unload()
    assert merged.lm_head.weight is merged.shared.weight


def test_train_resume_and_evaluate(flags, tuned, capsys):
    before = load_file(tuned / "model.safetensors")
    argv = [*flags, "--prompt_format", "QCMG-A"]
    for flag, name in (("--train_le", "train"), ("--eval_le", "eval"), ("--test_le", "test")):
        argv += [flag, str(tuned / f"predictions_ans_{name}.json")]
    script.main(argv)
    out = capsys.readouterr().out
    assert "eval_accuracy" in out and "best accuracy" in out and "does not contain the rationale" not in out
    folder = tuned / "mm_cot_lora_r4_a64_d0.05_s42_lr0.01_bs8_e2_len12_QCMG-A"
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "args.yaml", "trainer_state.json"} <= files
    assert {"metrics.json", "tokenizer.json"} <= files and "model.safetensors" not in files
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM" and config["r"] == 4 and "out_proj" not in config["target_modules"]
    assert (config["lora_alpha"], config["lora_dropout"], config["bias"]) == (64, 0.05, "none")
    weights = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)  # no copy of lm_head
    assert all(tensor.abs().max() > 0 for tensor in weights.values())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 4 and metrics["last_loss"] < metrics["first_loss"]
    after = load_file(tuned / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    made = predictions(folder)
    assert sorted(path.name for path in folder.glob("predictions*")) == ["predictions_ans_test.json"]
    assert made["settings"]["weights"] == weights_digest([folder, tuned])  # of the adapter and of what it adapts
    assert all(f"rationale number {qid}." in prompt for qid, prompt in zip(made["qids"], made["prompts"], strict=True))

    # the state that a kill in the second epoch leaves: training is resumed, to the same bits
    for name in ("metrics.json", "adapter_model.safetensors", "predictions_ans_test.json"):
        (folder / name).unlink()
    (folder / "checkpoint-4" / "complete").unlink()
    script.main(argv)
    assert "resuming from checkpoint-2" in capsys.readouterr().out
    again = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert predictions(folder)["preds"] == made["preds"]

    # --evaluate_dir: a copy of the adapter folder elsewhere, its own settings
    moved = tuned.parent / "adapter"
    shutil.copytree(folder, moved)
    (moved / "predictions_ans_test.json").unlink()
    script.main([*argv, "--lora_r", "99", "--evaluate_dir", str(moved)])
    assert "no effect under --evaluate_dir" in capsys.readouterr().out
    assert predictions(moved)["preds"] == made["preds"]


def test_plain_qcm_a_says_that_the_rationale_is_not_read(flags, tuned, tmp_path, capsys):
    le = ["--eval_le", str(tuned / "predictions_ans_eval.json"), "--test_le", str(tuned / "predictions_ans_test.json")]
    script.main([*flags, *le, "--epoch", "1", "--final_eval", "--run_dir", str(tmp_path / "a")])
    out = capsys.readouterr().out
    assert out.count("QCMG-A") == 1 and "--eval_le" in out
    assert not any("rationale number" in prompt for prompt in predictions(tmp_path / "a")["prompts"])


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_released_adapter_loads(form, tuned, flags, tmp_path, capsys):
    """As the released code saved them: CAUSAL_LM, out_proj among the targets, lm_head's weights saved along."""
    folder = tmp_path / "released"
    targets = ["q", "v", "wi_0", "wo", "image_dense", "gate_dense", "out_proj", "lm_head"]
    adapted = peft.get_peft_model(base(tuned), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=3, target_modules=targets))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(folder, save_embedding_layers=True)
    if form == "bin":
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    write(folder / "adapter_config.json", {**config, "task_type": "CAUSAL_LM"})
    loaded = script.load_adapter(base(tuned), folder).eval()
    assert "out_proj" not in adapted_modules(loaded) and isinstance(loaded, peft.PeftModelForSeq2SeqLM)
    assert "no effect" in capsys.readouterr().out
    with torch.no_grad():
        wanted, plain = adapted.eval()(**batch()).logits, base(tuned)(**batch()).logits
        logits = loaded(**batch()).logits
        merged = loaded.merge_and_unload()(**batch()).logits
    assert torch.allclose(logits, wanted, atol=1e-5) and not torch.allclose(logits, plain, atol=1e-2)
    assert torch.allclose(logits, merged, atol=1e-5)
    if form == "bin":
        script.main([*flags, "--evaluate_dir", str(folder)])
        assert len(predictions(folder)["preds"]) == 8


def test_bad_input(flags, tuned, tmp_path):
    """Before a model is loaded."""
    write(tmp_path / "half/adapter_config.json", {"peft_type": "LORA"})
    write(tmp_path / "short.json", {"preds": ["x"]})
    half = tmp_path / "half"
    for extra, words in (
        ("--model hub/id", "--model --run_dir"),
        ("--lora_r 0 --lora_dropout 1 --correction_file c.json", "--lora_r --lora_dropout --corr"),
        (f"--evaluate_dir {tuned}", "--evaluate_dir adapter_config.json"),
        (f"--evaluate_dir {half}", "--evaluate_dir adapter_model"),
        (f"--run_dir {tuned}", "--run_dir --model"),
        (f"--model {half}", "--model adapter"),
        (f"--eval_le {tmp_path}/short.json", "--eval_le 1 6"),
        ("--img_type clip", "clip"),
    ):
        with pytest.raises(UserError) as error:
            script.main([*flags, *extra.split()])
        assert all(word in str(error.value) for word in words.split()), str(error.value)


def test_an_adapter_of_another_model_or_a_damaged_one_is_refused(tuned, tmp_path):
    other = base(make_model(tmp_path / "tied", tied=True, patch_size=(5, 8)))
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["wi", "q"])
    peft.get_peft_model(other, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="does not fit"):
        script.load_adapter(base(tuned), tmp_path / "adapter")
    (tmp_path / "adapter_model.bin").touch()
    for rank in (0, -1, 10_001, True, "4"):
        write(tmp_path / "adapter_config.json", {"r": rank})
        with pytest.raises(UserError, match=f"--lora: .*adapter_config.json: r is {rank!r}"):
            script.check_adapter(tmp_path, "--lora")
    write(tmp_path / "adapter_config.json", {"r": 10_000})
    script.check_adapter(tmp_path, "--lora")


def test_the_adapters_config_holds_no_key_that_peft_0_6_lacks(tuned, tmp_path):
    adapted = script.add_adapter(base(tuned), script.parse_args(["--model", str(tuned), "--lora_r", "2"]))
    adapted.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert set(config) <= ADAPTER_KEYS
    assert {"r", "peft_type", "task_type", "inference_mode", "lora_alpha"} <= set(config)
    # peft keeps a set, whose order changes from process to process; predictions are compared by this file
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) > 5
    loaded = peft.LoraConfig.from_pretrained(tmp_path / "plain").to_dict()
    assert set(loaded.pop("target_modules")) == set(config.pop("target_modules"))
    assert {key: loaded[key] for key in config} == config
    # a key that changes what the adapter does stays, known there or not
    adapted.peft_config["default"].use_rslora = True
    adapted.save_pretrained(tmp_path / "other")
    assert json.loads((tmp_path / "other/adapter_config.json").read_text())["use_rslora"] is True


def test_a_peft_that_was_not_tried_is_refused_before_training(tuned, tmp_path, monkeypatch, capsys):
    assert f"peft{lora.PEFT}" in (ROOT / "requirements.txt").read_text().splitlines()
    assert lora.peft_fault() is None
    real = importlib.metadata.version
    write(tmp_path / "adapter_config.json", {})
    for have in ("0.15.0", "0.18.1", "0.21.1", "0.22.0", None):

        def version(name, have=have):
            if name == "peft" and have is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return have if name == "peft" else real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        with pytest.raises(UserError, match="peft.*pip install 'peft"):
            script.parse_args(["--model", str(tuned)])
        with pytest.raises(UserError, match="--lora: peft"):
            lora.check_adapter(tmp_path, "--lora")
        with pytest.raises(UserError, match="nowhere"):  # RL and SFT do without: they warn, hours before it is needed
            main.main(f"--data_root {tmp_path}/nowhere --model {tuned} --run_dir {tmp_path}/r".split())
        assert "pip install 'peft" in capsys.readouterr().err
