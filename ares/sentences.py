r"""Where a sentence ends, in characters and in token columns: the unit that the Teacher scores and PPO rewards.

One rule, `_spans`, reads text. The id version joins the pieces of the *given* ids, applies the same rule, and maps the
last character of each sentence back to the column that holds it; nothing is ever tokenised again. The rule follows a
careful reader of school-book English:

- `.`, `!`, `?` and runs of them end a sentence, closing quotes and brackets included, if white space follows;
- they do not inside numbers, versions, domains, initials and abbreviations, nor after a list marker (`2. Compare`);
- a sentence holds a word: stray punctuation goes with the sentence beside it;
- the last sentence may be unfinished; the prefix `Solution:` is no sentence.

A newline of the training texts is the two characters backslash-n. T5's vocabulary has no backslash, so a model
writes `<unk>` and a stray `n` glued to the next word. The stray n counts as white space and is removed.

Only English is read; a newline is white space and ends no sentence by itself.
Needs neither torch nor transformers: a tokenizer, where one is needed, is an argument.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary, proxy

LOOK_BACK = 200  # characters: more than the words that decide on a full stop; without a limit, time grows as a square
BREAK = "\x03"  # stands for </s>, or for the cut at output_len: what is still open ends here


# -- sentences of a text -----------------------------------------------------------------------------------


def split_text(text: str) -> list[str]:
    """The sentences of a rationale, each on one line; without the prefix `Solution:` and stray n's."""
    text = _separate(text)
    return [_tidy(text[start:end]) for start, end in _spans(text)]


def is_finished(text: str) -> bool:
    """True if the last sentence has its full stop (closing quotes and brackets may follow it)."""
    return _finished(_separate(text))


def remove_repeats(sentences: Sequence[str]) -> list[str]:
    """Keep the first occurrence of each sentence, in order; blanks around and a leading `Solution:` do not count."""
    first: dict[str, str] = {}
    for sentence in map(str.strip, sentences):
        first.setdefault(sentence[PREFIX.match(sentence).end() :], sentence)
    return list(first.values())


# -- sentences of token ids -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentence:
    """One sentence of a rationale given as ids."""

    text: str  # as a person reads it, on one line
    start: int  # column of its first token
    column: int  # column of its last token: the reward goes to position column - 1


def sentences_from_ids(ids: Sequence[int], tokenizer: Any) -> list[Sentence]:
    """The sentences of one rationale.

    ids: (L,) list, array or tensor of decoder ids, with or without the start token, padded or not; columns index it
    and rise strictly. An unfinished last sentence ends at its `</s>`, or, cut before it, at the last token. Sentences
    that end inside one and the same token are one sentence. Raises ValueError if ids is not one-dimensional.
    """
    text, offsets = _text_of_ids(ids, tokenizer)
    sentences: list[Sentence] = []
    opened = -1
    for start, end in _spans(text):
        column = bisect_right(offsets, end - 1) - 1
        if sentences and sentences[-1].column == column:
            start = opened
            sentences.pop()
        opened = start
        sentences.append(Sentence(_tidy(text[start:end]), bisect_right(offsets, start) - 1, column))
    return sentences


def sentence_columns(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """The column of the last token of each sentence (see `sentences_from_ids`)."""
    return [sentence.column for sentence in sentences_from_ids(ids, tokenizer)]


def is_finished_ids(ids: Sequence[int], tokenizer: Any) -> bool:
    """`is_finished` for ids. A rationale cut at output_len right after a full stop is finished."""
    return _finished(_text_of_ids(ids, tokenizer)[0])


# -- the rule: where a sentence ends -----------------------------------------------------------------------

OPENERS = "([{\"'“‘«*—–"
CLOSERS = ")]}\"'”’»*"
TERMINATOR = re.compile(r"""(?:\.(?:\ \.){2,}+|[.!?…]++)(?:[)\]}"'”’»*]++[.!?…]*+)*+|\x03""")
PREFIX = re.compile(r"\s*(?:Solution\s*:\s*)*")
WORD = re.compile(r"[^\W_]")
# "1.", "(2).", "B.", "IV." at the beginning of a sentence or line, or the first of a list: "these steps: 1. Look"
ITEM = r"[(\[*]*(?:\d{1,2}[.)\]*]+|(?:[A-Za-z]|[IVX]{1,4})[.)\]*]{1,2})"
MARKER = re.compile(rf"{ITEM}(?:\s+{ITEM})*|.*(?::\s+[(*]*1|\n[ *(]*\d{{1,2}})[.)*]+", re.DOTALL)
LONE_LOWER = re.compile(r"[a-z]+\.")  # "etc. is short for", "com. is not"
DOTTED = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]")  # U.S, p.m, J.K: the last dot belongs to the terminator
NEXT_WORD = re.compile(r"[\w’'-]*")
SPEECH = re.compile(  # "Stop!" Lila remarked.
    r"\w+ (?:said|says|asked|asks|told|replied|remarked|answered|added|explained|exclaimed|called|cried|shouted|"
    r"yelled|whispered|wondered|thought)\b"
)
SENTENCE_OPENING = re.compile(r"[A-Z][a-z]|[AI]\s")


