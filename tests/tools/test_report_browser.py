"""The report in a real Chromium: it opens, filters, follows links and keys, and runs no text of a model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from pathlib import Path

import pytest

from ares import files
from ares.predictions import Predictions
from tests.conftest import ROOT
from tests.tools.report_tools import EVIL, NAME
from tools import report
from tools.report_page import collect, page, stages

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--window-size=1366,800",
)  # fmt: skip
DRIVER = "/usr/bin/chromedriver"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Debian's headless Chromium with a fresh profile, its console logged; without one the tests are skipped."""
    if not (Path(DRIVER).exists() and shutil.which("chromium") and importlib.util.find_spec("selenium")):
        stop = pytest.fail if os.environ.get("ARES_REQUIRE_SHARED") == "1" else pytest.skip
        stop("no chromium, chromedriver or selenium (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.set_script_timeout(30)
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def tab(chromium, world):
    """The report, just opened; afterwards nothing may stand in the browser's console."""
    chromium.get("about:blank")
    chromium.get_log("browser")
    chromium.get(world.output.as_uri())
    yield chromium
    assert chromium.get_log("browser") == []


def css(driver, selector):
    return driver.find_elements("css selector", selector)


def text(driver, selector) -> str:
    return "\n".join(each.text for each in css(driver, selector))


def open_question(driver, world, qid: str) -> str:
    """The detail view's text."""
    driver.get(f"{world.output.as_uri()}#qid={qid}")
    return text(driver, "#detail")


def listed(driver) -> list[str]:
    return driver.execute_script("return [...document.querySelectorAll('.row')].map((row) => row.id)")


def choose(driver, name: str, words: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element("id", f"filter-{name}")).select_by_visible_text(words)


def until(holds, seconds: float = 10) -> bool:
    """Whether `holds()` becomes true: events of a browser come as tasks of their own."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def press(driver, keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(keys).perform()


def test_overview_shows_the_figures(tab, world):
    shown = text(tab, "#overview")
    figures = world.main["overview"]["figures"]
    for words in ("75.00", "55.13", f"{figures[1]['rationale']['score']:.3f}", "$2.00", "placeholder 1", "RL itself",
                  "12.50"):  # fmt: skip
        assert words in shown, words
    assert len(css(tab, "#overview .figures svg")) == 6 and len(css(tab, "#overview .scores svg")) == 1
    assert "-0.0" not in shown and "−0.0" not in shown, "no sign before a zero"
    table = next(one for one in css(tab, "#overview table") if one.text.startswith("Rationales"))
    heads, *rows = ([cell for cell in row.find_elements("css selector", "th, td")]
                    for row in table.find_elements("css selector", "tr"))  # fmt: skip
    column = next(i for i, cell in enumerate(heads) if cell.text.startswith("unfinished"))
    best = [row[column].text for row in rows if row[column].get_attribute("class") == "best"]
    assert best == ["12.5"], "fewer unfinished rationales are better"
    assert "What each stage changed" in shown and world.main["overview"]["changes"][0][1] in shown
    assert not css(tab, "#overview .none"), "nothing is missing here"
    assert "sft judge-1 both 0 2 1 1 17" in shown, "judge, protocol, verdicts, equal texts"
    assert tab.execute_script("return performance.getEntriesByType('resource').length") == 0, "nothing is fetched"


def test_filters_search_and_keys(tab, world):
    tab.find_element("id", "tab-inspector").click()
    assert text(tab, "#count") == "12 questions"
    choose(tab, "split", "train")
    assert text(tab, "#count") == "4 of 12 questions"
    choose(tab, "dropped", "placeholder")
    assert text(tab, "#count") == "1 of 12 questions" and len(css(tab, ".row")) == 1
    tab.find_element("id", "reset").click()
    for name, words, qids in (
        ("answer", "lora: wrong", ["2"]), ("answer", "lora: unparsed", ["3"]), ("image", "with image", ["1"]),
        ("judged0", "sft preferred", ["1", "4"]), ("judged0", "depends on the order", ["2"]),
        ("judged0", "tie", ["3"]),
        ("by", "teacher-2", world.splits["train"][:1]),
        ("apart", "by 0.1 or more", world.splits["train"][1:2]),
        ("dropped", "correction: no_final", world.splits["train"][2:3]),
        ("dropped", "any reason", world.splits["train"][2:]),
        ("change", f"{NAME} → sft: improved", world.splits["test"][:-1]),
    ):  # fmt: skip
        choose(tab, name, words)
        assert listed(tab) == [f"row-{world.row[qid]}" for qid in qids], words
        choose(tab, name, "all")
    test = world.splits["test"]
    scores = {qid: [world.main["preds"][stage][world.row[qid]]["p"] for stage in (0, 1)] for qid in test}
    lows = {qid: min(map(min, both)) for qid, both in scores.items()}
    lows |= {qid: world.main["sampled"][world.row[qid]]["low"] for qid in world.splits["train"]}
    low = sorted(set(lows.values()))[0]
    assert low in (0, 20, 40, 60, 80), "a bound of the filter"
    choose(tab, "low", f"at most {low / 100}")
    assert listed(tab) == [f"row-{world.row[qid]}" for qid in lows if lows[qid] <= low]
    choose(tab, "low", "all")
    choose(tab, "split", "test")

    def gain(qid):
        means = [sum(each) / len(each) for each in scores[qid]]
        return round(means[1]) - round(means[0])

    for words, sign in (("largest gain, first to last stage", -1), ("largest loss, first to last stage", 1)):
        choose(tab, "sort", words)
        found = [gain(world.main["questions"][int(name.removeprefix("row-"))]["qid"]) for name in listed(tab)]
        assert [sign * each for each in found] == sorted(sign * each for each in found) and len(set(found)) > 1
    tab.find_element("id", "reset").click()
    tab.find_element("id", "search").send_keys("Land5 map")
    assert text(tab, "#count") == "1 of 12 questions"
    css(tab, ".row")[0].click()
    assert "Land5" in text(tab, "#detail h2") and tab.current_url.endswith("#qid=5")
    assert {mark.text for mark in css(tab, "#detail mark")} == {"Land5", "map"}
    tab.find_element("id", "reset").click()
    tab.find_element("css selector", "#detail h2").click()
    press(tab, "j")
    assert "Land6" in text(tab, "#detail h2")
    assert text(tab, ".row[aria-selected=true]").startswith("What is the capital of Land6")
    press(tab, "kk")
    assert "Land4" in text(tab, "#detail h2")
    tab.find_element("id", "next").click()
    assert "Land5" in text(tab, "#detail h2")
    press(tab, "j" * 20)
    last = world.main["questions"][-1]["qid"]
    assert f"Land{last}" in text(tab, "#detail h2") and not tab.find_element("id", "next").is_enabled()
    tab.get(f"{world.output.as_uri()}#qid=5")
    press(tab, "/")
    press(tab, "jjj")  # typed, not obeyed
    assert tab.find_element("id", "search").get_attribute("value") == "jjj" and "Land5" in text(tab, "#detail h2")


def test_a_link_opens_its_question(tab, world):
    qid = world.splits["train"][-1]
    open_question(tab, world, qid)  # the hash alone changes: no reload
    assert f"Land{qid}" in text(tab, "#detail h2") and not css(tab, "#overview:not([hidden])")
    tab.get("about:blank")
    assert "capital of Land3" in open_question(tab, world, "3")
    assert "is not in this report" in open_question(tab, world, "%3Cb%3E%E0nowhere") and not css(tab, "#detail b")


def test_one_question_shows_everything(tab, world):
    qid = world.splits["train"][-1]
    shown = open_question(tab, world, qid)
    for words in ("RL samples", "Sample 0", "Sample 1", "dropped: placeholder", "Correction", "✓ gold", f"Town{qid}"):
        assert words in shown, words
    assert (text(tab, "#detail del"), text(tab, "#detail ins")) == (f"removed\nHut{qid}.", f"added\nTown{qid}.")
    assert f"The capital is Hut{qid}. Town{qid}." in shown, "what is removed comes before what is added"
    assert not css(tab, ".tok")
    press(tab, "t")
    sample = world.parts["details"]["samples"][world.row[qid]][1]
    tokens = css(tab, ".tok")
    assert len(tokens) == len(sample["tokens"]), "of the sample that counts"
    wanted = f"{sample['advantages'][0] / 1000:+.2f}".replace("-", "−")
    assert tokens[0].text.split("\n")[-1] == wanted
    assert not css(tab, "#samples .raw")
    css(tab, "#samples .fold > summary")[1].click()
    assert until(lambda: '"It is far away."' in text(tab, "#samples .raw")) and "teacher-1" in text(tab, "#samples")
    shown = open_question(tab, world, "2")
    assert "predicted by lora" in shown and "base first: base preferred" in shown and "judge-1" in shown
    numbers = [each.text for each in css(tab, "#detail .sent .n")]
    scores = [world.main["preds"][stage][world.row["2"]]["p"] for stage in (0, 1)]
    assert [round(100 * float(number)) for number in numbers] == [*scores[0], *scores[1]]
    means = [sum(each) / len(each) for each in scores]
    assert [float(each.text) for each in css(tab, "#detail .mean .chip")] == [round(mean) / 100 for mean in means]
    open_question(tab, world, world.splits["train"][0])
    assert text(tab, "#detail .stage .text del") == "It is." and not css(tab, "#detail .stage .text ins")


def test_text_of_models_is_shown_and_never_run(tab, world):
    """Question, choices, hint, caption, stage name, rationale, reply and correction hold HTML and scripts."""
    for qid in ("1", world.splits["train"][1]):
        tab.get(f"{world.output.as_uri()}#qid={qid}")
        for summary in css(tab, "#detail .fold > summary"):
            summary.click()
    assert until(lambda: EVIL[:30] in text(tab, "#detail ins") and EVIL[:30] in text(tab, "#detail .raw"))
    shown = open_question(tab, world, "1")
    assert shown.count("<script>window.pwned=1</script>") == 5, "question, hint, caption, choice, rationale"
    assert "{{data}}" in shown
    assert "<script>window" in text(tab, ".row") and "<script>window" in text(tab, "#filter-change")
    tab.find_element("id", "tab-overview").click()
    assert "<script>window" in text(tab, "#overview table") and "<script>window" in text(tab, "#overview .scores svg")
    assert tab.execute_script("return window.pwned === undefined")
    assert not css(tab, "main script, main img[src=x], #evil")
    other = """const script = document.createElement('script');
        script.textContent = 'window.pwned = 3'; document.body.append(script); return window.pwned"""
    assert tab.execute_script(other) is None, "the policy lets no other script run"
    refused = tab.get_log("browser")
    assert len(refused) == 1 and "Content Security Policy" in refused[0]["message"]


def test_image_of_a_question_is_drawn(tab, world, tmp_path):
    wide = "return [...document.querySelectorAll('#detail img')].map((i) => i.complete && i.naturalWidth)"
    tab.get(f"{world.output.as_uri()}#qid=1")
    assert until(lambda: tab.execute_script(wide) == [60])
    copied = tmp_path / "copied.html"
    stage = ["--stage", f"a={world.root / 'base'}", "--data_root", str(world.root / "data")]
    report.main([*stage, "--images", str(world.root / "images"), "--output", str(copied)])
    tab.get(f"{copied.as_uri()}#qid=1")
    assert until(lambda: tab.execute_script(wide) == [60]), "the policy lets the folder beside the page in"


def test_light_dark_and_layout(tab, world):
    background = "return getComputedStyle(document.body).backgroundColor"
    for scheme, color in (("dark", "rgb(20, 23, 28)"), ("light", "rgb(245, 246, 248)")):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        assert until(lambda color=color: tab.execute_script(background) == color), scheme
    tab.find_element("id", "theme").click()
    assert tab.execute_script(background) == "rgb(20, 23, 28)" and text(tab, "#theme") == "Theme: dark"
    tab.refresh()
    assert text(tab, "#theme") == "Theme: dark", "remembered"
    tab.get(f"{world.output.as_uri()}#qid=1")
    shifts = """const done = arguments[0]; let sum = 0;
        const look = new PerformanceObserver((list) => { for (const entry of list.getEntries()) sum += entry.value; });
        look.observe({type: 'layout-shift', buffered: true});
        setTimeout(() => done(sum), 300);"""
    assert tab.execute_async_script(shifts) < 0.01
    wide = """const box = document.getElementById('detail');
        return [document.documentElement.scrollWidth - innerWidth, box.scrollWidth - box.clientWidth]"""
    assert max(tab.execute_script(wide)) <= 0, "nothing sticks out"
    for width in (1366, 360):
        tab.set_window_size(width, 800)
        for view in ("tab-overview", "tab-inspector"):
            tab.find_element("id", view).click()
            out = """return [...document.querySelectorAll('html, #overview, .side, #detail, .card')].filter((box) =>
                box.scrollWidth > box.clientWidth).map((box) => box.id || box.className || box.tagName)"""
            assert until(lambda out=out: not tab.execute_script(out), 2), (width, view, tab.execute_script(out))
        places = [tab.find_element("id", name).rect for name in ("list", "detail")]
        assert places[0]["y"] + places[0]["height"] < places[1]["y"] + 1 or width > 900, "one below the other"
    tab.set_window_size(1366, 800)
    unnamed = """return [...document.querySelectorAll('input, select, button, img, [role=listbox], svg')].filter((e) =>
        !(e.labels && e.labels.length) && !e.textContent.trim() && !e.getAttribute('aria-label') && !e.alt).length"""
    assert tab.execute_script(unnamed) == 0
    tab.execute_script("localStorage.clear()")


def test_a_report_of_little_says_what_is_missing(chromium, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_json("predictions_ans_test.json", {"preds": ["Solution: It is so."], "labels": ["Solution: It is."]})
    report.main(["--stage", "mine=predictions_ans_test.json"])
    chromium.get_log("browser")
    chromium.get((tmp_path / "report.html").as_uri())
    shown = text(chromium, "#overview")
    for words in ("metrics.jsonl (--run): not available", "scores: not available", "no data folder"):
        assert words in shown, words
    press(chromium, "i")
    assert "It is so." in text(chromium, "#detail") and text(chromium, "#count") == "1 question"
    assert chromium.get_log("browser") == []


# -- the size of ScienceQA -----------------------------------------------------------------------------------------


def scienceqa_sized() -> collect.Inputs:
    """4,241 questions and four stages of rationales, texts as long as ScienceQA's, no two sentences alike."""
    import random

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(4000)]

    def sentences(count: int) -> list[str]:
        return [" ".join(draw.choices(words, k=14)).capitalize() + "." for _ in range(count)]

    def paragraph(count: int) -> str:
        return " ".join(sentences(count))

    lectures = [paragraph(8) for _ in range(200)]
    problems = {
        str(n): {
            "question": paragraph(1), "choices": [paragraph(1)[:30] for _ in range(3)], "answer": n % 3,
            "hint": paragraph(2) if n % 2 else "", "image": "image.png" if n % 2 else None, "grade": f"grade{n % 12}",
            "subject": ("natural science", "social science", "language science")[n % 3], "topic": words[n % 40],
            "lecture": draw.choice(lectures), "solution": paragraph(4),
        }
        for n in range(4241)
    }  # fmt: skip
    made = []
    for name in ("MM-CoT", "RL", "SFT", "LoRA"):
        rationales = [sentences(4) for _ in problems]
        preds = [" ".join(each) for each in rationales]
        scores = [[draw.randint(0, 100) / 100 for _ in each] for each in rationales]
        answers = [draw.randint(-1, 2) for _ in preds]
        figures = {"rationale": {"rouge": 50.0}, "answer": {"acc_average": 50.0}}
        file = Predictions(ROOT, preds, list(problems), preds, preds, scores=figures)
        split = stages.SplitPredictions(file, True, True, answers, rationales, scores)
        made.append(stages.Stage(name, name.lower(), {"test": split}))
    return collect.Inputs(made, ["test"], problems, {}, dict.fromkeys(problems, "test"))


