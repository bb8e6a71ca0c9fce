"""A transformer block with prompts: the one place where prompts meet a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import _active_collector

from ...attention import INSERTED, AttentionAccess, InsertedPrompts, PromptKeysValues, insert_into_mask
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
        pooled: Positions whose outputs go into the image's feature, `(1|B, N)` boolean; None where none do.
    """

    prompts: torch.Tensor
    rows: torch.Tensor | None = None
    absent: torch.Tensor | None = None
    pooled: torch.Tensor | None = None

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What takes the padding out of attention, `(B, 1, 1, N)`, to be added to the logits."""
        if self.absent is None:
            return None
        return self.absent[:, None, None].to(dtype) * torch.finfo(dtype).min

    def for_images(self, batch_size: int) -> PromptBatch:
        """The same with an entry for each of B images."""
        prompts = self.prompts if self.rows is None else self.prompts[self.rows]
        return PromptBatch(prompts.expand(batch_size, -1, -1), None, self.absent, self.pooled)

    def followed_by(self, other: PromptBatch | None) -> PromptBatch:
        """This batch, of one entry an image, and another one side by side."""
        if other is None:
            return self
        batch_size, num_prompts, _ = self.prompts.shape
        other = other.for_images(batch_size)
        widths = (num_prompts, other.prompts.shape[1])
        return PromptBatch(
            torch.cat([self.prompts, other.prompts], dim=1),
            None,
            _join_flags(self.absent, other.absent, widths),
            _join_flags(self.pooled, other.pooled, widths),
        )


class PromptedBlock(nn.Module, BaseTunerLayer):
    """A block of a vision transformer and the prompts that its adapters add to it.

    Deep prompts enter the block's attention as extra keys and values, or, with `insertion="tokens"`, as tokens that
    are cut out of the block's output: the same function, kept as the plain reference. Shallow prompts enter block 0
    as tokens, stay in the hidden states of all blocks and leave after the last one. Where attention runs in windows,
    prompts cannot stand among the tokens: shallow ones flow beside them (`hf_vpt.windows`). All shapes that a user can
    see (`output_hidden_states`, masks) are the base model's.

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
        # Prompts of the active adapters, in their order. A forward pass finds them by position and not by name: code
        # that was compiled for one adapter then serves every other one with prompts of the same shapes.
        self._active: list[Prompts] = []
        # Adapters that may train although they are not active.
        self._trained_beside: set[str] = set()
        # In lists, so that torch does not take them for parts of this block.
        self._first: list[PromptedBlock] = []
        self._merging_before: list[nn.Module] = []
        # Whether shallow prompts leave the hidden states between blocks that have no windows, too.
        self.carries = False
        # Kept by block 0, from one block to the next: prompts that flow beside the tokens.
        self.carried: PromptBatch | None = None
        # Kept by the last block until the tokens are pooled: what its prompts became.
        self.outputs: PromptBatch | None = None
        self.access.open(self.attention)
        self.train(base_layer.training)

    @property
    def prompts(self) -> nn.ModuleDict:
        """The prompts of each adapter that has some in this block."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def norm(self) -> nn.Module | None:
        """The norm before attention; None where attention gets the tokens as they are."""
        name = self.backbone.record.norm
        return None if name is None else getattr(self.base_layer, name)

    @property
    def attention(self) -> nn.Module:
        return self.base_layer.get_submodule(self.backbone.record.attention)

    @property
    def access(self) -> AttentionAccess:
        return self.backbone.record.access

    @property
    def first(self) -> PromptedBlock | None:
        """Block 0, if it is wrapped."""
        return self if self.index == 0 else next(iter(self._first), None)

    @property
    def is_last(self) -> bool:
        return self.index == self.backbone.num_layers - 1

    def update_layer(self, adapter_name: str, prompts: Prompts) -> None:
        """Adds the prompts of an adapter."""
        self.prompts[adapter_name] = prompts
        prompts.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters the active ones, in a time that does not depend on how many there are."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        # PEFT visits every adapter. The others are frozen already.
        for name in {*self.active_adapters, *self._trained_beside, *names}:
            if name in self.prompts:
                self.prompts[name].requires_grad_(name in names and not inference_mode)
        self._trained_beside.clear()
        self._active_adapter = names
        self._list_active()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._trained_beside.update([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._list_active()

    def _list_active(self) -> None:
        self._active = [self.prompts[name] for name in self.active_adapters if name in self.prompts]

    def forget(self) -> None:
        """Drops what a forward pass that failed has left for a later block or for the pooler."""
        self.carried = self.outputs = None

    def __getstate__(self) -> dict[str, Any]:
        # Tensors with a graph cannot be copied, and mean nothing outside of their forward pass.
        return {**self.__dict__, "carried": None, "outputs": None}

    def release(self) -> nn.Module:
        """The bare block, as it was before it was wrapped."""
        self.access.close(self.attention)
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
        if self.backbone.record.windows is not None:
            return self._forward_beside(hidden_states, adapter_names, args, kwargs)
        num_flowing, absent = self._flowing(hidden_states, adapter_names)
        tokens = hidden_states
        if num_flowing and (self.index == 0 or self.carries):
            flowing = self._receive(hidden_states, adapter_names)
            tokens = self._insert(hidden_states, flowing)
        elif num_flowing:
            hidden_states = self._strip(hidden_states, num_flowing)
        inserted = num_flowing
        deep = self._make(hidden_states, adapter_names, deep=True)
        keys_values = None
        if deep is not None and self.insertion == "tokens":
            tokens = self._insert(tokens, deep)
            inserted += deep.prompts.shape[1]
            absent = _join_flags(deep.absent, absent, (deep.prompts.shape[1], num_flowing))
        elif deep is not None:
            keys_values = self._keys_values(deep, tokens.dtype)
        if inserted:
            args, kwargs = self._insert_into_mask(tokens, inserted, absent, args, kwargs)

        output = self._run(tokens, keys_values, args, kwargs)

        if not inserted:
            return output
        all_tokens = _tokens_of(output)
        visible = self._strip(all_tokens, inserted)
        _show(visible, instead_of=all_tokens)
        if self.index == 0:
            _show(hidden_states, instead_of=tokens)
        if num_flowing and self.carries and not self.is_last:
            stop = self.backbone.num_prefix_tokens + inserted
            self.first.carried = PromptBatch(all_tokens[:, stop - num_flowing : stop])
        if not num_flowing or self.is_last or self.carries:
            return _with_tokens(output, visible)
        return _with_tokens(output, self._strip(all_tokens, inserted - num_flowing))

    def _forward_beside(
        self,
        hidden_states: torch.Tensor,
        adapter_names: Sequence[str] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs a block whose attention splits the tokens into windows."""
        flowing = self._receive(hidden_states, adapter_names)
        batch = self._make(hidden_states, adapter_names, deep=True)
        num_queries = 0
        if flowing is not None:
            num_queries = flowing.prompts.shape[1]
            batch = flowing.followed_by(batch)
        if batch is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        if self.is_last:
            # What prompts become here is thrown away, unless it is part of the image's feature.
            num_queries = 0
            if batch.pooled is not None:
                batch = batch.for_images(hidden_states.shape[0])
                num_queries = batch.prompts.shape[1]
        keys_values = self._keys_values(batch, hidden_states.dtype, num_queries)
        output = self._run(hidden_states, keys_values, args, kwargs)
        if num_queries:
            went_in = batch.prompts[:, :num_queries]
            outputs = self.backbone.record.windows.finish_block(self.base_layer, went_in, keys_values.attended)
            if self.is_last:
                self.outputs = PromptBatch(outputs, None, batch.absent, batch.pooled)
            else:
                self.first.carried = PromptBatch(outputs, None, flowing.absent, flowing.pooled)
        return output

    def _receive(self, hidden_states: torch.Tensor, adapter_names: Sequence[str] | None) -> PromptBatch | None:
        """Shallow prompts as they reach this block, `(B, N, D)` each; None where there are none."""
        if self.index == 0:
            made = self._make(hidden_states, adapter_names, deep=False)
            self.carried = None
            return None if made is None else made.for_images(hidden_states.shape[0])
        if self.first is None or self.first.carried is None:
            return None
        received, self.first.carried = self.first.carried, None
        if self._merging_before:
            received.prompts = self.backbone.record.windows.merge(self._merging_before[0], received.prompts)
        return received

    def _run(
        self,
        tokens: torch.Tensor,
        keys_values: PromptKeysValues | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs the block with more keys and values, and makes sure that they arrive."""
        if keys_values is None:
            return self.base_layer(tokens, *args, **kwargs)
        if not self.access.is_open(self.attention):
            self._raise_not_arrived()  # here too: a compiled graph cannot look afterwards
        try:
            kwargs = self.access.hand_over(self.attention, keys_values, kwargs)
            output = self.base_layer(tokens, *args, **kwargs)
        finally:
            self.access.hand_over(self.attention, None, {})
        if not keys_values.arrived and not torch.compiler.is_compiling():
            self._raise_not_arrived()
        return output

    def _raise_not_arrived(self) -> None:
        raise RuntimeError(
            f"Found that the prompts of block {self.index} did not reach the attention of "
            f"{type(self.attention).__name__}. They need that module as it was when the adapter was made. Undo "
            "what replaced its config, class or forward, or use `model.base_model.set_insertion('tokens')`."
        )

    # Prompts of a batch

    def used_prompts(self, adapter_names: Sequence[str] | None = None) -> list[Prompts]:
        """The prompts of this block that a forward pass uses; for `adapter_names` see `num_prompts`."""
        if self.disable_adapters:
            return []
        if adapter_names is None:
            return list(self._active)
        return [self.prompts[name] for name in dict.fromkeys(adapter_names) if name in self.prompts]

    def _selected(
        self, adapter_names: Sequence[str] | None, deep: bool
    ) -> dict[str | int, tuple[Prompts, list[int] | None]]:
        """Deep (or shallow) prompts of this block by adapter, and the images they are for.

        Without `adapter_names` those of the active adapters, by their position, for all images (None).
        """
        if adapter_names is None:
            active = enumerate(self._active)
            return {position: (prompts, None) for position, prompts in active if prompts.deep == deep}
        return {
            name: (self.prompts[name], [i for i, a in enumerate(adapter_names) if a == name])
            for name in dict.fromkeys(adapter_names)
            if name in self.prompts and self.prompts[name].deep == deep
        }

    def _flowing(
        self, hidden_states: torch.Tensor, adapter_names: Sequence[str] | None
    ) -> tuple[int, torch.Tensor | None]:
        """Number of shallow prompts in the hidden states and which of them are padding `(B, N)`."""
        selected = {} if self.first is None else self.first._selected(adapter_names, deep=False)
        sizes = {name: prompts.num_virtual_tokens for name, (prompts, _) in selected.items()}
        if adapter_names is None:
            return sum(sizes.values()), None
        return max(sizes.values(), default=0), _padding(adapter_names, sizes, hidden_states.device)

    def num_prompts(self, adapter_names: Sequence[str] | None = None) -> tuple[int, int]:
        """Numbers of shallow and of deep prompts among the columns of this block's attention.

        Args:
            adapter_names: Adapter of each image; None for the active ones on all images.
        """
        if self.disable_adapters:
            return 0, 0
        shallow = {} if self.first is None else self.first._selected(adapter_names, deep=False)
        deep = self._selected(adapter_names, deep=True)
        join = sum if adapter_names is None else partial(max, default=0)
        return (
            join(prompts.num_virtual_tokens for prompts, _ in shallow.values()),
            join(prompts.count for prompts, _ in deep.values()),
        )

    def _make(
        self, hidden_states: torch.Tensor, adapter_names: Sequence[str] | None, deep: bool
    ) -> PromptBatch | None:
        """The prompts of all selected adapters for a batch; None where there are none."""
        made, pooled, selected = {}, set(), self._selected(adapter_names, deep)
        for name, (prompts, rows) in selected.items():
            # The token's dtype: an adapter kept in float32 would make the frozen norm fail on a bfloat16 model.
            made[name] = prompts(hidden_states if rows is None else hidden_states[rows]).to(hidden_states.dtype)
            if prompts.pooled:
                pooled.add(name)
        sizes = {name: prompts.shape[1] for name, prompts in made.items()}
        if not any(sizes.values()):
            return None
        if adapter_names is None:
            if len(made) == 1 and not pooled:
                return PromptBatch(next(iter(made.values())))
            batch_size = max(prompts.shape[0] for prompts in made.values())
            prompts = torch.cat([prompts.expand(batch_size, -1, -1) for prompts in made.values()], dim=1)
            flags = [name in pooled for name in made for _ in range(sizes[name])]
            return PromptBatch(prompts, pooled=torch.tensor([flags], device=prompts.device) if pooled else None)
        entries, rows_of_images, start = [], [0] * len(adapter_names), 0
        for name, prompts in made.items():
            entries.append(nn.functional.pad(prompts, (0, 0, 0, max(sizes.values()) - sizes[name])))
            for position, row in enumerate(selected[name][1]):
                rows_of_images[row] = start + (position if prompts.shape[0] > 1 else 0)
            start += prompts.shape[0]
        device = hidden_states.device
        absent = _padding(adapter_names, sizes, device)
        return PromptBatch(
            torch.cat(entries),
            torch.tensor(rows_of_images, device=device),
            absent,
            _present(adapter_names, {name: sizes[name] for name in pooled}, max(sizes.values()), device),
        )

    # The two ways in

    def _keys_values(self, batch: PromptBatch, dtype: torch.dtype, num_queries: int = 0) -> PromptKeysValues:
        """Keys and values of prompts, by the block's own frozen norm and projections."""
        bias = batch.bias(dtype)
        normed = batch.prompts if self.norm is None else self.norm(batch.prompts)
        if self.observer is not None:
            bias = self.observer(self, batch.prompts, normed, bias)
        key, value, query = self.access.project(self.attention, normed, num_queries)
        if batch.rows is not None:
            key, value = key[batch.rows], value[batch.rows]
        return PromptKeysValues(key, value, bias, query)

    @torch.no_grad()
    def constant_keys_values(self) -> PromptKeysValues | None:
        """The keys and values of active prompts that are the same for every image; None where there are none."""
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        batch = self._make(torch.empty(1, 0, 0, device=device, dtype=dtype), None, deep=True)
        return None if batch is None else self._keys_values(batch, dtype)

    def _insert(self, tokens: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
        """`(B, T, D)` to `(B, T + N, D)`, the prompts right after the prefix."""
        prompts = batch.for_images(tokens.shape[0]).prompts
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
        start = self.backbone.num_prefix_tokens
        if self.backbone.record.mask_in_block:
            # The block's bias fits the resolution that it is told; it would be stretched to the tokens that it sees.
            kwargs = {**kwargs, INSERTED: InsertedPrompts(start, num_tokens, absent)}
            return args, kwargs | ({"interpolate_pos_encoding": False} if "interpolate_pos_encoding" in kwargs else {})
        mask = args[0] if args else kwargs.get(self.backbone.record.mask)
        if mask is None and absent is None:
            return args, kwargs
        mask = insert_into_mask(mask, start, num_tokens, absent, like=tokens)
        return ((mask, *args[1:]), kwargs) if args else (args, {**kwargs, self.backbone.record.mask: mask})


def _padding(adapter_names: Sequence[str], sizes: dict[str, int], device: torch.device) -> torch.Tensor | None:
    """Which of N prompts, N the largest of `sizes`, an image's adapter does not have, `(B, N)`; None where all do."""
    width = max(sizes.values(), default=0)
    if all(sizes.get(name, 0) == width for name in adapter_names):
        return None
    present = _present(adapter_names, sizes, width, device)
    return None if present is None else ~present


def _present(
    adapter_names: Sequence[str], sizes: dict[str, int], width: int, device: torch.device
) -> torch.Tensor | None:
    """Which of N = `width` prompts an image's adapter has, `(B, N)`; None where no adapter named has any."""
    counts = [sizes.get(name, 0) for name in adapter_names]
    if not any(counts):
        return None
    return torch.arange(width, device=device) < torch.tensor(counts, device=device)[:, None]


def _join_flags(left: torch.Tensor | None, right: torch.Tensor | None, widths: tuple[int, int]) -> torch.Tensor | None:
    """Flags of two groups of prompts that stand side by side, `(1|B, widths[0] + widths[1])`; None is all false."""
    known = [part for part in (left, right) if part is not None]
    if not known:
        return None
    batch_size = max(part.shape[0] for part in known)
    parts = [
        known[0].new_zeros(batch_size, width) if part is None else part.expand(batch_size, -1)
        for part, width in zip((left, right), widths, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _tokens_of(output: Any) -> torch.Tensor:
    """The tokens in what a block returns, which may be a tuple that starts with them."""
    return output[0] if isinstance(output, tuple) else output


def _with_tokens(output: Any, tokens: torch.Tensor) -> Any:
    return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


def _show(visible: torch.Tensor, instead_of: torch.Tensor) -> None:
    """Lets Transformers' recorder of hidden states keep a block's output, or block 0's input, without prompts.

    The recorder is a hook on the block itself, which ran on more tokens than the model knows of. It may have been told
    to keep other states.
    """
    states = (_active_collector.get() or {}).get("hidden_states") or []
    for position, state in enumerate(states):
        if state is instead_of:
            states[position] = visible


def silence_frozen_modules(module: nn.Module) -> None:
    """Turns dropout and stochastic depth off in everything below `module` that is neither an adapter nor a head.

    The modules that ask `self.training` whether to checkpoint keep their mode: without it there is no checkpointing.
    """
    # Of a block the base layer alone, for the sake of compiled code: see `PromptedBlock._active`.
    for child in [module.base_layer] if isinstance(module, PromptedBlock) else module.children():
        if isinstance(child, AuxiliaryTrainingWrapper):
            continue
        if not isinstance(child, (GradientCheckpointingLayer, PreTrainedModel, PromptedBlock)):
            child.training = False
        silence_frozen_modules(child)


def raise_merge_error() -> None:
    """Says why prompts cannot be merged."""
    raise NotImplementedError(
        "Found a request to merge prompts into the weights. Prompts are extra keys and values, so no weight of the "
        "backbone can hold them. Keep the adapter beside the model, get a model for inference without PEFT with "
        "`bake()`, or the bare model back with `unload()`."
    )
