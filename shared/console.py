"""The `lorasync` command: finds the subcommand's module, parses, runs, and turns errors into exit codes.

Nothing heavy is imported before the arguments are parsed: each package's `commands` module is light, and only the one
that is asked for is imported (all of them for `lorasync --help`).

Exit codes: 0 ok, 1 failed, 2 usage, 3 fenced, 4 corrupt, 130 interrupted.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from shared.errors import LorasyncError
from shared.lifeline import follow_parent

# Names, not imports: shared/ stands below the packages that these live in.
COMMANDS = {
    "demo": "rollout.demo.commands",
    "train": "trainer.commands",
    "rollout": "rollout.commands",
    "replay": "rollout.commands",
    "versions": "shared.store_commands",
    "verify": "shared.store_commands",
    "export": "shared.store_commands",
    "status": "shared.store_commands",
    "pin": "publisher.commands",
    "rollback": "publisher.commands",
    "gc": "publisher.commands",
}

Run = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lorasync: {message}. Try: {self.prog} --help\n")


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """The argument parser, with one subcommand or with all of them.

    Each commands module has `add_<name>(subparsers)`, which sets `run` as the parser's default.
    """
    top = _Parser(prog="lorasync", description="Keep the trained and the served policy the same, over one URL.")
    top.add_argument("-v", "--verbose", action="store_true", help="show the libraries' logs as well")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, module in COMMANDS.items():
        if only is None or only == name:
            getattr(importlib.import_module(module), f"add_{name}")(subparsers)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    follow_parent()
    words = list(sys.argv[1:] if arguments is None else arguments)
    named = next((word for word in words if not word.startswith("-")), None)
    options = parser(named if named in COMMANDS else None).parse_args(words)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(asctime)s %(levelname).1s %(name)s %(message)s",
        stream=sys.stderr,
    )
    for package in ("trainer", "publisher", "rollout", "shared"):
        logging.getLogger(package).setLevel(logging.INFO)
    run: Run = options.run
    try:
        return run(options)
    except LorasyncError as error:
        print(f"lorasync: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("lorasync: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
