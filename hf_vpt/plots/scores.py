"""Test accuracies of methods on data sets, with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..report import Row, parts
from .figure import draw_legend, new_figure


def plot_scores(rows: Sequence[Row], path: str | Path) -> None:
    """Draw mean test accuracies, one group a data set and one mark a method, with bars of one standard deviation.

    A single run has a mark without a bar. Several backbones are told apart in the names of methods.

    Args:
        rows: What `group_rows` returns.
        path: File to write, PNG, SVG or PDF by its ending.
    """
    of_rows = [f"{row.dataset}{part}" for row, part in zip(rows, parts(rows), strict=True)]
    datasets = list(dict.fromkeys(of_rows))
    several = len({row.backbone for row in rows}) > 1
    names = [f"{row.name}, {row.backbone}" if several else row.name for row in rows]
    series = list(dict.fromkeys(names))
    figure, (axis,) = new_figure(width=max(5.0, 2.5 + 0.8 * len(datasets)))
    for number, name in enumerate(series):
        own = [(row, of) for row, of, row_name in zip(rows, of_rows, names) if row_name == name]
        # Side by side within a data set, so that bars do not cover each other.
        offset = 0.7 * ((number + 0.5) / len(series) - 0.5)
        places = [datasets.index(of) + offset for _, of in own]
        spread = [row.std or 0.0 for row, _ in own]
        axis.errorbar(places, [row.mean for row, _ in own], yerr=spread, fmt="o", markersize=3, capsize=2, label=name)
    # Long names of many data sets would run into each other.
    tilt = {"rotation": 30, "ha": "right"} if len(datasets) > 2 else {}
    axis.set_xticks(
        range(len(datasets)), [name.replace(", trained on ", "\ntrained on\n") for name in datasets], **tilt
    )
    axis.set(ylabel="test accuracy, %", xlim=(-0.5, len(datasets) - 0.5))
    axis.grid(axis="y", alpha=0.3)
    draw_legend(figure, [axis])
    figure.savefig(path)
