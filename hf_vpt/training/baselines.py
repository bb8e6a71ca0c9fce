"""Baselines of other families: all biases (BitFit), and low-rank updates of weights (LoRA)."""

from __future__ import annotations

import dataclasses

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from ..backbones import find_backbone


# Fields of PEFT's LoraConfig that are settings of a run.
LORA_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_rslora")

# What queries and values are made by, in the words of most families, of Swin-v2 and of timm.
PROJECTIONS = (("q_proj", "v_proj"), ("query", "value"), ("qkv",))


@dataclasses.dataclass
class BaselineLoraConfig(LoraConfig):
    """LoRA (arXiv 2106.09685) on the query and value projections of every block, before a backbone is known.

    A weight W of shape (D, D) becomes W + (lora_alpha / r) B A with A `(r, D)` and B `(D, r)`: 4 r D tuned numbers a
    block. What is saved is an ordinary `LoraConfig`, which PEFT loads without this package.

    Args:
        r: Rank of the updates, at least 1.
        lora_alpha: Their scale is `lora_alpha / r`.
        lora_dropout: Dropout in [0, 1) before them.
        use_rslora: Scale by `lora_alpha / sqrt(r)` instead.
    """

    def for_model(self, model: PreTrainedModel) -> LoraConfig:
        """Return the configuration for a classifier: its projections and its head are named.

        Where one layer makes queries, keys and values (timm's ViTs), it is updated as a whole.

        Raises:
            ValueError: The model's family has no record.
        """
        backbone = find_backbone(model)
        block = backbone.block_names[0]
        attention = model.get_submodule(f"{block}.{backbone.record.attention}")
        names = next(names for names in PROJECTIONS if hasattr(attention, names[0]))
        own = {name: getattr(self, name) for name in LORA_FIELDS}
        targets = [f"{block}.{backbone.record.attention}.{name}" for block in backbone.block_names for name in names]
        return LoraConfig(**own, target_modules=targets, modules_to_save=list(backbone.heads))


def is_bias(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a bias: added to activations, and called so by its last name.

    Tables of position biases, which are added to attention scores, are none.
    """
    return parameter.ndim == 1 and name.rpartition(".")[2].endswith("bias")
