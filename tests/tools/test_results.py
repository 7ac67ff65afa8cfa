"""tools/results.py: the figures are the files', intervals and tests are what they say, every format holds the same."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import statistics

import pytest

from ares import cli, files
from ares.intervals import DRAWS, mcnemar, mean_interval, paired_difference, ratio_interval, shares_interval
from teacher.figures import rationale_figures
from tests.conftest import ROOT
from tests.tools.report_tools import released_file
from tools import compare, results
from utils_evaluate import CATEGORIES, resolve_answer

SEEDS = sorted((ROOT / "demo/results").glob("seed*.json"))


def table(capsys, *argv) -> str:
    results.main([str(each) for each in argv])
    return capsys.readouterr().out


def figures(capsys, *argv) -> dict[tuple[str, str], dict[str, str]]:
    """(row, column) -> the CSV's line."""
    text = table(capsys, *argv, "--format", "csv", "--published", "none")
    return {(line["row"], line["column"]): line for line in csv.DictReader(io.StringIO(text))}


def write(path, preds, qids, labels=None, **more):
    files.write_json(path, {"preds": preds, "labels": labels or preds, "qids": qids, **more})
    return path


def test_gold_texts_are_read_once_for_all_systems(few, tmp_path, gold_read, capsys):
    texts = ["It is so.", "It is not so."]
    paths = [write(tmp_path / f"{i}.json", [text] * len(few.qids), few.qids) for i, text in enumerate(texts)]
    systems = [word for path in paths for word in ("--system", f"{path.stem}={path}")]
    found = figures(capsys, *systems, "--data_root", few.root)
    assert len(gold_read) == len({str(few.problems[qid]) for qid in few.qids})
    assert {row for row, column in found if column == "score"} == {"0", "1"}


def test_numbers_of_the_committed_demo_results_equal_the_files(capsys):
    """Each file alone figure by figure in full precision, the three together as mean and deviation."""
    data = [json.loads(path.read_text()) for path in SEEDS]
    for path, file in zip(SEEDS, data, strict=True):
        found = figures(capsys, "--system", f"demo={path}")
        rows = {**file["rationales"], **file["adapters"]}
        expected = {(f"demo: {stage}", name.removeprefix("acc_")): float(value)
                    for stage, values in rows.items() for name, value in values.items()
                    if name != "accuracy"}  # fmt: skip
        assert {key: float(line["value"]) for key, line in found.items()} == expected
    systems = [word for path in SEEDS for word in ("--system", f"demo={path}")]
    found = figures(capsys, *systems)
    for stage in data[0]["rationales"]:
        scores = [file["rationales"][stage]["score"] for file in data]
        line = found[f"demo: {stage} ({len(SEEDS)} seeds)", "score"]
        assert float(line["value"]) == pytest.approx(statistics.fmean(scores))
        assert float(line["deviation"]) == pytest.approx(statistics.stdev(scores)) and line["seeds"] == str(len(SEEDS))
    answers = [file["adapters"]["SFT, QCMG-A"] for file in data]
    averages = [float(each["acc_average"]) for each in answers]
    shown = f"{statistics.fmean(averages):.2f} ± {statistics.stdev(averages):.2f}"
    text = table(capsys, *systems, "--each")
    assert shown in text and all(f"{average:.2f}" in text for average in averages)
    assert "| 85.31 |" in text and "arXiv 2302.00923v5" in text and "| demo: SFT, QCMG-A (seed1) |" in text
    latex = table(capsys, *systems, "--format", "latex", "--published", "none")
    assert shown.replace("±", r"$\pm$") in latex and r"accuracy \%" in latex and latex.count(r"\begin{table}") == 2


def test_any_label_stands_in_latex_as_it_is_written(capsys):
    r"""`<`, `>` and `|` are other letters in LaTeX's own fonts; `[` behind a row's `\\` would be its argument."""
    latex = table(capsys, "--system", f"[a|b] 5% <x>_{{y}} \\ & #1={SEEDS[0]}", "--format", "latex")
    written = r"{}[a\textbar{}b] 5\% \textless{}x\textgreater{}\_\{y\} \textbackslash{} \& \#1: start, QCMG-A & "
    assert "\n" + written in latex


