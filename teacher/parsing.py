"""Reading the Teacher's replies: sentence scores and a judge's verdicts (corrected rationales: corrections.py).

A model asked for JSON does not always send JSON: fences, prose, unescaped quotes, one line or many. What a careful
reader would understand is accepted; everything else raises `Refused` with a reason, and nothing else is raised. A
score counts only for the sentence that its key names: a wrong one trains the policy wrongly, a refused one only loses
a sample.

Replies are untrusted: `read_text` collapses blanks and caps the length first, so `\\s?` is any white space in the
patterns below, and every pattern and loop takes time linear in the reply.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

STRING = r'"(?:[^"\\]|\\.)*+"'  # JSON's, in re.DOTALL
LONGEST = 200_000  # characters, blanks collapsed; the longest possible reply to one request has about 50,000
_PLACEHOLDER = "xxx"
_BLANKS = re.compile(r"\s{2,}")


class Refused(ValueError):
    """A reply that cannot be used. `reason` is one word for counting; the message says what was wrong.

    Reasons for all replies: no_reply, too_long, ambiguous. For scores: no_rationale, no_sentences, no_json,
    wrong_count, placeholder, not_a_number, out_of_range. For corrections: no_final, empty, unchanged, placeholder.
    For verdicts: no_verdict.
    """

    def __init__(self, reason: str, message: str = ""):
        super().__init__(f"{reason}: {message}" if message else reason)
        self.reason = reason


def read_text(reply: str | bytes | None) -> str:
    """The reply as text with its blanks collapsed. Raises Refused for none, an empty or an over-long one."""
    if reply is None:
        raise Refused("no_reply", "there is no reply")
    if isinstance(reply, bytes):
        reply = reply.decode("utf-8", errors="replace")
    text = collapse(reply.removeprefix("\ufeff"))
    if not text.strip():
        raise Refused("no_reply", "the reply is empty")
    if len(text) > LONGEST:
        raise Refused("too_long", f"the reply has {len(text):,} characters")
    return text


def collapse(text: str) -> str:
    """Every run of white space as one character: a newline if it holds one, else a blank."""
    return _BLANKS.sub(lambda run: "\n" if "\n" in run[0] else " ", text)


def one_line(text: str) -> str:
    return " ".join(text.split())


# LaTeX commands that begin like a JSON escape: in `\frac` the backslash is not half of a form feed
_LATEX = (
    "(?:bar|because|begin|beta|bf|big|binom|bmod|boldsymbol|bot|boxed|bullet|flat|forall|frac|frown|nabla|ne|nearrow|"
    "neg|neq|newline|nexists|nmid|not|notin|nu|rangle|rbrace|rceil|rfloor|rho|right|rightarrow|rm|tan|tau|tanh|"
    "text[a-z]*|tfrac|therefore|theta|tilde|times|to|top|triangle|triangleq)(?![A-Za-z])"
)
_ESCAPE = re.compile(rf'\\(?:u(?P<code>[0-9a-fA-F]{{4}})|(?!{_LATEX})(?P<blank>[bfnrt])|(?P<itself>["\\/]))')


def unescape(text: str) -> str:
    """Decode JSON's escapes, and leave a backslash that begins none. Halves of surrogate pairs are dropped."""
    decoded = _ESCAPE.sub(
        lambda found: chr(int(found["code"], 16)) if found["code"] else "\n" if found["blank"] else found["itself"],
        text,
    )
    return decoded.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")


# -- scores ----------------------------------------------------------------------------------------------

# a value as written: quoted on one line or a bare word, as it is or as {"score": value}
_VALUE = (
    r'(?P<nested>\{\s?"(?:score|rating|value)"\s?:\s?)?'
    r'(?:"(?P<quoted>[^"\n]{0,40})"|(?P<bare>[^\s",{}\[\]]{1,40}))(?(nested)\s?\})'
)
_AFTER_KEY = re.compile(rf"\s?:\s?{_VALUE}")
# the end of an entry whose key is not known: a comma, brace or line end must follow the value
_ENTRY_END = re.compile(rf'(?<!\\)"\s?:\s?{_VALUE}(?=[^\S\n]?(?:[,}}\n]|\Z))')
_PLAIN = re.compile(r"[ !#-\[\]-~]*")  # what JSON spells as it is
_SEPARATOR = re.compile(r"[\s,]*+")
_FIRST_KEY = re.compile(r'\{\s?(?:"[^"\n]*+"\s?:\s?\{\s?)?"')  # `{"rationale": {"` too
_NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")


@dataclass(frozen=True)
class _Entry:
    """`"key": value` as written in the reply."""

    key: str
    value: str


