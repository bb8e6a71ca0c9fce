"""From the name of an adapter to a classifier that is ready to use."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..classifiers import load_backbone, load_classifier_config, resolve_model_path
from ..demo import DEMO, demo_backbone_path
from ..tuners.base import PromptConfig
from .files import MAX_JSON_BYTES, MAX_WEIGHTS_BYTES, fetch


LABELS_FILE = "id2label.json"
MAX_IMAGE_SIDE = 4096
MAX_CLASSES = 50_000
# What reading files of somebody else's may raise. Errors of our own configurations say more, and are not among them.
_NONSENSE = (KeyError, TypeError, AttributeError, RecursionError, OverflowError, UnicodeDecodeError)
_NONSENSE += (json.JSONDecodeError,)


def load_image_classifier(
    adapter: str | os.PathLike,
    *,
    into: PeftModel | None = None,
    adapter_name: str = "default",
    base_model: str | PreTrainedModel | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> tuple[PeftModel, BaseImageProcessor]:
    """Load an adapter with its backbone, its head, the names of its classes and its image processor.

    What comes from a repository is data: weights are read from safetensors files alone, and no code is run. Of the
    adapter's repository, four files are fetched, of one commit, and their sizes are looked at first. Names, shapes and
    formats of prompts are compared with the configuration before any is read; a LoRA adapter's are PEFT's to check.
    The base model is fetched whatever its size.

    Args:
        adapter: Folder or Hub id of the adapter.
        into: A model that this function has returned, for another adapter on the same backbone and of the same method;
            it stays at the adapter that is active, and `set_adapter` or `adapter_names` choose. The model's backbone
            stays as it is, so `base_model`, `dtype` and `attn_implementation` are not for this.
        adapter_name: What the model is to call the adapter, without dots.
        base_model: Folder, Hub id or model to load it on. Default: the one that the adapter names, at the revision
            that it was trained on.
        revision: Branch, tag or commit of the adapter's repository.
        subfolder: Folder of the adapter in it, such as `"ema"`.
        token: Access token for the Hub. Default: the one that was stored at login.
        dtype: Number format of the backbone and the head; prompts stay in float32. Default: float32.
        attn_implementation: Attention kernel. Default: the backbone's own choice.

    Returns:
        The model in evaluation mode, whose `config.id2label` names the classes of the active adapter, and the image
        processor that the adapter was trained with.

    Raises:
        OSError: A repository or a file cannot be reached.
        ValueError: The adapter's files do not fit one another or the model, are too large, or name a base model that
            a repository must not choose.

    Example:
        >>> model, processor = load_image_classifier("user/vapt-flowers")
        >>> pipeline("image-classification", model=model, image_processor=processor)("photo.jpg")
    """
    from transformers.pipelines.base import SUPPORTED_PEFT_TASKS  # takes a second to import

    if "." in adapter_name:
        raise ValueError(f"Found adapter_name {adapter_name!r}. PyTorch's names have no dots: leave them out.")
    folder = _fetch_adapter(adapter, revision, subfolder, token)
    config = _read_config(folder)
    if into is not None:
        given = {"base_model": base_model, "dtype": dtype, "attn_implementation": attn_implementation}
        _check_fits_beside(config, adapter_name, into, [name for name, value in given.items() if value is not None])
        backbone, base_revision = into.get_base_model(), into.peft_config[into.active_adapters[0]].revision
    else:
        base_revision = config.revision if base_model is None else None
        backbone = base_model or _named_backbone(config, is_local=Path(adapter).is_dir())
    # First of all, so that a bad one leaves the model as it was.
    processor = _load_processor(folder, backbone, base_revision, token)
    if into is not None:
        into.load_adapter(folder, adapter_name)
        return into.eval(), processor
    if isinstance(backbone, str):
        _refuse_nested_adapter(backbone, base_revision, token)
        # A prompt adapter knows the names of its classes and brings a head of its own size.
        label_names = None if isinstance(config, PromptConfig) and config.label_names else read_label_names(folder)
        base_config = load_classifier_config(backbone, label_names, base_revision, token=token)
        kwargs = {"token": token, "dtype": dtype or torch.float32, "attn_implementation": attn_implementation}
        with _without_load_report():
            backbone = load_backbone(backbone, base_config, base_revision, use_safetensors=True, **kwargs)
    # Pipelines complain of models whose class they do not find here.
    SUPPORTED_PEFT_TASKS.setdefault("image-classification", ["PeftModel"])
    return PeftModel.from_pretrained(backbone, folder, adapter_name).eval(), processor


def _fetch_adapter(
    adapter: str | os.PathLike, revision: str | None, subfolder: str | None, token: str | bool | None
) -> Path:
    """The folder that holds an adapter's files, all of one commit."""
    where = {"subfolder": subfolder, "token": token}
    config = fetch(adapter, CONFIG_NAME, max_bytes=MAX_JSON_BYTES, revision=revision, **where)
    if config is not None and not Path(adapter).is_dir():
        # Files of the Hub lie in snapshots/<commit>.
        revision = config.parents[len(Path(subfolder or "").parts)].name
    weights = config and fetch(
        adapter, SAFETENSORS_WEIGHTS_NAME, max_bytes=MAX_WEIGHTS_BYTES, revision=revision, **where
    )
    if not weights:
        missing = CONFIG_NAME if config is None else SAFETENSORS_WEIGHTS_NAME
        raise OSError(
            f"Found no {missing} in '{adapter}'{f', folder {subfolder!r}' if subfolder else ''}. An adapter consists "
            f"of {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}; pickles are not loaded. Give the folder or repository "
            "that `save_pretrained` or `push_to_hub` wrote, and its subfolder if there is one; a whole model loads "
            "with Transformers' AutoModelForImageClassification."
        )
    for name in (LABELS_FILE, IMAGE_PROCESSOR_NAME):
        fetch(adapter, name, max_bytes=MAX_JSON_BYTES, revision=revision, optional=True, **where)
    return config.parent


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps Transformers from reporting that a backbone has no head, or another one: the adapter has its own."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_config(folder: Path) -> PeftConfig:
    try:
        config = PeftConfig.from_pretrained(folder)
        if not isinstance(config, (PromptConfig, LoraConfig)):
            raise KeyError(config.peft_type)
        if not isinstance(config.base_model_name_or_path, str | None):
            raise TypeError(config.base_model_name_or_path)
    except _NONSENSE as error:
        raise ValueError(
            f"Found {CONFIG_NAME} in {folder} that is no configuration of an adapter ({_brief(error)}). One of a "
            "prompt method or of LoRA is needed: save the adapter again with `save_pretrained`."
        ) from error
    if config.base_model_name_or_path == DEMO:
        config.base_model_name_or_path = demo_backbone_path()
    return config


