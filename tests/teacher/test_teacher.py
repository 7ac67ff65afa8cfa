"""haiku.py and haiku_for_correction_feedback.py with the real anthropic client against a local Messages API.

Real questions, images and sentences; the server checks what arrives (tests/api_server.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import haiku
from ares import cli
from ares.images import media_type
from ares.sentences import split_text
from teacher import api_teacher, claude, handoff
from teacher.api_responses import said
from teacher.budget import cost_usd, price_of
from teacher.interface import CORRECT, SCORE, Request, custom_id
from teacher.prompts import PROMPT_VERSION, WORDING, correction_request, scoring_request
from teacher.reply_files import read_scores
from tests.api_server import KEY, Fault, fill_form
from tests.conftest import one_line_error, run_script
from tests.teacher.teacher_tools import (
    CHOICES,
    PICTURE,
    TEXT,
    ask,
    lay_out,
)


@pytest.fixture
def questions(tmp_path, sample, problems):
    """A questions folder as RL and preprocessing leave it: 2 actions of 3 questions; text's are identical in both."""
    root = tmp_path / "questions"
    for action in (0, 1):
        for qid in (PICTURE, CHOICES, TEXT):
            sentences = split_text(problems[qid]["solution"].replace("\n", "\\n"))
            if qid != TEXT:
                sentences = [f"Attempt {action}: look closely.", *sentences]
            lay_out(root, action, qid, sentences, problems, sample)
    handoff.mark_exported(root)
    return root


def folders(questions):
    return [item.folder for item in handoff.iter_items(questions)]


def sidecar(folder):
    return json.loads((Path(folder) / handoff.SIDECAR).read_text())


# -- asking ----------------------------------------------------------------------------------------------


def test_answers_are_written_and_images_travel_for_every_action(server, questions, capsys):
    server.respond = fill_form
    ask(server, questions)
    assert "6 rationales: 0 had a reply, 6 answered now (5 requests, 1 copies), 0 unusable" in capsys.readouterr().out
    assert len(server.asked) == 5  # the text question's two equal rationales are one request
    for folder in folders(questions):
        sentences = handoff.read_rationale(folder)
        assert (folder / handoff.SCORES).read_text().split() == ["0.8"] * len(sentences)
    pictures = [asked for asked in server.asked if asked.images]
    assert len(pictures) == 4  # picture and choice images, in both actions
    assert sorted(len(asked.images) for asked in pictures) == [1, 1, 2, 2]
    for asked in pictures:
        assert all(kind == "image/png" for kind, _, _ in asked.images)
        assert asked.content_types == ["image"] * len(asked.images) + ["text", "text"]
    for action in (0, 1):
        assert handoff.is_done(questions, action)


def test_the_request_is_the_file_and_fits_the_model(server, questions):
    ask(server, questions)
    texts = {(folder / handoff.REQUEST).read_text() for folder in folders(questions)}
    assert {asked.text for asked in server.asked} == texts
    assert {tuple(asked.notes) for asked in server.asked} == {(WORDING.structured["score"],)}
    body = server.asked[0].body
    assert body["model"] == "claude-haiku-5-5" and body["thinking"] == {"type": "disabled"}
    assert "temperature" not in body and body["max_tokens"] >= 300


def test_older_family_gets_a_temperature(server, questions):
    ask(server, questions, "--teacher_model", "claude-haiku-4-5-20251001")
    assert server.asked[0].body["temperature"] == 0.0 and "thinking" not in server.asked[0].body


def test_sidecar_says_who_wrote_the_reply(server, questions):
    ask(server, questions)
    found = sidecar(handoff.question_dir(questions, 0, 0, PICTURE))
    assert found["teacher"] == "claude" and found["model"] == "claude-haiku-5-5"
    assert found["prompt_version"] == PROMPT_VERSION and found["request_id"].startswith("req_")
    assert found["stop_reason"] == "end_turn" and found["images"] == ["image.png"] and found["attempt"] == 1
    usage = found["usage"]
    assert found["cost_usd"] == pytest.approx((usage["input_tokens"] * 0.10 + usage["output_tokens"] * 0.50) / 1e6)
    copy = sidecar(handoff.question_dir(questions, 1, 0, TEXT))
    assert copy["copied_from"] == f"0/p0/{TEXT}" and copy["cost_usd"] == 0


