"""The records of batches that are out, one file each: what must outlive the client (ares/batches.py says when).

{questions_dir}/teacher/batches/{nonce}.json   intent -> submitted -> collected
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ares import files
from ares.cli import UserError, in_one_line


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


_KINDS = {
    "nonce": str, "hash": str, "count": int, "model": str, "time": (int, float), "most_usd": (int, float, type(None)),
    "asked": dict, "state": str, "batch": (str, type(None)), "not_ours": list,
}  # fmt: skip


class Store:
    """The records of a questions folder."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def pending(self) -> list[Record]:
        """Batches that are out, oldest first. Raises UserError for a record that cannot be read."""
        records = [record for record in self._all() if record.state != "collected"]
        return sorted(records, key=lambda record: record.time)

    def known_ids(self) -> set[str]:
        return {record.batch for record in self._all()} - {None}

    def _all(self) -> list[Record]:
        return [_read(path) for path in sorted(self.folder.glob("*.json"))]

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


def _read(path: Path) -> Record:
    try:
        record = Record(**files.parse_json(files.read_shared(path).decode("utf-8-sig")))
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(record, name), kinds):
                raise TypeError(f"{name} is {getattr(record, name)!r}")
        if record.nonce != path.stem:  # it names the file that is written next
            raise ValueError(f"nonce is {record.nonce!r}")
        for custom_id, asked in record.asked.items():
            kinds = {"item": str, "text": str, "attempt": int, "failures": int}
            if not isinstance(asked, dict) or not all(isinstance(asked.get(name), kinds[name]) for name in kinds):
                raise TypeError(f"asked of {custom_id} is {asked!r}")
            int(asked["item"].partition("/")[0])
    except (OSError, ValueError, TypeError) as error:
        why = in_one_line(error, 160)
        raise UserError(f"{path} is damaged ({why}); it names a batch that was paid for, mend it") from None
    return record
