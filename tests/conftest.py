"""Tiny random backbones, one or more for each record, and a small adapter config for each method."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from local_hub import LocalHub
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from hf_vpt import BACKBONES as RECORDS
from hf_vpt import METHODS


# For processes that train. In a fork PyTorch refuses to, once a test before has started autograd's threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hf_vpt.sweep"])

# Height and width differ, and so do the rows and columns of patches: 2 × 3.
IMAGE_SIZE, PATCH_SIZE = (32, 48), 16
GRID = [2, 3]

COMMON = {
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
    "attention_dropout": 0.5,
    "drop_path_rate": 0.5,
    # Transformers initialises with 0.02, which makes a tiny network nearly linear.
    "initializer_range": 0.3,
}
# Two stages of two blocks, widths 16 and 32, grids of 8 × 12 and 4 × 6. Windows of 3 need padding and shifts.
SWIN = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 3,
    "mlp_ratio": 2.0,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
    "num_labels": 5,
    "hidden_dropout_prob": 0.5,
    "attention_probs_dropout_prob": 0.5,
    "drop_path_rate": 0.5,
    "initializer_range": 0.3,
}


def plain_inputs(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": pixel_values}


def interpolated_inputs(pixel_values: torch.Tensor) -> dict:
    """For models that are made for square images and interpolate their positions when they are asked to."""
    return {"pixel_values": pixel_values, "interpolate_pos_encoding": True}


def ordered_inputs(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """ViT-MAE orders patches at random; the same noise makes two runs comparable."""
    num_patches = (pixel_values.shape[2] // PATCH_SIZE) * (pixel_values.shape[3] // PATCH_SIZE)
    noise = torch.arange(float(num_patches)).expand(len(pixel_values), -1)
    return {"pixel_values": pixel_values, "noise": noise}


def patchified_inputs(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """SigLIP 2 takes patches, padded to one number for all images; the padding is masked."""
    patches = pixel_values.unfold(2, PATCH_SIZE, PATCH_SIZE).unfold(3, PATCH_SIZE, PATCH_SIZE)
    rows, columns = patches.shape[2:4]
    patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": torch.nn.functional.pad(patches, (0, 0, 0, 2)),
        "pixel_attention_mask": torch.tensor([[1] * rows * columns + [0, 0]]).expand(len(patches), -1),
        "spatial_shapes": torch.tensor([[rows, columns]]).expand(len(patches), -1),
    }


@dataclass(frozen=True)
class TinyBackbone:
    """How to build a small random model of one backbone record.

    Attributes:
        model_type: The record.
        model_cls: Name in Transformers of the model to build.
        num_prefix_tokens: Tokens before the patches.
        overrides: Config values that differ from the common ones.
        settings: The common config values.
        vision: Whether the config is that of a model with two towers, and the values are for the vision tower.
        inputs: The model's arguments for images `(B, 3, H, W)`.
        interpolates: Keyword arguments that make other image sizes welcome; None where they are not.
        square: Config values of a model that is made for square images, from which alone some families interpolate.
        widths: Width of each block.
        grids: Patch grid of each block.
        num_tokens: Tokens that a block sees without prompts, the padding included.
        attentions: What decides on the attention function.
    """

    model_type: str
    model_cls: str
    num_prefix_tokens: int = 1
    overrides: dict = field(default_factory=dict)
    settings: dict = field(default_factory=lambda: COMMON)
    vision: bool = False
    inputs: Callable[[torch.Tensor], dict] = plain_inputs
    interpolates: dict | None = field(default_factory=lambda: {"interpolate_pos_encoding": True})
    square: dict = field(default_factory=lambda: {"image_size": 48})
    widths: tuple[int, ...] = (16,) * 3
    grids: tuple[tuple[int, int], ...] = ((2, 3),) * 3
    has_head: bool = True
    attn_implementations: tuple[str, ...] = ("eager", "sdpa")

    @property
    def record(self):
        return RECORDS[self.model_type]

    def config(self, **overrides) -> PretrainedConfig:
        settings = self.settings | self.overrides | overrides
        config_cls = getattr(transformers, self.model_cls).config_class
        if not self.vision:
            return config_cls(**settings)
        text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        outer = {name: settings[name] for name in ("num_labels", "attn_implementation") if name in settings}
        return config_cls(vision_config=settings, text_config=text, projection_dim=8, **outer)

    def build(self, **overrides) -> PreTrainedModel:
        torch.manual_seed(0)
        model = getattr(transformers, self.model_cls)(self.config(**overrides)).eval()
        for name, parameter in model.named_parameters():
            # Some families start these at values that hide what they do.
            if any(part in name for part in ("relative_position_bias_table", "lambda_", "lambda1", "_token", "bias")):
                torch.nn.init.normal_(parameter, std=0.3)
            elif self.model_type == "timm_wrapper" and parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)  # it has no setting for that
        return model


_CLIP = {"vision": True, "inputs": interpolated_inputs, "overrides": {"image_size": 48}}
_CLIP_VISION = {"inputs": interpolated_inputs, "overrides": {"image_size": 48}, "has_head": False}
_SIGLIP2 = {"inputs": patchified_inputs, "overrides": {"num_patches": 16}, "interpolates": {}, "square": {}}
_SWIN = {
    "settings": SWIN,
    "interpolates": {},
    "square": {},
    "widths": (16, 16, 32, 32),
    "grids": ((8, 12), (8, 12), (4, 6), (4, 6)),
}

BACKBONES = {
    "vit": TinyBackbone("vit", "ViTForImageClassification"),
    "deit": TinyBackbone("deit", "DeiTForImageClassification", 2),
    "deit_with_teacher": TinyBackbone("deit", "DeiTForImageClassificationWithTeacher", 2),
    "vit_mae": TinyBackbone("vit_mae", "ViTMAEModel", 1, {"mask_ratio": 0.0}, inputs=ordered_inputs, has_head=False),
    "vit_msn": TinyBackbone("vit_msn", "ViTMSNForImageClassification"),
    "ijepa": TinyBackbone("ijepa", "IJepaForImageClassification", 0),
    "beit": TinyBackbone("beit", "BeitForImageClassification", 1, {"use_relative_position_bias": True}),
    "beit_shared_bias": TinyBackbone(
        "beit", "BeitModel", 1, {"use_shared_relative_position_bias": True}, has_head=False
    ),
    # DINOv2 is made for square images and interpolates its positions for all others.
    "dinov2": TinyBackbone(
        "dinov2",
        "Dinov2ForImageClassification",
        1,
        {"image_size": 48, "layerscale_value": 0.7},
        interpolates={},
    ),
    "dinov2_with_registers": TinyBackbone(
        "dinov2_with_registers",
        "Dinov2WithRegistersForImageClassification",
        3,
        {"image_size": 48, "layerscale_value": 0.7, "num_register_tokens": 2},
        interpolates={},
    ),
    "dinov3_vit": TinyBackbone(
        "dinov3_vit",
        "DINOv3ViTModel",
        3,
        {"num_register_tokens": 2, "layerscale_value": 0.7, "pos_embed_rescale": 2.0},
        interpolates={},
        has_head=False,
    ),
    "clip": TinyBackbone("clip", "CLIPForImageClassification", **_CLIP),
    "clip_vision_model": TinyBackbone("clip_vision_model", "CLIPVisionModel", **_CLIP_VISION),
    "siglip": TinyBackbone("siglip", "SiglipForImageClassification", 0, **_CLIP),
    "siglip_vision_model": TinyBackbone("siglip_vision_model", "SiglipVisionModel", 0, **_CLIP_VISION),
    "siglip2": TinyBackbone("siglip2", "Siglip2ForImageClassification", 0, vision=True, **_SIGLIP2),
    "siglip2_vision_model": TinyBackbone("siglip2_vision_model", "Siglip2VisionModel", 0, has_head=False, **_SIGLIP2),
    "swin": TinyBackbone("swin", "SwinForImageClassification", 0, **_SWIN),
    "swinv2": TinyBackbone("swinv2", "Swinv2ForImageClassification", 0, attn_implementations=("eager",), **_SWIN),
    "timm": TinyBackbone(
        "timm_wrapper",
        "TimmWrapperForImageClassification",
        3,
        {
            "architecture": "vit_tiny_patch16_224",
            "model_args": {
                "embed_dim": 16,
                "depth": 3,
                "num_heads": 2,
                "mlp_ratio": 2.0,
                "img_size": IMAGE_SIZE,
                "reg_tokens": 2,
                "dynamic_img_size": True,
                "qk_norm": True,
                "init_values": 0.7,
                "drop_path_rate": 0.5,
                "proj_drop_rate": 0.5,
                "attn_drop_rate": 0.5,
            },
        },
        settings={"num_labels": 5},
        interpolates={},
        square={},
        attn_implementations=("sdpa",),
    ),
}


@dataclass(frozen=True)
class TinyAdapter:
    """A small adapter of one method.

    Attributes:
        method: Name in `hf_vpt.METHODS`.
        settings: Config values; random, non-neutral weights unless said otherwise.
        count: Number of tuned parameters without a head, from N and the widths and grids of the blocks.
    """

    method: str
    settings: dict
    count: Callable[[int, Sequence[int], Sequence[tuple[int, int]]], int]

    def config(self, num_virtual_tokens: int = 2, backbone: TinyBackbone | None = None, **overrides):
        settings = {"num_virtual_tokens": num_virtual_tokens, "init_weights": False} | self.settings
        if self.method == "vapt" and backbone is not None:
            settings["grid"] = list(backbone.grids[0])
        return METHODS[self.method](**(settings | overrides))

    def parameters(self, num_virtual_tokens: int, backbone: TinyBackbone | None = None) -> int:
        backbone = backbone or BACKBONES["vit"]
        return self.count(num_virtual_tokens, backbone.widths, backbone.grids)

    def is_refused(self, backbone: TinyBackbone) -> bool:
        shallow = {"shallow"} if not self.settings.get("deep", True) else set()
        return bool(({self.method} | shallow) & backbone.record.refused.keys())


def _count_vapt(n, widths, grids):
    adaptive = [2 * w + 2 * 2 + n * (rows - 1) * (columns - 1) + n for w, (rows, columns) in zip(widths, grids)][1:]
    return n * widths[0] + sum(adaptive) + sum(2 * w * 4 for w in set(widths[1:]))


ADAPTERS = {
    "vpt_deep": TinyAdapter("vpt", {}, lambda n, widths, grids: sum(n * w for w in widths)),
    "vpt_shallow": TinyAdapter("vpt", {"deep": False}, lambda n, widths, grids: n * widths[0]),
    "vpt_projected": TinyAdapter(
        "vpt",
        {"projection_dim": 4},
        lambda n, widths, grids: len(widths) * n * 4 + sum(4 * w + w for w in set(widths)),
    ),
    "vapt": TinyAdapter("vapt", {"grid": GRID, "projector_dim": 4}, _count_vapt),
    "provpt": TinyAdapter("provpt", {}, lambda n, widths, grids: sum(n * w for w in widths)),
    "bpt_deep": TinyAdapter("bpt", {"rank": 4}, lambda n, widths, grids: sum((n + w) * 4 for w in widths)),
    "bpt_shallow": TinyAdapter("bpt", {"rank": 4, "deep": False}, lambda n, widths, grids: (n + widths[0]) * 4),
    "bpt_fixed": TinyAdapter("bpt", {"rank": 4, "basis": "fwhiten"}, lambda n, widths, grids: len(widths) * n * 4),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        yield hub


@pytest.fixture(params=BACKBONES)
def backbone(request) -> TinyBackbone:
    return BACKBONES[request.param]


@pytest.fixture(params=ADAPTERS)
def adapter(request) -> TinyAdapter:
    adapter = ADAPTERS[request.param]
    if "backbone" in request.fixturenames and adapter.is_refused(request.getfixturevalue("backbone")):
        pytest.skip("refused by the record, see test_what_a_record_refuses_is_an_error_that_says_why")
    return adapter


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(4, 3, *IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def inputs_of(model: torch.nn.Module, pixel_values: torch.Tensor, **kwargs) -> dict:
    """The arguments that a tiny model takes for images `(B, 3, H, W)`."""
    model_type = model.config.model_type
    backbone = next(backbone for backbone in BACKBONES.values() if backbone.model_type == model_type)
    return backbone.inputs(pixel_values) | kwargs


def output_of(model: torch.nn.Module, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
    """Logits where a model has them, otherwise its last hidden state."""
    output = model(**inputs_of(model, pixel_values, **kwargs))
    return output.logits if "logits" in output else output.last_hidden_state


class StopAt(TrainerCallback):
    """Ends training at a step, as a kill right after the checkpoint of that step would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    """The same names, and tensors that differ by no more than the tolerance."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# Settings of a run that evaluates and saves each epoch, and ends with the weights of the best one.
KEEP_BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
