"""Tiny random backbones, one for each record, and a small adapter config for each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

from hf_vpt import METHODS


# Height and width differ, and so do the rows and columns of patches: 2 × 3.
IMAGE_SIZE, PATCH_SIZE = (32, 48), 16
GRID = [2, 3]


@dataclass(frozen=True)
class TinyBackbone:
    """How to build a small random model of one backbone record.

    Attributes:
        model_type: The record.
        config_cls: Its config class.
        model_cls: The model to build.
        num_prefix_tokens: Tokens before the patches.
        overrides: Config values that differ from the common ones.
    """

    model_type: str
    config_cls: type
    model_cls: type
    num_prefix_tokens: int = 1
    overrides: dict = field(default_factory=dict)

    def build(self, **overrides) -> PreTrainedModel:
        settings = {
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "mlp_ratio": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "num_labels": 5,
            "hidden_dropout_prob": 0.5,
            "attention_probs_dropout_prob": 0.5,
            # Transformers initialises with 0.02, which makes a tiny network nearly linear.
            "initializer_range": 0.3,
        }
        torch.manual_seed(0)
        return self.model_cls(self.config_cls(**(settings | self.overrides | overrides))).eval()


BACKBONES = {
    "vit": TinyBackbone("vit", ViTConfig, ViTForImageClassification),
    "deit": TinyBackbone("deit", DeiTConfig, DeiTForImageClassification, 2),
    "deit_with_teacher": TinyBackbone("deit", DeiTConfig, DeiTForImageClassificationWithTeacher, 2),
    "vit_mae": TinyBackbone("vit_mae", ViTMAEConfig, ViTMAEModel, 1, {"mask_ratio": 0.0}),
    "vit_msn": TinyBackbone("vit_msn", ViTMSNConfig, ViTMSNForImageClassification),
    # DINOv2 is made for square images and interpolates its positions for all others.
    "dinov2": TinyBackbone(
        "dinov2",
        Dinov2Config,
        Dinov2ForImageClassification,
        1,
        {"image_size": 48, "drop_path_rate": 0.5, "layerscale_value": 0.7},
    ),
    "dinov2_with_registers": TinyBackbone(
        "dinov2_with_registers",
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersForImageClassification,
        3,
        {"image_size": 48, "drop_path_rate": 0.5, "layerscale_value": 0.7, "num_register_tokens": 2},
    ),
}


@dataclass(frozen=True)
class TinyAdapter:
    """A small adapter of one method.

    Attributes:
        method: Name in `hf_vpt.METHODS`.
        settings: Config values; random, non-neutral weights unless said otherwise.
        parameters: Number of tuned parameters without a head, from N, D = 16 and L = 3.
    """

    method: str
    settings: dict
    parameters: Callable[[int], int]

    def config(self, num_virtual_tokens: int = 2, **overrides):
        settings = {"num_virtual_tokens": num_virtual_tokens, "init_weights": False}
        return METHODS[self.method](**(settings | self.settings | overrides))


ADAPTERS = {
    "vpt_deep": TinyAdapter("vpt", {}, lambda n: 3 * n * 16),
    "vpt_shallow": TinyAdapter("vpt", {"deep": False}, lambda n: n * 16),
    "vpt_projected": TinyAdapter("vpt", {"projection_dim": 4}, lambda n: 3 * n * 4 + 4 * 16 + 16),
    "vapt": TinyAdapter(
        "vapt",
        {"grid": GRID, "projector_dim": 4},
        lambda n: n * 16 + 2 * (2 * 16 + 2 * 2 + n * 1 * 2 + n) + 2 * 16 * 4,
    ),
    "provpt": TinyAdapter("provpt", {}, lambda n: 3 * n * 16),
    "bpt_deep": TinyAdapter("bpt", {"rank": 4}, lambda n: 3 * (n + 16) * 4),
    "bpt_shallow": TinyAdapter("bpt", {"rank": 4, "deep": False}, lambda n: (n + 16) * 4),
    "bpt_fixed": TinyAdapter("bpt", {"rank": 4, "basis": "fwhiten"}, lambda n: 3 * n * 4),
}


@pytest.fixture(params=BACKBONES)
def backbone(request) -> TinyBackbone:
    return BACKBONES[request.param]


@pytest.fixture(params=ADAPTERS)
def adapter(request) -> TinyAdapter:
    return ADAPTERS[request.param]


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(4, 3, *IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def output_of(model: torch.nn.Module, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
    """Logits where a model has them, otherwise its last hidden state."""
    if model.config.model_type == "vit_mae":
        # ViT-MAE orders patches at random; the same noise makes two runs comparable.
        kwargs.setdefault("noise", torch.arange(6.0).expand(len(pixel_values), -1))
    output = model(pixel_values=pixel_values, **kwargs)
    return output.logits if "logits" in output else output.last_hidden_state
