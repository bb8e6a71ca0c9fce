"""The folders that the authors of the FGVC sets publish: text lists, and lists in MATLAB files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from .listed import listed_images


def read_birds(folder: Path) -> DatasetDict:
    """Read CUB-200-2011 or NABirds: `images.txt` and three files more map ids of images to path, class and split."""
    paths = _read_pairs(folder / "images.txt")
    classes = _read_pairs(folder / "image_class_labels.txt")
    is_train = _read_pairs(folder / "train_test_split.txt")
    names = _read_pairs(folder / "classes.txt")
    for file, known, needed, is_right in (
        ("image_class_labels.txt", classes, "A number", str.isdecimal),
        ("train_test_split.txt", is_train, "0 (test) or 1 (train)", ("0", "1").__contains__),
    ):
        if unknown := paths.keys() - known.keys():
            raise ValueError(
                f"'{folder / file}' does not know the image '{min(unknown)}' of images.txt. Every image is needed in "
                "it: get the files anew, all from the same release."
            )
        if wrong := [image for image in paths if not is_right(known[image])]:
            raise ValueError(
                f"'{folder / file}' has '{known[wrong[0]]}' for the image '{wrong[0]}'. {needed} is needed: get the "
                "file anew."
            )
    # NABirds' ids have gaps: most of its 1,011 classes are only groups of others.
    ids = sorted({classes[image] for image in paths}, key=int)
    if unknown := [number for number in ids if number not in names]:
        raise ValueError(
            f"'{folder / 'classes.txt'}' does not know the class {unknown[0]} of image_class_labels.txt. Every class "
            "needs its name: get the files anew, all from the same release."
        )
    numbers = {number: position for position, number in enumerate(ids)}
    class_names = _unique([names[number] for number in ids])

    def split(flag: str) -> Dataset:
        chosen = [image for image in paths if is_train[image] == flag]
        files = [folder / "images" / paths[image] for image in chosen]
        return listed_images(files, [numbers[classes[i]] for i in chosen], class_names, f"'{folder / 'images.txt'}'")

    return DatasetDict(train=split("1"), test=split("0"))


def read_flowers(folder: Path) -> DatasetDict:
    """Read Oxford Flowers 102: `imagelabels.mat` has the class of each image, `setid.mat` the images of each split."""
    labels = np.atleast_1d(_read_mat(folder / "imagelabels.mat", "labels"))
    file = folder / "setid.mat"

    def split(key: str) -> Dataset:
        ids = np.atleast_1d(_read_mat(file, key)).astype(int)
        files = [folder / "jpg" / f"image_{number:05d}.jpg" for number in ids]
        if outside := [number for number in ids if not 1 <= number <= len(labels)]:
            raise ValueError(
                f"'{file}' names image {outside[0]}, and imagelabels.mat has {len(labels)}. Both must be of one "
                "release: get them anew."
            )
        names = [str(number) for number in range(1, max(102, int(labels.max())) + 1)]
        return listed_images(files, [int(labels[number - 1]) - 1 for number in ids], names, f"'{file}'")

    return DatasetDict(train=split("trnid"), validation=split("valid"), test=split("tstid"))


def read_cars(folder: Path) -> DatasetDict:
    """Read Stanford Cars: `cars_annos.mat` with `car_ims`, or the older lists with `cars_train` and `cars_test`."""
    together = folder / "cars_annos.mat"
    if together.is_file():
        rows = _read_structs(together, "annotations")
        names = _unique([str(name) for name in np.atleast_1d(_read_mat(together, "class_names"))])
        parts = {
            split: [(folder / str(row["relative_im_path"]), int(row["class"])) for row in rows if row["test"] == flag]
            for split, flag in (("train", 0), ("test", 1))
        }
        sources = dict.fromkeys(parts, together)
    else:
        sources = {
            "train": _first(folder, "devkit/cars_train_annos.mat", "cars_train_annos.mat"),
            "test": _first(folder, "devkit/cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat"),
        }
        parts = {
            split: [
                (_first(folder, f"cars_{split}") / str(row["fname"]), int(row["class"]))
                for row in _read_structs(file, "annotations")
            ]
            for split, file in sources.items()
        }
        meta = _first(folder, "devkit/cars_meta.mat", "cars_meta.mat")
        if meta.is_file():
            names = _unique([str(name) for name in np.atleast_1d(_read_mat(meta, "class_names"))])
        else:
            names = [
                str(number) for number in range(1, 1 + max(label for rows in parts.values() for _, label in rows))
            ]
    return DatasetDict(
        {
            split: listed_images([p for p, _ in rows], [label - 1 for _, label in rows], names, f"'{sources[split]}'")
            for split, rows in parts.items()
        }
    )


def read_dogs(folder: Path) -> DatasetDict:
    """Read Stanford Dogs: `train_list.mat` and `test_list.mat` have paths below `Images` and classes."""
    lists = {split: _first(folder, f"lists/{split}_list.mat", f"{split}_list.mat") for split in ("train", "test")}
    files = {split: [str(p) for p in np.atleast_1d(_read_mat(file, "file_list"))] for split, file in lists.items()}
    labels = {split: np.atleast_1d(_read_mat(file, "labels")).astype(int) for split, file in lists.items()}
    # Folders are called n02085620-Chihuahua, after WordNet.
    names = {int(n): p.partition("/")[0].partition("-")[2] for s in lists for n, p in zip(labels[s], files[s])}
    class_names = _unique([names.get(number, str(number)) for number in range(1, max(names) + 1)])
    return DatasetDict(
        {
            split: listed_images(
                [folder / "Images" / path for path in files[split]], list(labels[split] - 1), class_names, f"'{file}'"
            )
            for split, file in lists.items()
        }
    )


READERS: dict[str, Callable[[Path], DatasetDict]] = {
    "birds": read_birds,
    "flowers": read_flowers,
    "cars": read_cars,
    "dogs": read_dogs,
}


def _read_pairs(file: Path) -> dict[str, str]:
    """Read lines of an id, a space, and the rest."""
    pairs = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        key, _, value = line.strip().partition(" ")
        if key and not value:
            raise ValueError(
                f"Line {number} of '{file}' is '{line}'. An id, a space and a value are needed: get the file anew."
            )
        if key:
            pairs[key] = value.strip()
    return pairs


def _read_mat(file: Path, key: str) -> Any:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            f"Found '{file}' and no SciPy. MATLAB files are read with that package: install it with "
            "`pip install scipy`, or use the variant hub."
        ) from error
    try:
        content = loadmat(file, simplify_cells=True)
    except Exception as error:  # SciPy has no common class for what it finds wrong
        raise ValueError(
            f"'{file}' cannot be read as a MATLAB file ({error}). The file of the official release is "
            "needed: get it anew."
        ) from error
    if key not in content:
        raise ValueError(
            f"'{file}' holds {sorted(name for name in content if not name.startswith('__'))} and no '{key}'. The "
            "file of the official release is needed (the list of test images has a copy without classes): get it anew."
        )
    return content[key]


def _read_structs(file: Path, key: str) -> list[dict[str, Any]]:
    rows = _read_mat(file, key)
    rows = [rows] if isinstance(rows, dict) else list(rows)
    if rows and "class" not in rows[0]:
        raise ValueError(
            f"'{file}' has the fields {sorted(rows[0])} and no 'class'. The list with classes is needed: get "
            "cars_test_annos_withlabels.mat, or cars_annos.mat for both splits."
        )
    return rows


def _first(folder: Path, *names: str) -> Path:
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def _unique(names: list[str]) -> list[str]:
    """Number names that come more than once, because classes need names of their own."""
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
