"""What prompts do to a backbone, written another way: tokens concatenated, attention and windows written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from peft import get_peft_model
from torch import nn

from hf_vpt import VPTConfig
from hf_vpt.backbones import find_backbone


def prompted(model: nn.Module, **settings) -> nn.Module:
    """The model with random prompts of order one tenth."""
    torch.manual_seed(2)
    return get_peft_model(model, VPTConfig(**({"num_virtual_tokens": 3, "init_weights": False} | settings))).eval()


def tables_of(model: nn.Module) -> dict[int, torch.Tensor]:
    """The prompts of each block, with the projection written out."""
    prompts = model.base_model.prompts()
    projection = next(iter(prompts.values())).projection
    if projection is None:
        return {index: p.prompt_embeddings for index, p in prompts.items()}
    return {index: p.prompt_embeddings @ projection.weight.T + projection.bias for index, p in prompts.items()}


def leaves(tables: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Copies of the prompts that gather gradients of their own."""
    return {index: table.detach().clone().requires_grad_() for index, table in tables.items()}


def root_of(model: nn.Module) -> nn.Module:
    """The part of a model, wrapped or not, that holds the embeddings, the blocks and the final norm."""
    return model.get_submodule(find_backbone(model).root)


def concatenate_run_strip(
    model: nn.Module,
    hidden: torch.Tensor,
    tables: Mapping[int, torch.Tensor],
    deep: bool = True,
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda block, tokens: block(tokens),
) -> torch.Tensor:
    """Output of the last block of a bare model whose block i runs on [prefix, P_i, patches]: VPT, eq. 4 to 7.

    Args:
        model: The bare model.
        hidden: What block 0 gets without prompts, `(B, T, D)`.
        tables: Prompts `(N, D)` by block; shallow ones are those of block 0.
        deep: Whether what prompts become is cut out behind each block, or behind the last one.
        run: Output of a block on tokens `(B, T + N, D)`.
    """
    backbone = find_backbone(model)
    prefix, blocks = backbone.num_prefix_tokens, [model.get_submodule(name) for name in backbone.block_names]
    for index, block in enumerate(blocks):
        if index in tables:
            prompts = tables[index].expand(len(hidden), -1, -1)
            hidden = torch.cat([hidden[:, :prefix], prompts, hidden[:, prefix:]], dim=1)
        hidden = run(block, hidden)
        if (deep and index in tables) or (not deep and index == len(blocks) - 1):
            num_prompts = tables[index if deep else 0].shape[0]
            hidden = torch.cat([hidden[:, :prefix], hidden[:, prefix + num_prompts :]], dim=1)
    return hidden


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int, bias: torch.Tensor, cosine_scale=None
) -> torch.Tensor:
    """Softmax attention `(B, T, D)` with an additive bias `(…, T, T)`; cosines where they have a scale."""
    query, key, value = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value))
    if cosine_scale is None:
        logits = query @ key.mT / query.shape[-1] ** 0.5
    else:
        lengths = query.norm(dim=-1)[..., :, None] * key.norm(dim=-1)[..., None, :]
        logits = query @ key.mT / lengths.clamp(min=1e-12) * cosine_scale  # the key of padding is zero
    weights = (logits + bias).exp()
    return (weights / weights.sum(dim=-1, keepdim=True) @ value).transpose(1, 2).flatten(2)


