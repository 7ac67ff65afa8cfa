"""What Claude costs: the one dated price table, what a reply cost, and the most that a request can cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# US dollars per million tokens (input, output), live; by the model id's beginning. The one table of prices.
PRICES_DATE = "2026-11"
PRICES = {"claude-haiku-5-5": (0.10, 0.50), "claude-haiku-4-5": (1.00, 5.00)}
BATCH_FACTOR = 0.5  # Message Batches
# input tokens that a prompt cache holds, as multiples of the input price; we ask for no cache, a gateway may
CACHE_READ, CACHE_WRITE_5_MINUTES, CACHE_WRITE_1_HOUR = 0.1, 1.25, 2.0


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


def cost_usd(price: Price | None, usage: Mapping[str, int | None], batch: bool = False) -> float | None:
    """Dollars for one reply; None if the price is not known.

    `usage` has the API's names. `input_tokens` does not include cached tokens; `ephemeral_1h_input_tokens` is the
    part of `cache_creation_input_tokens` that is kept for an hour.
    """
    if price is None:
        return None
    hour = usage.get("ephemeral_1h_input_tokens") or 0
    written = max(usage.get("cache_creation_input_tokens") or 0, hour)
    tokens = usage.get("input_tokens") or 0
    tokens += CACHE_READ * (usage.get("cache_read_input_tokens") or 0)
    tokens += CACHE_WRITE_5_MINUTES * (written - hour) + CACHE_WRITE_1_HOUR * hour
    return price.usd(tokens, usage.get("output_tokens") or 0, batch)
