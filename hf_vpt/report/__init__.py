"""Tables that say what was measured: means over seeds and benchmarks, cost, published scores beside them."""

from .benchmarks import BenchmarkMean, benchmark_means
from .published import PUBLISHED, PublishedScores
from .results import Run, read_runs
from .rows import Row, group_rows, parts
from .tables import BENCHMARK_COLUMNS, CSV_COLUMNS, benchmarks_to_csv, to_csv, to_markdown


__all__ = [
    "BENCHMARK_COLUMNS",
    "CSV_COLUMNS",
    "PUBLISHED",
    "BenchmarkMean",
    "PublishedScores",
    "Row",
    "Run",
    "benchmark_means",
    "benchmarks_to_csv",
    "group_rows",
    "parts",
    "read_runs",
    "to_csv",
    "to_markdown",
]
