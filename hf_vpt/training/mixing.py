"""Images of a batch mixed with one another: mixup and CutMix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torchvision.transforms import v2


Mixer = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def make_mixer(mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> Mixer | None:
    """Return what mixes each image of a batch with its neighbour, and their labels in the same proportion.

    With λ ~ Beta(α, α), drawn for a batch: mixup (arXiv 1710.09412) takes λ·a + (1 − λ)·b of the pixels, CutMix
    (arXiv 1905.04899) cuts a box with about the share 1 − λ of the area out of b and puts it into a. Where both are
    asked for, each batch gets one of them, with equal chances. The work is torchvision's; its draws come from the
    random state of PyTorch on the CPU.

    Args:
        mixup_alpha: α of mixup, 0 for none.
        cutmix_alpha: α of CutMix, 0 for none.
        num_classes: Number of classes.

    Returns:
        A function of pixel values `(B, 3, height, width)` and labels `(B,)` that returns mixed pixel values and
        probabilities `(B, classes)`; None where nothing is to be mixed.
    """
    mixers = []
    if mixup_alpha:
        mixers.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
    if cutmix_alpha:
        mixers.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
    if not mixers:
        return None
    return v2.RandomChoice(mixers) if len(mixers) > 1 else mixers[0]
