"""VAPT: prompts that each block makes from the image (arXiv 2501.18936)."""

from .config import VAPTConfig
from .model import VAPTModel
from .prompts import AdaptivePrompts


__all__ = ["AdaptivePrompts", "VAPTConfig", "VAPTModel"]
