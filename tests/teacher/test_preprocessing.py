"""The two preprocessing scripts on real questions and images."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import haiku
import haiku_for_correction_feedback
import preprocessing_for_correction_feedback
from ares import files
from ares.cli import UserError
from teacher.data_check import RECORD, write_record
from teacher.handoff import (
    DONE,
    IMAGE,
    RATIONALE,
    REASON,
    REPLY,
    REQUEST,
    SCORES,
    SIDECAR,
    is_done,
    mark_done,
    mark_exported,
    place_images,
    prepare_request,
    question_dir,
    read_rationale,
    read_rationales,
    write_rationale,
    write_request,
)  # fmt: skip
from teacher.prompts import correction_request, scoring_request
from tests.conftest import ROOT, one_line_error
from tests.teacher.teacher_tools import stops

SH = ROOT / "preprocessing_after_RL" / "processing_sentence_level_feedback.sh"
SENTENCES = ['The colony is "Maryland".', "So it is {A}: the first."]


@pytest.fixture(scope="module")
def data_root(sample) -> Path:
    return sample / "ScienceQA/data"


@pytest.fixture(scope="module")
def pictured(sample) -> list[str]:
    """Test questions with image.png, and one with choice images only."""
    folders = sorted((sample / "images").iterdir())
    images = [folder.name for folder in folders if (folder / "image.png").exists()]
    choices = [folder.name for folder in folders if not (folder / "image.png").exists()]
    return [*images[:2], choices[0]]


def export(questions: Path, qids, actions=(0, 1)) -> None:
    for action in actions:
        for qid in qids:
            write_rationale(question_dir(questions, action, 0, qid), SENTENCES)
    mark_exported(questions)


def shell(*argv) -> subprocess.CompletedProcess:
    """The .sh as a user calls it."""
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(["bash", str(SH), *map(str, argv)], env=environment, capture_output=True, text=True)


@pytest.fixture
def prepare(sample, data_root, tmp_path, monkeypatch, capsys):
    """processing_sentence_level_feedback.py, or another module's main, from tmp_path; returns (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    scoring = importlib.import_module("preprocessing_after_RL.processing_sentence_level_feedback")

    def run(*argv, main=scoring.main):
        capsys.readouterr()
        main([str(arg) for arg in ("--data_root", data_root, "--images", sample / "images", *argv)])
        return capsys.readouterr()

    return run


def listing(folder: Path) -> dict[str, tuple]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def test_every_action_gets_request_and_images(tmp_path, sample, data_root, problems, pictured, prepare):
    text_only = next(qid for qid, problem in problems.items() if problem["image"] is None)
    questions = tmp_path / "questions"
    export(questions, [*pictured, text_only])
    half = question_dir(questions, 0, 0, "half")
    half.mkdir()  # RL is still at it: no rationale, no request
    argv = ["--questions_dir", questions, "--data_root", data_root, "--images", sample / "images"]
    done = shell(*argv, "--problems", "scienceqa")
    assert done.returncode == 0, done.stderr
    assert "8 requests" in done.stdout and "6 with images" in done.stdout and "warning" not in done.stderr
    for action in (0, 1):  # the released code gave images to the first action only
        for qid in [*pictured, text_only]:
            folder = question_dir(questions, action, 0, qid)
            assert (folder / REQUEST).read_text() == scoring_request(problems[qid], SENTENCES)
            source = (sample / "images" / qid).glob("*.png") if qid in pictured else ()
            assert {p.name: p.read_bytes() for p in folder.glob("*.png")} == {p.name: p.read_bytes() for p in source}
    assert (question_dir(questions, 1, 0, pictured[0]) / IMAGE).exists()
    assert (question_dir(questions, 1, 0, pictured[2]) / "choice_0.png").exists()
    assert not (half / REQUEST).exists()
    before = listing(questions)
    prepare("--questions_dir", questions)
    assert listing(questions) == before  # nothing touched
    write_rationale(half, SENTENCES)
    one_line_error(shell(*argv), "question half", "not in problems.json", "--data_root")


def test_requests_name_the_correct_answer_and_an_image_only_if_there_is_one(problems):
    for problem in problems.values():
        gold = problem["answer"]
        for text in (scoring_request(problem, SENTENCES), correction_request(problem, "It is so.")):
            assert f"\nCorrect answer: ({'ABCDE'[gold]}) {problem['choices'][gold]}\n" in text
            assert ("its context, the image and the correct answer" in text) == (problem["image"] is not None)
    assert {problem["answer"] for problem in problems.values()} >= {0, 1, 2, 3}


