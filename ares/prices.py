"""What Claude costs: the one dated price table, what a reply cost, and the most that a request can cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# US dollars per million tokens (input, output), live; by the model id's beginning. The one table of prices.
PRICES_DATE = "2026-11"
PRICES = {"claude-haiku-5-5": (0.10, 0.50), "claude-haiku-4-5": (1.00, 5.00)}
BATCH_FACTOR = 0.5  # Message Batches


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens, live."""

    input: float
    output: float

    def usd(self, input_tokens: float, output_tokens: float, batch: bool = False) -> float:
        dollars = (input_tokens * self.input + output_tokens * self.output) / 1e6
        return dollars * BATCH_FACTOR if batch else dollars


def price_of(model: str) -> Price | None:
    """From the table; None if the model is not in it."""
    return next((Price(*price) for beginning, price in PRICES.items() if model.startswith(beginning)), None)


def cost_usd(price: Price | None, usage: Mapping[str, int], batch: bool = False) -> float | None:
    """Dollars for one reply; None if the price is not known."""
    if price is None:
        return None
    return price.usd(usage.get("input_tokens", 0), usage.get("output_tokens", 0), batch)
