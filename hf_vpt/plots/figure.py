"""What all pictures share."""

from __future__ import annotations

from typing import Any


def new_figure(num_panels: int = 1, width: float = 5.0, height: float = 3.6) -> tuple[Any, list[Any]]:
    """A figure with panels side by side, made without a display and without matplotlib's global state.

    Args:
        num_panels: Number of panels.
        width: Width of each, in inches.
        height: Height, in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Found no matplotlib. Pictures need it: install it with `pip install matplotlib`, or leave pictures out."
        ) from error
    figure = Figure(figsize=(width * num_panels, height), dpi=150, layout="constrained")
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def draw_legend(figure: Any, axes: list[Any]) -> None:
    """Draw one legend beside all panels; what has the same name in several of them is there once."""
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=7)
