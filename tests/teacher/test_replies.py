"""Reading the Teacher's replies: the released parser's cases, and any sentences in any accepted wrapping."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares.sentences import is_finished, remove_repeats, sentence_columns, split_text
from teacher import reply_files
from teacher.corrections import parse_correction
from teacher.handoff import RATIONALE, REASON, REFUSED_REPLY, REPLY, SCORES, SIDECAR
from teacher.interface import CORRECT, JUDGE, SCORE
from teacher.parsing import LONGEST, Refused, Verdict, parse_scores, parse_verdict
from teacher.reference import correct_rationale, score_sentences
from teacher.reply_files import is_answered, read_reply, read_scores, reading
from tests.disk import disk_calls
from utils_evaluate import extract_answer

# Cases of fixtures/scores_parse.json where the released parser is no guide, with the right verdict and why.
ACCEPT = {
    "text_with_brace_colon_before": [0.8, 0.5, 1.0],  # braces in the text around the object are text
    "score_quoted": [0.8, 0.5, 1.0],  # a quoted number is a number
    "comma_space": [0.8, 0.5, 1.0],  # a blank after the comma means nothing
    "single_line_json_3": [0.8, 0.5, 1.0],  # JSON may stand on one line
    "single_line_json_1_comma": [0.9], "value_comma_brace": [0.9],  # a trailing comma
    "brace_in_sentence": [0.3, 0.7], "close_brace_in_sentence": [0.3, 0.7],  # braces inside a sentence belong to it
    "nested_object": [0.8, 0.5, 1.0],  # a wrapper object around the answer
    "array_json": [0.8, 0.5, 1.0],  # a bare array of the right length
    "reordered": [0.8, 0.5, 1.0],  # all sentences in another order are mapped by text
    "value_neg_zero": [0.0],  # -0.0 is 0
}  # fmt: skip
REFUSE = {
    "score_nan": "not_a_number",  # nan compares false with both bounds and slipped through the range test
    "score_underscore": "not_a_number",  # 0_0 is Python's spelling, no score
    "score_fullwidth": "not_a_number",  # Python's float takes full-width digits
    "different_sentence_text": "ambiguous",  # keys that name no sentence; the released parser went by position
    "missing_rationale": "no_rationale",  # nothing to score; the released parser returned without a word
}
REASONS = {  # both refuse: ours says why
    "xxx_all": "placeholder", "xxx_last": "placeholder", "xxx_middle": "placeholder", "xxx_first": "placeholder",
    "too_few": "wrong_count", "too_many": "wrong_count", "score_above_1": "out_of_range",
    "score_negative": "out_of_range", "score_inf": "not_a_number", "score_words": "not_a_number",
    "score_null": "not_a_number", "score_percent": "not_a_number", "score_range": "not_a_number",
    "value_1.00001": "out_of_range", "empty_output": "no_reply", "whitespace_output": "no_reply",
    "missing_output": "no_reply", "refusal": "no_json", "missing_open": "no_json", "missing_close": "no_json",
    "missing_both": "no_json", "two_full_copies": "ambiguous",
}  # fmt: skip


def outcome(parse, *args):
    """What a parser reads, or the reason of its refusal."""
    try:
        return parse(*args)
    except Refused as refused:
        assert re.fullmatch(r"[a-z_]+", refused.reason)
        return refused.reason


def test_cases_of_the_released_parser(fixtures, tmp_path):
    cases, counts = json.loads((fixtures / "scores_parse.json").read_text())["cases"], Counter()
    for number, case in enumerate(cases):
        name, folder = case["name"], tmp_path / str(number)
        folder.mkdir()
        for file, text in ((RATIONALE, case["rationale"]), (REPLY, case["output"])):
            if text is not None:
                (folder / file).write_bytes(text.encode())
        found = outcome(read_scores, folder)
        refused = isinstance(found, str)
        assert refused == (name in REFUSE or (case["scores"] is None and name not in ACCEPT)), name
        released = case["scores_float"] if not refused else REASONS.get(name, found)
        assert found == (ACCEPT | REFUSE).get(name, released), name
        assert (folder / REASON).exists() == refused != (folder / SCORES).exists()
        if refused:
            assert (folder / REASON).read_text().startswith(found)
        else:
            assert str(found[0])[0] != "-"
            assert [float(line) for line in (folder / SCORES).read_text().splitlines()] == found
        counts["refused" if refused else "accepted" if name in ACCEPT else "same"] += 1
    assert {case["name"] for case in cases} >= ACCEPT.keys() | REFUSE.keys() | REASONS.keys()
    assert len(cases) == 81 and counts == {"same": 32, "accepted": 12, "refused": 37}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / RATIONALE).write_text('{\n"A.": xxx\n}\n')
    return tmp_path


def test_files_that_hold_the_result_already_are_not_written_again(folder):
    """A round has 50,904 of them, and RL reads them all after the Teacher's client did."""
    for reply, result in (('{"A.": 1}', SCORES), ("no scores", REASON)):
        (folder / REPLY).write_text(reply)
        inodes = set()
        for _ in range(2):
            with contextlib.suppress(Refused):
                assert read_scores(folder) == [1.0]
            inodes.add((folder / result).stat().st_ino)
        assert len(inodes) == 1
    (folder / SCORES).symlink_to(folder / "elsewhere")  # a link there is replaced, never written through
    (folder / "elsewhere").write_text("1.0\n")
    (folder / REPLY).write_text('{"A.": 1}')
    read_scores(folder)
    assert not (folder / SCORES).is_symlink() and (folder / SCORES).read_text() == "1.0\n"


