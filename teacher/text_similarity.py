"""How the reference Teacher reads and compares sentences: word lists, stemming, choices as words, `Match`.

The similarity of a sentence to a gold one (0-1) is the mean of three F1 after light stemming - of content words, of
all words in order (longest common subsequence), of pairs of neighbouring words - times a penalty:

- 0.3 if a number, name, colour, choice or word of opposition (left/right, more/less ...) replaces another of its kind
  or a choice, or if one of the two is negated and the other is not;
- 0.6 if a number, name or choice of the gold sentence is missing;
- 0.8 if a word of these kinds was added.

A choice counts as one word, and `(B)`, `option B` and the text of choice B are the same word. Standard library only;
the rules built on it are in teacher/reference.py.
"""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence, Set

from ares.sentences import is_finished

_WORDS = re.compile(r"<\d+>|\d+(?:[.,/:]\d+)*|[^\W\d_]+")
_THOUSANDS = re.compile(r"(\d),(?=\d{3}\b)")  # 1,000
_UNIT = re.compile(r"(?<=\d)(?=[A-Za-z])|(?<=[A-Za-z])(?=\d)")  # 135miles
_CANNOT = re.compile(r"\bcan't\b|\bcannot\b", re.I)
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
ANSWER_NOUNS = frozenset("answer option choic".split())
ANSWER_WORDS = frozenset("answer option choic correct right".split())  # as stemmed
_CONCLUDES = re.compile(
    r"^(?:and |also,? )?(?:so|therefore|thus|hence|then|this means|as a result|consequently|accordingly)\b"
    r"|\b(?:conclusion|conclude|therefore|thus|hence)\b|, so\b",
    re.I,
)

_IS_ANSWER = re.compile(r"\banswer (?:is|must be|would be)\b|\bis the (?:correct |right |best )?answer\b", re.I)
_NAMES = re.compile(r"(?:(?<=[^.!?:] )|(?<=\b[MD]r\. )|(?<=\bMs\. )|(?<=\bMrs\. ))[\"'(]?([A-Z][a-z]{2,})")
# an instruction: a verb in its base form, then a word that opens its object, as "Look at", "Find the", "Count each"
_VERB = (
    r"(?:look|find|think|count|use|read|compare|check|examine|consider|recall|remember|identify|determine|decide|note|"
    r"notice|see|try|start|begin|imagine|observe|study|review|locate|choose|select|pick|list|measure|calculate|compute|"
    r"estimate|add|subtract|divide|multiply|write|draw|follow|analy[sz]e|trace|focus|match|sort|ask|figure out|"
    r"work out|keep in mind|pay attention|go|solve|watch|search|apply|rewrite|answer|break down|understand|know|get)"
)
_OBJECT = (
    r"(?:at|the|each|every|all|both|which|what|where|how|who|why|when|whether|about|of|for|an?|through|carefully|"
    r"closely|again|back|to|on|over|in|if|your|our|its|his|her|their|this|that|these|those|it|one|two|three|first|"
    r"with|by|from|only|any|some|yourself|step|more|most)"
)
_PERSON = r"(?:(?:we|i|you)(?:'ll| will| need| have| must| should| can| want| am going| are going)(?: to)?)"
_OPENING = re.compile(
    rf"^(?:(?:first|next|now|then|finally|also|again|ok|okay|well|please|remember)\b,? ?)*(?:"
    rf"let's|let us|let me|here is (?:how|what)|the (?:question|problem|task) (?:asks|is about)"
    rf"|to {_VERB}\b"
    rf"|to \w[^,]{{0,150}}, (?:first |you |we )?(?:{_PERSON} )?{_VERB} {_OBJECT}"
    rf"|{_PERSON} (?:first |also |then )?{_VERB} {_OBJECT}"
    rf"|{_VERB} {_OBJECT})\b",
    re.I,
)
_CLAIM = re.compile(  # something is asserted after the instruction: "Notice that it is red", "Look: it is red"
    r"\b(?:notice|note|recall|remember|see|know|tell|find|recognize|realize|identify|determine|conclude|means?|shows?)"
    r" that\b|[:;] |, (?:so|because|since|which|who)\b"
    r"|(?:,|\band) (?:it|they|he|she|this|there) ",
    re.I,
)


# -- reading --------------------------------------------------------------------------------------------


class Choices:
    """The choices of a question as patterns that find them in a sentence, with the numbers and names they hold."""

    def __init__(self, texts: Sequence[str]):
        self.patterns = option_patterns(texts)
        read = [Sentence(f"is {text}") for text in texts]  # "is": a name is no capital at the beginning
        self.keys = [choice.keys for choice in read]
        self.content = words = [set(choice.content) for choice in read]
        self.words = set().union(*words)
        others = [set().union(*words[:index], *words[index + 1 :]) for index in range(len(words))]
        self.own = [mine - theirs for mine, theirs in zip(words, others, strict=True)]  # of no other choice

    def mark(self, text: str) -> str:
        """The text with each choice as ` <index> `."""
        lowered = text.lower() if text.isascii() else None  # a look for the needles saves most searches
        for needles, pattern, mark in self.patterns:
            if lowered is None or any(needle in lowered for needle in needles):
                text = pattern.sub(mark, text)
        return text

    def told_by_own_words(self, content: Set[str]) -> set[int]:
        """The choice of which a sentence has all own words and none of another's: "the car that moved 20 miles"."""
        touched = [index for index, own in enumerate(self.own) if own & content]
        return {index for index in touched if len(touched) == 1 and self.own[index] <= content}


