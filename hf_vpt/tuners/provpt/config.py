"""Config of PRO-VPT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..base import PromptConfig


Score = Literal["gate", "attention", "norm"]
Scoring = Literal["separate", "online"]
Allocation = Literal["ppo", "thompson", "random"]


@dataclass
class PROVPTConfig(PromptConfig):
    """Adapts a frozen ViT with prompts that move to the blocks that need them: PRO-VPT (arXiv 2503.06901).

    As VPT-Deep with N prompts in each of L blocks, but the N·L prompts are a pool: between epochs the prompt that the
    loss would miss least leaves its block for one that a learned policy names. `PROVPTModel.relocate` does that;
    without it this is VPT-Deep. Where stages have different widths (Swin), prompts move between blocks of equal width.

    Tuned numbers: L·N·D. ViT-B/16, N=20: 184,320.

    Args:
        num_virtual_tokens: Prompts N in a block at the start; published: 20.
        prompt_dropout: Published: 0.1.
        score: How idle a prompt is. `"gate"`, the published score, is the gradient of the loss to a factor 1 on the
            prompt. `"attention"` is the gradient to a bias 0 on the prompt's attention logits, the first-order change
            of the loss when the prompt is taken away, which is ours. `"norm"` is −‖P_k‖ over the sum in its block.
        scoring: Where scores come from while `hf_vpt.training` trains. `"separate"`, as published: a pass of its own
            over the training data before each epoch, which makes an epoch cost two. `"online"`, ours: the backward
            passes of the epoch before, at no extra pass.
        score_clip: Total norm to which each batch's gradients (scores and head) are clipped before they are averaged;
            published: 0.25. `None` for no clipping. Not used by `"norm"`.
        allocation: `"ppo"` learns with proximal policy optimisation which block should get the prompt, `"thompson"`
            keeps counts of successes and failures for each block, `"random"` moves any prompt to any block, for
            comparison.
        allocation_seed: Seed of the policy's initial weights and draws.
        relocation_warmup: Epochs to train before the first move; published: 1.
        relocation_steps: Optimizer steps between moves where there are no epochs, as in a stream of data; needs
            `scoring="online"`, and takes the place of epochs everywhere above. `None` for epochs.
        relocation_scale: Factor on a prompt that moves; published: 1e-3.

    See `PromptConfig` for the other arguments. Deep prompts only.

    Example:
        >>> model = get_peft_model(vit, PROVPTConfig(num_virtual_tokens=20))
        >>> for epoch in range(100):
        ...     model.base_model.relocate(model.base_model.score_prompts(dataloader))
        ...     train_one_epoch(model, dataloader)
    """

    method_name: ClassVar[str] = "HFVPT_PROVPT"
    title: ClassVar[str] = "PRO-VPT"
    paper: ClassVar[str] = "2503.06901"

    num_virtual_tokens: int = field(default=20, metadata={"help": "Number of prompts in a block at the start."})
    prompt_dropout: float = field(default=0.1, metadata={"help": "Dropout on the prompts while training."})
    score: Score = field(default="gate", metadata={"help": "How idle a prompt is."})
    scoring: Scoring = field(default="separate", metadata={"help": "Where scores come from: separate or online."})
    score_clip: float | None = field(default=0.25, metadata={"help": "Total norm that gradients are clipped to."})
    allocation: Allocation = field(default="ppo", metadata={"help": "Policy that names the block for a prompt."})
    allocation_seed: int = field(default=0, metadata={"help": "Seed of the policy."})
    relocation_warmup: int = field(default=1, metadata={"help": "Epochs before the first move."})
    relocation_steps: int | None = field(default=None, metadata={"help": "Steps between moves; None for epochs."})
    relocation_scale: float = field(default=1e-3, metadata={"help": "Factor on a prompt that moves."})

    def __post_init__(self):
        super().__post_init__()
        if not self.deep:
            self.fail("deep", "True: PRO-VPT distributes prompts over blocks")
        self.check_choice("score", Score)
        self.check_choice("scoring", Scoring)
        self.check_choice("allocation", Allocation)
        self.check_int("allocation_seed", low=0)
        self.check_int("relocation_warmup", low=0)
        if self.score_clip is not None:
            self.check_positive("score_clip")
        if self.relocation_steps is not None:
            self.check_int("relocation_steps", low=1)
            if self.scoring != "online":
                self.fail("relocation_steps", "None unless scoring is 'online': a pass of its own needs epochs")
        self.check_positive("relocation_scale")