def test_reason_and_scores_replace_each_other(folder):
    (folder / SCORES).write_text("0.5\n")
    (folder / REASON).write_text("api_400: too odd\n")
    with pytest.raises(Refused, match="no_reply"):
        read_scores(folder)  # the client's reason stays while there is no reply
    assert (folder / REASON).read_text() == "api_400: too odd\n" and not (folder / SCORES).exists()
    for reply, reason in ((b'{"A.": 2}', "out_of_range"), (b'{"A.": 0.2}', None), (b"\xff\xfe\x00", "no_json")):
        (folder / REPLY).write_bytes(reply)
        with pytest.raises(Refused, match=reason) if reason else contextlib.nullcontext():
            assert read_scores(folder) == [0.2]
        assert (folder / REASON).exists() == bool(reason) != (folder / SCORES).exists()
        assert reason or (folder / SCORES).read_text() == "0.2\n"


def test_when_an_item_needs_no_asking_again(folder):
    assert not is_answered(SCORE, folder)
    (folder / REPLY).write_text('{"A.": 0.2}')
    assert is_answered(SCORE, folder) and (folder / SCORES).read_text() == "0.2\n"
    (folder / REPLY).write_text("I would rather not.")
    os.utime(folder / SCORES, (1, 1))  # scores of an older reply say nothing of this one
    assert not is_answered(SCORE, folder)
    (folder / SCORES).touch()  # nor does an empty file
    assert not is_answered(SCORE, folder)
    corrections = {"{final rationale: unchanged}": True, "{final rationale: A b.}": True, "A b.": False}
    for reply, answered in corrections.items():
        (folder / REPLY).write_text(reply)
        assert is_answered(CORRECT, folder) == (reading(CORRECT, reply, ["A."]) is None) == answered, reply
    assert reading(SCORE, '{"A.": 0.2}', ["A."]) == [0.2] and reading(SCORE, "?", ["A."]).reason == "no_json"
    (folder / REPLY).write_text('{"verdict": "2"}')
    assert is_answered(JUDGE, folder) and read_reply(JUDGE, folder) == "2" and reading(JUDGE, "?", ()) is not None


def test_a_paid_reply_is_flushed_to_disk_after_its_sidecar(tmp_path):
    """A kill or a power cut may leave a sidecar without a reply, never a reply without its sidecar."""
    (tmp_path / REASON).write_text("no_reply\n")
    with disk_calls() as calls:
        reply_files.write_reply(tmp_path, "{}", {"model": "m"}, [0.5])
        reply_files.write_reply(tmp_path, "{}", {"model": "m"}, [0.6], paid=False)
    assert calls == [SIDECAR, "flush", REPLY, SCORES, SIDECAR, REPLY, SCORES] and not (tmp_path / REASON).exists()
    assert reply_files.read_sidecar(tmp_path) == {"model": "m"}
    reply_files.set_cut_reply_aside(tmp_path, "{", "max_tokens")
    assert {path.name for path in tmp_path.iterdir()} == {REASON, SIDECAR, REFUSED_REPLY}
    assert reply_files.reason_of(tmp_path) == "max_tokens"


THREE = ["The ice melts.", "It is a change of state.", "So, the answer is B."]
T1, T2, T3 = THREE
SCORED = [0.1, 0.2, 0.3]
ESCAPED = ["The été is hot.", 'He said "no".', r"It is \frac{1}{2} of x."]


