"""Boxes as bins."""
