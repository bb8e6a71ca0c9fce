"""Settings come from a YAML file and a command line, with one set of names, types and errors."""

import dataclasses
from pathlib import Path

import pytest

from hf_vpt.sweep import parse_sweep
from hf_vpt.training import BASELINES, TrainingArguments, parse_arguments
from hf_vpt.tuners import METHODS


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def write_config(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_yaml_text_is_converted_by_the_type_of_the_field(write_config):
    # YAML 1.1 takes 1e-3 for text, because it has no decimal point.
    settings = parse_arguments(write_config("learning_rate: 1e-3\nnum_train_epochs: 4\nbf16: 'no'"))
    assert settings.training.learning_rate == 0.001
    assert settings.training.num_train_epochs == 4.0
    assert settings.training.bf16 is False


def test_command_line_overrides_the_file(write_config):
    config = write_config("method: vpt\nlearning_rate: 1e-3\nseed: 3")
    settings = parse_arguments([*config, "--learning_rate", "0.5"])
    assert settings.training.learning_rate == 0.5
    assert settings.training.seed == 3


def test_settings_of_the_method_are_options_like_all_others(write_config):
    config = write_config("method: vpt\nnum_virtual_tokens: 7\nlayers_to_transform: [0, 1]\nprompt_dropout: 1e-1")
    peft_config = parse_arguments([*config, "--num_virtual_tokens", "5", "--layers-to-transform", "1"]).peft_config
    assert isinstance(peft_config, METHODS["vpt"])
    assert peft_config.num_virtual_tokens == 5
    assert peft_config.layers_to_transform == [1]
    assert peft_config.prompt_dropout == 0.1


def test_null_and_empty_lists_in_the_file_are_kept(write_config):
    config = write_config("method: vpt\nlayers_to_transform: null\nmodules_to_save: []\nmodel_revision: null")
    settings = parse_arguments(config)
    assert settings.peft_config.layers_to_transform is None
    assert settings.peft_config.modules_to_save == []
    assert settings.model.model_revision is None


def test_dictionaries_in_the_file_reach_the_training_arguments(write_config):
    config = write_config("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0e-6}")
    assert parse_arguments(config).training.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_method_on_the_command_line_overrides_that_of_the_file(write_config):
    settings = parse_arguments([*write_config("method: vapt"), "--method", "vpt"])
    assert settings.model.method == "vpt"
    assert type(settings.peft_config) is METHODS["vpt"]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_without_settings_has_its_own_defaults(method):
    assert parse_arguments(["--method", method]).peft_config == METHODS[method]()


@pytest.mark.parametrize("method", ["linear_probe", "full"])
def test_baselines_have_no_method_configuration(method):
    assert parse_arguments(["--method", method]).peft_config is None


# Those of Accelerate are in test_scaling.py.
RUNS = sorted({*CONFIGS.rglob("*.yaml")} - {*CONFIGS.glob("accelerate/*"), *CONFIGS.glob("sweeps/*")})


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_configuration_is_valid(path):
    parse_arguments(["--config", str(path)])


@pytest.mark.parametrize("method", [*METHODS, *BASELINES])
def test_the_shipped_sweep_of_a_method_tries_learning_rates_on_both_sides_of_its_own(method):
    own = parse_arguments(["--config", str(CONFIGS / method / "digits.yaml")]).training.learning_rate
    plan = parse_sweep(["--config", str(CONFIGS / "sweeps" / f"{method}.yaml"), "--dataset_name", "drawn/counting"])
    assert (plan.settings.model.method, plan.settings.data.dataset_name) == (method, "drawn/counting")
    assert list(plan.axes) == ["learning_rate"]
    above, middle, below = plan.axes["learning_rate"]
    assert below < middle == own < above


def test_unknown_key_is_named_together_with_the_closest_ones(write_config):
    with pytest.raises(ValueError, match="'learning_rat'.*did you mean.*learning_rate"):
        parse_arguments(write_config("learning_rat: 0.1"))


def test_key_of_another_method_is_explained(write_config):
    own = {method: {field.name for field in dataclasses.fields(config)} for method, config in METHODS.items()}
    key = sorted(own["vapt"] - own["vpt"])[0]
    with pytest.raises(ValueError, match=f"'{key}', which method 'vpt' does not have.*is a setting of .*vapt"):
        parse_arguments(write_config(f"method: vpt\n{key}: 1"))


def test_unknown_option_is_an_error_like_an_unknown_key():
    with pytest.raises(ValueError, match="command line has 'num_virtual_token'.*num_virtual_tokens"):
        parse_arguments(["--method", "vpt", "--num_virtual_token", "5"])


def test_unknown_method_is_an_error_that_lists_the_methods():
    with pytest.raises(ValueError, match="'vtp'.*'vpt'.*'linear_probe'"):
        parse_arguments(["--method", "vtp"])


def test_missing_file_is_an_error_that_names_it():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        parse_arguments(["--config", "nowhere.yaml"])


def test_file_that_is_no_mapping_is_refused(write_config):
    with pytest.raises(ValueError, match="holds a list.*name: value"):
        parse_arguments(write_config("- vpt"))


@pytest.mark.parametrize("name", ["shuffle_buffer_size", "num_held_out"])
def test_sizes_of_a_stream_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name} is 0. It must be at least 1"):
        parse_arguments([f"--{name}", "0"])


def test_number_of_whitening_images_is_a_setting_of_bpt_alone():
    assert parse_arguments(["--method", "bpt", "--num_whitening_images", "7"]).peft_config.num_whitening_images == 7
    with pytest.raises(ValueError, match="num_whitening_images"):
        parse_arguments(["--method", "bpt", "--num_whitening_images", "0"])
    with pytest.raises(ValueError, match="method 'vpt' does not have.*is a setting of bpt"):
        parse_arguments(["--method", "vpt", "--num_whitening_images", "7"])


@pytest.mark.parametrize("line", ["augmentation: flop", "learning_rate: fast", "seed: 1.5"])
def test_value_of_the_wrong_kind_in_the_file_is_refused(write_config, line, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(write_config(line))
    assert line.split(":")[0] in capsys.readouterr().err


def test_warm_up_longer_than_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="warmup_epochs is 3 and num_train_epochs 2"):
        TrainingArguments(output_dir=str(tmp_path), num_train_epochs=2, warmup_epochs=3)


@pytest.mark.parametrize("other", ["warmup_steps", "max_steps"])
def test_warm_up_in_epochs_excludes_lengths_in_steps(tmp_path, other):
    with pytest.raises(ValueError, match=f"warmup_epochs and {other} are both set"):
        TrainingArguments(output_dir=str(tmp_path), warmup_epochs=1, **{other: 5})


def test_dropping_the_image_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns is true.*leave it out"):
        TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=True)


def test_learning_rates_scale_with_the_global_batch(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=32, gradient_accumulation_steps=4, use_cpu=True
    )
    assert arguments.learning_rate_factor == 1.0
    arguments.scale_learning_rate = True
    assert arguments.global_batch_size == 128
    assert arguments.learning_rate_factor == 0.5
