"""The data folder, vision features and batches, on the real sample; and one clear line for each fault in them."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import utils_data
from ares import data_folder as files
from ares.cli import UserError, add_common_flags
from utils_data import Collator, RationaleDataset, VisionFeatures, load_data, read_le

MINI = {"train": "minitrain", "val": "minival", "test": "minitest"}
DIM = 3  # of the small features of these tests, whose sidecar tells their shape


def parse(*argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_common_flags(parser, output_len=64, lr=5e-5)
    return parser.parse_args([str(arg) for arg in argv])


@pytest.fixture
def real(sample):
    """Flags of the real sample."""
    root = sample / "ScienceQA/data"
    return parse("--data_root", root, "--caption_file", sample / "instruct_captions.json", "--use_caption")


def question(**changes):
    usual = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None,
             "lecture": "", "solution": "Because b."}  # fmt: skip
    return {**usual, **changes}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A small data root, alone in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    problems = {str(n): question(image="image.png" if n % 2 else None) for n in range(1, 7)}
    put(root / "scienceqa/problems.json", problems)
    splits = {"train": ["1", "2", "3"], "val": ["4"], "test": ["6", "5"], "minitest": ["5"]}
    put(root / "scienceqa/pid_splits.json", splits)
    return root


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def change(path, *keys, to):
    """Set (or, with `...`, delete) one entry of a JSON file."""
    value = json.loads(path.read_text())
    inner = value
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    if to is ...:
        del inner[keys[-1]]
    put(path, value)


def put_features(root, rows=4, shape=(2, DIM), name="vit.npy", name_map=None):
    """Small features with their sidecar, and the name map beside them."""
    folder = root / "vision_features"
    folder.mkdir(exist_ok=True)
    values = np.arange(rows * np.prod(shape), dtype=np.float32).reshape(rows, *shape) / 8
    np.save(folder / name, values)
    put(folder / f"{name.split('.')[0]}.json", {"shape": [2, DIM], "weights": "local"})
    put(folder / "name_map.json", {"1": "0", "3": 1, "5": "3"} if name_map is None else name_map)
    return values


def fails(*words, argv=(), splits=None, root="data"):
    """`load_data` raises one UserError of one line that holds all of `words`."""
    with pytest.raises(UserError) as caught:
        load_data(parse("--data_root", root, *argv), splits or {"train": "train", "val": "val", "test": "test"})
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# -- the real sample ---------------------------------------------------------------------------------------


def test_real_sample(real, sample, tmp_path, monkeypatch):
    data = load_data(real, {"train": "train", "val": "val", "test": "test"})
    assert data.dataset == "scienceqa" and data.features is None and data.patch_size is None
    assert {role: len(qids) for role, qids in data.qids.items()} == {"train": 862, "val": 321, "test": 290}
    captions = json.loads(open(real.caption_file, encoding="utf-8").read())["captions"]
    assert {qid: p["caption"] for qid, p in data.problems.items() if p["caption"]} == captions
    assert len(captions) > 300
    mini = load_data(real, {"train": "minitrain", "test": "minitest"})
    assert {role: len(qids) for role, qids in mini.qids.items()} == {"train": 64, "test": 64}
    # the released command: nothing named but --data_root and --caption_file; features where MM-CoT has them
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vision_features").mkdir()
    np.save(tmp_path / "vision_features/resnet.npy", np.ones((778, 2048), np.float16))
    argv = ["--data_root", sample / "ScienceQA/data", "--use_caption", "--img_type", "resnet"]
    for more in ([], ["--caption_file", sample / "instruct_captions.json"]):
        args = parse(*argv, *more)
        data = load_data(args, {"train": "train", "val": "val", "test": "test"})
        assert len(data.features.name_map) == 778 and data.problems["1"]["caption"]
        assert files.find_images(args).resolve() == (sample / "images").resolve()


def test_names_that_mm_cot_users_import(real, sample, tmp_path):
    """Their own flags, which know nothing of ours, must do; image features are indexed as they always were."""
    theirs = {key: value for key, value in vars(real).items() if key not in ("dataset", "vision_features", "name_map")}
    theirs.update(train_split="minitrain", val_split="minival", test_split="minitest", img_type="vit")
    problems, qids = utils_data.load_data_std(argparse.Namespace(**theirs))
    assert list(qids) == ["train", "val", "test"] and len(qids["train"]) == 64 and len(problems) == 1473
    pictured = [qid for role in qids.values() for qid in role if problems[qid]["image"]]
    features = np.random.default_rng(0).standard_normal((6, 145, 1024), dtype=np.float32)  # of ViT's true shape
    np.save(tmp_path / "vit.npy", features)
    put(tmp_path / "name_map.json", {qid: str(row % 6) for row, qid in enumerate(pictured)})
    args = argparse.Namespace(**{**theirs, "vision_features": tmp_path, "name_map": None})
    _, _, name_maps, image_features = utils_data.load_data_img(args)
    assert len(image_features) == 6 and image_features.shape == utils_data.img_shape["vit"]
    for row, qid in enumerate(pictured[:6]):
        assert np.array_equal(image_features[int(name_maps[str(qid)])].numpy(), features[row])


def test_batches_of_real_questions(real, t5_tokenizer):
    """Pre-tokenised once; right padding to the longest row; the mask follows lengths; labels end in -100."""
    real.prompt_format, real.input_len, real.output_len = "QCM-E", 128, 48
    data = load_data(real, {"train": "minitrain"})
    dataset = RationaleDataset(data.problems, data.qids["train"], t5_tokenizer, real)
    assert [dataset[i]["qid"] for i in range(64)] == data.qids["train"]
    items = [dataset[i] for i in range(8)]
    batch = Collator(t5_tokenizer.pad_token_id, with_qids=True)(items)
    assert batch["qids"] == data.qids["train"][:8]
    assert batch["input_ids"].shape == (8, max(len(item["input_ids"]) for item in items))
    assert batch["labels"].shape == (8, max(len(item["labels"]) for item in items))
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == batch["labels"].dtype == torch.int64
    for row, item in enumerate(items):
        n, m = len(item["input_ids"]), len(item["labels"])
        assert n <= 128 and m <= 48
        assert batch["input_ids"][row, :n].tolist() == item["input_ids"] and not batch["input_ids"][row, n:].any()
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        assert batch["labels"][row, :m].tolist() == item["labels"] and (batch["labels"][row, m:] == -100).all()
        assert item["input_ids"][-1] == item["labels"][-1] == 1
        assert t5_tokenizer(dataset.prompts[row], truncation=True, max_length=128)["input_ids"] == item["input_ids"]


def test_name_map_and_images_of_the_sample(sample, tmp_path):
    rows = files.load_name_map(sample / "name_map.json")
    assert len(rows) == 778 and set(rows.values()) == set(range(778))

    def names(qid, folder=sample / "images"):
        return [path.name for path in files.question_images(folder, qid)]

    assert names("293") == ["image.png", "choice_0.png", "choice_1.png", "choice_2.png"]
    assert (names("363"), names("1009"), names("1")) == (["choice_0.png", "choice_1.png"], ["image.png"], [])
    folders = [path.name for path in (sample / "images").iterdir()]
    assert len(folders) == 58 and sum(names(qid)[0] != "image.png" for qid in folders) == 3
    for name in ("choice_10.png", "choice_2.png", "image.png", "choice_0.png", "notes.txt"):
        put(tmp_path / "val/12" / name, "x")
    assert names("12", tmp_path) == ["image.png", "choice_0.png", "choice_2.png", "choice_10.png"]


# -- finding files -------------------------------------------------------------------------------------------


def test_aokvqa_in_the_same_schema(root):
    shutil.move(root / "scienceqa", root / "aokvqa")
    data = load_data(parse("--data_root", root), {"train": "train", "test": "test"})
    assert data.dataset == "aokvqa" and data.qids["test"] == ["6", "5"]
    (root / "scienceqa").mkdir()  # a folder without problems.json is no second data set
    assert files.find_dataset(root) == "aokvqa"
    shutil.copy(root / "aokvqa/problems.json", root / "scienceqa")
    with pytest.raises(UserError, match="holds aokvqa and scienceqa; choose one with --dataset"):
        files.find_dataset(root)
    assert files.find_dataset(root, "aokvqa") == "aokvqa"
    (root / "scienceqa/problems.json").write_text("{")  # the other one is not even read
    problems, _ = utils_data.load_data_std(parse("--data_root", root, "--dataset", "aokvqa", "--val_split", "test"))
    assert problems
    shutil.move(root / "aokvqa", root / "mine")  # any name will do where it is the only one, or is given
    assert files.find_dataset(root) == "scienceqa"
    shutil.rmtree(root / "scienceqa")
    assert files.find_dataset(root) == "mine"


def test_dataset_faults(root, tmp_path):
    fails("--dataset", "no subfolder vqa", "it holds scienceqa", argv=["--dataset", "vqa"])
    fails("--data_root", "no folder", root="nowhere")
    fails("--data_root", "itself a data set", root="data/scienceqa")
    (root / "scienceqa/problems.json").unlink()
    fails("--data_root", "neither scienceqa/problems.json nor aokvqa/problems.json")
    fails("scienceqa/problems.json does not exist", argv=["--dataset", "scienceqa"])


def test_captions(root, capsys):
    """Either default name; few of a split's questions with a caption: an error with counts; half: a warning."""
    args = parse("--data_root", root, "--use_caption")
    use = ["--use_caption"]
    words = "no captions.json or instruct_captions.json in"
    fails("--caption_file", words, "drop --use_caption", argv=use)
    put(root / "instruct_captions.json", {"1": "bare"})
    assert load_data(args, {"train": "train"}).problems["1"]["caption"] == "bare"
    assert "instruct_captions.json" in capsys.readouterr().out
    put(root / "captions.json", {"captions": {"3": "keyed"}})
    data = load_data(args, {"train": "train"})
    assert [data.problems[qid]["caption"] for qid in ("1", "2", "3")] == ["", "", "keyed"]
    args.use_caption = False
    assert load_data(args, {"train": "train"}).problems["3"]["caption"] == ""
    fails("--caption_file", "c.json does not exist", argv=[*use, "--caption_file", "c.json"])
    for captions, words in (
        ({"captions": {"1": None}}, "question 1 is null"),
        (["a"], "must hold"),
        ({"1": "x"}, "0 of 1 in split test (none for 5)"),
        ({"5": "x"}, "0 of 2 in split train (none for 1)"),
        ({"9": "x"}, "0 of 2 in split train (none for 1), 0 of 1 in split test (none for 5)"),
    ):
        put(root / "captions.json", captions)
        said = fails("--caption_file", words, argv=use)
        assert ("another data set" in said) == ("0 of" in words)
    put(root / "captions.json", {"1": "x", "5": "x"})
    args.use_caption = True
    assert load_data(args, {"train": "train", "test": "test"}).problems["5"]["caption"] == "x"


