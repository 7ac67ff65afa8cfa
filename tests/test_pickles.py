"""Nothing that lies in a file of weights, features or settings is executed, whatever flag names it.

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
from tests.conftest import one_line_error, run_script
from tests.tiny import PATCHES, make_data, make_model, write
from tools import doctor, predict

TYPED = ["--question", "Which?", "--choices", "a", "b"]


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


@pytest.fixture(scope="module")
def clean(tmp_path_factory, sample, t5_tokenizer):
    folder = tmp_path_factory.mktemp("clean")
    make_data(folder / "data", sample)
    t5_tokenizer.save_pretrained(make_model(folder / "model", patch_size=PATCHES))
    picture = folder / "images/1/image.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(picture)
    return folder


@pytest.fixture
def place(clean, tmp_path, monkeypatch):
    folder = tmp_path / "place"
    shutil.copytree(clean, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))  # as who agrees to whatever a library asks
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


def refused(script, argv: list, flag: str) -> None:
    with pytest.raises(UserError) as refusal:
        script.main([str(word) for word in argv])
    said = str(refusal.value)
    assert "\n" not in said and flag in said and len(said) < 500, said


# -- vision networks ---------------------------------------------------------------------------------------------


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
    extraction = ["--data_root", "images", "--output_dir", "out", "--model_name", "test_vit", "--workers", 0]
    refused(extract_features, [*extraction, "--weights", weights], "--weights")
    asked = [*TYPED, "--model", "model", "--img_type", "vit", "--image", "images/1/image.png", "--use_caption", "no"]
    refused(predict, [*asked, "--vision_model", "test_vit", "--vision_weights", weights], "--vision_weights")
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


@pytest.mark.parametrize("model_type", ["detr", "nobody-knows"])
def test_a_detr_folder(model_type, place, bomb):
    folder = torch_folder(place / "detr", bomb, {"model_type": model_type})
    argv = ["--data_root", "images", "--output_dir", "out", "--img_type", "detr", "--workers", 0]
    refused(extract_features, [*argv, "--weights", folder], "--weights")
    refused(extract_features, [*argv, "--model_name", folder], "--model_name")


@pytest.mark.parametrize("model_type", ["blip", "blip-2", "nobody-knows"])
def test_a_captioning_model(model_type, place, bomb):
    folder = torch_folder(place / "captioner", bomb, {"model_type": model_type})
    refused(extract_caption, ["--data_root", "images", "--output", "c.json", "--model", folder], "--model")


# -- models of text ----------------------------------------------------------------------------------------------

TRAINING = ["--data_root", "data", "--img_type", "vit", "--prompt_format", "QCM-E"]


def spoil_model(place: Path, form: str, bomb: Bomb, name: str = "pytorch_model.bin") -> Path:
    folder = place / "spoilt"
    shutil.copytree(place / "model", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink(missing_ok=True)
    FORMS[form](bomb, folder / name)
    return folder


@pytest.mark.parametrize(
    ("form", "name"), [*((form, "pytorch_model.bin") for form in FORMS), ("zip", "model.safetensors")]
)
def test_model_folders(form, name, place, bomb, capsys):
    folder = spoil_model(place, form, bomb, name)
    refused(main, [*TRAINING, "--model", folder], "--model")
    refused(main, [*TRAINING, "--model", "model", "--evaluate_dir", folder], "--evaluate_dir")
    refused(run_mm_cot_rl, [*TRAINING, "--base_model_dir", folder], "--base_model_dir")
    refused(run_mm_cot_rl, [*TRAINING, "--base_model_dir", "model", "--ref_model", folder], "--ref_model")
    lora = ["--data_root", "data", "--img_type", "vit", "--prompt_format", "QCM-A"]
    refused(run_mm_cot_lora, [*lora, "--model", folder], "--model")
    asked = [*TYPED, "--img_type", "vit", "--use_caption", "no"]
    refused(predict, [*asked, "--vision_model", "test_vit", "--model", folder], "")
    with pytest.raises(UserError, match="checks failed"):
        doctor.main([*TRAINING[:4], "--model", str(folder)])
    assert str(folder) in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_shards(form, place, bomb):
    folder = spoil_model(place, form, bomb, "shard-1.bin")
    write(folder / "pytorch_model.bin.index.json", {"weight_map": {"shared.weight": "shard-1.bin"}})
    refused(main, [*TRAINING, "--model", folder], "shard-1.bin")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["value_function.pth", "optimizer_state.pth"])
def test_a_round_folder(form, name, place, bomb):
    import model

    folder = place / "run/0"
    shutil.copytree(place / "model", folder)
    other = {"value_function.pth": "optimizer_state.pth"}.get(name, "value_function.pth")
    torch.save({}, folder / other)
    FORMS[form](bomb, folder / name)
    if name == "optimizer_state.pth":
        refused(run_mm_cot_rl, [*TRAINING, "--base_model_dir", folder, "--continue_train", "True"], name)
    else:
        with pytest.raises(UserError, match=name):
            model.T5ForMultimodalGenerationValueFunction.from_pretrained(folder)


@pytest.mark.parametrize("form", FORMS)
def test_adapters(form, place, bomb, monkeypatch):
    folder = place / "adapter"
    (place / "code_of_it.py").write_text(f"import os\nos.system(\"touch '{bomb.marker}'\")\nclass A: pass\n")
    monkeypatch.syspath_prepend(str(place))
    config = {
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q"],
        "megatron_config": {},
        "megatron_core": "code_of_it",
    }
    config |= {"auto_mapping": {"parent_library": "code_of_it", "base_model_class": "A"}}
    write(folder / "adapter_config.json", config)
    FORMS[form](bomb, folder / "adapter_model.bin")
    lora = ["--data_root", "data", "--img_type", "vit", "--prompt_format", "QCM-A", "--model", "model"]
    refused(run_mm_cot_lora, [*lora, "--evaluate_dir", folder], "--evaluate_dir")
    qid = next(iter(json.loads((place / "data/vision_features/name_map.json").read_text())))
    asked = ["--qid", qid, "--model", "model", "--img_type", "vit", "--use_caption", "no", "--output_len", 4]
    refused(predict, [*asked, "--lora", folder], "--lora")


@pytest.mark.parametrize("code", ["auto_map", "class"])
def test_tokenizers(code, place, bomb, capsys):
    folder = torch_folder(place / "spoilt", bomb, {"model_type": "t5" if code == "class" else "nobody-knows"})
    for name in ("tokenizer.json", "spiece.model"):
        if (place / "model" / name).exists():
            shutil.copy(place / "model" / name, folder)
    for script, model in ((main, "--model"), (run_mm_cot_lora, "--model"), (run_mm_cot_rl, "--base_model_dir")):
        argv = [*TRAINING[:4], "--prompt_format", "QCM-A", model, "model", "--tokenizer", folder]
        try:
            script.main([str(word) for word in [*argv, *(["--epoch", 0] if script is not run_mm_cot_rl else [])]])
        except UserError as error:  # refused, or read without its code: both are well
            assert "\n" not in str(error)
    with pytest.raises((UserError, SystemExit)):
        predict.main([*TYPED, "--model", "model", "--img_type", "vit", "--vision_model", "no-such",
                      "--tokenizer", str(folder)])  # fmt: skip


# -- features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "suffix"),
    [*((form, ".pth") for form in FORMS), *(("npy", suffix) for suffix in (".npy", ".pt", ".safetensors"))],
)
def test_features(form, suffix, place, bomb):
    (place / "data/vision_features/vit.npy").unlink()
    FORMS[form](bomb, place / f"data/vision_features/vit{suffix}")
    refused(main, [*TRAINING, "--model", "model"], "--vision_features")
    refused(run_mm_cot_rl, [*TRAINING, "--base_model_dir", "model"], "--vision_features")
    qid = next(iter(json.loads((place / "data/vision_features/name_map.json").read_text())))
    asked = ["--qid", qid, "--model", "model", "--img_type", "vit", "--use_caption", "no"]
    refused(predict, asked, "--vision_features")


# -- as launched -------------------------------------------------------------------------------------------------


def test_launches_end_in_one_line(place, bomb):
    torch.save({"a": bomb}, place / "w.pth")
    folder = spoil_model(place, "zip", bomb)
    extraction = ["--data_root", "images", "--output_dir", "out", "--model_name", "test_vit", "--weights", "w.pth"]
    for script, argv, words in (
        ("extract_features.py", extraction, ["--weights", "w.pth", "never executed"]),
        ("main.py", [*TRAINING, "--model", folder], ["--model", "pytorch_model.bin"]),
        ("extract_caption.py", ["--data_root", "images", "--model", torch_folder(place / "c", bomb, {})], ["--model"]),
    ):
        done = run_script(Path(__file__).parents[1] / script, *argv, cwd=place, check=False)
        one_line_error(done, *words)
