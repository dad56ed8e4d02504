"""Text: noise and tokens of a slot, and back to text."""
