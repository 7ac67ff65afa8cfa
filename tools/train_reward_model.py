"""A reward model distilled from the Teacher's scores: `haiku.py --teacher model` then scores rationales for nothing.

    python tools/train_reward_model.py --questions_dirs RL_models/a/questions_round0 RL_models/b/questions_round0 \\
        --model models/start --data_root data --use_caption --img_type vit --run_dir reward_model
    python haiku.py --questions_dir RL_models/b/questions --teacher model --reward_model reward_model

Trains T5ForMultimodalGenerationValueFunction from the weights of a rationale model to predict the score of each
sentence of the questions folders: mean squared error, AdamW, early stop on held-out questions. Scores by a reward
model itself are skipped. Writes the model, args.yaml and, last, metrics.json: the agreement with the Teacher on the
held-out questions, by sentence position and subject, beside the mean training score by position and the offline
reference Teacher. Killed, the same command goes on after the last whole epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares import cli, files, launch
from ares.cli import PROMPT_FORMATS, UserError, print0
from ares.tables import Cell, Table, markdown
from rl import run_folder
from rl.flags import SCHEDULES
from teacher import handoff, reference
from teacher.agreement import FIGURES, agreement_figures, position_name
from teacher.data_check import refuse_other_data
from teacher.interface import MODEL, REFERENCE, same_model
from teacher.reply_files import read_scores, read_sidecar
from teacher.session import CHECKS, OURS, UNKNOWN

IDENTITY, STATE, METRICS = "identity.json", "state.pth", "metrics.json"
OURS_NAME, BY_POSITION = "reward model", "mean by position"

Scores = list[list[float]]  # of every rationale's sentences


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    folders = "questions folders that a Teacher has scored ({run}/questions_round{n}, {run}/questions)"
    add("--questions_dirs", nargs="+", required=True, metavar="DIR", help=folders)
    add("--mixed_teachers", action="store_true", help="learn from scores of several Teachers or models at once")
    add("--model", required=True, metavar="DIR", help="rationale model (or reward model) whose weights to start from")
    add("--run_dir", default="reward_model", metavar="DIR", help="output folder")
    add("--overwrite", action="store_true", help="start anew: drop what an earlier run left")
    data = cli.add_prompt_data_flags(parser)
    formats = "QCM-E: as RL's; QCMG-E: with lecture and gold solution, as a Teacher knows the answer"
    data.add_argument("--prompt_format", default="QCM-E", choices=PROMPT_FORMATS, help=formats)
    data.add_argument("--options", nargs="+", default=["A", "B", "C", "D", "E"], help="letters of the choices")
    data.add_argument("--input_len", type=int, default=512, help="longest prompt, in tokens")
    data.add_argument("--tokenizer", metavar="DIR", help="tokenizer (default: the model's own)")
    twice = "the decoder reads a rationale twice and scores the second one: a score may depend on later sentences"
    data.add_argument("--read_twice", action="store_true", help=twice)
    add = parser.add_argument_group("training").add_argument
    add("--held_out", type=float, default=0.1, metavar="SHARE", help="share of the questions to stop and measure by")
    add("--epochs", type=int, default=20, help="most passes over the training rationales")
    add("--patience", type=int, default=3, help="stop after so many epochs without a lower held-out loss")
    add("--bs", type=int, default=32, help="rationales per optimizer step; those of a question share one")
    add("--lr", type=float, default=1e-4, help="learning rate")
    falls = "constant, or down to 0 at the end of --epochs"
    add("--lr_scheduler", default="linear", choices=SCHEDULES, help=falls)
    add("--seed", type=int, default=42, help="seed of the held-out share, the fresh layers and the order")
    text = "autocast; auto: bf16 on a GPU that has it (weights and optimizer stay fp32)"
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"), help=text)
    args = parser.parse_args(argv)
    given = cli.given_flags(parser, argv)
    faults = [f"--{name} must be at least 1, not {getattr(args, name)}"
              for name in ("epochs", "patience", "bs", "input_len") if getattr(args, name) < 1]  # fmt: skip
    faults += [f"--lr must be a number above 0, not {args.lr}"] * (not 0 < args.lr < float("inf"))
    faults += [f"--held_out must be above 0 and below 1, not {args.held_out}"] * (not 0 < args.held_out < 1)
    faults += [f"--model: no folder {args.model}; name that of a rationale model"] * (not Path(args.model).is_dir())
    faults += ["one process only; start it with python"] * (cli.world_size() > 1)
    cli.refuse([*faults, *cli.precision_faults()])
    if "images" in given:
        print0("note: --images has no effect here (pictures enter as the features of --vision_features)")
    return args


# -- reading the scores --------------------------------------------------------------------------------------


def read_scored(folders: Sequence[str], mixed: bool) -> tuple[dict[tuple[str, tuple[str, ...]], list[float]], Counter]:
    """((question, sentences) -> scores, Teacher and model -> how many of these) of all folders, printed as counts.

    Identical rationales of a question count once, with the mean of their scores, whatever the order of the folders.
    Raises UserError for a folder without rationales, for no scores, and for several Teachers unless `mixed`.
    """
    cli.refuse([f"--questions_dirs: no folder {each}" for each in folders if not Path(each).is_dir()])
    found: dict[tuple[str, tuple[str, ...]], list[list[float]]] = defaultdict(list)
    authors: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    teachers: dict[tuple[str, str], str] = {}  # (Teacher, model) -> as it is counted
    items = [item for folder in folders for item in handoff.exported_items(folder)]
    for item in cli.progress(items, desc="reading", unit="rationale"):
        author, model = (str(read_sidecar(item.folder).get(key) or "") for key in ("teacher", "model"))
        if author == MODEL:
            skipped["scored by a reward model"] += 1
            continue
        try:
            sentences = tuple(handoff.read_rationale(item.folder))
            scores = read_scores(item.folder) if sentences else []
        except handoff.Refused as refused:
            skipped[refused.reason] += 1
            continue
        if not sentences:
            skipped["no_sentences"] += 1
            continue
        found[item.qid, sentences].append(scores)
        if len(found[item.qid, sentences]) > 1:
            skipped["identical"] += 1
            continue
        same = (name for (who, which), name in teachers.items() if who == author and same_model(which, model))
        name = next(same, f"{author} {model}" if author and model else UNKNOWN)
        teachers.setdefault((author, model), name)
        authors[name] += 1
    words = ", ".join(f"{name} {count}" for name, count in skipped.most_common())
    print0(f"{len(items)} rationales; skipped: {words or 'none'}")
    if not found:
        where = ", ".join(map(cli.shortened, folders))
        raise UserError(f"--questions_dirs: no usable score by a Teacher in {where} ({words}); run haiku.py first")
    counts = ", ".join(f"{name} {count}" for name, count in authors.most_common())
    print0(f"{len(found)} to learn from, scored by {counts}")
    if len(authors) > 1 and not mixed:
        fix = "add --mixed_teachers, or name folders of one"
        raise UserError(f"--questions_dirs: scores of several Teachers ({counts}); {fix}")
    return {key: [fmean(each) for each in zip(*found[key], strict=True)] for key in sorted(found)}, authors


# -- agreement -----------------------------------------------------------------------------------------------


def compare(
    predicted: Mapping[str, Scores], rationales: Sequence[Any], subjects: Mapping[str, str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Row ("all", "sentence 1", "subject ...") -> predictor -> `agreement_figures` with the rationales' scores."""
    pairs: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for name, scores in predicted.items():
        for rationale, mine in zip(rationales, scores, strict=True):
            for number, pair in enumerate(zip(mine, rationale.scores, strict=True)):
                subject = subjects.get(rationale.qid) or "unknown"
                for row in ("all", f"sentence {position_name(number + 1)}", f"subject {subject}"):
                    pairs[row][name].append(pair)
    order = sorted(pairs, key=lambda row: (row != "all", row.startswith("subject"), row))
    return {row: {name: agreement_figures(found) for name, found in pairs[row].items()} for row in order}


