"""Prompts on a frozen backbone in 8 or 4 bits."""

import pytest
import test_training
import torch
from peft import PeftModel
from test_training import CLASSES

from hf_vpt.attention.access import linear_weight
from hf_vpt.training import ModelArguments, build_trainer, load_classifier, parse_arguments, prepare_for_training
from hf_vpt.training import models as models_module
from hf_vpt.tuners import METHODS


# The tiny run of those tests.
backbone, images, settings = test_training.backbone, test_training.images, test_training.settings


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def test_a_quantised_backbone_without_bitsandbytes_is_an_error_that_names_the_package(backbone, monkeypatch):
    monkeypatch.setattr(models_module, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r"quantization=8bit and no bitsandbytes\. .*need.*pip install bitsandbytes"):
        load_classifier(ModelArguments(model_name_or_path=backbone, quantization="8bit"), CLASSES)


@pytest.mark.parametrize("method", ["linear_probe", "full"])
def test_a_quantised_backbone_is_for_prompts_alone(backbone, method):
    model = load_classifier(ModelArguments(model_name_or_path=backbone), CLASSES)
    model.is_quantized = True
    with pytest.raises(ValueError, match=f"quantised backbone and method '{method}'.*Choose a prompt method"):
        prepare_for_training(model, method)


def test_quantization_is_an_option_with_three_choices(capsys):
    assert parse_arguments(["--quantization", "4bit"]).model.quantization == "4bit"
    assert parse_arguments([]).model.quantization == "none"
    with pytest.raises(SystemExit):
        parse_arguments(["--quantization", "2bit"])
    assert "4bit" in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("method", METHODS)
def test_prompts_train_and_are_saved_and_loaded_on_a_quantised_backbone(settings, tmp_path, method, quantization):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    run = settings(method, "--quantization", quantization, *(["--basis", "twhiten"] if method == "bpt" else []))
    trainer, data = build_trainer(run)
    model = trainer.model
    quantised = getattr(bitsandbytes.nn, {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[quantization])
    for name, layer in linear_layers(model.get_base_model().vit).items():
        if "prompts" not in name:
            assert isinstance(layer, quantised), name
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "norm" in name or "classifier" in name:
            assert parameter.dtype == torch.float32, name
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    for name, value in model.named_parameters():
        assert value.requires_grad != torch.equal(value, before[name]), name

    expected = trainer.predict(data["test"]).predictions
    trainer.save_model()
    fresh = PeftModel.from_pretrained(load_classifier(run.model, CLASSES), tmp_path / "out").eval()
    pixels = torch.stack([data["test"][index]["pixel_values"] for index in range(len(data["test"]))])
    with torch.no_grad():
        torch.testing.assert_close(fresh(pixel_values=pixels).logits, torch.from_numpy(expected))


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_prompts_learn_after_an_evaluation_as_on_the_weights_that_quantised_ones_stand_for(settings, quantization):
    # Regression: bitsandbytes packs 4-bit weights for inference on a CPU, and lets no gradient through any more.
    pytest.importorskip("bitsandbytes")
    trainer, data = build_trainer(settings("vpt", "--quantization", quantization, "--prompt_dropout", "0"))
    plain, _ = build_trainer(settings("vpt", "--prompt_dropout", "0"))
    trainer.evaluate()
    layers = linear_layers(trainer.model)
    with torch.no_grad():
        for name, layer in linear_layers(plain.model).items():
            layer.weight.copy_(linear_weight(layers[name]))
    batch = {"pixel_values": torch.stack([data["train"][i]["pixel_values"] for i in range(4)])}
    gradients = []
    for model in (trainer.model, plain.model):
        logits = model.train()(**batch).logits
        logits[:, 0].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    # 8-bit layers round their inputs too.
    tolerance = 0.1 if quantization == "8bit" else 1e-3
    for name, expected in gradients[1].items():
        assert (gradients[0][name] - expected).norm() <= tolerance * expected.norm(), name
    assert any("prompt" in name and value.norm() > 0 for name, value in gradients[1].items())


# NF4 is about a tenth off on many numbers; here there are few.
@pytest.mark.parametrize(("quantization", "tolerance"), [("8bit", 0.02), ("4bit", 0.3)])
def test_whitening_sees_the_weights_that_quantised_ones_stand_for(settings, quantization, tolerance):
    pytest.importorskip("bitsandbytes")
    weights = []
    for chosen in ("none", quantization):
        model = build_trainer(settings("bpt", "--quantization", chosen))[0].model
        block = model.base_model.prompted_blocks()[0]
        weights.append([w.float() for w in block.access.query_key_weights(block.attention)])
    for actual, expected in zip(weights[1], weights[0], strict=True):
        assert actual.shape == expected.shape
        assert (actual - expected).norm() < tolerance * expected.norm()
        assert not torch.equal(actual, expected)
