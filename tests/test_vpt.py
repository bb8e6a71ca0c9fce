"""VPT computes what its paper says: prompts are concatenated, run through a block, and thrown away or kept."""

import pytest
import torch
from by_hand import concatenate_run_strip, prompted, root_of, tables_of
from conftest import BACKBONES, PATCH_SIZE, output_of
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_vpt import VPTConfig


VIT = BACKBONES["vit"]


def last_hidden_state(bare: nn.Module, tables, pixel_values: torch.Tensor, deep: bool = True) -> torch.Tensor:
    """Last hidden state of a bare classifier that runs on concatenated prompts."""
    root = root_of(bare)
    return root.layernorm(concatenate_run_strip(bare, root.embeddings(pixel_values), tables, deep))


CLASSIFIERS = ["vit", "deit", "vit_msn", "dinov2", "dinov2_with_registers"]


@pytest.mark.parametrize(
    "settings", [{}, {"projection_dim": 4}, {"deep": False}], ids=["deep", "projected", "shallow"]
)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_prompts_act_as_tokens_concatenated_by_hand(name, settings, pixel_values):
    backbone = BACKBONES[name]
    model = prompted(backbone.build(), **settings)
    bare = backbone.build()
    expected = last_hidden_state(bare, tables_of(model), pixel_values, settings.get("deep", True))
    found = root_of(model.base_model.model)(pixel_values).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    without = root_of(bare)(pixel_values).last_hidden_state
    assert (found - without).abs().max() > 1e-2, "the prompts changed nothing"


@pytest.mark.parametrize("deep", [True, False])
def test_gradients_of_prompts_equal_those_of_tokens_concatenated_by_hand(deep, pixel_values):
    model, bare = prompted(VIT.build(), deep=deep), VIT.build()
    tables = {index: table.detach().clone().requires_grad_() for index, table in tables_of(model).items()}
    output_of(model, pixel_values).square().sum().backward()
    hidden = last_hidden_state(bare, tables, pixel_values, deep)
    bare.classifier(hidden[:, 0]).square().sum().backward()
    for index, prompts in model.base_model.prompts().items():
        torch.testing.assert_close(prompts.prompt_embeddings.grad, tables[index].grad, rtol=1e-4, atol=1e-5)


def test_shallow_equals_deep_in_a_model_of_one_block(pixel_values):
    deep = prompted(VIT.build(num_hidden_layers=1))
    shallow = prompted(VIT.build(num_hidden_layers=1), deep=False)
    torch.testing.assert_close(tables_of(shallow)[0], tables_of(deep)[0])
    torch.testing.assert_close(output_of(shallow, pixel_values), output_of(deep, pixel_values), rtol=1e-4, atol=1e-5)


def test_shallow_differs_from_deep_in_block_0_where_more_blocks_follow(pixel_values):
    deep, shallow = prompted(VIT.build(), layers_to_transform=[0]), prompted(VIT.build(), deep=False)
    torch.testing.assert_close(tables_of(shallow)[0], tables_of(deep)[0])
    assert (output_of(shallow, pixel_values) - output_of(deep, pixel_values)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("layers", "expected"),
    [([0, 1], [0, 1]), (list(range(-2, 0)), [1, 2]), ([-1, 0], [0, 2]), (1, [1]), ((0, 1, 2), [0, 1, 2])],
)
def test_only_the_chosen_blocks_get_prompts(layers, expected, pixel_values):
    model = prompted(VIT.build(), layers_to_transform=layers)
    tables = tables_of(model)
    assert list(tables) == expected
    hidden = last_hidden_state(VIT.build(), tables, pixel_values)
    found = model.base_model.model.vit(pixel_values).last_hidden_state
    torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-5)
    assert model.peft_config["default"].layers_to_transform == expected, "the config does not say what was done"


@pytest.mark.parametrize("layers", [[3], [-4], [0, -3]])
def test_blocks_that_the_model_does_not_have_are_refused_before_anything_changes(layers):
    model = VIT.build()
    with pytest.raises(ValueError, match="VPTConfig.layers_to_transform is"):
        get_peft_model(model, VPTConfig(layers_to_transform=layers))
    assert type(model.vit.layers[0]).__name__ == "ViTLayer"


def test_the_projection_is_one_layer_for_all_blocks():
    model = prompted(VIT.build(), projection_dim=4, modules_to_save=[])
    saved = get_peft_model_state_dict(model)
    assert sum("projection" in key for key in saved) == 2, sorted(saved)
    assert sum(tensor.numel() for tensor in saved.values()) == 3 * 3 * 4 + 4 * 16 + 16
    assert model.get_nb_trainable_parameters()[0] == 3 * 3 * 4 + 4 * 16 + 16


