"""Features and captions of real sample images: shapes, order, the same bytes after a kill, broken images, mistakes."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import extract_caption
import extract_features
from ares.cli import UserError
from ares.data_folder import load_captions, load_name_map
from ares.images import load_image
from demo.make_model import make_tokenizer
from tests.conftest import ROOT, run_script
from vision import extraction
from vision.features import VisionFeatures
from vision.networks import load_encoder, read_image, read_weights

TRIAL = ["--model_name", "test_vit", "--random_weights", "--workers", "0", "--batch_size", "4"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small only lose by a second thread, much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(sample, tmp_path_factory):
    """Twelve real images, three of them choice images only."""
    folder = tmp_path_factory.mktemp("images")
    for qid in ("46", "62", "86", "95", "133", "140", "198", "293", "363", "1014", "1395", "1762"):
        shutil.copytree(sample / "images" / qid, folder / qid, copy_function=shutil.copyfile)
    return folder


@pytest.fixture
def small(images, tmp_path):
    """A copy of four of them, to be damaged."""
    for qid in ("62", "133", "198", "1014"):
        shutil.copytree(images / qid, tmp_path / "images" / qid)
    return tmp_path / "images"


def features(folder, img_type="vit"):
    name_map = load_name_map(folder / "name_map.json")
    return VisionFeatures(folder / extract_features.FILES[img_type], name_map, img_type)


def extract(images, out, *flags):
    extract_features.main(["--data_root", str(images), "--output_dir", str(out), *flags])


# -- features --------------------------------------------------------------------------------------------


def test_rows_are_the_images_in_order_of_their_numbers(images, tmp_path):
    extract(images, tmp_path, *TRIAL)
    found = features(tmp_path)
    assert [*found.name_map] == sorted((path.name for path in images.iterdir()), key=int)
    assert (found.rows, found.shape) == (12, (101, 64))
    record = json.loads((tmp_path / "vit.json").read_text())
    expected = {"shape": [101, 64], "model_name": "test_vit", "weights": "random", "rows": 12, "broken": []}
    assert {name: record[name] for name in expected} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name_map.json", "vit.json", "vit.pth"]

    encoder = load_encoder("vit", "test_vit", "random")
    for qid, file in (("1014", "image.png"), ("293", "image.png"), ("1395", "choice_0.png")):
        alone = encoder([encoder.transform(read_image(images / qid / file))])[0]
        torch.testing.assert_close(found.gather([qid])[0], alone, atol=1e-5, rtol=1e-5)
    rows = found.gather(["46", "62", "no image"])
    assert (rows[0] - rows[1]).abs().max() > 0.01 and not rows[2].any()


def test_again_is_quick_and_other_settings_are_refused(images, tmp_path, capsys):
    extract(images, tmp_path, *TRIAL)
    before = (tmp_path / "vit.pth").read_bytes()
    extract(images, tmp_path, *TRIAL)
    assert "there already" in capsys.readouterr().out
    name_map = (tmp_path / "name_map.json").read_text()
    (tmp_path / "name_map.json").unlink()
    extract(images, tmp_path, *TRIAL)
    assert (tmp_path / "name_map.json").read_text() == name_map, "features are of no use without it"
    (tmp_path / "name_map.json").write_text('{"1": 0}')
    with pytest.raises(UserError, match="name_map.json numbers other images"):
        extract(images, tmp_path, *TRIAL)
    (tmp_path / "name_map.json").write_text(name_map)
    with pytest.raises(UserError, match="vit.pth is there, made with another weights_file"):
        extract(images, tmp_path, *TRIAL, "--seed", "1")
    assert (tmp_path / "vit.pth").read_bytes() == before
    extract(images, tmp_path, *TRIAL, "--seed", "1", "--overwrite")
    assert (tmp_path / "vit.pth").read_bytes() != before
    out = tmp_path / "released"  # files that are not ours are not replaced
    out.mkdir()
    (out / "vit.pth").write_bytes(b"6.6 GB")
    with pytest.raises(UserError, match="made with another origin"):
        extract(images, out, *TRIAL)
    assert (out / "vit.pth").read_bytes() == b"6.6 GB"
    (out / "name_map.json").write_text('{"1": 0}')
    with pytest.raises(UserError, match="numbers other images"):
        extract(images, out, *TRIAL[2:], "--img_type", "resnet", "--model_name", "test_resnet")


def test_kill_and_run_again(images, tmp_path):
    """SIGKILL in the middle of the work; the same command then continues and gives the bytes of a quiet run."""
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    flags = [*TRIAL[:3], "--workers", "1", "--batch_size", "1"]
    extract(images, quiet, *flags)
    command = [ROOT / "extract_features.py", "--data_root", images, "--output_dir", killed, *flags]
    part = killed / ".vit.part.json"
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not part.exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = json.loads(part.read_text())["done"]
    assert 0 < done < 12 and not (killed / "vit.pth").exists()
    again = run_script(*command)
    assert f"continuing after {done} of 12 images" in again.stdout
    assert "RANDOM WEIGHTS" in again.stderr
    names = ["name_map.json", "vit.json", "vit.pth"]
    assert all((killed / name).read_bytes() == (quiet / name).read_bytes() for name in names)
    assert sorted(path.name for path in killed.iterdir()) == names, "what the kill left is removed"


def test_decoding_processes_on_any_python(images, tmp_path, monkeypatch):
    """Python 3.14 starts processes by forkserver. On a CPU images are decoded in this process, on a GPU by several."""
    for cores, workers in ((40, 16), (5, 5)):
        with monkeypatch.context() as patched:
            patched.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
            patched.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=16e9))
            assert extraction.default_workers("cpu") == 0 and extraction.default_workers("cuda") == workers
    default = multiprocessing.context._default_context
    monkeypatch.setattr(default, "_actual_context", None)
    monkeypatch.setattr(default, "_default_context", multiprocessing.get_context("forkserver"))
    for workers in ("0", "2"):
        extract(images, tmp_path / workers, *TRIAL[:3], "--workers", workers, "--batch_size", "4")
    assert (tmp_path / "0/vit.pth").read_bytes() == (tmp_path / "2/vit.pth").read_bytes()


@pytest.mark.parametrize("free", [64e6, 0, 1.9e9, None])
def test_little_shared_memory_means_one_decoding_process(free, tmp_path, monkeypatch, capsys):
    """As in a container by default: 16 processes would end with a bus error."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(40)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(extraction, "SHM", str(tmp_path if free is not None else tmp_path / "absent"))
    assert extraction.default_workers("cuda") == 0
    assert "--shm-size" in capsys.readouterr().out
    assert extraction.default_workers("cpu") == 0 and capsys.readouterr().out == ""


