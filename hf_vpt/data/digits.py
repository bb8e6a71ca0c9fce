"""The 1,797 handwritten digits that ship with scikit-learn, as a data set that needs no download."""

import io

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn import datasets as sklearn_datasets
from sklearn.model_selection import train_test_split


TRAIN_SIZE, VALIDATION_SIZE = 800, 200  # VTAB-1k's division of its 1,000 labelled images


def _png_bytes(image: np.ndarray) -> bytes:
    """Encode one grey image (8, 8) of uint8 as PNG, which is lossless and what a Hub data set would hold."""
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def load_digits(seed: int = 0) -> DatasetDict:
    """Load the digits with 800 images to train on, 200 to validate on and 797 to test on.

    The images are 8 x 8 grey PIL images whose values 0..16 are scaled to 0..255; the labels are 0 to 9. The splits are
    disjoint and each holds about the same share of every digit. Source: https://archive.ics.uci.edu/dataset/80, test
    part.

    Args:
        seed: decides which image goes to which split.
    """
    digits = sklearn_datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target
    few, test = train_test_split(
        np.arange(len(labels)), train_size=TRAIN_SIZE + VALIDATION_SIZE, stratify=labels, random_state=seed
    )
    train, validation = train_test_split(few, train_size=TRAIN_SIZE, stratify=labels[few], random_state=seed)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})

    def split(rows: np.ndarray) -> Dataset:
        encoded = [{"bytes": _png_bytes(images[row]), "path": None} for row in rows]
        return Dataset.from_dict({"image": encoded, "label": labels[rows]}, features=features)

    return DatasetDict(train=split(train), validation=split(validation), test=split(test))
