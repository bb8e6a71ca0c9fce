"""What all prompt methods share: config fields, prompts of a block, the wrapped block, the tuner."""

from .block import PromptedBlock
from .config import PromptConfig
from .model import PromptTuner
from .prompts import BlockLayout, Direction, Prompts, StaticPrompts


__all__ = ["BlockLayout", "Direction", "PromptConfig", "PromptTuner", "PromptedBlock", "Prompts", "StaticPrompts"]
