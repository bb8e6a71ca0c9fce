"""One frozen record for each backbone family: where its blocks are and what is inside them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .attention import AttentionAccess, InterfaceAttention
from .attention.swinv2 import SWINV2_ATTENTION
from .attention.timm import TIMM_ATTENTION
from .windows import SwinBlocks, Swinv2Blocks, WindowedBlocks


@dataclass(frozen=True)
class BackboneRecord:
    """Says where a family of vision transformers keeps what prompts need; a new family is one new record.

    Paths are relative to the backbone's root, the module that holds the patch projection and the blocks
    (`vit` in a `ViTForImageClassification`, the model itself in a `ViTModel`).

    Args:
        model_type: `config.model_type` of the family in Transformers.
        title: What people call the family.
        blocks: Path of a block; `*` stands for its number, and for that of its stage where there are stages.
        norm: Name of the pre-attention norm in a block; None where attention gets the tokens as they are.
        attention: Path of the attention module in a block.
        access: How prompts get into that attention module.
        embeddings: Path of the module that turns pixels `(B, C, H, W)` into tokens.
        patch_projection: Path of the layer that makes a token of a patch.
        prefix_tokens: Paths of the parameters that stand before the patches, `(1, n, D)` or `(D,)`. Absent ones and
            `None` count as zero tokens, so that one record serves models with and without them.
        heads: Names, in a model with a task head, of the modules to train together with the prompts.
        mask: Name of the block's argument for the attention mask, the first one after the tokens.
        mask_in_block: Whether a block adds a position bias to the attention mask, so that a mask for more tokens than
            it knows of has to be made behind it.
        pads_image: Whether an image that does not divide into patches is enlarged, rather than cropped.
        shuffles_patches: Whether the embeddings reorder the patches at random and drop a part `config.mask_ratio`
            of them (ViT-MAE). Prompts that pool the patch grid need it whole and in order.
        checkpoints_outside: Whether the root records and checkpoints blocks from outside (timm); elsewhere that is
            done within a block.
        windows: How prompts flow beside tokens that attention splits into windows; None for global attention.
        merging: Path, in a stage, of the module between it and the next one.
        pooler: Name of the module that averages the tokens; its input is `(B, D, T)`. Some classes have none.
        final_norm: Path of the norm before the pooler.
        refused: What does not work with this family, and why. Keys are names of methods, `"shallow"` and
            `"pool_prompts"`.
    """

    model_type: str
    title: str
    blocks: str = "layers.*"
    norm: str | None = "layernorm_before"
    attention: str = "attention"
    access: AttentionAccess = InterfaceAttention()
    embeddings: str = "embeddings"
    patch_projection: str = "embeddings.patch_embeddings.projection"
    prefix_tokens: tuple[str, ...] = ("embeddings.cls_token",)
    heads: tuple[str, ...] = ("classifier",)
    mask: str = "attention_mask"
    mask_in_block: bool = False
    pads_image: bool = False
    shuffles_patches: bool = False
    checkpoints_outside: bool = False
    windows: WindowedBlocks | None = None
    merging: str | None = None
    pooler: str | None = None
    final_norm: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def block_pattern(self) -> str:
        """Regular expression that fully matches the name of a block; its first group is the root's name and dot."""
        return rf"(|.*\.){re.escape(self.blocks).replace(re.escape('*'), '([0-9]+)')}"


_VIT = BackboneRecord("vit", "ViT")
_DINOV2 = BackboneRecord("dinov2", "DINOv2", blocks="encoder.layer.*", norm="norm1")
_SWIN = BackboneRecord(
    "swin",
    "Swin",
    blocks="encoder.layers.*.blocks.*",
    prefix_tokens=(),
    pads_image=True,
    windows=SwinBlocks(),
    merging="downsample",
    pooler="pooler",
    final_norm="layernorm",
)
_SWINV2 = replace(
    _SWIN,
    model_type="swinv2",
    title="Swin-v2",
    norm=None,
    attention="attention.self",
    access=SWINV2_ATTENTION,
    windows=Swinv2Blocks(),
)
_CLIP = BackboneRecord(
    "clip",
    "CLIP",
    blocks="encoder.layers.*",
    norm="layer_norm1",
    attention="self_attn",
    patch_projection="embeddings.patch_embedding",
    prefix_tokens=("embeddings.class_embedding",),
)
_SIGLIP = replace(_CLIP, model_type="siglip", title="SigLIP", access=InterfaceAttention(relays=True), prefix_tokens=())
_SIGLIP2 = replace(
    _SIGLIP,
    model_type="siglip2",
    title="SigLIP 2 (NaFlex)",
    refused={"vapt": "each image of a batch has a patch grid of its own, and VAPT's pooling is made for one"},
)

