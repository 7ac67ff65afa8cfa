"""Reading, writing and appending to files. Every fault is one line that names the file and the fix.

Reading opens regular files only (a FIFO or a device would block) and limits their size. A file that the user names may
be a link; in a questions folder, which others write to, no link is followed. Writing fills a temporary file and then
renames it: a link at the target is replaced, never followed, and a kill leaves no half-written file.
Imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ares.cli import FULL, DiskError, UserError, disk_error, in_one_line, shortened

NAME_MAX = 255  # bytes in a file name, on every common file system
MAX_BYTES = 1 << 32  # of a file that the user names
SHARED_BYTES = 1 << 26  # of a file in a questions folder
# how names of temporary files begin; a hash of the machine and the container follows: process ids count within them
PID_NAMESPACE = os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else ""
TEMPORARY = f".tmp-{zlib.crc32(f'{socket.gethostname()} {PID_NAMESPACE}'.encode()):08x}-"

AnyPath = str | os.PathLike

# -- reading ---------------------------------------------------------------------------------------------


def open_regular(path: AnyPath, *, follow_links: bool = True, flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor. Raises UserError for anything else, and OSError."""
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        file = os.open(path, flags, 0o666)
    except ValueError:  # a zero byte, half of a surrogate pair
        raise UserError(f"{ascii(str(path))[:200]} cannot name a file") from None
    except OSError as error:
        if not follow_links and error.errno == errno.ELOOP:
            raise UserError(f"{path} is a symbolic link; put the file itself there") from None
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a FIFO without a reader, a socket, a folder to write to
            raise UserError(f"{path} {_kind(os.stat(path).st_mode)}; put a regular file there") from None
        raise
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        raise UserError(f"{path} {_kind(mode)}; put a regular file there")
    return file


def _kind(mode: int) -> str:
    found = "folder" if stat.S_ISDIR(mode) else "FIFO" if stat.S_ISFIFO(mode) else "device or socket"
    return f"is a {found}, not a file"


def read_shared(path: AnyPath) -> bytes:
    """Read a file of a questions folder without following links. Raises UserError for a link, a FIFO, a folder or too
    many bytes, and OSError (FileNotFoundError)."""
    return _content(open_regular(path, follow_links=False), path, SHARED_BYTES)


def read_bytes(path: AnyPath, flag: str, *, head: int | None = None) -> bytes:
    """Read a file that the user named or that we wrote, following links; with `head` only the first `head` bytes.
    Raises UserError naming `flag` and the file."""
    try:
        return _content(open_regular(path), path, MAX_BYTES, head)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{flag}: {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{flag}: cannot read {shortened(path)} ({error.strerror or error})") from error


def _content(file: int, path: AnyPath, max_bytes: int, head: int | None = None) -> bytes:
    try:  # no file object: a round has 200,000 small files
        if head is not None:
            return os.read(file, head)
        size = os.fstat(file).st_size
        if size > max_bytes:
            raise UserError(f"{path} is larger than {max_bytes / 1e6:,.0f} MB; it is not the file that is meant here")
        return b"".join(iter(lambda: os.read(file, size + 1), b""))
    finally:
        os.close(file)


def refuse_unfit(path: AnyPath, flag: str) -> None:
    """Raise UserError unless `path` is a readable regular file. For files that a library opens by name."""
    read_bytes(path, flag, head=0)


def read_text(path: AnyPath, flag: str) -> str:
    """Read UTF-8 text without its byte order mark. Raises UserError naming `flag`, the file and the line."""
    data, where = read_bytes(path, flag), f"{flag}: {path}"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{where} is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where} is not UTF-8 (line {line}: {error.reason}); save it as UTF-8") from None


def read_json(
    path: AnyPath, flag: str, kind: type | None = None, *, holds: str | None = None, nan: bool = False
) -> Any:
    """Read a JSON file. `kind`: dict or list, if the value must be one; `nan`: read NaN as None. Raises UserError
    naming `flag`, the file and, where it is known, the line; for another kind also what the file `holds`."""
    text = read_text(path, flag)
    try:
        value = parse_json(text, nan=nan)
    except ValueError as error:
        raise UserError(f"{flag}: {path} {str(error)[:300]}") from None
    if kind is not None and not isinstance(value, kind):
        holds = holds or {dict: "an object {...}", list: "a list [...]"}[kind]
        names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
        raise UserError(f"{flag}: {path} must hold {holds}, not {names.get(type(value), 'a number')}")
    return value


