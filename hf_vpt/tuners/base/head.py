"""The task head of a model with prompts: one for each adapter, each with classes of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...backbones import Backbone
from .block import BASE_ADAPTER
from .config import PromptConfig


@dataclass(frozen=True)
class Task:
    """What a head tells apart.

    Args:
        label_names: Names of the classes, in the order of the outputs; None where nobody knows them.
        problem_type: Transformers' word for the loss; None leaves it to be found by the labels.
    """

    label_names: tuple[str, ...] | None
    problem_type: str | None

    @classmethod
    def of_base(cls, model: nn.Module) -> Task:
        """That of the base model's own head, whichever adapter is active."""
        heads = [module for module in model.modules() if isinstance(module, TaskHead)]
        if heads:
            return heads[0].base_task
        config = getattr(model, "config", None)
        labels = getattr(config, "id2label", None) or {}
        names = tuple(str(labels[number]) for number in range(len(labels))) if _counts_from_zero(labels) else None
        return cls(names, getattr(config, "problem_type", None))

    def show_in(self, config: PreTrainedConfig) -> None:
        """Says so in a model's configuration, where losses and pipelines look."""
        config.problem_type = self.problem_type
        if self.label_names is not None:
            config.id2label = dict(enumerate(self.label_names))  # num_labels follows from it
            config.label2id = {name: number for number, name in enumerate(self.label_names)}


def _counts_from_zero(labels: Mapping[int, str]) -> bool:
    return set(labels) == set(range(len(labels)))