def _spans(text: str) -> list[tuple[int, int]]:
    """[start, end) of every sentence of a text whose newlines are real ones, without the blanks around it."""
    spans: list[tuple[int, int]] = []
    words = text.replace("Solution:", " " * len("Solution:"))
    start, word = PREFIX.match(text).end(), -1  # word: where the first word at or after `start` begins
    for match in TERMINATOR.finditer(text, start):
        end, is_break = match.end(), match[0] == BREAK
        if not is_break and not _ends_sentence(text, start, match):
            continue
        if word < start:
            found = WORD.search(words, start)
            word = found.start() if found else len(text)
        if word < end:
            spans.append((start, end))
        elif spans and _belongs_to_last(text[spans[-1][1] - 1 : start], text, start, match):
            spans[-1] = (spans[-1][0], end)
        elif not is_break:
            continue  # no word yet: it opens the next sentence
        start = end
        while text[start : start + 1].isspace():
            start += 1
    tail = text[start:].rstrip()
    if _has_word(tail):
        spans.append((start, start + len(tail)))
    elif spans and not PREFIX.fullmatch(tail):
        spans[-1] = (spans[-1][0], start + len(tail))
    return spans


def _has_word(text: str) -> bool:
    return WORD.search(text.replace("Solution:", "")) is not None


def _belongs_to_last(gap: str, text: str, start: int, match: re.Match) -> bool:
    """Of a stretch without a word: does it go with the sentence before it? (`The end. . .`, or a dash before </s>)"""
    if BREAK in gap:
        return False
    if match[0] == BREAK:
        return not PREFIX.fullmatch(text, start, match.start())
    return start == match.start() and not set(match[0]) & set(CLOSERS)


def _ends_sentence(text: str, start: int, match: re.Match) -> bool:
    """Does this run of terminators end the sentence that began at `start`?"""
    run, end = match[0], match.end()
    after = end
    while after < len(text) and text[after].isspace():
        after += 1
    following = text[after : after + 1]
    if following in ("", BREAK):
        return True
    before = text[max(start, match.start() - LOOK_BACK) : match.start()]
    word = "" if before[-1:].isspace() else (["", *before.rsplit(maxsplit=1)])[-1]
    if after == end:  # no blank: 3.14, example.com, U.S.A., e.g., - or a blank forgotten: `the star.There are`
        glued = run != "." or (len(word) > 1 and "." not in word)
        return glued and SENTENCE_OPENING.match(text, end) is not None
    fragment = text[max(start, end - LOOK_BACK) : end]
    if following in ",;:" or MARKER.fullmatch(fragment):
        return False
    if text[start] in OPENERS and run[-1] in "\"”'’" and SPEECH.match(text, after):
        return False
    if following.islower() and "\n" not in text[end:after]:
        # "Stop!" he said. (why?) and so on; a free-standing ellipsis is a pause
        if run[-1] in CLOSERS or LONE_LOWER.fullmatch(fragment) or (not word and len(run) > 1):
            return False
    return run != "." or not _is_abbreviation(before, word, text, after)


def _is_abbreviation(before: str, word: str, text: str, after: int) -> bool:
    """Is the period that follows `word` part of it? `before`: the sentence up to it; `after`: where text goes on."""
    goes_on, number = text[after].islower(), text[after].isdigit()
    next_word = NEXT_WORD.match(text, after)[0]
    opens = next_word in OPENINGS
    previous = (["", "", *before.split()])[-2]
    word = word.lstrip(OPENERS)
    lower = word.lower()
    if lower in NEVER_LAST or (word in NUMBERED and number):
        return True
    if word in TITLES:
        return not opens
    if lower in SOMETIMES_LAST:
        return goes_on
    if lower in UNITS:
        return goes_on and previous[-1:].isdigit()
    if lower in ACRONYMS:
        return goes_on or number or next_word in INSTITUTIONS
    if DOTTED.fullmatch(word):
        return not opens
    if len(word) == 1 and word.isalpha():
        return _is_initial(word, previous.lstrip(OPENERS), next_word, text[after : after + 2])
    return False