def test_the_manual_copy_and_a_second_round(tmp_path, problems, pictured, prepare):
    """`cp -r {run}/questions/*` into a folder that still holds last round's replies and signals."""
    qid, desk = pictured[0], tmp_path / "preprocessing_after_RL"
    desk.mkdir()
    same = question_dir(desk, 0, 0, pictured[1])
    folders = [question_dir(desk, k, 0, qid) for k in range(2)]
    for number, sentences in enumerate((SENTENCES, ["Another thought.", "So it is (B)."])):
        run = tmp_path / f"run{number}" / "questions"
        for k in range(2):
            write_rationale(question_dir(run, k, 0, qid), sentences)
        write_rationale(question_dir(run, 0, 0, pictured[1]), SENTENCES)  # the same words in both rounds
        mark_exported(run)
        subprocess.run(f"cp -r {run}/* {desk}/", shell=True, check=True)
        out, _ = prepare()  # the default --questions_dir
        assert (folders[0] / REQUEST).read_text() == scoring_request(problems[qid], sentences)
        if number == 0:
            for k, folder in enumerate(folders):
                for name in (REPLY, SIDECAR, SCORES, REASON):
                    (folder / name).write_text(f"reply of round {number}")
                mark_done(desk, k)
            (same / REPLY).write_text("still good")
            assert is_done(desk, 0)
    assert "2 replies to older rationales set aside" in out and (same / REPLY).read_text() == "still good"
    for k, folder in enumerate(folders):
        assert not any((folder / name).exists() for name in (REPLY, SIDECAR, SCORES, REASON))
        assert (folder / f"older_{REPLY}").read_text() == "reply of round 0"  # paid for: kept
        assert not (desk / str(k) / DONE).exists()
    # a new wording of the request does not void what was paid for
    request = folders[1] / REQUEST
    (folders[1] / REPLY).write_text("new")
    request.write_text(request.read_text().replace("You grade", "You rate"))
    assert "set aside" not in prepare().out and (folders[1] / REPLY).read_text() == "new"


@pytest.mark.parametrize("sentences", [SENTENCES[:1], SENTENCES[::-1], [*SENTENCES, SENTENCES[0]]])
def test_a_reply_to_the_same_sentences_in_another_number_or_order_is_outdated(tmp_path, sentences):
    """The next round's rationale is often a part of the last one: the old scores are not its scores."""
    problem = {"question": "Q?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None}
    assert not prepare_request(tmp_path, scoring_request(problem, SENTENCES), SENTENCES, [])
    (tmp_path / REPLY).write_text('{"scores": [0.1, 0.9]}')
    assert not prepare_request(tmp_path, scoring_request(problem, SENTENCES), SENTENCES, [])
    assert prepare_request(tmp_path, scoring_request(problem, sentences), sentences, [])
    assert not (tmp_path / REPLY).exists() and (tmp_path / f"older_{REPLY}").exists()


def test_absent_images_and_bad_forms(tmp_path, sample, problems, prepare):
    train = next(qid for qid, p in problems.items() if p["image"] and not (sample / "images" / qid).exists())
    questions = tmp_path / "questions"
    export(questions, [train])
    argv = ["--questions_dir", questions]
    named = f"1 of 1 questions name an image that is not under {sample / 'images'}, first {train}"
    assert named in prepare(*argv).err and (question_dir(questions, 0, 0, train) / REQUEST).exists()
    assert train in stops(lambda: prepare(*argv, "--strict"), "--strict.*--images|--images.*--strict")
    (question_dir(questions, 0, 0, train) / RATIONALE).write_text("no form")
    write_rationale(question_dir(questions, 1, 0, train), [])
    write_rationale(question_dir(questions, 2, 0, train), SENTENCES)
    out, err = prepare(*argv)
    assert "2 rationales get no request" in err and "1 requests" in out


def test_what_a_user_gets_wrong(tmp_path, prepare):
    stops(prepare, "--questions_dir: .*preprocessing_after_RL.*copy {run}/questions/\\*")
    export(tmp_path / "questions", ["1"])
    stops(lambda: prepare("--questions_dir", tmp_path), f"did you mean {tmp_path}/questions")
    for words, *argv in (
        ("--data_root", "--data_root", tmp_path / "none"),
        ("aokvqa", "--problems", "aokvqa"),
        ("same flag", "--problems", "aokvqa", "--dataset", "scienceqa"),
    ):
        stops(lambda argv=argv: prepare("--questions_dir", tmp_path / "questions", *argv), words)


def test_images_behind_links_and_absent_ones(tmp_path):
    """How files are placed otherwise: tests/test_files.py."""
    source, link, folder = tmp_path / "image.png", tmp_path / "choice_0.png", tmp_path / "q"
    folder.mkdir()
    source.write_bytes(b"one")
    link.symlink_to(source)
    place_images(folder, [source, link])
    assert os.path.samefile(source, folder / "image.png") and not (folder / "choice_0.png").is_symlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"choice_0.png": b"one", "image.png": b"one"}
    with pytest.raises(UserError, match="absent.png is no regular file"):
        write_request(folder, "text", [tmp_path / "absent.png"])
    assert not (folder / REQUEST).exists()  # it would say that the folder is ready


