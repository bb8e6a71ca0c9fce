"""Steps on a sphere for what the loss feels the direction of alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..tuners.base import Direction
from .optimizer import directions_of, rates_of


if TYPE_CHECKING:
    from .arguments import TrainingArguments


# How far, relative to it, a length may be off before it is set anew. Above float32's rounding, so that weights that
# come back from a checkpoint are left as they are and a resumed run repeats the one that was not interrupted.
TOLERANCE = 1e-5

# Optimizers that look at weights for their decay alone; others (Adafactor, LAMB, LARS) measure steps by them.
SUPPORTED_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam)
SUPPORTED_OPTIMIZERS += (torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adagrad, torch.optim.Adadelta)


class DirectionalSteps:
    """Makes an optimizer turn prompts instead of adding to them, so that their length cannot run away.

    A deep prompt p reaches the loss through the norm before attention, which does not feel its length, so only its
    direction learns. Added steps make p longer and the next turn smaller, and weight decay makes it shorter and the
    next turn larger, until the loss jumps (methods and measurements: docs/learning_rate.md). Here the length is fixed:

    1. The optimizer proposes a step Δ, from the gradient at p. What it would decay is left out: the length is fixed.
    2. Its part along p, which does nothing, is taken off: Δ ← Δ − ⟨Δ, p⟩p / ‖p‖².
    3. With `angle`, p turns towards Δ by the learning rate θ of its group, in radians:
       p ← cos θ·p + sin θ·‖p‖·Δ / ‖Δ‖. Without, p ← ‖p‖·(p + Δ) / ‖p + Δ‖.

    θ follows the schedule as any learning rate. At the start each p is set to the length, which changes its effect no
    more than the norm's eps does. A p of zeros, as VAPT begins with, gets a random direction. There is no state: with
    the same settings a run goes on from a checkpoint bit for bit, and what is saved is an adapter like any other.

    What turns is a `Direction`: for VPT and PRO-VPT a prompt; for VAPT the row of the mixing weights that makes one,
    for BPT a row of F, and W as a whole, so that the prompts themselves turn by another angle.

    `ImageClassificationTrainer` does this with `prompt_norm` and `prompt_angle`. In a loop of one's own:

        >>> optimizer = torch.optim.AdamW(parameters, lr=0.1)  # radians
        >>> DirectionalSteps(directions_of(model), optimizer, angle=True)

    Args:
        directions: What turns; see `PromptTuner.directions`.
        optimizer: SGD, AdamW or another one that uses weights for their decay alone, with all tensors of the
            directions. Hooks are put on its `step`, which takes no closure then.
        norm: Length of a vector divided by the root of its number of elements (root mean square), above 0.
        angle: Whether learning rates of these tensors are angles in radians.
        seed: Seed of random directions, the same in all processes.

    Raises:
        TypeError: The optimizer looks at weights for more than their decay.
        ValueError: It lacks tensors of the directions, or turns something already.
    """

    def __init__(
        self,
        directions: Sequence[Direction],
        optimizer: torch.optim.Optimizer,
        norm: float = 1.0,
        angle: bool = False,
        seed: int = 0,
    ):
        optimizer = getattr(optimizer, "optimizer", optimizer)  # from inside of what Accelerate prepares
        if not isinstance(optimizer, SUPPORTED_OPTIMIZERS):
            raise TypeError(
                f"Found the optimizer {type(optimizer).__name__}. Turning prompts needs one whose steps do not depend "
                "on the weights' lengths: use optim=sgd or optim=adamw_torch, or leave prompt_norm and prompt_angle "
                "out."
            )
        known = rates_of(optimizer)
        if missing := [d for d in directions for tensor in d.tensors if id(tensor) not in known]:
            raise ValueError(
                f"Found {len(missing)} tensors of directions that the optimizer does not have. It must step all of "
                "them: make the optimizer of all trained parameters, or leave their directions out."
            )
        if getattr(optimizer, "turns_directions", False):
            raise ValueError(
                "Found an optimizer that turns directions already. Two of these would undo each other: call `remove` "
                "of the first one."
            )
        optimizer.turns_directions = True
        self.directions = list(directions)
        self.norm = norm
        self.angle = angle
        self._optimizer = optimizer
        self._before: list[list[torch.Tensor]] = []
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for direction in self.directions:
                _normalize(direction, norm, generator)
        self._hooks = (
            optimizer.register_step_pre_hook(self._set_aside),
            optimizer.register_step_post_hook(self._turn),
        )

    def remove(self) -> None:
        """Let the optimizer add to the prompts again, from where they are."""
        for hook in self._hooks:
            hook.remove()
        self._optimizer.turns_directions = False

    @torch.no_grad()
    def _set_aside(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if kwargs.get("closure") is not None or any(argument is not None for argument in args[1:]):
            raise ValueError(
                "Found optimizer.step(closure). While an optimizer steps, prompts that turn are set aside, and a "
                "closure would not see them. Compute loss and gradients first, and call step() without one."
            )
        # Of a step that ended with an error, such as too little memory.
        for direction, before in zip(self.directions, self._before):
            for tensor, start in zip(direction.tensors, before):
                tensor.copy_(start)
        # From zero the step is Δ itself, exactly, however small it is beside p, and there is nothing to decay.
        self._before = [[tensor.clone() for tensor in direction.tensors] for direction in self.directions]
        for direction in self.directions:
            for tensor in direction.tensors:
                tensor.zero_()

    @torch.no_grad()
    def _turn(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        rates = rates_of(optimizer)
        for direction, before in zip(self.directions, self._before):
            tensors, by_row = direction.tensors, direction.by_row
            length = length_of(before, by_row)
            along = dot(tensors, before, by_row) / length**2
            steps = [tensor - spread(along, tensor) * start for tensor, start in zip(tensors, before)]
            cosine = sine = torch.ones_like(length)
            if self.angle:
                theta, size = rates[id(tensors[0])], length_of(steps, by_row)
                # Where there is no step, there is no direction to turn to.
                cosine = torch.where(size > 0, math.cos(theta), 1.0)
                sine = torch.where(size > 0, math.sin(theta) * length / size, 0.0)
            for tensor, start, step in zip(tensors, before, steps):
                tensor.copy_(spread(cosine, start) * start + spread(sine, step) * step)
            _normalize(direction, self.norm)
        self._before = []


class LengthFloor:
    """Keeps prompts from becoming so short, by weight decay for one, that a step turns them too far.

    At the start and after each step of the optimizer, every vector shorter than the floor is set to it, with no effect
    on the loss. (VPT's own start is a length of 0.036 for ViT-B/16.)

    Args:
        directions: What has no effect but by its direction; see `PromptTuner.directions`.
        optimizer: The optimizer, of any kind. A hook is put on its `step`.
        floor: Least length divided by the root of the number of elements (root mean square), above 0.
    """

    def __init__(self, directions: Sequence[Direction], optimizer: torch.optim.Optimizer, floor: float):
        self.directions = list(directions)
        self.floor = floor
        self._lift()
        self._hook = optimizer.register_step_post_hook(lambda *_: self._lift())

    def remove(self) -> None:
        """Let the prompts shrink again."""
        self._hook.remove()

    @torch.no_grad()
    def _lift(self) -> None:
        for direction in self.directions:
            length = length_of(direction.tensors, direction.by_row)
            # Nothing makes a direction of zeros.
            factor = (self.floor * direction.unit / length).clamp_min(1).masked_fill(length == 0, 1)
            for tensor in direction.tensors:
                tensor.mul_(spread(factor, tensor))


def turn_prompts(
    optimizer: torch.optim.Optimizer,
    model: PreTrainedModel | PeftModel,
    args: TrainingArguments,
    uses_deepspeed: bool = False,
) -> None:
    """Do what `prompt_norm`, `prompt_angle` and `prompt_norm_floor` ask for; nothing where none is set.

    Args:
        optimizer: The optimizer, with its groups.
        model: The model whose prompts turn.
        args: These three and `seed` are read.
        uses_deepspeed: Whether the optimizer is to be DeepSpeed's, which works on weights of its own.

    Raises:
        ValueError: There is nothing to turn, PRO-VPT scores prompts by their length, or DeepSpeed keeps the weights.
    """
    asked = next(
        (n for n in ("prompt_angle", "prompt_norm", "prompt_norm_floor") if getattr(args, n) is not None), None
    )
    if asked is None:
        return
    directions = directions_of(model)
    if not directions:
        raise ValueError(
            f"Found {asked} and nothing that it is for. It needs deep prompts behind a norm, whose length has no "
            f"effect: leave {asked} out for shallow or pooled prompts, Swin-v2 and baselines, such as in "
            "configs/<method>/published.yaml."
        )
    if uses_deepspeed:
        raise ValueError(
            f"Found {asked} and DeepSpeed, whose optimizer keeps weights of its own. Launch with "
            "configs/accelerate/ddp.yaml or configs/accelerate/fsdp2.yaml."
        )
    if args.prompt_norm_floor is not None:
        LengthFloor(directions, optimizer, args.prompt_norm_floor)
        return
    configs = getattr(model, "peft_config", {}).values()
    if any(getattr(config, "score", None) == "norm" for config in configs):
        raise ValueError(
            f"Found {asked} and score='norm', which tells idle prompts by their length. With a fixed length all have "
            "the same: use score='attention' or 'gate'."
        )
    norm = 1.0 if args.prompt_norm is None else args.prompt_norm
    DirectionalSteps(directions, optimizer, norm, angle=args.prompt_angle is not None, seed=args.seed)


def dot(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], by_row: bool) -> torch.Tensor:
    """Inner product over all tensors, `(N,)` by row and `()` otherwise, in float32 at least."""
    products = [a.to(torch.promote_types(a.dtype, torch.float32)) * b for a, b in zip(left, right)]
    return sum(p.reshape(len(p), -1).sum(1) if by_row else p.sum() for p in products)


def length_of(tensors: Sequence[torch.Tensor], by_row: bool) -> torch.Tensor:
    return dot(tensors, tensors, by_row).sqrt()


def spread(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Numbers `(N,)` or `()` in a shape that multiplies a tensor's rows, or all of it."""
    return values.reshape(-1, *[1] * (like.ndim - 1)) if values.ndim else values


def _normalize(direction: Direction, norm: float, generator: torch.Generator | None = None) -> None:
    """Set the length of each vector, unless it has it already; with a generator, draw a direction where it is 0."""
    tensors, by_row = direction.tensors, direction.by_row
    length = length_of(tensors, by_row)
    if generator is not None:
        for tensor in tensors:
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
            if isinstance(tensor, DTensor):
                noise = distribute_tensor(noise, tensor.device_mesh, tensor.placements)
            tensor.add_(spread(length == 0, tensor) * noise)
        length = length_of(tensors, by_row)
    wanted = norm * direction.unit
    tolerance = max(TOLERANCE, torch.finfo(tensors[0].dtype).eps)
    factor = torch.where((length / wanted - 1).abs() > tolerance, wanted / length, 1.0)
    for tensor in tensors:
        tensor.mul_(spread(factor, tensor))
