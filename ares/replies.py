"""Reading the Teacher's replies: sentence scores and corrected rationales.

A model asked for JSON does not always send JSON: fences, prose, unescaped quotes, one line or many. What is clear to a
careful reader is read; everything else raises `Refused` with a reason, and nothing else is ever raised. No guess is
made from positions in the text: a wrong score trains the policy wrongly, a refused one only loses a sample.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence

# a value as written: quoted on one line, or a bare word
_VALUE = r'(?:"(?P<quoted>[^"\n]{0,40})"|(?P<bare>[^\s",{}\[\]]{1,40}))'
# after a key's closing quote: colon, value
_AFTER_KEY = re.compile(rf"\s*:\s*{_VALUE}")
# where an entry ends when the sentences are not quoted verbatim: a comma, brace or line end must follow the value
_ENTRY_END = re.compile(rf'(?<!\\)"\s*:\s*{_VALUE}(?=[^\S\n]*(?:[,}}\n]|\Z))')
_SEPARATOR = re.compile(r"[\s,]*")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
# `[0.8, 0.5]` on lines of its own or as a key's value; `[1]` within a sentence is a citation
_ARRAY = re.compile(r"(?:^|[:`\n])[^\S\n]*\[([^\[\]]*)\]\s*(?=[,}`\n]|\Z)")
_PLACEHOLDER = "xxx"


class Refused(ValueError):
    """A reply that cannot be used. `reason` is one word for counting; the message says what was wrong.

    Reasons for scores: no_rationale, no_sentences, no_reply, no_json, wrong_count, placeholder, not_a_number,
    out_of_range, ambiguous. For corrections: no_reply, no_final, empty, unchanged, placeholder, ambiguous. For
    verdicts: no_reply, no_verdict, ambiguous.
    """

    def __init__(self, reason: str, message: str = ""):
        super().__init__(f"{reason}: {message}" if message else reason)
        self.reason = reason


# -- scores ----------------------------------------------------------------------------------------------


def parse_scores(reply: str | bytes | None, sentences: Sequence[str]) -> list[float]:
    """Scores of `sentences`, in their order, from the Teacher's raw reply (SPEC 7).

    Read in this order: a complete object that quotes the sentences verbatim (whatever quotes, colons or braces they
    hold); objects whose keys differ from the sentences, by position or, when the keys are the sentences in another
    order, by text; a bare array or `{"scores": [...]}`. Two complete objects that differ are refused.

    Raises Refused, and nothing else, for any text or bytes.
    """
    text = _as_text(reply)
    if not sentences:
        raise Refused("no_sentences", "the rationale holds no sentence")
    if not text.strip():
        raise Refused("no_reply", "the reply is empty")
    verbatim = _verbatim_objects(text, sentences)
    if verbatim:
        return _only_one(verbatim)
    groups = _entry_groups(text)
    if groups:
        return _from_groups(groups, sentences)
    return _from_arrays(text, len(sentences))


def _as_text(reply: str | bytes | None) -> str:
    if reply is None:
        raise Refused("no_reply", "there is no reply")
    if isinstance(reply, bytes):
        reply = reply.decode("utf-8", errors="replace")
    return reply.removeprefix("\ufeff")


def _number(token: str) -> float:
    """A score in [0, 1]. Refuses what `float` would let through: nan, 0_0, full-width digits."""
    token = token.strip()
    if token.lower() == _PLACEHOLDER:
        raise Refused("placeholder", "xxx was left in")
    if not _NUMBER.fullmatch(token):
        raise Refused("not_a_number", f"{token[:40]!r} is not a number")
    value = float(token)
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise Refused("out_of_range", f"{token[:40]} is not between 0 and 1")
    return abs(value)  # -0.0 is 0


def _token(match: re.Match) -> str:
    return match["bare"] if match["quoted"] is None else match["quoted"]


def _only_one(objects: list[list[str]]) -> list[float]:
    """The scores that every copy agrees on; an echo of the unfilled form beside a filled one is no copy."""
    filled = [tokens for tokens in objects if any(token.strip().lower() != _PLACEHOLDER for token in tokens)]
    scores = [[_number(token) for token in tokens] for tokens in filled or objects]
    if any(other != scores[0] for other in scores[1:]):
        raise Refused("ambiguous", f"{len(scores)} complete answers that differ")
    return scores[0]


def _verbatim_objects(text: str, sentences: Sequence[str]) -> list[list[str]]:
    """Value tokens of every `{...}` in `text` that quotes exactly the sentences, mapped to the sentences' order."""
    keys = [_key_forms(sentence) for sentence in sentences]
    found: list[list[str]] = []
    position = text.find("{")
    while position >= 0:
        match = _ordered_object(text, position + 1, keys) or _shuffled_object(text, position + 1, sentences, keys)
        if match:
            found.append(match[0])
        position = text.find("{", match[1] if match else position + 1)
    return found


