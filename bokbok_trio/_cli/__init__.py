"""The command `bokbok`, which is ``python -m bokbok_trio`` as well; ``docs/cli.rst`` describes it.

`main` parses the command line, has a command do its work, and says in one line what went wrong. Each module
has one concern: `_parser` the command line, `_connecting` the way to a connection, `_output` what is written,
`_exits` what errors mean; the others are the commands.
"""

from __future__ import annotations

import logging
import sys
import traceback
from argparse import Namespace
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from ._exits import Exit, explain, find_leaf
from ._fields import refuse_secrets
from ._output import Output, open_missing_descriptors
from ._parser import make_parser

logger = logging.getLogger("bokbok_trio")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Arguments:
        argv: its arguments; those of the process if None.

    Returns:
        The exit code; ``docs/cli.rst`` has the table.
    """
    open_missing_descriptors()
    args = list(sys.argv[1:] if argv is None else argv)
    options = Namespace(graceful=[], verbose=False)
    out = Output(json="--json" in args)
    try:
        refuse_secrets(args)
        try:
            options = make_parser().parse_args(args)
        except SystemExit:  # after the help
            return Exit.DONE
        out = Output(json=options.json, seq=options.seq, raw=options.raw)
        with _logging(options):
            options.run(options, out)
    except BaseException as exc:  # noqa: BLE001  (said below)
        return _fail(find_leaf(exc), options, out)
    return Exit.DONE


def _fail(error: BaseException, options: Namespace, out: Output) -> int:
    """Say what went wrong, and return the exit code."""
    failure = explain(error)
    if options.verbose:
        traceback.print_exception(error)
    out.failure(failure)
    return Exit.DONE if {failure.code, failure.exit} & set(options.graceful or ()) else failure.exit


@contextmanager
def _logging(options: Namespace) -> Generator[None]:
    """Show what the library logs, or nothing of it: what matters comes as an error too."""
    handler = logging.StreamHandler() if options.verbose or options.shows_log else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
