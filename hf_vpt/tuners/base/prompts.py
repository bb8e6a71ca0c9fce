"""What a prompt method answers: which prompts does this block get for this input?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class BlockLayout:
    """What prompts may know of the block they are made for.

    Attributes:
        index: Index of the block in the backbone.
        position: Index of the block among those with prompts of the same adapter.
        width: Width D of the block's tokens.
        stage: Stage of the block; the patch grid halves from stage to stage.
        patch_size: Height and width of a patch in pixels.
        num_prefix_tokens: Tokens before the patches.
    """

    index: int
    position: int
    width: int
    stage: int = 0
    patch_size: tuple[int, int] = (16, 16)
    num_prefix_tokens: int = 1


@dataclass(frozen=True)
class Direction:
    """Tensors of which the loss feels the direction alone: multiplied by one positive number, they change nothing.

    Attributes:
        module: The module that owns them.
        names: Their names in it.
        by_row: Whether that holds for each index of the first dimension by itself (the rows of all tensors together),
            or for all elements at once.
    """

    module: nn.Module
    names: tuple[str, ...]
    by_row: bool = True

    @property
    def tensors(self) -> list[nn.Parameter]:
        """The tensors that the module has now; FSDP puts others in their place."""
        return [getattr(self.module, name) for name in self.names]

    @property
    def unit(self) -> float:
        """Length of a vector whose elements have a root mean square of 1."""
        # By shapes alone: a row of a shared-out tensor would have to be fetched.
        return math.sqrt(sum(math.prod(tensor.shape[1:] if self.by_row else tensor.shape) for tensor in self.tensors))


class Prompts(nn.Module):
    """The prompts of one adapter in one block.

    Everything an adapter learns lives in these modules, one in each block, so that PEFT's marking, casting, saving and
    deleting finds it by ownership. A method subclasses this, registers its tensors and answers `forward`.

    Args:
        num_virtual_tokens: Number N of prompts.
        deep: Whether the prompts stay in their block (keys and values) or flow on as tokens.
    """

    def __init__(self, num_virtual_tokens: int, deep: bool = True):
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self.deep = deep
        # Whether their outputs go into the image's feature; set by the tuner, from the config.
        self.pooled = False
        # Whether they depend on more than their input: on what the embeddings left here for this forward pass.
        self.stateful = False

    @property
    def count(self) -> int:
        """Number of prompts that the block gets."""
        return self.num_virtual_tokens

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Prompts for the block's input.

        Args:
            hidden_states: The block's input `(B, T, D)`, prefix tokens first, without any prompts.

        Returns:
            `(1, N, D)` where the prompts are the same for all images, `(B, N, D)` otherwise.
        """
        raise NotImplementedError

    def directions(self) -> list[Direction]:
        """What scales the prompts and nothing else. A norm before attention takes that scale away (`Direction`)."""
        return []

    def check_grid(self, height: int, width: int) -> None:
        """Raises `ValueError` if the prompts cannot be made from a grid of `height` × `width` patches."""

    def check_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raises `ValueError` if saved tensors, by their names in this module, hold what the prompts cannot have."""

    def randomize(self) -> None:
        """Fills all floating-point tensors with random numbers of order one tenth (`init_weights=False`)."""
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                nn.init.normal_(tensor, std=0.1)


def first_of_width(peers: Sequence[Prompts], width: int) -> Prompts | None:
    """The first of some prompts that is `width` wide and so owns what blocks of that width share; None without one."""
    return next((peer for peer in peers if peer.width == width), None)


class StaticPrompts(Prompts):
    """Prompts that are the same for every image: a learned table, its projection and dropout.

    Args:
        num_virtual_tokens: See `Prompts`.
        dropout: Probability with which an element is zeroed while training, drawn for each image.
        deep: See `Prompts`.
    """

    def __init__(self, num_virtual_tokens: int, dropout: float, deep: bool = True):
        super().__init__(num_virtual_tokens, deep)
        self.dropout = nn.Dropout(dropout)

    def table(self) -> torch.Tensor:
        """The prompts before dropout, `(N, D)`."""
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        prompts = self.table()[None]
        if self.training and self.dropout.p > 0:
            # One mask for each image, as the published code draws it.
            prompts = self.dropout(prompts.expand(hidden_states.shape[0], -1, -1))
        return prompts


def vpt_uniform_(tensor: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Fills prompts `(…, d)` from U(−v, v), v = sqrt(6 / (3·patch_h·patch_w + d)): Xavier for the patch embedding.

    Source: VPT (arXiv 2203.12119), published code.
    """
    bound = (6 / (3 * patch_size[0] * patch_size[1] + tensor.shape[-1])) ** 0.5
    return nn.init.uniform_(tensor, -bound, bound)
