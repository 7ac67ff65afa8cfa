"""The one place where image files are opened, and how an image is prepared for a Teacher before money is spent.

    with open_image(path) as image:                 # Pillow, but only FORMATS and at most MAX_PIXELS
        picture = upright(image).convert("RGB")
    media_type, data = load_image(path, qid)        # decoded once, shrunk or converted where the API needs it

`load_image` works without Pillow: it reads the media type from the first bytes and refuses large files.
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

# What data sets hold. Pillow would try every format it knows, and start Ghostscript for an EPS named image.png.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 64_000_000  # 8000 x 8000, the API's own limit; Pillow holds that in 256 MB
MAX_FILE = 200_000_000  # bytes of an image file that are read
ONE_AT_A_TIME = 16_000_000  # pixels from which threads decode one after the other, so that memory stays bounded
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


@contextlib.contextmanager
def open_image(source: str | os.PathLike | bytes) -> Iterator[Any]:
    """A Pillow image from a file or from the bytes of one: header read, pixels not yet decoded.

    Raises OSError or ValueError, here and from the body, for what is no regular file, none of FORMATS, damaged, or
    larger than MAX_PIXELS or MAX_FILE. Large images are opened one at a time.
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
        except Exception as error:  # Pillow's readers raise whatever they meet in a damaged file
            raise ValueError(str(error) or type(error).__name__) from error


_large = threading.RLock()


def orientation(image: Any) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF data is damaged."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # Pillow turns a TIFF itself; for a PNG without it would decode the pixels to look behind them
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data says nothing about the pixels
        return 1
    return found if found in range(1, 9) else 1


def upright(image: Any) -> Any:
    """The image turned as its EXIF orientation says, which is how people and browsers see it."""
    from PIL.Image import Transpose

    turns = (Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE)
    turns += (Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)
    image.load()
    turn = orientation(image)
    return image if turn == 1 else image.transpose(turns[turn - 2])


def load_image(path: str | os.PathLike, qid: str) -> tuple[str, bytes]:
    """(media type, bytes) as they may be sent, upright, one frame, in RGB or grey.

    Raises UserError naming file and question if it is no usable image.
    """
    try:
        with open(path, "rb", opener=_nonblocking) as file:
            about = os.fstat(file.fileno())
            regular = stat.S_ISREG(about.st_mode)
            data = file.read(MAX_FILE) if regular and about.st_size <= MAX_FILE else b""
    except OSError as error:
        raise UserError(f"--images: cannot read {path} of question {qid} ({error.strerror})") from None
    if not regular or about.st_size > MAX_FILE:
        reason = f"is larger than {MAX_FILE / 1e6:.0f} MB" if regular else "is no regular file"
        raise UserError(f"--images: {path} of question {qid} {reason}; replace or remove it")
    identity = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    if identity in _checked:
        return _checked[identity], data
    kind = media_type(data[:12])
    try:
        import PIL  # noqa: F401
    except ImportError:
        if kind is None or len(data) > MAX_BYTES:
            raise UserError(
                f"--images: {path} of question {qid} is no PNG, JPEG, GIF or WebP of at most {MAX_BYTES / 1e6:.2f} "
                "MB; convert it, or install pillow, which does so on the way"
            ) from None
        return kind, data
    try:
        with open_image(data) as image:
            image.load()  # the whole of it: a download that broke off decodes to its header only
            # an animation and a CMYK print file would be read differently, or not at all, from one API to the next
            plain = orientation(image) == 1 and image.mode != "CMYK"
            plain = plain and (image.format == "MPO" or not getattr(image, "is_animated", False))
            if kind is None or not plain or max(image.size) > MAX_EDGE or len(data) > MAX_BYTES:
                return _fitting(upright(image))
    except (OSError, ValueError) as error:
        reason = "is no PNG, JPEG, GIF or WebP" if kind is None else f"does not decode ({error})"
        raise UserError(f"--images: {path} of question {qid} {reason}; replace or remove it") from None
    if len(_checked) > 50_000:
        _checked.clear()
    _checked[identity] = kind
    return kind, data


def _nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would hold `open` for ever


def pixels(path: str | os.PathLike) -> tuple[int, int] | None:
    """(width, height) from the file's header, as seen upright; None without Pillow or if it is no image."""
    try:
        with open_image(path) as image:
            return image.size if orientation(image) < 5 else image.size[::-1]
    except (OSError, ValueError, ImportError):  # an estimate goes on without it: `load_image` raises when it matters
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
    image.info.clear()  # no EXIF, colour profile or comment of the original goes out with the new pixels
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
