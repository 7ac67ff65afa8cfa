"""Money, pace, lock, cache, images: the parts of the Teacher client one by one, and what a user sees of them."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import signal
import sys
import threading
import time

import pytest

import haiku
from ares import cli, images, launch
from haiku_for_correction_feedback import edit_distance
from teacher import agreement, api_errors, budget, claude, handoff, pacing, prices
from teacher.budget import Ledger, read_log
from teacher.interface import SCORE, Reply, Request, Stopped
from teacher.prompts import PROMPT_VERSION
from teacher.reply_cache import ReplyCache
from teacher.reply_files import REFUSED_REPLY
from tests.api_server import KEY, ApiServer, Fault, fill_form, score_by_text
from tests.conftest import one_line_error, run_script
from tests.teacher.teacher_tools import client, lay_out, lines_of, many_items, scores


@pytest.fixture
def server(monkeypatch, api_environment):
    monkeypatch.setattr(claude, "BACKOFF", 0.02)
    with ApiServer(score_by_text) as server:
        yield server


@pytest.fixture
def questions(tmp_path, problems):
    root = tmp_path / "questions"
    many_items(root, 24, problems)
    return root


def flags(server, questions, *more):
    return ["--questions_dir", str(questions), "--base_url", server.url, "--data_root", "no-data-here", *more]


def ask(server, questions, *more):
    haiku.main(flags(server, questions, *more))


def environment(tmp_path, key=KEY):
    return {"ANTHROPIC_API_KEY": key, "ANTHROPIC_BASE_URL": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}


# -- acceptance: one clear line, exit 2 or 3, nothing lost ---------------------------------------------------


@pytest.mark.parametrize(
    "more, key, status, words",
    [
        ((), "", 2, ("ANTHROPIC_API_KEY is not set", "--teacher reference")),
        (("--teacher_model", "claude-3-haiku-20240307"), KEY, 2, ("retired in April 2026", "claude-haiku-5-5")),
        (("--teacher_model", "claude-nope"), KEY, 2, ("not known", "claude-haiku-5-5")),
        (("--max_usd", "0.001"), KEY, 3, ("--max_usd 0.001", "run this again")),
        ((), "sk-ant-wrong", 2, ("does not accept this key",)),
    ],
    ids=["no key", "retired model", "unknown model", "budget", "bad key"],
)
def test_runs_that_stop_say_why_and_lose_nothing(tmp_path, questions, more, key, status, words):
    with ApiServer(score_by_text) as server:
        command = ["haiku.py", *flags(server, questions, *more)]
        done = run_script(*command, check=False, env=environment(tmp_path, key))
        assert done.returncode == status, done.stderr
        lines = [line for line in done.stderr.splitlines() if "error:" in line]
        assert len(lines) == 1 and "Traceback" not in done.stderr and all(word in lines[0] for word in words), lines
        kept = scores(questions)
        assert bool(kept) == (status == 3) and len(kept) < 24
        paid = (server.billed["input_tokens"] * 0.10 + server.billed["output_tokens"] * 0.50) / 1e6
        assert paid <= 0.001
        before = len(server.asked)
        run_script("haiku.py", *flags(server, questions), env=environment(tmp_path))
        assert len(scores(questions)) == 24 and kept.items() <= scores(questions).items()
        assert len(server.asked) == before + 24 - len(kept), "what was paid for is not asked again"


def test_a_budget_is_never_passed_and_nearly_used(server, questions):
    usd = 0.0008
    with pytest.raises(cli.Stop):
        ask(server, questions, "--max_usd", str(usd), "--concurrency", "16")
    paid = (server.billed["input_tokens"] * 0.10 + server.billed["output_tokens"] * 0.50) / 1e6
    assert usd / 2 < paid <= usd
    assert read_log(questions / "teacher/spend.jsonl").usd == pytest.approx(paid)


def test_lost_replies_count_against_the_budget(server, questions):
    server.plan = lambda asked: Fault(0, kind="reset")
    with pytest.raises(cli.UserError):
        ask(server, questions, "--max_usd", "0.0008", "--concurrency", "4")
    paid = (server.billed["input_tokens"] * 0.10 + server.billed["output_tokens"] * 0.50) / 1e6
    assert 0 < paid <= 0.0008, "the server has done the work, and the client has counted it"


def test_ledger_waits_for_what_is_on_its_way(tmp_path):
    async def scenario():
        ledger = Ledger(tmp_path, max_usd=1.0)
        first = await ledger.reserve("a", 0.7)
        second = asyncio.ensure_future(ledger.reserve("b", 0.7))
        await asyncio.sleep(0.01)
        assert not second.done()
        ledger.settle(first, 0.1, "reply")
        ledger.settle(await second, 0.5, "reply")
        with pytest.raises(cli.Stop) as stop:
            await ledger.reserve("c", 0.7)
        assert stop.value.status == 3
        await ledger.reserve("d", 0.3)  # and then the process dies
        ledger.close()

    asyncio.run(scenario())
    with open(tmp_path / budget.LOG, "a") as file:
        file.write('{"id": "cut')
    Ledger(tmp_path).close()
    totals = read_log(tmp_path / budget.LOG)
    assert (totals.requests, totals.replies, totals.unknown) == (3, 2, 1)
    assert totals.usd == pytest.approx(0.6) and totals.unknown_usd == pytest.approx(0.3)
    assert (tmp_path / budget.LOG).read_bytes().endswith(b'{"id": "cut\n')


# -- pace -----------------------------------------------------------------------------------------------------


def test_pace_halves_once_per_burst_and_recovers():
    async def scenario():
        pace = pacing.Pace(16)
        began = time.monotonic()
        await asyncio.gather(*(pace.enter() for _ in range(16)))
        for _ in range(16):
            pace.overloaded(began)
            pace.leave()
        assert pace.limit == 8
        await asyncio.gather(*(pace.enter() for _ in range(8)))
        late = asyncio.ensure_future(pace.enter())
        await asyncio.sleep(0.01)
        assert not late.done() and pace.in_flight == 8
        pace.leave()
        await asyncio.wait_for(late, 1)
        for _ in range(400):
            pace.succeeded()
        assert pace.limit == 16
        waiting = asyncio.ensure_future(pace.sleep(60))
        await asyncio.sleep(0)
        pace.stop()
        with pytest.raises(Stopped):
            await waiting
        with pytest.raises(Stopped):
            await pace.enter()

    asyncio.run(scenario())


def test_concurrency_follows_the_api(server, questions):
    """An API that takes 3 at a time: the client ends near that and gets everything."""
    server.latency = 0.02
    server.plan = lambda asked: Fault(529) if server.in_flight >= 3 else None
    ask(server, questions, "--concurrency", "12")
    assert len(scores(questions)) == 24
    refused = [name for _, name in server.log if name == "529"]
    assert len(refused) < 60 and server.most_in_flight <= 12


def test_what_fits_goes_before_the_budget_stops_the_run():
    """A dear request waits for money and a cheap one behind it: the dear one must not end the run before that."""

    async def scene():
        ledger = Ledger(None, max_usd=1.0)
        first = await ledger.reserve("first", 0.9)
        dear = asyncio.ensure_future(ledger.reserve("dear", 0.8))
        cheap = asyncio.ensure_future(ledger.reserve("cheap", 0.3))
        await asyncio.sleep(0)
        ledger.settle(first, 0.5, "reply")
        entry = await asyncio.wait_for(cheap, 5)
        assert not dear.done()
        ledger.settle(entry, 0.1, "reply")
        with pytest.raises(cli.Stop):
            await asyncio.wait_for(dear, 5)

    asyncio.run(scene())


def test_a_budget_serves_one_run_after_another():
    """--watch and --check ask in several event loops with one budget: each may have to wait for money."""
    ledger = Ledger(None, max_usd=1.0)

    async def two():
        first = await ledger.reserve("first", 0.8)
        waiting = asyncio.ensure_future(ledger.reserve("second", 0.8))
        await asyncio.sleep(0)
        assert not waiting.done()
        ledger.settle(first, 0.0, "reply")
        ledger.settle(await asyncio.wait_for(waiting, 5), 0.0, "reply")

    asyncio.run(two())
    asyncio.run(two())


def test_nothing_leaves_after_the_end_though_it_waited_for_money(server, monkeypatch):
    """Ctrl-C while requests wait for the budget: those on their way come home, those that waited are not sent."""
    server.latency = 0.3

    async def scene():
        teacher = claude.ClaudeTeacher(base_url=server.url, concurrency=4)
        asked = Request("id-1", SCORE, "1", 'Score:\n{\n"It is so.": xxx\n}', ("It is so.",))
        teacher.ledger = Ledger(None, max_usd=1.5 * teacher.most_usd(asked))
        async with teacher:
            all_of_them = [asyncio.ensure_future(teacher.answer(asked)) for _ in range(4)]
            while not server.in_flight:
                await asyncio.sleep(0.01)
            teacher.stop()
            return await asyncio.wait_for(asyncio.gather(*all_of_them, return_exceptions=True), 10)

    ends = asyncio.run(scene())
    assert isinstance(ends[0], Reply) and all(isinstance(end, Stopped) for end in ends[1:])
    assert len(server.log) == 1


def test_retry_after_holds_everybody_back(server, questions):
    times = []

    def plan(asked):
        times.append(time.monotonic())
        return Fault(429, headers={"retry-after": "1"}) if len(times) == 1 else None

    server.plan = plan
    ask(server, questions, "--concurrency", "1")
    assert times[1] - times[0] >= 1.0
    assert api_errors.retry_after({"retry-after-ms": "1500"}) == 1.5
    assert api_errors.retry_after({"retry-after": "7"}) == 7.0 and api_errors.retry_after({}) is None
    assert api_errors.retry_after({"retry-after": "Wed, 21 Oct 2065 07:28:00 GMT"}) > 1e9
    assert api_errors.retry_after({"retry-after": "nan"}) is None


def test_retry_after_nothing_still_pauses(server, questions, monkeypatch):
    """Else the tries are used up within milliseconds, and the run ends."""
    pauses, sleep = [], pacing.Pace.sleep

    async def counted(self, seconds):
        pauses.append(seconds)
        await sleep(self, 0)

    monkeypatch.setattr(pacing.Pace, "sleep", counted)
    server.faults.extend([Fault(429, headers={"retry-after": "0"})] * 3)
    ask(server, questions, "--concurrency", "1")
    assert len(pauses) == 3 and pauses == sorted(pauses) and pauses[0] > 0


def test_one_bad_request_does_not_stop_the_others(server, questions):
    poor = (handoff.iter_items(questions)[7].folder / handoff.REQUEST).read_text()
    server.plan = lambda asked: Fault(400, "this one is odd") if asked.text == poor else None
    with pytest.raises(cli.UserError, match="1 of 24 replies are unusable .api_400 1."):
        ask(server, questions)
    assert len(scores(questions)) == 23


def test_ctrl_c_waits_for_replies_in_flight(server, questions):
    server.latency = 0.4
    running = client(
        *flags(server, questions, "--concurrency", "6"), patch="from ares import claude; claude.START = 6"
    )
    deadline = time.monotonic() + 60
    while not server.in_flight and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in err, (out, err)
    assert len(scores(questions)) == len(server.log) == 6
    assert read_log(questions / "teacher/spend.jsonl").unknown == 0


# -- lock, cache, containment -------------------------------------------------------------------------------


def test_a_paid_reply_is_saved_though_its_folder_was_deleted(server, questions):
    gone = handoff.iter_items(questions)[3].folder
    text = (gone / handoff.REQUEST).read_text()

    def respond(asked):
        if asked.text == text and gone.exists():
            shutil.rmtree(gone)
        return score_by_text(asked)

    server.respond = respond
    ask(server, questions, "--concurrency", "2")
    assert (gone / handoff.REPLY).read_text() and len(scores(questions)) == 23


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
    assert len(scores(questions)) == 24
    with launch.only_one(questions / "teacher/lock", "test"):
        pass


def test_a_reply_serves_other_runs_and_errors_are_not_kept(server, questions, tmp_path, problems):
    server.plan = lambda asked: Fault(0, kind="chatter") if len(asked.notes) == 1 else None
    ask(server, questions)
    file = tmp_path / "user-cache/ares/teacher/replies.jsonl"
    cache = lines_of(file)
    assert len(cache) == 24 and all('"scores"' in entry["text"] for entry in cache)
    other = tmp_path / "another_run/questions"
    many_items(other, 26, problems)
    before = len(server.log)
    server.plan = lambda asked: None
    ask(server, other)
    assert len(server.log) == before + 2, "26 items, 24 known"
    mark = json.loads((handoff.iter_items(other)[0].folder / handoff.SIDECAR).read_text())
    assert mark["from_cache"] and mark["cost_usd"] == 0 and mark["request_id"].startswith("req_")
    ask(server, other, "--teacher_model", "claude-haiku-4-5-20251001", "--keep_replies")
    assert len(server.log) == before + 2, "what has a reply keeps it, whoever gave it"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0][:-9] + "\n" + "".join(lines[1:-1]) + lines[-1][:-9])
    keys = [json.loads(line)["key"] for line in lines]
    known = ReplyCache(file.parent)
    assert [known.get(key) is not None for key in keys] == [False] + [True] * (len(keys) - 2) + [False]
    known.put(keys[0], "new", {})
    assert known.get(keys[0])["text"] == "new" == ReplyCache(file.parent).get(keys[0])["text"]


def test_another_model_is_another_reply(server, questions, tmp_path, problems):
    ask(server, questions)
    many_items(tmp_path / "b", 24, problems)
    ask(server, tmp_path / "b", "--teacher_model", "claude-haiku-4-5-20251001")
    assert len(server.log) == 48


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


# -- images --------------------------------------------------------------------------------------------------


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


# -- looking before asking -----------------------------------------------------------------------------------


def test_estimate_needs_no_key_and_pays_nothing(server, questions, capsys, monkeypatch, problems, sample):
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
    told = float(out.split("per million tokens")[1].split("$")[1].split(" live")[0])
    ask(server, questions)
    paid = (server.billed["input_tokens"] * 0.10 + server.billed["output_tokens"] * 0.50) / 1e6
    assert 0.5 < told / paid < 2.5, (told, paid)  # the server counts 3 and 4 characters a token


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
    lines = agreement.report([[0.1, 0.5], [0.9], None], [[0.2, 0.9], [0.9], [1.0]])
    assert lines[0] == "2 of 3 rationales scored by both, 3 sentences"
    assert lines[2].split() == ["all", "3", "0.167", "0.866", "66.7%"]
    assert lines[3].split() == ["1", "2", "0.050", "1.000", "100.0%"]
    assert lines[4].split() == ["2", "1", "0.400", "-", "0.0%"]
    assert agreement.report([None], [None]) == ["0 of 1 rationales scored by both, 0 sentences"]


# -- watching ------------------------------------------------------------------------------------------------


def test_watch_scores_while_rl_exports(server, tmp_path, sample, problems, capsys):
    root = tmp_path / "questions"
    qids = ["952", "155", "363", "1"]

    def export():
        for action in range(2):
            for qid in qids:
                folder = handoff.question_dir(root, action, 0, qid)
                handoff.write_rationale(folder, [f"Attempt {action}.", "Look closely."])
                time.sleep(0.1)
        handoff.mark_exported(root)

    exporting = threading.Thread(target=export)
    exporting.start()
    haiku.main(["--questions_dir", str(root), "--base_url", server.url, "--watch", "0.02", "--poll_seconds", "0.2",
                "--data_root", str(sample / "ScienceQA/data"), "--images", str(sample / "images")])  # fmt: skip
    exporting.join()
    assert len(scores(root)) == 8 and len(server.log) == 8
    assert all(handoff.is_done(root, action) for action in range(2))
    assert sum(bool(asked.images) for asked in server.asked) == 4, "images travel with every action"
    assert "action 1: done" in capsys.readouterr().out


def test_watch_ends(server, tmp_path, sample):
    with pytest.raises(cli.UserError, match="--watch: no mmcot_finished_signal.txt within"):
        haiku.main(["--questions_dir", str(tmp_path), "--base_url", server.url, "--watch", "0.00001",
                    "--poll_seconds", "0.05", "--data_root", str(sample / "ScienceQA/data")])  # fmt: skip
    done = run_script("haiku.py", "--watch", "--batch", check=False, env={"ANTHROPIC_API_KEY": KEY})
    one_line_error(done, "--batch and --watch do not go together")


# -- small parts ---------------------------------------------------------------------------------------------


def test_a_refusal_that_reads_well_is_no_reply(server, questions):
    """A correction or a score that was cut off may parse; its stop reason says that it is not to be used."""
    server.respond = lambda asked: (fill_form(asked)[0], "refusal")
    with pytest.raises(cli.UserError, match="refusal 24"):
        ask(server, questions, "--attempts", "1")
    folder = handoff.iter_items(questions)[0].folder
    assert (folder / REFUSED_REPLY).exists() and not handoff.has_reply(folder) and not scores(questions)


def test_plain_requests_for_gateways(server, questions):
    ask(server, questions, "--no-structured", "--price", "1", "2")
    assert all(not asked.structured and not asked.notes for asked in server.asked) and len(scores(questions)) == 23
    paid = (server.billed["input_tokens"] * 1 + server.billed["output_tokens"] * 2) / 1e6
    assert read_log(questions / "teacher/spend.jsonl").usd == pytest.approx(paid)


def test_prices():
    assert prices.price_of("claude-haiku-5-5") == prices.Price(0.10, 0.50)
    assert prices.cost_usd(prices.price_of("claude-haiku-4-5"), {"input_tokens": 10**6}, batch=True) == 0.5


MILLION = 10**6
CACHED = [  # usage as the API sends it, multiple of the price of a million input tokens
    ({"cache_read_input_tokens": MILLION}, 0.1),
    ({"cache_creation_input_tokens": MILLION}, 1.25),
    ({"cache_creation_input_tokens": MILLION, "cache_creation": {"ephemeral_5m_input_tokens": MILLION}}, 1.25),
    ({"cache_creation_input_tokens": MILLION, "cache_creation": {"ephemeral_1h_input_tokens": MILLION}}, 2.0),
    ({"cache_creation_input_tokens": MILLION, "cache_creation": {"ephemeral_1h_input_tokens": MILLION // 2}}, 1.625),
    ({"cache_creation_input_tokens": None, "cache_creation": None, "cache_read_input_tokens": None}, 0.0),
    ({"cache_read_input_tokens": MILLION, "cache_creation_input_tokens": MILLION}, 1.35),
]


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("usage, factor", CACHED)
def test_cached_tokens_are_priced(server, tmp_path, problems, usage, factor, batch):
    many_items(tmp_path / "questions", 1, problems)
    server.usage_extra = usage
    ask(server, tmp_path / "questions", "--no-cache", *(["--batch", "--poll_seconds", "0.05"] if batch else []))
    kind = "batch_" if batch else ""
    tokens, out = server.billed[f"{kind}input_tokens"], server.billed[f"{kind}output_tokens"]
    usd = (tokens * 0.10 + out * 0.50) / 1e6 + factor * 0.10
    assert read_log(tmp_path / "questions/teacher/spend.jsonl").usd == pytest.approx(usd / 2 if batch else usd)


def test_the_bound_holds_where_a_gateway_writes_to_a_cache(server, questions, problems, sample, monkeypatch):
    """Each input token written for an hour, at twice the price; the budget holds, and `most_usd` is never passed."""
    lay_out(questions, 0, "952", ["Look at it."], problems, sample)
    message = server.message

    def written(asked, text, stop_reason):
        made = message(asked, text, stop_reason)
        tokens = made["usage"]["input_tokens"] + 4600 * len(asked.images)
        lifetimes = {"ephemeral_1h_input_tokens": tokens, "ephemeral_5m_input_tokens": 0}
        made["usage"] |= {"input_tokens": 0, "cache_creation_input_tokens": tokens, "cache_creation": lifetimes}
        return made

    monkeypatch.setattr(server, "message", written)
    ask(server, questions)
    entries = {}
    for line in lines_of(questions / "teacher/spend.jsonl"):
        entries.setdefault(line["id"], {}).update(line)
    assert len(entries) == 25 and all(0 < entry["usd"] <= entry["most_usd"] for entry in entries.values())


def test_a_spend_log_with_odd_lines_is_added_up(tmp_path):
    good = [{"id": "a", "item": "x", "most_usd": 1.0}, {"id": "a", "usd": 0.5, "outcome": "reply"}]
    odd = ["null", "[]", "7", "\x00", "[" * 100_000, '{"most_usd": 1}', '{"id": [], "most_usd": 1}',
           '{"id": "b", "most_usd": NaN}', '{"id": "b", "most_usd": "dear"}', '{"id": "a", "outcome": "reply"}',
           '{"id": "a", "usd": -Infinity, "outcome": "x"}', '{"id": "c", "usd": [], "outcome": "reply"}']  # fmt: skip
    (tmp_path / budget.LOG).write_text("\n".join([json.dumps(good[0]), *odd, json.dumps(good[1]), *odd]))
    totals = read_log(tmp_path / budget.LOG)
    assert (totals.requests, totals.replies, totals.usd, totals.unknown) == (1, 1, 0.5, 0)


@pytest.mark.parametrize(
    "a, b, distance",
    [
        ("", "x y", 2),
        ("x", "", 1),
        ("a b c", "a c", 1),
        ("a b", "b a", 2),
        ("the cat sat", "the dog sat down", 2),
        ("k i t t e n", "s i t t i n g", 3),
    ],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a.split(), b.split()) == distance == edit_distance(b.split(), a.split())


def test_edit_distance_is_the_textbook_one():
    import random

    dice = random.Random(0)
    for _ in range(200):
        a, b = (dice.choices("abcd", k=dice.randrange(70)) for _ in range(2))
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            before, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
        assert edit_distance(a, b) == row[-1]
