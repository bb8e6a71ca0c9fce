"""Runs that were tested, from the files that training and sweeps leave behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..training.experiment import METRICS_FILE, TIMINGS_FILE
from ..training.record import RESULTS_FILE


_OF_A_RUN = ("dataset_name", "method", "test_accuracy", "seed")
_OF_A_RUN += ("trained_parameters", "trained_parameters_without_head")
_OF_A_SWEEP = ("complete", "final", "trials", "num_trials")
# Folders of a sweep's own runs, beside its results.
_RUNS_OF_A_SWEEP = ("trials", "final")


@dataclass(frozen=True)
class Run:
    """One run that was tested.

    Args:
        source: File that tells of it.
        metrics: What `metrics.json` holds.
        timings: What `timings.json` holds; empty where it is not known.
        num_trials: How many settings were tried on validation images to choose its own; None for a run by itself.
        search_seconds: Seconds of these trials together; None where they are not all known.
    """

    source: str
    metrics: Mapping[str, Any]
    timings: Mapping[str, Any] = field(default_factory=dict)
    num_trials: int | None = None
    search_seconds: float | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of optimisation and of the method; empty where they are not known."""
        return self.metrics.get("settings") or {}

    @property
    def test_accuracy(self) -> float:
        """Of the weights that were chosen by: averaged ones where an average has chosen the epoch."""
        chosen_by = self.settings.get("metric_for_best_model") or ""
        name = "test_ema_accuracy" if chosen_by.removeprefix("eval_").startswith("ema_") else "test_accuracy"
        return self.metrics[name]


def read_runs(paths: Iterable[str | Path], exclude: Sequence[str] = ()) -> tuple[list[Run], list[str]]:
    """Read results of single runs (`metrics.json`) and of sweeps (`results.json`), which may have other names.

    The final runs of a sweep are read from its results; those in the sweep's folder are not read again.

    Args:
        paths: Files, or folders that are searched for files of these names.
        exclude: Patterns of paths that are passed over in folders, such as `"*/tries/*"`.

    Returns:
        The runs, and a line for each sweep that has not come to its end, which is left out.

    Raises:
        FileNotFoundError: A path does not exist, or there is no result in any of them.
        ValueError: A file holds something else.
    """
    files: dict[Path, Path] = {}  # by where they are, however the path was written
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(
                f"There is no '{path}'. A report needs result files, or folders that hold some: correct the path."
            )
        found = [file for name in (RESULTS_FILE, METRICS_FILE) for file in sorted(path.rglob(name))]
        found = [file for file in found if not any(fnmatch(str(file), pattern) for pattern in exclude)]
        for file in found if path.is_dir() else [path]:
            files.setdefault(file.resolve(), file)
    sweeps = {place.parent for place in files if place.name == RESULTS_FILE}
    runs, left_out = [], []
    for place, file in files.items():
        content = _read(file)
        if "final" in content:
            if content["complete"]:
                runs += _final_runs(file, content)
            else:
                done = f"{len(content['trials'])} of {content['num_trials']} trials"
                left_out.append(f"{file}: {done} and {len(content['final'])} final runs are done.")
        elif not any(place.is_relative_to(sweep / name) for sweep in sweeps for name in _RUNS_OF_A_SWEEP):
            timings = file.parent / TIMINGS_FILE
            has_timings = file.name == METRICS_FILE and timings.is_file()
            runs.append(Run(str(file), content, json.loads(timings.read_text("utf-8")) if has_timings else {}))
    if not runs and not left_out:
        raise FileNotFoundError(
            f"'{', '.join(map(str, paths))}' hold no {METRICS_FILE} and no {RESULTS_FILE}. A report needs at least "
            "one run that was tested: train one, or correct the path."
        )
    return runs, left_out


def _final_runs(file: Path, content: Mapping[str, Any]) -> list[Run]:
    # A trial that was killed and went on knows the seconds since then alone.
    seconds = [trial.get("seconds") if trial.get("attempts", 1) == 1 else None for trial in content["trials"]]
    tried = (content["num_trials"], None if None in seconds else sum(seconds))
    return [
        Run(f"{file}, seed {run['seed']}", run["metrics"], run.get("timings") or {}, *tried)
        for run in content["final"]
    ]


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    content = content if isinstance(content, dict) else {}
    is_sweep = "final" in content or file.name == RESULTS_FILE
    parts = [(content, _OF_A_SWEEP if is_sweep else _OF_A_RUN)]
    parts += [(run.get("metrics", {}), _OF_A_RUN) for run in content.get("final", ())]
    if missing := sorted({name for part, needed in parts for name in needed if name not in part}):
        raise ValueError(
            f"'{file}' has no {', '.join(missing)}. A report reads what scripts/train.py and scripts/sweep.py write: "
            "leave the file out, or run it again."
        )
    return content
