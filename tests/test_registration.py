"""How the methods become members of PEFT's closed enum, and what fresh processes need."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, output_of
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from transformers import AutoModelForImageClassification

from hf_vpt import METHODS, VPTConfig, VPTModel, registration
from hf_vpt.registration import register_method
from hf_vpt.tuners import TUNERS


def fresh_base(**overrides):
    """A base model, with other random numbers to come than after the first build: what is not loaded shows."""
    base = BACKBONES["vit"].build(**overrides)
    torch.manual_seed(1)
    return base


def wrap(name):
    return get_peft_model(BACKBONES["vit"].build(), ADAPTERS[name].config()).eval()


@pytest.fixture
def saved(adapter, tmp_path, pixel_values):
    """Folders of a base model and of an adapter for it, with a head of its own, and the adapter's logits."""
    BACKBONES["vit"].build().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, adapter.config()).eval()
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].bias.add_(1.0)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, output_of(model, pixel_values).detach()


@pytest.fixture
def other_method():
    """A method of somebody else, taken out again after the test."""

    class OtherConfig(VPTConfig):
        method_name = "HFVPT_OTHER"

    class OtherModel(VPTModel):
        prefix = "hfvpt_other_"

    yield OtherConfig, OtherModel
    if "HFVPT_OTHER" in PeftType.__members__:
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            mapping.pop(PeftType["HFVPT_OTHER"], None)
        registration._remove_member("HFVPT_OTHER")


@pytest.mark.parametrize("method", METHODS)
def test_method_is_a_full_member_of_the_enum(method):
    name = METHODS[method].method_name
    member = getattr(PeftType, name)
    assert isinstance(member, PeftType) and member.name == member.value == name
    assert PeftType[name] is member and PeftType(name) is member and PeftType(member) is member
    assert member in list(PeftType) and member in list(reversed(PeftType)) and member in PeftType
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__) == len(set(PeftType))
    assert hash(member) == hash(name) and {member: 1}[name] == 1
    assert json.loads(json.dumps(member)) == name
    assert copy.deepcopy(member) is member and copy.copy(member) is member
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    with pytest.raises(AttributeError):
        setattr(PeftType, name, "something else")


@pytest.mark.parametrize("method", METHODS)
def test_method_is_in_all_of_pefts_tables(method):
    member = PeftType[METHODS[method].method_name]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is METHODS[method]
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is TUNERS[method]
    # What the native adapter functions of Transformers assume.
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == TUNERS[method].prefix == member.value.lower() + "_"
    # PEFT expects of each member that its config can be made without arguments.
    assert METHODS[method]().peft_type is member


def test_no_prefix_contains_another():
    ours = {PEFT_TYPE_TO_PREFIX_MAPPING[PeftType[config.method_name]] for config in METHODS.values()}
    assert len(ours) == len(METHODS)
    for prefix in ours:
        others = [other for other in PEFT_TYPE_TO_PREFIX_MAPPING.values() if other and other != prefix]
        assert not [other for other in others if other in prefix or prefix in other]


def test_registering_twice_changes_nothing():
    members, tables = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    for method in METHODS:
        register_method(METHODS[method], TUNERS[method])
    assert list(PeftType) == members
    assert tables == PEFT_TYPE_TO_CONFIG_MAPPING


def test_a_new_method_registers_and_works(other_method, pixel_values):
    config_cls, model_cls = other_method
    register_method(config_cls, model_cls)
    model = get_peft_model(BACKBONES["vit"].build(), config_cls(num_virtual_tokens=2)).eval()
    assert type(model.base_model) is model_cls
    assert output_of(model, pixel_values).shape == (4, 5)


def test_a_failing_registration_leaves_no_member_behind(other_method, monkeypatch):
    def fail(**kwargs):
        raise KeyError("Inconsistent prefixes")

    monkeypatch.setattr(registration, "register_peft_method", fail)
    members = list(PeftType)
    with pytest.raises(KeyError, match="Inconsistent prefixes"):
        register_method(*other_method)
    assert list(PeftType) == members and not hasattr(PeftType, "HFVPT_OTHER")
    assert "HFVPT_OTHER" not in PeftType.__members__
    with pytest.raises(ValueError):
        PeftType("HFVPT_OTHER")
    monkeypatch.undo()
    register_method(*other_method)  # and the way is free for a second attempt


@pytest.mark.parametrize("prefix", ["hfvpt_vpt_", "lora_", "vpt_", "x_hfvpt_bpt_"])
def test_a_prefix_that_meets_another_one_is_refused(other_method, prefix):
    other_method[1].prefix = prefix
    with pytest.raises(KeyError, match=r"Found the prefixes .*Choose another `prefix`"):
        register_method(*other_method)
    assert "HFVPT_OTHER" not in PeftType.__members__


def test_another_class_under_a_taken_name_is_refused(other_method):
    other_method[0].method_name = "HFVPT_VPT"
    with pytest.raises(KeyError, match=r"Found the PEFT method 'HFVPT_VPT'.*Choose another `method_name`"):
        register_method(*other_method)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.HFVPT_VPT] is VPTConfig


@pytest.mark.parametrize("method", METHODS)
def test_saved_config_loads_as_its_own_class(method, tmp_path):
    config = METHODS[method](num_virtual_tokens=3)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is METHODS[method]
    assert loaded.peft_type is PeftType[METHODS[method].method_name]
    assert loaded.to_dict() == config.to_dict()