def _key_forms(sentence: str) -> tuple[str, ...]:
    """The sentence between quotes as our form shows it and as a JSON writer escapes it."""
    forms = (f'"{sentence}"', json.dumps(sentence, ensure_ascii=False), json.dumps(sentence))
    return tuple(dict.fromkeys(forms))


def _skip(text: str, position: int) -> int:
    return _SEPARATOR.match(text, position).end()


def _entry_at(text: str, position: int, forms: tuple[str, ...]) -> tuple[str, int] | None:
    """(value token, end) of the entry `"sentence": value` that begins at `position`, if it is this sentence's."""
    for form in forms:
        if text.startswith(form, position):
            match = _AFTER_KEY.match(text, position + len(form))
            if match:
                return _token(match), match.end()
    return None


def _ordered_object(text: str, position: int, keys: list[tuple[str, ...]]) -> tuple[list[str], int] | None:
    tokens = []
    for forms in keys:
        entry = _entry_at(text, _skip(text, position), forms)
        if entry is None:
            return None
        tokens.append(entry[0])
        position = entry[1]
    end = _skip(text, position)
    return (tokens, end + 1) if text.startswith("}", end) else None


def _shuffled_object(
    text: str, position: int, sentences: Sequence[str], keys: list[tuple[str, ...]]
) -> tuple[list[str], int] | None:
    left = Counter(sentences)
    forms = dict(zip(sentences, keys, strict=True))
    by_length = sorted(left, key=len, reverse=True)  # a sentence may begin like another
    entries: list[tuple[str, str]] = []
    for _ in sentences:
        start = _skip(text, position)
        for sentence in by_length:
            entry = _entry_at(text, start, forms[sentence]) if left[sentence] else None
            if entry:
                break
        else:
            return None
        left[sentence] -= 1
        entries.append((sentence, entry[0]))
        position = entry[1]
    end = _skip(text, position)
    if not text.startswith("}", end):
        return None
    return _map_by_text(entries, sentences), end + 1


def _map_by_text(entries: list[tuple[str, str]], sentences: Sequence[str]) -> list[str]:
    """Tokens in the order of the sentences. Refused when a repeated sentence has several values: whose is which?"""
    values: dict[str, str] = {}
    for sentence, token in entries:
        if values.setdefault(sentence, token) != token:
            raise Refused("ambiguous", f"another order, and {sentence[:60]!r} repeats with different scores")
    return [values[sentence] for sentence in sentences]


def _entry_groups(text: str) -> list[list[tuple[str, str]]]:
    """(key, value token) pairs of each closed `{...}`, the keys as written. Empty when there is no entry at all.

    Linear in the text: the places where an entry ends are found first, a key is what lies between two of them.
    """
    ends = list(_ENTRY_END.finditer(text))
    groups: list[list[tuple[str, str]]] = []
    after_last = 0
    for match in ends:
        between = text[after_last : match.start()]
        key = re.fullmatch(r'[\s,]*"([^\n]*)', between) if groups else None
        if key is None:
            closed = not groups or re.match(r"[\s,]*\}", between)
            key = re.search(r'\{\s*(?:"[^"\n]*"\s*:\s*\{\s*)?"([^\n]*)\Z', between)  # `{"rationale": {` too
            if not closed or key is None:
                raise Refused("no_json", f"something stands between the entries: {between.strip()[:60]!r}")
            groups.append([])
        groups[-1].append((key[1], _token(match)))
        after_last = match.end()
    if groups and not re.match(r"[\s,]*\}", text[after_last:]):
        raise Refused("no_json", "the object is not closed")
    return groups


def _from_groups(groups: list[list[tuple[str, str]]], sentences: Sequence[str]) -> list[float]:
    count = len(sentences)
    complete = [group for group in groups if len(group) == count]
    if not complete:
        joined = [entry for group in groups for entry in group]  # one answer cut into several objects
        for _, token in joined:
            _number(token)  # `nan` or `xxx` is the better reason than the count
        if len(joined) != count:
            raise Refused("wrong_count", f"{len(joined)} scores for {count} sentences")
        complete = [joined]
    return _only_one([_in_order(group, sentences) for group in complete])