def test_captions_of_another_data_set_are_not_taken(root, tmp_path, capsys):
    """The same ids in both: only the place shows whose they are."""
    put(root / "captions.json", dict.fromkeys("123456", "scienceqa's"))
    for name in ("captions.json", "instruct_captions.json"):
        put(tmp_path / name, dict.fromkeys("123456", "nobody's"))
    for other in ("aokvqa_data", "tree/data", "a/b/c"):
        shutil.copytree(root / "scienceqa", tmp_path / other / "aokvqa")
        put((tmp_path / other).parent / "captions.json", dict.fromkeys("123456", "nobody's"))
        fails("--caption_file: no captions.json", "./data/captions.json", argv=["--use_caption"], root=other)
        args = parse("--data_root", other, "--use_caption", "--caption_file", "./data/captions.json")
        assert load_data(args, {"train": "train"}).problems["1"]["caption"] == "scienceqa's"
    put(tmp_path / other / "captions.json", {"captions": {"1": "its own"}})  # its own come first
    args = parse("--data_root", other, "--use_caption")
    assert load_data(args, {"train": "train"}).problems["1"]["caption"] == "its own"


TREES = {  # --data_root -> the folder of captions, name map and images
    "scienceqa_data/ScienceQA/data": "scienceqa_data",
    "aokvqa_data/ScienceQA/data": "aokvqa_data",
    "aokvqa_data/A-OKVQA/data": "aokvqa_data",
    "aokvqa_data/data": "aokvqa_data",
    "ScienceQA/data": "ScienceQA",  # ScienceQA's own repository
    "data": "data",  # MM-CoT: data/scienceqa, data/instruct_captions.json, vision_features/ beside it
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("tree", TREES)
def test_released_trees_as_they_are(tree, named, root, tmp_path):
    dataset = "aokvqa" if tree.startswith("aokvqa") else "scienceqa"
    shutil.move(root / "scienceqa", tmp_path / "held")
    root.rmdir()
    above = tmp_path / TREES[tree]
    (tmp_path / tree).mkdir(parents=True)
    shutil.move(tmp_path / "held", tmp_path / tree / dataset)
    put(above / "instruct_captions.json", {"captions": {qid: f"{tree}'s" for qid in "135"}})
    put_features(tmp_path)
    (tmp_path / "vision_features/name_map.json").rename(above / "name_map.json")
    (above / "images/1").mkdir(parents=True)
    argv = ["--data_root", tree, "--use_caption", "--img_type", "vit"]
    args = parse(*argv, *(["--caption_file", f"{TREES[tree]}/instruct_captions.json"] if named else []))
    data = load_data(args, {"train": "train", "val": "val", "test": "test"})
    assert data.dataset == dataset and data.problems["3"]["caption"] == f"{tree}'s"
    assert data.features.name_map == {"1": 0, "3": 1, "5": 3}
    assert files.find_images(args).resolve() == above / "images"


def test_a_name_map_beside_the_caption_file(root, tmp_path):
    put_features(root)
    put(tmp_path / "elsewhere/instruct_captions.json", dict.fromkeys("135", "x"))
    (root / "vision_features/name_map.json").rename(tmp_path / "elsewhere/name_map.json")
    argv = ["--data_root", root, "--img_type", "vit", "--caption_file", "elsewhere/instruct_captions.json"]
    for more in ([], ["--use_caption"]):
        assert load_data(parse(*argv, *more), {"train": "train"}).features.name_map["5"] == 3


def test_two_data_sets_under_one_root(root, capsys):
    """With --dataset the captions, features, name map and images in the data set's own folder come first."""
    aokvqa = root / "aokvqa"
    shutil.copytree(root / "scienceqa", aokvqa)
    for place, name in ((root, "scienceqa"), (aokvqa, "aokvqa")):
        put(place / "captions.json", {"captions": {qid: f"{name}'s" for qid in "123456"}})
        put_features(place)
        (place / "images").mkdir()
    put(aokvqa / "vision_features/name_map.json", {"1": 1, "3": 0})
    for name, place, row in (("scienceqa", root, 0), ("aokvqa", aokvqa, 1)):
        args = parse("--data_root", root, "--dataset", name, "--use_caption", "--img_type", "vit")
        data = load_data(args, {"train": "train"})
        assert data.problems["1"]["caption"] == f"{name}'s"
        assert data.features.path == place / "vision_features/vit.npy" and data.features.name_map["1"] == row
        assert files.find_images(args) == place / "images"
    # alone under its root it needs no flag
    shutil.rmtree(root / "scienceqa")
    assert files.find_captions(parse("--data_root", root)) == aokvqa / "captions.json"


def test_what_a_run_says_of_gaps(root, capsys):
    put(root / "captions.json", {"captions": {"1": "one"}})
    put_features(root, name_map={"1": 0, "3": 0})
    splits = json.loads((root / "scienceqa/pid_splits.json").read_text())
    change(root / "scienceqa/pid_splits.json", "val", to=[splits["train"][1], *splits["val"]])
    args = parse("--data_root", root, "--use_caption", "--img_type", "vit")
    load_data(args, {"train": "train", "val": "val"})
    said = capsys.readouterr()
    assert "splits train and val share 1 questions (the first is 2)" in said.err
    assert re.search(r"questions with an image have no caption in .*captions.json \(the first is \d\)", said.err)
    assert "gives 2 questions only 1 different rows" in said.err
    assert re.search(r"note: .*name_map.json names 1 of the \d rows", said.out)
    put_features(root, name_map={"1": 0, "5": 1})
    load_data(parse("--data_root", root, "--img_type", "vit"), {"train": "train", "test": "test"})
    said = "1 of 3 questions with an image have no feature row and get zeros (the first is 3)"
    assert said in capsys.readouterr().err


def test_search_order_of_features_and_name_map(root, tmp_path):
    args = parse("--data_root", root, "--img_type", "vit")
    with pytest.raises(UserError, match=r"--vision_features: no vit.*data/vision_features, vision_features"):
        files.find_feature_file(args)
    put_features(tmp_path)
    assert files.find_feature_file(args) == Path("vision_features/vit.npy")
    (root / "vision_features").mkdir()  # an empty folder does not hide the next one
    assert files.find_feature_file(args) == Path("vision_features/vit.npy")
    put_features(root)
    (root / "vision_features/vit.pth").write_bytes(b"original")  # the mappable copy beside it is taken
    assert files.find_feature_file(args) == root / "vision_features/vit.npy"

    beside = root / "vision_features"
    for place in (beside, root, root / ".."):
        put(place / "name_map.json", {"1": 0})
    for place in (beside, root, root / ".."):
        assert files.find_name_map(args, beside).resolve() == (place / "name_map.json").resolve()
        (place / "name_map.json").unlink()
    with pytest.raises(UserError, match="--name_map: none found"):
        files.find_name_map(args, beside)
    args.name_map = "n.json"
    with pytest.raises(UserError, match="--name_map: n.json does not exist"):
        files.find_name_map(args, beside)
    args.vision_features = "elsewhere"
    with pytest.raises(UserError, match="--vision_features: elsewhere is no folder"):
        files.find_feature_file(args)


def test_search_order_of_images(root, tmp_path):
    args = parse("--data_root", root)
    assert files.find_images(args) is None
    with pytest.raises(UserError, match="--images: none found"):
        files.find_images(args, required=True)
    for folder in (Path("images"), root / "images"):
        folder.mkdir()
        assert files.find_images(args) == folder
    args.images = "pictures"
    with pytest.raises(UserError, match="--images: pictures is no folder"):
        files.find_images(args)


# -- problems and splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, value, words",
    [
        ("3.answer", 2, "answer 2 is out of range|0 to 1"),
        ("3.answer", -1, "answer -1 is out of range"),
        ("3.answer", "1", "answer is str"),
        ("3.answer", True, "answer is bool"),
        ("3.choices", ["one"], "has 1 choices; 2 to 5"),
        ("3.choices", list("abcdef"), "has 6 choices; 2 to 5"),
        ("3.choices", ["a", 2], "choices is not a list of texts"),
        ("3.choices", "ab", "choices is not a list of texts"),
        ("3.hint", None, "hint is null, not text"),
        ("3.hint", "half \ud83d", "3.hint|holds half of a character (\\ud83d)"),
        ("3.image", 3, "image is int"),
        ("3.solution", ..., "lacks solution"),
        ("3", ["x"], "is not an object but list"),
        ("/3", question(), "question /3|an id names a folder"),
        ("x" * 256, question(), "an id names a folder: at most 255 bytes"),
    ],
)
def test_a_bad_question_is_named(root, keys, value, words):
    change(root / "scienceqa/problems.json", *keys.split("."), to=value)
    named = [] if "\ud83d" in str(value) or len(keys) > 20 else [f"question {keys.split('.')[0]}"]
    fails("--data_root", "scienceqa/problems.json", *named, *words.split("|"))


