"""What a result says about its data, and whether results may stand beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.trainer_utils import has_length

from ..data.arguments import DataArguments
from ..data.fingerprint import fingerprint_splits
from ..data.preprocessing import choose_augmentation
from ..data.sources import resolve_variant
from .images import layers_of


# Scores on one data set that differ in one of these say nothing about methods.
COMPARED_FIELDS = ("dataset_variant", "dataset_fingerprint", "preprocessing")
# Settings by which runs learn from more or fewer images of the same splits.
TRAINED_ON_FIELDS = ("train_on_validation", "images_per_class")


def describe_data(data_args: DataArguments, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `metrics.json` holds on the data: name, variant, fingerprint of each split, numbers, preprocessing.

    Args:
        data_args: Which data were asked for.
        data: The splits that `build_trainer` returns.
    """
    layers = {split: list(layers_of(part)) for split, part in data.items()}
    num_broken = {split: sum(getattr(layer, "num_broken", 0) for layer in parts) for split, parts in layers.items()}
    return {
        "dataset_name": data_args.dataset_name,
        "dataset_variant": resolve_variant(data_args.dataset_name, data_args.dataset_variant, data_args.dataset_dir),
        "dataset_fingerprint": fingerprint_splits({split: parts[-1] for split, parts in layers.items()}),
        "preprocessing": data_args.preprocessing,
        "augmentation": choose_augmentation(data_args.augmentation, data_args.preprocessing, data_args.dataset_name),
        "images_per_class": data_args.images_per_class,
        "train_on_validation": data_args.train_on_validation,
        "num_images": {split: len(part) if has_length(part) else None for split, part in data.items()},
        "num_broken_images": num_broken,
        "label_names": data["train"].features["label"].names,
    }


def check_comparable(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to compare results that are on one data set by name, but not on the same images, prepared the same way.

    Where runs were asked to learn from validation images too, or from a few of each class, test images are compared.

    Args:
        results: What `metrics.json` holds, for each run under a name by which its reader knows it.

    Raises:
        ValueError: Two results differ in variant, fingerprint or preprocessing of a data set.
    """
    first: dict[tuple[Any, ...], str] = {}
    for run, result in results.items():
        data_set = result["dataset_name"]
        trained_on = tuple(result.get(field) for field in TRAINED_ON_FIELDS)
        for key, only_test in (((data_set,), True), ((data_set, *trained_on), False)):
            other = first.setdefault(key, run)
            _check_pair(other, results[other], run, result, only_test)


def _check_pair(
    other: str, expected_result: Mapping[str, Any], run: str, result: Mapping[str, Any], only_test: bool
) -> None:
    for field in COMPARED_FIELDS:
        found, expected = result.get(field), expected_result.get(field)
        if only_test and isinstance(found, Mapping) and isinstance(expected, Mapping):
            found, expected = ({"test": value.get("test")} for value in (found, expected))
        if found != expected:
            raise ValueError(
                f"Found results on '{result['dataset_name']}' with {field} {_shorten(expected, found)} ('{other}') "
                f"and {_shorten(found, expected)} ('{run}'). Results in one table must be on the same images, "
                "prepared the same way: run one of them again with the settings of the other, or report on one of "
                "them at a time."
            )


def _shorten(value: Any, other: Any) -> Any:
    """Leave out of a dictionary what another one has as well."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return {key: item for key, item in value.items() if other.get(key) != item}
    return "unknown" if value is None and other is not None else value
