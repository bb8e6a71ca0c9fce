"""The runs of a sweep: a trial, which never looks at the test split, and a final run, which is tested."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..training import Settings, SharedLoader, build_trainer, train_classifier
from ..training.checkpoints import find_checkpoints
from ..training.experiment import TIMINGS_FILE, epoch_of_weights
from .claims import Claim
from .plan import SweepPlan


LOG_FILE = "log.txt"


def run_trial(
    plan: SweepPlan, claim: Claim, params: Mapping[str, Any], shared: SharedLoader
) -> tuple[float, dict[str, Any]]:
    """Train on the train split, and score on the validation split with the best epoch's weights.

    A loss or score that is no number, which too large learning rates lead to, is the worst value and no error.

    Returns:
        The score, and what else is worth knowing: scores by name, the epoch they belong to, seconds.
    """
    folder = plan.trial_folder(claim.point)
    settings = plan.trial_settings(claim.point, params, *resume_words(folder, claim.attempt))
    start = time.monotonic()
    scores, epoch, diverged, value = {}, None, None, math.nan
    with _run(folder):
        try:
            scores, epoch = _train_and_score(settings, shared)
        except FloatingPointError as error:
            diverged = str(error)
    if diverged is None:
        if (name := f"validation_{plan.metric}") not in scores:
            raise ValueError(
                f"Found no {plan.metric} among the scores {sorted(scores)}. Settings are chosen by "
                "metric_for_best_model: set it to one of them, without validation_."
            )
        value = scores[name]
        if not math.isfinite(value):
            diverged = f"{name} is {value}"
    if diverged is not None:
        value = 0.0 if plan.greater_is_better else math.inf
    kept = {name: score for name, score in scores.items() if "accuracy" in name or "loss" in name}
    kept = {name: score if math.isfinite(score) else None for name, score in kept.items()}
    result = {"scores": kept, "best_epoch": epoch, "diverged": diverged, "seconds": time.monotonic() - start}
    return value, result


def run_final(
    plan: SweepPlan, claim: Claim, params: Mapping[str, Any], shared: SharedLoader
) -> tuple[float, dict[str, Any]]:
    """Train on train and validation images together, with a seed, and test once.

    Returns:
        The test score, and what `metrics.json` and `timings.json` hold.
    """
    folder = plan.final_folder(claim.point)
    settings = plan.final_settings(claim.point, params, *resume_words(folder, claim.attempt))
    start = time.monotonic()
    with _run(folder):
        metrics = train_classifier(settings, shared)
    timings = json.loads((folder / TIMINGS_FILE).read_text(encoding="utf-8"))
    result = {"metrics": metrics, "timings": timings, "seconds": time.monotonic() - start}
    return metrics[f"test_{plan.metric}"], result


def _train_and_score(settings: Settings, shared: SharedLoader) -> tuple[dict[str, float], float | None]:
    trainer, _ = build_trainer(settings, shared)
    trainer.train(resume_from_checkpoint=settings.training.resume_from_checkpoint)
    scores = trainer.evaluate(metric_key_prefix="validation")
    return scores, epoch_of_weights(trainer.state, settings.training.load_best_model_at_end)


def remove_checkpoints(folder: Path) -> None:
    """Delete what a run could have gone on from."""
    for checkpoint in find_checkpoints(folder):
        shutil.rmtree(checkpoint, ignore_errors=True)  # several processes may tidy up at once


def resume_words(folder: Path, attempt: int) -> list[str]:
    """Options with which a run goes on from what earlier attempts left in its folder; the first one tidies it up."""
    if attempt:
        return ["--resume_from_checkpoint=auto"]
    # Nobody was at it before, so what lies there is of another sweep.
    remove_checkpoints(folder)
    return []


@contextlib.contextmanager
def _run(folder: Path) -> Iterator[None]:
    """Send what a run prints, what it warns of and its errors to a file in its folder, and free its memory."""
    _free_memory()  # of a run before this one that ended with an error
    folder.mkdir(parents=True, exist_ok=True)
    level = logging.get_verbosity()
    with (folder / LOG_FILE).open("a", encoding="utf-8") as log:
        logging.set_verbosity_error()
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                try:
                    yield
                except Exception:
                    traceback.print_exc()
                    raise
        finally:
            logging.set_verbosity(level)
    _free_memory()


def _free_memory() -> None:
    gc.collect()  # trainer and model hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
