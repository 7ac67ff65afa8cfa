"""All of ARES by one command: every stage by its own script, from the data to the paper's tables, with the baseline.

    python run_ares.py --config configs/scienceqa_base.yaml --output runs/base --plan       # state, hours, dollars
    python run_ares.py --config configs/scienceqa_base.yaml --output runs/base
    python run_ares.py --config configs/demo.yaml --output demo_run --seeds 0 1 2 --set rl.lr=1e-4 --rounds 2

The chain: prepare and check the data -> features, captions -> starting rationale model -> its rationales (baseline)
-> RL with the Teacher beside it -> rationales without repeats -> corrections -> SFT -> LoRA answers on the starting
model, after RL and after SFT -> win rates -> report.html and tables (table.json, .md, .tex; results.md with the
published figures). A configuration holds the scripts' own flags, stage by stage; every command is printed as it could
be typed, its output goes to {output}/logs. Killed at any moment, the same command goes on. With several seeds each has
its folder {output}/seed{n}, and the tables are pooled.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from ares import cli, files
from ares.cli import PROMPT_FORMATS, UserError, print0
from ares.published import PUBLISHED
from ares.stages import ROOT, Chain, Stage

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
INSTALL = "install the packages: source setup_venv.sh && setup_venv && source .venv/bin/activate"
LAUNCHED = ("start", "rl", "generate", "sft", "lora")  # the stages whose launcher can be set
REMOVABLE, NEEDED = ("features", "captions", "lora", "judge"), ("start", "rl", "sft")  # by, and not by, BLOCK: null
BLOCK = (dict, type(None))
SCRIPTS = {script for scripts in BLOCKS.values() for script in scripts}
NEED_TORCH = ("main.py", "run_mm_cot_lora.py", "tools/doctor.py")  # to check their flags
FOLDERS = (
    "--base_model_dir",
    "--ref_model",
    "--evaluate_dir",
    "--run",
    "--correction_dir",
)  # flags of folders made later
PARTS = ("prepare", "check", "features", "captions", "start", "baseline", "rl", "generate", "correct", "sft", "lora",
         "judge", "results", "report", "table")  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="configs/*.yaml: the scripts' flags, stage by stage")
    add("--output", metavar="DIR", help="folder of all that is made (default: runs/{the configuration's name})")
    add("--set", nargs="+", default=[], metavar="BLOCK.FLAG=VALUE", help="change a setting, as rl.lr=1e-5")
    add("--seed", type=int, default=0, help="seed of data, models, training and sampling")
    add("--seeds", type=int, nargs="+", metavar="N", help="several seeds, one folder each")
    add("--rounds", type=int, default=1, help="RL and SFT so many times, each from the model before it")
    add("--launch", metavar="COMMAND", help="launcher of training and generation, as 'accelerate launch'")
    stages = parser.add_argument_group("stages", "names are " + ", ".join(PARTS) + "; in round 2 rl_2, sft_2, ...")
    stages.add_argument("--from", dest="first", metavar="STAGE", help="begin there; all before it must be finished")
    stages.add_argument("--until", dest="last", metavar="STAGE", help="end with it")
    stages.add_argument("--only", metavar="STAGE", help="this one alone")
    redo = "delete what these made and run them, and what depends on them, again"
    stages.add_argument("--redo", nargs="+", default=[], metavar="STAGE", help=redo)
    stages.add_argument("--fresh", action="store_true", help="delete what an earlier run made and begin again")
    stages.add_argument("--plan", action="store_true", help="print state, hours, dollars of each stage; run nothing")
    stages.add_argument("--dry_run", action="store_true", help="print the commands that are to run; run nothing")
    args = parser.parse_args(argv)
    args.output = args.output or f"runs/{Path(args.config).stem}"
    cli.refuse(
        [f"--rounds must be at least 1, not {args.rounds}"] * (args.rounds < 1)
        + ["--only and --from or --until: give one"] * bool(args.only and (args.first or args.last))
        + [f"--launch: no command ({args.launch!r}); close its quotes"]
        * (args.launch is not None and not _words(args.launch))
        + ["--seed and --seeds: give one"] * ("seed" in cli.given_flags(parser, argv) and args.seeds is not None)
        + ["--seeds: a seed is there twice"] * (len(set(args.seeds or [])) < len(args.seeds or []))
    )
    return args


# -- configuration ---------------------------------------------------------------------------------------


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
        faults = [f"{name}: no such block{_near(name, known)}" for name in self.values if name not in known]
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
            return f"{script} has no flag --{flag}{_near(flag, self.flags[script])}"
        given = value if isinstance(value, list) else [value]
        for action, parser in ((self.flags[script][flag], parser_of(script)) for script in scripts):
            count = 1 if action.nargs in (None, "?") else action.nargs
            if value is None:
                return None
            if action.nargs == 0:
                if not isinstance(value, bool):
                    return f"true or false, not {value!r}"
            elif not given or not all(isinstance(each, (str, int, float)) for each in given):
                return f"a text or a number, not {value!r}; a text that YAML reads otherwise needs quotes"
            elif isinstance(count, int) and len(given) != count:
                return f"takes {count} value{'s' * (count > 1)}, not {len(given)}"
            else:
                try:
                    parser._get_values(action, [str(each) for each in given])
                except argparse.ArgumentError as error:
                    return error.message
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
                    yield from (_fill(str(each), filled) for each in (value if isinstance(value, list) else [value]))


def setting_faults(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings of the chain."""

    def commands(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(each, str) and _words(each) for each in value)

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