def test_float32_features_are_not_of_tf32(images, tmp_path, monkeypatch):
    """cuDNN's default for convolutions on a GPU rounds their inputs to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    extract(images, tmp_path, *TRIAL)
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32


def test_other_settings_start_over(images, tmp_path, monkeypatch, capsys):
    """What a stopped run left is not mixed with rows of another network."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(extraction.FeatureStore, "finish", stop)
        extract(images, tmp_path / "a", *TRIAL)
    for name in "ab":
        extract(images, tmp_path / name, *TRIAL, "--seed", "5")
        assert "continuing" not in capsys.readouterr().out
    assert (tmp_path / "a" / "vit.pth").read_bytes() == (tmp_path / "b" / "vit.pth").read_bytes()


def test_broken_images(small, tmp_path, capsys):
    whole = (small / "198" / "image.png").read_bytes()
    (small / "198" / "image.png").write_bytes(whole[: len(whole) // 2])
    (small / "1014" / "image.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"--strict: question 198: cannot read .*198/image.png"):
        extract(small, tmp_path / "strict", *TRIAL, "--strict")
    extract(small, tmp_path / "out", *TRIAL)
    assert "question 198: cannot read" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "vit.json").read_text())["broken"] == ["198", "1014"]
    rows = features(tmp_path / "out").gather(["62", "133", "198", "1014"])
    assert [bool(row.any()) for row in rows] == [True, True, False, False]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged TIFFs
def test_pictures_of_every_kind_are_read_or_refused(tmp_path, monkeypatch):
    """16-bit grey keeps its shades; what Pillow's readers trip over counts as broken, whatever they raise."""
    path = tmp_path / "image.png"
    Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)).save(path)
    grey = np.asarray(read_image(path))
    assert grey.shape == (16, 16, 3) and np.array_equal(grey[..., 0].ravel(), np.arange(256)), "not white from 255 on"
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    kinds = [("CMYK", "JPEG"), ("P", "PNG"), ("LA", "PNG"), ("1", "TIFF"), ("F", "TIFF"), ("P", "GIF")]
    for mode, kind in kinds:
        picture.convert(mode).save(path, format=kind)
        assert read_image(path).mode == "RGB" and read_image(path).size == (40, 30), (mode, kind)
        whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        for _ in range(30):
            damaged = whole.copy()
            damaged[random.integers(0, min(len(whole), 400), 6)] = random.integers(0, 256, 6)
            path.write_bytes(damaged.tobytes())
            with contextlib.suppress(OSError, ValueError):
                read_image(path)

    def decoder(*_, **__):  # as Pillow's AVIF reader says it
        raise RuntimeError("Failed to decode frame 0")

    monkeypatch.setattr(Image, "open", decoder)
    with pytest.raises(ValueError, match="frame 0"):
        read_image(path)
    with pytest.raises(UserError, match="image.png of question 7 does not decode .Failed to decode frame 0"):
        load_image(path, "7")


