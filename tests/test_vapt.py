"""VAPT makes the prompts that its paper says, from the image, and refuses images it was not made for."""

import copy

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, GRID, output_of
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_vpt import VAPTConfig
from hf_vpt.tuners.base import BlockLayout
from hf_vpt.tuners.vapt import AdaptivePrompts
from hf_vpt.tuners.vapt.prompts import GridPooling


VIT = BACKBONES["vit"]
ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * torch.special.ndtr(x),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "softmax": lambda x: x.exp() / x.exp().sum(dim=-1, keepdim=True),
    "identity": lambda x: x,
}
VARIANTS = {
    "published": {},
    "linear pooling": {"pooling": "linear"},
    "a kernel for each channel": {"shared_kernel": False},
    "padding": {"padding": 1},
    "padding, a kernel for each channel": {"padding": 1, "shared_kernel": False},
    "large kernel, padding": {"kernel_size": 3, "padding": 2},
    "kernel of one patch": {"kernel_size": 1},
    "own projectors": {"shared_projector": False},
    "gelu": {"projector_activation": "gelu"},
    "sigmoid": {"projector_activation": "sigmoid"},
    "softmax": {"projector_activation": "softmax"},
    "identity": {"projector_activation": "identity"},
    "learned scale": {"learnable_scale": True},
    "learned scale, own projectors": {"learnable_scale": True, "shared_projector": False},
    "no static blocks": {"num_static_layers": 0},
    "two static blocks": {"num_static_layers": 2},
    "static blocks only": {"num_static_layers": 3},
    "last two blocks": {"layers_to_transform": [-2, -1]},
    "last two blocks, no static ones": {"layers_to_transform": [-2, -1], "num_static_layers": 0},
}


