"""haiku.py --together: all open rationales of a question in one request, with the real SDKs against a local server.

Kills and faults of every kind, live and in batches, are in test_storm.py.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
import signal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ares.sentences import split_text
from teacher import api_teacher, estimate, handoff, together
from teacher.interface import SCORE, Reply, Request
from teacher.parsing import Refused, parse_scores
from teacher.prompts import WORDING
from tests.api_server import Fault, fill_form, score_by_text
from tests.disk import fill, small_disk
from tests.teacher.teacher_tools import (
    CHOICES,
    MODEL,
    PICTURE,
    TEXT,
    World,
    lay_out,
    lines_of,
    many_items,
    paid_usd,
    sidecar,
    wait_until,
)  # fmt: skip

K = 4
QUOTING = 'He wrote "a, b": 0.5, {c} and [0.5].'


def exported(root, problems, sample, questions=8):
    """A round as RL exports it: K rationales of each question, two of the text question's alike, images."""
    many_items(root, K * questions, problems)
    for action in range(K):
        lay_out(root, action, PICTURE, [f"It is thought {action}.", QUOTING], problems, sample)
        lay_out(root, action, CHOICES, ["Look at both.", f"It is the {action}."], problems, sample)
        lay_out(root, action, TEXT, [f"It is so, {action % 3}."], problems)
    handoff.mark_exported(root)
    return root


@pytest.fixture
def apart(server, tmp_path, problems, sample):
    return World(server, exported(tmp_path / "apart", problems, sample), "--no-cache")


@pytest.fixture
def joint(server, tmp_path, problems, sample):
    return World(server, exported(tmp_path / "together", problems, sample), "--no-cache", "--together")


def same_scores(one, other):
    return one.scores == other.scores and one.done == other.done == list(range(K))


# -- the same files for a quarter of the requests ------------------------------------------------------------


@pytest.mark.parametrize("ways", [(), ("--structured", "off"), ("openai",), ("--batch",)], ids=str)
def test_the_scores_are_those_of_asking_apart(server, apart, joint, problems, monkeypatch, ways, capsys):
    if ways == ("openai",):
        server.models, server.needs_key = {MODEL: {}}, False
        ways = ("--teacher", "openai", "--teacher_model", MODEL)
    if ways == ("--batch",):
        ways = ("--batch", "--poll_seconds", "0.1")
    questions = 8 + 3
    apart.ask(*ways)
    asked_apart = len(server.log) or sum(apart.submitted)
    assert asked_apart == K * questions - 1, "the two alike are one request"
    server.log.clear(), server.asked.clear(), server.batches.clear(), server.billed.clear()
    joint.ask(*ways)
    assert same_scores(joint, apart) and joint.answered == K * questions
    assert (len(server.log) or sum(joint.submitted)) == questions
    out = capsys.readouterr().out
    assert f"{K * questions} answered now ({questions} requests, 1 copies" in out
    # each item has its own part, in the form of a reply about it alone, and its share of tokens and dollars
    total, usage = 0.0, {}
    for one, other in zip(joint.items, apart.items, strict=True):
        sentences = handoff.read_rationale(one.folder)
        text = (one.folder / handoff.REPLY).read_text()
        assert parse_scores(text, sentences) == [float(x) for x in (one.folder / handoff.SCORES).read_text().split()]
        about, before = sidecar(one.folder), sidecar(other.folder)
        assert about.keys() == before.keys() | {"together"}
        assert about["together"] == (K - 1 if one.qid == TEXT else K)
        total += about["cost_usd"]
        if "copied_from" not in about:
            usage = {name: usage.get(name, 0) + count for name, count in about["usage"].items()}
        # nothing else differs from asking apart
        assert {path.name for path in one.folder.iterdir()} == {path.name for path in other.folder.iterdir()}
    batch = "batch_" * ("--batch" in ways)
    assert usage["input_tokens"] == server.billed[f"{batch}input_tokens"]
    assert usage["output_tokens"] == server.billed[f"{batch}output_tokens"]
    assert total == pytest.approx(joint.totals.usd) and (
        total == pytest.approx(paid_usd(server, bool(batch))) or not total
    )
    joint.ask(*ways)
    assert (len(server.log) or sum(joint.submitted)) == questions