def parse_scores(reply: str | bytes | None, sentences: Sequence[str]) -> list[float]:
    """Scores of `sentences`, in their order, from the Teacher's raw reply.

    Accepted: objects that quote the sentences verbatim (whatever quotes, colons or braces they hold); objects whose
    keys name every sentence once, by its text (`_Names`) or its number; `{"scores": [...]}` or an array that is the
    reply's own answer. Complete answers that differ are refused.

    Raises Refused, and nothing else, for any text or bytes.
    """
    if not sentences:
        raise Refused("no_sentences", "the rationale holds no sentence")
    text = read_text(reply)
    answers, rest = _verbatim_answers(text, sentences)
    try:
        answers += _named_answers(rest, sentences)
    except Refused:
        if not answers:
            raise
    return _agreed(answers or _array_answers(text, len(sentences)))


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


def _agreed(answers: list[list[str]]) -> list[float]:
    """The scores that every answer agrees on; an echo of the unfilled form beside a filled one does not count."""
    filled = [tokens for tokens in answers if any(token.strip().lower() != _PLACEHOLDER for token in tokens)]
    scores = [[_number(token) for token in tokens] for tokens in filled or answers]
    if any(other != scores[0] for other in scores[1:]):
        raise Refused("ambiguous", f"{len(scores)} complete answers that differ")
    return scores[0]


def _token(match: re.Match) -> str:
    return match["bare"] if match["quoted"] is None else match["quoted"]


# Verbatim: a key ends where the sentence that it quotes ends, whatever quotes or colons that sentence holds.


def _verbatim_answers(text: str, sentences: Sequence[str]) -> tuple[list[list[str]], str]:
    """Values of every object that quotes exactly the sentences, in the sentences' order; and the text around them."""
    by_length = sorted(set(sentences), key=len, reverse=True)  # a sentence may begin like another
    forms = {sentence: _key_forms(sentence) for sentence in by_length}
    any_form = tuple(form for each in forms.values() for form in each)
    answers, rest, position = [], [], 0
    for brace in re.finditer(r"\{", text):
        start = _skip(text, brace.end())
        if brace.start() < position or not text.startswith(any_form, start):
            continue
        entries, end = _verbatim_entries(text, start, sentences, forms)
        if entries:
            answers.append(_by_text(entries, sentences))
            rest.append(text[position : brace.start()])
            position = end
    return answers, "\n".join((*rest, text[position:]))


def _key_forms(sentence: str) -> tuple[str, ...]:
    """The sentence between quotes as our form shows it and as a JSON writer escapes it."""
    if _PLAIN.fullmatch(sentence):
        return (f'"{collapse(sentence)}"',)
    forms = (f'"{sentence}"', json.dumps(sentence, ensure_ascii=False), json.dumps(sentence))
    return tuple(dict.fromkeys(map(collapse, forms)))


def _skip(text: str, position: int) -> int:
    return _SEPARATOR.match(text, position).end()


def _verbatim_entries(
    text: str, position: int, sentences: Sequence[str], forms: dict[str, tuple[str, ...]]
) -> tuple[list[_Entry], int]:
    """Entries of the object whose first key is at `position`, and its end; none unless it names every sentence."""
    left = Counter(sentences)
    entries = []
    for own in sentences:
        for sentence in (own, *forms):
            value = _value_after(text, _skip(text, position), forms[sentence]) if left[sentence] else None
            if value:
                break
        else:
            return [], 0
        left[sentence] -= 1
        entries.append(_Entry(sentence, _token(value)))
        position = value.end()
    end = _skip(text, position)
    return (entries, end + 1) if text.startswith("}", end) else ([], 0)


def _value_after(text: str, position: int, forms: Iterable[str]) -> re.Match | None:
    for form in forms:
        if text.startswith(form, position):
            value = _AFTER_KEY.match(text, position + len(form))
            if value:
                return value
    return None


def _by_text(entries: Sequence[_Entry], sentences: Sequence[str]) -> list[str]:
    """Values in the order of the sentences; the entries' keys are the sentences. Repeats keep their order.

    Refused when a repeated sentence stands out of order with several values: whose is which?
    """
    if [entry.key for entry in entries] == list(sentences):
        return [entry.value for entry in entries]
    values: dict[str, str] = {}
    for entry in entries:
        if values.setdefault(entry.key, entry.value) != entry.value:
            raise Refused("ambiguous", f"another order, and {entry.key[:60]!r} repeats with different scores")
    return [values[sentence] for sentence in sentences]


# Named: keys differ from the sentences only by what models change when they copy (case, quotes, numbering ...).


