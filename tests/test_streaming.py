"""Training on streams: runs counted in steps, for folders and parquet files, that resume where they stopped."""

import io
import json
import math

import numpy as np
import pytest
import torch
from conftest import StopAt
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from hf_vpt.training import (
    ImageClassificationTrainer,
    ModelArguments,
    TrainingArguments,
    build_trainer,
    load_classifier,
    parse_arguments,
    prepare_for_training,
    train_classifier,
)
from hf_vpt.tuners import METHODS


CLASSES = ["cat", "dog", "emu"]
METHOD_OPTIONS = {
    "bpt": ["--rank", "8", "--basis", "twhiten", "--num_whitening_images", "9"],
    "provpt": ["--scoring", "online", "--relocation_steps", "3", "--allocation", "random"],
}


@pytest.fixture(autouse=True)
def short_passes_end_at_once(monkeypatch):
    # `datasets` waits five seconds after each pass over several parquet files, which is nothing in passes of hours.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    set_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data_folders(tmp_path_factory):
    """The same 48 images, of three classes that differ in their grey value, as PNG files and as parquet files."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    files, labels = [], [index % len(CLASSES) for index in range(48)]
    for index, label in enumerate(labels):
        buffer = io.BytesIO()
        PILImage.fromarray((100 * label + generator.integers(0, 40, (16, 16))).astype(np.uint8)).save(buffer, "PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
        (folder / "images" / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        (folder / "images" / CLASSES[label] / f"{index}.png").write_bytes(buffer.getvalue())
    data = Dataset.from_dict(
        {"image": files, "label": labels}, features=Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    )
    (folder / "parquet").mkdir()
    for number in range(3):
        part = data.shard(3, number, contiguous=True)
        part.to_parquet(folder / "parquet" / f"train-{number:05d}-of-00003.parquet")
    return {"images": str(folder / "images"), "parquet": str(folder / "parquet")}


@pytest.fixture
def settings(backbone, data_folders, tmp_path):
    def parse(method, *options, kind="parquet", steps=("--max_steps", "60")):
        common = f"--method {method} --model_name_or_path {backbone} --dataset_name {data_folders[kind]} --streaming"
        common += f" --output_dir {tmp_path}/out --use_cpu --disable_tqdm=1 --per_device_train_batch_size 8"
        common += " --learning_rate 0.01 --head_learning_rate 0.1 --num_held_out 8 --shuffle_buffer_size 10"
        common += " --augmentation affine"
        return parse_arguments([*common.split(), *steps, *METHOD_OPTIONS.get(method, []), *options])

    return parse


@pytest.mark.parametrize("kind", ["images", "parquet"])
@pytest.mark.parametrize("method", ["vpt", "bpt"])
def test_run_on_a_stream_learns_and_says_what_it_did(settings, tmp_path, method, kind):
    results = train_classifier(
        settings(
            method, "--augmentation", "none", "--head_learning_rate", "0.5", kind=kind, steps=["--max_steps", "90"]
        )
    )
    # Better than guessing.
    assert results["test_loss"] < 0.9 * math.log(len(CLASSES))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == results
    # Files are listed, and divided as without streaming; 90 steps of 8 are many passes over either.
    held_out = {"validation": 8, "test": 10} if kind == "images" else {"validation": 8, "test": 8}
    assert results["num_images"] == {"train": None} | held_out
    assert (results["max_steps"], results["num_train_epochs"], results["best_epoch"]) == (90, None, None)
    assert results["best_step"] in range(9, 91, 9)


@pytest.mark.parametrize(("method", "num_workers"), [("vpt", 0), ("vpt", 2), ("provpt", 0)])
def test_resumed_run_on_a_stream_ends_where_an_uninterrupted_one_ends(settings, tmp_path, method, num_workers):
    final = []
    for interrupted in (False, True):
        folder = tmp_path / f"interrupted_{interrupted}"
        options = ["--output_dir", str(folder), "--no_load_best_model_at_end", "--prompt_dropout", "0.3"]
        options += ["--dataloader_num_workers", str(num_workers), "--gradient_accumulation_steps", "2"]
        steps = ["--max_steps", "12", "--eval_steps", "7"]
        if interrupted:
            trainer, _ = build_trainer(settings(method, *options, steps=steps))
            trainer.add_callback(StopAt(7))  # 112 images, in the fourth pass over 32
            trainer.train()
            options += ["--resume_from_checkpoint", "last"]
        train_classifier(settings(method, *options, steps=steps))
        final.append((folder / "adapter_model.safetensors").read_bytes())
    assert final[0] == final[1]


def test_streaming_without_a_number_of_steps_is_refused_with_what_to_do(settings):
    with pytest.raises(ValueError, match=r"streaming and max_steps of -1\..*length.*--max_steps 1000"):
        build_trainer(settings("vpt", steps=()))


def test_warm_up_in_epochs_is_refused_with_the_setting_to_use(settings):
    with pytest.raises(ValueError, match="warmup_epochs and max_steps are both set.*use warmup_steps"):
        settings("vpt", "--warmup_epochs", "1")


def test_prompts_that_move_between_epochs_are_refused_with_the_setting_that_counts_steps(settings, monkeypatch):
    monkeypatch.setitem(METHOD_OPTIONS, "provpt", [])
    with pytest.raises(ValueError, match="PRO-VPT without relocation_steps.*--scoring online --relocation_steps 100"):
        build_trainer(settings("provpt"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (6, 6, 6)),
        (["--eval_steps", "5"], (5, 5, 5)),
        (["--eval_strategy", "steps", "--eval_steps", "4", "--no_load_best_model_at_end"], (4, 4, 4)),
        (["--save_strategy", "steps", "--save_steps", "7", "--no_load_best_model_at_end"], (7, 7, 7)),
        (["--logging_strategy", "steps", "--logging_steps", "2"], (6, 6, 2)),
    ],
)
def test_what_was_to_be_done_each_epoch_is_done_some_times_in_the_run(settings, options, expected):
    args = build_trainer(settings("vpt", *options))[0].args
    assert (args.eval_strategy, args.save_strategy, args.logging_strategy) == ("steps",) * 3
    assert (args.eval_steps, args.save_steps, args.logging_steps) == expected


def test_strategies_that_are_off_stay_off(settings):
    off = ["--eval_strategy", "no", "--save_strategy", "no", "--no_load_best_model_at_end"]
    args = build_trainer(settings("vpt", *off))[0].args
    assert (args.eval_strategy, args.save_strategy) == ("no", "no")


def test_a_loss_that_stays_at_guessing_is_noticed_on_a_stream(settings):
    with pytest.warns(UserWarning, match="that of guessing, 1.099, for 2 evaluations"):
        train_classifier(settings("vpt", "--learning_rate", "1e-12", "--plateau_patience", "2"))


class Endless(torch.utils.data.IterableDataset):
    """A plain stream of PyTorch's, with as many images as are asked for."""

    def __init__(self, num_images):
        self.num_images = num_images

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for index in range(self.num_images):
            label = index % len(CLASSES)
            yield {"pixel_values": label + 0.1 * torch.randn(3, 16, 16, generator=generator), "labels": label}


@pytest.mark.parametrize("num_images", [40, 10_000])
def test_plain_iterable_data_set_trains_for_the_steps_it_is_given(backbone, tmp_path, num_images):
    set_seed(0)
    model = load_classifier(ModelArguments(model_name_or_path=backbone), CLASSES)
    model = prepare_for_training(model, "vpt", METHODS["vpt"](num_virtual_tokens=3))
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=0.05,
        use_cpu=True,
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="no",
        load_best_model_at_end=False,
        metric_for_best_model=None,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer = ImageClassificationTrainer(
        model=model, args=args, train_dataset=Endless(num_images), eval_dataset=Endless(9)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == len(losses) == 20
    assert losses[-1] < losses[0] - 0.15
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2
