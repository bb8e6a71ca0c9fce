"""A look at an adapter file before anything is done with it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


if TYPE_CHECKING:
    from .config import PromptConfig


def verify_checkpoint(
    config: PromptConfig, model_id: str, subfolder: str | None = None, **kwargs: Any
) -> dict[str, tuple[int, ...]]:
    """Refuses an adapter file that cannot be what its config says.

    Args:
        config: The config that was saved with the weights.
        model_id: Folder or Hub repository of the adapter.
        subfolder: Folder below it.
        kwargs: Download arguments of PEFT (`revision`, `token`, `cache_dir`, …).

    Returns:
        Shape of each tensor in the file by its name in the model; empty where there is no file.

    Raises:
        ValueError: If the file is no safetensors file or a truncated one, holds a number that is not finite, or if a
            tensor is missing, unknown or of another shape than the config makes it.
    """
    file = _weights_file(config, model_id, subfolder, **kwargs)
    if file is None:
        return {}
    try:
        with safe_open(file, framework="pt") as weights:
            tensors = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Found an adapter file that cannot be read: {file} ({error}). Loading needs a whole safetensors file. "
            "Download or save the adapter again."
        ) from error
    verify_tensors(config, tensors, source=file)
    return {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in tensors.items()}


def verify_tensors(config: PromptConfig, tensors: dict[str, torch.Tensor], source: str = "the state dict") -> None:
    """Refuses tensors, named as in an adapter file, that the config does not make or that are not finite."""
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"Found numbers that are not finite in {source}: {', '.join(sorted(broken)[:3])}. An adapter needs finite "
            "weights. Train it again with a smaller learning rate, or load an earlier checkpoint."
        )
    for name in config.modules_to_save or ():
        if not any(f".{name}." in f".{key}" for key in tensors):
            raise ValueError(
                f"Found no tensors of the head {name!r} in {source}, but the adapter's config lists it in "
                "modules_to_save. Predictions need the trained head. Save the adapter again with `save_pretrained`, "
                "or set modules_to_save to [] in its config to use the base model's head."
            )
    if config.token_dim is None or config.num_layers is None:
        return  # never injected: the config was saved by itself, so there is nothing to compare with
    prefix = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].prefix
    # Keys look like base_model.model.vit.layers.3.<prefix>prompts.<tensor>; the block and what follows count.
    found = {}
    for key, tensor in tensors.items():
        path, marker, rest = key.partition(f".{prefix}prompts.")
        if marker:
            found[f"block {config.block_index(path)}, {rest}"] = tensor
    with torch.device("meta"):  # shapes alone
        prompts = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].make_all_prompts(config)
    expected = {
        f"block {index}, {name}": tensor
        for index, module in prompts.items()
        for name, tensor in module.state_dict().items()
    }
    shapes = [{name: tuple(tensor.shape) for name, tensor in group.items()} for group in (found, expected)]
    wrong = sorted(name for name in found.keys() | expected.keys() if shapes[0].get(name) != shapes[1].get(name))
    if wrong:
        listed = "; ".join(f"{name}: {shapes[0].get(name)} instead of {shapes[1].get(name)}" for name in wrong[:3])
        raise ValueError(
            f"Found {len(wrong)} tensors in {source} that do not fit the adapter's config: {listed}. File and config "
            "must come from the same adapter. Save or download both again."
        )
    for index, module in prompts.items():
        module.check_tensors({name: found[f"block {index}, {name}"] for name in module.state_dict()})


def _weights_file(config: PromptConfig, model_id: str, subfolder: str | None, **kwargs: Any) -> str | None:
    """Path of the adapter's weights; None where there are none (yet), which is PEFT's to report."""
    folder = os.path.join(model_id, subfolder) if subfolder else model_id
    if os.path.isdir(folder):
        file = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if not os.path.isfile(file) and os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
            raise ValueError(
                f"Found {WEIGHTS_NAME} and no {SAFETENSORS_WEIGHTS_NAME} in {folder}. No pickle is loaded. Save the "
                "adapter again with `save_pretrained`."
            )
        return file if os.path.isfile(file) else None
    download_kwargs, _, _ = config._split_kwargs(kwargs)
    try:
        return hf_hub_download(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **download_kwargs)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None