def prompted(model: nn.Module, **settings) -> nn.Module:
    """The model with an adapter whose every tensor is random."""
    torch.manual_seed(2)
    settings = {"num_virtual_tokens": 3, "projector_dim": 4, "grid": GRID, "init_weights": False} | settings
    model = get_peft_model(model, VAPTConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Of order one: with one tenth everywhere, what a projector adds would vanish beside its input.
            if "hfvpt_vapt_" in name:
                parameter.normal_()
    return model


def convolve(maps: torch.Tensor, kernel: torch.Tensor, padding: int) -> torch.Tensor:
    """Depth-wise convolution `(B, D, h, w)` with `(1|D, k, k)`, one shifted copy of the map for each entry."""
    maps = nn.functional.pad(maps, (padding,) * 4)
    size = kernel.shape[-1]
    height, width = maps.shape[2] - size + 1, maps.shape[3] - size + 1
    return sum(
        kernel[:, row, column, None, None] * maps[:, :, row : row + height, column : column + width]
        for row in range(size)
        for column in range(size)
    )


def prompts_by_the_paper(prompts, projector, hidden: torch.Tensor, config: VAPTConfig) -> torch.Tensor:
    """Steps 1 to 4 of the method on the feature map itself, `(B, N, D)`."""
    patches = hidden[:, -GRID[0] * GRID[1] :]
    deviation = (patches.var(dim=-1, correction=0, keepdim=True) + 1e-5).sqrt()
    patches = (patches - patches.mean(dim=-1, keepdim=True)) / deviation * prompts.norm.weight + prompts.norm.bias
    maps = patches.transpose(1, 2).reshape(len(hidden), -1, *GRID)
    if config.pooling == "conv":
        maps = convolve(maps, prompts.pooling.kernel[:, 0], config.padding)
    pooled = nn.functional.linear(maps.flatten(2), prompts.pooling.mix.weight, prompts.pooling.mix.bias)
    pooled = pooled.transpose(1, 2)
    features = ACTIVATIONS[config.projector_activation](pooled @ projector.down.weight.T)
    scale = projector.scale if config.learnable_scale else 1
    return pooled + scale * features @ projector.up.weight.T


def run_by_the_paper(model: nn.Module, bare: nn.Module, config: VAPTConfig, pixel_values) -> torch.Tensor:
    """Logits of a bare ViT whose blocks run on the prompts they make, concatenated as tokens."""
    prompts, first_projector = model.base_model.prompts(), None
    hidden = bare.vit.embeddings(pixel_values)
    for index, block in enumerate(bare.vit.layers):
        if index not in prompts:
            hidden = block(hidden)
            continue
        if list(prompts).index(index) < config.num_static_layers:
            made = prompts[index].prompt_embeddings.expand(len(hidden), -1, -1)
        else:
            first_projector = first_projector or prompts[index].projector
            projector = first_projector if config.shared_projector else prompts[index].projector
            made = prompts_by_the_paper(prompts[index], projector, hidden, config)
        hidden = block(torch.cat([hidden[:, :1], made, hidden[:, 1:]], dim=1))
        hidden = torch.cat([hidden[:, :1], hidden[:, 1 + made.shape[1] :]], dim=1)
    return bare.classifier(bare.vit.layernorm(hidden)[:, 0])


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_equals_a_loop_written_from_the_paper(settings, pixel_values):
    model, bare = prompted(VIT.build(), **settings), VIT.build()
    config = model.peft_config["default"]
    found = output_of(model, pixel_values)
    torch.testing.assert_close(found, run_by_the_paper(model, bare, config, pixel_values), rtol=1e-4, atol=1e-4)
    assert (found - output_of(bare, pixel_values)).abs().max() > 1e-2, "the prompts changed nothing"


@pytest.mark.parametrize("shared_projector", [True, False])
@pytest.mark.parametrize("num_static_layers", [0, 1, 2, 3])
def test_first_blocks_are_static_and_projectors_are_shared_or_not(num_static_layers, shared_projector):
    model = prompted(VIT.build(), num_static_layers=num_static_layers, shared_projector=shared_projector)
    adaptive = [isinstance(prompts, AdaptivePrompts) for prompts in model.base_model.prompts().values()]
    assert adaptive == [index >= num_static_layers for index in range(3)]
    weights = [name for name, _ in model.named_parameters() if name.endswith("projector.down.weight")]
    assert len(weights) == (min(sum(adaptive), 1) if shared_projector else sum(adaptive))


@pytest.mark.parametrize(
    "settings",
    [{}, {"padding": 1}, {"kernel_size": 3, "padding": 1}, {"pooling": "linear"}, {"shared_kernel": False}],
    ids=str,
)
@pytest.mark.parametrize("channel_dropout", [0.0, 0.5])
def test_folded_pooling_equals_convolution_dropout_and_mixing_in_turn(settings, channel_dropout):
    config = VAPTConfig(num_virtual_tokens=3, grid=GRID, token_dim=16, channel_dropout=channel_dropout, **settings)
    torch.manual_seed(0)
    pooling = GridPooling(config, BlockLayout(0, 0, config.token_dim)).train()
    for parameter in pooling.parameters():
        nn.init.normal_(parameter)
    patches = torch.randn(4, 6, 16)

    torch.manual_seed(1)
    found = pooling(patches)

    maps = patches.transpose(1, 2).reshape(4, 16, *GRID)
    if config.pooling == "conv":
        kernel = pooling.kernel.expand(16, -1, -1, -1)
        maps = nn.functional.conv2d(maps, kernel, padding=config.padding, groups=16)
    torch.manual_seed(1)
    maps = nn.functional.dropout2d(maps, channel_dropout, training=True)
    torch.testing.assert_close(found, pooling.mix(maps.flatten(2)).transpose(1, 2), rtol=1e-4, atol=1e-5)
    probe = torch.randn(4, 3, 16)
    gradients = torch.autograd.grad((found * probe).sum(), list(pooling.parameters()))
    expected = torch.autograd.grad(
        (pooling.mix(maps.flatten(2)).transpose(1, 2) * probe).sum(), list(pooling.parameters())
    )
    for (name, _), gradient, other in zip(pooling.named_parameters(), gradients, expected):
        torch.testing.assert_close(
            gradient, other, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("num_virtual_tokens", [1, 3, 16])
def test_channel_dropout_takes_whole_channels_from_all_prompts_of_an_image(num_virtual_tokens):
    # Regression: the folded pooling dropped along the prompts, and failed unless there were as many as channels.
    config = VAPTConfig(num_virtual_tokens=num_virtual_tokens, grid=GRID, token_dim=16, channel_dropout=0.5)
    torch.manual_seed(0)
    pooling = GridPooling(config, BlockLayout(0, 0, config.token_dim)).train()
    nn.init.normal_(pooling.mix.weight)
    found = pooling(torch.randn(8, 6, 16))
    assert found.shape == (8, num_virtual_tokens, 16)
    dropped = found == 0
    assert (dropped == dropped[:, :1]).all(), "a channel is dropped from some prompts only"
    assert 0.3 < dropped.float().mean() < 0.7
    assert (dropped[0] != dropped[1]).any(), "two images share their dropout"


def test_a_training_step_with_the_published_dropouts_moves_every_tensor(pixel_values):
    model = prompted(VIT.build()).train()
    assert model.peft_config["default"].channel_dropout == model.peft_config["default"].projector_dropout == 0.1
    model(pixel_values=pixel_values, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    still = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().max() > 0]
    assert not still


def test_adaptive_prompts_are_zero_at_the_start():
    prompts = get_peft_model(VIT.build(), VAPTConfig(num_virtual_tokens=3)).base_model.prompts()
    assert prompts[0].prompt_embeddings.abs().max() > 0
    for index in (1, 2):
        assert torch.equal(prompts[index](torch.randn(4, 7, 16)), torch.zeros(4, 3, 16)), f"block {index}"


def test_initial_kernels_are_standard_normal():
    torch.manual_seed(0)
    config = VAPTConfig(shared_kernel=False, kernel_size=10, padding=9, grid=GRID, token_dim=100)
    kernel = GridPooling(config, BlockLayout(0, 0, config.token_dim)).kernel
    assert kernel.shape == (100, 1, 10, 10)
    assert abs(kernel.mean()) < 0.05
    assert kernel.std().item() == pytest.approx(1, rel=0.05)


def test_prompts_of_an_image_do_not_depend_on_its_batch_mates(pixel_values):
    model = prompted(VIT.build())
    together = output_of(model, pixel_values)
    alone = torch.cat([output_of(model, image[None]) for image in pixel_values])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    prompts, hidden = model.base_model.prompts()[1], torch.randn(4, 7, 16)
    torch.testing.assert_close(prompts(hidden)[2:3], prompts(hidden[2:3]), rtol=1e-4, atol=1e-5)


def test_prompts_follow_the_patches_of_the_image_and_not_its_prefix():
    prompts, hidden = prompted(VIT.build()).base_model.prompts()[1], torch.randn(2, 7, 16)
    other_prefix, other_patch = hidden.clone(), hidden.clone()
    other_prefix[:, 0] += 1
    other_patch[:, 4] += torch.randn(16)
    assert torch.equal(prompts(hidden), prompts(other_prefix))
    assert (prompts(hidden) - prompts(other_patch)).abs().max() > 1e-3


@pytest.mark.parametrize("num_virtual_tokens", [1, 3])
def test_rows_and_columns_of_the_grid_are_not_mixed_up(num_virtual_tokens):
    """Mixing weights that pick one position of the pooled map give the kernel's window at that position."""
    config = VAPTConfig(num_virtual_tokens=num_virtual_tokens, grid=[3, 4], token_dim=2)
    pooling = GridPooling(config, BlockLayout(0, 0, config.token_dim)).eval()
    patches = torch.arange(12.0)[None, :, None] * torch.tensor([1.0, 100.0])
    with torch.no_grad():
        pooling.kernel.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]])[None, None])
        pooling.mix.weight[0, 1 * 3 + 2] = 1  # second row, third column of the 2 × 3 positions
    # Patch (1, 2) minus patch (2, 3) of a map that counts by rows of four.
    torch.testing.assert_close(pooling(patches)[0, 0], torch.tensor([1.0, 100.0]) * (6 - 11))


