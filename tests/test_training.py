"""Training does what its settings say: losses, learning rates, frozen parts, the best epoch, files."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import BACKBONES, StopAt, output_of
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image as PILImage
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from hf_vpt.data import load_image_dataset
from hf_vpt.data.fingerprint import fingerprint_splits
from hf_vpt.training import (
    Accuracy,
    ImageClassificationTrainer,
    MeanClassAccuracy,
    ModelArguments,
    TrainingArguments,
    build_trainer,
    count_trained_parameters,
    load_classifier,
    load_label_names,
    parse_arguments,
    prepare_for_training,
    train_classifier,
)
from hf_vpt.training.models import head_parameters
from hf_vpt.tuners import METHODS
from hf_vpt.tuners.bpt.whitening import WhiteningStatistics


CLASSES = ["cat", "dog", "emu"]
WIDTH = 16
# What the tiny backbone needs beyond a method's defaults.
TINY_OPTIONS = {"bpt": ["--rank", "4"]}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Folder of a tiny pre-trained backbone: two blocks, images of 16 by 24 pixels, dropout everywhere."""
    folder = tmp_path_factory.mktemp("backbone")
    set_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[16, 24],
        patch_size=8,
        hidden_dropout_prob=0.5,
        attention_probs_dropout_prob=0.5,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 24}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder of a data set with three classes that differ in their grey value; 24, 12 and 12 images."""
    folder = tmp_path_factory.mktemp("images")
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    generator = np.random.default_rng(0)

    def split(num_images):
        labels = [index % len(CLASSES) for index in range(num_images)]
        pixels = [(100 * label + generator.integers(0, 40, (16, 24))).astype(np.uint8) for label in labels]
        return Dataset.from_dict(
            {"image": [PILImage.fromarray(p) for p in pixels], "label": labels}, features=features
        )

    DatasetDict(train=split(24), validation=split(12), test=split(12)).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def settings(backbone, images, tmp_path):
    """Parse settings for a short run on the tiny backbone and data; options are added to them."""

    def parse(method, *options):
        common = (
            f"--method {method} --model_name_or_path {backbone} --dataset_name {images} --output_dir {tmp_path}/out"
        )
        common += (
            " --use_cpu --disable_tqdm=1 --per_device_train_batch_size 8 --num_train_epochs 2 --learning_rate 0.01"
        )
        return parse_arguments([*common.split(), *TINY_OPTIONS.get(method, []), *options])

    return parse


@pytest.fixture
def lora_model(backbone):
    """The tiny backbone with an adapter of PEFT's own, so that a failure here is not one of the prompts."""
    set_seed(0)
    model = load_classifier(ModelArguments(model_name_or_path=backbone), CLASSES)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], init_lora_weights=False)
    return get_peft_model(model, config)


def tensors(num_images=8):
    generator = torch.Generator().manual_seed(0)
    labels = [index % len(CLASSES) for index in range(num_images)]
    return [{"pixel_values": torch.randn(3, 16, 24, generator=generator), "labels": label} for label in labels]


def make_trainer(model, folder, train=None, **kwargs):
    own = {name: kwargs.pop(name) for name in ("callbacks", "compute_metrics") if name in kwargs}
    arguments = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False} | kwargs
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **arguments)
    data = train or tensors()
    return ImageClassificationTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=tensors(), **own)


def trained_state(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def test_metrics_agree_with_scikit_learn():
    generator = np.random.default_rng(0)
    references = generator.integers(0, 5, 200) ** 2 // 4
    predictions = generator.integers(0, 5, 200)
    accuracy = Accuracy().compute(predictions=predictions, references=references)["accuracy"]
    assert accuracy == pytest.approx(accuracy_score(references, predictions))
    per_class = MeanClassAccuracy().compute(predictions=predictions, references=references)["mean_class_accuracy"]
    assert per_class == pytest.approx(balanced_accuracy_score(references, predictions))


def test_whitened_bases_are_estimated_before_training(settings):
    run = settings("bpt", "--basis", "fwhiten", "--rank", "4")
    trainer, _ = build_trainer(run)
    bases = {name: value.clone() for name, value in trainer.model.state_dict().items() if "factor_basis" in name}
    # A basis that was left alone would raise here; a fixed one stays where the images put it.
    trainer.train()
    assert len(bases) == 2
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in bases.items())


@pytest.mark.parametrize("num_images", [5, 12])
def test_whitened_bases_come_from_as_many_training_images_as_the_settings_say(settings, monkeypatch, num_images):
    counts = []
    original = WhiteningStatistics.covariance

    def record(self):
        counts.append(self.num_images)
        return original(self)

    monkeypatch.setattr(WhiteningStatistics, "covariance", record)
    options = ["--basis", "fwhiten", "--num_whitening_images", str(num_images), "--per_device_eval_batch_size", "4"]
    build_trainer(settings("bpt", *options))
    assert counts == [num_images] * 2


