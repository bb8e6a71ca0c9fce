"""The fine-grained sets of FGVC, from the Hub or from the folders their authors publish."""

from __future__ import annotations

from pathlib import Path

from datasets import DatasetDict, load_dataset

from .official import READERS
from .table import FGVC, FGVCSet


def load_fgvc(
    set_name: str, variant: str, data_dir: str | None, revision: str | None, cache_dir: str | None
) -> DatasetDict:
    """Load the published splits of a set; see `load_benchmark`."""
    fgvc_set = FGVC[set_name]
    if variant == "official":
        return READERS[fgvc_set.layout](_find_folder(Path(data_dir).expanduser(), fgvc_set, set_name))
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


def _missing(folder: Path, fgvc_set: FGVCSet) -> list[str]:
    return [names[0] for names in fgvc_set.needed if not any((folder / name).exists() for name in names)]
