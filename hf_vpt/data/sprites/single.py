"""One white sprite on black: where it is, or which way it points, whatever else it looks like.

As in dSprites (https://github.com/google-deepmind/dsprites-dataset), an image is given by shape, scale, orientation
and place; one of these is the class, and the others are dealt evenly within each class. Differs from dSprites: edges
have grey levels, there are 48 orientations instead of 40, and shapes have equal area and are placed by their centre of
mass, so that the shape does not shift the class. dSprites' squares and ellipses look the same after a quarter or half
turn; where orientation is the class, shapes without any such symmetry take their place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .integers import Integers
from .shapes import ANGLES, PIXEL, SAMPLES, coverage


IMAGE_SIZE = 64  # pixels
POSITIONS = 32  # along each axis
COLUMNS = [f"column {number}" for number in range(16)]
COMPASS = ["N", "NNE", "NE", "ENE", "E", "ESE", "SE", "SSE", "S", "SSW", "SW", "WSW", "W", "WNW", "NW", "NNW"]

LOCATION_SHAPES = ("square", "ellipse", "heart")
LOCATION_SIDES = (130, 155, 180, 205, 230, 255)  # 8 to 16 pixels
LOCATION_STEP = 20  # between positions: 1.25 pixels, so that 32 of them take the sprite to the edges

ORIENTATION_SHAPES = ("heart", "teardrop", "triangle")
ORIENTATION_SIDES = (190, 210, 230, 250, 270, 290)  # 12 to 18 pixels: turns of small sprites move no pixel
ORIENTATION_STEP = 12  # 0.75 pixels


def draw_location(integers: Integers, label: int, count: int) -> np.ndarray:
    """Draw sprites in one of 16 columns of an image, each two of the 32 horizontal positions wide.

    Args:
        integers: Where chance comes from.
        label: Column, 0 to 15 from left to right.
        count: Number of images B.

    Returns:
        Grey images `(B, 64, 64)` of type uint8.
    """
    x = 2 * label + integers.dealt(2, count)
    angle = integers.dealt(ANGLES, count)
    return _draw(integers, LOCATION_SHAPES, LOCATION_SIDES, LOCATION_STEP, angle, x)


def draw_orientation(integers: Integers, label: int, count: int) -> np.ndarray:
    """Draw sprites whose tip points to one of the 16 points of the compass, or 7.5 degrees left or right of it.

    Args:
        integers: Where chance comes from.
        label: Point of the compass, 0 (up) to 15, clockwise.
        count: Number of images B.

    Returns:
        Grey images `(B, 64, 64)` of type uint8.
    """
    angle = (3 * label + integers.dealt(3, count) - 1) % ANGLES
    x = integers.dealt(POSITIONS, count)
    return _draw(integers, ORIENTATION_SHAPES, ORIENTATION_SIDES, ORIENTATION_STEP, angle, x)


def _draw(
    integers: Integers, shapes: Sequence[str], sides: Sequence[int], step: int, angle: np.ndarray, x: np.ndarray
) -> np.ndarray:
    count = len(x)
    shape, side, y = (integers.dealt(number, count) for number in (len(shapes), len(sides), POSITIONS))
    side = np.array(sides)[side]
    x, y = (IMAGE_SIZE * PIXEL // 2 + (2 * place - POSITIONS + 1) * step // 2 for place in (x, y))
    covered = np.zeros((count, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    for number, name in enumerate(shapes):
        rows = np.flatnonzero(shape == number)
        covered[rows] = coverage(name, side[rows], angle[rows], x[rows], y[rows], IMAGE_SIZE)
    return (covered.astype(np.int64) * 255 // SAMPLES).astype(np.uint8)
