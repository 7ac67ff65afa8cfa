"""Items, identical requests, the lock, the cache, and whose replies are accepted."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sqlite3
import time

import pytest

import haiku
from ares import cli, files, launch
from teacher import handoff
from teacher.claude import ClaudeTeacher
from teacher.interface import SCORE, Reply, Request, same_model
from teacher.prompts import WORDING
from teacher.reply_files import ReplyCache
from teacher.session import Session
from tests.api_server import KEY, Fault, fill_form, score_by_text
from tests.teacher.teacher_tools import TEXT, ask, client, flags, lay_out, many_items, messages, scores


def test_a_paid_reply_is_saved_though_its_folder_was_deleted(server, questions):
    gone = handoff.iter_items(questions)[3].folder
    text = (gone / handoff.REQUEST).read_text()

    def respond(asked):
        if asked.text == text and gone.exists():
            shutil.rmtree(gone)
        return score_by_text(asked)

    server.respond = respond
    ask(server, questions, "--concurrency", "2")
    assert (gone / handoff.REPLY).read_text() and len(scores(questions)) == 11


def test_two_clients_do_not_share_a_folder(server, questions):
    server.latency = 1.0
    first = client(*flags(server, questions, "--concurrency", "2"))
    deadline = time.monotonic() + 60
    while not server.in_flight and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(cli.UserError, match=f"process {first.pid} on"):
        ask(server, questions)
    first.kill()  # its lock file stays, and locks nobody out
    first.communicate()
    assert (questions / "teacher/lock").read_text()
    server.latency = 0.0
    ask(server, questions)
    assert len(scores(questions)) == 12
    with launch.only_one(questions / "teacher/lock", "test"):
        pass


def test_a_reply_serves_other_runs_and_errors_are_not_kept(server, questions, tmp_path, problems):
    server.plan = lambda asked: Fault(0, kind="chatter") if len(asked.notes) == 1 else None
    ask(server, questions)
    file = tmp_path / "user-cache/ares/teacher/replies.sqlite3"
    with sqlite3.connect(file) as database:
        cache = [json.loads(entry) for (entry,) in database.execute("SELECT entry FROM replies")]
    assert len(cache) == 12 and all('"scores"' in entry["text"] for entry in cache)
    assert file.stat().st_mode & 0o777 == 0o600
    other = tmp_path / "another_run/questions"
    many_items(other, 14, problems)
    before = len(server.log)
    server.plan = lambda asked: None
    ask(server, other)
    assert len(server.log) == before + 2, "14 items, 12 known"
    mark = json.loads((handoff.iter_items(other)[0].folder / handoff.SIDECAR).read_text())
    assert mark["from_cache"] and mark["cost_usd"] == 0 and mark["request_id"].startswith("req_")
    ask(server, other, "--teacher_model", "claude-haiku-4-5-20251001", "--keep_replies")
    assert len(server.log) == before + 2, "what has a reply keeps it, whoever gave it"


def old_line(key, text, **about):
    return json.dumps({"key": key, "text": text, **about})


def test_the_cache_file_of_earlier_versions_is_imported_once(server, questions, tmp_path, problems):
    """Paid replies: a line a reply, the later one counts; damaged and torn lines do not."""
    ask(server, questions)
    cache = ReplyCache(tmp_path / "user-cache/ares/teacher")
    rows = cache._database.execute("SELECT key, entry FROM replies").fetchall()
    cache.close()
    old = tmp_path / "old"
    lines = [json.dumps({"key": key, **json.loads(entry)}) for key, entry in rows]
    odd = [
        "null",
        "7",
        "{",
        '{"key": "x"}',
        '{"key": 7, "text": "a"}',
        old_line("twice", "first"),
        old_line("twice", "2"),
    ]
    files.write_text(old / "replies.jsonl", "\n".join([lines[0][:-9], *lines[1:], *odd, '{"key": "torn", "te']))
    other = tmp_path / "another_run/questions"
    many_items(other, 12, problems)
    asked = len(server.log)
    ask(server, other, "--cache", str(old))
    assert len(server.log) == asked + 1, "only the damaged one is asked again"
    known = ReplyCache(old)
    assert known.get("twice") == {"text": "2"} and known.get("torn") is None
    files.write_text(old / "replies.jsonl", old_line("twice", "3"))
    assert ReplyCache(old).get("twice") == {"text": "2"}


def test_keys_of_earlier_versions_still_find_their_replies():
    """Digests of commit 12494b9: the cache and the batch records hold them."""
    text = 'Score:\n{\n"It is so.": xxx\n}'
    request = Request("id", SCORE, "7", text, ("It is so.",), form_note="Only scores.")
    structured = ClaudeTeacher("claude-haiku-5-5")
    plain = ClaudeTeacher("claude-haiku-4-5-20251001", structured=False)
    assert structured.key(request) == "b1033aa549c4620e43d995945bd87dd9a6003100a924985b569cb5a65551e481"
    assert plain.key(request) == "8193ad166bd484e64c1c28e6eaa9696a6c424ae73a2ac8f1d86b45c5730d942b"


def fill_cache(folder, name):
    cache = ReplyCache(folder)
    for number in range(100):
        cache.put(f"{name}{number}", "a reply", {"model": name})


def test_several_processes_share_a_cache(tmp_path):
    files.write_text(
        tmp_path / "replies.jsonl", "\n".join(old_line(f"old{number}", "a reply") for number in range(500))
    )
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill_cache, args=(tmp_path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache = ReplyCache(tmp_path)
    assert all(cache.get(f"{name}{number}") for name in "abc" for number in range(100)) and cache.get("old499")


@pytest.mark.parametrize("damage", ["garbage", "cut", "folder", "link"])
def test_a_damaged_cache_costs_only_the_cache(server, questions, tmp_path, damage, capsys):
    file = tmp_path / "user-cache/ares/teacher/replies.sqlite3"
    fill_cache(file.parent, "a")
    if damage == "garbage":
        file.write_bytes(b"no database" * 1000)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        file.unlink()
        file.mkdir() if damage == "folder" else file.symlink_to(tmp_path / "elsewhere")
    ask(server, questions)
    assert len(scores(questions)) == 12 and not (tmp_path / "elsewhere").exists()
    assert capsys.readouterr().err.count("--cache") == 1


def test_items_with_the_same_request_share_one_reply(tmp_path, problems, monkeypatch):
    """Identical rationales join an open request, get copies of an answered one's reply, reopen one given up."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    settled = []
    session = Session(
        tmp_path, ClaudeTeacher(), SCORE, WORDING, action_settled=lambda action, report: settled.append(action)
    )

    def add(*actions, sentence="It is so."):
        for action in actions:
            lay_out(tmp_path, action, TEXT, [sentence], problems)
        session.add([handoff.Item(tmp_path, action, 0, TEXT) for action in actions])

    add(0, 1)
    add(2, sentence="It is not.")
    [key, other] = session.open
    assert [item.action for item in session.open[key]] == [0, 1] and len(session.open[other]) == 1
    session.give_up(key, "api_400", "too odd")
    assert settled == [0, 1] and (tmp_path / f"1/p0/{TEXT}" / handoff.REASON).read_text() == "api_400: too odd\n"
    add(3)
    assert [item.action for item in session.open[key]] == [3]
    request, sidecar = session.prepare(key)
    assert session.save_reply(key, request, Reply('{"scores": [0.5]}', "claude", "m"), sidecar) is None
    session.finish(key, "claude m")
    add(4, 5)
    assert list(session.open) == [other] and settled == [0, 1, 3, 4, 5]
    assert scores(tmp_path) == {f"{action}/0/{TEXT}": "0.5\n" for action in (3, 4, 5)}
    assert (session.report.answered, session.report.copied, len(session.report.unusable)) == (3, 2, 2)


