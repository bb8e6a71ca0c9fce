"""Baselines of other families: exactly all biases, or exactly LoRA's factors, and the head train."""

import json

import pytest
import torch
from conftest import BACKBONES, inputs_of, output_of
from peft import LoraConfig, PeftModel

from hf_vpt.training import (
    count_trained_parameters,
    load_classifier,
    load_label_names,
    parse_arguments,
    prepare_for_training,
    train_classifier,
)
from hf_vpt.training.baselines import BaselineLoraConfig


CLASSIFIERS = [name for name, tiny in BACKBONES.items() if tiny.has_head]


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_head(name):
    # SigLIP's pooling is called head too, and is part of the backbone.
    return "classifier" in name or ".timm_model.head." in name or name.startswith("timm_model.head.")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_exactly_the_biases_and_the_head_train_in_every_family(name):
    model = prepare_for_training(BACKBONES[name].build(), "bias")
    # Written from the layers, not from the names.
    found = [getattr(m, name, None) for m in model.modules() for name in ("bias", "in_proj_bias")]
    biases = {id(bias) for bias in found if isinstance(bias, torch.nn.Parameter)}
    expected = {name for name, p in model.named_parameters() if id(p) in biases or is_head(name)}
    assert trained_names(model) == expected
    assert any(not is_head(name) for name in expected)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_exactly_the_factors_of_queries_and_values_and_the_head_train_in_every_family(name, pixel_values):
    tiny = BACKBONES[name]
    base = tiny.build()
    before = output_of(base, pixel_values)
    model = prepare_for_training(base, "lora", BaselineLoraConfig(r=2))
    torch.testing.assert_close(output_of(model.eval(), pixel_values), before)  # B is zero at first
    factors = {name for name in trained_names(model) if not is_head(name)}
    assert all(".lora_A." in name or ".lora_B." in name for name in factors)
    layers = {name.partition(".lora_")[0] for name in factors}
    others = {"timm_wrapper": {"qkv"}, "swinv2": {"query", "value"}}
    projections = others.get(tiny.model_type, {"q_proj", "v_proj"})
    assert len(layers) == len(projections) * len(tiny.widths)
    assert {layer.rpartition(".")[2] for layer in layers} == projections
    heads = {name for name in trained_names(model) if is_head(name)}
    assert heads and all("modules_to_save" in name for name in heads)
    model(**inputs_of(model, pixel_values)).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_B." in name)


def test_lora_tunes_four_r_d_numbers_a_block():
    model = prepare_for_training(BACKBONES["vit"].build(), "lora", BaselineLoraConfig(r=3))
    assert count_trained_parameters(model)["trained_parameters_without_head"] == 3 * 4 * 3 * 16


def test_settings_of_lora_are_options_and_those_of_language_models_are_not():
    config = parse_arguments(["--method", "lora", "--r", "4", "--lora_alpha", "16"]).peft_config
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 16, 0.0)
    assert parse_arguments(["--method", "lora"]).peft_config.r == 8
    with pytest.raises(ValueError, match="'megatron_config', which method 'lora' does not have"):
        parse_arguments(["--method", "lora", "--megatron_config", "1"])
    with pytest.raises(ValueError, match="'r', which method 'bias' does not have"):
        parse_arguments(["--method", "bias", "--r", "4"])


@pytest.fixture
def options(tmp_path):
    BACKBONES["vit"].build(image_size=(16, 16), patch_size=8, num_labels=10).save_pretrained(tmp_path / "backbone")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "backbone" / "preprocessor_config.json").write_text(json.dumps(processor))
    words = f"--model_name_or_path {tmp_path}/backbone --output_dir {tmp_path}/out --use_cpu --disable_tqdm 1"
    words += " --per_device_train_batch_size 80 --per_device_eval_batch_size 400 --num_train_epochs 1"
    return [*words.split(), "--learning_rate", "0.01"]


@pytest.mark.parametrize("method", ["bias", "lora"])
def test_what_a_run_saves_predicts_what_it_scored(options, tmp_path, method):
    settings = parse_arguments(["--method", method, *options])
    base = load_classifier(settings.model, [str(digit) for digit in range(10)])
    results = train_classifier(settings)
    assert results["method"] == method
    out = tmp_path / "out"
    if method == "lora":
        saved = json.loads((out / "adapter_config.json").read_text())
        assert (saved["peft_type"], saved["r"]) == ("LORA", 8)
        model = PeftModel.from_pretrained(load_classifier(settings.model, load_label_names(out)), out)
        assert type(model.peft_config["default"]) is LoraConfig
        trained = model.get_base_model()
    else:
        settings.model.model_name_or_path = str(out)
        model = trained = load_classifier(settings.model, [str(digit) for digit in range(10)])
        weights, start = model.state_dict(), base.state_dict()
        moved = {name for name in weights if not torch.equal(weights[name], start[name])}
        assert moved and all(name.endswith("bias") or is_head(name) for name in moved)
    assert trained.config.id2label[3] == "3"
    from hf_vpt.data import ImageTransform, collate_images, load_image_dataset
    from hf_vpt.training import load_image_processor

    images = load_image_dataset("digits")["test"].with_transform(ImageTransform(load_image_processor(settings.model)))
    batch = collate_images([images[index] for index in range(len(images))])
    with torch.no_grad():
        right = model.eval()(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
    assert right.float().mean().item() == pytest.approx(results["test_accuracy"], abs=1e-6)


@pytest.mark.parametrize("method", ["bias", "lora"])
def test_what_changes_every_block_goes_with_no_cache_of_the_first_ones(options, method):
    settings = parse_arguments(["--method", method, *options, "--cache_prefix"])
    with pytest.raises(ValueError, match=f"cache_prefix and method '{method}', which changes every block"):
        train_classifier(settings)
