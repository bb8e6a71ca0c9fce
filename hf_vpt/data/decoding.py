"""From an image file of any colour mode and orientation to 8-bit RGB; and files that are broken."""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import datasets
import numpy as np
from datasets import Image as ImageFeature
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.utils import logging


logger = logging.get_logger(__name__)

BrokenImages = Literal["stop", "skip"]

# What reading a broken file raises that a lost connection does not.
_BROKEN_CONTENT = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
)
# Decoded before any of them is dropped, so that all cores have some.
IMAGES_AT_ONCE = 256
_MOST_NAMED = 10


class BrokenImageError(ValueError):
    """An image cannot be read.

    Args:
        message: What was found, what is needed, what to do.
        path: The image's file, or its name in an archive; None where it has none.
        position: Where it stands in its split, counted from 0; None where nobody knows.
    """

    # Data loaders make errors of their workers anew from the message alone.
    def __init__(self, message: str, path: str | None = None, position: int | str | None = None):
        super().__init__(message)
        self.path = path
        self.position = position


def decode_to_rgb(image: Image.Image | Mapping[str, Any] | str, position: int | str | None = None) -> Image.Image:
    """Return an image as 8-bit RGB, upright: the one way by which images come into training and evaluation.

    Cameras' notes on orientation (EXIF) are followed. Colours: see `convert_to_rgb`.

    Args:
        image: A Pillow image, a path, or `{"bytes": ..., "path": ...}`, which `Image(decode=False)` holds.
        position: Where the image stands in its split, for the error message.

    Raises:
        BrokenImageError: The file is missing, cut off, or no image, or its colours cannot be told.
    """
    path = image if isinstance(image, str) else image.get("path") if isinstance(image, Mapping) else None
    path = path or getattr(image, "filename", None) or None
    is_embedded = isinstance(image, Mapping) and image.get("bytes") is not None
    is_remote = isinstance(image, (str, Mapping)) and not is_embedded and "://" in (path or "")
    try:
        if isinstance(image, str):
            image = {"path": image, "bytes": None}
        if isinstance(image, Mapping):
            image = ImageFeature().decode_example(image)
        if image.getexif().get(ExifTags.Base.Orientation) is not None:
            image = ImageOps.exif_transpose(image)
        return convert_to_rgb(image)
    except Exception as error:  # Pillow's readers raise whatever comes to mind
        if not _is_about_content(error, is_remote):
            raise
        number = "An image" if position is None else f"Image {position}"
        name = f" ('{path}')" if path else ""
        reason = str(error).rstrip(".") or type(error).__name__
        raise BrokenImageError(
            f"{number}{name} cannot be read: {reason}. Training needs every image: replace or remove the file, or "
            "pass --broken_images skip, which leaves broken images out and counts them.",
            path,
            position,
        ) from error


def _is_about_content(error: Exception, is_remote: bool) -> bool:
    """Whether an error says that an image is broken, and not that this machine or another one is in trouble."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return False
    # Pillow's own errors have no number: "image file is truncated".
    return not is_remote or isinstance(error, _BROKEN_CONTENT) or (type(error) is OSError and error.errno is None)


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any colour mode into 8-bit RGB, as `pipeline("image-classification")` sees it.

    Grey, palette, CMYK and transparent images are converted by Pillow (transparency is dropped). 16-bit grey images
    are scaled from 0..65535 to 0..255 first, because Pillow would cut everything above 255 off to white.

    Args:
        image: Any Pillow image; float images (mode F) only if their values lie in 0..255.

    Raises:
        ValueError: A float image has values outside 0..255, so its range is unknown.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        # Mode I holds 32 bits, but Pillow also reads 16-bit and even 8-bit files into it.
        if image.mode != "I" or pixels.max(initial=0) > 255:
            pixels = pixels // 257
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        low, high = image.getextrema()
        if low < 0 or high > 255:
            raise ValueError(
                f"A float image (mode F) has values from {low:g} to {high:g}. Values from 0 to 255 are needed, "
                "because nothing in the file says what white is: rescale the images and save them with 8 bits."
            )
    elif image.mode == "P" and "transparency" in image.info:
        # Pillow warns about palettes with transparency unless they pass through RGBA.
        image = image.convert("RGBA")
    elif image.mode in ("La", "RGBa"):  # colours multiplied by their opacity, which Pillow takes back first
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return image.convert("RGB")


def undecoded(data: datasets.Dataset, column: str) -> datasets.Dataset:
    """Return a data set whose images are left as files, for `decode_to_rgb` to read; others are left as they are."""
    if isinstance(data, datasets.Dataset) and isinstance(data.features.get(column), ImageFeature):
        return data.cast_column(column, ImageFeature(decode=False))
    return data


def readable(images: Sequence[Any]) -> list[Image.Image | None]:
    """Decode images; those that are broken become None."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_decode_or_none, images))


def drop_broken(data: datasets.Dataset, column: str) -> tuple[datasets.Dataset, int]:
    """Leave out the images that cannot be read, and tell how many they are. All of them are decoded once for it.

    Args:
        data: A split.
        column: Of the images.

    Raises:
        ValueError: No image can be read.
    """
    data, kept, broken = undecoded(data, column), [], []
    for start in range(0, len(data), IMAGES_AT_ONCE):
        images = data[start : start + IMAGES_AT_ONCE][column]
        for offset, image in enumerate(readable(images)):
            (broken if image is None else kept).append(start + offset)
    if not broken:
        return data, 0
    names = [(data[index][column] or {}).get("path") or f"image {index}" for index in broken[:_MOST_NAMED]]
    more = f" and {len(broken) - _MOST_NAMED} more" if len(broken) > _MOST_NAMED else ""
    if not kept:
        raise ValueError(
            f"None of {len(data)} images can be read ({', '.join(names)}{more}). Some must be left to train on: get "
            "the data set anew."
        )
    logger.warning(f"{len(broken)} of {len(data)} images cannot be read and are left out: {', '.join(names)}{more}.")
    return data.select(kept), len(broken)


def _decode_or_none(image: Any) -> Image.Image | None:
    try:
        return decode_to_rgb(image)
    except BrokenImageError:
        return None
