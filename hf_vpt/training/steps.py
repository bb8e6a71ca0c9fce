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
from .optimizer import directions_of


STEPS_FILE = "steps.json"


class StepRecorder(TrainerCallback):
    """Records, for every optimiser step, the loss and what the step does to each `Direction` of an adapter.

    For a prompt p with the gradient g, before the step and after it, each the mean over the rows of a table:

    - `length`: root mean square of p's elements before the step;
    - `turn`: angle between p before and after, in radians;
    - `cosine`: |⟨g, p⟩| / (‖g‖·‖p‖), 0 where the loss does not feel p's length;
    - `gradient`: ‖g‖·‖p‖, the slope of the loss in radians, which does not depend on p's length.

    `ImageClassificationTrainer` calls it; `train_classifier` adds one with `record_steps`, and `steps.json` then lies
    in the output folder: lists over steps under `loss` and `learning_rate`, and those four under `directions` for each
    name in the model.
    """

    def __init__(self) -> None:
        self.steps: dict[str, Any] = {"loss": [], "learning_rate": [], "directions": {}}
        self._loss = 0.0
        self._before: list[list[torch.Tensor]] = []

    def on_backward(self, loss: torch.Tensor, num_images: int) -> None:
        self._loss += loss.item()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        self.steps["loss"].append(self._loss)
        self.steps["learning_rate"].append(max(group["lr"] for group in optimizer.param_groups))
        self._loss = 0.0
        self._before = []
        names = {id(tensor): name for name, tensor in model.named_parameters()}
        for direction in directions_of(model):
            tensors, by_row = direction.tensors, direction.by_row
            gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
            self._before.append([tensor.detach().clone() for tensor in tensors])
            length, slope = length_of(tensors, by_row), length_of(gradients, by_row)
            cosine = dot(gradients, tensors, by_row) / (slope * length).clamp_min(torch.finfo(length.dtype).tiny)
            own = self.steps["directions"].setdefault(names[id(tensors[0])], {})
            values = {"length": length / direction.unit, "cosine": cosine.abs(), "gradient": slope * length}
            for key, value in values.items():
                own.setdefault(key, []).append(value.mean().item())

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        for direction, before, own in zip(
            directions_of(model), self._before, self.steps["directions"].values(), strict=True
        ):
            after, by_row = direction.tensors, direction.by_row
            # By the chord, because the cosine of a small angle is 1 in float32.
            lengths = (length_of(before, by_row), length_of(after, by_row))
            units = [
                [t / spread(length.clamp_min(torch.finfo(length.dtype).tiny), t) for t in tensors]
                for tensors, length in zip((before, after), lengths)
            ]
            chord = length_of([b - a for b, a in zip(*units)], by_row)
            turn = 2 * torch.asin((chord / 2).clamp(max=1))
            own.setdefault("turn", []).append(turn.mean().item())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / STEPS_FILE, json.dumps(self.steps) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return self.steps

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state
