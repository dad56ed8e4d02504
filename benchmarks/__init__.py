"""Benchmarks of the ops against their peers: `ofakern bench`, run from a checkout of the repository."""
