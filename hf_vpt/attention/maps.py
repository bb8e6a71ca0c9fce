"""Attention maps of prompted blocks, split into what a user of the base model knows and what went to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


class SplitAttention(NamedTuple):
    """The attention weights of one block; over tokens and prompts together, each row sums to 1.

    Attributes:
        tokens: Among the model's own tokens, `(…, T, T)`, the base model's shape.
        prompts: Of the model's own tokens on prompts, `(…, T, N)`: shallow prompts first, then deep ones, those of
            several active adapters in their order. In a mixed batch N is the largest number that an adapter has, and
            an image's weights on prompts that its adapter lacks are 0.
    """

    tokens: torch.Tensor
    prompts: torch.Tensor


def split_attentions(
    model: nn.Module, attentions: Sequence[torch.Tensor], adapter_names: Sequence[str] | None = None
) -> tuple[SplitAttention, ...]:
    """Splits attention maps into those among the model's own tokens and those on prompts.

    With `output_attentions=True` and eager attention, a model returns the base model's number of maps: one for each
    block, or one for each stage of a Swin, that of its last block. Prompts add columns to them, and rows where they
    stand among the tokens (shallow prompts, `set_insertion("tokens")`). The rows say what prompts look at; they are
    left out here.

    Call it in the state in which the maps were made: the same active adapters, disabled or not, and before prompts of
    PRO-VPT move on.

    Args:
        model: The model that returned the maps, in a `PeftModel` or not; one without prompts is welcome.
        attentions: `output.attentions`, each `(B, heads, T + n, T + N)`, of a Swin `(B·windows, heads, T, T + N)`.
        adapter_names: The argument of that name with which the model was called.

    Raises:
        ValueError: If the maps are not those of the model's blocks.

    Example:

        model.set_attn_implementation("eager")
        output = model(pixel_values=images, output_attentions=True)
        for tokens, prompts in hf_vpt.split_attentions(model, output.attentions):
            print(tokens.shape, prompts.sum(dim=-1).mean())  # the share of attention that prompts get
    """
    # The blocks are of the tuners, which are made of this package.
    from ..tuners.base.block import PromptedBlock

    blocks = {module.index: module for module in model.modules() if isinstance(module, PromptedBlock)}
    if not blocks:
        return tuple(_split(weights, 0, 0, 0) for weights in attentions)
    backbone = next(iter(blocks.values())).backbone
    indices = range(backbone.num_layers)
    if backbone.record.windows is not None:
        indices = [start + depth - 1 for start, depth in zip(backbone.stage_starts, backbone.depths, strict=True)]
    if len(attentions) != len(indices) or any(weights is None or weights.ndim != 4 for weights in attentions):
        found = [None if weights is None else tuple(weights.shape) for weights in attentions]
        raise ValueError(
            f"Found attention maps of the shapes {found}. A {backbone.record.title} with these blocks returns "
            f"{len(indices)} maps with four axes, and it does so under eager attention alone. Call "
            "`model.set_attn_implementation('eager')`, then the model with `output_attentions=True`."
        )
    split = []
    for index, weights in zip(indices, attentions, strict=True):
        flowing, deep = blocks[index].num_prompts(adapter_names) if index in blocks else (0, 0)
        inserted, behind = flowing + deep, 0
        if backbone.record.windows is not None:
            inserted, behind = 0, weights.shape[-1] - weights.shape[-2]
        elif index in blocks and blocks[index].insertion == "keys_values":
            inserted, behind = flowing, deep
        if weights.shape[-1] - weights.shape[-2] != behind:
            raise ValueError(
                f"Found an attention map of shape {tuple(weights.shape)} for block {index}, which now has {behind} "
                "prompts behind the tokens. Both must be of one state of the model. Split the maps before another "
                "adapter becomes active or prompts move, and pass the `adapter_names` of the forward pass."
            )
        split.append(_split(weights, backbone.num_prefix_tokens, inserted, deep if inserted != flowing else 0))
    return tuple(split)


def _split(weights: torch.Tensor, start: int, inserted: int, deep: int) -> SplitAttention:
    """Splits one map whose prompts stand after `start` tokens, deep ones first, and behind all tokens."""
    stop, num_rows = start + inserted, weights.shape[-2]
    rows = torch.cat([weights[..., :start, :], weights[..., stop:, :]], dim=-2) if inserted else weights
    columns = rows.split([start, deep, inserted - deep, num_rows - stop, weights.shape[-1] - num_rows], dim=-1)
    before, deep_inserted, flowing, after, behind = columns
    return SplitAttention(torch.cat([before, after], dim=-1), torch.cat([flowing, deep_inserted, behind], dim=-1))
