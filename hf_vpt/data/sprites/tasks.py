"""The tasks by name, and how their images become data sets."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from .counting import COUNTS, draw_counting
from .integers import Integers
from .single import COLUMNS, COMPASS, draw_location, draw_orientation


SPLIT_SIZES = {"train": 800, "validation": 200, "test": 2000}  # VTAB-1k's division of 1,000 images, and a test split


class Task(NamedTuple):
    """A benchmark: `draw(integers, label, count)` gives `count` images of a class, `classes` the names of all."""

    draw: Callable[[Integers, int, int], np.ndarray]
    classes: list[str]


TASKS = {
    "sprite_location": Task(draw_location, COLUMNS),
    "sprite_orientation": Task(draw_orientation, COMPASS),
    "counting": Task(draw_counting, [str(count) for count in COUNTS]),
}


def load_drawn(task: str, seed: int = 0) -> DatasetDict:
    """Draw a benchmark with 800 images to train on, 200 to validate on and 2,000 to test on.

    Images have 64 x 64 pixels. No image comes twice, and the classes of a split differ by one image in size at most.
    The same seed gives the same pixels on every machine.

    - `sprite_location`: in which of 16 columns a white square, ellipse or heart is, whatever its height, orientation
      and scale.
    - `sprite_orientation`: to which of the 16 points of the compass the tip of a white heart, teardrop or triangle
      points, whatever its place and scale.
    - `counting`: how many coloured objects there are, 1 to 8, whatever their area, shapes, colours and the grey
      objects between them.

    Args:
        task: A key of `TASKS`, with or without `drawn/` before it.
        seed: What the images depend on, at least 0.

    Raises:
        ValueError: There is no such task, or the seed is negative.
    """
    name = task.removeprefix("drawn/")
    if name not in TASKS:
        raise ValueError(
            f"There is no drawn data set '{task}'. One of {[f'drawn/{known}' for known in TASKS]} is needed: correct "
            "the name, or write './' before it if a folder is meant."
        )
    if seed < 0:
        raise ValueError(f"The seed of a drawn data set is {seed}. It must be at least 0: pass for example 0.")
    # Streams of different tasks must not be related; the letters of a name are integers too.
    integers = Integers(seed, *name.encode())
    seen: set[bytes] = set()
    return DatasetDict({split: _draw_split(TASKS[name], size, integers, seen) for split, size in SPLIT_SIZES.items()})


def _draw_split(task: Task, size: int, integers: Integers, seen: set[bytes]) -> Dataset:
    labels = integers.dealt(len(task.classes), size)
    encoded: list[dict | None] = [None] * size
    for label in range(len(task.classes)):
        rows = np.flatnonzero(labels == label)
        images = _draw_unseen(task, label, len(rows), integers, seen)
        for row, image in zip(rows, images):
            encoded[row] = {"bytes": _png_bytes(image), "path": None}
    features = Features({"image": Image(), "label": ClassLabel(names=task.classes)})
    return Dataset.from_dict({"image": encoded, "label": labels}, features=features)


def _draw_unseen(task: Task, label: int, count: int, integers: Integers, seen: set[bytes]) -> np.ndarray:
    """Draw images of one class until all of them are new; replacing single ones would upset their balance."""
    while True:
        images = task.draw(integers, label, count)
        pixels = {image.tobytes() for image in images}
        if len(pixels) == count and not pixels & seen:
            seen |= pixels
            return images


def _png_bytes(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
