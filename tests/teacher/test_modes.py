"""Other modes of haiku.py: before a paid run --estimate, --show and --check, with the images of requests; beside RL
--watch, which scores while RL exports, through all rounds, within one budget."""

from __future__ import annotations

import io
import random
import sys
import threading
import time

import pytest
from PIL import Image

import haiku
from ares import cli, files, images
from teacher import agreement, handoff
from teacher.prompts import PROMPT_VERSION
from tests.api_server import KEY, Fault, fill_form
from tests.teacher.teacher_tools import (
    CHOICES,
    HAIKU_45,
    PICTURE,
    TEXT,
    World,
    lay_out,
    many_items,
    paid_usd,
    scores,
    stops,
    wait_until,
)  # fmt: skip

# -- images ----------------------------------------------------------------------------------------------------


def saved(path, size, kind, noise=False):
    data = random.Random(0).randbytes(size[0] * size[1] * 3)
    (Image.frombytes("RGB", size, data) if noise else Image.new("RGB", size, "red")).save(path, format=kind)
    return path


def test_images_are_fitted_to_the_api(tmp_path, monkeypatch):
    good = saved(tmp_path / "a.png", (30, 20), "PNG")
    assert images.load_image(good, "1") == ("image/png", good.read_bytes())
    jpeg = saved(tmp_path / "b.png", (30, 20), "JPEG")
    assert images.load_image(jpeg, "1")[0] == "image/jpeg"
    heavy = saved(tmp_path / "heavy.png", (1300, 1200), "PNG", noise=True)
    for path in (saved(tmp_path / "wide.png", (9000, 20), "PNG"), heavy, saved(tmp_path / "c.png", (30, 20), "BMP")):
        kind, data = images.load_image(path, "1")
        with Image.open(io.BytesIO(data)) as image:
            assert kind == Image.MIME[image.format] and max(image.size) <= images.MAX_EDGE
        assert len(data) <= images.MAX_BYTES
    assert images.estimated_tokens(good) == 1 and images.estimated_tokens(heavy) <= 1600
    monkeypatch.setitem(sys.modules, "PIL", None)
    images._checked.clear()
    assert images.load_image(good, "1")[0] == "image/png"
    with pytest.raises(cli.UserError, match="install pillow"):
        images.load_image(heavy, "1")


def test_images_that_do_not_decode_are_named(tmp_path):
    whole = saved(tmp_path / "a.png", (300, 200), "PNG", noise=True)
    cut = whole.read_bytes()[:-9000]  # a download that broke off
    for data, words in ((cut, "a.png of question 7 does not decode"), (b"", "is no PNG"), (None, "cannot read")):
        whole.unlink() if data is None else whole.write_bytes(data)
        with pytest.raises(cli.UserError, match=words):
            images.load_image(whole, "7")


# -- before a paid run -------------------------------------------------------------------------------------------


def test_estimate_needs_no_key_pays_nothing_and_is_near_what_is_then_paid(
    server, world, capsys, monkeypatch, problems, sample
):
    def estimated():
        world.ask("--estimate")
        return capsys.readouterr().out

    many_items(world.root, 24, problems)
    for action in (0, 1):
        lay_out(world.root, action, PICTURE, ["Look at it."], problems, sample)
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    out = estimated()
    for words in (
        "26 rationales",
        "25 distinct requests (1 duplicates",
        "images: 1, in 1",
        "by rule",
        "live",
        "--batch",
    ):
        assert words in out, out
    assert not server.log and not server.counted and not (world.root / "teacher").exists()
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    out = estimated()
    assert "by the API's count of 20 requests" in out and server.counted == 20 and not server.log
    assert not world.answered and not world.done
    world.ask()
    capsys.readouterr()
    usd = float(out.split("per million tokens")[1].split("$")[1].split(" live")[0])
    assert 0.5 < usd / paid_usd(server) < 2.5, "the server counts 3 and 4 characters a token"
    assert "26 have a reply" in estimated()


def test_show_prints_the_request(server, world, capsys, problems, sample, monkeypatch):
    lay_out(world.root, 0, PICTURE, ["Look at it."], problems, sample)
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    world.ask("--show", PICTURE)
    out = capsys.readouterr().out
    for words in (problems[PICTURE]["question"], PROMPT_VERSION, "[image: image.png, image/png", '"Look at it.": xxx',
                  '"thinking": {"type": "disabled"}', "max_tokens", "claude-haiku-5-5"):  # fmt: skip
        assert words in out, out
    world.stops("--show: no rationale of question 99999", "--show", "99999")
    assert not server.log