# -- a folder of other data whose question ids are the same -------------------------------------------------


def other_data(root: Path, problems: dict, qid: str, change: str, train=()) -> Path:
    """`root` as a data folder of the same ids, in which question `qid` is another one."""
    first, *choices = problems[qid]["choices"]
    changed = {
        "question": {"question": "What is that?"},
        "choices": {"choices": [*choices, "none of these"]},
        "order": {"choices": [*choices, first]},
        "gold": {"answer": (problems[qid]["answer"] + 1) % len(problems[qid]["choices"])},
        "mended": {"hint": "Look.", "solution": "It is so.", "lecture": "A lecture."},
    }[change]
    files.write_json(root / "scienceqa/problems.json", problems | {qid: problems[qid] | changed})
    files.write_json(root / "scienceqa/pid_splits.json", {"train": list(train), "test": list(problems)})
    return root


def refuses(call, folder: Path, root: Path, qid: str) -> None:
    """One line that names data, folder and question; nothing has been written."""
    before = listing(folder)
    line = stops(call, f"question {qid} ")
    assert str(root / "scienceqa") in line and str(folder) in line and "--dataset" in line, line
    assert listing(folder) == before


@pytest.mark.parametrize("change", ["question", "choices", "order", "gold"])
@pytest.mark.parametrize("known_by", ["its requests", "its record"])
def test_a_folder_of_other_data_is_refused(tmp_path, problems, pictured, prepare, api_environment, change, known_by):
    """The last question only: with what an export records, and with the requests alone, as in older folders."""
    questions, qid = tmp_path / "questions", pictured[-1]
    export(questions, pictured)
    flags = ["--questions_dir", questions, "--dataset", "scienceqa"]
    if known_by == "its record":
        write_record(questions, problems, pictured)
    else:
        prepare(*flags)
    other = ["--data_root", other_data(tmp_path / "other", problems, qid, change)]
    refuses(lambda: prepare(*flags, *other), questions, tmp_path / "other", qid)
    reference = ["--teacher", "reference"]
    for more in (reference, [*reference, "--watch", "0.001"], ["--estimate"], ["--check", "2"]):
        argv = [*flags, *other, *more]
        refuses(lambda argv=argv: haiku.main([*map(str, argv)]), questions, tmp_path / "other", qid)

    same = other_data(tmp_path / "mended", problems, qid, "mended")  # the questions are those that were exported
    prepare(*flags, "--data_root", same)
    haiku.main([*map(str, ["--teacher", "reference", *flags, "--data_root", same])])
    assert all((question_dir(questions, 1, 0, one) / SCORES).exists() for one in pictured)


def test_requests_of_an_older_round_and_in_other_words_say_nothing_about_the_data(tmp_path, problems, prepare):
    """A folder is used again for other data, whose rationales are copied over the old ones; requests by hand."""
    questions = tmp_path / "questions"
    export(questions, ["155", "952"])
    flags = ["--questions_dir", questions]
    prepare(*flags)
    other = other_data(tmp_path / "other", problems, "155", "question")
    write_rationale(question_dir(questions, 0, 0, "155"), ["Another thought."])
    for action in (0, 1):
        request = question_dir(questions, action, 0, "952") / REQUEST
        request.write_text("Please score:\n" + request.read_text().partition("\n\n")[2])
    (question_dir(questions, 1, 0, "155") / REQUEST).unlink()
    prepare(*flags, "--data_root", other)
    assert "What is that?" in (question_dir(questions, 0, 0, "155") / REQUEST).read_text()
    for damaged in ("", "[]", '{"155": '):
        (questions / RECORD).write_text(damaged)
        stops(lambda: prepare(*flags), f"{RECORD}.*delete it")


# -- corrections -----------------------------------------------------------------------------------------


@pytest.fixture
def correct(prepare, tmp_path):
    """preprocessing_for_correction_feedback.py with these rationales in its file; returns (stdout, stderr)."""

    def run(rationales: dict, *argv):
        path = tmp_path / "remove_repetitive_sentences.json"
        path.write_text(json.dumps(rationales))
        return prepare("--rationales", path, *argv, main=preprocessing_for_correction_feedback.main)

    return run