def test_the_key_is_nowhere(server, questions, capsys):
    ask(server, questions)
    server.faults.append(Fault(400, f"what is {KEY}?"))
    (handoff.question_dir(questions, 0, 0, PICTURE) / handoff.REPLY).unlink()
    with pytest.raises(cli.UserError) as error:
        ask(server, questions, "--no-cache")
    out = capsys.readouterr()
    assert KEY not in out.out + out.err + str(error.value) and "***" in str(error.value)
    for file in questions.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()


def test_running_again_asks_only_for_what_is_missing(server, questions):
    ask(server, questions)
    before = len(server.asked)
    ask(server, questions)
    assert len(server.asked) == before
    gone = handoff.question_dir(questions, 1, 0, PICTURE)
    (gone / handoff.REPLY).unlink()
    (handoff.question_dir(questions, 0, 0, CHOICES) / handoff.REPLY).write_text("I would rather not.")
    ask(server, questions, "--no-cache")
    assert len(server.asked) == before + 2
    (handoff.question_dir(questions, 0, 0, TEXT) / handoff.REPLY).unlink()
    ask(server, questions)
    assert len(server.asked) == before + 2  # its twin in action 1 has the reply


def test_some_actions_and_no_done(server, questions):
    ask(server, questions, "--actions", "1", "--no-done")
    assert len(server.asked) == 3 and not handoff.is_done(questions, 1)
    ask(server, questions, "--actions", "1")
    assert len(server.asked) == 3 and handoff.is_done(questions, 1) and not handoff.is_done(questions, 0)
    with pytest.raises(cli.UserError, match="--actions.*no action 7"):
        ask(server, questions, "--actions", "7")


def test_without_the_export_signal_no_done_is_written(server, questions, capsys):
    (questions / handoff.EXPORTED).unlink()
    ask(server, questions)
    assert handoff.EXPORTED in capsys.readouterr().out
    assert not (questions / "0" / handoff.DONE).exists() and (folders(questions)[0] / handoff.SCORES).exists()


def test_a_jpeg_called_png_travels_as_jpeg(server, questions):
    from PIL import Image

    folder = handoff.question_dir(questions, 0, 0, PICTURE)
    image = Image.open(folder / "image.png").convert("RGB")
    (folder / "image.png").unlink()  # a hard link to the sample
    image.save(folder / "image.png", format="JPEG")
    ask(server, questions)
    assert {kind for asked in server.asked for kind, _, _ in asked.images} == {"image/png", "image/jpeg"}


def test_an_absent_image_is_said(server, questions, sample, tmp_path, capsys):
    (handoff.question_dir(questions, 0, 0, PICTURE) / "image.png").unlink()
    (tmp_path / "no-images").mkdir()
    ask(server, questions, "--data_root", str(sample / "ScienceQA/data"), "--images", str(tmp_path / "no-images"))
    assert "1 asked without the image" in capsys.readouterr().out
    assert "not found" in sidecar(handoff.question_dir(questions, 0, 0, PICTURE))["text_only"]
    shutil.rmtree(questions / "1")
    (handoff.question_dir(questions, 0, 0, PICTURE) / handoff.REPLY).unlink()
    ask(server, questions, "--images", str(sample / "images"))  # found where the flag says
    assert server.asked[-1].images


# -- faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [Fault(429, headers={"retry-after": "1"}), Fault(529), Fault(500), Fault(408), Fault(0, kind="reset")]
)
def test_temporary_errors_are_retried(server, questions, fault):
    server.faults.append(fault)
    ask(server, questions)
    assert handoff.is_done(questions, 0) and len(server.asked) == 6  # one was repeated