def test_the_most_choices_and_the_longest_id_are_accepted(root):
    path = root / "scienceqa/problems.json"
    change(path, "3", "choices", to=list("abcde"))
    change(path, "x" * 255, to=question(choices=["a", "b"], answer=0))
    assert len(load_data(parse("--data_root", root), {"train": "train"}).problems) == 7
    fails("--options", "question 3 has 5 choices", argv=["--options", "A", "B"])
    for qid in ("2", "4", "5"):
        change(path, qid, "answer", to=9)
    fails("question 2", "(and 2 more)")
    for text in ("[]", "{}"):
        put(path, text)
        fails("scienceqa/problems.json", "must")


def test_splits(root, capsys):
    splits, args = root / "scienceqa/pid_splits.json", parse("--data_root", root)
    fails("--train_split", "no split minitrain", "it has train, val, test, minitest", splits=MINI)
    for val, words in (
        (["4", "99", "98"], ["pid_splits.json", "split val names question 99", "(and 1 more)"]),
        (["4", "4"], ["pid_splits.json", "split val names question 4 twice"]),
        ([], ["--val_split", "split val of pid_splits.json is empty"]),
    ):
        change(splits, "val", to=val)
        fails(*words)
    change(splits, "val", to=["4", "2"])
    capsys.readouterr()
    assert load_data(args, {"train": "trainval"}).qids["train"] == ["1", "2", "3", "4"]  # composed where absent
    assert "no split trainval" in capsys.readouterr().out
    change(splits, "trainval", to=["4", "1"])
    assert load_data(args, {"train": "trainval"}).qids["train"] == ["4", "1"]
    change(splits, "train", to=[3, 1])  # ids as numbers
    assert load_data(args, {"train": "train"}).qids["train"] == ["3", "1"]
    put(splits, {"train": "1"})
    fails("pid_splits.json must hold")
    splits.unlink()
    fails("pid_splits.json does not exist")


