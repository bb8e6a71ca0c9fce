"""The model card says what an adapter is, how good it is, and how to use it."""

import json
import shutil

import pytest
import torch
from conftest import ADAPTERS, BACKBONES
from huggingface_hub import ModelCard
from peft import get_peft_model

from hf_vpt import METHODS
from hf_vpt.hub.card import ATTENTION_PICTURE, METRICS_FILE, update_model_card, write_model_card
from hf_vpt.plots import plot_attention, plot_prompt_distribution


METRICS = {
    "test_accuracy": 0.875,
    "test_mean_class_accuracy": 0.8,
    "validation_accuracy": 0.9,
    "validation_mean_class_accuracy": 0.85,
    "dataset_name": "vtab/dtd",
    "dataset_variant": "zip",
    "dataset_fingerprint": {"train": "abc", "validation": "def", "test": "fff"},
    "num_images": {"train": 800, "validation": 200, "test": 1880},
    "train_on_validation": False,
    "settings": {"learning_rate": 0.5, "num_virtual_tokens": 7, "ema_decay": None, "bf16": False},
    "seed": 3,
    "num_train_epochs": 100.0,
    "max_steps": 2500,
    "global_batch_size": 64,
    "num_processes": 2,
    "preprocessing": "published",
    "augmentation": "none",
    "versions": {"torch": "2.15.0"},
}


def save(folder, name="vpt_deep", **overrides):
    model = get_peft_model(BACKBONES["vit"].build(), ADAPTERS[name].config(2, **overrides))
    model.save_pretrained(folder)
    return model


def test_a_saved_adapter_has_a_card_with_what_it_is_and_the_lines_that_use_it(adapter, tmp_path):
    model = get_peft_model(BACKBONES["vit"].build(), adapter.config(2, label_names=["ant", "bee"]))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # again: it is written anew, not added to
    text, data = (tmp_path / "README.md").read_text(), ModelCard.load(tmp_path / "README.md").data
    config = METHODS[adapter.method]
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "image-classification", "unknown")
    assert set(data.tags) == {"hf_vpt", "visual-prompt-tuning", config.title.lower(), f"arxiv:{config.paper}"}
    assert text.count("import hf_vpt\n") == 2 and "load_image_classifier" in text
    assert "ant, bee" in text and "to tell 2 classes apart" in text
    prompts = sum(p.numel() for n, p in model.named_parameters() if "_prompts" in n)
    prompts += sum(b.numel() for n, b in model.named_buffers() if "_prompts" in n)
    assert f"holds {prompts:,} numbers of the adapter and 34 of the head" in text
    assert "More Information Needed" not in text


def test_scores_settings_and_versions_come_from_the_run_beside_it(tmp_path):
    save(tmp_path)
    (tmp_path / METRICS_FILE).write_text(json.dumps(METRICS))
    write_model_card(tmp_path, "me/dtd", license="mit")
    text, data = (tmp_path / "README.md").read_text(), ModelCard.load(tmp_path / "README.md").data
    for said in (
        'load_image_classifier("me/dtd")',
        "| validation | 200 | 90.00% | 85.00% |",
        "| test | 1880 | 87.50% | 80.00% |",
        "seed 3, on vtab/dtd, variant zip",
        "test `fff`",
        "- learning_rate: 0.5",
        "- num_virtual_tokens: 7",
        "- preprocessing: published",
        "On 800 train images",
        "torch 2.15.0",
    ):
        assert said in text
    assert "ema_decay" not in text and "bf16" not in text
    assert data.license == "mit" and data.model_name == "dtd"
    results = {result.metric_type: result for result in data.eval_results}
    assert results["accuracy"].metric_value == 0.875 and results["mean_class_accuracy"].metric_value == 0.8
    assert results["accuracy"].metric_name == "Accuracy (seed 3, zip)"
    assert (results["accuracy"].dataset_type, results["accuracy"].dataset_split) == ("vtab/dtd", "test")