BACKBONES: dict[str, BackboneRecord] = {
    record.model_type: record
    for record in (
        _VIT,
        replace(
            _VIT,
            model_type="deit",
            title="DeiT",
            prefix_tokens=("embeddings.cls_token", "embeddings.distillation_token"),
            heads=("classifier", "cls_classifier", "distillation_classifier"),
        ),
        replace(_VIT, model_type="vit_mae", title="ViT-MAE", shuffles_patches=True),
        replace(_VIT, model_type="vit_msn", title="ViT-MSN"),
        replace(_VIT, model_type="ijepa", title="I-JEPA", prefix_tokens=()),
        replace(_VIT, model_type="beit", title="BEiT", mask_in_block=True),
        _DINOV2,
        replace(
            _DINOV2,
            model_type="dinov2_with_registers",
            title="DINOv2 with registers",
            prefix_tokens=("embeddings.cls_token", "embeddings.register_tokens"),
        ),
        BackboneRecord(
            "dinov3_vit",
            "DINOv3 (ViT)",
            blocks="model.layer.*",
            norm="norm1",
            patch_projection="embeddings.patch_embeddings",
            prefix_tokens=("embeddings.cls_token", "embeddings.register_tokens"),
        ),
        _CLIP,
        replace(_CLIP, model_type="clip_vision_model", title="CLIP, vision tower"),
        _SIGLIP,
        replace(_SIGLIP, model_type="siglip_vision_model", title="SigLIP, vision tower"),
        _SIGLIP2,
        replace(_SIGLIP2, model_type="siglip2_vision_model", title="SigLIP 2 (NaFlex), vision tower"),
        _SWIN,
        _SWINV2,
        BackboneRecord(
            "timm_wrapper",
            "timm's plain ViTs",
            blocks="blocks.*",
            norm="norm1",
            attention="attn",
            access=TIMM_ATTENTION,
            mask="attn_mask",
            checkpoints_outside=True,
            embeddings="patch_embed",
            patch_projection="patch_embed.proj",
            prefix_tokens=("cls_token", "dist_token", "reg_token"),
            heads=("timm_model.head", "timm_model.head_dist"),
        ),
    )
}


@dataclass(frozen=True)
class Backbone:
    """A model's own numbers, read off the model through the record of its family.

    Attributes:
        record: The record of the family.
        root: Name of the backbone's root in the model, `""` where the model is the backbone.
        block_names: Names of the blocks in the model, in their order.
        hidden_size: Width D of the tokens in the first stage; it doubles from stage to stage.
        depths: Blocks of each stage.
        num_prefix_tokens: Tokens before the patches (CLS, distillation, registers).
        patch_size: Height and width of a patch in pixels.
        grid: Rows h and columns w of patches at the model's own image size, in the first stage.
        heads: Names of the task heads that the model really has.
    """

    record: BackboneRecord
    root: str
    block_names: tuple[str, ...]
    hidden_size: int
    depths: tuple[int, ...]
    num_prefix_tokens: int
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    heads: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.block_names)

    @property
    def stage_starts(self) -> tuple[int, ...]:
        """Index of the first block of each stage."""
        return tuple(sum(self.depths[:stage]) for stage in range(len(self.depths)))

    def embeddings(self, model: nn.Module) -> nn.Module:
        """The module of `model` that turns pixels into tokens."""
        return self.below(model, self.record.embeddings)

    def below(self, model: nn.Module, path: str) -> nn.Module:
        """The module of `model` at `path` below the backbone's root."""
        return model.get_submodule(_join(self.root, path))

    def pooler(self, model: nn.Module) -> nn.Module | None:
        """The module of `model` that averages the tokens; None where the family or the model's class has none."""
        path = self.record.pooler
        return None if path is None else getattr(self.below(model, ""), path, None)

    def stages(self, model: nn.Module) -> list[nn.Module]:
        """The stages of `model`; none where the record knows of no windows."""
        if self.record.windows is None:
            return []
        path = self.record.blocks.partition(".*")[0]
        return list(self.below(model, path).children())

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of `height` × `width` pixels."""
        return _patch_grid((height, width), self.patch_size, self.record)


def find_backbone(model: nn.Module) -> Backbone:
    """Reads the layout of a model's tokens and blocks.

    Args:
        model: A Transformers model of a family in `BACKBONES`, with or without a task head, whether or not its blocks
            are wrapped already.

    Raises:
        ValueError: If the family has no record, or the model does not look as its record says.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    record = BACKBONES.get(model_type)
    if record is None:
        raise ValueError(
            f"Found a {type(model).__name__} of model type {model_type!r}, for which there is no backbone record. "
            f"Prompts need one of these families: {', '.join(sorted(BACKBONES))}. To add another one, put a "
            "`BackboneRecord` with the paths of its blocks, norm and attention into `hf_vpt.backbones.BACKBONES`."
        )
    modules = dict(model.named_modules())
    # A wrapped block keeps its name and what it wraps is called `<name>.base_layer`, so the pattern finds it once.
    matches = [match for match in (re.fullmatch(record.block_pattern, name) for name in modules) if match]
    # The text tower of a CLIP model has blocks of the same name, and no patches.
    roots = {match[1] for match in matches if match[1] + record.patch_projection in modules}
    if len(roots) != 1:
        raise ValueError(
            f"Found {len(roots)} vision transformers ({sorted(roots)}) in a {type(model).__name__}. The record of "
            f"{model_type!r} needs exactly one list of blocks called {record.blocks!r} beside a patch projection "
            f"called {record.patch_projection!r}. Pass the part of the model that holds one backbone."
        )
    root = roots.pop()
    blocks = [match for match in matches if match[1] == root]
    stages = [match[2] if record.windows else "0" for match in blocks]
    projection_name = root + record.patch_projection
    projection, patch_embed = modules[projection_name], modules[projection_name.rpartition(".")[0]]
    vision_config = getattr(config, "vision_config", config)
    patch_size = _patch_size(projection, vision_config)
    bare_blocks = [getattr(modules[match[0]], "base_layer", modules[match[0]]) for match in blocks]
    for block in bare_blocks:
        record.access.check(block)
    return Backbone(
        record=record,
        root=root.rstrip("."),
        block_names=tuple(match[0] for match in blocks),
        hidden_size=record.access.width(bare_blocks[0].get_submodule(record.attention)),
        depths=tuple(stages.count(stage) for stage in dict.fromkeys(stages)),
        num_prefix_tokens=sum(_num_tokens(model, root + path) for path in record.prefix_tokens),
        patch_size=patch_size,
        grid=_grid(vision_config, patch_embed, patch_size, record),
        heads=tuple(_heads(model, modules, root, record)),
    )


