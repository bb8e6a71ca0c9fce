"""Runs over learning rates and weight decays, with prompts that are added to as published, and with others."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..training import SharedLoader, parse_arguments, train_classifier
from ..training.checkpoints import write_whole
from ..training.recipes import read_recipe
from ..training.steps import STEPS_FILE


RUN_FILE = "run.json"
_SCORES = ("test_accuracy", "validation_accuracy")

# Words for scripts/train.py; {rate} is what varies. The head's own learning rate is that of configs/ for AdamW, and
# for SGD one at which it does not make spikes of its own (0.3 does). SGD's gradients are not clipped, as in the
# published runs of VPT.
_MOMENTUM = "--optim sgd --optim_args momentum=0.9"
_SGD = f"{_MOMENTUM} --max_grad_norm 0"
_FALL = "--prompt_final_angle 0.003"
_ONE = "--learning_rate {rate} --head_learning_rate {rate} --head_weight_decay {decay}"
TREATMENTS = {
    # One learning rate and one weight decay for prompts and head, as in the published code of VPT and VAPT, with
    # gradients clipped as in that of PRO-VPT, and with the optimizer of BPT.
    "published": f"{_SGD} {_ONE}",
    "published_clipped": f"{_MOMENTUM} --max_grad_norm 0.25 {_ONE}",
    "published_adamw": _ONE,
    "sgd": f"{_SGD} --learning_rate {{rate}} --head_learning_rate 0.03",
    "sgd_norm": f"{_SGD} --learning_rate {{rate}} --head_learning_rate 0.03 --prompt_norm 1",
    "sgd_angle": f"{_SGD} --learning_rate 0.1 --head_learning_rate 0.03 --prompt_angle {{rate}}",
    # From the angle down to 0.003 radians, by the same factor in every step.
    "sgd_fall": f"{_SGD} --learning_rate 0.1 --head_learning_rate 0.03 --prompt_angle {{rate}} {_FALL}",
    "sgd_floor": f"{_SGD} --learning_rate {{rate}} --head_learning_rate 0.03 --prompt_norm_floor 0.1",
    "adamw": "--learning_rate {rate} --head_learning_rate 0.01",
    "adamw_norm": "--learning_rate {rate} --head_learning_rate 0.01 --prompt_norm 1",
    "adamw_angle": "--learning_rate 0.01 --head_learning_rate 0.01 --prompt_angle {rate}",
    "adamw_fall": f"--learning_rate 0.01 --head_learning_rate 0.01 --prompt_angle {{rate}} {_FALL}",
    # With the angles of configs/<method>/default.yaml. The rate is that of the head and of what else does not turn.
    "recipe": "--learning_rate {rate} --head_learning_rate {rate} --prompt_angle {prompt_angle} "
    "--prompt_final_angle {prompt_final_angle}",
}

# Nothing is chosen, so validation images are not looked at; the last weights are tested.
_COMMON = "--eval_strategy no --save_strategy no --load_best_model_at_end false --record_steps true --disable_tqdm 1"


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        data: Name of the data set.
        method: Prompt method; its settings are those of `configs/<method>/`.
        treatment: Key of `TREATMENTS`.
        rate: Learning rate, or angle in radians.
        weight_decay: Weight decay of prompts; the head has none, but where the treatment says so.
        seed: Seed.
    """

    data: str
    method: str
    treatment: str
    rate: float
    weight_decay: float = 0.0
    seed: int = 0

    @property
    def folder(self) -> Path:
        name = f"{_short(self.rate)}_{_short(self.weight_decay)}_{self.seed}"
        return Path(self.data, self.method, self.treatment, name)

    def words(self, configs: Path, output_dir: Path) -> list[str]:
        """The run's command line for `scripts/train.py`.

        Raises:
            ValueError: There is no configuration for the data set in `configs/<method>/`.
        """
        kind = self.data.partition("/")[0]
        config = configs / self.method / f"{kind}.yaml"
        if not config.is_file():
            raise ValueError(
                f"Found the data set '{self.data}' and no file '{config}'. A grid takes a method's settings from the "
                "file named like the data set or its group: add one, or use digits or drawn/<task>."
            )
        own = f"--weight_decay {self.weight_decay} --head_weight_decay 0 --seed {self.seed} {_COMMON} "
        recipe = read_recipe(configs / self.method / "default.yaml")
        own += TREATMENTS[self.treatment].format(rate=self.rate, decay=self.weight_decay, **recipe)
        where = ["--config", str(config), "--dataset_name", self.data, "--output_dir", str(output_dir)]
        return [*where, *own.split()]


def _short(value: float) -> str:
    return str(value).removesuffix(".0")


def points_of(
    data: Sequence[str],
    methods: Sequence[str],
    treatments: Sequence[str],
    rates: Sequence[float],
    weight_decays: Sequence[float] = (0.0,),
    seeds: Sequence[int] = (0,),
) -> list[Point]:
    """All combinations; the first seed of everything comes first."""
    product = itertools.product(seeds, data, methods, treatments, weight_decays, rates)
    return [Point(d, m, t, rate, decay, seed) for seed, d, m, t, decay, rate in product]


def run_grid(
    points: Sequence[Point],
    folder: str | Path,
    configs: Path,
    more: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> None:
    """Train each point that nobody has trained yet. Several processes may share a folder; killed, each goes on.

    A run leaves `run.json` (the point, the words for all runs, its accuracy on test and validation images, and
    `diverged` if its loss became no number) and `steps.json` in its folder.

    Args:
        points: What to train.
        folder: Where runs are kept.
        configs: The folder `configs` of the repository.
        more: Words of the command line for all runs.
        report: Gets a line after each run.

    Raises:
        ValueError: A run in the folder was trained with other words.
    """
    shared = SharedLoader()
    for number, point in enumerate(points, start=1):
        output_dir = Path(folder) / point.folder
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(output_dir / "lock", timeout=0):
                if (output_dir / RUN_FILE).exists():
                    _check_words(output_dir / RUN_FILE, more)
                    continue
                outcome = _train([*point.words(configs, output_dir), *more], shared)
                text = json.dumps(asdict(point) | {"words": list(more)} | outcome)
                write_whole(output_dir / RUN_FILE, text + "\n")
        except Timeout:
            continue  # another process is at it
        report(f"[{number}/{len(points)}] {point.folder}: {outcome}")


def _train(words: Sequence[str], shared: SharedLoader) -> dict[str, Any]:
    try:
        metrics = train_classifier(parse_arguments(list(words)), shared)
    except FloatingPointError as error:
        return dict.fromkeys(_SCORES) | {"diverged": str(error)}
    finally:
        gc.collect()
    return {name: metrics.get(name) for name in _SCORES} | {"diverged": None}


def _check_words(path: Path, more: Sequence[str]) -> None:
    known = json.loads(path.read_text(encoding="utf-8")).get("words", [])
    if known != list(more):
        raise ValueError(
            f"Found '{path}' of a run with the words {' '.join(known) or 'none'}, and now {' '.join(more) or 'none'}. "
            "Runs of a folder must compare: use another folder, or the same words."
        )


def read_runs(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Every finished run under a folder: what `run.json` holds, and `steps` where they were recorded."""
    for path in sorted(Path(folder).rglob(RUN_FILE)):
        run = json.loads(path.read_text(encoding="utf-8"))
        steps = path.parent / STEPS_FILE
        yield run | {"steps": json.loads(steps.read_text(encoding="utf-8")) if steps.exists() else None}
