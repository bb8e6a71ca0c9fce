"""What holds for every method on every backbone; registering one of either buys these tests."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, GRID, inputs_of, output_of
from peft import PeftModel, get_peft_model

from hf_vpt.tuners.base import PromptedBlock


def wrap(backbone, adapter, num_virtual_tokens=2, backbone_overrides=None, **overrides):
    return get_peft_model(
        backbone.build(**(backbone_overrides or {})), adapter.config(num_virtual_tokens, backbone, **overrides)
    ).eval()


def loss_of(model, pixel_values, **kwargs):
    """A weighted sum: the square of a normalised output would be constant."""
    output = output_of(model, pixel_values, **kwargs)
    return (output * torch.arange(output.numel(), dtype=output.dtype).view_as(output).cos()).mean()


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_head(name):
    return ".modules_to_save." in name


@pytest.mark.parametrize("num_virtual_tokens", [1, 2, 5])
def test_prompts_change_the_output_and_keep_its_shape(backbone, adapter, num_virtual_tokens, pixel_values):
    base = backbone.build()
    plain = output_of(base, pixel_values)
    prompted = output_of(get_peft_model(base, adapter.config(num_virtual_tokens, backbone)).eval(), pixel_values)
    assert prompted.shape == plain.shape
    assert (prompted - plain).abs().max() > 1e-4


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_keys_and_values_equal_tokens_that_are_inserted_and_cut_out(
    backbone, adapter, attn_implementation, pixel_values
):
    if attn_implementation not in backbone.attn_implementations:
        pytest.skip("the family has no such attention")
    if backbone.record.windows is not None:
        pytest.skip("tokens in windows; test_swin.py concatenates by hand")
    results = {}
    for insertion in ("keys_values", "tokens"):
        model = wrap(backbone, adapter, backbone_overrides={"attn_implementation": attn_implementation}).double()
        model.base_model.set_insertion(insertion)
        loss = loss_of(model, pixel_values.double())
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results[insertion] = (loss, gradients)
    # Transformers' eager attention takes its softmax in float32, whatever the model's dtype.
    tolerance = {"rtol": 1e-4, "atol": 1e-7} if attn_implementation == "eager" else {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(results["keys_values"][0], results["tokens"][0], **tolerance)
    for name, gradient in results["tokens"][1].items():
        torch.testing.assert_close(results["keys_values"][1][name], gradient, **tolerance)


def test_inner_blocks_see_exactly_n_more_tokens_on_the_plain_path(backbone, adapter, pixel_values):
    if backbone.record.windows is not None:
        pytest.skip("tokens in windows; test_swin.py counts them")
    model = wrap(backbone, adapter, num_virtual_tokens=5)
    model.base_model.set_insertion("tokens")
    seen = []
    for block in model.base_model.prompted_blocks():
        block.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    output_of(model, pixel_values)
    padding = 2 if "siglip2" in backbone.model_type else 0
    tokens = backbone.num_prefix_tokens + GRID[0] * GRID[1] + padding
    assert seen == [tokens + 5] * 3


def test_prefix_tokens_are_counted_right(backbone, adapter):
    blocks = wrap(backbone, adapter).base_model.prompted_blocks()
    assert {block.backbone.num_prefix_tokens for block in blocks} == {backbone.num_prefix_tokens}


@torch.no_grad()  # PyTorch chooses another kernel where a position bias wants a gradient, and a frozen one wants none
def test_disabling_the_adapter_gives_the_base_models_output_bit_for_bit(backbone, adapter, pixel_values):
    base = backbone.build()
    plain = output_of(base, pixel_values)
    model = get_peft_model(base, adapter.config(backbone=backbone)).eval()
    with model.disable_adapter():
        assert torch.equal(output_of(model, pixel_values), plain)
    assert not torch.equal(output_of(model, pixel_values), plain)
    assert torch.equal(output_of(model.unload(), pixel_values), plain)


def test_two_adapters_switch_without_leaking(backbone, adapter, pixel_values):
    model = wrap(backbone, adapter)
    first = output_of(model, pixel_values)
    model.add_adapter("second", adapter.config(5, backbone))
    assert torch.equal(output_of(model, pixel_values), first)
    model.set_adapter("second")
    model.eval()
    second = output_of(model, pixel_values)
    assert not torch.equal(second, first)
    assert not any("default" in name for name in trained(model))
    model.set_adapter("default")
    assert torch.equal(output_of(model, pixel_values), first)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(output_of(model, pixel_values), second)


def test_each_image_of_a_batch_can_use_an_adapter_of_its_own(backbone, adapter, pixel_values):
    model = wrap(backbone, adapter, num_virtual_tokens=2)
    model.add_adapter("second", adapter.config(5, backbone))
    model.eval()
    with model.disable_adapter():
        alone = {"__base__": output_of(model, pixel_values)}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = output_of(model, pixel_values)
    model.set_adapter("default")
    names = ["second", "__base__", "default", "second"]
    mixed = output_of(model, pixel_values, adapter_names=names)
    expected = torch.stack([alone[name][i] for i, name in enumerate(names)])
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(output_of(model, pixel_values), alone["default"])


def test_a_few_steps_move_every_adapter_tensor_and_the_head_and_no_base_tensor(backbone, adapter, pixel_values):
    model = wrap(backbone, adapter).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, pixel_values).backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trained(model)


def test_only_prompts_and_the_head_require_gradients(backbone, adapter):
    model = wrap(backbone, adapter, num_virtual_tokens=5)
    prompts = {name for name in trained(model) if f".{model.base_model.prefix}prompts.default." in name}
    assert {name for name in trained(model) if not is_head(name)} == prompts
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if name in prompts)
    assert count == adapter.parameters(5, backbone)
    heads = [name for name in trained(model) if is_head(name)]
    assert bool(heads) == backbone.has_head


def test_an_adapter_survives_saving_and_loading_into_a_fresh_base(backbone, adapter, pixel_values, tmp_path):
    model = wrap(backbone, adapter, num_virtual_tokens=5)
    expected = output_of(model, pixel_values)
    model.save_pretrained(tmp_path)
    fresh = backbone.build()
    torch.manual_seed(1)  # or the fresh prompts would be drawn as the saved ones were, and nothing need be loaded
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(output_of(loaded, pixel_values), expected, rtol=0, atol=1e-5)
    assert not trained(loaded)
    saved, original = loaded.peft_config["default"].to_dict(), model.peft_config["default"].to_dict()
    filled_in = {"inference_mode": True, "auto_mapping": saved["auto_mapping"]}  # by PEFT, in the file alone
    assert saved == original | filled_in


def test_frozen_dropout_and_stochastic_depth_are_off_while_training(backbone, adapter, pixel_values):
    dropouts = {"prompt_dropout": 0.0}
    if adapter.method == "vapt":
        dropouts |= {"channel_dropout": 0.0, "projector_dropout": 0.0}
    model = wrap(backbone, adapter, **dropouts)
    expected = output_of(model, pixel_values)
    assert torch.equal(output_of(model.train(), pixel_values), expected)
    assert model.training


def test_prompt_dropout_is_on_while_training(adapter, pixel_values):
    model = wrap(BACKBONES["vit"], adapter, num_virtual_tokens=5, prompt_dropout=0.5).train()
    assert not torch.equal(output_of(model, pixel_values), output_of(model, pixel_values))


def test_hidden_states_have_the_base_models_shapes(backbone, adapter, pixel_values):
    base = backbone.build()
    expected = _hidden_states(base, pixel_values)
    model = get_peft_model(base, adapter.config(backbone=backbone)).eval()
    for insertion in ("keys_values", "tokens") if backbone.record.windows is None else ("keys_values",):
        model.base_model.set_insertion(insertion)
        states = _hidden_states(model, pixel_values)
        assert [state.shape for state in states] == [state.shape for state in expected]
        if backbone.model_type != "timm_wrapper":  # whose first state is the output of the first block
            assert torch.equal(states[0], expected[0])


def _hidden_states(model, pixel_values):
    return model(**inputs_of(model, pixel_values), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("insertion", ["keys_values", "tokens"])
def test_an_attention_mask_hides_tokens_and_never_prompts(adapter, insertion, attn_implementation, pixel_values):
    model = wrap(BACKBONES["vit"], adapter, backbone_overrides={"attn_implementation": attn_implementation})
    model.base_model.set_insertion(insertion)
    mask = torch.ones(4, 7, dtype=torch.long)
    visible = model(pixel_values=pixel_values, attention_mask=mask).logits
    torch.testing.assert_close(visible, output_of(model, pixel_values), rtol=1e-4, atol=1e-5)
    mask[:, -1] = 0
    hidden = model(pixel_values=pixel_values, attention_mask=mask).logits
    assert (hidden - visible).abs().max() > 1e-4
    if adapter.method != "vapt":  # whose prompts still pool the hidden patch
        changed = pixel_values.clone()
        changed[:, :, 16:, 32:] += 1.0
        torch.testing.assert_close(model(pixel_values=changed, attention_mask=mask).logits, hidden)


def test_gradient_checkpointing_gives_the_same_gradients(backbone, adapter, pixel_values):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = wrap(backbone, adapter).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        block = model.base_model.prompted_blocks()[1].base_layer
        mlp = block.intermediate if backbone.model_type == "swinv2" else block.mlp
        count = []
        # A pre-hook: recomputing stops within the MLP, at the last tensor that is needed.
        mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(0)
        loss_of(model, pixel_values).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        calls.append(len(count))
    # Swin checkpoints stages as well as blocks. Swin-v2 checkpoints stages alone, through which shallow prompts flow;
    # these use the MLP beside the tokens.
    deep = adapter.settings.get("deep", True)
    expected = {"swin": [1, 3] if deep else [2, 3], "swinv2": [1, 2] if deep else [2, 2]}
    assert calls == expected.get(backbone.model_type, [1, 2])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_reentrant_checkpointing_is_an_error_or_keeps_all_gradients(backbone, adapter, pixel_values):
    if backbone.model_type == "timm_wrapper":
        pytest.skip("timm takes no such keyword; test_timm_with_reentrant_checkpointing_is_refused")
    for checkpoints_first in (False, True):
        base = backbone.build()
        if checkpoints_first:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model = get_peft_model(base, adapter.config(backbone=backbone)).train()
        if not checkpoints_first:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        if adapter.settings.get("deep", True) or backbone.record.windows is not None:
            with pytest.raises(ValueError, match="reentrant gradient checkpointing.*'use_reentrant': False"):
                output_of(model, pixel_values)
        else:
            loss_of(model, pixel_values).backward()
            assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "prompts.default" in name)
        with model.disable_adapter(), torch.no_grad():
            assert output_of(model, pixel_values).isfinite().all()


def test_timm_with_reentrant_checkpointing_is_refused(pixel_values, monkeypatch):
    model = wrap(BACKBONES["timm"], ADAPTERS["vpt_deep"]).train()
    model.gradient_checkpointing_enable()
    monkeypatch.setattr("timm.layers.config._REENTRANT_CKPT", True, raising=False)
    monkeypatch.setattr("timm.layers.use_reentrant_ckpt", lambda: True)
    with pytest.raises(ValueError, match="reentrant gradient checkpointing.*set_reentrant_ckpt"):
        output_of(model, pixel_values)


def test_a_fresh_adapter_starts_with_finite_outputs_and_gradients(backbone, adapter, pixel_values):
    basis = {"basis": "bilinear"} if adapter.method == "bpt" else {}  # a whitened one has to be estimated first
    model = wrap(backbone, adapter, init_weights=True, **basis).train()
    loss = loss_of(model, pixel_values)
    loss.backward()
    assert loss.isfinite()
    # Prompts of VAPT start at 0, where a norm's slope is 1 / sqrt(eps): 1e6 with the eps of Transformers' ViT, 1e-12.
    assert all(p.grad.abs().max() < 1e7 for p in model.parameters() if p.requires_grad and p.grad is not None)


def test_a_forward_pass_that_fails_leaves_nothing_behind(backbone, adapter, pixel_values):
    pooled = {"pool_prompts": True} if backbone.record.pooler else {}
    model = wrap(backbone, adapter, **pooled)
    expected = output_of(model, pixel_values)
    last = model.base_model.prompted_blocks()[-1]

    def fail(module, args, output):
        raise MemoryError

    handle = last.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        output_of(model, pixel_values)
    handle.remove()
    assert torch.equal(output_of(copy.deepcopy(model), pixel_values), expected)
    with model.disable_adapter():
        assert output_of(model, pixel_values).isfinite().all()
    assert torch.equal(output_of(model, pixel_values), expected)


def test_bfloat16_autocast_and_bfloat16_models_give_finite_losses(backbone, adapter, pixel_values):
    model = wrap(backbone, adapter).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, pixel_values)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model = get_peft_model(backbone.build().to(torch.bfloat16), adapter.config(backbone=backbone)).eval()
    output = output_of(model, pixel_values.to(torch.bfloat16))
    assert output.isfinite().all()


def test_nothing_is_recorded_without_gradients(backbone, adapter, pixel_values):
    model = wrap(backbone, adapter)
    with torch.no_grad():
        assert not output_of(model, pixel_values).requires_grad
    with torch.inference_mode():
        assert output_of(model, pixel_values).isfinite().all()


def test_an_image_does_not_feel_its_batch_mates(backbone, adapter, pixel_values):
    model = wrap(backbone, adapter)
    together = output_of(model, pixel_values)
    alone = torch.cat([output_of(model, image[None]) for image in pixel_values])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_another_image_size_works_or_is_refused_with_both_grids(backbone, adapter):
    images = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    if adapter.method == "vapt":
        model = wrap(backbone, adapter)
        rows, columns = backbone.grids[0]
        with pytest.raises(ValueError, match=f"{2 * rows} × {5 * columns // 3} patches.* made for {rows} × {columns}"):
            output_of(model, images, **backbone.interpolates)
        return
    # Some families interpolate from square grids alone.
    model = wrap(backbone, adapter, backbone_overrides=backbone.square)
    assert output_of(model, images, **backbone.interpolates).isfinite().all()


# Every method on ViT, and deep and shallow prompts wherever they get into attention in another way.
COMPILED = [("vit", name) for name in ADAPTERS]
COMPILED += [
    (backbone, name)
    for backbone in ("beit", "siglip", "swin", "swinv2", "timm")
    for name in ("vpt_deep", "vpt_shallow")
]


@pytest.mark.parametrize(("backbone_name", "name"), COMPILED)
def test_a_compiled_model_has_no_graph_breaks_and_gives_the_same_gradients(backbone_name, name, pixel_values):
    dropouts = {"channel_dropout": 0.0, "projector_dropout": 0.0} if ADAPTERS[name].method == "vapt" else {}
    model = wrap(BACKBONES[backbone_name], ADAPTERS[name], prompt_dropout=0.0, **dropouts).train()
    loss = loss_of(model, pixel_values)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled_loss = loss_of(compiled, pixel_values)
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
    for n, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[n], rtol=1e-3, atol=1e-6, msg=n)


def test_every_backbone_record_has_a_tiny_model():
    from hf_vpt import BACKBONES as RECORDS

    assert {backbone.model_type for backbone in BACKBONES.values()} == RECORDS.keys()


def test_every_method_has_a_tiny_adapter():
    from hf_vpt import METHODS

    assert {adapter.method for adapter in ADAPTERS.values()} == METHODS.keys()


def test_no_block_is_wrapped_without_need():
    model = wrap(BACKBONES["vit"], ADAPTERS["vpt_deep"], layers_to_transform=[1])
    blocks = model.get_base_model().vit.layers
    assert [isinstance(block, PromptedBlock) for block in blocks] == [False, True, False]
