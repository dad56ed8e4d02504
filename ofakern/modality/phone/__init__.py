"""PHONE slots: names of phones, tokens of their own among the text tokens."""