A, AB, ABC, THE_AB = ["A."], ["A.", "B."], ["A.", "B.", "C."], ["The A.", "The B."]
HOT, WATER = ["Is it hot?", "Is it hot."], ["The ice melts.", "The water is hot."]
READINGS = [  # sentences, scores or the reason of a refusal, replies
    (AB, [0.1, 0.2], ['{"scores": [0.1, 0.2]}', "[0.1, 0.2]\n",
                      'Sure!\n```json\n{\n  "scores": [\n    0.1,\n    "0.2",\n  ]\n}\n```']),
    (AB, "wrong_count", ["[0.1, 0.2, 0.3]", '{"scale": [0.0, 1.0]}']),
    (AB, "ambiguous", ["[0.1, 0.2]\n[0.1, 0.3]"]),
    (AB, "not_a_number", ["[0.1, nan]"]),
    (A, "no_json", ["As said in [1], nothing fits.", "[" * 100_000]),
    # repeats: one score each, in their order; a JSON parser would keep the last only
    (["A.", "B.", "A."], [0.7, 0.5, 0.0], ['{"A.": 0.7, "B.": 0.5, "A.": 0.0}']),
    (["A.", "B.", "A."], "ambiguous", ['{"B.": 0.5, "A.": 0.7, "A.": 0.0}']),
    (["A.", "B.", "A."], [0.7, 0.5, 0.7], ['{"B.": 0.5, "A.": 0.7, "A.": 0.7}']),
    (AB, "ambiguous", ['{"A.": 0.1, "A.": 0.1}']),  # one sentence twice is not both
    # the same answer twice is one answer; a form left empty beside the filled one is none
    (A, [0.7], ['{"A.": 0.7}\nThat is:\n{"A.": 0.7}', 'Form: {"A.": xxx}\nFilled: {"A.": 0.7}']),
    (AB, [0.7, 0.1], ['Like {"sentence": 0.5}: {"A.": 0.7, "B.": 0.1}']),
    # a sentence that begins like another
    (["X", "a", 'a": 0.5, "b'], [0.3, 0.1, 0.9], ['{"a": 0.5, "b": 0.9, "a": 0.1, "X": 0.3}']),
    # reworded sentences are nobody's
    (AB, "ambiguous", ['{"The A!": 0.7, "The B!": 0.1}', '{"B.": 0.7, "The A!": 0.1}']),
    # another order is seen through lost full stops, other case and added numbers
    (["The A.", "The B.", "E."], [0.1, 0.7, 0.3], ['{"the b": 0.7, "The A!": 0.1, "E.": 0.3}']),
    (THE_AB, [0.1, 0.7], ['{"1. The B.": 0.7, "2. The A.": 0.1}', '{"2": 0.7, "1": 0.1}']),
    (THE_AB, [0.7, 0.1], ['{"1": 0.7, "2": 0.1}']),
    (THE_AB, "ambiguous", ['{"the b": 0.7, "Reworded.": 0.1}']),
    (THE_AB, "wrong_count", ['{"The A.": 0.7, "Overall": 0.1}']),
    (["S.", "y"], "not_a_number", ['{"S.": 0.1, "x": high, "y": 0.2}']),
    (["S.", "T.", "U."], "not_a_number", ['{"reworded": 0.1, "b": high, "c": 0.2, "d": 0.3}']),
    # values
    (A, [0.5], ['{"A.": {"score": 0.5}}', b"\xef\xbb\xbf{\"A.\": 0.5}"]),
    (AB, "no_json", ['{"A.": 0.5, "B.": }']),
    (A, "wrong_count", ['{"A.": 0.5 or 0.6}']),
    (AB, [0.5, 1.0], ['{"A.": .5, "B.": 1.}']),
    (A, "out_of_range", ['{"A.": 1e999}']),
    (A, "placeholder", ['{"A.": "xxx"}']),
    (A, "no_reply", [None]),
    # a score of the whole, or of something else, is no sentence's
    (ABC, "wrong_count", [
        '{"A.": 0.9, "B.": 0.8, "overall_score": 0.2}', '{"A.": 0.9, "B.": 0.8, "Overall": 0.2}',
        '{"A.": 0.9, "B.": 0.8, "average score": 0.2}', '{"A.": 0.9, "B.": 0.8, "confidence": 0.2}',
        '{"confidence": 0.9, "A.": 0.8, "B.": 0.7}', '{"A.": 0.9, "B.": 0.8, "C.": 0.7, "overall": 0.2}']),
    (ABC, "ambiguous", ['{"A.": 0.9, "B.": 0.8, "final": 0.2}']),
    (A, "ambiguous", ['{"score": 0.9}']),
    (AB, "ambiguous", ['{"temperature": 0.9, "top_p": 0.8}']),
    # numbers name sentences, in any order and from 0; other sets of numbers do not
    (THREE, SCORED, [
        '{"3": 0.3, "1": 0.1, "2": 0.2}', '{"3.": 0.3, "1.": 0.1, "2.": 0.2}', '{"s3": 0.3, "S2": 0.2, "s1": 0.1}',
        '{"Sentence 2": 0.2, "Sentence 1": 0.1, "Sentence 3": 0.3}', '{"#3": 0.3, "(2)": 0.2, "no. 1": 0.1}',
        '{"sentence_2": 0.2, "sentence_3": 0.3, "sentence_1": 0.1}', '{"2": 0.3, "0": 0.1, "1": 0.2}']),
    (THREE, "ambiguous", [
        '{"1": 0.3, "2": 0.1, "4": 0.2}', '{"1": 0.3, "2": 0.1, "2": 0.2}', '{"-1": 0.3, "2": 0.1, "3": 0.2}',
        '{"2": 0.3, "3": 0.1, "4": 0.2}', '{"Option 1": 0.3, "Option 2": 0.1, "Option 3": 0.2}',
        f'{{"1": 0.3, "2": 0.1, "{T3}": 0.2}}', '{"A": 0.3, "B": 0.1, "C": 0.2}']),  # the options' letters
    (["2.", "1."], "ambiguous", ['{"2": 0.7, "1": 0.1}']),  # by text or by number?
    # case, blanks, quotes, ends, numbering, an ellipsis
    (THREE, SCORED, [
        '{"so the answer is b": 0.3, "THE ICE MELTS": 0.1, "It  is a change of state!": 0.2}',
        '{"\\"So, the answer is B.\\"": 0.3, "`The ice melts.`": 0.1, "**It is a change of state**": 0.2}',
        '{"So, the...": 0.3, "The ice ...": 0.1, "It is a ch…": 0.2}',
        '{"So, ... is B.": 0.3, "The ice melts.": 0.1, "It is … of state.": 0.2}',
        '{"Sentence 2: It is a change of state.": 0.2, "(3) So, the answer is B.": 0.3, "1) The ice melts.": 0.1}']),
    (THREE, "ambiguous", ['{"so is b": 0.3, "THE ICE MELTS": 0.1, "It is a change of state": 0.2}']),
    (WATER, "ambiguous", ['{"The ...": 0.3, "The water is hot.": 0.1}', '{"The ...": 0.3, "Water...": 0.1}']),
    (["The ice melts.", "It is hot."], "ambiguous", ['{"...": 0.3, "It ...": 0.1}']),
    (["1. Walk.", "2. Ride a bus."], [0.1, 0.2], ['{"Walk.": 0.1, "Ride a bus.": 0.2}']),
    (["1. Walk.", "2. Walk."], [0.1, 0.2], ['{"2. walk": 0.2, "1. walk": 0.1}']),
    (["x is > 2.", "x is < 2."], [0.1, 0.2], ['{"x is < 2": 0.2, "X is > 2": 0.1}']),
    (HOT, "ambiguous", ['{"is it hot": 0.2, "It is.": 0.1}', '{"IS IT HOT": 0.2, "Is it hot?": 0.1}',
                        '{"It is hot.": 0.2, "Is it hot!": 0.1}']),
    # JSON's escapes in keys, LaTeX raw and escaped
    (ESCAPED, SCORED, [
        '{"He said \\"no\\".": 0.2, "The \\u00e9t\\u00e9 is hot": 0.1, "It is \\\\frac{1}{2} of x.": 0.3}',
        '{"He said \u201cno\u201d.": 0.2, "the été is hot": 0.1, "It is \\frac{1}{2} of x": 0.3}']),
    # one object per sentence
    (THREE, SCORED, [
        f'{{"{T2}": {{"score": 0.2}}, "{T1}": {{"score": 0.1}}, "{T3}": {{"score": "0.3"}}}}',
        f'{{"{T1[:-1]}": {{"score": 0.1}}, "{T2}": {{"score": 0.2}}, "{T3}": {{"rating": 0.3}}}}']),
    # an array that is quoted, not the reply's own
    (AB, "no_json", [
        "I cannot score these sentences on the scale [0.0, 1.0].", "I can't rate these. The scale is:\n[0.0, 1.0]\n",
        "I'm sorry, scores lie in `[0.0, 1.0]`, but I have none.",
        "Scores lie in\n```\n[0.0, 1.0]\n```\nbut nothing is there.",
        "Unable to answer; an example would be\n[0.3, 0.8]"]),
    (THREE, "no_json", ["Allowed: [0.0, 0.5, 1.0]\nNothing to score."]),
    (A, "no_json", ["As said in\n[1]\nit is so."]),
    (AB, [0.0, 1.0], ["[0.0, 1.0]", "```json\n[0.0, 1.0]\n```", 'Scores:\n{"scores": [0.0, 1.0]}']),
    (AB, [0.3, 0.8], ["Scores: [0.3, 0.8]"]),
    # an answer that quotes the sentences and one by number, which may differ
    (AB, "ambiguous", ['{"A.": 0.7, "B.": 0.1}\n{"1": 0.7, "2": 0.2}']),
    (AB, [0.7, 0.1], ['{"A.": 0.7, "B.": 0.1}\n{"1": 0.7, "2": 0.1}']),
    (A, [0.7], ['{"A.": 0.7}' + " " * (2 * LONGEST)]),
    (A, "too_long", ['{"A.": 0.7}' + "x" * LONGEST]),
]  # fmt: skip


