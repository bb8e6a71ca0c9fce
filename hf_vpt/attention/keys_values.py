"""What prompts are to an attention function: more keys, more values, more columns of the mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from .block_masks import dense_mask, insert_into_block_mask


class PromptKeysValues:
    """Keys and values that one block adds to its attention in one forward pass.

    Where attention runs in windows, every window of an image gets the prompts of its own image.

    Args:
        key: `(1|B, heads, N, head_dim)`.
        value: `(1|B, heads, N, head_dim)`.
        bias: Added to the attention logits of the prompt columns before the softmax, `(1|B, 1, 1, N)`; a large
            negative number takes a prompt away from an image.
        query: `(B, heads, M, head_dim)`, M ≤ N, where the first M prompts look at the tokens too; `attended` holds
            what they saw afterwards, `(B, M, heads·head_dim)`, the mean over the windows of the image.
    """

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None = None,
        query: torch.Tensor | None = None,
    ):
        self.key = key
        self.value = value
        self.bias = bias
        self.query = query
        self.attended: torch.Tensor | None = None
        self.arrived = False

    def append_to(
        self, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values `(B, heads, T + N, head_dim)` and the mask with columns for the prompts."""
        # Only a check, and a compiled graph may not have side effects.
        if not torch.compiler.is_compiling():
            self.arrived = True
        num_windows = key.shape[0]
        bias = None if self.bias is None else for_windows(self.bias, num_windows)
        mask = extend_mask(mask, key, self.key.shape[2], bias)
        return _join(key, self.key), _join(value, self.value), mask

    def attend(
        self, key: torch.Tensor, value: torch.Tensor, attention: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Lets the prompts with a query look at everything, without any mask or position bias.

        Args:
            key: Keys of tokens and prompts, `(windows, heads, T + N, head_dim)`, as `append_to` returns them.
            value: Their values.
            attention: Output `(windows, M, heads, head_dim)` from query, key, value and mask.
        """
        if self.query is None:
            return
        mask = None
        if self.bias is not None:
            num_tokens = key.shape[2] - self.bias.shape[3]
            mask = nn.functional.pad(for_windows(self.bias, key.shape[0]).to(key.dtype), (num_tokens, 0))
        output, _ = attention(for_windows(self.query.to(key.dtype), key.shape[0]), key, value, mask)
        self.attended = mean_over_windows(output.flatten(2), self.query.shape[0])


class BakedKeysValues(nn.Module, PromptKeysValues):
    """Keys and values that stay on an attention module, as buffers: prompts that are the same for every image.

    Args:
        key: `(1, heads, N, head_dim)`.
        value: `(1, heads, N, head_dim)`.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        nn.Module.__init__(self)
        self.register_buffer("key", key)
        self.register_buffer("value", value)
        self.bias = self.query = None


def _join(tokens: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Keys or values of tokens `(B, heads, T, head_dim)` and of prompts, `(B, heads, T + N, head_dim)`."""
    # Autocast or an adapter kept in float32 may give prompts another dtype than the tokens have.
    prompts = for_windows(prompts.to(tokens.dtype), tokens.shape[0]).expand(tokens.shape[0], -1, -1, -1)
    # In memory heads stand within tokens, as projections make them: whole rows are copied, here and in the gradient.
    return torch.cat([tokens.transpose(1, 2), prompts.transpose(1, 2)], dim=1).transpose(1, 2)


def for_windows(tensor: torch.Tensor, num_windows: int) -> torch.Tensor:
    """One entry for each window: `(B, …)` to `(num_windows, …)`; what is the same for all images stays `(1, …)`."""
    # Not len(), which would fix the number of images in a graph that is exported.
    if tensor.shape[0] in (1, num_windows):
        return tensor
    # Windows of an image stand side by side, images one after the other.
    return tensor.repeat_interleave(num_windows // tensor.shape[0], dim=0)


def mean_over_windows(tensor: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The mean over the windows of each image, `(num_windows, …)` to `(B, …)`."""
    return tensor.unflatten(0, (batch_size, -1)).mean(dim=1)


def extend_mask(
    mask: torch.Tensor | BlockMask | None, key: torch.Tensor, num_prompts: int, bias: torch.Tensor | None = None
) -> torch.Tensor | BlockMask | None:
    """Adds columns for prompts to an attention mask.

    Args:
        mask: `(1|B, 1|heads, 1|T, T)` or, as flash attention takes it, `(B, T)`, boolean (true: attend) or added to
            the logits; or flex attention's; None where all may attend.
        key: The tokens' keys `(B, heads, T, head_dim)`.
        num_prompts: Number N of columns.
        bias: What the new columns hold, `(1|B, 1, 1, N)`; None for "attend".

    Returns:
        `(…, T + N)`, or None where there is nothing to mask.
    """
    if isinstance(mask, BlockMask) and bias is None:
        return insert_into_block_mask(mask, key.shape[2], num_prompts, rows=False)
    mask = _with_four_axes(mask)
    if bias is None:
        return None if mask is None else nn.functional.pad(mask, (0, num_prompts), value=mask.dtype == torch.bool)
    bias = bias.to(key.dtype)
    if mask is None:
        return nn.functional.pad(bias, (key.shape[2], 0))
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=key.dtype).masked_fill(~mask, torch.finfo(key.dtype).min)
    batch_size = max(mask.shape[0], bias.shape[0])
    return torch.cat([mask.expand(batch_size, -1, -1, -1), bias.expand(batch_size, *mask.shape[1:3], -1)], dim=-1)


def insert_into_mask(
    mask: torch.Tensor | BlockMask | None,
    start: int,
    num_tokens: int,
    absent: torch.Tensor | None,
    like: torch.Tensor,
) -> torch.Tensor | BlockMask | None:
    """Adds rows and columns for prompts that stand among the tokens.

    Args:
        mask: As in `extend_mask`.
        start: Tokens before the prompts.
        num_tokens: Number n of prompts.
        absent: Prompts that an image does not have, `(B, n)`; None where all are there.
        like: A tensor `(B, T + n, …)` with the dtype of the logits.

    Returns:
        `(…, T + n)`, with n more rows where the mask has one row for each token; None where there is nothing to mask.
    """
    if mask is None and absent is None:
        return None
    if isinstance(mask, BlockMask) and absent is None:
        return insert_into_block_mask(mask, start, num_tokens, rows=True)
    mask = _with_four_axes(mask)
    if mask is None:
        mask = like.new_zeros(1, 1, 1, like.shape[1] - num_tokens)
    attend = mask.dtype == torch.bool
    if mask.shape[2] > 1:
        # Prompts see what the first token, CLS, sees: a token that is hidden must not come in through them. A position
        # bias is for tokens that have a position; prompts have none.
        row = mask[:, :, :1] if attend else mask[:, :, :1].where(mask[:, :, :1] < torch.finfo(mask.dtype).min / 2, 0)
        mask = torch.cat([mask[:, :, :start], row.expand(-1, -1, num_tokens, -1), mask[:, :, start:]], dim=2)
    if absent is None:
        columns = mask.new_full((*mask.shape[:3], num_tokens), attend)
    else:
        columns = ~absent if attend else absent.to(mask.dtype) * torch.finfo(mask.dtype).min
        mask = mask.expand(absent.shape[0], -1, -1, -1)
        columns = columns[:, None, None].expand(*mask.shape[:3], -1)
    return torch.cat([mask[..., :start], columns, mask[..., start:]], dim=3)


def _with_four_axes(mask: torch.Tensor | BlockMask | None) -> torch.Tensor | None:
    """A mask over pairs of positions as a tensor `(1|B, 1|heads, 1|T, T)`."""
    if isinstance(mask, BlockMask):
        return dense_mask(mask)
    return mask[:, None, None] if mask is not None and mask.ndim == 2 else mask