@pytest.fixture
def systems(tmp_path, sample):
    """Answers of two systems on the sample's test questions, right with 80 and 60 %, and what is known of each."""
    data_root = sample / "ScienceQA/data"
    problems = json.loads((data_root / "scienceqa/problems.json").read_text())
    qids = json.loads((data_root / "scienceqa/pid_splits.json").read_text())["test"]
    dice, right = random.Random(5), {}
    for name, skill in (("good", 0.8), ("fair", 0.6)):
        right[name] = {qid: dice.random() < skill for qid in qids}
        preds = []
        for qid in qids:
            wrong = (problems[qid]["answer"] + 1) % len(problems[qid]["choices"])
            preds.append(f"The answer is ({'ABCDE'[problems[qid]['answer'] if right[name][qid] else wrong]}).")
        scores = {"answer": {"acc_average": f"{100 * sum(right[name].values()) / len(qids):.2f}"}}
        write(tmp_path / name / "predictions_ans_test.json", preds, qids, num_fail=0, scores=scores)
    return tmp_path, data_root, right


def test_answers_get_an_interval_and_a_test(systems, problems, capsys):
    folder, data_root, right = systems
    found = figures(capsys, "--system", f"good={folder / 'good'}", "--system", f"fair={folder / 'fair'}",
                    "--data_root", data_root, "--compare", "good", "fair")  # fmt: skip
    for name in ("average", "social", "has_image", "grade_7_12"):  # of each its own questions
        chosen = [qid for qid in right["good"] if CATEGORIES[name](problems[qid])]
        n, share = len(chosen), sum(right["good"][qid] for qid in chosen) / len(chosen)
        half = 196 * math.sqrt(share * (1 - share) / n)  # per cent, normal approximation
        value, low, high = (float(found["good", name][column]) for column in ("value", "low", "high"))
        assert value == pytest.approx(100 * share, abs=0.01)
        assert (low, high) == pytest.approx((100 * share - half, 100 * share + half), abs=0.7 + 50 / n)
    n = len(right["good"])
    only_good = sum(right["good"][qid] and not right["fair"][qid] for qid in right["good"])
    only_fair = sum(right["fair"][qid] and not right["good"][qid] for qid in right["good"])
    assert float(found["answers", "p"]["value"]) == pytest.approx(mcnemar(only_good, only_fair))
    assert float(found["answers", "difference"]["value"]) == pytest.approx(100 * (only_good - only_fair) / n)


