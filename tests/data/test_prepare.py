"""tools/prepare_data.py: real questions through every form in which the data sets are published, and back again."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image

from ares.cli import UserError
from ares.images import media_type
from tests.conftest import ROOT, one_line_error, run_script
from tools import prepare_data

COLUMNS = "question choices answer hint task grade subject topic category skill lecture solution".split()


@pytest.fixture(scope="module")
def real(sample):
    """30 real questions of each split, those with an image first where the sample has the image."""
    folder = sample / "ScienceQA/data/scienceqa"
    problems, splits = (json.loads((folder / f"{name}.json").read_text()) for name in ("problems", "pid_splits"))
    have = {path.name for path in (sample / "images").iterdir()}
    chosen = {}
    for split in ("train", "val", "test"):
        pictured = [qid for qid in splits[split] if qid in have][:20]
        plain = [qid for qid in splits[split] if problems[qid]["image"] is None and qid not in have]
        chosen[split] = sorted(pictured + plain[: 30 - len(pictured)], key=int)
    return SimpleNamespace(problems=problems, splits=chosen, images=sample / "images", folder=folder)


def picture_file(real, qid) -> Path | None:
    file = real.images / qid / "image.png"
    return file if real.problems[qid]["image"] and file.is_file() else None


def public_tables(real, pictures=None, ids=False) -> datasets.DatasetDict:
    """The questions in the schema of derek-thomas/ScienceQA: no ids, the picture's bytes in a column."""
    schema = {name: datasets.Value("string") for name in (*COLUMNS, *(["pid"] if ids else []))}
    schema |= {"choices": [datasets.Value("string")], "answer": datasets.Value("int8"), "image": datasets.Image()}
    tables = {}
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        rows = []
        for qid in real.splits[split]:
            file = picture_file(real, qid)
            data = (pictures or {}).get(qid) or (file.read_bytes() if file else None)
            row = {key: real.problems[qid][key] for key in COLUMNS} | ({"pid": qid} if ids else {})
            rows.append(row | {"image": {"bytes": data, "path": None} if data else None})
        tables[name] = datasets.Dataset.from_list(rows, features=datasets.Features(schema))
    return datasets.DatasetDict(tables)


@pytest.fixture(scope="module")
def tables(real):
    return public_tables(real)