def test_another_number_of_patches_is_refused_with_both_grids():
    model = prompted(BACKBONES["dinov2"].build())
    with pytest.raises(ValueError, match=r"image of 3 × 3 patches.*made for 2 × 3"):
        model(pixel_values=torch.randn(1, 3, 48, 48))


def test_another_grid_of_as_many_patches_is_refused_with_both_grids():
    model = prompted(BACKBONES["dinov2"].build())
    model(pixel_values=torch.randn(1, 3, 32, 48))
    with pytest.raises(ValueError, match=r"image of 3 × 2 patches.*made for 2 × 3"):
        model(pixel_values=torch.randn(1, 3, 48, 32))


def test_interpolated_positions_do_not_hide_another_grid():
    model = prompted(VIT.build(image_size=64), grid=[2, 8])
    assert model(pixel_values=torch.randn(1, 3, 32, 128), interpolate_pos_encoding=True).logits.shape == (1, 5)
    with pytest.raises(ValueError, match=r"image of 8 × 2 patches.*made for 2 × 8"):
        model(pixel_values=torch.randn(1, 3, 128, 32), interpolate_pos_encoding=True)


def test_a_copied_model_refuses_another_grid_too():
    model = copy.deepcopy(prompted(BACKBONES["dinov2"].build()))
    with pytest.raises(ValueError, match=r"3 × 2"):
        model(pixel_values=torch.randn(1, 3, 48, 32))