def means_by_position(rationales: Sequence[Any]) -> dict[str, float]:
    """Position -> mean score of the sentences there."""
    scores = defaultdict(list)
    for rationale in rationales:
        for number, score in enumerate(rationale.scores):
            scores[position_name(number + 1)].append(score)
    return {position: fmean(values) for position, values in scores.items()}


def way(found: Mapping[str, Any]) -> float | None:
    """How much of the way from the baseline by position to perfect agreement, by the mean difference; 1 is all."""
    baseline = found["all"][BY_POSITION]["mean_difference"]
    return 1 - found["all"][OURS_NAME]["mean_difference"] / baseline if baseline else None


def errors_by_score(predicted: Scores, rationales: Sequence[Any]) -> list[float]:
    """Mean absolute error of the predictions that round to 0.0, 0.1 ... 1.0, with the mean of all errors counted five
    times in each: what to expect of a prediction of that size."""
    errors: list[list[float]] = [[] for _ in range(11)]
    for mine, rationale in zip(predicted, rationales, strict=True):
        for p, score in zip(mine, rationale.scores, strict=True):
            errors[round(10 * p)].append(abs(p - score))
    overall = fmean(error for each in errors for error in each)
    return [fmean([*each, *[overall] * 5]) for each in errors]


def measure(scorer: Any, train: Sequence[Any], held_out: Sequence[Any], problems: Mapping, authors: Counter) -> dict:
    """The agreement on held-out rationales, as metrics.json holds it."""
    means = means_by_position(train)
    overall = fmean(score for rationale in train for score in rationale.scores)
    predicted: dict[str, Scores] = {OURS_NAME: scorer.predict(held_out)}
    predicted[BY_POSITION] = [
        [means.get(position_name(number + 1), overall) for number in range(len(row.scores))] for row in held_out
    ]
    if not all(name.startswith(f"{REFERENCE} ") for name in authors):
        predicted["reference Teacher"] = [
            reference.score_sentences(problems[row.qid], row.sentences) for row in held_out
        ]
    found = compare(predicted, held_out, {qid: problem.get("subject") for qid, problem in problems.items()})
    return {"agreement": found, "way": way(found), "error_by_score": errors_by_score(predicted[OURS_NAME], held_out),
            "questions": len({row.qid for row in held_out}),
            "rationales": len(held_out)}  # fmt: skip


