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
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ares import files  # noqa: E402
from ares.cli import HelpFormatter, UserError, run  # noqa: E402
from ares.predictions import prediction_file, read_predictions, unread_note  # noqa: E402
from teacher import handoff  # noqa: E402
from teacher.reference import rationale_figures  # noqa: E402

# name -> settings. `smoke` is for tests: it runs every stage and learns nothing.
SIZES = {
    "demo": {
        "train": 600, "val": 60, "test": 200, "d_model": 96, "base_epochs": 15, "base_lr": 2e-3, "k_actions": 4,
        "rl_rounds": 3, "rl_epochs": 2, "rl_lr": 5e-5, "sft_epochs": 8, "sft_lr": 1e-3, "lora_epochs": 15,
        "lora_lr": 3e-3,
    },
    "smoke": {
        "train": 32, "val": 8, "test": 16, "d_model": 32, "base_epochs": 2, "base_lr": 1e-3, "k_actions": 2,
        "rl_rounds": 2, "rl_epochs": 1, "rl_lr": 5e-5, "sft_epochs": 1, "sft_lr": 5e-4, "lora_epochs": 1,
        "lora_lr": 2e-3,
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

    def start(self, name: str, command: str) -> subprocess.Popen:
        """Start `command`, as it could be typed in bash, with this environment's python; output to logs/{name}.log."""
        words = shlex.split(command)
        print(f"   $ {shlex.join(words)}", flush=True)
        if words[0] == "python":
            words[0] = sys.executable
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
    """End this child when the demo is killed (Linux: PR_SET_PDEATHSIG = 1)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def rl_with_teacher(demo: Demo, rl: str, teacher: Sequence[str], questions: Path, actions: int) -> None:
    """Run RL in the background, and the Teacher's scripts whenever a round has exported its rationales."""
    process = demo.start("rl", rl)
    answered = None
    try:
        while process.poll() is None:
            export = handoff.export_time_ns(questions)
            if export and export != answered and not all(handoff.is_done(questions, k) for k in range(actions)):
                for command in teacher:
                    demo.check(demo.start("teacher", command), "teacher")
                answered = export
            time.sleep(0.5)
        demo.check(process, "rl")
    finally:
        if process.poll() is None:
            process.kill()


def prepare(demo: Demo, seed: int, size: dict) -> None:
    """Stages 1 and 2: questions, tokenizer, an untrained T5, and image features of a small timm model."""
    out = shlex.quote(str(demo.output))
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


def train_and_align(demo: Demo, seed: int, size: dict) -> dict[str, Path]:
    """Stages 3 to 9: the starting rationale model and the three steps of ARES. Returns the folder of each model."""
    out = shlex.quote(str(demo.output))
    base, sft, lora = f"{out}/models/rationale", f"{out}/models/sft", f"{out}/models/lora"
    last = size["rl_rounds"] - 1  # the value function is untrained in the first round
    rl_run, rl = f"{out}/RL_models/demo", f"{out}/RL_models/demo/{last}"
    data = f"--data_root {out}/data --images {out}/images"
    common = (
        f"{data} --caption_file {out}/data/captions.json --use_caption"
        f" --img_type vit --vision_features {out}/vision_features --seed {seed}"
    )
    rationale = f"{common} --prompt_format QCM-E --output_len 128"
    generate = "--use_generate --final_eval --eval_bs 64"

    demo.stage(
        "base",
        "starting rationale model: main.py",
        f"python main.py {rationale} {generate} --model {out}/models/t5 --bs 8"
        f" --epoch {size['base_epochs']} --lr {size['base_lr']} --run_dir {base}",
    )
    rl_command = (
        f"python run_mm_cot_rl.py {rationale} --base_model_dir {base} --ref_model {base} --run_dir {rl_run}"
        f" --k_actions {size['k_actions']} --bs 64 --do_sample True --top_k 50 --continue_train False"
        f" --epochs {size['rl_rounds']} --rl_epochs {size['rl_epochs']} --lr {size['rl_lr']}"
        " --rl_batch_size 16 --ga_step 1 --gamma 1.0 --init_kl_coef 0.0001 --clip_range 0.2 --adv_normalization True"
        " --poll_seconds 1"
    )
    questions = f"--questions_dir {rl_run}/questions {data}"
    teacher = [
        f"bash preprocessing_after_RL/processing_sentence_level_feedback.sh {questions}",
        f"python haiku.py --teacher reference {questions}",
    ]
    demo.stage(
        "rl",
        "RL: run_mm_cot_rl.py, with haiku.py scoring sentences in its questions folder",
        action=lambda: rl_with_teacher(
            demo, rl_command, teacher, demo.output / "RL_models/demo/questions", size["k_actions"]
        ),
    )
    demo.stage(
        "generate",
        "rationales of the RL model: main.py --evaluate_dir",
        f"python main.py {rationale} {generate} --evaluate_dir {rl}",
        "python preprocessing_after_RL/remove_sentence.py"
        f" --file_path {rl}/predictions_ans_train.json --tokenizer {rl}",
    )
    demo.stage(
        "correction",
        "corrections: haiku_for_correction_feedback.py",
        f"python preprocessing_for_correction_feedback.py --correction_dir {out}/correction {data}"
        f" --rationales {rl}/remove_repetitive_sentences.json",
        f"python haiku_for_correction_feedback.py --teacher reference --correction_dir {out}/correction {data}"
        f" --rationales {rl}/remove_repetitive_sentences.json",
    )
    demo.stage(
        "sft",
        "SFT on the corrected rationales: main.py --correction True",
        f"python main.py {rationale} {generate} --model {rl} --correction True"
        f" --correction_file scienceqa/correction.json --bs 8"
        f" --epoch {size['sft_epochs']} --lr {size['sft_lr']} --run_dir {sft}",
    )
    # QCMG-A, not QCM-A: only its prompts hold the rationale, from which the answer is to be learned
    demo.stage(
        "lora",
        "LoRA answers: run_mm_cot_lora.py",
        f"python run_mm_cot_lora.py {common} {generate} --model {sft} --prompt_format QCMG-A --output_len 64 --bs 16"
        f" --train_le {sft}/predictions_ans_train.json --eval_le {sft}/predictions_ans_eval.json"
        f" --test_le {sft}/predictions_ans_test.json --lora_r 16 --lora_alpha 32 --lora_dropout 0.05"
        f" --epoch {size['lora_epochs']} --lr {size['lora_lr']} --run_dir {lora}",
    )
    names = {"starting model": "models/rationale", "after RL": f"RL_models/demo/{last}", "after SFT": "models/sft"}
    return {name: demo.output / place for name, place in {**names, "LoRA": "models/lora"}.items()}


def show(demo: Demo, folders: dict[str, Path]) -> Path:
    """The last stage: the report of the whole run, one file with its images inside."""
    out = shlex.quote(str(demo.output))
    stages = " ".join(f"--stage {shlex.quote(f'{name}={folder}')}" for name, folder in folders.items())
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
    "score": "sentence score", "repeated": "repeated %", "unfinished": "unfinished %", "words": "words",
    "rouge_l": "ROUGE-L", "covered": "gold covered %", "only_option": "only option %",
}  # fmt: skip


def write_summary(output: Path, folders: dict[str, Path], record: dict) -> str:
    """Write {output}/table.txt and table.json: what each stage did to the test split. Returns the text.

    The sentence score is the reference Teacher's. The other columns show whether a higher score has a price: other
    lengths, fewer gold sentences, rationales that only repeat the answer.
    """
    problems = files.read_json(output / "data/scienceqa/problems.json", "--output")
    rationales, answers, note = {}, {}, None
    for name, folder in folders.items():
        found = read_predictions(prediction_file(folder, "test"), "--output")
        if name == "LoRA":
            answers = {"num_fail": found.num_fail}
            answers |= {key: f"{value:.2f}" for key, value in found.scores["answer"].items()}
            note = unread_note(found.num_fail, len(found.preds), name)
        else:
            figures = rationale_figures(problems, found.qids, found.preds)
            rationales[name] = {**figures, "rouge_l": found.scores["rationale"]["rouge"]}
    seconds = {stage["title"]: stage["seconds"] for stage in record["stages"].values()}
    places = {name: str(folder.relative_to(output)) for name, folder in folders.items()}
    result = {"settings": record["settings"], "rationales": rationales, "answers": answers, "seconds": seconds}
    files.write_json(output / "table.json", {**result, "folders": places})

    lines = ["", f"Rationales on held-out test questions (seed {record['settings']['seed']})"]
    lines.append(f"{'':<16}" + "".join(f"{title:>16}" for title in COLUMNS.values()))
    for name, figures in rationales.items():
        cells = [f"{figures[key]:.3f}" if key == "score" else f"{figures[key]:.1f}" for key in COLUMNS]
        lines.append(f"{name:<16}" + "".join(f"{cell:>16}" for cell in cells))
    lines += ["", "Answers of the LoRA model on test questions, accuracy %"]
    lines += [f"  {name:<16}{value:>6}" for name, value in answers.items()]
    lines += [f"  warning: {note}"] if note else []
    lines += ["", "Wall time", *(f"  {each:7.1f} s  {title}" for title, each in seconds.items())]
    lines += [f"  {sum(seconds.values()):7.1f} s  in all", "", "Folders (model and predictions_ans_*.json)"]
    lines += [f"  {name:<16}{output.name}/{place}" for name, place in places.items()]
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
    folders = train_and_align(demo, args.seed, size)
    report = show(demo, folders)
    print(write_summary(output, folders, demo.record), flush=True)
    print(f"\nReport, to open in a browser: {report}", flush=True)


if __name__ == "__main__":
    run(main)
