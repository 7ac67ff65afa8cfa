"""`prepare_data.py --download` against a real HTTP server that holds a small ScienceQA and A-OKVQA as published."""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ares import downloads
from ares.archives import BadArchive, unpack
from ares.cli import UserError
from ares.downloads import ROWS, fetch, table
from ares.launch import only_one
from tests.conftest import ROOT, one_line_error
from tests.disk import fill, small_disk
from tests.tiny import make_model
from tools import prepare_data

RAW = "raw.githubusercontent.com"
S3 = "scienceqa.s3.us-west-1.amazonaws.com/images"
VIT = "huggingface.co/cooelf/vision_features/resolve/564801f6057b3ddec844fca001f51a26593bb89a/vit.pth"
# a run of the script with other published sizes and SHA-256 than the real ones: the files here are small
DRIVER = """
import dataclasses, json, sys
from ares import downloads
from ares.cli import run
from tools import prepare_data
published = json.load(open(sys.argv[1]))
for name, rows in downloads.ROWS.items():
    downloads.ROWS[name] = tuple(dataclasses.replace(row, **published.get(row.url, {})) for row in rows)
downloads.WAITS = (0.01, 0.01)
sys.argv = ["prepare_data.py", *sys.argv[2:]]
run(prepare_data.main)
"""


def host_path(url: str) -> str:
    return url.partition("://")[2]