def test_check_compares_two_teachers_each_at_its_own_price(server, world, capsys, sample):
    check = ("--data_root", sample / "ScienceQA/data", "--check")
    world.ask(*check, "10")
    out = capsys.readouterr().out
    assert "claude claude-haiku-5-5 against reference" in out and "10 of 10 rationales scored by both" in out
    assert len(server.log) == 10 and not world.answered, "the questions folder is left alone"
    world.ask(*check, "10", "--against", HAIKU_45)
    assert len(server.log) == 20, "the first Teacher's replies were in the cache"
    everything = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["all"])
    assert everything.split()[2:] == ["0.000", "1.000", "100.0%"], "the server scores by the sentence alone"
    world.stops("is the Teacher itself", *check, "10", "--against", "claude-haiku-5-5")
    words = "--max_usd: the price of somebody-else is not known"
    world.stops(words, *check, "10", "--against", "somebody-else", "--max_usd", "1")
    assert len(server.log) == 20
    before = world.totals.usd
    world.ask(*check, "4", "--against", HAIKU_45, "--price", "0", "0", "--no-cache")
    assert len(server.log) == 28 and world.totals.usd > before, "--price is the price of --teacher_model"


@pytest.mark.parametrize(
    "flags",
    [("12",), ("100", "--against", HAIKU_45), ("3", "--against", "apart"), ("12", "--accept-missing"),
     ("12", "--teacher", "reference", "--against", "claude:claude-haiku-5-5")],
    ids=" ".join,
)  # fmt: skip
def test_check_gives_rl_no_signal(server, world, sample, flags, monkeypatch):
    """The replies of a comparison are not in the folder: RL would drop every rationale of an action."""
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
    address = ("--base_url", server.url) if "reference" not in flags else ()
    data = str(sample / "ScienceQA/data")
    haiku.main(["--questions_dir", str(world.root), *address, "--data_root", data, "--check", *flags])
    assert server.log and not world.answered and not list(world.root.rglob(handoff.DONE))


def test_a_free_teacher_is_checked_against_a_paid_one_with_its_flags(server, world, sample, tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)

    def ask(*flags):
        data = str(sample / "ScienceQA/data")
        haiku.main(["--questions_dir", str(world.root), "--data_root", data, "--teacher", "reference", *flags])

    paid = ("--check", "12", "--against", "claude:claude-haiku-5-5")
    budget = ("--max_usd", "0.0006", "--concurrency", "1", "--timeout", "60", "--cache", str(tmp_path / "replies"))
    stops(lambda: ask(*paid, *budget, "--attempts", "2", "--structured", "on"), "--max_usd 0.0006", status=3)
    assert 0 < len(server.log) < 12 and (tmp_path / "replies").exists() and paid_usd(server) <= 0.0006
    before = len(server.log)
    ask(*paid, "--no-cache")
    assert len(server.log) == before + 12
    stops(lambda: ask(*paid, "--price", "1", "1"), "--price has no effect")
    stops(
        lambda: ask("--check", "12", "--against", "somebody-else", "--max_usd", "1"), "price of somebody-else is not"
    )
    model = ["--teacher", "model", "--reward_model", "elsewhere", *paid]
    assert haiku.parse_args([*model, *budget]).max_usd == 0.0006
    stops(lambda: haiku.parse_args([*model, "--body", "{}"]), "--body has no effect with --teacher model")
    for flags in (("--check", "12", "--against", "reference"), ()):
        stops(lambda flags=flags: ask(*flags, "--max_usd", "1"), "--max_usd has no effect with --teacher reference")


def test_agreement_by_position():
    lines = agreement.agreement_lines(agreement.agreement([[0.1, 0.5], [0.9], None], [[0.2, 0.9], [0.9], [1.0]]))
    assert lines[0] == "2 of 3 rationales scored by both, 3 sentences"
    assert lines[2].split() == ["all", "3", "0.167", "0.866", "66.7%"]
    assert lines[3].split() == ["1", "2", "0.050", "1.000", "100.0%"]
    assert lines[4].split() == ["2", "1", "0.400", "-", "0.0%"]
    nothing = agreement.agreement([None], [None])
    assert agreement.agreement_lines(nothing) == ["0 of 1 rationales scored by both, 0 sentences"]


