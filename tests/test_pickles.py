"""No code in a file of weights, features or settings is executed, whatever flag names it.

Each file holds a pickle, or code, that would write a marker. The scripts read it by their own `main`; the user gets
one line that names the flag.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import extract_caption
import extract_features
import main
import run_mm_cot_lora
import run_mm_cot_rl
from ares.cli import UserError
from model import T5ForMultimodalGenerationValueFunction
from tests.conftest import one_line_error, run_script
from tests.tiny import PATCHES, write
from tools import doctor, predict

DATA = "--data_root data --img_type vit"
TRAINING = f"{DATA} --prompt_format QCM-E"
LORA = f"{DATA} --prompt_format QCM-A"
TYPED = "--question Which? --choices a b --img_type vit --use_caption no"
FEATURES = "--data_root images --output_dir out --workers 0"


class Bomb:
    """Writes the marker where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


FORMS = {
    "zip": lambda bomb, path: torch.save({"shared.weight": bomb}, path),
    "old torch": lambda bomb, path: torch.save({"a": bomb}, path, _use_new_zipfile_serialization=False),
    "plain": lambda bomb, path: path.write_bytes(pickle.dumps({"a": bomb}, protocol=2)),
    "protocol 5": lambda bomb, path: path.write_bytes(pickle.dumps(bomb, protocol=5)),
    "npy": lambda bomb, path: numpy_bomb(bomb, path, np.save),
    "npz": lambda bomb, path: numpy_bomb(bomb, path, np.savez),
}


def numpy_bomb(bomb: Bomb, path: Path, save) -> None:
    out = io.BytesIO()
    save(out, np.array([bomb], dtype=object))
    path.write_bytes(out.getvalue())


@pytest.fixture
def place(ready, tmp_path, monkeypatch):
    folder = shutil.copytree(ready, tmp_path / "place")
    picture = folder / "images/1/image.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(picture)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))  # a user who agrees to whatever a library asks
    return folder


@pytest.fixture
def bomb(tmp_path):
    bomb = Bomb(tmp_path / "executed")
    yield bomb
    assert not bomb.marker.exists()


def test_the_bombs_are_live(tmp_path):
    """The other tests say something only if this one passes."""
    for name, form in FORMS.items():
        marker = tmp_path / name.replace(" ", "_")
        form(Bomb(marker), tmp_path / "bomb")
        if "np" in name:
            loaded = np.load(tmp_path / "bomb", allow_pickle=True)
            list(loaded.values() if name == "npz" else loaded)
        else:
            with contextlib.suppress(RuntimeError):  # it unpickles first, then misses its magic number
                torch.load(tmp_path / "bomb", weights_only=False)
        assert marker.exists(), name


def refused(script, words: str, flag: str) -> None:
    """`script` stops with one short line that names `flag`."""
    with pytest.raises(UserError) as refusal:
        script.main(words.split())
    said = str(refusal.value)
    assert "\n" not in said and flag in said and len(said) < 500, said


def pictured(place: Path) -> str:
    """predict.py's flags for a question that has an image."""
    qid = next(iter(json.loads((place / "data/vision_features/name_map.json").read_text())))
    return f"--qid {qid} --model model --img_type vit --use_caption no --data_root data --output_len 4"


NAMES = ("w.pt", "w.bin", "w.npz", "w", "folder/model.bin", "folder/model.safetensors")


@pytest.mark.parametrize(
    ("form", "name"),
    [*((form, name) for form in FORMS for name in ("w.pth", "w.safetensors")), *(("zip", name) for name in NAMES)],
)
def test_vision_weights(form, name, place, bomb):
    path = place / name
    path.parent.mkdir(exist_ok=True)
    FORMS[form](bomb, path)
    weights = path.parent if name.startswith("folder") else path
    refused(extract_features, f"{FEATURES} --model_name test_vit --weights {weights}", "--weights")
    if form != "zip":  # the same reader
        return
    asked = f"{TYPED} --model model --image images/1/image.png"
    refused(predict, f"{asked} --vision_model test_vit --vision_weights {weights}", "--vision_weights")
    write(place / "vision_features/vit.json", {"shape": PATCHES, "model_name": "test_vit", "weights": str(weights)})
    np.save(place / "vision_features/vit.npy", np.zeros((1, *PATCHES), np.float32))
    refused(predict, asked, "--vision_weights")  # the sidecar names the file


def torch_folder(folder: Path, bomb: Bomb, config: dict) -> Path:
    """A folder as transformers takes it: pickled weights, and code that config.json asks to run."""
    folder.mkdir(exist_ok=True)
    torch.save({"a": bomb}, folder / "pytorch_model.bin")
    (folder / "code.py").write_text(f"import os\nos.system(\"touch '{bomb.marker}'\")\nclass A: pass\n")
    kinds = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
    codes = {kind: "code.A" for kind in kinds} | {"AutoTokenizer": ["code.A", "code.A"]}
    write(folder / "config.json", {**config, "auto_map": codes})
    for name in ("tokenizer_config", "processor_config", "preprocessor_config"):
        write(folder / f"{name}.json", {"auto_map": codes, "tokenizer_class": "A", "processor_class": "A"})
    return folder


