"""`bokbok serve`: a server for development, which starts again when its code changes.

It replaces its process by another one with the same command line. So nothing of the old process is left but
its listening sockets, and a client that connects meanwhile waits. If the new code cannot be loaded or served,
the new process writes why, and waits for the next change.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Any, Final

import trio

from .. import AddressError, Keyring, PeerCredentials, Server, Settings, UnixAddress, open_server
from .._addresses import as_address
from .._listening import Listeners, open_listeners
from ._exits import INSECURE, CommandError, Exit, describe_os_error
from ._handing_over import Handed, close_all, hand_over, restart, take_over
from ._keys import explained
from ._output import Output

GRACE: Final = 10.0
"""Seconds that requests in flight may take after the first signal."""

RELOAD_GRACE: Final = 1.0
"""Seconds that they may take after a change of the code."""

MODE: Final = 0o600
"""Permissions of a UNIX socket."""

POLL: Final = 0.5
"""Seconds between two looks at the files."""

RELOADED: Final = "BOKBOK_RELOADED"
"""The environment variable that tells a restarted process which sockets are handed to it.

If the code of such a process fails, the process waits for a change, since somebody is at work on the code."""


def serve(options: Namespace, out: Output) -> None:
    """Serve an object of a module, until a signal arrives."""
    reloaded = os.environ.pop(RELOADED, None)  # not for processes that the code starts
    listeners = [] if reloaded is None else take_over(json.loads(reloaded))
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    files = Files(guess_files(options.object))
    try:
        users = _load_users(options)
        handler = load_object(options.object)
        handed = trio.run(_serve, handler, users, options, files, listeners, out)
    except CommandError as exc:
        if options.no_reload or reloaded is None:
            raise
        out.note(f"{exc}; waiting for a change")
        if options.users is not None:
            files.add(options.users)
        handed = trio.run(_wait, files, listeners)
    if handed is not None:
        out.note("the code has changed")
        restart([sys.executable, *sys.orig_argv[1:]], RELOADED, handed)


def _load_users(options: Namespace) -> Keyring | None:
    if options.users is None:
        return None
    with explained():
        return Keyring.load(options.users)


def load_object(place: str) -> Any:
    """Load the object that MODULE:OBJECT names.

    Raises:
        CommandError: the text is malformed, the module cannot be loaded, or it has no such object. For the
            latter two, a traceback is written to the standard error.
    """
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise CommandError(f"{place!r} is not MODULE:OBJECT, such as app:handler", Exit.USAGE)
    if module.endswith(".py") or os.sep in module or "" in module.split("."):
        raise CommandError(f"{module!r} is not the name of a module: that of app.py is app", Exit.USAGE)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as exc:  # noqa: BLE001  (the traceback shows it)
        traceback.print_exception(exc)
        raise CommandError(f"cannot load {place}: {type(exc).__name__}: {exc}") from None
    return found


def guess_files(place: str) -> list[str]:
    """Return the paths where the module of MODULE:OBJECT may be, even if it cannot be loaded."""
    path = os.path.join(*place.partition(":")[0].split("."))
    return [os.path.abspath(f"{path}.py"), os.path.abspath(os.path.join(path, "__init__.py"))]


class Files:
    """The source files of all loaded modules, and some more files, with the times of their last changes.

    Each check includes the modules that were loaded since the last one. A module that failed to load is not
    in `sys.modules`, so its file must be one of the others.

    Arguments:
        more: the paths of the other files.
    """

    def __init__(self, more: Iterable[str]) -> None:
        self._times: dict[str, int | None] = {}
        self._more = list(more)
        self.have_changed()

    def add(self, path: str) -> None:
        """Watch one more file, for changes from now on."""
        self._more.append(path)
        self._times[path] = _time_of(path)

    async def wait_for_change(self) -> None:
        """Wait until a file is changed, made or removed."""
        while not self.have_changed():  # noqa: ASYNC110  (nothing reports changes)
            await trio.sleep(POLL)

    def have_changed(self) -> bool:
        """Whether a file has changed since it was first seen."""
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


async def _wait(files: Files, listeners: Listeners) -> Handed | None:
    """Wait for a change, and return the sockets to hand over; None: a signal came."""
    handed = None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def obey() -> None:
                await anext(signals)
                nursery.cancel_scope.cancel()

            nursery.start_soon(obey)
            await files.wait_for_change()
            handed = hand_over(listeners)
            nursery.cancel_scope.cancel()
    await close_all(listeners)
    return handed


async def _serve(  # noqa: PLR0917  (parameters)
    handler: Any,
    users: Keyring | None,
    options: Namespace,
    files: Files,
    listeners: Listeners,
    out: Output,
) -> Handed | None:
    """Serve until the code changes, and return the sockets to hand over; None: a signal came.

    Arguments:
        listeners: those that were handed to this process, if any. They stay open if serving fails.
    """
    handed = None
    watching = trio.CancelScope()  # cancelled by the first signal

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

        async def obey(server: Server) -> None:
            await anext(signals)
            watching.cancel()
            out.note(f"stopping: requests in flight have {GRACE:g} s; another signal stops at once")
            server.stop(GRACE)
            await anext(signals)
            server.stop(0)

        async def watch(server: Server) -> None:
            nonlocal handed
            with watching:
                await files.wait_for_change()
                handed = hand_over(listeners)
                server.stop(RELOAD_GRACE)

        async with AsyncExitStack() as stack:
            if not listeners:
                listeners = await _listen(users, options)
                stack.push_async_callback(close_all, listeners)
            server = await _open(stack, listeners, handler, users, options)
            nursery = await stack.enter_async_context(trio.open_nursery())
            how = "plain" if users is None else "sealed"
            out.note(f"serving {options.object} {how} on {', '.join(map(str, server.addresses))}")
            nursery.start_soon(obey, server)
            if not options.no_reload:
                nursery.start_soon(watch, server)
            await server.wait_stopped()
            nursery.cancel_scope.cancel()
    if watching.cancel_called and handed is not None:
        await close_all(take_over(handed))
        return None
    return handed


async def _listen(users: Keyring | None, options: Namespace) -> Listeners:
    address = as_address(options.address)
    try:
        return await open_listeners(
            address,
            backlog=None,
            mode=MODE,
            insecure=options.insecure or users is not None,
            credentials=False,
            timeout=Settings().connect_timeout,
        )
    except OSError as exc:
        raise CommandError(describe_os_error(exc)) from exc
    except AddressError as exc:
        raise CommandError(str(exc), Exit.USAGE if INSECURE in str(exc) else Exit.OURS) from exc


async def _open(
    stack: AsyncExitStack, listeners: Listeners, handler: Any, users: Keyring | None, options: Namespace
) -> Server:
    is_unix = isinstance(as_address(options.address), UnixAddress)
    manager = open_server(
        listeners,
        handler,
        user_key=users,
        peer_user=name_peer if users is None and is_unix and sys.platform == "linux" else None,
        service=options.service,
        insecure=options.insecure,
    )
    try:
        return await stack.enter_async_context(manager)
    except (TypeError, ValueError) as exc:
        raise CommandError(str(exc), Exit.USAGE) from exc


def name_peer(credentials: PeerCredentials) -> str:
    """Return the name of the user at the other end of a UNIX socket, as the system reports it."""
    import pwd  # noqa: PLC0415  (not on Windows)

    try:
        return pwd.getpwuid(credentials.uid).pw_name
    except KeyError:
        return str(credentials.uid)
