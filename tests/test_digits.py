import numpy as np
import pytest

from hf_vpt.data.digits import load_digits


@pytest.fixture(scope="module")
def digits():
    return load_digits(seed=0)


def as_array(split):
    return np.stack([np.asarray(image) for image in split["image"]])


def test_the_splits_are_800_200_797_disjoint_and_stratified(digits):
    assert {name: len(split) for name, split in digits.items()} == {"train": 800, "validation": 200, "test": 797}
    # The source holds no image twice, so equal pixels would mean that one image is in two places.
    pixels = [image.tobytes() for split in digits.values() for image in as_array(split)]
    assert len(set(pixels)) == 1797
    for name, split in digits.items():
        share = np.bincount(split["label"], minlength=10) / len(split)
        assert (abs(share - 0.1) < 0.01).all(), f"{name} has shares {share}"


def test_images_are_8_by_8_grey_and_use_the_full_range(digits):
    assert {(image.size, image.mode) for image in digits["test"]["image"]} == {((8, 8), "L")}
    values = as_array(digits["train"])
    assert (values.min(), values.max()) == (0, 255)


def test_labels_have_the_names_of_the_digits(digits):
    assert digits["train"].features["label"].names == list("0123456789")


def test_the_seed_decides_the_splits(digits):
    assert (as_array(load_digits(seed=0)["train"]) == as_array(digits["train"])).all()
    assert (as_array(load_digits(seed=1)["train"]) != as_array(digits["train"])).any()
