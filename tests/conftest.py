"""Shared fixtures: the real data beside the checkout, tiny models of the real kind, and launches of the scripts.

Real data is found through `../shared` or $ARES_SHARED. Where it is absent its tests skip; under
ARES_REQUIRE_SHARED=1 (CI) absence fails.
"""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.api_server import KEY
from tests.disk import small_disk

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ARES_SHARED", ROOT.parent / "shared"))

# OpenMP's threads spin while they wait: on two cores that several processes share, a second thread each makes the same
# step seven times slower (measured), tiny models gain nothing from it, and equal bits need equal thread counts
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    # a file runs in one process: one with tests of minutes must not be begun last
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and fixtures."""
    if not (SHARED / "SPEC.md").exists():
        message = f"real data not found at {SHARED} (set ARES_SHARED)"
        if os.environ.get("ARES_REQUIRE_SHARED") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return SHARED


@pytest.fixture(scope="session")
def fixtures(shared) -> Path:
    """Outputs of the released code on real data."""
    return shared / "fixtures"


@pytest.fixture(scope="session")
def sample(shared) -> Path:
    """The sample of real ScienceQA: captions, images, name map; the data root is `sample / "ScienceQA/data"`."""
    return shared / "data" / "scienceqa_sample"


@pytest.fixture(scope="module")
def problems(sample) -> dict:
    """The sample's problems.json, a copy for every test file."""
    return json.loads((sample / "ScienceQA/data/scienceqa/problems.json").read_text())


@pytest.fixture
def api_environment(monkeypatch, tmp_path) -> None:
    """What the real Anthropic client reads from the environment: a key, no gateway, a cache of the test's own."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.delenv("ANTHROPIC_BASE_URL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture(scope="session")
def t5_tokenizer_dir(shared) -> Path:
    return shared / "data" / "t5_tokenizer"


@pytest.fixture(scope="session")
def t5_tokenizer(t5_tokenizer_dir):
    """The real T5 tokenizer, the one of flan-alpaca and of the released checkpoints."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(t5_tokenizer_dir)


@pytest.fixture(scope="session")
def ready(tmp_path_factory, sample, t5_tokenizer) -> Path:
    """A folder in which every script would run: data, a model with its tokenizer, questions, rationales."""
    import preprocessing_for_correction_feedback
    from teacher import handoff
    from tests.tiny import PATCHES, make_data, make_model, write

    folder = tmp_path_factory.mktemp("ready")
    data = make_data(folder / "data", sample, train=6, val=2, test=4)
    problems, splits = (json.loads((data / f"scienceqa/{x}.json").read_text()) for x in ("problems", "pid_splits"))
    write(data / "captions.json", dict.fromkeys(problems, "A picture."))
    write(data / "scienceqa/correction.json", problems)
    t5_tokenizer.save_pretrained(make_model(folder / "model", patch_size=PATCHES))
    write(folder / "rationales.json", {"preds": ["One. Two."] * len(splits["train"]), "qids": splits["train"]})
    item = handoff.question_dir(folder / "questions", 0, 0, splits["train"][0])
    handoff.write_rationale(item, ["One.", "Two."])
    preprocessing_for_correction_feedback.main([
        *("--correction_dir", f"{folder}/correction", "--rationales", f"{folder}/rationales.json"),
        *("--data_root", str(data)),
    ])  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def rl_base(tmp_path_factory, sample, t5_tokenizer, t5_tokenizer_dir) -> SimpleNamespace:
    """Seven real questions (`data`), a tiny rationale model with image layers (`base`), `tokenizer`. Only read."""
    from benchmarks.rl_common import make_data, make_model

    tmp = tmp_path_factory.mktemp("rl_base")
    data = make_data(tmp, sample, 7)
    return SimpleNamespace(data=data, base=make_model(tmp / "base", data, t5_tokenizer), tokenizer=t5_tokenizer_dir)


@pytest.fixture(scope="module")
def rl_world(rl_base, tmp_path_factory) -> SimpleNamespace:
    """`rl_base` and a folder `tmp` for the runs of a test file."""
    return SimpleNamespace(**vars(rl_base), tmp=tmp_path_factory.mktemp("rl"))


@pytest.fixture(scope="session")
def old_code(tmp_path_factory) -> Path:
    """The code of an old commit, whose run folders the present code has to finish."""
    commit = "12494b9"
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"the history holds no commit {commit} (a shallow clone): {archive.stderr.decode().strip()}")
    code = tmp_path_factory.mktemp("old_code")
    tarfile.open(fileobj=io.BytesIO(archive.stdout)).extractall(code, filter="data")
    return code


@pytest.fixture
def gold_read(monkeypatch) -> list[str]:
    """The questions whose gold texts the reference Teacher reads, one entry a time; it remembers two at most."""
    from teacher import reference

    read = []

    def material(texts):
        read.append(texts[0])
        return reference.Material(*texts)

    monkeypatch.setattr(reference, "read_gold", functools.lru_cache(maxsize=2)(material))
    reference._read_figures.cache_clear()
    return read


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, that can be filled."""
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def run_script(*argv, cwd=ROOT, nproc: int = 1, check: bool = True, timeout: float = 900, env: dict | None = None):
    """Run a script of the project as a user would; `nproc` > 1 starts that many real ranks on CPU through torchrun.

    Returns the CompletedProcess with stdout and stderr as text. With `check`, a non-zero status fails the test and
    shows the end of both.
    """
    command = [sys.executable]
    if nproc > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(nproc), "--master_port", str(_free_port())]
    command += [str(arg) for arg in argv]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    environment.update(env or {})
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode != 0:
        pytest.fail(
            f"{' '.join(command)}\nended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}",
            pytrace=False,
        )
    return done


def _free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def one_line_error(done: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a script ended with status 2 and one `error:` line, without a traceback, that holds `words`."""
    assert done.returncode == 2, (done.returncode, done.stdout[-1500:], done.stderr[-3000:])
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]
