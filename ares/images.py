"""Opens image files, for the whole project, and prepares images for a Teacher before money is spent.

    with open_image(path) as image:                 # Pillow, but only FORMATS and at most MAX_PIXELS
        picture = upright(image).convert("RGB")
    media_type, data = load_image(path, qid)        # checked; shrunk or converted if the API needs it

Without Pillow `load_image` reads the media type from the first bytes and refuses large files.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ares.cli import UserError, progress
from ares.files import open_regular

# The formats of data sets. Pillow would try all it knows, and start Ghostscript for an EPS named image.png.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 64_000_000  # 8000 x 8000, the API's own limit; Pillow holds that in 256 MB
MAX_FILE = 200_000_000  # bytes of an image file that are read
ONE_AT_A_TIME = 16_000_000  # pixels; threads decode larger images one after the other to limit memory
MAX_EDGE = 8000  # pixels, the API's limit
MAX_BYTES = 3_750_000  # 5 MB as base64, the API's limit
SHRINK_TO = 1568  # pixels; the API scales a longer edge down to about this
MAX_TOKENS = 4784  # no image costs more, whatever the model's resolution
TOKENS_PER_PIXEL = 1 / 750

# formats of the API by their first bytes, not by the file name: a JPEG is often called .png
_HEADS = {"png": rb"\x89PNG\r\n\x1a\n", "jpeg": rb"\xff\xd8\xff", "gif": rb"GIF8[79]a", "webp": rb"(?s:RIFF....WEBP)"}

_checked: dict[tuple, str] = {}  # identity of a sound file -> media type: an image is sent once per action


def media_type(head: bytes) -> str | None:
    """The true media type from a file's first bytes (12 suffice); None if the API takes no such image."""
    return next((f"image/{name}" for name, signature in _HEADS.items() if re.match(signature, head)), None)


@contextlib.contextmanager
def open_image(source: str | os.PathLike | bytes) -> Iterator[Any]:
    """Open a file, or the bytes of one, as a Pillow image whose pixels are not decoded yet.

    Raises OSError or ValueError, also from within the block, for what is no regular file, none of FORMATS, damaged, or
    larger than MAX_PIXELS or MAX_FILE. Threads open large images one at a time.
    """
    from PIL import Image

    # MAX_PIXELS is below the size from which Pillow warns
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    with contextlib.ExitStack() as stack:
        try:
            if isinstance(source, bytes):
                size, file = len(source), io.BytesIO(source)
            else:
                about = os.stat(source)
                if not stat.S_ISREG(about.st_mode):  # reading a pipe or a device would never end
                    raise OSError(f"{source} is no regular file")
                size, file = about.st_size, stack.enter_context(open(source, "rb"))
            if size > MAX_FILE:
                raise ValueError(f"{size / 1e6:.0f} MB, at most {MAX_FILE / 1e6:.0f} MB are read")
            image = stack.enter_context(Image.open(file, formats=FORMATS))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS / 1e6:.0f} million are decoded")
            if width * height > ONE_AT_A_TIME:
                stack.enter_context(_large)
            yield image
        except (OSError, ValueError, UserError):
            raise
        except Exception as error:  # Pillow's readers raise many types for damaged files
            raise ValueError(str(error) or type(error).__name__) from error


_large = threading.RLock()


def orientation(image: Any) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF data is damaged."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # Pillow rotates a TIFF itself; in other PNGs it would decode all pixels to look for EXIF data
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data: the pixels may be sound
        return 1
    return found if found in range(1, 9) else 1


def upright(image: Any) -> Any:
    """The image rotated by its EXIF orientation, as viewers show it."""
    from PIL.Image import Transpose

    turns = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
    image.load()
    turn = orientation(image)
    return image if turn == 1 else image.transpose(Transpose[turns[turn - 2]])


