"""A sweep before it runs: its axes, its points, and the settings of every run."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..training import Settings
from ..training.identity import DATA_FIELDS, SPLIT_FIELDS
from ..training.parsing import parse_arguments_with
from .arguments import PUBLISHED_GRID, SweepArguments


# Scores on other images, or by another measure, do not compare; seeds are not for choosing; folders are the sweep's.
NO_AXES = {*DATA_FIELDS, *SPLIT_FIELDS, "dataset_dir", "broken_images"}
NO_AXES |= {"metric_for_best_model", "greater_is_better", "seed", "data_seed"}
NO_AXES |= {"output_dir", "resume_from_checkpoint", "push_to_hub"} | {
    f.name for f in dataclasses.fields(SweepArguments)
}

# What the same sweep may have otherwise on another machine or after a restart.
MAY_DIFFER = {"output_dir", "logging_dir", "run_name", "disable_tqdm", "use_cpu", "report_to", "cache_dir"}
MAY_DIFFER |= {"dataset_dir", "resume_from_checkpoint", "save_total_limit", "project", "trackio_space_id"}
MAY_DIFFER |= {"hf_vpt_version", "peft_version"}
MAY_DIFFER_PREFIXES = (
    "dataloader_num_workers",
    "dataloader_p",  # pinned memory, prefetching, persistent workers
    "dataloader_multiprocessing_context",
    "log_",
    "logging_",
    "hub_",
    "push_to_hub",
    "local_rank",
    "_",
    "deepspeed",
    "fsdp",
)

# A run that is tested learns from validation images too, to its last epoch: the learning rate's schedule belongs to
# the whole length, and there is nothing left to choose an epoch on.
FINAL_WORDS = ("--train_on_validation=true", "--eval_strategy=no", "--load_best_model_at_end=false")
FINAL_WORDS += ("--save_strategy=epoch",)
QUIET_WORDS = ("--disable_tqdm=1",)


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What a sweep does.

    Args:
        argv: Words of the command line that it was read from.
        settings: Settings of a run without the axes.
        sweep: What is tried.
        axes: Values of each axis, of the setting's type.
    """

    argv: tuple[str, ...]
    settings: Settings
    sweep: SweepArguments
    axes: Mapping[str, Sequence[Any]]

    @property
    def folder(self) -> Path:
        return Path(self.settings.training.output_dir)

    @property
    def study_name(self) -> str:
        # A file in the folder belongs to the folder, by whatever path somebody comes to it.
        return self.sweep.study_name or (self.folder.as_posix() if self.sweep.storage else "sweep")

    @property
    def storage_url(self) -> str:
        return self.sweep.storage or f"sqlite:///{self.folder / 'sweep.db'}"

    @property
    def metric(self) -> str:
        """What settings are chosen by, such as `accuracy`."""
        return (self.settings.training.metric_for_best_model or "accuracy").removeprefix("eval_")

    @property
    def greater_is_better(self) -> bool:
        chosen = self.settings.training.greater_is_better
        return not self.metric.endswith("loss") if chosen is None else chosen

    @property
    def num_trials(self) -> int:
        return self.sweep.num_trials or len(self.points)

    @property
    def points(self) -> list[dict[str, Any]]:
        """All combinations of the grid; the last axis changes fastest."""
        return [dict(zip(self.axes, values)) for values in itertools.product(*self.axes.values())]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this sweep: it may only go on with the same."""
        # A list, because the order of the axes decides which number each point has.
        own: dict[str, Any] = {"axes": [[name, list(values)] for name, values in self.axes.items()]}
        own |= {"sampler": self.sweep.sampler, "global_batch_size": self.settings.training.global_batch_size}
        for part in (self.settings.model, self.settings.data, self.settings.training, self.settings.peft_config):
            for name, value in {} if part is None else _plain(part).items():
                if name not in MAY_DIFFER | self.axes.keys() and not name.startswith(MAY_DIFFER_PREFIXES):
                    own[name] = value
        return own

    def trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / str(number)

    def final_folder(self, seed: int) -> Path:
        return self.folder / "final" / f"seed{seed}"

    def trial_settings(self, number: int, params: Mapping[str, Any], *more: str) -> Settings:
        """Settings of a trial: those of `scripts/train.py` with its point of the grid, in a folder of its own."""
        return self._with(params, self.trial_folder(number), *more)

    def final_settings(self, seed: int, params: Mapping[str, Any], *more: str) -> Settings:
        """Settings of a run that is tested."""
        return self._with(params, self.final_folder(seed), f"--seed={seed}", *FINAL_WORDS, *more)

    def _with(self, params: Mapping[str, Any], folder: Path, *more: str) -> Settings:
        words = [f"--{name}={value}" for name, value in params.items()]
        argv = [*self.argv, *words, f"--output_dir={folder}", *QUIET_WORDS, *more]
        return parse_arguments_with(argv, SweepArguments)[0]


def parse_sweep(argv: Sequence[str] | None = None) -> SweepPlan:
    """Read a sweep from `--config FILE.yaml` and the command line, and check the settings of every run of a grid.

    Every key and option of `scripts/train.py` is one here, and so are the fields of `SweepArguments`.

    Raises:
        ValueError: As `parse_arguments`, or an axis cannot be one, or runs would not compare.

    Example:
        >>> plan = parse_sweep(["--config", "configs/vpt/digits.yaml", "--search_space", "learning_rate=0.1,0.01"])
        >>> plan.points
        [{'learning_rate': 0.1}, {'learning_rate': 0.01}]
    """
    argv = tuple(sys.argv[1:] if argv is None else argv)
    settings, sweep = parse_arguments_with(argv, SweepArguments)
    _check(settings)
    if sweep.axes is None:
        _check_published_grid(settings)
    elif refused := NO_AXES & sweep.axes.keys():
        raise ValueError(
            f"search_space has {', '.join(sorted(refused))}. An axis must be a setting of training or of the method "
            "that leaves images, scores, seeds and folders alone: leave it out."
        )
    plan = SweepPlan(argv, settings, sweep, PUBLISHED_GRID if sweep.axes is None else {})
    if sweep.axes is not None:
        axes = {
            name: [_value_of(plan.trial_settings(0, {name: word}), name) for word in words]
            for name, words in sweep.axes.items()
        }
        plan = dataclasses.replace(plan, axes=axes)
    if sweep.sampler == "grid":
        for number, params in enumerate(plan.points):
            plan.trial_settings(number, params)  # settings may contradict each other in some places of a grid
    return plan


def _check(settings: Settings) -> None:
    training = settings.training
    if training.world_size > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "Found several processes that belong together. Each trial of a sweep runs in one process: start "
            "scripts/sweep.py with python, once for each GPU (CUDA_VISIBLE_DEVICES), with the same options."
        )
    if settings.data.streaming or settings.data.train_on_validation:
        found = "streaming" if settings.data.streaming else "train_on_validation"
        raise ValueError(
            f"Found {found}. A sweep scores trials on validation images, and joins them to the training images at "
            f"last: leave {found} out."
        )
    if training.push_to_hub or training.resume_from_checkpoint:
        found = "push_to_hub" if training.push_to_hub else "resume_from_checkpoint"
        raise ValueError(
            f"Found {found}, which is for a single run. A sweep has many, and goes on by itself: leave it out, and "
            "push the run that you want from its folder."
        )


def _check_published_grid(settings: Settings) -> None:
    training = settings.training
    if str(training.optim.value) != "sgd" or not training.scale_learning_rate:
        raise ValueError(
            f"Found no search_space, optim {training.optim.value} and scale_learning_rate "
            f"{training.scale_learning_rate}. The published grid (learning rates 0.05 to 50 for a batch of 256) is "
            "for SGD with scaled rates: pass --optim sgd --optim_args momentum=0.9 --scale_learning_rate, or your "
            "own values such as --search_space learning_rate=1e-2,1e-3 weight_decay=0,1e-4."
        )


def _value_of(settings: Settings, name: str) -> Any:
    for part in (settings.model, settings.data, settings.training, settings.peft_config):
        if part is not None and hasattr(part, name):
            value = getattr(part, name)
            value = getattr(value, "value", value)  # of an enumeration
            if isinstance(value, (bool, int, float, str)):
                return value
    raise ValueError(
        f"search_space has {name}, which is no single number or word. An axis needs one value for each run: leave it "
        "out."
    )


def _plain(part: Any) -> dict[str, Any]:
    """Fields as they look after a way through JSON."""
    fields = part.to_dict() if hasattr(part, "to_dict") else dataclasses.asdict(part)
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in fields.items()
    }
