"""Means over the tasks of a benchmark, and which tasks are missing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.sources import FGVC, VTAB
from ..training.comparison import TRAINED_ON_FIELDS
from .published import BACKBONE, PREPROCESSING, PUBLISHED, VARIANTS, PublishedScores
from .rows import Row


_SPECIALIZED = ("camelyon", "eurosat", "resisc45", "retinopathy")
_NATURAL = ("caltech101", "cifar100", "dtd", "flowers102", "pet", "sun397", "svhn")
VTAB_GROUPS = {
    "Natural": _NATURAL,
    "Specialized": _SPECIALIZED,
    "Structured": tuple(task for task in VTAB if task not in (*_NATURAL, *_SPECIALIZED)),
}
BENCHMARKS = {"vtab": VTAB_GROUPS, "fgvc": {"FGVC": tuple(FGVC)}}

# Of the backbone, as published; others round what prompts work upon.
_FORMATS = {"quantization": "none", "dtype": "float32"}


@dataclass(frozen=True)
class BenchmarkMean:
    """Means of one method and backbone over a benchmark.

    Args:
        benchmark: `"vtab"` or `"fgvc"`.
        title: The method.
        backbone: What was adapted.
        groups: Mean of each group of tasks that is complete, None for the others.
        missing: Tasks without a result.
        trouble: Why there is no mean although results are there; empty if there is no reason.
        published: Published scores of the same method in the same setting.
    """

    benchmark: str
    title: str
    backbone: str
    groups: dict[str, float | None]
    mean_of_tasks: float | None
    missing: tuple[str, ...]
    trouble: str
    published: tuple[PublishedScores, ...]

    @property
    def mean_of_groups(self) -> float | None:
        values = list(self.groups.values())
        return None if None in values else statistics.mean(values)


def benchmark_means(rows: Sequence[Row]) -> list[BenchmarkMean]:
    """Average over VTAB-1k and FGVC, for each method and backbone that has results on one of their tasks.

    Two means over VTAB-1k are in use, over the 19 tasks and over the three group means. Both need all tasks.
    """
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        benchmark, slash, task = row.dataset.partition("/")
        if slash and any(task in tasks for tasks in BENCHMARKS.get(benchmark, {}).values()):
            found.setdefault((benchmark, row.title, row.backbone), []).append(row)
    return [_mean(*name, own) for name, own in found.items()]


def _mean(benchmark: str, title: str, backbone: str, rows: Sequence[Row]) -> BenchmarkMean:
    groups = BENCHMARKS[benchmark]
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row.dataset.partition("/")[2], []).append(row)
    missing = tuple(task for tasks in groups.values() for task in tasks if task not in by_task)
    trouble = _trouble(by_task)
    scores = {} if trouble else {task: own[0].mean for task, own in by_task.items()}

    def mean(tasks: Sequence[str]) -> float | None:
        values = [scores.get(task) for task in tasks]
        return None if None in values else statistics.mean(values)

    every = [task for tasks in groups.values() for task in tasks]
    is_published = not trouble and backbone == BACKBONE and all(_is_as_published(row, benchmark) for row in rows)
    published = tuple(scores for scores in PUBLISHED if scores.title == title) if is_published else ()
    means = {name: mean(tasks) for name, tasks in groups.items()}
    return BenchmarkMean(benchmark, title, backbone, means, mean(every), missing, trouble, published)


def _trouble(by_task: dict[str, list[Row]]) -> str:
    if several := [task for task, rows in by_task.items() if len(rows) > 1]:
        return f"several settings on {', '.join(several)}, of which only one can be averaged"
    runs = [row.runs[0] for rows in by_task.values() for row in rows]
    for name in ("dataset_variant", "preprocessing", *TRAINED_ON_FIELDS, *_FORMATS):
        values = {str(run.metrics.get(name, run.settings.get(name, _FORMATS.get(name)))) for run in runs}
        if len(values) > 1:
            return f"{name} is {' and '.join(sorted(values))} on different tasks"
    return ""


def _is_as_published(row: Row, benchmark: str) -> bool:
    run = row.runs[0]
    metrics = run.metrics
    is_same = metrics.get("dataset_variant") == VARIANTS[benchmark] and metrics.get("preprocessing") == PREPROCESSING
    is_same &= all(run.settings.get(name, value) == value for name, value in _FORMATS.items())
    is_same &= run.settings.get("layers_to_transform") is None  # prompts in every block
    # Neither few-shot nor without the images that could not be read.
    is_same &= metrics.get("images_per_class") is None and not any((metrics.get("num_broken_images") or {}).values())
    if benchmark == "vtab":
        # Final runs on VTAB-1k learn from all 1,000 images.
        is_same &= metrics.get("train_on_validation") is True
        is_same &= (metrics.get("num_images") or {}).get("train", 1000) == 1000
    return is_same