def _patch_size(projection: nn.Module, config: Any) -> tuple[int, int]:
    if isinstance(projection, nn.Conv2d):
        return tuple(projection.kernel_size)
    if getattr(config, "patch_size", None) is None:
        raise ValueError(
            f"Found a {type(projection).__name__} where patches become tokens, and no patch size in the config. "
            "Prompts need patches of one size, made by a Conv2d. Use a model without a convolutional stem."
        )
    return _pair(config.patch_size)


def _grid(config: Any, patch_embed: nn.Module, patch_size: tuple[int, int], record: BackboneRecord) -> tuple[int, int]:
    """Rows and columns of patches that the model is made for."""
    # timm keeps the image size in its patch embedding, SigLIP 2 knows a number of patches alone.
    image_size = getattr(config, "image_size", None) or getattr(patch_embed, "img_size", None)
    if image_size is None:
        side = math.isqrt(config.num_patches)
        return side, side
    return _patch_grid(_pair(image_size), patch_size, record)


def _patch_grid(image_size: tuple[int, int], patch_size: tuple[int, int], record: BackboneRecord) -> tuple[int, int]:
    """Rows and columns of patches in an image; one that does not divide into them is enlarged or cropped."""
    (height, width), (rows, columns) = image_size, patch_size
    if record.pads_image:
        return -(-height // rows), -(-width // columns)
    return height // rows, width // columns


def _num_tokens(model: nn.Module, path: str) -> int:
    """Tokens in the parameter at `path`; 0 where there is none."""
    owner, _, name = path.rpartition(".")
    token = getattr(model.get_submodule(owner), name, None)
    if token is None:
        return 0
    return 1 if token.ndim == 1 else token.shape[1]


def _heads(model: nn.Module, modules: Mapping[str, nn.Module], root: str, record: BackboneRecord) -> Iterable[str]:
    """Names of the task heads that a model has."""
    known = [name for name in record.heads if name in modules and any(True for _ in modules[name].parameters())]
    if known or "ForImageClassification" not in type(model).__name__:
        return known
    # A class of the user's own may call its head anything: it is what stands beside the backbone.
    return [
        name
        for name, child in model.named_children()
        if not f"{root}.".startswith(f"{name}.") and any(True for _ in child.parameters())
    ]


def _join(root: str, path: str) -> str:
    return ".".join(part for part in (root, path) if part)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width from a size that may be one number for both."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
