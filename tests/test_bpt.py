"""BPT multiplies its two factors, and whitens the basis as its paper says, from the inputs of the bare backbone."""

import copy

import pytest
import torch
from conftest import BACKBONES, IMAGE_SIZE, output_of
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_vpt import BPTConfig, VPTConfig, initialize_whitening
from hf_vpt.tuners.bpt import WhiteningStatistics, whitening_matrix


VIT = BACKBONES["vit"]
WHITENED = ["fwhiten", "twhiten"]


def prompted(model: nn.Module | None = None, **settings) -> nn.Module:
    """A tiny ViT with random factors of rank 4; factors as they are made with `init_weights=True`."""
    torch.manual_seed(2)
    settings = {"num_virtual_tokens": 3, "rank": 4, "init_weights": False} | settings
    return get_peft_model(VIT.build() if model is None else model, BPTConfig(**settings)).eval()


def images(count: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, *IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def block_inputs(model: nn.Module, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """What each block of a bare model gets, `(B, T, D)`, by a hook on each."""
    found = []
    handles = [layer.register_forward_pre_hook(lambda _, args: found.append(args[0])) for layer in model.vit.layers]
    with torch.no_grad():
        model(pixel_values)
    for handle in handles:
        handle.remove()
    return found


def covariance_by_the_paper(query, key, inputs: torch.Tensor, estimate: str) -> torch.Tensor:
    """The formula, one image and, for all tokens, one token at a time."""
    query, key, inputs = query.detach().double(), key.detach().double(), inputs.double()
    width = query.shape[0]
    if estimate == "image_mean":
        mean = sum(query @ key.T @ image.T for image in inputs) / len(inputs)
        return mean @ mean.T / width
    total = torch.zeros(width, width, dtype=torch.float64)
    for image in inputs:
        for token in image:
            mapped = query @ (key.T @ token)
            total += torch.outer(mapped, mapped)
    return total / len(inputs) / width


def inverse_root(covariance: torch.Tensor, floor: float) -> torch.Tensor:
    """The inverse square root of a symmetric matrix by its eigenvalues, the small ones raised."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors @ torch.diag(values.clamp(min=floor * values.max()) ** -0.5) @ vectors.T


def tensors_of(model: nn.Module, adapter_name: str) -> list[torch.Tensor]:
    prompts = model.base_model.prompts(adapter_name).values()
    return [tensor.clone() for p in prompts for tensor in p.state_dict().values()]


# Prompts


@pytest.mark.parametrize("basis", ["bilinear", *WHITENED])
@pytest.mark.parametrize("deep", [True, False])
def test_prompts_are_the_product_of_their_factors(deep, basis, pixel_values):
    model = prompted(deep=deep, basis=basis)
    vpt = get_peft_model(VIT.build(), VPTConfig(num_virtual_tokens=3, deep=deep)).eval()
    assert list(model.base_model.prompts()) == ([0, 1, 2] if deep else [0])
    for index, prompts in model.base_model.prompts().items():
        factors, columns = prompts.factor_prompts.detach(), prompts.factor_basis.detach()
        product = sum(torch.outer(factors[:, r], columns[:, r]) for r in range(4))
        torch.testing.assert_close(prompts(torch.zeros(2, 7, 16))[0].detach(), product)
        vpt.base_model.prompts()[index].prompt_embeddings.data.copy_(product)
    torch.testing.assert_close(output_of(model, pixel_values), output_of(vpt, pixel_values), rtol=1e-4, atol=1e-5)


def test_gradients_of_the_factors_follow_the_product_rule(pixel_values):
    model = prompted()
    made = {}
    for index, prompts in model.base_model.prompts().items():
        prompts.register_forward_hook(lambda *args, index=index: made.update({index: args[2]}))
    loss = output_of(model, pixel_values).square().sum()
    gradients = torch.autograd.grad(loss, list(made.values()), retain_graph=True)
    loss.backward()
    for (index, prompts), gradient in zip(model.base_model.prompts().items(), gradients, strict=True):
        assert gradient.abs().max() > 0, f"block {index} does not count"
        torch.testing.assert_close(prompts.factor_prompts.grad, gradient[0] @ prompts.factor_basis)
        torch.testing.assert_close(prompts.factor_basis.grad, gradient[0].T @ prompts.factor_prompts)


def test_prompts_have_the_rank_of_the_config():
    prompts = prompted(num_virtual_tokens=12, rank=5).base_model.prompts()[0]
    assert torch.linalg.matrix_rank(prompts(torch.zeros(1, 7, 16))[0]) == 5


def test_dropout_zeroes_elements_of_the_product_for_each_image():
    prompts = prompted(num_virtual_tokens=50, prompt_dropout=0.25).train().base_model.prompts()[0]
    dropped, product = prompts(torch.zeros(6, 7, 16)), prompts.factor_prompts @ prompts.factor_basis.T
    assert dropped.shape == (6, 50, 16)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (product / 0.75).expand_as(dropped)[kept])
    assert kept.float().mean() == pytest.approx(0.75, abs=0.05)
    assert not torch.equal(kept[0], kept[1])


def test_initial_factors_have_the_published_distributions():
    prompts = prompted(num_virtual_tokens=400, rank=8, init_weights=True).base_model.prompts()[1]
    assert prompts.factor_prompts.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(prompts.factor_prompts.mean().item()) < 0.002
    bound = (6 / (16 + 8)) ** 0.5
    assert 0.9 * bound < prompts.factor_basis.abs().max() <= bound
    assert prompts.factor_basis.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_a_rank_above_the_width_is_refused_where_the_width_is_known():
    BPTConfig(rank=16, token_dim=16)
    with pytest.raises(ValueError, match=r"BPTConfig.rank is 17\. It must be at most the width of the tokens, 16"):
        BPTConfig(rank=17, token_dim=16)


def test_a_rank_above_the_width_of_the_model_is_refused_before_anything_changes():
    model, config = VIT.build(), BPTConfig(rank=17)
    with pytest.raises(ValueError, match=r"BPTConfig.rank is 17\. It must be at most the width of the tokens, 16"):
        get_peft_model(model, config)
    assert type(model.vit.layers[0]).__name__ == "ViTLayer"
    assert prompted(rank=16).base_model.prompts()[0].factor_basis.shape == (16, 16)


@pytest.mark.parametrize(("basis", "trains"), [("bilinear", True), ("fwhiten", False), ("twhiten", True)])
def test_only_a_fixed_basis_does_not_train_and_each_is_in_the_file(basis, trains):
    model = prompted(basis=basis, modules_to_save=[])
    saved = get_peft_model_state_dict(model)
    assert sum(key.endswith("factor_basis") for key in saved) == 3, sorted(saved)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum("factor_basis" in name for name in trained) == (3 if trains else 0)
    assert model.get_nb_trainable_parameters()[0] == 3 * 4 * (3 + 16 * trains)


@pytest.mark.parametrize("basis", WHITENED)
def test_a_step_of_training_moves_the_basis_only_where_it_is_learned(basis, pixel_values):
    model = prompted(basis=basis)
    before = [p.factor_basis.detach().clone() for p in model.base_model.prompts().values()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output_of(model, pixel_values).square().sum().backward()
    optimizer.step()
    for prompts, old in zip(model.base_model.prompts().values(), before, strict=True):
        assert torch.equal(prompts.factor_basis, old) == (basis == "fwhiten")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_virtual_tokens": 100, "rank": 75, "deep": False}, 65_100),
        ({"num_virtual_tokens": 50, "rank": 50}, 12 * (50 + 768) * 50),
        ({"num_virtual_tokens": 50, "rank": 50, "basis": "fwhiten"}, 12 * 50 * 50),
    ],
)
def test_a_vit_b_tunes_as_many_numbers_as_the_paper_says(settings, expected):
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig())
    model = get_peft_model(model, BPTConfig(modules_to_save=[], **settings))
    assert model.get_nb_trainable_parameters()[0] == expected


# The whitening matrix


def test_the_whitening_matrix_takes_a_covariance_of_full_rank_to_the_identity():
    samples = torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = samples.T @ torch.diag(torch.linspace(0.1, 5, 40).double()) @ samples
    whitening = whitening_matrix(covariance)
    identity = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(whitening @ covariance @ whitening.T, identity, rtol=0, atol=1e-9)
    torch.testing.assert_close(whitening, inverse_root(covariance, 0.0), rtol=1e-8, atol=1e-9)


def test_the_whitening_matrix_of_a_diagonal_covariance_is_known():
    whitening = whitening_matrix(torch.diag(torch.tensor([4.0, 0.25, 1.0])))
    assert whitening.dtype == torch.float32
    torch.testing.assert_close(whitening, torch.diag(torch.tensor([0.5, 2.0, 1.0])))


def test_directions_without_data_are_raised_to_the_floor():
    covariance = torch.diag(torch.tensor([100.0, 1e-9, 0.0], dtype=torch.float64))
    expected = torch.tensor([0.1, (1e-4 * 100) ** -0.5, (1e-4 * 100) ** -0.5], dtype=torch.float64)
    torch.testing.assert_close(whitening_matrix(covariance, floor=1e-4).diag(), expected)


def test_a_covariance_of_deficient_rank_stays_finite_and_whitens_what_the_data_have():
    samples = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = samples.T @ samples
    whitening = whitening_matrix(covariance)
    assert whitening.isfinite().all()
    largest = torch.linalg.eigvalsh(covariance).max()
    # Nothing is blown up more than the floor, a millionth of the largest value, allows.
    assert torch.linalg.matrix_norm(whitening, 2) <= (1e-6 * largest) ** -0.5 * (1 + 1e-6)
    values = torch.linalg.eigvalsh(whitening @ covariance @ whitening.T)
    torch.testing.assert_close(values, torch.tensor(7 * [0.0] + 5 * [1.0]).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimate", ["tokens", "image_mean"])
@pytest.mark.parametrize("sizes", [(6,), (4, 1, 1)])
def test_statistics_equal_a_loop_over_the_formula(sizes, estimate):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, 8, generator=generator)
    inputs = torch.randn(6, 5, 8, generator=generator)
    statistics = WhiteningStatistics(query, key, estimate)
    for batch in inputs.split(sizes):
        statistics.update(batch)
    assert statistics.num_images == 6
    torch.testing.assert_close(statistics.covariance(), covariance_by_the_paper(query, key, inputs, estimate))


def test_the_published_estimate_has_no_more_rank_than_an_image_has_tokens():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, 8, generator=generator)
    inputs = torch.randn(6, 5, 8, generator=generator)
    ranks = {}
    for estimate in ("tokens", "image_mean"):
        statistics = WhiteningStatistics(query, key, estimate)
        statistics.update(inputs)
        ranks[estimate] = int(torch.linalg.matrix_rank(statistics.covariance()))
    assert ranks == {"tokens": 8, "image_mean": 5}


def test_an_unknown_estimate_is_refused():
    with pytest.raises(ValueError, match=r"estimate is 'median'. It must be one of \['tokens', 'image_mean'\]"):
        WhiteningStatistics(torch.eye(4), torch.eye(4), "median")


# Whitening an adapter


@pytest.mark.parametrize("basis", WHITENED)
@pytest.mark.parametrize("estimate", ["tokens", "image_mean"])
@pytest.mark.parametrize("deep", [True, False])
def test_the_basis_becomes_the_whitening_of_the_bare_backbones_block_inputs(deep, estimate, basis):
    model, pixel_values, floor = prompted(deep=deep, basis=basis, rank=16, init_weights=True), images(5), 1e-3
    initialize_whitening(model, pixel_values.split(2), num_images=5, estimate=estimate, floor=floor)
    bare = VIT.build()
    for index, inputs in enumerate(block_inputs(bare, pixel_values)[: 3 if deep else 1]):
        attention = bare.vit.layers[index].attention
        covariance = covariance_by_the_paper(attention.q_proj.weight, attention.k_proj.weight, inputs, estimate)
        # Times the covariance: in directions without data a whitening is free to turn.
        found = model.base_model.prompts()[index].factor_basis.detach().double() @ covariance
        expected = inverse_root(covariance, floor) @ covariance
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_basis_of_lower_rank_keeps_the_first_columns():
    full, few = (prompted(basis="twhiten", rank=rank, init_weights=True) for rank in (16, 5))
    for model in (full, few):
        initialize_whitening(model, [images(5)])
    for index, prompts in few.base_model.prompts().items():
        expected = full.base_model.prompts()[index].factor_basis[:, :5]
        torch.testing.assert_close(prompts.factor_basis, expected)


def test_whitening_an_adapter_again_does_not_see_its_prompts():
    model, pixel_values = prompted(basis="twhiten"), images(4)
    initialize_whitening(model, [pixel_values])
    first = model.base_model.prompts()[2].factor_basis.detach().clone()
    for prompts in model.base_model.prompts().values():
        nn.init.normal_(prompts.factor_prompts)
    initialize_whitening(model, [pixel_values])
    assert torch.equal(model.base_model.prompts()[2].factor_basis, first)


@pytest.mark.parametrize("num_images", [1, 3, 4, 6])
def test_exactly_as_many_images_are_read_as_asked_for(num_images):
    pixel_values = images(10)
    few, all_of_them = prompted(basis="fwhiten"), prompted(basis="fwhiten")
    batches = iter([{"pixel_values": batch} for batch in pixel_values.split(2)])
    initialize_whitening(few, batches, num_images=num_images)
    assert len(list(batches)) == 5 - (num_images + 1) // 2, "batches were read and thrown away"
    initialize_whitening(all_of_them, [pixel_values[:num_images]])
    for index, prompts in few.base_model.prompts().items():
        expected = all_of_them.base_model.prompts()[index].factor_basis
        torch.testing.assert_close(prompts.factor_basis, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("basis", WHITENED)
def test_whitening_leaves_mode_gradients_and_all_other_tensors_alone(basis, training):
    model = prompted(basis=basis).train(training)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 7)
    modes = [module.training for module in model.modules()]
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    initialize_whitening(model, [images(4)])
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        value, requires_grad = before[name]
        assert parameter.requires_grad == requires_grad, name
        assert torch.equal(parameter, value) != ("factor_basis" in name), name
        assert (parameter.grad is not None) == requires_grad, name
        assert parameter.grad is None or bool((parameter.grad == 7).all()), name
    assert not any(block._forward_pre_hooks for block in model.base_model.prompted_blocks())
    assert not any(block.disable_adapters for block in model.base_model.prompted_blocks())


def test_whitening_of_one_adapter_leaves_the_others_alone(pixel_values):
    model = prompted(basis="twhiten", init_weights=True)
    model.add_adapter("other", BPTConfig(num_virtual_tokens=2, rank=4, basis="fwhiten", init_weights=False))
    before = tensors_of(model, "other")
    initialize_whitening(model, [pixel_values], adapter_name="default")
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(model, "other"), strict=True))
    output_of(model, pixel_values)


@pytest.mark.parametrize("basis", WHITENED)
def test_a_forward_pass_before_whitening_names_the_call_that_is_missing(basis, pixel_values):
    model = prompted(basis=basis, init_weights=True)
    with pytest.raises(RuntimeError, match=r"initialize_whitening\(model, dataloader\)"):
        output_of(model, pixel_values)
    with model.disable_adapter():
        output_of(model, pixel_values)
    initialize_whitening(model, [pixel_values])
    assert output_of(model, pixel_values).isfinite().all()


@pytest.mark.parametrize("basis", WHITENED)
def test_a_loaded_adapter_needs_no_whitening(basis, pixel_values, tmp_path):
    model = prompted(basis=basis, init_weights=True)
    initialize_whitening(model, [pixel_values])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(VIT.build(), tmp_path).eval()
    torch.testing.assert_close(output_of(loaded, pixel_values), output_of(model, pixel_values), rtol=0, atol=0)


@pytest.mark.parametrize("basis", WHITENED)
def test_a_copy_of_a_whitened_model_is_whitened(basis, pixel_values):
    model = prompted(basis=basis, init_weights=True)
    initialize_whitening(model, [pixel_values])
    torch.testing.assert_close(output_of(copy.deepcopy(model), pixel_values), output_of(model, pixel_values))


def test_a_bare_model_cannot_be_whitened(pixel_values):
    with pytest.raises(ValueError):
        initialize_whitening(VIT.build(), [pixel_values])


@pytest.mark.parametrize("config", [BPTConfig(rank=4), VPTConfig()], ids=["bilinear", "vpt"])
def test_an_adapter_without_a_whitened_basis_cannot_be_whitened(config, pixel_values):
    model = get_peft_model(VIT.build(), config)
    with pytest.raises(ValueError, match="BPTConfig\\(basis='fwhiten' or 'twhiten'\\)"):
        initialize_whitening(model, [pixel_values])


def test_whitening_without_images_is_an_error_and_changes_nothing():
    model = prompted(basis="twhiten")
    before = tensors_of(model, "default")
    with pytest.raises(ValueError, match="no images"):
        initialize_whitening(model, [])
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(model, "default"), strict=True))


@pytest.mark.parametrize("num_images", [0, -1])
def test_whitening_with_less_than_one_image_is_refused(num_images):
    with pytest.raises(ValueError, match=f"num_images is {num_images}"):
        initialize_whitening(prompted(basis="twhiten"), [images(2)], num_images=num_images)


@pytest.mark.parametrize("cause", ["an image that is not finite", "a covariance of zero"])
def test_a_whitening_that_is_not_finite_is_an_error_and_changes_nothing(cause):
    model, pixel_values = prompted(basis="twhiten"), images(2)
    before = tensors_of(model, "default")
    if cause == "a covariance of zero":
        # Not even a floor helps: there is nothing for it to be relative to.
        nn.init.zeros_(model.base_model.prompted_blocks()[2].attention.q_proj.weight)
    else:
        pixel_values[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError):
        initialize_whitening(model, [pixel_values])
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(model, "default"), strict=True))
