"""Benchmarks that are drawn, not downloaded: where a sprite is, which way it points, how many objects there are."""

from .tasks import TASKS, load_drawn


__all__ = ["TASKS", "load_drawn"]
