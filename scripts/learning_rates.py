"""Train prompts over a grid of learning rates, and draw what learning rates and weight decays do to them.

    python scripts/learning_rates.py run outputs/learning_rates --treatments sgd sgd_angle --rates 0.01 0.1 1
    python scripts/learning_rates.py report outputs/learning_rates --output_dir docs/images

Runs that are there already are not repeated; several processes may share a folder. What the treatments are stands in
hf_vpt/dynamics/grid.py, what came out in docs/learning_rate.md. Words after `--` go to every run, as to
scripts/train.py.
"""

import argparse
import sys
from pathlib import Path

from hf_vpt.dynamics import TREATMENTS, points_of, run_grid
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
    report = commands.add_parser("report", help="draw pictures and print tables of what is there")
    report.add_argument("folder")
    report.add_argument("--output_dir", default=".", help="folder of the pictures")
    own, _, more = " ".join(argv).partition(" -- ")
    return parser.parse_args(own.split()), more.split()


def main() -> None:
    args, more = parse_arguments(sys.argv[1:])
    if args.command == "run":
        points = points_of(args.data, args.methods, args.treatments, args.rates, args.weight_decays, args.seeds)
        run_grid(points, args.folder, CONFIGS, more)


if __name__ == "__main__":
    main()
