"""One frozen backbone with all its adapters, ready to score images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from ..data.processing import ImageTransform
from ..hub.loading import load_image_classifier
from ..prediction import to_scores
from ..tuners import METHODS
from .arguments import ServingArguments


@dataclass(frozen=True)
class ServedAdapter:
    """What the service knows about an adapter.

    Attributes:
        name: In requests.
        method: Of prompt tuning, a key of `hf_vpt.METHODS`.
        source: Its Hub id, or the name of its folder.
        label_names: Name of each class.
        transform: Makes pixel values of its images.
        problem_type: Transformers' word for the kind of classification.
    """

    name: str
    method: str
    source: str
    label_names: list[str]
    transform: ImageTransform
    problem_type: str | None = None


class Classifier:
    """A model and what is known about each of its adapters.

    At the start, each adapter classifies a wide and a tall image, so that one that cannot is found before a request
    finds it.

    Args:
        model: The backbone with its adapters, in evaluation mode.
        processors: Image processor of each adapter that requests may ask for.
        sources: Where each adapter is from.
        device: Where the model runs.
        dtype: Number format of the pixel values that it gets.

    Raises:
        ValueError: An adapter gives no scores.
    """

    def __init__(
        self,
        model: PeftModel,
        processors: Mapping[str, BaseImageProcessor],
        sources: Mapping[str, str] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.model = model.to(device).eval()
        self.device = device
        self.dtype = dtype
        self.adapters: dict[str, ServedAdapter] = {}
        for name, processor in processors.items():
            transform = ImageTransform(processor)
            num_classes = self._try_out(name, transform)
            config = model.peft_config[name]
            method = next((m for m, config_class in METHODS.items() if type(config) is config_class), "other")
            labels = label_names(model, name, num_classes)
            problem_type = getattr(config, "problem_type", None)
            source = _public_name((sources or {}).get(name, name))
            self.adapters[name] = ServedAdapter(name, method, source, labels, transform, problem_type)

    @torch.inference_mode()
    def scores(self, adapter_names: Sequence[str], images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the scores of the classes of its own adapter for each image, see `hf_vpt.prediction.to_scores`.

        Args:
            adapter_names: Adapter of each of B images.
            images: B pixel values `(3, height, width)` of one shape.

        Raises:
            ValueError: A score is no number.
        """
        counts = [len(self.adapters[name].label_names) for name in adapter_names]
        # Heads with fewer classes than the widest have minus infinity in the rest.
        logits = [row[:count] for row, count in zip(self._logits(adapter_names, images), counts, strict=True)]
        if not all(row.isfinite().all() for row in logits):
            raise ValueError(
                f"The model gave scores that are no numbers, in {self.dtype}. Finite ones are needed: serve it with "
                "--dtype float32 or bfloat16."
            )
        kinds = [self.adapters[name].problem_type for name in adapter_names]
        return [to_scores(row, kind) for row, kind in zip(logits, kinds, strict=True)]

    def _logits(self, adapter_names: Sequence[str], images: Sequence[torch.Tensor]) -> torch.Tensor:
        pixel_values = torch.stack(list(images)).to(self.device, self.dtype)
        return self.model(pixel_values=pixel_values, adapter_names=list(adapter_names)).logits.float().cpu()

    @torch.inference_mode()
    def _try_out(self, name: str, transform: ImageTransform) -> int:
        """Returns the number of classes."""
        try:
            images = [Image.new("RGB", size, "gray") for size in ((48, 32), (32, 48))]
            images = transform({"image": images})["pixel_values"]
            logits = [self._logits([name], [image])[0] for image in images]
        except Exception as error:
            raise ValueError(
                f"Adapter '{name}' failed on a trial image: {error} It must take images of any shape: check its image "
                "processor, which has to bring them to one size, and its backbone."
            ) from error
        return int((logits[0] != -torch.inf).sum())


def label_names(model: PeftModel, name: str, num_classes: int) -> list[str]:
    """Return the names of an adapter's classes; numbers where it has none."""
    names = getattr(model.peft_config[name], "label_names", None) or [str(number) for number in range(num_classes)]
    # JSON can hold halves of characters, which no answer can.
    return [name.encode("utf-8", "replace").decode() for name in names]


def load_classifier(adapters: Mapping[str, str], args: ServingArguments) -> Classifier:
    """Load adapters on one frozen backbone.

    Args:
        adapters: Folder or Hub id of each adapter, by its name.
        args: Device and number format.

    Raises:
        OSError: A repository or a file cannot be reached.
        ValueError: The adapters do not fit one backbone, or one another.
    """
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    dtype = getattr(torch, args.dtype)
    how = {"base_model": args.base_model, "dtype": dtype, "attn_implementation": args.attn_implementation}
    processors = {}
    for name, source in adapters.items():
        model, processors[name] = load_image_classifier(source, adapter_name=name, **how)
        how = {"into": model}
    return Classifier(model, processors, adapters, args.device, dtype)


def _public_name(source: str) -> str:
    """A folder's own name: where it lies on this machine is nobody's business."""
    return Path(source).resolve().name if Path(source).exists() else source