def test_what_is_sent(server, joint, problems):
    joint.ask()
    asked = next(asked for asked in server.asked if PICTURE in str(asked.images) or len(asked.images) == 1)
    assert asked.content_types == ["image", "text", "text"], "the image once"
    assert asked.text.count(problems[PICTURE]["question"]) == asked.text.count("You grade, sentence by sentence") == 1
    assert WORDING.together in asked.text and asked.notes == [WORDING.structured["together"]]
    assert (
        asked.text.endswith("}\n}")
        and f'"rationale_4": {{\n"It is thought 3.": xxx,\n"{QUOTING}": xxx\n}}' in asked.text
    )
    assert len({json.dumps(asked.schema, sort_keys=True) for asked in server.asked}) == 1, "one schema for all counts"
    both = next(asked for asked in server.asked if len(asked.rationales) == 3)
    assert both.rationales == [["It is so, 0."], ["It is so, 1."], ["It is so, 2."]], "each distinct one once"
    alone = server.asked[0].text
    server.asked.clear()
    first = joint.items[0]
    for name in (handoff.REPLY, handoff.SCORES, handoff.SIDECAR):
        (first.folder / name).unlink()
    joint.ask()
    [asked] = server.asked
    assert asked.text == joint.request(0) != alone and asked.notes == [WORDING.structured["score"]]


def test_an_exact_schema_has_an_object_for_each(server, joint):
    server.models, server.needs_key = {MODEL: {}}, False
    joint.ask("--teacher", "openai", "--teacher_model", MODEL)
    asked = next(asked for asked in server.asked if len(asked.rationales) == 3)
    assert asked.schema["required"] == ["rationale_1", "rationale_2", "rationale_3"]
    assert asked.schema["properties"]["rationale_3"] == api_teacher.exact_schema(
        Request("id", SCORE, "1", "text", ("One.",))
    )
    assert asked.notes == [WORDING.exact["together"]]


def test_cache_and_resume_are_the_same_for_both_ways(server, joint, tmp_path, problems, sample):
    cached = World(server, joint.root, "--together")
    cached.ask()
    other = World(server, exported(tmp_path / "later", problems, sample, questions=9))
    before = len(server.log)
    other.ask()
    assert len(server.log) == before + K, "apart: only the new question is asked, the rest is in the cache"
    third = World(server, exported(tmp_path / "third", problems, sample, questions=10), "--together")
    third.ask()
    assert len(server.log) == before + K + 1 and third.scores.items() >= other.scores.items() >= cached.scores.items()
    # half of a question's rationales have a reply: the others are asked
    folders = [item.folder for item in third.items if item.qid == PICTURE]
    for folder in folders[:3]:
        for name in (handoff.REPLY, handoff.SCORES, handoff.SIDECAR):
            (folder / name).unlink()
    third.ask("--no-cache")
    assert len(server.asked[-1].rationales) == 3 and sidecar(folders[0])["together"] == 3
    assert len(server.log) == before + K + 2


def test_different_questions_or_images_are_never_joined(server, joint, problems, sample):
    """An edited request, another image, another process of RL: each is asked by itself."""
    by_qid = {item.action: item.folder for item in joint.items if item.qid == PICTURE}
    text = (by_qid[0] / handoff.REQUEST).read_text()
    (by_qid[0] / handoff.REQUEST).write_text(text.replace("Question:", "My question:"))
    image = by_qid[1] / handoff.IMAGE
    image.unlink()
    shutil.copy(sample / "images" / CHOICES / "choice_0.png", image)
    (by_qid[2] / handoff.REQUEST).write_text(text.replace("thought 0", "thought 2") + "\nThank you.\n")
    # could be taken for a part of the reply
    for action, trap in enumerate(('"rationale_2": {"x": 1}', "Rationale 3 is", "the matrix [[1], [2]]")):
        lay_out(joint.root, action, TEXT, [f"It is so: {trap}."], problems)
    joint.ask()
    assert len([asked for asked in server.asked if "It is so: " in asked.text]) == 3
    pictures = [asked for asked in server.asked if "It is thought" in asked.text]
    assert len(pictures) == 4 and joint.answered == len(joint.items)


def test_budget_and_bounds(server, joint):
    """`most_usd` of a request about several is never below what it costs, and the budget is never passed."""
    joint.stops("--max_usd 0.001", "--max_usd", "0.001", "--concurrency", "2", status=3)
    assert 0 < paid_usd(server) <= 0.001
    joint.ask("--max_usd", "1", "--structured", "off")
    entries = {}
    for line in lines_of(joint.root / "teacher/spend.jsonl"):
        entries.setdefault(line["id"], {}).update(line)
    assert len(entries) == len(server.log) and all(0 < entry["usd"] <= entry["most_usd"] for entry in entries.values())
    for asked in server.asked:  # the longest reply: the whole form with longest numbers
        longest = fill_form(asked, lambda sentence: 0.123)[0]
        assert asked.body["max_tokens"] >= len(longest) / 2, "two characters a token"


