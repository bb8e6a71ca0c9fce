"""Exponential moving average of the trained weights, as a `Trainer` callback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


# Folder, inside of that of the last weights, in which the averaged ones are saved.
EMA_FOLDER = "ema"


class ExponentialMovingAverage(TrainerCallback):
    """Keeps an average of the weights that training passes through, which often scores better than the last ones.

    After each optimiser step ā ← d·ā + (1 − d)·w, from ā = w before the first one, for every trained parameter w.
    After k steps the weights before training still count d^k, so d should be chosen with d^k near 0. Averages are kept
    in float32 at least, because in bfloat16 small steps would be rounded away. Buffers are not averaged.

    PRO-VPT's prompts do not move in memory: the buffer that says which block a row serves is taken as it is now, and
    each row is averaged with what it was, also while it served another block. A row that has moved therefore takes
    about 1/(1 − d) steps to arrive in its new block.

    `ImageClassificationTrainer` adds one where `ema_decay` is set, scores its weights beside the last ones
    (`eval_ema_accuracy`), and saves them in `ema/`. In a loop of one's own:

        >>> average = ExponentialMovingAverage(0.999)
        >>> average.start(model)
        >>> ...  # after each step of the optimizer
        >>> average.update(model)
        >>> with average.averaged(model):
        ...     model.save_pretrained("averaged")

    Args:
        decay: d in [0, 1); BPT's published code uses 0.9999.

    Raises:
        ValueError: The decay is out of its range.
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(
                f"ema_decay is {decay:g}. It must be at least 0 and less than 1, such as 0.999: correct it, or leave "
                "it out for no average."
            )
        self.decay = decay
        self.averages: dict[str, torch.Tensor] | None = None
        self._is_restored = False

    def start(self, model: nn.Module) -> None:
        """Begin anew, from the weights that a model has now."""
        self.averages = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights after an optimiser step into the average."""
        parameters = dict(model.named_parameters())
        for name, average in self.averages.items():
            average.lerp_(parameters[name].to(average.dtype), 1 - self.decay)

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[None]:
        """Give a model its averaged weights within a `with` block; afterwards it has the last ones, bit for bit."""
        parameters = dict(model.named_parameters())
        last = {name: parameters[name].detach().clone() for name in self.averages}
        _copy(self.averages, parameters)
        try:
            yield
        finally:
            _copy(last, parameters)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._is_restored:
            self.start(model)
            return
        self._is_restored = False
        # A checkpoint is read to the CPU.
        parameters = dict(model.named_parameters())
        self.averages = {name: average.to(parameters[name].device) for name, average in self.averages.items()}

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        # In fp16, gradients that overflow are thrown away; that was no step.
        if not getattr(optimizer, "step_was_skipped", False):
            self.update(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_restored = False

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from averages that were saved; before training or after it."""
        self.averages, self._is_restored = state["averages"], True


@torch.no_grad()
def _copy(values: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