def teacher_checks(folders: Sequence[str]) -> list[str]:
    """How far Teachers agree by what `haiku.py --check` has saved in the folders: one line for each comparison."""
    lines = []
    for path in (Path(folder) / OURS / CHECKS for folder in folders):
        with contextlib.suppress(UserError):  # absent, or no JSON
            for name, check in files.read_json(path, "--questions_dirs", dict, nan=True).items():
                rows = check.get("rows") if isinstance(check, dict) else None
                row = rows.get("all") if isinstance(rows, dict) else None
                if isinstance(row, dict):
                    lines.append(f"{name}: {', '.join(f'{key} {value}' for key, value in row.items())} ({path})")
    return lines


def show(metrics: Mapping[str, Any]) -> None:
    """Print the agreement as a table."""
    found = metrics["agreement"]
    names = list(found["all"])
    columns = {"sentences": "sentences"}
    columns |= {f"{name} {key}": f"{name}: {words}" for name in names for key, words in FIGURES.items()}
    title = f"Held-out: {metrics['questions']} questions, {metrics['rationales']} rationales"
    table = Table(title, columns, digits={key: 3 for key in columns})
    for row, by_name in found.items():
        cells: dict[str, Any] = {"sentences": str(by_name[OURS_NAME]["sentences"])}
        for name, figures in by_name.items():
            cells |= {f"{name} {key}": Cell(figures[key]) for key in FIGURES if figures[key] is not None}
        table.rows.append((row, cells))
    notes = []
    if metrics["way"] is not None:
        notes.append(f"{metrics['way']:.0%} of the way from the mean by position to perfect agreement")
    notes += metrics["teacher_checks"]
    print0(markdown([table], notes), end="")


# -- the run folder ------------------------------------------------------------------------------------------


def claim(folder: Path, identity: dict[str, Any], args: argparse.Namespace) -> bool:
    """Make `folder` this run's, or recognise it as such; returns whether its training is finished.

    Raises UserError if it holds something else, or the same with other flags.
    """
    ours = (folder / IDENTITY).exists()
    if not ours and any((folder / name).exists() for name in ("config.json", "args.yaml")):
        raise UserError(f"--run_dir: {folder} holds a model that this command did not write; name another folder")
    if ours and args.overwrite:
        for name in (METRICS, STATE):  # metrics.json first: a killed launch must not look finished
            (folder / name).unlink(missing_ok=True)
    else:
        run_folder.refuse_changes(folder / IDENTITY, identity)
        if (folder / METRICS).exists():
            return True
    files.write_json(folder / IDENTITY, identity)  # first: a folder without it is somebody else's
    files.write_args(folder, args)
    return False


def save(folder: Path, model: Any, tokenizer: Any, metrics: dict[str, Any]) -> None:
    """Write the model, then metrics.json, then delete the state of training."""
    from ares.checkpoints import portable_tokenizer

    staging = folder / "saved"
    with files.atomic_dir(staging) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        portable_tokenizer(temporary)
    with files.writing(folder):
        for file in staging.iterdir():
            os.replace(file, folder / file.name)
        staging.rmdir()
    files.write_json(folder / METRICS, metrics)
    (folder / STATE).unlink(missing_ok=True)
    print0(f"reward model: {folder}")


