"""Labelled image data sets, brought to one shape: splits train, validation, test with columns image and label."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from transformers.utils import logging

from .streams import complete_streams, is_listed, to_stream


logger = logging.get_logger(__name__)

# Names under which data sets publish their splits. What stands in none of the rows is left aside.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

# Tried, in this order, where no column or more than one could hold the labels by its type alone.
LABEL_COLUMN_NAMES = ("label", "labels", "class", "target")


def load_image_dataset(
    name: str,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
    cache_dir: str | None = None,
    streaming: bool = False,
    num_held_out: int = 1000,
) -> DatasetDict | dict[str, Dataset | IterableDataset]:
    """Load images and their classes, ready to train on, choose with, and test on.

    The three splits of the result are disjoint in purpose: `train` fits parameters, `validation` chooses (epochs,
    hyper-parameters), `test` is for the final score alone. Splits that the data set does not publish are made so:

    | published         | train          | validation                  | test                                |
    |-------------------|----------------|-----------------------------|-------------------------------------|
    | train, val., test | train          | validation                  | test                                |
    | train, test       | rest of train  | `validation_fraction` of it | test                                |
    | train, validation | rest of train  | `validation_fraction` of it | validation: nobody has chosen on it |
    | train             | rest of train  | `validation_fraction`       | `test_fraction`                     |

    A published test split without labels (all of them -1) counts as not published. Drawn splits are stratified by
    class and depend on `seed` only.

    With `streaming`, images are read when they are needed and nothing is downloaded or converted first. Folders of
    image files are listed, and they and other data sets on the disk are split as above. In parquet files and on the
    Hub, where nobody has counted images or classes, splits that are not published get `num_held_out` images each,
    drawn near the start of the training split; these, and copies of them, are passed over in training.

    Args:
        name: `"digits"` (packaged, offline); `"drawn/sprite_location"`, `"drawn/sprite_orientation"` or
            `"drawn/counting"` (drawn on the spot, see `hf_vpt.data.sprites.load_drawn`); a folder (images in one
            subfolder a class, with or without train/validation/test folders above them; parquet files; or what
            `save_to_disk` wrote); or the id of a data set on the Hub.
        config_name: Configuration of a data set that has several.
        revision: Branch, tag or commit of a data set on the Hub.
        image_column: Column of the images. Default: the only column whose type is `Image`.
        label_column: Column of the classes: class labels, strings or integers. Default: the only column whose type is
            `ClassLabel`, or else the one called label, labels, class or target.
        validation_fraction: Share of the training images that becomes the validation split, in (0, 1).
        test_fraction: Share of the training images that becomes the test split where nothing else can be, in (0, 1).
        seed: Decides which images go to the drawn splits, and what drawn data sets show. Unrelated to the seed of
            training, so that runs that differ in their training seed see the same images.
        cache_dir: Folder for what is downloaded and converted. Default: the one of `datasets`.
        streaming: Return streams, for data sets that are too large to download or convert.
        num_held_out: Images of a stream that become the validation or test split where it publishes none, at least 1.
            They are kept in memory, encoded.

    Returns:
        Splits `train`, `validation` and `test`, each with the columns `image` (`Image`) and `label` (`ClassLabel`, the
        same names in every split). With `streaming` the train split is an `IterableDataset`, and so are the others if
        they are published as streams; images of streams are not decoded (`Image(decode=False)`), so that shuffling
        holds them as files. `StreamedImages` and `ImageTransform` decode them.

    Raises:
        FileNotFoundError: `name` is written like a path, and there is no such folder.
        ValueError: There is no train split, columns are missing or ambiguous, a class is too small to be split, or a
            stream does not know its columns and classes.

    Example:
        >>> digits = load_image_dataset("digits")
        >>> digits["train"].features["label"].names[:3]
        ['0', '1', '2']
    """
    for argument, fraction in {"validation_fraction": validation_fraction, "test_fraction": test_fraction}.items():
        if not 0 < fraction < 1:
            raise ValueError(
                f"{argument} is {fraction}. A share of the training images between 0 and 1, both excluded, is needed: "
                "pass for example 0.2."
            )
    if num_held_out < 1:
        raise ValueError(f"num_held_out is {num_held_out}. At least 1 image is needed: pass for example 1000.")
    raw = _load(name, config_name, revision, cache_dir, seed, streaming)
    splits = _rename_splits(raw, name)
    features = splits["train"].features
    if features is None:
        raise ValueError(
            f"Data set '{name}' does not say which columns it streams. Types of columns and names of classes are "
            "needed before the first image is read: save it as parquet with `datasets`, or leave streaming out."
        )
    image_column = image_column or _find_image_column(features, name)
    label_column = label_column or _find_label_column(features, image_column, name)
    for column in (image_column, label_column):
        if column not in features:
            raise ValueError(
                f"Data set '{name}' has no column '{column}'; it has {_describe(features)}. Both image_column and "
                "label_column must name existing columns: correct the name, or leave it out to have it found."
            )
    splits = type(splits)(
        {
            split: data.select_columns([image_column, label_column]).rename_columns(
                {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
            )
            for split, data in splits.items()
        }
    )
    if isinstance(splits, IterableDatasetDict):
        return complete_streams(splits, num_held_out, seed, name)
    if not isinstance(splits["train"].features["image"], Image):
        splits = splits.cast_column("image", Image())
    splits = _drop_unlabelled(_encode_labels(splits), name)
    splits = _complete_splits(splits, validation_fraction, test_fraction, seed, name)
    return {**splits, "train": to_stream(splits["train"], seed)} if streaming else splits


def _load(
    name: str, config_name: str | None, revision: str | None, cache_dir: str | None, seed: int, streaming: bool
) -> DatasetDict | IterableDatasetDict:
    if name == "digits":
        from .digits import load_digits

        return load_digits(seed)
    if name.startswith("drawn/"):
        from .sprites import load_drawn

        return load_drawn(name, seed)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / datasets.config.DATASETDICT_JSON_FILENAME).is_file():
            return load_from_disk(folder)
        # A folder of image files is listed, not streamed: a stream of it has one class after the other.
        streaming = streaming and not is_listed(load_dataset_builder(str(folder), config_name, cache_dir=cache_dir))
        return load_dataset(str(folder), config_name, cache_dir=cache_dir, streaming=streaming)
    if name.startswith(("vtab/", "fgvc/")):
        raise ValueError(
            f"Found the benchmark '{name}', whose sources this release does not know yet. A folder or an id on the "
            "Hub is needed: pass the one that has its images with --dataset_name."
        )
    if name.startswith(("/", ".", "~")):
        raise FileNotFoundError(
            f"There is no folder '{name}'. A data set is 'digits', a drawn one such as 'drawn/counting', an existing "
            "folder, or an id on the Hub such as 'user/name': correct the path."
        )
    return load_dataset(name, config_name, revision=revision, cache_dir=cache_dir, streaming=streaming)


def _rename_splits(raw: DatasetDict | IterableDatasetDict, name: str) -> DatasetDict | IterableDatasetDict:
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


def _describe(features: datasets.Features) -> str:
    return ", ".join(f"'{column}' ({type(feature).__name__})" for column, feature in features.items())


def _find_image_column(features: datasets.Features, name: str) -> str:
    candidates = [column for column, feature in features.items() if isinstance(feature, Image)]
    if len(candidates) == 1:
        return candidates[0]
    raise ValueError(
        f"Data set '{name}' has {len(candidates)} columns of type Image among {_describe(features)}. One column of "
        "images is needed: name it with image_column."
    )


def _find_label_column(features: datasets.Features, image_column: str, name: str) -> str:
    by_type = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    if not by_type:
        scalars = ("string", "large_string", "bool")
        by_type = [
            column
            for column, feature in features.items()
            if column != image_column
            and isinstance(feature, Value)
            and (feature.dtype in scalars or "int" in feature.dtype)
        ]
    if len(by_type) == 1:
        return by_type[0]
    by_name = [column for column in LABEL_COLUMN_NAMES if column in by_type]
    if len(by_name) == 1:
        return by_name[0]
    raise ValueError(
        f"Data set '{name}' has {len(by_type)} columns that could hold the classes ({by_type}) among "
        f"{_describe(features)}. One column is needed: name it with label_column."
    )


def _encode_labels(splits: DatasetDict) -> DatasetDict:
    """Turn strings, integers and booleans into class labels, with the same numbers in every split."""
    if isinstance(splits["train"].features["label"], ClassLabel):
        return splits
    values = {value for data in splits.values() for value in data.unique("label")}
    # Integers are sorted as numbers: as text, class 10 would stand before class 2.
    names = [str(value) for value in sorted(values)]
    return splits.cast_column("label", Value("string")).cast_column("label", ClassLabel(names=names))


def _drop_unlabelled(splits: DatasetDict, name: str) -> DatasetDict:
    for split in ("validation", "test"):
        if split in splits and all(label in (None, -1) for label in splits[split].unique("label")):
            logger.warning(f"Data set '{name}': the {split} split has no labels and is not used.")
            del splits[split]
    return splits


def _complete_splits(
    splits: DatasetDict, validation_fraction: float, test_fraction: float, seed: int, name: str
) -> DatasetDict:
    train, validation, test = (splits.get(split) for split in ("train", "validation", "test"))
    if test is None and validation is not None:
        # Published scores are measured on this split, so it must not choose epochs or hyper-parameters here.
        test, validation = validation, None
    elif test is None:
        train, test = _stratified_split(train, test_fraction, seed, name)
    if validation is None:
        train, validation = _stratified_split(train, validation_fraction, seed, name)
    return DatasetDict(train=train, validation=validation, test=test)


def _stratified_split(data: Dataset, fraction: float, seed: int, name: str) -> tuple[Dataset, Dataset]:
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
