"""Unpacks .zip and .tar.gz archives from the network: whole or not at all, and nothing outside the target folder."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from ares.cli import UserError, in_one_line, progress
from ares.files import writing

ARCHIVES = (".zip", ".tar.gz")
CHUNK = 1 << 20  # bytes
# of archives that are damaged or refused; RuntimeError: encrypted
DAMAGED = (ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile, tarfile.TarError)


class BadArchive(UserError):
    """An archive that is damaged, or that would not be safe to unpack."""


def unpack(archive: Path, target: Path, holds: str) -> None:
    """Unpack a .zip or .tar.gz into the folder `target`, which appears once it is complete: of the archive's folders
    the topmost one in which the pattern `holds` matches something. Raises BadArchive for members that would leave the
    folder, links, a damaged archive, and one without `holds`; DiskError."""
    work = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(work, ignore_errors=True)  # left by a killed run
    try:
        with writing(target):
            work.mkdir()
            try:
                _write_members(archive, work)
            except gzip.BadGzipFile as error:  # an OSError, but none of the disk
                raise ValueError(f"is damaged ({error})") from None
            found = _folder_that_holds(holds, work)
            os.sync()  # once: a flush of each of 100,000 files takes ten minutes
            os.replace(found, target)
    except DAMAGED as error:
        why = in_one_line(error, 200)
        raise BadArchive(f"{archive} {why}; delete it, and the same command fetches it again") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _folder_that_holds(pattern: str, folder: Path) -> Path:
    folders = [folder]
    while folders:
        found = next((each for each in folders if next(each.glob(pattern), None)), None)
        if found:
            return found
        folders = sorted(each for folder in folders for each in folder.iterdir() if each.is_dir())
    raise ValueError(f"holds no {pattern}: it is another archive than the one meant")


Member = tuple[str, int, Callable[[], IO[bytes]]]  # name, bytes, opens its content


@contextlib.contextmanager
def _members(archive: Path) -> Iterator[tuple[int | None, Iterator[Member]]]:
    """(number of files, files) of an archive. Raises ValueError for one that is no plain file."""
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as zipped:
            files = [info for info in zipped.infolist() if not info.is_dir()]
            for info in files:
                _check_name(info.filename)
                if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                    raise ValueError(f"holds {info.filename[:100]!r}, which is no plain file")
            yield len(files), ((info.filename, info.file_size, lambda info=info: zipped.open(info)) for info in files)
    else:
        with tarfile.open(archive) as tar:
            yield None, (_tar_member(tar, info) for info in tar if not info.isdir())


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    _check_name(info.name)
    if not info.isfile():
        raise ValueError(f"holds {info.name[:100]!r}, which is no plain file")
    return info.name, info.size, lambda: tar.extractfile(info)


def _check_name(name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or re.match("[A-Za-z]:", name):
        raise ValueError(f"holds {name[:100]!r}, which would leave the folder it is unpacked to")


def _write_members(archive: Path, folder: Path) -> None:
    with _members(archive) as (count, members):
        for name, size, opened in progress(members, desc=f"unpack {archive.name}", total=count, unit="file"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened() as source, open(path, "wb") as file:
                shutil.copyfileobj(source, file, CHUNK)
            if path.stat().st_size != size:
                raise ValueError(f"is damaged: {name[:100]!r} has {path.stat().st_size} of {size} bytes")
