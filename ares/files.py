"""Files: one way to read, to write, to append and to lock. Every fault is one line that names the file and the fix.

Reading opens regular files only (a FIFO or a device would hang), with a cap on the size. What a user names may be a
link; in a questions folder, which others write to, no link is followed. Writing makes a temporary file and replaces
the target in one step, so that a link there is replaced and never written through, and a kill leaves no half file.
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
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ares.cli import FULL, DiskError, UserError, disk_error, in_one_line, shortened, warn0

NAME_MAX = 255  # bytes in one file name, on every common file system
MAX_BYTES = 1 << 32  # of a file that a user names
SHARED_BYTES = 1 << 26  # of a file in a questions folder

# -- reading ---------------------------------------------------------------------------------------------


def open_regular(path: str | os.PathLike, *, follow_links: bool = True, flags: int = os.O_RDONLY) -> int:
    """A file descriptor of a regular file. Raises UserError for anything else there, OSErrors as they come."""
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        file = os.open(path, flags, 0o666)
    except ValueError:  # a zero byte, half of a character
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
    if stat.S_ISDIR(mode):
        return "is a folder, not a file"
    return "is a FIFO, not a file" if stat.S_ISFIFO(mode) else "is a device or socket, not a file"


def read_shared(path: str | os.PathLike, max_bytes: int = SHARED_BYTES) -> bytes:
    """A file of a questions folder, links not followed.

    Raises FileNotFoundError and other OSErrors as they come, UserError for a link, a FIFO, a folder or too many bytes.
    """
    return _content(open_regular(path, follow_links=False), path, max_bytes)


def read_bytes(path: str | os.PathLike, flag: str, *, head: int | None = None) -> bytes:
    """A file that the user named or that we wrote, links followed; of `head` bytes only the beginning.

    Raises UserError naming `flag` and the file.
    """
    try:
        return _content(open_regular(path), path, MAX_BYTES, head)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{flag}: {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{flag}: cannot read {shortened(path)} ({error.strerror or error})") from error


def _content(file: int, path: str | os.PathLike, max_bytes: int, head: int | None = None) -> bytes:
    with open(file, "rb", buffering=0) as opened:
        if head is not None:
            return opened.read(head)
        if os.fstat(file).st_size > max_bytes:
            raise UserError(f"{path} is larger than {max_bytes / 1e6:,.0f} MB; it is not the file that is meant here")
        return opened.readall()


def refuse_unfit(path: str | os.PathLike, flag: str) -> None:
    """Raise UserError unless `path` is a regular file that can be read: for files that a library opens by name."""
    read_bytes(path, flag, head=0)


def read_text(path: str | os.PathLike, flag: str) -> str:
    """A UTF-8 file as text, without a byte order mark. Raises UserError naming `flag`, the file and the line."""
    return decode(read_bytes(path, flag), f"{flag}: {path}")


def decode(data: bytes, where: str) -> str:
    """Bytes as UTF-8 text. Raises UserError that begins with `where`."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{where} is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where} is not UTF-8 (line {line}: {error.reason}); save it as UTF-8") from None


def read_json(path: str | os.PathLike, flag: str, kind: type | None = None, *, nan: bool = False) -> Any:
    """The value of a JSON file; `kind`: dict or list, where only that will do; `nan`: NaN counts as null.

    Raises UserError naming `flag`, the file, and the line where that is known.
    """
    text = read_text(path, flag)
    try:
        value = parse_json(text, nan=nan)
    except ValueError as error:
        raise UserError(f"{flag}: {path} {str(error)[:300]}") from None
    if kind is not None and not isinstance(value, kind):
        expected = {dict: "an object {...}", list: "a list [...]"}[kind]
        raise UserError(f"{flag}: {path} must hold {expected}, not {_json_kind(value)}")
    return value