# -- beside RL -----------------------------------------------------------------------------------------------


@pytest.fixture
def watcher(server, tmp_path, sample):
    """--watch on a run's questions folder, which is not there yet."""
    data = ("--data_root", sample / "ScienceQA/data", "--images", sample / "images")
    return World(server, tmp_path / "run/questions", "--watch", "0.02", "--poll_seconds", "0.1", *data)


class Rl(threading.Thread):
    """RL as its files show it: it refuses a questions folder that it did not make, and renames each round's.

    `rationales`: (action, question) of each round; in a round after `stop` nobody is waited for.
    """

    def __init__(self, run, rounds, rationales, stop=None):
        super().__init__()
        self.run_dir, self.rounds, self.rationales, self.fault = run, rounds, rationales, None
        self.waited_for = range(rounds if stop is None else stop)
        self.start()

    def run(self):
        try:
            for number in range(self.rounds):
                self.round(number, self.run_dir / "questions")
        except BaseException as fault:
            self.fault = fault

    def round(self, number, questions):
        time.sleep(0.5)
        assert not questions.exists(), "the watcher made it"
        files.write_json(self.run_dir / f"rollouts/round_{number}/plan.json", {})
        flags = f"epochs: {self.rounds}\nbase_model_dir: some/model\ncontinue_train: false\n"
        files.write_text(self.run_dir / "args.yaml", flags)
        for action, qid in self.rationales:
            handoff.write_rationale(
                handoff.question_dir(questions, action, 0, qid), [f"Round {number}, rationale {action}."]
            )
            time.sleep(0.1)
        handoff.mark_exported(questions)
        if number in self.waited_for:
            actions = {action for action, _ in self.rationales}
            wait_until(lambda: all(handoff.is_done(questions, action) for action in actions), 30)
            time.sleep(0.3)  # it trains
            questions.rename(self.run_dir / f"questions_round{number}")

    def end(self):
        self.join()
        assert self.fault is None, self.fault


def test_watch_is_started_first_and_goes_on_through_all_rounds(server, watcher, monkeypatch, capsys):
    run, rounds = watcher.root.parent, 3
    monkeypatch.setattr(haiku, "HEARTBEAT", 0.2)
    rl = Rl(run, rounds, [(action, qid) for action in (0, 1) for qid in (PICTURE, CHOICES, TEXT)])
    watcher.ask()
    rl.end()
    assert len(server.log) == 6 * rounds
    assert sum(bool(asked.images) for asked in server.asked) == 4 * rounds, "with every action"
    for number in range(rounds):
        assert len(scores(run / f"questions_round{number}")) == 6
        assert (run / f"questions_round{number}/teacher/spend.jsonl").exists()
    out = capsys.readouterr().out
    for words in ("RL to make it", "RL to export more", "RL's next round"):
        assert f"waiting for {words}" in out
    assert out.count("6 answered now") == out.count("action 1: done") == rounds


def test_watch_counts_all_rounds_towards_the_budget(server, watcher):
    rl = Rl(watcher.root.parent, 2, [(0, CHOICES), (0, TEXT)], stop=1)
    server.respond = lambda asked: (fill_form(asked)[0] + " " * 4000, "end_turn")  # $0.0005 each
    budget = ("--max_usd", "0.0015", "--images", watcher.root.parent)
    watcher.stops("--max_usd 0.0015", *budget, "--concurrency", "1", status=3)
    rl.end()
    assert 2 <= len(server.log) < 4


def test_watch_goes_on_after_a_look_with_nothing_but_a_refused_request(server, watcher):
    rl = Rl(watcher.root.parent, 1, [(0, CHOICES), (0, TEXT), (1, CHOICES), (1, TEXT)])
    server.plan = lambda asked: Fault(400, "messages: too odd") if "rationale 1" in asked.text else None
    watcher.ask("--accept-missing", "--poll_seconds", "0.05")
    rl.end()
    assert len(server.log) == 4 and len(scores(watcher.root.parent / "questions_round0")) == 2


def test_watch_ends(watcher):
    watcher.stops("--watch: no mmcot_finished_signal.txt within", "--watch", "0.00001", "--poll_seconds", "0.05")
