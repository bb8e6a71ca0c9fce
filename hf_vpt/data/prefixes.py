"""Images of which the tokens before the first prompt are kept on the disk, and the images themselves left alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset

from .augmented import SharedCounter
from .cache import ArrayCache


class PrefixImages(Dataset):
    """Examples whose `pixel_values` are tokens `(T, D)` where all of a batch are cached, else images `(C, H, W)`.

    See `hf_vpt.prefix.FrozenPrefix`. An image that is cached is neither read nor decoded. Data loader workers that are
    running follow when another block becomes the first one with prompts.

    Args:
        images: Images and their classes, in the columns that the transform of `pixels` reads.
        pixels: The same as examples with `pixel_values`, always the same ones for the same image, and `labels`.
        key: Letters that stand for backbone, images and transform, as `hf_vpt.data.cache.make_key` makes them.
        folder: Where caches lie, a file for each first block.
        dtype: Number format of the cached tokens.
        label_column: Column of the classes; may be absent.
    """

    def __init__(
        self,
        images: datasets.Dataset,
        pixels: Dataset | datasets.Dataset,
        key: str,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        label_column: str = "label",
    ):
        self.images = images
        self.pixels = pixels
        self.key = key
        self.folder = folder
        self.dtype = dtype
        self.labels = images.select_columns([label_column]) if label_column in images.column_names else None
        self._label_column = label_column
        # All blocks' tokens have one shape. Shared, because workers were started before it was known.
        self._block, self._num_tokens, self._width = SharedCounter(), SharedCounter(), SharedCounter()
        self._caches: dict[int, ArrayCache] = {}

    @property
    def features(self) -> datasets.Features:
        """Types of the columns before the transform, with the names of the classes."""
        return self.images.features

    @property
    def block(self) -> int:
        """Index of the block whose inputs are read; 0 where images are."""
        return self._block.get()

    def start_at(self, block: int, token_shape: Sequence[int] = (0, 0)) -> None:
        """Choose the block whose inputs are read from now on.

        Args:
            block: Its index; 0 for images.
            token_shape: Tokens T and width D.
        """
        self._num_tokens.set(token_shape[0])
        self._width.set(token_shape[1])
        self._block.set(block)

    @property
    def cache(self) -> ArrayCache:
        """The inputs `(n, T, D)` of the present block."""
        block = self.block
        if block not in self._caches:
            file, shape = self.folder / f"{self.key}-block{block}", (self._num_tokens.get(), self._width.get())
            self._caches[block] = ArrayCache(file, len(self), shape, self.dtype)
        return self._caches[block]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_caches": {}}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return a batch of examples. One image that is not cached makes all of them images: a batch has one shape."""
        indices = [int(index) % len(self) for index in indices]
        if not self.block or not all(self.cache.is_done(index) for index in indices):
            return self.pixels.__getitems__(indices)
        examples = [{"pixel_values": tokens} for tokens in self.cache.read(indices)]
        if self.labels is not None:
            for example, label in zip(examples, self.labels[indices][self._label_column]):
                example["labels"] = label
        return examples
