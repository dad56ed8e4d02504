"""Tasks: instructions with their data and metrics."""

from ofakern.tasks.task import METRICS, SPLITS, Metric, Task

__all__ = ["METRICS", "SPLITS", "Metric", "Task"]
