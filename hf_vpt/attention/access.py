"""How prompts get into one kind of attention module."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import nn

from .keys_values import BakedKeysValues, PromptKeysValues


def linear_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer; of a quantised one the numbers that it stands for."""
    if get_bnb_param_type(layer.weight):
        # Not PEFT's function for modules, which on a CPU leaves an 8-bit layer that has run without its scales.
        return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    return dequantize_module_weight(layer)


class AttentionAccess:
    """What the package must know of an attention module to hand it more keys and values.

    A block opens its attention once, when it is wrapped. In each forward pass it projects its prompts and hands the
    result over; the attention function of this access finds it. A kind of attention module is one subclass.
    """

    # Attribute of the attention module that holds keys and values which do not come as an argument.
    attribute = "hfvpt_keys_values"

    def check(self, block: nn.Module) -> None:
        """Raises `ValueError` if a block of the family is not one that prompts can get into; changes nothing."""

    def open(self, attention: nn.Module) -> None:
        """Lets the keys and values of prompts in; `close` undoes it."""
        raise NotImplementedError

    def close(self, attention: nn.Module) -> None:
        """Makes the attention module what it was."""
        raise NotImplementedError

    def is_open(self, attention: nn.Module) -> bool:
        """Whether prompts can get in."""
        raise NotImplementedError

    def bake(self, attention: nn.Module, keys_values: PromptKeysValues) -> None:
        """Leaves keys and values on the attention module for good, for every forward pass from now on."""
        self.open(attention)
        baked = BakedKeysValues(keys_values.key.contiguous(), keys_values.value.contiguous())
        vars(attention).pop(self.attribute, None)
        setattr(attention, self.attribute, baked)

    def project(
        self, attention: nn.Module, normed: torch.Tensor, num_queries: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys, values and the first `num_queries` queries of tokens, by the attention's own projections.

        Args:
            attention: The attention module.
            normed: Tokens as the attention module gets them, `(G, N, D)`.
            num_queries: Number M of queries that are needed.

        Returns:
            `(G, heads, N, head_dim)` twice and `(G, heads, M, head_dim)`, None where M is 0.
        """
        raise NotImplementedError

    def query_key_weights(self, attention: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """W_q and W_k, each `(D, D)` as `torch.nn.Linear` stores it."""
        raise NotImplementedError

    def width(self, attention: nn.Module) -> int:
        """Width D of the tokens."""
        raise NotImplementedError

    def hand_over(
        self, attention: nn.Module, keys_values: PromptKeysValues | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Puts keys and values on their way; returns the keyword arguments with which to call the block.

        Called again with None after the block has run.
        """
        raise NotImplementedError


class LinearProjections(AttentionAccess):
    """An attention module with one linear layer each for queries, keys and values.

    Args:
        query: Name of the layer that makes queries.
        key: Name of the layer that makes keys.
        value: Name of the layer that makes values.
        head_dim: Name of the attribute that holds the width of a head.
    """

    def __init__(self, query: str = "q_proj", key: str = "k_proj", value: str = "v_proj", head_dim: str = "head_dim"):
        self.query, self.key, self.value, self.head_dim = query, key, value, head_dim

    def project(
        self, attention: nn.Module, normed: torch.Tensor, num_queries: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        head_dim = getattr(attention, self.head_dim)

        def heads(projection: str, tokens: torch.Tensor) -> torch.Tensor:
            return getattr(attention, projection)(tokens).unflatten(-1, (-1, head_dim)).transpose(1, 2)

        query = heads(self.query, normed[:, :num_queries]) if num_queries else None
        return heads(self.key, normed), heads(self.value, normed), query

    def query_key_weights(self, attention: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_weight(getattr(attention, self.query)), linear_weight(getattr(attention, self.key))

    def width(self, attention: nn.Module) -> int:
        return getattr(attention, self.query).in_features


class StateOnModule(AttentionAccess):
    """Hands over on the attention module itself, of which a subclass of ours takes the place while it is open.

    For families whose block takes no keyword arguments. Such a block must not be checkpointed below the prompts:
    what is computed anew would look for them when they are gone.
    """

    def prompted_class(self, attention: nn.Module) -> type[nn.Module]:
        """The subclass of the attention module's class that reads what was handed over.

        Its `unprompted_class` is the class whose place it takes.
        """
        raise NotImplementedError

    def open(self, attention: nn.Module) -> None:
        if not self.is_open(attention):
            attention.__class__ = self.prompted_class(attention)
            setattr(attention, self.attribute, None)

    def close(self, attention: nn.Module) -> None:
        if self.is_open(attention):
            attention.__class__ = type(attention).unprompted_class
            delattr(attention, self.attribute)

    def is_open(self, attention: nn.Module) -> bool:
        return self.attribute in vars(attention)

    def hand_over(
        self, attention: nn.Module, keys_values: PromptKeysValues | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        setattr(attention, self.attribute, keys_values)
        return kwargs
