"""What a run reads: images of every split made ready for a data loader, whole or as a stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset
from peft import PeftConfig
from torch.utils.data import DataLoader
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from ..data import AugmentedImages, ImageTransform, PrefixImages, ResizedImages, StreamedImages, collate_images
from ..data.arguments import DataArguments
from ..data.cache import cache_folder
from ..data.preprocessing import choose_augmentation
from ..data.sources import is_benchmark
from ..data.splits import check_classes
from ..tuners.provpt import PROVPTConfig
from .arguments import TrainingArguments


logger = logging.get_logger(__name__)

# Into how many parts a run on a stream is divided by evaluations, where nothing is said.
EVALUATIONS_OF_A_STREAM = 10


def prepare_images(
    splits: dict[str, Dataset | IterableDataset],
    processor: BaseImageProcessor,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> dict[str, AugmentedImages | StreamedImages]:
    """Give every split its transform, and the training images order and augmentation that depend on the seed alone.

    Args:
        splits: What `load_image_dataset` returns.
        processor: What `choose_processor` returns.
        data_args: Augmentation, shuffling, cache of images, and what happens to broken ones.
        training_args: The seed.
    """
    folder = cache_folder(data_args.cache_dir, "images")
    augmentation = choose_augmentation(data_args.augmentation, data_args.preprocessing, data_args.dataset_name)
    plain, augmented = ImageTransform(processor), ImageTransform(processor, augmentation)
    seed, broken = training_args.seed, data_args.broken_images
    prepared = {}
    for split, images in splits.items():
        if split == "train" and isinstance(images, IterableDataset):
            buffer_size = data_args.shuffle_buffer_size
            prepared[split] = StreamedImages(images, augmented, seed, buffer_size, repeat=True, broken_images=broken)
        elif isinstance(images, IterableDataset):
            prepared[split] = StreamedImages(images, plain, broken_images=broken)
        else:
            transform = augmented if split == "train" else plain
            prepared[split] = AugmentedImages(images, transform, seed, broken)
            if split == "train" and prepared[split].num_broken:
                # With them, a class may have lost its only images.
                left = DatasetDict(train=prepared[split].images)
                check_classes(left, data_args.dataset_name, may_lack_classes=is_benchmark(data_args.dataset_name))
            if data_args.cache_images:
                resized = ResizedImages(prepared[split].images, transform, folder, prepared[split].num_broken)
                prepared[split] = AugmentedImages(resized, resized.finish, seed)
    return prepared


def layers_of(images: Any) -> Iterator[Any]:
    """Go from what a data loader reads to the data set below it, through all that is wrapped around it."""
    yield images
    # Beside its images, a cache of prefixes holds the way to their pixels, around which there may be more.
    while (images := getattr(images, "pixels", getattr(images, "images", None))) is not None:
        yield images


def without_transforms(images: Any) -> Any:
    """Return the data set that a split of `prepare_images` reads, by way of a cache or not; of a stream the split."""
    return list(layers_of(images))[-1]


def sample_batches(
    images: AugmentedImages | PrefixImages | StreamedImages,
    processor: BaseImageProcessor,
    training_args: TrainingArguments,
) -> Iterator[dict[str, Any]]:
    """Go through training images without augmentation in a seeded order, the same one in every process.

    Nothing is read before the first batch is asked for.
    """
    plain = ImageTransform(processor)
    if isinstance(images, StreamedImages):
        sample = StreamedImages(images.stream, plain, broken_images=images.broken_images)
    else:
        sample = without_transforms(images).shuffle(seed=training_args.seed).with_transform(plain)
    yield from DataLoader(sample, batch_size=training_args.per_device_eval_batch_size, collate_fn=collate_images)


def count_in_steps(training_args: TrainingArguments, peft_config: PeftConfig | None) -> None:
    """Make settings fit a run on a stream, which has steps and no epochs. They are changed in place.

    What was to happen each epoch, the default, happens ten times in the run, or each `eval_steps` if that is given.

    Raises:
        ValueError: `max_steps` is missing, or prompts are to move between epochs.
    """
    if training_args.max_steps <= 0:
        raise ValueError(
            f"Found streaming and max_steps of {training_args.max_steps}. Nobody has counted the images of a stream, "
            "so the length of a run is needed in optimizer steps: pass for example --max_steps 1000 "
            "(num_train_epochs has no meaning then), and warmup_steps for a warm-up."
        )
    if isinstance(peft_config, PROVPTConfig) and peft_config.relocation_steps is None:
        raise ValueError(
            "Found streaming and PRO-VPT without relocation_steps. Its prompts move between epochs, and a stream is "
            "one long epoch: say after how many steps they should move, with scores from training itself, for example "
            "--scoring online --relocation_steps 100."
        )
    evaluates, saves = training_args.eval_strategy, training_args.save_strategy
    interval = training_args.eval_steps
    if not interval and saves == SaveStrategy.STEPS:
        interval = training_args.save_steps
    interval = interval or math.ceil(training_args.max_steps / EVALUATIONS_OF_A_STREAM)
    changed = {}
    if evaluates == IntervalStrategy.EPOCH:
        training_args.eval_strategy = IntervalStrategy.STEPS
        changed["eval_steps"] = interval
    if saves == SaveStrategy.EPOCH:
        training_args.save_strategy = SaveStrategy.STEPS
        changed["save_steps"] = interval
    if training_args.logging_strategy == IntervalStrategy.EPOCH:
        training_args.logging_strategy = IntervalStrategy.STEPS
        changed["logging_steps"] = interval
    for name, value in changed.items():
        setattr(training_args, name, value)
    if changed:
        words = ", ".join(f"{name} {value:g}" for name, value in changed.items())
        logger.warning(f"A stream has no epochs; what was to be done after each is counted in steps: {words}.")
