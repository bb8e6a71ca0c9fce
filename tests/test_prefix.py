"""A model that starts at the first block with prompts gives what the whole model gives."""

import copy

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, assert_same, inputs_of, output_of
from peft import get_peft_model

from hf_vpt import VPTConfig
from hf_vpt.prefix import FrozenPrefix, first_block_with_prompts
from hf_vpt.training import prepare_for_training


REFUSED = {"vit_mae", "siglip2", "siglip2_vision_model", "swin", "swinv2"}
PLAIN = [name for name in BACKBONES if name not in REFUSED]
DEEP = [name for name, adapter in ADAPTERS.items() if adapter.settings.get("deep", True)]


def prompted(name="vit", adapter="vpt_deep", layers=(1, 2), overrides=None, **settings):
    backbone = BACKBONES[name]
    config = ADAPTERS[adapter].config(backbone=backbone, layers_to_transform=list(layers), **settings)
    torch.manual_seed(1)
    return get_peft_model(backbone.build(**(overrides or {})), config)


def tokens_of(prefix, pixel_values):
    return prefix.compute(**inputs_of(prefix.base, pixel_values))


def trained(model, pixel_values, like):
    """Output and gradients of all that trains, of images or of tokens in their place."""
    model.zero_grad()
    torch.manual_seed(2)  # of dropout in prompts
    kwargs = inputs_of(model.get_base_model(), like) | {"pixel_values": pixel_values}
    output = model(**kwargs)
    output = output.logits if "logits" in output else output.last_hidden_state
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def assert_equal_with_and_without(model, pixel_values):
    wanted, gradients = trained(model, pixel_values, pixel_values)
    prefix = FrozenPrefix(model)
    tokens = tokens_of(prefix, pixel_values)
    prefix.attach()
    for _ in range(2):
        found, own = trained(model, tokens, pixel_values)
        assert torch.equal(found, wanted)
        assert_same(own, gradients, atol=0, rtol=0)
    assert gradients
    # Images still pass the whole model.
    assert torch.equal(trained(model, pixel_values, pixel_values)[0], wanted)


