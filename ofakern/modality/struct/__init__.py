"""STRUCT slots: tables written out as text."""
