"""Prompts in the masks of flex attention, which are functions over blocks of positions and not tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask


_BLOCK_SIZE = 128  # flex attention's own


def insert_into_block_mask(mask: BlockMask, start: int, num_tokens: int, rows: bool) -> BlockMask:
    """Adds columns for prompts, to which all tokens may attend, and rows where prompts have queries.

    Args:
        mask: Over T tokens.
        start: Tokens before the prompts.
        num_tokens: Number n of prompts.
        rows: Whether the prompts have queries too; they see what the first token, CLS, sees.
    """
    (num_queries, num_keys), unprompted, device = mask.seq_lengths, mask.mask_mod, mask.kv_indices.device
    # As tensors: PyTorch 2.15 compiles no kernel for the CPU where these are numbers that change between calls.
    first, count = torch.tensor(start, device=device), torch.tensor(num_tokens, device=device)

    def is_prompt(position: torch.Tensor) -> torch.Tensor:
        return (position >= first) & (position < first + count)

    def before_prompts(position: torch.Tensor) -> torch.Tensor:
        """The position before there were prompts; 0 for a prompt."""
        return torch.where(position < first, position, torch.where(is_prompt(position), 0, position - count))

    def mask_mod(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        query = before_prompts(query) if rows else query
        return unprompted(batch, head, query, before_prompts(key)) | is_prompt(key)

    return _block_mask(mask_mod, num_queries + num_tokens * rows, num_keys + num_tokens, device)


def dense_mask(mask: BlockMask) -> torch.Tensor:
    """The same mask as a boolean tensor, true where a token may attend: `(B, 1, T, T)`."""
    batch_size, num_heads = mask.shape[:2]
    return create_mask(mask.mask_mod, batch_size, num_heads, *mask.seq_lengths, device=mask.kv_indices.device)


def for_flex_attention(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | BlockMask:
    """A mask tensor `(1|B, 1, 1|T, T)` as flex attention takes it.

    What is added to the logits becomes "attend" or not, unless it wants a gradient.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    shape = (query.shape[0], 1, num_queries, num_keys)
    if mask.requires_grad:
        return mask.expand(shape)
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    allowed = allowed.expand(shape)
    # Not added to the logits: PyTorch 2.15 compiles a kernel for the CPU that overruns its memory on tensors there.
    return _block_mask(
        lambda batch, head, query, key: allowed[batch, 0, query, key], num_queries, num_keys, allowed.device
    )


def _block_mask(mask_mod: Callable[..., torch.Tensor], num_queries: int, num_keys: int, device: torch.device):
    """A mask of which every block is looked into.

    The masks of vision transformers leave no block out, and to find out would take a pass over all pairs of positions.
    """
    num_rows, num_columns = (-(-length // _BLOCK_SIZE) for length in (num_queries, num_keys))
    return BlockMask.from_kv_blocks(
        torch.full((1, 1, num_rows), num_columns, dtype=torch.int32, device=device),
        torch.arange(num_columns, dtype=torch.int32, device=device).repeat(1, 1, num_rows, 1),
        BLOCK_SIZE=_BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=(num_queries, num_keys),
    )
