"""The records of Message Batches, one file each: what must outlive the client (teacher/batches.py says when).

{questions_dir}/teacher/batches/{nonce}.json   intent -> submitted -> collected
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ares import files
from ares.cli import UserError, in_one_line

INTENT, SUBMITTED, COLLECTED = "intent", "submitted", "collected"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def entry(item: str, text: str, key: str, attempt: int, length_factor: int) -> dict[str, Any]:
    """What a record says of a request about one rationale when it is made; `text`: of the request."""
    return {"item": item, "text": digest(text), "key": key, "attempt": attempt, "length_factor": length_factor}


@dataclass
class Record:
    """One batch on disk.

    `asked`: custom_id -> {"item", "text" (hash of the request's text), "key" (of the whole request), "attempt" (from
    1), "length_factor" (absent in older records: 1)}, or a list of these, in the request's order, where it is about
    several rationales; once collected, where there is no usable reply, also "reason", "said" (a sentence), "replied"
    (an unusable reply came), "permanent" (the API called the request invalid) and "alone" (it called one about several
    rationales invalid). `from_list`: the id was found in the API's list of batches, so it may be somebody else's
    batch; those that were are in `not_ours`. Without any batch it counts as collected.
    """

    nonce: str
    count: int
    model: str
    time: float
    most_usd: float | None
    asked: dict[str, dict[str, Any] | list[dict[str, Any]]]
    state: str = INTENT
    batch: str | None = None
    from_list: bool = False
    not_ours: list[str] = field(default_factory=list)
    hash: str = ""  # unused; older records have it

    @property
    def entry(self) -> str:
        """Its id in the spend log."""
        return f"batch-{self.nonce}"

    def asked_as(self, custom_id: str) -> list[dict[str, Any]]:
        """What was asked under an id, for each rationale of the request."""
        asked = self.asked[custom_id]
        return asked if isinstance(asked, list) else [asked]

    def all_asked(self) -> list[dict[str, Any]]:
        return [asked for custom_id in self.asked for asked in self.asked_as(custom_id)]

    def is_sound(self) -> bool:
        """Whether the fields have the types that the client relies on."""
        types = {"count": int, "model": str, "time": int | float, "most_usd": int | float | None, "batch": str | None,
                 "not_ours": list, "asked": dict}  # fmt: skip
        if not all(isinstance(getattr(self, name), kind) for name, kind in types.items()):
            return False
        return (
            self.state in (INTENT, COLLECTED, SUBMITTED if self.batch else INTENT)
            and all(map(self.asked_as, self.asked))
            and all(
                isinstance(asked, dict)
                and all(isinstance(asked.get(name), str) for name in ("item", "text", "key"))
                and asked["item"].partition("/")[0].isdecimal()
                and isinstance(asked.get("attempt"), int)
                and isinstance(asked.get("length_factor", 1), int)
                for asked in self.all_asked()
            )
        )


class BatchStore:
    """The records of a questions folder. Collected ones are kept: they count how often an item was asked."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def path(self, record: Record) -> Path:
        return self.folder / f"{record.nonce}.json"

    def records(self) -> list[Record]:
        """All records, oldest first. Raises UserError for one that cannot be read."""
        found = []
        for path in self.folder.glob("*.json"):
            try:
                record = Record(**files.parse_json(files.read_shared(path).decode("utf-8-sig")))
                for asked in record.all_asked():
                    asked.setdefault("key", asked.get("item"))  # records of earlier versions have none
                if record.nonce != path.stem or not record.is_sound():  # the nonce names the file that is written next
                    raise ValueError("not a batch record")
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path} is damaged ({in_one_line(error, 160)}); it names a batch that was paid for: mend it, or "
                    "delete it to have its requests asked again"
                ) from None
            found.append(record)
        return sorted(found, key=lambda record: record.time)

    def pending(self) -> list[Record]:
        """Batches whose results are not collected, oldest first. Raises UserError for a damaged record."""
        return [record for record in self.records() if record.state != COLLECTED]

    def save(self, record: Record) -> None:
        """Raises UserError if the file cannot be written."""
        files.write_json(self.path(record), asdict(record), indent=None)

    def refuse_pending(self) -> None:
        """Raise UserError if batches are pending: asking live would pay for the same items again."""
        if pending := self.pending():
            model = ", ".join(sorted({record.model for record in pending}))
            raise UserError(
                f"{len(pending)} batches with {sum(record.count for record in pending)} requests are pending "
                f"({self.folder}, asked of {model}); collect them with --batch, or remove that folder to give them up"
            )
