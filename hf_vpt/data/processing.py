"""From images of any colour mode to the pixel values a backbone was pre-trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torchvision.transforms import v2
from transformers.image_processing_utils import BaseImageProcessor

from ..choices import check_choice
from .decoding import decode_to_rgb


Augmentation = Literal["none", "affine", "crop_flip", "resize_crop_flip"]


class ImageTransform:
    """Make pixel values from images, exactly as the backbone's own image processor does.

    Size, interpolation, rescaling, mean and standard deviation are the processor's, so training, evaluation and a
    later `pipeline` see the same numbers. Objects can be pickled and used in data loader workers.

    Args:
        processor: The image processor saved with the backbone.
        augmentation: What training images go through. `"none"`: nothing. `"crop_flip"`: a random crop of 8 to 100 %
            of the area, resized to the processor's output size, and a horizontal flip with probability 0.5, the
            ImageNet recipe. `"resize_crop_flip"`: the processor's own resizing, a random cut where the processor, as
            it must, cuts out the centre, and the flip. `"affine"`: a rotation of up to 10 degrees, a shift of up to
            10 % and a scale of 0.9 to 1.1, for images whose meaning a flip or a tight crop would change, such as
            digits.
        image_column: Column of the images in a batch.
        label_column: Column of the classes in a batch; may be absent from it.

    Example:
        >>> transform = ImageTransform(AutoImageProcessor.from_pretrained("google/vit-base-patch16-224-in21k"))
        >>> train = dataset["train"].with_transform(transform)
        >>> train[0]["pixel_values"].shape
        torch.Size([3, 224, 224])
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        augmentation: Augmentation = "none",
        image_column: str = "image",
        label_column: str = "label",
    ):
        check_choice("augmentation", augmentation, Augmentation)
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column
        self.augment = None
        if augmentation != "none":
            height, width = output_size(processor)
            # Pillow numbers its filters as the processor does; torchvision has an enum of its own.
            resample = processor.resample if processor.resample is not None else Image.Resampling.BILINEAR
            interpolation = v2.InterpolationMode[Image.Resampling(int(resample)).name]
            if augmentation == "crop_flip":
                steps = [v2.RandomResizedCrop((height, width), interpolation=interpolation), v2.RandomHorizontalFlip()]
            elif augmentation == "resize_crop_flip":
                resize = v2.Resize(_size_before_crop(processor), interpolation=interpolation)
                steps = [resize, v2.RandomCrop((height, width)), v2.RandomHorizontalFlip()]
            else:
                bilinear = v2.InterpolationMode.BILINEAR  # of what affine maps know, the best for images
                steps = [
                    v2.Resize((height, width), interpolation=interpolation),
                    v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=bilinear),
                ]
            self.augment = v2.Compose(steps)

    def __call__(
        self,
        batch: Mapping[str, Sequence[Any]],
        seeds: Sequence[int] | None = None,
        positions: Sequence[int | str] | None = None,
    ) -> dict[str, list[Any]]:
        """Map images and classes to `pixel_values`, tensors `(3, height, width)`, and `labels`, integers.

        Args:
            batch: Columns of images, as Pillow images or as `Image(decode=False)` of `datasets` holds them, and
                classes.
            seeds: One for each image, which alone decides how that image is augmented. Default: PyTorch's global
                random state decides, and moves on.
            positions: Where each image stands in its split, for the error about one that is broken.

        Raises:
            BrokenImageError: An image cannot be read.
        """
        images = batch[self.image_column]
        images = [decode_to_rgb(image, where) for image, where in zip(images, positions or [None] * len(images))]
        if self.augment is None:
            processed = self.processor(images)
        else:
            # Augmented images have the final size already; rescaling and normalisation stay the processor's.
            images = [self._augment(image, seed) for image, seed in zip(images, seeds or [None] * len(images))]
            processed = self.processor(images, do_resize=False, do_center_crop=False)
        columns = {"pixel_values": [torch.as_tensor(pixels) for pixels in processed["pixel_values"]]}
        if self.label_column in batch:
            columns["labels"] = list(batch[self.label_column])
        return columns

    def _augment(self, image: Image.Image, seed: int | None) -> Image.Image:
        if seed is None:
            return self.augment(image)
        with torch.random.fork_rng(devices=[]):
            # Not `torch.manual_seed`, which would seed the generators of all accelerators, and those are not restored.
            torch.default_generator.manual_seed(seed)
            return self.augment(image)


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Return the height and width, in pixels, of what an image processor puts out.

    Raises:
        ValueError: The processor keeps each image's own shape, so there is no such size.
    """
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    if "height" in size and "width" in size:
        return size["height"], size["width"]
    if "shortest_edge" in size:
        # Processors that fix the shortest edge and crop nothing expect square inputs in training.
        return size["shortest_edge"], size["shortest_edge"]
    raise ValueError(
        f"{type(processor).__name__} has the size {dict(size)}. A size with height and width, or with shortest_edge, "
        "is needed for random crops: set `processor.size`, or use augmentation 'none'."
    )


def _size_before_crop(processor: BaseImageProcessor) -> int | list[int]:
    """Return the length of the shorter side, or height and width, that images have before their centre is cut out."""
    if not getattr(processor, "do_center_crop", False):
        raise ValueError(
            f"{type(processor).__name__} cuts nothing out of an image. Augmentation 'resize_crop_flip' needs a "
            "processor that cuts out the centre: set preprocessing published, or use augmentation 'crop_flip'."
        )
    size = processor.size
    return size["shortest_edge"] if "shortest_edge" in size else [size["height"], size["width"]]


def collate_images(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack transformed examples to a batch: `pixel_values` `(B, 3, height, width)` and, if present, `labels` `(B,)`.

    Raises:
        ValueError: Examples were not transformed, or differ in size.
    """
    if "pixel_values" not in examples[0]:
        raise ValueError(
            f"Examples have the keys {sorted(examples[0])}. 'pixel_values' is needed: apply "
            "`dataset.with_transform(ImageTransform(processor))`, and keep remove_unused_columns=False in the "
            "training arguments."
        )
    shapes = {tuple(example["pixel_values"].shape) for example in examples}
    if len(shapes) > 1:
        raise ValueError(
            f"Images of one batch have the shapes {sorted(shapes)}. One shape is needed: give the image processor a "
            "size with height and width, or do_center_crop."
        )
    batch = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([example["labels"] for example in examples], dtype=torch.long)
    return batch
