"""The question folders: files, signals, waiting."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares.cli import UserError
from teacher import handoff
from teacher.handoff import (
    DONE,
    EXPORTED,
    RATIONALE,
    Item,
    Refused,
    exported,
    is_done,
    iter_items,
    mark_done,
    mark_exported,
    question_dir,
    read_rationale,
    wait_for_feedback,
    write_rationale,
)  # fmt: skip


def export(questions: Path, action: int, rank: int, qid: str, *sentences: str) -> Path:
    folder = question_dir(questions, action, rank, qid)
    write_rationale(folder, sentences or ("A.", "B."))
    return folder


def answer(folder: Path) -> None:
    (folder / handoff.REPLY).write_text('{"A.": 0.5, "B.": 1.0}')


# -- files -----------------------------------------------------------------------------------------------


def test_layout_and_form(tmp_path, fixtures):
    folder = export(tmp_path, 3, 1, "42", 'He said "3:4".', "Use {x}.")
    assert folder == tmp_path / "3" / "p1" / "42"
    assert (folder / RATIONALE).read_text() == '{\n"He said "3:4".": xxx,\n"Use {x}.": xxx\n}\n'
    for bad in ("", "..", "a/b", "../../etc"):
        with pytest.raises(UserError, match="cannot name a folder"):
            question_dir(tmp_path, 0, 0, bad)
    forms = {case["rationale"] for case in json.loads((fixtures / "scores_parse.json").read_text())["cases"]} - {None}
    for form in forms:  # of the released code
        (folder / RATIONALE).write_bytes(form.encode())
        sentences = read_rationale(folder)
        assert len(sentences) == form.count('": xxx')
        write_rationale(folder, sentences)
        assert (folder / RATIONALE).read_bytes() == form.encode()
    assert len(forms) >= 5
    write_rationale(folder, ["one\ntwo.", "three\r\nfour."])
    assert read_rationale(folder) == ["one two.", "three four."]  # one line each, the count unchanged
    (folder / RATIONALE).write_bytes(b'\xef\xbb\xbf{\r\n"A.": xxx,\r\n"B.": xxx\r\n}')
    assert read_rationale(folder) == ["A.", "B."]


LINES = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=30) | st.sampled_from(
    ['x": xxx', 'x": xxx,', '"', "{", "}", "", " ", "a\r", "\u2028", "\x85", '": xxx,": xxx', "\\n", "\ufeff"]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("form")


@settings(max_examples=200, deadline=None)
@given(st.lists(LINES, max_size=5))
def test_reader_inverts_writer(folder, sentences):
    write_rationale(folder, sentences)
    assert read_rationale(folder) == sentences


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80) | st.text('{}": x,\n', max_size=40).map(str.encode))
def test_any_rationale_bytes(folder, data):
    (folder / RATIONALE).write_bytes(data)
    try:
        assert all(isinstance(sentence, str) for sentence in read_rationale(folder))
    except Refused as refused:
        assert refused.reason == "no_rationale"


def test_items_are_exact_and_in_order(tmp_path):
    for action, rank, qid in ((0, 0, "10"), (0, 0, "9"), (0, 10, "7"), (0, 1, "8"), (2, 0, "abc"), (10, 0, "1")):
        export(tmp_path, action, rank, qid)
    # preprocessing_after_RL/ holds its scripts and the corrections; RL may be in the middle of a folder
    (tmp_path / "remove_sentence.py").touch()
    export(tmp_path / "correction", 0, 0, "5")
    for name in ("0/p0/11", "0/p0/9"):  # without a form, and beside one: what a kill leaves
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / ".tmp-1-1").write_text('{\n"A.')
    for stray in ("0/px/3", "0/q0/3", "00/p0/3", "0/p01/3", "0/p0x/3"):
        write_rationale(tmp_path / stray, ["A."])
    mark_done(tmp_path, 0)
    found = [(item.action, item.rank, item.qid) for item in iter_items(tmp_path)]
    assert found == [(0, 0, "9"), (0, 0, "10"), (0, 1, "8"), (0, 10, "7"), (2, 0, "abc"), (10, 0, "1")]
    assert read_rationale(tmp_path / "0/p0/9") == ["A.", "B."]
    assert not iter_items(tmp_path, 1) and not iter_items(tmp_path / "absent")
    assert list(iter_items(tmp_path, 2)) == [Item(tmp_path, 2, 0, "abc")]


# -- signals ---------------------------------------------------------------------------------------------


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_signals(tmp_path):
    export(tmp_path, 0, 0, "1")
    assert not exported(tmp_path) and not is_done(tmp_path, 0)
    mark_exported(tmp_path)
    assert exported(tmp_path) and not is_done(tmp_path, 0)
    mark_done(tmp_path, 0)
    assert is_done(tmp_path, 0) and not is_done(tmp_path, 1)
    mark_exported(tmp_path)  # a new export voids the answers of the one before
    assert not is_done(tmp_path, 0)
    subprocess.run(["touch", tmp_path / "0" / DONE], check=True)  # the user's way
    assert is_done(tmp_path, 0)
    age(tmp_path / "0" / DONE, 60)  # brought in later by `cp -p` or rsync: still last round's
    assert not is_done(tmp_path, 0) and handoff.stale_signal(tmp_path, 0)
    mark_exported(tmp_path)
    mark_done(tmp_path, 0)
    whole = int(os.stat(tmp_path / EXPORTED).st_mtime)
    os.utime(tmp_path / "0" / DONE, (whole, whole))  # a disk that keeps whole seconds
    assert is_done(tmp_path, 0)


def test_signals_survive_the_copy_out_and_back(tmp_path):
    """`cp -r` gives every copy a new time, in the order of copying: the export's signal comes after the answers'."""
    run, desk = tmp_path / "questions", tmp_path / "desk"
    export(run, 0, 0, "1")
    mark_exported(run)
    desk.mkdir()
    subprocess.run(f"cp -r {run}/* {desk}/", shell=True, check=True)
    assert exported(desk) and not is_done(desk, 0)
    answer(question_dir(desk, 0, 0, "1"))
    mark_done(desk, 0)
    subprocess.run(f"cp -r {desk}/* {run}/", shell=True, check=True)
    age(run / EXPORTED, -60)  # a slow copy: the export's signal lands a minute after llm_done.txt
    assert is_done(run, 0)
    age(run / "0" / DONE, 60)  # older than the export itself
    assert not is_done(run, 0)


def test_signal_made_by_hand(tmp_path):
    """Without our content (`touch mmcot_finished_signal.txt`, the released code) the file's own time counts."""
    (tmp_path / EXPORTED).touch()
    mark_done(tmp_path, 0)
    assert is_done(tmp_path, 0)
    age(tmp_path / "0" / DONE, 60)
    for content in (b"", b"finished", b"\xff\xfe", b"[]", b'{"exported_ns": "x"}'):
        (tmp_path / EXPORTED).write_bytes(content)
        assert not is_done(tmp_path, 0)
    (tmp_path / EXPORTED).write_text('{"exported_ns": 9000000000000000000}')  # later than the file itself
    mark_done(tmp_path, 0)
    assert is_done(tmp_path, 0)


