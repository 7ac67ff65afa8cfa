"""haiku.py and haiku_for_correction_feedback.py with the real anthropic client against a local Messages API.

Real questions, images and sentences; the server checks what arrives (tests/api_server.py).
"""

from __future__ import annotations

import shutil

import pytest

import haiku
from ares.images import media_type
from ares.sentences import split_text
from teacher import api_teacher, claude, handoff
from teacher.interface import CORRECT, SCORE, Request, custom_id
from teacher.prompts import PROMPT_VERSION, WORDING, correction_request, scoring_request
from teacher.reply_files import read_scores
from tests.api_server import Fault, fill_form
from tests.conftest import one_line_error, run_script
from tests.teacher.teacher_tools import CHOICES, HAIKU_45, PICTURE, TEXT, lay_out, sidecar, stops


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


@pytest.fixture
def folder_of(questions):
    return lambda action, qid: handoff.question_dir(questions, action, 0, qid)


# -- asking ----------------------------------------------------------------------------------------------


def test_answers_are_written_and_requests_hold_what_they_should(server, world, folder_of, capsys):
    server.respond = fill_form
    world.ask()
    assert "6 rationales: 0 had a reply, 6 answered now (5 requests, 1 copies), 0 unusable" in capsys.readouterr().out
    assert len(server.asked) == 5  # the text question's two equal rationales are one request
    assert world.done == [0, 1]
    for item in world.items:
        sentences = handoff.read_rationale(item.folder)
        assert (item.folder / handoff.SCORES).read_text().split() == ["0.8"] * len(sentences)
        form = (item.folder / handoff.RATIONALE).read_text().strip()
        assert (item.folder / handoff.REQUEST).read_text().endswith(form)
    # the request is the file, with the images in every action, and fits the model
    assert {asked.text for asked in server.asked} == {world.request(number) for number in range(6)}
    assert {tuple(asked.notes) for asked in server.asked} == {(WORDING.structured["score"],)}
    pictures = [asked for asked in server.asked if asked.images]
    assert sorted(len(asked.images) for asked in pictures) == [1, 1, 2, 2]  # picture and choice images, twice
    for asked in pictures:
        assert all(kind == "image/png" for kind, _, _ in asked.images)
        assert asked.content_types == ["image"] * len(asked.images) + ["text", "text"]
    body = server.asked[0].body
    assert body["model"] == "claude-haiku-5-5" and body["thinking"] == {"type": "disabled"}
    assert "temperature" not in body and body["max_tokens"] >= 300
    # the sidecar says who wrote the reply
    about = sidecar(folder_of(0, PICTURE))
    expected = {"teacher": "claude", "model": "claude-haiku-5-5", "prompt_version": PROMPT_VERSION,
                "stop_reason": "end_turn", "images": ["image.png"], "attempt": 1}  # fmt: skip
    assert expected.items() <= about.items() and about["request_id"].startswith("req_")
    usd = (about["usage"]["input_tokens"] * 0.10 + about["usage"]["output_tokens"] * 0.50) / 1e6
    assert about["cost_usd"] == pytest.approx(usd)
    copy = sidecar(folder_of(1, TEXT))
    assert copy["copied_from"] == f"0/p0/{TEXT}" and copy["cost_usd"] == 0


def test_older_family_gets_a_temperature(server, world):
    world.ask("--teacher_model", HAIKU_45)
    assert server.asked[0].body["temperature"] == 0.0 and "thinking" not in server.asked[0].body


def test_running_again_asks_only_for_what_is_missing(server, world, folder_of):
    for _ in range(2):
        world.ask()
        assert len(server.asked) == 5
    (folder_of(1, PICTURE) / handoff.REPLY).unlink()
    (folder_of(0, CHOICES) / handoff.REPLY).write_text("I would rather not.")
    world.ask("--no-cache")
    assert len(server.asked) == 5 + 2
    (folder_of(0, TEXT) / handoff.REPLY).unlink()
    world.ask()
    assert len(server.asked) == 5 + 2  # its twin in action 1 has the reply


def test_signals_of_some_actions_and_without_the_export(server, world, capsys):
    world.ask("--actions", "1", "--no-done")
    assert len(server.asked) == 3 and not world.done
    world.ask("--actions", "1")
    assert len(server.asked) == 3 and world.done == [1]
    world.stops("--actions.*no action 7", "--actions", "7")
    (world.root / handoff.EXPORTED).unlink()
    (world.root / "1" / handoff.DONE).unlink()
    capsys.readouterr()
    world.ask()
    assert handoff.EXPORTED in capsys.readouterr().out and world.answered == 6
    assert not list(world.root.glob(f"*/{handoff.DONE}"))


