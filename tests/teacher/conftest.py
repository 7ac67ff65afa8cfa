"""Fixtures of the Teacher's tests: a local server that speaks the API, a questions folder of real questions."""

from pathlib import Path

import certifi
import pytest

from teacher import api_teacher, batches
from tests.api_server import ApiServer, score_by_text
from tests.teacher.teacher_tools import MODEL, World, many_items


@pytest.fixture(scope="session")
def one_certificate(tmp_path_factory):
    """A file of the first of the usual certificates: each run of the client reads the file, and 150 take 20 ms."""
    file = tmp_path_factory.mktemp("certificates") / "one.pem"
    first, end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")
    file.write_text(first + end)
    return file


@pytest.fixture
def server(monkeypatch, api_environment, one_certificate):
    """The API, with a client that starts fast and pauses for milliseconds only."""
    monkeypatch.setenv("SSL_CERT_FILE", str(one_certificate))
    monkeypatch.setattr(api_teacher, "BACKOFF", 0.02)
    monkeypatch.setattr(batches, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(batches, "BACKOFF", 0.001)
    with ApiServer(score_by_text) as server:
        server.most_batches = 30
        yield server


@pytest.fixture
def questions(tmp_path, problems):
    """12 text-only items of 4 actions, no two alike, with their requests."""
    many_items(tmp_path / "questions", 12, problems)
    return tmp_path / "questions"


@pytest.fixture
def world(server, questions):
    """haiku.py on `questions`, asking one by one."""
    return World(server, questions)


@pytest.fixture
def batch_world(server, questions):
    """haiku.py --batch on `questions`."""
    return World(server, questions, "--batch", "--poll_seconds", "0.1")


@pytest.fixture
def local(server, questions, monkeypatch):
    """haiku.py on a local server that wants no key."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    server.models, server.needs_key = {MODEL: {}, "other:7b": {}}, False
    return World(server, questions, "--teacher", "openai", "--teacher_model", MODEL)
