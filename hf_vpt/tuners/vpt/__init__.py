"""VPT: learned prompts, the same for every image (arXiv 2203.12119)."""

from .config import VPTConfig
from .model import VPTModel
from .prompts import VPTPrompts


__all__ = ["VPTConfig", "VPTModel", "VPTPrompts"]
