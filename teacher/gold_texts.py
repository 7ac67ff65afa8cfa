"""A question's gold texts as the reference Teacher's rules (teacher/reference.py) need them: sentences and limits.

Without a solution the lecture and "The answer is (B)." stand in its place. Standard library only.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ares.sentences import split_text
from teacher.text_similarity import ANSWER_WORDS, Choices, Match, Sentence, f1, lcs


class Material:
    """A question's gold texts, read once: gold and neutral sentences and every word they use."""

    def __init__(self, question: str, options: tuple[str, ...], answer: int, hint: str, lecture: str, solution: str):
        self.answer = answer
        self.choices = Choices(options)
        self._sentences: dict[str, Sentence] = {}
        self._matches: dict[str, list[Match]] = {}
        self.question, hint, lecture, self.gold = (self._read(text) for text in (question, hint, lecture, solution))
        self.has_solution = bool(self.gold)
        if not self.has_solution:
            self.gold, lecture = [*lecture, Sentence(_conclusion(answer), self.choices)], []
        self.gold_texts = [sentence.text for sentence in self.gold]
        self.frame = {word for sentence in self.question for word in sentence.content} | ANSWER_WORDS
        self.answer_words = self.choices.content[answer].union(*(gold.words for gold in self.gold))
        self.openings = {index for index, gold in enumerate(self.gold) if gold.opening() or not gold.content}
        indices = set(range(len(self.gold))) - self.openings
        explicit = {index for index in indices if self.gold[index].asserted(self.choices) == {answer}}
        self.explicit = bool(explicit)
        self.conclusions = explicit or {index for index in indices if self.gold[index].says_only(answer)}
        last = {max(self.conclusions)} if self.conclusions else set()
        self.reasons = indices - (explicit if explicit and indices - explicit else last)
        self.neutral = self.question + hint + lecture
        everything = self.gold + self.neutral
        self.words = Counter({word: 99 for sentence in everything for word in sentence.content})
        self.words.update(dict.fromkeys(self.choices.words, 99))
        self.words.update({f"<{option}>": 99 for option in range(len(options))})
        self.words.update(dict.fromkeys(ANSWER_WORDS, 99))
        self.longest = 10 + 2 * max(len(sentence.words) for sentence in everything)
        repeats = [sentence.repeats() for sentence in everything]
        self.same_word = max(2, *(word for word, _ in repeats))
        self.same_pairs = max(2, *(pairs for _, pairs in repeats))

    def sentence(self, text: str) -> Sentence:
        """A sentence of a rationale; read once, as the rationales of one question share most of theirs."""
        if text not in self._sentences:
            self._sentences[text] = Sentence(text, self.choices)
        return self._sentences[text]

    def read(self, rationale: str) -> list[Sentence]:
        """The sentences of a rationale."""
        return [self.sentence(text) for text in split_text(rationale)]

    def matches(self, sentence: Sentence) -> list[Match]:
        """The sentence against each gold one."""
        if sentence.text not in self._matches:
            self._matches[sentence.text] = [Match(sentence, gold) for gold in self.gold]
        return self._matches[sentence.text]

    def only_concludes(self, sentence: Sentence) -> bool:
        """Whether a sentence asserts the gold choice as the answer, in words of the question, and no more."""
        words = sentence.content.keys() - {f"<{self.answer}>"} - self.choices.content[self.answer]
        return self.concluded(sentence) == {self.answer} and words <= self.frame

    def concluded(self, sentence: Sentence) -> set[int]:
        """The choices that a sentence asserts as the answer (see `concluded_choice`)."""
        named = sentence.asserted(self.choices)
        if named or self.explicit or sentence.negated or not sentence.options:
            return named
        alike = (
            f1(lcs(sentence.frame, gold.frame), len(sentence.frame), len(gold.frame)) >= 0.6
            for gold in (self.gold[index] for index in self.conclusions)
        )
        return sentence.options if any(alike) else set()

    def _read(self, text: str) -> list[Sentence]:
        sentences = (Sentence(part, self.choices) for part in split_text(text.replace("\n", "\\n")))
        return [sentence for sentence in sentences if sentence.tokens]


@functools.lru_cache(maxsize=64)  # 50 kB each
def read_gold(texts: tuple[Any, ...]) -> Material:
    """The material of a question: the rationales of one question share it, if they are read one after another."""
    return Material(*texts)


def texts_of(problem: Mapping[str, Any]) -> tuple[Any, ...]:
    """What `read_gold` reads of a problem."""
    names = ("question", "choices", "answer", "hint", "lecture", "solution")
    return tuple(tuple(problem[name]) if name == "choices" else problem[name] for name in names)


def _conclusion(answer: int) -> str:
    """The gold answer as a sentence of its own."""
    return f"The answer is ({chr(ord('A') + answer)})."