# -- corrections ---------------------------------------------------------------------------------------------


def test_correction_replaces_train_solutions(root, tmp_path):
    corrected = json.loads((root / "scienceqa/problems.json").read_text())
    path = root / "scienceqa/correction.json"
    put(path, {qid: problem | {"solution": f"Corrected {qid}."} for qid, problem in corrected.items()})
    args = parse("--data_root", root)
    args.correction = True
    for name in ("scienceqa/correction.json", str(path)):
        args.correction_file = name
        problems = load_data(args, {"train": "train", "test": "test"}).problems
        assert [problems[qid]["solution"] for qid in ("1", "2", "3")] == [f"Corrected {n}." for n in (1, 2, 3)]
        assert {problems[qid]["solution"] for qid in ("4", "5", "6")} == {"Because b."}

    def refused(words, **changes):
        with pytest.raises(UserError, match=words):
            load_data(argparse.Namespace(**{**vars(args), **changes}), {"train": "train"})

    change(path, "3", "question", to="Another?")
    refused("--correction_file: .* question 3 is another question")
    for qid in "23":
        change(path, qid, to=...)
    refused("--correction_file: .*lacks 2 of 3 train questions, the first being 2")
    change(path, "2", to={"solution": None})
    change(path, "3", to={"solution": "x"})
    refused("question 2 has no solution text")
    refused("--correction_file: no.json does not exist", correction_file="no.json")
    refused("--correction True needs --correction_file", correction_file=None)
    args.correction = False
    assert load_data(args, {"train": "train"}).problems["1"]["solution"] == "Because b."


