"""Images from the cache give exactly the pixel values of images that are decoded and resized."""

import io
import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, DeiTImageProcessor, SiglipImageProcessor, ViTImageProcessor

from hf_vpt.data import AugmentedImages, ImageTransform, ResizedImages, collate_images
from hf_vpt.data.sources.listed import listed_images


SIZE = {"height": 24, "width": 32}
PROCESSORS = {
    "vit": lambda: ViTImageProcessor(size=SIZE),
    "bicubic": lambda: ViTImageProcessor(size=SIZE, resample=3, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]),
    "lanczos": lambda: ViTImageProcessor(size=SIZE, resample=1),
    "center_crop": lambda: CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 20, "width": 20}),
    "larger_crop": lambda: DeiTImageProcessor(size=SIZE, crop_size={"height": 30, "width": 30}),
    "siglip": lambda: SiglipImageProcessor(size=SIZE),
}
MODES = ("RGB", "L", "P", "RGBA", "I;16")


def encoded(index):
    pixels = np.random.default_rng(index).integers(0, 255, (40 + index, 50, 3)).astype(np.uint8)
    mode = MODES[index % len(MODES)]
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def data_set(number=10, first=0):
    rows = {"image": [encoded(first + index) for index in range(number)], "label": [i % 2 for i in range(number)]}
    return Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])}))


def read(images, epoch=0, **kwargs):
    images.set_epoch(epoch)
    batches = list(DataLoader(images, batch_size=4, collate_fn=collate_images, **kwargs))
    return torch.cat([batch["pixel_values"] for batch in batches]), torch.cat([batch["labels"] for batch in batches])


@pytest.fixture
def decoded(monkeypatch):
    """Number of images that have been decoded since."""
    count = [0]
    original = ImageFeature.decode_example

    def decode(self, value, *args, **kwargs):
        count[0] += 1
        return original(self, value, *args, **kwargs)

    monkeypatch.setattr(ImageFeature, "decode_example", decode)
    return count


@pytest.mark.parametrize("augmentation", ["none", "affine"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_pixel_values_are_exactly_those_without_a_cache_and_images_are_decoded_once(
    tmp_path, processor, augmentation, decoded
):
    images = data_set()
    transform = ImageTransform(PROCESSORS[processor](), augmentation)
    resized = ResizedImages(images, transform, tmp_path)
    plain, cached = AugmentedImages(images, transform, seed=3), AugmentedImages(resized, resized.finish, seed=3)
    for epoch in range(2):
        for found, wanted in zip(read(cached, epoch), read(plain, epoch), strict=True):
            assert torch.equal(found, wanted)
    before = decoded[0]
    read(cached, 2)
    assert decoded[0] == before


def test_a_second_run_decodes_the_first_image_alone(tmp_path, decoded):
    transform = ImageTransform(PROCESSORS["vit"]())
    resized = ResizedImages(data_set(), transform, tmp_path)
    wanted = read(AugmentedImages(resized, resized.finish))
    decoded[0] = 0
    again = ResizedImages(data_set(), transform, tmp_path)
    assert torch.equal(read(AugmentedImages(again, again.finish))[0], wanted[0])
    assert decoded[0] == 1


def test_workers_and_copies_fill_and_read_one_file(tmp_path):
    images, transform = data_set(), ImageTransform(PROCESSORS["vit"]())
    resized = ResizedImages(images, transform, tmp_path)
    cached, wanted = AugmentedImages(resized, resized.finish), read(AugmentedImages(images, transform))
    copy = pickle.loads(pickle.dumps(cached))  # as workers that are not forked get one
    for _ in range(2):
        assert torch.equal(read(cached, num_workers=2)[0], wanted[0])
    assert copy.images.cache.missing() == []
    assert torch.equal(read(copy)[0], wanted[0])


def file_of(folder, images, processor, augmentation="none"):
    return ResizedImages(images, ImageTransform(processor, augmentation), folder).cache.file


def test_other_images_or_another_way_of_resizing_have_another_file(tmp_path):
    images, vit = data_set(), PROCESSORS["vit"]()
    files = [
        file_of(tmp_path, images, vit),
        file_of(tmp_path, images, PROCESSORS["bicubic"]()),
        file_of(tmp_path, images, vit, "affine"),
        file_of(tmp_path, images, ViTImageProcessor(size={"height": 24, "width": 16})),
        file_of(tmp_path, data_set(first=1), vit),
        file_of(tmp_path, images.select(range(9)), vit),
    ]
    assert len(set(files)) == len(files)


def test_an_image_that_was_replaced_under_its_name_is_read_anew(tmp_path):
    paths, transform = [tmp_path / f"{index}.png" for index in range(3)], ImageTransform(PROCESSORS["vit"]())
    for first in (0, 5):
        for index, path in enumerate(paths):
            path.write_bytes(encoded(first + index)["bytes"])
        images = listed_images(paths, [0, 1, 0], ["a", "b"], "here")
        resized = ResizedImages(images, transform, tmp_path / "cache")
        wanted = read(AugmentedImages(images, transform))
        assert torch.equal(read(AugmentedImages(resized, resized.finish))[0], wanted[0])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_comes_after_resizing_shares_the_file(tmp_path):
    images = data_set()
    other = ViTImageProcessor(size=SIZE, image_mean=[0.1] * 3, do_rescale=False)
    assert file_of(tmp_path, images, PROCESSORS["vit"]()) == file_of(tmp_path, images, other)


def test_random_resizing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="RandomResizedCrop.*always the same.*cache_images"):
        ResizedImages(data_set(), ImageTransform(PROCESSORS["vit"](), "crop_flip"), tmp_path)


class _Rounding(ViTImageProcessor):
    """A processor that does something between resizing and the rest."""

    def __call__(self, images, **kwargs):
        processed = super().__call__(images, **kwargs)
        if not kwargs:
            processed["pixel_values"] = [pixels + 1e-3 for pixels in processed["pixel_values"]]
        return processed


class _Deaf(ViTImageProcessor):
    """A processor that cannot be told to leave something out."""

    def __call__(self, images):
        return super().__call__(images)


@pytest.mark.parametrize("processor_class", [_Rounding, _Deaf])
def test_a_processor_that_cannot_be_divided_exactly_is_refused(tmp_path, processor_class):
    with pytest.raises(ValueError, match=r"(?s)cannot resize first.*equal pixel values.*cache_images"):
        ResizedImages(data_set(), ImageTransform(processor_class(size=SIZE)), tmp_path)


def test_images_that_keep_shapes_of_their_own_are_refused(tmp_path):
    transform = ImageTransform(CLIPImageProcessor(size={"shortest_edge": 24}, do_center_crop=False))
    resized = ResizedImages(data_set(), transform, tmp_path)
    with pytest.raises(ValueError, match="need one size"):
        resized[list(range(10))]
