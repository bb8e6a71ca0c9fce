"""Images that are decoded and resized once, and kept on the disk as they are then."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .cache import ArrayCache, make_key
from .decoding import BrokenImageError
from .fingerprint import identify_images
from .processing import ImageTransform


# What an image processor does after the resizing and cropping.
_AFTERWARDS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


class ResizedImages:
    """A map-style data set whose images come in the size that the backbone takes, from a file after the first time.

    It stands for a `datasets.Dataset`: `resized[indices]` are columns. `finish` is the rest of the way, so that
    `ImageTransform` on images and `finish` on resized ones give the same pixel values, which is tried with the first
    image. Any number of processes may read and fill one file.

    Args:
        images: Images and their classes, in the columns that `transform` reads.
        transform: From images to pixel values; without augmentation, or with `"affine"`, which begins with a resizing
            that is always the same.
        folder: Where the file is to be, with a name made of the images and the way they are resized.
        num_broken: Images that were left out before, because they cannot be read.

    Attributes:
        finish: A transform from resized images to pixel values.

    Raises:
        ValueError: Resizing is random or cannot be told from the rest.
        BrokenImageError: The first image cannot be read.
        OSError: The disk has no room.

    Example:
        >>> resized = ResizedImages(splits["train"], transform, folder)
        >>> train = AugmentedImages(resized, resized.finish)
    """

    def __init__(self, images: datasets.Dataset, transform: ImageTransform, folder: Path, num_broken: int = 0):
        self.images = images
        self.num_broken = num_broken
        self._others = images.remove_columns(transform.image_column)
        self._image_column = transform.image_column
        self._resize, self.finish = divided(transform)
        first = images[:1]
        try:
            resized = self._resize(first, positions=[0])["pixel_values"][0]
            wanted, found = transform(first, [0]), self.finish(self._columns(resized[None], {}), [0])
            is_exact = torch.equal(wanted["pixel_values"][0], found["pixel_values"][0])
        except BrokenImageError:
            raise
        except (TypeError, ValueError) as error:
            raise ValueError(_not_divided(transform, str(error))) from error
        if not is_exact:
            raise ValueError(_not_divided(transform, "the pixel values differ"))
        size = "x".join(map(str, resized.shape))
        self.cache = ArrayCache(folder / f"{self._key(transform)}-{size}", len(images), resized.shape, torch.uint8)

    def _key(self, transform: ImageTransform) -> str:
        processor = transform.processor
        how = {name: value for name, value in processor.to_dict().items() if name not in _AFTERWARDS}
        by = "processor" if transform.augment is None else repr(transform.augment.transforms[0])
        images = identify_images(self.images, self._image_column)
        return make_key(type(processor).__name__, how, by, self._image_column, *images)

    @property
    def features(self) -> datasets.Features:
        """Types of the columns, with the names of the classes."""
        return self.images.features

    @property
    def column_names(self) -> list[str]:
        return self.images.column_names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        """Return columns of several examples; what is not in the file yet is made and written."""
        missing = [index for index in indices if not self.cache.is_done(index)]
        if missing:
            for index, pixels in zip(missing, self._resize(self.images[missing], positions=missing)["pixel_values"]):
                self.cache.write(index, pixels)
        return self._columns(self.cache.read(indices), self._others[indices])

    def _columns(self, pixels: torch.Tensor, others: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {self._image_column: list(pixels), **others}


class _Finish(ImageTransform):
    """What is left to do with images that have been resized, tensors `(3, H, W)` of 8 bits."""

    def __init__(self, transform: ImageTransform):
        self.__dict__.update(transform.__dict__)
        self.processor = partial(transform.processor, do_resize=False, do_center_crop=False)
        if transform.augment is not None:
            self.augment = v2.Compose(transform.augment.transforms[1:])

    def __call__(
        self,
        batch: Mapping[str, Sequence[Any]],
        seeds: Sequence[int] | None = None,
        positions: Sequence[int | str] | None = None,
    ) -> dict[str, list[Any]]:
        if self.augment is not None:
            images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch[self.image_column]]
            return super().__call__({**batch, self.image_column: images}, seeds)
        processed = self.processor(batch[self.image_column])
        columns = {"pixel_values": [torch.as_tensor(pixels) for pixels in processed["pixel_values"]]}
        if self.label_column in batch:
            columns["labels"] = list(batch[self.label_column])
        return columns


def divided(transform: ImageTransform) -> tuple[ImageTransform, ImageTransform]:
    """Return the part of a transform that resizes, to `pixel_values` `(3, H, W)` of 8 bits, and the part after it.

    Raises:
        ValueError: The transform resizes at random.
    """
    resize = copy.copy(transform)
    if transform.augment is None:
        resize.processor = partial(_resize_alone, transform.processor)
    else:
        first = transform.augment.transforms[0]
        if not isinstance(first, v2.Resize):
            raise ValueError(
                f"Found an augmentation that begins with {type(first).__name__}. A cache of images needs a resizing "
                "that is always the same: use augmentation none or affine, or leave cache_images out."
            )
        resize.augment, resize.processor = first, _keep
    return resize, _Finish(transform)


def _resize_alone(processor: Any, images: list[Image.Image]) -> dict[str, list[torch.Tensor]]:
    processed = processor(images, do_rescale=False, do_normalize=False)["pixel_values"]
    pixels = [torch.as_tensor(np.asarray(image)) for image in processed]
    if any(image.dtype != torch.uint8 for image in pixels):
        raise ValueError(f"resized images are of type {pixels[0].dtype}")
    return {"pixel_values": pixels}


def _keep(images: list[Image.Image], **kwargs: Any) -> dict[str, list[torch.Tensor]]:
    """What stands for a processor after a resizing of our own."""
    return {"pixel_values": [F.pil_to_tensor(image) for image in images]}


def _not_divided(transform: ImageTransform, reason: str) -> str:
    return (
        f"Found that {type(transform.processor).__name__} cannot resize first and do the rest later: {reason}. A "
        "cache of images needs 8 bits between the two and equal pixel values: use another image processor, or leave "
        "cache_images out."
    )