def _words(command: str) -> list[str]:
    """The words of a command; none where a quote is not closed."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def _fill(text: str, values: Mapping[str, Any]) -> str:
    """Replace {output} and {seed}; other braces stay."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def _near(name: Any, known: Sequence[str] | Mapping[str, Any]) -> str:
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
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            module_of(script).parse_args(flags)
    except UserError as error:
        return None if looking and "_API_KEY is not set" in str(error) else f"{script}: {error}"
    except SystemExit:
        return f"{script}: {said.getvalue().strip().rpartition('error: ')[2]}"
    return None


def module_of(script: str) -> ModuleType:
    """A script as a module. Each imports little before it works."""
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script makes in its `parse_args`."""

    class Made(Exception):
        pass

    def caught(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Made(parser)

    parse, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, caught
    try:
        module_of(script).parse_args([])
    except Made as made:
        return made.args[0]
    finally:
        argparse.ArgumentParser.parse_args = parse
    raise AssertionError(f"{script} made no parser")


# -- the chain -------------------------------------------------------------------------------------------


class Run:
    """The stages of one seed in one folder."""

    def __init__(self, config: Config, output: Path, seed: int, rounds: int, launch: str | None = None):
        self.config, self.output, self.seed, self.rounds = config, output, seed, rounds
        self.launcher = launch
        self.filled = {"output": output, "seed": seed}
        self.start = Path(_fill(str(config["start"].get("folder") or output / "models/start"), self.filled))

    def command(
        self, script: str, blocks: str, launch: str = "", positional: Sequence[str] = (), **wiring: Any
    ) -> str:
        """A command with the flags of some `blocks`, by the launcher called `launch`. `wiring`: flags that connect the
        stage to others; a list repeats its flag, True is a flag without a value. Raises UserError for a block that has
        one of them."""
        for block in blocks.split():
            if taken := [flag for flag in self.config[block] or {} if flag in wiring]:
                place, fix = f"{block}.{taken[0]}", "use --seed" if taken[0] == "seed" else "remove it"
                raise UserError(f"--config {self.config.path}: {place}: run_ares.py sets --{taken[0]} itself; {fix}")
        launcher = (self.launcher or (self.config["launch"] or {}).get(launch, "python")) if launch else "python"
        words = [*shlex.split(launcher), script, *positional]
        words += self.config.words(script, blocks.split(), self.filled)
        for flag, value in wiring.items():
            for each in value if isinstance(value, list) else [value]:
                words += [f"--{flag}"] if each is True else [f"--{flag}", str(each)]
        return shlex.join(words)

    def stages(self) -> list[Stage]:
        """The whole chain, in order."""
        return [*self.begin(), *(stage for number in range(1, self.rounds + 1) for stage in self.round(number)),
                *self.finish()]  # fmt: skip

    def begin(self) -> Iterator[Stage]:
        """Data, features, captions, the starting model and its rationales."""
        config, out = self.config, self.output
        if config["prepare"]:
            words = {"output": shlex.quote(str(out)), "seed": self.seed}
            commands = [_fill(command, words) for command in config["prepare"]]
            yield Stage("prepare", "data", commands, makes=[out / "data", out / "images"])
        for name, script in (("features", "extract_features.py"), ("captions", "extract_caption.py")):
            if config[name]:
                makes = [out / "vision_features"] if name == "features" else []
                yield Stage(name, script, [self.command(script, name)], uses=["prepare"], makes=makes)
        given = {} if config["start"].get("model") else {"model": self.start}
        yield Stage("check", "data and machine", [self.command("tools/doctor.py", "data prompt", **given)],
                    uses=["prepare", "features", "captions"])  # fmt: skip
        if config["start"].get("model"):
            blocks = "data prompt rationale generate start"
            train = self.command("main.py", blocks, "start", run_dir=self.start, seed=self.seed)
            yield Stage("start", "starting rationale model", [train], uses=["check"], makes=[self.start])
        else:  # main.py writes them where it trains
            yield Stage("baseline", "rationales of the starting model", [self.generation(self.start)], uses=["check"])

    def generation(self, model: Path) -> str:
        blocks = "data prompt rationale generate"
        return self.command("main.py", blocks, "generate", evaluate_dir=model)

    def round(self, number: int) -> Iterator[Stage]:
        """RL, rationales, corrections, SFT of round `number`, from the model before it."""
        config = self.config
        before, after, rl, tuned = self.models(number)
        name = {part: self.named(part, number) for part in ("rl", "generate", "correct", "sft")}

        def sampled(*phase: str) -> str:
            wiring = {"base_model_dir": before, "ref_model": self.start, "run_dir": rl}
            wiring |= {"seed": self.seed + number - 1, "phase": [*phase]}
            return self.command("run_mm_cot_rl.py", "data prompt rationale rl", "rl", **wiring)

        watch = [True] if config["teacher_beside_rl"] else []
        scores = self.command("haiku.py", "data teacher scores", questions_dir=rl / "questions", watch=watch)
        begins = ["start", "baseline"] if number == 1 else [self.named("sft", number - 1)]
        if config["teacher_beside_rl"]:
            commands = [sampled(), scores]
        else:  # the GPUs are free while the Teacher works; finished commands are recorded one by one
            flags = ["--questions_dir", f"{rl}/questions", *config.words("haiku.py", ["data"], self.filled)]
            write = f"bash preprocessing_after_RL/processing_sentence_level_feedback.sh {shlex.join(flags)}"
            commands = [sampled("collect"), write, scores, sampled("train")]
        yield Stage(name["rl"], "RL with sentence scores", commands, uses=begins, makes=[rl],
                    together=config["teacher_beside_rl"])  # fmt: skip
        texts = after / "predictions_ans_train.json"
        flags = shlex.join(["--file_path", str(texts), "--tokenizer", str(after)])
        clean = f"python preprocessing_after_RL/remove_sentence.py {flags}"
        yield Stage(name["generate"], "rationales after RL", [self.generation(after), clean], uses=[name["rl"]])
        corrections = self.corrections(number)
        wiring = {"rationales": after / "remove_repetitive_sentences.json", "correction_dir": corrections}
        commands = [self.command("preprocessing_for_correction_feedback.py", "data", **wiring),
                    self.command("haiku_for_correction_feedback.py", "data teacher corrections", **wiring,
                                 output=corrections / "correction.json")]  # fmt: skip
        yield Stage(name["correct"], "corrections", commands, uses=[name["generate"]], makes=[corrections])
        wiring = {"correction": "True", "correction_file": corrections / "correction.json", "run_dir": tuned}
        blocks = "data prompt rationale generate sft"
        train = self.command("main.py", blocks, "sft", model=after, seed=self.seed, **wiring)
        yield Stage(name["sft"], "SFT on the corrected rationales", [train], uses=[name["correct"]], makes=[tuned])

    def corrections(self, number: int) -> Path:
        return self.output / self.named("corrections", number)

    @staticmethod
    def named(part: str, number: int, between: str = "_") -> str:
        """A stage or folder of round `number`. The first has no number, so that --rounds can be raised later."""
        return part if number == 1 else f"{part}{between}{number}"

    def models(self, number: int) -> tuple[Path, Path, Path, Path]:
        """Folders of round `number`: the model before it, after its RL, RL's run folder, after its SFT."""
        before = self.start if number == 1 else self.output / self.named("sft", number - 1)
        rl, tuned = (self.output / self.named(part, number) for part in ("rl", "sft"))
        return before, rl / str(self.config.value("rl", "epochs") - 1), rl, tuned

    def named_models(self) -> dict[str, Path]:
        """Label -> folder of every rationale model, in order."""
        found = {"start": self.start}
        for number in range(1, self.rounds + 1):
            rl, sft = (self.named(part, number, " ") for part in ("RL", "SFT"))
            _, found[rl], _, found[sft] = self.models(number)
        return found

    def finish(self) -> Iterator[Stage]:
        """Answers of every model, comparisons, tables."""
        config, out, models = self.config, self.output, self.named_models()
        uses = ["start", "baseline"]
        for number in range(1, self.rounds + 1):
            uses += [self.named(part, number) for part in ("generate", "sft")]
        answers: dict[str, Path] = {}
        if config["lora"] is not None:
            commands = []
            for label, form in ((label, form) for label in models for form in config["forms"]):
                answers[f"{label}, {form}"] = folder = out / f"lora/{label.replace(' ', '_')}_{form}"
                splits = {"train_le": "train", "eval_le": "eval", "test_le": "test"}.items() if "G" in form else ()
                texts = {flag: models[label] / f"predictions_ans_{split}.json" for flag, split in splits}
                wiring = {"model": models[label], "prompt_format": form, "run_dir": folder, "seed": self.seed, **texts}
                commands.append(self.command("run_mm_cot_lora.py", "data prompt generate lora", "lora", **wiring))
            title = "LoRA answers, the starting model's as the baseline"
            yield Stage("lora", title, commands, uses=uses, makes=[out / "lora"], at_once=config["at_once"])
        judged = []
        if config["judge"] is not None:
            pairs, blocks = [], "data teacher judge"
            for label, model in list(models.items())[1:]:
                folder, pair = out / f"win_rate/{label.replace(' ', '_')}", [f"{label}={model}", f"start={self.start}"]
                judged.append(folder / "win_rate.json")
                pairs.append(self.command("tools/win_rate.py", blocks, positional=pair, output=folder))
            yield Stage("judge", "win rates over the starting model", pairs, uses=uses, makes=[out / "win_rate"])
        uses = [*uses, "lora", "judge"]
        systems = [f"{label}={folder}" for label, folder in {**models, **answers}.items()]
        tables = {"system": systems, "win_rate": judged, "published": config["published"]}
        shown = self.command("tools/results.py", "data", output=out / "results.md", **tables)
        yield Stage("results", "figures beside the published ones", [shown], uses=uses, makes=[out / "results.md"])
        stages = [system for system in systems if ", QCM-A=" not in system]
        wiring = {"stage": stages, "run": self.models(self.rounds)[2], "win_rate": judged,
                  "correction_dir": self.corrections(self.rounds)}  # fmt: skip
        page = self.command("tools/report.py", "data report", times=out / "stages.json", output=out / "report.html",
                            **wiring)  # fmt: skip
        yield Stage("report", "report.html", [page], uses=uses, makes=[out / "report.html"])
        table = self.command("tools/compare.py", "data", output=out, **tables)
        makes = [out / f"table.{kind}" for kind in ("json", "md", "tex")]
        yield Stage("table", "the closing table", [table], uses=uses, makes=makes)


