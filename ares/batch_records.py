"""The records of batches that are out, one file each: what must outlive the client (ares/batches.py says when).

{questions_dir}/teacher/batches/{nonce}.json   intent -> submitted -> collected
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ares import files
from ares.cli import UserError


@dataclass
class Record:
    """One batch on disk. `asked`: custom_id -> item, hash of its text, unusable replies and failures before."""

    nonce: str
    hash: str
    count: int
    model: str
    time: float
    most_usd: float | None
    asked: dict[str, dict[str, Any]]
    state: str = "intent"
    batch: str | None = None
    not_ours: list[str] = field(default_factory=list)


class Store:
    """The records of a questions folder."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def pending(self) -> list[Record]:
        """Batches that are out, oldest first. Raises UserError for a record that cannot be read."""
        records = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                record = Record(**json.loads(path.read_bytes()))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{path} is damaged ({error}); it names a batch that was paid for, mend it") from None
            if record.state != "collected":
                records.append(record)
        return sorted(records, key=lambda record: record.time)

    def known_ids(self) -> set[str]:
        return {json.loads(path.read_bytes()).get("batch") for path in self.folder.glob("*.json")} - {None}

    def save(self, record: Record) -> None:
        files.write_json(self.folder / f"{record.nonce}.json", asdict(record), indent=None)

    def drop(self, record: Record) -> None:
        (self.folder / f"{record.nonce}.json").unlink(missing_ok=True)

    def refuse_pending(self) -> None:
        """Raise UserError if batches are out: asking live would pay for the same items again."""
        pending = self.pending()
        if pending:
            raise UserError(
                f"{len(pending)} batches with {sum(record.count for record in pending)} requests are out "
                f"({self.folder}); collect them with --batch, or remove that folder to give them up"
            )
