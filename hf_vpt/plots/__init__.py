"""Pictures, drawn with matplotlib (`pip install "hf_vpt[plots]"`)."""

from .cost import plot_cost


__all__ = ["plot_cost"]
