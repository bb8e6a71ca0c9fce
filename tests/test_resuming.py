"""A run that dies loses nothing: checkpoints are whole or passed over, and the run goes on to the same end."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import StopAt
from transformers import (
    PrinterCallback,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from hf_vpt.training import build_trainer, checkpoints, parse_arguments, train_classifier
from hf_vpt.training.checkpoints import find_checkpoints, is_complete, mark_complete, mark_incomplete
from hf_vpt.training.identity import RunIdentity
from hf_vpt.training.steps import STEPS_FILE


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options for a short run on the digits with a tiny backbone: 25 steps, a checkpoint after every fifth."""
    folder = tmp_path_factory.mktemp("backbone")
    set_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    words = f"--method provpt --scoring online --num_virtual_tokens 3 --model_name_or_path {folder} --use_cpu"
    words += " --per_device_train_batch_size 160 --per_device_eval_batch_size 400 --num_train_epochs 5"
    words += " --learning_rate 0.01 --disable_tqdm 1"
    return words.split()


def run(options, folder, *more):
    train_classifier(parse_arguments([*options, "--output_dir", str(folder), *more]))
    return [(folder / name).read_bytes() for name in ("adapter_model.safetensors", "metrics.json", "relocations.json")]


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-10"
    (folder / "ema").mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "ema" / "weights").write_bytes(b"123")
    mark_complete(folder)
    return folder


def test_a_marked_checkpoint_is_complete(checkpoint):
    assert is_complete(checkpoint)
    (checkpoint / "README.md").write_text("later additions do no harm")
    assert is_complete(checkpoint)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / "weights").write_bytes(b"123"),
        lambda folder: shutil.rmtree(folder / "ema"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"weights": 5,'),
        mark_incomplete,
        shutil.rmtree,
    ],
    ids=["file gone", "file cut off", "folder gone", "no mark", "mark cut off", "being written again", "gone"],
)
def test_a_checkpoint_that_lacks_something_is_not_complete(checkpoint, damage):
    damage(checkpoint)
    assert not is_complete(checkpoint)


