"""Tables as text: markdown, LaTeX (booktabs), CSV. Standard library only."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field


@dataclass(frozen=True)
class Cell:
    """A figure: the mean over `seeds` runs with its deviation, or that of one run with a 95 % interval."""

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
        """Columns in which some row has a value."""
        return [key for key in self.columns if any(cells.get(key) is not None for _, cells in self.rows)]

    def texts(self, plus_minus: str = "±") -> list[list[str]]:
        """The headings, then the rows, each with its label first."""
        lines = [["", *(self.columns[key] for key in self.used())]]
        for label, cells in self.rows:
            values = [(key, cells.get(key)) for key in self.used()]
            lines.append([label, *(value.text(self.digits.get(key, 2), plus_minus) if isinstance(value, Cell)
                                   else value or "" for key, value in values)])  # fmt: skip
        return lines


def markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    parts = []
    for table in tables:
        heads, *rows = table.texts()
        lines = [f"### {table.title}", ""]
        for row in (heads, ["---"] * len(heads), *rows):
            cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *notes]) + "\n"


_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
          "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
          ">": r"\textgreater{}", "|": r"\textbar{}", "\0": r"$\pm$"}  # fmt: skip


def latex(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """One table environment each; needs \\usepackage{booktabs}."""

    def escaped(text: str) -> str:
        # after the \\ of the row before, "[" or "*" would be read as an argument of that command
        guard = "{}" if text.startswith(("[", "*")) else ""
        return guard + "".join(_LATEX.get(letter, letter) for letter in text)

    parts = []
    for table in tables:
        heads, *rows = [" & ".join(map(escaped, row)) + r" \\" for row in table.texts("\0")]
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(table.title)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * len(table.used())}}}", r"\toprule", heads, r"\midrule", *rows]
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join([*parts, *(f"% {note}" for note in notes)]) + "\n"


def as_csv(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """One line per figure, in full precision: table, row, column, value, low, high, deviation, seeds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "row", "column", "value", "low", "high", "deviation", "seeds"])
    for table in tables:
        for label, cells in table.rows:
            for key, cell in ((key, cells[key]) for key in table.used() if cells.get(key)):
                figures = astuple(cell) if isinstance(cell, Cell) else (cell, "", "", "", "")
                writer.writerow([table.title, label, key, *figures])
    return out.getvalue()


FORMATS = {"markdown": markdown, "latex": latex, "csv": as_csv}
