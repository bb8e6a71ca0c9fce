"""A sweep keeps to the published protocol: it chooses on validation images, and tests once, at the end."""

import json
import math
import time

import numpy as np
import optuna
import pytest
import torch
from conftest import PROCESSES
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from transformers import TrainerState, ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from hf_vpt.data.decoding import BrokenImageError
from hf_vpt.report import group_rows, read_runs
from hf_vpt.sweep import PUBLISHED_GRID, Claim, Ledger, ledger, parse_sweep, protocol, run_sweep, runs
from hf_vpt.training import (
    BASELINES,
    ImageClassificationTrainer,
    SharedLoader,
    build_trainer,
    experiment,
    parse_arguments,
    shared,
    train_classifier,
)
from hf_vpt.training.checkpoints import find_checkpoints, is_complete
from hf_vpt.training.record import describe_settings
from hf_vpt.tuners import METHODS


SPACE = "--search_space"
GRID = [SPACE, "learning_rate=0.3,0.0001", "num_virtual_tokens=1,3"]
FINAL_SEEDS = ["--final_seeds", "0", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny backbone with dropout, and 24 + 12 + 12 images of three greys; test images may be broken."""
    folder = tmp_path_factory.mktemp("sweep")
    set_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(folder / "backbone")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "backbone")
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "emu"])})
    generator = np.random.default_rng(0)

    def split(num_images, broken=False):
        labels = [index % 3 for index in range(num_images)]
        pixels = [(80 * label + generator.integers(0, 90, (16, 16))).astype(np.uint8) for label in labels]
        images = [{"bytes": b"broken", "path": None} if broken else PILImage.fromarray(p) for p in pixels]
        return Dataset.from_dict({"image": images, "label": labels}, features=features)

    whole = DatasetDict(train=split(24), validation=split(12), test=split(12))
    whole.save_to_disk(folder / "images")
    DatasetDict(whole | {"test": split(12, broken=True)}).save_to_disk(folder / "unreadable")
    return folder


def make_words(folder, tmp_path):
    words = f"--method vpt --model_name_or_path {folder}/backbone --dataset_name {folder}/images --use_cpu"
    words += f" --output_dir {tmp_path}/out --per_device_train_batch_size 8 --num_train_epochs 3"
    return words.split()


@pytest.fixture
def words(folder, tmp_path):
    return make_words(folder, tmp_path)


def sweep(words, *options):
    lines = []
    return run_sweep(parse_sweep([*words, *GRID, *FINAL_SEEDS, *options]), lines.append), lines


@pytest.fixture(scope="module")
def swept(folder, tmp_path_factory):
    """A whole sweep: its words, results, lines, and what was loaded and scored in which order."""
    words, events = make_words(folder, tmp_path_factory.mktemp("swept")), []
    evaluate = ImageClassificationTrainer.evaluation_loop

    def record_scores(self, *args, **kwargs):
        events.append(kwargs.get("metric_key_prefix"))
        return evaluate(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageClassificationTrainer, "evaluation_loop", record_scores)
        for name in ("load_image_dataset", "load_classifier"):
            original = getattr(shared, name)

            def record_loads(*args, original=original, name=name, **kwargs):
                events.append(name)
                return original(*args, **kwargs)

            patch.setattr(shared, name, record_loads)
            patch.setattr(experiment, name, None)
        results, lines = sweep(words)
    return words, results, lines, events


def test_a_sweep_chooses_on_validation_and_reports_every_run(swept):
    words, results, lines, _ = swept
    out = parse_sweep([*words, *GRID]).folder
    assert json.loads((out / "results.json").read_text()) == results
    assert results["complete"] and results["search_space"] == {
        "learning_rate": [0.3, 1e-4],
        "num_virtual_tokens": [1, 3],
    }
    trials = results["trials"]
    points = [(trial["settings"]["learning_rate"], trial["settings"]["num_virtual_tokens"]) for trial in trials]
    assert points == [(0.3, 1), (0.3, 3), (1e-4, 1), (1e-4, 3)]
    assert all("test" not in name for trial in trials for name in trial["scores"])
    scores = [trial["value"] for trial in trials]
    assert len(set(scores)) > 1, "nothing to choose"
    assert results["choice"]["trial"] == scores.index(max(scores))
    assert results["choice"]["settings"] == trials[scores.index(max(scores))]["settings"]
    # All images are trained on, to the last epoch.
    assert [run["seed"] for run in results["final"]] == [0, 5]
    for run in results["final"]:
        metrics = run["metrics"]
        assert metrics == json.loads((out / "final" / f"seed{run['seed']}" / "metrics.json").read_text())
        assert metrics["num_images"] == {"train": 36, "validation": 12, "test": 12}
        assert metrics["best_epoch"] == 3 and not [name for name in metrics if name.startswith("validation")]
        assert metrics["seed"] == run["seed"]
    accuracies = [run["metrics"]["test_accuracy"] for run in results["final"]]
    assert results["test"]["test_accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert results["test"]["test_accuracy"]["std"] == pytest.approx(np.std(accuracies, ddof=1))
    # One checkpointed trial is left, the best one.
    kept = [path.name for path in sorted((out / "trials").iterdir()) if find_checkpoints(path)]
    assert kept == [str(results["choice"]["trial"])]
    assert not any(find_checkpoints(path) for path in (out / "final").iterdir())
    assert [line.partition(" ")[0] for line in lines if line.startswith("[")] == [
        *("[1/4]", "[2/4]", "[3/4]", "[4/4]", "[1/2]", "[2/2]")
    ]
    assert "best so far" in lines[1] and "left" in lines[1]


def test_a_report_reads_the_final_runs_of_a_sweep_as_one_row(swept):
    words, results, *_ = swept
    runs_read, left_out = read_runs([parse_sweep([*words, *GRID]).folder])
    (row,) = group_rows(runs_read)
    assert not left_out and (row.name, row.seeds, row.num_trials) == ("VPT-Deep", [0, 5], 4)
    assert row.mean == pytest.approx(100 * results["test"]["test_accuracy"]["mean"])
    assert row.std == pytest.approx(100 * results["test"]["test_accuracy"]["std"])
    assert row.timing("train_seconds") > 0
    recorded = row.runs[0].metrics["settings"]
    assert recorded.items() >= {**results["choice"]["settings"], "deep": True, "weight_decay": 0.0}.items()
    assert "target_modules" not in recorded and "token_dim" not in recorded


def test_a_finished_sweep_runs_nothing_again(swept, monkeypatch):
    words, first, *_ = swept
    monkeypatch.setattr(runs, "build_trainer", None)
    monkeypatch.setattr(runs, "train_classifier", None)
    assert sweep(words)[0] == first


def test_trials_never_look_at_the_test_split(words, folder, monkeypatch):
    # Every image of this one is unreadable, so whoever looks at it fails.
    words = [*words, "--dataset_name", f"{folder}/unreadable"]
    asked = []
    original = runs.run_final

    def record(*args):
        asked.append("final")
        return original(*args)

    monkeypatch.setattr(protocol, "run_final", record)
    plan = parse_sweep([*words, *GRID, *FINAL_SEEDS])
    lines = []
    with pytest.raises(BrokenImageError):
        run_sweep(plan, lines.append)
    assert asked == ["final"] and any(line.startswith("[4/4]") for line in lines)
    with pytest.raises(BrokenImageError):
        train_classifier(parse_arguments([*words, "--disable_tqdm", "1"]))  # a single run does look


def test_the_test_split_is_looked_at_once_for_each_final_seed_and_after_all_else(swept):
    scores = [event for event in swept[3] if not event.startswith("load")]
    assert scores == ["eval", "eval", "eval", "validation"] * 4 + ["test", "test"]


def test_the_data_set_and_the_backbone_are_loaded_once(swept):
    loads = [event for event in swept[3] if event.startswith("load")]
    # For the final runs validation images are joined to train, and the head of each seed is drawn anew.
    assert loads == ["load_image_dataset", "load_classifier", "load_image_dataset", *2 * ["load_classifier"]]


def test_trials_and_final_runs_are_those_of_the_training_script(swept, tmp_path):
    words, results, *_ = swept
    alone = [*words, "--disable_tqdm", "1"]
    for number in (0, 3):  # the backbone is loaded for the first, and copied for the last
        trial = results["trials"][number]
        options = [f"--{name}={value}" for name, value in trial["settings"].items()]
        metrics = train_classifier(parse_arguments([*alone, *options, f"--output_dir={tmp_path}/alone{number}"]))
        assert trial["best_epoch"] == metrics["best_epoch"]
        for name, value in trial["scores"].items():
            assert metrics[name] == value, name
    options = [f"--{name}={value}" for name, value in results["choice"]["settings"].items()]
    options += ["--train_on_validation", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--seed", "5"]
    metrics = train_classifier(parse_arguments([*alone, *options, f"--output_dir={tmp_path}/final"]))
    assert metrics == results["final"][1]["metrics"]


def test_a_shared_backbone_draws_what_one_of_its_own_draws(words):
    settings = [parse_arguments([*words, "--disable_tqdm", "1", "--seed", seed]) for seed in ("1", "1", "2", "1")]
    loader = SharedLoader()
    for own in settings:
        expected, found = (build_trainer(own, source)[0].model.state_dict() for source in (None, loader))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        with torch.no_grad():
            for value in found.values():
                value.zero_()  # as training would change them


def sweep_on_one_thread(words):
    torch.set_num_threads(1)
    sweep(words)


def run_in_a_process(words, folder):
    process = PROCESSES.Process(target=sweep_on_one_thread, args=([*words, "--output_dir", str(folder)],))
    process.start()
    return process


def without_times(results):
    return {
        **results,
        "study_name": None,
        "trials": [{**trial, "seconds": None, "attempts": None} for trial in results["trials"]],
        "final": [{**run, "seconds": None, "attempts": None, "timings": None} for run in results["final"]],
    }


@pytest.mark.slow
def test_a_sweep_that_is_killed_while_it_trains_goes_on_from_the_checkpoint_to_the_same_end(words, tmp_path):
    words = [*words, "--num_train_epochs", "12"]
    optuna.storages.RDBStorage("sqlite:///:memory:")
    undisturbed, _ = sweep([*words, "--output_dir", f"{tmp_path}/undisturbed"])
    out = tmp_path / "killed"
    for run in ("trials/1", "final/seed5"):
        process = run_in_a_process(words, out)
        deadline = time.monotonic() + 100
        while not any(is_complete(checkpoint) for checkpoint in find_checkpoints(out / run)):
            assert time.monotonic() < deadline and process.exitcode is None
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9
    results, lines = sweep([*words, "--output_dir", str(out)])
    assert without_times(results) == without_times(undisturbed)
    assert results["trials"][1]["attempts"] == results["final"][1]["attempts"] == 2
    assert results["trials"][0]["attempts"] == 1
    assert sum(line.startswith("[") for line in lines) == 1, "more than the last run was done again"


def test_checkpoints_that_another_sweep_left_in_a_folder_are_not_gone_on_from(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    assert runs.resume_words(tmp_path, attempt=1) == ["--resume_from_checkpoint=auto"]
    assert (tmp_path / "checkpoint-3").exists()
    assert runs.resume_words(tmp_path, attempt=0) == []
    assert not (tmp_path / "checkpoint-3").exists()


def test_a_learning_rate_that_breaks_training_is_the_worst_score_and_no_error(words, monkeypatch):
    monkeypatch.setattr(protocol, "run_final", lambda *args: (0.5, {"metrics": {"test_accuracy": 0.5}, "seconds": 1}))
    results, lines = sweep(words, SPACE, "learning_rate=1e30,0.01", "--optim", "sgd", "--max_grad_norm", "0")
    broken, other = results["trials"]
    assert broken["value"] is None and "loss of" in broken["diverged"] and other["diverged"] is None
    assert results["choice"]["trial"] == 1
    assert "diverged" in lines[1]


def test_settings_are_drawn_from_ranges_and_an_interrupted_trial_keeps_what_it_drew(words, monkeypatch):
    options = [
        SPACE,
        "learning_rate=0.1,0.001",
        "weight_decay=0,0.1",
        "--sampler",
        "tpe",
        "--num_trials",
        "5",
    ]
    monkeypatch.setattr(protocol, "run_final", lambda *args: (0.5, {"metrics": {"test_accuracy": 0.5}, "seconds": 1}))
    drawn, interrupt = [], [True]

    def run(plan, claim, params, loader):
        drawn.append(params)
        if claim.point == 2 and interrupt:
            interrupt.clear()
            raise KeyboardInterrupt
        return params["learning_rate"], {"scores": {}, "best_epoch": 1, "diverged": None, "seconds": 1}

    monkeypatch.setattr(protocol, "run_trial", run)
    with pytest.raises(KeyboardInterrupt):
        sweep(words, *options)
    results, _ = sweep(words, *options)
    settings = [trial["settings"] for trial in results["trials"]]
    assert len(settings) == 5 and len(drawn) == 6
    assert drawn[2] == drawn[5] == settings[2]
    rates = [own["learning_rate"] for own in settings]
    assert len(set(rates)) == 5 and all(0.001 <= rate <= 0.1 for rate in rates)
    assert {own["weight_decay"] for own in settings} <= {0.0, 0.1}
    assert results["choice"]["trial"] == rates.index(max(rates))
    more, _ = sweep(words, *options[:-1], "7")  # goes on with two more
    assert [trial["settings"] for trial in more["trials"]][:5] == settings and len(more["trials"]) == 7


def test_another_grid_in_the_same_folder_is_refused(words, monkeypatch):
    fake_runs(monkeypatch)
    sweep(words)
    with pytest.raises(ValueError, match="made with axes .*0.3.*A sweep goes on with the settings it began with"):
        sweep(words, SPACE, "learning_rate=0.5")
    with pytest.raises(ValueError, match="made with num_train_epochs 3.*and a sweep with num_train_epochs 4"):
        sweep(words, "--num_train_epochs", "4")


def test_the_published_grid_is_the_default_for_runs_that_it_was_made_for(words):
    plan = parse_sweep([*words, "--optim", "sgd", "--scale_learning_rate"])
    assert plan.axes == PUBLISHED_GRID and len(plan.points) == 40
    assert plan.trial_settings(7, plan.points[7]).training.learning_rate == 25.0
    assert plan.trial_settings(7, plan.points[7]).training.output_dir.endswith("out/trials/7")
    with pytest.raises(ValueError, match="no search_space, optim adamw.*pass --optim sgd"):
        parse_sweep(words)


def test_a_grid_in_a_file_is_a_mapping(words, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "search_space: {learning_rate: [1e-1, 0.01], deep: [true, false]}\nfinal_seeds: [7]\nsampler: grid\n"
    )
    plan = parse_sweep(["--config", str(file), *words])
    assert plan.axes == {"learning_rate": [0.1, 0.01], "deep": [True, False]}
    assert plan.sweep.final_seeds == [7]
    # The command line has the last word, and its search space is the whole one.
    assert parse_sweep(["--config", str(file), *words, SPACE, "weight_decay=0"]).axes == {"weight_decay": [0.0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [SPACE, "learning_rate"],
            "search_space has 'learning_rate'. Each part must be a setting and its values",
        ),
        (
            [SPACE, "learning_rate=0.1,0.1"],
            "search_space has learning_rate=0.1,0.1. Each setting needs one list",
        ),
        ([SPACE, "learning_rat=0.1"], "'learning_rat', which method 'vpt' does not have"),
        ([SPACE, "rank=4"], "'rank', which method 'vpt' does not have"),
        ([SPACE, "num_virtual_tokens=5,0"], "num_virtual_tokens.*0"),
        ([SPACE, "seed=1,2"], "search_space has seed. An axis must be a setting"),
        ([SPACE, "dataset_name=a,b"], "search_space has dataset_name. An axis"),
        (
            [SPACE, "layers_to_transform=0,1"],
            "search_space has layers_to_transform, which is no single number or word",
        ),
        ([*GRID, "--sampler", "tpe"], "sampler is 'tpe' and num_trials None"),
        ([*GRID, "--num_trials", "3"], "sampler is 'grid' and num_trials 3"),
        ([*GRID, "--final_seeds", "1", "1"], r"final_seeds is \[1, 1\]"),
        ([*GRID, "--stale_after", "5"], "stale_after is 5"),
        ([*GRID, "--streaming", "--max_steps", "5"], "Found streaming. A sweep scores trials on validation images"),
        ([*GRID, "--push_to_hub"], "Found push_to_hub, which is for a single run"),
    ],
)
def test_what_a_sweep_cannot_be_is_refused_before_anything_is_loaded(words, options, message):
    with pytest.raises(ValueError, match=message):
        parse_sweep([*words, *options])


@pytest.mark.parametrize("method", [*METHODS, *BASELINES])
def test_settings_of_every_method_can_be_searched(method, tmp_path):
    words = ["--method", method, "--output_dir", str(tmp_path), SPACE, "learning_rate=0.1,0.01"]
    plan = parse_sweep(words)
    assert [plan.trial_settings(0, point).training.learning_rate for point in plan.points] == [0.1, 0.01]
    # VAPT has a setting called grid, which stays its own.
    if method == "vapt":
        assert parse_sweep([*words, "--grid", "4", "4"]).settings.peft_config.grid == [4, 4]


def fake_runs(monkeypatch, fails=(), diverge=()):
    """Trials and final runs that cost nothing; the numbers of those that were begun."""
    begun = []

    def trial(plan, claim, params, loader):
        begun.append(claim.point)
        if claim.point in fails:
            raise MemoryError(f"{params} is too large")
        value, diverged = (0.0, "Found a loss of nan.") if claim.point in diverge else (0.1 * claim.point, None)
        return value, {"scores": {}, "best_epoch": 1, "diverged": diverged, "seconds": 1}

    def final(plan, claim, params, loader):
        begun.append(f"seed {claim.point}")
        return 0.5, {"metrics": {"test_accuracy": 0.5}, "timings": {}, "seconds": 1}

    monkeypatch.setattr(protocol, "run_trial", trial)
    monkeypatch.setattr(protocol, "run_final", final)
    return begun


def test_a_trial_that_fails_keeps_no_other_from_its_score_and_is_tried_again_before_the_choice(words, monkeypatch):
    begun = fake_runs(monkeypatch, fails=[1])
    plan = parse_sweep([*words, *GRID, *FINAL_SEEDS])
    lines = []
    with pytest.raises(RuntimeError, match="1 of 4 trials have failed .trial 1: MemoryError.*add --skip_failed"):
        run_sweep(plan, lines.append)
    assert begun == [0, 1, 2, 3]
    assert any(line.startswith("trial 1 failed: MemoryError") for line in lines)
    results = json.loads((plan.folder / "results.json").read_text())
    assert not results["complete"] and [trial["trial"] for trial in results["failed"]] == [1]
    begun = fake_runs(monkeypatch)
    results, lines = sweep(words)
    assert begun == [1, "seed 0", "seed 5"] and results["complete"] and not results["failed"]
    assert "3 done" in lines[0]


def test_where_failed_trials_are_skipped_the_best_of_the_others_is_tested(words, monkeypatch):
    begun = fake_runs(monkeypatch, fails=[3])
    for _ in range(2):
        results, _ = sweep(words, "--skip_failed")
        assert results["complete"] and results["choice"]["trial"] == 2
        assert [trial["trial"] for trial in results["failed"]] == [3]
    assert begun == [0, 1, 2, 3, "seed 0", "seed 5"]


def test_where_all_trials_diverge_nothing_is_chosen_and_tested(words, monkeypatch):
    begun = fake_runs(monkeypatch, diverge=range(4))
    with pytest.raises(RuntimeError, match="All 4 trials have diverged, the first one so: Found a loss of nan"):
        sweep(words)
    assert begun == [0, 1, 2, 3]


def test_a_score_that_is_no_number_counts_as_diverged(words, tmp_path, monkeypatch):
    class Trainer:
        state = TrainerState(epoch=1.0)

        def train(self, **kwargs): ...

        def evaluate(self, **kwargs):
            return {"validation_loss": math.nan, "validation_accuracy": 0.3}

    monkeypatch.setattr(runs, "build_trainer", lambda *args: (Trainer(), {}))
    plan = parse_sweep([*words, *GRID, "--metric_for_best_model", "loss", "--no_load_best_model_at_end"])
    value, result = runs.run_trial(plan, Claim(0, 0, {}, 0, ""), plan.points[0], None)
    assert value == math.inf and "validation_loss is nan" in result["diverged"]


def test_axes_in_another_order_are_another_sweep(words, monkeypatch):
    # The same four settings have other numbers, so that some would run twice and others never.
    fake_runs(monkeypatch)
    sweep(words)
    with pytest.raises(ValueError, match="made with axes"):
        sweep(words, SPACE, *reversed(GRID[1:]))


def test_a_folder_holds_one_sweep(words, tmp_path, monkeypatch):
    fake_runs(monkeypatch)
    sweep(words)
    for changed in (["--study_name", "other"], ["--storage", f"sqlite:///{tmp_path}/other.db"]):
        with pytest.raises(ValueError, match="with the files of a sweep with study_name sweep, and a sweep with"):
            sweep(words, *changed)


def test_a_sweep_goes_on_by_whatever_path_its_folder_is_named(words, tmp_path, monkeypatch):
    first, _ = sweep_of_nothing(words, monkeypatch)
    monkeypatch.chdir(tmp_path)
    again, begun = sweep_of_nothing([*words, "--output_dir", "out"], monkeypatch)
    assert again == first and not begun


def sweep_of_nothing(words, monkeypatch):
    begun = fake_runs(monkeypatch)
    return sweep(words)[0], begun


def test_what_changes_scores_is_part_of_a_sweep_and_versions_are_not(words):
    plan, other = (parse_sweep([*words, *GRID, *more]) for more in ([], ["--dataloader_drop_last"]))
    assert plan.identity != other.identity
    assert not [name for name in plan.identity if name.endswith("version")]
    # Several GPUs in one process make one batch of theirs.
    plan.settings.training._n_gpu = 2
    assert plan.identity["global_batch_size"] == 16
    for free in (["--dataloader_num_workers", "2"], ["--final_seeds", "7"], ["--logging_strategy", "no"]):
        assert parse_sweep([*words, *GRID, *free]).identity == parse_sweep([*words, *GRID]).identity


def test_a_final_run_keeps_its_checkpoint_until_it_is_written_down(words, monkeypatch):
    finish = Ledger.finish

    def die(self, claim, *args):
        if "/final/" in self.study_name:
            ledger._active.discard(claim.token)  # as the end of the process would
            raise KeyboardInterrupt
        return finish(self, claim, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            sweep(words, SPACE, "learning_rate=0.1")
    final = parse_sweep([*words, *GRID]).final_folder(0)
    assert any(is_complete(checkpoint) for checkpoint in find_checkpoints(final))
    results, _ = sweep(words, SPACE, "learning_rate=0.1")
    assert results["final"][0]["timings"]["is_whole"] is False and not find_checkpoints(final)


@pytest.mark.parametrize("axis", ["adam_beta1=0.5", "adam_epsilon=0.1", "model_revision=other", "weight_decay=0.3"])
def test_results_tell_of_settings_that_may_be_axes(words, axis):
    name, value = axis.split("=")
    plan = parse_sweep([*words, SPACE, axis])
    found, before = (describe_settings(own) for own in (plan.trial_settings(0, plan.points[0]), plan.settings))
    assert str(found[name]) == value and {key for key in found if found[key] != before[key]} == {name}
