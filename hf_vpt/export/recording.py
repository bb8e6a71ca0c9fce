"""From a model to its operations, and the proof that they are the model's."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..tuners.base import PromptTuner


# While operations are recorded, Transformers makes masks that hide nothing, for the attention functions whose masks it
# knows. BEiT adds such a mask to its position bias as numbers: one more for each token and, wrongly, none for prompts.
# Under another name, scaled dot-product attention gets no mask.
UNMASKED_ATTENTION = "hfvpt_sdpa_without_masks"
AttentionInterface.register(UNMASKED_ATTENTION, ALL_ATTENTION_FUNCTIONS["sdpa"])


class Logits(nn.Module):
    """A classifier as it is deployed: logits from pixel values.

    Args:
        model: The classifier.
        options: More arguments of its `forward`.
    """

    def __init__(self, model: nn.Module, options: dict[str, Any]):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values, **self.options).logits


@dataclass(frozen=True)
class Recording:
    """A model's operations, on a CPU and in float32, for any number of images.

    Attributes:
        program: The operations.
        batches: Images to try them on: the example, one image and three images of noise.
        logits: The model's own for each batch.
    """

    program: torch.export.ExportedProgram
    batches: list[torch.Tensor]
    logits: list[torch.Tensor]

    def check(self, run: Callable[[torch.Tensor], torch.Tensor], tolerance: float) -> None:
        """Raise `RuntimeError` if a function does not give the model's logits."""
        for images, logits in zip(self.batches, self.logits):
            difference = (run(images) - logits).abs().max().item()
            if not difference <= tolerance:  # nor is NaN any agreement
                raise RuntimeError(
                    f"Found logits of the exported file that differ by up to {difference:.2g} from the model's, for "
                    f"{len(images)} images. {tolerance:.2g} is allowed, so no file was written. If the logits "
                    f"themselves are large (here up to {logits.abs().max().item():.2g}), pass a larger `tolerance`; "
                    "else try a newer onnxruntime, whose norms are more exact from 1.30 on, or another torch."
                )


def check_exportable(model: nn.Module) -> None:
    """Raise `ValueError` if a model takes more than an image, gives no logits or is quantised."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name, arguments = type(base).__name__, inspect.signature(base.forward).parameters
    if getattr(base, "is_quantized", False):
        raise ValueError(
            f"Found a quantised {name}. Other programs do not know its numbers, which the file must be made of. Load "
            "the backbone without quantization, and the adapter into it."
        )
    if "spatial_shapes" in arguments:
        raise ValueError(
            f"Found a {name}, which takes patches, their mask and each image's grid. The file's only input are "
            "images. Use a backbone that takes them, such as SigLIP."
        )
    if "labels" not in arguments:
        raise ValueError(
            f"Found a {name}, which knows no classes. The file's output are the logits of a classifier. Load the "
            "backbone with `AutoModelForImageClassification`."
        )


def record(model: nn.Module, example: torch.Tensor, options: dict[str, Any]) -> Recording:
    """Record a classifier's operations in evaluation mode, from a copy: the model stays as it is.

    Args:
        model: A `PeftModel` with the adapters that are active, a baked or a plain model.
        example: Pixel values `(B, 3, height, width)`.
        options: More arguments of the model's `forward`.
    """
    module = Logits(copy.deepcopy(model).to("cpu", torch.float32), options).eval()
    example = example.detach().to("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(number, *example.shape[1:], generator=generator) for number in (1, 3)]
    batches = [example, *noise]
    with torch.no_grad():
        logits = [module(images) for images in batches]  # before anything is changed
        module.model = _simplify(module.model)
        # Of two images or more: a length of one would be taken for one that never changes.
        example = torch.cat([example, example])
        batch = {"pixel_values": {0: torch.export.Dim("batch")}}
        program = torch.export.export(module, (example,), dynamic_shapes=batch)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which would stand in the file
    return Recording(program, batches, logits)


def _simplify(model: nn.Module) -> nn.Module:
    """The same function with prompts as constants, where they are, and without masks that hide nothing."""
    if isinstance(model, PeftModel) and isinstance(model.base_model, PromptTuner):
        # Where prompts are no constants, baking is refused before anything is changed.
        with contextlib.suppress(ValueError):
            model = model.bake()
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config._attn_implementation not in (None, "eager"):
            config._attn_implementation = UNMASKED_ATTENTION
    return model
