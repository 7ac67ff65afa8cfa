"""What became of the items of one run, as counts and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from teacher.budget import PRICES_DATE
from teacher.handoff import Item
from teacher.interface import Reply

NOTHING_TO_ASK = frozenset(("no_rationale", "no_sentences"))  # no Teacher can score these; RL drops them


@dataclass
class Report:
    """What became of the items. `unusable`: item -> reason, after all attempts."""

    total: int = 0
    kept: int = 0  # had a usable reply before
    answered: int = 0  # got one now
    copied: int = 0  # of these, from an identical rationale
    cached: int = 0  # of these, from the cache of earlier runs
    asked: int = 0  # replies received
    text_only: int = 0  # items whose question names an image that is not there
    unusable: dict[Item, str] = field(default_factory=dict)
    refused: int = 0  # of these, whose request the API calls invalid: it is not sent again
    usage: Counter[str] = field(default_factory=Counter)
    cost_usd: float = 0.0  # of the replies whose cost is known
    cost_unknown: int = 0  # replies
    written_by: Counter[str] = field(default_factory=Counter)  # Teacher and model -> items with its usable reply
    first: dict[str, tuple[Item, str]] = field(default_factory=dict)  # reason -> first item and what was said

    def blocking(self) -> dict[Item, str]:
        """The unusable ones for which another request may help."""
        return {item: reason for item, reason in self.unusable.items() if reason not in NOTHING_TO_ASK}

    def add(self, reply: Reply) -> None:
        self.asked += 1
        self.usage.update(reply.usage)
        self.cost_usd += reply.cost_usd or 0.0
        self.cost_unknown += reply.cost_usd is None

    def summary(self) -> str:
        """One line: counts, tokens, dollars."""
        cached = f", {self.cached} from the cache" if self.cached else ""
        line = (
            f"{self.total} rationales: {self.kept} had a reply, {self.answered} answered now "
            f"({self.asked} requests, {self.copied} copies{cached}), {len(self.unusable)} unusable"
        )
        if self.usage or self.cost_unknown:
            line += f"; {self.usage['input_tokens']:,} tokens in, {self.usage['output_tokens']:,} out"
            if self.cost_usd or not self.cost_unknown:
                line += f", ${self.cost_usd:.4f} at {PRICES_DATE} prices"
            if self.cost_unknown:
                line += f", the cost of {self.cost_unknown} replies is unknown"
        if self.text_only:
            line += f"; {self.text_only} asked without the image that the question names"
        if self.written_by:
            line += f"; replies by {in_words(self.written_by)}"
        return line + self.examples()

    def examples(self) -> str:
        """`; first api_400: question 12: what the API said`, for each reason that came with a sentence."""
        first = ((reason, item, said) for reason, (item, said) in self.first.items() if said)
        return "".join(f"; first {reason}: question {item.qid}: {said[:300]}" for reason, item, said in first)


def in_words(reasons: Mapping[str, int]) -> str:
    """`wrong_count 3, max_tokens 1`"""
    return ", ".join(f"{reason} {count}" for reason, count in Counter(reasons).most_common())
