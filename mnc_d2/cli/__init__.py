"""The command ``mnc``. Each subcommand is a module of its own, thin over the library."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from . import data, evaluate, export, info, predict, report, serve, train

# Each has EXAMPLE, add_arguments(parser) and run(args); its docstring is its description.
COMMANDS = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "serve": serve,
    "export": export,
    "info": info,
    "data": data,
    "report": report,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="mnc", description="Multi-task Network Cascades: instance segmentation.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=(module.__doc__ or name).splitlines()[0],  # python -OO has no docstrings
            description=module.__doc__,
            epilog=f"example:\n{module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, name=name)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is wrong with the input ends it with one sentence.

    Args:
        arguments: of the command line; None for ``sys.argv``.
    """
    args = build_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", r"torch\.meshgrid: ", UserWarning)  # of Detectron2's anchors
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"mnc {args.name}: {error}")
