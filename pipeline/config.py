"""The configuration of run_ares.py: the scripts' own flags, block by block, checked by the scripts' own parsers.

    config = Config("configs/demo.yaml", ["rl.lr=1e-4"])       # raises UserError for what no script would take
    config["rl"], config.value("rl", "k_actions"), config.words("main.py", ["data", "sft"], {"output": ...})

Scripts are imported by their names, when a flag of theirs is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from ares import cli, files
from ares.cli import PROMPT_FORMATS, UserError
from ares.published import PUBLISHED
from pipeline.stages import ROOT

# block of a configuration -> the scripts whose flags it holds; the other keys are settings of the chain
BLOCKS = {
    "data": ("main.py", "run_mm_cot_rl.py", "run_mm_cot_lora.py", "haiku.py", "haiku_for_correction_feedback.py",
             "preprocessing_for_correction_feedback.py", "tools/doctor.py", "tools/win_rate.py", "tools/results.py",
             "tools/report.py", "tools/compare.py"),
    "prompt": ("main.py", "run_mm_cot_rl.py", "run_mm_cot_lora.py", "tools/doctor.py"),
    "rationale": ("main.py", "run_mm_cot_rl.py"),
    "generate": ("main.py", "run_mm_cot_lora.py"),
    "features": ("extract_features.py",),
    "captions": ("extract_caption.py",),
    "start": ("main.py",),
    "rl": ("run_mm_cot_rl.py",),
    "teacher": ("haiku.py", "haiku_for_correction_feedback.py", "tools/win_rate.py"),
    "scores": ("haiku.py",),
    "corrections": ("haiku_for_correction_feedback.py",),
    "sft": ("main.py",),
    "lora": ("run_mm_cot_lora.py",),
    "judge": ("tools/win_rate.py",),
    "report": ("tools/report.py",),
}  # fmt: skip
SETTINGS = {
    "size": "base", "published": "none", "prepare": [], "forms": ["QCM-A", "QCMG-A"], "launch": {},
    "at_once": 1, "teacher_beside_rl": True,
}  # fmt: skip
# d_model, d_ff, layers of encoder and of decoder, heads * d_kv
SHAPES = {"tiny": (256, 512, 4, 256), "base": (768, 2048, 12, 768), "large": (1024, 2816, 24, 1024)}
LAUNCHED = ("start", "rl", "generate", "sft", "lora")  # the stages whose launcher can be set
REMOVABLE, NEEDED = ("features", "captions", "lora", "judge"), ("start", "rl", "sft")  # by, and not by, BLOCK: null
BLOCK = (dict, type(None))
SCRIPTS = {script for scripts in BLOCKS.values() for script in scripts}
NEED_TORCH = ("main.py", "run_mm_cot_lora.py", "tools/doctor.py")  # to check their flags
# flags of folders that a stage of the same run makes
FOLDERS = ("--base_model_dir", "--ref_model", "--evaluate_dir", "--run", "--correction_dir")


class Config:
    """The blocks of a YAML file, with --set applied: `config["rl"]["lr"]`. Raises UserError for what is not known."""

    def __init__(self, path: str, changes: Sequence[str]):
        self.path = path
        self.values = {**SETTINGS, **{block: {} for block in BLOCKS}, **self.read(Path(path))}
        for change in changes:
            self.change(change)
        self.check()
        self.values |= {block: {} for block in BLOCKS if self.values[block] is None and block not in REMOVABLE}

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def read(self, path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
        """A file over the one that it `extends`: flags of its blocks replace or join those, `null` removes a block."""
        read, below = files.read_yaml(path, "--config"), (*below, path.resolve())
        if parent := read.pop("extends", None):
            parent = path.parent / str(parent)
            if parent.resolve() in below:
                raise UserError(f"--config {path}: it extends {parent}, which extends it; remove one of the two")
            values = self.read(parent, below)
            for name, value in read.items():
                joined = isinstance(value, dict) and isinstance(values.get(name), dict)
                values[name] = {**values[name], **value} if joined else value
            return values
        return read

    def change(self, text: str) -> None:
        """Apply one BLOCK.FLAG=VALUE (or SETTING=VALUE)."""
        import yaml

        place, equals, value = text.partition("=")
        block, dot, flag = place.partition(".")
        try:
            parsed = yaml.safe_load(value)  # reads 1e-5 as a text, which is what a flag wants
        except Exception as error:  # as in files.read_yaml
            raise UserError(f"--set {text}: {value} is not YAML ({cli.in_one_line(error, 120)})") from None
        blocks = [*BLOCKS, "launch"]
        known = block in blocks if dot else block in SETTINGS or (block in BLOCKS and isinstance(parsed, BLOCK))
        if not equals or not known or not (flag or not dot):
            raise UserError(f"--set {text}: write BLOCK.FLAG=VALUE, or SETTING=VALUE; blocks: {', '.join(BLOCKS)}")
        if dot and not isinstance(self.values[block], BLOCK):
            raise UserError(f"--set {text}: {block} is not a block of flags in {self.path}; correct that first")
        self.values[block] = {**(self.values[block] or {}), flag: parsed} if dot else parsed

    def check(self) -> None:
        """Refuse unknown blocks and flags, and values that no script takes, in one message, before anything runs."""
        known = [*SETTINGS, *BLOCKS]
        faults = [f"{name}: no such block{nearest(name, known)}" for name in self.values if name not in known]
        faults += setting_faults(self.values)
        for block in BLOCKS:
            value = self.values[block]
            if not isinstance(value, BLOCK):
                faults.append(f"{block}: not a block of flags")
            elif value is None and block in NEEDED:
                faults.append(f"{block}: null removes {', '.join(REMOVABLE)} only; for no flags write {block}: {{}}")
            else:
                places = [place for place in value or {} if (block, place) != ("start", "folder")]
                faults += [
                    f"{block}.{flag}: {why}" for flag in places if (why := self.fault(block, flag, value[flag]))
                ]
        if not faults and (rounds := self.value("rl", "epochs")) > 1 and not self.values["teacher_beside_rl"]:
            faults.append(
                f"rl.epochs: {rounds} rounds of RL need their Teacher beside them; set teacher_beside_rl to true, or "
                "rl.epochs to 1 and use --rounds"
            )
        cli.refuse([f"--config {self.path}: {fault}" for fault in faults])

    def fault(self, block: str, flag: Any, value: Any) -> str | None:
        """What is wrong with a flag of a block, by the parsers of the block's scripts; None for nothing."""
        scripts = [script for script in BLOCKS[block] if flag in self.flags[script]]
        if not scripts:
            script = BLOCKS[block][0]
            return f"{script} has no flag --{flag}{nearest(flag, self.flags[script])}"
        if value is None:
            return None
        if flag == "overwrite" and value:
            return "each time that a stopped run goes on it would begin anew; use --redo STAGE or --fresh"
        given = value if isinstance(value, list) else [value]
        for script in scripts:
            nargs = self.flags[script][flag].nargs
            count = 1 if nargs in (None, "?") else nargs
            if nargs == 0:
                if not isinstance(value, bool):
                    return f"true or false, not {value!r}"
            elif not given or not all(isinstance(each, (str, int, float)) for each in given):
                return f"a text or a number, not {value!r}; a text that YAML reads otherwise needs quotes"
            elif any(str(each).startswith("--") for each in given):
                return f"values, not flags; not {value!r}"
            elif isinstance(count, int) and len(given) != count:
                return f"takes {count} value{'s' * (count > 1)}, not {len(given)}"
            elif said := refusal(parser_of(script).parse_args, [f"--{flag}", *map(str, given)]):
                return said.removeprefix(f"argument --{flag}: ")
        return None

    def value(self, block: str, flag: str) -> Any:
        """A flag as the (first) script of its block reads it: the script's default where the block has none."""
        action, given = self.flags[BLOCKS[block][0]][flag], (self.values[block] or {}).get(flag)
        return action.default if given is None else (action.type or str)(str(given))

    @cached_property
    def flags(self) -> dict[str, dict[str, argparse.Action]]:
        """script -> its flags, without their dashes -> what its parser knows of each."""
        return {
            script: {
                name[2:]: action
                for action in parser_of(script)._actions
                for name in action.option_strings
                if name.startswith("--") and action.dest != "help"
            }
            for script in sorted(SCRIPTS)
        }

    def shows_images(self, script: str) -> bool:
        """Whether --images has an effect; where it has none, scripts refuse it."""
        judged = bool((self.values["judge"] or {}).get("with_image"))
        return judged if script == "tools/win_rate.py" else script not in ("tools/results.py", "tools/compare.py")

    def words(self, script: str, blocks: Sequence[str], filled: Mapping[str, Any]) -> Iterator[str]:
        """The flags of `blocks` that `script` has, as words; {output} and {seed} are replaced."""
        for block in blocks:
            for flag, value in (self.values[block] or {}).items():
                if flag == "images" and not self.shows_images(script):
                    continue
                action = self.flags[script].get(flag)
                takes_value = action is not None and action.nargs != 0
                if action is None or value is None or (value is False and not takes_value):
                    continue
                yield f"--{flag}"
                if takes_value:
                    yield from (fill(str(each), filled) for each in (value if isinstance(value, list) else [value]))


