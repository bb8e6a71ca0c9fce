"""Spikes: a training loss that jumps and comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spike:
    """One spike of a smoothed loss.

    Attributes:
        start: Step at which the loss leaves its lowest value so far by more than the threshold.
        peak: Step of its highest value.
        height: That value above the lowest one before, in the loss's unit (nats).
    """

    start: int
    peak: int
    height: float


def smooth(losses: Sequence[float], window: int = 8) -> np.ndarray:
    """Mean over the last `window` steps of each step, over fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(losses, dtype=float))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def find_spikes(losses: Sequence[float], warmup: int = 0, window: int = 8, threshold: float = 0.5) -> list[Spike]:
    """Find where the smoothed loss rises above the lowest value that it has had.

    Args:
        losses: Loss of each step, of the batch that was learned from.
        warmup: Steps at the start that do not count.
        window: Steps over which the loss is averaged: batches differ.
        threshold: Rise above the lowest value before, in nats, from which on it is a spike. It ends when the loss is
            within half of it again.

    Returns:
        Spikes in the order of time.
    """
    if len(losses) <= warmup:
        return []
    values = smooth(losses, window)
    spikes: list[Spike] = []
    lowest, start, peak = values[warmup], None, warmup
    for step in range(warmup, len(values)):
        rise = values[step] - lowest
        if start is None and rise > threshold:
            start = peak = step
        elif start is not None and values[step] > values[peak]:
            peak = step
        if start is not None and (rise < threshold / 2 or step == len(values) - 1):
            spikes.append(Spike(start, peak, float(values[peak] - lowest)))
            start = None
        if start is None:
            lowest = min(lowest, values[step])
    return spikes


def largest_rise(losses: Sequence[float], warmup: int = 0, window: int = 8) -> float:
    """The largest rise of the smoothed loss above the lowest value before, in nats, be it a spike or not."""
    values = smooth(losses, window)[warmup:]
    return float((values - np.minimum.accumulate(values)).max()) if len(values) else 0.0
