"""Labelled image data sets, brought to one shape: splits train, validation, test with columns image and label."""

from __future__ import annotations

from pathlib import Path

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError

from ..choices import check_choice
from .columns import encode_labels, select_image_and_label
from .decoding import BrokenImages
from .sources import benchmark_validation_fraction, is_benchmark, load_benchmark, resolve_variant
from .sources.folders import find_splits
from .sources.lists import is_list, load_list
from .sources.shards import has_shards, load_shards
from .splits import check_classes, complete_splits, drop_unlabelled, rename_splits, take_from_each_class
from .streams import complete_streams, is_listed, to_stream


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
    variant: str | None = None,
    data_dir: str | None = None,
    images_per_class: int | None = None,
    validation_images_per_class: int | None = None,
    train_on_validation: bool = False,
    broken_images: BrokenImages = "stop",
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

    Benchmarks have splits of their own: see `hf_vpt.data.sources`.

    A published test split without labels (all of them -1) counts as not published. Drawn splits are stratified by
    class and depend on `seed` only.

    With `streaming`, images are read when they are needed and nothing is downloaded or converted first. Folders of
    image files are listed, and they and other data sets on the disk are split as above. In parquet files and on the
    Hub, where nobody has counted images or classes, splits that are not published get `num_held_out` images each,
    drawn near the start of the training split; these, and copies of them, are passed over in training.

    Args:
        name: `"digits"` (packaged, offline); `"drawn/sprite_location"`, `"drawn/sprite_orientation"` or
            `"drawn/counting"` (drawn on the spot, see `hf_vpt.data.sprites.load_drawn`); a benchmark, `"vtab/<task>"`
            or `"fgvc/<set>"`, see `hf_vpt.data.sources`; a folder (images in one subfolder a class, with or without
            train/validation/test folders above them; parquet files; .tar shards of WebDataset; or what `save_to_disk`
            wrote); a .csv, .tsv, .json or .jsonl list of image files and classes; or the id of a data set on the Hub.
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
        variant: Which of several copies of a benchmark: `"zip"` or `"full"` for VTAB-1k, `"hub"`, `"official"` or
            `"lists"` for FGVC. Scores on two variants cannot be compared.
        data_dir: Folder or archive of a benchmark that is on the disk already.
        images_per_class: Few-shot learning: keep so many training images of each class, at least 1. They are drawn by
            `seed`, and fewer images are among more. Default: all.
        validation_images_per_class: The same for the validation split. The test split is never cut.
        train_on_validation: Add the validation images to train, as final runs on VTAB-1k do when everything has been
            chosen. The validation split stays what it was and then says nothing about new images.
        broken_images: With `"skip"`, `images_per_class` counts images that can be read, and those that were found
            broken in drawing them are kept beside them, for `AugmentedImages` to leave out and count.

    Returns:
        Splits `train`, `validation` and `test`, each with the columns `image` (`Image`) and `label` (`ClassLabel`, the
        same names in every split). With `streaming` the train split is an `IterableDataset`, and so are the others if
        they are published as streams; images of streams are not decoded (`Image(decode=False)`), so that shuffling
        holds them as files. `StreamedImages` and `ImageTransform` decode them.

    Raises:
        FileNotFoundError: `name` is written like a path, and there is no such folder.
        ValueError: There is no train split, columns are missing or ambiguous, a class has no or too few images, a
            class is outside of those that have names, or a stream does not know its columns and classes.

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
    if seed < 0:
        raise ValueError(f"The seed of the splits is {seed}. It must be at least 0: pass for example 0.")
    check_choice("broken_images", broken_images, BrokenImages)
    resolve_variant(name, variant, data_dir)  # refuses what cannot be, before anything is loaded
    raw = _load(name, config_name, revision, image_column, cache_dir, seed, streaming, variant, data_dir)
    splits = select_image_and_label(rename_splits(raw, name), image_column, label_column, name)
    few = {"train": images_per_class, "validation": validation_images_per_class}
    few = {split: number for split, number in few.items() if number is not None}
    if isinstance(splits, IterableDatasetDict):
        if few or train_on_validation:
            option = "images_per_class" if few else "train_on_validation"
            raise ValueError(
                f"Found streaming and {option} for '{name}'. Nobody has counted the classes and images of a stream: "
                "leave streaming out."
            )
        return complete_streams(splits, num_held_out, seed, name)
    if not all(isinstance(data.features["image"], Image) for data in splits.values()):
        splits = splits.cast_column("image", Image())
    splits = encode_labels(drop_unlabelled(splits, name), name)
    check_classes(splits, name, may_lack_classes=is_benchmark(name))
    validation_fraction = benchmark_validation_fraction(name) or validation_fraction
    splits = complete_splits(splits, validation_fraction, test_fraction, seed, name)
    for split, number in few.items():
        where = f"The {split} split of '{name}'"
        splits[split] = take_from_each_class(splits[split], number, seed, where, broken_images)
    if train_on_validation:
        splits["train"] = concatenate_datasets([splits["train"], splits["validation"]])
    return {**splits, "train": to_stream(splits["train"], seed)} if streaming else splits


def _load(
    name: str,
    config_name: str | None,
    revision: str | None,
    image_column: str | None,
    cache_dir: str | None,
    seed: int,
    streaming: bool,
    variant: str | None,
    data_dir: str | None,
) -> DatasetDict | IterableDatasetDict:
    if name == "digits":
        from .digits import load_digits

        return load_digits(seed)
    if name.startswith("drawn/"):
        from .sprites import load_drawn

        return load_drawn(name, seed)
    if is_benchmark(name):
        if streaming:
            raise ValueError(
                f"Found streaming and the benchmark '{name}'. Its splits are small and are drawn or listed before the "
                "first image is read: leave streaming out."
            )
        return load_benchmark(name, variant, data_dir, revision, cache_dir, seed)
    path = Path(name).expanduser()
    if is_list(path):
        return load_list(path, image_column)
    if path.is_dir():
        if (path / datasets.config.DATASETDICT_JSON_FILENAME).is_file():
            return load_from_disk(path)
        if (path / datasets.config.DATASET_STATE_JSON_FILENAME).is_file():
            return DatasetDict(train=load_from_disk(path))
        if has_shards(path):
            return load_shards(path, cache_dir, streaming)
        if config_name is None and (files := find_splits(path)):
            return load_dataset("imagefolder", data_dir=str(path), data_files=files, cache_dir=cache_dir)
        # Image files are listed, not streamed: a stream of a folder has one class after the other.
        streaming = streaming and not is_listed(load_dataset_builder(str(path), config_name, cache_dir=cache_dir))
        return load_dataset(str(path), config_name, cache_dir=cache_dir, streaming=streaming)
    if name.startswith(("/", ".", "~")):
        raise FileNotFoundError(
            f"There is no folder '{name}'. A data set is 'digits', a drawn one such as 'drawn/counting', an existing "
            "folder or list, or an id on the Hub such as 'user/name': correct the path."
        )
    try:
        return load_dataset(name, config_name, revision=revision, cache_dir=cache_dir, streaming=streaming)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise type(error)(
            f"'{name}' is no folder or list here, and the Hub has no such data set or cannot be reached ({error}). A "
            "data set is 'digits', a drawn one such as 'drawn/counting', an existing folder or list, or an id on the "
            "Hub such as 'user/name': correct the name, or go online."
        ) from error
