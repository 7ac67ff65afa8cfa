"""What the Teacher's tests share: questions folders made of real questions, and a client in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import haiku
from ares import cli, files
from ares.sentences import split_text
from teacher import batches, handoff
from teacher.handoff import place_images
from teacher.prompts import scoring_request
from tests.api_server import KEY
from tests.conftest import ROOT


def lay_out(root, action, qid, sentences, problems, sample=None):
    """One prepared item, as RL and preprocessing leave it."""
    folder = handoff.question_dir(root, action, 0, qid)
    folder.mkdir(parents=True, exist_ok=True)
    rationale = "{\n" + form(sentences) + "}\n"
    files.write_text(folder / handoff.RATIONALE, rationale, flush=False)  # thousands of them
    files.write_text(folder / handoff.REQUEST, scoring_request(problems[qid], sentences), flush=False)
    if sample is not None:
        place_images(folder, sorted((sample / "images" / qid).glob("*.png")))
    return folder


def form(sentences):
    return ",\n".join(f'"{sentence}": xxx' for sentence in sentences) + "\n"


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


PICTURE, CHOICES, TEXT = "952", "363", "155"  # test questions: an image; choice images only; text
OVERLOADED = {"type": "overloaded_error", "message": "Overloaded"}
CREDIT = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to upgrade."


def flags(server, questions, *more):
    """Arguments of haiku.py. What `more` repeats overrides them."""
    return ["--questions_dir", str(questions), "--base_url", server.url, "--data_root", "no-data-here", *more]


def ask(server, questions, *more):
    haiku.main(flags(server, questions, *more))


def batch_flags(server, questions, *more):
    return flags(server, questions, "--batch", "--poll_seconds", "0.1", *more)


def ask_in_batches(server, questions, *more):
    haiku.main(batch_flags(server, questions, *more))


def batch_records(questions):
    return [json.loads(path.read_text()) for path in sorted((questions / "teacher/batches").glob("*.json"))]


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


def lines_of(path):
    """The entries of a spend log."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


def client(*argv, script="haiku.py", patch="", env=None) -> subprocess.Popen:
    """The script in its own process, as a user runs it; `patch` is Python run before it (times, points of death)."""
    code = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv = [{script!r}, *{[str(arg) for arg in argv]!r}]\n"
        f"{patch}\n"
        f"import {Path(script).stem} as room\n"
        "from ares import cli\n"
        "cli.run(room.main)\n"
    )
    environment = {**os.environ, "ANTHROPIC_API_KEY": KEY, **(env or {})}
    environment.pop("ANTHROPIC_BASE_URL", None)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def batch_client(argv, log, environment) -> None:
    """haiku.py in a forked process (target of multiprocessing), with short pauses; writes what it prints to `log`."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv = ["haiku.py", *argv]
    batches.SETTLE_SECONDS, batches.BACKOFF, batches.MAX_COUNT = 0.2, 0.001, 4
    cli.run(lambda: haiku.main(argv))
