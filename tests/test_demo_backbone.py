import json
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from hf_vpt.data.digits import load_digits
from hf_vpt.demo import demo_backbone_path


@pytest.fixture(scope="module")
def backbone():
    return AutoModel.from_pretrained(demo_backbone_path(), add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def digits():
    processor = AutoImageProcessor.from_pretrained(demo_backbone_path())
    return {
        name: (processor(list(split["image"]), return_tensors="pt")["pixel_values"], list(split["label"]))
        for name, split in load_digits().items()
    }


@torch.no_grad()
def probe(model, digits):
    """Accuracy on the validation digits of a logistic regression on the CLS features of 300 training digits."""

    def features(pixels):
        # Small batches stay in the cache of a CPU.
        return torch.cat([model(pixel_values=part).last_hidden_state[:, 0] for part in pixels.split(50)]).numpy()

    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    head.fit(features(digits["train"][0][:300]), digits["train"][1][:300])
    return head.score(features(digits["validation"][0]), digits["validation"][1])


def test_the_classifier_loads_in_float32_and_only_its_head_is_new():
    model, info = AutoModelForImageClassification.from_pretrained(
        demo_backbone_path(), num_labels=10, output_loading_info=True
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]


def test_the_model_and_its_file_are_small(backbone):
    assert backbone.num_parameters() <= 3_000_000
    assert Path(demo_backbone_path(), "model.safetensors").stat().st_size <= 6 * 2**20


def test_the_config_carries_no_labels_of_the_drawn_classes():
    assert "id2label" not in json.loads(Path(demo_backbone_path(), "config.json").read_text())


def test_the_processor_enlarges_grey_digits_to_32_by_32_colour(digits):
    pixels, _ = digits["train"]
    assert pixels.shape == (800, 3, 32, 32)
    assert pixels.min() >= -1 and pixels.max() <= 1


def test_frozen_features_of_digits_clearly_beat_those_of_a_random_model(backbone, digits):
    torch.manual_seed(0)
    random = AutoModel.from_config(AutoConfig.from_pretrained(demo_backbone_path()), add_pooling_layer=False).eval()
    assert probe(backbone, digits) > probe(random, digits) + 0.1
