"""How wide the region of good learning rates is."""

from __future__ import annotations

import math
from collections.abc import Mapping


def width_in_decades(scores: Mapping[float, float], tolerance: float = 0.01, best: float | None = None) -> float:
    """Width, in powers of ten, of the learning rates around the best one whose score is within a tolerance of it.

    Between two learning rates that were tried, the score is taken to be linear in the logarithm. The region is the
    connected one around the best; at an end of the grid it is cut off there, so that it may be wider in truth.

    Args:
        scores: Score of each learning rate, larger is better; such as accuracies in [0, 1].
        tolerance: How far below the best a score may be.
        best: What to measure by. Default: the best of these scores.

    Returns:
        The width; 0 where no score comes near enough.
    """
    rates = sorted(scores)
    centre = max(rates, key=lambda rate: scores[rate])
    floor = (scores[centre] if best is None else best) - tolerance
    if scores[centre] < floor:
        return 0.0
    position = rates.index(centre)
    ends = []
    for neighbours in (rates[position:], rates[: position + 1][::-1]):
        end = math.log10(neighbours[0])
        for inside, outside in zip(neighbours, neighbours[1:]):
            if scores[outside] < floor:
                share = (scores[inside] - floor) / (scores[inside] - scores[outside])
                end += share * (math.log10(outside) - math.log10(inside))
                break
            end = math.log10(outside)
        ends.append(end)
    return ends[0] - ends[1]
