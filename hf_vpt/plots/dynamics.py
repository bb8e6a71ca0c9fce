"""Accuracy against the learning rate, and the course of single runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..dynamics import smooth
from ..dynamics.summary import groups_of, scores_by_rate
from .figure import new_figure


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
    panels = groups_of(rows, "data")
    figure, axes = new_figure(len(panels), width=4.2)
    colours: dict[str, str] = {}
    for axis, ((data,), together) in zip(axes, panels.items(), strict=True):
        for (treatment, decay), own in groups_of(together, "treatment", "weight_decay").items():
            label = f"{treatment}, decay {decay:g}" if decay else treatment
            colour = colours.setdefault(label, f"C{len(colours)}")
            scores = {rate: 100 * score for rate, score in scores_by_rate(own).items()}
            style = "--" if treatment.endswith(("_angle", "_fall", "_norm")) else "-"
            axis.plot(list(scores), list(scores.values()), style, color=colour, marker=".", label=label)
            good = [rate for rate in scores if scores[rate] >= max(scores.values()) - 100 * tolerance]
            axis.plot(good, [scores[rate] for rate in good], "o", color=colour)
            for (rate,), seeds in groups_of(own, "rate").items():
                values = [100 * (row["test_accuracy"] or 0.0) for row in seeds]
                axis.plot([rate, rate], [min(values), max(values)], color=colour, linewidth=0.8)
        axis.set(title=data, xscale="log", xlabel="learning rate, or angle in radians")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=7)
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
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(path)
