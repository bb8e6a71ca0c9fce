"""A whole sweep: all trials, then the best setting once more for each seed, then the summary."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data.augmented import draw_seed
from ..training import SharedLoader
from .claims import Claim, Entry, describe_error
from .ledger import Ledger
from .plan import SweepPlan
from .runs import LOG_FILE, remove_checkpoints, run_final, run_trial
from .summary import check_folder, collect, describe, progress_line, write_results


POLL_SECONDS = 2.0

# Trials in a row that fail in one process before it stops: what is wrong is then no setting of one of them.
MAX_FAILURES = 3


def run_sweep(plan: SweepPlan, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Search settings as published, and test the best one.

    1. Each trial trains on the train split and is scored on the validation split. Folder: `trials/<number>`.
    2. The trial with the best score is chosen, the first one of several. The checkpoints of all others are deleted.
    3. Its setting is trained anew, on the images of both splits together, once for each of `final_seeds`, to the last
       epoch: the learning rate's schedule belongs to the whole length, and no image is left to choose an epoch on.
       Folder: `final/seed<k>`, with everything that `train_classifier` writes.
    4. Each of these is tested once. Nothing has looked at the test split before.

    A trial whose loss is no number any more, which too large learning rates lead to, is done and is never chosen. One
    that ends with an error, too little memory for one, is reported, and the others are done first; the sweep then
    stops before it chooses, unless `skip_failed` is set. Started again, it tries what has failed once more.

    A sweep that was killed goes on when it is started again: what is done stays done, and a run that was under way
    goes on from its last checkpoint. Any number of processes and machines may work on one sweep: start each with the
    same settings, and with the same storage. On machines without common folders, each keeps the files of its own runs.

    Args:
        plan: What `parse_sweep` returns.
        report: Gets a line of text after each run.

    Returns:
        What `results.json` in `output_dir` holds: the grid, each trial, the choice, each seed's metrics, and mean and
        standard deviation of the test scores.

    Raises:
        ValueError: The folder or the study is that of another sweep.
        RuntimeError: Trials have failed, or all have diverged.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    open_ledger = functools.partial(
        Ledger, plan.storage_url, greater_is_better=plan.greater_is_better, stale_after=plan.sweep.stale_after
    )
    trials = open_ledger(study_name=plan.study_name, identity=plan.identity)
    check_folder(plan)
    shared = SharedLoader()
    points = range(plan.num_trials)
    params = dict(enumerate(plan.points)) if plan.sweep.sampler == "grid" else None
    done = len(trials.done(points))
    begun = f"{done} done, " if done else ""
    report(f"{len(points)} trials over {', '.join(plan.axes)}, {begun}in {plan.folder}, study '{plan.study_name}'.")

    def after_trial(entry: Entry) -> None:
        report(progress_line(plan, trials, points, entry))
        best = trials.best(points)
        for other in trials.done(points):
            if best is not None and other.point != best.point:
                remove_checkpoints(plan.trial_folder(other.point))
        write_results(plan.folder, collect(plan, trials, None))

    def after_failure(claim: Claim, error: str) -> None:
        report(f"trial {claim.point} failed: {error} (more in {plan.trial_folder(claim.point) / LOG_FILE})")
        write_results(plan.folder, collect(plan, trials, None))

    run = functools.partial(_trial, plan, trials, shared)
    failed = work_off(trials, points, run, after_trial, params, after_failure, plan.sweep.skip_failed)
    best = trials.best(points)
    if best is None or (failed and not plan.sweep.skip_failed):
        raise RuntimeError(_nothing_to_choose(plan, trials, failed))
    report(f"Chosen: trial {best.point} ({describe(best.params)}), validation {plan.metric} {best.value:.4f}.")

    # Another choice, after more trials, has final runs of its own.
    finals = open_ledger(study_name=f"{plan.study_name}/final/{best.point}", identity=plan.identity)
    seeds = plan.sweep.final_seeds

    def after_final(entry: Entry) -> None:
        # Only now that it is written down; the weights themselves have been saved beside them.
        for other in finals.done(seeds):
            remove_checkpoints(plan.final_folder(other.point))
        report(progress_line(plan, finals, seeds, entry, is_trial=False))

    work_off(
        finals,
        seeds,
        lambda claim: run_final(plan, claim, best.params, shared),
        after_final,
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
    after_failure: Callable[[Claim, str], None] | None = None,
    skip_failed: bool = False,
    poll_seconds: float = POLL_SECONDS,
) -> dict[int, str]:
    """Do points until all are done, by this process or by others at work on the same ledger.

    Args:
        ledger: Where it is written down.
        points: All points.
        run: Does one, and returns its value and what else is to be kept.
        after: Called with each point that this process has done.
        params: Settings of each point, to be written down with it.
        after_failure: Called with each that ended with an error, and the error; the others are done then. Default: the
            error is raised. It always is where `MAX_FAILURES` in a row have failed, unless these are skipped.
        skip_failed: What has failed once, in any process, is not tried again. Default: once more by each process.
        poll_seconds: How often to look whether others have come to an end, or been killed.

    Returns:
        What has failed, and how; the rest is done.
    """
    failed_here: set[int] = set()
    num_in_a_row = 0
    while True:
        failed = ledger.failed(points)
        given_up = set(failed) if skip_failed else failed_here & failed.keys()
        claim = ledger.claim([point for point in points if point not in given_up], params)
        if claim is not None:
            try:
                with ledger.at_work(claim):
                    value, result = run(claim)
            except Exception as error:
                failed_here.add(claim.point)
                num_in_a_row += 1
                if after_failure is None or (num_in_a_row == MAX_FAILURES and not skip_failed):
                    raise
                after_failure(claim, describe_error(error))
                continue
            num_in_a_row = 0
            if ledger.finish(claim, value, result) and after is not None:
                after(next(entry for entry in ledger.done(points) if entry.point == claim.point))
            continue
        done = {entry.point for entry in ledger.done(points)}
        if done | given_up == set(points):
            ledger.tidy()
            return {point: failed[point] for point in sorted(given_up - done)}
        time.sleep(poll_seconds)


def _nothing_to_choose(plan: SweepPlan, trials: Ledger, failed: Mapping[int, str]) -> str:
    """Say why a sweep stops before it chooses."""
    done = trials.done(range(plan.num_trials))
    if not failed:
        return (
            f"All {len(done)} trials have diverged, the first one so: {done[0].result['diverged']} A sweep chooses "
            "among scores: repair what is wrong, or give it other settings, and another output_dir."
        )
    errors = "; ".join(f"trial {number}: {error}" for number, error in failed.items())
    skip = ", or add --skip_failed to choose among the others" if not plan.sweep.skip_failed and done else ""
    again = "without --skip_failed" if plan.sweep.skip_failed else "to try them once more"
    return (
        f"{len(failed)} of {plan.num_trials} trials have failed ({errors}). A sweep chooses when all are done: give "
        f"the same command again once the reason is gone, {again}{skip}."
    )


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
