"""Pictures, drawn with matplotlib (`pip install "hf_vpt[plots]"`)."""

from .cost import plot_cost
from .dynamics import plot_courses, plot_learning_rates, plot_turns, plot_widths
from .prompts import plot_attention, plot_prompt_distribution
from .scores import plot_scores


__all__ = [
    "plot_attention",
    "plot_cost",
    "plot_courses",
    "plot_learning_rates",
    "plot_prompt_distribution",
    "plot_scores",
    "plot_turns",
    "plot_widths",
]
