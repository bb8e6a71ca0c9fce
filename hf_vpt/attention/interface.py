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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .access import AttentionAccess, LinearProjections
from .block_masks import for_flex_attention
from .keys_values import PromptKeysValues, insert_into_mask


PROMPTED_ATTENTION = "hfvpt_prompted_attention"
# The keyword under which a block's keys and values travel through layer and attention module to the function below.
KEYS_VALUES = "prompt_keys_values"
# The same for prompts that stand among the tokens of a block that makes a mask of its own.
INSERTED = "inserted_prompts"


@dataclass(frozen=True)
class InsertedPrompts:
    """Prompts among the tokens of a block that does not know of them and makes its mask without them.

    Attributes:
        start: Tokens before the prompts.
        num_tokens: Number of prompts.
        absent: Prompts that an image does not have, `(B, N)`; None where all are there.
    """

    start: int
    num_tokens: int
    absent: torch.Tensor | None = None


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
    given = kwargs
    if module.config.relayed:
        given, module.config.relayed = module.config.relayed, {}
    kwargs = {name: value for name, value in kwargs.items() if name not in (KEYS_VALUES, INSERTED)}
    prompts = given.get(KEYS_VALUES, getattr(module, AttentionAccess.attribute, None))
    inserted = given.get(INSERTED)
    config = module.config.unprompted
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, module.config.eager_attention)
    if inserted is not None:
        attention_mask = insert_into_mask(
            attention_mask, inserted.start, inserted.num_tokens, inserted.absent, like=key.transpose(1, 2)
        )
    if prompts is not None:
        key, value, attention_mask = prompts.append_to(key, value, attention_mask)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        if config._attn_implementation == "flex_attention":
            attention_mask = for_flex_attention(attention_mask, query, key)
        elif "flash" in (config._attn_implementation or ""):
            # Flash attention takes no mask that tells tokens from prompts.
            attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if attention not in (module.config.eager_attention, ALL_ATTENTION_FUNCTIONS["sdpa"]):
        # Flash attention asks the module's config for the name of its kernel.
        module = _Unprompted(module)
    if prompts is not None:
        prompts.attend(key, value, lambda *tensors: attention(module, *tensors, *args, **kwargs))
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
        self.relayed: dict[str, Any] = {}
        self.unprompted = unprompted
        self.eager_attention = eager_attention

    def __getattr__(self, name: str) -> Any:
        # Only what is missing here comes this way. While copy and pickle rebuild the object, everything is.
        if name in ("unprompted", "eager_attention") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.unprompted, name)


class _Relay:
    """Forward pre-hook of an attention module that keeps keyword arguments to itself: takes prompts out of them."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Set and taken within one call of the module, so nothing can come between.
        module.config.relayed = {name: kwargs[name] for name in (KEYS_VALUES, INSERTED) if name in kwargs}
        return args, {name: value for name, value in kwargs.items() if name not in module.config.relayed}


class InterfaceAttention(LinearProjections):
    """An attention module that calls the function which Transformers' attention interface names.

    Args:
        relays: Whether the module does not pass keyword arguments on to the function (SigLIP).
    """

    def __init__(self, relays: bool = False):
        super().__init__()
        self.relays = relays

    def open(self, attention: nn.Module) -> None:
        if self.is_open(attention):
            return
        # The eager function is the family's own and stands beside its attention class.
        eager_attention = sys.modules[type(attention).__module__].eager_attention_forward
        attention.config = PromptedAttentionConfig(attention.config, eager_attention)
        if self.relays:
            attention.register_forward_pre_hook(_Relay(), with_kwargs=True)

    def close(self, attention: nn.Module) -> None:
        if not self.is_open(attention):
            return
        attention.config = attention.config.unprompted
        # Not through the handle of the hook: it does not survive a copy of the model.
        for key, hook in list(attention._forward_pre_hooks.items()):
            if isinstance(hook, _Relay):
                del attention._forward_pre_hooks[key]
                attention._forward_pre_hooks_with_kwargs.pop(key, None)

    def is_open(self, attention: nn.Module) -> bool:
        return isinstance(attention.config, PromptedAttentionConfig)

    def hand_over(
        self, attention: nn.Module, keys_values: PromptKeysValues | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        # A plain function argument, so any number of forward passes may be alive at once.
        return kwargs if keys_values is None else {**kwargs, KEYS_VALUES: keys_values}


AttentionInterface.register(PROMPTED_ATTENTION, prompted_attention)