@pytest.mark.parametrize("model_type", ["detr", "blip", "blip-2", "nobody-knows"])
def test_detr_and_captioning_models(model_type, place, bomb):
    folder = torch_folder(place / "network", bomb, {"model_type": model_type})
    if not model_type.startswith("blip"):
        refused(extract_features, f"{FEATURES} --img_type detr --weights {folder}", "--weights")
        refused(extract_features, f"{FEATURES} --img_type detr --model_name {folder}", "--model_name")
    if model_type != "detr":
        refused(extract_caption, f"--data_root images --output c.json --model {folder}", "--model")


def damaged_model(place: Path, form: str, bomb: Bomb, name: str = "pytorch_model.bin") -> Path:
    folder = shutil.copytree(place / "model", place / "damaged")
    (folder / "model.safetensors").unlink()
    FORMS[form](bomb, folder / name)
    return folder


@pytest.mark.parametrize(
    ("form", "name"), [*((form, "pytorch_model.bin") for form in FORMS), ("zip", "model.safetensors")]
)
def test_model_folders(form, name, place, bomb, capsys):
    folder = damaged_model(place, form, bomb, name)
    refused(main, f"{TRAINING} --model {folder}", "--model")
    refused(main, f"{TRAINING} --model model --evaluate_dir {folder}", "--evaluate_dir")
    refused(run_mm_cot_rl, f"{TRAINING} --base_model_dir {folder}", "--base_model_dir")
    refused(run_mm_cot_rl, f"{TRAINING} --base_model_dir model --ref_model {folder}", "--ref_model")
    refused(run_mm_cot_lora, f"{LORA} --model {folder}", "--model")
    refused(predict, f"{TYPED} --vision_model test_vit --model {folder}", "")
    with pytest.raises(UserError, match="checks failed"):
        doctor.main(f"{DATA} --model {folder}".split())
    assert str(folder) in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_shards_value_functions_and_optimizer_states(form, place, bomb):
    folder = damaged_model(place, form, bomb, "shard-1.bin")
    write(folder / "pytorch_model.bin.index.json", {"weight_map": {"shared.weight": "shard-1.bin"}})
    refused(main, f"{TRAINING} --model {folder}", "shard-1.bin")
    folder = shutil.copytree(place / "model", place / "run/0")
    torch.save({}, folder / "value_function.pth")
    FORMS[form](bomb, folder / "optimizer_state.pth")
    refused(run_mm_cot_rl, f"{TRAINING} --base_model_dir {folder} --continue_train True", "optimizer_state.pth")
    FORMS[form](bomb, folder / "value_function.pth")
    with pytest.raises(UserError, match="value_function.pth"):
        T5ForMultimodalGenerationValueFunction.from_pretrained(folder)


@pytest.mark.parametrize("form", FORMS)
def test_adapters(form, place, bomb, monkeypatch):
    folder = place / "adapter"
    (place / "code_of_it.py").write_text(f"import os\nos.system(\"touch '{bomb.marker}'\")\nclass A: pass\n")
    monkeypatch.syspath_prepend(str(place))
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q"], "megatron_config": {}}
    config |= {"megatron_core": "code_of_it"}
    config |= {"auto_mapping": {"parent_library": "code_of_it", "base_model_class": "A"}}
    write(folder / "adapter_config.json", config)
    FORMS[form](bomb, folder / "adapter_model.bin")
    refused(run_mm_cot_lora, f"{LORA} --model model --evaluate_dir {folder}", "--evaluate_dir")
    refused(predict, f"{pictured(place)} --lora {folder}", "--lora")


@pytest.mark.parametrize("code", ["auto_map", "class"])
def test_tokenizers(code, place, bomb, capsys):
    folder = torch_folder(place / "damaged", bomb, {"model_type": "t5" if code == "class" else "nobody-knows"})
    shutil.copy(place / "model/tokenizer.json", folder)
    for script, more in (
        (main, "--model model --epoch 0"),
        (run_mm_cot_lora, "--model model --epoch 0"),
        (run_mm_cot_rl, "--base_model_dir model"),
    ):
        try:
            script.main(f"{LORA} {more} --tokenizer {folder}".split())
        except UserError as error:  # refused, or read without its code: both are well
            assert "\n" not in str(error)
    with pytest.raises((UserError, SystemExit)):
        predict.main(f"{TYPED} --model model --vision_model no-such --tokenizer {folder}".split())


@pytest.mark.parametrize(
    ("form", "suffix"),
    [*((form, ".pth") for form in FORMS), *(("npy", suffix) for suffix in (".npy", ".pt", ".safetensors"))],
)
def test_features(form, suffix, place, bomb):
    (place / "data/vision_features/vit.npy").unlink()
    FORMS[form](bomb, place / f"data/vision_features/vit{suffix}")
    refused(main, f"{TRAINING} --model model", "--vision_features")
    refused(run_mm_cot_rl, f"{TRAINING} --base_model_dir model", "--vision_features")
    refused(predict, pictured(place), "--vision_features")


def test_a_launch_ends_in_one_line(place, bomb):
    torch.save({"a": bomb}, place / "w.pth")
    script = Path(__file__).parents[1] / "extract_features.py"
    done = run_script(script, *f"{FEATURES} --model_name test_vit --weights w.pth".split(), cwd=place, check=False)
    one_line_error(done, "--weights", "w.pth", "never executed")
