"""The tuner of PRO-VPT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..base import BlockLayout, PromptTuner
from .allocation import AllocationPolicy, PPOAllocation, RandomAllocation, ThompsonAllocation
from .config import PROVPTConfig
from .prompts import PROVPTPrompts
from .relocation import Relocation, Relocator
from .scores import PromptScores, ScoreRecorder


POLICIES: dict[str, Callable[[int, int], AllocationPolicy]] = {
    "ppo": PPOAllocation,
    "thompson": ThompsonAllocation,
    "random": RandomAllocation,
}


class PROVPTModel(PromptTuner):
    """A frozen vision transformer with a pool of prompts that move between its blocks. See `PROVPTConfig`."""

    prefix = "hfvpt_provpt_"
    config_cls = PROVPTConfig

    @classmethod
    def make_prompts(cls, config: PROVPTConfig, layout: BlockLayout, peers: list[PROVPTPrompts]) -> PROVPTPrompts:
        return PROVPTPrompts(config, layout, peers)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        # A later adapter of the same name may have another pool.
        self.forget_relocator(adapter_name)

    def distribution(self, adapter_name: str | None = None) -> dict[int, int]:
        """Number of prompts that serve each block now, by block index."""
        return {index: len(prompts.rows()) for index, prompts in self.prompts(adapter_name).items()}

    def record_scores(self, adapter_name: str | None = None, **options: Any) -> ScoreRecorder:
        """A recorder of idleness scores for a loop of one's own, with its `options`. See `ScoreRecorder`.

        Example:
            >>> with model.base_model.record_scores(online=True) as recorder:
            ...     for batch in dataloader:
            ...         loss = model(**batch).loss
            ...         loss.backward()
            ...         recorder.collect(loss, len(batch["pixel_values"]))
            ...         optimizer.step(), optimizer.zero_grad()
            >>> model.base_model.relocate(recorder.result())
        """
        name = adapter_name or self.active_adapters[0]
        if self.active_adapters != [name] or any(block.disable_adapters for block in self.prompted_blocks()):
            raise ValueError(
                f"Found the adapters {self.active_adapters} active, some perhaps disabled, and a request for the "
                f"scores of {name!r}. Scores come from forward passes with that adapter alone. Call "
                f"`model.set_adapter({name!r})` first, outside of `disable_adapter()`."
            )
        config = self.peft_config[name]
        wrappers = [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        head = [parameter for wrapper in wrappers for parameter in wrapper.parameters()]
        blocks, prompts = self.prompted_blocks(), self.prompts(name)
        return ScoreRecorder(blocks, prompts, head, config.score, config.score_clip, **options)

    def score_prompts(
        self,
        batches: Iterable[Mapping[str, Any]],
        adapter_name: str | None = None,
        compute_loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
        **options: Any,
    ) -> PromptScores:
        """Scores how idle each prompt is, in one pass over the training data that updates nothing.

        Args:
            batches: Batches as the model takes them, with `pixel_values` and `labels`; moved to the model's device.
            adapter_name: The adapter; the active one if None.
            compute_loss: Mean loss of a batch from the model and the batch; the model's own loss if None.
            options: See `ScoreRecorder`: `mean` and `num_processes` where several processes share each batch,
                `accumulation` where several batches make one.
        """
        device = next(self.model.parameters()).device
        with self.record_scores(adapter_name, **options) as recorder:
            for batch in batches:
                batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                with torch.enable_grad():
                    loss = self.model(**batch).loss if compute_loss is None else compute_loss(self.model, batch)
                recorder.add(loss, len(batch["pixel_values"]))
        return recorder.result()

    def relocate(self, scores: PromptScores, adapter_name: str | None = None) -> Relocation:
        """Moves the most idle prompt to the block that the adapter's policy names; to be called before each epoch.

        Args:
            scores: The result of `score_prompts` or of a recorder, for the present weights or from the training that
                led to them.
            adapter_name: The adapter; the active one if None.

        Returns:
            What was done. The policy and what it learned stay with this tuner, in `relocator`.
        """
        return self.relocator(adapter_name).step(self.pool(adapter_name), scores)

    def pool(self, adapter_name: str | None = None) -> list[PROVPTPrompts]:
        """An adapter's prompts, in the order in which they are scored."""
        return list(self.prompts(adapter_name).values())

    def forget_relocator(self, adapter_name: str | None = None) -> None:
        """Begins anew with an adapter's moves: its prompts stay where they are, its policy has learned nothing."""
        self.__dict__.get("_relocators", {}).pop(adapter_name or self.active_adapters[0], None)

    def relocator(self, adapter_name: str | None = None) -> Relocator:
        """What decides about an adapter's moves, with its policy; made at first use, and not part of the adapter."""
        name = adapter_name or self.active_adapters[0]
        relocators: dict[str, Relocator] = self.__dict__.setdefault("_relocators", {})
        if name not in relocators:
            config = self.peft_config[name]
            policy = POLICIES[config.allocation](len(self.pool(name)), config.allocation_seed)
            relocators[name] = Relocator(policy, config.relocation_warmup, config.relocation_scale)
        return relocators[name]