def test_the_export_signal_appears_whole_and_last(tmp_path, monkeypatch):
    """Whoever waits for it copies the folder at once: nothing may come or go there then, and its time be there."""
    seen, replace = [], os.replace

    def watched(source, target):
        replace(source, target)
        seen.append(json.loads((tmp_path / EXPORTED).read_text() or "{}"))

    monkeypatch.setattr(os, "replace", watched)
    mark_exported(tmp_path)
    assert len(seen) == 1 and seen[0]["exported_ns"] > 0
    assert [path.name for path in tmp_path.iterdir()] == [EXPORTED]


# -- waiting ---------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Three exported questions of one action."""
    made = [export(tmp_path, 0, 0, str(qid)) for qid in range(3)]
    mark_exported(tmp_path)
    return made


def waiter(*args, **kwargs) -> tuple[threading.Thread, list]:
    result: list = []
    thread = threading.Thread(target=lambda: result.append(wait_for_feedback(*args, **kwargs)), daemon=True)
    thread.start()
    return thread, result


def test_waits_for_signals_and_replies_and_says_which_signal_is_stale(tmp_path, folders, capfd):
    folders.append(export(tmp_path, 1, 0, "3"))
    mark_done(tmp_path, 0)
    age(tmp_path / "0" / DONE, 60)
    thread, result = waiter(tmp_path, [0, 1], poll_seconds=0.05, settle_seconds=30)
    assert handoff.progress_counts(tmp_path, 0) == (0, 3) and handoff.progress_counts(tmp_path, 2) == (0, 0)
    (folders[2] / handoff.REPLY).touch()  # `cp` makes the file before it fills it
    for folder in folders[:2]:
        answer(folder)
    assert handoff.progress_counts(tmp_path, 0) == (2, 3)
    for folder in folders[2:]:
        answer(folder)
    mark_done(tmp_path, 1)
    time.sleep(0.4)
    assert thread.is_alive()  # all replies, but one signal of two is of an earlier export
    (tmp_path / "1" / DONE).unlink()
    mark_done(tmp_path, 0)
    time.sleep(0.2)
    assert thread.is_alive()
    mark_done(tmp_path, 1)
    thread.join(5)
    assert result == [[]]
    out, err = capfd.readouterr()
    assert "older than the export" in out and "4 of 4 rationales answered" in out
    assert f"touch {tmp_path}/1/{DONE}" in out
    assert "Waiting for the feedback" in err and "4/4" in err and "warning" not in err


def test_a_signal_or_a_reply_restarts_the_settle_time(tmp_path, folders, monkeypatch, capfd):
    """A slow copy by hand brings `llm_done.txt` before the replies. The clock moves with each sleep."""
    answer(folders[0])
    sleeps, events = [], {5: lambda: mark_done(tmp_path, 0), 10: lambda: answer(folders[1])}

    def sleep(seconds):
        sleeps.append(seconds)
        events.get(len(sleeps), int)()

    monkeypatch.setattr(handoff, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: sum(sleeps)))
    assert wait_for_feedback(tmp_path, [0], poll_seconds=10, settle_seconds=65) == [Item(tmp_path, 0, 0, "2")]
    assert sleeps == [10] * 16 + [5]  # the signal after 50 s, a reply after 100 s, then 65 s of nothing
    out, err = capfd.readouterr()
    assert "has all its replies" not in out, "nothing to touch while replies are missing"
    assert "2 of 3 rationales answered" in out and "1 rationales without a reply are dropped" in err
    assert "no new reply for 65 s" in err and "/0/p0/2" in err


def test_waiting_does_not_spin(tmp_path, folders, monkeypatch):
    """The disk is looked at once per poll, and answered questions are not looked at again."""
    for folder in folders[:2]:
        answer(folder)
    looks, sleeps, real = [], [], handoff.has_reply
    monkeypatch.setattr(handoff, "has_reply", lambda folder: looks.append(folder) or real(folder))

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 5:
            answer(folders[2])
            mark_done(tmp_path, 0)

    monkeypatch.setattr(handoff.time, "sleep", sleep)
    assert wait_for_feedback(tmp_path, [0], poll_seconds=10, settle_seconds=60) == []
    assert sleeps == [10] * 5 and len(looks) == 3 + 5
