"""Prompts as extra keys and values of a block's own attention."""

from .access import AttentionAccess, LinearProjections, StateOnModule
from .interface import INSERTED, InsertedPrompts, InterfaceAttention
from .keys_values import BakedKeysValues, PromptKeysValues, insert_into_mask


__all__ = [
    "INSERTED",
    "AttentionAccess",
    "BakedKeysValues",
    "InsertedPrompts",
    "InterfaceAttention",
    "LinearProjections",
    "PromptKeysValues",
    "StateOnModule",
    "insert_into_mask",
]
