"""Random integers that are the same on every machine and with every version of NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Integers:
    """A stream of random integers, a function of its seed alone.

    NumPy promises that the raw 64-bit integers of PCG64 stay as they are for a seed; the methods of its `Generator`,
    which make ranges, shuffles and floats of them, may change. Those needed here are therefore made here.

    Args:
        *seed: Integers of at least 0; another number gives an unrelated stream.
    """

    def __init__(self, *seed: int):
        self._bits = np.random.PCG64(seed)

    def below(self, limit: int, count: int) -> np.ndarray:
        """Draw `count` integers from 0 to `limit` - 1, each with the same chance.

        The remainder prefers small integers by `limit` / 2^64 at most, less than any number of images could show.
        """
        return (self._bits.random_raw(count) % np.uint64(limit)).astype(np.int64)

    def between(self, low: int, high: int, count: int) -> np.ndarray:
        """Draw `count` integers from `low` to `high`, both included."""
        return low + self.below(high - low + 1, count)

    def shuffled(self, values: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the values in random order."""
        return np.asarray(values)[np.argsort(self._bits.random_raw(len(values)), kind="stable")]

    def dealt(self, num_values: int, count: int) -> np.ndarray:
        """Deal the values 0 to `num_values` - 1 to `count` places as evenly as possible, in random order.

        Each value comes ⌊count / num_values⌋ times or once more; chance chooses those that come once more.
        """
        rounds = -(-count // num_values)
        surplus = self.shuffled(range(num_values))[: count - (rounds - 1) * num_values]
        return self.shuffled(np.concatenate([np.tile(np.arange(num_values), rounds - 1), surplus]))
