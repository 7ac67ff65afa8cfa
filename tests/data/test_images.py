"""One opener for images: which formats it takes, what it refuses before decoding, and that every caller uses it."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from ares import images
from ares.cli import UserError
from tests.conftest import ROOT
from tools.report_page import pictures
from vision.networks import read_image

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 40 40
%%EndComments
newpath 0 0 moveto 40 40 lineto stroke
%%EOF
"""

# every way in which an image file of a user is decoded; prints a JSON line for each way and path of standard input
CALLERS = """
import json, pathlib, sys
import PIL.Image, PIL.EpsImagePlugin, PIL.WebPImagePlugin, PIL.TiffImagePlugin
from ares import images
from ares.cli import UserError
from tools import prepare_data
from tools.report_page import pictures
from vision.networks import read_image
def report(path):
    return pictures.collect_images(path.parent.parent, [path.parent.name], "embed", path.parent / "r.html")["list"]
def peak():  # kB
    return int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
ways = {"features": read_image, "teacher": lambda path: images.load_image(path, "7"), "estimate": images.pixels,
        "prepare": lambda path: prepare_data._as_png(path.read_bytes()), "report": report}
for path in map(pathlib.Path, json.load(sys.stdin)):
    for name, way in ways.items():
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak()
        try:
            refused = not way(path)
        except (OSError, ValueError, UserError):
            refused = True
        print(json.dumps([str(path), name, refused, (peak() - before) / 1024]))
"""


