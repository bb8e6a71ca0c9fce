"""A `Trainer` whose loss, learning rates and checkpoints suit prompted image classifiers."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch.nn import functional as F
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..hub.card import CARD_FILE, update_model_card
from ..hub.loading import LABELS_FILE
from .checkpoints import checkpoint_to_resume, load_callbacks, mark_complete, mark_incomplete, save_callbacks
from .directions import turn_prompts
from .ema import EMA_FOLDER, ExponentialMovingAverage
from .epochs import SetEpoch
from .identity import RunIdentity
from .mixing import make_mixer
from .models import save_label_names
from .optimizer import group_by_role
from .schedule import fall_geometrically, hold_within_epochs
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
        """Return the loss of logits `(B, classes)`; the mean over the batch where `num_items_in_batch` is None.

        Labels are classes `(B,)`, or the probabilities of all classes `(B, classes)` where images are mixed.
        """
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

    It differs from `transformers.Trainer` in this: a loss that is not finite stops training; the loss is
    `ClassificationLoss`; learning rates may scale with the batch; head and normalisation layers may have learning
    rates and weight decays of their own; prompts may turn at a fixed length; schedules may change once an epoch;
    images may be mixed while training (mixup, CutMix); averaged weights (`ema_decay`) are scored and saved beside the
    last ones; of several equally good epochs the last is the best one; every checkpoint of an adapter holds the names
    of the classes (`id2label.json`); checkpoints of whole models are restored completely; checkpoints hold the state
    of callbacks that have a `state_dict`, and say when they are whole, and only whole ones are gone on from; a data
    set with `set_epoch` is always told the epoch; callbacks with `on_backward(loss, num_images)` are told of backward
    passes, those with `on_evaluation_begin(dataset)` of evaluations, those with `close()` that training has ended,
    however it did; and
    FSDP2 shares the backbone out by `hf_vpt.training.sharding`.

    Args:
        model: A model from `prepare_for_training`.
        args: Training settings.
        kwargs: Everything else that `transformers.Trainer` takes, except `compute_loss_func`.
    """

    def __init__(self, model=None, args=None, **kwargs):
        smoothing = args.label_smoothing_factor
        if args.turns_prompts and (kwargs.get("optimizers") or (None,))[0] is not None:
            raise ValueError(
                "Found an optimizer of your own and settings for the length or the angle of prompts, which are for "
                "the trainer's optimizer. Only one of them can be: leave `optimizers` out, or leave prompt_angle, "
                "prompt_norm and prompt_norm_floor out and use DirectionalSteps or LengthFloor."
            )
        # First, because a callback may read training images at the start of an epoch.
        kwargs["callbacks"] = [SetEpoch(), *(kwargs.get("callbacks") or [])]
        loss = ClassificationLoss(smoothing, getattr(getattr(model, "config", None), "problem_type", None))
        super().__init__(model=model, args=args, compute_loss_func=loss, **kwargs)
        self.mixer = make_mixer(args.mixup_alpha, args.cutmix_alpha, self.model.config.num_labels)
        self.went_on_from: str | None = None
        self.ema = None
        if args.ema_decay is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"ema_decay is {args.ema_decay:g} with {'FSDP' if self.is_fsdp_enabled else 'DeepSpeed'}. "
                    "Averages need whole parameters in every process: leave ema_decay out, or train without sharding."
                )
            self.ema = ExponentialMovingAverage(args.ema_decay)
            self.add_callback(self.ema)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer_class, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer_class, {**kwargs, "lr": args.learning_rate * args.learning_rate_factor}

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As `Trainer.train`, which passes over checkpoints that were not written to their end.

        Args:
            resume_from_checkpoint: See `hf_vpt.training.checkpoints.checkpoint_to_resume`.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        self.went_on_from = checkpoint
        if checkpoint is not None:
            # Before weights are loaded, which may not even fit.
            identities = [c for c in self.callback_handler.callbacks if isinstance(c, RunIdentity)]
            load_callbacks(identities, checkpoint)
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "close"):
                    callback.close()

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self.mixer is not None:
            # Here and not in a worker of the data loader, so that the draws go on where a checkpoint left them.
            inputs = self._prepare_inputs(inputs)
            pixel_values, labels = self.mixer(inputs["pixel_values"], inputs["labels"])
            inputs = {**inputs, "pixel_values": pixel_values, "labels": labels}
        loss = super().training_step(model, inputs, num_items_in_batch)
        rates = [group["lr"] for group in self.optimizer.param_groups if not group.get("is_angle")]
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, self.model.dtype)
        raise_if_not_finite(loss, self.state.global_step, max(rates), dtype)
        # An event that Trainer has none for: gradients are complete, and nothing has clipped them yet.
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_backward"):
                callback.on_backward(loss, len(inputs["pixel_values"]))
        return loss

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        if is_new and self.is_fsdp_enabled:
            shard_blocks(self.model, self.accelerator)
        optimizer = super().create_optimizer(model)
        if is_new:
            model = self.accelerator.unwrap_model(self.model)
            names = set(self.get_decay_parameter_names(model))
            decayed = {parameter for name, parameter in model.named_parameters() if name in names}
            group_by_role(optimizer, model, self.args, decayed)
            turn_prompts(optimizer, model, self.args, self.is_deepspeed_enabled)
            if self.is_fsdp_enabled:
                self._names_in_optimizer = names_in_optimizer(optimizer, self.model)
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        is_new = self.lr_scheduler is None
        # The first thing that Trainer does once Accelerate has prepared the optimizer.
        if self.is_fsdp_enabled:
            replace_in_optimizer(self.optimizer, self.model, self._names_in_optimizer)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new and self.args.prompt_final_angle is not None:
            angles = [i for i, group in enumerate(self.optimizer.param_groups) if group.get("is_angle")]
            ends = dict.fromkeys(angles, self.args.prompt_final_angle)
            last = num_training_steps
            if self.args.lr_schedule_unit == "epoch":  # held from the last epoch's first step
                last -= self.args.get_steps_per_epoch(num_training_steps)
            fall_geometrically(scheduler, ends, self.args.get_warmup_steps(num_training_steps), last)
        if is_new and self.args.lr_schedule_unit == "epoch":
            hold_within_epochs(scheduler, self.args.get_steps_per_epoch(num_training_steps))
        return scheduler

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_evaluation_begin"):
                callback.on_evaluation_begin(dataloader.dataset)
        settings = {"prediction_loss_only": prediction_loss_only, "ignore_keys": ignore_keys}
        # A data loader draws a seed whenever it starts. What trains must not depend on whether it is evaluated: a run
        # that goes on from a checkpoint does not repeat the evaluation that came after it.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(dataloader, description, metric_key_prefix=metric_key_prefix, **settings)
        if self.ema is not None and self.ema.averages is not None:
            prefix = f"{metric_key_prefix}_ema"
            with torch.random.fork_rng(devices=[]), self.ema.averaged(self.accelerator.unwrap_model(self.model)):
                averaged = super().evaluation_loop(dataloader, description, metric_key_prefix=prefix, **settings)
            averaged.metrics.pop(f"{prefix}_model_preparation_time", None)
            output.metrics.update(averaged.metrics)
        return output

    def _save(self, output_dir=None, state_dict=None) -> None:
        folder = output_dir or self.args.output_dir
        self._save_with_label_names(folder, state_dict)
        if self.args.should_save and self.ema is not None and self.ema.averages is not None:
            with self.ema.averaged(self.accelerator.unwrap_model(self.model)):
                self._save_with_label_names(str(Path(folder) / EMA_FOLDER))

    def _save_with_label_names(self, folder: str, state_dict=None) -> None:
        super()._save(folder, state_dict)
        if self.args.should_save and not Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):
            # A pickle, which is for going on from checkpoints. What is shared holds none.
            (Path(folder) / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        if self.args.should_save and isinstance(model, PeftModel):
            save_label_names(model, folder)

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
            torch.save(self.args, folder / TRAINING_ARGS_NAME)  # with the limit
            self._finish_checkpoint(folder)
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _finish_checkpoint(self, folder: Path) -> None:
        save_callbacks(self.callback_handler.callbacks, folder)
        mark_complete(folder)

    def _push_from_checkpoint(self, checkpoint_folder) -> None:
        if self.is_world_process_zero():
            self._finish_checkpoint(Path(checkpoint_folder))  # what goes to the Hub is whole
            for name in (LABELS_FILE, CARD_FILE):  # Trainer copies the adapter's own files alone
                if (Path(checkpoint_folder) / name).is_file():
                    shutil.copy(Path(checkpoint_folder) / name, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_callbacks(self.callback_handler.callbacks, checkpoint)

    def _determine_best_metric(self, metrics, trial) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        name = "eval_" + (self.args.metric_for_best_model or "").removeprefix("eval_")
        if not is_best and metrics.get(name) is not None and metrics[name] == self.state.best_metric:
            # A small validation set gives several epochs the same score. Trainer keeps the first of them, which has
            # learned least.
            self.state.best_global_step = self.state.global_step
            return True
        return is_best

    def push_to_hub(self, *args, **kwargs) -> CommitInfo | None:
        """As `Trainer.push_to_hub`; pickled settings, which pushes while training leave behind, are taken away."""
        self._finish_current_push()
        if self.is_world_process_zero() and self.hub_model_id is not None:
            where = {"repo_id": self.hub_model_id, "token": kwargs.get("token") or self.args.hub_token}
            where["revision"] = kwargs.get("revision") or self.args.hub_revision
            if HfApi().file_exists(filename=TRAINING_ARGS_NAME, **where):
                HfApi().delete_file(TRAINING_ARGS_NAME, commit_message="No pickle", **where)
        return super().push_to_hub(*args, **kwargs)

    def create_model_card(self, *args, license: str | None = None, **kwargs) -> None:
        """For an adapter, a card of what lies in `output_dir`, unless somebody has written one; else as `Trainer`."""
        license = license or self.args.hub_license
        if not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            super().create_model_card(*args, license=license, **kwargs)
        elif self.is_world_process_zero():
            update_model_card(self.args.output_dir, repository=self.hub_model_id, license=license)

    # Transformers saves a model's weights under the names of the original release (`vit.encoder.layer.0…`) where its
    # own code has newer ones (`vit.layers.0…`). Trainer loads a checkpoint by name and passes over what it does not
    # find, so a whole model would keep the weights of its last step, with the head of the best epoch.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if self._is_whole_model():
            self._restore_weights(resume_from_checkpoint)
        elif self._has_averaged_adapter(resume_from_checkpoint):
            # Trainer would take the averaged weights for a second adapter, called like their folder.
            self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        names = self.model.active_adapters if isinstance(self.model, PeftModel) else []
        if self._is_whole_model():
            self._restore_weights(self.state.best_model_checkpoint)
        elif set(names) - {"default"} and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # Adapters of other names lie in folders of their own, where Trainer does not look.
            for name in names:
                folder = Path(self.state.best_model_checkpoint) / ("" if name == "default" else name)
                self.model.load_adapter(str(folder), name, is_trainable=True)
        else:
            super()._load_best_model()
        if self.ema is not None:
            load_callbacks([self.ema], self.state.best_model_checkpoint)

    def _has_averaged_adapter(self, folder: str) -> bool:
        # Adapters of other names have folders of their own, in that of the averaged weights too.
        is_default = isinstance(self.model, PeftModel) and self.model.active_adapters == ["default"]
        return is_default and (Path(folder) / EMA_FOLDER / SAFETENSORS_WEIGHTS_NAME).is_file()

    def _is_whole_model(self) -> bool:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return isinstance(self.model, transformers.PreTrainedModel) and not sharded

    def _restore_weights(self, folder: str) -> None:
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
