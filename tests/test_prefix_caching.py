"""Runs that start at the first block with prompts end where runs without a cache end."""

import json

import numpy as np
import pytest
import torch
from conftest import PROCESSES, StopAt
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_from_disk
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from hf_vpt.data import AugmentedImages, ImageTransform, PrefixImages, collate_images
from hf_vpt.training import build_trainer, parse_arguments, train_classifier


CLASSES = ["dark", "grey", "light"]
COMMON = ["--use_cpu", "--disable_tqdm=1", "--per_device_train_batch_size", "8", "--num_train_epochs", "2"]
COMMON += ["--learning_rate", "0.05", "--no_load_best_model_at_end"]
ONLINE = ["--scoring", "online", "--relocation_steps", "5"]
PROMPTS = {
    "vpt": "--num_virtual_tokens 3 --prompt_dropout 0.2",
    "vapt": "--num_virtual_tokens 3 --projector_dim 4",
    "bpt": "--num_virtual_tokens 3 --rank 4 --basis fwhiten --num_whitening_images 8",
    "provpt": "--num_virtual_tokens 1 --allocation random --relocation_warmup 0",
}


def write_backbone(folder, seed=0):
    set_seed(seed)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[16, 24],
        patch_size=8,
        hidden_dropout_prob=0.5,
        initializer_range=0.3,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 24}).save_pretrained(folder)
    return str(folder)


def write_images(folder, seed=0):
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    generator = np.random.default_rng(seed)

    def split(number):
        labels = [index % 3 for index in range(number)]
        pixels = [
            (100 * label + generator.integers(0, 50, (20, 30))).clip(0, 255).astype(np.uint8) for label in labels
        ]
        return Dataset.from_dict(
            {"image": [PILImage.fromarray(p) for p in pixels], "label": labels}, features=features
        )

    DatasetDict(train=split(20), validation=split(9), test=split(9)).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def settings(backbone, images, tmp_path):
    """Parse settings for a short run with prompts in the last two of four blocks."""

    def parse(method, *options, layers="-2 -1", folder="out"):
        words = [
            *f"--method {method} --model_name_or_path {backbone} --dataset_name {images}".split(),
            *f"--output_dir {tmp_path / folder} --cache_dir {tmp_path / 'cache'}".split(),
            *COMMON,
            *PROMPTS.get(method, "").split(),
        ]
        if method in PROMPTS:
            words += ["--layers_to_transform", *layers.split()]
        return parse_arguments([*words, *options])

    return parse


@pytest.fixture
def decoded(monkeypatch):
    """Number of images that have been decoded since."""
    count = [0]
    original = Image.decode_example

    def decode(self, value, *args, **kwargs):
        count[0] += 1
        return original(self, value, *args, **kwargs)

    monkeypatch.setattr(Image, "decode_example", decode)
    return count


def cache_files(tmp_path):
    return sorted((tmp_path / "cache" / "prefixes").iterdir())