def test_checkpoints_are_found_by_their_step_the_latest_first(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "other-11"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").write_text("no folder")
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize(
    "damaged", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "manifest.json"]
)
def test_a_half_written_checkpoint_is_passed_over_for_the_one_before_it(options, tmp_path, damaged, caplog):
    expected = run(options, tmp_path / "whole")
    more = ["--save_total_limit", "3"]
    run(options, tmp_path / "dead", *more)
    last, before = find_checkpoints(tmp_path / "dead")[:2]
    half = (last / damaged).read_bytes()
    (last / damaged).write_bytes(half[: len(half) // 2])
    for file in (tmp_path / "dead").glob("*.*"):
        file.unlink()
    assert not is_complete(last) and is_complete(before)
    assert run(options, tmp_path / "dead", *more, "--resume_from_checkpoint", "auto") == expected


def test_a_checkpoint_from_before_the_evaluation_at_the_end_of_its_epoch_leads_to_the_same_end(options, tmp_path):
    more = "--method vpt --prompt_dropout 0.5 --save_strategy steps --save_steps 5"
    options = [option for option in options if option not in ("--scoring", "online")]
    words = [
        *options,
        *more.split(),
        "--save_total_limit",
        "9",
        "--no_load_best_model_at_end",
        "--output_dir",
        str(tmp_path),
    ]
    results = []
    for resumed in ([], ["--resume_from_checkpoint", str(tmp_path / "checkpoint-5")]):
        results.append(train_classifier(parse_arguments([*words, *resumed])))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "words",
    [
        "--prompt_angle 0.1",
        "--prompt_angle 0.1 --prompt_final_angle 0.001 --lr_schedule_unit epoch",
        "--prompt_norm 0.5 --optim sgd --optim_args momentum=0.9",
        "--prompt_norm_floor 0.2 --weight_decay 10",
    ],
)
def test_prompts_that_turn_go_on_as_if_nothing_had_happened(options, tmp_path, words):
    words = [
        *words.split(),
        "--save_strategy",
        "steps",
        "--save_steps",
        "7",
        "--eval_strategy",
        "no",
        "--no_load_best_model_at_end",
    ]
    words += ["--record_steps"]
    undisturbed = run(options, tmp_path / "undisturbed", *words)
    trainer, _ = build_trainer(parse_arguments([*options, "--output_dir", str(tmp_path / "stopped"), *words]))
    trainer.add_callback(StopAt(14))
    trainer.train()
    assert run(options, tmp_path / "stopped", *words, "--resume_from_checkpoint", "last") == undisturbed
    steps = [(tmp_path / name / STEPS_FILE).read_text() for name in ("undisturbed", "stopped")]
    assert steps[0] == steps[1]


def test_a_checkpoint_of_a_version_without_angles_is_that_of_a_run_without_them(options, tmp_path):
    identity = RunIdentity(parse_arguments([*options, "--output_dir", str(tmp_path)]))
    older = {name: value for name, value in identity.state_dict().items() if not name.startswith("prompt_")}
    identity.load_state_dict(older)
    turning = RunIdentity(parse_arguments([*options, "--output_dir", str(tmp_path), "--prompt_angle", "0.1"]))
    with pytest.raises(ValueError, match="checkpoint made with prompt_angle None, and a run with prompt_angle 0.1"):
        turning.load_state_dict(older)


def test_without_a_checkpoint_auto_starts_anew(options, tmp_path):
    expected = run(options, tmp_path / "whole")
    assert run(options, tmp_path / "new", "--resume_from_checkpoint", "auto") == expected


def test_older_checkpoints_stay_until_the_new_one_is_whole(options, tmp_path, monkeypatch):
    original = checkpoints.save_callbacks
    calls = []

    def die_at_the_third(callbacks, folder):
        calls.append(folder)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(callbacks, folder)

    monkeypatch.setattr("hf_vpt.training.trainer.save_callbacks", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(options, tmp_path, "--save_total_limit", "1", "--no_load_best_model_at_end", "--eval_strategy", "no")
    assert {folder.name: is_complete(folder) for folder in find_checkpoints(tmp_path)} == {
        "checkpoint-10": True,
        "checkpoint-15": False,
    }


def test_a_checkpoint_runs_no_code_of_its_own(options, tmp_path):
    run(options, tmp_path, "--num_train_epochs", "2", "--save_total_limit", "3")
    folder, _ = find_checkpoints(tmp_path)
    torch.save({"RelocationCallback": [Path("anything")]}, folder / "callbacks.pt")
    mark_complete(folder)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        run(options, tmp_path, "--resume_from_checkpoint", str(folder))


def test_trainer_itself_passes_over_half_written_checkpoints(options, tmp_path):
    words = [*options, "--output_dir", str(tmp_path), "--save_total_limit", "3"]
    trainer, _ = build_trainer(parse_arguments(words))
    trainer.train()
    last, before = find_checkpoints(tmp_path)[:2]
    mark_incomplete(last)
    trainer, _ = build_trainer(parse_arguments(words))
    steps = []
    trainer.add_callback(NoteSteps(steps))
    trainer.train(resume_from_checkpoint=True)
    assert steps[0] == int(before.name.removeprefix("checkpoint-")) + 1
    mark_incomplete(before)
    with pytest.raises(ValueError, match=r"checkpoint-\d+' was not written to its end.*all of a checkpoint.*'last'"):
        trainer.train(resume_from_checkpoint=str(before))


class NoteSteps(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


class Counter(TrainerCallback):
    """A callback with a state."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_two_callbacks_of_one_class_keep_their_own_states(tmp_path):
    checkpoints.save_callbacks([Counter(1), PrinterCallback(), Counter(torch.tensor(2))], tmp_path)
    restored = [Counter(0), Counter(0), Counter(5)]
    checkpoints.load_callbacks(restored, tmp_path)
    assert [counter.value for counter in restored] == [1, 2, 5]


def test_a_state_that_could_not_be_read_again_is_an_error_when_it_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"callbacks \['Counter'\].*numbers, strings and tensors.*change what"):
        checkpoints.save_callbacks([Counter(Path("anything"))], tmp_path)


def test_checkpoints_know_how_many_of_them_are_to_be_kept(options, tmp_path):
    run(options, tmp_path, "--num_train_epochs", "2", "--save_total_limit", "3")
    folder, _ = find_checkpoints(tmp_path)
    assert torch.load(folder / "training_args.bin", weights_only=False).save_total_limit == 3


@pytest.mark.parametrize(
    "changed", ["--split_seed 3", "--validation_fraction 0.3", "--method vpt", "--dataset_name elsewhere"]
)
def test_a_run_goes_on_only_with_the_data_and_the_method_it_began_with(options, tmp_path, changed):
    name, value = changed.removeprefix("--").split()
    run(options, tmp_path, "--num_train_epochs", "2")
    settings = parse_arguments(options)
    for part in (settings.model, settings.data):
        if hasattr(part, name):
            setattr(part, name, type(getattr(part, name))(value))
    identity = RunIdentity(settings)
    with pytest.raises(ValueError, match=rf"made with {name} \S+, and a run with {name} {value}.*another output_dir"):
        checkpoints.load_callbacks([identity], find_checkpoints(tmp_path)[0])


def test_another_division_of_the_data_is_refused_before_training(options, tmp_path):
    run(options, tmp_path, "--num_train_epochs", "2")
    with pytest.raises(ValueError, match="split_seed 0, and a run with split_seed 3"):
        run(options, tmp_path, "--split_seed", "3", "--resume_from_checkpoint", "auto")
    # Lengths may change.
    run(options, tmp_path, "--num_train_epochs", "3", "--resume_from_checkpoint", "auto")


@pytest.mark.parametrize(
    "changed",
    ["--seed 1", "--learning_rate 0.5", "--weight_decay 0.1", "--prompt_dropout 0.2", "--num_virtual_tokens 2"]
    + ["--augmentation affine", "--optim sgd", "--metric_for_best_model loss"],
)
def test_results_never_tell_of_settings_that_a_checkpoint_was_not_trained_with(options, tmp_path, changed):
    # A seed or a rate of its own comes back with a checkpoint, so those asked for would have had no effect.
    run(options, tmp_path, "--num_train_epochs", "2")
    name = changed.removeprefix("--").partition(" ")[0]
    with pytest.raises(ValueError, match=f"checkpoint made with {name} .*, and a run with {name} .*the old settings"):
        run(options, tmp_path, *changed.split(), "--resume_from_checkpoint", "auto")


def test_seconds_of_a_run_that_went_on_are_told_to_be_part_of_it(options, tmp_path):
    for more, is_whole in ((["--num_train_epochs", "2"], True), (["--resume_from_checkpoint", "auto"], False)):
        run(options, tmp_path, *more)
        assert json.loads((tmp_path / "timings.json").read_text())["is_whole"] is is_whole


def test_a_checkpoint_that_does_not_exist_is_an_error_that_says_so(options, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'.*'last' or 'auto'"):
        run(options, tmp_path, "--resume_from_checkpoint", "nowhere")


def test_processes_that_would_train_alone_in_one_folder_are_refused(options, tmp_path, monkeypatch):
    settings = parse_arguments([*options, "--output_dir", str(tmp_path)])
    assert settings.training.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes of which each would train alone.*add --use_cpu"):
        build_trainer(settings)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_runs_that_go_on_end_as_one_that_was_left_alone(options, tmp_path):
    words = [sys.executable, str(ROOT / "scripts" / "kill_and_resume.py"), "--kills", "4"]
    words += ["--folder", str(tmp_path / "runs"), *options, "--save_strategy", "steps", "--save_steps", "2"]
    done = subprocess.run([*words, "--eval_strategy", "steps", "--eval_steps", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "4 kills, 4 equal endings" in done.stdout
    assert json.loads((tmp_path / "runs" / "undisturbed" / "metrics.json").read_text())["method"] == "provpt"
