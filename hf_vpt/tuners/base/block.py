"""A transformer block with prompts: the one place where prompts meet a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import _active_collector

from ...attention import (
    KEYS_VALUES,
    PromptedAttentionConfig,
    PromptKeysValues,
    close_attention_for_prompts,
    open_attention_for_prompts,
)
from ...backbones import Backbone
from .prompts import Prompts


BASE_ADAPTER = "__base__"  # PEFT's name, in `adapter_names`, for an image that gets no adapter


@dataclass
class PromptBatch:
    """The prompts of a batch of images.

    Attributes:
        prompts: `(G, N, D)`, each entry once.
        rows: Entry that each image uses, `(B,)`; None where entry b is image b's, or the only one is everybody's.
        absent: Positions that are padding, `(B, N)` boolean; None where there is none.
    """

    prompts: torch.Tensor
    rows: torch.Tensor | None = None
    absent: torch.Tensor | None = None

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What takes the padding out of attention, `(B, 1, 1, N)`, to be added to the logits."""
        if self.absent is None:
            return None
        return self.absent[:, None, None].to(dtype) * torch.finfo(dtype).min


class PromptedBlock(nn.Module, BaseTunerLayer):
    """A block of a vision transformer and the prompts that its adapters add to it.

    Deep prompts enter the block's attention as extra keys and values, or, with `insertion="tokens"`, as tokens that
    are cut out of the block's output: the same function, kept as the plain reference. Shallow prompts enter block 0
    as tokens, stay in the hidden states of all blocks and leave after the last one. All shapes that a user can see
    (`output_hidden_states`, masks) are the base model's.

    Args:
        base_layer: The block.
        index: Its index in the backbone.
        backbone: The backbone's layout.
        prefix: Prefix of the method; the prompts of all adapters stand in `<prefix>prompts`.
    """

    def __init__(self, base_layer: nn.Module, index: int, backbone: Backbone, prefix: str):
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self.backbone = backbone
        self.insertion = "keys_values"
        # Watches prompts on their way into attention; PRO-VPT's scores come from it.
        self.observer = None
        self.adapter_layer_names = (f"{prefix}prompts",)
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        # In a list, so that torch does not take block 0 for a part of this block.
        self._first: list[PromptedBlock] = []
        open_attention_for_prompts(self.attention)
        self.train(base_layer.training)

    @property
    def prompts(self) -> nn.ModuleDict:
        """The prompts of each adapter that has some in this block."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def norm(self) -> nn.Module:
        return getattr(self.base_layer, self.backbone.record.norm)

    @property
    def attention(self) -> nn.Module:
        return getattr(self.base_layer, self.backbone.record.attention)

    def update_layer(self, adapter_name: str, prompts: Prompts) -> None:
        """Adds the prompts of an adapter."""
        self.prompts[adapter_name] = prompts
        prompts.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def release(self) -> nn.Module:
        """The bare block, as it was before it was wrapped."""
        close_attention_for_prompts(self.attention)
        return self.base_layer.train(self.training)

    def train(self, mode: bool = True) -> PromptedBlock:
        """Sets the mode of the prompts; the frozen block's own dropout and stochastic depth stay off."""
        super().train(mode)
        silence_frozen_modules(self)
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise_merge_error()

    def unmerge(self) -> None:
        raise_merge_error()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # PEFT looks for a `weight`, which a block does not have.
        parameter = next(p for p in base_layer.parameters() if p.is_floating_point())
        return parameter.device, parameter.dtype

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Runs the block.

        Args:
            hidden_states: `(B, T, D)`, with the N shallow prompts after the prefix from block 1 on.
            adapter_names: Adapter of each image; None for the active ones on all images.
            args: The block's other arguments, the attention mask first.
            kwargs: The block's keyword arguments.
        """
        if self.disable_adapters:
            return self.base_layer(hidden_states, *args, **kwargs)
        num_flowing, absent = self._flowing(hidden_states, adapter_names)
        tokens = hidden_states
        if num_flowing and self.index == 0:
            flowing = self._make(hidden_states, adapter_names, deep=False)
            tokens = self._insert(hidden_states, flowing)
        elif num_flowing:
            hidden_states = self._strip(hidden_states, num_flowing)
        inserted = num_flowing
        deep = self._make(hidden_states, adapter_names, deep=True)
        keys_values = None
        if deep is not None and self.insertion == "tokens":
            tokens = self._insert(tokens, deep)
            inserted += deep.prompts.shape[1]
            absent = _join_absent(deep.absent, absent, (deep.prompts.shape[1], num_flowing))
        elif deep is not None:
            if not isinstance(self.attention.config, PromptedAttentionConfig):
                self._raise_not_arrived()  # here too: a compiled graph cannot look afterwards
            keys_values = self._keys_values(deep, tokens.dtype)
            kwargs[KEYS_VALUES] = keys_values
        if inserted:
            args, kwargs = self._insert_into_mask(tokens, inserted, absent, args, kwargs)

        output = self.base_layer(tokens, *args, **kwargs)

        if keys_values is not None and not keys_values.arrived and not torch.compiler.is_compiling():
            self._raise_not_arrived()
        if not inserted:
            return output
        visible = self._strip(output, inserted)
        _show(visible, instead_of=output, initial=hidden_states if self.index == 0 else None)
        if not num_flowing or self.index == self.backbone.num_layers - 1:
            return visible
        return self._strip(output, inserted - num_flowing)

    def _raise_not_arrived(self) -> None:
        raise RuntimeError(
            f"Found that the prompts of block {self.index} did not reach the attention of "
            f"{type(self.attention).__name__}. They need the attention interface of Transformers. Undo what replaced "
            "the config or the forward of the attention module, or use `model.base_model.set_insertion('tokens')`."
        )

    # Prompts of a batch

    def _selected(self, adapter_names: Sequence[str] | None, deep: bool) -> dict[str, list[int] | None]:
        """Adapters with deep (or shallow) prompts in this block, and the images they are for (None: all)."""
        names = self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        return {
            name: None if adapter_names is None else [i for i, a in enumerate(adapter_names) if a == name]
            for name in names
            if name in self.prompts and self.prompts[name].deep == deep
        }

    def _flowing(
        self, hidden_states: torch.Tensor, adapter_names: Sequence[str] | None
    ) -> tuple[int, torch.Tensor | None]:
        """Number of shallow prompts in the hidden states and which of them are padding `(B, N)`."""
        first = self if self.index == 0 else next(iter(self._first), None)
        selected = {} if first is None else first._selected(adapter_names, deep=False)
        sizes = {name: first.prompts[name].num_virtual_tokens for name in selected}
        if adapter_names is None:
            return sum(sizes.values()), None
        return max(sizes.values(), default=0), _padding(adapter_names, sizes, hidden_states.device)

    def _make(
        self, hidden_states: torch.Tensor, adapter_names: Sequence[str] | None, deep: bool
    ) -> PromptBatch | None:
        """The prompts of all selected adapters for a batch; None where there are none."""
        made, rows_of = {}, self._selected(adapter_names, deep)
        for name, rows in rows_of.items():
            prompts = self.prompts[name](hidden_states if rows is None else hidden_states[rows])
            # The token's dtype: an adapter kept in float32 would make the frozen norm fail on a bfloat16 model.
            made[name] = prompts.to(hidden_states.dtype)
        sizes = {name: prompts.shape[1] for name, prompts in made.items()}
        if not any(sizes.values()):
            return None
        if adapter_names is None:
            batch_size = max(prompts.shape[0] for prompts in made.values())
            return PromptBatch(torch.cat([prompts.expand(batch_size, -1, -1) for prompts in made.values()], dim=1))
        entries, rows, start = [], [0] * len(adapter_names), 0
        for name, prompts in made.items():
            entries.append(nn.functional.pad(prompts, (0, 0, 0, max(sizes.values()) - sizes[name])))
            for position, row in enumerate(rows_of[name]):
                rows[row] = start + (position if prompts.shape[0] > 1 else 0)
            start += prompts.shape[0]
        device = hidden_states.device
        return PromptBatch(
            torch.cat(entries), torch.tensor(rows, device=device), _padding(adapter_names, sizes, device)
        )

    # The two ways in

    def _keys_values(self, batch: PromptBatch, dtype: torch.dtype) -> PromptKeysValues:
        """Keys and values of prompts, by the block's own frozen norm and projections."""
        checkpointing = getattr(self.base_layer, "gradient_checkpointing", False) and self.training
        keywords = getattr(self.base_layer._gradient_checkpointing_func, "keywords", {}) if checkpointing else {}
        if keywords.get("use_reentrant"):
            raise ValueError(
                "Found reentrant gradient checkpointing, which loses the gradient of prompts. They need the "
                "non-reentrant form. Use gradient_checkpointing_enable(gradient_checkpointing_kwargs="
                "{'use_reentrant': False})."
            )
        bias = batch.bias(dtype)
        normed = self.norm(batch.prompts)
        if self.observer is not None:
            bias = self.observer(self, batch.prompts, normed, bias)
        shape = (*normed.shape[:-1], -1, self.attention.head_dim)
        key = self.attention.k_proj(normed).view(shape).transpose(1, 2)
        value = self.attention.v_proj(normed).view(shape).transpose(1, 2)
        if batch.rows is not None:
            key, value = key[batch.rows], value[batch.rows]
        return PromptKeysValues(key, value, bias)

    def _insert(self, tokens: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
        """`(B, T, D)` to `(B, T + N, D)`, the prompts right after the prefix."""
        prompts = batch.prompts if batch.rows is None else batch.prompts[batch.rows]
        prompts = prompts.expand(tokens.shape[0], -1, -1)
        start = self.backbone.num_prefix_tokens
        return torch.cat([tokens[:, :start], prompts, tokens[:, start:]], dim=1)

    def _strip(self, tokens: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """`(B, T + n, D)` to `(B, T, D)`: takes n tokens after the prefix out again."""
        if not num_tokens:
            return tokens
        start = self.backbone.num_prefix_tokens
        return torch.cat([tokens[:, :start], tokens[:, start + num_tokens :]], dim=1)

    def _insert_into_mask(
        self,
        tokens: torch.Tensor,
        num_tokens: int,
        absent: torch.Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The block's arguments with a mask `(1|B, 1|heads, 1|T, T)` that knows n more tokens after the prefix."""
        mask = args[0] if args else kwargs.get("attention_mask")
        start = self.backbone.num_prefix_tokens
        if mask is None and absent is None:
            return args, kwargs
        if mask is None:
            mask = tokens.new_zeros(1, 1, 1, tokens.shape[1] - num_tokens)
        attend = mask.dtype == torch.bool
        if mask.shape[2] > 1:
            # Prompts see what the first token, CLS, sees: a token that is hidden must not come in through them.
            rows = mask[:, :, :1].expand(-1, -1, num_tokens, -1)
            mask = torch.cat([mask[:, :, :start], rows, mask[:, :, start:]], dim=2)
        if absent is None:
            columns = mask.new_full((*mask.shape[:3], num_tokens), attend)
        else:
            columns = ~absent if attend else absent.to(mask.dtype) * torch.finfo(mask.dtype).min
            mask = mask.expand(absent.shape[0], -1, -1, -1)
            columns = columns[:, None, None].expand(*mask.shape[:3], -1)
        mask = torch.cat([mask[..., :start], columns, mask[..., start:]], dim=3)
        return ((mask, *args[1:]), kwargs) if args else (args, {**kwargs, "attention_mask": mask})


def _padding(adapter_names: Sequence[str], sizes: dict[str, int], device: torch.device) -> torch.Tensor | None:
    """Which of N prompts, N the largest of `sizes`, an image's adapter does not have, `(B, N)`; None where all do."""
    width = max(sizes.values(), default=0)
    counts = [sizes.get(name, 0) for name in adapter_names]
    if all(count == width for count in counts):
        return None
    return torch.arange(width, device=device) >= torch.tensor(counts, device=device)[:, None]


def _join_absent(
    left: torch.Tensor | None, right: torch.Tensor | None, widths: tuple[int, int]
) -> torch.Tensor | None:
    """Padding of two groups of tokens that stand side by side, `(B, widths[0] + widths[1])`."""
    known = left if left is not None else right
    if known is None:
        return None
    parts = [
        known.new_zeros(known.shape[0], width) if part is None else part
        for part, width in zip((left, right), widths, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _show(visible: torch.Tensor, instead_of: torch.Tensor, initial: torch.Tensor | None) -> None:
    """Lets Transformers' recorder of hidden states keep a block's output, and block 0's input, without prompts.

    The recorder is a hook on the block itself, which ran on more tokens than the model knows of.
    """
    states = (_active_collector.get() or {}).get("hidden_states")
    if not states:
        return
    if states[-1] is instead_of:
        states[-1] = visible
    if initial is not None and states[0] is not None:
        states[0] = initial


def silence_frozen_modules(module: nn.Module) -> None:
    """Turns dropout and stochastic depth off in everything below `module` that is neither an adapter nor a head.

    The modules that ask `self.training` whether to checkpoint keep their mode: without it there is no checkpointing.
    """
    for child in module.children():
        if isinstance(child, (Prompts, AuxiliaryTrainingWrapper)):
            continue
        if not isinstance(child, (GradientCheckpointingLayer, PreTrainedModel, PromptedBlock)):
            child.training = False
        silence_frozen_modules(child)


def raise_merge_error() -> None:
    """Says why prompts cannot be merged."""
    raise NotImplementedError(
        "Found a request to merge prompts into the weights. Prompts are extra keys and values, so no weight of the "
        "backbone can hold them. Keep the adapter beside the model, or get the bare model back with `unload()`."
    )