@pytest.mark.parametrize(
    "fault, words",
    [
        (Fault(400, "messages: too odd"), ("messages: too odd", "question")),
        (Fault(401, "invalid x-api-key"), ("ANTHROPIC_API_KEY", "does not accept")),
        (Fault(402, "no credit"), ("billing", "no credit")),
        (Fault(403, "not your workspace"), ("ANTHROPIC_API_KEY", "not your workspace")),
        (Fault(413, "too large"), ("too large", "shrink")),
        (Fault(429, "limit", error_code="enforced_spend_limit_reached"), ("spend limit", "run this again")),
    ],
)
def test_permanent_errors_stop_at_once_in_one_line(server, questions, fault, words):
    server.faults.extend([fault] * 3)
    with pytest.raises(cli.UserError) as error:
        ask(server, questions, "--concurrency", "1")
    assert len(server.asked) == 1, "it is not repeated"
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)
    server.faults.clear()
    ask(server, questions)
    assert handoff.is_done(questions, 0)


def test_replies_in_flight_at_a_failure_are_saved(server, questions):
    server.latency = 0.5  # all three have left before the first is refused
    server.faults.append(Fault(401))
    with pytest.raises(cli.UserError):
        ask(server, questions, "--concurrency", "3")
    assert 1 <= sum(handoff.has_reply(folder) for folder in folders(questions)) <= 3  # 2 replies, one may be copied


@pytest.mark.parametrize(
    "model, words", [("claude-3-haiku-20240307", ("retired", "April 2026")), ("claude-nope", ("not known",))]
)
def test_unknown_and_retired_models(server, questions, model, words):
    with pytest.raises(cli.UserError) as error:
        ask(server, questions, "--teacher_model", model)
    assert all(word in str(error.value) for word in ("--teacher_model", model, "claude-haiku-5-5", *words))


def test_overload_that_lasts(server, questions, monkeypatch):
    monkeypatch.setattr(api_teacher, "MAX_RETRIES", 1)
    server.faults.extend([Fault(529)] * 20)
    with pytest.raises(cli.UserError, match="529.*same command again"):
        ask(server, questions, "--concurrency", "1")


