"""Tables average what belongs together, refuse what does not, and show published scores only where they compare."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from hf_vpt.data.sources import FGVC, VTAB
from hf_vpt.plots import plot_scores
from hf_vpt.report import (
    CSV_COLUMNS,
    PUBLISHED,
    benchmark_means,
    benchmarks_to_csv,
    group_rows,
    read_runs,
    to_csv,
    to_markdown,
)
from hf_vpt.report.benchmarks import BENCHMARKS, VTAB_GROUPS
from hf_vpt.report.published import BACKBONE
from hf_vpt.report.rows import TITLES
from hf_vpt.training import BASELINES
from hf_vpt.tuners import METHODS


ROOT = Path(__file__).parents[1]

METRICS = {
    "test_accuracy": 0.5,
    "method": "vpt",
    "dataset_name": "vtab/cifar100",
    "dataset_variant": "zip",
    "dataset_fingerprint": {"train": "1", "test": "2"},
    "preprocessing": "published",
    "train_on_validation": True,
    "model_name_or_path": BACKBONE,
    "trained_parameters": 1234567,
    "trained_parameters_without_head": 92160,
    "seed": 0,
    "settings": {"deep": True, "learning_rate": 0.1},
}


def write_run(folder, timings=None, **changes):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(METRICS | changes))
    if timings:
        (folder / "timings.json").write_text(json.dumps(timings))


def rows_of(*paths):
    return group_rows(read_runs(paths)[0])


def test_seeds_of_one_setting_are_averaged(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.6, 0.9)):
        timings = {"train_seconds": 10.0 * seed, "train_cpu_seconds": 7.0, "peak_memory_bytes": 5e6 if seed else None}
        write_run(tmp_path / f"seed{seed}", timings, seed=seed, test_accuracy=accuracy)
    (row,) = rows_of(tmp_path)
    assert (row.name, row.dataset, row.seeds) == ("VPT-Deep", "vtab/cifar100", [0, 1, 2])
    assert row.mean == pytest.approx(200 / 3)
    assert row.std == pytest.approx(20.8167, abs=1e-4)  # of a sample: √((16.7² + 6.7² + 23.3²) / 2)
    assert row.timing("train_seconds") == 10 and row.timing("peak_memory_bytes") == 5e6
    assert "| VPT-Deep | 66.7 ± 20.8 | 3 | 1,234,567 | 92,160 | 10 | 7 | 5 |" in to_markdown([row])


def test_runs_with_different_settings_are_different_rows_that_say_in_what(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, settings={"deep": True, "learning_rate": 0.2})
    write_run(tmp_path / "c", seed=1, settings={"deep": False, "learning_rate": 0.2})
    write_run(tmp_path / "d", seed=1, model_name_or_path="other/backbone")
    names = {(row.name, row.backbone) for row in rows_of(tmp_path)}
    assert names == {
        ("VPT-Deep (learning_rate 0.1)", BACKBONE),
        ("VPT-Deep (learning_rate 0.2)", BACKBONE),
        ("VPT-Shallow", BACKBONE),
        ("VPT-Deep", "other/backbone"),
    }


def test_runs_of_a_version_that_had_fewer_settings_are_averaged_with_those_that_leave_them_out(tmp_path):
    write_run(tmp_path / "old")
    write_run(tmp_path / "new", seed=1, settings=METRICS["settings"] | {"prompt_angle": None})
    write_run(tmp_path / "turned", seed=1, settings=METRICS["settings"] | {"prompt_angle": 0.1})
    assert {(row.name, len(row.seeds)) for row in rows_of(tmp_path)} == {
        ("VPT-Deep (prompt_angle None)", 2),
        ("VPT-Deep (prompt_angle 0.1)", 1),
    }


def test_a_single_run_has_no_spread_and_columns_that_nobody_knows_are_left_out(tmp_path):
    write_run(tmp_path / "a", settings=None)
    (row,) = rows_of(tmp_path / "a" / "metrics.json")
    assert row.std is None and row.name == "VPT"  # deep or not, nobody knows
    text = to_markdown([row])
    assert "| VPT | 50.0 | 1 | 1,234,567 | 92,160 |" in text
    assert not any(word in text for word in ("seconds", "memory", "tried", "±"))


def test_runs_that_were_chosen_by_averaged_weights_report_those(tmp_path):
    settings = {"metric_for_best_model": "ema_accuracy"}
    write_run(tmp_path / "a", settings=settings, test_ema_accuracy=0.7)
    assert rows_of(tmp_path)[0].mean == pytest.approx(70)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dataset_variant": "full"}, "dataset_variant zip .* and full"),
        ({"dataset_fingerprint": {"train": "1", "test": "3"}}, "dataset_fingerprint"),
        ({"preprocessing": "processor"}, "preprocessing published .* and processor"),
        ({"preprocessing": None}, "preprocessing published .* and unknown"),
    ],
)
def test_results_on_different_data_are_refused(tmp_path, changed, words):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", method="bpt", **changed)
    with pytest.raises(ValueError, match=f"Found results on 'vtab/cifar100' with {words}.*a/metrics.json|{words}"):
        rows_of(tmp_path)


def test_runs_that_learned_from_other_parts_of_one_data_set_have_tables_of_their_own(tmp_path):
    write_run(tmp_path / "whole")
    write_run(tmp_path / "train", train_on_validation=False, dataset_fingerprint={"train": "5", "test": "2"})
    for method in ("vpt", "bpt"):
        write_run(
            tmp_path / method, method=method, images_per_class=4, dataset_fingerprint={"train": "6", "test": "2"}
        )
    lines = to_markdown(rows_of(tmp_path)).splitlines()
    found = [line for line in lines if line.startswith(("## vtab", "| VPT", "| BPT"))]
    assert [line.partition(f"{BACKBONE}, trained on ")[2] or line[2:5] for line in found[:7]] == [
        *("4 images a class of train and validation", "VPT", "BPT"),
        *("train", "VPT"),
        *("train and validation", "VPT"),
    ]


def test_other_test_images_are_refused_whatever_was_learned_from(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", train_on_validation=False, dataset_fingerprint={"train": "5", "test": "6"})
    with pytest.raises(ValueError, match=r"dataset_fingerprint \{'test': '2'\}.*and \{'test': '6'\}"):
        rows_of(tmp_path)


def test_runs_in_a_folder_can_be_excluded_by_their_paths(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "copies" / "a")
    runs, _ = read_runs([tmp_path], exclude=["*/copies/*"])
    assert [run.source for run in runs] == [str(tmp_path / "a" / "metrics.json")]


def test_results_of_which_nobody_knows_the_data_may_stand_together(tmp_path):
    unknown = {"dataset_variant": None, "dataset_fingerprint": None, "preprocessing": None}
    write_run(tmp_path / "a", **unknown)
    write_run(tmp_path / "b", method="bpt", **unknown)
    assert [row.name for row in rows_of(tmp_path)] == ["VPT-Deep", "BPT-Deep"]


def test_a_run_that_is_there_twice_is_refused(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "copy")
    with pytest.raises(ValueError, match="same run twice, with seed 0: '.*a/metrics.json' and '.*copy/metrics.json'"):
        rows_of(tmp_path)


def write_sweep(folder, complete=True):
    final = [
        {"seed": seed, "metrics": METRICS | {"seed": seed, "test_accuracy": 0.6}, "timings": {"train_seconds": 3.0}}
        for seed in (0, 1)
    ]
    content = {"complete": complete, "num_trials": 40, "trials": [{}] * 7, "final": final}
    for run in final:
        write_run(folder / "final" / f"seed{run['seed']}", **run["metrics"])
    (folder / "results.json").write_text(json.dumps(content))


def test_a_sweep_counts_its_final_runs_once_and_says_how_much_was_tried(tmp_path):
    write_sweep(tmp_path / "sweep")
    write_run(tmp_path / "alone" / "seed0", method="linear_probe", settings={})
    runs, left_out = read_runs([tmp_path])
    assert not left_out
    probe, row = group_rows(runs)
    assert (row.seeds, row.num_trials, row.mean) == ([0, 1], 40, pytest.approx(60))
    text = to_markdown([probe, row])
    assert "| VPT-Deep | 60.0 ± 0.0 | 2 | 1,234,567 | 92,160 | 3 | 40 |" in text
    assert "| linear probe | 50.0 | 1 | 1,234,567 | 92,160 | – | – |" in text


def test_a_sweep_that_has_not_ended_is_left_out_by_name(tmp_path):
    write_sweep(tmp_path / "sweep", complete=False)
    write_run(tmp_path / "alone")
    runs, left_out = read_runs([tmp_path])
    assert len(runs) == 1
    assert "sweep/results.json: 7 of 40 trials and 2 final runs are done." in to_markdown(group_rows(runs), left_out)


def write_vtab(folder, tasks=tuple(VTAB), **changes):
    for number, task in enumerate(tasks):
        write_run(folder / task, **{"dataset_name": f"vtab/{task}", "test_accuracy": number / 100} | changes)


def test_groups_hold_every_task_of_the_benchmarks_once():
    tasks = [task for group in VTAB_GROUPS.values() for task in group]
    assert sorted(tasks) == sorted(VTAB) and len(tasks) == 19
    assert [len(group) for group in VTAB_GROUPS.values()] == [7, 4, 8]
    assert set(BENCHMARKS["fgvc"]["FGVC"]) == set(FGVC)


def test_both_means_over_vtab_are_there_where_all_tasks_are_and_published_ones_beside_them(tmp_path):
    write_vtab(tmp_path)
    (mean,) = benchmark_means(rows_of(tmp_path))
    assert not mean.missing and not mean.trouble
    assert mean.mean_of_tasks == pytest.approx(9.0)  # of 0 to 18
    assert list(mean.groups.values()) == pytest.approx([3.0, 8.5, 14.5])
    assert mean.mean_of_groups == pytest.approx((3.0 + 8.5 + 14.5) / 3)
    assert {scores.source for scores in mean.published} == {"arXiv 2203.12119", "run again in arXiv 2503.06901"}
    text = to_markdown(rows_of(tmp_path))
    assert f"| VPT-Deep | {BACKBONE} | 3.00 | 8.50 | 14.50 | 9.00 | 8.67 |" in text
    assert f"| published: arXiv 2203.12119 | {BACKBONE} | 78.48 | 82.43 | 54.98 | 69.43 | 71.96 |" in text


def test_missing_tasks_are_named_and_only_whole_groups_have_a_mean(tmp_path):
    write_vtab(tmp_path, [task for task in VTAB if task not in ("kitti", "svhn")])
    (mean,) = benchmark_means(rows_of(tmp_path))
    assert mean.missing == ("svhn", "kitti")
    assert mean.mean_of_tasks is None and mean.mean_of_groups is None
    assert {name: value is None for name, value in mean.groups.items()} == {
        "Natural": True,
        "Specialized": False,
        "Structured": True,
    }
    assert f"- VPT-Deep, {BACKBONE}: no result on svhn, kitti." in to_markdown(rows_of(tmp_path))


@pytest.mark.parametrize(
    "changed",
    [
        {"model_name_or_path": "google/vit-base-patch16-224"},
        {"dataset_variant": "full"},
        {"preprocessing": "processor"},
        {"train_on_validation": False},
        {"images_per_class": 4},
        {"method": "lora"},
        {"num_broken_images": {"train": 0, "test": 2}},
        {"num_images": {"train": 900}},
        {"settings": {"deep": True, "quantization": "4bit"}},
        {"settings": {"deep": True, "dtype": "bfloat16"}},
        {"settings": {"deep": True, "layers_to_transform": [11]}},
    ],
)
def test_published_scores_stand_only_beside_the_same_setting(tmp_path, changed):
    write_vtab(tmp_path, **changed)
    (mean,) = benchmark_means(rows_of(tmp_path))
    assert mean.mean_of_tasks is not None and not mean.published
    assert "published:" not in to_markdown(rows_of(tmp_path))


def test_tasks_in_different_variants_have_no_mean(tmp_path):
    write_vtab(tmp_path / "zip", list(VTAB)[:10])
    write_vtab(tmp_path / "full", list(VTAB)[10:], dataset_variant="full")
    (mean,) = benchmark_means(rows_of(tmp_path))
    assert mean.mean_of_tasks is None and not mean.published
    assert "no mean, because of dataset_variant is full and zip" in to_markdown(rows_of(tmp_path))


def test_a_task_with_two_settings_has_no_mean_until_one_is_left(tmp_path):
    write_vtab(tmp_path)
    write_run(tmp_path / "again", settings={"deep": True, "learning_rate": 9}, dataset_name="vtab/dtd", seed=0)
    (mean,) = benchmark_means(rows_of(tmp_path))
    assert mean.mean_of_tasks is None and "several settings on dtd" in mean.trouble


def test_fgvc_has_one_mean_over_five_sets(tmp_path):
    for number, name in enumerate(FGVC):
        dataset = {"dataset_name": f"fgvc/{name}", "dataset_variant": "lists"}
        write_run(tmp_path / name, test_accuracy=0.8 + number / 100, train_on_validation=False, **dataset)
    text = to_markdown(rows_of(tmp_path))
    assert f"| VPT-Deep | {BACKBONE} | 82.00 |" in text
    assert f"| published: arXiv 2203.12119 | {BACKBONE} | 89.11 |" in text
    assert "2503.06901" not in text  # it says nothing about FGVC


def test_every_method_has_a_title_and_published_scores_have_one_of_them():
    assert TITLES.keys() == {*METHODS, *BASELINES}
    titles = {title for entry in TITLES.values() for title in ([entry] if isinstance(entry, str) else entry)}
    assert {scores.title for scores in PUBLISHED} <= titles


def test_csv_has_one_line_a_row_with_whole_numbers(tmp_path):
    write_run(tmp_path / "a", {"train_seconds": 3.25}, test_accuracy=1 / 3)
    (line,) = csv.DictReader(io.StringIO(to_csv(rows_of(tmp_path))))
    assert tuple(line) == CSV_COLUMNS
    assert float(line["mean"]) == pytest.approx(100 / 3, abs=1e-12)
    assert (line["std"], line["train_seconds"], line["seeds"]) == ("", "3.25", "0")


def test_what_is_no_result_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no '.*nowhere'"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="hold no metrics.json and no results.json"):
        read_runs([tmp_path])
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="metrics.json' has no dataset_name, method, seed, test_accuracy, trained"):
        read_runs([tmp_path])


def test_the_script_prints_and_writes_the_report(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import report

    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name, dataset_name=name)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "runs"), "--output_dir", str(out)])
    report.main()
    assert capsys.readouterr().out == (out / "report.md").read_text()
    assert len((out / "report.csv").read_text().splitlines()) == 3
    assert (out / "report.png").stat().st_size > 5000
    sys.modules.pop("report")


def test_the_picture_shows_every_row_with_its_spread(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import matplotlib.axes

    drawn = []
    original = matplotlib.axes.Axes.errorbar

    def record(self, x, y, yerr, **kwargs):
        drawn.append((kwargs["label"], list(y), list(yerr)))
        return original(self, x, y, yerr=yerr, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", record)
    for seed in (0, 1):
        write_run(tmp_path / f"deep{seed}", seed=seed, test_accuracy=0.5 + seed / 10)
    write_run(tmp_path / "probe", method="linear_probe", dataset_name="digits")
    plot_scores(rows_of(tmp_path), tmp_path / "scores.svg")
    assert drawn == [
        ("linear probe", [50.0], [0.0]),
        ("VPT-Deep", [pytest.approx(55.0)], [pytest.approx(7.0711, abs=1e-3)]),
    ]


def test_files_may_have_any_name_and_be_named_by_any_path(tmp_path, monkeypatch):
    write_sweep(tmp_path / "sweep")
    (tmp_path / "sweep" / "results.json").rename(tmp_path / "swept.json")
    write_run(tmp_path / "run", method="linear_probe", settings={})
    (tmp_path / "run" / "metrics.json").rename(tmp_path / "probe.json")
    monkeypatch.chdir(tmp_path)
    paths = ["swept.json", "probe.json", tmp_path / "probe.json", "./run/../swept.json"]
    assert [(row.name, row.seeds) for row in rows_of(*paths)] == [("linear probe", [0]), ("VPT-Deep", [0, 1])]
    (tmp_path / "other.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="other.json' has no dataset_name"):
        read_runs([tmp_path / "other.json"])


def test_only_a_sweeps_own_runs_are_passed_over_and_by_any_path(tmp_path, monkeypatch):
    write_sweep(tmp_path / "sweep")
    write_run(tmp_path / "sweep" / "probe", method="linear_probe", settings={})
    monkeypatch.chdir(tmp_path)
    own_again = Path("sweep/final/seed0/metrics.json")
    assert [row.name for row in rows_of(tmp_path / "sweep", own_again)] == ["linear probe", "VPT-Deep"]


def test_seconds_of_an_interrupted_run_are_not_taken_for_those_of_a_whole_one(tmp_path):
    for seed, is_whole in enumerate((True, False, False)):
        timings = {"train_seconds": 10.0 - seed, "train_cpu_seconds": 10.0 - seed, "peak_memory_bytes": 5e6 + seed}
        write_run(tmp_path / f"seed{seed}", timings | {"is_whole": is_whole}, seed=seed)
    (row,) = rows_of(tmp_path)
    assert (row.timing("train_seconds"), row.timing("train_cpu_seconds")) == (10, 10)
    assert row.timing("peak_memory_bytes") == 5e6 + 1


@pytest.mark.parametrize(("attempts", "seconds"), [(1, 14.0), (2, None)])
def test_the_search_of_a_sweep_has_its_own_seconds_where_no_trial_was_interrupted(tmp_path, attempts, seconds):
    write_sweep(tmp_path / "sweep")
    file = tmp_path / "sweep" / "results.json"
    trials = [{"seconds": 2.0, "attempts": 1}] * 6 + [{"seconds": 2.0, "attempts": attempts}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trials": trials}))
    write_run(tmp_path / "alone", {"train_seconds": 9.0}, method="linear_probe", settings={})
    probe, row = rows = rows_of(tmp_path)
    assert (probe.search_seconds, row.search_seconds) == (None, seconds)
    assert row.timing("train_seconds") == 3  # of one final run
    _, line = csv.DictReader(io.StringIO(to_csv(rows)))
    assert line["search_seconds"] == ("" if seconds is None else "14.0")
    text = to_markdown(rows)
    assert ("| settings tried | seconds for these |" in text) == (seconds is not None)
    assert "those of one final run" in text and "those of one final run" not in to_markdown([probe])


@pytest.mark.parametrize(
    "changed", [{"images_per_class": 4}, {"settings": {"deep": True, "quantization": "8bit"}}], ids=str
)
def test_few_shot_tasks_and_rounded_backbones_are_not_averaged_with_others(tmp_path, changed):
    write_vtab(tmp_path / "whole", list(VTAB)[:10])
    write_vtab(tmp_path / "few", list(VTAB)[10:], **changed)
    (mean,) = benchmark_means(rows_of(tmp_path))
    assert mean.mean_of_tasks is None and "on different tasks" in mean.trouble


def test_means_over_benchmarks_are_written_as_csv_too(tmp_path):
    write_vtab(tmp_path / "vtab")
    for name in FGVC:
        write_run(tmp_path / name, dataset_name=f"fgvc/{name}", dataset_variant="lists")
    lines = list(csv.DictReader(io.StringIO(benchmarks_to_csv(rows_of(tmp_path)))))
    assert [(line["benchmark"], line["source"]) for line in lines] == [
        ("fgvc", "measured"),
        ("fgvc", "arXiv 2203.12119"),
        ("vtab", "measured"),
        ("vtab", "arXiv 2203.12119"),
        ("vtab", "run again in arXiv 2503.06901"),
    ]
    columns = ("Natural", "mean_of_tasks", "mean_of_groups")
    numbers = [[float(line[name]) if line[name] else None for name in columns] for line in lines]
    fgvc, published_fgvc, vtab, published, again = numbers
    assert (fgvc, published_fgvc) == ([None, 50.0, None], [None, 89.11, None])
    assert vtab == pytest.approx([3.0, 9.0, (3.0 + 8.5 + 14.5) / 3])
    assert (published, again) == ([78.48, 69.43, 71.96], [None, None, 76.4])


def test_published_scores_are_those_of_the_papers():
    # The mean over tasks weighs the groups by their 7, 4 and 8 tasks, the other one does not.
    for scores in PUBLISHED:
        if scores.groups and scores.mean_of_tasks:
            weighted = sum(number * score for number, score in zip((7, 4, 8), scores.groups)) / 19
            assert scores.mean_of_tasks == pytest.approx(weighted, abs=0.02), scores
        if scores.groups and scores.mean_of_groups:
            assert scores.mean_of_groups == pytest.approx(sum(scores.groups) / 3, abs=0.01), scores
