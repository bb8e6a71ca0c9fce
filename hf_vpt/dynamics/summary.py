"""Runs over a grid, a line each, and what follows from them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..report.tables import markdown_table, mean_and_spread
from ..training.checkpoints import write_whole
from .grid import Point, read_runs
from .spikes import find_spikes, largest_rise
from .width import width_in_decades


RUNS_FILE = "runs.jsonl"


def summarize(run: dict[str, Any]) -> dict[str, Any]:
    """Say in a few numbers, of four digits, what a run did; numbers of prompts are medians over blocks.

    Args:
        run: One of `read_runs`.

    Returns:
        The point and its test accuracy; `spikes` and `largest_rise` of the loss after warm-up (nats); `length` at the
        first and at the last step; `turn` in radians at the largest learning rate and half way from there to the end;
        `cosine`, the largest one of gradient and prompt.
    """
    steps, row = run.get("steps"), {name: value for name, value in run.items() if name != "steps"}
    if not steps or not steps["loss"] or not steps["directions"]:
        return _rounded(row)
    directions = steps["directions"].values()
    rates = next(iter(directions))["learning_rate"]
    warmup = rates.index(max(rates))
    half = (warmup + len(rates)) // 2

    def at(name: str, step: int) -> float:
        return statistics.median(d[name][min(step, len(d[name]) - 1)] for d in directions)

    row |= {
        "spikes": len(find_spikes(steps["loss"], warmup)),
        "largest_rise": largest_rise(steps["loss"], warmup),
        "length": [at("length", 0), at("length", len(steps["loss"]) - 1)],
        "turn": [at("turn", warmup), at("turn", half)],
        "cosine": max(max(direction["cosine"]) for direction in directions),
    }
    return _rounded(row)


def read_summaries(*paths: str | Path) -> list[dict[str, Any]]:
    """Read summaries from files that `write_summaries` has written, and of all runs in folders; each point once.

    Raises:
        FileNotFoundError: There is none at a path.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in map(Path, paths):
        if path.is_file():
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        else:
            found = [summarize(run) for run in read_runs(path)]
        if not found:
            raise FileNotFoundError(
                f"Found no finished run in '{path}'. A report needs runs of `scripts/learning_rates.py run`, or the "
                f"{RUNS_FILE} of an earlier report: correct the path."
            )
        rows |= {tuple(row[field.name] for field in fields(Point)): row for row in found}
    return sorted(rows.values(), key=lambda row: [row[field.name] for field in fields(Point)])


def read_steps(folder: str | Path) -> dict[str, Any]:
    """Read what `steps.json` of one run holds."""
    steps = [run["steps"] for run in read_runs(folder) if run["steps"]]
    if len(steps) != 1:
        raise ValueError(
            f"Found {len(steps) or 'no'} finished run with its steps in '{folder}'. A course is that of one run: name "
            "a folder with a run.json and a steps.json."
        )
    return steps[0]


def write_summaries(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Write a JSON line for each run."""
    write_whole(Path(path), "".join(f"{json.dumps(row)}\n" for row in rows))


def scores_by_rate(rows: Sequence[dict[str, Any]]) -> dict[float, float]:
    """Mean test accuracy over seeds of each learning rate or angle; 0 for a run that diverged."""
    scores: dict[float, list[float]] = {}
    for row in rows:
        scores.setdefault(row["rate"], []).append(row["test_accuracy"] or 0.0)
    return {rate: statistics.mean(values) for rate, values in sorted(scores.items())}


def groups_of(rows: Sequence[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows that agree in some values, by these, in order of appearance."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def choose_points(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[Point]:
    """The setting of each data set, method and treatment that is best on validation images, once with each seed.

    A setting that was trained with several seeds counts with their mean. Of equals it is the one that
    `read_summaries` names first: the smallest learning rate.

    Raises:
        ValueError: A run was not scored on validation images.
    """
    chosen = []
    for own in groups_of(rows, "data", "method", "treatment").values():
        if any(row.get("validation_accuracy") is None and not row["diverged"] for row in own):
            raise ValueError(
                f"Found a run of {own[0]['method']} on {own[0]['data']} without an accuracy on validation images. "
                "Settings are chosen by it: train with validation images, not on them."
            )
        settings = groups_of(own, "rate", "weight_decay").values()
        best = max(settings, key=lambda rows: statistics.mean(row["validation_accuracy"] or 0.0 for row in rows))
        point = Point(**{field.name: best[0][field.name] for field in fields(Point)})
        chosen += [replace(point, seed=seed) for seed in seeds]
    return chosen


def score_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each method and treatment, a column for each data set and one for their mean.

    Accuracies in per cent are means over seeds, with their standard deviation; the mean is over data sets, and `–`
    where one is missing.
    """
    data = list(groups_of(rows, "data"))
    lines = []
    for (method, treatment), together in groups_of(rows, "method", "treatment").items():
        by_data = groups_of(together, "data")
        scores = [[100 * (row["test_accuracy"] or 0.0) for row in by_data.get(name, [])] for name in data]
        means = [statistics.mean(own) for own in scores if own]
        mean = f"{statistics.mean(means):.1f}" if len(means) == len(data) else "–"
        cells = [mean_and_spread(own) if own else "–" for own in scores]
        lines.append([method, treatment, *cells, mean])
    return markdown_table(["method", "treatment", *(name for (name,) in data), "mean"], sorted(lines))


def best_published(rows: Sequence[dict[str, Any]]) -> float | None:
    """Best mean accuracy over seeds of all settings of the treatments that are published ones; None without any."""
    published = [row for row in rows if row["treatment"].startswith("published")]
    settings = groups_of(published, "treatment", "weight_decay").values()
    return max((max(scores_by_rate(own).values()) for own in settings), default=None)


def width_table(rows: Sequence[dict[str, Any]], tolerance: float = 0.01) -> str:
    """Markdown: for each method, data set and treatment the best accuracy, where it is, and how wide the region is.

    Widths are those of learning rates within `tolerance` of the treatment's own best accuracy, of the best one of the
    published treatments, and of the best one of all treatments of the method on that data.
    """
    titles = ["data", "method", "treatment", "weight decay", "seeds", "best accuracy, %", "at", "width, own best"]
    titles += ["width, published best", "width, best of all", "largest rise of the loss"]
    lines = []
    for (data, method), together in groups_of(rows, "data", "method").items():
        treatments = groups_of(together, "treatment", "weight_decay")
        published = best_published(together)
        best_of_all = max(max(scores_by_rate(own).values()) for own in treatments.values())
        for (treatment, decay), own in treatments.items():
            scores = scores_by_rate(own)
            rate = max(scores, key=scores.get)
            rises = [row["largest_rise"] for row in own if "largest_rise" in row]
            cells = [data, method, treatment, f"{decay:g}", str(len({row["seed"] for row in own}))]
            cells += [f"{100 * scores[rate]:.1f}", f"{rate:g}", f"{width_in_decades(scores, tolerance):.1f}"]
            cells += ["–" if published is None else f"{width_in_decades(scores, tolerance, published):.1f}"]
            cells += [f"{width_in_decades(scores, tolerance, best_of_all):.1f}"]
            cells += [f"{max(rises):.2f}" if rises else "–"]
            lines.append(cells)
    return markdown_table(titles, lines)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return {name: _rounded(item) for name, item in value.items()} if isinstance(value, dict) else value
