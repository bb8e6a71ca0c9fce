"""Preprocessing is a choice that is saved, and what is saved gives the pixel values that scores were measured with."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTImageProcessorPil,
    set_seed,
)

from hf_vpt.data import ImageTransform
from hf_vpt.data.preprocessing import choose_augmentation, choose_processor
from hf_vpt.training import DataArguments, build_trainer, parse_arguments, train_classifier


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# One step of 8 bits, normalised: backends round once more or less.
ONE_STEP = 1 / 255 / min(STD) + 1e-5


@pytest.fixture
def picture():
    """A smooth image of 375 × 500 pixels, as filters differ most on noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC)


def by_torchvision(image, *steps):
    steps = [*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose(steps)(image)


PUBLISHED = {
    "fgvc/cub": [v2.Resize(256), v2.CenterCrop(224)],
    "vtab/dtd": [v2.Resize((224, 224))],
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("own_class", [ViTImageProcessor, ViTImageProcessorPil, CLIPImageProcessor])
def test_published_preprocessing_is_that_of_the_papers_with_every_backend_and_after_saving(
    picture, tmp_path, name, own_class
):
    expected = by_torchvision(picture, *PUBLISHED[name])
    processor = choose_processor(own_class(), "published", name)
    assert isinstance(processor, ViTImageProcessorPil) == (own_class is ViTImageProcessorPil)
    (pixels,) = ImageTransform(processor)({"image": [picture]})["pixel_values"]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=ONE_STEP)
    processor.save_pretrained(tmp_path)
    for backend in ("torchvision", "pil"):
        saved = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        pixels = saved(picture.convert("RGBA"), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, expected, rtol=0, atol=ONE_STEP)
        if backend == ("pil" if own_class is ViTImageProcessorPil else "torchvision"):
            assert torch.equal(pixels, ImageTransform(processor)({"image": [picture]})["pixel_values"][0])


def test_the_checkpoints_own_processor_is_the_default_and_left_as_it_is():
    own = ViTImageProcessor()
    assert choose_processor(own, "processor", "fgvc/cub") is own
    assert DataArguments().preprocessing == "processor"


def test_other_image_sizes_keep_the_published_proportion():
    processor = choose_processor(ViTImageProcessor(size={"height": 448, "width": 448}), "published", "fgvc/cub")
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (512, 448)


def test_published_training_images_are_cut_and_flipped_at_their_evaluation_scale():
    # Vertical stripes: where a crop began and whether it was flipped can be read off one row.
    stripes = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    processor = choose_processor(ViTImageProcessor(), "published", "fgvc/cub")
    transform = ImageTransform(processor, choose_augmentation("none", "published", "fgvc/cub"))
    columns = transform({"image": [Image.fromarray(stripes)] * 40}, list(range(40)))["pixel_values"]
    rows = [(row[0, 0] * STD[0] + MEAN[0]) * 255 for row in columns]
    flipped = [bool(row[0] > row[-1]) for row in rows]
    starts = [round(float(row.min())) for row in rows]
    for row, start in zip(rows, starts, strict=True):
        torch.testing.assert_close(row.sort().values, torch.arange(start, start + 224.0), rtol=0, atol=1e-2)
    assert 10 < sum(flipped) < 30
    assert min(starts) >= 0 and max(starts) <= 32 and len(set(starts)) > 15


def test_random_cuts_at_one_scale_need_a_processor_that_cuts():
    with pytest.raises(ValueError, match="cuts nothing out.*preprocessing published"):
        ImageTransform(ViTImageProcessor(), "resize_crop_flip")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dataset_name": "digits"}, "published and the data set 'digits'.*vtab/<task> and fgvc/<set> alone"),
        (
            {"dataset_name": "vtab/dtd", "augmentation": "crop_flip"},
            "for vtab/dtd.*belongs no augmentation",
        ),
        ({"dataset_name": "fgvc/cub", "augmentation": "affine"}, "'affine' for fgvc/cub.*random crops and flips"),
        ({"preprocessing": "imagenet"}, r"preprocessing is 'imagenet'.*\['processor', 'published'\]"),
    ],
)
def test_a_preprocessing_that_is_not_published_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        DataArguments(**({"preprocessing": "published"} | settings))


@pytest.fixture
def options(tmp_path):
    """A short run on birds in their official folder, with a tiny backbone."""
    set_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "backbone")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "backbone")
    lines = {"images": [], "image_class_labels": [], "train_test_split": [], "classes": ["1 auk", "2 emu"]}
    (tmp_path / "birds" / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(1, 45):
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "birds" / "images" / f"{number}.png")
        lines["images"].append(f"{number} {number}.png")
        lines["image_class_labels"].append(f"{number} {1 + number % 2}")
        lines["train_test_split"].append(f"{number} {int(number <= 40)}")
    for name, text in lines.items():
        (tmp_path / "birds" / f"{name}.txt").write_text("\n".join(text))
    return [
        *f"--method vpt --model_name_or_path {tmp_path}/backbone --dataset_name fgvc/cub --use_cpu".split(),
        *f"--dataset_dir {tmp_path}/birds --output_dir {tmp_path}/out --num_train_epochs 1".split(),
        *["--num_virtual_tokens", "2", "--disable_tqdm=1", "--preprocessing", "published"],
    ]


def test_a_run_saves_the_processor_that_its_test_images_went_through_and_says_so(options, tmp_path):
    settings = parse_arguments(options)
    results = train_classifier(settings)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written == results
    assert (written["preprocessing"], written["augmentation"]) == ("published", "resize_crop_flip")
    assert (written["dataset_variant"], written["dataset_name"]) == ("official", "fgvc/cub")
    assert written["num_images"] == {"train": 36, "validation": 4, "test": 4}
    _, data = build_trainer(settings)
    image = Image.open(tmp_path / "birds" / "images" / "41.png")
    saved = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert torch.equal(data["test"][0]["pixel_values"], saved(image, return_tensors="pt")["pixel_values"][0])
    expected = by_torchvision(image, v2.Resize(18), v2.CenterCrop(16))
    torch.testing.assert_close(data["test"][0]["pixel_values"], expected, rtol=0, atol=ONE_STEP)
    assert not torch.equal(data["train"][0]["pixel_values"], data["train"][1]["pixel_values"])


def test_a_run_does_not_go_on_with_another_preprocessing(options, tmp_path):
    trainer, _ = build_trainer(parse_arguments(options))
    states = [c.state_dict() for c in trainer.callback_handler.callbacks if type(c).__name__ == "RunIdentity"]
    other, _ = build_trainer(parse_arguments([*options, "--preprocessing", "processor"]))
    (identity,) = [c for c in other.callback_handler.callbacks if type(c).__name__ == "RunIdentity"]
    with pytest.raises(ValueError, match="preprocessing published, and a run with preprocessing processor"):
        identity.load_state_dict(states[0])