class SwinByHand:
    """A Swin or Swin-v2 that runs window by window on [tokens of the window ; prompts].

    Prompts have no position bias and no mask, neither as keys nor as queries; what a prompt becomes is the mean over
    the windows.

    Args:
        model: The bare classifier.
    """

    def __init__(self, model: nn.Module):
        self.model, self.backbone = model, find_backbone(model)
        self.root = model.get_submodule(self.backbone.root)
        self.is_v2 = self.backbone.record.model_type == "swinv2"

    def run(
        self,
        pixel_values: torch.Tensor,
        prompts_of: Mapping[int, torch.Tensor | Callable[[torch.Tensor], torch.Tensor]],
        deep: bool = True,
        pool: bool = False,
    ) -> torch.Tensor:
        """Logits. Prompts `(1|B, N, D)` by block, or what makes them of the block's input `(B, T, D)`."""
        hidden, grid = self.root.embeddings(pixel_values)
        maps, prompts, index = hidden.unflatten(1, grid), None, 0
        for stage in self.root.encoder.layers:
            for block in stage.blocks:
                if index in prompts_of:
                    made = prompts_of[index]
                    made = made(maps.flatten(1, 2)) if callable(made) else made
                    prompts = made.expand(len(maps), -1, -1)
                elif deep:
                    prompts = maps.new_zeros(len(maps), 0, maps.shape[-1])
                maps, prompts = self.run_block(block, maps, prompts)
                index += 1
            if stage.downsample is not None:
                grid = tuple(maps.shape[1:3])
                maps = stage.downsample(maps.flatten(1, 2), grid).unflatten(1, [-(-side // 2) for side in grid])
                prompts = self.merge(stage.downsample, prompts)
        tokens = maps.flatten(1, 2)
        if pool:
            tokens = torch.cat([tokens, prompts], dim=1)
        return self.model.classifier(self.root.layernorm(tokens).mean(dim=1))

    def merge(self, merging: nn.Module, prompts: torch.Tensor) -> torch.Tensor:
        """Four patches are joined along the channels, a prompt with itself."""
        joined = torch.cat([prompts] * 4, dim=-1)
        return merging.norm(merging.reduction(joined)) if self.is_v2 else merging.reduction(merging.norm(joined))

    def run_block(
        self, block: nn.Module, maps: torch.Tensor, prompts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A block on a map `(B, h, w, D)` and prompts `(B, N, D)`."""
        size, shift = block.window_size, block.shift_size
        if not self.is_v2 and min(maps.shape[1:3]) <= size:  # one window is enough, and need not be shifted
            size, shift = min(maps.shape[1:3]), 0
        normed, normed_prompts = (maps, prompts) if self.is_v2 else map(block.layernorm_before, (maps, prompts))
        height, width = maps.shape[1:3]
        rolled = nn.functional.pad(normed, (0, 0, 0, -width % size, 0, -height % size)).roll((-shift, -shift), (1, 2))
        attended, seen = torch.zeros_like(rolled), []
        position_bias = self.position_bias(block, size).to(maps)
        for top in range(0, rolled.shape[1], size):
            for left in range(0, rolled.shape[2], size):
                window = rolled[:, top : top + size, left : left + size].flatten(1, 2)
                mask = self.mask((top, left), rolled.shape[1:3], size, shift).to(maps)
                bias = (position_bias + mask)[None]
                bias = nn.functional.pad(bias, (0, prompts.shape[1], 0, prompts.shape[1]))
                mixed = self.attention(block, torch.cat([window, normed_prompts], dim=1), bias)
                attended[:, top : top + size, left : left + size] = mixed[:, : size**2].unflatten(1, (size, size))
                seen.append(mixed[:, size**2 :])
        attended = attended.roll((shift, shift), (1, 2))[:, :height, :width]
        return self.finish(block, maps, attended), self.finish(block, prompts, sum(seen) / len(seen))

    def attention(self, block: nn.Module, tokens: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if self.is_v2:
            inner = block.attention.self
            scale = inner.logit_scale.exp().clamp(max=100.0)
            projections, num_heads = (inner.query, inner.key, inner.value), inner.num_attention_heads
            return attend(*(projection(tokens) for projection in projections), num_heads, bias, scale)
        inner = block.attention
        projections = (inner.q_proj, inner.k_proj, inner.v_proj)
        return attend(*(projection(tokens) for projection in projections), inner.num_attention_heads, bias)

    def finish(self, block: nn.Module, before: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, residual, MLP; Swin-v2 has its norms behind both."""
        if self.is_v2:
            tokens = before + block.layernorm_before(block.attention.output.dense(attended))
            return tokens + block.layernorm_after(block.output.dense(block.intermediate(tokens)))
        tokens = before + block.attention.o_proj(attended)
        return tokens + block.mlp(block.layernorm_after(tokens))

    def mask(self, corner: tuple[int, int], sides: tuple[int, int], size: int, shift: int) -> torch.Tensor:
        """Added to logits between tokens of a window that were no neighbours before the shift; twice in Swin-v2."""
        rows, columns = (
            sum((at >= side - border).int() for border in (size, shift))
            for at, side in zip((torch.arange(c, c + size) for c in corner), sides)
        )
        regions = (3 * rows[:, None] + columns).flatten()
        apart = (regions[:, None] != regions) & (shift > 0)
        return apart * (-200.0 if self.is_v2 else -100.0)

    def position_bias(self, block: nn.Module, size: int) -> torch.Tensor:
        """The bias between the tokens of a window, `(heads, size², size²)`."""
        places = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        offsets = places[:, None] - places
        if not self.is_v2:
            table = block.attention.relative_position_bias.relative_position_bias_table
            shifted = offsets + size - 1
            return table[shifted[..., 0] * (2 * size - 1) + shifted[..., 1]].permute(2, 0, 1)
        mlp = block.attention.self.continuous_position_bias_mlp
        # Log-spaced coordinates (Swin-v2, eq. 4), in single precision as the model keeps them.
        scaled = offsets.float() / max(size - 1, 1) * 8
        spaced = scaled.sign() * (scaled.abs() + 1).log2() / math.log2(8)
        return 16 * mlp(spaced.to(mlp[0].weight)).sigmoid().permute(2, 0, 1)
