"""Attention maps of prompted models: what is returned, and how it splits into tokens and prompts."""

from __future__ import annotations

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, inputs_of
from peft import get_peft_model, inject_adapter_in_model

from hf_vpt import split_attentions


VIT = BACKBONES["vit"]
# timm's models refuse `output_attentions` themselves.
WITH_MAPS = [name for name in BACKBONES if BACKBONES[name].model_type != "timm_wrapper"]


def maps_of(model, pixel_values, **kwargs):
    return model(**inputs_of(model, pixel_values, output_attentions=True, **kwargs)).attentions


def config_of(adapter, num_virtual_tokens, backbone=VIT, **overrides):
    """Without a head, so that several adapters may be active at once."""
    return ADAPTERS[adapter].config(num_virtual_tokens, backbone, modules_to_save=[], **overrides)


def prompted(backbone=VIT, adapter="vpt_deep", num_virtual_tokens=2, **overrides):
    base = backbone.build(attn_implementation="eager")
    return get_peft_model(base, config_of(adapter, num_virtual_tokens, backbone, **overrides)).eval()


def check(split, base_maps, counts):
    """Shapes of the base model, the numbers of prompts that are due, and rows that sum to 1."""
    assert len(split) == len(base_maps)
    for part, base, count in zip(split, base_maps, counts, strict=True):
        assert part.tokens.shape == base.shape
        assert part.prompts.shape == (*base.shape[:-1], count)
        total = part.tokens.sum(dim=-1) + part.prompts.sum(dim=-1)
        torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("insertion", ["keys_values", "tokens"])
@pytest.mark.parametrize("name", WITH_MAPS)
def test_maps_split_into_the_base_models_shapes_and_prompts(name, adapter, insertion, pixel_values):
    backbone = BACKBONES[name]
    if adapter.is_refused(backbone) or (insertion == "tokens" and backbone.record.windows is not None):
        pytest.skip("refused by the record")
    base = backbone.build(attn_implementation="eager")
    base_maps = maps_of(base, pixel_values)
    model = get_peft_model(base, adapter.config(3, backbone)).eval()
    model.base_model.set_insertion(insertion)
    maps = maps_of(model, pixel_values)
    check(split_attentions(model, maps), base_maps, [3] * len(base_maps))
    assert maps[0].shape[:2] == base_maps[0].shape[:2]
    with model.disable_adapter():
        check(split_attentions(model, maps_of(model, pixel_values)), base_maps, [0] * len(base_maps))
    check(split_attentions(model.unload(), base_maps), base_maps, [0] * len(base_maps))


@pytest.mark.parametrize("name", WITH_MAPS)
def test_both_insertions_have_the_same_maps(name, pixel_values):
    backbone = BACKBONES[name]
    if backbone.record.windows is not None:
        pytest.skip("tokens in windows")
    model = prompted(backbone)
    model.add_adapter("shallow", config_of("vpt_shallow", 3, backbone))
    model.base_model.set_adapter(["default", "shallow"])
    model.eval()
    splits = []
    for insertion in ("keys_values", "tokens"):
        model.base_model.set_insertion(insertion)
        splits.append(split_attentions(model, maps_of(model, pixel_values)))
    for one, other in zip(*splits, strict=True):
        assert one.prompts.shape[-1] == 5
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_weights_are_the_softmax_written_out(pixel_values):
    model = prompted(num_virtual_tokens=3)
    block = model.base_model.prompted_blocks()[0]
    kept = []
    block.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    tokens, prompts = split_attentions(model, maps_of(model, pixel_values))[0]
    layer, table = block.base_layer, block.prompts["default"].prompt_embeddings
    attention = layer.attention
    states, width = layer.layernorm_before(kept[0]), attention.head_dim
    queries = attention.q_proj(states)[..., width : 2 * width]  # of the second head
    everything = torch.cat([states, layer.layernorm_before(table).expand(len(states), -1, -1)], dim=1)
    keys = attention.k_proj(everything)[..., width : 2 * width]
    expected = (queries @ keys.mT / width**0.5).softmax(dim=-1)
    torch.testing.assert_close(tokens[:, 1], expected[..., :-3])
    torch.testing.assert_close(prompts[:, 1], expected[..., -3:])