def test_rationales_are_compared_question_by_question(tmp_path, few, capsys):
    """Gold texts against the same cut in half: better by ROUGE-L and by the sentence score, with p and interval."""
    problems, qids = few.problems, few.qids
    golds = [f"Solution: {problems[qid]['solution']}" for qid in qids]  # as a stage writes them
    whole = write(tmp_path / "whole.json", golds, qids)
    half = write(tmp_path / "half.json", [text[: len(text) // 2] for text in golds], qids, golds)
    found = figures(capsys, "--system", f"whole={whole}", "--system", f"half={half}", "--data_root", few.root,
                    "--compare", "whole", "half")  # fmt: skip
    for row in ("ROUGE-L", "sentence score"):
        line = found[row, "difference"]
        assert 0 < float(line["low"]) < float(line["value"]) < float(line["high"])
        assert float(found[row, "p"]["value"]) < 0.01
    assert float(found["whole", "rouge"]["value"]) == pytest.approx(100, abs=0.01)
    assert float(found["half", "unfinished"]["value"]) > 80
    assert float(found["whole", "words"]["value"]) == pytest.approx(rationale_figures(problems, qids, golds)["words"])
    # short ones good, long ones poor: the figure is a mean over sentences, and so is its interval
    preds = [gold if i % 2 else "It is so. " * 30 for i, gold in enumerate(golds)]
    odd = write(tmp_path / "odd.json", preds, qids, golds)
    found = figures(capsys, "--system", f"odd={odd}", "--data_root", few.root)
    score = {name: float(found["odd", "score"][name]) for name in ("low", "value", "high")}
    assert 0 < score["low"] < score["value"] < score["high"] < 0.3


def test_a_win_rate_stands_in_the_table(tmp_path, capsys):
    row = {"questions": 9, "win": 60.0, "tie": 20.0, "loss": 20.0, "win_rate": 70.0, "win_rate_interval": [60.0, 79.5]}
    data = {"systems": ["A", "B"], "judge": {"model": "claude-haiku-5-5"}, "protocol": "paper",
            "summary": {"rows": {"average": row}, "position": {"first": 52.0}}, "verdicts": []}  # fmt: skip
    path = tmp_path / "win_rate.json"
    path.write_text(json.dumps(data))
    text = table(capsys, "--win_rate", path)
    assert "| A against B | 70.00 [60.00, 79.50] | 60.00 |" in text and "one random order a pair, 9 questions" in text
    assert "69.76" in text and "GPT-4o judges" in text
    path.write_text("{}")
    with pytest.raises(cli.UserError, match="is not what tools/win_rate.py writes"):
        results.main(["--win_rate", str(path)])


def test_intervals_and_tests_have_their_known_values():
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024) and mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert mcnemar(0, 3000) == 2 / 2**3000 or mcnemar(0, 3000) == 0.0  # no overflow
    # the 2.5 and 97.5 % points of a mean of 100 coins
    coins = [0.0] * 50 + [1.0] * 50
    for ends in (shares_interval([50, 50], (1, 0)), mean_interval(coins), ratio_interval([(c, 1) for c in coins])):
        assert ends == pytest.approx((0.40, 0.60), abs=0.005)
    assert all(map(math.isnan, (*shares_interval([0, 0], (1, 0)), *mean_interval([]), *ratio_interval([(0, 0)] * 3))))
    assert ratio_interval([(1, 2)] * 30 + [(0, 0)] * 30) == (0.5, 0.5)
    assert ratio_interval([(1, 1)] * 30 + [(0, 1)] * 70, seed=1) == shares_interval([30, 70], (1, 0), seed=1)
    dice = random.Random(0)
    noise = [dice.gauss(0, 1) for _ in range(200)]
    for interval in (
        lambda seed: mean_interval(noise, seed),
        lambda seed: shares_interval([337, 663, 211], (1, 0.31, 0.077), seed),
        lambda seed: ratio_interval([(value, 1 + i % 3) for i, value in enumerate(noise)], seed),
    ):
        assert interval(1) == interval(1) != interval(2)
    # 60 questions better by 1 and 40 worse: 0.2 with a standard error of 0.098
    found = paired_difference([1.0] * 60 + [0.0] * 40, [0.0] * 60 + [1.0] * 40)
    assert found["difference"] == pytest.approx(0.2) and 0.03 < found["p"] < 0.06
    assert found["low"] == pytest.approx(0.2 - 1.96 * 0.098, abs=0.02)
    assert found["high"] == pytest.approx(0.2 + 1.96 * 0.098, abs=0.02)
    assert paired_difference(noise, noise)["p"] == 1.0
    # the least p says how many resamples were drawn, however they are split for memory
    assert paired_difference([1.0] * 300, [0.0] * 300)["p"] == 2 / (DRAWS + 1)


@pytest.mark.parametrize("argv, words", [
    ([], "at least one --system"),
    (["--system", "x=/nowhere"], "does not exist"),
    (["--system", f"d={SEEDS[0]}", "--compare", "d", "e"], "no --system is called e"),
    (["--system", f"d={SEEDS[0]}", "--images", "x"], "--images"),
    ({"preds": ["So."]}, "no scores; give its --data_root"),
    ({"preds": ["So."], "scores": {"answer": {"acc_average": "n/a"}}}, "scores are not"),
    ({"preds": ["So."], "scores": 3}, "scores are not"),
    ({"rationales": {"RL": 3}}, "scores are not"),
])  # fmt: skip
def test_mistakes_end_in_one_line(argv, words, tmp_path, monkeypatch):
    """Flags, and files without figures."""
    monkeypatch.chdir(tmp_path)
    if isinstance(argv, dict):
        files.write_json("file.json", argv)
        argv, words = ["--system", "x=file.json"], f"--system x: file.json.*{words}"
    with pytest.raises(cli.UserError, match=words):
        results.main(argv)


def test_a_data_folder_that_nobody_asked_for_stops_no_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    argv = ["--system", f"demo={SEEDS[0]}", "--published", "none"]
    assert "demo: SFT, QCMG-A" in table(capsys, *argv)
    for more in (["--data_root", "data"], ["--dataset", "aokvqa"]):
        with pytest.raises(cli.UserError, match="--data"):
            results.main([*argv, *more])


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize(("asked", "tables"), [("A", {"answers"}), ("E", {"rationales"}),
                                               ("LEA", {"answers", "rationales"}),
                                               ("ALE", {"answers", "rationales"})])  # fmt: skip
def test_a_released_file_gets_the_rows_it_was_asked_for(asked, tables, with_data, tmp_path, few, capsys):
    released_file(tmp_path / "file.json", few.problems, few.qids, asked, garbled=7)
    data = ["--data_root", few.root] if with_data else []
    found = figures(capsys, "--system", f"it={tmp_path / 'file.json'}", *data)
    columns = {column for _, column in found}
    assert ("average" in columns) == ("num_fail" in columns) == ("answers" in tables)
    assert ("rouge" in columns) == ("similarity" in columns) == ("words" in columns) == ("rationales" in tables)
    assert "similariry" not in columns
    for line in found.values():
        if line["low"]:
            assert float(line["low"]) <= float(line["value"]) <= float(line["high"]), line
    if "answers" in tables:
        assert found["it", "num_fail"]["value"] == "7.0" and (found["it", "average"]["low"] != "") == with_data
        assert found["it", "average"]["value"] == f"{100 * 53 / 60 - 1.3:.2f}"  # the file's own, by its own guesses
    if "rationales" in tables:
        assert float(found["it", "similarity"]["value"]) == 88.25
        assert found["it", "rouge"]["low"] == ""  # 55.5 is not the mean of these texts


def kinds_of_files(tmp_path, few) -> dict:
    """Name -> a file of 50 questions, by what it holds; `elsewhere`: answers of the other ten."""
    some = few.qids[:50]
    answers = [f"The answer is ({'ABCDE'[few.problems[qid]['answer']]})." for qid in some]
    rationales = [f"Solution: {few.problems[qid]['solution']}" for qid in some]
    both = [f"{text} {answer}" for text, answer in zip(rationales, answers, strict=True)]
    contents = {"answers": (answers, some), "rationales": (rationales, some), "both": (both, some),
                "elsewhere": (answers[:10], few.qids[50:])}  # fmt: skip
    return {name: write(tmp_path / f"{name}.json", *content) for name, content in contents.items()}


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("rationales", "answers"), "A holds rationales and B holds answers"),
        (("answers", "rationales"), "A holds answers and B holds rationales"),
        (("answers", "elsewhere"), "elsewhere.json have no question in common"),
        (("elsewhere", "both"), "both.json have no question in common"),
    ],
)
def test_a_comparison_that_cannot_be_made_says_what_is_wrong(pair, words, tmp_path, few):
    paths = kinds_of_files(tmp_path, few)
    argv = [word for label, name in zip("AB", pair, strict=True) for word in ("--system", f"{label}={paths[name]}")]
    with pytest.raises(cli.UserError, match=words) as error:
        results.main([*argv, "--data_root", str(few.root), "--compare", "A", "B"])
    assert ("in common" in str(error.value)) == ("in common" in words)


