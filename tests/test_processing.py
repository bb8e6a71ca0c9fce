"""Images of every colour mode become the pixel values that the backbone's own processor makes."""

import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, ViTImageProcessor

from hf_vpt.data import ImageTransform, collate_images, convert_to_rgb
from hf_vpt.data.processing import output_size


HEIGHT, WIDTH = 16, 24


@pytest.fixture
def processor():
    return ViTImageProcessor(size={"height": HEIGHT, "width": WIDTH})


@pytest.fixture
def noise():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "RGB", "I;16", "I", "F"])
def test_every_colour_mode_becomes_8_bit_rgb(mode):
    image = Image.new("L", (5, 4), 255).convert(mode)
    converted = convert_to_rgb(image)
    assert converted.mode == "RGB"
    assert converted.size == (5, 4)


def test_16_bit_grey_is_scaled_and_not_cut_off():
    image = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.asarray(convert_to_rgb(image))[0, :, 0].tolist() == [0, 100, 255]


def test_8_bit_values_in_a_32_bit_image_keep_their_brightness():
    image = Image.fromarray(np.array([[0, 100, 255]], dtype=np.int32))
    assert np.asarray(convert_to_rgb(image))[0, :, 0].tolist() == [0, 100, 255]


def test_palette_with_transparency_converts_without_a_warning(recwarn):
    image = Image.new("P", (4, 4))
    image.info["transparency"] = bytes(4)
    assert convert_to_rgb(image).mode == "RGB"
    assert not recwarn.list


def test_float_image_of_unknown_range_is_refused():
    with pytest.raises(ValueError, match="0 to 1000.*Values from 0 to 255.*8 bits"):
        convert_to_rgb(Image.fromarray(np.array([[0, 1000]], dtype=np.float32)))


def test_pixel_values_equal_the_processors_own(processor, noise):
    columns = ImageTransform(processor)({"image": [noise], "label": [3]})
    torch.testing.assert_close(columns["pixel_values"][0], processor(noise, return_tensors="pt").pixel_values[0])
    assert columns["labels"] == [3]


def test_random_crop_has_the_processors_size_and_normalisation(processor):
    white = Image.new("RGB", (50, 40), "white")
    torch.manual_seed(0)
    pixels = ImageTransform(processor, augmentation="crop_flip")({"image": [white]})["pixel_values"][0]
    assert pixels.shape == (3, HEIGHT, WIDTH)
    # Mean and standard deviation of this processor are 0.5, so white is one, whatever was cropped.
    torch.testing.assert_close(pixels, torch.ones_like(pixels))


@pytest.mark.parametrize("augmentation", ["affine", "crop_flip"])
def test_augmented_images_differ_between_draws_and_have_the_processors_size(processor, noise, augmentation):
    transform = ImageTransform(processor, augmentation=augmentation)
    first, second = (transform({"image": [noise]})["pixel_values"][0] for _ in range(2))
    assert not torch.equal(first, second)
    assert first.shape == (3, HEIGHT, WIDTH)


def test_output_size_is_the_crop_where_the_processor_crops():
    processor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": HEIGHT, "width": WIDTH})
    assert output_size(processor) == (HEIGHT, WIDTH)
    assert output_size(CLIPImageProcessor(size={"shortest_edge": 40}, do_center_crop=False)) == (40, 40)


def test_unknown_augmentation_is_refused_with_the_choices(processor):
    with pytest.raises(ValueError, match=r"'flop'.*'none', 'affine', 'crop_flip'"):
        ImageTransform(processor, augmentation="flop")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_dataset_with_transform_feeds_a_data_loader(processor, noise, num_workers):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    data = Dataset.from_dict({"image": [noise, noise.convert("L"), noise], "label": [0, 1, 1]}, features=features)
    loader = DataLoader(
        data.with_transform(ImageTransform(processor)),
        batch_size=3,
        num_workers=num_workers,
        collate_fn=collate_images,
    )
    (batch,) = loader
    assert batch["pixel_values"].shape == (3, 3, HEIGHT, WIDTH)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("augmentation", ["affine", "crop_flip"])
def test_transform_survives_pickling(processor, noise, augmentation):
    transform = ImageTransform(processor, augmentation=augmentation)
    copy = pickle.loads(pickle.dumps(transform))
    torch.manual_seed(1)
    expected = transform({"image": [noise]})["pixel_values"][0]
    torch.manual_seed(1)
    assert torch.equal(copy({"image": [noise]})["pixel_values"][0], expected)


def test_collator_names_the_missing_transform():
    with pytest.raises(ValueError, match="keys.*'image'.*with_transform"):
        collate_images([{"image": None, "label": 0}])


def test_collator_refuses_images_of_different_sizes():
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, do_center_crop=False)
    columns = ImageTransform(processor)({"image": [Image.new("RGB", (16, 20)), Image.new("RGB", (30, 16))]})
    with pytest.raises(ValueError, match=r"\(3, 16, 30\), \(3, 20, 16\).*size with height and width"):
        collate_images([{"pixel_values": pixels} for pixels in columns["pixel_values"]])
