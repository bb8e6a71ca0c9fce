"""Groups of the optimizer, schedules by epochs, averaged weights, mixed images: each against its closed form."""

import copy
import math

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, KEEP_BEST, StopAt, assert_same
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_vpt.training import ClassificationLoss, ExponentialMovingAverage, ImageClassificationTrainer, TrainingArguments
from hf_vpt.training.mixing import make_mixer
from hf_vpt.training.models import head_parameters
from hf_vpt.training.optimizer import parameter_roles


NUM_CLASSES = 5


def build(adapter="vapt"):
    """A tiny ViT with an adapter; without dropout in the adapter, so that its passes can be repeated."""
    base = BACKBONES["vit"].build()
    torch.manual_seed(1)
    overrides = {"channel_dropout": 0.0, "projector_dropout": 0.0} if adapter == "vapt" else {}
    return get_peft_model(base, ADAPTERS[adapter].config(prompt_dropout=0.0, **overrides))


def images(num_images=8):
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 32, 48, generator=generator), "labels": index % NUM_CLASSES}
        for index in range(num_images)
    ]


def make_trainer(model, folder, callbacks=None, compute_metrics=None, **settings):
    defaults = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "learning_rate": 0.05}
    defaults |= {"per_device_train_batch_size": 4, "num_train_epochs": 2}
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **defaults | settings)
    return ImageClassificationTrainer(
        model=model,
        args=arguments,
        train_dataset=images(),
        eval_dataset=images(),
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )


def trained(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


class Record(TrainerCallback):
    """Note learning rates before, and trained weights after, each optimiser step."""

    def __init__(self):
        self.rates, self.all_rates, self.states = [], [], []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.all_rates.append([group["lr"] for group in optimizer.param_groups])
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append(trained(model))


def found_groups(trainer):
    groups = trainer.create_optimizer().param_groups
    return {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_roles_follow_the_module_that_holds_a_parameter_and_not_its_name():
    model = build("vapt")
    roles = parameter_roles(model)
    norms = {p for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    assert norms and all(roles[p] == "norms" for p in norms)
    head = head_parameters(model)
    assert len(head) == 2 and all(roles[p] == "head" for p in head)
    rest = {roles[p] for p in model.parameters() if p.requires_grad and p not in norms and p not in set(head)}
    assert rest == {"directions", "prompts"}


def test_a_norm_inside_the_head_belongs_to_the_head():
    model = BACKBONES["vit"].build()
    model.classifier = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, NUM_CLASSES))
    assert {parameter_roles(model)[p] for p in model.classifier.parameters()} == {"head"}


@pytest.mark.parametrize("angle", [None, 0.4])
def test_prompts_head_and_norms_have_learning_rates_and_weight_decays_of_their_own(tmp_path, angle):
    model = build("vapt")
    settings = {"learning_rate": 0.1, "weight_decay": 0.01, "head_learning_rate": 0.2, "head_weight_decay": 0.02}
    settings |= {"norm_learning_rate": 0.3, "norm_weight_decay": 0.03, "prompt_angle": angle}
    found = found_groups(make_trainer(model, tmp_path, **settings))
    roles = parameter_roles(model)
    expected = {"prompts": (0.1, 0.01), "head": (0.2, 0.02), "norms": (0.3, 0.03)}
    # The optimizer's decay is none where prompts turn: they are set aside while it steps.
    expected["directions"] = (0.1 if angle is None else angle, 0.01)
    seen = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate, decay = expected[roles[parameter]]
            is_bias = name.endswith("bias")
            assert found.pop(id(parameter)) == (rate, 0.0 if is_bias else decay), name
            seen.add((roles[parameter], is_bias))
    assert not found
    assert seen >= {
        ("directions", False),
        ("prompts", False),
        ("head", False),
        ("head", True),
        ("norms", False),
        ("norms", True),
    }


@pytest.mark.parametrize("settings", [{}, {"norm_learning_rate": 0.3}, {"head_learning_rate": 0.3}])
def test_what_decays_is_left_to_trainer_unless_a_decay_is_set(tmp_path, settings):
    model = build("vapt")
    trainer = make_trainer(model, tmp_path, weight_decay=0.01, **settings)
    names = trainer.get_decay_parameter_names(model)
    found = found_groups(trainer)
    assert any("norm" in name for name, p in model.named_parameters() if p.requires_grad)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert found[id(parameter)][1] == (0.01 if name in names else 0.0), name


def test_a_schedule_by_epochs_has_the_published_rate_at_every_step(tmp_path):
    record = Record()
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 6, "warmup_epochs": 2, "learning_rate": 0.5}
    make_trainer(build("vpt_deep"), tmp_path, callbacks=[record], lr_schedule_unit="epoch", **settings).train()
    # A warm-up that counts epochs from 0, then a cosine: the factor of each epoch, for its four steps.
    epochs = [0.0, 0.5] + [0.5 * (1 + math.cos(math.pi * (epoch - 2) / 4)) for epoch in (2, 3, 4, 5)]
    assert record.rates == pytest.approx([0.5 * factor for factor in epochs for _ in range(4)])