@pytest.mark.parametrize(
    "reply, sentences, expected",
    [(reply, sentences, expected) for sentences, expected, replies in READINGS for reply in replies],
)
def test_a_number_counts_for_the_sentence_that_its_key_names(reply, sentences, expected):
    assert outcome(parse_scores, reply, sentences) == expected


WORDS = "the a ice heat x state melts is not > < 2 3.5 B 'hot' (A) -5 so, \"no\" water".split()
KEY_NOISE = {
    "none": lambda key, data: key,
    "case": lambda key, data: key.swapcase(),
    "ends": lambda key, data: key.rstrip(".!?") + data.draw(st.sampled_from(["", "!", ".", " ."])),
    "blanks": lambda key, data: f" {key.replace(' ', '  ')} ",
    "quotes": lambda key, data: f"'{key}'",
    "cut": lambda key, data: key[: data.draw(st.integers(1, len(key)))] + data.draw(st.sampled_from(["...", "…"])),
    "number": lambda key, data: f"{data.draw(st.integers(1, 6))}. {key}",
    "other": lambda key, data: data.draw(st.sampled_from(["overall", "1", "3", "Sentence 2", "score", "B"])),
}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_noisy_keys_give_the_intended_scores_or_none(data):
    """Every value names its own sentence (0.1, 0.2, ...); keys are noisy, shuffled, doubled or dropped."""
    sentence = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)
    sentences = data.draw(st.lists(st.tuples(sentence, st.sampled_from(".!?")).map("".join), min_size=2, max_size=6,
                                   unique_by=lambda text: text.lower().rstrip(".!?")))  # fmt: skip
    scores = [(place + 1) / 10 for place in range(len(sentences))]
    shuffled = data.draw(st.permutations(range(len(sentences))))
    noise = [data.draw(st.sampled_from(sorted(KEY_NOISE))) for _ in shuffled]
    keys = [KEY_NOISE[kind](sentences[place], data) for kind, place in zip(noise, shuffled, strict=True)]
    pairs = [(json.dumps(key), scores[place]) for key, place in zip(keys, shuffled, strict=True)]
    reply = LAYOUTS[data.draw(st.sampled_from(["lines", "indent", "one line", "no commas", "quoted"]))](pairs)
    numbered = all(re.fullmatch(r"(?:Sentence )?\d", key) for key in keys)  # the value may then be another's
    try:
        found = parse_scores(reply, sentences)
    except Refused:
        assert set(noise) - {"none", "blanks"} or numbered
    else:
        assert found == scores or numbered


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_numbered_keys_in_any_order(data):
    count, first = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([0, 1]))
    name = data.draw(st.sampled_from(["{}", "{}.", "Sentence {}", "sentence_{}", "s{}", "S{}:", "({})"]))
    scores = [place / 10 for place in range(count)]
    pairs = [
        (json.dumps(name.format(place + first)), scores[place]) for place in data.draw(st.permutations(range(count)))
    ]
    sentences = [f"It is {'very ' * place}hot." for place in range(count)]
    assert parse_scores(LAYOUTS["one line"](pairs), sentences) == scores