@pytest.mark.parametrize("method", [*METHODS, "linear_probe"])
def test_methods_that_need_no_images_before_training_read_none(settings, monkeypatch, method):
    monkeypatch.setattr("hf_vpt.training.images.DataLoader", None)
    build_trainer(settings(method))


class RecordLearningRate(TrainerCallback):
    """Note the learning rate of each optimiser step."""

    def __init__(self):
        self.rates = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_learning_rate_climbs_for_the_warm_up_epochs_and_then_follows_a_cosine(lora_model, tmp_path):
    recorder = RecordLearningRate()
    make_trainer(
        lora_model,
        tmp_path,
        per_device_train_batch_size=2,
        num_train_epochs=6,
        warmup_epochs=2,
        learning_rate=0.5,
        callbacks=[recorder],
    ).train()
    # Four steps an epoch; the rate at the start of each epoch.
    at_epoch = recorder.rates[::4]
    expected = [0.0, 0.25, 0.5] + [0.25 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (1, 2, 3)]
    assert at_epoch == pytest.approx(expected)


def test_learning_rates_scale_with_the_batch_where_asked(lora_model, tmp_path):
    trainer = make_trainer(
        lora_model,
        tmp_path,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=2,
        scale_learning_rate=True,
        learning_rate=1.0,
        head_learning_rate=0.1,
    )
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == {0.5, 0.05}


def test_sgd_with_momentum_is_reached_by_settings(lora_model, tmp_path):
    optimizer = make_trainer(lora_model, tmp_path, optim="sgd", optim_args="momentum=0.9").create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9


def test_head_has_its_own_learning_rate_and_weight_decay(lora_model, tmp_path):
    trainer = make_trainer(
        lora_model, tmp_path, learning_rate=0.1, weight_decay=0.0, head_learning_rate=0.2, head_weight_decay=0.5
    )
    groups = trainer.create_optimizer().param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    head = lora_model.base_model.model.classifier.modules_to_save["default"]
    assert found.pop(id(head.weight)) == (0.2, 0.5)
    assert found.pop(id(head.bias)) == (0.2, 0.0)
    assert set(found.values()) == {(0.1, 0.0)}
    assert len(found) + 2 == sum(parameter.requires_grad for parameter in lora_model.parameters())


def test_fresh_head_knows_the_names_of_the_classes(backbone):
    model = load_classifier(ModelArguments(model_name_or_path=backbone), CLASSES)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    assert model.config.label2id["emu"] == 2
    assert model.dtype == torch.float32


