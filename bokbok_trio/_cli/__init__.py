"""The command `bokbok`, which is ``python -m bokbok_trio`` as well; ``docs/cli.rst`` describes it.

`main` parses the command line, runs a command, and reports an error in one line. Each module has one concern:
`_parser` parses the command line, `_connecting` opens connections, `_output` writes, and `_exits` maps errors
to exit codes and messages. The others are the commands.
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
        argv: its arguments; None for those of the process.

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
    except BaseException as exc:  # noqa: BLE001  (reported below)
        return _fail(find_leaf(exc), options, out)
    return Exit.DONE


def _fail(error: BaseException, options: Namespace, out: Output) -> int:
    """Report an error, and return the exit code."""
    failure = explain(error)
    if options.verbose:
        traceback.print_exception(error)
    out.failure(failure)
    return Exit.DONE if {failure.code, failure.exit} & set(options.graceful or ()) else failure.exit


@contextmanager
def _logging(options: Namespace) -> Generator[None]:
    """Show the log of the library if that is asked for. Else hide it: errors are reported anyway."""
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
