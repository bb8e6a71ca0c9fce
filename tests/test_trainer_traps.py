"""What goes wrong with a plain `Trainer` and image classifiers; each test fails without our handling."""

import copy
import json

import pytest
import test_training
import torch
from conftest import ADAPTERS, BACKBONES, KEEP_BEST, assert_same
from peft import PeftModel, get_peft_model
from test_training import CLASSES, make_trainer, trained_state
from torch.nn import functional as F
from transformers import TrainerCallback, set_seed

from hf_vpt.training import (
    ClassificationLoss,
    ModelArguments,
    TrainingArguments,
    build_trainer,
    load_classifier,
    train_classifier,
)


# The tiny run of those tests.
backbone, images, settings = test_training.backbone, test_training.images, test_training.settings
lora_model = test_training.lora_model

NO_DROPOUT = {
    "vpt_deep": {"prompt_dropout": 0.0},
    "vpt_shallow": {"prompt_dropout": 0.0},
    "vapt": {"prompt_dropout": 0.0, "channel_dropout": 0.0, "projector_dropout": 0.0},
    "provpt": {"prompt_dropout": 0.0},
    "bpt_deep": {"prompt_dropout": 0.0},
}
# These ignore what Trainer tells them about the size of a step, if they compute the loss.
IGNORANT_FAMILIES = ["beit", "clip", "siglip", "swinv2"]


def adapted(family, adapter="vpt_deep", **overrides):
    """A tiny model of a family, made for images of 32 × 48 or 48 × 48 pixels, with random prompts."""
    model = BACKBONES[family].build(**overrides)
    set_seed(0)
    return get_peft_model(model, ADAPTERS[adapter].config(backbone=BACKBONES[family], **NO_DROPOUT[adapter]))


def batch_for(family, is_multi_label=False):
    """Eight images as a family takes them."""
    size = (48, 48) if family in ("clip", "siglip") else (32, 48)
    generator = torch.Generator().manual_seed(0)
    labels = [index % 5 for index in range(8)]
    if is_multi_label:
        labels = [[float((index >> bit) & 1) for bit in range(5)] for index in range(8)]
    return [{"pixel_values": torch.randn(3, *size, generator=generator), "labels": label} for label in labels]


def one_step(model, folder, data, batch_size, accumulation):
    """What trains after one step of plain gradient descent on all images, and the loss that was logged."""
    model = copy.deepcopy(model)
    trainer = make_trainer(
        model,
        folder,
        train=data,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    return trained_state(model), trainer.state.log_history[0]["loss"]


def assert_accumulation_changes_nothing(model, folder, data):
    whole, whole_loss = one_step(model, folder, data, 8, 1)
    for batch_size, accumulation in ((4, 2), (2, 4)):
        parts, loss = one_step(model, folder, data, batch_size, accumulation)
        assert_same(parts, whole, rtol=1e-4, atol=5e-5)
        assert loss == pytest.approx(whole_loss, rel=1e-4)
    before = trained_state(model)
    assert not any(torch.equal(value, before[name]) for name, value in whole.items() if "prompt" in name)


# The loss of a step


@pytest.mark.parametrize("adapter", NO_DROPOUT)
def test_accumulated_batches_equal_one_large_batch_for_every_method(adapter, tmp_path):
    assert_accumulation_changes_nothing(adapted("vit", adapter), tmp_path, batch_for("vit"))


@pytest.mark.parametrize("family", IGNORANT_FAMILIES)
def test_accumulated_batches_equal_one_large_batch_for_heads_that_ignore_the_size_of_a_step(family, tmp_path):
    assert_accumulation_changes_nothing(adapted(family), tmp_path, batch_for(family))


@pytest.mark.parametrize("family", ["vit", *IGNORANT_FAMILIES])
def test_accumulated_batches_equal_one_large_batch_with_several_right_classes(family, tmp_path):
    model = adapted(family)
    model.config.problem_type = "multi_label_classification"
    assert_accumulation_changes_nothing(model, tmp_path, batch_for(family, is_multi_label=True))


def test_loss_of_several_right_classes_is_that_of_the_model(tmp_path):
    model = adapted("vit").eval()
    model.config.problem_type = "multi_label_classification"
    data = batch_for("vit", is_multi_label=True)
    batch = {name: torch.stack([torch.as_tensor(entry[name]) for entry in data]) for name in data[0]}
    with torch.no_grad():
        expected = model(**batch).loss
    assert one_step(model, tmp_path, data, 8, 1)[1] == pytest.approx(expected.item(), rel=1e-5)
    trainer = make_trainer(model, tmp_path, per_device_eval_batch_size=2)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_labels_that_are_shares_do_not_make_a_classifier_one_of_several_right_classes():
    # Mixed images have labels (B, classes) too, and one right answer.
    logits, shares = torch.randn(4, 3), torch.randn(4, 3).softmax(dim=1)
    torch.testing.assert_close(ClassificationLoss()({"logits": logits}, shares), F.cross_entropy(logits, shares))
    several = ClassificationLoss(problem_type="multi_label_classification")
    expected = F.binary_cross_entropy_with_logits(logits, shares.round())
    torch.testing.assert_close(several({"logits": logits}, shares.round().long()), expected)


def test_loss_of_a_whole_step_is_the_mean_over_its_images():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = ClassificationLoss()
    parts = [loss({"logits": logits[i : i + 2]}, labels[i : i + 2], num_items_in_batch=6) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), loss({"logits": logits}, labels))
    # Two GPUs in one process: each is told three, in a tensor with one row a GPU.
    torch.testing.assert_close(loss({"logits": logits}, labels, torch.tensor([[3], [3]])), sum(parts))