def _in_order(group: list[tuple[str, str]], sentences: Sequence[str]) -> list[str]:
    """Value tokens by text where the keys are the sentences in another order, else by position."""
    written, tokens = [key.replace('\\"', '"') for key, _ in group], [token for _, token in group]
    for form in (_on_one_line, _words):
        keys, own = [form(key) for key in written], [form(sentence) for sentence in sentences]
        if keys == own:
            return tokens
        if Counter(keys) == Counter(own):
            return _map_by_text(list(zip(keys, tokens, strict=True)), own)
    numbers = [str(number + 1) for number in range(len(sentences))]
    if sorted(keys) == sorted(numbers):  # {"2": 0.5, "1": 0.8}
        return _map_by_text(list(zip(keys, tokens, strict=True)), numbers)
    for form in (_on_one_line, _words):
        keys, own = [form(key) for key in written], [form(sentence) for sentence in sentences]
        moved = [key for key, sentence in zip(keys, own, strict=True) if key != sentence and key in own]
        if moved:
            raise Refused("ambiguous", f"{moved[0][:60]!r} stands at another sentence's place")
    if any(re.fullmatch(r"(?:overall|total|average|mean|confidence)(?: score)?", key) for key in set(keys) - set(own)):
        raise Refused("wrong_count", "a score of the whole stands in the place of a sentence's")
    return tokens


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _words(text: str) -> str:
    """The words alone, without case and without a number that was put before them."""
    words = " ".join(re.findall(r"\w+", re.sub(r"^\s*\d+[.):]\s+", "", text).lower()))
    return words or _on_one_line(text)


def _from_arrays(text: str, count: int) -> list[float]:
    arrays = []
    for body in _ARRAY.findall(text):
        items = [item.strip() for item in body.strip().removesuffix(",").split(",")]
        arrays.append([item[1:-1] if re.fullmatch(r'"[^"]*"', item) else item for item in items if item])
    if not arrays:
        braces = re.search(r"\{.*\}", text, re.DOTALL)
        raise Refused("wrong_count" if braces else "no_json", "no sentence with a score was found")
    whole = [array for array in arrays if len(array) == count]
    if not whole:
        raise Refused("wrong_count", f"{len(arrays[0])} scores for {count} sentences")
    return _only_one(whole)


# -- corrections -----------------------------------------------------------------------------------------

# `"final rationale":`, `final rationale:`, `**Final Rationale**:`; a bare `final:` only as a quoted key
_FINAL_KEY = re.compile(
    r"""(?:\A|[{},\n])[^\S\n]*                                    # where a key may begin
        (?:"\s*final(?:[\s_-]*[a-z]+){0,3}\s*"                     # quoted
          |[*'_]{0,3}final[\s_-]+(?:rationale|solution|version)[*'_]{0,3})
        \s*:\s*[*]{0,2}\s*""",
    re.IGNORECASE | re.VERBOSE,
)
# a remark in the place of a text: these words and no other, one that says "the same" or "no" or "right" among them
_UNCHANGED = re.compile(
    r"(?=.*\b(?:unchanged|no|not|none|n/a|same|original|identical|correct)\b)"
    r"(?:\b(?:unchanged|no|not|none|n/a|same|original|identical|correct|corrections?|changes?|changed|edits?|edited|"
    r"modifications?|modified|adjustments?|needs?|needed|required?|requires|necessary|made|was|were|be|has|have|been|"
    r"the|student's|student|final|rationale|explanation|version|text|one|it|is|are|remains?|stays?|to|as|already|and|"
    r"so|above|before|given|written)\b[\s,;:.()-]*)+",
    re.IGNORECASE,
)
# what our request shows in the place of a text, or what a model puts there
_FORM_WORDS = frozenset((_PLACEHOLDER, "final rationale", "final solution", "the corrected explanation"))