def _is_initial(letter: str, previous: str, next_word: str, following: str) -> bool:
    """Is a single letter with a period an initial (George W. Bush, E. coli) rather than a last word (Sample B.)?"""
    if letter.islower() or following[:1].islower():
        return following[:1].islower()
    if re.fullmatch(r"[A-Z]\.", following):  # P. M. A. Morelet
        return True
    if not following[:1].isupper() or next_word in OPENINGS:
        return False
    if re.fullmatch(r"[A-Z]\.", previous) or previous in ("", "by", "Ed."):
        return True
    return previous.isalpha() and previous[0].isupper() and previous != next_word and previous.lower() not in LABELS


# -- abbreviations: what may stand before a period that ends nothing ---------------------------------------

# names follow, unless a plain sentence opening does ("He lives on Main St. She does not.")
TITLES = frozenset(
    "Mr Mrs Ms Dr Prof Rev Gen Col Sgt Lt Capt Cpl Maj Sen Rep Gov Pres Hon Messrs Jr Sr St Ste Mt Ft Ed Eds".split()
)
# a number follows: No. 5, Fig. 2, Jan. 5
NUMBERED = frozenset("No Nos Fig Figs Eq Vol Ch p pp Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec".split())
# never the last word of a sentence that goes on
NEVER_LAST = frozenset("e.g i.e vs cf viz approx ca".split())
# last before a capital, not before a small letter
SOMETIMES_LAST = frozenset("etc al inc co corp ltd bros dept ave blvd rd esp incl sp spp".split())
ACRONYMS = frozenset("u.s u.k u.s.a u.n e.u d.c a.m p.m b.c a.d b.c.e c.e ph.d m.d b.a m.a".split())
# after U.S., U.K. ... these go on with the name; any other capital opens a sentence
INSTITUTIONS = frozenset(
    "Congress Senate House Army Navy Air Marine Marines Coast Constitution Supreme Capitol Census Treasury Department "
    "Government President Secretary Geological Forest Fish Food Postal Virgin Open Code Bill Civil National Bureau "
    "Environmental Representative Senator Dollar Dollars State States EST PST".split()
)
UNITS = frozenset("in ft lb lbs oz yd mi hr hrs min sec gal qt pt".split())
# words that open a sentence rather than carry on a name
OPENINGS = frozenset(
    "The A An This That These Those It Its He She They We You I His Her Their Our My Your There Here In On At By For "
    "From With Without To Of As If When While Since Because So Thus Therefore However Then Now Next First Second "
    "Third Finally Also And But Or Yet Both Each Every Some Many Most All None Only Other Another One Two "
    "Consequently Hence Meanwhile Although Though After Before During According Based Given Looking Let Which What "
    "Where Why How Is Are Was Were Do Does Did Can Could Would Should".split()
)
# "Sample B. Magnet ..." labels a thing; "George W. Bush" names a man
LABELS = frozenset(
    "sample solution option choice answer row column figure pair part point letter label group type class set plate "
    "ball box bowl cup jar tube beaker flask container plant planet magnet material substance organism species "
    "vitamin hepatitis grade plan model image diagram graph map table trial test path picture step question team "
    "student person object item line side area region zone location position source animal bird fish chart "
    "molecule atom element compound experiment condition treatment design version section appendix level key".split()
)

# -- white space and the stray n -----------------------------------------------------------------------------

# in text a stray n is glued to the full stop or colon before it; behind a blank it is one only if no word can be meant
STRAY = re.compile(r"""([.!?:…][)\]"”’']*)(?:(n+)|(?<=[.!?:])\ +(n+)(?=[A-Z][a-z]|[-•]\ |\d+[.)]\ ))""")
DOMAIN = re.compile(r"(?:https?://)?[a-z0-9-]+(?:\.[a-z0-9-]+)*\.(?:com|org|net|gov|edu|mil|int|io|uk|us|ca|nz|ng)\b")


def _separate(text: str) -> str:
    """Replace every backslash-n and stray n by white space of the same length, so that offsets stay valid."""
    text = text.replace(BREAK, " ").replace("\\n", "\n ")
    return STRAY.sub(_stray, text)


