"""The command line: fm-fast train | sample | likelihood | evaluate | reproduce | info, a file a command."""

import argparse
import io
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import fm_fast
from fm_fast._version import __version__
from fm_fast.cli.evaluate import add_evaluate
from fm_fast.cli.likelihood import add_likelihood
from fm_fast.cli.parser import Parser
from fm_fast.cli.reproduce import add_reproduce
from fm_fast.cli.sample import add_sample
from fm_fast.cli.train import add_train
from fm_fast.train.execution.interrupt import say_nothing_more


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `fm-fast`: 0 on success, 1 for an error in the data or the run, 2 for a wrong command line, 130 for Ctrl-C.

    Training ends with 143 after SIGTERM and 129 after SIGHUP.
    """
    _spell_what_the_output_has_not()
    options = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.run(options)
    except BrokenPipeError:  # nobody reads any more, as after `| head`
        say_nothing_more([1])
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        print(f"fm-fast: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _spell_what_the_output_has_not() -> None:
    """A letter that its encoding lacks, as é in many, is not worth the result of long work."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")


def _show_warning(message: Warning | str, *place: Any) -> None:
    """In a line of its own, without the place in the code, which tells the user of a command nothing."""
    print(f"fm-fast: warning: {message}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The whole command line; every setting of a training run is an option of `train`."""
    root = Parser(prog="fm-fast", description="Flow matching for PyTorch.")
    root.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = root.add_subparsers(required=True, metavar="command")
    add_train(commands)
    add_sample(commands)
    add_likelihood(commands)
    add_evaluate(commands)
    add_reproduce(commands)
    info = commands.add_parser("info", help="print versions and which backend runs here, and why")
    info.set_defaults(run=_info)
    return root


def _info(options: argparse.Namespace) -> None:
    print(fm_fast.info())
