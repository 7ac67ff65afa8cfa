"""The commands in the documentation: each one parses, README's three steps run, and `--help` shows every default."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from ares.cli import UserError
from demo.make_model import build_t5
from teacher import handoff
from tests.api_server import KEY
from tests.conftest import ROOT
from tests.rl import rl_tools
from tests.tiny import predictions

STARTS = ("python", "bash", "accelerate", "torchrun")  # first words of a command that starts a script
SHELL = ("cp", "mkdir", "touch", "for", "export", "tar")  # first words of lines that run in bash
# scripts check that these exist while they parse
FOLDERS = "--base_model_dir --ref_model --evaluate_dir --model --lora --answer_model --correction_dir".split()


def project_files(*patterns: str) -> list[str]:
    """Files of the repository that match the patterns, sorted. The tests are not among them."""
    found = {path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(str(path) for path in found if path.parts[0] != "tests")


DOCUMENTS = project_files("*.md", "docs/*.md", "demo/**/*.md", "benchmarks/*.md")
SOURCES = project_files("*.py", "*/*.py")
SCRIPTS = [path for path in SOURCES if re.search(r"^if __name__ == .__main__.:", (ROOT / path).read_text(), re.M)]


# -- finding commands ------------------------------------------------------------------------------------


@dataclass
class Command:
    """One command of a document: `text` without comments and line breaks, `where` as FILE:LINE."""

    text: str
    where: str

    def words(self) -> list[str]:
        """Its words in the present folder, variables replaced by folder names, brackets of optional flags removed."""
        text = re.sub(r"\$\{?(\w+)\}?", r"\1", re.sub(r"\[(--[^]]*)\]", r"\1", self.text))
        words = shlex.split(text)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        return words


def joined(lines: list[str], first: int, path: str) -> list[Command]:
    """The commands in lines of shell that begin at line `first` of a file."""
    commands, begun = [], ""
    for number, line in enumerate(lines, first):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        text = f"{begun} {line}".strip()
        begun = text[:-1] if text.endswith("\\") else ""
        if text and not begun:
            commands.append(Command(text, f"{path}:{number}"))
    return commands


def indented(text: str, first: int, path: str) -> list[Command]:
    """Commands in indented lines that start a script, with their continuation lines."""
    found, lines = [], text.splitlines()
    for index, line in enumerate(lines):
        if re.match(rf"    ([A-Z_]+=\S+ )*({'|'.join(STARTS)}) ", line):
            end = index
            while lines[end].endswith("\\"):
                end += 1
            found += joined(lines[index : end + 1], first + index, path)
    return found


def blocks_of(text: str, path: str) -> list[list[Command]]:
    """The commands of each ```bash block of a Markdown text."""
    found = re.finditer(r"^```bash\n(.*?)^```", text, re.M | re.S)
    return [joined(block[1].splitlines(), text[: block.start()].count("\n") + 2, path) for block in found]


def commands_of(path: str) -> list[Command]:
    """All commands of a Markdown file (bash blocks, indented lines, inline code) or of a module's docstring."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".py"):
        docstring = ast.get_docstring(ast.parse(text), clean=False) or ""
        return indented(docstring, 1, path)
    prose = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
    inline = re.finditer(rf"`((?:[A-Z_]+=\S+\s)?(?:{'|'.join(STARTS)})\s[^`]*\.(?:py|sh)\s[^`]*)`", prose)
    return [
        *(command for block in blocks_of(text, path) for command in block),
        *indented(prose, 1, path),
        *(Command(" ".join(at[1].split()), f"{path}:{prose[: at.start()].count(chr(10)) + 1}") for at in inline),
    ]


# -- checking them ---------------------------------------------------------------------------------------


class Parsed(Exception):
    """Carries a script's parser out of its parse_args."""


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script makes."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))

    def parse_args(parser, *_):
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        getattr(module, "parse_args", module.main)()
    return caught.value.args[0]


@cache
def full_command(script: str) -> list[str]:
    """The flags that `...` stands for: those of the script's last command in the README."""
    commands = [command.words() for command in commands_of("README.md")]
    return [words[words.index(script) + 1 :] for words in commands if script in words][-1]


def spelled_out(script: str, words: list[str]) -> list[str]:
    """The flags with `...` replaced: by a word after a flag, else by the script's flags in the README."""
    out = []
    for before, word in zip([script, *words], words, strict=False):
        if word != "...":
            out.append(word)
        else:
            out += ["word"] if before.startswith("--") else full_command(script)
    return out


def check_launcher(words: list[str]) -> None:
    """The launcher's own flags, with the script after them."""
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert words[1] == "launch"
        launch_command_parser().parse_args(words[2:])
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(words[1:])


def check_script(script: str, words: list[str]) -> None:
    """Flags exist under their full names, and the script's parse_args accepts them."""
    if script == "run_tests.sh":  # its options are pytest's; the useful ones are in its help
        text = subprocess.run(["bash", ROOT / script, "--help"], capture_output=True, text=True).stdout
        assert all(word in text for word in words if word.startswith("-")), words
        return
    script = {"run_demo.sh": "demo/run.py", "benchmarks/run_all.sh": "benchmarks/bench_sft.py"}.get(script, script)
    script = re.sub(r"\.sh$", ".py", script)
    words = spelled_out(script, words)
    known = parser_of(script)._option_string_actions
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
    assert not unknown, f"{script} has no {' '.join(unknown)}"
    for flag, value in zip(words, words[1:], strict=False):
        if flag in FOLDERS:
            Path(value).mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    getattr(module, "parse_args", parser_of(script).parse_args)(words)


def check_command(command: Command) -> None:
    """Check one command in the present folder. Raises AssertionError with its place and what is wrong."""
    first = command.text.split()[0]
    if first == "pip":
        return
    if first in SHELL:
        done = subprocess.run(["bash", "-ec", command.text], capture_output=True, text=True)
        assert done.returncode == 0, f"{command.where}: {command.text}: {done.stderr}"
        return
    words = command.words()
    assert words[0] in STARTS, f"{command.where}: {command.text}: not a command that this test knows"
    if words[1] == "-c":
        compile(words[2], command.where, "exec")
        return
    at = next((index for index, word in enumerate(words) if re.search(r"\.(py|sh)$", word)), None)
    assert at is not None and (ROOT / words[at]).is_file(), f"{command.where}: {command.text}: no such script"
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(messages):
            check_launcher(words)
            check_script(words[at], words[at + 1 :])
    except (AssertionError, SystemExit, UserError) as fault:
        raise AssertionError(f"{command.where}: {command.text}: {fault} {messages.getvalue()[-500:]}") from None


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """The present folder is a user's: with what they downloaded, and a run folder that waits for its replies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("RUN", "RUN")
    for name in ("instruct_captions.json", "vit.pth", "name_map.json", "map.png"):
        Path(name).write_text("{}")
    with tarfile.open("aokvqa_v1p0.tar.gz", "w:gz") as archive:
        archive.add("name_map.json")
    for action in range(4):
        Path(f"RUN/questions/{action}/p0/1").mkdir(parents=True)
    for name in ("data", "preprocessing_after_RL"):
        Path(name).mkdir()


@pytest.mark.parametrize("path", [*DOCUMENTS, *(path for path in SOURCES if commands_of(path))])
def test_commands_parse(path, downloads):
    for command in commands_of(path):
        check_command(command)


def test_commands_are_found():
    """A change of layout must not hide commands from this file."""
    count = {path: len(commands_of(path)) for path in (*DOCUMENTS, *SOURCES)}
    assert count["README.md"] >= 17 and count["docs/data.md"] >= 14 and count["docs/teacher.md"] >= 8
    assert count["docs/rl.md"] >= 7, "inline commands among them"
    silent = {path for path in SCRIPTS if not count[path]}
    assert not silent, "scripts whose docstring has no command"


@pytest.mark.parametrize(
    "text",
    [
        "python haiku.py --question_dir $RUN/questions",  # no such flag
        "python haiku.py --questions $RUN/questions",  # argparse would take the beginning of a flag
        "python haikus.py --questions_dir $RUN/questions",
        "python haiku.py --teacher gpt4",
        "python haiku.py --batch --watch",  # the script's own check
        "accelerate launch run_mm_cot_rl.py ... --epoch 1",
        "accelerate launch --num_process 2 main.py ... --bs 4",
        "torchrun --nproc 2 --procs 3 main.py ...",
        "python tools/results.py --system A --format word",
        "bash preprocessing_after_RL/processing_sentence_level_feedback.sh --question $RUN/questions",
        "bash run_tests.sh --fast",
        "bash run_demo.sh [--seed 0] [--sizes smoke]",
        "cp nothing.json data/",
        "haiku.py --questions_dir $RUN/questions",
    ],
)
def test_a_wrong_command_is_found(text, downloads):
    with pytest.raises(AssertionError, match=re.escape(text)):
        check_command(Command(text, "here"))


# -- --help ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_default(script):
    parser = parser_of(script)
    text = " ".join(parser.format_help().split())
    silent = []
    for action in parser._actions:
        default = action.default
        if not action.option_strings or action.nargs == 0 or default in (None, argparse.SUPPRESS, "", [], ()):
            continue
        shown = parser._get_formatter()._expand_help(action)
        values = [" ".join(map(str, default))] if isinstance(default, (list, tuple)) else [str(default)]
        values += [f"{default:g}"] if isinstance(default, float) else []
        wanted = [value for value in values if re.search(rf"default:? {re.escape(value)}(?![\w.]*\w)", shown)]
        assert " ".join(shown.split()) in text
        silent += [] if wanted else [f"{action.option_strings[0]} ({default}): {shown}"]
    assert not silent, f"{script}: the help of these flags has no default"


# -- the three steps of the README, run ------------------------------------------------------------------

# appended to a script's command: the flags of a small run, and the offline Teacher
SMALL = {
    "run_mm_cot_rl.py": "--bs 4 --output_len 24 --rl_batch_size 4 --rl_epochs 1 --ga_step 2 --poll_seconds 0.2 "
    "--settle_seconds 0.5 --report_to none",
    "haiku.py": "--teacher reference",
    "haiku_for_correction_feedback.py": "--teacher reference",
    "main.py": "--bs 4 --epoch 1 --output_len 24",
    "run_mm_cot_lora.py": "--bs 4 --epoch 1 --output_len 8",
}


SIZES = {"train": 7, "eval": 2, "test": 2}  # questions of its splits


class User:
    """Follows the README in a copy of the repository with seven questions and a tiny rationale model."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.said = {}  # script -> what its last start printed

    def small(self, command: Command) -> tuple[str, str]:
        """(script or "", the command with the flags of a small run)."""
        script = next((word for word in command.words() if re.search(r"\.(py|sh)$", word)), "")
        return script, f"{command.text} {SMALL.get(script, '')}"

    def type(self, command: Command) -> None:
        """Run a command in bash as it is typed."""
        script, text = self.small(command)
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command.where}: {text}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
        self.said[script] = done.stdout

    def train(self, command: Command) -> None:
        """Run the script of an `accelerate launch` in this process, which has loaded torch."""
        script, text = self.small(command)
        for name, value in self.environment.items():
            text = re.sub(rf"\${name}\b", value, text)
        words = shlex.split(text)
        assert words[:3] == ["accelerate", "launch", script]
        importlib.import_module(script.removesuffix(".py")).main(words[3:])

    def rl(self, command: Command, feedback: list[Command], *flags: str) -> Path:
        """RL, and the commands of `feedback` beside it once it waits. Returns its run folder, $RUN from then on."""
        runs = self.folder / "RL_models"
        before, faults = set(runs.glob("*")), []

        def teacher() -> None:
            run = None
            try:
                while not (run := next(iter(set(runs.glob("*")) - before), None)) or not handoff.exported(
                    run / "questions"
                ):
                    time.sleep(0.1)
                self.environment["RUN"] = str(run.relative_to(self.folder))
                for each in feedback:
                    self.type(each)
            except BaseException as fault:
                faults.append(fault)
            for action in range(4) if faults and run else ():  # RL must not wait for ever
                handoff.mark_done(run / "questions", action)

        beside = threading.Thread(target=teacher, daemon=True)
        beside.start()
        try:
            self.train(Command(" ".join([command.text, *flags]), command.where))
        finally:
            beside.join(5)
            if faults:
                raise faults[0]
        return runs.parent / self.environment["RUN"]


@pytest.fixture
def user(tmp_path, monkeypatch, sample, t5_tokenizer, t5_tokenizer_dir):
    for path in ROOT.iterdir():  # data and results are in the copy, code is the repository's
        if path.suffix == ".py" or path.name in ("ares", "rl", "sft", "teacher", "tools", "vision"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "preprocessing_after_RL", tmp_path / "preprocessing_after_RL")
    data = rl_tools.make_data(tmp_path, sample, 7)
    (data / "captions.json").rename(data / "instruct_captions.json")
    (data / "images").symlink_to(sample / "images")
    rl_tools.make_model(tmp_path / "models/mm-cot-base-rationale", data, t5_tokenizer)
    build_t5(t5_tokenizer_dir, tmp_path / "t5", d_model=32, layers=2, heads=4, vocab_size=32128)
    monkeypatch.chdir(tmp_path)
    return User(tmp_path)


@pytest.mark.slow
def test_the_three_steps_of_the_readme_run(user):
    section = "## The three steps on real data"
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(section)[2].partition("\n## ")[0]
    _, ([rl], in_place, by_hand), ([generate, *clean_and_correct, tune],), ([lora],) = (
        blocks_of(step, "README.md") for step in text.split("\n### ")
    )

    runs = [user.rl(rl, in_place), user.rl(rl, by_hand, "--seed", "1")]
    for run in runs:
        (rollout,) = rl_tools.metrics_of(run, "rollout")
        assert rollout["rationales"] == 28 and rollout["share_dropped"] == 0
        assert {path.name for path in (run / "0").iterdir()} >= rl_tools.ROUND_FILES
    assert user.said["haiku.py"].count("llm_done.txt written") == 4

    user.train(generate)
    for command in clean_and_correct:
        user.type(command)
    corrections = user.folder / "data/scienceqa/correction.json"
    assert corrections.read_bytes() != corrections.with_name("problems.json").read_bytes()
    user.train(tune)
    (sft,) = (user.folder / "experiments").iterdir()
    user.environment["SFT"] = str(sft.relative_to(user.folder))
    user.train(lora)
    (adapter,) = sft.glob("mm_cot_lora_*")
    for folder, splits in ((runs[1] / "0", "train eval test"), (sft, "train eval test"), (adapter, "test")):
        for split in splits.split():
            assert len(predictions(folder, split)["preds"]) == SIZES[split]


@pytest.mark.slow
def test_the_command_for_a_starting_model_runs(user):
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition("## The starting rationale model")[2]
    command = blocks_of(text, "docs/data.md")[0][0]
    user.train(Command(f"{command.text} --model t5", command.where))
    folder = user.folder / "models/rationale"
    assert {split: len(predictions(folder, split)["preds"]) for split in SIZES} == SIZES
    # RL accepts it: after its checks of flags, data and checkpoints it writes the run folder
    rl = next(command for command in commands_of("README.md") if "run_mm_cot_rl.py" in command.text)
    flags = "--base_model_dir models/rationale --ref_model models/rationale --phase collect"
    user.train(Command(f"{rl.text} {flags}", rl.where))
    (run,) = (user.folder / "RL_models").iterdir()
    assert handoff.exported(run / "questions")


def test_the_memory_table_is_what_the_script_prints(capsys):
    from benchmarks import rl_memory

    rl_memory.main([])
    printed = capsys.readouterr().out.strip()
    assert printed.count("\n") == 3 and printed in (ROOT / "docs/rl.md").read_text()
