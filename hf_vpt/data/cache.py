"""Rows of numbers on the disk that are computed once and read ever after, by many processes at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME


CacheDtype = Literal["float32", "bfloat16", "float16"]

# NumPy has no bfloat16; its bits are kept as integers.
_STORED_AS = {torch.bfloat16: np.uint16, torch.float32: np.float32, torch.float16: np.float16, torch.uint8: np.uint8}


class ArrayCache:
    """A memory-mapped array `(n, *row_shape)` that says of each row whether it has been written.

    A row is there if its checksum, which is written after it, is that of its bytes. So a row that was cut off, by a
    killed process or by a power failure, counts as missing and is computed again. Several processes may open, create
    and write the same file at once, if they write the same numbers: one that is not written yet is all zeros.

    Objects can be pickled for data loader workers; the file is opened anew there.

    Args:
        file: Where the array lies; made, with its folders, where it does not exist.
        num_rows: Number n of rows.
        row_shape: Shape of one row.
        dtype: float32, float16, bfloat16 or uint8.

    Raises:
        OSError: The disk has no room for the whole array.
    """

    def __init__(self, file: str | Path, num_rows: int, row_shape: Sequence[int], dtype: torch.dtype):
        self.file = Path(file)
        self.num_rows = num_rows
        self.row_shape = tuple(row_shape)
        self.dtype = dtype
        # What has been compared with its checksum, by any worker: once a run is enough.
        self._verified = torch.zeros(num_rows, dtype=torch.uint8).share_memory_()
        _create(self.file, self.num_bytes)
        self._open()

    @property
    def num_bytes(self) -> int:
        """Size of the file: four bytes of checksum for each row, then the rows."""
        return self.num_rows * (prod(self.row_shape) * self.dtype.itemsize + 4)

    def _open(self) -> None:
        shape = (self.num_rows, *self.row_shape)
        self._checksums = np.memmap(self.file, np.uint32, "r+", shape=(self.num_rows,))
        self._rows = np.memmap(self.file, _STORED_AS[self.dtype], "r+", offset=self._checksums.nbytes, shape=shape)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map is a copy of all it shows.
        return {name: value for name, value in self.__dict__.items() if name not in ("_rows", "_checksums")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._verified.share_memory_()
        self._open()

    def __len__(self) -> int:
        return self.num_rows

    def is_done(self, row: int) -> bool:
        """Whether a row is there, whole; one that is not is counted as missing from then on."""
        checksum = int(self._checksums[row])
        if not checksum:
            return False
        if not self._verified[row]:
            if checksum != _checksum(self._rows[row]):
                self._checksums[row] = 0
                return False
            self._verified[row] = 1
        return True

    def missing(self) -> list[int]:
        """The rows without a checksum, in their order; nothing is read."""
        return np.flatnonzero(np.asarray(self._checksums) == 0).tolist()

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """Return a copy of some rows, `(len(rows), *row_shape)`; see `is_done`."""
        values = torch.from_numpy(np.asarray(self._rows[list(rows)]))
        return values.view(self.dtype) if self.dtype == torch.bfloat16 else values

    def write(self, row: int, values: torch.Tensor) -> None:
        """Write a row, converted to the array's dtype.

        Raises:
            ValueError: The values have another shape than a row.
        """
        if tuple(values.shape) != self.row_shape:
            raise ValueError(
                f"Found values of shape {tuple(values.shape)} for '{self.file}', whose rows have the shape "
                f"{self.row_shape}. All images of a cache need one size: give the image processor a size with height "
                "and width, or do_center_crop, or leave the cache out."
            )
        values = values.detach().to("cpu", self.dtype).contiguous()
        values = (values.view(torch.uint16) if self.dtype == torch.bfloat16 else values).numpy()
        self._rows[row] = values
        self._checksums[row] = _checksum(values)
        self._verified[row] = 1


def make_key(*parts: Any) -> str:
    """Return 32 letters that stand for values which JSON can express; other values, other letters."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def cache_folder(cache_dir: str | None, kind: str) -> Path:
    """Return the folder of one kind of cache, below `cache_dir` or below `hf_vpt` in Hugging Face's own folder."""
    return (Path(cache_dir).expanduser() if cache_dir else Path(HF_HOME) / "hf_vpt") / kind


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(row).view(np.uint8)) or 1  # 0 stands for no row


def _create(file: Path, num_bytes: int) -> None:
    """Make a file of zeros, or leave one as it is that another process has made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if os.fstat(descriptor).st_size < num_bytes:
            _reserve(descriptor, file, num_bytes)
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, file: Path, num_bytes: int) -> None:
    """Give a file its size. It does no harm to do so twice: what is there stays, what is added are zeros."""
    free = shutil.disk_usage(file.parent).free
    found = f"Found {free / 2**30:.2f} GiB free where '{file}' is to be"
    try:
        if free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.truncate(descriptor, num_bytes)
        # Writing to a file with holes would kill the process once the disk is full.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return  # a file system that has no such call
        file.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{found}. The cache needs {num_bytes / 2**30:.2f} GiB: free some, name another disk with cache_dir, "
            f"halve a cache of prefixes with cache_dtype: bfloat16, or leave the cache out. ({error.strerror})",
        ) from error
