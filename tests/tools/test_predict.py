"""tools/predict.py on folders as they are released, and its refusals.

Models that training left: tests/data/test_aokvqa.py.
"""

from __future__ import annotations

import json

import pytest
import torch

from ares.cli import UserError
from tests.conftest import one_line_error, run_script
from tests.tiny import PATCHES, make_data, make_model, write
from tools import predict
from vision.networks import LiveFeatures, load_encoder, read_image


@pytest.fixture(scope="module")
def world(tmp_path_factory, sample, t5_tokenizer):
    """data/ with stored features, a model with image layers and one without; neither has an args.yaml."""
    folder = tmp_path_factory.mktemp("predict")
    make_data(folder / "data", sample)
    for name, patch_size in (("vision", PATCHES), ("text", None)):
        t5_tokenizer.save_pretrained(make_model(folder / name, patch_size=patch_size))
    return folder


@pytest.fixture
def ask(world, monkeypatch, capsys):
    monkeypatch.chdir(world)

    def run(*argv) -> str:
        capsys.readouterr()
        predict.main([str(word) for word in argv])
        return capsys.readouterr().out

    return run


TYPED = ("--question", "Which?", "--choices", "a", "b")
SHORT = ("--output_len", 8, "--use_caption", "False")


def test_a_model_as_released(ask, world):
    """No args.yaml: the paper's format is taken, which is said; stored features of the question are used."""
    qid = next(iter(json.loads((world / "data/vision_features/name_map.json").read_text())))
    out = ask("--model", "vision", "--img_type", "vit", "--qid", qid, *SHORT)
    assert "note: vision has no args.yaml; its prompt format is taken to be QCM-E" in out
    assert "features: data/vision_features/vit.npy" in out and "\nRationale: " in out and "\nGold: (" in out
    problem = json.loads((world / "data/scienceqa/problems.json").read_text())[qid]
    out = ask("--model", "vision", "--img_type", "vit", "--qid", qid, *SHORT, "--prompt_format", "QCM-LEA")
    assert "Rationale: " in out and "Answer: none; the model wrote " in out
    out = ask("--model", "text", "--qid", qid, *SHORT, "--prompt_format", "QCM-A")
    assert "Rationale" not in out and "Answer: none; the model wrote " in out and "features" not in out
    assert f"Gold: ({'ABCDE'[problem['answer']]}) {problem['choices'][problem['answer']]}" in out


def test_refusals(ask, world, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"no picture")
    vision, text = ("--model", "vision", *SHORT), ("--model", "text", *SHORT)
    write(tmp_path / "features/vit.json", {"shape": [101, 64], "model_name": "test_vit", "weights": "random"})
    (tmp_path / "features/vit.npy").touch()
    tiny = ("--img_type", "vit", "--vision_features", tmp_path / "features")
    for argv, words in (
        ((*vision, *TYPED), "--img_type: vision does not tell which features it takes"),
        ((*text, *TYPED, "--image", picture), "--image: text reads no picture"),
        ((*text, *TYPED, *tiny), "--model: text has no image layers; drop --img_type"),
        ((*vision, *TYPED, *tiny), "takes features of size 8, but --img_type vit gives 64"),
        ((*vision, *TYPED, *tiny, "--image", picture), "--image: cannot read .*picture.png"),
        ((*text, *TYPED, "--prompt_format", "QCMG-E"), "trained on given rationales .QCMG-E.*--answer_model"),
        ((*text, "--prompt_format", "QCM-A", *TYPED, "--answer_model", "text"), "text answers itself .QCM-A"),
        ((*text, *TYPED, "--caption", "x"), "--caption: the model was trained without captions"),
        (("--model", "gone", *TYPED), "--model: .*gone"),
        ((*text, "--qid", "1", "--use_caption", "yes"), "--caption_file: no captions.json or .*--use_caption False"),
    ):
        with pytest.raises(UserError, match=words):
            ask(*argv)
    done = run_script(
        "tools/predict.py", "--model", "x", "--lora", "a", "--answer_model", "b", "--image", "c", check=False
    )
    one_line_error(done, "--qid, or --question", "--lora and --answer_model", "--image: c does not exist")


def test_live_features_are_those_of_extraction(sample):
    """resnet's one vector is repeated over all patches; a question without a picture gets zeros."""
    path = sample / "images/46/image.png"
    for img_type, name in (("vit", "test_vit"), ("resnet", "test_resnet")):
        encoder = load_encoder(img_type, name, "random")
        live = LiveFeatures(encoder, {"46": path, "none": None})
        batch = live.gather(["none", "46"])
        assert batch.shape == (2, *encoder.shape) and not batch[0].any()
        expected = encoder([encoder.transform(read_image(path))])[0]
        torch.testing.assert_close(batch[1], expected.expand(encoder.shape))
        assert not LiveFeatures(encoder, {"none": None}).gather(["none"]).any()


def test_a_turned_photo_of_ones_own_is_seen_upright(tmp_path, world, monkeypatch):
    """--image as a person sees it; a question of a data folder without turning, as its features were made."""
    import argparse

    import timm
    from PIL import Image
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    picture = Image.effect_noise((90, 50), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    picture.save(tmp_path / "plain.png")

    def features(name, of_data=False):
        argv = [*TYPED, "--model", str(world / "vision"), "--img_type", "vit", "--image", str(tmp_path / name)]
        args = predict.parse_args([*argv, "--vision_model", "test_vit", "--vision_weights", "w.safetensors"])
        args.device = "cpu"
        question = predict.Question("q", {}, tmp_path / name, of_data)
        return predict.features_for(args, question, argparse.Namespace(recorded={})).gather(["q"])

    assert torch.equal(features("turned.png"), features("upright.png"))
    assert torch.equal(features("turned.png", of_data=True), features("plain.png"))
    assert not torch.equal(features("turned.png"), features("plain.png"))
