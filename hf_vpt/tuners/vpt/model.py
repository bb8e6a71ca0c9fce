"""The tuner of VPT."""

from __future__ import annotations

from ..base import BlockLayout, PromptTuner
from ..base.prompts import first_of_width
from .config import VPTConfig
from .prompts import VPTPrompts


class VPTModel(PromptTuner):
    """A frozen vision transformer with learned prompts in its blocks. See `VPTConfig`."""

    prefix = "hfvpt_vpt_"
    config_cls = VPTConfig

    @classmethod
    def make_prompts(cls, config: VPTConfig, layout: BlockLayout, peers: list[VPTPrompts]) -> VPTPrompts:
        return VPTPrompts(config, layout, owner=first_of_width(peers, layout.width))
