"""Scores of how idle prompts are, from a pass of their own or from the training's own backward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..base import PromptedBlock
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
        online: Whether the pass was training, so that there has been one round of training more than moves were
            thought of.
    """

    values: torch.Tensor
    loss: float
    threshold: float = 0.0
    online: bool = False


class ScoreRecorder:
    """Watches prompts on their way into attention and turns gradients into idleness scores.

    A context manager. Within it, `online=False`: run the model on a batch and give its loss to `add`, which takes the
    gradients it needs and leaves every `.grad` alone. `online=True`: train as usual, and call `collect` after the
    backward passes of a step, before gradients are clipped or set to zero; no pass is spent on scores.

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
        online: Whether gradients come from the training's own backward passes.
        mean: Averages a float64 tensor over processes that share a batch, such as
            `lambda tensor: accelerate.utils.reduce(tensor, "mean")`; None for one process.
        num_processes: Number of processes that `mean` averages over.
    """

    def __init__(
        self,
        blocks: list[PromptedBlock],
        prompts: dict[int, PROVPTPrompts],
        head: list[nn.Parameter],
        kind: Literal["gate", "attention", "norm"],
        clip: float | None,
        online: bool = False,
        mean: Callable[[torch.Tensor], torch.Tensor] | None = None,
        num_processes: int = 1,
    ):
        self.blocks = [block for block in blocks if block.index in prompts]
        self.prompts = prompts
        self.head = [parameter for parameter in head if parameter.requires_grad]
        self.kind = kind
        self.clip = clip
        self.online = online
        self.mean = mean
        self.num_processes = num_processes
        self.num_rows = len(next(iter(prompts.values())).serves)
        self._watched: list[tuple[PromptedBlock, torch.Tensor, torch.Tensor]] = []
        # Numbers of the prompts that serve a block, made once for as long as none moves.
        self._ids: dict[int, tuple[list[tuple[int, int]], torch.Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets the batches so far."""
        device = next(iter(self.prompts.values())).prompt_embeddings.device
        # On the device, so that training need not wait for it; not every one knows float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # The last number is the loss.
        self._total = torch.zeros(len(self.prompts) * self.num_rows + 1, dtype=dtype, device=device)
        self._step = self._total.clone()
        self.num_batches = 0

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
        if self.kind == "norm" or (self.online and not torch.is_grad_enabled()):
            return bias
        watched = normed
        if self.kind == "attention":
            watched = normed.new_zeros(1, 1, 1, normed.shape[1], requires_grad=True)
            bias = watched if bias is None else bias + watched
        if not self.online:
            self._watched.append((block, watched, prompts.detach()))
        elif watched.requires_grad:
            # What is checkpointed runs, and comes here, twice; gradients pass only one of both.
            prompts = prompts.detach()
            watched.register_hook(lambda gradient: self._add_block(block, prompts, gradient))
        return bias

    def add(self, loss: torch.Tensor, batch_size: int, retain_graph: bool = False) -> None:
        """Adds the scores of one batch, `online=False`.

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
            for (block, _, prompts), gradient in zip(watched, gradients, strict=False):
                if gradient is not None:
                    self._add_block(block, prompts, gradient)
            head = [gradient for gradient in gradients[len(tensors) :] if gradient is not None]
            if self.mean is not None and self.clip is not None:
                head = [self.mean(gradient) for gradient in head]
            self._finish_batch(loss, batch_size, head)
        else:
            self._finish_batch(loss, batch_size, [])
        self._watched.clear()

    def collect(self, loss: torch.Tensor, batch_size: int, loss_scale: float = 1.0) -> None:
        """Adds the scores of one training step, `online=True`, from the gradients that its backward passes have left.

        Args:
            loss: Mean loss over the step's batch; with several processes, the number whose mean over them it is.
            batch_size: Number of images of this process.
            loss_scale: What the loss was multiplied by before the backward passes, as with float16.
        """
        head = [parameter.grad for parameter in self.head if parameter.grad is not None]
        if self.kind != "norm" and self.clip is not None and self.head and not head:
            raise ValueError(
                "Found no gradients of the head. Clipping scores needs them: call `collect` after the backward pass "
                "and before `zero_grad`. Where they are kept elsewhere, as by DeepSpeed, set score_clip to null."
            )
        self._step /= loss_scale
        head = [_whole(gradient) / loss_scale for gradient in head]
        self._finish_batch(loss, batch_size, head)

    @torch.no_grad()
    def _add_block(self, block: PromptedBlock, prompts: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds the scores of a block's prompts to those of the batch, from the gradient to what was watched."""
        rows = self.prompts[block.index].rows()
        if self._ids.get(block.index, (None,))[0] != rows:
            ids = torch.tensor([owner * self.num_rows + row for owner, row in rows], device=self._step.device)
            self._ids[block.index] = (rows, ids)
        scores = self._block_scores(block, prompts, gradient)
        self._step.index_add_(0, self._ids[block.index][1], scores.to(self._step))

    def _block_scores(self, block: PromptedBlock, prompts: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Scores `(N,)` of a block's prompts from the gradient to what was watched."""
        if self.kind == "attention":
            return gradient.flatten()
        dtype = torch.promote_types(prompts.dtype, torch.float32)
        norm, prompts, gradient = block.norm, prompts.to(dtype), gradient.to(dtype)
        if norm is None:  # nothing cancels: the gate acts on keys and values as they are
            return (gradient * prompts).sum(dim=(0, 2))
        variance, mean = torch.var_mean(prompts, dim=-1, correction=0, keepdim=True)
        normalised = (prompts - mean) * (variance + norm.eps).rsqrt()
        inner = (gradient * _whole(norm.weight).to(dtype) * normalised).sum(dim=-1)
        return (inner * (norm.eps / (variance[..., 0] + norm.eps))).sum(dim=0)

    @torch.no_grad()
    def _finish_batch(self, loss: torch.Tensor, batch_size: int, head: list[torch.Tensor]) -> None:
        """Clips the scores of a batch together with the gradients of the head, and adds them to the total."""
        self._step[-1] = loss.detach() / (batch_size * self.num_processes)
        if self.mean is not None:
            self._step = self.mean(self._step)
        if self.clip is not None and self.kind != "norm":
            scores = self._step[:-1]
            squares = scores.square().sum() + sum(g.to(scores.dtype).square().sum() for g in head)
            scores *= (self.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        self._total += self._step
        self._step = torch.zeros_like(self._step)
        self.num_batches += 1

    def result(self) -> PromptScores:
        """The scores, averaged over the batches."""
        if not self.num_batches:
            raise ValueError("Found no batches. Scores need at least one. Pass a dataloader that is not empty.")
        total = self._total.cpu().double()
        if self.kind != "norm":
            return PromptScores(total[:-1] / self.num_batches, total[-1].item(), online=self.online)
        pool = list(self.prompts.values())
        norms = torch.cat([_whole(p.prompt_embeddings.detach()).double().norm(dim=1).cpu() for p in pool])
        served = torch.tensor([block for prompts in pool for block in prompts.serves])
        sums = torch.zeros(int(served.max()) + 1, dtype=torch.float64).index_add_(0, served, norms)
        return PromptScores(-norms / sums[served], total[-1].item(), float("-inf"), self.online)

    def state_dict(self) -> dict[str, Any]:
        """The batches so far."""
        return {"total": self._total.cpu(), "num_batches": self.num_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self._total.copy_(state["total"])
        self.num_batches = state["num_batches"]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of which FSDP gave each process a share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