def test_other_grids_are_welcome_while_the_adapter_is_off():
    backbone = BACKBONES["dinov2"]
    model, image = prompted(backbone.build()), torch.randn(1, 3, 48, 32)
    with model.disable_adapter():
        torch.testing.assert_close(output_of(model, image), output_of(backbone.build(), image), rtol=0, atol=0)
    torch.testing.assert_close(output_of(model.unload(), image), output_of(backbone.build(), image), rtol=0, atol=0)


def test_block_inputs_of_another_length_are_refused():
    prompts = prompted(VIT.build()).base_model.prompts()[1]
    with pytest.raises(ValueError, match=r"Found 5 patches.*2 × 3, 6 patches"):
        prompts(torch.randn(1, 6, 16))


def test_the_grid_is_the_models_own_if_left_out():
    model = prompted(VIT.build(), grid=None)
    assert model.peft_config["default"].grid == GRID


def test_a_kernel_that_does_not_fit_into_the_models_grid_is_refused():
    with pytest.raises(ValueError, match=r"VAPTConfig.kernel_size is 3"):
        get_peft_model(VIT.build(), VAPTConfig(kernel_size=3))


@pytest.mark.parametrize(("layers", "num_blocks"), [(None, 3), ([0, 2], 2)])
def test_more_static_blocks_than_there_are_is_refused(layers, num_blocks):
    with pytest.raises(ValueError, match=rf"VAPTConfig.num_static_layers is 4\. .*{num_blocks}"):
        get_peft_model(VIT.build(), VAPTConfig(num_static_layers=4, layers_to_transform=layers))


def test_an_mae_that_hides_patches_is_refused():
    model = BACKBONES["vit_mae"].build(mask_ratio=0.75)
    with pytest.raises(ValueError, match=r"hides 75% of the patches"):
        get_peft_model(model, VAPTConfig())


def test_the_random_order_of_an_mae_makes_no_difference(pixel_values):
    model = prompted(BACKBONES["vit_mae"].build())

    def patches_in_order(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        output = model(pixel_values=pixel_values)
        ids = output.ids_restore[..., None].expand(-1, -1, 16)
        return torch.cat([output.last_hidden_state[:, :1], output.last_hidden_state[:, 1:].gather(1, ids)], dim=1)

    torch.testing.assert_close(patches_in_order(1), patches_in_order(2), rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        torch.manual_seed(1)
        orders = [model(pixel_values=pixel_values).ids_restore for _ in range(2)]
    assert not torch.equal(*orders), "the bare model draws no order, so this test proves nothing"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 55_608),
        ({"pooling": "linear"}, 7_680 + 11 * (1_536 + 196 * 10 + 10) + 12_288),
        ({"shared_kernel": False}, 55_608 + 11 * 4 * 767),
        ({"shared_projector": False}, 55_608 + 10 * 12_288),
        ({"learnable_scale": True}, 55_609),
        ({"kernel_size": 3, "padding": 1}, 7_680 + 11 * (1_536 + 9 + 1_970) + 12_288),
    ],
    ids=str,
)
def test_a_vit_b_tunes_as_many_numbers_as_the_formula_says(settings, expected):
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig())
    model = get_peft_model(model, VAPTConfig(num_virtual_tokens=10, modules_to_save=[], **settings))
    assert model.get_nb_trainable_parameters()[0] == expected


