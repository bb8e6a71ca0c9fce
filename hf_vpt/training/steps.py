"""What prompts do in each step: how long they are, how far they turn, and where their gradient points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import write_whole
from .directions import dot, length_of, spread
from .optimizer import directions_of, rates_of


STEPS_FILE = "steps.json"


class StepRecorder(TrainerCallback):
    """Records, for every optimiser step, the loss and what the step does to each `Direction` of an adapter.

    For a prompt p with the gradient g, before the step and after it, each the mean over the rows of a table:

    - `length`: root mean square of p's elements before the step;
    - `turn`: angle between p before and after, in radians;
    - `cosine`: |⟨g, p⟩| / (‖g‖·‖p‖), 0 where the loss does not feel p's length;
    - `gradient`: ‖g‖·‖p‖, the slope of the loss in radians, which does not depend on p's length. Gradients are those
      before clipping; in fp16 they are multiplied by the scale of the loss;
    - `learning_rate`, or angle, of the step.

    `ImageClassificationTrainer` calls it; `train_classifier` adds one with `record_steps`. `steps.json` then lies in
    the output folder, also after a run that diverged: the list over steps under `loss`, of the first process, and
    those five under `directions` for each name in the model.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.steps: dict[str, Any] = {"loss": [], "directions": {}}
        self._loss = 0.0
        self._gradients: list[list[torch.Tensor]] = []
        self._before: list[list[torch.Tensor]] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step == 0:
            self._forget()
        self._directions = directions_of(model)
        names = {id(tensor): name for name, tensor in model.named_parameters()}
        self._names = [names[id(direction.tensors[0])] for direction in self._directions]
        self._folder = Path(args.output_dir) if state.is_world_process_zero else None

    def on_backward(self, loss: torch.Tensor, num_images: int) -> None:
        self._loss += loss.item()
        # Complete after the last backward pass of a step, and not clipped yet.
        self._gradients = [
            [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in direction.tensors]
            for direction in self._directions
        ]

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        self.steps["loss"].append(self._loss)
        self._loss = 0.0
        rates = rates_of(optimizer)
        self._before = []
        for name, direction, gradients in zip(self._names, self._directions, self._gradients, strict=True):
            tensors, by_row = direction.tensors, direction.by_row
            self._before.append([tensor.detach().clone() for tensor in tensors])
            length, slope = length_of(tensors, by_row), length_of(gradients, by_row)
            product = slope * length
            # A gradient may be too small to be squared.
            cosine = torch.where(product > 0, dot(gradients, tensors, by_row) / product, 0.0)
            values = {"length": length / direction.unit, "cosine": cosine.abs(), "gradient": product}
            own = self.steps["directions"].setdefault(name, {})
            for key, value in values.items():
                own.setdefault(key, []).append(value.mean().item())
            own.setdefault("learning_rate", []).append(rates[id(tensors[0])])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, direction, before in zip(self._names, self._directions, self._before, strict=True):
            after, by_row = direction.tensors, direction.by_row
            # By the chord, because the cosine of a small angle is 1 in float32.
            lengths = (length_of(before, by_row), length_of(after, by_row))
            units = [
                [t / spread(length.clamp_min(torch.finfo(length.dtype).tiny), t) for t in tensors]
                for tensors, length in zip((before, after), lengths)
            ]
            chord = length_of([b - a for b, a in zip(*units)], by_row)
            turn = 2 * torch.asin((chord / 2).clamp(max=1))
            self.steps["directions"][name].setdefault("turn", []).append(turn.mean().item())

    def close(self) -> None:
        """Writes what is there, however training ended."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / STEPS_FILE, json.dumps(self.steps) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return self.steps

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state