class Mirror:
    """Serves `files`, {host}/{path} -> bytes, below its root; records requests; injects faults.

    `faults[path]`: a list, one entry per GET: ("status", code), ("cut", n): announces everything and ends after n
    bytes, ("reset", n): the same by a reset connection, ("swap", n): the same, and then the file has other content,
    ("stall", n): sends n bytes and waits for `go`.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files, self.asked, self.faults = files, [], {}
        self.stalled, self.go, self.ranges, self.etags = threading.Event(), threading.Event(), True, True
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def gets(self, path: str) -> list[str]:
        """The Range headers of the GET requests of a path, "" without one."""
        return [wanted for method, asked, wanted, _ in self.asked if method == "GET" and asked == path]

    def sent(self, path: str) -> list[int]:
        return [sent for method, asked, _, sent in self.asked if method == "GET" and asked == path]

    def handler(mirror):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(False)

            def do_GET(self):
                self.answer(True)

            def answer(self, body: bool) -> None:
                path, wanted = self.path.lstrip("/"), self.headers.get("Range", "")
                self.close_connection = True
                data = mirror.files.get(path.removeprefix("cdn/"))
                kind, size = (mirror.faults.get(path) or [("", 0)]).pop(0) if body else ("", 0)
                status = size if kind == "status" else 404 if data is None else 0
                record = [self.command, path, wanted, 0]
                mirror.asked.append(record)
                if status:
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if path.startswith("huggingface.co/"):  # as the hub does for large files
                    self.send_response(302)
                    self.send_header("Location", f"/cdn/{path}")
                    self.send_header("X-Linked-Size", str(len(data)))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                etag = f'"{hashlib.md5(data).hexdigest()}"'
                match = re.fullmatch(r"bytes=(\d+)-", wanted) if mirror.ranges else None
                if match and self.headers.get("If-Range", etag) == etag:
                    start = int(match[1])
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                    data = data[start:]
                else:
                    self.send_response(200)
                if mirror.etags:
                    self.send_header("ETag", etag)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if not body:
                    return
                part = data[:size] if kind in ("cut", "reset", "stall", "swap") else data
                record[3] = len(part)
                self.wfile.write(part)
                self.wfile.flush()
                if kind == "swap":
                    mirror.files[path] = mirror.files[path][::-1]
                if kind == "stall":
                    mirror.stalled.set()
                    mirror.go.wait(60)
                if kind == "reset":
                    time.sleep(0.1)  # or what was sent is lost as well
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        return Handler


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(files: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] = lambda info: None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture(scope="module")
def files(sample, t5_tokenizer, tmp_path_factory) -> dict[str, bytes]:
    """{host}/{path} -> content: real questions with their images, captions and rows; features and a model, small."""
    problems, splits = (
        json.loads((sample / f"ScienceQA/data/scienceqa/{name}.json").read_text())
        for name in ("problems", "pid_splits")
    )
    have = {path.name for path in (sample / "images").iterdir()}
    # the images of the sample are of test questions: some of them stand in for those of the other splits
    pictured = [qid for qid in splits["test"] if qid in have and problems[qid]["image"]]
    plain = [qid for qid in splits["test"] if not problems[qid]["image"] and qid not in have]
    chosen = {
        name: [*pictured[3 * number : 3 * number + 3], *plain[2 * number : 2 * number + 2]]
        for number, name in enumerate(("train", "val", "test"))
    }
    problems = {qid: problems[qid] | {"split": name} for name, part in chosen.items() for qid in part}
    qids = [qid for part in chosen.values() for qid in part]
    pictured = [qid for qid in qids if problems[qid]["image"]]
    found = {
        f"{RAW}/lupantech/ScienceQA/main/data/scienceqa/problems.json": {qid: problems[qid] for qid in qids},
        f"{RAW}/lupantech/ScienceQA/main/data/scienceqa/pid_splits.json": chosen,
        f"{RAW}/amazon-science/mm-cot/main/data/name_map.json": {qid: str(row) for row, qid in enumerate(pictured)},
        f"{RAW}/amazon-science/mm-cot/main/data/instruct_captions.json": {
            "captions": dict.fromkeys(pictured, "A map.")
        },
    }
    found = {path: json.dumps(value).encode() for path, value in found.items()}
    for name, part in chosen.items():
        images = {str(path.relative_to(sample / "images")): path.read_bytes()
                  for qid in part if qid in have for path in sorted((sample / "images" / qid).iterdir())}  # fmt: skip
        # with and without a folder of the split's name: both occur
        found[f"{S3}/{name}.zip"] = zipped({f"train/{at}" if name == "train" else at: images[at] for at in images})
    features = io.BytesIO()
    rows = np.random.default_rng(0).standard_normal((len(pictured), 145, 1024), dtype=np.float32)
    torch.save(torch.from_numpy(rows), features)
    found[VIT] = features.getvalue()
    folder = make_model(tmp_path_factory.mktemp("model"), patch_size=(145, 1024))
    t5_tokenizer.save_pretrained(folder)
    model = {f"mm-cot-base-rationale/{path.name}": path.read_bytes() for path in folder.iterdir()}
    found[host_path(ROWS["scienceqa"][-2].url)] = zipped(model)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, format="JPEG")
    entry = {"question": "What?", "choices": ["x", "y"], "correct_choice_idx": 0, "rationales": ["So."]}
    texts = {name: [entry | {"question_id": name, "image_id": 7}] for name in ("train", "val", "test")}
    archive = {f"./aokvqa_v1p0_{name}.json": json.dumps(text).encode() for name, text in texts.items()}
    for row, content in zip(ROWS["aokvqa"], (
        tarred(archive), zipped({"train2017/000000000007.jpg": picture.getvalue()}),
        zipped({"val2017/000000000008.jpg": picture.getvalue()}),
    ), strict=True):  # fmt: skip
        found[host_path(row.url)] = content
    return found


@pytest.fixture
def mirror(files, monkeypatch):
    server = Mirror(dict(files))
    monkeypatch.setattr(downloads, "WAITS", (0.01, 0.01))
    for name, rows in ROWS.items():
        monkeypatch.setitem(ROWS, name, tuple(replace(row, **published(files).get(row.url, {})) for row in rows))
    yield server
    server.go.set()
    server.server.shutdown()
    server.server.server_close()


def published(files: dict[str, bytes]) -> dict[str, dict]:
    """URL -> size and SHA-256 of the file here, for the rows whose real ones are published."""
    found = {}
    for row in (row for rows in ROWS.values() for row in rows if row.bytes):
        data = files.get(host_path(row.url), b"")
        found[row.url] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return found


def start(mirror, folder, dataset="scienceqa", *flags, **options) -> subprocess.Popen:
    """The script in a process of its own."""
    folder.parent.mkdir(exist_ok=True)
    (folder.parent / "published.json").write_text(json.dumps(published(mirror.files)))
    command = [sys.executable, "-c", DRIVER, folder.parent / "published.json", dataset, "--download", folder]
    command += ["--models_dir", folder.parent / "models", "--mirror", mirror.url, *flags]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | options
    return subprocess.Popen(list(map(str, command)), **options)


def script(mirror, folder, dataset="scienceqa", *flags, **options) -> subprocess.CompletedProcess:
    process = start(mirror, folder, dataset, *flags, **options)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def prepare(mirror, folder, dataset="scienceqa", *flags) -> None:
    """The script without doctor's checks, in this process."""
    argv = [dataset, "--download", str(folder), "--mirror", mirror.url, "--models_dir", f"{folder.parent}/models"]
    args = prepare_data.parse_args([*argv, *flags])
    prepare_data.download(args)
    prepare_data.prepare(args)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only(path: str):
    """The row of a path on the mirror, and its place below the data folder."""
    row = next(row for rows in ROWS.values() for row in rows if host_path(row.url) == path)
    return row, row.target


