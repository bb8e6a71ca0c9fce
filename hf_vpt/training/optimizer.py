"""Learning rates and weight decays of their own for the head and for normalisation layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..tuners.base import Direction, PromptTuner
from .models import head_parameters


if TYPE_CHECKING:
    from .arguments import TrainingArguments


Role = Literal["head", "norms", "directions", "prompts"]

NORM_LAYERS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def parameter_roles(model: PreTrainedModel | PeftModel) -> dict[nn.Parameter, Role]:
    """Say of every parameter whether it belongs to the head, to a normalisation layer, or to the rest.

    What counts is the module that holds a parameter, not its name. A normalisation layer in the head belongs to the
    head. The rest of an adapter are its prompts and what makes them (projections, projectors, pooling), of which
    some are learned in direction alone (`PromptTuner.directions`).
    """
    norms = [module for module in model.modules() if isinstance(module, NORM_LAYERS)]
    roles: dict[nn.Parameter, Role] = dict.fromkeys(model.parameters(), "prompts")
    roles.update({parameter: "norms" for module in norms for parameter in module.parameters()})
    roles.update({tensor: "directions" for direction in directions_of(model) for tensor in direction.tensors})
    roles.update(dict.fromkeys(head_parameters(model), "head"))
    return roles


def directions_of(model: PreTrainedModel | PeftModel) -> list[Direction]:
    """Return what of a model's active adapters is learned in direction alone; nothing where it has no prompts."""
    tuner = getattr(model, "base_model", None)
    names = tuner.active_adapters if isinstance(tuner, PromptTuner) else []
    return [direction for name in names for direction in tuner.directions(name)]


def group_by_role(
    optimizer: torch.optim.Optimizer,
    model: PreTrainedModel | PeftModel,
    args: TrainingArguments,
    decayed: set[nn.Parameter],
) -> None:
    """Move the head, normalisation layers and directions into groups with the settings that are made for them.

    Biases keep the weight decay 0, whatever they belong to. Groups that no setting is made for stay as they are, so
    that an optimizer's state fits those of earlier runs.

    Args:
        optimizer: What `Trainer.create_optimizer` has made. It is changed in place.
        model: The model whose parameters it holds.
        args: `head_learning_rate`, `head_weight_decay`, `norm_learning_rate`, `norm_weight_decay` and `prompt_angle`
            are read.
        decayed: Parameters that `Trainer` gives weight decay to: all but biases and normalisation layers.
    """
    settings = {
        "head": (args.head_learning_rate, args.head_weight_decay),
        "norms": (args.norm_learning_rate, args.norm_weight_decay),
        "directions": (args.prompt_angle, None),
    }
    settings = {role: own for role, own in settings.items() if own != (None, None)}
    if not settings:
        return
    roles = parameter_roles(model)
    # The weights of normalisation layers have no decay unless one is asked for.
    scales = {m.weight for m in model.modules() if isinstance(m, NORM_LAYERS) and m.weight is not None}
    for group in list(optimizer.param_groups):
        for role, (learning_rate, weight_decay) in settings.items():
            owned = [p for p in group["params"] if roles[p] == role]
            group["params"] = [p for p in group["params"] if roles[p] != role]
            has_decay = decayed | scales if role == "norms" else decayed
            weights = [p for p in owned if p in has_decay]
            biases = [p for p in owned if p not in has_decay]
            for members, decay in ((weights, weight_decay), (biases, None)):
                if not members:
                    continue
                own = {**group, "params": members}
                if role == "directions":
                    own |= {"lr": learning_rate, "is_angle": True}  # an angle, whatever the batch
                elif learning_rate is not None:
                    own["lr"] = learning_rate * args.learning_rate_factor
                if decay is not None:
                    own["weight_decay"] = decay
                optimizer.add_param_group(own)


def rates_of(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Return the learning rate, or the angle, that each parameter has now, by its `id`."""
    return {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
