"""ares/files.py: reading, writing and locking where a file is a link, a FIFO or damaged, or the disk is full."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import haiku
import haiku_for_correction_feedback
import preprocessing_for_correction_feedback
from ares import cli, files
from ares.cli import UserError
from ares.launch import only_one
from teacher import handoff, reply_files
from tests.api_server import ApiServer
from tests.conftest import ROOT
from tests.disk import fill
from tests.teacher.teacher_tools import lay_out

SENTINEL = b"nothing may touch this\n"
QID = "155"


# -- links, FIFOs and devices in a questions folder --------------------------------------------------------

ITEM_FILES = (
    handoff.SCORES, handoff.SIDECAR, handoff.REASON, handoff.REPLY, handoff.RATIONALE, handoff.REQUEST,
    handoff.IMAGE, "choice_0.png", "unusable_output_from_llm.txt",
)  # fmt: skip
FOLDER_FILES = (
    "teacher/lock", "teacher/spend.jsonl", "teacher/reserve", "teacher/batches/0a.json", "0/llm_done.txt",
    "mmcot_finished_signal.txt",
)  # fmt: skip
FOLDERS = ("teacher", "teacher/batches", "0", "0/p0", f"0/p0/{QID}")
PLACES = (*(f"0/p0/{QID}/{name}" for name in ITEM_FILES), *FOLDER_FILES, *FOLDERS)
KINDS = ("link to a file", "link to nothing", "link to /dev/zero", "FIFO", "folder")


def put(place: Path, kind: str, outside: Path) -> None:
    """Replace the file or folder at `place` by something that it must not be."""
    is_folder = place.is_dir()
    if is_folder:
        shutil.move(place, outside / "moved")
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "FIFO":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        targets = {"link to nothing": outside / "new", "link to /dev/zero": Path("/dev/zero")}
        place.symlink_to(targets.get(kind, outside / ("moved" if is_folder else "file")))


def state(folder: Path) -> dict:
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def launch(main, words: str = "") -> int:
    """A script in this process, from its entry point; its exit status."""
    try:
        cli.run(lambda: main(words.split()))
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def questions_folder(tmp_path, problems, sample, monkeypatch, api_environment):
    """A folder with prepared questions, a data root, and a folder `outside`."""
    folder = tmp_path / "user"
    lay_out(folder / "questions", 0, QID, ["It is so.", "So it is."], problems, sample)
    handoff.mark_exported(folder / "questions")
    (folder / "questions/teacher/batches").mkdir(parents=True)
    (folder / "outside").mkdir()
    (folder / "outside/file").write_bytes(SENTINEL)
    files.write_json(folder / "data/scienceqa/problems.json", {QID: problems[QID]})
    files.write_json(folder / "data/scienceqa/pid_splits.json", {"train": [QID], "val": [], "test": [QID]})
    files.write_json(folder / "data/rationales.json", {"preds": ["It is so. So it is."], "qids": [QID]})
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def api():
    with ApiServer() as server:
        yield server


def launches(folder: Path, api) -> list:
    """Every script that reads and writes a questions folder."""
    questions, data = folder / "questions", f"--data_root {folder}/data"
    asked = f"--questions_dir {questions} {data}"
    rationales = f"--correction_dir {questions} --rationales {folder}/data/rationales.json {data}"
    preprocess = importlib.import_module("preprocessing_after_RL.processing_sentence_level_feedback")
    return [
        lambda: launch(preprocess.main, asked),
        lambda: launch(preprocessing_for_correction_feedback.main, rationales),
        lambda: launch(haiku.main, f"--teacher reference {asked}"),
        lambda: launch(haiku.main, f"{asked} --base_url {api.url} --no-cache"),
        lambda: launch(haiku.main, f"{asked} --base_url {api.url} --estimate"),
        lambda: launch(haiku_for_correction_feedback.main, f"--teacher reference {rationales} --output c.json"),
        lambda: launch(lambda argv: _scores(questions)),
        lambda: launch(lambda argv: handoff.write_rationale(questions / "0/p0" / QID, ["It is so.", "So it is."])),
        lambda: launch(lambda argv: handoff.mark_exported(questions)),
        lambda: launch(lambda argv: handoff.mark_done(questions, 0)),
    ]


def _scores(questions: Path) -> None:
    for item in handoff.iter_items(questions):
        with contextlib.suppress(handoff.Refused):
            reply_files.read_scores(item.folder)
    assert handoff.is_done(questions, 0) in (True, False) and handoff.exported(questions) in (True, False)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_nothing_leads_out_of_a_questions_folder_or_hangs(place, kind, questions_folder, api, capsys):
    """Whatever is where a file or folder of ours should be: nothing elsewhere is written, emptied, removed or made."""
    pristine = shutil.copytree(questions_folder, questions_folder.parent / "pristine")
    for number, start in enumerate(launches(questions_folder, api)):
        for folder in ("questions", "outside"):
            shutil.rmtree(questions_folder / folder)
            shutil.copytree(pristine / folder, questions_folder / folder)
        put(questions_folder / "questions" / place, kind, questions_folder / "outside")
        before = state(questions_folder / "outside")
        capsys.readouterr()
        assert start() in (0, 2), f"launch {number}"
        assert state(questions_folder / "outside") == before, f"launch {number}"
        assert capsys.readouterr().err.count("error:") <= 1


def test_links_that_stop_a_reader_and_links_that_do_not(questions_folder, tmp_path):
    """A user may have linked replies there: they are neither read nor bought again without a word."""
    asked = "--teacher reference --data_root data --questions_dir"
    questions, outside = questions_folder / "questions", questions_folder / "outside"
    reply = questions / "0/p0" / QID / handoff.REPLY
    reply.symlink_to(outside / "file")
    with pytest.raises(UserError, match=f"{reply} is a symbolic link; put the file itself there"):
        haiku.main(f"{asked} {questions}".split())
    reply.unlink()
    shutil.move(questions, outside / "real")
    questions.symlink_to(outside / "real")  # the folder itself may be behind a link
    assert launch(haiku.main, f"{asked} questions") == 0
    assert (outside / "real/0/p0" / QID / handoff.SCORES).read_text().split()
    for name in ("questions", "questions2"):  # a name that begins like the root's is outside
        (tmp_path / name).mkdir()
        (tmp_path / f"questions/{len(name)}").symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="questions/10 is a link that leads out of"):
        files.refuse_links(tmp_path / "questions/10", tmp_path / "questions")


@pytest.mark.parametrize("root", [".", "./questions", "questions/", "../{name}/questions"])
def test_links_are_found_however_the_folder_is_named(questions_folder, root):
    questions = questions_folder / "questions"
    shutil.move(questions / "0", questions_folder / "outside/0")
    (questions / "0").symlink_to(questions_folder / "outside/0")
    os.chdir(questions if root == "." else questions_folder)
    with pytest.raises(UserError, match="is a link that leads out of"):
        handoff.iter_items(root.format(name=questions_folder.name))


# -- reading -----------------------------------------------------------------------------------------------

TEXTS = {
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "Latin-1": (b'{"a":\n "\xe9"}', "is not UTF-8 (line 2"),
    "cut": (b'{"a": [1, 2', "is not JSON (line 1, column 12"),
    "deep": (b"[" * 200_000, "nested too deeply"),
    "deep and closed": (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "of 5000 digits"),
    "20 digits": (b'{"a": ' + b"9" * 20 + b"}", "of 20 digits"),
    "1e999": (b'{"a": 1e999}', "holds the number 1e999"),
    "NaN": (b'{"a": NaN}', "holds NaN"),
    "-Infinity": (b'{"a": [-Infinity]}', "holds -Infinity"),
    "half a pair": (b'{"q": {"b": ["x\\ud83d"]}}', "half of a character (\\ud83d) at q.b[0]"),
    "half a pair as key": (b'{"\\udc00": 1}', "half of a character (\\udc00)"),
    "empty": (b"", "is not JSON (line 1"),
    "zeros": (b"\0" * 100, "is not JSON"),
}


def test_damaged_json_is_one_line_that_names_flag_and_file(tmp_path):
    path = tmp_path / "x.json"
    for data, words in TEXTS.values():
        path.write_bytes(data)
        with pytest.raises(UserError) as error:
            files.read_json(path, "--flag")
        said = str(error.value)
        assert said.startswith(f"--flag: {path} ") and words in said and "\n" not in said and len(said) < 500, words
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="--flag: .*x.json is larger than"):
        files.read_json(path, "--flag")
    for data in (
        *(b"a: [1", b"a: 2020-99-99", b"[1]: 2\n", b"- 1", b"a: b: c", b"\xff\xfea"),
        *(b"a: !!python/name:os.system x", b"? {a: 1}\n: 2", b"[" * 5000, b"\0"),
    ):
        (tmp_path / "args.yaml").write_bytes(data)
        with pytest.raises(UserError, match=f"^--model: {tmp_path}/args.yaml [^\n]*$"):
            files.read_yaml(tmp_path / "args.yaml", "--model")


def test_sound_json_is_read(tmp_path):
    path = tmp_path / "x.json"
    for text in (
        *('{"a": 9223372036854775807}', '{"a": "\\ud83d\\ude00"}', '{"a": "\\\\ud83d"}'),
        *('\ufeff{"a": "b"}', '{"a": 1, "a": 2}'),
    ):
        path.write_text(text, encoding="utf-8")
        assert files.read_json(path, "--flag", dict) == json.loads(text.removeprefix("\ufeff"))
        with pytest.raises(UserError, match="must hold a list .* not an object"):
            files.read_json(path, "--flag", list)


def test_nan_counts_as_null_where_asked(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": NaN}\n\n{"b": [1e999, 1.5]}\n{"cut\n\xff\n')
    bad = []
    found = list(files.read_jsonl(tmp_path / "x.jsonl", "--run", bad.append))
    assert found == [(1, {"a": None}), (3, {"b": [None, 1.5]})] and bad == [4, 5]
    with pytest.raises(UserError, match="x.jsonl: line 4 is not JSON"):
        list(files.read_jsonl(tmp_path / "x.jsonl", "--run"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", [*KINDS, "socket", "no rights to the folder", "a name that is too long", "zero byte"])
def test_what_is_no_file_is_refused_at_once(kind, tmp_path):
    names = {"a name that is too long": "x" * 300, "zero byte": "a\0b", "no rights to the folder": "none/x.json"}
    path = tmp_path / names.get(kind, "x.json")
    if kind == "socket":
        os.chdir(tmp_path)  # the name of a socket is short
        socket.socket(socket.AF_UNIX).bind("x.json")
    elif kind == "link to a file":
        path.symlink_to("/etc")
    elif kind in KINDS:
        put(path, kind, tmp_path / "outside")
    for read in (files.read_json, files.read_yaml, files.read_text):
        with pytest.raises(UserError, match="^--flag: ") as error:
            read(path, "--flag")
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


# -- writing to a full, read-only or unfit place ---------------------------------------------------------------


WRITERS = {
    "bytes": lambda path: path.write_bytes(b"x" * 2_000_000),
    "torch.save": lambda path: torch.save({"a": torch.randn(300_000)}, path),
    "torch.save to a file": lambda path: torch.save({"a": torch.randn(300_000)}, open(path, "wb")),
    "safetensors": lambda path: save_file({"a": torch.randn(300_000)}, path),
    "numpy": lambda path: np.save(open(path, "wb"), np.random.randn(300_000)),
    "text, closed later": lambda path: open(path, "w").write("x" * 2_000_000),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("way", ["path", "folder"])
def test_a_full_disk_is_one_line_whatever_library_writes(name, way, disk):
    target = disk / "target"
    inner, atomic = (target, files.atomic_path) if way == "path" else (target / "old", files.atomic_dir)
    files.write_text(inner, "old")
    fill(disk, 500_000)
    said = f"cannot write {target} .No space left on device.; .* is kept: free some space"
    with pytest.raises(files.DiskError, match=said), atomic(target) as temporary:
        WRITERS[name](temporary if way == "path" else temporary / "file")
    assert inner.read_text() == "old"
    assert {path.name for path in disk.iterdir()} == {"target", "filler"}, "no half file stays"


@pytest.mark.parametrize(
    "fault", ["read-only disk", "a file instead of the folder", "a folder instead of the file", "an over-long name"]
)
def test_what_cannot_be_written_is_one_line(fault, disk):
    path = disk / "folder/x"
    path.parent.mkdir()
    if fault == "read-only disk":
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    elif fault == "a file instead of the folder":
        path.parent.rmdir()
        path.parent.write_text("")
    elif fault == "a folder instead of the file":
        (path / "inner").mkdir(parents=True)
    else:
        path = path.with_name("x" * 300)
    for write in (
        lambda: files.write_text(path, "x"),
        lambda: files.write_json(path, [1]),
        lambda: files.append_line(path, "x"),
        lambda: files.place_file(__file__, path),
        lambda: files.touch(path),
    ):
        with pytest.raises(UserError) as error:
            write()
        assert "\n" not in str(error.value) and str(path)[:140] in str(error.value)


@pytest.mark.parametrize("way", ["bytes", "atomic_path", "atomic_dir"])
def test_data_is_on_disk_before_the_file_gets_its_name(way, tmp_path, monkeypatch):
    """Else a power failure leaves an empty file under that name."""
    done, fsync, replace = [], os.fsync, os.replace

    def inode(file):
        return os.fstat(file).st_ino if isinstance(file, int) else os.stat(file).st_ino

    monkeypatch.setattr(os, "fsync", lambda file: (done.append(("fsync", inode(file))), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("replace", inode(a))), replace(a, b)))
    if way == "bytes":
        files.write_bytes(tmp_path / "x", b"data")
    elif way == "atomic_path":
        with files.atomic_path(tmp_path / "x") as file:
            file.write_bytes(b"data")
    else:
        with files.atomic_dir(tmp_path / "x") as folder:
            (folder / "y").write_bytes(b"data")
    written = tmp_path / "x/y" if way == "atomic_dir" else tmp_path / "x"
    assert done[0] == ("fsync", inode(written)) and done[1][0] == "replace"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_atomic_dir_replaces_a_folder_or_a_link_and_opens_files_to_the_group(tmp_path):
    x, y = tmp_path / "x", tmp_path / "y"
    for number in range(3):
        if number == 2:
            shutil.move(x, y)
            x.symlink_to(y)
        with files.atomic_dir(x) as folder:
            (folder / f"{number}").touch(mode=0o600)
        assert [path.name for path in x.iterdir()] == [f"{number}"] and not x.is_symlink()
        assert (x / f"{number}").stat().st_mode & 0o777 == 0o644
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"} and (y / "1").exists()
    with pytest.raises(ZeroDivisionError), files.atomic_dir(x) as folder:
        (folder / "half").write_text(str(1 / 0))
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"} and (x / "2").exists()


def test_a_placed_file_is_linked_or_copied_once(tmp_path, monkeypatch):
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"one")
    files.place_file(a, b)
    assert b.samefile(a)

    def no_links(*_):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", no_links)
    files.place_file(a, c)
    inode = c.stat().st_ino
    files.place_file(a, c)
    assert c.stat().st_ino == inode != a.stat().st_ino, "not copied again"
    for change in (b"two", b"three"):  # another time, then another size
        c.write_bytes(change)
        files.place_file(a, c)
        assert c.read_bytes() == b"one"
    with pytest.raises(UserError, match="no regular file"):
        files.place_file(tmp_path, tmp_path / "d")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}


def test_names_of_255_bytes_are_the_longest():
    assert files.short_name("é" * 127 + "x") == "é" * 127 + "x"
    short = [files.short_name("é" * 127 + "xx" + end) for end in "ab"]
    assert short[0] != short[1] and all(len(name.encode()) in (254, 255) for name in short)


def test_a_line_that_the_disk_cut_is_ended_before_the_next(disk):
    log = files.Lines(disk / "log")
    log.add("first")
    filler = fill(disk)
    with pytest.raises(files.DiskError):
        for _ in range(100):
            log.add("x" * 1000)
    filler.unlink()
    log.add("last")
    log.close()
    lines = (disk / "log").read_text().split("\n")
    assert lines[0] == "first" and lines[-2:] == ["last", ""] and {len(line) for line in lines[1:-3]} <= {1000}


def test_a_full_disk_and_other_ends_of_a_script_are_one_line(disk, capsys, monkeypatch):
    fill(disk)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)

    def write():
        (disk / "somewhere").write_bytes(b"x" * 10_000)

    def main(error):
        if not isinstance(error, BaseException):
            error()
        raise error

    for error, status, words in (
        (write, 2, "No space left on device"),
        (UserError("--x: no"), 2, "error: --x: no"),
        (cli.Stop("the budget is reached", 3), 3, "error: the budget is reached"),
        (KeyboardInterrupt(), 130, "stopped (Ctrl-C): run it again"),
        (KeyboardInterrupt("saved"), 130, "stopped (Ctrl-C): saved"),
        (OSError(errno.ENAMETOOLONG, "", "x"), 2, "name a shorter path"),
        (OSError(errno.EDQUOT, "", "x"), 2, "free some space"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.run(lambda error=error: main(error), "run it again")
        said = capsys.readouterr().err
        assert end.value.code == status and words in said and said.count("\n") == 1
    with pytest.raises(FileNotFoundError):  # a defect of ours keeps its traceback
        cli.run(lambda: main(OSError(errno.ENOENT, "No such file", "x")))


def test_the_next_start_removes_what_a_killed_process_left(tmp_path):
    """Of this machine's dead processes only: not the files of one that runs, and no other file."""
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from ares import files\n"
        f"os.chdir({str(tmp_path)!r})\nwith files.atomic_path('a') as file, files.atomic_dir('b') as folder:\n"
        "    file.write_text('half'); (folder / 'part').write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    left = set(tmp_path.iterdir())
    assert len(left) == 2
    (tmp_path / ".tmp-notes").touch()
    other_machine = tmp_path / f".tmp-{0:08x}-{max(left).name.split('-', 2)[2]}"
    other_machine.touch()
    with files.atomic_path(tmp_path / "c") as running:
        running.touch()
        files.writable_dir(tmp_path, "--x")
        assert set(tmp_path.iterdir()) == {tmp_path / ".tmp-notes", other_machine, running}