def test_the_whole_command(mirror, files, tmp_path):
    """From nothing to a folder that doctor finds sound; the second run asks the server for nothing."""
    done = script(mirror, tmp_path / "data")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"download: 9 files, [\d.]+ MB; 0 of 9 are there already", done.stdout)
    assert "15 questions (5 train, 5 val, 5 test), 9 with pictures" in done.stdout
    assert "tools/doctor.py --data_root" in done.stdout and "sound: " in done.stdout
    assert re.search(r"ok +model .*mm-cot-base-rationale", done.stdout), done.stdout
    data = content(tmp_path / "data")
    assert data["vision_features/vit.pth"] == files[VIT]
    assert not [name for name in data if name.endswith((".part", ".zip", ".lock"))]
    assert not list((tmp_path / "models").glob("*.zip*"))
    problems = json.loads(data["scienceqa/problems.json"])
    assert {qid for qid in problems if f"images/{qid}/image.png" in data} >= {
        q for q in problems if problems[q]["image"]
    }
    assert len([1 for asked in mirror.asked if asked[0] == "GET"]) == 9 + 2, "each once; two are redirected by the hub"
    mirror.asked.clear()
    prepare(mirror, tmp_path / "data")
    assert mirror.asked == [] and content(tmp_path / "data") == data


def test_aokvqa(mirror, tmp_path):
    done = script(mirror, tmp_path / "data", "aokvqa")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "python extract_features.py --data_root" in done.stdout and "python extract_caption.py" in done.stdout
    assert (tmp_path / "data/images/train/image.png").is_file() and not (tmp_path / "models").exists()
    assert json.loads((tmp_path / "data/aokvqa/pid_splits.json").read_text())["test"] == ["val"]


def test_the_hub_endpoint_and_the_hosts_themselves(mirror, files, tmp_path, monkeypatch):
    url = "https://huggingface.co/a/b/resolve/main/c.bin"
    assert downloads.address(url, None) == url
    assert downloads.address(url, "http://m:1/x/") == "http://m:1/x/huggingface.co/a/b/resolve/main/c.bin"
    monkeypatch.setenv("HF_ENDPOINT", "http://hub/")
    assert downloads.address(url, None) == "http://hub/a/b/resolve/main/c.bin"
    assert downloads.address(url, "http://m") == "http://m/huggingface.co/a/b/resolve/main/c.bin"
    assert downloads.address("https://raw.githubusercontent.com/a", None) == "https://raw.githubusercontent.com/a"
    for wrong in ("hf-mirror.com", "hf-mirror.com:443/hub", "ftp://hub", "http:///hub", "http://hf mirror"):
        monkeypatch.setenv("HF_ENDPOINT", wrong)
        with pytest.raises(UserError, match=f"HF_ENDPOINT: {wrong} is no URL"):
            fetch([only(VIT)[0]], tmp_path / "none", tmp_path)
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("HF_ENDPOINT", f"{mirror.url}/huggingface.co")
    row, target = only(VIT)
    fetch([row], tmp_path, tmp_path)
    assert (tmp_path / target).read_bytes() == files[VIT]


