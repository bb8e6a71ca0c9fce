"""How many coloured objects there are, from 1 to 8: eight classes, as in the counting task that VTAB makes of CLEVR.

As in CLEVR, the size of an object does not depend on how many there are, so that all of them together tell something:
a random forest that is given nothing but the area of all coloured pixels names the number in half of the test images,
and one that is given mean and contrast of the brightness in a third. Background and colours vary, and up to four dark
grey objects of the same shapes, which do not count, lie among them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .integers import Integers
from .shapes import ANGLES, PIXEL, SAMPLES, coverage, reach


IMAGE_SIZE = 64  # pixels
COUNTS = tuple(range(1, 9))
SHAPES = ("disc", "square", "ellipse", "heart")
# Which of red, green and blue an object has in full; of the others it has a quarter.
HUES = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1))
AREA = (30, 150)  # pixels, of one coloured object
GREY_AREA = (20, 90)  # pixels, of one grey object
MAX_GREY = 4
BACKGROUND, GREY, COLOUR = (0, 30), (50, 75), (150, 255)  # brightness of 255
GAP = 2 * PIXEL  # between objects, so that they stay apart
TRIES = 50  # places for one object, before all objects of the image are placed anew


class Sprites(NamedTuple):
    """The objects of some images, one entry for each of S: in which image, shape (an index), side, place, colour."""

    image: np.ndarray
    shape: np.ndarray
    side: np.ndarray
    angle: np.ndarray
    x: np.ndarray
    y: np.ndarray
    colour: np.ndarray


def draw_counting(integers: Integers, label: int, count: int) -> np.ndarray:
    """Draw images with `COUNTS[label]` coloured objects and 0 to 4 grey ones, none of which touch.

    Args:
        integers: Where chance comes from.
        label: Class, 0 to 7, for 1 to 8 objects.
        count: Number of images B.

    Returns:
        Colour images `(B, 64, 64, 3)` of type uint8.
    """
    background = integers.between(*BACKGROUND, count)
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    images[:] = background[:, None, None, None]
    num_grey = integers.dealt(MAX_GREY + 1, count)
    scenes = [_scene(integers, image, COUNTS[label], int(num_grey[image])) for image in range(count)]
    _paint(images, Sprites(*(np.concatenate(column) for column in zip(*scenes))))
    return images


def _scene(integers: Integers, image: int, num_coloured: int, num_grey: int) -> Sprites:
    total = num_coloured + num_grey
    area = np.concatenate([integers.between(*AREA, num_coloured), integers.between(*GREY_AREA, num_grey)]) * PIXEL**2
    side = np.array([math.isqrt(value) for value in area.tolist()])
    shape, angle = integers.below(len(SHAPES), total), integers.below(ANGLES, total)
    full = integers.between(*COLOUR, num_coloured)[:, None]
    hue = np.array(HUES)[integers.below(len(HUES), num_coloured)]
    grey = integers.between(*GREY, num_grey)[:, None].repeat(3, axis=1)
    colour = np.concatenate([np.where(hue == 1, full, full // 4), grey])
    x, y = _place(integers, [reach(SHAPES[index], int(length)) for index, length in zip(shape, side)])
    return Sprites(np.full(total, image), shape, side, angle, x, y, colour)


def _place(integers: Integers, reaches: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Find a place for each object, the largest first, that keeps it clear of the others and of the edges."""
    order = sorted(range(len(reaches)), key=lambda index: -reaches[index])
    while True:
        places: dict[int, tuple[int, int]] = {}
        for index in order:
            own = reaches[index]
            tries = integers.between(own, IMAGE_SIZE * PIXEL - own, 2 * TRIES).reshape(TRIES, 2).tolist()
            free = (
                place
                for place in tries
                if all(math.dist(place, places[other]) >= own + reaches[other] + GAP for other in places)
            )
            place = next(free, None)
            if place is None:
                break
            places[index] = place
        else:
            x, y = np.array([places[index] for index in range(len(reaches))]).T
            return x, y


def _paint(images: np.ndarray, sprites: Sprites) -> None:
    """Paint the objects over the backgrounds, in place; at an edge, a pixel has a part of both colours."""
    for number, name in enumerate(SHAPES):
        rows = np.flatnonzero(sprites.shape == number)
        image, _, side, angle, x, y, colour = (column[rows] for column in sprites)
        window = 2 * (reach(name, int(side.max(initial=0))) // PIXEL + 2)
        left, top = x // PIXEL - window // 2, y // PIXEL - window // 2
        covered = coverage(name, side, angle, x - left * PIXEL, y - top * PIXEL, window)
        sprite, row, column = np.nonzero(covered)
        parts = covered[sprite, row, column].astype(np.int64)[:, None]
        place = image[sprite], top[sprite] + row, left[sprite] + column
        # Objects do not touch, so what lies below is background.
        images[place] = (images[place] * (SAMPLES - parts) + colour[sprite] * parts) // SAMPLES
