"""Learning rates that change once an epoch, as published code changes them, and angles that fall geometrically."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def hold_within_epochs(scheduler: LRScheduler, steps_per_epoch: int) -> None:
    """Make a schedule keep, for the whole of each epoch, the learning rate that it has at the epoch's first step.

    With a schedule η(t) over the optimiser steps t and S steps an epoch, the learning rate becomes η(S·⌊t/S⌋). With
    linear warm-up the first epoch therefore has the learning rate 0, as in the code of VPT (arXiv 2203.12119).

    Args:
        scheduler: A schedule at its start, one of those of `transformers.get_scheduler` that are functions of the
            step. It is changed in place; it goes on from a checkpoint as before.
        steps_per_epoch: Optimiser steps S of an epoch, at least 1.

    Raises:
        ValueError: The schedule is no function of the step.
    """
    _check_step_function(scheduler, "lr_schedule_unit is 'epoch'", "lr_schedule_unit")

    def held(factor: Callable[[int], float]) -> Callable[[int], float]:
        # A plain function: LambdaLR writes the attributes of other callables into checkpoints.
        return lambda step: factor(step // steps_per_epoch * steps_per_epoch)

    scheduler.lr_lambdas = [held(factor) for factor in scheduler.lr_lambdas]


def fall_geometrically(scheduler: LRScheduler, ends: Mapping[int, float], warmup_steps: int, num_steps: int) -> None:
    """Make the learning rates of some groups fall by the same factor in every step, after a linear warm-up.

    From the largest value η to the end e: η_t = η·(e/η)^((t − w)/(T − w)) after w of T steps. Each power of ten
    between gets the same number of steps, so that η may be too large by a good deal; a cosine leaves a seventh of its
    steps for what lies between a tenth and a hundredth of η. See arXiv 2002.05273 for both with SGD.

    Args:
        scheduler: A schedule at its start, one of those of `transformers.get_scheduler` that are functions of the
            step. It is changed in place; it goes on from a checkpoint as before.
        ends: Learning rate e at the end, by the index of the group, above 0 and at most η.
        warmup_steps: Steps w of warm-up.
        num_steps: Steps T of the run.

    Raises:
        ValueError: The schedule is no function of the step.
    """
    _check_step_function(scheduler, "prompt_final_angle is set", "prompt_final_angle")

    def falling(ratio: float) -> Callable[[int], float]:
        def factor(step: int) -> float:
            if step < warmup_steps:
                return step / warmup_steps
            return ratio ** min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))

        return factor

    for index, end in ends.items():
        scheduler.lr_lambdas[index] = falling(end / scheduler.base_lrs[index])
    # What it has set for the first step.
    for group, base, factor in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
        group["lr"] = base * factor(scheduler.last_epoch)


def _check_step_function(scheduler: LRScheduler, found: str, option: str) -> None:
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"{found} with the schedule {type(scheduler).__name__}, which looks at scores. A schedule that is a "
            f"function of the step is needed, such as cosine or linear: change lr_scheduler_type, or leave {option} "
            "out."
        )
