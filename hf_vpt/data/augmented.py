"""Training images whose augmentation is a function of seed, epoch and image, and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from ..choices import check_choice
from .decoding import BrokenImages, drop_broken, undecoded
from .processing import ImageTransform


class SharedCounter:
    """An integer that data loader workers see change while they run, as persistent workers do between epochs."""

    def __init__(self, value: int = 0):
        self._value = torch.tensor(value).share_memory_()

    def get(self) -> int:
        return int(self._value)

    def set(self, value: int) -> None:
        self._value.fill_(value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._value.share_memory_()  # plain pickling copies it out of shared memory; data loaders keep it there


class SharedTally:
    """A number that data loader workers add to, each in a place of its own, so that no addition is lost."""

    def __init__(self):
        self._parts = torch.zeros(256, dtype=torch.int64).share_memory_()

    def add(self, number: int) -> None:
        worker = get_worker_info()
        self._parts[0 if worker is None else worker.id % len(self._parts)] += number

    def get(self) -> int:
        return int(self._parts.sum())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._parts.share_memory_()


def draw_seed(*numbers: int) -> int:
    """Mix non-negative integers, such as seed, epoch and index, to a seed that no other ones are likely to have."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class AugmentedImages(Dataset):
    """Images of a map-style data set, augmented anew in every epoch and always the same way in the same epoch.

    Each image is augmented by a random generator of its own, seeded by `(seed, epoch, index)`. So pixel values do not
    depend on the number of workers, the order of the images, what else draws random numbers, or whether the epoch was
    interrupted and resumed; and loading leaves PyTorch's global random state alone. `with_transform` has none of this.

    Args:
        images: Images and their classes, in the columns that `transform` reads.
        transform: From images to pixel values.
        seed: At least 0.
        broken_images: What happens to images that cannot be read: `"stop"` raises `BrokenImageError` when one is asked
            for; `"skip"` reads all images once now, and leaves the broken ones out.

    Example:
        >>> train = AugmentedImages(splits["train"], ImageTransform(processor, augmentation="affine"))
        >>> for epoch in range(100):
        ...     train.set_epoch(epoch)  # `ImageClassificationTrainer` does this itself
        ...     for batch in DataLoader(train, batch_size=64, shuffle=True, collate_fn=collate_images):
        ...         ...
    """

    def __init__(
        self,
        images: datasets.Dataset,
        transform: ImageTransform,
        seed: int = 0,
        broken_images: BrokenImages = "stop",
    ):
        check_choice("broken_images", broken_images, BrokenImages)
        # How many images were left out.
        self.images, self.num_broken = undecoded(images, transform.image_column), 0
        if broken_images == "skip":
            self.images, self.num_broken = drop_broken(images, transform.image_column)
        self.transform = transform
        self.seed = seed
        self._epoch = SharedCounter()

    @property
    def features(self) -> datasets.Features:
        """Types of the columns before the transform, with the names of the classes."""
        return self.images.features

    @property
    def epoch(self) -> int:
        return self._epoch.get()

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentations of an epoch, counted from 0; workers that are running follow."""
        self._epoch.set(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # in these words a loop over the images ends
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several examples, read and normalised together, which is what a data loader asks for."""
        indices = [int(index) % len(self) for index in indices]
        seeds = [draw_seed(self.seed, self.epoch, index) for index in indices]
        columns = self.transform(self.images[indices], seeds, indices)
        return [dict(zip(columns, values)) for values in zip(*columns.values())]
