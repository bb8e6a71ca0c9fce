"""Labelled image data sets and the way from an image to pixel values."""

from .datasets import load_image_dataset
from .processing import ImageTransform, collate_images, convert_to_rgb


__all__ = ["ImageTransform", "collate_images", "convert_to_rgb", "load_image_dataset"]
