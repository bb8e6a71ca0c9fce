"""Scores of how idle prompts are, and the moves that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..base import PromptedBlock
from .allocation import AllocationPolicy, policy_state
from .prompts import PROVPTPrompts


@dataclass(frozen=True)
class PromptScores:
    """Idleness scores of one pass over the training data.

    Attributes:
        values: Score of each of the K prompts of the pool, `(K,)` in float64; prompt k is row k mod N of the pool's
            block k div N. The larger, the more idle.
        loss: Σ over the batches of (mean loss of the batch ÷ its number of images).
        threshold: A prompt moves only with a score above this: 0 for gradients, where a positive one says that the
            loss falls without the prompt; −∞ for norms, which only rank prompts.
    """

    values: torch.Tensor
    loss: float
    threshold: float = 0.0


@dataclass(frozen=True)
class Relocation:
    """What one call of `relocate` did.

    Attributes:
        prompt: Number of the prompt with the largest score in the pool.
        score: Its score.
        source: Block that it served.
        target: Block that it serves now; None where no move was tried (warm-up, or no score above the threshold).
        reward: Reward of the move before; None where there was none.
        policy_loss: Loss of the policy's update; None where it did not learn now.
        distribution: Number of prompts in each block of the pool afterwards.
    """

    prompt: int
    score: float
    source: int
    target: int | None
    reward: float | None
    policy_loss: float | None
    distribution: list[int]


class ScoreRecorder:
    """Watches prompts on their way into attention and turns gradients into idleness scores.

    A context manager: within it, run the model on a batch and give its loss to `add`, which takes the gradients it
    needs and leaves every `.grad` alone.

    `"gate"`: with a factor g_k = 1 on prompt k, ∂loss/∂g_k = ⟨∂loss/∂P_k, P_k⟩. A deep prompt reaches the loss only
    through its block's LayerNorm, which all but cancels that product, so it is computed from the normalised prompt
    n_k, as ⟨∂loss/∂n_k, n_k⟩·eps/(var(P_k) + eps): the same number without the cancellation.

    `"attention"`: ∂loss/∂b_k for a bias b_k = 0 on the prompt's attention logits, all heads, queries and images.

    `"norm"`: −‖P_k‖ / Σ‖P‖ over the prompts of the block; no gradient.

    Args:
        blocks: The wrapped blocks.
        prompts: The adapter's prompts by block index.
        head: Parameters of the head, whose gradients count for the clipping.
        kind: See `PROVPTConfig.score`.
        clip: See `PROVPTConfig.score_clip`.
    """

    def __init__(
        self,
        blocks: list[PromptedBlock],
        prompts: dict[int, PROVPTPrompts],
        head: list[nn.Parameter],
        kind: Literal["gate", "attention", "norm"],
        clip: float | None,
    ):
        self.blocks = [block for block in blocks if block.index in prompts]
        self.prompts = prompts
        self.head = [parameter for parameter in head if parameter.requires_grad]
        self.kind = kind
        self.clip = clip
        self.num_rows = len(next(iter(prompts.values())).serves)
        self.total = torch.zeros(len(prompts) * self.num_rows, dtype=torch.float64)
        self.loss, self.num_batches = 0.0, 0
        self._watched: list[tuple[PromptedBlock, torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> ScoreRecorder:
        for block in self.blocks:
            if block.insertion != "keys_values":
                raise ValueError(
                    f"Found insertion={block.insertion!r}. Scores are taken from the keys and values of prompts. Call "
                    "`model.base_model.set_insertion('keys_values')` first."
                )
            block.observer = self
        return self

    def __exit__(self, *error: object) -> None:
        for block in self.blocks:
            block.observer = None

    def __call__(
        self, block: PromptedBlock, prompts: torch.Tensor, normed: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Called by a block with its prompts before and after the norm; returns the bias on their logits."""
        if self.kind == "gate":
            self._watched.append((block, normed, prompts.detach()))
        elif self.kind == "attention":
            zeros = normed.new_zeros(1, 1, 1, normed.shape[1], requires_grad=True)
            self._watched.append((block, zeros, prompts.detach()))
            return zeros if bias is None else bias + zeros
        return bias

    def add(self, loss: torch.Tensor, batch_size: int, retain_graph: bool = False) -> None:
        """Adds the scores of one batch.

        Args:
            loss: Mean loss over the batch, with its graph.
            batch_size: Number of images.
            retain_graph: Whether a backward pass will follow.
        """
        if self.kind != "norm":
            # What is checkpointed runs again, and shows its prompts again, in every backward pass: in this one, hence
            # the copy, and in one of the loop's own before, whose prompts have no part in this loss.
            watched = list(self._watched)
            tensors = [tensor for _, tensor, _ in watched]
            # A module to save beside the head may have no part in the loss.
            gradients = torch.autograd.grad(loss, tensors + self.head, retain_graph=retain_graph, allow_unused=True)
            scores = torch.zeros_like(self.total)
            for (block, _, prompts), gradient in zip(watched, gradients, strict=False):
                if gradient is None:
                    continue
                ids = torch.tensor([o * self.num_rows + r for o, r in self.prompts[block.index].rows()])
                scores[ids] += self._block_scores(block, prompts, gradient)
            if self.clip is not None:
                head = [gradient for gradient in gradients[len(tensors) :] if gradient is not None]
                squares = scores.square().sum() + sum(gradient.cpu().double().square().sum() for gradient in head)
                scores *= (self.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
            self.total += scores
        self._watched.clear()
        self.loss += loss.item() / batch_size
        self.num_batches += 1

    def _block_scores(self, block: PromptedBlock, prompts: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Scores `(N,)` of a block's prompts from the gradient to what was watched."""
        if self.kind == "attention":
            return gradient.cpu().double().flatten()
        # On the CPU, because not every accelerator knows float64.
        norm, prompts, gradient = block.norm, prompts.cpu().double(), gradient.cpu().double()
        if norm is None:  # nothing cancels: the gate acts on keys and values as they are
            return (gradient * prompts).sum(dim=(0, 2))
        variance = prompts.var(dim=-1, correction=0, keepdim=True)
        normalised = (prompts - prompts.mean(dim=-1, keepdim=True)) * (variance + norm.eps).rsqrt()
        # Of FSDP's shares each process has its own.
        weight = norm.weight.full_tensor() if isinstance(norm.weight, DTensor) else norm.weight
        inner = (gradient * weight.cpu().double() * normalised).sum(dim=-1)
        return (inner * (norm.eps / (variance[..., 0] + norm.eps))).sum(dim=0)

    def result(self) -> PromptScores:
        """The scores, averaged over the batches."""
        if not self.num_batches:
            raise ValueError("Found no batches. Scores need at least one. Pass a dataloader that is not empty.")
        if self.kind != "norm":
            return PromptScores(self.total / self.num_batches, self.loss)
        pool = list(self.prompts.values())
        norms = torch.cat([p.prompt_embeddings.detach().double().norm(dim=1).cpu() for p in pool])
        served = torch.tensor([block for prompts in pool for block in prompts.serves])
        sums = torch.zeros(int(served.max()) + 1, dtype=torch.float64).index_add_(0, served, norms)
        return PromptScores(-norms / sums[served], self.loss, threshold=float("-inf"))


class Relocator:
    """Moves prompts between blocks, one at most in each epoch (PRO-VPT, arXiv 2503.06901).

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
            scores: Scores from a pass with the present weights.
        """
        leaving = int(scores.values.argmax())
        highest = scores.values[leaving].item()
        reward = policy_loss = target = None
        if self.loss_then is not None:
            reward = self.loss_then - scores.loss - highest
            policy_loss = self.policy.observe(reward)
            self.loss_then = None
        positions = {prompts.index: position for position, prompts in enumerate(pool)}
        owner, row = divmod(leaving, len(pool[0].serves))
        source = pool[owner].serves[row]
        if self.epoch >= self.warmup and highest > scores.threshold:
            blocks = torch.tensor([positions[block] for prompts in pool for block in prompts.serves])
            state = policy_state(scores.values, blocks, len(pool), leaving)
            allowed = [prompts.width == pool[owner].width for prompts in pool]
            # A policy of the user's own may not know of blocks into which a prompt does not fit.
            action = self.policy.act(state) if all(allowed) else self.policy.act(state, allowed)
            target = pool[action].index
            self.loss_then = scores.loss
            if target != source:
                pool[owner].move(row, target, self.scale)
        self.epoch += 1
        distribution = [len(prompts.rows()) for prompts in pool]
        return Relocation(leaving, highest, source, target, reward, policy_loss, distribution)
