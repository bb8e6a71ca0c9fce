"""Train prompts over a grid of learning rates, and draw what learning rates and weight decays do to them.

    python scripts/learning_rates.py run outputs/learning_rates --treatments sgd sgd_angle --rates 0.01 0.1 1
    python scripts/learning_rates.py final outputs/final --of outputs/learning_rates -- --train_on_validation true
    python scripts/learning_rates.py report outputs/learning_rates --output_dir docs/images

`final` trains the setting of each data set, method and treatment that is best on validation images, once with each
seed. Runs that are there already are not repeated; several processes may share a folder. What the treatments are
stands in hf_vpt/dynamics/grid.py, what came out in docs/learning_rate.md. Words after `--` go to every run, as to
scripts/train.py.
"""

import argparse
import sys
from pathlib import Path

from hf_vpt.dynamics import TREATMENTS, points_of, run_grid
from hf_vpt.dynamics.summary import (
    RUNS_FILE,
    choose_points,
    groups_of,
    read_steps,
    read_summaries,
    score_table,
    width_table,
    write_summaries,
)
from hf_vpt.plots import plot_courses, plot_learning_rates, plot_turns, plot_widths
from hf_vpt.tuners import METHODS


CONFIGS = Path(__file__).parents[1] / "configs"


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is not there yet")
    run.add_argument("folder")
    run.add_argument("--data", nargs="+", default=["digits"], help="names of data sets")
    run.add_argument("--methods", nargs="+", default=["vpt"], choices=METHODS)
    run.add_argument("--treatments", nargs="+", default=["sgd", "sgd_angle"], choices=TREATMENTS)
    run.add_argument("--rates", nargs="+", type=float, required=True, help="learning rates, or angles in radians")
    run.add_argument("--weight_decays", nargs="+", type=float, default=[0.0])
    run.add_argument("--seeds", nargs="+", type=int, default=[0])
    final = commands.add_parser("final", help="train the settings that validation images choose, with more seeds")
    final.add_argument("folder", help="folder of these runs, another one than that of the grid")
    final.add_argument("--of", nargs="+", required=True, help="folders of the grid's runs, or their runs.jsonl")
    final.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    final.add_argument("--treatments", nargs="+", default=list(TREATMENTS), choices=TREATMENTS)
    final.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    report = commands.add_parser("report", help="draw pictures and print tables of what is there")
    report.add_argument("paths", nargs="+", help="folders of runs, or runs.jsonl of earlier reports")
    report.add_argument("--output_dir", default=".", help="folder of pictures and runs.jsonl")
    report.add_argument("--courses", nargs="+", default=[], help="folders of single runs, to be drawn step by step")
    end = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:end]), argv[end + 1 :]


def main(argv: list[str] | None = None) -> None:
    args, more = parse_arguments(sys.argv[1:] if argv is None else argv)
    if args.command == "run":
        points = points_of(args.data, args.methods, args.treatments, args.rates, args.weight_decays, args.seeds)
        run_grid(points, args.folder, CONFIGS, more)
        return
    if args.command == "final":
        rows = read_summaries(*args.of)
        own = [row for row in rows if row["method"] in args.methods and row["treatment"] in args.treatments]
        run_grid(choose_points(own, args.seeds), args.folder, CONFIGS, more)
        return
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_summaries(*args.paths)
    write_summaries(rows, folder / RUNS_FILE)
    print(width_table(rows))
    if scores := score_table(rows):
        print(f"\n{scores}")
    plot_widths(rows, folder / "widths.png")
    for (method,), own in groups_of(rows, "method").items():
        plot_learning_rates(own, folder / f"learning_rates_{method}.png")
        plot_turns(own, folder / f"turns_{method}.png")
    if args.courses:
        plot_courses({path: read_steps(path) for path in args.courses}, folder / "courses.png")


if __name__ == "__main__":
    main()
