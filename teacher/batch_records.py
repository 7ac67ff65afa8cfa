"""The records of Message Batches, one file each: what must outlive the client (teacher/batches.py says when).

    {questions_dir}/teacher/batches/{nonce}.json   intent -> submitted -> collected

No record with a batch id is ever deleted here. Collected ones stay too: they count how often an item was asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ares import files
from ares.cli import UserError, in_one_line

INTENT, SUBMITTED, COLLECTED = "intent", "submitted", "collected"


@dataclass
class Record:
    """One batch on disk.

    `asked`: custom_id -> {"item", "text" (hash of the request's text), "key" (of the whole request), "attempt" (from
    1)}; once collected, where there is no usable reply, also "reason", "said" (a sentence), "replied" (an unusable
    reply came) and "permanent" (the API called the request invalid). `from_list`: the id was found in the API's list
    of batches, so it may be somebody else's batch; those that were are in `not_ours`. Without any batch it counts as
    collected.
    """

    nonce: str
    hash: str
    count: int
    model: str
    time: float
    most_usd: float | None
    asked: dict[str, dict[str, Any]]
    state: str = INTENT
    batch: str | None = None
    from_list: bool = False
    not_ours: list[str] = field(default_factory=list)


_KINDS = {
    "nonce": str, "hash": str, "count": int, "model": str, "time": (int, float), "most_usd": (int, float, type(None)),
    "asked": dict, "state": str, "batch": (str, type(None)), "not_ours": list,
}  # fmt: skip


class Store:
    """The records of a questions folder."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def path(self, record: Record) -> Path:
        return self.folder / f"{record.nonce}.json"

    def records(self) -> Iterator[Record]:
        """All records, in no order. Raises UserError for one that cannot be read."""
        for path in sorted(self.folder.glob("*.json")):
            try:
                record = Record(**files.parse_json(files.read_shared(path).decode("utf-8-sig")))
                if record.nonce != path.stem or not _is_sound(record):  # the nonce names the file that is written next
                    raise ValueError("not a batch record")
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path} is damaged ({in_one_line(error, 160)}); it names a batch that was paid for: mend it, or "
                    "delete it to have its requests asked again"
                ) from None
            yield record

    def pending(self) -> list[Record]:
        """Batches whose results are not collected, oldest first. Raises UserError for a damaged record."""
        pending = [record for record in self.records() if record.state != COLLECTED]
        return sorted(pending, key=lambda record: record.time)

    def known_ids(self) -> set[str]:
        return {record.batch for record in self.records() if record.batch}

    def save(self, record: Record) -> None:
        """Raises UserError if the file cannot be written."""
        files.write_json(self.path(record), asdict(record), indent=None)

    def drop_intent(self, record: Record) -> None:
        """Delete the record of a batch that was not created."""
        if record.batch is not None:
            raise ValueError(f"{record.batch} exists")
        self.path(record).unlink(missing_ok=True)

    def refuse_pending(self) -> None:
        """Raise UserError if batches are out: asking live would pay for the same items again."""
        pending = self.pending()
        if pending:
            model = ", ".join(sorted({record.model for record in pending}))
            raise UserError(
                f"{len(pending)} batches with {sum(record.count for record in pending)} requests are out "
                f"({self.folder}, asked of {model}); collect them with --batch, or remove that folder to give them up"
            )


def _is_sound(record: Record) -> bool:
    """Whether the fields have the types that the client relies on."""
    return (
        isinstance(record.count, int)
        and isinstance(record.model, str)
        and isinstance(record.time, int | float)
        and isinstance(record.most_usd, int | float | None)
        and record.state in (INTENT, SUBMITTED, COLLECTED)
        and isinstance(record.batch, str | None)
        and (record.state != SUBMITTED or bool(record.batch))
        and isinstance(record.not_ours, list)
        and isinstance(record.asked, dict)
        and all(
            isinstance(asked, dict)
            and isinstance(asked.get("item"), str)
            and asked["item"].partition("/")[0].isdecimal()
            and isinstance(asked.get("text"), str)
            and isinstance(asked.get("key"), str)
            and isinstance(asked.get("attempt"), int)
            for asked in record.asked.values()
        )
    )
