"""PEFT's and Transformers' promises, kept by an adapter that wraps blocks instead of linear layers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, output_of
from peft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from transformers import AttentionInterface, ViTModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_vpt.attention.interface import PromptedAttentionConfig
from hf_vpt.tuners.base import PromptedBlock


DEEP = [name for name in ADAPTERS if "shallow" not in name]


def fresh_base(**overrides):
    """A base model, with other random numbers to come than after the first build: what is not loaded shows."""
    base = BACKBONES["vit"].build(**overrides)
    torch.manual_seed(1)
    return base


def wrap(adapter, num_virtual_tokens=2, base=None, **overrides):
    base = BACKBONES["vit"].build() if base is None else base
    return get_peft_model(base, adapter.config(num_virtual_tokens, **overrides)).eval()


def wrap_two(adapter, **overrides):
    """A model with the adapters "default" and "second", of different sizes; "default" is active."""
    model = wrap(adapter, **overrides)
    model.add_adapter("second", adapter.config(5, **overrides))
    return model.eval()


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def own_tensors(model, adapter_name):
    """The prompts of an adapter by name, parameters and buffers."""
    marker = f"{model.base_model.prefix}prompts.{adapter_name}."
    return {name: tensor for name, tensor in model.state_dict().items() if marker in name}


def plain_output(pixel_values):
    return output_of(BACKBONES["vit"].build(), pixel_values)


def hooks_of(model):
    return {
        name: (list(module._forward_pre_hooks.values()), list(module._forward_hooks.values()))
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks
    }


# Dtype and device


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapters_of_a_bfloat16_model_have_the_dtype_peft_promises(adapter, autocast_adapter_dtype, pixel_values):
    expected = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    base = BACKBONES["vit"].build().to(torch.bfloat16)
    model = get_peft_model(base, adapter.config(), autocast_adapter_dtype=autocast_adapter_dtype)
    model.add_adapter("second", adapter.config(5), autocast_adapter_dtype=autocast_adapter_dtype)
    for name in ("default", "second"):
        dtypes = {tensor.dtype for tensor in own_tensors(model, name).values() if tensor.is_floating_point()}
        assert dtypes == {expected}
        model.set_adapter(name)
        assert output_of(model.eval(), pixel_values.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_casting_leaves_an_inactive_or_frozen_adapter_frozen(adapter, autocast_adapter_dtype, tmp_path):
    # PEFT's cast re-wraps the tensors of a ParameterDict with requires_grad=True.
    wrap(adapter).save_pretrained(tmp_path)
    base = BACKBONES["vit"].build().to(torch.bfloat16)
    model = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast_adapter_dtype)
    assert not trained(model)
    model.add_adapter("second", adapter.config(5), autocast_adapter_dtype=autocast_adapter_dtype)
    assert not any(".second." in name for name in trained(model))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_later_adapters_go_to_the_device_of_the_blocks(adapter, pixel_values):
    model = wrap(adapter).to("cuda")
    model.add_adapter("second", adapter.config(5))
    assert get_model_status(model).devices == {"default": ["cuda"], "second": ["cuda"]}
    model.set_adapter("second")
    assert output_of(model.eval(), pixel_values.to("cuda")).device.type == "cuda"


def test_loading_with_little_memory_equals_normal_loading(adapter, tmp_path, pixel_values):
    saved = wrap(adapter, 5)
    saved.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh_base(), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    for name, tensor in own_tensors(saved, "default").items():
        assert torch.equal(model.state_dict()[name], tensor), name
    torch.testing.assert_close(output_of(model, pixel_values), output_of(saved, pixel_values))


# Unloading and merging


@torch.no_grad()  # PyTorch chooses another kernel where a position bias wants a gradient, and a frozen one wants none
def test_unloading_gives_the_very_same_modules_and_logits_back(backbone, adapter, pixel_values):
    base = backbone.build()
    plain, before, hooks = output_of(base, pixel_values), dict(base.named_modules()), hooks_of(base)
    configs = {name: module.config for name, module in before.items() if hasattr(module, "config")}
    model = get_peft_model(base, adapter.config(backbone=backbone))
    model.add_adapter("second", adapter.config(5, backbone))
    for parameter in model.parameters():  # a trained head must not stay behind
        if parameter.requires_grad:
            parameter.add_(0.1)
    output_of(model.eval(), pixel_values)
    unloaded = model.unload()
    assert unloaded is base
    after = dict(unloaded.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert all(after[name].config is config for name, config in configs.items())
    assert hooks_of(unloaded) == hooks
    assert not hasattr(unloaded, "peft_config")
    assert torch.equal(output_of(unloaded, pixel_values), plain)


def test_unloading_keeps_the_mode(adapter):
    assert wrap(adapter).train().unload().training
    modules = wrap(adapter).train().unload().modules()
    assert all(module.training for module in modules)
    assert not any(module.training for module in wrap(adapter).eval().unload().modules())


def test_an_unloaded_model_takes_another_adapter(adapter, pixel_values):
    base = wrap(ADAPTERS["vpt_deep"]).unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base, adapter.config()).eval()
    assert not torch.equal(output_of(model, pixel_values), plain_output(pixel_values))


@pytest.mark.parametrize(
    "request_merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: model.base_model.prompted_blocks()[0].merge(),
        lambda model: model.base_model.prompted_blocks()[0].unmerge(),
    ],
    ids=["merge_and_unload", "merge_adapter", "unmerge_adapter", "merge", "unmerge"],
)
def test_merging_is_refused_and_the_model_stays_usable(request_merge, adapter, pixel_values):
    model = wrap(adapter)
    expected = output_of(model, pixel_values)
    with pytest.raises(NotImplementedError, match=r"no weight of the backbone can hold them.*`unload\(\)`"):
        request_merge(model)
    assert torch.equal(output_of(model, pixel_values), expected)
    model.train()
    output_of(model, pixel_values).sum().backward()


# Deleting, switching and combining


def test_deleting_the_active_adapter_activates_the_other(adapter, pixel_values):
    model = wrap_two(adapter)
    model.set_adapter("second")
    expected = output_of(model.eval(), pixel_values)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    # VPT's projection and VAPT's projector have one owner for each adapter, so "second" kept its own.
    assert torch.equal(output_of(model, pixel_values), expected)
    assert not own_tensors(model, "default") and own_tensors(model, "second")
    assert get_model_status(model).active_adapters == ["second"] == model.active_adapters
    assert not any(".default." in name for name in trained(model))


def test_deleting_an_inactive_adapter_changes_nothing_else(adapter, pixel_values):
    model = wrap_two(adapter)
    expected, status = output_of(model, pixel_values), trained(model)
    model.delete_adapter("second")
    assert torch.equal(output_of(model, pixel_values), expected)
    assert trained(model) == status
    assert get_model_status(model).available_adapters == ["default"] == list(model.peft_config)


def test_deleting_the_last_adapter_leaves_the_base_model(adapter, pixel_values):
    model = wrap(adapter)
    model.delete_adapter("default")
    assert not model.peft_config and not own_tensors(model, "default")
    # PeftModel.forward itself needs an active adapter, with any method.
    assert torch.equal(output_of(model.base_model.model, pixel_values), plain_output(pixel_values))
    assert not any(isinstance(module, PromptedBlock) for module in model.unload().modules())


def test_blocks_agree_on_the_next_adapter_when_the_active_one_is_deleted(pixel_values):
    # Each block chose by itself among the adapters it has: two adapters were mixed.
    model = wrap(ADAPTERS["vpt_deep"])
    model.add_adapter("first", ADAPTERS["vpt_deep"].config(layers_to_transform=[0, 2]))
    model.add_adapter("later", ADAPTERS["vpt_deep"].config(layers_to_transform=[1, 2]))
    model.add_adapter("shallow", ADAPTERS["vpt_shallow"].config())
    model.set_adapter("first")
    expected = output_of(model.eval(), pixel_values)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to first"):
        model.delete_adapter("default")
    assert get_model_status(model).active_adapters == ["first"]
    assert torch.equal(output_of(model, pixel_values), expected)


def test_a_deleted_name_can_be_used_again(adapter, pixel_values):
    model = wrap_two(adapter)
    expected = output_of(model, pixel_values)
    model.delete_adapter("second")
    model.add_adapter("second", adapter.config(3))
    assert torch.equal(output_of(model, pixel_values), expected)
    model.set_adapter("second")
    assert output_of(model.eval(), pixel_values).isfinite().all()


def test_a_deleted_pool_takes_its_policy_along(pixel_values):
    # The policy of the deleted adapter, made for three blocks, moved prompts of the next one of its name.
    model = wrap_two(ADAPTERS["provpt"], relocation_warmup=0)
    batches = [{"pixel_values": pixel_values, "labels": torch.arange(4)}]
    for blocks in ([0, 1, 2], [0, 1]):
        tuner = model.base_model
        tuner.relocate(tuner.score_prompts(batches))
        tuner.relocate(tuner.score_prompts(batches))
        assert len(tuner.distribution()) == len(blocks)
        model.set_adapter("second")
        model.delete_adapter("default")
        model.add_adapter("default", ADAPTERS["provpt"].config(layers_to_transform=[0, 1], relocation_warmup=0))
        model.set_adapter("default")
        model.eval()


def test_deleting_an_unknown_adapter_is_refused(adapter):
    with pytest.raises(ValueError, match="nothing does not exist"):
        wrap(adapter).delete_adapter("nothing")


def test_several_active_adapters_concatenate_their_prompts(adapter, pixel_values):
    model = wrap_two(adapter, modules_to_save=[])
    model.base_model.set_adapter(["default", "second"])
    together = output_of(model, pixel_values)
    model.base_model.set_insertion("tokens")
    seen = []
    model.base_model.prompted_blocks()[0].base_layer.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    torch.testing.assert_close(output_of(model, pixel_values), together)
    assert seen == [7 + 2 + 5]
    status = get_model_status(model)
    assert status.active_adapters == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": True}


def test_two_halves_of_a_table_equal_the_whole(pixel_values):
    whole = wrap(ADAPTERS["vpt_deep"], 5, modules_to_save=[])
    halves = wrap(ADAPTERS["vpt_deep"], 2, modules_to_save=[])
    halves.add_adapter("second", ADAPTERS["vpt_deep"].config(3, modules_to_save=[]))
    for block, half in zip(whole.base_model.prompted_blocks(), halves.base_model.prompted_blocks(), strict=True):
        table = block.prompts["default"].prompt_embeddings.data
        half.prompts["default"].prompt_embeddings.data = table[:2].clone()
        half.prompts["second"].prompt_embeddings.data = table[2:].clone()
    halves.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(output_of(halves.eval(), pixel_values), output_of(whole, pixel_values))


def test_several_active_adapters_with_heads_are_refused_by_peft(adapter):
    # There is no clear way to say which head answers.
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        wrap_two(adapter).base_model.set_adapter(["default", "second"])


def test_shallow_and_deep_prompts_of_two_adapters_work_together(pixel_values):
    model = wrap(ADAPTERS["vpt_deep"], modules_to_save=[])
    model.add_adapter("second", ADAPTERS["vpt_shallow"].config(5, modules_to_save=[]))
    model.base_model.set_adapter(["default", "second"])
    together = output_of(model.eval(), pixel_values)
    model.base_model.set_insertion("tokens")
    torch.testing.assert_close(output_of(model, pixel_values), together)


# Status and what is trained


def test_status_is_consistent(adapter):
    model = wrap_two(adapter)
    status = get_model_status(model)
    assert status.adapter_model_type == type(model.base_model).__name__
    assert status.peft_types == dict.fromkeys(("default", "second"), model.peft_config["default"].peft_type.value)
    assert status.enabled and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.available_adapters == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": False}
    assert status.devices == {"default": ["cpu"], "second": ["cpu"]}
    for layer in get_layer_status(model):
        assert layer.enabled and layer.active_adapters == ["default"] and layer.merged_adapters == []
    with model.disable_adapter():
        assert get_model_status(model).enabled is False
    assert model.get_nb_trainable_parameters()[0] == adapter.parameters(2) + 5 * 16 + 5


def test_only_the_active_adapter_is_trained(adapter):
    model = wrap_two(adapter)
    for name, other in (("second", "default"), ("default", "second")):
        model.set_adapter(name)
        marked = trained(model)
        assert marked and all(f".{name}." in parameter for parameter in marked)
        assert not any(f".{other}." in parameter or ".base_layer." in parameter for parameter in marked)
    model.set_adapter("second", inference_mode=True)
    assert not trained(model)


def test_set_requires_grad_freezes_and_releases(adapter):
    model = wrap_two(adapter)
    before = trained(model)
    model.set_requires_grad("default", False)
    assert not trained(model)
    model.set_requires_grad("default", True)
    assert trained(model) == before
    model.set_requires_grad(["default", "second"], True)
    assert any(".second." in name for name in trained(model))


def test_adding_an_adapter_keeps_a_frozen_one_frozen(adapter, tmp_path):
    wrap(adapter).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh_base(), tmp_path)
    assert not trained(model)
    model.add_adapter("second", adapter.config(5))
    assert not trained(model)
    trainable = PeftModel.from_pretrained(fresh_base(), tmp_path, is_trainable=True)
    assert trained(trainable) == trained(wrap(adapter))


# Heads


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("vit", ["classifier"]),
        ("deit", ["classifier"]),
        ("deit_with_teacher", ["cls_classifier", "distillation_classifier"]),
        ("vit_msn", ["classifier"]),
        ("dinov2", ["classifier"]),
        ("dinov2_with_registers", ["classifier"]),
        ("vit_mae", []),
    ],
)
def test_heads_are_found_trained_and_saved(name, heads, tmp_path):
    model = get_peft_model(BACKBONES[name].build(), ADAPTERS["vpt_deep"].config())
    assert model.peft_config["default"].modules_to_save == heads
    parameters = {f"{head}.{tensor}" for head in heads for tensor in ("weight", "bias")}
    prefix = "base_model.model."
    expected = {prefix + p.replace(".", ".modules_to_save.default.", 1) for p in parameters}
    assert {name for name in trained(model) if "prompts" not in name} == expected
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key for key in keys if "prompts" not in key} == {prefix + name for name in parameters}


def test_an_empty_list_opts_out_of_the_head(adapter, tmp_path, pixel_values):
    model = wrap(adapter, modules_to_save=[])
    assert all(".hfvpt_" in name for name in trained(model))
    assert not any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    model.save_pretrained(tmp_path)
    assert all(".hfvpt_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(fresh_base(), tmp_path).eval()
    assert loaded.peft_config["default"].modules_to_save == []
    torch.testing.assert_close(output_of(loaded, pixel_values), output_of(model, pixel_values))


def test_a_model_without_labels_has_no_head(adapter, pixel_values):
    model = wrap(adapter, base=BACKBONES["vit"].build(num_labels=0))
    assert model.peft_config["default"].modules_to_save == []
    assert output_of(model, pixel_values).shape == (4, 16)


def test_a_bare_backbone_works(adapter, tmp_path, pixel_values):
    base = ViTModel(BACKBONES["vit"].build().config).eval()
    weights = copy.deepcopy(base.state_dict())
    model = wrap(adapter, base=base)
    assert model.peft_config["default"].modules_to_save == []
    expected = model(pixel_values=pixel_values).last_hidden_state
    model.save_pretrained(tmp_path)
    fresh = ViTModel(base.config).eval()  # which draws more numbers, so the adapter starts elsewhere
    fresh.load_state_dict(weights)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(loaded(pixel_values=pixel_values).last_hidden_state, expected)


def test_a_trained_head_comes_back_from_the_file(adapter, tmp_path, pixel_values):
    model = wrap(adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh_base(), tmp_path).eval()
    torch.testing.assert_close(output_of(loaded, pixel_values), output_of(model, pixel_values))
    with loaded.disable_adapter():
        assert torch.equal(output_of(loaded, pixel_values), plain_output(pixel_values))


def test_a_head_of_another_name_can_be_asked_for(adapter):
    model = wrap(adapter, modules_to_save=["layernorm"])
    assert {name for name in trained(model) if "prompts" not in name} == {
        f"base_model.model.vit.layernorm.modules_to_save.default.{tensor}" for tensor in ("weight", "bias")
    }


# Names


def test_dots_in_adapter_names_are_refused_and_leave_no_trace(adapter, pixel_values):
    model = wrap(adapter)
    expected = output_of(model, pixel_values)
    with pytest.raises(KeyError, match=r"can.*t contain"):  # by torch
        model.add_adapter("version.2", adapter.config())
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output_of(model, pixel_values), expected)


def test_names_that_are_part_of_the_prefix_warn_and_work(adapter, tmp_path, pixel_values):
    wrap(adapter).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh_base(), tmp_path).eval()
    expected = output_of(model, pixel_values)
    for name in ("pt", "prompts"):
        if name in model.base_model.prefix:
            with pytest.warns(UserWarning, match="should not be contained in the prefix"):
                model.load_adapter(tmp_path, name)
        else:
            model.load_adapter(tmp_path, name)
        model.set_adapter(name)
        torch.testing.assert_close(output_of(model.eval(), pixel_values), expected)


@pytest.mark.parametrize("name", ["default", "weight", "projector", "layers", "0", "prompts"])
def test_files_hold_no_adapter_name_and_load_under_another(name, adapter, tmp_path, pixel_values):
    base = BACKBONES["vit"].build()
    model = get_peft_model(base, adapter.config(), adapter_name=name).eval()
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    default = get_peft_model_state_dict(wrap(adapter))
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == default.keys()
    loaded = PeftModel.from_pretrained(fresh_base(), folder, adapter_name="other").eval()
    torch.testing.assert_close(output_of(loaded, pixel_values), output_of(model, pixel_values))


# Injection


def test_adapters_are_injected_without_a_peft_model(adapter, pixel_values):
    model = inject_adapter_in_model(adapter.config(), BACKBONES["vit"].build()).eval()
    assert not torch.equal(output_of(model, pixel_values), plain_output(pixel_values))
    state = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(adapter.config(), fresh_base(), state_dict=state).eval()
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(output_of(other, pixel_values), output_of(model, pixel_values))


def test_one_config_serves_several_models(adapter):
    config = adapter.config()
    before = config.to_dict()
    for layers in (2, 4):
        model = get_peft_model(BACKBONES["vit"].build(num_hidden_layers=layers), config)
        assert model.base_model.peft_config["default"].num_layers == layers
    before["base_model_name_or_path"] = config.base_model_name_or_path  # PEFT's own
    assert config.to_dict() == before


def test_an_unknown_family_is_refused_with_the_known_ones(adapter):
    base = BACKBONES["vit"].build()
    base.config.model_type = "convnext"
    with pytest.raises(ValueError, match=r"'convnext'.*deit, dinov2, dinov2_with_registers, .*swin, .*vit, vit_mae"):
        get_peft_model(base, adapter.config())
    assert not any(isinstance(module, PromptedBlock) for module in base.modules())


@pytest.mark.parametrize(
    ("name", "found", "made_for"), [("token_dim", 16, 32), ("num_layers", 3, 4)], ids=["width", "depth"]
)
def test_an_adapter_of_another_shape_is_refused_with_both_sides(name, found, made_for, adapter, pixel_values):
    base = BACKBONES["vit"].build()
    modules = list(base.modules())
    pattern = rf"Found a model with {name}={found} and an adapter made for {name}={made_for}"
    with pytest.raises(ValueError, match=pattern):
        get_peft_model(base, adapter.config(**{name: made_for}))
    assert all(a is b for a, b in zip(base.modules(), modules, strict=True))
    model = wrap(adapter)
    expected = output_of(model, pixel_values)
    with pytest.raises(ValueError, match=pattern):
        model.add_adapter("second", adapter.config(**{name: made_for}))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output_of(model, pixel_values), expected)


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["nothing"]}, {"target_modules": "layers.0"}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_config_that_does_not_fit_the_model_leaves_it_alone(settings, adapter):
    base = BACKBONES["vit"].build()
    modules = list(base.modules())
    with pytest.raises(ValueError, match=rf"{next(iter(settings))} is .* must be"):
        get_peft_model(base, adapter.config(**settings))
    assert all(a is b for a, b in zip(base.modules(), modules, strict=True))
    assert not hasattr(base, "peft_config")


def test_another_method_beside_the_first_is_refused():
    model = wrap(ADAPTERS["vpt_deep"])
    for config in (ADAPTERS["bpt_deep"].config(), LoraConfig(target_modules=["q_proj"])):
        with pytest.raises(ValueError, match="different peft types"):
            model.add_adapter("second", config)
    assert list(model.peft_config) == ["default"]


# Hidden states, attentions and attention functions


@pytest.mark.parametrize("looked_before", [False, True])
def test_outputs_have_the_shapes_a_user_knows(looked_before, adapter, pixel_values):
    base = BACKBONES["vit"].build(attn_implementation="eager")
    expected = base(pixel_values, output_hidden_states=True) if looked_before else None
    model = wrap(adapter, base=base)
    for _ in range(2):
        output = model(pixel_values=pixel_values, output_hidden_states=True, output_attentions=True)
        assert [state.shape for state in output.hidden_states] == [(4, 7, 16)] * 4
        # Prompt columns stand last, those of shallow prompts among the tokens; only those have rows.
        rows = 7 if model.peft_config["default"].deep else 9
        assert [attention.shape for attention in output.attentions] == [(4, 2, rows, 9)] * 3
        for attention in output.attentions:
            torch.testing.assert_close(attention.sum(-1), torch.ones(4, 2, rows))
        torch.testing.assert_close(output.logits, output_of(model, pixel_values))
    if looked_before:
        assert torch.equal(output.hidden_states[0], expected.hidden_states[0])
    with model.disable_adapter():
        bare = model(pixel_values=pixel_values, output_hidden_states=True, output_attentions=True)
    assert bare.attentions[0].shape == (4, 2, 7, 7) and len(bare.hidden_states) == 4


def test_changing_the_attention_implementation_keeps_the_prompts(adapter, pixel_values):
    model = wrap(adapter)
    expected = output_of(model, pixel_values)
    for implementation in ("eager", "sdpa", "eager"):
        model.get_base_model().set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        torch.testing.assert_close(output_of(model, pixel_values), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(output_of(model, pixel_values), plain_output(pixel_values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DEEP)
def test_a_custom_attention_function_sees_the_real_name_and_the_prompts(name, pixel_values):
    seen = []

    def custom(module, query, key, *args, **kwargs):
        seen.append((module.config._attn_implementation, query.shape[2], key.shape[2], module.is_causal))
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    AttentionInterface.register("custom_attention", custom)
    model = wrap(ADAPTERS[name])
    expected = output_of(model, pixel_values)
    model.get_base_model().set_attn_implementation("custom_attention")
    torch.testing.assert_close(output_of(model, pixel_values), expected)
    assert seen == [("custom_attention", 7, 9, False)] * 3


def test_the_config_of_the_model_never_names_our_function(adapter, tmp_path):
    model = wrap(adapter)
    assert "hfvpt" not in str(model.config) and model.config._attn_implementation == "sdpa"
    assert isinstance(model.base_model.prompted_blocks()[0].attention.config, PromptedAttentionConfig)
    model.get_base_model().config.save_pretrained(tmp_path)
    assert "hfvpt" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", DEEP)
def test_prompts_that_do_not_reach_attention_are_an_error(name, pixel_values):
    model = wrap(ADAPTERS[name])
    expected = output_of(model, pixel_values)
    attention = model.base_model.prompted_blocks()[1].attention
    attention.config = model.config
    with pytest.raises(RuntimeError, match=r"prompts of block 1 did not reach the attention .*set_insertion\('tokens"):
        output_of(model, pixel_values)
    model.base_model.set_insertion("tokens")
    torch.testing.assert_close(output_of(model, pixel_values), expected)


# Gradients


@pytest.mark.parametrize("name", DEEP)
def test_reentrant_checkpointing_is_refused_for_deep_prompts(name, pixel_values):
    model = wrap(ADAPTERS[name]).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=r"reentrant.*use_reentrant': False"):
        output_of(model, pixel_values)
    with torch.no_grad():
        output_of(model.eval(), pixel_values)


def test_reentrant_checkpointing_keeps_the_gradients_of_shallow_prompts(pixel_values):
    gradients = []
    for checkpointing in (False, True):
        model = wrap(ADAPTERS["vpt_shallow"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        output_of(model, pixel_values).square().mean().backward()
        gradients.append(model.base_model.prompts()[0].prompt_embeddings.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forward_passes_before_one_backward_give_the_right_gradients(checkpointing, adapter, pixel_values):
    model = wrap(adapter, prompt_dropout=0.0).double()
    if adapter.method == "vapt":
        model = wrap(adapter, prompt_dropout=0.0, channel_dropout=0.0, projector_dropout=0.0).double()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    images = pixel_values.double()
    losses = [output_of(model, batch).square().mean() for batch in (images[:1], images[1:])]
    sum(losses).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for batch in (images[:1], images[1:]):
        output_of(model, batch).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(together[name], parameter.grad, msg=name)


# Adapter of each image


def test_adapter_names_leave_no_hooks_behind_even_when_the_forward_raises(adapter, pixel_values):
    model = wrap_two(adapter)
    hooks = hooks_of(model)
    names = ["default", "second", "__base__", "default"]
    output_of(model, pixel_values, adapter_names=names)
    assert hooks_of(model) == hooks
    with pytest.raises((RuntimeError, ValueError)):
        model(pixel_values=torch.zeros(4, 3, 7, 7), adapter_names=names)
    assert hooks_of(model) == hooks
    assert output_of(model, pixel_values).isfinite().all()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default"] * 3, r"but got 3 and 4 respectively"),
        (
            ["default", "other", "__base__", "third"],
            r"non-existing adapter\(s\): other, third\. .* has default, second",
        ),
    ],
    ids=["length", "name"],
)
def test_wrong_adapter_names_are_refused(names, message, adapter, pixel_values):
    model = wrap_two(adapter)
    with pytest.raises(ValueError, match=message):
        output_of(model, pixel_values, adapter_names=names)


def test_adapter_names_are_for_inference(adapter, pixel_values):
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        output_of(wrap(adapter).train(), pixel_values, adapter_names=["default"] * 4)


# Distribution


def test_accelerate_prepares_and_trains_a_model(adapter, pixel_values):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    try:
        accelerator = Accelerator(cpu=True)
        model = wrap(adapter).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        before = copy.deepcopy(own_tensors(model, "default"))
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.backward(output_of(model, pixel_values).square().mean())
        optimizer.step()
        assert isinstance(accelerator.unwrap_model(model), PeftModel)
        after = own_tensors(model, "default")
        assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    finally:  # the state is one for the whole process
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_sharded_model_gives_the_same_logits_and_gradients(adapter, pixel_values, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = wrap(adapter)
    expected = output_of(model, pixel_values)
    mesh = init_device_mesh("cpu", (1,))
    # What blocks share has to be a unit of its own: FSDP frees a block's tensors as soon as the block has run.
    shared = [
        module
        for block in model.base_model.prompted_blocks()
        for name, module in block.prompts.named_modules()
        if name in ("default.projection", "default.projector")
    ]
    for module in (*shared, *model.base_model.prompted_blocks(), model):
        fully_shard(module, mesh=mesh)
    output = output_of(model, pixel_values)
    torch.testing.assert_close(output, expected)
    output.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_embeddings_have_no_dropout_in_a_model_without_a_tuner(pixel_values):
    model = inject_adapter_in_model(ADAPTERS["vpt_deep"].config(), BACKBONES["vit"].build()).train()
    assert torch.equal(output_of(model, pixel_values), output_of(model, pixel_values))


def test_blocks_that_are_wrapped_later_take_the_same_way_in():
    model = get_peft_model(BACKBONES["vit"].build(), ADAPTERS["vpt_deep"].config(layers_to_transform=[0]))
    model.base_model.set_insertion("tokens")
    model.add_adapter("all", ADAPTERS["vpt_deep"].config())
    assert [block.insertion for block in model.base_model.prompted_blocks()] == ["tokens"] * 3


def test_a_compiled_model_notices_prompts_that_cannot_arrive(pixel_values):
    model = get_peft_model(BACKBONES["vit"].build(), ADAPTERS["vpt_deep"].config()).eval()
    attention = model.base_model.prompted_blocks()[1].attention
    attention.config = attention.config.unprompted
    torch.compiler.reset()
    with pytest.raises(Exception, match="did not reach the attention"):
        torch.compile(model, backend="eager")(pixel_values=pixel_values)


def test_an_adapter_without_a_head_cannot_share_a_batch_with_one_that_has_a_head(pixel_values):
    model = get_peft_model(BACKBONES["vit"].build(), ADAPTERS["vpt_deep"].config()).eval()
    model.add_adapter("headless", ADAPTERS["vpt_deep"].config(modules_to_save=[]))
    with pytest.raises(ValueError, match=r"without a head.*headless"):
        model(pixel_values=pixel_values, adapter_names=["headless", "default", "default", "default"])