# -- which stages ----------------------------------------------------------------------------------------


def selected(stages: Sequence[Stage], chain: Chain, args: argparse.Namespace) -> list[Stage]:
    """The stages that --from, --until, --only name. Raises UserError where an earlier one is not finished."""
    names = [stage.name for stage in stages]
    asked = [("from", args.first), ("until", args.last), ("only", args.only), *(("redo", name) for name in args.redo)]
    for flag, name in asked:
        if name and name not in names:
            raise UserError(f"--{flag}: no stage {name}{_near(name, names)}; stages: {', '.join(names)}")
    first = names.index(args.only or args.first or names[0])
    last = names.index(args.only or args.last or names[-1])
    if first > last:
        raise UserError(f"--from {args.first} comes after --until {args.last}")
    chosen = stages[first : last + 1]
    needed = {name for stage in chosen for name in stage.uses} & set(names[:first])
    if missing := [name for name in names if name in needed and name not in chain.done]:
        raise UserError(f"--{'only' if args.only else 'from'}: {missing[0]} is not finished; run it first")
    return chosen


def to_forget(stages: Sequence[Stage], chain: Chain, args: argparse.Namespace) -> list[Stage]:
    """What --redo names and all that depends on it. Raises UserError for other finished stages whose inputs or flags
    changed. Deletes nothing."""
    fresh = args.fresh and (chain.folder / "run.json").exists()
    again = {stage.name for stage in stages} if fresh else set(args.redo)
    for stage in stages:
        begun = stage.name in {**chain.done, **chain.begun} or any(path.exists() for path in stage.makes)
        if stage.name in again or (begun and again & set(stage.uses)):
            again.add(stage.name)
    for stage in stages:
        if stage.name in chain.done and stage.name not in again and (change := chain.change(stage)):
            raise UserError(
                f"{chain.folder}: stage {stage.name} is finished, but {change}; add --redo {stage.name} to run it "
                "again, with what depends on it, or name another --output"
            )
    forgotten = [stage for stage in stages if stage.name in again]
    for path in (path for stage in forgotten for path in stage.makes):
        if path.exists() and not chain.may_delete(path):
            raise UserError(
                f"--{'fresh' if fresh else 'redo'}: {path} is outside {chain.folder} and stays; delete it first"
            )
    return forgotten


