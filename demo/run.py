"""The whole ARES loop with the scripts and files of a real run, on a small data set that the project makes itself.

    bash run_demo.sh [--output demo_run] [--seed 0]
    python demo/run.py                               # in an environment that is set up

Steps: demo data, tokenizer and image features -> a starting rationale model (main.py) -> RL with sentence scores
(run_mm_cot_rl.py, preprocessing, haiku.py) -> generation -> correction -> SFT (main.py) -> LoRA answers -> report.html
(tools/report.py) and a table of scores.
The Teacher is the offline reference Teacher; nothing here needs a GPU, a key or a hub. Every command is printed as it
could be typed, its output goes to {output}/logs. A stopped demo continues with the first unfinished stage when it is
run again. Model and questions are tiny, so the scores say nothing about real ones.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ares import files  # noqa: E402
from ares.cli import HelpFormatter, UserError, run  # noqa: E402
from ares.intervals import difference_text, paired_difference  # noqa: E402
from ares.predictions import Predictions, prediction_file, read_predictions, unread_note  # noqa: E402
from teacher import handoff  # noqa: E402
from teacher.reference import figures_by_question, rationale_figures, reference_scores  # noqa: E402
from utils_evaluate import resolve_answer  # noqa: E402

BASE = "models/rationale"
GENERATE = "--use_generate --final_eval --eval_bs 64"
# name -> settings. `smoke` is for tests: it runs every stage and learns nothing.
SIZES = {
    "demo": {
        "train": 600, "val": 60, "test": 200, "d_model": 96, "base_epochs": 26, "base_lr": 2e-3,
        "rl": "--algo ppo --value_warmup 2 --value_init zero --vf_lr 0.001 --k_actions 4 --rl_batch_size 32"
              " --ga_step 1 --epochs 4 --rl_epochs 2 --lr 0.0002 --init_kl_coef 0.01",
        "rl_processes": 2, "sft_epochs": 8, "sft_lr": 1e-3, "lora_epochs": 6, "lora_lr": 3e-3,
    },
    "smoke": {
        "train": 32, "val": 8, "test": 16, "d_model": 32, "base_epochs": 2, "base_lr": 1e-3,
        "rl": "--algo ppo --value_warmup 1 --value_init zero --vf_lr 0.001 --k_actions 2 --rl_batch_size 8"
              " --ga_step 1 --epochs 2 --rl_epochs 1 --lr 5e-05 --init_kl_coef 0.01",
        "rl_processes": 2, "sft_epochs": 1, "sft_lr": 5e-4, "lora_epochs": 1, "lora_lr": 2e-3,
    },
}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run_demo.sh", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output", default="demo_run", help="folder of all files that the demo writes")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, models, training and sampling")
    parser.add_argument("--size", default="demo", choices=SIZES, help="smoke: a minute, nothing learned")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier demo in --output and start again")
    return parser.parse_args(argv)


class Demo:
    """Runs commands as stages: each is printed, logged, timed, and skipped if an earlier run finished it."""

    def __init__(self, output: Path, settings: dict):
        self.output, self.logs, self.record_file = output, output / "logs", output / "stages.json"
        self.record = {"settings": settings, "stages": {}}
        if self.record_file.exists():
            self.record = files.read_json(self.record_file, "--output", dict)
            if not all(isinstance(self.record.get(name), dict) for name in ("settings", "stages")):
                raise UserError(f"--output: {self.record_file} is damaged; add --fresh to start again")
            changed = ", ".join(key for key, value in settings.items() if self.record["settings"].get(key) != value)
            if changed:
                raise UserError(f"--output: {output} holds a demo with another {changed}; add --fresh or name another")
        self.logs.mkdir(parents=True, exist_ok=True)
        self.environment = {
            # OpenMP's threads spin while they wait, which costs a shared machine more than a tiny model gains
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PYTHON": sys.executable,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.words = out = shlex.quote(str(output))
        self.data = f"--data_root {out}/data --images {out}/images"
        self.common = f"{self.data} --caption_file {out}/data/captions.json --use_caption"
        self.common += f" --img_type vit --vision_features {out}/vision_features"
        self.rationale = f"{self.common} --prompt_format QCM-E --output_len 128"

    def stage(self, name: str, title: str, *commands: str, action: Callable[[], None] | None = None) -> None:
        """Run `commands` in order (or `action()`), unless an earlier run of the demo has finished this stage."""
        if name in self.record["stages"]:
            print(f"== {title}: done before", flush=True)
            return
        print(f"== {title}", flush=True)
        began = time.monotonic()
        for command in commands:
            self.check(self.start(name, command), name)
        if action:
            action()
        seconds = time.monotonic() - began
        self.record["stages"][name] = {"title": title, "seconds": round(seconds, 1)}
        files.write_json(self.record_file, self.record)
        print(f"   {seconds:.0f} s", flush=True)

    def side_by_side(self, name: str, commands: Sequence[str], at_once: int = 2) -> None:
        """Run independent commands, `at_once` at a time."""
        waiting, running = list(commands), []
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(self.start(name, waiting.pop(0)))
                time.sleep(0.2)
                for process in [one for one in running if one.poll() is not None]:
                    self.check(process, name)
                    running.remove(process)
        finally:
            for process in running:
                process.kill()

    def start(self, name: str, command: str) -> subprocess.Popen:
        """Start `command`, as it could be typed in bash, with this environment's python; output to logs/{name}.log."""
        words = shlex.split(command)
        print(f"   $ {shlex.join(words)}", flush=True)
        place = words.index("python") if "python" in words else 0
        words[place] = sys.executable if words[place] == "python" else words[place]
        with open(self.logs / f"{name}.log", "a", encoding="utf-8") as log:
            options = {"stdout": log, "stderr": subprocess.STDOUT, "preexec_fn": _die_with_parent}
            return subprocess.Popen(words, cwd=ROOT, env=self.environment, **options)

    def check(self, process: subprocess.Popen, name: str) -> None:
        """Wait for `process`; if it failed, show the end of its log and stop."""
        if process.wait() != 0:
            log = self.logs / f"{name}.log"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise UserError(f"stage {name} ended with status {process.returncode}; the end of {log}:\n{tail}")