def parse_json(text: str, *, nan: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError, in words that follow a file's name, for text that is no JSON, for
    numbers beyond 64 bits, for half of a character, and, unless `nan` reads them as None, for NaN and Infinity."""

    def constant(name: str) -> None:
        if not nan:
            raise _Unfit(f"holds {name}, which is no JSON number; make the file again")

    try:
        value = json.loads(text, parse_constant=constant, parse_float=_float if not nan else _float_or_none,
                           parse_int=_integer)  # fmt: skip
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise ValueError("is nested too deeply to be read; it is not the file that is meant here") from None
    if re.search(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]", text) and (half := _half_character(value)):
        raise _Unfit(half)
    return value


class _Unfit(ValueError):
    pass


def _integer(digits: str) -> int:
    if len(digits) > 19:
        raise _Unfit(f"holds the number {digits[:12]}... of {len(digits)} digits; no field is that large")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Unfit(f"holds the number {digits[:20]}, which no computer number reaches")
    return value


def _float_or_none(digits: str) -> float | None:
    value = float(digits)
    return None if math.isinf(value) else value


def _half_character(value: Any) -> str | None:
    """What is wrong, in words, if a text within `value` holds one half of a surrogate pair."""
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


def _json_kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_jsonl(
    path: str | os.PathLike, flag: str, damaged: Callable[[int], Any] | None = None, *, nan: bool = True
) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank. Lines that are no JSON go to `damaged`, by number.

    Without `damaged` they raise UserError naming the file and the line. NaN counts as null.
    """
    data = read_bytes(path, flag).removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line.decode("utf-8"), nan=nan)
        except ValueError as error:  # UnicodeDecodeError is one
            if damaged is None:
                raise UserError(f"{flag}: {path}: line {number} {_one_line(error)}") from None
            damaged(number)
            continue
        yield number, value


def _one_line(error: Exception) -> str:
    return "is not UTF-8" if isinstance(error, UnicodeDecodeError) else in_one_line(error, 160)


def read_yaml(path: str | os.PathLike, flag: str) -> dict[str, Any]:
    """The mapping of a YAML file, {} where it is empty. Raises UserError naming `flag` and the file."""
    import yaml

    text = read_text(path, flag)
    try:
        value = yaml.safe_load(text)
    except Exception as error:  # besides YAMLError whatever dates, numbers, keys and nesting make it raise
        raise UserError(f"{flag}: {path} is not YAML ({in_one_line(error, 120)})") from None
    if not isinstance(value, (dict, type(None))) or not all(isinstance(key, str) for key in value or ()):
        raise UserError(f"{flag}: {path} must hold one `name: value` a line")
    return value or {}


def refuse_links(path: str | os.PathLike, root: str | os.PathLike) -> None:
    """Raise UserError if a folder on the way from `root` to `path`, or `path` itself, is a link that leads out."""
    step, root = Path(root), Path(root)
    for part in Path(path).relative_to(root).parts:
        step /= part
        if step.is_symlink() and not os.path.realpath(step).startswith(os.path.join(os.path.realpath(root), "")):
            raise UserError(f"{step} is a link that leads out of {root}; put the folder or file itself there")


# -- writing ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn what goes wrong with the disk within the block into a DiskError that names `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = disk_error(error, path)
        if told is None:
            raise
        raise told from error


def write_bytes(path: str | os.PathLike, data: bytes, *, flush: bool = True) -> None:
    """Write a file in one step. `flush`: to disk, too, which costs 5 ms; without it a second run writes it again.

    A full disk is given the room that `reserve` kept. Raises DiskError.
    """
    with writing(path):
        _with_reserve(lambda: _write_whole(os.fspath(path), data, flush), path)