def refuse_leaks(args: argparse.Namespace) -> None:
    """Raise UserError where --model is a reward model that was trained on questions which are held out now."""
    before = files.read_yaml(Path(args.model) / "args.yaml", "--model")
    for name in ("seed", "held_out"):
        if before.get(name) != getattr(args, name):
            fix = "questions it was trained on would be held out; give the same, or start from a rationale model"
            raise UserError(f"--{name}: {args.model} was trained with {before.get(name)}: {fix}")


def resolved(args: argparse.Namespace, dataset: str) -> argparse.Namespace:
    """The flags as args.yaml records them: haiku.py may be started from another folder."""
    recorded = argparse.Namespace(**{**vars(args), "dataset": dataset})
    for name in ("data_root", "vision_features", "name_map", "model", "caption_file"):
        value = getattr(args, name)
        if value is not None and (name, value) != ("caption_file", cli.CAPTION_DEFAULT):
            setattr(recorded, name, str(Path(value).resolve()))
    recorded.questions_dirs = [str(Path(each).resolve()) for each in args.questions_dirs]
    return recorded


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    found, authors = read_scored(args.questions_dirs, args.mixed_teachers)

    import torch

    import utils_data
    from model import check_checkpoint
    from rl import reward_model, reward_training
    from sft.predict import tokenizer_digest, weights_digest
    from sft.run import check_run_dir

    # everything that can be wrong, before a model is loaded
    qids = list(dict.fromkeys(qid for qid, _ in found))
    data = reward_model.read_questions(args, qids)
    items = [item for folder in args.questions_dirs for item in handoff.exported_items(folder)]
    refuse_other_data([item for item in items if item.qid in data.problems], data.problems, args)
    info = check_checkpoint(args.model, data.patch_size, args.img_type, flag="--model")
    if reward_model.is_reward_model(args.model):
        refuse_leaks(args)
    tokenizer = utils_data.load_tokenizer(args, args.model)
    utils_data.check_vocabulary(tokenizer, info)
    rationales = reward_model.tokenised(found, tokenizer, args.read_twice, found.values())
    train, held_out = reward_training.hold_out(rationales, args.held_out, args.seed)
    folder = Path(args.run_dir)
    check_run_dir(folder, args.model)
    files.writable_dir(folder, "--run_dir")
    bf16 = cli.mixed_precision(args.precision) == "bf16"
    args.precision = "bf16" if bf16 else "fp32"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    launch.note_unused_gpus(torch.cuda.device_count(), "tools/train_reward_model.py")
    names = "epochs patience bs lr lr_scheduler seed held_out precision".split()
    prompts = reward_model.make_prompts(data, qids, tokenizer, args, device)
    if cut := sum(length >= args.input_len for length in prompts.lengths.values()):
        cli.warn0(
            f"{cut} of {len(qids)} prompts are cut at --input_len {args.input_len}; the solution stands at their end"
        )
    content = hashlib.sha256(json.dumps([[*key, scores] for key, scores in found.items()]).encode())
    identity = {name: getattr(args, name) for name in (*names, *reward_model.PROMPT_FLAGS)} | {
        "questions_dirs": f"{len(found)} scored rationales ({content.hexdigest()[:12]})",
        "model": weights_digest([args.model]),
        "data_root": f"{len(qids)} prompts ({prompts.fingerprint()[:12]})",
        "features": None if data.features is None else data.features.digest(qids),
        "tokenizer_pieces": tokenizer_digest(tokenizer),
    }
    with launch.only_one(folder / launch.LOCK, f"--run_dir {folder}", required=False):
        if claim(folder, identity, resolved(args, data.dataset)):
            print0(f"{folder}: training is finished (--overwrite trains anew)")
            return show(files.read_json(folder / METRICS, "--run_dir", dict, nan=True))
        sentences = sum(len(row.scores) for row in train)
        print0(f"training on {len(train)} rationales, {sentences} sentences; held out {len(held_out)}; {device.type}")
        mean = fmean(score for row in train for score in row.scores)
        model = reward_model.load(args.model, data.patch_size, device, args.seed, mean)
        scorer = reward_model.Scorer(model, prompts, device, bf16)
        fit = reward_training.Fit(scorer, train, held_out, args, folder / STATE)
        fit.run()
        metrics = measure(scorer, train, held_out, data.problems, authors)
        metrics |= {"teachers": dict(authors), "history": fit.history, "best_epoch": fit.best_epoch}
        metrics |= {"teacher_checks": teacher_checks(args.questions_dirs)}
        save(folder, model, tokenizer, metrics)
        show(metrics)
    return None


if __name__ == "__main__":
    cli.run(main)