# -- plan ------------------------------------------------------------------------------------------------

SPEED = ROOT / "benchmarks/results/speed.json"  # measured seconds per unit of work at size tiny
UNITS = {"sft": "sft_seconds_per_sample", "eval": "generate_seconds_per_question", "rollout": "seconds_per_rollout",
         "ppo": "seconds_per_row", "features": "seconds_per_image"}  # fmt: skip
# d_model, d_ff, layers of encoder and of decoder, heads * d_kv
SHAPES = {"tiny": (256, 512, 4, 256), "base": (768, 2048, 12, 768), "large": (1024, 2816, 24, 1024)}
VOCABULARY = 32128


def products(size: str) -> int:
    """Multiplications per token of a T5: the weights of its linear layers, decoder head included."""
    d, d_ff, layers, inner = SHAPES[size]
    return layers * (12 * d * inner + 6 * d * d_ff) + d * VOCABULARY


def seconds_per_unit(size: str) -> tuple[dict[str, float], str]:
    """(seconds of each kind of work at `size` on this machine's device, where they come from)."""
    device = "cuda" if shutil.which("nvidia-smi") else "cpu"
    measured = files.read_json(SPEED, "benchmarks", dict).get(device)
    if measured is None:
        return {}, f"hours: benchmarks/RESULTS.md has none for {device} yet (bash benchmarks/gpu.sh measures them)"
    factor = products(size) / products(measured["size"])
    found = {}
    for kind, name in UNITS.items():
        value = (measured["stages"].get(kind, {}).get("projection") or {}).get(name)
        if value:
            found[kind] = value * (factor if kind != "features" else 1)
    machine = measured["machine"]
    note = f"hours: from benchmarks/RESULTS.md ({machine.get('gpu') or machine['cpu']}, size {measured['size']})"
    return found, note + f", times {factor:.1f} for size {size}" * (factor != 1)