def use(paths: list[Path], **environment: str) -> dict[Path, dict[str, tuple[bool, float]]]:
    """path -> caller -> (whether it refused the file, megabytes that its memory grew by), in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CALLERS], input=json.dumps(list(map(str, paths))), cwd=ROOT,
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[Path, dict] = {path: {} for path in paths}
    for path, name, *result in map(json.loads, done.stdout.splitlines()):
        found[Path(path)][name] = tuple(result)
    assert all(len(each) == 5 for each in found.values())
    return found


def place(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "7/image.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, color: int = 2) -> bytes:
    """A black PNG written without holding its pixels."""
    squeezer, row = zlib.compressobj(9), bytes(1 + width * {0: 1, 2: 3, 6: 4}[color])
    data = b"".join(squeezer.compress(row) for _ in range(height)) + squeezer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(size: tuple[int, int], kind: str, mode: str = "1", **options) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, format=kind, **options)
    return out.getvalue()


def big_frame_gif() -> bytes:
    """A screen of one pixel whose first frame claims 20,000 x 20,000."""
    whole = saved((1, 1), "GIF", "P")
    at = whole.index(b",\0\0\0\0")
    return whole[: at + 5] + struct.pack("<HH", 20_000, 20_000) + whole[at + 9 :]


BOMBS = {
    "eps": lambda: EPS,
    "png": lambda: png(9_000, 9_000),
    "wide png": lambda: png(2_000_000, 40, color=0),
    "gif": lambda: saved((9_000, 9_000), "GIF", "P"),
    "frame of a gif": big_frame_gif,
    "jpeg": lambda: saved((9_000, 9_000), "JPEG", "L"),
    "webp": lambda: saved((9_000, 9_000), "WEBP", "L", lossless=True, method=0),
    "bmp": lambda: saved((30_000, 30_000), "BMP")[:80_000],
    "tiff": lambda: saved((20_000, 20_000), "TIFF", compression="group4"),
    "text": lambda: png(4, 4, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8), 9))] * 20),
    "international text": lambda: png(4, 4, chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(10**8), 9))),
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """Name -> what each caller did with it. An EPS would start Ghostscript."""
    programs, started = tmp_path_factory.mktemp("bin"), tmp_path_factory.mktemp("gs") / "started"
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    (programs / "gs").chmod(0o755)
    paths = {name: place(tmp_path_factory.mktemp("bomb"), make()) for name, make in BOMBS.items()}
    sound = place(tmp_path_factory.mktemp("sound"), png(4, 4))
    found = use([*paths.values(), sound], PATH=f"{programs}:{os.environ['PATH']}")
    assert not any(refused for refused, _ in found[sound].values()), "the callers refuse everything"
    assert not started.exists(), "Ghostscript was started"
    return {name: found[path] for name, path in paths.items()}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_not_decoded(name, bombs):
    assert all(refused and megabytes < 60 for refused, megabytes in bombs[name].values()), bombs[name]


def test_many_large_images_are_decoded_one_after_the_other(tmp_path):
    """Each is within the limit; eight threads hold one of them at a time."""
    data = png(7_900, 7_900, color=0)
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "image.png").write_bytes(data)
    script = (
        "import pathlib, sys; from ares import images; import os; os.cpu_count = lambda: 8\n"
        "files = {p.parent.name: [p] for p in pathlib.Path(sys.argv[1]).glob('*/image.png')}\n"
        "assert not images.broken_images(files)\n"
        "print(int(pathlib.Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 250, "400 MB and more without a lock"


def test_what_is_no_regular_file_or_too_large_is_refused(tmp_path, monkeypatch):
    path = place(tmp_path, png(4, 4) + bytes(20_000))
    with monkeypatch.context() as patched:
        patched.setattr(images, "MAX_FILE", 10_000)
        with pytest.raises(ValueError, match="MB are read"):
            read_image(path)
        with pytest.raises(UserError, match="question 7 is larger than"):
            images.load_image(path, "7")
    path.unlink()
    os.mkfifo(path)
    zero = path.with_name("zero.png")
    zero.symlink_to("/dev/zero")
    for each in (path, zero, path.parent):
        with pytest.raises(OSError, match="no regular file"):
            read_image(each)
        with pytest.raises(UserError, match=f"--images: .*{each.name}.* of question 7"):
            images.load_image(each, "7")
        assert images.pixels(each) is None


def turned(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


PLAIN = Image.new("RGB", (40, 20))
for box, color in (((0, 0, 20, 10), "red"), ((20, 0, 40, 10), "lime"), ((0, 10, 20, 20), "blue")):
    PLAIN.paste(color, box)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(2, 9))
def test_a_turned_photo(turn, kind, tmp_path):
    path = place(tmp_path, b"")
    PLAIN.save(path, format=kind, exif=turned(turn), **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")  # the library's own
    assert expected.tobytes() != PLAIN.tobytes()
    sent_kind, data = images.load_image(path, "7")
    with opened(data) as sent:
        assert sent.convert("RGB").tobytes() == expected.tobytes() and images.orientation(sent) == 1
    assert images.media_type(data) == sent_kind
    assert images.pixels(path) == expected.size
    assert read_image(path, turned=True).tobytes() == expected.tobytes()
    if kind != "TIFF":  # Pillow turns a TIFF itself
        assert read_image(path).tobytes() == PLAIN.tobytes(), "as the published features were made"


def test_jpegs_turned_plain_and_with_damaged_exif_data(tmp_path):
    path = place(tmp_path, b"")
    PLAIN.save(path, format="JPEG", exif=turned(6), quality=95)
    kind, data = images.load_image(path, "7")
    with opened(data) as sent:
        assert sent.size == (20, 40) and kind == "image/png"
        assert sent.getpixel((17, 2))[0] > 200, "red has gone from the left upper corner to the right one"
    for exif in (Image.Exif(), b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(range(64))):
        PLAIN.save(path, format="JPEG", exif=exif)
        assert images.load_image(path, "8") == ("image/jpeg", path.read_bytes())
        assert read_image(path, turned=True).size == (40, 20)


def test_a_report_shows_a_turned_photo_upright(tmp_path):
    path = place(tmp_path, b"")
    Image.effect_noise((800, 400), 90).convert("RGB").save(path, format="JPEG", exif=turned(8))
    found = pictures.collect_images(tmp_path, ["7"], "embed", tmp_path / "report.html")["list"][0]
    with opened(base64.b64decode(found["src"].partition(",")[2])) as shown:
        assert (found["w"], found["h"]) == (400, 800) and shown.height > shown.width


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("GIF", "P", {"save_all": True}), ("WEBP", "RGB", {"save_all": True}), ("PNG", "RGB", {"save_all": True}),
        ("JPEG", "CMYK", {}), ("TIFF", "CMYK", {}), ("BMP", "P", {}), ("TIFF", "I;16", {}), ("TIFF", "F", {}),
    ],
)  # fmt: skip
def test_what_the_api_may_read_otherwise_goes_out_as_plain_png(kind, mode, options, tmp_path):
    first = Image.new("RGB", (30, 20), (255, 0, 0))
    first = first.convert(mode) if mode not in ("I;16", "F") else Image.new(mode, (30, 20), 65535)
    if options:
        options |= {"append_images": [Image.new("RGB", (30, 20), color) for color in ("blue", "lime")]}
    path = place(tmp_path, b"")
    first.save(path, format=kind, **options)
    sent_kind, data = images.load_image(path, "7")
    with opened(data) as sent:
        assert sent_kind == "image/png" and sent.format == "PNG" and getattr(sent, "n_frames", 1) == 1
        red = sent.convert("RGB").getpixel((5, 5))
        assert red[0] > 220 and (mode in ("I;16", "F") or max(red[1:]) < 60), red
    assert read_image(path).size == (30, 20)


def test_still_pictures_go_out_byte_by_byte_and_cut_files_are_broken(tmp_path):
    for kind, mode in (("PNG", "P"), ("PNG", "LA"), ("PNG", "I;16"), ("GIF", "P"), ("WEBP", "RGBA"), ("JPEG", "L")):
        path = place(tmp_path, saved((9, 7), kind, mode))
        assert images.load_image(path, "7")[1] == path.read_bytes(), (kind, mode)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        out = io.BytesIO()
        Image.effect_noise((60, 60), 90).convert("RGB").save(out, format=kind)
        for share in (0.1, 0.5, 0.9):
            path = place(tmp_path, out.getvalue()[: int(len(out.getvalue()) * share)])
            with pytest.raises((OSError, ValueError)):
                read_image(path)
            with pytest.raises(UserError, match="question 7 (does not decode|is no PNG)"):
                images.load_image(path, "7")


def test_there_is_one_opener():
    paths = [path for pattern in ("*.py", "*/*.py", "*/*/*.py") for path in ROOT.glob(pattern)]
    paths = [path for path in paths if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks", ".venv")]
    assert len(paths) > 40
    assert [path.name for path in paths if "Image.open(" in path.read_text()] == ["images.py"]
