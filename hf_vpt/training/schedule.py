"""Learning rates that change once an epoch, as the published code of visual prompt tuning changes them."""

from __future__ import annotations

from collections.abc import Callable

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
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"lr_schedule_unit is 'epoch' with the schedule {type(scheduler).__name__}, which looks at scores. A "
            "schedule that is a function of the step is needed, such as cosine or linear: change lr_scheduler_type, "
            "or leave lr_schedule_unit out."
        )

    def held(factor: Callable[[int], float]) -> Callable[[int], float]:
        # A plain function: LambdaLR writes the attributes of other callables into checkpoints.
        return lambda step: factor(step // steps_per_epoch * steps_per_epoch)

    scheduler.lr_lambdas = [held(factor) for factor in scheduler.lr_lambdas]