def test_correction_requests(tmp_path, data_root, problems, correct):
    splits = json.loads((data_root / "scienceqa/pid_splits.json").read_text())
    qids = splits["train"][:3]
    preds = ['Plants make "food": sugar.', "It is {B}.\nSo there.", ""]
    out, _ = correct({"preds": preds, "qids": qids})
    assert f"covers 3 of {len(splits['train'])} train questions" in out and "3 requests" in out
    root = tmp_path / "preprocessing_after_RL/correction/0/p0"
    for qid, text in zip(qids, preds, strict=True):
        assert read_rationale(root / qid) == [" ".join(text.split())]
        assert (root / qid / REQUEST).read_text() == correction_request(problems[qid], text)
        (root / qid / REPLY).write_text("paid for")
    before = listing(root)
    correct({"preds": preds, "qids": qids})
    assert listing(root) == before
    # the next round's rationales come to the same folders
    preds[0] = "Plants make sugar."
    assert "1 replies to older rationales set aside" in correct({"preds": preds, "qids": qids}).out
    folder = root / qids[0]
    assert not (folder / REPLY).exists() and (folder / f"older_{REPLY}").exists()
    assert read_rationale(folder) == [preds[0]]


def test_correction_in_split_order_with_images(tmp_path, data_root, pictured, correct):
    """A data set whose train questions have images here, and a predictions file of the released form."""
    root = tmp_path / "data"
    shutil.copytree(data_root / "scienceqa", root / "scienceqa")
    (root / "scienceqa/pid_splits.json").write_text(json.dumps({"minitrain": pictured}))
    flags = ("--data_root", root, "--train_split", "minitrain", "--correction_dir", "out")
    out, _ = correct({"preds": ["One.", "Two.", "Three."]}, *flags)
    assert "3 requests in out, 3 with images" in out and "covers" not in out
    assert read_rationale(tmp_path / "out/0/p0" / pictured[1]) == ["Two."]
    assert (tmp_path / "out/0/p0" / pictured[1] / IMAGE).exists()
    assert (tmp_path / "out/0/p0" / pictured[2] / "choice_0.png").exists()


def test_corrections_of_other_data_are_refused(tmp_path, problems, correct):
    train = [qid for qid, problem in problems.items() if problem["split"] == "train"][:2]
    other_data(tmp_path / "data", problems, train[1], "mended", train)
    other_data(tmp_path / "other", problems, train[1], "question", train)
    folder = tmp_path / "preprocessing_after_RL/correction"
    correct({"preds": ["One.", "Two."], "qids": train}, "--data_root", tmp_path / "data")
    flags = ["--teacher", "reference", "--correction_dir", str(folder)]
    asked = [*flags, "--data_root", str(tmp_path / "other")]
    refuses(lambda: haiku_for_correction_feedback.main(asked), folder, tmp_path / "other", train[1])
    assert not (tmp_path / "other/scienceqa/correction.json").exists()
    haiku_for_correction_feedback.main([*flags, "--data_root", str(tmp_path / "data")])
    assert (tmp_path / "data/scienceqa/correction.json").exists()
    # prepared anew for the other data, whose rationales happen to be the same: the reply is about another question
    out = correct({"preds": ["One.", "Two."], "qids": train}, "--data_root", tmp_path / "other").out
    assert "1 replies" in out and not (folder / "0/p0" / train[1] / REPLY).exists()
    haiku_for_correction_feedback.main(asked)


def test_rationales_that_fit_no_split(tmp_path, problems, correct):
    test_qid = next(qid for qid, problem in problems.items() if problem["split"] == "test")
    for words, rationales, *argv in (
        ("1 rationales but the split.*--train_split|--train_split.*1 rationales but the split", {"preds": ["A."]}),
        (f"question {test_qid}.*not in the train split", {"preds": ["A."], "qids": [test_qid]}),
        ("--train_split.*nope", {"preds": ["A."]}, "--train_split", "nope"),
    ):
        stops(lambda rationales=rationales, argv=argv: correct(rationales, *argv), words)
    assert not (tmp_path / "preprocessing_after_RL").exists()


def test_rationales_file_is_checked_and_read_by_id(tmp_path):
    path = tmp_path / "r.json"
    for content, words in (
        ({"preds": "x"}, "must hold"),
        ([], "must hold"),
        ({"preds": ["a", None], "qids": ["1", "2"]}, "must hold"),
        ({"preds": ["a"], "qids": ["1", "2"]}, "do not match"),
        ({"preds": ["a", "b"], "qids": ["1", "1"]}, "twice"),
        ({"preds": ["a", "b"], "qids": "12"}, "do not match"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=words):
            read_rationales(path, ["1", "2"])
    path.write_text(json.dumps({"preds": ["b", "a"], "qids": [2, "1"]}))
    assert read_rationales(path, ["1", "2", "3"]) == {"2": "b", "1": "a"}
    path.write_text(json.dumps({"preds": ["a", "b"]}))
    assert read_rationales(path, ["1", "2"]) == {"1": "a", "2": "b"}
