"""The prompts of BPT: a product of two factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base import BlockLayout, Direction, StaticPrompts
from .config import BPTConfig


class BPTPrompts(StaticPrompts):
    """One block's factor prompts `(N, r)` and basis `(D, r)`.

    Args:
        config: The adapter's config.
        layout: The block.
    """

    def __init__(self, config: BPTConfig, layout: BlockLayout):
        super().__init__(config.num_virtual_tokens, config.prompt_dropout, config.deep)
        self.index = layout.index
        self.basis = config.basis
        self.factor_prompts = nn.Parameter(torch.empty(config.num_virtual_tokens, config.rank))
        nn.init.normal_(self.factor_prompts, std=0.02)
        factor_basis = nn.init.xavier_uniform_(torch.empty(layout.width, config.rank))
        if config.basis == "fwhiten":
            self.register_buffer("factor_basis", factor_basis)
        else:
            self.factor_basis = nn.Parameter(factor_basis)
        # Constructors read no data, so a whitened basis is not there yet.
        self.is_whitened = config.basis == "bilinear"

    @torch.no_grad()
    def set_basis(self, whitening: torch.Tensor) -> None:
        """Starts from a whitening matrix `(D, D)`, of which the first r columns are kept."""
        self.factor_basis.copy_(whitening[:, : self.factor_basis.shape[1]])
        self.is_whitened = True

    def randomize(self) -> None:
        super().randomize()
        self.is_whitened = True

    def table(self) -> torch.Tensor:
        if not self.is_whitened:
            raise RuntimeError(
                f"Found a BPT adapter with basis={self.basis!r} whose basis in block {self.index} is not whitened. It "
                "needs the block's inputs on training images. Call `hf_vpt.initialize_whitening(model, dataloader)` "
                "before the first forward pass, or use basis='bilinear'."
            )
        return self.factor_prompts @ self.factor_basis.T

    def directions(self) -> list[Direction]:
        # A row of F scales its own prompt, the basis all of them.
        basis = [Direction(self, ("factor_basis",), by_row=False)] if self.basis != "fwhiten" else []
        return [Direction(self, ("factor_prompts",)), *basis]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # `load_adapter` of Transformers assigns tensors one by one and never calls `_load_from_state_dict`.
        if name == "factor_basis":
            self.is_whitened = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # A saved basis has been through this already.
        self.is_whitened |= f"{prefix}factor_basis" in state_dict
