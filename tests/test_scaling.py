"""Several processes learn what one does, however they share the work, and the configurations for it are right."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from packaging.version import Version
from peft import PeftModel
from PIL import Image
from safetensors.numpy import load_file
from train_many import train_many
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

import hf_vpt  # noqa: F401 (tells PEFT about the methods)
from hf_vpt.training import experiment, parse_arguments, train_classifier
from hf_vpt.training.sharding import FIRST_ACCELERATE, shard_blocks
from hf_vpt.tuners import METHODS


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "accelerate"
# The module, not the command, so that the script runs with the interpreter of the tests.
# Any free port: tests run beside one another.
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--main_process_port", "0")

# Whatever is drawn at random while training differs between processes, so all dropouts are off. The scores of
# attention are larger than the published one's, which the norm's eps all but cancels, so that rounding does not
# decide what moves.
CASES = {
    "vpt": "--method vpt --num_virtual_tokens 3 --prompt_dropout 0",
    "vpt_projected": "--method vpt --num_virtual_tokens 3 --prompt_dropout 0 --projection_dim 4",
    "vpt_shallow": "--method vpt --num_virtual_tokens 3 --prompt_dropout 0 --deep false",
    # Fewer rows than processes: one of them has an empty share.
    "vpt_one_prompt": "--method vpt --num_virtual_tokens 1 --prompt_dropout 0 --optim adamw_torch",
    "vpt_turning": "--method vpt --num_virtual_tokens 3 --prompt_dropout 0 --prompt_angle 0.1",
    "vapt": "--method vapt --num_virtual_tokens 3 --prompt_dropout 0 --channel_dropout 0 --projector_dropout 0",
    "provpt": "--method provpt --num_virtual_tokens 3 --prompt_dropout 0 --score attention",
    "provpt_online": "--method provpt --num_virtual_tokens 3 --prompt_dropout 0 --score attention --scoring online",
    "bpt": "--method bpt --num_virtual_tokens 3 --prompt_dropout 0 --rank 4",
    "bpt_turning": "--method bpt --num_virtual_tokens 3 --prompt_dropout 0 --rank 4 --prompt_angle 0.1",
    "bpt_whitened": "--method bpt --num_virtual_tokens 3 --prompt_dropout 0 --rank 4 --basis twhiten",
    # What flows beside the tokens is no output of a block, which is what FSDP looks at.
    "swin_shallow": "--method vpt --num_virtual_tokens 3 --prompt_dropout 0 --deep false --model_name_or_path SWIN",
    "linear_probe": "--method linear_probe",
}
WITH_CHECKPOINTS = ("vpt", "vpt_one_prompt")
WITHOUT_CHECKPOINTS = "--save_strategy no --eval_strategy no --no_load_best_model_at_end"
BEGUN = "--method vpt --num_virtual_tokens 3 --prompt_dropout 0 --lr_scheduler_type constant --optim_args momentum=0.9"


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """Words of a command line for a tiny backbone and a folder of black and white images."""
    folder = tmp_path_factory.mktemp("common")
    set_seed(0)
    vit = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        initializer_range=0.2,
    )
    ViTForImageClassification(vit).save_pretrained(folder / "backbone")
    swin = SwinConfig(
        embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2, mlp_ratio=2.0, image_size=16, patch_size=2
    )
    SwinForImageClassification(swin).save_pretrained(folder / "swin")
    for name in ("backbone", "swin"):
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / name)
    for name, grey in (("black", 0), ("white", 225)):
        (folder / "images" / name).mkdir(parents=True)
        # 25 images a class leave 32 for training: batches of 8 come out even, so two processes pad nothing.
        for index in range(25):
            pixels = np.full((16, 16), grey + index, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{index}.png")
    # Adam would turn rounding errors of gradients near zero into whole steps, hence SGD.
    return (
        f"--model_name_or_path {folder}/backbone --dataset_name {folder}/images --use_cpu --disable_tqdm=1 "
        "--num_train_epochs 3 --learning_rate 1e-1 --optim sgd"
    )


def lines(common, folder, batch_size):
    """The command lines of all cases, with outputs in `folder`."""
    words = {name: f"{options} --output_dir {folder}/{name}" for name, options in CASES.items()}
    # Checkpoints take the time; two cases keep them, and load the best in the end.
    words = {
        name: options if name in WITH_CHECKPOINTS else f"{options} {WITHOUT_CHECKPOINTS}"
        for name, options in words.items()
    }
    words["begun"] = f"{BEGUN} --output_dir {folder}/resumed --num_train_epochs 1"
    words["resumed"] = f"{BEGUN} --output_dir {folder}/resumed --resume_from_checkpoint last"
    batch = f"--per_device_train_batch_size {batch_size}"
    swin = str(Path(common.split()[1]).parent / "swin")
    return {
        name: [*common.split(), *batch.split(), *options.replace("SWIN", swin).split()]
        for name, options in words.items()
    }


@pytest.fixture(scope="module")
def one_process(common, tmp_path_factory):
    """Folder of what one process has learned in each case, and the results."""
    folder = tmp_path_factory.mktemp("one")
    return folder, train_many(lines(common, folder, 8))


def environment():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    return os.environ | variables


def launch(config, common, folder, *options, without=()):
    """Train the cases in two processes with half the batch each; return the results."""
    file = folder / "cases.json"
    cases = {name: words for name, words in lines(common, folder, 4).items() if name not in without}
    file.write_text(json.dumps(cases))
    words = [
        *LAUNCH,
        "--config_file",
        str(CONFIGS / f"{config}.yaml"),
        str(ROOT / "tests" / "train_many.py"),
        str(file),
        *options,
    ]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "cases.json.results").read_text())


def assert_same_as_one_process(folder, results, one_process):
    expected_folder, expected_results = one_process
    for name in results.keys() - {"kind"}:
        expected, actual = expected_results[name], results[name]
        # Launched with other options, two processes on a CPU silently become one.
        assert (expected["num_processes"], actual["num_processes"]) == (1, 2), name
        for key in ("global_batch_size", "trained_parameters", "trained_parameters_without_head", "test_accuracy"):
            assert actual[key] == expected[key], f"{name}: {key}"
    files = sorted(path.relative_to(folder) for path in folder.glob("*/*model.safetensors"))
    assert len(files) == len(results) - 2  # the resumed run has one file and two results
    for file in files:
        expected, actual = load_file(expected_folder / file), load_file(folder / file)
        assert actual.keys() == expected.keys(), file
        for key, value in expected.items():
            np.testing.assert_allclose(actual[key], value, rtol=1e-5, atol=1e-5, err_msg=f"{file}: {key}")


def load_adapter(common, folder):
    path = common.split()[1]
    model = ViTForImageClassification.from_pretrained(path, num_labels=2)
    return PeftModel.from_pretrained(model, folder).eval()


def test_training_has_changed_what_is_compared(common, one_process):
    folder, _ = one_process
    one, two = (load_file(folder / name / "adapter_model.safetensors") for name in ("vpt", "resumed"))
    # The same start, other learning rates.
    for name, value in one.items():
        assert np.abs(value - two[name]).max() > 5e-4, name
    moved = load_file(folder / "provpt" / "adapter_model.safetensors")
    blocks = [moved[name] for name in sorted(moved) if name.endswith(".block")]
    assert any((block != index).any() for index, block in enumerate(blocks)), "no prompt has moved"


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one_with_every_method(common, one_process, tmp_path):
    results = launch("cpu_two_processes", common, tmp_path)
    assert_same_as_one_process(tmp_path, results, one_process)


@pytest.mark.slow
@pytest.mark.skipif(Version(accelerate.__version__) < FIRST_ACCELERATE, reason="needs a newer Accelerate")
def test_a_backbone_shared_out_with_fsdp_learns_what_a_whole_one_does(common, one_process, tmp_path):
    results = launch("fsdp2", common, tmp_path, "--emulate_gpus")
    # Accelerate drops FSDP on a CPU and says nothing.
    assert results["kind"] == "DistributedType.FSDP"
    assert_same_as_one_process(tmp_path, results, one_process)
    images = torch.randn(2, 3, 16, 16)
    for method in METHODS:
        logits = [load_adapter(common, folder / method)(images).logits for folder in (one_process[0], tmp_path)]
        torch.testing.assert_close(*logits)


@pytest.mark.slow
def test_two_machines_learn_what_one_process_does(common, tmp_path):
    # Both are this one, with a process each.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {port}".split()
    script = str(ROOT / "scripts" / "train.py")
    words = lines(common, tmp_path, 4)["vpt"]
    command = [*LAUNCH, "--config_file", str(CONFIGS / "multi_node.yaml"), *options]
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), script, *words],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for machine in machines:
        _, errors = machine.communicate(timeout=300)
        assert machine.returncode == 0, errors[-3000:]
    metrics = json.loads((tmp_path / "vpt" / "metrics.json").read_text())
    assert metrics["num_processes"] == 2
    # The script as it is draws the prompts after loading, where `train_many` sets the seed anew.
    one = train_classifier(parse_arguments([*lines(common, tmp_path / "one", 8)["vpt"]]))
    assert one["num_processes"] == 1
    expected, actual = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("one/vpt", "vpt"))
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_adapters_under_fsdp_need_an_accelerate_that_loads_their_checkpoints(common, tmp_path, monkeypatch):
    trainer, _ = experiment.build_trainer(parse_arguments(lines(common, tmp_path, 8)["vpt"]))
    monkeypatch.setattr(accelerate, "__version__", "1.14.0")
    with pytest.raises(ImportError, match=r"Accelerate 1\.14\.0 and an adapter.*from 1\.15\.0 on.*pip install"):
        shard_blocks(trainer.model, trainer.accelerator)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_learns_what_one_process_does(common, one_process, tmp_path, stage):
    pytest.importorskip("deepspeed")
    results = launch(
        f"deepspeed_zero{stage}", common, tmp_path, without=["provpt", "provpt_online", "vpt_turning", "bpt_turning"]
    )
    assert results["kind"] == "DistributedType.DEEPSPEED"
    assert_same_as_one_process(tmp_path, results, one_process)


def test_prompts_that_move_and_deepspeed_are_an_error_that_names_what_to_launch(common, tmp_path, monkeypatch):
    trainer_cls = experiment.ImageClassificationTrainer
    create = trainer_cls.create_accelerator_and_postprocess

    def create_with_deepspeed(self):
        create(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(trainer_cls, "create_accelerator_and_postprocess", create_with_deepspeed)
    words = lines(common, tmp_path, 8)["provpt"]
    with pytest.raises(ValueError, match=r"PRO-VPT and DeepSpeed.*needs one process.*configs/accelerate/ddp\.yaml"):
        experiment.build_trainer(parse_arguments(words))


@pytest.mark.parametrize(
    ("settings", "is_quantized", "message"),
    [
        ({"fsdp_version": 1}, False, r"FSDP of version 1.*need FSDP2.*fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, False, r"only one process has the weights.*efficient_loading: false"),
        ({}, True, r"quantised backbone and FSDP.*either quantised or shared out.*ddp\.yaml"),
    ],
)
def test_what_fsdp_cannot_share_out_is_an_error_that_names_the_setting(common, settings, is_quantized, message):
    plugin = SimpleNamespace(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False} | settings)
    model = ViTForImageClassification.from_pretrained(common.split()[1])
    model.is_quantized = is_quantized
    with pytest.raises(ValueError, match=message):
        shard_blocks(model, SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_is_one_of_accelerates_and_says_when_to_use_it(path):
    config = load_config_from_file(str(path))  # unknown keys are an error
    kind = {"fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED" if "deepspeed" in path.stem else "MULTI_GPU")
    assert config.distributed_type == kind
    assert config.num_processes >= 2
    text = path.read_text()
    assert "# Command: " in text
    assert f"configs/accelerate/{path.name}" in text


def test_multi_node_configuration_counts_the_processes_of_all_machines():
    config = load_config_from_file(str(CONFIGS / "multi_node.yaml"))
    assert config.num_machines == 2
    assert config.num_processes % config.num_machines == 0
    assert config.main_process_ip


def test_nothing_in_the_package_knows_how_many_machines_there_are():
    for path in (ROOT / "hf_vpt").rglob("*.py"):
        for word in ("LOCAL_RANK", "SLURM", "num_machines", "MASTER_ADDR", "cuda:0"):
            assert word not in path.read_text(), f"{path}: {word}"