def _die_with_parent() -> None:
    """End this child when the demo is killed (Linux: PR_SET_PDEATHSIG = 1). torchrun passes SIGTERM on."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def prepare(demo: Demo, seed: int, size: dict) -> None:
    """Questions, tokenizer, an untrained T5, image features of a small timm model, the starting rationale model."""
    out = demo.words
    demo.stage(
        "data",
        "demo questions, tokenizer and an untrained T5",
        f"python demo/make_data.py --output {out} --seed {seed}"
        f" --train {size['train']} --val {size['val']} --test {size['test']}",
        f"python demo/make_model.py --data {out} --tokenizer {out}/tokenizer --output {out}/models/t5"
        f" --d_model {size['d_model']} --dropout 0 --seed {seed}",
    )
    demo.stage(
        "features",
        "image features: extract_features.py",
        f"python extract_features.py --data_root {out}/images --output_dir {out}/vision_features"
        " --img_type vit --model_name test_vit --random_weights",
    )
    demo.stage(
        "base",
        "starting rationale model: main.py",
        f"python main.py {demo.rationale} {GENERATE} --model {out}/models/t5 --bs 8"
        f" --correction True --correction_file {out}/data/scienceqa/drafts.json"
        f" --epoch {size['base_epochs']} --lr {size['base_lr']} --run_dir {out}/{BASE} --seed {seed}",
    )


def rl_commands(demo: Demo, start: str, run: str, flags: str, processes: int = 1) -> tuple[str, list[str]]:
    """RL from the model `start` into the run folder `run`, and the Teacher's commands of a round."""
    out = demo.words
    launcher = "python"
    if processes > 1:
        launcher = f"env ACCELERATE_USE_CPU=true python -m torch.distributed.run --nproc_per_node {processes}"
    questions = f"--questions_dir {out}/{run}/questions {demo.data}"
    return (
        f"{launcher} run_mm_cot_rl.py {demo.rationale} --base_model_dir {out}/{start} --ref_model {out}/{start}"
        f" --run_dir {out}/{run} --bs 64 --do_sample True --top_k 50 --gamma 1.0 --clip_range 0.2"
        f" --adv_normalization True --continue_train False --poll_seconds 1 {flags}",
        [
            f"bash preprocessing_after_RL/processing_sentence_level_feedback.sh {questions}",
            f"python haiku.py --teacher reference {questions}",
        ],
    )


