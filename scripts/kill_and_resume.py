"""Kill training runs at random moments, let them go on, and see whether they end as one that was left alone.

    python scripts/kill_and_resume.py --config configs/provpt/digits.yaml --scoring online --num_train_epochs 2 \\
        --save_strategy steps --save_steps 5 --eval_strategy steps --eval_steps 5 --augmentation affine

All options but those below are those of scripts/train.py. Each of `--kills` runs gets SIGKILL at a moment drawn from
the time that an undisturbed run takes, and is started again with `--resume_from_checkpoint auto`, in the same folder.
All weights (averaged ones too), `metrics.json` and `relocations.json` must then be those of the undisturbed run, bit
for bit. Needs an operating system that can fork. The report, in Markdown, also goes to `report.md` in `--folder`,
which must not exist yet.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path


# Bitwise equality on a CPU needs one order of summation.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hf_vpt.training import parse_arguments, train_classifier
from hf_vpt.training.checkpoints import find_checkpoints, is_complete


COMPARED = ("*model.safetensors", "ema/*model.safetensors", "metrics.json", "relocations.json")


def start(options: list[str], folder: Path) -> int:
    """Start a run in a process of its own, with everything imported already, and return the process."""
    process = os.fork()
    if process:
        return process
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        train_classifier(parse_arguments([*options, "--output_dir", str(folder), "--disable_tqdm", "1"]))
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)  # without the parent's clean-up


def finish(process: int) -> bool:
    """Wait for a process; whether it ended well."""
    return os.waitpid(process, 0)[1] == 0


def files(folder: Path) -> dict[str, bytes]:
    found = [file for pattern in COMPARED for file in folder.glob(pattern)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kill_seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="No run is killed any more after this time.")
    parser.add_argument("--folder", type=Path, default=Path("outputs/kill_and_resume"))
    own, options = parser.parse_known_args()

    own.folder.mkdir(parents=True)
    deadline = time.monotonic() + 60 * own.minutes
    began = time.monotonic()
    if not finish(start(options, own.folder / "undisturbed")):
        print(f"The undisturbed run failed; see {own.folder}/undisturbed/log.txt", file=sys.stderr)
        return 1
    seconds = time.monotonic() - began
    expected = files(own.folder / "undisturbed")
    print(f"Compared: {', '.join(expected)}")

    draws = random.Random(own.kill_seed)
    lines = ["| kill | after, % of a run | whole checkpoints | half-written | same ending |", "|---|---|---|---|---|"]
    endings = []
    for number in range(1, own.kills + 1):
        if time.monotonic() > deadline:
            lines.append(f"\nStopped after {own.minutes:g} minutes.")
            break
        folder, moment = own.folder / f"kill{number}", draws.random()
        process = start(options, folder)
        time.sleep(moment * seconds)
        os.kill(process, signal.SIGKILL)
        finish(process)
        checkpoints = find_checkpoints(folder)
        whole = sum(is_complete(checkpoint) for checkpoint in checkpoints)
        ended = finish(start([*options, "--resume_from_checkpoint", "auto"], folder))
        endings.append(ended and files(folder) == expected)
        same = "yes" if endings[-1] else "NO"
        lines.append(f"| {number} | {100 * moment:.0f} | {whole} | {len(checkpoints) - whole} | {same} |")
        print(lines[-1], flush=True)
    lines.insert(0, f"{len(endings)} kills, {sum(endings)} equal endings (an undisturbed run: {seconds:.0f} s)\n")
    report = "\n".join(lines) + "\n"
    (own.folder / "report.md").write_text(report, encoding="utf-8")
    print(f"\n{report}")
    return 0 if endings and all(endings) else 1


if __name__ == "__main__":
    sys.exit(main())
