"""The report's figures, by matplotlib: as SVG with the page's colours, and as PNG for papers.

Figures are drawn in the colours of the light page; in the SVG each colour becomes a CSS variable, so that one figure
fits both themes. Series differ in line style as well as in colour.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ares import files

INK, FAINT = "#1f2430", "#c9ced6"
SERIES = ("#1f5fa8", "#b45309")  # blue, orange: Okabe and Ito's pair, darkened for text contrast
# sentence scores 0, 0.1 .. 1: orange - grey - blue, distinct for any colour vision
SCALE = (
    "#e08214", "#e99b45", "#f1b370", "#f6ca9b", "#f8e0c6", "#eceef1",
    "#d9e6f3", "#bdd5ec", "#9fc3e4", "#80b0db", "#629fd5",
)  # fmt: skip
VARIABLES = {INK: "currentColor", FAINT: "var(--line)"}
VARIABLES |= {color: f"var(--series{i})" for i, color in enumerate(SERIES)}
VARIABLES |= {color: f"var(--s{i})" for i, color in enumerate(SCALE)}

# file name, title, (metric, label) of each line
CURVES = (
    ("reward", "Reward per rationale", (("reward", "reward"), ("sentence_reward", "without KL penalty"))),
    ("kl", "KL, nats per token", (("approx_kl", "to the sampling policy"), ("kl_ref", "to the reference"))),
    ("entropy", "Entropy, nats per token", (("entropy", "entropy"),)),
    ("clip_fraction", "Clip fraction", (("clipfrac", "share of positions"),)),
    ("value_fit", "Value fit: explained variance", (("explained_variance", "explained variance"),)),
    ("value_loss", "Value loss", (("value_loss", "mean squared error"),)),
)


def curves(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points of every curve: {"name", "title", "rounds", "lines": [{"label", "x", "y", "epoch_x", "epoch_y"}]}.

    x counts updates over all rounds; `epoch_*` are the means of the epochs, at their last update; `rounds`: the first
    update of the second round and of later ones.
    """
    placed = list(_placed(metrics))
    first = {line["round"]: x for x, line in reversed(placed)}
    rounds = sorted(first.values())[1:]
    found = []
    for name, title, parts in CURVES:
        lines = []
        for metric, label in parts:
            line: dict[str, Any] = {"label": label}
            for kind, prefix in (("update", ""), ("epoch", "epoch_")):
                points = [(x, each[metric]) for x, each in placed
                          if each["kind"] == kind and each.get(metric) is not None]  # fmt: skip
                line |= {f"{prefix}x": [x for x, _ in points], f"{prefix}y": [y for _, y in points]}
            if line["x"] or line["epoch_x"]:
                lines.append(line)
        if len(lines) == 2 and name == "reward" and lines[0]["y"] == lines[1]["y"]:
            lines.pop()  # no KL penalty in a first round
        if lines:
            found.append({"name": name, "title": title, "lines": lines, "rounds": rounds})
    return found


def _placed(metrics: Sequence[Mapping[str, Any]]) -> Any:
    """(update number over all rounds, line) of each update and epoch."""
    before, last, current = 0, 0, None
    for line in metrics:
        if line["round"] != current:
            before, last, current = before + last, 0, line["round"]
        last = max(last, line.get("update", 0))
        if line["kind"] in ("update", "epoch"):
            yield before + line["update"], line