def amounts(run: Run) -> dict[str, dict[str, float]]:
    """Stage -> kind of work -> how much: questions, rollouts, rows of PPO; `ask_*`: requests to the Teacher."""
    config, data = run.config, read_problems(run)
    train, every = len(data.splits["train"]), sum(len(data.splits[split]) for split in ("train", "val", "test"))
    rollouts = train * config.value("rl", "k_actions") * config.value("rl", "epochs")
    judged = min(len(data.splits["test"]), config.value("judge", "questions") or 10**9)
    one = {
        "features": {"features": sum(bool(problem.get("image")) for problem in data.problems.values())},
        "start": {"sft": train * config.value("start", "epoch"), "eval": every},
        "baseline": {"eval": every},
        "rl": {"rollout": rollouts, "ppo": rollouts * config.value("rl", "rl_epochs"), "ask_score": rollouts},
        "generate": {"eval": every},
        "correct": {"ask_correct": train},
        "sft": {"sft": train * config.value("sft", "epoch"), "eval": every},
        "lora": {"sft": train * config.value("lora", "epoch")
                 * len(run.named_models()) * len(config["forms"])},
        "judge": {"ask_judge": 2 * judged * (len(run.named_models()) - 1)},
    }  # fmt: skip
    return {stage.name: one.get(re.sub(r"_\d+$", "", stage.name), {}) for stage in run.stages()}


