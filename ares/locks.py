"""One client per folder: the kernel's file lock, which ends with the process that holds it, however that ends.

The file's content only says who holds it; a file left by a killed client locks nobody out.
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


def _holder(file: int) -> str:
    try:
        about = json.loads(os.pread(file, 1000, 0))
        return f"another client (process {about['pid']} on {about['host']}, since {about['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another client"
