"""The tuner of BPT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...backbones import Backbone
from ..base import BlockLayout, PromptTuner
from .config import BPTConfig
from .prompts import BPTPrompts


class BPTModel(PromptTuner):
    """A frozen vision transformer with prompts of low rank in its blocks. See `BPTConfig`."""

    prefix = "hfvpt_bpt_"
    config_cls = BPTConfig

    def check_backbone(self, config: BPTConfig, backbone: Backbone) -> None:
        config.check_rank(backbone.hidden_size)

    def initialize_from_images(self, batches: Iterable[Mapping[str, Any]], adapter_name: str | None = None) -> None:
        """Whitens the basis, if it is to be whitened, with as many images as the config says."""
        from .whitening import initialize_whitening  # which knows this class

        config = self.peft_config[adapter_name or self.active_adapters[0]]
        if config.basis != "bilinear":
            initialize_whitening(self, batches, config.num_whitening_images, adapter_name)

    @classmethod
    def make_prompts(cls, config: BPTConfig, layout: BlockLayout, peers: list[BPTPrompts]) -> BPTPrompts:
        return BPTPrompts(config, layout)