# -- rationales of an earlier stage ----------------------------------------------------------------------


def test_read_le_by_id_or_in_order(tmp_path):
    """Faults of the file itself: tests/test_predictions.py."""
    path = put(tmp_path / "p.json", {"preds": ["b", "a", "c"], "qids": ["2", "1", 3], "labels": []})
    assert read_le(path, ["1", "2"], "--eval_le") == {"1": "a", "2": "b"}
    put(path, {"preds": ["x", "y"], "labels": ["", ""]})
    assert read_le(path, ["1", "2"], "--eval_le") == {"1": "x", "2": "y"}
    for content, words in (
        ({"preds": ["x"]}, "has 1 rationales but the split has 2 questions"),
        ({"preds": ["x", "y"], "qids": ["1", "9"]}, "lacks 1 of the split's 2 questions, the first being 2"),
    ):
        with pytest.raises(UserError, match=f"^--test_le: .*{words}"):
            read_le(put(path, content), ["1", "2"], "--test_le")


# -- vision features -----------------------------------------------------------------------------------------


def write_features(folder, suffix, values, dtype):
    path = folder / f"vit{suffix}"
    tensor = torch.from_numpy(values).to(dtype)
    if suffix == ".npy":
        np.save(path, tensor.numpy())
    elif suffix == ".safetensors":
        save_file({"features": tensor}, path)
    else:
        torch.save(tensor, path)
    return path


