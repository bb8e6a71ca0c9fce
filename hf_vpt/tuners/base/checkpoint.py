"""A look at an adapter file before anything is done with it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ...hub.files import MAX_WEIGHTS_BYTES, fetch


if TYPE_CHECKING:
    from .config import PromptConfig


# Number formats by their names in a safetensors file; others have no place in an adapter.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def verify_checkpoint(
    config: PromptConfig, model_id: str, subfolder: str | None = None, **kwargs: Any
) -> dict[str, tuple[int, ...]]:
    """Refuses an adapter file that cannot be what its config says.

    Names, shapes and number formats stand in the file's header and are checked before any tensor is read.

    Args:
        config: The config that was saved with the weights.
        model_id: Folder or Hub repository of the adapter.
        subfolder: Folder below it.
        kwargs: Download arguments of PEFT (`revision`, `token`, `cache_dir`, …).

    Returns:
        Shape of each tensor in the file by its name in the model; empty where there is no file.

    Raises:
        ValueError: If the file is too large, no safetensors file or a truncated one, holds a number that is not
            finite, or if a tensor is missing, unknown or of another shape or format than the config makes it.
    """
    file = _weights_file(config, model_id, subfolder, **kwargs)
    if file is None:
        return {}
    if config.token_dim is None or config.num_layers is None:
        raise ValueError(
            f"Found token_dim={config.token_dim} and num_layers={config.num_layers} in the configuration beside "
            f"{file}. Both are filled in before an adapter is saved, and without them its weights cannot be checked. "
            "Save the adapter again with `save_pretrained`."
        )
    try:
        with safe_open(file, framework="pt") as weights:
            headers = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118 (no dict)
            outlines = {key: _outline(key, header, file) for key, header in headers.items()}
            verify_outlines(config, outlines, source=file)
            verify_values(config, {key: weights.get_tensor(key) for key in outlines}, source=file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Found an adapter file that cannot be read: {file} ({error}). Loading needs a whole safetensors file. "
            "Download or save the adapter again."
        ) from error
    return {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in outlines.items()}


def _outline(key: str, header: Any, file: str) -> torch.Tensor:
    """A tensor of the shape and number format that a file announces, without numbers."""
    dtype = _DTYPES.get(header.get_dtype())
    if dtype is None:
        raise ValueError(
            f"Found {key} with numbers of the format {header.get_dtype()} in {file}. Adapters hold "
            f"{', '.join(_DTYPES)}. Save the adapter again with `save_pretrained`."
        )
    return torch.empty(header.get_shape(), dtype=dtype, device="meta")


def verify_tensors(config: PromptConfig, tensors: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Refuses tensors, named as in the model, that the config does not make or that are not finite."""
    # What PEFT adds to the names in a file. Those of other adapters, and of the base model's own head, stay strange.
    own = f".modules_to_save.{adapter_name}."
    tensors = {key.replace(own, ".", 1): tensor for key, tensor in tensors.items()}
    verify_outlines(config, tensors, "the state dict")
    verify_values(config, tensors, "the state dict")


