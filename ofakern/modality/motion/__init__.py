"""Motions of a skeleton."""
