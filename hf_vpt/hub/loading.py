"""From the name of an adapter to a classifier that is ready to use."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..classifiers import load_backbone, load_classifier_config, resolve_model_path
from ..demo import DEMO, demo_backbone_path
from .files import MAX_JSON_BYTES, MAX_WEIGHTS_BYTES, fetch


LABELS_FILE = "id2label.json"
MAX_IMAGE_SIDE = 4096


def load_image_classifier(
    adapter: str | os.PathLike,
    *,
    into: PeftModel | None = None,
    adapter_name: str = "default",
    base_model: str | PreTrainedModel | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> tuple[PeftModel, BaseImageProcessor]:
    """Load an adapter with its backbone, its head, the names of its classes and its image processor.

    What comes from a repository is data: weights are read from safetensors files alone, no code is run, sizes and
    shapes are checked first. Of the adapter's repository, four files are fetched, of one commit.

    Args:
        adapter: Folder or Hub id of the adapter.
        into: A model that this function has returned, for another adapter on the same backbone and of the same method;
            it stays at the adapter that is active, and `set_adapter` or `adapter_names` choose.
        adapter_name: What the model is to call the adapter.
        base_model: Folder, Hub id or model to load it on. Default: the one that the adapter names, at the revision
            that it was trained on.
        revision: Branch, tag or commit of the adapter's repository.
        subfolder: Folder of the adapter in it, such as `"ema"`.
        token: Access token for the Hub. Default: the one that was stored at login.
        dtype: Number format of the backbone. Prompts and head stay in float32.
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

    folder = _fetch_adapter(adapter, revision, subfolder, token)
    config = _read_config(folder)
    # A prompt adapter knows the names of its classes and brings a head of its own size.
    label_names = None if getattr(config, "label_names", None) else read_label_names(folder)
    base_revision = config.revision if base_model is None else None
    if into is not None:
        _check_fits_beside(config, adapter_name, into)
        into.load_adapter(folder, adapter_name)
        model = into.eval()
    else:
        backbone = base_model or _named_backbone(config, is_local=Path(adapter).is_dir())
        if isinstance(backbone, str):
            base_config = load_classifier_config(backbone, label_names, base_revision, token=token)
            kwargs = {"token": token, "dtype": dtype, "attn_implementation": attn_implementation}
            with _without_load_report():
                backbone = load_backbone(backbone, base_config, base_revision, use_safetensors=True, **kwargs)
        model = PeftModel.from_pretrained(backbone, folder, adapter_name).eval()
    # Pipelines complain of models whose class they do not find here.
    SUPPORTED_PEFT_TASKS.setdefault("image-classification", ["PeftModel"])
    return model, _load_processor(folder, model, base_revision, token)


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
        fetch(adapter, name, max_bytes=MAX_JSON_BYTES, revision=revision, **where)
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
        if config.peft_type is None:
            raise KeyError("peft_type")
        if config.base_model_name_or_path == DEMO:
            config.base_model_name_or_path = demo_backbone_path()
        return config
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"Found {CONFIG_NAME} in {folder} that is no configuration of an adapter ({error!r}). A PEFT adapter of a "
            "known method is needed: save the adapter again with `save_pretrained`."
        ) from error


def read_label_names(folder: str | Path) -> list[str] | None:
    """The names of the classes in a file beside an adapter, in the order of their numbers; None without the file."""
    file = Path(folder) / LABELS_FILE
    if not file.is_file():
        return None
    names = json.loads(file.read_text(encoding="utf-8"))
    return [names[str(number)] for number in range(len(names))]


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


def _check_fits_beside(config: PeftConfig, adapter_name: str, model: PeftModel) -> None:
    """Raises `ValueError` if an adapter cannot be one more of a model."""
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
    folder: Path, model: PeftModel, base_revision: str | None, token: str | bool | None
) -> BaseImageProcessor:
    if (folder / IMAGE_PROCESSOR_NAME).is_file():
        processor = AutoImageProcessor.from_pretrained(folder)
    else:
        backbone = resolve_model_path(model.get_base_model().name_or_path)
        processor = AutoImageProcessor.from_pretrained(backbone, revision=base_revision, token=token)
    settings = processor.to_dict()
    sides = [side for field in ("size", "crop_size") for side in (settings.get(field) or {}).values() if side]
    if max(sides, default=0) > MAX_IMAGE_SIDE:
        raise ValueError(
            f"Found an image processor that makes images of {max(sides):,} pixels a side. At most "
            f"{MAX_IMAGE_SIDE:,} are made. Look at {IMAGE_PROCESSOR_NAME} of the adapter."
        )
    return processor
