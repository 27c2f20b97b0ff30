"""Checks of the arguments of `open_connection`, `open_reconnecting`, `serve` and `Server.stop`.

An argument that can never work, or is surely a mistake, is refused before anything is opened. The error names
the argument and says what to do. An argument that may work passes.
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
"""The arguments that each kind of handler is called with."""

ALL_MODES: Final = 0o777
"""All permissions that a file may have."""

OWNER_MAY_WRITE: Final = 0o200
"""The permission that the owner of a UNIX socket's file needs to connect."""


# ---- one or several ----


def is_several(value: object) -> bool:
    """Return whether a value is a sequence of things. Text and bytes are one thing, or were meant as one."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def list_keys(keys: object) -> Sequence[object]:
    """Return one or several keys of a user as a sequence. It may contain other things too."""
    return cast("Sequence[object]", keys) if is_several(keys) else [keys]


# ---- the user's functions ----


def check_handlers(**handlers: object) -> None:
    """Check that handlers are async, and take the arguments that they will be called with.

    Arguments:
        handlers: by the names under which the user passed them. None is fine.

    Raises:
        TypeError: a handler is not async, or takes other arguments.
    """
    for name, handler in handlers.items():
        if handler is not None:
            if not may_be_async(handler):
                raise TypeError(
                    f"{name} must be an async function, not {handler!r}: define it with 'async def'"
                )
            _check_call(name, handler, *HANDLER_ARGUMENTS[name])


def may_be_async(value: object) -> bool:
    """Return whether a value may be an async function, or an object with an async ``__call__``.

    A partial, a method or a function that wraps another by `functools.wraps` counts as the function inside. A
    callable that is not written in Python cannot be judged, and counts as async.
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
    """Refuse a function that certainly cannot be called with these arguments."""
    inner = function
    while isinstance(inner, partial):
        inner = cast("partial[object]", inner).func
    if hasattr(inner, "__signature__") or hasattr(type(inner).__call__, "__signature__"):
        return  # the function sets its own signature, which may be only for show
    try:
        # Look at a decorated function from outside: its decorator may add arguments of its own.
        signature = inspect.signature(cast("Callable[..., Any]", function), follow_wrapped=False)
    except ValueError:
        return  # the function has no signature that Python can find
    try:
        signature.bind(*arguments)
    except TypeError as exc:
        shown = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
        takes = signature.replace(parameters=shown, return_annotation=signature.empty)
        called = ", ".join(arguments)
        raise TypeError(f"{name} is called with ({called}), but {function!r} takes {takes}: {exc}") from None


# ---- users and keys ----


def check_key_arguments(user: str | None, key: Key | None, service: str) -> None:
    """Check the user, key and service that `open_connection` was given."""
    if (user is None) != (key is None):
        raise TypeError("user and key go together: give both, or neither for a plain connection")
    if user is not None:
        encode_user(user)
    if key is not None and not isinstance(key, Key):
        raise TypeError(f"key must be a Key, not {type(key).__name__}")
    if encode_service(service) and key is None:
        raise ValueError("a service needs a key: a plain handshake has nothing to check it with")


def check_user_key(user_key: object, service: str) -> None:
    """Check the keys and the service that `serve` was given."""
    if callable(user_key):
        if not may_be_async(user_key):
            raise TypeError(
                f"user_key must be an async function, not {user_key!r}: define it with 'async def'"
            )
        _check_call("user_key", user_key, "user")
    elif user_key is not None and not isinstance(user_key, Mapping):
        raise TypeError("user_key must be an async function from user name to key, or a mapping")
    if type(cast("object", user_key)) is dict:  # another mapping may look up each key elsewhere
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
    """Check the `peer_user` that `serve` was given."""
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
    """Check that settings are `Settings`."""
    if not isinstance(settings, Settings):
        raise TypeError(f"settings must be Settings, not {type(settings).__name__}")


def check_flag(name: str, value: object) -> None:
    """Check that a flag is a bool. Text from a configuration, such as ``"no"``, would count as true."""
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
        raise ValueError(f"unix_mode {oct(mode)} does not let the file's owner connect: use 0o600 or more")


def check_grace(grace: object) -> None:
    """Check the seconds that requests in flight may take when a server stops."""
    check_amount("grace", grace, "seconds")


def check_amount(name: str, value: object, unit: str) -> None:
    """Check a number of something, which may be 0 and infinite."""
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of {unit}, not {type(value).__name__}")
    if math.isnan(value) or value < 0:
        raise ValueError(f"{name} must be at least 0 {unit}, not {value}")
