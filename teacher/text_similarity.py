"""How the reference Teacher reads and compares sentences: word lists, stemming, choices as words, `similarity`.

The similarity of a sentence to a gold one (0-1) is the mean of three F1 after light stemming - of content words, of
all words in order (longest common subsequence), of pairs of neighbouring words - times a penalty:

- 0.3 if one of the two is negated and the other is not;
- 0.55 if a number, name, colour, choice or word of opposition (left/right, more/less ...) replaces another of its
  kind;
- 0.8 if one was added.

A choice counts as one word, and `(B)`, `option B` and the text of choice B are the same word. Standard library only;
the rules built on it are in teacher/reference.py.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from ares.sentences import is_finished

_WORDS = re.compile(r"<\d+>|\d+(?:[.,/:]\d+)*|[^\W\d_]+")
_STOP = frozenset(
    "a an the is are was were be been being am of to and or that this these those it its as so then thus therefore "
    "hence which who whom whose what will would can could may might must do does did doing has have had having with "
    "for by from at on in into than also there here we you i he she they them their our your us me my his her but if "
    "because since while when where how s t d ll m re ve".split()
)
_NEGATION = frozenset("not no never neither nor none without cannot".split())
_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}
_COLOURS = "red blue green yellow orange purple black white brown pink gray grey violet cyan magenta".split()
# words that reverse a statement when one replaces another
_OPPOSITES = (
    "north south east west / left right / more less fewer / most least fewest / higher lower / high low / "
    "larger smaller bigger / largest smallest biggest / large small big / hot cold warm cool / "
    "hotter colder warmer cooler / faster slower / fast slow / before after / above below under / "
    "increase decrease / attract repel / push pull / stronger weaker / strong weak / nearer farther closer / "
    "near far / heavier lighter / heavy light / longer shorter / long short / up down / top bottom / "
    "same different / always sometimes / first second third last / inside outside"
).split(" / ")
ANSWER_WORDS = frozenset("answer option choic correct right".split())  # as stemmed
_THEREFORE = re.compile(r"^(?:so|therefore|thus|hence|then|this means)\b", re.I)


# -- reading --------------------------------------------------------------------------------------------


class Sentence:
    """One sentence as it is compared: stemmed tokens in which a choice is one token `<index>`."""

    def __init__(self, text: str, options: Sequence[tuple[re.Pattern[str], str]]):
        self.text = text.strip()
        plain = _respell(text)
        for pattern, mark in options:
            plain = pattern.sub(mark, plain)
        raw = _WORDS.findall(plain.lower())
        self.tokens = tuple(
            token
            for index, token in enumerate(map(_stem, raw))
            if not (token[0] == "<" and index and raw[index - 1] == token)  # "(A) red" names one choice once
        )
        self.content = Counter(token for token in self.tokens if token not in _STOP and token not in _NEGATION)
        self.pairs = Counter(zip(self.tokens, self.tokens[1:], strict=False))
        self.frame = tuple("<>" if token[0] == "<" else token for token in self.tokens)  # any choice
        self.choices = [token for token in self.tokens if token[0] == "<"]
        self.options = {int(token[1:-1]) for token in self.choices}
        self.negated = any(token in _NEGATION for token in self.tokens)
        self.concludes = bool(_THEREFORE.match(self.text)) or bool({"answer", "option", "choic"} & set(self.tokens))
        self.finished = is_finished(text)
        self.keys = self._key_tokens()

    def says(self, option: int) -> bool:
        """Whether the sentence names this choice without a negation."""
        return option in self.options and not self.negated

    def _key_tokens(self) -> dict[str, set[str]]:
        names = {_stem(_plain(name)) for name in re.findall(r"(?<=[^.!?:] )[\"'(]?([A-Z][a-z]{2,})", self.text)}
        keys: dict[str, set[str]] = {}
        for token in self.content:
            kind = _KEY_KIND.get(token)
            if token[0].isdigit():
                kind = "number"
            elif kind is None and token in names:
                kind = "name"
            if kind:
                keys.setdefault(kind, set()).add(token)
        return keys


def option_patterns(choices: Sequence[str]) -> list[tuple[re.Pattern[str], str]]:
    """Patterns that turn `(B)`, `option B`, `answer is B` and choice B's text into ` <1> `, in the order of use."""
    patterns = []
    words_of = [_choice_words(choice) for choice in choices]
    alike = {words for words, count in Counter(words_of).items() if count > 1}
    for index, choice in sorted(enumerate(choices), key=lambda pair: -len(pair[1])):
        if words_of[index] in alike:  # "Best Wishes," or "Best wishes,": capitals and punctuation tell
            patterns.append((re.compile(r"\s+".join(map(re.escape, choice.split()))), f" <{index}> "))
    for index in range(len(choices)):
        letter = chr(ord("a") + index)
        by_letter = rf"\({letter}\)|(?<=\boption ){letter}\b|(?<=\bchoice ){letter}\b|(?<=answer is ){letter}(?=\W*$)"
        patterns.append((re.compile(by_letter, re.I), f" <{index}> "))
    for index, words in sorted(enumerate(words_of), key=lambda pair: -len(pair[1])):
        if not words or words in alike:
            continue
        body = r"\W+".join(map(re.escape, words))
        if all(word in _STOP or word in _NEGATION for word in words):
            body = rf"(?<=answer is ){body}"  # "no" and "it" mean other things elsewhere
        patterns.append((re.compile(rf"(?<![\w<]){body}(?![\w>])", re.I), f" <{index}> "))
    return patterns


