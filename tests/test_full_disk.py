"""A disk that gets full or is read-only, in every stage: one line that names the file, and no paid reply is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

import extract_features
import haiku
import main as sft_main
import run_mm_cot_lora
import run_mm_cot_rl
from ares import cli, files
from ares.cli import UserError
from rl import metrics
from teacher import handoff
from tests.api_server import ApiServer
from tests.disk import fill, small_disk
from tests.rl import rl_tools
from tests.teacher.teacher_tools import client, many_items
from tools import prepare_data, report


@pytest.mark.parametrize("at", ["the start", "the middle"])
def test_no_paid_reply_is_lost_when_the_disk_gets_full(at, tmp_path, problems, api_environment):
    """30 requests are in flight when the disk gets full: every reply that the server gave is on disk after."""
    with small_disk(tmp_path / "disk", "24m") as disk, ApiServer() as server:
        many_items(disk / "questions", 200, problems)
        server.latency = 1.0
        flags = ("--questions_dir", disk / "questions", "--base_url", server.url, "--data_root", "none")
        cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        haiku_run = client(*flags, "--concurrency", 30, env=cache)
        count = 1 if at == "the start" else 70
        while len(server.asked) < count and haiku_run.poll() is None:
            pass
        fill(disk)
        out, err = haiku_run.communicate(timeout=120)
        assert haiku_run.returncode == 2, (out[-2000:], err[-2000:])
        said = [line for line in err.splitlines() if "error:" in line]
        assert len(said) == 1 and "No space left on device" in said[0] and "Traceback" not in err
        replies = [item for item in handoff.iter_items(disk / "questions") if handoff.has_reply(item.folder)]
        assert len(replies) == len(server.asked) >= count, "every reply that was paid for"
        assert len(server.asked) <= count + 30 + 30, "nothing new was asked"
        for item in replies:
            assert json.loads((item.folder / handoff.SIDECAR).read_bytes())["model"]
        (disk / "filler").unlink()
        asked, server.latency = len(server.asked), 0.0
        again = client(*flags, env=cache)
        assert again.wait(120) == 0, again.communicate()
        assert len(server.asked) - asked == 200 - len(replies)


def test_a_disk_without_room_for_the_replies_is_refused_before_money_is_spent(disk, problems, monkeypatch,
                                                                               api_environment):  # fmt: skip
    many_items(disk / "questions", 4, problems)
    fill(disk, 300_000)
    with ApiServer() as server:
        with pytest.raises(UserError, match="cannot write .*teacher/reserve .No space left on device"):
            haiku.main(["--questions_dir", str(disk / "questions"), "--base_url", server.url, "--data_root", "none"])
        assert not server.asked


def test_threads_that_meet_a_full_disk_at_once_all_write(tmp_path, monkeypatch):
    """The first one frees the reserve: its name is gone a moment before its blocks are."""
    replace, free = files._replace, threading.Event()

    def full_until_freed(path, data, flush):
        if not free.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(path, data, flush)

    def unlink(path, missing_ok=False):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            time.sleep(0.3)
            free.set()

    with files.reserve(tmp_path / "reserve", 4096), ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr(files, "_replace", full_until_freed)
        monkeypatch.setattr(Path, "unlink", unlink)
        list(pool.map(lambda i: files.write_bytes(tmp_path / f"{i}", b"x"), range(4)))
        assert files.disk_full()
    assert all((tmp_path / f"{i}").read_bytes() == b"x" for i in range(4))


@pytest.fixture(scope="module")
def world(tmp_path_factory, sample, t5_tokenizer, t5_tokenizer_dir):
    tmp = tmp_path_factory.mktemp("world")
    data = rl_tools.make_data(tmp, sample, 4)
    base = rl_tools.make_model(tmp / "base", data, t5_tokenizer)
    files.write_json(tmp / "predictions_ans_test.json", {"preds": ["Solution: It is."], "labels": ["Solution: So."]})
    return SimpleNamespace(tmp=tmp, data=data, base=base, tokenizer=t5_tokenizer_dir, sample=sample)


TRAINING = (
    "--data_root {w.data} --img_type vit --model {w.base} --bs 4 --lr 0.01 --epoch 1 --output_len 12 --input_len 64 "
    "--final_eval --use_generate "
)
STAGES = {
    "sft": (sft_main, TRAINING + "--run_dir {folder}"),
    "lora": (run_mm_cot_lora, TRAINING + "--run_dir {folder} --lora_r 4"),
    "predictions": (sft_main, TRAINING + "--evaluate_dir {folder}"),
    "features": (extract_features, "--data_root {w.sample}/images --output_dir {folder} --workers 0 --img_type vit "
                 "--model_name test_vit --random_weights"),
    "prepare": (prepare_data, "scienceqa --source {w.sample}/ScienceQA/data/scienceqa --images {w.sample}/images "
                "--output {folder}"),
    "report": (report, "--stage a={w.tmp}/predictions_ans_test.json --output {folder}/report.html"),
}  # fmt: skip


def ends_in_one_line(stage, world, folder, capfd, *words: str, save_minutes: int = 0) -> None:
    if stage == "rl":
        rl_tools.Teacher(folder / "questions")
        how = dict(caption_file=None, use_caption=None, bs=4, output_len=16, ga_step=1, rl_epochs=1, max_dropped=1)
        script, argv = run_mm_cot_rl, rl_tools.flags(world, folder, save_minutes=save_minutes, **how)
    else:
        script, flags = STAGES[stage]
        argv = flags.format(w=world, folder=folder).split()
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: script.main(argv))
    said = capfd.readouterr().err
    assert end.value.code == 2 and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "error:" in line]
    assert all(word in line for word in (str(folder), *words)), line


@pytest.mark.parametrize(
    ("stage", "room", "words", "how"),  # room in kB; a part of the name of the file that the line names
    [
        ("sft", 6_000, "checkpoint-1", {}),
        ("sft", 30_000, "", {}),
        ("lora", 300, "checkpoint-1", {}),
        ("predictions", 4, "predict", {}),
        ("rl", 12, "", {}),
        ("rl", 3_000, "state/slot", {}),
        ("rl", 10_000, "run/0", {"save_minutes": 60}),
        ("features", 200, "vit", {}),
        ("prepare", 200, "images/", {}),
        ("report", 20, "report.html", {}),
    ],
)
def test_a_disk_that_gets_full_is_one_line_in_every_stage(stage, room, words, how, world, tmp_path, capfd):
    with small_disk(tmp_path / "disk", "200m") as disk:
        folder = disk / "run"
        shutil.copytree(world.base, folder) if stage == "predictions" else folder.mkdir()
        fill(disk, room * 1000)
        ends_in_one_line(stage, world, folder, capfd, "No space left on device", words, **how)


@pytest.mark.parametrize("stage", ["sft", "lora", "rl", "features", "prepare", "report"])
def test_a_read_only_disk_is_one_line_in_every_stage(stage, world, disk, capfd):
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    ends_in_one_line(stage, world, disk / "run", capfd, "Read-only file system")


@pytest.mark.parametrize("room", [0, 1, 4096, 8192])
def test_metrics_and_tensorboard(room, disk, capfd):
    log = metrics.Metrics(disk / "run", "tensorboard", {})
    log.log("update", 0, 1, {"loss": 1.0})
    fill(disk, room)
    with pytest.raises(UserError, match="cannot write .*(metrics.jsonl|tensorboard) .No space left"):
        for update in range(2, 3000):
            log.log("update", 0, update, {f"loss_{name}": 1.0 for name in range(20)})