def test_images_are_sent_by_their_content_and_absent_ones_are_named(
    server, world, folder_of, sample, tmp_path, capsys
):
    from PIL import Image

    picture, other = (folder_of(action, PICTURE) / "image.png" for action in (0, 1))
    image = Image.open(other).convert("RGB")
    other.unlink()  # a hard link to the sample
    image.save(other, format="JPEG")
    picture.unlink()
    (tmp_path / "no-images").mkdir()
    data = ("--data_root", sample / "ScienceQA/data")
    world.ask(*data, "--images", tmp_path / "no-images")
    assert {kind for asked in server.asked for kind, _, _ in asked.images} == {"image/png", "image/jpeg"}
    assert "1 asked without the image" in capsys.readouterr().out
    assert "not found" in sidecar(picture.parent)["text_only"]
    shutil.rmtree(world.root / "1")
    (picture.parent / handoff.REPLY).unlink()
    world.ask("--images", sample / "images")  # found where the flag says
    assert server.asked[-1].images
    picture.write_bytes(b"<html>not found</html>")
    (picture.parent / handoff.REPLY).unlink()
    world.stops(f"image.png of question {PICTURE} is no PNG", "--no-cache")


def test_rationale_without_sentences_does_not_hold_up_rl(world, folder_of):
    handoff.write_rationale(folder_of(0, TEXT), [])
    world.ask()
    assert world.done == [0, 1] and not (folder_of(0, TEXT) / handoff.REPLY).exists()


