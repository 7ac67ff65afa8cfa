"""Train the demo's tokenizer and write a tiny T5 for it, with fresh seeded weights: where the demo's training starts.

    python demo/make_model.py --data demo_run --tokenizer demo_run/tokenizer --output demo_run/models/t5
    python demo/make_model.py --tokenizer shared/t5_tokenizer --output tiny_t5        # for a tokenizer that exists

The tokenizer is a unigram one like T5's, on the texts of a demo folder: `<pad>` 0, `</s>` 1, `<unk>` 2, pieces with a
leading `▁`, 100 sentinels at the end, `</s>` appended, no piece for a newline or a backslash. Each punctuation mark is
a piece. It is trained by a few lines of unigram EM here: the trainers of the libraries start from substrings that
repeat *across* words, so on a few hundred words they miss most whole words, and the one of `tokenizers` gives other
last digits in every process.

The model is like flan-t5: gated GELU, RMS norms, relative positions, `lm_head` apart from the embeddings. It is a
plain T5 without pre-training; `main.py` adds the vision layers.
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
from ares.files import atomic_dir, read_json, write_json

SPECIALS = ("<pad>", "</s>", "<unk>")
SENTINELS = 100
UNUSED = 1e-3  # expected count of a sign that is not in the texts
MAX_PIECE = 16  # characters, as SentencePiece's default
# T5 lacks pieces for these ASCII signs, so they stay unknown here too: the backslash-n of the prompts is `<unk>` + n
UNKNOWN_SIGNS = set("\\{}~^`<")
ALPHABET = ["▁", *(sign for sign in string.printable if not sign.isspace() and sign not in UNKNOWN_SIGNS)]
# the words that prompts and targets add to the texts of the data set
PROMPT_WORDS = (
    "Question: Context: Options: (A) (B) (C) (D) (E) Answer: The answer is (A). (B). (C). (D). (E). Solution: N/A"
)


def texts_of(folder: str | Path) -> list[str]:
    """All texts of a demo folder that a prompt, a target or a caption is made of."""
    data = Path(folder) / "data"
    problems = read_json(data / "scienceqa" / "problems.json", "--data")
    texts = list(read_json(data / "captions.json", "--data")["captions"].values())
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

    Pieces that the texts hardly use are dropped, even below `size`. The alphabet always stays, so every word of known
    signs has a segmentation. Pure Python in a fixed order: the same texts give the same bytes.
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
        # pruned in steps, as the remaining pieces take over the counts; rarely used ones are dropped in the last step
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


# -- model -----------------------------------------------------------------------------------------------


def build_t5(
    tokenizer_dir: str | Path, output: str | Path, d_model: int = 96, layers: int = 2, heads: int = 4,
    d_ff: int | None = None, vocab_size: int | None = None, seed: int = 0, dropout: float = 0.1,
) -> Path:  # fmt: skip
    """Write a plain T5 of `layers` encoder and `layers` decoder blocks, and the tokenizer, to `output`.

    `d_ff` defaults to 2 * d_model, `vocab_size` to the tokenizer's (the real T5's models have 32,128 rows for its
    32,100 pieces). The weights depend on the sizes and the seed alone; the caller's RNG is left as it was. The first
    loss is about ln(vocab_size). Raises UserError for sizes that do not fit each other or the tokenizer.
    """
    if d_model % heads:
        raise UserError(f"--heads: {heads} does not divide --d_model {d_model}")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer: {tokenizer_dir} holds no tokenizer ({str(error).splitlines()[0]})") from error
    vocab_size = vocab_size or len(tokenizer)
    if vocab_size < len(tokenizer):
        raise UserError(f"--vocab_size: {vocab_size} is less than the {len(tokenizer)} pieces of {tokenizer_dir}")
    config = T5Config(
        vocab_size=vocab_size, d_model=d_model, d_kv=d_model // heads, d_ff=d_ff or 2 * d_model, num_layers=layers,
        num_heads=heads, feed_forward_proj="gated-gelu", dropout_rate=dropout, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
        tie_word_embeddings=False,  # transformers 5 turns it into scale_decoder_outputs=False, and itself into True
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = draw_weights(T5ForConditionalGeneration(config))
    # Written by hand: the library saves an untied T5 as tied, and its embeddings three times.
    plain = {**config.to_dict(), "architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False}
    with atomic_dir(output) as folder:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", plain, indent=2)
        tokenizer.save_pretrained(folder)
    return Path(output)


def draw_weights(model) -> dict:
    """State dict with every weight drawn as in T5's own code, except the head's.

    Embeddings are N(0, 1): with small ones the layers' outputs hide the words, and twice the epochs do not compensate.
    The small head keeps the first logits near 0, so that the first loss is near ln(vocab).
    """
    import torch

    c = model.config
    # Mesh TensorFlow's scaled normal: 1 / sqrt(fan in), and for q the missing 1 / sqrt(d_kv)
    stds = dict.fromkeys(("k", "v", "wi_0", "wi_1", "relative_attention_bias"), c.d_model**-0.5)
    stds |= {"q": (c.d_model * c.d_kv) ** -0.5, "o": (c.num_heads * c.d_kv) ** -0.5, "wo": c.d_ff**-0.5}
    stds |= {"shared": 1.0, "lm_head": 0.1 * c.d_model**-0.5}
    weights = {}
    for name, weight in model.state_dict().items():
        kind = name.split(".")[-2]
        if kind == "embed_tokens":  # one tensor with `shared`, as in the published checkpoints
            continue
        norm = kind.endswith("norm")
        weights[name] = torch.ones_like(weight) if norm else torch.empty_like(weight).normal_(0.0, stds[kind])
    return weights


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="its tokenizer; with --data it is written")
    parser.add_argument("--data", metavar="DIR", help="train the tokenizer on this folder of demo/make_data.py")
    parser.add_argument("--output", required=True, metavar="DIR", help="model folder to write")
    parser.add_argument("--d_model", type=int, default=96, help="width")
    parser.add_argument("--layers", type=int, default=2, help="blocks in the encoder, and in the decoder")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--d_ff", type=int, help="width of the feed-forward layers (default: 2 x d_model)")
    rows = "rows of the embedding (default: the tokenizer's pieces, with --data at most 1000)"
    parser.add_argument("--vocab_size", type=int, help=rows)
    parser.add_argument("--dropout", type=float, default=0.1, help="T5's 0.1; a tiny model learns faster with 0")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.data:
        size = make_tokenizer(texts_of(args.data), args.tokenizer, args.vocab_size or 1000)
        print0(f"{args.tokenizer}: tokenizer of {size} pieces")
    sizes = {name: getattr(args, name) for name in ("d_model", "layers", "heads", "d_ff", "vocab_size")}
    folder = build_t5(args.tokenizer, args.output, **sizes, seed=args.seed, dropout=args.dropout)
    print0(f"{folder}: T5 of {args.layers} + {args.layers} layers, width {args.d_model}")


if __name__ == "__main__":
    run(main)