def test_copied_and_pickled_models_give_equal_logits(adapter, pixel_values):
    model = get_peft_model(BACKBONES["vit"].build(), adapter.config()).eval()
    expected = output_of(model, pixel_values)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    # Pickle and copy may lay memory out anew, so equal means equal up to the order of sums.
    torch.testing.assert_close(output_of(copied, pixel_values), expected)
    torch.testing.assert_close(output_of(pickled, pixel_values), expected)
    # What a copy's blocks refer to is the copy.
    for twin in (copied, pickled):
        blocks = twin.base_model.prompted_blocks()
        assert all(first is blocks[0] for block in blocks[1:] for first in block._first)
        assert all(block.attention.config.unprompted is twin.config for block in blocks)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert torch.equal(output_of(model, pixel_values), expected)


def test_auto_peft_model_finds_base_and_method(adapter, saved, pixel_values):
    folder, expected = saved
    model = AutoPeftModel.from_pretrained(folder / "adapter").eval()
    assert type(model.base_model) is TUNERS[adapter.method]
    torch.testing.assert_close(output_of(model, pixel_values), expected)


def test_transformers_loads_an_adapter_natively(saved, pixel_values):
    folder, expected = saved
    by_folder = AutoModelForImageClassification.from_pretrained(folder / "adapter")
    torch.testing.assert_close(output_of(by_folder, pixel_values), expected)
    model = AutoModelForImageClassification.from_pretrained(folder / "base")
    plain = output_of(model, pixel_values)
    info = model.load_adapter(str(folder / "adapter"), adapter_name="other")
    assert not info.missing_keys and not info.unexpected_keys
    torch.testing.assert_close(output_of(model, pixel_values), expected)
    model.disable_adapters()
    assert torch.equal(output_of(model, pixel_values), plain)


def test_transformers_adds_switches_saves_and_deletes_adapters_natively(adapter, tmp_path, pixel_values):
    model = BACKBONES["vit"].build()
    model.add_adapter(adapter.config())
    first = output_of(model.eval(), pixel_values)
    model.add_adapter(adapter.config(5), "second")
    second = output_of(model.eval(), pixel_values)
    model.set_adapter("default")
    assert torch.equal(output_of(model, pixel_values), first) and not torch.equal(second, first)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh_base(), tmp_path).eval()
    torch.testing.assert_close(output_of(loaded, pixel_values), first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(output_of(model, pixel_values), second)


def test_transformers_natively_loads_what_is_no_parameter(tmp_path, pixel_values):
    # Transformers assigns tensors one by one, past `load_state_dict`: relocated prompts went back to their first
    # blocks, and a whitened basis passed for one that is not there yet.
    model = wrap("provpt")
    model.base_model.prompts()[0].move(1, 2, scale=1.0)
    model.save_pretrained(tmp_path)
    loaded = fresh_base()
    loaded.load_adapter(str(tmp_path))
    assert loaded.vit.layers[0].prompts["default"].serves == [0, 2]
    torch.testing.assert_close(output_of(loaded, pixel_values), output_of(model, pixel_values))


@pytest.mark.parametrize("basis", ["fwhiten", "twhiten"])
def test_transformers_natively_loads_a_whitened_basis(basis, tmp_path, pixel_values):
    from hf_vpt import BPTConfig, initialize_whitening

    model = get_peft_model(BACKBONES["vit"].build(), BPTConfig(num_virtual_tokens=2, rank=4, basis=basis)).eval()
    initialize_whitening(model, [pixel_values])
    model.save_pretrained(tmp_path)
    loaded = fresh_base()
    loaded.load_adapter(str(tmp_path))
    torch.testing.assert_close(output_of(loaded, pixel_values), output_of(model, pixel_values))


FRESH_PROCESS = """
import importlib, pickle, sys
import peft
from peft.utils import PeftType
folder, pickled = sys.argv[1:]
try:
    peft.PeftConfig.from_pretrained(folder)
except KeyError as error:
    assert "HFVPT_VPT" in str(error)
else:
    raise AssertionError("PEFT knows the method without hf_vpt")
# A pickled config finds its class first, which imports the package.
config = pickle.loads(bytes.fromhex(pickled))
assert config.peft_type is PeftType.HFVPT_VPT
import hf_vpt
assert type(peft.PeftConfig.from_pretrained(folder)) is hf_vpt.VPTConfig
members = list(PeftType)
importlib.reload(hf_vpt)
for name in [name for name in sys.modules if name.startswith("hf_vpt")]:
    del sys.modules[name]
hf_vpt = importlib.import_module("hf_vpt")  # new classes, as after editing in a notebook
assert list(PeftType) == members
assert type(peft.PeftConfig.from_pretrained(folder)) is hf_vpt.VPTConfig
assert hf_vpt.VPTConfig().peft_type is PeftType.HFVPT_VPT
"""


@pytest.mark.slow
def test_a_fresh_process_needs_the_import_and_survives_a_reload(tmp_path):
    config = VPTConfig(num_virtual_tokens=3)
    config.save_pretrained(tmp_path)
    arguments = [str(tmp_path), pickle.dumps(config).hex()]
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *arguments], check=True, timeout=300)


@pytest.mark.slow
def test_configs_and_whole_models_travel_to_a_spawned_process(pixel_values):
    model = wrap("vapt").requires_grad_(False)
    config = model.peft_config["default"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        # Built-in callables, so that nothing but the pickled objects can import the package there.
        assert pool.apply(repr, (config,)) == repr(config)
        output = pool.apply(model, (pixel_values,))
        torch.testing.assert_close(output.logits, model(pixel_values).logits)
