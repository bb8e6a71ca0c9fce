"""From the splits that a data set publishes to train, validation and test."""

from __future__ import annotations

from collections import Counter

from datasets import Dataset, DatasetDict, IterableDatasetDict
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Names under which data sets publish their splits. What stands in none of the rows is left aside.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def rename_splits(raw: DatasetDict | IterableDatasetDict, name: str) -> DatasetDict | IterableDatasetDict:
    known = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in aliases}
    splits = type(raw)({known[split]: data for split, data in raw.items() if split in known})
    if ignored := sorted(set(raw) - set(known)):
        logger.warning(f"Data set '{name}': the splits {ignored} are not used.")
    if "train" not in splits:
        raise ValueError(
            f"Data set '{name}' has the splits {sorted(raw)}. One called train is needed: rename the folder or split "
            "that holds the training images, or pass the config_name that has one."
        )
    return splits


def drop_unlabelled(splits: DatasetDict, name: str) -> DatasetDict:
    for split in ("validation", "test"):
        if split in splits and all(label in (None, -1) for label in splits[split].unique("label")):
            logger.warning(f"Data set '{name}': the {split} split has no labels and is not used.")
            del splits[split]
    return splits


def complete_splits(
    splits: DatasetDict, validation_fraction: float, test_fraction: float, seed: int, name: str
) -> DatasetDict:
    train, validation, test = (splits.get(split) for split in ("train", "validation", "test"))
    if test is None and validation is not None:
        # Published scores are measured on this split, so it must not choose epochs or hyper-parameters here.
        test, validation = validation, None
    elif test is None:
        train, test = stratified_split(train, test_fraction, seed, name)
    if validation is None:
        train, validation = stratified_split(train, validation_fraction, seed, name)
    return DatasetDict(train=train, validation=validation, test=test)


def stratified_split(data: Dataset, fraction: float, seed: int, name: str) -> tuple[Dataset, Dataset]:
    try:
        parts = data.train_test_split(test_size=fraction, stratify_by_column="label", seed=seed)
    except ValueError as error:
        counts = Counter(data["label"])
        names = data.features["label"].names
        smallest = min(counts, key=counts.get)
        raise ValueError(
            f"Data set '{name}': {fraction:g} of {len(data)} images in {len(counts)} classes cannot be set aside with "
            f"every class in both parts (smallest class: '{names[smallest]}', {counts[smallest]}). At least two "
            "images a class, and one a class in the part set aside, are needed: provide validation and test folders, "
            f"or a larger fraction. ({error})"
        ) from error
    return parts["train"], parts["test"]
