"""tools/doctor.py: silent on the sound sample, and one FAIL line, the right one, for each planted fault."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ares.cli import Stop, UserError
from tests.conftest import run_script
from tests.tiny import make_data, make_model, write
from tools import doctor

KEY = "sk-ant-test-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)


def diagnose(capsys, *argv) -> tuple[int, dict[str, list[str]], str]:
    """(exit status, status -> lines, everything said)."""
    capsys.readouterr()
    try:
        doctor.main([str(word) for word in argv])
        code = 0
    except Stop as stop:
        code = stop.status
    said = capsys.readouterr()
    lines: dict[str, list[str]] = {"ok": [], "info": [], "warn": [], "FAIL": []}
    for line in said.out.splitlines():
        if (status := line.split()[0]) in lines:
            lines[status].append(line)
    return code, lines, said.out + said.err


def test_the_sound_sample_passes(sample, t5_tokenizer, tmp_path, capsys):
    rows = len(json.loads((sample / "name_map.json").read_text()))
    np.save(tmp_path / "resnet.npy", np.random.default_rng(0).standard_normal((rows, 2048), np.float32))
    t5_tokenizer.save_pretrained(make_model(tmp_path / "model", patch_size=(512, 2048)))
    code, lines, said = diagnose(
        capsys, "--data_root", sample / "ScienceQA/data", "--images", sample / "images", "--use_caption",
        "--caption_file", sample / "instruct_captions.json", "--img_type", "resnet", "--vision_features", tmp_path,
        "--name_map", sample / "name_map.json", "--model", tmp_path / "model",
    )  # fmt: skip
    assert code == 0 and not lines["FAIL"], said
    names = [line[6:16].strip() for line in said.splitlines() if line[:4].strip() in lines]
    assert names == [
        *("packages", "questions", "splits", "counts", "images", "captions", "features", "model", "tokenizer"),
        *("devices", "disk", "api key"),
    ]
    assert "1473 questions" in said and "862 train, 321 val, 290 test" in said
    assert re.search(r"images +\d+ images of 58 questions decode", said)
    assert "778 rows of (512, 2048), all finite" in said and "719 captions" in said
    assert any("664 of 1473 questions name an image that is not under" in line for line in lines["warn"])
    assert "12,726 train" in lines["info"][0] and "11,208 feature rows" in lines["info"][0]
    assert KEY not in said and "ANTHROPIC_API_KEY is set" in said


@pytest.fixture(scope="module")
def clean(tmp_path_factory, sample, t5_tokenizer):
    """A small folder in which nothing is wrong: real questions, real pictures of the test split, all files."""
    folder = tmp_path_factory.mktemp("doctor")
    data = make_data(folder / "data", sample, test=40)
    problems, splits = (read(data / f"scienceqa/{name}.json") for name in ("problems", "pid_splits"))
    for qid in problems:
        if (sample / "images" / qid).is_dir():
            shutil.copytree(sample / "images" / qid, data / "images" / qid, copy_function=shutil.copyfile)
        elif problems[qid]["image"]:  # the sample's train images are not at hand
            problems[qid]["image"] = None
    write(data / "scienceqa/problems.json", problems)
    write(data / "captions.json", {"captions": {qid: "A picture." for qid in problems}})
    write(data / "scienceqa/correction.json", problems)
    t5_tokenizer.save_pretrained(make_model(folder / "model", patch_size=(5, 8)))
    assert len(list((data / "images").iterdir())) > 3 and splits["train"]
    return folder


@pytest.fixture
def place(clean, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(clean, tmp_path / "place")


def read(path: Path):
    return json.loads(path.read_text())


def lines_of(check: str, lines: list[str]) -> list[str]:
    return [line for line in lines if line[6:16].strip() == check]


def flags(folder: Path) -> list[str]:
    data = folder / "data"
    return [
        *("--data_root", str(data), "--caption_file", str(data / "captions.json"), "--use_caption"),
        *("--img_type", "vit", "--model", str(folder / "model"), "--correction_file", "scienceqa/correction.json"),
    ]


def test_the_small_folder_passes(clean, capsys):
    """The faults below say something only if this passes."""
    code, lines, said = diagnose(capsys, *flags(clean), "--strict")
    assert code == 0 and not lines["FAIL"], said
    assert {line.split()[1] for line in lines["warn"]} <= {"devices"}


def spoil(path: Path, change) -> None:
    """Change a JSON file in place."""
    value = read(path)
    change(value)
    write(path, value)


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def first_picture(data: Path) -> Path:
    return sorted((data / "images").glob("*/image.png"))[0]


def change_rows(data: Path, change) -> None:
    np.save(data / "vision_features/vit.npy", change(np.load(data / "vision_features/vit.npy")))


def nan_row(features):
    features[4, 2, 1] = np.nan
    return features


def pickled(data: Path) -> None:
    (data / "vision_features/vit.npy").unlink()
    (data / "vision_features/vit.pth").write_bytes(pickle.dumps(Path("x")))


def other_model(data: Path) -> None:
    shutil.rmtree(data.parent / "model")
    (data.parent / "detr").rename(data.parent / "model")


PROBLEMS, SPLITS, CAPTIONS = "scienceqa/problems.json", "scienceqa/pid_splits.json", "captions.json"
RECORD, ROWS = "vision_features/vit.json", "vision_features/name_map.json"
# of a JSON file: change(content, ids of the questions); the check that fails, words of its line
JSON_FAULTS = [
    (PROBLEMS, lambda all, ids: all[ids[7]].update(answer=5), "questions", "question {ids[7]}: answer 5"),
    (PROBLEMS, lambda all, ids: all[ids[7]].update(choices=["yes"]), "questions", "question {ids[7]}: has 1 choices"),
    (PROBLEMS, lambda all, ids: all[ids[7]].update(hint=None), "questions", "question {ids[7]}: hint is null"),
    (PROBLEMS, lambda all, ids: all[ids[3]].pop("lecture"), "questions", "question {ids[3]}: lacks lecture"),
    (SPLITS, lambda all, ids: all["val"].append("999999"), "splits", "split val names question 999999"),
    (SPLITS, lambda all, ids: all["train"].append(all["train"][0]), "splits", "train names question {train[0]} twice"),
    (SPLITS, lambda all, ids: all.pop("test"), "splits", "--test_split", "no split test"),
    (CAPTIONS, lambda all, ids: all.update(captions={"999999": "A cat."}), "captions", "belong to another data set"),
    (CAPTIONS, lambda all, ids: all["captions"].update({"1": None}), "captions", "question 1 is null"),
    (RECORD, lambda all, ids: all.update(rows=11208), "features", "says 11208", "extract_features.py"),
    (ROWS, lambda all, ids: all.clear() or all.update({"999999": 0}), "features", "too few of the questions",
     "0 of 5 in split test", "another data set"),
    (ROWS, lambda all, ids: all.update({next(iter(all)): "first"}), "features", "'first', not a whole number"),
    ("scienceqa/correction.json", lambda all, ids: all.pop(ids[2]), "correction", "lacks 1 of 24 train questions",
     "{ids[2]}"),
]  # fmt: skip
OTHER_FAULTS = {  # change(data folder)
    "cut JSON": (lambda data: cut(data / PROBLEMS, 9999), "questions", "problems.json is not JSON"),
    "cut PNG": (lambda data: cut(first_picture(data), -2000), "images", "question {pictured}", "does not decode"),
    "no PNG": (lambda data: first_picture(data).write_text("<html>404 Not Found</html>"), "images",
               "question {pictured}", "is no PNG, JPEG, GIF or WebP"),
    "absent image": (lambda data: shutil.rmtree(first_picture(data).parent), "images", "--strict",
                     "first {pictured}", "--images"),
    "too few rows": (lambda data: change_rows(data, lambda rows: rows[:-1]), "features", "asks for row {last}",
                     "has only {last} rows"),
    "NaN": (lambda data: change_rows(data, nan_row), "features",
            "row 4 of {data}/vision_features/vit.npy (question {fifth}) holds NaN"),
    "wrong shape": (lambda data: (data / RECORD).unlink(), "features", "needs (N, 145, 1024)"),
    "pickled features": (pickled, "features", "vit.pth"),
    "model of another img_type": (other_model, "model", "encoder.image_dense.weight", "takes features of size 256",
                                  "--img_type detr"),
    "cut weights": (lambda data: cut(data.parent / "model/model.safetensors", -500), "model",
                    "model.safetensors is damaged"),
    "no tokenizer": (lambda data: [path.unlink() for path in data.parent.glob("model/*token*")], "tokenizer",
                     "--tokenizer: none found"),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*range(len(JSON_FAULTS)), *OTHER_FAULTS])
def test_planted_fault(fault, place, capsys, t5_tokenizer):
    data = place / "data"
    train, rows = read(data / SPLITS)["train"], read(data / ROWS)
    ids, pictured = list(read(data / PROBLEMS)), first_picture(data).parent.name
    about = {"train": train, "data": data, "last": max(rows.values()), "pictured": pictured}
    about["fifth"] = next(qid for qid in rows if rows[qid] == 4)
    if fault in OTHER_FAULTS:
        if fault == "model of another img_type":
            t5_tokenizer.save_pretrained(make_model(place / "detr", patch_size=(100, 256)))
        plant, check, *words = OTHER_FAULTS[fault]
        plant(data)
    else:
        name, change, check, *words = JSON_FAULTS[fault]
        ids = train if check == "correction" else ids
        spoil(data / name, lambda content: change(content, ids))
    argv = [*flags(place), "--strict"]
    if check not in ("model", "tokenizer"):  # half of a check's time is the tokenizer's
        del argv[argv.index("--model") : argv.index("--model") + 2]
    code, lines, said = diagnose(capsys, *argv)
    assert code == 1, said
    (line,) = lines["FAIL"]
    assert line[6:16].strip() == check, line
    for word in words:
        assert word.format(ids=ids, **about) in line, line


def test_a_nan_beyond_the_sampled_rows_is_found(place, capsys):
    """The stage scripts look at some rows, the doctor at all."""
    import utils_data

    data = place / "data"
    rows = 1000
    features = np.ones((rows, 5, 8), np.float32)
    sampled = np.linspace(0, rows - 1, utils_data.SAMPLE_ROWS, dtype=int)
    features[sampled[3] + 1, 0, 0] = np.inf
    np.save(data / "vision_features/vit.npy", features)
    args = doctor.parse_args(flags(place))
    utils_data.open_features(args)
    code, lines, _ = diagnose(capsys, *flags(place))
    assert code == 1 and f"row {sampled[3] + 1} of" in lines["FAIL"][0]
    features[sampled[3], 0, 0] = np.nan
    np.save(data / "vision_features/vit.npy", features)
    with pytest.raises(UserError, match=f"row {sampled[3]} of .* holds NaN or infinity"):
        utils_data.open_features(args)


def test_key_is_told_but_never_shown(clean, monkeypatch, capsys):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    code, lines, said = diagnose(capsys, "--data_root", clean / "data")
    assert code == 0 and any("ANTHROPIC_API_KEY is not set" in line for line in lines["warn"])
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk ant secret")
    code, lines, said = diagnose(capsys, "--data_root", clean / "data")
    assert code == 1 and "ANTHROPIC_API_KEY holds characters" in lines["FAIL"][0] and "secret" not in said


def test_packages():
    doctor.packages("numpy>=1\n# tests and lint\nno-such-package>=1\n")
    with pytest.raises(UserError, match="numpy>=99 is needed, .* is installed; no-such-package is not installed: pip"):
        doctor.packages("# direct\nnumpy>=99\nno-such-package\n")


def test_memory_of_a_gpu(capsys):
    """base, 252 M parameters: 4 GB for SFT, 8 GB for RL, before activations."""
    with pytest.raises(UserError, match=r"GPU 1 has 3.0 GB free; .* 4.0 GB in SFT and 8.1 GB in RL"):
        doctor.check_memory(1, 3_000_000_000, 252_000_000)
    doctor.check_memory(0, 6_000_000_000, 252_000_000)
    assert "warning: GPU 0 has 6.0 GB free" in capsys.readouterr().err
    doctor.check_memory(0, 8_100_000_000, 252_000_000)
    assert not capsys.readouterr().err


def test_disk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    for free, parameters, enough in ((72_000, 1000, True), (71_999, 1000, False), (10**9, None, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if enough:
            doctor.disk(parameters)
        else:
            with pytest.raises(UserError, match=r"GB free, a run may take .*--run_dir"):
                doctor.disk(parameters)


def test_the_first_faults_of_a_check_are_named_and_the_others_counted():
    doctor.refuse([])
    for count, end in ((5, "fault 4"), (6, "fault 4 (and 1 more)"), (9, "fault 4 (and 4 more)")):
        with pytest.raises(UserError) as refusal:
            doctor.refuse([f"fault {number}" for number in range(count)])
        assert str(refusal.value).split("; ") == [*(f"fault {number}" for number in range(4)), end]


def test_status_of_a_real_launch(clean, tmp_path):
    with pytest.raises(UserError, match="--vision_features: no effect without --img_type"):
        doctor.main(["--data_root", str(clean / "data"), "--vision_features", "x"])
    # what the terminal's encoding cannot show is printed as escapes
    folder = shutil.copytree(clean / "data", tmp_path / "d\u00e4t\u4e2d")
    (folder / "scienceqa/pid_splits.json").write_text("{}")
    done = run_script("tools/doctor.py", "--data_root", folder, env={"LC_ALL": "C", "LANG": "C", **C}, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^ok    questions .*d\\udcc3\\udca4t", done.stdout, re.M), done.stdout
    assert re.search(r"^FAIL  splits +--train_split: .* no split train", done.stdout, re.M)
    assert "doctor.py: error: 1 checks failed" in done.stderr


# -- the same per split and stage; all faults in one go ------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("kind", ["features", "captions"])
def test_a_split_without_its_features_or_captions(kind, split, place, capsys):
    """Where a stage would stop the doctor fails, and the other way round: features or captions of the others only."""
    import argparse

    import utils_data
    from ares.cli import add_common_flags

    data = place / "data"
    splits, problems = read(data / SPLITS), read(data / PROBLEMS)
    write(data / PROBLEMS, {qid: {**each, "image": "image.png"} for qid, each in problems.items()})
    rows = {qid: 0 for name in ("train", "val", "test") for qid in splits[name] if name != split}
    everything = dict.fromkeys(problems, 0)
    write(data / "vision_features/name_map.json", rows if kind == "features" else everything)
    write(data / "captions.json", dict.fromkeys(rows if kind == "captions" else everything, "A picture."))
    code, lines, said = diagnose(capsys, *flags(place))
    (line,) = lines_of(kind, lines["FAIL"])
    assert code == 1 and f"0 of {len(splits[split])} in split {split}" in line, said
    parser = argparse.ArgumentParser()
    add_common_flags(parser, output_len=64, lr=5e-5)
    args = parser.parse_args(flags(place)[:7])
    for stage in ({"train": "train"}, {"train": "train", "val": "val", "test": "test"}):  # RL; SFT and LoRA
        if split in stage:
            with pytest.raises(UserError, match=f"0 of {len(splits[split])} in split {split}"):
                utils_data.load_data(args, stage)
        else:
            utils_data.load_data(args, stage)


@pytest.mark.parametrize("name", ["models/mm-cot-base", "experiments", "no-such/model", "./models/x", "a/b/c"])
def test_a_missing_model_folder_is_no_hub_id(name, clean, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, lines, said = diagnose(capsys, "--data_root", clean / "data", "--model", name)
    (line,) = lines_of("model", lines["FAIL"])
    assert code == 1 and name.removeprefix("./") in line and "--model" in line, said


def test_a_model_in_the_cache_of_the_hub_is_one(clean, capsys, monkeypatch, tmp_path):
    """As the hub's client lays it out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--declare-lab--flan-alpaca-base/snapshots/0123"
    shutil.copytree(clean / "model", snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0123")
    name, data = "declare-lab/flan-alpaca-base", clean / "data"
    code, lines, said = diagnose(capsys, "--data_root", data, "--model", name, "--tokenizer", clean / "model")
    assert code == 0 and any("declare-lab/flan-alpaca-base is in the cache" in line for line in lines["ok"]), said


def test_all_faults_in_one_go(place, capsys):
    """Five files are spoilt; one run names them all, and within a check every kind of fault."""
    data = place / "data"
    path = data / "scienceqa/problems.json"
    ids = list(read(path))
    spoil(path, lambda found: found[ids[1]].update(answer=9) or found[ids[2]].pop("hint"))
    for name in ("captions.json", "scienceqa/correction.json", "vision_features/name_map.json"):
        (data / name).write_text("{")
    (place / "model/config.json").write_text("{")
    code, lines, said = diagnose(capsys, *flags(place))
    assert {line.split()[1] for line in lines["FAIL"]} >= {"questions", "captions", "correction", "features", "model"}
    (line,) = lines_of("questions", lines["FAIL"])
    assert f"question {ids[1]}: answer 9" in line and f"question {ids[2]}: lacks hint" in line


def test_all_faults_of_splits_and_images_in_one_go(place, capsys):
    broken = sorted((place / "data/images").glob("*/image.png"))[:3]
    for path in broken:
        path.write_bytes(b"no image")
    code, lines, said = diagnose(capsys, *flags(place), "--train_split", "trian", "--val_split", "vla")
    (line,) = lines_of("splits", lines["FAIL"])
    assert "--train_split" in line and "--val_split" in line
    (line,) = lines_of("images", lines["FAIL"])
    assert all(f"question {path.parent.name}" in line for path in broken)
    two = lambda splits: splits["val"].append("999999") or splits["test"].append(splits["test"][0])  # noqa: E731
    spoil(place / "data" / SPLITS, two)
    code, lines, said = diagnose(capsys, *flags(place))
    (line,) = lines_of("splits", lines["FAIL"])
    assert "split val names question 999999" in line and "split test names question" in line


@pytest.mark.parametrize("record", [{"weights": "random", "weights_file": "seed 5"}, {"weights_file": "seed 5"}])
def test_features_of_random_weights_are_warned_of(record, place, capsys):
    spoil(place / "data/vision_features/vit.json", lambda sidecar: sidecar.update(record))
    code, lines, said = diagnose(capsys, *flags(place))
    (line,) = lines_of("features", lines["warn"])
    assert code == 0 and "random weights" in line, said


UNUSABLE = [
    {"ALL_PROXY": "socks://user:hidden@localhost:1"}, {"all_proxy": "socks5://user:hidden@localhost:1"},
    {"HTTPS_PROXY": "ftp://localhost:1"}, {"http_proxy": "socks4://localhost:1"},
    {"SSL_CERT_FILE": "/nowhere/ca.pem"}, {"SSL_CERT_DIR": "/nowhere"}, {"SSL_CERT_FILE": "/etc/hostname"},
]  # fmt: skip


@pytest.mark.parametrize("environment", UNUSABLE)
def test_proxies_and_certificates_that_cannot_be_used(environment, clean, monkeypatch, capsys):
    """The doctor and the Teacher's client say so in one line, which does not show a proxy's password."""
    import asyncio

    from teacher.claude import ClaudeTeacher

    async def enter():
        async with ClaudeTeacher():
            pass

    ((name, value),) = environment.items()
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refusal:
        asyncio.run(enter())
    said = str(refusal.value)
    assert name in said and "hidden" not in said and "\n" not in said and "unset it" in said
    code, lines, _ = diagnose(capsys, "--data_root", clean / "data")
    assert code == 1 and [line for line in lines["FAIL"] if line.split()[1:3] == ["api", "key"] and name in line]


C = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "ascii:strict"}, {"LC_ALL": "C", "LANG": "C", **C},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
])  # fmt: skip
def test_a_terminal_without_utf8(environment):
    """What it cannot show is printed as escapes; nothing fails. (A whole script: test_status_of_a_real_launch.)"""
    words = r"cli.print0('\u4e2d caf\u00e9') or cli.warn0('\u00fc') or cli.refuse(['\u4e2d'])"
    code = f"from ares import cli; cli.run(lambda: {words})"
    done = run_script("-c", code, env=environment, check=False)
    assert done.returncode == 2 and done.stdout == "\\u4e2d caf\\xe9\n", done.stdout
    assert done.stderr == "warning: \\xfc\n-c: error: \\u4e2d\n"
