"""Images that are read one after the other and never all at once: splits of a stream, shuffling, passes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from torch.utils.data import get_worker_info
from transformers.utils import logging

from ..choices import check_choice
from .augmented import SharedCounter, SharedTally, draw_seed
from .decoding import BrokenImages, readable
from .processing import ImageTransform


logger = logging.get_logger(__name__)

# Parts of a data set that lies whole on the disk, so that as many workers can read it at once.
MAX_SHARDS = 64
# Images that are transformed together: image processors take several at less than half the time.
CHUNK_SIZE = 32


class StreamedImages(torch.utils.data.IterableDataset):
    """Images of a stream, shuffled in a buffer and augmented anew in every pass, for a data loader.

    Each image is augmented by a random generator of its own, seeded by `(seed, pass, worker, position)`, where workers
    share the files of the stream among them. So with the same number of workers a run that skips the images it has
    seen goes on with the same pixel values. `datasets` gives each file to one worker: no image is seen twice or lost,
    and workers beyond the number of files have nothing to do.

    Args:
        stream: Images and their classes, in the columns that `transform` reads; decoded or not.
        transform: From images to pixel values.
        seed: At least 0; of the order and of the augmentation.
        shuffle_buffer_size: Images, not decoded, among which the next one is drawn; files are read in another order in
            each pass as well. 0 keeps the order of the stream.
        repeat: Begin again, without end, after each pass, as training that counts steps needs it. A batch may then
            hold the end of one pass and the start of the next.
        broken_images: What happens to images that cannot be read: `"stop"` raises `BrokenImageError`, `"skip"` passes
            over them.

    Example:
        >>> stream = load_image_dataset("user/name", streaming=True)["train"]
        >>> train = StreamedImages(stream, ImageTransform(processor), shuffle_buffer_size=1000, repeat=True)
        >>> loader = DataLoader(train, batch_size=64, collate_fn=collate_images)
    """

    def __init__(
        self,
        stream: IterableDataset,
        transform: ImageTransform,
        seed: int = 0,
        shuffle_buffer_size: int = 0,
        repeat: bool = False,
        broken_images: BrokenImages = "stop",
    ):
        check_choice("broken_images", broken_images, BrokenImages)
        if shuffle_buffer_size:
            stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer_size)
        self.stream = stream
        self.transform = transform
        self.seed = seed
        self.repeat = repeat
        self.broken_images = broken_images
        self._epoch = SharedCounter()
        self._num_broken = SharedTally()

    @property
    def features(self) -> Features:
        """Types of the columns before the transform, with the names of the classes."""
        return self.stream.features

    @property
    def num_broken(self) -> int:
        """How often an image was passed over because it cannot be read, in all passes so far."""
        return self._num_broken.get()

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass, counted from 0, with which the next iteration begins."""
        self._epoch.set(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_id = 0 if worker is None else worker.id
        # A copy, because workers share the epoch of one stream, and do not end their passes together.
        stream = self.stream.select_columns(self.stream.column_names)
        epoch = self._epoch.get()
        while True:
            stream.set_epoch(epoch)
            examples, position = iter(stream), 0
            while chunk := list(islice(examples, CHUNK_SIZE)):
                columns = {name: [example[name] for example in chunk] for name in chunk[0]}
                seeds = [draw_seed(self.seed, epoch, worker_id, position + offset) for offset in range(len(chunk))]
                positions = [f"{position + offset} of worker {worker_id}" for offset in range(len(chunk))]
                position += len(chunk)
                if self.broken_images == "skip":
                    columns, seeds = self._pass_over_broken(columns, seeds)
                    if not seeds:
                        continue
                columns = self.transform(columns, seeds, positions)
                yield from (dict(zip(columns, values)) for values in zip(*columns.values()))
            if position == 0 or not self.repeat:  # a worker without files would go round for ever
                return
            epoch += 1

    def _pass_over_broken(
        self, columns: dict[str, list[Any]], seeds: list[int]
    ) -> tuple[dict[str, list[Any]], list[int]]:
        images = readable(columns[self.transform.image_column])
        kept = [index for index, image in enumerate(images) if image is not None]
        self._num_broken.add(len(images) - len(kept))
        columns = {name: [values[index] for index in kept] for name, values in columns.items()}
        return columns | {self.transform.image_column: [images[i] for i in kept]}, [seeds[i] for i in kept]


def to_stream(data: Dataset, seed: int) -> IterableDataset:
    """Return a data set that lies on the disk as a stream of encoded images in an order drawn once."""
    data = data.cast_column("image", Image(decode=False)).shuffle(seed=seed)
    return data.to_iterable_dataset(num_shards=max(1, min(MAX_SHARDS, len(data))))


def complete_streams(
    splits: dict[str, IterableDataset], num_held_out: int, seed: int, name: str
) -> dict[str, IterableDataset | Dataset]:
    """Return train, validation and test from what a stream publishes; see `load_image_dataset`."""
    label = splits["train"].features["label"]
    if not isinstance(label, ClassLabel):
        raise ValueError(
            f"Data set '{name}' streams labels of type {getattr(label, 'dtype', type(label).__name__)}. The names of "
            "all classes must be known before the first image is read: cast the column to ClassLabel and save or "
            "push the data set again, or leave streaming out, which looks at every label first."
        )
    splits = {split: stream.cast_column("image", Image(decode=False)) for split, stream in splits.items()}
    for split in ("validation", "test"):
        if split in splits and next(iter(splits[split]), {"label": None})["label"] in (None, -1):
            logger.warning(f"Data set '{name}': the {split} split has no labels and is not used.")
            del splits[split]
    train, validation, test = (splits.get(split) for split in ("train", "validation", "test"))
    if test is None and validation is not None:
        test, validation = validation, None  # as without streaming
    elif test is None:
        train, test = _hold_out(train, num_held_out, seed, name)
    if validation is None:
        train, validation = _hold_out(train, num_held_out, seed, name)
    return {"train": train, "validation": validation, "test": test}


def _hold_out(stream: IterableDataset, size: int, seed: int, name: str) -> tuple[IterableDataset, Dataset]:
    """Take images from near the start of a stream, and leave them out of all that is read from it later."""
    drawn = list(islice(stream.shuffle(seed=seed, buffer_size=size), size + 1))
    if len(drawn) <= size:
        raise ValueError(
            f"Data set '{name}' has {len(drawn)} images to train on, of which {size} are to be held out "
            "(num_held_out). Some must be left to train on: hold out fewer, provide validation and test splits, or "
            "leave streaming out, which divides small data sets by class."
        )
    drawn = drawn[:size]
    labels = stream.features["label"]
    if len({example["label"] for example in drawn}) == 1 < labels.num_classes:
        logger.warning(
            f"Data set '{name}': all {size} images held out are of class '{labels.names[drawn[0]['label']]}'. The "
            "stream seems to be sorted by class, which is bad for training too: shuffle the data set and save it "
            "again, or provide validation and test splits and a large shuffle_buffer_size."
        )
    rows = {column: [example[column] for example in drawn] for column in ("image", "label")}
    held_out = Dataset.from_dict(rows, features=Features({"image": Image(), "label": labels}))
    # By what they are and not by where they stand: workers count the images of their own files alone.
    keys = frozenset(_key(image) for image in rows["image"])
    # By `map`: the `filter` of older releases of datasets fails on streams whose columns have been cast.
    return stream.map(_LeaveOut(keys), batched=True, batch_size=16, features=stream.features), held_out


def _key(image: dict[str, Any]) -> bytes | str:
    """What tells an encoded image from all others: a hash of the file, or its path where that is all there is."""
    return image["path"] if image["bytes"] is None else hashlib.blake2b(image["bytes"], digest_size=16).digest()


class _LeaveOut:
    """Leaves the images of some keys out of a batch; a class, so that it can be pickled."""

    def __init__(self, keys: frozenset[bytes | str]):
        self.keys = keys

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        kept = [index for index, image in enumerate(batch["image"]) if _key(image) not in self.keys]
        return {column: [values[index] for index in kept] for column, values in batch.items()}


def is_listed(builder: datasets.DatasetBuilder) -> bool:
    """Whether a data set is a folder of image files, whose paths can be listed without reading an image."""
    from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder

    return isinstance(builder, FolderBasedBuilder)
