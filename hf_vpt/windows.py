"""Prompts beside the tokens: what becomes of a prompt in a block whose attention runs in windows.

Tokens of such a block lie on a grid, so prompts cannot stand among them. They enter the attention of every window as
keys and values; a prompt that flows on to the next block also looks at every window, without any mask or position
bias, and goes on with the mean of what it saw (VPT, arXiv 2203.12119, published code for Swin). Where stages meet, the
patch merging joins four patches; a prompt is joined with itself.
"""

from __future__ import annotations

import torch
from torch import nn


class WindowedBlocks:
    """How one family finishes a block and a stage for prompts that flow beside the tokens."""

    def finish_block(self, block: nn.Module, prompts: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of a block after its attention.

        Args:
            block: The block.
            prompts: What went into it, `(B, N, D)`.
            attended: What attention gives them, before its output projection, `(B, N, D)`.
        """
        raise NotImplementedError

    def merge(self, merging: nn.Module, prompts: torch.Tensor) -> torch.Tensor:
        """Takes prompts through the patch merging between two stages, `(B, N, D)` to `(B, N, 2·D)`."""
        raise NotImplementedError


class SwinBlocks(WindowedBlocks):
    """Swin: norms stand before attention, MLP and merging."""

    def finish_block(self, block: nn.Module, prompts: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        prompts = prompts + block.attention.o_proj(attended)
        return prompts + block.mlp(block.layernorm_after(prompts))

    def merge(self, merging: nn.Module, prompts: torch.Tensor) -> torch.Tensor:
        return merging.reduction(merging.norm(prompts.repeat(1, 1, 4)))


class Swinv2Blocks(WindowedBlocks):
    """Swin-v2: norms stand behind attention, MLP and merging."""

    def finish_block(self, block: nn.Module, prompts: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        prompts = prompts + block.layernorm_before(block.attention.output.dense(attended))
        return prompts + block.layernorm_after(block.output(block.intermediate(prompts)))

    def merge(self, merging: nn.Module, prompts: torch.Tensor) -> torch.Tensor:
        return merging.norm(merging.reduction(prompts.repeat(1, 1, 4)))