def test_stopped_at_the_very_end_nothing_is_lost(images, tmp_path, monkeypatch, capsys):
    """The finished rows of a .npy are the file itself, moved in one step."""
    flags = ["--img_type", "resnet", "--model_name", "test_resnet", "--random_weights", "--workers", "0"]
    finish = extraction.FeatureStore.finish

    def no_disk(*_):
        raise KeyboardInterrupt

    def stop(store, path):
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", no_disk)
            patched.setattr(os, "unlink", no_disk)
            finish(store, path)

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(extraction.FeatureStore, "finish", stop)
        extract(images, tmp_path, *flags)
    extract(images, tmp_path, *flags)
    assert "there already" in capsys.readouterr().out


def test_split_folders(images, tmp_path):
    for split, qids in (("train", ("46", "1014")), ("test", ("62", "133"))):
        for qid in qids:
            shutil.copytree(images / qid, tmp_path / split / qid)
    assert [*extraction.list_images(tmp_path)] == ["46", "62", "133", "1014"]
    assert [*extraction.list_images(tmp_path, ["test"])] == ["62", "133"]
    with pytest.raises(UserError, match="--splits: no folder val"):
        extraction.list_images(tmp_path, ["val", "test"])
    shutil.copytree(images / "62", tmp_path / "train" / "62")
    with pytest.raises(UserError, match="question 62 has two folders"):
        extraction.list_images(tmp_path)


def test_images_of_several_sizes_keep_their_order():
    encoder, generator = load_encoder("resnet", "test_resnet", "random"), torch.Generator().manual_seed(0)
    sizes = ((96, 64), (64, 64), (64, 96), (64, 64), (96, 64))
    pixels = [torch.randn(3, *size, generator=generator) for size in sizes]
    for each, row in zip(pixels, encoder(pixels), strict=True):
        torch.testing.assert_close(encoder([each])[0], row, atol=1e-5, rtol=1e-5)


