"""Backbone with a new head, and what of it a method trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import is_bitsandbytes_available

from ..backbones import BACKBONES, find_backbone
from ..classifiers import load_backbone, load_classifier_config, resolve_model_path
from ..hub.loading import LABELS_FILE, read_label_names
from .arguments import ModelArguments
from .baselines import BaselineLoraConfig, is_bias


def load_classifier(model_args: ModelArguments, label_names: Sequence[str]) -> PreTrainedModel:
    """Load a pre-trained vision transformer with a fresh classification head that knows the names of its classes.

    The head is drawn at random (seed first) unless the backbone comes with one for the same number of classes. A
    ViT-MAE, which Transformers has no classifier for, becomes the ViT that its encoder is; its head reads the CLS
    token.

    Args:
        model_args: Which backbone, in which number format and with which attention kernel.
        label_names: Name of each class, in the order of the data set's class labels.

    Returns:
        The model, with `config.id2label` and `config.label2id` set and every parameter trainable that is no quantised
        one.

    Raises:
        ImportError: If a quantised backbone is asked for and bitsandbytes is not installed.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    config = load_classifier_config(name, label_names, revision)
    model = load_backbone(
        name,
        config,
        revision,
        attn_implementation=model_args.attn_implementation,
        dtype=getattr(torch, model_args.dtype),
        quantization_config=_quantization_config(model_args, config),
    )
    for module in model.modules():
        # On a CPU, bitsandbytes packs 4-bit weights anew in evaluation mode, in which frozen layers stay, for a
        # product that passes no gradient on: prompts would stop to learn without a word.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _quantization_config(model_args: ModelArguments, config: PreTrainedConfig) -> BitsAndBytesConfig | None:
    """Returns how the backbone is to be quantised; None where it is not."""
    if model_args.quantization == "none":
        return None
    if not is_bitsandbytes_available():
        raise ImportError(
            f"Found quantization={model_args.quantization} and no bitsandbytes. Quantised backbones need that "
            "package. Install it with `pip install bitsandbytes`, or leave the setting out."
        )
    with torch.device("meta"):  # names alone
        model = AutoModelForImageClassification.from_config(config)
    return BitsAndBytesConfig(
        load_in_8bit=model_args.quantization == "8bit",
        load_in_4bit=model_args.quantization == "4bit",
        # A list of one's own takes the place of the guess of Transformers, which knows heads of language models.
        llm_int8_skip_modules=list(find_backbone(model).heads),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, model_args.dtype),
    )


def load_image_processor(model_args: ModelArguments) -> BaseImageProcessor:
    """Load the image processor that was saved with the backbone: size, rescaling, mean, standard deviation."""
    path = resolve_model_path(model_args.model_name_or_path)
    return AutoImageProcessor.from_pretrained(path, revision=model_args.model_revision)


def prepare_for_training(
    model: PreTrainedModel, method: str, peft_config: PeftConfig | None = None, revision: str | None = None
) -> PreTrainedModel | PeftModel:
    """Choose what trains: an adapter and the head, the head alone, the head and all biases, or everything.

    Args:
        model: A classifier from `load_classifier`. It is changed in place.
        method: A prompt method or a baseline.
        peft_config: Configuration of the prompt method or of LoRA; None for the other baselines.
        revision: Branch, tag or commit that the backbone came from, recorded in the adapter's configuration.

    Returns:
        A `PeftModel` around `model` for a prompt method and LoRA, else `model`.
    """
    if getattr(model, "is_quantized", False) and peft_config is None:
        raise ValueError(
            f"Found a quantised backbone and method '{method}'. Quantised weights are for prompts, which leave "
            "them as they are. Choose a prompt method or lora, or leave quantization out."
        )
    if isinstance(peft_config, BaselineLoraConfig):
        peft_config = peft_config.for_model(model)
    if peft_config is not None:
        return get_peft_model(model, peft_config, revision=revision)
    if method in ("linear_probe", "bias"):
        head = {id(parameter) for parameter in head_parameters(model)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(id(parameter) in head or (method == "bias" and is_bias(name, parameter)))
    if method == "linear_probe":
        # Trainer puts the whole model in training mode before each step. A frozen backbone's dropout and stochastic
        # depth would only blur the features, so the backbone goes back to evaluation mode before it runs.
        for child in model.children():
            if not all(id(parameter) in head for parameter in child.parameters()):
                child.register_forward_pre_hook(_evaluation_mode)
    return model


def _evaluation_mode(module: nn.Module, args: tuple) -> None:
    module.eval()


def head_parameters(model: PreTrainedModel | PeftModel) -> list[nn.Parameter]:
    """Return the parameters of a classifier's head.

    In a `PeftModel` these are the trained copies of the modules to save; else what the backbone's record calls the
    head, or, in a family without a record, everything outside the backbone.

    Raises:
        ValueError: The model has no backbone and head that could be told apart.
    """
    if isinstance(model, PeftModel):
        wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        return [parameter for wrapper in wrappers for parameter in wrapper.parameters() if parameter.requires_grad]
    if model.config.model_type in BACKBONES:
        heads = [model.get_submodule(name) for name in find_backbone(model).heads]
        head = [parameter for module in heads for parameter in module.parameters()]
    else:
        backbone = {id(parameter) for parameter in model.base_model.parameters()}
        head = [parameter for parameter in model.parameters() if id(parameter) not in backbone]
    if not head:
        raise ValueError(
            f"{type(model).__name__} has the parts {[name for name, _ in model.named_children()]}. A backbone and a "
            "head are needed to train the head alone: use a model class for image classification, or method 'full'."
        )
    return head


def count_trained_parameters(model: nn.Module) -> dict[str, int]:
    """Count the numbers that training changes: all of them, and those outside the head, which methods compete in.

    Returns:
        `trained_parameters` and `trained_parameters_without_head`.
    """
    head = {id(parameter) for parameter in head_parameters(model)}
    trained = {id(parameter): parameter.numel() for parameter in model.parameters() if parameter.requires_grad}
    return {
        "trained_parameters": sum(trained.values()),
        "trained_parameters_without_head": sum(number for key, number in trained.items() if key not in head),
    }


def save_label_names(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """Write the names of the classes beside an adapter, which otherwise does not record them.

    They are not written as a `config.json`, because Transformers takes a local folder that has one for a whole model.
    """
    text = json.dumps(model.config.id2label, indent=2, ensure_ascii=False)
    (Path(folder) / LABELS_FILE).write_text(text + "\n", encoding="utf-8")


def load_label_names(folder: str | Path) -> list[str]:
    """Read the names of the classes that were written beside an adapter, in the order of their numbers."""
    names = read_label_names(folder)
    if names is None:
        raise FileNotFoundError(
            f"Found no {LABELS_FILE} in {folder}. The folder of a trained adapter is needed: give another one."
        )
    return names
