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
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ares import cli, files
from ares.cli import UserError, print0
from pipeline.config import Config, command_fault, fill, nearest, split_words
from pipeline.plan import show_plan
from pipeline.stages import ROOT, Chain, Stage

FRESH = "--fresh"
INSTALL = "install the packages: source setup_venv.sh && setup_venv && source .venv/bin/activate"
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
        * (args.launch is not None and not split_words(args.launch))
        + ["--seed and --seeds: give one"] * ("seed" in cli.given_flags(parser, argv) and args.seeds is not None)
        + ["--seeds: a seed is there twice"] * (len(set(args.seeds or [])) < len(args.seeds or []))
    )
    return args


# -- the chain -------------------------------------------------------------------------------------------


class Run:
    """The stages of one seed in one folder."""

    def __init__(self, config: Config, output: Path, seed: int, rounds: int, launch: str | None = None):
        self.config, self.output, self.seed, self.rounds = config, output, seed, rounds
        self.launcher = launch
        self.filled = {"output": output, "seed": seed}
        self.start = Path(fill(str(config["start"].get("folder") or output / "models/start"), self.filled))

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
            commands = [fill(command, words) for command in config["prepare"]]
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
            raise UserError(f"--{flag}: no stage {name}{nearest(name, names)}; stages: {', '.join(names)}")
    first = names.index(args.only or args.first or names[0])
    last = names.index(args.only or args.last or names[-1])
    if first > last:
        raise UserError(f"--from {args.first} comes after --until {args.last}")
    chosen = stages[first : last + 1]
    needed = {name for stage in chosen for name in stage.uses} & set(names[:first])
    if missing := [name for name in names if name in needed and name not in chain.done]:
        raise UserError(f"--{'only' if args.only else 'from'}: {missing[0]} is not finished; run it first")
    return chosen


def begins_anew(stages: Sequence[Stage], chain: Chain, args: argparse.Namespace) -> tuple[bool, set[str]]:
    """(whether --fresh empties the folder, the stages that --redo deletes), without what a stopped run has begun anew:
    the same command goes on with it. Changes nothing on disk."""
    begun, redo = begun_anew(chain), set(args.redo)
    same = {stage.name for stage in stages if begun.get(stage.name) == stage.identity()}
    fresh, goes_on = args.fresh, redo & same
    if args.fresh and FRESH in begun and begun.keys() - {FRESH} <= same:
        fresh, goes_on = False, {FRESH}
    if goes_on:
        flag = FRESH if args.fresh else f"--redo {' '.join(sorted(goes_on))}"
        print0(f"{flag}: goes on with what a stopped run has begun anew (delete {chain.redo_file} for another time)")
    return fresh and (chain.folder / "run.json").exists(), redo - same


def begun_anew(chain: Chain) -> dict[str, list]:
    """Stage -> its commands, of the stages that --redo or --fresh (then with the key FRESH) has begun anew in a run
    that has not ended."""
    return files.read_json(chain.redo_file, "--output", dict) if chain.redo_file.exists() else {}


def to_forget(stages: Sequence[Stage], chain: Chain, fresh: bool, redo: set[str]) -> list[Stage]:
    """The stages of `redo`, with `fresh` all, and all that depends on them. Raises UserError for other finished stages
    whose inputs or flags changed. Deletes nothing."""
    again = {stage.name for stage in stages} if fresh else set(redo)
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
        works = [prepared(run, args) for run in runs]  # all are checked before anything is deleted or run
        for work in works:
            carry_out(work, args)
        for work in [] if looking else works:  # now that all have ended, the same command begins anew
            if begun_anew(work.chain).keys() <= {FRESH, *(stage.name for stage in work.chosen)}:
                work.chain.redo_file.unlink(missing_ok=True)
    if args.seeds and not looking and all((run.output / "table.json").exists() for run in runs):
        pooled = [f"{run.output}" for run in runs]
        words = ["python", "tools/compare.py", "--runs", *pooled, "--output", str(output)]
        words += ["--published", config["published"]]
        stage, chain = Stage("tables", "the tables of all seeds", [shlex.join(words)]), Chain(output)
        with Chain.only(output):
            chain.forget(stage)
            chain.run([stage])
        print_table(output)


class Work(NamedTuple):
    """What is to be done of a run: the stages that were chosen, after those to forget; with `fresh` in an empty
    folder."""

    run: Run
    chain: Chain
    chosen: list[Stage]
    again: list[Stage]
    fresh: bool


def prepared(run: Run, args: argparse.Namespace) -> Work:
    """Raises UserError for what cannot be done, also for flags that a later stage would refuse; changes nothing on
    disk."""
    chain, stages = Chain(run.output), run.stages()
    fresh, redo = begins_anew(stages, chain, args)
    if fresh:
        chain.done, chain.begun = {}, {}
    chosen = selected(stages, chain, args)
    again, faults, looking = to_forget(stages, chain, fresh, redo), [], args.plan or args.dry_run
    for stage in chosen:
        if stage in again or stage.name not in chain.done:
            found = [None if looking else chain.not_found(stage)]
            found += [command_fault(command, looking) for command in stage.commands]
            faults += [f"stage {stage.name}: {fault}" for fault in dict.fromkeys(found) if fault]
    cli.refuse(faults)
    return Work(run, chain, chosen, again, fresh)


def carry_out(work: Work, args: argparse.Namespace) -> None:
    """Show or run the chosen stages of a run."""
    run, chain, chosen, again, fresh = work
    if args.plan or args.dry_run:
        for stage in again:
            chain.done.pop(stage.name, None)
        if args.plan:
            return show_plan(run, chain, chosen)
        for stage in chosen:
            if stage.name not in chain.done:
                print0(f"# {stage.name}: {stage.title}", *stage.commands, sep="\n")
        return None
    if fresh:
        chain.clear()
    for stage in again:
        chain.forget(stage)
    settings = {"config": run.config.values, "seed": run.seed, "rounds": run.rounds}
    files.write_json(run.output / "run.json", settings)
    if args.fresh or args.redo:  # a kill before this line leaves nothing that is worth keeping
        anew = {stage.name: stage.identity() for stage in chosen if args.fresh or stage.name in args.redo}
        files.write_json(chain.redo_file, {**begun_anew(chain), **anew, **({FRESH: []} if args.fresh else {})})
    chain.run(chosen)
    return print_table(run.output)


def print_table(folder: Path) -> None:
    """Show the closing table of a folder, if it is there."""
    if (folder / "table.md").exists():
        print0("\n" + files.read_text(folder / "table.md", "--output"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the commands save and end
    cli.run(main)
