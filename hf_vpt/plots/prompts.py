"""Where the prompts of an adapter are, and how much the model looks at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..attention.maps import split_attentions
from ..backbones import find_backbone
from .figure import new_figure


def plot_prompt_distribution(rounds: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw the number of prompts in each block over the moves of a training run with PRO-VPT.

    Args:
        rounds: What `relocations.json` holds.
        path: File to write, PNG, SVG or PDF by its ending.
    """
    figure, (axis,) = new_figure()
    counts = [list(move["distribution"]) for move in rounds]
    image = axis.imshow(list(map(list, zip(*counts, strict=True))), aspect="auto", origin="lower")
    axis.set(xlabel="move", ylabel="block", title="prompts in each block")
    axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image)
    figure.savefig(path)


@torch.no_grad()
def plot_attention(model: PeftModel, pixel_values: torch.Tensor, path: str | Path) -> None:
    """Draw the share of attention that goes to prompts, block by block, and where the rest goes in the last block.

    Both are means over images and heads, of the first token (CLS) where the backbone has one, else of all tokens; no
    image can be told from them. Attention in windows has no picture of its own for the rest.

    Args:
        model: A model with an adapter, whose attention can run in the eager way.
        pixel_values: Images `(B, C, H, W)`, as the model takes them.
        path: File to write, PNG, SVG or PDF by its ending.
    """
    implementation, training = model.config._attn_implementation, model.training
    backbone = find_backbone(model.get_base_model())
    model.set_attn_implementation("eager")
    try:
        attentions = model.eval()(pixel_values=pixel_values, output_attentions=True).attentions
        maps = split_attentions(model, attentions)
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
    is_global = backbone.record.windows is None
    queries = slice(0, 1) if is_global and backbone.num_prefix_tokens else slice(None)
    shares = [float(prompts[:, :, queries].sum(dim=-1).float().mean()) for _, prompts in maps]
    figure, axes = new_figure(num_panels=2 if is_global else 1)
    axes[0].bar(range(len(shares)), [100 * share for share in shares])
    axes[0].set(xlabel="block" if is_global else "stage", ylabel="attention on prompts, %")
    if is_global:
        last = maps[-1].tokens[:, :, queries, backbone.num_prefix_tokens :].float().mean(dim=(0, 1, 2))
        rows, columns = (
            side // patch for side, patch in zip(pixel_values.shape[2:], backbone.patch_size, strict=True)
        )
        image = axes[1].imshow(last.view(rows, columns).cpu().tolist())
        axes[1].set(title="attention on patches, last block", xticks=[], yticks=[])
        figure.colorbar(image)
    figure.savefig(path)