def load_image(path: str | os.PathLike, qid: str) -> tuple[str, bytes]:
    """(media type, bytes) to send: upright, one frame, in RGB or grey. Raises UserError naming file and question if it
    is no usable image."""
    where = f"--images: {path} of question {qid}"
    try:
        with open(open_regular(path), "rb") as file:
            about = os.fstat(file.fileno())
            data = file.read(MAX_FILE) if about.st_size <= MAX_FILE else b""
    except OSError as error:
        raise UserError(f"--images: cannot read {path} of question {qid} ({error.strerror})") from None
    except UserError:
        raise UserError(f"{where} is no regular file; replace or remove it") from None
    if about.st_size > MAX_FILE:
        raise UserError(f"{where} is larger than {MAX_FILE / 1e6:.0f} MB; replace or remove it")
    identity = file_identity(about)
    if identity in _checked:
        return _checked[identity], data
    kind = media_type(data[:12])
    try:
        import PIL  # noqa: F401
    except ImportError:
        if kind is None or len(data) > MAX_BYTES:
            fix = "convert it, or install pillow, with which this is done automatically"
            limit = f"{MAX_BYTES / 1e6:.2f} MB"
            raise UserError(f"{where} is no PNG, JPEG, GIF or WebP of at most {limit}; {fix}") from None
        return kind, data
    try:
        with open_image(data) as image:
            image.load()  # all pixels: of a download that broke off only the header can be decoded
            # APIs differ in how they read an animation or CMYK, if at all
            plain = orientation(image) == 1 and image.mode != "CMYK"
            plain = plain and (image.format == "MPO" or not getattr(image, "is_animated", False))
            if kind is None or not plain or max(image.size) > MAX_EDGE or len(data) > MAX_BYTES:
                return _fitting(upright(image))
    except (OSError, ValueError) as error:
        reason = "is no PNG, JPEG, GIF or WebP" if kind is None else f"does not decode ({error})"
        raise UserError(f"{where} {reason}; replace or remove it") from None
    if len(_checked) > 50_000:
        _checked.clear()
    _checked[identity] = kind
    return kind, data


def pixels(path: str | os.PathLike) -> tuple[int, int] | None:
    """(width, height) from the file's header, as seen upright; None without Pillow or if it is no image."""
    try:
        with open_image(path) as image:
            return image.size if orientation(image) < 5 else image.size[::-1]
    except (OSError, ValueError, ImportError):  # for estimates only: before sending, `load_image` raises
        return None


def estimated_tokens(path: str | os.PathLike) -> int:
    """Tokens of an image by the API's rule: width x height / 750, after scaling its longer edge down to 1568."""
    width, height = pixels(path) or (1092, 1092)  # unknown: 1,590 tokens, the usual maximum
    scale = min(1.0, SHRINK_TO / max(width, height))
    return min(1600, int(width * scale * height * scale * TOKENS_PER_PIXEL) + 1)


def eight_bit(image):
    """Scale 16-bit grey to 8 bits (Pillow's conversion would clip it at 255); other images are unchanged."""
    return image.convert("I").point(lambda value: value / 256).convert("L") if image.mode.startswith("I") else image


def as_rgb(image):
    """Convert to RGB, or to RGBA if a pixel may be transparent."""
    transparent = "A" in image.getbands() or "transparency" in image.info
    return eight_bit(image).convert("RGBA" if transparent else "RGB")


def _fitting(image) -> tuple[str, bytes]:
    """(media type, bytes) of the image shrunk to the API's own size; JPEG if the PNG is still too large."""
    image = as_rgb(image)
    image.thumbnail((SHRINK_TO, SHRINK_TO))
    image.info.clear()  # the original's EXIF data, colour profile and comments do not fit the new pixels
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, format="PNG")
    if png.tell() <= MAX_BYTES:
        return "image/png", png.getvalue()
    image.convert("RGB").save(jpeg, format="JPEG", quality=85)
    return "image/jpeg", jpeg.getvalue()


def file_identity(about: os.stat_result) -> tuple[int, int, int, int]:
    """What tells one state of a file from another without reading it; hard links share it."""
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def broken_images(images: Mapping[str, Sequence[Path]]) -> list[str]:
    """The errors of `load_image` for the questions' images (qid -> files)."""

    def fault(item: tuple[str, Path]) -> str | None:
        try:
            load_image(item[1], item[0])
        except UserError as error:
            return str(error)
        return None

    items = [(qid, path) for qid, paths in images.items() for path in paths]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # decoding releases the GIL
        faults = progress(pool.map(fault, items), desc="decode images", total=len(items), unit="img")
        return [fault for fault in faults if fault]
