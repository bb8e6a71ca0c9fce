"""Pictures, drawn with matplotlib (`pip install "hf_vpt[plots]"`)."""

from .cost import plot_cost
from .scores import plot_scores


__all__ = ["plot_cost", "plot_scores"]