def test_weights_in_a_training_checkpoint(tmp_path):
    """As timm takes them: EMA weights, then state_dict, then model; `module.` of distributed training is dropped."""
    kinds = ("state_dict_ema", "model_ema", "state_dict", "model")
    checkpoint = {name: {"module.a": torch.full((2,), float(number))} for number, name in enumerate(kinds)}
    for number, name in enumerate(kinds):
        torch.save({"epoch": 3, **checkpoint}, tmp_path / "w.pth")
        assert read_weights(tmp_path / "w.pth")["a"].tolist() == [number] * 2
        del checkpoint[name]
    with pytest.raises(UserError, match="is not a state dict"):
        torch.save({"epoch": 3}, tmp_path / "w.pth")
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights(small, tmp_path, suffix):
    torch.manual_seed(7)
    network = timm.create_model("test_vit").eval()
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), file)
    flags = ["--model_name", "test_vit", "--weights", str(file), "--workers", "0"]
    extract(small, tmp_path / "out", *flags)
    encoder = load_encoder("vit", "test_vit", "random")
    pixels = encoder.transform(read_image(small / "62" / "image.png"))[None]
    with torch.no_grad():
        expected = network.forward_features(pixels)
    torch.testing.assert_close(features(tmp_path / "out").gather(["62"]), expected, atol=1e-5, rtol=1e-5)
    record = json.loads((tmp_path / "out" / "vit.json").read_text())
    assert record["weights"] == "local" and record["weights_file"].startswith(file.name)
    with pytest.raises(UserError, match=f"weights{suffix} does not fit test_resnet"):
        extract(small, tmp_path / "other", "--model_name", "test_resnet", "--weights", str(file))