def save(table, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(file)


def prepare(source, out, *flags, dataset="scienceqa"):
    prepare_data.main([dataset, "--source", str(source), "--output", str(out), *map(str, flags)])
    return [json.loads((Path(out) / dataset / f"{name}.json").read_text()) for name in ("problems", "pid_splits")]


def as_published(real, qid) -> dict:
    """The question with its picture named only where the sample has one, as a data set with pictures inside has it."""
    return {**real.problems[qid], "image": "image.png" if picture_file(real, qid) else None}


@pytest.mark.parametrize("form", ["save_to_disk", "{}-00000-of-00001.parquet", "{}/0000.parquet"])
def test_public_schema_and_back(form, real, tables, tmp_path, capsys):
    """Field by field. Without ids, questions are numbered in the order of the splits, which is said."""
    for name, table in tables.items() if form.endswith("parquet") else ():
        save(table, tmp_path / "source/data" / form.format(name))
    if form == "save_to_disk":
        tables.save_to_disk(str(tmp_path / "source"))
    problems, splits = prepare(tmp_path / "source", tmp_path / "out")
    assert "no ids: questions are numbered 1 to 90" in capsys.readouterr().out
    original = [qid for split in ("train", "val", "test") for qid in real.splits[split]]
    assert list(problems) == [str(number) for number in range(1, 91)]
    for (number, ours), qid in zip(problems.items(), original, strict=True):
        theirs = as_published(real, qid)
        assert list(ours.items()) == list(theirs.items())
        assert type(ours["answer"]) is int
        written = tmp_path / "out/images" / number / "image.png"
        assert written.exists() == bool(theirs["image"])
        if theirs["image"]:
            assert written.read_bytes() == picture_file(real, qid).read_bytes()  # not encoded again
    assert sum(bool(problem["image"]) for problem in problems.values()) >= 15
    assert splits["val"] == [str(number) for number in range(31, 61)]
    assert not (tmp_path / "out/scienceqa/id_map.json").exists()


def test_several_configurations_are_refused_unless_one_is_named(tables, tmp_path, monkeypatch):
    """Each would be read into the same splits: questions twice, or of another data set."""
    table = next(iter(tables.values()))
    for number, (names, places) in enumerate((
        ("FULL/train-0 FULL/val-0 FULL/test-0 IMG/train-0 IMG/val-0 IMG/test-0", ["FULL", "IMG"]),
        ("FULL/train/0 FULL/validation/0 FULL/test/0 IMG/train/0 IMG/validation/0 IMG/test/0", ["FULL", "IMG"]),
        ("data/train-0 data/dev-0 data/test-0 old/validation-0", ["data", "old"]),
        ("train-0 val-0 test-0 copy/test-0", ["copy"]),
    )):  # fmt: skip
        for name in names.split():
            save(table, tmp_path / f"{number}/{name}.parquet")
        with pytest.raises(UserError, match="configurations") as refusal:
            prepare(tmp_path / str(number), tmp_path / "out")
        assert all(place in str(refusal.value) for place in places) and not (tmp_path / "out").exists()
    for place in ("FULL", "IMG"):
        tables.save_to_disk(str(tmp_path / f"disk/{place}"))
        for name, table in tables.items():
            for part in range(2):  # in two shards
                save(table.shard(2, part), tmp_path / f"source/{place}/{name}/000{part}.parquet")
    assert len(prepare(tmp_path / "source/IMG", tmp_path / "out")[0]) == 90
    with pytest.raises(UserError, match="holds 2 data sets .FULL, IMG."):
        prepare(tmp_path / "disk", tmp_path / "other")
    # of the hub: the error is the library's own, of a data set with two configurations and no default
    for place in "ab":
        save(datasets.Dataset.from_list([{"question": "?"}]), tmp_path / f"hub/{place}/train.parquet")
    configs = "\n".join(f"- config_name: S-{place}\n  data_files: {place}/*.parquet" for place in "ab")
    (tmp_path / "hub/README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    library = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda where: library(str(tmp_path / "hub")))
    with pytest.raises(UserError, match="--source: some/data has several configurations, .*S-a.*S-b") as refusal:
        prepare("some/data", tmp_path / "out")
    assert "\n" not in str(refusal.value)


def test_official_folder(real, tmp_path, capsys):
    """The whole sample; of images one file per question is linked or copied under its own name."""
    problems, splits = prepare(real.folder, tmp_path / "out", "--images", real.images)
    assert problems == real.problems
    assert splits == json.loads((real.folder / "pid_splits.json").read_text())
    for folder in real.images.iterdir():
        written = tmp_path / "out/images" / folder.name
        assert {path.name: path.read_bytes() for path in written.iterdir()} == {
            path.name: path.read_bytes() for path in folder.iterdir()
        }
    said = capsys.readouterr()
    assert "664 questions name an image that is not there (the first is 1)" in said.err
    assert "1473 questions (862 train, 321 val, 290 test), 58 with pictures" in said.out
    with pytest.raises(UserError, match="--strict: question 1: names an image that is not there"):
        prepare(real.folder, tmp_path / "out", "--images", real.images, "--strict")


def test_minis_are_made_where_absent_and_only_there(real, tmp_path):
    """ScienceQA's own are 1,272, 424 and 424 questions drawn at random; ours stand in where there are none."""
    splits = {name: [str(i) for i in range(count)] for name, count in (("train", 900), ("val", 70), ("test", 10))}
    made = prepare_data.with_minis({**splits, "minival": ["3"]})
    sizes = {name: len(qids) for name, qids in made.items()}
    assert sizes == {
        **{"train": 900, "val": 70, "test": 10, "trainval": 900, "minival": 1},  # trainval: an id counts once
        **{"minitrain": 64, "miniminitrain": 256, "miniminival": 4, "minitest": 10},
    }
    splits, draw = json.loads((real.folder / "pid_splits.json").read_text()), random.Random(0).sample
    own = {"minitrain": draw(splits["train"], 70), "minival": draw(splits["val"], 20)}
    own |= {"minitest": draw(splits["test"], 20), "hardtrain": draw(splits["train"], 9)}
    (tmp_path / "source").mkdir()
    shutil.copy(real.folder / "problems.json", tmp_path / "source")
    given = {name: splits[name] for name in ("train", "val", "test")} | own
    (tmp_path / "source/pid_splits.json").write_text(json.dumps(given))
    made = prepare(tmp_path / "source", tmp_path / "out")[1]
    assert {name: made[name] for name in given} == given
    assert made["miniminival"] == splits["val"][:4] and len(made["trainval"]) == 862 + 321


def test_ids_and_pictures_of_other_formats(real, tmp_path):
    """Ids are kept. JPEG stays as it is, byte by byte; what the Teacher's API does not take becomes PNG."""
    image = Image.new("RGB", (20, 10), (200, 30, 30))
    forms = {name: io.BytesIO() for name in ("JPEG", "BMP", "TIFF")}
    for name, out in forms.items():
        image.convert("CMYK" if name == "TIFF" else "RGB").save(out, format=name)
    first, second, third, fourth = real.splits["train"][:4]
    pictures = {first: forms["JPEG"].getvalue(), second: forms["BMP"].getvalue(), third: b"rubbish"}
    pictures[fourth] = forms["TIFF"].getvalue()
    public_tables(real, pictures, ids=True).save_to_disk(str(tmp_path / "source"))
    problems, splits = prepare(tmp_path / "source", tmp_path / "out")
    assert {name: splits[name] for name in real.splits} == real.splits
    other = {qid: as_published(real, qid) for qids in real.splits.values() for qid in qids if qid not in pictures}
    assert len(problems) == 90 and {qid: problems[qid] for qid in other} == other
    written = {qid: tmp_path / "out/images" / qid / "image.png" for qid in pictures}
    assert written[first].read_bytes() == pictures[first]
    assert media_type(written[second].read_bytes()[:12]) == "image/png"
    assert list(Image.open(written[second]).getdata()) == list(image.getdata())
    assert media_type(written[fourth].read_bytes()[:12]) == "image/png", "PNG has no CMYK"
    assert not written[third].exists()
    with pytest.raises(UserError, match=f"--strict: question {third}: image.png: cannot identify"):
        prepare(tmp_path / "source", tmp_path / "out", "--strict")


def test_a_disk_that_takes_no_more_stops_it(real, tmp_path):
    """Nothing that looks finished is left."""
    qid = next(qid for qid in real.splits["test"] if picture_file(real, qid))
    (tmp_path / "out/images").mkdir(parents=True)
    (tmp_path / "out/images" / qid).touch()
    with pytest.raises(UserError, match=f"--output: cannot write .*images/{qid}/image.png"):
        prepare(real.folder, tmp_path / "out", "--images", real.images)
    assert not (tmp_path / "out/scienceqa/problems.json").exists()


def test_kill_and_run_again(real, tmp_path):
    """SIGKILL among the images: problems.json is not there yet; the same command finishes, and repeats for free."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare(real.folder, whole, "--images", real.images)
    command = [ROOT / "tools/prepare_data.py", "scienceqa", "--source", real.folder, "--images", real.images]
    command += ["--output", out]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, **quiet)
    while process.poll() is None and not (out / "images").is_dir():
        time.sleep(0.0005)
    process.kill()
    process.wait()
    assert not (out / "scienceqa/problems.json").exists()
    prepare(real.folder, out, "--images", real.images)

    def content(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert content(out) == content(whole)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}
    prepare(real.folder, out, "--images", real.images)
    assert {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")} == stamps


def test_another_data_set_is_not_replaced(real, tables, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    tables.save_to_disk(str(source))
    prepare(real.folder, out)
    before = (out / "scienceqa/problems.json").read_bytes()
    with pytest.raises(UserError, match="--output: .*problems.json is there and differs; add --overwrite"):
        prepare(source, out)
    assert (out / "scienceqa/problems.json").read_bytes() == before
    # 31 to 60 are numbered anew: a picture of the other numbering must not stay with such a question
    number = next(str(31 + i) for i, qid in enumerate(real.splits["val"]) if not picture_file(real, qid))
    (out / "images" / number).mkdir(parents=True)
    with pytest.raises(UserError, match=f"holds pictures for 1 questions .*the first is {number}"):
        prepare(source, out, "--overwrite")
    shutil.rmtree(out / "images")
    assert len(prepare(source, out, "--overwrite")[0]) == 90


# its official files: tests/data/test_aokvqa.py


def test_aokvqa_of_the_hub(tmp_path):
    """The columns of HuggingFaceM4/A-OKVQA: direct answers as text, no image ids, a test split without answers."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, format="JPEG")

    def row(number, split):
        hidden = split == "test"
        return {
            "image": {"bytes": out.getvalue(), "path": None},
            "question_id": f"22Mex{number}",
            "question": f"What is number {number}?",
            "choices": ["cab", "train", "bus", "van"],
            "correct_choice_idx": None if hidden else number % 4,
            "direct_answers": None if hidden else "['cab', 'a \"yellow\" cab']",
            "difficult_direct_answer": False,
            "rationales": [] if hidden else ["He waits for it", " The road is  wide. ", ""],
        }

    schema = datasets.Features(
        {
            "image": datasets.Image(),
            **{name: datasets.Value("string") for name in ("question_id", "question", "direct_answers")},
            **{name: [datasets.Value("string")] for name in ("choices", "rationales")},
            "correct_choice_idx": datasets.Value("int8"),
            "difficult_direct_answer": datasets.Value("bool"),
        }
    )
    parts = {"train": range(5), "validation": range(5, 8), "test": range(8, 10)}
    tables = {name: datasets.Dataset.from_list([row(i, name) for i in part], schema) for name, part in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "source"))
    problems, splits = prepare(tmp_path / "source", tmp_path / "out", dataset="aokvqa")
    assert splits["test"] == splits["val"] == ["22Mex5", "22Mex6", "22Mex7"] and len(problems) == 8
    assert problems["22Mex6"]["solution"] == "He waits for it. The road is wide."
    assert problems["22Mex6"]["direct_answers"] == ["cab", 'a "yellow" cab'] and problems["22Mex6"]["answer"] == 2
    assert (tmp_path / "out/images/22Mex6/image.png").read_bytes() == out.getvalue()
    ids = json.loads((tmp_path / "out/aokvqa/id_map.json").read_text())
    assert ids["22Mex6"] == {"question_id": "22Mex6", "image_id": None}


def test_mistakes(real, tmp_path):
    done = run_script("tools/prepare_data.py", "scienceqa", "--source", tmp_path / "none", check=False)
    one_line_error(done, "--source", "is no folder")
    for name in ("empty", "broken", "half", "vqa"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken/train-0.parquet").write_bytes(b"PAR1 and no more")
    shutil.copy(real.folder / "problems.json", tmp_path / "half")
    (tmp_path / "half/pid_splits.json").write_text(json.dumps({"train": real.splits["train"]}))
    (tmp_path / "vqa/aokvqa_v1p0_train.json").write_text("[]")
    for (dataset, source, *flags), words in (
        (["scienceqa", "empty"], "neither the official files, nor a DatasetDict"),
        (["scienceqa", "broken"], "cannot read .*broken"),
        (["scienceqa", "half"], "has no split val"),
        (["scienceqa", "nobody/nothing-here"], "no folder here, and cannot be downloaded from the hub"),
        (["scienceqa", real.folder, "--images", "gone"], "--images: gone is no folder"),
        (["scienceqa", "empty", "--images", "x"], "--images: the images of .* come with it"),
        (["aokvqa", "vqa"], "has no aokvqa_v1p0_val.json"),
    ):
        source = source if source == "nobody/nothing-here" else tmp_path / source
        with pytest.raises(UserError, match=words):
            prepare(source, tmp_path / "out", *flags, dataset=dataset)
        assert not (tmp_path / "out").exists()


ENTRY = {"question": "What?", "choices": ["x", "y"], "correct_choice_idx": 0, "rationales": ["So."]}


def write_entries(folder: Path, **splits: list[dict]) -> None:
    for split, entries in splits.items():
        (folder / f"aokvqa_v1p0_{split}.json").write_text(json.dumps([ENTRY | entry for entry in entries]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"correct_choice_idx": 7}, r"val.json, entry 1 \(question b\): answer 7 is out of range"),
        ({"correct_choice_idx": None}, "entry 1 .*answer is null"),
        ({"rationales": "one"}, "entry 1: rationales is not a list of texts"),
        ({"question_id": "a"}, "entry 1 .*its id comes twice"),
        ({"choices": ...}, "entry 1: no field 'choices'"),
        ({"choices": "xy"}, "entry 1 .*choices is not a list of texts"),
        ({"direct_answers": "['one"}, "entry 1: direct_answers is not a list: unterminated"),
    ],
)
def test_a_bad_entry_is_named(change, words, tmp_path):
    write_entries(tmp_path, train=[{"question_id": "t", "image_id": 4}], val=[{"question_id": "a", "image_id": 4}])
    bad = {key: value for key, value in (ENTRY | {"question_id": "b", "image_id": 4} | change).items() if value != ...}
    path = tmp_path / "aokvqa_v1p0_val.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), bad]))
    with pytest.raises(UserError, match=words):
        prepare(tmp_path, tmp_path / "out", dataset="aokvqa")