@pytest.mark.parametrize("layers", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("name", PLAIN)
def test_outputs_and_gradients_of_every_family_are_those_of_the_whole_model(name, layers, pixel_values):
    assert_equal_with_and_without(prompted(name, layers=layers).train(), pixel_values)


@pytest.mark.parametrize("adapter", DEEP)
def test_outputs_and_gradients_of_every_method_are_those_of_the_whole_model(adapter, pixel_values):
    assert_equal_with_and_without(prompted(adapter=adapter, prompt_dropout=0.3).train(), pixel_values)


@pytest.mark.parametrize("name", PLAIN)
def test_vapt_finds_its_grid_in_every_family(name, pixel_values):
    assert_equal_with_and_without(prompted(name, "vapt").train(), pixel_values)


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3_vit", "clip", "siglip", "timm"])
def test_images_of_another_size_keep_their_grid(name):
    backbone = BACKBONES[name]
    images = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    model = prompted(name, "vapt", overrides=backbone.square, interpolate_grid=True).train()
    prefix = FrozenPrefix(model)
    inputs = {"pixel_values": images} | backbone.interpolates
    tokens = prefix.compute(**inputs)
    with torch.no_grad():
        torch.manual_seed(0)
        wanted = model(**inputs)
        prefix.attach()
        torch.manual_seed(0)
        found = model(**inputs | {"pixel_values": tokens})
    assert torch.equal(found[0], wanted[0])


@pytest.mark.parametrize("name", ["vit", "beit", "clip", "timm"])
def test_checkpointed_blocks_are_computed_anew_from_the_tokens(name, pixel_values):
    if name == "timm":
        timm_layers = pytest.importorskip("timm.layers")
        timm_layers.set_reentrant_ckpt(False)
    model = prompted(name).train()
    wanted, gradients = trained(model, pixel_values, pixel_values)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prefix = FrozenPrefix(model)
    tokens = tokens_of(prefix, pixel_values)
    prefix.attach()
    found, own = trained(model, tokens, pixel_values)
    assert torch.equal(found, wanted)
    assert_same(own, gradients)


def test_prompts_as_tokens_start_there_too(pixel_values):
    model = prompted().train()
    model.base_model.set_insertion("tokens")
    assert_equal_with_and_without(model, pixel_values)


def test_tokens_may_stand_where_pixel_values_may(pixel_values):
    model = prompted()
    prefix = FrozenPrefix(model)
    wanted, tokens = model(pixel_values).logits, tokens_of(prefix, pixel_values)
    prefix.attach()
    assert torch.equal(model(tokens).logits, wanted)
    assert torch.equal(model(pixel_values).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_mixed_precision_give_tokens_of_their_format(dtype, pixel_values):
    model = prompted().to(dtype).train()
    wanted, _ = trained(model, pixel_values, pixel_values)
    prefix = FrozenPrefix(model)
    tokens = tokens_of(prefix, pixel_values)
    assert tokens.dtype == prefix.dtype == dtype
    prefix.attach()
    # As a cache in float32 hands them out.
    assert torch.equal(trained(model, tokens.float(), pixel_values)[0], wanted)


def test_the_blocks_before_are_left_out(pixel_values):
    model = prompted(layers=[2])
    prefix = FrozenPrefix(model)
    tokens = tokens_of(prefix, pixel_values)
    prefix.attach()
    ran = []
    for name in ("embeddings.patch_embeddings.projection", "layers.0.attention", "layers.1.mlp", "layers.2"):
        module = model.get_base_model().vit.get_submodule(name)
        module.register_forward_hook(lambda module, args, output, name=name: ran.append((name, len(args[0]))))
    projected = []
    projection = model.get_base_model().vit.embeddings.patch_embeddings.projection
    forward = projection._conv_forward
    projection._conv_forward = lambda images, *args: projected.append(len(images)) or forward(images, *args)
    model(pixel_values=tokens)
    assert [name for name, _ in ran] == ["embeddings.patch_embeddings.projection", "layers.2"]
    assert projected == [1]  # image of zeros


def test_a_pass_that_fails_leaves_the_whole_model(pixel_values):
    model = prompted()
    prefix = FrozenPrefix(model)
    wanted, tokens = output_of(model.get_base_model(), pixel_values), tokens_of(prefix, pixel_values)
    prefix.attach()
    with pytest.raises(RuntimeError):
        model(pixel_values=tokens[..., :-1])
    assert torch.equal(output_of(model.get_base_model(), pixel_values), wanted)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_pass_that_was_interrupted_leaves_nothing_to_the_next_one(pixel_values):
    model = prompted()
    prefix = FrozenPrefix(model)
    wanted, tokens = model(pixel_values=pixel_values).logits, tokens_of(prefix, pixel_values)
    prefix.attach()

    def interrupt(*args):
        raise KeyboardInterrupt

    def let_interrupted_pass_stop():
        handle = model.get_base_model().classifier.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(pixel_values=tokens.flip(0))
        handle.remove()

    let_interrupted_pass_stop()
    assert torch.equal(model(pixel_values=pixel_values).logits, wanted)
    let_interrupted_pass_stop()
    assert torch.equal(tokens_of(prefix, pixel_values), tokens)
    let_interrupted_pass_stop()
    assert torch.equal(model(pixel_values=tokens).logits, wanted)


def test_computing_leaves_the_mode_as_it_was(pixel_values):
    model = prompted().train()
    model.get_base_model().classifier.eval()
    wanted = [module.training for module in model.modules()]
    tokens_of(FrozenPrefix(model), pixel_values)
    assert [module.training for module in model.modules()] == wanted


def test_a_linear_probe_starts_behind_the_last_block(pixel_values):
    model = prepare_for_training(BACKBONES["vit"].build(), "linear_probe").train()
    prefix = FrozenPrefix(model)
    assert prefix.block == 3
    wanted = model(pixel_values=pixel_values).logits
    tokens = prefix.compute(pixel_values)
    prefix.attach()
    found = model(pixel_values=tokens).logits
    assert torch.equal(found, wanted)
    found.sum().backward()
    assert model.classifier.weight.grad is not None


def test_the_first_block_with_prompts_follows_prompts_that_move():
    model = prompted(adapter="provpt", num_virtual_tokens=1)
    assert first_block_with_prompts(model) == 1
    model.base_model.pool()[0].move(0, block=2, scale=0.5)
    assert first_block_with_prompts(model) == 2


def test_prompts_before_the_tokens_are_an_error_and_not_left_out(pixel_values):
    model = prompted(adapter="provpt", num_virtual_tokens=1)
    model.base_model.pool()[0].move(0, block=2, scale=0.5)
    prefix = FrozenPrefix(model)
    tokens = tokens_of(prefix, pixel_values)
    prefix.attach()
    model(pixel_values=tokens)
    model.base_model.pool()[0].move(0, block=1, scale=0.5)
    with pytest.raises(RuntimeError, match="Found prompts in block 1.*block 2.*anew"):
        model(pixel_values=tokens)
    prefix.block = first_block_with_prompts(model)
    model.eval()
    found = model(pixel_values=tokens_of(prefix, pixel_values)).logits
    assert torch.equal(found, model(pixel_values=pixel_values).logits)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_families_whose_tokens_are_not_all_there_is_are_refused(name):
    last = len(BACKBONES[name].widths) - 1
    with pytest.raises(ValueError, match=r"Found a .*needs a plain ViT.*leave cache_prefix out"):
        FrozenPrefix(prompted(name, layers=[last]))


@pytest.mark.parametrize("settings", [{"layers": [0, 2]}, {"adapter": "vpt_shallow", "layers": None}])
def test_prompts_in_block_0_are_refused(settings):
    adapter = settings.get("adapter", "vpt_deep")
    config = ADAPTERS[adapter].config(layers_to_transform=settings["layers"])
    with pytest.raises(ValueError, match="prompts in block 0.*layers_to_transform"):
        FrozenPrefix(get_peft_model(BACKBONES["vit"].build(), config))


def test_weights_that_train_before_the_first_prompt_are_refused():
    model = get_peft_model(
        BACKBONES["vit"].build(), VPTConfig(layers_to_transform=[2], modules_to_save=["classifier", "layernorm"])
    )
    FrozenPrefix(model)  # the norm behind the blocks may train
    model.get_base_model().vit.layers[1].mlp.fc1.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"Found 1 tensors that train.*block 1: mlp.*bias.*modules_to_save"):
        FrozenPrefix(model)
    with pytest.raises(ValueError, match="tensors that train"):
        FrozenPrefix(BACKBONES["vit"].build())


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_of_all_blocks_are_refused(name, pixel_values):
    model = prompted(overrides={"attn_implementation": "eager"})
    prefix = FrozenPrefix(model)
    tokens = tokens_of(prefix, pixel_values)
    prefix.attach()
    with pytest.raises(ValueError, match="hidden states or attentions.*pass pixel values"):
        model(pixel_values=tokens, **{name: True})
    setattr(model.get_base_model().config, name, True)
    with pytest.raises(ValueError, match=f"Found {name} in the model's config"):
        FrozenPrefix(model)


def test_tokens_before_any_image_are_an_error(pixel_values):
    model = prompted()
    tokens = tokens_of(FrozenPrefix(copy.deepcopy(model)), pixel_values)
    FrozenPrefix(model).attach()
    with pytest.raises(RuntimeError, match="no image before them.*call `compute`"):
        model(pixel_values=tokens)


@pytest.mark.parametrize("name", PLAIN)
def test_fingerprints_tell_weights_before_the_first_prompt_and_no_others_apart(name, pixel_values):
    model = prompted(name, layers=[2])
    prefix = FrozenPrefix(model)
    wanted = prefix.fingerprint()
    assert FrozenPrefix(prompted(name, "vapt", layers=[1])).fingerprint() == wanted, "another adapter"
    names = set()
    for parameter_name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        before = tokens_of(prefix, pixel_values)
        with torch.no_grad():
            parameter.add_(torch.linspace(0.5, 1, parameter.numel()).view_as(parameter))
        if not torch.equal(tokens_of(prefix, pixel_values), before):
            assert prefix.fingerprint() != wanted, parameter_name
            names.add(parameter_name)
        elif parameter.requires_grad:
            assert prefix.fingerprint() == wanted, parameter_name
        with torch.no_grad():
            parameter.copy_(kept)
    assert prefix.fingerprint() == wanted
    assert names


def test_fingerprints_tell_configs_apart():
    wanted = FrozenPrefix(prompted()).fingerprint()
    assert FrozenPrefix(prompted(overrides={"layer_norm_eps": 1e-3})).fingerprint() != wanted
    assert FrozenPrefix(prompted(overrides={"attn_implementation": "eager"})).fingerprint() != wanted
