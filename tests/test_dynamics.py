"""Grids of learning rates: spikes, widths, and runs that are not repeated."""

import json
import runpy

import numpy as np
import pytest
from filelock import FileLock

from hf_vpt.dynamics import (
    Point,
    find_spikes,
    grid,
    largest_rise,
    points_of,
    read_runs,
    run_grid,
    smooth,
    width_in_decades,
)
from hf_vpt.dynamics.summary import (
    choose_points,
    read_summaries,
    score_table,
    summarize,
    width_table,
    widths_of,
    write_summaries,
)


def falling(steps=200, noise=0.1):
    return 2 * np.exp(-np.arange(steps) / 50) + noise * np.random.default_rng(0).standard_normal(steps)


def test_smoothing_is_the_mean_of_the_last_steps():
    np.testing.assert_allclose(smooth([1, 2, 3, 4, 5], window=3), [1, 1.5, 2, 3, 4])


def test_a_noisy_loss_that_falls_has_no_spike():
    assert find_spikes(falling()) == []
    assert largest_rise(falling()) < 0.3


def test_spikes_are_found_where_they_are_and_as_high_as_they_are():
    losses = falling(noise=0)
    losses[100:112] += 3
    losses[150:160] += 1
    losses[170:172] += 1  # too short for a mean over eight steps
    spikes = find_spikes(losses)
    assert [(s.start, s.peak) for s in spikes] == [(101, 107), (154, 157)]
    assert spikes[0].height == pytest.approx(losses[100:108].mean() - losses[92:100].mean())
    assert largest_rise(losses) == pytest.approx(spikes[0].height)


def test_what_happens_while_warming_up_does_not_count_and_a_loss_that_stays_up_is_one_spike():
    losses = np.concatenate([np.full(10, 1.0), np.full(20, 4.0), np.full(50, 1.0), np.full(50, 3.0)])
    (spike,) = find_spikes(losses, warmup=40)
    assert spike.height == pytest.approx(2) and 80 < spike.start < 85
    assert find_spikes(losses[:5], warmup=10) == [] and largest_rise(losses[:5], warmup=10) == 0


def test_a_width_is_measured_between_learning_rates_too():
    scores = {0.01: 0.5, 0.1: 0.9, 1.0: 0.9, 10.0: 0.7}
    # Down by 0.01 of 0.4 and of 0.2 on the way to the next ones.
    assert width_in_decades(scores) == pytest.approx(1 + 0.01 / 0.4 + 0.01 / 0.2)
    assert width_in_decades(scores, tolerance=0.2) == pytest.approx(1 + 0.5 + 1)
    assert width_in_decades(scores, best=0.905) == pytest.approx(1 + 0.005 / 0.4 + 0.005 / 0.2)
    assert width_in_decades(scores, best=0.95) == 0


def test_a_second_hill_does_not_belong_to_the_region():
    assert width_in_decades({0.1: 0.9, 1: 0.5, 10: 0.899}) == pytest.approx(0.025)


def test_points_are_all_combinations_with_a_folder_each():
    points = points_of(["digits"], ["vpt", "bpt"], ["sgd", "adamw_angle"], [0.1, 1], [0, 0.1], [0, 1])
    assert len({point.folder for point in points}) == len(points) == 32
    assert [point.seed for point in points] == [0] * 16 + [1] * 16


@pytest.fixture
def trained(monkeypatch):
    """Words that a run was trained with, in place of training."""
    calls = []

    def train(settings, shared):
        calls.append(settings)
        if settings.training.learning_rate == 10:
            raise FloatingPointError("Found a loss of nan")
        return {"test_accuracy": 0.5}

    monkeypatch.setattr(grid, "train_classifier", train)
    return calls