# -- replies that cannot be used -----------------------------------------------------------------------------

RATIONALES = (
    ("Let's see.", "Ice melts.", "So it is A."),
    ("Let's see.", QUOTING),
    ("Water is wet.", "So it is A."),
    ("It is B.",),
)
TRUE = [[0.1, 0.2, 0.3], [0.1, 0.4], [0.5, 0.3], [0.6]]
LISTS = {"scores": TRUE}
EXACT = {f"rationale_{n}": {f"sentence_{i}": x for i, x in enumerate(row, 1)} for n, row in enumerate(TRUE, 1)}


def verbatim(rationales=RATIONALES, rows=TRUE, names=None, around="{\n%s\n}"):
    """The form as the request shows it, filled in: nothing is escaped."""
    parts = []
    for number, (sentences, row) in enumerate(zip(rationales, rows, strict=True), start=1):
        lines = ",\n".join(f'"{sentence}": {x}' for sentence, x in zip(sentences, row, strict=True))
        parts.append(f'"rationale_{names[number - 1] if names else number}": {{\n{lines}\n}}')
    return around % ",\n".join(parts)


def quoted():
    """The same as JSON is written: everything is escaped."""
    return json.dumps({
        f"rationale_{n}": dict(zip(sentences, row, strict=True))
        for n, (sentences, row) in enumerate(zip(RATIONALES, TRUE, strict=True), start=1)
    })  # fmt: skip


def outcomes(reply, rationales=RATIONALES):
    """Of each rationale its scores, or the reason why it has none."""
    found = []
    for part, sentences in zip(together.split(reply, len(rationales)), rationales, strict=True):
        try:
            found.append(part.reason if isinstance(part, Refused) else parse_scores(part, sentences))
        except Refused as refused:
            found.append(refused.reason)
    return found


def changed(form, change):
    form = copy.deepcopy(form)
    change(form)
    return json.dumps(form)


def order(form, *keys):
    return json.dumps({key: form[key] for key in keys})


