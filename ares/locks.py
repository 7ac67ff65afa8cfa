"""One process at a time: the kernel's file lock, which ends with the process that holds it, however that ends.

`only_client` is for a folder that belongs to one client: the file's content only says who holds it; a file left by a
killed client locks nobody out. `one_at_a_time` is for work that the first process does for all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ares.cli import UserError


@contextlib.contextmanager
def only_client(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Hold the lock file `path` for the block. Raises UserError naming who has it, or a disk that cannot lock."""
    import fcntl

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"{what}: {_holder(file)} is at work there; wait for it, or end it") from None
            raise UserError(
                f"{what}: the disk of {path} has no file locks ({error.strerror}), so two clients could pay twice; "
                "copy the folder to a local disk, as the manual way does"
            ) from None
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(about).encode(), 0)
        yield
        os.ftruncate(file, 0)  # the file stays: removing it would let two clients lock two files of one name
    finally:
        os.close(file)


@contextlib.contextmanager
def one_at_a_time(path: str | os.PathLike) -> Iterator[None]:
    """Run the block in one process of this machine after the other, by the lock file `path`, removed at the end.

    On a disk without locks all run at once: only for work that may be done twice. Raises OSError if `path` cannot be
    written.
    """
    import fcntl

    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
        # whoever waits holds the same file, and finds the work done; whoever comes later needs no lock
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _holder(file: int) -> str:
    try:
        about = json.loads(os.pread(file, 1000, 0))
        return f"another client (process {about['pid']} on {about['host']}, since {about['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another client"
