"""Tables and a picture of results: mean and spread over seeds, cost, benchmark means, published scores beside them.

    python scripts/report.py outputs/table outputs/sweep --output_dir outputs/report

Folders are searched for the `metrics.json` of scripts/train.py and the `results.json` of scripts/sweep.py; files may
have any name. Markdown is printed, and written with two tables as CSV, rows and means over benchmarks, and a plot to
`--output_dir`, where it is given. Runs that learned from validation images too, as the final ones of a sweep do, or
from a few images, have tables of their own; other results on one data set that are not on the same images, prepared
the same way, are refused.
"""

import argparse
from pathlib import Path

from hf_vpt.report import benchmarks_to_csv, group_rows, read_runs, to_csv, to_markdown


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and a picture of results.", allow_abbrev=False)
    parser.add_argument("paths", nargs="+", help="Result files, or folders that are searched.")
    parser.add_argument("--output_dir", type=Path, help="Where report.md, .csv and .png and benchmarks.csv go.")
    parser.add_argument(
        "--exclude", nargs="+", default=[], help="Patterns of paths to pass over, such as '*/tries/*'."
    )
    arguments = parser.parse_args()
    runs, left_out = read_runs(arguments.paths, arguments.exclude)
    rows = group_rows(runs)
    text = to_markdown(rows, left_out)
    print(text, end="")
    if arguments.output_dir is not None:
        from hf_vpt.plots import plot_scores

        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        (arguments.output_dir / "report.md").write_text(text, encoding="utf-8")
        (arguments.output_dir / "report.csv").write_text(to_csv(rows), encoding="utf-8")
        (arguments.output_dir / "benchmarks.csv").write_text(benchmarks_to_csv(rows), encoding="utf-8")
        if rows:
            plot_scores(rows, arguments.output_dir / "report.png")


if __name__ == "__main__":
    main()