@pytest.mark.parametrize(
    "path",
    [
        f"{RAW}/lupantech/ScienceQA/main/data/scienceqa/problems.json", f"{S3}/train.zip", f"{S3}/test.zip",
        f"cdn/{VIT}", f"cdn/{host_path(ROWS['scienceqa'][-2].url)}",
    ],
)  # fmt: skip
def test_killed_within_a_file(path, mirror, tmp_path):
    """SIGKILL after some bytes: the next run asks for the rest of that file and for none again; same files."""
    prepare(mirror, tmp_path / "whole/data")
    mirror.asked.clear()
    mirror.faults[path] = [("stall", 200)]
    process = start(mirror, tmp_path / "killed/data")
    assert mirror.stalled.wait(60)
    place = tmp_path / "killed"
    deadline = time.monotonic() + 20
    while not any(part.stat().st_size == 200 for part in place.rglob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    mirror.go.set()
    assert not (place / "data/scienceqa/problems.json").exists()
    before = {asked for method, asked, *_ in mirror.asked if method == "GET" and asked != path}
    mirror.asked.clear()
    prepare(mirror, place / "data")
    assert mirror.gets(path) == ["bytes=200-"]
    assert mirror.sent(path) == [len(mirror.files[path.removeprefix("cdn/")]) - 200]
    again = {asked for method, asked, *_ in mirror.asked if method == "GET"} - {path, path.removeprefix("cdn/")}
    assert not again & before
    assert content(place / "data") == content(tmp_path / "whole/data")
    assert content(place / "models") == content(tmp_path / "whole/models")


def test_killed_while_unpacking(mirror, tmp_path):
    """SIGKILL among the images of a large archive: no half-unpacked folder counts as one."""
    many = {f"train/{number}/image.png": b"\x89PNG" * 50 for number in range(20_000, 26_000)}
    mirror.files[f"{S3}/train.zip"] = zipped(many)
    process = start(mirror, tmp_path / "data")
    work = tmp_path / "data/downloads/images/.train.unpacking"
    while process.poll() is None and not (work / "train/20010").is_dir():
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert work.is_dir() and not (tmp_path / "data/downloads/images/train").exists()
    mirror.asked.clear()
    row, _ = only(f"{S3}/train.zip")
    fetch([row], tmp_path / "data", tmp_path / "models", mirror.url)
    assert mirror.asked == [] and not work.exists()
    assert len(list((tmp_path / "data/downloads/images/train").iterdir())) == len(many)
    archive = tmp_path / "data/downloads/images/train.zip"
    assert not archive.exists()
    archive.write_bytes(b"left by a kill after unpacking")
    fetch([row], tmp_path / "data", tmp_path / "models", mirror.url)
    assert mirror.asked == [] and not archive.exists()


@pytest.mark.parametrize("kind", ["cut", "reset"])
@pytest.mark.parametrize("path", [f"{RAW}/lupantech/ScienceQA/main/data/scienceqa/problems.json", VIT])
def test_a_connection_that_breaks_is_resumed(kind, path, mirror, files, tmp_path):
    row, target = only(path)
    served = f"cdn/{path}" if path == VIT else path
    mirror.faults[served] = [
        (kind, 1000),
        (kind, 500),
        (kind, 0),
        (kind, 700),
    ]  # progress resets the count of attempts
    fetch([row], tmp_path / "data", tmp_path, mirror.url)
    assert (tmp_path / "data" / target).read_bytes() == files[path]
    assert mirror.gets(served) == ["", "bytes=1000-", "bytes=1500-", "bytes=1500-", "bytes=2200-"]
    assert sum(mirror.sent(served)) == len(files[path])


def test_servers_without_ranges_or_etags_begin_anew(mirror, files, tmp_path):
    path = f"{S3}/val.zip"
    row, target = only(path)
    for number, (ranges, etags, wanted) in enumerate(((False, True, "bytes=300-"), (True, False, ""))):
        mirror.ranges, mirror.etags = ranges, etags
        mirror.asked.clear()
        mirror.faults[path] = [("cut", 300)]
        fetch([row], tmp_path / str(number), tmp_path, mirror.url)
        assert mirror.gets(path) == ["", wanted] and mirror.sent(path) == [300, len(files[path])]
        assert (tmp_path / str(number) / target).is_dir()


def test_a_file_that_changed_meanwhile_is_not_mixed(mirror, tmp_path):
    """The first half of one version and the second half of another would be a file of the right size."""
    path = f"{RAW}/lupantech/ScienceQA/main/data/scienceqa/problems.json"
    row, target = only(path)
    mirror.faults[path] = [("cut", 500)] + [("status", 503)] * 2
    with pytest.raises(UserError, match="HTTP status 503; fetch it by other means"):
        fetch([row], tmp_path, tmp_path, mirror.url)
    assert len(list(tmp_path.rglob("*.part"))) == 1
    mirror.files[path] = mirror.files[path][::-1]
    fetch([row], tmp_path, tmp_path, mirror.url)
    assert (tmp_path / target).read_bytes() == mirror.files[path] and not list(tmp_path.rglob("*.part"))
    mirror.faults[path] = [("swap", 500)]  # between two attempts of one run
    fetch([row], tmp_path / "other", tmp_path, mirror.url)
    assert (tmp_path / "other" / target).read_bytes() == mirror.files[path]


@pytest.mark.parametrize("status", [404, 403, 410, 500, 503, 429])
def test_a_status_is_one_line_and_the_rest_is_kept(status, mirror, files, tmp_path, capsys):
    path = f"{RAW}/amazon-science/mm-cot/main/data/instruct_captions.json"
    mirror.faults[path] = [("status", status)] * 9
    with pytest.raises(UserError) as refusal:
        prepare(mirror, tmp_path / "data")
    text = str(refusal.value)
    assert f"{mirror.url}/{path}: HTTP status {status}" in text and "\n" not in text
    assert f"put it at {tmp_path / 'data/instruct_captions.json'}, and run the same command again" in text
    assert len(mirror.gets(path)) == (3 if status >= 429 else 1), "retried only where it may help"
    assert (tmp_path / "data/vision_features/vit.pth").read_bytes() == files[VIT], "a later file was fetched"
    mirror.asked.clear()
    (tmp_path / "data/instruct_captions.json").write_bytes(files[path])  # by hand
    prepare(mirror, tmp_path / "data")
    assert mirror.asked == [] and (tmp_path / "data/scienceqa/problems.json").is_file()


def test_absent_files_are_found_before_anything_is_fetched(mirror, tmp_path):
    """A HEAD request tells; several absent files are one line, and the script's status is 2."""
    for name in ("train", "val"):
        del mirror.files[f"{S3}/{name}.zip"]
    done = script(mirror, tmp_path / "data", "scienceqa", "--model", "none")
    one_line_error(done, f"{S3}/train.zip: HTTP status 404", "(1 more could not be had: images of val)")
    assert not mirror.gets(f"{S3}/train.zip") and "download: 6 files" in done.stdout
    (tmp_path / "data/downloads/images/train.zip").write_bytes(zipped({"7/image.png": b"x"}))  # by hand
    (tmp_path / "data/downloads/images/val/8").mkdir(parents=True)  # by hand, unpacked
    prepare(mirror, tmp_path / "data", "scienceqa", "--model", "none")
    assert (tmp_path / "data/downloads/images/train/7/image.png").read_bytes() == b"x"


def test_a_server_that_cannot_be_reached(mirror, tmp_path, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(UserError, match=r"problems.json: .*Connection refused.*; fetch it .*8 more could not be had"):
        fetch([row for row in ROWS["scienceqa"] if row.model != "large"], tmp_path, tmp_path, url)
    assert capsys.readouterr().err.count("attempt") == 2, "the waits are for one file of a host"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "0" * 64}, r"its SHA-256 is \w{12}\.\.\., not 000000000000\.\.\. as published"),
        ({"bytes": 77}, r"\d+ bytes are there, 77 were published"),
    ],
)
def test_another_file_than_the_published_one(change, words, mirror, tmp_path):
    row, target = only(VIT)
    with pytest.raises(UserError, match=words):
        fetch([replace(row, **change)], tmp_path, tmp_path, mirror.url)
    assert not (tmp_path / target).exists() and not list(tmp_path.rglob("*.part"))
    fetch([row], tmp_path, tmp_path, mirror.url)