def test_another_model_is_another_reply(server, questions, tmp_path, problems):
    ask(server, questions)
    many_items(tmp_path / "b", 12, problems)
    ask(server, tmp_path / "b", "--teacher_model", "claude-haiku-4-5-20251001")
    assert len(server.log) == 24


def test_links_that_lead_out_are_refused(server, questions, tmp_path):
    secret = tmp_path / "secret.txt"
    item = handoff.iter_items(questions)[0]
    request = item.folder / handoff.REQUEST
    secret.write_text(request.read_text())
    request.unlink()
    request.symlink_to(secret)
    with pytest.raises(cli.UserError, match=f"{handoff.REQUEST} is a symbolic link"):
        ask(server, questions)
    request.unlink()
    request.write_text(secret.read_text())
    moved = tmp_path / "elsewhere"
    item.folder.rename(moved)
    item.folder.symlink_to(moved)
    with pytest.raises(cli.UserError, match="is a link that leads out"):
        ask(server, questions)
    item.folder.unlink()
    moved.rename(item.folder)
    picture = tmp_path / "private.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n")
    (item.folder / "image.png").symlink_to(picture)
    with pytest.raises(cli.UserError, match="image.png is a link that leads out"):
        ask(server, questions)
    assert not server.log


def by_reference(root, sample):
    haiku.main(["--questions_dir", str(root), "--teacher", "reference", "--data_root", str(sample / "ScienceQA/data")])


