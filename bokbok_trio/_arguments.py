"""Checks of what `open_connection`, `open_reconnecting`, `serve` and `Server.stop` are given.

An argument that can never work, or hardly means what it says, is refused before anything is opened, by its
name and with what to do. What may work is let pass.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Final, cast

from ._keys import MAX_KEYS, Key, encode_service, encode_user
from ._settings import Settings

HANDLER_ARGUMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "request_handler": ("connection", "request"),
    "channel_handler": ("connection", "request", "channel"),
    "open_handler": ("connection",),
    "close_handler": ("connection",),
}
"""What each kind of handler is called with."""

ALL_MODES: Final = 0o777
"""The permissions of a file."""

OWNER_MAY_WRITE: Final = 0o200
"""The permission that its owner needs to connect to a UNIX socket."""


# ---- one or several ----


def is_several(value: object) -> bool:
    """Whether this is a sequence of something. Text and bytes are one thing, or were meant for one."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def list_keys(keys: object) -> Sequence[object]:
    """One or several keys of a user as a sequence, whatever is in it."""
    return cast("Sequence[object]", keys) if is_several(keys) else [keys]


# ---- functions of the user's ----


def check_handlers(**handlers: object) -> None:
    """Check that handlers are async, and can be called with what they will be called with.

    Arguments:
        handlers: by the names of the arguments; None is fine.

    Raises:
        TypeError: one is not.
    """
    for name, handler in handlers.items():
        if handler is not None:
            if not may_be_async(handler):
                raise TypeError(
                    f"{name} must be an async function, not {handler!r}: define it with 'async def'"
                )
            _check_call(name, handler, *HANDLER_ARGUMENTS[name])


def may_be_async(value: object) -> bool:
    """Whether something may be called and awaited: an async function, or an object with an async call.

    Partials, methods and functions that wrap an async one, as `functools.wraps` says, are as what is in
    them. Callables that are not written in Python cannot be judged, and may be.
    """
    while True:
        if inspect.iscoroutinefunction(value):
            return True
        if isinstance(value, partial):
            value = cast("partial[object]", value).func
        elif isinstance(value, FunctionType) and (wrapped := inspect.unwrap(value)) is not value:
            value = wrapped
        else:
            break
    if not callable(value) or isinstance(value, type | FunctionType | MethodType) or inspect.isbuiltin(value):
        return False
    call = type(value).__call__
    return not isinstance(call, FunctionType) or inspect.iscoroutinefunction(call)


def _check_call(name: str, function: object, *arguments: str) -> None:
    """Refuse a function that certainly cannot be called with so many arguments."""
    inner = function
    while isinstance(inner, partial):
        inner = cast("partial[object]", inner).func
    if hasattr(inner, "__signature__") or hasattr(type(inner).__call__, "__signature__"):
        return  # somebody made it up: it may be what is shown, and not what is taken
    try:
        # A decorator may add arguments to those that it is called with, so what it wraps says nothing.
        signature = inspect.signature(cast("Callable[..., Any]", function), follow_wrapped=False)
    except ValueError:
        return  # there is none
    try:
        signature.bind(*arguments)
    except TypeError as exc:
        shown = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
        takes = signature.replace(parameters=shown, return_annotation=signature.empty)
        called = ", ".join(arguments)
        raise TypeError(f"{name} is called with ({called}), but {function!r} takes {takes}: {exc}") from None


# ---- users and keys ----


def check_key_arguments(user: str | None, key: Key | None, service: str) -> None:
    """Check what `open_connection` is told of a key."""
    if (user is None) != (key is None):
        raise TypeError("user and key go together: give both, or neither for a plain connection")
    if user is not None:
        encode_user(user)
    if key is not None and not isinstance(key, Key):
        raise TypeError(f"key must be a Key, not {type(key).__name__}")
    if encode_service(service) and key is None:
        raise ValueError("a service needs a key: a plain handshake has nothing to check it with")


