"""Items, identical requests, the lock, the cache, and whose replies are accepted."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sqlite3

import pytest

import haiku
from ares import files, launch
from teacher import handoff
from teacher.claude import ClaudeTeacher
from teacher.interface import SCORE, Reply, Request, same_model
from teacher.prompts import WORDING
from teacher.reply_files import ReplyCache
from teacher.session import Session
from tests import api_server
from tests.api_server import KEY, Fault, fill_form, score_by_text
from tests.disk import disk_calls
from tests.teacher.teacher_tools import (
    HAIKU_45,
    TEXT,
    World,
    forked,
    lay_out,
    many_items,
    messages,
    scores,
    sidecar,
    stops,
    wait_until,
)  # fmt: skip


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
    request, about = session.prepare(key)
    assert session.save_reply(key, request, Reply('{"scores": [0.5]}', "claude", "m"), about) is None
    session.finish(key, "claude m")
    add(4, 5)
    assert list(session.open) == [other] and settled == [0, 1, 3, 4, 5]
    assert scores(tmp_path) == {f"{action}/0/{TEXT}": "0.5\n" for action in (3, 4, 5)}
    assert (session.report.answered, session.report.copied, len(session.report.unusable)) == (3, 2, 2)


def test_a_paid_reply_is_saved_though_its_folder_was_deleted(server, world):
    gone, text = world.folder(3), world.request(3)

    def respond(asked):
        if asked.text == text and gone.exists():
            shutil.rmtree(gone)
        return score_by_text(asked)

    server.respond = respond
    world.ask("--concurrency", "2")
    assert (gone / handoff.REPLY).read_text() and world.answered == 11


def test_two_clients_do_not_share_a_folder(server, world, tmp_path):
    server.latency = 1.0
    first = forked(world.flags("--concurrency", "2"), tmp_path / "log.txt")
    wait_until(lambda: server.in_flight)
    world.stops(f"process {first.pid} on")
    first.kill()  # its lock file stays, and locks nobody out
    first.join()
    assert (world.root / "teacher/lock").read_text()
    server.latency = 0.0
    world.ask()
    assert world.answered == 12
    with launch.only_one(world.root / "teacher/lock", "test"):
        pass


def test_links_that_lead_out_are_refused(server, world, tmp_path):
    folder, moved = world.folder(), tmp_path / "elsewhere"
    request, secret = folder / handoff.REQUEST, tmp_path / "secret.txt"
    request.rename(secret)
    request.symlink_to(secret)
    world.stops(f"{handoff.REQUEST} is a symbolic link")
    request.unlink()
    secret.rename(request)
    folder.rename(moved)
    folder.symlink_to(moved)
    world.stops("is a link that leads out")
    folder.unlink()
    moved.rename(folder)
    (tmp_path / "private.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "image.png").symlink_to(tmp_path / "private.png")
    world.stops("image.png is a link that leads out")
    assert not server.log


# -- the cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def other(server, tmp_path, problems):
    """Another run, whose first 12 of 14 items are those of `world`."""
    many_items(tmp_path / "another_run/questions", 14, problems)
    return World(server, tmp_path / "another_run/questions")


def test_a_reply_serves_other_runs_of_the_same_model_and_errors_are_not_kept(server, world, other, tmp_path):
    server.plan = lambda asked: Fault(0, kind="chatter") if len(asked.notes) == 1 else None
    world.ask()
    file = tmp_path / "user-cache/ares/teacher/replies.sqlite3"
    with sqlite3.connect(file) as database:
        cache = [json.loads(entry) for (entry,) in database.execute("SELECT entry FROM replies")]
    assert len(cache) == 12 and all('"scores"' in entry["text"] for entry in cache)
    assert file.stat().st_mode & 0o777 == 0o600
    server.plan = lambda asked: None
    other.ask()
    assert len(server.log) == 24 + 2, "14 items, 12 known"
    about = sidecar(other.folder())
    assert about["from_cache"] and about["cost_usd"] == 0 and about["request_id"].startswith("req_")
    other.ask("--teacher_model", HAIKU_45, "--keep_replies")
    assert len(server.log) == 24 + 2, "what has a reply keeps it, whoever gave it"
    for item in other.items:
        (item.folder / handoff.REPLY).unlink()
    other.ask("--teacher_model", HAIKU_45)
    assert len(server.log) == 24 + 2 + 14, "another model is another reply"


def old_line(key, text, **about):
    return json.dumps({"key": key, "text": text, **about})


def test_the_cache_file_of_earlier_versions_is_imported_once(server, world, other, tmp_path):
    """Paid replies: a line a reply, the later one counts; damaged and torn lines do not."""
    world.ask()
    with sqlite3.connect(tmp_path / "user-cache/ares/teacher/replies.sqlite3") as database:
        rows = database.execute("SELECT key, entry FROM replies").fetchall()
    old = tmp_path / "old"
    lines = [json.dumps({"key": key, **json.loads(entry)}) for key, entry in rows]
    odd = ["null", "7", "{", '{"key": "x"}', '{"key": 7, "text": "a"}', old_line("twice", "1"), old_line("twice", "2")]
    files.write_text(old / "replies.jsonl", "\n".join([lines[0][:-9], *lines[1:], *odd, '{"key": "torn", "te']))
    other.ask("--cache", old)
    assert len(server.log) == 12 + 3, "the damaged one and the two new ones are asked"
    known = ReplyCache(old)
    assert known.get("twice") == {"text": "2"} and known.get("torn") is None
    files.write_text(old / "replies.jsonl", old_line("twice", "3"))
    assert ReplyCache(old).get("twice") == {"text": "2"}


def test_keys_of_earlier_versions_still_find_their_replies():
    """Digests of commit 12494b9: the cache and the batch records hold them."""
    text = 'Score:\n{\n"It is so.": xxx\n}'
    request = Request("id", SCORE, "7", text, ("It is so.",), form_note="Only scores.")
    structured, plain = ClaudeTeacher("claude-haiku-5-5"), ClaudeTeacher(HAIKU_45, structured=False)
    assert structured.key(request) == "b1033aa549c4620e43d995945bd87dd9a6003100a924985b569cb5a65551e481"
    assert plain.key(request) == "8193ad166bd484e64c1c28e6eaa9696a6c424ae73a2ac8f1d86b45c5730d942b"


def fill_cache(folder, name):
    cache = ReplyCache(folder)
    for number in range(100):
        cache.put(f"{name}{number}", "a reply", {"model": name})


def test_several_processes_share_a_cache(tmp_path):
    old = (old_line(f"old{number}", "a reply") for number in range(500))
    files.write_text(tmp_path / "replies.jsonl", "\n".join(old))
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=fill_cache, args=(tmp_path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache = ReplyCache(tmp_path)
    assert all(cache.get(f"{name}{number}") for name in "abc" for number in range(100)) and cache.get("old499")


@pytest.mark.parametrize("damage", ["garbage", "cut", "folder", "link"])
def test_a_damaged_cache_costs_only_the_cache(world, tmp_path, damage, capsys):
    file = tmp_path / "user-cache/ares/teacher/replies.sqlite3"
    fill_cache(file.parent, "a")
    if damage in ("garbage", "cut"):
        file.write_bytes(b"no database" * 1000 if damage == "garbage" else file.read_bytes()[:5000])
    else:
        file.unlink()
        file.mkdir() if damage == "folder" else file.symlink_to(tmp_path / "elsewhere")
    world.ask()
    assert world.answered == 12 and not (tmp_path / "elsewhere").exists()
    assert capsys.readouterr().err.count("--cache") == 1


# -- whose replies ---------------------------------------------------------------------------------------------


@pytest.fixture
def by_reference(world, sample):
    data = f"{sample}/ScienceQA/data"
    return lambda: haiku.main(["--questions_dir", str(world.root), "--teacher", "reference", "--data_root", data])


def test_replies_that_cost_nothing_are_flushed_together_before_the_signal(world, by_reference):
    """One flush for each signal, however many replies; what a power cut left empty is answered again."""
    with disk_calls() as calls:
        by_reference()
    assert calls.count(handoff.REPLY) == 12 and "flush" not in calls
    signals = [i for i, call in enumerate(calls) if call == handoff.DONE]
    assert len(signals) == 4 and all(calls[i - 1] == "flush all" for i in signals)
    before, lost = world.scores, [handoff.REPLY, handoff.SCORES, handoff.SIDECAR]
    for number, name in enumerate(lost):
        (world.folder(number) / name).write_bytes(b"")
    by_reference()
    assert world.scores == before


def test_gold_texts_are_read_once_for_all_rationales_of_a_question(world, by_reference, gold_read, problems):
    many_items(world.root, 5 * 4, problems)  # five questions, four actions
    by_reference()
    assert world.answered == 20 and len(gold_read) == len({item.qid for item in world.items}) == 5


def test_copies_of_a_paid_reply_are_not_flushed(server, world, problems):
    qid, sentences = world.items[0].qid, handoff.read_rationale(world.folder(0))
    for action in (1, 2):  # the same rationale three times
        lay_out(world.root, action, qid, sentences, problems)
    with disk_calls() as calls:
        world.ask()
    assert calls.count(handoff.REPLY) == 12 and calls.count("flush") == len(server.asked) == 10


def test_replies_of_another_teacher_are_refused(server, world, by_reference, capsys):
    by_reference()
    words = r"reference.*\(12 of 12\).*not by claude claude-haiku-5-5"
    line = world.stops(words)
    assert "--keep_replies" in line and "another folder" in line and not server.log
    (world.folder(0) / handoff.REPLY).unlink()
    (world.folder(1) / handoff.SIDECAR).unlink()  # as the released code leaves it
    capsys.readouterr()
    world.ask("--keep_replies")
    out = capsys.readouterr().out
    assert len(server.log) == 1 and "11 had a reply, 1 answered now" in out
    assert "reference-" in out.partition("replies by")[2] and "unknown origin 1" in out
    assert "claude claude-haiku-5-5 1" in out


def test_the_order_does_not_matter_and_unknown_origin_is_accepted(world, by_reference, capsys):
    world.ask()
    stops(by_reference, r"claude claude-haiku-5-5 \(12 of 12\), not by reference")
    for item in world.items:
        (item.folder / handoff.SIDECAR).write_text("{") if item.action else (item.folder / handoff.SIDECAR).unlink()
    capsys.readouterr()
    by_reference()
    assert "replies by unknown origin 12" in capsys.readouterr().out


def test_other_names_of_a_model_are_one_teacher(server, world, monkeypatch):
    world.ask("--teacher_model", HAIKU_45)
    monkeypatch.setattr(api_server, "MODELS", ("claude-haiku-4-5",))
    world.ask("--teacher_model", "claude-haiku-4-5")  # its alias
    assert len(server.log) == 12


def test_a_gateway_that_answers_under_another_name_is_one_teacher(server, world):
    server.plan = lambda asked: Fault(200, body=messages(model="served-by-us")(fill_form(asked)[0]).encode())
    world.ask()
    world.ask()
    assert len(server.log) == 12


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("claude-haiku-4-5", HAIKU_45, True),
        ("claude-haiku-4-5@20251001", HAIKU_45, True),
        ("anthropic/claude-haiku-4-5", "us.anthropic.claude-haiku-4-5-20251001-v1:0", True),
        ("claude-haiku-4-5-latest", HAIKU_45, True),
        ("claude-haiku-4-5-20250101", HAIKU_45, False),
        ("claude-haiku-4-5", "claude-haiku-5-5", False),
        ("claude-haiku-5", "claude-haiku-5-5", False),
        ("claude-haiku-4-5", "claude-sonnet-4-5", False),
    ],
)
def test_same_models(one, other, same):
    assert same_model(one, other) == same_model(other, one) == same
