"""Shapes as inequalities between integers, turned, scaled and put on a grid of pixels without any rounding of floats.

A shape is drawn in a frame of its own, in 1/256 of its unit, with y upwards. On the image, lengths and places are in
1/16 of a pixel, with y downwards, and angles in 1/48 of a turn, clockwise. Letter in shapes of arrays: B sprites.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np


UNIT = 256  # of a shape's frame
FRAME = 2 * UNIT  # a shape lies within [-FRAME, FRAME] in x and y
PIXEL = 16  # parts of a pixel in which lengths and places are counted
ANGLES = 48  # in one turn: steps of 7.5 degrees
SAMPLES = 4  # points of a pixel, 2 x 2, that are looked at

TRIG_SCALE = 1 << 14
# No entry lies near the middle between two integers, so every mathematical library rounds to the same table.
SINES = [round(TRIG_SCALE * math.sin(2 * math.pi * angle / ANGLES)) for angle in range(ANGLES)]
COSINES = [round(TRIG_SCALE * math.cos(2 * math.pi * angle / ANGLES)) for angle in range(ANGLES)]


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x * x + y * y <= UNIT * UNIT


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) <= UNIT


def _ellipse(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 9 * x * x + 4 * y * y <= 9 * UNIT * UNIT  # half axes 1 and 3/2


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # (x² + y² - 1)³ <= x² y³, with the tip upwards: a heart on its head. Terms stay below 2^58.
    return (x * x + y * y - UNIT * UNIT) ** 3 <= -UNIT * x * x * y**3


def _teardrop(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # A disc of radius r whose centre lies d below the tip, and the triangle between the tip and the tangents to it.
    radius, distance, tip = 192, 512, 384
    disc = x * x + (y + distance - tip) ** 2 <= radius * radius
    below = tip - y
    cone = x * x * (distance**2 - radius**2) <= radius**2 * below * below
    from_tangent_to_tip = (below >= 0) & (below * distance <= distance**2 - radius**2)
    return disc | (cone & from_tangent_to_tip)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Isosceles, half as wide again as high would be equilateral: one corner is clearly the tip.
    tip, base, half_width = 384, -320, 256
    return (y >= base) & (abs(x) * (tip - base) <= half_width * (tip - y))


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": _disc,
    "square": _square,
    "ellipse": _ellipse,
    "heart": _heart,
    "teardrop": _teardrop,
    "triangle": _triangle,
}


class Measures(NamedTuple):
    """Facts of a shape, in 1/256 of its unit: its centre of mass, the root of its area, its reach from the centre."""

    centre_x: int
    centre_y: int
    root_area: int
    reach: int


@lru_cache
def measure(shape: str) -> Measures:
    """Measure a shape by counting the points of its frame that it covers."""
    axis = np.arange(-FRAME, FRAME + 1, dtype=np.int64)
    rows, columns = np.nonzero(SHAPES[shape](axis[None, :], axis[:, None]))
    x, y = axis[columns], axis[rows]
    centre_x, centre_y = int(x.sum()) // len(x), int(y.sum()) // len(y)
    reach = math.isqrt(int(((x - centre_x) ** 2 + (y - centre_y) ** 2).max())) + 1
    return Measures(centre_x, centre_y, math.isqrt(len(x)), reach)


def reach(shape: str, side: int) -> int:
    """Return how far a shape of area `side`² may reach from its centre of mass, in parts of a pixel, rounded up."""
    measures = measure(shape)
    return -(-measures.reach * side // measures.root_area)


def coverage(shape: str, side: np.ndarray, angle: np.ndarray, x: np.ndarray, y: np.ndarray, window: int) -> np.ndarray:
    """Count, for each pixel of a window, how many of its 4 sample points a sprite covers.

    All shapes have the same area `side`² and their centre of mass at (x, y), so neither tells of the shape.

    Args:
        shape: A key of `SHAPES`.
        side: Root of the area, `(B,)`, in parts of a pixel.
        angle: Clockwise turn, `(B,)`, in 1/48 of a full one. At 0 the tip, if there is one, points up.
        x: Place of the centre of mass, `(B,)`, in parts of a pixel from the left edge of the window.
        y: The same from the upper edge.
        window: Height and width of the window in pixels.

    Returns:
        Counts from 0 to 4, `(B, window, window)`, of type uint8.
    """
    measures = measure(shape)
    samples = np.arange(PIXEL // 4, window * PIXEL, PIXEL // 2, dtype=np.int64)
    right = samples[None, None, :] - x[:, None, None]
    up = y[:, None, None] - samples[None, :, None]
    sine, cosine = (np.array(table, dtype=np.int64)[angle][:, None, None] for table in (SINES, COSINES))
    scale = side[:, None, None] * TRIG_SCALE
    # Turning the sprite clockwise is turning the points anticlockwise.
    own_x = (right * cosine - up * sine) * measures.root_area // scale + measures.centre_x
    own_y = (right * sine + up * cosine) * measures.root_area // scale + measures.centre_y
    limit = FRAME + 1  # beyond the frame all is outside, and high powers of far points would overflow
    inside = SHAPES[shape](own_x.clip(-limit, limit), own_y.clip(-limit, limit)).view(np.uint8)
    return inside[:, ::2, ::2] + inside[:, 1::2, ::2] + inside[:, ::2, 1::2] + inside[:, 1::2, 1::2]
