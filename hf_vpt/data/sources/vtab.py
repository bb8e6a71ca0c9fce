"""VTAB-1k: the prepared archive with its lists, or 1,000 images drawn from the full data sets."""

from __future__ import annotations

import errno
import zipfile
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..cache import cache_folder
from .archives import content_key, extract_folder
from .listed import listed_images
from .shards import CLASS_COLUMN, SHARDS_ON_THE_HUB, has_shards, load_shards, load_shards_from_hub
from .table import VTAB, VTAB_FILE, VTAB_REPO, VTABTask


TRAIN_SIZE, VALIDATION_SIZE = 800, 200
LISTS = {"train": "train800.txt", "validation": "val200.txt", "test": "test.txt"}
# What else a folder of a task holds: the lists of train and validation together.
ALL_LISTS = (*LISTS.values(), "train800val200.txt")


def load_vtab(
    task_name: str, variant: str, data_dir: str | None, revision: str | None, cache_dir: str | None, seed: int
) -> DatasetDict:
    """Load train, validation and test of a task; see `load_benchmark`."""
    task = VTAB[task_name]
    if variant == "full":
        return _draw(task_name, data_dir, revision, cache_dir, seed)
    if data_dir is None:
        path = _download(revision, cache_dir)
    else:
        path = _find_local(Path(data_dir).expanduser(), task)
        _refuse_other_task(path, task_name, {other.folder: name for name, other in VTAB.items()})
    folder = _unpack(path, task, cache_dir) if path.is_file() else path
    names = [str(number) for number in range(task.num_classes)]
    return DatasetDict({split: _read_list(folder / name, names) for split, name in LISTS.items()})


def _download(revision: str | None, cache_dir: str | None) -> Path:
    try:
        return Path(hf_hub_download(VTAB_REPO, VTAB_FILE, repo_type="dataset", revision=revision, cache_dir=cache_dir))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{VTAB_FILE} of {VTAB_REPO} is neither on this disk nor can it be downloaded ({error}). Its 4.66 GB are "
            "needed once: look at the network and at dataset_revision, or pass a copy of the file as dataset_dir."
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"The disk is full, and {VTAB_FILE} of {VTAB_REPO} must go there. Its 4.66 GB, and as much again for the "
            "images of all tasks, are needed: free some space, or set HF_HOME to a folder on another disk.",
        ) from error


def _find_local(path: Path, task: VTABTask) -> Path:
    """Return the archive, or the folder of the task, that a path of the user leads to."""
    if path.is_file():
        return path
    candidates = (path / task.folder, path, path / "vtab-1k" / task.folder)
    for folder in candidates:
        if (folder / LISTS["test"]).is_file() and (folder == candidates[1] or folder.name == task.folder):
            if missing := [name for name in ALL_LISTS if not (folder / name).is_file()]:
                raise FileNotFoundError(_not_vtab(str(path), [f"{task.folder}/{name}" for name in missing]))
            return folder
    if (path / VTAB_FILE).is_file():
        return path / VTAB_FILE
    raise FileNotFoundError(_not_vtab(str(path), [f"{task.folder}/{name}" for name in ALL_LISTS]))


def _refuse_other_task(folder: Path, task_name: str, tasks: dict[str, str]) -> None:
    """Raise if the name of a folder is that of another task, whose classes may well fit in the range of this one."""
    other = tasks.get(folder.resolve().name, task_name)
    if other != task_name:
        raise ValueError(
            f"Found the folder '{folder}' for vtab/{task_name}, and it is that of vtab/{other}. Images and classes "
            "of the task itself are needed: correct dataset_dir, or name the other task as the data set."
        )


def _not_vtab(found: str, missing: list[str]) -> str:
    return (
        f"'{found}' is not VTAB-1k as {VTAB_REPO} has it: {', '.join(missing)} cannot be found. One folder a task, "
        f"with these lists, is needed: pass {VTAB_FILE} or its unpacked folder as dataset_dir, or leave it out to "
        "have it downloaded."
    )