def _named_answers(text: str, sentences: Sequence[str]) -> list[list[str]]:
    objects = _objects(text)
    complete = [entries for entries in objects if len(entries) == len(sentences)]
    if objects and not complete:
        joined = [entry for entries in objects for entry in entries]  # one answer cut into several objects
        for entry in joined:
            _number(entry.value)  # `nan` or `xxx` is a better reason than the count
        if len(joined) != len(sentences):
            raise Refused("wrong_count", f"{len(joined)} scores for {len(sentences)} sentences")
        complete = [joined]
    names = _Names(sentences) if complete else None  # most replies quote the sentences
    return [names.in_order(entries) for entries in complete]


def _objects(text: str) -> list[list[_Entry]]:
    """The entries of each closed `{...}`. Empty when there is no entry at all.

    The places where an entry ends are found first; a key is what stands between two of them.
    """
    objects: list[list[_Entry]] = []
    position = 0
    for match in _ENTRY_END.finditer(text):
        between = text[position : match.start()]
        after = _skip(between, 0)
        if objects and between.startswith('"', after) and "\n" not in between[after:]:
            key = between[after + 1 :]
        else:
            line = max(between.rfind("\n") - 1, 0)  # a key is on one line, its brace may end the line before
            opening = _FIRST_KEY.search(between, line)
            if opening is None or (objects and not between.startswith("}", after)):
                raise Refused("no_json", f"something stands between the entries: {between.strip()[:60]!r}")
            key = between[opening.end() :]
            objects.append([])
        objects[-1].append(_Entry(key, _token(match)))
        position = match.end()
    if objects and not text.startswith("}", _skip(text, position)):
        raise Refused("no_json", "the object is not closed")
    return objects


_WHOLE = re.compile(r"(?:overall|total|average|mean|confidence)[ _-]?(?:score)?")
# "1", "(1)", "Sentence 1", "sentence_1:", "s1"
_NUMBERED = re.compile(r"(?:(?:sentence|sent|score|s|no)[ ._#-]{0,2}|#)?\(?([0-9]{1,3})[.):]{0,2}")
# before a text: "1. ", "(1) ", "Sentence 1: "
_NUMBERING = re.compile(r"\A\s?(?:(?:sentence|sent|s)[ _-]?)?(?:\([0-9]{1,3}\)|[0-9]{1,3}[.):])\s", re.IGNORECASE)
_ELLIPSIS = re.compile(r"\.{3,}|…")
_SPELLING = str.maketrans(
    "\u2010\u2011\u2012\u2013\u2014\u2212", "------", ",;:\"'`\\*\u2018\u2019\u201c\u201d\u00ab\u00bb"
)


class _Names:
    """Which sentence a key names."""

    def __init__(self, sentences: Sequence[str]):
        self.sentences = [one_line(sentence) for sentence in sentences]
        self.plain = _unique(self.sentences, plain)
        self.unnumbered = _unique(self.sentences, lambda sentence: plain(_NUMBERING.sub("", sentence)))

    def in_order(self, entries: Sequence[_Entry]) -> list[str]:
        """The entries' values in the order of the sentences. Refused unless every sentence is named once."""
        named = [_Entry(self.of(entry.key), entry.value) for entry in entries]
        answers = []
        if Counter(entry.key for entry in named) == Counter(self.sentences):
            answers.append(_by_text(named, self.sentences))
        numbers = [_NUMBERED.fullmatch(one_line(entry.key).lower()) for entry in entries]
        if all(numbers):
            by_number = {int(number[1]): entry.value for number, entry in zip(numbers, entries, strict=True)}
            if sorted(by_number) in (list(range(len(entries))), list(range(1, len(entries) + 1))):
                answers.append([by_number[number] for number in sorted(by_number)])
        if answers and all(answer == answers[0] for answer in answers):
            return answers[0]
        unnamed = [entry.key for entry, name in zip(entries, named, strict=True) if name.key is None]
        if any(_WHOLE.fullmatch(key.strip().lower()) for key in unnamed):
            raise Refused("wrong_count", "a score of the whole rationale in the place of a sentence's")
        key = unnamed[0] if unnamed else Counter(entry.key for entry in named).most_common(1)[0][0]
        raise Refused("ambiguous", f"{key[:60]!r} names {'no' if unnamed else 'more than one'} sentence")

    def of(self, key: str) -> str | None:
        """The one sentence that `key` is the text of, up to case, quotes, punctuation, numbering or an ellipsis."""
        forms = list(dict.fromkeys((key, unescape(key))))
        for form in map(one_line, forms):
            if form in self.sentences:
                return form
        forms += [_NUMBERING.sub("", form) for form in forms]
        found = (table.get(plain(form)) for table in (self.plain, self.unnumbered) for form in forms)
        return next(filter(None, found), None) or next(filter(None, map(self._shortened, forms)), None)

    def _shortened(self, key: str) -> str | None:
        """The one sentence of which an ellipsis stands for the end or the middle."""
        head, *tail = _ELLIPSIS.split(key, maxsplit=1)
        head, end = plain(head), plain("".join(tail))
        if not tail or not head:
            return None
        fits = [plain for plain in self.plain if plain.startswith(head) and plain.endswith(end)]
        return self.plain[fits[0]] if len(fits) == 1 else None


