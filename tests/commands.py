"""The commands in the documentation: bash blocks, indented lines and inline code of Markdown, and docstrings."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import dataclass

from tests.conftest import ROOT

STARTS = ("python", "bash", "accelerate", "torchrun")  # first words of a command that starts a script


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
        if words and words[0] == "srun":  # its own flags come before the command
            del words[: next(i for i, word in enumerate(words) if word in STARTS)]
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