# -- one process at a time -----------------------------------------------------------------------------------


def test_only_one_says_who_holds_the_lock_and_ends_with_the_process(tmp_path):
    """A killed holder's file locks nobody out, one that ends removes it, and of many that try at once one has it."""
    lock = tmp_path / "run/lock"
    code = "import sys; from ares.launch import only_one\n"
    code += f"with only_one({str(lock)!r}, 'x'): print('held', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert holder.stdout.readline() == "held\n"
    for _ in range(2):  # a refused one leaves the holder's name there
        with pytest.raises(UserError, match=f"--run_dir r: process {holder.pid} on .*since .*"):
            with only_one(lock, "--run_dir r"):
                pass
    holder.kill()
    holder.wait()
    lock.write_text(lock.read_text() + " " * 99)  # text that is longer than ours
    with only_one(lock, "--run_dir r"):
        assert json.loads(lock.read_bytes())["pid"] == os.getpid() and not lock.read_text().endswith(" ")
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        worker.start()  # inherits the file
    with only_one(lock, "--run_dir r"):
        pass
    worker.kill()
    inside, most = [], []

    def work(i):
        with contextlib.suppress(UserError), only_one(lock, "x"):
            inside.append(i)
            most.append(len(inside))
            inside.remove(i)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(400)))
    assert max(most) == 1 and not lock.exists()
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"), only_one(lock, "x"):
        pass
    assert not (tmp_path / "elsewhere").exists()


# -- ares/cli.py ---------------------------------------------------------------------------------------------


def test_given_flags_are_those_of_the_command_line(monkeypatch):
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--bs", type=int, default=2)
    parser.set_defaults(mode="x")
    assert cli.given_flags(parser, ["--lr", "1.0"]) == {"lr"}
    assert vars(parser.parse_args([])) == {"lr": 1.0, "bs": 2, "mode": "x"}, "the defaults are back"
    for value, faults in (("fp16", 1), ("fp8", 1), ("bf16", 0), ("no", 0)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
        assert len(cli.precision_faults()) == faults


def test_only_rank_0_prints(monkeypatch, capsys):
    for rank, said in (("0", ("a\n", "warning: b\n")), ("1", ("", ""))):
        monkeypatch.setenv("RANK", rank)
        cli.print0("a")
        cli.warn0("b")
        assert capsys.readouterr() == said
