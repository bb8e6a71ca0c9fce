"""A whole sweep: all trials, then the best setting once more for each seed, then the summary."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data.augmented import draw_seed
from ..training import SharedLoader
from .claims import Claim, Entry
from .ledger import Ledger
from .plan import SweepPlan
from .runs import remove_checkpoints, run_final, run_trial
from .summary import collect, describe, progress_line, write_results


POLL_SECONDS = 2.0


def run_sweep(plan: SweepPlan, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Search settings as published, and test the best one.

    1. Each trial trains on the train split and is scored on the validation split. Folder: `trials/<number>`.
    2. The trial with the best score is chosen, the first one of several. The checkpoints of all others are deleted.
    3. Its setting is trained anew, on the images of both splits together, once for each of `final_seeds`, to the last
       epoch: the learning rate's schedule belongs to the whole length, and no image is left to choose an epoch on.
       Folder: `final/seed<k>`, with everything that `train_classifier` writes.
    4. Each of these is tested once. Nothing has looked at the test split before.

    A sweep that was killed goes on when it is started again: what is done stays done, and a run that was under way
    goes on from its last checkpoint. Any number of processes and machines may work on one sweep: start each with the
    same settings, and with the same storage. On machines without common folders, each keeps the files of its own runs.

    Args:
        plan: What `parse_sweep` returns.
        report: Gets a line of text after each run.

    Returns:
        What `results.json` in `output_dir` holds: the grid, each trial, the choice, each seed's metrics, and mean and
        standard deviation of the test scores.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    open_ledger = functools.partial(
        Ledger, plan.storage_url, greater_is_better=plan.greater_is_better, stale_after=plan.sweep.stale_after
    )
    trials = open_ledger(study_name=plan.study_name, identity=plan.identity)
    shared = SharedLoader()
    points = range(plan.num_trials)
    params = dict(enumerate(plan.points)) if plan.sweep.sampler == "grid" else None
    report(f"{len(points)} trials over {', '.join(plan.axes)}, in {plan.folder}, study '{plan.study_name}'.")

    def after_trial(entry: Entry) -> None:
        report(progress_line(plan, trials, points, entry))
        best = trials.best(points)
        for other in trials.done(points):
            if best is not None and other.point != best.point:
                remove_checkpoints(plan.trial_folder(other.point))
        write_results(plan.folder, collect(plan, trials, None))

    work_off(trials, points, functools.partial(_trial, plan, trials, shared), after_trial, params)
    best = trials.best(points)
    report(f"Chosen: trial {best.point} ({describe(best.params)}), validation {plan.metric} {best.value:.4f}.")

    # Another choice, after more trials, has final runs of its own.
    finals = open_ledger(study_name=f"{plan.study_name}/final/{best.point}", identity=plan.identity)
    seeds = plan.sweep.final_seeds
    work_off(
        finals,
        seeds,
        lambda claim: run_final(plan, claim, best.params, shared),
        lambda entry: report(progress_line(plan, finals, seeds, entry, is_trial=False)),
    )
    results = collect(plan, trials, finals)
    write_results(plan.folder, results)
    return results


def work_off(
    ledger: Ledger,
    points: Sequence[int],
    run: Callable[[Claim], tuple[float, Mapping[str, Any]]],
    after: Callable[[Entry], None] | None = None,
    params: Mapping[int, Mapping[str, Any]] | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Do points until all are done, by this process or by others at work on the same ledger.

    Args:
        ledger: Where it is written down.
        points: All points.
        run: Does one, and returns its value and what else is to be kept.
        after: Called with each point that this process has done.
        params: Settings of each point, to be written down with it.
        poll_seconds: How often to look whether others have come to an end, or been killed.
    """
    while True:
        claim = ledger.claim(points, params)
        if claim is not None:
            with ledger.at_work(claim):
                value, result = run(claim)
            if ledger.finish(claim, value, result) and after is not None:
                after(next(entry for entry in ledger.done(points) if entry.point == claim.point))
        elif len(ledger.done(points)) == len(points):
            ledger.tidy()
            return
        else:
            time.sleep(poll_seconds)


def _trial(plan: SweepPlan, ledger: Ledger, shared: SharedLoader, claim: Claim) -> tuple[float, dict[str, Any]]:
    params = claim.params if plan.sweep.sampler == "grid" else _draw(plan, ledger, claim)
    return run_trial(plan, claim, params, shared)


def _draw(plan: SweepPlan, ledger: Ledger, claim: Claim) -> dict[str, Any]:
    """Draw a setting by the results so far; what an earlier attempt has drawn stays."""
    study = ledger.study(draw_seed(plan.settings.training.seed, claim.point))
    trial = ledger.optuna.trial.Trial(study, claim.trial_id)
    drawn = {}
    for name, values in plan.axes.items():
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 for value in values):
            is_whole = all(isinstance(value, int) for value in values)
            suggest = trial.suggest_int if is_whole else trial.suggest_float
            drawn[name] = suggest(name, min(values), max(values), log=True)
        else:
            drawn[name] = trial.suggest_categorical(name, list(values))
    return drawn
