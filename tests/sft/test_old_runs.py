"""Runs that commit 12494b9 began end under the present code as that commit would have ended them."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import main
import run_mm_cot_lora
from sft.predict import Predictor
from tests.tiny import predictions

# Runs the old scripts: undisturbed, and killed after a step (between two saves) or while a split is predicted.
DRIVER = """
import json, os, signal, sys
import main, run_mm_cot_lora, sft_trainer, utils_predict

def child(script, argv, cls=None, name=None, after=None):
    pid = os.fork()
    if pid == 0:
        if cls is not None:
            real, calls = getattr(cls, name), []
            def counted(*args):
                calls.append(1)
                if len(calls) > after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)
            setattr(cls, name, counted)
        script.main(argv)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status == (0 if cls is None else signal.SIGKILL), (argv, status)

sft, lora, folder = json.loads(sys.argv[1])
trainer, predictor = sft_trainer.SFTTrainer, utils_predict.Predictor
child(main, [*sft, "--run_dir", folder + "/sft"])
child(main, [*sft, "--run_dir", folder + "/sft_killed"], trainer, "training_step", 8)
os.system(f"cp -r {folder}/sft {folder}/predict_killed && rm {folder}/predict_killed/predictions*")
child(main, [*sft, "--run_dir", folder + "/predict_killed"], predictor, "_batch", 7)
child(run_mm_cot_lora, [*lora, "--run_dir", folder + "/lora"])
child(run_mm_cot_lora, [*lora, "--run_dir", folder + "/lora_killed"], trainer, "training_step", 4)
"""


@pytest.fixture(scope="module")
def old(old_code, tmp_path_factory, flags):
    """Run folders written by the old code, and the flags that wrote them."""
    folder = tmp_path_factory.mktemp("runs")
    sft = [*flags, "--prompt_format", "QCM-E", "--use_generate", "--save_minutes", "0.00001"]
    lora = [*flags, "--model", f"{folder}/sft", "--bs", "8", "--lr", "0.01", "--use_generate", "--final_eval"]
    lora += ["--save_minutes", "0.00001"]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([sft, lora, str(folder)])],
        cwd=old_code, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(folder=folder, sft=sft, lora=lora)


@pytest.mark.parametrize(
    ("name", "script", "step", "steps", "weights"),
    [
        ("sft", main, 8, 12, "model.safetensors"),  # 6 steps an epoch
        ("lora", run_mm_cot_lora, 4, 6, "adapter_model.safetensors"),  # 3 steps an epoch
    ],
)
def test_a_killed_training_goes_on(name, script, step, steps, weights, old, capsys):
    run, whole = old.folder / f"{name}_killed", old.folder / name
    assert not (run / "metrics.json").exists()
    script.main([*getattr(old, name), "--run_dir", str(run)])
    assert f"resuming from checkpoint-{step}" in capsys.readouterr().out
    ours, theirs = (load_file(folder / weights) for folder in (run, whole))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-5, rtol=0, msg=key)
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (run, whole))
    assert ours["steps"] == steps and ours["best_step"] == theirs["best_step"]
    for key in ("first_loss", "last_loss", "best_metric"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-4), key
    assert predictions(run)["preds"] == predictions(whole)["preds"]
    # the old code's finished folder is finished for the present code, too
    made = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    script.main([*getattr(old, name), "--run_dir", str(whole)])
    assert made == {path.name: path.stat().st_mtime_ns for path in whole.iterdir() if path.name != ".lock"}


def test_an_interrupted_prediction_goes_on(old, monkeypatch):
    run, rows = old.folder / "predict_killed", []
    kept = [line for file in (run / ".predicting_train").glob("rows_*") for line in file.read_text().splitlines()]
    assert len(kept) == 6 and not (run / "predictions_ans_train.json").exists()
    made = (run / "predictions_ans_test.json").stat().st_mtime_ns
    real = Predictor._predict_batch
    monkeypatch.setattr(Predictor, "_predict_batch", lambda *args: rows.extend(args[2]) or real(*args))
    main.main([*old.sft, "--run_dir", str(run)])
    assert len(rows) == 24 - 6 and (run / "predictions_ans_test.json").stat().st_mtime_ns == made
    for split in ("test", "eval", "train"):
        ours, theirs = (predictions(folder, split) for folder in (run, old.folder / "sft"))
        assert theirs.pop("settings").items() <= ours.pop("settings").items()  # the old code recorded fewer
        assert ours == theirs
    assert not (run / ".predicting_train").exists()
