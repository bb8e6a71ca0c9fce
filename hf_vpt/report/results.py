"""Runs that were tested, from the files that training and sweeps leave behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training.experiment import METRICS_FILE, TIMINGS_FILE
from ..training.record import RESULTS_FILE


@dataclass(frozen=True)
class Run:
    """One run that was tested.

    Args:
        source: File that tells of it.
        metrics: What `metrics.json` holds.
        timings: What `timings.json` holds; empty where it is not known.
        num_trials: How many settings were tried on validation images to choose its own; None for a run by itself.
    """

    source: str
    metrics: Mapping[str, Any]
    timings: Mapping[str, Any] = field(default_factory=dict)
    num_trials: int | None = None

    @property
    def test_accuracy(self) -> float:
        """Of the weights that were chosen by: averaged ones where an average has chosen the epoch."""
        chosen_by = (self.metrics.get("settings") or {}).get("metric_for_best_model") or ""
        name = "test_ema_accuracy" if chosen_by.removeprefix("eval_").startswith("ema_") else "test_accuracy"
        return self.metrics[name]


def read_runs(paths: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """Read `metrics.json` of single runs and `results.json` of sweeps.

    The final runs of a sweep are read from its `results.json`; what lies below the sweep's folder is not read again.

    Args:
        paths: Files, or folders that are searched.

    Returns:
        The runs, and a line for each sweep that has not come to its end, which is left out.

    Raises:
        FileNotFoundError: A path does not exist, or there is no result in any of them.
        ValueError: A file holds something else.
    """
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(
                f"There is no '{path}'. A report needs result files, or folders that hold some: correct the path."
            )
        found = [file for name in (RESULTS_FILE, METRICS_FILE) for file in sorted(path.rglob(name))]
        files.update(dict.fromkeys(found if path.is_dir() else [path]))
    sweeps = {file.parent for file in files if file.name == RESULTS_FILE}
    runs, left_out = [], []
    for file in files:
        content = _read(file)
        if file.name == RESULTS_FILE:
            if content["complete"]:
                runs += [
                    Run(f"{file}, seed {run['seed']}", run["metrics"], run.get("timings") or {}, content["num_trials"])
                    for run in content["final"]
                ]
            else:
                done = f"{len(content['trials'])} of {content['num_trials']} trials"
                left_out.append(f"{file}: {done} and {len(content['final'])} final runs are done.")
        elif not sweeps & set(file.parents):
            timings = file.parent / TIMINGS_FILE
            runs.append(Run(str(file), content, _read(timings) if timings.is_file() else {}))
    if not runs and not left_out:
        raise FileNotFoundError(
            f"'{', '.join(map(str, paths))}' hold no {METRICS_FILE} and no {RESULTS_FILE}. A report needs at least "
            "one run that was tested: train one, or correct the path."
        )
    return runs, left_out


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    needed = {METRICS_FILE: ("dataset_name", "method", "test_accuracy", "seed"), RESULTS_FILE: ("complete", "final")}
    if missing := [name for name in needed.get(file.name, ()) if name not in content]:
        raise ValueError(
            f"'{file}' has no {', '.join(missing)}. A report reads what scripts/train.py and scripts/sweep.py write: "
            "leave the file out, or run it again."
        )
    return content