def test_runs_are_trained_once_and_one_that_diverges_is_no_error(tmp_path, trained, pytestconfig):
    points = points_of(["digits"], ["vpt"], ["adamw"], [0.1, 10])
    for _ in range(2):
        run_grid(points, tmp_path, pytestconfig.rootpath / "configs", report=lambda line: None)
    assert [settings.training.learning_rate for settings in trained] == [0.1, 10]
    runs = list(read_runs(tmp_path))
    assert [(run["rate"], run["test_accuracy"], bool(run["diverged"])) for run in runs] == [
        (0.1, 0.5, False),
        (10, None, True),
    ]


def test_a_run_that_another_process_is_at_is_passed_over(tmp_path, trained, pytestconfig):
    (point,) = points_of(["digits"], ["vpt"], ["adamw"], [0.1])
    (tmp_path / point.folder).mkdir(parents=True)
    with FileLock(tmp_path / point.folder / "lock"):
        run_grid([point], tmp_path, pytestconfig.rootpath / "configs", report=lambda line: None)
    assert trained == []


def test_runs_with_other_words_are_not_mixed(tmp_path, trained, pytestconfig):
    points, configs = points_of(["digits"], ["vpt"], ["adamw"], [0.1]), pytestconfig.rootpath / "configs"
    run_grid(points, tmp_path, configs, ["--num_train_epochs", "1"], report=lambda line: None)
    assert trained[0].training.num_train_epochs == 1
    with pytest.raises(ValueError, match="with the words --num_train_epochs 1, and now none.*another folder"):
        run_grid(points, tmp_path, configs)


def test_a_data_set_without_a_file_of_settings_is_refused(tmp_path, pytestconfig):
    with pytest.raises(ValueError, match=r"data set 'cifar100' and no file '.*cifar100\.yaml'.*use digits"):
        Point("cifar100", "vpt", "sgd", 0.1).words(pytestconfig.rootpath / "configs", tmp_path)


def test_folders_with_spaces_are_one_word_and_near_rates_have_folders_of_their_own(tmp_path, pytestconfig):
    words = Point("digits", "vpt", "sgd", 0.1).words(pytestconfig.rootpath / "configs", tmp_path / "my runs")
    assert str(tmp_path / "my runs") in words
    near = [Point("digits", "vpt", "sgd", rate).folder for rate in (0.1234567, 0.1234568, 1.0)]
    assert len(set(near)) == 3 and near[2].name == "1_0_0"


def run_of(rate, accuracy, treatment="sgd", **changes):
    rates = [0.0, 0.5 * rate, rate, 0.6 * rate, 0.2 * rate]
    block = {"learning_rate": rates, "turn": [0.0, 0.1, 0.2, 0.3, 0.4], "cosine": [0, 1e-8, 0, 0, 0]}
    other = {"learning_rate": rates, "turn": [0.0, 0.3, 0.4, 0.5, 0.6], "cosine": [2e-8, 0, 0, 0, 0]}
    steps = {"loss": [2.0, 9.0, 1.0, 3.0, 1.0], "directions": {"a": block, "b": other}}
    for number, directions in enumerate(steps["directions"].values()):
        directions |= {"length": [1.0, 1.0, 1.0, 1.0, 3.0 + number], "gradient": [0.5] * 5}
    point = {"data": "digits", "method": "vpt", "treatment": treatment, "rate": rate, "weight_decay": 0.0, "seed": 0}
    return point | {"test_accuracy": accuracy, "diverged": None, "steps": steps} | changes


def test_a_summary_tells_what_a_run_did_from_its_largest_learning_rate_on():
    row = summarize(run_of(0.1, 0.5))
    assert "steps" not in row and (row["rate"], row["test_accuracy"]) == (0.1, 0.5)
    assert row["length"] == [1.0, 3.5] and row["cosine"] == 2e-8
    assert row["turn"] == pytest.approx([0.3, 0.4])  # medians at step 2, and half way from there to the end
    assert row["largest_rise"] == 0  # the mean of eight steps falls from the warm-up's 9 on
    bare = run_of(0.1, None, steps=None)
    assert summarize(bare) == {name: value for name, value in bare.items() if name != "steps"}


