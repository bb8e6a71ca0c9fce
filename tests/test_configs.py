"""Every field of every config refuses what it cannot be, by name and value, and keeps what it is through JSON."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import ADAPTERS, BACKBONES, GRID
from peft import PeftConfig, get_peft_model

from hf_vpt import METHODS, BPTConfig, PROVPTConfig, VAPTConfig, VPTConfig
from hf_vpt.tuners.base import PromptConfig
from hf_vpt.tuners.provpt import PPOAllocation


VIT = BACKBONES["vit"]
NAN, INFINITY = float("nan"), float("inf")

COUNTS = [0, -1, 1.0, "3", None, True, [2]]
COUNTS_OR_NONE = [0, -1, 1.0, "3", True, [2]]
NATURALS = [-1, 0.0, "0", None, False, [0]]
FRACTIONS = [-0.1, 1, 1.5, NAN, INFINITY, "0.1", None, False, [0.1]]
FLAGS = [0, 1, "true", None, [True]]
POSITIVES = [0, -1e-3, NAN, INFINITY, "1", True, [1.0]]
CHOICES = ["", "other", None, 0, True]

# What each field of each config must refuse. "shared" are the fields that all methods have.
BAD = {
    "shared": {
        "num_virtual_tokens": COUNTS,
        "deep": FLAGS,
        "prompt_dropout": FRACTIONS,
        "layers_to_transform": [[], [1, 1], "all", 1.5, [0.0], ["0"], [True], True, {"0": 1}],
        "modules_to_save": [1, [1], [None], True, {"head": 1}],
        "label_names": [[], [1], 2, [None], True, {"cat": 1}],
        "problem_type": [value for value in CHOICES if value is not None],
        "init_weights": FLAGS,
        "pool_prompts": FLAGS,
        "target_modules": [["layers.0"], 1, True],
        "token_dim": COUNTS_OR_NONE,
        "num_layers": [*COUNTS_OR_NONE, 4097],
        "depths": [[], [0, 2], [2, -1], [2.0], ["2"], "22"],
        "hf_vpt_version": [1, 0.1, True],
    },
    "vpt": {"projection_dim": COUNTS_OR_NONE},
    "vapt": {
        "num_static_layers": NATURALS,
        "pooling": CHOICES,
        "kernel_size": COUNTS,
        "padding": NATURALS,
        "shared_kernel": FLAGS,
        "channel_dropout": FRACTIONS,
        "projector_dim": COUNTS,
        "projector_activation": CHOICES,
        "projector_dropout": FRACTIONS,
        "shared_projector": FLAGS,
        "learnable_scale": FLAGS,
        "grid": [[], [4], [4, 4, 4], [0, 4], [4, -1], [4.0, 4], ["4", "4"], [True, 4], "44"],
        "interpolate_grid": FLAGS,
    },
    "provpt": {
        "score": CHOICES,
        "scoring": CHOICES,
        "score_clip": POSITIVES,
        "allocation": CHOICES,
        "allocation_seed": NATURALS,
        "relocation_warmup": NATURALS,
        # Any number of steps needs online scores, so 1 is refused too.
        "relocation_steps": [value for value in COUNTS if value is not None] + [1],
        "relocation_scale": [*POSITIVES, None],
    },
    "bpt": {"rank": COUNTS, "basis": CHOICES, "num_whitening_images": COUNTS},
}


def own_fields(config_cls: type) -> set[str]:
    """Fields that are ours, not PEFT's; PEFT has none of these names in its base class."""
    return {f.name for f in dataclasses.fields(config_cls)} - {f.name for f in dataclasses.fields(PeftConfig)}


BAD_VALUES = [
    pytest.param(method, name, value, id=f"{method}-{name}-{value!r}")
    for method in METHODS
    for name, values in {**BAD["shared"], **BAD[method]}.items()
    for value in values
]


@pytest.mark.parametrize("method", METHODS)
def test_no_field_is_missing_from_the_table_of_bad_values(method):
    assert own_fields(METHODS[method]) == BAD["shared"].keys() | BAD[method].keys()
    assert own_fields(PromptConfig) == BAD["shared"].keys()
    assert all(BAD["shared"].values()) and all(BAD[method].values()), "no bad value in the table"