def test_server_that_is_not_there(questions, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setattr(api_teacher, "MAX_RETRIES", 0)
    with pytest.raises(cli.UserError, match="--base_url.*127.0.0.1:9"):
        haiku.main(["--questions_dir", str(questions), "--base_url", "http://127.0.0.1:9", "--data_root", "none"])


def test_unusable_replies_are_asked_again_then_reported(server, questions, problems, capsys):
    replies = iter([("no idea", "end_turn"), ("", "refusal"), ('{"a": 0.5', "max_tokens")])

    def respond(asked):
        if f"Question: {problems[PICTURE]['question']}\n" not in asked.text:
            return fill_form(asked)
        return next(replies, ("no", "end_turn"))

    server.respond = respond
    with pytest.raises(cli.UserError, match="2 of 6 replies are unusable.*--accept-missing") as error:
        ask(server, questions, "--attempts", "2", "--concurrency", "1")
    assert "refusal 1" in str(error.value) and "no_json 1" in str(error.value)  # the last reply's reason each
    assert len(server.asked) == 3 + 2 * 2 and not handoff.is_done(questions, 0)
    assert (handoff.question_dir(questions, 0, 0, PICTURE) / handoff.REASON).exists()
    ask(server, questions, "--accept-missing", "--attempts", "1")
    out = capsys.readouterr().out
    assert handoff.is_done(questions, 0) and "RL will drop 1 (no_json 1)" in out
    server.respond = fill_form
    ask(server, questions)
    assert read_scores(handoff.question_dir(questions, 0, 0, PICTURE))


def test_complete_scores_count_though_the_reply_stopped_at_max_tokens(server, questions):
    """The object is closed; what was cut is the remark behind it."""
    server.respond = lambda asked: (fill_form(asked)[0] + "\n\nNote: the second sen", "max_tokens")
    ask(server, questions, "--attempts", "1")
    assert handoff.is_done(questions, 0)
    assert all(read_scores(folder) for folder in folders(questions))


def test_after_a_bug_the_replies_in_flight_are_saved(server, questions, monkeypatch):
    """Six requests in flight, the first of which meets a bug of ours: the other five were paid for."""
    server.latency = 0.3
    monkeypatch.setattr(api_teacher, "START", 6)
    taken = []
    real = claude.ClaudeTeacher.reply

    def reply(self, message, *about, **more):
        taken.append(message)
        if len(taken) == 1:
            raise LookupError("a bug")
        return real(self, message, *about, **more)

    monkeypatch.setattr(claude.ClaudeTeacher, "reply", reply)
    with pytest.raises(LookupError, match="a bug"):
        ask(server, questions, "--concurrency", "6", "--max_usd", "1")
    assert len(taken) == len({asked.text for asked in server.asked}) == 5  # one rationale is there twice
    answered = [item.folder for item in handoff.iter_items(questions) if handoff.has_reply(item.folder)]
    assert len({(folder / handoff.REQUEST).read_text() for folder in answered}) == 4


# -- what a user gets wrong --------------------------------------------------------------------------------


def test_missing_key_is_said_first_and_ends_with_2(tmp_path):
    done = run_script("haiku.py", "--questions_dir", tmp_path / "none", check=False, env={"ANTHROPIC_API_KEY": ""})
    one_line_error(done, "ANTHROPIC_API_KEY", "--teacher reference")
    done = run_script("haiku_for_correction_feedback.py", check=False, env={"ANTHROPIC_API_KEY": " \n"})
    one_line_error(done, "ANTHROPIC_API_KEY", "--teacher reference")


def test_flags_that_would_be_ignored_are_refused(tmp_path):
    with pytest.raises(cli.UserError) as error:
        haiku.parse_args(["--teacher", "reference", "--teacher_model", "x", "--attempts", "0"])
    assert all(flag in str(error.value) for flag in ("--teacher_model", "--attempts must be"))


@pytest.mark.parametrize("flag", ["--max_usd", "--timeout", "--poll_seconds", "--watch"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_none(flag, value, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    with pytest.raises(cli.UserError, match=f"{flag} must be"):
        haiku.parse_args([flag, value])
    with pytest.raises(cli.UserError, match="--price"):
        haiku.parse_args(["--price", "1", value])


def test_an_address_or_a_cache_that_is_none(server, questions, tmp_path):
    with pytest.raises(cli.UserError, match="--base_url: localhost:8000 is no address; it begins with http"):
        haiku.parse_args(["--base_url", "localhost:8000", "--estimate"])
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(cli.UserError, match="--cache: cannot write to"):
        ask(server, questions, "--cache", str(file))
    assert not server.log


def test_a_reply_that_utf8_cannot_spell_is_kept(server, questions):
    """Half of a surrogate pair: JSON can carry it."""
    server.respond = lambda asked: (f"\ud83d Here: {fill_form(asked)[0]}", "end_turn")
    ask(server, questions)
    assert all((folder / handoff.SCORES).exists() for folder in folders(questions))


def test_no_part_of_the_key_is_said():
    echo = {"error": {"message": "x" * 290 + KEY}}
    error = type("Error", (Exception,), {"body": echo})()
    assert KEY[:6] not in said(error, KEY)


def test_requests_that_are_missing_or_of_another_export(server, questions):
    folder = handoff.question_dir(questions, 1, 0, TEXT)
    handoff.write_rationale(folder, ["Quite another rationale."])
    (handoff.question_dir(questions, 0, 0, TEXT) / handoff.REQUEST).unlink()
    with pytest.raises(cli.UserError, match="2 of 6 rationales have no input_for_llm.txt.*processing_sentence_level"):
        ask(server, questions)
    assert not server.asked
    with pytest.raises(cli.UserError, match="--questions_dir.*did you mean"):
        ask(server, questions.parent)


def test_a_request_for_more_sentences_than_the_rationale_has_does_not_fit(server, questions):
    folder = handoff.question_dir(questions, 0, 0, PICTURE)
    sentences = handoff.read_rationale(folder)
    for other in (sentences[:-1], sentences[::-1], [*sentences, sentences[0]]):
        handoff.write_rationale(folder, other)
        with pytest.raises(cli.UserError, match="1 of 6 rationales have no input_for_llm.txt that fits"):
            ask(server, questions)
    assert not server.asked


def test_an_unusable_image_is_named(server, questions):
    image = handoff.question_dir(questions, 0, 0, PICTURE) / "image.png"
    image.unlink()
    image.write_bytes(b"<html>not found</html>")
    with pytest.raises(cli.UserError, match=f"image.png of question {PICTURE} is no PNG"):
        ask(server, questions)


def test_rationale_without_sentences_does_not_hold_up_rl(server, questions):
    folder = handoff.question_dir(questions, 0, 0, TEXT)
    handoff.write_rationale(folder, [])
    ask(server, questions)
    assert handoff.is_done(questions, 0) and not (folder / handoff.REPLY).exists()


# -- the reference Teacher ---------------------------------------------------------------------------------


def test_reference_teacher_goes_through_the_same_files(questions, sample, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    data_root = sample / "ScienceQA/data"
    haiku.main(["--questions_dir", str(questions), "--teacher", "reference", "--data_root", str(data_root)])
    folder = handoff.question_dir(questions, 0, 0, TEXT)
    assert read_scores(folder) == [1.0] * len(handoff.read_rationale(folder))
    assert sidecar(folder)["teacher"] == "reference" and sidecar(folder)["cost_usd"] == 0
    assert handoff.is_done(questions, 0) and handoff.is_done(questions, 1)


def test_form_of_the_request_is_the_rationale_file(questions, problems):
    for folder in folders(questions):
        form = (folder / handoff.RATIONALE).read_text().strip()
        assert (folder / handoff.REQUEST).read_text().endswith(form)


# -- small parts -------------------------------------------------------------------------------------------


def test_custom_ids_fit_the_api():
    assert custom_id(SCORE, 3, 0, "12726") == "score-3-0-12726"
    for qid in ("a b", "x" * 80, "é"):
        assert len(custom_id(CORRECT, 0, 0, qid)) <= 64 and custom_id(CORRECT, 0, 0, qid).isascii()


def test_media_types_by_content():
    assert media_type(b"\x89PNG\r\n\x1a\n....") == "image/png"
    assert media_type(b"RIFF\x00\x01\n\x03WEBP") == "image/webp"
    assert media_type(b"GIF89a......") == "image/gif" and media_type(b"<html>") is None


def test_room_for_the_reply():
    request = Request("id", SCORE, "1", "text", ("a" * 600, "b" * 600))
    quiet, thinking = (claude.ClaudeTeacher(model).max_tokens(request) for model in ("claude-haiku-5-5", "mine"))
    assert 600 <= quiet <= 1200 and thinking - quiet >= 1024
    assert cost_usd(price_of("my-gateway-model"), {"input_tokens": 5}) is None
    assert cost_usd(price_of("claude-haiku-4-5-20251001"), {"input_tokens": 10**6, "output_tokens": 10**6}) == 6.0


def test_teacher_prompts_hold_what_the_teacher_needs(problems):
    problem = problems[PICTURE]
    text = scoring_request(problem, ["One.", 'Two "2".'])
    for words in (problem["question"], problem["hint"].strip(), problem["choices"][problem["answer"]], "the image"):
        assert words in text
    assert text.endswith('{\n"One.": xxx,\n"Two "2".": xxx\n}')
    assert "the image" not in scoring_request(problems[TEXT], ["One."])
    assert correction_request(problem, "It is {one}.\nSo").endswith("It is {one}. So\n")
