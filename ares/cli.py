"""Shared by every script: one-line errors, flag groups, and logging and progress bars on rank 0 only.

Imports neither torch nor transformers: the Teacher's machine may have neither.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# what the model sees of one image: (patches, dim). resnet's one pooled vector is repeated 512 times
img_shape = {"resnet": (512, 2048), "clip": (49, 2048), "detr": (100, 256), "vit": (145, 1024)}
IMG_TYPES = ("detr", "clip", "resnet", "vit")
PROMPT_FORMATS = tuple(f"{given}-{asked}" for given in ("QCM", "QCMG") for asked in ("A", "E", "LE", "LEA", "ALE"))
CAPTION_DEFAULT = "data/captions.json"  # of --caption_file: then other places are searched, too

# -- errors ----------------------------------------------------------------------------------------------

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk
# errors of a disk where a file cannot be written
DISK = (
    *FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ELOOP, errno.EIO,
)  # fmt: skip


class UserError(Exception):
    """A mistake that the user can correct: `run` prints it as one line (what, where, the fix); exit status 2."""

    status = 2


class Stop(UserError):
    """A UserError with another exit status (3: a budget was reached)."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class DiskError(UserError):
    """A file cannot be written."""


def disk_error(error: BaseException, path: str | os.PathLike | None = None) -> DiskError | None:
    """A DiskError if `error` means that the disk is full or that the file cannot be written there, else None.

    `path`: the file, if it is known. Libraries wrap such errors: torch's RuntimeError and safetensors' SafetensorError
    have no errno.
    """
    number, text = None, in_one_line(error, 160)
    if isinstance(error, OSError):
        number = error.errno
        if number is not None and number not in DISK:
            return None
    elif isinstance(cause := error.__cause__ or error.__context__, OSError) and cause.errno in (*FULL, errno.EROFS):
        number = cause.errno
    elif found := re.search(r"os error (\d+)", text):
        number = int(found[1])
    elif not re.search(r"PytorchStreamWriter|inline_container|I/O error|IoError|No space left", text):
        return None
    path = path or getattr(error, "filename", None)
    if number is None and path is None:
        return None
    number = number or (errno.ENOSPC if free_bytes(path) < 1 << 20 else None)
    reason = os.strerror(number) if number else text
    fix = "free some space" if number in FULL else "make it writable or name another place"
    fix = "name a shorter path" if number == errno.ENAMETOOLONG else fix
    where = f" {shortened(path)}" if path else ""
    again = f"what was saved before is kept: {fix}, then run the same command again"
    return DiskError(f"cannot write{where} ({reason}); {again}")


def free_bytes(path: str | os.PathLike) -> int:
    """Free bytes on the disk of `path`, which need not exist."""
    place = Path(path).absolute()
    for folder in (place, *place.parents):
        with contextlib.suppress(OSError, ValueError):
            return shutil.disk_usage(folder).free
    return 0


def shortened(path: str | os.PathLike) -> str:
    """A path for a message; only both ends of an over-long one."""
    text = os.fspath(path)
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def run(main: Callable[[], Any], interrupted: str = "what is finished is on disk; run the same command again") -> None:
    """Entry point of every script: `if __name__ == "__main__": run(main)`. `interrupted`: the message after Ctrl-C
    (exit status 130), unless the KeyboardInterrupt has one of its own."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a test or a notebook may have put another object there
                # escapes for what the terminal's encoding lacks (PYTHONIOENCODING=ascii, LANG=C)
                stream.reconfigure(errors="backslashreplace")
        main()
    except KeyboardInterrupt as stopped:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a launcher sends the signal again
        print0(f"{Path(sys.argv[0]).name}: stopped (Ctrl-C): {str(stopped) or interrupted}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        fault = error if isinstance(error, UserError) else disk_error(error)
        if fault is None:
            raise
        if rank() > 0:
            time.sleep(10)  # if every rank found the same fault, the launcher ends this one after rank 0 printed it
        where = f" (rank {rank()})" if rank() > 0 else ""
        print(f"{Path(sys.argv[0]).name}: error{where}: {fault}", file=sys.stderr, flush=True)
        sys.exit(fault.status)


def in_one_line(error: object, limit: int) -> str:
    """An error's text (its type if it has none) with white space collapsed, cut at `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def refuse(problems: Sequence[str]) -> None:
    """Raise one UserError with all problems, if there are any: better than one problem per run."""
    if problems:
        raise UserError("; ".join(problems))


# -- processes -------------------------------------------------------------------------------------------


def rank() -> int:
    """This process's rank as its launcher (accelerate, torchrun) set it; 0 when run alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes as the launcher set it; 1 when run alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def print0(*args: Any, **kwargs: Any) -> None:
    """`print` on rank 0, flushed, so that a log file can be followed."""
    if rank() == 0:
        print(*args, **{"flush": True, **kwargs})


def warn0(message: str) -> None:
    """One warning line on standard error, on rank 0."""
    print0(f"warning: {message}", file=sys.stderr)


def progress(
    iterable: Iterable | None = None, *, desc: str, total: int | None = None, unit: str = "it", initial: int = 0
):
    """A tqdm bar with ETA on rank 0; if standard error is no terminal, a line every 30 s."""
    from tqdm import tqdm

    live = sys.stderr.isatty()
    pace = {"mininterval": 0.2, "maxinterval": 10.0} if live else {"mininterval": 30.0, "maxinterval": 60.0}
    shown = {"disable": rank() != 0, "dynamic_ncols": live, "ascii": None if live else True}
    return tqdm(iterable, desc=desc, total=total, unit=unit, initial=initial, **shown, **pace)


# -- flags -----------------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """For every script: keeps the line breaks of the description, and adds each flag's default to its help, unless
    the help has the word "default"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        shown = action.option_strings and action.nargs != 0 and default not in (None, argparse.SUPPRESS, "", [], ())
        if not shown or "default" in text:
            return text
        default = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else "%(default)s"
        return f"{text} (default: {default})".strip()


