"""The prompts of VAPT: functions of the image."""

from __future__ import annotations

import torch
from torch import nn

from ..base import BlockLayout, Direction, Prompts
from .config import VAPTConfig, halved


# σ(s·x) = s·σ(x) for s > 0.
HOMOGENEOUS = ("relu", "identity")
ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "softmax": lambda: nn.Softmax(dim=-1),
    "identity": nn.Identity,
}


class GridPooling(nn.Module):
    """Pools the patches of an image to N positions, channel by channel.

    With the kernel K and the mixing weights M `(N, h'·w')`, A = M·(c ⊙ (K * Z)) + b, where c drops whole channels.
    Convolution and mixing act on positions, the dropout on channels, so with a kernel shared by all channels the two
    maps fold into one matrix: A = c ⊙ ((Kᵀ * M)·Z) + b, which is exact and needs no feature map.

    Args:
        config: The adapter's config.
        layout: The block.
    """

    def __init__(self, config: VAPTConfig, layout: BlockLayout):
        super().__init__()
        self.grid = config.grid_at(layout.stage)
        self.padding = config.padding
        self.dropout = nn.Dropout2d(config.channel_dropout)
        self.kernel = None
        height, width = self.grid
        if config.pooling == "conv":
            channels = 1 if config.shared_kernel else layout.width
            self.kernel = nn.Parameter(torch.empty(channels, 1, config.kernel_size, config.kernel_size))
            nn.init.normal_(self.kernel)
            height += 2 * config.padding - config.kernel_size + 1
            width += 2 * config.padding - config.kernel_size + 1
        self.pooled_grid = (height, width)
        self.mix = nn.Linear(height * width, config.num_virtual_tokens)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`(B, h·w, D)` to `(B, N, D)`."""
        if self.kernel is not None and self.kernel.shape[0] > 1:
            maps = patches.mT.unflatten(2, self.grid)
            pooled = nn.functional.conv2d(maps, self.kernel, padding=self.padding, groups=maps.shape[1])
            return self.mix(self.dropout(pooled).flatten(2)).mT
        weight = self.mix.weight
        if self.kernel is not None:
            maps = weight.unflatten(1, self.pooled_grid)[:, None]
            # The transpose of a convolution: what each patch adds to each of the N positions.
            weight = nn.functional.conv_transpose2d(maps, self.kernel, padding=self.padding).flatten(1)
        # Not `weight @ patches`, for which PyTorch would copy all patches, channels first.
        pooled = torch.bmm(weight.expand(patches.shape[0], -1, -1), patches)
        if self.training and self.dropout.p > 0:
            channels = pooled.new_ones(pooled.shape[0], pooled.shape[2], 1, 1)
            pooled = pooled * self.dropout(channels).flatten(2).mT
        return pooled + self.mix.bias[:, None]


class FeatureProjector(nn.Module):
    """A + c·W₂·dropout(σ(W₁·A)) on each prompt.

    Args:
        config: The adapter's config.
        width: Width D of the prompts.
    """

    def __init__(self, config: VAPTConfig, width: int):
        super().__init__()
        self.down = nn.Linear(width, config.projector_dim, bias=False)
        self.activation = ACTIVATIONS[config.projector_activation]()
        self.dropout = nn.Dropout(config.projector_dropout)
        self.up = nn.Linear(config.projector_dim, width, bias=False)
        self.scale = nn.Parameter(torch.ones(1)) if config.learnable_scale else None

    def forward(self, prompts: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)` to `(B, N, D)`."""
        change = self.up(self.dropout(self.activation(self.down(prompts))))
        return prompts + (change if self.scale is None else self.scale * change)


class AdaptivePrompts(Prompts):
    """Prompts that one block makes from its input.

    Args:
        config: The adapter's config, complete with its grid.
        layout: The block.
        owner: Adaptive prompts of an earlier block of this width, which own the shared projector; None in the first.
    """

    def __init__(self, config: VAPTConfig, layout: BlockLayout, owner: AdaptivePrompts | None = None):
        super().__init__(config.num_virtual_tokens)
        self.width = layout.width
        self.num_prefix_tokens = layout.num_prefix_tokens
        self.interpolates = self.stateful = config.interpolate_grid
        self.is_homogeneous = config.projector_activation in HOMOGENEOUS
        # Rows and columns of patches in the first stage that the adapter is made for, and how often they were halved.
        self.image_grid, self.stage = tuple(config.grid), layout.stage
        # Those of the images that are on their way through the model.
        self.present_grid: tuple[int, int] | None = None
        self.norm = nn.LayerNorm(layout.width)
        self.pooling = GridPooling(config, layout)
        # In a list, so that a shared projector is saved, counted and trained once, with its first block.
        self._owner = [owner] if owner is not None and config.shared_projector else []
        if not self._owner:
            self.projector = FeatureProjector(config, layout.width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        patches = hidden_states[:, self.num_prefix_tokens :]
        height, width = self.pooling.grid
        resized = self.interpolates and self.present_grid not in (None, self.pooling.grid)
        if not resized and patches.shape[1] != height * width:
            raise ValueError(
                f"Found {patches.shape[1]} patches in an image. This VAPT adapter was made for a grid of {height} × "
                f"{width}, {height * width} patches. Give images of the size it was trained on, or train one with "
                "VAPTConfig(grid=[rows, columns])."
            )
        # In the adapter's own dtype, float32 as a rule: the block takes the prompts to its dtype.
        patches = self.norm(patches.to(self.norm.weight.dtype))
        if resized:
            maps = patches.mT.unflatten(2, self.present_grid)
            patches = nn.functional.adaptive_avg_pool2d(maps, self.pooling.grid).flatten(2).mT
        projector = self._owner[0].projector if self._owner else self.projector
        return projector(self.pooling(patches))

    def directions(self) -> list[Direction]:
        # A row of M with its bias scales A's row, and the projector passes a factor on if its activation does.
        return [Direction(self.pooling.mix, ("weight", "bias"))] if self.is_homogeneous else []

    def check_grid(self, height: int, width: int) -> None:
        if (height, width) != self.image_grid and not self.interpolates:
            expected = " × ".join(map(str, self.image_grid))
            raise ValueError(
                f"Found an image of {height} × {width} patches. This VAPT adapter was made for {expected}. "
                "Give images of the size it was trained on, train one with VAPTConfig(grid=[rows, columns]), or one "
                "that pools other grids to its own with VAPTConfig(grid='interpolate')."
            )
        self.present_grid = halved((height, width), self.stage)
