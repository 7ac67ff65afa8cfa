"""Where training's numbers go: `metrics.jsonl` always, TensorBoard or W&B besides."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ares import cli


class Metrics:
    """`metrics.jsonl` always, TensorBoard or W&B besides. Lines hold "kind" (rollout, update, epoch), round and place.

    Lines that come after the place a killed run goes on from are dropped, so that none is there twice.
    """

    def __init__(self, run: Path, report_to: str, config: dict[str, Any]):
        self.path = Path(run) / "metrics.jsonl"
        self.active = cli.rank() == 0
        self.writer = self.wandb = None
        if self.active and report_to == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                cli.print0("note: tensorboard is not installed; metrics.jsonl holds the same numbers")
            else:
                self.writer = SummaryWriter(str(Path(run) / "tensorboard"))
        elif self.active and report_to == "wandb":
            import wandb

            self.wandb = wandb.init(project="ares", name=Path(run).name, dir=str(run), config=config, resume="allow")

    def rewind(self, number: int, updates_done: int | None) -> None:
        """Forget lines of round `number` beyond `updates_done` updates (None: all of them), and a torn last line."""
        if not self.active or not self.path.exists():
            return

        def keep(line: str) -> bool:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                return False
            if entry["round"] != number:
                return entry["round"] < number
            return updates_done is not None and entry.get("update", 0) <= updates_done

        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        cli.write_text(self.path, "".join(line for line in lines if keep(line)))

    def log(self, kind: str, number: int, update: int, values: dict[str, float], **place: int) -> None:
        """Append one line; `update` counts a round's finished updates."""
        if not self.active:
            return
        # NaN is not JSON: a mean over nothing is null
        finite = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        line = json.dumps({"kind": kind, "round": number, "update": update, **place, **finite})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        scalars = {f"{kind}/{key}": value for key, value in finite.items() if value is not None}
        if self.writer is not None:
            for key, value in scalars.items():
                self.writer.add_scalar(f"round_{number}/{key}", value, update)
            self.writer.flush()
        if self.wandb is not None:
            self.wandb.log({**scalars, "round": number, "update": update})

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()
