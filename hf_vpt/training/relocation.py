"""PRO-VPT's relocation, once an epoch, as a `Trainer` callback."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, reduce
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RelocationCallback(TrainerCallback):
    """Moves one prompt at most before each epoch; the work is `PROVPTModel.score_prompts` and `relocate`.

    The scores come from a pass of their own over the training data, as published (PRO-VPT, arXiv 2503.06901), so that
    an epoch costs about two. What was moved stands in the trainer's log history under `relocation`.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        tuner = extract_model_from_parallel(model).base_model
        # Prompt dropout is on, as while training: the scores are those of the loss that is trained on.
        tuner.train()
        if isinstance(model, FSDPModule):
            model.unshard()  # the head, whose gradients count: those of its shares are not in the graph
        # By way of the whole model, for which FSDP gathers the parameters.
        scores = tuner.score_prompts(train_dataloader, compute_loss=lambda _, batch: model(**batch).loss)
        if args.world_size > 1:
            # Each process has seen its share of the data. All get the same scores, so all move the same prompt to the
            # same block: the policies start from one seed.
            shared = torch.cat([scores.values, torch.tensor([scores.loss], dtype=torch.float64)]).to(args.device)
            shared = reduce(shared, reduction="mean").cpu()
            # Batches of one step make one global batch: its mean loss, divided by all its images.
            scores = replace(scores, values=shared[:-1], loss=shared[-1].item() / args.world_size)
        move = tuner.relocate(scores)
        entry = {
            "relocation": "none" if move.target in (None, move.source) else f"{move.source} -> {move.target}",
            "relocation_prompt": move.prompt,
            "relocation_score": move.score,
            "relocation_reward": move.reward,
            "relocation_policy_loss": move.policy_loss,
            "relocation_distribution": move.distribution,
        }
        state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})
