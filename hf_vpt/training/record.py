"""What results say of the settings they were reached with, so that only the same ones are averaged."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import PeftConfig

from .baselines import LORA_FIELDS
from .parsing import Settings


RESULTS_FILE = "results.json"  # of a sweep, beside the METRICS_FILE of each run

# Settings of training that scores depend on. Numbers of epochs, batches and images are recorded by themselves.
_RECORDED = ("learning_rate", "weight_decay", "head_learning_rate", "head_weight_decay", "norm_learning_rate")
_RECORDED += ("norm_weight_decay", "prompt_angle", "prompt_final_angle", "prompt_norm", "prompt_norm_floor")
_RECORDED += ("scale_learning_rate", "optim", "optim_args", "max_grad_norm", "bf16", "fp16")
_RECORDED += ("lr_scheduler_type", "lr_scheduler_kwargs", "lr_schedule_unit", "warmup_epochs", "warmup_steps")
_RECORDED += ("label_smoothing_factor", "ema_decay", "mixup_alpha", "cutmix_alpha")
_RECORDED += ("adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_drop_last")
_RECORDED += ("metric_for_best_model", "load_best_model_at_end")
# What PEFT's own configurations are about, and what does not change what is learned.
_NOT_RECORDED = {field.name for field in dataclasses.fields(PeftConfig)} | {"target_modules", "hf_vpt_version"}


def describe_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings of optimisation and of the method, by name, as JSON knows them."""
    training = {name: getattr(settings.training, name) for name in _RECORDED}
    model = {name: getattr(settings.model, name) for name in ("model_revision", "quantization", "dtype")}
    # In float32 a cache changes nothing.
    cache_dtype = settings.data.cache_dtype if settings.data.cache_prefix else "float32"
    own = {**model, "cache_dtype": cache_dtype, **training}
    config = settings.peft_config
    for field in () if config is None else dataclasses.fields(config):
        # The others follow from the model.
        is_own = field.init and field.name not in _NOT_RECORDED and not field.metadata.get("filled_in")
        if is_own and (field.name in LORA_FIELDS or settings.model.method != "lora"):
            own[field.name] = getattr(config, field.name)
    return {name: getattr(value, "value", value) for name, value in own.items()}