def test_a_table_has_the_width_of_each_treatment_and_summaries_come_back_from_their_file(tmp_path):
    runs = [run_of(0.1, 0.5), run_of(1.0, 0.7), run_of(1.0, 0.72, seed=1), run_of(0.1, 0.8, "sgd_angle")]
    rows = [summarize(run) for run in runs]
    write_summaries(rows, tmp_path / "runs.jsonl")
    assert read_summaries(tmp_path / "runs.jsonl") == rows
    write_summaries([summarize(run_of(1.0, 0.9)), summarize(run_of(2.0, 0.9))], tmp_path / "more.jsonl")
    both = read_summaries(tmp_path / "runs.jsonl", tmp_path / "more.jsonl")
    assert [row["test_accuracy"] for row in both] == [0.5, 0.9, 0.72, 0.9, 0.8]
    lines = width_table(rows).splitlines()
    assert lines[2].startswith("| digits | vpt | sgd | 0 | 2 | 71.0 | 1 | 0.0 | – | 0.0 | 0.00 |")
    assert lines[3].startswith("| digits | vpt | sgd_angle | 0 | 1 | 80.0 | 0.1 |")
    with pytest.raises(FileNotFoundError, match="no finished run in .*correct the path"):
        read_summaries(tmp_path / "nowhere")


def test_a_width_by_the_best_published_accuracy_grows_where_another_treatment_is_better():
    published = {0.1: 0.5, 1.0: 0.6, 10.0: 0.5}
    better = {0.1: 0.65, 1.0: 0.8, 10.0: 0.65}
    rows = [run_of(rate, score, "published") for rate, score in published.items()]
    rows += [run_of(rate, score, "sgd_angle") for rate, score in better.items()]
    published, better = widths_of(rows)
    names = ("width_own", "width_published", "width_all")
    assert [published[name] for name in names] == pytest.approx([0.2, 0.2, 0])
    assert [better[name] for name in names] == pytest.approx([2 / 15, 2, 2 / 15])
    assert width_table([summarize(row) for row in rows]).splitlines()[3].endswith("| 0.1 | 2.0 | 0.1 | 0.00 |")
    assert widths_of(rows[3:])[0]["width_published"] is None


def test_the_setting_that_is_best_on_validation_images_is_trained_with_each_seed():
    scores = {0.1: 0.5, 1.0: 0.7, 10.0: 0.7}
    rows = [run_of(rate, 0.9 - score, validation_accuracy=score) for rate, score in scores.items()]
    rows.append(run_of(100.0, None, validation_accuracy=None, diverged="Found a loss of nan"))
    rows.append(run_of(3.0, 0.1, "adamw", validation_accuracy=0.1))
    chosen = [(point.treatment, point.rate, point.seed) for point in choose_points(rows, [0, 2])]
    assert chosen == [("sgd", 1.0, 0), ("sgd", 1.0, 2), ("adamw", 3.0, 0), ("adamw", 3.0, 2)]
    with pytest.raises(ValueError, match="run of vpt on digits without an accuracy on validation images"):
        choose_points([*rows, run_of(4.0, 0.5, validation_accuracy=None)], [0])


def test_a_setting_with_several_seeds_is_chosen_by_their_mean():
    accuracies = {(0.1, 0): 0.6, (0.1, 1): 0.6, (1.0, 0): 0.8, (1.0, 1): 0.3}
    rows = [run_of(rate, 0.5, seed=seed, validation_accuracy=a) for (rate, seed), a in accuracies.items()]
    assert [point.rate for point in choose_points(rows, [0])] == [0.1]


def test_settings_are_chosen_by_the_seeds_that_all_have():
    rows = [run_of(0.1, 0.5, seed=seed, validation_accuracy=0.6 + 0.2 * seed) for seed in (0, 1)]
    rows += [run_of(1.0, 0.5, validation_accuracy=0.65)]
    assert [point.rate for point in choose_points(rows, [0])] == [1.0]
    with pytest.raises(ValueError, match="no seed with which all settings of vpt on digits"):
        choose_points(rows[1:], [0])


