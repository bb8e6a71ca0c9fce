"""Prompts as extra keys and values of a block's own attention.

What a deep prompt's row of the residual stream becomes is thrown away after the block, so a prompt acts on the other
tokens in one way only: as a key and a value. With P `(1|B, N, D)` the prompts and H `(B, T, D)` the block's input,

    keys = [W_k·norm(H) ; W_k·norm(P)]    values = [W_v·norm(H) ; W_v·norm(P)]    queries = W_q·norm(H)

is the same function as running the block on N more tokens (VPT-Deep, arXiv 2203.12119, eq. 7), without
their queries, attention rows, output projection and MLP. Prompt columns stand last, so that `attentions[..., :T]` are
the columns a user knows.

The road in is Transformers' attention interface: the attention modules of wrapped blocks see a config that names our
function instead of the model's, and our function hands the longer keys and values to the model's own. The model's
config itself stays as it is, so masks are made for the real implementation, a later `set_attn_implementation` keeps
the prompts, and nothing of ours is ever saved in it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


PROMPTED_ATTENTION = "hfvpt_prompted_attention"
# The keyword under which a block's keys and values travel through layer and attention module to the function below.
KEYS_VALUES = "prompt_keys_values"


class PromptKeysValues:
    """Keys and values that one block adds to its attention in one forward pass.

    Args:
        key: `(1|B, heads, N, head_dim)`.
        value: `(1|B, heads, N, head_dim)`.
        bias: Added to the attention logits of the prompt columns before the softmax, `(1|B, 1, 1, N)`; a large
            negative number takes a prompt away from an image.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None):
        self.key = key
        self.value = value
        self.bias = bias
        self.arrived = False

    def append_to(
        self, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values `(B, heads, T + N, head_dim)` and the mask with columns for the prompts."""
        batch_size, num_heads, _, head_dim = key.shape
        shape = (batch_size, num_heads, self.key.shape[2], head_dim)
        # Autocast or an adapter kept in float32 may give prompts another dtype than the tokens have.
        key_and_prompts = torch.cat([key, self.key.to(key.dtype).expand(shape)], dim=2)
        value_and_prompts = torch.cat([value, self.value.to(value.dtype).expand(shape)], dim=2)
        return key_and_prompts, value_and_prompts, extend_mask(mask, key, self.key.shape[2], self.bias)


def extend_mask(
    mask: torch.Tensor | None, key: torch.Tensor, num_prompts: int, bias: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Adds columns for prompts to an attention mask.

    Args:
        mask: `(1|B, 1|heads, 1|T, T)`, boolean (true: attend) or added to the logits; None where all may attend.
        key: The tokens' keys `(B, heads, T, head_dim)`.
        num_prompts: Number N of columns.
        bias: What the new columns hold, `(1|B, 1, 1, N)`; None for "attend".

    Returns:
        `(…, T + N)`, or None where there is nothing to mask.
    """
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"Found an attention mask of type {type(mask).__name__}. Prompts need a mask that is a tensor. Use "
            "`model.set_attn_implementation('sdpa')` or 'eager', or call the model without an attention mask."
        )
    if bias is None:
        return None if mask is None else nn.functional.pad(mask, (0, num_prompts), value=mask.dtype == torch.bool)
    bias = bias.to(key.dtype)
    if mask is None:
        return nn.functional.pad(bias, (key.shape[2], 0))
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=key.dtype).masked_fill(~mask, torch.finfo(key.dtype).min)
    batch_size = max(mask.shape[0], bias.shape[0])
    return torch.cat([mask.expand(batch_size, -1, -1, -1), bias.expand(batch_size, *mask.shape[1:3], -1)], dim=-1)


def prompted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's own attention function, run on the tokens and on the prompts that came along."""
    prompts = kwargs.pop(KEYS_VALUES, None)
    config = module.config.unprompted
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, module.config.eager_attention)
    if prompts is not None:
        key, value, attention_mask = prompts.append_to(key, value, attention_mask)
        # Only a check, and a compiled graph may not have side effects.
        if not torch.compiler.is_compiling():
            prompts.arrived = True
    if attention not in (module.config.eager_attention, ALL_ATTENTION_FUNCTIONS["sdpa"]):
        # Flash attention asks the module's config for the name of its kernel.
        module = _Unprompted(module)
    return attention(module, query, key, value, attention_mask, *args, **kwargs)


class _Unprompted:
    """An attention module as it looks without prompts: the same, but for the config."""

    def __init__(self, module: nn.Module):
        self._module = module
        self.config = module.config.unprompted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class PromptedAttentionConfig:
    """A model's config as the attention of a wrapped block sees it: everything is the model's, but for the name of
    the attention function."""

    _attn_implementation = PROMPTED_ATTENTION

    def __init__(self, unprompted: Any, eager_attention: Any):
        self.unprompted = unprompted
        self.eager_attention = eager_attention

    def __getattr__(self, name: str) -> Any:
        # Only what is missing here comes this way. While copy and pickle rebuild the object, everything is.
        if name in ("unprompted", "eager_attention") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.unprompted, name)


def open_attention_for_prompts(attention: nn.Module) -> None:
    """Lets the keys and values of prompts into an attention module; `close_attention_for_prompts` undoes it."""
    if not isinstance(attention.config, PromptedAttentionConfig):
        # The eager function is the family's own and stands beside its attention class.
        eager_attention = sys.modules[type(attention).__module__].eager_attention_forward
        attention.config = PromptedAttentionConfig(attention.config, eager_attention)


def close_attention_for_prompts(attention: nn.Module) -> None:
    """Gives an attention module its own config back."""
    if isinstance(attention.config, PromptedAttentionConfig):
        attention.config = attention.config.unprompted


AttentionInterface.register(PROMPTED_ATTENTION, prompted_attention)
