"""Prompts in Swin-v2's attention, which is its own and not Transformers' interface."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers.models.swinv2.modeling_swinv2 import Swinv2SelfAttention

from .access import LinearProjections, StateOnModule


class PromptedSwinv2SelfAttention(Swinv2SelfAttention):
    """Scaled cosine attention (Swin-v2, arXiv 2111.09883, eq. 2) over the tokens of a window and the prompts.

    The logits of prompts have the block's own temperature and no position bias: prompts have no position.
    """

    unprompted_class = Swinv2SelfAttention

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[torch.Tensor, ...]:
        """`(windows, T, D)` to `(windows, T, D)`; attention weights `(windows, heads, T, T + N)` where asked for."""
        prompts = self.hfvpt_keys_values
        if prompts is None:
            return super().forward(hidden_states, attention_mask, output_attentions)
        key, value, query = LinearProjections.project(SWINV2_ATTENTION, self, hidden_states, hidden_states.shape[1])
        query, key = nn.functional.normalize(query, dim=-1), nn.functional.normalize(key, dim=-1)
        mask = self._position_bias()
        if attention_mask is not None:
            num_images = hidden_states.shape[0] // attention_mask.shape[0]
            # Twice, as the model adds it.
            mask = mask + 2 * attention_mask[:, None].repeat(num_images, 1, 1, 1)
        key, value, mask = prompts.append_to(key, value, mask)
        context, weights = self._attend(query, key, value, mask)
        prompts.attend(key, value, self._attend)
        context = context.flatten(2)
        return (context, weights) if output_attentions else (context,)

    def _position_bias(self) -> torch.Tensor:
        """The continuous position bias of the window, `(1, heads, T, T)`."""
        table = self.continuous_position_bias_mlp(self.relative_coords_table).flatten(0, -2)
        num_tokens = self.window_size[0] * self.window_size[1]
        bias = table[self.relative_position_index.flatten()].view(num_tokens, num_tokens, -1)
        return 16 * torch.sigmoid(bias.permute(2, 0, 1))[None]

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output `(windows, T, heads, head_dim)` and weights, of normalised queries and keys."""
        logits = query @ key.mT * self.logit_scale.clamp(max=math.log(1.0 / 0.01)).exp()
        weights = self.dropout((logits if mask is None else logits + mask).softmax(dim=-1))
        return (weights @ value).transpose(1, 2), weights


class _Swinv2Attention(LinearProjections, StateOnModule):
    def __init__(self):
        super().__init__("query", "key", "value", "attention_head_size")

    def project(
        self, attention: nn.Module, normed: torch.Tensor, num_queries: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As the attention does, with normalised keys and queries.

        VAPT's prompts start at 0, where there is no direction: keys shorter than 0.01 grow linearly to that length, so
        that the first gradients are not those of a division by nothing.
        """
        key, value, query = super().project(attention, normed, num_queries)
        key, query = (
            None if tensor is None else nn.functional.normalize(tensor, dim=-1, eps=1e-2) for tensor in (key, query)
        )
        return key, value, query

    def check(self, block: nn.Module) -> None:
        cls = type(block.attention.self)
        if cls not in (Swinv2SelfAttention, PromptedSwinv2SelfAttention):
            raise ValueError(
                f"Found {cls.__module__}.{cls.__name__} in a block of a Swin-v2. Prompts need the attention of "
                "Transformers, transformers.models.swinv2.modeling_swinv2.Swinv2SelfAttention, which they take the "
                "place of. Use the model as Transformers makes it."
            )

    def prompted_class(self, attention: nn.Module) -> type[nn.Module]:
        return PromptedSwinv2SelfAttention


SWINV2_ATTENTION = _Swinv2Attention()