def test_4241_questions_and_four_stages_fit_in_40_mb_and_a_page_of_few_elements(chromium, tmp_path):
    inputs = scienceqa_sized()
    qids, _ = collect.choose_questions(inputs, 0)
    parts = collect.page_data(inputs, qids)
    inputs.problems = None  # for the overview: the reference Teacher would score for minutes
    data = report.overview(report.parse_args(["--stage", "a=b"]), inputs, [])
    parts["main"] |= {"overview": data, "notes": []}
    parts["images"] = {"list": [], "of": {}}
    path = tmp_path / "large.html"
    files.write_text(path, page.build_page("large", parts, report.draw(data, [], None)))
    assert path.stat().st_size < 40e6
    chromium.get("about:blank")
    chromium.get(f"{path.as_uri()}#qid=4000")
    ready = "return (performance.getEntriesByName('report-ready')[0] || {}).startTime"
    assert until(lambda: chromium.execute_script(ready))
    assert text(chromium, "#count") == "4,241 questions" and "Question 4000" in text(chromium, "#detail")
    assert len(css(chromium, ".row")) < 60, "only the visible rows are in the page"
    row = inputs.stages[0].splits["test"].file.qids.index("4000")
    wanted = [score for stage in inputs.stages for score in stage.splits["test"].scores[row]]
    assert [float(each.text) for each in css(chromium, "#detail .sent .n")] == wanted
    chromium.find_element("id", "search").send_keys("abcd")
    assert until(lambda: text(chromium, "#count") != "4,241 questions")
    chromium.find_element("id", "reset").click()
    chromium.execute_script("document.getElementById('list').scrollTop = 1e6")
    assert until(lambda: css(chromium, "#row-4240")), "the list's end can be reached"
