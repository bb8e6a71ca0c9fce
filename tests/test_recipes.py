"""Published recipes: files that build upon others, and settings as their sources give them."""

from pathlib import Path

import pytest
import torch
from transformers import ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

from hf_vpt.training import BASELINES, ModelArguments, TrainingArguments, load_classifier, parse_arguments
from hf_vpt.training.recipes import read_recipe
from hf_vpt.tuners import METHODS


CONFIGS = Path(__file__).parents[1] / "configs"
# Files for programs of others lie in folders that are called otherwise.
RECIPES = [
    path.relative_to(CONFIGS)
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.relative_to(CONFIGS).parts[0] in (*METHODS, *BASELINES)
]


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


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_says_how_to_run_it_and_has_an_output_folder_of_its_own(path):
    text, settings = (CONFIGS / path).read_text(), read_recipe(CONFIGS / path)
    assert f"# Command: accelerate launch scripts/train.py --config configs/{path.as_posix()}" in text
    assert "# Measured score" in text or "# Not measured here." in text
    assert settings["method"] == path.parts[0]
    assert settings["output_dir"] == f"outputs/{path.with_suffix('').as_posix()}"
    if len(path.parts) == 3 and path.parts[0] != "bpt":  # of BPT there are several for each data set
        assert settings["dataset_name"] == "/".join(path.with_suffix("").parts[1:])


def test_there_is_a_recipe_for_every_published_setting_and_a_default_for_the_rest():
    found = {method: [path.parts[1:] for path in RECIPES if path.parts[0] == method] for method in METHODS}
    assert all({("default.yaml",), ("published.yaml",)} <= set(files) for files in found.values())
    counts = {
        (method, group): sum(files[0] == group for files in found[method])
        for method in METHODS
        for group in ("vtab", "fgvc")
    }
    assert counts.pop(("vpt", "vtab")) == 19
    assert counts.pop(("vpt", "fgvc")) == 5
    assert counts.pop(("vapt", "vtab")) == counts.pop(("provpt", "vtab")) == 1
    assert counts.pop(("vapt", "fgvc")) == 5
    # Shallow prompts on three backbones, deep ones on one; some have no setting for a data set.
    assert counts.pop(("bpt", "fgvc")) == 5 + 5 + 4 + 4
    assert not any(counts.values())


@pytest.mark.parametrize(
    ("task", "num_prompts"), [("cifar100", 10), ("svhn", 50), ("clevr_distance", 200), ("pet", 1)]
)
def test_recipes_of_vpt_have_the_number_of_prompts_of_their_source(task, num_prompts):
    settings = parse_arguments(["--config", str(CONFIGS / "vpt" / "vtab" / f"{task}.yaml")])
    assert settings.peft_config.num_virtual_tokens == num_prompts
    training = settings.training
    assert (training.learning_rate, training.weight_decay, training.warmup_epochs) == (1e-3, 1e-4, 10)
    assert (training.lr_schedule_unit, training.num_train_epochs) == ("epoch", 100)


def test_the_recipe_of_vapt_is_sgd_with_a_rate_for_a_batch_of_256():
    training = parse_arguments(["--config", str(CONFIGS / "vapt/fgvc/oxfordflower.yaml"), "--use_cpu"]).training
    assert (training.optim, training.optim_args, training.weight_decay) == ("sgd", "momentum=0.9", 1e-3)
    assert training.learning_rate * training.learning_rate_factor == 50 * 64 / 256


def test_the_recipe_of_provpt_clips_gradients_at_a_constant_rate():
    settings = parse_arguments(["--config", str(CONFIGS / "provpt/vtab/cifar100.yaml")])
    training = settings.training
    assert (training.learning_rate, training.max_grad_norm, training.lr_scheduler_type) == (2.5, 0.25, "constant")
    assert settings.peft_config.num_virtual_tokens == 20


def test_the_recipe_of_bpt_averages_weights_and_decays_the_head_by_itself():
    settings = parse_arguments(["--config", str(CONFIGS / "bpt/fgvc/stanfordcars_sup_in21k_shallow.yaml")])
    training, own = settings.training, settings.peft_config
    assert (training.learning_rate, training.weight_decay, training.head_weight_decay) == (0.02, 0.01, 3.0)
    assert training.ema_decay == 0.9999
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-8}
    assert (own.deep, own.num_virtual_tokens, own.rank) == (False, 100, 75)
    deep = parse_arguments(["--config", str(CONFIGS / "bpt/fgvc/nabirds_mae_deep.yaml")])
    assert (deep.peft_config.deep, deep.peft_config.num_virtual_tokens, deep.peft_config.rank) == (True, 50, 50)
    assert (deep.training.head_weight_decay, deep.model.model_name_or_path) == (0.3, "facebook/vit-mae-base")


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
    with pytest.raises(ValueError, match="lr_schedule_unit is 'week'. It must be one of .'step', 'epoch'."):
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


def test_a_masked_autoencoder_becomes_a_classifier_with_the_same_encoder(tmp_path):
    # Recipes of BPT start from ViT-MAE, which Transformers has no classifier for.
    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=32,
        patch_size=16,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        mask_ratio=0.0,
        initializer_range=0.3,
    )
    autoencoder = ViTMAEForPreTraining(config).eval()
    autoencoder.save_pretrained(tmp_path)
    model = load_classifier(ModelArguments(model_name_or_path=str(tmp_path)), ["cat", "dog", "emu"]).eval()
    assert type(model) is ViTForImageClassification
    assert model.config.model_type == "vit" and model.config.id2label[2] == "emu"
    assert "decoder_hidden_size" not in model.config.to_dict()
    pixels, order = torch.randn(2, 3, 32, 32), torch.arange(4.0).expand(2, -1)  # patches in their order
    expected = autoencoder.vit(pixel_values=pixels, noise=order).last_hidden_state
    torch.testing.assert_close(model.vit(pixel_values=pixels).last_hidden_state, expected)
