"""From the splits that a data set publishes to train, validation and test."""

from __future__ import annotations

from collections import Counter

import numpy as np
from datasets import Dataset, DatasetDict, IterableDatasetDict
from transformers.utils import logging

from .decoding import IMAGES_AT_ONCE, BrokenImages, readable, undecoded


logger = logging.get_logger(__name__)

# Classes that an error names.
MOST_NAMED = 10

# Names under which data sets publish their splits. What stands in none of the rows is left aside.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in aliases}


def rename_splits(raw: DatasetDict | IterableDatasetDict, name: str) -> DatasetDict | IterableDatasetDict:
    splits, ignored = type(raw)(), set(raw)
    for split, aliases in SPLIT_NAMES.items():
        # Of several names for one split, such as test and eval, the first one in the table.
        if found := next((alias for alias in aliases if alias in raw), None):
            splits[split] = raw[found]
            ignored.remove(found)
    if ignored:
        logger.warning(f"Data set '{name}': the splits {sorted(ignored)} are not used.")
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


def check_classes(splits: DatasetDict, name: str, may_lack_classes: bool = False) -> None:
    """Look at the class of every image, before anything is trained.

    Args:
        splits: Labelled splits.
        name: Name of the data set.
        may_lack_classes: Warn, instead of refusing, where a class has no image to train on: of 1,000 images that
            VTAB-1k publishes, some tasks have none for a class.

    Raises:
        ValueError: An image has no class, or one outside those that have names, or a class has no image in train.
    """
    names = splits["train"].features["label"].names
    for split, data in splits.items():
        labels = set(data.unique("label"))
        if wrong := [label for label in labels if label is None or not 0 <= label < len(names)]:
            index = data["label"][:].index(wrong[0])
            raise ValueError(
                f"Data set '{name}': image {index} of the {split} split has the class {wrong[0]}. Classes from 0 to "
                f"{len(names) - 1} are needed for every image: correct the labels, or leave such images out."
            )
        if split == "train" and len(labels) < len(names):
            missing = [f"'{title}'" for number, title in enumerate(names) if number not in labels]
            found = f"Data set '{name}' has no training images of {len(missing)} of its {len(names)} classes: "
            found += ", ".join(missing[:MOST_NAMED]) + (", ..." if len(missing) > MOST_NAMED else "")
            if may_lack_classes:
                logger.warning(f"{found}. They cannot be learned.")
                continue
            raise ValueError(
                f"{found}. Each class needs some: add images to the train split, or leave the class out of the names "
                "and the other splits."
            )


def take_from_each_class(
    data: Dataset, number: int, seed: int, where: str, broken_images: BrokenImages = "stop"
) -> Dataset:
    """Keep a number of images of each class, drawn by a seed; those of a smaller number are among those of a larger.

    Args:
        data: A split.
        number: Images of each class, at least 1.
        seed: Decides which.
        where: The split's name, for error messages.
        broken_images: With `"skip"`, images are decoded until there are so many of each class that can be read. Those
            found broken on the way are kept beside them, for `AugmentedImages` to leave out and count.

    Raises:
        ValueError: A class has fewer images.
    """
    if number < 1:
        raise ValueError(f"Found {number} images a class. At least 1 is needed: correct images_per_class.")
    names, labels = data.features["label"].names, np.asarray(data["label"][:])
    order = np.random.default_rng(seed).permutation(len(labels))
    drawn = [order[labels[order] == label] for label in range(len(names))]
    counts, kind = [len(rows) for rows in drawn], "images"
    if broken_images == "skip":
        drawn, counts = zip(*(_until_readable(data, rows, number) for rows in drawn))
        kind = "images that can be read"
    else:
        drawn = [rows[:number] for rows in drawn]
    if min(counts) < number:
        few = [f"'{title}' ({count})" for title, count in zip(names, counts) if count < number]
        raise ValueError(
            f"{where} has fewer than {number} {kind} of {len(few)} of its {len(names)} classes: "
            f"{', '.join(few[:MOST_NAMED])}{', ...' if len(few) > MOST_NAMED else ''}. images_per_class needs that "
            "many of each class: ask for fewer, or add images."
        )
    return data.select(np.sort(np.concatenate(drawn)))


def _until_readable(data: Dataset, rows: np.ndarray, number: int) -> tuple[np.ndarray, int]:
    """Return the first rows, as many as it takes to have so many images that can be read, and how many can."""
    files, seen, count = undecoded(data, "image"), 0, 0
    while count < number and seen < len(rows):
        more = rows[seen : seen + min(number - count, IMAGES_AT_ONCE)]
        count += sum(image is not None for image in readable(files[more]["image"]))
        seen += len(more)
    return rows[:seen], count
