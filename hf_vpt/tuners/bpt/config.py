"""Config of BPT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..base import PromptConfig


Basis = Literal["bilinear", "fwhiten", "twhiten"]


@dataclass
class BPTConfig(PromptConfig):
    """Adapts a frozen ViT with prompts of low rank: bilinear prompt tuning (BPT, arXiv 2506.22908).

    P_i = dropout(F_i·W_iᵀ) with factor prompts F_i `(N, r)` and a basis W_i `(D, r)`: one pair for each block (deep)
    or one before block 0 (shallow). A whitened basis decorrelates prompts and patches under the block's attention.

    Tuned numbers: (N + D)·r for each pair; N·r with a fixed basis. ViT-B, shallow, N=100, r=75: 65,100.

    Args:
        num_virtual_tokens: Prompts N of a block; published: 50 deep, 100 shallow.
        rank: Rank r of the prompts of a block, from 1 to the width D; published: 50 deep, 25 to 100 shallow. More than
            N adds numbers to tune, but no rank.
        basis: `"bilinear"` learns F and W, W from Xavier's uniform distribution. `"fwhiten"` keeps W fixed at the
            whitening matrix of the block, `"twhiten"` starts there and learns it: for both, call
            `hf_vpt.initialize_whitening(model, dataloader)` once before training; `scripts/train.py` does.
        num_whitening_images: Training images from which a whitened basis is estimated in `scripts/train.py`, at least
            1; published: 100.

    F starts normal with standard deviation 0.02. See `PromptConfig` for the other arguments.

    Differs from the paper: at rank r < D the first r columns of the whitening matrix are kept; the published code
    picks r random entries for each row of W anew, which is no subset of columns.

    Example:
        >>> model = get_peft_model(vit, BPTConfig(num_virtual_tokens=50, rank=50, basis="twhiten"))
        >>> initialize_whitening(model, dataloader)
    """

    method_name: ClassVar[str] = "HFVPT_BPT"
    title: ClassVar[str] = "BPT"
    paper: ClassVar[str] = "2506.22908"

    num_virtual_tokens: int = field(default=50, metadata={"help": "Number of prompts in a block."})
    rank: int = field(default=50, metadata={"help": "Rank of the prompts of a block."})
    basis: Basis = field(default="bilinear", metadata={"help": "Learned, fixed whitened, or trained whitened basis."})
    num_whitening_images: int = field(default=100, metadata={"help": "Images that a whitened basis comes from."})

    def __post_init__(self):
        super().__post_init__()
        self.check_int("rank", low=1)
        self.check_int("num_whitening_images", low=1)
        self.check_choice("basis", Basis)
        if self.token_dim is not None:
            self.check_rank(self.token_dim)

    def check_rank(self, hidden_size: int) -> None:
        """Raises `ValueError` if the rank is larger than the width D of the tokens."""
        if self.rank > hidden_size:
            self.fail("rank", f"at most the width of the tokens, {hidden_size}")
