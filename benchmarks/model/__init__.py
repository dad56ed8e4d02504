"""Benchmarks of whole models, by the same seam as those of ops (benchmarks/core.py)."""
