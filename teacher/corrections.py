"""Reading the Teacher's corrections: the final rationale of a raw reply, or why there is none.

Standard library only. Word lists decide what is a remark instead of a text ("unchanged", "same as
original_rationale"): a text that consists of these words alone, whatever its brackets, case or punctuation.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re

from teacher.parsing import STRING, Refused, collapse, one_line, plain, read_text, unescape

# `"final rationale":`, `final rationale:`, `**Final Rationale**:`; a bare `final:` only as a quoted key
_FINAL_KEY = re.compile(
    r"""(?:\A|[{},\n])\s?                                    # where a key may begin
        (?:"\s?final[a-z\s_-]{0,40}+"                        # quoted
          |[*'_]{0,3}final[\s_-]{1,3}(?:rationale|solution|version)[*'_]{0,3})
        \s?:\s?[*]{0,2}\s?""",
    re.IGNORECASE | re.VERBOSE,
)
_MOST_FINALS = 20  # each is read to its end, so their number must be bounded
_STRINGS = re.compile(rf"(?:{STRING}|\[(?:\s?{STRING}\s?,?)*+\s?\])(?=\s?,?\s?[}}\"])", re.DOTALL)
_OBJECT_GOES_ON = re.compile(r'\s?,?\s?[}"]')

# Remarks and labels instead of a text ("same as original_rationale", "{Final rationale}") consist of these words
# alone; a text that holds any other word is a rationale.
_SAYS_UNCHANGED = frozenset(
    "unchanged unmodified unaltered unedited unrevised uncorrected untouched same identical original final no not "
    "none na nil nothing nan correct right accurate valid perfect fine good ok okay above see refer copy copied "
    "copies repeat repeated keep kept equal equals match matches ditto idem verbatim applicable "
    "don't doesn't didn't isn't".split()
)
_LABELS = frozenset(
    "xxx corrected improved revised updated edited fixed new rationale explanation solution version text response "
    "output placeholder todo tbd insert put your".split()
)
_GLUE = frozenset(
    "a an the it its it's is are was were be been being has have had this that these those there here which all every "
    "each everything anything any one in of for to as at from with by and or so but already still just exactly "
    "completely fully entirely entire whole totally identically correctly accurately well i we you my our do does did "
    "need needs needed require requires required necessary warranted called make makes "
    "made making change changes changed changing alter altered edit edits editing correction corrections correcting "
    "modification modifications modified modify adjustment adjustments adjusted revision revisions improvement "
    "improvements fix fixes fixing update updates amendment amendments amended error errors mistake mistakes issue "
    "issues problem problems found identified student student's students given provided written stated shown sent "
    "submitted input previous prior current first second before earlier below sentence sentences remain remains "
    "remained stay stays stand stands left leave leaves looks look appears seems goes go like else further other more "
    "factually grammatically grammar please note rest".split()
)
_REMARK_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def parse_correction(reply: str | bytes | None, rationale: str) -> str:
    """The corrected rationale, white space collapsed, from the Teacher's raw reply.

    The final part is found by its key - quoted or not, on one line or many - and ends where its string or its braces
    end. `rationale` is the text that was sent: where it is repeated beside the final part, and within a final part in
    quotes, nothing is taken for a key. A final part equal to the rationale is returned as it is.

    Raises Refused, and nothing else: no_reply, too_long; no_final (no key, or a part cut before its end); empty;
    unchanged (a remark instead of a text); placeholder; ambiguous (two final parts that differ).
    """
    text, sent = read_text(reply), collapse(rationale)
    finals = (_finals(text, sent) if sent.strip() else []) or _finals(text)
    if not finals:
        raise Refused("no_final", "no final rationale that is closed by its brace")
    original = one_line(rationale)
    # the form of the request, or a remark, may stand beside the answer
    final, *others = dict.fromkeys([final for final in finals if not _remark(final, original)] or finals[:1])
    if others:
        raise Refused("ambiguous", f"{len(others) + 1} final rationales that differ")
    reason = _remark(final, original)
    if reason:
        raise Refused(reason, f"the final rationale is {final[:60]!r}")
    return final


def _remark(final: str, original: str) -> str | None:
    """Why the final part is no rationale: "empty", "unchanged" or "placeholder"; None if it is one."""
    if plain(final) == plain(original) != "":
        return None
    words = _remark_words(final)
    if not words:
        return "empty"
    if original and original in final:
        words = _remark_words(final.replace(original, " ")) or ["rationale", "of", "its", "own"]
    if not words <= _SAYS_UNCHANGED | _LABELS | _GLUE:
        return None
    return "unchanged" if words & _SAYS_UNCHANGED else "placeholder" if words & _LABELS else None


def _remark_words(text: str) -> set[str]:
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower().replace("’", "'")
    text = re.sub(r"\bn[./]a\b", "na", text)
    return set(_REMARK_WORD.findall(text))


def _finals(text: str, sent: str = "") -> list[str]:
    """The values of all final keys, but of those within the strings of an earlier one or the first echo of `sent`."""
    echo = text.find(sent) if sent and sent in text else len(text)
    outside = (key for key in _FINAL_KEY.finditer(text) if key.start() < echo or key.end() > echo + len(sent))
    keys = list(itertools.islice(outside, _MOST_FINALS + 1))
    if len(keys) > _MOST_FINALS:
        raise Refused("ambiguous", f"more than {_MOST_FINALS} final rationales")
    values, position = [], 0
    for key in keys:
        if key.end() <= position:
            continue
        if strings := _STRINGS.match(text, key.end()):
            position = strings.end()
        values.append(_final_value(text, key.end(), key[0]))
    # half of a surrogate pair, which UTF-8 cannot spell, is dropped
    return [one_line(value.encode(errors="ignore").decode()) for value in values if value is not None]


def _final_value(text: str, start: int, key: str) -> str | None:
    """The value that begins at `start`: a string up to its object's end, `{...}`, or bare text up to the brace."""
    strings = _STRINGS.match(text, start)
    if strings:
        return " ".join(unescape(string[1:-1]) for string in re.findall(STRING, strings[0], re.DOTALL))
    if text.startswith('"', start):
        closed = re.compile(r'(.*?)"\s?,?\s?\}', re.DOTALL).match(text, start + 1)  # with quotes not escaped
        return unescape(closed[1]) if closed else None
    with contextlib.suppress(ValueError, RecursionError):  # null means empty; an object or a number is no text
        value, end = json.JSONDecoder(strict=False).raw_decode(text, start)
        if _OBJECT_GOES_ON.match(text, end):
            return "" if value in (None, {}) else None
    own_braces = text.startswith("{", start)
    body = _up_to_brace(text, start + own_braces)
    if body is None:
        return None
    body = body.strip().removesuffix(",").strip()
    if "'" in key and body.startswith("'"):  # as Python writes it; nothing may follow
        quoted = re.fullmatch(r"'((?:[^'\\]|\\.|'(?!\s?[,:]))*)'", body, re.DOTALL)
        return unescape(quoted[1].replace("\\'", "'")) if quoted else None
    quoted = re.fullmatch(r'"(.*)"', body, re.DOTALL) if own_braces else None
    return unescape(quoted[1]) if quoted else body


def _up_to_brace(text: str, start: int) -> str | None:
    """Text from `start` to the brace that closes the object around it; braces of its own are counted."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth < 0:
            return text[start : match.start()]
    return None
