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
        accumulation: With `online=False`, calls of `add` that make up one batch, as in training with accumulated
            gradients.
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
        accumulation: int = 1,
    ):
        self.blocks = [block for block in blocks if block.index in prompts]
        self.prompts = prompts
        self.head = [parameter for parameter in head if parameter.requires_grad]
        self.kind = kind
        self.clip = clip
        self.online = online
        self.mean = mean
        self.num_processes = num_processes
        self.accumulation = accumulation
        self.num_rows = len(next(iter(prompts.values())).serves)
        self._watched: list[tuple[PromptedBlock, torch.Tensor, torch.Tensor]] = []
        self._observers: list[Any] = []
        # Numbers of the prompts that serve a block, made once for as long as none moves.
        self._ids: dict[int, tuple[list[tuple[int, int]], torch.Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets the batches so far."""
        device = next(iter(self.prompts.values())).prompt_embeddings.device
        # On the device, so that training need not wait for it; not every one knows float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # The last two numbers are the loss and the number of batches.
        self._total = torch.zeros(len(self.prompts) * self.num_rows + 2, dtype=dtype, device=device)
        self._begin_batch()

    def _begin_batch(self) -> None:
        self._batch = torch.zeros_like(self._total)
        self._head_gradients: list[torch.Tensor] = []
        self._num_parts = self._num_images = 0
        self._has_heard = False

    @property
    def num_batches(self) -> int:
        """Number of batches that scores have been added of."""
        return int(self._total[-1])

    def __enter__(self) -> ScoreRecorder:
        for block in self.blocks:
            if block.insertion != "keys_values":
                raise ValueError(
                    f"Found insertion={block.insertion!r}. Scores are taken from the keys and values of prompts. Call "
                    "`model.base_model.set_insertion('keys_values')` first."
                )
        # Scores may be taken in a pass of their own while training is listened to.
        self._observers = [block.observer for block in self.blocks]
        for block in self.blocks:
            block.observer = self
        return self

    def __exit__(self, *error: object) -> None:
        for block, observer in zip(self.blocks, self._observers, strict=True):
            block.observer = observer

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
        with torch.enable_grad():
            loss = loss * batch_size  # parts of a batch may have different sizes
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
            head = [g for g in gradients[len(tensors) :] if g is not None]
            before = self._head_gradients or [0] * len(head)
            self._head_gradients = [total + gradient for total, gradient in zip(before, head, strict=True)]
        self._watched.clear()
        self._batch[-2] += loss.detach()
        self._num_images += batch_size
        self._num_parts += 1
        if self._num_parts == self.accumulation:
            self._finish_parts()

    def _finish_parts(self) -> None:
        self._batch /= self._num_images
        head = [gradient / self._num_images for gradient in self._head_gradients]
        if self.mean is not None and self.clip is not None:
            head = [self.mean(gradient) for gradient in head]
        self._finish_batch(self._num_images, head)

    def collect(self, loss: torch.Tensor, batch_size: int, loss_scale: float = 1.0) -> None:
        """Adds the scores of one training step, `online=True`, from the gradients that its backward passes have left.

        A step whose gradients are not finite, as with float16 while its scale is too large, is left out.

        Args:
            loss: Mean loss over the step's batch; with several processes, the number whose mean over them it is.
            batch_size: Number of images of this process.
            loss_scale: What the loss was multiplied by before the backward passes, as with float16.
        """
        head = [parameter.grad for parameter in self.head if parameter.grad is not None]
        if self.kind != "norm" and not self._has_heard:
            raise ValueError(
                "Found no gradients of prompts since the last step. Online scores are heard in backward passes: run "
                "forward and backward pass within the recorder's `with` block, with the adapter active."
            )
        if self.kind != "norm" and self.clip is not None and self.head and not head:
            raise ValueError(
                "Found no gradients of the head. Clipping scores needs them: call `collect` after the backward pass "
                "and before `zero_grad`. Where they are kept elsewhere, as by DeepSpeed, set score_clip to null."
            )
        self._batch /= loss_scale
        self._batch[-2] = loss.detach()
        self._finish_batch(batch_size, [_whole(gradient) / loss_scale for gradient in head])

    @torch.no_grad()
    def _add_block(self, block: PromptedBlock, prompts: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds the scores of a block's prompts to those of the batch, from the gradient to what was watched."""
        rows = self.prompts[block.index].rows()
        if self._ids.get(block.index, (None,))[0] != rows:
            ids = torch.tensor([owner * self.num_rows + row for owner, row in rows], device=self._total.device)
            self._ids[block.index] = (rows, ids)
        scores = self._block_scores(block, prompts, gradient)
        self._batch.index_add_(0, self._ids[block.index][1], scores.to(self._batch))
        self._has_heard = True

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
    def _finish_batch(self, batch_size: int, head: list[torch.Tensor]) -> None:
        """Clips the scores of a batch together with the gradients of the head, and adds them to the total."""
        batch = self._batch
        batch[-2] /= batch_size * self.num_processes
        batch[-1] = 1
        if self.mean is not None:
            batch = self.mean(batch)
        is_finite = batch.isfinite().all()
        if self.clip is not None and self.kind != "norm":
            scores = batch[:-2]
            squares = scores.square().sum() + sum(g.to(scores.dtype).square().sum() for g in head)
            is_finite &= squares.isfinite()
            scores *= (self.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        # Decided on the device, which need not be waited for.
        self._total += torch.where(is_finite, batch, 0.0)
        self._begin_batch()

    def result(self) -> PromptScores:
        """The scores, averaged over the batches."""
        if self._num_parts:
            self._finish_parts()
        total = self._total.cpu().double()
        if not total[-1]:
            raise ValueError(
                "Found no batches with a finite loss. Scores need at least one. Pass a dataloader that is not empty."
            )
        loss = total[-2].item()
        if self.kind != "norm":
            return PromptScores(total[:-2] / total[-1], loss, online=self.online)
        pool = list(self.prompts.values())
        norms = torch.cat([_whole(p.prompt_embeddings.detach()).double().norm(dim=1).cpu() for p in pool])
        served = torch.tensor([block for prompts in pool for block in prompts.serves])
        sums = torch.zeros(int(served.max()) + 1, dtype=torch.float64).index_add_(0, served, norms)
        return PromptScores(-norms / sums[served], loss, float("-inf"), self.online)

    def state_dict(self) -> dict[str, Any]:
        """The batches so far."""
        return {"total": self._total.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self._total.copy_(state["total"])


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of which FSDP gave each process a share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
