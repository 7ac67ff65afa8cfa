"""Drop the repeated sentences of generated rationales, before the Teacher corrects them.

    python preprocessing_after_RL/remove_sentence.py --file_path RL_models/<run>/0/predictions_ans_train.json

Reads `preds` (and `qids`), writes `remove_repetitive_sentences.json` beside the input: {"preds": [...], "qids": [...]}
in input order. It removes the prefix `Solution:`, all but the first occurrence of every sentence, line breaks and the
stray n of a backslash-n, and joins the sentences by one blank. Files of the
released code hold no ids: `--data_root` gives them, by split order. It changes nothing else: unfinished and
wrong sentences are corrected by the Teacher (next: preprocessing_for_correction_feedback.py). Needs no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares import cli, files  # noqa: E402
from ares.cli import print0  # noqa: E402
from ares.data_folder import read_data_folder  # noqa: E402
from ares.predictions import read_predictions  # noqa: E402
from ares.sentences import remove_repeats, split_text  # noqa: E402

OUTPUT = "remove_repetitive_sentences.json"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    source = "predictions_ans_train.json of the RL model's folder"
    parser.add_argument("--file_path", required=True, metavar="FILE", help=source)
    unused = "of the released command; not needed and not read: sentences are found in the text itself"
    parser.add_argument("--tokenizer", metavar="DIR", help=unused)
    ids = parser.add_argument_group("question ids (checked, or supplied where the file has none)")
    ids.add_argument("--data_root", help="folder that holds scienceqa/ or aokvqa/")
    ids.add_argument("--dataset", help="subfolder of --data_root (default: the one found there)")
    ids.add_argument("--split", help="split whose order the predictions follow (default: train)")
    args = parser.parse_args(argv)
    alone = [flag for flag in ("dataset", "split") if getattr(args, flag) and not args.data_root]
    cli.refuse([f"--{flag} has no effect without --data_root: give that, too" for flag in alone])
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    source = Path(args.file_path)
    name, split = args.split or "train", None
    if args.data_root:
        split = read_data_folder(args.data_root, args.dataset).split(name, "--split")
    read = read_predictions(source, "--file_path", split, "; name the --split that was generated")
    if split is not None:
        read.refuse_unknown(set(split), "--split", f"in split {name}")
    preds, qids = read.preds, read.qids
    files.writable_dir(source.parent, "--file_path")
    if args.tokenizer:
        print0("note: --tokenizer is not needed and was not read: sentences are found in the text")

    kept, found, removed, changed = [], 0, 0, 0
    for pred in cli.progress(preds, desc="removing repeats", unit=" rationale"):
        sentences = split_text(pred)
        first = remove_repeats(sentences)
        kept.append(" ".join(first))
        found += len(sentences)
        removed += len(sentences) - len(first)
        changed += len(first) < len(sentences)

    output = {"preds": kept} if qids is None else {"preds": kept, "qids": qids}
    files.write_json(source.parent / OUTPUT, output)
    empty = sum(not pred for pred in kept)
    print0(
        f"{len(kept)} rationales, {found} sentences; removed {removed} repeated sentences from {changed} rationales"
        + (f"; {empty} rationales hold no sentence at all" if empty else "")
    )
    if qids is None:
        print0(f"note: {source} holds no question ids, so neither does the output; --data_root supplies them")
    print0(f"wrote {source.parent / OUTPUT}")


if __name__ == "__main__":
    cli.run(main)