def _write_whole(path: str, data: bytes, flush: bool) -> None:
    # few system calls: 50,000 questions have four files each
    temporary = f"{os.path.dirname(path) or '.'}/{_temporary_name()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        file = os.open(temporary, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = os.open(temporary, flags, 0o666)
    try:
        try:
            write_all(file, data)
            if flush:
                os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_all(file: int, data: bytes) -> None:
    """`os.write` until all is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def write_text(path: str | os.PathLike, text: str, *, flush: bool = True) -> None:
    """Write a text file in one step (UTF-8, newlines as given; half of a character becomes `?`)."""
    write_bytes(path, text.encode("utf-8", errors="replace"), flush=flush)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 4) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_args(folder: str | os.PathLike, args: argparse.Namespace) -> None:
    """Write the resolved flags to `folder`/args.yaml, so that a run can be read back and repeated."""
    import yaml

    plain = {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())}
    write_text(Path(folder) / "args.yaml", yaml.safe_dump(plain, sort_keys=False))


def touch(path: str | os.PathLike) -> None:
    """Make an empty file with the present time, also in place of a link."""
    write_bytes(path, b"", flush=False)


def _temporary_name() -> str:
    # short, whatever the target's name: a 255-byte name has no room for a suffix
    return f".tmp-{os.getpid()}-{threading.get_ident() % 10**6}-{time.monotonic_ns()}"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and replaces `path` in one step.

    Raises DiskError for what the disk refuses, whatever library writes there.
    """
    path = Path(path)
    temporary = path.parent / _temporary_name()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new folder beside `path`; on success it takes the place of `path`. A kill leaves no half folder.

    Raises DiskError for what the disk refuses, whatever library writes there.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
        try:
            temporary.chmod(0o755)  # mkdtemp's 0700 would hide a model from the group that shares the box
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)  # so would safetensors' 0600
                    _flush(file)
            old = path.parent / f".old-{os.getpid()}-{time.monotonic_ns()}" if os.path.lexists(path) else None
            if old is not None:
                os.replace(path, old)
            os.replace(temporary, path)
            if old is not None:
                old.unlink() if old.is_symlink() else shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def place_file(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Make `target` the same file as `source`, in one step: a hard link where the disk allows, a copy elsewhere.

    Leaves a hard link or an untouched copy as it is (content is not compared: a second run shall be cheap). Raises
    UserError if `source` is no regular file, DiskError.
    """
    source, target = os.path.realpath(source), Path(target)
    if not os.path.isfile(source):
        raise UserError(f"{source} is no regular file; replace or remove it")
    temporary = target.with_name(_temporary_name())
    with writing(target):
        if _same_file(source, target):
            return
        try:
            try:
                os.link(source, temporary)
            except OSError:  # another disk, or a file of another user
                shutil.copy2(source, temporary)
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _same_file(source: str, target: Path) -> bool:
    try:
        theirs, ours = os.stat(source), os.lstat(target)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(ours.st_mode):
        return False  # a link is replaced by the file
    return os.path.samestat(theirs, ours) or (theirs.st_size, theirs.st_mtime_ns) == (ours.st_size, ours.st_mtime_ns)


def writable_dir(path: str | os.PathLike, flag: str) -> Path:
    """Make `path` and prove that a file can be written there. Raises UserError naming `flag`."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable-"):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{flag}: cannot write to {shortened(path)} ({reason}); name a folder you may write to"
        ) from error
    return path


def short_name(name: str) -> str:
    """`name`, or, if it is longer than a file name may be, its beginning and a hash of the whole."""
    raw = name.encode()
    if len(raw) <= NAME_MAX:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:12]
    return raw[: NAME_MAX - 13].decode(errors="ignore") + "-" + digest


# -- appending -------------------------------------------------------------------------------------------


