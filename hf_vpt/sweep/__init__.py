"""Sweeps by the published protocol: search settings on validation images, train the best anew, test it once a seed."""

from .arguments import PUBLISHED_GRID, SweepArguments
from .claims import Claim
from .ledger import Ledger
from .plan import SweepPlan, parse_sweep
from .protocol import run_sweep, work_off


__all__ = ["PUBLISHED_GRID", "Claim", "Ledger", "SweepArguments", "SweepPlan", "parse_sweep", "run_sweep", "work_off"]
