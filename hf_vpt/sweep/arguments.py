"""Settings of a sweep: what is tried, how often, and where it is written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..choices import check_choice


Sampler = Literal["grid", "tpe"]

# Of the code of VPT and VAPT (`tune_vtab.py`): SGD with momentum, learning rates for a batch of 256.
PUBLISHED_GRID = {
    "learning_rate": [50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05],
    "weight_decay": [1e-2, 1e-3, 1e-4, 0.0],
}


@dataclass
class SweepArguments:
    """What a sweep tries, beside the settings of the runs themselves.

    Args:
        search_space: Values of each setting that is searched: `learning_rate=0.1,0.01 weight_decay=0,1e-4` on the
            command line, a mapping from names to lists in a file. Any setting of a run that is one number or word may
            be an axis, `num_virtual_tokens` for one. Default: the published grid of 10 learning rates and 4 weight
            decays, for runs as it was made for (`optim: sgd`, `scale_learning_rate: true`).
        sampler: `"grid"` tries every combination. `"tpe"` has Optuna's tree-structured Parzen estimator draw
            `num_trials` of them: numbers above 0 from the whole range between the smallest and the largest value,
            evenly in their logarithm, everything else from the values.
        num_trials: How many settings `"tpe"` tries, at least 1.
        final_seeds: Seeds of the runs that train the best setting anew and are tested, at least one, all different.
        skip_failed: Choose among the others where trials have ended with an error, and try those no more. Default:
            the sweep stops before it chooses, and tries them once more when it is started again.
        storage: Where trials are written down and shared out: a database URL that Optuna knows. Default: the SQLite
            file `sweep.db` in `output_dir`. For several machines, one server: `postgresql://user@host/name`.
        study_name: Name of the sweep in the storage. Default: `sweep` in the file of `output_dir`, which is itself the
            name in any other storage.
        stale_after: Seconds, at least 60, without a sign of life after which a trial of another machine counts as
            killed. Of processes on the same machine, since its last start, that is known at once.

    Raises:
        ValueError: A setting is out of range, or two of them contradict each other.
    """

    _argument_group_name = "sweep"

    search_space: list[str] | None = field(default=None, metadata={"help": "Values to try: learning_rate=0.1,0.01 …"})
    sampler: Sampler = field(default="grid", metadata={"help": "All combinations (grid), or some of them (tpe)."})
    num_trials: int | None = field(default=None, metadata={"help": "How many settings tpe tries."})
    final_seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the runs that are tested."}
    )
    skip_failed: bool = field(default=False, metadata={"help": "Choose although trials have failed."})
    storage: str | None = field(default=None, metadata={"help": "Database URL; default: a file in output_dir."})
    study_name: str | None = field(default=None, metadata={"help": "Name of the sweep in the storage."})
    stale_after: float = field(default=300.0, metadata={"help": "Seconds of silence that mean killed."})

    def __post_init__(self):
        self.axes: dict[str, list[str]] | None = None if self.search_space is None else read_axes(self.search_space)
        check_choice("sampler", self.sampler, Sampler)
        if self.sampler == "tpe" and (self.num_trials is None or self.num_trials < 1):
            raise ValueError(
                f"sampler is 'tpe' and num_trials {self.num_trials}. Drawing settings needs their number, at least 1: "
                "pass for example --num_trials 20."
            )
        if self.sampler == "grid" and self.num_trials is not None:
            raise ValueError(
                f"sampler is 'grid' and num_trials {self.num_trials}. A grid is tried as a whole: leave num_trials "
                "out, shorten its axes, or choose the sampler tpe."
            )
        seeds = self.final_seeds
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(
                f"final_seeds is {seeds}. At least one seed, none below 0 and none twice, is needed: correct the list."
            )
        if not self.stale_after >= 60:
            raise ValueError(
                f"stale_after is {self.stale_after:g}. Signs of life are given every 20 seconds, so it must be at "
                "least 60: correct it, or leave it out."
            )


def read_axes(words: Sequence[str]) -> dict[str, list[str]]:
    """Read the values of each axis, as words, from `name=value,value` or from the JSON text of a mapping.

    Raises:
        ValueError: An axis has no name or no values, or stands there twice.
    """
    axes: dict[str, list[str]] = {}
    for word in words:
        for name, values in _axes_of(word):
            if name in axes or not values or len(set(values)) < len(values) or "" in values:
                raise ValueError(
                    f"search_space has {name}={','.join(values)}"
                    f"{', and ' + name + ' before that' if name in axes else ''}. Each setting needs one list of "
                    "different values: write learning_rate=0.1,0.01, or learning_rate: [0.1, 0.01] in a file."
                )
            axes[name] = values
    return axes


def _axes_of(word: str) -> list[tuple[str, list[str]]]:
    if word.startswith("{"):
        mapping: dict[str, Any] = json.loads(word)
        lists = {name: values if isinstance(values, list) else [values] for name, values in mapping.items()}
        return [(name, [str(value) for value in values]) for name, values in lists.items()]
    name, equals, values = word.partition("=")
    if not name or not equals:
        raise ValueError(
            f"search_space has '{word}'. Each part must be a setting and its values: write learning_rate=0.1,0.01, "
            "without spaces."
        )
    return [(name.lstrip("-").replace("-", "_"), [value.strip() for value in values.split(",")])]
