"""A `Trainer` whose loss, learning rates and checkpoints suit prompted image classifiers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from peft import PeftModel
from torch.nn import functional as F
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..hub import add_loading_lines
from .checkpoints import load_callbacks, mark_complete, mark_incomplete, save_callbacks
from .models import head_parameters, save_label_names
from .sharding import names_in_optimizer, replace_in_optimizer, shard_blocks
from .trouble import raise_if_not_finite


class ClassificationLoss:
    """Cross-entropy averaged over the images of one optimiser step, however they were spread.

    A model with several right classes an image (`problem_type="multi_label_classification"`, labels `(B, classes)` of
    0 and 1) gets binary cross-entropy averaged over images and classes.

    `Trainer` accumulates gradients over micro-batches and processes without dividing by their number when a loss
    function of one's own is used, so the sum over a micro-batch is divided by the images of the whole step. Then two
    accumulated batches of 4 give the gradient of one batch of 8.

    Args:
        label_smoothing: Share in [0, 1) of the target that is spread evenly over all classes while training;
            with several right classes, between 0 and 1 for each of them.
        problem_type: The model's `config.problem_type`.
    """

    def __init__(self, label_smoothing: float = 0.0, problem_type: str | None = None):
        self.label_smoothing = label_smoothing
        # Not by the labels: those of mixed images are `(B, classes)` too.
        self.is_multi_label = problem_type == "multi_label_classification"

    def __call__(self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        """Return the loss of logits `(B, classes)`; the mean over the batch where `num_items_in_batch` is None."""
        # Trainer counts items in evaluation too, which is to be without smoothing.
        smoothing = self.label_smoothing if torch.is_grad_enabled() and num_items_in_batch is not None else 0.0
        # In float32, because a softmax over many classes loses too much in half precision.
        logits = outputs["logits"].float()
        if self.is_multi_label:
            return self._multi_label_loss(logits, labels.float(), smoothing, num_items_in_batch)
        if num_items_in_batch is None:
            return F.cross_entropy(logits, labels)
        total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        # Several GPUs in one process share a batch, of which Trainer then tells each its part.
        return total / torch.as_tensor(num_items_in_batch).sum()

    @staticmethod
    def _multi_label_loss(logits, labels, smoothing, num_items_in_batch):
        if num_items_in_batch is None:
            return F.binary_cross_entropy_with_logits(logits, labels)
        labels = labels * (1 - smoothing) + smoothing / 2
        total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        # Trainer counts the numbers in the labels, one for each image and class.
        return total / torch.as_tensor(num_items_in_batch).sum()


class ImageClassificationTrainer(transformers.Trainer):
    """Trains a classifier, plain or adapted, as `hf_vpt.training.TrainingArguments` say.

    It differs from `transformers.Trainer` in nine ways: a loss that is not finite stops training; the loss is
    `ClassificationLoss`; learning rates may scale with the batch; the head may have a learning rate and weight decay
    of its own; of several equally good epochs the last is the best one; every checkpoint of an adapter holds the names
    of the classes (`id2label.json`); checkpoints of whole models are restored completely; checkpoints hold the state
    of callbacks that have a `state_dict`, and say when they are whole; and FSDP2 shares the backbone out by
    `hf_vpt.training.sharding`.

    Args:
        model: A model from `prepare_for_training`.
        args: Training settings.
        kwargs: Everything else that `transformers.Trainer` takes, except `compute_loss_func`.
    """

    def __init__(self, model=None, args=None, **kwargs):
        smoothing = args.label_smoothing_factor
        loss = ClassificationLoss(smoothing, getattr(getattr(model, "config", None), "problem_type", None))
        super().__init__(model=model, args=args, compute_loss_func=loss, **kwargs)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer_class, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer_class, {**kwargs, "lr": args.learning_rate * args.learning_rate_factor}

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, self.model.dtype)
        raise_if_not_finite(loss, self.state.global_step, max(rates), dtype)
        return loss

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        if is_new and self.is_fsdp_enabled:
            shard_blocks(self.model, self.accelerator)
        optimizer = super().create_optimizer(model)
        if is_new and (self.args.head_learning_rate is not None or self.args.head_weight_decay is not None):
            self._give_head_its_own_groups(optimizer)
        if is_new and self.is_fsdp_enabled:
            self._names_in_optimizer = names_in_optimizer(optimizer, self.model)
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        # The first thing that Trainer does once Accelerate has prepared the optimizer.
        if self.is_fsdp_enabled:
            replace_in_optimizer(self.optimizer, self.model, self._names_in_optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _give_head_its_own_groups(self, optimizer: torch.optim.Optimizer) -> None:
        model = self.accelerator.unwrap_model(self.model)
        head = {id(parameter) for parameter in head_parameters(model)}
        names = set(self.get_decay_parameter_names(model))
        decayed = {id(parameter) for name, parameter in model.named_parameters() if name in names}
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if id(parameter) in head]
            if not moved:
                continue
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
            own = {**group, "params": moved}
            if self.args.head_learning_rate is not None:
                own["lr"] = self.args.head_learning_rate * self.args.learning_rate_factor
            # Trainer's groups hold either only decayed parameters or none, such as biases; those stay without decay.
            if self.args.head_weight_decay is not None and id(moved[0]) in decayed:
                own["weight_decay"] = self.args.head_weight_decay
            optimizer.add_param_group(own)

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if self.args.should_save and isinstance(model, PeftModel):
            save_label_names(model, output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            mark_incomplete(folder)
        # Trainer deletes older checkpoints as part of saving; here only once the new one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process has written its random state
        if self.args.should_save:
            save_callbacks(self.callback_handler.callbacks, folder)
            mark_complete(folder)
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_callbacks(self.callback_handler.callbacks, checkpoint)

    def _determine_best_metric(self, metrics, trial) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        name = "eval_" + (self.args.metric_for_best_model or "").removeprefix("eval_")
        if not is_best and metrics.get(name) == self.state.best_metric:
            # A small validation set gives several epochs the same score. Trainer keeps the first of them, which has
            # learned least.
            self.state.best_global_step = self.state.global_step
            return True
        return is_best

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            add_loading_lines(self.args.output_dir)  # Trainer has written a card of its own over PEFT's

    # Transformers saves a model's weights under the names of the original release (`vit.encoder.layer.0…`) where its
    # own code has newer ones (`vit.layers.0…`). Trainer loads a checkpoint by name and passes over what it does not
    # find, so a whole model would keep the weights of its last step, with the head of the best epoch.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if self._is_whole_model():
            self._restore_weights(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._is_whole_model():
            self._restore_weights(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _is_whole_model(self) -> bool:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return isinstance(self.model, transformers.PreTrainedModel) and not sharded

    def _restore_weights(self, folder: str) -> None:
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