class TaskHead(ModulesToSaveWrapper):
    """The linear head of a classifier and the trained one of each adapter, which may know other and more classes.

    It differs from PEFT's wrapper in this: the head of an adapter has as many outputs as the adapter has
    `label_names`; the model's `config.id2label` names the classes of the head that is in use; in a batch of images of
    several adapters, the logits of those with fewer classes are filled up with −∞, so that argmax and softmax hold.

    Args:
        module_to_save: The base model's own head.
        adapter_name: The first adapter with a head of its own.
        config: The model's configuration.
        base: What the base model's own head tells apart.
        task: What that adapter tells apart.
    """

    def __init__(self, module_to_save: nn.Linear, adapter_name: str, config: PreTrainedConfig, base: Task, task: Task):
        # Not PEFT's own constructor in between, which passes no arguments on.
        AuxiliaryTrainingWrapper.__init__(self, module_to_save, adapter_name, config=config, base=base, task=task)

    def init_modules(self, adapter_name: str, config: PreTrainedConfig, base: Task, task: Task) -> None:
        super().init_modules(adapter_name)
        self._config = config
        self.base_task = base
        self._tasks: dict[str, Task] = {}

    def update(self, adapter_name: str, task: Task | None = None, **kwargs: Any) -> None:
        """Adds the head of an adapter; one that is there stays."""
        if adapter_name not in self.modules_to_save and task is not None:
            self._tasks[adapter_name] = task
            names = task.label_names
            if names is not None and len(names) != self.original_module.out_features:
                self.modules_to_save[adapter_name] = self._make_head(len(names))
        super().update(adapter_name)

    def _make_head(self, num_labels: int) -> nn.Linear:
        original = self.original_module
        weight, has_bias = original.weight, original.bias is not None
        head = nn.Linear(original.in_features, num_labels, has_bias, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(head.weight, std=getattr(self._config, "initializer_range", 0.02))
        if has_bias:
            nn.init.zeros_(head.bias)
        return head.requires_grad_(False).train(original.training)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        self._show_task()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._show_task()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        super().delete_adapter(adapter_name, new_active_adapters)
        self._tasks.pop(adapter_name, None)
        self._show_task()

    def release(self) -> nn.Linear:
        """The base model's head, with what the model's configuration says of it."""
        self.base_task.show_in(self._config)
        return self.original_module

    def _show_task(self) -> None:
        active = [] if self.disable_adapters else self.active_adapters
        task = self._tasks.get(active[0]) if active else None
        (task or self.base_task).show_in(self._config)

    def _mixed_batch_forward(
        self, input: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        heads = {
            name: self.original_module if name == BASE_ADAPTER else self.modules_to_save[name]
            for name in dict.fromkeys(adapter_names)
        }
        if not all(isinstance(head, nn.Linear) for head in heads.values()):
            return super()._mixed_batch_forward(input, *args, adapter_names=adapter_names, **kwargs)
        widest = max(head.out_features for head in heads.values())
        logits = input.new_full((*input.shape[:-1], widest), -torch.inf)
        for name, head in heads.items():
            rows = [row for row, other in enumerate(adapter_names) if other == name]
            logits[rows, ..., : head.out_features] = head(input[rows]).to(logits.dtype)
        return logits


def check_heads(heads: tuple[str, ...], model: nn.Module) -> None:
    """Raises if PEFT, which looks at how names end, would take parts of the backbone for a head that was found."""
    for head in heads:
        others = [name for name, _ in model.named_modules() if name.endswith(head) and name != head]
        if others:
            raise ValueError(
                f"Found a head called {head!r} and modules of the backbone whose names end like that: "
                f"{', '.join(others[:3])}. PEFT would train these as well, and the backbone must stay as it is. "
                "Give the head another name, such as 'classifier', or pass modules_to_save=[] to leave it frozen."
            )


def linear_heads(config: PromptConfig, backbone: Backbone, model: nn.Module) -> dict[str, nn.Module]:
    """The base model's own linear heads of which an adapter trains copies, by name."""
    heads = {}
    for name in backbone.heads:  # in their order, in which they are drawn
        if name not in config.modules_to_save:
            continue
        module = model.get_submodule(name)
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        if isinstance(module, nn.Linear):
            heads[name] = module
    return heads


def complete_task(config: PromptConfig, heads: dict[str, nn.Module], model: nn.Module) -> None:
    """Takes names of classes, if there are as many as the head has outputs, and the kind of problem from the model."""
    base = Task.of_base(model)
    if config.label_names is not None:
        if not heads and not config.saved_shapes:
            config.fail("label_names", "None: no linear head is trained, whose classes they would be")
    elif base.label_names and {head.out_features for head in heads.values()} == {len(base.label_names)}:
        config.label_names = list(base.label_names)
    if config.problem_type is None and heads and not config.saved_shapes:
        config.problem_type = base.problem_type


def check_modules_to_save(config: PromptConfig, model: nn.Module, heads: dict[str, nn.Module]) -> None:
    """Raises if a module to save is not there, or is not in the adapter file as the model will have it."""
    modules = dict(model.named_modules())
    for name in config.modules_to_save:
        found = [key for key in modules if key == name or key.endswith(f".{name}")]
        if not found:
            config.fail("modules_to_save", f"names of modules of the model; it has no {name!r}")
        module = modules[found[0]]
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        for tensor_name, tensor in module.state_dict().items():
            key, shape = f"{found[0]}.{tensor_name}", tuple(tensor.shape)
            if found[0] in heads and config.label_names is not None:
                shape = (len(config.label_names), *shape[1:])
            saved = config.saved_shapes.get(key) if config.saved_shapes else shape
            if saved is None:
                raise ValueError(
                    f"Found no {key} in the adapter file, but others of {name!r}. Predictions need the whole "
                    "head. Save the adapter again with `save_pretrained`, from a model with the same head."
                )
            if saved != shape:
                raise ValueError(
                    f"Found {key} of shape {saved} in the adapter file, where the model and the adapter's config "
                    f"ask for {shape}. All must agree. Load the base model that the adapter was trained on "
                    f"({config.base_model_name_or_path}), with as many labels."
                )


def wrap_heads(
    config: PromptConfig, heads: dict[str, nn.Module], model: nn.Module, adapter_name: str, is_active: bool
) -> None:
    """Gives an adapter heads of its own; PEFT, which would copy the base model's, finds them made."""
    base = Task.of_base(model)
    task = Task(None if config.label_names is None else tuple(config.label_names), config.problem_type)
    for name in heads if isinstance(model, PreTrainedModel) else ():
        module = model.get_submodule(name)
        if isinstance(module, TaskHead):
            module.update(adapter_name, task=task)
            continue
        head = TaskHead(module, adapter_name, model.config, base, task)
        if not is_active:
            head.set_adapter([])
        model.set_submodule(name, head)