def setting_faults(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings of the chain."""

    def commands(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(each, str) and split_words(each) for each in value)

    forms, launch, at_once = values["forms"], values["launch"], values["at_once"]
    figures = ["none", *dict.fromkeys(each.dataset for each in PUBLISHED)]
    known_forms = isinstance(forms, list) and all(form in PROMPT_FORMATS and forms.count(form) == 1 for form in forms)
    launches = isinstance(launch, dict) and set(launch) <= set(LAUNCHED) and commands(list(launch.values()))
    wanted = {
        "size": (values["size"] in list(SHAPES), f"one of {', '.join(SHAPES)}"),
        "published": (values["published"] in figures, f"one of {', '.join(figures)}"),
        "prepare": (values["prepare"] is None or commands(values["prepare"]), "a list of commands"),
        "forms": (known_forms and forms, f"a list, as [QCM-A], of some of {', '.join(PROMPT_FORMATS)}, each once"),
        "launch": (launch is None or launches, f"a command for some of {', '.join(LAUNCHED)}, as {{rl: torchrun}}"),
        "at_once": (type(at_once) is int and at_once >= 1, "a whole number of at least 1"),
        "teacher_beside_rl": (isinstance(values["teacher_beside_rl"], bool), "true or false"),
    }
    return [f"{name}: {text}; not {values[name]!r}" for name, (fine, text) in wanted.items() if not fine]


def split_words(command: str) -> list[str]:
    """The words of a command; none where a quote is not closed."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def fill(text: str, values: Mapping[str, Any]) -> str:
    """Replace {output} and {seed}; other braces stay."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def nearest(name: Any, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f" (meant: {near[0]}?)" if near else ""


def command_fault(command: str, looking: bool) -> str | None:
    """What the script of a command says against its flags, before anything runs; None for nothing. `looking`: only of
    scripts that need no torch, and without a key of the Teacher."""
    words = shlex.split(command)
    place = next((i for i, word in enumerate(words) if word in SCRIPTS), len(words))
    script, flags = "".join(words[place : place + 1]), words[place + 1 :]
    if not script or (looking and script in NEED_TORCH):
        return None
    for i, word in enumerate(flags):
        if word in FOLDERS and not Path(flags[i + 1]).is_dir():
            flags[i + 1] = str(ROOT)  # an earlier stage will make it
    said = refusal(module_of(script).parse_args, flags)
    return None if said is None or (looking and "_API_KEY is not set" in said) else f"{script}: {said}"


def refusal(parse: Callable[[Sequence[str]], Any], words: Sequence[str]) -> str | None:
    """The message with which a script or its parser refuses `words`; None where it takes them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            parse(words)
    except UserError as error:
        return str(error)
    except SystemExit:
        return said.getvalue().strip().rpartition("error: ")[2]
    return None


def module_of(script: str) -> ModuleType:
    """A script as a module. Each imports little before it works."""
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script makes in its `parse_args`, for single flags: none is required."""

    class Made(Exception):
        pass

    def caught(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Made(parser)

    parse, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, caught
    try:
        module_of(script).parse_args([])
    except Made as made:
        parser = made.args[0]
    finally:
        argparse.ArgumentParser.parse_args = parse
    for one in (*parser._actions, *parser._mutually_exclusive_groups):
        one.required = False
    return parser
