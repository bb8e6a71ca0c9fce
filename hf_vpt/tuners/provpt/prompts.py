"""The prompts of PRO-VPT: a pool that blocks draw from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor

from ..base import BlockLayout, Direction, StaticPrompts
from ..base.prompts import vpt_uniform_
from .config import PROVPTConfig


class PROVPTPrompts(StaticPrompts):
    """The N rows of the pool that started in one block, and the rows of the whole pool that serve it now.

    Prompts never move in memory. Each block keeps its rows for ever and the buffer `block` `(N,)` says which block
    each of them serves, so shapes never change and an optimizer's state stays with its prompt.

    Args:
        config: The adapter's config.
        layout: The block.
        peers: Prompts of the adapter in earlier blocks.
    """

    def __init__(self, config: PROVPTConfig, layout: BlockLayout, peers: list[PROVPTPrompts]):
        super().__init__(config.num_virtual_tokens, config.prompt_dropout)
        self.index = layout.index
        self.width = layout.width
        self.prompt_embeddings = nn.Parameter(torch.empty(config.num_virtual_tokens, layout.width))
        vpt_uniform_(self.prompt_embeddings, layout.patch_size)
        self.register_buffer("block", torch.full((config.num_virtual_tokens,), layout.index))
        # The same numbers for Python: reading the buffer in a forward pass would wait for the device.
        self.serves = [layout.index] * config.num_virtual_tokens
        # One list for the whole pool; torch does not look into lists, so rows are saved once, with their own block.
        self.pool: list[PROVPTPrompts] = peers[0].pool if peers else []
        self.pool.append(self)
        self._slices: list[tuple[int, int, int]] | None = None
        self._rows = torch.empty(0)
        self._notice_moves()

    def rows(self) -> list[tuple[int, int]]:
        """The rows that serve this block: position of their owner in the pool and row, in the order of `table`."""
        return [(owner, row) for owner, start, stop in self._find_slices() for row in range(start, stop)]

    @property
    def count(self) -> int:
        return len(self.rows())

    def table(self) -> torch.Tensor:
        if torch.compiler.is_compiling():
            # Which rows serve is data here: slices would be part of the code, to be compiled anew after each move.
            pool = torch.cat([prompts.prompt_embeddings for prompts in self._reachable()])
            return pool[self._rows.to(pool.device)]
        slices = self._find_slices()
        if slices == [(self.pool.index(self), 0, len(self.serves))]:
            return self.prompt_embeddings
        parts = [self.pool[owner].prompt_embeddings[start:stop] for owner, start, stop in slices]
        return torch.cat(parts) if parts else self.prompt_embeddings[:0]

    def directions(self) -> list[Direction]:
        # Wherever a row serves, so that one that was scaled down on its way has the length of the others again.
        return [Direction(self, ("prompt_embeddings",))]

    def _find_slices(self) -> list[tuple[int, int, int]]:
        """Runs of neighbouring rows that serve this block: owner, first row, row after the last."""
        if self._slices is None:
            self._slices = []
            for owner, prompts in enumerate(self.pool):
                for row, block in enumerate(prompts.serves):
                    if block != self.index:
                        continue
                    if self._slices and self._slices[-1][0] == owner and self._slices[-1][2] == row:
                        self._slices[-1] = (owner, self._slices[-1][1], row + 1)
                    else:
                        self._slices.append((owner, row, row + 1))
        return self._slices

    def check_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        reachable = [prompts.index for prompts in self._reachable()]
        unknown = sorted(set(tensors["block"].tolist()) - set(reachable))
        if unknown:
            raise ValueError(
                f"Found prompts that serve the blocks {unknown}. The pool of this adapter spans the blocks "
                f"{reachable} for prompts of width {self.width}. File and config must come from the same adapter."
            )

    def _reachable(self) -> list[PROVPTPrompts]:
        """The part of the pool whose prompts may serve this block: that of its width."""
        return [prompts for prompts in self.pool if prompts.width == self.width]

    def _set_serves(self, block: torch.Tensor) -> None:
        self.check_tensors({"block": block})
        self.serves = block.tolist()
        self._notice_moves()

    def _notice_moves(self) -> None:
        """Lets every block of the pool look for its rows anew."""
        serves = [(prompts.width, block) for prompts in self.pool for block in prompts.serves]
        for prompts in self.pool:
            prompts._slices = None
            reachable = [block for width, block in serves if width == prompts.width]
            rows = [row for row, block in enumerate(reachable) if block == prompts.index]
            prompts._rows = torch.tensor(rows, dtype=torch.long, device="cpu")
            # Compiled code that takes any number of rows from the start.
            torch._dynamo.maybe_mark_dynamic(prompts._rows, 0)

    @torch.no_grad()
    def move(self, row: int, block: int, scale: float) -> None:
        """Lets a row of this block's share serve another block, scaled down."""
        scales = torch.ones(self.num_virtual_tokens, 1, device=self.block.device)
        scales[row] = scale
        if isinstance(self, FSDPModule):
            self.reshard()  # what is gathered is a copy, and lost
            shares = self.prompt_embeddings
            scales = distribute_tensor(scales, shares.device_mesh, shares.placements)
        self.prompt_embeddings.mul_(scales)
        self.block[row] = block
        self._set_serves(self.block)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # `load_adapter` of Transformers assigns tensors one by one and never calls `_load_from_state_dict`.
        if name == "block" and not value.is_meta:
            self._set_serves(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}block" in state_dict:
            self._set_serves(state_dict[f"{prefix}block"])
