"""Write a tiny T5 folder (config, weights, tokenizer) with fresh seeded weights: where the demo's training starts.

    python demo/make_model.py --tokenizer demo_run/tokenizer --output demo_run/t5

The kind is flan-t5's: gated GELU, RMS norms, relative positions, `lm_head` apart from the embeddings. It is a plain
T5; `main.py` adds the vision layers. Left out: pre-training - the released models start from flan-alpaca.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, the project is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ares.cli import HelpFormatter, UserError, print0, run
from ares.files import atomic_dir, write_json


def build_t5(
    tokenizer_dir: str | Path,
    output: str | Path,
    d_model: int = 96,
    layers: int = 2,
    heads: int = 4,
    d_ff: int | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    dropout: float = 0.1,
) -> Path:
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
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=d_model // heads,
        d_ff=d_ff or 2 * d_model,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=dropout,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,  # transformers 5 turns it into scale_decoder_outputs=False, and itself into True
    )
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
    """State dict with every weight drawn as T5's own code does, but for the head.

    That leaves N(0, 1) embeddings, which matter: with small ones the layers drown the words, and twice the epochs do
    not make up for it. The head keeps the first logits near 0, so the first loss is near ln(vocab).
    """
    import torch

    d_model, d_kv, heads = model.config.d_model, model.config.d_kv, model.config.num_heads
    stds = {  # Mesh TensorFlow's scaled normal: 1 / sqrt(fan in), and for q the missing 1 / sqrt(d_kv)
        "q": (d_model * d_kv) ** -0.5,
        "k": d_model**-0.5,
        "v": d_model**-0.5,
        "o": (heads * d_kv) ** -0.5,
        "wi_0": d_model**-0.5,
        "wi_1": d_model**-0.5,
        "wo": model.config.d_ff**-0.5,
        "relative_attention_bias": d_model**-0.5,
        "shared": 1.0,
        "lm_head": 0.1 * d_model**-0.5,
    }
    weights = {}
    for name, weight in model.state_dict().items():
        kind = name.split(".")[-2]
        if kind == "embed_tokens":  # one tensor with `shared`, as in the published checkpoints
            continue
        if kind.endswith("norm"):
            weights[name] = torch.ones_like(weight)
        else:
            weights[name] = torch.empty_like(weight).normal_(0.0, stds[kind])
    return weights


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer folder the model is made for")
    parser.add_argument("--output", required=True, metavar="DIR", help="model folder to write")
    parser.add_argument("--d_model", type=int, default=96, help="width")
    parser.add_argument("--layers", type=int, default=2, help="blocks in the encoder, and in the decoder")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--d_ff", type=int, help="width of the feed-forward layers (default: 2 x d_model)")
    parser.add_argument("--vocab_size", type=int, help="rows of the embedding (default: the tokenizer's pieces)")
    parser.add_argument("--dropout", type=float, default=0.1, help="T5's 0.1; a tiny model learns faster with 0")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    sizes = {name: getattr(args, name) for name in ("d_model", "layers", "heads", "d_ff", "vocab_size")}
    folder = build_t5(args.tokenizer, args.output, **sizes, seed=args.seed, dropout=args.dropout)
    print0(f"{folder}: T5 of {args.layers} + {args.layers} layers, width {args.d_model}")


if __name__ == "__main__":
    run(main)
