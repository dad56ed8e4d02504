"""The `ofakern` command. Each command is a module of this package with `add_parser` and `run`."""
