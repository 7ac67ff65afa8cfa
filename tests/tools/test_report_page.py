"""The report's drawings and its page: colours, curves, PNG files, and no text that leaves its data block."""

from __future__ import annotations

import re

import pytest

from ares.sentences import split_text
from teacher import reference
from tests.conftest import ROOT
from tests.tools.report_tools import EVIL, make_problems
from tools.report_page import collect, page, plots, teacher

# -- the drawings ----------------------------------------------------------------------------------------------


def test_curves_run_on_over_rounds():
    lines = [
        {"kind": kind, "round": number, "update": update, "entropy": 10 * number + update, "approx_kl": None}
        for number in (0, 1, 2) for update in (1, 2) for kind in (("update", "epoch") if update == 2 else ("update",))
    ]  # fmt: skip
    (curve,) = plots.curves(lines)
    (line,) = curve["lines"]
    assert curve["name"] == "entropy" and (line["x"], line["y"]) == ([1, 2, 3, 4, 5, 6], [1, 2, 11, 12, 21, 22])
    assert (line["epoch_x"], line["epoch_y"]) == ([2, 4, 6], [2, 12, 22]) and curve["rounds"] == [3, 5]
    x, y = plots._thinned(list(range(1001)), [1.0] * 1001)
    assert len(x) <= 500 and set(y) == {1.0}


def test_scores_of_a_reward_model_beside_the_reference_teachers():
    problems, _ = make_problems()
    qid = next(iter(problems))
    said = split_text(problems[qid]["solution"])[:2]

    def sample(scores, who, **more):
        return teacher.Sample(qid, 0, said, about={"teacher": who}, scores=scores, **more)

    n = len(said)
    rounds = [
        teacher.Round(0, [sample([0.5] * n, "claude")], None),
        teacher.Round(1, [sample([0.8] * n, "model"), sample([0.6] * n, "model"), sample(None, "model")], None),
        teacher.Round(2, [sample([1.0] * n, "model"), sample([0.0] * n, "model", reason="wrong_count")], None),
    ]
    [curve] = collect.reward_model_curve(collect.Inputs([], [], problems, rounds=rounds))
    given, by_reference = curve["lines"]
    truth = sum(reference.score_sentences(problems[qid], said)) / n
    assert given["epoch_x"] == [1, 2, 3] and given["epoch_y"] == pytest.approx([0.5, 0.7, 1.0])
    assert by_reference["epoch_y"] == pytest.approx([truth] * 3)
    drawn = plots.as_svg(plots.draw_curve(curve), "reward_model", plots.curve_label(curve))
    assert "<svg" in drawn and "reference Teacher" in plots.curve_label(curve)
    assert not collect.reward_model_curve(collect.Inputs([], [], problems, rounds=rounds[:1]))
    assert not collect.reward_model_curve(collect.Inputs([], [], None, rounds=rounds))


def test_png_files_for_papers(world):
    from PIL import Image

    names = {"reward", "kl", "entropy", "clip_fraction", "value_fit", "value_loss", "scores"}
    assert {path.stem for path in world.png.iterdir()} == names
    with Image.open(world.png / "kl.png") as image:
        assert image.size[0] > 700 and image.getpixel((1, 1)) == (255, 255, 255, 255), "on white"
        assert len(image.convert("RGB").getcolors(10**6)) > 50, "something is drawn"


def test_drawings_take_the_pages_colours_and_hold_no_script(world):
    for name in world.main["overview"]["curves"]:
        svg = re.search(rf'<template id="figure-{name}">(.*?)</template>', world.page, re.DOTALL)[1]
        assert "var(--series0)" in svg and "currentColor" in svg and "#1f5fa8" not in svg and "<style" not in svg
    ids = re.findall(r' id="([^"]+)"', world.page)
    assert len(ids) == len(set(ids))


# -- the page ------------------------------------------------------------------------------------------------------


def test_no_text_can_end_its_block(world):
    assert world.page.count("<script") == 1 + len(world.parts) == world.page.count("</script")
    assert world.main["questions"][0]["hint"] == EVIL, "it is there, as text"
    assert "window.pwned" in world.page and "<img" not in world.page and "<b id=evil" not in world.page
    assert page.as_json("</script><!--") == '"\\u003c/script>\\u003c!--"'
    assert page.as_json("half \ud83d a pair").encode() == '"half \ufffd a pair"'.encode()


def test_the_page_holds_no_address(world):
    """Nothing to load from anywhere: the only URLs are names of XML dialects."""
    urls = set(re.findall(r"""https?://[^\s"'<>)]+""", world.page))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in world.page


def test_scores_can_be_read_on_their_colours():
    """WCAG AA: text on every score colour, muted text and links, in both themes; curves have the page's colours."""
    css = (ROOT / "tools/report_page/style.css").read_text()
    light, dark = re.findall(r":root[^{]*\{(.*?)\n\}", css, re.DOTALL)[:2]
    for block in (light, dark):
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for name in (*(f"s{i}" for i in range(11)), "card", "page", "picked", "added", "removed"):
            assert contrast(colors["ink"], colors[name]) >= 4.5, name
        for name in ("muted", "accent"):
            assert min(contrast(colors[name], colors[at]) for at in ("card", "page")) >= 4.5, name
    for name, colors in (("series", plots.SERIES), ("s", plots.SCALE)):
        assert all(f"--{name}{i}: {color}" in light for i, color in enumerate(colors)), name


def contrast(a: str, b: str) -> float:
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
