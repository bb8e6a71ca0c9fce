"""The README's example with the configs of published checkpoints, and random weights: no network is needed."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from hf_vpt import METHODS


# As the checkpoints' config.json files have them.
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
VISION = BASE | {"intermediate_size": 3072, "image_size": 224, "patch_size": 16}
DINOV2 = BASE | {"mlp_ratio": 4, "image_size": 518, "patch_size": 14, "layerscale_value": 1.0, "use_swiglu_ffn": False}
CHECKPOINTS = {
    "google/vit-base-patch16-224-in21k": ("ViT", VISION),
    "facebook/dinov2-base": ("Dinov2", DINOV2),
    "facebook/dinov2-with-registers-base": ("Dinov2WithRegisters", DINOV2 | {"num_register_tokens": 4}),
    "microsoft/swin-base-patch4-window7-224": (
        "Swin",
        {
            "embed_dim": 128,
            "depths": [2, 2, 18, 2],
            "num_heads": [4, 8, 16, 32],
            "window_size": 7,
            "image_size": 224,
            "patch_size": 4,
            "drop_path_rate": 0.1,
        },
    ),
    "microsoft/beit-base-patch16-224": (
        "Beit",
        VISION
        | {
            "layer_norm_eps": 1e-12,
            "use_relative_position_bias": True,
            "use_absolute_position_embeddings": False,
            "use_mask_token": False,
            "layer_scale_init_value": 0.1,
            "drop_path_rate": 0.1,
            "use_mean_pooling": True,
        },
    ),
    "openai/clip-vit-base-patch16": ("CLIP", {"vision_config": VISION | {"projection_dim": 512}}),
    "google/siglip-base-patch16-224": ("Siglip", {"vision_config": VISION}),
}
SMALL_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def build(checkpoint):
    family, settings = CHECKPOINTS[checkpoint]
    if "vision_config" in settings:
        settings = settings | {"text_config": SMALL_TEXT}  # left out of the classifier
    model_cls = getattr(transformers, f"{family}ForImageClassification")
    torch.manual_seed(0)
    return model_cls(model_cls.config_class(**settings, num_labels=200)).eval()


def wrap(model, method, checkpoint):
    # DINOv2 is made for 518 pixels, and images of 224 have 16 × 16 patches.
    settings = {"grid": [16, 16]} if method == "vapt" and "dinov2" in checkpoint else {}
    torch.manual_seed(1)
    return get_peft_model(model, METHODS[method](**settings))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_method_with_its_defaults_trains_saves_and_loads(checkpoint, tmp_path):
    base = build(checkpoint)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base(pixel_values=images).logits
    for method in METHODS:
        model = wrap(base, method, checkpoint).train()
        loss = model(pixel_values=images, labels=torch.tensor([3])).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, f"{method}: {name}"
            assert parameter.grad is None or parameter.grad.isfinite().all(), f"{method}: {name}"
        with torch.no_grad():
            for parameter in model.parameters():  # no optimiser: one step of plain descent, so that files differ
                if parameter.requires_grad:
                    parameter -= 0.1 * parameter.grad
            expected = model.eval()(pixel_values=images).logits
            assert expected.shape == (1, 200)
            assert (expected - plain).abs().max() > 1e-4
            model.save_pretrained(tmp_path / method)
            base = model.unload()
            model = PeftModel.from_pretrained(base, tmp_path / method).eval()
            torch.testing.assert_close(model(pixel_values=images).logits, expected, rtol=1e-4, atol=1e-5)
            base = model.unload().requires_grad_(True)
