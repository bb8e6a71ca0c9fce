"""Prompts in the attention of timm's plain vision transformers."""

from __future__ import annotations

import functools

import torch
from torch import nn

from .access import StateOnModule, linear_weight


@functools.cache
def _prompted_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of timm's `Attention` that lets prompts in; timm is not needed until there is one."""
    return type(f"Prompted{cls.__name__}", (_PromptedForward, cls), {"__module__": __name__, "unprompted_class": cls})


class _PromptedForward:
    """The forward pass of timm's `Attention` over the tokens and the prompts that were handed over."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, **kwargs: bool) -> torch.Tensor:
        """`(B, T, D)` to `(B, T, D)`."""
        prompts = self.hfvpt_keys_values
        if prompts is None:
            return super().forward(x, attn_mask, **kwargs)
        if kwargs.get("is_causal"):
            raise ValueError(
                "Found causal attention in a timm model. Prompts have no place in an order of tokens. Use "
                "`model.base_model.set_insertion('tokens')` to put them among the tokens."
            )
        gate = getattr(self, "gate", None)
        key, value, query = TIMM_ATTENTION.project(self, x, x.shape[1])
        key, value, attn_mask = prompts.append_to(key, value, attn_mask)
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p=self.attn_drop.p if self.training else 0.0
        )
        output = self.norm(attended.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(output if gate is None else output * gate(x).sigmoid()))

    def __reduce_ex__(self, protocol: int) -> tuple:
        # Classes made at run time cannot be found by name, which pickle and copy would do.
        return _rebuild, (self.unprompted_class,), self.__dict__


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    prompted = _prompted_class(cls)
    return prompted.__new__(prompted)


class _TimmAttention(StateOnModule):
    """timm's `Attention`: one linear layer for queries, keys and values together, perhaps normalised by head."""

    def check(self, block: nn.Module) -> None:
        from timm.layers import Attention
        from timm.models.vision_transformer import Block

        # By their exact classes: a block may have parts of the same names in another order, with its norms behind.
        attention = getattr(block, "attn", None)
        for part, expected in ((block, Block), (attention, Attention)):
            cls = getattr(type(part), "unprompted_class", type(part))
            if cls is not expected:
                raise ValueError(
                    f"Found {cls.__module__}.{cls.__name__} in a timm model. Prompts need its plain vision "
                    f"transformers, made of {expected.__module__}.{expected.__name__}, without rotary or relative "
                    "positions and with norms before attention and MLP. Use such a model, or a family with a record "
                    "of its own."
                )

    def prompted_class(self, attention: nn.Module) -> type[nn.Module]:
        return _prompted_class(type(attention))

    def project(
        self, attention: nn.Module, normed: torch.Tensor, num_queries: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        # One product for all three: prompts are few, and a slice of the weight would leave quantised layers behind.
        qkv = attention.qkv(normed).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query = attention.q_norm(query[:, :, :num_queries]) if num_queries else None
        return attention.k_norm(key), value, query

    def query_key_weights(self, attention: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_weight(attention.qkv).chunk(3)[:2]

    def width(self, attention: nn.Module) -> int:
        return attention.qkv.in_features


TIMM_ATTENTION = _TimmAttention()
