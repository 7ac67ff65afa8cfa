"""The student's prompts and targets.

The strings are exact: the released MM-CoT and ARES checkpoints were trained on them, so even their oddities
(`BECAUSE:`, one pass over double spaces) stay. Tokenisation is in utils_data.py, the Teacher's prompts are in
teacher/prompts.py. Imports neither torch nor transformers. Try it:

    python -c "import argparse, utils_prompt as u; from ares.data_folder import read_data_folder; \\
    args = argparse.Namespace(prompt_format='QCM-E', use_caption=False, options='ABCDE'); \\
    print(*u.build_train_pair(read_data_folder('data').problems, '1', args), sep='\\n')"
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ares.cli import PROMPT_FORMATS, UserError


def build_train_pair(
    problems: Mapping[str, Mapping[str, Any]], qid: str, args: argparse.Namespace, curr_le_data: str | None = None
) -> tuple[str, str]:
    """Prompt and target of one question, before `normalize`.

    `problems`: qid -> problem; its `caption`, where there is one, joins the hint under `args.use_caption`. Of `args`
    also `prompt_format` ("QCM-E": given - asked) and `options` (the letters) are used. `curr_le_data`: the rationale
    given to the QCMG formats; None means the gold one. An empty rationale is a given one: a model that wrote nothing
    must not be handed the gold solution.

    Raises UserError if the question has more choices than there are letters, or the format is unknown.
    """
    if args.prompt_format not in PROMPT_FORMATS:
        raise UserError(f"--prompt_format: {args.prompt_format!r} is not one of {', '.join(PROMPT_FORMATS)}")
    given, asked = args.prompt_format.split("-")
    problem = problems[qid]
    letters = option_letters(problem, args.options, qid)

    caption = problem.get("caption", "") if args.use_caption else ""
    context = f"{problem['hint']} {caption}".strip() or "N/A"
    prompt = f"Question: {problem['question']}\nContext: {context}\nOptions: {choices_text(problem, letters)}\n"
    # newlines become the two characters `\n`, of which T5's tokenizer keeps a stray `n` (ares/sentences.py)
    lecture, solution = (problem[name].replace("\n", "\\n") for name in ("lecture", "solution"))
    if given == "QCMG":
        prompt += f"Solution: {lecture} {solution}\n" if curr_le_data is None else f"{curr_le_data}\n"
    prompt += "Answer:" if asked == "A" else "Solution:"

    answer = f"The answer is ({letters[problem['answer']]})."
    target = {
        "A": f"Answer: {answer}",
        "E": f"Solution: {solution}",
        "LE": f"Solution: {lecture} {solution}.",
        "LEA": f"Answer: {lecture} {solution} {answer}",
        "ALE": f"Answer: {answer} BECAUSE: {lecture} {solution}",
    }[asked]
    if target.endswith("BECAUSE:"):
        target = target.replace("BECAUSE:", "")
    # the order matters: `Answer:` is removed last, so that the blanks it leaves inside a target stay doubled
    prompt, target = (text.replace("  ", " ").strip() for text in (prompt, target))
    return prompt, target.replace("Answer:", "").strip()


def normalize(text: str) -> str:
    """Every run of white space (Unicode's included) becomes one blank: what is tokenised."""
    return " ".join(text.split())


def choices_text(problem: Mapping[str, Any], letters: Sequence[str]) -> str:
    """`(A) first (B) second ...`"""
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, problem["choices"], strict=False))


def answer_letter(problem: Mapping[str, Any], options: Sequence[str], qid: str = "?") -> str:
    """The letter of the gold choice."""
    return option_letters(problem, options, qid)[problem["answer"]]


def option_letters(problem: Mapping[str, Any], options: Sequence[str], qid: str = "?") -> list[str]:
    """One letter for each of the question's choices. `--options ABCDE` and `--options A B C D E` mean the same. Raises
    UserError naming the question if there are too few."""
    letters = [letter for part in options for letter in part]
    choices = len(problem["choices"])
    if choices > len(letters):
        fault = f"has {choices} choices but there are only {len(letters)} letters ({' '.join(letters)})"
        raise UserError(f"--options: question {qid} {fault}; name at least {choices}")
    return letters[:choices]