def verify_outlines(config: PromptConfig, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Refuses names, shapes and number formats of tensors that the config does not make; looks at no number.

    Names are those in an adapter file.
    """
    names = config.modules_to_save or ()
    missing = [name for name in names if not any(_is_in(name, key) for key in tensors)]
    if missing:
        raise ValueError(
            f"Found no tensors of the head {missing[0]!r} in {source}, but the adapter's config lists it in "
            "modules_to_save. Predictions need the trained head. Save the adapter again with `save_pretrained`, "
            "or set modules_to_save to [] in its config to use the base model's head."
        )
    # Weights of the backbone, say, which would be written into it.
    strange = [key for key in tensors if not _is_prompt(config, key) and not any(_is_in(name, key) for name in names)]
    if strange:
        raise ValueError(
            f"Found {len(strange)} tensors in {source} that are neither prompts nor listed in modules_to_save: "
            f"{', '.join(sorted(strange)[:3])}. An adapter holds nothing else. Save it again with `save_pretrained`."
        )
    expected = _expected(config)
    if expected is None:
        return  # never injected: the config was saved by itself, so there is nothing to compare with
    found = _by_block(config, tensors)
    expected = {
        f"block {index}, {name}": tensor
        for index, module in expected.items()
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
    formats = [name for name in found if found[name].is_floating_point() != expected[name].is_floating_point()]
    if formats:
        raise ValueError(
            f"Found {formats[0]} with numbers of the format {found[formats[0]].dtype} in {source}, where the config "
            f"makes {expected[formats[0]].dtype}. File and config must come from the same adapter. Save or download "
            "both again."
        )


def verify_values(config: PromptConfig, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Refuses numbers that are not finite or that the prompts cannot have, in tensors of the right shapes."""
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"Found numbers that are not finite in {source}: {', '.join(sorted(broken)[:3])}. An adapter needs finite "
            "weights. Train it again with a smaller learning rate, or load an earlier checkpoint."
        )
    found = _by_block(config, tensors)
    for index, module in (_expected(config) or {}).items():
        module.check_tensors({name: found[f"block {index}, {name}"] for name in module.state_dict()})


def _is_in(name: str, key: str) -> bool:
    """Whether a tensor belongs to a module that is saved whole, and not to PEFT's wrapper around it."""
    path, _, rest = f".{key}".partition(f".{name}.")
    return bool(rest) and not {"modules_to_save", "original_module"} & set(f"{path}.{rest}".split("."))


def _marker(config: PromptConfig) -> str:
    """What stands in a tensor's name between the path of its block and its name in the prompts."""
    return f".{PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].prefix}prompts."


def _is_prompt(config: PromptConfig, key: str) -> bool:
    path, marker, _ = key.partition(_marker(config))
    # A number for the block, and one for its stage where there are stages.
    return bool(marker) and sum(part.isdecimal() for part in path.split(".")) >= (1 if config.depths is None else 2)


def _expected(config: PromptConfig) -> dict[int, nn.Module] | None:
    """The prompts that a config makes, by block, as shapes alone; None for one that does not know its model yet."""
    if config.token_dim is None or config.num_layers is None:
        return None
    with torch.device("meta"):
        return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].make_all_prompts(config)


def _by_block(config: PromptConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of prompts under the number of their block and their name in it.

    Keys look like base_model.model.vit.layers.3.<prefix>prompts.<tensor>; the block and what follows count.
    """
    found, marker = {}, _marker(config)
    for key, tensor in tensors.items():
        path, is_prompt, rest = key.partition(marker)
        if is_prompt and (config.token_dim is not None and config.num_layers is not None):
            found[f"block {config.block_index(path)}, {rest}"] = tensor
    return found


def _weights_file(config: PromptConfig, model_id: str, subfolder: str | None, **kwargs: Any) -> str | None:
    """Path of the adapter's weights; None where there are none (yet), which is PEFT's to report."""
    folder = os.path.join(model_id, subfolder) if subfolder else model_id
    if os.path.isfile(os.path.join(folder, WEIGHTS_NAME)) and not os.path.isfile(
        os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    ):
        _refuse_pickle(folder)
    download, _, _ = config._split_kwargs(kwargs)
    where = {"max_bytes": MAX_WEIGHTS_BYTES, "subfolder": subfolder, **download}
    file = fetch(model_id, SAFETENSORS_WEIGHTS_NAME, **where)
    if file is None and not os.path.isdir(folder) and fetch(model_id, WEIGHTS_NAME, **where) is not None:
        _refuse_pickle(model_id)
    return None if file is None else str(file)


def _refuse_pickle(where: str) -> None:
    raise ValueError(
        f"Found {WEIGHTS_NAME} and no {SAFETENSORS_WEIGHTS_NAME} in {where}. No pickle is loaded. Save the adapter "
        "again with `save_pretrained`."
    )