def test_label_smoothing_is_for_training_alone():
    logits, labels = torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([0])
    loss = ClassificationLoss(label_smoothing=0.3)
    assert loss({"logits": logits}, labels).item() == pytest.approx(0.0, abs=1e-6)
    assert loss({"logits": logits}, labels, num_items_in_batch=1).item() == pytest.approx(20.0)


# Columns and labels


def test_images_reach_the_transform_with_default_settings(settings):
    # Trainer's default drops the columns that a model does not take, `image` among them, before they are transformed.
    trainer, _ = build_trainer(settings("vpt", "--num_train_epochs", "1"))
    assert trainer.train_dataset.images.column_names == ["image", "label"]
    trainer.train()


def test_a_request_to_drop_the_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns is true.*must be false.*leave it out"):
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, remove_unused_columns=True)


@pytest.mark.parametrize("family", ["vit", "deit_with_teacher"])
def test_evaluation_of_an_adapted_model_has_a_loss_and_scores(family, tmp_path):
    # Trainer reads the names of labels from the signature of the model, and DeiT with a teacher has none in it.
    data = batch_for(family)
    model = adapted(family)
    trainer = make_trainer(
        model,
        tmp_path,
        per_device_eval_batch_size=3,
        label_smoothing_factor=0.5,
        compute_metrics=lambda prediction: {"accuracy": float((prediction.label_ids == 0).mean())},
    )
    scores = trainer.evaluate(data)
    assert scores["eval_accuracy"] == 2 / 8
    with torch.no_grad():
        logits = model(torch.stack([entry["pixel_values"] for entry in data])).logits
    # Without the smoothing, which is for training alone.
    expected = F.cross_entropy(logits, torch.tensor([entry["labels"] for entry in data]))
    assert scores["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


# The best epoch


class RecordEpochs(TrainerCallback):
    """Keep a copy of what trains after each epoch."""

    def __init__(self):
        self.states = []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.states.append(trained_state(model))


def train_three_epochs(model, folder, compute_metrics, **settings):
    """Train, keeping the best epoch; return the weights after each."""
    recorder = RecordEpochs()
    settings = {"num_train_epochs": 3, "learning_rate": 0.1, **KEEP_BEST, **settings}
    make_trainer(model, folder, compute_metrics=compute_metrics, callbacks=[recorder], **settings).train()
    return recorder.states


@pytest.mark.parametrize("kind", ["adapter", "whole model"])
def test_best_epoch_is_restored_with_its_head(lora_model, backbone, tmp_path, kind):
    # Regression: Trainer restored the head of a whole ViT alone, because checkpoints name the blocks differently.
    model = lora_model
    if kind == "whole model":
        model = load_classifier(ModelArguments(model_name_or_path=backbone), CLASSES)
    # Two epochs are equally good; the later one has learned more.
    scores = iter([0.9, 0.9, 0.5])
    states = train_three_epochs(model, tmp_path, lambda prediction: {"accuracy": next(scores)})
    assert_same(trained_state(model), states[1], rtol=0, atol=0)
    last = [list(state.values())[-1] for state in states]
    assert not torch.equal(last[1], last[0])
    assert not torch.equal(last[1], last[2])


@pytest.mark.parametrize("metric", ["accuracy", "eval_accuracy", "mean_class_accuracy", "eval_loss", "loss"])
def test_the_best_epoch_is_found_by_any_score_under_either_name(settings, metric):
    results = train_classifier(settings("vpt", "--metric_for_best_model", metric, "--num_train_epochs", "3"))
    assert 1 <= results["best_epoch"] <= 3


def test_a_score_that_says_where_best_is_low_keeps_the_epoch_with_the_lowest(lora_model, tmp_path):
    scores = iter([0.3, 0.1, 0.2])
    metric = {"metric_for_best_model": "error_loss"}
    states = train_three_epochs(lora_model, tmp_path, lambda prediction: {"error_loss": next(scores)}, **metric)
    assert_same(trained_state(lora_model), states[1], rtol=0, atol=0)


# Files


def test_a_checkpoint_predicts_by_itself_with_its_processor_and_class_names(settings, tmp_path):
    run = settings("vpt", "--num_train_epochs", "1")
    trainer, data = build_trainer(run)
    trainer.train()
    (folder,) = (tmp_path / "out").glob("checkpoint-*")
    saved = json.loads((folder / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": 16, "width": 24}
    names = test_training.load_label_names(folder)
    assert names == CLASSES
    model = PeftModel.from_pretrained(load_classifier(run.model, names), folder).eval()
    pixels = torch.stack([data["test"][index]["pixel_values"] for index in range(len(data["test"]))])
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    torch.testing.assert_close(logits, torch.from_numpy(trainer.predict(data["test"]).predictions))
