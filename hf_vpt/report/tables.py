"""The report as text: Markdown to read, CSV to go on with."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .benchmarks import BENCHMARKS, BenchmarkMean, benchmark_means
from .rows import Row, parts


CSV_COLUMNS = (
    *("dataset", "trained_on", "method", "backbone", "differs", "mean", "std", "num_seeds", "seeds"),
    *("tuned_parameters", "tuned_without_head", "train_seconds", "train_cpu_seconds", "peak_memory_bytes"),
    *("settings_tried", "search_seconds"),
)
_MEANS = ("mean_of_tasks", "mean_of_groups")
BENCHMARK_COLUMNS = ("benchmark", "method", "backbone", "source", *BENCHMARKS["vtab"], *_MEANS)
_HEADINGS = {"vtab": "VTAB-1k", "fgvc": "FGVC"}


def to_markdown(rows: Sequence[Row], left_out: Sequence[str] = ()) -> str:
    """Write a table for each data set and part of it, one of means for each benchmark, and what is missing.

    Args:
        rows: What `group_rows` returns.
        left_out: Results that are not in the tables, a line each.
    """
    sections = []
    by_heading: dict[str, list[Row]] = {}
    for row, part in zip(rows, parts(rows), strict=True):
        by_heading.setdefault(f"## {row.dataset}, {row.backbone}{part}", []).append(row)
    for heading, own in by_heading.items():
        sections += [heading, _dataset_table(own)]
    if len({row.num_trials is None for row in rows}) > 1:
        sections.append(
            "Seconds and memory of a sweep are those of one final run. It is not evaluated between epochs, as a run "
            "by itself is."
        )
    means = benchmark_means(rows)
    for benchmark in dict.fromkeys(mean.benchmark for mean in means):
        sections += _benchmark_parts(benchmark, [mean for mean in means if mean.benchmark == benchmark])
    if left_out:
        sections += ["## Left out", "\n".join(f"- {line}" for line in left_out)]
    return "\n\n".join(sections) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Write one line for each row, with numbers as they are; accuracies are in per cent."""
    lines = []
    for row in rows:
        timings = [row.timing(name) for name in ("train_seconds", "train_cpu_seconds", "peak_memory_bytes")]
        seeds = " ".join(map(str, row.seeds))
        values = [row.dataset, row.trained_on, row.title, row.backbone, row.differs]
        values += [row.mean, row.std, len(row.runs), seeds, row.tuned, row.tuned_without_head]
        lines.append([*values, *timings, row.num_trials, row.search_seconds])
    return _csv(CSV_COLUMNS, lines)


def benchmarks_to_csv(rows: Sequence[Row]) -> str:
    """Write one line for each mean over a benchmark, and for the published ones beside it; all are in per cent.

    The source is `measured`, or where scores are published. FGVC, which has no groups, has `mean_of_tasks` alone.
    """
    lines = []
    for mean in benchmark_means(rows):
        for source, scores in _lines_of(mean):
            own = scores if mean.benchmark == "vtab" else [None, None, None, *scores, None]
            lines.append([mean.benchmark, mean.title, mean.backbone, source or "measured", *own])
    return _csv(BENCHMARK_COLUMNS, lines)


def _csv(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return stream.getvalue()


def _dataset_table(rows: Sequence[Row]) -> str:
    # Processor time too: several runs at once share a machine, and its clock.
    columns = {
        "method": [row.name for row in rows],
        "test accuracy, %": [mean_and_spread(row.accuracies) for row in rows],
        "seeds": [str(len(row.runs)) for row in rows],
        "tuned parameters": [f"{row.tuned:,}" for row in rows],
        # Outside the head is the backbone in full fine-tuning.
        "of which outside the head": ["–" if row.method == "full" else f"{row.tuned_without_head:,}" for row in rows],
        "seconds": [_number(row.timing("train_seconds")) for row in rows],
        "CPU seconds": [_number(row.timing("train_cpu_seconds")) for row in rows],
        "peak memory, MB": [_number(row.timing("peak_memory_bytes"), 1e-6) for row in rows],
        "settings tried": [_number(row.num_trials) for row in rows],
        "seconds for these": [_number(row.search_seconds) for row in rows],
    }
    # A column that nobody knows anything for says nothing.
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
    return markdown_table(list(columns), list(zip(*columns.values())))


def _benchmark_parts(benchmark: str, means: Sequence[BenchmarkMean]) -> list[str]:
    groups = list(means[0].groups)
    num_tasks = {"vtab": "19 tasks", "fgvc": "5 sets"}[benchmark]
    head = ["method", "backbone", f"mean of {num_tasks}"]
    if benchmark == "vtab":
        head = ["method", "backbone", *groups, f"mean of {num_tasks}", "mean of 3 groups"]
    lines, notes = [], []
    for mean in means:
        for source, scores in _lines_of(mean):
            name = mean.title if source is None else f"published: {source}"
            lines.append([name, mean.backbone, *map(_score, scores)])
        if mean.missing:
            notes.append(f"- {mean.title}, {mean.backbone}: no result on {', '.join(mean.missing)}.")
        if mean.trouble:
            notes.append(f"- {mean.title}, {mean.backbone}: no mean, because of {mean.trouble}.")
    if benchmark == "vtab" and len(lines) > len(means):
        notes.append(
            "- Published scores are on VTAB-1k as their authors prepared it. On CIFAR-100 the archive is known to "
            "give about ten points less than the original images."
        )
    parts = [f"## {_HEADINGS[benchmark]}, test accuracy in %", markdown_table(head, lines)]
    return [*parts, "\n".join(notes)] if notes else parts


def _lines_of(mean: BenchmarkMean) -> list[tuple[str | None, list[float | None]]]:
    """Measured scores, whose source is None, and published ones that say something: groups, if any, and means."""
    if mean.benchmark == "fgvc":
        published = [(scores.source, [scores.fgvc]) for scores in mean.published]
        own = [mean.mean_of_tasks]
    else:
        published = [
            (scores.source, [*(scores.groups or [None] * 3), scores.mean_of_tasks, scores.mean_of_groups])
            for scores in mean.published
        ]
        own = [*mean.groups.values(), mean.mean_of_tasks, mean.mean_of_groups]
    told = [(source, scores) for source, scores in published if any(score is not None for score in scores)]
    return [(None, own), *told]


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown from its titles and the cells of each line."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" if row[0] != "---" else "|" + "|".join(row) + "|" for row in rows)


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean and, of several values, the standard deviation of a sample: `71.0 ± 1.4`."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _number(value: float | None, factor: float = 1.0) -> str:
    return "–" if value is None else f"{factor * value:,.0f}"
