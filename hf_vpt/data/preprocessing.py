"""Which preprocessing images get: the checkpoint's own, or the one that the published scores were measured with."""

from __future__ import annotations

from typing import Literal

from PIL import Image
from transformers import ViTImageProcessor, ViTImageProcessorPil
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..choices import check_choice
from .processing import Augmentation, output_size
from .sources import is_benchmark


Preprocessing = Literal["processor", "published"]


def choose_processor(
    processor: BaseImageProcessor, preprocessing: Preprocessing, dataset_name: str
) -> BaseImageProcessor:
    """Return the image processor that training and evaluation use, and that is saved with the result.

    The published one is that of VPT (arXiv 2203.12119) and its successors. Mean and standard deviation are those of
    ImageNet, filters are bilinear. FGVC: the shorter side becomes 8/7 of the backbone's image size (256 pixels for
    224), and the centre is cut out. VTAB-1k: both sides become the image size, whatever the shape was.

    Args:
        processor: The one saved with the backbone, whose output size and kind (torchvision or Pillow) are kept.
        preprocessing: `"processor"` for the backbone's own, or `"published"`.
        dataset_name: Which data set it is for.

    Raises:
        ValueError: There is no published preprocessing of this data set.
    """
    check_preprocessing(preprocessing, dataset_name)
    if preprocessing == "processor":
        return processor
    height, width = output_size(processor)
    if dataset_name.startswith("fgvc/"):
        crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
        shape = {"size": {"shortest_edge": round(max(height, width) * 8 / 7)}, **crop}
    else:
        shape = {"size": {"height": height, "width": width}}
    processor_class = ViTImageProcessorPil if getattr(processor, "backend", None) == "pil" else ViTImageProcessor
    return processor_class(
        do_resize=True,
        resample=Image.Resampling.BILINEAR,
        do_rescale=True,
        do_normalize=True,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        do_convert_rgb=True,
        **shape,
    )


def choose_augmentation(augmentation: Augmentation, preprocessing: Preprocessing, dataset_name: str) -> Augmentation:
    """Return what training images go through: as the user says, or what belongs to the published preprocessing.

    That is `"resize_crop_flip"` for FGVC and nothing for VTAB-1k.
    """
    check_preprocessing(preprocessing, dataset_name, augmentation)
    if preprocessing == "published":
        return "resize_crop_flip" if dataset_name.startswith("fgvc/") else "none"
    return augmentation


def check_preprocessing(preprocessing: Preprocessing, dataset_name: str, augmentation: Augmentation = "none") -> None:
    """Refuse a preprocessing that does not exist for a data set, or not with an augmentation.

    Raises:
        ValueError: It does not.
    """
    check_choice("preprocessing", preprocessing, Preprocessing)
    if preprocessing == "processor":
        return
    if not is_benchmark(dataset_name):
        raise ValueError(
            f"Found preprocessing published and the data set '{dataset_name}'. It is defined for vtab/<task> and "
            "fgvc/<set> alone: name one of them, with dataset_dir for a copy on the disk, or choose processor."
        )
    is_fgvc = dataset_name.startswith("fgvc/")
    allowed = ("none", "crop_flip", "resize_crop_flip") if is_fgvc else ("none",)
    if augmentation not in allowed:
        own = "random crops and flips" if is_fgvc else "no augmentation"
        raise ValueError(
            f"Found preprocessing published and augmentation '{augmentation}' for {dataset_name}. To the published "
            f"preprocessing belongs {own}: leave augmentation out, or choose preprocessing processor."
        )
