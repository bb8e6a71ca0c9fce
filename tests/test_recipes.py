"""Published recipes: files that build upon others, and settings as their sources give them."""

from pathlib import Path

import pytest

from hf_vpt.training import TrainingArguments, parse_arguments
from hf_vpt.training.recipes import read_recipe


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_a_file_has_the_last_word_over_the_file_that_it_builds_upon(write):
    write("default.yaml", "method: vpt\nlearning_rate: 1e-3\nseed: 3\nlayers_to_transform: [0]")
    write("data/middle.yaml", "base: ../default.yaml\nseed: 4\nlayers_to_transform: null")
    path = write("data/pets.yaml", "base: middle.yaml\nlearning_rate: 0.5")
    expected = {"method": "vpt", "learning_rate": 0.5, "seed": 4, "layers_to_transform": None}
    assert read_recipe(path) == expected
    settings = parse_arguments(["--config", str(path), "--seed", "5"])
    assert (settings.training.learning_rate, settings.training.seed) == (0.5, 5)
    assert settings.peft_config.layers_to_transform is None


def test_the_path_of_a_base_starts_at_the_file_that_names_it_wherever_one_works(write, tmp_path, monkeypatch):
    write("default.yaml", "seed: 3")
    write("data/pets.yaml", "base: ../default.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_recipe("../data/pets.yaml") == {"seed": 3}


@pytest.mark.parametrize("first", ["second.yaml", "first.yaml"])
def test_a_file_that_builds_upon_itself_is_refused(write, first):
    path = write("first.yaml", f"base: {first}")
    write("second.yaml", "base: first.yaml")
    with pytest.raises(ValueError, match=r"has the base '.*must not build upon itself: remove"):
        read_recipe(path)


def test_a_base_that_does_not_exist_is_named_with_the_file_that_names_it(write):
    path = write("pets.yaml", "base: nowhere.yaml")
    with pytest.raises(
        FileNotFoundError, match=r"no file '.*nowhere\.yaml', which .*pets\.yaml has as its base.*corr"
    ):
        read_recipe(path)


def test_a_base_that_is_no_path_is_refused(write):
    with pytest.raises(ValueError, match=r"has the base \['a', 'b'\].*must be the path of one YAML file"):
        read_recipe(write("pets.yaml", "base: [a, b]"))


def test_an_unknown_key_of_a_base_is_refused_like_one_of_the_file_itself(write):
    write("default.yaml", "learning_rat: 1e-3")
    with pytest.raises(ValueError, match="or a file that it builds upon, sets 'learning_rat'.*learning_rate"):
        parse_arguments(["--config", str(write("pets.yaml", "base: default.yaml"))])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_of_the_average_out_of_its_range_is_refused(tmp_path, decay):
    with pytest.raises(ValueError, match=f"ema_decay is {decay:g}. It must be at least 0 and less than 1"):
        TrainingArguments(output_dir=str(tmp_path), ema_decay=decay)


@pytest.mark.parametrize("name", ["ema_accuracy", "eval_ema_loss"])
def test_choosing_by_averaged_weights_without_an_average_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"metric_for_best_model is '{name}' without ema_decay.*set ema_decay"):
        TrainingArguments(output_dir=str(tmp_path), metric_for_best_model=name)


def test_a_schedule_by_epochs_in_a_run_counted_in_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lr_schedule_unit is 'epoch' and max_steps 5.*num_train_epochs instead"):
        TrainingArguments(output_dir=str(tmp_path), lr_schedule_unit="epoch", max_steps=5)


def test_a_schedule_by_another_unit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lr_schedule_unit is 'week'. It must be step or epoch"):
        TrainingArguments(output_dir=str(tmp_path), lr_schedule_unit="week")


@pytest.mark.parametrize("name", ["norm_learning_rate", "norm_weight_decay", "mixup_alpha", "cutmix_alpha"])
def test_a_negative_strength_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is -1. It must be at least 0"):
        TrainingArguments(output_dir=str(tmp_path), **{name: -1.0})


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "total"), [(100, 16, 1600), (2.5, 3, 8), (1.1, 100, 110), (1, 7, 7)]
)
def test_steps_of_an_epoch_are_found_in_the_steps_of_the_run(tmp_path, epochs, steps_per_epoch, total):
    arguments = TrainingArguments(output_dir=str(tmp_path), num_train_epochs=epochs)
    assert arguments.get_steps_per_epoch(total) == steps_per_epoch
