"""BPT: prompts of low rank, bilinear or whitened (arXiv 2506.22908)."""

from .config import BPTConfig
from .model import BPTModel
from .prompts import BPTPrompts
from .whitening import WhiteningStatistics, initialize_whitening, whitening_matrix


__all__ = [
    "BPTConfig",
    "BPTModel",
    "BPTPrompts",
    "WhiteningStatistics",
    "initialize_whitening",
    "whitening_matrix",
]
