"""`bokbok serve`: a server for development, which begins anew when its code has changed.

It replaces its process by another one with the same command line, so nothing of the old code is left. Where
the new code cannot be loaded it says so, and waits for the next change.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Any, Final

import trio

from .. import AddressError, Keyring, PeerCredentials, Server, UnixAddress, open_server
from .._addresses import as_address
from ._exits import INSECURE, CommandError, Exit, describe_os_error
from ._keys import explained
from ._output import Output

GRACE: Final = 10.0
"""Seconds that requests in flight may take after the first signal."""

RELOAD_GRACE: Final = 1.0
"""Seconds that they may take after a change of the code."""

POLL: Final = 0.5
"""Seconds between two looks at the files."""

RELOADED: Final = "BOKBOK_RELOADED"
"""In the environment of a process that began anew: whoever runs it is about to mend what is wrong."""


class _CannotLoad(Exception):  # noqa: N818  (what happened)
    """The code raised an error when it was loaded, which is its cause."""


def serve(options: Namespace, out: Output) -> None:
    """Serve an object of a module, until a signal comes."""
    users = None
    if options.users is not None:
        with explained():
            users = Keyring.load(options.users)
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    files = Files(guess_files(options.object))
    try:
        handler = load_object(options.object)
    except _CannotLoad as exc:
        traceback.print_exception(exc.__cause__)
        if options.no_reload or RELOADED not in os.environ:
            raise CommandError(str(exc)) from None
        out.note(f"{exc}; waiting for a change")
        trio.run(files.wait_for_change)
    else:
        if not trio.run(_serve, handler, users, options, files, out):
            return
    out.note("the code has changed")
    os.environ[RELOADED] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  (no shell is wanted)


def load_object(place: str) -> Any:
    """Load what is at MODULE:OBJECT.

    Raises:
        CommandError: that is no place.
        _CannotLoad: loading the module failed, or it has no such object.
    """
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise CommandError(f"{place!r} is no MODULE:OBJECT, as in app:handler", Exit.USAGE)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as exc:
        raise _CannotLoad(f"cannot load {place}: {type(exc).__name__}: {exc}") from exc
    return found


def guess_files(place: str) -> list[str]:
    """Where the module of MODULE:OBJECT may be, whether it can be loaded or not."""
    path = os.path.join(*place.partition(":")[0].split("."))
    return [os.path.abspath(f"{path}.py"), os.path.abspath(os.path.join(path, "__init__.py"))]


class Files:
    """The files of the code, and when each was changed: those of all modules, and some more.

    A module that failed to load is none, so this looks for what is new in `sys.modules` at every look.
    """

    def __init__(self, more: Iterable[str]) -> None:
        self._times: dict[str, int | None] = {}
        self._more = list(more)
        self.have_changed()

    async def wait_for_change(self) -> None:
        """Return when a file has changed, come or gone."""
        while not self.have_changed():  # noqa: ASYNC110  (nobody tells of it)
            await trio.sleep(POLL)

    def have_changed(self) -> bool:
        """Whether a file has changed since it was looked at first."""
        found = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
        for path in [
            *self._more,
            *(each for each in found if isinstance(each, str) and each.endswith(".py")),
        ]:
            self._times.setdefault(path, _time_of(path))
        return any(_time_of(path) != before for path, before in self._times.items())


def _time_of(path: str) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


async def _serve(handler: Any, users: Keyring | None, options: Namespace, files: Files, out: Output) -> bool:
    """Serve; return whether the code has changed."""
    has_changed = False

    async def watch(server: Server) -> None:
        nonlocal has_changed
        await files.wait_for_change()
        has_changed = True
        server.stop(RELOAD_GRACE)

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

        async def obey(server: Server) -> None:
            for grace in (GRACE, 0):
                await anext(signals)
                server.stop(grace)

        async with AsyncExitStack() as stack:
            server = await _open(stack, handler, users, options)
            nursery = await stack.enter_async_context(trio.open_nursery())
            how = "plain" if users is None else "sealed"
            out.note(f"serving {options.object} {how} on {', '.join(map(str, server.addresses))}")
            nursery.start_soon(obey, server)
            if not options.no_reload:
                nursery.start_soon(watch, server)
            await server.wait_stopped()
            nursery.cancel_scope.cancel()
    return has_changed


async def _open(stack: AsyncExitStack, handler: Any, users: Keyring | None, options: Namespace) -> Server:
    address = as_address(options.address)
    names_peers = users is None and isinstance(address, UnixAddress) and sys.platform == "linux"
    manager = open_server(
        address,
        handler,
        user_key=users,
        peer_user=name_peer if names_peers else None,
        service=options.service,
        insecure=options.insecure,
    )
    try:
        return await stack.enter_async_context(manager)
    except OSError as exc:
        raise CommandError(describe_os_error(exc)) from exc
    except AddressError as exc:
        raise CommandError(str(exc), Exit.USAGE if INSECURE in str(exc) else Exit.OURS) from exc
    except (TypeError, ValueError) as exc:
        raise CommandError(str(exc), Exit.USAGE) from exc


def name_peer(credentials: PeerCredentials) -> str:
    """The user who is at the other end of a UNIX socket, by the system's word."""
    import pwd  # noqa: PLC0415  (not on Windows)

    try:
        return pwd.getpwuid(credentials.uid).pw_name
    except KeyError:
        return str(credentials.uid)
