"""One frozen record for each backbone family: where its blocks are and what is inside them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class BackboneRecord:
    """Says where a family of vision transformers keeps what prompts need; a new family is one new record.

    Paths are relative to the backbone's root, the module that holds the embeddings and the blocks
    (`vit` in a `ViTForImageClassification`, the model itself in a `ViTModel`).

    Args:
        model_type: `config.model_type` of the family in Transformers.
        blocks: Path of the `ModuleList` of blocks.
        norm: Name of the pre-attention norm in a block.
        attention: Name of the attention module in a block; it has `q_proj`, `k_proj`, `v_proj` and `head_dim`,
            and calls the function that Transformers' attention interface names.
        embeddings: Path of the module that turns pixels `(B, C, H, W)` into tokens.
        prefix_tokens: Names, in the embeddings, of the `(1, n, D)` parameters that stand before the patches. Absent
            ones and `None` count as zero tokens, so that one record serves models with and without them.
        heads: Names, in a model with a task head, of the modules to train together with the prompts.
        shuffles_patches: Whether the embeddings reorder the patches at random and drop a part `config.mask_ratio`
            of them (ViT-MAE). Prompts that pool the patch grid need it whole and in order.
    """

    model_type: str
    blocks: str = "layers"
    norm: str = "layernorm_before"
    attention: str = "attention"
    embeddings: str = "embeddings"
    prefix_tokens: tuple[str, ...] = ("cls_token",)
    heads: tuple[str, ...] = ("classifier",)
    shuffles_patches: bool = False

    @property
    def block_pattern(self) -> str:
        """Regular expression that fully matches the name of a block in a model of this family."""
        return rf"(?:.*\.)?{re.escape(self.blocks)}\.(\d+)"


BACKBONES: dict[str, BackboneRecord] = {
    record.model_type: record
    for record in (
        BackboneRecord("vit"),
        BackboneRecord(
            "deit",
            prefix_tokens=("cls_token", "distillation_token"),
            heads=("classifier", "cls_classifier", "distillation_classifier"),
        ),
        BackboneRecord("vit_mae", shuffles_patches=True),
        BackboneRecord("vit_msn"),
        BackboneRecord("dinov2", blocks="encoder.layer", norm="norm1"),
        BackboneRecord(
            "dinov2_with_registers",
            blocks="encoder.layer",
            norm="norm1",
            prefix_tokens=("cls_token", "register_tokens"),
        ),
    )
}


@dataclass(frozen=True)
class Backbone:
    """A model's own numbers, read off the model through the record of its family.

    Attributes:
        record: The record of the family.
        root: Name of the backbone's root in the model, `""` where the model is the backbone.
        num_layers: Number of blocks.
        hidden_size: Width D of the tokens.
        num_prefix_tokens: Tokens before the patches (CLS, distillation, registers).
        patch_size: Height and width of a patch in pixels.
        grid: Rows h and columns w of patches at the model's own image size.
        heads: Names of the task heads that the model really has.
    """

    record: BackboneRecord
    root: str
    num_layers: int
    hidden_size: int
    num_prefix_tokens: int
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    heads: tuple[str, ...]

    def embeddings(self, model: nn.Module) -> nn.Module:
        """The module of `model` that turns pixels into tokens."""
        return _below(model, self.root, self.record.embeddings)

    def blocks(self, model: nn.Module) -> nn.Module:
        """The list of blocks of `model`, wrapped or not."""
        return _below(model, self.root, self.record.blocks)

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of `height` × `width` pixels."""
        return height // self.patch_size[0], width // self.patch_size[1]


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
    # A wrapped block keeps its name and what it wraps is called `<name>.base_layer`, so the pattern finds it once.
    names = [name for name, _ in model.named_modules() if re.fullmatch(record.block_pattern, name)]
    roots = sorted({name.rpartition(f"{record.blocks}.")[0].rstrip(".") for name in names})
    if len(roots) != 1:
        raise ValueError(
            f"Found blocks under {roots} in a {type(model).__name__}. The record of {model_type!r} needs exactly one "
            f"list of blocks called {record.blocks!r}. Pass the part of the model that holds one backbone."
        )
    root = roots[0]
    embeddings = _below(model, root, record.embeddings)
    prefix = [getattr(embeddings, name, None) for name in record.prefix_tokens]
    image_size, patch_size = _pair(config.image_size), _pair(config.patch_size)
    heads = [name for name in record.heads if any(True for _ in _parameters(model, name))]
    return Backbone(
        record=record,
        root=root,
        num_layers=len(names),
        hidden_size=config.hidden_size,
        num_prefix_tokens=sum(token.shape[1] for token in prefix if token is not None),
        patch_size=patch_size,
        grid=(image_size[0] // patch_size[0], image_size[1] // patch_size[1]),
        heads=tuple(heads),
    )


def _below(model: nn.Module, root: str, path: str) -> nn.Module:
    """The module at `path` below the backbone's root."""
    return model.get_submodule(f"{root}.{path}".lstrip("."))


def _parameters(model: nn.Module, name: str):
    """Parameters of the child called `name`; nothing for a missing child or an `nn.Identity`."""
    child = getattr(model, name, None)
    return child.parameters() if isinstance(child, nn.Module) else ()


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width from a size that may be one number for both."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