def check_user_key(user_key: object, service: str) -> None:
    """Check what `serve` is told of keys."""
    if callable(user_key):
        if not may_be_async(user_key):
            raise TypeError(
                f"user_key must be an async function, not {user_key!r}: define it with 'async def'"
            )
        _check_call("user_key", user_key, "user")
    elif user_key is not None and not isinstance(user_key, Mapping):
        raise TypeError("user_key must be an async function from user name to key, or a mapping")
    if type(cast("object", user_key)) is dict:  # other mappings may look keys up somewhere
        for user, keys in cast("dict[object, object]", user_key).items():
            _check_user(user, keys)
    if encode_service(service) and user_key is None:
        raise ValueError("a service needs user_key: a plain handshake has nothing to check it with")


def _check_user(user: object, keys: object) -> None:
    if not isinstance(user, str):
        raise TypeError(f"user_key must be a mapping from user names, which are str, not {user!r}")
    try:
        encode_user(user)
    except ValueError as exc:
        raise ValueError(f"user_key has a name that no user can have: {exc}") from None
    several = list_keys(keys)
    if not several:
        raise TypeError(f"user_key has no key for user {user!r}: leave the user out, or give a Key")
    for key in several:
        if not isinstance(key, Key):
            raise TypeError(
                f"user_key has {type(key).__name__} for user {user!r}, not a Key: make one of 32 bytes by "
                "Key(...), of text by Key.from_text(...)"
            )
    if len(several) > MAX_KEYS:
        raise ValueError(f"user_key has {len(several)} keys for user {user!r}; {MAX_KEYS} at most are tried")


def check_peer_user(peer_user: object, user_key: object) -> None:
    """Check what `serve` is told of naming peers."""
    if peer_user is None:
        return
    if user_key is not None:
        raise TypeError("peer_user is for plain connections: with user_key it is the key that names the user")
    if not callable(peer_user) or any(
        map(inspect.iscoroutinefunction, (peer_user, type(peer_user).__call__))
    ):
        raise TypeError("peer_user must be a function from PeerCredentials to user name, and not async")
    _check_call("peer_user", peer_user, "credentials")


# ---- the rest ----


def check_settings(settings: object) -> None:
    """Check that settings are some."""
    if not isinstance(settings, Settings):
        raise TypeError(f"settings must be Settings, not {type(settings).__name__}")


def check_flag(name: str, value: object) -> None:
    """Check that a bool is one: the text of a configuration, such as ``"no"``, is true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def check_backlog(backlog: object) -> None:
    """Check how many connections may wait to be accepted."""
    if backlog is None:
        return
    if not isinstance(backlog, int):
        raise TypeError(f"backlog must be an int or None, not {type(backlog).__name__}")
    if backlog < 0:
        raise ValueError(f"backlog must be at least 0, not {backlog}")


def check_repeats(repeats: object) -> None:
    """Check how often a request may be repeated."""
    if not isinstance(repeats, int):
        raise TypeError(f"max_repeats must be an int, not {type(repeats).__name__}")
    if repeats < 0:
        raise ValueError(f"max_repeats must be at least 0, not {repeats}")


def check_unix_mode(mode: object) -> None:
    """Check the permissions of a UNIX socket's file."""
    if not isinstance(mode, int):
        raise TypeError(f"unix_mode must be an int such as 0o660, not {type(mode).__name__}")
    if not 0 <= mode <= ALL_MODES:
        raise ValueError(
            f"unix_mode must be 0 to 0o777, not {mode}, which is {oct(mode)}: octal numbers begin with 0o"
        )
    if not mode & OWNER_MAY_WRITE:
        raise ValueError(f"unix_mode {oct(mode)} lets not even the file's owner connect: use 0o600 or more")


def check_grace(grace: object) -> None:
    """Check the seconds that requests in flight may take when a server stops."""
    if not isinstance(grace, int | float):
        raise TypeError(f"grace must be a number of seconds, not {type(grace).__name__}")
    if math.isnan(grace) or grace < 0:
        raise ValueError(f"grace must be at least 0 seconds, not {grace}")
