"""Config of VPT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..base import PromptConfig


@dataclass
class VPTConfig(PromptConfig):
    """Adapts a frozen ViT with a table of learned prompts: visual prompt tuning (VPT, arXiv 2203.12119).

    P_i = dropout(E_i), or dropout(E_i·Aᵀ + a) with a projection; E `(L, N, d)` is learned, deep with one table for
    each block (VPT-Deep, eq. 7), shallow with one before block 0 (VPT-Shallow, eq. 4 to 6).

    Tuned numbers: L·N·D (shallow: N·D); with a projection L·N·d + d·D + D. ViT-B/16, N=50, deep: 460,800.

    Args:
        projection_dim: Width d of the table; one linear layer with bias, shared by all blocks of the same width D
            (in a ViT, all blocks), takes it to that width. `None` (the default) for a table of width D.

    See `PromptConfig` for the other arguments. The paper searches `num_virtual_tokens` in {1, 5, 10, 50, 100, 200}
    for each data set and uses `prompt_dropout=0.1`.

    Example:
        >>> model = get_peft_model(vit, VPTConfig(num_virtual_tokens=50))
        >>> model.print_trainable_parameters()
    """

    method_name: ClassVar[str] = "HFVPT_VPT"
    title: ClassVar[str] = "VPT"
    paper: ClassVar[str] = "2203.12119"

    projection_dim: int | None = field(default=None, metadata={"help": "Width of the table before its projection."})

    def __post_init__(self):
        super().__post_init__()
        self.check_int("projection_dim", low=1, optional=True)
