"""`bokbok serve`: a server for development, which begins anew when its code has changed.

It replaces its process by another one with the same command line, so nothing of the old code is left but the
sockets that it listens on: who dials meanwhile waits. Where the new code cannot be loaded or served it says
so, and waits for the next change.
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
from ._handing_over import Handed, begin_anew, close_all, hand_over, take_over
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
"""In the environment of a process that began anew: the sockets that were handed to it.

Whoever runs that is about to mend what is wrong with the code."""


def serve(options: Namespace, out: Output) -> None:
    """Serve an object of a module, until a signal comes."""
    reloaded = os.environ.pop(RELOADED, None)  # which is nothing for processes that the code may start
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
        begin_anew([sys.executable, *sys.orig_argv[1:]], RELOADED, handed)


def _load_users(options: Namespace) -> Keyring | None:
    if options.users is None:
        return None
    with explained():
        return Keyring.load(options.users)


def load_object(place: str) -> Any:
    """Load what is at MODULE:OBJECT.

    Raises:
        CommandError: that is no place, or loading the module failed, or it has no such object; a traceback of
            the latter two is on the standard error then.
    """
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise CommandError(f"{place!r} is no MODULE:OBJECT, as in app:handler", Exit.USAGE)
    if module.endswith(".py") or os.sep in module or "" in module.split("."):
        raise CommandError(f"{module!r} is no name of a module, which app is for app.py", Exit.USAGE)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as exc:  # noqa: BLE001  (it is shown)
        traceback.print_exception(exc)
        raise CommandError(f"cannot load {place}: {type(exc).__name__}: {exc}") from None
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

    def add(self, path: str) -> None:
        """Look at one more file, of which it is known that it has not changed."""
        self._more.append(path)
        self._times[path] = _time_of(path)

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


async def _wait(files: Files, listeners: Listeners) -> Handed | None:
    """Wait for a change, and return what is handed over; or None after a signal."""
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
    """Serve until the code changes, and return what is handed over; or None after a signal.

    Arguments:
        listeners: those that were handed to this process, which are left as they are where serving fails; or
            none.
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
    """The user who is at the other end of a UNIX socket, by the system's word."""
    import pwd  # noqa: PLC0415  (not on Windows)

    try:
        return pwd.getpwuid(credentials.uid).pw_name
    except KeyError:
        return str(credentials.uid)
