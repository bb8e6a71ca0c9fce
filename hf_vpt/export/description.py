"""What a file has to say beside its operations: the names of the classes, and how images are prepared."""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor


def describe(model: nn.Module, example: torch.Tensor, processor: BaseImageProcessor | None) -> dict[str, Any]:
    """Return `class_names`, and `preprocessing` where there is a processor.

    Args:
        model: The classifier.
        example: Pixel values `(B, 3, height, width)`.
        processor: The image processor.

    Raises:
        ValueError: The processor makes images of another size than the example's.
    """
    names = model.config.id2label
    about: dict[str, Any] = {"class_names": [names[number] for number in range(len(names))]}
    if processor is None:
        return about
    steps = _timm_steps(processor) if hasattr(processor, "data_config") else _steps(processor)
    made, given = steps.get("crop_size") or steps.get("size") or {}, list(example.shape[2:])
    if "height" in made and [made["height"], made["width"]] != given:
        raise ValueError(
            f"Found an example of {given[0]} × {given[1]} pixels and a processor that makes {made['height']} × "
            f"{made['width']}. The file takes one size. Make the example with the processor."
        )
    return about | {"preprocessing": steps}


def _steps(processor: BaseImageProcessor) -> dict[str, Any]:
    """The steps that a processor takes, under the names of its own settings; rescaling and normalisation always."""
    steps: dict[str, Any] = {}
    if processor.do_resize:
        steps["size"] = {name: length for name, length in dict(processor.size).items() if length is not None}
        steps["resample"] = int(processor.resample)
    if getattr(processor, "do_center_crop", False):
        steps["crop_size"] = {name: processor.crop_size[name] for name in ("height", "width")}
    steps["rescale_factor"] = processor.rescale_factor if processor.do_rescale else 1.0
    steps["image_mean"] = list(processor.image_mean) if processor.do_normalize else [0.0] * 3
    steps["image_std"] = list(processor.image_std) if processor.do_normalize else [1.0] * 3
    return steps


def _timm_steps(processor: BaseImageProcessor) -> dict[str, Any]:
    """The same for timm's processors, which have other words."""
    config = processor.data_config
    height, width = config["input_size"][1:]
    if config["crop_mode"] != "center" or height != width:
        raise ValueError(
            f"Found a processor of timm with crop_mode={config['crop_mode']!r} for {height} × {width} pixels. "
            "Centre crops of squares alone can be described. Leave `processor` out, and prepare images with it."
        )
    return {
        "size": {"shortest_edge": math.floor(height / config["crop_pct"])},
        "resample": int(Image.Resampling[config["interpolation"].upper()]),
        "crop_size": {"height": height, "width": width},
        "rescale_factor": 1 / 255,
        "image_mean": list(config["mean"]),
        "image_std": list(config["std"]),
    }
