"""What learning rates do to prompts: runs over a grid, spikes of the loss, and the width of what works."""

from .grid import TREATMENTS, Point, points_of, read_runs, run_grid
from .spikes import Spike, find_spikes, largest_rise, smooth
from .width import width_in_decades


__all__ = [
    "TREATMENTS",
    "Point",
    "Spike",
    "find_spikes",
    "largest_rise",
    "points_of",
    "read_runs",
    "run_grid",
    "smooth",
    "width_in_decades",
]
