"""Labelled image data sets and the way from an image to pixel values."""

from .augmented import AugmentedImages
from .datasets import load_image_dataset
from .decoding import BrokenImageError, convert_to_rgb, decode_to_rgb
from .prefixes import PrefixImages
from .processing import ImageTransform, collate_images
from .resized import ResizedImages
from .streams import StreamedImages


__all__ = [
    "AugmentedImages",
    "BrokenImageError",
    "ImageTransform",
    "PrefixImages",
    "ResizedImages",
    "StreamedImages",
    "collate_images",
    "convert_to_rgb",
    "decode_to_rgb",
    "load_image_dataset",
]
