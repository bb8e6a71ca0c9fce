"""Adapter files that cannot be what their config says are refused while the model is still as it was."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, output_of
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hf_vpt.tuners.base import PromptedBlock


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def fresh_base(**overrides):
    """A base model, with other random numbers to come than after the first build: what is not loaded shows."""
    base = BACKBONES["vit"].build(**overrides)
    torch.manual_seed(1)
    return base


def wrap(adapter, num_virtual_tokens=2, **overrides):
    return get_peft_model(BACKBONES["vit"].build(), adapter.config(num_virtual_tokens, **overrides)).eval()


def a_prompt_tensor(tensors):
    return max(key for key in tensors if "prompts." in key and tensors[key].is_floating_point())


def edit(change):
    """A way to spoil a folder: `change` gets the tensors of its file and returns others."""

    def spoil(folder):
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return spoil


def truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def reconfigure(folder):
    config = json.loads((folder / CONFIG).read_text())
    config["num_virtual_tokens"] += 1
    (folder / CONFIG).write_text(json.dumps(config))


def nan(tensors):
    tensors[a_prompt_tensor(tensors)].view(-1)[-1] = torch.nan
    return tensors


def infinite_head(tensors):
    tensors["base_model.model.classifier.weight"][0, 0] = torch.inf
    return tensors


def without_head(tensors):
    return {key: tensor for key, tensor in tensors.items() if "classifier" not in key}


def without_half_of_the_head(tensors):
    del tensors["base_model.model.classifier.bias"]
    return tensors


def without_a_prompt(tensors):
    del tensors[a_prompt_tensor(tensors)]
    return tensors


def with_a_prompt_too_many(tensors):
    key = a_prompt_tensor(tensors)
    return tensors | {key + "_more": tensors[key].clone()}


def with_a_block_too_many(tensors):
    key = a_prompt_tensor(tensors)
    return tensors | {re.sub(r"layers\.\d", "layers.7", key): tensors[key].clone()}


def with_a_prompt_of_another_shape(tensors):
    key = a_prompt_tensor(tensors)
    return tensors | {key: torch.cat([tensors[key], tensors[key]])}


DAMAGE = {
    "truncated": (truncate, r"Found an adapter file that cannot be read.*needs a whole safetensors file.*again\."),
    "empty": (empty, r"Found an adapter file that cannot be read.*needs a whole safetensors file.*again\."),
    "nan": (edit(nan), r"Found numbers that are not finite in .*prompts.*needs finite weights.*earlier checkpoint"),
    "infinite_head": (edit(infinite_head), r"Found numbers that are not finite in .*classifier\.weight.*needs finite"),
    "no_head": (edit(without_head), r"Found no tensors of the head 'classifier' in .*need the trained head.*Save the"),
    "half_a_head": (
        edit(without_half_of_the_head),
        r"Found no classifier\.bias in the adapter file.*need the whole head.*Save the",
    ),
    "missing": (edit(without_a_prompt), r"Found 1 tensors in .* that do not fit .*: None instead of \(.*Save or"),
    "extra": (edit(with_a_prompt_too_many), r"Found 1 tensors in .*_more: \(.*\) instead of None.*Save or download"),
    "extra_block": (
        edit(with_a_block_too_many),
        r"Found 1 tensors in .*block 7, .* instead of None.*Save or download",
    ),
    "shape": (edit(with_a_prompt_of_another_shape), r"Found 1 tensors in .*: \(.*\) instead of \(.*Save or download"),
    "other_config": (reconfigure, r"Found \d+ tensors in .* that do not fit the adapter's config.*Save or download"),
}


@pytest.fixture(params=DAMAGE)
def damaged(request, adapter, tmp_path):
    """The folder of a damaged adapter and what its error has to say."""
    spoil, message = DAMAGE[request.param]
    wrap(adapter).save_pretrained(tmp_path)
    spoil(tmp_path)
    return tmp_path, f"(?s){message}"


def test_a_damaged_file_is_refused_and_the_base_model_stays_as_it_was(damaged, pixel_values):
    folder, message = damaged
    base = BACKBONES["vit"].build()
    modules, expected = list(base.named_modules()), output_of(base, pixel_values)
    with pytest.raises(ValueError, match=message) as error:
        PeftModel.from_pretrained(base, folder)
    # What was found, what is needed, what to do.
    assert str(error.value).replace("…", "").count(". ") >= 2
    assert [name for name, _ in base.named_modules()] == [name for name, _ in modules]
    assert all(a is b for a, (_, b) in zip(base.modules(), modules, strict=True))
    assert not any(isinstance(module, PromptedBlock) for module in base.modules())
    assert not hasattr(base, "peft_config")
    assert torch.equal(output_of(base, pixel_values), expected)


def test_a_damaged_file_leaves_the_other_adapters_of_a_model_alone(damaged, adapter, pixel_values):
    folder, message = damaged
    model = wrap(adapter)
    names, expected = set(model.state_dict()), output_of(model, pixel_values)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert set(model.state_dict()) == names
    assert torch.equal(output_of(model, pixel_values), expected)


def test_a_head_that_does_not_fit_the_names_of_its_classes_is_refused(adapter, tmp_path, pixel_values):
    wrap(adapter).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"label_names": ["a", "b"]}))
    base = BACKBONES["vit"].build(num_labels=7)
    modules, expected = list(base.modules()), output_of(base, pixel_values)
    message = r"classifier\.weight of shape \(5, 16\) in the adapter file, .* ask for \(2, 16\)"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert all(a is b for a, b in zip(base.modules(), modules, strict=True))
    assert torch.equal(output_of(base, pixel_values), expected)
    model = get_peft_model(base, adapter.config()).eval()
    expected = output_of(model, pixel_values)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output_of(model, pixel_values), expected)


def test_a_file_with_weights_of_the_backbone_or_strange_numbers_is_refused(adapter, tmp_path):
    wrap(adapter).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    path = "base_model.model.vit.layers.0.base_layer.mlp.fc1.weight"
    save_file(tensors | {path: torch.zeros(24, 16)}, file)
    with pytest.raises(ValueError, match="1 tensors in .* neither prompts nor .*fc1.weight"):
        PeftModel.from_pretrained(fresh_base(), tmp_path)
    key = next(key for key in tensors if "_prompts." in key and tensors[key].is_floating_point())
    save_file(tensors | {key: tensors[key].long()}, file)
    with pytest.raises(ValueError, match="of the format torch.int64 .* makes torch.float32"):
        PeftModel.from_pretrained(fresh_base(), tmp_path)
    save_file(tensors | {key: tensors[key].to(torch.int8)}, file)
    with pytest.raises(ValueError, match="numbers of the format I8 in .* Adapters hold F64"):
        PeftModel.from_pretrained(fresh_base(), tmp_path)


@pytest.mark.parametrize("wrapped", ["modules_to_save.good", "original_module"])
def test_a_file_does_not_reach_into_other_adapters_or_the_base_models_head(wrapped, adapter, tmp_path):
    wrap(adapter).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = f"base_model.model.classifier.{wrapped}.weight"
    save_file(tensors | {key: torch.full((5, 16), 7.0)}, tmp_path / WEIGHTS)
    model = get_peft_model(fresh_base(), adapter.config(), adapter_name="good")
    with pytest.raises(ValueError, match="neither prompts nor listed in modules_to_save"):
        model.load_adapter(tmp_path, "evil")
    assert list(model.peft_config) == ["good"]
    with pytest.raises(ValueError, match="neither prompts nor listed in modules_to_save"):
        other = key.replace(".good.", ".other.")
        own = get_peft_model_state_dict(model, adapter_name="good")
        set_peft_model_state_dict(model, {**own, other: torch.full((5, 16), 7.0)}, "good")


@pytest.mark.parametrize("name", ["token_dim", "num_layers"])
def test_a_config_that_weights_cannot_be_compared_with_is_refused(name, adapter, tmp_path):
    wrap(adapter).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {name: None, "num_virtual_tokens": 10**6, "depths": None}))
    with pytest.raises(ValueError, match=f"{name}=None.* filled in before an adapter is saved"):
        PeftModel.from_pretrained(fresh_base(), tmp_path)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(adapter, tmp_path, monkeypatch):
    wrap(adapter).save_pretrained(tmp_path)
    monkeypatch.setattr("hf_vpt.tuners.base.checkpoint.MAX_WEIGHTS_BYTES", 100)
    monkeypatch.setattr("hf_vpt.tuners.base.checkpoint.safe_open", None)
    with pytest.raises(ValueError, match="adapter_model.safetensors with 0 MiB. .* more is not loaded"):
        PeftModel.from_pretrained(fresh_base(), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 32}, r"token_dim=32 and an adapter made for token_dim=16"),
        ({"num_hidden_layers": 4}, r"num_layers=4 and an adapter made for num_layers=3"),
    ],
    ids=["width", "depth"],
)
def test_a_base_model_of_another_shape_is_refused_and_stays_as_it_was(overrides, message, adapter, tmp_path):
    wrap(adapter).save_pretrained(tmp_path)
    base = BACKBONES["vit"].build(**overrides)
    modules = list(base.modules())
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert all(a is b for a, b in zip(base.modules(), modules, strict=True))


def test_blocks_are_known_by_their_number_whatever_the_model_class_calls_them(adapter, tmp_path, pixel_values):
    model = wrap(adapter, modules_to_save=[]).eval()
    model.save_pretrained(tmp_path)
    base = fresh_base().vit
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    expected = model.base_model.model.vit(pixel_values=pixel_values).last_hidden_state
    torch.testing.assert_close(loaded(pixel_values=pixel_values).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_the_file_of_another_method_is_refused(adapter, tmp_path):
    other = ADAPTERS["bpt_deep" if adapter.method != "bpt" else "vpt_deep"]
    wrap(adapter).save_pretrained(tmp_path)
    wrap(other).save_pretrained(tmp_path / "other")
    (tmp_path / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    base = BACKBONES["vit"].build()
    with pytest.raises(ValueError, match="neither prompts nor listed in modules_to_save"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(module, PromptedBlock) for module in base.modules())


def test_a_folder_without_weights_is_refused_by_peft(adapter, tmp_path):
    wrap(adapter).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises((ValueError, OSError)):
        PeftModel.from_pretrained(fresh_base(), tmp_path)


@pytest.mark.parametrize("change", [nan, without_a_prompt, with_a_prompt_too_many, with_a_prompt_of_another_shape])
def test_setting_bad_tensors_is_refused_and_changes_nothing(change, adapter, pixel_values):
    model = wrap(adapter)
    expected = output_of(model, pixel_values)
    tensors = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.add_(1.0)
    with pytest.raises(ValueError, match="in the state dict"):
        set_peft_model_state_dict(model, change(tensors))
    assert torch.equal(output_of(model, pixel_values), expected)


@pytest.mark.parametrize("change", [without_head, without_half_of_the_head])
def test_setting_tensors_without_the_head_is_refused_by_peft(change, adapter, pixel_values):
    model = wrap(adapter)
    expected = output_of(model, pixel_values)
    with pytest.raises(KeyError, match="classifier"):
        set_peft_model_state_dict(model, change(get_peft_model_state_dict(model)))
    assert torch.equal(output_of(model, pixel_values), expected)


def test_a_given_config_does_not_get_around_the_check(adapter, tmp_path):
    wrap(adapter).save_pretrained(tmp_path)
    edit(nan)(tmp_path)
    config = wrap(adapter).peft_config["default"]
    with pytest.raises(ValueError, match="not finite"):
        PeftModel.from_pretrained(fresh_base(), tmp_path, config=config)


def test_a_subfolder_is_checked_as_well(adapter, tmp_path):
    wrap(adapter).save_pretrained(tmp_path / "inner")
    PeftModel.from_pretrained(fresh_base(), tmp_path, subfolder="inner")
    truncate(tmp_path / "inner")
    base = BACKBONES["vit"].build()
    with pytest.raises(ValueError, match="cannot be read"):
        PeftModel.from_pretrained(base, tmp_path, subfolder="inner")
    assert not any(isinstance(module, PromptedBlock) for module in base.modules())


def test_an_adapter_without_a_head_loads_into_any_number_of_labels(adapter, tmp_path, pixel_values):
    wrap(adapter, modules_to_save=[]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh_base(num_labels=7), tmp_path).eval()
    assert output_of(model, pixel_values).shape == (4, 7)


def test_what_was_learned_of_the_file_is_not_saved_again(adapter, tmp_path):
    wrap(adapter).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh_base(), tmp_path)
    model.save_pretrained(tmp_path / "again")
    assert "saved_shapes" not in (tmp_path / "again" / CONFIG).read_text()
    first, again = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_relocated_prompts_of_unknown_blocks_are_refused(tmp_path):
    wrap(ADAPTERS["provpt"]).save_pretrained(tmp_path)

    def beyond(tensors):
        key = next(key for key in tensors if key.endswith(".block"))
        return tensors | {key: torch.full_like(tensors[key], 9)}

    edit(beyond)(tmp_path)
    base = BACKBONES["vit"].build()
    with pytest.raises(ValueError, match=r"serve the blocks \[9\].*spans the blocks \[0, 1, 2\]"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(module, PromptedBlock) for module in base.modules())