SUFFIXES = (".npy", ".pth", ".safetensors")
FORMS = [(suffix, dtype) for suffix in SUFFIXES for dtype in (torch.float32, torch.float16)]
FORMS += [(".pth", torch.bfloat16), (".safetensors", torch.bfloat16), (".npy", torch.float64)]


@pytest.mark.parametrize("suffix, dtype", FORMS, ids=str)
def test_features_of_every_form(root, suffix, dtype):
    """Multiples of 1/8 are exact in every type, so all forms give equal numbers."""
    values = put_features(root)
    (root / "vision_features/vit.npy").unlink()
    write_features(root / "vision_features", suffix, values, dtype)
    data = load_data(parse("--data_root", root, "--img_type", "vit"), {"train": "train", "test": "test"})
    assert data.patch_size == (2, DIM) and data.features.rows == 4
    batch = data.features.gather(["3", "2", "1", "3"])  # 2 has no image
    assert batch.dtype == torch.float32 and batch.shape == (4, 2, DIM)
    assert np.array_equal(batch.numpy(), np.stack([values[1], np.zeros((2, DIM)), values[0], values[1]]))
    assert np.array_equal(data.features[3].numpy(), values[3])
    assert not data.features.gather(["2", "4"]).any()
    batch[0] = 7  # a batch is a copy: the file and the next batch stay as they are
    assert np.array_equal(data.features.gather(["3"])[0].numpy(), values[1])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_resnet_is_repeated_as_a_view(tmp_path, suffix):
    values = np.random.default_rng(0).standard_normal((3, 2048), dtype=np.float32)
    path = write_features(tmp_path, suffix, values, torch.float32).rename(tmp_path / f"resnet{suffix}")
    features = VisionFeatures(path, {"a": 2}, "resnet")
    assert features.shape == features[0].shape == (512, 2048)
    batch = features.gather(["b", "a"])
    assert batch.shape == (2, 512, 2048) and batch.stride(1) == 0
    assert np.array_equal(batch[1].numpy(), np.repeat(values[2:], 512, axis=0)) and not batch[0].any()


@pytest.mark.parametrize("img_type", ["detr", "clip", "resnet", "vit"])
def test_published_shapes(tmp_path, img_type):
    shape = {"detr": (100, 256), "clip": (49, 2048), "resnet": (512, 2048), "vit": (145, 1024)}[img_type]
    np.save(tmp_path / f"{img_type}.npy", np.ones((1, *shape), dtype=np.float16))
    features = VisionFeatures(tmp_path / f"{img_type}.npy", {"a": 0}, img_type)
    assert features.shape == shape == utils_data.img_shape[img_type]
    assert features.gather(["a", "b"]).sum() == np.prod(shape)
    batch = features.gather(["c", "d"])  # the zeros of a batch without images are one number
    assert batch.shape == (2, *shape) and not batch.any() and batch.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_features_travel_to_workers(root, suffix):
    """A pickle is a path and a name map, never the data; forked DataLoader workers and spawned processes read."""
    values = put_features(root, rows=400)
    (root / "vision_features/vit.npy").unlink()
    path = write_features(root / "vision_features", suffix, values, torch.float32)
    features = VisionFeatures(path, {str(n): n for n in range(16)}, "vit")
    assert len(pickle.dumps(features)) < 1500 < path.stat().st_size
    copy = pickle.loads(pickle.dumps(features))
    assert "_mapped" not in vars(copy) and torch.equal(copy.gather(["7"]), features.gather(["7"]))

    items = [{"qid": str(n), "input_ids": [5] * (n % 3 + 1), "labels": [6, 1]} for n in range(16)]
    loader = torch.utils.data.DataLoader(items, batch_size=4, num_workers=2, collate_fn=Collator(0, features))
    images = torch.cat([batch["image_ids"] for batch in loader])
    assert np.array_equal(images.numpy(), values[:16])