def test_the_grids_of_the_adapters_that_a_batch_names_are_checked(pixel_values):
    model = prompted(VIT.build(image_size=48), grid=[3, 3])
    model.add_adapter("wide", ADAPTERS["vapt"].config(grid=[2, 3]))
    model.eval()
    images = torch.randn(2, 3, 48, 48)
    assert model(pixel_values=images, adapter_names=["default", "__base__"]).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"3 × 3 patches.* made for 2 × 3"):
        model(pixel_values=images, adapter_names=["default", "wide"])
    model.set_adapter("wide")
    assert model(pixel_values=images, adapter_names=["default", "__base__"]).logits.isfinite().all()


# Other grids


def area_means(patches: torch.Tensor, grid: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """Means `(B, h·w, D)` over areas of a grid: row i of the target covers rows ⌊i·H/h⌋ to ⌈(i + 1)·H/h⌉ - 1."""
    maps, made = patches.unflatten(1, grid), []
    for i in range(target[0]):
        for j in range(target[1]):
            rows = slice(i * grid[0] // target[0], -(-(i + 1) * grid[0] // target[0]))
            columns = slice(j * grid[1] // target[1], -(-(j + 1) * grid[1] // target[1]))
            made.append(maps[:, rows, columns].mean(dim=(1, 2)))
    return torch.stack(made, dim=1)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_other_grids_are_taken_to_the_adapters_by_means_over_areas(name):
    backbone = BACKBONES[name]
    settings = {"num_virtual_tokens": 3, "grid": list(backbone.grids[0]), "init_weights": False}
    torch.manual_seed(2)
    model = get_peft_model(backbone.build(**backbone.square), VAPTConfig(interpolate_grid=True, **settings)).eval()
    rows, columns = (5, 4) if name == "vit" else (13, 9)
    patch_size = model.base_model._backbone.patch_size[0]
    seen = {}
    for index, prompts in model.base_model.prompts().items():
        prompts.register_forward_hook(lambda module, args, made, index=index: seen.update({index: (*args, made)}))
    pixel_values = torch.randn(2, 3, rows * patch_size, columns * patch_size)
    assert output_of(model, pixel_values, **backbone.interpolates).isfinite().all()
    for index, prompts in list(model.base_model.prompts().items())[1:]:
        grid, (hidden, made) = (rows, columns), seen[index]
        if backbone.grids[index] != backbone.grids[0]:
            grid = (-(-rows // 2), -(-columns // 2))
        patches = prompts.norm(hidden[:, -grid[0] * grid[1] :])
        projector = (prompts._owner[0] if prompts._owner else prompts).projector
        expected = projector(prompts.pooling(area_means(patches, grid, backbone.grids[index])))
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5, msg=f"block {index}")


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_the_adapters_own_grid_is_not_touched_by_interpolation(name, pixel_values):
    found = []
    for interpolate in (True, False):
        settings = {"grid": list(BACKBONES[name].grids[0]), "interpolate_grid": interpolate}
        model = prompted(BACKBONES[name].build(), **settings)
        if interpolate and name == "swin":  # another grid before leaves nothing behind
            output_of(model, torch.randn(1, 3, 64, 80))
        found.append(output_of(model, pixel_values))
    assert torch.equal(*found)


def test_interpolate_is_short_for_the_models_grid_and_survives_json_and_files(tmp_path):
    config = VAPTConfig(grid="interpolate")
    assert (config.grid, config.interpolate_grid) == (None, True)
    backbone = BACKBONES["swin"]
    model = prompted(backbone.build(), grid="interpolate")
    assert model.peft_config["default"].grid == [8, 12]
    pixel_values = torch.randn(2, 3, 36, 52)
    expected = output_of(model, pixel_values)
    model.save_pretrained(tmp_path)
    saved = VAPTConfig.from_pretrained(tmp_path)
    assert (saved.grid, saved.interpolate_grid) == ([8, 12], True)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(backbone.build(), tmp_path).eval()
    torch.testing.assert_close(output_of(loaded, pixel_values), expected, rtol=0, atol=1e-5)


def test_without_interpolation_another_grid_is_an_error_that_names_both_and_the_way_out():
    model = prompted(BACKBONES["swin"].build(), grid=[8, 12])
    with pytest.raises(ValueError, match=r"9 × 13 patches.* made for 8 × 12.*grid='interpolate'"):
        output_of(model, torch.randn(1, 3, 33, 50))