def test_linear_probe_trains_the_head_alone_and_without_dropout(backbone):
    model = load_classifier(ModelArguments(model_name_or_path=backbone), CLASSES)
    model = prepare_for_training(model, "linear_probe")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]
    expected = {"trained_parameters": (WIDTH + 1) * len(CLASSES), "trained_parameters_without_head": 0}
    assert count_trained_parameters(model) == expected
    model.train()
    pixels = torch.randn(2, 3, 16, 24)
    # The backbone drops half of everything in training mode, so equal outputs mean evaluation mode.
    assert torch.equal(model(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


@pytest.mark.parametrize("name", [name for name, tiny in BACKBONES.items() if tiny.has_head])
def test_linear_probe_finds_the_head_of_every_family(name, pixel_values):
    model = prepare_for_training(BACKBONES[name].build(), "linear_probe")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("classifier" in name or ".head." in name for name in trained)
    assert torch.equal(output_of(model.train(), pixel_values), output_of(model, pixel_values))


def test_full_fine_tuning_trains_everything(backbone):
    model = load_classifier(ModelArguments(model_name_or_path=backbone), CLASSES)
    model = prepare_for_training(model, "full")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_head_parameters_of_an_adapter_are_the_trained_copies(lora_model):
    head = lora_model.base_model.model.classifier.modules_to_save["default"]
    assert [id(parameter) for parameter in head_parameters(lora_model)] == [id(p) for p in head.parameters()]


@pytest.mark.parametrize("method", [*METHODS, "linear_probe"])
def test_run_learns_and_leaves_everything_needed_to_use_it(settings, tmp_path, method):
    run = settings(method, "--num_train_epochs", "20", "--head_learning_rate", "0.1")
    results = train_classifier(run)
    assert results["test_accuracy"] > 0.9
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"metrics.json", "timings.json", "preprocessor_config.json"} <= files
    assert files >= ({"adapter_model.safetensors", "id2label.json"} if method in METHODS else {"model.safetensors"})
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written == results
    assert written["label_names"] == CLASSES
    assert 1 <= written["best_epoch"] <= 20
    assert written["num_images"] == {"train": 24, "validation": 12, "test": 12}
    assert written["dataset_variant"] is None
    assert written["dataset_fingerprint"] == fingerprint_splits(load_image_dataset(run.data.dataset_name))


def test_averaged_weights_are_scored_and_saved_beside_the_last_ones(settings, tmp_path):
    run = settings("vapt", "--num_train_epochs", "6", "--ema_decay", "0.8", "--metric_for_best_model", "ema_accuracy")
    results = train_classifier(run)
    scores = {f"{split}_{name}" for split in ("validation", "test") for name in ("accuracy", "ema_accuracy")}
    assert scores | {"test_ema_loss", "validation_ema_mean_class_accuracy"} <= results.keys()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == results
    for folder in (tmp_path / "out", tmp_path / "out" / "ema"):
        files = {path.name for path in folder.iterdir()}
        assert files >= {"adapter_model.safetensors", "id2label.json", "preprocessor_config.json", "README.md"}
        PeftModel.from_pretrained(load_classifier(run.model, load_label_names(folder)), folder)


def test_averaged_prompts_serve_the_blocks_that_the_last_ones_serve(settings, tmp_path):
    options = ["--num_train_epochs", "5", "--ema_decay", "0.9", "--no_load_best_model_at_end"]
    train_classifier(settings("provpt", *options, "--score", "attention", "--score_clip", "1e9"))
    last, averaged = (load_file(tmp_path / "out" / name / "adapter_model.safetensors") for name in (".", "ema"))
    blocks = [name for name in sorted(last) if name.endswith(".block")]
    assert any((last[name] != index).any() for index, name in enumerate(blocks)), "no prompt has moved"
    assert all(torch.equal(last[name], averaged[name]) for name in blocks)


def test_saved_adapter_predicts_as_the_trained_model_with_its_class_names(settings, tmp_path):
    run = settings("vpt")
    trainer, data = build_trainer(run)
    trainer.train()
    expected = trainer.predict(data["test"]).predictions
    trainer.save_model()

    names = load_label_names(tmp_path / "out")
    assert names == CLASSES
    set_seed(123)
    model = PeftModel.from_pretrained(load_classifier(run.model, names), tmp_path / "out").eval()
    pixels = torch.stack([data["test"][index]["pixel_values"] for index in range(len(data["test"]))])
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels).logits, torch.from_numpy(expected))
    assert model.config.id2label[2] == "emu"


def test_test_split_is_looked_at_once_and_after_training(settings, monkeypatch):
    seen = []
    original = ImageClassificationTrainer.evaluation_loop

    def record(self, dataloader, *args, **kwargs):
        seen.append((self.state.global_step, kwargs.get("metric_key_prefix")))
        return original(self, dataloader, *args, **kwargs)

    monkeypatch.setattr(ImageClassificationTrainer, "evaluation_loop", record)
    train_classifier(settings("linear_probe"))
    # Three steps an epoch.
    assert seen == [(3, "eval"), (6, "eval"), (6, "validation"), (6, "test")]


@pytest.mark.parametrize("method", [*METHODS, "full"])
def test_resumed_run_ends_where_an_uninterrupted_one_ends(settings, tmp_path, method):
    final = []
    for interrupted in (False, True):
        folder = str(tmp_path / f"interrupted_{interrupted}")
        options = ["--output_dir", folder, "--no_load_best_model_at_end"]
        if interrupted:
            trainer, _ = build_trainer(settings(method, *options))
            trainer.add_callback(StopAfterFirstEpoch())
            trainer.train()
            options += ["--resume_from_checkpoint", "last"]
        train_classifier(settings(method, *options))
        (weights,) = (tmp_path / f"interrupted_{interrupted}").glob("*model.safetensors")
        final.append(weights.read_bytes())
    assert final[0] == final[1]


class StopAfterFirstEpoch(TrainerCallback):
    """End training early, as a kill after the first checkpoint would."""

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_run_resumed_inside_an_epoch_sees_the_augmentations_of_an_uninterrupted_one(settings, tmp_path):
    # Regression: the loader works one batch ahead, so a random state that was saved inside an epoch did not fit.
    options = [
        "--augmentation",
        "affine",
        "--no_load_best_model_at_end",
        "--save_strategy",
        "steps",
        "--save_steps",
        "4",
    ]
    options += ["--prompt_dropout", "0.3", "--num_train_epochs", "3"]
    final = []
    for interrupted, workers in ((False, 0), (True, 0), (True, 2)):
        folder = tmp_path / f"run{len(final)}"
        own = [*options, "--output_dir", str(folder), "--dataloader_num_workers", str(workers)]
        if interrupted:
            trainer, _ = build_trainer(settings("vpt", *own))
            trainer.add_callback(StopAt(4))  # three steps an epoch
            trainer.train()
            own += ["--resume_from_checkpoint", "last"]
        train_classifier(settings("vpt", *own))
        final.append((folder / "adapter_model.safetensors").read_bytes())
    assert final[1] == final[0]
    assert final[2] == final[0], "with workers"


