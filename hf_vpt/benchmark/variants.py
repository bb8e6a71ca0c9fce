"""What is compared: prompts of every method, other adapters and baselines, on backbones with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from ..tuners.bpt import BPTConfig
from ..tuners.provpt import PROVPTConfig
from ..tuners.vapt import VAPTConfig
from ..tuners.vpt import VPTConfig


FLOOR = "frozen backbone, no prompts"
CONCATENATED = ", concatenated"
BAKED = ", baked"
COMPILED = ", compiled"


@dataclass(frozen=True)
class BenchmarkBackbone:
    """A backbone to measure.

    Attributes:
        title: What people call it.
        model_cls: Its class.
        config: Its config values.
        trained: The parameter that trains in the floor, of which all blocks are a function.
        query_value: Names of the projections that LoRA adapts.
    """

    title: str
    model_cls: type[PreTrainedModel]
    config: PretrainedConfig
    trained: str
    query_value: tuple[str, ...] = ("q_proj", "v_proj")


def _vit(title: str, **values: int) -> BenchmarkBackbone:
    return BenchmarkBackbone(
        title, ViTForImageClassification, ViTConfig(num_labels=100, **values), "vit.embeddings.cls_token"
    )


BENCHMARK_BACKBONES = {
    "vit": _vit("ViT-B/16"),
    "vit_small": _vit("ViT-S/16", hidden_size=384, num_attention_heads=6, intermediate_size=1536),
    "vit_large": _vit(
        "ViT-L/16", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "swin": BenchmarkBackbone(
        "Swin-B",
        SwinForImageClassification,
        SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], num_labels=100),
        "swin.embeddings.norm.bias",
    ),
}


def _adapter(make_config: Callable[[int], PeftConfig], insertion: str = "keys_values") -> Callable[..., nn.Module]:
    def build(base: PreTrainedModel, measured: BenchmarkBackbone, num_virtual_tokens: int) -> nn.Module:
        model = get_peft_model(base, make_config(num_virtual_tokens))
        model.base_model.set_insertion(insertion)
        return model

    return build


def _baked(make_config: Callable[[int], PeftConfig]) -> Callable[..., nn.Module]:
    def build(base: PreTrainedModel, measured: BenchmarkBackbone, num_virtual_tokens: int) -> nn.Module:
        return get_peft_model(base, make_config(num_virtual_tokens)).bake()

    return build


def _shallow_by_hand(base: PreTrainedModel, measured: BenchmarkBackbone, num_virtual_tokens: int) -> nn.Module:
    """Prompts after the CLS token that all blocks take for tokens, in six lines and with nothing of PEFT's or ours."""

    def insert(module: nn.Module, args: tuple[torch.Tensor, ...], tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([tokens[:, :1], base.prompts.expand(len(tokens), -1, -1), tokens[:, 1:]], dim=1)

    like = base.vit.embeddings.cls_token
    base.prompts = nn.Parameter(like.new_empty(1, num_virtual_tokens, like.shape[-1]).normal_(std=0.02))
    base.vit.embeddings.register_forward_hook(insert)
    _train_copy(base, _head(base))
    return base


def _floor(base: PreTrainedModel, measured: BenchmarkBackbone, num_virtual_tokens: int) -> nn.Module:
    _train_copy(base, [measured.trained, *_head(base)])
    return base


def _linear_probe(base: PreTrainedModel, measured: BenchmarkBackbone, num_virtual_tokens: int) -> nn.Module:
    _train_copy(base, _head(base))
    return base


def _full(base: PreTrainedModel, measured: BenchmarkBackbone, num_virtual_tokens: int) -> nn.Module:
    _train_copy(base, [name for name, _ in base.named_parameters()])
    return base


def _lora(base: PreTrainedModel, measured: BenchmarkBackbone, num_virtual_tokens: int) -> nn.Module:
    config = LoraConfig(r=8, target_modules=list(measured.query_value), modules_to_save=["classifier"])
    return get_peft_model(base, config)


def _head(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.startswith("classifier.")]


def _train_copy(model: nn.Module, names: Sequence[str]) -> None:
    """Give a model parameters of its own, that train, in the place of some that it shares with others."""
    for name in names:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(model.get_parameter(name).detach().clone()))


CONFIGS: dict[str, Callable[[int], PeftConfig]] = {
    "VPT-Deep": lambda n: VPTConfig(num_virtual_tokens=n),
    "VAPT": lambda n: VAPTConfig(num_virtual_tokens=n),
    "PRO-VPT": lambda n: PROVPTConfig(num_virtual_tokens=n),
    "BPT-Deep": lambda n: BPTConfig(num_virtual_tokens=n, rank=n),
}
# Each makes a model from a bare backbone, whose parameters it shares with all others, and a number of prompts.
VARIANTS: dict[str, Callable[[PreTrainedModel, BenchmarkBackbone, int], nn.Module]] = {
    FLOOR: _floor,
    **{name: _adapter(config) for name, config in CONFIGS.items()},
    "VPT-Shallow": _adapter(lambda n: VPTConfig(num_virtual_tokens=n, deep=False)),
    **{name + CONCATENATED: _adapter(config, "tokens") for name, config in CONFIGS.items()},
    "VPT-Shallow" + CONCATENATED: _shallow_by_hand,
    **{name + BAKED: _baked(config) for name, config in CONFIGS.items() if name != "VAPT"},
    "linear probe": _linear_probe,
    "LoRA, r = 8 on q and v": _lora,
    "full fine-tuning": _full,
}