def test_a_card_keeps_its_licence_and_names_a_base_model_of_the_hub_but_no_folder(tmp_path):
    save(tmp_path)
    write_model_card(tmp_path, license="mit")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for base, known in (("google/vit-base", True), (str(tmp_path), False), ("demo", False)):
        changed = config | {"base_model_name_or_path": base, "revision": "abc123"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        write_model_card(tmp_path)
        text, data = (tmp_path / "README.md").read_text(), ModelCard.load(tmp_path / "README.md").data
        assert data.license == "mit"
        assert (data.base_model == base) is known
        assert ("base_model:adapter:google/vit-base" in data.tags) is known
        assert str(tmp_path.parent) not in text and "revision abc123" in text


def test_a_card_of_somebodys_own_is_left_alone(tmp_path):
    update_model_card(tmp_path)
    assert not list(tmp_path.iterdir())
    save(tmp_path)
    own = (tmp_path / "README.md").read_text().replace("<!-- Written by hf_vpt", "<!-- Mine") + "My words.\n"
    (tmp_path / "README.md").write_text(own)
    save(tmp_path)
    assert "<!-- Mine" in (tmp_path / "README.md").read_text() and "My words." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("names", [("default", "second"), ("first", "second")])
def test_adapters_in_subfolders_are_told_of(names, tmp_path):
    model = get_peft_model(BACKBONES["vit"].build(), ADAPTERS["vpt_deep"].config(2), adapter_name=names[0])
    model.add_adapter(names[1], ADAPTERS["vpt_deep"].config(2))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert '- `subfolder="second"`' in text and "More Information Needed" not in text
    assert ('load_image_classifier("user/name", subfolder="first")' in text) is (names[0] == "first")


def test_pictures_that_lie_in_the_folder_are_shown(tmp_path):
    model = save(tmp_path)
    plot_attention(model, torch.randn(2, 3, 32, 48), tmp_path / ATTENTION_PICTURE)
    write_model_card(tmp_path)
    assert f"]({ATTENTION_PICTURE})" in (tmp_path / "README.md").read_text()
    assert "prompt_distribution.png" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("key", ["vit", "swin", "dinov2"])
def test_attention_is_drawn_of_any_backbone_and_leaves_the_model_as_it_was(key, tmp_path):
    backbone = BACKBONES[key]
    model = get_peft_model(backbone.build(), ADAPTERS["vpt_deep"].config(2, backbone)).train()
    implementation = model.config._attn_implementation
    plot_attention(model, torch.randn(2, 3, 32, 48), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert model.training and model.config._attn_implementation == implementation


def test_the_distribution_of_prompts_is_drawn(tmp_path):
    rounds = [{"distribution": [2, 2, 2]}, {"distribution": [1, 2, 3]}]
    plot_prompt_distribution(rounds, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_names_from_elsewhere_are_text_and_nothing_else(tmp_path):
    names = ["<script>x</script>", "a\n# heading", "[link](http://x)", "`code`", "\x1b[31m", "long" * 100]
    save(tmp_path, label_names=names)
    text = (tmp_path / "README.md").read_text()
    assert "<script>" not in text and "\n# heading" not in text and "[link]" not in text and "\x1b" not in text
    assert "\\<script\\>" in text and "long" * 26 not in text


def test_files_of_others_beside_an_adapter_stop_no_saving(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"accuracy": 1}')
    (tmp_path / "README.md").write_bytes(b"\xff\xfe# Not UTF-8\n")
    update_model_card(tmp_path / "adapter")
    save(tmp_path / "adapter")
    assert (tmp_path / "README.md").read_bytes().startswith(b"\xff\xfe")
    shutil.copy(tmp_path / METRICS_FILE, tmp_path / "adapter")
    write_model_card(tmp_path / "adapter")
    assert "## Scores" not in (tmp_path / "adapter" / "README.md").read_text()
