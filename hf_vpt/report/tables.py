"""The report as text: Markdown to read, CSV to go on with."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from .benchmarks import BenchmarkMean, benchmark_means
from .rows import Row


CSV_COLUMNS = (
    *("dataset", "method", "backbone", "differs", "mean", "std", "num_seeds", "seeds", "tuned_parameters"),
    *("tuned_without_head", "train_seconds", "train_cpu_seconds", "peak_memory_bytes", "settings_tried"),
)
_HEADINGS = {"vtab": "VTAB-1k", "fgvc": "FGVC"}


def to_markdown(rows: Sequence[Row], left_out: Sequence[str] = ()) -> str:
    """Write a table for each data set, one of means for each benchmark, and what is missing.

    Args:
        rows: What `group_rows` returns.
        left_out: Results that are not in the tables, a line each.
    """
    parts = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        own = [row for row in rows if row.dataset == dataset]
        for backbone in dict.fromkeys(row.backbone for row in own):
            parts += [f"## {dataset}, {backbone}", _dataset_table([row for row in own if row.backbone == backbone])]
    means = benchmark_means(rows)
    for benchmark in dict.fromkeys(mean.benchmark for mean in means):
        parts += _benchmark_parts(benchmark, [mean for mean in means if mean.benchmark == benchmark])
    if left_out:
        parts += ["## Left out", "\n".join(f"- {line}" for line in left_out)]
    return "\n\n".join(parts) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Write one line for each row, with numbers as they are; accuracies are in per cent."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        timings = [row.timing(name) for name in ("train_seconds", "train_cpu_seconds", "peak_memory_bytes")]
        seeds = " ".join(map(str, row.seeds))
        values = [row.dataset, row.title, row.backbone, row.differs, row.mean, row.std, len(row.runs), seeds]
        writer.writerow([*values, row.tuned, row.tuned_without_head, *timings, row.num_trials])
    return stream.getvalue()


def _dataset_table(rows: Sequence[Row]) -> str:
    # Processor time too: several runs at once share a machine, and its clock.
    columns = {
        "method": [row.name for row in rows],
        "test accuracy, %": [_spread(row.mean, row.std) for row in rows],
        "seeds": [str(len(row.runs)) for row in rows],
        "tuned parameters": [f"{row.tuned:,}" for row in rows],
        # Outside the head is the backbone in full fine-tuning.
        "of which outside the head": ["–" if row.method == "full" else f"{row.tuned_without_head:,}" for row in rows],
        "seconds": [_number(row.timing("train_seconds")) for row in rows],
        "CPU seconds": [_number(row.timing("train_cpu_seconds")) for row in rows],
        "peak memory, MB": [_number(row.timing("peak_memory_bytes"), 1e-6) for row in rows],
        "settings tried": [_number(row.num_trials) for row in rows],
    }
    # A column that nobody knows anything for says nothing.
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
    return _table(list(columns), list(zip(*columns.values())))


def _benchmark_parts(benchmark: str, means: Sequence[BenchmarkMean]) -> list[str]:
    groups = list(means[0].groups)
    several = len(groups) > 1
    num_tasks = {"vtab": "19 tasks", "fgvc": "5 sets"}[benchmark]
    head = ["method", "backbone", *(groups if several else ()), f"mean of {num_tasks}"]
    head += ["mean of 3 groups"] if several else []
    lines = []
    for mean in means:
        own = [*(mean.groups.values() if several else ()), mean.mean_of_tasks]
        lines.append([mean.title, mean.backbone, *map(_score, own + ([mean.mean_of_groups] if several else []))])
        for published in mean.published:
            scores = [*(published.groups or [None] * 3), published.mean_of_tasks, published.mean_of_groups]
            scores = scores if benchmark == "vtab" else [published.fgvc]
            if any(score is not None for score in scores):
                lines.append([f"published: {published.source}", mean.backbone, *map(_score, scores)])
    notes = []
    for mean in means:
        if mean.missing:
            notes.append(f"- {mean.title}, {mean.backbone}: no result on {', '.join(mean.missing)}.")
        if mean.trouble:
            notes.append(f"- {mean.title}, {mean.backbone}: no mean, because of {mean.trouble}.")
    parts = [f"## {_HEADINGS[benchmark]}, test accuracy in %", _table(head, lines)]
    return [*parts, "\n".join(notes)] if notes else parts


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" if row[0] != "---" else "|" + "|".join(row) + "|" for row in rows)


def _spread(mean: float, std: float | None) -> str:
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _number(value: float | None, factor: float = 1.0) -> str:
    return "–" if value is None else f"{factor * value:,.0f}"