class Sentence:
    """One sentence as it is compared: stemmed tokens in which a choice is one token `<index>`."""

    def __init__(self, text: str, choices: Choices | None = None):
        self.text = text.strip()
        plain, self.words = _words(text)  # choices as written
        raw = _WORDS.findall((choices.mark(plain) if choices else plain).lower())
        self.tokens = tuple(
            token
            for index, token in enumerate(map(_stem, raw))
            if not (token[0] == "<" and index and raw[index - 1] == token)  # "(A) red" names one choice once
        )
        self.content = Counter(token for token in self.tokens if token not in _STOP and token not in _NEGATION)
        self.choices = [token for token in self.tokens if token[0] == "<"]
        self.options = {int(token[1:-1]) for token in self.choices}
        self.negated = any(token in _NEGATION for token in self.tokens)
        self.concludes = bool(_CONCLUDES.search(self.text)) or not ANSWER_NOUNS.isdisjoint(self.tokens)
        self.keys = self._key_tokens()
        for index in self.options if choices and choices.keys else ():
            for kind, tokens in choices.keys[index].items():
                self.keys[kind] = self.keys.get(kind, set()) | tokens

    @functools.cached_property
    def pairs(self) -> Counter[tuple[str, str]]:
        """Neighbouring tokens."""
        return Counter(zip(self.tokens, self.tokens[1:], strict=False))

    @functools.cached_property
    def frame(self) -> tuple[str, ...]:
        """The tokens with any choice as `<>`."""
        return tuple("<>" if token[0] == "<" else token for token in self.tokens)

    @functools.cached_property
    def finished(self) -> bool:
        """Whether the sentence does not break off."""
        return is_finished(self.text)

    def says_only(self, option: int) -> bool:
        """Whether the sentence names this choice and no other, without a negation."""
        return self.options == {option} and not self.negated

    @property
    def says_no_more(self) -> bool:
        """Whether the sentence is nothing but names of choices."""
        return all(token[0] == "<" for token in self.content)

    def repeats(self) -> tuple[int, int]:
        """How often the most frequent word that is no stop word occurs, and how many pairs of words occur again."""
        counts = Counter(word for word in self.words if word not in _STOP)
        pairs = set(zip(self.words, self.words[1:], strict=False))
        return max(counts.values(), default=0), max(0, len(self.words) - 1 - len(pairs))

    @property
    def stutters(self) -> bool:
        """Whether a word stands twice in a row."""
        return any(a == b for a, b in zip(self.words, self.words[1:], strict=False))

    @property
    def calls_answer(self) -> bool:
        """Whether something is called the answer."""
        return bool(_IS_ANSWER.search(self.text))

    def asserted(self, choices: Choices) -> set[int]:
        """The choices that the sentence asserts as the answer; empty where it concludes nothing or denies."""
        if not self.concludes or self.negated:
            return set()
        return self.options or choices.told_by_own_words(self.content.keys())

    def opening(self) -> int:
        """Where an instruction that carries no claim has its object ("Look at the ..."), in characters; else 0."""
        match = _OPENING.match(self.text)
        claims = self.concludes and self.options or len(self.options) == 1 and self.negated
        return 0 if match is None or claims or _CLAIM.search(self.text) else match.end()

    def says(self, option: int) -> bool:
        """Whether the sentence names this choice without a negation."""
        return option in self.options and not self.negated

    def _key_tokens(self) -> dict[str, set[str]]:
        names = {_stem(_plain(name)) for name in _NAMES.findall(self.text)}
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


def option_patterns(
    choices: Sequence[str],
) -> list[tuple[tuple[str, ...], re.Pattern[str], str | Callable[[re.Match], str]]]:
    """What turns `(B)`, `option B`, `answer is B` and choice B's text into ` <1> `, in the order of use.

    Of each: words of which an ASCII text, in small letters, holds one if the pattern matches; the pattern; the mark.
    """
    patterns = []
    words_of = [_choice_words(choice) for choice in choices]
    alike = {words for words, count in Counter(words_of).items() if count > 1}
    for index, choice in sorted(enumerate(choices), key=lambda pair: -len(pair[1])):
        if words_of[index] in alike:  # "Best Wishes," or "Best wishes,": capitals and punctuation tell
            pattern = re.compile(r"\s+".join(map(re.escape, choice.split())))
            patterns.append((tuple(choice.lower().split()[:1]) or ("",), pattern, f" <{index}> "))
    if choices:
        patterns.append((("(", "option ", "choice ", "answer is "), _by_letter(len(choices)), _letter_mark))
    for index, words in sorted(enumerate(words_of), key=lambda pair: -len(pair[1])):
        if not words or words in alike:
            continue
        body = r"\W+".join(map(re.escape, words))
        if all(word in _STOP or word in _NEGATION for word in words):
            body = rf"(?<=answer is ){body}"  # "no" and "it" mean other things elsewhere
        patterns.append((words[:1], re.compile(rf"(?<![\w<]){body}(?![\w>])", re.I), f" <{index}> "))
    return patterns


