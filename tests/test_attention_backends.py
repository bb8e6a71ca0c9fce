"""Prompts under every attention function that Transformers offers, and across a change from one to another."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers
from conftest import ADAPTERS, BACKBONES, output_of
from peft import get_peft_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_vpt.attention.block_masks import dense_mask, insert_into_block_mask


VIT = BACKBONES["vit"]
MIXED = ["second", "__base__", "default", "second"]


def supports(name, flag):
    return getattr(getattr(transformers, BACKBONES[name].model_cls), flag, False)


WITH_FLEX = [name for name in BACKBONES if supports(name, "_supports_flex_attn")]
WITH_FLASH = [name for name in BACKBONES if supports(name, "_supports_flash_attn")]


def with_two_adapters(backbone, adapter):
    model = get_peft_model(backbone.build(), adapter.config(2, backbone))
    model.add_adapter("second", adapter.config(5, backbone))
    return model.eval()


def outputs_of(model, pixel_values):
    """One adapter for all images, several in one batch, one taken among the tokens, and none."""
    outputs = {"one": output_of(model, pixel_values), "mixed": output_of(model, pixel_values, adapter_names=MIXED)}
    if not model.base_model.prompted_blocks()[0].backbone.stages(model.base_model.model):
        model.base_model.set_insertion("tokens")
        outputs["tokens"] = output_of(model, pixel_values)
        outputs["mixed tokens"] = output_of(model, pixel_values, adapter_names=MIXED)
        model.base_model.set_insertion("keys_values")
    with model.disable_adapter():
        outputs["none"] = output_of(model, pixel_values)
    return outputs


@pytest.fixture
def uncompiled_flex_attention():
    """Runs flex attention as plain PyTorch: compiling its kernels takes 20 seconds each."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def assert_the_same_outputs(model, pixel_values, attn_implementations):
    """Switches a model with prompts through attention functions, which must all give what it gave at first."""
    expected = outputs_of(model, pixel_values)
    for attn_implementation in attn_implementations:
        model.set_attn_implementation(attn_implementation)
        torch.testing.assert_close(outputs_of(model, pixel_values), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_another_attention_function_keeps_the_prompts(backbone, adapter, pixel_values):
    if backbone.attn_implementations != ("eager", "sdpa"):
        pytest.skip("the family has one attention function alone")
    assert_the_same_outputs(with_two_adapters(backbone, adapter), pixel_values, ("eager", "sdpa", "eager"))


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_FLEX)
@pytest.mark.parametrize("adapter", ["vpt_deep", "vpt_shallow", "vapt"], indirect=True)
def test_flex_attention_gives_the_same_outputs(name, adapter, pixel_values, uncompiled_flex_attention):
    model = with_two_adapters(BACKBONES[name], adapter)
    assert_the_same_outputs(model, pixel_values, ("flex_attention", "sdpa", "flex_attention"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "dinov2"])
@pytest.mark.parametrize("adapter_names", [None, MIXED])
def test_flex_attention_with_an_attention_mask(name, adapter, adapter_names, pixel_values, uncompiled_flex_attention):
    backbone = BACKBONES[name]
    model = with_two_adapters(backbone, adapter)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[0, -1] = mask[1, -2:] = mask[3, 2] = 0
    names = {} if adapter_names is None else {"adapter_names": adapter_names}
    for insertion in ("keys_values", "tokens"):
        model.base_model.set_insertion(insertion)
        outputs = []
        for attn_implementation in ("sdpa", "flex_attention"):
            model.set_attn_implementation(attn_implementation)
            outputs.append(output_of(model, pixel_values, attention_mask=mask, **names))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    plain = output_of(model, pixel_values, **names)
    assert (plain - outputs[0]).abs().max() > 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_attention_gives_the_same_outputs(pixel_values):
    model = with_two_adapters(VIT, ADAPTERS["vpt_deep"])
    expected = output_of(model, pixel_values), output_of(model, pixel_values, adapter_names=MIXED)
    model.set_attn_implementation("flex_attention")
    outputs = output_of(model, pixel_values), output_of(model, pixel_values, adapter_names=MIXED)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