@pytest.mark.parametrize(
    "name",
    [
        "train2014/COCO_train2014_000000000004.jpg", "val2014/COCO_val2014_000000000004.jpg",
        "test2015/COCO_test2015_000000000004.jpg", "COCO_val2014_000000000004.jpg",
        "images/train2014/COCO_train2014_000000000004.jpg", "images/val2017/000000000004.jpg",
        "train2017/000000000004.jpg", "000000000004.jpg", "4.png",
    ],
)  # fmt: skip
@pytest.mark.parametrize("image_id", [4, "4"])
def test_coco_images_under_both_of_their_names(name, image_id, tmp_path, capsys):
    val = [{"question_id": "val", "image_id": 5}, {"question_id": "bare"}]  # without image_id: no picture
    write_entries(tmp_path, train=[{"question_id": "train", "image_id": image_id}], val=val)
    (tmp_path / "coco/train2017").mkdir(parents=True)
    for path in (tmp_path / "coco" / name, tmp_path / "coco/train2017/000000000005.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 5)).save(path, format="JPEG")
    prepare(tmp_path, tmp_path / "out", "--images", tmp_path / "coco", dataset="aokvqa")
    assert (tmp_path / "out/images/train/image.png").samefile(tmp_path / "coco" / name)
    assert (tmp_path / "out/images/val/image.png").is_file()
    assert "1 questions name an image that is not there (the first is bare)" in capsys.readouterr().err
