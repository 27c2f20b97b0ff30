"""Annotations of interfaces: what they mean, with the types filled in that a generic interface was given."""

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
"""What may be written for a stream of arguments; the method gets all of them at once."""

STREAM_LIKE: Final = (*STREAMS, AsyncGenerator, AbstractAsyncContextManager, trio.MemoryReceiveChannel)
"""What is meant for a stream, in the wrong place or form."""

SENDING: Final = (trio.abc.SendChannel, trio.MemorySendChannel)
"""What a method would send items to, which cannot be passed."""

ROOTS: Final = frozenset({object, Protocol, Generic, ABC})
"""Base classes that are no part of an interface."""


class Wrong(Exception):  # noqa: N818  (it is an offence, to be collected)
    """An annotation cannot be used; the text says what to write instead."""


def find_origin(hint: Any) -> Any:
    """What was given types, as ``list`` in ``list[int]``; else the annotation itself."""
    return get_origin(hint) or hint


def _is_class(hint: Any) -> bool:
    return isinstance(hint, type) and get_origin(hint) is None  # list[int] says that it is a type too


def find_class(form: Any) -> type:
    """The class of an interface that may have been given types, as in ``Store[File]``."""
    found = find_origin(form)
    if not isinstance(found, type) or found in {types.UnionType, Annotated}:
        raise TypeError(f"an interface is a class, such as a Protocol, and not {form!r}")
    return found


def is_protocol(form: Any) -> bool:
    """Whether it is a Protocol, which may have been given types."""
    found = find_origin(form)
    return isinstance(found, type) and bool(getattr(found, "_is_protocol", False)) and found is not Protocol


def is_callback(form: Any) -> bool:
    """Whether it is a ``Callable``."""
    return form is Callable or get_origin(form) is Callable


def find_parameters(cls: type) -> tuple[Any, ...]:
    """The type variables of a class, in the order in which it takes types.

    In ``class Pairs(Store[U], Protocol[T, U])`` that is T and U, as of ``Generic[T, U]``. Python's own
    attribute has U first.
    """
    for base in vars(cls).get("__orig_bases__", ()):
        if get_origin(base) in {Protocol, Generic}:
            return get_args(base)
    return getattr(cls, "__parameters__", ())


def bind_types(form: Any) -> dict[type, dict[Any, Any]]:
    """Return what stands for the type variables of a class and of its bases, by class."""
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
    """Put types in the place of type variables."""
    if isinstance(hint, TypeVar):
        return bound.get(hint, hint)
    parameters = getattr(hint, "__parameters__", ())
    if _is_class(hint) or not parameters or not any(each in bound for each in parameters):
        return hint  # a class itself has parameters too
    return hint[tuple(bound.get(each, each) for each in parameters)]


def find_open(hint: Any) -> list[Any]:
    """The type variables that nothing stands for."""
    if isinstance(hint, TypeVar):
        return [hint]
    return [] if _is_class(hint) else list(getattr(hint, "__parameters__", ()))


def split_none(hint: Any) -> tuple[Any, bool]:
    """Take ``None`` out of a union of it and one more; return that, and whether None was there."""
    if get_origin(hint) in {Union, types.UnionType}:
        others = [each for each in get_args(hint) if each is not type(None)]
        if len(others) == 1 and len(get_args(hint)) > 1:
            return others[0], True
    return hint, False


def strip(hint: Any) -> Any:
    """Take ``Annotated`` and names by ``type NAME = ...`` from around a stream, a callback or an object.

    Their own annotations mean nothing here. Of values they do, and the codec knows these names.
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
    """The type of the items of a stream."""
    args = get_args(hint)
    if not args:
        raise Wrong(f"is a stream of unknown items; write {_name(hint)}[int], say")
    return args[0]


def result_items(hint: Any) -> Any:
    """The type of the items of a stream of results."""
    args = get_args(hint)
    if get_origin(hint) is AbstractAsyncContextManager and args:
        channel = strip(args[0])
        if get_origin(channel) is trio.abc.ReceiveChannel:
            return item_type(channel)
        if channel is trio.abc.ReceiveChannel:
            raise Wrong(f"it returns a stream of unknown items; write {stream_form('int')}, say")
    raise Wrong(f"it returns {show(hint)}; write {stream_form()}")


def stream_form(items: str = "...") -> str:
    """What to write for a stream of results."""
    return f"def ...(...) -> AbstractAsyncContextManager[ReceiveChannel[{items}]]"


def split_callback(hint: Any) -> tuple[list[Any], Any]:
    """The types of the parameters of an async ``Callable``, and of its result."""
    args: tuple[Any, ...] = get_args(hint)
    if not args or not isinstance(args[0], list):
        raise Wrong(f"is {show(hint)}, which says nothing of its arguments; {CALLBACK_HELP}")
    given, result = cast("tuple[list[Any], Any]", args)
    result = strip(result)
    if get_origin(result) is Awaitable:
        return given, get_args(result)[0]
    if get_origin(result) is Coroutine:
        return given, get_args(result)[2]
    raise Wrong(f"is a callback that is not async; {CALLBACK_HELP}")


CALLBACK_HELP: Final = "write Callable[[float], Awaitable[None]], say"


def show(hint: Any) -> str:
    """An annotation, as it would be written."""
    if _is_class(hint):
        return str(hint.__qualname__)
    return re.sub(r"\b(?:[a-z_]\w*\.)+", "", str(hint))  # without modules


def _name(hint: Any) -> str:
    return getattr(find_origin(hint), "__name__", str(hint))