# -- any sentences, any wrapping -------------------------------------------------------------------------

ONE_LINE = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=40)
NASTY = st.sampled_from(
    ['a": 0.5, "b', '{"x": 1}', 'He said: "3:4".', "}", "{", '"', '\\"', "xxx", "[0.1]", "", "  ", "Time: 5:30, ok.",
     'x": xxx,', "naïve café 水", "a\r", "\u2028", "```", "\\", '": 0.5}']
)  # fmt: skip
SENTENCES = st.lists(ONE_LINE | NASTY, min_size=1, max_size=6)
TENTHS = st.integers(0, 10).map(lambda n: n / 10)

QUOTES = {
    "raw": lambda s: f'"{s}"',
    "json": json.dumps,
    "utf8": lambda s: json.dumps(s, ensure_ascii=False),
}
LAYOUTS = {
    "lines": lambda pairs: "{\n" + ",\n".join(f"{k}: {v}" for k, v in pairs) + "\n}",
    "indent": lambda pairs: "{\n" + ", \n".join(f"    {k} : {v}" for k, v in pairs) + ",\n}",
    "one line": lambda pairs: "{" + ", ".join(f"{k}: {v}" for k, v in pairs) + "}",
    "tight": lambda pairs: "{" + ",".join(f"{k}:{v}" for k, v in pairs) + "}",
    "no commas": lambda pairs: "{\n" + "\n".join(f"{k}: {v}" for k, v in pairs) + "\n}",
    "quoted": lambda pairs: "{" + ", ".join(f'{k}: "{v}"' for k, v in pairs) + "}",
    "crlf": lambda pairs: "{\r\n" + ",\r\n".join(f"{k}: {v}" for k, v in pairs) + "\r\n}\r\n",
    "array": lambda pairs: json.dumps([v for _, v in pairs]),
    "scores": lambda pairs: json.dumps({"scores": [v for _, v in pairs]}, indent=2),
}
AROUND = {
    "bare": "{}",
    "fence": "```json\n{}\n```",
    "prose": "Here are the scores:\n\n{}\n\nNote: the reasoning is fine.",
    "wrapper": '{{\n"rationale": {}\n}}',
    "bom": "\ufeff{}",
    "braces": "I fill {{x}}:\n{}",
}


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_sentences_in_any_wrapping(data):
    sentences = data.draw(SENTENCES)
    scores = data.draw(st.lists(TENTHS, min_size=len(sentences), max_size=len(sentences)))
    quote = QUOTES[data.draw(st.sampled_from(sorted(QUOTES)))]
    layout = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    around = AROUND[data.draw(st.sampled_from(sorted(AROUND)))]
    array = layout([(quote(s), v) for s, v in zip(sentences, scores, strict=True)])
    reply = around.format(array)
    if array[0] == "[" and len(scores) > 1 and scores == scale(len(scores)) and re.search("Here|fill", reply):
        with pytest.raises(Refused):  # with prose around it may be the scale that is quoted
            parse_scores(reply, sentences)
    else:
        assert parse_scores(reply, sentences) == scores


def scale(count):
    return [round(place / (count - 1), 2) for place in range(count)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_order(data):
    words = st.text("abcdefgh :{},'", min_size=1, max_size=12).map(lambda s: f"S {s}.")
    sentences = data.draw(st.lists(words, min_size=2, max_size=6, unique=True))
    scores = dict(zip(sentences, data.draw(st.lists(TENTHS, min_size=6, max_size=6)), strict=False))
    shuffled = data.draw(st.permutations(sentences))
    quote = QUOTES[data.draw(st.sampled_from(sorted(QUOTES)))]
    reply = LAYOUTS["one line"]([(quote(s), scores[s]) for s in shuffled])
    assert parse_scores(reply, sentences) == [scores[s] for s in sentences]


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200)
    | st.text(st.sampled_from('{}[]":,. \n0123456789x\\a-'), max_size=120)
    | st.text(max_size=100)
    | st.none(),
    st.lists(ONE_LINE | NASTY, max_size=4),
)
def test_nothing_but_refused_is_raised(reply, sentences):
    scores = outcome(parse_scores, reply, sentences)
    if isinstance(scores, list):
        assert len(scores) == len(sentences) and all(0 <= score <= 1 for score in scores)
    assert outcome(parse_correction, reply, " ".join(sentences)).strip()


# -- corrections -----------------------------------------------------------------------------------------

BEFORE = "The ice melts. It gets hot"
AFTER = "The ice melts. It gets hot, so it is a change of state."


