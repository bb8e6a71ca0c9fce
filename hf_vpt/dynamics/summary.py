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

_POINT = tuple(field.name for field in fields(Point))


def summarize(run: dict[str, Any]) -> dict[str, Any]:
    """Say in a few numbers what a run did, measured ones with four digits; those of prompts are medians over blocks.

    Args:
        run: One of `read_runs`.

    Returns:
        The point and its test accuracy; `spikes` and `largest_rise` of the loss after warm-up (nats); `length` at the
        first and at the last step; `turn` in radians at the largest learning rate and half way from there to the end;
        `cosine`, the largest one of gradient and prompt.
    """
    steps = run.get("steps")
    point = {name: run[name] for name in _POINT}  # what was asked for stays as it is
    row = {name: value for name, value in run.items() if name != "steps" and name not in point}
    if not steps or not steps["loss"] or not steps["directions"]:
        return point | _rounded(row)
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
    return point | _rounded(row)


def read_summaries(*paths: str | Path) -> list[dict[str, Any]]:
    """Read summaries from files that `write_summaries` has written, and of all runs in folders; each point once.

    Raises:
        FileNotFoundError: There is none at a path.
        ValueError: A point was trained with other words at one path than at another.
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
        for row in found:
            point = tuple(row[name] for name in _POINT)
            if rows.get(point, row).get("words") != row.get("words"):
                raise ValueError(
                    f"Found the run {dict(zip(_POINT, point))} of '{path}' at another path too, trained with other "
                    "words. A report has each point once: make one for each of the folders."
                )
            rows[point] = row
    return [rows[point] for point in sorted(rows)]


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

    A setting counts with its mean over the seeds that all settings have. Of equals it is the one that `read_summaries`
    names first: the smallest weight decay, or learning rate.

    Raises:
        ValueError: A run was not scored on validation images, or there is no seed that all settings have.
    """
    chosen = []
    for own in groups_of(rows, "data", "method", "treatment").values():
        if any(row.get("validation_accuracy") is None and not row["diverged"] for row in own):
            raise ValueError(
                f"Found a run of {own[0]['method']} on {own[0]['data']} without an accuracy on validation images. "
                "Settings are chosen by it: train with validation images, not on them."
            )
        settings = groups_of(own, "rate", "weight_decay").values()
        common = set.intersection(*({row["seed"] for row in setting} for setting in settings))
        if not common:
            raise ValueError(
                f"Found no seed with which all settings of {own[0]['method']} on {own[0]['data']} were trained. Means "
                "over other seeds do not compare: finish the grid for one seed."
            )
        settings = groups_of([row for row in own if row["seed"] in common], "rate", "weight_decay").values()
        best = max(settings, key=lambda runs: statistics.mean(run["validation_accuracy"] or 0.0 for run in runs))[0]
        point = Point(**{name: best[name] for name in _POINT})
        chosen += [replace(point, seed=seed) for seed in seeds]
    return chosen


def score_table(rows: Sequence[dict[str, Any]]) -> str | None:
    """Markdown: a line for each method and treatment, a column for each data set and one for their mean.

    Accuracies in per cent are means over seeds, with their standard deviation; the mean is over data sets, and `–`
    where one is missing. None for a grid, over whose settings a mean says nothing.
    """
    places = groups_of(rows, "data", "method", "treatment")
    if len(groups_of(rows, "data", "method", "treatment", "rate", "weight_decay")) > len(places):
        return None
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


def widths_of(rows: Sequence[dict[str, Any]], tolerance: float = 0.01) -> list[dict[str, Any]]:
    """How wide the region of good learning rates is, for each method, data set, treatment and weight decay.

    Returns:
        For each of them `data`, `method`, `treatment`, `weight_decay`, its `scores` by learning rate, its own `rows`,
        and widths in decades of the learning rates within `tolerance` of a best accuracy: of its own
        (`width_own`), of all published treatments (`width_published`, None without any) and of all treatments
        (`width_all`), each of the same method on the same data. Accuracies are means over seeds.
    """
    widths = []
    for (data, method), together in groups_of(rows, "data", "method").items():
        groups = groups_of(together, "treatment", "weight_decay")
        scores = {key: scores_by_rate(own) for key, own in groups.items()}
        tops = {key: max(values.values()) for key, values in scores.items()}
        of_papers = [top for (treatment, _), top in tops.items() if treatment.startswith("published")]
        for key, own in groups.items():
            row = {"data": data, "method": method, "treatment": key[0], "weight_decay": key[1]}
            row |= {"scores": scores[key], "rows": own}
            bests = {"own": tops[key], "published": max(of_papers, default=None), "all": max(tops.values())}
            for name, best in bests.items():
                row[f"width_{name}"] = None if best is None else width_in_decades(scores[key], tolerance, best)
            widths.append(row)
    return widths


def width_table(rows: Sequence[dict[str, Any]], tolerance: float = 0.01) -> str:
    """Markdown: the best accuracy of each of `widths_of`, where it is, and how wide the region is."""
    titles = ["data", "method", "treatment", "weight decay", "seeds", "best accuracy, %", "at", "width, own best"]
    titles += ["width, published best", "width, best of all", "largest rise of the loss"]
    lines = []
    for width in widths_of(rows, tolerance):
        scores, own = width["scores"], width["rows"]
        rate = max(scores, key=scores.get)
        rises = [row["largest_rise"] for row in own if "largest_rise" in row]
        cells = [width["data"], width["method"], width["treatment"], f"{width['weight_decay']:g}"]
        cells += [str(len({row["seed"] for row in own})), f"{100 * scores[rate]:.1f}", f"{rate:g}"]
        found = [width[f"width_{name}"] for name in ("own", "published", "all")]
        cells += ["–" if value is None else f"{value:.1f}" for value in found]
        cells += [f"{max(rises):.2f}" if rises else "–"]
        lines.append(cells)
    return markdown_table(titles, lines)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return {name: _rounded(item) for name, item in value.items()} if isinstance(value, dict) else value
