"""Labelled image data sets and the way from an image to pixel values."""

from .augmented import AugmentedImages
from .datasets import load_image_dataset
from .prefixes import PrefixImages
from .processing import ImageTransform, collate_images, convert_to_rgb
from .resized import ResizedImages
from .streams import StreamedImages


__all__ = [
    "AugmentedImages",
    "ImageTransform",
    "PrefixImages",
    "ResizedImages",
    "StreamedImages",
    "collate_images",
    "convert_to_rgb",
    "load_image_dataset",
]