@pytest.mark.parametrize(
    "reply",
    [
        '{\n"Original rationale": "%s",\n"Final rationale": "%s"\n}',
        '{"original rationale": "%s", "final rationale": "%s"}',
        "{original rationale: %s, final rationale: %s}",
        "{\nOriginal rationale: %s\nFinal rationale: %s\n}",
        '{\n"original_rationale": "%s",\n"final_rationale": "%s",\n}',
        '```json\n{"Original Rationale": "%s", "Final": "%s"}\n```\nI finished the last sentence.',
        "{%s}\n**Final rationale**: {%s}",
        'Original rationale: {"%s"}\nFinal rationale: {"%s"}',
        "{\n**Original rationale:** %s\n**Final rationale:** %s\n}",
    ],
)
def test_final_rationale_is_found(reply):
    assert parse_correction(reply % (BEFORE, AFTER), BEFORE) == AFTER
    over_lines = AFTER.replace(". ", ".\n")
    assert parse_correction(reply % (BEFORE, over_lines), BEFORE) == AFTER  # on many lines
    quoted = 'He said "melt". The set is {1, 2}.'
    assert parse_correction(reply % (BEFORE, quoted), BEFORE) == quoted
    # a rationale that looks like the form is stepped over
    trap = "Write {final rationale: x}, he said."
    assert parse_correction(reply % (trap, AFTER), trap) == AFTER


@pytest.mark.parametrize(
    "reply",
    [
        '{\n"Final rationale": "%s"\n}',
        '{"final_rationale": "%s",}',
        "{final rationale: %s}",
        '```json\n{"Final": "%s"}\n```\nI finished the last sentence.',
        "**Final rationale**: {%s}",
    ],
)
def test_the_final_rationale_alone_is_read(reply):
    """As it is asked for: without the original before it."""
    assert parse_correction(reply % AFTER, BEFORE) == AFTER == parse_correction(reply % AFTER, "Quite another.")
    assert parse_correction(reply % BEFORE, BEFORE) == BEFORE  # nothing to mend
    quoted = 'He said "melt". The set is {1, 2}.'
    assert parse_correction(reply % quoted, BEFORE) == quoted
    assert outcome(parse_correction, reply % "same as the original", BEFORE) == "unchanged"


@pytest.mark.parametrize("before", [BEFORE, "Quite another."])
@pytest.mark.parametrize(
    "more",
    [
        "\nFinal solution: the ice is a liquid.",
        "\n**Final rationale:** the ice is a liquid.",
        " {final rationale: the ice} he wrote.",
        ", 'final version: the ice', he wrote.",
        "\nFinal solution: the ice.\nFinal solution: no ice.",
    ],
)
def test_within_the_final_text_nothing_is_taken_for_a_key(more, before):
    """Also where it begins with the text that was sent, which is then no echo before the answer."""
    for reply in ('{"Final rationale": "%s"}', '{"Original rationale": "The ice.", "Final rationale": "%s"}'):
        assert parse_correction(reply % (BEFORE + more), before) == " ".join((BEFORE + more).split())


ECHOED = '{"Original rationale": "the student\'s explanation", "Final rationale": "the corrected explanation"}'
BIG = json.dumps({"Original rationale": BEFORE, "Final rationale": 'A "big"\nchange. {x}'}, indent=1)
CORRECTIONS = {  # the final rationale, or the reason of a refusal -> replies
    'A "big" change. {x}': [BIG, BIG.encode()],
    "A big😀 change.": ['{"Final rationale": "A \\ud83d big\\ud83d\\ude00 change."}'],
    BEFORE: [json.dumps({"Final rationale": BEFORE})],  # nothing to mend: a good reply
    "A b. C d.": ['{"Original rationale": ["x."], "Final rationale": ["A b.", "C d."]}'],
    AFTER: [f"{{'Original rationale': '{BEFORE}', 'Final rationale': '{AFTER}'}}",  # Python's quotes
            f'{ECHOED}\n{{"Final rationale": "{AFTER}"}}'],  # the form of the request repeated before the answer
    "A b.": ["{final rationale: A \ud83d b.}",  # UTF-8 cannot spell half of a pair
             '{"Final rationale": "<final rationale>"}\n{"Final rationale": "A b."}\n{"Final rationale": "xxx"}'],
    "no_reply": [None, "  \n"],
    "no_final": [
        "I cannot help with that.",
        AFTER,  # never a slice of the reply
        f'{{"Original rationale": "{BEFORE}"}}',
        f'{{"Original rationale": "{BEFORE}", "Final rationale": "The ice',  # cut at max_tokens
        "{final rationale: The ice",
        '{"Final rationale": {"text": "A."}}', '{"Final rationale": [1, "A."]}', '{"Final rationale": true}',
    ],
    "empty": ['{"Final rationale": ""}', "{Final rationale: }", '{"Final rationale": "..."}',
              '{"Final rationale": null}', '{"Final rationale": []}'],
    "unchanged": ["{final rationale: same as the original}", "final_rationale: {original_rationale}",
                  # a remark around the text that was sent
                  *(json.dumps({"Original rationale": BEFORE, "Final rationale": around % BEFORE}) for around in
                    ("Same as the original: %s", "%s (no changes needed)", "[unchanged] %s"))],
    "placeholder": [ECHOED, '{"Final rationale": "xxx"}'],
    "ambiguous": ['{"Final rationale": "A."}\n{"Final rationale": "B."}',
                  '{"Final rationale": "A."}\n' * 21],  # more than are read
}  # fmt: skip


def corrected(reply, rationale=BEFORE):
    return outcome(parse_correction, reply, rationale)


@pytest.mark.parametrize("reply, read", [(reply, read) for read in CORRECTIONS for reply in CORRECTIONS[read]])
def test_what_is_read_of_a_correction(reply, read):
    assert corrected(reply) == read


