"""One call makes a classifier of an adapter, and takes nothing from it that it should not."""

import json
import shutil

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, output_of
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessor, pipeline

from hf_vpt import VPTConfig, load_image_classifier
from hf_vpt.classifiers import load_backbone, load_classifier_config
from hf_vpt.demo import demo_backbone_path
from hf_vpt.hub import loading


NAMES = ["ape", "bee", "cat"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    BACKBONES["vit"].build(num_labels=2).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(folder)
    return str(folder)


def train(base, folder, adapter=ADAPTERS["vpt_deep"], names=NAMES, **overrides):
    """A saved adapter that is not trivial, and the model it was saved from."""
    torch.manual_seed(5)
    model = load_backbone(base, load_classifier_config(base, names))
    model = get_peft_model(model, adapter.config(overrides.pop("num_virtual_tokens", 2), **overrides))
    model.save_pretrained(folder)
    return model.eval()


def test_a_loaded_adapter_has_its_head_its_names_and_its_processor(adapter, base, tmp_path, pixel_values):
    trained = train(base, tmp_path, adapter)
    model, processor = load_image_classifier(tmp_path)
    assert isinstance(model, PeftModel) and not model.training
    assert list(model.config.id2label.values()) == NAMES
    assert torch.equal(output_of(model, pixel_values), output_of(trained, pixel_values))
    assert dict(processor.size) == {"height": 32, "width": 48}


def test_the_processor_beside_the_adapter_comes_before_that_of_the_backbone(base, tmp_path):
    train(base, tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 48}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    assert list(load_image_classifier(tmp_path)[1].image_mean) == [0.1, 0.2, 0.3]


def test_pipelines_use_the_adapter_and_its_names_without_a_complaint(base, tmp_path, caplog):
    train(base, tmp_path)
    model, processor = load_image_classifier(tmp_path)
    image = Image.effect_mandelbrot((48, 32), (-2, -1, 1, 1), 50).convert("RGB")
    classify = pipeline("image-classification", model=model, image_processor=processor, top_k=3)
    found = {entry["label"]: entry["score"] for entry in classify(image)}
    with torch.no_grad():
        scores = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
        with model.disable_adapter():
            bare = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    assert [found[name] for name in NAMES] == pytest.approx(scores.tolist(), abs=1e-6)
    assert len(bare) == 2 != len(scores)
    assert "not supported" not in caplog.text


def test_several_adapters_share_a_backbone_and_keep_their_names(base, tmp_path, pixel_values):
    first = train(base, tmp_path / "first")
    second = train(base, tmp_path / "second", names=["x", "y", "z", "w"], num_virtual_tokens=4)
    model, _ = load_image_classifier(tmp_path / "first", adapter_name="first")
    same, _ = load_image_classifier(tmp_path / "second", into=model, adapter_name="second")
    assert same is model and model.active_adapters == ["first"]
    for name, alone in (("first", first), ("second", second)):
        model.set_adapter(name)
        assert torch.equal(output_of(model, pixel_values), output_of(alone, pixel_values))
        assert model.config.id2label == alone.config.id2label


def test_what_cannot_share_a_backbone_is_refused(base, tmp_path):
    train(base, tmp_path / "vpt")
    train(base, tmp_path / "bpt", ADAPTERS["bpt_deep"])
    train(demo_backbone_path(), tmp_path / "demo")
    model, _ = load_image_classifier(tmp_path / "vpt")
    with pytest.raises(ValueError, match="an adapter called 'default' in the model.*another adapter_name"):
        load_image_classifier(tmp_path / "vpt", into=model)
    with pytest.raises(ValueError, match="an adapter of HFVPT_BPT for a model with one of HFVPT_VPT"):
        load_image_classifier(tmp_path / "bpt", into=model, adapter_name="other")
    with pytest.raises(ValueError, match="an adapter for .*vit_drawn and a model of"):
        load_image_classifier(tmp_path / "demo", into=model, adapter_name="other")
    assert list(model.peft_config) == ["default"]


def test_an_adapter_of_the_demo_backbone_records_its_name_and_finds_it(tmp_path):
    train("demo", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "demo"
    model, processor = load_image_classifier(tmp_path)
    assert list(model.config.id2label.values()) == NAMES
    assert processor.to_dict() == AutoImageProcessor.from_pretrained(demo_backbone_path()).to_dict()


def test_another_base_model_can_be_named_or_given(base, tmp_path, pixel_values):
    trained = train(base, tmp_path / "adapter")
    moved = shutil.copytree(base, tmp_path / "moved")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for name, message in (("/gone/away", "'/gone/away' as base model, which is not on this"), (None, "no base model")):
        changed = config | {"base_model_name_or_path": name}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"{message}.*pass base_model="):
            load_image_classifier(tmp_path / "adapter")
        model, _ = load_image_classifier(tmp_path / "adapter", base_model=str(moved))
        assert torch.equal(output_of(model, pixel_values), output_of(trained, pixel_values))
    given = load_backbone(str(moved), load_classifier_config(str(moved), None))
    model, _ = load_image_classifier(tmp_path / "adapter", base_model=given)
    assert model.get_base_model() is given
    assert torch.equal(output_of(model, pixel_values), output_of(trained, pixel_values))


def test_an_adapter_without_a_head_uses_that_of_the_backbone(base, tmp_path, pixel_values):
    model = load_backbone(base, load_classifier_config(base, None))
    trained = get_peft_model(model, VPTConfig(num_virtual_tokens=2, init_weights=False, modules_to_save=[])).eval()
    trained.save_pretrained(tmp_path)
    loaded, _ = load_image_classifier(tmp_path)
    assert torch.equal(output_of(loaded, pixel_values), output_of(trained, pixel_values))


def test_other_peft_methods_load_with_the_names_beside_them(base, tmp_path, pixel_values):
    model = load_backbone(base, load_classifier_config(base, NAMES))
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["classifier"])
    trained = get_peft_model(model, config).eval()
    trained.save_pretrained(tmp_path)
    (tmp_path / "id2label.json").write_text(json.dumps(dict(enumerate(NAMES))))
    loaded, _ = load_image_classifier(tmp_path)
    assert list(loaded.config.id2label.values()) == NAMES
    torch.testing.assert_close(output_of(loaded, pixel_values), output_of(trained, pixel_values))