def test_reference_teacher_goes_through_the_same_files(world, folder_of, sample, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    argv = ["--questions_dir", str(world.root), "--teacher", "reference", "--data_root", f"{sample}/ScienceQA/data"]
    haiku.main(argv)
    folder = folder_of(0, TEXT)
    assert read_scores(folder) == [1.0] * len(handoff.read_rationale(folder)) and world.done == [0, 1]
    assert sidecar(folder)["teacher"] == "reference" and sidecar(folder)["cost_usd"] == 0


# -- faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, words, status",
    [
        (Fault(400, "messages: too odd"), "question.*messages: too odd", 2),
        (Fault(401, "invalid x-api-key"), "ANTHROPIC_API_KEY.*does not accept", 2),
        (Fault(403, "not your workspace"), "ANTHROPIC_API_KEY.*not your workspace", 2),
        (Fault(413, "too large"), "too large.*shrink", 2),
        (Fault(429, "limit", error_code="enforced_spend_limit_reached"), "spend limit.*run this again", 3),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_permanent_errors_stop_at_once_in_one_line(server, world, fault, words, status):
    server.faults.extend([fault] * 3)
    world.stops(words, "--concurrency", "1", status=status)
    assert len(server.asked) == 1, "it is not repeated"
    server.faults.clear()
    world.ask()
    assert world.done == [0, 1]


def test_replies_in_flight_at_a_failure_are_saved(server, world):
    server.latency = 0.5  # all three have left before the first is refused
    server.faults.append(Fault(401))
    world.stops("ANTHROPIC_API_KEY", "--concurrency", "3")
    assert 1 <= world.answered <= 3  # 2 replies, one may be copied


def test_after_a_bug_the_replies_in_flight_are_saved(server, world, monkeypatch):
    """Five requests in flight, the first of which meets a bug of ours: the other four were paid for."""
    server.latency = 0.3
    monkeypatch.setattr(api_teacher, "START", 6)
    taken, real = [], claude.ClaudeTeacher.reply

    def reply(self, message, *about, **more):
        taken.append(message)
        if len(taken) == 1:
            raise LookupError("a bug")
        return real(self, message, *about, **more)

    monkeypatch.setattr(claude.ClaudeTeacher, "reply", reply)
    with pytest.raises(LookupError, match="a bug"):
        world.ask("--concurrency", "6", "--max_usd", "1")
    assert len(taken) == len(server.asked) == 5  # one rationale is there twice
    answered = {(item.folder / handoff.REQUEST).read_text() for item in world.items if handoff.has_reply(item.folder)}
    assert len(answered) == 4


def test_overload_that_lasts_and_a_server_that_is_not_there(server, world, monkeypatch):
    monkeypatch.setattr(api_teacher, "MAX_RETRIES", 1)
    server.faults.extend([Fault(529)] * 20)
    world.stops("529.*same command again", "--concurrency", "1")
    monkeypatch.setattr(api_teacher, "MAX_RETRIES", 0)
    world.stops("--base_url.*127.0.0.1:9", "--base_url", "http://127.0.0.1:9")


def test_unusable_replies_are_asked_again_then_reported(server, world, problems, folder_of, capsys):
    replies = iter([("no idea", "end_turn"), ("", "refusal"), ('{"a": 0.5', "max_tokens")])

    def respond(asked):
        if f"Question: {problems[PICTURE]['question']}\n" not in asked.text:
            return fill_form(asked)
        return next(replies, ("no", "end_turn"))

    server.respond = respond
    line = world.stops("2 of 6 replies are unusable.*--accept-missing", "--attempts", "2", "--concurrency", "1")
    assert "refusal 1" in line and "no_json 1" in line  # the last reply's reason each
    assert len(server.asked) == 3 + 2 * 2 and not world.done and (folder_of(0, PICTURE) / handoff.REASON).exists()
    world.ask("--accept-missing", "--attempts", "1")
    assert world.done == [0, 1] and "RL will drop 1 (no_json 1)" in capsys.readouterr().out
    server.respond = fill_form
    world.ask()
    assert read_scores(folder_of(0, PICTURE))


def test_a_refusal_that_reads_well_is_no_reply(server, world):
    """A correction or a score that was cut off may parse; its stop reason says that it is not to be used."""
    server.respond = lambda asked: (fill_form(asked)[0], "refusal")
    world.stops("refusal 6", "--attempts", "1")
    assert (world.folder() / handoff.REFUSED_REPLY).exists() and not handoff.has_reply(world.folder())
    assert not world.answered


@pytest.mark.parametrize(
    "before, behind, stop_reason",
    [("", "\n\nNote: the second sen", "max_tokens"), ("\ud83d Here: ", "", "end_turn")],
    ids=["a remark behind the closed object was cut", "half of a surrogate pair"],
)
def test_scores_that_are_complete_count(server, world, before, behind, stop_reason):
    server.respond = lambda asked: (before + fill_form(asked)[0] + behind, stop_reason)
    world.ask("--attempts", "1")
    assert world.done == [0, 1] and all(read_scores(item.folder) for item in world.items)


# -- what a user gets wrong --------------------------------------------------------------------------------


def test_missing_key_comes_first_and_ends_with_2(tmp_path):
    done = run_script("haiku.py", "--questions_dir", tmp_path / "none", check=False, env={"ANTHROPIC_API_KEY": ""})
    one_line_error(done, "ANTHROPIC_API_KEY", "--teacher reference")
    done = run_script("haiku_for_correction_feedback.py", check=False, env={"ANTHROPIC_API_KEY": " \n"})
    one_line_error(done, "ANTHROPIC_API_KEY", "--teacher reference")


def test_flags_that_would_be_ignored_and_wrong_places(server, world, tmp_path):
    argv = ["--teacher", "reference", "--teacher_model", "x", "--structured", "on", "--body", "{}", "--attempts", "0"]
    line = stops(lambda: haiku.parse_args(argv), "--attempts must be at least 1")
    assert all(f"{flag} has no effect" in line for flag in ("--teacher_model", "--structured", "--body"))
    stops(lambda: haiku.parse_args(["--base_url", "localhost:8000", "--estimate"]),
          "--base_url: localhost:8000 is no address; it begins with http")  # fmt: skip
    (tmp_path / "file").write_text("x")
    world.stops("--cache: cannot write to", "--cache", tmp_path / "file")
    world.stops("--questions_dir.*did you mean", "--questions_dir", tmp_path)
    assert not server.log


def test_requests_that_are_missing_or_of_another_rationale(server, world, folder_of):
    sentences = handoff.read_rationale(folder_of(0, PICTURE))
    for other in (sentences[:-1], sentences[::-1], [*sentences, sentences[0]], ["Quite another rationale."]):
        handoff.write_rationale(folder_of(0, PICTURE), other)
        world.stops("1 of 6 rationales have no input_for_llm.txt that fits")
    (folder_of(0, TEXT) / handoff.REQUEST).unlink()
    world.stops("2 of 6 rationales have no input_for_llm.txt.*processing_sentence_level")
    assert not server.asked


# -- small parts -------------------------------------------------------------------------------------------


def test_ids_media_types_and_room_for_the_reply():
    assert custom_id(SCORE, 3, 0, "12726") == "score-3-0-12726"
    for qid in ("a b", "x" * 80, "é"):
        assert len(custom_id(CORRECT, 0, 0, qid)) <= 64 and custom_id(CORRECT, 0, 0, qid).isascii()
    kinds = {
        b"\x89PNG\r\n\x1a\n....": "image/png",
        b"RIFF\x00\x01\n\x03WEBP": "image/webp",
        b"GIF89a......": "image/gif",
    }
    assert {data: media_type(data) for data in kinds} == kinds and media_type(b"<html>") is None
    request = Request("id", SCORE, "1", "text", ("a" * 600, "b" * 600))
    quiet, thinking = (claude.ClaudeTeacher(model).max_tokens(request) for model in ("claude-haiku-5-5", "mine"))
    assert 600 <= quiet <= 1200 and thinking - quiet >= 1024


def test_teacher_prompts_hold_what_the_teacher_needs(problems):
    problem = problems[PICTURE]
    text = scoring_request(problem, ["One.", 'Two "2".'])
    for words in (problem["question"], problem["hint"].strip(), problem["choices"][problem["answer"]], "the image"):
        assert words in text
    assert text.endswith('{\n"One.": xxx,\n"Two "2".": xxx\n}')
    assert "the image" not in scoring_request(problems[TEXT], ["One."])
    assert correction_request(problem, "It is {one}.\nSo").endswith("It is {one}. So\n")
