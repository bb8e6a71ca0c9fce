"""The prompts of VPT: a learned table."""

from __future__ import annotations

import torch
from torch import nn

from ..base import BlockLayout, Direction, StaticPrompts
from ..base.prompts import vpt_uniform_
from .config import VPTConfig


class VPTPrompts(StaticPrompts):
    """One block's table `(N, d)` and, with `projection_dim`, the projection that all blocks share.

    Args:
        config: The adapter's config.
        layout: The block.
        owner: Prompts of the first block of this width, which own the projection; None in that block.
    """

    def __init__(self, config: VPTConfig, layout: BlockLayout, owner: VPTPrompts | None = None):
        super().__init__(config.num_virtual_tokens, config.prompt_dropout, config.deep)
        width = config.projection_dim or layout.width
        self.prompt_embeddings = nn.Parameter(torch.empty(config.num_virtual_tokens, width))
        vpt_uniform_(self.prompt_embeddings, layout.patch_size)
        self.width = layout.width
        # In a list, so that the projection is saved, counted and trained once, with the first block.
        self._owner = [] if owner is None else [owner]
        if config.projection_dim is None:
            self.projection = None
        elif owner is None:
            self.projection = nn.Linear(config.projection_dim, layout.width)
            nn.init.kaiming_normal_(self.projection.weight, mode="fan_out")

    def table(self) -> torch.Tensor:
        first = self._owner[0] if self._owner else self
        if first.projection is None:
            return self.prompt_embeddings
        return first.projection(self.prompt_embeddings)

    def directions(self) -> list[Direction]:
        first = self._owner[0] if self._owner else self
        if first.projection is None:
            return [Direction(self, ("prompt_embeddings",))]
        # E·Aᵀ + a scales with the projection, for all blocks at once; with E alone it does not.
        return [Direction(self.projection, ("weight", "bias"), by_row=False)] if first is self else []
