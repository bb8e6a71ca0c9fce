"""Measurements as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .measure import Measurement


def to_markdown(results: Sequence[Measurement]) -> str:
    """One table for each mode, batch size and number of prompts."""
    tables = []
    settings = dict.fromkeys((r.mode, r.batch_size, r.num_virtual_tokens) for r in results)
    for mode, batch_size, number in settings:
        rows = [r for r in results if (r.mode, r.batch_size, r.num_virtual_tokens) == (mode, batch_size, number)]
        floor = rows[0]
        counted = floor.flops is not None
        header = ["× floor", "seconds (quartiles)", "images/s", "tuned, without head"]
        header += ["× FLOPs", "× bytes kept", "× peak memory"] if counted else []
        lines = [f"**{mode}, B = {batch_size}, N = {number}**\n", f"| | {' | '.join(header)} |"]
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