def test_another_file_that_is_there_is_kept(mirror, tmp_path, capsys):
    row, target = only(VIT)
    (tmp_path / target).parent.mkdir()
    (tmp_path / target).write_bytes(b"my own")
    fetch([row], tmp_path, tmp_path, mirror.url)
    assert "vit.pth has 6 bytes, the published file" in capsys.readouterr().err and not mirror.asked
    assert (tmp_path / target).read_bytes() == b"my own"


def test_a_disk_without_room(mirror, disk, tmp_path):
    """It is said before a byte is fetched; room for an archive but not for unpacking it is too little, too."""
    path = f"{S3}/train.zip"
    size = len(mirror.files[path])
    for leave in (size // 2, size + size // 2):
        filler = fill(disk, leave=leave)
        with pytest.raises(UserError, match=r"[\d.]+ MB free, [\d.]+ MB needed to download and unpack"):
            fetch([only(path)[0]], disk / "data", tmp_path, mirror.url)
        filler.unlink()
    assert not mirror.gets(path)
    fetch([only(path)[0]], disk / "data", tmp_path, mirror.url)


def test_a_disk_that_fills_up_meanwhile(mirror, tmp_path):
    """Another process takes the room: one line; the part stays and is resumed."""
    row, target = only(VIT)
    with small_disk(tmp_path / "disk", "16m") as disk:
        mirror.faults[f"cdn/{VIT}"] = [("stall", 100_000)]
        failure = []

        def run():
            try:
                fetch([row], disk / "data", tmp_path, mirror.url)
            except UserError as error:
                failure.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        assert mirror.stalled.wait(30)
        end = time.monotonic() + 30  # until what was sent is on the disk
        while sum(part.stat().st_size for part in disk.rglob("*.part")) < 100_000:
            assert time.monotonic() < end
            time.sleep(0.01)
        filler = fill(disk, leave=50_000)
        mirror.faults[f"cdn/{VIT}"] = []
        mirror.go.set()
        thread.join(30)
        assert failure and "cannot write" in failure[0] and "No space left" in failure[0]
        filler.unlink()
        fetch([row], disk / "data", tmp_path, mirror.url)
        assert (disk / "data" / target).read_bytes() == mirror.files[VIT]
        assert int(mirror.gets(f"cdn/{VIT}")[-1][6:-1]) >= 100_000


def link(info) -> None:
    info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0


def zip_link() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo("1/image.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return out.getvalue()


GOOD = {"1/image.png": b"picture" * 1000}
BAD = [
    (zipped({**GOOD, "../evil.png": b"x"}), ".zip", "'../evil.png', which would leave"),
    (zipped({**GOOD, "a/../../evil.png": b"x"}), ".zip", "'a/../../evil.png', which would leave"),
    (zipped({**GOOD, "/tmp/evil.png": b"x"}), ".zip", "'/tmp/evil.png', which would leave"),
    (zipped({**GOOD, "..\\evil.png": b"x"}), ".zip", "evil.png', which would leave"),
    (zipped({**GOOD, "C:/evil.png": b"x"}), ".zip", "'C:/evil.png', which would leave"),
    (zip_link(), ".zip", "'1/image.png', which is no plain file"),
    (tarred({**GOOD, "../evil.png": b"x"}), ".tar.gz", "'../evil.png', which would leave"),
    (tarred({**GOOD, "/evil.png": b"x"}), ".tar.gz", "'/evil.png', which would leave"),
    (tarred({"1/image.png": b""}, link), ".tar.gz", "'1/image.png', which is no plain file"),
    (zipped(GOOD)[:-30], ".zip", "not a zip file"),
    (zipped(GOOD).replace(b"\x78", b"\x79", 1)[:40] + b"\0" * 20 + zipped(GOOD)[60:], ".zip", "delete"),
    (tarred(GOOD)[:-40], ".tar.gz", "delete"),
    (tarred(GOOD)[:60] + b"\0\0\0\0" + tarred(GOOD)[64:], ".tar.gz", "delete"),
    (b"<html>sign in</html>", ".zip", "not a zip file"),
    (b"<html>sign in</html>", ".tar.gz", "delete"),
    (zipped({"readme.txt": b"moved"}), ".zip", "holds no */*.png: it is another archive than the one meant"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "suffix", "words"), BAD, ids=range(len(BAD)))
def test_unsafe_and_damaged_archives(data, suffix, words, tmp_path):
    """Refused by the member's name; nothing is written outside, nothing half-unpacked is left."""
    archive = tmp_path / "in" / f"train{suffix}"
    archive.parent.mkdir()
    archive.write_bytes(data)
    with pytest.raises(BadArchive, match=re.escape(words)) as refusal:
        unpack(archive, tmp_path / "in/train", "*/*.png")
    assert str(archive) in str(refusal.value) and "\n" not in str(refusal.value)
    assert content(tmp_path) == {f"in/{archive.name}": data}


@pytest.mark.parametrize("names", ["1/image.png", "train/1/image.png __MACOSX/train/1/._image.png", "a/b/1/image.png"])
def test_the_folder_that_is_wanted(names, tmp_path):
    (tmp_path / "t.zip").write_bytes(zipped({name: name.encode() for name in names.split()}))
    unpack(tmp_path / "t.zip", tmp_path / "t", "*/*.png")
    assert content(tmp_path / "t") == {"1/image.png": names.split()[0].encode()}


def test_mistakes(mirror, tmp_path):
    for flags, words in (
        (["scienceqa", "--download", "d", "--images", "i"], "--images: no effect with --download"),
        (["scienceqa", "--download", "d", "--output", "o"], "--output: no effect with --download"),
        (["scienceqa", "--source", "d", "--mirror", "http://m"], "--mirror: no effect without --download"),
        (["scienceqa", "--source", "d", "--model", "base"], "--model: no effect without --download"),
        (["scienceqa", "--download", "d", "--mirror", "mirror.example.org"], "is no URL; it begins with http"),
        (["aokvqa", "--download", "d", "--model", "large"], "no rationale model is published for A-OKVQA"),
    ):
        with pytest.raises(UserError, match=words):
            prepare_data.parse_args(flags)
    with only_one(tmp_path / "taken/.download.lock", "test"), pytest.raises(UserError, match="is running there"):
        prepare(mirror, tmp_path / "taken")
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match="--download: cannot write to .*data"):
        prepare(mirror, tmp_path / "data")
    row, _ = only(VIT)
    (tmp_path / "other/vision_features/vit.pth").mkdir(parents=True)
    with pytest.raises(UserError, match="vit.pth is no file; move it away"):
        fetch([row], tmp_path / "other", tmp_path, mirror.url)


def test_the_documentation_has_the_table_that_is_downloaded():
    text = (ROOT / "docs/data.md").read_text()
    for name, rows in ROWS.items():
        assert table(name) in text
        assert all(row.url in table(name) and f"/{row.target}`" in table(name) for row in rows)
        assert len({row.target for row in rows}) == len(rows)
    tables = re.findall(r"^\| .*(?:https?://|\.(?:com|org)/).*$", text, re.M)
    assert len(tables) == sum(map(len, ROWS.values())), "a table of addresses that is not the code's"
