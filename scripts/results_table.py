"""The README's results table, from the metrics that runs of `scripts/train.py` left behind.

make table            # trains every demo configuration with three seeds, then calls this
python scripts/results_table.py outputs/table

Results on other images, or on images prepared in another way, are refused: see `hf_vpt.training.check_comparable`.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from hf_vpt.training import check_comparable


# Runs of one row lie in <folder>/<configuration>/seed<n>/metrics.json; baselines first, then as the papers appeared.
METHODS = {
    "linear_probe/{}": "linear probe",
    "vpt/{}_shallow": "VPT-Shallow",
    "vpt/{}": "VPT-Deep",
    "vapt/{}": "VAPT",
    "provpt/{}": "PRO-VPT",
    "bpt/{}": "BPT",
    "full/{}": "full fine-tuning",
}
ROWS = {folder.format(data): title for data in ("digits", "drawn") for folder, title in METHODS.items()}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/table")
    found = {str(file): json.loads(file.read_text()) for row in ROWS for file in _results(folder / row)}
    check_comparable(found)
    # Processor time: several runs at once share the cores of a machine, and its clock.
    print("| method | test accuracy, % | tuned parameters | of which prompts | CPU seconds | seeds |")
    print("|---|---|---|---|---|---|")
    for name, title in ROWS.items():
        runs = [
            found[str(file)] | json.loads((file.parent / "timings.json").read_text())
            for file in _results(folder / name)
        ]
        if not runs:
            continue
        accuracies = [100 * run["test_accuracy"] for run in runs]
        # One run has no spread.
        spread = f" ± {statistics.stdev(accuracies):.1f}" if len(runs) > 1 else ""
        # "Outside the head" is the backbone in full fine-tuning, and no prompts.
        prompts = "—" if runs[0]["method"] == "full" else f"{runs[0]['trained_parameters_without_head']:,}"
        print(
            f"| {title} | {statistics.mean(accuracies):.1f}{spread} | {runs[0]['trained_parameters']:,} "
            f"| {prompts} | {statistics.median(run['train_cpu_seconds'] for run in runs):.0f} | {len(runs)} |"
        )


def _results(folder: Path) -> list[Path]:
    return sorted(folder.glob("seed*/metrics.json"))


if __name__ == "__main__":
    main()
