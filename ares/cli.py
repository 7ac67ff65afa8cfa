"""What every script shares: one-line errors, flag groups, rank-aware logging and progress, atomic writes.

Imports neither torch nor transformers: the Teacher's machine may have neither.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

IMG_TYPES = ("detr", "clip", "resnet", "vit")
PROMPT_FORMATS = tuple(f"{given}-{asked}" for given in ("QCM", "QCMG") for asked in ("A", "E", "LE", "LEA", "ALE"))
NAME_MAX = 255  # bytes in one file name, on every common file system


class UserError(Exception):
    """A mistake the user can mend: `run` prints it as one line (what, where, the fix) and exits with status 2."""


class Stop(UserError):
    """A UserError that ends with another exit status (3: a budget was reached)."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def run(main: Callable[[], Any]) -> None:
    """Entry point of every script: `if __name__ == "__main__": run(main)`."""
    try:
        escape_unprintable()
        main()
    except UserError as error:
        if rank() > 0:
            time.sleep(10)  # every rank found the same fault: the launcher ends this one once rank 0 has told it
        where = f" (rank {rank()})" if rank() > 0 else ""
        print(f"{Path(sys.argv[0]).name}: error{where}: {error}", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "status", 2))
    except KeyboardInterrupt:
        sys.exit(130)


def escape_unprintable() -> None:
    """Print what the terminal's encoding lacks (PYTHONIOENCODING=ascii, LANG=C) as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test or a notebook has put another object
            stream.reconfigure(errors="backslashreplace")


def refuse(problems: Sequence[str]) -> None:
    """Raise one UserError that holds every problem found, so that nobody mends flags one run at a time."""
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
    """`print` on rank 0, flushed, so that a piped log is read while it grows."""
    if rank() == 0:
        print(*args, **{"flush": True, **kwargs})


def warn0(message: str) -> None:
    """One warning line on standard error, on rank 0."""
    print0(f"warning: {message}", file=sys.stderr)


def progress(
    iterable: Iterable | None = None, *, desc: str, total: int | None = None, unit: str = "it", initial: int = 0
):
    """A tqdm bar with ETA on rank 0; when standard error is no terminal, a line every 30 s instead of thousands."""
    from tqdm import tqdm

    live = sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        unit=unit,
        initial=initial,
        disable=rank() != 0,
        dynamic_ncols=live,
        ascii=None if live else True,
        mininterval=0.2 if live else 30.0,
        maxinterval=10.0 if live else 60.0,
    )


# -- flags -----------------------------------------------------------------------------------------------


def str2bool(text: str) -> bool:
    """Booleans that are written as values (`--correction True`)."""
    value = str(text).strip().lower()
    if value in ("true", "yes", "y", "1"):
        return True
    if value in ("false", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not one of true/false/yes/no/1/0")


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> set[str]:
    """Destinations that were set on the command line (`{"lr", "eval_le"}`), whatever their values."""
    saved = [(action, action.default) for action in parser._actions]
    saved_parser_defaults, parser._defaults = parser._defaults, {}
    try:
        for action, _ in saved:
            action.default = argparse.SUPPRESS
        return set(vars(parser.parse_args(argv)))
    finally:
        for action, default in saved:
            action.default = default
        parser._defaults = saved_parser_defaults


def add_data_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where questions, images and captions lie. Shared by every script that reads a data folder."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_root", default="data", help="folder that holds scienceqa/ or aokvqa/")
    group.add_argument("--dataset", help="subfolder of --data_root (default: the one found there)")
    group.add_argument("--images", help="folder of {qid}/image.png (default: {data_root}/images, then ./images)")
    return group


def add_common_flags(
    parser: argparse.ArgumentParser,
    *,
    output_len: int,
    lr: float,
    train_splits: Sequence[str] = ("train", "trainval", "minitrain", "miniminitrain"),
) -> None:
    """The flags that main.py, run_mm_cot_rl.py and run_mm_cot_lora.py have in common (SPEC 2), in groups."""
    data = add_data_flags(parser)
    data.add_argument("--caption_file", default="data/captions.json", help="captions, {qid: text}")
    data.add_argument("--use_caption", action="store_true", help="put the caption into the prompt's context")
    data.add_argument("--img_type", choices=IMG_TYPES, help="vision features to use (none: text only)")
    data.add_argument("--vision_features", help="folder of feature files (default: {data_root}/vision_features)")
    data.add_argument("--name_map", help="qid -> feature row (default: beside the features, then in --data_root)")
    data.add_argument("--train_split", default="train", choices=train_splits, help="split to train on")
    data.add_argument(
        "--val_split", default="val", choices=("test", "val", "minival", "miniminival"), help="evaluation"
    )
    data.add_argument("--test_split", default="test", choices=("test", "minitest"), help="split to test on")
    data.add_argument("--train_le", metavar="FILE", help="rationales for the prompts of the train split")
    data.add_argument("--eval_le", metavar="FILE", help="rationales for the prompts of the evaluation split")
    data.add_argument("--test_le", metavar="FILE", help="rationales for the prompts of the test split")

    model = parser.add_argument_group("model and prompt")
    model.add_argument(
        "--model", default="declare-lab/flan-alpaca-base", help="folder or hub id of the starting model"
    )
    model.add_argument("--tokenizer", metavar="DIR", help="tokenizer (default: the checkpoint's own, else --model's)")
    model.add_argument("--options", nargs="+", default=["A", "B", "C", "D", "E"], help="letters of the choices")
    model.add_argument(
        "--prompt_format", default="QCM-A", choices=PROMPT_FORMATS, help="what the prompt holds - what is asked for"
    )
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


def add_precision_flag(group: argparse._ArgumentGroup) -> None:
    """--precision, of everything that trains or generates."""
    group.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16"),
        help="autocast; auto: bf16 on a GPU that has it (weights and optimizer stay fp32)",
    )


def mixed_precision(precision: str) -> str:
    """--precision as accelerate names it; `auto` follows accelerate's configuration, then the GPU. Needs torch."""
    import torch

    if precision == "auto":
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
        # torch says yes of a V100 or T4, too, which only emulate it
        fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if configured or fast else "fp32"
    return "bf16" if precision == "bf16" else "no"


