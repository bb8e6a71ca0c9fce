"""Each adapter has a head with classes of its own, and their names."""

import copy
import sys
import warnings

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, output_of
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

from hf_vpt import VPTConfig
from hf_vpt.backbones import find_backbone
from hf_vpt.tuners.base.head import linear_heads


ANIMALS = ["ape", "bee", "cat", "dog", "emu"]
SHAPES = ["round", "square", "long"]


def vit():
    model = BACKBONES["vit"].build()
    model.config.id2label = dict(enumerate(ANIMALS))
    return model


def two_tasks(adapter=ADAPTERS["vpt_deep"]):
    model = get_peft_model(vit(), adapter.config(init_weights=False))
    model.add_adapter("shapes", adapter.config(init_weights=False, label_names=SHAPES))
    with torch.no_grad():
        for parameter in model.get_submodule("base_model.model.classifier").modules_to_save.parameters():
            parameter.normal_()
    return model.eval()


def test_an_adapter_remembers_the_names_of_its_classes(tmp_path):
    model = get_peft_model(vit(), VPTConfig())
    assert model.peft_config["default"].label_names == ANIMALS
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).label_names == ANIMALS


def test_names_that_are_not_those_of_the_head_are_not_taken():
    model = vit()
    model.classifier = torch.nn.Linear(16, 4)
    assert get_peft_model(model, VPTConfig()).peft_config["default"].label_names is None


def test_an_adapter_without_a_head_of_its_own_has_no_names():
    assert get_peft_model(vit(), VPTConfig(modules_to_save=[])).peft_config["default"].label_names is None
    with pytest.raises(ValueError, match=r"label_names is .* must be None: no linear head is trained"):
        get_peft_model(vit(), VPTConfig(modules_to_save=[], label_names=SHAPES))


def test_the_model_names_the_classes_of_the_head_in_use(pixel_values):
    model = two_tasks()
    assert list(model.config.id2label.values()) == ANIMALS and model.config.num_labels == 5
    model.set_adapter("shapes")
    assert model(pixel_values=pixel_values).logits.shape[1] == 3
    assert list(model.config.id2label.values()) == SHAPES and model.config.label2id["long"] == 2
    with model.disable_adapter():
        assert list(model.config.id2label.values()) == ANIMALS
    assert list(model.config.id2label.values()) == SHAPES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("shapes")
    assert list(model.config.id2label.values()) == ANIMALS


def test_the_loss_follows_the_head_in_use(pixel_values):
    model = two_tasks()
    model.set_adapter("shapes")
    labels = torch.arange(len(pixel_values)) % 3
    output = model(pixel_values=pixel_values, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))


def test_unloading_gives_the_base_models_head_and_names_back(pixel_values):
    base = vit()
    expected = output_of(base, pixel_values)
    model = get_peft_model(copy.deepcopy(base), VPTConfig(label_names=SHAPES, init_weights=False))
    assert list(model.config.id2label.values()) == SHAPES
    bare = model.unload()
    assert list(bare.config.id2label.values()) == ANIMALS
    assert torch.equal(output_of(bare.eval(), pixel_values), expected)