def parse_json(text: str, *, nan: bool = False) -> Any:
    """Parse JSON. Raises ValueError, whose text can follow a file's name, for text that is no JSON, numbers beyond 64
    bits, half of a surrogate pair, and, unless `nan` reads them as None, NaN and Infinity."""

    def constant(name: str) -> None:
        if not nan:
            raise ValueError(f"holds {name}, which is no JSON number; make the file again")

    def floating(digits: str) -> float | None:
        value = float(digits)
        if math.isfinite(value):
            return value
        if not nan:
            raise ValueError(f"holds the number {digits[:20]}, which no computer number reaches")

    def integer(digits: str) -> int:
        if len(digits) > 19:
            raise ValueError(f"holds the number {digits[:12]}... of {len(digits)} digits; no field is that large")
        return int(digits)

    try:
        value = json.loads(text, parse_constant=constant, parse_float=floating, parse_int=integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise ValueError("is nested too deeply to be read; it is not the file that is meant here") from None
    if re.search(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]", text) and (half := _half_character(value)):
        raise ValueError(half)
    return value


def _half_character(value: Any) -> str | None:
    """A message if a text within `value` holds one half of a surrogate pair, else None."""
    todo = [(value, "")]
    while todo:
        each, where = todo.pop()
        if isinstance(each, str) and (half := re.search("[\ud800-\udfff]", each)):
            at = f" at {ascii(where.lstrip('.'))[1:-1]}" if where else ""
            return f"holds half of a character ({ascii(half[0])[1:-1]}){at}; write it whole or drop it"
        if isinstance(each, dict):
            todo += [(key, where) for key in each]
            todo += [(inner, f"{where}.{key}"[:120]) for key, inner in each.items()]
        elif isinstance(each, list):
            todo += [(inner, f"{where}[{number}]"[:120]) for number, inner in enumerate(each)]
    return None


def read_jsonl(path: AnyPath, flag: str, damaged: Callable[[int], Any] | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each line that is not blank; NaN is read as None. `damaged` is called with the
    number of each line that is no JSON; without it such a line raises UserError."""
    data = read_bytes(path, flag).removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line.decode("utf-8"), nan=True)
        except ValueError as error:  # UnicodeDecodeError is one
            if damaged is None:
                reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else in_one_line(error, 160)
                raise UserError(f"{flag}: {path}: line {number} {reason}") from None
            damaged(number)
        else:
            yield number, value


def read_yaml(path: AnyPath, flag: str) -> dict[str, Any]:
    """Read the mapping in a YAML file; {} if it is empty. Raises UserError naming `flag` and the file."""
    import yaml

    text = read_text(path, flag)
    try:
        value = yaml.safe_load(text)
    except Exception as error:  # not only YAMLError: dates, numbers, keys and nesting raise others
        raise UserError(f"{flag}: {path} is not YAML ({in_one_line(error, 120)})") from None
    if not isinstance(value, (dict, type(None))) or not all(isinstance(key, str) for key in value or ()):
        raise UserError(f"{flag}: {path} must hold one `name: value` a line")
    return value or {}


def refuse_links(path: AnyPath, root: AnyPath) -> None:
    """Raise UserError if `path`, or a folder between `root` and it, is a link that leads out of `root`."""
    step = root = str(Path(root))
    for part in Path(path).relative_to(root).parts:  # strings: 50,000 questions have several folders each
        step = os.path.join(step, part)
        if os.path.islink(step) and not os.path.realpath(step).startswith(os.path.join(os.path.realpath(root), "")):
            raise UserError(f"{step} is a link that leads out of {root}; put the folder or file itself there")


# -- writing ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[None]:
    """Turn errors of the disk within the block into a DiskError that names `path`."""
    try:
        yield
    except Exception as error:
        fault = None if isinstance(error, UserError) else disk_error(error, path)
        if fault is None:
            raise
        raise fault from error


def flush_all() -> None:
    """Flush everything that this machine has written to disk.

    What was paid for, in dollars or hours of a GPU, is flushed as it is written. What can be computed again is written
    with `flush=False`, as a flush takes 5 ms and a round has 50,000 files of a kind; it is flushed here, once per
    stage, before the file that signals the stage's end. A power cut before that may leave such files empty or cut:
    readers take them as absent, and a second run writes them again.
    """
    os.sync()


def write_bytes(path: AnyPath, data: bytes, *, flush: bool = True) -> None:
    """Write a file atomically. Raises DiskError; on a full disk the space that `reserve` holds is used. `flush`: wait
    for the disk (when to: `flush_all`)."""
    with writing(path):
        _with_reserve(lambda: _replace(os.fspath(path), data, flush), path)


def _replace(path: str, data: bytes, flush: bool) -> None:
    # few system calls: 50,000 questions have four files each
    temporary = f"{os.path.dirname(path) or '.'}/{_temporary_name()}"
    try:
        file = open(temporary, "xb", buffering=0)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(temporary, "xb", buffering=0)
    try:
        with file:
            _write_all(file.fileno(), data)
            if flush:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def write_text(path: AnyPath, text: str, *, flush: bool = True) -> None:
    """Write a text file atomically (UTF-8, newlines as given; half of a surrogate pair becomes `?`)."""
    write_bytes(path, text.encode("utf-8", errors="replace"), flush=flush)


def write_json(path: AnyPath, value: Any, indent: int | None = 4) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_args(folder: AnyPath, args: argparse.Namespace) -> None:
    """Write the flags of a run to `folder`/args.yaml."""
    import yaml

    plain = {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())}
    write_text(Path(folder) / "args.yaml", yaml.safe_dump(plain, sort_keys=False))


def touch(path: AnyPath) -> None:
    """Make an empty file with the present time; a link there is replaced."""
    write_bytes(path, b"", flush=False)


def _temporary_name() -> str:
    # not made of the target's name, which may be 255 bytes long
    return f"{TEMPORARY}{os.getpid()}-{threading.get_ident() % 10**6}-{time.monotonic_ns()}"


def remove_leftovers(folder: AnyPath) -> None:
    """Delete the temporary files in `folder` whose process, on this machine, has ended: it was killed."""
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        try:
            os.kill(int(path.name.removeprefix(TEMPORARY).partition("-")[0]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        except (OSError, OverflowError, ValueError):  # of another user, or no name of ours
            pass


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A path beside `path` for what will replace it; removed in the end. Errors of the disk become a DiskError."""
    temporary = path.parent / _temporary_name()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and replaces `path` atomically. Raises
    DiskError if the disk refuses something, whatever library writes there."""
    with _temporary(Path(path)) as temporary:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def atomic_dir(path: AnyPath) -> Iterator[Path]:
    """Yield a new folder beside `path`; on success it replaces `path`. A kill leaves no half-written folder. Raises
    DiskError if the disk refuses something, whatever library writes there."""
    path = Path(path)
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        for each in filter(Path.is_file, temporary.rglob("*")):
            each.chmod(0o644)  # safetensors' 0600 would hide a model from the group that shares the machine
            with open(each, "rb+") as file:
                os.fsync(file.fileno())
        old = path.parent / f".old-{os.getpid()}-{time.monotonic_ns()}"
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, old)
        os.replace(temporary, path)
        old.unlink() if old.is_symlink() else shutil.rmtree(old, ignore_errors=True)


def place_file(source: AnyPath, target: AnyPath) -> None:
    """Make `target` a hard link to `source`, or a copy where the disk allows none, atomically.

    An earlier link or copy of the same size and time stays: a second run is quick. Raises UserError if `source` is no
    regular file, DiskError.
    """
    source, target = os.path.realpath(source), Path(target)
    if not os.path.isfile(source):
        raise UserError(f"{source} is no regular file; replace or remove it")
    with _temporary(target) as temporary:
        about, there = os.stat(source), os.lstat(target) if os.path.lexists(target) else None
        if there is not None and stat.S_ISREG(there.st_mode):
            same_copy = (about.st_size, about.st_mtime_ns) == (there.st_size, there.st_mtime_ns)
            if same_copy or os.path.samestat(about, there):
                return
        try:
            os.link(source, temporary)
        except OSError:  # another disk, or a file of another user
            shutil.copy2(source, temporary)
        os.replace(temporary, target)


def writable_dir(path: AnyPath, flag: str) -> Path:
    """Make the folder `path`, test that a file can be written there, and remove what killed processes left in it.
    Raises UserError naming `flag`."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / _temporary_name()
        probe.touch(exist_ok=False)
        probe.unlink()
        remove_leftovers(path)
    except (OSError, ValueError) as error:
        why = f"{shortened(path)} ({getattr(error, 'strerror', None) or error})"
        raise UserError(f"{flag}: cannot write to {why}; name a folder you may write to") from error
    return path


def short_name(name: str) -> str:
    """`name`, or, if it is too long for a file name, its beginning and a hash of it."""
    raw = name.encode()
    if len(raw) <= NAME_MAX:
        return name
    return f"{raw[: NAME_MAX - 13].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:12]}"


class Lines:
    """A file to append lines to, each in one write. A last line without its end (a kill cut it) is ended first. Raises
    UserError if `path` is a link or no regular file, DiskError."""

    def __init__(self, path: AnyPath):
        self.path = path
        with writing(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self._file = open_regular(path, follow_links=False, flags=os.O_RDWR | os.O_APPEND | os.O_CREAT)
            size = os.fstat(self._file).st_size
            self._torn = bool(size) and os.pread(self._file, 1, size - 1) != b"\n"
            if self._torn:
                self._write(b"")

    def add(self, text: str, *, reserved: bool = False) -> int:
        """Append `text` and a line break; return the size of the file. `reserved`: may use the space of `reserve`."""
        data = (text + "\n").encode("utf-8", errors="replace")
        with writing(self.path):
            _with_reserve(lambda: self._write(data), self.path, reserved)
            return os.lseek(self._file, 0, os.SEEK_CUR)

    def _write(self, data: bytes) -> None:
        data = b"\n" + data if self._torn else data
        written = os.write(self._file, data)
        if written < len(data):  # the disk is full: the next write raises, and the one after it begins a new line
            self._torn = True
            _write_all(self._file, data[written:])
        self._torn = False

    def close(self) -> None:
        os.close(self._file)


def append_line(path: AnyPath, text: str) -> None:
    """Append one line to a file that no other process writes to."""
    with contextlib.closing(Lines(path)) as lines:
        lines.add(text)


# -- reserved disk space ---------------------------------------------------------------------------------


_reserve: Path | None = None
_reserve_used = False  # the disk was full: nothing new may begin
_freeing = threading.Lock()  # a name is gone before its blocks are free: a second thread must wait for the first one


@contextlib.contextmanager
def reserve(path: AnyPath, size: int) -> Iterator[None]:
    """Hold `size` bytes of the disk, as the file `path`, during the block. When the disk is full, `write_bytes` and
    `Lines.add(reserved=True)` free them and write again. Raises DiskError if the disk has less space than that."""
    global _reserve, _reserve_used
    path = Path(path)
    try:
        with writing(path):
            path.unlink(missing_ok=True)  # left by a killed run
            with open(path, "xb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        _reserve, _reserve_used = path, False
        yield
    finally:
        _reserve = None
        with contextlib.suppress(OSError):
            path.unlink()


def disk_full() -> DiskError | None:
    """The error to stop with once the reserve was used on a full disk, else None."""
    return disk_error(OSError(errno.ENOSPC, ""), _reserve.parent) if _reserve and _reserve_used else None


def _with_reserve(write: Callable[[], None], path: AnyPath, allowed: bool = True) -> None:
    global _reserve_used
    try:
        write()
    except OSError as error:
        held = _reserve if allowed and error.errno in FULL else None
        if held is None or os.stat(os.path.dirname(path) or ".").st_dev != held.parent.stat().st_dev:
            raise
        _reserve_used = True
        with _freeing:
            held.unlink(missing_ok=True)
        write()
