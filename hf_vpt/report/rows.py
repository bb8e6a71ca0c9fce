"""Runs that differ in nothing but their seed, as one row of a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..training.comparison import TRAINED_ON_FIELDS, check_comparable
from .results import Run


# What methods are called in papers; (deep, shallow) where there are both.
TITLES: dict[str, str | tuple[str, str]] = {
    "linear_probe": "linear probe",
    "bias": "biases (BitFit)",
    "lora": "LoRA",
    "vpt": ("VPT-Deep", "VPT-Shallow"),
    "vapt": "VAPT",
    "provpt": "PRO-VPT",
    "bpt": ("BPT-Deep", "BPT-Shallow"),
    "full": "full fine-tuning",
}

# Beside the settings, which are a mapping of their own.
_ALSO_THE_SAME = ("num_train_epochs", "max_steps", "global_batch_size", *TRAINED_ON_FIELDS, "augmentation")


@dataclass(frozen=True)
class Row:
    """Runs on one data set with one method and the same settings, one for each seed.

    Args:
        dataset: Name of the data set.
        trained_on: Which of its images were learned from: `"train"`, `"train and validation"`, or so many a class.
        title: The method's name.
        backbone: What was adapted.
        differs: In what settings it differs from other rows with the same four; empty if there are none.
        runs: The runs.
    """

    dataset: str
    trained_on: str
    title: str
    backbone: str
    differs: str
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        return self.runs[0].metrics["method"]

    @property
    def name(self) -> str:
        return f"{self.title} ({self.differs})" if self.differs else self.title

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies in per cent."""
        return [100 * run.test_accuracy for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Standard deviation of a sample; None for a single run, which has no spread."""
        return statistics.stdev(self.accuracies) if len(self.runs) > 1 else None

    @property
    def seeds(self) -> list[int]:
        return [run.metrics["seed"] for run in self.runs]

    @property
    def num_trials(self) -> int | None:
        return self.runs[0].num_trials

    @property
    def tuned(self) -> int:
        """Numbers that training changes."""
        return self.runs[0].metrics["trained_parameters"]

    @property
    def tuned_without_head(self) -> int:
        return self.runs[0].metrics["trained_parameters_without_head"]

    @property
    def search_seconds(self) -> float | None:
        return self.runs[0].search_seconds

    def timing(self, name: str) -> float | None:
        """Median over the runs that tell it; None if none does. One that was interrupted tells no seconds."""
        runs = [run for run in self.runs if run.timings.get("is_whole", True) or not name.endswith("seconds")]
        values = [run.timings[name] for run in runs if run.timings.get(name) is not None]
        return statistics.median(values) if values else None


def group_rows(runs: Sequence[Run]) -> list[Row]:
    """Put the seeds of one setting together; data sets in alphabetical order, methods in that of `TITLES`.

    Raises:
        ValueError: Results on one data set are on different images or prepared in different ways, or the same run is
            there twice.
    """
    check_comparable({run.source: run.metrics for run in runs})
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_key(run), sort_keys=True), []).append(run)
    by_name: dict[tuple[str, str, str, str], list[list[Run]]] = {}
    for group in groups.values():
        _check_seeds(group)
        first = group[0].metrics
        backbone = first.get("model_name_or_path", "unknown")
        name = (first["dataset_name"], _trained_on(first), title_of(first), backbone)
        by_name.setdefault(name, []).append(sorted(group, key=lambda run: run.metrics["seed"]))
    rows = [
        Row(*name, differs, tuple(group))
        for name, same in by_name.items()
        for group, differs in zip(same, _differences(same))
    ]
    order = list(TITLES)
    return sorted(
        rows,
        key=lambda row: (row.dataset, row.backbone, row.trained_on, order.index(row.method), row.title, row.differs),
    )


def parts(rows: Sequence[Row]) -> list[str]:
    """Say what each row has learned from, such as `", trained on train"`; nothing where that is always the same."""
    trained_on: dict[str, set[str]] = {}
    for row in rows:
        trained_on.setdefault(row.dataset, set()).add(row.trained_on)
    return ["" if len(trained_on[row.dataset]) == 1 else f", trained on {row.trained_on}" for row in rows]


def _trained_on(metrics: Mapping[str, Any]) -> str:
    number = metrics.get("images_per_class")
    splits = "train and validation" if metrics.get("train_on_validation") else "train"
    return splits if number is None else f"{number} images a class of {splits}"


def title_of(metrics: dict[str, Any]) -> str:
    """What papers call a method with its settings."""
    title = TITLES[metrics["method"]]
    if isinstance(title, str):
        return title
    deep = (metrics.get("settings") or {}).get("deep")
    return title[0].partition("-")[0] if deep is None else title[0 if deep else 1]


def _key(run: Run) -> dict[str, Any]:
    names = ("dataset_name", "method", "model_name_or_path", *_ALSO_THE_SAME)
    own = {name: run.metrics.get(name) for name in names}
    # A setting that is not set is one that an older version did not have.
    set_ones = {f"settings {name}": value for name, value in run.settings.items() if value is not None}
    return own | {"num_trials": run.num_trials} | set_ones


def _differences(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Say of each of several groups what only it has."""
    keys = [_key(group[0]) for group in groups]
    every = dict.fromkeys(name for key in keys for name in key)
    names = [name for name in every if len({str(key.get(name)) for key in keys}) > 1]
    return [", ".join(_say(name.removeprefix("settings "), key.get(name)) for name in names) for key in keys]


def _say(name: str, value: Any) -> str:
    if name == "num_trials":
        return "a run by itself" if value is None else f"chosen among {value}"
    return f"{name} {value}"


def _check_seeds(runs: Sequence[Run]) -> None:
    by_seed: dict[int, str] = {}
    for run in runs:
        seed = run.metrics["seed"]
        if seed in by_seed:
            raise ValueError(
                f"Found the same run twice, with seed {seed}: '{by_seed[seed]}' and '{run.source}'. A mean over seeds "
                "needs each run once: leave one of the files out, by its path or, of a folder, with --exclude."
            )
        by_seed[seed] = run.source