def _unique(sentences: Iterable[str], form: Callable[[str], str]) -> dict[str, str | None]:
    """form(sentence) -> sentence; None where different sentences share a form."""
    table: dict[str, str | None] = {}
    for sentence in sentences:
        if name := form(sentence):
            table[name] = sentence if table.get(name, sentence) == sentence else None
    return table


def plain(text: str) -> str:
    """The text without case, quotes, markdown, commas, special dashes, and punctuation at its ends."""
    text = unicodedata.normalize("NFKC", text).translate(_SPELLING)
    return one_line(text).casefold().strip(" .!?_")


# Arrays: `{"scores": [...]}`, or `[...]` on lines of its own.

_ARRAY = re.compile(
    r"""(?P<key>(?:\A|[\n{,])\s?["*]{0,3}(?:(?:sentence[ _]?)?scores?|ratings?|values?|answers?|results?|rationale)
                ["*]{0,3}\s?:[*]{0,2}
              | \A | \n)                                # a key, or the line begins here
        [^\S\n]?\[(?P<items>[^\[\]]*+)\]
        (?=[^\S\n]?,?\s?(?:[}`\n]|\Z))""",
    re.IGNORECASE | re.VERBOSE,
)
_FENCE = re.compile(r"```\w*")
# what precedes an array that is quoted and not the answer
_NO_ANSWER = re.compile(
    r"\b(?:sorry|apolog\w+|cannot|can't|could not|couldn't|unable|won't|not able|scale|range|between|example|e\.g|"
    r"format)\b", re.IGNORECASE
)  # fmt: skip


def _array_answers(text: str, count: int) -> list[list[str]]:
    found = list(_ARRAY.finditer(text))
    outside = _FENCE.sub("", _ARRAY.sub("", text))
    if re.search(r"[^\W_]", outside):  # with prose around, an array may be a quoted scale
        refusal = found and _NO_ANSWER.search(text, 0, found[0].start())
        found = [] if refusal else [match for match in found if '"' in match["key"] or not _is_scale(_items(match))]
    arrays = [_items(match) for match in found]
    if not arrays:
        braces = 0 <= text.find("{") < text.rfind("}")
        raise Refused("wrong_count" if braces else "no_json", "no sentence with a score was found")
    whole = [items for items in arrays if len(items) == count]
    if not whole:
        raise Refused("wrong_count", f"{len(arrays[0])} scores for {count} sentences")
    return whole


def _items(array: re.Match) -> list[str]:
    items = [item.strip() for item in array["items"].strip().removesuffix(",").split(",")]
    return [item[1:-1] if re.fullmatch(r'"[^"]*"', item) else item for item in items if item]


def _is_scale(items: Sequence[str]) -> bool:
    """Whether the numbers rise from 0 to 1 in equal steps, as a scale does; a lone integer is a citation."""
    if len(items) == 1:
        return items[0].isdigit()
    with contextlib.suppress(ValueError):
        return all(abs(float(item) - place / (len(items) - 1)) < 0.01 for place, item in enumerate(items))
    return False


# -- verdicts --------------------------------------------------------------------------------------------

_VERDICT = re.compile(r"""["']?\bverdict\b["']?\s?:\s?["']?\s?(1|2|tie)\b(?!["']?\s?(?:\||/|or\b))""", re.IGNORECASE)
_WHY = re.compile(rf'"reason"\s?:\s?({STRING})', re.DOTALL)


@dataclass(frozen=True)
class Verdict:
    """A judge's comparison of two texts: which is better, "1", "2" or "tie", and the reason given or ""."""

    better: str
    reason: str


def parse_verdict(reply: str | bytes | None) -> Verdict:
    """The verdict in a judge's raw reply.

    Raises Refused, and nothing else, for any text or bytes: without a verdict, or with two that differ.
    """
    text = read_text(reply)
    found = {match[1].lower() for match in _VERDICT.finditer(text)}
    if not found:
        raise Refused("no_verdict", 'it holds no "verdict": "1", "2" or "tie"')
    if len(found) > 1:
        raise Refused("ambiguous", f"it holds the verdicts {' and '.join(sorted(found))}")
    why = _WHY.search(text)
    return Verdict(found.pop(), unescape(why[1][1:-1]) if why else "")
