"""The fine-grained sets of FGVC, from the Hub or from the folders their authors publish."""

from __future__ import annotations

from pathlib import Path

from datasets import DatasetDict, load_dataset
from transformers.utils import logging

from .official import READERS
from .split_lists import load_split_lists
from .table import FGVC, FGVCSet


logger = logging.get_logger(__name__)


def load_fgvc(
    set_name: str, variant: str, data_dir: str | None, revision: str | None, cache_dir: str | None
) -> DatasetDict:
    """Load the published splits of a set; see `load_benchmark`."""
    fgvc_set = FGVC[set_name]
    if variant in ("official", "lists"):
        folder = Path(data_dir).expanduser()
        if variant == "official":
            splits = READERS[fgvc_set.layout](_find_folder(folder, fgvc_set, set_name))
        else:
            splits = load_split_lists(folder, set_name)
        _check_number_of_classes(splits, set_name, folder)
        return splits
    raw = load_dataset(fgvc_set.repo, revision=revision, cache_dir=cache_dir)
    # Some repositories hold corrupted or blurred copies of the test images as further splits.
    splits = DatasetDict({split: raw[split] for split in ("train", "validation", "test") if split in raw})
    if missing := {"train", "test"} - set(splits):
        raise ValueError(
            f"'{fgvc_set.repo}' has the splits {sorted(raw)} and no {' or '.join(sorted(missing))}. A benchmark needs "
            "both: pass the dataset_revision that has them, or the authors' folder as dataset_dir."
        )
    return splits


def _find_folder(path: Path, fgvc_set: FGVCSet, name: str) -> Path:
    """Return the folder of a set: the path itself, or its only subfolder that has the set's files."""
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is no folder '{path}'. fgvc/{name} needs the folder that its authors publish, unpacked: correct "
            "dataset_dir."
        )
    missing = _missing(path, fgvc_set)
    if not missing:
        return path
    inner = [folder for folder in path.iterdir() if folder.is_dir() and not _missing(folder, fgvc_set)]
    if len(inner) == 1:
        return inner[0]
    raise FileNotFoundError(
        f"'{path}' is not fgvc/{name} as its authors publish it: {', '.join(missing)} cannot be found. All of the "
        "official files are needed: unpack them to this folder, or correct dataset_dir."
    )


def _check_number_of_classes(splits: DatasetDict, name: str, folder: Path) -> None:
    """Tell another set in the same layout by its classes: CUB and NABirds have one, and VPT's lists are all alike."""
    found, needed = splits["train"].features["label"].num_classes, FGVC[name].num_classes
    if found == needed:
        return
    if other := next((other for other, fgvc_set in FGVC.items() if fgvc_set.num_classes == found), None):
        raise ValueError(
            f"'{folder}' has {found} classes, as fgvc/{other} has. The {needed} classes of fgvc/{name} are needed: "
            "correct dataset_dir, or name the other set as the data set."
        )
    logger.warning(
        f"'{folder}' has {found} classes, and fgvc/{name} as published has {needed}: scores on it cannot be "
        "compared with published ones."
    )


def _missing(folder: Path, fgvc_set: FGVCSet) -> list[str]:
    return [names[0] for names in fgvc_set.needed if not any((folder / name).exists() for name in names)]
