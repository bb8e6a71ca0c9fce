"""bake(): static deep prompts become constants of an ordinary model, for inference without PEFT."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, inputs_of, output_of
from peft import PeftModel, get_peft_model

from hf_vpt import PROVPTConfig, VAPTConfig, VPTConfig
from hf_vpt.tuners.base import PromptedBlock


CONSTANT = ("vpt_deep", "vpt_projected", "provpt", "bpt_deep", "bpt_fixed")


def wrap(backbone, name, **overrides):
    return get_peft_model(backbone.build(), ADAPTERS[name].config(3, backbone, **overrides)).eval()


@pytest.fixture(params=CONSTANT)
def constant(request, backbone):
    if ADAPTERS[request.param].is_refused(backbone):
        pytest.skip("refused by the record")
    return request.param


def test_a_baked_model_computes_what_the_wrapped_one_did_and_holds_nothing_of_peft(backbone, constant, pixel_values):
    model = wrap(backbone, constant)
    expected = output_of(model, pixel_values)
    baked = model.bake()
    torch.testing.assert_close(output_of(baked, pixel_values), expected, rtol=1e-5, atol=1e-6)
    assert not isinstance(baked, PeftModel)
    assert not any(
        isinstance(module, PromptedBlock) or "peft" in type(module).__module__ for module in baked.modules()
    )
    assert not any(parameter.requires_grad for parameter in baked.parameters())
    assert not hasattr(baked, "peft_config")


def test_the_trained_head_and_all_active_adapters_are_baked(pixel_values):
    model = get_peft_model(BACKBONES["vit"].build(), VPTConfig(num_virtual_tokens=2, init_weights=False))
    model.add_adapter("second", VPTConfig(num_virtual_tokens=3, init_weights=False, modules_to_save=[]))
    model.eval().base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        model.get_submodule("base_model.model.classifier.modules_to_save.default").weight.normal_()
    both = output_of(model, pixel_values)
    model.base_model.set_adapter(["default"])
    one = output_of(model, pixel_values)
    for adapters, expected in ((["default"], one), (["default", "second"], both)):
        copied = copy.deepcopy(model)
        copied.base_model.set_adapter(adapters)
        torch.testing.assert_close(output_of(copied.bake(), pixel_values), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one, both)


def test_baking_in_training_mode_leaves_prompt_dropout_out(pixel_values):
    model = wrap(BACKBONES["vit"], "vpt_deep", prompt_dropout=0.9)
    expected = output_of(model, pixel_values)
    baked = model.train().bake()
    assert not baked.training
    torch.testing.assert_close(output_of(baked, pixel_values), expected, rtol=1e-5, atol=1e-6)


def test_blocks_that_lost_all_their_prompts_are_baked_without_any(pixel_values):
    model = get_peft_model(BACKBONES["vit"].build(), PROVPTConfig(num_virtual_tokens=2, init_weights=False)).eval()
    pool = model.base_model.pool()
    for row in range(2):
        pool[0].move(row, 2, scale=1.0)
    expected = output_of(model, pixel_values)
    assert model.base_model.distribution()[0] == 0
    torch.testing.assert_close(output_of(model.bake(), pixel_values), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_baked_prompts_have_the_backbones_number_format_and_follow_it(dtype, pixel_values):
    model = wrap(BACKBONES["vit"], "vpt_deep")
    expected = output_of(model, pixel_values)
    baked = model.bake().to(dtype)
    found = output_of(baked, pixel_values.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["vit", "swin", "swinv2", "timm"])
def test_a_baked_model_survives_copies_and_pickling(name, pixel_values, tmp_path):
    baked = wrap(BACKBONES[name], "vpt_deep").bake()
    expected = output_of(baked, pixel_values)
    torch.save(baked, tmp_path / "baked.pt")
    for copied in (copy.deepcopy(baked), torch.load(tmp_path / "baked.pt", weights_only=False)):
        torch.testing.assert_close(output_of(copied, pixel_values), expected)


@pytest.mark.parametrize("name", ["vit", "dinov3_vit", "siglip", "swin", "swinv2", "timm"])
def test_a_baked_model_exports_to_a_program_that_takes_any_number_of_images(name, pixel_values):
    baked = wrap(BACKBONES[name], "vpt_deep").bake()
    inputs = inputs_of(baked, pixel_values)
    shapes = {
        key: {0: torch.export.Dim("batch")} if isinstance(value, torch.Tensor) else None
        for key, value in inputs.items()
    }
    program = torch.export.export(baked, (), inputs, dynamic_shapes=shapes).module()
    for images in (pixel_values, pixel_values[:3]):
        torch.testing.assert_close(
            output_of_program(program, inputs_of(baked, images)), output_of(baked, images), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["vapt", "vpt_shallow"])
def test_a_model_that_cannot_be_baked_exports_as_it_is(name, pixel_values):
    model = wrap(BACKBONES["vit"], name)
    with pytest.raises(ValueError, match="export the wrapped model as it is"):
        model.bake()
    expected = output_of(model, pixel_values)
    inputs = inputs_of(model, pixel_values)
    program = torch.export.export(model, (), inputs).module()
    torch.testing.assert_close(output_of_program(program, inputs), expected, rtol=1e-5, atol=1e-6)


def output_of_program(program, inputs):
    output = program(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


def test_an_exported_program_runs_without_this_package_and_without_peft(pixel_values, tmp_path):
    baked = wrap(BACKBONES["vit"], "bpt_deep").bake()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = baked

        def forward(self, pixel_values):
            return self.model(pixel_values).logits

    torch.export.save(torch.export.export(Logits().eval(), (pixel_values,)), tmp_path / "baked.pt2")
    torch.save(pixel_values, tmp_path / "images.pt")
    script = (
        "import sys, torch\n"
        "images = torch.load('images.pt')\n"
        "torch.save(torch.export.load('baked.pt2').module()(images), 'logits.pt')\n"
        "assert not {'peft', 'transformers', 'hf_vpt'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt"), output_of(baked, pixel_values), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (VAPTConfig(num_virtual_tokens=2), "depend on the image"),
        (VPTConfig(num_virtual_tokens=2, deep=False), "shallow"),
        (VPTConfig(num_virtual_tokens=2, pool_prompts=True), "pool_prompts"),
    ],
)
def test_prompts_that_are_not_constants_are_refused_and_the_model_stays_as_it_was(config, found, pixel_values):
    model = get_peft_model(BACKBONES["swin" if config.pool_prompts else "vit"].build(), config).eval()
    expected = output_of(model, pixel_values)
    with pytest.raises(ValueError, match=found):
        model.bake()
    torch.testing.assert_close(output_of(model, pixel_values), expected)


def test_disabled_adapters_are_not_baked(pixel_values):
    model = wrap(BACKBONES["vit"], "vpt_deep")
    expected = output_of(model, pixel_values)
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled adapters.*outside of"):
        model.bake()
    torch.testing.assert_close(output_of(model, pixel_values), expected)


def test_a_baked_model_takes_no_new_adapter_and_is_not_saved_as_a_checkpoint(tmp_path):
    baked = wrap(BACKBONES["vit"], "vpt_deep").bake()
    with pytest.raises(ValueError, match="baked prompts"):
        get_peft_model(baked, VPTConfig(num_virtual_tokens=2))
    with pytest.raises(NotImplementedError, match="baked prompts"):
        baked.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_attention_implementation_chosen_after_baking_keeps_the_prompts(pixel_values):
    model = wrap(BACKBONES["vit"], "vpt_deep")
    expected = output_of(model, pixel_values)
    baked = model.bake()
    baked.set_attn_implementation("eager")
    torch.testing.assert_close(output_of(baked, pixel_values), expected, rtol=1e-5, atol=1e-6)
