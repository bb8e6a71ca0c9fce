"""Checkpoints that can be trusted: marked once they are whole, with the state of callbacks that learn."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, runtime_checkable

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

MANIFEST_FILE = "manifest.json"
CALLBACKS_FILE = "callbacks.pt"


@runtime_checkable
class StatefulCallback(Protocol):
    """A callback whose state belongs into checkpoints: numbers, strings and tensors, in dictionaries and lists.

    `transformers.ExportableState` holds no tensors and makes a new callback when a run resumes; this one is filled.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_callbacks(callbacks: Iterable[Any], folder: str | Path) -> None:
    """Write the state of those callbacks that have one: a list for each class, in the callbacks' order.

    Raises:
        ValueError: A state holds what cannot be read again without running code.
    """
    states: dict[str, list[dict[str, Any]]] = {}
    for callback in callbacks:
        if isinstance(callback, StatefulCallback):
            states.setdefault(type(callback).__name__, []).append(callback.state_dict())
    file = Path(folder) / CALLBACKS_FILE
    torch.save(states, file)
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"Found a state_dict, of one of the callbacks {list(states)}, that cannot be read again. It may hold "
            f"numbers, strings and tensors in dictionaries and lists: change what it returns. ({error})"
        ) from error


def load_callbacks(callbacks: Iterable[Any], folder: str | Path) -> None:
    """Fill callbacks from a checkpoint; those it knows nothing of are left as they are.

    Nothing in the file is executed: only tensors and plain values are read.
    """
    file = Path(folder) / CALLBACKS_FILE
    if not file.is_file():
        return
    states = torch.load(file, map_location="cpu", weights_only=True)
    for callback in callbacks:
        if isinstance(callback, StatefulCallback) and states.get(type(callback).__name__):
            callback.load_state_dict(states[type(callback).__name__].pop(0))


def mark_incomplete(folder: str | Path) -> None:
    """Take the mark away from a checkpoint that is about to be written once more."""
    (Path(folder) / MANIFEST_FILE).unlink(missing_ok=True)


def mark_complete(folder: str | Path) -> None:
    """Note the size of every file of a checkpoint.

    Written last, and in one go: where it exists they all do, whenever the process was killed. After a power failure
    some of them may be cut off, which their sizes tell.
    """
    folder = Path(folder)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in _files(folder)}
    write_whole(folder / MANIFEST_FILE, json.dumps(sizes, indent=2))


def write_whole(file: Path, text: str) -> None:
    """Write a text file in one go: whenever the process is killed, the old or the new one is there."""
    draft = file.with_name(f"{file.name}.draft")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)


def is_complete(folder: str | Path) -> bool:
    """Whether all files of a checkpoint are there as they were when it was marked, so that a run can go on from it."""
    folder = Path(folder)
    try:
        sizes = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, latest first, whether they are whole or not."""
    number = len(PREFIX_CHECKPOINT_DIR) + 1
    folders = [folder for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir()]
    steps = {folder: int(folder.name[number:]) for folder in folders if folder.name[number:].isdecimal()}
    return sorted(steps, key=steps.get, reverse=True)


def checkpoint_to_resume(wanted: str | bool | None, output_dir: str | Path) -> str | None:
    """Return the checkpoint to go on from.

    Args:
        wanted: Its folder; `True`, `"true"` or `"last"` for the latest one that was written to its end; `"auto"` for
            that or none; None for none.
        output_dir: Where the run's checkpoints are.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The folder was not written to its end.
    """
    word = str(wanted).lower()
    if word not in ("true", "last", "auto"):
        if wanted and not Path(wanted).is_dir():
            raise FileNotFoundError(
                f"There is no folder '{wanted}'. A run goes on from a checkpoint's folder, or from 'last' or 'auto' "
                "in its output_dir: correct resume_from_checkpoint."
            )
        if wanted and not is_complete(wanted):
            raise ValueError(
                f"'{wanted}' was not written to its end, or not by an ImageClassificationTrainer. A run needs all of "
                "a checkpoint to go on: name another one, or 'last' for the latest that is whole."
            )
        return wanted or None
    for checkpoint in find_checkpoints(output_dir):
        if is_complete(checkpoint):
            logger.warning(f"Going on from '{checkpoint}'.")
            return str(checkpoint)
        logger.warning(f"'{checkpoint}' was not written to its end and is passed over.")
    if word == "auto":
        return None
    raise FileNotFoundError(
        f"'{output_dir}' holds no checkpoint that was written to its end. resume_from_checkpoint: {wanted} needs one "
        "there: correct output_dir, or use auto, which starts anew where there is none."
    )


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(MANIFEST_FILE))