def rl_with_teacher(demo: Demo, rl: str, teacher: Sequence[str], run: str, seconds: float | None = None) -> None:
    """Run RL in the background, and the Teacher's scripts whenever a round has exported its rationales.

    `seconds`: end RL after the round in which it has used this much processor time.
    """
    process, answered, finished = demo.start("rl", rl), None, 0
    questions = demo.output / run / "questions"
    actions = int(re.search(r"--k_actions (\d+)", rl)[1])
    try:
        while process.poll() is None:
            export = handoff.export_time_ns(questions)
            if export and export != answered and not all(handoff.is_done(questions, k) for k in range(actions)):
                for command in teacher:
                    demo.check(demo.start("teacher", command), "teacher")
                answered = export
            if seconds is not None and (demo.output / run / str(finished) / "args.yaml").exists():
                finished += 1
                if processor_seconds(process.pid) > seconds:
                    return
            time.sleep(0.2)
        demo.check(process, "rl")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def processor_seconds(pid: int) -> float:
    """Processor time of a process and its ended children so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def last_round(run: Path) -> str:
    """The name of the last finished round of a run folder of RL."""
    return max((path.parent.name for path in run.glob("[0-9]*/args.yaml")), key=int)


def generate_and_correct(demo: Demo, name: str, model: str, correction: str) -> None:
    """Rationales of `model`, without repeats, and the Teacher's corrections of them."""
    out = demo.words
    demo.stage(
        f"{name}generate",
        "rationales of the RL model: main.py --evaluate_dir",
        f"python main.py {demo.rationale} {GENERATE} --evaluate_dir {out}/{model}",
        "python preprocessing_after_RL/remove_sentence.py"
        f" --file_path {out}/{model}/predictions_ans_train.json --tokenizer {out}/{model}",
    )
    rationales = f"--correction_dir {out}/{correction} {demo.data}"
    rationales += f" --rationales {out}/{model}/remove_repetitive_sentences.json"
    demo.stage(
        f"{name}correction",
        "corrections: haiku_for_correction_feedback.py",
        f"python preprocessing_for_correction_feedback.py {rationales}",
        f"python haiku_for_correction_feedback.py --teacher reference {rationales}"
        f" --output {out}/{correction}/correction.json",
    )


def fine_tune(demo: Demo, name: str, model: str, correction: str, target: str, size: dict, seed: int) -> None:
    """SFT of `model` on the corrected rationales, into the folder `target`."""
    out = demo.words
    demo.stage(
        f"{name}sft",
        "SFT on the corrected rationales: main.py --correction True",
        f"python main.py {demo.rationale} {GENERATE} --model {out}/{model} --correction True"
        f" --correction_file {out}/{correction}/correction.json --bs 8"
        f" --epoch {size['sft_epochs']} --lr {size['sft_lr']} --run_dir {out}/{target} --seed {seed}",
    )


def align(demo: Demo, seed: int, size: dict) -> dict[str, str]:
    """The first two steps of ARES, RL and SFT. Returns the folder of each rationale model."""
    run = "RL_models/demo"
    rl, teacher = rl_commands(demo, BASE, run, f"{size['rl']} --seed {seed}", size["rl_processes"])
    title = "RL: run_mm_cot_rl.py, with haiku.py scoring sentences in its questions folder"
    demo.stage("rl", title, action=lambda: rl_with_teacher(demo, rl, teacher, run))
    model = f"{run}/{last_round(demo.output / run)}"
    generate_and_correct(demo, "", model, "correction")
    fine_tune(demo, "", model, "correction", "models/sft", size, seed)
    return {"starting model": BASE, "after RL": model, "after SFT": "models/sft"}


