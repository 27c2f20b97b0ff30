"""Reads the annotations of interfaces, and fills in the types that a generic interface is given."""

from __future__ import annotations

import re
import types
from abc import ABC
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
)
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, Final, Generic, Protocol, TypeVar, Union, cast, get_args, get_origin

import trio

STREAMS: Final = (AsyncIterable, AsyncIterator, trio.abc.ReceiveChannel)
"""The annotations of a stream of arguments. The method gets an object that is all of them at once."""

STREAM_LIKE: Final = (*STREAMS, AsyncGenerator, AbstractAsyncContextManager, trio.MemoryReceiveChannel)
"""Annotations that mean a stream, but may have the wrong form or stand in the wrong place."""

SENDING: Final = (trio.abc.SendChannel, trio.MemorySendChannel)
"""Annotations of a channel that the method would send to. Such a channel cannot be passed."""

ROOTS: Final = frozenset({object, Protocol, Generic, ABC})
"""Base classes that are not part of an interface."""


class Wrong(Exception):  # noqa: N818  (a problem that is collected)
    """An annotation cannot be used. The text says what to write instead."""


def find_origin(hint: Any) -> Any:
    """Return the generic class of an annotation, as ``list`` of ``list[int]``; else the annotation itself."""
    return get_origin(hint) or hint


def _is_class(hint: Any) -> bool:
    return isinstance(hint, type) and get_origin(hint) is None  # list[int] is an instance of type too


def find_class(form: Any) -> type:
    """Return the class of an interface, which may be given types, as in ``Store[File]``."""
    found = find_origin(form)
    if not isinstance(found, type) or found in {types.UnionType, Annotated}:
        raise TypeError(f"an interface is a class, such as a Protocol, and not {form!r}")
    return found


def is_protocol(form: Any) -> bool:
    """Whether an annotation is a Protocol, which may be given types."""
    found = find_origin(form)
    return isinstance(found, type) and bool(getattr(found, "_is_protocol", False)) and found is not Protocol


def is_callback(form: Any) -> bool:
    """Whether an annotation is a ``Callable``."""
    return form is Callable or get_origin(form) is Callable


def find_parameters(cls: type) -> tuple[Any, ...]:
    """Return the type variables of a class, in the order in which it takes types.

    For ``class Pairs(Store[U], Protocol[T, U])`` this returns T and U, as for ``Generic[T, U]``. The
    attribute ``__parameters__`` has U first.
    """
    for base in vars(cls).get("__orig_bases__", ()):
        if get_origin(base) in {Protocol, Generic}:
            return get_args(base)
    return getattr(cls, "__parameters__", ())


def bind_types(form: Any) -> dict[type, dict[Any, Any]]:
    """Return the types that replace the type variables of a class and of its bases, by class."""
    bound: dict[type, dict[Any, Any]] = {}

    def visit(form: Any) -> None:
        cls = find_class(form)
        bound[cls] = dict(zip(find_parameters(cls), get_args(form), strict=False))
        for base in vars(cls).get("__orig_bases__", cls.__bases__):
            if find_class(base) not in ROOTS:
                visit(fill_in(base, bound[cls]))

    visit(form)
    return bound


def fill_in(hint: Any, bound: Mapping[Any, Any]) -> Any:
    """Replace type variables by types."""
    if isinstance(hint, TypeVar):
        return bound.get(hint, hint)
    parameters = getattr(hint, "__parameters__", ())
    if _is_class(hint) or not parameters or not any(each in bound for each in parameters):
        return hint  # a generic class without types has parameters too
    return hint[tuple(bound.get(each, each) for each in parameters)]


def find_open(hint: Any) -> list[Any]:
    """Return the type variables that no type replaces."""
    if isinstance(hint, TypeVar):
        return [hint]
    return [] if _is_class(hint) else list(getattr(hint, "__parameters__", ()))


def split_none(hint: Any) -> tuple[Any, bool]:
    """Split ``X | None``: return X, and whether None was there."""
    if get_origin(hint) in {Union, types.UnionType}:
        others = [each for each in get_args(hint) if each is not type(None)]
        if len(others) == 1 and len(get_args(hint)) > 1:
            return others[0], True
    return hint, False


def strip(hint: Any) -> Any:
    """Remove ``Annotated`` and names by ``type NAME = ...`` from a stream, a callback or an object.

    Metadata means nothing for these. For values it does, and the codec understands it.
    """
    while True:
        if get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        elif type(alias := find_origin(hint)).__name__ == "TypeAliasType":  # new in Python 3.12
            try:
                value = alias.__value__
            except Exception as exc:  # noqa: BLE001  (it may be anything)
                raise Wrong(f"is {alias}, which cannot be evaluated: {exc}; import it at run time") from None
            hint = fill_in(value, dict(zip(alias.__type_params__, get_args(hint), strict=False)))
        else:
            return hint


def item_type(hint: Any) -> Any:
    """Return the type of the items of a stream of arguments."""
    args = get_args(hint)
    if not args:
        raise Wrong(f"is a stream of unknown items; write {_name(hint)}[int], say")
    return args[0]


def result_items(hint: Any) -> Any:
    """Return the type of the items of a stream of results."""
    args = get_args(hint)
    if get_origin(hint) is AbstractAsyncContextManager and args:
        channel = strip(args[0])
        if get_origin(channel) is trio.abc.ReceiveChannel:
            return item_type(channel)
        if channel is trio.abc.ReceiveChannel:
            raise Wrong(f"it returns a stream of unknown items; write {stream_form('int')}, say")
    raise Wrong(f"it returns {show(hint)}; write {stream_form()}")


def stream_form(items: str = "...") -> str:
    """Return the form of a method that streams its results, for a message."""
    return f"def ...(...) -> AbstractAsyncContextManager[ReceiveChannel[{items}]]"


def split_callback(hint: Any) -> tuple[list[Any], Any]:
    """Return the types of the parameters of an async ``Callable``, and of its result."""
    args: tuple[Any, ...] = get_args(hint)
    if not args or not isinstance(args[0], list):
        raise Wrong(f"is {show(hint)}, which does not give the types of its arguments; {CALLBACK_HELP}")
    given, result = cast("tuple[list[Any], Any]", args)
    result = strip(result)
    if get_origin(result) is Awaitable:
        return given, get_args(result)[0]
    if get_origin(result) is Coroutine:
        return given, get_args(result)[2]
    raise Wrong(f"is a callback that is not async; {CALLBACK_HELP}")


CALLBACK_HELP: Final = "write Callable[[float], Awaitable[None]], say"


def show(hint: Any) -> str:
    """Return an annotation as it is written in code."""
    if _is_class(hint):
        return str(hint.__qualname__)
    return re.sub(r"\b(?:[a-z_]\w*\.)+", "", str(hint))  # without modules


def _name(hint: Any) -> str:
    return getattr(find_origin(hint), "__name__", str(hint))
