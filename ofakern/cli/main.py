"""`ofakern <command>`: finds the command's module, runs it, and turns a user's mistake into one clear line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import ofakern
from ofakern.errors import OfakernError

# Command -> one line of help. The module is ofakern.cli.<command>, imported only when its command is asked for.
COMMANDS = {
    "info": "what this machine can run: versions, CPU, GPU, ops by backend",
    "plan": "print the plan of an instruction",
    "train": "train a model on the tasks of a YAML file",
    "generate": "follow an instruction with a saved model",
    "serve": "answer requests over HTTP with a saved model",
    "convert": "turn a checkpoint of OFASys or OFA into a saved model, or back",
    "parity": "recompute recorded cases of OFASys and compare",
    "bench": "time ops against their peers",
}

_EPILOG = """examples:
  ofakern info
  ofakern plan "[IMAGE:img] what does the image describe? -> [TEXT:cap]"
  ofakern COMMAND --help

exit code 2: a mistake in the arguments or in a file they name; OFAKERN_DEBUG=1 shows where it was found."""

USER_ERROR = 2


class Command(Protocol):
    def add_parser(self, subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


def available_commands() -> dict[str, str]:
    return {name: text for name, text in COMMANDS.items() if find_spec(f"ofakern.cli.{name}") is not None}


def load_command(name: str) -> Command:
    return cast(Command, import_module(f"ofakern.cli.{name}"))


def build_parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser with the arguments of `wanted`; the other commands are listed by name and help alone."""
    parser = argparse.ArgumentParser(
        prog="ofakern",
        description="Fast structured-bias attention and the models built on it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ofakern {ofakern.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in available_commands().items():
        if name == wanted:
            load_command(name).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    args = build_parser(wanted).parse_args(arguments)
    try:
        return load_command(args.command).run(args)
    except BrokenPipeError:
        # The reader (head, less) has gone: what is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OfakernError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        if os.environ.get("OFAKERN_DEBUG", "0") not in ("", "0"):
            raise
        print(f"ofakern {args.command}: {str(error).removeprefix(f'{args.command}: ')}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
