"""Images of every mode and orientation are read right; broken ones are named, or left out and counted."""

import errno
import io
import json
import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTImageProcessorPil, set_seed

from hf_vpt.data import (
    AugmentedImages,
    BrokenImageError,
    ImageTransform,
    StreamedImages,
    collate_images,
    decode_to_rgb,
    load_image_dataset,
)
from hf_vpt.training import DataArguments, parse_arguments, train_classifier


@pytest.fixture(autouse=True)
def short_passes_end_at_once(monkeypatch):
    # `datasets` waits five seconds at the end of some passes, which is nothing in passes of hours.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def stored(content, path=None):
    """An image as `datasets` holds it before it is decoded."""
    return {"bytes": content, "path": path}


def transparent(mode):
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    return image if mode == "RGBA" else image.convert(mode)


# --- odd images


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_images_have_their_colours(kind):
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixels = np.asarray(decode_to_rgb(stored(encode(red, kind))))
    np.testing.assert_allclose(pixels[4, 4], [255, 0, 0], atol=3)


def test_palette_images_have_the_colours_of_their_palette():
    image = Image.new("RGB", (2, 1), (10, 200, 30))
    image.putpixel((1, 0), (250, 0, 90))
    content = encode(image.convert("P", palette=Image.Palette.ADAPTIVE))
    assert Image.open(io.BytesIO(content)).mode == "P"
    assert np.asarray(decode_to_rgb(stored(content))).tolist() == [[[10, 200, 30], [250, 0, 90]]]


def test_16_bit_grey_files_keep_their_brightness():
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        assert np.asarray(decode_to_rgb(stored(encode(grey, kind))))[0].tolist() == [[n] * 3 for n in (0, 100, 255)]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGBa", "La"])
def test_transparency_is_dropped_as_the_pipeline_does_and_without_a_warning(mode, recwarn):
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([200, 100, 50, 10, 20, 30] + [0] * 762)
        image.putpixel((1, 0), 1)
        content = encode(image, transparency=1)
        image = decode_to_rgb(stored(content))
    elif mode in ("RGBa", "La"):  # no file has these modes
        image = decode_to_rgb(transparent("RGBA" if mode == "RGBa" else "LA").convert(mode))
    else:
        image = decode_to_rgb(stored(encode(transparent(mode))))
    expected = np.asarray(transparent("LA" if mode in ("LA", "La") else "RGBA").convert("RGB"))
    visible = np.s_[:, :1] if mode in ("RGBa", "La") else np.s_[:]
    assert np.asarray(image)[visible].tolist() == expected[visible].tolist()
    assert not recwarn.list


@pytest.mark.parametrize("orientation", range(1, 9))
def test_cameras_notes_on_orientation_are_followed_once(orientation):
    upright = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    # What the camera stores is turned so that the note turns it back.
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    raw = upright.transpose(turn[orientation]) if orientation in turn else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(raw, exif=exif)
    expected = np.asarray(upright.convert("RGB"))
    assert np.array_equal(np.asarray(decode_to_rgb(stored(content))), expected)
    # Pillow images that nobody turned, and those that `datasets` has turned already.
    assert np.array_equal(np.asarray(decode_to_rgb(Image.open(io.BytesIO(content)))), expected)
    turned = ImageFeature().decode_example(stored(content))
    assert np.array_equal(np.asarray(decode_to_rgb(turned)), expected)


@pytest.mark.parametrize("processor_class", [ViTImageProcessor, ViTImageProcessorPil])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (1, 7)])
@pytest.mark.parametrize("augmentation", ["none", "affine", "crop_flip", "resize_crop_flip"])
def test_images_of_one_pixel_or_line_become_pixel_values_of_their_colours(processor_class, size, augmentation):
    crop = {"do_center_crop": True, "size": {"shortest_edge": 9}, "crop_size": {"height": 8, "width": 8}}
    processor = processor_class(image_mean=[0.0] * 3, image_std=[1.0] * 3, **crop)
    image = Image.new("RGB", size, (255, 51, 0))
    transform = ImageTransform(processor, augmentation)
    (pixels,) = transform({"image": [stored(encode(image))]}, seeds=[0])["pixel_values"]
    assert pixels.shape == (3, 8, 8)
    torch.testing.assert_close(pixels[:, 4, 4], torch.tensor([1.0, 0.2, 0.0]), rtol=0, atol=1e-6)


