"""The commands in the documentation: each one parses, README's three steps run, and `--help` shows every default."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import subprocess
import tarfile
from functools import cache
from pathlib import Path

import pytest

from ares.cli import UserError
from tests.api_server import KEY
from tests.commands import STARTS, Command, commands_of
from tests.conftest import ROOT

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
    if script == "run_demo.sh":
        words = ["--config", "configs/demo.yaml", *words]
    script = {"run_demo.sh": "run_ares.py", "benchmarks/run_all.sh": "benchmarks/bench_sft.py",
              "benchmarks/gpu.sh": "benchmarks/bench_gpu.py"}.get(script, script)  # fmt: skip
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
    if first == "source":  # run_tests.sh and run_demo.sh have run the same function
        _, script, *rest = command.text.split()
        assert f"{rest[1]}()" in (ROOT / script).read_text() and rest[2:] == ["&&", "source", ".venv/bin/activate"]
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
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, KEY)
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_default(script):
    parser = parser_of(script)
    text, silent = " ".join(parser.format_help().split()), []
    assert "%(" not in text
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


def test_the_memory_table_is_what_the_script_prints(capsys):
    from benchmarks import rl_memory

    rl_memory.main([])
    printed = capsys.readouterr().out.strip()
    assert printed.count("\n") == 9 and printed in (ROOT / "docs/rl.md").read_text()
    # GB that another simulation of these passes gave (tensors that pretend to lie on a GPU); the 0.5 and 1.6 GB of
    # `signal_share` were not in it
    lines = [line.split(" | ") for line in printed.split("\n")[2:]]
    peaks = [[float(cell.strip("*")) for cell in line if "**" in cell] for line in lines]
    assert peaks[0] == pytest.approx([8.0, 13.2], rel=0.1), "sampling"
    assert peaks[2][0] == pytest.approx(19.4 + 0.5, rel=0.1), "PPO"
    assert [peaks[3][0], peaks[5][1]] == pytest.approx([9.7 + 0.5, 28.6 + 1.6], rel=0.1), "checkpointed"
