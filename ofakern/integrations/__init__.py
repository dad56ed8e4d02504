"""Adapters to other libraries, each in a module named after its library and imported only by name."""