def test_prompts_of_several_adapters_stand_in_their_order_shallow_ones_first(pixel_values):
    model = prompted(num_virtual_tokens=2)
    model.add_adapter("shallow", config_of("vpt_shallow", 3))
    model.add_adapter("more", config_of("vpt_deep", 4, layers_to_transform=[1]))
    with model.disable_adapter():
        base_maps = maps_of(model.eval(), pixel_values)
    model.base_model.set_adapter(["default", "shallow", "more"])
    maps = maps_of(model.eval(), pixel_values)
    split = split_attentions(model, maps)
    check(split, base_maps, [5, 9, 5])
    # After the CLS token stand the shallow prompts, behind all tokens the deep ones.
    assert torch.equal(split[1].prompts[:, :, 0], torch.cat([maps[1][:, :, 0, 1:4], maps[1][:, :, 0, 10:]], dim=-1))


def test_blocks_without_prompts_have_the_base_models_maps(pixel_values):
    model = prompted(layers_to_transform=[1])
    split = split_attentions(model, maps_of(model, pixel_values))
    assert [part.prompts.shape[-1] for part in split] == [0, 2, 0]
    swin = prompted(BACKBONES["swin"], layers_to_transform=[1, 2])
    split = split_attentions(swin, maps_of(swin, pixel_values))
    assert [part.prompts.shape[-1] for part in split] == [2, 0]  # the last blocks of the stages are 1 and 3


@pytest.mark.parametrize("insertion", ["keys_values", "tokens"])
def test_prompts_that_moved_are_counted_where_they_are(insertion, pixel_values):
    model = prompted(adapter="provpt", num_virtual_tokens=2)
    model.base_model.set_insertion(insertion)
    pool = model.base_model.prompts()
    pool[0].move(0, 2, 1.0)
    pool[0].move(1, 2, 1.0)
    with model.disable_adapter():
        base_maps = maps_of(model, pixel_values)
    check(split_attentions(model, maps_of(model, pixel_values)), base_maps, [0, 2, 4])


@pytest.mark.parametrize("name", ["vpt_deep", "vpt_shallow"])
@pytest.mark.parametrize("backbone", ["vit", "beit", "siglip", "swin"])
def test_a_mixed_batch_has_no_weight_on_prompts_that_an_image_lacks(backbone, name, pixel_values):
    backbone = BACKBONES[backbone]
    model = prompted(backbone, name, num_virtual_tokens=2)
    model.add_adapter("second", config_of(name, 5, backbone))
    model.eval()
    with model.disable_adapter():
        base_maps = maps_of(model, pixel_values)
    names = ["second", "__base__", "default", "second"]
    split = split_attentions(model, maps_of(model, pixel_values, adapter_names=names), adapter_names=names)
    check(split, base_maps, [5] * len(base_maps))
    of_images = split[0].prompts.unflatten(0, (4, -1))
    assert (of_images[1] == 0).all()
    assert (of_images[2][..., 2:] == 0).all()
    assert (of_images[[0, 3]] > 0).all()


def test_maps_of_a_model_that_is_injected_without_a_peft_model(pixel_values):
    model = inject_adapter_in_model(ADAPTERS["vpt_deep"].config(), VIT.build(attn_implementation="eager")).eval()
    split = split_attentions(model, maps_of(model, pixel_values))
    assert [part.prompts.shape[-1] for part in split] == [2, 2, 2]


def test_maps_of_another_attention_or_state_are_an_error_that_says_what_to_do(pixel_values):
    model = prompted()
    maps = maps_of(model, pixel_values)
    with model.disable_adapter(), pytest.raises(ValueError, match="has 0 prompts behind .* before another adapter"):
        split_attentions(model, maps)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"set_attn_implementation\('eager'\)"):
        split_attentions(model, maps_of(model, pixel_values))


def test_timm_models_refuse_attention_maps_themselves(pixel_values):
    model = get_peft_model(BACKBONES["timm"].build(), ADAPTERS["vpt_deep"].config(backbone=BACKBONES["timm"]))
    with pytest.raises(ValueError, match="output_attentions"):
        maps_of(model, pixel_values)