def run(settings, tmp_path, method, *options, folder="out", **kwargs):
    """Train; returns losses and scores of every epoch, what metrics.json holds, and the trained tensors."""
    trainer, _ = build_trainer(settings(method, *options, folder=folder, **kwargs))
    history = []

    class Listen(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            history.append(
                {name: value for name, value in logs.items() if "runtime" not in name and "per" not in name}
            )

    trainer.add_callback(Listen())
    trainer.train()
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return history, trainer.evaluate(), trained


def assert_same_run(found, wanted):
    assert found[0] == wanted[0]
    assert found[1]["eval_loss"] == wanted[1]["eval_loss"]
    assert found[2].keys() == wanted[2].keys()
    for name, tensor in wanted[2].items():
        assert torch.equal(found[2][name], tensor), name


@pytest.mark.parametrize("method", [*PROMPTS, "linear_probe"])
def test_losses_scores_and_weights_are_those_without_a_cache(settings, tmp_path, method):
    wanted = run(settings, tmp_path, method, folder="plain")
    assert_same_run(run(settings, tmp_path, method, "--cache_prefix", folder="cached"), wanted)
    assert len(cache_files(tmp_path)) >= 2, "train and validation"


def test_accumulated_and_unequal_batches_with_workers_are_those_without_a_cache(settings, tmp_path):
    options = ["--gradient_accumulation_steps", "2", "--per_device_eval_batch_size", "5"]
    options += ["--dataloader_num_workers", "1"]
    wanted = run(settings, tmp_path, "provpt", *options, folder="plain")
    assert_same_run(run(settings, tmp_path, "provpt", *options, "--cache_prefix", folder="cached"), wanted)


def test_results_describe_the_same_data_with_and_without_caches(settings, tmp_path):
    wanted = train_classifier(settings("vpt", "--num_train_epochs", "1", folder="plain"))
    options = ["--num_train_epochs", "1", "--cache_prefix", "--cache_images"]
    assert train_classifier(settings("vpt", *options, folder="cached")) == wanted


@pytest.mark.parametrize("cache", ["cache_images", "cache_prefix"])
def test_crops_of_the_published_preprocessing_are_refused(cache, tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--dataset_name", "fgvc/cub", "--preprocessing", "published"]
    with pytest.raises(ValueError, match=f"{cache} is set with augmentation 'resize_crop_flip'"):
        parse_arguments([*words, f"--{cache}"])


def test_both_caches_go_together(settings, tmp_path):
    wanted = run(settings, tmp_path, "vpt", folder="plain")
    both = ["--cache_prefix", "--cache_images"]
    assert_same_run(run(settings, tmp_path, "vpt", *both, folder="cached"), wanted)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["images", "prefixes"]


@pytest.mark.parametrize("augmentation", ["none", "affine"])
def test_runs_with_cached_images_are_those_without(settings, tmp_path, augmentation):
    options = ["--augmentation", augmentation]
    wanted = run(settings, tmp_path, "vpt", *options, folder="plain")
    for folder in ("first", "second"):
        assert_same_run(run(settings, tmp_path, "vpt", *options, "--cache_images", folder=folder), wanted)


@pytest.mark.parametrize("method", ["vpt", "linear_probe"])
def test_images_are_decoded_once_and_by_a_second_run_not_at_all(settings, tmp_path, decoded, method):
    seen = []
    for folder in ("first", "second"):
        decoded[0] = 0
        train_classifier(settings(method, "--cache_prefix", folder=folder))
        seen.append(decoded[0])
    # One of each split shows what it will be.
    assert seen == [20 + 9 + 9 + 3, 3]
    results = [json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("first", "second")]
    assert results[0] == results[1]


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float16"])
def test_half_precision_halves_the_cache_and_nearly_keeps_the_losses(settings, tmp_path, cache_dtype):
    wanted = run(settings, tmp_path, "vpt", "--cache_prefix", folder="plain")
    before = {file: file.stat().st_size for file in cache_files(tmp_path)}
    found = run(settings, tmp_path, "vpt", "--cache_prefix", "--cache_dtype", cache_dtype, folder="half")
    sizes = [file.stat().st_size for file in cache_files(tmp_path) if file not in before]
    assert max(sizes) < 0.52 * max(before.values())
    assert found[0][0]["loss"] != wanted[0][0]["loss"]
    assert found[0][0]["loss"] == pytest.approx(wanted[0][0]["loss"], rel=0.05)


def test_mixed_precision_has_a_cache_of_its_own(settings, tmp_path):
    run(settings, tmp_path, "vpt", "--cache_prefix", "--num_train_epochs", "1", folder="full")
    number = len(cache_files(tmp_path))
    wanted = run(settings, tmp_path, "vpt", "--bf16", folder="plain")
    assert_same_run(run(settings, tmp_path, "vpt", "--bf16", "--cache_prefix", folder="cached"), wanted)
    assert len(cache_files(tmp_path)) == 2 * number


@pytest.mark.parametrize("method", ["vpt", "provpt"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_without_a_cache_ends(settings, tmp_path, method):
    options = ["--save_strategy", "steps", "--save_steps", "4"]  # three steps an epoch
    wanted = run(settings, tmp_path, method, *options, folder="plain")
    options += ["--cache_prefix"]
    trainer, _ = build_trainer(settings(method, *options, folder="cached"))
    trainer.add_callback(StopAt(4))
    trainer.train()
    trainer, _ = build_trainer(settings(method, *options, folder="cached"))
    trainer.train(resume_from_checkpoint="last")
    assert trainer.evaluate()["eval_loss"] == wanted[1]["eval_loss"]
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, wanted[2][name]), name


def test_a_prompt_that_leaves_the_first_block_lets_the_next_one_be_the_start(settings, tmp_path):
    options = ["--allocation_seed", "3", "--num_train_epochs", "6"]
    wanted = run(settings, tmp_path, "provpt", *options, layers="1 2 3", folder="plain")
    found = run(settings, tmp_path, "provpt", *options, "--cache_prefix", layers="1 2 3", folder="cached")
    assert_same_run(found, wanted)
    starts = {file.name.rpartition("block")[2] for file in cache_files(tmp_path)}
    assert "1" in starts and len(starts) > 1
    distributions = [
        [entry[f"relocation_prompts_in_block_{index}"] for index in (1, 2, 3)]
        for entry in wanted[0]
        if "relocation_prompts_in_block_1" in entry
    ]
    assert any(counts[0] == 0 for counts in distributions), distributions


def test_the_best_epochs_own_first_block_is_the_start_of_the_final_scores(settings, tmp_path):
    options = ["--allocation_seed", "3", "--num_train_epochs", "6", "--load_best_model_at_end"]
    wanted = train_classifier(settings("provpt", *options, layers="1 2 3", folder="plain"))
    assert train_classifier(settings("provpt", *options, "--cache_prefix", layers="1 2 3", folder="cached")) == wanted


def test_another_backbone_or_other_images_have_another_cache(settings, tmp_path):
    def options(**changes):
        parsed = settings("vpt", "--cache_prefix")
        for name, value in changes.items():
            setattr(parsed.model if hasattr(parsed.model, name) else parsed.data, name, value)
        return parsed

    def keys_of(**changes):
        return {images.key for images in build_trainer(options(**changes))[1].values()}

    wanted = keys_of()
    assert len(wanted) == 3
    assert keys_of() == wanted
    assert not keys_of(model_name_or_path=write_backbone(tmp_path / "other", seed=1)) & wanted
    assert not keys_of(dataset_name=write_images(tmp_path / "others", seed=1)) & wanted
    broken = write_backbone(tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    name = next(name for name in weights if "fc1.bias" in name or "intermediate.dense.bias" in name)
    save_file(weights | {name: weights[name] + 1e-3}, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    assert not keys_of(model_name_or_path=broken) & wanted
    larger = ViTImageProcessor(size={"height": 16, "width": 24}, image_mean=[0.4] * 3)
    larger.save_pretrained(write_backbone(tmp_path / "processed"))
    assert not keys_of(model_name_or_path=str(tmp_path / "processed")) & wanted


def train_cached(settings):
    torch.set_num_threads(1)
    train_classifier(settings)


def test_two_runs_at_once_fill_one_cache(settings, tmp_path):
    wanted = train_classifier(settings("vpt", folder="plain"))
    folders = ["first", "second"]
    processes = [
        PROCESSES.Process(target=train_cached, args=(settings("vpt", "--cache_prefix", folder=f),)) for f in folders
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for folder in folders:
        found = json.loads((tmp_path / folder / "metrics.json").read_text())
        assert found["test_loss"] == wanted["test_loss"]
    assert len(cache_files(tmp_path)) == 3


def test_a_damaged_row_is_computed_from_its_image(settings, tmp_path):
    wanted = run(settings, tmp_path, "vpt", "--cache_prefix", folder="first")
    for file in cache_files(tmp_path):
        content = bytearray(file.read_bytes())
        content[-3] ^= 255
        file.write_bytes(content)
    assert_same_run(run(settings, tmp_path, "vpt", "--cache_prefix", folder="second"), wanted)


# The data set


@pytest.fixture
def prefix_images(images, tmp_path):
    rows = load_from_disk(images)["train"]
    pixels = AugmentedImages(rows, ImageTransform(ViTImageProcessor(size={"height": 16, "width": 24})))
    return PrefixImages(rows, pixels, "key", tmp_path)


def test_a_batch_is_tokens_where_all_are_cached_and_images_else(prefix_images, decoded):
    assert prefix_images[3]["pixel_values"].shape == (3, 16, 24)
    prefix_images.start_at(2, (7, 5))
    rows = torch.randn(20, 7, 5)
    for index in (0, 1, 2, 4):
        prefix_images.cache.write(index, rows[index])
    decoded[0] = 0
    loader = DataLoader(prefix_images, batch_size=2, collate_fn=collate_images)
    batches = list(loader)
    assert [batch["pixel_values"].ndim for batch in batches[:3]] == [3, 4, 4]
    assert torch.equal(batches[0]["pixel_values"], rows[:2])
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), torch.tensor(prefix_images.labels["label"]))
    assert decoded[0] == 18
    assert prefix_images.features["label"].names == CLASSES
    with pytest.raises(IndexError):
        prefix_images[20]


def test_running_workers_follow_when_another_block_is_the_first(prefix_images):
    loader = DataLoader(
        prefix_images, batch_size=20, collate_fn=collate_images, num_workers=1, persistent_workers=True
    )
    assert next(iter(loader))["pixel_values"].ndim == 4
    for block in (2, 3):
        prefix_images.start_at(block, (7, 5))
        for index in range(20):
            prefix_images.cache.write(index, torch.full((7, 5), float(block)))
        assert torch.equal(next(iter(loader))["pixel_values"], torch.full((20, 7, 5), float(block)))


# What is refused, before anything is loaded


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("vpt", ["--layers_to_transform", "0", "3"], r"layers_to_transform \[0, 3\].*later blocks"),
        ("vpt", ["--layers_to_transform", "3", "--mixup_alpha", "0.2"], "mixup_alpha 0.2.*leave cache_prefix out"),
        ("vpt", ["--layers_to_transform", "3", "--cutmix_alpha", "1"], "cutmix_alpha 1.*leave cache_prefix out"),
        ("vpt", ["--layers_to_transform", "3", "--torch_compile"], "torch_compile True.*leave torch_compile out"),
        ("vpt", ["--layers_to_transform", "3", "--bf16_full_eval"], "bf16_full_eval True.*leave bf16_full_eval out"),
        ("full", [], "method 'full'.*choose a prompt method"),
        (
            "provpt",
            ["--layers_to_transform", "2", "3", *ONLINE],
            "relocation_steps 5",
        ),
    ],
)
def test_settings_that_need_all_blocks_are_refused_before_anything_is_loaded(method, options, message, tmp_path):
    words = ["--method", method, "--model_name_or_path", "/nowhere", "--dataset_name", "/nowhere", *COMMON]
    settings = parse_arguments([*words, "--output_dir", str(tmp_path), "--cache_prefix", *options])
    with pytest.raises(ValueError, match=f"Found cache_prefix and .*{message}"):
        build_trainer(settings)


@pytest.mark.parametrize("options", [[], ["--deep", "false"]])
def test_prompts_in_all_blocks_or_through_all_of_them_are_refused(options, tmp_path):
    words = ["--method", "vpt", "--dataset_name", "/nowhere", *COMMON, "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="Found cache_prefix and"):
        build_trainer(parse_arguments([*words, "--cache_prefix", *options]))


def test_a_negative_index_of_block_0_is_refused_when_the_model_is_known(settings):
    with pytest.raises(ValueError, match="prompts in block 0"):
        build_trainer(settings("vpt", "--cache_prefix", layers="-4 -1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--cache_prefix --augmentation affine", "cache_prefix .*'affine'.*needs augmentation none"),
        ("--cache_prefix --augmentation crop_flip", "cache_prefix .*'crop_flip'.*needs augmentation none"),
        ("--cache_images --augmentation crop_flip", "cache_images .*'crop_flip'.*needs augmentation none or affine"),
        ("--cache_prefix --streaming --max_steps 3", "cache_prefix and streaming are both set"),
        ("--cache_images --streaming --max_steps 3", "cache_images and streaming are both set"),
    ],
)
def test_data_that_differ_each_time_are_refused_when_settings_are_read(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--output_dir", str(tmp_path), "--use_cpu", *options.split()])
