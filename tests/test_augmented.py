"""Augmentation is a function of seed, epoch and image; workers, processes and interruptions change nothing."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from hf_vpt.data import AugmentedImages, ImageTransform, collate_images


NUM_IMAGES = 7


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 20, 30, 3), dtype=np.uint8)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": [index % 2 for index in range(NUM_IMAGES)]}
    return Dataset.from_dict(rows, features=features)


@pytest.fixture(params=["affine", "crop_flip"])
def data(images, request):
    processor = ViTImageProcessor(size={"height": 16, "width": 24})
    return AugmentedImages(images, ImageTransform(processor, request.param), seed=5)


def pixel_values(data, **loading):
    batches = list(DataLoader(data, batch_size=2, collate_fn=collate_images, **loading))
    return torch.cat([batch["pixel_values"] for batch in batches])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_any_number_and_kind_give_the_same_pixel_values(data, context):
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {context}")
    data.set_epoch(3)
    expected = pixel_values(data)
    torch.manual_seed(99)
    assert torch.equal(pixel_values(data, num_workers=2, multiprocessing_context=context), expected)


def test_an_image_has_the_same_augmentation_in_any_order_and_alone(data):
    expected = pixel_values(data)
    for index in reversed(range(NUM_IMAGES)):
        assert torch.equal(data[index]["pixel_values"], expected[index])
    assert torch.equal(data[-1]["pixel_values"], expected[-1])


def test_epochs_and_seeds_and_images_differ_and_an_epoch_comes_back(data):
    first = pixel_values(data)
    data.set_epoch(1)
    assert data.epoch == 1
    second = pixel_values(data)
    other_seed = pixel_values(AugmentedImages(data.images, data.transform, seed=6))
    for index in range(NUM_IMAGES):
        assert not torch.equal(first[index], second[index])
        assert not torch.equal(first[index], other_seed[index])
    data.set_epoch(0)
    assert torch.equal(pixel_values(data), first)
    same = data.images.select([0, 0])
    twice = pixel_values(AugmentedImages(same, data.transform))
    assert not torch.equal(twice[0], twice[1])


def test_persistent_workers_see_the_epoch_change(data):
    loader = DataLoader(data, batch_size=7, collate_fn=collate_images, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        (batch,) = loader
        assert torch.equal(batch["pixel_values"], pixel_values(data))


def test_loading_leaves_the_global_random_state_alone(data):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    data[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_length_features_labels_and_iteration_are_those_of_the_images(data):
    assert len(data) == NUM_IMAGES
    assert data.features["label"].names == ["a", "b"]
    # A loop without a loader has to end too.
    assert [example["labels"] for example in data] == [index % 2 for index in range(NUM_IMAGES)]


def test_a_pickled_copy_has_the_epoch_and_goes_on_alone(data):
    data.set_epoch(2)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.epoch == 2
    assert torch.equal(copy[0]["pixel_values"], data[0]["pixel_values"])
    copy.set_epoch(3)
    assert data.epoch == 2


def test_encoded_images_are_augmented_as_decoded_ones(data):
    encoded = AugmentedImages(data.images.cast_column("image", ImageFeature(decode=False)), data.transform, seed=5)
    assert torch.equal(pixel_values(encoded), pixel_values(data))