@functools.lru_cache
def _by_letter(count: int) -> re.Pattern[str]:
    """Finds the letters of `count` choices where they name a choice."""
    letter = f"([a-{chr(ord('a') + count - 1)}])"
    places = rf"\({letter}\)|(?<=\boption ){letter}\b|(?<=\bchoice ){letter}\b|(?<=answer is ){letter}(?=\W*$)"
    return re.compile(places, re.I)


def _letter_mark(match: re.Match) -> str:
    return f" <{ord(match[match.lastindex].lower()) - ord('a')}> "


def _choice_words(choice: str) -> tuple[str, ...]:
    """The words of a choice; without a leading article, which changes in a sentence ("the boat that ...")."""
    words = tuple(_WORDS.findall(_plain(choice)))
    return words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words


def _plain(text: str) -> str:
    return _respell(text).lower()


@functools.lru_cache(maxsize=1 << 13)  # a few hundred lectures are those of thousands of questions
def _words(text: str) -> tuple[str, tuple[str, ...]]:
    """A text as `_respell` leaves it, and its stemmed words."""
    plain = _respell(text)
    return plain, tuple(map(_stem, _WORDS.findall(plain.lower())))


def _respell(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").replace("<", " ")  # `<1>` is ours
    text = _THOUSANDS.sub(r"\1", text)
    text = _UNIT.sub(" ", text)
    return _CANNOT.sub("can not", text).replace("n't", " not")


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


class Match:
    """A sentence against a gold one: `raw` similarity without, `similarity` with the penalties (0-1).

    `replaced`: another number, name, colour, choice or word of opposition stands where gold has its own.
    """

    def __init__(self, sentence: Sentence, gold: Sentence):
        self.raw, self.replaced, factor = 0.0, False, 1.0
        shared = (sentence.content & gold.content).total()
        if shared:
            bag = f1(shared, sentence.content.total(), gold.content.total())
            order = f1(lcs(sentence.tokens, gold.tokens), len(sentence.tokens), len(gold.tokens))
            pairs = f1((sentence.pairs & gold.pairs).total(), sentence.pairs.total(), gold.pairs.total())
            self.raw = (bag + order + pairs) / 3
            factor, self.replaced = _penalty(sentence, gold)
        self.similarity = self.raw * factor


def similarity(sentence: Sentence, gold: Sentence) -> float:
    """How far `sentence` says what `gold` says, 0-1 (see the module docstring)."""
    return Match(sentence, gold).similarity


def containment(sentence: Sentence, other: Sentence) -> float:
    """Like `similarity`, but precision alone: a part of a long hint is as true as the whole."""
    bag = share(sentence.content, other.content)
    if bag == 0.0:
        return 0.0
    order = lcs(sentence.tokens, other.tokens) / len(sentence.tokens)
    pairs = share(sentence.pairs, other.pairs)
    factor, _ = _penalty(sentence, other)
    return (bag + order + pairs) / 3 * (factor if factor != MISSING else 1.0)


MISSING = 0.6


def _penalty(sentence: Sentence, gold: Sentence) -> tuple[float, bool]:
    """The factor of the similarity, and whether something is replaced by another of its kind."""
    if sentence.negated != gold.negated:
        return 0.3, False
    if sentence.choices and gold.choices and lcs(sentence.choices, gold.choices) < len(sentence.choices):
        return 0.3, True  # "A is longer than B" for "B is longer than A", too
    added = missing = False
    for kind, mine in sentence.keys.items():
        theirs = gold.keys.get(kind, set())
        if mine - theirs and theirs - mine:
            return 0.3, True
        added = added or bool(mine - theirs)
    for kind in ("number", "name"):
        missing = missing or bool(gold.keys.get(kind, set()) - sentence.keys.get(kind, set()) - {"1"})  # "one boat"
    if missing or (gold.options - sentence.options and not sentence.options):
        return MISSING, False
    return (0.8 if added else 1.0), False


def swaps_a_word(sentence: Sentence, gold: Sentence, known: Set[str]) -> bool:
    """Whether a word or two stand in place of gold's, in an otherwise aligned sentence, that make it another fact.

    They do if the new words are `known` (words of the question's own texts: a synonym seldom is one of them), or if
    what they replace is a choice or a number.
    """
    for tag, i, j, k, m in difflib.SequenceMatcher(None, sentence.tokens, gold.tokens, autojunk=False).get_opcodes():
        if tag != "replace":
            continue
        mine = {word for word in sentence.tokens[i:j] if word in sentence.content}
        theirs = {word for word in gold.tokens[k:m] if word in gold.content}
        new, old = mine - theirs, theirs - mine
        if new and old and len(new) <= 2 and len(old) <= 2:
            if not new.isdisjoint(known) or any(word[0] == "<" or word[0].isdigit() for word in old):
                return True
    return False


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