def test_a_schedule_by_epochs_keeps_the_floor_of_a_cosine(tmp_path):
    record = Record()
    settings = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.1}}
    settings |= {"num_train_epochs": 4, "learning_rate": 0.5, "lr_schedule_unit": "epoch"}
    make_trainer(build("vpt_deep"), tmp_path, callbacks=[record], **settings).train()
    factors = [0.1 + 0.4 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert record.rates == pytest.approx([factor for factor in factors for _ in range(2)])


def test_angles_fall_by_the_same_factor_in_every_step_beside_the_schedule_of_the_rest(tmp_path):
    record = Record()
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "warmup_epochs": 1, "learning_rate": 0.5}
    settings |= {"prompt_angle": 0.4, "prompt_final_angle": 0.004}
    trainer = make_trainer(build("vpt_deep"), tmp_path, callbacks=[record], **settings)
    roles = parameter_roles(trainer.model)
    trainer.train()
    groups = trainer.optimizer.param_groups
    (turning,) = [i for i, group in enumerate(groups) if roles[group["params"][0]] == "directions"]
    warmup = [0, 0.25, 0.5, 0.75]
    falling = [0.4 * factor for factor in (*warmup, *(0.01 ** (step / 8) for step in range(8)))]
    cosine = [0.5 * factor for factor in (*warmup, *(0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)))]
    assert len(groups) > 1
    for index in range(len(groups)):
        rates = [step[index] for step in record.all_rates]
        assert rates == pytest.approx(falling if index == turning else cosine)


def test_a_schedule_that_looks_at_scores_cannot_go_by_epochs(tmp_path):
    trainer = make_trainer(
        build("vpt_deep"),
        tmp_path,
        lr_schedule_unit="epoch",
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="epoch",
    )
    with pytest.raises(ValueError, match="lr_schedule_unit is 'epoch' with the schedule ReduceLROnPlateau.*change"):
        trainer.train()


def test_the_average_after_some_steps_is_the_weighted_sum_of_all_weights(tmp_path):
    model, record, decay = build(), Record(), 0.7
    before = trained(model)
    trainer = make_trainer(model, tmp_path, callbacks=[record], ema_decay=decay)
    trainer.train()
    states, steps = record.states, len(record.states)
    assert steps == 4
    expected = {
        name: decay**steps * start
        + sum((1 - decay) * decay ** (steps - 1 - k) * states[k][name] for k in range(steps))
        for name, start in before.items()
    }
    assert_same(trainer.ema.averages, expected)
    assert any(not torch.equal(states[-1][name], value) for name, value in trainer.ema.averages.items())


def test_an_average_in_bfloat16_does_not_lose_small_steps():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    average = ExponentialMovingAverage(0.999)
    average.start(model)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):
        average.update(model)
    assert average.averages["weight"].item() == pytest.approx(2 - 0.999**100, rel=1e-5)
    with average.averaged(model):
        assert model.weight.dtype == torch.bfloat16
        assert model.weight.item() == pytest.approx(2 - 0.999**100, rel=1e-2)


def test_a_step_that_was_thrown_away_does_not_count():
    class Skipped:
        step_was_skipped = True

    model, average = nn.Linear(2, 2), ExponentialMovingAverage(0.5)
    average.start(model)
    start = {name: value.clone() for name, value in average.averages.items()}
    nn.init.zeros_(model.weight)
    average.on_step_end(None, None, None, model=model, optimizer=Skipped())
    assert_same(average.averages, start, rtol=0, atol=0)