def _choice_words(choice: str) -> tuple[str, ...]:
    """The words of a choice; without a leading article, which changes in a sentence ("the boat that ...")."""
    words = tuple(_WORDS.findall(_plain(choice)))
    return words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words


def _plain(text: str) -> str:
    return _respell(text).lower()


def _respell(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").replace("<", " ")  # `<1>` is ours
    text = re.sub(r"(\d),(?=\d{3}\b)", r"\1", text)  # 1,000
    text = re.sub(r"(?<=\d)(?=[A-Za-z])|(?<=[A-Za-z])(?=\d)", " ", text)  # 135miles
    return re.sub(r"\bcan't\b|\bcannot\b", "can not", text, flags=re.I).replace("n't", " not")


@functools.lru_cache(maxsize=1 << 16)
def _stem(token: str) -> str:
    """Plural and verb endings off; crude, but the same on both sides of a comparison."""
    if token in _NUMBER_WORDS:
        return _NUMBER_WORDS[token]
    if token[0] == "<" or token[0].isdigit() or token in _KEY_KIND or token in _STOP:
        return token
    for ending, shortest in (("ing", 6), ("ed", 5), ("es", 5), ("s", 4), ("e", 5)):
        if token.endswith(ending) and len(token) >= shortest and not token.endswith(("ss", "us", "is")):
            return token[: -len(ending)]
    return token


_KEY_KIND = {word: "colour" for word in _COLOURS} | {
    word: f"opposite{index}" for index, group in enumerate(_OPPOSITES) for word in group.split()
}


# -- comparing sentences ---------------------------------------------------------------------------------


def similarity(sentence: Sentence, gold: Sentence) -> float:
    """How far `sentence` says what `gold` says, 0-1 (see the module docstring)."""
    shared = (sentence.content & gold.content).total()
    if shared == 0:
        return 0.0
    bag = f1(shared, sentence.content.total(), gold.content.total())
    order = f1(lcs(sentence.tokens, gold.tokens), len(sentence.tokens), len(gold.tokens))
    pairs = f1((sentence.pairs & gold.pairs).total(), sentence.pairs.total(), gold.pairs.total())
    return (bag + order + pairs) / 3 * _penalty(sentence, gold)


def containment(sentence: Sentence, other: Sentence) -> float:
    """Like `similarity`, but precision alone: a part of a long hint is as true as the whole."""
    bag = share(sentence.content, other.content)
    if bag == 0.0:
        return 0.0
    order = lcs(sentence.tokens, other.tokens) / len(sentence.tokens)
    pairs = share(sentence.pairs, other.pairs)
    return (bag + order + pairs) / 3 * _penalty(sentence, other)


def _penalty(sentence: Sentence, gold: Sentence) -> float:
    if sentence.negated != gold.negated:
        return 0.3
    if sentence.choices and gold.choices and lcs(sentence.choices, gold.choices) < len(sentence.choices):
        return 0.55  # "A is longer than B" for "B is longer than A", too
    added = False
    for kind, mine in sentence.keys.items():
        theirs = gold.keys.get(kind, set())
        if mine - theirs and theirs - mine:
            return 0.55
        added = added or bool(mine - theirs)
    return 0.8 if added else 1.0


def score_of(value: float) -> float:
    """A similarity as a score: 0.9 and more is 1.0, 0.25 and less is 0.0, linear between, in steps of 0.1."""
    return round(min(1.0, max(0.0, (value - 0.25) / 0.65)), 1)


def f1(shared: int, mine: int, theirs: int) -> float:
    """F1 from the number of shared elements and the sizes of both sides."""
    return 2 * shared / (mine + theirs) if mine + theirs else 0.0


def share(content: Counter, of: Counter) -> float:
    """Which part of `content` (a multiset) is in `of`."""
    return (content & of).total() / content.total() if content else 0.0


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence; bit-parallel (Hyyro 2004), as it is the inner loop of scoring."""
    positions: dict[str, int] = {}
    for index, token in enumerate(b):
        positions[token] = positions.get(token, 0) | 1 << index
    full = (1 << len(b)) - 1
    row = full
    for token in a:
        matched = row & positions.get(token, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(b) - row.bit_count()