def parse_correction(reply: str | bytes | None, rationale: str) -> str:
    """The corrected rationale, white space collapsed, from the Teacher's raw reply (SPEC 7).

    The final part is found by its key - quoted or not, on one line or many - and ends where its string or its braces
    end. `rationale` is the text that was sent: its echo is stepped over, so nothing in it is taken for a key.
    A final part equal to the rationale is returned as it is.

    Raises Refused, and nothing else: no_reply; no_final (no key, or a part cut before its end); empty; unchanged (the
    word instead of a text); placeholder; ambiguous (two final parts that differ).
    """
    text = _as_text(reply)
    if not text.strip():
        raise Refused("no_reply", "the reply is empty")
    echo = text.find(rationale) if rationale.strip() else -1
    after_echo = echo + len(rationale) if echo >= 0 else 0
    finals = _finals(text, after_echo) or (_finals(text, 0) if after_echo else [])
    if not finals:
        raise Refused("no_final", "no final rationale that is closed by its brace")
    finals = [final for final in finals if _bare(final).lower() not in _FORM_WORDS] or finals[
        :1
    ]  # an echo of the form
    if any(other != finals[0] for other in finals[1:]):
        raise Refused("ambiguous", f"{len(finals)} final rationales that differ")
    final = finals[0]
    bare = _bare(final)
    if not bare:
        raise Refused("empty", "the final rationale is empty")
    if bare.lower() in _FORM_WORDS:
        raise Refused("placeholder", f"the final rationale is {bare!r}")
    if _UNCHANGED.fullmatch(bare) and bare.lower() != rationale.strip(" .").lower():
        raise Refused("unchanged", "the final rationale only says so")
    return final


def _bare(text: str) -> str:
    return text.strip(" .!*'\"<>[]()_")


def _finals(text: str, start: int) -> list[str]:
    values = [_final_value(text, match.end(), match[0]) for match in _FINAL_KEY.finditer(text, start)]
    # half of a surrogate pair, which JSON can spell and UTF-8 cannot, goes
    whole = (value.encode(errors="ignore").decode() for value in values if value is not None)
    return [" ".join(value.split()) for value in whole]


def _final_value(text: str, start: int, key: str) -> str | None:
    """The value that begins at `start`: a string up to its object's end, `{...}`, or bare text up to the brace."""
    with contextlib.suppress(ValueError, RecursionError):  # takes escapes; strict=False takes line breaks
        value, end = json.JSONDecoder(strict=False).raw_decode(text, start)
        if re.match(r"\s*,?\s*[}\"]", text[end:]):
            if isinstance(value, list) and all(isinstance(part, str) for part in value):
                value = " ".join(value)
            return "" if value is None else value if isinstance(value, str) else None
    if text.startswith('"', start):
        closed = re.compile(r'(.*?)"\s*,?\s*\}', re.DOTALL).match(text, start + 1)  # with quotes not escaped
        return _unescape(closed[1]) if closed else None
    own_braces = text.startswith("{", start)
    body = _up_to_brace(text, start + own_braces)
    if body is None:
        return None
    body = body.strip().removesuffix(",").strip()
    if "'" in key and body.startswith("'"):  # as Python writes it; nothing may follow
        quoted = re.fullmatch(r"'((?:[^'\\]|\\.|'(?!\s*[,:]))*)'", body, re.DOTALL)
        return _unescape(quoted[1].replace("\\'", "'")) if quoted else None
    quoted = re.fullmatch(r'"(.*)"', body, re.DOTALL) if own_braces else None
    return _unescape(quoted[1]) if quoted else body


def _up_to_brace(text: str, start: int) -> str | None:
    """Text from `start` to the brace that closes the object it stands in; braces of its own are counted."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth < 0:
            return text[start : match.start()]
    return None


def _unescape(text: str) -> str:
    return text.replace('\\"', '"').replace("\\n", "\n")


# -- verdicts --------------------------------------------------------------------------------------------

_VERDICT = re.compile(r"""["']?\bverdict\b["']?\s*:\s*["']?\s*(1|2|tie)\b(?!["']?\s*(?:\||/|or\b))""", re.IGNORECASE)
_WHY = re.compile(r'"reason"\s*:\s*("(?:[^"\\]|\\.)*")')


def parse_verdict(reply: str | bytes | None) -> tuple[str, str]:
    """("1" | "2" | "tie", the reason given or "") from a judge's raw reply.

    Raises Refused, and nothing else, for any text or bytes: without a verdict, or with two that differ.
    """
    text = _as_text(reply)
    if not text.strip():
        raise Refused("no_reply", "the reply is empty")
    found = {match[1].lower() for match in _VERDICT.finditer(text)}
    if not found:
        raise Refused("no_verdict", 'it holds no "verdict": "1", "2" or "tie"')
    if len(found) > 1:
        raise Refused("ambiguous", f"it holds the verdicts {' and '.join(sorted(found))}")
    why, reason = _WHY.search(text), ""
    if why:
        with contextlib.suppress(ValueError):
            reason = json.loads(why[1], strict=False)
    return found.pop(), reason