def test_a_rationale_may_be_such_words_if_they_were_sent():
    assert corrected('{"Final rationale": "None."}', "None.") == "None."
    assert corrected(json.dumps({"Final rationale": "It is the same."}), "it is the same") == "It is the same."


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=60),
    st.text("abcdefg hijk:,{}\"'.", min_size=1, max_size=60).map(lambda s: f"Since {s} it is.")
)  # fmt: skip
def test_any_correction_in_json(before, after):
    reply = json.dumps({"Original rationale": before, "Final rationale": after})
    assert parse_correction(reply, before) == " ".join(after.split())


REMARKS = """
original_rationale / {original_rationale} / [original_rationale] / <original_rationale> / "original_rationale"
${original_rationale} / {{original_rationale}} / `original_rationale` / **original rationale** / ORIGINAL_RATIONALE
originalRationale / original rationale / Original. / (original) / _original rationale_ / *original*
{Final rationale} / <final rationale> / [final_rationale] / "Final Rationale" / finalRationale / final_rationale
same as original_rationale / Same as {original_rationale}. / same as the original / [same as original] / SAME
(same as above) / Same. / the same / Same text as the original rationale. / identical to original_rationale
It is identical to the student's explanation. / See above. / (see above) / see original_rationale
See original rationale above / As above. / Refer to the original rationale. / copy of the original
[Copy original rationale here] / Original kept. / unchanged / Unchanged. / (unchanged) / **Unchanged** / UNCHANGED
<unchanged/> / [unchanged from original] / ~unchanged~ / Remains unchanged. / Left as is, unchanged.
The explanation is unchanged. / No change / No changes. / (no changes needed) / No changes were made.
no_changes_needed / No corrections necessary / No correction is necessary. / No edits / No edits required.
No modifications needed; the original is correct. / Nothing to correct. / Nothing to change. / I made no changes.
No revision is needed - the text is accurate. / There are no errors. / No errors found.
No mistakes found; no changes made. / The original rationale is correct. / The original is correct as written.
Correct as is. / Already correct. / It is already correct. / All sentences are correct.
All sentences are correct, so no changes were made. / No changes needed / [Same as the original rationale]
The original rationale is correct and needs no changes. / Identical to the one above.
No corrections are needed; the explanation is already correct. / The rationale is accurate. / Correct.
N/A / n/a / n.a. / NA / (N/A) / None / none. / Nil / not applicable / No / Ditto
The student's explanation doesn't need corrections.
""".replace("\n", " / ").strip(" /").split(" / ")  # fmt: skip
FORM_WORDS = """
xxx / {xxx} / the corrected explanation / {corrected_rationale} / <corrected rationale>
[Insert corrected rationale here] / {your corrected explanation} / corrected / [TODO] / <text> / revised_rationale
"The improved explanation."
""".replace("\n", " / ").strip(" /").split(" / ")  # fmt: skip
TEXTS = """
The original rationale of the experiment was to test heat. / The original is a copy of the Mona Lisa.
See above the map. / No change of state occurs. / No corrections were made to the map of Ohio.
The same number of particles is in both. / Original thirteen colonies wrote it. / The final answer is (A).
Final velocity is not the original velocity. / The ice stays unchanged while it floats.
None of the animals is a mammal. / It is not applicable to fish. / N/A is a label here.
It is correct that ice melts. / The student's ice melts. / Nothing melts. / All sentences have a verb.
No, ice is cold. / The text is written in Spanish. / 2 + 2 = 4, so no. / The corrected sentence has a comma.
An identical magnet repels. / No change is needed to make 1.0 mole.
The answer is the same as the original color, red.
""".replace("\n", " / ").strip(" /").split(" / ")  # fmt: skip
FORMS = [
    lambda text: json.dumps({"Original rationale": BEFORE, "Final rationale": text}),
    lambda text: f'{{\n"original_rationale": "{BEFORE}",\n"final_rationale": "{text}"\n}}',
    lambda text: f"{{original rationale: {BEFORE}\nfinal_rationale: {text}}}",
    lambda text: f"**Original rationale**: {{{BEFORE}}}\n**Final rationale**: {{{text}}}",
]


@pytest.mark.parametrize("text", REMARKS + FORM_WORDS + TEXTS)
def test_remarks_and_words_of_the_form_are_no_rationale_but_one_may_hold_such_words(text):
    expected = "unchanged" if text in REMARKS else "placeholder" if text in FORM_WORDS else text
    assert {corrected(form(text)) for form in FORMS} == {expected}


def test_no_letters_are_empty():
    assert len(REMARKS) > 90 and len(FORM_WORDS) == 12 and len(TEXTS) > 18
    for empty in ("", "...", "---", "—", "{}", "()", '\\"\\"'):
        assert {corrected(form(empty)) for form in FORMS[1:3]} == {"empty"}, empty


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"It is \frac{1}{2} of 4.", r"It is \frac{1}{2} of 4."),
        (r"It is \\frac{1}{2} of 4.", r"It is \frac{1}{2} of 4."),
        (r"2 \times 3 \neq 7, \beta \rightarrow \theta.", r"2 \times 3 \neq 7, \beta \rightarrow \theta."),
        (r"\text{ice} is \nu, \(x\) and 5\%.", r"\text{ice} is \nu, \(x\) and 5\%."),
        (r"A.\nNow B.\tThen C.\r\nNext \"D\".", 'A. Now B. Then C. Next "D".'),
        (r"\nnot all, \nor one, \nneon.", "not all, or one, neon."),
        (r"caf\u00e9 a\/b \ud83d\ude00 \ud83d. \u12 \x", "café a/b 😀 . \\u12 \\x"),
    ],
)
def test_escapes_are_decoded_where_they_are_ones(written, read):
    assert corrected(f'{{"Original rationale": "x", "Final rationale": "{written}"}}') == read
    assert corrected(f'{{"Final rationale": ["{written}"]}}') == read
    assert corrected(f'{{"Final rationale": "He said "so". {written}"}}') == f'He said "so". {read}'