def test_files_of_one_label_are_compared_by_kind(tmp_path, few, capsys):
    """A label may have a rationale stage and an answer stage, in any order; a file of both kinds counts for both."""
    paths = kinds_of_files(tmp_path, few)
    found = figures(capsys, "--system", f"A={paths['rationales']}", "--system", f"A={paths['answers']}", "--system",
                    f"B={paths['both']}", "--data_root", few.root, "--compare", "A", "B")  # fmt: skip
    tested = {row: line["value"] for (row, column), line in found.items() if line["table"] == "A minus B"
              and column == "questions"}  # fmt: skip
    assert tested == {"answers": "50", "ROUGE-L": "50", "sentence score": "50"}
    assert found["answers", "difference"]["value"] == "0.0" and found["answers", "p"]["value"] == "1.0"


@pytest.mark.parametrize("with_data", [True, False])
def test_unread_answers_above_5_percent_are_noted_in_the_tables(with_data, tmp_path, few, capsys):
    for garbled, noted in ((4, True), (3, False)):  # of 60
        released_file(tmp_path / "file.json", few.problems, few.qids, "A", garbled=garbled)
        argv = ["--system", f"it={tmp_path / 'file.json'}", *(["--data_root", few.root] if with_data else [])]
        for form in ("markdown", "latex"):
            text = table(capsys, *argv, "--format", form)
            assert (f"{garbled} of 60 answers could not be read" in text) == noted
    data = json.loads(SEEDS[1].read_text())
    data["adapters"]["SFT, QCMG-A"]["num_fail"] = 64
    files.write_json(tmp_path / "table.json", data)
    assert "64 of 200 answers could not be read" in table(capsys, "--system", f"demo={tmp_path / 'table.json'}")


def test_unread_answers_are_drawn_with_the_seed_of_the_file(tmp_path, few, capsys):
    values = set()
    for seed in (5, 6, 7):
        labels = ["The answer is (A)."] * 60
        path = write(tmp_path / "p.json", ["It may be."] * 60, few.qids, labels, settings={"seed": seed})
        found = figures(capsys, "--system", f"x={path}", "--data_root", few.root)
        drawn = [resolve_answer("", len(few.problems[qid]["choices"]), qid, seed)[0] for qid in few.qids]
        right = sum(choice == few.problems[qid]["answer"] for choice, qid in zip(drawn, few.qids, strict=True))
        assert float(found["x", "average"]["value"]) == pytest.approx(100 * right / 60, abs=0.006)
        assert found["x", "num_fail"]["value"] == "60.0"
        values.add(right)
    assert len(values) > 1


