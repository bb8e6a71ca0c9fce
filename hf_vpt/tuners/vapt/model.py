"""The tuner of VAPT."""

from __future__ import annotations

from typing import Any

import torch

from ...backbones import Backbone
from ..base import BlockLayout, Prompts, PromptTuner
from ..base.model import EmbeddingsHook
from ..base.prompts import first_of_width
from ..vpt import VPTConfig, VPTPrompts
from .config import VAPTConfig
from .prompts import AdaptivePrompts


class _GridHook(EmbeddingsHook):
    """Forward pre-hook of the embeddings, the one place that sees an image's height and width.

    A block sees only a number of patches, which two grids may share (28 × 7 and 14 × 14). ViT-MAE reorders patches at
    random even where it hides none; the order is taken back, on which nothing else in the model depends.
    """

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str] | None) -> dict[str, Any]:
        used = [prompts for block in self.blocks for prompts in block.used_prompts(adapter_names)]
        pixel_values = args[0] if args else kwargs["pixel_values"]
        grid = self.backbone.patch_grid(*pixel_values.shape[2:])
        for prompts in used:
            prompts.check_grid(*grid)
        if used and self.backbone.record.shuffles_patches and len(args) < 2 and kwargs.get("noise") is None:
            order = torch.arange(grid[0] * grid[1], device=pixel_values.device, dtype=torch.float32)
            kwargs["noise"] = order.expand(pixel_values.shape[0], -1)
        return kwargs


class VAPTModel(PromptTuner):
    """A frozen vision transformer whose blocks make prompts from the image. See `VAPTConfig`."""

    prefix = "hfvpt_vapt_"
    config_cls = VAPTConfig
    embeddings_hook_cls = _GridHook

    def check_backbone(self, config: VAPTConfig, backbone: Backbone) -> None:
        mask_ratio = getattr(self.model.config, "mask_ratio", 0.0)
        if backbone.record.shuffles_patches and mask_ratio:
            raise ValueError(
                f"Found a {type(self.model).__name__} that hides {mask_ratio:.0%} of the patches of each image. VAPT "
                "pools the whole patch grid. Set `model.config.mask_ratio = 0.0`, or load the weights into a "
                "ViTForImageClassification."
            )
        num_blocks = len(config.resolved_layers(backbone.num_layers))
        if config.num_static_layers > num_blocks:
            config.fail("num_static_layers", f"at most the number of blocks with prompts, {num_blocks}")
        if config.grid is None:
            config.grid = list(backbone.grid)
        config.check_grid()

    @classmethod
    def make_prompts(cls, config: VAPTConfig, layout: BlockLayout, peers: list[Prompts]) -> Prompts:
        if layout.position >= config.num_static_layers:
            adaptive = [peer for peer in peers if isinstance(peer, AdaptivePrompts)]
            return AdaptivePrompts(config, layout, first_of_width(adaptive, layout.width))
        static = VPTConfig(
            num_virtual_tokens=config.num_virtual_tokens,
            prompt_dropout=config.prompt_dropout,
            token_dim=config.token_dim,
        )
        return VPTPrompts(static, layout)
