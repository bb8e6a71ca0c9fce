"""Cost against the number of prompts or images."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..benchmark import BAKED, COMPILED, CONCATENATED, FLOOR, Measurement
from .figure import draw_legend, new_figure


LABELS = {
    "num_virtual_tokens": "prompts in a block",
    "batch_size": "images in a batch",
    "num_adapters": "adapters in a batch",
}
LINES = {CONCATENATED: "--o", BAKED: ":o", COMPILED: "-.o"}


def plot_cost(
    results: Sequence[Measurement], over: Literal["num_virtual_tokens", "batch_size", "num_adapters"], path: str | Path
) -> None:
    """Draw seconds as a multiple of the floor's, one line for each variant, one panel for each mode.

    Args:
        results: What `run_benchmark` returned.
        over: What the horizontal axis shows. Where the other one varies too, the median over it is drawn.
        path: File to write, PNG, SVG or PDF by its ending.
    """
    names = [name for name in dict.fromkeys(r.variant for r in results) if name != FLOOR]
    methods = list(dict.fromkeys(map(_method, names)))
    modes = list(dict.fromkeys(r.mode for r in results))
    figure, axes = new_figure(len(modes))
    for axis, mode in zip(axes, modes, strict=True):
        for name in names:
            # The forms of a method share a colour.
            style = {"color": f"C{methods.index(_method(name))}", "label": name, "markersize": 3}
            points: dict[int, list[float]] = {}
            for row in results:
                if (row.variant, row.mode) == (name, mode):
                    points.setdefault(getattr(row, over), []).append(row.over_floor)
            if not points:
                continue
            heights = [statistics.median(values) for values in points.values()]
            line = next((line for ending, line in LINES.items() if name.endswith(ending)), "-o")
            axis.plot(list(points), heights, line, **style)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=mode, xlabel=LABELS[over], ylabel="seconds, × frozen backbone")
        axis.grid(alpha=0.3)
    # Baked models are in one panel alone.
    draw_legend(figure, axes)
    figure.savefig(path)


def _method(name: str) -> str:
    for ending in (COMPILED, *LINES):
        name = name.removesuffix(ending)
    return name
