"""Before a paid run: --estimate, --show, --check; and the images of requests."""

from __future__ import annotations

import io
import sys

import pytest

from ares import cli, images
from teacher import estimate, handoff
from teacher.budget import read_log
from teacher.prompts import PROMPT_VERSION
from tests.api_server import KEY
from tests.teacher.teacher_tools import (
    ask,
    lay_out,
    many_items,
    paid_usd,
    scores,
)


def saved(path, size, kind, mode="RGB", noise=False):
    from PIL import Image

    if noise:
        import random

        data = random.Random(0).randbytes(size[0] * size[1] * len(mode))
        image = Image.frombytes(mode, size, data)
    else:
        image = Image.new(mode, size, "red")
    image.save(path, format=kind)
    return path


def test_images_are_fitted_to_the_api(tmp_path):
    from PIL import Image

    good = saved(tmp_path / "a.png", (30, 20), "PNG")
    assert images.load_image(good, "1") == ("image/png", good.read_bytes())
    jpeg = saved(tmp_path / "b.png", (30, 20), "JPEG")
    assert images.load_image(jpeg, "1")[0] == "image/jpeg"
    for path in (
        saved(tmp_path / "wide.png", (9000, 20), "PNG"),
        saved(tmp_path / "heavy.png", (1300, 1200), "PNG", noise=True),
        saved(tmp_path / "other.png", (30, 20), "BMP"),
    ):
        kind, data = images.load_image(path, "1")
        with Image.open(io.BytesIO(data)) as image:
            assert kind == Image.MIME[image.format] and max(image.size) <= images.MAX_EDGE
        assert len(data) <= images.MAX_BYTES
    assert images.estimated_tokens(good) == 1 and images.estimated_tokens(tmp_path / "heavy.png") <= 1600


def test_images_that_do_not_decode_are_named(tmp_path):
    whole = saved(tmp_path / "a.png", (300, 200), "PNG", noise=True)
    whole.write_bytes(whole.read_bytes()[:-9000])  # a download that broke off
    with pytest.raises(cli.UserError, match="a.png of question 7 does not decode"):
        images.load_image(whole, "7")
    whole.write_bytes(b"")
    with pytest.raises(cli.UserError, match="is no PNG"):
        images.load_image(whole, "7")
    with pytest.raises(cli.UserError, match="cannot read"):
        images.load_image(tmp_path / "none.png", "7")


def test_images_without_pillow(tmp_path, monkeypatch):
    good = saved(tmp_path / "a.png", (30, 20), "PNG")
    big = saved(tmp_path / "b.png", (1300, 1200), "PNG", noise=True)
    monkeypatch.setitem(sys.modules, "PIL", None)
    images._checked.clear()
    assert images.load_image(good, "1")[0] == "image/png"
    with pytest.raises(cli.UserError, match="install pillow"):
        images.load_image(big, "1")


def test_estimate_needs_no_key_and_pays_nothing(server, questions, capsys, monkeypatch, problems, sample):
    many_items(questions, 24, problems)
    lay_out(questions, 0, "952", ["Look at it."], problems, sample)
    lay_out(questions, 1, "952", ["Look at it."], problems, sample)
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    ask(server, questions, "--estimate")
    out = capsys.readouterr().out
    for words in (
        "26 rationales",
        "25 distinct requests (1 duplicates",
        "images: 1, in 1",
        "by rule",
        "live",
        "--batch",
    ):
        assert words in out, out
    assert not server.log and not server.counted and not (questions / "teacher").exists()
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    ask(server, questions, "--estimate")
    out = capsys.readouterr().out
    assert "by the API's count of 20 requests" in out and server.counted == 20 and not server.log
    assert not scores(questions) and not handoff.is_done(questions, 0)
    ask(server, questions)
    capsys.readouterr()
    ask(server, questions, "--estimate")
    assert "26 have a reply" in capsys.readouterr().out


def test_estimate_is_near_what_is_then_paid(server, questions, capsys):
    ask(server, questions, "--estimate")
    out = capsys.readouterr().out
    estimated = float(out.split("per million tokens")[1].split("$")[1].split(" live")[0])
    ask(server, questions)
    paid = paid_usd(server)
    assert 0.5 < estimated / paid < 2.5, (estimated, paid)  # the server counts 3 and 4 characters a token


def test_show_prints_the_request(server, questions, capsys, problems, sample, monkeypatch):
    lay_out(questions, 0, "952", ["Look at it."], problems, sample)
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    ask(server, questions, "--show", "952")
    out = capsys.readouterr().out
    for words in (problems["952"]["question"], PROMPT_VERSION, "[image: image.png, image/png", '"Look at it.": xxx',
                  '"thinking": {"type": "disabled"}', "max_tokens", "claude-haiku-5-5"):  # fmt: skip
        assert words in out, out
    with pytest.raises(cli.UserError, match="--show: no rationale of question 99999"):
        ask(server, questions, "--show", "99999")
    assert not server.log


def test_check_compares_two_teachers(server, questions, capsys, sample):
    data = ["--data_root", str(sample / "ScienceQA/data")]
    ask(server, questions, "--check", "10", *data)
    out = capsys.readouterr().out
    assert "claude claude-haiku-5-5 against reference" in out and "10 of 10 rationales scored by both" in out
    assert len(server.log) == 10 and not scores(questions), "the questions folder is left alone"
    ask(server, questions, "--check", "10", "--against", "claude-haiku-4-5-20251001", *data)
    out = capsys.readouterr().out
    assert len(server.log) == 20, "the first Teacher's replies were in the cache"
    everything = next(line for line in out.splitlines() if line.split()[:1] == ["all"])
    assert everything.split()[2:] == ["0.000", "1.000", "100.0%"], "the server scores by the sentence alone"
    with pytest.raises(cli.UserError, match="is the Teacher itself"):
        ask(server, questions, "--check", "10", "--against", "claude-haiku-5-5", *data)


def test_check_knows_each_teachers_own_price(server, questions, sample):
    data = ["--data_root", str(sample / "ScienceQA/data")]
    with pytest.raises(cli.UserError, match="--max_usd: the price of somebody-else is not known"):
        ask(server, questions, "--check", "10", "--against", "somebody-else", "--max_usd", "1", *data)
    assert not server.log
    haiku45 = "claude-haiku-4-5-20251001"
    ask(server, questions, "--check", "4", "--against", haiku45, "--price", "0", "0", *data)
    answers = [asked for asked in server.asked if asked.body["model"] == haiku45]
    totals = read_log(questions / "teacher/spend.jsonl")
    assert len(answers) == 4 and totals.usd > 0, "--price is the price of --teacher_model"


def test_agreement_by_position():
    lines = estimate.agreement_lines([[0.1, 0.5], [0.9], None], [[0.2, 0.9], [0.9], [1.0]])
    assert lines[0] == "2 of 3 rationales scored by both, 3 sentences"
    assert lines[2].split() == ["all", "3", "0.167", "0.866", "66.7%"]
    assert lines[3].split() == ["1", "2", "0.050", "1.000", "100.0%"]
    assert lines[4].split() == ["2", "1", "0.400", "-", "0.0%"]
    assert estimate.agreement_lines([None], [None]) == ["0 of 1 rationales scored by both, 0 sentences"]