class Lines:
    """A file that lines are appended to, each in one write. A line that a kill cut short is ended first.

    Raises UserError for a link or anything but a regular file at `path`, DiskError.
    """

    def __init__(self, path: str | os.PathLike, mode: int = 0o644):
        self.path = path
        with writing(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self._file = open_regular(path, follow_links=False, flags=os.O_RDWR | os.O_APPEND | os.O_CREAT)
            size = os.fstat(self._file).st_size
            if not size and mode != 0o644:
                os.fchmod(self._file, mode)
            self._torn = bool(size) and os.pread(self._file, 1, size - 1) != b"\n"
            if self._torn:
                self._write(b"")

    def add(self, text: str, *, reserved: bool = False) -> int:
        """Append `text` and a line break; returns the position of its end. `reserved`: may use `reserve`'s room."""
        data = (text + "\n").encode("utf-8", errors="replace")
        with writing(self.path):
            if reserved:
                _with_reserve(lambda: self._write(data), self.path)
            else:
                self._write(data)
            return os.lseek(self._file, 0, os.SEEK_CUR)

    def _write(self, data: bytes) -> None:
        data = b"\n" + data if self._torn else data
        written = os.write(self._file, data)
        if written < len(data):  # the disk is full: the next write raises, and what comes after it begins a line
            self._torn = True
            write_all(self._file, data[written:])
        self._torn = False

    def close(self) -> None:
        os.close(self._file)


def append_line(path: str | os.PathLike, text: str) -> None:
    """Append one line to a file of this process alone."""
    lines = Lines(path)
    try:
        lines.add(text)
    finally:
        lines.close()


# -- room on a full disk ---------------------------------------------------------------------------------


class Reserve:
    """Room that is freed when the disk is full. `used`: it was needed, so nothing new may be begun."""

    def __init__(self, path: Path, size: int):
        self.path, self.used = path, False
        path.unlink(missing_ok=True)  # of a killed run
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, size)
            self.device = os.fstat(file).st_dev
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(file)

    def free(self) -> None:
        self.used = True
        self.path.unlink(missing_ok=True)


_reserve: Reserve | None = None


@contextlib.contextmanager
def reserve(path: str | os.PathLike, size: int) -> Iterator[Reserve]:
    """Hold `size` bytes of the disk for the block: `write_bytes` frees them at the first full disk, and goes on.

    Raises DiskError if the disk has not that much.
    """
    global _reserve
    with writing(path):
        _reserve = Reserve(Path(path), size)
    try:
        yield _reserve
    finally:
        _reserve.path.unlink(missing_ok=True)
        _reserve = None


def out_of_room() -> DiskError | None:
    """What to end with once a full disk has taken the reserve: nothing new may be begun."""
    if _reserve is None or not _reserve.used:
        return None
    return disk_error(OSError(errno.ENOSPC, ""), _reserve.path.parent)


def _with_reserve(write: Callable[[], None], path: str | os.PathLike) -> None:
    try:
        write()
    except OSError as error:
        kept = _reserve
        if kept is None or error.errno not in FULL or os.stat(os.path.dirname(path) or ".").st_dev != kept.device:
            raise
        kept.free()
        write()


# -- locks -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_one(path: str | os.PathLike, what: str, *, required: bool = True) -> Iterator[None]:
    """Hold the lock file `path` for the block: the kernel's lock, which ends with the process, however that ends.

    The file's content only says who holds it; a file left by a killed process locks nobody out. `what` begins the
    message, for example "--run_dir RL_models/x". Raises UserError naming who has the lock, or, unless `required` is
    False (then a warning), a disk without locks.
    """
    # the filelock package empties the file at each attempt, and where a disk has no locks it makes a marker file that
    # outlives a killed process
    import fcntl

    while True:
        with writing(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            file = open_regular(path, follow_links=False, flags=os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fault = f"{what}: {_holder(file)} is running there; wait for it, or end it"
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                fault = f"{what}: the disk of {path} has no file locks ({error.strerror}): another process could start"
                if not required:
                    warn0(f"{fault}; do not start one")
                    break
                fault += " (two clients would pay twice); copy the folder to a local disk"
            os.close(file)
            raise UserError(fault) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        os.close(file)  # the process that ended meanwhile has removed the file: lock the new one
    try:
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(about).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while it is locked
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # also where a worker process has inherited it
        os.close(file)


def _holder(file: int) -> str:
    try:
        about = json.loads(os.pread(file, 1000, 0))
        return f"process {about['pid']} on {about['host']} (since {about['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextlib.contextmanager
def one_at_a_time(path: str | os.PathLike) -> Iterator[None]:
    """Run the block in one process of this machine after the other, by the lock file `path`, removed at the end.

    On a disk without locks all run at once: only for work that may be done twice. Raises OSError if `path` cannot be
    written.
    """
    import fcntl

    file = open_regular(path, follow_links=False, flags=os.O_RDWR | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
        # whoever waits holds the same file, and finds the work done; whoever comes later needs no lock
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    finally:
        os.close(file)