GOOD = {
    "lists": json.dumps(LISTS),
    "lists on many lines": json.dumps(LISTS, indent=1),
    "exact": json.dumps(EXACT),
    "exact, indented": json.dumps(EXACT, indent=4),
    "verbatim": verbatim(),
    "quoted": quoted(),
    "lists with prose around": f"Here you are:\n```json\n{json.dumps(LISTS)}\n```\nI hope it helps.",
    "exact with prose around": f"Here you are:\n```json\n{json.dumps(EXACT, indent=1)}\n```\nI hope it helps.",
    "verbatim with prose around": f"Here you are:\n```json\n{verbatim()}\n```\nI hope it {{really}} helps.",
    "another order of names": order(EXACT, "rationale_3", "rationale_1", "rationale_4", "rationale_2"),
    "verbatim in another order": verbatim(RATIONALES[::-1], TRUE[::-1], names=(4, 3, 2, 1)),
    "an object for each": "\n".join(json.dumps({name: each}) for name, each in EXACT.items()),
    "a list of objects": json.dumps([{name: each} for name, each in EXACT.items()]),
    "lists with names": json.dumps({f"rationale_{n}": row for n, row in enumerate(TRUE, 1)}),
    "score objects with names": json.dumps({f"rationale_{n}": {"scores": row} for n, row in enumerate(TRUE, 1)}),
    "capitals": json.dumps({f"Rationale {n}": row for n, row in enumerate(TRUE, 1)}),
    "a wrapper": json.dumps({"scores": EXACT}),
}
ALL = ["wrong_count"] * 4
A, B, C, D = TRUE
BAD = {
    "one list is missing": (json.dumps({"scores": [A, B, D]}), ALL),
    "a list too many": (json.dumps({"scores": [A, B, C, D, [0.9]]}), ALL),
    "lists of swapped counts": (json.dumps({"scores": [A, C, D, B]}), [A, C, "wrong_count", "wrong_count"]),
    "a flat list": (json.dumps({"scores": A + B + C + D}), ALL),
    "one flat among lists": (json.dumps({"scores": [A, B, C, 0.6]}), ALL),
    "lists within lists": (json.dumps({"scores": [[A, B, C, D]]}), ALL),
    "one list too deep": (json.dumps({"scores": [A, [B], C, D]}), ALL),
    "one list too short": (json.dumps({"scores": [A, B, [0.5], D]}), [A, B, "wrong_count", D]),
    "an empty list": (json.dumps({"scores": [A, B, [], D]}), [A, B, "wrong_count", D]),
    "one number too large": (json.dumps({"scores": [A, [0.1, 1.4], C, D]}), [A, "out_of_range", C, D]),
    "one left in": (json.dumps({"scores": [A, B, ["xxx", 0.3], D]}), [A, B, "placeholder", D]),
    "null": (json.dumps({"scores": [A, B, C, [None]]}), [A, B, C, "not_a_number"]),
    "NaN": (json.dumps({"scores": [A, B, C, [math.nan]]}), [A, B, C, "not_a_number"]),
    "lists cut off": (json.dumps(LISTS)[:-12], ALL),
    "two answers that differ": (json.dumps(LISTS) + json.dumps({"scores": [A, B, C, [0.0]]}), ["ambiguous"] * 4),
    "both forms": (json.dumps({"scores": [A, B, C, [0.0]]}) + verbatim(), ["ambiguous"] * 4),
    "the other forms": (verbatim() + json.dumps({"scores": [A, B, C, [0.0]]}), ["ambiguous"] * 4),
    "a second thought": (json.dumps(EXACT) + '\nRevised: {"It is B.": 0.2}', ["ambiguous"] * 4),
    "a first thought": ('{"It is B.": 0.2}\n' + verbatim(), ["ambiguous"] * 4),
    "scores of the whole": (changed(EXACT, lambda form: form.update(overall=0.4)), [A, B, C, "ambiguous"]),
    "one name is missing": (changed(EXACT, lambda form: form.pop("rationale_2")), [A, "wrong_count", C, D]),
    "a name too many": (changed(EXACT, lambda form: form.update(rationale_5={"sentence_1": 1})), ["ambiguous"] * 4),
    "names from 0": (verbatim(names=(0, 1, 2, 3)), ["ambiguous"] * 4),
    "a name twice": (verbatim(names=(1, 2, 2, 4)), [A, "ambiguous", "wrong_count", D]),
    "names of each other": (verbatim(names=(1, 3, 2, 4)), [A, "ambiguous", "no_json", D]),
    "counts of each other": (
        changed(EXACT, lambda form: form.update(rationale_1=form["rationale_2"], rationale_2=form["rationale_1"])),
        ["wrong_count", "wrong_count", C, D],
    ),
    "numbers that go on": (
        changed(EXACT, lambda form: form.update(rationale_3={"sentence_6": 0.5, "sentence_7": 0.3})),
        [A, B, "ambiguous", D],
    ),
    "one within another": (
        '{"rationale_1": {"rationale_2": {"sentence_1": 0.1, "sentence_2": 0.4}, "sentence_1": 0.1}, '
        '"rationale_3": {"sentence_1": 0.5, "sentence_2": 0.3}, "rationale_4": {"sentence_1": 0.6}}',
        ["ambiguous", "ambiguous", C, D],
    ),
    "one score for each rationale": (json.dumps(dict.fromkeys(EXACT, 0.5)), ALL),
    "a score beside the names": (
        '{"rationale_1": {"sentence_1": 0.1, "sentence_2": 0.2, "sentence_3": 0.3}, "So it is A.": 0.9, '
        '"rationale_2": {"sentence_1": 0.1, "sentence_2": 0.4}}',
        ["ambiguous", B, "wrong_count", "wrong_count"],
    ),
    "cut off": (verbatim()[:-30], [A, B, C, "wrong_count"]),
    "cut off in a part": (json.dumps(EXACT)[:-30], [A, B, C, "wrong_count"]),
    "one of four is unusable": (
        verbatim().replace('"It is B.": 0.6', '"It is B": good'), [A, B, C, "not_a_number"],
    ),
    "a sentence is missing": (verbatim().replace('"Water is wet.": 0.5,\n', ""), [A, B, "wrong_count", D]),
    "a sentence of another": (verbatim().replace("Water is wet", "Ice melts"), [A, B, "ambiguous", D]),
    "prose": ("I have read it and it is mostly fine.", ["no_json"] * 4),
    "a reply about one": ('{"scores": [0.1, 0.2, 0.3]}', ALL),
    "an object about one": (verbatim(RATIONALES[:1], TRUE[:1]).replace('"rationale_1": ', ""), ALL),
    "nothing": ("  ", ["no_reply"] * 4),
    "deep": ("[" * 50_000, ["ambiguous"] * 4),
    "deep once": ("[" * 30 + '"', ["no_json"] * 4),
    "deep in a list": ('{"scores": [' + "[" * 20 + "]" * 20 + "]}", ALL),
    "deep in a part": ('{"rationale_1": ' + "[" * 50_000, ["no_json", *["wrong_count"] * 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_replies_in_every_form_are_read(name):
    assert outcomes(GOOD[name]) == TRUE


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_for_its_rationale_alone(name):
    reply, expected = BAD[name]
    assert outcomes(reply) == expected


def value_of(sentence):
    """A score of its own for every sentence."""
    return round(random.Random(sentence).random(), 6)


WORDS = st.text('abc"{}[]:, .0_', min_size=1, max_size=12)
NAMES = st.sampled_from(['"rationale": {', '": [[0.5], [0.1], [1]]', '{"scores": [[0.5]]}', "xxx", "}", "{", '": 0.5'])
SENTENCES = st.lists(WORDS, min_size=1, max_size=3).flatmap(
    lambda words: NAMES.map(lambda name: " ".join([*words, name]))
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_score_never_counts_for_another_sentence(data):
    """Replies that name the sentences, damaged in every way: what is accepted is what was said of the sentence."""
    sentences = st.one_of(st.sampled_from(["It is so.", "Ice melts.", "So B."]), WORDS, SENTENCES)
    rationales = [tuple(data.draw(st.lists(sentences, min_size=1, max_size=3))) for _ in range(3)]
    assume(all(together.shared_text(Request("id", SCORE, "1", handoff.form(each), each)) == "" for each in rationales))
    rows = [[value_of(sentence) for sentence in each] for each in rationales]
    reply = verbatim(rationales, rows)
    lines = reply.split("\n")
    for _ in range(data.draw(st.integers(0, 4))):
        at, to = (data.draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        change = data.draw(st.sampled_from(["drop", "repeat", "swap", "cut"]))
        if change == "drop" and len(lines) > 2:
            del lines[at]
        elif change == "repeat":
            lines.insert(to % len(lines), lines[at % len(lines)])
        elif change == "swap":
            lines[at % len(lines)], lines[to % len(lines)] = lines[to % len(lines)], lines[at % len(lines)]
        elif change == "cut" and len(lines) > 3:
            lines = lines[: max(3, at)]
    for found, expected in zip(outcomes("\n".join(lines), rationales), rows, strict=True):
        assert isinstance(found, str) or found == expected


@given(st.one_of(st.binary(), st.text(), st.text(alphabet='{}[]":rationle_123,. \n')))
def test_any_text_gives_parts_or_refusals(reply):
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else reply
    assert len(outcomes(text)) == 4


def test_long_replies_are_split_in_linear_time():
    for unit in ('"rationale_1": {', "[[", '{"rationale_2": [0.5]},', "}}", '"rationale_1": "', '\\"rationale_1": {'):
        outcomes(unit * (199_000 // len(unit)))


# -- what is refused is asked again ----------------------------------------------------------------------------


def asked_of(server, *words):
    """(rationales, notes) of the requests that hold the words, in order."""
    return [asked for asked in server.asked if all(word in asked.text for word in words)]


@pytest.mark.parametrize("ways", [(), ("--batch", "--poll_seconds", "0.05")], ids=["live", "batches"])
def test_what_is_refused_is_asked_again_together_and_at_last_alone(server, tmp_path, problems, ways):
    world = World(server, tmp_path / "q", "--no-cache", "--together", *ways)
    for action in range(K):
        lay_out(world.root, action, TEXT, [f"It is the {action}.", "So."], problems)
    requests = []

    def respond(asked):
        requests.append(asked)
        lists = [[0.5, 0.6] for _ in asked.rationales]
        for place, sentences in enumerate(asked.rationales):  # the last two are never usable before they are alone
            if len(lists) > 1 and sentences[0] in ("It is the 2.", "It is the 3."):
                lists[place] = [0.5]
        return json.dumps({"scores": lists if len(lists) > 1 else lists[0]}), "end_turn"

    server.respond = respond
    world.ask("--attempts", "4")
    sent = [[sentences[0][-2] for sentences in asked.rationales] for asked in requests]
    assert sent[:3] == [["0", "1", "2", "3"], ["2", "3"], ["2", "3"]] and sorted(sent[3:]) == [["2"], ["3"]]
    assert "wrong_count" in requests[1].notes[-1] and len(requests[0].notes) == 1
    assert world.answered == K and [sidecar(item.folder)["attempt"] for item in world.items] == [1, 1, 4, 4]
    assert ["together" in sidecar(item.folder) for item in world.items] == [True, True, False, False]


@pytest.mark.parametrize("ways", [(), ("--batch", "--poll_seconds", "0.05")], ids=["live", "batches"])
def test_attempts_count_for_each_rationale(server, tmp_path, problems, ways):
    """Those that stay unusable are reported, each asked `--attempts` times; their files hold nothing of the others."""
    world = World(server, tmp_path / "q", "--no-cache", "--together", *ways)
    for action in range(K):
        lay_out(world.root, action, TEXT, [f"It is the {action}."] if action else ["It is the 1.", "So."], problems)
    count = {}

    def respond(asked):
        for sentences in asked.rationales:
            count[tuple(sentences)] = count.get(tuple(sentences), 0) + 1
        if len(asked.rationales) == 1:
            return "I do not know.", "end_turn"
        return json.dumps({"scores": [[0.5]] * (len(asked.rationales) - 1)}), "end_turn"

    server.respond = respond
    world.stops("4 of 4 replies are unusable", "--attempts", "3")
    assert set(count.values()) == {3} and not world.answered
    for item in world.items:  # the replies about several are kept where nothing reads them
        assert (item.folder / handoff.REPLY).read_text() == "I do not know."
    count.clear()
    world.stops("4 of 4", *(("--attempts", "4") if ways else ("--attempts", "1")))
    assert set(count.values()) == {1}
    if not ways:  # the first attempt is the last: together
        for item in world.items:
            assert not handoff.has_reply(item.folder) and (item.folder / handoff.REFUSED_REPLY).exists()
            assert "wrong_count" in (item.folder / handoff.REASON).read_text()
        server.respond = fill_form
        world.ask()
        assert world.answered == K


@pytest.mark.parametrize("ways", [(), ("--batch", "--poll_seconds", "0.05")], ids=["live", "batches"])
def test_one_that_the_api_refuses_does_not_take_the_others_along(server, tmp_path, problems, ways):
    world = World(server, tmp_path / "q", "--no-cache", "--together", *ways)
    for action in range(K):
        lay_out(world.root, action, TEXT, [f"It is the {action}."], problems)
    lay_out(world.root, 0, "1", ["It is so."], problems)
    said = "messages: Output blocked by content filtering policy"
    server.plan = lambda asked: Fault(400, said) if "It is the 2" in asked.text else None
    invalid = {"type": "invalid_request_error", "message": said}
    server.outcome = lambda custom_id, asked: invalid if "It is the 2" in asked.text else "succeeded"
    world.stops("1 of 5 replies are unusable .*filtering policy")
    assert world.answered == 4
    if ways:
        requests = sum(world.submitted)
        world.stops("1 of 5 replies are unusable", "--attempts", "9")
        assert sum(world.submitted) == requests, "never again"


def test_what_is_too_large_together_is_asked_alone(server, tmp_path, problems, monkeypatch):
    for number, ways in enumerate([(), ("--batch", "--poll_seconds", "0.05")]):
        world = World(server, tmp_path / f"q{number}", "--no-cache", "--together", *ways)
        for action in range(K):
            lay_out(world.root, action, TEXT, [f"It is the {action}. " * 20], problems)
        with monkeypatch.context() as small:
            small.setattr(api_teacher, "MAX_REQUEST_BYTES", len(world.request()) + 200)
            world.ask()
        assert world.answered == K and len(server.log) + sum(world.submitted) == K * (number + 1)


def test_a_batch_outlives_its_flags_and_a_rationale_that_changes(server, tmp_path, problems):
    """Submitted together, collected without the flag; a rationale that was exported anew gets none of the replies."""
    world = World(server, tmp_path / "q", "--no-cache", "--batch", "--poll_seconds", "0.05")
    for action in range(K):
        lay_out(world.root, action, TEXT, [f"It is the {action}."], problems)
    lay_out(world.root, 3, "1", ["It is so."], problems)
    world.ask("--together", "--submit-only")
    [record] = world.records
    entries = next(asked for asked in record["asked"].values() if isinstance(asked, list))
    assert [entry["item"] for entry in entries] == [f"{action}/p0/{TEXT}" for action in range(K)]
    lay_out(world.root, 1, TEXT, ["Quite another thought.", "So."], problems)
    shutil.rmtree(world.root / "3/p0" / TEXT)
    world.stops("--actions: the pending batches hold action", "--actions", "0")
    world.ask()
    assert world.submitted == [2, 1] and world.answered == 4
    changed = world.root / f"1/p0/{TEXT}"
    assert len((changed / handoff.SCORES).read_text().split()) == 2 and "together" not in sidecar(changed)
    path = next((world.root / "teacher/batches").glob("*.json"))
    sound = json.loads(path.read_text())
    for damaged in ([], [7], [{}]):
        path.write_text(json.dumps(sound | {"asked": dict.fromkeys(sound["asked"], damaged)}))
        world.stops("is damaged")


def test_ctrl_c_saves_all_parts_of_the_replies_in_flight(server, joint):
    server.latency = 0.5
    running = joint.client("--concurrency", "3", patch="from teacher import api_teacher; api_teacher.START = 3")
    wait_until(lambda: server.in_flight == 3)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in err, (out, err)
    sent = sum(len(asked.rationales) for asked in server.asked)
    assert len(server.log) == 3 and joint.answered in (sent, sent + 1) and joint.totals.unknown == 0
    server.latency = 0.0
    joint.ask()
    assert len(server.log) == 11 and joint.answered == len(joint.items)


def test_all_parts_are_saved_when_the_disk_gets_full(server, tmp_path, problems):
    with small_disk(tmp_path / "disk", "24m") as disk:
        many_items(disk / "questions", 120, problems)
        world = World(server, disk / "questions", "--together", "--no-cache", "--concurrency", "20")
        server.latency = 1.0
        running = world.client(patch="from teacher import api_teacher; api_teacher.START = 20")
        wait_until(lambda: server.in_flight == 20)
        fill(disk)
        out, err = running.communicate(timeout=120)
        assert running.returncode == 2 and "No space left on device" in err and "Traceback" not in err, (out, err)
        paid = sum(len(asked.rationales) for asked in server.asked)
        assert paid == world.answered >= 20 * K
        (disk / "filler").unlink()
        server.latency = 0.0
        world.ask()
        assert world.answered == 120 and len(server.log) == 30, "nothing is paid for twice"


# -- looking before asking -------------------------------------------------------------------------------------


@pytest.fixture
def sample_round(tmp_path, problems, sample):
    """Four rationales of 60 real questions, half with images: gold solutions, each with another opening."""
    qids = [qid for qid, problem in problems.items() if problem["solution"].strip()][::20][:60]
    for qid in qids:
        for action in range(K):
            sentences = split_text(problems[qid]["solution"].replace("\n", "\\n"))
            lay_out(tmp_path / "round", action, qid, [f"Attempt {action} at it.", *sentences], problems, sample)
    handoff.mark_exported(tmp_path / "round")
    return tmp_path / "round"


def test_estimate_shows_both_ways_and_other_models(server, sample_round, capsys, monkeypatch):
    world = World(server, sample_round, "--no-cache")
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    rows = {}
    for flags in ((), ("--together",)):
        world.ask("--estimate", *flags)
        out = capsys.readouterr().out
        own = float(re.search(r"\$([\d.]+) live", out)[1])
        for line in out.splitlines():
            if found := re.match(
                r"(claude\S+) +(apart|together) +([\d,]+) .*?\$([\d.]+) +\$([\d.]+) +by rule, \+-15 %", line
            ):
                rows[found[1], found[2]] = [float(number.replace(",", "")) for number in found.groups()[2:]]
        assert own == rows["claude-haiku-5-5", "together" if flags else "apart"][1]
    assert len(rows) == 4
    for model in ("claude-haiku-5-5", "claude-haiku-4-5"):
        (apart, live, batch), (joint, less, half) = rows[model, "apart"], rows[model, "together"]
        assert apart == 4 * joint == 240 and less < 0.6 * live
        assert batch == pytest.approx(live / 2, rel=0.01) and half == pytest.approx(less / 2, rel=0.01)
    assert not server.log


def test_the_rule_knows_families_of_models():
    for model, characters in (("claude-haiku-4-5-20251001", 3.5), ("claude-haiku-5-5", 3.5 / 1.3),
                              ("anthropic/claude-haiku-5.5", 3.5 / 1.3), ("claude-3-haiku-20240307", 3.5),
                              ("eu.anthropic.claude-sonnet-4-5-20250929-v1:0", 3.5)):  # fmt: skip
        assert estimate.family_of(model).characters_per_token == characters and estimate.family_of(model).error == 0.15
    for model in ("Qwen/Qwen3-VL-8B-Instruct", "gpt-5", "qwen2.5-vl"):
        assert estimate.family_of(model) == estimate.OTHER and estimate.OTHER.error > 0.15


def test_a_plan_counts_on_joined_requests(problems):
    qids = [qid for qid, problem in problems.items() if problem["solution"].strip()][:300]
    usd = [estimate.expected_usd(SCORE, problems, qids, None, flags, 4) for flags in ({}, {"together": True})]
    assert 0.2 * usd[0] < usd[1] < 0.6 * usd[0]
    assert estimate.expected_usd("correct", problems, qids, None, {"together": True}, 4) > usd[1]


def test_show_prints_the_joined_request(server, joint, capsys):
    joint.ask("--show", TEXT)
    out = capsys.readouterr().out
    assert out.count('"rationale_3": {') == 1 and "rationale_4" not in out and "score3-0-0-155" in out
    assert WORDING.together in out and not server.log
    World(server, joint.root).ask("--show", TEXT)
    assert "rationale_1" not in capsys.readouterr().out


def test_flags_of_scoring_only(server, joint, sample):
    data = f"{sample}/ScienceQA/data"
    joint.stops("--together has no effect with --teacher reference", "--teacher", "reference", "--data_root", data)
    joint.stops("--against apart", "--check", "3", "--against", "reference")
    other = World(server, joint.root)
    other.stops(
        "--teacher reference has no --together", "--teacher", "reference", "--check", "3", "--against", "apart"
    )


def test_check_compares_with_apart(server, joint, sample, capsys, tmp_path, problems):
    """A Teacher that gives later rationales of a request less: the lines show it by place."""
    world = World(server, joint.root, "--data_root", sample / "ScienceQA/data")

    def respond(asked):
        text, stop = score_by_text(asked)
        if len(asked.rationales) > 1:
            lists = json.loads(text)["scores"]
            text = json.dumps({"scores": [[max(0, x - 0.2 * n) for x in row] for n, row in enumerate(lists)]})
        return text, stop

    server.respond = respond
    world.ask("--check", "5", "--against", "apart")
    out = capsys.readouterr().out
    assert "claude claude-haiku-5-5 together against claude claude-haiku-5-5 apart" in out
    rows = dict(re.findall(r"^ *((?:rationale )?\d\+?|all) +\d+ +([\d.]+)", out, re.MULTILINE))
    assert float(rows["rationale 1"]) == 0 < float(rows["rationale 2"]) < float(rows["rationale 4"])
    assert not joint.answered and len(server.log) in (5 * 5, 5 * 5 - 1), "one together, four apart, each asked"
    found = json.loads((joint.root / "teacher/check.json").read_text())
    [check] = found.values()
    assert check["who"] == "claude claude-haiku-5-5 together" and check["against"] == "claude claude-haiku-5-5 apart"
    assert check["rationales"] == check["scored_by_both"] in (20, 19)
    assert check["rows"]["rationale 1"]["mean_difference"] == 0 and check["rows"]["all"]["within_0.1"] < 1
    assert len(check["scores"]) == check["rationales"]
    assert all(len(one) == len(other) for one, other in check["scores"].values())
    world.ask("--check", "3")
    again = json.loads((joint.root / "teacher/check.json").read_text())
    assert len(again) == 2 and found.items() <= again.items()
    one = World(server, tmp_path / "one", "--data_root", sample / "ScienceQA/data")
    for action in range(2):
        lay_out(one.root, action, TEXT, ["The same."], problems)
    one.stops("no question has two different rationales", "--check", "3", "--against", "apart")


def test_watch_groups_what_is_exported(server, tmp_path, sample, problems):
    """RL writes all rationales of a question at once; what comes later is asked with what is open then."""
    data = ("--data_root", sample / "ScienceQA/data", "--images", sample / "images")
    world = World(server, tmp_path / "questions", "--watch", "0.02", "--poll_seconds", "0.1", "--together", *data)
    for action in range(K):
        folder = handoff.question_dir(world.root, action, 0, PICTURE)
        handoff.write_rationale(folder, [f"It is thought {action}."])
    handoff.mark_exported(world.root)
    world.ask()
    assert len(server.log) == 1 and world.answered == K and len(server.asked[0].rationales) == K


def test_shares_sum_to_the_whole():
    for count in (2, 3, 7):
        reply = Reply("x", "claude", "m", usage={"input_tokens": 1001, "output_tokens": 5}, cost_usd=0.0123)
        parts = list(together.shares(reply, count))
        assert sum(part.usage["input_tokens"] for part in parts) == 1001
        assert sum(part.usage["output_tokens"] for part in parts) == 5
        assert sum(part.cost_usd for part in parts) == pytest.approx(0.0123)
    assert [part.cost_usd for part in together.shares(Reply("x", "t", "m", cost_usd=None), 2)] == [None, None]
