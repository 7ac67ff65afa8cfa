"""A small file system of its own, to be filled or made read-only."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
def disk_calls():
    """In the block: what is asked of the disk, in order. "flush" a file, "flush all", or the name a file gets."""
    calls = []
    with pytest.MonkeyPatch.context() as patched:
        replace, fsync, sync = os.replace, os.fsync, os.sync
        patched.setattr(os, "replace", lambda source, to: replace(source, to) or calls.append(os.path.basename(to)))
        patched.setattr(os, "fsync", lambda file: fsync(file) or calls.append("flush"))
        patched.setattr(os, "sync", lambda: sync() or calls.append("flush all"))
        yield calls


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "4m"):
    """A file system of its own in memory, that can be filled."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Take all room of a disk but `leave` bytes, also while others write to it."""
    with open(disk / "filler", "wb") as file:
        size, step = 0, 1 << 20
        while step >= 512:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            try:
                os.posix_fallocate(file.fileno(), size, min(step, free - leave))
                size += min(step, free - leave)
            except (OSError, OverflowError, ValueError):  # nothing free: EINVAL
                step //= 2
    return disk / "filler"
