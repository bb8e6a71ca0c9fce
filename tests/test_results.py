"""Finished runs are found, grouped by seed, and put in one table."""

import json

import pytest

from hf_vpt.training.results import format_table, read_results


def write_run(folder, accuracy):
    folder.mkdir(parents=True)
    run = {
        "test_accuracy": accuracy,
        "validation_accuracy": accuracy,
        "trained_parameters": 1330,
        "trained_parameters_without_head": 1000,
        "train_seconds": 12.4,
    }
    (folder / "metrics.json").write_text(json.dumps(run))


def test_seeds_of_one_configuration_share_a_row_with_mean_and_deviation(tmp_path):
    for seed, accuracy in enumerate([0.90, 0.92, 0.94]):
        write_run(tmp_path / "vpt" / "digits" / f"seed{seed}", accuracy)
    (row,) = format_table(read_results(tmp_path)).splitlines()[2:]
    assert row == "| vpt/digits | 92.0 ± 2.0 | 92.0 ± 2.0 | 1,000 | 1,330 | 12 | 3 |"


def test_best_configuration_comes_first(tmp_path):
    write_run(tmp_path / "worse", 0.5)
    write_run(tmp_path / "better", 0.7)
    rows = format_table(read_results(tmp_path)).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| better", "| worse"]


def test_folder_without_runs_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no metrics.json.*train first"):
        read_results(tmp_path)