class ImagesWithEpoch(torch.utils.data.Dataset):
    """Images that know the epoch."""

    def __init__(self):
        self.images, self.epoch = tensors(), None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]

    def set_epoch(self, epoch):
        self.epoch = epoch


class ReadImagesBeforeEachEpoch(TrainerCallback):
    """Note the epoch in which images are read, by this callback and by training, and the order of the images."""

    def __init__(self, data):
        self.data, self.before, self.steps, self.order = data, [], [], []

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.order.append([batch["labels"].tolist() for batch in train_dataloader])
        self.before.append(self.data.epoch)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.data.epoch)


def test_images_are_told_the_epoch_before_other_callbacks_read_them_also_when_resumed(lora_model, tmp_path):
    seen = []
    for resumed in (False, True):
        data = ImagesWithEpoch()
        callback = ReadImagesBeforeEachEpoch(data)
        steps = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4, "num_train_epochs": 4}
        steps["save_total_limit"] = None
        trainer = make_trainer(lora_model, tmp_path / "out", train=data, callbacks=[callback], **steps)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3") if resumed else None)
        seen.append(callback)
    first, again = seen
    assert (first.before, first.steps) == ([0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3])
    # Of the second epoch one step was left.
    assert (again.before, again.steps) == ([1, 2, 3], [1, 2, 2, 3, 3])
    assert again.order == first.order[1:]


def test_resuming_without_a_checkpoint_is_an_error_that_names_the_folder(settings):
    with pytest.raises(FileNotFoundError, match="out' holds no checkpoint.*resume_from_checkpoint"):
        train_classifier(settings("linear_probe", "--resume_from_checkpoint", "last"))


def test_same_seed_gives_the_same_result(settings):
    first, second = (train_classifier(settings("vpt", "--seed", "5")) for _ in range(2))
    assert first == second


def with_pixels(value, index=0):
    """Eight images, one of which holds a number that is not finite."""
    data = tensors()
    data[index]["pixel_values"] = torch.full_like(data[index]["pixel_values"], value)
    return data


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_at_the_first_step_stops_and_points_to_the_images(value, lora_model, tmp_path):
    trainer = make_trainer(lora_model, tmp_path, train=with_pixels(value), per_device_train_batch_size=8)
    with pytest.raises(FloatingPointError, match=r"loss of nan at step 1\. .*images or the weights .*Look at a batch"):
        trainer.train()


def test_a_loss_that_explodes_stops_with_the_step_and_the_learning_rate(lora_model, tmp_path):
    trainer = make_trainer(
        lora_model,
        tmp_path,
        per_device_train_batch_size=8,
        num_train_epochs=9,
        learning_rate=1e30,
        max_grad_norm=0,
        lr_scheduler_type="constant",
    )
    with pytest.raises(FloatingPointError, match=r"at step [2-9]\. .*learning rate, 1e\+30 now, is too large\. Try a"):
        trainer.train()


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["vpt"], "Let prompts turn .prompt_angle"),
        (["vpt", "--prompt_angle", "1e-9"], "Try another prompt_angle than 1e-09"),
        (["vpt", "--deep", "false"], "a few. Try"),
        (["lora"], "a few. Try"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_loss_that_stays_at_guessing_warns_once_with_what_to_try(settings, words, remedy):
    with pytest.warns(
        UserWarning, match=rf"that of guessing, 1\.099, for 2 epochs.*{remedy}.* learning rates than 1e-12"
    ) as caught:
        train_classifier(
            settings(*words, "--learning_rate", "1e-12", "--num_train_epochs", "5", "--plateau_patience", "2")
        )
    assert sum("that of guessing" in str(warning.message) for warning in caught) == 1


def test_a_run_that_learns_or_is_told_not_to_look_gets_no_warning(settings, recwarn):
    train_classifier(settings("vpt", "--learning_rate", "1e-1", "--num_train_epochs", "3", "--plateau_patience", "2"))
    train_classifier(settings("vpt", "--learning_rate", "1e-12", "--num_train_epochs", "3", "--plateau_patience", "0"))
    assert not any("that of guessing" in str(warning.message) for warning in recwarn)
