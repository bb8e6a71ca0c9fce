"""Whitening matrices of a backbone's blocks, the starting point of BPT's basis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn

from ...choices import check_choice
from .model import BPTModel


Estimate = Literal["tokens", "image_mean"]


def whitening_matrix(covariance: torch.Tensor, floor: float = 1e-6) -> torch.Tensor:
    """U·S^(−1/2)·Vᵀ of the singular value decomposition of a covariance (BPT, arXiv 2506.22908).

    Args:
        covariance: `(D, D)`.
        floor: Singular values below this fraction of the largest one are raised to it, so that directions the data do
            not have are not blown up. 0 gives the published formula, which divides by zero on them.

    Returns:
        `(D, D)`, in the dtype of the covariance.
    """
    # The same matrix from eigenvectors: where singular values are equal or zero, U and V turn independently of each
    # other, and the result would depend on rounding.
    values, vectors = torch.linalg.eigh(covariance.double())
    values = values.abs()
    values = values.clamp(min=floor * values.max())
    return (vectors * values.rsqrt() @ vectors.mT).to(covariance.dtype)


class WhiteningStatistics:
    """Sums up, image by image, the covariance that a block's whitening needs.

    With X `(T, D)` a block's input for one image and M = W_q·W_kᵀ·Xᵀ `(D, T)`, the covariance is M·Mᵀ/D.

    Args:
        query_weight: W_q `(D, D)`, as `torch.nn.Linear` stores it.
        key_weight: W_k `(D, D)`.
        estimate: `"tokens"` takes the mean of M·Mᵀ/D over the images, so that every token of every image counts.
            `"image_mean"` is the published estimate: M is averaged over the images first. With T < D it has rank T at
            most.
    """

    def __init__(self, query_weight: torch.Tensor, key_weight: torch.Tensor, estimate: Estimate = "tokens"):
        check_choice("estimate", estimate, Estimate)
        # Sums over many tokens of squares: float64, or the small singular values are rounding noise.
        # On the CPU, because not every accelerator knows float64.
        self.product = query_weight.cpu().double() @ key_weight.cpu().double().T
        self.estimate = estimate
        self.total = 0.0
        self.num_images = 0

    def update(self, block_inputs: torch.Tensor) -> None:
        """Adds the inputs of the block for some images, `(B, T, D)`."""
        mapped = self.product @ block_inputs.cpu().double().mT
        if self.estimate == "tokens":
            # All tokens of all images side by side, (D, B·T): no (D, D) matrix for each image.
            tokens = mapped.transpose(0, 1).flatten(1)
            self.total = self.total + tokens @ tokens.T
        else:
            self.total = self.total + mapped.sum(dim=0)
        self.num_images += len(block_inputs)

    def covariance(self) -> torch.Tensor:
        """The covariance `(D, D)` of the images seen so far."""
        mean = self.total / self.num_images
        if self.estimate == "image_mean":
            mean = mean @ mean.T
        return mean / self.product.shape[0]


@torch.no_grad()
def initialize_whitening(
    model: PeftModel | BPTModel,
    batches: Iterable[Mapping[str, Any] | torch.Tensor],
    num_images: int = 100,
    adapter_name: str | None = None,
    estimate: Estimate = "tokens",
    floor: float = 1e-6,
) -> None:
    """Sets the basis of a BPT adapter to the whitening matrices of its blocks, from training images.

    The images run through the base model without prompts; labels are not used.

    Args:
        model: A model with a BPT adapter whose `basis` is `"fwhiten"` or `"twhiten"`.
        batches: Batches of `pixel_values` `(B, C, H, W)`, or mappings that hold them beside whatever else the model
            takes, such as a dataloader.
        num_images: Images to use, 100 in the paper; fewer if the batches end before.
        adapter_name: The adapter; the active one if None.
        estimate: See `WhiteningStatistics`.
        floor: See `whitening_matrix`. The published estimate goes with 0.

    Raises:
        ValueError: If the adapter has no whitened basis, the batches hold no image or are of another type, or a
            matrix is not finite.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}. It must be at least 1; the paper uses 100.")
    tuner = model.base_model if isinstance(model, PeftModel) else model
    prompts = tuner.prompts(adapter_name) if isinstance(tuner, BPTModel) else {}
    if not prompts or any(p.basis == "bilinear" for p in prompts.values()):
        raise ValueError(
            f"Found no BPT adapter with a whitened basis in a {type(tuner).__name__}, looking for "
            f"{adapter_name or 'the active one'}. Whitening needs BPTConfig(basis='fwhiten' or 'twhiten'). Make the "
            "adapter with one of them, or leave this call out."
        )
    blocks = {block.index: block for block in tuner.prompted_blocks() if block.index in prompts}
    statistics = {
        index: WhiteningStatistics(*block.access.query_key_weights(block.attention), estimate)
        for index, block in blocks.items()
    }
    handles = [block.register_forward_pre_hook(_Collect(statistics[index])) for index, block in blocks.items()]
    enabled = [block for block in tuner.prompted_blocks() if not block.disable_adapters]
    training, device = tuner.training, next(tuner.model.parameters()).device
    try:
        tuner.eval()
        for block in enabled:
            block._disable_adapters = True  # leaves `requires_grad` alone, which `enable_adapters` does not
        for batch in batches:
            if not isinstance(batch, (Mapping, torch.Tensor)):
                raise ValueError(
                    f"Found a batch of type {type(batch).__name__}. Whitening needs images as a tensor, or a mapping "
                    "with `pixel_values`, as the model takes them. Collate batches to dictionaries, or pass "
                    "`(images for images, labels in dataloader)`."
                )
            inputs = dict(batch) if isinstance(batch, Mapping) else {"pixel_values": batch}
            inputs.pop("labels", None)
            batch_size = len(inputs["pixel_values"])
            for name, value in inputs.items():
                # Tensors have an entry for each image; other arguments (`interpolate_pos_encoding`) are the batch's.
                inputs[name] = value[:num_images].to(device) if isinstance(value, torch.Tensor) else value
            tuner.model(**inputs)
            num_images -= batch_size
            if num_images <= 0:
                break
    finally:
        for handle in handles:
            handle.remove()
        for block in enabled:
            block._disable_adapters = False
        tuner.train(training)
    if not all(s.num_images for s in statistics.values()):
        raise ValueError("Found no images in the batches. Whitening needs at least one. Pass a dataloader.")
    whitening = {}
    for index in prompts:
        covariance = statistics[index].covariance()
        # Decompositions refuse what is not finite with an error of their own.
        matrix = whitening_matrix(covariance, floor) if covariance.isfinite().all() else covariance
        if not matrix.isfinite().all():
            raise ValueError(
                f"Found a whitening matrix that is not finite in block {index}. The covariance of the images must be "
                "finite and not zero, and with floor=0 of full rank. Give more images, or a floor above 0."
            )
        whitening[index] = matrix
    for index, block_prompts in prompts.items():
        block_prompts.set_basis(whitening[index])


class _Collect:
    """Forward pre-hook that hands a block's input to its statistics."""

    def __init__(self, statistics: WhiteningStatistics):
        self.statistics = statistics

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.statistics.update(args[0])