def test_images_of_one_batch_have_heads_of_different_sizes(adapter, pixel_values):
    model = two_tasks(adapter)
    images = torch.cat([pixel_values, pixel_values])[:5]
    names = ["shapes", "default", "__base__", "shapes", "default"]
    with torch.no_grad():
        logits = model(pixel_values=images, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(pixel_values=images[row : row + 1]).logits[0]
            else:
                model.set_adapter(name)
                expected = model(pixel_values=images[row : row + 1]).logits[0]
            torch.testing.assert_close(logits[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)
            assert logits[row, len(expected) :].eq(-torch.inf).all()
            torch.testing.assert_close(logits[row].softmax(0)[: len(expected)], expected.softmax(0))
    assert logits.shape == (5, 5)


def test_heads_of_different_sizes_are_saved_and_loaded_into_any_base(adapter, tmp_path, pixel_values):
    model = two_tasks(adapter)
    model.save_pretrained(tmp_path)
    base = vit()
    base.classifier = torch.nn.Linear(16, 7)
    loaded = PeftModel.from_pretrained(base, tmp_path / "shapes", adapter_name="shapes")
    loaded.load_adapter(tmp_path, "default")
    for name, labels in (("default", ANIMALS), ("shapes", SHAPES)):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert list(loaded.config.id2label.values()) == labels
        torch.testing.assert_close(output_of(loaded.eval(), pixel_values), output_of(model, pixel_values))


def test_a_head_of_its_own_size_trains_and_that_of_the_base_does_not(pixel_values):
    model = get_peft_model(vit(), VPTConfig(label_names=SHAPES))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "classifier" in name} == {
        f"base_model.model.classifier.modules_to_save.default.{tensor}" for tensor in ("weight", "bias")
    }
    model(pixel_values=pixel_values, labels=torch.zeros(len(pixel_values), dtype=torch.long)).loss.backward()
    assert model.get_submodule("base_model.model.classifier.modules_to_save.default").weight.grad.abs().sum() > 0


def test_auto_peft_model_needs_no_number_of_labels(tmp_path, pixel_values):
    BACKBONES["vit"].build(num_labels=2).save_pretrained(tmp_path / "base")
    base = type(BACKBONES["vit"].build()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, VPTConfig(label_names=ANIMALS, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert list(loaded.config.id2label.values()) == ANIMALS
    torch.testing.assert_close(output_of(loaded, pixel_values), output_of(model, pixel_values))


def test_a_model_with_a_baked_adapter_keeps_the_names_of_its_classes():
    assert list(two_tasks().bake().config.id2label.values()) == ANIMALS
    model = two_tasks()
    model.set_adapter("shapes")
    assert list(model.bake().config.id2label.values()) == SHAPES


def test_a_copied_model_changes_the_names_of_its_own_configuration_alone():
    model = two_tasks()
    copied = copy.deepcopy(model)
    copied.set_adapter("shapes")
    assert list(model.config.id2label.values()) == ANIMALS
    assert list(copied.config.id2label.values()) == SHAPES


def count_calls(function):
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_switching_takes_no_longer_with_more_adapters(adapter):
    model = get_peft_model(vit(), adapter.config())
    counts = {}
    for number in range(1, 12):
        model.add_adapter(str(number), adapter.config(label_names=SHAPES))
        model.set_adapter("1")
        model.set_adapter("default")
        counts[number] = count_calls(lambda: model.set_adapter("1"))
    assert counts[11] == counts[1]


def test_prompts_that_were_made_trainable_beside_the_active_adapter_are_frozen_by_a_switch():
    model = two_tasks()
    model.set_requires_grad("shapes", True)
    model.set_adapter("default")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not any("_prompts.shapes" in name for name in trained)
    model.set_adapter("shapes", inference_mode=True)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "_prompts" in name)


def test_a_new_adapter_takes_the_base_models_classes_whichever_adapter_is_active():
    model = get_peft_model(vit(), VPTConfig(label_names=["v", "w", "x", "y", "z"]))
    model.add_adapter("second", VPTConfig())
    assert model.peft_config["second"].label_names == ANIMALS
    model = get_peft_model(vit(), VPTConfig(label_names=SHAPES))
    model.add_adapter("second", VPTConfig())
    assert model.peft_config["second"].label_names == ANIMALS


def test_the_kind_of_problem_is_saved_and_follows_the_active_adapter(tmp_path, pixel_values):
    base = vit()
    base.config.problem_type = "multi_label_classification"
    model = get_peft_model(base, VPTConfig())
    model.add_adapter("one", VPTConfig(label_names=["score"], problem_type="regression"))
    model.add_adapter("shapes", VPTConfig(label_names=SHAPES, problem_type="single_label_classification"))
    assert model.peft_config["default"].problem_type == "multi_label_classification"
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path)
    assert loaded.config.problem_type == "multi_label_classification"
    for name in ("one", "shapes"):
        loaded.load_adapter(tmp_path / name, name)
    labels = {"default": torch.ones(4, 5), "one": torch.ones(4), "shapes": torch.zeros(4, dtype=torch.long)}
    for name in ("one", "shapes", "default"):
        loaded.set_adapter(name)
        output = loaded(pixel_values=pixel_values, labels=labels[name])
        assert output.loss.isfinite() and output.logits.shape[1] == loaded.config.num_labels
    assert loaded.unload().config.problem_type is None


def test_both_heads_of_a_distilled_model_are_found_in_the_order_of_its_record():
    """In the order of a set, which another process has otherwise, one seed would draw other heads."""
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = DeiTForImageClassificationWithTeacher(DeiTConfig(**settings, num_labels=5))
    backbone = find_backbone(model)
    config = VPTConfig(modules_to_save=list(reversed(backbone.heads)))
    assert len(backbone.heads) == 2
    assert tuple(linear_heads(config, backbone, model)) == backbone.heads
    wrapped = get_peft_model(model, VPTConfig(label_names=SHAPES)).eval()
    assert wrapped(pixel_values=torch.randn(2, 3, 224, 224)).logits.shape == (2, 3)


def test_an_adapter_that_is_not_there_is_not_made_active(pixel_values):
    model = two_tasks()
    expected = output_of(model, pixel_values)
    for names in ("typo", ["default", "typo"]):
        with pytest.raises(ValueError, match="Found no adapter called 'typo'.*'default', 'shapes'"):
            model.base_model.set_adapter(names)
    assert torch.equal(output_of(model, pixel_values), expected)