@pytest.mark.parametrize(("method", "name", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_by_name_and_value(method, name, value):
    with pytest.raises(ValueError) as caught:
        METHODS[method](**{name: value})
    assert f"{METHODS[method].__name__}.{name} is {value!r}. It must be " in str(caught.value)


@pytest.mark.parametrize(
    ("config_cls", "settings", "field"),
    [
        *[
            (METHODS[method], {"deep": False, "layers_to_transform": [0]}, "layers_to_transform")
            for method in ("vpt", "bpt")
        ],
        (VPTConfig, {"layers_to_transform": [2, 0, 2]}, "layers_to_transform"),
        (VPTConfig, {"layers_to_transform": (-1, -1)}, "layers_to_transform"),
        (VAPTConfig, {"deep": False}, "deep"),
        (PROVPTConfig, {"deep": False}, "deep"),
        (VAPTConfig, {"padding": 2}, "padding"),
        (VAPTConfig, {"kernel_size": 3, "padding": 3}, "padding"),
        (VAPTConfig, {"kernel_size": 1, "padding": 1}, "padding"),
        (VAPTConfig, {"grid": [1, 4]}, "kernel_size"),
        (VAPTConfig, {"grid": [4, 3], "kernel_size": 4}, "kernel_size"),
        (VAPTConfig, {"grid": [1, 1], "kernel_size": 4, "padding": 1}, "kernel_size"),
        (BPTConfig, {"rank": 9, "token_dim": 8}, "rank"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(config_cls, settings, field):
    with pytest.raises(ValueError, match=rf"^{config_cls.__name__}\.{field} is "):
        config_cls(**settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_task_type_is_refused_because_peft_has_none_for_images(method):
    with pytest.raises(ValueError, match=r"Config\.task_type is 'SEQ_CLS'\. It must be None"):
        METHODS[method](task_type="SEQ_CLS")


@pytest.mark.parametrize(
    ("config_cls", "settings"),
    [
        (VAPTConfig, {"kernel_size": 3, "padding": 2}),
        (VAPTConfig, {"grid": [4, 3], "kernel_size": 3}),
        (VAPTConfig, {"grid": [1, 1], "kernel_size": 3, "padding": 1}),
        (VAPTConfig, {"grid": [1, 1], "pooling": "linear"}),
        (VAPTConfig, {"num_static_layers": 0}),
        (BPTConfig, {"rank": 8, "token_dim": 8}),
        (PROVPTConfig, {"score_clip": None, "relocation_warmup": 0}),
        (PROVPTConfig, {"scoring": "online", "relocation_steps": 1}),
        (VPTConfig, {"prompt_dropout": 0, "num_virtual_tokens": 1, "projection_dim": 1}),
    ],
)
def test_values_at_the_edge_of_what_is_allowed_are_accepted(config_cls, settings):
    config = config_cls(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize("layers", [[3], [0, 3], [-4], [2, -1], [0, -3]])
@pytest.mark.parametrize("method", METHODS)
def test_blocks_that_the_model_does_not_have_or_that_are_the_same_are_refused_at_injection(method, layers):
    model = VIT.build()
    config = ADAPTERS[method if method in ADAPTERS else f"{method}_deep"].config(layers_to_transform=layers)
    with pytest.raises(ValueError, match=rf"^{type(config).__name__}\.layers_to_transform is "):
        get_peft_model(model, config)
    assert type(model.vit.layers[0]).__name__ == "ViTLayer"
    assert not hasattr(model.classifier, "modules_to_save")


def test_a_kernel_larger_than_the_models_own_grid_is_refused_at_injection():
    with pytest.raises(
        ValueError, match=r"^VAPTConfig\.kernel_size is 3\. It must be at most 2 for a grid of \[2, 3\]"
    ):
        get_peft_model(VIT.build(), VAPTConfig(kernel_size=3))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, [1]),
        (np.int64(1), [1]),
        ((2, 0), [2, 0]),
        ({2, 0}, [0, 2]),
        (range(2), [0, 1]),
        (range(-2, 0), [-2, -1]),
        ([np.int32(1), 2], [1, 2]),
    ],
)
def test_block_indices_come_in_many_forms_and_become_a_list_of_ints(layers, expected):
    config = VPTConfig(layers_to_transform=layers)
    assert config.layers_to_transform == expected
    assert {type(index) for index in config.layers_to_transform} == {int}


def test_integers_of_numpy_become_pythons():
    config = BPTConfig(num_virtual_tokens=np.int64(5), rank=np.int32(3))
    assert (config.num_virtual_tokens, config.rank) == (5, 3)
    assert json.loads(json.dumps(config.to_dict(), default=lambda value: f"not JSON: {value!r}"))["rank"] == 3


def test_one_module_to_save_may_be_given_by_its_name():
    assert VPTConfig(modules_to_save="classifier").modules_to_save == ["classifier"]


SETTINGS = {
    "vpt": {"projection_dim": 4, "prompt_dropout": 0.1, "layers_to_transform": (0, -1)},
    "vapt": {"grid": (4, 6), "pooling": "linear", "shared_projector": False, "num_static_layers": 2},
    "provpt": {
        "score": "attention",
        "scoring": "online",
        "score_clip": None,
        "allocation": "random",
        "relocation_steps": 5,
    },
    "bpt": {"rank": 7, "basis": "fwhiten", "deep": False, "modules_to_save": []},
}


@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["defaults", "settings"])
@pytest.mark.parametrize("method", METHODS)
def test_a_config_comes_back_from_json_unchanged_and_of_its_own_class(method, settings, tmp_path):
    config = METHODS[method](**settings.get(method, {}))
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is METHODS[method]
    assert loaded.peft_type == config.peft_type
    for name in own_fields(type(config)):
        assert getattr(loaded, name) == getattr(config, name), name
        assert type(getattr(loaded, name)) is type(getattr(config, name)), name
    first = (tmp_path / "adapter_config.json").read_text()
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == json.loads(first)


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_was_filled_in_from_a_model_comes_back_too(name, tmp_path):
    model = get_peft_model(VIT.build(), ADAPTERS[name].config())
    model.save_pretrained(tmp_path)
    loaded, used = PeftConfig.from_pretrained(tmp_path), model.peft_config["default"]
    for field in own_fields(type(used)):
        assert getattr(loaded, field) == getattr(used, field), field
    assert (loaded.token_dim, loaded.num_layers, loaded.modules_to_save) == (16, 3, ["classifier"])
    assert loaded.inference_mode


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_config_serves_two_models_of_different_size(name, pixel_values):
    config = ADAPTERS[name].config()
    before = config.to_dict()
    narrow = get_peft_model(VIT.build(), config)
    wide = get_peft_model(VIT.build(hidden_size=24, num_hidden_layers=2), config)
    assert [model.peft_config["default"].token_dim for model in (narrow, wide)] == [16, 24]
    assert [model.peft_config["default"].num_layers for model in (narrow, wide)] == [3, 2]
    for own in ("token_dim", "num_layers", "target_modules", "modules_to_save", "layers_to_transform"):
        assert getattr(config, own) == before[own], own
    if "grid" in before:
        assert config.grid == GRID
    for model in (narrow, wide):
        assert model.eval()(pixel_values=pixel_values).logits.isfinite().all()


def test_an_adapter_made_for_another_width_is_refused():
    with pytest.raises(ValueError, match="token_dim=16 and an adapter made for token_dim=24"):
        get_peft_model(VIT.build(), VPTConfig(token_dim=24))


@pytest.mark.parametrize(
    ("config_cls", "expected"),
    [
        (VPTConfig, {"deep": True, "prompt_dropout": 0.0, "projection_dim": None}),
        (
            VAPTConfig,
            {
                "num_static_layers": 1,
                "pooling": "conv",
                "kernel_size": 2,
                "padding": 0,
                "shared_kernel": True,
                "channel_dropout": 0.1,
                "projector_dim": 8,
                "projector_activation": "relu",
                "projector_dropout": 0.1,
                "shared_projector": True,
                "learnable_scale": False,
                "prompt_dropout": 0.1,
            },
        ),
        (
            PROVPTConfig,
            {
                "num_virtual_tokens": 20,
                "prompt_dropout": 0.1,
                "score": "gate",
                "scoring": "separate",
                "score_clip": 0.25,
                "allocation": "ppo",
                "relocation_warmup": 1,
                "relocation_scale": 1e-3,
            },
        ),
        (BPTConfig, {"num_virtual_tokens": 50, "rank": 50, "basis": "bilinear", "prompt_dropout": 0.0}),
    ],
)
def test_defaults_are_the_published_ones(config_cls, expected):
    config = config_cls()
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.deep, config.layers_to_transform, config.modules_to_save, config.init_weights) == (
        True,
        None,
        None,
        True,
    )


def test_the_ppo_policy_has_the_published_settings():
    policy = PPOAllocation(3)
    names = ("horizon", "gamma", "epochs", "clip_epsilon", "value_coef", "entropy_coef")
    assert [getattr(policy, name) for name in names] == [2, 1.0, 60, 0.2, 0.5, 0.01]
    assert [group["lr"] for group in policy.optimizer.param_groups] == [3e-4, 1e-3]
