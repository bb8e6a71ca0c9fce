"""What a sweep tells: a line after each run, a file of everything at the end, and whose folder it is."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..training.checkpoints import write_whole
from ..training.identity import tell_apart
from ..training.record import RESULTS_FILE
from .claims import Entry
from .ledger import Ledger
from .plan import SweepPlan


SWEEP_FILE = "sweep.json"  # which sweep a folder is of


def describe(params: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


def progress_line(plan: SweepPlan, ledger: Ledger, points: Sequence[int], entry: Entry, is_trial: bool = True) -> str:
    """Tell what came of a run, how far the sweep is, what is best so far, and how long it will take."""
    name = "trial" if is_trial else "seed"
    entries = ledger.done(points)
    best = ledger.best(points)
    score = f"{'validation' if is_trial else 'test'} {plan.metric} {entry.value:.4f}"
    if entry.diverged:
        score = "diverged"
    # Of a run that went on, the seconds are those since then.
    whole = [entry for entry in entries if entry.attempts == 1] or entries
    seconds = statistics.mean(entry.result["seconds"] for entry in whole)
    # This process has none at work any more; others have.
    left = seconds * (len(points) - len(entries)) / (ledger.num_at_work() + 1)
    line = f"[{len(entries)}/{len(points)}] {name} {entry.point}"
    line += f" ({describe(entry.params)})" if entry.params else ""
    line += f": {score}, {_duration(entry.result['seconds'])}"
    if is_trial and best is not None:
        line += f"; best so far {best.value:.4f} (trial {best.point})"
    return line + (f"; about {_duration(left)} left" if left else "")


def collect(plan: SweepPlan, trials: Ledger, finals: Ledger | None) -> dict[str, Any]:
    """Put together all that is known of a sweep; its `complete` says whether that is all there will be."""
    points = range(plan.num_trials)
    done, best, failed = trials.done(points), trials.best(points), trials.failed(points)
    num_over = len(done) + (len(failed) if plan.sweep.skip_failed else 0)
    seeds = list(plan.sweep.final_seeds)
    runs = [] if finals is None else finals.done(seeds)
    settings = plan.settings
    return {
        "complete": num_over == len(points) and len(runs) == len(seeds),
        "method": settings.model.method,
        "model_name_or_path": settings.model.model_name_or_path,
        "dataset_name": settings.data.dataset_name,
        "study_name": plan.study_name,
        "sampler": plan.sweep.sampler,
        "search_space": {name: list(values) for name, values in plan.axes.items()},
        "num_trials": plan.num_trials,
        "metric": plan.metric,
        "trials": [_trial(entry) for entry in done],
        "failed": [{"trial": point, "error": error} for point, error in failed.items()],
        "choice": None if best is None else {"trial": best.point, "settings": dict(best.params)},
        "final": [{"seed": run.point, "attempts": run.attempts, **run.result} for run in runs],
        "test": _summary([run.result["metrics"] for run in runs]),
    }


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json`."""
    _write(folder / RESULTS_FILE, results)


def check_folder(plan: SweepPlan) -> None:
    """Note in a sweep's folder whose it is.

    Raises:
        ValueError: It holds the files of another sweep, with which these would be mixed.
    """
    file = plan.folder / SWEEP_FILE
    own = json.loads(json.dumps({"study_name": plan.study_name, **plan.identity}))
    if not file.exists():
        _write(file, own)
    elif changed := tell_apart(json.loads(file.read_text(encoding="utf-8")), own):
        raise ValueError(
            f"Found '{plan.folder}' with the files of a sweep with {changed[0]}, and a sweep with {changed[1]}. A "
            "folder holds the runs of one: use another output_dir, or delete this one."
        )


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file in one go, whoever else does so at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    write_whole(draft, json.dumps(content, indent=2) + "\n")
    draft.replace(file)


def _trial(entry: Entry) -> dict[str, Any]:
    value = None if entry.diverged else entry.value
    return {
        "trial": entry.point,
        "settings": dict(entry.params),
        "value": value,
        "attempts": entry.attempts,
        **entry.result,
    }


def _summary(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample, None for a single run) of each test score over the seeds."""
    names = [name for name in (metrics[0] if metrics else ()) if name.startswith("test_")]
    summary = {}
    for name in names:
        values = [run[name] for run in metrics]
        std = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": statistics.mean(values), "std": std, "values": values}
    return summary


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