def test_weights_are_the_last_ones_bit_for_bit_after_a_look_at_the_averaged_ones():
    model, average = build(), ExponentialMovingAverage(0.5)
    average.start(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    last = trained(model)
    average.update(model)
    with pytest.raises(RuntimeError, match="halfway"), average.averaged(model):
        assert_same(trained(model), average.averages, rtol=0, atol=0)
        raise RuntimeError("halfway")
    assert_same(trained(model), last, rtol=0, atol=0)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_both_weights_are_scored_and_the_last_ones_stay_as_they_are(tmp_path):
    model = build()
    trainer = make_trainer(model, tmp_path, ema_decay=0.9, compute_metrics=accuracy)
    trainer.train()
    last = trained(model)
    metrics = trainer.evaluate()
    assert_same(trained(model), last, rtol=0, atol=0)
    assert {"eval_loss", "eval_accuracy", "eval_ema_loss", "eval_ema_accuracy"} <= metrics.keys()
    assert not any("preparation_time" in name for name in metrics)
    predicted = trainer.predict(images(), metric_key_prefix="test").metrics
    assert predicted["test_ema_loss"] == metrics["eval_ema_loss"]
    plain = make_trainer(model, tmp_path, compute_metrics=accuracy).evaluate()
    assert plain["eval_loss"] == metrics["eval_loss"] and "eval_ema_loss" not in plain
    with trainer.ema.averaged(model):
        averaged = make_trainer(model, tmp_path, compute_metrics=accuracy).evaluate()
    assert averaged["eval_loss"] == metrics["eval_ema_loss"] != metrics["eval_loss"]


def test_training_is_the_same_whether_its_weights_are_averaged_or_not(tmp_path):
    final = []
    for decay in (None, 0.9):
        model = build()
        make_trainer(model, tmp_path, ema_decay=decay, eval_strategy="epoch", compute_metrics=accuracy).train()
        final.append(trained(model))
    assert_same(final[1], final[0], rtol=0, atol=0)


def test_early_stopping_can_watch_the_averaged_weights(tmp_path):
    # A logged score that callbacks do not see would be an error of EarlyStoppingCallback, or no stop at all.
    scores = iter([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6])  # the last weights get better, the averaged ones worse
    trainer = make_trainer(
        build("vpt_deep"),
        tmp_path,
        num_train_epochs=4,
        ema_decay=0.9,
        **KEEP_BEST,
        metric_for_best_model="ema_accuracy",
        compute_metrics=lambda prediction: {"accuracy": next(scores)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.best_global_step == 2


@pytest.mark.parametrize("adapter", ["vapt", "provpt", None])
def test_averaged_weights_of_checkpoints_and_of_the_best_epoch_are_whole_models(tmp_path, adapter):
    model = BACKBONES["vit"].build() if adapter is None else build(adapter)
    scores = iter([0.1, 0.1, 0.9, 0.9, 0.3, 0.3])
    averages, learning_rate = [], 0.05 if adapter else 0.001

    class RecordAverages(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            averages.append(copy.deepcopy(trainer.ema.averages))

    trainer = make_trainer(
        model,
        tmp_path,
        learning_rate=learning_rate,
        num_train_epochs=3,
        ema_decay=0.5,
        **KEEP_BEST,
        metric_for_best_model="accuracy",
        compute_metrics=lambda prediction: {"accuracy": next(scores)},
        callbacks=[RecordAverages()],
    )
    trainer.train()
    trainer.save_model()
    assert_same(trainer.ema.averages, averages[1], rtol=0, atol=0)
    checkpoint = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    pixels = torch.stack([image["pixel_values"] for image in images()])
    for folder in (tmp_path / "ema", checkpoint / "ema"):
        if adapter is None:
            loaded = type(model).from_pretrained(folder).eval()
        else:
            loaded = PeftModel.from_pretrained(BACKBONES["vit"].build(), folder).eval()
            assert (folder / "id2label.json").is_file()
        model.eval()
        with torch.no_grad(), trainer.ema.averaged(model):
            expected = model(pixel_values=pixels).logits
        torch.testing.assert_close(loaded(pixel_values=pixels).logits, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(model(pixel_values=pixels).logits, expected, rtol=1e-3, atol=1e-3)
    manifest = (checkpoint / "manifest.json").read_text()
    assert '"ema/' in manifest


@pytest.mark.parametrize("settings", [{}, {"lr_schedule_unit": "epoch", "mixup_alpha": 0.8, "cutmix_alpha": 1.0}])
@pytest.mark.parametrize("adapter", ["vapt", None])
def test_a_resumed_run_ends_with_the_averages_of_an_uninterrupted_one(tmp_path, adapter, settings):
    results = []
    for stop in (None, 3):  # in the middle of the second of three epochs
        folder = tmp_path / str(stop)
        common = {"num_train_epochs": 3, "ema_decay": 0.8, "save_strategy": "steps", "save_steps": 1, **settings}
        make = lambda: BACKBONES["vit"].build() if adapter is None else build(adapter)  # noqa: E731
        model = make()
        trainer = make_trainer(model, folder, callbacks=[StopAt(stop)], **common)
        trainer.train()
        if stop is not None:
            model = make()
            trainer = make_trainer(model, folder, **common)
            trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
        assert trainer.state.global_step == 6
        if adapter is not None:
            # Regression: Trainer takes a folder with an adapter inside a checkpoint for a second adapter.
            assert list(model.peft_config) == ["default"]
        trainer.save_model()
        (weights,) = (folder / "ema").glob("*model.safetensors")
        results.append((trained(model), trainer.ema.averages, load_file(weights)))
    for uninterrupted, resumed in zip(*results, strict=True):
        assert_same(resumed, uninterrupted, rtol=0, atol=0)


def test_training_anew_begins_a_new_average(tmp_path):
    model = build("vpt_deep")
    trainer = make_trainer(model, tmp_path, ema_decay=0.999, num_train_epochs=1)
    trainer.train()
    start = trained(model)
    trainer.ema.load_state_dict({"averages": {name: value + 1 for name, value in start.items()}})
    trainer.ema.on_train_end(None, None, None)
    trainer.train()
    assert_same(trainer.ema.averages, start, rtol=0.1, atol=0.01)


def test_averages_of_shards_are_refused(tmp_path, monkeypatch):
    create = ImageClassificationTrainer.create_accelerator_and_postprocess

    def create_with_shards(trainer):
        create(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(ImageClassificationTrainer, "create_accelerator_and_postprocess", create_with_shards)
    with pytest.raises(ValueError, match="ema_decay is 0.9 with FSDP. Averages need whole.*leave ema_decay"):
        make_trainer(build("vpt_deep"), tmp_path, ema_decay=0.9)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_loss_of_mixed_images_is_the_mixed_loss_of_their_labels(kind):
    torch.manual_seed(0)
    pixels, labels = torch.rand(6, 3, 32, 48), torch.tensor([0, 1, 2, 3, 4, 0])
    mixer = make_mixer(0.8 if kind == "mixup" else 0.0, 0.8 if kind == "cutmix" else 0.0, NUM_CLASSES)
    mixed, probabilities = mixer(pixels, labels)
    share = probabilities[1, 1].item()  # its own class; its neighbour's has the rest
    assert 0 < share < 1
    neighbour = pixels.roll(1, 0)
    if kind == "mixup":
        torch.testing.assert_close(mixed, share * pixels + (1 - share) * neighbour)
    else:
        own = (mixed == pixels).all(dim=1)[0]
        assert own.float().mean().item() == pytest.approx(share, abs=1e-3)
        assert torch.equal(mixed, torch.where(own, pixels, neighbour))
    logits = torch.randn(6, NUM_CLASSES)
    for smoothing in (0.0, 0.1):
        loss = ClassificationLoss(smoothing)({"logits": logits}, probabilities, num_items_in_batch=12)
        parts = [
            F.cross_entropy(logits, y, reduction="sum", label_smoothing=smoothing) for y in (labels, labels.roll(1))
        ]
        torch.testing.assert_close(loss, (share * parts[0] + (1 - share) * parts[1]) / 12)


def test_images_are_mixed_while_training_and_never_in_evaluation(tmp_path):
    model, seen = build("vpt_deep"), []
    trainer = make_trainer(model, tmp_path, mixup_alpha=1.0, cutmix_alpha=1.0, compute_metrics=accuracy)
    loss = trainer.compute_loss_func
    trainer.compute_loss_func = lambda outputs, labels, **kwargs: (
        seen.append(labels) or loss(outputs, labels, **kwargs)
    )
    trainer.train()
    assert len(seen) == 4 and all(labels.shape == (4, NUM_CLASSES) for labels in seen)
    assert all(torch.allclose(labels.sum(1), torch.ones(4)) for labels in seen)
    assert any(0 < labels.max(1).values.min() < 1 for labels in seen)
    seen.clear()
    trainer.evaluate()
    assert all(labels.ndim == 1 for labels in seen)


def test_nothing_is_mixed_unless_asked_for():
    assert make_mixer(0.0, 0.0, NUM_CLASSES) is None
