"""tools/report.py: its numbers are those of the files, and missing inputs are named. Its page: test_report_page.py."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from ares import cli, files
from ares.cli import UserError
from ares.sentences import split_text
from teacher import handoff, reference
from teacher.figures import figures_by_question, rationale_figures
from tests.conftest import ROOT
from tests.tools.report_tools import NAME, SECOND, make_problems, parts_of, picture, released_file, write_predictions
from tools import report
from tools.report_page import collect, page, stages, teacher

# -- the data ------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_files(world):
    assert world.untouched, "what is read stays as it is"
    data = world.main["overview"]
    base, sft, lora = data["figures"]
    read = [json.loads((world.root / name / "predictions_ans_test.json").read_text()) for name in ("base", "sft")]
    assert base["scores"] == read[0]["scores"]["rationale"]
    assert lora == {"rows": 8, "num_fail": 1, "scores": {"acc_average": 75.0, "acc_natural": 50.0}}
    assert sft["scores"]["rouge"] > base["scores"]["rouge"]  # not in its file: computed, without the similarity
    assert set(sft["scores"]) == {"bleu1", "bleu4", "rouge"}
    for figures, file in zip((base, sft), read, strict=True):
        assert figures["rationale"] == pytest.approx(rationale_figures(world.problems, file["qids"], file["preds"]))
    assert base["rationale"]["unfinished"] == 100 * 7 / 8 and sft["rationale"]["unfinished"] == 100 / 8
    (line,) = data["rounds"]
    assert line == json.loads((world.root / "rl/metrics.jsonl").read_text().splitlines()[0])
    assert data["times"] == [{"name": "RL itself", "seconds": 12.5}]
    scores, corrections = data["costs"]
    assert (scores["replies"], scores["tokens_in"], scores["tokens_out"], scores["usd"]) == (8, 800, 160, 2.0)
    assert (scores["began"], scores["ended"]) == ("2026-11-25T10:00:00Z", "2026-11-25T10:00:01Z")
    assert corrections["replies"] == 0 and corrections["usd"] is None  # nobody wrote a reply.json
    assert data["dropped"] == [
        {"name": "RL round 0", "total": 8, "reasons": {"placeholder": 1}},
        {"name": "corrections", "total": 4, "reasons": {"no_final": 1}},
    ]


def test_stages_row_by_row(world):
    """Sentences, their scores and answers of each question, as the prediction files have them."""
    for name, preds in zip(("base", "sft"), world.main["preds"], strict=False):
        file = json.loads((world.root / name / "predictions_ans_test.json").read_text())
        for qid, text in zip(file["qids"], file["preds"], strict=True):
            sentences = split_text(text)
            scores = [round(100 * score) for score in reference.score_sentences(world.problems[qid], sentences)]
            assert preds[world.row[qid]] == {"s": sentences, "p": scores, "a": stages.NO_ANSWER}
    lora = world.main["preds"][2]
    assert [lora[world.row[qid]]["a"] for qid in world.splits["test"]] == [1, 0, stages.UNPARSED, 1, 1, 1, 1, 1]
    assert lora[world.row["3"]] == {"s": [], "a": stages.UNPARSED, "w": "I do not know."}
    assert [stage["answers"] for stage in world.main["stages"]] == [False, False, True]
    assert not any(world.row[qid] in preds for preds in world.main["preds"] for qid in world.splits["train"])


def test_questions_as_in_the_data_folder(world):
    assert list(world.row) == world.splits["test"] + world.splits["train"]
    for shown, (qid, problem) in zip(world.main["questions"], world.problems.items(), strict=True):
        for name in ("question", "subject", "topic", "grade", "lecture", "solution", "choices", "answer"):
            assert shown[name] == problem[name]
        assert shown.get("hint", "") == problem["hint"] and shown["image"] == ("caption" in shown) == (qid == "1")
        assert shown["split"] == ("test" if qid in world.splits["test"] else "train")


def test_samples_are_what_rl_was_trained_on(world):
    """Scores, rewards and advantages of samples_round_0.jsonl; token rewards add up to the reward."""
    lines = [json.loads(line) for line in (world.root / "rl/samples_round_0.jsonl").read_text().splitlines()]
    samples = world.parts["details"]["samples"]
    shown = {(each["k"], row): each for row, many in samples.items() for each in many}
    assert len(lines) == 7 and len(shown) == 8
    for line in lines:
        each = shown.pop((line["action"], world.row[line["qid"]]))
        assert each["s"] == [one["text"] for one in line["sentences"]]
        assert each["p"] == [round(100 * one["score"]) for one in line["sentences"]]
        assert each["adv"] == [round(1000 * one["advantage"]) for one in line["sentences"]]
        assert each["reward"] == round(1000 * line["reward"])
        assert sum(each["rewards"]) == pytest.approx(each["reward"], abs=len(each["rewards"]))  # rounded one by one
        assert set(each["adv"]) <= set(each["advantages"]) and len(each["tokens"]) == len(each["advantages"])
        assert "".join(each["tokens"]).replace("▁", " ").strip().removesuffix("</s>") == line["rationale"]
    ((_, spoilt),) = shown.items()
    assert spoilt["reason"] == "placeholder" and "p" not in spoilt and "tokens" not in spoilt
    assert world.main["sampled"][world.row[world.splits["train"][-1]]]["dropped"] == ["placeholder"]
    lowest = {row: min(score for each in many for score in each.get("p", ())) for row, many in samples.items()}
    assert {row: known["low"] for row, known in world.main["sampled"].items()} == lowest


def test_samples_name_their_model_and_show_a_second_teachers_scores(world):
    first, second, *_ = world.splits["train"]
    samples, sampled = world.parts["details"]["samples"], world.main["sampled"]
    assert [each["by"] for each in samples[world.row[first]]] == ["teacher-2"] * 2
    assert [known["by"] for known in sampled.values()].count(["teacher-1"]) == len(sampled) - 1
    apart = []
    for each, scores in zip(samples[world.row[second]], SECOND, strict=True):
        assert each["p2"] == [round(100 * score) for score in scores] and each["by2"] == "claude m"
        apart += [abs(a - b) for a, b in zip(each["p"], each["p2"], strict=True)]
    assert {row: known["apart"] for row, known in sampled.items()} == {
        row: max(apart) if row == world.row[second] else -1 for row in sampled
    }


def test_a_damaged_check_is_one_line(world, tmp_path):
    shutil.copytree(world.root / "rl/questions_round0", tmp_path / "questions")
    for text in ('{"a against b": {"scores": {}}', "[]", '{"a against b": {"scores": 1}}', '{"a": {}}', '{"a": 1}'):
        (tmp_path / "questions/teacher/check.json").write_text(text)
        with pytest.raises(UserError, match="check.json"):
            report.main(["--questions_dir", str(tmp_path / "questions"), "--output", str(tmp_path / "r.html")])


def test_scores_by_position_count_every_sentence(world):
    series = world.main["overview"]["series"]
    lines = [json.loads(line) for line in (world.root / "rl/samples_round_0.jsonl").read_text().splitlines()]
    assert series[0]["name"] == "RL samples" and series[0]["judges"] == ["teacher-1", "teacher-2"]
    assert [each["name"] for each in series[1:]] == [NAME, "sft"]
    for position in range(collect.POSITIONS):
        at = [line["sentences"][position]["score"] for line in lines if len(line["sentences"]) > position]
        assert sum(series[0]["counts"][position]) == len(at)
        if at:
            assert series[0]["means"][position] == pytest.approx(sum(at) / len(at))
            assert series[0]["counts"][position][9] == sum(score == 0.9 for score in at)
    long = collect._by_position("x", [], [[0.5] * 9])
    assert [sum(counts) for counts in long["counts"]] == [1, 1, 1, 1, 1, 4]
    assert collect._by_position("x", [], [[0.56, 0.54, 1.0]])["counts"][:3] == [
        [int(step == place) for step in range(11)] for place in (6, 5, 10)
    ]
    late = teacher.Sample(qid="1", action=0, sentences=["A."], scores=[1.0], reason="late")
    assert collect.score_series(collect.Inputs([], ["test"], rounds=[teacher.Round(0, [late], ROOT)]), "test") == []


def test_corrections_and_verdicts(world):
    data = world.parts["details"]["corrections"]
    first, _, third, fourth = (data[world.row[qid]] for qid in world.splits["train"])
    qid, last = world.splits["train"][0], world.splits["train"][-1]
    assert first["original"] == f"The capital is Town{qid}. It is. It is."
    assert first["diff"] == [["same", f"The capital is Town{qid}. It is."], ["del", "It is."]]
    assert fourth["diff"] == [["same", "The capital is"], ["del", f"Hut{last}."], ["ins", f"Town{last}."]]
    assert third["reason"] == "no_final" and "diff" not in third and third["reply"] == "I cannot help."
    (file,) = world.main["verdicts"]
    assert file["rows"][world.row["2"]] == [["ab", "a"], ["ba", "b"]] and len(file["rows"]) == 4


def test_a_stage_shows_the_teachers_scores_where_it_scored_that_text(tmp_path):
    problems, _ = make_problems()
    write_predictions(tmp_path, "test", problems, ["2", "3"], ["Solution: It is so. Yes."] * 2)
    stage = stages.read_stage(f"x={tmp_path}", ["test"], {}, problems)
    stages.score_stages([stage], problems, {("2", ("It is so.", "Yes.")): [0.9, 0.1]})
    own, other = stage.splits["test"].scores
    assert stage.splits["test"].by_teacher == 1 and own == [0.9, 0.1]
    assert other == reference.score_sentences(problems["3"], ["It is so.", "Yes."])


def test_gold_texts_are_read_once_for_all_stages(tmp_path, gold_read):
    problems, splits = make_problems()
    for name, ending in (("a", "Yes."), ("b", "No."), ("c", "Maybe.")):
        texts = [f"Solution: It is Town{qid}. {ending}" for qid in splits["test"]]
        write_predictions(tmp_path / name, "test", problems, splits["test"], texts)
    found = [stages.read_stage(f"{name}={tmp_path / name}", ["test"], {}, problems) for name in "abc"]
    stages.score_stages(found, problems, {})
    for stage in found:
        stages.stage_figures(stage.splits["test"], problems)
    stages.changes([(stage.name, stage.splits["test"]) for stage in found], problems)
    assert sorted(gold_read) == sorted(problems[qid]["question"] for qid in splits["test"])


def test_released_files_without_ids_follow_the_split(tmp_path):
    problems, splits = make_problems()
    write_predictions(tmp_path, "test", problems, splits["test"], ["The answer is (B)."] * 8)
    path = tmp_path / "predictions_ans_test.json"
    data = json.loads(path.read_text())
    del data["qids"]
    files.write_json(path, data | {"labels": ["The answer is (B)."] * 8})
    made = stages.read_split(path, splits["test"], problems)
    assert made.file.qids == splits["test"] and made.answers == [1] * 8 and not made.has_rationales
    files.write_json(path, {"preds": ["The answer is (C)."] * 8})  # question 1 has two options
    assert stages.read_split(path, splits["test"], problems).answers == [stages.UNPARSED] + [2] * 7
    with pytest.raises(cli.UserError, match="8 rationales.*7"):
        stages.read_split(path, splits["test"][:-1], problems)


def test_prediction_files_alone_make_a_report(tmp_path, monkeypatch, capsys):
    """Neither data nor images nor RL: what the files say is shown, and what is missing is named."""
    monkeypatch.chdir(tmp_path)
    data = {"num_fail": 4, "scores": {}, "preds": ["Solution: It is so."], "labels": ["Solution: It is."]}
    files.write_json("predictions_ans_test.json", data | {"prompts": ["Question: Is it so?"]})
    files.write_json("other_test.json", data | {"prompts": ["Another prompt"]})
    report.main(["--stage", "mine=predictions_ans_test.json", "--stage", "other=other_test.json"])
    parts = parts_of((tmp_path / "report.html").read_text())
    (question,) = parts["main"]["questions"]
    assert (question["qid"], question["question"], question["answer"]) == ("row-0", "Question: Is it so?", -1)
    assert parts["main"]["preds"][0]["0"]["s"] == ["It is so."]
    assert parts["main"]["overview"]["curves"] == [] and "--data_root" in parts["main"]["notes"][0]
    assert "1 questions, 2 stages" in capsys.readouterr().out


def test_of_many_train_questions_the_dropped_ones_are_shown_first():
    samples = [teacher.Sample(qid=str(n), action=0, sentences=["A."], scores=[1.0]) for n in range(100)]
    samples[77].reason = samples[99].reason = "no_reply"
    inputs = collect.Inputs([], ["test"], rounds=[teacher.Round(0, samples, ROOT)])
    qids, left_out = collect.choose_questions(inputs, 10)
    assert len(qids) == 10 and left_out == 90 and {"77", "99"} <= set(qids)
    assert qids == sorted(qids, key=int) and int(qids[0]) < 10 and int(qids[7]) > 60, "evenly spread"
    assert len(collect.choose_questions(inputs, 100)[0]) == 100 and collect.choose_questions(inputs, 0)[0] == []


def test_the_spend_log_tells_the_cost_and_late_replies_are_named(tmp_path):
    log = tmp_path / "teacher/spend.jsonl"
    log.parent.mkdir()
    entries = [
        {"id": "a", "item": "0/p0/1", "most_usd": 1.0}, {"id": "a", "usd": 0.5, "outcome": "reply"},
        {"id": "b", "item": "0/p0/2", "most_usd": 2.0},
    ]  # fmt: skip
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    data = teacher.cost("x", [{"model": "m", "cost_usd": 0.1}], tmp_path)
    assert (data["usd"], data["unknown_usd"], data["models"]) == (0.5, 2.0, ["m"])
    assert teacher.cost("x", [{"model": "m", "cost_usd": None}], tmp_path / "none")["usd"] is None
    abouts = [{"model": model, "cost_usd": usd, "usage": {"input_tokens": 5, "output_tokens": 2}, "time": time}
              for model, usd, time in (("m", 0.25, "2026-01-02"), ("k", 0.5, "2026-01-01"))]  # fmt: skip
    copied = abouts[0] | {"copied_from": "0/p0/1", "time": "2026-01-03"}
    cost = teacher.cost("x", [*abouts, copied, {}], tmp_path / "none")
    assert (cost["replies"], cost["asked"], cost["tokens_in"], cost["tokens_out"]) == (3, 2, 10, 4)
    assert (cost["usd"], cost["models"]) == (1.0, ["k", "m"])
    assert (cost["began"], cost["ended"]) == ("2026-01-01", "2026-01-03")
    scored, late = (teacher.Sample(qid=qid, action=0, sentences=["A."], scores=[0.3]) for qid in "12")
    table = tmp_path / "samples_round_0.jsonl"
    line = {"qid": "1", "action": 0, "reward": 0.5, "sentences": [{"text": "A.", "score": 1.0, "advantage": 0.2}]}
    empty = {"qid": "3", "action": 0, "reward": 0.0, "sentences": []}
    table.write_text(json.dumps(line) + "\n" + json.dumps(empty) + "\n")
    each = teacher.Round(0, [scored, late], tmp_path)
    teacher.add_training_view(each, table)
    assert (scored.reason, scored.scores, scored.advantages, late.reason) == (None, [1.0], [0.2], "late")
    assert each.samples[2].qid == "3" and each.samples[2].scores == []


def test_images_are_copied_or_embedded_once(world, tmp_path):
    assert world.parts["images"]["of"] == {"0": [0]}
    (embedded,) = world.parts["images"]["list"]
    assert embedded["src"].startswith("data:image/png;base64,") and (embedded["w"], embedded["h"]) == (60, 40)
    picture(tmp_path / "images/2/image.png", (2000, 1000))
    (tmp_path / "images/3").mkdir()
    (tmp_path / "images/3/image.png").write_text("no image")
    from tools.report_page.pictures import collect_images

    found = collect_images(tmp_path / "images", ["2", "3"], "copy", tmp_path / "out/page.html")
    assert found["of"] == {0: [0]} and found["list"][0]["src"] == "page_images/2/image.png"
    assert (tmp_path / "out/page_images/2/image.png").stat().st_size
    small = collect_images(tmp_path / "images", ["2"], "embed", tmp_path / "out/page.html")["list"][0]
    assert (small["w"], small["h"]) == (2000, 1000) and len(small["src"]) < 60_000


def test_questions_folder_alone(world, tmp_path):
    """A questions folder outside a run: scores from the replies themselves."""
    output = tmp_path / "r.html"
    place = world.root / "rl/questions_round0"
    report.main(["--questions_dir", str(place), "--data_root", str(world.root / "data"), "--output", str(output)])
    parts = parts_of(output.read_text())
    samples = [each for many in parts["details"]["samples"].values() for each in many]
    assert len(samples) == 8 == len(handoff.iter_items(place))
    assert sum("p" in each for each in samples) == 7 and not any("adv" in each for each in samples)


# -- bad input -----------------------------------------------------------------------------------------------------

BAD = {
    "nothing": ([], "nothing to show"),
    "no_name": (["--stage", "folder"], "NAME=FOLDER"),
    "no_folder": (["--stage", "a=nowhere"], "nowhere does not exist"),
    "twice": (["--stage", "a=x", "--stage", "a=y"], "named twice"),
    "both": (["--run", ".", "--questions_dir", "."], "give one of --run and --questions_dir"),
    "no_run": (["--run", "nowhere"], "--run: nowhere is not a folder"),
    "empty_stage": (["--stage", "a=empty"], "no predictions_ans"),
    "no_questions": (["--questions_dir", "empty"], "holds no"),
    "bad_root": (["--stage", "a=ok.json", "--data_root", "empty"], "--data_root"),
    "stranger": (["--stage", "a=ok.json", "--data_root", "data"], "question 999"),
    "scores": (["--stage", "a=scores.json"], "scores.json: scores are not"),
    "labels": (["--stage", "a=labels.json"], "labels.json: labels is no list of one text for each of its 1 rows"),
    "metrics": (["--run", "run"], "metrics.jsonl: line 1 has no kind, round and update"),
    "samples": (["--run", "cut"], "samples_round_0.jsonl: line 1 is not JSON"),
    "verdicts": (["--stage", "a=ok.json", "--win_rate", "ok.json"], '"systems"'),
    "times": (["--stage", "a=ok.json", "--times", "list.json"], "--times"),
    "no_train": (["--stage", "a=ok.json", "--train_questions", "5"], "--train_questions has no effect"),
    "empty_run": (["--run", "empty"], "neither metrics.jsonl nor questions"),
    "captions": (["--stage", "a=ok.json", "--data_root", "data", "--caption_file", "nowhere"], "--caption_file"),
    "images": (["--stage", "a=ok.json", "--images", "nowhere"], "--images"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_end_with_one_line(name, tmp_path, monkeypatch):
    argv, words = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    problems, splits = make_problems()
    files.write_json("data/scienceqa/problems.json", problems)
    files.write_json("data/scienceqa/pid_splits.json", splits)
    files.write_json("ok.json", {"preds": ["Solution: a."], "qids": ["999"]})
    files.write_json("list.json", ["x"])
    one = {"preds": ["Solution: a."], "qids": ["1"]}
    files.write_json("scores.json", one | {"scores": {"rationale": {"rouge": "high"}}})
    files.write_json("labels.json", one | {"labels": ["x", "y"]})
    files.write_text("run/metrics.jsonl", '{"loss": 1}\n')
    handoff.write_rationale(handoff.question_dir("cut/questions", 0, 0, "1"), ["So."])
    files.write_text("cut/samples_round_0.jsonl", '{"qid": "1", "acti')
    if name in ("verdicts", "times", "images", "captions"):
        files.write_json("ok.json", one)
    with pytest.raises(cli.UserError) as error:
        report.main(argv)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_a_released_file_of_rationales_shows_no_answers(tmp_path, few):
    for asked, parts in (("A", (True, False)), ("E", (False, True)), ("ALE", (True, True))):
        released_file(tmp_path / f"{asked}.json", few.problems, few.qids, asked, garbled=7)
        read = stages.read_split(tmp_path / f"{asked}.json", few.qids, few.problems)
        assert (read.has_answers, read.has_rationales) == parts
        shown = stages.stage_figures(read, None)
        assert ("acc_average" in shown["scores"]) == ("num_fail" in shown) == parts[0]
        assert ("similarity" in shown["scores"]) == parts[1] and "similariry" not in shown["scores"]


def test_figures_that_are_no_numbers_never_blank_the_page(world, tmp_path, monkeypatch):
    """NaN and infinity in metrics, scores, times, trainer states, win rates and the spend log."""
    monkeypatch.chdir(tmp_path)
    nan = float("nan")
    lines = [json.loads(line) for line in (world.root / "rl/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        odd = float("inf") if line["update"] == 2 else nan
        line |= {name: odd for name, value in line.items() if isinstance(value, float)}
    files.write_text("run/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    scores = {"rationale": {"bleu1": nan, "rouge": float("inf"), "bleu4": 20.0}}
    verdicts = {"systems": ["A", "B"], "verdicts": [], "judge": {"model": nan}, "summary": {"identical": nan}}
    for name, data in (
        ("stage/predictions_ans_test", {"preds": ["Solution: So."], "qids": ["1"], "scores": scores}),
        ("stage/trainer_state", {"log_history": [{"train_runtime": nan}]}), ("win_rate", verdicts),
    ):  # fmt: skip
        files.write_json(f"{name}.json", data)
    report.main(["--stage", "s=stage", "--run", "run", "--win_rate", "win_rate.json", "--image_mode", "none"])
    parts = parts_of((tmp_path / "report.html").read_text())
    shown = parts["main"]["overview"]
    assert shown["figures"][0]["scores"] == {"bleu4": 20.0}
    assert shown["rounds"][0]["reward"] is None and shown["rounds"][0]["rationales"] == 7 and shown["times"] == []
    assert page.as_json({"a": [1.5, nan, -float("inf")], "b": "<NaN>"}) == '{"a":[1.5,null,null],"b":"\\u003cNaN>"}'


def test_unread_answers_above_5_percent_are_noted(tmp_path, few, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for garbled, noted in ((4, True), (3, False)):  # of 60
        released_file(tmp_path / "file.json", few.problems, few.qids, "A", garbled=garbled)
        report.main(["--stage", "it=file.json", "--data_root", str(few.root), "--image_mode", "none"])
        notes = parts_of((tmp_path / "report.html").read_text())["main"]["notes"]
        note = f"it (file.json): {garbled} of 60 answers could not be read; each counts as a random choice"
        assert notes == [note] * noted


def test_changes_are_paired_by_question_whatever_the_order(tmp_path):
    problems, splits = make_problems(test=12)
    qids = splits["test"]
    right = [f"Solution: {problems[qid]['solution']}" for qid in qids]
    wrong = [text if i % 3 else "Solution: Think about it." for i, text in enumerate(right)]
    order = [*range(1, 12), 0]
    write_predictions(tmp_path / "a", "test", problems, qids, wrong)
    write_predictions(tmp_path / "b", "test", problems, [qids[i] for i in order], [right[i] for i in order])
    write_predictions(tmp_path / "c", "test", problems, qids[:6], right[:6])  # other questions: not compared
    found = [stages.read_stage(f"{name}={tmp_path / name}", ["test"], {}, problems) for name in ("a", "a", "b", "c")]
    stages.score_stages(found, problems, {})
    (same, better) = stages.changes([(stage.name, stage.splits["test"]) for stage in found], problems)
    assert same == ["a - a", *(f"{zero} [{zero}, {zero}], not distinguishable" for zero in ("+0.000", "+0.0", "+0.0"))]
    one, other = (figures_by_question(problems, qids, texts) for texts in (right, wrong))
    for cell, key, digits in zip(better[1:], ("score", "concludes", "covered"), (3, 1, 1), strict=True):
        difference = sum(a - b for a, b in zip(one[key], other[key], strict=True)) / 12
        low, high = (float(end) for end in re.search(r"\[(.*), (.*)\]", cell).groups())
        assert cell.startswith(f"{difference:+.{digits}f} [") and low <= difference <= high
        assert ("not distinguishable" in cell) == (low <= 0 <= high)
    assert float(better[1].split()[0]) > 0.1