def test_features_are_mapped_not_loaded(tmp_path):
    """Two batches from a 118 MB file add a few megabytes of resident memory, not the file."""
    values = np.zeros((200, 145, 1024), dtype=np.float32)
    values[:, 0, 0] = np.arange(200)
    paths = [write_features(tmp_path, suffix, values, torch.float32) for suffix in SUFFIXES]
    del values
    context = multiprocessing.get_context("spawn")  # a new process: its memory holds nothing freed to reuse
    queue = context.Queue()
    child = context.Process(target=_memory_of_two_batches, args=(paths, queue))
    child.start()
    for path in paths:
        firsts, grown = queue.get(timeout=120)
        assert firsts == [3.0, 150.0, 7.0]
        assert grown < 0.25 * path.stat().st_size, f"{path.suffix}: {grown / 2**20:.0f} MiB"
    child.join()


def _memory_of_two_batches(paths, queue):
    def anonymous():  # private memory: mapped pages of the file are the system's, shared by all processes
        return int(re.search(r"RssAnon:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024

    for path in paths:
        before = anonymous()
        features = VisionFeatures(path, {str(n): n for n in range(200)}, "vit")
        first = features.gather(["3", "150"])
        second = features.gather(["7"])
        firsts = [float(first[0, 0, 0]), float(first[1, 0, 0]), float(second[0, 0, 0])]
        queue.put((firsts, anonymous() - before))


def test_feature_faults(root):
    argv = ["--img_type", "vit"]
    fails("--vision_features", "no vit", "extract_features.py", "--img_type", argv=argv)
    for how, words in (
        ({"rows": 3}, ["--name_map", "asks for row 3 (question 5)", "vit.npy has only 3 rows"]),
        ({"shape": (3, DIM)}, ["--vision_features", "vit.npy has shape (4, 3, 3)", "--img_type vit needs (N, 2, 3)"]),
        ({"shape": (DIM,)}, ["has shape (4, 3)", "needs (N, 2, 3)"]),
        ({"name_map": {"2": 0, "4": 1}}, ["0 of 2 in split train (none for 1), 0 of 1 in split test", "--name_map"]),
        *(({"name_map": {"1": row}}, ["--name_map", "the row of question 1 is"])
          for row in (-1, "x", 1.5, None, True, "-2", "²")),
    ):  # fmt: skip
        put_features(root, **how)
        fails(*words, argv=argv)
    put_features(root)
    (root / "vision_features/vit.json").unlink()
    fails("has shape (4, 2, 3)", "needs (N, 145, 1024)", argv=argv)
    put(root / "vision_features/vit.json", {"shape": [2]})
    fails("vit.json must hold", argv=argv)
    put_features(root)
    put(root / "vision_features/name_map.json", [1])
    fails("--name_map", "must hold", argv=argv)
    fails("--vision_features and --name_map", "without --img_type", argv=["--vision_features", "v", "--name_map", "n"])


def test_large_numbers_are_finite_and_the_first_bad_row_is_named(tmp_path):
    values = np.full((100, 2, DIM), 3e38, dtype=np.float32)  # their sum is beyond float32
    np.save(tmp_path / "vit.npy", values)
    put(tmp_path / "vit.json", {"shape": [2, DIM], "rows": 100})
    VisionFeatures(tmp_path / "vit.npy", {"a": 0, "b": 97}, "vit").check_finite(range(100))
    for row, name in ((97, "question b"), (34, "of no question")):
        values[row, 1, 2] = np.inf
        np.save(tmp_path / "vit.npy", values)
        with pytest.raises(UserError, match=rf"row {row} of .*vit.npy \({name}\) holds NaN or infinity"):
            VisionFeatures(tmp_path / "vit.npy", {"a": 0, "b": 97}, "vit").check_finite(range(100))


def test_the_digest_follows_what_the_model_sees(tmp_path, monkeypatch):
    """Not the form of the file or the order of its rows, but values, ids and which questions have a row.

    Of large files one patch of each question is read.
    """
    from vision import features

    values = np.random.default_rng(0).standard_normal((4, 2, DIM), dtype=np.float32)
    put(tmp_path / "vit.json", {"shape": [2, DIM]})
    name_map, qids = {"a": 0, "b": 1, "c": 2, "d": 3}, list("abcde")  # e has no image

    def digest(values, name_map=name_map, qids=qids, suffix=".npy"):
        path = write_features(tmp_path, suffix, values, torch.float32)
        return VisionFeatures(path, name_map, "vit").digest(qids)

    for whole in (2**28, 0):
        monkeypatch.setattr(features, "WHOLE", whole)
        first = digest(values)
        assert digest(values, suffix=".pth") == digest(values, suffix=".safetensors") == first
        assert digest(values[::-1].copy(), {"a": 3, "b": 2, "c": 1, "d": 0}) == first
        others = [
            digest(values, name_map | {"a": 1, "b": 0}),
            digest(values, name_map | {"e": 0}),
            digest(values, {"a": 0, "b": 1, "c": 2}),
            digest(values, qids=list("abcdf")),
        ]
        for row in range(4):
            changed = values.copy()
            changed[row, 1 if whole else row % 2, 0] += 1
            others.append(digest(changed))
        assert len({first, *others}) == 9


def test_broken_feature_files(root):
    """What executes code when it is read: tests/test_pickles.py."""
    argv, folder = ["--img_type", "vit"], root / "vision_features"
    values = put_features(root)
    (folder / "vit.npy").write_bytes((folder / "vit.npy").read_bytes()[:-8])
    fails("--vision_features: cannot map", "vit.npy", argv=argv)
    np.save(folder / "vit.npy", values.astype(np.int32))
    fails("holds no floating point numbers", argv=argv)
    (folder / "vit.npy").unlink()
    torch.save([1], folder / "vit.pth", _use_new_zipfile_serialization=False)
    fails("vit.pth holds a list instead of one tensor", argv=argv)
    torch.save({"a": torch.ones(2)}, folder / "vit.pth")
    fails("vit.pth holds a dict instead of one tensor", argv=argv)
    (folder / "vit.pth").write_bytes(b"")
    fails("cannot map", "vit.pth", argv=argv)
    (folder / "vit.pth").unlink()
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "vit.safetensors")
    fails("vit.safetensors holds 2 tensors instead of one", argv=argv)
    (folder / "vit.safetensors").write_bytes(b"xx")
    fails("cannot map", "vit.safetensors", argv=argv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_format_is_converted_once_by_processes_that_start_together(tmp_path, dtype):
    """A .pth of a torch before 1.6 cannot be mapped: one process makes a copy that can, the others wait for it."""
    path = tmp_path / "vit.pth"

    def save(value):
        torch.save(torch.full((3, 145, 1024), value, dtype=dtype), path, _use_new_zipfile_serialization=False)

    save(0.5)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(_first_value, [path] * 3, chunksize=1)
    assert [value for value, _ in found] == [0.5] * 3
    assert len({inode for _, inode in found}) == 1, "the copy was made more than once"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["vit.pth", "vit.pth.npy"]
    save(0.25)  # another original: another copy
    assert _first_value(path)[0] == 0.25


def _first_value(path):
    features = VisionFeatures(path, {"1": 2}, "vit")
    return float(features.gather(["1"])[0, 144, 0]), path.with_name("vit.pth.npy").stat().st_ino


# -- tokenizer -------------------------------------------------------------------------------------------------


def test_tokenizer_search_order(t5_tokenizer_dir, fixtures, tmp_path):
    """A released checkpoint holds none; transformers alone would make up a 104-token one from its config.json."""
    checkpoint, load = fixtures / "model/vit", utils_data.load_tokenizer
    assert len(load(parse("--model", checkpoint, "--tokenizer", t5_tokenizer_dir), checkpoint)) == 32100
    own = tmp_path / "own"
    load(parse("--model", t5_tokenizer_dir), checkpoint).save_pretrained(own)
    change(own / "tokenizer_config.json", "model_max_length", to=77)
    assert load(parse("--model", t5_tokenizer_dir), own).model_max_length == 77
    put(tmp_path / "empty/tokenizer.json", "{}")
    for flags, folder, words in (
        (("--model", checkpoint), checkpoint, r"--tokenizer: none found in .*vit; name the folder"),
        (("--tokenizer", checkpoint), None, "--tokenizer: .* holds neither tokenizer.json nor spiece.model"),
        (("--model", "no-such/model"), checkpoint, "--model: no tokenizer can be loaded from no-such/model"),
        (("--model", "./no-such-model"), checkpoint, "none found in .*, ./no-such-model"),
        (("--tokenizer", tmp_path / "empty"), None, "--tokenizer: no tokenizer can be loaded"),
    ):
        with pytest.raises(UserError, match=words):
            load(parse(*flags), *([folder] if folder else []))


@pytest.mark.parametrize("kept", ["tokenizer.json", "spiece.model"])
def test_a_vocabulary_alone_is_a_tokenizer(t5_tokenizer, t5_tokenizer_dir, tmp_path, kept):
    shutil.copy(t5_tokenizer_dir / kept, tmp_path)
    tokenizer = utils_data.load_tokenizer(parse("--tokenizer", tmp_path))
    text = "Solution: The answer is (B)."
    assert tokenizer(text)["input_ids"] == t5_tokenizer(text)["input_ids"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    size = len(t5_tokenizer)
    fits, small = (SimpleNamespace(folder="m", config=SimpleNamespace(vocab_size=n)) for n in (size, size - 1))
    utils_data.check_vocabulary(t5_tokenizer, fits)
    with pytest.raises(UserError, match=f"has {size} pieces but m only {size - 1} embeddings"):
        utils_data.check_vocabulary(t5_tokenizer, small)
    utils_data.check_vocabulary(t5_tokenizer, None)  # a hub id
