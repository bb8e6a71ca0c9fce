"""Numerical trouble is seen: a loss that is no number stops training, one that never falls is spoken of."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .optimizer import directions_of


def raise_if_not_finite(loss: torch.Tensor, step: int, learning_rate: float, dtype: torch.dtype) -> None:
    """Stops a run whose loss is NaN or infinite, from which no weight comes back.

    Args:
        loss: The loss of a batch.
        step: Optimizer steps done so far.
        learning_rate: The largest learning rate now.
        dtype: Number format of the matrix products.

    Raises:
        FloatingPointError: With the step and what most likely did it.
    """
    if torch.isfinite(loss).all():
        return
    if step == 0:
        # Nothing has been learned yet, so it was there from the start.
        cause = "the images or the weights hold numbers that are not finite"
        remedy = "Look at a batch and at the backbone's weights"
        if dtype is torch.float16:
            cause, remedy = "float16 is too small for this backbone's activations", "Use bf16 instead of fp16"
    else:
        cause = f"the learning rate, {learning_rate:g} now, is too large"
        remedy = "Try a tenth of it, a longer warm-up (warmup_epochs), or clip gradients (max_grad_norm)"
    raise FloatingPointError(
        f"Found a loss of {loss.mean().item():g} at step {step + 1}. Training needs finite numbers; most likely "
        f"{cause}. {remedy}."
    )


class PlateauWarning(TrainerCallback):
    """Warns once if the training loss stays at that of guessing, ln(number of classes): how prompt tuning fails.

    Args:
        num_classes: Number of classes.
        patience: Epochs in a row, at least 1, after which to warn; in a run whose length and evaluations are counted
            in steps, evaluations.
        tolerance: How far below ln(number of classes), as a fraction of it, still counts as guessing.
    """

    def __init__(self, num_classes: int, patience: int = 5, tolerance: float = 0.02):
        self.guessing = math.log(num_classes)
        self.patience = patience
        self.tolerance = tolerance
        self._losses: list[float] = []
        self._stuck = 0
        # A run that goes on from the middle of an epoch begins it a second time.
        self._last_epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._losses, self._stuck, self._last_epoch = [], 0, 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._losses.append(float(logs["loss"]))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Here, not at the end of an epoch, where its last loss has not been logged yet.
        if not _counts_steps(args) and state.epoch > self._last_epoch + 1e-6 and state.epoch == int(state.epoch):
            self._last_epoch = int(state.epoch)
            self._count(args, kwargs.get("model"))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if _counts_steps(args):
            self._count(args, kwargs.get("model"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._count(args, kwargs.get("model"))

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses, "stuck": self._stuck, "last_epoch": self._last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses, self._stuck, self._last_epoch = list(state["losses"]), state["stuck"], state["last_epoch"]

    def _count(self, args: TrainingArguments, model: Any) -> None:
        """Looks at the losses of the epoch, or since the evaluation before, that has ended."""
        if not self._losses:
            return
        # The smallest one: the mean of an epoch that has begun to learn may still be that of guessing.
        learned = min(self._losses) < self.guessing * (1 - self.tolerance)
        self._losses.clear()
        self._stuck = 0 if learned else self._stuck + 1
        if self._stuck == self.patience:
            unit = "evaluations" if _counts_steps(args) else "epochs"
            # The callback serves other Trainers too, whose arguments know nothing of angles.
            angle = getattr(args, "prompt_angle", None)
            first = "Try"
            if angle is not None:
                first = f"Try another prompt_angle than {angle:g},"
            elif directions_of(model):
                first = "Let prompts turn (prompt_angle, as configs/<method>/default.yaml does), or try"
            warnings.warn(
                f"Found a training loss at that of guessing, {self.guessing:.3f}, for {self.patience} {unit}. Prompts "
                f"that learn fall below it within a few. {first} other learning rates than {args.learning_rate:g} (a "
                "tenth, ten times), a longer warm-up (warmup_epochs), another seed, or "
                "fewer prompts (num_virtual_tokens).",
                stacklevel=2,
            )


def _counts_steps(args: TrainingArguments) -> bool:
    """Whether a run may be one long epoch, as on a stream."""
    return args.max_steps > 0 and args.eval_strategy == IntervalStrategy.STEPS
