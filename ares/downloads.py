"""Downloads the published files that docs/data.md lists: resumed, checked, unpacked.

    fetch(ROWS["scienceqa"], Path("data"), Path("models"))

A file is fetched into {name}.{key}.part beside its target and renamed once its size and SHA-256 are right; the next
run asks the server for the rest only. `key` is made of the published SHA-256, or of the server's ETag: parts of two
versions never become one file. An archive is unpacked into its target folder and then deleted. What is there already
is not asked for. The standard library does the transfers: huggingface_hub would begin a killed one anew.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ares.archives import ARCHIVES, BadArchive, unpack
from ares.cli import UserError, free_bytes, in_one_line, print0, progress, warn0
from ares.files import writable_dir, writing
from ares.launch import only_one

WAITS = (1, 2, 4, 8)  # seconds before attempts that follow an attempt without a new byte
TIMEOUT = 60  # seconds without any byte
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Row:
    """One published file. `target`, below the data folder (with `model`, below the models folder): a file, or the
    folder that an archive becomes. `holds`: a pattern that matches in that folder of the archive which is wanted."""

    what: str
    url: str
    target: str
    licence: str
    bytes: int | None = None
    sha256: str = ""
    holds: str = ""
    model: str = ""  # fetched only if --model names it


SCIENCEQA_DATA = "https://raw.githubusercontent.com/lupantech/ScienceQA/main/data/scienceqa"
SCIENCEQA_IMAGES = "https://scienceqa.s3.us-west-1.amazonaws.com/images"
MM_COT_DATA = "https://raw.githubusercontent.com/amazon-science/mm-cot/main/data"
MM_COT = "https://huggingface.co/cooelf/mm-cot/resolve/341edc61ac37975d8a9ff8c098c87673ae0f757f"
NON_COMMERCIAL, FLICKR = "CC BY-NC-SA 4.0", "Flickr's terms"
ROWS: dict[str, tuple[Row, ...]] = {
    "scienceqa": (
        *(
            Row(what, f"{SCIENCEQA_DATA}/{name}", f"downloads/scienceqa/{name}", NON_COMMERCIAL)
            for what, name in (("questions", "problems.json"), ("splits", "pid_splits.json"))
        ),
        *(
            Row(f"images of {name}", f"{SCIENCEQA_IMAGES}/{name}.zip", f"downloads/images/{name}", NON_COMMERCIAL,
                holds="*/*.png")
            for name in ("train", "val", "test")
        ),
        *(
            Row(what, f"{MM_COT_DATA}/{name}", target, "Apache 2.0")
            for what, name, target in (
                ("captions", "instruct_captions.json", "instruct_captions.json"),
                ("name map", "name_map.json", "vision_features/name_map.json"),
            )
        ),
        Row("ViT features", "https://huggingface.co/cooelf/vision_features/resolve/"
            "564801f6057b3ddec844fca001f51a26593bb89a/vit.pth", "vision_features/vit.pth", "Apache 2.0",
            6656656153, "ea17b1459e051f1b9ab28cf0b9169b0d48f0547e053126fbcee68c79310426d8"),
        Row("rationale model, base", f"{MM_COT}/mm-cot-base-rationale.zip", "mm-cot-base-rationale", "Apache 2.0",
            936639401, "db79df0503e9898883177bda008eb6c77bb999f5ecb09e6ccbc921c47126d478", "config.json", "base"),
        Row("rationale model, large", f"{MM_COT}/mm-cot-large-rationale.zip", "mm-cot-large-rationale", "Apache 2.0",
            2936617235, "7d111543468df5f8ef6414228f7ae5516f237291534d3b4bf5c61fedc0bf1cc6", "config.json", "large"),
    ),
    "aokvqa": (
        Row("questions", "https://prior-datasets.s3.us-east-2.amazonaws.com/aokvqa/aokvqa_v1p0.tar.gz",
            "downloads/aokvqa_v1p0", "MIT (its repository)", 3661719,
            "3992b488babc0c1147f0def18c7a55274aeeb37ab668cf80226b8f62ee35a8e1", "aokvqa_v1p0_train.json"),
        # plain HTTP: the certificate of this host names another one; the SHA-256 protects the content
        Row("images of train", "http://images.cocodataset.org/zips/train2017.zip", "downloads/coco/train2017", FLICKR,
            19336861798, "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929", "*.jpg"),
        Row("images of val", "http://images.cocodataset.org/zips/val2017.zip", "downloads/coco/val2017", FLICKR,
            815585330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", "*.jpg"),
    ),
}  # fmt: skip


def table(dataset: str) -> str:
    """The rows of a data set as the Markdown table of docs/data.md."""
    lines = ["| what | where | becomes | size | SHA-256 | licence |", "|---|---|---|---|---|---|"]
    for row in ROWS[dataset]:
        size = gigabytes(row.bytes) if row.bytes else "not published"
        target = f"{'models' if row.model else '{DIR}'}/{row.target}"
        digest = f"`{row.sha256[:12]}...`" if row.sha256 else "not published"
        lines.append(f"| {row.what} | {row.url} | `{target}` | {size} | {digest} | {row.licence} |")
    return "\n".join(lines)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


class Refused(UserError):
    """One file cannot be had; the others can."""


class Broken(Exception):
    """An attempt failed, and the next one may not. `answered`: the server answered."""

    def __init__(self, reason: str, answered: bool = False):
        super().__init__(reason)
        self.answered = answered


@dataclass
class Item:
    """A row, the address that it is fetched from, and where it goes. `file`: the file as it is published."""

    row: Row
    url: str
    target: Path
    size: int | None = None
    validator: str = ""  # ETag or time of change, for If-Range
    file: Path = field(init=False)

    def __post_init__(self) -> None:
        suffix = next((end for end in ARCHIVES if self.row.url.endswith(end)), "")
        self.file = self.target.with_name(self.target.name + suffix)
        self.size = self.row.bytes

    @property
    def is_archive(self) -> bool:
        return self.file != self.target

    @property
    def part(self) -> Path:
        key = self.row.sha256[:8] or f"{zlib.crc32(self.validator.encode()):08x}"
        return self.file.with_name(f"{self.file.name}.{key}.part")

    def missing(self) -> int:
        """Bytes that are still to be fetched; 0 if the size is unknown."""
        have = self.part.stat().st_size if self.part.exists() else 0
        return 0 if self.file.exists() else max(0, (self.size or 0) - have)

    def fault(self, reason: str) -> Refused:
        """The message for a file that cannot be had."""
        return Refused(f"{self.url}: {reason}; fetch it by other means, put it at {self.file}, and run the same "
                       "command again: it goes on from there")  # fmt: skip


def address(url: str, mirror: str | None) -> str:
    """The URL at the mirror, {mirror}/{host}/{path}; $HF_ENDPOINT in place of huggingface.co, if it is set. Raises
    UserError for either that is no URL."""
    endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/")
    for name, base in (("--mirror", mirror), ("HF_ENDPOINT", endpoint or None)):
        if base is not None and not re.match(r"https?://[^/\s]+(/\S*)?$", base):
            raise UserError(f"{name}: {base} is no URL; it begins with http:// or https://")
    host, path = urlsplit(url).netloc, url.split("/", 3)[3]
    if mirror is not None:
        return f"{mirror.rstrip('/')}/{host}/{path}"
    return f"{endpoint}/{path}" if endpoint and host == "huggingface.co" else url


# -- all files ---------------------------------------------------------------------------------------------


def fetch(rows: Sequence[Row], folder: Path, models_dir: Path, mirror: str | None = None) -> None:
    """Fetch the rows that are absent into `folder` and `models_dir`, and unpack archives.

    Raises UserError: in the beginning if the disk has too little space, in the end for a file that cannot be had, once
    all others are there.
    """
    items = [Item(row, address(row.url, mirror), (models_dir if row.model else folder) / row.target) for row in rows]
    writable_dir(folder, "--download")
    if any(row.model for row in rows):
        writable_dir(models_dir, "--models_dir")
    with only_one(folder / ".download.lock", f"--download {folder}", required=False):
        todo, faults = [item for item in items if not _is_there(item)], []
        unreachable: set[str] = set()  # hosts: the waits are for each one once
        asked = [item for item in todo if not item.file.exists() and item.size is None]
        bad = _each(asked, _ask, faults, unreachable)
        todo = [item for item in todo if item not in bad]
        if todo:
            _say_total(items, todo)
            _check_space(todo, folder, models_dir)
            bad += _each(todo, _fetch_and_unpack, faults, unreachable)
        if faults:
            others = [item.row.what for item in bad][1:]
            raise UserError(faults[0] + f" ({len(others)} more could not be had: {', '.join(others)})" * bool(others))


def _each(items: Iterable[Item], call: Callable[[Item], None], faults: list[str], unreachable: set[str]) -> list[Item]:
    """Call `call` for every item; returns those for which it failed, with their messages appended to `faults`."""
    bad = []
    for item in items:
        host = urlsplit(item.url).netloc
        try:
            if host in unreachable and not item.file.exists():
                raise item.fault("the server cannot be reached")
            _with_retries(lambda item=item: call(item), item)
        except Broken as error:
            if not error.answered:
                unreachable.add(host)
            faults.append(str(item.fault(str(error))))
            bad.append(item)
        except (Refused, BadArchive) as error:
            faults.append(str(error))
            bad.append(item)
    return bad


def _with_retries(call: Callable[[], None], item: Item) -> None:
    """Call until it succeeds. Raises the last Broken after len(WAITS) attempts in a row without a new byte."""
    failures, best = 0, item.missing()
    while True:
        try:
            return call()
        except Broken as error:
            left = item.missing()
            failures, best = (1, left) if left < best else (failures + 1, best)
            if failures > len(WAITS):
                raise
            warn0(f"{item.url}: {error}; attempt {failures} of {len(WAITS)} follows in {WAITS[failures - 1]} s")
            time.sleep(WAITS[failures - 1])


def _is_there(item: Item) -> bool:
    """Whether nothing is left to do for this item. Raises UserError if a file is where a folder belongs."""
    if item.is_archive and item.target.is_dir():
        item.file.unlink(missing_ok=True)  # a kill came between unpacking and deleting
        return True
    if os.path.lexists(item.target) and (item.is_archive or not item.target.is_file()):
        raise UserError(f"{item.target} is no {'folder' if item.is_archive else 'file'}; move it away")
    there = not item.is_archive and item.target.is_file()
    if there and item.size not in (None, size := item.target.stat().st_size):
        warn0(f"{item.target} has {size} bytes, the published file {item.size}: it is kept; move it away to fetch it")
    return there


def _say_total(items: Sequence[Item], todo: Sequence[Item]) -> None:
    fetched = [item for item in todo if not item.file.exists()]
    unknown = sum(item.size is None for item in fetched)
    text = f"{len(fetched)} files, {gigabytes(sum(item.missing() for item in fetched))}"
    text += f" and the {unknown} of unknown size" * bool(unknown)
    print0(f"download: {text}; {len(items) - len(todo)} of {len(items)} are there already")


def _check_space(todo: Sequence[Item], folder: Path, models_dir: Path) -> None:
    """Raise UserError if the files do not fit on a disk, and for the largest archive beside its unpacked content."""
    roots: dict[int, tuple[Path, list[Item]]] = {}
    for item in todo:
        root = models_dir if item.row.model else folder
        roots.setdefault(root.stat().st_dev, (root, []))[1].append(item)
    for root, items in roots.values():
        archives = [item.size or (item.file.stat().st_size if item.file.exists() else 0)
                    for item in items if item.is_archive]  # fmt: skip
        need, free = sum(item.missing() for item in items) + max(archives, default=0), free_bytes(root)
        if free < need:
            raise UserError(f"{root}: {gigabytes(free)} free, {gigabytes(need)} needed to download and unpack; "
                            "free some space, or name a folder on another disk")  # fmt: skip


def _fetch_and_unpack(item: Item) -> None:
    if not item.file.exists():
        _fetch(item)
    if item.is_archive:
        unpack(item.file, item.target, item.row.holds)
        item.file.unlink()


# -- one file ----------------------------------------------------------------------------------------------


def _open(item: Item, method: str = "GET", **headers: str) -> Any:
    """The server's answer to a request. Raises Refused, Broken."""
    headers = {"User-Agent": "ares-prepare-data", "Accept-Encoding": "identity"} | headers
    request = urllib.request.Request(item.url, method=method, headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (408, 429) or error.code >= 500:
            raise Broken(f"HTTP status {error.code}", answered=True) from None
        if error.code == 416:  # the part is longer than the file
            item.part.unlink(missing_ok=True)
            raise Broken("HTTP status 416", answered=True) from None
        raise item.fault(f"HTTP status {error.code} ({error.reason})") from None
    except (OSError, http.client.HTTPException) as error:
        raise Broken(in_one_line(getattr(error, "reason", error), 120)) from None


def _ask(item: Item) -> None:
    """Set the item's size and validator by a HEAD request."""
    with _open(item, "HEAD") as answer:
        item.size, item.validator = _length(answer), _validator(answer)


def _length(answer: Any) -> int | None:
    text = answer.headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _validator(answer: Any) -> str:
    etag = answer.headers.get("ETag", "")
    return etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")  # a weak ETag resumes nothing


def _fetch(item: Item) -> None:
    """Fetch what is missing of a file, check it and rename it. Raises Refused, Broken, DiskError."""
    part = item.part
    with writing(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        for other in part.parent.glob(f"{glob.escape(item.file.name)}.????????.part"):  # of other versions
            if other != part or not (item.row.sha256 or item.validator):
                other.unlink()
    have = part.stat().st_size if part.exists() else 0
    if not have or have != item.size:
        _transfer(item, have)
    size = part.stat().st_size
    if item.size is not None and size != item.size:
        part.unlink()
        raise Broken(f"{size} bytes arrived, {item.size} were announced", answered=True)
    if item.row.sha256:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != item.row.sha256:
            part.unlink()
            raise item.fault(f"its SHA-256 is {found[:12]}..., not {item.row.sha256[:12]}... as published (deleted)")
    with writing(item.file):
        os.replace(part, item.file)


def _transfer(item: Item, have: int) -> None:
    """Append what the server sends to the part, of which `have` bytes are there."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and not item.row.sha256:
        headers["If-Range"] = item.validator
    with _open(item, **headers) as answer:
        wanted = re.fullmatch(rf"bytes {have}-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if answer.status != 206 or not wanted:
            have = 0  # the whole file comes, or another version of it
            if answer.status == 206:
                item.part.unlink()
                raise Broken("another part than the one asked for was sent", answered=True)
        length = _length(answer)
        if length is not None and item.size not in (None, have + length):
            raise item.fault(f"{have + length} bytes are there, {item.size} were published")
        received = 0
        bar = progress(desc=item.file.name, total=item.size, unit="B", initial=have)
        bar.unit_scale = True
        with contextlib.closing(bar), writing(item.part), open(item.part, "ab" if have else "wb") as file:
            for chunk in _chunks(answer):
                file.write(chunk)
                file.flush()  # for a kill
                received += len(chunk)
                bar.update(len(chunk))
            os.fsync(file.fileno())
        if length is not None and received < length:
            raise Broken(f"the connection ended after {received} of {length} bytes", answered=True)


def _chunks(answer: Any) -> Iterator[bytes]:
    while True:
        try:
            chunk = answer.read1(CHUNK)  # what has arrived, so that a kill loses little
        except (OSError, http.client.HTTPException) as error:
            raise Broken(f"the connection broke ({in_one_line(error, 80)})", answered=True) from None
        if not chunk:
            return
        yield chunk