def test_published_figures_are_those_of_the_data_set_asked_for(capsys):
    for dataset, there, absent in (("scienceqa", "85.31", "50.57"), ("aokvqa", "50.57", "85.31")):
        shown = table(capsys, "--system", f"demo={SEEDS[0]}", "--published", dataset)
        assert there in shown and absent not in shown


def test_figures_that_are_no_numbers_are_skipped(tmp_path, capsys):
    """NaN, as json.dump writes it, in scores and in a win rate."""
    scores = {"rationale": {"bleu1": float("nan"), "rouge": 50.0}}
    (tmp_path / "p.json").write_text(json.dumps({"preds": ["So it is."], "scores": scores}))
    found = figures(capsys, "--system", f"x={tmp_path / 'p.json'}")
    assert {column for _, column in found} == {"rouge", "repeated", "unfinished", "words"}


# -- tools/compare.py ----------------------------------------------------------------------------------------


def test_runs_on_the_same_questions_count_once(few, tmp_path, capsys):
    """Three runs on one set of questions have the interval of their mean, not that of three times as many."""
    texts = ["It is so.", "It is not so."]
    runs = [tmp_path / f"run{i}" for i in range(3)]
    for i, run in enumerate(runs):
        preds = [texts[(i + j) % 2] if i else few.problems[qid]["solution"] for j, qid in enumerate(few.qids)]
        start, rl = (
            write(tmp_path / f"s{i}.json", texts[:1] * 60, few.qids),
            write(tmp_path / f"r{i}.json", preds, few.qids),
        )
        compare.main(
            ["--system", f"start={start}", "--system", f"RL={rl}", "--data_root", str(few.root), "--output", str(run)]
        )
    compare.main(["--runs", *map(str, runs), "--output", str(tmp_path / "pooled")])
    capsys.readouterr()
    tables = [json.loads((run / "table.json").read_text()) for run in runs]
    by_run = [[b - a for a, b in zip(*(one["by_question"][name]["score"] for name in ("start", "RL")), strict=True)]
              for one in tables]  # fmt: skip
    expected = paired_difference([statistics.fmean(each) for each in zip(*by_run, strict=True)], [0.0] * 60)
    found = json.loads((tmp_path / "pooled/table.json").read_text())["changes"]["RL - start"]["score"]
    assert {name: found[name] for name in ("difference", "low", "high")} == pytest.approx(
        {name: expected[name] for name in ("difference", "low", "high")}
    )
    # other questions under the same ids are other questions
    tables[1]["questions"] = "other"
    files.write_json(runs[1] / "table.json", tables[1])
    ours, theirs = compare.paired(
        [json.loads((run / "table.json").read_text()) for run in runs], ("RL", "score"), ("start", "score")
    )
    assert len(ours) == len(theirs) == 120


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--system", "start,QCMG-A={preds}"], "--system start,QCMG-A: one comma and a blank stand before"),
        (["--system", "start, QCMG-A, 2={preds}"], "--system start, QCMG-A, 2: one comma and a blank"),
        (["--system", "a={preds}", "--system", "a={preds}"], "--system a: given twice"),
        (["--system", "a={preds}", "--system", "b={others}"], "a and b have no question in common|b and a have no"),
        (["--system", "a={preds}", "--win_rate", "{preds}"], "is not what tools/win_rate.py writes"),
        (["--runs", "{pooled}"], "is no table of one run"),
        (["--runs", "{one}", "{other}"], "have other systems"),
        (["--runs", "{pooled}", "--system", "a={preds}"], "give --system .one run. or --runs"),
    ],
)
def test_mistakes_in_what_is_compared_are_one_line(argv, words, few, tmp_path):
    half = len(few.qids) // 2
    places = {"preds": write(tmp_path / "a.json", ["It is so."] * half, few.qids[:half]),
              "others": write(tmp_path / "b.json", ["It is so."] * half, few.qids[half:])}  # fmt: skip
    empty = {"rationales": {"a": {}}, "adapters": {}, "win_rates": {}, "by_question": {}}
    for name, content in {
        "pooled": {"runs": []},
        "one": empty,
        "other": {**empty, "adapters": {"a, QCM-A": {}}},
    }.items():
        files.write_json(tmp_path / name / "table.json", content)
        places[name] = tmp_path / name
    argv = [word.format(**places) for word in argv]
    with pytest.raises(cli.UserError, match=words):
        compare.main([*argv, "--data_root", str(few.root), "--output", str(tmp_path / "out")])
