"""What the Teacher's tests share: questions folders made of real questions, and a client in a process of its own."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import haiku
import haiku_for_correction_feedback
from ares import cli, files
from ares.sentences import split_text
from teacher import handoff
from teacher.budget import Totals, read_log
from teacher.prompts import WORDING, correction_request, scoring_request
from tests.api_server import KEY
from tests.conftest import ROOT
from tools import win_rate

PICTURE, CHOICES, TEXT = "952", "363", "155"  # test questions: an image; choice images only; text
MODEL = "qwen2.5-vl"  # an open model, as servers name it
HAIKU_45 = "claude-haiku-4-5-20251001"  # a model of another family than the default
CREDIT = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to upgrade."


def lay_out(root, action, qid, sentences, problems, sample=None):
    """One prepared item, as RL and preprocessing leave it."""
    folder = handoff.question_dir(root, action, 0, qid)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / handoff.RATIONALE, handoff.form(sentences) + "\n", flush=False)  # thousands of them
    files.write_text(folder / handoff.REQUEST, scoring_request(problems[qid], sentences), flush=False)
    if sample is not None:
        handoff.place_images(folder, sorted((sample / "images" / qid).glob("*.png")))
    return folder


def many_items(root, count, problems):
    """`count` text-only items of real questions, no two alike; 4 actions. Returns digest of the request -> folder."""
    qids = [qid for qid, problem in problems.items() if problem["solution"].strip() and not problem.get("image")]
    found = {}
    for number in range(count):
        qid, round_ = qids[number // 4 % len(qids)], number // 4 // len(qids)
        sentences = split_text(problems[qid]["solution"].replace("\n", "\\n"))[:8]
        action = number % 4 + 4 * round_
        folder = lay_out(root, action, qid, [f"Attempt {action} at it.", *sentences], problems)
        found[hashlib.sha256((folder / handoff.REQUEST).read_bytes()).hexdigest()] = folder
    handoff.mark_exported(root)
    return found


def stops(call, words, status=2) -> str:
    """Assert that `call()` ends in one line that matches `words`, with that exit status; return the line."""
    with pytest.raises(cli.UserError, match=words) as error:
        call()
    line = str(error.value)
    assert getattr(error.value, "status", 2) == status and "\n" not in line, line
    return line


class World:
    """A questions folder beside a server; haiku.py runs on it in this process, with the flags `always`."""

    def __init__(self, server, root, *always):
        self.server, self.root, self.always = server, Path(root), always

    def flags(self, *more) -> list[str]:
        """Arguments of haiku.py. What `more` repeats overrides them."""
        always = ("--questions_dir", self.root, "--base_url", self.server.url, "--data_root", "no-data-here")
        return [str(flag) for flag in (*always, *self.always, *more)]

    def ask(self, *more) -> None:
        haiku.main(self.flags(*more))

    def stops(self, words, *more, status=2) -> str:
        return stops(lambda: self.ask(*more), words, status)

    def client(self, *more, patch="") -> subprocess.Popen:
        return client(*self.flags(*more), patch=patch)

    @property
    def items(self) -> list[handoff.Item]:
        return handoff.iter_items(self.root)

    def folder(self, number=0) -> Path:
        return self.items[number].folder

    def request(self, number=0) -> str:
        return (self.folder(number) / handoff.REQUEST).read_text()

    @property
    def scores(self) -> dict[str, str]:
        return scores(self.root)

    @property
    def answered(self) -> int:
        return len(self.scores)

    @property
    def done(self) -> list[int]:
        """Actions whose signal counts."""
        return sorted({item.action for item in self.items if handoff.is_done(self.root, item.action)})

    @property
    def totals(self) -> Totals:
        return read_log(self.root / "teacher/spend.jsonl")

    @property
    def records(self) -> list[dict]:
        """The records of its batches."""
        return [json.loads(path.read_text()) for path in sorted((self.root / "teacher/batches").glob("*.json"))]

    @property
    def submitted(self) -> list[int]:
        """Requests of each batch that the server has."""
        return [len(batch.requests) for batch in self.server.batches]


def correct_one(flags, tmp_path, sample, problems) -> tuple[Path, dict]:
    """haiku_for_correction_feedback.py on one question: (its folder, its corrected problem)."""
    data = sample / "ScienceQA/data"
    qid = json.loads((data / "scienceqa/pid_splits.json").read_text())["test"][0]
    folder, output = handoff.question_dir(tmp_path / "correction", 0, 0, qid), tmp_path / "correction.json"
    handoff.write_rationale(folder, ["It is so."])
    handoff.write_request(folder, correction_request(problems[qid], "It is so."), [])
    argv = ("--data_root", data, "--correction_dir", tmp_path / "correction", "--train_split", "test")
    haiku_for_correction_feedback.main([*map(str, (*flags, *argv, "--output", output))])
    return folder, json.loads(output.read_text())[qid]


def judge(flags, tmp_path, sample, count) -> dict:
    """tools/win_rate.py on `count` questions with images: what it finds."""
    data = sample / "ScienceQA/data"
    qids = json.loads((data / "scienceqa/pid_splits.json").read_text())["test"]
    for name in "AB":
        files.write_json(tmp_path / f"{name}.json", {"preds": [f"By {name}: {q}." for q in qids], "qids": qids})
    systems = [f"{name}={tmp_path / name}.json" for name in "AB"]
    argv = ("--data_root", data, "--questions", count, "--with_image", "--images", sample / "images")
    win_rate.main([*map(str, (*flags, *systems, *argv, "--output", tmp_path / "wins"))])
    return json.loads((tmp_path / "wins/win_rate.json").read_text())


def item_digests(asked) -> list[str]:
    """Digest of the request of each rationale that is asked about, as `many_items` has them."""
    shared, joined, _ = asked.text.partition(WORDING.together)
    texts = [shared + handoff.form(sentences) for sentences in asked.rationales] if joined else [asked.text]
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def paid_usd(server, batch=False):
    """What the server's replies cost at the prices of claude-haiku-5-5."""
    kind = "batch_" if batch else ""
    usd = (server.billed[f"{kind}input_tokens"] * 0.10 + server.billed[f"{kind}output_tokens"] * 0.50) / 1e6
    return usd / 2 if batch else usd