def test_scores_from_attention_under_flex_attention(pixel_values, uncompiled_flex_attention):
    model = get_peft_model(VIT.build(), ADAPTERS["provpt"].config(score="attention")).eval()
    batches = [{"pixel_values": pixel_values, "labels": torch.tensor([0, 1, 2, 3])}]
    expected = model.base_model.score_prompts(batches)
    model.set_attn_implementation("flex_attention")
    try:
        scores = model.base_model.score_prompts(batches)
    except NotImplementedError as error:  # PyTorch's own
        assert "backward on CPU" in str(error)
        return
    torch.testing.assert_close(scores.values, expected.values)


@pytest.mark.parametrize(("start", "rows"), [(0, True), (1, True), (3, True), (5, False)])
def test_a_block_mask_with_prompts_in_it_is_the_dense_mask_with_prompts_in_it(start, rows):
    from torch.nn.attention.flex_attention import create_block_mask

    torch.manual_seed(0)
    allowed = torch.rand(2, 5, 5) > 0.4
    mask = create_block_mask(lambda b, h, q, kv: allowed[b, q, kv], 2, None, 5, 5, device="cpu")
    expected = allowed
    if rows:  # prompts see what the first token sees
        expected = torch.cat([allowed[:, :start], allowed[:, :1].repeat(1, 3, 1), allowed[:, start:]], dim=1)
    columns = expected.new_ones(*expected.shape[:2], 3)
    expected = torch.cat([expected[..., :start], columns, expected[..., start:]], dim=2)
    result = insert_into_block_mask(mask, start, 3, rows)
    b, q, kv = torch.meshgrid(*(torch.arange(length) for length in expected.shape), indexing="ij")
    assert torch.equal(result.mask_mod(b, torch.zeros_like(b), q, kv), expected)
    assert result.seq_lengths == expected.shape[1:]
    assert torch.equal(dense_mask(mask)[:, 0], allowed)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_FLASH)
@pytest.mark.parametrize("adapter", ["vpt_deep", "vpt_shallow", "vapt"], indirect=True)
def test_flash_attention_gets_no_mask_that_it_would_misread(name, adapter, pixel_values, monkeypatch):
    """A stand-in for the kernel, which takes `(B, T)` masks for as many keys as queries."""
    backbone = BACKBONES[name]
    model = with_two_adapters(backbone, adapter)
    expected = outputs_of(model, pixel_values)
    calls = []

    def flash_attention(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        assert module.config._attn_implementation == "flash_attention_2"
        calls.append(key.shape[2] - query.shape[2])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)

    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "flash_attention_2", flash_attention)
    for module in model.modules():
        if isinstance(getattr(module, "config", None), transformers.PretrainedConfig):
            monkeypatch.setattr(module.config, "_attn_implementation_internal", "flash_attention_2")
    torch.testing.assert_close(outputs_of(model, pixel_values), expected, rtol=1e-4, atol=1e-5)
    assert set(calls) == ({0, 2} if adapter.settings.get("deep", True) else {0})
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[0, -1] = 0
    if name == "vit":
        masked = model(pixel_values=pixel_values, attention_mask=mask).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(masked, model(pixel_values=pixel_values, attention_mask=mask).logits)


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="needs a GPU and the package flash-attn",
)
@pytest.mark.parametrize("name", WITH_FLASH)
@pytest.mark.parametrize("adapter", ["vpt_deep", "vpt_shallow", "vapt"], indirect=True)
def test_flash_attention_gives_the_same_outputs(name, adapter, pixel_values):
    backbone = BACKBONES[name]
    model = with_two_adapters(backbone, adapter).to("cuda", torch.bfloat16)
    images = pixel_values.to("cuda", torch.bfloat16)
    with torch.no_grad():
        expected = outputs_of(model, images)
        model.set_attn_implementation("flash_attention_2")
        torch.testing.assert_close(outputs_of(model, images), expected, rtol=0.1, atol=0.1)
    output_of(model.train(), images).float().square().mean().backward()
    prompts = [p for name, p in model.named_parameters() if p.requires_grad]
    assert all(parameter.grad.isfinite().all() for parameter in prompts)
