"""Tables as text: markdown, LaTeX (booktabs), CSV. Pure; standard library only."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """A figure: the mean over `seeds` runs and its deviation, or one run's with a 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    seeds: int = 1

    def text(self, digits: int, plus_minus: str = "±") -> str:
        shown = f"{self.value:.{digits}f}"
        if self.deviation is not None:
            return f"{shown} {plus_minus} {self.deviation:.{digits}f}"
        if self.low is not None:
            return f"{shown} [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return shown


@dataclass
class Table:
    """`columns`: key -> heading; `digits`: key -> decimals (else 2); `rows`: (label, key -> Cell or text)."""

    title: str
    columns: Mapping[str, str]
    rows: list[tuple[str, Mapping[str, Cell | str]]] = field(default_factory=list)
    digits: Mapping[str, int] = field(default_factory=dict)

    def used(self) -> list[str]:
        """Columns that any row fills."""
        return [key for key in self.columns if any(cells.get(key) is not None for _, cells in self.rows)]

    def _text(self, key: str, cell: Cell | str | None, plus_minus: str = "±") -> str:
        return cell.text(self.digits.get(key, 2), plus_minus) if isinstance(cell, Cell) else cell or ""


def markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    parts = []
    for table in tables:
        keys = table.used()
        lines = [f"### {table.title}", "", _row(["", *(table.columns[key] for key in keys)])]
        lines.append(_row(["---"] * (1 + len(keys))))
        lines += [_row([label, *(table._text(key, cells.get(key)) for key in keys)]) for label, cells in table.rows]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *notes]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
          "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
          ">": r"\textgreater{}", "|": r"\textbar{}"}  # fmt: skip


def latex(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """One table environment each; needs \\usepackage{booktabs}."""
    parts = []
    for table in tables:
        keys = table.used()
        rows = [[label, *(table._text(key, cells.get(key), "\0") for key in keys)] for label, cells in table.rows]
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escaped(table.title)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * len(keys)}}}", r"\toprule"]
        lines.append(" & ".join(map(_escaped, ["", *(table.columns[key] for key in keys)])) + r" \\")
        lines.append(r"\midrule")
        lines += [" & ".join(map(_escaped, row)) + r" \\" for row in rows]
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join([*parts, *(f"% {note}" for note in notes)]) + "\n"


def _escaped(text: str) -> str:
    # behind the \\ of the row before it "[" or "*" would be that command's argument
    guard = "{}" if text.startswith(("[", "*")) else ""
    return guard + "".join(_LATEX.get(letter, letter) for letter in text).replace("\0", r"$\pm$")


def as_csv(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """One line a figure, in full precision: table, row, column, value, low, high, deviation, seeds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "row", "column", "value", "low", "high", "deviation", "seeds"])
    for table in tables:
        for label, cells in table.rows:
            for key in table.used():
                cell = cells.get(key)
                if isinstance(cell, Cell):
                    writer.writerow(
                        [table.title, label, key, cell.value, cell.low, cell.high, cell.deviation, cell.seeds]
                    )
                elif cell:
                    writer.writerow([table.title, label, key, cell, "", "", "", ""])
    return out.getvalue()


FORMATS = {"markdown": markdown, "latex": latex, "csv": as_csv}
