"""Measurements as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .measure import Measurement


def _setting(result: Measurement) -> str:
    adapters = f", {result.num_adapters} adapters in a batch" if result.num_adapters > 1 else ""
    return f"{result.mode}, B = {result.batch_size}, N = {result.num_virtual_tokens}{adapters}"


def to_markdown(results: Sequence[Measurement]) -> str:
    """One table for each mode, batch size and number of prompts."""
    tables = []
    for setting in dict.fromkeys(map(_setting, results)):
        rows = [result for result in results if _setting(result) == setting]
        floor = rows[0]
        counted = floor.flops is not None
        header = ["× floor", "seconds (quartiles)", "images/s", "tuned, without head"]
        header += ["× FLOPs", "× bytes kept", "× peak memory"] if counted else []
        lines = [f"**{setting}**\n", f"| | {' | '.join(header)} |"]
        lines.append("|" + "---|" * (len(header) + 1))
        for row in rows:
            low, middle, high = statistics.quantiles(row.seconds, n=4) if len(row.seconds) > 1 else 3 * row.seconds
            cells = [f"{row.over_floor:.2f}", f"{middle:.3g} ({low:.3g} – {high:.3g})", f"{row.images_per_second:.3g}"]
            cells.append(f"{row.trained_parameters:,}")
            if counted:
                for name in ("flops", "saved_bytes", "peak_bytes"):
                    value, reference = getattr(row, name), getattr(floor, name)
                    cells.append("–" if not value or not reference else f"{value / reference:.2f}")
            lines.append(f"| {row.variant} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"