# -- files -----------------------------------------------------------------------------------------------


def short_name(name: str) -> str:
    """`name`, or, if it is longer than a file name may be, its beginning and a hash of the whole."""
    raw = name.encode()
    if len(raw) <= NAME_MAX:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:12]
    return raw[: NAME_MAX - 13].decode(errors="ignore") + "-" + digest


def writable_dir(path: str | os.PathLike, flag: str) -> Path:
    """Make `path` and prove that a file can be written there. Raises UserError naming `flag`."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable-"):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{flag}: cannot write to {path} ({reason}); name a folder you may write to") from error
    return path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and replaces `path` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # short, whatever the target's name: a 255-byte name has no room for a suffix
    temporary = path.parent / f".tmp-{os.getpid()}-{time.monotonic_ns()}"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def place_file(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Make `target` the same file as `source`, in one step: a hard link where the disk allows, a copy elsewhere.

    Leaves a link or an untouched copy as it is (content is not compared: a second run shall be cheap).
    """
    source, target = os.path.realpath(source), Path(target)
    if _same_file(source, target):
        return
    temporary = target.with_name(f".tmp-{os.getpid()}-{time.monotonic_ns()}")
    try:
        try:
            os.link(source, temporary)
        except OSError:  # another disk, or a file of another user
            shutil.copy2(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _same_file(source: str, target: Path) -> bool:
    try:
        theirs, ours = os.stat(source), os.stat(target)
    except FileNotFoundError:
        return False
    return os.path.samestat(theirs, ours) or (theirs.st_size, theirs.st_mtime_ns) == (ours.st_size, ours.st_mtime_ns)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically (UTF-8, newlines as given)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 4) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike, flag: str) -> Any:
    """Read a JSON file. Raises UserError naming `flag`, the file, and where the JSON breaks."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{flag}: {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: cannot read {path} ({error})") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{flag}: {path} is not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from error


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new folder beside `path`; on success it takes the place of `path`. A kill leaves no half folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
    temporary.chmod(0o755)  # mkdtemp's 0700 would hide a model from the group that shares the box
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # so would safetensors' 0600
        old = None
        if path.exists():
            old = path.parent / f".old-{os.getpid()}-{time.monotonic_ns()}"
            os.replace(path, old)
        os.replace(temporary, path)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_args(folder: str | os.PathLike, args: argparse.Namespace) -> None:
    """Write the resolved flags to `folder`/args.yaml, so that a run can be read back and repeated."""
    import yaml

    plain = {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())}
    write_text(Path(folder) / "args.yaml", yaml.safe_dump(plain, sort_keys=False))