def read_problems(run: Run) -> Any:
    """The data folder of the configuration. Raises UserError if it is not there yet."""
    from ares.data_folder import read_data_folder

    root = _fill(run.config.value("data", "data_root"), run.filled)
    return read_data_folder(root, run.config.value("data", "dataset"))


def dollars_per_request(run: Run) -> dict[str, float | None]:
    """Kind of request -> dollars of one, as `--estimate` reckons them; None where the price is not known."""
    from teacher.estimate import expected_usd

    data, found = read_problems(run), {}
    images = run.config["data"].get("images") or data.root / "images"
    for kind, block in (("score", "scores"), ("correct", "corrections"), ("judge", "judge")):
        flags = {**run.config["teacher"], **(run.config[block] or {})}
        shown = None if kind == "judge" and not flags.get("with_image") else _fill(str(images), run.filled)
        k = run.config.value("rl", "k_actions")
        found[f"ask_{kind}"] = expected_usd(kind, data.problems, data.splits["train"], shown, flags, k)
    return found


def processes(command: str) -> int:
    """How many processes a launcher's words start."""
    found = re.search(r"--(?:num_processes|nproc[_-]per[_-]node)[ =](\d+)", command)
    return int(found[1]) if found else 1


def show_plan(run: Run, chain: Chain, chosen: Sequence[Stage]) -> None:
    """Print the table of --plan: what exists, what will run, hours and dollars. Spends nothing, loads no model."""
    rate, note = seconds_per_unit(run.config["size"])
    try:
        work, dollars = amounts(run), dollars_per_request(run)
    except UserError as error:
        work, dollars, note = {}, {}, f"hours and dollars: known once the data are there ({error})"
    print0(f"{run.output} (seed {run.seed})\n{'stage':<12}{'state':<12}{'hours':>8}{'dollars':>10}   what")
    hours = spent = 0.0
    for stage in run.stages():
        state = "done" if stage.name in chain.done else "to run" if stage in chosen else "not chosen"
        if state == "to run" and any(path.exists() for path in stage.makes):
            state = "goes on"
        mine, cells = work.get(stage.name, {}), ["", ""]
        timed = [kind for kind in mine if not kind.startswith("ask_") and mine[kind]]
        if timed and all(kind in rate for kind in timed):
            each = sum(rate[kind] * mine[kind] for kind in timed) / 3600 / processes(stage.commands[0])
            cells[0] = f"{each:.2f}"
            hours += each if state in ("to run", "goes on") else 0
        for kind in mine:
            if kind.startswith("ask_"):
                each = dollars.get(kind)
                cells[1] = "unknown" if each is None else f"{each * mine[kind]:.2f}"
                spent += (each or 0) * mine[kind] if state in ("to run", "goes on") else 0
        print0(f"{stage.name:<12}{state:<12}{cells[0]:>8}{cells[1]:>10}   {stage.title}")
    print0(f"{'in all':<24}{hours:>8.2f}{spent:>10.2f}   of what is to run, the Teacher's answering time aside")
    print0(f"{note}\ndollars: by rule from gold rationales, live or batch as configured; nothing is asked or spent")


