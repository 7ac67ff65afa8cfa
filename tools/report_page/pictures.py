"""The questions' images for the page: as thumbnails inside the file, or as copies in a folder beside it."""

from __future__ import annotations

import base64
import filecmp
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ares import cli, files
from ares.data_folder import question_images
from ares.images import as_rgb, media_type, open_image, pixels, upright

THUMBNAIL = 480  # pixels of the longer edge
SMALL = 24_000  # bytes; a file of at most this size is embedded as it is
MODES = ("copy", "embed", "none")


def collect_images(images: Path, qids: Sequence[str], mode: str, output: Path) -> dict[str, Any]:
    """{"list": [{"src", "w", "h"}], "of": {row: [index]}} of the questions that have image files.

    `mode` copy: files go to `{output's stem}_images/{qid}/`; embed: thumbnails as data URLs, equal ones once.
    Files that cannot be read as images are skipped with a warning.
    """
    folder = output.parent / f"{output.stem}_images"
    found: dict[str, Any] = {"list": [], "of": {}}
    index: dict[str, int] = {}
    bad = []
    for row, qid in enumerate(cli.progress(qids, desc="images", unit="question")):
        for path in question_images(images, qid):
            size = pixels(path)
            source = None if size is None else _embedded(path) if mode == "embed" else _copied(path, folder / qid)
            if source is None:
                bad.append(path)
                continue
            if source not in index:
                index[source] = len(found["list"])
                found["list"].append({"src": source, "w": size[0], "h": size[1]})
            found["of"].setdefault(row, []).append(index[source])
    if bad:
        cli.warn0(f"{len(bad)} files cannot be read as images and are skipped (the first is {bad[0]})")
    return found


def _embedded(path: Path) -> str | None:
    data = path.read_bytes()
    kind = media_type(data[:12])
    if kind is None or len(data) > SMALL:
        try:
            with open_image(data) as image:
                image = as_rgb(upright(image))
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                out = io.BytesIO()
                image.save(out, format="WEBP", quality=75)
        except (OSError, ValueError):
            return None
        data, kind = out.getvalue(), "image/webp"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _copied(path: Path, folder: Path) -> str:
    target = folder / path.name
    if not (target.is_file() and filecmp.cmp(path, target, shallow=False)):
        files.write_bytes(target, path.read_bytes(), flush=False)
    return "/".join(quote(part) for part in (folder.parent.name, folder.name, path.name))