def test_a_summary_keeps_learning_rates_as_they_were_asked_for():
    row = summarize(run_of(0.015625, 0.123456))
    assert (row["rate"], row["test_accuracy"]) == (0.015625, 0.1235)


def test_a_point_that_was_trained_with_other_words_elsewhere_is_refused(tmp_path):
    write_summaries([run_of(1.0, 0.5, words=["--bf16"])], tmp_path / "a.jsonl")
    write_summaries([run_of(1.0, 0.6, words=[])], tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="'rate': 1.0.*at another path too, trained with other words"):
        read_summaries(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_the_script_trains_the_chosen_settings_of_the_methods_and_treatments_asked_for(
    tmp_path, trained, pytestconfig
):
    rows = [run_of(rate, 0.5, validation_accuracy=rate / 10) for rate in (0.1, 1.0)]
    rows += [
        run_of(3.0, 0.5, "adamw", validation_accuracy=0.5),
        run_of(4.0, 0.5, method="bpt", validation_accuracy=0.5),
    ]
    write_summaries([summarize(row) for row in rows], tmp_path / "runs.jsonl")
    script = runpy.run_path(str(pytestconfig.rootpath / "scripts" / "learning_rates.py"))
    words = ["final", str(tmp_path / "final"), "--of", str(tmp_path / "runs.jsonl"), "--methods", "vpt"]
    script["main"]([*words, "--treatments", "sgd", "--seeds", "0", "4", "--", "--train_on_validation", "true"])
    assert [(s.training.learning_rate, s.training.seed, s.data.train_on_validation) for s in trained] == [
        (1.0, 0, True),
        (1.0, 4, True),
    ]


def test_scores_are_means_over_seeds_and_over_data_sets_where_none_is_missing():
    rows = [run_of(1.0, 0.70), run_of(1.0, 0.72, seed=1), run_of(1.0, 0.31, data="drawn/counting")]
    rows += [run_of(0.1, 0.8, "sgd_angle"), run_of(0.1, None, "sgd_angle", method="bpt", diverged="nan")]
    assert score_table(rows).splitlines() == [
        "| method | treatment | digits | drawn/counting | mean |",
        "|---|---|---|---|---|",
        "| bpt | sgd_angle | 0.0 | – | – |",
        "| vpt | sgd | 71.0 ± 1.4 | 31.0 | 51.0 |",
        "| vpt | sgd_angle | 80.0 | – | – |",
    ]


def test_the_script_reports_on_a_folder_of_runs_and_on_its_own_summaries(tmp_path, pytestconfig, capsys):
    pytest.importorskip("matplotlib")
    for index, rate in enumerate((0.1, 1.0, 3.0, 9.0)):
        run = run_of(rate, 0.5 + index / 10)
        folder = tmp_path / "runs" / str(index)
        folder.mkdir(parents=True)
        (folder / "steps.json").write_text(json.dumps(run.pop("steps")))
        (folder / "run.json").write_text(json.dumps(run))
    script = runpy.run_path(str(pytestconfig.rootpath / "scripts" / "learning_rates.py"))
    first = ["report", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "a"), "--courses", f"{tmp_path}/runs/1"]
    script["main"](first)
    table = capsys.readouterr().out
    assert "| digits | vpt | sgd | 0 | 1 | 80.0 | 9 |" in table
    script["main"](["report", str(tmp_path / "a" / "runs.jsonl"), "--output_dir", str(tmp_path / "b")])
    assert capsys.readouterr().out == table
    assert (tmp_path / "a" / "courses.png").stat().st_size > 1000
    for name in ("learning_rates_vpt.png", "turns_vpt.png", "widths.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "\n| method |" not in table  # a mean over learning rates says nothing
    script["main"](["report", str(tmp_path / "runs" / "1"), "--output_dir", str(tmp_path / "c")])
    assert capsys.readouterr().out.endswith("| vpt | sgd | 60.0 | 60.0 |\n")
    with pytest.raises(ValueError, match="no finished run with its steps in '.*nowhere'"):
        script["main"]([*first[:-1], str(tmp_path / "nowhere")])


def test_words_after_two_dashes_go_to_every_run(pytestconfig):
    script = runpy.run_path(str(pytestconfig.rootpath / "scripts" / "learning_rates.py"))
    words = ["run", "my runs", "--rates", "0.1", "1", "--", "--bf16", "true"]
    args, more = script["parse_arguments"](words)
    assert (args.folder, args.rates, more) == ("my runs", [0.1, 1.0], ["--bf16", "true"])


@pytest.mark.parametrize("method", ["vpt", "vapt", "provpt", "bpt"])
@pytest.mark.parametrize("treatment", [name for name in grid.TREATMENTS if name != "recipe"])
def test_a_treatment_is_what_its_name_says(method, treatment, tmp_path, pytestconfig):
    point = Point("drawn/counting", method, treatment, 0.05, weight_decay=0.01, seed=3)
    words = point.words(pytestconfig.rootpath / "configs", tmp_path)
    training = grid.parse_arguments(words).training
    assert training.optim.value.startswith("sgd" if "adamw" not in treatment else "adamw")
    assert (training.prompt_angle == 0.05) == treatment.endswith(("_angle", "_fall"))
    assert (training.prompt_final_angle is not None) == treatment.endswith("_fall")
    assert (training.learning_rate == 0.05) != treatment.endswith(("_angle", "_fall"))
    assert (training.prompt_norm_floor is not None) == treatment.endswith("_floor")
    assert (training.prompt_norm == 1) == treatment.endswith("_norm")
    is_published = treatment.startswith("published")
    assert (training.head_learning_rate == 0.05) == is_published
    assert (training.weight_decay, training.head_weight_decay) == (0.01, 0.01 if is_published else 0)
    unclipped = ["published", *(name for name in grid.TREATMENTS if name.startswith("sgd"))]
    clips = {"published_clipped": 0.25} | dict.fromkeys(unclipped, 0)
    assert training.max_grad_norm == clips.get(treatment, 1)
    assert training.seed == 3
    assert training.record_steps and not training.load_best_model_at_end


@pytest.mark.parametrize("method", ["vpt", "vapt", "provpt", "bpt"])
def test_the_treatment_of_the_recipe_is_that_of_the_default_file_of_the_method(method, tmp_path, pytestconfig):
    configs = pytestconfig.rootpath / "configs"
    default = grid.parse_arguments(["--config", str(configs / method / "default.yaml")]).training
    run = grid.parse_arguments(Point("drawn/counting", method, "recipe", 0.01).words(configs, tmp_path)).training
    for name in ("optim", "optim_args", "weight_decay", "lr_scheduler_type", "max_grad_norm", "ema_decay"):
        assert getattr(run, name) == getattr(default, name)
    for name in ("prompt_angle", "prompt_final_angle", "prompt_norm", "prompt_norm_floor"):
        assert getattr(run, name) == getattr(default, name)
    assert default.prompt_angle == (0.03 if method == "bpt" else 0.1)
    assert run.head_learning_rate == (default.head_learning_rate or default.learning_rate) == 0.01
    # What else of VAPT does not turn has a smaller learning rate in the file.
    assert run.learning_rate == 0.01 and default.learning_rate == (0.003 if method == "vapt" else 0.01)
    assert default.head_weight_decay is None and run.head_weight_decay == default.weight_decay == 0


def test_a_recorded_run_is_read_with_its_steps(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text(json.dumps({"rate": 1}))
    (tmp_path / "a" / "steps.json").write_text(json.dumps({"loss": [1.0]}))
    assert list(read_runs(tmp_path)) == [{"rate": 1, "steps": {"loss": [1.0]}}]
