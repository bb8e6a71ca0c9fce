"""Which columns of a data set hold images and classes, and classes brought to numbers from 0 on."""

from __future__ import annotations

from typing import Any

import datasets
from datasets import ClassLabel, DatasetDict, Image, IterableDatasetDict, Value


# Tried, in this order, where no column or more than one could hold the labels by its type alone.
LABEL_COLUMN_NAMES = ("label", "labels", "class", "target", "cls")
# Types of values, beside integers, that may be classes.
_WORDS = ("string", "large_string", "bool")


def select_image_and_label(
    splits: DatasetDict | IterableDatasetDict, image_column: str | None, label_column: str | None, name: str
) -> DatasetDict | IterableDatasetDict:
    """Keep the columns of images and classes alone, under the names image and label.

    Raises:
        ValueError: A column does not exist or cannot be found, or a stream does not know its columns.
    """
    features = splits["train"].features
    if features is None:
        raise ValueError(
            f"Data set '{name}' does not say which columns it streams. Types of columns and names of classes are "
            "needed before the first image is read: save it as parquet with `datasets`, or leave streaming out."
        )
    image_column = image_column or find_image_column(features, name)
    label_column = label_column or find_label_column(features, image_column, name)
    for split, data in splits.items():
        _check_columns(data.features or features, image_column, label_column, f"Data set '{name}', {split} split")
    names = {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    return type(splits)(
        {
            split: data.select_columns([image_column, label_column]).rename_columns(names)
            for split, data in splits.items()
        }
    )


def _check_columns(features: datasets.Features, image_column: str, label_column: str, where: str) -> None:
    for column in (image_column, label_column):
        if column not in features:
            raise ValueError(
                f"{where}: there is no column '{column}' among {describe(features)}. Both image_column and "
                "label_column must name existing columns: correct the name, or leave it out to have it found."
            )
    if not _may_be_images(features[image_column]):
        raise ValueError(
            f"{where}: '{image_column}' holds no images; there are {describe(features)}. A column of images, or "
            "of their paths, is needed: name another one with image_column."
        )
    if not _may_be_classes(features[label_column]):
        raise ValueError(
            f"{where}: '{label_column}' holds no classes; there are {describe(features)}. Class labels, strings, "
            "integers or booleans, one an image, are needed: name another column with label_column."
        )


def describe(features: datasets.Features) -> str:
    return ", ".join(f"'{column}' ({type(feature).__name__})" for column, feature in features.items())


def find_image_column(features: datasets.Features, name: str) -> str:
    candidates = [column for column, feature in features.items() if isinstance(feature, Image)]
    if len(candidates) == 1:
        return candidates[0]
    raise ValueError(
        f"Data set '{name}' has {len(candidates)} columns of type Image among {describe(features)}. One column of "
        "images is needed: name it with image_column."
    )


def find_label_column(features: datasets.Features, image_column: str, name: str) -> str:
    by_type = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    if not by_type:
        by_type = [column for column, type_ in features.items() if column != image_column and _may_be_classes(type_)]
    if len(by_type) == 1:
        return by_type[0]
    by_name = [column for column in LABEL_COLUMN_NAMES if column in by_type]
    if len(by_name) == 1:
        return by_name[0]
    if not by_type:
        raise ValueError(
            f"Data set '{name}' has no column that could hold the classes; it has {describe(features)}. Class labels, "
            "strings, integers or booleans, one an image, are needed: add a column such as 'label', or, in a folder "
            "of images, one subfolder for each of at least two classes."
        )
    raise ValueError(
        f"Data set '{name}' has {len(by_type)} columns that could hold the classes ({by_type}) among "
        f"{describe(features)}. One column is needed: name it with label_column."
    )


def encode_labels(splits: DatasetDict, name: str) -> DatasetDict:
    """Turn strings, integers and booleans into class labels, with the same numbers in every split.

    Raises:
        ValueError: A split has other class names than the train split, or labels of another type.
    """
    label = splits["train"].features["label"]
    for split, data in splits.items():
        expected, found = _kind(label), _kind(data.features["label"])
        if found != expected:
            raise ValueError(
                f"Data set '{name}' has the labels {found} in its {split} split and {expected} in its train split. A "
                "number must mean the same class in every split: save all with one list of names, in one order."
            )
    if isinstance(label, ClassLabel):
        return splits
    values = {value for data in splits.values() for value in data.unique("label")} - {None}
    # Integers are sorted as numbers: as text, class 10 would stand before class 2.
    names = [str(value) for value in sorted(values)]
    if label.dtype == "bool":
        names = [text.lower() for text in names]  # as Arrow writes them
    return splits.cast_column("label", Value("string")).cast_column("label", ClassLabel(names=names))


def _kind(label: ClassLabel | Value) -> list[str] | str:
    """What must be the same in all splits: names of classes, or whether labels are numbers or words."""
    if isinstance(label, ClassLabel):
        return label.names
    return "integers" if "int" in label.dtype else label.dtype.removeprefix("large_")


def _may_be_classes(feature: Any) -> bool:
    if isinstance(feature, ClassLabel):
        return True
    return isinstance(feature, Value) and (feature.dtype in _WORDS or "int" in feature.dtype)


def _may_be_images(feature: Any) -> bool:
    # Where nobody said that they are images, they come as bytes, paths, both in a structure, or lists of pixels.
    if not isinstance(feature, Value):
        return not isinstance(feature, ClassLabel)
    return feature.dtype.removeprefix("large_") in ("string", "binary")