def read_label_names(folder: str | Path) -> list[str] | None:
    """The names of the classes in a file beside an adapter, in the order of their numbers; None without the file.

    Raises:
        ValueError: The file holds something else, or more than 50,000 names.
    """
    file = Path(folder) / LABELS_FILE
    if not file.is_file():
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
        names = [str(names[str(number)]) for number in range(len(names))]
    except _NONSENSE as error:
        raise ValueError(
            f"Found {file} that does not hold names of classes ({_brief(error)}). An object with the names under "
            '"0", "1" and so on is needed: correct the file.'
        ) from error
    if len(names) > MAX_CLASSES:
        raise ValueError(
            f"Found {len(names):,} names of classes in {file}. At most {MAX_CLASSES:,} are taken: look at the file."
        )
    return names


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _refuse_nested_adapter(backbone: str, revision: str | None, token: str | bool | None) -> None:
    """Raises `ValueError` if a backbone is itself an adapter, for which Transformers would load one more model."""
    where = {"revision": revision, "token": token}
    name = resolve_model_path(backbone)
    if fetch(name, CONFIG_NAME, max_bytes=MAX_JSON_BYTES, optional=True, **where) is not None:
        raise ValueError(
            f"Found {CONFIG_NAME} in the base model '{backbone}', which makes it an adapter of another model. A whole "
            "model is needed: pass base_model=…, its folder or its id on the Hub."
        )


def _named_backbone(config: PeftConfig, is_local: bool) -> str:
    """The backbone that an adapter names.

    Raises:
        ValueError: It names none, or a folder, which only an adapter of one's own may choose.
    """
    name = config.base_model_name_or_path
    found = None
    if not name:
        found = "no base model"
    elif name == demo_backbone_path():
        return name
    elif not is_local and (Path(name).exists() or Path(name).is_absolute()):
        found = f"the folder '{name}' as base model in an adapter from the Hub"
    elif Path(name).is_absolute() and not Path(name).is_dir():
        found = f"the folder '{name}' as base model, which is not on this machine"
    if found is not None:
        raise ValueError(
            f"Found {found}. The backbone that the adapter was trained on is needed: pass base_model=…, its folder or "
            "its id on the Hub."
        )
    return name


def _check_fits_beside(config: PeftConfig, adapter_name: str, model: PeftModel, given: list[str]) -> None:
    """Raises `ValueError` if an adapter cannot be one more of a model."""
    if given:
        raise ValueError(
            f"Found {', '.join(given)} together with `into`. A model has its backbone already: leave it out, or load "
            "the adapter into a model of its own."
        )
    first = next(iter(model.peft_config.values()))
    found = None
    if adapter_name in model.peft_config:
        found = f"an adapter called {adapter_name!r} in the model"
    elif config.peft_type != first.peft_type:
        found = f"an adapter of {config.peft_type.value} for a model with one of {first.peft_type.value}"
    elif config.base_model_name_or_path != first.base_model_name_or_path:
        found = f"an adapter for {config.base_model_name_or_path} and a model of {first.base_model_name_or_path}"
    elif config.revision != first.revision and None not in (config.revision, first.revision):
        found = f"an adapter for revision {config.revision} and a model of revision {first.revision}"
    if found is not None:
        raise ValueError(
            f"Found {found}. Adapters of one model have different names, one method and one backbone: give another "
            "adapter_name, or load this one into a model of its own."
        )


def _load_processor(
    folder: Path, backbone: str | PreTrainedModel, revision: str | None, token: str | bool | None
) -> BaseImageProcessor:
    if (folder / IMAGE_PROCESSOR_NAME).is_file():
        source, where = folder, {}
    else:
        name = backbone if isinstance(backbone, str) else backbone.name_or_path
        source, where = resolve_model_path(name), {"revision": revision, "token": token}
    processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **where)
    # Sizes to resize, to crop and to pad to.
    sizes = [value for value in processor.to_dict().values() if isinstance(value, dict)]
    sides = [side for size in sizes for side in size.values() if isinstance(side, int | float)]
    if max(sides, default=0) > MAX_IMAGE_SIDE:
        raise ValueError(
            f"Found an image processor that makes images of {max(sides):,} pixels a side. At most "
            f"{MAX_IMAGE_SIDE:,} are made. Look at {IMAGE_PROCESSOR_NAME} of the adapter."
        )
    return processor