# -- verdicts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ('{"reason": "a \\"b\\"", "verdict": "1"}', ("1", 'a "b"')),
        ('```json\n{"verdict": 2}\n```', ("2", "")),
        ("verdict: Tie", ("tie", "")),
        ('{"verdict": "1", "verdict": "2"}', "ambiguous"),
        ('{"verdict": "1" or "2"}', "no_verdict"),
        ('{"verdict": "12"}', "no_verdict"),
        ("The first is better.", "no_verdict"),
        (" ", "no_reply"),
        (None, "no_reply"),
    ],
)
def test_verdicts(reply, verdict):
    expected = Verdict(*verdict) if isinstance(verdict, tuple) else verdict
    assert outcome(parse_verdict, reply) == expected


@given(st.one_of(st.binary(), st.text(), st.text(alphabet='{}":verdict12tie \n')))
def test_any_bytes_give_a_verdict_or_a_refusal(reply):
    with contextlib.suppress(Refused):
        assert parse_verdict(reply).better in ("1", "2", "tie")


# -- work: any text, in time and memory that grow with its length --------------------------------------------

PROBLEM = {
    "question": "Which boat is faster?", "choices": ["boat a a", "boat b 2"], "answer": 1, "hint": "", "image": None,
    "lecture": "Speed is distance by time.", "solution": "One boat moved 240 miles. Boat b 2 is faster.",
}  # fmt: skip
UNITS = [
    " ", "\n", " \n", '"', "\\", "{", "}", "[", "]", "{[", "1", "1.", ". ", ".", ",", ":", '"a": ', '"a": 1, ',
    "'", "a", "A. ", "a ", "a.na", ".n", "\\n", "! ", '? "', "(", "*", "-", "final ", '"final rationale": ', '{"',
    '{"a": {', "[0.1]\n", "Solution: ", '"verdict": "1"', '"reason": "', "option a ", "The ice melts. ",
    '{"The ice melts.": 0.5, ', "0.5\n", "\\u00e9", '\\"', '{"a": "', '": "', "}{", "U.S. ", "...", '1, a {"',
    "The answer is (A) ", "```\n", "'a': '", "\x03",
]  # fmt: skip
ICE = ["The ice melts.", "It is hot.", "a"]
PARSERS = {
    "scores": lambda text: parse_scores(text, ICE),
    "scores of such sentences": lambda text: parse_scores(text, [text[:9], text[3:7], *[text[:6]] * 20]),
    "a key": lambda text: parse_scores(f'{{"The ice melts.": 0.5, "{text}": 0.5}}', ICE),
    "correction": lambda text: parse_correction(text, "The ice."),
    "a quoted correction": lambda text: parse_correction('{"Final rationale": "' + text, "The ice."),
    "a bare correction": lambda text: parse_correction("{final rationale: " + text + "}", "The ice."),
    "a correction's key": lambda text: parse_correction('{"Final' + text, "The ice."),
    "a correction as Python": lambda text: parse_correction("{'final rationale': '" + text + "'}", "The ice."),
    "verdict": lambda text: parse_verdict('"verdict":' + text + '"verdict": 1, "reason": "' + text),
    "sentences": lambda text: remove_repeats(split_text("So it is a" + text)),
    "finished": is_finished,
    "reference scores": lambda text: score_sentences(PROBLEM, split_text(text)),
    "reference score of one": lambda text: score_sentences(PROBLEM, [text]),
    "reference correction": lambda text: correct_rationale(PROBLEM, text),
    "answer": lambda text: extract_answer("The answer is (" + text),
}


def work(parse, text, repeats=1):
    """CPU seconds; the least of some repeats, since other processes only add."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        with contextlib.suppress(Refused):
            parse(text)
        seconds.append(time.process_time() - started)
    return min(seconds)


def assert_linear(parse, make, name):
    """Four times the length takes about four times as long; a square would take sixteen times."""
    short, long = make(4000), make(16000)
    for repeats in (1, 3, 10):
        once, fourfold = work(parse, short, repeats), work(parse, long, repeats)
        if fourfold < 8 * once + 0.004:
            return
    pytest.fail(f"{name}: {once * 1000:.1f} ms for 4,000 characters, {fourfold * 1000:.1f} ms for 16,000")


@pytest.mark.parametrize("parser", PARSERS)
def test_work_grows_with_the_length(parser):
    for unit in UNITS:
        assert_linear(PARSERS[parser], lambda length, unit=unit: (unit * length)[:length], f"{parser} of {unit!r}")


def test_work_on_ids_grows_with_their_number(t5_tokenizer):
    for unit in UNITS:
        some = t5_tokenizer(unit * 50, add_special_tokens=False).input_ids or [2]
        assert_linear(
            lambda ids: sentence_columns(ids, t5_tokenizer),
            lambda length, some=some: (some * length)[: length // 4],
            f"ids of {unit!r}",
        )


@pytest.mark.parametrize("parser", PARSERS)
def test_memory_is_bounded(parser):
    for unit in ("{", '"a": 1, ', '{"a": {', ". ", "a ", '"final rationale": ', '{"The ice melts.": 0.5, '):
        tracemalloc.start()
        work(PARSERS[parser], (unit * 40_000)[:40_000])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 * 2**20, (unit, peak)
