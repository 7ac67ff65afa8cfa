"""The demo's closing table: what each stage did to held-out rationales and answers, and how long it took.

The sentence score is the reference Teacher's on the test questions. Beside it stand figures that a rationale could pay
with: its length, the gold sentences it covers, and how often it says no more than the answer.
"""

from __future__ import annotations

from pathlib import Path

from ares import files
from teacher.reference import rationale_figures

COLUMNS = {
    "score": "sentence score",
    "repeated": "repeated %",
    "unfinished": "unfinished %",
    "words": "words",
    "rouge_l": "ROUGE-L",
    "covered": "gold covered %",
    "only_option": "only option %",
}


def write_summary(output: Path, folders: dict[str, Path], record: dict) -> str:
    """Write {output}/table.txt and table.json; return the text. `record` holds the stages and their seconds."""
    problems = files.read_json(output / "data/scienceqa/problems.json", "--output")
    rationales, answers = {}, {}
    for name, folder in folders.items():
        predictions = files.read_json(folder / "predictions_ans_test.json", "--output", dict, nan=True)
        if name == "LoRA":
            answers = {"num_fail": predictions["num_fail"], **predictions["scores"]["answer"]}
            continue
        figures = rationale_figures(problems, predictions["qids"], predictions["preds"])
        rationales[name] = {**figures, "rouge_l": float(predictions["scores"]["rationale"]["rouge"])}
    seconds = {stage["title"]: stage["seconds"] for stage in record["stages"].values()}
    places = {name: str(folder.relative_to(output)) for name, folder in folders.items()}
    result = {
        "settings": record["settings"],
        "rationales": rationales,
        "answers": answers,
        "seconds": seconds,
        "folders": places,
    }
    files.write_json(output / "table.json", result)
    text = _text(result, output)
    files.write_text(output / "table.txt", text + "\n")
    return text


def _text(result: dict, output: Path) -> str:
    lines = ["", f"Rationales on held-out test questions (seed {result['settings']['seed']})"]
    lines.append(f"{'':<16}" + "".join(f"{title:>16}" for title in COLUMNS.values()))
    for name, figures in result["rationales"].items():
        cells = [f"{figures[key]:.3f}" if key == "score" else f"{figures[key]:.1f}" for key in COLUMNS]
        lines.append(f"{name:<16}" + "".join(f"{cell:>16}" for cell in cells))
    lines += ["", "Answers of the LoRA model on test questions, accuracy %"]
    lines += [f"  {name:<16}{value:>6}" for name, value in result["answers"].items()]
    lines += ["", "Wall time"]
    lines += [f"  {seconds:7.1f} s  {title}" for title, seconds in result["seconds"].items()]
    lines += [f"  {sum(result['seconds'].values()):7.1f} s  in all", "", "Folders (model and predictions_ans_*.json)"]
    lines += [f"  {name:<16}{output.name}/{place}" for name, place in result["folders"].items()]
    return "\n".join(lines)