def _unpack(path: Path, task: VTABTask, cache_dir: str | None) -> Path:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"'{path}' is no zip archive ({error}). {VTAB_FILE} of {VTAB_REPO} is needed: download it again."
        ) from error
    with archive:
        names = set(archive.namelist())
        last = f"{task.folder}/{LISTS['test']}"
        # The folder of the task may lie in others, and archives made on a Mac hold a shadow of each file.
        ends = [name for name in names if f"/{name}".endswith(f"/{last}") and not name.startswith("__MACOSX/")]
        prefix = min(ends, key=lambda name: (len(name), name))[: -len(LISTS["test"])] if ends else f"{task.folder}/"
        if missing := [name for name in ALL_LISTS if prefix + name not in names]:
            raise ValueError(_not_vtab(str(path), [f"{task.folder}/{name}" for name in missing]))
        members = [info for info in archive.infolist() if info.filename.startswith(prefix)]
        folder = cache_folder(cache_dir, "vtab-1k") / content_key(members) / task.folder
        return extract_folder(archive, prefix, folder)


def _read_list(file: Path, names: list[str]) -> Dataset:
    paths, labels = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.rpartition(" ")
        if not path or not label.lstrip("-").isdecimal():
            raise ValueError(
                f"Line {number} of '{file}' is '{line}'. 'path label' is needed, with a number as label: correct the "
                "line, or download the data set again."
            )
        paths.append(path.strip())
        labels.append(int(label))
    # Paths begin in the folder of the task or in the one above it.
    base = file.parent
    if paths and not (base / paths[0]).is_file() and (base.parent / paths[0]).is_file():
        base = base.parent
    return listed_images([base / path for path in paths], labels, names, f"'{file}'")


def _draw(task_name: str, data_dir: str | None, revision: str | None, cache_dir: str | None, seed: int) -> DatasetDict:
    task = VTAB[task_name]
    num_values = task.num_values or task.num_classes
    if data_dir is None:
        where, raw = task.full_repo, load_shards_from_hub(task.full_repo, revision, cache_dir, num_values)
    else:
        above = Path(data_dir).expanduser()
        folder = next((f for f in (above / task.full_repo.partition("/")[2], above) if has_shards(f)), None)
        if folder is None:
            raise FileNotFoundError(
                f"'{data_dir}' holds no .tar files. The variant full needs the shards of {task.full_repo}, "
                f"{' and '.join(SHARDS_ON_THE_HUB.values())}: correct dataset_dir, or leave it out to have them "
                "downloaded."
            )
        repos = {other.full_repo.partition("/")[2]: name for name, other in VTAB.items()}
        _refuse_other_task(folder, task_name, repos)
        where, raw = str(folder), load_shards(folder, cache_dir, num_classes=num_values)
    if missing := {"train", "test"} - set(raw):
        raise ValueError(
            f"'{where}' has the splits {sorted(raw)} and no {' or '.join(sorted(missing))}. VTAB-1k draws from the "
            "first and scores on the other: get the missing shards."
        )
    if task.num_values is not None:
        raw = _group_values(raw, task)
    order = np.random.default_rng(seed).permutation(len(raw["train"]))
    if len(order) < TRAIN_SIZE + VALIDATION_SIZE:
        raise ValueError(
            f"'{where}' has {len(order)} training images. VTAB-1k draws {TRAIN_SIZE + VALIDATION_SIZE} of them: get "
            "all shards of the data set."
        )
    return DatasetDict(
        train=raw["train"].select(order[:TRAIN_SIZE]),
        validation=raw["train"].select(order[TRAIN_SIZE : TRAIN_SIZE + VALIDATION_SIZE]),
        test=raw["test"],
    )


def _group_values(raw: DatasetDict, task: VTABTask) -> DatasetDict:
    """Bring the values of a quantity to the bins that are its classes, unless the shards hold the bins themselves."""
    if not all(isinstance(data.features.get(CLASS_COLUMN), ClassLabel) for data in raw.values()):
        return raw  # and classes in another column, about which nothing is known
    values = {
        split: np.array([-1 if value is None else value for value in data[CLASS_COLUMN]])
        for split, data in raw.items()
    }
    is_fine = any(numbers.max(initial=0) >= task.num_classes for numbers in values.values())
    num_values = task.num_values if is_fine else task.num_classes
    feature = ClassLabel(names=[str(number) for number in range(task.num_classes)])
    return DatasetDict(
        {
            # A value of -1 stays one: an image without a class.
            split: data.remove_columns(CLASS_COLUMN).add_column(
                CLASS_COLUMN, values[split] * task.num_classes // num_values, feature=feature
            )
            for split, data in raw.items()
        }
    )