def learn_answers(demo: Demo, models: dict[str, str], seed: int, size: dict) -> dict[str, str]:
    """The third step: LoRA adapters that learn the answers, two at a time. Returns the folder of each.

    With QCMG-A the prompt holds the model's own rationale; with QCM-A, as in the paper's command, only the weights
    that wrote it.
    """
    out, commands, folders = demo.words, [], {}
    for name, model in models.items():
        for form in ("QCMG-A", "QCM-A"):
            folder = f"models/lora_{'start' if model == BASE else name.split()[-1]}_{form}"
            splits = {"train_le": "train", "eval_le": "eval", "test_le": "test"}.items()
            texts = "".join(f" --{flag} {out}/{model}/predictions_ans_{split}.json" for flag, split in splits)
            commands.append(
                f"python run_mm_cot_lora.py {demo.common} {GENERATE} --model {out}/{model} --prompt_format {form}"
                f" --output_len 64 --bs 16{texts if form == 'QCMG-A' else ''} --lora_r 16 --lora_alpha 32"
                f" --lora_dropout 0.05 --epoch {size['lora_epochs']} --lr {size['lora_lr']} --seed {seed}"
                f" --run_dir {out}/{folder}"
            )
            folders[f"{name}, {form}"] = folder
    demo.stage("lora", "LoRA answers: run_mm_cot_lora.py", action=lambda: demo.side_by_side("lora", commands))
    return folders


def show(demo: Demo, models: dict[str, str], adapters: dict[str, str]) -> Path:
    """The last stage: the report of the whole run, one file with its images inside."""
    out = demo.words
    folders = {**models, **{name: folder for name, folder in adapters.items() if name.endswith("QCMG-A")}}
    stages = " ".join(f"--stage {shlex.quote(f'{name}={demo.output / folder}')}" for name, folder in folders.items())
    demo.stage(
        "report",
        "the report of all stages: tools/report.py",
        f"python tools/report.py {stages} --splits test train --run {out}/RL_models/demo"
        f" --correction_dir {out}/correction"
        f" --times {out}/stages.json --data_root {out}/data --images {out}/images --image_mode embed"
        f" --title 'ARES demo' --output {out}/report.html",
    )
    return demo.output / "report.html"


COLUMNS = {
    "score": "sentence score", "concludes": "right conclusion %", "covered": "gold covered %",
    "no_conclusion": "no conclusion %", "unfinished": "unfinished %", "repeated": "repeated %", "words": "words",
    "rouge_l": "ROUGE-L",
}  # fmt: skip


def right_answers(problems: dict, found: Predictions) -> list[float]:
    """100 for each answer that is the gold choice, else 0; for one that could not be read a random choice counts."""
    rows = [(problems[qid], qid, text) for qid, text in zip(found.qids, found.preds, strict=True)]
    return [100.0 * (resolve_answer(text, len(problem["choices"]), qid, found.seed)[0] == problem["answer"])
            for problem, qid, text in rows]  # fmt: skip


def compared(ours: Sequence[float], theirs: Sequence[float], digits: int = 1) -> dict[str, Any]:
    """The paired difference with its 95 % interval over questions, also as `text`."""
    return {**paired_difference(ours, theirs), "text": difference_text(ours, theirs, digits)}