# -- main ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    try:
        carry_out_all(parse_args(argv))
    except ImportError as error:
        raise UserError(f"{sys.executable}: {error}; {INSTALL}") from error


def carry_out_all(args: argparse.Namespace) -> None:
    """Check all runs, then carry out one after the other, then pool their tables."""
    config, looking = Config(args.config, args.set), args.plan or args.dry_run
    output = files.writable_dir(args.output, "--output").resolve()
    runs = []
    for seed in args.seeds or [args.seed]:
        folder = output / f"seed{seed}" if args.seeds else output
        runs.append(Run(config, folder, seed, args.rounds, args.launch))
    shared = len({run.start for run in runs}) < len(runs)
    if shared and config["start"].get("model"):
        fix = "write {output}/models/start, or have {seed} in it"
        raise UserError(f"start.folder: all seeds would train into {runs[0].start}; {fix}")
    with contextlib.ExitStack() as held:
        held.enter_context(contextlib.chdir(ROOT))  # where the commands run: relative paths mean the same
        if not looking:
            for run in runs:
                held.enter_context(Chain.only(run.output))
        for work in [prepared(run, args) for run in runs]:  # all are checked before anything is deleted or run
            carry_out(*work, args)
    if args.seeds and not looking and all((run.output / "table.json").exists() for run in runs):
        pooled = [f"{run.output}" for run in runs]
        words = ["python", "tools/compare.py", "--runs", *pooled, "--output", str(output)]
        words += ["--published", config["published"]]
        stage, chain = Stage("tables", "the tables of all seeds", [shlex.join(words)]), Chain(output)
        with Chain.only(output):
            chain.forget(stage)
            chain.run([stage])
        print_table(output)


def prepared(run: Run, args: argparse.Namespace) -> tuple[Run, Chain, list[Stage], list[Stage]]:
    """A run, what is done of it, the stages that were chosen, and those to forget before. Raises UserError for what
    cannot be done, also for flags that a later stage would refuse; changes nothing on disk."""
    chain, stages = Chain(run.output), run.stages()
    if args.fresh and (run.output / "run.json").exists():
        chain.done, chain.begun = {}, {}
    chosen = selected(stages, chain, args)
    again, faults, looking = to_forget(stages, chain, args), [], args.plan or args.dry_run
    for stage in chosen:
        if stage in again or stage.name not in chain.done:
            found = [None if looking else chain.not_found(stage)]
            found += [command_fault(command, looking) for command in stage.commands]
            faults += [f"stage {stage.name}: {fault}" for fault in dict.fromkeys(found) if fault]
    cli.refuse(faults)
    return run, chain, chosen, again


def carry_out(run: Run, chain: Chain, chosen: list[Stage], again: list[Stage], args: argparse.Namespace) -> None:
    """Show or run the chosen stages of a run."""
    if args.plan or args.dry_run:
        for stage in again:
            chain.done.pop(stage.name, None)
        if args.plan:
            return show_plan(run, chain, chosen)
        for stage in chosen:
            if stage.name not in chain.done:
                print0(f"# {stage.name}: {stage.title}", *stage.commands, sep="\n")
        return None
    if args.fresh and (run.output / "run.json").exists():
        chain.clear()
    for stage in again:
        chain.forget(stage)
    settings = {"config": run.config.values, "seed": run.seed, "rounds": run.rounds}
    files.write_json(run.output / "run.json", settings)
    chain.run(chosen)
    return print_table(run.output)


def print_table(folder: Path) -> None:
    """Show the closing table of a folder, if it is there."""
    if (folder / "table.md").exists():
        print0("\n" + files.read_text(folder / "table.md", "--output"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the commands save and end
    cli.run(main)
