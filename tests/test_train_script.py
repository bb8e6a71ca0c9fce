"""The training script as users start it: plainly, through accelerate, and with two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from hf_vpt.training import parse_arguments, train_classifier


ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "scripts" / "train.py")
# The module, not the command, so that the script runs with the interpreter of the tests.
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration file for a tiny backbone and a folder of black and white images."""
    folder = tmp_path_factory.mktemp("run")
    set_seed(0)
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    ViTForImageClassification(vit).save_pretrained(folder / "backbone")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "backbone")
    for name, grey in (("black", 0), ("white", 225)):
        (folder / "images" / name).mkdir(parents=True)
        # 25 images a class leave 32 for training: batches of 8 come out even, so two processes pad nothing.
        for index in range(25):
            pixels = np.full((16, 16), grey + index, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{index}.png")
    path = folder / "config.yaml"
    path.write_text(
        f"method: vpt\nmodel_name_or_path: {folder}/backbone\ndataset_name: {folder}/images\nuse_cpu: true\n"
        "num_train_epochs: 2\nper_device_train_batch_size: 8\nlearning_rate: 1e-2\nnum_virtual_tokens: 3\n"
    )
    return path


def run(command, config, output_dir, *options):
    """Run the script with a command, and return what it printed and the metrics it wrote."""
    words = [*command, SCRIPT, "--config", str(config), "--output_dir", str(output_dir), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=output_dir.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((output_dir / "metrics.json").read_text())


def test_script_trains_with_python_and_options_override_the_file(config, tmp_path):
    printed, metrics = run([sys.executable], config, tmp_path / "out", "--seed", "7", "--num_virtual_tokens", "4")
    assert f"Saved in {tmp_path}/out" in printed
    assert f"Test accuracy {metrics['test_accuracy']:.4f}" in printed
    assert metrics["seed"] == 7
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["num_virtual_tokens"] == 4
    assert json.loads((tmp_path / "out" / "id2label.json").read_text()) == {"0": "black", "1": "white"}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "scoring"), [("vpt", None), ("provpt", "online")])
def test_two_processes_reach_the_weights_of_one(config, tmp_path, method, scoring):
    # Adam would turn rounding errors of gradients near zero into whole steps, hence SGD.
    options = ["--method", method, "--prompt_dropout", "0", "--optim", "sgd", "--no_load_best_model_at_end"]
    options += ["--num_train_epochs", "3", "--augmentation", "affine"]
    if method == "provpt":
        # Larger scores than the published one's, which the norm's eps all but cancels, so that rounding does not
        # decide what moves.
        options += ["--scoring", scoring, "--score", "attention"]
    one = train_classifier(parse_arguments(["--config", str(config), "--output_dir", str(tmp_path / "one"), *options]))
    printed, two = run(ACCELERATE, config, tmp_path / "two", *options, "--per_device_train_batch_size", "4")
    # Launched with other options, two processes on a CPU silently become one.
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert two["global_batch_size"] == one["global_batch_size"]
    assert printed.count("Test accuracy") == 1
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    if method == "provpt":
        blocks = [weights[0][name] for name in sorted(weights[0]) if name.endswith(".block")]
        assert any((block != index).any() for index, block in enumerate(blocks)), "no prompt has moved"
        rounds = [json.loads((tmp_path / name / "relocations.json").read_text()) for name in ("one", "two")]
        for name in ("prompt", "source", "target", "distribution"):
            assert [entry[name] for entry in rounds[0]] == [entry[name] for entry in rounds[1]]
    for name, expected in weights[0].items():
        np.testing.assert_allclose(weights[1][name], expected, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_two_processes_on_a_stream_reach_the_weights_of_one(config, tmp_path):
    options = ["--streaming", "--max_steps", "10", "--augmentation", "affine", "--shuffle_buffer_size", "10"]
    options += ["--prompt_dropout", "0", "--optim", "sgd", "--no_load_best_model_at_end"]
    one = train_classifier(parse_arguments(["--config", str(config), "--output_dir", str(tmp_path / "one"), *options]))
    printed, two = run(ACCELERATE, config, tmp_path / "two", *options, "--per_device_train_batch_size", "4")
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert "(step 10)" in printed
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    for name, expected in weights[0].items():
        np.testing.assert_allclose(weights[1][name], expected, rtol=1e-4, atol=1e-6, err_msg=name)
    assert two["num_images"] == one["num_images"]