def write_summary(output: Path, models: dict[str, str], adapters: dict[str, str], record: dict) -> str:
    """Write {output}/table.txt and table.json: what each stage did to the test split. Returns the text.

    The sentence score is the reference Teacher's. The other columns show whether a higher score has a price.
    """
    problems = files.read_json(output / "data/scienceqa/problems.json", "--output")
    folders = {**models, **adapters}
    files_of = {name: prediction_file(output / place, "test") for name, place in folders.items()}
    rationales, each, answers, right, notes = {}, {}, {}, {}, []
    for name in models:
        found = read_predictions(files_of[name], "--output")
        scores = reference_scores(problems, found.qids, found.preds)
        figures = rationale_figures(problems, found.qids, found.preds, scores)
        rationales[name] = {**figures, "rouge_l": found.scores["rationale"]["rouge"]}
        each[name] = figures_by_question(problems, found.qids, found.preds, scores)
    start, *_ = names = list(models)
    changes = {
        f"{ours} - {theirs}": {
            key: compared(each[ours][key], each[theirs][key], 3 if key == "score" else 1) for key in each[ours]
        }
        for theirs, ours in [*zip(names, names[1:], strict=False), (start, names[-1])]
    }
    for name in adapters:
        found = read_predictions(files_of[name], "--output")
        right[name] = right_answers(problems, found)
        model, form = name.split(", ")
        answers[name] = {"num_fail": found.num_fail, **found.scores["answer"], "accuracy": mean(right[name])}
        answers[name]["against the start"] = compared(right[name], right[f"{start}, {form}"])
        answers[name]["against its rationale"] = compared(right[name], each[model]["concludes"])
        notes += filter(None, [unread_note(found.num_fail, len(found.preds), name)])
    seconds = {stage["title"]: stage["seconds"] for stage in record["stages"].values()}
    final = {key: value for key, value in answers[f"{names[-1]}, QCMG-A"].items() if key.startswith(("num", "acc_"))}
    result = {"settings": record["settings"], "rationales": rationales, "changes": changes, "answers": final,
              "adapters": answers, "seconds": seconds, "folders": folders}  # fmt: skip
    files.write_json(output / "table.json", result)

    lines = ["", f"Rationales on held-out test questions (seed {record['settings']['seed']})"]
    lines.append(f"{'':<16}" + "".join(f"{title:>20}" for title in COLUMNS.values()))
    for name, figures in rationales.items():
        cells = [f"{figures[key]:.3f}" if key == "score" else f"{figures[key]:.1f}" for key in COLUMNS]
        lines.append(f"{name:<16}" + "".join(f"{cell:>20}" for cell in cells))
    lines += ["", "Paired differences per question, with 95 % intervals"]
    for name, figures in changes.items():
        lines += [f"  {name:<28}{COLUMNS[key]:<20}{found['text']}" for key, found in figures.items()]
    lines += ["", "Answers of LoRA adapters on test questions, accuracy %: against the adapter of the start, and"]
    lines += ["against the conclusions of the rationales (QCMG-A prompts hold the rationale, QCM-A ones do not)"]
    for name, row in answers.items():
        both = f"{row['against the start']['text']:<44}{row['against its rationale']['text']}"
        lines.append(f"  {name:<28}{row['accuracy']:>6.1f}   {both}")
    lines += [f"  warning: {note}" for note in notes]
    lines += ["", "Wall time", *(f"  {each:7.1f} s  {title}" for title, each in seconds.items())]
    lines += [f"  {sum(seconds.values()):7.1f} s  in all", "", "Folders (model and predictions_ans_*.json)"]
    lines += [f"  {name:<28}{output.name}/{place}" for name, place in folders.items()]
    files.write_text(output / "table.txt", "\n".join(lines) + "\n")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    output = Path(args.output)
    if args.fresh and (output / "stages.json").exists():
        shutil.rmtree(output)
    output = files.writable_dir(output, "--output").resolve()
    size = SIZES[args.size]
    demo = Demo(output, {"seed": args.seed, **size})
    prepare(demo, args.seed, size)
    models = align(demo, args.seed, size)
    adapters = learn_answers(demo, models, args.seed, size)
    report = show(demo, models, adapters)
    print(write_summary(output, models, adapters, demo.record), flush=True)
    print(f"\nReport, to open in a browser: {report}", flush=True)


if __name__ == "__main__":
    run(main)
