"""A pre-trained vision transformer with a head for named classes, from a folder or the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel, ViTConfig
from transformers.utils import CONFIG_NAME

from .demo import DEMO, demo_backbone_path


def resolve_model_path(name: str) -> str:
    """Return where a backbone lies: the packaged one for `"demo"`, else `name` itself, a folder or a Hub id."""
    if name == DEMO:
        return demo_backbone_path()
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(
            f"'{name}' is no folder. model_name_or_path needs the folder of a saved model, a Hub id such as "
            "google/vit-base-patch16-224-in21k, or demo: correct it."
        )
    return name


def load_classifier_config(
    name: str, label_names: Sequence[str] | None, revision: str | None = None, **download: Any
) -> PreTrainedConfig:
    """Load a backbone's configuration with the names of the classes it is to tell apart.

    A ViT-MAE, which Transformers has no classifier for, becomes the ViT that its encoder is.

    Args:
        name: Folder, Hub id or `"demo"`.
        label_names: Name of each class, in the order of the head's outputs; None leaves the backbone's own.
        revision: Branch, tag or commit on the Hub.
        download: Further arguments of `AutoConfig.from_pretrained`, such as `token`.
    """
    labels = {}
    if label_names is not None:
        id2label = dict(enumerate(label_names))
        labels = {"id2label": id2label, "label2id": {label: number for number, label in id2label.items()}}
    # Said, because Transformers would ask on the console whether to run a repository's code.
    labels["trust_remote_code"] = False
    config = AutoConfig.from_pretrained(resolve_model_path(name), revision=revision, **labels, **download)
    if config.model_type != "vit_mae":
        return config
    shared = {"id2label", "label2id"} | ViTConfig().to_dict().keys() - {"model_type", "architectures"}
    return ViTConfig(**{name: value for name, value in config.to_dict().items() if name in shared})


def load_backbone(name: str, config: PreTrainedConfig, revision: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a backbone's weights into a classifier; a head for other classes than its own is drawn at random.

    Args:
        name: Folder, Hub id or `"demo"`.
        config: What `load_classifier_config` returns.
        revision: Branch, tag or commit on the Hub.
        kwargs: Further arguments of `AutoModelForImageClassification.from_pretrained`.
    """
    model = AutoModelForImageClassification.from_pretrained(
        resolve_model_path(name),
        config=config,
        revision=revision,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
        **kwargs,
    )
    # Adapters record it, so that they find the same backbone again.
    model.config._commit_hash = _loaded_commit(name, revision)
    return model


def _loaded_commit(name: str, revision: str | None) -> str | None:
    """The commit of the Hub that a backbone was just loaded from; None for one from a folder."""
    if name == DEMO or Path(name).is_dir():
        return None
    file = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None
