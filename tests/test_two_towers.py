"""CLIP and SigLIP as a whole: prompts go into the vision tower, and text stays as it is."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import ADAPTERS, BACKBONES
from peft import PeftModel, get_peft_model


WHOLE = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}


@pytest.fixture(params=WHOLE)
def model_type(request):
    return request.param


def build(model_type):
    torch.manual_seed(0)
    return getattr(transformers, WHOLE[model_type])(BACKBONES[model_type].config()).eval()


def arguments(model_type, pixel_values):
    images = BACKBONES[model_type].inputs(pixel_values)
    return images | {"input_ids": torch.tensor([[5, 6, 7, 1], [8, 9, 1, 1]])}


def config_of(adapter, model_type, **overrides):
    return adapter.config(2, BACKBONES[model_type], **overrides)


@pytest.fixture
def adapter(request, model_type):
    adapter = ADAPTERS[request.param]
    if adapter.is_refused(BACKBONES[model_type]):
        pytest.skip("refused by the record")
    return adapter


EVERY_METHOD = pytest.mark.parametrize(
    "adapter", ["vpt_deep", "vpt_shallow", "vapt", "provpt", "bpt_deep"], indirect=True
)


@torch.no_grad()
@EVERY_METHOD
def test_prompts_change_images_and_never_text(model_type, adapter, pixel_values):
    base = build(model_type).requires_grad_(False)
    inputs = arguments(model_type, pixel_values)
    plain = base(**inputs)
    model = get_peft_model(base, config_of(adapter, model_type)).eval()
    prompted = model(**inputs)
    assert prompted.logits_per_image.shape == (4, 2)
    assert (prompted.logits_per_image - plain.logits_per_image).abs().max() > 1e-4
    assert torch.equal(prompted.text_embeds, plain.text_embeds)
    images = {key: value for key, value in inputs.items() if key != "input_ids"}
    features = model.get_image_features(**images).pooler_output
    torch.testing.assert_close(features / features.norm(dim=-1, keepdim=True), prompted.image_embeds)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits_per_image, plain.logits_per_image)
    assert {name.split(".")[2] for name, _ in model.named_modules() if name.endswith("prompts")} == {"vision_model"}


@EVERY_METHOD
def test_training_moves_prompts_alone(model_type, adapter, pixel_values):
    model = get_peft_model(build(model_type), config_of(adapter, model_type)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(**arguments(model_type, pixel_values)).logits_per_image
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0])).backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("prompts.default." in name for name in moved)


@torch.no_grad()
@EVERY_METHOD
def test_a_saved_adapter_gives_the_same_zero_shot_logits(model_type, adapter, pixel_values, tmp_path):
    model = get_peft_model(build(model_type), config_of(adapter, model_type)).eval()
    inputs = arguments(model_type, pixel_values)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(build(model_type), tmp_path).eval()
    expected = model(**inputs).logits_per_image
    torch.testing.assert_close(loaded(**inputs).logits_per_image, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_image_can_use_an_adapter_of_its_own_beside_another_number_of_texts(model_type, pixel_values):
    backbone, adapter = BACKBONES[model_type], ADAPTERS["vpt_deep"]
    model = get_peft_model(build(model_type), adapter.config(2, backbone)).eval()
    model.add_adapter("second", adapter.config(5, backbone))
    inputs = arguments(model_type, pixel_values)
    alone = {"default": model.eval()(**inputs).logits_per_image}
    with model.disable_adapter():
        alone["__base__"] = model(**inputs).logits_per_image
    names = ["default", "__base__", "__base__", "default"]
    expected = torch.stack([alone[name][i] for i, name in enumerate(names)])
    texts = inputs.pop("input_ids")
    for args, kwargs in (((), {"input_ids": texts}), ((texts,), {})):
        mixed = model(*args, **inputs, **kwargs, adapter_names=names).logits_per_image
        torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


def test_a_projection_is_trained_when_it_is_asked_for(pixel_values):
    model = get_peft_model(
        build("clip"), ADAPTERS["vpt_deep"].config(backbone=BACKBONES["clip"], modules_to_save=["visual_projection"])
    ).train()
    model(**arguments("clip", pixel_values)).logits_per_image[:, 0].sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in name}
    assert trained == {"base_model.model.visual_projection.modules_to_save.default.weight"}


@torch.no_grad()
def test_hidden_states_and_maps_of_the_towers_have_the_base_models_shapes(model_type, pixel_values):
    import hf_vpt

    base = build(model_type)
    base.set_attn_implementation("eager")
    inputs = arguments(model_type, pixel_values) | {"output_hidden_states": True, "output_attentions": True}
    expected = base(**inputs)
    model = get_peft_model(base, ADAPTERS["vpt_shallow"].config(2, BACKBONES[model_type])).eval()
    output = model(**inputs)
    for tower in ("vision_model_output", "text_model_output"):
        states, base_states = output[tower].hidden_states, expected[tower].hidden_states
        assert [state.shape for state in states] == [state.shape for state in base_states]
    split = hf_vpt.split_attentions(model, output.vision_model_output.attentions)
    maps = expected.vision_model_output.attentions
    assert [part.tokens.shape for part in split] == [weights.shape for weights in maps]