# --- broken images

WHOLE = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)))
BROKEN = {
    "text": b"<html>not found</html>",
    "empty": b"",
    "cut off": WHOLE[: len(WHOLE) // 2],
    "wrong inside": WHOLE[:200] + bytes(100) + WHOLE[300:],
    "cut off jpeg": encode(Image.open(io.BytesIO(WHOLE)), "JPEG")[:700],
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_image_is_named_with_its_path_and_position(content):
    with pytest.raises(
        BrokenImageError, match=r"Image 17 \('cats/1.png'\) cannot be read: .*--broken_images skip"
    ) as e:
        decode_to_rgb(stored(content, "cats/1.png"), 17)
    assert (e.value.path, e.value.position) == ("cats/1.png", 17)
    copy = pickle.loads(pickle.dumps(e.value))
    assert (str(copy), copy.path, copy.position) == (str(e.value), "cats/1.png", 17)


def test_a_missing_file_and_an_image_without_a_name_are_broken_images_too(tmp_path):
    with pytest.raises(BrokenImageError, match=r"An image \('.*nowhere.png'\) cannot be read"):
        decode_to_rgb(str(tmp_path / "nowhere.png"))
    with pytest.raises(BrokenImageError, match="Image 3 cannot be read"):
        decode_to_rgb(stored(b"nothing"), 3)
    with pytest.raises(BrokenImageError, match="Image 4 cannot be read: A float image"):
        decode_to_rgb(Image.fromarray(np.array([[0, 1000]], dtype=np.float32)), 4)


def test_a_lost_connection_is_not_a_broken_image(monkeypatch):
    def fail(self, image, **kwargs):
        raise ConnectionError("lost")

    monkeypatch.setattr(ImageFeature, "decode_example", fail)
    with pytest.raises(ConnectionError):
        decode_to_rgb({"path": "hf://datasets/user/name/1.png", "bytes": None})
    with pytest.raises(BrokenImageError):
        decode_to_rgb({"path": "1.png", "bytes": None})


def test_a_file_that_is_cut_off_is_broken_wherever_it_lies():
    # Regression: Pillow's own OSError passed for a lost connection where the path of an image is an address.
    path = "hf://datasets/user/name/1.png"
    for image in (stored(WHOLE[: len(WHOLE) // 2], path), stored(b"", path)):
        with pytest.raises(BrokenImageError, match="hf://datasets/user/name/1.png"):
            decode_to_rgb(image)


@pytest.mark.parametrize("path", ["1.png", "hf://datasets/user/name/1.png"])
def test_trouble_of_the_machine_is_not_a_broken_image(monkeypatch, path):
    def fail(self, image, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(ImageFeature, "decode_example", fail)
    with pytest.raises(OSError, match="Too many open files"):
        decode_to_rgb({"path": path, "bytes": None})


def test_a_remote_file_that_is_cut_off_is_broken(monkeypatch):
    def fail(self, image, **kwargs):
        raise OSError("image file is truncated (3 bytes not processed)")

    monkeypatch.setattr(ImageFeature, "decode_example", fail)
    with pytest.raises(BrokenImageError, match="truncated"):
        decode_to_rgb({"path": "hf://datasets/user/name/1.png", "bytes": None})


@pytest.fixture
def transform():
    size = {"height": 4, "width": 6}
    return ImageTransform(ViTImageProcessor(size=size, do_resize=False, do_rescale=False, do_normalize=False))


def grey_images(broken=(), num_images=12, decode=True):
    """Images of 4 by 6 pixels, each of its own grey value, some of them broken; names only for even ones."""
    contents = [
        b"broken" if number in broken else encode(Image.new("L", (6, 4), number)) for number in range(num_images)
    ]
    rows = [stored(content, None if number % 2 else f"{number}.png") for number, content in enumerate(contents)]
    features = Features({"image": ImageFeature(decode=decode), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": rows, "label": [n % 2 for n in range(num_images)]}, features=features)


def greys(images, **loading):
    loader = DataLoader(images, batch_size=3, collate_fn=collate_images, **loading)
    return [int(value) for batch in loader for value in batch["pixel_values"][:, 0, 0, 0]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("decode", [True, False])
def test_training_stops_at_a_broken_image_and_names_it(transform, num_workers, decode):
    with pytest.raises(BrokenImageError, match=r"Image 8 \('8.png'\) cannot be read"):
        greys(AugmentedImages(grey_images([8], decode=decode), transform), num_workers=num_workers)
    with pytest.raises(BrokenImageError, match="Image 7 cannot be read"):
        greys(AugmentedImages(grey_images([7], decode=decode), transform), num_workers=num_workers)
    stream = grey_images([8], decode=False).to_iterable_dataset()
    with pytest.raises(BrokenImageError, match=r"Image 8 of worker 0 \('8.png'\) cannot be read"):
        greys(StreamedImages(stream, transform), num_workers=num_workers)


@pytest.mark.parametrize("broken", [[], [8], [0, 1, 2, 7, 11]])
def test_broken_images_are_left_out_and_counted(transform, broken):
    images = AugmentedImages(grey_images(broken), transform, broken_images="skip")
    assert images.num_broken == len(broken)
    assert greys(images) == [number for number in range(12) if number not in broken]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_of_a_stream_are_passed_over_and_counted(transform, num_workers):
    broken = [*range(32), 33, 50]  # the first chunk is broken as a whole
    stream = grey_images(broken, num_images=70, decode=False).to_iterable_dataset(num_shards=2)
    images = StreamedImages(stream, transform, broken_images="skip")
    expected = [number for number in range(70) if number not in broken]
    for count in (1, 2):
        assert sorted(greys(images, num_workers=num_workers)) == expected
        assert images.num_broken == count * len(broken)


def test_left_out_images_change_nothing_for_the_others_of_a_stream():
    transform = ImageTransform(ViTImageProcessor(size={"height": 4, "width": 6}), "crop_flip")
    streams = [grey_images(broken, decode=False).to_iterable_dataset() for broken in ([], [3])]
    whole, rest = (list(StreamedImages(stream, transform, broken_images="skip")) for stream in streams)
    for one, other in zip(whole[:3] + whole[4:], rest, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_a_split_without_one_image_that_can_be_read_is_an_error(transform):
    with pytest.raises(ValueError, match=r"None of 12 images can be read \(0.png, image 1, .* and 2 more\)"):
        AugmentedImages(grey_images(range(12)), transform, broken_images="skip")


@pytest.mark.parametrize("make", [AugmentedImages, StreamedImages])
def test_another_way_with_broken_images_is_refused(make, transform):
    with pytest.raises(ValueError, match=r"broken_images is 'ignore'.*\['stop', 'skip'\]"):
        make(grey_images(), transform, broken_images="ignore")
    with pytest.raises(ValueError, match="broken_images is 'ignore'"):
        DataArguments(broken_images="ignore")


@pytest.fixture
def options(tmp_path):
    """A short run on a folder of 40 images with a tiny backbone."""
    set_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "backbone")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "backbone")
    for number in range(40):
        folder = tmp_path / "images" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode(Image.new("L", (6, 4), number)))
    return [
        *f"--method vpt --model_name_or_path {tmp_path}/backbone --dataset_name {tmp_path}/images --use_cpu".split(),
        *f"--output_dir {tmp_path}/out --num_train_epochs 1 --num_virtual_tokens 2 --disable_tqdm=1".split(),
    ]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("caches", ["", "--cache_images", "--cache_images --method linear_probe --cache_prefix"])
def test_a_run_stops_at_a_broken_image_of_any_split_or_counts_it(options, tmp_path, split, caches):
    name = str(tmp_path / "images")
    images = load_image_dataset(name)[split].cast_column("image", ImageFeature(decode=False))
    path = images[2]["image"]["path"]
    with open(path, "wb") as file:
        file.write(b"broken")
    if caches:
        options = [*options, *caches.split(), "--cache_dir", str(tmp_path / "cache")]
        if "probe" in caches:
            options = [option for option in options if option not in ("--num_virtual_tokens", "2")]
    with pytest.raises(BrokenImageError, match=rf"Image 2 \('{path}'\) cannot be read"):
        train_classifier(parse_arguments(options))
    results = train_classifier(parse_arguments([*options, "--broken_images", "skip"]))
    assert results["num_broken_images"] == {"train": 0, "validation": 0, "test": 0} | {split: 1}
    assert sum(results["num_images"].values()) == 39
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == results
