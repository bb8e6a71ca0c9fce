"""The moves that follow from idleness scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .allocation import AllocationPolicy, policy_state
from .prompts import PROVPTPrompts
from .scores import PromptScores


@dataclass(frozen=True)
class Relocation:
    """What one call of `relocate` did.

    Attributes:
        prompt: Number of the prompt that was to move: the one with the largest score, unless the policy chose it.
        score: Its score.
        source: Block that it served.
        target: Block that it serves now; None where no move was tried (warm-up, or no score above the threshold).
        reward: Reward of the move before; None where there was none.
        policy_loss: Loss of the policy's update; None where it did not learn now.
        distribution: Number of prompts in each block of the pool afterwards.
        block_scores: Sum of the scores of the prompts in each block of the pool before.
        loss: `PromptScores.loss`, in which rewards are counted.
    """

    prompt: int
    score: float
    source: int
    target: int | None
    reward: float | None
    policy_loss: float | None
    distribution: list[int]
    block_scores: list[float]
    loss: float


class Relocator:
    """Decides which prompts move between blocks, one at most in each epoch (PRO-VPT, arXiv 2503.06901).

    Args:
        policy: Names the block for a prompt.
        warmup: Epochs without moves at the start.
        scale: Factor on a prompt that moves.
    """

    def __init__(self, policy: AllocationPolicy, warmup: int, scale: float):
        self.policy = policy
        self.warmup = warmup
        self.scale = scale
        self.epoch = 0
        # Loss of the epoch in which the policy acted last and has not been rewarded for yet.
        self.loss_then: float | None = None

    def step(self, pool: list[PROVPTPrompts], scores: PromptScores) -> Relocation:
        """Rewards the last move, lets the policy learn, and makes the next move.

        Args:
            pool: The prompts that the scores belong to, in the pool's order.
            scores: Scores from a pass with the present weights, or from the training that led to them.
        """
        relocation = self.decide(pool, scores)
        self.apply(pool, relocation)
        return relocation

    def decide(self, pool: list[PROVPTPrompts], scores: PromptScores) -> Relocation:
        """As `step`, but moves nothing: of several processes one decides, and all `apply` it."""
        chooses = getattr(self.policy, "chooses_prompt", False)
        leaving = self.policy.leave(len(scores.values)) if chooses else int(scores.values.argmax())
        score = scores.values[leaving].item()
        reward = policy_loss = target = None
        if self.loss_then is not None:
            reward = self.loss_then - scores.loss - score
            policy_loss = self.policy.observe(reward)
            self.loss_then = None
        positions = {prompts.index: position for position, prompts in enumerate(pool)}
        owner, row = divmod(leaving, len(pool[0].serves))
        source = pool[owner].serves[row]
        blocks = torch.tensor([positions[block] for prompts in pool for block in prompts.serves])
        counts = torch.bincount(blocks, minlength=len(pool))
        if self.epoch + scores.online >= self.warmup and (chooses or score > scores.threshold):
            state = policy_state(scores.values, blocks, len(pool), leaving)
            allowed = [prompts.width == pool[owner].width for prompts in pool]
            # A policy of the user's own may not know of blocks into which a prompt does not fit.
            action = self.policy.act(state) if all(allowed) else self.policy.act(state, allowed)
            target = pool[action].index
            self.loss_then = scores.loss
            counts[positions[source]] -= 1
            counts[action] += 1
        self.epoch += 1
        sums = torch.zeros(len(pool), dtype=torch.float64).index_add_(0, blocks, scores.values.double())
        return Relocation(
            leaving, score, source, target, reward, policy_loss, counts.tolist(), sums.tolist(), scores.loss
        )

    def apply(self, pool: list[PROVPTPrompts], relocation: Relocation) -> None:
        """Makes the move that was decided, if there is one."""
        if relocation.target not in (None, relocation.source):
            owner, row = divmod(relocation.prompt, len(pool[0].serves))
            pool[owner].move(row, relocation.target, self.scale)

    def state_dict(self) -> dict[str, Any]:
        """What the relocator and its policy have learned, and the reward that is still to come."""
        return {"epoch": self.epoch, "loss_then": self.loss_then, "policy": self.policy.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.loss_then = state["epoch"], state["loss_then"]
        self.policy.load_state_dict(state["policy"])
