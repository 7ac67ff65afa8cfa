"""Images on their way to a Teacher: read whole, true media type, within the API's limits - before money is spent.

With Pillow a file is decoded, what is too large is shrunk, and what the API does not take (BMP, TIFF) becomes PNG;
without it the first bytes tell the type and the size in bytes must do. Leaves out where images lie (ares/problems.py).
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ares.cli import UserError, progress

MAX_EDGE = 8000  # pixels, of the API
MAX_BYTES = 3_750_000  # an image may have 5 MB as base64
SHRINK_TO = 1568  # the API scales a longer edge down to about this itself
MAX_TOKENS = 4784  # no image costs more, whatever the model's resolution
TOKENS_PER_PIXEL = 1 / 750

# what the API takes, by the first bytes: a JPEG is often called .png
_SIGNATURES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"GIF8[79]a"), "image/gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "image/webp"),
)

_checked: dict[tuple, str] = {}  # files known to be good: the same image goes out with every action


def media_type(head: bytes) -> str | None:
    """The true media type from a file's first bytes (12 suffice); None if the API takes no such image."""
    return next((name for signature, name in _SIGNATURES if signature.match(head)), None)


def load_image(path: str | os.PathLike, qid: str) -> tuple[str, bytes]:
    """(media type, bytes) as they may be sent. Raises UserError naming file and question if it is no usable image."""
    try:
        with open(path, "rb") as file:
            data = file.read()
            about = os.fstat(file.fileno())
    except OSError as error:
        raise UserError(f"--images: cannot read {path} of question {qid} ({error.strerror})") from None
    identity = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    if identity in _checked:
        return _checked[identity], data
    kind = media_type(data[:12])
    try:
        from PIL import Image
    except ImportError:
        if kind is None or len(data) > MAX_BYTES:
            raise UserError(
                f"--images: {path} of question {qid} is no PNG, JPEG, GIF or WebP of at most {MAX_BYTES / 1e6:.2f} "
                "MB; convert it, or install pillow, which does so on the way"
            ) from None
        return kind, data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()  # the whole of it: a download that broke off decodes to its header only
                if kind is not None and max(image.size) <= MAX_EDGE and len(data) <= MAX_BYTES:
                    if len(_checked) > 50_000:
                        _checked.clear()
                    _checked[identity] = kind
                    return kind, data
                return _fitting(image)
    except Exception as error:  # Pillow's readers raise whatever they meet in a damaged file
        reason = "is no PNG, JPEG, GIF or WebP" if kind is None else f"does not decode ({error})"
        raise UserError(f"--images: {path} of question {qid} {reason}; replace or remove it") from None


def pixels(path: str | os.PathLike) -> tuple[int, int] | None:
    """(width, height) from the file's header; None without Pillow or if it is no image."""
    try:
        from PIL import Image

        with Image.open(path) as image:
            return image.size
    except Exception:  # an estimate goes on without it: `load_image` complains when it matters
        return None


def estimated_tokens(path: str | os.PathLike) -> int:
    """What an image costs by the API's rule: width x height / 750 after its edge was scaled down to 1568."""
    width, height = pixels(path) or (1092, 1092)  # unknown: 1,590 tokens, the usual top
    scale = min(1.0, SHRINK_TO / max(width, height))
    return min(1600, int(width * scale * height * scale * TOKENS_PER_PIXEL) + 1)


def eight_bit(image):
    """16-bit grey scaled to 8 bits; any other picture as it is. Pillow's conversion would cut it off at 255: white."""
    return image.convert("I").point(lambda value: value / 256).convert("L") if image.mode.startswith("I") else image


def as_rgb(image):
    """RGB, or RGBA where something is transparent."""
    transparent = "A" in image.getbands() or "transparency" in image.info
    return eight_bit(image).convert("RGBA" if transparent else "RGB")


def _fitting(image) -> tuple[str, bytes]:
    """Shrunk to what the API shows a model anyway; as JPEG if PNG is still too large."""
    image = as_rgb(image)
    image.thumbnail((SHRINK_TO, SHRINK_TO))
    out = io.BytesIO()
    image.save(out, format="PNG")
    if out.tell() <= MAX_BYTES:
        return "image/png", out.getvalue()
    out = io.BytesIO()
    image.convert("RGB").save(out, format="JPEG", quality=85)
    return "image/jpeg", out.getvalue()


def file_identity(path: str | os.PathLike) -> tuple[int, int, int, int]:
    """What tells one state of a file from another without reading it; hard links share it."""
    about = os.stat(Path(path))
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def broken_images(images: Mapping[str, Sequence[Path]]) -> list[str]:
    """What is wrong with those of the questions' images (qid -> files) that cannot be sent, by `load_image`."""

    def fault(item: tuple[str, Path]) -> str | None:
        try:
            load_image(item[1], item[0])
        except UserError as error:
            return str(error)
        return None

    items = [(qid, path) for qid, paths in images.items() for path in paths]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # decoding leaves Python's lock
        faults = progress(pool.map(fault, items), desc="decode images", total=len(items), unit="img")
        return [fault for fault in faults if fault]