def test_float16(small, tmp_path):
    extract(small, tmp_path / "a", *TRIAL)
    extract(small, tmp_path / "b", *TRIAL, "--dtype", "float16")
    assert torch.load(tmp_path / "b" / "vit.pth", weights_only=True).dtype == torch.float16
    both = [features(tmp_path / name).gather(["62", "198"]) for name in "ab"]
    torch.testing.assert_close(*both, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("img_type", ["vit", "clip", "resnet", "detr"])
def test_released_networks_give_the_released_shapes(img_type, small, tmp_path):
    """The true architectures, with random weights: nothing can be downloaded here."""
    for qid in ("198", "1014"):
        shutil.rmtree(small / qid)
    extract(small, tmp_path, "--img_type", img_type, "--random_weights", "--workers", "0")
    (tmp_path / f"{img_type}.json").unlink()  # without it the reader insists on the published shape
    found = features(tmp_path, img_type)
    rows = found.gather(["62", "133"])
    assert rows.shape == (2, *found.shape) and torch.isfinite(rows).all()
    assert (rows[0] - rows[1]).abs().max() > 0
    if img_type == "resnet":
        assert np.load(tmp_path / "resnet.npy", mmap_mode="r").shape == (2, 2048)


def test_mistakes_before_any_network_is_built(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--data_root: .* is no folder"):
        extract(tmp_path / "none", tmp_path / "out")
    for flags, words in (
        ("--weights x --random_weights --batch_size 0 --workers -1",
         "--batch_size: .*; --workers: .*; --weights and --random_weights"),
        ("--model_name vit_gigantisch --random_weights", "timm .* has no model vit_gigantisch"),
        (f"--weights {tmp_path}/none.bin", "--weights: .*none.bin does not exist"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            extract(images, tmp_path / "out", *flags.split())
    with pytest.raises(UserError, match="no .qid./image.png"):
        extraction.list_images(tmp_path / "out")
    for script, out in ((extract_features, "--output_dir new"), (extract_caption, "--output c.json")):
        with pytest.raises(UserError, match="--device: warp cannot be used here"):
            script.main(f"--data_root {images} {out} --device warp".split())
    for img_type in ("vit", "detr"):  # no hub: one attempt, one line, and it names the two ways out
        with pytest.raises(UserError, match="hub cannot be reached.*--weights PATH.*--random_weights"):
            extract(images, tmp_path, "--img_type", img_type)
        assert not (tmp_path / extract_features.FILES[img_type]).exists()


# -- captions --------------------------------------------------------------------------------------------


def tiny_instructblip(folder, decoder_only):
    """InstructBLIP's own model and processor classes, tiny, weights drawn wide enough that captions differ."""
    make_tokenizer(["Write a short description of two small red balls on a table."] * 3, folder / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "write", "a", "short", "description", "for", "the", "image"]
    (folder / "vocab.txt").write_text("\n".join(words))
    bert = transformers.BertTokenizer(str(folder / "vocab.txt"))
    pixels = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    processor = transformers.InstructBlipProcessor(pixels, tokenizer, bert, num_query_tokens=4)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if decoder_only:
        ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        text = transformers.LlamaConfig(vocab_size=len(tokenizer), **ids, **sizes)
    else:
        shape = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        text = transformers.T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **shape)
    config = transformers.InstructBlipConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        qformer_config={**sizes, "vocab_size": len(bert), "encoder_hidden_size": 32},
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = transformers.InstructBlipForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module", params=[False, True], ids=["t5", "llama"])
def instructblip(request, tmp_path_factory):
    return tiny_instructblip(tmp_path_factory.mktemp("instructblip"), request.param)


def caption(images, output, model, *flags):
    arguments = ["--data_root", images, "--output", output, "--model", model, "--max_new_tokens", "6", *flags]
    extract_caption.main([str(argument) for argument in arguments])


def test_captions(instructblip, images, tmp_path, capsys):
    output = tmp_path / "instruct_captions.json"
    caption(images, output, instructblip, "--batch_size", "5")
    captions = load_captions(output)
    assert [*captions] == [*extraction.list_images(images)]
    assert len(set(captions.values())) > 1  # the image reaches the words
    assert not any("description for the image" in text or "<image>" in text for text in captions.values())
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    caption(images, output, instructblip)
    assert "there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="--output: .* by another model or prompt"):
        caption(images, output, instructblip, "--prompt", "A short description:")
    assert load_captions(output) == captions
    caption(images, output, instructblip, "--prompt", "small red balls on a table", "--overwrite")
    assert load_captions(output) != captions  # so does the prompt


def test_captions_stopped_and_continued(instructblip, images, tmp_path, monkeypatch, capsys):
    quiet, stopped = tmp_path / "quiet.json", tmp_path / "stopped.json"
    caption(images, quiet, instructblip, "--batch_size", "3")
    whole, calls = extract_caption.Captioner.__call__, []

    def stop_at_third(self, pictures):
        calls.append(len(pictures))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, pictures)

    monkeypatch.setattr(extract_caption.Captioner, "__call__", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        caption(images, stopped, instructblip, "--batch_size", "3")
    assert not stopped.exists()
    caption(images, stopped, instructblip, "--batch_size", "3")
    assert "continuing after 6 captions" in capsys.readouterr().out
    assert sum(calls[3:]) == 6  # none asked twice
    assert stopped.read_bytes() == quiet.read_bytes()


def test_caption_mistakes_and_a_broken_image(instructblip, small, tmp_path, capsys):
    output = tmp_path / "captions.json"
    with pytest.raises(UserError, match="--model: cannot load .*nowhere"):
        caption(small, output, "nowhere/such-model")
    with pytest.raises(UserError, match="--max_new_tokens: 0 .*; --batch_size: 0 is less than 1"):
        extract_caption.main(["--data_root", str(small), "--batch_size", "0", "--max_new_tokens", "0"])
    (small / "62" / "image.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="--strict: question 62"):
        caption(small, output, instructblip, "--strict")
    caption(small, output, instructblip)
    assert [*load_captions(output)] == ["133", "198", "1014"]
    assert "question 62: cannot read" in capsys.readouterr().err