def test_replies_of_another_teacher_are_refused(server, questions, sample, capsys):
    by_reference(questions, sample)
    with pytest.raises(cli.UserError) as error:
        ask(server, questions)
    for words in ("reference", "(12 of 12)", "not by claude claude-haiku-5-5", "--keep_replies", "another folder"):
        assert words in str(error.value)
    assert not server.log
    gone = handoff.iter_items(questions)[0].folder
    (gone / handoff.REPLY).unlink()
    (handoff.iter_items(questions)[1].folder / handoff.SIDECAR).unlink()  # as the released code leaves it
    capsys.readouterr()
    ask(server, questions, "--keep_replies")
    out = capsys.readouterr().out
    assert len(server.log) == 1 and "11 had a reply, 1 answered now" in out
    assert "reference-" in out.partition("replies by")[2] and "unknown origin 1" in out
    assert "claude claude-haiku-5-5 1" in out


def test_the_order_does_not_matter_and_unknown_origin_is_accepted(server, questions, sample, capsys):
    ask(server, questions)
    with pytest.raises(cli.UserError, match=r"claude claude-haiku-5-5 \(12 of 12\), not by reference"):
        by_reference(questions, sample)
    for item in handoff.iter_items(questions):
        (item.folder / handoff.SIDECAR).write_text("{") if item.action else (item.folder / handoff.SIDECAR).unlink()
    capsys.readouterr()
    by_reference(questions, sample)
    assert "replies by unknown origin 12" in capsys.readouterr().out


def test_an_alias_and_its_dated_id_are_one_teacher(server, questions, monkeypatch):
    ask(server, questions, "--teacher_model", "claude-haiku-4-5-20251001")
    from tests import api_server

    monkeypatch.setattr(api_server, "MODELS", ("claude-haiku-4-5",))
    ask(server, questions, "--teacher_model", "claude-haiku-4-5")
    assert len(server.log) == 12


def test_a_gateway_that_answers_under_another_name_is_one_teacher(server, questions):
    server.plan = lambda asked: Fault(200, body=messages(model="served-by-us")(fill_form(asked)[0]).encode())
    ask(server, questions)
    ask(server, questions)
    assert len(server.log) == 12


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("claude-haiku-4-5", "claude-haiku-4-5-20251001", True),
        ("claude-haiku-4-5@20251001", "claude-haiku-4-5-20251001", True),
        ("anthropic/claude-haiku-4-5", "us.anthropic.claude-haiku-4-5-20251001-v1:0", True),
        ("claude-haiku-4-5-latest", "claude-haiku-4-5-20251001", True),
        ("claude-haiku-4-5-20250101", "claude-haiku-4-5-20251001", False),
        ("claude-haiku-4-5", "claude-haiku-5-5", False),
        ("claude-haiku-5", "claude-haiku-5-5", False),
        ("claude-haiku-4-5", "claude-sonnet-4-5", False),
    ],
)
def test_same_models(one, other, same):
    assert same_model(one, other) == same_model(other, one) == same
