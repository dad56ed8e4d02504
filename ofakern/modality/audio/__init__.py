"""AUDIO slots: they parse and plan; `spec.py` says what they accept."""