def _stray(match: re.Match) -> str:
    text, begin, end = match.string, match.start(match.lastindex), match.end()
    nearest = max(begin - LOOK_BACK, 0)
    token_start = max(text.rfind(blank, nearest, begin) for blank in " \n\t") + 1
    domain = DOMAIN.match(text, max(token_start, nearest), end + LOOK_BACK)
    if domain and domain.end() > begin:  # science.nasa.gov
        return match[0]
    # water.nneon holds neon: before a small letter the last n of several begins the word
    keep = 1 if end - begin > 1 and text[end : end + 1].islower() else 0
    return match[0][: begin - match.start()] + "\n" * (end - begin - keep) + "n" * keep


def _tidy(text: str) -> str:
    """One line, without </s>, blanks closed up, none before punctuation (` .5` keeps its own)."""
    line = " ".join(text.replace(BREAK, " ").replace(FILL, "").split())
    line = re.sub(r"\.(?: \.){2,}", lambda dots: dots[0].replace(" ", ""), line)
    return re.sub(r" (n't\b|[.,!?]+(?![\w.]))", r"\1", line)


def _finished(text: str) -> bool:
    body = _tidy(text[PREFIX.match(text).end() :]).rstrip(CLOSERS + " ")
    return body.endswith((".", "!", "?", "…")) and _has_word(body)


# -- from ids to text ---------------------------------------------------------------------------------------

# tokenizers with byte fallback spell rare characters in bytes: each is held as one private-use character until joined
BYTE, FILL = 0xE000, "\x02"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
BYTES = re.compile("[\ue000-\ue0ff]+")


def _text_of_ids(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[int]]:
    """The text of ids with BREAK for `</s>` (or after the last token), and each column's offset in it."""
    ids = ids.tolist() if hasattr(ids, "tolist") else [int(token) for token in ids]
    if ids and isinstance(ids[0], list):
        raise ValueError(f"ids of one rationale wanted, got {len(ids)} rows")
    if (table := _tables.get(tokenizer)) is None:
        table = _tables[tokenizer] = _Pieces(tokenizer)
    while ids and ids[-1] == table.pad:
        ids.pop()
    pieces = [table[token] for token in ids]
    for column in (column for column, token in enumerate(ids[:-1]) if token == table.unk):
        _drop_stray(pieces, column)
    if pieces and pieces[-1] != BREAK:
        pieces[-1] += BREAK
    offsets = list(accumulate(map(len, pieces), initial=0))[:-1]
    text = BYTES.sub(_decode_bytes, "".join(pieces))
    return text.replace("\\n", "\n "), offsets


def _drop_stray(pieces: list[str], unknown: int) -> None:
    """If the unknown piece is the backslash of a newline, replace it and the n that follows it by a newline. A piece
    that opens a word ("▁neon") begins with a true n; so does `{neon}`, whose unknown brace follows a blank."""
    if pieces[unknown + 1][:1] != "n":
        return
    before = pieces[unknown - 1][-1:] if unknown else ""
    after = "".join(pieces[unknown + 1 : unknown + 3])[1:2]
    if before == " " and after.islower():
        return
    pieces[unknown : unknown + 2] = "\n", pieces[unknown + 1][1:]


def _decode_bytes(match: re.Match) -> str:
    """Byte pieces (<0xC3><0xA9>) as the characters they spell, as long as before."""
    raw = bytes(ord(char) - BYTE for char in match[0])
    return raw.decode(errors="ignore").rjust(len(raw), FILL)


class _Pieces(dict):
    """id -> text of its piece (a leading blank where it opens a word), filled as ids are met."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.tokenizer = proxy(tokenizer)  # the table must not keep its own key alive
        self.size = len(tokenizer)
        self.pad, self.eos, self.unk = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
        self.special = set(tokenizer.all_special_ids)

    def __missing__(self, token: int) -> str:
        if token == self.eos:
            text = BREAK
        elif token in self.special or not 0 <= token < self.size:
            text = ""  # pads, <unk>, sentinels; rows of the embedding that the vocabulary does not fill
        else:
            text = self.tokenizer.convert_ids_to_tokens(token).replace("▁", " ")
            byte = BYTE_PIECE.fullmatch(text)
            text = chr(BYTE + int(byte[1], 16)) if byte else text
        self[token] = text
        return text


_tables: WeakKeyDictionary[Any, _Pieces] = WeakKeyDictionary()
