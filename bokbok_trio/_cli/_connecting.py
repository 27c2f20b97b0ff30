"""Opens the connection of a command by its options, with a time limit."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Final, NamedTuple, TypeVar

import trio

from .. import AddressError, Connection, Key, Settings, open_connection
from ._exits import CommandError, Exit, describe_os_error
from ._fields import MAX_SIZE, decode_name

DEFAULT_TIMEOUT: Final = 60.0
"""Seconds that a command may take, including dialling. Streams have no such limit."""

SETTINGS: Final = Settings(max_message_size=MAX_SIZE)
"""A message may be as large as the other side allows, up to `MAX_SIZE`."""

USER: Final = "BOKBOK_USER"
KEY_FILE: Final = "BOKBOK_KEY_FILE"

_T = TypeVar("_T")


class Session(NamedTuple):
    """The connection of a command, with its options and its time limit.

    Attributes:
        connection: the connection.
        options: the options of the command.
        scope: the scope of the command. Its deadline is the time limit.
    """

    connection: Connection
    options: Namespace
    scope: trio.CancelScope

    def allow_any_time(self) -> None:
        """Remove the deadline, unless the options give one."""
        if self.options.timeout is None:
            self.scope.deadline = math.inf

    def allow_usual_time(self) -> None:
        """Set the usual deadline, counted from now, unless the options give one."""
        if self.options.timeout is None:
            self.scope.deadline = trio.current_time() + DEFAULT_TIMEOUT


def load_key(path: str) -> Key:
    """Load a key from a file.

    Raises:
        CommandError: the file cannot be read, or holds no key.
    """
    try:
        return Key.load(path)
    except OSError as exc:
        raise CommandError(f"cannot use the key file {describe_os_error(exc)}") from exc
    except ValueError as exc:
        raise CommandError(str(exc)) from exc


def find_key(options: Namespace) -> Key | None:
    """Return the key to use, or None for a plain connection. Put the user into the options.

    Raises:
        CommandError: the options contradict each other, or the key cannot be loaded.
    """
    if options.plain:
        if options.user or options.key_file:
            raise CommandError("--plain excludes --user and --key-file", Exit.USAGE)
        return None
    path = options.key_file or os.environ.get(KEY_FILE)
    options.user = options.user or decode_name(os.environ.get(USER, "")) or None
    if not path and not options.user:
        return None
    if not path:
        raise CommandError(
            f"a user needs a key: give --key-file FILE, or set {KEY_FILE}; or use none by --plain", Exit.USAGE
        )
    if not options.user:
        raise CommandError(
            f"a key needs a user: give --user NAME, or set {USER}; or use none by --plain", Exit.USAGE
        )
    return load_key(path)


def run_connected(
    options: Namespace, work: Callable[[Session], Awaitable[_T]], *, is_stream: bool = False
) -> _T:
    """Open a connection, run a function with it, and return the result.

    Arguments:
        options: the options of the command.
        work: the function.
        is_stream: whether there is no time limit, unless the options give one.

    Raises:
        CommandError: there is no connection, or the time limit has passed.
        BaseException: any exception of the function.
    """
    key = find_key(options)
    limit = (None if is_stream else DEFAULT_TIMEOUT) if options.timeout is None else options.timeout
    limit = limit or math.inf

    async def run() -> _T:
        with trio.move_on_after(limit) as scope:
            async with AsyncExitStack() as stack:
                connection = await _open(stack, options, key)
                return await work(Session(connection, options, scope))
        raise CommandError(f"no answer within {limit:g} s", Exit.TIME_OUT)

    return trio.run(run)


async def _open(stack: AsyncExitStack, options: Namespace, key: Key | None) -> Connection:
    try:
        return await stack.enter_async_context(
            open_connection(
                options.address,
                user=options.user,
                key=key,
                service=options.service,
                insecure=options.insecure,
                settings=SETTINGS,
            )
        )
    except OSError as exc:
        raise CommandError(describe_os_error(exc), Exit.NO_CONNECTION) from exc
    except AddressError:
        raise
    except ValueError as exc:
        raise CommandError(str(exc), Exit.USAGE) from exc
