"""PRO-VPT's relocation while training, as a `Trainer` callback."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list, extract_model_from_parallel, reduce
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuners.provpt import PromptScores, PROVPTConfig, PROVPTModel, ScoreRecorder
from .checkpoints import write_whole
from .trainer import ImageClassificationTrainer


RELOCATIONS_FILE = "relocations.json"


class RelocationCallback(TrainerCallback):
    """Moves one prompt at most before each epoch, or every `relocation_steps`; the work is that of `PROVPTModel`.

    With `PROVPTConfig(scoring="separate")` scores come from a pass of their own over the training data, as published
    (PRO-VPT, arXiv 2503.06901), so that an epoch costs about two. With `"online"` they come from the backward passes
    of the epoch before, which needs an `ImageClassificationTrainer`. Scores are averaged over processes, one process
    decides, all move.

    What was done is logged as all else is, under names that begin with `relocation`, and `relocations.json` in the
    output folder holds every round: which prompt left which block for which, its score, the sum of the scores of each
    block, the number of prompts in each block afterwards, reward, and the policy's loss.

    An `ImageClassificationTrainer` keeps the policy, and the reward that is still to come, in its checkpoints. With
    another `Trainer` a resumed run moves prompts as a policy that has learned nothing would.

    Args:
        trainer: The trainer that the callback is added to.

    Example:
        >>> trainer = ImageClassificationTrainer(model, arguments, train_dataset=images)
        >>> trainer.add_callback(RelocationCallback(trainer))
    """

    def __init__(self, trainer: transformers.Trainer):
        self.trainer = trainer
        self.rounds: list[dict[str, Any]] = []
        # Epoch (or step, with `relocation_steps`) before which moves were last thought of: a run that goes on from
        # the middle of an epoch begins it a second time.
        self.last_round = -1
        self._recorder: ScoreRecorder | None = None
        self._step_images = 0
        self._step_loss: torch.Tensor | float = 0.0
        self._restored: dict[str, Any] | None = None

    @property
    def tuner(self) -> PROVPTModel:
        return extract_model_from_parallel(self.trainer.model).base_model

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        tuner = self.tuner
        self._config = self._check(tuner)
        self._step_images, self._step_loss = 0, 0.0
        if self._config.scoring == "online":
            self._recorder = tuner.record_scores(online=True, **self._sharing()).__enter__()
        if self._restored is None:
            self.rounds, self.last_round = [], -1
            tuner.forget_relocator()
        else:
            tuner.relocator().load_state_dict(self._restored["relocator"])
            if self._recorder is not None and self._restored["recorder"] is not None:
                self._recorder.load_state_dict(self._restored["recorder"])
            self._restored = None
        if getattr(args, "fixes_lengths", False):
            # A prompt that is shorter for a step would have a gradient as much larger, in the optimizer's state too.
            tuner.relocator().scale = 1.0

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.close()

    def close(self) -> None:
        """Stops listening. `ImageClassificationTrainer` calls it however training ends."""
        if self._recorder is not None:
            self._recorder.__exit__()
            self._recorder = None

    def _check(self, tuner: Any) -> PROVPTConfig:
        if not isinstance(tuner, PROVPTModel):
            raise ValueError(
                f"Found a {type(tuner).__name__}. Relocation moves the prompts of PRO-VPT: train an adapter made with "
                "PROVPTConfig, or leave RelocationCallback out."
            )
        config = tuner.peft_config[tuner.active_adapters[0]]
        if config.scoring == "online" and not isinstance(self.trainer, ImageClassificationTrainer):
            raise ValueError(
                f"Found scoring='online' and a {type(self.trainer).__name__}. Online scores need a trainer that tells "
                "of each backward pass: use hf_vpt.training.ImageClassificationTrainer, or scoring='separate'."
            )
        return config

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        epoch = int(state.epoch or 0)
        if self._config.relocation_steps is not None or epoch <= self.last_round:
            return
        self.last_round = epoch
        if self._config.scoring == "separate":
            self._relocate(self._score(train_dataloader, epoch))
        elif self._recorder.num_batches:
            self._relocate(self._recorder.result())

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        steps = self._config.relocation_steps
        if steps is None or state.global_step % steps or state.global_step <= max(self.last_round, 0):
            return
        if not self._recorder.num_batches:
            return  # gone on from a checkpoint of another trainer
        self.last_round = state.global_step
        self._relocate(self._recorder.result())

    def on_backward(self, loss: torch.Tensor, num_images: int) -> None:
        """To be called by the trainer after each backward pass, before gradients are clipped.

        Args:
            loss: The pass's share in the loss of the step; with several processes, the number whose mean it is.
            num_images: Number of images of this process in the pass.
        """
        if self._recorder is None:
            return
        self._step_loss = self._step_loss + loss
        self._step_images += num_images
        accelerator = self.trainer.accelerator
        if accelerator.sync_gradients:
            scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
            self._recorder.collect(self._step_loss, self._step_images, scale)
            self._step_loss, self._step_images = 0.0, 0

    def _sharing(self) -> dict[str, Any]:
        """What a recorder is told about processes."""
        processes = self.trainer.args.world_size
        return {"mean": partial(reduce, reduction="mean"), "num_processes": processes} if processes > 1 else {}

    def _score(self, dataloader: DataLoader, epoch: int) -> PromptScores:
        if hasattr(dataloader, "set_epoch"):
            dataloader.set_epoch(epoch)  # a run that has just gone on would show the images of its first epoch
        model, tuner, args = self.trainer.model, self.tuner, self.trainer.args
        # Its draws are the pass's own, so that the epoch's are the same ones whether the run was interrupted or not.
        with (
            torch.random.fork_rng([args.device] if args.device.type == "cuda" else []),
            self.trainer.accelerator.autocast(),
        ):
            entropy = (args.seed, epoch, args.process_index)
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
            tuner.train()
            if isinstance(model, FSDPModule):
                model.unshard()  # the head, whose gradients count: those of its shares are not in the graph
            accumulation = args.gradient_accumulation_steps
            return tuner.score_prompts(
                dataloader, compute_loss=self._loss, accumulation=accumulation, **self._sharing()
            )

    def _loss(self, _: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The loss that is trained on: prompt dropout, mixed images and label smoothing included."""
        trainer, batch = self.trainer, dict(batch)
        # By way of the whole model, for which FSDP gathers the parameters.
        if trainer.compute_loss_func is None:
            return trainer.model(**batch).loss
        labels = batch.pop("labels")
        num_items = labels.numel()  # as Trainer counts them
        if getattr(trainer, "mixer", None) is not None:
            batch["pixel_values"], labels = trainer.mixer(batch["pixel_values"], labels)
        return trainer.compute_loss_func(trainer.model(**batch), labels, num_items_in_batch=num_items)

    def _relocate(self, scores: PromptScores) -> None:
        tuner, state = self.tuner, self.trainer.state
        pool, relocator = tuner.pool(), tuner.relocator()
        # One process decides, because rounding may differ between machines.
        decision = [relocator.decide(pool, scores) if self.trainer.args.process_index == 0 else None]
        (move,) = broadcast_object_list(decision)
        relocator.apply(pool, move)
        if self._recorder is not None:
            self._recorder.reset()
        self.rounds.append({"epoch": state.epoch or 0, "step": state.global_step, **asdict(move)})
        if self.trainer.is_world_process_zero():
            folder = Path(self.trainer.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / RELOCATIONS_FILE, json.dumps(self.rounds, indent=1) + "\n")
        entry = {
            "relocation_prompt": move.prompt,
            "relocation_source": move.source,
            # Reporters know numbers alone; a prompt that stays goes from its block to its block.
            "relocation_target": move.source if move.target is None else move.target,
            "relocation_score": move.score,
            "relocation_reward": move.reward,
            "relocation_policy_loss": move.policy_loss,
        }
        for prompts, count, score in zip(pool, move.distribution, move.block_scores, strict=True):
            entry[f"relocation_prompts_in_block_{prompts.index}"] = count
            entry[f"relocation_score_of_block_{prompts.index}"] = score
        self.trainer.log({name: value for name, value in entry.items() if value is not None})

    def state_dict(self) -> dict[str, Any]:
        """What the policy has learned, the reward that is still to come, and the scores of an epoch half trained."""
        return {
            "relocator": self.tuner.relocator().state_dict(),
            "recorder": None if self._recorder is None else self._recorder.state_dict(),
            "rounds": self.rounds,
            "last_round": self.last_round,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """To be called before training begins, which goes on from there."""
        self.rounds, self.last_round = list(state["rounds"]), state["last_round"]
        self._restored = state