def draw_curve(curve: Mapping[str, Any]):
    """One small figure: the updates, faint, and over them the means of the epochs."""
    figure = _figure(3.9, 2.3)
    (axes,) = figure.axes
    for i, line in enumerate(curve["lines"]):
        style = {"color": SERIES[i], "linestyle": ("-", "--")[i]}
        has_epochs = len(line["epoch_x"]) > 1
        if line["x"]:
            label = None if has_epochs else line["label"]
            axes.plot(*_thinned(line["x"], line["y"]), **style, alpha=0.35 if has_epochs else 1, lw=1, label=label)
        if has_epochs:
            axes.plot(line["epoch_x"], line["epoch_y"], **style, lw=1.8, marker=("o", "s")[i], ms=3.5,
                      label=line["label"])  # fmt: skip
    for begin in curve["rounds"]:
        axes.axvline(begin - 0.5, color=FAINT, lw=0.8, linestyle=":")
    axes.set_title(curve["title"], loc="left", fontsize=9, color=INK, parse_math=False)
    axes.set_xlabel(curve.get("xlabel", "update"), fontsize=8, color=INK)
    if "xlabel" in curve:
        axes.set_xticks(curve["lines"][0]["epoch_x"])
    axes.margins(x=0.01)
    if len(curve["lines"]) > 1:
        axes.legend(fontsize=7, frameon=False, labelcolor=INK)
    return figure


def _thinned(x: Sequence[float], y: Sequence[float], most: int = 500) -> tuple[list[float], list[float]]:
    """At most `most` points, each the mean of its neighbours: a figure of 300 pixels needs no more."""
    step = -(-len(x) // most)
    parts = range(0, len(x), step)
    return [fmean(x[i : i + step]) for i in parts], [fmean(y[i : i + step]) for i in parts]


def draw_scores(series: Sequence[Mapping[str, Any]]):
    """Sentence scores by position: a panel per series, a stacked bar per position with the share of each score."""
    columns = min(2, len(series))
    rows = -(-len(series) // columns)
    figure = _figure(4.6 * columns, 0.25 + 2.0 * rows, rows, columns)
    for panel in figure.axes[len(series) :]:
        panel.set_visible(False)
    for panel, data in zip(figure.axes, series, strict=False):
        positions = [i for i, counts in enumerate(data["counts"]) if sum(counts)]
        for place in positions:
            counts, left = data["counts"][place], 0.0
            total = sum(counts)
            for step, count in enumerate(counts):
                if count:
                    panel.barh(place, count / total, left=left, height=0.78, color=SCALE[step], lw=0)
                    left += count / total
            panel.text(1.015, place, f"{data['means'][place]:.2f}", va="center", fontsize=8, color=INK)
            panel.text(1.12, place, f"{total:,}", va="center", fontsize=7, color=INK, alpha=0.75)
        panel.text(1.015, -0.78, "mean", fontsize=7, color=INK, va="center")
        panel.text(1.12, -0.78, "n", fontsize=7, color=INK, va="center")
        last = len(data["counts"]) - 1
        names = [f"{place + 1}+" if place == last else str(place + 1) for place in positions]
        panel.set_yticks(positions, names)
        panel.set_ylim(max(positions) + 0.6, -0.6)
        panel.set_xlim(0, 1)
        panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        panel.set_title(data["name"], loc="left", fontsize=9, color=INK, parse_math=False, pad=12)
        panel.set_ylabel("sentence", fontsize=8, color=INK)
    return figure


def _figure(width: float, height: float, rows: int = 1, columns: int = 1):
    import matplotlib

    matplotlib.use("svg")  # no display is needed
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    figure.subplots(rows, columns)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(labelsize=8, colors=INK, color=FAINT, length=3)
    return figure


# -- as SVG and PNG --------------------------------------------------------------------------------------


def as_svg(figure, name: str, label: str) -> str:
    """The figure as an `<svg>` for the page: its colours are CSS variables, its ids begin with `name`."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        FigureCanvasSVG(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r' id="', f' id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole page
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def write_png(figure, path: Path) -> None:
    """The figure on white, 200 dots per inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with files.atomic_path(path) as temporary:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, format="png", dpi=200, facecolor="white")


def curve_label(curve: Mapping[str, Any]) -> str:
    """What a curve shows, for screen readers: first and last epoch of each line."""
    ends = [(line["label"], line["epoch_y"] or line["y"]) for line in curve["lines"]]
    parts = [f"{label} from {y[0]:.4g} to {y[-1]:.4g}" for label, y in ends]
    return f"{curve['title']}: {'; '.join(parts)}"