def test_the_projection_learns_from_all_blocks(pixel_values):
    model = prompted(VIT.build(), projection_dim=4, modules_to_save=[])
    projection = model.base_model.prompts()[0].projection
    output_of(model, pixel_values).square().sum().backward()
    tables = {index: p.prompt_embeddings.detach() for index, p in model.base_model.prompts().items()}
    bare, total = VIT.build(), torch.zeros_like(projection.weight)
    made = {i: (t @ projection.weight.T + projection.bias).detach().requires_grad_() for i, t in tables.items()}
    hidden = last_hidden_state(bare, made, pixel_values)
    bare.classifier(hidden[:, 0]).square().sum().backward()
    for index, table in tables.items():
        assert made[index].grad.abs().max() > 0, f"block {index} does not count"
        total += made[index].grad.T @ table
    torch.testing.assert_close(projection.weight.grad, total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size", [(16, 16), (8, 16)])
@pytest.mark.parametrize("width", [None, 4])
def test_initial_prompts_fill_the_published_interval(patch_size, width):
    model = VIT.build(patch_size=patch_size)
    torch.manual_seed(0)
    tuner = get_peft_model(model, VPTConfig(num_virtual_tokens=400, projection_dim=width)).base_model
    bound = (6 / (3 * patch_size[0] * patch_size[1] + (width or 16))) ** 0.5
    for index, prompts in tuner.prompts().items():
        values = prompts.prompt_embeddings.detach()
        assert values.abs().max() <= bound, f"block {index}"
        assert values.abs().max() > 0.99 * bound, f"block {index}"
        # The standard deviation of a uniform distribution is its half width divided by sqrt(3).
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05), f"block {index}"
        assert abs(values.mean()) < 0.05 * bound, f"block {index}"


def test_initial_prompts_of_two_blocks_differ():
    prompts = get_peft_model(VIT.build(), VPTConfig()).base_model.prompts()
    assert not torch.equal(prompts[0].prompt_embeddings, prompts[1].prompt_embeddings)


def test_the_initial_projection_is_kaiming_normal_by_fan_out():
    torch.manual_seed(0)
    weight = get_peft_model(VIT.build(), VPTConfig(projection_dim=400)).base_model.prompts()[0].projection.weight
    assert weight.std().item() == pytest.approx((2 / 16) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    "settings", [{}, {"deep": False}, {"projection_dim": 4}], ids=["deep", "shallow", "projected"]
)
def test_dropout_is_drawn_for_each_image_and_only_while_training(settings, pixel_values):
    model = prompted(VIT.build(), prompt_dropout=0.5, **settings)
    twins = pixel_values[:1].repeat(2, 1, 1, 1)
    first, second = output_of(model, twins)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    first, second = output_of(model.train(), twins)
    assert (first - second).abs().max() > 1e-3


def test_dropout_zeroes_elements_and_scales_the_others_up(pixel_values):
    prompts = prompted(VIT.build(), num_virtual_tokens=50, prompt_dropout=0.25).train().base_model.prompts()[0]
    dropped = prompts(torch.zeros(6, 7, 16))
    assert dropped.shape == (6, 50, 16)
    factors = dropped / prompts.prompt_embeddings
    kept = factors != 0
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / 0.75))
    assert kept.float().mean() == pytest.approx(0.75, abs=0.05)


def test_prompts_do_not_depend_on_the_image():
    prompts = prompted(VIT.build(), prompt_dropout=0.5).base_model.prompts()[1]
    found = [prompts(torch.randn(batch_size, 7, 16)) for batch_size in (1, 4)]
    assert found[1].shape == (1, 3, 16), "made once for the whole batch"
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_virtual_tokens": 50}, 460_800),
        ({"num_virtual_tokens": 50, "deep": False}, 38_400),
        ({"num_virtual_tokens": 10}, 92_160),
        ({"num_virtual_tokens": 10, "projection_dim": 64}, 12 * 10 * 64 + 64 * 768 + 768),
    ],
)
def test_a_vit_b_tunes_as_many_numbers_as_the_paper_says(settings, expected):
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig())
    model = get_peft_model(model, VPTConfig(modules_to_save=[], **settings))
    assert model.get_nb_trainable_parameters()[0] == expected


def test_the_patch_size_of_the_tiny_models_is_the_one_of_the_formula():
    assert prompted(VIT.build()).base_model._backbone.patch_size == (PATCH_SIZE, PATCH_SIZE)
