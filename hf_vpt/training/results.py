"""From the metrics files of many runs to one table."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from .experiment import METRICS_FILE


HEADER = (
    "| run | test accuracy, % | validation accuracy, % | trained parameters without head | with | seconds | runs |",
    "|---|---|---|---|---|---|---|",
)


def read_results(folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Find the metrics of all runs under a folder, grouped into those that differ in their seed alone.

    Args:
        folder: Any folder above the output folders of the runs.

    Returns:
        For each group a list with the contents of each `metrics.json`. Runs whose folders are called `seed…` belong to
        the group that their parent folder names; other runs are groups of one.

    Raises:
        FileNotFoundError: There is no finished run under the folder.
    """
    folder = Path(folder)
    groups = defaultdict(list)
    for path in sorted(folder.rglob(METRICS_FILE)):
        run = path.parent.parent if path.parent.name.startswith("seed") else path.parent
        groups[run.relative_to(folder).as_posix()].append(json.loads(path.read_text(encoding="utf-8")))
    if not groups:
        raise FileNotFoundError(
            f"'{folder}' holds no {METRICS_FILE}. The folder of at least one finished run is needed: correct the "
            "path, or train first."
        )
    return dict(groups)


def format_table(groups: dict[str, list[dict[str, Any]]]) -> str:
    """Write runs as a Markdown table, best test accuracy first; scores are mean ± sample standard deviation.

    Args:
        groups: What `read_results` returns.
    """
    rows = []
    for name, runs in groups.items():
        first = runs[0]
        cells = (
            name,
            _spread([100 * run["test_accuracy"] for run in runs]),
            _spread([100 * run["validation_accuracy"] for run in runs]),
            f"{first['trained_parameters_without_head']:,}",
            f"{first['trained_parameters']:,}",
            f"{statistics.mean(run['train_seconds'] for run in runs):.0f}",
            str(len(runs)),
        )
        rows.append((statistics.mean(run["test_accuracy"] for run in runs), f"| {' | '.join(cells)} |"))
    rows.sort(key=lambda row: row[0], reverse=True)
    return "\n".join([*HEADER, *(row for _, row in rows)])


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
