"""Examples, packed batches and readers."""
