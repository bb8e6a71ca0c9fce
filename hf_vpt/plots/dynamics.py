"""Accuracy against the learning rate, and the course of single runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..dynamics import smooth
from ..dynamics.summary import groups_of, scores_by_rate, widths_of
from .figure import draw_legend, new_figure


PANELS = {
    "loss": "loss, mean of 8 steps",
    "length": "length of prompts",
    "turn": "turn of prompts in a step, rad",
    "cosine": "|cosine| of gradient and prompt",
}


def plot_learning_rates(rows: Sequence[Mapping[str, Any]], path: str | Path, tolerance: float = 0.01) -> None:
    """Draw test accuracy against the learning rate, or the angle, one panel a data set and one line a treatment.

    Large marks are within the tolerance of the line's best; bars reach from the worst seed to the best.

    Args:
        rows: Summaries of runs of one method.
        path: File to write, PNG, SVG or PDF by its ending.
        tolerance: See `width_in_decades`.
    """

    def draw(axis: Any, own: list[Mapping[str, Any]], style: dict[str, Any]) -> None:
        scores = {rate: 100 * score for rate, score in scores_by_rate(own).items()}
        axis.plot(list(scores), list(scores.values()), marker=".", **style)
        good = [rate for rate in scores if scores[rate] >= max(scores.values()) - 100 * tolerance]
        axis.plot(good, [scores[rate] for rate in good], "o", color=style["color"])
        for (rate,), seeds in groups_of(own, "rate").items():
            values = [100 * (row["test_accuracy"] or 0.0) for row in seeds]
            axis.plot([rate, rate], [min(values), max(values)], color=style["color"], linewidth=0.8)

    _plot_against_rates(rows, draw, "test accuracy, %", path)


def plot_turns(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw by how much prompts turn in a step, half way from warm-up to the end, against the learning rate.

    Args:
        rows: Summaries of runs of one method, with their steps.
        path: File to write, PNG, SVG or PDF by its ending.
    """

    def draw(axis: Any, own: list[Mapping[str, Any]], style: dict[str, Any]) -> None:
        turns = {rate: [row["turn"][1] for row in rows] for (rate,), rows in sorted(groups_of(own, "rate").items())}
        axis.plot(list(turns), [statistics.mean(values) for values in turns.values()], marker=".", **style)
        axis.set_yscale("log")

    _plot_against_rates([row for row in rows if "turn" in row], draw, "turn in a step, half way, rad", path)


def plot_widths(rows: Sequence[Mapping[str, Any]], path: str | Path, tolerance: float = 0.01) -> None:
    """Draw `widths_of`: one panel a data set, bars by method and treatment.

    Bars are means over weight decays, and dots the single ones: filled by the own best accuracy, outlined by the best
    of the published treatments. Of fewer than four learning rates nothing is drawn.

    Args:
        rows: Summaries of runs.
        path: File to write, PNG, SVG or PDF by its ending.
        tolerance: See `width_in_decades`.
    """
    panels = groups_of([row for row in widths_of(rows, tolerance) if len(row["scores"]) >= 4], "data")
    figure, axes = new_figure(max(1, len(panels)), width=3.6)
    from matplotlib import colormaps

    colours = {t: colormaps["tab10"](i % 10) for i, (t,) in enumerate(sorted(groups_of(rows, "treatment")))}
    methods = [method for (method,) in groups_of(rows, "method")]
    for axis, ((data,), together) in zip(axes, panels.items()):
        for (method,), own in groups_of(together, "method").items():
            treatments = groups_of(own, "treatment")
            for index, ((treatment,), decays) in enumerate(treatments.items()):
                widths = [row["width_own"] for row in decays]
                by_published = [row["width_published"] for row in decays if row["width_published"] is not None]
                x = methods.index(method) + 0.8 * (index + 0.5) / len(treatments) - 0.4
                size = {"x": x, "width": 0.7 / len(treatments)}
                axis.bar(height=statistics.mean(widths), color=colours[treatment], alpha=0.6, label=treatment, **size)
                if by_published:
                    line = {"fill": False, "edgecolor": "black", "label": "by the best published accuracy"}
                    axis.bar(height=statistics.mean(by_published), **line, **size)
                axis.plot([x] * len(widths), widths, ".", color="black", markersize=3)
        axis.set(title=data, xlim=(-0.5, len(methods) - 0.5))
        axis.set_xticks(range(len(methods)), methods)
    highest = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, highest)
    points = "one point" if tolerance == 0.01 else f"{100 * tolerance:g} points"
    axes[0].set_ylabel(f"decades within {points} of the best")
    draw_legend(figure, axes)
    figure.savefig(path)


def _plot_against_rates(
    rows: Sequence[Mapping[str, Any]],
    draw: Callable[[Any, list[Mapping[str, Any]], dict[str, Any]], None],
    label: str,
    path: str | Path,
) -> None:
    panels = groups_of(rows, "data")
    figure, axes = new_figure(len(panels), width=4.2)
    from matplotlib import colormaps

    colours: dict[str, Any] = {}
    for axis, ((data,), together) in zip(axes, panels.items(), strict=True):
        for (treatment, decay), own in groups_of(together, "treatment", "weight_decay").items():
            name = f"{treatment}, decay {decay:g}" if decay else treatment
            line = "--" if treatment.endswith(("_angle", "_fall", "_norm", "recipe")) else "-"
            colour = colours.setdefault(name, colormaps["tab20"](len(colours) % 20))
            draw(axis, own, {"color": colour, "label": name, "linestyle": line})
        axis.set(title=data, xscale="log", xlabel="learning rate, or angle in radians")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(label)
    draw_legend(figure, axes)
    figure.savefig(path)


def plot_courses(courses: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draw loss, length, turn and cosine over the steps of some runs; of blocks the median.

    Args:
        courses: Contents of `steps.json`, by the name that they have in the picture.
        path: File to write, PNG, SVG or PDF by its ending.
    """
    figure, axes = new_figure(len(PANELS), width=3.6)
    for name, steps in courses.items():
        for axis, course in zip(axes, PANELS, strict=True):
            if course == "loss":
                values = smooth(steps["loss"])
            else:
                values = [statistics.median(v) for v in zip(*(d[course] for d in steps["directions"].values()))]
            # On a logarithmic axis there is no 0, as the turn of a first step with learning rate 0.
            points = [(step, value) for step, value in enumerate(values) if value > 0]
            axis.plot(*zip(*points), label=name, linewidth=1)
    for axis, title in zip(axes, PANELS.values(), strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if title != PANELS["loss"]:
            axis.set_yscale("log")
    draw_legend(figure, axes[:1])
    figure.savefig(path)
