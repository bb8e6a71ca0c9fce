"""The tuner of BPT."""

from __future__ import annotations

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

    @classmethod
    def make_prompts(cls, config: BPTConfig, layout: BlockLayout, peers: list[BPTPrompts]) -> BPTPrompts:
        return BPTPrompts(config, layout)
