"""The tuner of VAPT."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...backbones import Backbone
from ..base import BlockLayout, PromptedBlock, Prompts, PromptTuner
from ..vpt import VPTConfig, VPTPrompts
from .config import VAPTConfig
from .prompts import AdaptivePrompts


class VAPTModel(PromptTuner):
    """A frozen vision transformer whose blocks make prompts from the image. See `VAPTConfig`."""

    prefix = "hfvpt_vapt_"

    def check_backbone(self, config: VAPTConfig, backbone: Backbone) -> None:
        mask_ratio = getattr(self.model.config, "mask_ratio", 0.0)
        if backbone.record.shuffles_patches and mask_ratio:
            raise ValueError(
                f"Found a {type(self.model).__name__} that hides {mask_ratio:.0%} of the patches of each image. VAPT "
                "pools the whole patch grid. Set `model.config.mask_ratio = 0.0`, or load the weights into a "
                "ViTForImageClassification."
            )
        if config.grid is None:
            config.grid = list(backbone.grid)
        config.check_grid()

    @classmethod
    def make_prompts(cls, config: VAPTConfig, layout: BlockLayout, peers: list[Prompts]) -> Prompts:
        if layout.position >= config.num_static_layers:
            owner = next((peer for peer in peers if isinstance(peer, AdaptivePrompts)), None)
            return AdaptivePrompts(config, layout, owner)
        static = VPTConfig(
            num_virtual_tokens=config.num_virtual_tokens,
            prompt_dropout=config.prompt_dropout,
            token_dim=config.token_dim,
        )
        return VPTPrompts(static, layout)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._remove_grid_guard(model)
        guard = _GridGuard(self._backbone, self.prompted_blocks())
        self._backbone.embeddings(model).register_forward_pre_hook(guard, with_kwargs=True)

    def unload(self) -> nn.Module:
        model = super().unload()
        self._remove_grid_guard(model)
        return model

    def _remove_grid_guard(self, model: nn.Module) -> None:
        # Not through the handle of the hook: it does not survive a copy of the model.
        embeddings = self._backbone.embeddings(model)
        for key, hook in list(embeddings._forward_pre_hooks.items()):
            if isinstance(hook, _GridGuard):
                del embeddings._forward_pre_hooks[key]
                embeddings._forward_pre_hooks_with_kwargs.pop(key, None)


class _GridGuard:
    """Forward pre-hook of the embeddings, the one place that sees an image's height and width.

    A block sees only a number of patches, which two grids may share (28 × 7 and 14 × 14). ViT-MAE reorders patches at
    random even where it hides none; the order is taken back, on which nothing else in the model depends.
    """

    def __init__(self, backbone: Backbone, blocks: list[PromptedBlock]):
        self.backbone = backbone
        self.blocks = blocks

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        active = [
            block.prompts[name]
            for block in self.blocks
            if not block.disable_adapters
            for name in block.active_adapters
            if name in block.prompts
        ]
        pixel_values = args[0] if args else kwargs["pixel_values"]
        grid = self.backbone.patch_grid(*pixel_values.shape[2:])
        for prompts in active:
            prompts.check_grid(*grid)
        if active and self.backbone.record.shuffles_patches and len(args) < 2 and kwargs.get("noise") is None:
            order = torch.arange(grid[0] * grid[1], device=pixel_values.device, dtype=torch.float32)
            return args, {**kwargs, "noise": order.expand(pixel_values.shape[0], -1)}
        return None