def messages(**changes):
    """text -> a body of the Messages API with fields changed (`absent` removes one)."""

    def made(text):
        message = {"type": "message", "role": "assistant", "model": "claude-haiku-5-5", "stop_reason": "end_turn"}
        message |= {"content": [{"type": "text", "text": text}], "usage": {"input_tokens": 9, "output_tokens": 9}}
        message |= {name: value(text) if callable(value) else value for name, value in changes.items()}
        return json.dumps({name: value for name, value in message.items() if value != "absent"})

    return made


def scores(root):
    """item -> its scores, for every item that has some."""
    return {
        f"{item.action}/{item.rank}/{item.qid}": (item.folder / handoff.SCORES).read_text()
        for item in handoff.iter_items(root)
        if (item.folder / handoff.SCORES).exists()
    }


def sidecar(folder):
    return json.loads((Path(folder) / handoff.SIDECAR).read_text())


def lines_of(path):
    """The entries of a spend log."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


def wait_until(condition, seconds=60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def server_is_idle() -> bool:
    """Whether every request of a client that has ended is processed: the server has a thread for each connection."""
    return not any("process_request" in thread.name for thread in threading.enumerate())


def client(*argv, script="haiku.py", patch="", env=None) -> subprocess.Popen:
    """The script in its own process, as a user runs it; `patch` is Python run before it (times, points of death)."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = [{script!r}, *{[str(arg) for arg in argv]!r}]
{patch}
import {Path(script).stem} as script
from ares import cli
cli.run(script.main)
"""
    environment = {**os.environ, "ANTHROPIC_API_KEY": KEY, **(env or {})}
    environment.pop("ANTHROPIC_BASE_URL", None)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def forked(argv, log, patch=""):
    """haiku.py in a process of its own, forked where the packages are imported; it prints to the file `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.teacher.teacher_tools", "anthropic"])
    names = ("ANTHROPIC_API_KEY", "XDG_CACHE_HOME")
    process = context.Process(target=_forked, args=(argv, log, patch, {name: os.environ[name] for name in names}))
    process.start()
    return process


def _forked(argv, log, patch, environment) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv = ["haiku.py", *argv]
    exec("import os, signal\n" + patch, {})
    cli.run(lambda: haiku.main(argv))
