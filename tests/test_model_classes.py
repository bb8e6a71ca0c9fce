"""Every class that Transformers has for a family: prompts get in, out again, and from one class to another."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import ADAPTERS, BACKBONES
from peft import PeftModel, get_peft_model
from transformers.models.auto import modeling_auto

from hf_vpt import BACKBONES as RECORDS


MAPPINGS = [
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES",
    "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
]
# In no mapping.
MORE = {"clip_vision_model": ["CLIPVisionModelWithProjection"]}
TWO_TOWERS = ("CLIPModel", "SiglipModel", "Siglip2Model")
SWINS = ("swin", "swinv2")


def classes() -> list[tuple[str, str]]:
    """Model type and class."""
    found = {}
    for model_type in RECORDS:
        for mapping in MAPPINGS:
            names = getattr(modeling_auto, mapping, {}).get(model_type, ())
            for name in (names,) if isinstance(names, str) else names:
                found[name] = model_type
        found |= dict.fromkeys(MORE.get(model_type, ()), model_type)
    return [(model_type, name) for name, model_type in found.items()]


CLASSES = classes()
FEATURES = ("last_hidden_state", "logits", "image_embeds", "logits_per_image", "feature_maps", "reconstruction")


def build(model_type: str, name: str):
    """A tiny random model of the class, for square images."""
    tiny = next(backbone for backbone in BACKBONES.values() if backbone.model_type == model_type)
    overrides = {}
    if model_type != "timm_wrapper" and model_type not in SWINS and "siglip2" not in model_type:
        overrides = {"image_size": 48}
    if model_type in SWINS:
        overrides = {"image_size": 48, "encoder_stride": 8}
    if name == "BeitForSemanticSegmentation":
        overrides |= {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
    if name.endswith("ForMaskedImageModeling") and model_type in ("vit", "deit"):
        overrides |= {"encoder_stride": 16}
    if name == "ViTMAEForPreTraining":
        overrides |= {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
        overrides |= {"decoder_intermediate_size": 8, "mask_ratio": 0.0}
    config = tiny.config(**overrides)
    if name.endswith("Backbone"):
        config.out_indices = [1, 2]
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def arguments(model, name: str, batch_size: int = 2) -> dict:
    tiny = next(backbone for backbone in BACKBONES.values() if backbone.model_type == model.config.model_type)
    height, width = (32, 48) if model.config.model_type in ("timm_wrapper",) else (48, 48)
    images = torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(1))
    inputs = {key: value for key, value in tiny.inputs(images).items() if key != "interpolate_pos_encoding"}
    if name in TWO_TOWERS:
        inputs["input_ids"] = torch.tensor([[5, 6, 7, 1]] * batch_size)
    return inputs


def output_of(model, name: str, **kwargs) -> torch.Tensor:
    output = model(**arguments(model, name), **kwargs)
    value = next(output[key] for key in FEATURES if output.get(key) is not None)
    return torch.cat([part.flatten() for part in value]) if isinstance(value, tuple) else value


def adapter_for(model_type: str, key: str = "vpt_deep", **overrides):
    return ADAPTERS[key].config(2, modules_to_save=overrides.pop("modules_to_save", []), **overrides)


def test_the_list_of_classes_knows_every_record():
    assert {model_type for model_type, _ in CLASSES} == RECORDS.keys()


@torch.no_grad()
@pytest.mark.parametrize("key", ["vpt_deep", "vpt_shallow", "provpt"])
@pytest.mark.parametrize(("model_type", "name"), CLASSES)
def test_prompts_change_the_output_of_a_class_and_leave_it_again(model_type, name, key):
    # Frozen first: for SigLIP's pooling PyTorch chooses another kernel where weights want no gradient.
    model = build(model_type, name).requires_grad_(False)
    plain = output_of(model, name)
    prompted = get_peft_model(model, adapter_for(model_type, key)).eval()
    changed = output_of(prompted, name)
    assert changed.shape == plain.shape
    assert (changed - plain).abs().max() > 1e-6
    with prompted.disable_adapter():
        assert torch.equal(output_of(prompted, name), plain)
    assert torch.equal(output_of(prompted.unload(), name), plain)


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "name"), CLASSES)
def test_hidden_states_of_a_class_have_the_base_models_shapes(model_type, name):
    if name in TWO_TOWERS:
        pytest.skip("hidden states of two towers, see test_two_towers.py")
    model = build(model_type, name)
    inputs = arguments(model, name)

    def shapes(model, selected):
        output = model(**inputs, output_hidden_states=selected)
        keys = [key for key in output if key in ("hidden_states", "reshaped_hidden_states", "feature_maps")]
        return {key: [None if state is None else state.shape for state in output[key]] for key in keys}

    selections = [True]
    if name != "ViTMAEForPreTraining" and model_type not in SWINS:
        selections.append([0, 2])
    expected = [shapes(model, selected) for selected in selections]
    for key in ("vpt_deep", "vpt_shallow"):
        prompted = get_peft_model(build(model_type, name), adapter_for(model_type, key)).eval()
        assert [shapes(prompted, selected) for selected in selections] == expected
        if [0, 2] in selections:
            every = prompted(**inputs, output_hidden_states=True).hidden_states
            some = prompted(**inputs, output_hidden_states=[0, 2]).hidden_states
            # Before 5.23 Transformers does not count the embeddings among the states to choose from.
            known = model(**inputs, output_hidden_states=True).hidden_states
            chosen = [s for s in model(**inputs, output_hidden_states=[0, 2]).hidden_states if s is not None]
            indices = [next(i for i, other in enumerate(known) if torch.equal(state, other)) for state in chosen]
            for state, index in zip([state for state in some if state is not None], indices, strict=True):
                assert torch.equal(state, every[index])


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "name"), CLASSES)
def test_an_adapter_goes_from_one_class_of_a_family_to_another(model_type, name, tmp_path):
    """With `modules_to_save=[]`: the file holds prompts alone, under block numbers that all classes share."""
    model = get_peft_model(build(model_type, name), adapter_for(model_type)).eval()
    model.save_pretrained(tmp_path)
    tables = [prompts.prompt_embeddings for prompts in model.base_model.prompts().values()]
    for _, other in [pair for pair in CLASSES if pair[0] == model_type]:
        if "BeitForSemanticSegmentation" in (name, other) and name != other:
            continue  # of one more block, for its pyramid
        loaded = PeftModel.from_pretrained(build(model_type, other), tmp_path).eval()
        for prompts, table in zip(loaded.base_model.prompts().values(), tables, strict=True):
            assert torch.equal(prompts.prompt_embeddings, table)
        if other == name:
            assert torch.equal(output_of(loaded, name), output_of(model, name))


@pytest.mark.parametrize(("model_type", "name"), CLASSES)
def test_training_a_class_gives_gradients_to_prompts_and_its_head_alone(model_type, name):
    model = get_peft_model(build(model_type, name), adapter_for(model_type, modules_to_save=None)).train()
    output = output_of(model, name)
    (output * torch.arange(output.numel(), dtype=output.dtype).view_as(output).cos()).mean().backward()
    for parameter_name, parameter in model.named_parameters():
        is_adapter = "hfvpt_vpt_prompts" in parameter_name or ".modules_to_save." in parameter_name
        assert parameter.requires_grad == is_adapter
        assert parameter.grad is None or parameter.requires_grad
        if "hfvpt_vpt_prompts" in parameter_name:
            # Blocks behind the last stage that is asked for have no part in feature maps.
            is_behind = name.endswith(("Backbone", "ForSemanticSegmentation")) and parameter.grad is None
            assert not (is_behind and model.peft_config["default"].block_index(parameter_name.split(".hfvpt")[0]) == 0)
            assert is_behind or parameter.grad.abs().max() > 0, parameter_name
    heads = {parameter_name for parameter_name, _ in model.named_parameters() if ".modules_to_save." in parameter_name}
    assert bool(heads) == ("ForImageClassification" in name)