def test_the_backbone_runs_in_the_format_and_kernel_asked_for(base, tmp_path):
    train(base, tmp_path)
    model, _ = load_image_classifier(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.get_base_model().vit.embeddings.cls_token.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "_prompts" in n)
    assert "eager" in model.config._attn_implementation


def test_a_folder_without_an_adapter_is_an_error_that_says_what_is_missing(base, tmp_path):
    with pytest.raises(OSError, match="Found no adapter_config.json in"):
        load_image_classifier(tmp_path)
    train(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(OSError, match="Found no adapter_model.safetensors in .*pickles are not loaded"):
        load_image_classifier(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter_config.json in .* is no configuration of an adapter"):
        load_image_classifier(tmp_path)


def test_a_backbone_of_pickles_is_refused(tmp_path):
    model = BACKBONES["vit"].build(num_labels=2)
    model.config.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    ViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, VPTConfig())
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="safetensors"):
        load_image_classifier(tmp_path / "adapter")


def test_code_in_a_repository_is_not_run(base, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # Transformers asks, unless it is told
    train(base, tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings |= {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code|Unrecognized image processor"):
        load_image_classifier(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_would_fill_the_memory_is_refused(base, tmp_path, monkeypatch):
    train(base, tmp_path)
    ViTImageProcessor(size={"height": 90_000, "width": 90_000}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="images of 90,000 pixels a side. At most 4,096"):
        load_image_classifier(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_layers": 10**9}))
    with pytest.raises(ValueError, match="num_layers is 1000000000. It must be at most 4,096"):
        load_image_classifier(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 10**12}))
    with pytest.raises(ValueError, match="do not fit the adapter's config"):
        load_image_classifier(tmp_path)
    monkeypatch.setattr(loading, "MAX_JSON_BYTES", 10)
    with pytest.raises(ValueError, match="adapter_config.json with 0 MiB"):
        load_image_classifier(tmp_path)


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b"])
def test_a_subfolder_does_not_lead_out_of_the_repository(subfolder, base, tmp_path):
    train(base, tmp_path)
    with pytest.raises(ValueError, match="leads out of the repository"):
        load_image_classifier(tmp_path, subfolder=subfolder)


def test_a_base_model_that_is_itself_an_adapter_is_refused(base, tmp_path):
    nested = shutil.copytree(base, tmp_path / "nested")
    train(base, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "adapter_config.json", nested)
    train(base, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    changed = config | {"base_model_name_or_path": str(nested)}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="adapter_config.json in the base model .* adapter of another model"):
        load_image_classifier(tmp_path / "adapter")


def test_an_adapter_that_fails_leaves_the_model_it_was_for_as_it_was(base, tmp_path, pixel_values):
    train(base, tmp_path / "good")
    train(base, tmp_path / "bad", num_virtual_tokens=3)
    (tmp_path / "bad" / "preprocessor_config.json").write_text('{"image_processor_type": "Nothing"}')
    model, _ = load_image_classifier(tmp_path / "good")
    expected = output_of(model, pixel_values)
    with pytest.raises(ValueError, match="(?i)image processor"):
        load_image_classifier(tmp_path / "bad", into=model, adapter_name="bad")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output_of(model, pixel_values), expected)
    with pytest.raises(ValueError, match="Found dtype together with `into`"):
        load_image_classifier(tmp_path / "good", into=model, adapter_name="b", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="names have no dots"):
        load_image_classifier(tmp_path / "good", into=model, adapter_name="v1.0")


@pytest.mark.parametrize("content", ['["a"]', '{"1": "a"}', "{", "[" * 100_000, b"\xff\xfe", "7"])
def test_nonsense_in_files_of_names_is_an_error_that_names_the_file(content, tmp_path):
    (tmp_path / "id2label.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="id2label.json that does not hold names of classes"):
        loading.read_label_names(tmp_path)


@pytest.mark.parametrize("change", [{"base_model_name_or_path": 3}, {"peft_type": "XLORA"}, {"peft_type": "NEW"}])
def test_other_configurations_are_refused(change, base, tmp_path):
    train(base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises((ValueError, TypeError), match="is no configuration of an adapter|base_model_name_or_path"):
        load_image_classifier(tmp_path)


def test_padding_counts_as_a_size_too(base, tmp_path):
    train(base, tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings |= {"do_pad": True, "pad_size": {"height": 9000, "width": 9000}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="images of 9,000 pixels"):
        load_image_classifier(tmp_path)
