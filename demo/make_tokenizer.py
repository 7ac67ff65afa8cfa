"""Train the demo's tokenizer: a unigram one of T5's kind, on the texts of a demo folder.

    python demo/make_tokenizer.py --data demo_run --output demo_run/tokenizer

As T5's: `<pad>` 0, `</s>` 1, `<unk>` 2, pieces with a leading `▁`, 100 sentinels at the end, `</s>` appended, no piece
for a newline or a backslash. Punctuation is a piece of its own. The trainer is our own few lines of unigram EM: the
libraries' trainers seed from substrings that repeat *across* words, so on a few hundred words they miss most whole
words, and the one of `tokenizers` gives other last digits in every process. Left out: Unicode normalisation.
"""

from __future__ import annotations

import argparse
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, the project is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ares.cli import HelpFormatter, UserError, print0, run
from ares.files import atomic_dir, read_json

SPECIALS = ("<pad>", "</s>", "<unk>")
SENTINELS = 100
UNUSED = 1e-3  # expected count of a sign that the texts do not hold
MAX_PIECE = 16  # characters, as SentencePiece's default
# T5 lacks pieces for these ASCII signs, so they stay unknown here too: the backslash-n of the prompts is `<unk>` + n
UNKNOWN_SIGNS = set("\\{}~^`<")
ALPHABET = ["▁", *(sign for sign in string.printable if not sign.isspace() and sign not in UNKNOWN_SIGNS)]
# the words that prompts and targets add to the data set's own texts (SPEC 4)
PROMPT_WORDS = (
    "Question: Context: Options: (A) (B) (C) (D) (E) Answer: The answer is (A). (B). (C). (D). (E). Solution: N/A"
)


def texts_of(folder: str | Path) -> list[str]:
    """All texts of a demo folder that a prompt, a target or a caption is made of."""
    data = Path(folder) / "data"
    problems = read_json(data / "scienceqa" / "problems.json", "--data")
    captions = read_json(data / "captions.json", "--data")["captions"]
    texts = list(captions.values())
    for problem in problems.values():
        texts += [problem["question"], problem["hint"], problem["lecture"], problem["solution"], *problem["choices"]]
        texts.append(PROMPT_WORDS)
    return texts


def words_of(texts: Iterable[str]) -> Counter[str]:
    """Marked words with counts: "Dr. (A)" gives `▁Dr` `.` `▁(` `A` `)`. A piece never crosses these borders."""
    counts: Counter[str] = Counter()
    for text in texts:
        for chunk in text.split():
            counts.update(re.findall(r"▁?(?:[^\W_]+|.)", "▁" + chunk))
    return counts


def expected_counts(words: Counter[str], scores: dict[str, float]) -> dict[str, float]:
    """How often each piece is used, over all segmentations of all words (forward-backward; Kudo 2018, section 3.2)."""
    expected: dict[str, float] = {}
    for word, count in words.items():
        length = len(word)
        arcs = [
            (start, end, math.exp(scores[word[start:end]]))
            for start in range(length)
            for end in range(start + 1, min(length, start + MAX_PIECE) + 1)
            if word[start:end] in scores
        ]
        forward = [1.0] + [0.0] * length
        for start, end, probability in arcs:  # by start: forward[start] is complete when it is used
            forward[end] += forward[start] * probability
        backward = [0.0] * length + [1.0]
        for start, end, probability in reversed(arcs):
            backward[start] += backward[end] * probability
        if forward[length] == 0.0:
            continue  # a sign outside the alphabet: unknown
        for start, end, probability in arcs:
            piece = word[start:end]
            share = forward[start] * probability * backward[end] / forward[length]
            expected[piece] = expected.get(piece, 0.0) + count * share
    return expected


def train_unigram(words: Counter[str], size: int, rounds: int = 12) -> list[tuple[str, float]]:
    """At most `size` pieces with log-probabilities, the likelier first: EM from all repeated substrings, pruned.

    Pieces that the texts hardly use are left out, even below `size`. The alphabet always stays, so every word of
    known signs has a segmentation. Pure Python in a fixed order: the same texts give the same bytes.
    """
    signs = sorted({sign for word in words for sign in word if sign not in UNKNOWN_SIGNS} | set(ALPHABET))
    counts: Counter[str] = Counter(dict.fromkeys(signs, 1))
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + MAX_PIECE) + 1):
                if UNKNOWN_SIGNS.isdisjoint(word[start:end]):
                    counts[word[start:end]] += count
    scores = {piece: count * len(piece) for piece, count in counts.items() if count > 1 or len(piece) == 1}
    for step in range(rounds):
        total = sum(scores.values())
        expected = expected_counts(words, {piece: math.log(count / total) for piece, count in scores.items()})
        scores = {piece: max(expected.get(piece, 0.0), UNUSED) for piece in scores}
        # pruned little by little, as the survivors take over the counts; what is hardly used goes at the end
        room = max(size, int(0.75 * len(scores)))
        least = UNUSED if step < rounds - 1 else 0.5
        best = sorted(scores, key=lambda piece: (len(piece) > 1, -scores[piece], piece))[:room]
        scores = {piece: scores[piece] for piece in best if len(piece) == 1 or scores[piece] >= least}
    total = sum(scores.values())
    pieces = [(piece, round(math.log(count / total), 6)) for piece, count in list(scores.items())[:size]]
    return sorted(pieces, key=lambda item: (-item[1], item[0]))


def make_tokenizer(texts: Iterable[str], output: str | Path, vocab_size: int = 1000) -> int:
    """Write a tokenizer folder that `AutoTokenizer.from_pretrained` loads and return its number of pieces.

    Raises UserError when `vocab_size` leaves no room for words.
    """
    room = vocab_size - len(SPECIALS) - SENTINELS
    if room < 2 * len(ALPHABET):
        least = 2 * len(ALPHABET) + len(SPECIALS) + SENTINELS
        raise UserError(f"--vocab_size: {vocab_size} leaves no room for words; give at least {least}")
    pieces = train_unigram(words_of(texts), room)
    vocab = [(name, 0.0) for name in SPECIALS] + pieces
    vocab += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(SENTINELS))]  # T5's order

    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=SENTINELS, model_max_length=512)
    with atomic_dir(output) as folder:
        tokenizer.save_pretrained(folder)
    return len(vocab)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder that demo/make_data.py wrote")
    parser.add_argument("--output", required=True, metavar="DIR", help="tokenizer folder to write")
    parser.add_argument("--vocab_size", type=int, default=1000, help="most pieces, specials and sentinels too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    size = make_tokenizer(texts_of(args.data), args.output, args.vocab_size)
    print0(f"{args.output}: tokenizer of {size} pieces")


if __name__ == "__main__":
    run(main)
