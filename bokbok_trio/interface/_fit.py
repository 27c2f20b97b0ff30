"""Checks that an implementation fits an interface, before anybody calls it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Coroutine
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Final, get_type_hints

from ._annotations import find_origin, is_protocol
from ._inspection import CALL, offend
from ._spec import NO_STREAM, Interface, Method


def check_fit(interface: Interface, implementation: object) -> None:
    """Check that an implementation has every method of an interface, and that it can be called as the
    interface says.

    Type checkers check the types of the arguments.

    Raises:
        TypeError: it does not fit. The text lists all problems.
    """
    if isinstance(implementation, type):
        raise TypeError(
            f"{implementation.__qualname__} is a class, and {interface.name} is served by an object: write "
            f"{implementation.__name__}(...)"
        )
    offences: list[str] = []
    for method in interface.methods.values():
        offences += [f"{method.name}: {each}" for each in _find_offences(method, implementation)]
    if offences:
        name = getattr(implementation, "__qualname__", type(implementation).__qualname__)
        raise offend(f"{name} does not implement {interface.name}", offences)


def _find_offences(method: Method, implementation: object) -> list[str]:
    function = implementation if method.name == CALL else getattr(implementation, method.name, None)
    if not callable(function):
        return ["it is missing" if function is None else f"it is {function!r}, not a method"]
    if _is_left_to_do(method, function):
        return ["it is missing: the one of the Protocol does nothing"]
    kind = _find_kind(function)
    if method.items is not NO_STREAM:
        if kind == "async":
            return ["it streams, and is async without yield; write an async generator"]
    elif kind == "generator":
        return ["it is an async generator, and does not stream; write return in place of yield"]
    elif kind == "sync":
        return ["it is not async; write 'async def'"]
    return [] if method.is_positional else _compare_parameters(method, function)


def _compare_parameters(method: Method, function: Any) -> list[str]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return []  # it is not written in Python, and checks its arguments itself when it is called
    offences: list[str] = []
    kinds = inspect.Parameter
    takes_any = any(each.kind is kinds.VAR_KEYWORD for each in signature.parameters.values())
    wanted = {each.name: each for each in method.parameters}
    for parameter in wanted.values():
        own = signature.parameters.get(parameter.name)
        if own is None or own.kind in {kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD}:
            if not takes_any:
                offences.append(f"it does not take {parameter.name}; add it")
        elif own.kind is kinds.POSITIONAL_ONLY:
            offences.append(f"it takes {own.name} by position only, and is called by name; take the '/' away")
        elif parameter.has_default and own.default is own.empty:
            offences.append(f"its {own.name} may be left out in the interface; give it a default")
    for own in signature.parameters.values():
        is_any = own.kind in {kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD}
        if own.name not in wanted and not is_any and own.default is own.empty:
            offences.append(f"it needs {own.name}, which the interface does not have; give it a default")
    return offences


def _find_kind(function: Any) -> str:
    """Return "async", "generator" (an async one) or "sync"; "unknown" if a function is not Python code."""
    while True:
        if inspect.iscoroutinefunction(function):
            return "async"
        if inspect.isasyncgenfunction(function):
            return "generator"
        if isinstance(function, partial):
            function = function.func
        elif isinstance(function, MethodType):
            function = function.__func__
        elif (wrapped := getattr(function, "__wrapped__", None)) is not None:
            function = wrapped
        elif isinstance(function, FunctionType):
            return _find_kind_of_result(function)
        elif inspect.isbuiltin(function):
            return "sync"
        elif isinstance(call := type(function).__call__, FunctionType):
            function = call
        else:
            return "unknown"


def _find_kind_of_result(function: FunctionType) -> str:
    """What a function is that may return something to be awaited, as type checkers allow."""
    if function.__name__ == "<lambda>":
        return "unknown"
    try:
        result = get_type_hints(function).get("return")
    except Exception:  # noqa: BLE001  (annotations may be anything)
        return "unknown"
    return "async" if find_origin(result) in {Awaitable, Coroutine} else "sync"


def _is_left_to_do(method: Method, function: Any) -> bool:
    """Whether a method is inherited from a Protocol, where it has no body."""
    if not isinstance(function, MethodType) or not isinstance(function.__func__, FunctionType):
        return False
    code = function.__func__.__code__
    if code.co_code not in _NOTHING or not set(code.co_consts) <= {None, function.__doc__}:
        return False
    owners = (each for each in inspect.getmro(type(function.__self__)) if method.name in vars(each))
    return is_protocol(next(owners, object))


async def _nothing() -> None: ...


async def _documented() -> None:
    """Say so."""


def _nothing_sync() -> None: ...


def _documented_sync() -> None:
    """Say so."""


_NOTHING: Final = frozenset(
    each.__code__.co_code for each in (_nothing, _documented, _nothing_sync, _documented_sync)
)