def str2bool(text: str) -> bool:
    """Parse a boolean that is written as a value (`--correction True`)."""
    value = str(text).strip().lower()
    if value in ("true", "yes", "y", "1", "false", "no", "n", "0"):
        return value in ("true", "yes", "y", "1")
    raise argparse.ArgumentTypeError(f"{text!r} is not one of true/false/yes/no/1/0")


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> set[str]:
    """The `dest` of all flags on the command line (`{"lr", "eval_le"}`), those set to their defaults included."""
    absent: list = []  # a flag that appends copies it; argparse takes no default for what the namespace has
    start = dict.fromkeys([*(action.dest for action in parser._actions), *parser._defaults], absent)
    found = vars(parser.parse_args(argv, argparse.Namespace(**start)))
    return {name for name, value in found.items() if value is not absent}


def add_data_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where the questions and images are: for every script that reads a data folder."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_root", default="data", help="folder that holds scienceqa/ or aokvqa/")
    group.add_argument("--dataset", help="subfolder of --data_root (default: the one found there)")
    group.add_argument("--images", help="folder of {qid}/image.png (default: {data_root}/images, then ./images)")
    return group


def add_prompt_data_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """`add_data_flags`, and where captions and vision features are."""
    group = add_data_flags(parser)
    group.add_argument("--caption_file", default=CAPTION_DEFAULT, help="captions, {qid: text}")
    group.add_argument("--use_caption", action="store_true", help="put the caption into the prompt's context")
    group.add_argument("--img_type", choices=IMG_TYPES, help="vision features to use (none: text only)")
    group.add_argument("--vision_features", help="folder of feature files (default: {data_root}/vision_features)")
    group.add_argument("--name_map", help="qid -> feature row (default: beside the features, then in --data_root)")
    return group


def add_common_flags(
    parser: argparse.ArgumentParser,
    *,
    output_len: int,
    lr: float,
    train_splits: Sequence[str] = ("train", "trainval", "minitrain", "miniminitrain"),
) -> None:
    """The flags that main.py, run_mm_cot_rl.py and run_mm_cot_lora.py have in common, in groups."""
    data = add_prompt_data_flags(parser)
    val_splits = ("test", "val", "minival", "miniminival")
    data.add_argument("--train_split", default="train", choices=train_splits, help="split to train on")
    data.add_argument("--val_split", default="val", choices=val_splits, help="evaluation")
    data.add_argument("--test_split", default="test", choices=("test", "minitest"), help="split to test on")
    data.add_argument("--train_le", metavar="FILE", help="rationales for the prompts of the train split")
    data.add_argument("--eval_le", metavar="FILE", help="rationales for the prompts of the evaluation split")
    data.add_argument("--test_le", metavar="FILE", help="rationales for the prompts of the test split")

    model = parser.add_argument_group("model and prompt")
    base = "declare-lab/flan-alpaca-base"
    model.add_argument("--model", default=base, help="folder or hub id of the starting model")
    model.add_argument("--tokenizer", metavar="DIR", help="tokenizer (default: the checkpoint's own, else --model's)")
    model.add_argument("--options", nargs="+", default=["A", "B", "C", "D", "E"], help="letters of the choices")
    asked = "what the prompt holds - what is asked for"
    model.add_argument("--prompt_format", default="QCM-A", choices=PROMPT_FORMATS, help=asked)
    model.add_argument("--input_len", type=int, default=512, help="longest prompt, in tokens")
    model.add_argument("--output_len", type=int, default=output_len, help="longest target or output, in tokens")

    training = parser.add_argument_group("training and evaluation")
    training.add_argument("--bs", type=int, default=16, help="batch size per process")
    training.add_argument("--eval_bs", type=int, default=16, help="evaluation batch size per process")
    training.add_argument("--eval_acc", type=int, help="evaluation accumulation steps: batches kept on the device")
    training.add_argument("--lr", type=float, default=lr, help="learning rate")
    training.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    training.add_argument("--user_msg", default="baseline", help="only names the output folder")
    training.add_argument("--use_generate", action="store_true", help="predict by greedy generation")
    training.add_argument("--final_eval", action="store_true", help="evaluate at the end only")
    add_decode_graph(training)


def add_decode_graph(group: argparse._ActionsContainer) -> None:
    text = "generate by CUDA graphs; auto: on a GPU (on without one: in the same fixed shapes, slower)"
    group.add_argument("--decode_graph", default="auto", choices=("auto", "on", "off"), help=text)


def precision_faults() -> list[str]:
    """Faults of accelerate's configuration, for `refuse`: a precision that --precision does not have."""
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by accelerate launch
    fix = "use --mixed_precision no or bf16 with accelerate launch (or change it with accelerate config)"
    fault = f"the accelerate configuration asks for {configured}, in which T5 overflows; {fix}; --precision decides"
    return [] if configured in ("no", "bf16") else [fault]


def mixed_precision(precision: str) -> str:
    """--precision as accelerate names it; `auto` follows accelerate's configuration, then the GPU. Needs torch."""
    import torch

    if precision == "auto":
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
        # without the argument torch says yes for a V100 or T4, which only emulate bf16
        fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if configured or fast else "fp32"
    return "bf16" if precision == "bf16" else "no"
