"""Settings of a training run: which model, which data, how to train."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import transformers

from ..choices import check_choice
from .ema import ExponentialMovingAverage


# What prompts are compared with: the head alone, everything, all biases, or low-rank updates of weights.
BASELINES = ("linear_probe", "full", "bias", "lora")

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "8bit", "4bit"]
ScheduleUnit = Literal["step", "epoch"]


@dataclass
class ModelArguments:
    """Which backbone is adapted, and by which method.

    The settings of the method itself (number of prompts and so on) are the fields of its configuration class, and are
    given under their own names beside these.

    Args:
        model_name_or_path: Folder or Hub id of a vision transformer, or `"demo"` for the small one that comes with the
            package.
        model_revision: Branch, tag or commit of the backbone on the Hub.
        attn_implementation: Attention kernel, such as `"sdpa"` or `"eager"`. Default: the model's own choice.
        dtype: Number format of the frozen weights. For mixed precision, keep float32 here and pass `bf16`.
        quantization: Number format of the frozen linear layers: `"8bit"` or `"4bit"` (NF4) needs bitsandbytes and a
            prompt method, and takes a quarter or an eighth of their memory in float32. Head, norms and prompts are not
            quantised.
        method: One of `hf_vpt.tuners.METHODS`, or a baseline: `"linear_probe"` trains the head alone, `"full"`
            everything, `"bias"` all biases and the head (BitFit, arXiv 2106.10199), `"lora"` low-rank updates of query
            and value projections and the head (arXiv 2106.09685).
    """

    _argument_group_name = "model"

    model_name_or_path: str = field(default="demo", metadata={"help": "Folder, Hub id, or demo."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel: sdpa, eager and so on."}
    )
    dtype: Dtype = field(default="float32", metadata={"help": "Number format of the weights."})
    quantization: Quantization = field(
        default="none", metadata={"help": "Format of the frozen linear layers, by bitsandbytes."}
    )
    method: str = field(default="vapt", metadata={"help": "Prompt method, or a baseline such as linear_probe."})

    def __post_init__(self):
        check_choice("dtype", self.dtype, Dtype)
        check_choice("quantization", self.quantization, Quantization)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """`transformers.TrainingArguments` with settings for visual prompts, and defaults for image classification.

    Changed defaults: evaluate, save and log each epoch; keep the epoch with the best validation accuracy; cosine
    schedule; columns are kept, because images are transformed on the fly; labels are named, because a PEFT model hides
    its signature from `Trainer`.

    Args:
        warmup_epochs: Epochs, fractions allowed, over which the learning rate climbs linearly from zero. Takes the
            place of `warmup_steps`.
        scale_learning_rate: Multiply all learning rates by global batch size / 256, as the published settings of VPT
            and its successors are meant. The global batch counts all processes and accumulated batches.
        head_learning_rate: Learning rate of the classification head. Default: that of everything else.
        head_weight_decay: Weight decay of the head's weights (biases have none). Default: that of everything else.
        norm_learning_rate: Learning rate of trained normalisation layers outside the head: VAPT's own, or all of them
            in full fine-tuning. Default: that of everything else.
        norm_weight_decay: Weight decay of their weights (biases have none). Default: none.
        prompt_angle: Angle in radians, above 0 and at most π/2, by which each prompt (for VAPT and BPT, what makes it)
            turns in a step; it follows the schedule and takes the place of the learning rate, whatever the batch.
            Lengths stay fixed, and weight decay does not touch them. For what has no effect but by its direction (deep
            prompts behind a norm): see `DirectionalSteps` and docs/learning_rate.md. `learning_rate` then is for the
            head and for the rest of an adapter. Default: prompts are added to, as published.
        prompt_final_angle: The angle falls geometrically from `prompt_angle`, after warm-up, to this one at the end,
            so that `prompt_angle` may be much too large. Default: it follows `lr_scheduler_type`.
        prompt_norm: Length at which such prompts are kept, as root mean square of their elements. Without
            `prompt_angle`, steps are those of `learning_rate`, without their part along the prompt. Default: 1 with
            `prompt_angle`, else prompts may grow and shrink.
        prompt_norm_floor: Length, counted likewise, below which such prompts do not shrink (`LengthFloor`); otherwise
            they are added to, as published.
        lr_schedule_unit: Whether the learning rate changes with each `"step"`, or once an `"epoch"` and stays at the
            schedule's value at the epoch's start, as in the code of VPT and its successors.
        ema_decay: Decay in [0, 1) of an exponential moving average of the trained weights, which is scored beside the
            last ones (`eval_ema_accuracy`; `metric_for_best_model: ema_accuracy` chooses by it) and saved in the
            folder `ema` beside them; see `ExponentialMovingAverage`. Default: no average.
        mixup_alpha: Training images are mixed with their neighbour in the batch in proportions from Beta(α, α), at
            least 0, and so are labels (mixup, arXiv 1710.09412); 0 for never. The larger, the nearer to halves.
        cutmix_alpha: The same for boxes cut out of the neighbour (CutMix, arXiv 1905.04899). With both, each batch
            gets one of them.
        record_steps: Write `steps.json` to `output_dir`: of every optimiser step the loss, and length, turn and
            gradient of prompts (`StepRecorder`).
        hub_license: Licence, by the Hub's names, that the card of a published adapter states. Default: `unknown`.
        plateau_patience: Epochs with a training loss of ln(number of classes), that of guessing, after which to warn;
            0 for never.

    Raises:
        ValueError: A setting is out of range, or two settings contradict each other.
    """

    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps, epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch, best."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log: no, steps, epoch."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept beside the best one."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best epoch, not the last."})
    metric_for_best_model: str | None = field(default="accuracy", metadata={"help": "What the best epoch is best in."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Course of the learning rate after warm-up."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: it would drop the images."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Name of the labels in a batch."}
    )
    # The order of the types is Trainer's: the argument parser takes the second one.
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Where to log: tensorboard, wandb."})

    warmup_epochs: float = field(default=0.0, metadata={"help": "Epochs of linear warm-up."})
    scale_learning_rate: bool = field(
        default=False, metadata={"help": "Multiply learning rates by global batch size / 256."}
    )
    head_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the head."})
    head_weight_decay: float | None = field(default=None, metadata={"help": "Weight decay of the head."})
    norm_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of trained norms."})
    norm_weight_decay: float | None = field(default=None, metadata={"help": "Weight decay of trained norms."})
    prompt_angle: float | None = field(default=None, metadata={"help": "Angle by which prompts turn in a step."})
    prompt_final_angle: float | None = field(
        default=None, metadata={"help": "Angle at the end, reached geometrically."}
    )
    prompt_norm: float | None = field(default=None, metadata={"help": "Length at which prompts are kept."})
    prompt_norm_floor: float | None = field(default=None, metadata={"help": "Least length of prompts."})
    lr_schedule_unit: ScheduleUnit = field(
        default="step", metadata={"help": "Whether the learning rate changes with each step or epoch."}
    )
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of an average of the weights."})
    mixup_alpha: float = field(default=0.0, metadata={"help": "Strength of mixup; 0 for none."})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "Strength of CutMix; 0 for none."})
    record_steps: bool = field(default=False, metadata={"help": "Write what prompts do in each step to steps.json."})
    hub_license: str | None = field(default=None, metadata={"help": "Licence of what is published, as apache-2.0."})
    plateau_patience: int = field(default=5, metadata={"help": "Epochs of guessing after which to warn."})

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_epochs < 0 or self.warmup_epochs > self.num_train_epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs:g} and num_train_epochs {self.num_train_epochs:g}. Warm-up "
                "must last between 0 and num_train_epochs epochs: change one of them."
            )
        if self.warmup_epochs and (self.warmup_steps or self.max_steps > 0):
            other = "warmup_steps" if self.warmup_steps else "max_steps"
            raise ValueError(
                f"warmup_epochs and {other} are both set. Warm-up counted in epochs needs a run counted in epochs, "
                f"and only one of both lengths: remove {other}, or use warmup_steps instead of warmup_epochs."
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns is true. It must be false, because Trainer would drop the images before they "
                "are transformed: leave it out."
            )
        check_choice("lr_schedule_unit", self.lr_schedule_unit, ScheduleUnit)
        self._check_that_epochs_count()
        if self.ema_decay is not None:
            ExponentialMovingAverage(self.ema_decay)  # checks it
        elif (self.metric_for_best_model or "").removeprefix("eval_").startswith("ema_"):
            raise ValueError(
                f"metric_for_best_model is '{self.metric_for_best_model}' without ema_decay. Scores of averaged "
                "weights need an average: set ema_decay, or choose by accuracy."
            )
        not_negative = ("learning_rate", "head_learning_rate", "head_weight_decay", "norm_learning_rate")
        not_negative += ("norm_weight_decay", "mixup_alpha", "cutmix_alpha", "plateau_patience")
        for name in not_negative:
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} is {value:g}. It must be at least 0: correct it, or leave it out.")

        if self.prompt_angle is not None and not 0 < self.prompt_angle <= math.pi / 2:
            raise ValueError(
                f"prompt_angle is {self.prompt_angle:g}. It is in radians and must be above 0 and at most π/2, a "
                "right angle: correct it, for example to 0.1, or leave it out."
            )
        if self.prompt_final_angle is not None and not 0 < self.prompt_final_angle <= (self.prompt_angle or 0):
            raise ValueError(
                f"prompt_final_angle is {self.prompt_final_angle:g} and prompt_angle {self.prompt_angle}. Angles fall "
                "from prompt_angle to prompt_final_angle, above 0: set both, such as 0.3 and 0.003, or neither."
            )
        for name in ("prompt_norm", "prompt_norm_floor"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value:g}. It must be above 0: correct it, or leave it out.")
        if self.prompt_norm_floor is not None and (self.prompt_norm or self.prompt_angle):
            other = "prompt_norm" if self.prompt_norm else "prompt_angle"
            raise ValueError(
                f"prompt_norm_floor is set beside {other}, which keeps the length of prompts as it is. Only one of "
                "them can be: leave prompt_norm_floor out."
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the number of optimiser steps over which the learning rate climbs."""
        if self.warmup_epochs:
            return round(num_training_steps * self.warmup_epochs / self.num_train_epochs)
        return super().get_warmup_steps(num_training_steps)

    def get_steps_per_epoch(self, num_training_steps: int) -> int:
        """Return the number of optimiser steps of an epoch, in a run of so many of them in all."""
        self._check_that_epochs_count()
        # The last epoch may be a fraction, rounded up to a step. Where all steps are in one epoch, any number from
        # theirs on will do.
        return math.floor(num_training_steps / self.num_train_epochs + 1e-6)

    def _check_that_epochs_count(self) -> None:
        if self.lr_schedule_unit == "epoch" and self.max_steps > 0:
            raise ValueError(
                f"lr_schedule_unit is 'epoch' and max_steps {self.max_steps}. A schedule by epochs needs a run "
                "counted in epochs: set num_train_epochs instead of max_steps, or leave lr_schedule_unit out."
            )

    @property
    def fixes_lengths(self) -> bool:
        """Whether prompts keep their length while training."""
        return self.prompt_norm is not None or self.prompt_angle is not None

    @property
    def turns_prompts(self) -> bool:
        """Whether something is done about the length of prompts."""
        return self.fixes_lengths or self.prompt_norm_floor is not None

    @property
    def global_batch_size(self) -> int:
        """Images that one optimiser step learns from, over all processes and accumulated batches."""
        return self.train_batch_size * self.world_size * self.gradient_accumulation_steps

    @property
    def learning_rate_factor(self) -> float:
        """What all learning rates are multiplied by: 1, or global batch size / 256."""
        return self.global_batch_size / 256 if self.scale_learning_rate else 1.0
